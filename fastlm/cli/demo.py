"""`fastlm demo`: from text to a tokenizer, a model, and what the model writes, on this machine, in three minutes."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlm.cli.output import JsonFlag, console, print_json, status_console
from fastlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fastlm.benchmarks.harness import Result
    from fastlm.tokenizer import Tokenizer
    from fastlm.training import TokenDataset, TrainingResult

VOCAB_SIZE = 2048
KOREAN_COPIES = 6  # the Korean text is a thirtieth of the English one; read six times as often, it is heard too
TEMPERATURES = (0.2, 0.8, 1.4)
SAMPLE_TOKENS = 60
OP_BENCHMARKS = ("attention", "linear_cross_entropy", "rms_norm", "rotary", "sampling", "swiglu")
CASES_PER_OP = 2
OPS_SECONDS = 30.0  # begins no further case after this long, so that the demo ends in time on slow machines
MARK = "demo.json"


class Language(str, Enum):
    en = "en"
    ko = "ko"
    both = "both"


@dataclass(frozen=True)
class Sample:
    temperature: float
    prompt: str
    text: str


def command(
    seconds: Annotated[float, typer.Option("--seconds", min=3, help="Time to train for.")] = 90.0,
    lang: Annotated[Language, typer.Option("--lang", help="Language of the text and of what is said.")] = Language.both,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the model and loss.png.")] = Path("demo"),
    as_json: JsonFlag = False,
) -> None:
    """Train a tokenizer and a small transformer on embedded text, read what it writes, and time the ops.

    Needs no network and no data: the text is the Python documentation that every interpreter carries and a short Korean
    story. It takes about 40 seconds more than --seconds.

    Example: fastlm demo --seconds 30 --lang ko
    """
    started = time.monotonic()
    say = _Speaker(lang, quiet=as_json)
    _clear(out)
    files = _write_texts(out, lang, say)
    dataset = _prepare(files, out, say)
    result = _train_model(dataset, out, seconds, say)
    samples = _generate(out, dataset.tokenizer, lang, say)
    ops = _measure_ops(say)
    summary = {
        "seconds": round(time.monotonic() - started, 1),
        "vocab_size": dataset.tokenizer.vocab_size,
        "training": asdict(result),
        "samples": [asdict(sample) for sample in samples],
        "ops": [op.to_json() for op in ops],
        "loss_curve": str(out / "loss.png"),
        "model": str(out),
    }
    _write_mark(out, summary)
    if as_json:
        print_json(summary)
        return
    prompt = samples[-1].prompt
    say(
        f"Done in {summary['seconds']:.0f} s. The loss curve is {out / 'loss.png'}. Go on with your own prompt:",
        f"{summary['seconds']:.0f}초 걸렸습니다. 손실 곡선은 {out / 'loss.png'}에 있습니다. 이어서 직접 물어보십시오.",
    )
    console.print(
        f'  fastlm generate --checkpoint {out} --prompt "{prompt}"', markup=False, highlight=False, soft_wrap=True
    )


class _Speaker:
    """Says a line in English, Korean or both."""

    def __init__(self, lang: Language, quiet: bool) -> None:
        self.lang = lang
        self.quiet = quiet
        self.step = 0

    def __call__(self, english: str, korean: str) -> None:
        if self.quiet:
            return
        if self.lang is not Language.ko:
            console.print(english, markup=False, highlight=False, soft_wrap=True)
        if self.lang is not Language.en:
            console.print(korean, markup=False, highlight=False, soft_wrap=True)

    def heading(self, english: str, korean: str) -> None:
        self.step += 1
        titles = {Language.en: english, Language.ko: korean, Language.both: f"{english} · {korean}"}
        if not self.quiet:
            console.print(f"\n[bold cyan]{self.step}. {titles[self.lang]}[/]", highlight=False)

    def show(self, renderable: Any) -> None:
        if not self.quiet:
            console.print(renderable, highlight=False)


def _clear(out: Path) -> None:
    """Removes what an earlier demo left in `out`, and refuses a directory that holds anything else."""
    from fastlm.training.run_directory import delete_run

    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a directory")
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise ConfigError(f"--out {out} holds files that are not of a demo; give another directory")
    if out.exists():
        delete_run(out)
        for name in ("text", "data"):
            shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    _write_mark(out, {})


def _write_mark(out: Path, summary: dict[str, Any]) -> None:
    from fastlm._files import write_atomic

    write_atomic(out / MARK, json.dumps(summary, ensure_ascii=False, indent=1) + "\n")


def _write_texts(out: Path, lang: Language, say: _Speaker) -> list[Path]:
    """The files to train on; a file that is named several times is read as often."""
    from fastlm._files import write_atomic
    from fastlm.data import english_text, korean_text

    say.heading("Text", "글")
    english = english_text() if lang is not Language.ko else ""
    korean = korean_text() if lang is not Language.en else ""
    if lang is Language.en and not english:
        raise DataError("this Python was installed without its documentation (pydoc_data); use --lang ko")
    (out / "text").mkdir(exist_ok=True)
    files = []
    if english:
        write_atomic(out / "text" / "english.txt", english)
        files.append(out / "text" / "english.txt")
    if korean:
        write_atomic(out / "text" / "korean.txt", korean)
        files += [out / "text" / "korean.txt"] * (KOREAN_COPIES if english else 1)
    kilobytes = [f"{len(text.encode()) / 1e3:,.0f} kB" for text in (english, korean)]
    say(
        f"Python's own documentation, {kilobytes[0]}, and a Korean story of ours, {kilobytes[1]}; "
        "a tenth is kept for the exam.",
        f"Python 설명서 {kilobytes[0]}와 직접 쓴 한국어 이야기 {kilobytes[1]}. 10분의 1은 시험용으로 남겨 둡니다.",
    )
    return files


def _prepare(files: list[Path], out: Path, say: _Speaker) -> TokenDataset:
    from rich.text import Text

    from fastlm.tokenizer import subwords
    from fastlm.training import prepare

    say.heading("Tokenizer", "토크나이저")
    started = time.monotonic()
    dataset = prepare(files, out / "data", vocab_size=VOCAB_SIZE)
    took = time.monotonic() - started
    vocab_size, train = dataset.tokenizer.vocab_size, dataset.manifest.splits["train"]
    size = train["bytes"] / train["tokens"]
    say(
        f"The two pieces that meet most often become one, {vocab_size - 257:,} times: {vocab_size:,} tokens, "
        f"{size:.1f} bytes each in this text. Learned and applied in {took:.1f} s.",
        f"가장 자주 만나는 두 조각을 하나로 묶기를 {vocab_size - 257:,}번 되풀이했습니다. 토큰 {vocab_size:,}개, "
        f"토큰 하나는 평균 {size:.1f}바이트입니다. 배우고 적용하는 데 {took:.1f}초 걸렸습니다.",
    )
    for text in ("The statement returns a new list.", "사람들은 도서관에 모였다."):
        line = Text("  ")
        for i, piece in enumerate(subwords(text, dataset.tokenizer)):
            line.append(piece, "black on cyan" if i % 2 else "black on yellow")
            line.append("" if console.is_terminal else "|")
        say.show(line)
    return dataset


def _train_model(dataset: TokenDataset, out: Path, seconds: float, say: _Speaker) -> TrainingResult:
    from rich import progress as rich

    from fastlm.training import PRESETS, Progress, TrainingConfig, train, transformer_config
    from fastlm.training.config import fast_dtype, preset_for

    say.heading("Training", "학습")
    started = time.monotonic()
    preset = PRESETS[preset_for(dataset.train.num_bytes, seconds / 60)]
    say(
        f"A transformer of {preset.num_layers} layers guesses the next token, is told, and changes a little each time. "
        "The loss is how surprised it was.",
        f"{preset.num_layers}층 트랜스포머가 다음 토큰을 맞히고, 답을 보고, 조금씩 바뀝니다. "
        "손실은 답을 보고 놀란 정도입니다.",
    )
    columns = (
        rich.TextColumn("  {task.fields[stage]}"),
        rich.BarColumn(),
        rich.TextColumn("{task.fields[figures]}"),
        rich.TextColumn("{task.fields[left]}"),
    )
    with rich.Progress(*columns, console=status_console, disable=not status_console.is_terminal) as bar:
        task = bar.add_task("", total=1.0, stage="training", figures="", left="")

        def show(now: Progress) -> None:
            figures = f"loss {now.loss:.2f}  {now.tokens_per_second:,.0f} tokens/s"
            left = "" if now.seconds_left is None else f"{now.seconds_left:.0f} s left"
            bar.update(task, completed=now.fraction, stage=now.stage, figures=figures, left=left)

        config = TrainingConfig(minutes=seconds / 60, batch_size=preset.batch_size, dtype=fast_dtype())
        result = train(
            transformer_config(dataset.tokenizer.vocab_size, preset),
            config,
            dataset,
            out,
            on_progress=show,
            started_at=started,
        )
    say(
        f"{result.parameters / 1e6:.1f} million numbers, {result.steps:,} steps, {result.tokens / result.seconds:,.0f} "
        f"tokens a second; {result.bits_per_byte:.2f} bits a byte on text it never saw.",
        f"숫자 {result.parameters / 1e4:,.0f}만 개, {result.steps:,}걸음, "
        f"초당 토큰 {result.tokens / result.seconds:,.0f}개. "
        f"본 적 없는 글에서 바이트당 {result.bits_per_byte:.2f}비트입니다.",
    )
    return result


def _generate(out: Path, tokenizer: Tokenizer, lang: Language, say: _Speaker) -> list[Sample]:
    from rich.padding import Padding
    from rich.text import Text

    from fastlm.inference import SamplingParams, generate
    from fastlm.model import load_model

    say.heading("What it writes, at three temperatures", "세 온도에서 쓴 글")
    say(
        "Low is safe and repeats itself, high surprises until it makes no sense. "
        "The Korean story is short, so the model recites it.",
        "낮으면 안전하지만 되풀이하고, 높으면 뜻밖이다가 말이 되지 않습니다. "
        "한국어 이야기는 짧아서 모델이 외워 버립니다.",
    )
    prompts = {Language.en: ["The value of the"], Language.ko: ["강가의 작은 마을에"]}
    wanted = prompts.get(lang) or [*prompts[Language.en], *prompts[Language.ko]]
    requests = [(temperature, prompt) for temperature in TEMPERATURES for prompt in wanted]
    params = [
        SamplingParams(max_tokens=SAMPLE_TOKENS, temperature=temperature, seed=1, ignore_eos=True)
        for temperature, _ in requests
    ]
    completions = generate(load_model(out), tokenizer, [prompt for _, prompt in requests], params)
    samples = [
        Sample(temperature, prompt, completion.text)
        for (temperature, prompt), completion in zip(requests, completions, strict=True)
    ]
    for sample in samples:
        if sample.prompt == wanted[0]:
            say.show(f"  [bold]{sample.temperature}[/]")
        text = Text(sample.prompt, "bold").append(" ".join(sample.text.split(" ")).replace("\n", " "), "not bold")
        say.show(Padding(text, (0, 0, 0, 4)))
    return samples


def _measure_ops(say: _Speaker) -> list[Result]:
    from fastlm.benchmarks import harness
    from fastlm.cli.bench import print_outcomes

    say.heading("Ops beside plain PyTorch, measured now", "지금 잰 연산 시간")
    say(
        "Outputs are compared first, then both run in turn. A ratio above 1 means that fastlm is faster.",
        "먼저 결과가 같은지 비교하고, 번갈아 실행합니다. 비율이 1보다 크면 fastlm이 빠릅니다.",
    )
    results: list[Result] = []
    ceilings = harness.measure_ceilings("cpu")
    end = time.monotonic() + OPS_SECONDS
    for name in OP_BENCHMARKS:
        say.show(f"[bold]{name}[/]")
        for case in islice(harness.load(name, "cpu"), CASES_PER_OP):
            if time.monotonic() > end:
                break
            case_results = harness.run_case(name, case, "cpu", ceilings, seconds=0.2)
            results += case_results
            if not say.quiet:
                print_outcomes(case_results)
    return results
