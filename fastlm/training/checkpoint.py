"""Training checkpoints: everything that the next step depends on, in a directory that appears whole or not at all.

    <run>/checkpoints/step-00000900/
        config.json, model.safetensors, tokenizer.json      a model directory by itself (of an adapter: its files)
        optimizer.safetensors                               optimizer state and torch's random state
        state.json                                          step and counters; sizes and SHA-256 of the files above

The last two are kept. <run>/checkpoints/best is the model with the best partial evaluation; where more are to be kept,
<run>/checkpoints/best-00000900 are those of the best ones, by their step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from fastlm._files import write_atomic
from fastlm.errors import CheckpointError
from fastlm.model.tensor_files import read_json_object, read_tensors, write_tensors
from fastlm.training.data import sha256_file
from fastlm.training.model_files import ModelFiles
from fastlm.training.optimizer import Optimizer

KEPT = 2
RANDOM_STATE = "torch_random_state"


@dataclass
class TrainingState:
    """What training knows beside weights and optimizer state. The next batch to read is that of `step`."""

    step: int = 0  # steps done
    total_steps: int | None = None  # None until a run limited by time has fixed it
    seconds: float = 0.0  # spent in the loop, over all interruptions
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    evaluations: int = 0
    best_score: float | None = None  # the lowest `Score.value`
    evaluations_since_best: int = 0
    stopped_early: bool = False
    best: list[tuple[float, int]] = field(default_factory=list)  # (score, step) of the evaluations kept, best first

    def is_among_best(self, score: float, count: int) -> bool:
        """Notes the evaluation of this step; whether it is one of the `count` best so far. Of equals the first stay."""
        ranked = sorted([*((s, step) for s, step in self.best if step != self.step), (score, self.step)])[:count]
        self.best = ranked
        return (score, self.step) in ranked


def checkpoint_directories(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def save_checkpoint(
    run: Path, files: ModelFiles, optimizer_state: dict[str, torch.Tensor], state: TrainingState
) -> Path:
    """Writes a checkpoint, then makes the run's own model the same files, then drops all but the last two.

    Raises:
        CheckpointError: it could not be written, for example because the disk is full; earlier ones are untouched.
    """
    directory = run / "checkpoints" / f"step-{state.step:08d}"
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write_model(temporary, run, files)
        model_files = sorted(path.name for path in temporary.iterdir())
        tensors = optimizer_state | {RANDOM_STATE: torch.get_rng_state()}
        write_tensors(tensors, temporary / "optimizer.safetensors")
        hashes = {
            n: {"bytes": (temporary / n).stat().st_size, "sha256": sha256_file(temporary / n)}
            for n in [*model_files, "optimizer.safetensors"]
        }
        write_atomic(temporary / "state.json", json.dumps({"state": asdict(state), "files": hashes}, indent=2) + "\n")
        _replace_directory(temporary, directory)
        for name in model_files:
            if name != "tokenizer.json":  # which is the run's own already
                _link(directory / name, run / name)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"could not write the checkpoint {directory}: {error.strerror or error}; "
            "earlier checkpoints are whole: make room and run the same command to go on"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in checkpoint_directories(run)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    # Only now: a run that goes on from the checkpoint before this one still finds the best models that it knew.
    kept = {_best_name(step) for _, step in state.best}
    for old in (run / "checkpoints").glob("best-*"):
        if old.name not in kept:
            shutil.rmtree(old, ignore_errors=True)
    return directory


def _best_name(step: int) -> str:
    return f"best-{step:08d}"


def save_best(run: Path, files: ModelFiles, step: int | None = None) -> None:
    """Replaces <run>/checkpoints/best by the model as it is now, or with `step` writes best-<step> beside it.

    Raises CheckpointError when that fails.
    """
    directory = run / "checkpoints" / ("best" if step is None else _best_name(step))
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write_model(temporary, run, files)
        _replace_directory(temporary, directory)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"could not write {directory}: {error.strerror or error}; make room") from error


def remove_leftovers(run: Path) -> None:
    """Deletes what a process that was killed while writing left behind. No other process may be training here."""
    for path in (run / "checkpoints").glob(".*"):
        shutil.rmtree(path, ignore_errors=True)


def read_checkpoint(directory: Path, files: ModelFiles) -> tuple[TrainingState, dict[str, torch.Tensor]]:
    """Puts the weights of a checkpoint into the model of `files`, sets torch's random state, and gives what is left:
    the state, and that of the optimizer.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt; the message names an earlier intact checkpoint.
    """
    with _damage_named(directory):
        state, hashes = _read_state(directory)
        _check_files(directory, hashes)
        files.read(directory)
        tensors = read_tensors(directory / "optimizer.safetensors")
        torch.set_rng_state(tensors.pop(RANDOM_STATE))
    return state, tensors


def load_optimizer(directory: Path, optimizer: Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Puts what `read_checkpoint` gave into the optimizer. Raises CheckpointError when it does not fit."""
    with _damage_named(directory):
        optimizer.load_state_tensors(tensors)


@contextmanager
def _damage_named(directory: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{directory} is damaged: {error}; {_advice(directory)}") from error


def _advice(damaged: Path) -> str:
    for earlier in reversed(checkpoint_directories(damaged.parent.parent)):
        with suppress(CheckpointError):
            if earlier.name < damaged.name:
                _check_files(earlier, _read_state(earlier)[1])
                return f"{earlier} is intact: delete the damaged directory to go on from there"
    return "no earlier checkpoint is intact: use --overwrite to start again"


def _read_state(directory: Path) -> tuple[TrainingState, dict[str, dict[str, object]]]:
    content = read_json_object(directory / "state.json")
    try:
        known = {f.name for f in fields(TrainingState)}
        if not known - {"best"} <= content["state"].keys() <= known or type(content["state"]["step"]) is not int:
            raise ValueError("it does not hold a training state")
        content["state"]["best"] = [(float(s), int(step)) for s, step in content["state"].get("best", [])]
        if not {"optimizer.safetensors"} < content["files"].keys():
            raise ValueError("it does not list the checkpoint's files")
        return TrainingState(**content["state"]), {name: dict(file) for name, file in content["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"state.json is corrupt ({error})") from None


def _check_files(directory: Path, files: dict[str, dict[str, object]]) -> None:
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{name} is missing")
        if path.stat().st_size != expected.get("bytes"):
            raise CheckpointError(f"{name} has {path.stat().st_size} bytes instead of {expected.get('bytes')}")
        if sha256_file(path) != expected.get("sha256"):
            raise CheckpointError(f"the content of {name} has changed since it was written")


def _write_model(directory: Path, run: Path, files: ModelFiles) -> None:
    files.write(directory)
    if (run / "tokenizer.json").exists():  # a model of symbols that are no text has none
        _link(run / "tokenizer.json", directory / "tokenizer.json")


def _link(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, at once; a copy where the file system has no links."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _replace_directory(temporary: Path, directory: Path) -> None:
    """Renames `temporary` to `directory`. One that is there already is moved aside first and then removed."""
    aside = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if directory.exists():
        os.rename(directory, aside)
    os.rename(temporary, directory)
    shutil.rmtree(aside, ignore_errors=True)
    descriptor = os.open(directory.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
