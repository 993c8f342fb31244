"""`/v1/chat/completions`: the next message of a conversation."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from fastlm.inference import Piece, SamplingParams, TokenLogprob
from fastlm.inference.chat import ChatPrompt
from fastlm.serve.backend import Backend
from fastlm.serve.errors import ApiError, JsonResponse
from fastlm.serve.protocol import ChatRequest, Message, ToolChoice
from fastlm.serve.streaming import check, event_stream, finish_reason, usage
from fastlm.serve.token_text import finite, token_bytes, token_text
from fastlm.serve.tools import ToolParser, forced_schema
from fastlm.tokenizer import Tokenizer


def router(backend: Backend) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        backend.check_model(asked.model)
        messages = [_for_template(message) for message in asked.messages]
        shown = [] if asked.tool_choice == "none" else asked.tools or []
        tools = [tool.model_dump(exclude_none=True) for tool in shown]
        prompt = await asyncio.to_thread(backend.llm.chat_prompt, messages, tools)
        ids = (await backend.prompt_ids([prompt.prompt]))[0]
        params = _params(backend, asked, prompt, len(ids))
        pieces = await backend.begin(request, [ids], [params])
        answer = _Answer(backend, asked, len(ids), strip=isinstance(prompt.prompt, str))
        if asked.stream:
            return event_stream(answer.events(pieces))
        return JsonResponse(await answer.whole(pieces))

    return routes


def _for_template(message: Message) -> dict[str, Any]:
    """As chat templates want it: text, and arguments of calls as mappings."""
    role = "system" if message.role == "developer" else message.role
    made: dict[str, Any] = {"role": role, "content": message.text}
    if message.name is not None:
        made["name"] = message.name
    if message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        made["tool_calls"] = []
        for call in message.tool_calls:
            try:
                arguments = json.loads(call.function.arguments or "{}")
            except ValueError:
                raise ApiError(400, "the arguments of a tool call are not JSON", param="messages") from None
            function = {"name": call.function.name, "arguments": arguments}
            made["tool_calls"].append({"id": call.id, "type": "function", "function": function})
    return made


def _params(backend: Backend, asked: ChatRequest, prompt: ChatPrompt, prompt_tokens: int) -> SamplingParams:
    most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    more: dict[str, Any] = {}
    forced = asked.tool_choice == "required" or isinstance(asked.tool_choice, ToolChoice)
    if forced:
        if asked.response_format is not None and asked.response_format.type != "text":
            raise ApiError(400, "response_format and a forced tool_choice exclude each other", param="tool_choice")
        name = asked.tool_choice.function.name if isinstance(asked.tool_choice, ToolChoice) else None
        more["json_schema"] = forced_schema(asked.tools or [], name)
    stop = asked.stop or ()
    more["stop"] = (*([stop] if isinstance(stop, str) else stop), *prompt.stop)
    more["stop_token_ids"] = (*(asked.stop_token_ids or ()), *prompt.stop_token_ids)
    return asked.params(
        max_tokens=backend.max_tokens(most, None, prompt_tokens),
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        **more,
    )


class _Choice:
    """One answer: what is said, and what is called."""

    def __init__(self, index: int, asked: ChatRequest, tokenizer: Tokenizer, *, strip: bool) -> None:
        self.index = index
        self.tokens = 0
        self._asked = asked
        self._tokenizer = tokenizer
        self._strip = strip  # a transcript's answer begins with a space
        named = {tool.function.name for tool in asked.tools or ()}
        self._parser = ToolParser(named) if named and asked.tool_choice != "none" else None

    def add(self, piece: Piece) -> dict[str, Any]:
        """What a piece adds, as a choice of an event."""
        check(piece)
        text = piece.text
        delta: dict[str, Any] = {}
        if self._strip:
            text = text.lstrip()
            self._strip = not text
        reason = finish_reason(piece.finish_reason)
        if self._parser is not None:
            text = self._parser.push(text)
            if reason is not None:
                rest, calls = self._parser.finish()
                text += rest
                if calls:
                    delta["tool_calls"] = [{"index": i, **call.to_json()} for i, call in enumerate(calls)]
                    reason = "tool_calls"
        if text:
            delta["content"] = text
        entries = []
        if piece.token_id is not None:
            self.tokens += 1
            if piece.logprob is not None and (piece.finish_reason not in ("eos", "stop") or piece.text):
                entries.append(self._entry(piece.logprob))
        logprobs = {"content": entries, "refusal": None} if self._asked.logprobs else None
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _entry(self, entry: TokenLogprob) -> dict[str, Any]:
        return {
            **self._token(entry.token_id, entry.logprob),
            "top_logprobs": [self._token(token, logprob) for token, logprob in entry.top],
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = list(token_bytes(self._tokenizer, token))
        return {"token": token_text(self._tokenizer, token), "logprob": finite(logprob), "bytes": spelled}


class _Answer:
    def __init__(self, backend: Backend, asked: ChatRequest, prompt_tokens: int, *, strip: bool) -> None:
        self._asked = asked
        self._prompt_tokens = prompt_tokens
        tokenizer = backend.llm.tokenizer
        self._choices = [_Choice(i, asked, tokenizer, strip=strip) for i in range(asked.n or 1)]
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = backend.name

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _usage(self) -> dict[str, int]:
        return usage(self._prompt_tokens, sum(choice.tokens for choice in self._choices))

    async def events(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[dict[str, Any]]:
        head = self._head("chat.completion.chunk")
        more = {"usage": None} if self._asked.include_usage else {}
        for choice in self._choices:
            first = {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield {**head, "choices": [{**first, "logprobs": None}], **more}
        async for piece in pieces:
            added = self._choices[piece.index].add(piece)
            entries = added["logprobs"] is not None and added["logprobs"]["content"]
            if added["delta"] or added["finish_reason"] or entries:
                yield {**head, "choices": [added], **more}
        if self._asked.include_usage:
            yield {**head, "choices": [], "usage": self._usage()}

    async def whole(self, pieces: AsyncIterator[Piece]) -> dict[str, Any]:
        texts = ["" for _ in self._choices]
        calls: list[list[dict[str, Any]]] = [[] for _ in self._choices]
        entries: list[list[dict[str, Any]]] = [[] for _ in self._choices]
        reasons: list[str | None] = [None for _ in self._choices]
        async for piece in pieces:
            i = piece.index
            added = self._choices[i].add(piece)
            texts[i] += added["delta"].get("content", "")
            calls[i] += added["delta"].get("tool_calls", ())
            if added["logprobs"] is not None:
                entries[i] += added["logprobs"]["content"]
            reasons[i] = added["finish_reason"]
        choices = []
        for i, text in enumerate(texts):
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls[i]:
                made = [{key: value for key, value in call.items() if key != "index"} for call in calls[i]]
                message |= {"content": text or None, "tool_calls": made}
            logprobs = {"content": entries[i], "refusal": None} if self._asked.logprobs else None
            choices.append({"index": i, "message": message, "logprobs": logprobs, "finish_reason": reasons[i]})
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}
