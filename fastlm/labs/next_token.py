"""The next token: all that a language model learns is to guess it, and its guesses are a whole distribution each.

One run of training is stopped at several moments, and each time the same held-out text is read: what the model
expects at every position, and how surprised it is by what comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from fastlm.labs.next_token_measures import HeldOut, Reading
from fastlm.labs.pictures import drawable
from fastlm.labs.small_models import prepare_documents
from fastlm.labs.statistics import Spread, spread
from fastlm.labs.workbench import Workbench
from fastlm.model import build_model, load_model
from fastlm.model.checkpoint import LanguageModel
from fastlm.training import Progress, TokenDataset, TrainingConfig, train
from fastlm.training.config import Preset, transformer_config

DOCUMENTS = 25_000
VOCAB_SIZE = 1024
MODEL = Preset(hidden_size=128, num_layers=2, head_dim=64, context_length=64, batch_size=16)
MOMENTS = (0, 5, 10, 20, 40, 80, 160, 320, 600)  # steps; the last is the length of the run
SHOWN = (0, 20, 80, 600)
READ_WINDOWS = 64  # of the validation text at each moment
SENTENCE = {
    "ko": "이 영화 정말 재미있게 봤습니다. 배우들 연기도 최고",
    "en": "What say you, my lord? I would not have it so.",
}


def run(lab: Workbench) -> None:
    with lab.part("다음 토큰 배우기", "learning the next token"):
        dataset = _text(lab)
        held_out = HeldOut(dataset, MODEL.context_length, READ_WINDOWS)
        sentence = [dataset.eos_token_id, *dataset.tokenizer.encode(SENTENCE[lab.lang])]
        readings: dict[int, list[Reading]] = {}
        guesses: dict[int, Tensor] = {}
        for seed in lab.seeds():
            for step, model in moments(lab, dataset, seed):
                readings.setdefault(step, []).append(held_out.read(model))
                guesses.setdefault(step, expectations(model, sentence))  # of the first seed
        _tell(lab, readings, held_out)
        _show_guesses(lab, dataset, guesses, sentence)


def _text(lab: Workbench) -> TokenDataset:
    if lab.lang == "ko":
        documents = lab.data("nsmc/reviews.txt").read_text(encoding="utf-8").splitlines()
    else:
        speeches = lab.data("tinyshakespeare.txt").read_text(encoding="utf-8").split("\n\n")
        documents = [" ".join(speech.split()) for speech in speeches]
    return prepare_documents(lab, "next-token", documents[:DOCUMENTS], vocab_size=VOCAB_SIZE)


def moments(lab: Workbench, dataset: TokenDataset, seed: int) -> Iterator[tuple[int, LanguageModel]]:
    """The model after so many steps each: `train` stops when it is asked to, and goes on when called again."""
    last = MOMENTS[-1]
    config = TrainingConfig(
        steps=last,
        batch_size=MODEL.batch_size,
        learning_rate=0.02,
        embedding_learning_rate=0.004,
        evaluations=0,
        seed=seed,
    )
    model_config = transformer_config(VOCAB_SIZE, MODEL)
    torch.manual_seed(seed)
    yield 0, build_model(model_config).eval()  # the one that `train` begins with
    out = lab.run_directory(f"next-token-{seed}")
    done = 0

    def note(progress: Progress) -> None:
        nonlocal done
        done = progress.step
        lab.on_progress(progress)

    def is_time() -> bool:
        return next_stop <= done < last

    for next_stop in MOMENTS[1:]:
        train(model_config, config, dataset, out, on_progress=note, should_stop=is_time)
        yield next_stop, load_model(out).eval()


@torch.inference_mode()
def expectations(model: LanguageModel, ids: list[int]) -> Tensor:
    """`(len(ids) - 1, vocab_size)`: the distribution of what follows the first token, the first two, …"""
    return model(torch.tensor([ids[:-1]]))[0].softmax(-1)


def _tell(lab: Workbench, readings: dict[int, list[Reading]], held_out: HeldOut) -> None:
    steps = list(readings)
    found = {step: [spread(values) for values in zip(*readings[step], strict=True)] for step in steps}
    unigram, bigram = held_out.unigram_perplexity, held_out.bigram_perplexity
    columns = (
        "걸음/perplexity/첫 짐작이 맞은 비율/엔트로피/빈도와의 거리/이웃과의 거리/섞은 글",
        "step/perplexity/first guess right/entropy/from frequencies/from neighbours/shuffled",
    )
    lab.table(
        lab.say("배우는 동안 처음 보는 글을 읽으면", "Held-out text, read as learning goes on"),
        lab.say(*columns).split("/"),
        [[step, str(found[step][0]), *[each.mean for each in found[step][1:]]] for step in steps],
    )
    lab.number("readings", {step: [reading._asdict() for reading in readings[step]] for step in steps})
    lab.number("baselines", {"unigram": unigram, "bigram": bigram})
    _draw_course(lab, found, {"unigram": unigram, "bigram": bigram})
    runs = [list(run) for run in zip(*readings.values(), strict=True)]
    first, last = found[steps[0]], found[steps[-1]]
    lab.finding(
        lab.say(
            "배우기 전에는 모든 토큰이 똑같아 보인다(perplexity가 어휘 크기의 5 % 안)",
            "Before learning all tokens look alike (perplexity within 5 % of the vocabulary's size)",
        ),
        abs(first[0].mean / VOCAB_SIZE - 1) < 0.05,
        lab.say(f"perplexity {first[0]}, 어휘 {VOCAB_SIZE:,}개.", f"Perplexity {first[0]} with {VOCAB_SIZE:,} tokens."),
    )
    falling = all(later.perplexity < earlier.perplexity for run in runs for earlier, later in pairwise(run))
    order = last[5].mean > unigram  # of shuffled tokens no frequency has changed
    lab.finding(
        lab.say(
            "배울수록 perplexity가 줄어 끝에는 바로 앞 토큰만 보고 세는 것(bigram)보다 낫고, 토큰을 섞으면 쓸모가 없다",
            "Perplexity falls from moment to moment, ends below that of counting pairs of neighbours (bigrams), and "
            "nothing of it is left on shuffled tokens",
        ),
        falling and last[0].mean + last[0].deviation < bigram and order,
        lab.say(
            f"{first[0].mean:,.0f}에서 {last[0]}까지 줄었습니다. 빈도만 세면 {unigram:.0f}, bigram은 "
            f"{bigram:.0f}입니다. 토큰을 섞은 글에서는 {last[5]}로 빈도만 셀 때보다 "
            f"{'나쁩니다. 배운 것은 차례입니다' if order else '낫습니다'}.",
            f"It fell from {first[0].mean:,.0f} to {last[0]}; counting frequencies gives {unigram:.0f}, bigrams "
            f"{bigram:.0f}. On shuffled tokens it is {last[5]}, "
            f"{'worse than frequencies: order is what was learned' if order else 'better than frequencies'}.",
        ),
    )
    nearest = [(_nearest(run, steps, "from_unigram"), _nearest(run, steps, "from_bigram")) for run in runs]
    lab.finding(
        lab.say("먼저 토큰의 빈도를 배우고, 그다음에 이웃을 배운다", "Frequencies are learned first, then neighbours"),
        all(0 < to_unigram < to_bigram for to_unigram, to_bigram in nearest),
        lab.say(
            f"짐작이 빈도와 가장 닮은 때는 {', '.join(str(u) for u, _ in nearest)}걸음, bigram과 가장 닮은 때는 "
            f"{', '.join(str(b) for _, b in nearest)}걸음입니다(씨앗마다).",
            f"The guesses were most like frequencies at step {', '.join(str(u) for u, _ in nearest)}, and most like "
            f"bigrams at step {', '.join(str(b) for _, b in nearest)} (for each seed).",
        ),
    )
    lab.note(
        lab.say(
            "그림에서 칸의 글자는 그 자리의 첫 짐작, 색은 실제로 온 토큰에 준 확률입니다. 위에서 아래로 배울수록, "
            "처음에는 아무 토큰이나, 다음에는 흔한 토큰을, 끝에는 앞말에 맞는 토큰을 짐작하는 것을 보십시오.",
            "In the picture a cell's text is the first guess there, and its colour the probability given to what "
            "really came. See from top to bottom how the guesses are anything at first, then what is frequent, and "
            "at last what fits the words before.",
        )
    )


def _nearest(run: list[Reading], steps: list[int], measure: str) -> int:
    return min(zip(steps, run, strict=True), key=lambda moment: getattr(moment[1], measure))[0]


def _draw_course(lab: Workbench, found: dict[int, list[Spread]], counting: dict[str, float]) -> None:
    title = (
        "배우는 동안의 perplexity, 빈도와 이웃과의 거리",
        "Perplexity, and the distance from frequencies and neighbours, as learning goes on",
    )
    with lab.picture("course", lab.say(*title), columns=2, width=9, height=3.2) as axes:
        left, right = axes[0]
        curves = (
            (left, 0, lab.label("모델", "model")),
            (right, 3, lab.label("빈도(unigram)와의 거리", "from frequencies (unigram)")),
            (right, 4, lab.label("이웃(bigram)과의 거리", "from neighbours (bigram)")),
        )
        for panel, measure, name in curves:
            values = [found[step][measure] for step in found]
            spreads = [v.deviation for v in values]
            panel.errorbar(range(len(found)), [v.mean for v in values], spreads, fmt="o-", capsize=2, label=name)
        for (name, value), style in zip(counting.items(), ("--", ":"), strict=True):
            left.axhline(value, color="gray", linestyle=style, label=name)
        left.set_yscale("log")
        left.set_title("perplexity")
        right.set_title(lab.label("KL 거리 (nat)", "KL divergence (nats)"))
        for panel in (left, right):
            panel.set_xticks(range(len(found)), [str(step) for step in found])
            panel.set_xlabel(lab.label("걸음", "step"))
            panel.legend(fontsize="small")


def _show_guesses(lab: Workbench, dataset: TokenDataset, guesses: dict[int, Tensor], ids: list[int]) -> None:
    tokenizer = dataset.tokenizer

    def name(token: int) -> str:
        if token == dataset.eos_token_id:
            return lab.say("(끝)", "(end)")
        return tokenizer.token_bytes(token).decode(errors="replace").replace(" ", "␣")

    shown = [step for step in guesses if step in SHOWN]
    place = len(ids) // 2
    before, after = tokenizer.decode(ids[1 : place + 1]), name(ids[place + 1])
    lab.table(
        lab.say(
            f"“{before}” 다음의 짐작(%), 실제로는 “{after}”", f"Guesses (%) after “{before}”; what comes is “{after}”"
        ),
        [lab.say(f"{step}걸음", f"step {step}") for step in shown],
        [list(row) for row in zip(*[_top(guesses[step][place], name) for step in shown], strict=True)],
    )
    right = torch.tensor(ids[1:])
    title = lab.say("한 문장의 자리마다 짐작한 것", "What was expected at each place of a sentence")
    with lab.picture("guesses", title, width=11, height=2.6) as axes:
        chances = torch.stack([guesses[step].gather(1, right[:, None])[:, 0] for step in shown])
        image = axes[0, 0].imshow(chances.numpy(), cmap="Blues", vmin=0, aspect="auto")
        for y, step in enumerate(shown):
            for x, token in enumerate(guesses[step].argmax(-1).tolist()):
                color = "white" if chances[y, x] > 0.6 * chances.max() else "black"
                axes[0, 0].text(x, y, drawable(name(token)), ha="center", va="center", fontsize=8, color=color)
        axes[0, 0].set_xticks(range(len(right)), [drawable(name(token)) for token in ids[1:]])
        axes[0, 0].set_yticks(range(len(shown)), [lab.label(f"{step}걸음", f"step {step}") for step in shown])
        axes[0, 0].figure.colorbar(image, label=lab.label("온 토큰의 확률", "probability of what came"))


def _top(p: Tensor, name: Callable[[int], str]) -> list[str]:
    found = p.topk(5)
    return [f"{name(i)} {100 * v:.1f}" for i, v in zip(found.indices.tolist(), found.values.tolist(), strict=True)]
