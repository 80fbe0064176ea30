"""Generation: a prompt in, text out piece by piece, with the times that it took.

In: a model and a prompt. Out: `Generation`, an iterator over pieces of text. Holds: the same seed gives the same
tokens; every piece is whole characters.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from .chat import Message, render
from .errors import ModelError
from .load import Loaded
from .sampling import Sampling
from .session import BaseSession
from .stops import StopStrings
from .tokenizer import TextStream

CONTEXT_STEP = 256


def prompt_tokens(model: Loaded, prompt: str, raw: bool = False, system: str | None = None) -> list[int]:
    """The tokens of a prompt. raw: the text as it is; otherwise as a user's message in the model's chat template, after
    a system message if one is given. A model without a template takes the prompt raw.
    """
    tokenizer = model.tokenizer
    if raw or not tokenizer.chat_template:
        return tokenizer.encode(prompt)
    messages: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    return tokenizer.encode(render(tokenizer, [*messages, {"role": "user", "content": prompt}]))


class Generation:
    """Pieces of text, one for each token, "" where a token completes no character, or what may yet become a string to
    stop at; iterate once.

    tokens: those made so far, without the one that ended it. prompt_count. stop: "" while it runs, then "end" (the
    model ended), "stop" (a string to stop at), "length" (the limit of tokens) or "context" (no more fit).
    prefill_seconds: of the prompt, up to the first token; decode_seconds: from there on; both without loading.
    """

    def __init__(
        self, model: Loaded, prompt: Sequence[int], limit: int, *, temperature: float = 0.0, top_k: int = 40,
        top_p: float = 1.0, min_p: float = 0.0, seed: int = 0, stop: Sequence[str] = (), threads: int | None = None,
        interpret: bool = False, cache_dtype: str | None = None, speculate: bool = False,
        session: BaseSession | None = None,
    ) -> None:
        """speculate: draft with the model's MTP head. session: one that has seen the first tokens of the prompt, as
        many as its position says, but not the last (None: a new one). stop: strings that end the text, which is cut
        before them. Raises ModelError if the prompt is empty or too long, or a setting is out of range."""
        positions = model.positions
        if limit < 1:
            raise ModelError("the number of tokens", str(limit), "at least 1")
        if len(prompt) > positions:
            raise ModelError("the prompt", f"{len(prompt)} tokens", f"at most {positions}, {model.limit}")
        self.sampling = Sampling(temperature, top_k, top_p, min_p, seed)
        self.sampling.check()
        wanted = len(prompt) + limit
        context = min(positions, -(-wanted // CONTEXT_STEP) * CONTEXT_STEP)
        self.session = session or model.session(
            context, cache_dtype=cache_dtype, threads=threads, interpret=interpret, speculate=speculate)
        self.model = model
        self.prompt = list(prompt)
        self.limit = limit
        self.tokens: list[int] = []
        self.stop = ""
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self._stops = StopStrings(stop)
        self._random = self.sampling.draws()
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

    def _pick(self, logits: Any = None) -> int:
        s = self.sampling
        return self.session.pick(
            s.temperature, s.top_k, self._random.random(), top_p=s.top_p, min_p=s.min_p, logits=logits)

    def _run(self) -> Iterator[str]:
        session, ends, strings = self.session, self.model.tokenizer.stops, self._stops
        stream = TextStream(self.model.tokenizer)
        started = time.perf_counter()
        session.feed(self.prompt[session.position :])
        chosen = [self._pick()]
        self.prefill_seconds = time.perf_counter() - started
        while True:
            token = chosen.pop(0)
            if token in ends:
                self.stop = "end"
                break
            self.tokens.append(token)
            yield strings.push(stream.push(token))
            if strings.met:
                self.stop = "stop"
                break
            if len(self.tokens) == self.limit:
                self.stop = "length"
                break
            if chosen:
                continue
            if session.position == session.context:
                self.stop = "context"
                break
            started = time.perf_counter()
            chosen = session.follow(token, self._pick)
            self.decode_seconds += time.perf_counter() - started
        rest = strings.push(stream.finish()) + strings.finish()
        if rest:
            yield rest


def generate(
    model: Loaded, prompt: str, tokens: int = 128, *, raw: bool = False, system: str | None = None, **options: Any
) -> Generation:
    """Generate text: `for piece in generate(model, "Hello"): print(piece, end="")`. See Generation, prompt_tokens."""
    return Generation(model, prompt_tokens(model, prompt, raw, system), tokens, **options)
