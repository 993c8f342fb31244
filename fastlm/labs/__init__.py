"""The ideas behind language models, each an experiment that can fail: `fastlm lab <idea>`.

A lab is a file here with a function `run(lab)`. It is made of the library's own parts, so that reading it shows how
they are used; what it found goes into the `Workbench` it is given.
"""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastlm.errors import ConfigError

if TYPE_CHECKING:
    from fastlm.labs.result import LabResult
    from fastlm.labs.workbench import Workbench


@dataclass(frozen=True)
class Idea:
    name: str
    korean: str
    english: str

    @property
    def module(self) -> str:
        return f"fastlm.labs.{self.name.replace('-', '_')}"


IDEAS = (
    Idea("tokens", "글자에서 문단까지, 글을 자르는 크기와 한국어의 값", "text cut at every size; what Korean costs"),
    Idea("attention", "층과 머리마다 어디를 보는가", "where each head of each layer looks"),
    Idea("rnn", "순환 신경망과 트랜스포머: 기억과 속도", "recurrent networks against a transformer: memory and speed"),
    Idea("next-token", "다음 토큰 맞히기: 확률이 배우면서 바뀐다", "guessing the next token, as learning goes on"),
    Idea("transfer", "미리 배운 모델을 고쳐 쓰기", "a foundation model, fine-tuned, against starting from nothing"),
    Idea("tasks", "쓰기, 분류, 번역, 질문에 답하기", "generation, classification, translation, answering questions"),
    Idea("in-context", "보기 몇 개로 배우기", "learning from examples in the prompt"),
    Idea("emergence", "커지면 갑자기 되는가, 재는 법 탓인가", "sudden abilities over scale, or the metric's doing"),
    Idea("hallucination", "모르는 것을 자신 있게 말하기", "confident answers about what was never learned"),
    Idea("bias", "데이터가 기울면 모델이 기운다", "skewed data, skewed model"),
    Idea("temperature", "온도: 뾰족한 확률과 평평한 확률", "sharp and flat distributions"),
)


def find_idea(name: str) -> Idea:
    """Raises ConfigError, which names the ideas there are."""
    for idea in IDEAS:
        if idea.name == name:
            return idea
    raise ConfigError(f"there is no lab {name!r}; choose one of {', '.join(idea.name for idea in IDEAS)}, or all")


def run_lab(idea: Idea, lab: Workbench) -> LabResult:
    """Runs one lab on the workbench and writes its pictures and its JSON file to the workbench's directory."""
    lab.begin(idea)
    started = time.monotonic()
    importlib.import_module(idea.module).run(lab)
    return lab.finish(time.monotonic() - started)
