"""The language-model loss as a module."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from fastlm.ops import linear_cross_entropy


class LinearCrossEntropyLoss(nn.Module):
    """Mean cross-entropy of `hidden @ weight.T` against targets, in nats, without keeping the logits.

    Args:
        ignore_index: targets of this value count neither in the sum nor in the mean.
        z_loss: coefficient of the mean of logsumexp², which keeps logits from drifting (PaLM, section 5).
        softcap: bound on the logits' size, as in Gemma 2.

    Shapes: hidden `(..., hidden_size)`, weight `(vocab_size, hidden_size)`, targets `(...)` int64 -> scalar, or like
    targets with reduction="none".
    """

    def __init__(self, *, ignore_index: int = -100, z_loss: float = 0.0, softcap: float | None = None) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.z_loss = z_loss
        self.softcap = softcap

    def forward(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, reduction: Literal["mean", "sum", "none"] = "mean"
    ) -> Tensor:
        loss = linear_cross_entropy(
            hidden,
            weight,
            targets,
            ignore_index=self.ignore_index,
            z_loss=self.z_loss,
            softcap=self.softcap,
            reduction=reduction,
        )
        assert isinstance(loss, Tensor)
        return loss
