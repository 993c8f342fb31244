"""`fastlm runs`: training runs side by side, as a table and one plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastlm.cli.output import JsonFlag, console, print_json
from fastlm.errors import DataError

COLUMNS = ("steps", "loss", "bits_per_byte", "accuracy", "parameters", "seconds")


def command(
    directories: Annotated[list[Path], typer.Argument(help="Runs, or directories that hold runs.")],
    plot: Annotated[Path | None, typer.Option("--plot", help="Where to draw the validation losses, as PNG.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare runs of train and finetune: what came out, and which options differ. The best comes first.

    Example: fastlm runs experiments/* --plot runs.png
    """
    from fastlm.training.log import plot_runs
    from fastlm.training.run_directory import RUN_FILE

    found = [path for path in directories if (path / RUN_FILE).is_file()]
    found += [file.parent for path in directories if path not in found for file in sorted(path.glob(f"*/{RUN_FILE}"))]
    if not found:
        raise DataError(f"{directories[0]} holds no run; give the --out of fastlm train or finetune")
    rows = sorted((_row(run) for run in found), key=lambda row: (row["loss"] is None, row["loss"]))
    _keep_differences(rows)
    if plot is not None:
        plot_runs({str(run): run / "log.jsonl" for run in found}, plot)
    if as_json:
        print_json({"runs": rows, "plot": None if plot is None else str(plot)})
    else:
        _print_table(rows)


def _row(run: Path) -> dict[str, Any]:
    from fastlm.model.tensor_files import read_json_object
    from fastlm.training.log import read_log

    description = read_json_object(run / "run.json")
    options: dict[str, Any] = {}
    for name, value in description.items():
        options |= value if isinstance(value, dict) else {name: value}
    finished = (run / "result.json").is_file()
    result = read_json_object(run / "result.json") if finished else {}
    log = read_log(run / "log.jsonl") if (run / "log.jsonl").is_file() else []
    valid: dict[str, Any] = next((line for line in reversed(log) if "valid_loss" in line), {})
    row: dict[str, Any] = {"run": str(run), "finished": finished, "options": options}
    for name in COLUMNS:
        row[name] = result.get(name, valid.get(f"valid_{name}"))
    row["steps"] = result.get("steps", log[-1]["step"] if log else 0)
    return row


def _keep_differences(rows: list[dict[str, Any]]) -> None:
    """Of the options, those in which the runs differ. Where data lies is none."""
    names = {name for row in rows for name in row["options"]}
    differing = sorted(
        name
        for name in names
        if not name.endswith("fingerprint")
        and len({json.dumps(row["options"].get(name), sort_keys=True) for row in rows}) > 1
    )
    for row in rows:
        row["options"] = {name: row["options"].get(name) for name in differing}


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    shown = [name for name in COLUMNS if any(row[name] is not None for row in rows)]
    table = Table(box=None, header_style="bold")
    for name in ("run", *shown, *rows[0]["options"]):
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        values = [_text(row[name]) for name in shown]
        label = row["run"] + ("" if row["finished"] else " (unfinished)")
        table.add_row(label, *values, *(_text(value) for value in row["options"].values()))
    console.print(table, highlight=False)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else (f"{value:.4g}" if isinstance(value, float) else str(value))
    )
