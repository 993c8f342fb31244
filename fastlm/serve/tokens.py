"""Texts as tokens and back: `/tokenize`, `/detokenize`, `/vocabularies`."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import AliasChoices, Field

from fastlm.serve.backend import Backend
from fastlm.serve.errors import ApiError, JsonResponse
from fastlm.serve.protocol import Strict
from fastlm.serve.vocabularies import Vocabularies

MAX_PIECES = 20_000  # tokens with their bytes; ids alone have no limit but the body's


class TokenizeRequest(Strict):
    model: str | None = None
    text: str = Field(validation_alias=AliasChoices("text", "prompt", "content"))
    vocabulary: str | None = None
    add_special_tokens: bool = False  # what the model's texts begin with, such as <bos>
    pieces: bool = False


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=1 << 31)]]
    vocabulary: str | None = None


def router(backend: Backend, vocabularies: Vocabularies) -> APIRouter:
    routes = APIRouter()

    @routes.get("/vocabularies")
    async def list_vocabularies() -> Response:
        return JsonResponse({"vocabularies": vocabularies.names})

    @routes.post("/tokenize")
    async def tokenize(asked: TokenizeRequest) -> Response:
        backend.check_model(asked.model)

        def cut() -> dict[str, Any]:
            cutter = vocabularies.get(asked.vocabulary)
            own = asked.vocabulary in (None, vocabularies.default)
            if asked.add_special_tokens and not own:
                raise ApiError(
                    400, "add_special_tokens goes with the model's own vocabulary", param="add_special_tokens"
                )
            ids = backend.llm.prompt_ids(asked.text) if asked.add_special_tokens else cutter.encode_ordinary(asked.text)
            found: dict[str, Any] = {
                "vocabulary": asked.vocabulary or vocabularies.default,
                "vocab_size": cutter.vocab_size,
                "count": len(ids),
                "max_model_len": backend.window,
                "tokens": ids,
            }
            if asked.pieces:
                if len(ids) > MAX_PIECES:
                    message = f"the text has {len(ids)} tokens; with pieces the limit is {MAX_PIECES}"
                    raise ApiError(400, message, param="pieces")
                found["pieces"] = [cutter.token_bytes(i).hex() for i in ids]
            return found

        return JsonResponse(await asyncio.to_thread(cut))

    @routes.post("/detokenize")
    async def detokenize(asked: DetokenizeRequest) -> Response:
        backend.check_model(asked.model)

        def join() -> str:
            cutter = vocabularies.get(asked.vocabulary)
            wrong = next((i for i in asked.tokens if i >= cutter.vocab_size), None)
            if wrong is not None:
                raise ApiError(
                    400, f"there is no token {wrong}; the vocabulary has {cutter.vocab_size}", param="tokens"
                )
            return b"".join(cutter.token_bytes(i) for i in asked.tokens).decode("utf-8", "replace")

        text = await asyncio.to_thread(join)
        return JsonResponse({"text": text, "prompt": text})

    return routes
