from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from fastlm.ops.quantized_linear import FORMATS, dequantize, in_features, quantized_linear


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
