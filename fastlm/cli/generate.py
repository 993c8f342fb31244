"""`fastlm generate`: text from a model, for one prompt or for a file of them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlm.cli.output import JsonFlag, print_json, status_console
from fastlm.cli.prompt_files import Place, ResultFile, read_prompts, read_text
from fastlm.cli.sampling_options import (
    MaxTokensOption,
    MemoryOption,
    MinPOption,
    ModelOption,
    RepetitionPenaltyOption,
    SeedOption,
    SpeculateOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    as_typed,
    memory_in_bytes,
    write,
)
from fastlm.errors import CapacityError, ConfigError, InferenceError

if TYPE_CHECKING:
    from fastlm.inference import LLM, Piece, SamplingParams


class PastContext(str, Enum):
    stop = "stop"
    reread = "reread"


def command(
    model: ModelOption,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="How the text begins; repeat for more.")
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts-file", "-f", help='Prompts: one a line, or .jsonl rows with a "prompt".')
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="JSON lines to write, or to go on with if unfinished."),
    ] = None,
    max_tokens: MaxTokensOption = 200,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    presence_penalty: Annotated[
        float, typer.Option("--presence-penalty", help="Subtracted from the logits of tokens that were generated.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option("--frequency-penalty", help="The same, once for each time.")
    ] = 0.0,
    seed: SeedOption = 0,
    stop: StopOption = None,
    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", help="A file: the text is JSON of this schema.")
    ] = None,
    regex: Annotated[str | None, typer.Option("--regex", help="The text matches this as a whole.")] = None,
    grammar: Annotated[
        Path | None, typer.Option("--grammar", help="A file: the text follows this grammar, in Lark's notation.")
    ] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", help="Texts for each prompt.")] = 1,
    past_context: Annotated[
        PastContext,
        typer.Option("--past-context", help="When the context is full: read its latest half anew and go on, or stop."),
    ] = PastContext.reread,
    speculate: SpeculateOption = 0,
    memory: MemoryOption = None,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Show text as it comes. [default: for one text]")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Continue prompts. The text holds whole characters only, and is the same each time for the same seed.

    With --out, rows are written as they are done: after Ctrl-C, the same command does those that are missing.

    Example: fastlm generate --model run --prompt "Once upon a time" --temperature 0.8 --seed 1

    Example: fastlm generate --model run --prompts-file prompts.jsonl --out texts.jsonl
    """
    from fastlm.inference import LLM, SamplingParams

    if num_samples < 1:
        raise ConfigError(f"--num-samples must be a positive integer, not {num_samples}")
    if bool(prompt) == bool(prompts_file):
        raise ConfigError("give either --prompt or --prompts-file")
    given = read_prompts(prompts_file) if prompts_file else [{"prompt": as_typed(p, "--prompt")} for p in prompt or ()]
    alone = len(given) * num_samples == 1
    if stream and (as_json or out or not alone):
        raise ConfigError("--stream shows one text; leave it out with --json or --out, or for several texts")
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(as_typed(s, "--stop") for s in stop or ()),
        json_schema=None if json_schema is None else read_text(json_schema),
        regex=None if regex is None else as_typed(regex, "--regex"),
        grammar=None if grammar is None else read_text(grammar),
    )
    texts = _texts(given, num_samples, params)
    results = ResultFile(out, {text.place: text.fixed for text in texts}) if out else None
    with LLM(model, past_context=past_context.value, num_drafts=speculate, memory=memory_in_bytes(memory)) as llm:
        if results is not None:
            _fill(llm, results, texts, as_json)
        elif alone and not as_json and stream is not False:
            _show_as_it_comes(llm, texts[0])
        else:
            _show_when_done(llm, texts, as_json)


@dataclass(frozen=True)
class _Text:
    """One text to generate: sample `place[1]` of prompt `place[0]`, whose row had these `fields`."""

    place: Place
    fields: dict[str, Any]
    params: SamplingParams

    @property
    def prompt(self) -> str:
        return self.fields["prompt"]

    @property
    def fixed(self) -> dict[str, Any]:
        """What a row of results must say to be this text's."""
        return {"prompt": self.prompt, "seed": self.params.seed}

    def row(self, pieces: list[Piece]) -> dict[str, Any]:
        from fastlm.inference.outputs import completion

        done = completion(self.prompt, pieces)
        row = {
            **self.fields,
            "text": done.text,
            "seed": self.params.seed,
            "tokens": len(done.token_ids),
            "finish_reason": done.finish_reason,
        }
        return row if done.error is None else {**row, "error": done.error}


def _texts(given: list[dict[str, Any]], num_samples: int, params: SamplingParams) -> list[_Text]:
    places = [(index, sample) for index in range(len(given)) for sample in range(num_samples)]
    seeds = [(params.seed + i) % (1 << 63) for i in range(len(places))]
    return [_Text(p, given[p[0]], replace(params, seed=s)) for p, s in zip(places, seeds, strict=True)]


def _show_as_it_comes(llm: LLM, text: _Text) -> None:
    write(text.prompt)
    for piece in llm.stream([text.prompt], [text.params]):
        write(piece.text)
        if piece.error is not None:
            raise InferenceError(piece.error)
    write("\n")


def _show_when_done(llm: LLM, texts: list[_Text], as_json: bool) -> None:
    started = time.perf_counter()
    completions = llm.generate([text.prompt for text in texts], [text.params for text in texts])
    seconds = time.perf_counter() - started
    failed = next((c.error for c in completions if c.error is not None), None)
    if failed is not None:
        raise InferenceError(failed)
    if as_json:
        rows = [
            {
                "prompt": c.prompt,
                "text": c.text,
                "seed": text.params.seed,
                "tokens": len(c.token_ids),
                "finish_reason": c.finish_reason,
            }
            for text, c in zip(texts, completions, strict=True)
        ]
        print_json({"completions": rows, **_speed(sum(len(c.token_ids) for c in completions), seconds)})
        return
    for i, (text, completion) in enumerate(zip(texts, completions, strict=True), 1):
        if len(texts) > 1:
            write(f"--- {i} (seed {text.params.seed}, {completion.finish_reason})\n")
        write(f"{completion.prompt}{completion.text}\n")


def _fill(llm: LLM, results: ResultFile, texts: list[_Text], as_json: bool) -> None:
    """Generates the texts that `results` lacks."""
    from rich.progress import Progress

    started = time.perf_counter()
    missing = [text for text in texts if text.place not in results.done]
    kept = len(texts) - len(missing)
    tokens, failed = 0, []

    def add(text: _Text, pieces: list[Piece]) -> None:
        row = {"index": text.place[0], "sample": text.place[1], **text.row(pieces)}
        results.add(row)
        if "error" in row:
            failed.append(row)

    try:
        with Progress(console=status_console, transient=True) as progress:
            task = progress.add_task("generating", total=len(texts), completed=kept)
            fitting = []
            for text in missing:
                refused = _refusal(llm, text)
                if refused is None:
                    fitting.append(text)
                else:
                    add(text, [refused])
                    progress.advance(task)
            unfinished: dict[object, list[Piece]] = {}
            for piece in llm.stream([text.prompt for text in fitting], [text.params for text in fitting]):
                tokens += piece.token_id is not None
                unfinished.setdefault(piece.request_id, []).append(piece)
                if piece.finish_reason is not None:
                    assert isinstance(piece.request_id, int)
                    add(fitting[piece.request_id], unfinished.pop(piece.request_id))
                    progress.advance(task)
        results.finish()
    except KeyboardInterrupt:
        status_console.print(
            f"{len(results.done)} of {len(texts)} rows are written; the same command goes on from there"
        )
        raise
    finally:
        results.close()
    seconds = time.perf_counter() - started
    if as_json:
        print_json({"rows": len(texts), "kept": kept, "failed": len(failed), **_speed(tokens, seconds)})
    else:
        status_console.print(f"{len(texts)} rows, {kept} of them from before; {tokens:,} tokens in {seconds:.1f} s")
    if failed:
        raise InferenceError(f"{len(failed)} of {len(texts)} texts failed; the first: {failed[0]['error']}")


def _refusal(llm: LLM, text: _Text) -> Piece | None:
    """The row of one prompt that is too long, which must not keep the others from being served."""
    from fastlm.inference import Piece

    try:
        llm.check(text.prompt, text.params)
    except CapacityError as error:
        return Piece(0, "", None, "error", error=str(error))
    return None


def _speed(tokens: int, seconds: float) -> dict[str, Any]:
    return {"seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds, 1) if seconds else None}
