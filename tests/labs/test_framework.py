from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import fastlm.labs
from fastlm.cli.app import app
from fastlm.errors import ConfigError, DataError
from fastlm.labs import IDEAS, find_idea
from fastlm.labs import pictures as pictures_module
from fastlm.labs.pictures import drawable, korean_font
from fastlm.labs.report import write_report
from fastlm.labs.workbench import MissingError, Workbench

ROOT = Path(__file__).resolve().parents[2]


def small_lab(lab: Workbench) -> None:
    with lab.part("없는 데이터", "missing data"):
        lab.data("no/such.tsv")
    with lab.part("한 부분", "one part"):
        lab.table("<수>", ["이름", "값"], [["가", 1.234], ["나", None]])
        with lab.picture("line", lab.say("그림", "a picture")) as axes:
            axes[0, 0].plot([1, 2], label=lab.label("한글", "English"))
            axes[0, 0].legend()
        lab.finding("1 < 2", 1 < 2, "It is.")
        lab.finding("2 < 1", 2 < 1, "It is not.")
        lab.number("answer", 42)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every lab is `small_lab`."""

    def importing(name: str) -> Any:
        assert name.startswith("fastlm.labs.")
        return SimpleNamespace(run=small_lab)

    monkeypatch.setattr(fastlm.labs, "importlib", SimpleNamespace(import_module=importing))


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["lab", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


def test_without_a_name_the_ideas_are_listed_one_a_line() -> None:
    lines = run("--lang", "en").splitlines()
    assert [line.split()[0] for line in lines] == [*(idea.name for idea in IDEAS), "all"]
    assert len(json.loads(run("--json"))["labs"]) == 11


def test_every_lab_is_a_file_of_less_than_250_lines() -> None:
    for idea in IDEAS:
        path = ROOT / "fastlm" / "labs" / f"{idea.name.replace('-', '_')}.py"
        assert 20 < len(path.read_text(encoding="utf-8").splitlines()) < 250, path


def test_a_result_says_what_held_what_did_not_and_what_is_missing(stand_in: None, tmp_path: Path) -> None:
    said = run("tokens", "--out", tmp_path, "--lang", "en", "--data", tmp_path / "none")
    assert "tokens text cut at every size; what Korean costs" in said
    assert "✓ 1 < 2 — holds" in said
    assert "✗ 2 < 1 — does not hold" in said
    assert "left out: missing data: there is no" in said.replace("\n", " ")
    content = json.loads((tmp_path / "tokens.json").read_text(encoding="utf-8"))
    assert content["numbers"] == {"answer": 42}
    assert [finding["holds"] for finding in content["findings"]] == [True, False]
    assert (tmp_path / "tokens-line.png").read_bytes().startswith(b"\x89PNG")


def test_all_makes_one_file_that_needs_no_other(stand_in: None, tmp_path: Path) -> None:
    run("all", "--out", tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 11
    targets = re.findall(r"(?:src|href)=['\"]?([^'\"\s>]*)", html)
    assert len(targets) >= 22
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert "&lt;수&gt;" in html
    assert "lang=ko" in html


def test_all_goes_on_where_it_was_interrupted(stand_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def noting(lab: Workbench) -> None:
        done.append(lab.result.idea)
        with lab.picture("line", "x"):
            pass

    monkeypatch.setattr(fastlm.labs.importlib, "import_module", lambda name: SimpleNamespace(run=noting))
    run("all", "--out", tmp_path)
    assert len(done) == 11
    (tmp_path / "rnn.json").write_text("{ cut off", encoding="utf-8")
    (tmp_path / "bias-line.png").unlink()
    done.clear()
    run("all", "--out", tmp_path)
    assert done == ["rnn", "bias"]
    done.clear()
    run("all", "--out", tmp_path, "--seed", 1)
    assert len(done) == 11


def test_one_lab_that_fails_does_not_stop_the_others(
    stand_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(lab: Workbench) -> None:
        if lab.result.idea == "rnn":
            raise DataError("reviews.txt is damaged")
        lab.finding("a", True, "b")

    monkeypatch.setattr(fastlm.labs.importlib, "import_module", lambda name: SimpleNamespace(run=failing))
    content = json.loads(run("all", "--out", tmp_path, "--json", code=1))
    assert content["failed"] == ["rnn: reviews.txt is damaged"]
    assert len(content["labs"]) == 10


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no lab 'memory'.*tokens, attention, rnn"):
        find_idea("memory")


def test_a_missing_model_package_and_file_are_named_with_what_mends_it(lab: Workbench, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"github.com/e9t/nsmc.*--data"):
        Workbench(tmp_path, lang="en", data=tmp_path).data("nsmc/train.tsv")
    with pytest.raises(MissingError, match="pip install no-such"):
        lab.package("no_such_package", "no-such")
    with pytest.raises(MissingError, match="there is no no-such-model"):
        Workbench(tmp_path, model="no-such-model").llm()


def test_without_a_korean_font_hangul_is_romanised_and_the_reader_is_told(
    lab: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures_module, "korean_font", lambda: None)
    monkeypatch.setattr("fastlm.labs.workbench.korean_font", lambda: None)
    assert drawable("한글 abc") == "hangeul abc"  # the names that Unicode gives the syllables
    lab.begin(IDEAS[0])
    small_lab(lab)
    result = lab.finish(0.0)
    assert any("fonts-nanum" in note for note in result.notes)


@pytest.mark.skipif(korean_font() is None, reason="no font here has Hangul (apt install fonts-nanum)")
def test_korean_in_a_picture_is_drawn_without_a_missing_glyph(lab: Workbench, recwarn: pytest.WarningsRecorder) -> None:
    lab.begin(IDEAS[0])
    with lab.picture("korean", "x") as axes:
        axes[0, 0].set_title(drawable("가나다 힣 −1"))
    assert not [w for w in recwarn if "missing from" in str(w.message)]


def test_the_report_of_nothing_is_still_a_page(tmp_path: Path) -> None:
    write_report([], tmp_path, tmp_path / "report.html")
    assert "<table>" in (tmp_path / "report.html").read_text(encoding="utf-8")
