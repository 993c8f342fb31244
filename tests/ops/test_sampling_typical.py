"""typical_p where it is served: the sets of the definition, save where rounding decides, and their draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.ops import _registry, explain, sample
from fastlm.ops.sampling import OP, Sample, cuda, reference
from fastlm.ops.sampling import triton as kernels
from fastlm.ops.sampling.triton_search import nearness_key, to_key
from fastlm.ops.sampling.triton_typical import typical
from tests.ops.helpers import compile_for_chips, poisoned_memory
from tests.ops.test_sampling_cpu import KINDS, logits_of
from tests.ops.test_sampling_triton import sample_signature

ROUNDING = {"triton": 5e-7, "cpu": 1e-7}  # of shares, and of the entropy
TOLERANCE = {"triton": 1e-5, "cpu": 1e-6}  # of log-probabilities
Settings = dict[str, Any]


@pytest.fixture(params=[name for name in OP.backends if name in ROUNDING])
def backend(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu" and device == "cuda":
        pytest.skip("runs on CPU tensors")
    monkeypatch.setenv("FASTLM_BACKEND", request.param)
    return request.param


def drawn(logits: Tensor, settings: Settings, **kwargs: Any) -> Sample:
    with poisoned_memory():
        return sample(logits, **settings, return_logprobs=True, **kwargs)


def settings_of(batch: int, vocab_size: int, device: str, **others: list[float]) -> Settings:
    """A value a row: typical_p of every size, temperatures, and of each of `others` one of the values given."""

    def one_of(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (batch,))].to(device)

    settings = {name: one_of(values) for name, values in others.items() if name != "top_k"}
    if "top_k" in others:
        settings["top_k"] = one_of(others["top_k"], torch.int64)
    common = one_of([0.0, 0.2, 0.9, 0.999, 1.0])
    return settings | {
        "temperature": one_of([0.3, 0.8, 1.0, 3.0]),
        "typical_p": torch.where(torch.rand(batch, device=device) < 0.5, torch.rand(batch, device=device), common),
        "seed": torch.randint(-(2**63), 2**63 - 1, (batch,), device=device),
        "position": torch.randint(-(2**63), 2**63 - 1, (batch,), device=device),
    }


def typical_set(weights: Tensor, typical_p: float, shift: float) -> Tensor:
    """Equation 10 word by word for one row, with the entropy moved by `shift`: which tokens stay."""
    shares = weights / weights.sum()
    tokens = (shares > 0).nonzero()[:, 0]
    surprise = -shares[tokens].log()
    distance = (surprise - (shares[tokens] * surprise).sum() - shift).abs()
    levels, level = distance.unique(return_inverse=True)  # ascending
    masses = torch.zeros_like(levels).scatter_add_(0, level, shares[tokens])
    before = masses.cumsum(0) - masses
    stays = (before < typical_p) | (typical_p >= 1)
    stays[0] = True
    kept = torch.zeros_like(weights, dtype=torch.bool)
    kept[tokens] = stays[level]
    return kept


def kept_set(x: Tensor, own: Settings, order: str, error: float = 0.0, shift: float = 0.0) -> Tensor:
    """The weights that are left of one row, with each share that a filter is given too large by `error`."""

    def moved(name: str) -> Tensor | None:
        value = own.get(name)
        return value if value is None else torch.where(value >= 1, value, value * (1 + error))

    filters = (own.get("top_k"), moved("top_p"), moved("min_p"))
    kept, weights = reference.filtered(x[None], own["temperature"], *filters, order == "vllm")
    weights = (weights * kept)[0]
    return weights * typical_set(weights, own["typical_p"].double().item() * (1 + error), shift)


def assert_kept_sets(logits: Tensor, settings: Settings, order: str, backend: str, unsettled: int) -> None:
    """Draws and log-probabilities, in which the kept set shows as its sum, are the definition's in all rows but those
    where a change of ROUNDING in a share or the entropy gives another set or another token: at most `unsettled`.
    """
    rounding = ROUNDING[backend]
    ours = drawn(logits, settings, order=order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLM_BACKEND", "reference")
        exact = drawn(logits, settings, order=order)
    assert torch.equal(ours.valid, exact.valid)
    assert ours.valid.all()
    left = 0
    for row in range(len(logits)):
        own = {name: value[row : row + 1].cpu() for name, value in settings.items()}
        x = logits[row].float().cpu()
        weights = kept_set(x, own, order)
        changes = [(error, shift) for error in (-rounding, rounding) for shift in (-rounding, rounding)]
        others = [kept_set(x, own, order, *change) for change in changes]
        running = weights.cumsum(0) / weights.sum()
        u = reference.uniform(own["seed"], own["position"])
        if any(not torch.equal(weights > 0, w > 0) for w in others) or (running - u).abs().min() < rounding:
            left += 1
            continue
        token = int(exact.ids[row])
        assert token == ours.ids[row], (row, own)
        expected = (weights[token] / weights.sum()).log().item()
        for out in (exact, ours):
            assert out.processed_logprobs[row].item() == pytest.approx(expected, abs=max(4 * rounding, 1e-6)), (
                row,
                own,
            )
    assert left <= unsettled, f"{left} of {len(logits)} rows hang on rounding"


@pytest.mark.parametrize("order", ["hf", "vllm"])
@pytest.mark.parametrize("vocab_size", [1, 7, 511, 4097])
def test_kept_sets_and_draws_are_those_of_the_definition(backend, device, vocab_size, order):
    """About one row in a hundred hangs on rounding; of 8,000 such rows on the CPU, one gave another set."""
    kinds = KINDS * 8
    if backend == "triton" and device == "cpu":  # interpreted
        kinds = [KINDS[i] for i in torch.randperm(len(KINDS))[: 2 if vocab_size > 4000 else 8]]
    logits = torch.stack([logits_of(kind, vocab_size) for kind in kinds]).to(device)
    others = {"top_k": [0, 1, 3, 50, 2000], "top_p": [0.1, 0.5, 0.9, 1.0], "min_p": [0.0, 0.0, 0.01, 0.3]}
    for given in ({}, others):
        settings = settings_of(len(kinds), vocab_size, device, **given)
        assert_kept_sets(logits, settings, order, backend, unsettled=max(2, len(kinds) // 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_vocabularies_and_short_dtypes(backend, device, dtype):
    """One row in thirty hangs on rounding on the CPU where 50,257 tokens, of shares of some 2e-5, are drawn from."""
    interpreted = backend == "triton" and device == "cpu"
    kinds = ["normal"] if interpreted else ["flat", "normal", "peaked", "equal", "two levels", "masked"] * 2
    logits = torch.stack([logits_of(kind, 2000 if interpreted else 50_257) for kind in kinds]).to(device, dtype)
    settings = settings_of(len(kinds), logits.shape[1], device)
    assert_kept_sets(logits, settings, "hf", backend, unsettled=1 if interpreted else 6)


def test_frequencies_of_draws_are_the_probabilities(backend, device):
    """Entropy 1.64, surprises 0.92, 2.66 and 1.39: the token of 0.25 comes first, that of 0.4 next, the others last."""
    interpreted = backend == "triton" and device == "cpu"
    draws = 50 if interpreted else 20_000
    shares = torch.tensor([0.4, *[0.07] * 5, 0.25], dtype=torch.float64)
    row = shares.log().float().to(device)
    first = int(torch.randint(0, 2**40, ()))
    seed = first + torch.arange(draws, device=device)
    cases = [(0.2, [6]), (0.6, [0, 6]), (0.64, [0, 6]), (0.66, range(7))]
    for typical_p, kept in cases[2:3] if interpreted else cases:
        ids = sample(row.expand(draws, 7), typical_p=typical_p, seed=seed, position=1).ids
        counts = torch.bincount(ids.cpu(), minlength=7)
        inside = torch.zeros(7, dtype=torch.bool).index_fill_(0, torch.tensor(list(kept)), True)
        expected = torch.where(inside, shares, 0.0)
        expected *= draws / expected.sum()
        assert counts[~inside].sum() == 0
        chi_square = ((counts - expected)[inside] ** 2 / expected[inside]).sum().item()
        assert chi_square < 44, (typical_p, counts)  # 1e-7 and beyond, with 6 degrees of freedom


def test_the_largest_logit_is_dropped_where_its_surprise_is_far_from_the_entropy(backend, device):
    """0.3 and 700 tokens of 0.001: the entropy is 5.2, the surprise 1.2 of the one and 6.9 of the others."""
    logits = torch.tensor([0.3] + [0.001] * 700, device=device).log()[None]
    out = sample(logits, typical_p=0.6, seed=5, position=0, return_logprobs=True)
    assert out.ids.item() > 0
    assert out.processed_logprobs.item() == pytest.approx(-math.log(700), abs=1e-5)
    whole = sample(logits, typical_p=0.71, seed=5, position=0, return_logprobs=True)
    assert whole.processed_logprobs.item() == pytest.approx(math.log(logits.exp()[0, whole.ids].item()), abs=1e-5)


def test_equal_logits_stay_together_and_so_do_those_whose_weight_is_one(backend, device):
    vocab_size = 5000
    levels = torch.randint(4, (vocab_size,)) * 1.5
    for typical_p in (0.0, 0.3, 0.8):
        out = sample(levels[None].to(device), typical_p=typical_p, seed=3, position=4, return_logprobs=True)
        kept = typical_set(levels.double().exp(), typical_p, 0.0)
        assert all((levels[kept][0] != levels[~kept]).tolist())
        share = (levels.double().exp()[out.ids.cpu()] / levels.double().exp()[kept].sum()).log().item()
        assert out.processed_logprobs.item() == pytest.approx(share, abs=1e-5)
    neighbours = (torch.randperm(vocab_size).int() + 0x3F7FF000).view(torch.float32)[None].to(device)
    out = sample(neighbours, temperature=1e30, typical_p=0.1, seed=3, position=4, return_logprobs=True)
    assert out.processed_logprobs.item() == pytest.approx(-math.log(vocab_size), abs=1e-5)


def test_a_row_is_drawn_as_without_the_others_and_as_without_a_typical_p_of_one(backend, device):
    batch, vocab_size = 6, 700
    logits = torch.randn(batch, vocab_size, device=device) * 3
    settings = settings_of(batch, vocab_size, device, top_k=[0, 40], top_p=[0.9, 1.0], min_p=[0.0, 0.01])
    settings["typical_p"] = torch.tensor([1.0, 0.5, 7.0, 0.0, 0.95, 1.0], device=device)
    together = drawn(logits, settings)
    for row in range(batch):
        own = {name: value[row : row + 1] for name, value in settings.items()}
        alone = drawn(logits[row : row + 1], own)
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together[:4], alone[:4], strict=True))
        if own.pop("typical_p") >= 1:
            alone = drawn(logits[row : row + 1], own)
            assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together[:4], alone[:4], strict=True))


def test_temperature_zero_ignores_it_and_what_cannot_be_drawn_is_told(backend, device):
    logits = torch.randn(8, 300, device=device)
    logits[2, 7] = math.nan
    logits[3] = -math.inf
    settings = settings_of(8, 300, device) | {"temperature": torch.tensor([0.0] * 4 + [1.0] * 4, device=device)}
    settings["typical_p"] = torch.tensor([0.1, 1.0, 0.5, 0.5, math.nan, -0.1, math.inf, 0.0], device=device)
    out = drawn(logits, settings)
    assert out.valid.tolist() == [True, True, False, False, False, False, False, True]
    assert torch.equal(out.ids[:2], logits[:2].argmax(1))
    assert out.processed_logprobs[:2].tolist() == [0.0, 0.0]
    assert (out.ids[2:7] == 0).all()
    assert out.processed_logprobs[2:7].isnan().all()


def test_strided_rows_bias_mask_and_penalties_come_before_it(backend, device):
    wide = torch.randn(9, 500, device=device) * 2
    logits, vocab_size = wide[::3, 100:237], 137
    settings = settings_of(3, vocab_size, device) | {"typical_p": torch.tensor([0.3, 0.9, 0.6], device=device)}
    first, copied = drawn(logits, settings), drawn(logits.contiguous(), settings)
    assert all(torch.equal(a, b) for a, b in zip(first[:4], copied[:4], strict=True))
    bias, mask = torch.randn(3, vocab_size, device=device), torch.randint(-(2**31), 2**31, (3, 5), device=device)
    mask[:, 0] |= 1
    penalty = {"repetition_penalty": 1.5, "output_ids": torch.randint(0, vocab_size, (3, 20), device=device)}
    edited = drawn(logits, settings, logit_bias=bias, mask=mask.int(), **penalty)
    x = reference.adjusted(logits, bias, mask.int())
    x = reference.penalized(x, torch.full((3,), 1.5, device=device), None, None, None, penalty["output_ids"])
    plain = drawn(x, settings)
    assert torch.equal(edited.ids, plain.ids)
    torch.testing.assert_close(edited.processed_logprobs, plain.processed_logprobs)


def test_a_call_on_a_gpu_goes_to_triton_and_not_to_the_cuda_core(monkeypatch):
    monkeypatch.setattr(
        _registry, "_wrong_device", lambda backend, device: "" if backend != "cpu" else "runs elsewhere"
    )
    monkeypatch.setattr(_registry, "missing", lambda backend: None)
    settings = {"temperature": 1.0, "num_logprobs": 0}
    assert cuda.supports(torch.randn(1, 4), typical_p=torch.ones(1), **settings) == "has no typical_p"
    answer = explain("sampling", torch.randn(1, 4), seed=0, position=0, typical_p=0.9)
    assert answer.chosen == "triton"
    assert answer.reasons["cuda"] == "has no typical_p"


@triton.jit
def _typical_kernel(x_ptr, settings_ptr, kept_ptr, vocab_size, lowest, LANES: tl.constexpr):
    typical_p = tl.load(settings_ptr)
    max_logit = tl.load(settings_ptr + 1)
    one = tl.full((), 1.0, tl.float32)
    center, rest, nearest = typical(
        x_ptr, vocab_size, lowest, typical_p, max_logit, one, one * 1.4426950408889634, 0.0, False, 1, LANES, 1
    )  # fmt: skip
    for start in range(0, vocab_size, LANES):
        ids = start + tl.arange(0, LANES)
        x = tl.load(x_ptr + ids, ids < vocab_size, float("-inf"))
        kept = (to_key(x) >= lowest) & (nearness_key(x, max_logit, (one, center, rest)) >= nearest)
        tl.store(kept_ptr + ids, kept, ids < vocab_size)


def test_the_search_in_triton_gives_the_set_token_by_token(device):
    vocab_size = 700
    x = torch.randn(vocab_size, device=device) * 2
    lowest = x.sort().values[300]
    for typical_p in (0.1, 0.5, 0.9):
        kept = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        bits = lowest.view(torch.int32).item()
        key = bits if bits >= 0 else -(bits & 0x7FFFFFFF)
        settings = torch.tensor([typical_p, x.max()], device=device)
        _typical_kernel[(1,)](x, settings, kept, vocab_size, key, LANES=512)
        weights = torch.where(x >= lowest, (x - x.max()).double().exp(), 0.0).cpu()
        sets = [typical_set(weights, typical_p * (1 + e), s) for e in (-2e-6, 2e-6) for s in (-2e-6, 0.0, 2e-6)]
        assert any(torch.equal(kept.cpu(), each) for each in sets)


@pytest.mark.aot
@pytest.mark.parametrize(("dtype", "vector"), [("fp32", 4), ("bf16", 8), ("bf16", 1)])
def test_it_compiles_with_every_option_and_without_spills(dtype, vector):
    signature = sample_signature(dtype) | {"raw_ptr": f"*{dtype}"}
    constants = {"MIN_P_FIRST": False, "BLOCKS": 32, "TILES": kernels.ELEMENTS_PER_THREAD // vector}
    constants |= {"LANES": kernels.LANES, "VECTOR": vector}
    for compiled in compile_for_chips(kernels._sample_kernel, signature, constants, num_warps=kernels.NUM_WARPS):
        assert compiled.spill_bytes == 0, compiled.chip
        assert compiled.registers <= 128  # 512 threads
