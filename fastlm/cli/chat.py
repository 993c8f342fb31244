"""`fastlm chat`: a conversation in the terminal, or with lines from a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlm.cli.output import JsonFlag, print_json, status_console
from fastlm.cli.sampling_options import (
    MaxTokensOption,
    MemoryOption,
    MinPOption,
    ModelOption,
    RepetitionPenaltyOption,
    SeedOption,
    SpeculateOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    memory_in_bytes,
    write,
)
from fastlm.errors import CapacityError, ConfigError, DataError, InferenceError

if TYPE_CHECKING:
    from fastlm.inference import LLM, SamplingParams

HELP = "/temperature 0.3   /max-tokens 200   /system You are brief.   /reset   /quit"


def command(
    model: ModelOption,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told before all else.")] = None,
    max_tokens: MaxTokensOption = 512,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = None,
    top_p: TopPOption = 0.95,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    seed: SeedOption = 0,
    speculate: SpeculateOption = 4,
    memory: MemoryOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Talk with a model. Ctrl-C ends an answer, Ctrl-D the conversation.

    Lines that begin with a slash are settings: /temperature 0.3, /max-tokens 200, /system TEXT, /reset, /quit, /help.
    Lines from a pipe are answered one after the other; with --json, a line of JSON each.

    Example: fastlm chat --model gemma3-270m --temperature 0.7
    """
    from fastlm.inference import LLM, SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    with LLM(model, num_drafts=speculate, memory=memory_in_bytes(memory)) as llm:
        conversation = _Conversation(llm, params, system)
        for line in _lines():
            if not line.strip():
                continue
            try:
                if line.startswith("/"):
                    if not conversation.obey(line):
                        return
                else:
                    conversation.answer(line, as_json=as_json)
            except (ConfigError, CapacityError, InferenceError) as error:
                if as_json or not sys.stdin.isatty():
                    raise
                status_console.print(f"[red]{error}[/]", highlight=False)


class _Conversation:
    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self._llm = llm
        self._params = params
        self._system = system
        self._turns: list[dict[str, str]] = []
        if llm.tokenizer.settings.chat_template is None:
            _say("This model has no chat template: it continues a transcript of User and Assistant.")

    def obey(self, line: str) -> bool:
        """Does what a line with a slash says. False when that is to end.

        Raises:
            ConfigError: there is no such command, or its value is not one.
        """
        name, _, value = line[1:].strip().partition(" ")
        try:
            if name == "quit":
                return False
            if name == "reset":
                self._turns = []
            elif name == "system":
                self._system = value.strip() or None
            elif name == "temperature":
                self._params = replace(self._params, temperature=float(value))
            elif name == "max-tokens":
                self._params = replace(self._params, max_tokens=int(value))
            elif name == "help":
                _say(HELP)
            else:
                raise ConfigError(f"there is no command /{name}; there are {HELP}")
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"/{name} needs a number, not {value!r}") from None
        return True

    def answer(self, text: str, *, as_json: bool) -> None:
        """Shows the model's answer as it comes, and remembers both."""
        self._turns.append({"role": "user", "content": text})
        try:
            reply, result = self._generate(show=not as_json)
        except BaseException:
            self._turns.pop()
            raise
        self._turns.append({"role": "assistant", "content": reply})
        if as_json:
            print_json({"prompt": text, "text": reply, **result})
        elif result["tokens_per_second"]:
            _say(f"{result['tokens']} tokens, {result['tokens_per_second']} tokens/s")

    def _generate(self, *, show: bool) -> tuple[str, dict[str, Any]]:
        prompt, params = self._fitting()
        reply, tokens, reason, first, last = "", 0, "interrupted", 0.0, 0.0
        stream = self._llm.stream([prompt], params)
        try:
            for piece in stream:
                if piece.error is not None:
                    raise InferenceError(piece.error)
                text = piece.text.lstrip() if not reply else piece.text
                reply += text
                tokens += piece.token_id is not None
                reason = piece.finish_reason or reason
                last = time.perf_counter()
                first = first or last
                if show:
                    write(text)
        except KeyboardInterrupt:  # the answer ends here; the conversation goes on
            stream.close()  # type: ignore[attr-defined]
        if show:
            write("\n")
        speed = round((tokens - 1) / (last - first), 1) if last > first else None
        return reply.strip(), {"tokens": tokens, "finish_reason": reason, "tokens_per_second": speed}

    def _fitting(self) -> tuple[str | list[int], SamplingParams]:
        """The prompt of the conversation, without its oldest turns where it is too long."""
        while True:
            asked = self._llm.chat_prompt(self._messages())
            params = replace(
                self._params,
                seed=(self._params.seed + len(self._turns) // 2) % (1 << 63),
                stop=asked.stop,
                stop_token_ids=asked.stop_token_ids,
            )
            try:
                self._llm.check(asked.prompt, params)
                return asked.prompt, params
            except CapacityError:
                if len(self._turns) < 3:
                    raise
                del self._turns[:2]
                _say("The conversation is longer than the model's context: its oldest turn is forgotten.")

    def _messages(self) -> list[dict[str, str]]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return system + self._turns


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        for number, line in enumerate(sys.stdin.buffer, 1):
            try:
                yield line.decode().rstrip("\r\n")
            except UnicodeDecodeError:
                raise DataError(f"line {number} of the input is not UTF-8") from None
        return
    import readline  # noqa: F401  (gives input() its line editing)

    _say(HELP)
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def _say(text: str) -> None:
    status_console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)
