"""Every published family against the library that defines its ids: `tokenizers`, tiktoken, sentencepiece, llama.cpp."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiktoken
import tokenizers

from fastlm.errors import TokenizerError
from fastlm.tokenizer import Tokenizer
from tests.tokenizer import vocabularies
from tests.tokenizer.hugging_face import random_text
from tests.tokenizer.test_pretokenize import ALPHABET

pytestmark = pytest.mark.slow

TEXTS = 3000
LLAMA_CPP = (
    *("command-r", "deepseek-coder", "deepseek-llm", "gemma-4", "gpt-2", "llama-bpe", "llama-spm", "mpt", "phi-3"),
    *("qwen2", "qwen35", "refact", "starcoder"),
)
MODELS = (
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_241114.model.v7",
)


def texts(rng: random.Random, count: int, extra: list[str], real: dict[str, str]) -> Iterator[str]:
    yield from (text[:100_000] for text in real.values())
    for _ in range(count):
        length = rng.choice([1, 2, 3, 8, 20, 60])
        if rng.random() < 0.5:
            yield random_text(rng, length)
        else:
            yield "".join(rng.choices([*ALPHABET, *extra], k=length))


@pytest.mark.parametrize("name", vocabularies.HUGGING_FACE)
def test_ids_and_offsets_equal_hugging_face(name: str, real_texts: dict[str, str], fresh_seed: int) -> None:
    path = vocabularies.hugging_face(name)
    ours, theirs = Tokenizer.from_huggingface(path), tokenizers.Tokenizer.from_file(str(path))
    rng = random.Random(fresh_seed)
    added = [token.content for token in ours.added_tokens]
    for text in texts(rng, TEXTS, rng.sample(added, min(len(added), 30)), real_texts):
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, allowed_special="all") == expected.ids, repr(text)
    for text in ("", "The capital of France is", "나는 학교에 갔다."):
        assert ours.encode(text, add_special_tokens=True) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert ours.vocab_size == max(theirs.get_vocab(with_added_tokens=True).values()) + 1


@pytest.mark.parametrize("name", ["llama2", "gemma3", "qwen3", "deepseek-v3", "claude"])
def test_a_saved_vocabulary_is_read_by_hugging_face_with_equal_ids(name: str, tmp_path: Path, fresh_seed: int) -> None:
    original = vocabularies.hugging_face(name)
    ours = Tokenizer.from_huggingface(original)
    ours.save(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    theirs = [tokenizers.Tokenizer.from_file(str(path)) for path in (original, tmp_path / "tokenizer.json")]
    rng = random.Random(fresh_seed)
    for text in texts(rng, 500, [token.content for token in ours.added_tokens[:30]], {}):
        first, second = (tokenizer.encode(text) for tokenizer in theirs)
        assert first.ids == second.ids == again.encode(text, allowed_special="all", add_special_tokens=True)
        assert theirs[0].decode(first.ids, skip_special_tokens=False) == theirs[1].decode(
            first.ids, skip_special_tokens=False
        )


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_gguf_ids_equal_those_that_llama_cpp_publishes(name: str) -> None:
    path = vocabularies.llama_cpp() / f"ggml-vocab-{name}.gguf"
    ours = Tokenizer.from_gguf(path)
    inputs = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = Path(f"{path}.out").read_text().split("\n")
    assert len(inputs) > 40
    for text, line in zip(inputs, expected, strict=False):
        assert ours.encode(text) == [int(i) for i in line.split()], repr(text)


def test_gguf_says_what_is_not_supported() -> None:
    folder = vocabularies.llama_cpp()
    for name, message in (
        ("bert-bge", "model 'bert' is not supported"),
        ("nomic-bert-moe", "model 't5' is not supported"),
        ("falcon", "pre 'falcon' is not supported"),
        ("gpt-neox", "does not say how text is split"),
    ):
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.from_gguf(folder / f"ggml-vocab-{name}.gguf")
    neox = Tokenizer.from_gguf(folder / "ggml-vocab-gpt-neox.gguf", pattern="gpt2")
    assert neox.encode("Hello world") == [12092, 1533]


def test_gemma_gguf_equals_gemma_tokenizer_json(real_texts: dict[str, str], fresh_seed: int) -> None:
    ours = Tokenizer.from_file(vocabularies.gemma_gguf())
    assert ours.encode("The capital of France is", add_special_tokens=True) == [2, 818, 5279, 529, 7001, 563]
    theirs = tokenizers.Tokenizer.from_file(str(vocabularies.hugging_face("gemma3")))
    for text in texts(random.Random(fresh_seed), TEXTS, [], real_texts):
        # The file's runs of spaces are user-defined, found before merging; Hugging Face merges them. Ids are the same.
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


@pytest.mark.parametrize("name", MODELS)
def test_model_files_equal_sentencepiece(name: str, real_texts: dict[str, str], fresh_seed: int) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    path = vocabularies.mistral() / name
    ours, theirs = Tokenizer.from_file(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in texts(random.Random(fresh_seed), TEXTS, ["▁", "  "], real_texts):
        text = text.replace("\0", "")  # which ends a text there
        assert ours.encode(text) == theirs.encode(text), repr(text)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_id(), theirs.eos_id())


@pytest.mark.parametrize("name", ["tekken_240718.json", "tekken_240911.json"])
def test_tekken_equals_tiktoken_on_its_ranks(name: str, real_texts: dict[str, str], fresh_seed: int) -> None:
    path = vocabularies.mistral() / name
    ours = Tokenizer.from_file(path)
    document = json.loads(path.read_text("utf-8"))
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in document["vocab"][: 131_072 - 1000]}
    theirs = tiktoken.Encoding(name, pat_str=document["config"]["pattern"], mergeable_ranks=ranks, special_tokens={})
    for text in texts(random.Random(fresh_seed), TEXTS, [], real_texts):
        assert ours.encode_ordinary(text) == [i + 1000 for i in theirs.encode_ordinary(text)], repr(text)
    assert ours.vocab_size == 131_072
    assert ours.encode("[INST]", allowed_special="all") == [3]


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda: vocabularies.hugging_face("llama2"), "json"),
        (lambda: vocabularies.llama_cpp() / "ggml-vocab-llama-spm.gguf", "gguf"),
        (lambda: vocabularies.mistral() / "tokenizer.model.v1", "model"),
    ],
    ids=["json", "gguf", "model"],
)
def test_damaged_files_load_or_raise_tokenizer_error(
    read: Callable[[], Path], name: str, tmp_path: Path, fresh_seed: int
) -> None:
    rng = random.Random(fresh_seed)
    data = read().read_bytes()
    path = tmp_path / f"tokenizer.{name}"
    messages = []
    for i in range(60):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(min(len(data), rng.choice([200, 5000, len(data)])))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.randrange(len(data))] if i % 3 == 0 else damaged)
        try:
            Tokenizer.from_file(path).encode("low 가")
        except TokenizerError as refusal:
            messages.append(str(refusal))
    assert len(messages) >= 20
    assert not any("\n" in message for message in messages)
