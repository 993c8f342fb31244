from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from fastlm.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "README.ko.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*/**/*.md"))

ENGLISH = [page for page in PAGES if page == "README.md" or page.startswith("docs/en/")]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in ENGLISH if blocks(page, "python")])
def test_python_of_the_page_runs_top_to_bottom(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks(page, "python")), page, "exec"), {"__name__": "page"})


def test_commands_of_every_page_exist_with_their_options() -> None:
    commands = get_command(app).commands
    checked = 0
    for page in PAGES:
        lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
        for part in [part.strip() for line in lines for part in line.split("&&")]:
            words = shlex.split(part, comments=True)
            if words[:1] != ["fastlm"]:
                continue
            assert words[1] in commands, f"{page}: {part}"
            known = {name for parameter in commands[words[1]].params for name in parameter.opts} | {"--help"}
            for word in words[2:]:
                assert not word.startswith("-") or word == "-" or word in known, f"{page}: {part}: no option {word}"
            checked += 1
    assert checked > 10


def test_every_page_exists_in_both_languages_with_the_same_code() -> None:
    def code(page: str) -> list[str]:
        return [re.sub(r" *#.*", "", block) for kind in ("sh", "python") for block in blocks(page, kind)]

    def pages(language: str) -> set[str]:
        directory = ROOT / "docs" / language
        return {str(path.relative_to(directory)) for path in directory.glob("**/*.md")}

    english = pages("en")
    assert english == pages("ko")
    pairs = [("README.md", "README.ko.md"), *((f"docs/en/{name}", f"docs/ko/{name}") for name in sorted(english))]
    for in_english, in_korean in pairs:
        assert code(in_english) == code(in_korean), in_korean


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", read(page)):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"
