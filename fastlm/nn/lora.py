"""Low-rank adaptation of a linear layer that itself stays as it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlm.nn.quantized import QuantizedLinear
from fastlm.ops.quantized_linear import dequantize


class LoRALinear(nn.Module):
    """base_layer(x) + scaling · (x · Aᵀ) · Bᵀ: `(..., in_features)` -> `(..., out_features)`.

    `lora_A.weight` `(rank, in_features)` starts random and `lora_B.weight` `(out_features, rank)` zero, so the layer
    starts as its base, which is frozen and may be quantized. The names are PEFT's.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv 2106.09685), section 4.1.
    """

    def __init__(self, base_layer: nn.Linear | QuantizedLinear, rank: int, scaling: float) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.scaling = scaling
        device = base_layer.weight.device
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        low = functional.linear(x, self.lora_A.weight.to(x.dtype))
        return self.base_layer(x) + self.scaling * functional.linear(low, self.lora_B.weight.to(x.dtype))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer that computes the same; of a quantized base, with its weights as numbers."""
        base = self.base_layer
        if isinstance(base, QuantizedLinear):
            weight = dequantize(base.weight, base.quantization)
        else:
            weight = base.weight
        update = self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())
        layer = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        layer.weight = nn.Parameter((weight.float() + update).to(weight.dtype))
        if base.bias is not None:
            layer.bias = nn.Parameter(base.bias.detach().clone())
        return layer
