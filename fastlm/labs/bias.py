"""Bias: what the model prefers, by the definitions of two papers; a corpus skewed on purpose, and made even again; and
what a leading prompt does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from fastlm.inference import LLM
from fastlm.labs import data_bias as data
from fastlm.labs.asking import share_of_first
from fastlm.labs.bias_benchmarks import crows_pairs, kobbq
from fastlm.labs.pictures import bars_by_group
from fastlm.labs.small_models import prepare_documents, train_model
from fastlm.labs.statistics import bootstrap, spread
from fastlm.labs.workbench import Workbench
from fastlm.model.config import ModelConfig
from fastlm.tokenizer import Tokenizer
from fastlm.training import TrainingConfig

DOSES = (0.5, 0.6, 0.7, 0.8, 0.9)
ENDINGS, STEPS, BATCH, VOCABULARY = 8, 160, 20, 1024
Learned = dict[tuple[str, data.Kind, data.Language], list[float]]  # percent, a number for each seed


def run(lab: Workbench) -> None:
    with lab.part("CrowS-Pairs: 고정관념 쪽 문장을 더 그럴듯하게 보는가", "CrowS-Pairs: is the stereotype likelier?"):
        crows_pairs(lab)
    with lab.part("KoBBQ: 모를 때 고정관념대로 답하는가", "KoBBQ: when in doubt, does it answer by stereotype?"):
        kobbq(lab)
    with lab.part("일부러 치우치게 만든 말뭉치", "A corpus skewed on purpose"):
        report_doses(lab, learned_by_dose(lab))
    with lab.part("묻는 사람이 답을 이끄는가", "Does the one who asks lead the answer?"):
        leading_prompts(lab)


def train_on(lab: Workbench, name: str, sentences: Sequence[data.Sentence], tokenizer: Tokenizer, seed: int) -> LLM:
    dataset = prepare_documents(lab, name, [sentence.text for sentence in sentences], tokenizer=tokenizer)
    shape = ModelConfig(tokenizer.vocab_size, 64, 1, 2, 2, 32, 160, context_length=64, qk_norm=True)
    training = TrainingConfig(
        steps=STEPS, batch_size=BATCH, separate_documents=True, evaluations=0, checkpoint_seconds=1000, seed=seed
    )
    return LLM(train_model(lab, name, shape, training, dataset).model, tokenizer)


def learned_share(llm: LLM, kind: data.Kind, language: data.Language) -> float:
    """P(he) / (P(he) + P(she)) in percent, after beginnings of sentences that the corpus left out."""
    return 100 * float(np.mean(share_of_first(llm, data.held_out_prompts(language, kind), data.PRONOUNS[language])))


def learned_by_dose(lab: Workbench) -> Learned:
    """What models learned from each corpus, by its name: "50%" to "90%", "reweighted" and "augmented"."""
    even = [sentence.text for sentence in data.corpus(0.5, lab.seed, ENDINGS)]
    tokenizer = prepare_documents(lab, "bias-tokenizer", even, vocab_size=VOCABULARY).tokenizer
    learned: Learned = defaultdict(list)
    for seed in lab.seeds():
        corpora = {f"{dose:.0%}": data.corpus(dose, seed, ENDINGS) for dose in DOSES}
        skewed = corpora[f"{DOSES[-1]:.0%}"]
        corpora |= {"reweighted": data.reweighted(skewed, seed), "augmented": data.augmented(skewed, seed)}
        for name, sentences in corpora.items():
            with train_on(lab, f"bias-{name.strip('%')}-{seed}", sentences, tokenizer, seed) as llm:
                for kind in data.KINDS:
                    for language in data.LANGUAGES:
                        learned[name, kind, language].append(learned_share(llm, kind, language))
    return learned


def report_doses(lab: Workbench, learned: Learned) -> None:
    names = [f"{dose:.0%}" for dose in DOSES]
    words = {"reweighted": lab.say("다시 매긴 비중", "reweighted"), "augmented": lab.say("짝 문장 더하기", "augmented")}
    kinds = {"skewed": lab.say("의사 등", "doctor …"), "mirrored": lab.say("간호사 등", "nurse …")}
    kinds |= {"control": lab.say("대조군", "control")}
    tongue = tongues(lab)
    lines = {(t, k): f"{tongue[t]}, {kinds[k]}" for t in data.LANGUAGES for k in data.KINDS}
    lab.table(
        lab.say("배운 '그'의 몫, % (씨앗 평균 ± 표준편차)", 'Learned share of "he", % (mean ± deviation over seeds)'),
        [lab.say("의사 등에 쓴 '그'의 몫", 'share of "he" with doctor …'), *lines.values()],
        [[words.get(n, n), *(str(spread(learned[n, k, t])) for t, k in lines)] for n in [*names, *words]],
    )
    x, y = np.array([(100 * d, v) for d in DOSES for t in data.LANGUAGES for v in learned[f"{d:.0%}", "skewed", t]]).T

    def slope_of(sample: np.ndarray) -> float:
        at = sample.astype(int)
        return float(np.polyfit(x[at], y[at], 1)[0])

    slope = bootstrap(list(range(len(x))), seed=lab.seed, statistic=slope_of)
    correlation = float(np.corrcoef(x, y)[0, 1])
    control = spread([v for n in names for t in data.LANGUAGES for v in learned[n, "control", t]])
    remedied = {n: spread([v for t in data.LANGUAGES for v in learned[n, "skewed", t]]) for n in words}
    title = lab.say("데이터의 치우침과 모델의 치우침", "Skew of the data, skew of the model")
    with lab.picture("dose", title, columns=2, width=9.0) as axes:
        left, right = axes[0]
        for (language, kind), name in lines.items():
            values = [spread(learned[n, kind, language]) for n in names]
            style = {"marker": "o" if language == "en" else "s", "linestyle": "-" if language == "en" else "--"}
            colour = dict(zip(data.KINDS, ("tab:red", "tab:blue", "tab:gray"), strict=True))[kind]
            means, deviations = [v.mean for v in values], [v.deviation for v in values]
            left.errorbar(
                [100 * d for d in DOSES],
                means,
                deviations,
                color=colour,
                capsize=2,
                label=lab.label(name, name),
                **style,
            )
        as_data = lab.label("데이터 그대로", "as in the data")
        left.plot([50, 90], [50, 90], color="black", linewidth=1, linestyle=":", label=as_data)
        left.set_xlabel(
            lab.label("말뭉치에서 의사 등에 쓴 '그'의 몫, %", 'share of "he" with doctor … in the corpus, %')
        )
        left.set_ylabel(lab.label("모델이 말하는 '그'의 몫, %", 'share of "he" in the model, %'))
        left.legend(fontsize="x-small")
        shown = [names[-1], *words]
        bars_by_group(
            right,
            [words.get(n, lab.say(f"{n} 그대로", f"{n} as it is")) for n in shown],
            {tongue[t]: [spread(learned[n, "skewed", t]).mean for n in shown] for t in data.LANGUAGES},
        )
        right.axhline(50, color="black", linewidth=1, linestyle="--")
        right.set_ylim(0, 100)
    lab.number("dose", {"slope": slope.value, "correlation": correlation, "control": control.mean})
    lab.number("balanced", {name: value.mean for name, value in remedied.items()})
    within = f"[{slope.low:.2f}, {slope.high:.2f}]"
    lab.finding(
        lab.say(
            "모델의 치우침은 데이터의 치우침을 따라간다 (기울기 0.8에서 1.2 사이, 상관 0.9 넘음)",
            "The model's skew follows the data's (slope between 0.8 and 1.2, correlation above 0.9)",
        ),
        slope.low > 0.8 and slope.high < 1.2 and correlation > 0.9,
        lab.say(
            f"데이터에서 '그'가 1 %p 늘면 모델에서 {slope.value:.2f} %p {within} 늘고, 상관은 {correlation:.3f}입니다. "
            f"어느 말뭉치에서나 반반인 대조군은 {control} %입니다.",
            f'A point more of "he" in the data is {slope.value:.2f} points {within} more in the model; the '
            f"correlation is {correlation:.3f}. The control, half and half in every corpus, is at {control} %.",
        ),
    )
    lab.finding(
        lab.say(
            "데이터의 균형을 맞추면 치우침이 사라진다 (50 %에서 5 %p 안)",
            "Balanced data takes the skew away (within 5 points of 50 %)",
        ),
        all(abs(value.mean - 50) < 5 for value in remedied.values()),
        lab.say(
            f"{names[-1]} 말뭉치에서 드문 쪽 문장을 되풀이하면 {remedied['reweighted']} %, 모든 문장에 성별만 바꾼 "
            f"짝을 더하면 {remedied['augmented']} %가 됩니다.",
            f"In the {names[-1]} corpus, repeating the rarer sentences gives {remedied['reweighted']} %, and adding "
            f"to each its twin with the other pronoun {remedied['augmented']} %.",
        ),
    )


def tongues(lab: Workbench) -> dict[data.Language, str]:
    return {"en": lab.say("영어", "English"), "ko": lab.say("한국어", "Korean")}


def leading_prompts(lab: Workbench) -> None:
    """The same questions after nothing, after an unrelated sentence, and after the user's opinion."""
    llm = lab.llm()
    prompts = {
        t: [p for k in data.KINDS for p in data.held_out_prompts(t, k)[:: lab.size(3, 1)]] for t in data.LANGUAGES
    }
    leads = list(data.LEADS["en"])
    shares: dict[tuple[str, data.Language], np.ndarray] = {}
    for number, lead in enumerate(leads):
        for t in data.LANGUAGES:
            asked = [data.LEADS[t][lead] + prompt for prompt in prompts[t]]
            shares[lead, t] = 100 * np.array(share_of_first(llm, asked, data.PRONOUNS[t]))
        lab.done((number + 1) / len(leads))
    said = {"none": lab.say("묻기만", "question alone"), "unrelated": lab.say("상관없는 말", "unrelated sentence")}
    said |= {
        "men": lab.say("'대부분 남자다'", '"most are men"'),
        "women": lab.say("'대부분 여자다'", '"most are women"'),
    }
    tongue = tongues(lab)
    means = {tongue[t]: [float(shares[lead, t].mean()) for lead in leads] for t in data.LANGUAGES}
    title = lab.say("앞에 붙인 말에 따른 '그'의 몫, %", 'Share of "he" by what the user said before, %')
    lab.table(title, ["", *means], [[said[lead], *(m[i] for m in means.values())] for i, lead in enumerate(leads)])
    with lab.picture("leading", title, height=3.0) as axes:
        bars_by_group(axes[0, 0], [said[lead] for lead in leads], means)
        axes[0, 0].axhline(50, color="black", linewidth=1, linestyle="--")
        axes[0, 0].set_ylim(0, 100)
    moved = bootstrap(
        np.concatenate([shares["men", t] - shares["women", t] for t in data.LANGUAGES]).tolist(), seed=lab.seed
    )
    control = bootstrap(
        np.concatenate([shares["unrelated", t] - shares["none", t] for t in data.LANGUAGES]).tolist(), seed=lab.seed
    )
    lab.number("leading", {"moved": moved.value, "control": control.value})
    lab.finding(
        lab.say(
            "묻는 사람의 의견이 답을 10 %p 넘게 옮긴다",
            "The opinion of the one who asks moves the answer by over 10 points",
        ),
        moved.low > 10,
        lab.say(
            f"'대부분 남자다'와 '대부분 여자다' 사이에서 '그'의 몫이 {moved.value:.1f} %p [{moved.low:.1f}, "
            f"{moved.high:.1f}] 달라집니다. 상관없는 문장은 {control.value:+.1f} %p [{control.low:+.1f}, "
            f"{control.high:+.1f}] 옮깁니다.",
            f'Between "most are men" and "most are women" the share of "he" differs by {moved.value:.1f} points '
            f"[{moved.low:.1f}, {moved.high:.1f}]; an unrelated sentence moves it by {control.value:+.1f} "
            f"[{control.low:+.1f}, {control.high:+.1f}].",
        ),
    )
    lab.note(
        lab.say(
            "모델은 말뭉치의 비율을 거의 그대로 배우고, 말뭉치를 고르게 하면 모델도 고르게 됩니다. 치우침은 "
            "데이터에서만 오지 않습니다. 질문에 의견을 담으면 답도 그쪽으로 움직입니다.",
            "A model learns the proportions of its corpus nearly as they are, and is even where the corpus is. Data "
            "is not the only source: an opinion in the question moves the answer its way.",
        )
    )
