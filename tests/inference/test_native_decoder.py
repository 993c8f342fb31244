from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastlm._core import native
from fastlm.inference.native_decoder import unsupported
from fastlm.inference.paged_cache import PagedCache
from fastlm.inference.sampling_params import SamplingParams
from fastlm.inference.scheduler import Chunk
from fastlm.inference.sequence import Sequence
from fastlm.model import ModelConfig, Transformer
from fastlm.model.assemble import Quantized, assemble
from fastlm.model.gguf_export import quantize_q8_0
from tests.inference.conftest import random_model

LLAMA = ModelConfig(300, 32, 2, 4, 2, 32, 64, 64)
CONFIGS = {
    "llama": LLAMA,
    "qwen": replace(LLAMA, qk_norm=True, qkv_bias=True, attention_output_bias=True, mlp_bias=True, num_kv_heads=1),
    "gemma": replace(
        LLAMA,
        norm_placement="around",
        norm_weight_offset=1.0,
        activation="gelu_tanh",
        qk_norm=True,
        scale_embeddings=True,
        sliding_window=9,
        full_attention_layers=(1,),
        rope_local_theta=100.0,
        attention_softcap=2.0,
        query_pre_attn_scalar=5.0,
    ),
    "exaone": replace(LLAMA, norm_placement="after", qk_norm=True),
    "odd": replace(LLAMA, num_heads=3, num_kv_heads=3, head_dim=10, hidden_size=37, intermediate_size=51),
}


def model_of(config: ModelConfig, kind: str) -> Transformer:
    model = random_model(config)
    assert isinstance(model, Transformer)
    if kind != "q8_0":
        return model.to(getattr(torch, kind))
    tensors = {
        name: Quantized(quantize_q8_0(tensor), "q8_0") if tensor.ndim == 2 else tensor
        for name, tensor in model.state_dict().items()
    }
    return assemble(config, tensors, path=None)  # type: ignore[arg-type]


def chunks_of(lengths: list[tuple[int, int]], block_size: int) -> list[Chunk]:
    """Sequences with (start, new tokens), and blocks of their own."""
    blocks = itertools.count()
    chunks = []
    for start, new in lengths:
        ids = torch.randint(0, 300, (start + new,)).tolist()
        sequence = Sequence("", 0, ids, SamplingParams(), seed=0)
        sequence.table.blocks = [next(blocks) for _ in range(-(-(start + new) // block_size))]
        chunks.append(Chunk(sequence, start, ids[start:]))
    return chunks


def cache_of(model: Transformer, like: PagedCache | None = None) -> PagedCache:
    """With random keys and values, or those of another."""
    cache = PagedCache(model, 64, 4)
    for layer in range(model.config.num_layers):
        for mine, theirs in zip(
            (cache.keys[layer], cache.values[layer]),
            (None, None) if like is None else (like.keys[layer], like.values[layer]),
            strict=True,
        ):
            mine.normal_() if theirs is None else mine.copy_(theirs)
    return cache


def exact(model: Transformer, chunks: list[Chunk]) -> tuple[Tensor, Tensor]:
    """Hidden states without a cache: in fp64, and as plain PyTorch gives them in the model's dtype."""
    results = []
    for dtype in (torch.float64, model.dtype):
        copied = Transformer(model.config).to(dtype).eval()
        copied.load_state_dict(model.state_dict())
        states = [copied.hidden_states(torch.tensor([c.sequence.tokens]))[0, c.start :].double() for c in chunks]
        results.append(torch.cat(states))
    return results[0], results[1]


def after_reading(model: Transformer, chunks: list[Chunk]) -> PagedCache:
    """A cache that holds what comes before the chunks."""
    cache = cache_of(model)
    before = [Chunk(c.sequence, 0, c.sequence.tokens[: c.start]) for c in chunks if c.start]
    cache.hidden_states(model, before)
    return cache


LENGTHS = [(17, 1), (0, 3), (30, 1), (1, 1), (11, 8), (5, 3)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("threads", [1, 3])
@torch.inference_mode()
def test_a_quantized_model_gives_the_bits_of_single_ops(name: str, threads: int) -> None:
    config = CONFIGS[name]
    if name == "odd":
        config = replace(config, hidden_size=96, head_dim=32, intermediate_size=32)
    model = model_of(config, "q8_0")
    torch.set_num_threads(threads)
    chunks, step_by_step = chunks_of(LENGTHS, 4), cache_of(model)
    at_once = cache_of(model, step_by_step)
    step_by_step._native = None
    assert torch.equal(at_once.hidden_states(model, chunks), step_by_step.hidden_states(model, chunks))
    for ours, theirs in zip(at_once.keys + at_once.values, step_by_step.keys + step_by_step.values, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@torch.inference_mode()
def test_dense_models_are_as_near_to_float64_as_plain_torch(name: str, kind: str) -> None:
    model, chunks = model_of(CONFIGS[name], kind), chunks_of(LENGTHS, 4)
    expected, plain = exact(model, chunks)
    cache = after_reading(model, chunks)
    ours = cache.hidden_states(model, chunks).double()
    assert (ours - expected).norm() <= 2 * (plain - expected).norm()


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "q8_0"])
@torch.inference_mode()
def test_a_sequence_gives_the_same_bits_whatever_others_are_in_the_step(kind: str) -> None:
    model, chunks = model_of(CONFIGS["gemma"], kind), chunks_of(LENGTHS, 4)
    cache = cache_of(model)
    together = cache.hidden_states(model, chunks).split([len(chunk.ids) for chunk in chunks])
    for chunk, expected in zip(chunks, together, strict=True):
        assert torch.equal(cache.hidden_states(model, [chunk]), expected)


def test_models_that_it_does_not_know_are_named() -> None:
    assert unsupported(model_of(LLAMA, "float32")) is None
    assert "fp32 and bf16" in str(unsupported(model_of(LLAMA, "float16")))
    assert "RMSNorm" in str(unsupported(model_of(replace(LLAMA, norm="layer_norm"), "float32")))
    model = model_of(LLAMA, "float32")
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)
    assert unsupported(model) == "does not know Sequential"
    model = model_of(LLAMA, "float32")
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    assert unsupported(model) == "calls no hooks"

    class Changed(Transformer):
        pass

    assert unsupported(Changed(LLAMA)) == "does not know Changed"


@torch.inference_mode()
def test_another_backend_is_used_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, chunks = model_of(LLAMA, "float32"), chunks_of(LENGTHS, 4)
    cache = after_reading(model, chunks)
    expected = exact(model, chunks)[0]
    monkeypatch.setenv("FASTLM_BACKEND", "reference")
    monkeypatch.setattr(cache._native, "_decoder", None)
    assert torch.allclose(cache.hidden_states(model, chunks).double(), expected, atol=1e-4)


@torch.inference_mode()
def test_autocast_gives_what_the_model_gives_under_it() -> None:
    model, chunks = model_of(LLAMA, "float32"), chunks_of(LENGTHS, 4)
    step_by_step = cache_of(model)
    at_once = cache_of(model, step_by_step)
    step_by_step._native = None
    with torch.autocast("cpu", torch.bfloat16):
        ours, expected = (cache.hidden_states(model, chunks) for cache in (at_once, step_by_step))
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, expected)


def decoder(pool: int) -> tuple[object, list[Tensor]]:
    """One layer over a pool of 3 blocks of 4 tokens, of which the other pool has more, and the tensors that it uses."""
    weights, norm = [torch.ones(8, 8)] * 7, torch.ones(8)
    cache = torch.zeros(2, 3, 4, 1, 8)
    made = native().DecoderFloat32(
        hidden_size=8,
        heads=1,
        kv_heads=1,
        head_dim=8,
        intermediate_size=8,
        blocks=(3, 2) if pool == 0 else (7, 3),
        block_size=4,
        eps=1e-6,
        scale=1.0,
        softcap=0.0,
        gelu=False,
        norm=norm.data_ptr(),
    )
    projections = [("", w.data_ptr(), (8, 8, 32), 0) for w in weights]
    norms, addresses = [norm.data_ptr(), 0, 0, 0, norm.data_ptr(), 0], [c.data_ptr() for c in cache]
    made.add_layer(norms, projections, pool, 0, *addresses, pool == 1)
    return made, [*weights, norm, cache]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": -1}, "a position lies outside"),
        ({"position": 7}, "a position lies outside"),
        ({"slot": -1}, "a slot lies outside"),
        ({"slot": 12}, "a slot lies outside"),
        ({"block": 3}, "names a block outside the cache"),
        ({"block": -1}, "names a block outside the cache"),
        ({"length": 9}, "a row of block_table holds 0 to 8"),
        ({"size": 2}, "groups must follow each other"),
        ({"first": 1}, "must follow each other"),
        ({"tables": 0}, "rotary table is missing"),
        ({"rows": 0}, "must have rows"),
    ],
)
@pytest.mark.parametrize("pool", [0, 1])
def test_what_lies_outside_its_memory_is_refused(change: dict[str, int], message: str, pool: int) -> None:
    made, kept = decoder(pool)
    v = {"position": 5, "slot": 9, "block": 2, "length": 6, "size": 1, "first": 0, "tables": 1, "rows": 1} | change
    hidden, out = torch.ones(1, 8), torch.full((1, 8), torch.nan)
    position, slot = torch.tensor([v["position"]]), torch.tensor([v["slot"]])
    table = torch.tensor([[0, v["block"]]] * 2, dtype=torch.int32)
    lengths = torch.tensor([v["length"]] * 2, dtype=torch.int32)
    angles = torch.ones(7, 4)
    others_slot, others_table = torch.zeros(1, dtype=torch.int64), torch.zeros_like(table)
    slots, tables = [others_slot.data_ptr()] * 2, [others_table.data_ptr()] * 2
    slots[pool], tables[pool] = slot.data_ptr(), table.data_ptr()
    group = (v["first"], v["size"], 1, 2, tables, lengths.data_ptr())
    with pytest.raises(ValueError, match=message):
        made.run(  # type: ignore[attr-defined]
            v["rows"],
            hidden.data_ptr(),
            position.data_ptr(),
            slots,
            [group],
            [(angles.data_ptr(), angles.data_ptr(), 7)] * v["tables"],
            out.data_ptr(),
            1,
        )
    assert out.isnan().all()
    del kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (8, 9, 36)}, "does not fit the decoder's sizes"),
        ({"shape": (8, 8, 28)}, "must not overlap"),
        ({"shape": (8, 8, 33)}, "aligned to their elements"),
        ({"kind": "q8_0"}, "multiple of the format's block size"),
        ({"kind": "q3"}, "no quantization named q3"),
        ({"address": 0}, "has no storage"),
        ({"norm": 1}, "both have a norm"),
        ({"window": -1}, "must not be negative"),
        ({"windowed": True}, "must have a window, and blocks"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused(change: dict, message: str) -> None:
    made, kept = decoder(0)
    weight, norm, cache = kept[0], kept[-2], kept[-1]
    v = {
        "kind": "",
        "address": weight.data_ptr(),
        "shape": (8, 8, 32),
        "norm": 0,
        "window": 0,
        "windowed": False,
    } | change
    right = ("", weight.data_ptr(), (8, 8, 32), 0)
    wrong = (v["kind"], v["address"], v["shape"], 0)
    norms = [0, norm.data_ptr() if v["norm"] else 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match=message):
        made.add_layer(  # type: ignore[attr-defined]
            norms, [*[right] * 6, wrong], v["window"], 0, *(c.data_ptr() for c in cache), v["windowed"]
        )
