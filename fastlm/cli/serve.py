"""`fastlm serve`: OpenAI's protocol and a page over one model."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from fastlm.cli.output import status_console
from fastlm.cli.sampling_options import MemoryOption, SpeculateOption, memory_in_bytes
from fastlm.errors import ConfigError

KEY_VARIABLE = "FASTLM_API_KEY"


def command(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Directory of a run or a model, a .gguf file, gemma3-270m, or an id of the Hugging Face hub.",
        ),
    ] = "gemma3-270m",
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", envvar=KEY_VARIABLE, show_envvar=True, help="What clients must give as a bearer token."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What clients call the model. [default: as --model]")
    ] = None,
    memory: MemoryOption = None,
    max_queue: Annotated[
        int, typer.Option("--max-queue", min=0, help="Texts that may wait; more are refused, 429.")
    ] = 256,
    max_sequences: Annotated[int, typer.Option("--max-sequences", min=1, help="Texts that are written at once.")] = 64,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Most tokens for one text. [default: the model's context]")
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option("--max-prompt-tokens", min=1, help="Most tokens of a prompt. [default: the context]")
    ] = None,
    max_body: Annotated[float, typer.Option("--max-body", min=0.001, help="MiB of a request's body.")] = 4.0,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for an answer.")] = 600.0,
    header_timeout: Annotated[float, typer.Option("--header-timeout", min=0.1, help="Seconds for headers.")] = 10.0,
    body_timeout: Annotated[float, typer.Option("--body-timeout", min=0.1, help="Seconds for a body.")] = 30.0,
    drain: Annotated[float, typer.Option("--drain", min=1, help="Seconds that requests have after SIGTERM.")] = 30.0,
    cors: Annotated[
        list[str] | None, typer.Option("--cors", help="A site whose pages may call the server, or *; repeat for more.")
    ] = None,
    vocabulary: Annotated[
        list[str] | None,
        typer.Option("--vocabulary", help="One more to show texts in: a tiktoken name or a file; repeat for more."),
    ] = None,
    speculate: SpeculateOption = 0,
) -> None:
    """Serve a model to OpenAI's clients, with a page at /. Ctrl-C or SIGTERM ends it when what has begun is done.

    Example: fastlm serve --model gemma3-270m --port 8000

    Example: curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "Once"}'
    """
    if api_key is not None and (not api_key.strip() or not api_key.isascii()):
        raise ConfigError("the API key must be of ASCII characters, and not empty")
    os.environ.pop(KEY_VARIABLE, None)  # what the server starts need not know it
    try:
        from fastlm.serve.server import listen, serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"the server needs {error.name}; install it with: pip install 'fastlm[serve]'") from None
    from fastlm.inference import LLM
    from fastlm.serve.app import create_app
    from fastlm.serve.backend import Backend, model_name
    from fastlm.serve.limits import MEBIBYTE, Limits
    from fastlm.serve.vocabularies import check_names

    limits = Limits(
        max_queue=max_queue,
        max_body=int(max_body * MEBIBYTE),
        max_tokens=max_tokens,
        max_prompt_tokens=max_prompt_tokens,
        header_seconds=header_timeout,
        body_seconds=body_timeout,
        request_seconds=timeout,
        drain_seconds=drain,
    )
    check_names(vocabulary or ())
    bound = listen(host, port)
    llm = LLM(model, memory=memory_in_bytes(memory), max_sequences=max_sequences, num_drafts=speculate)
    path = Path(model)
    backend = Backend(llm, name or model_name(model), limits, run=path if (path / "log.jsonl").is_file() else None)
    app = create_app(backend, api_key=api_key, cors_origins=cors or (), vocabularies=vocabulary or ())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    address = f"[{host}]" if ":" in host else host
    status_console.print(f"{backend.name} at http://{address}:{bound.getsockname()[1]}", highlight=False, markup=False)
    if api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
        status_console.print("anyone who reaches this address may use it: give --api-key", style="yellow")
    serve(app, backend, bound)
