from __future__ import annotations

import json
import socket
import time
from contextlib import suppress

import httpx
import pytest

from fastlm.inference import SamplingParams
from fastlm.serve.limits import Limits
from tests.serve.conftest import CONTEXT, Running, http, serving, wait_for

JSON = {"Content-Type": "application/json"}
NESTED = "[" * 100_000 + "]" * 100_000


@pytest.fixture(autouse=True)
def still_up(server: Running):
    """After whatever a test does, the server answers as before and holds nothing."""
    yield
    assert http.get(f"{server.url}/health").json() == {"status": "ok"}
    got = http.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 4, "seed": 3}).json()
    assert got["choices"][0]["text"] == server.llm.generate(["a"], SamplingParams(max_tokens=4, seed=3))[0].text
    server.wait_until_idle()


def refused(answer, status: int, *words: str) -> dict:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"], error
    return error


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/next_token"]
)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe{}",
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        NESTED.encode(),
        b'{"prompt": ' + NESTED.encode() + b"}",
        b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    ],
)
def test_a_body_that_is_no_request_is_a_400(server: Running, path: str, body: bytes) -> None:
    refused(http.post(server.url + path, content=body, headers=JSON), 400)


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("prompt", 5, "token ids"),
        ("prompt", None, "token ids"),
        ("prompt", [], "token ids"),
        ("prompt", [[]], "token ids"),
        ("prompt", ["a", 1], "token ids"),
        ("prompt", [1, -1], "token ids"),
        ("prompt", [1.5], "token ids"),
        ("prompt", [True], "token ids"),
        ("prompt", [10**9], "token id"),
        ("prompt", [1 << 40], "token ids"),
        ("prompt", {"a": 1}, "token ids"),
        ("max_tokens", -1, "max_tokens"),
        ("max_tokens", "5", "max_tokens"),
        ("max_tokens", 1.5, "max_tokens"),
        ("max_tokens", True, "max_tokens"),
        ("temperature", -0.1, "temperature"),
        ("temperature", "hot", "temperature"),
        ("temperature", 1e400, "temperature"),
        ("temperature", 2.1, "2"),
        ("top_p", 0, "top_p"),
        ("top_p", -1, "top_p"),
        ("top_k", 0, "top_k"),
        ("top_k", 1 << 70, "top_k"),
        ("n", 0, "n"),
        ("n", -3, "n"),
        ("n", 129, "128"),
        ("seed", -1, "seed"),
        ("seed", 1 << 64, "seed"),
        ("stop", [""], "stop"),
        ("stop", [1], "stop"),
        ("stop", ["a"] * 17, "17"),
        ("stop", "a" * 300, "300"),
        ("logprobs", -1, "logprobs"),
        ("logprobs", 21, "20"),
        ("logit_bias", {"-1": 1}, "-1"),
        ("logit_bias", {"a": 1}, "'a'"),
        ("logit_bias", {"99999": 1}, "99999"),
        ("logit_bias", {"1": 1e308}, "100"),
        ("logit_bias", {"1": None}, "logit_bias"),
        ("logit_bias", {str(i): 1 for i in range(1025)}, "1025"),
        ("presence_penalty", 3, "2"),
        ("repetition_penalty", 0, "repetition_penalty"),
        ("frequency_penalty", [], "frequency_penalty"),
        ("min_tokens", 50, "min_tokens"),
        ("stop_token_ids", [-1], "stop_token_ids"),
        ("stream", "yes", "stream"),
        ("stream_options", {"include_usage": True}, "stream"),
        ("response_format", {"type": "xml"}, "response_format"),
        ("response_format", {"type": "json_schema"}, "json_schema"),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}, "not valid"),
        ("suffix", "end", "suffix"),
        ("best_of", 5, "best_of"),
        ("temprature", 1, "no such argument"),
        ("model", 5, "model"),
    ],
)
def test_a_wrong_value_is_a_400_that_names_it(server: Running, field: str, value: object, word: str) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 4, field: value})
    error = refused(http.post(f"{server.url}/v1/completions", content=body, headers=JSON), 400, word)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"role": "robot", "content": "a"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
        {"messages": [{"role": "user", "content": "a"}], "tool_choice": "required"},
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"messages": [{"role": "user", "content": "<|endoftext|>"}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
    ],
)
def test_a_wrong_conversation_is_a_400(server: Running, body: dict) -> None:
    refused(http.post(f"{server.url}/v1/chat/completions", json=body), 400)


def test_ten_megabytes_are_a_413_with_the_limit(server: Running) -> None:
    body = json.dumps({"prompt": "a" * 10_000_000}).encode()
    refused(http.post(f"{server.url}/v1/completions", content=body, headers=JSON), 413, "10000014", str(4 << 20))

    def in_parts():
        for i in range(0, len(body), 1 << 16):
            yield body[i : i + (1 << 16)]

    answer = http.post(f"{server.url}/v1/completions", content=in_parts(), headers=JSON)  # no Content-Length
    refused(answer, 413, "10000014", str(4 << 20))


def test_a_hundred_megabytes_are_cut_off(server: Running) -> None:
    with connect(server) as connection, suppress(ConnectionResetError, BrokenPipeError):
        connection.sendall(
            b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(100):
            connection.sendall(b"100000\r\n" + b"a" * (1 << 20) + b"\r\n")
        pytest.fail("a body of 100 MiB was taken")


def test_a_text_longer_than_the_context_is_a_400_with_both_numbers(server: Running) -> None:
    answer = http.post(f"{server.url}/v1/completions", json={"prompt": "a" * 100_000})
    error = refused(answer, 400, str(CONTEXT))
    assert error["code"] == "context_length_exceeded"


def test_lone_surrogates_come_back_as_json(server: Running) -> None:
    body = b'{"prompt": "\\ud800a", "max_tokens": 3, "echo": true}'
    answer = http.post(f"{server.url}/v1/completions", content=body, headers=JSON)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"][1] == "a"
    refused(
        http.post(f"{server.url}/v1/completions", content=b'{"model": "\\ud800", "prompt": "a"}', headers=JSON), 404
    )


def test_other_methods_paths_and_types_are_refused_in_the_same_form(server: Running) -> None:
    refused(http.get(f"{server.url}/v1/completions"), 405)
    refused(http.get(f"{server.url}/nothing"), 404)
    refused(http.get(f"{server.url}/page/../../etc/passwd"), 404)
    refused(http.get(f"{server.url}/page/%2e%2e%2fapp.py"), 404)
    refused(http.post(f"{server.url}/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}), 415)


def connect(server: Running) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=10)


def until_closed(connection: socket.socket) -> bytes:
    data = b""
    with suppress(ConnectionResetError):  # closed with something unread
        while part := connection.recv(65536):
            data += part
    return data


def test_endless_headers_are_cut_off(server: Running) -> None:
    with connect(server) as connection, suppress(ConnectionResetError, BrokenPipeError):
        connection.sendall(b"GET / HTTP/1.1\r\nA: ")
        for _ in range(1000):
            connection.sendall(b"a" * 10_000)
        pytest.fail("10 MB of headers were taken")


@pytest.mark.parametrize("garbage", [b"\x00" * 1000, b"GET\r\n\r\n"])
def test_what_is_no_http_is_a_400(server: Running, garbage: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(garbage)
        assert until_closed(connection).startswith(b"HTTP/1.1 400")


@pytest.fixture(scope="module")
def hasty(llm):
    with serving(llm, Limits(header_seconds=0.5, body_seconds=0.5, request_seconds=1.0)) as running:
        yield running


def test_slow_headers_and_bodies_are_a_408_while_others_are_served(hasty: Running) -> None:
    silent, header, body = connect(hasty), connect(hasty), connect(hasty)
    body.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    )
    began = time.monotonic()
    header.sendall(b"GET /health HTTP/1.1\r\n")
    while time.monotonic() - began < 0.4:  # a byte now and then must not buy more time
        header.sendall(b"a")
        assert http.get(f"{hasty.url}/health").status_code == 200
        time.sleep(0.05)
    for connection in (silent, header, body):
        assert until_closed(connection).startswith(b"HTTP/1.1 408")
        connection.close()
    assert time.monotonic() - began < 5


def test_a_kept_connection_has_the_same_time_for_its_next_headers(hasty: Running) -> None:
    with connect(hasty) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /hea")
        assert b"HTTP/1.1 408" in until_closed(connection)


def test_an_answer_that_takes_too_long_is_ended_and_frees_its_blocks(hasty: Running) -> None:
    asked = {"prompt": "a", "max_tokens": 700, "ignore_eos": True, "n": 40}
    refused(http.post(f"{hasty.url}/v1/completions", json=asked, timeout=30), 504, "1 s")
    hasty.wait_until_idle()
    with (
        pytest.raises(httpx.RemoteProtocolError),
        http.stream("POST", f"{hasty.url}/v1/completions", json={**asked, "stream": True}, timeout=30) as stream,
    ):
        for _ in stream.iter_lines():
            pass
    hasty.wait_until_idle()


def test_a_reader_that_does_not_read_is_cut_off(hasty: Running) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 700, "ignore_eos": True, "n": 100, "stream": True, "logprobs": 20})
    with connect(hasty) as connection:
        connection.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        wait_for(lambda: hasty.backend.admitted == 100, 5)
        hasty.wait_until_idle(10)
