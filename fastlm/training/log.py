"""The record of a run: one JSON object a line, and the picture of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastlm._files import atomic_path, write_atomic
from fastlm.errors import ConfigError


class TrainingLog:
    """Appends to log.jsonl. A run that goes on from a checkpoint drops the lines of steps after it.

    With `tensorboard`, the numbers are also written for it, to the directory tensorboard beside the file. Raises
    ConfigError when that package is not installed.
    """

    def __init__(self, path: Path, *, keep_until_step: int, tensorboard: bool = False) -> None:
        self._board = _tensorboard(path.with_name("tensorboard"), keep_until_step) if tensorboard else None
        kept = [line for line in read_log(path) if line["step"] <= keep_until_step] if path.exists() else []
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, **values: Any) -> None:
        self._file.write(json.dumps(values) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(directory: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("--tensorboard needs the tensorboard package: pip install tensorboard") from None
    return SummaryWriter(str(directory), purge_step=first_step + 1)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; a last line that was cut off by a crash is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            lines.append(content)
    return lines


def plot_losses(log: Path, out: Path) -> None:
    """Draws training loss (smoothed over 2 % of the run) and validation loss, both in nats a token, against steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_log(log)
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    valid = [(line["step"], line["valid_loss"]) for line in lines if "valid_loss" in line]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.2, linewidth=0.6)
        axes.plot(steps, _smooth(losses, max(1, len(losses) // 50)), color="tab:blue", label="training")
    if valid:
        axes.plot(*zip(*valid, strict=True), color="tab:orange", marker="o", markersize=3, label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(out) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def plot_runs(logs: dict[str, Path], out: Path) -> None:
    """Draws the validation loss of several runs, by name, against steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, log in logs.items():
        lines = read_log(log) if log.is_file() else []
        points = [(line["step"], line["valid_loss"]) for line in lines if "valid_loss" in line]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
    with atomic_path(out) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _smooth(values: tuple[float, ...], width: int) -> list[float]:
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / len(values[max(0, i - width + 1) : i + 1])
        for i in range(len(values))
    ]
