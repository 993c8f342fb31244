"""A training step of our model beside the same model in plain PyTorch, eager and compiled: pace and peak of memory.

Both hold the same weights and read the same tokens; loss and gradients are compared before anything is timed. The
optimizer is torch's own on both sides and left out of the times, but not of the memory, which is that of a whole step.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastlm.benchmarks.harness import Bound, Case, leave_out
from torch import Tensor, nn
from torch.nn import functional as F

from fastlm.model import ModelConfig, Transformer

STEPS = 4  # of which the peak of memory is taken: in the first ones the allocator's free memory falls to pieces


@dataclass(frozen=True)
class Size:
    name: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    seq: int
    batch: int


CPU_SIZES = (
    Size("1M", 128, 4, 2048, 256, 8),
    Size("5M", 256, 4, 8192, 512, 16),
    Size("10M", 320, 6, 8192, 256, 16),
    Size("50M", 640, 8, 16384, 512, 2),  # few tokens: a step of plain PyTorch takes seconds as it is
)
GPU_SIZES = (Size("124M", 768, 12, 32768, 1024, 16),)


class PlainTransformer(nn.Module):
    """The same arithmetic by torch's own functions: logits are kept, nothing is fused."""

    def __init__(self, ours: Transformer) -> None:
        super().__init__()
        self.ours = ours  # for its parameters alone
        self.config = ours.config

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        c = self.config
        decoder: Any = self.ours.model
        batch, seq = input_ids.shape
        cos, sin = (t[:seq, None].repeat(1, 1, 2) for t in decoder.rotary.tables(0, seq, input_ids.device))
        hidden = F.embedding(input_ids, decoder.embed_tokens.weight)
        for block in decoder.layers:
            attn, mlp = block.self_attn, block.mlp
            x = self.norm(hidden, block.input_layernorm.weight)
            q, k, v = (
                F.linear(x, p.weight).view(batch, seq, -1, c.head_dim) for p in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
            if c.qk_norm:
                q, k = self.norm(q, attn.q_norm.weight), self.norm(k, attn.k_norm.weight)
            q, k = ((t * cos + self.rotate_half(t) * sin).to(v.dtype) for t in (q, k))
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=c.num_kv_heads != c.num_heads)
            hidden = hidden + F.linear(out.transpose(1, 2).reshape(batch, seq, -1), attn.o_proj.weight)
            x = self.norm(hidden, block.post_attention_layernorm.weight)
            gated = F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight)
            hidden = hidden + F.linear(gated, mlp.down_proj.weight)
        logits = F.linear(self.norm(hidden, decoder.norm.weight), self.ours.output_weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), self.config.norm_eps)

    @staticmethod
    def rotate_half(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)


def step(
    loss_of: Callable[[Tensor, Tensor], Tensor], parameters: list[Tensor], ids: Tensor, dtype: torch.dtype
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward; returns the loss and every gradient."""

    def run() -> tuple[Tensor, ...]:
        with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = loss_of(ids[:, :-1], ids[:, 1:].contiguous())
        return (loss.detach(), *torch.autograd.grad(loss, parameters))

    return run


def check(ours: tuple[Tensor, ...], peer: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours[0].float(), peer[0].float(), rtol=1e-2, atol=0)
    for a, b in zip(ours[1:], peer[1:], strict=True):
        error = (a - b).norm() / b.norm().clamp(min=1e-12)
        assert error < 0.06, f"a gradient of shape {tuple(b.shape)} differs by {error:.1%}"


def config_of(size: Size) -> ModelConfig:
    heads = size.hidden_size // 64
    intermediate_size = size.hidden_size * 8 // 3 // 32 * 32
    return ModelConfig(
        size.vocab_size, size.hidden_size, size.num_layers, heads, heads, 64, intermediate_size, size.seq, qk_norm=True
    )


def new_model(size: Size, device: str) -> Transformer:
    model = Transformer(config_of(size)).to(device)
    for parameter in model.parameters():  # not zero anywhere, so that every gradient is compared
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
    return model


def loss_of(side: str, model: Transformer) -> Callable[[Tensor, Tensor], Tensor]:
    if side == "ours":
        return model.loss
    plain = PlainTransformer(model)
    if side == "torch.compile":
        torch.compiler.reset()  # else a second size is compiled for any size, and after eight nothing is
        return torch.compile(plain, dynamic=False)
    return plain


def cases(device: str) -> Iterable[Case]:
    can_compile = device != "cpu" or shutil.which("g++") is not None or shutil.which("clang++") is not None
    if not can_compile:
        leave_out("torch.compile is left out of training: it needs a C++ compiler here")
    for size in CPU_SIZES if device == "cpu" else GPU_SIZES:
        model = new_model(size, device)
        parameters: list[Tensor] = list(model.parameters())
        ids = torch.randint(size.vocab_size, (size.batch, size.seq + 1), device=device)
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            sides = ("torch", "torch.compile") if can_compile else ("torch",)
            matrices = sum(p.numel() for p in parameters if p.ndim == 2)
            yield Case(
                name=f"{size.name}: hidden {size.hidden_size}, {size.num_layers} layers, {size.seq} tokens × "
                f"{size.batch}, vocabulary {size.vocab_size} {name}",
                ours=step(loss_of("ours", model), parameters, ids, dtype),
                peers={side: step(loss_of(side, model), parameters, ids, dtype) for side in sides},
                check=check,
                bound=Bound(flops=6 * matrices * size.batch * size.seq, dtype=dtype),
                work=size.batch * size.seq,
                unit="tokens",
                peak=partial(peak_of_training, size, name, device),
            )


def peak_of_training(size: Size, dtype: str, device: str, side: str) -> float | None:
    """Bytes that whole training steps, AdamW's update included, take beyond the model, in a process of its own."""
    request = json.dumps([asdict(size), dtype, device, side, torch.get_num_threads()])
    command = [sys.executable, "-m", "fastlm.benchmarks.bench_training", request]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    answer: float | None = json.loads(done.stdout.splitlines()[-1])
    return answer


def measure_peak(size: Size, dtype: str, device: str, side: str, threads: int) -> float | None:
    """On a CPU of resident memory, which Linux alone tells; on a GPU of what torch has allocated."""
    torch.set_num_threads(threads)
    model = new_model(size, device)
    loss = loss_of(side, model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(size.vocab_size, (size.batch, size.seq + 1), device=device)

    def train(ids: Tensor) -> None:
        with torch.autocast(device, dtype=getattr(torch, dtype), enabled=dtype != "float32"):
            value = loss(ids[:, :-1], ids[:, 1:].contiguous())
        value.backward()

    if side != "torch.compile":  # which would compile for this shape
        train(ids[:1, :17])  # what is loaded at the first step is no part of it
        optimizer.zero_grad()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
    else:
        return None
    for _ in range(STEPS):
        train(ids)
        optimizer.step()
        optimizer.zero_grad()
    return (resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()) - before


def resident(quantity: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(quantity))


def main() -> None:
    size, *rest = json.loads(sys.argv[1])
    print(json.dumps(measure_peak(Size(**size), *rest)))


if __name__ == "__main__":
    main()
