"""Runs Gluon kernels for Hopper without a GPU, from their own source, so as to find what a GPU would find only now and
then: a missing wait, a wrong phase, a slot of shared memory that is filled again too early, a deadlock.

Tensors are torch's; layouts are ignored. What a GPU does on its own time is done here as late, or at moments as random,
as its waits allow:

- Partitions of `warp_specialize` are threads of which one runs at a time; which one is drawn at every operation.
- Shared memory starts as NaN. A TMA load turns its slot to NaN when it is issued, for it may write from then on; the
  data come later, with the bytes that the barrier waits for.
- wgmma reads its operands when it is done, not when it is issued, in the order of a warpgroup's issues. An accumulator
  in flight has no value: to use it is an error.
- mbarriers count arrivals and bytes, and keep one parity, as the PTX manual (section 9.7.13.15) has it.
- A plain store to shared memory is not seen by TMA before `fence_async_shared`.

What is left out: how warps of one partition stand to one another (Triton puts a barrier before each arrival, and
test_attention_gluon_aot looks at that), and registers.
"""

from __future__ import annotations

import ast
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

EAGERNESS = 0.1  # how likely a copy or a product that could still wait is done, while a partition could run


class SimulationError(Exception):
    """The kernel did what a GPU would answer with wrong numbers or a hang."""


class _Aborted(BaseException):
    """Ends the threads of a simulation that has failed."""


class Barrier:
    def __init__(self) -> None:
        self.count = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.parity = 0

    def arrive(self, count: int = 1) -> None:
        if self.count == 0:
            raise SimulationError("an mbarrier is used before its init")
        self.pending -= count
        if self.pending < 0:
            raise SimulationError("more arrivals at an mbarrier than its phase expects")
        self._turn()

    def copied(self, size: int) -> None:
        self.bytes -= size
        self._turn()

    def _turn(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending = self.count
            self.parity ^= 1

    def is_over(self, phase: int) -> bool:
        """try_wait.parity: the phase of this parity is over, which holds of parity 1 before the first ends."""
        if self.count == 0:
            raise SimulationError("an mbarrier is waited for before its init")
        return self.parity != phase


class Shared:
    """A view of shared memory, or of an array of barriers."""

    def __init__(self, data: Any, simulation: Simulation) -> None:
        self.data, self.simulation = data, simulation
        self.dtype = data.dtype if isinstance(data, Tensor) else None

    def index(self, i: int) -> Shared:
        if not 0 <= i < len(self.data):
            raise SimulationError(f"slot {i} of {len(self.data)}")
        return Shared(self.data[i], self.simulation)

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.view(*shape), self.simulation)

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order), self.simulation)

    def store(self, value: Tensor) -> None:
        assert (value.shape, value.dtype) == (self.data.shape, self.dtype)
        self.simulation.pause()
        self.data.copy_(value)
        self.simulation.unfenced[self.data.data_ptr()] = self.simulation.current

    def load(self, layout: object) -> Tensor:
        self.simulation.pause()
        return self.data.clone()

    @property
    def barrier(self) -> Barrier:
        barrier = self.data[0] if isinstance(self.data, list) else self.data
        assert isinstance(barrier, Barrier)
        return barrier


class Accumulator:
    """The result of a wgmma, which has a value once the product is done."""

    def __init__(self) -> None:
        self.value: Tensor | None = None


class Pointer:
    """A pointer into a contiguous tensor, or a tensor of them."""

    def __init__(self, data: Tensor, offset: Any = 0) -> None:
        self.data, self.offset = data, offset

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.data, self.offset + more)


class Descriptor:
    """A TMA descriptor: reads beyond the tensor are zero, writes beyond it are dropped."""

    def __init__(self, host: Any) -> None:
        self.tensor = host.base.as_strided(tuple(host.shape), tuple(host.strides))
        self.block, self.dtype, self.layout = tuple(host.block_shape), host.base.dtype, None
        size = host.base.element_size() * torch.Size(self.block).numel()
        self.block_type = SimpleNamespace(nbytes=size)

    def _overlap(self, start: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        inside, block = [], []
        for first, size, length in zip(start, self.block, self.tensor.shape, strict=True):
            low, high = min(max(first, 0), length), min(max(first + size, 0), length)
            inside.append(slice(low, high))
            block.append(slice(low - first, high - first) if high > low else slice(0, 0))
        return tuple(inside), tuple(block)

    def read(self, start: Sequence[int], out: Tensor) -> None:
        inside, block = self._overlap(start)
        out.zero_()
        out[block] = self.tensor[inside]

    def write(self, start: Sequence[int], values: Tensor) -> None:
        inside, block = self._overlap(start)
        self.tensor[inside] = values[block]


class Partition:
    """A thread that runs only when told to, up to its next operation."""

    def __init__(self, simulation: Simulation, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.ready: Callable[[], bool] = lambda: True
        self.products: list[Callable[[], None]] = []  # wgmma in flight, oldest first
        self.stores: list[Callable[[], None]] = []  # TMA stores in flight
        self.done, self.error = False, None
        self.go = threading.Semaphore(0)
        self.simulation = simulation

        def run() -> None:
            self.go.acquire()
            try:
                if not simulation.aborted:
                    function(*args)
                    if self.products or self.stores:
                        raise SimulationError("a partition ends with products or stores in flight")
            except _Aborted:
                pass
            except BaseException as error:
                self.error = error
            self.done = True
            simulation.turn.release()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()


def without_imports(text: str) -> ast.Module:
    """The module with what it imports from Triton left out, and what it imports from another module of kernels put in
    its place."""
    tree = ast.parse(text)
    body: list[ast.stmt] = []
    for node in tree.body:
        module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
        if module.startswith("fastlm."):
            source = Path(__file__).resolve().parents[2].joinpath(*module.split(".")).with_suffix(".py")
            body += without_imports(source.read_text()).body
        elif not module.startswith(("triton", "__future__")):
            body.append(node)
    tree.body = body
    return tree


class Simulation:
    """One run of one kernel. `source` is its module's text; `seed` draws the interleaving."""

    def __init__(self, source: str | Path, seed: int) -> None:
        text = source.read_text() if isinstance(source, Path) else source
        self.random = random.Random(seed)
        self.eagerness = self.random.choice([0.0, EAGERNESS, 0.5])
        self.current: Partition | None = None
        self.aborted = False
        self.turn = threading.Semaphore(0)
        self.loads: list[Callable[[], None]] = []
        self.unfenced: dict[int, Partition | None] = {}
        self.names: dict[str, Any] = stand_ins(self)
        exec(compile(without_imports(text), "<kernel>", "exec"), self.names)

    def run(self, kernel: str, grid: tuple[int, ...], args: Sequence[Any], constants: dict[str, Any]) -> None:
        """Every block of the grid, one after another. Raises SimulationError."""
        wrapped = [
            Descriptor(a) if hasattr(a, "block_shape") else Pointer(a.view(-1)) if isinstance(a, Tensor) else a
            for a in args
        ]
        full = (*grid, 1, 1)
        self.sizes = full[:3]
        for z in range(full[2]):
            for y in range(full[1]):
                for x in range(full[0]):
                    self.ids = (x, y, z)
                    self.names[kernel](*wrapped, **constants)

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Called by a partition before each operation: lets others run, and comes back when `ready`."""
        me = self.current
        if me is None:
            if not ready():
                raise SimulationError("deadlock: a wait outside warp_specialize that nothing ends")
            return
        me.ready = ready
        self.turn.release()
        me.go.acquire()
        if self.aborted:
            raise _Aborted

    def specialize(self, partitions: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], *_: object) -> None:
        alive = everyone = [Partition(self, function, args) for function, args in partitions]
        try:
            while alive:
                ready = [p for p in alive if p.ready()]
                late = [(p.products, 0) for p in alive if p.products]
                late += [(queue, i) for p in alive for queue in (p.stores,) for i in range(len(queue))]
                late += [(self.loads, i) for i in range(len(self.loads))]
                if late and (not ready or self.random.random() < self.eagerness):
                    queue, i = self.random.choice(late)
                    queue.pop(i)()
                elif ready:
                    self.current = self.random.choice(ready)
                    self.current.go.release()
                    self.turn.acquire()
                    if self.current.error is not None:
                        raise self.current.error
                    alive = [p for p in alive if not p.done]
                else:
                    raise SimulationError("deadlock: every partition waits, and nothing is in flight")
            if self.loads:
                raise SimulationError("a block ends with loads in flight")
        finally:
            self.aborted = True
            for p in everyone:
                if not p.done:
                    p.go.release()
                p.thread.join()
            self.aborted, self.current, self.loads = False, None, []

    def load(self, source: Descriptor, start: Sequence[int], barrier: Shared, out: Shared, pred: bool = True) -> None:
        self.pause()
        if not pred:
            return
        assert tuple(out.data.shape) == source.block, (out.data.shape, source.block)
        out.data.fill_(float("nan"))

        def copy() -> None:
            source.read(start, out.data)
            barrier.barrier.copied(source.block_type.nbytes)

        self.loads.append(copy)

    def store(self, target: Descriptor, start: Sequence[int], values: Shared) -> None:
        self.pause()
        if values.data.data_ptr() in self.unfenced:
            raise SimulationError("a TMA store of shared memory whose plain stores no fence has made visible")
        assert self.current is not None
        self.current.stores.append(lambda: target.write(start, values.data))

    def store_wait(self, pendings: int) -> None:
        self.pause()
        assert self.current is not None
        while len(self.current.stores) > pendings:
            self.current.stores.pop(0)()

    def fence(self, *_: object) -> None:
        self.pause()
        self.unfenced = {key: owner for key, owner in self.unfenced.items() if owner is not self.current}

    def mma(self, a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
        self.pause()
        result = Accumulator()

        def multiply() -> None:
            left = a.data if isinstance(a, Shared) else a
            product = left.float() @ b.data.float()
            before = acc.value if isinstance(acc, Accumulator) else acc
            result.value = before + product if use_acc else product

        assert self.current is not None
        self.current.products.append(multiply)
        return result if is_async else self.mma_wait(0, [result])

    def mma_wait(self, outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
        self.pause()
        assert self.current is not None
        while len(self.current.products) > outstanding:
            self.current.products.pop(0)()
        values = tuple(d.value if isinstance(d, Accumulator) else d for d in deps)
        if any(value is None for value in values):
            raise SimulationError("an accumulator is used while its product is in flight")
        return values[0] if len(values) == 1 else values


def _ordered(torch_function: Any, plain: Any) -> Callable[[Any, Any], Any]:
    def choose(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return torch_function(torch.as_tensor(a), torch.as_tensor(b))
        return plain(a, b)

    return choose


def stand_ins(simulation: Simulation) -> dict[str, Any]:
    """What a kernel's module imports from Triton."""

    def jit(function: Any = None, **_: object) -> Any:
        return function if function is not None else lambda f: f

    def shared(dtype: Any, shape: Sequence[int], layout: object) -> Shared:
        if dtype == torch.int64:
            return Shared([[Barrier()] for _ in range(shape[0])], simulation)
        return Shared(torch.full(tuple(shape), float("nan"), dtype=dtype), simulation)

    def store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
        pointer.data[pointer.offset[mask]] = value[mask]

    def load(pointer: Pointer, mask: Tensor, other: float) -> Tensor:
        offsets = torch.where(mask, pointer.offset, 0)
        return torch.where(mask, pointer.data[offsets], other)

    def wait(barrier: Shared, phase: int, pred: bool = True) -> None:
        simulation.pause(lambda: not pred or barrier.barrier.is_over(int(phase)))

    def arrive(barrier: Shared, count: int = 1, pred: bool = True) -> None:
        simulation.pause()
        if pred:
            barrier.barrier.arrive(count)

    def expect(barrier: Shared, size: int, pred: bool = True) -> None:
        simulation.pause()
        if pred:
            barrier.barrier.bytes += size
            barrier.barrier.arrive()

    gl = SimpleNamespace(
        constexpr=lambda value: value, static_assert=lambda fact: None, static_range=range,
        to_tensor=lambda x: x, cast=lambda x, dtype: x,
        float32=torch.float32, int64=torch.int64, int32=torch.int32,
        SliceLayout=lambda *_: None, DotOperandLayout=lambda *_: None, NVMMADistributedLayout=lambda *_: None,
        convert_layout=lambda x, layout: x,
        arange=lambda start, end, layout=None: torch.arange(start, end),
        full=lambda shape, value, dtype, layout=None: torch.full(tuple(shape), value, dtype=dtype),
        zeros=lambda shape, dtype, layout=None: torch.zeros(tuple(shape), dtype=dtype),
        where=torch.where, maximum=_ordered(torch.maximum, max), minimum=_ordered(torch.minimum, min),
        max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), exp2=torch.exp2, log2=torch.log2,
        fma=lambda a, b, c: a * b + c,
        load=load, store=store, allocate_shared_memory=shared, warp_specialize=simulation.specialize,
        program_id=lambda axis: simulation.ids[axis], num_programs=lambda axis: simulation.sizes[axis],
    )  # fmt: skip
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: None, init=lambda barrier, count: barrier.barrier.init(count), wait=wait,
        arrive=arrive, expect=expect,
    )  # fmt: skip
    tma = SimpleNamespace(async_load=simulation.load, async_store=simulation.store, store_wait=simulation.store_wait)
    return {
        "gluon": SimpleNamespace(jit=jit), "gl": gl, "mbarrier": mbarrier, "tma": tma,
        "fence_async_shared": simulation.fence, "warpgroup_mma": simulation.mma,
        "warpgroup_mma_wait": simulation.mma_wait,
    }  # fmt: skip
