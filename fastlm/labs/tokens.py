"""Tokens: a model reads numbers, so text is cut into pieces first. Where it is cut decides what a text costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise

from fastlm.data.stand_in import stand_in_tokenizer
from fastlm.errors import TokenizerError
from fastlm.labs.data_tokens import SENTENCE, TEXT
from fastlm.labs.pictures import drawable
from fastlm.labs.statistics import Interval
from fastlm.labs.token_measures import Cost, Loss, Pairs, loss_of_cutting
from fastlm.labs.workbench import MissingError, Workbench
from fastlm.tokenizer import BpeTrainer, Tokenizer, split

PUBLISHED = {"GPT-2": "gpt2", "GPT-4 (cl100k)": "cl100k_base", "GPT-4o (o200k)": "o200k_base"}
SIZES, OWN_SIZE = (512, 1024, 2048, 4096, 8192, 16384, 32768), 16384
LEVELS = {
    "character": ("글자", "character"),
    "subword": ("토큰", "subword"),
    "morpheme": ("형태소", "morpheme"),
    "word": ("낱말", "word"),
    "sentence": ("문장", "sentence"),
    "paragraph": ("문단", "paragraph"),
}


def run(lab: Workbench) -> None:
    with lab.part("한 글을 여러 크기로 자르기", "one text, cut at every size"):
        _one_text(lab)
    with lab.part("한국어의 값", "the price of Korean"):
        _price(lab)
    with lab.part("어휘의 크기", "the size of the vocabulary"):
        _vocabulary_sizes(lab)
    with lab.part("크기마다 잃는 것", "what each size loses"):
        _losses(lab)


def _pairs(lab: Workbench, part: str) -> Pairs:
    return [(row["ko"], row["en"]) for row in lab.rows(f"ko-en/{part}.tsv")]


def _own(lab: Workbench, size: int, languages: Sequence[int] = (0, 1)) -> Tokenizer:
    """Trained on the Korean (0) and English (1) sides of the training pairs."""
    texts = [pair[i] for i in languages for pair in _pairs(lab, "train")]
    return lab.once(f"tokenizer {size} {languages}", lambda: BpeTrainer(size).train_from_iterator(texts))


def _published(lab: Workbench, name: str) -> Tokenizer:
    try:
        return Tokenizer.from_tiktoken(name)
    except TokenizerError:
        command = f"from fastlm.tokenizer import Tokenizer; Tokenizer.from_tiktoken('{name}', download=True)"
        command = f'pip install tiktoken && python -c "{command}"'
        raise MissingError(lab.say(f"어휘 파일이 없습니다: {command}", f"its file is not here: {command}")) from None


def _levels(lab: Workbench) -> list[str]:
    """Only Korean is cut into morphemes here."""
    return [level for level in LEVELS if level != "morpheme" or lab.lang == "ko"]


def _cut(lab: Workbench, level: str, tokenizer: Tokenizer, text: str) -> list[str]:
    if lab.lang == "ko" and level in ("morpheme", "sentence"):
        lab.package("kiwipiepy", "'fastlm[korean]'")
    return [unit.text for unit in split(text, level, tokenizer)]


def _one_text(lab: Workbench) -> None:
    text = TEXT[lab.lang]
    tokenizer = stand_in_tokenizer()
    rows: list[list[str | int | float]] = []
    for level in _levels(lab):
        with lab.part(*LEVELS[level]):
            pieces = _cut(lab, level, tokenizer, text)
            average = len(text.encode()) / len(pieces)
            rows.append([lab.say(*LEVELS[level]), len(pieces), len(set(pieces)), average, " | ".join(pieces)[:60]])
    columns = "크기/조각/서로 다른 조각/조각당 바이트/처음 몇 조각", "size/pieces/different/bytes a piece/the first"
    lab.table(lab.say("두 문단짜리 글을 자르면", "A text of two paragraphs, cut"), lab.say(*columns).split("/"), rows)


def _price(lab: Workbench) -> None:
    pairs = _pairs(lab, "valid")
    found: dict[str, Tokenizer] = {}
    for name, encoding in PUBLISHED.items():
        with lab.part(name, name):
            found[name] = _published(lab, encoding)
    with lab.part("Gemma", "Gemma"):
        found["Gemma 3"] = lab.llm().tokenizer
    found[both := lab.say("우리 것(반반)", "ours (half each)")] = _own(lab, OWN_SIZE)
    found[only := lab.say("우리 것(한국어)", "ours (Korean)")] = _own(lab, OWN_SIZE, (0,))
    costs = {name: Cost(tokenizer, pairs, lab.seed) for name, tokenizer in found.items()}
    columns = (
        "어휘/크기/한국어 토큰/영어 토큰/한국어 값(배)",
        "vocabulary/size/Korean tokens/English tokens/price of Korean",
    )
    lab.table(
        lab.say("뜻이 같은 문장 한 쌍에 드는 토큰", "Tokens of a pair of sentences of one meaning"),
        lab.say(*columns).split("/"),
        [[name, c.vocab_size, c.korean.mean(), c.english.mean(), str(c.price)] for name, c in costs.items()],
    )
    sentence = SENTENCE[lab.lang]
    cuts = {name: [unit.text for unit in split(sentence, "subword", t)] for name, t in found.items()}
    lab.table(
        lab.say(f"“{sentence}” 자르기", f"“{sentence}” cut"),
        lab.say("어휘/토큰/조각", "vocabulary/tokens/pieces").split("/"),
        [[name, len(pieces), " | ".join(pieces)] for name, pieces in cuts.items()],
    )
    in_bytes = sum(len(k.encode()) for k, _ in pairs) / sum(len(e.encode()) for _, e in pairs)
    lab.number("price", {name: asdict(c.price) for name, c in costs.items()} | {"bytes": in_bytes})
    with lab.picture(
        "price", lab.say("어휘마다 한국어의 값", "The price of Korean in each vocabulary"), height=2.8
    ) as axes:
        prices = [c.price for c in costs.values()]
        errors = [[p.value - p.low for p in prices], [p.high - p.value for p in prices]]
        axes[0, 0].barh([drawable(name) for name in costs], [p.value for p in prices], xerr=errors, capsize=2)
        axes[0, 0].axvline(1, color="gray", linestyle="--")
        axes[0, 0].invert_yaxis()
        axes[0, 0].set_xlabel(lab.label("한국어 토큰 ÷ 영어 토큰", "Korean tokens / English tokens"))
    if all(name in costs for name in PUBLISHED):
        _judge_published(lab, [costs[name].price for name in PUBLISHED], in_bytes)
    half, korean = costs[both].price, costs[only].price
    lab.finding(
        lab.say(
            "한국어와 영어를 반반 보고 만든 어휘에서는 두 말의 값이 같고, 한국어만 보고 만들면 뒤집힌다",
            "A vocabulary made from both alike prices both alike, and one made from Korean alone turns the price round",
        ),
        0.9 < half.value < 1.1 and korean.high < 1,
        lab.say(
            f"반반인 어휘에서 한국어는 영어의 {half}배, 한국어만 본 어휘에서는 {korean}배입니다. 값은 문자가 아니라 "
            "어휘를 만든 글이 정합니다.",
            f"Korean costs {half} times English where both were seen alike, and {korean} times where only Korean "
            "was. The price comes from what a vocabulary was made of, not from the script.",
        ),
    )


def _judge_published(lab: Workbench, prices: list[Interval], in_bytes: float) -> None:
    first, middle, last = prices
    lab.finding(
        lab.say(
            "GPT-2에서 한국어는 같은 뜻의 영어보다 두 배 넘게 들고, 새 어휘일수록 싸져 o200k에서는 두 배가 안 된다",
            "In GPT-2 Korean costs over twice as much as English of the same meaning; each newer vocabulary makes "
            "it cheaper, and in o200k it costs less than twice as much",
        ),
        first.low > 2 > last.high and first.low > middle.high and middle.low > last.high,
        lab.say(
            f"GPT-2에서 {first}배, cl100k에서 {middle}배, o200k에서 {last}배입니다. 바이트 수로는 {in_bytes:.2f}배일 "
            "뿐입니다.",
            f"It costs {first} times as much in GPT-2, {middle} times in cl100k and {last} times in o200k, though it "
            f"has only {in_bytes:.2f} times as many bytes.",
        ),
    )


def _vocabulary_sizes(lab: Workbench) -> None:
    pairs = _pairs(lab, "valid")
    costs = [Cost(_own(lab, size), pairs, lab.seed) for size in SIZES]
    korean, english = [c.korean.mean() for c in costs], [c.english.mean() for c in costs]
    saved = [
        (k + e - later_k - later_e) / 2
        for (k, later_k), (e, later_e) in zip(pairwise(korean), pairwise(english), strict=True)
    ]
    sizes = [c.vocab_size for c in costs]
    lab.table(
        lab.say("처음 보는 문장에 드는 토큰", "Tokens of a held-out sentence"),
        lab.say("어휘/한국어/영어/두 배로 키워 줄어든 수", "vocabulary/Korean/English/saved by doubling").split("/"),
        [list(row) for row in zip(sizes, korean, english, [None, *saved], strict=True)],
    )
    lab.number("sizes", {"vocab_size": sizes, "ko": korean, "en": english})
    with lab.picture("sizes", lab.say("어휘를 키우면 글이 짧아진다", "A larger vocabulary shortens texts")) as axes:
        axes[0, 0].plot(sizes, korean, "o-", label=lab.label("한국어", "Korean"))
        axes[0, 0].plot(sizes, english, "s-", label=lab.label("영어", "English"))
        axes[0, 0].set_xscale("log", base=2)
        axes[0, 0].set_xlabel(lab.label("어휘의 크기", "size of the vocabulary"))
        axes[0, 0].set_ylabel(lab.label("문장당 토큰", "tokens a sentence"))
        axes[0, 0].legend()
    listed = ", ".join(f"{s:.1f}" for s in saved)
    lab.finding(
        lab.say(
            "어휘를 두 배로 키울 때마다 아끼는 토큰은 줄어든다", "Each doubling of the vocabulary saves fewer tokens"
        ),
        all(later < earlier for earlier, later in pairwise(saved)),
        lab.say(
            f"한 문장에서 {listed}개씩 줄었습니다. 그동안 임베딩 표는 {sizes[-1] // sizes[0]}배로 커집니다.",
            f"A sentence became shorter by {listed} tokens, and the embedding table {sizes[-1] // sizes[0]} times as "
            "large.",
        ),
    )


def _losses(lab: Workbench) -> None:
    """The pieces of the training sentences are a vocabulary, in which the held-out ones are cut."""
    known, held_out = ([pair[lab.lang == "en"] for pair in _pairs(lab, part)] for part in ("train", "valid"))
    tokenizer = _own(lab, OWN_SIZE, (int(lab.lang == "en"),))
    found: dict[str, Loss] = {}
    for level in _levels(lab)[:-1]:
        with lab.part(*LEVELS[level]):

            def cut(text: str, level: str = level) -> list[bytes]:
                if level == "subword":
                    return [tokenizer.token_bytes(i) for i in tokenizer.encode_ordinary(text)]
                return [piece.encode() for piece in _cut(lab, level, tokenizer, text)]

            vocabulary = {piece for text in known for piece in cut(text)}
            if level == "subword":
                vocabulary = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
            found[level] = loss_of_cutting(cut, vocabulary, held_out)
    columns = (
        "크기/아는 조각/문장당 조각/모르는 조각 %/그런 조각이 있는 문장 %/쪼개진 글자 %/이어서 되살린 문장 %",
        "size/known pieces/pieces a sentence/unknown %/sentences with one %/parts of characters %/restored by "
        "joining %",
    )
    title = lab.say(
        "배운 문장의 조각으로 처음 보는 문장을 자르면", "Held-out sentences, cut into pieces known from others"
    )
    lab.table(title, lab.say(*columns).split("/"), [[lab.say(*LEVELS[k]), *v.row()] for k, v in found.items()])
    lab.number("losses", {level: asdict(loss) for level, loss in found.items()})
    larger = [found[level].unknown for level in ("character", "morpheme", "word", "sentence") if level in found]
    character, subword, word = (found[level] for level in ("character", "subword", "word"))
    lab.finding(
        lab.say(
            "크게 자를수록 모르는 조각이 많고, 토큰은 글자보다 훨씬 적으면서 모르는 조각이 없다",
            "Larger pieces are more often unknown; subwords are far fewer than characters, and none is unknown",
        ),
        larger == sorted(set(larger)) and subword.unknown == 0 and subword.pieces < 0.7 * character.pieces,
        lab.say(
            f"모르는 조각은 글자의 {character.unknown:.2%}, 낱말의 {word.unknown:.0%}, 토큰의 "
            f"{subword.unknown:.0%}입니다. 한 문장은 글자 {character.pieces:.0f}개나 토큰 "
            f"{subword.pieces:.0f}개입니다. 토큰이 치르는 값은 드문 글자가 쪼개지는 것입니다(토큰의 "
            f"{subword.broken:.2%}).",
            f"Unknown are {character.unknown:.2%} of characters, {word.unknown:.0%} of words and "
            f"{subword.unknown:.0%} of subwords. A sentence has {character.pieces:.0f} characters or "
            f"{subword.pieces:.0f} subwords. What these cost is that rare characters fall apart "
            f"({subword.broken:.2%} of subwords).",
        ),
    )
    lab.note(
        lab.say(
            "크게 자를수록 조각은 적어지지만 처음 보는 조각이 늘고, 뜻이 같은 글도 어휘마다 값이 다른 것을 "
            "보십시오. 우리 어휘는 시험 문장과 같은 종류의 글로 만들어 유리하니, 토큰 수를 공개 어휘와 그대로 "
            "견주지는 마십시오.",
            "See how larger pieces are fewer but more often new, and how one meaning has another price in each "
            "vocabulary. Ours were made from the same kind of text as the test, which is an advantage: do not "
            "compare their counts with the published ones.",
        )
    )
