"""How commands speak: results on stdout, everything else on stderr, so that `--json` can be piped."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console()
status_console = Console(stderr=True)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]


def print_json(result: dict[str, Any]) -> None:
    """One line of JSON on stdout; Korean stays readable."""
    print(json.dumps(result, ensure_ascii=False), flush=True)
