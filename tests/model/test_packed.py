from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastlm.model import ModelConfig, Transformer

CONFIG = ModelConfig(
    vocab_size=101, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48,
    context_length=40, qk_norm=True,
)  # fmt: skip
VARIANTS = {
    "llama": CONFIG,
    "window": replace(CONFIG, sliding_window=5, full_attention_layers=(1,)),
    "gpt2": replace(CONFIG, positions="learned", norm="layer_norm", gated_mlp=False, qk_norm=False, num_kv_heads=4),
    "softcap": replace(CONFIG, attention_softcap=5.0, norm_placement="around"),
}


def model_of(config: ModelConfig) -> Transformer:
    model = Transformer(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_give_the_losses_and_gradients_of_each_by_itself(name: str) -> None:
    model = model_of(VARIANTS[name])
    lengths = [1, 7, 31, 2, 13, 40, 2]  # 96 tokens, which are read as two rows of 48
    documents = [torch.randint(0, 101, (n,)) for n in lengths]
    targets = [torch.randint(0, 101, (n,)) for n in lengths]
    alone = [model.loss(ids[None], t[None], "sum") for ids, t in zip(documents, targets, strict=True)]
    sum(alone).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    rows, row_targets = torch.cat(documents).view(2, 48), torch.cat(targets).view(2, 48)
    each = model.loss(rows, row_targets, "none", cu_seqlens=cu_seqlens).flatten().split(lengths)
    for got, wanted in zip(each, alone, strict=True):
        torch.testing.assert_close(got.sum(), wanted.to(got.dtype), rtol=1e-6, atol=1e-6)
    model.loss(rows, row_targets, "sum", cu_seqlens=cu_seqlens).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-6, msg=name)


def test_a_document_does_not_see_what_is_packed_before_it() -> None:
    model = model_of(CONFIG)
    ids = torch.randint(0, 101, (1, 20))
    other = ids.clone()
    other[0, :12] = torch.randint(0, 101, (12,))
    cu_seqlens = torch.tensor([0, 12, 20], dtype=torch.int32)
    both = [model.hidden_states(rows, cu_seqlens=cu_seqlens)[0, 12:] for rows in (ids, other)]
    assert torch.equal(both[0], both[1])
    assert not torch.equal(model.hidden_states(ids)[0, 12:], model.hidden_states(other)[0, 12:])


@pytest.mark.parametrize("offsets", [[0, 5], [1, 20], [0, 12, 8, 20], [0, 21]])
def test_offsets_that_are_not_the_tokens_are_refused(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 20"):
        model_of(CONFIG).hidden_states(
            torch.zeros(1, 20, dtype=torch.int64), cu_seqlens=torch.tensor(offsets, dtype=torch.int32)
        )


def test_a_packed_document_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="41 tokens do not fit the context of 40"):
        model_of(CONFIG).hidden_states(
            torch.zeros(1, 50, dtype=torch.int64), cu_seqlens=torch.tensor([0, 41, 50], dtype=torch.int32)
        )
