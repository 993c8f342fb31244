"""The `fastlm` command. One file for each command; nothing heavy is imported before a command runs."""

import sys
import threading
from _thread import interrupt_main
from typing import Any

INTERRUPTED = 130  # the exit code by which shells know Ctrl-C


def main() -> None:
    """Runs the command line. Ctrl-C at any time, also while modules are imported, ends it by one line and a code."""
    sys.unraisablehook = _interrupt_again
    try:
        from fastlm.cli.app import run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _interrupt_again(dropped: Any) -> None:
    """Python drops an interrupt that falls into a destructor or a callback, as the import system has: it comes anew."""
    if dropped.exc_type is KeyboardInterrupt:
        again = threading.Timer(0.01, interrupt_main)  # s; by when the callback has ended
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(dropped)
