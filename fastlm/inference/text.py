"""From the bytes of tokens to text that is shown, piece by piece."""

from __future__ import annotations

import codecs


class TextStream:
    """Whole characters only: bytes wait until their character is complete, and bytes that can be none are left out.

    A byte-level model may write bytes that are not UTF-8, or be cut off inside a character. What is shown never holds a
    replacement character for that. Text that may be the beginning of a stop string waits as well.
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, data: bytes) -> str:
        """The text that is certain after `data`; sets `stopped` when a stop string was met, and then gives no more."""
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(data)
        found = min((i for i in (text.find(s) for s in self._stop) if i >= 0), default=None)
        if found is not None:
            self.stopped, self._held = True, ""
            return text[:found]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
