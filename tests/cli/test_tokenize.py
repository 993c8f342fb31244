from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers

from fastlm.tokenizer.trainer import BpeTrainer
from tests.cli.test_train_tokenizer import fastlm

KOREAN = "나는 학교에 갔다. 너도 학교에 갔니?"


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    BpeTrainer(400).train_from_iterator([KOREAN * 20, "the cat sat on the mat " * 20]).save(path)
    return path


def test_ids_are_those_of_the_tokenizer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer_file: Path
) -> None:
    assert fastlm(monkeypatch, "tokenize", KOREAN, "--tokenizer", tokenizer_file, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    expected = tokenizers.Tokenizer.from_file(str(tokenizer_file)).encode(KOREAN).ids
    assert result["granularities"]["subword"]["ids"] == expected
    assert result["granularities"]["subword"]["count"] == len(expected)
    assert "".join(result["granularities"]["subword"]["units"]) == KOREAN
    assert result["bytes"] == len(KOREAN.encode())


def test_all_granularities_of_korean(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer_file: Path
) -> None:
    code = fastlm(monkeypatch, "tokenize", KOREAN, "-t", tokenizer_file, "-g", "all", "--ids")
    assert code == 0
    out = capsys.readouterr().out
    for name in ("character", "word", "subword", "morpheme", "sentence", "paragraph"):
        assert f"\n{name}  " in f"\n{out}"
    assert "나|는|학교|에|가|었" in out
    assert "나는 학교에 갔다.|너도 학교에 갔니?" in out


def test_tsv_has_a_line_for_each_piece(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer_file: Path
) -> None:
    assert fastlm(monkeypatch, "tokenize", "나는\t갔다.\n", "--by", "morpheme", "--tsv") == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["morpheme", "0", "1", "NP", "나"]
    assert fastlm(monkeypatch, "tokenize", "a\t\\n\n", "--by", "code-point", "--tsv") == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[4] for line in lines] == ["a", "\\t", "\\\\", "n", "\\n"]
    assert fastlm(monkeypatch, "tokenize", KOREAN, "-t", tokenizer_file, "--tsv") == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    expected = tokenizers.Tokenizer.from_file(str(tokenizer_file)).encode(KOREAN)
    assert [int(line[3]) for line in lines] == expected.ids
    assert fastlm(monkeypatch, "tokenize", "a", "--tsv", "--json") == 2


def test_json_has_places_and_parts_of_speech(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fastlm(monkeypatch, "tokenize", KOREAN, "--by", "morpheme", "--json") == 0
    found = json.loads(capsys.readouterr().out)["granularities"]["morpheme"]
    assert found["offsets"][:3] == [[0, 1], [1, 2], [3, 5]]
    assert found["tags"][:3] == ["NP", "JX", "NNG"]
    assert "ids" not in found


def test_morphemes_of_english_are_left_out_of_all_and_refused_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer_file: Path
) -> None:
    assert fastlm(monkeypatch, "tokenize", "the cat", "-t", tokenizer_file, "-g", "all", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert "morpheme" not in result["granularities"]
    assert "Korean text only" in result["unavailable"]["morpheme"]
    assert fastlm(monkeypatch, "tokenize", "the cat", "-g", "morpheme") == 1
    assert capsys.readouterr().err.startswith("error: morphemes are found in Korean text only")


def test_without_a_tokenizer_one_is_trained_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fastlm(monkeypatch, "tokenize", "the class statement") == 0
    output = capsys.readouterr()
    assert "the| class| statement" in output.out
    assert "no --tokenizer given" in output.err
    assert fastlm(monkeypatch, "tokenize", "한국어 문장입니다. 옛 뜻을 읽었다. Next one.") == 0
    out = capsys.readouterr().out
    assert "한국어| 문장|입|니다|." in out
    assert "\\x" not in out


def test_file_and_standard_input_are_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(f"{KOREAN}\n\nHello.", "utf-8")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(path.read_bytes())))
    results = []
    for arguments in (("--file", path), ()):
        assert fastlm(monkeypatch, "tokenize", *arguments, "-g", "paragraph", "--json") == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1]
    assert results[0]["granularities"]["paragraph"]["units"] == [KOREAN, "Hello."]


def test_half_characters_are_shown_as_bytes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer_file: Path
) -> None:
    assert fastlm(monkeypatch, "tokenize", "뷁", "-t", tokenizer_file) == 0
    assert r"\xeb|\xb7|\x81" in capsys.readouterr().out


def test_markup_in_the_text_is_printed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fastlm(monkeypatch, "tokenize", "[bold]x[/bold] [/]", "-g", "sentence") == 0
    assert "[bold]x[/bold] [/]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "TEXT is empty"),
        (("--file", "empty.txt"), "empty.txt is empty"),
        (("--file", "large.txt"), "large.txt: more than 8 MiB, too much to show; cut it first"),
        (("--file", "."), "is a directory; give a text file"),
        (("--file", "absent.txt"), "absent.txt: No such file or directory"),
        (("--file", "latin.txt"), "latin.txt: not UTF-8: byte 0xe9 at offset 3"),
        (("a", "--tokenizer", "absent.json"), "absent.json"),
        (("a", "--tokenizer", "broken.json"), "broken.json: no valid JSON"),
        (("a", "--tokenizer", "other.json"), "other.json: has no model"),
        (("a", "--tokenizer", "no-such-name"), "no-such-name"),
        (("a\udcff", "-g", "word"), "TEXT is not valid UTF-8"),
    ],
)
def test_bad_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "large.txt").write_bytes(b"a" * ((8 << 20) + 1))
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "broken.json").write_text('{"model": {"type": "BPE", "vocab": {"a"')
    (tmp_path / "other.json").write_text('{"hidden_size": 64}')
    monkeypatch.chdir(tmp_path)
    code = fastlm(monkeypatch, "tokenize", *arguments)
    output = capsys.readouterr()
    assert code == 1
    assert output.out == ""
    assert len(output.err.splitlines()) == 1, output.err
    assert output.err.startswith("error: ")
    assert message in output.err


def test_wrong_usage_exits_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert fastlm(monkeypatch, "tokenize", "a", "--file", "b") == 2
    assert fastlm(monkeypatch, "tokenize", "a", "--granularity", "syllable") == 2
    assert "Traceback" not in capsys.readouterr().err
