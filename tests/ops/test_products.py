"""Products of linear layers in training by oneDNN, on whatever processor this is."""

from __future__ import annotations

import pytest
import torch

from fastlm.model import ModelConfig, Transformer
from fastlm.ops import _products
from tests.ops.helpers import assert_as_exact_as

SHAPES = [(2500, 96, 40), (1025, 33, 130), (700, 64, 64)]  # rows, in_features, out_features


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(_products, "_has_slow_mkl", lambda: True)


def products(rows, in_features, out_features):
    x, weight, grad, total = (
        torch.randn(shape)
        for shape in ((rows, in_features), (out_features, in_features), (rows, out_features), (rows, in_features))
    )
    ours = (
        _products.linear(x, weight),
        _products.input_gradient(grad, weight),
        _products.weight_gradient(grad, x),
        _products.add_input_gradient(total.clone(), grad, weight),
    )
    plain = (x @ weight.t(), grad @ weight, grad.t() @ x, total + grad @ weight)
    x, weight, grad, total = (t.double() for t in (x, weight, grad, total))
    return ours, plain, (x @ weight.t(), grad @ weight, grad.t() @ x, total + grad @ weight)


@pytest.mark.usefixtures("by_onednn")
@pytest.mark.parametrize("shape", SHAPES)
def test_onednn_is_as_exact_as_torchs_products(shape) -> None:
    assert _products.by_onednn(torch.empty(shape[:2]), torch.empty(shape[2], shape[1]), shape[2])
    for ours, plain, exact in zip(*products(*shape), strict=True):
        assert ours.is_contiguous()
        assert_as_exact_as(ours, plain, exact, 2.0, 1e-6)


@pytest.mark.usefixtures("by_onednn")
def test_products_of_several_dimensions_equal_those_of_rows() -> None:
    x, weight = torch.randn(3, 500, 64), torch.randn(80, 64)
    torch.testing.assert_close(_products.linear(x, weight), torch.nn.functional.linear(x, weight))
    grad = torch.randn(3, 500, 80)
    torch.testing.assert_close(_products.input_gradient(grad, weight), grad @ weight, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("by_onednn")
def test_a_models_loss_and_gradients_by_onednn_are_those_by_torchs_products(monkeypatch) -> None:
    monkeypatch.setattr(_products, "MIN_PRODUCTS", 0)
    config = ModelConfig(300, 64, 2, 2, 1, 32, 96, 200, qk_norm=True, tie_embeddings=False)
    model, ids = Transformer(config), torch.randint(300, (3, 201))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    parameters = list(model.parameters())

    def results() -> list[torch.Tensor]:
        loss = model.loss(ids[:, :-1], ids[:, 1:].contiguous())
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    calls: list[tuple[int, ...]] = []
    onednn = _products._onednn
    monkeypatch.setattr(_products, "_onednn", lambda x, weight: calls.append(x.shape) or onednn(x, weight))
    ours = results()
    assert len(calls) >= 3 * (7 * config.num_layers + 1)  # of each linear layer, the output layer included
    monkeypatch.setattr(_products, "_has_slow_mkl", lambda: False)
    for a, b in zip(ours, results(), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.usefixtures("by_onednn")
def test_they_are_torchs_own_where_onednn_is_off_or_brings_nothing() -> None:
    x, weight = torch.randn(512, 128), torch.randn(128, 128)
    assert _products.by_onednn(x, weight, 128)
    assert not _products.by_onednn(x.bfloat16(), weight.bfloat16(), 128)
    assert not _products.by_onednn(x[:8], weight, 128)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not _products.by_onednn(x, weight, 128)
        assert torch.equal(_products.linear(x, weight), x @ weight.t())
        assert torch.equal(_products.weight_gradient(x, x), x.t() @ x)
