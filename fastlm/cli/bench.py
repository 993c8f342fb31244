"""`fastlm bench`: ours beside the peers, measured here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastlm.cli.output import console, print_json, status_console
from fastlm.errors import ConfigError

if TYPE_CHECKING:
    from fastlm.benchmarks.harness import Failure, Result
    from fastlm.benchmarks.report import Report

STDOUT = Path("-")


def command(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Benchmarks; all of them when none is named.")
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="On the first CUDA GPU instead of the CPU.")] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Also write the results to this file; - prints them instead of tables."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also draw the ratios, to this .png, .svg or .pdf.")
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.01, help="Time to spend on each side of each case.")
    ] = 1.0,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads of torch. [default: torch's own choice]")
    ] = None,
    fuzz: Annotated[
        int, typer.Option("--fuzz", min=0, metavar="N", help="Tokenizer: compare ids on N random texts, time nothing.")
    ] = 0,
    fuzz_with: Annotated[
        list[Path] | None,
        typer.Option("--fuzz-with", help="tokenizer.json to compare with Hugging Face's; may be given several times."),
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Say what can be measured, and measure nothing.")] = False,
) -> None:
    """Time fastlm beside its peers, and beside what the hardware allows.

    Outputs are compared before anything is timed. The two sides then run in turn, and medians are shown: a ratio
    above 1 means that fastlm is faster. A case whose outputs differ is reported, and the exit code is 1.

    Example: fastlm bench rms_norm sampling --json results.json --plot ratios.png
    """
    if fuzz:
        if names != ["tokenizer"]:
            raise ConfigError("--fuzz is for the tokenizer: fastlm bench tokenizer --fuzz 10000")
        _fuzz(fuzz, fuzz_with or [], quiet=json_file == STDOUT)
        return
    import torch

    from fastlm.benchmarks import harness
    from fastlm.benchmarks.report import ceilings_text, new_report

    names = list(names or harness.available())
    unknown = [name for name in names if name not in harness.available()]
    if unknown:
        raise ConfigError(f"no benchmark named {unknown[0]!r}; there are {', '.join(harness.available())}")
    if list_only:
        _print_list(names)
        return
    if gpu and not torch.cuda.is_available():
        raise ConfigError("--gpu, but torch sees no GPU here; fastlm doctor says more")
    for path in (json_file, plot):
        if path and path != STDOUT and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: the directory {path.absolute().parent} does not exist; create it first")
    if threads:
        torch.set_num_threads(threads)

    device = "cuda" if gpu else "cpu"
    quiet = json_file == STDOUT
    ceilings = harness.measure_ceilings(device)
    report = new_report(device, ceilings)
    if not quiet:
        console.print(f"[bold]{report.device['name']}[/], {report.environment['threads']} threads", highlight=False)
        console.print(f"{ceilings_text(report.ceilings)}\n", style="dim", highlight=False, soft_wrap=True)
    for name in names:
        outcomes = _run_one(name, harness.run(name, device, ceilings, seconds), report)
        if not quiet:
            console.print(f"[bold]{name}[/]")
            print_outcomes(outcomes)
            console.print()
        report.notes = harness.left_out()
        if json_file and not quiet:  # after every benchmark: what is measured stays when a later one is interrupted
            report.save(json_file)
    if quiet:
        print_json(report.to_json())
    else:
        for note in report.notes:
            console.print(note, style="dim")
    if plot and report.results:
        from fastlm.benchmarks.plot import plot_ratios

        plot_ratios(report.results, plot, report.device["name"])
    if report.failures:
        status_console.print(f"[bold red]{len(report.failures)} of the cases failed[/]")
        raise typer.Exit(1)


def _fuzz(count: int, paths: list[Path], *, quiet: bool) -> None:
    """A line for each vocabulary, and the texts on which ids differ. Exit code 1 when there are any."""
    import secrets
    from dataclasses import asdict

    from fastlm.benchmarks.fuzz_tokenizer import fuzz, pairs

    seed = secrets.randbits(32)
    outcomes = []
    for pair in pairs(paths):
        with status_console.status(f"{pair.vocabulary} …") as status:
            for outcome in fuzz(pair, count, seed):
                status.update(
                    f"{pair.vocabulary}: {outcome.strings:,} of {count:,}, {outcome.num_differences} differ …"
                )
        outcomes.append(outcome)
        if quiet:
            continue
        line = (
            f"{outcome.vocabulary:<20} {outcome.strings:>9,} texts, {outcome.num_differences} differ from "
            f"{outcome.reference}  ({outcome.excluded:,} characters of another Unicode left out)"
        )
        console.print(line, style="red" if outcome.num_differences else "green", highlight=False, soft_wrap=True)
        for difference in outcome.differences:
            console.print(f"  {difference}", markup=False, highlight=False, soft_wrap=True)
    if quiet:
        print_json({"seed": seed, "outcomes": [asdict(outcome) for outcome in outcomes]})
    if any(outcome.num_differences for outcome in outcomes):
        raise typer.Exit(1)


def _run_one(name: str, outcomes: Iterator[Result | Failure], report: Report) -> list[Result | Failure]:
    """Consumes one benchmark under a progress line, adding to `report`."""
    from fastlm.benchmarks.harness import Failure

    done: list[Result | Failure] = []
    with status_console.status(f"{name} …") as status:
        for outcome in outcomes:
            done.append(outcome)
            (report.failures if isinstance(outcome, Failure) else report.results).append(outcome)
            status.update(f"{name}: {outcome.case} done, {len(done)} so far …")
    return done


def print_outcomes(outcomes: Sequence[Result | Failure]) -> None:
    """A line for each case, and below it a line for each peer."""
    from rich.text import Text

    from fastlm.benchmarks.harness import Failure
    from fastlm.benchmarks.report import memory_text, rate_text, time_text

    shown = None
    for outcome in outcomes:
        if isinstance(outcome, Failure):
            console.print(Text(f"  {outcome.case}: FAILED, {outcome.reason}", "red"), soft_wrap=True)
            continue
        if outcome.case != shown:
            shown = outcome.case
            figures = [text for text in (rate_text(outcome), _bound_text(outcome)) if text]
            line = Text(f"  {outcome.case}").append("".join(f"  {text}" for text in figures), "dim")
            console.print(line, soft_wrap=True)
        times = (
            f"    {outcome.peer:<24} {time_text(outcome.peer_seconds):>9}   fastlm {time_text(outcome.ours_seconds):>9}"
        )
        colour = "green" if outcome.ratio >= 1 else "red"
        line = Text(times).append(f"  {outcome.ratio:>6.2f}×", colour)
        console.print(line.append(f"  {memory_text(outcome)}".rstrip(), "dim"), soft_wrap=True)


def _bound_text(result: Result) -> str:
    if result.bound_seconds is None:
        return ""
    from fastlm.benchmarks.report import time_text

    return f"{result.share_of_bound:.0%} of the bound, {time_text(result.bound_seconds)}"


def _print_list(names: list[str]) -> None:
    import importlib

    for name in names:
        doc = importlib.import_module(f"fastlm.benchmarks.bench_{name}").__doc__ or ""
        console.print(f"[bold]{name}[/]: {doc.strip().splitlines()[0]}", highlight=False, soft_wrap=True)
