"""Hugging Face's `tokenizer.json` for BPE: written so that `tokenizers` gives equal ids, and read back.

The format has no written specification; its reader is the `tokenizers` library (huggingface.co/docs/tokenizers). Read
are byte-level files (GPT-2, Llama 3, Qwen, DeepSeek, …) and SentencePiece's (Llama 2, Gemma, …). What fastlm does not
do is refused by name, because ids would differ in silence. `encode` adds tokens around a text only when it is asked
to, and added tokens that the file calls special only when they are allowed.

Equal ids hold for every character that the regular-expression engine of `tokenizers` knows. It follows an older
Unicode: letters and digits added since, most of them rare Han characters, it takes for punctuation.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm._files import write_atomic
from fastlm.errors import TokenizerError
from fastlm.tokenizer.byte_level import to_chars
from fastlm.tokenizer.huggingface_reader import Reader, canonical_merges
from fastlm.tokenizer.huggingface_steps import pre_tokenizer_of, space_steps
from fastlm.tokenizer.sentencepiece import META, SentencePieceTokenizer

if TYPE_CHECKING:
    from fastlm.tokenizer.added_tokens import AddedToken
    from fastlm.tokenizer.tokenizer import Tokenizer

MAX_FILE_BYTES = 256 << 20  # the largest published file (262,144 tokens) has 33 MB

_BYTE_LEVEL_DECODER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def load_huggingface(path_or_id: str | Path, *, revision: str | None = None) -> Tokenizer:
    """A `tokenizer.json`, a directory that holds one, or the id of a model on the hub, such as "Qwen/Qwen3-0.6B".

    A path that exists counts as a path. For an id, huggingface_hub downloads the file or finds it in its cache.

    Raises:
        TokenizerError: there is no such file or model, or the file cannot be read as `load_tokenizer_json` says.
    """
    path = Path(path_or_id)
    if path.is_dir():
        return load_tokenizer_json(path / "tokenizer.json")
    is_id = isinstance(path_or_id, str) and path_or_id.count("/") == 1 and not path_or_id.startswith((".", "/", "~"))
    if path.exists() or not is_id or path.suffix == ".json":
        return load_tokenizer_json(path)
    files = [_from_hub(str(path_or_id), name, revision) for name in ("tokenizer.json", "tokenizer_config.json")]
    if files[0] is None:
        raise TokenizerError(f"{path_or_id}: this model has no tokenizer.json")
    return load_tokenizer_json(files[0])


def _from_hub(repository: str, name: str, revision: str | None) -> Path | None:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise TokenizerError(
            f"{repository}: no such path; to look for a model of that name, pip install huggingface_hub"
        ) from None
    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except Exception as error:
        # Offline, what is not in the cache is a LocalEntryNotFoundError, which says nothing about the hub.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise TokenizerError(
            f"{repository}: no such path, and the Hugging Face hub did not give its {name}: {reason}. Offline, pass "
            "the path of a tokenizer.json"
        ) from error


def load_tokenizer_json(path: str | Path) -> Tokenizer:
    """Reads a BPE `tokenizer.json`, and the tokenizer_config.json beside it when there is one.

    Raises:
        TokenizerError: the file is missing, corrupt, or asks for something that fastlm does not do (named).
    """
    path = Path(path)
    config_path = path.with_name("tokenizer_config.json")
    try:
        config = _parse(config_path) if path.name == "tokenizer.json" and config_path.is_file() else {}
        template_path = path.with_name("chat_template.jinja")  # where transformers has written it since 2025
        if path.name == "tokenizer.json" and template_path.is_file():
            config["chat_template"] = _read(template_path).decode("utf-8", "replace")
        return Reader(path, _parse(path), config).tokenizer()
    except RecursionError:
        raise TokenizerError(f"{path}: nested too deeply for a tokenizer.json") from None


def save_tokenizer_json(tokenizer: Tokenizer, path: str | Path) -> None:
    """Writes `path`, all or nothing. `tokenizers.Tokenizer.from_file` then gives equal ids.

    Merges of a vocabulary that came as ranks only (tiktoken) are recovered from the ranks. A token that merging never
    makes needs `ignore_merges`, which is set when there is one.

    Raises:
        TokenizerError: the pattern has no form in this format.
    """
    write_atomic(path, json.dumps(to_document(tokenizer), ensure_ascii=False, separators=(",", ":")))


def to_document(tokenizer: Tokenizer) -> dict[str, Any]:
    """What `save_tokenizer_json` writes, as JSON's objects.

    Raises:
        TokenizerError: the pattern has no form in this format.
    """
    settings = tokenizer.settings
    normalizers = [settings.normalizer.definition] if settings.normalizer else []
    if isinstance(tokenizer, SentencePieceTokenizer):
        steps = space_steps(tokenizer.spaces)
        model, pre_tokenizer, decoder = _sentencepiece_model(tokenizer), steps["pre_tokenizer"], steps["decoder"]
        if not any(token.normalized for token in tokenizer.added_tokens):
            normalizers += steps["normalizers"]
    else:
        model, pre_tokenizer = _byte_level_model(tokenizer), pre_tokenizer_of(tokenizer.pattern)
        decoder = _BYTE_LEVEL_DECODER
    if len(normalizers) > 1:
        normalizers = [{"type": "Sequence", "normalizers": normalizers}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token.id,
                "content": token.content,
                "single_word": token.single_word,
                "lstrip": token.lstrip,
                "rstrip": token.rstrip,
                "normalized": token.normalized,
                "special": token.special,
            }
            for token in sorted(_added_tokens(tokenizer), key=lambda token: token.id)
        ],
        "normalizer": normalizers[0] if normalizers else None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _template(tokenizer),
        "decoder": decoder,
        "model": model,
    }


def _byte_level_model(tokenizer: Tokenizer) -> dict[str, Any]:
    if tokenizer.merges is not None:
        merges, ignore_merges = tokenizer.merges, False
    else:
        by_rank = sorted(tokenizer.mergeable_ranks, key=tokenizer.mergeable_ranks.__getitem__)
        canonical = canonical_merges(by_rank)
        merges = list(canonical.values())
        ignore_merges = any(len(token) > 1 and token not in canonical for token in by_rank)
    vocab = {to_chars(token): i for token, i in tokenizer.mergeable_ranks.items()} | dict(
        tokenizer.settings.unreachable
    )
    model = _bpe(vocab | _added_ids(tokenizer), [[to_chars(left), to_chars(right)] for left, right in merges])
    return model | {"ignore_merges": ignore_merges}


def _sentencepiece_model(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    merges = tokenizer.piece_merges
    pairs = tokenizer.reachable_merges() if merges is None else merges
    model = _bpe({**tokenizer.pieces, **_added_ids(tokenizer)}, [list(pair) for pair in pairs])
    return model | {"unk_token": tokenizer.unknown, "fuse_unk": tokenizer.fuse_unknown, "byte_fallback": True}


def _added_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """In the vocabulary too, since `tokenizers` gives other added tokens ids of its own."""
    return {token.content: token.id for token in _added_tokens(tokenizer)}


def _added_tokens(tokenizer: Tokenizer) -> list[AddedToken]:
    """Those with spaces (Gemma's as GGUF) as the pieces that they are, found once spaces have become "▁"."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return list(tokenizer.added_tokens)
    written = []
    for token in tokenizer.added_tokens:
        piece = token.content.replace(" ", META)
        if piece != token.content and tokenizer.pieces.get(piece) == token.id:
            if tokenizer.spaces.prefix != "never":
                raise TokenizerError(f"the added token {token.content!r:.60} cannot be written beside a space in front")
            token = replace(token, content=piece, normalized=True)
        written.append(token)
    return written


def _bpe(vocab: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
        "merges": merges,
    }


def _template(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The post-processor that adds the tokens around a text."""
    prefix, suffix = tokenizer.settings.prefix_ids, tokenizer.settings.suffix_ids
    if not prefix and not suffix:
        return None
    name_of = {token.id: token.content for token in tokenizer.added_tokens}
    if lacking := [i for i in (*prefix, *suffix) if i not in name_of]:
        raise TokenizerError(f"id {lacking[0]}, which is put around texts, is no added token; tokenizer.json needs one")

    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        def tokens(ids: tuple[int, ...]) -> list[dict[str, Any]]:
            return [{"SpecialToken": {"id": name_of[i], "type_id": type_id}} for i in ids]

        return [*tokens(prefix), {"Sequence": {"id": sequence, "type_id": type_id}}, *tokens(suffix)]

    specials = {name_of[i]: {"id": name_of[i], "ids": [i], "tokens": [name_of[i]]} for i in (*prefix, *suffix)}
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": specials,
    }


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise TokenizerError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, so no tokenizer.json")
        return path.read_bytes()
    except TokenizerError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise TokenizerError(f"{path}: {reason}; give the path of a tokenizer.json") from None


def _parse(path: Path) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            raise TokenizerError(f"{path}: {max(counts, key=counts.__getitem__)!r:.60} is there twice")
        return result

    data = _read(path)
    try:
        document = json.loads(data.decode(), object_pairs_hook=without_duplicates)
    except TokenizerError:
        raise
    except ValueError as error:
        raise TokenizerError(f"{path}: no valid JSON, perhaps cut short: {error}") from None
    if not isinstance(document, dict):
        raise TokenizerError(f"{path}: a JSON {type(document).__name__}, where a tokenizer.json has an object")
    return document
