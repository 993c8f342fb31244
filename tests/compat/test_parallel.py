"""Patched models under DDP and FSDP2: two processes on one machine, against the model alone."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fastlm

from .tiny_models import VOCAB_SIZE, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")]
RANKS = 2


def rows(seed: int) -> torch.Tensor:
    return torch.randint(2, VOCAB_SIZE, (2 * RANKS, 17), generator=torch.Generator().manual_seed(seed))


def trained(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """The loss after two steps."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def work(rank: int, port: int, kind: str, seed: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    model = tiny_model("qwen3", seed=seed).train()
    fastlm.patch(model)
    wrapped: torch.nn.Module
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        wrapped = fully_shard(model)
    loss = torch.tensor(trained(wrapped, rows(seed)[2 * rank : 2 * rank + 2]))
    dist.all_reduce(loss)
    if rank == 0:
        Path(out).write_text(str(loss.item() / RANKS))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(kind: str, tmp_path: Path, fresh_seed: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "loss"
    torch.multiprocessing.spawn(work, (port, kind, fresh_seed % 1000, str(out)), nprocs=RANKS)
    alone = trained(tiny_model("qwen3", seed=fresh_seed % 1000).train(), rows(fresh_seed % 1000))
    assert float(out.read_text()) == pytest.approx(alone, rel=1e-4)
