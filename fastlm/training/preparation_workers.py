"""One piece of work for each of many things, in this process, in several, or over a Ray cluster."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from fastlm.errors import ConfigError

Thing = TypeVar("Thing")
Work = Callable[[Thing], object]


def for_each(things: Sequence[Thing], work: Work[Thing], *, workers: int, ray: bool) -> Iterator[Thing]:
    """Does `work` for every thing and yields those that are done, in any order. What `work` raises is raised here.

    Raises:
        OSError: a process was killed.
    """
    if ray and things:
        return _by_ray(things, work)
    if workers == 1 or len(things) < 2:
        return _here(things, work)
    return _by_processes(things, work, min(workers, len(things)))


def check_ray() -> None:
    """Raises ConfigError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--ray needs Ray: pip install fastlm[ray]")


def _here(things: Sequence[Thing], work: Work[Thing]) -> Iterator[Thing]:
    for thing in things:
        work(thing)
        yield thing


def _by_processes(things: Sequence[Thing], work: Work[Thing], workers: int) -> Iterator[Thing]:
    """Ctrl-C lets those that run finish."""
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _ignore_interrupts)
    try:
        futures = {pool.submit(work, thing): thing for thing in things}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    except BrokenProcessPool:
        raise OSError("a worker process was killed, perhaps for want of memory; the same command goes on") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _by_ray(things: Sequence[Thing], work: Work[Thing]) -> Iterator[Thing]:
    """A task of one CPU for each, on the cluster that RAY_ADDRESS names, else on one of this machine.

    The tasks read and write files by the names that they have here: all machines must share those directories.
    """
    ray: Any = importlib.import_module("ray")
    begun = not ray.is_initialized()
    if begun:
        ray.init(log_to_driver=False, logging_level="ERROR", configure_logging=False)
    tasks: dict[Any, Thing] = {}
    try:
        remote = ray.remote(num_cpus=1, max_retries=3)(_in_directory)
        shared = ray.put(work)
        tasks = {remote.remote(os.getcwd(), shared, thing): thing for thing in things}
        waiting = list(tasks)
        while waiting:
            [done], waiting = ray.wait(waiting)
            ray.get(done)
            yield tasks.pop(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # what the task raised, without the trace of where
    except ray.exceptions.RayError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"a task of Ray failed: {reason}; the same command goes on") from None
    finally:
        for task in tasks:
            ray.cancel(task)
        if begun:
            ray.shutdown()


def _in_directory(directory: str, work: Work[Thing], thing: Thing) -> None:
    os.chdir(directory)
    work(thing)
