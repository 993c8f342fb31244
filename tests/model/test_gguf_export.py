from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from fastlm.errors import CheckpointError, ConfigError
from fastlm.model import ModelConfig, Transformer
from fastlm.model.gguf import load_gguf
from fastlm.model.gguf_export import quantize_q8_0, save_gguf
from fastlm.tokenizer import BpeTrainer, Tokenizer
from tests.model.test_huggingface import logits_of
from tests.model.test_transformer import randomise

TEXT = "The cat sat on the mat.\n\n  And then, 고양이가 매트 위에 앉았다! 12345 cats' mats…\n" * 40
VOCABULARY = 400


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    BpeTrainer(VOCABULARY, special_tokens=("<|endoftext|>",)).train_from_iterator([TEXT]).save(path)
    return path


def model(**changes) -> Transformer:
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    sizes |= {"intermediate_size": 96, "context_length": 128, "norm_eps": 2.0**-17}
    config = ModelConfig(vocab_size=VOCABULARY, **{**sizes, **changes})
    result = Transformer(config).eval()
    randomise(result)
    return result


KINDS = {"llama": {}, "qwen3": {"qk_norm": True, "tie_embeddings": False}, "qwen2": {"qkv_bias": True}}


@pytest.mark.parametrize("architecture", list(KINDS))
def test_a_file_of_fp32_reads_back_as_the_same_model(architecture: str, tmp_path: Path) -> None:
    ours = model(**KINDS[architecture], rope_theta=500.0)
    save_gguf(ours, tmp_path / "m.gguf", quantization="f32")
    again = load_gguf(tmp_path / "m.gguf")
    assert again.config == ours.config
    ids = torch.randint(VOCABULARY, (2, 30))
    assert torch.equal(logits_of(again, ids), logits_of(ours, ids))
    assert gguf.GGUFReader(tmp_path / "m.gguf").get_field("general.architecture").contents() == architecture


@pytest.mark.parametrize(("quantization", "kind"), [("f16", "F16"), ("q8_0", "Q8_0")])
def test_matrices_are_those_that_the_gguf_package_makes(quantization, kind: str, tmp_path: Path) -> None:
    ours = model(qk_norm=True)
    save_gguf(ours, tmp_path / "m.gguf", quantization=quantization)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    number = gguf.GGMLQuantizationType[kind]
    for name, parameter in (
        ("token_embd.weight", ours.model.embed_tokens.weight),
        ("blk.1.attn_q.weight", ours.model.layers[1].self_attn.q_proj.weight),
        ("blk.0.ffn_down.weight", ours.model.layers[0].mlp.down_proj.weight),
    ):
        assert tensors[name].tensor_type == number
        np.testing.assert_array_equal(tensors[name].data, gguf.quants.quantize(parameter.detach().numpy(), number))
    assert tensors["blk.0.attn_q_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_q8_0_blocks_are_ggmls_to_the_last_bit() -> None:
    values = torch.randn(7, 320) * torch.logspace(-9, 4, 320)
    values[2] = 0
    values[3] = values[3].round()  # ties
    expected = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(quantize_q8_0(values).numpy(), expected)


def test_rows_that_make_no_blocks_are_fp16(tmp_path: Path) -> None:
    save_gguf(model(intermediate_size=40), tmp_path / "m.gguf", quantization="q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    load_gguf(tmp_path / "m.gguf")


def test_the_vocabulary_is_that_of_the_tokenizer(tokenizer: Path, tmp_path: Path) -> None:
    save_gguf(model(), tmp_path / "m.gguf", tokenizer=tokenizer)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    content = json.loads(tokenizer.read_text())
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == VOCABULARY
    assert {t: i for i, t in enumerate(tokens)}.items() >= content["model"]["vocab"].items()
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    assert fields["tokenizer.ggml.merges"].contents() == merges
    end = fields["tokenizer.ggml.eos_token_id"].contents()
    assert tokens[end] == "<|endoftext|>"
    assert fields["tokenizer.ggml.token_type"].contents()[end] == gguf.TokenType.CONTROL


def test_the_tokenizer_read_back_from_the_file_gives_the_same_ids(tokenizer: Path, tmp_path: Path) -> None:
    save_gguf(model(), tmp_path / "m.gguf", tokenizer=tokenizer)
    again, own = Tokenizer.from_gguf(tmp_path / "m.gguf"), Tokenizer.from_file(tokenizer)
    assert again.encode(TEXT) == own.encode(TEXT)
    assert again.eos_token_id == own.eos_token_id


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 8},
        {"logit_softcap": 3.0},
        {"qk_norm": True, "qkv_bias": True},
        {"norm_placement": "around"},
        {"rope_scaling": {"kind": "llama3", "factor": 2.0}},
    ],
)
def test_what_llama_cpp_would_run_otherwise_is_not_written(changes: dict, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only Llama, Qwen 2 and Qwen 3"):
        save_gguf(model(**changes), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing_behind(tokenizer: Path, tmp_path: Path) -> None:
    ours = model()
    with torch.no_grad():
        ours.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight has weights beyond"):
        save_gguf(ours, tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="give the model's tokenizer"):
        save_gguf(Transformer(ModelConfig(300, 64, 1, 4, 4, 16, 96, 32)), tmp_path / "m.gguf", tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="quantization must be one of f32, f16, q8_0"):
        save_gguf(ours, tmp_path / "m.gguf", quantization="q2_k")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["f16", "q8_0"])
@pytest.mark.parametrize("architecture", list(KINDS))
def test_llama_cpp_gives_the_same_ids_and_logits(architecture, quantization, tokenizer: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    ours = model(**KINDS[architecture])
    save_gguf(ours, tmp_path / "m.gguf", tokenizer=tokenizer, quantization=quantization)
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), logits_all=True, n_ctx=128, n_threads=1, verbose=False)
    text = "고양이가 sat 123 on\n\n the  mat!"
    ids = theirs.tokenize(text.encode(), add_bos=True)
    own = Tokenizer.from_file(tokenizer)
    assert ids == [own.eos_token_id, *own.encode(text)]
    theirs.eval(ids)
    expected = torch.from_numpy(np.array(theirs.scores[: len(ids)]))
    logits = logits_of(load_gguf(tmp_path / "m.gguf", dtype=torch.float32), torch.tensor([ids]))[0]
    if quantization == "f16":
        assert (logits - expected).norm() < 0.005 * expected.norm()
        return
    # Both round activations to 8 bits, each in its way; how far that carries depends on the random weights.
    exact = logits_of(ours, torch.tensor([ids]))[0]
    our_error, their_error = (logits - exact).norm(), (expected - exact).norm()
    assert our_error <= 2 * their_error
    assert their_error < 0.2 * exact.norm()
