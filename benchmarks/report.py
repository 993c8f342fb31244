"""Results as JSON, and as the tables of the README and of the benchmark pages.

    python -m fastlm.benchmarks.report --results benchmarks/results README.md README.ko.md docs/en/benchmarks.md

rewrites, in each file, what stands between `<!-- benchmarks:summary -->` or `<!-- benchmarks:full -->` and
`<!-- /benchmarks -->`. With `--check` it writes nothing and exits with 1 where a file is out of date.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from fastlm.benchmarks.harness import Ceilings, Failure, Result

from fastlm._files import write_atomic
from fastlm.errors import DataError

PEERS = ("torch", "triton", "transformers", "tokenizers", "tiktoken", "numpy")
SCALED_UNITS = {"bytes": "B", "FLOP": "FLOP", "flops": "FLOP"}  # those that are written with k, M or G
_REGION = re.compile(r"(<!-- benchmarks:(summary|full) -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)


@dataclass
class Report:
    """One device's results, as `benchmarks/results/<device>.json` holds them."""

    device: dict[str, Any]
    environment: dict[str, Any]
    ceilings: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "environment": self.environment,
            "ceilings": self.ceilings,
            "results": [result.to_json() for result in self.results],
            "failures": [failure.to_json() for failure in self.failures],
            "notes": self.notes,
        }

    def save(self, path: Path) -> None:
        write_atomic(path, json.dumps(self.to_json(), ensure_ascii=False, indent=1) + "\n")


def new_report(device: str, ceilings: Ceilings) -> Report:
    return Report(describe_device(device), describe_environment(), ceilings.to_json())


def read_report(path: Path) -> Report:
    """Raises DataError when the file is not one that `Report.save` wrote."""
    try:
        raw = json.loads(path.read_bytes())
        results = [Result(**result) for result in raw["results"]]
        failures = [Failure(**failure) for failure in raw["failures"]]
        return Report(raw["device"], raw["environment"], raw["ceilings"], results, failures, raw["notes"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a benchmark result ({error}); write one with: fastlm bench --json F") from None


def describe_device(device: str) -> dict[str, Any]:
    from fastlm.cli.doctor import cpu_features, cpu_name, gpus

    facts: dict[str, Any] = {"kind": device, "cpu": cpu_name(), "cores": os.cpu_count(), "cpu_features": cpu_features()}
    if device.startswith("cuda"):
        facts |= {"name": gpus()[0]["name"], "gpu": gpus()[0]}
    else:
        facts["name"] = f"{facts['cpu']}, {facts['cores']} cores"
    return facts


def describe_environment() -> dict[str, Any]:
    versions = {}
    for package in PEERS:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "fastlm": metadata.version("fastlm"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def time_text(seconds: float) -> str:
    """Three significant digits with the unit that fits: "12.3 ms"."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1 or unit == "µs":
            return f"{_three_digits(seconds * scale)} {unit}"
    raise AssertionError


def rate_text(result: Result) -> str:
    """Ours, in its unit a second: "12.3 MB/s"; empty when the case has no unit of work."""
    if not result.rate:
        return ""
    if result.unit not in SCALED_UNITS:
        return f"{_three_digits(result.rate)} {result.unit}/s"
    prefix, scale = next(p for p in (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 0.0)) if result.rate >= p[1])
    return f"{_three_digits(result.rate / (scale or 1.0))} {prefix}{SCALED_UNITS[result.unit]}/s"


def memory_text(result: Result) -> str:
    """How much we take at the peak beside the peer: "0.45× the memory"; empty where it was not measured."""
    return f"{result.memory_ratio:.2f}× the memory" if result.memory_ratio else ""


def bound_text(result: Result) -> str:
    return f"{result.share_of_bound:.0%}" if result.share_of_bound else ""


def ceilings_text(ceilings: dict[str, Any]) -> str:
    flops = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in ceilings["flops_per_second"].items())
    return f"a large copy moves {ceilings['bytes_per_second'] / 1e9:,.1f} GB/s, a large matrix product does {flops}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def full_table(reports: list[Report]) -> str:
    """Every result, by device and benchmark, in Markdown."""
    parts = []
    for report in reports:
        versions = ", ".join(f"{name} {version}" for name, version in report.environment["versions"].items())
        parts += [
            f"**{report.device['name']}**, {report.environment['threads']} threads, {report.environment['date']}; "
            f"Python {report.environment['python']}, {versions}. Ceilings: {ceilings_text(report.ceilings)}.",
            "",
            "| benchmark | case | peer | peer's time | fastlm | ratio | rate | of bound |",
            "|---|---|---|---:|---:|---:|---:|---:|",
        ]
        parts += [
            f"| {r.benchmark} | {r.case} | {r.peer} | {time_text(r.peer_seconds)} | {time_text(r.ours_seconds)} "
            f"| {r.ratio:.2f} | {', '.join(filter(None, (rate_text(r), memory_text(r))))} | {bound_text(r)} |"
            for r in report.results
        ]
        parts += [""] + [f"Not measured: {f.benchmark}, {f.case}: {f.reason}" for f in report.failures]
    return "\n".join(parts).rstrip() + "\n"


def summary_table(reports: list[Report]) -> str:
    """One row for each benchmark and peer: its heaviest case, and the range of ratios over all its cases."""
    parts = []
    for report in reports:
        parts += [
            f"{report.device['name']}, {report.environment['threads']} threads, {report.environment['date']}",
            "",
            "| | peer | peer's time | fastlm | ratio | ratio in all cases |",
            "|---|---|---:|---:|---:|---:|",
        ]
        groups: dict[tuple[str, str], list[Result]] = {}
        for result in report.results:
            groups.setdefault((result.benchmark, result.peer), []).append(result)
        for (benchmark, peer), results in groups.items():
            heaviest = max(results, key=lambda r: r.peer_seconds)
            ratios = [r.ratio for r in results]
            parts.append(
                f"| {benchmark}: {heaviest.case} | {peer} | {time_text(heaviest.peer_seconds)} "
                f"| {time_text(heaviest.ours_seconds)} | **{heaviest.ratio:.2f}×** "
                f"| {min(ratios):.2f}–{max(ratios):.2f}× ({len(results)}) |"
            )
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def render(text: str, reports: list[Report]) -> str:
    """`text` with its marked regions rewritten from `reports`."""
    tables = {"summary": summary_table, "full": full_table}
    return _REGION.sub(lambda m: f"{m[1]}\n{tables[m[2]](reports)}\n{m[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Rewrites the benchmark tables of Markdown files from result files.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is out of date")
    arguments = parser.parse_args()
    reports = [read_report(path) for path in sorted(arguments.results.glob("*.json"))]
    if not reports:
        sys.exit(f"no results in {arguments.results}; make some with: fastlm bench --json {arguments.results}/F.json")
    outdated = []
    for path in arguments.files:
        before = path.read_text(encoding="utf-8")
        after = render(before, reports)
        if after != before:
            outdated.append(str(path))
            if not arguments.check:
                write_atomic(path, after)
    if outdated:
        print("out of date:" if arguments.check else "rewrote:", ", ".join(outdated))
    sys.exit(1 if outdated and arguments.check else 0)


if __name__ == "__main__":
    main()
