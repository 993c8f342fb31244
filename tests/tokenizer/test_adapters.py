"""A tokenizer in place of tiktoken's and transformers', in other processes and in threads."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as HuggingFaceTokenizer
from transformers import AutoTokenizer

from fastlm.tokenizer import Tokenizer, as_tiktoken, as_transformers
from fastlm.tokenizer.patterns import REGEXES
from fastlm.tokenizer.sentencepiece import BYTE_TOKENS
from tests.tokenizer.hugging_face import random_text, train

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"


def byte_level(folder: Path) -> Path:
    theirs = train(["the cat sat, 나는 학교에 갔다. " * 3], "llama3", 400, ["<bos>", "<|endoftext|>", "<pad>"])
    theirs.normalizer = normalizers.NFC()
    theirs.add_tokens([AddedToken("<tool>", normalized=False)])
    return finish(theirs, folder, "<|endoftext|>")


def sentencepiece(folder: Path) -> Path:
    pieces = ["<bos>", "<unk>", "</s>", "<pad>", *BYTE_TOKENS, *"▁catshe", "th", "the", "▁the", "at", "▁c", "나", "는"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("a", "t"), ("▁", "c")]
    ids = {piece: i for i, piece in enumerate(pieces)}
    theirs = HuggingFaceTokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    theirs.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    theirs.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    theirs.add_special_tokens(["<bos>", "<unk>", "</s>", "<pad>"])
    return finish(theirs, folder, "</s>")


def finish(theirs: HuggingFaceTokenizer, folder: Path, eos: str) -> Path:
    """A model's directory, as transformers writes it."""
    from transformers import PreTrainedTokenizerFast

    theirs.post_processor = processors.TemplateProcessing(
        single=f"<bos> $A {eos}", special_tokens=[(t, theirs.token_to_id(t)) for t in ("<bos>", eos)]
    )
    tokens = {"bos_token": "<bos>", "eos_token": eos, "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=theirs, chat_template=TEMPLATE, **tokens).save_pretrained(folder)
    return folder


@pytest.fixture(params=[byte_level, sentencepiece])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return request.param(tmp_path / "model")


@pytest.fixture
def ours(folder: Path) -> Tokenizer:
    return Tokenizer.from_huggingface(folder)


def test_transformers_gives_what_its_own_loading_gives(
    folder: Path, ours: Tokenizer, tmp_path: Path, fresh_seed: int
) -> None:
    theirs, adapted = AutoTokenizer.from_pretrained(folder), as_transformers(ours)
    rng = random.Random(fresh_seed)
    batch = [random_text(rng, rng.randrange(40)) for _ in range(20)] + ["", "the cat", "<tool>the<bos>"]
    for options in (
        {},
        {"add_special_tokens": False},
        {"padding": True},
        {"padding": "max_length", "max_length": 12, "truncation": True},
        {"truncation": True, "max_length": 5, "return_offsets_mapping": True},
    ):
        assert adapted(batch, **options)["input_ids"] == theirs(batch, **options)["input_ids"]
        assert adapted(batch, **options)["attention_mask"] == theirs(batch, **options)["attention_mask"]
    assert adapted(batch, padding=True, return_tensors="pt")["input_ids"].shape[0] == len(batch)
    for text in batch:
        ids = ours.encode(text, allowed_special="all", add_special_tokens=True)
        assert adapted(text)["input_ids"] == ids
        assert adapted.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    assert adapted.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)
    assert (adapted.bos_token_id, adapted.eos_token_id, adapted.pad_token_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    )
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    adapted.save_pretrained(tmp_path / "saved")
    again = Tokenizer.from_huggingface(tmp_path / "saved")
    assert again.encode("the cat 나", add_special_tokens=True) == ours.encode("the cat 나", add_special_tokens=True)
    assert again.settings.chat_template == TEMPLATE


def test_tiktoken_surface_equals_tiktoken(small_ranks: dict[bytes, int], fresh_seed: int) -> None:
    specials = {"<|endoftext|>": 5000, "<|x|>": 5001}
    ours = as_tiktoken(Tokenizer(small_ranks, pattern="cl100k", special_tokens=specials, name="t"))
    theirs = tiktoken.Encoding("t", pat_str=REGEXES["cl100k"], mergeable_ranks=small_ranks, special_tokens=specials)
    public = {name for name in dir(theirs) if not name.startswith("_")} - {"encode_with_unstable"}
    assert public <= set(dir(ours))
    rng = random.Random(fresh_seed)
    texts = [random_text(rng, rng.randrange(50)) for _ in range(100)]
    for text in texts:
        ids = theirs.encode_ordinary(text)
        assert ours.encode_ordinary(text) == ours.encode(text) == ids
        assert ours.encode_to_numpy(text).tolist() == ids
        for name in ("decode", "decode_bytes", "decode_tokens_bytes", "decode_with_offsets"):
            assert getattr(ours, name)(ids) == getattr(theirs, name)(ids)
    assert ours.encode_batch(texts, num_threads=2) == theirs.encode_batch(texts, num_threads=2)
    assert ours.encode_ordinary_batch(["<|x|>"]) == theirs.encode_ordinary_batch(["<|x|>"])
    assert ours.encode_batch(["<|x|>"], allowed_special="all") == [[5001]]
    batch = theirs.encode_ordinary_batch(texts)
    assert ours.decode_batch(batch) == theirs.decode_batch(batch)
    assert ours.decode_bytes_batch(batch) == theirs.decode_bytes_batch(batch)
    for name in ("n_vocab", "max_token_value", "eot_token", "special_tokens_set", "name"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.token_byte_values() == theirs.token_byte_values()
    for token in ("the", b"the", "<|x|>", b"\xff", "not a token", b"<|x|>"):
        outcomes: list[Any] = []
        for encoding in (ours, theirs):
            try:
                outcomes.append(encoding.encode_single_token(token))
            except KeyError:
                outcomes.append(KeyError)
        assert outcomes[0] == outcomes[1], token
    for call in (
        lambda e: e.decode([1, 4999]),
        lambda e: e.decode_bytes([4999]),
        lambda e: e.decode_single_token_bytes(4999),
        lambda e: e.decode_tokens_bytes([4999]),
    ):
        for encoding in (ours, theirs):
            with pytest.raises(KeyError):
                call(encoding)
    for encoding in (ours, theirs):
        with pytest.raises(ValueError, match=r"<\|x\|>"):
            encoding.encode("a<|x|>")
        assert encoding.is_special_token(5001)
        assert not encoding.is_special_token(5)


def test_tiktoken_surface_serves_sentencepiece_too(tmp_path: Path) -> None:
    ours = as_tiktoken(Tokenizer.from_huggingface(sentencepiece(tmp_path / "m")))
    ids = ours.encode("the cat é")
    assert ours.decode(ids) == "the cat é"
    assert ours.decode_single_token_bytes(ours.encode_single_token(" the")) == b" the"
    assert ours.eot_token == 2
    with pytest.raises(KeyError):
        ours.encode_single_token("absent")


TEXT = "the cat sat <tool> 나는 학교에 갔다 e\u0301 \U0001f600" * 40


def test_pickled_and_copied_tokenizers_encode_alike(ours: Tokenizer) -> None:
    expected = ours.encode(TEXT, add_special_tokens=True)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(ours, protocol))
        assert type(again) is type(ours)
        assert again.encode(TEXT, add_special_tokens=True) == expected
        assert again.fingerprint() == ours.fingerprint()
        assert again.settings == ours.settings
        assert again.decode(expected) == ours.decode(expected)
    for copied in (copy.copy(ours), copy.deepcopy(ours), copy.deepcopy([ours])[0]):
        assert copied.encode(TEXT, add_special_tokens=True) == expected
    assert pickle.loads(pickle.dumps(as_tiktoken(ours))).encode("the") == ours.encode("the")


def test_a_forked_process_encodes_alike(ours: Tokenizer) -> None:
    expected = ours.encode_batch([TEXT] * 8, num_threads=2)  # threads have been, caches are filled
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        same = ours.encode_batch([TEXT] * 8, num_threads=2) == expected and ours.encode(TEXT) == expected[0]
        os.write(write, b"same" if same else b"different")
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b"same"
    assert os.waitpid(child, 0)[1] == 0


def encode_in_worker(task: tuple[Tokenizer, str]) -> list[int]:
    return task[0].encode(task[1])


def test_a_spawned_worker_encodes_alike(ours: Tokenizer) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(encode_in_worker, [(ours, TEXT)]) == [ours.encode(TEXT)]


def test_threads_share_one_tokenizer(ours: Tokenizer, fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    texts = [random_text(rng, 300) + TEXT for _ in range(60)]
    expected = [ours.encode(text, allowed_special="all") for text in texts]

    def work(number: int) -> bool:
        stream = ours.decode_stream()
        found = [ours.encode(text, allowed_special="all") for text in texts]
        text = "".join(map(stream.push, found[number])) + stream.finish()
        return found == expected and text == ours.decode(found[number])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))
