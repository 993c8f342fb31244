from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from fastlm.errors import DataError
from fastlm.training.records import read_records

ROWS = [{"text": "한 줄", "label": "1"}, {"text": 'say "hi", ok', "label": "0"}]


def write(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


JSON = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TSV = 'text\tlabel\n한 줄\t1\nsay "hi", ok\t0\n'
CSV = 'text,label\n한 줄,1\n"say ""hi"", ok",0\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSON),
        ("a.ndjson", JSON.replace("\n", "\n\n")),
        ("a.jsonl.gz", JSON),
        ("a.tsv", TSV),
        ("A.TSV", TSV.replace("\n", "\r\n")),
        ("a.tsv.gz", "\ufeff" + TSV),
        ("a.csv", CSV),
        ("a.csv", CSV.replace("\n", "\r\n").rstrip()),
    ],
)
def test_rows_are_the_same_in_every_format(tmp_path: Path, name: str, content: str) -> None:
    assert [record.values for record in read_records(write(tmp_path, name, content))] == ROWS


def test_zstandard_and_parquet_are_read(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    path = write(tmp_path, "a.jsonl.zst", zstandard.ZstdCompressor().compress(JSON.encode()))
    assert [record.values for record in read_records(path)] == ROWS
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    records = list(read_records(tmp_path / "a.parquet"))
    assert [record.values for record in records] == ROWS
    assert records[1].where.endswith("a.parquet, row 2")


def test_a_quoted_field_of_csv_may_hold_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'text,label\n"two\nlines",1\nx,2\n')
    records = list(read_records(path))
    assert [record.values["text"] for record in records] == ["two\nlines", "x"]
    assert records[1].where == f"{path}, line 4"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "text\tlabel\nonly one\n", "line 2: 1 fields, but 2 columns"),
        ("a.tsv", "text\ttext\na\tb\n", "the columns' names, each once"),
        ("a.csv", 'text,label\n"open,1\n', "not CSV"),
        ("a.csv", "text,label\na,b,c\n", "line 2: 3 fields, but 2 columns"),
        ("a.jsonl", "{}\n[1]\n", "line 2: not a JSON object but a list"),
        ("a.jsonl", '{"a": \n', "line 1: not JSON"),
        ("a.jsonl", b'{"a": "\xff"}\n', "line 1: not UTF-8: byte 0xff"),
        ("a.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("a.txt", "text\n", "rows are read from"),
        ("a.parquet", b"PAR1 no such thing PAR1", "damaged or no Parquet file"),
        ("missing/a.tsv", None, "does not exist"),
    ],
)
def test_damaged_files_are_refused_with_the_line(tmp_path: Path, name: str, content, message: str) -> None:
    path = tmp_path / name if content is None else write(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_records(path))
    assert str(path) in str(caught.value)


def test_a_cut_off_gzip_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl.gz", JSON * 500)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged or cut off"):
        list(read_records(path))


def test_a_column_that_is_no_text_is_refused(tmp_path: Path) -> None:
    [record] = read_records(write(tmp_path, "a.jsonl", '{"n": 1, "m": null}\n'))
    with pytest.raises(DataError, match="line 1: 'n' is a int, not a string"):
        record.text("n")
    with pytest.raises(DataError, match="line 1: no 'text', but 'n', 'm'"):
        record.text("text")
