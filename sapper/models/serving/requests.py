"""What a client asks for, checked: JSON of /v1/completions and /v1/chat/completions.

In: the bytes of a body. Out: `Request`. Holds: what would change the answer and is not there is refused, never ignored;
every mistake is a RequestError with the status and the words that the client gets.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..chat import Message, render
from ..errors import ModelError
from ..load import Loaded
from ..sampling import CANDIDATES, Sampling

MAX_STOPS, MAX_STOP_CHARACTERS, MAX_MESSAGES = 16, 200, 1000
DEFAULT_TOKENS = 16
"""Of a completion, as OpenAI's reference says; a chat goes on to the end of the context."""
HARMLESS = frozenset(("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"))
"""Fields that change nothing here."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "logprobs": (False, 0), "top_logprobs": (0,), "echo": (False,), "suffix": ("",), "tools": ([],),
    "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},), "parallel_tool_calls": (True, False),
    "functions": ([],), "modalities": (["text"],),
}
"""Fields that may be given only with a value that changes nothing (or null)."""


class RequestError(Exception):
    """status: of HTTP. kind, code: as OpenAI's errors have them. parameter: the field at fault."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None,
                 parameter: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.parameter = status, kind, code, parameter

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.parameter, "code": self.code}}


@dataclass(frozen=True, slots=True)
class Request:
    """chat: whether it came as messages. tokens: of the prompt. usage: whether a stream ends with the counts."""

    chat: bool
    tokens: list[int]
    limit: int
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    usage: bool


def parse(body: bytes, chat: bool, model: Loaded, name: str, context: int, most_tokens: int) -> Request:
    """A request. name: of the model. context: tokens of prompt and answer. most_tokens: of an answer. Raises
    RequestError."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body: found no JSON ({error}); expected an object") from None
    if not isinstance(values, dict):
        raise RequestError(400, f"the body: found a {type(values).__name__}; expected an object")
    fields = _Fields(values)
    wanted = fields.text("model", name)
    if wanted != name:
        raise RequestError(404, f"found no model {wanted[:80]!r}; expected {name!r}", code="model_not_found",
                           parameter="model")
    stream = fields.flag("stream")
    options = fields.take("stream_options", {})
    if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
        raise fields.wrong("stream_options", options, '{"include_usage": true or false}')
    try:
        tokens = _chat_tokens(fields, model) if chat else _prompt_tokens(fields, model)
    except ModelError as error:
        raise RequestError(400, str(error), parameter="messages" if chat else "prompt") from None
    room = context - len(tokens)
    if room < 1:
        raise RequestError(400, f"the prompt: found {len(tokens)} tokens; expected fewer than {context}, the context",
                           code="context_length_exceeded", parameter="messages" if chat else "prompt")
    limit = fields.whole("max_tokens", 1, 2**31, None)
    limit = fields.whole("max_completion_tokens", 1, 2**31, limit)
    if limit is None:
        limit = room if chat else DEFAULT_TOKENS
    seed = fields.whole("seed", -(2**63), 2**64, None)
    sampling = Sampling(
        fields.real("temperature", 0.0, 1e3, 1.0), fields.whole("top_k", 1, CANDIDATES, 40) or 40,
        fields.real("top_p", 1e-9, 1.0, 1.0), fields.real("min_p", 0.0, 1.0, 0.0),
        random.SystemRandom().getrandbits(63) if seed is None else seed,
    )
    stop = _stops(fields)
    fields.finish()
    return Request(chat, tokens, min(limit, room, most_tokens), sampling, stop, stream,
                   bool(options.get("include_usage", False)))


class _Fields:
    """The fields of a body, each taken once."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {name: value for name, value in values.items() if value is not None}

    @staticmethod
    def wrong(name: str, found: Any, expected: str) -> RequestError:
        return RequestError(400, f"{name}: found {repr(found)[:80]}; expected {expected}", parameter=name)

    def take(self, name: str, default: Any) -> Any:
        return self._values.pop(name, default)

    def text(self, name: str, default: str) -> str:
        value = self.take(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def whole(self, name: str, low: int, high: int, default: int | None) -> int | None:
        value = self.take(name, default)
        if value is not default and (type(value) is not int or not low <= value <= high):
            raise self.wrong(name, value, f"a whole number from {low} to {high}")
        return value

    def real(self, name: str, low: float, high: float, default: float) -> float:
        value = self.take(name, default)
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.wrong(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def finish(self) -> None:
        """Raises RequestError for a field that is left."""
        for name, value in self._values.items():
            if name in HARMLESS:
                continue
            if name not in NEUTRAL:
                shown = name[:80].encode("utf-8", "replace").decode()  # JSON may say half a surrogate
                raise RequestError(400, f"found the field {shown!r}; expected one that this server knows",
                                   parameter=shown)
            if value not in NEUTRAL[name]:
                neutral = " or ".join(json.dumps(one) for one in NEUTRAL[name])
                raise self.wrong(name, value, f"{neutral}, as this server has nothing else")


def _prompt_tokens(fields: _Fields, model: Loaded) -> list[int]:
    prompt = fields.take("prompt", "")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        wrong = [token for token in prompt if not 0 <= token < model.tokenizer.size]
        if wrong:
            raise fields.wrong("prompt", wrong[0], f"tokens from 0 to {model.tokenizer.size - 1}")
        return list(prompt)
    if not isinstance(prompt, str):
        raise fields.wrong("prompt", prompt, "a string, or a list of tokens")
    tokens = model.tokenizer.encode(prompt)
    if not tokens:
        raise fields.wrong("prompt", prompt, "a text that is not empty")
    return tokens


def _chat_tokens(fields: _Fields, model: Loaded) -> list[int]:
    messages = fields.take("messages", [])
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        raise fields.wrong("messages", messages, f"a list of 1 to {MAX_MESSAGES} messages")
    return model.tokenizer.encode(render(model.tokenizer, [_message(fields, one) for one in messages]))


def _message(fields: _Fields, message: Any) -> Message:
    expected = '{"role": "system", "user" or "assistant", "content": text}'
    if not isinstance(message, dict) or message.get("role") not in ("system", "developer", "user", "assistant"):
        raise fields.wrong("messages", message, expected)
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
                 for part in content]
        content = "".join(part for part in parts if isinstance(part, str)) \
            if all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str):
        raise fields.wrong("messages", message, f"{expected}; this server knows no other parts than text")
    role = "system" if message["role"] == "developer" else message["role"]
    return {"role": role, "content": content}


def _stops(fields: _Fields) -> tuple[str, ...]:
    stop = fields.take("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(
            isinstance(one, str) and 1 <= len(one) <= MAX_STOP_CHARACTERS for one in stops):
        raise fields.wrong("stop", stop, f"a string or at most {MAX_STOPS}, of 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(stops)
