from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from fastlm.errors import BackendError
from fastlm.ops import explain
from fastlm.ops.quantized_linear import FORMATS, dequantize, in_features, quantized_linear
from tests.ops.guarded import guarded
from tests.ops.helpers import poisoned_memory


def random_weight(quantization: str, rows: int, columns: int) -> torch.Tensor:
    """Blocks as ggml would make them: random bits, with finite scales of about 0.01."""
    block = FORMATS[quantization]
    blocks = np.random.randint(0, 256, (rows, columns // block.block_size, block.block_bytes), dtype=np.uint8)
    halves = {"q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}.get(quantization, (0,))
    for at in halves:
        scale = (np.random.rand(*blocks.shape[:2], 1) * 0.02 - 0.01).astype(np.float16)
        blocks[..., at : at + 2] = scale.view(np.uint8)
    return torch.from_numpy(blocks.reshape(rows, -1))


@pytest.fixture(autouse=True)
def numpy_seed(fresh_seed: int) -> None:
    np.random.seed(fresh_seed)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("quantization", FORMATS)
def test_dequantize_gives_the_bits_of_the_gguf_package_on_any_bytes(quantization):
    data = np.random.randint(0, 256, (33, 7 * FORMATS[quantization].block_bytes), dtype=np.uint8)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[quantization.upper()])
    ours = dequantize(torch.from_numpy(data), quantization).numpy()
    number = ~np.isnan(expected)
    assert number.mean() > 0.8
    assert np.array_equal(np.isnan(ours), ~number)
    assert np.array_equal(ours.view(np.int32)[number], expected.view(np.int32)[number])


@pytest.mark.parametrize("quantization", FORMATS)
def test_block_sizes_are_those_of_the_gguf_package(quantization):
    expected = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quantization.upper()]]
    assert tuple(FORMATS[quantization]) == expected
    assert in_features(quantization, 3 * expected[1]) == 3 * expected[0]


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


def ggml_product(x: torch.Tensor, weight: torch.Tensor, quantization: str) -> torch.Tensor:
    """What llama.cpp computes, but for the rounding of its sums: x in Q8_0 or Q8_K blocks times the weights."""
    size = FORMATS[quantization].block_size
    groups = x.reshape(len(x), -1, size)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    q = torch.round(groups / scale)
    if size == 32:
        scale = scale.half().float()
    return (q * scale).flatten(1).double() @ dequantize(weight, quantization).double().T


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize(("rows", "out_features"), [(1, 257), (2, 64), (5, 31), (7, 100), (17, 33), (200, 48)])
def test_is_as_exact_as_ggml(quantization, rows, out_features):
    columns = 256 * int(np.random.randint(1, 10))
    weight = guarded(random_weight(quantization, out_features, columns))
    calls = math.ceil(64 / rows)  # the error of a few rows is luck
    x = torch.randn(calls * rows, columns) * torch.rand(calls * rows, 1).exp()
    exact, ggml = x.double() @ dequantize(weight, quantization).double().T, ggml_product(x, weight, quantization)
    assert explain("quantized_linear", x[:rows], weight, quantization).chosen == "cpu"
    with poisoned_memory():
        ours = torch.cat([quantized_linear(guarded(part), weight, quantization) for part in x.split(rows)])
    assert relative_error(ours, exact) <= 1.15 * relative_error(ggml, exact)
    assert relative_error(ours, exact) < 0.02


@pytest.mark.parametrize("quantization", ["q8_0", "q5_0", "q4_0"])
@pytest.mark.parametrize("columns", [0, 32, 96, 544, 640])
def test_any_multiple_of_32_inputs(quantization, columns):
    weight, x = guarded(random_weight(quantization, 40, columns)), guarded(torch.randn(3, columns))
    exact = x.double() @ dequantize(weight, quantization).double().T
    assert (quantized_linear(x, weight, quantization) - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("quantization", FORMATS)
def test_a_row_gives_the_same_bits_whatever_rows_are_beside_it(quantization):
    weight, x = random_weight(quantization, 70, 1280), torch.randn(400, 1280)
    together = quantized_linear(x, weight, quantization)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 193):
        start = int(np.random.randint(0, 400 - rows))
        assert torch.equal(quantized_linear(x[start : start + rows], weight, quantization), together[start:][:rows])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(quantized_linear(x, weight, quantization), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("quantization", FORMATS)
def test_bf16_is_the_fp32_result_rounded_once(quantization):
    weight, x = random_weight(quantization, 50, 768), guarded(torch.randn(2, 5, 768).bfloat16())
    bias = torch.randn(50)
    y = quantized_linear(x, weight, quantization, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, quantized_linear(x.float(), weight, quantization, bias).bfloat16())
    without = quantized_linear(x.float(), weight, quantization)
    torch.testing.assert_close(without + bias, quantized_linear(x.float(), weight, quantization, bias))


def test_strides_and_unaligned_storage():
    weight, x = random_weight("q5_k", 20, 512), torch.randn(6, 512)
    expected = quantized_linear(x, weight, "q5_k")
    odd = torch.zeros(weight.numel() + 1, dtype=torch.uint8)[1:].view_as(weight).copy_(weight)
    wide = torch.zeros(40, weight.shape[1] + 7, dtype=torch.uint8)
    wide[::2, 3:-4] = weight
    assert torch.equal(quantized_linear(x, odd, "q5_k"), expected)
    assert torch.equal(quantized_linear(x, wide[::2, 3:-4], "q5_k"), expected)
    assert torch.equal(quantized_linear(x.T.contiguous().T, weight.T.contiguous().T, "q5_k"), expected)
    assert torch.equal(quantized_linear(x[0], weight, "q5_k"), expected[0])
    assert torch.equal(quantized_linear(x[:1].expand(4, 512), weight, "q5_k"), expected[:1].expand(4, 20))


def test_a_read_only_memory_map_serves_as_weight(tmp_path: Path):
    weight, x = random_weight("q6_k", 33, 512), torch.randn(2, 512)
    path = tmp_path / "weights"
    path.write_bytes(b"12345" + weight.numpy().tobytes())
    with pytest.warns(UserWarning, match="not writable"):
        mapped = torch.from_numpy(np.memmap(path, mode="r", offset=5, shape=tuple(weight.shape)))
    assert torch.equal(quantized_linear(x, mapped, "q6_k"), quantized_linear(x, weight, "q6_k"))


def test_no_rows_or_no_features_give_none():
    weight = random_weight("q4_0", 6, 64)
    assert quantized_linear(torch.randn(0, 3, 64), weight, "q4_0").shape == (0, 3, 6)
    assert quantized_linear(torch.randn(2, 64), weight[:0], "q4_0").shape == (2, 0)
    assert torch.equal(
        quantized_linear(torch.randn(2, 0), weight[:, :0], "q4_0", torch.arange(6.0)), torch.arange(6.0).expand(2, 6)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_with_a_number_that_is_not_finite_gives_nan_and_no_other_row_does(bad):
    weight, x = random_weight("q4_k", 40, 512), torch.randn(7, 512)
    expected = quantized_linear(x, weight, "q4_k")
    x[3, 300] = bad
    y = quantized_linear(x, weight, "q4_k")
    assert y[3].isnan().all()
    y[3] = expected[3]
    assert torch.equal(y, expected)


def test_tiny_huge_and_zero_rows():
    weight, x = random_weight("q8_0", 40, 64), torch.randn(1, 64)
    y = quantized_linear(x, weight, "q8_0")
    for power in (2.0**-90, 2.0**90):  # powers of two change no mantissa
        assert torch.equal(quantized_linear(x * power, weight, "q8_0"), y * power)
    assert torch.equal(quantized_linear(x * 1e-38, weight, "q8_0"), torch.zeros(1, 40))
    assert torch.equal(quantized_linear(x * 0, weight, "q8_0"), torch.zeros(1, 40))


OTHER_INSTRUCTIONS = """
import sys, torch
from fastlm._core import native
from fastlm.ops import quantized_linear
assert not native().cpu_features()["avx512"]
cases, out = torch.load(sys.argv[1], weights_only=True), sys.argv[2]
torch.save([quantized_linear(x, w, quantization) for x, w, quantization in cases], out)
"""


@pytest.mark.parametrize("features", ["avx2", "none"])
def test_machines_with_fewer_instructions_compute_the_same(tmp_path, features):
    cases = [
        (torch.randn(rows, 768), random_weight(quantization, 45, 768), quantization)
        for quantization in FORMATS
        for rows in (1, 2, 3, 4, 5, 6)
    ]
    torch.save(cases, tmp_path / "in")
    environment = os.environ | {"FASTLM_CPU_FEATURES": features}
    command = [sys.executable, "-c", OTHER_INSTRUCTIONS, str(tmp_path / "in"), str(tmp_path / "out")]
    subprocess.run(command, env=environment, check=True)
    for (x, weight, quantization), y in zip(cases, torch.load(tmp_path / "out", weights_only=True), strict=True):
        exact = x.double() @ dequantize(weight, quantization).double().T
        assert relative_error(y, exact) < 0.02
        # An activation halfway between two integers may round either way where there is no fused multiply-add.
        assert relative_error(y, quantized_linear(x, weight, quantization).double()) < 1e-3


def test_torch_accepts_the_registration():
    x, weight, bias = torch.randn(2, 3, 64), random_weight("q5_0", 10, 64), torch.randn(10)
    torch.library.opcheck(torch.ops.fastlm.quantized_linear.default, (x, weight, "q5_0", bias))


def test_traces_into_one_graph():
    x, weight = torch.randn(3, 256), random_weight("q4_k", 10, 256)

    def both(x, weight):
        return quantized_linear(x, weight, "q4_k"), dequantize(weight, "q4_k", torch.bfloat16)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, weight), both(x, weight), strict=True):
        torch.testing.assert_close(a, b)


def test_what_does_not_fit_is_named():
    x, weight = torch.randn(2, 64), random_weight("q8_0", 5, 64)
    with pytest.raises(ValueError, match=r"x must be \(..., 64\) for q8_0 rows of 68 bytes, not \(2, 32\)"):
        quantized_linear(x[:, :32], weight, "q8_0")
    with pytest.raises(ValueError, match=r"quantization must be one of q8_0, .* not 'q3_k'"):
        quantized_linear(x, weight, "q3_k")
    with pytest.raises(ValueError, match="q4_k rows are multiples of 144 bytes, not 68"):
        quantized_linear(x, weight, "q4_k")
    with pytest.raises(ValueError, match=r"bias must be \(5,\) floating, not \(4,\)"):
        quantized_linear(x, weight, "q8_0", torch.zeros(4))
    with pytest.raises(ValueError, match=r"x must be fp32 or bf16, not torch\.float16"):
        quantized_linear(x.half(), weight, "q8_0")
    with pytest.raises(ValueError, match=r"weight must be .* uint8"):
        dequantize(weight.int(), "q8_0")


def test_the_backend_that_is_forced_serves(monkeypatch):
    x, weight = torch.randn(2, 64), random_weight("q8_0", 5, 64)
    fast = quantized_linear(x, weight, "q8_0")
    monkeypatch.setenv("FASTLM_BACKEND", "reference")
    exact = quantized_linear(x, weight, "q8_0")
    torch.testing.assert_close(exact, x @ dequantize(weight, "q8_0").T)
    assert not torch.equal(fast, exact)
    monkeypatch.setenv("FASTLM_BACKEND", "triton")
    with pytest.raises(BackendError, match="has no such backend"):
        quantized_linear(x, weight, "q8_0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64,), (2, 3, 64)])
def test_gradients_are_those_of_the_weights_as_numbers(dtype, shape):
    weight, grad = random_weight("q5_0", 5, 64), torch.randn(*shape[:-1], 5).to(dtype)
    x, bias = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(5, requires_grad=True)
    quantized_linear(x, weight, "q5_0", bias).backward(grad)
    torch.testing.assert_close(x.grad, (grad.float() @ dequantize(weight, "q5_0")).to(dtype))
    torch.testing.assert_close(bias.grad, grad.float().reshape(-1, 5).sum(0))
