"""Pre-training: a language model from prepared data to a model directory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm._files import write_atomic
from fastlm.errors import ConfigError, DataError
from fastlm.model.checkpoint import AnyConfig, LanguageModel, build_model, write_config
from fastlm.model.transformer import Transformer
from fastlm.training.checkpoint import TrainingState
from fastlm.training.config import TrainingConfig
from fastlm.training.data import MixedDataset, TokenDataset, document_offsets
from fastlm.training.distributed import Parallel, World
from fastlm.training.evaluate import evaluate, windows
from fastlm.training.log import plot_losses
from fastlm.training.loop import Progress, run_loop
from fastlm.training.model_files import LanguageModelFiles, ModelFiles
from fastlm.training.objective import Objective, Score, check_divisible
from fastlm.training.run_directory import RESULT_FILE, RunDescription, begin_run
from fastlm.training.samples import sample_text

PARTIAL_WINDOWS = 32  # of an evaluation during the run: about 0.3 s for a small model on two cores
MAX_FINAL_WINDOWS = 8192  # of the final one: a million tokens, a minute or two for a small model on two cores


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to. `loss` (nats a token), `bits_per_byte` and `perplexity` are of the validation split: all of
    it, or with `partial` evenly spaced windows of it.

    They are None when the run was interrupted; the same call continues it.
    """

    interrupted: bool
    steps: int
    total_steps: int | None
    loss: float | None
    bits_per_byte: float | None
    perplexity: float | None
    partial: bool
    seconds: float  # in the training loop, over all interruptions
    tokens: int  # trained on
    skipped_steps: int
    parameters: int


class Rows(NamedTuple):
    """Part of a batch."""

    inputs: Tensor  # (rows, context_length) int64
    targets: Tensor
    cu_seqlens: Tensor | None  # where documents begin, if they are kept apart


class LanguageModeling(Objective[Rows]):
    """The next token of every token, over windows of a prepared stream."""

    max_final_size = MAX_FINAL_WINDOWS
    partial_size = PARTIAL_WINDOWS

    def __init__(
        self,
        model: LanguageModel,
        dataset: TokenDataset | MixedDataset,
        config: TrainingConfig,
        *,
        files: ModelFiles | None = None,
        context_length: int | None = None,
        sample_prompt: str | None = None,
        world: World | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model: LanguageModel = model
        self.sample_prompt = sample_prompt
        self.files = files or LanguageModelFiles(model, dataset.eos_token_id)
        self.dataset = dataset
        self.world = world or World()
        self.accumulation = config.accumulation
        check_divisible(config, self.world)
        self.device = device
        self.context_length = context_length or model.config.context_length
        self.separate_documents = config.separate_documents
        if config.separate_documents and not isinstance(model, Transformer):
            raise ConfigError("a recurrent network cannot keep the documents of a row apart; leave that option out")
        self.sampler = dataset.sampler(self.context_length, config.batch_size, config.seed)
        if len(dataset.valid) < 2:
            raise DataError("the validation split holds no text to score; give more text")
        self.tokens_per_step = config.batch_size * self.context_length
        self.validation_size = len(windows(len(dataset.valid), self.context_length))

    def parts(self, step: int) -> list[Rows]:
        inputs, targets = (t.chunk(self.world.size)[self.world.rank] for t in self.sampler.batch(step))
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        pairs = zip(inputs.chunk(self.accumulation), targets.chunk(self.accumulation), strict=True)
        eos = self.dataset.eos_token_id
        return [Rows(i, t, document_offsets(i, eos) if self.separate_documents else None) for i, t in pairs]

    def loss(self, part: Rows) -> Tensor:
        shares = self.accumulation * self.world.size
        if part.cu_seqlens is None:
            return self.model.loss(part.inputs, part.targets) / shares
        assert isinstance(self.model, Transformer)
        return self.model.loss(part.inputs, part.targets, cu_seqlens=part.cu_seqlens) / shares

    def evaluate(self, size: int, should_stop: Callable[[], bool] | None = None) -> Score | None:
        result = evaluate(
            self.model,
            self.dataset.valid,
            self.dataset.eos_token_id,
            max_windows=size,
            context_length=self.context_length,
            separate_documents=self.separate_documents,
            world=self.world,
            should_stop=should_stop,
        )
        if result is None:
            return None
        metrics = {"loss": result.loss, "bits_per_byte": result.bits_per_byte, "perplexity": result.perplexity}
        return Score(result.bits_per_byte, metrics, result.partial)

    def sample(self) -> str | None:
        if self.sample_prompt is None:
            return None
        return sample_text(self.model, self.dataset.tokenizer, self.sample_prompt)


def train(
    model_config: AnyConfig,
    config: TrainingConfig,
    dataset: TokenDataset | MixedDataset,
    out: str | Path,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    started_at: float | None = None,
    device: torch.device | str = "cpu",
    parallel: Parallel = "ddp",
    tensorboard: bool = False,
    sample_prompt: str | None = None,
) -> TrainingResult:
    """Trains a model and writes it to the directory `out`; goes on where an unfinished run of the same options stopped.

    Args:
        model_config: its vocabulary is that of `dataset.tokenizer`.
        out: gets config.json, model.safetensors, tokenizer.json (a model directory), log.jsonl, loss.png, result.json,
            run.json and checkpoints/; with `tensorboard` also tensorboard/.
        on_progress: called often, in this thread.
        should_stop: asked after each step; when it says yes, a checkpoint is written and training returns.
        started_at: `time.monotonic()` at which `config.minutes` began to count; by default now.
        sample_prompt: after each evaluation, what the model writes after it goes to log.jsonl and to `on_progress`.
        parallel: where torchrun started several processes, each has all of the model ("ddp") or a part ("fsdp").

    Raises:
        ConfigError: `out` holds a finished run or one with other options.
        DataError: the data is too short for the context.
        CheckpointError: the checkpoint to go on from is damaged, or one cannot be written.
        TrainingError: too many steps in a row had a loss or gradient that is not finite.
    """
    out = Path(out)
    started_at = time.monotonic() if started_at is None else started_at
    if model_config.vocab_size != dataset.tokenizer.vocab_size:
        raise DataError(
            f"the model has a vocabulary of {model_config.vocab_size}, "
            f"the tokenizer one of {dataset.tokenizer.vocab_size}"
        )
    world = World()
    torch.manual_seed(config.seed)
    if sample_prompt is not None and world.size > 1 and parallel == "fsdp":
        raise ConfigError("a part of a model cannot write; leave out --sample or --parallel fsdp")
    model = build_model(model_config).to(device)
    objective = LanguageModeling(model, dataset, config, sample_prompt=sample_prompt, world=world, device=device)

    def begin() -> None:
        begin_run(out, RunDescription.of(model_config, config, dataset))
        dataset.tokenizer.save(out / "tokenizer.json")
        write_config(model_config, out, eos_token_id=dataset.eos_token_id)

    world.from_main(begin)
    state, final = run_loop(
        objective,
        config,
        out,
        on_progress=on_progress,
        should_stop=should_stop,
        started_at=started_at,
        parallel=parallel,
        tensorboard=tensorboard,
    )
    result = _result(objective, state, final)
    if final is not None and world.is_main:
        plot_losses(out / "log.jsonl", out / "loss.png")
        write_atomic(out / RESULT_FILE, json.dumps(asdict(result), indent=2) + "\n")
    return result


def _result(objective: LanguageModeling, state: TrainingState, final: Score | None) -> TrainingResult:
    metrics = final.metrics if final else {}
    return TrainingResult(
        interrupted=final is None,
        steps=state.step,
        total_steps=state.total_steps,
        loss=metrics.get("loss"),
        bits_per_byte=metrics.get("bits_per_byte"),
        perplexity=metrics.get("perplexity"),
        partial=final.partial if final else False,
        seconds=round(state.seconds, 3),
        tokens=state.step * objective.tokens_per_step,
        skipped_steps=state.skipped_steps,
        parameters=sum(p.numel() for p in objective.model.parameters()),
    )
