"""GGUF files: metadata and where each tensor lies (github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3).

Nothing in a file is trusted: every count and size is checked against the bytes that are left before anything of that
size is made. Arrays are skipped and decoded on request, so a vocabulary costs nothing to a reader of weights.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fastlm.errors import CheckpointError

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 4
MAX_NAME = 1 << 16

# Number of a value's type -> how struct reads one. 8 is a string and 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

# Number of a tensor's type -> (name, weights of a block, bytes of a block). ggml has more; these are read.
TENSOR_TYPES = {
    0: ("f32", 1, 4),
    1: ("f16", 1, 2),
    2: ("q4_0", 32, 18),
    6: ("q5_0", 32, 22),
    8: ("q8_0", 32, 34),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    30: ("bf16", 1, 2),
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` has the slowest dimension first, as torch's; `offset` counts from the start of the file.

    `kind` is a name of TENSOR_TYPES, or "ggml type N" for one that is not read, whose `num_bytes` is 0.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GgufArray:
    """An array in the metadata that was not decoded, see `GgufFile.array`."""

    kind: int
    count: int
    offset: int


class GgufFile:
    """The head of a GGUF file.

    Args:
        metadata_only: the tensors may be missing; none is listed.

    Attributes:
        size: of the file, in bytes.
        metadata: key -> int, float, bool, str, or GgufArray.
        tensors: name -> GgufTensor, each checked to lie within the file.

    Raises:
        CheckpointError: the file is missing, cut short or corrupt.
    """

    def __init__(self, path: str | Path, *, metadata_only: bool = False) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise CheckpointError(f"{self.path} does not exist; give the path of a GGUF file") from None
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise CheckpointError(f"{self.path} cannot be read ({error}); give the path of a GGUF file") from None
        self.size = len(self._data)
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        self._read(metadata_only)

    def array(self, key: str) -> list[Any] | None:
        """The items of the array under `key`, strings as bytes; None when there is no such array."""
        value = self.metadata.get(key)
        if not isinstance(value, GgufArray):
            return None
        if value.kind != STRING:
            return list(struct.unpack_from(f"<{value.count}{SCALARS[value.kind]}", self._data, value.offset))
        items, at, data = [], value.offset, self._data
        for _ in range(value.count):
            end = at + 8 + int.from_bytes(data[at : at + 8], "little")
            items.append(data[at + 8 : end])
            at = end
        return items

    def _read(self, metadata_only: bool) -> None:
        if self._take(4) != MAGIC:
            self._fail("is no GGUF file")
        version = self._number("I")
        if version not in (2, 3):
            what = "is big-endian" if version & 0xFFFF == 0 else f"has version {version}"
            self._fail(f"{what}; GGUF versions 2 and 3 in little-endian order are read")
        num_tensors, num_keys = self._number("Q"), self._number("Q")
        if num_tensors > MAX_TENSORS or num_keys > MAX_KEYS:
            self._fail(f"claims {num_tensors} tensors and {num_keys} keys, more than {MAX_TENSORS} and {MAX_KEYS}")
        for _ in range(num_keys):
            key = self._string(MAX_NAME)
            if key in self.metadata:
                self._fail(f"has the key {key[:60]!r} twice")
            self.metadata[key] = self._value(self._number("I"))
        if metadata_only:
            return
        infos = [self._tensor_info() for _ in range(num_tensors)]
        self._place(infos)

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._string(len(self._data))
        if kind != ARRAY:
            self._fail(f"has a value of unknown type {kind} at offset {self._at}")
        kind, count = self._number("I"), self._number("Q")
        array = GgufArray(kind, count, self._at)
        if kind in SCALARS:
            self._skip(count * struct.calcsize("<" + SCALARS[kind]))
        elif kind == STRING:
            self._skip_strings(count)
        else:
            self._fail(f"has an array of type {kind} at offset {self._at}; only numbers and strings are read")
        return array

    def _skip_strings(self, count: int) -> None:
        if count > (len(self._data) - self._at) // 8:
            self._skip(8 * count)  # fails
        at, data, size = self._at, self._data, len(self._data)
        for _ in range(count):
            at += 8 + int.from_bytes(data[at : at + 8], "little")
            if at > size:
                break
        self._skip(at - self._at)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], str, int, int]:
        name = self._string(MAX_NAME)
        dimensions = self._number("I")
        if dimensions > MAX_DIMENSIONS:
            self._fail(f"gives {name[:60]!r} {dimensions} dimensions; at most {MAX_DIMENSIONS} can be")
        shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
        number, offset = self._number("I"), self._number("Q")
        kind, block, block_bytes = TENSOR_TYPES.get(number, (f"ggml type {number}", 1, 0))
        elements = 1
        for size in shape:
            elements *= size
        row = shape[-1] if shape else 1
        if elements == 0 or row % block:
            self._fail(f"gives {name[:60]!r} of type {kind} the shape {shape}, which makes no whole blocks of {block}")
        return name, shape, kind, offset, elements // block * block_bytes

    def _place(self, infos: list[tuple[str, tuple[int, ...], str, int, int]]) -> None:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self._fail(f"has general.alignment {str(alignment)[:60]}; it must be a power of two up to {MAX_ALIGNMENT}")
        start = -(-self._at // alignment) * alignment
        for name, shape, kind, offset, num_bytes in infos:
            if name in self.tensors:
                self._fail(f"has the tensor {name[:60]!r} twice")
            if offset % alignment:
                self._fail(f"puts {name[:60]!r} at {offset}, which is no multiple of {alignment}")
            if offset + num_bytes > len(self._data) - start:
                self._fail(
                    f"is cut short: {name[:60]!r} ends {start + offset + num_bytes - len(self._data)} bytes past it"
                )
            self.tensors[name] = GgufTensor(name, shape, kind, start + offset, num_bytes)

    def _fail(self, message: str) -> NoReturn:
        raise CheckpointError(f"{self.path} {message}; use an intact copy")

    def _skip(self, size: int) -> int:
        """Moves on by `size` bytes and returns where they begin."""
        if size > len(self._data) - self._at:
            self._fail(f"is cut short: {size} bytes are needed at {self._at} of {len(self._data)}")
        self._at += size
        return self._at - size

    def _take(self, size: int) -> bytes:
        start = self._skip(size)
        return self._data[start : self._at]

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _string(self, limit: int) -> str:
        size = self._number("Q")
        if size > limit:
            self._fail(f"has a name of {size} bytes at {self._at}")
        try:
            return self._take(size).decode()
        except UnicodeDecodeError:
            self._fail(f"has a string that is no UTF-8 at {self._at - size}")
