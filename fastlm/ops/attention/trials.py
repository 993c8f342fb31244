"""What `fastlm warmup --tune` measures: Triton's attention in several tile shapes, and Gluon's, on this machine's GPU.

Each candidate runs in a process of its own, which a kernel that hangs or crashes takes down alone. There it is compared
with float64 first: its error may be twice that of plain PyTorch in the same dtype. What is wrong is not timed.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops import attention, explain, tuning

TIMEOUT = 120.0  # seconds a candidate: most of it compiles
CHECKED = ((333, 333), (130, 515), (515, 130), (1, 77))  # (seq_q, seq_k): ends inside a tile, and shifted diagonals
REPEATS = 20
CANDIDATES: dict[str, tuple[tuple[int, int, int, int], ...]] = {  # queries and keys a tile, warps, tiles in flight
    "forward": ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 128, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3)),
    "keys": ((64, 128, 8, 3), (64, 64, 4, 2), (32, 128, 8, 2), (32, 64, 4, 2)),
    "queries": ((128, 64, 8, 3), (128, 32, 8, 2), (64, 64, 4, 2), (64, 128, 8, 2)),
}


class Shape(NamedTuple):
    """The call that is timed: one sequence of `seq` tokens."""

    seq: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str  # as torch names it: "bfloat16"
    device: str = "cuda"
    causal: bool = True


class Outcome(NamedTuple):
    """The median of one pass in milliseconds; or what was wrong, in words."""

    milliseconds: float | None
    problem: str | None = None


Measure = Callable[[Shape, str, dict[str, str], dict[str, list[int]]], Outcome]


class Tuned(NamedTuple):
    """What to record, and every outcome by name."""

    backends: dict[str, str]
    tiles: dict[str, list[int]]
    outcomes: dict[str, Outcome]


def tune(shape: Shape, train: bool, measure: Measure, report: Callable[[str, Outcome], None]) -> Tuned:
    """The fastest right tiles of each Triton kernel, then the faster of Triton and Gluon. `report` is told each."""
    tuned = Tuned({}, {}, {})

    def run(name: str, direction: str, backends: dict[str, str], tiles: dict[str, list[int]]) -> float:
        outcome = measure(shape, direction, backends, tiles)
        tuned.outcomes[name] = outcome
        report(name, outcome)
        return math.inf if outcome.milliseconds is None else outcome.milliseconds

    best = {}  # direction -> milliseconds of Triton's
    for kernel in ("forward", "keys", "queries") if train else ("forward",):
        direction = "forward" if kernel == "forward" else "backward"
        key = tuning.tiles_key(kernel, shape.head_dim)
        if direction not in best:
            best[direction] = run(f"{direction}, triton", direction, {}, tuned.tiles)
        for cut in CANDIDATES[kernel]:
            name = f"{direction}, triton, {kernel} {cut[0]}×{cut[1]}, {cut[2]} warps, {cut[3]} stages"
            milliseconds = run(name, direction, {}, tuned.tiles | {key: list(cut)})
            if milliseconds < best[direction]:
                best[direction] = milliseconds
                tuned.tiles[key] = list(cut)
    for direction in best:
        key = tuning.backend_key(direction, shape.head_dim, shape.causal)
        gluon = tuned.backends | {key: "gluon"}
        # A call's backward is Gluon's only where its forward is.
        tried = direction == "forward" or "gluon" in tuned.backends.values()
        faster = tried and run(f"{direction}, gluon", direction, gluon, tuned.tiles) < best[direction]
        tuned.backends[key] = "gluon" if faster else "triton"
    return tuned


def measure(
    shape: Shape, direction: str, backends: dict[str, str], tiles: dict[str, list[int]], timeout: float = TIMEOUT
) -> Outcome:
    """Runs `trial` in a process of its own. `direction`: "forward" or "backward"; the rest: what a record would say."""
    request = json.dumps({"shape": shape, "direction": direction, "backends": backends, "tiles": tiles})
    environment = {name: value for name, value in os.environ.items() if name != "FASTLM_BACKEND"}
    with tempfile.TemporaryDirectory() as empty:
        environment["XDG_CACHE_HOME"] = empty  # whose record holds this candidate alone
        try:
            child = subprocess.run(
                [sys.executable, "-m", "fastlm.ops.attention.trials", request],
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return Outcome(None, f"did not end within {timeout:.0f} s")
    lines = (child.stdout if child.returncode == 0 else child.stderr).strip().splitlines() or [""]
    if child.returncode != 0:
        return Outcome(None, f"ended with code {child.returncode}: {lines[-1][:200]}")
    return Outcome(*json.loads(lines[-1]))


def trial(shape: Shape, direction: str, backends: dict[str, str], tiles: dict[str, list[int]]) -> Outcome:
    """In the process of a candidate: records it, checks it, times it."""
    device = torch.device(shape.device)
    if device.type == "cuda":
        tuning.save(tuning.chip(device), backends, tiles)
    wanted = backends.get(tuning.backend_key(direction, shape.head_dim, shape.causal))
    for seq_q, seq_k in CHECKED:
        tensors = draw(shape, seq_q, seq_k)
        if wanted is not None:
            answer = explain("attention", *tensors[:3], causal=shape.causal)
            if answer.chosen != wanted:
                return Outcome(None, answer.reasons[wanted])
        ours = results(fused, tensors, shape.causal, direction)
        like = results(plain, tensors, shape.causal, direction)
        exact = results(plain, [t.double() for t in tensors], shape.causal, direction)
        if not torch.allclose(ours.pop(0).double(), exact.pop(0), rtol=1e-4, atol=1e-4):
            return Outcome(None, f"wrong log-sum-exp for {seq_q} × {seq_k}")
        for a, b, c in zip(ours, like[1:], exact, strict=True):
            scale = c.norm().clamp_min(1e-30)
            our_error, plain_error = ((x.double() - c).norm().div(scale).item() for x in (a, b))
            if not our_error <= 2 * plain_error + 1e-6:
                return Outcome(None, f"wrong for {seq_q} × {seq_k}: error {our_error:.1e}, PyTorch's {plain_error:.1e}")
    tensors = draw(shape, shape.seq, shape.seq)
    return Outcome(time_of(fused, tensors, shape.causal, direction))


def draw(shape: Shape, seq_q: int, seq_k: int) -> list[Tensor]:
    """q, k, v and the gradient of out, of one sequence."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((seq_q, shape.heads), (seq_k, shape.kv_heads), (seq_k, shape.kv_heads), (seq_q, shape.heads))
    return [
        torch.randn(1, *size, shape.head_dim, generator=generator).to(shape.device, getattr(torch, shape.dtype))
        for size in sizes
    ]


def fused(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = attention(q, k, v, causal=causal, return_lse=True)
    return out, lse


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """The formula, in q's dtype: (out, log-sum-exp)."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2).transpose(1, 2) for t in (k, v))
    logits = q.transpose(1, 2) @ k.mT * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + k.shape[2] - q.shape[1])
        logits = logits.masked_fill(hidden, -torch.inf)
    weights = logits.masked_fill((logits == -torch.inf).all(-1, keepdim=True), 0.0).softmax(-1)
    weights = weights.masked_fill(logits == -torch.inf, 0.0)
    return (weights @ v).transpose(1, 2), logits.logsumexp(-1)


Function = Callable[..., tuple[Tensor, Tensor]]


def results(function: Function, tensors: list[Tensor], causal: bool, direction: str) -> list[Tensor]:
    """[log-sum-exp, out], and for "backward" the gradients of q, k and v."""
    leaves = [t.detach().requires_grad_(direction == "backward") for t in tensors[:3]]
    out, lse = function(*leaves, causal)
    return [lse, out] if direction == "forward" else [lse, out, *torch.autograd.grad(out, leaves, tensors[3])]


def time_of(function: Function, tensors: list[Tensor], causal: bool, direction: str) -> float:
    """Milliseconds of one pass: the median of REPEATS, after a few that are not counted."""
    leaves = [t.detach().requires_grad_(direction == "backward") for t in tensors[:3]]
    out, _ = function(*leaves, causal)

    def step() -> Any:
        if direction == "forward":
            return function(*leaves, causal)
        return torch.autograd.grad(out, leaves, tensors[3], retain_graph=True)

    wait = torch.cuda.synchronize if tensors[0].is_cuda else lambda: None
    times = []
    for repeat in range(REPEATS + 5):
        wait()
        start = time.perf_counter()
        step()
        wait()
        if repeat >= 5:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    request: dict[str, Any] = json.loads(sys.argv[1])
    outcome = trial(Shape(*request["shape"]), request["direction"], request["backends"], request["tiles"])
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
