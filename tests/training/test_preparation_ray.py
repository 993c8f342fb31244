"""Preparation by tasks of a local Ray beside the same in this process."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastlm.cli.app import app
from fastlm.errors import ConfigError, DataError
from fastlm.training import TokenDataset, prepare

needs_ray = [
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'fastlm[ray]'"
    ),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]
ROWS = [f"리뷰 {i} 번은 좋았다" if i % 3 else f"review {i} was bad" for i in range(300)]


def with_marks(function):
    for mark in needs_ray:
        function = mark(function)
    return function


@pytest.fixture
def cluster() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS[i::3] + ROWS[:20]))
    return paths


@with_marks
def test_ray_gives_the_same_directory_and_a_relative_path_is_the_drivers(
    cluster, files: list[Path], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [path.name for path in files]
    plain = prepare(names, "plain", vocab_size=300, deduplicate=True)
    by_ray = prepare(names, "by-ray", vocab_size=300, deduplicate=True, ray=True)
    assert by_ray.manifest == plain.manifest
    assert plain.manifest.duplicates > 30
    for path in Path("plain").iterdir():
        assert path.read_bytes() == (Path("by-ray") / path.name).read_bytes(), path.name


@with_marks
def test_what_a_task_refuses_is_the_error_of_the_call_and_nothing_is_left(
    cluster, files: list[Path], tmp_path: Path
) -> None:
    tokenizer = prepare(files[:1], tmp_path / "first", vocab_size=300).tokenizer
    files[1].write_text('{"text": "whole"}\n{"text": 7}\n')
    with pytest.raises(DataError, match=r"1\.jsonl, line 2: 'text' is a int, not a string$") as caught:
        prepare(files, tmp_path / "out", tokenizer=tokenizer, ray=True)
    assert type(caught.value) is DataError
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


@with_marks
def test_the_command_starts_a_cluster_and_ends_it(files: list[Path], tmp_path: Path) -> None:
    import ray

    options = ["--out", tmp_path / "out", "--vocab-size", 300, "--ray"]
    result = CliRunner().invoke(app, ["prepare", *map(str, files), *map(str, options)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert not ray.is_initialized()
    assert TokenDataset(tmp_path / "out").manifest.splits["train"]["documents"] > 200


def test_ray_that_is_not_installed_is_one_line(files: list[Path], tmp_path: Path, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    with pytest.raises(ConfigError, match=r"^--ray needs Ray: pip install fastlm\[ray\]$"):
        prepare(files, tmp_path / "out", ray=True)
    assert not (tmp_path / "out").exists()


def test_workers_and_ray_are_not_both_given(files: list[Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fastlm.training.preparation.check_ray", lambda: None)
    with pytest.raises(ConfigError, match="workers or ray, not both"):
        prepare(files, tmp_path / "out", ray=True, workers=2)
