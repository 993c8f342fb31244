"""`fastlm eval`: how well a model predicts a text, or answers questions of several choices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlm.cli.output import JsonFlag, console, print_json, status_console
from fastlm.cli.prompt_files import read_text
from fastlm.cli.sampling_options import MemoryOption, ModelOption, memory_in_bytes
from fastlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fastlm.inference import LLM
    from fastlm.inference.evaluation import Question

CONTEXT_LENGTH = 1024  # tokens; the work grows with it, and most of what context gives comes from the nearest


def command(
    model: ModelOption,
    text: Annotated[Path | None, typer.Option("--text", help="A text to predict.")] = None,
    choices: Annotated[
        Path | None,
        typer.Option("--choices", help='JSON lines with "prompt", "choices" and "answer", the index of the right one.'),
    ] = None,
    context_length: Annotated[
        int | None,
        typer.Option("--context-length", help="Tokens to look back on. [default: the model's, at most 1024]"),
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", help="Tokens a window advances. [default: half the context]")
    ] = None,
    memory: MemoryOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure a model on a text or on multiple-choice questions.

    Bits per byte do not depend on the vocabulary: models with different tokenizers compare.

    Example: fastlm eval --model run --text validation.txt

    Example: fastlm eval --model gemma3-270m --choices questions.jsonl --json
    """
    from fastlm.inference import LLM

    if (text is None) == (choices is None):
        raise ConfigError("give either --text or --choices")
    content = read_text(text) if text is not None else ""
    questions = _questions(choices) if choices is not None else []
    with LLM(model, memory=memory_in_bytes(memory)) as llm:
        if text is not None:
            if context_length is None:
                context_length = min(llm.context_length or CONTEXT_LENGTH, CONTEXT_LENGTH)
            result = _score(llm, content, context_length, stride)
        else:
            result = _answer(llm, questions)
    if as_json:
        print_json(result)
        return
    for name, value in result.items():
        console.print(f"{name.replace('_', ' '):<22} {value}", highlight=False)


def _score(llm: LLM, content: str, context_length: int, stride: int | None) -> dict[str, Any]:
    from rich.progress import Progress

    from fastlm.inference.evaluation import score_text

    total = len(content.encode())
    with Progress(console=status_console, transient=True) as progress:
        task = progress.add_task("scoring", total=total)
        for score in score_text(llm, content, context_length=context_length, stride=stride):
            progress.update(task, completed=score.num_bytes)
    return {
        "bits_per_byte": round(score.bits_per_byte, 4),
        "perplexity": round(score.perplexity, 3),
        "loss": round(score.nats / score.tokens, 4),
        "tokens": score.tokens,
        "bytes": score.num_bytes,
        "context_length": context_length,
    }


def _answer(llm: LLM, questions: list[Question]) -> dict[str, Any]:
    from rich.progress import track

    from fastlm.inference.evaluation import answer_questions

    answers = list(
        track(answer_questions(llm, questions), "answering", len(questions), console=status_console, transient=True)
    )
    pairs = list(zip(questions, answers, strict=True))
    return {
        "accuracy": round(sum(a.chosen == q.answer for q, a in pairs) / len(pairs), 4),
        "accuracy_by_byte": round(sum(a.chosen_by_byte == q.answer for q, a in pairs) / len(pairs), 4),
        "accuracy_of_chance": round(sum(1 / len(q.choices) for q in questions) / len(questions), 4),
        "questions": len(questions),
    }


def _questions(path: Path) -> list[Question]:
    from fastlm.inference.evaluation import Question

    questions = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, choices, answer = row["prompt"], row["choices"], row["answer"]
            valid = isinstance(prompt, str) and type(answer) is int and 0 <= answer < len(choices)
            valid = valid and isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
        except (ValueError, TypeError, KeyError, RecursionError):
            valid = False
        if not valid:
            raise DataError(
                f'{path}, line {number} must be a JSON object with a string "prompt", "choices", a list of strings, '
                'and "answer", the index of the right one'
            )
        questions.append(Question(prompt, tuple(choices), answer))
    if not questions:
        raise DataError(f"{path} holds no questions")
    return questions
