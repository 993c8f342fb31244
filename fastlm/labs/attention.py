"""Attention: each head of each layer takes a weighted mean over the tokens so far. Where do its weights go?

The weights are recorded while the model reads, and compared with attention that gives each token the same, and with a
model of the same shape that has learned nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastlm.inference import LLM
from fastlm.labs.attention_measures import Where, attention_maps, average, induction, largest, looks, shuffled, uniform
from fastlm.labs.data_attention import LIST, SENTENCES
from fastlm.labs.pictures import drawable
from fastlm.labs.small_models import prepare_documents, train_model
from fastlm.labs.statistics import spread
from fastlm.labs.workbench import MissingError, Workbench
from fastlm.model import Transformer, build_model
from fastlm.training import TrainingConfig
from fastlm.training.config import Preset, transformer_config

NAMES = {"ko": ("한국어", "Korean"), "en": ("영어", "English")}
REPEATED = 25  # random tokens, twice in a row
RANDOM_TEXTS = 4
DOCUMENTS, VOCAB_SIZE = 25_000, 1024
SMALL = Preset(hidden_size=128, num_layers=2, head_dim=64, context_length=64, batch_size=16)
STEPS = 250


def run(lab: Workbench) -> None:
    with lab.part("공개 모델의 머리들", "the heads of a published model"):
        llm = lab.llm()
        if not isinstance(llm.model, Transformer):
            raise MissingError(lab.say("순환 신경망에는 어텐션이 없습니다", "a recurrent network has no attention"))
        _published(lab, llm, llm.model)
    with lab.part("우리 모델이 배우기 전과 뒤", "our own model before and after learning"):
        _own(lab)


def _published(lab: Workbench, llm: LLM, model: Transformer) -> None:
    texts = {lang: [llm.prompt_ids(s) for s in sentences] for lang, sentences in SENTENCES.items()}
    found = {lang: looks(model, ids) for lang, ids in texts.items()}
    own = texts[lab.lang]
    even = average([uniform(len(ids)) for ids in own])
    small = replace(
        model.config, vocab_size=4096
    )  # the table of embeddings is most of the weights, and not of the shape
    untrained = []
    for seed in lab.seeds():
        torch.manual_seed(seed)
        untrained.append(looks(build_model(small).eval(), [[i % 4096 for i in ids] for ids in own]))
    rows = {lab.say(*NAMES[lang]): found[lang] for lang in found}
    rows |= {lab.say("배우지 않은 모델", "untrained"): average(untrained), lab.say("고르게 보면", "if even"): even}
    columns = (
        "글/첫 토큰 %/바로 앞 %/자기 %/엔트로피/거리",
        "text/first token %/the one before %/itself %/entropy/distance",
    )
    lab.table(
        lab.say("모든 머리의 평균: 어디를 보는가", "Where all heads look, on average"),
        lab.say(*columns).split("/"),
        [
            [name, *[100 * float(w[i].mean()) for i in range(3)], float(w.entropy.mean()), float(w.distance.mean())]
            for name, w in rows.items()
        ],
    )
    for lang, ids in texts.items():
        _draw_all(lab, lang, attention_maps(model, ids[0]))
    mixing = torch.Generator().manual_seed(lab.seed)
    mixed = looks(model, [shuffled(ids, mixing) for ids in own])
    _judge_places(lab, found, even, [float(w.previous.max()) for w in untrained], mixed)
    _judge_beginning(lab, llm, found[lab.lang], even)
    repeated = [*_beginning(llm), *2 * llm.tokenizer.encode(LIST[lab.lang])]
    three = (
        (largest(found[lab.lang].previous), own[0], lab.label("바로 앞을 본다", "the token before")),
        (largest(found[lab.lang].first), own[0], lab.label("첫 토큰을 본다", "the first token")),
        (_judge_induction(lab, llm, model), repeated, lab.label("되풀이를 찾는다", "what came next last time")),
    )
    _draw_three(lab, llm, model, three)
    lab.note(
        lab.say(
            "작은 그림 하나가 머리 하나이고, 가로줄 하나가 한 토큰이 앞의 토큰들에 나눈 무게입니다. 왼쪽 끝의 "
            "세로줄은 첫 토큰만 보는 머리, 대각선 바로 아래의 줄은 바로 앞 토큰을 보는 머리입니다. 번호는 0부터 "
            "셉니다.",
            "Each small picture is a head, and each of its lines the weights that a token gives to those so far. A "
            "stripe at the left edge is a head that looks at the first token alone; one just below the diagonal, a "
            "head that looks at the token before.",
        )
    )


def _judge_places(lab: Workbench, found: dict[str, Where], even: Where, untrained: list[float], mixed: Where) -> None:
    korean, english = found["ko"].previous, found["en"].previous
    layer, head = at = largest(found[lab.lang].previous)
    same = float(torch.corrcoef(torch.stack([korean.flatten(), english.flatten()]))[0, 1])
    lab.number(
        "previous",
        {"ko": korean.tolist(), "en": english.tolist(), "untrained": untrained, "even": float(even.previous)},
    )
    lab.finding(
        lab.say(
            "바로 앞 토큰을 보는 머리가 있다(무게의 절반 넘게)",
            "Some head looks at the token before (with more than half of its weight)",
        ),
        min(float(korean[at]), float(english[at])) > 0.5 and max(untrained) < 2 * float(even.previous),
        lab.say(
            f"{layer}층 {head}번 머리는 바로 앞 토큰에 한국어에서 {korean[at]:.0%}, 영어에서 {english[at]:.0%}를 "
            f"줍니다. 고르게 보면 {float(even.previous):.0%}이고, 배우지 않은 같은 꼴의 모델에서는 가장 많은 머리가 "
            f"{spread(untrained)}입니다. 토큰을 섞어도 {mixed.previous[at]:.0%}입니다.",
            f"Head {head} of layer {layer} gives {korean[at]:.0%} to the token before in Korean and "
            f"{english[at]:.0%} in English. Even attention would give {float(even.previous):.0%}; in a model of the "
            f"same shape that has learned nothing, the most of any head is {spread(untrained)}. On shuffled tokens "
            f"it gives {mixed.previous[at]:.0%}.",
        ),
    )
    lab.finding(
        lab.say(
            "머리의 구실은 말이 달라도 같다(앞을 보는 몫의 상관 0.8 넘게)",
            "Heads do the same in both languages (correlation of the share of the token before above 0.8)",
        ),
        same > 0.8,
        lab.say(
            f"머리 {korean.numel()}개에서 한국어와 영어의 상관은 {same:.2f}입니다.",
            f"Over {korean.numel()} heads, Korean and English correlate with {same:.2f}.",
        ),
    )


def _beginning(llm: LLM) -> list[int]:
    """What the model puts before a text."""
    return llm.prompt_ids("a")[:-1]


def _judge_beginning(lab: Workbench, llm: LLM, found: Where, even: Where) -> None:
    bare = looks(llm.model, [llm.prompt_ids(s)[len(_beginning(llm)) :] for s in SENTENCES[lab.lang]])
    share, without = float(found.first.mean()), float(bare.first.mean())
    lab.number(
        "first", {"share": found.first.tolist(), "without_beginning": bare.first.tolist(), "even": float(even.first)}
    )
    lab.finding(
        lab.say(
            "무게의 많은 몫이 뜻 없는 시작 표시로 간다(고르게 볼 때의 세 배 넘게)",
            "Much of the weight goes to the token that merely begins a text (over three times as much as evenly)",
        ),
        share > 3 * float(even.first) > 3 * without,
        lab.say(
            f"모든 머리의 평균으로 무게의 {share:.0%}가 시작 표시로 갑니다(고르면 {float(even.first):.0%}). 표시를 "
            f"떼면 첫 토큰은 {without:.0%}를 받습니다.",
            f"On average over all heads {share:.0%} of the weight goes to it (even attention: "
            f"{float(even.first):.0%}). Without it, the first token gets {without:.0%}.",
        ),
    )


def _judge_induction(lab: Workbench, llm: LLM, model: Transformer) -> tuple[int, int]:
    """The head that copies most."""
    drawing = torch.Generator().manual_seed(lab.seed)
    beginning = _beginning(llm)

    def draw() -> list[int]:
        found: list[int] = torch.randint(1000, model.config.vocab_size // 2, (REPEATED,), generator=drawing).tolist()
        return found

    texts = [(draw(), draw()) for _ in range(RANDOM_TEXTS)]
    repeated = torch.stack([induction(attention_maps(model, [*beginning, *x, *x]), REPEATED) for x, _ in texts]).mean(0)
    control = torch.stack([induction(attention_maps(model, [*beginning, *x, *y]), REPEATED) for x, y in texts]).mean(0)
    layer, head = at = largest(repeated)
    lab.number("induction", {"repeated": repeated.tolist(), "control": control.tolist()})
    lab.finding(
        lab.say(
            "되풀이되는 글에서, 지난번에 다음으로 온 토큰을 보는 머리가 있다",
            "In text that repeats itself, some head looks at the token that came next the last time",
        ),
        float(repeated[at]) > 0.5 > 0.1 > float(control[at]),
        lab.say(
            f"뜻 없는 토큰 {REPEATED}개를 두 번 읽히면 {layer}층 {head}번 머리는 그 토큰에 {repeated[at]:.0%}를 "
            f"줍니다. 되풀이하지 않으면 같은 자리에 {control[at]:.0%}입니다.",
            f"When {REPEATED} random tokens are read twice, head {head} of layer {layer} gives {repeated[at]:.0%} to "
            f"that token. Without repetition, the same place gets {control[at]:.0%}.",
        ),
    )
    return at


def _draw_all(lab: Workbench, lang: str, maps: Tensor) -> None:
    layers, heads = maps.shape[:2]
    title = SENTENCES[lang][0] + lab.say(" — 층(가로)과 머리(세로)", " — by layer (across) and head (down)")
    with lab.picture(
        f"all-{lang}", title, rows=heads, columns=layers, width=0.65 * layers, height=0.65 * heads + 0.4
    ) as axes:
        for layer in range(layers):
            for head in range(heads):
                axes[head, layer].imshow(maps[layer, head].sqrt().numpy(), cmap="magma", vmin=0, vmax=1)
                axes[head, layer].set_xticks([])
                axes[head, layer].set_yticks([])
            axes[0, layer].set_title(lab.label(f"{layer}층", f"layer {layer}"), fontsize=7)


def _draw_three(
    lab: Workbench, llm: LLM, model: Transformer, three: Sequence[tuple[tuple[int, int], list[int], str]]
) -> None:
    title = lab.say("구실이 뚜렷한 세 머리", "Three heads with a clear task")
    with lab.picture("heads", title, columns=3, width=12, height=4.2) as axes:
        for panel, ((layer, head), text, name) in zip(axes[0], three, strict=True):
            panel.imshow(attention_maps(model, text)[layer, head].sqrt().numpy(), cmap="magma", vmin=0, vmax=1)
            names = [llm.tokenizer.token_bytes(i).decode(errors="replace").replace(" ", "␣") for i in text]
            panel.set_xticks(range(len(text)), map(drawable, names), rotation=90, fontsize=7)
            panel.set_yticks(range(len(text)), map(drawable, names), fontsize=7)
            panel.set_title(lab.label(f"{layer}층 {head}번: {name}", f"layer {layer}, head {head}: {name}"))


def _own(lab: Workbench) -> None:
    lines = lab.data("nsmc/reviews.txt").read_text(encoding="utf-8").splitlines()
    dataset = prepare_documents(lab, "attention", lines[:DOCUMENTS], vocab_size=VOCAB_SIZE)
    config = transformer_config(VOCAB_SIZE, SMALL)
    texts = [dataset.tokenizer.encode(line) for line in lines[DOCUMENTS:][:200]]
    texts = [ids for ids in texts if 12 <= len(ids) <= SMALL.context_length][:30]
    before, after = [], []
    for seed in lab.seeds():
        torch.manual_seed(seed)
        before.append(looks(build_model(config).eval(), texts))
        training = TrainingConfig(
            steps=STEPS,
            batch_size=SMALL.batch_size,
            learning_rate=0.02,
            embedding_learning_rate=0.004,
            evaluations=0,
            seed=seed,
        )
        after.append(looks(train_model(lab, f"attention-{seed}", config, training, dataset).model, texts))
    even = average([uniform(len(ids)) for ids in texts])
    earlier, later = ([float(w.previous.max()) for w in moment] for moment in (before, after))
    lab.number("own", {"before": earlier, "after": later, "even": float(even.previous)})
    lab.finding(
        lab.say("앞을 보는 머리는 배우면서 생긴다", "A head that looks at the token before comes with learning"),
        all(a > 2 * b for a, b in zip(later, earlier, strict=True)),
        lab.say(
            f"우리 작은 모델({SMALL.num_layers}층, 층마다 머리 {config.num_heads}개)에서 바로 앞 토큰을 가장 많이 "
            f"보는 머리의 몫은 배우기 전 {spread(earlier)}, {STEPS}걸음 배운 뒤 {spread(later)}입니다(고르면 "
            f"{float(even.previous):.2f}).",
            f"In our small model ({SMALL.num_layers} layers of {config.num_heads} heads) the largest share of the "
            f"token before is {spread(earlier)} before learning and {spread(later)} after {STEPS} steps (even "
            f"attention: {float(even.previous):.2f}).",
        ),
    )
