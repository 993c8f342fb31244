"""What every lab works with: the reader's language, data, the model, training, and a place for what it found."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fastlm._files import write_atomic
from fastlm._version import __version__
from fastlm.errors import CheckpointError, DataError, FastlmError
from fastlm.labs.pictures import HOW_TO_GET_A_FONT, drawable, drawing, korean_font
from fastlm.labs.result import Cell, Finding, LabResult, Picture, Table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastlm.inference import LLM
    from fastlm.labs import Idea
    from fastlm.training import Progress

Language = Literal["ko", "en"]
Value = TypeVar("Value")

SOURCES = {
    "nsmc": "https://github.com/e9t/nsmc",
    "ko-en": "https://github.com/jungyeul/korean-parallel-corpora",
    "crows_pairs.csv": "https://github.com/nyu-mll/crows-pairs",
    "kobbq_samples.tsv": "https://github.com/naver-ai/KoBBQ",
}


class MissingError(FastlmError):
    """A model, data file or package that a part of a lab needs is not here; the message holds the command that mends
    it."""


class Workbench:
    """Runs labs one after another and keeps what the one that runs has found.

    Args:
        out: directory for pictures, JSON and the runs of small models.
        lang: language of everything that is said.
        model: what `LLM` takes; loaded when a lab first asks for it, and kept.
        full: larger models, more examples, more seeds.
        data: directory of the data sets; by default $FASTLM_DATA, else `data` here.
        seed: the first of the seeds.
        on_status: told what is being done, in a few words, and how far that is (0 to 1) where it is known.
    """

    def __init__(
        self,
        out: Path,
        *,
        lang: Language = "ko",
        model: str = "gemma3-270m",
        full: bool = False,
        data: Path | None = None,
        seed: int = 0,
        on_status: Callable[[str, float | None], None] = lambda text, fraction: None,
    ) -> None:
        self.out = out
        self.lang = lang
        self.model_name = model
        self.full = full
        self.data_directory = data or Path(os.environ.get("FASTLM_DATA") or "data")
        self.seed = seed
        self.status = on_status
        self._llm: LLM | None = None
        self._made: dict[str, Any] = {}
        self._doing = ""

    @property
    def settings(self) -> dict[str, Any]:
        """What, with the machine, decides the numbers."""
        data = str(self.data_directory)
        return {"version": __version__, "lang": self.lang, "model": self.model_name, "full": self.full} | {
            "data": data,
            "seed": self.seed,
        }

    def begin(self, idea: Idea) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.result = LabResult(idea.name, self.say(idea.korean, idea.english), self.settings)

    def finish(self, seconds: float) -> LabResult:
        """The result, which also lies in `<idea>.json` then."""
        self.result.seconds = round(seconds, 1)
        if self.result.pictures and korean_font() is None:
            self.result.notes.append(
                self.say(
                    f"한글 글꼴이 없어 그림 속 한글을 로마자로 적었습니다: {HOW_TO_GET_A_FONT}",
                    f"No font here has Hangul, so pictures show it romanised: {HOW_TO_GET_A_FONT}",
                )
            )
        content = json.dumps(self.result.to_json(), ensure_ascii=False, indent=1)
        write_atomic(self.out / f"{self.result.idea}.json", content + "\n")
        return self.result

    def say(self, korean: str, english: str) -> str:
        """The one in the reader's language."""
        return korean if self.lang == "ko" else english

    def label(self, korean: str, english: str) -> str:
        """`say`, for a picture."""
        return drawable(self.say(korean, english))

    def size(self, usual: Value, full: Value) -> Value:
        """The second with --full. What is used goes into the result's numbers by the lab."""
        return full if self.full else usual

    def seeds(self, usual: int = 3, full: int = 5) -> list[int]:
        return [self.seed + i for i in range(self.size(usual, full))]

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        self.result.tables.append(Table(title, list(columns), [list(row) for row in rows]))

    def finding(self, claim: str, holds: bool, statement: str) -> None:
        """`claim` could have come out false; `statement` says what the numbers say, either way."""
        self.result.findings.append(Finding(claim, bool(holds), statement))

    def note(self, text: str) -> None:
        """What to see, or what a reader should know to judge the numbers."""
        self.result.notes.append(text)

    def number(self, name: str, value: Any) -> None:
        """Goes into the JSON file under `numbers`."""
        self.result.numbers[name] = value

    @contextmanager
    def picture(
        self, name: str, title: str, *, rows: int = 1, columns: int = 1, width: float = 7.0, height: float = 3.5
    ) -> Iterator[NDArray]:
        """Yields the `(rows, columns)` array of axes of `<idea>-<name>.png`."""
        file = f"{self.result.idea}-{name}.png"
        with drawing(self.out / file, rows=rows, columns=columns, width=width, height=height) as axes:
            yield axes
        self.result.pictures.append(Picture(file, title))

    @contextmanager
    def part(self, korean: str, english: str) -> Iterator[None]:
        """One part of a lab: its name is shown while it runs, and it is left out, with a line that says why, when what
        it needs is not here."""
        self._doing = self.say(korean, english)
        self.status(self._doing, None)
        try:
            yield
        except MissingError as error:
            self.result.missing.append(f"{self._doing}: {error}")

    def done(self, fraction: float) -> None:
        """How far the part is."""
        self.status(self._doing, fraction)

    def on_progress(self, now: Progress) -> None:
        """For `train` and `finetune`."""
        self.status(f"{self._doing} · loss {now.loss:.2f}", now.fraction)

    def once(self, name: str, make: Callable[[], Value]) -> Value:
        """What `make` gives, made once for all labs of this workbench."""
        if name not in self._made:
            self._made[name] = make()
        made: Value = self._made[name]
        return made

    def run_directory(self, name: str) -> Path:
        """An empty directory for a run or prepared data, under `runs`."""
        directory = self.out / "runs" / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.parent.mkdir(parents=True, exist_ok=True)
        return directory

    def data(self, name: str) -> Path:
        """A file of the data sets, such as "nsmc/train.tsv". Raises MissingError, with where it can be had."""
        path = self.data_directory / name
        if not path.is_file():
            source = SOURCES.get(name.split("/")[0], "")
            raise MissingError(
                self.say(
                    f"{path} 파일이 없습니다. {source}에서 받아 그 자리에 두거나 --data로 폴더를 알려 주십시오",
                    f"there is no {path}; get it from {source}, or name its directory with --data",
                )
            )
        return path

    def rows(self, name: str) -> list[dict[str, str]]:
        """The rows of a TSV file (no quoting) or CSV file (quoted), by column name. Raises MissingError, DataError."""
        path = self.data(name)
        try:
            with path.open(encoding="utf-8", newline="") as file:
                if path.suffix == ".csv":
                    return list(csv.DictReader(file))
                return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path} is damaged: {error}") from None

    def package(self, name: str, install: str) -> Any:
        """An optional package. Raises MissingError with the command that installs it."""
        import importlib

        try:
            return importlib.import_module(name)
        except ImportError:
            raise MissingError(f"pip install {install}") from None

    def llm(self) -> LLM:
        """The model of --model. Raises MissingError where its packages are not installed."""
        if self._llm is None:
            from fastlm.inference import LLM

            try:
                self._llm = LLM(self.model_name)
            except CheckpointError as error:
                raise MissingError(str(error)) from None
        return self._llm

    def close(self) -> None:
        if self._llm is not None:
            self._llm.close()
