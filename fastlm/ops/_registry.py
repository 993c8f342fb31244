"""Which backend serves a call. Each op holds one `Op`: its backends in order of preference, `reference` last.

A backend is a module `fastlm.ops.<op>.<backend>` with

    supports(<the public function's parameters>) -> str | None

returning None when it can serve the call, else the reason why not, in words a user can act on. Modules are imported on
first need, so a machine without Triton or without a compiled core never pays for, or trips over, either.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastlm.errors import BackendError

OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Explanation:
    """The answer of `fastlm.explain`: the backend that serves a call and why each other one does not."""

    op: str
    chosen: str | None
    reasons: dict[str, str]  # backend -> why it is not used

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'no backend'}"]
        lines += [f"  not {backend}: {reason}" for backend, reason in self.reasons.items()]
        return "\n".join(lines)


@cache
def missing(backend: str) -> str | None:
    """Why `backend` cannot run on this machine for any op, or None."""
    if backend in ("triton", "gluon"):
        found = importlib.util.find_spec("triton")
        if found is None:
            return "Triton is not installed (pip install triton)"
        if backend == "gluon":
            return _missing_gluon(Path(found.origin or "").parent)
    if backend == "cuda" and importlib.util.find_spec("fastlm._cuda") is None:
        return "the CUDA core is not built (install with FASTLM_CUDA=1 where nvcc is present)"
    return None


def _missing_gluon(triton: Path) -> str | None:
    """Read from files: to import Triton takes longer than most calls on a CPU."""
    version = None
    if (triton / "experimental" / "gluon" / "nvidia" / "hopper.py").is_file():
        version = re.search(r"^__version__ = ['\"](\d+)\.(\d+)", (triton / "__init__.py").read_text(), re.MULTILINE)
    if version is None or (int(version[1]), int(version[2])) < (3, 6):
        return "needs the Gluon of Triton 3.6 or later (pip install 'triton>=3.6')"
    return None


def _wrong_device(backend: str, device: torch.device) -> str | None:
    if backend == "cpu" and device.type != "cpu":
        return f"runs on CPU tensors; these are on {device}"
    if backend in ("triton", "gluon", "cuda") and device.type != "cuda":
        interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        if not (interpreted and os.environ.get("FASTLM_BACKEND") == "triton"):
            return f"runs on CUDA tensors; these are on {device}"
    return None


class Op:
    """An op's backends, best first. Calls to `select` cost about a microsecond a backend."""

    def __init__(self, name: str, public: Callable[..., Any], backends: tuple[str, ...]) -> None:
        self.name = name
        self.public = public
        self.backends = backends
        self._modules: dict[str, ModuleType] = {}
        OPS[name] = self

    def module(self, backend: str) -> ModuleType:
        if backend not in self._modules:
            self._modules[backend] = importlib.import_module(f"fastlm.ops.{self.name}.{backend}")
        return self._modules[backend]

    def reason_against(self, backend: str, *args: Any, **kwargs: Any) -> str | None:
        """Why `backend` does not serve this call, or None. The first argument is a tensor."""
        return (
            missing(backend) or _wrong_device(backend, args[0].device) or self.module(backend).supports(*args, **kwargs)
        )

    def select(self, *args: Any, **kwargs: Any) -> Any:
        """The backend module for this call. Takes the public function's arguments.

        Raises BackendError when `FASTLM_BACKEND` names a backend that cannot serve the call.
        """
        forced = os.environ.get("FASTLM_BACKEND")
        if forced:
            if forced not in self.backends:
                raise BackendError(
                    f"FASTLM_BACKEND={forced}, but {self.name} has no such backend; it has {', '.join(self.backends)}"
                )
            reason = self.reason_against(forced, *args, **kwargs)
            if reason:
                raise BackendError(f"FASTLM_BACKEND={forced}, but for {self.name} it {reason}")
            return self.module(forced)
        for backend in self.backends:
            if self.reason_against(backend, *args, **kwargs) is None:
                return self.module(backend)
        raise BackendError(f"no backend of {self.name} serves this call\n{self.explain(*args, **kwargs)}")

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        bound = inspect.signature(self.public).bind(*args, **kwargs)
        bound.apply_defaults()
        forced = os.environ.get("FASTLM_BACKEND")
        reasons: dict[str, str] = {}
        chosen = None
        for backend in self.backends:
            reason = self.reason_against(backend, *bound.args, **bound.kwargs)
            if reason is None and forced not in (None, "", backend):
                reason = f"could, but FASTLM_BACKEND={forced}"
            elif reason is None and chosen is not None:
                reason = f"could, but {chosen} comes first"
            if reason is None:
                chosen = backend
            else:
                reasons[backend] = reason
        return Explanation(self.name, chosen, reasons)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend would serve `op` for these arguments (the public function's own), without running it.

    >>> print(fastlm.explain("rms_norm", torch.randn(4, 64), torch.ones(64)))
    """
    import fastlm.ops  # noqa: F401  (registers every op)

    if op not in OPS:
        raise BackendError(f"no op named {op!r}; there are {', '.join(sorted(OPS))}")
    return OPS[op].explain(*args, **kwargs)
