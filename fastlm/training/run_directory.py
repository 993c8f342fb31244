"""A run's directory: what it was asked to do (run.json), and whether a command may start, continue or replace it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastlm._files import write_atomic
from fastlm.errors import CheckpointError, ConfigError
from fastlm.model.checkpoint import AnyConfig
from fastlm.model.config import ModelConfig
from fastlm.model.rnn import RNNConfig
from fastlm.model.tensor_files import read_json_object
from fastlm.training.config import TrainingConfig

RUN_FILE = "run.json"
RESULT_FILE = "result.json"
OWN_FILES = (RUN_FILE, RESULT_FILE, "log.jsonl", "loss.png", "config.json", "model.safetensors", "tokenizer.json")


@dataclass(frozen=True)
class RunDescription:
    """Everything that decides the outcome of a run."""

    model: AnyConfig
    training: TrainingConfig
    data: str  # the prepared directory
    data_fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        kind = "transformer" if isinstance(self.model, ModelConfig) else "rnn"
        return {
            "architecture": kind,
            "model": asdict(self.model),
            "training": asdict(self.training),
            "data": self.data,
            "data_fingerprint": self.data_fingerprint,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> RunDescription:
        config_type = ModelConfig if content["architecture"] == "transformer" else RNNConfig
        return cls(
            config_type(**content["model"]),
            TrainingConfig(**content["training"]),
            str(content["data"]),
            str(content["data_fingerprint"]),
        )


def read_run(out: Path) -> RunDescription | None:
    """What the run in `out` was asked to do, or None when there is no run. Raises CheckpointError when corrupt."""
    if not (out / RUN_FILE).exists():
        return None
    try:
        return RunDescription.from_dict(read_json_object(out / RUN_FILE))
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{out / RUN_FILE} is corrupt ({error}); use --overwrite to start again") from None


def is_finished(out: Path) -> bool:
    return (out / RESULT_FILE).exists()


def begin_run(out: Path, description: RunDescription) -> None:
    """Records a new run in `out`, or checks that the unfinished one there is the same.

    Raises:
        ConfigError: the directory holds a finished run, or one with other options; the message names the first.
    """
    existing = read_run(out)
    if existing is None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / RUN_FILE, json.dumps(description.to_dict(), indent=2, ensure_ascii=False) + "\n")
        return
    if is_finished(out):
        raise ConfigError(f"{out} holds a finished run; give another --out, or --overwrite to replace it")
    difference = first_difference(existing, description)
    if difference is not None:
        name, old, new = difference
        raise ConfigError(
            f"{out} holds an unfinished run with {name} {old}, and this command asks for {new}; "
            "give the same options to continue it, or --overwrite to replace it"
        )


def first_difference(a: RunDescription, b: RunDescription) -> tuple[str, Any, Any] | None:
    """The first option that differs, as (name, value in a, value in b). Where the data lies is no option."""
    left, right = a.to_dict(), b.to_dict()
    if left["architecture"] != right["architecture"]:
        return "architecture", left["architecture"], right["architecture"]
    for part in ("model", "training"):
        for name, value in left[part].items():
            if value != right[part].get(name):
                return name, value, right[part].get(name)
    if left["data_fingerprint"] != right["data_fingerprint"]:
        return "data", left["data"], right["data"]
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
