"""Recurrent networks against a transformer: equal parameters, equal tokens. How far back, how fast, how good?

An Elman network, LSTM and GRU (torch's cells) keep a memory of fixed size and read one token after another; attention
reads all places at once and sees every earlier token as it was (Vaswani et al. 2017, section 4).
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from fastlm.labs.episodes import IGNORED, Episodes, logits_of, train_on_episodes
from fastlm.labs.equal_models import Kind, matched, parameters, transformer
from fastlm.labs.result import Cell
from fastlm.labs.small_models import prepare_documents, train_model
from fastlm.labs.statistics import Spread, spread
from fastlm.labs.workbench import Workbench
from fastlm.model import build_model
from fastlm.training import TrainingConfig

SYMBOLS = 16  # of noise, and as many others, of which one is to be remembered
ASK = 2 * SYMBOLS
DISTANCES = (1, 4, 16, 64, 256, 512)
RECALL_STEPS, RECALL_ROWS, RECALL_QUESTIONS = 260, 24, 128
LENGTHS = (64, 256, 1024, 4096)
TIMED_RUNS = 3
REVIEWS, TEXT_VOCAB, TEXT_CONTEXT = 12_000, 512, 64
TEXT_STEPS, TEXT_ROWS = 250, 16
# Each learns best at its own rate, of those that were tried: 0.003, 0.01, 0.02.
RATES: dict[Kind, float] = {"transformer": 0.003, "rnn": 0.003, "lstm": 0.02, "gru": 0.01}


def run(lab: Workbench) -> None:
    lab.note(
        lab.say(
            "그림의 왼쪽은 멀리 있는 것을 떠올리는 비율, 오른쪽은 길이에 따른 학습 한 걸음의 시간입니다. "
            "순환 신경망은 길이만큼 차례로 계산하고, 트랜스포머는 한꺼번에 계산합니다.",
            "On the left, how often something far back is recalled; on the right, the time of a training step as texts "
            "grow. A recurrent network computes as many steps in turn as there are tokens, a transformer all at once.",
        )
    )
    recalled = timed = None
    with lab.part("k걸음 전의 것 떠올리기", "recalling what was k steps back"):
        recalled = recall(lab)
    with lab.part("학습 한 걸음의 시간", "time of a training step"):
        timed = step_times(lab)
    if recalled and timed:
        draw(lab, recalled, timed)
    with lab.part("같은 한국어 글의 손실", "loss on the same Korean text"):
        text_loss(lab)


def puzzle(generator: np.random.Generator, rows: int, distance: int) -> Episodes:
    """Noise, a symbol that is not noise, noise; `distance` tokens after the symbol it is asked for."""
    before = int(generator.integers(0, 9))
    ids = generator.integers(0, SYMBOLS, (rows, before + distance + 1))
    ids[:, before] += SYMBOLS
    ids[:, -1] = ASK
    targets = np.full_like(ids, IGNORED)
    targets[:, -1] = ids[:, before]
    return Episodes(torch.from_numpy(ids), torch.from_numpy(targets))


def any_distance(generator: np.random.Generator, rows: int) -> Episodes:
    return puzzle(generator, rows, int(generator.choice(DISTANCES)))


def recall(lab: Workbench) -> dict[Kind, list[Spread]]:
    configs = matched(transformer(ASK + 1, 32, 1024))
    found: dict[Kind, list[Spread]] = {}
    for kind, model_config in configs.items():
        shares: list[list[float]] = [[] for _ in DISTANCES]
        for seed in lab.seeds():
            config = training(kind, lab.size(RECALL_STEPS, 5 * RECALL_STEPS), RECALL_ROWS, seed)
            out = lab.run_directory(f"recall-{kind}-{seed}")
            model = train_on_episodes(model_config, any_distance, config, out, on_progress=lab.on_progress)
            for distance, values in zip(DISTANCES, shares, strict=True):
                test = puzzle(np.random.default_rng([seed, 1 << 20, distance]), RECALL_QUESTIONS, distance)
                right = logits_of(model, test.inputs)[:, -1].argmax(-1) == test.targets[:, -1]
                values.append(float(right.float().mean()))
        found[kind] = [spread(values) for values in shares]
    lab.table(
        lab.say(
            f"떠올린 비율, 씨앗 {lab.seeds()}, 찍으면 {1 / SYMBOLS:.3f}",
            f"Share recalled, seeds {lab.seeds()}, chance {1 / SYMBOLS:.3f}",
        ),
        [lab.say("모델", "model"), lab.say("매개변수", "parameters"), *(f"k={distance}" for distance in DISTANCES)],
        [[kind, parameters(configs[kind]), *map(str, values)] for kind, values in found.items()],
    )
    furthest = {kind: values[-1].mean for kind, values in found.items()}
    lab.number(f"recall at {DISTANCES[-1]}", furthest)
    said = ", ".join(f"{kind} {share:.2f}" for kind, share in furthest.items())
    far = DISTANCES[-1]
    lab.finding(
        lab.say("트랜스포머는 아무리 멀어도 떠올린다", "The transformer recalls however far back"),
        all(share.mean > 0.9 for share in found["transformer"]),
        lab.say(f"k={far}에서 떠올린 비율은 {said}입니다.", f"At k={far} the shares recalled are {said}."),
    )
    lab.finding(
        lab.say("문이 없는 순환 신경망은 멀면 잊는다", "A recurrent network without gates forgets what is far"),
        furthest["rnn"] < 0.2,
        lab.say(
            f"rnn은 k=1에서 {found['rnn'][0].mean:.2f}, k={far}에서 {furthest['rnn']:.2f}입니다. "
            f"문이 있는 lstm은 {furthest['lstm']:.2f}, gru는 {furthest['gru']:.2f}입니다.",
            f"The rnn recalls {found['rnn'][0].mean:.2f} at k=1 and {furthest['rnn']:.2f} at k={far}. For this single "
            f"symbol the gates of lstm ({furthest['lstm']:.2f}) and gru ({furthest['gru']:.2f}) decide.",
        ),
    )
    return found


def training(kind: Kind, steps: int, rows: int, seed: int) -> TrainingConfig:
    return TrainingConfig(
        steps=steps,
        batch_size=rows,
        optimizer="adamw",
        learning_rate=RATES[kind],
        embedding_learning_rate=RATES[kind],
        evaluations=0,
        seed=seed,
    )


def step_times(lab: Workbench) -> dict[Kind, list[float]]:
    """Milliseconds of forward and backward over one text, by length: the median of a few."""
    configs = matched(transformer(TEXT_VOCAB, 64, LENGTHS[-1]))
    found: dict[Kind, list[float]] = {}
    for kind, model_config in configs.items():
        model = build_model(model_config)
        found[kind] = []
        for length in LENGTHS:
            ids = torch.randint(TEXT_VOCAB, (1, length))
            times = []
            for _ in range(TIMED_RUNS + 1):
                started = time.perf_counter()
                model.loss(ids, ids).backward()
                times.append(1e3 * (time.perf_counter() - started))
            found[kind].append(statistics.median(times[1:]))  # the first one warms up
    lab.table(
        lab.say("한 걸음의 시간 (ms)과 차례로 하는 계산의 수", "Time of a step (ms), and computations in turn"),
        [lab.say("모델", "model"), *(f"{n:,}" for n in LENGTHS), lab.say("차례", "in turn")],
        [
            [kind, *values, lab.say("층의 수", "layers") if kind == "transformer" else lab.say("길이", "length")]
            for kind, values in found.items()
        ],
    )
    ratios = {kind: values[-1] / found["transformer"][-1] for kind, values in found.items() if kind != "transformer"}
    growth = {kind: values[-1] / values[-2] for kind, values in found.items()}
    slowest = max(ratios, key=lambda kind: growth[kind])
    quickest = min(ratios, key=lambda kind: ratios[kind])
    lab.number(f"time at {LENGTHS[-1]} over the transformer's", ratios)
    lab.finding(
        lab.say(
            f"{LENGTHS[-2]:,}에서 {LENGTHS[-1]:,}토큰으로 길어지면 트랜스포머가 더 많이 느려진다",
            f"From {LENGTHS[-2]:,} to {LENGTHS[-1]:,} tokens the transformer slows down more",
        ),
        growth["transformer"] > growth[slowest],
        lab.say(
            f"트랜스포머는 {growth['transformer']:.1f}배, {slowest}는 {growth[slowest]:.1f}배가 됩니다. 순환 신경망의 "
            "계산은 길이만큼, 어텐션의 계산은 길이의 제곱만큼 늡니다.",
            f"The transformer takes {growth['transformer']:.1f} times as long, the {slowest} {growth[slowest]:.1f}. A "
            "recurrent network's work grows with the length, attention's with its square.",
        ),
    )
    lab.finding(
        lab.say(
            f"길이 {LENGTHS[-1]:,}에서 트랜스포머가 가장 빠르다",
            f"At {LENGTHS[-1]:,} tokens the transformer is quickest",
        ),
        ratios[quickest] > 1,
        lab.say(
            f"이 컴퓨터에서 가장 빠른 순환 신경망({quickest})은 트랜스포머의 {ratios[quickest]:.2f}배 걸립니다. "
            "한꺼번에 하는 이득은 나란히 계산할 코어가 많아야 납니다.",
            f"On this machine the quickest other ({quickest}) takes {ratios[quickest]:.2f} times as long. Computing at "
            "once pays with many cores that work side by side.",
        ),
    )
    return found


def text_loss(lab: Workbench) -> None:
    lines = lab.data("nsmc/reviews.txt").read_text(encoding="utf-8").splitlines()[: lab.size(REVIEWS, 10 * REVIEWS)]
    dataset = prepare_documents(lab, "rnn", lines, vocab_size=TEXT_VOCAB)
    rows: list[list[Cell]] = []
    losses: dict[Kind, Spread] = {}
    for kind, model_config in matched(transformer(TEXT_VOCAB, 64, TEXT_CONTEXT)).items():
        steps = lab.size(TEXT_STEPS, 20 * TEXT_STEPS)
        results = [
            train_model(
                lab, f"text-{kind}-{seed}", model_config, training(kind, steps, TEXT_ROWS, seed), dataset
            ).result
            for seed in lab.seeds()
        ]
        losses[kind] = spread([result.bits_per_byte or 0.0 for result in results])
        rows.append([kind, results[0].parameters, results[0].tokens, str(losses[kind])])
    lab.table(
        lab.say(f"같은 글, 같은 토큰 (씨앗 {lab.seeds()})", f"The same text, as many tokens (seeds {lab.seeds()})"),
        [
            lab.say("모델", "model"),
            lab.say("매개변수", "parameters"),
            lab.say("읽은 토큰", "tokens read"),
            lab.say("바이트당 비트", "bits a byte"),
        ],
        rows,
    )
    ours = losses.pop("transformer")
    best = min(losses, key=lambda kind: losses[kind].mean)
    lab.finding(
        lab.say(
            "같은 토큰을 읽고 트랜스포머의 손실이 가장 낮다", "After as many tokens the transformer's loss is lowest"
        ),
        ours.mean + ours.deviation < losses[best].mean - losses[best].deviation,
        lab.say(
            f"트랜스포머 {ours}, 그다음은 {best} {losses[best]}입니다.",
            f"The transformer has {ours}; the best other, {best}, has {losses[best]}.",
        ),
    )


def draw(lab: Workbench, recalled: dict[Kind, list[Spread]], timed: dict[Kind, list[float]]) -> None:
    title = lab.say("떠올린 비율과 한 걸음의 시간", "Share recalled, and the time of a step")
    with lab.picture("recall-and-time", title, columns=2, width=8.0, height=3.2) as axes:
        for kind, values in recalled.items():
            means, bars = [v.mean for v in values], [v.deviation for v in values]
            axes[0, 0].errorbar(DISTANCES, means, bars, marker="o", markersize=4, capsize=2, label=kind)
        axes[0, 0].axhline(1 / SYMBOLS, color="gray", linewidth=0.8, linestyle=":")
        for kind, times in timed.items():
            axes[0, 1].plot(LENGTHS, times, marker="o", markersize=4, label=kind)
        axes[0, 1].set_yscale("log")
        for ax in axes[0]:
            ax.set_xscale("log", base=2)
            ax.legend(fontsize="small")
        axes[0, 0].set_xlabel(lab.label("k걸음 전", "k steps back"))
        axes[0, 1].set_xlabel(lab.label("길이 (토큰)", "length (tokens)"))
        axes[0, 0].set_title(lab.label("떠올린 비율", "share recalled"), fontsize="medium")
        axes[0, 1].set_title(lab.label("학습 한 걸음 (ms)", "a training step (ms)"), fontsize="medium")
