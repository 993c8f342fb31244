"""One learning rate for a ladder of sizes: the validation loss of short runs against the rate, for several widths.

    python -m fastlm.benchmarks.learning_rates --data nsmc/reviews.txt

Muon's rate for the blocks' matrices and AdamW's for the rest are multiplied by the same factor. AdamW's is once the
same for every width, and once `embedding_learning_rate`, which falls with the width. All else is equal: text and its
order, tokenizer, depth, width of a head, steps. Results that are there already are kept: an interrupted call goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fastlm._files import atomic_path, write_atomic
from fastlm.training import TokenDataset, TrainingConfig, prepare, train, transformer_config
from fastlm.training.config import Preset, embedding_learning_rate, fast_dtype

WIDTHS = (64, 128, 256)
FACTORS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)
LAYERS, HEAD_DIM, CONTEXT, BATCH_SIZE = 3, 32, 64, 32
STEPS = 200
RULES = {"by width": "AdamW's rate in proportion to 1 / width, as by default", "same": "the same AdamW's rate for all"}
VOCAB_SIZE = 2048
HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "images" / "learning-rates.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a text, a document a line")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "training" / "learning_rates.json")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs: list[dict[str, Any]] = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
    done = {(run["rule"], run["width"], run["factor"]) for run in runs}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        dataset = prepare(
            [arguments.data], Path(directory) / "data", vocab_size=VOCAB_SIZE, valid_fraction=0.005, by_line=True
        )
        for rule, width, factor in itertools.product(RULES, WIDTHS, FACTORS):
            if (rule, width, factor) not in done:
                runs.append(one(dataset, rule, width, factor))
                print(runs[-1], flush=True)
                write_atomic(arguments.out, json.dumps(report(runs), indent=1) + "\n")
    for rule, best in report(runs)["best_factor"].items():
        print(f"{RULES[rule]}: lowest losses at {best} times the default rates")
    draw(runs, arguments.picture)


def one(dataset: TokenDataset, rule: str, width: int, factor: float) -> dict[str, Any]:
    """A run from random weights to the loss of the whole validation split, in nats a token."""
    started = time.monotonic()
    model = transformer_config(dataset.tokenizer.vocab_size, Preset(width, LAYERS, HEAD_DIM, CONTEXT, BATCH_SIZE))
    default = TrainingConfig(steps=STEPS)
    others = default.embedding_learning_rate if rule == "same" else embedding_learning_rate(width)
    config = TrainingConfig(
        steps=STEPS,
        batch_size=BATCH_SIZE,
        learning_rate=default.learning_rate * factor,
        embedding_learning_rate=others * factor,
        dtype=fast_dtype(),
        evaluations=0,
        checkpoint_seconds=10_000,
    )
    with tempfile.TemporaryDirectory() as out:
        result = train(model, config, dataset, out)
    assert result.loss is not None
    return {
        "rule": rule,
        "width": width,
        "parameters": result.parameters,
        "factor": factor,
        "learning_rate": config.learning_rate,
        "embedding_learning_rate": config.embedding_learning_rate,
        "loss": round(result.loss, 4),
        "seconds": round(time.monotonic() - started, 1),
    }


def losses_of(runs: list[dict[str, Any]], rule: str, width: int) -> dict[float, float]:
    """By factor, in order."""
    return {run["factor"]: run["loss"] for run in sorted_runs(runs) if (run["rule"], run["width"]) == (rule, width)}


def sorted_runs(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(runs, key=lambda run: (run["rule"], run["width"], run["factor"]))


def report(runs: list[dict[str, Any]]) -> dict[str, Any]:
    best: dict[str, dict[int, float]] = {rule: {} for rule in RULES}
    for rule, width in itertools.product(RULES, WIDTHS):
        losses = losses_of(runs, rule, width)
        if losses:
            best[rule][width] = min(losses, key=losses.__getitem__)
    return {
        "steps": STEPS,
        "tokens_per_step": BATCH_SIZE * CONTEXT,
        "layers": LAYERS,
        "vocab_size": VOCAB_SIZE,
        "best_factor": best,
        "runs": sorted_runs(runs),
    }


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    rate = TrainingConfig(steps=1).learning_rate
    for axes, rule in zip(figure.subplots(1, 2, sharey=True), RULES, strict=True):
        for width in WIDTHS:
            losses = losses_of(runs, rule, width)
            rates = [factor * rate for factor in losses]
            [line] = axes.plot(rates, list(losses.values()), marker="o", markersize=4, label=f"width {width}")
            lowest = min(losses, key=losses.__getitem__)
            axes.plot(lowest * rate, losses[lowest], marker="*", markersize=14, color=line.get_color())
        axes.axvline(rate, color="gray", linestyle=":", label="default")
        axes.set_xscale("log", base=2)
        axes.set_xticks([f * rate for f in FACTORS], [f"{f * rate:g}" for f in FACTORS])
        axes.set_title(RULES[rule], fontsize="medium")
        axes.set_xlabel("Muon's rate, AdamW's in proportion")
        axes.grid(alpha=0.3)
    axes.set_ylim(top=axes.get_ylim()[0] + 1.2)
    figure.axes[0].set_ylabel("validation loss (nats per token)")
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


if __name__ == "__main__":
    main()
