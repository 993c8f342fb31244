"""What clients may ask, as OpenAI's API names it, and as `SamplingParams` say it.

Types are strict: "5" is no number and true is no 1. An argument that is not known is refused, as a misspelt one would
change nothing and nobody would see it. Arguments of OpenAI's that have no meaning here are taken and do nothing.
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fastlm.errors import ConfigError
from fastlm.inference import SamplingParams
from fastlm.serve.errors import ApiError

MAX_STOPS = 16
MAX_STOP_LENGTH = 256  # characters
MAX_LOGPROBS = 20
MAX_BIASES = 1024
ANY_OBJECT = '{"type": "object"}'


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # has no meaning here


class JsonSchema(Strict):
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # the text always follows the schema


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('a "json_schema" goes with the type "json_schema"')
        return self

    def schema_text(self) -> str | None:
        if self.json_schema is not None:
            return json.dumps(self.json_schema.schema_)
        return ANY_OBJECT if self.type == "json_object" else None


class Ignored(Strict):
    """Arguments of OpenAI's that change nothing here."""

    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None


class Sampling(Ignored):
    """What completions and chat share."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=1 << 31)]] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, value: Any) -> Any:
        given = [value] if isinstance(value, str) else value
        if given is None:
            return None
        if not isinstance(given, list) or not all(isinstance(s, str) and s for s in given):
            raise ValueError("give a string that is not empty, or a list of them")
        if len(given) > MAX_STOPS:
            raise ValueError(f"there are {len(given)} strings; the limit is {MAX_STOPS}")
        if max(map(len, given), default=0) > MAX_STOP_LENGTH:
            raise ValueError(f"one has {max(map(len, given))} characters; the limit is {MAX_STOP_LENGTH}")
        return given

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _check_bias(cls, value: Any) -> Any:
        if isinstance(value, dict):
            if len(value) > MAX_BIASES:
                raise ValueError(f"it names {len(value)} tokens; the limit is {MAX_BIASES}")
            wrong = [k for k in value if not (k.isascii() and k.isdigit() and len(k) < 10)]
            if wrong:
                raise ValueError(f"it maps token ids to numbers, and {wrong[0][:50]!r} is no token id")
        return value

    @model_validator(mode="after")
    def _check_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options go with stream")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def params(self, *, max_tokens: int, logprobs: int | None, **more: Any) -> SamplingParams:
        """How to draw; with a seed of its own for each request that gives none."""
        schema = None if self.response_format is None else self.response_format.schema_text()
        stop = self.stop or ()
        values: dict[str, Any] = {
            "temperature": 1.0 if self.temperature is None else float(self.temperature),
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": 1.0 if self.repetition_penalty is None else float(self.repetition_penalty),
            "presence_penalty": float(self.presence_penalty or 0),
            "frequency_penalty": float(self.frequency_penalty or 0),
            "logit_bias": {int(token): float(bias) for token, bias in (self.logit_bias or {}).items()},
            "n": self.n or 1,
            "seed": secrets.randbits(62) if self.seed is None else self.seed,
            "stop": (stop,) if isinstance(stop, str) else tuple(stop),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "ignore_eos": bool(self.ignore_eos),
            "min_tokens": self.min_tokens or 0,
            "max_tokens": max_tokens,
            "logprobs": logprobs,
            "json_schema": schema,
        }
        try:
            return SamplingParams(**{**values, **more})
        except ConfigError as error:
            raise ApiError(400, str(error)) from None


class CompletionRequest(Sampling):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: str | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_prompt(cls, value: Any) -> Any:
        check_prompt(value)
        return value

    @model_validator(mode="after")
    def _check_served(self) -> CompletionRequest:
        if self.suffix:
            raise ValueError("suffix is not served: the model continues texts, it does not fill them in")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is served only where it equals n")
        if self.echo and self.logprobs is not None and (self.n or 1) > 1:
            raise ValueError("echo with logprobs is served for n = 1")
        return self

    def prompts(self) -> list[str | list[int]]:
        return list_of_texts(self.prompt)


class EmbeddingRequest(Ignored):
    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    pooling: Literal["mean", "last"] = "mean"

    @field_validator("input", mode="before")
    @classmethod
    def _check_input(cls, value: Any) -> Any:
        check_prompt(value)
        return value

    def texts(self) -> list[str | list[int]]:
        return list_of_texts(self.input)


class FunctionCall(Strict):
    name: str
    arguments: str


class ToolCallMessage(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(BaseModel):
    """A message of a conversation. What clients send back of an answer, such as "refusal", is taken along."""

    model_config = ConfigDict(strict=True, extra="ignore")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCallMessage] | None = None
    tool_call_id: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _check_content(cls, value: Any) -> Any:
        if value is None or isinstance(value, str):
            return value
        texts = isinstance(value, list) and all(
            isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in value
        )
        if not texts:
            raise ValueError(
                'give a string, or a list of parts {"type": "text", "text": "…"}; the model reads text alone'
            )
        return value

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part["text"] for part in self.content)
        return self.content or ""


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class ToolChoice(Strict):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None  # has no meaning here

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs go with logprobs")
        named = self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else None
        if named is not None and named not in [tool.function.name for tool in self.tools or ()]:
            raise ValueError(f"tool_choice names the function {named[:64]!r}, which is not among the tools")
        if self.tool_choice == "required" and not self.tools:
            raise ValueError("tool_choice asks for a tool, and there are none")
        return self


def check_prompt(value: Any) -> None:
    """Raises ValueError unless `value` is a text, token ids, or a list of such."""
    if isinstance(value, str) or _is_ids(value):
        return
    if not isinstance(value, list) or not value:
        raise ValueError("give a text, a list of token ids, or a list of such")
    if not (all(isinstance(v, str) for v in value) or all(_is_ids(v) for v in value)):
        raise ValueError("give a text, a list of token ids (integers from 0 on), or a list of such, all of one kind")


def list_of_texts(value: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """What `check_prompt` took, as a list."""
    if isinstance(value, str) or _is_ids(value):
        return [value]  # type: ignore[list-item]
    return value  # type: ignore[return-value]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int and 0 <= i < 1 << 31 for i in value)
