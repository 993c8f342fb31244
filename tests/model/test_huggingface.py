from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastlm.errors import CheckpointError, ConfigError
from fastlm.model import ModelConfig, Transformer, load_model, save_model
from fastlm.model.huggingface_config import config_from_huggingface, config_to_huggingface
from tests.model.architectures import MODELS, tiny

SEQ = 40


def assert_equal_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal to within the rounding of fp32: both sum the same products in another order, layer after layer."""
    assert ours.dtype == theirs.dtype == torch.float32
    assert (ours - theirs).norm() < 3e-5 * theirs.norm()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4 * theirs.abs().max().item())


@pytest.fixture(params=list(MODELS), ids=lambda name: name.replace(" ", "-"))
def theirs(request: pytest.FixtureRequest) -> torch.nn.Module:
    return tiny(request.param)


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def test_a_directory_of_transformers_gives_its_logits_also_token_by_token_and_after_saving(
    theirs: torch.nn.Module, tmp_path: Path
) -> None:
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    ids = torch.randint(61, (2, SEQ))
    expected = logits_of(theirs, ids)
    assert_equal_logits(logits_of(ours, ids), expected)

    with torch.no_grad():
        cache = ours.new_cache(2)
        parts = [ours(ids[:, :7], cache)] + [ours(ids[:, i : i + 1], cache) for i in range(7, SEQ)]
    assert_equal_logits(torch.cat(parts, 1), expected)

    save_model(ours, tmp_path / "ours", eos_token_id=2)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_equal_logits(logits_of(again, ids), expected)
    assert torch.equal(logits_of(load_model(tmp_path / "ours"), ids), logits_of(ours, ids))
    assert again.generation_config.eos_token_id == 2


@pytest.mark.parametrize("name", ["gpt-2", "gemma 3", "exaone 4", "qwen 2", "gemma 2"])
def test_gradients_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = tiny(name)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    ids = torch.randint(61, (2, SEQ))
    torch.nn.functional.cross_entropy(theirs(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    ours.loss(ids[:, :-1], ids[:, 1:]).backward()
    from fastlm.model.huggingface_layout import from_ours

    grads = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    grads = from_ours(grads, "gpt2" if name == "gpt-2" else "llama")
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    assert grads.keys() == expected.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-3, atol=1e-4 * expected[key].abs().max().item())


@pytest.mark.parametrize("name", ["llama", "gemma 3", "gpt-2"])
def test_shards_with_an_index_are_one_model(name: str, tmp_path: Path) -> None:
    theirs = tiny(name)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = torch.randint(61, (2, SEQ))
    assert_equal_logits(logits_of(load_model(tmp_path), ids), logits_of(theirs, ids))


def test_weights_keep_their_dtype_unless_another_is_asked_for(tmp_path: Path) -> None:
    theirs = tiny("gemma 3").bfloat16()
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    ids = torch.randint(61, (2, SEQ))
    wide = load_model(tmp_path, dtype=torch.float32)
    exact = logits_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), ids)
    assert_equal_logits(logits_of(wide, ids), exact)
    error = (logits_of(ours, ids).float() - exact).abs().mean()
    their_error = (logits_of(theirs, ids).float() - exact).abs().mean()
    assert error < 2 * their_error


def test_weights_of_several_dtypes_are_widened_to_one(tmp_path: Path) -> None:
    theirs = tiny("llama")
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].bfloat16()
    save_file(weights, tmp_path / "model.safetensors")
    ours = load_model(tmp_path)
    assert torch.equal(ours.model.layers[0].mlp.up_proj.weight, weights[name].float())
    ours(torch.randint(61, (1, 5)))


def mappings_of(path: Path) -> list[range]:
    """The addresses at which this process has mapped a file."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    return [range(*(int(address, 16) for address in line[0].split("-"))) for line in lines]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_loading_maps_the_file_and_leaves_it_unchanged_when_weights_change(tmp_path: Path) -> None:
    theirs = tiny("llama")
    theirs.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    ours = load_model(tmp_path)
    maps = mappings_of(tmp_path / "model.safetensors")
    assert all(any(p.data_ptr() in addresses for addresses in maps) for p in ours.parameters())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_copy_of_the_embedding_table_may_lie_beside_it_when_tied_but_nothing_else(tmp_path: Path) -> None:
    theirs = tiny("llama tied")
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    ids = torch.randint(61, (2, SEQ))
    assert_equal_logits(logits_of(load_model(tmp_path), ids), logits_of(theirs, ids))
    weights["lm_head.weight"][3, 4] += 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="differs from the embedding table"):
        load_model(tmp_path)


def test_old_names_of_gpt2_and_tables_that_models_compute_are_understood(tmp_path: Path) -> None:
    theirs = tiny("gpt-2")
    theirs.save_pretrained(tmp_path)
    weights = {n.removeprefix("transformer."): t for n, t in load_file(tmp_path / "model.safetensors").items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    save_file(weights, tmp_path / "model.safetensors")
    ids = torch.randint(61, (2, SEQ))
    assert_equal_logits(logits_of(load_model(tmp_path), ids), logits_of(theirs, ids))


def test_a_config_as_transformers_4_wrote_it_is_the_same_model(tmp_path: Path) -> None:
    theirs = tiny("llama 3 scaling")
    theirs.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    rope = content.pop("rope_parameters")
    new = config_from_huggingface(content | {"rope_parameters": rope})
    content |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": content.pop("dtype")}
    assert config_from_huggingface(content) == new

    gemma = json.loads(json.dumps(tiny("gemma 3 with scaling").config.to_dict()))
    new = config_from_huggingface(gemma)
    rope = gemma.pop("rope_parameters")
    gemma |= {
        "rope_theta": rope["full_attention"].pop("rope_theta"),
        "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
        "rope_scaling": rope["full_attention"],
    }
    assert config_from_huggingface(gemma) == new


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "bert"}, "model_type 'bert' is not supported; it must be one of llama, qwen3"),
        ("llama", {"model_type": ["llama"]}, "model_type"),
        ("llama", {"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        ("llama", {"hidden_act": 3}, "hidden_act=3"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling of type 'yarn'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "two"}}, "factor must be a number"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "rope_scaling: beta=1"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor must be a number"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters must be an object"),
        ("llama", {"rope_parameters": {"rope_theta": 10**400}}, "rope_theta is beyond"),
        ("llama", {"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta must be a positive number"),
        ("llama", {"attention_bias": "yes"}, "attention_bias must be true or false"),
        ("llama", {"hidden_size": "big"}, "hidden_size must be an integer"),
        ("llama", {"vocab_size": None}, "vocab_size must be an integer"),
        ("llama", {"num_key_value_heads": 4}, "num_kv_heads must divide num_heads"),
        ("llama", {"attn_temperature_tuning": True}, "attn_temperature_tuning=True is not supported"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("mistral", {"sliding_window": 2.5}, "sliding_window must be an integer"),
        ("qwen 2 with window", {"layer_types": ["sliding_attention"]}, "layer_types"),
        ("qwen 2 with window", {"layer_types": ["sliding_attention", "full_attention", "linear_attention"]}, "layer_t"),
        ("gemma 2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma 3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("gemma 3", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters must hold an object"),
        ("gpt-2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt-2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("exaone 4", {"sliding_window": 64, "layer_types": None}, "sliding_window=64"),
        ("phi 3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name: str, changes: dict, message: str, tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(tmp_path)
    assert str(path) in str(error.value)


def test_a_combination_that_transformers_has_no_architecture_for_is_not_saved(tmp_path: Path) -> None:
    model = Transformer(ModelConfig(61, 48, 2, 6, 2, 8, 80, 40, gated_mlp=False))
    with pytest.raises(ConfigError, match="no architecture of transformers"):
        save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", list(MODELS), ids=lambda name: name.replace(" ", "-"))
def test_a_config_survives_the_way_there_and_back_and_through_json(name: str) -> None:
    config = config_from_huggingface(tiny(name).config.to_dict())
    assert config_from_huggingface(json.loads(json.dumps(config_to_huggingface(config)))) == config
    assert ModelConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_a_pickle_is_refused_with_what_to_do(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle.*get the model as model\.safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update({"model.norm.weight": "../model.safetensors"}), "no safetensors file beside it"),
        (lambda m: m.update({"model.norm.weight": "/etc/passwd"}), "no safetensors file beside it"),
        (lambda m: m.update({"model.norm.weight": "missing.safetensors"}), r"missing\.safetensors does not exist"),
        (lambda m: m.update({"model.norm.weight": 3}), "no weight_map"),
        (lambda m: m.pop("model.norm.weight"), "holds model.norm.weight, unlike"),
        (lambda m: m.update({"extra": m["model.norm.weight"]}), "lacks extra, unlike"),
    ],
)
def test_an_index_that_lies_is_one_error(change, message: str, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "value", "message"),
    [
        ("gpt-2", "transformer.h.1.attn.c_attn.weight", torch.zeros(48, 143), "143.*not 144 rows"),
        ("gpt-2", "transformer.h.1.attn.c_attn.weight", torch.zeros(()), "not 144 rows"),
        ("gpt-2", "transformer.h.1.attn.c_attn.weight", torch.zeros(47, 144), r"q_proj.weight is \(48, 47\)"),
        ("phi 3", "model.layers.0.mlp.gate_up_proj.weight", torch.zeros(159, 48), "159.*not 160 rows"),
        ("llama", "model.layers.2.mlp.up_proj.weight", torch.zeros(80, 48).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        ("llama", "model.layers.2.mlp.up_proj.weight", torch.zeros(80, 48, dtype=torch.int8), "int8"),
        ("exaone 3", "model.layers.0.input_layernorm.weight", torch.zeros(48), "twice"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(name, tensor, value, message, tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights[tensor] = value
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_mutations_of_the_weights_file_load_or_are_one_error(tmp_path: Path) -> None:
    """Every byte of the header changed in turn, and random cuts."""
    tiny("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    generator = torch.Generator().manual_seed(torch.initial_seed())
    refused = 0
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            at = int(torch.randint(header, (), generator=generator))
            changed[at] = int(torch.randint(256, (), generator=generator))
        path.write_bytes(changed)
        try:
            load_model(tmp_path)
        except CheckpointError:
            refused += 1
    assert refused > 200
