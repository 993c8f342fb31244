"""What is special to decode attention in Triton: splits, the tile of grouped heads, quantized caches, what chips make
of it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm.errors import BackendError
from fastlm.ops import decode_attention, explain
from fastlm.ops.decode_attention import reference
from tests.ops.helpers import Compiled, assert_as_exact_as, compile_for_chips, poisoned_memory
from tests.ops.test_decode_attention import paged

# query_len, heads, kv_heads, head_dim, block_size, options
CASES: dict[str, tuple[int, int, int, int, int, dict[str, Any]]] = {
    "one query": (1, 4, 2, 16, 8, {}),
    "no groups, padded head_dim": (1, 3, 3, 24, 5, {}),
    "speculative, more rows than a tile": (8, 10, 1, 16, 16, {}),
    "head_dim 256, many tiles of rows": (5, 8, 1, 256, 16, {}),
    "window": (3, 4, 1, 32, 16, {"window": 37}),
    "window of one": (2, 2, 1, 16, 4, {"window": 1}),
    "window beyond every length": (2, 2, 1, 16, 4, {"window": 2**31 - 1}),
    "softcap": (2, 4, 2, 16, 8, {"softcap": 1.5, "scale": 0.7}),
    "sinks": (2, 4, 2, 16, 8, {"sinks": True}),
    "sinks, softcap, window": (4, 6, 2, 40, 7, {"sinks": True, "softcap": 3.0, "window": 50}),
    "negative scale": (1, 2, 2, 16, 8, {"scale": -0.3}),
}
LOW_PRECISION_CASES = ["no groups, padded head_dim", "sinks, softcap, window"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIXED = [
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
]


@pytest.fixture(autouse=True)
def on_the_triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLM_BACKEND", "triton")


@pytest.fixture
def small_splits(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Several splits, several of them combined at a time, and more tokens than the smallest splits hold."""
    from fastlm.ops.decode_attention import triton as kernels

    if device == "cpu":
        monkeypatch.setattr(kernels, "MIN_SPLIT", 16)
        monkeypatch.setattr(kernels, "MAX_SPLITS", 5)
        monkeypatch.setattr(kernels, "COMBINED", 4)


def lengths_for(query_len: int, device: str) -> list[int]:
    """Nothing, fewer tokens than queries, one split and its neighbours, and more than MAX_SPLITS of the smallest."""
    long = 90 if device == "cpu" else 20_000
    return [0, 1, query_len, 15, 16, 17, long + int(torch.randint(16, ()))]


def make(case: str, dtype: torch.dtype, device: str, cache_dtype: torch.dtype | None = None, lengths=None):
    query_len, heads, kv_heads, head_dim, block_size, options = CASES[case]
    tensors = paged(
        lengths or lengths_for(query_len, device),
        query_len=query_len,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        cache_dtype=cache_dtype,
    )
    options = {"scale": head_dim**-0.5} | options
    if "sinks" in options:
        options["sinks"] = (torch.randn(heads, device=device) * 2).to(dtype)
    return [t.to(device) for t in tensors], options


def definition(tensors: list[Tensor], options: dict[str, Any], dtype: torch.dtype | None = None) -> Tensor:
    q, k, v, table, lengths = tensors
    if dtype is not None:
        q, k, v = (t.to(dtype) for t in (q, k, v))
    return reference.decode_attention(q, k, v, table, lengths, **{"window": None, "softcap": None} | options)


def low_precision(tensors: list[Tensor], options: dict[str, Any]) -> Tensor:
    """What plain PyTorch gives: logits and weights rounded to q's dtype."""
    q, k, v, table, lengths = tensors
    out = torch.zeros_like(q)
    _, query_len, heads, _ = q.shape
    for row, length in enumerate(lengths.tolist()):
        ids = table[row, : -(-length // k.shape[1])].long()
        if length == 0:
            continue
        its_k, its_v = (
            t[ids].flatten(0, 1)[:length].to(q.dtype).repeat_interleave(heads // k.shape[2], 1).transpose(0, 1)
            for t in (k, v)
        )
        logits = q[row].transpose(0, 1) @ its_k.mT * options["scale"]
        if options.get("softcap"):
            logits = options["softcap"] * torch.tanh(logits / options["softcap"])
        position = torch.arange(length - query_len, length, device=q.device)[:, None]
        key = torch.arange(length, device=q.device)
        hidden = (key > position) | (key <= position - options.get("window", 2**40))
        logits = logits.masked_fill(hidden, -torch.inf)
        if "sinks" in options:
            logits = torch.cat([logits, options["sinks"][:, None, None].expand(heads, query_len, 1)], -1)
        out[row] = (logits.softmax(-1)[..., :length].masked_fill(hidden, 0.0) @ its_v).transpose(0, 1)
    return out


@pytest.mark.parametrize(
    ("case", "dtype"), [(c, d) for c in CASES for d in DTYPES if d == torch.float32 or c in LOW_PRECISION_CASES]
)
def test_matches_float64(case, dtype, device, small_splits):
    tensors, options = make(case, dtype, device)
    with poisoned_memory():
        out = decode_attention(*tensors, **options)
    assert out.dtype == dtype
    assert_as_exact_as(out, low_precision(tensors, options), definition(tensors, options, torch.float64))


@pytest.mark.parametrize(("dtype", "cache_dtype"), MIXED)
def test_caches_of_another_dtype_are_read_at_their_own_precision(dtype, cache_dtype, device, small_splits):
    tensors, options = make("sinks, softcap, window", dtype, device, cache_dtype)
    out = decode_attention(*tensors, **options)
    exact = definition(tensors, options, torch.float64)
    # Triton's interpreter cuts the result off where a GPU rounds it, which alone makes twice the error.
    factor = 2.2 if device == "cpu" and dtype == torch.bfloat16 else 2.0
    assert_as_exact_as(out, definition(tensors, options), exact, factor)


def quantize(t: Tensor, dtype: torch.dtype, kind: str) -> tuple[Tensor, Tensor]:
    """A cache and its scale: one a head, or one a token and head. What is NaN stays NaN, or becomes any number."""
    most = 127.0 if dtype == torch.int8 else 448.0
    magnitude = t.abs().nan_to_num(0.0)
    scale = magnitude.amax((0, 1, 3) if kind == "head" else 3) / most
    scaled = t.nan_to_num(3.0) / scale.clamp_min(1e-9)[..., None] if dtype == torch.int8 else t / scale[..., None]
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "kind"),
    [
        (torch.float32, torch.int8, "token"),
        (torch.bfloat16, torch.int8, "head"),
        (torch.bfloat16, torch.float8_e4m3fn, "token"),
        (torch.float16, torch.float8_e4m3fn, "head"),
    ],
)
def test_quantized_caches_match_float64_of_what_they_hold(dtype, cache_dtype, kind, device, small_splits):
    if device == "cuda" and cache_dtype != torch.int8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    (q, k, v, table, lengths), options = make("sinks, softcap, window", dtype, device)
    (k, k_scale), (v, v_scale) = quantize(k.float(), cache_dtype, kind), quantize(v.float(), cache_dtype, kind)
    out = decode_attention(q, k, v, table, lengths, **options, k_scale=k_scale, v_scale=v_scale)
    wide_k, wide_v = k.double() * k_scale.double()[..., None], v.double() * v_scale.double()[..., None]
    exact = definition([q.double(), wide_k, wide_v, table, lengths], options)
    plain = low_precision([q, wide_k.to(dtype), wide_v.to(dtype), table, lengths], options)
    assert_as_exact_as(out, plain, exact)
    scales = {"k_scale": k_scale.expand(k.shape[:3]), "v_scale": v_scale.expand(v.shape[:3])}
    said = definition([q, k, v, table, lengths], options | scales)
    assert_as_exact_as(said, plain, exact)


@pytest.mark.parametrize("case", ["one query", "speculative, more rows than a tile", "sinks, softcap, window"])
def test_a_sequence_gives_the_same_bits_whatever_shares_its_batch(case, device, small_splits):
    """Alone, its table may be as narrow as one split, which is then written without being combined."""
    (q, k, v, table, lengths), options = make(case, torch.bfloat16, device)
    together = decode_attention(q, k, v, table, lengths, **options)
    for row, length in enumerate(lengths.tolist()):
        one, width = slice(row, row + 1), -(-length // k.shape[1])
        alone = decode_attention(q[one], k, v, table[one, :width], lengths[one], **options)
        assert torch.equal(alone, together[one]), length
        if device == "cpu":  # a chip may multiply tiles of another height in another order
            last = decode_attention(q[one, -1:], k, v, table[one], lengths[one], **options)
            assert torch.equal(last, together[one, -1:]), length


def test_a_run_gives_the_same_bits_as_the_one_before(device, small_splits):
    tensors, options = make("window", torch.float16, device, lengths=[90, 17])
    first = decode_attention(*tensors, **options)
    assert all(torch.equal(decode_attention(*tensors, **options), first) for _ in range(3))


def test_tables_and_lengths_that_lead_outside_the_cache_give_nan_and_no_other_row_does(device, small_splits):
    tensors, options = make("one query", torch.float32, device, lengths=[40, 33, 50])
    q, k, v, table, lengths = tensors
    expected = decode_attention(*tensors, **options)
    for bad in (-1, len(k), 2**31 - 1, -(2**31)):
        broken = table.clone()
        broken[0, 2] = bad
        out = decode_attention(q, k, v, broken, lengths, **options)
        assert out[0].isnan().all()
        assert torch.equal(out[1:], expected[1:])
        windowed = decode_attention(q, k, v, broken, lengths, **options, window=8)  # does not see block 2
        assert windowed.isfinite().all()
    for bad in (-1, table.shape[1] * 8 + 1, 2**31 - 1):
        wrong = torch.tensor([40, bad, 50], dtype=torch.int32, device=device)
        out = decode_attention(q, k, v, table, wrong, **options)
        assert out[1].isnan().all()
        assert torch.equal(out[::2], expected[::2])


def test_views_of_a_larger_cache_are_read_in_place(device, small_splits):
    (q, k, v, table, lengths), options = make("sinks, softcap, window", torch.float32, device)
    expected = decode_attention(q, k, v, table, lengths, **options)
    blocks, block_size, kv_heads, head_dim = k.shape
    layers = torch.full((blocks, 3, 2, kv_heads, block_size, head_dim), torch.nan, device=device).transpose(3, 4)
    layers[:, 1, 0], layers[:, 1, 1] = k, v
    wide = torch.full((*q.shape[:3], head_dim + 8), torch.nan, device=device)
    wide[..., 3 : 3 + head_dim] = q
    tables = torch.full((*table.shape, 2), -1, dtype=torch.int32, device=device)
    tables[..., 1] = table
    options["sinks"] = torch.stack([options["sinks"]] * 2, 1)[:, 1]
    strided = decode_attention(
        wide[..., 3 : 3 + head_dim], layers[:, 1, 0], layers[:, 1, 1], tables[..., 1], lengths, **options
    )
    assert torch.equal(strided, expected)


def test_offsets_beyond_31_bits_are_reached(device):
    stride, blocks = 2**26, 34
    storage = torch.empty(blocks * stride + 64, dtype=torch.float16, device=device)  # 4 GiB, few pages of it touched
    k = storage.as_strided((blocks, 2, 1, 16), (stride, 16, 16, 1))
    v = storage.as_strided((blocks, 2, 1, 16), (stride, 16, 16, 1), 32)
    k.copy_(torch.randn(k.shape))
    v.copy_(torch.randn(v.shape))
    q = torch.randn(1, 1, 2, 16, dtype=torch.float16, device=device)
    table = torch.tensor([[33, 0, 32]], dtype=torch.int32, device=device)
    lengths = torch.tensor([6], dtype=torch.int32, device=device)
    tensors = [q, k, v, table, lengths]
    exact = definition([q.double(), *(t[[33, 0, 32]].double() for t in (k, v)), torch.arange(3)[None], lengths],
                       {"scale": 0.25})  # fmt: skip
    torch.testing.assert_close(decode_attention(*tensors).double(), exact, rtol=2e-3, atol=2e-3)


def test_a_backend_that_cannot_says_why(monkeypatch):
    tensors, _ = make("one query", torch.float32, "cpu", lengths=[9, 3])
    q, k, v, table, lengths = tensors
    with pytest.raises(BackendError, match="steps of 8, not 12"):
        decode_attention(q[..., :12], k[..., :12], v[..., :12], table, lengths)
    k = k.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(BackendError, match="last dimension is contiguous"):
        decode_attention(q, k, v, table, lengths)
    monkeypatch.delenv("FASTLM_BACKEND")
    assert explain("decode_attention", *tensors).chosen == "cpu"
    with_sinks = explain("decode_attention", *tensors, sinks=torch.zeros(4))
    assert with_sinks.chosen == "reference"
    assert "has no sinks" in with_sinks.reasons["cpu"]


def test_torch_accepts_the_registration(device, small_splits):
    (q, k, v, table, lengths), options = make("sinks, softcap, window", torch.float32, device, lengths=[30, 4])
    k, v = k.nan_to_num(), v.nan_to_num()  # opcheck compares arguments, and NaN is not equal to itself
    torch.library.opcheck(
        torch.ops.fastlm.decode_attention.default,
        (q, k, v, table, lengths, options["scale"], 50, 3.0, options["sinks"], None, None),
    )


@pytest.mark.gpu
def test_call_is_captured_in_a_cuda_graph():
    (q, k, v, table, lengths), options = make("sinks", torch.bfloat16, "cuda")
    decode_attention(q, k, v, table, lengths, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_attention(q, k, v, table, lengths, **options)
    for shorter in (0, 1):
        lengths.sub_(shorter).clamp_(min=0)
        graph.replay()
        assert torch.equal(captured, decode_attention(q, k, v, table, lengths, **options))


SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # 99 KiB, so that sm_86, 89 and 120 have room too


def compile_split(chip: int, head_dim: int, rows: int, q: str, cache: str, **flags: bool) -> Compiled:
    from fastlm.ops.decode_attention import triton as kernels

    names = kernels._split_kernel.arg_names
    scaled = cache in ("i8", "fp8e4nv")
    mixed = q != cache and not scaled
    cut = kernels.tiles(rows, head_dim, mixed or q == "fp32", scaled, chip)
    signature = {n: "*fp32" for n in names if n.endswith("_ptr")} | dict.fromkeys(["inner", "factor"], "fp32")
    signature |= {
        "q_ptr": f"*{q}",
        "out_ptr": f"*{q}",
        "sinks_ptr": f"*{q}",
        "k_ptr": f"*{cache}",
        "v_ptr": f"*{cache}",
    }
    signature |= {"table_ptr": "*i32", "lengths_ptr": "*i32", "num_shared_ptr": "*i32"}
    strides = [n for n in names if n.endswith("_stride")]
    signature |= dict.fromkeys(strides, "i32")
    signature |= dict.fromkeys(
        ["table_width", "blocks", "slots", "kv_heads", "group", "query_len", "window", "batch_size"],
        "i32",
    )  # fmt: skip
    constants: dict[str, Any] = {"WINDOW": False, "SOFTCAP": False, "SINKS": False, "SCALED": scaled, "DIRECT": False}
    constants |= {"WIDE": mixed, "PRECISION": "ieee", "CASCADE": False} | flags
    constants |= {"HEAD_DIM": head_dim, "BLOCK_D": 1 << (head_dim - 1).bit_length(), "BLOCK_SIZE": 16}
    constants |= {"BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n, "STAGES": cut.num_stages}
    constants |= {"MIN_SPLIT": kernels.MIN_SPLIT, "MAX_SPLITS": kernels.MAX_SPLITS, "MAX_QUERY_LEN": 8}
    scale_strides = [n for n in strides if "scale" in n]
    (compiled,) = compile_for_chips(
        kernels._split_kernel,
        signature,
        constants,
        num_warps=cut.num_warps,
        divisible_by_16=[n for n in strides if n not in [*scale_strides, "table_stride"]],
        capabilities=[chip],
    )
    return compiled


def assert_fast(compiled: Compiled, chip: int) -> None:
    assert compiled.tensor_core_instructions > 0
    assert compiled.spill_bytes == 0, compiled.spill_bytes
    assert compiled.shared_bytes <= SHARED_LIMIT[chip]
    assert re.search(r"cp\.async\.wait_group\s+[1-9]", compiled.ptx), "nothing is on its way while a tile is worked on"


@pytest.mark.aot
@pytest.mark.parametrize("chip", [80, 90, 100])
@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256, 512])
def test_every_shape_compiles_onto_tensor_cores_without_spills(chip, rows, head_dim):
    assert_fast(compile_split(chip, head_dim, rows, "bf16", "bf16"), chip)


@pytest.mark.aot
@pytest.mark.parametrize("chip", [80, 90, 100])
@pytest.mark.parametrize("cache", ["bf16", "i8", "fp8e4nv"])
@pytest.mark.parametrize(
    ("rows", "head_dim", "direct"), [(8, 128, False), (8, 128, True), (64, 256, False), (4, 512, False)]
)
def test_every_option_at_once_compiles_without_spills(chip, cache, rows, head_dim, direct):
    if chip == 80 and cache == "fp8e4nv":
        pytest.skip("sm_80 has no fp8, and supports() says so")
    options = dict.fromkeys(["WINDOW", "SOFTCAP", "SINKS"], True)
    assert_fast(compile_split(chip, head_dim, rows, "bf16", cache, DIRECT=direct, **options), chip)


@pytest.mark.aot
@pytest.mark.parametrize("chip", [80, 90, 100])
@pytest.mark.parametrize(("head_dim", "cache"), [(128, "fp32"), (512, "fp32"), (128, "bf16")])
def test_exact_fp32_fits_the_chip_and_uses_no_tensor_cores(chip, head_dim, cache):
    compiled = compile_split(chip, head_dim, 8, "fp32", cache)
    assert compiled.tensor_core_instructions == 0
    assert compiled.spill_bytes == 0
    assert compiled.shared_bytes <= SHARED_LIMIT[80]


@pytest.mark.aot
def test_the_combining_kernel_compiles_without_spills():
    from fastlm.ops.decode_attention import triton as kernels

    signature = {n: "*fp32" for n in kernels._combine_kernel.arg_names if n.endswith("_ptr")}
    signature |= {"out_ptr": "*bf16", "sinks_ptr": "*bf16", "lengths_ptr": "*i32"}
    signature |= dict.fromkeys(["table_width", "slots", "heads", "query_len", "window"], "i32")
    for head_dim in (64, 128, 256, 512):
        constants = {"WINDOW": True, "SINKS": True, "HEAD_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK_SIZE": 16}
        constants |= {"BLOCK_N": 64, "MIN_SPLIT": kernels.MIN_SPLIT, "MAX_SPLITS": kernels.MAX_SPLITS}
        constants |= {"MAX_QUERY_LEN": 8, "COMBINED": kernels.COMBINED}
        for compiled in compile_for_chips(
            kernels._combine_kernel, signature, constants, num_warps=kernels.COMBINE_WARPS
        ):
            assert compiled.spill_bytes == 0, (compiled.chip, head_dim)
