from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastlm.errors import CheckpointError, ConfigError
from fastlm.model import ModelConfig, Transformer, load_classifier, save_classifier
from fastlm.model.classifier import SequenceClassifier, is_classifier, pack

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 120, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "context_length": 64,
}  # fmt: skip
LABELS = ["나쁨", "그저 그럼", "좋음"]


def classifier(pooling: str = "last", **options) -> SequenceClassifier:
    model = SequenceClassifier(Transformer(ModelConfig(**{**SIZES, **options})), LABELS, pooling)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def texts() -> list[list[int]]:
    return [torch.randint(1, 120, (n,)).tolist() for n in (1, 5, 23, 64)]


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True},
        {},
        {"positions": "learned", "norm": "layer_norm", "gated_mlp": False, "activation": "gelu_tanh", "norm_eps": 1e-5,
         "qkv_bias": True, "attention_output_bias": True, "mlp_bias": True, "num_kv_heads": 4, "rope_theta": 10_000.0},
    ],
    ids=["qwen3", "llama", "gpt2"],
)  # fmt: skip
def test_the_last_token_gives_the_logits_of_transformers(options: dict, tmp_path: Path) -> None:
    model = classifier(**options)
    save_classifier(model, tmp_path, eos_token_id=0)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert [theirs.config.id2label[i] for i in range(3)] == LABELS
    rows = texts()
    with torch.no_grad():
        ours = model(*pack(rows))
        for row, logits in zip(rows, ours, strict=True):
            expected = theirs(torch.tensor([row])).logits[0]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_saved_classifier_is_read_back_whole(pooling: str, tmp_path: Path) -> None:
    model = classifier(pooling)
    save_classifier(model, tmp_path, eos_token_id=0)
    again = load_classifier(tmp_path)
    assert (again.labels, again.pooling, again.config) == (LABELS, pooling, model.config)
    rows = texts()
    with torch.no_grad():
        assert torch.equal(again(*pack(rows)), model(*pack(rows)))
    assert is_classifier(tmp_path)


def test_the_mean_is_over_the_texts_own_tokens() -> None:
    model = classifier("mean")
    rows = texts()
    with torch.no_grad():
        together = model(*pack(rows))
        for row, logits in zip(rows, together, strict=True):
            hidden = model.model(torch.tensor([row]))[0]
            torch.testing.assert_close(logits, model.score(hidden.mean(0)), rtol=1e-4, atol=1e-5)


def test_what_makes_no_classifier_is_refused(tmp_path: Path) -> None:
    base = Transformer(ModelConfig(**SIZES))
    for labels in ([], ["a"], ["a", "a"]):
        with pytest.raises(ConfigError, match="two or more different labels"):
            SequenceClassifier(base, labels)
    with pytest.raises(ConfigError, match="pooling must be mean or last, not 'max'"):
        SequenceClassifier(base, LABELS, "max")  # type: ignore[arg-type]
    model = classifier()
    save_classifier(model, tmp_path, eos_token_id=0)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(CheckpointError, match=r"no weights score.weight of shape \(2, 32\)"):
        load_classifier(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in content.items() if k != "id2label"}))
    with pytest.raises(CheckpointError, match="names no labels"):
        load_classifier(tmp_path)
