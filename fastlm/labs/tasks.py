"""One model, four jobs: writing, classifying, translating, answering. Each has a mark and something simple beside it.

Gemma does them from the prompt alone; a small Korean model of ours writes, and learns to classify by fine-tuning.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastlm.inference import SamplingParams, generate
from fastlm.inference.evaluation import score_text
from fastlm.labs.korean_base import korean_base
from fastlm.labs.questions import Language, Reading, exact_match, f1, questions
from fastlm.labs.result import Cell
from fastlm.labs.statistics import Interval, bootstrap, distinct_n
from fastlm.labs.task_baselines import WordList, letter_ngrams, unigram_bits_per_byte
from fastlm.labs.workbench import Workbench
from fastlm.model import load_classifier, load_model
from fastlm.training import FinetuneConfig, TrainingConfig, finetune, load_base
from fastlm.training.examples import Labelled

WRITTEN_TEXTS, WRITTEN_TOKENS = 24, 40
SCORED_REVIEWS = 150
TRAIN_REVIEWS, ASKED_REVIEWS, ASKED_OF_GEMMA = 4000, 1000, 96
FINETUNE_STEPS, FINETUNE_BATCH, FINETUNE_RATE = 150, 32, 0.003
LABELS = ("나쁨", "좋음")
PAIRS, LONGEST_PAIR = 40, 60  # sentence pairs, characters of the Korean
READINGS = 48  # questions in each language
SHOTS = 4


def run(lab: Workbench) -> None:
    lab.note(
        lab.say(
            "일마다 점수와 기준이 나란히 있습니다. 기준보다 못한 모델은 그 일을 배운 것이 아닙니다.",
            "Each job's mark stands beside a baseline. A model that is not above it has not learned the job.",
        )
    )
    marks: list[tuple[str, float]] = []  # for the picture
    with lab.part("쓰기", "writing"):
        write(lab, marks)
    with lab.part("영화평 분류", "classifying reviews"):
        classify(lab, marks)
    with lab.part("한영 번역", "Korean to English"):
        translate(lab, marks)
    with lab.part("질문에 답하기", "answering questions"):
        answer(lab, marks)
    if marks:
        title = lab.say("일마다의 점수와 기준 (0에서 1)", "Marks and baselines of each job (0 to 1)")
        with lab.picture("marks", title, height=0.3 * len(marks) + 0.8) as axes:
            names, values = [name for name, _ in marks][::-1], [value for _, value in marks][::-1]
            bars = axes[0, 0].barh(range(len(names)), values, color="tab:blue")
            axes[0, 0].bar_label(bars, fmt="%.2f", padding=2, fontsize="small")
            axes[0, 0].set_yticks(range(len(names)), [lab.label(name, name) for name in names])
            axes[0, 0].set_xlim(0, 1.1)


def write(lab: Workbench, marks: list[tuple[str, float]]) -> None:
    base = korean_base(lab)
    tokenizer = base.dataset.tokenizer
    params = SamplingParams(max_tokens=WRITTEN_TOKENS, temperature=0.8, seed=lab.seed)
    beginning = [tokenizer.eos_token_id or 0]  # where a review begins
    texts = generate(load_model(base.directory), tokenizer, [beginning] * WRITTEN_TEXTS, params)
    people = lab.data("nsmc/reviews.txt").read_text(encoding="utf-8").splitlines()[-WRITTEN_TEXTS:]
    written, human = [t.text.split() for t in texts], [text.split() for text in people]
    unigram = unigram_bits_per_byte(base.dataset)
    ours = base.result.bits_per_byte or 0.0
    rows: list[list[Cell]] = [
        [lab.say("우리 모델", "our model"), ours, distinct_n(written, 1), distinct_n(written, 2)],
        [lab.say("토큰의 빈도만", "frequency of tokens"), unigram, None, None],
        [lab.say("사람이 쓴 글", "people's texts"), None, distinct_n(human, 1), distinct_n(human, 2)],
    ]
    with lab.part("쓰기 (Gemma)", "writing (Gemma)"):
        text = "\n".join(
            people[:1] + lab.data("nsmc/reviews.txt").read_text(encoding="utf-8").splitlines()[-SCORED_REVIEWS:]
        )
        *_, score = score_text(lab.llm(), text, context_length=256)
        rows.insert(1, [f"{lab.model_name}", score.bits_per_byte, None, None])
    lab.table(
        lab.say("쓰기: 영화평", "Writing: film reviews"),
        [lab.say("무엇", "who"), lab.say("바이트당 비트", "bits a byte"), "distinct-1", "distinct-2"],
        rows,
    )
    lab.note(lab.say("우리 모델이 쓴 글: ", "Our model wrote: ") + texts[0].text.strip())
    lab.finding(
        lab.say("우리 모델은 빈도보다 많이 안다", "Our model knows more than frequencies"),
        ours < unigram,
        lab.say(
            f"바이트당 {ours:.2f}비트이고, 빈도만으로는 {unigram:.2f}비트입니다.",
            f"It takes {ours:.2f} bits a byte; frequencies alone take {unigram:.2f}.",
        ),
    )


def classify(lab: Workbench, marks: list[tuple[str, float]]) -> None:
    def reviews(name: str, count: int) -> list[Labelled]:
        return [Labelled(row["text"], LABELS[int(row["label"])]) for row in lab.rows(name)[:count]]

    train = reviews("nsmc/train.tsv", lab.size(TRAIN_REVIEWS, 20_000))
    valid = reviews("nsmc/valid.tsv", ASKED_REVIEWS)
    base = korean_base(lab)
    task = FinetuneConfig("classification", max_length=64)
    ours: list[bool] = []
    for seed in lab.seeds():
        config = TrainingConfig(
            steps=lab.size(FINETUNE_STEPS, 5 * FINETUNE_STEPS),
            batch_size=FINETUNE_BATCH,
            optimizer="adamw",
            learning_rate=FINETUNE_RATE,
            embedding_learning_rate=FINETUNE_RATE,
            seed=seed,
            evaluations=1,
        )
        out = lab.run_directory(f"tasks-classifier-{seed}")
        finetune(load_base(base.directory), (train, valid), out, task, config, on_progress=lab.on_progress)
        model = load_classifier(out).eval()
        chances = model.predict(base.dataset.tokenizer, [e.text for e in valid])
        ours += [model.labels[i] == e.label for i, e in zip(chances.argmax(-1).tolist(), valid, strict=True)]
    majority = max(sum(e.label == label for e in valid) for label in LABELS) / len(valid)
    found: dict[str, Interval] = {}
    with lab.part("글자 조각", "pieces of words"):
        counted = letter_ngrams(lab, [(e.text, e.label) for e in train], [e.text for e in valid])
        right = [a == e.label for a, e in zip(counted, valid, strict=True)]
        found[lab.say("글자 조각과 로지스틱 회귀", "letter n-grams, logistic regression")] = bootstrap(
            right, seed=lab.seed
        )
    with lab.part("영화평 분류 (Gemma)", "classifying (Gemma)"):
        for shots in (0, 2 * SHOTS):
            name = lab.say(f"{lab.model_name}, 보기 {shots}개", f"{lab.model_name}, {shots} examples")
            found[name] = bootstrap(ask_reviews(lab, train[:shots], valid[:ASKED_OF_GEMMA]), seed=lab.seed)
    tuned = bootstrap(ours, seed=lab.seed)
    count, seeds = f"{len(train):,}", len(lab.seeds())
    found[lab.say(f"우리 모델, 예 {count}개, 씨앗 {seeds}개", f"ours, {count} examples, {seeds} seeds")] = tuned
    rows = [
        [lab.say("가장 흔한 답", "the commonest answer"), f"{majority:.3f}"],
        *([n, str(i)] for n, i in found.items()),
    ]
    lab.table(lab.say("영화평 분류: 정답률", "Classifying reviews: share right"), [lab.say("무엇", "who"), ""], rows)
    marks += [(rows[0][0], majority), *((name, interval.value) for name, interval in found.items())]
    lab.finding(
        lab.say("고친 모델은 가장 흔한 답보다 낫다", "The fine-tuned model beats the commonest answer"),
        tuned.low > majority,
        lab.say(f"정답률 {tuned}, 가장 흔한 답은 {majority:.3f}입니다.", f"{tuned} against {majority:.3f}."),
    )


def ask_reviews(lab: Workbench, shots: Sequence[Labelled], valid: Sequence[Labelled]) -> list[bool]:
    """Which label's first token is likelier after the review, each divided by what it gets for no content."""
    head = "".join(f"영화평: {e.text}\n느낌: {e.label}\n\n" for e in shots)
    llm = lab.llm()
    first = [llm.tokenizer.encode(f" {label}")[0] for label in LABELS]
    asked = [f"{head}영화평: {text}\n느낌:" for text in (*(e.text for e in valid), "N/A")]
    logits = llm.embed(asked, pooling="logits").log_softmax(-1)[:, first]
    chosen = (logits[:-1] - logits[-1]).argmax(-1).tolist()
    return [LABELS[i] == e.label for i, e in zip(chosen, valid, strict=True)]


def translate(lab: Workbench, marks: list[tuple[str, float]]) -> None:
    sacrebleu = lab.package("sacrebleu", "sacrebleu")
    train = [(row["ko"], row["en"]) for row in lab.rows("ko-en/train.tsv")]
    short = [(row["ko"], row["en"]) for row in lab.rows("ko-en/valid.tsv") if len(row["ko"]) <= LONGEST_PAIR][:PAIRS]
    shots = sorted(train, key=lambda pair: abs(len(pair[0]) - LONGEST_PAIR // 2))[:SHOTS]
    head = "".join(f"Korean: {ko}\nEnglish: {en}\n\n" for ko, en in shots)
    words = WordList(train)
    said = {
        lab.say("그대로 베끼기", "copying"): [ko for ko, _ in short],
        lab.say("낱말 사전", "word list"): [words.translate(ko) for ko, _ in short],
    }
    with lab.part("한영 번역 (Gemma)", "Korean to English (Gemma)"):
        params = SamplingParams(max_tokens=48, temperature=0, stop=("\n",))
        prompts = [f"{head}Korean: {ko}\nEnglish:" for ko, _ in short]
        said[f"{lab.model_name}, {SHOTS}"] = [c.text.strip() for c in lab.llm().generate(prompts, params)]
    references = [[en for _, en in short]]
    chrf = {name: sacrebleu.corpus_chrf(texts, references).score for name, texts in said.items()}
    bleu = {name: sacrebleu.corpus_bleu(texts, references).score for name, texts in said.items()}
    lab.table(
        lab.say(f"한영 번역: 문장 {len(short)}쌍", f"Korean to English: {len(short)} sentences"),
        [lab.say("무엇", "who"), "chrF", "BLEU"],
        [[name, chrf[name], bleu[name]] for name in said],
    )
    marks += [(f"chrF: {name}", score / 100) for name, score in chrf.items()]
    if len(said) == 3:
        model, best = chrf[f"{lab.model_name}, {SHOTS}"], max(list(chrf.values())[:2])
        lab.finding(
            lab.say("모델의 번역은 두 기준보다 낫다", "The model translates better than both baselines"),
            model > best,
            lab.say(
                f"chrF {model:.1f}, 기준은 {best:.1f}까지입니다.",
                f"chrF {model:.1f}; the better baseline has {best:.1f}.",
            ),
        )


def answer(lab: Workbench, marks: list[tuple[str, float]]) -> None:
    rows: list[list[Cell]] = []
    for language in ("ko", "en"):
        readings = questions(language, READINGS + SHOTS, lab.seed)
        given = read(lab, readings[:SHOTS], readings[SHOTS:], language)
        asked = readings[SHOTS:]
        exact = bootstrap([exact_match(g, r.answer) for g, r in zip(given, asked, strict=True)], seed=lab.seed)
        overlap = bootstrap([f1(g, r.answer) for g, r in zip(given, asked, strict=True)], seed=lab.seed)
        first = sum(exact_match(r.first, r.answer) for r in asked) / len(asked)
        name = lab.say("한국어" if language == "ko" else "영어", "Korean" if language == "ko" else "English")
        rows.append([name, str(exact), str(overlap), first])
        marks += [(f"EM: {name}", exact.value), (lab.say(f"{name}, 먼저 나온 것", f"{name}, the first"), first)]
        lab.finding(
            lab.say(
                f"{name}로 묻는 사람의 것을 찾는다", f"In {name} it finds what is asked, not just the first of its kind"
            ),
            exact.low > first,
            lab.say(
                f"정확히 맞은 비율 {exact}, 먼저 나온 것은 {first:.2f}입니다.",
                f"Exact in {exact}; the first in {first:.2f}.",
            ),
        )
    lab.table(
        lab.say(f"질문에 답하기: 말마다 질문 {READINGS}개", f"Answering: {READINGS} questions in each language"),
        [
            lab.say("말", "language"),
            lab.say("정확히", "exact match"),
            "F1",
            lab.say("먼저 나온 것", "the first of its kind"),
        ],
        rows,
    )


def read(lab: Workbench, shots: Sequence[Reading], asked: Sequence[Reading], language: Language) -> list[str]:
    words = ("글", "질문", "답") if language == "ko" else ("Text", "Question", "Answer")

    def show(reading: Reading) -> str:
        return f"{words[0]}: {reading.passage}\n{words[1]}: {reading.question}\n{words[2]}:"

    head = "".join(f"{show(shot)} {shot.answer}\n\n" for shot in shots)
    params = SamplingParams(max_tokens=8, temperature=0, stop=("\n",))
    return [c.text.strip() for c in lab.llm().generate([head + show(r) for r in asked], params)]
