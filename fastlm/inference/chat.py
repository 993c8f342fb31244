"""From a conversation to a prompt, by the chat template that a model was tuned with, or as a plain transcript."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastlm.errors import ConfigError, TokenizerError
from fastlm.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]
ROLES = ("system", "user", "assistant")
NAMES = {"user": "User", "assistant": "Assistant"}  # in a transcript
MARK = "fastlm-mark-of-an-answer"  # stands for an answer, to see what a template puts behind it


@dataclass(frozen=True)
class ChatPrompt:
    """What to continue, and what ends the answer."""

    prompt: str | list[int]
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


def chat_prompt(tokenizer: Tokenizer, messages: Messages) -> ChatPrompt:
    """The prompt after which a model writes the assistant's next message.

    With a chat template, it is the template's text; the answer ends with the special token that the template puts
    behind one. Without, as for a model that was never tuned to chat, it is a transcript of "User:" and "Assistant:".

    Args:
        messages: mappings with "role" (system, user or assistant) and "content".

    Raises:
        ConfigError: a message has another form, spells a special token of the tokenizer (which would let its author
            speak for others), or the template refuses the conversation.
    """
    _check(messages)
    template = tokenizer.settings.chat_template
    if template is None:
        return ChatPrompt(_transcript(messages), stop=(f"\n{NAMES['user']}:",))
    for message in messages:
        try:
            tokenizer.encode(message["content"])
        except TokenizerError as error:
            raise ConfigError(f"a message must not spell a special token: {error}") from None
    ids = tokenizer.encode(_render(tokenizer, template, messages, add_generation_prompt=True), allowed_special="all")
    return ChatPrompt(ids, stop_token_ids=_turn_end(tokenizer, template, messages))


def _check(messages: Messages) -> None:
    if not messages:
        raise ConfigError("a conversation needs at least one message")
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise ConfigError(f'a message must have a "role" of {", ".join(ROLES)} and a string "content"')


def _transcript(messages: Messages) -> str:
    lines = []
    for message in messages:
        content = message["content"].strip()
        lines.append(content + "\n" if message["role"] == "system" else f"{NAMES[message['role']]}: {content}")
    return "\n".join([*lines, f"{NAMES['assistant']}:"])


def _turn_end(tokenizer: Tokenizer, template: str, messages: Messages) -> tuple[int, ...]:
    """The special token that the template puts behind an answer."""
    answered = [*messages, {"role": "assistant", "content": MARK}]
    behind = _render(tokenizer, template, answered, add_generation_prompt=False).rpartition(MARK)[2]
    special = set(tokenizer.special_tokens.values())
    return tuple(id for id in tokenizer.encode(behind, allowed_special="all") if id in special)[:1]


def _render(tokenizer: Tokenizer, template: str, messages: Messages, *, add_generation_prompt: bool) -> str:
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
            add_generation_prompt=add_generation_prompt,
            bos_token=settings.bos_token or "",
            eos_token=settings.eos_token or "",
        )
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ConfigError(f"the chat template does not take this conversation: {error}") from None


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
