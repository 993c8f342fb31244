"""Data sets of Hugging Face: the hub's `load_dataset` is replaced, everything else is the `datasets` package's own."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from fastlm.cli import app as application
from fastlm.errors import ConfigError, DataError
from fastlm.training import TokenDataset, hub_datasets, prepare

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def nothing_loaded_yet() -> None:
    hub_datasets._load.cache_clear()


ROWS = [f"리뷰 {i} 번은 좋았다" if i % 3 else f"review {i} was bad" for i in range(300)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    content = {"body": ROWS, "score": list(range(300))}
    both = {"train": datasets.Dataset.from_dict(content), "test": datasets.Dataset.from_dict({"body": ROWS[:9]})}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A hub that holds one data set, someone/reviews; and what was asked of it."""
    asked: list[tuple] = []

    def load_dataset(name: str, subset: str | None, *, split: str) -> object:
        asked.append((name, subset, split))
        if name != "someone/reviews":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub\nor is gated.")
        return datasets.load_from_disk(saved)[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def as_lines(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": row}) + "\n" for row in ROWS))
    return path


def test_a_data_set_of_the_hub_gives_the_shards_of_its_rows_in_a_file(hub: list, tmp_path: Path) -> None:
    theirs = prepare(["someone/reviews"], tmp_path / "hub", vocab_size=300, column="body", subset="small")
    ours = prepare([as_lines(tmp_path)], tmp_path / "file", vocab_size=300, column="body")
    assert theirs.manifest.fingerprint == ours.manifest.fingerprint
    assert theirs.manifest.splits == ours.manifest.splits
    assert hub == [("someone/reviews", "small", "train")]
    [source] = theirs.manifest.sources
    assert source["file"] == "someone/reviews:small:train:0-300"
    assert source["documents"] == 300


def test_a_saved_directory_is_read_in_pieces_that_workers_share(saved: Path, tmp_path: Path, monkeypatch) -> None:
    whole = prepare([saved], tmp_path / "whole", vocab_size=300, column="body")
    monkeypatch.setattr(hub_datasets, "PIECE_BYTES", 1000)
    cut = prepare([saved], tmp_path / "cut", vocab_size=300, column="body", workers=2)
    assert len(cut.manifest.sources) > 5
    for split in ("train", "valid"):
        one, many = getattr(whole, split), getattr(cut, split)
        assert one.read(0, len(one)).tolist() == many.read(0, len(many)).tolist()
    assert sum(source["documents"] for source in cut.manifest.sources) == 300
    assert len({source["sha256"] for source in cut.manifest.sources}) == len(cut.manifest.sources)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "someone/missing",
            {},
            "someone/missing is no file here, and as a data set .* doesn't exist on the Hub or",
        ),
        ("someone/reviews", {}, "someone/reviews has no column 'text', but body, score; name one by --column"),
        ("someone/reviews", {"column": "score"}, "row 1: 'score' is a int, not a string"),
    ],
)
def test_a_data_set_that_cannot_be_read_is_one_line_and_leaves_nothing(
    hub: list, tmp_path: Path, name: str, options: dict, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        prepare([name], tmp_path / "out", vocab_size=300, **options)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_split_that_is_not_there_names_those_that_are(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no split 'valid', but train, test; give one by --split"):
        prepare([saved], tmp_path / "out", column="body", split="valid")


def test_without_the_package_the_command_to_install_it_is_told(tmp_path: Path, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name))
    with pytest.raises(ConfigError, match=r"^someone/reviews is no file here; .*: pip install fastlm\[datasets\]$"):
        prepare(["someone/reviews"], tmp_path / "out")


def test_what_looks_like_a_file_is_no_data_set(tmp_path: Path) -> None:
    assert hub_datasets.is_dataset(Path("HuggingFaceFW/fineweb-2"))
    assert hub_datasets.is_dataset(Path("imdb"))
    for name in ("reviews.txt", "web/a.jsonl.gz", "a.parquet", str(tmp_path / "missing"), "a/b/c", "../up"):
        assert not hub_datasets.is_dataset(Path(name)), name
    assert not hub_datasets.is_dataset(tmp_path)


def test_the_command_prepares_and_trains_on_a_data_set(saved: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["fastlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            application.run()
        return int(caught.value.code or 0)

    options = ["--column", "body", "--split", "train", "--vocab-size", 300, "--json"]
    assert call("prepare", saved, "--out", tmp_path / "out", *options) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["train"]["documents"] + result["valid"]["documents"] == 300
    assert TokenDataset(tmp_path / "out").train.num_bytes == result["train"]["bytes"]
