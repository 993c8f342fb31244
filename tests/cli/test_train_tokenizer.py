from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import tokenizers

from fastlm.cli.app import run
from fastlm.tokenizer.tokenizer import Tokenizer

KOREAN = "나는 학교에 갔다. 너도 학교에 갔니?\n"


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(topics.values())[:60_000] + KOREAN * 30, "utf-8")
    return path


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """An output file from an earlier run."""
    path = tmp_path / "out" / "tokenizer.json"
    path.parent.mkdir()
    path.write_text("earlier")
    return path


def fastlm(monkeypatch: pytest.MonkeyPatch, *args: str | Path) -> int:
    """Runs the command line in this process and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["fastlm", *map(str, args)])
    try:
        run()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def assert_refused(capsys: pytest.CaptureFixture[str], code: int, earlier: Path, message: str) -> None:
    output = capsys.readouterr()
    assert code == 1
    assert output.out == ""
    lines = output.err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert earlier.read_text() == "earlier"
    assert os.listdir(earlier.parent) == [earlier.name]


def test_writes_a_tokenizer_that_hugging_face_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text_file: Path, earlier: Path
) -> None:
    code = fastlm(monkeypatch, "train-tokenizer", "--data", text_file, "--vocab-size", "500", "--out", earlier)
    assert code == 0
    assert "500 ids, 243 merges" in (out := capsys.readouterr().out)
    assert "bytes per token" in out
    theirs = tokenizers.Tokenizer.from_file(str(earlier))
    assert theirs.encode(KOREAN).ids == list(Tokenizer.from_file(earlier).encode(KOREAN))
    assert theirs.get_vocab_size() == 500


def test_json_output_holds_the_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text_file: Path, earlier: Path
) -> None:
    options = (
        "--vocab-size",
        "400",
        "--special",
        "<a>",
        "--special",
        "<b>",
        "--pattern",
        "o200k",
        "--min-frequency",
        "2",
    )
    code = fastlm(monkeypatch, "train-tokenizer", "-d", text_file, "-d", text_file, *options, "-o", earlier, "--json")
    assert code == 0
    result = json.loads(capsys.readouterr().out)
    assert result["vocab_size"] == 400
    assert result["merges"] == 400 - 256 - 2
    assert result["bytes_read"] == 2 * text_file.stat().st_size
    assert result["stopped_early"] is False
    assert 1 < result["bytes_per_token"] < 10
    assert Tokenizer.from_file(earlier).special_tokens == {"<a>": 0, "<b>": 1}


def test_too_little_text_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, earlier: Path
) -> None:
    (tmp_path / "small.txt").write_text("abc")
    assert fastlm(monkeypatch, "train-tokenizer", "-d", tmp_path / "small.txt", "-o", earlier) == 0
    assert "stopped at 259 of 8,000 ids" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("empty.txt", (), "empty.txt: the file is empty"),
        (".", (), "is a directory; give its text files"),
        ("absent.txt", (), "absent.txt: No such file or directory"),
        ("latin.txt", (), "latin.txt: not UTF-8: byte 0xe9 at offset 3"),
        ("text.txt", ("--vocab-size", "200"), "vocab_size 200 is too small: 256 bytes and 1 special tokens need 257"),
        ("text.txt", ("--pattern", "gpt9"), "gpt9"),
        ("text.txt", ("--special", "x"), "name of a single byte"),
        ("text.txt", ("--min-frequency", "-3"), "min_frequency is -3"),
    ],
)
def test_bad_input_is_one_line_and_leaves_the_earlier_file(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    text_file: Path,
    earlier: Path,
    name: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    code = fastlm(monkeypatch, "train-tokenizer", "--data", tmp_path / name, *options, "--out", earlier)
    assert_refused(capsys, code, earlier, message)


def test_an_output_that_cannot_be_written_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: Path, earlier: Path
) -> None:
    for out, message in (
        (tmp_path, "is a directory; give a file name"),
        (tmp_path / "no" / "t.json", "does not exist"),
    ):
        code = fastlm(monkeypatch, "train-tokenizer", "--data", text_file, "--out", out)
        assert_refused(capsys, code, earlier, message)


def test_a_full_disk_is_one_line_and_leaves_the_earlier_file(text_file: Path, earlier: Path) -> None:
    """A limit on the size of files fails a write as a full disk does."""
    command = [sys.executable, "-m", "fastlm", "train-tokenizer", "-d", text_file, "-v", "600", "-o", earlier]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: File too large")
    assert len(result.stderr.splitlines()) == 1
    assert earlier.read_text() == "earlier"
    assert os.listdir(earlier.parent) == [earlier.name]


def open_when_read(pipe: Path, process: subprocess.Popen[str]) -> int:
    """Waits until the process reads `pipe`, and opens it for writing."""
    while process.poll() is None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.01)
    raise AssertionError(process.communicate()[1])


def test_ctrl_c_leaves_the_earlier_file(tmp_path: Path, earlier: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [sys.executable, "-m", "fastlm", "train-tokenizer", "-d", pipe, "-o", earlier],
        stderr=subprocess.PIPE,
        text=True,
    )
    writer = open_when_read(pipe, process)
    try:
        os.write(writer, b"some words\n" * 100)  # and no end of file
        for _ in range(60):  # a Ctrl-C that comes while a module is imported may be lost: a user presses again
            process.send_signal(signal.SIGINT)
            try:
                _, err = process.communicate(timeout=1)
                break
            except subprocess.TimeoutExpired:
                pass
    finally:
        os.close(writer)
        process.kill()
    assert process.returncode == 130
    assert err.strip() == "interrupted"
    assert earlier.read_text() == "earlier"
    assert os.listdir(earlier.parent) == [earlier.name]


def test_help_shows_an_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert fastlm(monkeypatch, "train-tokenizer", "--help") == 0
    assert "fastlm train-tokenizer --data" in " ".join(capsys.readouterr().out.split())
