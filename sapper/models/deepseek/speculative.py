"""Speculative decoding with DeepSeek's MTP head: it drafts a token, and a step of two tokens finds whether it is right.

In: a DeepseekModel with its MTP head. Out: `Speculative`, a session whose `follow` gives one token or two. Holds: they
are those that a session without drafts would give, but for the rounding of kernels of two rows.

The head (head.py) foresees the token behind the next one:

    position          i        i + 1    i + 2
    main model        hidden   token    draft, right if the main model gives it at i + 1
                         \\_______/        /
                          row i __________/

Every token that is known gets its row: those of a prompt together, and each that follows on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...kernels import embedding, norm, sampling
from ...runtime.buffers import empty
from ...runtime.program import Program, Variable
from ..mixture import DenseWeights
from ..workspace import Sections, Steps
from .head import Head
from .session import F32, I32, Array
from .weights import AttentionWeights

PAIR = 2
"""Tokens of a step that verifies: the last one chosen, and the draft behind it."""


class Speculative(Head):
    """A session that drafts."""

    def __init__(self, model: Any, context: int | None = None, **options: Any) -> None:
        """As Session has it. Raises ModelError also for a model without an MTP head."""
        self.check_head(model)
        super().__init__(model, context, **options)
        self._make_head(model)
        self._hidden_start = 0
        """Position of the first token of which there is a hidden state."""
        self._predicted = 0
        """Rows that the head has seen."""
        self._fed: list[int] = []
        """The tokens up to the position."""
        self._nothing = empty((model.config.features,), F32)
        self._nothing[:] = 0.0
        self._pair_logits = empty((PAIR, self.vocabulary), F32)
        self._draft_logits, self._draft = empty((self.vocabulary,), F32), empty((1,), I32)
        self._programs: dict[str, Program] = {}

    # ---- tokens in

    def feed(self, tokens: Sequence[int]) -> None:
        self._check(tokens)
        if self._predicted < self.position:
            self._foresee(tokens[:1], draft=False)  # The last token fed before has a token behind it now.
        for start in range(0, len(tokens), self.chunk):
            self._feed_several(tokens[start : start + self.chunk])
            known = tokens[start + 1 : start + self.chunk + 1]
            if known:
                self._foresee(known, draft=False)

    def rewind(self, position: int) -> None:
        """As Session has it. Only the last run's hidden states are kept: the token before the position is run again,
        for the head to go on from."""
        before = self.position
        super().rewind(position)
        if position == before:
            return
        last = self._fed[max(position - 1, 0) : position]
        self.position -= len(last)
        self._predicted = self.position
        del self._fed[self.position :]
        if last:
            self._feed_several(last)

    def _feed_several(self, tokens: Sequence[int]) -> None:
        self._hidden_start = self.position
        self._fed += tokens
        super()._feed_several(tokens)

    def follow(self, token: int, choose: Callable[[Array], int]) -> list[int]:
        """Feed a chosen token; what `choose` gives for the one or two rows of logits behind it."""
        if self.position + PAIR > self.context:
            return super().follow(token, choose)
        draft = self._foresee((token,))
        self._fed.append(token)
        self._tokens[:PAIR] = token, draft
        self._hidden_start = self.position
        self._run("pair", self._pair_sections, **self._pair_values())
        self.drafted += 1
        chosen = [choose(self._pair_logits[0])]
        self.position += 1
        if chosen[0] == draft:
            self.accepted += 1
            self._fed.append(draft)
            self._foresee(chosen, draft=False)
            chosen.append(choose(self._pair_logits[1]))
            self.position += 1
        return chosen

    def _pair_values(self) -> dict[str, int]:
        """The values of the variables of _pair_sections."""
        values = self._chunk_values(PAIR) | {"second": self.position + 1}
        return {name: value for name, value in values.items() if name != "filled"}

    def _foresee(self, tokens: Sequence[int], draft: bool = True) -> int:
        """The head's next rows: `tokens` stand behind those that it has seen. Of one row the draft, if it is wanted."""
        count = len(tokens)
        first = self._predicted - self._hidden_start
        self._which[:count] = range(first, first + count)
        self._behind[:count] = tokens
        position, self._predicted = self._predicted, self._predicted + count
        if count > 1:
            values = self._routed_values(count, [self._head.layer])
            if not self._absorbs(self.chunk):   # as the program is for any number of rows
                values["filled"] = position + count
            self._run("rows", self._rows_sections, position=position, count=count, **values)
        elif draft:
            self._run("draft", self._draft_sections, position=position)
        else:
            self._run("row", self._row_sections, position=position)
        return int(self._draft[0])

    def _run(self, name: str, sections: Callable[[], Sections], **values: int) -> None:
        if name not in self._programs:
            self._programs[name] = self._program(sections())
        self._programs[name](**values)

    # ---- programs

    def prefill_sections(self) -> Sections:
        return [*super().prefill_sections(), ("hidden states", self._keep_hidden())]

    def _pair_sections(self) -> Sections:
        """Two tokens: as a chunk, but that each attends absorbed."""
        capacity, self._capacity = self._capacity, PAIR
        try:
            matrix, _, _ = self.head()
            logits = self._multiply("matmul_nt", self._hidden_states, [matrix], self._pair_logits)
            return [*self.chunk_sections(), ("logits of both tokens", self._keep_hidden() + logits)]
        finally:
            self._capacity = capacity

    def _meet(self, one: AttentionWeights, layer: int, position: Variable) -> Steps:
        if self._capacity != PAIR:
            return super()._meet(one, layer, position)
        indexer = self.model.config.indexer
        steps = self._compress(one, layer, position, self._rows)
        if one.index is not None and indexer is not None:
            steps += self._index(one.index, indexer, layer, self._rows, (position,), position)
        return [*steps, *self._meet_row(one, layer, 0, position),
                *self._meet_row(one, layer, 1, Variable("second", 1))]

    def _row_sections(self) -> Sections:
        """One row of the head."""
        head, epsilon, features = self._head, self.model.config.epsilon, self.model.config.features
        x, taken, inputs, feed_forward = self._x[:1], self._taken[:1], self._inputs[:1], head.layer.feed_forward
        joined: Steps = [
            (embedding.embedding_f32, (self._which[:1], self._hidden_states, taken)),
            (norm.rms_norm, (taken, head.hidden_gain, epsilon, inputs[:, features:])),
            *self.model.weights.embedding.look_up(self._behind[:1], x),
            (norm.rms_norm, (x, head.embedding_gain, epsilon, inputs[:, :features])),
            *head.join.apply_residual(inputs[0], self._nothing, x[0], self._work),
        ]
        number, position = self.model.config.layers, Variable("position", 0)
        return [
            ("head: inputs", joined), ("head: attention", self._attend_one(head.layer.attention, number, position)),
            ("head: feed-forward", self._dense_one(feed_forward) if isinstance(feed_forward, DenseWeights)
             else self._mixture_one(feed_forward)),
        ]

    def _draft_sections(self) -> Sections:
        logits = self.model.weights.logits.apply_norm(
            self._x[0], self._head.gain, self.model.config.epsilon, self._draft_logits, self._work)
        return [*self._row_sections(), ("head: draft", [
            *logits, (sampling.argmax_rows, (self._draft_logits.reshape(1, -1), self._draft))])]
