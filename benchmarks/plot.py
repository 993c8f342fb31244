"""Results as a picture: one bar for each case and peer, as long as we are fast beside the peer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastlm.benchmarks.harness import Result

from fastlm._files import atomic_path

FASTER, SLOWER = "#2a7f62", "#b5543c"


def plot_ratios(results: Sequence[Result], path: Path, title: str) -> None:
    """Writes a picture (its format by the name's end, such as .png or .svg) of peer time over ours, on a log scale."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    ratios = [r.ratio for r in results]
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.28 * len(results)), layout="constrained")
    bars = axes.barh(
        range(len(results)), [r - 1 for r in ratios], left=1, color=[FASTER if r >= 1 else SLOWER for r in ratios]
    )
    axes.bar_label(bars, [f" {r:.2f}×" for r in ratios], fontsize=8)
    axes.set_yticks(range(len(results)), [f"{r.benchmark}: {r.case} | {r.peer}" for r in results], fontsize=8)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, *ratios) * 0.8, max(2.0, *ratios) * 1.5)
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_formatter("")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("the peer's time over fastlm's: right of 1, fastlm is faster")
    axes.set_title(title, fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix.lstrip(".") or "png")
    pyplot.close(figure)
