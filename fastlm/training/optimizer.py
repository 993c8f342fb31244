"""Muon or AdamW for the matrices of the blocks, AdamW for embeddings, heads, norms and biases."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlm.training.config import TrainingConfig
from fastlm.training.distributed import full_tensor, like


class Optimizer:
    """Both optimizers as one, over the parameters that require a gradient, with their state as named tensors.

    Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. AdamW: Loshchilov and Hutter 2019.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in trained.items()}
        matrices = [p for name, p in trained.items() if p.ndim == 2 and _in_block(name)]
        others = [p for name, p in trained.items() if not (p.ndim == 2 and _in_block(name))]
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = []
        if matrices and config.optimizer == "muon":
            muon = torch.optim.Muon(matrices, lr=config.learning_rate, weight_decay=config.weight_decay)
            self._optimizers.append((muon, config.learning_rate))
        elif matrices:
            self._add_adamw(matrices, config.learning_rate, config.weight_decay)
        if others:
            self._add_adamw(others, config.embedding_learning_rate, 0.0)

    def _add_adamw(self, parameters: list[nn.Parameter], rate: float, weight_decay: float) -> None:
        adamw = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
        self._optimizers.append((adamw, rate))

    def step(self, scale: float) -> None:
        """One update with every learning rate times `scale`; gradients are cleared."""
        for optimizer, rate in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        for optimizer, _ in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """`<parameter>/<quantity>` -> the whole tensor. Every process must call it."""
        return {
            f"{self._names[parameter]}/{key}": full_tensor(value)
            for optimizer, _ in self._optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `state_tensors` gave. Raises KeyError or ValueError when a tensor fits no parameter."""
        parameters = {
            self._names[p]: (p, optimizer)
            for optimizer, _ in self._optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        for full_name, tensor in tensors.items():
            name, key = full_name.rsplit("/", 1)
            parameter, optimizer = parameters[name]
            if tensor.ndim and tensor.shape != parameter.shape:
                raise ValueError(f"{full_name} is {tuple(tensor.shape)}, expected {tuple(parameter.shape)}")
            optimizer.state[parameter][key] = like(tensor, parameter)


def _in_block(name: str) -> bool:
    return ".layers." in name
