"""What is served, and how it is: `/v1/models`, `/health`, `/ready`, `/metrics`, `/run`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from fastlm.serve.backend import Backend
from fastlm.serve.errors import ApiError, JsonResponse
from fastlm.serve.metrics import CONTENT_TYPE

LOG_FILE = "log.jsonl"  # what fastlm.training writes, a line a step
MAX_LOG_BYTES = 256 << 20
CURVE_POINTS = 1000  # more than a screen has


def router(backend: Backend) -> APIRouter:
    routes = APIRouter()

    def model() -> dict[str, Any]:
        return {
            "id": backend.name,
            "object": "model",
            "created": backend.created,
            "owned_by": "fastlm",
            "max_model_len": backend.window,
            "is_training_run": backend.run is not None,
        }

    @routes.get("/v1/models")
    async def models() -> Response:
        return JsonResponse({"object": "list", "data": [model()]})

    @routes.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        backend.check_model(name)
        return JsonResponse(model())

    @routes.get("/health")
    async def health() -> Response:
        return JsonResponse({"status": "ok"})

    @routes.get("/ready")
    async def ready() -> Response:
        if not backend.ready:
            reason = "shutting down" if backend.draining else "the queue is full"
            return JsonResponse({"status": reason}, 503, headers={"Retry-After": "1"})
        return JsonResponse({"status": "ready", "model": backend.name})

    @routes.get("/metrics")
    async def metrics() -> Response:
        text = backend.metrics.text(backend.llm.stats(), backend.admitted, backend.places)
        return Response(text, media_type=CONTENT_TYPE)

    @routes.get("/run")
    async def run() -> Response:
        if backend.run is None:
            raise ApiError(404, "the model is not that of a training run")
        return JsonResponse(await asyncio.to_thread(_curve, backend.run))

    return routes


def _curve(run: Path) -> dict[str, Any]:
    """Losses by step, in nats a token: of training, thinned to the means of neighbours, and of validation."""
    from fastlm.training.log import read_log

    log = run / LOG_FILE
    if not log.is_file() or log.stat().st_size > MAX_LOG_BYTES:
        raise ApiError(404, f"the run has no {LOG_FILE}, or one that is too large")
    lines = read_log(log)
    train = [(line["step"], float(line["loss"])) for line in lines if _is_number(line.get("loss"))]
    valid = [[line["step"], float(line["valid_loss"])] for line in lines if _is_number(line.get("valid_loss"))]
    width = -(-len(train) // CURVE_POINTS) or 1
    groups = [train[i : i + width] for i in range(0, len(train), width)]
    means = [[group[-1][0], sum(loss for _, loss in group) / len(group)] for group in groups]
    return {"name": run.resolve().name, "train": means, "valid": valid}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and value == value and abs(value) < float("inf")
