from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastlm.ops import sample
from fastlm.ops.sampling import OP, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[name for name in OP.backends if name != "cuda"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTLM_BACKEND", request.param)
    return request.param


def seeds(batch: int, device: str) -> dict[str, Tensor]:
    """Fresh seeds and positions, all 64 bits of them."""
    shape = (batch,)
    return {name: torch.randint(-(2**63), 2**63 - 1, shape, device=device) for name in ("seed", "position")}


def rows(backend: str, device: str, interpreted: int, otherwise: int) -> int:
    """How many rows a test draws: few where Triton's interpreter takes tens of milliseconds for each."""
    return interpreted if backend == "triton" and device == "cpu" else otherwise


def per_row(values: list[float], device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_words_that_its_authors_published(counter, key, expected):
    """Known answers of the Random123 distribution, kat_vectors, philox4x32 10."""
    words = reference.philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert [int(w) for w in words] == expected


def test_draws_follow_the_published_random_numbers(backend, device):
    """Seed 0, position 0: u = 0x6627E8D5E169C58D / 2^64 = 0.39904... falls on the id whose share of equals holds it."""
    for vocab_size in (2, 10, 1000):
        out = sample(torch.zeros(1, vocab_size, device=device), seed=0, position=0)
        assert out.ids.tolist() == [math.floor(0x6627E8D5E169C58D / 2**64 * vocab_size)]


def warped(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """What transformers samples from."""
    from transformers.generation import logits_process as hf

    scores = hf.TemperatureLogitsWarper(temperature)(None, logits.float())
    if top_k:
        scores = hf.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = hf.TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = hf.MinPLogitsWarper(min_p)(None, scores)
    return scores


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.7, 5, 1.0, 0.0),
        (1.3, 0, 0.8, 0.0),
        (0.9, 0, 1.0, 0.1),
        (2.0, 20, 0.7, 0.05),
        (1.0, 1, 1.0, 0),
    ],
)
def test_the_distribution_drawn_from_is_that_of_transformers(backend, device, dtype, temperature, top_k, top_p, min_p):
    """The log-probability of each drawn token, in which the whole kept set shows as its sum, equals transformers'."""
    batch = rows(backend, device, 6, 48)
    logits = (torch.randn(batch, 131, device=device) * 2).to(dtype)
    out = sample(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        return_logprobs=True,
        **seeds(batch, device),
    )
    # A tie at the edge of the nucleus is kept whole here and cut by transformers: such rows are left out.
    expected = warped(logits, temperature, top_k, top_p, min_p).log_softmax(1)
    kept = expected.isfinite()
    lowest = torch.where(kept, logits.float(), torch.inf).amin(1, keepdim=True)
    clear = ((logits.float() >= lowest) == kept).all(1)
    assert out.valid.all()
    assert clear.sum() >= (batch if dtype == torch.float32 else batch // 3)
    at_ids = expected.gather(1, out.ids[:, None])[:, 0]
    torch.testing.assert_close(out.processed_logprobs[clear], at_ids[clear], rtol=1e-4, atol=1e-4)
    raw = logits.double().log_softmax(1).gather(1, out.ids[:, None])[:, 0]
    torch.testing.assert_close(out.logprobs, raw.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", [{}, {"top_k": 40}, {"top_p": 0.95}])
@pytest.mark.parametrize("typical_p", [0.2, 0.9, 0.999, 1.0])
def test_typical_keeps_what_transformers_keeps(backend, device, typical_p, other):
    from transformers.generation import logits_process as hf

    batch = rows(backend, device, 4, 32)
    logits = torch.randn(batch, 131, device=device) * 3
    out = sample(logits, temperature=0.8, typical_p=typical_p, **other, return_logprobs=True, **seeds(batch, device))
    scores = warped(logits, 0.8, other.get("top_k", 0), other.get("top_p", 1.0), 0.0)
    if typical_p < 1:
        scores = hf.TypicalLogitsWarper(typical_p)(None, scores)
    expected = scores.log_softmax(1)
    at_ids = expected.gather(1, out.ids[:, None])[:, 0]
    torch.testing.assert_close(out.processed_logprobs, at_ids, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.85}, {"min_p": 0.1, "top_p": 0.95}])
def test_frequencies_of_draws_are_the_probabilities(backend, device, filters):
    draws = rows(backend, device, 80, 20_000)
    row = torch.randn(7, device=device) * 1.5
    logits = row.expand(draws, 7)  # every row is the same memory
    first = int(torch.randint(0, 2**40, ()))
    out = sample(logits, seed=first + torch.arange(draws, device=device), position=3, temperature=1.2, **filters)
    low_p = filters.get("top_p", 1.0)
    expected = warped(row[None].cpu(), 1.2, filters.get("top_k", 0), low_p, filters.get("min_p", 0.0)).softmax(1)[0]
    counts = torch.bincount(out.ids.cpu(), minlength=7)
    assert counts[expected == 0].sum() == 0
    inside = expected > 0
    chi_square = ((counts[inside] - draws * expected[inside]) ** 2 / (draws * expected[inside])).sum().item()
    # 1e-7 and beyond of the distribution with 6 degrees of freedom lies above 44.
    assert chi_square < 44, (counts, expected)


def test_successive_seeds_and_positions_draw_independently(backend, device):
    draws = rows(backend, device, 32, 4096)
    logits = torch.zeros(draws, 1024, device=device)
    steps = torch.arange(draws, device=device)
    for changing in (
        {"seed": 1, "position": steps},
        {"seed": steps, "position": 1},
        {"seed": steps << 32, "position": 1},
    ):
        x = sample(logits, **changing).ids.double() / 1024
        serial = torch.corrcoef(torch.stack([x[1:], x[:-1]]))[0, 1].item()
        assert abs(serial) < 6 / math.sqrt(draws)
        assert abs(x.mean().item() - 0.5) < 6 * math.sqrt(1 / 12 / draws)


def test_a_row_draws_the_same_whatever_stands_beside_it(backend, device):
    batch, vocab_size = 6, 300
    logits = torch.randn(batch, vocab_size, device=device) * 3
    settings = {
        "temperature": torch.rand(batch, device=device) + 0.3,
        "top_k": torch.randint(0, 50, (batch,), device=device),
        "top_p": torch.rand(batch, device=device) * 0.5 + 0.5,
        "min_p": torch.rand(batch, device=device) * 0.05,
        "repetition_penalty": torch.rand(batch, device=device) + 1,
        "prompt_ids": torch.randint(-1, vocab_size, (batch, 9), device=device),
        **seeds(batch, device),
    }
    together = sample(logits, **settings, return_logprobs=True, num_logprobs=4)
    order = torch.randperm(batch, device=device)
    shuffled = sample(logits[order], **{k: v[order] for k, v in settings.items()}, return_logprobs=True, num_logprobs=4)
    for a, b in zip(together, shuffled, strict=True):
        assert torch.equal(a[order], b)
    for i in range(batch):
        alone = sample(
            logits[i : i + 1],
            **{k: v[i : i + 1] for k, v in settings.items()},
            return_logprobs=True,
            num_logprobs=4,
        )
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


def test_numbers_and_rows_of_numbers_mean_the_same(backend, device):
    logits = torch.randn(4, 50, device=device)
    settings = {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "presence_penalty": 0.5, "frequency_penalty": -0.25}
    ids = torch.randint(0, 50, (4, 5), device=device)
    a = sample(logits, **settings, top_k=9, seed=5, position=7, output_ids=ids, return_logprobs=True)
    rows = {name: per_row([value] * 4, device) for name, value in settings.items()}
    integers = {
        name: per_row([value] * 4, device, torch.int64) for name, value in (("top_k", 9), ("seed", 5), ("position", 7))
    }
    b = sample(logits, **rows, **integers, output_ids=ids, return_logprobs=True)
    assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_temperature_zero_takes_the_largest_and_the_lowest_id_of_equals(backend, device, dtype):
    logits = torch.randn(5, 200, device=device).to(dtype)
    logits[:, [17, 60, 199]] = 9.0
    out = sample(logits, temperature=0, top_k=3, seed=1, position=1, return_logprobs=True)
    assert out.ids.tolist() == [17] * 5
    assert out.processed_logprobs.tolist() == [0.0] * 5


def test_temperatures_near_zero_and_far_above_one_stay_exact(backend, device):
    logits = torch.tensor([[1e30, 3.0, -1e30], [88.0, 88.0, -3e38]], device=device)
    tiny = sample(logits, temperature=1e-38, seed=3, position=0, return_logprobs=True)
    assert tiny.valid.all()
    assert tiny.ids[0] == 0
    assert tiny.processed_logprobs.tolist() == pytest.approx([0.0, math.log(0.5)])
    flat = sample(
        torch.tensor([[5.0, -5.0]], device=device), temperature=1e30, seed=3, position=0, return_logprobs=True
    )
    assert flat.processed_logprobs.tolist() == pytest.approx([math.log(0.5)])


def test_equal_logits_at_a_threshold_are_kept_together(backend, device):
    draws = rows(backend, device, 3, 64)
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0, -1.0]], device=device).expand(draws, 6)
    for filters, shares in (
        ({"top_k": 2}, [0, math.e, 1, 1, 1, 0]),
        ({"top_k": 5}, [1 / math.e, math.e, 1, 1, 1, 0]),
        ({"top_p": 0.55}, [0, math.e, 1, 1, 1, 0]),
        ({"top_p": 0.4}, [0, 1, 0, 0, 0, 0]),
        ({"min_p": math.exp(-1) - 1e-6}, [0, math.e, 1, 1, 1, 0]),
        ({"top_p": 1e-12}, [0, 1, 0, 0, 0, 0]),
        ({"top_p": 0.0}, [0, 1, 0, 0, 0, 0]),
        ({"min_p": 1.0}, [0, 1, 0, 0, 0, 0]),
        ({"top_k": 0, "top_p": 1.0, "min_p": 0.0}, [1 / math.e, math.e, 1, 1, 1, math.exp(-2)]),
        ({"top_k": 10**12}, [1 / math.e, math.e, 1, 1, 1, math.exp(-2)]),
    ):
        out = sample(logits, seed=torch.arange(draws, device=device), position=0, return_logprobs=True, **filters)
        expected = torch.tensor(shares, device=device).float()
        assert (expected[out.ids] > 0).all(), filters
        torch.testing.assert_close(out.processed_logprobs, (expected / expected.sum()).log()[out.ids])


def test_order_decides_over_what_the_nucleus_is_taken(backend, device):
    """Shares 0.5, 0.3, 0.15, 0.05 with min_p 0.2 (drops the last) and top_p 0.82.

    transformers: of all, 0.5 + 0.3 = 0.80 < 0.82 keeps the third. vLLM: of 0.95 that min_p leaves, 0.80 / 0.95 = 0.84
    is above 0.82 and drops it.
    """
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], device=device).log().expand(24, 4)
    seed = torch.arange(24, device=device)
    hf = sample(logits, top_p=0.82, min_p=0.2, order="hf", seed=seed, position=0, return_logprobs=True)
    vllm = sample(logits, top_p=0.82, min_p=0.2, order="vllm", seed=seed, position=0, return_logprobs=True)
    for out, shares in ((hf, [0.5, 0.3, 0.15, 0]), (vllm, [0.5, 0.3, 0, 0])):
        expected = torch.tensor(shares, device=device)
        torch.testing.assert_close(out.processed_logprobs, (expected / expected.sum()).log()[out.ids])
    assert set(hf.ids.tolist()) == {0, 1, 2}
    assert set(vllm.ids.tolist()) == {0, 1}


def test_repetition_penalty_is_that_of_transformers(backend, device):
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(8, 40, device=device) * 2
    prompt, output = torch.randint(0, 40, (8, 12), device=device), torch.randint(0, 40, (8, 5), device=device)
    out = sample(
        logits, repetition_penalty=1.7, prompt_ids=prompt, output_ids=output, return_logprobs=True, **seeds(8, device)
    )
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.cat([prompt, output], 1), logits.clone()).log_softmax(1)
    torch.testing.assert_close(out.processed_logprobs, expected.gather(1, out.ids[:, None])[:, 0])


def test_presence_and_frequency_penalties_are_those_of_the_openai_api(backend, device):
    """mu[j] - c[j] · alpha_frequency - (c[j] > 0) · alpha_presence, c counting the output alone; -1 is padding."""
    logits = torch.randn(6, 30, device=device)
    output = torch.randint(0, 30, (6, 20), device=device)
    output[:, ::4] = -1
    output[:, 1] = output[:, 2]
    output[0, 5] = 10**15
    prompt = torch.randint(0, 30, (6, 7), device=device)
    out = sample(
        logits,
        presence_penalty=0.6,
        frequency_penalty=0.4,
        prompt_ids=prompt,
        output_ids=output,
        return_logprobs=True,
        **seeds(6, device),
    )
    expected = logits.clone()
    for row in range(6):
        counted: dict[int, int] = {}
        for token in output[row].tolist():
            if 0 <= token < 30:
                counted[token] = counted.get(token, 0) + 1
        for token, count in counted.items():
            expected[row, token] -= 0.4 * count + 0.6
    at_ids = expected.log_softmax(1).gather(1, out.ids[:, None])[:, 0]
    torch.testing.assert_close(out.processed_logprobs, at_ids, rtol=1e-5, atol=1e-5)


def packed_bits(allowed: Tensor) -> Tensor:
    """(batch, vocab_size) of bool to words of 32 tokens, the lowest bit first."""
    batch, vocab_size = allowed.shape
    padded = torch.zeros(batch, (vocab_size + 31) // 32 * 32, dtype=torch.int64)
    padded[:, :vocab_size] = allowed.cpu()
    words = (padded.view(batch, -1, 32) << torch.arange(32)).sum(-1)
    return words.to(torch.int32).to(allowed.device)  # the highest bit is the sign


@pytest.mark.parametrize("vocab_size", [32, 75])
def test_bias_and_mask_shape_what_is_drawn_and_not_the_raw_log_probabilities(backend, device, vocab_size):
    batch = rows(backend, device, 6, 40)
    logits = torch.randn(batch, vocab_size, device=device) * 2
    bias = torch.randn(vocab_size, device=device) * 3
    allowed = torch.rand(batch, vocab_size, device=device) < 0.4
    allowed[:, vocab_size - 1] = True
    settings = {"temperature": 0.7, "top_k": 5, **seeds(batch, device)}
    for its_bias in (bias, bias.expand(batch, -1) + torch.randn(batch, 1, device=device)):
        out = sample(
            logits, logit_bias=its_bias, mask=packed_bits(allowed), return_logprobs=True, num_logprobs=3, **settings
        )
        x = (logits + its_bias).masked_fill(~allowed, -math.inf)
        assert allowed.gather(1, out.ids[:, None]).all()
        expected = warped(x, 0.7, 5, 1.0, 0.0).log_softmax(1).gather(1, out.ids[:, None])[:, 0]
        torch.testing.assert_close(out.processed_logprobs, expected, rtol=1e-4, atol=1e-4)
        plain = sample(logits, num_logprobs=3, **settings)
        assert torch.equal(out.top_ids, plain.top_ids)
        torch.testing.assert_close(out.top_logprobs, plain.top_logprobs)
        raw = logits.log_softmax(1).gather(1, out.ids[:, None])[:, 0]
        torch.testing.assert_close(out.logprobs, raw, rtol=1e-5, atol=1e-5)
        again = sample(x, **settings)
        assert torch.equal(out.ids, again.ids)


def test_bias_comes_before_penalties_and_a_mask_of_nothing_is_invalid(backend, device):
    logits = torch.randn(3, 40, device=device)
    bias = torch.full((40,), 2.0, device=device)
    ids = torch.arange(40, device=device).expand(3, -1)
    settings = {"repetition_penalty": 2.0, "prompt_ids": ids, "temperature": 0.0, "return_logprobs": True}
    out = sample(logits, logit_bias=bias, **settings, **seeds(3, device))
    x = logits + 2
    assert torch.equal(out.ids, torch.where(x > 0, x / 2, x * 2).argmax(1))
    none = torch.zeros(3, 2, dtype=torch.int32, device=device)
    none[1, 1] = 1 << 3
    out = sample(logits, mask=none, return_logprobs=True, num_logprobs=2, **seeds(3, device))
    assert out.valid.tolist() == [False, True, False]
    assert out.ids.tolist() == [0, 35, 0]
    assert out.logprobs.isnan().tolist() == out.top_logprobs[:, 0].isnan().tolist() == [True, False, True]
    beyond = torch.tensor([[-1, 0b11111111], [0, 1 << 8], [-1, -1]], dtype=torch.int32, device=device)
    assert sample(logits, mask=beyond, **seeds(3, device)).valid.tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_most_probable_tokens_come_in_order_and_ties_by_id(backend, device, dtype):
    logits = torch.randn(5, 77, device=device).to(dtype)
    logits[:, 70] = logits[:, 3] = logits.amax(1)
    out = sample(logits, temperature=0.5, num_logprobs=6, **seeds(5, device))
    order = logits.float().sort(dim=1, descending=True, stable=True).indices[:, :6]
    assert torch.equal(out.top_ids, order)
    expected = logits.double().log_softmax(1).gather(1, order).float()
    torch.testing.assert_close(out.top_logprobs, expected, rtol=1e-5, atol=1e-5)
    assert out.logprobs is None


def test_rows_that_cannot_be_drawn_from_are_told_and_others_are_not_touched(backend, device):
    logits = torch.randn(12, 64, device=device)
    logits[1, 5] = math.nan
    logits[2] = -math.inf
    logits[3, 9] = math.inf
    logits[4, :-1] = -math.inf  # one possible token
    ones = torch.ones(12, device=device)
    settings = {name: ones.clone() for name in ("temperature", "top_p", "min_p", "repetition_penalty")}
    settings["min_p"] *= 0.01
    settings["presence_penalty"] = torch.zeros(12, device=device)
    for row, (name, value) in enumerate(
        [
            ("temperature", -1.0),
            ("temperature", math.nan),
            ("top_p", math.nan),
            ("min_p", 1.5),
            ("repetition_penalty", 0.0),
            ("presence_penalty", math.inf),
        ],
        start=5,
    ):
        settings[name][row] = value
    drawn = seeds(12, device)
    ids = torch.randint(0, 64, (12, 3), device=device)
    out = sample(logits, **settings, output_ids=ids, **drawn, return_logprobs=True, num_logprobs=2)
    assert out.valid.tolist() == [True, False, False, False, True, *[False] * 6, True]
    invalid = ~out.valid
    assert out.ids[4] == 63
    assert (out.ids[invalid] == 0).all()
    assert (out.top_ids[invalid] == 0).all()
    for logprobs in (out.logprobs, out.processed_logprobs, out.top_logprobs):
        assert logprobs[invalid].isnan().all()
        assert logprobs[0].isfinite().all()
    good = [0, 4, 11]
    clean = sample(
        logits[good],
        **{k: v[good] for k, v in settings.items()},
        output_ids=ids[good],
        **{k: v[good] for k, v in drawn.items()},
    )
    assert torch.equal(out.ids[good], clean.ids)


def test_strided_rows_are_read_as_they_lie_and_nothing_is_written_to_them(backend, device):
    wide = torch.randn(9, 500, device=device)
    logits = wide[::3, 100:237]
    before = wide.clone()
    settings = {"temperature": 0.9, "top_k": 30, "repetition_penalty": 1.5, **seeds(3, device)}
    ids = torch.randint(0, 137, (3, 8), device=device)
    out = sample(logits, prompt_ids=ids, return_logprobs=True, **settings)
    assert torch.equal(wide, before)
    copied = sample(logits.contiguous(), prompt_ids=ids.t().contiguous().t(), return_logprobs=True, **settings)
    assert all(torch.equal(a, b) for a, b in zip(out[:4], copied[:4], strict=True))
    turned = sample(logits.t().contiguous().t(), prompt_ids=ids, return_logprobs=True, **settings)
    assert torch.equal(out.ids, turned.ids)


def test_no_rows_and_a_vocabulary_of_one(backend, device):
    empty = sample(torch.empty(0, 5, device=device), seed=0, position=0, return_logprobs=True, num_logprobs=2)
    assert [t.shape for t in empty] == [(0,), (0,), (0,), (0,), (0, 2), (0, 2)]
    one = sample(torch.tensor([[-50.0]], device=device), seed=0, position=0, top_p=0.5, top_k=1, return_logprobs=True)
    assert (one.ids.item(), one.logprobs.item(), one.processed_logprobs.item()) == (0, 0.0, 0.0)


def test_torch_accepts_the_registration(backend, device):
    tensors = {
        "logits": torch.randn(3, 20, device=device),
        "temperature": torch.ones(3, device=device),
        **dict.fromkeys(("top_k", "min_p", "presence_penalty", "frequency_penalty", "output_ids")),
        "top_p": torch.full((3,), 0.9, device=device),
        "repetition_penalty": torch.full((3,), 1.5, device=device),
        "prompt_ids": torch.randint(0, 20, (3, 4), device=device),
        **seeds(3, device),
    }
    names = [a.name for a in torch.ops.fastlm.sampling.default._schema.arguments][:12]
    arguments = tuple(tensors[name] for name in names)
    torch.library.opcheck(torch.ops.fastlm.sampling.default, (*arguments, False, True, 3))
    torch.library.opcheck(torch.ops.fastlm.sampling.default, (*arguments, True, False, 0))


def test_traces_into_one_graph(backend, device):
    logits = torch.randn(3, 20, device=device, requires_grad=True)
    position = torch.arange(3, device=device)

    def draw(logits: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        out = sample(logits, temperature=0.7, top_k=5, top_p=0.9, seed=3, position=position, return_logprobs=True)
        return out.ids, out.logprobs

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(logits, position), draw(logits, position), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.randn(3)}, r"logits must be \(batch, vocab_size\)"),
        ({"logits": torch.randn(3, 0)}, "vocab_size > 0"),
        ({"logits": torch.ones(3, 4, dtype=torch.int64)}, "fp32, bf16 or fp16"),
        ({"temperature": -0.1}, "temperature must be a finite number from 0.0"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": -1}, "top_k must be"),
        ({"top_p": torch.ones(2)}, r"top_p must be \(3,\) torch.float32"),
        ({"top_k": torch.ones(3)}, r"top_k must be \(3,\) torch.int64"),
        ({"min_p": 1.01}, "min_p must be a finite number from 0.0 to 1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a finite number above 0.0"),
        ({"presence_penalty": math.inf}, "presence_penalty must be a finite number"),
        ({"logit_bias": torch.zeros(3)}, "logit_bias must be fp32"),
        ({"logit_bias": torch.zeros(4).double()}, "logit_bias must be fp32"),
        ({"mask": torch.zeros(3, 2, dtype=torch.int32)}, "int32, a bit a token"),
        ({"mask": torch.zeros(3, 1)}, "int32, a bit a token"),
        ({"prompt_ids": torch.zeros(2, 1, dtype=torch.int64)}, r"prompt_ids must be \(3, n\) int64"),
        ({"output_ids": torch.zeros(3, 1)}, r"output_ids must be \(3, n\) int64"),
        ({"num_logprobs": 5}, r"num_logprobs must be between 0 and vocab_size \(4\)"),
        ({"order": "both"}, 'order must be "hf" or "vllm"'),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    arguments = {"logits": torch.randn(3, 4), "seed": 0, "position": 0} | changes
    with pytest.raises(ValueError, match=message):
        sample(arguments.pop("logits"), **arguments)
