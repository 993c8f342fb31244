from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch

from fastlm.inference import LLM
from fastlm.model import ModelConfig
from fastlm.serve.app import create_app
from fastlm.serve.backend import Backend
from fastlm.serve.limits import Limits
from fastlm.serve.server import Server, listen
from fastlm.tokenizer import BpeTrainer, Tokenizer
from tests.inference.conftest import TEXT, random_model

http = httpx.Client(verify=False, limits=httpx.Limits(max_keepalive_connections=0), timeout=60)
CONTEXT = 768
CHAT_TEMPLATE = (
    "{% if tools %}{% for tool in tools %}<tool>{{ tool | tojson }}</tool>{% endfor %}<tool_call>{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}"
    "{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


class Running:
    """A server on a thread of its own."""

    def __init__(self, backend: Backend, url: str, host: str, port: int) -> None:
        self.backend, self.url, self.host, self.port = backend, url, host, port

    @property
    def llm(self) -> LLM:
        return self.backend.llm

    def wait_until_idle(self, seconds: float = 5.0) -> float:
        """Seconds until nothing is admitted and no block is used; fails after `seconds`."""
        return wait_for(lambda: self.backend.admitted == 0 and self.llm.stats().blocks_used == 0, seconds)


def wait_for(condition: Callable[[], bool], seconds: float) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"did not happen within {seconds} s"
        time.sleep(0.005)
    return time.monotonic() - began


@contextmanager
def serving(llm: LLM, limits: Limits | None = None, name: str = "tiny", **options: Any) -> Iterator[Running]:
    run = options.pop("run", None)
    backend = Backend(llm, name, limits or Limits(), run=run)
    bound = listen("127.0.0.1", 0)
    server = Server(create_app(backend, **options), backend)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started, 10)
    port = bound.getsockname()[1]
    try:
        yield Running(backend, f"http://127.0.0.1:{port}", "127.0.0.1", port)
    finally:
        server.should_exit = True
        thread.join(10)
        bound.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return BpeTrainer(300).train_from_iterator([TEXT])


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    eos = next(iter(tokenizer.special_tokens))
    settings = replace(tokenizer.settings, chat_template=CHAT_TEMPLATE, eos_token=eos)
    specials = tokenizer.special_tokens
    return Tokenizer(
        tokenizer.mergeable_ranks,
        pattern=tokenizer.pattern,
        merges=tokenizer.merges,
        special_tokens=specials,
        settings=settings,
    )


@pytest.fixture(scope="session")
def llm(chat_tokenizer: Tokenizer) -> Iterator[LLM]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is so small that a second thread would only be waited for
    torch.manual_seed(0)
    model = random_model(ModelConfig(chat_tokenizer.vocab_size, 32, 2, 4, 2, 8, 48, CONTEXT, qk_norm=True))
    with LLM(model, chat_tokenizer, memory=64 << 20) as made:
        yield made
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def server(llm: LLM) -> Iterator[Running]:
    with serving(llm) as running:
        yield running
