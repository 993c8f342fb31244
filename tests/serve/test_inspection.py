from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastlm.model import load_model
from fastlm.nn.attention_weights import AttentionRecorder
from fastlm.serve.vocabularies import BYTES, TRAINED
from tests.serve.conftest import Running, http

PROMPT = "이 영화는 The film"


def ask(server: Running, path: str, **body: object) -> dict:
    answer = http.post(f"{server.url}{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def logits_after(server: Running, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return server.llm.model(torch.tensor([ids]))[0, -1].double()


def test_next_token_is_the_models_distribution_at_any_temperature(server: Running) -> None:
    ids = server.llm.prompt_ids(PROMPT)
    logits = logits_after(server, ids)
    for temperature in (0.25, 1.0, 2.0):
        found = ask(server, "/next_token", prompt=PROMPT, temperature=temperature, count=200)
        expected = (logits / temperature).softmax(0)
        assert found["token_ids"] == ids
        assert [t["id"] for t in found["tokens"]] == logits.argsort(descending=True)[:200].tolist()
        for token in found["tokens"]:
            assert token["probability"] == pytest.approx(expected[token["id"]].item(), rel=1e-4, abs=1e-9)
            assert token["logprob"] == pytest.approx(logits.log_softmax(0)[token["id"]].item(), abs=1e-4)
        assert found["entropy"] == pytest.approx(-(expected * expected.log()).sum().item(), abs=1e-4)


def test_filters_leave_the_smallest_set_and_its_shares(server: Running) -> None:
    probabilities = logits_after(server, server.llm.prompt_ids(PROMPT)).softmax(0).sort(descending=True).values
    share = probabilities.cumsum(0)
    for top_p in (0.3, 0.8):
        found = ask(server, "/next_token", prompt=PROMPT, top_p=top_p)
        kept = int((share < top_p).sum()) + 1
        assert found["kept"] == kept
        first = found["tokens"][0]["probability"]
        assert first == pytest.approx((probabilities[0] / share[kept - 1]).item(), rel=1e-4)
    found = ask(server, "/next_token", prompt=PROMPT, top_k=5)
    assert found["kept"] == 5
    assert sum(t["probability"] for t in found["tokens"]) == pytest.approx(1)
    found = ask(server, "/next_token", prompt=PROMPT, temperature=0)
    assert [t["probability"] for t in found["tokens"][:2]] == [1.0, 0.0]
    assert found["entropy"] == 0


def test_attention_weights_equal_those_of_transformers(server: Running, tmp_path) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    ids = torch.randint(64, (1, 17))
    with torch.inference_mode():
        expected = theirs(ids, output_attentions=True).attentions
        for layer in range(2):
            for head in range(4):
                recorder = AttentionRecorder(layer, head, torch.device("cpu"))
                ours.hidden_states(ids, recorder)
                torch.testing.assert_close(recorder.weights, expected[layer][0, head], atol=1e-5, rtol=1e-4)


def test_an_attention_map_looks_back_alone_and_its_rows_sum_to_1(server: Running) -> None:
    found = ask(server, "/attention", text=PROMPT, layer=1, head=3)
    assert (found["layers"], found["heads"]) == (2, 4)
    for i, row in enumerate(found["weights"]):
        assert sum(row) == pytest.approx(1, abs=1e-4)
        assert row[i + 1 :] == [0] * (len(row) - i - 1)
    for body, word in (({"layer": 2}, "2"), ({"head": 4}, "4"), ({"text": "!?" * 100}, "128")):
        answer = http.post(f"{server.url}/attention", json={"text": PROMPT, **body})
        assert answer.status_code == 400
        assert word in answer.json()["error"]["message"]


def test_tokens_of_every_vocabulary_spell_the_text(server: Running) -> None:
    names = http.get(f"{server.url}/vocabularies").json()["vocabularies"]
    assert names[0] == "tiny"
    assert names[-2:] == [TRAINED, BYTES]
    for name in names:
        found = ask(server, "/tokenize", text=PROMPT, vocabulary=name, pieces=True)
        assert bytes.fromhex("".join(found["pieces"])).decode() == PROMPT
        assert found["count"] == len(found["tokens"])
        assert ask(server, "/detokenize", tokens=found["tokens"], vocabulary=name)["text"] == PROMPT
    assert ask(server, "/tokenize", prompt=PROMPT, add_special_tokens=True)["tokens"] == server.llm.prompt_ids(PROMPT)
    assert ask(server, "/tokenize", content="")["tokens"] == []
    answer = http.post(f"{server.url}/tokenize", json={"text": "a", "vocabulary": "none"})
    assert answer.status_code == 404
    answer = http.post(f"{server.url}/detokenize", json={"tokens": [10**6]})
    assert answer.status_code == 400
    assert str(10**6) in answer.json()["error"]["message"]
