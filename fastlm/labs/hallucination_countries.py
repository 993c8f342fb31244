"""A part of the lab on hallucination: a real model asked for the capitals of countries that exist, and of others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastlm.inference import LLM, Completion, SamplingParams
from fastlm.labs import data_hallucination as data
from fastlm.labs.statistics import auroc, bootstrap
from fastlm.labs.workbench import Workbench

SAMPLES, TEMPERATURES = 8, (0.0, 0.3, 0.6, 1.0, 1.4)
SURE = 7  # of the samples that must say the same


def logprob_of(completion: Completion) -> float:
    """Of the whole continuation, its end included where that is a token."""
    return sum(token.logprob for token in completion.logprobs or [])


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


@dataclass(frozen=True)
class Group:
    """Countries asked in one way. `right`: capitals, where there are any."""

    prompts: list[str]
    right: list[str]


def groups() -> dict[str, Group]:
    def shown(question: str, shots: Sequence[tuple[str, str]], names: Sequence[str]) -> list[str]:
        head = "".join(f"{question.format(name)} {capital}\n\n" for name, capital in shots)
        return [head + question.format(name) for name in names]

    real, korean, made_up = list(data.COUNTRIES), list(data.KOREAN_COUNTRIES), data.MADE_UP.split()
    capitals, none = list(data.COUNTRIES.values()), [""] * len(made_up)
    return {
        "real": Group(shown(data.QUESTION, data.SHOTS, real), capitals),
        "korean": Group(shown(data.KOREAN_QUESTION, data.KOREAN_SHOTS, korean), list(data.KOREAN_COUNTRIES.values())),
        "made up": Group(shown(data.QUESTION, data.SHOTS, made_up), none),
        "real, may refuse": Group(shown(data.QUESTION, data.SHOTS_THAT_REFUSE, real), capitals),
        "made up, may refuse": Group(shown(data.QUESTION, data.SHOTS_THAT_REFUSE, made_up), none),
    }


def countries(lab: Workbench) -> None:
    llm, asked = lab.llm(), groups()
    params = SamplingParams(max_tokens=8, temperature=0, stop=("\n",), logprobs=0)
    said = {name: llm.generate(group.prompts, params) for name, group in asked.items()}
    sure = {name: [math.exp(logprob_of(c)) for c in of] for name, of in said.items()}
    refused = {name: [data.NO_SUCH in c.text for c in of] for name, of in said.items()}
    right = {
        name: [c.text.strip() == capital for c, capital in zip(said[name], group.right, strict=True)]
        for name, group in asked.items()
    }
    words = {
        "real": lab.say("있는 나라", "real"),
        "korean": lab.say("있는 나라, 한국어로 물음", "real, asked in Korean"),
        "made up": lab.say("지어낸 나라", "made up"),
        "real, may refuse": lab.say("있는 나라, 없다고 답한 보기와 함께", "real, after examples that refuse"),
        "made up, may refuse": lab.say("지어낸 나라, 없다고 답한 보기와 함께", "made up, after examples that refuse"),
    }
    lab.table(
        lab.say(
            f"수도를 물음 ({lab.model_name}, 온도 0), %", f"Asked for the capital ({lab.model_name}, temperature 0), %"
        ),
        [
            "",
            lab.say("물음", "asked"),
            lab.say("맞음", "right"),
            lab.say("없다고 함", "refused"),
            lab.say("답의 확률", "probability"),
        ],
        [[words[n], len(g.prompts), *(100 * mean(of[n]) for of in (right, refused, sure))] for n, g in asked.items()],
    )
    told = auroc(
        [1 - p for p in sure["real"] + sure["made up"]], [False] * len(sure["real"]) + [True] * len(sure["made up"])
    )
    wrong = auroc([1 - p for p in sure["real"]], [not r for r in right["real"]])
    lab.number("auroc of made-up countries", told)
    lab.finding(
        lab.say(
            "모델은 없는 나라의 수도도 대지만, 제 확률은 그것을 안다 (AUROC 0.8 넘음)",
            "It names capitals of countries that do not exist, but its own probability knows (AUROC above 0.8)",
        ),
        told > 0.8 and mean(refused["made up"]) < 0.1,
        lab.say(
            f"지어낸 나라의 {100 * (1 - mean(refused['made up'])):.0f} %에 답을 댑니다. 답의 확률은 있는 나라에서 "
            f"{100 * mean(sure['real']):.0f} %, 지어낸 나라에서 {100 * mean(sure['made up']):.0f} %이고, 둘을 가르는 "
            f"AUROC는 {told:.2f}, 있는 나라의 틀린 답을 찾는 AUROC는 {wrong:.2f}입니다.",
            f"It answers for {100 * (1 - mean(refused['made up'])):.0f} % of the made-up ones. The answer's "
            f"probability is {100 * mean(sure['real']):.0f} % for real and {100 * mean(sure['made up']):.0f} % for "
            f"made-up countries; AUROC between them {told:.2f}, for wrong answers about real ones {wrong:.2f}.",
        ),
    )
    examples = zip(data.MADE_UP.split()[:5], said["made up"], sure["made up"], strict=False)
    shown = ", ".join(f"{name}: {c.text.strip()} ({100 * p:.0f} %)" for name, c, p in examples)
    lab.note(
        lab.say(
            f"지어낸 나라의 수도라고 댄 것과 그 확률: {shown}",
            f"Capitals it gave to made-up countries, and their probability: {shown}",
        )
    )
    some, none = mean(refused["made up, may refuse"]), mean(refused["real, may refuse"])
    lab.finding(
        lab.say(
            "없다고 답한 보기를 주면 지어낸 나라에만 없다고 한다 (차이 50 %p 넘음)",
            "After examples that refuse it refuses made-up countries, not real ones (by over 50 points)",
        ),
        some - none > 0.5,
        lab.say(
            f"지어낸 나라의 {100 * some:.0f} %, 있는 나라의 {100 * none:.0f} %에 없다고 답합니다.",
            f"It refuses {100 * some:.0f} % of the made-up countries and {100 * none:.0f} % of the real ones.",
        ),
    )
    by_temperature(lab, llm, asked)


def by_temperature(lab: Workbench, llm: LLM, asked: dict[str, Group]) -> None:
    names = {"real": lab.say("있는 나라", "real"), "made up": lab.say("지어낸 나라", "made up")}
    shares: dict[str, list[list[float]]] = {name: [] for name in names}  # by temperature: of each country, 1 if sure
    for number, temperature in enumerate(TEMPERATURES):
        params = SamplingParams(max_tokens=8, temperature=temperature, n=SAMPLES, stop=("\n",), seed=1000 * lab.seed)
        for name in names:
            drawn = [c.text.strip() for c in llm.generate(asked[name].prompts, params)]
            each = [drawn[i : i + SAMPLES] for i in range(0, len(drawn), SAMPLES)]
            shares[name].append([float(Counter(e).most_common(1)[0][1] >= SURE) for e in each])
        lab.done((number + 1) / len(TEMPERATURES))
    found = {name: [bootstrap(values, seed=lab.seed) for values in of] for name, of in shares.items()}
    title = lab.say(
        f"온도와 확신: {SAMPLES}번 가운데 {SURE}번 넘게 같은 답을 한 나라의 몫",
        f"Temperature and confidence: share of countries with the same answer in {SURE} of {SAMPLES}",
    )
    lab.table(
        title,
        [lab.say("온도", "temperature"), *names.values()],
        [[t, *(str(found[n][i]) for n in names)] for i, t in enumerate(TEMPERATURES)],
    )
    with lab.picture("temperature", title, height=3.0) as axes:
        for name, style in zip(names, ("o-", "s--"), strict=True):
            axes[0, 0].plot(
                TEMPERATURES, [i.value for i in found[name]], style, label=lab.label(names[name], names[name])
            )
            axes[0, 0].fill_between(
                TEMPERATURES, [i.low for i in found[name]], [i.high for i in found[name]], alpha=0.2
            )
        axes[0, 0].set_ylim(0, 1.02)
        axes[0, 0].set_xlabel(lab.label("온도", "temperature"))
        axes[0, 0].set_ylabel(lab.label("확신하는 답의 몫", "share of confident answers"))
        axes[0, 0].legend(fontsize="small")
    shown = {name: " → ".join(f"{100 * i.value:.0f}" for i in of) for name, of in found.items()}
    lab.number("confident, by temperature", {name: [i.value for i in of] for name, of in found.items()})
    usual = [i for i, t in enumerate(TEMPERATURES) if 0 < t <= 1]
    lab.finding(
        lab.say(
            "온도가 오르면 지어낸 나라의 답이 먼저 흩어진다 (0과 1 사이 어느 온도에서나)",
            "As temperature rises, answers about made-up countries scatter first (at each one up to 1)",
        ),
        all(found["real"][i].low > found["made up"][i].high for i in usual),
        lab.say(
            f"온도 {', '.join(map(str, TEMPERATURES))}에서 확신하는 답은 있는 나라 {shown['real']} %, 지어낸 나라 "
            f"{shown['made up']} %입니다. 온도 0에서는 모르는 것도 늘 같은 말로 답하므로 의심이 보이지 않습니다.",
            f"At temperatures {', '.join(map(str, TEMPERATURES))} confident answers are {shown['real']} % for real "
            f"and {shown['made up']} % for made-up countries. At 0 even what it does not know gets the same answer "
            "every time, so doubt cannot be seen.",
        ),
    )
