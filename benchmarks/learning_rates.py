"""One learning rate for a ladder of sizes: the validation loss of short runs against the rate, for several widths.

    python -m fastlm.benchmarks.learning_rates --data nsmc/reviews.txt

Both default rates, Muon's of the blocks' matrices and AdamW's of the rest, are multiplied by the same factor. All but
the width is equal: text, tokenizer, order of the data, depth, width of a head, steps. Results that are there already
are kept, so that an interrupted call goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fastlm._files import atomic_path, write_atomic
from fastlm.training import TokenDataset, TrainingConfig, prepare, train, transformer_config
from fastlm.training.config import Preset, fast_dtype

WIDTHS = (64, 128, 256)
FACTORS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)
LAYERS, HEAD_DIM, CONTEXT, BATCH_SIZE = 3, 32, 64, 32
STEPS, SEEDS = 200, (0, 1)
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
    done = {(run["width"], run["factor"], run["seed"]) for run in runs}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        dataset = prepare(
            [arguments.data], Path(directory) / "data", vocab_size=VOCAB_SIZE, valid_fraction=0.005, by_line=True
        )
        for seed in SEEDS:
            for width in WIDTHS:
                for factor in FACTORS:
                    if (width, factor, seed) not in done:
                        runs.append(one(dataset, width, factor, seed))
                        print(runs[-1], flush=True)
                        write_atomic(arguments.out, json.dumps(report(runs), indent=1) + "\n")
    for width, best in report(runs)["best_factor"].items():
        print(f"width {width}: lowest loss at {best} times the default rates")
    draw(runs, arguments.picture)


def one(dataset: TokenDataset, width: int, factor: float, seed: int) -> dict[str, Any]:
    """A run from random weights to the loss of the whole validation split, in nats a token."""
    started = time.monotonic()
    model = transformer_config(dataset.tokenizer.vocab_size, Preset(width, LAYERS, HEAD_DIM, CONTEXT, BATCH_SIZE))
    default = TrainingConfig(steps=STEPS)
    config = TrainingConfig(
        steps=STEPS,
        batch_size=BATCH_SIZE,
        learning_rate=default.learning_rate * factor,
        embedding_learning_rate=default.embedding_learning_rate * factor,
        dtype=fast_dtype(),
        evaluations=0,
        checkpoint_seconds=10_000,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as out:
        result = train(model, config, dataset, out)
    assert result.loss is not None
    return {
        "width": width,
        "parameters": result.parameters,
        "factor": factor,
        "learning_rate": config.learning_rate,
        "embedding_learning_rate": config.embedding_learning_rate,
        "seed": seed,
        "loss": round(result.loss, 4),
        "seconds": round(time.monotonic() - started, 1),
    }


def mean_losses(runs: list[dict[str, Any]], width: int) -> dict[float, float]:
    """By factor, over the seeds."""
    factors = sorted({run["factor"] for run in runs if run["width"] == width})
    return {
        f: statistics.mean(run["loss"] for run in runs if run["width"] == width and run["factor"] == f) for f in factors
    }


def report(runs: list[dict[str, Any]]) -> dict[str, Any]:
    means = {width: mean_losses(runs, width) for width in sorted({run["width"] for run in runs})}
    return {
        "steps": STEPS,
        "tokens_per_step": BATCH_SIZE * CONTEXT,
        "layers": LAYERS,
        "vocab_size": VOCAB_SIZE,
        "best_factor": {width: min(losses, key=lambda f, of=losses: of[f]) for width, losses in means.items()},  # type: ignore[misc]
        "runs": runs,
    }


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rate = TrainingConfig(steps=1).learning_rate
    for width in sorted({run["width"] for run in runs}):
        losses = mean_losses(runs, width)
        [line] = axes.plot([f * rate for f in losses], list(losses.values()), marker="o", markersize=4)
        best = min(losses, key=lambda f, of=losses: of[f])  # type: ignore[misc]
        axes.plot(best * rate, losses[best], marker="*", markersize=14, color=line.get_color())
        parameters = next(run["parameters"] for run in runs if run["width"] == width)
        line.set_label(f"width {width}, {parameters / 1e6:.1f}M parameters")
    axes.axvline(rate, color="gray", linestyle=":", label="default")
    axes.set_xscale("log", base=2)
    axes.set_xticks([f * rate for f in FACTORS], [f"{f * rate:g}" for f in FACTORS])
    axes.set_xlabel("learning rate of the blocks' matrices (the others' in proportion)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


if __name__ == "__main__":
    main()
