"""From a conversation to a prompt, by the chat template that a model was tuned with, or as a plain transcript."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastlm.errors import ConfigError, TokenizerError
from fastlm.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
ROLES = ("system", "user", "assistant", "tool")
NAMES = {"user": "User", "assistant": "Assistant"}  # in a transcript
MARK = "fastlm-mark-of-an-answer"  # stands for an answer, to see what a template puts behind it


@dataclass(frozen=True)
class ChatPrompt:
    """What to continue, and what ends the answer."""

    prompt: str | list[int]
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


def chat_prompt(tokenizer: Tokenizer, messages: Messages, tools: Tools = ()) -> ChatPrompt:
    """The prompt after which a model writes the assistant's next message.

    With a chat template, it is the template's text; the answer ends with the special token that the template puts
    behind one. Without, as for a model that was never tuned to chat, it is a transcript of "User:" and "Assistant:".

    Args:
        messages: mappings with "role" (system, user, assistant or tool) and "content"; an assistant's may have
            "tool_calls", whose arguments are mappings.
        tools: what the assistant may call, as OpenAI's API describes it, for templates that know tools.

    Raises:
        ConfigError: a message has another form, spells a special token of the tokenizer (which would let its author
            speak for others), or the template refuses the conversation, or knows no tools.
    """
    _check(messages)
    template = tokenizer.settings.chat_template
    if tools and (template is None or "tools" not in template):
        raise ConfigError("the model's chat template knows no tools: it was not tuned to call any")
    if template is None:
        return ChatPrompt(_transcript(messages), stop=(f"\n{NAMES['user']}:",))
    for text in _strings([*messages, *tools]):
        try:
            tokenizer.encode(text)
        except TokenizerError as error:
            raise ConfigError(f"a message must not spell a special token: {error}") from None
    rendered = _render(tokenizer, template, messages, tools, add_generation_prompt=True)
    ids = tokenizer.encode(rendered, allowed_special="all")
    return ChatPrompt(ids, stop_token_ids=_turn_end(tokenizer, template, messages))


def _check(messages: Messages) -> None:
    if not messages:
        raise ConfigError("a conversation needs at least one message")
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise ConfigError(f'a message must have a "role" of {", ".join(ROLES)} and a string "content"')


def _strings(value: Any) -> Iterator[str]:
    """Every string in what a client gave, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _transcript(messages: Messages) -> str:
    if any(message["role"] == "tool" for message in messages):
        raise ConfigError("the model has no chat template, and so knows no tools")
    lines = []
    for message in messages:
        content = message["content"].strip()
        lines.append(content + "\n" if message["role"] == "system" else f"{NAMES[message['role']]}: {content}")
    return "\n".join([*lines, f"{NAMES['assistant']}:"])


def _turn_end(tokenizer: Tokenizer, template: str, messages: Messages) -> tuple[int, ...]:
    """The special token that the template puts behind an answer."""
    answered = [*messages, {"role": "assistant", "content": MARK}]
    behind = _render(tokenizer, template, answered, (), add_generation_prompt=False).rpartition(MARK)[2]
    special = set(tokenizer.special_tokens.values())
    return tuple(id for id in tokenizer.encode(behind, allowed_special="all") if id in special)[:1]


def _render(
    tokenizer: Tokenizer, template: str, messages: Messages, tools: Tools, *, add_generation_prompt: bool
) -> str:
    """What transformers' `apply_chat_template` renders. The template comes with a model's files, so it runs in
    jinja2's sandbox."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    settings = tokenizer.settings
    try:
        return environment.from_string(template).render(
            messages=[dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            add_generation_prompt=add_generation_prompt,
            bos_token=settings.bos_token or "",
            eos_token=settings.eos_token or "",
        )
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise ConfigError(f"the chat template does not take this conversation: {error}") from None


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
