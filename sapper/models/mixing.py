"""The feed-forward parts of layers in a session's programs: dense ones and mixtures of experts.

In: weights (mixture.py). Out: `Mixing`, the base of the sessions of architectures that have either. Holds: a token
reads the weights of the experts that it goes through, and of no others.

    y ─┬─ norm, gate, up ── SwiGLU ── down, + y ── x                               dense layers
       └─ norm ─┬─ router ── gate ─┬─ experts: SwiGLU, weighted sum, + y ── x      mixtures
                └──────────────────┘    (of shared experts that stand apart the sum begins with y + theirs)

Programs for several tokens have variables `routed_N` (count * N, where a token takes N experts: those of a layer).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..kernels import embedding, gate, moe, narrow
from ..runtime.program import Rows, Variable
from .mixture import DenseWeights, Mixture, MixtureWeights
from .rounded import as_bf16
from .session import BaseSession
from .workspace import Steps

Array = np.ndarray[Any, np.dtype[Any]]
F32, I32 = np.dtype(np.float32), np.dtype(np.int32)
FeedForward = DenseWeights | MixtureWeights


class Mixing(BaseSession):
    """Of its config: `features`, `epsilon`, `mixture`; of its layers: `feed_forward`. Its `_hidden` is wide enough for
    dense layers, and for shared experts that stand apart."""

    model: Any
    _hidden: Array
    _gathered: Array
    _expert_hidden: Array
    _expert_features: int

    @cached_property
    def _routed(self) -> dict[int, Variable]:
        """By how many experts a token goes through."""
        return {}

    def _make_mixture_buffers(self, rows: int, mixture: Mixture) -> None:
        taken, self._expert_features = mixture.taken, mixture.hidden
        self._scores = self._arena.empty((rows, mixture.groups, mixture.experts // mixture.groups), F32)
        self._experts, self._place = (self._arena.empty((rows, taken), I32) for _ in range(2))
        self._shares = self._arena.empty((rows, taken), F32)
        self._ranges = tuple(self._arena.empty((mixture.experts + mixture.shared,), I32) for _ in range(2))
        self._owners = self._arena.empty((rows * taken,), I32)
        self._between = self._arena.empty((rows, self.model.config.features), F32)

    def _mixture_turns(self, rows: int, mixture: Mixture) -> list[dict[str, tuple[int, ...]]]:
        """Extents of arrays in f32, by set: those of a set are in use together (BaseSession._take_turns)."""
        routed = rows * mixture.taken
        gathered: dict[str, tuple[int, ...]] = {"_gathered": (routed, moe.row_apart(self.model.config.features))}
        hidden: dict[str, tuple[int, ...]] = {"_expert_hidden": (routed, moe.row_apart(mixture.hidden))}
        return [gathered, hidden] if self._experts_copy() else [gathered | hidden]

    def _experts_copy(self) -> bool:
        """Whether all products of experts take their rows apart first: what they give may lie where these did."""
        parts: list[Any] = [layer.feed_forward for layer in self.model.weights.layers]
        return all(experts.copies for part in parts if isinstance(part, MixtureWeights)
                   for experts in (part.gate, part.up, part.down))

    def _routed_values(self, count: int, layers: Sequence[Any]) -> dict[str, int]:
        """How many rows the experts of these layers get of so many tokens."""
        mixtures = (one.feed_forward for one in layers if isinstance(one.feed_forward, MixtureWeights))
        return {self._routed_of(one).name: count * one.taken for one in mixtures}

    def _routed_of(self, one: MixtureWeights) -> Variable:
        if one.taken not in self._routed:
            self._routed[one.taken] = Variable(f"routed_{one.taken}", self.chunk * one.taken)
        return self._routed[one.taken]

    def _of_tokens(self, array: Array, one: MixtureWeights) -> Array:
        """Room for what each token has for each expert that it goes through. array: for the most."""
        return array.reshape(-1)[: len(array) * one.taken].reshape(len(array), one.taken)

    def _gate(self, one: MixtureWeights, rows: Any) -> Steps:
        """From scores to experts and their shares."""
        mixture = self.model.config.mixture
        assert mixture is not None
        settings = (mixture.kept, mixture.chosen, mixture.normalise, mixture.scale,
                    rows(self._of_tokens(self._experts, one)), rows(self._of_tokens(self._shares, one)))
        if one.bias is None:
            return [(gate.gate_softmax, (rows(self._scores), *settings))]
        return [(gate.gate_sigmoid, (rows(self._scores), one.bias.reshape(self._scores.shape[1:]), *settings))]

    # ---- one token

    def _feed_forward_one(self, number: int, one: FeedForward) -> tuple[str, Steps]:
        """y to x, with a heading."""
        if isinstance(one, DenseWeights):
            return f"layer {number}: feed-forward", self._dense_one(one)
        return f"layer {number}: mixture of experts", self._mixture_one(one)

    def _dense_one(self, one: DenseWeights, result: Array | None = None) -> Steps:
        """y to `result` (None: x)."""
        y, hidden, epsilon, work = self._y[0], self._hidden[0, : one.hidden], self.model.config.epsilon, self._work
        return [*one.gate.apply_norm_swiglu(one.up, y, one.gain, epsilon, hidden, work),
                *one.down.apply_residual(hidden, y, self._x[0] if result is None else result, work)]

    def _mixture_one(self, one: MixtureWeights) -> Steps:
        """y to x."""
        y, work = self._y[0], self._work
        steps: Steps = []
        if one.shared is not None:
            steps, y = self._dense_one(one.shared, self._between[0]), self._between[0]
        more, normed = work.norm(self._y[0], one.gain, self.model.config.epsilon)
        return [
            *steps, *more,
            *one.router.apply(normed, self._scores[0].reshape(-1), work),
            *self._gate(one, first),
            *self._experts_of_one(one, normed, y, self._x[0]),
        ]

    def _experts_of_one(self, one: MixtureWeights, normed: Array, y: Array, result: Array) -> Steps:
        """y, and what the experts that one token takes make of `normed`, to `result`."""
        experts, shares = (self._of_tokens(array, one)[0] for array in (self._experts, self._shares))
        hidden = self._expert_hidden.reshape(-1)[: one.taken * self._expert_features].reshape(one.taken, -1)
        return [*one.gate.apply_swiglu(one.up, experts, normed, hidden, self._work),
                *one.down.apply_weighted(experts, shares, hidden, y, result, self._work)]

    # ---- several tokens

    def _feed_forward(self, number: int, one: FeedForward) -> tuple[str, Steps]:
        """y to x, with a heading."""
        if isinstance(one, DenseWeights):
            return f"layer {number}: feed-forward", self._dense(one)
        return f"layer {number}: mixture of experts", self._mixture(one)

    def _dense(self, one: DenseWeights) -> Steps:
        """y to x, where it lies after its norm before."""
        normed = self._as_met(self._x, one.gate)
        return [*self._norm(self._y, one.gain, self.model.config.epsilon, normed),
                *self._dense_normed(one, normed, self._x)]

    def _dense_normed(self, one: DenseWeights, normed: Array, result: Array) -> Steps:
        """y, and what it is after its norm, to `result`."""
        hidden = self._as_met(self._hidden[:, : one.hidden], one.gate, one.down)
        return [*self._multiply("matmul_swiglu", normed, [one.gate, one.up], hidden),
                *self._multiply("matmul_nt_residual", hidden, [one.down], self._y, result)]

    def _mixture(self, one: MixtureWeights) -> Steps:
        """y to x."""
        normed, y = self._x, self._y
        shared: Steps = []
        if one.shared is not None:
            shared, y = self._dense_normed(one.shared, normed, self._between), self._between
        return [
            *self._norm(self._y, one.gain, self.model.config.epsilon, normed),
            *self._multiply("matmul_nt", normed, [one.router], self._scores.reshape(self.chunk, -1)),
            *self._gate(one, self._rows),
            *shared,
            *self._experts_of_several(one, normed, y, self._x),
        ]

    def _experts_of_several(self, one: MixtureWeights, normed: Array, y: Array, result: Array) -> Steps:
        """y, and what the experts that each of several tokens takes make of `normed`, to `result`."""
        rows, routed = self._rows, self._routed_of(one)
        owners, gathered = (Rows(array[: self._capacity * one.taken], routed) for array in (
            self._owners, self._gathered[:, : self.model.config.features]))
        chosen, place, shares = (rows(self._of_tokens(array, one))
                                 for array in (self._experts, self._place, self._shares))
        ranges = tuple(ends[: one.experts] for ends in self._ranges)
        taking, taken, hidden = self._taken_rows(one, normed, owners, gathered)
        return [
            (moe.group_tokens, (chosen, *ranges, place, owners)),
            *taking,
            *one.gate.apply_groups([one.up], taken, ranges, hidden, self._work),
            *one.down.apply_groups([], hidden, ranges, gathered, self._work),
            (moe.combine_experts, (gathered.array, place, shares, rows(y), rows(result))),
        ]

    def _taken_rows(
        self, one: MixtureWeights, normed: Array, owners: Rows, gathered: Rows
    ) -> tuple[Steps, Rows, Rows]:
        """`normed` once for each expert that takes it, where that lies, and where what gate and up make of it is to
        lie. Both are rounded where all products of the experts round them: the first then lies where their results
        will."""
        count = len(gathered.array)
        if not (one.gate.rounds(2, count, self._work) and one.down.rounds(1, count, self._work)):
            hidden = Rows(self._expert_hidden[:count, : self._expert_features], gathered.count)
            return [(embedding.embedding_f32, (owners, normed, gathered))], gathered, hidden
        memory = self._gathered[:count].reshape(-1)
        taken = Rows(as_bf16(memory[: gathered.array.size].reshape(gathered.array.shape)), gathered.count)
        hidden = Rows(self._work.narrow(count, self._expert_features), gathered.count)
        return [(narrow.narrow_rows_bf16, (owners, normed, taken))], taken, hidden


def first(array: Array) -> Array:
    """The one row of one token."""
    return array[:1]
