"""`/v1/completions`: texts that go on."""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from fastlm.inference import Piece, SamplingParams, TokenLogprob
from fastlm.serve.backend import Backend
from fastlm.serve.errors import JsonResponse
from fastlm.serve.protocol import CompletionRequest
from fastlm.serve.streaming import check, event_stream, finish_reason, usage
from fastlm.serve.token_text import finite, token_bytes, token_text
from fastlm.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def router(backend: Backend) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        backend.check_model(asked.model)
        ids = await backend.prompt_ids(asked.prompts())
        settings: list[SamplingParams] = []
        for i, row in enumerate(ids):
            params = asked.params(
                max_tokens=backend.max_tokens(asked.max_tokens, DEFAULT_MAX_TOKENS, len(row)),
                logprobs=_logprobs(asked),
                prompt_logprobs=asked.logprobs if asked.echo else None,
            )
            first = settings[0] if settings else params
            settings.append(replace(params, seed=(first.seed + i * params.n) % (1 << 63)))
        answer = _Answer(backend, asked, ids)
        pieces = await backend.begin(request, ids, settings)
        if asked.stream:
            return event_stream(answer.events(pieces))
        return JsonResponse(await answer.whole(pieces))

    return routes


def _logprobs(asked: CompletionRequest) -> int | None:
    return 0 if asked.logprobs is None and asked.return_token_ids else asked.logprobs


class _Choice:
    """One continuation: what has come of it, and what of that has not been sent."""

    def __init__(
        self, index: int, prompt: str | list[int], ids: list[int], asked: CompletionRequest, t: Tokenizer
    ) -> None:
        self.index = index
        self.tokens = 0
        self._asked = asked
        self._tokenizer = t
        self._prompt = prompt
        self._prompt_ids = ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # characters before the next token
        self._begun = False

    def add(self, piece: Piece, prompt_logprobs: list[TokenLogprob | None] | None) -> dict[str, Any]:
        """What a piece adds, as a choice of an event."""
        check(piece)
        text, entries = piece.text, []
        if not self._begun:
            self._begun = True
            if self._asked.echo:
                text = self._prompt_text() + text
                if self._asked.logprobs is not None:
                    known = prompt_logprobs or [None] * len(self._prompt_ids)
                    entries += list(zip(self._prompt_ids, known, strict=True))
        if piece.token_id is not None:
            self.tokens += 1
            if self._asked.echo or piece.finish_reason not in ("eos", "stop") or piece.text:
                entries.append((piece.token_id, piece.logprob))
        return {
            "index": self.index,
            "text": text,
            "logprobs": None if _logprobs(self._asked) is None else self._logprobs(entries),
            "finish_reason": finish_reason(piece.finish_reason),
        }

    def _prompt_text(self) -> str:
        if isinstance(self._prompt, str):
            return self._prompt
        return b"".join(token_bytes(self._tokenizer, i) for i in self._prompt).decode("utf-8", "replace")

    def _logprobs(self, entries: list[tuple[int, TokenLogprob | None]]) -> dict[str, Any]:
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if self._asked.return_token_ids:
            found |= {"token_ids": [], "top_tokens": []}
        for token, entry in entries:
            found["tokens"].append(token_text(self._tokenizer, token))
            found["token_logprobs"].append(None if entry is None else finite(entry.logprob))
            top = () if entry is None else entry.top
            tops: dict[str, float] = {}
            for other, logprob in top:
                tops.setdefault(token_text(self._tokenizer, other), finite(logprob))
            found["top_logprobs"].append(tops if entry is not None else None)
            found["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(token_bytes(self._tokenizer, token)))
            if self._asked.return_token_ids:
                found["token_ids"].append(token)
                found["top_tokens"].append(
                    [{"id": o, "token": token_text(self._tokenizer, o), "logprob": finite(p)} for o, p in top]
                )
        return found


class _Answer:
    def __init__(self, backend: Backend, asked: CompletionRequest, ids: list[list[int]]) -> None:
        self._asked = asked
        self._ids = ids
        self._n = asked.n or 1
        tokenizer = backend.llm.tokenizer
        prompts = asked.prompts()
        self._choices = [
            _Choice(row * self._n + i, prompts[row], ids[row], asked, tokenizer)
            for row in range(len(ids))
            for i in range(self._n)
        ]
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": backend.name,
        }
        self._prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}  # of each prompt, for all its choices

    def _add(self, piece: Piece) -> dict[str, Any]:
        row = piece.request_id
        assert isinstance(row, int)
        if piece.prompt_logprobs is not None:
            self._prompt_logprobs[row] = piece.prompt_logprobs
        return self._choices[row * self._n + piece.index].add(piece, self._prompt_logprobs.get(row))

    def _usage(self) -> dict[str, int]:
        return usage(sum(map(len, self._ids)), sum(choice.tokens for choice in self._choices))

    async def events(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[dict[str, Any]]:
        more = {"usage": None} if self._asked.include_usage else {}
        async for piece in pieces:
            choice = self._add(piece)
            if choice["text"] or choice["finish_reason"] or choice["logprobs"]:
                yield {**self._head, "choices": [choice], **more}
        if self._asked.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    async def whole(self, pieces: AsyncIterator[Piece]) -> dict[str, Any]:
        found: list[dict[str, Any]] = [{} for _ in self._choices]
        async for piece in pieces:
            choice = self._add(piece)
            before = found[choice["index"]]
            if not before:
                found[choice["index"]] = choice
                continue
            before["text"] += choice["text"]
            before["finish_reason"] = choice["finish_reason"]
            if choice["logprobs"] is not None:
                for name, values in choice["logprobs"].items():
                    before["logprobs"][name] += values
        return {**self._head, "choices": found, "usage": self._usage()}
