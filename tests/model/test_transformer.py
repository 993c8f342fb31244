from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from fastlm.errors import ConfigError
from fastlm.model import ModelConfig, Transformer, load_model, save_model
from fastlm.model.checkpoint import load_weights, write_weights
from fastlm.model.huggingface_config import config_to_huggingface

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 8,
    "intermediate_size": 80,
    "context_length": 40,
}


def config(**changes) -> ModelConfig:
    return ModelConfig(**{**SHAPE, **changes})


def randomise(model: torch.nn.Module) -> None:
    """Every weight random: a fresh model has blocks that add nothing, with which much would go unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.ndim == 2 else parameter.uniform_(0.5, 1.5)


def hugging_face_model(ours: ModelConfig) -> torch.nn.Module:
    values = config_to_huggingface(ours)
    values.pop("architectures")
    model_type = values.pop("model_type")
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }
    config_class, model_class = classes[model_type]
    model = model_class(config_class(**values)).float().eval()
    randomise(model)
    return model


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_logits_loss_and_gradients_equal_hugging_face(qk_norm: bool, tie_embeddings: bool) -> None:
    ours = Transformer(config(qk_norm=qk_norm, tie_embeddings=tie_embeddings))
    theirs = hugging_face_model(ours.config)
    weights = {k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight" or not tie_embeddings}
    ours.load_state_dict(weights)
    ids = torch.randint(61, (3, 23))
    logits = theirs(ids).logits
    torch.testing.assert_close(ours(ids), logits, rtol=1e-4, atol=1e-4)

    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss = ours.loss(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_a_saved_model_is_a_hugging_face_directory_with_equal_logits(tmp_path: Path, qk_norm, tie_embeddings) -> None:
    ours = Transformer(config(qk_norm=qk_norm, tie_embeddings=tie_embeddings)).eval()
    randomise(ours)
    save_model(ours, tmp_path, eos_token_id=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(61, (2, 31))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
        again = load_model(tmp_path)
        assert torch.equal(ours(ids), again(ids))


def test_a_directory_that_hugging_face_saved_loads_with_equal_logits(tmp_path: Path) -> None:
    theirs = hugging_face_model(config(tie_embeddings=False))
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert ours.config == config(tie_embeddings=False)
    ids = torch.randint(61, (2, 31))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_decoding_with_a_cache_gives_the_logits_of_the_whole_sequence() -> None:
    model = Transformer(config(qk_norm=True)).eval()
    randomise(model)
    ids = torch.randint(61, (2, 40))
    with torch.no_grad():
        whole = model(ids)
        cache = model.new_cache(2)
        parts = [model(ids[:, :7], cache)] + [model(ids[:, i : i + 1], cache) for i in range(7, 40)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_rows_of_different_lengths_share_a_cache_and_each_gets_its_own_logits() -> None:
    model = Transformer(config()).eval()
    randomise(model)
    rows = [torch.randint(61, (1, n)) for n in (3, 11, 1)]
    with torch.no_grad():
        cache = model.new_cache(3)
        for i, row in enumerate(rows):
            model(row, cache.row(i))
        for _ in range(4):
            new = torch.randint(61, (3, 1))
            logits = model(new, cache)
            rows = [torch.cat([row, new[i : i + 1]], 1) for i, row in enumerate(rows)]
            for i, row in enumerate(rows):
                torch.testing.assert_close(logits[i, -1], model(row)[0, -1], rtol=1e-4, atol=1e-4)


def test_a_sequence_longer_than_the_context_is_refused_with_both_lengths() -> None:
    model = Transformer(config())
    with pytest.raises(ValueError, match="41 tokens do not fit the context of 40"):
        model(torch.zeros(1, 41, dtype=torch.int64))


def test_a_fresh_model_predicts_every_token_about_equally() -> None:
    torch.manual_seed(0)
    model = Transformer(config(vocab_size=256))
    ids = torch.randint(256, (2, 41))
    loss = model.loss(ids[:, :-1], ids[:, 1:]).item()
    assert abs(loss - 5.545) < 0.1  # ln 256


def test_autocast_changes_the_loss_no_more_than_bfloat16_does() -> None:
    model = Transformer(config())
    randomise(model)
    ids = torch.randint(61, (4, 41))
    exact = model.loss(ids[:, :-1], ids[:, 1:]).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.hidden_states(ids[:, :-1])
        rounded = model.loss(ids[:, :-1], ids[:, 1:]).item()
    assert hidden.dtype == torch.bfloat16
    assert abs(rounded - exact) < 0.05 * exact


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 4}, "num_kv_heads must divide num_heads"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"hidden_size": 0}, "hidden_size must be a positive number, not 0"),
        ({"num_layers": 2.5}, "num_layers must be an integer"),
        ({"vocab_size": True}, "vocab_size must be a positive number"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number"),
        ({"norm_eps": float("nan")}, "norm_eps must be a positive number"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_positions_beyond_the_first_tables_are_those_of_hugging_face() -> None:
    ours = Transformer(config(context_length=2000, tie_embeddings=False)).eval()
    theirs = hugging_face_model(ours.config)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(61, (1, 1100))
    with torch.no_grad():
        expected = theirs(ids).logits[:, -80:]
        cache = ours.new_cache(1, 1100)
        parts = [ours(ids[:, :1000], cache)] + [ours(ids[:, i : i + 10], cache) for i in range(1000, 1100, 10)]
        torch.testing.assert_close(torch.cat(parts, 1)[:, -80:], expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours(ids)[:, -80:], expected, rtol=1e-3, atol=1e-3)


def test_tables_made_while_generating_serve_training_and_another_dtype() -> None:
    model = Transformer(config())
    randomise(model)
    ids = torch.randint(61, (2, 20))
    with torch.inference_mode():
        before = model(ids)
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    with torch.no_grad():
        narrow = model.bfloat16()(ids).float()
    assert (narrow - before).norm() < 0.05 * before.norm()


def test_a_compiled_model_is_one_graph() -> None:
    model = Transformer(config(sliding_window=5, full_attention_layers=(1,), rope_local_theta=100.0, logit_softcap=3.0))
    randomise(model)
    ids = torch.randint(61, (2, 20))
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids[:, :-1], ids[:, 1:]), model.loss(ids[:, :-1], ids[:, 1:]))


def test_training_checkpoints_of_every_layout_read_back(tmp_path: Path) -> None:
    for changes in (
        {},
        {
            "positions": "learned",
            "norm": "layer_norm",
            "activation": "gelu_tanh",
            "gated_mlp": False,
            "num_kv_heads": 6,
            "qkv_bias": True,
            "attention_output_bias": True,
            "mlp_bias": True,
        },
    ):
        model, again = Transformer(config(**changes)), Transformer(config(**changes))
        randomise(model)
        write_weights(model, tmp_path / "model.safetensors")
        load_weights(again, tmp_path / "model.safetensors")
        ids = torch.randint(61, (2, 20))
        assert torch.equal(model(ids), again(ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "sinusoidal"}, "positions must be one of rotary, learned"),
        ({"sliding_window": 0}, "sliding_window must be a positive number"),
        ({"full_attention_layers": (1,)}, "need a sliding_window"),
        ({"sliding_window": 4, "full_attention_layers": (3,)}, "ascending and below 3"),
        ({"sliding_window": 4, "full_attention_layers": (1, 0)}, "ascending and below 3"),
        ({"rope_scaling": {"kind": "yarn", "factor": 2.0}}, "rope scaling must be one of"),
        ({"rope_scaling": {"kind": "linear", "factor": 0.0}}, "factor must be a positive number"),
        ({"rope_scaling": {"kind": "factors", "factors": [1.0, 2.0]}}, "must have 4 factors, not 2"),
        ({"rope_scaling": {"speed": 2}}, "rope_scaling is not complete"),
        ({"attention_softcap": -1.0}, "attention_softcap must be a positive number"),
        ({"activation": "gelu"}, "a gated MLP"),
        ({"norm": "layer_norm", "norm_weight_offset": 1.0}, "layer_norm has none"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)
