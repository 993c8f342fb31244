"""`fastlm lab`: every idea of language models as an experiment, in Korean and English."""

from __future__ import annotations

import json
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlm.cli.output import JsonFlag, console, print_json, status_console
from fastlm.errors import FastlmError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastlm.labs import Idea
    from fastlm.labs.result import LabResult
    from fastlm.labs.workbench import Workbench

REPORT = "report.html"


class Language(str, Enum):
    ko = "ko"
    en = "en"


def command(
    idea: Annotated[str | None, typer.Argument(help="A lab's name, or all; without one, the labs are listed.")] = None,
    lang: Annotated[Language, typer.Option("--lang", help="Language of what is said.")] = Language.ko,
    model: Annotated[
        str, typer.Option("--model", "-m", help="The model that is asked: a name, directory, GGUF file or hub id.")
    ] = "gemma3-270m",
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for pictures and results.")] = Path("labs"),
    data: Annotated[
        Path | None, typer.Option("--data", help="Directory of the data sets; else $FASTLM_DATA, or data here.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Larger models, more examples and seeds; takes hours.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The first of the seeds.")] = 0,
    again: Annotated[bool, typer.Option("--again", help="With all: also labs that are in --out already.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Try an idea of language models: a small experiment, its table and pictures, and whether the claim held.

    Each takes at most three minutes on two cores. `all` takes half an hour, writes everything into one HTML file, and
    goes on where it was interrupted.

    Example: fastlm lab temperature --lang en
    """
    from fastlm.labs import IDEAS, find_idea

    if idea is None:
        _list(IDEAS, lang, as_json)
        return
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file; give a directory", param_hint="--out")
    chosen = IDEAS if idea == "all" else (find_idea(idea),)
    results, failures = [], []
    with _workbench(out, lang.value, model, full, data, seed, as_json) as lab:
        for number, each in enumerate(chosen):
            result = _earlier(each, lab) if idea == "all" and not again else None
            if result is None:
                if idea == "all" and not as_json:
                    status_console.print(f"[dim]{number + 1}/{len(chosen)} {each.name}[/]", highlight=False)
                try:
                    result = _run(each, lab)
                except FastlmError as error:
                    if idea != "all":
                        raise
                    failures.append(f"{each.name}: {error}")
                    status_console.print(f"{each.name}: {error}", style="yellow", markup=False, highlight=False)
                    continue
            results.append(result)
            if not as_json:
                _print(result, out)
    if idea == "all" and results:
        _write_report(results, out, as_json)
    if as_json:
        print_json(
            {"labs": [r.to_json() for r in results], "failed": failures} if idea == "all" else results[0].to_json()
        )
    if failures:
        raise typer.Exit(1)


def _list(ideas: tuple[Idea, ...], lang: Language, as_json: bool) -> None:
    if as_json:
        print_json({"labs": [{"name": i.name, "ko": i.korean, "en": i.english} for i in ideas]})
        return
    for each in ideas:
        said = each.korean if lang is Language.ko else each.english
        console.print(f"  [bold cyan]{each.name:<14}[/]{said}", highlight=False)
    last = "모두, 그리고 한 파일로 된 보고서" if lang is Language.ko else "all of them, and a report in one file"
    console.print(f"  [bold cyan]{'all':<14}[/]{last}", highlight=False)


@contextmanager
def _workbench(
    out: Path, lang: Any, model: str, full: bool, data: Path | None, seed: int, quiet: bool
) -> Iterator[Workbench]:
    from fastlm.labs.workbench import Workbench

    with _display(quiet) as show:
        lab = Workbench(out, lang=lang, model=model, full=full, data=data, seed=seed, on_status=show)
        try:
            yield lab
        finally:
            lab.close()


@contextmanager
def _display(quiet: bool) -> Iterator[Callable[[str, float | None], None]]:
    """A line on stderr that says what is being done; in a file or pipe, a line for each part."""
    from rich import progress as rich

    if quiet or not status_console.is_terminal:
        last = ""

        def say(text: str, fraction: float | None) -> None:
            nonlocal last
            if not quiet and text.split(" · ")[0] != last:
                last = text.split(" · ")[0]
                status_console.print(f"  {last}", markup=False, highlight=False)

        yield say
        return
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.TimeElapsedColumn())
    with rich.Progress(*columns, console=status_console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(text: str, fraction: float | None) -> None:
            bar.update(task, description=text.replace("[", "\\["), total=None if fraction is None else 1.0)
            if fraction is not None:
                bar.update(task, completed=fraction)

        yield show


def _run(idea: Idea, lab: Workbench) -> LabResult:
    from fastlm.labs import run_lab

    return run_lab(idea, lab)


def _earlier(idea: Idea, lab: Workbench) -> LabResult | None:
    """The result of an earlier call with the same settings, if it lies there with its pictures."""
    from fastlm.labs.result import LabResult

    try:
        result = LabResult.from_json(json.loads((lab.out / f"{idea.name}.json").read_text(encoding="utf-8")))
        pictures_are_there = all((lab.out / picture.file).is_file() for picture in result.pictures)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return result if result.settings == lab.settings and not result.missing and pictures_are_there else None


def _print(result: LabResult, out: Path) -> None:
    from fastlm.labs.report import print_result

    print_result(result, console)
    pictures = ", ".join(str(out / picture.file) for picture in result.pictures)
    console.print(f"[dim]{result.seconds:.0f} s · {pictures}[/]", highlight=False, soft_wrap=True)


def _write_report(results: list[LabResult], out: Path, quiet: bool) -> None:
    from fastlm.labs.report import write_report

    write_report(results, out, out / REPORT)
    if not quiet:
        held = sum(finding.holds for result in results for finding in result.findings)
        claims = sum(len(result.findings) for result in results)
        seconds = sum(result.seconds for result in results)
        console.print(f"\n{held}/{claims} · {seconds / 60:.1f} min · {out / REPORT}", highlight=False, soft_wrap=True)
