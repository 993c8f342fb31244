from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm.ops import OPS, explain, fused_linear_sample, sample
from fastlm.ops.fused_linear_sample import chunked
from tests.ops.helpers import compile_for_chips, poisoned_memory
from tests.ops.test_sampling_triton import row_settings

SHAPES = [(1, 24, 1), (3, 40, 31), (5, 33, 129), (17, 64, 700)]  # batch, hidden_size, vocab_size
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=OPS["fused_linear_sample"].backends)
def backend(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Several chunks of rows and of the weight, and several passes over the groups, at the sizes of these tests."""
    if request.param == "cpu" and device == "cuda":
        pytest.skip("the cpu backend has nothing to run on a GPU")
    monkeypatch.setenv("FASTLM_BACKEND", request.param)
    monkeypatch.setattr(chunked, "LOGIT_BYTES", 12000)
    monkeypatch.setattr(chunked, "WIDENED_BYTES", 7000)
    if request.param == "triton":
        monkeypatch.setattr(OPS["fused_linear_sample"].module("triton"), "GROUPS", 8)
    return request.param


def inputs(batch: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(batch, hidden_size, device=device).to(dtype)
    return hidden, (torch.randn(vocab_size, hidden_size, device=device) * 3 * hidden_size**-0.5).to(dtype)


def of_whole_logits(hidden: Tensor, weight: Tensor, softcap: float | None = None, **settings: Any) -> Any:
    """The op's definition by the public function for logits, on the reference backend."""
    logits = hidden.float() @ weight.float().t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLM_BACKEND", "reference")
        return sample(logits, **settings)


def assert_agrees(hidden: Tensor, weight: Tensor, **settings: Any) -> None:
    """The same tokens, save where the rounding of a logit decides: at most one row may differ."""
    with poisoned_memory():
        ours = fused_linear_sample(hidden, weight, **settings, return_logprobs=True)
    exact = of_whole_logits(hidden, weight, **settings, return_logprobs=True)
    assert torch.equal(ours.valid, exact.valid)
    same = ours.ids == exact.ids
    assert same.sum() >= len(same) - 1, (ours.ids, exact.ids)
    torch.testing.assert_close(ours.logprobs[same], exact.logprobs[same], rtol=1e-4, atol=1e-4, equal_nan=True)
    a, b = ours.processed_logprobs, exact.processed_logprobs
    divided = 1e-5 / torch.where(settings["temperature"] > 0, settings["temperature"], 1.0)  # a logit's rounding
    close = ((a - b).abs() <= 1e-4 + 1e-4 * b.abs() + divided) | (a.isnan() & b.isnan())
    assert close[same].sum() >= same.sum() - 1, (a, b)  # a token at the edge of a filter changes the mass


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_those_of_sample_for_the_same_seed_and_position(backend, device, shape, dtype):
    hidden, weight = inputs(*shape, dtype, device)
    settings = row_settings(shape[0], shape[2], device)
    alone = {name: settings[name] for name in ("temperature", "seed", "position")}
    assert_agrees(hidden, weight, **alone)
    assert_agrees(hidden, weight, **alone, softcap=2.0)


@pytest.mark.parametrize("order", ["hf", "vllm"])
def test_filters_and_penalties_are_those_of_sample(backend, device, order):
    batch, vocab_size = 9, 700
    hidden, weight = inputs(batch, 40, vocab_size, torch.bfloat16, device)
    settings = row_settings(batch, vocab_size, device)
    assert_agrees(hidden, weight, **settings, order=order)
    settings |= {"repetition_penalty": torch.rand(batch, device=device) + 0.5}
    ids = torch.randint(-1, vocab_size, (batch, 30), device=device)
    assert_agrees(hidden, weight, **settings, prompt_ids=ids, output_ids=ids[:, :7], softcap=5.0)


def test_the_most_probable_tokens_are_those_of_sample(backend, device):
    hidden, weight = inputs(5, 24, 90, torch.float32, device)
    ours = fused_linear_sample(hidden, weight, seed=1, position=2, num_logprobs=4)
    exact = of_whole_logits(hidden, weight, seed=1, position=2, num_logprobs=4)
    assert torch.equal(ours.top_ids, exact.top_ids)
    torch.testing.assert_close(ours.top_logprobs, exact.top_logprobs, rtol=1e-4, atol=1e-4)
    assert ours.logprobs is None


def test_draws_follow_the_distribution(backend, device):
    """Chi-square of draws of one row, at a chance of one in ten thousand."""
    batch, vocab_size = 400 if backend == "triton" and device == "cpu" else 4096, 70
    hidden, weight = inputs(1, 16, vocab_size, torch.float32, device)
    position = torch.arange(batch, device=device)
    seed = int(torch.randint(2**62, ()))
    ids = fused_linear_sample(hidden.expand(batch, -1), weight, seed=seed, position=position, temperature=1.3).ids
    expected = (hidden.double() @ weight.double().t() / 1.3).softmax(-1)[0].cpu() * batch
    common = expected >= 5
    seen = torch.bincount(ids.cpu(), minlength=vocab_size).double()
    seen, expected = (torch.cat([t[common], t[~common].sum()[None]]) for t in (seen, expected))
    freedom = len(expected) - 1
    statistic = ((seen - expected).square() / expected.clamp_min(1e-9)).sum().item()
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
    assert statistic < limit, (statistic, limit)


def test_greedy_takes_the_lowest_id_among_equals(backend, device):
    hidden = torch.randint(-8, 9, (3, 16), device=device).float()  # whole numbers: sums in any order are equal
    weight = torch.randint(-8, 9, (300, 16), device=device).float()
    best = (hidden @ weight.t()).argmax(1)
    weight = torch.cat([weight, weight])  # each token twice
    out = fused_linear_sample(hidden, weight, seed=0, position=0, temperature=0.0, return_logprobs=True)
    assert torch.equal(out.ids, best)
    assert out.processed_logprobs.eq(0).all()


def test_rows_from_which_nothing_can_be_drawn_are_invalid(backend, device):
    hidden, weight = inputs(6, 16, 100, torch.float32, device)
    hidden[0, 3] = math.nan
    hidden[1] = 0.0
    hidden[1, 5] = 1e38
    weight[7, 5] = 1e38  # +inf for row 1
    temperature = torch.tensor([1.0, 1.0, -1.0, math.nan, math.inf, 1.0], device=device)
    hidden[2:, 5] = 0.0
    out = fused_linear_sample(hidden, weight, seed=0, position=0, temperature=temperature, return_logprobs=True)
    assert out.valid.tolist() == [False, False, False, False, False, True]
    assert out.ids[:5].eq(0).all()
    assert out.logprobs[:5].isnan().all()
    assert out.logprobs[5].isfinite()


def test_a_row_gives_the_same_bits_whatever_shares_its_batch(device, monkeypatch):
    monkeypatch.setenv("FASTLM_BACKEND", "triton")
    hidden, weight = inputs(20, 48, 500, torch.bfloat16, device)
    settings = {name: t for name, t in row_settings(20, 500, device).items() if name not in ("top_k", "top_p", "min_p")}
    together = fused_linear_sample(hidden, weight, **settings, return_logprobs=True)
    for row in (0, 7, 19):
        one = slice(row, row + 1)
        alone = fused_linear_sample(
            hidden[one], weight, **{name: t[one] for name, t in settings.items()}, return_logprobs=True
        )
        tolerance = 0.0 if device == "cuda" else 1e-6  # the interpreter's product of a row depends on its place
        for a, b in zip(alone[:4], together[:4], strict=True):
            torch.testing.assert_close(a, b[one], rtol=tolerance, atol=tolerance, equal_nan=True)


def test_strides_are_read_without_a_wrong_element(backend, device):
    hidden, weight = inputs(5, 24, 90, torch.float32, device)
    settings = {"seed": 5, "position": torch.arange(10, device=device)[::2], "return_logprobs": True}
    expected = fused_linear_sample(hidden, weight, **settings)
    wide = torch.full((90, 40), math.nan, device=device)
    wide[:, 5:29] = weight
    for h, w in ((hidden.t().contiguous().t(), wide[:, 5:29]), (hidden, wide[:, 5:29])):
        out = fused_linear_sample(h, w, **settings)
        assert torch.equal(out.ids, expected.ids)
        torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)


def test_an_empty_batch_gives_an_empty_result(backend, device):
    hidden, weight = inputs(0, 24, 90, torch.float32, device)
    for settings in ({}, {"top_k": 5}, {"num_logprobs": 3}):
        out = fused_linear_sample(hidden, weight, seed=0, position=0, **settings)
        assert out.ids.shape == (0,)


def test_torch_accepts_the_registration_and_traces_into_one_graph(device):
    hidden, weight = inputs(4, 16, 50, torch.float32, device)
    ones = torch.ones(4, device=device)
    arguments = (hidden, weight, ones, *(None,) * 8, ones.long(), ones.long(), False, 3.0, True, 2)
    torch.library.opcheck(torch.ops.fastlm.fused_linear_sample.default, arguments)

    def draw(h, w):
        return fused_linear_sample(h, w, seed=1, position=2, temperature=0.7).ids

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, weight), draw(hidden, weight))


def test_what_does_not_fit_is_named(monkeypatch):
    hidden, weight = inputs(4, 16, 50, torch.float32, "cpu")
    call = {"seed": 0, "position": 0}
    with pytest.raises(ValueError, match=r"must be \(batch, hidden_size\) and \(vocab_size, hidden_size\)"):
        fused_linear_sample(hidden, weight.t(), **call)
    with pytest.raises(ValueError, match="must have one dtype"):
        fused_linear_sample(hidden.half(), weight, **call)
    with pytest.raises(ValueError, match="softcap must be positive"):
        fused_linear_sample(hidden, weight, **call, softcap=0.0)
    with pytest.raises(ValueError, match="num_logprobs must be between 0 and vocab_size"):
        fused_linear_sample(hidden, weight, **call, num_logprobs=51)
    with pytest.raises(ValueError, match="temperature must be a finite number"):
        fused_linear_sample(hidden, weight, **call, temperature=-1.0)
    assert explain("fused_linear_sample", hidden, weight, **call).chosen == "cpu"
    monkeypatch.setenv("FASTLM_BACKEND", "triton")
    reasons = explain("fused_linear_sample", hidden, weight.t().contiguous().t(), **call).reasons
    assert "last dimension is contiguous" in reasons["triton"]


def compile_kernels(dtype: str, hidden_size: int, chip: int, **flags: bool) -> list[Any]:
    from fastlm.ops.fused_linear_sample import triton as kernels

    cut = kernels.tiles(torch.float32 if dtype == "fp32" else torch.bfloat16, chip)
    compiled = []
    for kernel, warps, extra in (
        (kernels._group_kernel, cut.num_warps, {"BLOCK_K": cut.block_k}),
        (kernels._draw_kernel, kernels.DRAW_WARPS, {"BLOCK_K": kernels.DRAW_BLOCK_K, "GROUPS": kernels.GROUPS}),
    ):
        names = kernel.arg_names
        signature = {n: "*fp32" for n in names if n.endswith("_ptr")} | {"softcap": "fp32"}
        signature |= {"hidden_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "valid_ptr": "*i1"}
        signature |= dict.fromkeys(["seed_ptr", "position_ptr", "ids_ptr"], "*i64")
        signature |= dict.fromkeys(["hidden_stride", "weight_stride", "batch", "vocab_size", "groups"], "i32")
        constants = {"SOFTCAP": False, "RAW": True, "HIDDEN_SIZE": hidden_size, "BLOCK_M": cut.block_m} | flags
        constants |= {"BLOCK_N": cut.block_n, "PRECISION": "ieee", "STAGES": cut.num_stages} | extra
        compiled += compile_for_chips(
            kernel,
            {n: kind for n, kind in signature.items() if n in names},
            {n: value for n, value in constants.items() if n in names},
            num_warps=warps,
            divisible_by_16=["hidden_stride", "weight_stride"],
            capabilities=[chip],
        )
    return compiled


@pytest.mark.aot
@pytest.mark.parametrize("chip", [80, 90, 100])
@pytest.mark.parametrize("hidden_size", [4096, 2056])
def test_kernels_use_tensor_cores_and_do_not_spill(chip, hidden_size):
    instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[chip]
    for softcap in (False, True):
        group, draw = compile_kernels("bf16", hidden_size, chip, SOFTCAP=softcap)
        assert instruction in group.ptx
        assert group.spill_bytes == draw.spill_bytes == 0, (group.spill_bytes, draw.spill_bytes)
        assert group.shared_bytes <= {80: 99, 90: 227, 100: 227}[chip] * 1024


@pytest.mark.aot
@pytest.mark.parametrize("chip", [80, 90])
def test_exact_fp32_does_not_spill(chip):
    for compiled in compile_kernels("fp32", 4096, chip):
        assert compiled.spill_bytes == 0
        assert compiled.tensor_core_instructions == 0
