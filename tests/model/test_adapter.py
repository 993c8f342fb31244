from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastlm.errors import CheckpointError, ConfigError
from fastlm.model import (
    ModelConfig,
    SequenceClassifier,
    Transformer,
    load,
    load_classifier,
    save_classifier,
    save_model,
)
from fastlm.model.adapter import LoRAConfig, add_lora, check_adaptable, load_adapter, merge_lora, save_adapter
from fastlm.model.classifier import pack, write_labels
from fastlm.nn import LoRALinear

CONFIG = ModelConfig(
    vocab_size=120, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48,
    context_length=64, qk_norm=True,
)  # fmt: skip
LORA = LoRAConfig(rank=3, alpha=7.0)


def randomise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = Transformer(CONFIG)
    randomise(model)
    save_model(model, tmp_path / "base", eos_token_id=0)
    return tmp_path / "base"


def test_an_adapter_starts_as_its_base_and_trains_its_own_weights_alone() -> None:
    model = Transformer(CONFIG)
    randomise(model)
    ids = torch.randint(0, 120, (2, 9))
    before = model(ids)
    add_lora(model, LORA)
    torch.testing.assert_close(model(ids), before, rtol=0, atol=0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * CONFIG.num_layers
    assert all(".lora_" in name for name in trained)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), LORA.targets])
def test_peft_gives_our_adapters_logits(base: Path, tmp_path: Path, targets: tuple[str, ...]) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = load(base).model
    lora = LoRAConfig(3, 7.0, targets)
    add_lora(model, lora)
    randomise(model)
    for name, parameter in load(base).model.named_parameters():  # the base's own weights as they were
        with torch.no_grad():
            dict(model.named_parameters())[_inside(name, targets)].copy_(parameter)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, lora, tmp_path / "adapter", base=str(base), task_type="CAUSAL_LM")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    ).eval()
    ids = torch.randint(0, 120, (2, 11))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
        merged = load(tmp_path / "adapter").model  # by the base that the adapter names
        torch.testing.assert_close(merged(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
        assert (load(base).model(ids) - theirs(ids).logits).abs().max() > 1e-2  # the adapter does something


def _inside(name: str, targets: tuple[str, ...]) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{module}.base_layer.{leaf}" if module.rpartition(".")[2] in targets else name


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_peft_gives_its_logits_here(base: Path, tmp_path: Path, rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", use_rslora=rslora
    )
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    ours = load(base).model
    assert load_adapter(ours, tmp_path / "adapter") == {}
    ids = torch.randint(0, 120, (2, 11))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
        merge_lora(ours)
        assert not any(isinstance(module, LoRALinear) for module in ours.modules())
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_peft_reads_the_adapter_of_a_classifier_with_its_head(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = SequenceClassifier(load(base).model, ["부정", "긍정"], "last")
    save_classifier(model, tmp_path / "classifier", eos_token_id=0)
    add_lora(model, LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or name == "score.weight":
                parameter.normal_(std=0.2)
    (tmp_path / "adapter").mkdir()
    head = {"score.weight": model.score.weight}
    save_adapter(model, LORA, tmp_path / "adapter", base=str(base), task_type="SEQ_CLS", also=head)
    write_labels(model, tmp_path / "adapter")
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    theirs = peft.PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    again = load_classifier(tmp_path / "adapter")
    rows = [torch.randint(1, 120, (n,)).tolist() for n in (3, 17)]
    with torch.no_grad():
        expected = torch.cat([theirs(torch.tensor([row])).logits for row in rows])
        torch.testing.assert_close(model(*pack(rows)), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again(*pack(rows)), expected, rtol=1e-4, atol=1e-4)


def test_full_rank_reproduces_the_full_update_of_a_linear_layer() -> None:
    """With A fixed and orthogonal, B's gradient step is that of the whole matrix: W - lr · dL/dW, to rounding."""
    layer = torch.nn.Linear(12, 9, bias=False).double()
    x, target = torch.randn(50, 12).double(), torch.randn(50, 9).double()
    torch.nn.functional.mse_loss(layer(x), target).backward()
    whole = layer.weight.detach() - 0.3 * layer.weight.grad
    layer.weight.grad = None
    lora = LoRALinear(layer, rank=12, scaling=1.0).double()
    with torch.no_grad():
        lora.lora_A.weight.copy_(torch.linalg.qr(torch.randn(12, 12).double()).Q)
    torch.nn.functional.mse_loss(lora(x), target).backward()
    with torch.no_grad():
        lora.lora_B.weight -= 0.3 * lora.lora_B.weight.grad
    assert lora.base_layer.weight.grad is None
    torch.testing.assert_close(lora.merged().weight.double(), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lora(x), x @ whole.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
        ({"r": "3"}, "lacks the numbers r and lora_alpha"),
    ],
)
def test_adapters_that_compute_something_else_are_refused(base: Path, tmp_path: Path, change, message: str) -> None:
    model = load(base).model
    add_lora(model, LORA)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, LORA, tmp_path / "adapter", base=str(base), task_type="CAUSAL_LM")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "adapter")


def test_an_adapter_of_another_model_is_refused_by_the_layers_name(base: Path, tmp_path: Path) -> None:
    other = Transformer(ModelConfig(**{**CONFIG.to_dict(), "hidden_size": 64}))
    add_lora(other, LORA)
    save_adapter(other, LORA, tmp_path, base=str(base), task_type="CAUSAL_LM")
    with pytest.raises(CheckpointError, match=r"does not fit the model: model\.layers\.0\.\w+\.\w+_proj has"):
        load(tmp_path)


def test_ranks_targets_and_layouts_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="rank of LoRA must be from 1"):
        LoRAConfig(0, 1.0)
    with pytest.raises(ConfigError, match="not lm_head"):
        LoRAConfig(2, 1.0, ("lm_head",))
    gpt2 = ModelConfig(**{
        **CONFIG.to_dict(), "positions": "learned", "norm": "layer_norm", "gated_mlp": False, "qk_norm": False,
        "activation": "gelu_tanh", "qkv_bias": True, "attention_output_bias": True, "mlp_bias": True, "num_kv_heads": 4,
        "norm_eps": 1e-5,
    })  # fmt: skip
    with pytest.raises(ConfigError, match="GPT-2"):
        check_adaptable(gpt2)
