"""Temperature: logits are divided by it before the softmax, so it sharpens or flattens, and never changes the order.

A model gives logits z. What is drawn comes from softmax(z / T): below 1 the probable becomes more probable, above 1 all
become alike, and 0 takes the most probable token.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fastlm.inference import SamplingParams
from fastlm.labs.pictures import bars_by_group, drawable
from fastlm.labs.temperature_measures import Measured, chance_of_counts, entropy, measure, perplexity, same_logits
from fastlm.labs.workbench import Workbench
from fastlm.ops import sample

FLAT, SHARP = (20.0, 25.0, 23.0, 22.0), (3.0, 70.0, 5.0, 4.0)  # the notes' rows, in percent; each goes on with "…"
NEAR = 2.0  # percentage points
DRAWS = 20_000
SWEEP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
BARS = (0.3, 0.7, 1.0, 2.0)
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 12, 8, 60


def draws(logits: Tensor, temperature: float, count: int, seed: int) -> Tensor:
    """How often each of `(vocab_size,)` logits is drawn."""
    rows = logits.float().expand(count, -1).contiguous()
    drawn = sample(rows, temperature=temperature, seed=seed, position=torch.arange(count))
    return drawn.ids.bincount(minlength=len(logits))


def run(lab: Workbench) -> None:
    with lab.part("강의 노트의 두 줄", "the two rows of the notes"):
        _notes(lab)
    with lab.part("한 걸음의 확률", "the probabilities of one step"):
        _one_step(lab)
    with lab.part("온도를 0에서 2까지", "temperatures from 0 to 2"):
        _sweep(lab)


def _notes(lab: Workbench) -> None:
    fit = same_logits(FLAT, SHARP)
    others = sorted(same_logits(FLAT, order).deviation for order in itertools.permutations(SHARP))
    rank = 1 + sum(other < fit.deviation - 1e-6 for other in others)
    rest = same_logits([*FLAT, 100 - sum(FLAT)], [*SHARP, 100 - sum(SHARP)])
    rows: list[list[str | float]] = []
    for korean, english, row, found in (
        ("평평한 줄", "flat row", FLAT, fit.flat),
        ("뾰족한 줄", "sharp row", SHARP, fit.sharp),
    ):
        rows.append([lab.say(korean, english), *[100 * value / sum(row) for value in row]])
        rows.append([lab.say("  같은 로짓에서", "  from the same logits"), *found.tolist()])
    title = lab.say("노트의 네 확률(%, 더해서 100)", "The notes' four probabilities (%, scaled to 100)")
    lab.table(title, ["", "1", "2", "3", "4"], rows)
    lab.number("notes", fit._asdict() | {name: getattr(fit, name).tolist() for name in ("logits", "flat", "sharp")})
    lab.number("notes_other_orders", others)
    lab.number("notes_with_the_rest", rest.deviation)
    lab.finding(
        lab.say(
            "노트의 두 줄은 같은 로짓을 두 온도로 나눈 것이다(네 값 모두 2 %p 안)",
            "The notes' two rows are the same logits at two temperatures (each of the four values within 2 points)",
        ),
        fit.deviation <= NEAR and rank == 1,
        lab.say(
            f"온도를 {fit.ratio:.1f}배 낮추면 가장 어긋난 값이 {fit.deviation:.1f} %p 차이입니다. 뾰족한 줄의 값을 "
            f"24가지로 늘어놓으면 노트의 순서가 {rank}위로 잘 맞습니다(꼴찌는 {others[-1]:.1f} %p). 다만 '…'로 적힌 "
            f"나머지(10 %, 18 %)를 다섯째 값으로 넣으면 {rest.deviation:.0f} %p 어긋납니다. 온도를 낮추면 드문 것은 "
            "더 드물어지기 때문입니다.",
            f"At a temperature {fit.ratio:.1f} times lower the worst value is {fit.deviation:.1f} points off. Of the "
            f"24 orders of the sharp row the notes' own comes number {rank} (the last is {others[-1]:.1f} points "
            f"off). But with what '…' stands for (10 % and 18 %) as a fifth value it is {rest.deviation:.0f} points "
            "off: a lower temperature makes what is rare rarer.",
        ),
    )
    cold = 1 / fit.ratio
    chance = min(
        chance_of_counts(draws(fit.logits, 1.0, DRAWS, lab.seed), fit.flat),
        chance_of_counts(draws(fit.logits, cold, DRAWS, lab.seed + 1), fit.sharp),
    )
    warmer = chance_of_counts(draws(fit.logits, 1.1 * cold, DRAWS, lab.seed + 2), fit.sharp)
    lab.number("draws", {"count": DRAWS, "chance": chance, "chance_10_percent_warmer": warmer})
    lab.finding(
        lab.say("ops.sample이 뽑는 비율은 softmax(z / T)다", "ops.sample draws from softmax(z / T)"),
        warmer < 0.001 < chance,
        lab.say(
            f"두 온도에서 {DRAWS:,}번씩 뽑았을 때, 우연히 이만큼 어긋날 확률(카이제곱 검정)은 {chance:.2g}입니다. "
            f"온도만 10 % 높여 뽑으면 {warmer:.2g}입니다.",
            f"Of {DRAWS:,} draws at each temperature, counts as far off would come by chance with probability "
            f"{chance:.2g} (chi-square test); drawn at a temperature 10 % higher, with {warmer:.2g}.",
        ),
    )


def _one_step(lab: Workbench) -> None:
    llm = lab.llm()
    prompt = lab.say("오늘 날씨가 참", "In the morning I drink a cup of")
    logits = llm.embed([prompt], pooling="logits")[0]
    top = logits.topk(8).indices
    names = [llm.tokenizer.decode([i]).replace(" ", "␣").replace("\n", "↵") for i in top.tolist()]
    shares = {T: ((logits / T).softmax(-1)[top] * 100).tolist() for T in BARS}
    lab.table(
        lab.say(
            f"“{prompt}” 다음에 올 토큰의 확률(%), ␣은 빈칸", f"What follows “{prompt}”: probabilities (%), ␣ a space"
        ),
        [lab.say("토큰", "token"), *[f"T={T}" for T in BARS]],
        [[name, *[shares[T][i] for T in BARS]] for i, name in enumerate(names)],
    )
    with lab.picture("one-step", f"{prompt} …", width=8) as axes:
        bars_by_group(axes[0, 0], names, {f"T={T}": shares[T] for T in BARS})
        axes[0, 0].set_ylabel(lab.label("확률 (%)", "probability (%)"))
        axes[0, 0].set_title(lab.label(f"“{prompt} …”", f"“{prompt} …”"))
    written = llm.generate([prompt] * 5, [SamplingParams(40, temperature=T, seed=lab.seed) for T in SWEEP[::2]])
    lab.table(
        lab.say(f"“{prompt}” 다음에 쓴 글", f"Written after “{prompt}”"),
        [lab.say("온도", "T"), lab.say("글", "text")],
        [[T, " ".join(completion.text.split())] for T, completion in zip(SWEEP[::2], written, strict=True)],
    )
    lab.number("one_step", {"prompt": prompt, "tokens": names, "percent": {str(T): s for T, s in shares.items()}})


def _sweep(lab: Workbench) -> None:
    """The beginnings of sentences that people wrote are continued by the model; their own ends are measured too."""
    llm = lab.llm()
    sentences = [llm.prompt_ids(row[lab.lang]) for row in lab.rows("ko-en/valid.tsv")]
    whole = [ids for ids in sentences if len(ids) >= 3 * PROMPT_TOKENS][: lab.size(PROMPTS, 32)]
    prompts = [ids[: PROMPT_TOKENS + 1] for ids in whole]  # the first token only says that a text begins
    seeds = lab.seeds()
    asked = [(T, seed) for T in SWEEP for seed in (seeds if T else seeds[:1])]  # at 0 nothing is left to chance
    completions = llm.generate(
        prompts * len(asked),
        [
            SamplingParams(NEW_TOKENS, temperature=T, seed=1000 * seed + i, logprobs=0, ignore_eos=True)
            for T, seed in asked
            for i in range(len(prompts))
        ],
    )
    texts = {key: completions[i * len(prompts) :][: len(prompts)] for i, key in enumerate(asked)}
    found = {T: measure([texts[key] for key in asked if key[0] == T]) for T in SWEEP}
    logits = llm.embed(prompts, pooling="logits")
    entropies = {T: float(entropy(logits, T).mean()) for T in SWEEP}
    human = perplexity([p for score in llm.score(whole) for p in score.logprobs[PROMPT_TOKENS:]])
    lab.table(
        lab.say("온도에 따라 달라지는 것", "What changes with the temperature"),
        [lab.say("온도", "T"), *_measures(lab)],
        [[T, entropies[T], *map(str, found[T])] for T in SWEEP],
    )
    _draw_sweep(lab, entropies, found, human)
    _judge_sweep(lab, found, human)
    numbers = {name: [getattr(found[T], name).mean for T in SWEEP] for name in Measured._fields}
    lab.number("sweep", {"temperatures": SWEEP, "entropy": list(entropies.values()), **numbers})
    lab.number("sweep_sizes", {"prompts": len(prompts), "tokens": NEW_TOKENS, "seeds": seeds})
    lab.number("human_perplexity", human)


def _measures(lab: Workbench) -> list[str]:
    return [
        lab.say("엔트로피(nat)", "entropy (nats)"),
        "distinct-2",
        lab.say("되풀이한 비율", "repeated"),
        lab.say("제 글의 perplexity", "self-perplexity"),
    ]


def _draw_sweep(lab: Workbench, entropies: dict[float, float], found: dict[float, Measured], human: float) -> None:
    title = lab.say(
        "온도에 따른 엔트로피, 다양함, 되풀이, 제 글의 perplexity",
        "Entropy, variety, repetition and self-perplexity against temperature",
    )
    with lab.picture("sweep", title, columns=4, width=11, height=2.8) as axes:
        axes[0, 0].plot(SWEEP, list(entropies.values()), "o-")
        for place, name in enumerate(Measured._fields, 1):
            values = [getattr(found[T], name) for T in SWEEP]
            axes[0, place].errorbar(SWEEP, [v.mean for v in values], [v.deviation for v in values], fmt="o-", capsize=2)
        for place, name in enumerate(_measures(lab)):
            axes[0, place].set_title(drawable(name))
            axes[0, place].set_xlabel(lab.label("온도", "temperature"))
        axes[0, 3].set_yscale("log")
        axes[0, 3].axhline(human, color="gray", linestyle="--", label=lab.label("사람이 쓴 글", "people's texts"))
        axes[0, 3].legend(fontsize="small")


def _judge_sweep(lab: Workbench, found: dict[float, Measured], human: float) -> None:
    steps = (0.0, 0.5, 1.0, 1.5)
    distinct = [found[T].distinct.mean for T in steps]
    repeated = [found[T].repetition.mean for T in steps]
    listed = ", ".join(f"{d:.2f}" for d in distinct)
    lab.finding(
        lab.say(
            "온도를 올리면 더 다양하게 쓰고 덜 되풀이한다",
            "A higher temperature gives more variety and less repetition",
        ),
        distinct == sorted(set(distinct)) and repeated[0] > 2 * repeated[2],
        lab.say(
            f"T = 0, 0.5, 1, 1.5에서 distinct-2는 {listed}입니다. 되풀이한 4토큰은 T = 0에서 {repeated[0]:.0%}, T = "
            f"1에서 {repeated[2]:.0%}입니다.",
            f"At T = 0, 0.5, 1, 1.5 distinct-2 is {listed}. Of runs of four tokens, {repeated[0]:.0%} are repeated "
            f"at T = 0 and {repeated[2]:.0%} at T = 1.",
        ),
    )
    low, one, high = (found[T].perplexity for T in (0.5, 1.0, 2.0))
    lab.finding(
        lab.say(
            "모델이 보기에 낮은 온도의 글은 사람 글보다 뻔하고, 높은 온도의 글은 더 뜻밖이다",
            "To the model, text at a low temperature is more predictable than people's, and at a high one less",
        ),
        low.mean + low.deviation < human < high.mean - high.deviation,
        lab.say(
            f"제 글의 perplexity는 T = 0.5에서 {low}, T = 1에서 {one}, T = 2에서 {high}이고, 같은 첫머리 뒤에 사람이 "
            f"쓴 글은 {human:.0f}입니다.",
            f"Self-perplexity is {low} at T = 0.5, {one} at T = 1 and {high} at T = 2; what people wrote after the "
            f"same beginnings has {human:.0f}.",
        ),
    )
    lab.note(
        lab.say(
            "온도는 로짓의 순서를 바꾸지 않고 차이만 늘이거나 줄입니다. 막대에서 T가 낮을수록 한 토큰으로 몰리고, "
            "T가 높을수록 꼬리까지 고르게 퍼지는 것을 보십시오.",
            "A temperature never changes the order of the logits, only how far apart they are. See in the bars how "
            "a low T gathers everything on one token and a high T spreads it over the tail.",
        )
    )
