"""How a `tokenizer.json` splits text and treats spaces, read into patterns and `SpaceRules`, and written back.

Its pre-tokenizer and decoder are sequences of small steps; what is read here is every sequence that the published
byte-level and SentencePiece vocabularies use. Any other step is refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import regex

from fastlm.errors import TokenizerError
from fastlm.tokenizer.normalizers import Normalizer
from fastlm.tokenizer.patterns import PUNCTUATION, SEQUENCES, name_of_pattern
from fastlm.tokenizer.patterns import REGEXES as PUBLISHED_REGEXES
from fastlm.tokenizer.portable_regex import to_regex
from fastlm.tokenizer.sentencepiece import META, SpaceRules

if TYPE_CHECKING:
    from fastlm.tokenizer.added_tokens import AddedToken

# How the patterns are written in files. tiktoken's cl100k goes without possessive repeats, since Oniguruma, the engine
# of `tokenizers`, reads {1,3}+ as one or more times {1,3}, and with \z, since its $ ends a line.
REGEXES = {name: PUBLISHED_REGEXES[name] for name in ("o200k", "llama3", "qwen2")} | {
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s+\z|\s*[\r\n]|\s+(?!\S)|\s"
    ),
}
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PUBLISHED = {regex: PUBLISHED_REGEXES[name] for name, regex in REGEXES.items()} | {_GPT2: PUBLISHED_REGEXES["gpt2"]}

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_TO_META = {"type": "Replace", "pattern": {"String": " "}, "content": META}
_FROM_META = {"type": "Replace", "pattern": {"String": META}, "content": " "}


def pattern_of(value: Any) -> str | tuple[str, ...]:
    """The pattern of a byte-level pre-tokenizer.

    Raises:
        TokenizerError: names the step that is not supported.
    """
    steps = value.get("pretokenizers") if type_of(value) == "Sequence" else [value]
    if not isinstance(steps, list) or not steps or not all(isinstance(step, dict) for step in steps):
        _refuse(f"pre_tokenizer {type_of(value)}")
    *splits, byte_level = steps
    found = [_regex_of_step(step) for step in splits]
    if type_of(byte_level) != "ByteLevel":
        kind = type_of(byte_level)
        _refuse(f"pre_tokenizer {kind}" if len(steps) == 1 else "a pre_tokenizer without ByteLevel at its end")
    if byte_level.get("add_prefix_space", True) is not False:
        _refuse("ByteLevel with add_prefix_space")
    use_regex = byte_level.get("use_regex", True)
    if not isinstance(use_regex, bool):
        _refuse(f"ByteLevel with use_regex {use_regex!r:.40}")
    if use_regex:
        found.append(PUBLISHED_REGEXES["gpt2"])
    return name_of_pattern(found or [r"[\s\S]+"])


def _regex_of_step(step: dict[str, Any]) -> str:
    kind = type_of(step)
    if kind == "Digits":
        return r"\p{N}" if step.get("individual_digits", False) is True else r"\p{N}+"
    behavior = step.get("behavior", "Isolated")
    if kind == "Punctuation" and behavior in ("Isolated", "Contiguous"):
        return PUNCTUATION if behavior == "Isolated" else PUNCTUATION + "+"
    if kind != "Split":
        _refuse(f"pre_tokenizer {kind}" + (f" with behavior {behavior!r:.40}" if kind == "Punctuation" else ""))
    pattern = step.get("pattern")
    way, text = next(iter(pattern.items())) if isinstance(pattern, dict) and len(pattern) == 1 else (None, None)
    if way not in ("Regex", "String") or not isinstance(text, str) or not text:
        _refuse(f"Split with the pattern {pattern!r:.60}")
    expression = regex.escape(text, special_only=True) if way == "String" else _PUBLISHED.get(text) or to_regex(text)
    # Every character belongs to some match of these patterns, so what is removed is what lies between: nothing.
    if behavior == "Removed" and step.get("invert") is True and expression in _PUBLISHED.values():
        return expression
    if step.get("invert", False) is not False:
        _refuse("Split with invert")
    if behavior != "Isolated":
        _refuse(f"Split with behavior {behavior!r:.40}")
    return expression


def pre_tokenizer_of(pattern: str | tuple[str, ...]) -> dict[str, Any]:
    """The byte-level pre-tokenizer that splits by `pattern`.

    Raises:
        TokenizerError: a regular expression that `tokenizers` would read differently.
    """
    if pattern == "gpt2":
        return _BYTE_LEVEL
    if isinstance(pattern, str):
        expressions = [REGEXES[pattern]] if pattern in REGEXES else list(SEQUENCES.get(pattern, (pattern,)))
    else:
        expressions = list(pattern)
    steps = []
    for expression in expressions:
        if expression == PUBLISHED_REGEXES["gpt2"]:
            expression = _GPT2
        elif expression not in REGEXES.values():
            theirs = expression.replace(r"(?=\n|\Z)", "$")
            try:
                is_portable = to_regex(theirs) == expression
            except TokenizerError:
                is_portable = False
            if not is_portable:
                raise TokenizerError(
                    f"the pattern {expression!r:.60} cannot be written to tokenizer.json, whose engine reads it "
                    f"differently; it has {', '.join(['gpt2', *REGEXES, *SEQUENCES])}"
                )
            expression = theirs
        steps.append({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False})
    return {"type": "Sequence", "pretokenizers": [*steps, _BYTE_LEVEL | {"use_regex": False}]}


def spaces_of(document: dict[str, Any], added_tokens: list[AddedToken]) -> tuple[SpaceRules, Normalizer | None] | None:
    """What a SentencePiece file does with spaces, and the normalizer before that; None when it writes no "▁".

    Raises:
        TokenizerError: names the step that is not supported.
    """
    normalizer: Any = document.get("normalizer")
    steps = normalizer.get("normalizers") if type_of(normalizer) == "Sequence" else [normalizer]
    steps = [step for step in steps if step is not None] if isinstance(steps, list) else []
    replaces = bool(steps) and steps[-1] == _TO_META
    before: Any = document.get("pre_tokenizer")
    if not replaces and type_of(before) != "Metaspace":
        return None
    rules = SpaceRules(strip=_strips(document.get("decoder")))
    prepends = replaces and len(steps) > 1 and steps[-2] == {"type": "Prepend", "prepend": META}
    if type_of(before) == "Metaspace":
        if replaces:
            _refuse("Metaspace with a normalizer that replaces spaces")
        rules = _metaspace(before, rules)
    elif before is not None and not _splits_at_space(before):
        _refuse(f"pre_tokenizer {type_of(before)} of a SentencePiece model")
    if any(token.normalized for token in added_tokens):  # found in the text after all of it
        return rules, None if normalizer is None else Normalizer(normalizer)
    if replaces:
        steps = steps[: -2 if prepends else -1]
    if prepends:
        rules = SpaceRules(prefix="always", strip=rules.strip)
    return rules, Normalizer({"type": "Sequence", "normalizers": steps}) if steps else None


def _metaspace(step: dict[str, Any], rules: SpaceRules) -> SpaceRules:
    scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    split = step.get("split", True)
    if step.get("replacement") != META or scheme not in ("never", "first", "always") or not isinstance(split, bool):
        _refuse(f"pre_tokenizer {step!r:.60}")
    return SpaceRules(prefix=scheme, unless_space=True, split=split, strip=rules.strip)


def _splits_at_space(step: Any) -> bool:
    """Gemma 3 splits at spaces, of which none is left by then."""
    return isinstance(step, dict) and step.get("type") == "Split" and step.get("pattern") == {"String": " "}


def _strips(decoder: Any) -> bool:
    """Whether decoding takes a space off the front."""
    steps = decoder.get("decoders") if type_of(decoder) == "Sequence" else None
    plain = [_FROM_META, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if steps == plain:
        return False
    if isinstance(steps, list) and steps == [*plain, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
        return True
    return _refuse(f"decoder {type_of(decoder)} of a SentencePiece model")


def space_steps(rules: SpaceRules) -> dict[str, Any]:
    """The normalizer steps, pre-tokenizer and decoder that do with spaces what `rules` say."""
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if rules.strip else []
    decoders = [_FROM_META, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    found: dict[str, Any] = {"normalizers": [], "pre_tokenizer": None}
    found["decoder"] = {"type": "Sequence", "decoders": decoders}
    if rules.unless_space or rules.prefix == "first" or rules.split:
        if not rules.unless_space and rules.prefix != "never":
            raise TokenizerError("a space in front of a text that begins with one cannot be written to tokenizer.json")
        scheme = {"type": "Metaspace", "replacement": META, "prepend_scheme": rules.prefix, "split": rules.split}
        return found | {"pre_tokenizer": scheme}
    prepend = [{"type": "Prepend", "prepend": META}] if rules.prefix == "always" else []
    return found | {"normalizers": [*prepend, _TO_META]}


def type_of(value: Any) -> str:
    """The type that a part of the file names; for what names none, how it looks."""
    kind = value.get("type") if isinstance(value, dict) else None
    return kind if isinstance(kind, str) else f"{value!r:.40}"


def _refuse(what: str) -> NoReturn:
    raise TokenizerError(f"{what} is not supported; fastlm reads byte-level and SentencePiece BPE")
