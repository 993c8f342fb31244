"""A small Korean language model that has read film reviews: what the labs fine-tune and let write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fastlm.labs.small_models import prepare_documents, train_model
from fastlm.labs.workbench import Workbench
from fastlm.training import PRESETS, TokenDataset, TrainingConfig, TrainingResult, transformer_config
from fastlm.training.config import fast_dtype

REVIEWS = 60_000
VOCAB_SIZE = 4096
STEPS = 400
CONTEXT = 128


class KoreanBase(NamedTuple):
    directory: Path
    dataset: TokenDataset
    result: TrainingResult


def korean_base(lab: Workbench) -> KoreanBase:
    """Made once for all labs that ask. Raises MissingError without the reviews."""
    return lab.once("korean base", lambda: _make(lab))


def _make(lab: Workbench) -> KoreanBase:
    lines = lab.data("nsmc/reviews.txt").read_text(encoding="utf-8").splitlines()[: lab.size(REVIEWS, 4 * REVIEWS)]
    dataset = prepare_documents(lab, "korean-base", lines, vocab_size=VOCAB_SIZE)
    preset = replace(PRESETS["tiny"], context_length=CONTEXT)
    config = TrainingConfig(
        steps=lab.size(STEPS, 5 * STEPS), batch_size=16, dtype=fast_dtype(), seed=lab.seed, evaluations=1
    )
    trained = train_model(lab, "korean-base", transformer_config(dataset.tokenizer.vocab_size, preset), config, dataset)
    return KoreanBase(lab.out / "runs" / "korean-base", dataset, trained.result)
