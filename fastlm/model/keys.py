"""Typed reading of the keys of an untrusted file, with its own names in the errors."""

from __future__ import annotations

from typing import Any

from fastlm.errors import ConfigError


class Keys:
    """A dictionary that remembers which keys were read. `default` stands in for a key that is missing or null.

    Every method raises ConfigError, with the key's name, when the value is not of its type.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.unread = set(content)

    def get(self, name: str, default: Any = None) -> Any:
        self.unread.discard(name)
        value = self.content.get(name)
        return default if value is None else value

    def present(self, *names: str) -> str:
        """The first of several names for one thing that is there; the last when none is."""
        return next((n for n in names if self.content.get(n) is not None), names[-1])

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if type(value) is not int:
            raise ConfigError(f"{name} must be an integer, not {_short(value)}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if type(value) not in (int, float):
            raise ConfigError(f"{name} must be a number, not {_short(value)}")
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{name} is beyond the range of floating point") from None

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if type(value) is not bool:
            raise ConfigError(f"{name} must be true or false, not {_short(value)}")
        return value

    def nullable_integer(self, name: str, default: int | None = None) -> int | None:
        """Null is a value of its own here; `default` stands in only for a key that is missing."""
        return None if self._is_null(name, default) else self.integer(name, default)

    def nullable_number(self, name: str, default: float | None = None) -> float | None:
        """Like `nullable_integer`."""
        return None if self._is_null(name, default) else self.number(name, default)

    def _is_null(self, name: str, default: float | None) -> bool:
        self.unread.discard(name)
        return self.content.get(name, default) is None

    def dictionary(self, name: str) -> dict[str, Any]:
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise ConfigError(f"{name} must be an object, not {_short(value)}")
        return value

    def must_be(self, name: str, expected: Any) -> None:
        value = self.get(name, expected)
        if value != expected:
            raise ConfigError(f"{name}={_short(value)} is not supported; it must be {expected!r}")

    def refuse_unread(self, ignored: frozenset[str] = frozenset(), prefixes: tuple[str, ...] = ()) -> None:
        """Raises ConfigError for the first key that nobody read, unless it is known to be idle, or switched off."""
        for name in sorted(self.unread - ignored):
            if not name.startswith(prefixes or ("\0",)) and self.content[name] not in (None, False, [], {}):
                raise ConfigError(f"{name}={_short(self.content[name])} is not supported")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
