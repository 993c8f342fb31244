"""Two replicas on a local Ray, one of which is killed under load."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from fastlm.inference import LLM, SamplingParams
from fastlm.model import save_model
from tests.serve.conftest import free_port, wait_for

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'fastlm[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def path(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ray") / "tiny"
    save_model(llm.model, path, eos_token_id=llm.tokenizer.eos_token_id)
    llm.tokenizer.save(path / "tokenizer.json")
    return path


@pytest.fixture(scope="module")
def alone(path: Path) -> Iterator[LLM]:
    """What a replica serves, here."""
    with LLM(path, memory=16 << 20) as made:
        yield made


@pytest.fixture(scope="module")
def url(path: Path) -> Iterator[str]:
    from ray import serve

    from fastlm.serve.ray import build

    ray.init(num_cpus=4, include_dashboard=False, configure_logging=False, log_to_driver=False)
    try:
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        engine = {"memory": 16 << 20}
        serve.run(build({"model": str(path), "replicas": 2, "engine": engine, "num_cpus": 0.5}), name="fastlm")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas() -> list[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if "#Replica#" in actor["name"]]


def test_openais_client_runs_against_the_route_and_its_stream(url: str, alone: LLM) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        asked = {"model": "tiny", "prompt": "The film", "max_tokens": 20, "seed": 3}
        (expected,) = alone.generate(["The film"], SamplingParams(max_tokens=20, seed=3))
        assert client.completions.create(**asked).choices[0].text == expected.text
        assert "".join(e.choices[0].text for e in client.completions.create(**asked, stream=True)) == expected.text
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            client.completions.create(model="tiny", prompt="a", max_tokens=-1)
    assert httpx.get(f"{url}/ready").json()["model"] == "tiny"


def test_no_request_is_lost_with_a_replica_that_had_not_begun_to_stream(url: str, alone: LLM) -> None:
    assert len(replicas()) == 2
    prompts = ["The film", "이 영화", "was good", "음악도"]
    keys = [(prompt, tokens) for prompt in prompts for tokens in range(20, 60)]
    greedy = [SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True) for _, tokens in keys]
    texts = {key: alone.generate([key[0]], params)[0].text for key, params in zip(keys, greedy, strict=True)}
    killed = threading.Event()
    done: list[bool] = []

    def ask(key: tuple[str, int]) -> None:
        body = {"model": "tiny", "prompt": key[0], "max_tokens": key[1], "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == texts[key]
        done.append(killed.is_set())

    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(ask, key) for key in texts]
        wait_for(lambda: len(done) > 20, 120)
        name = replicas()[0]
        namespace = next(a["namespace"] for a in ray.util.list_named_actors(all_namespaces=True) if a["name"] == name)
        ray.kill(ray.get_actor(name, namespace=namespace), no_restart=True)
        killed.set()
        for future in futures:
            future.result()
    assert len(done) == len(texts)
    assert sum(done) > 20, "the load ended before the replica was killed"
    end = time.monotonic() + 120
    while len(replicas()) < 2 and time.monotonic() < end:
        time.sleep(0.5)
    assert len(replicas()) == 2, "no new replica took its place"
    assert name not in replicas()
