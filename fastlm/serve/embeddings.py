"""`/v1/embeddings`: a vector of length 1 for each text."""

from __future__ import annotations

import base64

from fastapi import APIRouter
from fastapi.responses import Response

from fastlm.serve.backend import Backend
from fastlm.serve.errors import ApiError, JsonResponse
from fastlm.serve.protocol import EmbeddingRequest


def router(backend: Backend) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/embeddings")
    async def embeddings(asked: EmbeddingRequest) -> Response:
        backend.check_model(asked.model)
        size = backend.llm.hidden_size
        if asked.dimensions not in (None, size):
            raise ApiError(
                400, f"dimensions is {asked.dimensions}; the model's vectors have {size}", param="dimensions"
            )
        ids = await backend.prompt_ids(asked.texts())
        vectors = (await backend.pool(ids, asked.pooling)).cpu()
        as_bytes = asked.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": i,
                "embedding": base64.b64encode(row.numpy().astype("<f4").tobytes()).decode()
                if as_bytes
                else row.tolist(),
            }
            for i, row in enumerate(vectors)
        ]
        tokens = sum(map(len, ids))
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JsonResponse({"object": "list", "data": data, "model": backend.name, "usage": usage})

    return routes
