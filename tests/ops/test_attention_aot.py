"""The kernels compile for chips that are not here: tensor cores used, registers and shared memory kept to."""

from __future__ import annotations

import pytest
import torch

from tests.ops.helpers import Compiled, compile_for_chips

pytestmark = pytest.mark.aot

STRIDES = [f"{t}_{s}stride" for t in ("q", "k", "v", "grad") for s in ("batch_", "", "head_")]
BIAS_STRIDES = ["bias_batch_stride", "bias_head_stride", "bias_stride", "bias_key_stride"]
INTEGERS = [*STRIDES, *BIAS_STRIDES, "threshold", "heads", "kv_heads", "group", "seq_q", "seq_k", "window"]
INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # 99 KiB, so that sm_86, 89 and 120 have room too
SPILLS = {  # bytes a thread, as ptxas 12.8 and 13.1 (sm_100) report them; zero where not named
    ("forward", 128, 90): 80,
    ("keys", 128, 90): 40,
    ("keys", 64, 100): 24,
    ("keys", 256, 90): 128,
    ("keys", 256, 100): 64,
    ("queries", 256, 80): 32,
}
SPILLS_WITH_EVERY_OPTION = {("forward", 90): 576}  # 256 where not named


def compile_kernel(name: str, head_dim: int, chip: int, dtype: str = "bf16", **flags: bool) -> Compiled:
    from fastlm.ops.attention import triton as forward
    from fastlm.ops.attention import triton_backward as backward
    from fastlm.ops.attention.tiles import tiles

    kernel = {"forward": forward._forward_kernel, "keys": backward._key_kernel, "queries": backward._query_kernel}[name]
    elements = bool(flags.get("BIAS") or flags.get("DROPOUT"))
    cut = tiles(name, head_dim, torch.float32 if dtype == "fp32" else torch.bfloat16, chip, elements)
    signature = dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(["inner", "factor", "scale", "keep_scale"], "fp32")
    signature |= {n: f"*{dtype}" for n in kernel.arg_names if n.endswith("_ptr")}
    signature |= {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "cu_seqlens_q_ptr": "*i32", "cu_seqlens_k_ptr": "*i32"}
    signature |= {"seed_ptr": "*i64"}
    constants = {"PACKED": False, "CAUSAL": True, "WINDOW": False, "SOFTCAP": False, "SINKS": False}
    constants |= {"BIAS": False, "BIAS_GRAD": False, "DROPOUT": False} | flags
    constants |= {"HEAD_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n}
    constants |= {"STAGES": cut.num_stages, "PRECISION": "ieee" if dtype == "fp32" else "tf32"}
    (compiled,) = compile_for_chips(
        kernel,
        {n: kind for n, kind in signature.items() if n in kernel.arg_names},
        {n: value for n, value in constants.items() if n in kernel.arg_names},
        num_warps=cut.num_warps,
        divisible_by_16=STRIDES,
        capabilities=[chip],
    )
    return compiled


@pytest.mark.parametrize("kernel", ["forward", "keys", "queries"])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("chip", [80, 90, 100])
def test_tensor_cores_are_used_and_registers_suffice(kernel, head_dim, chip):
    compiled = compile_kernel(kernel, head_dim, chip)
    assert (INSTRUCTION[chip] if head_dim <= 256 else "mma.sync") in compiled.ptx
    assert compiled.spill_bytes <= SPILLS.get((kernel, head_dim, chip), 0)
    assert compiled.shared_bytes <= SHARED_LIMIT[chip]


@pytest.mark.parametrize("kernel", ["forward", "keys", "queries"])
@pytest.mark.parametrize("chip", [80, 90, 100])
def test_every_option_at_once_compiles_onto_tensor_cores(kernel, chip):
    compiled = compile_kernel(kernel, 128, chip, PACKED=True, WINDOW=True, SOFTCAP=True, SINKS=True)
    assert INSTRUCTION[chip] in compiled.ptx
    assert compiled.spill_bytes <= SPILLS_WITH_EVERY_OPTION.get((kernel, chip), 256)
    assert compiled.shared_bytes <= SHARED_LIMIT[chip]


SPILLS_WITH_BIAS_AND_DROPOUT = {("keys", 256, 90): 8, ("keys", 512, 90): 8, ("keys", 512, 100): 8}  # bytes


@pytest.mark.parametrize("kernel", ["forward", "keys", "queries"])
@pytest.mark.parametrize("chip", [80, 90, 100])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_bias_and_dropout_compile_onto_tensor_cores(kernel, chip, head_dim):
    compiled = compile_kernel(kernel, head_dim, chip, BIAS=True, BIAS_GRAD=True, DROPOUT=True)
    assert compiled.tensor_core_instructions > 0
    assert compiled.spill_bytes <= SPILLS_WITH_BIAS_AND_DROPOUT.get((kernel, head_dim, chip), 0)
    assert compiled.shared_bytes <= SHARED_LIMIT[chip]


@pytest.mark.parametrize("kernel", ["forward", "keys", "queries"])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_exact_fp32_fits_the_shared_memory_of_every_chip(kernel, head_dim):
    compiled = compile_kernel(kernel, head_dim, 80, dtype="fp32")
    assert compiled.tensor_core_instructions == 0
    assert compiled.shared_bytes <= SHARED_LIMIT[80]
