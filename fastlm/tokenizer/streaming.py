"""Text of ids that come one at a time."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class DecodeStream:
    """Decodes ids one by one. A character that takes several tokens appears with the last of them.

    What `push` gives, joined, and then `finish`, is what `decode` gives for all the ids. Bytes that are not UTF-8
    become U+FFFD as soon as that is certain. With `strip_space`, a space at the very front is left out.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], *, strip_space: bool = False) -> None:
        self._token_bytes = token_bytes
        self._strip_space = strip_space
        self._is_at_front = True
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Text that `id` completes; "" when it ends inside a character.

        Raises:
            TokenizerError: the id is not in the vocabulary. The stream goes on as if it had not been pushed.
        """
        data = self._token_bytes(id)
        if self._is_at_front and data:
            self._is_at_front = False
            if self._strip_space and data[:1] == b" ":
                data = data[1:]
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left: "" or, when the last id ended inside a character, U+FFFD. The stream starts anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._is_at_front = True
        return rest
