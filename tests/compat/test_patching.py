"""Patched Hugging Face decoders against the same models unpatched."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import fastlm
from fastlm.compat.patching import is_patched
from fastlm.errors import ConfigError

from .tiny_models import VOCAB_SIZE, tiny_model

transformers = pytest.importorskip("transformers", minversion="5.0")

NAMES = ("gpt2", "llama", "qwen3", "gemma3", "mistral")
# norms, MLPs and rotary embeddings of the tiny models
COUNTS = {"gpt2": (0, 0, 0), "llama": (5, 2, 2), "qwen3": (9, 2, 2), "gemma3": (13, 2, 2), "mistral": (5, 2, 2)}


def batch(seed: int, rows: int = 3, length: int = 21) -> dict[str, torch.Tensor]:
    """Ids, and labels some of which do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB_SIZE, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels}


def padded(seed: int, side: str) -> dict[str, torch.Tensor]:
    """Two rows are shorter than the third."""
    inputs = batch(seed)
    mask = torch.ones_like(inputs["input_ids"])
    for row, missing in enumerate((4, 6)):  # fewer than a window has
        mask[row, slice(None, missing) if side == "left" else slice(-missing, None)] = 0
    return {"input_ids": inputs["input_ids"], "attention_mask": mask}


def loss_and_gradients(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Of all numbers together, relative to their size."""
    off = sum(((a.double() - b.double()) ** 2).sum() for a, b in zip(found, exact, strict=True))
    return float((off / sum((b.double() ** 2).sum() for b in exact)).sqrt())


@pytest.mark.parametrize("name", NAMES)
def test_all_that_fastlm_has_is_replaced(name: str) -> None:
    done = fastlm.patch(tiny_model(name))
    assert (done.norms, done.mlps, done.rotaries) == COUNTS[name]
    assert done.attention
    assert done.loss
    assert not done.left


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_are_as_near_to_float64_as_the_unpatched_models(
    name: str, dtype: torch.dtype, fresh_seed: int
) -> None:
    theirs = tiny_model(name, dtype, fresh_seed).train()
    exact, ours = copy.deepcopy(theirs).double(), copy.deepcopy(theirs)
    fastlm.patch(ours)
    inputs = batch(fresh_seed)
    true_gradients = loss_and_gradients(exact, inputs)
    their_error = error(loss_and_gradients(theirs, inputs), true_gradients)
    assert error(loss_and_gradients(ours, inputs), true_gradients) <= 2 * their_error
    for model in (theirs, ours, exact):
        model.eval()
    for each in (inputs, padded(fresh_seed, "right")):  # in fp64 a row that sees nothing is NaN in theirs
        shown = each.get("attention_mask", torch.ones_like(each["input_ids"])).bool()
        with torch.no_grad():
            logits = [model(**each).logits[shown] for model in (theirs, ours, exact)]
        assert error([logits[1]], [logits[2]]) <= 2 * error([logits[0]], [logits[2]])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_is_the_unpatched_models(name: str, cache: str, fresh_seed: int) -> None:
    model = tiny_model(name, seed=fresh_seed).eval()
    inputs = padded(fresh_seed, "left")
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    expected = model.generate(**inputs, **options)
    fastlm.patch(model)
    assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize("name", NAMES)
def test_unpatched_models_are_what_they_were(name: str, fresh_seed: int) -> None:
    model = tiny_model(name, seed=fresh_seed).train()
    names = list(model.state_dict())
    before = loss_and_gradients(model, batch(fresh_seed))
    fastlm.patch(model)
    assert list(model.state_dict()) == names
    fastlm.unpatch(model)
    assert not is_patched(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, loss_and_gradients(model, batch(fresh_seed)), strict=True))
    assert fastlm.patch(model).attention  # and can be patched again


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_loss_of_training_needs_no_logits(name: str, fresh_seed: int) -> None:
    ours = tiny_model(name, seed=fresh_seed)
    theirs = copy.deepcopy(ours)
    fastlm.patch(ours)
    inputs = batch(fresh_seed)
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[..., 1:].contiguous()
    for options in (
        inputs,
        inputs | {"num_items_in_batch": torch.tensor(11)},
        {"input_ids": inputs["input_ids"], "shift_labels": shifted, "labels": inputs["labels"]},
    ):
        expected = theirs.train()(**options)
        found = ours.train()(**options)
        assert found.logits is None
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.eval()(**options).logits, expected.logits, rtol=1e-3, atol=1e-3)
    assert ours.train()(input_ids=inputs["input_ids"]).logits is not None


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_packed_sequences_are_apart(name: str, fresh_seed: int) -> None:
    model = tiny_model(name, seed=fresh_seed).eval()
    fastlm.patch(model)
    ids = batch(fresh_seed, rows=1, length=20)["input_ids"]
    lengths = (8, 12)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    offsets = torch.tensor([0, 8, 20], dtype=torch.int32)
    kwargs = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 12, "max_length_k": 12}
    with torch.no_grad():
        expected = torch.cat([model(input_ids=part).logits for part in ids.split(lengths, 1)], 1)
        by_positions = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        by_offsets = model(input_ids=ids, position_ids=positions, use_cache=False, **kwargs).logits
    torch.testing.assert_close(by_positions, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_offsets, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_compiles_to_one_graph(name: str, fresh_seed: int) -> None:
    torch.compiler.reset()
    model = tiny_model(name, seed=fresh_seed).train()
    fastlm.patch(model)
    inputs = batch(fresh_seed) | {"use_cache": False}
    expected = loss_and_gradients(model, inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = loss_and_gradients(compiled, inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_gradients_do_not_depend_on_checkpointing(name: str, fresh_seed: int) -> None:
    model = tiny_model(name, seed=fresh_seed).train()
    fastlm.patch(model)
    expected = loss_and_gradients(model, batch(fresh_seed))
    model.activation_checkpointing_enable()
    found = loss_and_gradients(model, batch(fresh_seed))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_autocast_is_as_near_to_float64_as_the_unpatched_models(name: str, fresh_seed: int) -> None:
    theirs = tiny_model(name, seed=fresh_seed).train()
    exact, ours = copy.deepcopy(theirs).double(), copy.deepcopy(theirs)
    fastlm.patch(ours)
    inputs = batch(fresh_seed)
    true = loss_and_gradients(exact, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        their_error, our_error = (error(loss_and_gradients(model, inputs), true) for model in (theirs, ours))
    assert our_error <= 2 * their_error


def test_copies_and_saved_models_work(fresh_seed: int, tmp_path: Any) -> None:
    model = tiny_model("llama", seed=fresh_seed).eval()
    fastlm.patch(model)
    inputs = {"input_ids": batch(fresh_seed)["input_ids"]}
    expected = model(**inputs).logits
    twin = copy.deepcopy(model)
    model.model.norm.weight.data.zero_()
    assert torch.equal(twin(**inputs).logits, expected)  # its own weights, not the first model's
    twin.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-3, atol=1e-3)
    stream = io.BytesIO()
    torch.save(twin.state_dict(), stream)


def test_what_differs_is_left_and_named() -> None:
    model = tiny_model("llama")
    odd = type("OddRMSNorm", (type(model.model.norm),), {"forward": lambda self, x: x * self.weight})
    model.model.norm.__class__ = odd
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    model.model.layers[1].mlp.forward = lambda x: x
    done = fastlm.patch(model)
    assert (done.norms, done.mlps) == (4, 0)
    text = str(done)
    assert "OddRMSNorm is no RMSNorm that fastlm has" in text
    assert "has an activation that fastlm has not: ReLU()" in text
    assert "has a forward of its own" in text
    fastlm.unpatch(model)
    assert "forward" in model.model.layers[1].mlp.__dict__  # it is not ours to take off


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"Linear is no transformers\.PreTrainedModel"):
        fastlm.patch(torch.nn.Linear(2, 2))
    model = tiny_model("llama")
    fastlm.patch(model)
    with pytest.raises(ConfigError, match="unpatch"):
        fastlm.patch(model)
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ConfigError, match=r"dropout of 0\.1"):
        model.train()(**batch(0))
