"""What the fast backends share: logits of a chunk of tokens by a matrix product into one small buffer, a kernel that
turns them in place into losses and gradients, two more products into the gradients of hidden and weight. The same three
products that plain PyTorch makes, but memory for one chunk's logits in place of three or four times all of them, and
each logit goes to memory and back as often as the kernel says, not once for each elementwise step. As in Liger-Kernel
(arXiv 2410.10989, section 3.2); see also Cut Cross-Entropy, arXiv 2411.09009.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.ops import _products

Scales = tuple[Tensor | None, Tensor | None, Tensor | None]  # of the losses, the log-probabilities, the entropies
# (logits chunk, targets, scales, losses, logprobs, entropy) -> None; the gradient overwrites the logits
Kernel = Callable[[Tensor, Tensor, Scales, Tensor, Tensor, Tensor], None]


def token_losses(
    kernel: Kernel,
    chunk_size: int,
    sum_dtype: torch.dtype,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scales: Scales,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The chunks' shares of the weight's gradient are summed in `sum_dtype`."""
    tokens = hidden.shape[0]
    targets = targets.contiguous()
    needs_any = needs_hidden or needs_weight
    loss_scale, logprob_scale, entropy_scale = (None if s is None or not needs_any else s.contiguous() for s in scales)
    losses, logprobs, entropy = (torch.empty(tokens, dtype=torch.float32, device=hidden.device) for _ in range(3))
    grad_hidden = hidden.new_empty(hidden.shape if needs_hidden else (0,))
    grad_weight = torch.zeros(weight.shape if needs_weight else (0,), dtype=sum_dtype, device=weight.device)
    by_onednn = _products.by_onednn(hidden[:chunk_size], weight, weight.shape[0])  # which takes no `out`
    logits = hidden.new_empty(0 if by_onednn else min(chunk_size, tokens), weight.shape[0])
    for start in range(0, tokens, chunk_size):
        rows = slice(start, start + chunk_size)
        chunk_hidden = hidden[rows]
        if by_onednn:
            chunk = _products.linear(chunk_hidden, weight)
        else:
            chunk = torch.mm(chunk_hidden, weight.t(), out=logits[: chunk_hidden.shape[0]])
        chunk_scales = (_rows(loss_scale, rows), _rows(logprob_scale, rows), _rows(entropy_scale, rows))
        kernel(chunk, targets[rows], chunk_scales, losses[rows], logprobs[rows], entropy[rows])
        if needs_hidden and by_onednn:
            grad_hidden[rows] = _products.input_gradient(chunk, weight)
        elif needs_hidden:
            torch.mm(chunk, weight, out=grad_hidden[rows])
        if needs_weight:
            if by_onednn:
                grad_weight += _products.weight_gradient(chunk, chunk_hidden)
            elif sum_dtype == hidden.dtype:
                grad_weight.addmm_(chunk.t(), chunk_hidden)
            else:
                grad_weight += torch.mm(chunk.t(), chunk_hidden)
        del chunk  # before the next one is made
    return losses, logprobs, entropy, grad_hidden, grad_weight.to(weight.dtype)


def _rows(t: Tensor | None, rows: slice) -> Tensor | None:
    return None if t is None else t[rows]
