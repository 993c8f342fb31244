from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import tiktoken
import tokenizers
from tokenizers import models, normalizers, processors

from fastlm.errors import TokenizerError
from fastlm.tokenizer.byte_level import CHAR_TO_BYTE, from_chars, to_chars
from fastlm.tokenizer.huggingface_format import load_tokenizer_json, save_tokenizer_json
from fastlm.tokenizer.tokenizer import Tokenizer
from fastlm.tokenizer.trainer import BpeTrainer
from tests.tokenizer import hugging_face as hf

KOREAN = "나는 학교에 갔다. 너도 학교에 갔니? 우리는 학교에서 공부한다.\n"
TEXTS = [*list(topics.values())[:15], KOREAN * 10]
SPECIAL = ["<|endoftext|>", "<|끝|>"]

Change = Callable[[dict[str, Any]], Any]


def sample_texts(seed: int) -> list[str]:
    rng = random.Random(seed)
    return [KOREAN, "I'LL go\n\n  now \n ", "", *(hf.random_text(rng, rng.randrange(150)) for _ in range(60))]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save_tokenizer_json(BpeTrainer(300).train_from_iterator(["low lower lowest newest"]), path)
    return json.loads(path.read_text("utf-8"))


def load(tmp_path: Path, document: Any) -> Tokenizer:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document), "utf-8")
    return load_tokenizer_json(path)


def test_byte_alphabet_is_hugging_faces() -> None:
    assert set(CHAR_TO_BYTE) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert to_chars(b" \n\xad") == "ĠĊŃ"
    assert from_chars(to_chars(bytes(range(256)))) == bytes(range(256))
    for char in (" ", "\n", "\xad", "\u0200", "한", "\uffff", "\ud800"):
        with pytest.raises(ValueError):
            from_chars(f"a{char}")


@pytest.mark.parametrize("pattern", hf.PATTERNS)
def test_hugging_face_reads_a_saved_tokenizer_with_equal_ids(tmp_path: Path, pattern: str, fresh_seed: int) -> None:
    ours = BpeTrainer(900, pattern=pattern, special_tokens=SPECIAL).train_from_iterator(TEXTS)
    save_tokenizer_json(ours, tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    again = load_tokenizer_json(tmp_path / "tokenizer.json")
    assert again.mergeable_ranks == ours.mergeable_ranks
    assert again.special_tokens == ours.special_tokens
    assert again.pattern == pattern
    for text in sample_texts(fresh_seed):
        ids = theirs.encode(text).ids
        assert list(ours.encode(text)) == ids == list(again.encode(text))
        assert theirs.decode(ids) == text
    with_special = f"{KOREAN}<|endoftext|>a<|끝|>"
    assert list(again.encode(with_special, allowed_special="all")) == theirs.encode(with_special).ids


@pytest.mark.parametrize("pattern", hf.PATTERNS)
def test_a_tokenizer_that_hugging_face_trained_encodes_equally(tmp_path: Path, pattern: str, fresh_seed: int) -> None:
    theirs = hf.train(TEXTS, pattern, 900, SPECIAL)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer_json(tmp_path / "tokenizer.json")
    for text in sample_texts(fresh_seed):
        assert list(ours.encode(text)) == theirs.encode(text).ids


def test_transformers_reads_a_saved_tokenizer(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    ours = BpeTrainer(600).train_from_iterator(TEXTS)
    save_tokenizer_json(ours, tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs(KOREAN)["input_ids"] == list(ours.encode(KOREAN))


def ranks_with_unreachable_tokens() -> dict[bytes, int]:
    """A trained vocabulary, and tokens that merging cannot make, as cl100k and Llama 3 have some."""
    trained = BpeTrainer(700, special_tokens=[]).train_from_iterator(TEXTS)
    tokens = sorted(trained.mergeable_ranks, key=trained.mergeable_ranks.__getitem__)
    unreachable = [b"qzxqzx", " 학교에서는".encode()]
    return {token: rank for rank, token in enumerate([*tokens[:500], *unreachable, *tokens[500:]])}


def test_hugging_face_reads_tiktoken_ranks_with_tiktokens_ids(tmp_path: Path, fresh_seed: int) -> None:
    ranks = ranks_with_unreachable_tokens()
    ours = Tokenizer(ranks, pattern="cl100k", special_tokens={"<|x|>": len(ranks)}, merges=None)
    save_tokenizer_json(ours, tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    again = load_tokenizer_json(tmp_path / "tokenizer.json")
    reference = tiktoken.Encoding("t", pat_str=hf.REGEXES["cl100k"], mergeable_ranks=ranks, special_tokens={})
    assert json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["model"]["ignore_merges"] is True
    for text in ["qzxqzx", "aqzxqzx", " 학교에서는", " 학교에서는요", *sample_texts(fresh_seed)]:
        if "\r" in text or text != text.rstrip():
            continue  # tiktoken's own engine has no \z
        ids = reference.encode(text, disallowed_special=())
        assert theirs.encode(text).ids == ids == list(again.encode(text))


def test_every_split_of_a_token_listed_as_a_merge_gives_the_same_ids(tmp_path: Path, fresh_seed: int) -> None:
    """Llama 3's file is like this."""
    ranks = ranks_with_unreachable_tokens()
    save_tokenizer_json(Tokenizer(ranks, pattern="llama3", special_tokens={}, merges=None), tmp_path / "t.json")
    document = json.loads((tmp_path / "t.json").read_text("utf-8"))
    document["model"]["merges"] = [
        [to_chars(token[:i]), to_chars(token[i:])]
        for token in sorted(ranks, key=ranks.__getitem__)
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    document["post_processor"] = json.loads(
        tokenizers.processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[]).__getstate__()
    )
    ours = load(tmp_path, document)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(document))
    for text in ["qzxqzx", " 학교에서는", *sample_texts(fresh_seed)]:
        assert list(ours.encode(text)) == theirs.encode(text).ids


def test_merges_in_another_order_than_ids_still_encode_as_hugging_face_does(tmp_path: Path, fresh_seed: int) -> None:
    theirs = hf.train(TEXTS, "gpt2", 600)
    document = json.loads(theirs.to_str())
    vocab = document["model"]["vocab"]
    merged = [token for token in vocab if len(token) > 1]
    shuffled = random.Random(fresh_seed).sample([vocab[token] for token in merged], len(merged))
    vocab.update(zip(merged, shuffled, strict=True))
    ours = load(tmp_path, document)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(document))
    for text in sample_texts(fresh_seed):
        assert list(ours.encode(text)) == theirs.encode(text).ids
    save_tokenizer_json(ours, tmp_path / "again.json")
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "again.json"))
    assert again.encode(KOREAN).ids == theirs.encode(KOREAN).ids


def test_merges_written_as_one_string_are_read(tmp_path: Path, document: dict[str, Any]) -> None:
    expected = load(tmp_path, document)
    old = copy.deepcopy(document)
    old["model"]["merges"] = [" ".join(merge) for merge in old["model"]["merges"]]
    del old["model"]["type"]
    old["decoder"] = None
    assert load(tmp_path, old).mergeable_ranks == expected.mergeable_ranks


def test_special_tokens_may_be_missing_from_the_vocab(tmp_path: Path, document: dict[str, Any]) -> None:
    changed = copy.deepcopy(document)
    del changed["model"]["vocab"]["<|endoftext|>"]
    assert load(tmp_path, changed).special_tokens == {"<|endoftext|>": 0}


def put(*keys: Any) -> Change:
    """Sets the value given last at the path of keys given first."""

    def change(document: dict[str, Any]) -> None:
        *path, key, value = keys
        for step in path:
            document = document[step]
        document[key] = value

    return change


SPLIT = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
NMT = json.loads(normalizers.Sequence([normalizers.NFC(), normalizers.Nmt()]).__getstate__())
BERT = json.loads(processors.BertProcessing(("a", 0), ("b", 1)).__getstate__())
UNIGRAM = json.loads(models.Unigram([("a", 0.0)]).__getstate__())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("normalizer", NMT), "normalizer 'Nmt' is not supported"),
        (put("normalizer", "NFC"), "normalizer 'NFC' is not an object"),
        (put("normalizer", {"type": "Prepend"}), "normalizer 'Prepend' is not well-formed"),
        (put("truncation", {"max_length": 4}), "truncation .* is not supported"),
        (put("padding", {"strategy": "BatchLongest"}), "padding .* is not supported"),
        (put("post_processor", BERT), "post_processor BertProcessing is not supported"),
        (put("decoder", {"type": "WordPiece"}), "decoder WordPiece is not supported"),
        (put("model", UNIGRAM), "model 'Unigram' is not supported"),
        (put("pre_tokenizer", {"type": "Whitespace"}), "pre_tokenizer Whitespace is not supported"),
        (put("pre_tokenizer", None), "pre_tokenizer None is not supported"),
        (put("pre_tokenizer", "pretokenizers", 0, SPLIT), "pattern .* is not supported"),
        (put("pre_tokenizer", "pretokenizers", 0, "behavior", "MergedWithNext"), "behavior .* is not supported"),
        (put("pre_tokenizer", "pretokenizers", 0, "invert", True), "invert is not supported"),
        (put("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", True), "add_prefix_space is not supported"),
        (put("pre_tokenizer", "pretokenizers", 1, "use_regex", "yes"), "use_regex 'yes' is not supported"),
        (put("pre_tokenizer", "pretokenizers", 1, "type", "Digits"), "without ByteLevel at its end is not supported"),
        (put("model", "dropout", 0.1), "dropout 0.1 .* is not supported"),
        (put("model", "byte_fallback", 1), "byte_fallback is neither true nor false"),
        (put("model", "end_of_word_suffix", "</w>"), "end_of_word_suffix .* is not supported"),
        (put("added_tokens", 0, "lstrip", 1), "option of the added token .* is neither true nor false"),
        (put("added_tokens", 0, "id", 5), "has id 0 in the vocab and 5 as an added token"),
        (put("added_tokens", 0, "content", ""), "no valid content"),
        (put("added_tokens", 0, "content", "\ud800"), "no valid content"),
        (put("model", "vocab", "한글", 5000), "stands for no byte"),
        (put("model", "vocab", "zz", 7), "same id"),
        (put("model", "vocab", "zz", -1), "has id -1"),
        (put("model", "vocab", "zz", 1 << 40), "has id"),
        (put("model", "vocab", "zz", True), "has id True"),
        (put("model", "vocab", "zz", 500.0), "has id 500.0"),
        (put("model", "vocab", "z" * 9000, 500), "longer than 8192 bytes"),
        (put("model", "vocab", "", 500), "empty"),
        (put("model", "vocab", {}), "no vocab"),
        (put("model", "vocab", {"a": 1}), "238 of the bytes of text have no token"),
        (put("model", "merges", None), "no merges"),
        (put("model", "merges", [["a"]]), "merge 0 is .*not a pair"),
        (put("model", "merges", ["a b c"]), "merge 0 is .*not a pair"),
        (put("model", "merges", [["q", "z"]]), "merge 0 needs the token 'qz'"),
        (put("model", "merges", [["l", "o"], ["l", "o"]]), "twice"),
        (put("model", None), "no model"),
        (put("added_tokens", {}), None),
        (put("added_tokens", {"a": 1}), "not a list"),
    ],
)
def test_what_is_not_supported_or_corrupt_is_refused_by_name(
    tmp_path: Path, document: dict[str, Any], change: Change, message: str | None
) -> None:
    changed = copy.deepcopy(document)
    change(changed)
    if message is None:
        load(tmp_path, changed)
        return
    with pytest.raises(TokenizerError, match=message) as caught:
        load(tmp_path, changed)
    assert "\n" not in str(caught.value)
    assert "tokenizer.json" in str(caught.value)


def test_ignore_merges_against_the_order_of_ids_is_refused(tmp_path: Path, document: dict[str, Any]) -> None:
    changed = copy.deepcopy(document)
    changed["model"]["merges"].reverse()
    changed["model"]["ignore_merges"] = True
    with pytest.raises(TokenizerError, match="ignore_merges with merges in another order"):
        load(tmp_path, changed)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'{"model":1,"model":2}', b"1" * 5000],
)
def test_what_is_no_tokenizer_json_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer_json(path)
    assert "\n" not in str(caught.value)


def test_missing_file_and_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="No such file"):
        load_tokenizer_json(tmp_path / "absent.json")
    with pytest.raises(TokenizerError, match="Is a directory"):
        load_tokenizer_json(tmp_path)


def mutate(rng: random.Random, node: Any) -> Any:
    """`node` with one value somewhere inside it removed, repeated, or replaced by one of another kind."""
    if isinstance(node, (dict, list)) and node and rng.random() < 0.9:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        action = rng.random()
        if action < 0.15:
            del node[key]
        elif action < 0.25 and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        else:
            node[key] = mutate(rng, node[key])
        return node
    others = [None, True, False, 0, -1, 1 << 70, 1.5, float("nan"), "", "Ġ", "\ud800", "BPE", "Sequence", [], {}, [[]]]
    return rng.choice([*others, [None], {"type": "Sequence"}, {"type": []}])


def test_mutated_files_load_or_raise_tokenizer_error(tmp_path: Path, document: dict[str, Any], fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    path = tmp_path / "tokenizer.json"
    small = copy.deepcopy(document)
    refused = 0
    for i in range(700):
        changed: Any = copy.deepcopy(small)
        # The vocabulary is most of the file: aim at the rest in turn.
        part = rng.choice(["added_tokens", "pre_tokenizer", "decoder", "model", "all"])
        for _ in range(rng.randint(1, 3)):
            if part == "all" or not isinstance(changed, dict) or part not in changed:
                changed = mutate(rng, changed)
            else:
                changed[part] = mutate(rng, changed[part])
        data = json.dumps(changed).encode()
        if i % 4 == 0:
            damaged = bytearray(data)
            damaged[rng.randrange(len(data))] = rng.randrange(256)
            data = bytes(damaged[: rng.randrange(len(data))]) if i % 8 == 0 else bytes(damaged)
        path.write_bytes(data)
        try:
            load_tokenizer_json(path).encode("low 가")
        except TokenizerError as refusal:
            refused += 1
            message = str(refusal)
            assert "\n" not in message, repr(message)
    assert 100 < refused < 700


def test_a_pattern_without_a_form_in_the_format_is_refused_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = BpeTrainer(260).train_from_iterator(["a b"])
    monkeypatch.setattr(tokenizer, "pattern", r"\w+|\W", raising=False)
    with pytest.raises(TokenizerError, match=r"W' cannot be written"):
        save_tokenizer_json(tokenizer, tmp_path / "tokenizer.json")
    assert list(tmp_path.iterdir()) == []
