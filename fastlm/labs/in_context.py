"""Learning from examples in the prompt: no weight changes, and yet the answers may. What do the examples teach?

A model is asked with 0 to 16 examples, in random order, and again with the labels of the same examples shuffled: what
it still gains then is no mapping, but the look of the question. A small model shows where copying from context comes
from: two layers of attention can form an induction head (Olsson et al. 2022), one cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from fastlm.inference import LLM, SamplingParams
from fastlm.labs.data_in_context import ANIMALS, LENGTH, PAIRS, SYMBOLS, TOOLS, repeated
from fastlm.labs.episodes import IGNORED, logits_of, train_on_episodes
from fastlm.labs.result import Cell
from fastlm.labs.statistics import Interval, bootstrap, spread
from fastlm.labs.workbench import Workbench
from fastlm.model import ModelConfig
from fastlm.training import TrainingConfig

SHOTS = (0, 1, 2, 4, 8, 16)
QUESTIONS = 24
LONGEST_REVIEW = 40  # characters, so that sixteen of them are read quickly
INDUCTION_STEPS = 350
INDUCTION_RATE = 0.02

Example = tuple[str, str]
Labels = Literal["true", "shuffled"]


@dataclass(frozen=True)
class Task:
    """What is asked: `template` with an example's text; `labels` when the answer is one of them, else it is written."""

    korean: str
    english: str
    template: str
    examples: list[Example]
    labels: tuple[str, ...] = ()


def run(lab: Workbench) -> None:
    lab.note(
        lab.say(
            "보기가 늘 때 정답률이 오르는지, 이름표를 뒤섞어도 그만큼 오르는지 견주어 보십시오. 뒤섞어도 오르는 몫은 "
            "모델이 짝을 배운 것이 아니라 묻는 모양에 익숙해진 것입니다.",
            "See whether more examples bring more right answers, and whether shuffled labels bring as many. What "
            "shuffled labels bring is no learning of the pairs, but getting used to the look of the question.",
        )
    )
    with lab.part("프롬프트의 보기", "examples in the prompt"):
        ask(lab, lab.llm())
    with lab.part("귀납 머리", "induction heads"):
        induction(lab)


def tasks(lab: Workbench) -> list[Task]:
    found = []
    with lab.part("영화평", "film reviews"):
        rows = [row for row in lab.rows("nsmc/valid.tsv") if len(row["text"]) <= LONGEST_REVIEW]
        reviews = [(row["text"], ("나쁨", "좋음")[int(row["label"])]) for row in rows]
        found.append(Task("영화평", "film reviews", "영화평: {}\n느낌:", reviews, ("나쁨", "좋음")))
    found.append(Task("한영 낱말", "Korean to English words", "한국어: {}\n영어:", list(PAIRS)))
    invented = [(word, "zib") for word in ANIMALS] + [(word, "kov") for word in TOOLS]
    found.append(Task("지어낸 이름표", "labels made up", "word: {}\nkind:", invented, ("zib", "kov")))
    return found


def prompt(task: Task, shots: Sequence[Example], text: str) -> str:
    return "".join(f"{task.template.format(x)} {y}\n\n" for x, y in shots) + task.template.format(text)


def draw(task: Task, count: int, seed: int, labels: Labels) -> tuple[list[Example], list[Example]]:
    """Examples for the prompt and questions, none in both; each label as often as the other, in random order."""
    generator = np.random.default_rng(seed)
    order = [task.examples[i] for i in generator.permutation(len(task.examples))]
    if task.labels:
        groups = [[e for e in order if e[1] == label] for label in task.labels]
        order = [example for pair in zip(*groups, strict=False) for example in pair]
    questions, rest = order[:QUESTIONS], order[QUESTIONS:]
    shots = [rest[i] for i in generator.permutation(min(count, len(rest)))] if count > 1 else rest[:count]
    if labels == "shuffled":
        answers = [y for _, y in shots]
        shots = [(x, answers[i]) for (x, _), i in zip(shots, generator.permutation(len(shots)), strict=True)]
    return shots, questions


def right_answers(llm: LLM, task: Task, count: int, seed: int, labels: Labels) -> tuple[list[bool], list[bool]]:
    """Whether each question was answered right, as it came and after calibration (Zhao et al. 2021): each label's
    probability is divided by what it gets for a question without content."""
    shots, questions = draw(task, count, seed, labels)
    asked = [prompt(task, shots, x) for x, _ in questions]
    if not task.labels:
        params = SamplingParams(max_tokens=6, temperature=0, stop=("\n",))
        written = [completion.text.strip().lower() for completion in llm.generate(asked, params)]
        right = [text == answer for text, (_, answer) in zip(written, questions, strict=True)]
        return right, right
    first = [llm.tokenizer.encode(f" {label}")[0] for label in task.labels]
    logits = llm.embed([*asked, prompt(task, shots, "N/A")], pooling="logits").log_softmax(-1)[:, first]
    answers = torch.tensor([task.labels.index(y) for _, y in questions])
    plain = logits[:-1].argmax(-1) == answers
    calibrated = (logits[:-1] - logits[-1]).argmax(-1) == answers
    return plain.tolist(), calibrated.tolist()


def ask(lab: Workbench, llm: LLM) -> None:
    seeds, chosen = lab.seeds(), tasks(lab)
    cells = [(task, count, labels) for task in chosen for count in SHOTS for labels in ("true", "shuffled")]
    found: dict[tuple[str, int, str], tuple[list[bool], list[bool]]] = {}
    for i, (task, count, labels) in enumerate(cells):
        lab.done(i / len(cells))
        if count < 2 and labels == "shuffled":
            found[task.english, count, labels] = found[task.english, count, "true"]  # one label has no other order
            continue
        results = [right_answers(llm, task, count, seed, labels) for seed in seeds]  # type: ignore[arg-type]
        found[task.english, count, labels] = ([r for a, _ in results for r in a], [r for _, b in results for r in b])
    intervals = {key: [bootstrap(r, seed=lab.seed) for r in values] for key, values in found.items()}
    rows: list[list[Cell]] = []
    for task in chosen:
        for count in SHOTS:
            plain, calibrated = intervals[task.english, count, "true"]
            shuffled = intervals[task.english, count, "shuffled"][1]
            name = lab.say(task.korean, task.english)
            rows.append([name, count, shares(plain), shares(calibrated) if task.labels else "", shares(shuffled)])
    lab.table(
        lab.say(
            f"정답률과 95% 구간: 질문 {QUESTIONS}개, 보기 순서 {len(seeds)}가지 (씨앗 {seeds})",
            f"Share of right answers, 95 % interval: {QUESTIONS} questions, seeds {seeds} draw examples",
        ),
        [
            lab.say("일", "task"),
            lab.say("보기", "examples"),
            lab.say("그대로", "as it came"),
            lab.say("보정", "calibrated"),
            lab.say("이름표를 뒤섞음", "labels shuffled"),
        ],
        rows,
    )
    draw_curves(lab, chosen, intervals)
    for task in chosen:
        judge(lab, task, found)


def shares(interval: Interval) -> str:
    return f"{interval.value:.0%} [{interval.low:.0%}–{interval.high:.0%}]"


def draw_curves(lab: Workbench, chosen: list[Task], intervals: dict[tuple[str, int, str], list[Interval]]) -> None:
    title = lab.say("보기 수에 따른 정답률", "Right answers against the number of examples")
    with lab.picture("shots", title, columns=len(chosen), width=3.0 * len(chosen), height=3.0) as axes:
        for task, ax in zip(chosen, axes[0], strict=True):
            for labels, style, name in (
                ("true", "o-", lab.label("바른 이름표", "right labels")),
                ("shuffled", "s--", lab.label("뒤섞은 이름표", "shuffled labels")),
            ):
                values = [intervals[task.english, count, labels][1] for count in SHOTS]
                ax.plot(range(len(SHOTS)), [v.value for v in values], style, markersize=4, label=name)
                ax.fill_between(range(len(SHOTS)), [v.low for v in values], [v.high for v in values], alpha=0.15)
            if task.labels:
                ax.axhline(1 / len(task.labels), color="gray", linewidth=0.8, linestyle=":")
            ax.set_xticks(range(len(SHOTS)), SHOTS)
            ax.set_ylim(-0.03, 1.03)
            ax.set_title(lab.label(task.korean, task.english), fontsize="medium")
            ax.set_xlabel(lab.label("보기", "examples"))
        axes[0, 0].legend(fontsize="x-small")


def judge(lab: Workbench, task: Task, found: dict[tuple[str, int, str], tuple[list[bool], list[bool]]]) -> None:
    """Two claims: more examples help; and their labels matter. Each by the interval of the difference."""
    most = SHOTS[-1]
    none, many, shuffled = (
        np.array(found[task.english, count, labels][1], dtype=float)
        for count, labels in ((0, "true"), (most, "true"), (most, "shuffled"))
    )
    gain, matter = (bootstrap((many - other).tolist(), seed=lab.seed) for other in (none, shuffled))
    lab.number(task.english, {"gain": gain.value, "of the labels": matter.value, "accuracy": float(many.mean())})
    name = lab.say(task.korean, task.english)
    lab.finding(
        lab.say(f"{name}: 보기 {most}개가 없을 때보다 낫다", f"{name}: {most} examples beat none"),
        gain.low > 0,
        lab.say(f"정답률의 차이는 {gain}입니다.", f"The share of right answers differs by {gain}."),
    )
    lab.finding(
        lab.say(f"{name}: 이름표가 맞아야 낫다", f"{name}: it matters that the labels are right"),
        matter.low > 0,
        lab.say(
            f"바른 이름표와 뒤섞은 이름표의 차이는 {matter}입니다.",
            f"Right and shuffled labels differ by {matter}.",
        ),
    )


def induction(lab: Workbench) -> None:
    accuracies: dict[int, list[float]] = {}
    for layers in (1, 2):
        model_config = ModelConfig(
            vocab_size=SYMBOLS,
            hidden_size=64,
            num_layers=layers,
            num_heads=2,
            num_kv_heads=2,
            head_dim=32,
            intermediate_size=128,
            context_length=LENGTH,
        )
        for seed in lab.seeds():
            config = TrainingConfig(
                steps=lab.size(INDUCTION_STEPS, 4 * INDUCTION_STEPS),
                batch_size=32,
                learning_rate=INDUCTION_RATE,
                embedding_learning_rate=INDUCTION_RATE,
                seed=seed,
            )
            out = lab.run_directory(f"induction-{layers}-{seed}")
            model = train_on_episodes(model_config, repeated, config, out, on_progress=lab.on_progress)
            test = repeated(np.random.default_rng([seed, 1 << 20]), 128)
            scored = test.targets != IGNORED
            right = logits_of(model, test.inputs).argmax(-1) == test.targets
            accuracies.setdefault(layers, []).append(float(right[scored].float().mean()))
    one, two = spread(accuracies[1]), spread(accuracies[2])
    lab.number("induction", accuracies)
    lab.table(
        lab.say(
            f"되풀이되는 기호 이어 쓰기 (기호 {SYMBOLS}개, 씨앗 {len(accuracies[1])}개)",
            f"Going on with symbols that repeat ({SYMBOLS} symbols, {len(accuracies[1])} seeds)",
        ),
        [lab.say("층", "layers"), lab.say("정답률", "right")],
        [[1, str(one)], [2, str(two)], [lab.say("찍기", "chance"), f"{1 / SYMBOLS:.3f}"]],
    )
    lab.finding(
        lab.say("층이 둘이면 앞의 짝을 찾아 잇고, 하나면 못 한다", "Two layers go on as before; one cannot"),
        two.mean - two.deviation > one.mean + one.deviation and two.mean > 0.9,
        lab.say(f"두 층은 {two}, 한 층은 {one}입니다.", f"Two layers are right in {two}, one layer in {one}."),
    )
