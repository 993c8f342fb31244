from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from fastlm.errors import DataError
from fastlm.ops import OPS, linear_cross_entropy
from tests.ops.helpers import assert_as_exact_as, compile_for_chips, poisoned_memory

SHAPES = [(1, 24, 17), (7, 16, 64), (33, 40, 129), (20, 8, 530)]  # tokens, hidden_size, vocab_size
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=OPS["linear_cross_entropy"].backends)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTLM_BACKEND", request.param)
    if request.param != "reference":  # several chunks, and several blocks of a row, at the sizes of these tests
        module = OPS["linear_cross_entropy"].module(request.param)
        monkeypatch.setattr(module, "MIN_CHUNK", 16)
        monkeypatch.setattr(module, "BLOCK", 256, raising=False)
    return request.param


def served(backend, device, dtype):
    if backend == "cpu" and (device == "cuda" or dtype == torch.float16):
        h = torch.empty(1, 4, dtype=dtype, device=device)
        targets = torch.zeros(1, dtype=torch.int64, device=device)
        assert OPS["linear_cross_entropy"].explain(h, h, targets).chosen is None
        return False
    return True


def inputs(tokens, hidden_size, vocab_size, dtype, device):
    hidden = torch.randn(tokens, hidden_size, device=device).to(dtype)
    weight = torch.randn(vocab_size, hidden_size, device=device).to(dtype)
    targets = torch.randint(0, vocab_size, (tokens,), device=device)
    targets[1::5] = -100
    return hidden, weight, targets


def plain(hidden, weight, targets, *, softcap=None, z_loss=0.0, label_smoothing=0.0, reduction="mean"):
    """What one writes without this op, in the input's own precision."""
    logits = functional.linear(hidden, weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = functional.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction=reduction)
    kept = targets != -100
    z = z_loss * logits.logsumexp(-1).square() * kept
    return loss + {"none": z, "sum": z.sum(), "mean": z.sum() / kept.sum()}[reduction]


def run(function, hidden, weight, targets, grad, **settings):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(hidden, weight, targets, **settings)
    return [loss, *torch.autograd.grad(loss, (hidden, weight), grad.to(loss.dtype))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("reduction", "settings"),
    [
        ("mean", {}),
        ("sum", {"label_smoothing": 0.1, "z_loss": 1e-2}),
        ("none", {"label_smoothing": 0.1}),
        ("mean", {"softcap": 3.0, "z_loss": 1e-2, "label_smoothing": 0.2}),
        ("none", {"softcap": 3.0}),
    ],
)
def test_loss_and_gradients_match_float64_cross_entropy(backend, device, shape, dtype, settings, reduction):
    if not served(backend, device, dtype):
        return
    settings = settings | {"reduction": reduction}
    results: list[list[list[torch.Tensor]]] = [[], [], []]
    for _ in range(math.ceil(12 / shape[0])):  # the errors of a few tokens are few numbers, whose ratio is noise
        hidden, weight, targets = inputs(*shape, dtype, device)
        grad = torch.rand(targets.shape if reduction == "none" else (), device=device) + 0.5
        with poisoned_memory():
            results[0].append(run(linear_cross_entropy, hidden, weight, targets, grad, **settings))
        results[1].append(run(plain, hidden, weight, targets, grad, **settings))
        results[2].append(run(plain, hidden.double(), weight.double(), targets, grad, **settings))
    # Triton's interpreter truncates to bf16 where a chip rounds: twice the error.
    factor = 4.0 if backend == "triton" and device == "cpu" and dtype == torch.bfloat16 else 2.0
    for ours, low, exact in zip(
        *([torch.stack(of) for of in zip(*draws, strict=True)] for draws in results), strict=True
    ):
        # A small tensor may be off by the rounding of the logits: losses are fp32, but their logits are not.
        floor = max(4e-6, torch.finfo(dtype).eps / 2) if exact.numel() < 256 else 1e-6
        assert_as_exact_as(ours, low, exact, factor, floor)


def test_metrics_are_log_probability_and_entropy_of_the_capped_logits(backend, device):
    hidden, weight, targets = inputs(19, 12, 300, torch.float32, device)
    _, logprobs, entropy = linear_cross_entropy(
        hidden, weight, targets, softcap=5.0, label_smoothing=0.3, z_loss=0.1, return_metrics=True
    )
    logits = 5.0 * torch.tanh(hidden.double() @ weight.double().t() / 5.0)
    distribution = torch.distributions.Categorical(logits=logits)
    kept = targets != -100
    expected = distribution.log_prob(targets.clamp_min(0)) * kept
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), distribution.entropy() * kept, rtol=1e-5, atol=1e-5)


def plain_metrics(hidden, weight, targets, *, softcap=None):
    """Log-probabilities and entropies as one writes them in plain PyTorch, in the input's own precision."""
    logits = functional.linear(hidden, weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    kept = targets != -100
    log_p = logits.log_softmax(-1)
    logprobs = log_p.gather(-1, targets.clamp_min(0)[:, None])[:, 0]
    return logprobs * kept, -(log_p.exp() * log_p).sum(-1) * kept


def policy_gradients(function, hidden, weight, targets, grads, dtype=None):
    """Gradients in hidden and weight of a sum of loss, log-probabilities and entropies, those that `grads` weighs."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (hidden, weight)]
    outputs = function(*leaves, targets)
    chosen = [(out, g.to(out.dtype)) for out, g in zip(outputs, grads, strict=True) if g is not None]
    return torch.autograd.grad([o for o, _ in chosen], leaves, [g for _, g in chosen])


@pytest.mark.parametrize("which", ["logprobs", "entropy", "both", "all"])
@pytest.mark.parametrize(
    ("dtype", "softcap", "reduction"),
    [
        (torch.float32, None, "mean"),
        (torch.float32, 3.0, "none"),
        (torch.bfloat16, None, "none"),
        (torch.bfloat16, None, "mean"),
        (torch.float16, 4.0, "sum"),
    ],
)
def test_gradients_of_log_probability_and_entropy_match_float64(backend, device, which, dtype, softcap, reduction):
    if not served(backend, device, dtype):
        return
    hidden, weight, targets = inputs(70, 24, 300, dtype, device)
    tokens = torch.randn(3, 70, device=device)
    loss_grad = tokens[0] if reduction == "none" else tokens[0, 0]
    grads = [loss_grad if which == "all" else None, *tokens[1:]]
    if which in ("logprobs", "entropy"):
        grads[2 if which == "logprobs" else 1] = None
    settings = {"softcap": softcap, "reduction": reduction, "label_smoothing": 0.1, "z_loss": 1e-2}

    def ours(*tensors):
        return linear_cross_entropy(*tensors, **settings, return_metrics=True)

    def formula(*tensors):
        return plain(*tensors, **settings), *plain_metrics(*tensors, softcap=softcap)

    with poisoned_memory():
        results = policy_gradients(ours, hidden, weight, targets, grads)
    low = policy_gradients(formula, hidden, weight, targets, grads)
    exact = policy_gradients(formula, hidden, weight, targets, grads, torch.float64)
    factor = 4.0 if backend == "triton" and device == "cpu" and dtype == torch.bfloat16 else 2.0
    for a, b, c in zip(results, low, exact, strict=True):
        assert a.dtype == dtype
        assert_as_exact_as(a, b, c, factor)


def test_gradients_of_the_definition_pass_gradcheck(monkeypatch):
    monkeypatch.setenv("FASTLM_BACKEND", "reference")
    hidden, weight, targets = inputs(5, 4, 7, torch.float64, "cpu")
    for settings in ({"reduction": "mean"}, {"reduction": "none", "softcap": 2.0, "z_loss": 0.1}):
        torch.autograd.gradcheck(
            lambda h, w, s=settings: linear_cross_entropy(h, w, targets, label_smoothing=0.1, **s, return_metrics=True),
            (hidden.requires_grad_(), weight.requires_grad_()),
        )


def test_metrics_that_nothing_is_taken_from_leave_the_loss_as_it_was(backend, device):
    hidden, weight, targets = inputs(33, 16, 50, torch.float32, device)
    one = torch.ones((), device=device)

    def with_metrics(*tensors):
        return linear_cross_entropy(*tensors, return_metrics=True)[0]

    expected = run(linear_cross_entropy, hidden, weight, targets, one)
    assert all(
        torch.equal(a, b) for a, b in zip(run(with_metrics, hidden, weight, targets, one), expected, strict=True)
    )
    loss, logprobs, _ = linear_cross_entropy(hidden.requires_grad_(), weight, targets, return_metrics=True)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(logprobs.sum(), hidden)  # of ignored targets too, whose gradient is zero
    assert second[targets == -100].eq(0).all()
    torch.testing.assert_close(first, -second / (targets != -100).sum())


def test_uniform_logits_cost_the_log_of_the_vocabulary(backend, device):
    for vocab_size in (1, 2, 1000):
        hidden, weight = torch.zeros(3, 8, device=device), torch.randn(vocab_size, 8, device=device)
        targets = torch.zeros(3, dtype=torch.int64, device=device)
        loss, logprobs, entropy = linear_cross_entropy(hidden, weight, targets, return_metrics=True)
        assert loss.item() == pytest.approx(math.log(vocab_size), abs=1e-6)
        assert entropy[0].item() == pytest.approx(math.log(vocab_size), abs=1e-6)
        assert logprobs[0].item() == pytest.approx(-math.log(vocab_size), abs=1e-6)


def test_huge_logits_neither_overflow_nor_lose_the_answer(backend, device):
    hidden = torch.tensor([[1e4], [-1e4]], device=device, requires_grad=True)
    weight = torch.tensor([[1.0], [0.5], [-1.0]], device=device, requires_grad=True)
    targets = torch.tensor([0, 0], device=device)
    losses = linear_cross_entropy(hidden, weight, targets, reduction="none")
    torch.testing.assert_close(losses.detach(), torch.tensor([0.0, 2e4], device=device))
    grad_hidden, _ = torch.autograd.grad(losses.sum(), (hidden, weight))
    torch.testing.assert_close(grad_hidden, torch.tensor([[0.0], [-2.0]], device=device))


def test_ignored_targets_have_no_loss_and_no_gradient(backend, device):
    hidden, weight, targets = inputs(12, 8, 20, torch.float32, device)
    targets = torch.randint(1, 20, (12,), device=device)
    targets[3:7] = 0
    hidden.requires_grad_()
    losses = linear_cross_entropy(hidden, weight, targets, ignore_index=0, reduction="none", label_smoothing=0.1)
    (grad,) = torch.autograd.grad(losses.sum(), hidden)
    assert losses[3:7].eq(0).all()
    assert losses[:3].gt(0).all()
    assert grad[3:7].eq(0).all()
    mean = linear_cross_entropy(hidden, weight, targets, ignore_index=0, label_smoothing=0.1)
    torch.testing.assert_close(mean, losses.sum() / 8)


@pytest.mark.parametrize("targets", [[-100, -100], []])
def test_nothing_to_predict_gives_nan_and_zero_gradients_as_torch_does(backend, device, targets):
    targets = torch.tensor(targets, dtype=torch.int64, device=device)
    hidden = torch.randn(len(targets), 8, device=device, requires_grad=True)
    weight = torch.randn(20, 8, device=device, requires_grad=True)
    for function in (linear_cross_entropy, plain):
        loss = function(hidden, weight, targets)
        assert loss.isnan()
        if function is linear_cross_entropy:
            for grad in torch.autograd.grad(loss, (hidden, weight)):
                assert grad.eq(0).all()
    assert linear_cross_entropy(hidden, weight, targets, reduction="sum") == 0


def test_batches_and_strides_are_read_without_a_wrong_element(backend, device):
    wide = torch.randn(4, 6, 30, device=device, requires_grad=True)
    weight = torch.randn(16, 40, device=device)[:, ::2].requires_grad_()
    targets = torch.randint(0, 16, (6, 8), device=device)[:, ::2]
    hidden = wide.transpose(0, 1)[..., 5:25]
    ours = run(linear_cross_entropy, hidden, weight, targets, torch.ones((), device=device))
    expected = run(
        lambda h, w, t: plain(h.flatten(0, 1), w, t.flatten()), hidden, weight, targets, torch.ones((), device=device)
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_the_gradients_asked_for_are_made(backend, device, frozen):
    hidden, weight, targets = inputs(9, 8, 20, torch.float32, device)
    kept = weight if frozen == "hidden" else hidden
    kept.requires_grad_()
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
        (grad,) = torch.autograd.grad(loss.sum(), kept)
        (expected,) = torch.autograd.grad(plain(hidden, weight, targets, reduction=reduction).sum(), kept)
        torch.testing.assert_close(grad, expected)


def test_gradients_may_be_taken_twice_from_one_loss(backend, device):
    hidden, weight, targets = inputs(9, 8, 20, torch.float32, device)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    (first,) = torch.autograd.grad(3 * loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(first, 3 * second)


def test_backward_gives_the_same_bits_at_every_run(backend, device):
    hidden, weight, targets = inputs(300, 24, 77, torch.float32, device)
    one = torch.ones((), device=device)
    first, second = (run(linear_cross_entropy, hidden, weight, targets, one) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_loss_scaling_keeps_small_fp16_gradients(device):
    hidden, weight, targets = inputs(4096, 8, 32, torch.float16, device)
    hidden, weight = hidden * 0.01, weight * 0.01
    scale = torch.tensor(2.0**14, device=device)
    _, grad_hidden, _ = run(linear_cross_entropy, hidden, weight, targets, scale)
    _, expected, _ = run(plain, hidden.double(), weight.double(), targets, scale)
    assert (grad_hidden.double() - expected).norm() < 2e-3 * expected.norm()


def test_autocast_computes_as_linear_does(device):
    hidden, weight, targets = inputs(10, 8, 20, torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(loss, linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_accepts_the_registration(device, reduction):
    hidden, weight, targets = inputs(6, 8, 20, torch.float32, device)
    arguments = (hidden.requires_grad_(), weight.requires_grad_(), targets, -100, 0.1, 1e-3, 5.0, reduction)
    torch.library.opcheck(torch.ops.fastlm.linear_cross_entropy.default, arguments)
    torch.library.opcheck(torch.ops.fastlm.linear_cross_entropy.default, (*arguments, True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_traces_into_one_graph_with_its_backward(device, reduction):
    hidden, weight, targets = inputs(6, 8, 20, torch.float32, device)
    grad = torch.ones(targets.shape if reduction == "none" else (), device=device)

    def function(*tensors, **settings):
        return linear_cross_entropy(*tensors, **settings)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = run(linear_cross_entropy, hidden, weight, targets, grad, reduction=reduction)
    for a, b in zip(run(compiled, hidden, weight, targets, grad, reduction=reduction), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivative_is_refused_rather_than_wrong(device):
    hidden, weight, targets = inputs(6, 8, 20, torch.float32, device)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    (grad,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_inputs_that_do_not_fit_are_named(backend):
    hidden, weight, targets = inputs(3, 8, 20, torch.float32, "cpu")
    for wrong in (20, -1, -101, 2**62, -(2**62)):
        with pytest.raises(DataError, match=rf"target {wrong} \(token 2\) is neither ignore_index=-100 nor in \[0, 20"):
            linear_cross_entropy(hidden, weight, torch.tensor([0, 19, wrong]))
    with pytest.raises(ValueError, match=r"weight must be \(vocab_size, hidden_size\)"):
        linear_cross_entropy(hidden, weight.t(), targets)
    with pytest.raises(ValueError, match="hidden and weight must have one dtype"):
        linear_cross_entropy(hidden.bfloat16(), weight, targets)
    with pytest.raises(ValueError, match="targets must be int64"):
        linear_cross_entropy(hidden, weight, targets[:2])
    with pytest.raises(ValueError, match="targets must be int64"):
        linear_cross_entropy(hidden, weight, targets.float())
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\)"):
        linear_cross_entropy(hidden, weight, targets, label_smoothing=1.0)
    with pytest.raises(ValueError, match="softcap must be positive"):
        linear_cross_entropy(hidden, weight, targets, softcap=0.0)
    with pytest.raises(ValueError, match="reduction must be one of"):
        linear_cross_entropy(hidden, weight, targets, reduction="avg")


def test_weight_gradient_of_many_chunks_is_as_exact_as_of_one():
    hidden, weight, targets = inputs(2048, 32, 512, torch.bfloat16, "cpu")
    targets = torch.randint(
        0, 512, (2048,)
    )  # a mean over a power of two, whose gradients the plain version rounds least
    one = torch.ones(())
    ours = run(linear_cross_entropy, hidden, weight, targets, one)
    low = run(plain, hidden, weight, targets, one)
    exact = run(plain, hidden.double(), weight.double(), targets, one)
    assert_as_exact_as(ours[1], low[1], exact[1])
    assert_as_exact_as(ours[2], low[2], exact[2])


def peak_allocation(function):
    """Largest sum of bytes that torch holds at once on the CPU while `function` runs, over what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_stays_under_a_tenth_of_the_plain_version(dtype):
    hidden, weight, targets = inputs(4096, 16, 2048, dtype, "cpu")
    one = torch.ones(())
    gradients = (hidden.numel() + weight.numel()) * hidden.element_size()
    ours, low = (
        peak_allocation(lambda f=f: run(f, hidden, weight, targets, one)) - gradients
        for f in (linear_cross_entropy, plain)
    )
    assert low > 4096 * 2048 * hidden.element_size(), "the measure misses the plain version's logits"
    assert ours < 0.1 * low, f"ours {ours} bytes, plain {low}"


@pytest.mark.gpu
def test_target_out_of_range_gives_nan_on_a_gpu():
    hidden, weight, _ = inputs(3, 8, 20, torch.float32, "cuda")
    losses = linear_cross_entropy(hidden, weight, torch.tensor([1, 20, -1], device="cuda"), reduction="none")
    assert losses.isnan().tolist() == [False, True, True]


@pytest.mark.aot
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
@pytest.mark.parametrize("softcap", [False, True])
def test_kernel_compiles_for_each_chip_without_spills(dtype, softcap):
    from fastlm.ops.linear_cross_entropy import triton as kernels

    scales = ["scale_ptr", "logprob_scale_ptr", "entropy_scale_ptr"]
    pointers = dict.fromkeys([*scales, "losses_ptr", "logprobs_ptr", "entropy_ptr"], "*fp32")
    pointers |= {"logits_ptr": dtype, "targets_ptr": "*i64"}
    scalars = {"stride": "i32", "vocab_size": "i32", "ignore_index": "i32"}
    scalars |= dict.fromkeys(["label_smoothing", "z_loss", "softcap"], "fp32")
    for metrics in (False, True):
        constants = {"HAS_SCALE": True, "HAS_LOGPROB_SCALE": metrics, "HAS_ENTROPY_SCALE": metrics}
        constants |= {"HAS_SOFTCAP": softcap, "BLOCK": kernels.BLOCK}
        for compiled in compile_for_chips(kernels._kernel, pointers | scalars, constants, num_warps=8):
            assert compiled.spill_bytes == 0, compiled.chip
