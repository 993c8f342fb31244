"""What commands that train show while they do, and how Ctrl-C stops them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastlm.cli.output import status_console

if TYPE_CHECKING:
    from fastlm.training import Progress

METRICS = {  # the first that a run has is shown
    "bits_per_byte": "{:.3f} bits/byte",
    "accuracy": "{:.1%} right",
    "loss": "loss {:.3f}",
}


@contextmanager
def stop_on_signal() -> Iterator[dict[str, bool]]:
    """Ctrl-C and SIGTERM ask for a stop after the step; a second one ends at once."""
    stop = {"asked": False}

    def handle(number: int, _frame: object) -> None:
        if stop["asked"]:
            raise KeyboardInterrupt
        stop["asked"] = True

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class RunDisplay:
    """A bar on a terminal; elsewhere a line for each evaluation. On stderr."""

    def __init__(self) -> None:
        from rich import progress as rich

        self._bar = rich.Progress(
            rich.TextColumn("step {task.fields[step]}"),
            rich.BarColumn(),
            rich.TaskProgressColumn(),
            rich.TextColumn("{task.fields[figures]}"),
            console=status_console,
            disable=not status_console.is_terminal,
            transient=True,
        )
        self._shown: str | None = None
        self._task = self._bar.add_task("", total=1.0, step="0", figures="")

    def __enter__(self) -> RunDisplay:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, now: Progress) -> None:
        step = f"{now.step:,}" + (f"/{now.total_steps:,}" if now.total_steps else "")
        figures = f"loss {now.loss:.3f}  {now.tokens_per_second:,.0f} tokens/s"
        for name, form in METRICS.items():
            if name in now.valid:
                figures += f"  valid {form.format(now.valid[name])}"
                break
        if now.skipped_steps:
            figures += f"  {now.skipped_steps} steps skipped: not finite"
        if now.stage == "final evaluation":
            figures += "  scoring the validation data"
        elif now.seconds_left is not None:
            figures += f"  {duration(now.seconds_left)} left"
        self._bar.update(self._task, completed=now.fraction, step=step, figures=figures)
        if not status_console.is_terminal and now.stage != "training":
            status_console.print(f"step {step}  {figures}", highlight=False, soft_wrap=True)
        if now.stage != "training" and now.sample is not None and now.sample != self._shown:
            self._shown = now.sample
            text = " ".join(now.sample.split())
            self._bar.console.print(f"step {now.step:,} writes: {text}", highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
