"""How much one client may ask of the server, and for how long."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fastlm.errors import ConfigError

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Bounds on requests; each refusal names the bound and what was asked.

    Args:
        max_queue: texts that may wait for a place beside those that are being written.
        max_body: bytes of a request's body.
        max_tokens: most tokens to generate for one text. None leaves it to the model's context.
        max_prompt_tokens: most tokens of a prompt. None leaves it to the model's context.
        header_seconds: time for a connection's next request line and headers.
        body_seconds: time for a request's body.
        request_seconds: time for an answer, from the request's end to the answer's end.
        drain_seconds: time that requests have to end after SIGTERM.

    Raises ConfigError when one is not positive.
    """

    max_queue: int = 256
    max_body: int = 4 * MEBIBYTE
    max_tokens: int | None = None
    max_prompt_tokens: int | None = None
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    request_seconds: float = 600.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (value >= 0 if field.name == "max_queue" else value > 0):
                raise ConfigError(f"{field.name} must be positive, not {value!r}")
