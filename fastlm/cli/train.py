"""`fastlm train`: from text, or prepared data, to a model that `fastlm generate` and Hugging Face load."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlm.cli.config_file import ConfigOption
from fastlm.cli.output import JsonFlag, console, print_json, status_console
from fastlm.cli.run_display import RunDisplay, duration, stop_on_signal
from fastlm.errors import ConfigError, DataError, FastlmError

if TYPE_CHECKING:
    from fastlm.training.config import Preset, TrainingConfig
    from fastlm.training.data import MixedDataset, TokenDataset
    from fastlm.training.distributed import World
    from fastlm.training.run_directory import RunDescription
    from fastlm.training.trainer import TrainingResult

DEFAULT_MINUTES = 3.0


class Architecture(str, Enum):
    transformer = "transformer"
    lstm = "lstm"
    gru = "gru"
    rnn = "rnn"


class PresetName(str, Enum):
    tiny = "tiny"
    small = "small"
    base = "base"


class OptimizerName(str, Enum):
    muon = "muon"
    adamw = "adamw"


class ScheduleName(str, Enum):
    linear = "linear"
    cosine = "cosine"


class ParallelName(str, Enum):
    ddp = "ddp"
    fsdp = "fsdp"


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


def command(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the run; an unfinished one there goes on.")],
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", "-d", help="What `fastlm prepare` reads, or directories that it made; repeat for more."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Shares of several prepared directories: 0.7,0.3. [default: equal]")
    ] = None,
    separate_documents: Annotated[
        bool | None,
        typer.Option("--separate-documents/--no-separate-documents", help="No token sees another document in its row."),
    ] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help="Wall-clock, all in all. [default: 3]")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps, instead of --minutes.")] = None,
    preset: Annotated[
        PresetName | None, typer.Option("--preset", help="Size of the model. [default: by text and time]")
    ] = None,
    architecture: Annotated[
        Architecture | None, typer.Option("--architecture", help="transformer, or a network to compare it with.")
    ] = None,
    hidden_size: Annotated[int | None, typer.Option("--hidden-size", help="Width, instead of the preset's.")] = None,
    num_layers: Annotated[int | None, typer.Option("--num-layers", help="Depth, instead of the preset's.")] = None,
    context_length: Annotated[int | None, typer.Option("--context-length", help="Tokens of a sequence.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Sequences of a step.")] = None,
    accumulation: Annotated[int | None, typer.Option("--accumulation", help="Parts a batch is computed in.")] = None,
    optimizer: Annotated[
        OptimizerName | None, typer.Option("--optimizer", help="Of the blocks' matrices. [default: muon]")
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Peak rate for the blocks' matrices. [default: by optimizer]")
    ] = None,
    embedding_lr: Annotated[
        float | None, typer.Option("--embedding-lr", help="Peak rate of AdamW, the rest. [default: by width]")
    ] = None,
    schedule: Annotated[
        ScheduleName | None, typer.Option("--schedule", help="How the rate falls at the end. [default: linear]")
    ] = None,
    ema: Annotated[
        float | None, typer.Option("--ema", help="Decay of a moving average of the weights, which is the model: 0.999")
    ] = None,
    patience: Annotated[
        int | None, typer.Option("--patience", help="Evaluations without a better one after which the run ends.")
    ] = None,
    activation_checkpointing: Annotated[
        bool | None,
        typer.Option("--activation-checkpointing/--no-activation-checkpointing", help="Less memory, more work."),
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option("--evaluations", help="Partial ones during the run. [default: 10]")
    ] = None,
    keep_best: Annotated[
        int | None,
        typer.Option("--keep-best", help="How many of the best evaluations keep their weights. [default: 1]"),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="What layers compute in. [default: the faster on this machine]")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of weights and data order. [default: 0]")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="tokenizer.json. [default: train one on the text]")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", "-v", help="Of the trained tokenizer. [default: by amount of text]")
    ] = None,
    parallel: Annotated[
        ParallelName, typer.Option("--parallel", help="Under torchrun: each process has all of the model, or a part.")
    ] = ParallelName.ddp,
    find_lr: Annotated[
        bool, typer.Option("--find-lr", help="Train nothing; find a rate in 100 steps, and draw <out>/rates.png.")
    ] = False,
    sample: Annotated[
        str | None, typer.Option("--sample", help="A prompt; show what the model writes after it at each evaluation.")
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write what log.jsonl holds for TensorBoard.")
    ] = False,
    config: ConfigOption = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume", help="Go on with the run in --out; or refuse to. [default: if there is one]"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train a language model. Ctrl-C saves a checkpoint and says how to go on.

    Example: fastlm train --data book.txt --out run --minutes 3
    """
    started_at = time.monotonic()
    from fastlm.training.distributed import World
    from fastlm.training.run_directory import is_finished, read_run

    if minutes is not None and steps is not None:
        raise ConfigError("give --minutes or --steps, not both")
    if overwrite and resume:
        raise ConfigError("give --resume or --overwrite, not both")
    given_training = {
        "minutes": minutes,
        "steps": steps,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "optimizer": optimizer and optimizer.value,
        "learning_rate": lr,
        "embedding_learning_rate": embedding_lr,
        "dtype": dtype and dtype.value,
        "seed": seed,
        "separate_documents": separate_documents,
        "schedule": schedule and schedule.value,
        "ema": ema,
        "patience": patience,
        "activation_checkpointing": activation_checkpointing,
        "evaluations": evaluations,
        "keep_best": keep_best,
    }
    given_model = {"hidden_size": hidden_size, "num_layers": num_layers, "context_length": context_length}
    given_names = {"vocab_size": vocab_size, "architecture": architecture and architecture.value}
    given_names["preset"] = preset and preset.value

    def plan() -> RunDescription:
        existing = None if overwrite else read_run(out)
        if existing is None:
            if resume:
                raise ConfigError(f"{out} holds no run to go on with; leave out --resume to start one")
            if not data:
                raise ConfigError("nothing to train on: give --data with text files or a prepared directory")
            dataset = _new_data(out, data, weights, tokenizer, vocab_size, overwrite)
            return _describe(dataset, given_training, given_model, architecture, preset)
        if resume is False:
            raise ConfigError(f"{out} holds a run; give another --out, or --overwrite to replace it")
        if is_finished(out):
            raise ConfigError(f"{out} holds a finished run; give another --out, or --overwrite to replace it")
        _recorded_data(out, existing, data)
        _check_unchanged(out, existing, {**given_training, **given_model, **given_names})
        return existing

    world = World()
    if find_lr:
        _find_rate(out, plan(), as_json)
        return
    with _nothing_left_behind(out) if world.is_main else nullcontext():
        description = world.from_main(plan)
        dataset = _recorded_data(out, description, None)
        _run(out, description, dataset, started_at, parallel, world, tensorboard, sample, as_json)


@contextmanager
def _nothing_left_behind(out: Path) -> Iterator[None]:
    """Removes data that was prepared for a run which then did not begin, so that the corrected command can run."""
    from fastlm.training.run_directory import RUN_FILE

    had_data, had_directory = (out / "data").exists(), out.exists()
    try:
        yield
    except FastlmError:
        if not (out / RUN_FILE).exists() and not had_data:
            shutil.rmtree(out / "data", ignore_errors=True)
            if not had_directory and out.exists():
                out.rmdir()
        raise


def _find_rate(out: Path, description: RunDescription, as_json: bool) -> None:
    import torch

    from fastlm.model import build_model
    from fastlm.training.learning_rate_finder import find_learning_rate, plot_rates
    from fastlm.training.trainer import LanguageModeling

    torch.manual_seed(description.training.seed)
    dataset = _recorded_data(out, description, None)
    with status_console.status("finding a learning rate"):
        objective = LanguageModeling(build_model(description.model), dataset, description.training)
        search = find_learning_rate(objective, description.training)
    rate = description.training.learning_rate
    rates = {
        "lr": float(f"{search.suggestion * rate:.2g}"),
        "embedding_lr": float(f"{search.suggestion * description.training.embedding_learning_rate:.2g}"),
    }
    out.mkdir(parents=True, exist_ok=True)
    plot_rates(search, rate, out / "rates.png")
    if as_json:
        print_json({"out": str(out), **rates, "factors": search.factors, "losses": search.losses})
    else:
        console.print(f"--lr {rates['lr']} --embedding-lr {rates['embedding_lr']}", highlight=False)
        console.print(f"{out / 'rates.png'}: the loss against the rate", highlight=False, markup=False)


def _run(
    out: Path,
    description: RunDescription,
    dataset: TokenDataset | MixedDataset,
    started_at: float,
    parallel: ParallelName,
    world: World,
    tensorboard: bool,
    sample: str | None,
    as_json: bool,
) -> None:
    from fastlm.training import train

    with RunDisplay() as display, stop_on_signal() as stop:
        result = train(
            description.model,
            description.training,
            dataset,
            out,
            on_progress=display.update,
            should_stop=lambda: stop["asked"],
            started_at=started_at,
            parallel=parallel.value,
            tensorboard=tensorboard,
            sample_prompt=sample,
        )
    world.close()
    if not world.is_main:
        raise typer.Exit(130 if result.interrupted else 0)
    if result.interrupted:
        again = shlex.join(["fastlm", "train", "--out", str(out), "--resume"])
        status_console.print(
            f"stopped at step {result.steps:,}, saved; go on with: {again}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
        raise typer.Exit(130)
    if as_json:
        print_json({"out": str(out), **asdict(result)})
    else:
        _print_result(out, result)


def _describe(
    dataset: TokenDataset | MixedDataset,
    given_training: dict[str, Any],
    given_model: dict[str, Any],
    architecture: Architecture | None,
    preset_name: PresetName | None,
) -> RunDescription:
    """A new run: what was given, and defaults that suit the text, the time and the machine."""
    from fastlm.training import PRESETS, TrainingConfig, rnn_config, transformer_config
    from fastlm.training.config import adamw_learning_rate, embedding_learning_rate, fast_dtype, preset_for
    from fastlm.training.run_directory import RunDescription

    training = {name: value for name, value in given_training.items() if value is not None}
    if "steps" not in training:
        training.setdefault("minutes", DEFAULT_MINUTES)
    name = preset_name.value if preset_name else preset_for(dataset.train.num_bytes, training.get("minutes"))
    preset = replace(PRESETS[name], **{k: v for k, v in given_model.items() if v is not None})
    cell = architecture.value if architecture else "transformer"
    vocab_size = dataset.tokenizer.vocab_size
    if cell == "transformer":
        training.setdefault("embedding_learning_rate", embedding_learning_rate(preset.hidden_size))
    if training.get("optimizer") == "adamw":
        training.setdefault("learning_rate", adamw_learning_rate(preset.hidden_size))
    config: TrainingConfig = TrainingConfig(
        **{"batch_size": preset.batch_size, "dtype": fast_dtype() if cell == "transformer" else "float32", **training}
    )
    model = transformer_config(vocab_size, preset) if cell == "transformer" else rnn_config(vocab_size, preset, cell)
    return RunDescription.of(model, config, dataset)


def _new_data(
    out: Path,
    data: list[Path],
    weights: str | None,
    tokenizer: Path | None,
    vocab_size: int | None,
    overwrite: bool,
) -> TokenDataset | MixedDataset:
    """Opens a prepared directory, or prepares text in <out>/data. An earlier run is deleted when nothing failed."""
    from fastlm.tokenizer import Tokenizer
    from fastlm.training import MixedDataset, TokenDataset, prepare
    from fastlm.training.data import MANIFEST
    from fastlm.training.hub_datasets import is_dataset
    from fastlm.training.run_directory import delete_run

    directories = [path for path in data if path.is_dir() and not is_dataset(path)]
    if directories:
        if len(directories) < len(data):
            raise ConfigError(f"{directories[0]} is a directory; give prepared directories, or text files")
        if tokenizer is not None or vocab_size is not None:
            raise ConfigError("prepared data has its tokenizer; leave out --tokenizer and --vocab-size")
        datasets = [TokenDataset(directory) for directory in directories]
        shares = _weights(weights, len(datasets))
        mixed = datasets[0] if len(datasets) == 1 else MixedDataset(datasets, shares)
        if overwrite:
            for dataset in datasets:
                if dataset.directory.resolve() == (out / "data").resolve():
                    raise ConfigError(f"{dataset.directory} is inside the run that --overwrite deletes; move it first")
            delete_run(out)
        return mixed
    if weights is not None:
        raise ConfigError("--weights are for several prepared directories; prepare the text first")
    left = out / "data"
    if left.exists() and not overwrite:
        raise ConfigError(f"{left} exists already and is no run's; give another --out, or --overwrite to replace it")
    given = Tokenizer.from_file(tokenizer) if tokenizer is not None else None
    with status_console.status("tokenizing"):
        if not overwrite:
            return prepare(data, left, tokenizer=given, vocab_size=vocab_size)
        fresh = out / f".data.{os.getpid()}"
        prepare(data, fresh, tokenizer=given, vocab_size=vocab_size)
    delete_run(out)
    if (left / MANIFEST).exists():
        shutil.rmtree(left)
    fresh.rename(left)
    return TokenDataset(left)


def _weights(text: str | None, count: int) -> list[float]:
    try:
        return [1.0] * count if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {text!r}: give numbers with commas, such as 0.7,0.3") from None


def _recorded_data(out: Path, run: RunDescription, data: list[Path] | None) -> TokenDataset | MixedDataset:
    """The data of an unfinished run. Raises ConfigError when other data was given, or it is no longer the same."""
    from fastlm.training import MixedDataset, TokenDataset
    from fastlm.training.data import sha256_file
    from fastlm.training.hub_datasets import is_dataset

    def opened(directories: Sequence[str | Path]) -> TokenDataset | MixedDataset:
        datasets = [TokenDataset(directory) for directory in directories]
        return MixedDataset(datasets, run.weights) if run.weights else datasets[0]

    inside = out / "data"
    dataset = opened([inside] if inside.is_dir() else run.data.split(os.pathsep))
    changed = dataset.fingerprint != run.data_fingerprint
    if data and data[0].is_dir() and not is_dataset(data[0]):
        changed |= len(data) != max(1, len(run.weights)) or opened(data).fingerprint != run.data_fingerprint
    elif data and isinstance(dataset, MixedDataset):
        changed = True
    elif data and any(is_dataset(path) for path in data):
        assert isinstance(dataset, TokenDataset)
        names = [source["file"] for source in dataset.manifest.sources]
        changed |= not all(any(name.startswith(f"{path}:") or name == str(path) for name in names) for path in data)
    elif data:
        assert isinstance(dataset, TokenDataset)
        missing = [path for path in data if not path.is_file()]
        if missing:
            raise DataError(f"{missing[0]} does not exist; give a text file")
        changed |= [sha256_file(path) for path in data] != [s["sha256"] for s in dataset.manifest.sources]
    if changed:
        raise ConfigError(
            f"{out} holds an unfinished run on other --data; "
            "give the same data to continue it, or --overwrite to replace it"
        )
    return dataset


def _check_unchanged(out: Path, run: RunDescription, given: dict[str, Any]) -> None:
    """Raises ConfigError when an option was given whose value differs from the recorded one."""
    from fastlm.training import PRESETS

    recorded: dict[str, Any] = {**asdict(run.training), **asdict(run.model)}
    recorded["architecture"] = recorded.get("cell", "transformer")
    for name, value in given.items():
        if name == "preset":
            continue
        if value is not None and value != recorded[name]:
            raise _conflict(out, name, recorded[name], value)
    if given["preset"] is not None:
        preset: Preset = PRESETS[given["preset"]]
        for name in ("hidden_size", "num_layers", "context_length", "batch_size"):
            if given[name] is None and getattr(preset, name) != recorded[name]:
                raise _conflict(out, name, recorded[name], getattr(preset, name))


def _conflict(out: Path, name: str, recorded: object, value: object) -> ConfigError:
    return ConfigError(
        f"{out} holds an unfinished run with {name} {recorded}, and this command asks for {value}; "
        "give the same options to continue it, or --overwrite to replace it"
    )


def _print_result(out: Path, result: TrainingResult) -> None:
    lines = [
        f"validation: {result.bits_per_byte:.4f} bits per byte, loss {result.loss:.4f} nats a token, "
        f"perplexity {result.perplexity:.2f}" + (", on a sample of the validation text" if result.partial else ""),
        f"{result.parameters:,} parameters, {result.steps:,} steps, {result.tokens:,} tokens "
        f"in {duration(result.seconds)}" + (f", {result.skipped_steps} skipped" if result.skipped_steps else ""),
        f"{out}: model, tokenizer, loss.png, log.jsonl; try: "
        + shlex.join(["fastlm", "generate", "--checkpoint", str(out), "--prompt", "…"]),
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
