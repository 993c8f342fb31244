"""The FastAPI application: all endpoints and the page behind one guard."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from fastlm._version import __version__
from fastlm.serve import chat, completions, embeddings, inspection, status, tokens
from fastlm.serve.backend import Backend
from fastlm.serve.errors import ApiError, add_handlers
from fastlm.serve.guard import Guard
from fastlm.serve.vocabularies import Vocabularies

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(
    backend: Backend,
    *,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
    vocabularies: Sequence[str] = (),
) -> ASGIApp:
    """The application that serves `backend`.

    Args:
        api_key: what clients must give as a bearer token; None asks for none.
        cors_origins: sites whose pages may call the server from a browser.
        vocabularies: more of them to show texts in: tiktoken names, or files.
    """
    app = FastAPI(title="fastlm", version=__version__, docs_url=None, redoc_url=None)
    shown = Vocabularies(backend.name, backend.llm.tokenizer, vocabularies)
    for routes in (
        completions.router(backend),
        chat.router(backend),
        embeddings.router(backend),
        tokens.router(backend, shown),
        inspection.router(backend),
        status.router(backend),
        _page(),
    ):
        app.include_router(routes)
    add_handlers(app)
    guarded: ASGIApp = Guard(app, limits=backend.limits, metrics=backend.metrics, api_key=api_key)
    if cors_origins:
        guarded = CORSMiddleware(
            guarded, allow_origins=list(cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return guarded


def _page() -> APIRouter:
    routes = APIRouter()
    files = {
        entry.name: entry.read_bytes()
        for entry in resources.files("fastlm.serve").joinpath("page").iterdir()
        if entry.name.endswith(tuple(MEDIA_TYPES))
    }
    headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}

    def answer(name: str) -> Response:
        if name not in files:
            raise ApiError(404, "there is no such file")
        suffix = name[name.rindex(".") :]
        return Response(files[name], media_type=MEDIA_TYPES[suffix], headers=headers)

    @routes.get("/")
    async def index() -> Response:
        return answer("index.html")

    @routes.get("/page/{name}")
    async def file(name: str) -> Response:
        return answer(name)

    return routes
