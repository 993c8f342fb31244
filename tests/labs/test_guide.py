"""The commands of the guide to the ideas, run as they stand there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from fastlm.labs import IDEAS
from fastlm.labs.result import LabResult
from tests.test_docs import ROOT, blocks, read
from tests.tokenizer.vocabularies import tiktoken_files

PAGES = sorted((ROOT / "docs" / "ko" / "ideas").glob("[a-z]*.md"))
Results = Callable[[str], tuple[LabResult, Path]]


def commands(page: Path) -> list[str]:
    lines = "".join(blocks(str(page.relative_to(ROOT)), "sh")).splitlines()
    return [line for line in lines if re.match(r"fastlm lab [a-z]", line)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, shared_data: Path | None) -> Results:
    """The result of a command, which is run once however many pages have it."""
    if shared_data is None:
        pytest.skip("there are no data beside the checkout")
    directory = tmp_path_factory.mktemp("guide")

    @cache
    def result(command: str) -> tuple[LabResult, Path]:
        words = [sys.executable, "-m", *shlex.split(command)]
        environment = {**os.environ, "FASTLM_DATA": str(shared_data), "TIKTOKEN_CACHE_DIR": str(tiktoken_files())}
        done = subprocess.run(words, cwd=directory, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        out = directory / "labs"
        return LabResult.from_json(json.loads((out / f"{shlex.split(command)[2]}.json").read_text("utf-8"))), out

    return result


def test_the_guide_has_every_lab() -> None:
    assert {command.split()[2] for page in PAGES for command in commands(page)} == {idea.name for idea in IDEAS}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_the_page_draw_its_pictures(page: Path, results: Results, gemma: str) -> None:
    drawn = set()
    for command in commands(page):
        result, out = results(command)
        assert not result.missing
        assert result.findings
        drawn |= {picture.file for picture in result.pictures if (out / picture.file).is_file()}
    shown = set(re.findall(r"\]\([^)]*images/labs/([^)]+)\)", read(str(page.relative_to(ROOT)))))
    assert shown
    assert shown <= drawn
