"""A look inside: `/next_token`, what may follow a text, and `/attention`, where a head looks.

The logits of a text are kept for a while, so that another temperature needs no pass through the model.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Annotated, Any

import torch
from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import Field, field_validator
from torch import Tensor

from fastlm.inference import SamplingParams
from fastlm.model import Transformer
from fastlm.nn.attention_weights import AttentionRecorder
from fastlm.ops.sampling.reference import filtered
from fastlm.serve.backend import Backend
from fastlm.serve.errors import ApiError, JsonResponse
from fastlm.serve.protocol import Strict, check_prompt, list_of_texts
from fastlm.serve.token_text import finite, token_text

KEPT_LOGITS = 16  # texts; of a vocabulary of 262,144, a MiB each
MAX_ATTENTION_TOKENS = 128  # a map has the square of it


class NextTokenRequest(Strict):
    model: str | None = None
    prompt: str | list[int]
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    top_k: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    count: Annotated[int, Field(ge=1, le=200)] = 20

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_prompt(cls, value: Any) -> Any:
        check_prompt(value)
        return value


class AttentionRequest(Strict):
    model: str | None = None
    text: str | list[int]
    layer: Annotated[int, Field(ge=0)] = 0
    head: Annotated[int, Field(ge=0)] = 0

    @field_validator("text", mode="before")
    @classmethod
    def _check_text(cls, value: Any) -> Any:
        check_prompt(value)
        return value


def router(backend: Backend) -> APIRouter:
    routes = APIRouter()
    kept: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    async def logits_after(ids: list[int]) -> Tensor:
        key = tuple(ids)
        if key not in kept:
            kept[key] = (await backend.pool([ids], "logits"))[0].cpu()
            if len(kept) > KEPT_LOGITS:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key]

    @routes.post("/next_token")
    async def next_token(asked: NextTokenRequest) -> Response:
        backend.check_model(asked.model)
        ids = (await backend.prompt_ids(list_of_texts(asked.prompt)))[0]
        logits = await logits_after(ids)
        found = await asyncio.to_thread(distribution, logits, asked)
        for token in found["tokens"]:
            token["text"] = token_text(backend.llm.tokenizer, token["id"])
        return JsonResponse({**found, "prompt_tokens": len(ids), "token_ids": ids})

    @routes.post("/attention")
    async def attention(asked: AttentionRequest) -> Response:
        backend.check_model(asked.model)
        model = backend.llm.model
        if not isinstance(model, Transformer):
            raise ApiError(400, "the model is recurrent: it has no attention")
        layers, heads = model.config.num_layers, model.config.num_heads
        for name, value, number in (("layer", asked.layer, layers), ("head", asked.head, heads)):
            if value >= number:
                raise ApiError(400, f"{name} is {value}; the model has {number}, from 0 on", param=name)
        ids = (await backend.prompt_ids(list_of_texts(asked.text)))[0]
        if len(ids) > MAX_ATTENTION_TOKENS:
            raise ApiError(400, f"the text has {len(ids)} tokens; the limit is {MAX_ATTENTION_TOKENS}", param="text")
        backend.llm.check(ids, SamplingParams(max_tokens=0))

        def look() -> Tensor:
            with torch.inference_mode():
                device = model.output_weight.device
                recorder = AttentionRecorder(asked.layer, asked.head, device)
                model.hidden_states(torch.tensor([ids], device=device), recorder)
                return recorder.weights.cpu()

        with backend.admit(1):
            weights = await asyncio.wrap_future(backend.llm.run(look))
        return JsonResponse(
            {
                "layer": asked.layer,
                "head": asked.head,
                "layers": layers,
                "heads": heads,
                "token_ids": ids,
                "tokens": [token_text(backend.llm.tokenizer, i) for i in ids],
                "weights": [[round(w, 6) for w in row] for row in weights.tolist()],
            }
        )

    return routes


def distribution(logits: Tensor, asked: NextTokenRequest) -> dict[str, Any]:
    """The most probable tokens: in the model's own distribution, and after temperature and filters.

    logits: `(vocab_size,)`. The filters are those of `fastlm.ops.sample`, in its order "hf".
    """
    x = logits.float()[None]
    raw = x[0].double().log_softmax(-1)
    if asked.temperature == 0:
        probabilities = torch.zeros_like(raw)
        probabilities[x[0].argmax()] = 1.0
    else:
        top_k = None if asked.top_k is None else torch.tensor([asked.top_k])
        top_p = None if asked.top_p is None else torch.tensor([float(asked.top_p)])
        min_p = None if asked.min_p is None else torch.tensor([float(asked.min_p)])
        kept, weights = filtered(x, torch.tensor([float(asked.temperature)]), top_k, top_p, min_p, False)
        probabilities = ((weights * kept) / (weights * kept).sum())[0]
    top = x[0].topk(min(asked.count, len(raw))).indices.tolist()
    present = probabilities[probabilities > 0]
    return {
        "tokens": [{"id": i, "probability": probabilities[i].item(), "logprob": finite(raw[i].item())} for i in top],
        "kept": int((probabilities > 0).sum()),
        "vocab_size": len(raw),
        "entropy": max(0.0, -(present * present.log()).sum().item()),
    }
