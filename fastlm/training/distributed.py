"""Training by several processes that `torchrun` started: replicas of the model (DDP), or shards of it (FSDP2).

Every process computes its share of each batch, so a step is the same whatever the number of processes, but for the
order in which floating-point numbers are added. Checkpoints are written whole by the first process, in the one format
that there is: any number of processes, or a single one, goes on from them.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fastlm.errors import ConfigError, TrainingError

Parallel = Literal["ddp", "fsdp"]
T = TypeVar("T")
# What PyTorch's communication says when another process is gone; it raises plain RuntimeErrors.
LOST = ("gloo", "nccl", "connection", "process group", "processgroup", "socket", "timed out", "peer")


class World:
    """The processes that train together; one alone where `torchrun` started none."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.size > 1 else 0
        if self.size > 1 and not torch.distributed.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            with losing_a_process_is_an_error():
                torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mine(self, items: list[T]) -> list[T]:
        """This process's share of what all have; each gets as many."""
        return items[self.rank :: self.size]

    def sum(self, *values: float) -> list[float]:
        """The sums over all processes."""
        return self._reduced(values, "SUM")

    def any(self, *flags: bool) -> list[bool]:
        """Which of the flags some process has raised."""
        return [value > 0 for value in self._reduced(map(float, flags), "MAX")]

    def _reduced(self, values: Any, operation: str) -> list[float]:
        if self.size == 1:
            return list(values)
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
        torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, operation))
        return tensor.tolist()

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, in all of them; the others wait."""
        if self.size == 1:
            return make()
        box = [make() if self.is_main else None]
        torch.distributed.broadcast_object_list(box, src=0)
        result: Any = box[0]
        return result

    def close(self) -> None:
        """Leaves the other processes, once all have come so far."""
        if self.size > 1 and torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def losing_a_process_is_an_error() -> Iterator[None]:
    """What PyTorch raises when another process is gone becomes one line."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not any(word in text for word in LOST):
            raise
        raise TrainingError(
            f"process {os.environ.get('RANK')} lost another process of this job; the last checkpoint is whole: run the "
            "same command again, or let torchrun do so with --max-restarts"
        ) from error


class Parallelism:
    """How a model is spread over the world, seen from the loop: losses, gradients, and the model to save."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], Tensor], world: World, kind: Parallel) -> None:
        self.world = world
        self.loss = loss
        self.whole: nn.Module | None = model  # what files are written from, in the first process
        self._wrapped: Any = None
        self._sharded: nn.Module | None = None
        if world.size == 1:
            return
        if kind == "ddp":
            self._wrapped = torch.nn.parallel.DistributedDataParallel(_Loss(model, loss))
            self.loss = self._wrapped
        elif kind == "fsdp":
            self.whole = copy.deepcopy(model) if world.is_main else None
            self._sharded = _shard(model)
        else:
            raise ConfigError(f"parallel must be ddp or fsdp, not {kind!r}")

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of a share of the loss; at the last share of a step, all processes' gradients become the
        sum over them."""
        if self._sharded is not None:
            self._sharded.set_requires_gradient_sync(last)  # type: ignore[operator]
        (loss * self.world.size).backward()  # both take the mean over processes

    def before(self, *, last: bool) -> None:
        """To be called before the loss of a share."""
        if self._wrapped is not None:
            self._wrapped.require_backward_grad_sync = last

    @torch.no_grad()
    def gather(self) -> None:
        """Makes `whole` equal to the model. Every process must call it."""
        if self._sharded is None:
            return
        target = dict(self.whole.named_parameters()) if self.whole is not None else {}
        for name, parameter in self._sharded.named_parameters():
            full = full_tensor(parameter)
            if name in target:
                target[name].copy_(full)


class _Loss(nn.Module):
    """The loss as a module's forward, which is what DDP wraps."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, part: Any) -> Tensor:
        return self._loss(part)


def _shard(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    decoder = getattr(model, "model", None)
    for block in getattr(decoder, "layers", []):
        fully_shard(block)
    fully_shard(model)
    if hasattr(model, "loss"):
        register_fsdp_forward_method(model, "loss")
    return model


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; then every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, sharded as a parameter of its shape is."""
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
