"""How well labels are predicted."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(predicted: Tensor, expected: Tensor) -> float:
    """Share of equal entries of two `(examples,)` tensors."""
    return (predicted == expected).double().mean().item()


def macro_f1(predicted: Tensor, expected: Tensor, num_labels: int) -> float:
    """Mean over the labels of F1 = 2 · hits / (predicted + expected); of a label that never occurs in either, 0.

    As scikit-learn's `f1_score(expected, predicted, labels=range(num_labels), average="macro", zero_division=0)`.
    """
    hits = torch.bincount(expected[predicted == expected], minlength=num_labels).double()
    both = torch.bincount(predicted, minlength=num_labels) + torch.bincount(expected, minlength=num_labels)
    return (2.0 * hits / both.clamp(min=1)).mean().item()
