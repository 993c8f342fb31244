"""Calls of tools: what a model may write, and finding them in what it wrote.

Models write calls as their chat templates show them. Three forms are known: objects between <tool_call> and
</tool_call> (Hermes, Qwen), a list after [TOOL_CALLS] (Mistral), and an object that is the whole answer (Llama 3); this
last serves templates that show none of these, too.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from fastlm.serve.protocol import Tool

OPENING = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
ARGUMENTS = ("arguments", "parameters")  # Llama 3 calls them parameters


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: str  # JSON

    def to_json(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def forced_schema(tools: list[Tool], name: str | None) -> str:
    """The schema of an answer that is one call: of the tool `name`, or of any."""
    definitions: dict[str, Any] = {}
    options = []
    for tool in tools:
        if name not in (None, tool.function.name):
            continue
        arguments = dict(tool.function.parameters or {"type": "object"})
        definitions |= arguments.pop("$defs", {})  # references look for them at the root
        options.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    # Without this, a model may go on with spaces until its tokens are used up.
    compact = {"x-guidance": {"whitespace_flexible": False}}
    return json.dumps({**compact, "anyOf": options, "$defs": definitions})


class ToolParser:
    """Splits an answer, as it comes, into what is said and what is called.

    What stands before the first call is passed on at once. From a call's opening on, and where an answer begins with a
    brace, everything is held until the end.
    """

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self._held = ""
        self._said = False
        self._calling = False

    def push(self, text: str) -> str:
        """What of the answer is certain to be said, and not a call."""
        self._held += text
        if self._calling:
            return ""
        if not self._said and self._held.lstrip()[:1] in ("", "{"):
            self._calling = self._held.lstrip()[:1] == "{"
            return ""
        found = min((i for i in (self._held.find(mark) for mark in OPENING) if i >= 0), default=None)
        if found is not None:
            self._calling = True
            said, self._held = self._held[:found], self._held[found:]
            return said if said.strip() else ""
        keep = max(_overlap(self._held, mark) for mark in OPENING)
        said, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._said = self._said or bool(said.strip())
        return said

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest of what is said, and the calls."""
        calls = self._calls(self._held) if self._calling else []
        return ("", calls) if calls else (self._held, [])

    def _calls(self, text: str) -> list[ToolCall]:
        for mark in (*OPENING, "</tool_call>"):
            text = text.replace(mark, " ")
        decoder = json.JSONDecoder()
        calls: list[ToolCall] = []
        place = 0
        while (place := _after_space(text, place)) < len(text):
            try:
                value, place = decoder.raw_decode(text, place)
            except (ValueError, RecursionError):
                return []
            for item in value if isinstance(value, list) else [value]:
                call = self._call(item)
                if call is None:
                    return []
                calls.append(call)
        return calls

    def _call(self, item: Any) -> ToolCall | None:
        if not isinstance(item, dict) or item.get("name") not in self._names:
            return None
        arguments = next((item[key] for key in ARGUMENTS if isinstance(item.get(key), dict)), None)
        return None if arguments is None else ToolCall(item["name"], json.dumps(arguments, ensure_ascii=False))


def _after_space(text: str, place: int) -> int:
    while place < len(text) and (text[place].isspace() or text[place] in ";,"):
        place += 1
    return place


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
