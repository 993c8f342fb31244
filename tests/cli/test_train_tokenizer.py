from __future__ import annotations

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import tokenizers

from fastlm.cli.app import run
from fastlm.tokenizer.tokenizer import Tokenizer
from tests.cli.interrupts import heed_interrupts

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
        ("text.txt", ("--memory", "much"), "--memory 'much' is no size; give one such as 1GB"),
        ("text.txt", ("--memory", "1MB"), "memory is 1,000,000 bytes; training takes at least"),
        ("text.txt", ("--field", "text"), "text.txt, line 1: not JSON"),
        ("word.txt", (), "word.txt, from offset 0: a word is longer than 16 MiB; put line ends"),
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
    (tmp_path / "word.txt").write_bytes(b"a" * ((16 << 20) + 1))
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


def test_standard_input_gives_what_a_file_gives(text_file: Path, tmp_path: Path) -> None:
    outs = [tmp_path / "a.json", tmp_path / "b.json"]
    for data, out in (("-", outs[0]), (str(text_file), outs[1])):
        command = [sys.executable, "-m", "fastlm", "train-tokenizer", "-d", data, "-v", "500", "-o", str(out)]
        result = subprocess.run(command, stdin=text_file.open(), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_compressed_json_lines_are_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, earlier: Path
) -> None:
    texts = [*list(topics.values())[:30], KOREAN * 20]
    path = tmp_path / "texts.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps({"body": text}) for text in texts).encode()))
    options = ("--field", "body", "--memory", "1GB", "-v", "400", "-o", earlier, "--json")
    assert fastlm(monkeypatch, "train-tokenizer", "-d", path, *options) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bytes_read"] == sum(len(text.encode()) for text in texts)
    assert result["forgotten_words"] == 0
    assert result["bytes_per_token"] > 1
    assert fastlm(monkeypatch, "train-tokenizer", "-d", path, "-o", earlier) == 1
    assert "--field text" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("unit", "message"), [("a", "a word is longer than 16 MiB"), ("나는 학교에 갔다. ", None)])
def test_a_line_of_a_gigabyte_trains_or_is_refused(
    unit: str,
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    earlier: Path,
) -> None:
    path = tmp_path / "line.txt"
    part = (unit * 1_000_000).encode()
    with path.open("wb") as file:
        while file.tell() < 1_000_000_000:
            file.write(part)
    code = fastlm(monkeypatch, "train-tokenizer", "-d", path, "-v", "300", "-o", earlier)
    if message:
        assert_refused(capsys, code, earlier, message)
    else:
        assert code == 0
        assert Tokenizer.from_file(earlier).encode(" 학교에") != []


@pytest.mark.slow
def test_two_gigabytes_stay_under_one_of_memory(tmp_path: Path) -> None:
    """Distinct words without end, which would need several GB of counts. Of letters: a number is cut every 3 digits."""
    path = tmp_path / "large.txt"
    letters = bytes.maketrans(b"0123456789", b"abcdefghij")
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        while file.tell() < 2_000_000_000:
            words = rng.zipf(1.1, 2_000_000) % 10**12
            file.write(b"w" + "\nw".join(map(str, words.tolist())).encode().translate(letters) + b"\n")
    command = [sys.executable, "-m", "fastlm", "train-tokenizer", "-d", path, "--memory", "1GB", "-v", "8000"]
    process = subprocess.Popen([*command, "-o", tmp_path / "t.json", "--json"], stdout=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert usage.ru_maxrss * 1024 < 1_000_000_000
    assert process.stdout is not None
    assert json.loads(process.stdout.read())["forgotten_words"] > 0


def open_when_read(pipe: Path, process: subprocess.Popen[str]) -> int:
    """Waits until the process reads `pipe`, and opens it for writing."""
    while process.poll() is None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.01)
    raise AssertionError(process.communicate()[1])


def run_until_interrupted(command: list[str | Path], pipe: Path, interrupt: Callable[[int], None]) -> None:
    """Asserts that `command`, which reads `pipe`, ends as interrupted when `interrupt` gets its process's number."""
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [sys.executable, *command],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    writer = open_when_read(pipe, process)
    try:
        os.write(writer, b"some words\n" * 100)  # and no end of file
        interrupt(process.pid)
        _, err = process.communicate(timeout=60)
    finally:
        os.close(writer)
        process.kill()
    assert process.returncode == 130
    assert err.strip() == "interrupted"


def test_ctrl_c_leaves_the_earlier_file(tmp_path: Path, earlier: Path) -> None:
    pipe = tmp_path / "pipe"
    command = ["-m", "fastlm", "train-tokenizer", "-d", pipe, "-o", earlier]
    run_until_interrupted(command, pipe, lambda pid: os.kill(pid, signal.SIGINT))
    assert earlier.read_text() == "earlier"
    assert os.listdir(earlier.parent) == [earlier.name]


def test_ctrl_c_that_the_system_hands_to_another_thread_ends_a_read(tmp_path: Path, earlier: Path) -> None:
    """As it may do with a process that was stopped when the signal came. The reading thread's wait then goes on."""
    pipe = tmp_path / "pipe"
    script = """
import signal, sys, threading
from fastlm.cli.app import run
def interrupt():
    signal.sigwait([signal.SIGUSR1])
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
threading.Thread(target=interrupt, daemon=True).start()
run()
"""

    def interrupt(pid: int) -> None:
        time.sleep(0.2)  # by when it reads, and waits for more
        os.kill(pid, signal.SIGUSR1)

    run_until_interrupted(["-c", script, "train-tokenizer", "-d", pipe, "-o", earlier], pipe, interrupt)
    assert earlier.read_text() == "earlier"


def test_help_shows_an_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert fastlm(monkeypatch, "train-tokenizer", "--help") == 0
    assert "fastlm train-tokenizer --data" in " ".join(capsys.readouterr().out.split())
