"""Small language models that labs train on text within minutes, by the library's own `prepare` and `train`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastlm._files import write_atomic
from fastlm.labs.workbench import Workbench
from fastlm.model import load_model
from fastlm.model.checkpoint import AnyConfig, LanguageModel
from fastlm.tokenizer import Tokenizer
from fastlm.training import TokenDataset, TrainingConfig, TrainingResult, prepare, train


class Trained(NamedTuple):
    model: LanguageModel
    result: TrainingResult


def prepare_documents(
    lab: Workbench,
    name: str,
    documents: Sequence[str],
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
) -> TokenDataset:
    """Documents without line breaks as a prepared dataset; a tenth, by a hash of the text, is kept for validation."""
    directory = lab.run_directory(f"{name}-data")
    text = directory.with_suffix(".txt")
    write_atomic(text, "".join(document + "\n" for document in documents))
    return prepare([text], directory, tokenizer=tokenizer, vocab_size=vocab_size, by_line=True)


def train_model(
    lab: Workbench, name: str, model_config: AnyConfig, config: TrainingConfig, dataset: TokenDataset
) -> Trained:
    """The model that `train` leaves in the run directory `name`."""
    out = lab.run_directory(name)
    result = train(model_config, config, dataset, out, on_progress=lab.on_progress)
    return Trained(load_model(out).eval(), result)
