"""A run's directory: what it was asked to do (run.json), and whether a command may start, continue or replace it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from fastlm._files import write_atomic
from fastlm.errors import CheckpointError, ConfigError
from fastlm.model.checkpoint import AnyConfig
from fastlm.model.config import ModelConfig
from fastlm.model.rnn import RNNConfig
from fastlm.model.tensor_files import read_json_object
from fastlm.training.config import TrainingConfig
from fastlm.training.data import MixedDataset, TokenDataset

RUN_FILE = "run.json"
RESULT_FILE = "result.json"
OWN_FILES = (
    RUN_FILE, RESULT_FILE, "log.jsonl", "loss.png", "config.json", "model.safetensors", "tokenizer.json",
    "adapter_config.json", "adapter_model.safetensors", "labels.json",
)  # fmt: skip


class Description(Protocol):
    """What a run was asked to do, as JSON: groups of options by name, or single values."""

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class RunDescription:
    """Everything that decides the outcome of a run."""

    model: AnyConfig
    training: TrainingConfig
    data: str  # the prepared directory, or those of a mixture with os.pathsep between
    data_fingerprint: str
    weights: tuple[float, ...] = ()  # of the mixture

    @classmethod
    def of(cls, model: AnyConfig, training: TrainingConfig, dataset: TokenDataset | MixedDataset) -> RunDescription:
        datasets = dataset.datasets if isinstance(dataset, MixedDataset) else [dataset]
        data = os.pathsep.join(str(d.directory.resolve()) for d in datasets)
        weights = tuple(dataset.weights) if isinstance(dataset, MixedDataset) else ()
        return cls(model, training, data, dataset.fingerprint, weights)

    def to_dict(self) -> dict[str, Any]:
        kind = "transformer" if isinstance(self.model, ModelConfig) else "rnn"
        return {
            "architecture": kind,
            "model": asdict(self.model),
            "training": asdict(self.training),
            "data": self.data,
            "data_fingerprint": self.data_fingerprint,
            "weights": list(self.weights),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> RunDescription:
        config_type = ModelConfig if content["architecture"] == "transformer" else RNNConfig
        return cls(
            config_type(**content["model"]),
            TrainingConfig(**content["training"]),
            str(content["data"]),
            str(content["data_fingerprint"]),
            tuple(content.get("weights", ())),
        )


def read_run(out: Path) -> RunDescription | None:
    """What the training run in `out` was asked to do, or None when there is no run.

    Raises:
        CheckpointError: run.json is corrupt.
        ConfigError: the run is one of fine-tuning.
    """
    content = _read_description(out)
    if content is None:
        return None
    if "task" in content:
        raise ConfigError(f"{out} holds a run of fastlm finetune; give another --out")
    try:
        return RunDescription.from_dict(content)
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{out / RUN_FILE} is corrupt ({error}); use --overwrite to start again") from None


def _read_description(out: Path) -> dict[str, Any] | None:
    return read_json_object(out / RUN_FILE) if (out / RUN_FILE).exists() else None


def is_finished(out: Path) -> bool:
    return (out / RESULT_FILE).exists()


def begin_run(out: Path, description: Description) -> None:
    """Records a new run in `out`, or checks that the unfinished one there is the same.

    Raises:
        ConfigError: the directory holds a finished run, or one with other options; the message names the first.
        CheckpointError: run.json is corrupt.
    """
    existing = _read_description(out)
    wanted = json.loads(json.dumps(description.to_dict()))
    if existing is None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / RUN_FILE, json.dumps(wanted, indent=2, ensure_ascii=False) + "\n")
        return
    if is_finished(out):
        raise ConfigError(f"{out} holds a finished run; give another --out, or --overwrite to replace it")
    difference = first_difference(existing, wanted)
    if difference is not None:
        name, old, new = difference
        raise ConfigError(
            f"{out} holds an unfinished run with {name} {old}, and this command asks for {new}; "
            "give the same options to continue it, or --overwrite to replace it"
        )


def first_difference(left: dict[str, Any], right: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first option that differs, as (name, value on the left, on the right). A path is no option: the fingerprint
    beside it says whether it holds the same."""
    for name in sorted(left.keys() | right.keys(), key=lambda n: (n.endswith("fingerprint"), n)):
        a, b = left.get(name), right.get(name)
        if f"{name}_fingerprint" in left or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            return next((k, a.get(k), b.get(k)) for k in [*a, *b] if a.get(k) != b.get(k))
        what = name.removesuffix("_fingerprint")
        return (what, left.get(what), right.get(what)) if what != name else (name, a, b)
    return None


def delete_run(out: Path) -> None:
    """Removes what a run writes and nothing else; does nothing where no run is."""
    if not (out / RUN_FILE).exists():
        return
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    if (out / "data" / "manifest.json").exists():
        shutil.rmtree(out / "data", ignore_errors=True)
    for name in reversed(OWN_FILES):  # run.json last: until then, what is left is known as a run
        (out / name).unlink(missing_ok=True)
