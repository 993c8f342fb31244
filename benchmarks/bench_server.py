"""The server beside llama-cpp-python's, on one GGUF file: python -m fastlm.benchmarks.bench_server --json FILE

Two loads, each by clients that share the machine with the server, over plain sockets so that they take little of it:
8 clients at once, whose tokens a second are counted, and 64 clients with texts of mixed lengths, streamed, with
the time to the first token and between tokens. The servers take turns; while one is asked, the other idles. Before
anything is timed, our server is asked what it thinks of the peer's texts, as `bench_llama_cpp` does.

The file is what FASTLM_BENCH_GGUF names, or Gemma 3 270M from `fastlm[gemma]`. The peer runs in the Python that
FASTLM_BENCH_PEER_PYTHON names, with llama-cpp-python[server]; by default in this one. `fastlm bench server` runs the
first load alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fastlm.benchmarks.bench_llama_cpp import MAX_BEHIND, PROMPTS, TEXT, gguf_file
from fastlm.benchmarks.harness import Case, leave_out

from fastlm._files import write_atomic

CLIENTS, NEW_TOKENS = 8, 64
MANY_CLIENTS = 64
CONTEXT = 2048  # tokens
START_SECONDS = 120
ANSWER_SECONDS = 600
ROUNDS = 3
LEAST_LIKELY = 0.9  # share of the peer's tokens that must be nearly the most probable; words may be cut anew
NOT_FOUND = "llama-cpp-python[server] is not installed (FASTLM_BENCH_PEER_PYTHON), so its server is left out"


@dataclass(frozen=True)
class Ask:
    """One request: a prompt, and how many tokens are wanted."""

    prompt: str
    max_tokens: int

    def body(self, *, stream: bool) -> dict[str, Any]:
        return {"prompt": self.prompt, "max_tokens": self.max_tokens, "temperature": 0, "stream": stream}


@dataclass
class Answer:
    """What came of it; `times` are of events with text, in seconds from the request on."""

    text: str = ""
    tokens: int = 0
    times: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Server:
    port: int

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            return json.load(answer)

    def load(self, asked: list[Ask], *, stream: bool) -> list[Answer]:
        """All of them at once, each on a connection of its own."""

        async def run() -> list[Answer]:
            return list(await asyncio.gather(*(_client(self.port, ask, stream) for ask in asked)))

        return asyncio.run(run())


async def _client(port: int, ask: Ask, stream: bool) -> Answer:
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    body = json.dumps(ask.body(stream=stream)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"  # noqa: E501
    writer.write(head.encode() + body)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"the server on port {port} answered {status!r}")
    while (await reader.readline()).strip():
        pass
    answer = Answer()
    if not stream:
        content = json.loads(await reader.read())
        answer.text, answer.tokens = content["choices"][0]["text"], content["usage"]["completion_tokens"]
    else:
        async for line in reader:
            if line.startswith(b"data: {"):
                text = json.loads(line[6:])["choices"][0]["text"]
                if text:
                    answer.text += text
                    answer.times.append(time.perf_counter() - began)
        answer.tokens = len(answer.times)
    writer.close()
    return answer


@contextmanager
def running(command: list[str], port: int) -> Iterator[Server]:
    """The server that `command` starts; it listens on `port`."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
                break
            except OSError:
                if time.monotonic() > end:
                    raise RuntimeError(f"{' '.join(command)} does not answer") from None
                time.sleep(0.2)
        yield Server(port)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def our_command(path: str, port: int) -> list[str]:
    return [sys.executable, "-m", "fastlm", "serve", "--model", path, "--port", str(port)]


def peer_command(path: str, port: int) -> list[str]:
    threads = str(torch.get_num_threads())
    options = {
        "--model": path,
        "--port": str(port),
        "--n_ctx": str(CONTEXT),
        "--n_threads": threads,
        "--n_threads_batch": threads,
        "--interrupt_requests": "false",  # else a client that comes ends the answer of the one before
    }
    return [peer_python(), "-m", "llama_cpp.server", *(part for option in options.items() for part in option)]


def peer_python() -> str:
    return os.environ.get("FASTLM_BENCH_PEER_PYTHON") or sys.executable


def has_peer() -> bool:
    probe = [peer_python(), "-c", "import llama_cpp.server.app"]
    return subprocess.run(probe, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def eight() -> list[Ask]:
    return [Ask(prompt, NEW_TOKENS) for prompt in PROMPTS[:CLIENTS]]


def mixed() -> list[Ask]:
    """Prompts of about 5 to 300 tokens, answers of 16 to 96; the same each time."""
    rng = random.Random(0)
    words = (TEXT * 20).split()
    asked = []
    for i in range(MANY_CLIENTS):
        filler = " ".join(words[: rng.choice([0, 0, 20, 60, 120, 240])])
        asked.append(Ask(f"{filler} {PROMPTS[i % len(PROMPTS)]}".strip(), rng.choice([16, 32, 48, 96])))
    return asked


def check_near(server: Server, asked: list[Ask], texts: list[str]) -> None:
    """Whether our server finds the tokens of the peer's texts, given those before them, about the most probable."""
    near = total = 0
    for ask, text in zip(asked, texts, strict=True):
        scored = server.ask({"prompt": ask.prompt + text, "max_tokens": 0, "echo": True, "logprobs": 1})
        found = scored["choices"][0]["logprobs"]
        for offset, logprob, top in zip(
            found["text_offset"], found["token_logprobs"], found["top_logprobs"], strict=True
        ):
            if logprob is not None and offset >= len(ask.prompt):
                total += 1
                near += max(top.values()) - logprob < MAX_BEHIND
    assert total, "the peer wrote nothing"
    assert near >= LEAST_LIKELY * total, f"only {near} of the peer's {total} tokens are about the most probable"


def cases(device: str) -> Iterable[Case]:
    path = gguf_file()
    if device != "cpu" or path is None:
        return
    if not has_peer():
        leave_out(NOT_FOUND)
        return
    with both(path) as (ours, peer):
        asked = eight()

        def check(a: list[Answer], b: list[Answer]) -> None:
            assert [x.tokens for x in a] == [ask.max_tokens for ask in asked], "an answer of ours is cut short"
            check_near(ours, asked, [answer.text for answer in b])

        yield Case(
            name=f"{CLIENTS} clients at once, {NEW_TOKENS} tokens each",
            ours=lambda: ours.load(asked, stream=False),
            peers={"llama-cpp-python's server": lambda: peer.load(asked, stream=False)},
            check=check,
            work=CLIENTS * NEW_TOKENS,
            unit="tokens",
        )


@contextmanager
def both(path: str) -> Iterator[tuple[Server, Server]]:
    with ExitStack() as stack:
        made = [
            stack.enter_context(running(command(path, port), port))
            for command, port in ((our_command, free_port()), (peer_command, free_port()))
        ]
        yield made[0], made[1]


def measured(load: Callable[[], list[Answer]]) -> dict[str, float]:
    began = time.perf_counter()
    answers = load()
    seconds = time.perf_counter() - began
    found = {"tokens_per_second": sum(answer.tokens for answer in answers) / seconds}
    firsts = [answer.times[0] for answer in answers if answer.times]
    gaps = [b - a for answer in answers for a, b in zip(answer.times, answer.times[1:], strict=False)]
    for name, values in (("first_token", firsts), ("between_tokens", gaps)):
        if values:
            cuts = statistics.quantiles(values, n=20)
            found |= {f"{name}_p50": statistics.median(values), f"{name}_p95": cuts[-1]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each server; medians are shown")
    options = parser.parse_args()
    path = gguf_file()
    if path is None:
        sys.exit("needs a model: set FASTLM_BENCH_GGUF, or install fastlm[gemma]")
    if not has_peer():
        sys.exit(NOT_FOUND)
    loads = {
        f"{CLIENTS} clients, {NEW_TOKENS} tokens each": (eight(), False),
        f"{MANY_CLIENTS} clients, mixed lengths, streamed": (mixed(), True),
    }
    report: dict[str, Any] = {}
    with both(path) as (ours, peer):
        sides = {"fastlm": ours, "llama-cpp-python": peer}
        check_near(ours, eight(), [answer.text for answer in peer.load(eight(), stream=False)])
        for name, (asked, stream) in loads.items():
            runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
            for _ in range(options.rounds):
                for side, server in sides.items():
                    runs[side].append(measured(lambda s=server, a=asked, m=stream: s.load(a, stream=m)))
            report[name] = {
                side: {key: statistics.median(run[key] for run in its) for key in its[0]} for side, its in runs.items()
            }
            rates = {side: figures["tokens_per_second"] for side, figures in report[name].items()}
            print(f"{name}: {rates['fastlm'] / rates['llama-cpp-python']:.2f} × the tokens a second")
            for side, figures in report[name].items():
                print(f"  {side:18}", "  ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)
    if options.json:
        write_atomic(options.json, json.dumps(report, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
