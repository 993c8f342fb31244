from __future__ import annotations

import gzip
import importlib.util
import json
import random
import signal
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import regex
import zstandard

from fastlm._core import native
from fastlm.errors import ConfigError, DataError
from fastlm.tokenizer import text_reader
from fastlm.tokenizer.byte_level import to_chars
from fastlm.tokenizer.trainer import BpeTrainer, TrainingProgress
from tests.tokenizer import hugging_face as hf

KOREAN = "나는 학교에 갔다. 너도 학교에 갔니? 우리는 학교에서 공부하고 학교에서 논다.\n"


def real_text(shared_data: Path | None) -> str:
    text = "".join(topics.values())[:300_000] + KOREAN * 50
    if shared_data is not None:
        text += (shared_data / "nsmc" / "valid.tsv").read_text("utf-8")
    return text


def assert_equals_hugging_face(
    texts: list[str], pattern: str, vocab_size: int, special: list[str], min_frequency: int = 0
) -> None:
    expected = hf.train(texts, pattern, vocab_size, special, min_frequency)
    trainer = BpeTrainer(vocab_size, pattern=pattern, special_tokens=special, min_frequency=min_frequency)
    ours = trainer.train_from_iterator(texts)
    assert ours.merges is not None
    assert [(to_chars(a), to_chars(b)) for a, b in ours.merges] == hf.merges_of(expected)
    vocab = {to_chars(token): i for token, i in ours.mergeable_ranks.items()} | ours.special_tokens
    assert vocab == expected.get_vocab()


@pytest.mark.parametrize("pattern", hf.PATTERNS)
def test_merges_and_ids_equal_hugging_face_on_random_unicode(pattern: str, fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    for _ in range(25):
        texts = [hf.random_text(rng, rng.randrange(300)) for _ in range(rng.randint(1, 20))]
        if not any(texts):
            continue
        special = rng.choice([[], ["<|endoftext|>"], ["<pad>", "<|끝|>", "<|b|>"]])
        vocab_size = 256 + len(special) + rng.choice([0, 1, 7, 100, 1500])
        assert_equals_hugging_face(texts, pattern, vocab_size, special, rng.choice([0, 1, 2, 5]))


@pytest.mark.parametrize("alphabet", ["a", "ab", "abc", "a ", "ab가"])
def test_ties_and_overlapping_pairs_equal_hugging_face(alphabet: str, fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    for _ in range(40):
        texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 80))) for _ in range(rng.randint(1, 12))]
        assert_equals_hugging_face(texts, "gpt2", 256 + rng.choice([1, 3, 20, 400]), [], rng.choice([0, 2]))


@pytest.mark.parametrize("text", ["aaa", "aaaa", "aaaaa", "abababab", "aabaabaab", "abcabcabc", "a" * 1000])
def test_repetitive_words_equal_hugging_face(text: str) -> None:
    assert_equals_hugging_face([text], "cl100k", 300, ["<|endoftext|>"])


@pytest.mark.parametrize("pattern", hf.PATTERNS)
def test_files_read_by_line_equal_hugging_faces_reading(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_seed: int
) -> None:
    rng = random.Random(fresh_seed)
    path = tmp_path / "text.txt"
    for ending in ("\n", "\r\n", "\n\n\n", "\n    "):
        lines = [hf.random_text(rng, rng.randrange(40)) for _ in range(60)]
        path.write_text(ending.join(["class A:", *lines, "    def f(self):", ""]), "utf-8", newline="")
        expected = hf.merges_of(hf.train(path, pattern, 600))
        for chunk_bytes in (1, 300, 1 << 20):
            monkeypatch.setattr(text_reader, "CHUNK_BYTES", chunk_bytes)
            ours = BpeTrainer(600, pattern=pattern, special_tokens=()).train(path, by_line=True)
            assert [(to_chars(a), to_chars(b)) for a, b in ours.merges or []] == expected, (ending, chunk_bytes)


def test_real_text_equals_hugging_face(shared_data: Path | None) -> None:
    assert_equals_hugging_face([real_text(shared_data)], "cl100k", 4000, ["<|endoftext|>"])


def test_vocabulary_beyond_16_bit_ids_equals_hugging_face(fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    texts = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=400)) for _ in range(100)]
    assert_equals_hugging_face(texts, "gpt2", 70_000, [], 0)


@pytest.mark.parametrize("pattern", hf.PATTERNS)
def test_a_safe_cut_never_changes_how_text_is_split(pattern: str, fresh_seed: int) -> None:
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    split = regex.compile(hf.REGEXES.get(pattern, gpt2).replace(r"\z", r"\Z")).findall
    rng = random.Random(fresh_seed)
    cuts = 0
    for _ in range(600):
        text = "".join(
            rng.choices(["a", "가", "'s", " ", "\n", "\r", "/", ".", "1", "\u3000", "\u00a0", "́", "日"], k=12)
        )
        data = text.encode()
        cut = native().last_safe_cut(data)
        if cut:
            cuts += 1
            left, right = data[:cut].decode(), data[cut:].decode()
            assert split(left) + split(right) == split(text)
    assert cuts > 100


def test_files_give_the_same_result_in_any_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_seed: int
) -> None:
    rng = random.Random(fresh_seed)
    text = "\n".join(hf.random_text(rng, 60) + " the cat\nsat on the mat" for _ in range(300)).replace("\r", "")
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    whole = BpeTrainer(600).train_from_iterator([text])
    for chunk_bytes in (17, 1009, 1 << 20):
        monkeypatch.setattr(text_reader, "CHUNK_BYTES", chunk_bytes)
        assert BpeTrainer(600).train(path).merges == whole.merges


def test_the_number_of_threads_does_not_matter() -> None:
    text = ("".join(topics.values()) + KOREAN * 2000).encode()
    results = []
    for threads in (1, 2, 5):
        counter = native().WordCounter("cl100k", threads)
        assert counter.add([text]) is None
        assert counter.add([text[:1000]]) is None
        figures = (counter.total_words, counter.distinct_words)
        results.append((figures, counter.train(1000, 0, list(range(256)), 256, {}, None)))
    assert results[0] == results[1] == results[2]


def test_several_files_are_separate_texts(tmp_path: Path) -> None:
    for name, text in (("a.txt", "low low lower"), ("b.txt", "newest newest widest")):
        (tmp_path / name).write_text(text)
    ours = BpeTrainer(280).train([tmp_path / "a.txt", str(tmp_path / "b.txt")])
    assert ours.merges == BpeTrainer(280).train_from_iterator(["low low lower", "newest newest widest"]).merges


def test_trained_tokenizer_encodes_as_hugging_face_does(fresh_seed: int) -> None:
    texts = [*list(topics.values())[:20], KOREAN * 20]
    theirs = hf.train(texts, "cl100k", 1000, ["<|endoftext|>"])
    ours = BpeTrainer(1000).train_from_iterator(texts)
    rng = random.Random(fresh_seed)
    for text in [KOREAN, *texts[:3], *(hf.random_text(rng, 200) for _ in range(50))]:
        assert list(ours.encode(text)) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text


def test_too_little_text_stops_early_and_says_so() -> None:
    trainer = BpeTrainer(1000)
    assert trainer.report is None
    trainer.train_from_iterator(["abc"])
    assert trainer.report is not None
    assert trainer.report.stopped_early
    assert (trainer.report.vocab_size, trainer.report.merges, trainer.report.words) == (259, 2, 1)
    trainer = BpeTrainer(258)
    trainer.train_from_iterator(["abc"])
    assert trainer.report is not None
    assert not trainer.report.stopped_early


def test_progress_grows_and_ends_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_reader, "CHUNK_BYTES", 10_000)
    path = tmp_path / "text.txt"
    path.write_text("".join(topics.values())[:100_000])
    seen: list[TrainingProgress] = []
    BpeTrainer(500).train(path, progress=seen.append)
    reading = [p.done for p in seen if p.stage == "reading"]
    merging = [p.done for p in seen if p.stage == "merging"]
    assert len(reading) > 5
    assert reading == sorted(reading)
    assert reading[-1] == path.stat().st_size == seen[0].total
    assert merging == sorted(merging)
    assert seen[-1] == TrainingProgress("merging", 500, 500)


@pytest.mark.parametrize("stage", ["reading", "merging"])
def test_what_progress_raises_ends_training(stage: str) -> None:
    def stop(now: TrainingProgress) -> None:
        if now.stage == stage:
            raise KeyboardInterrupt

    trainer = BpeTrainer(2000)
    with pytest.raises(KeyboardInterrupt):
        trainer.train_from_iterator(["".join(topics.values())], progress=stop)
    assert trainer.report is None


def test_ctrl_c_ends_merging() -> None:
    """Without a progress callback too: the native loop looks for signals on its own."""

    def stop(signal_number: int, frame: object) -> None:
        raise KeyboardInterrupt

    rng = random.Random(0)
    text = " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=12)) for _ in range(150_000))
    trainer = BpeTrainer(1_000_000, pattern="gpt2")  # several seconds
    previous = signal.signal(signal.SIGALRM, stop)
    started = time.perf_counter()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            trainer.train_from_iterator([text])
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert time.perf_counter() - started < 2.5
    assert trainer.report is None


@pytest.mark.parametrize("offset", [0, 7, 5000, 9998])
def test_invalid_utf8_is_refused_with_its_byte_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    monkeypatch.setattr(text_reader, "CHUNK_BYTES", 600)
    data = bytearray(b"word and\n" * 1111)
    data[offset : offset + 1] = b"\xff"
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"text\.txt: not UTF-8: byte 0xff at offset {offset};"):
        BpeTrainer(300).train(path)


def python_says(data: bytes) -> tuple[int, int] | None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return 0, error.start
    return None


def test_utf8_validity_is_pythons(fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    for _ in range(3000):
        data = rng.choice(["가a", "é", "\U0001f600", "abcdefghij"]).encode() * 3
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] = rng.choice([0x80, 0xC0, 0xE0, 0xED, 0xF4, 0xF5, 0xA0, 0x41])
        counter = native().WordCounter("gpt2", 1)
        assert counter.add([bytes(damaged)]) == python_says(bytes(damaged))


def test_bad_files_are_refused_in_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    for path, message in (
        (empty, "empty.txt: the file is empty"),
        (tmp_path, "is a directory; give its text files"),
        (tmp_path / "absent.txt", "absent.txt: No such file or directory"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            BpeTrainer().train(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no file"):
        BpeTrainer().train([])


def test_text_that_cannot_be_cut_is_read_whole_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_reader, "CHUNK_BYTES", 100)
    path = tmp_path / "long.txt"
    path.write_text("漢字" * 2000)
    whole = BpeTrainer(300).train_from_iterator(["漢字" * 2000])
    assert BpeTrainer(300).train(path).merges == whole.merges
    monkeypatch.setattr(text_reader, "MAX_TEXT_BYTES", 5000)
    with pytest.raises(DataError, match=r"long.txt: no line end .* from offset 0; put line ends"):
        BpeTrainer(300).train(path)
    with pytest.raises(DataError, match="text 1 has more than 5,000 bytes"):
        BpeTrainer(300).train_from_iterator(["a", "b" * 5001])


def compress(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data[:1000]) + gzip.compress(data[1000:]))  # two members, as `cat` makes
    else:
        compressor = zstandard.ZstdCompressor()
        path.write_bytes(compressor.compress(data[:1000]) + compressor.compress(data[1000:]))
    return path


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_give_what_plain_ones_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(text_reader, "CHUNK_BYTES", 1000)
    text = "".join(topics.values())[:50_000] + KOREAN * 50
    plain = tmp_path / "text.txt"
    plain.write_bytes(text.encode())
    path = compress(tmp_path / f"text.txt{suffix}", text.encode())
    assert BpeTrainer(600).train([path]).merges == BpeTrainer(600).train(plain).merges
    both = BpeTrainer(600)
    both.train([path, plain])
    assert both.report is not None
    assert both.report.bytes_read == 2 * len(text.encode())

    for damaged in (path.read_bytes()[:-9], path.read_bytes()[:50] + b"\xff" * 20 + path.read_bytes()[70:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"text\.txt\{suffix}: damaged or cut off"):
            BpeTrainer(600).train(path)


def test_a_missing_zstandard_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "text.zst"
    path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"needs the zstandard package: pip install fastlm\[zstd\]"):
        BpeTrainer().train(path)


def test_json_lines_are_texts_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_reader, "CHUNK_BYTES", 200)
    texts = [*(KOREAN * n for n in range(1, 8)), 'line\nend \u2028 \\ "quoted"', "", *list(topics.values())[:5]]
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"id": i, "body": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n\n", "utf-8")
    expected = BpeTrainer(500).train_from_iterator(texts)
    assert BpeTrainer(500).train(path, field="body").merges == expected.merges
    compressed = compress(tmp_path / "texts.jsonl.gz", path.read_bytes())
    assert BpeTrainer(500).train(compressed, field="body").merges == expected.merges


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"bad\.jsonl, line 2: not JSON"),
        ("[1]", "line 2: not a JSON object but a list"),
        ('{"title": "x", "n": 1}', "line 2: no field 'text', but 'title', 'n'; choose another with --field"),
        ('{"text": 3}', "line 2: field 'text' is a int, not a string"),
        ('{"text": "\\ud800"}', "line 2: lone surrogate at character 0"),
        ("[" * 100_000, "line 2: not JSON"),
    ],
)
def test_bad_json_lines_are_refused_with_their_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n' + line)
    with pytest.raises(DataError, match=message):
        BpeTrainer().train(path, field="text")


def test_json_lines_without_a_field_are_not_taken_for_text(tmp_path: Path) -> None:
    for name in ("texts.jsonl", "texts.ndjson.gz"):
        (tmp_path / name).write_text('{"text": "x"}')
        with pytest.raises(DataError, match="say which field holds the text: --field text"):
            BpeTrainer().train(tmp_path / name)


def test_enough_memory_changes_nothing_and_too_little_forgets_the_rarest(fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    common = ["the", "and", "학교에서", "low", "newest"]
    rare = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=20)) for _ in range(40_000)]
    text = " ".join(word for each in rare for word in (each, *common))
    exact = BpeTrainer(400)
    expected = exact.train_from_iterator([text] * 3)
    roomy = BpeTrainer(400, memory=4 << 30)
    assert roomy.train_from_iterator([text] * 3).merges == expected.merges
    assert roomy.report is not None
    assert roomy.report.forgotten_words == 0

    counter = native().WordCounter("gpt2", 2, 400_000)
    for start in range(0, len(rare), 1000):
        words = [word for each in rare[start : start + 1000] for word in (each, *common)]
        assert counter.add(["".join(f" {word}" for word in words).encode()]) is None
    assert counter.total_words == 40_000 * 6
    assert counter.distinct_words < 10_000
    assert counter.forgotten_words == 40_005 - counter.distinct_words
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right, _ in counter.train(256 + 40, 0, list(range(256)), 256, {}, None):
        tokens.append(tokens[left] + tokens[right])
    assert {f" {word}".encode() for word in common} < set(tokens)
    with pytest.raises(ConfigError, match="memory is 1,000 bytes; training takes at least"):
        BpeTrainer(memory=1000)


def test_bad_texts_are_refused() -> None:
    for texts, message in (
        (["a", "b\ud800"], "text 1: lone surrogate at character 1"),
        ([], "no text"),
        ([""], "no text"),
    ):
        with pytest.raises(DataError, match=message):
            BpeTrainer().train_from_iterator(texts)
    with pytest.raises(DataError, match="iterable of texts"):
        BpeTrainer().train_from_iterator("one text")
    with pytest.raises(DataError, match="text 0 is a bytes"):
        BpeTrainer().train_from_iterator([b"bytes"])  # type: ignore[list-item]


def test_senseless_options_are_refused() -> None:
    for options, message in (
        ({"vocab_size": 256}, "256 bytes and 1 special tokens need 257"),
        ({"vocab_size": 1 << 40}, "above the limit"),
        ({"pattern": "gpt5"}, "gpt5"),
        ({"min_frequency": -1}, "min_frequency"),
        ({"special_tokens": ["<a>", "<a>"]}, "given twice"),
        ({"special_tokens": [""]}, "non-empty"),
        ({"special_tokens": ["a"]}, "single byte"),
        ({"special_tokens": "<|endoftext|>"}, "list of strings"),
    ):
        with pytest.raises(ConfigError, match=message):
            BpeTrainer(**options)  # type: ignore[arg-type]


def test_a_special_token_that_the_text_spells_is_refused() -> None:
    with pytest.raises(ConfigError, match="'the' is also an ordinary word"):
        BpeTrainer(300, special_tokens=["the"]).train_from_iterator(["the the the"])


def test_recovered_merges_are_the_trained_ones() -> None:
    ours = BpeTrainer(1500, special_tokens=[]).train_from_iterator(list(topics.values()))
    tokens = sorted(ours.mergeable_ranks, key=ours.mergeable_ranks.__getitem__)
    recovered = [(tokens[pair[0]], tokens[pair[1]]) for pair in native().recover_merges(tokens) if pair]
    assert recovered == ours.merges
