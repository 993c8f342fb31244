"""Access to the compiled cores. Importing fastlm must work without them, so they load on first use."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from types import ModuleType

from fastlm.errors import NativeCoreError

_is_forked = False


def _note_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@cache
def native() -> ModuleType:
    """The C++ core. Raises NativeCoreError when it was not built."""
    try:
        import fastlm._native as module
    except ImportError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # pybind11 makes an ImportError of whatever comes
            raise KeyboardInterrupt from None
        raise NativeCoreError(
            f"fastlm's native core is not available ({error}); reinstall where a C++20 compiler is present: "
            "pip install --force-reinstall --no-deps fastlm"
        ) from None
    if _is_forked:  # before it was loaded: it sees only later forks
        module.use_own_threads()
    return module


@cache
def native_missing() -> str | None:
    """Why ops cannot use the C++ core, or None. Says so without loading it."""
    if importlib.util.find_spec("fastlm._native") is None:
        return "needs the native core, which is not built (reinstall where a C++20 compiler is present)"
    return None


@cache
def cuda() -> ModuleType:
    """The CUDA core. Raises NativeCoreError when it was not built."""
    try:
        import fastlm._cuda as module
    except ImportError as error:
        raise NativeCoreError(
            f"fastlm's CUDA core is not available ({error}); install with FASTLM_CUDA=1 where nvcc is present"
        ) from None
    return module
