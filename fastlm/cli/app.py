"""The typer application: the table of commands, and how errors become one line and an exit code.

A command is a file `fastlm/cli/<command>.py` with a function `command`, whose docstring is the help text and ends with
an example. Importing the file must import nothing heavy, so that help is quick.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from fastlm._version import __version__
from fastlm.cli import INTERRUPTED
from fastlm.cli.output import status_console
from fastlm.errors import FastlmError

COMMANDS = (
    "demo",
    "doctor",
    "train-tokenizer",
    "tokenize",
    "prepare",
    "train",
    "finetune",
    "runs",
    "generate",
    "chat",
    "serve",
    "eval",
    "lab",
    "bench",
    "warmup",
)


class _Commands(TyperGroup):
    """The root command; says so when it is interrupted."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _saying_interrupted():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _saying_interrupted():
            return super().invoke(ctx)


@contextmanager
def _saying_interrupted() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        status_console.print("[yellow]interrupted[/]")
        raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="fastlm",
    cls=_Commands,
    help="Fused kernels, an exact BPE tokenizer and a thin transformer for language models.\n\nExample: fastlm demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fastlm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for _command in COMMANDS:
    app.command(_command)(importlib.import_module(f"fastlm.cli.{_command.replace('-', '_')}").command)


def run() -> None:
    """Runs the command line and exits; errors that fastlm raises on purpose become one line on stderr."""
    try:
        app()
    except FastlmError as error:
        fail(str(error))
    except OSError as error:  # a full disk, a missing directory, no permission: the system's own words suffice
        where = f": {error.filename}" if error.filename else ""
        fail(f"{error.strerror or error}{where}")
    except MemoryError:
        fail("there is not enough memory for this; give less at once, or use a machine with more")


def fail(message: str) -> None:
    status_console.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True, highlight=False)
    sys.exit(1)
