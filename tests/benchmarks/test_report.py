from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastlm.benchmarks import report
from fastlm.benchmarks.harness import Ceilings, Failure, Result
from fastlm.benchmarks.report import Report

from fastlm.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
GENERATED = ["README.md", "README.ko.md", "docs/en/benchmarks.md", "docs/ko/benchmarks.md"]


def make(case: str, ours: float, peer: float, **changes) -> Result:
    fields = {
        "benchmark": "sort", "case": case, "peer": "torch", "ours_seconds": ours, "peer_seconds": peer,
        "ratio": peer / ours, "spread": 0.1, "bound_seconds": ours / 2, "rate": None, "unit": "", "runs": 9,
    }  # fmt: skip
    return Result(**(fields | changes))


@pytest.fixture
def one_report() -> Report:
    new = report.new_report("cpu", Ceilings(2e10, {torch.float32: 1e11}))
    new.results = [make("small", 1e-5, 2e-5), make("large", 2e-3, 1e-3)]
    new.failures = [Failure("sort", "huge", "ours differs")]
    new.notes = ["x is not installed"]
    return new


def test_report_survives_the_file(one_report: Report, tmp_path: Path) -> None:
    one_report.save(tmp_path / "r.json")
    assert report.read_report(tmp_path / "r.json") == one_report
    raw = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert {"device", "environment", "ceilings", "results"} <= set(raw)
    assert raw["device"]["name"]
    assert len(raw["environment"]["date"]) == 10


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"results": [{"x": 1}], "failures": []}'])
def test_file_that_is_no_report_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"r\.json: not a benchmark result"):
        report.read_report(tmp_path / "r.json")


def test_summary_shows_the_heaviest_case_and_the_range(one_report: Report) -> None:
    row = report.summary_table([one_report]).splitlines()[-1]
    assert row == "| sort: large | torch | 1.00 ms | 2.00 ms | **0.50×** | 0.50–2.00× (2) |"


def test_full_table_shows_every_case_and_what_failed(one_report: Report) -> None:
    text = report.full_table([one_report])
    assert "| sort | small | torch | 20.0 µs | 10.0 µs | 2.00 |  | 50% |" in text
    assert "Not measured: sort, huge: ours differs" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.345, "12.3 s"), (0.0123, "12.3 ms"), (1.5e-6, "1.50 µs"), (2e-7, "0.20 µs")]
)
def test_times_have_three_digits_and_a_unit_that_fits(seconds: float, text: str) -> None:
    assert report.time_text(seconds) == text


@pytest.mark.parametrize(
    ("rate", "unit", "text"),
    [
        (78.4e6, "bytes", "78.4 MB/s"),
        (5e9, "bytes", "5.00 GB/s"),
        (12.0, "bytes", "12.0 B/s"),
        (1234.0, "tokens", "1,234 tokens/s"),
    ],
)
def test_rates_carry_their_unit(rate: float, unit: str, text: str) -> None:
    assert report.rate_text(make("c", 1.0, 1.0, rate=rate, unit=unit)) == text


def test_only_the_marked_region_is_rewritten(one_report: Report) -> None:
    before = "a\n<!-- benchmarks:summary -->\nold\n<!-- /benchmarks -->\nb\n"
    after = report.render(before, [one_report])
    assert after.startswith("a\n<!-- benchmarks:summary -->\n")
    assert after.endswith("<!-- /benchmarks -->\nb\n")
    assert "old" not in after
    assert report.render(after, [one_report]) == after


def test_committed_tables_are_those_of_the_committed_results() -> None:
    files = [name for name in GENERATED if (ROOT / name).is_file()]
    assert files
    command = [sys.executable, "-m", "fastlm.benchmarks.report", "--results", str(RESULTS), "--check", *files]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, (
        f"{run.stdout}{run.stderr}\nrewrite with: python -m fastlm.benchmarks.report {' '.join(files)}"
    )
    for name in files:
        assert "<!-- /benchmarks -->" in (ROOT / name).read_text(encoding="utf-8")
