"""The MTP head as kernels of a session: from hidden states of the main model, and the tokens behind them, to its rows.

In: a model with a predictor. Out: `Head`, a base of sessions that draft (speculative.py, and speculative_batch.py for
several sequences). Holds: the head's layer stands behind the main model's in the cache.

Row i of the head takes the main model's hidden state at position i (after the last norm) and the token at i + 1,
attends to its own cache, in which it stands at position i, and foresees the token at i + 2 (DeepSeek-V3, 2024,
section 2.2, equations 21 to 23).
"""

from __future__ import annotations

from typing import Any

from ...kernels import embedding, norm
from ...runtime.buffers import empty
from ...runtime.program import Variable
from ..errors import ModelError
from ..mixture import DenseWeights
from ..workspace import Sections, Steps
from .session import F32, I32, Session
from .weights import PredictorWeights


class Head(Session):
    """drafted, accepted: counts of drafts since the beginning."""

    def _make_head(self, model: Any) -> None:
        """The head's buffers, once the session has its own."""
        self.drafted = self.accepted = 0
        self._head: PredictorWeights = model.weights.predictor
        features = model.config.features
        self._hidden_states = empty((self.chunk, features), F32)
        """Of the main model's last run."""
        self._which, self._behind = (empty((self.chunk,), I32) for _ in range(2))
        """Of each row of the head: the row of its hidden state, and the token behind it."""
        self._taken, self._inputs = empty((self.chunk, features), F32), empty((self.chunk, 2 * features), F32)

    @staticmethod
    def check_head(model: Any) -> None:
        """Raises ModelError for a model without an MTP head."""
        if model.weights.predictor is None:
            raise ModelError("the model", "no MTP head", "one, to draft with", "load it with predictor=True")

    @property
    def _cached_layers(self) -> int:
        return self.model.config.layers + 1

    def _keep_hidden(self) -> Steps:
        _, gain, epsilon = self.head()
        return [(norm.rms_norm, (self._rows(self._x), gain, epsilon, self._rows(self._hidden_states)))]

    def _rows_sections(self) -> Sections:
        """Rows of the head, to `_x`."""
        rows, head, epsilon = self._rows, self._head, self.model.config.epsilon
        features, feed_forward = self.model.config.features, head.layer.feed_forward
        joined: Steps = [
            (embedding.embedding_f32, (rows(self._which), self._hidden_states, rows(self._taken))),
            (norm.rms_norm, (rows(self._taken), head.hidden_gain, epsilon, rows(self._inputs[:, features:]))),
            *self._look_up(self.model.weights.embedding, self._x, self._behind),
            (norm.rms_norm, (rows(self._x), head.embedding_gain, epsilon, rows(self._inputs[:, :features]))),
            *self._multiply("matmul_nt", self._inputs, [head.join], self._x), *self._cut(),
        ]
        number, position = self.model.config.layers, Variable("position", 0)
        return [
            ("head: inputs", joined), ("head: attention", self._attend(head.layer.attention, number, position)),
            ("head: feed-forward", self._dense(feed_forward) if isinstance(feed_forward, DenseWeights)
             else self._mixture(feed_forward)),
        ]
