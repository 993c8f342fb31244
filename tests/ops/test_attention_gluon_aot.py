"""Attention's Hopper kernels, compiled for sm_90 without a GPU: what their design asks of the machine code."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from fastlm.ops._registry import missing
from tests.ops.helpers import Compiled, compile_for_chips

pytestmark = [pytest.mark.aot, pytest.mark.skipif(missing("gluon") is not None, reason=str(missing("gluon")))]

SHARED_LIMIT = 227 * 1024
HEAD_DIMS = [64, 128, 256]
KERNELS = [("forward_kernel", d) for d in HEAD_DIMS] + [
    (k, d) for k in ("keys_kernel", "queries_kernel") for d in (64, 128)
]
# Bytes, loads and stores together. dK, dV, logits and their gradients take 224 registers; what is spilled are single
# numbers, such as addresses, of which a few are moved in a step of more than 300 instructions: one with Triton 3.7, up
# to seven with 3.6, in a masked step, and five with 3.9. No element of a tile is spilled.
SPILLS = {("keys_kernel", 128): 192, ("queries_kernel", 128): 24}
IN_A_LOOP = {("keys_kernel", 128): 7, ("queries_kernel", 128): 2}  # instructions a step
DTYPES = ["bf16", "fp16"]


def compile_kernel(name: str, head_dim: int, causal: bool, dtype: str = "bf16") -> Compiled:
    from triton.experimental.gluon._runtime import GluonASTSource

    from fastlm.ops.attention import gluon, gluon_backward, gluon_backward_kernels, gluon_kernels

    kernel = getattr(gluon_kernels if name == "forward_kernel" else gluon_backward_kernels, name)
    choice = {"forward_kernel": gluon.TILES, "keys_kernel": gluon_backward.KEYS_TILES}
    tiles = choice.get(name, gluon_backward.QUERIES_TILES)[head_dim]
    walked = ("q_desc", "grad_desc") if name == "keys_kernel" else ("k_desc", "v_desc")
    signature = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "factor": "fp32", "scale": "fp32"}
    signature |= dict.fromkeys(["heads", "kv_heads", "group", "seq_q", "seq_k"], "i32")
    for argument in kernel.arg_names:
        rows = tiles.block if argument in walked else gluon_kernels.ROWS.value
        if argument in ("lse_desc", "delta_desc"):
            signature[argument] = f"tensordesc<fp32[{tiles.block}],{gluon_backward.LAYOUT_OF_ROWS!r}>"
        elif argument.endswith("_desc"):
            signature[argument] = f"tensordesc<{dtype}[1, {rows}, 1, {head_dim}],{gluon.LAYOUT!r}>"
    signature = {name: kind for name, kind in signature.items() if name in kernel.arg_names}
    constants = {"CAUSAL": causal, "HEAD_DIM": head_dim, "STAGES": tiles.stages}
    constants["BLOCK_M" if name == "keys_kernel" else "BLOCK_N"] = tiles.block
    (compiled,) = compile_for_chips(kernel, signature, constants, capabilities=[90], source=GluonASTSource)
    return compiled


def loops_of_products(sass: str) -> list[str]:
    """The innermost loops with wgmma, as text."""
    lines = sass.splitlines()
    labels = {line.split(":")[0].strip(): i for i, line in enumerate(lines) if re.match(r"\s*\.L\S+:", line)}
    loops = []
    for i, line in enumerate(lines):
        branch = re.search(r"@!?P\d BRA `\((\S+)\)", line)  # those without a condition come back from waits
        if branch and labels[branch[1]] <= i and any("HGMMA" in text for text in lines[labels[branch[1]] : i]):
            loops.append((labels[branch[1]], i))
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return ["\n".join(lines[a:b]) for a, b in inner]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("kernel", "head_dim"), KERNELS)
def test_products_and_copies_are_hoppers_and_registers_suffice(kernel, head_dim, causal, dtype):
    compiled = compile_kernel(kernel, head_dim, causal, dtype)
    assert compiled.chip == "sm_90a"
    products = re.findall(r"wgmma\.mma_async\S* \{[^}]*\}, (\S)", compiled.ptx)
    from_registers = [a == "{" for a in products]
    assert any(from_registers)  # P · V
    assert not all(from_registers)  # Q · Kᵀ
    assert "mma.sync" not in compiled.ptx
    assert re.search(r"cp\.async\.bulk\.tensor\.4d\.shared::(cta|cluster)\.global", compiled.ptx)
    assert "cp.async.bulk.tensor.4d.global.shared::cta" in compiled.ptx
    assert {"240", "24"} <= set(re.findall(r"setmaxnreg\S+\s+(\d+)", compiled.ptx))
    assert compiled.spill_bytes <= SPILLS.get((kernel, head_dim), 0)
    loops = loops_of_products(compiled.sass)
    assert len(loops) >= 2
    assert all(len(re.findall(r"\b(?:LDL|STL)", loop)) <= IN_A_LOOP.get((kernel, head_dim), 0) for loop in loops)
    assert compiled.shared_bytes <= SHARED_LIMIT
    # ptxas says so (C7510 and its kin) where it runs products one by one that the kernel issued together.
    assert not re.search(r"C75\d\d|serialized", compiled.messages), compiled.messages


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_exponentials_are_taken_while_products_run(head_dim, causal):
    """Between the wait for Q · Kᵀ, which leaves P · V in flight, and the wait for P · V stands the whole softmax."""
    from fastlm.ops.attention import gluon

    compiled = compile_kernel("forward_kernel", head_dim, causal)
    assert compiled.sass, "nvdisasm, which comes with Triton, was not found"
    overlapped = []
    for after in compiled.sass.split("WARPGROUP.DEPBAR.LE gsb0, 0x1 ")[1:]:
        softmax, found, _ = after.partition("WARPGROUP.DEPBAR.LE gsb0, 0x0 ")
        assert found
        overlapped.append(softmax.count("MUFU.EX2"))
        assert softmax.count("FFMA") >= softmax.count("MUFU.EX2") - 2  # scale, maximum: one instruction before each
        assert "HGMMA" not in softmax
    assert len(overlapped) == (4 if causal else 2)  # two consumers, and the tiles at the diagonal apart
    # A thread of 128 has block_n / 2 of a tile's 64 × block_n logits.
    assert min(overlapped) >= gluon.TILES[head_dim].block // 2


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_exponentials_of_the_backward_are_taken_while_products_run(head_dim, causal):
    """Between the wait for the logits, which leaves dO · Vᵀ in flight, and what comes next of waits or products."""
    from fastlm.ops.attention import gluon_backward

    choices = {"keys_kernel": gluon_backward.KEYS_TILES, "queries_kernel": gluon_backward.QUERIES_TILES}
    for kernel, choice in choices.items():
        compiled = compile_kernel(kernel, head_dim, causal)
        loops = loops_of_products(compiled.sass)
        assert len(loops) == (4 if causal else 2)  # two consumers, and the tiles at the diagonal apart
        for loop in loops:
            _, found, rest = loop.partition("WARPGROUP.DEPBAR.LE gsb0, 0x1 ")
            assert found
            softmax = re.split("HGMMA|WARPGROUP.DEPBAR", rest)[0]
            assert softmax.count("MUFU.EX2") == choice[head_dim].block // 2


@pytest.mark.parametrize(("kernel", "head_dim"), KERNELS)
def test_a_warpgroup_meets_before_one_of_its_threads_arrives(kernel, head_dim):
    """One thread arrives for four warps, each of which must be done; the simulator takes this for granted."""
    compiled = compile_kernel(kernel, head_dim, True)
    steps = re.findall(r"bar\.sync|mbarrier\.arrive\.shared::cta|wgmma\.\w+|mbarrier\.try_wait", compiled.ptx)
    arrivals = [i for i, step in enumerate(steps) if step.startswith("mbarrier.arrive")]
    # Of two consumers with two walks each: the forward has K's first, and a walk's turn, K and V.
    assert len(arrivals) == {"forward_kernel": 14, "keys_kernel": 4, "queries_kernel": 4}[kernel]
    assert all(steps[i - 1] == "bar.sync" for i in arrivals)


@pytest.fixture
def pretended_hopper(monkeypatch):
    """Triton's driver as far as its compiler asks it; it launches nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    pretended = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(driver, "_active", pretended)


@pytest.mark.parametrize(("heads", "kv_heads", "seq_q"), [(1, 1, 1), (4, 2, 203), (16, 16, 128)])
def test_launches_compile_with_the_arguments_that_calls_give_them(pretended_hopper, heads, kv_heads, seq_q):
    """Triton makes constants of integers that are 1, and knows descriptors by what their tensors are."""
    from fastlm.ops.attention import gluon, gluon_backward, gluon_backward_kernels, gluon_kernels

    q, grad_q, grad = (torch.zeros(2, seq_q, heads, 64, dtype=torch.bfloat16) for _ in range(3))
    k, v, grad_k, grad_v = (torch.zeros(2, 77, kv_heads, 64, dtype=torch.bfloat16) for _ in range(4))
    lse = torch.zeros(2, heads, seq_q)
    call = gluon_backward.Call(q, k, v, grad, lse, lse, True, 0.125)
    launches = {
        gluon_kernels.forward_kernel: gluon.plan_forward(q, k, v, grad_q, lse, True, 0.125, gluon.TILES[64]),
        gluon_backward_kernels.keys_kernel: gluon_backward.plan_keys(
            call, grad_k, grad_v, gluon_backward.KEYS_TILES[64]
        ),
        gluon_backward_kernels.queries_kernel: gluon_backward.plan_queries(
            call, grad_q, gluon_backward.QUERIES_TILES[64]
        ),
    }
    for kernel, launch in launches.items():
        compiled = kernel.warmup(*launch.args, grid=launch.grid, **launch.constants, num_warps=4)
        assert "wgmma.mma_async" in compiled.asm["ptx"]
        boxes = [d["block_size"] for d in compiled.metadata.tensordesc_meta]
        rows = [d.block_shape[1] for d in launch.args if hasattr(d, "block_shape") and len(d.block_shape) == 4]
        assert [box for box in boxes if len(box) == 4] == [[1, n, 1, 64] for n in rows]
