"""Sudden abilities over scale: a threshold in the model, or in the measure?

A ladder of models learns to add, each with the same steps. Whether a whole answer is right is a sharp measure: it
needs every digit. The log-probability of the right digits is a smooth one. Schaeffer et al. (2023) hold that what looks
sudden by the first is gradual by the second, and that the first follows from the digits: if they were right
independently of each other, a share p of right digits would make p^n of whole answers. Both can be checked here, and
both can fail.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from fastlm.labs.episodes import IGNORED, Episodes, logits_of, train_on_episodes
from fastlm.labs.statistics import Interval, bootstrap_over_seeds
from fastlm.labs.workbench import Workbench
from fastlm.model import ModelConfig
from fastlm.training import TrainingConfig

DIGITS = 3
ANSWER = DIGITS + 1
PLUS, EQUALS = 10, 11
WIDTHS = (4, 6, 8, 10, 12, 16, 24)  # hidden sizes, the ladder
WIDTHS_FULL = (4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
STEPS = 300
BATCH = 256
RATE = 0.02
QUESTIONS = 500  # sums asked of each model
STILL = 0.05  # share of whole answers below which nothing seems to be learned


@dataclass(frozen=True)
class Rung:
    """One size. `right`: (seeds, answers, digits), whether each digit is; `logprob`: (seeds, answers), the mean of its
    digits."""

    parameters: int
    right: NDArray[np.bool_]
    logprob: NDArray[np.float64]

    def exact(self, seed: int) -> Interval:
        return bootstrap_over_seeds(self.right.all(axis=-1).astype(float), seed)

    def smooth(self, seed: int) -> Interval:
        return bootstrap_over_seeds(self.logprob, seed)

    @property
    def expected(self) -> float:
        """Share of whole answers that the digits' shares make, were they independent: of each seed, then the mean."""
        return float(self.right.mean(axis=1).prod(axis=-1).mean())

    @property
    def exact_of_seeds(self) -> list[float]:
        return [float(share) for share in self.right.all(axis=-1).mean(axis=-1)]


def run(lab: Workbench) -> None:
    lab.note(
        lab.say(
            "왼쪽은 답 전체가 맞은 비율, 오른쪽은 맞는 숫자에 매긴 로그 확률입니다. 같은 모델의 같은 답을 "
            "두 가지로 잰 것입니다.",
            "On the left the share of whole answers that are right, on the right the log-probability of the right "
            "digits: the same models and answers, measured in two ways.",
        )
    )
    with lab.part("더하기를 배우는 사다리", "a ladder that learns to add"):
        ladder = [rung(lab, width) for width in lab.size(WIDTHS, WIDTHS_FULL)]
        report(lab, ladder)


def sums(generator: np.random.Generator, rows: int) -> Episodes:
    """`123+456=0579`, highest digit first, so that a carry is needed before it can be seen; the answer is scored."""
    terms = generator.integers(0, 10**DIGITS, (rows, 2))

    def digits(numbers: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        return numbers[:, None] // 10 ** np.arange(count)[::-1] % 10

    signs = np.full((rows, 1), PLUS), np.full((rows, 1), EQUALS)
    left, right, answer = digits(terms[:, 0], DIGITS), digits(terms[:, 1], DIGITS), digits(terms.sum(1), ANSWER)
    tokens = np.concatenate([left, signs[0], right, signs[1], answer], axis=1)
    targets = np.full_like(tokens[:, 1:], IGNORED)
    targets[:, -ANSWER:] = answer
    return Episodes(torch.from_numpy(tokens[:, :-1]), torch.from_numpy(targets))


def rung(lab: Workbench, width: int) -> Rung:
    length = 2 * DIGITS + 2 + ANSWER
    model_config = ModelConfig(12, width, 2, 2, 2, max(8, width // 2), 2 * width, context_length=length)
    right, logprobs, parameters = [], [], 0
    for seed in lab.seeds():
        config = TrainingConfig(
            steps=lab.size(STEPS, 4 * STEPS),
            batch_size=BATCH,
            learning_rate=RATE,
            embedding_learning_rate=RATE,
            seed=seed,
        )
        out = lab.run_directory(f"adding-{width}-{seed}")
        model = train_on_episodes(model_config, sums, config, out, on_progress=lab.on_progress)
        parameters = sum(p.numel() for p in model.parameters())
        test = sums(np.random.default_rng([seed, 1 << 20]), QUESTIONS)
        answers = test.targets[:, -ANSWER:]
        logits = logits_of(model, test.inputs, QUESTIONS)[:, -ANSWER:].log_softmax(-1)
        right.append((logits.argmax(-1) == answers).numpy())
        logprobs.append(logits.gather(-1, answers[..., None])[..., 0].mean(1).double().numpy())
    return Rung(parameters, np.stack(right), np.stack(logprobs))


def largest_step(values: list[float]) -> float:
    """The largest rise between neighbours, as a share of the whole rise: 1 when all of it happens at once."""
    whole = max(values) - min(values)
    return max(b - a for a, b in pairwise(values)) / whole if whole > 0 else 0.0


def report(lab: Workbench, ladder: list[Rung]) -> None:
    exact = [r.exact(lab.seed) for r in ladder]
    smooth = [r.smooth(lab.seed) for r in ladder]
    lab.table(
        lab.say(
            f"{DIGITS}자리 더하기, 씨앗 {lab.seeds()}, 모델마다 문제 {QUESTIONS}개, 95% 구간",
            f"Sums of {DIGITS} digits, seeds {lab.seeds()}, {QUESTIONS} questions a model, 95 % intervals",
        ),
        [
            lab.say("매개변수", "parameters"),
            lab.say("답 전체", "whole answer"),
            lab.say("씨앗마다", "of each seed"),
            lab.say("숫자에서 셈한 값", "expected of its digits"),
            lab.say("숫자 하나", "one digit"),
            lab.say("로그 확률", "log-probability"),
        ],
        [
            [
                r.parameters,
                str(e),
                " ".join(f"{share:.2f}" for share in r.exact_of_seeds),
                r.expected,
                float(r.right.mean()),
                str(s),
            ]
            for r, e, s in zip(ladder, exact, smooth, strict=True)
        ],
    )
    draw(lab, ladder, exact, smooth)
    sharp_step = largest_step([e.value for e in exact])
    smooth_step = largest_step([s.value for s in smooth])
    still = [i for i, e in enumerate(exact) if e.value < STILL][-1:]  # the last size that hardly gets one right
    hidden = (smooth[still[0]].value - smooth[0].value) / (smooth[-1].value - smooth[0].value) if still else 0.0
    gap = max(abs(r.expected - e.value) for r, e in zip(ladder, exact, strict=True))
    lab.number("largest step", {"whole answer": sharp_step, "log-probability": smooth_step})
    lab.number("largest gap between whole answers and what the digits make", gap)
    lab.finding(
        lab.say("답 전체로 재면 갑자기 된다", "By whole answers the ability comes suddenly"),
        sharp_step > 0.5,
        lab.say(
            f"이웃한 두 크기 사이에서 오른 몫이 가장 클 때 전체의 {sharp_step:.0%}입니다.",
            f"The largest step between two neighbouring sizes is {sharp_step:.0%} of the whole rise.",
        ),
    )
    lab.finding(
        lab.say("로그 확률로 재면 고르게 오른다", "By log-probability it comes gradually"),
        smooth_step < 0.5,
        lab.say(
            f"가장 큰 걸음이 전체의 {smooth_step:.0%}입니다. {verdict(lab, sharp_step, smooth_step)} 답 전체가 "
            f"{STILL:.0%}도 맞지 않는 동안 로그 확률은 이미 전체의 {hidden:.0%}를 올랐습니다.",
            f"The largest step is {smooth_step:.0%} of the whole rise. {verdict(lab, sharp_step, smooth_step)} While "
            f"fewer than {STILL:.0%} of whole answers are right, the log-probability has made {hidden:.0%} of its "
            "rise.",
        ),
    )
    lab.finding(
        lab.say("답 전체의 점수는 숫자마다의 점수에서 나온다", "Whole answers follow from single digits"),
        gap < 0.1,
        lab.say(
            f"숫자마다 따로 맞는다고 보고 곱한 값과의 차이가 가장 클 때 {gap:.3f}입니다.",
            f"What digits that are right independently would make differs from what was measured by at most {gap:.3f}.",
        ),
    )
    widest = max(ladder, key=lambda r: max(r.exact_of_seeds) - min(r.exact_of_seeds))
    low, high = min(widest.exact_of_seeds), max(widest.exact_of_seeds)
    lab.finding(
        lab.say(
            "크기가 같으면 씨앗이 달라도 같이 된다 (10 %p 안)",
            "Models of one size come equally far whatever the seed (within 10 points)",
        ),
        high - low < 0.1,
        lab.say(
            f"차이가 가장 큰 크기는 {widest.parameters:,}이고, 답 전체가 맞은 비율이 씨앗에 따라 {low:.2f}에서 "
            f"{high:.2f}까지 갈립니다.",
            f"They differ most at {widest.parameters:,} parameters, where the share of whole answers lies between "
            f"{low:.2f} and {high:.2f} by seed.",
        ),
    )


def verdict(lab: Workbench, sharp_step: float, smooth_step: float) -> str:
    if smooth_step >= 0.5:
        return lab.say(
            "재는 법을 바꾸어도 문턱이 남으므로, 이 일에서는 모델 자체가 갑자기 바뀝니다.",
            "The threshold stays whatever the measure, so in this task the model itself changes at a size.",
        )
    if sharp_step > smooth_step:
        return lab.say(
            f"같은 모델인데 답 전체로 재면 가장 큰 걸음이 {sharp_step:.0%}이니, 그 차이는 재는 법에서 옵니다.",
            f"The same models step by {sharp_step:.0%} when whole answers count: the difference is the measure's.",
        )
    return lab.say("답 전체로 재도 더 갑작스럽지 않습니다.", "Whole answers make it no more sudden.")


def draw(lab: Workbench, ladder: list[Rung], exact: list[Interval], smooth: list[Interval]) -> None:
    sizes = [r.parameters for r in ladder]
    title = lab.say("같은 모델을 두 가지로 잰 것", "The same models measured in two ways")
    with lab.picture("ladder", title, columns=2, width=8.0, height=3.2) as axes:
        for ax, values, name in (
            (axes[0, 0], exact, lab.label("답 전체가 맞은 비율", "whole answers that are right")),
            (axes[0, 1], smooth, lab.label("맞는 숫자의 로그 확률", "log-probability of the right digit")),
        ):
            ax.plot(sizes, [v.value for v in values], "o-", markersize=4, label=lab.label("잰 값", "measured"))
            ax.fill_between(sizes, [v.low for v in values], [v.high for v in values], alpha=0.25)
            ax.set_xscale("log")
            ax.set_xlabel(lab.label("매개변수", "parameters"))
            ax.set_title(name, fontsize="medium")
        for r in ladder:
            for ax, dots in zip(axes[0], (r.exact_of_seeds, r.logprob.mean(axis=-1)), strict=True):
                ax.plot([r.parameters] * len(dots), dots, ".", color="black", markersize=4, zorder=3)
        axes[0, 0].plot([], [], ".", color="black", label=lab.label("씨앗 하나", "one seed"))
        axes[0, 0].plot(
            sizes, [r.expected for r in ladder], "s--", markersize=3, label=lab.label("숫자의 곱", "product of digits")
        )
        axes[0, 0].legend(fontsize="small")
