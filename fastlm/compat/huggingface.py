"""fastlm's attention under the name that Hugging Face's models choose one by: `attn_implementation="fastlm"`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.errors import ConfigError
from fastlm.ops import attention

NAME = "fastlm"


def register_attention() -> None:
    """Makes `attn_implementation="fastlm"` known to transformers, for this process.

    Raises:
        ImportError: transformers is missing, or older than 5.0.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask_or_none)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for a layer's attention.

    Args:
        query: `(batch, heads, seq_q, head_dim)`.
        key, value: `(batch, kv_heads, seq_k, head_dim)`.
        attention_mask: None: causal as the layer is, within its window; else all that is visible,
            `(batch, 1 or heads, seq_q, seq_k)`, bool or added to the logits.
        s_aux: `(heads,)`, the logits of sinks.
        cu_seq_lens_q, cu_seq_lens_k: where packed sequences begin, in a batch of one.

    Returns:
        `(batch, seq_q, heads, head_dim)`, and None for the probabilities, which are never made.

    Raises:
        ConfigError: the layer asks for dropout.
    """
    if dropout > 0:
        raise ConfigError(
            f"{type(module).__name__} asks for dropout of {dropout} in attention, which fastlm's has not; set the "
            "config's attention dropout to 0, or choose another attn_implementation for training"
        )
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if cu_seq_lens_q is not None and q.shape[0] == 1:
        out = attention(
            q[0],
            k[0],
            v[0],
            causal=causal,
            window=sliding_window if causal else None,
            softcap=softcap,
            sinks=s_aux,
            scale=scaling,
            cu_seqlens_q=cu_seq_lens_q.to(torch.int32),
            cu_seqlens_k=None if cu_seq_lens_k is None else cu_seq_lens_k.to(torch.int32),
            max_seqlen_q=max_length_q,
            max_seqlen_k=max_length_k,
        )
        assert isinstance(out, Tensor)
        return out[None], None
    bias = attention_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill(~bias, -torch.inf)
    plain = bias is None and causal
    out = attention(
        q,
        k,
        v,
        causal=plain,
        window=sliding_window if plain else None,
        softcap=softcap,
        sinks=s_aux,
        bias=bias,
        scale=scaling,
    )
    assert isinstance(out, Tensor)
    return out, None


def attention_mask_or_none(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Tensor | None:
    """None where the layer's own causality and window say all, which is fast; else transformers' mask as a bias.

    Returns:
        None, or `(batch_size, 1, q_length, kv_length)` in `dtype`: 0 where visible, -inf elsewhere.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if mask_function is None:
        mask_function = causal_mask_function
    # Whether it hides anything is not to be asked while compiling.
    is_padded = attention_mask is not None and (torch.compiler.is_compiling() or not bool(attention_mask.all()))
    # The last query must be beside the last key; in a cache of fixed size it is not, nor while that is compiled.
    at_the_end = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    is_causal = mask_function is causal_mask_function
    if not is_causal and not torch.compiler.is_compiling():  # which cannot look into functions
        is_causal = _is_causal_window(mask_function)
    if not is_padded and allow_is_causal_skip and at_the_end and is_causal:
        return None
    if not is_padded and allow_is_bidirectional_skip and (local_size is None or kv_length < local_size):
        return None
    visible: Any = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]  # a tensor in a cache of fixed size
        kv_offset=kv_offset,
        mask_function=mask_function,
        local_size=local_size,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **kwargs,
    )
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, -torch.inf)


def _is_causal_window(mask_function: Callable[..., Any]) -> bool:
    """Whether it is transformers' combination of a window and causality. Any doubt is a no: the mask is right too."""
    from transformers.masking_utils import causal_mask_function

    cells = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    if len(cells) != 1 or not isinstance(cells[0], tuple) or len(cells[0]) != 2:
        return False
    names = {getattr(function, "__qualname__", "").split(".")[0] for function in cells[0]}
    return names == {"sliding_window_overlay", causal_mask_function.__qualname__}
