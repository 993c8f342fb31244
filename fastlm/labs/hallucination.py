"""Hallucination: a small model asked about facts that its world left out, how its own doubt gives it away, and a real
model asked about countries that do not exist.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastlm.inference import LLM, SamplingParams
from fastlm.labs import data_hallucination as data
from fastlm.labs.data_hallucination import Fact
from fastlm.labs.hallucination_countries import countries, logprob_of, mean
from fastlm.labs.small_models import prepare_documents, train_model
from fastlm.labs.statistics import auroc, calibration, calibration_error, spread
from fastlm.labs.workbench import Workbench
from fastlm.model.config import ModelConfig
from fastlm.training import TokenDataset, TrainingConfig

PEOPLE, STEPS, SAMPLES = 96, 300, 10


@dataclass(frozen=True)
class Answer:
    """What a model said about a fact. Each doubt is larger where the model is less sure."""

    told: int  # times that the training split tells the fact
    right: bool  # what it answers at temperature 0
    sure: float  # share of its samples that mean the commonest of their meanings
    sure_is_right: bool  # that meaning
    doubts: dict[str, float]


def run(lab: Workbench) -> None:
    lab.note(
        lab.say(
            "들은 적 없는 사실에도 모델은 빈칸을 남기지 않고 그럴듯한 답을 댑니다. 여러 번 물어 뜻이 갈리는지 보면, "
            "아는 것과 지어낸 것이 꽤 갈립니다.",
            "A model leaves no blank where it was told nothing: it says something plausible. Asking several times "
            "and seeing whether the meanings agree tells what it knows from what it makes up, mostly.",
        )
    )
    with lab.part("빠진 사실이 있는 세계", "A world with facts left out"):
        report_world(lab, [ask_about_world(lab, seed) for seed in lab.seeds()])
    with lab.part("있는 나라와 지어낸 나라", "Real countries and made-up ones"):
        countries(lab)


def ask_about_world(lab: Workbench, seed: int) -> list[Answer]:
    """Trains a model on a world of that seed and asks it about every fact, told or left out."""
    facts = data.world(lab.lang, PEOPLE, seed)
    dataset = prepare_documents(lab, f"world-{seed}", data.documents(facts, lab.lang, seed), vocab_size=1024)
    shape = ModelConfig(dataset.tokenizer.vocab_size, 64, 2, 2, 2, 32, 160, context_length=64, qk_norm=True)
    training = TrainingConfig(
        steps=STEPS, batch_size=8, separate_documents=True, evaluations=0, checkpoint_seconds=1000, seed=seed
    )
    with LLM(train_model(lab, f"world-model-{seed}", shape, training, dataset).model, dataset.tokenizer) as llm:
        return answers(llm, lab.lang, facts, times_told(facts, lab.lang, dataset), seed)


def times_told(facts: Sequence[Fact], lang: data.Language, dataset: TokenDataset) -> list[int]:
    """How often each fact stands in the training split; sentences held out for validation are not told."""
    text = dataset.tokenizer.decode(dataset.train.read(0, len(dataset.train)).tolist())
    return [text.count(fact.prompt(lang)) for fact in facts]


def answers(llm: LLM, lang: data.Language, facts: Sequence[Fact], told: Sequence[int], seed: int) -> list[Answer]:
    prompts = [fact.prompt(lang) for fact in facts]
    greedy = llm.generate(prompts, SamplingParams(max_tokens=8, temperature=0, logprobs=0))
    drawn = llm.generate(prompts, SamplingParams(max_tokens=8, n=SAMPLES, logprobs=0, seed=1000 * seed))
    found = []
    for i, fact in enumerate(facts):
        samples = drawn[SAMPLES * i : SAMPLES * (i + 1)]
        strings = Counter(sample.text for sample in samples)
        meanings = Counter(data.meaning(sample.text, lang, fact.kind) for sample in samples)
        [(meaning, count)] = meanings.most_common(1)
        doubts = {
            "max-probability": 1 - math.exp(logprob_of(greedy[i])),
            "entropy": -float(np.mean([logprob_of(sample) for sample in samples])),  # Monte Carlo (Kuhn et al. 2023)
            "same words": 1 - strings.most_common(1)[0][1] / SAMPLES,
            "same meaning": 1 - count / SAMPLES,
        }
        right = data.meaning(greedy[i].text, lang, fact.kind) == fact.value
        found.append(Answer(told[i], right, count / SAMPLES, meaning == fact.value, doubts))
    return found


def report_world(lab: Workbench, runs: list[list[Answer]]) -> None:
    bands = {"0": (0, 0), "1": (1, 1), "2-4": (2, 4), "5+": (5, 10_000)}
    of_band = {
        name: [[a for a in answers if low <= a.told <= high] for answers in runs] for name, (low, high) in bands.items()
    }
    right = {name: spread([100 * mean([a.right for a in group]) for group in of]) for name, of in of_band.items()}
    sure = {name: spread([100 * mean([a.sure for a in group]) for group in of]) for name, of in of_band.items()}
    lab.table(
        lab.say(
            f"사실을 들은 횟수에 따른 답, % (씨앗 {len(runs)}개, 찍으면 {100 / 12:.1f})",
            f"Answers by how often the fact was told, % ({len(runs)} seeds; a guess is right in {100 / 12:.1f})",
        ),
        [
            lab.say("들은 횟수", "told"),
            lab.say("물음", "asked"),
            lab.say("맞음", "right"),
            lab.say("확신", "confidence"),
        ],
        [[name, sum(map(len, of_band[name])), str(right[name]), str(sure[name])] for name in bands],
    )
    gaps = [100 * (mean([a.sure for a in group]) - mean([a.right for a in group])) for group in of_band["0"]]
    lab.number("confidence minus accuracy, never told", gaps)
    lab.finding(
        lab.say(
            "한 번도 듣지 못한 사실도 맞히는 것보다 20 %p 넘게 확신하며 답한다",
            "It answers what it was never told with over 20 points more confidence than it is right",
        ),
        min(gaps) > 20,
        lab.say(
            f"들은 적 없는 사실을 {right['0']} % 맞히면서 {sure['0']} % 확신합니다. 차이는 씨앗마다 "
            f"{', '.join(f'{gap:.0f}' for gap in gaps)} %p입니다. 확신은 {SAMPLES}번 뽑은 답 가운데 뜻이 가장 흔한 "
            "것의 몫입니다.",
            f"It is right in {right['0']} % of them and {sure['0']} % confident; the gap by seed is "
            f"{', '.join(f'{gap:.0f}' for gap in gaps)} points. Confidence is the share of {SAMPLES} samples that "
            "have the commonest meaning.",
        ),
    )
    report_detectors(lab, runs)


def report_detectors(lab: Workbench, runs: list[list[Answer]]) -> None:
    names = {
        "max-probability": lab.say("답의 확률", "probability of the answer"),
        "entropy": lab.say("엔트로피", "entropy"),
        "same words": lab.say("같은 말로 답하는가", "self-consistency of words"),
        "same meaning": lab.say("같은 뜻으로 답하는가", "self-consistency of meaning"),
    }
    wrong = {n: [auroc([a.doubts[n] for a in of], [not a.right for a in of]) for of in runs] for n in names}
    unheard = {n: [auroc([a.doubts[n] for a in of], [a.told == 0 for a in of]) for of in runs] for n in names}
    lab.table(
        lab.say("의심으로 찾아내기: AUROC (0.5는 찍기)", "Detection by doubt: AUROC (0.5 is a guess)"),
        [
            lab.say("의심의 자", "doubt"),
            lab.say("틀린 답", "wrong answers"),
            lab.say("들은 적 없는 사실", "facts never told"),
        ],
        [[said, str(spread(wrong[n])), str(spread(unheard[n]))] for n, said in names.items()],
    )
    every = [a for of in runs for a in of]
    by_words = calibration([1 - a.doubts["max-probability"] for a in every], [a.right for a in every])
    by_meaning = calibration([a.sure for a in every], [a.sure_is_right for a in every])
    title = lab.say("확신과 정답률, 그리고 의심의 자", "Confidence against accuracy, and the doubts")
    with lab.picture("calibration", title, columns=2, width=9.0) as axes:
        left, right = axes[0]
        for bins, name, style in (
            (by_words, lab.label("답의 확률", "probability of the answer"), "s--"),
            (by_meaning, lab.label("뜻이 같은 답의 몫", "share of the same meaning"), "o-"),
        ):
            left.plot([b.confidence for b in bins], [b.accuracy for b in bins], style, label=name)
        left.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle=":")
        left.set_xlabel(lab.label("확신", "confidence"))
        left.set_ylabel(lab.label("맞은 비율", "share right"))
        left.legend(fontsize="small")
        values = [spread(wrong[n]) for n in names]
        labels = [lab.label(said, said) for said in names.values()]
        right.barh(labels[::-1], [v.mean for v in values][::-1], xerr=[v.deviation for v in values][::-1], capsize=3)
        right.axvline(0.5, color="black", linewidth=1, linestyle=":")
        right.set_xlim(0, 1)
        right.set_xlabel(lab.label("틀린 답을 찾는 AUROC", "AUROC for wrong answers"))
    errors = calibration_error(by_words), calibration_error(by_meaning)
    lab.number("auroc of wrong answers", {n: spread(values).mean for n, values in wrong.items()})
    lab.number("calibration error", {"probability": errors[0], "same meaning": errors[1]})
    meaning, rest = spread(wrong["same meaning"]), [n for n in names if n != "same meaning"]
    ahead = [wrong["same meaning"][i] - max(wrong[n][i] for n in rest) for i in range(len(runs))]
    lab.finding(
        lab.say(
            "뜻의 자기 일관성은 틀린 답을 찾아내고(AUROC 0.8 넘음), 말을 견주는 자보다 낫다",
            "Self-consistency of meaning finds wrong answers (AUROC above 0.8), and better than what looks at words",
        ),
        min(wrong["same meaning"]) > 0.8 and min(ahead) > 0,
        lab.say(
            f"뜻으로 {meaning}, 말로는 {', '.join(f'{names[n]} {spread(wrong[n])}' for n in rest)}입니다. 같은 사실을 "
            f"여러 말로 배웠으니 말은 갈려도 뜻은 하나일 수 있습니다. 확신의 오차(ECE)는 확률로 {errors[0]:.2f}, "
            f"뜻으로 {errors[1]:.2f}입니다.",
            f"Meaning has {meaning}; {', '.join(f'{names[n]} {spread(wrong[n])}' for n in rest)}. The same fact was "
            "learned in several wordings, so words may differ where the meaning does not. Calibration error (ECE) is "
            f"{errors[0]:.2f} by probability, {errors[1]:.2f} by meaning.",
        ),
    )
