"""Fine-tuning: a trained model learns a task, by all of its weights or by a LoRA adapter."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from fastlm._files import write_atomic
from fastlm.errors import CheckpointError, ConfigError, DataError
from fastlm.model import build_model, load, load_classifier, save_classifier, save_model
from fastlm.model.adapter import LoRAConfig, add_lora, check_adaptable
from fastlm.model.classifier import Pooling, SequenceClassifier, is_classifier
from fastlm.model.transformer import Transformer
from fastlm.nn import QuantizedEmbedding, QuantizedLinear
from fastlm.tokenizer import Tokenizer
from fastlm.training.classification import Classification, ClassWeights, labels_of
from fastlm.training.config import TrainingConfig
from fastlm.training.data import TokenDataset
from fastlm.training.distributed import World
from fastlm.training.examples import Conversation, Labelled, Preference, fingerprint_of
from fastlm.training.instruction import Instruction
from fastlm.training.log import plot_losses
from fastlm.training.loop import Progress, run_loop
from fastlm.training.model_files import AdapterFiles, ClassifierFiles, LanguageModelFiles, ModelFiles
from fastlm.training.objective import Objective
from fastlm.training.preference import PreferenceTuning
from fastlm.training.run_directory import RESULT_FILE, begin_run
from fastlm.training.trainer import LanguageModeling

Task = Literal["lm", "classification", "instruction", "preference"]
Examples = Sequence[Labelled] | Sequence[Conversation] | Sequence[Preference]
DEFAULT_LM_CONTEXT = 512  # tokens of a window where the model could read many more


@dataclass(frozen=True)
class FinetuneConfig:
    """What is learned and by which weights; how long and how fast is `TrainingConfig`'s matter."""

    task: Task
    lora: LoRAConfig | None = None  # None: all weights are trained
    max_length: int | None = None  # tokens of an example or window; None: as many as the model reads (lm: 512)
    pooling: Pooling = "mean"  # classification: of a text's hidden states
    labels: tuple[str, ...] | None = None  # classification: the classes; None: those that occur
    class_weights: ClassWeights = None  # classification
    beta: float = 0.1  # preference: how strongly the model is held to what it was

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise ConfigError(f"task must be one of {', '.join(get_args(Task))}, not {self.task!r}")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"max_length must be at least 2 tokens, not {self.max_length}")


@dataclass(frozen=True)
class Base:
    """A model to start from. `name` is what an adapter says that it adapts."""

    model: Transformer
    tokenizer: Tokenizer
    name: str = ""


@dataclass(frozen=True)
class FinetuneResult:
    """What a run came to. `metrics` are of the validation examples, and empty when the run was interrupted; the same
    call continues it."""

    interrupted: bool
    task: str
    steps: int
    metrics: dict[str, Any]
    partial: bool  # a sample of the validation data was scored
    seconds: float  # in the training loop, over all interruptions
    skipped_steps: int
    parameters: int
    trained_parameters: int


@dataclass(frozen=True)
class _Description:
    config: FinetuneConfig
    training: TrainingConfig
    base: str
    base_fingerprint: str
    data_fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        return {"task": self.config.task, **asdict(self)}


def load_base(name_or_path: str | Path, *, keep_quantized: bool = False, from_scratch: int | None = None) -> Base:
    """What `fastlm.model.load` takes, as a base whose weights are fp32.

    Args:
        keep_quantized: quantized weights stay so; then only LoRA can train.
        from_scratch: a seed; random weights of the same shape take the place of the model's, for comparison.

    Raises:
        CheckpointError: there is no such model, it is no transformer, or it has no tokenizer.
    """
    loaded = load(name_or_path, dtype=None if keep_quantized else torch.float32)
    model = loaded.model
    if not isinstance(model, Transformer):
        raise CheckpointError(f"{name_or_path} is a recurrent model; only transformers are fine-tuned")
    if loaded.tokenizer is None:
        raise CheckpointError(f"{name_or_path} holds no tokenizer.json; put it there")
    if keep_quantized and not _is_quantized(model):
        model = model.to(torch.float32)
    if from_scratch is not None:
        torch.manual_seed(from_scratch)
        model = build_model(model.config)
        assert isinstance(model, Transformer)
    name = str(Path(name_or_path).resolve()) if Path(name_or_path).exists() else str(name_or_path)
    return Base(model, Tokenizer.from_file(loaded.tokenizer), name)


def finetune(
    base: Base,
    data: TokenDataset | tuple[Examples, Examples],
    out: str | Path,
    config: FinetuneConfig,
    training: TrainingConfig,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    started_at: float | None = None,
    device: torch.device | str = "cpu",
) -> FinetuneResult:
    """Trains `base.model` in place and writes it to `out`; goes on where an unfinished run of the same options stopped.

    Args:
        data: for the task "lm" a dataset prepared with the base's tokenizer; else examples to learn from and examples
            to validate on, which may be none.
        out: gets a model directory, or with LoRA an adapter in PEFT's format; tokenizer.json, log.jsonl, loss.png,
            result.json, run.json and checkpoints/.
        on_progress, should_stop, started_at: as in `train`.

    Raises:
        ConfigError: `out` holds a finished run or one with other options, or options do not fit the base.
        DataError: the data does not fit the task, the base's tokenizer, or is too short.
        CheckpointError: the checkpoint to go on from is damaged, or one cannot be written.
        TrainingError: too many steps in a row had a loss or gradient that is not finite.
    """
    out = Path(out)
    started_at = time.monotonic() if started_at is None else started_at
    if config.lora is None and _is_quantized(base.model):
        raise ConfigError("quantized weights cannot be trained: use LoRA, or load the base with numbers as weights")
    base_fingerprint = _model_fingerprint(base.model)
    if isinstance(data, TokenDataset):
        data_fingerprint = data.manifest.fingerprint
    else:
        if not data[0]:
            raise DataError("there are no examples to learn from")
        data_fingerprint = fingerprint_of(*data)
    world = World()
    torch.manual_seed(training.seed)
    objective = _objective(base, data, config, training, world, device)
    parameters = list(objective.model.parameters())

    def begin() -> None:
        begin_run(out, _Description(config, training, base.name, base_fingerprint, data_fingerprint))
        base.tokenizer.save(out / "tokenizer.json")

    world.from_main(begin)
    state, final = run_loop(
        objective, training, out, on_progress=on_progress, should_stop=should_stop, started_at=started_at
    )
    interrupted = state.total_steps is None or state.step < state.total_steps
    interrupted |= final is None and objective.validation_size > 0
    result = FinetuneResult(
        interrupted=interrupted,
        task=config.task,
        steps=state.step,
        metrics=final.metrics if final else {},
        partial=final.partial if final else False,
        seconds=round(state.seconds, 3),
        skipped_steps=state.skipped_steps,
        parameters=sum(p.numel() for p in parameters) + _quantized_numbers(objective.model),
        trained_parameters=sum(p.numel() for p in parameters if p.requires_grad),
    )
    if not interrupted and world.is_main:
        plot_losses(out / "log.jsonl", out / "loss.png")
        write_atomic(out / RESULT_FILE, json.dumps(asdict(result), indent=2) + "\n")
    return result


def steps_of(epochs: float, examples: int, batch_size: int) -> int:
    """How many steps read every example `epochs` times."""
    return max(1, round(epochs * examples / batch_size))


def merge_adapter(adapter: str | Path, out: str | Path) -> None:
    """Writes the model that an adapter and its base are together, with fp32 weights, as a directory of its own.

    Raises:
        CheckpointError: the adapter or its base is missing, corrupt, or does not fit.
    """
    adapter, out = Path(adapter), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(adapter / "tokenizer.json")
    if is_classifier(adapter):
        save_classifier(load_classifier(adapter, dtype=torch.float32), out, eos_token_id=tokenizer.eos_token_id)
    else:
        save_model(load(adapter, dtype=torch.float32).model, out, eos_token_id=tokenizer.eos_token_id)
    shutil.copyfile(adapter / "tokenizer.json", out / "tokenizer.json")


def _objective(
    base: Base,
    data: TokenDataset | tuple[Examples, Examples],
    config: FinetuneConfig,
    training: TrainingConfig,
    world: World,
    device: torch.device | str,
) -> Objective[Any]:
    model: Transformer | SequenceClassifier = base.model.to(device)
    kind = {"classification": Labelled, "instruction": Conversation, "preference": Preference}.get(config.task)
    fits = isinstance(data, TokenDataset) if kind is None else isinstance(data, tuple)
    if not fits or (isinstance(data, tuple) and not all(isinstance(e, kind or object) for part in data for e in part)):
        raise DataError(f"these are no examples for the task {config.task}")
    if config.task == "classification":
        labelled: Any = data
        model = SequenceClassifier(base.model, labels_of(labelled[0], config.labels), config.pooling)
    if config.lora is not None:
        check_adaptable(base.model.config)
        add_lora(model, config.lora)
        if isinstance(model, SequenceClassifier):
            model.score.requires_grad_(True)
    files = _files(model, base, config)
    common: dict[str, Any] = {"files": files, "device": device, "world": world}
    if isinstance(data, TokenDataset):
        if data.tokenizer.fingerprint() != base.tokenizer.fingerprint():
            raise DataError(
                f"{data.directory} was made with another tokenizer than the base's; prepare the text with --tokenizer"
            )
        assert isinstance(model, Transformer)
        length = min(config.max_length or DEFAULT_LM_CONTEXT, model.config.context_length)
        return LanguageModeling(model, data, training, context_length=length, **common)
    train: Any
    valid: Any
    train, valid = data
    common["max_length"] = config.max_length
    if isinstance(model, SequenceClassifier):
        common["class_weights"] = config.class_weights
        return Classification(model, base.tokenizer, train, valid, training, **common)
    if config.task == "preference":
        return PreferenceTuning(model, base.tokenizer, train, valid, training, beta=config.beta, **common)
    return Instruction(model, base.tokenizer, train, valid, training, **common)


def _files(model: Transformer | SequenceClassifier, base: Base, config: FinetuneConfig) -> ModelFiles:
    eos_token_id = base.tokenizer.eos_token_id
    if config.lora is not None:
        return AdapterFiles(model, config.lora, base.name)
    if isinstance(model, SequenceClassifier):
        return ClassifierFiles(model, eos_token_id)
    return LanguageModelFiles(model, eos_token_id)


def _is_quantized(model: torch.nn.Module) -> bool:
    return any(buffer.dtype == torch.uint8 for buffer in model.buffers())


def _quantized_numbers(model: torch.nn.Module) -> int:
    linear = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
    tables = [m for m in model.modules() if isinstance(m, QuantizedEmbedding)]
    return linear + sum(m.weight.shape[0] * m.hidden_size for m in tables)


def _model_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over the weights: the same model gives the same run, wherever it lies."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
