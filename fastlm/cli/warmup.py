"""`fastlm warmup`: compiles a model's GPU kernels before the first request waits for them.

Triton compiles a kernel when it is first called with some shapes and dtypes, and keeps it on disk. So what generation
and training do is done once, with random weights, in a model of the same shapes and few layers. With `--tune`,
attention's candidates for those shapes are compared and timed first, and the best are recorded for later runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlm.cli.output import JsonFlag, console, print_json, status_console
from fastlm.cli.sampling_options import ModelOption
from fastlm.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from fastlm.model.config import ModelConfig

BLOCK_SIZE = 16  # tokens a block of the cache, as engines have it
PROMPT_TOKENS = (1, 200)  # one row, and several tiles with an end inside one
TUNED_TOKENS = 4096  # of the sequence that candidates are timed with, where the model's context reaches so far


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def command(
    model: ModelOption,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="What layers compute in. [default: what the weights are stored in]")
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="Also the kernels of a training step.")] = False,
    speculate: Annotated[
        int, typer.Option("--speculate", min=0, max=7, help="Also those of checking so many guessed tokens.")
    ] = 0,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="First find attention's fastest kernels on this GPU. Takes minutes."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Compile the kernels that a model needs on this machine's GPU, so that its first request does not wait.

    Compiled kernels stay on disk, in TRITON_CACHE_DIR or ~/.triton/cache, for later runs of the same versions. What
    --tune finds stays in ~/.cache/fastlm/tuned, for this GPU and these versions of Triton and fastlm.

    Example: fastlm warmup --model gemma3-270m --dtype bfloat16
    """
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU here, and on a CPU nothing is left to compile; fastlm doctor says more")
    from fastlm.model import Transformer, load

    loaded = load(model).model
    if not isinstance(loaded, Transformer):
        raise ConfigError(f"{model} is a recurrent network, which has no kernels of its own")
    stored = loaded.dtype
    config = loaded.config
    del loaded
    chosen = getattr(torch, dtype.value) if dtype is not None else stored
    tuned = tune_attention(config, chosen, train=train, quiet=as_json) if tune else None
    seconds: dict[str, float] = {}
    for name, step in steps(config, chosen, torch.device("cuda"), train=train, speculate=speculate):
        start = time.perf_counter()
        with status_console.status(f"{name} …"):
            step()
            torch.cuda.synchronize()
        seconds[name] = round(time.perf_counter() - start, 2)
        if not as_json:
            console.print(f"{name:<40} {seconds[name]:8.2f} s", highlight=False)
    cache = os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")
    total = round(sum(seconds.values()), 2)
    if as_json:
        facts = {"device": torch.cuda.get_device_name(), "steps": seconds, "seconds": total, "cache": cache}
        print_json(facts if tuned is None else facts | {"tuned": tuned})
    else:
        console.print(f"{'compiled, and kept in ' + cache:<40} {total:8.2f} s", highlight=False, soft_wrap=True)


def tune_attention(config: ModelConfig, dtype: torch.dtype, *, train: bool, quiet: bool) -> dict[str, Any]:
    """Measures attention's candidates for the model's shapes, prints each and records the best.

    Returns the record's path and what is in it, and each candidate's outcome. Raises ConfigError for fp32, of which
    there is one kernel.
    """
    import torch

    from fastlm.ops import tuning
    from fastlm.ops.attention import trials

    if dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(f"--tune is for bfloat16 and float16, not {dtype}; add --dtype bfloat16")
    seq = min(TUNED_TOKENS, config.context_length)
    name = str(dtype).removeprefix("torch.")
    shape = trials.Shape(seq, config.num_heads, config.num_kv_heads, config.head_dim, name)

    def report(candidate: str, outcome: trials.Outcome) -> None:
        if not quiet:
            said = outcome.problem or f"{outcome.milliseconds:8.3f} ms"
            console.print(f"{candidate:<60} {said}", highlight=False, soft_wrap=True)

    with status_console.status("attention's candidates, each in a process of its own …"):
        found = trials.tune(shape, train, trials.measure, report)
    path = tuning.save(tuning.chip(torch.device("cuda")), found.backends, found.tiles)
    if not quiet:
        console.print(f"recorded in {path}", highlight=False, soft_wrap=True)
    outcomes = {candidate: outcome._asdict() for candidate, outcome in found.outcomes.items()}
    return {"record": str(path), "backends": found.backends, "tiles": found.tiles, "outcomes": outcomes}


def steps(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, *, train: bool, speculate: int
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is done once, each with its name: a prompt, a decoding step for each kind of layer, draws, training."""
    import torch

    from fastlm.model import Transformer

    config = few_layers(config)
    model = Transformer(config).to(device, dtype).eval()

    def prompt(tokens: int) -> None:
        with torch.inference_mode():
            model(torch.zeros(1, tokens, dtype=torch.int64, device=device), model.new_cache(1, max(tokens, BLOCK_SIZE)))

    for tokens in PROMPT_TOKENS:
        yield f"prompt of {tokens} token{'s' if tokens > 1 else ''}", lambda tokens=tokens: prompt(tokens)  # type: ignore[misc]
    for window in dict.fromkeys(config.window(layer) for layer in range(config.num_layers)):
        for query_len in sorted({1, speculate + 1}):
            name = f"decoding, {f'window {window}' if window else 'no window'}, {query_len} at once"
            yield name, lambda n=query_len, w=window: decode(config, dtype, device, n, w)  # type: ignore[misc]
    for name, filters in SAMPLING.items():
        yield f"draw, {name}", lambda filters=filters: draw(config.vocab_size, dtype, device, filters)  # type: ignore[misc]
    if train:
        yield "training step", lambda: training_step(config, dtype, device)


def few_layers(config: ModelConfig) -> ModelConfig:
    """As few layers as show each kind: with a window and without."""
    full = config.full_attention_layers
    if config.sliding_window is None or not full:
        return replace(config, num_layers=1)
    kinds = [config.window(layer) for layer in range(config.num_layers)]
    needed = next((i + 1 for i, kind in enumerate(kinds) if kind != kinds[0]), 1)
    return replace(config, num_layers=needed, full_attention_layers=tuple(i for i in full if i < needed))


def decode(config: ModelConfig, dtype: torch.dtype, device: torch.device, query_len: int, window: int | None) -> None:
    """Sequences of a few tokens, in a table so wide that splits are combined, and there with a shared prefix."""
    import torch

    from fastlm.ops import decode_attention

    scalar = config.query_pre_attn_scalar
    q = torch.zeros(2, query_len, config.num_heads, config.head_dim, dtype=dtype, device=device)
    cache = torch.zeros(2, BLOCK_SIZE, config.num_kv_heads, config.head_dim, dtype=dtype, device=device)
    for blocks, shared in ((1, None), (64, None), (64, torch.zeros((), dtype=torch.int32, device=device))):
        table = torch.zeros(2, blocks, dtype=torch.int32, device=device)
        lengths = torch.full((2,), BLOCK_SIZE, dtype=torch.int32, device=device)
        decode_attention(
            q, cache, cache, table, lengths, scale=None if scalar is None else scalar**-0.5, window=window,
            softcap=config.attention_softcap, num_shared_tokens=shared,
        )  # fmt: skip


SAMPLING: dict[str, dict[str, Any]] = {
    "temperature": {},
    "top-p": {"top_p": 0.9},
    "top-k and top-p": {"top_k": 50, "top_p": 0.9},
    "min-p": {"min_p": 0.05},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1},
    "log-probabilities": {"return_logprobs": True, "num_logprobs": 5},
}


def draw(vocab_size: int, dtype: torch.dtype, device: torch.device, filters: dict[str, Any]) -> None:
    import torch

    from fastlm.ops import sample

    ids = torch.zeros(2, 4, dtype=torch.int64, device=device) if "repetition_penalty" in filters else None
    if "num_logprobs" in filters:
        filters = filters | {"num_logprobs": min(filters["num_logprobs"], vocab_size)}
    for logits_dtype in {dtype, torch.float32}:
        logits = torch.zeros(2, vocab_size, dtype=logits_dtype, device=device)
        sample(logits, seed=0, position=0, **filters, prompt_ids=ids, output_ids=ids)


def training_step(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Of weights in fp32 and layers in `dtype`, over whole rows and over packed documents, as trainers have it."""
    import torch

    from fastlm.model import Transformer

    model = Transformer(config).to(device)
    tokens = min(256, config.context_length)
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    offsets = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32, device=device)
    for cu_seqlens in (None, offsets):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = model.loss(ids, ids, cu_seqlens=cu_seqlens)
        loss.backward()
