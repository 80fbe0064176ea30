"""What a model in training is made of: its weights, what layers keep of a forward pass, and their feed-forward parts.

In: the numbers of an architecture. Out: `Weights` and `Kept`; `FeedForwards`, the steps of dense parts and of mixtures
of experts, forwards and backwards. Holds: an expert's matrices lie together, as those of each kind do of all experts;
shared experts are one dense part.

    n' ── gate, up ── SwiGLU ── down, + y                                                      dense
    n' ─┬─ router ── gate ── rows by experts: gate, up ── SwiGLU ── down ── weighted sum ─┐    mixture
        └─ shared experts, as a dense part, + y ──────────────────────────────────────────┴─ +

Backwards the rows of experts are gathered again from what each token has, and hidden features are made again of gate
and up: of each expert that a token takes these are kept, and nothing else of its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..kernels import activation, add, embedding, gate, gradients, moe, moe_gradient
from ..runtime.buffers import LINE_BYTES
from ..runtime.program import Variable
from ..runtime.system import round_up
from .adapted import product, product_residual, through_matrix, with_weights
from .mixture import Mixture
from .workspace import Steps

Array = np.ndarray[Any, np.dtype[Any]]
F32, I32 = np.dtype(np.float32), np.dtype(np.int32)


class Memory(Protocol):
    """An Arena, or a Counter."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array: ...


class Counter:
    """What an Arena would take. The arrays that it gives have no memory."""

    def __init__(self) -> None:
        self.size_bytes = 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        self.size_bytes += round_up(math.prod(shape) * dtype.itemsize, LINE_BYTES)
        return np.broadcast_to(np.zeros((), dtype), shape)


@dataclass(frozen=True, slots=True)
class Places:
    """Where the weights of a model lie, or as many numbers that belong to them. dtype: of matrices."""

    matrices: Any
    vectors: Any
    dtype: np.dtype[Any] = F32

    def matrix(self, *extents: int, of: Mapping[str, int] | None = None) -> Any:
        """of: see AdaptedPlaces."""
        return self.matrices.empty(extents, self.dtype)

    def router(self, *extents: int) -> Any:
        """One that is f32 whatever the others are, as choices follow from it."""
        return self.matrices.empty(extents, F32)

    def vector(self, extent: int) -> Array:
        made: Array = self.vectors.empty((extent,), F32)
        return made

    def flat(self, kind: str) -> Array:
        """All matrices, or all vectors, as one vector."""
        numbers: Array = getattr(self, kind).reached.view(np.float32)
        return numbers


@dataclass(frozen=True, slots=True)
class Dense:
    """gate_up [2 * hidden, features]: the rows of gate, then those of up. down [features, hidden]."""

    gate_up: Array
    down: Array


@dataclass(frozen=True, slots=True)
class Mixed:
    """router [experts, features]; gate_up [experts, 2 * hidden, features] and down [experts, features, hidden] of the
    experts that are chosen; shared: the others together, or None."""

    router: Array
    gate_up: Array
    down: Array
    shared: Dense | None


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of a layer, or what belongs to each of them. attention: an architecture's own."""

    attention_gain: Array
    attention: Any
    output: Array
    feed_forward_gain: Array
    feed_forward: Dense | Mixed


@dataclass(frozen=True, slots=True)
class Weights:
    """Those of a model, or what belongs to each of them. logits: the embedding where the two are tied."""

    embedding: Array
    layers: tuple[Layer, ...]
    gain: Array
    logits: Array


@dataclass(frozen=True, slots=True)
class KeptDense:
    gate_up: Array
    hidden: Array


@dataclass(frozen=True, slots=True)
class KeptMixed:
    """logits [rows, groups, experts of a group]; experts, weights, place [rows, chosen], ranges [experts] and owners
    [rows * chosen] as the kernels of gate.py and moe.py have them; gate_up of the rows of experts. bias: of the choice,
    which gradients leave as it is."""

    logits: Array
    bias: Array | None
    experts: Array
    weights: Array
    place: Array
    ranges: tuple[Array, Array]
    owners: Array
    gate_up: Array
    shared: KeptDense | None


@dataclass(frozen=True, slots=True)
class Kept:
    """What a layer's gradients need of its forward pass, of all tokens, in the order in which it is computed.
    attention: an architecture's own."""

    x: Array
    attention_normed: Array
    attention: Any
    mixed: Array
    y: Array
    feed_forward_normed: Array
    feed_forward: KeptDense | KeptMixed


class FeedForwards:
    """Of all layers. rows: tokens of a step. again: whether dense parts make their hidden features again for gradients,
    and keep none."""

    def __init__(self, config: Any, rows: int, memory: Memory, again: bool = False) -> None:
        """config: what Mixing says of it (mixing.py), with `hidden`."""
        self._rows, self._mixture, features = rows, config.mixture, config.features
        mixture, self._dense_hidden = self._mixture, config.hidden
        widest = max(config.hidden, 0 if mixture is None else mixture.shared * mixture.hidden)
        self._dhidden, self._dgate_up = (memory.empty((rows, times * widest), F32) for times in (1, 2))
        self._made_again = memory.empty((rows, widest), F32) if again else None
        if mixture is not None:
            routed = rows * mixture.chosen
            self._taken, self._hidden, self._dtaken = (
                memory.empty((routed, moe.row_apart(columns)), F32)[:, :columns]
                for columns in (features, mixture.hidden, 2 * mixture.hidden))
            self._dweights = memory.empty((rows, mixture.chosen), F32)
            self._dlogits = memory.empty((rows, mixture.experts), F32)
            self._between, self._other = (memory.empty((rows, features), F32) for _ in range(2))

    # ---- memory

    @staticmethod
    def weights_in(places: Places, config: Any, mixes: bool) -> Dense | Mixed:
        """Of a layer. mixes: whether it has experts."""
        features = config.features

        def dense(hidden: int, before: str = "") -> Dense:
            both = {f"{before}gate": hidden, f"{before}up": hidden}
            return Dense(places.matrix(2 * hidden, features, of=both),
                         places.matrix(features, hidden, of={f"{before}down": features}))

        if not mixes:
            return dense(config.hidden)
        mixture: Mixture = config.mixture
        experts, hidden = mixture.experts, mixture.hidden
        return Mixed(
            places.router(experts, features), places.matrix(experts, 2 * hidden, features),
            places.matrix(experts, features, hidden),
            dense(mixture.shared * hidden, "shared_") if mixture.shared else None)

    @staticmethod
    def tensors(one: Dense | Mixed) -> dict[str, Array]:
        """The weights of a layer, by role; of experts those of all in one."""
        parts = {"": one} if isinstance(one, Dense) else {"expert_": one, "shared_": one.shared}
        found = {} if isinstance(one, Dense) else {"router": one.router}
        for before, part in parts.items():
            if part is not None:
                gate, up = np.split(part.gate_up, 2, axis=-2)
                found |= {f"{before}gate": gate, f"{before}up": up, f"{before}down": part.down}
        return found

    def kept_in(self, memory: Memory, mixes: bool, bias: Array | None) -> KeptDense | KeptMixed:
        """Of a layer. bias: of its choice of experts."""
        rows, mixture = self._rows, self._mixture

        def dense(hidden: int) -> KeptDense:
            made = self._made_again
            return KeptDense(memory.empty((rows, 2 * hidden), F32),
                             memory.empty((rows, hidden), F32) if made is None else self._part(made, hidden))

        if not mixes or mixture is None:
            return dense(self._dense_hidden)
        groups, chosen, routed = mixture.groups, mixture.chosen, rows * mixture.chosen
        experts, place = (memory.empty((rows, chosen), I32) for _ in range(2))
        starts, stops = (memory.empty((mixture.experts,), I32) for _ in range(2))
        return KeptMixed(
            memory.empty((rows, groups, mixture.experts // groups), F32), bias, experts,
            memory.empty((rows, chosen), F32), place, (starts, stops), memory.empty((routed,), I32),
            memory.empty((routed, 2 * mixture.hidden), F32),
            dense(mixture.shared * mixture.hidden) if mixture.shared else None)

    def _part(self, array: Array, columns: int) -> Array:
        """Room of so many columns, in that of the most."""
        return array.reshape(-1)[: len(array) * columns].reshape(len(array), columns)

    # ---- forwards

    def forward(self, one: Dense | Mixed, kept: Any, normed: Array, y: Array, result: Array) -> Steps:
        """y, and what the part makes of it after its norm, to `result`."""
        if isinstance(one, Dense):
            return self._dense(one, kept, normed, y, result)
        steps: Steps = []
        if one.shared is not None:
            steps, y = self._dense(one.shared, kept.shared, normed, y, self._between), self._between
        parts = np.split(kept.gate_up, 2, axis=1)
        return [
            *steps,
            *product(one.router, normed, kept.logits.reshape(self._rows, -1)),
            self._choice(kept),
            (moe.group_tokens, (kept.experts, *kept.ranges, kept.place, kept.owners)),
            (embedding.embedding_f32, (kept.owners, normed, self._taken)),
            self._multiply(one.gate_up, kept, self._taken, kept.gate_up),
            (activation.swiglu, (*parts, self._hidden)),
            self._multiply(one.down, kept, self._hidden, self._taken),
            (moe.combine_experts, (self._taken, kept.place, kept.weights, y, result)),
        ]

    def _dense(self, one: Dense, kept: KeptDense, normed: Array, y: Array, result: Array) -> Steps:
        return [
            *product(one.gate_up, normed, kept.gate_up),
            (activation.swiglu, (*np.split(kept.gate_up, 2, axis=1), kept.hidden)),
            *product_residual(one.down, kept.hidden, y, result),
        ]

    def _choice(self, kept: KeptMixed) -> tuple[Any, tuple[Any, ...]]:
        """From logits to experts and their weights."""
        mixture = self._mixture
        settings = (mixture.kept, mixture.chosen, mixture.normalise, mixture.scale, kept.experts, kept.weights)
        if kept.bias is None:
            return gate.gate_softmax, (kept.logits, *settings)
        return gate.gate_sigmoid, (kept.logits, kept.bias.reshape(kept.logits.shape[1:]), *settings)

    @staticmethod
    def _multiply(matrices: Array, kept: KeptMixed, x: Array, y: Array) -> tuple[Any, tuple[Any, ...]]:
        """y = W x of each row's expert."""
        experts, rows, columns = matrices.shape
        blocks = moe.blocks_of(rows)
        return with_weights("grouped_matmul", matrices, moe), (
            x, *kept.ranges, matrices.reshape(experts, *blocks, columns), y.reshape(len(y), *blocks))

    @staticmethod
    def balance(kept: KeptDense | KeptMixed) -> Steps:
        """Move the bias of a layer's choice."""
        if isinstance(kept, KeptDense) or kept.bias is None:
            return []
        return [(moe_gradient.balance_experts, (*kept.ranges, Variable("balance", 0.0), kept.bias, kept.bias))]

    # ---- backwards

    def backward(self, one: Any, found: Any, kept: Any, normed: Array, d: Array, dnormed: Array) -> Steps:
        """From d, the gradient of the result, to that of what the norm gave, and of the weights."""
        if isinstance(one, Dense):
            return self._dense_back(one, found, kept, normed, d, dnormed)
        mixture = self._mixture
        parts, dparts = (np.split(array, 2, axis=1) for array in (kept.gate_up, self._dtaken))
        logits, kernel = kept.logits.reshape(self._rows, -1), (
            moe_gradient.gate_sigmoid_gradient if mixture.sigmoid else moe_gradient.gate_softmax_gradient)
        steps: Steps = [
            (embedding.embedding_f32, (kept.owners, d, self._taken)),
            self._multiply_back(one.down, kept, self._taken, self._hidden),
            (moe_gradient.expert_swiglu_gradient, (
                *parts, self._hidden, kept.place, kept.weights, *dparts, self._dweights, self._hidden)),
            *([] if found.down is None else [
                self._of_matrices(found.down, kept, self._taken, self._hidden),
                (embedding.embedding_f32, (kept.owners, normed, self._taken)),
                self._of_matrices(found.gate_up, kept, self._dtaken, self._taken)]),
            self._multiply_back(one.gate_up, kept, self._dtaken, self._taken),
            (kernel, (logits, kept.experts, self._dweights, mixture.normalise, mixture.scale, self._dlogits)),
            *through_matrix(one.router, found.router, self._dlogits, normed, self._between),
        ]
        others = self._between
        if one.shared is not None:
            others = self._other
            steps += [
                *self._dense_back(one.shared, found.shared, kept.shared, normed, d, dnormed),
                (add.vector_add, (self._between.reshape(-1), dnormed.reshape(-1), others.reshape(-1)))]
        return [*steps, (moe.combine_experts, (self._taken, kept.place, np.ones_like(kept.weights), others, dnormed))]

    def _dense_back(self, one: Dense, found: Any, kept: KeptDense, normed: Array, d: Array, dnormed: Array) -> Steps:
        hidden = kept.hidden.shape[1]
        dhidden, dgate_up = self._part(self._dhidden, hidden), self._part(self._dgate_up, 2 * hidden)
        parts, dparts = (np.split(array, 2, axis=1) for array in (kept.gate_up, dgate_up))
        asked = self._made_again is not None and found.down is not None
        return [
            *([(activation.swiglu, (*parts, kept.hidden))] if asked else []),
            *through_matrix(one.down, found.down, d, kept.hidden, dhidden),
            (gradients.swiglu_gradient, (*parts, dhidden, *dparts)),
            *through_matrix(one.gate_up, found.gate_up, dgate_up, normed, dnormed),
        ]

    @staticmethod
    def _of_matrices(found: Array, kept: KeptMixed, dy: Array, x: Array) -> tuple[Any, tuple[Any, ...]]:
        """The gradients of the matrices of y = W x of each row's expert."""
        experts, rows, columns = found.shape
        blocks = moe.blocks_of(rows)
        return moe_gradient.grouped_matmul_tn_f32, (
            dy.reshape(len(dy), *blocks), x, *kept.ranges, found.reshape(experts, *blocks, columns))

    @staticmethod
    def _multiply_back(matrices: Array, kept: KeptMixed, dy: Array, dx: Array) -> tuple[Any, tuple[Any, ...]]:
        """dx = dy W of each row's expert."""
        blocks = moe.blocks_of(matrices.shape[2])
        return with_weights("grouped_matmul_nn", matrices, moe_gradient), (
            dy, *kept.ranges, matrices.reshape(*matrices.shape[:2], *blocks), dx.reshape(len(dx), *blocks))
