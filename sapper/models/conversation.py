"""A conversation in turns: messages in, answers out piece by piece, what was said before taken from the cache.

In: a model and a user's messages. Out: `Conversation`, whose `ask` gives a Generation. Holds: only tokens that the
session has not seen in this place are fed; after an answer that was broken off anywhere the conversation goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .chat import Message, render
from .errors import ModelError
from .generate import Generation
from .load import Loaded

DEFAULT_CONTEXT = 4096
ROOM = 4
"""A part of the context, one of so many, is kept for an answer, or what its limit says where that is less: else one
that comes when turns have all but filled it would break off after its first words."""


class Conversation:
    """messages: all turns so far. fed: how many tokens the last `ask` had to feed. dropped: turns left out, as the
    context was full; the oldest go first, the system message stays."""

    def __init__(
        self, model: Loaded, system: str | None = None, *, context: int | None = None, cache_dtype: str | None = None,
        threads: int | None = None, interpret: bool = False, speculate: bool = False,
    ) -> None:
        """context: tokens of the whole conversation (None: as many as the model can, but at most DEFAULT_CONTEXT).
        cache_dtype, speculate: as Model.session has them. Raises ModelError if the model has no chat template, or for a
        context that cannot be."""
        self.model = model
        self.session = model.session(min(model.positions, DEFAULT_CONTEXT) if context is None else context,
                                     cache_dtype=cache_dtype, threads=threads, interpret=interpret,
                                     speculate=speculate)
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        render(model.tokenizer, [*self._system, {"role": "user", "content": ""}])
        self.reset()

    def reset(self) -> None:
        """Forget what was said, but for the system message."""
        self.messages: list[Message] = list(self._system)
        self.fed = self.dropped = 0
        self._text = ""
        self._tokens: list[int] = []
        self.session.rewind(0)

    def ask(self, message: str, limit: int | None = None, **options: Any) -> Answer:
        """Ask; the answer joins the conversation as it comes. limit: tokens of the answer (None: as many as fit).
        options: of Generation. Raises ModelError if the message is too long for the context, or a setting is out of
        range; the conversation is then what it was."""
        before = self.messages, self._text, self._tokens, self.dropped
        try:
            return Answer(self, self._generation(message, limit, options))
        except BaseException:
            self.messages, self._text, self._tokens, self.dropped = before
            raise

    def _generation(self, message: str, limit: int | None, options: dict[str, Any]) -> Generation:
        known = self._tokens[: self.session.position]
        room = max(1, min(limit or self.session.context, self.session.context // ROOM))
        prompt = self._prompt([*self.messages, {"role": "user", "content": message}], room)
        same = next((i for i, (a, b) in enumerate(zip(known, prompt, strict=False)) if a != b),
                    min(len(known), len(prompt)))
        self.session.rewind(min(same, len(prompt) - 1))
        self.fed = len(prompt) - self.session.position
        return Generation(self.model, prompt, limit or self.session.context, session=self.session, **options)

    def _prompt(self, messages: list[Message], room: int) -> list[int]:
        """The tokens of the whole conversation, without its oldest turns where they leave no room for so many tokens of
        an answer. A message alone may leave less.

        Where the text goes on from what the session has, so do the tokens: those of an answer are the ones that were
        made, which the tokenizer might not find again.
        """
        tokenizer, size, known = self.model.tokenizer, self.session.context, self._text
        dropped, turns = 0, len(self._system)
        while True:
            text = render(tokenizer, messages)
            if known and text.startswith(known):
                tokens = self._tokens + tokenizer.encode(text[len(known) :], add_begin=False)
            else:
                tokens = tokenizer.encode(text)
            alone = len(messages) - turns < 3
            if len(tokens) + (1 if alone else room) <= size:
                self._text, self._tokens, self.messages = text, tokens, messages
                self.dropped += dropped
                return tokens
            if alone:
                raise ModelError("the message", f"{len(tokens)} tokens with what stands around it",
                                 f"fewer than {size}, the context", "say it in fewer words, or take a larger context")
            dropped += 1
            del messages[turns : turns + 2]

    def answered(self, made: Generation, text: str) -> None:
        """Keep an answer, whole or broken off."""
        self.messages.append({"role": "assistant", "content": text})
        self._tokens = made.prompt + made.tokens
        self._text = self._text + text if text == self.model.tokenizer.decode(made.tokens) else ""


class Answer:
    """Pieces of an answer; iterate once, to the end, or close it. generation: what makes them."""

    def __init__(self, conversation: Conversation, generation: Generation) -> None:
        self.generation = generation
        self._conversation = conversation
        self._pieces: list[str] = []
        self._closed = False

    def __iter__(self) -> Iterator[str]:
        for piece in self.generation:
            self._pieces.append(piece)
            yield piece
        self.close()

    def close(self) -> None:
        """Where it was broken off: what was said is said. At its end an answer closes itself."""
        if not self._closed:
            self._closed = True
            self._conversation.answered(self.generation, "".join(self._pieces))
