"""Server-sent events, and what both kinds of answers say of an end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse

from fastlm.inference import Piece
from fastlm.inference.outputs import FinishReason
from fastlm.serve.errors import ApiError, as_api_error, to_json

DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx passes events on as they come


def event_stream(events: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    return StreamingResponse(_encoded(events), media_type="text/event-stream", headers=HEADERS)


async def _encoded(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield b"data: " + to_json(event) + b"\n\n"
    except Exception as error:  # the status is sent; what is left is to say it here
        yield b"data: " + to_json(as_api_error(error).to_json()) + b"\n\n"
    yield DONE


def finish_reason(reason: FinishReason | None) -> str | None:
    """In OpenAI's words."""
    return "stop" if reason == "eos" else reason


def check(piece: Piece) -> None:
    """Raises ApiError if the piece is an error."""
    if piece.error is not None:
        raise ApiError(500, f"the text could not be continued: {piece.error}")


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
