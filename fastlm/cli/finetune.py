"""`fastlm finetune`: a trained model learns a task from a file of examples."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlm.cli.config_file import ConfigOption
from fastlm.cli.output import JsonFlag, console, print_json, status_console
from fastlm.cli.run_display import RunDisplay, duration, stop_on_signal
from fastlm.cli.train import Dtype
from fastlm.errors import ConfigError

if TYPE_CHECKING:
    from fastlm.model.adapter import LoRAConfig
    from fastlm.tokenizer import Tokenizer
    from fastlm.training import FinetuneConfig, FinetuneResult, TokenDataset, TrainingConfig
    from fastlm.training.finetune import Examples

DEFAULT_EPOCHS = 2.0
VALID_FRACTION = 0.1
BATCH_SIZE = {"lm": 8, "classification": 32, "instruction": 16, "preference": 16}
# Peak rates of AdamW for matrices of the blocks, and for the rest: all weights, or LoRA's and a head's alone.
FULL_RATES, LORA_RATES = (1e-3, 1e-3), (3e-3, 3e-3)
LARGE = 50_000_000  # parameters; from there on, all learn at a tenth of those rates
WARMUP_FRACTION = 0.06


class TaskName(str, Enum):
    lm = "lm"
    classification = "classification"
    instruction = "instruction"
    preference = "preference"


class PoolingName(str, Enum):
    mean = "mean"
    last = "last"


def command(
    base: Annotated[str, typer.Option("--base", "-b", help="Run, model directory, GGUF file, hub id, or gemma3-270m.")],
    data: Annotated[
        Path, typer.Option("--data", "-d", help="JSON lines, CSV, TSV or Parquet, also .gz, .zst; for lm text too.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the run; an unfinished one there goes on.")],
    task: Annotated[TaskName, typer.Option("--task", "-t", help="What the examples teach.")],
    valid: Annotated[
        Path | None, typer.Option("--valid", help="File to validate on. [default: a tenth of --data]")
    ] = None,
    lora: Annotated[
        int | None, typer.Option("--lora", help="Rank of a LoRA adapter, instead of training every weight.")
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option("--lora-alpha", help="Its scale. [default: twice the rank]")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Also write base and adapter as one model, in <out>/merged.")
    ] = False,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Times each example is read. [default: 2]")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps, instead of --epochs.")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help="Wall-clock, instead of --epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Examples of a step.")] = None,
    accumulation: Annotated[int, typer.Option("--accumulation", help="Parts a batch is computed in.")] = 1,
    keep_best: Annotated[
        int, typer.Option("--keep-best", help="How many of the best evaluations keep their weights.")
    ] = 1,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak rate. [default: by size and --lora]")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="What layers compute in. [default: the faster on this machine]")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of new weights and of the order.")] = 0,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Tokens of an example; more are cut.")] = None,
    pooling: Annotated[
        PoolingName, typer.Option("--pooling", help="classification: of a text's states; transformers reads `last`.")
    ] = PoolingName.mean,
    class_weights: Annotated[
        str | None,
        typer.Option("--class-weights", help="classification: `balanced`, or a number for each label: 1,2.5"),
    ] = None,
    labels: Annotated[
        str | None, typer.Option("--labels", help="classification: the classes: neg,pos. [default: all that occur]")
    ] = None,
    beta: Annotated[
        float, typer.Option("--beta", help="preference: how strongly the model is held to what it was.")
    ] = 0.1,
    text_column: Annotated[str, typer.Option("--text-column")] = "text",
    label_column: Annotated[str, typer.Option("--label-column")] = "label",
    prompt_column: Annotated[str, typer.Option("--prompt-column")] = "prompt",
    response_column: Annotated[str, typer.Option("--response-column")] = "response",
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Random weights in the base's shape, to see what the base gives.")
    ] = False,
    options_file: ConfigOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Fine-tune a model. Ctrl-C saves a checkpoint; the same command goes on.

    classification reads columns text and label; instruction reads messages, or prompt and response, and learns the
    answers alone; preference reads prompt, chosen and rejected (DPO); lm reads text.

    Example: fastlm finetune --base run --data reviews.tsv --task classification --out sentiment

    Example: fastlm finetune --base gemma3-270m --data chats.jsonl --task instruction --lora 8 --out adapter
    """
    started_at = time.monotonic()
    from fastlm.model.adapter import LoRAConfig
    from fastlm.training import FinetuneConfig, finetune, load_base, merge_adapter
    from fastlm.training.examples import Columns
    from fastlm.training.run_directory import delete_run

    if sum(option is not None for option in (epochs, steps, minutes)) > 1:
        raise ConfigError("give one of --epochs, --steps and --minutes")
    if lora is None and (lora_alpha is not None or merge):
        raise ConfigError("--lora-alpha and --merge are for an adapter: give --lora")
    adapter = None if lora is None else LoRAConfig(lora, 2.0 * lora if lora_alpha is None else lora_alpha)
    config = FinetuneConfig(
        task=task.value,
        lora=adapter,
        max_length=max_length,
        pooling=pooling.value,
        labels=None if labels is None else tuple(labels.split(",")),
        class_weights=_class_weights(class_weights),
        beta=beta,
    )
    start = load_base(base, keep_quantized=lora is not None, from_scratch=seed if from_scratch else None)
    if overwrite:
        delete_run(out)
    columns = Columns(text=text_column, label=label_column, prompt=prompt_column, response=response_column)
    examples = _examples(config, data, valid, columns, out, start.tokenizer, seed)
    given = {"steps": steps, "minutes": minutes, "accumulation": accumulation, "seed": seed, "keep_best": keep_best}
    training = _training(config, examples, given, epochs, batch_size, lr, dtype, _size(start.model))
    with RunDisplay() as display, stop_on_signal() as stop:
        result = finetune(
            start,
            examples,
            out,
            config,
            training,
            on_progress=display.update,
            should_stop=lambda: stop["asked"],
            started_at=started_at,
        )
    if result.interrupted:
        status_console.print(
            f"stopped at step {result.steps:,}, saved; go on with: {shlex.join(['fastlm', *sys.argv[1:]])}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
        raise typer.Exit(130)
    if merge:
        merge_adapter(out, out / "merged")
    if as_json:
        print_json({"out": str(out), **asdict(result)})
    else:
        _print_result(out, result, adapter, merge)


def _examples(
    config: FinetuneConfig,
    data: Path,
    valid: Path | None,
    columns: Any,
    out: Path,
    tokenizer: Tokenizer,
    seed: int,
) -> TokenDataset | tuple[Examples, Examples]:
    from fastlm.training import TokenDataset, prepare
    from fastlm.training.examples import hold_out, read_conversations, read_labelled, read_preferences

    if config.task == "lm":
        if valid is not None:
            raise ConfigError("the task lm validates on the last tenth of --data; leave out --valid")
        if data.is_dir():
            return TokenDataset(data)
        prepared = out / "data"
        return TokenDataset(prepared) if prepared.is_dir() else prepare([data], prepared, tokenizer=tokenizer)
    readers: dict[str, Any] = {
        "classification": read_labelled,
        "instruction": read_conversations,
        "preference": read_preferences,
    }
    read = readers[config.task]
    examples = read(data, columns)
    return (examples, read(valid, columns)) if valid is not None else hold_out(examples, VALID_FRACTION, seed)


def _training(
    config: FinetuneConfig,
    examples: TokenDataset | tuple[Examples, Examples],
    given: dict[str, Any],
    epochs: float | None,
    batch_size: int | None,
    lr: float | None,
    dtype: Dtype | None,
    size: int,
) -> TrainingConfig:
    from fastlm.training import TrainingConfig
    from fastlm.training.config import fast_dtype
    from fastlm.training.finetune import DEFAULT_LM_CONTEXT, steps_of

    batch = batch_size or BATCH_SIZE[config.task]
    steps = given.pop("steps")
    if steps is None and given["minutes"] is None:
        rows = (
            len(examples[0])
            if isinstance(examples, tuple)
            else len(examples.train) // (config.max_length or DEFAULT_LM_CONTEXT)
        )
        steps = steps_of(DEFAULT_EPOCHS if epochs is None else epochs, rows, batch)
    rates = FULL_RATES if config.lora is None else LORA_RATES
    scale = (0.1 if size >= LARGE else 1.0) * (0.1 if config.task == "preference" else 1.0)
    return TrainingConfig(
        steps=steps,
        batch_size=batch,
        optimizer="adamw",
        learning_rate=lr or rates[0] * scale,
        embedding_learning_rate=lr or rates[1] * scale,
        warmup_steps=20 if steps is None else max(1, round(WARMUP_FRACTION * steps)),
        decay_fraction=1.0 if steps is not None else 0.6,
        dtype=dtype.value if dtype else fast_dtype(),
        evaluations=5,
        **given,
    )


def _size(model: Any) -> int:
    return sum(tensor.numel() for tensor in model.state_dict().values())


def _class_weights(text: str | None) -> Any:
    if text is None or text == "balanced":
        return text
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--class-weights {text!r}: give balanced, or numbers with commas such as 1,2.5") from None


def _print_result(out: Path, result: FinetuneResult, adapter: LoRAConfig | None, merged: bool) -> None:
    metrics = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in result.metrics.items())
    what = f"an adapter of rank {adapter.rank}, as PEFT reads it" if adapter else "a model directory"
    lines = [
        f"validation: {metrics or 'nothing to validate on'}" + (", on a sample of it" if result.partial else ""),
        f"{result.trained_parameters:,} of {result.parameters:,} parameters trained, {result.steps:,} steps "
        f"in {duration(result.seconds)}" + (f", {result.skipped_steps} skipped" if result.skipped_steps else ""),
        f"{out}: {what}, loss.png, log.jsonl" + (f"; {out / 'merged'}: both as one model" if merged else ""),
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
