"""Ctrl-C for the processes that tests start."""

from __future__ import annotations

import signal


def heed_interrupts() -> None:
    """For `preexec_fn`: undoes what a shell does to its background jobs, whose children ignore SIGINT too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
