"""`fastlm.patch`: a Hugging Face decoder computes with fastlm's ops, and keeps its parameters, names and methods.

Modules stay what they are; those whose arithmetic fastlm has get another `forward` of their own, which `unpatch` takes
off again. Whether it has it is not concluded from names: each candidate is run beside what would replace it on a few
random numbers, and where the results part it is left alone. So an unknown model is at worst patched in part.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlm.compat.huggingface import NAME, register_attention
from fastlm.errors import ConfigError
from fastlm.ops import linear_cross_entropy, rms_norm, rotary, swiglu

PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Of results of about 1. A formula that differs is off by far more."""
BEFORE = "_fastlm_attn_implementation"  # what attention a patched model had
LOSS_MODELS = {
    "gemma", "gemma2", "gemma3_text", "gpt2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3",
}  # fmt: skip
"""`config.model_type` whose logits are lm_head(hidden), softcapped by `final_logit_softcapping` if at all."""


@dataclass
class Patched:
    """What `fastlm.patch` replaced, and what it left as it was and why."""

    attention: bool = False
    loss: bool = False
    norms: int = 0
    mlps: int = 0
    rotaries: int = 0
    left: Counter[str] = field(default_factory=Counter)
    """Reason -> how many modules."""

    def __str__(self) -> str:
        parts = [f"{self.norms} norms", f"{self.mlps} MLPs", f"{self.rotaries} rotary embeddings"]
        parts = ["attention"] * self.attention + ["loss"] * self.loss + parts
        lines = [f"patched: {', '.join(parts)}"]
        return "\n".join(lines + [f"left ({count}): {reason}" for reason, count in sorted(self.left.items())])


def patch(
    model: nn.Module,
    *,
    attention: bool = True,
    norms: bool = True,
    mlps: bool = True,
    rotary: bool = True,
    loss: bool = True,
) -> Patched:
    """Makes a Hugging Face decoder compute with fastlm's ops, in place; `unpatch` takes it back.

    Parameters and their names, `generate`, saving, gradient checkpointing, autocast and `torch.compile` work as before.

    Args:
        model: a `PreTrainedModel`, its weights loaded.
        attention: as `attn_implementation="fastlm"`.
        norms: RMSNorms, with Gemma's 1 + weight too.
        mlps: gated feed-forward layers with SiLU or GELU's tanh approximation.
        rotary: the rotation of queries and keys by halves.
        loss: while training, `model(..., labels=...)` gives the loss without making the logits, so that its `logits`
            are None. In evaluation both are given.

    Raises:
        ConfigError: `model` is no Hugging Face model, is patched already, or has no attention to choose.
        ImportError: transformers is missing, or older than 5.0.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"{type(model).__name__} is no transformers.PreTrainedModel; fastlm.nn has layers to put in")
    if is_patched(model):
        raise ConfigError(f"this {type(model).__name__} is patched already; call fastlm.unpatch first")
    done = Patched()
    before = model.config._attn_implementation
    if attention:
        register_attention()
        model.set_attn_implementation(NAME)
        done.attention = True
    setattr(model, BEFORE, before)
    for module in model.modules():
        if norms and _is_rms_norm(module):
            done.norms += _replace(module, _norm_forward(module), done.left)
        elif mlps and _is_gated_mlp(module):
            done.mlps += _replace(module, _mlp_forward(module), done.left)
        elif rotary and _rotary_function(module):
            done.rotaries += _replace(module, _rotary_forward(module), done.left)
    if loss:
        done.loss = bool(_replace(model, _loss_forward(model), done.left))
    return done


def unpatch(model: Any) -> None:
    """Undoes `patch`. A model that is not patched stays as it is."""
    for module in model.modules():
        if _is_ours(module):
            del module.forward
    if is_patched(model):
        model.set_attn_implementation(getattr(model, BEFORE))
        delattr(model, BEFORE)


def is_patched(model: nn.Module) -> bool:
    return hasattr(model, BEFORE)


def _is_ours(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "__fastlm__", False)


Replacement = Callable[..., Any] | str
"""A function to be the forward, or why there is none."""


def _replace(module: nn.Module, replacement: Replacement, left: Counter[str]) -> int:
    """Returns how many were replaced: 1 or 0."""
    if "forward" in module.__dict__:
        replacement = f"{type(module).__name__} has a forward of its own, set by another library"
    if isinstance(replacement, str):
        left[replacement] += 1
        return 0
    function: Any = replacement
    function.__fastlm__ = True
    module.forward = types.MethodType(function, module)
    return 1


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours.float(), theirs.float(), tolerance, tolerance)


def _random(*shape: int) -> Tensor:
    """The same numbers each time, whatever the process has drawn."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and weight.dim() == 1


def rms_norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Of an RMSNorm that multiplies by its weight."""
    return _normalized(self, hidden_states, 0.0)


def gemma_rms_norm_forward(self: Any, x: Tensor) -> Tensor:
    """Of an RMSNorm that multiplies by 1 + its weight."""
    return _normalized(self, x, 1.0)


def _normalized(module: Any, x: Tensor, weight_offset: float) -> Tensor:
    eps = getattr(module, "variance_epsilon", None)
    y = rms_norm(x, module.weight, eps=module.eps if eps is None else eps, weight_offset=weight_offset)
    assert isinstance(y, Tensor)
    return y


def _norm_forward(module: Any) -> Replacement:
    name = type(module).__name__
    if module.weight.device.type == "meta":
        return f"{name} has no weights yet; load them first"
    if not hasattr(module, "variance_epsilon") and not hasattr(module, "eps"):
        return f"{name} does not say its epsilon"
    module = copy.deepcopy(module).float().cpu()
    x = _random(3, module.weight.shape[0])
    with torch.no_grad():
        for forward in (rms_norm_forward, gemma_rms_norm_forward):
            if _close(forward(module, x), module(x), PROBE_TOLERANCE[torch.float32]):
                return forward
    return f"{name} is no RMSNorm that fastlm has"


def _is_gated_mlp(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_children()}
    return "down_proj" in names and ({"gate_proj", "up_proj"} <= names or "gate_up_proj" in names)


def silu_mlp_forward(self: Any, x: Tensor) -> Tensor:
    """Of a feed-forward layer gated by SiLU."""
    return self.down_proj(swiglu(*_gate_and_up(self, x)))


def gelu_mlp_forward(self: Any, x: Tensor) -> Tensor:
    """Of a feed-forward layer gated by GELU's tanh approximation."""
    return self.down_proj(swiglu(*_gate_and_up(self, x), activation="gelu_tanh"))


def _gate_and_up(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    if hasattr(module, "gate_up_proj"):
        gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
        return gate, up
    return module.gate_proj(x), module.up_proj(x)


def _mlp_forward(module: Any) -> Replacement:
    name = type(module).__name__
    projection = module.down_proj
    activation = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    if not isinstance(projection, nn.Linear) or activation is None:
        return f"{name} is no gated feed-forward layer that fastlm has"
    if projection.weight.device.type == "meta":
        return f"{name} has no weights yet; load them first"
    at = torch.linspace(-6, 6, 97)
    first = module.gate_up_proj if hasattr(module, "gate_up_proj") else module.gate_proj
    x = _random(3, first.in_features).to(projection.weight)
    with torch.no_grad():
        if _close(functional.silu(at), activation(at), PROBE_TOLERANCE[torch.float32]):
            forward: Callable[..., Tensor] = silu_mlp_forward
        elif _close(functional.gelu(at, approximate="tanh"), activation(at), PROBE_TOLERANCE[torch.float32]):
            forward = gelu_mlp_forward
        else:
            return f"{name} has an activation that fastlm has not: {activation}"
        theirs = module(x)
        if isinstance(theirs, Tensor):
            size = theirs.float().abs().max().clamp(min=1e-30)
            if _close(forward(module, x) / size, theirs / size, PROBE_TOLERANCE.get(theirs.dtype, 0.05)):
                return forward
    return f"{name} is no gated feed-forward layer that fastlm has"


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """transformers' function of that name: `(batch, heads, seq, head_dim)`, cos and sin `(batch, seq, head_dim)`."""
    half = cos.shape[-1] // 2
    # Each row of cos and sin is a position of its own.
    positions = torch.arange(cos.shape[0] * cos.shape[1], device=cos.device).view(cos.shape[:2])
    tables = [table[..., :half].reshape(-1, half).float() for table in (cos, sin)]
    positions = positions.expand(q.shape[0], -1)
    if unsqueeze_dim == 2:
        return rotary(q, k, *tables, positions=positions)
    q, k = rotary(q.transpose(1, 2), k.transpose(1, 2), *tables, positions=positions)
    return q.transpose(1, 2), k.transpose(1, 2)


def _rotary_function(module: nn.Module) -> Callable[..., Any] | None:
    """What the attention layer calls by the name of `apply_rotary_pos_emb`."""
    if "Attention" not in type(module).__name__:
        return None
    return inspect.unwrap(type(module).forward).__globals__.get("apply_rotary_pos_emb")


def _rotary_forward(module: nn.Module) -> Replacement:
    name, theirs = type(module).__name__, _rotary_function(module)
    assert theirs is not None
    angles = _random(1, 3, 4).repeat(1, 1, 2)
    arguments = (_random(1, 2, 3, 8), _random(1, 1, 3, 8), angles.cos(), angles.sin())
    try:
        expected = theirs(*arguments)
    except Exception:  # another signature, another function
        return f"{name} rotates in another way than fastlm"
    if not all(
        _close(a, b, PROBE_TOLERANCE[torch.float32])
        for a, b in zip(apply_rotary_pos_emb(*arguments), expected, strict=True)
    ):
        return f"{name} rotates in another way than fastlm"
    return _with_rotary(type(module).forward)


@functools.cache
def _with_rotary(forward: Any) -> Callable[..., Any]:
    """A copy of an attention's forward that finds our function where it looks for transformers'."""
    inner = getattr(forward, "__wrapped__", None)
    if inner is not None:  # under decorators, which hold the function that they wrap
        cells = tuple(
            types.CellType(_with_rotary(inner)) if cell.cell_contents is inner else cell
            for cell in forward.__closure__ or ()
        )
        found = _copy(forward, forward.__globals__, cells)
        found.__wrapped__ = _with_rotary(inner)
        return found
    # Without __name__, so that torch.compile looks into these globals and not into those of the module.
    names = {name: value for name, value in forward.__globals__.items() if name != "__name__"}
    names["apply_rotary_pos_emb"] = apply_rotary_pos_emb
    return _copy(forward, names, forward.__closure__)


def _copy(function: Any, names: dict[str, Any], cells: Any) -> Any:
    copied: Any = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__dict__.update(function.__dict__)
    return copied


def _loss_forward(model: Any) -> Replacement:
    config: Any = model.config
    head = model.get_output_embeddings()
    if not type(model).__name__.endswith("ForCausalLM") and not type(model).__name__.endswith("LMHeadModel"):
        return f"{type(model).__name__} is no causal language model, so its loss stays"
    if config.model_type not in LOSS_MODELS or type(head) is not nn.Linear or head.bias is not None:
        return f"the loss of {config.model_type} models is not known to fastlm"
    return _with_fused_loss(type(model))


@functools.cache
def _with_fused_loss(model_class: type[nn.Module]) -> Callable[..., Any]:
    """The class's forward, which computes the loss of training from the hidden states."""
    signature = inspect.signature(model_class.forward)

    @functools.wraps(model_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        arguments = dict(bound.arguments)
        del arguments["self"]
        arguments |= arguments.pop("kwargs", {})
        labels = arguments.pop("labels", None)
        shifted = arguments.pop("shift_labels", None)
        if not self.training or (labels is None and shifted is None) or arguments.pop("return_dict", True) is False:
            return model_class.forward(self, *args, **kwargs)
        arguments.pop("logits_to_keep", None)
        count = arguments.pop("num_items_in_batch", None)
        ignore_index = arguments.pop("ignore_index", -100)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        outputs = self.base_model(**arguments)
        hidden = outputs.last_hidden_state
        if shifted is None:
            shifted = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss = linear_cross_entropy(
            hidden,
            self.get_output_embeddings().weight,
            shifted.to(hidden.device).contiguous(),
            ignore_index=ignore_index,
            softcap=getattr(self.config.get_text_config(), "final_logit_softcapping", None),
            reduction="mean" if count is None else "sum",
        )
        assert isinstance(loss, Tensor)
        return CausalLMOutputWithPast(
            loss=loss if count is None else loss / count,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    return forward
