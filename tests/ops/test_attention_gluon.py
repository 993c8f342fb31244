"""The Hopper kernels of attention, run by the simulator of their barriers and copies; and, where there is one, on a
Hopper GPU (`pytest -m gpu`, with FASTLM_BACKEND=gluon)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm.errors import BackendError
from fastlm.ops import attention, explain, tuning
from fastlm.ops._registry import _missing_gluon, missing
from tests.ops.gluon_simulator import Simulation, SimulationError
from tests.ops.helpers import assert_as_exact_as, poisoned_memory
from tests.ops.test_attention import plain_attention

pytestmark = pytest.mark.skipif(missing("gluon") is not None, reason=str(missing("gluon")))

KERNELS = Path(__file__).resolve().parents[2] / "fastlm" / "ops" / "attention" / "gluon_kernels.py"

# seq_q, seq_k, heads, kv_heads, head_dim, causal, keys a tile, stages. A block of the grid has 128 queries.
CASES: dict[str, tuple[int, int, int, int, int, bool, int, int]] = {
    "one query, one key": (1, 1, 1, 1, 64, True, 16, 2),
    "one query": (1, 53, 4, 2, 64, True, 16, 2),
    "full, gqa, odd": (67, 91, 4, 2, 64, False, 16, 3),
    "full, tiles": (128, 64, 1, 1, 64, False, 16, 2),
    "full, one tile": (5, 16, 2, 1, 64, False, 16, 4),
    "causal": (200, 200, 2, 1, 64, True, 16, 2),
    "causal, tiles": (128, 128, 1, 1, 64, True, 32, 2),
    "causal, tile + 1": (129, 129, 2, 2, 64, True, 32, 3),
    "causal, tile - 1, mqa": (127, 127, 3, 1, 64, True, 16, 4),
    "causal, more keys": (61, 150, 2, 1, 64, True, 32, 3),
    "causal, more keys, shifted": (130, 163, 2, 1, 64, True, 16, 2),
    "causal, more queries": (150, 61, 2, 1, 64, True, 16, 2),
    "causal, queries without keys": (300, 3, 1, 1, 64, True, 32, 2),
    "head_dim 128": (70, 90, 2, 1, 128, True, 32, 3),
    "head_dim 256": (70, 70, 1, 1, 256, True, 16, 2),
}


def draw(case: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """q, k and v of two sequences, cut from one tensor as a fused projection leaves them."""
    seq_q, seq_k, heads, kv_heads, head_dim = case[:5]
    queries = torch.randn(2, seq_q, heads + 1, head_dim, device=device).to(dtype)
    keys = torch.randn(2, seq_k, 2 * kv_heads, head_dim, device=device).to(dtype)
    return [queries[:, :, 1:], keys[:, :, :kv_heads], keys[:, :, kv_heads:]]


def simulate_forward(
    tensors: list[Tensor], causal: bool, block_n: int, stages: int, source: str | Path = KERNELS, seed: int = 0
) -> tuple[Tensor, Tensor]:
    from fastlm.ops.attention import gluon

    q, k, v = tensors
    with poisoned_memory():
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1])
    tiles = gluon.Tiles(block_n, stages)
    launch = gluon.plan_forward(q, k, v, out, lse, causal, q.shape[-1] ** -0.5, tiles)
    Simulation(source, seed).run("forward_kernel", launch.grid, launch.args, launch.constants)
    return out, lse


def check_forward(ours: tuple[Tensor, Tensor], tensors: list[Tensor], causal: bool) -> None:
    plain = plain_attention(*tensors, causal=causal)
    exact = plain_attention(*(t.double() for t in tensors), causal=causal)
    empty = exact[1] == -torch.inf
    assert torch.equal(ours[1] == -torch.inf, empty)
    assert_as_exact_as(ours[0], plain[0], exact[0])
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_matches_float64_however_its_warps_and_copies_interleave(case, dtype, fresh_seed):
    *shape, causal, block_n, stages = CASES[case]
    tensors = draw(tuple(shape), dtype)
    for seed in range(fresh_seed, fresh_seed + 3):
        check_forward(simulate_forward(tensors, causal, block_n, stages, seed=seed), tensors, causal)


# What is changed in the kernel's source, and what becomes of it. Each would be a wrong result or a hang on a GPU, and
# some of them only now and then.
MUTATIONS: dict[str, tuple[str, str]] = {
    "tiles are loaded into slots that are being read": ("mbarrier.wait(empty.index(slot), (i // STAGES & 1) ^ 1)", "#"),
    "the producer waits for the other phase": ("(i // STAGES & 1) ^ 1", "i // STAGES & 1"),
    "the phase of the ring is one slot off": ("(i // STAGES & 1) ^ 1", "((i + 1) // STAGES & 1) ^ 1"),
    "the producer does not wait for V's readers": (
        "v_smem, v_full, v_empty, i - 1, batch", "v_smem, v_full, k_empty, i - 1, batch"),
    "V is loaded where its K's successor is": ("key + BLOCK_N, kv_head", "key, kv_head"),
    "queries are read before they are there": ("    mbarrier.wait(q_full.index(0), 0)\n", ""),
    "the first K is read before it is there": ("    mbarrier.wait(k_full.index(0), 0)\n", ""),
    "the next K is read before it is there": (
        "        mbarrier.wait(k_full.index((i + 1) % STAGES), (i + 1) // STAGES & 1, pred=i + 1 < count)\n", ""),
    "V is read before it is there": ("        mbarrier.wait(v_full.index(before), (i - 1) // STAGES & 1)\n", ""),
    "the last V is read before it is there": (
        "    mbarrier.wait(v_full.index(last), (count - 1) // STAGES & 1)\n", ""),
    "the phase of V is that of the next tile": (
        "v_full.index(before), (i - 1) // STAGES", "v_full.index(before), i // STAGES"),
    "logits are used in flight": ("warpgroup_mma_wait(1, [logits])", "warpgroup_mma_wait(2, [logits])"),
    "out is used in flight": ("        acc, p = warpgroup_mma_wait(0,", "        acc, p = warpgroup_mma_wait(1,"),
    "the first K is given back before the product is done": (
        "    logits = warpgroup_mma_wait(0, [logits])\n    mbarrier.arrive(k_empty.index(0))\n",
        "    mbarrier.arrive(k_empty.index(0))\n    logits = warpgroup_mma_wait(0, [logits])\n"),
    "K is given back before the product is done": (
        "        logits = warpgroup_mma_wait(1, [logits])\n        mbarrier.arrive(k_empty.index(slot))\n",
        "        mbarrier.arrive(k_empty.index(slot))\n        logits = warpgroup_mma_wait(1, [logits])\n"),
    "V is given back before the product is done": (
        "        acc, p = warpgroup_mma_wait(0, [acc, p])\n        mbarrier.arrive(v_empty.index(before))\n",
        "        mbarrier.arrive(v_empty.index(before))\n        acc, p = warpgroup_mma_wait(0, [acc, p])\n"),
    "one consumer of two gives K back": ("k_empty = allocate_barriers(STAGES, CONSUMERS)",
                                         "k_empty = allocate_barriers(STAGES, 1)"),
    "V is never given back": ("        mbarrier.arrive(v_empty.index(before))\n", ""),
    "a copy's bytes are half announced": ("mbarrier.expect(q_full.index(0), CONSUMERS * ",
                                          "mbarrier.expect(q_full.index(0), "),
    "both consumers take the same turn": ("(i if CONSUMER == 0 else i + 1) & 1", "(i + 1) & 1"),
    "the turn is not passed on": ("        mbarrier.arrive(turns.index((CONSUMER + 1) % CONSUMERS))\n", ""),
    "out is stored without a fence": ("    fence_async_shared()\n    tma_store", "    tma_store"),
    "the kernel ends before out is read": ("    tma.store_wait(0)\n", ""),
    "the walk forgets a tile's decay": ("total * decay + gl.sum", "total + gl.sum"),
    "the diagonal is not masked": ("keys[None, :] <= positions[:, None]", "keys[None, :] <= positions[:, None] + 1"),
    "the end of the keys is not masked": ("seen = keys[None, :] < seq_k", "seen = keys[None, :] < seq_k + 1"),
    "one tile too few is masked": ("gl.maximum(count - whole, 1)", "gl.maximum(count - whole - 1, 1)"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_simulator_notices_each_mutation_of_the_forward_kernel(mutation):
    source, (old, new) = KERNELS.read_text(), MUTATIONS[mutation]
    assert source.count(old) == 1, f"the kernel has {source.count(old)} times: {old}"
    source = source.replace(old, new)
    for seed in range(10):
        for shape, causal in (((150, 149, 2, 1, 64), False), ((150, 171, 2, 1, 64), True)):
            tensors = draw(shape, torch.bfloat16)
            try:
                check_forward(simulate_forward(tensors, causal, 16, 2, source, seed), tensors, causal)
            except (SimulationError, AssertionError):
                return
    pytest.fail("no interleaving showed it")


def reason(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> str | None:
    from fastlm.ops.attention import gluon

    names = ("causal", "window", "softcap", "sinks", "bias", "scale", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q",
             "max_seqlen_k", "return_lse", "dropout", "seed")  # fmt: skip
    defaults: dict[str, Any] = dict.fromkeys(names) | {"causal": True, "return_lse": False, "dropout": 0.0}
    return gluon.supports(q, k, v, **defaults | options)


def test_what_it_does_not_serve_it_names(monkeypatch):
    monkeypatch.setenv("FASTLM_BACKEND", "gluon")
    q, k, v = draw((20, 20, 2, 1, 64), torch.bfloat16)
    assert reason(q, k, v) is None
    assert "not torch.float32" in str(reason(q.float(), k.float(), v.float()))
    assert "not 32" in str(reason(q[..., :32], k[..., :32], v[..., :32]))
    assert reason(q, k, v, window=3) == "has no window"
    assert reason(q, k, v, softcap=3.0) == "has no softcap"
    assert reason(q, k, v, sinks=torch.zeros(2)) == "has no sinks"
    assert reason(q, k, v, bias=torch.zeros(20, 20)) == "has no bias"
    assert reason(q, k, v, dropout=0.5) == "has no dropout"
    assert "packed" in str(reason(q[0], k[0], v[0], cu_seqlens_q=torch.zeros(2)))
    assert "positive scale" in str(reason(q, k, v, scale=-1.0))
    assert "at least one" in str(reason(q[:, :0], k, v))
    assert "at least one" in str(reason(q, k[:, :0], v[:, :0]))
    wide = torch.zeros(2, 20, 1, 68, dtype=torch.bfloat16)
    assert "multiple of 16 bytes" in str(reason(q, wide[..., :64], v))
    assert "start on 16 bytes" in str(reason(q, k, torch.zeros(20 * 64 * 2 + 1).bfloat16()[1:].view(2, 20, 1, 64)))
    assert "above 0" in str(reason(q, k[:1].expand(2, -1, -1, -1), v))
    assert "contiguous last" in str(reason(q, k, v.transpose(1, 3).contiguous().transpose(1, 3)))
    single = torch.zeros(3, 64, dtype=torch.bfloat16)[:1, None, None]  # strides of dimensions of one do not matter
    assert reason(*([single] * 3)) is None


def test_unproven_on_this_chip_it_serves_no_call_and_says_how_to_prove_it(monkeypatch):
    monkeypatch.delenv("FASTLM_BACKEND", raising=False)
    tensors = draw((20, 20, 2, 1, 64), torch.bfloat16)
    assert "`fastlm warmup --tune`" in str(reason(*tensors))
    chosen: dict[str, Any] = {"backends": {tuning.backend_key("forward", 64, True): "gluon"}, "tiles": {}}
    monkeypatch.setattr(tuning, "record", lambda device: chosen)
    assert reason(*tensors) is None
    assert "has not been checked" in str(reason(*tensors, causal=False))
    chosen["backends"][tuning.backend_key("forward", 64, True)] = "triton"
    assert "was wrong, or slower" in str(reason(*tensors))


def test_on_a_cpu_it_is_not_used(monkeypatch):
    monkeypatch.delenv("FASTLM_BACKEND", raising=False)
    tensors = draw((20, 20, 2, 1, 64), torch.bfloat16)
    assert "runs on CUDA tensors" in explain("attention", *tensors).reasons["gluon"]
    monkeypatch.setenv("FASTLM_BACKEND", "gluon")
    with pytest.raises(BackendError, match="runs on CUDA tensors; these are on cpu"):
        attention(*tensors)


def test_an_older_triton_is_told(tmp_path):
    gluon = tmp_path / "experimental" / "gluon" / "nvidia"
    gluon.mkdir(parents=True)
    for version, served in (("3.5.1", False), ("3.6.0", True), ("4.0.0", True)):
        (tmp_path / "__init__.py").write_text(f"__version__ = '{version}'\n")
        (gluon / "hopper.py").write_text("")
        assert (_missing_gluon(tmp_path) is None) == served
    (gluon / "hopper.py").unlink()
    assert "Triton 3.6 or later" in str(_missing_gluon(tmp_path))


GPU_SHAPES = [  # seq_q, seq_k, heads, kv_heads, head_dim
    (1, 1, 1, 1, 64), (1, 1000, 4, 2, 128), (200, 333, 4, 2, 64), (1024, 1024, 8, 2, 128), (777, 777, 4, 4, 256),
    (515, 1000, 4, 1, 128), (1000, 515, 4, 1, 64), (2048, 2048, 2, 2, 64),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_hopper_gpu_forward_and_backward_match_float64(shape, causal, dtype):
    if torch.cuda.get_device_capability()[0] != 9 or os.environ.get("FASTLM_BACKEND") != "gluon":
        pytest.skip("needs a Hopper GPU and FASTLM_BACKEND=gluon")
    tensors = draw(shape, dtype, "cuda")
    grad = torch.randn(tensors[0].shape, device="cuda").to(dtype)

    def run(function: Any, compute: torch.dtype) -> list[Tensor]:
        leaves = [t.to(compute).detach().requires_grad_() for t in tensors]
        out, lse = function(*leaves, causal=causal)
        return [out, lse, *torch.autograd.grad(out, leaves, grad.to(compute))]

    with poisoned_memory():
        first = run(lambda *a, **o: attention(*a, **o, return_lse=True), dtype)
    again = run(lambda *a, **o: attention(*a, **o, return_lse=True), dtype)
    plain, exact = run(plain_attention, dtype), run(plain_attention, torch.float64)
    empty = exact[1] == -torch.inf
    assert torch.equal(first[1] == -torch.inf, empty)
    for a, b, c, d in zip(first, again, plain, exact, strict=True):
        assert torch.equal(a, b)
        if a.dtype == torch.float32:
            a, c, d = (t.masked_fill(empty, 0.0) for t in (a, c, d))
        assert_as_exact_as(a, c, d)
