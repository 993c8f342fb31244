"""A foundation model and its fine-tuning: what was read before is worth labelled examples later.

A model that has read film reviews, and one of the same shape with random weights, learn to tell good from bad reviews
from the same examples in the same steps; the first also by LoRA, which trains a few per cent of the numbers. Beside
them stands logistic regression over letters, which needs no network.
"""

from __future__ import annotations

from typing import Literal

from fastlm.labs.korean_base import korean_base
from fastlm.labs.result import Cell
from fastlm.labs.statistics import Spread, spread
from fastlm.labs.task_baselines import letter_ngrams
from fastlm.labs.workbench import Workbench
from fastlm.model.adapter import LoRAConfig
from fastlm.training import FinetuneConfig, FinetuneResult, TrainingConfig, finetune, load_base
from fastlm.training.examples import Labelled

LABELS = ("나쁨", "좋음")
SIZES = (200, 1000, 5000)  # labelled examples
SIZES_FULL = (200, 1000, 5000, 20_000, 60_000)
VALID = 500
STEPS, BATCH, MAX_LENGTH = 50, 32, 40
RATE, LORA_RATE = 0.003, 0.006
RANK = 8

Way = Literal["base", "scratch", "lora"]


def run(lab: Workbench) -> None:
    lab.note(
        lab.say(
            "같은 예로 같은 걸음을 배웠을 때, 미리 읽은 모델과 처음부터 배운 모델의 정확도를 견주어 보십시오. "
            "예가 적을수록 차이가 큰지도 보십시오.",
            "Compare the accuracy of the model that had read before with that of the one that starts from nothing, "
            "after the same examples and steps, and see whether the gap is larger with fewer examples.",
        )
    )
    with lab.part("바탕 모델 학습", "training the base"):
        korean_base(lab)
    with lab.part("고쳐 쓰기", "fine-tuning"):
        compare(lab)


def tune(lab: Workbench, way: Way, train: list[Labelled], valid: list[Labelled], seed: int) -> FinetuneResult:
    """The same steps whatever the way; from scratch, the embeddings are random as well."""
    base = load_base(korean_base(lab).directory, from_scratch=seed if way == "scratch" else None)
    rate = LORA_RATE if way == "lora" else RATE
    config = TrainingConfig(
        steps=lab.size(STEPS, 5 * STEPS),
        batch_size=BATCH,
        optimizer="adamw",
        learning_rate=rate,
        embedding_learning_rate=rate,
        seed=seed,
        evaluations=1,
    )
    task = FinetuneConfig(
        "classification",
        lora=LoRAConfig(rank=RANK, alpha=2.0 * RANK) if way == "lora" else None,
        max_length=MAX_LENGTH,
        labels=LABELS,
    )
    out = lab.run_directory(f"transfer-{way}-{len(train)}-{seed}")
    return finetune(base, (train, valid), out, task, config, on_progress=lab.on_progress)


def compare(lab: Workbench) -> None:
    every = [Labelled(row["text"], LABELS[int(row["label"])]) for row in lab.rows("nsmc/train.tsv")]
    valid = [Labelled(row["text"], LABELS[int(row["label"])]) for row in lab.rows("nsmc/valid.tsv")[:VALID]]
    sizes, seeds = lab.size(SIZES, SIZES_FULL), lab.seeds()
    found: dict[Way, list[Spread]] = {"base": [], "scratch": [], "lora": []}
    trained: dict[Way, int] = {}
    for size in sizes:
        for way, spreads in found.items():
            results = [tune(lab, way, every[:size], valid, seed) for seed in seeds]
            spreads.append(spread([100 * result.metrics["accuracy"] for result in results]))
            trained[way] = results[0].trained_parameters
    names: dict[Way, str] = {
        "base": lab.say("미리 읽은 모델", "from the base"),
        "scratch": lab.say("처음부터", "from scratch"),
        "lora": lab.say(f"미리 읽은 모델, LoRA {RANK}", f"from the base, LoRA {RANK}"),
    }
    rows: list[list[Cell]] = [[names[way], trained[way], *map(str, spreads)] for way, spreads in found.items()]
    counted: list[float] = []
    with lab.part("글자 조각", "pieces of words"):
        for size in sizes:
            guesses = letter_ngrams(lab, [(e.text, e.label) for e in every[:size]], [e.text for e in valid])
            counted.append(100 * sum(g == e.label for g, e in zip(guesses, valid, strict=True)) / len(valid))
        name = lab.say("글자 조각과 로지스틱 회귀", "letter n-grams, logistic regression")
        rows.append([name, "", *(f"{accuracy:.1f}" for accuracy in counted)])
    lab.table(
        lab.say(
            f"정확도 (%), 씨앗 {seeds}, 걸음 {lab.size(STEPS, 5 * STEPS)}, 검증 {len(valid)}개",
            f"Accuracy (%), seeds {seeds}, {lab.size(STEPS, 5 * STEPS)} steps, {len(valid)} held out",
        ),
        [lab.say("방법", "way"), lab.say("배운 숫자", "trained"), *(f"{size:,}" for size in sizes)],
        rows,
    )
    draw(lab, sizes, found, names, counted)
    judge(lab, sizes, found, trained)


def draw(
    lab: Workbench, sizes: tuple[int, ...], found: dict[Way, list[Spread]], names: dict[Way, str], counted: list[float]
) -> None:
    title = lab.say("예의 수에 따른 정확도", "Accuracy against the number of examples")
    with lab.picture("accuracy", title, width=6.0, height=3.4) as axes:
        ax = axes[0, 0]
        for way, spreads in found.items():
            means, bars = [s.mean for s in spreads], [s.deviation for s in spreads]
            ax.errorbar(sizes, means, bars, marker="o", capsize=3, label=lab.label(names[way], names[way]))
        if counted:
            ax.plot(sizes, counted, "k:", marker="s", markersize=3, label=lab.label("글자 조각", "letter n-grams"))
        ax.axhline(50, color="gray", linewidth=0.8)
        ax.set_xscale("log")
        ax.set_xlabel(lab.label("정답이 붙은 예", "labelled examples"))
        ax.set_ylabel(lab.label("정확도 (%)", "accuracy (%)"))
        ax.legend(fontsize="small")


def judge(lab: Workbench, sizes: tuple[int, ...], found: dict[Way, list[Spread]], trained: dict[Way, int]) -> None:
    gaps = [a.mean - b.mean for a, b in zip(found["base"], found["scratch"], strict=True)]
    clear = [a.mean - a.deviation > b.mean + b.deviation for a, b in zip(found["base"], found["scratch"], strict=True)]
    said = ", ".join(f"{size:,}: {gap:+.1f}" for size, gap in zip(sizes, gaps, strict=True))
    lab.number("gain of the base in points", dict(zip(map(str, sizes), gaps, strict=True)))
    lab.finding(
        lab.say("예의 수마다 미리 읽은 모델이 낫다", "The base is ahead at every number of examples"),
        all(clear),
        lab.say(
            f"예의 수마다 차이(점)는 {said}입니다. 표준편차 밖인 것은 {len(sizes)}개 중 {sum(clear)}개입니다.",
            f"By number of examples the gap in points is {said}; {sum(clear)} of {len(sizes)} exceed the deviations.",
        ),
    )
    share = trained["lora"] / trained["base"]
    lora, full = found["lora"][-1], found["base"][-1]
    lab.finding(
        lab.say("LoRA는 적은 숫자로 3점 안까지 따라온다", "LoRA comes within 3 points with a fraction of the numbers"),
        full.mean - lora.mean < 3.0,
        lab.say(
            f"숫자의 {share:.1%}만 배워 {lora}%, 전체를 배우면 {full}%입니다.",
            f"Training {share:.1%} of the numbers it has {lora} %, and {full} % with all of them.",
        ),
    )
