"""Decoding steps recorded once and replayed, so that a GPU does not wait for Python between a layer's small kernels.

A step of one token a sequence always runs the same kernels; only what they read differs. So it is recorded with inputs
at fixed addresses, for a few numbers of sequences, and later steps copy their inputs there and replay the record (CUDA
Programming Guide, "CUDA Graphs"). A step with fewer sequences is filled up with ones of no tokens, which write their
keys to a block that is nobody's and see nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm.errors import BackendError

WITHOUT = "make the engine with cuda_graphs=False, and report it with `fastlm doctor`'s output"
LARGEST_ERROR = 0.02  # relative; what bf16 may lose where a library takes another algorithm

Step = Callable[["DecodeInputs"], Tensor]  # the hidden states of a step, (tokens, hidden_size)
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]  # -> (replay, its result, computed once)


@dataclass(frozen=True)
class DecodeInputs:
    """What a step of `size` sequences with one new token each reads. What is named after the window is for layers in
    the windowed pool.
    """

    ids: Tensor  # (size,) int64
    positions: Tensor  # (size,) int64
    slots: Tensor  # (size,) int64
    window_slots: Tensor  # (size,) int64
    block_table: Tensor  # (size, max_blocks) int32
    window_table: Tensor  # (size, max_blocks) int32
    context_lens: Tensor  # (size,) int32
    num_shared_tokens: Tensor | None  # () int32; steps without it have a record of their own


def record_on_gpu(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Runs once as usual, since kernels are compiled and chosen then, and once to be recorded; both must say the same.

    Raises:
        BackendError: something in `run` cannot be recorded, or reads what has moved when it is replayed.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = run().clone()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = run()
    except RuntimeError as error:
        raise BackendError(f"a decoding step cannot be recorded as a CUDA graph: {error}; {WITHOUT}") from error
    graph.replay()
    require_same(result, expected)
    return graph.replay, result


def require_same(result: Tensor, expected: Tensor) -> None:
    """Raises BackendError unless a replayed step gave, within rounding, what the same step gives as usual."""
    error = (result - expected).float().norm() / expected.float().norm()
    if error > LARGEST_ERROR:
        raise BackendError(f"a decoding step replayed as a CUDA graph is off by {error:.1e} of its norm; {WITHOUT}")


def sizes(max_sequences: int) -> list[int]:
    """The numbers of sequences that steps are recorded for: padding never doubles the work, nor adds more than 7."""
    return [size for size in (1, 2, 4) if size < max_sequences] + list(range(8, max_sequences + 8, 8))


class DecodeGraphs:
    """Records of decoding steps of up to `max_sequences` sequences, made when a size is first needed.

    Args:
        run: computes a step. It must read nothing but the step's tensors and what does not move.
        max_blocks: the most blocks that a sequence has.
        free_slots: tokens of the cache, in each of its pools, that are nobody's.
        record: as `record_on_gpu`.
    """

    def __init__(
        self,
        run: Step,
        max_sequences: int,
        max_blocks: int,
        free_slots: tuple[int, int],
        device: torch.device,
        record: Record = record_on_gpu,
    ) -> None:
        self._run = run
        self._sizes = sizes(max_sequences)
        self._max_blocks = max_blocks
        self._padding = {"slots": free_slots[0], "window_slots": free_slots[1]}  # and 0 elsewhere
        self._device = device
        self._record = record
        # By size, and whether there is a shared prefix: the inputs; how to replay, and where the result lies.
        self._inputs: dict[tuple[int, bool], DecodeInputs] = {}
        self._records: dict[tuple[int, bool], tuple[Callable[[], None], Tensor]] = {}

    def hidden_states(self, step: DecodeInputs) -> Tensor | None:
        """`(tokens, hidden_size)`, valid until the next step; None for more sequences than any record has."""
        count = len(step.ids)
        size = next((size for size in self._sizes if size >= count), None)
        if size is None:
            return None
        key = size, step.num_shared_tokens is not None
        if key not in self._inputs:
            self._inputs[key] = self._zeros(*key)
        inputs = self._inputs[key]
        for name in ("ids", "positions", "slots", "window_slots", "context_lens"):
            fixed: Tensor = getattr(inputs, name)
            fixed[:count] = getattr(step, name)
            fixed[count:] = self._padding.get(name, 0)
        inputs.block_table[:count, : step.block_table.shape[1]] = step.block_table
        inputs.window_table[:count, : step.window_table.shape[1]] = step.window_table
        if step.num_shared_tokens is not None and inputs.num_shared_tokens is not None:
            inputs.num_shared_tokens.copy_(step.num_shared_tokens)
        if key not in self._records:
            self._records[key] = self._record(lambda: self._run(inputs))
        else:
            self._records[key][0]()
        return self._records[key][1][:count]

    def _zeros(self, size: int, shares: bool) -> DecodeInputs:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        return DecodeInputs(
            ids=zeros(size),
            positions=zeros(size),
            slots=zeros(size),
            window_slots=zeros(size),
            block_table=zeros(size, self._max_blocks, dtype=torch.int32),
            window_table=zeros(size, self._max_blocks, dtype=torch.int32),
            context_lens=zeros(size, dtype=torch.int32),
            num_shared_tokens=zeros(dtype=torch.int32) if shares else None,
        )
