"""Generation: a prompt in, text out piece by piece, with the times that it took.

In: a Model and a prompt. Out: `Generation`, an iterator over pieces of text. Holds: the same seed gives the same
tokens; every piece is whole characters.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

from .chat import Message, render
from .errors import ModelError
from .load import Model
from .tokenizer import TextStream

CONTEXT_STEP = 256


def prompt_tokens(model: Model, prompt: str, raw: bool = False, system: str | None = None) -> list[int]:
    """The tokens of a prompt. raw: the text as it is; otherwise as a user's message in the model's chat template, after
    a system message if one is given. A model without a template takes the prompt raw.
    """
    tokenizer = model.tokenizer
    if raw or not tokenizer.chat_template:
        return tokenizer.encode(prompt)
    messages: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    return tokenizer.encode(render(tokenizer, [*messages, {"role": "user", "content": prompt}]))


class Generation:
    """Pieces of text, one for each token, "" where a token completes no character; iterate once.

    tokens: those made so far, without the one that ended it. prompt_count. stop: "" while it runs, then "end" (the
    model ended), "length" (the limit of tokens) or "context" (no more fit). prefill_seconds: of the prompt, up to the
    first token; decode_seconds: from there on; both without loading.
    """

    def __init__(
        self, model: Model, prompt: Sequence[int], limit: int, *, temperature: float = 0.0, top_k: int = 40,
        seed: int = 0, threads: int | None = None, interpret: bool = False, cache_dtype: str = "f32",
    ) -> None:
        """Raises ModelError if the prompt is empty or too long, or a setting is out of range."""
        positions = model.positions
        if limit < 1:
            raise ModelError("the number of tokens", str(limit), "at least 1")
        if len(prompt) > positions:
            raise ModelError("the prompt", f"{len(prompt)} tokens", f"at most {positions}, all that the model can")
        wanted = len(prompt) + limit
        context = min(positions, -(-wanted // CONTEXT_STEP) * CONTEXT_STEP)
        self.session = model.session(context, cache_dtype=cache_dtype, threads=threads, interpret=interpret)
        self.model = model
        self.prompt = list(prompt)
        self.limit = limit
        self.temperature = temperature
        self.top_k = top_k
        self.tokens: list[int] = []
        self.stop = ""
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self._random = random.Random(seed)
        self._pieces = self._run()

    @property
    def prompt_count(self) -> int:
        return len(self.prompt)

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt per second."""
        return len(self.prompt) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens after the first one per second."""
        return max(0, len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds else 0.0

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def _pick(self) -> int:
        return self.session.pick(self.temperature, self.top_k, self._random.random())

    def _run(self) -> Iterator[str]:
        session, stops = self.session, self.model.tokenizer.stops
        stream = TextStream(self.model.tokenizer)
        started = time.perf_counter()
        session.feed(self.prompt)
        token = self._pick()
        self.prefill_seconds = time.perf_counter() - started
        while True:
            if token in stops:
                self.stop = "end"
                break
            self.tokens.append(token)
            yield stream.push(token)
            if len(self.tokens) == self.limit:
                self.stop = "length"
                break
            if session.position == session.context:
                self.stop = "context"
                break
            started = time.perf_counter()
            session.feed((token,))
            token = self._pick()
            self.decode_seconds += time.perf_counter() - started
        rest = stream.finish()
        if rest:
            yield rest


def generate(
    model: Model, prompt: str, tokens: int = 128, *, temperature: float = 0.0, top_k: int = 40, seed: int = 0,
    raw: bool = False, system: str | None = None, threads: int | None = None, interpret: bool = False,
    cache_dtype: str = "f32",
) -> Generation:
    """Generate text: `for piece in generate(model, "Hello"): print(piece, end="")`. See Generation, prompt_tokens."""
    return Generation(
        model, prompt_tokens(model, prompt, raw, system), tokens, temperature=temperature, top_k=top_k, seed=seed,
        threads=threads, interpret=interpret, cache_dtype=cache_dtype,
    )
