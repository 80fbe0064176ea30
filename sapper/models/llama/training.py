"""A step of training: tokens in, loss out, every weight a little better. One program, every number of it by kernels.

In: a checkpoint. Out: `Trainer`. Holds: weights, gradients and both of AdamW's means are f32, each kind in one piece of
memory; the program is made once.

    tokens ── embedding ── x ── layers, as session.py has them, which keep what gradients need ── x ── norm, logits
    logits ── loss, and their gradient ── d ── layers backwards ── d ── embedding's gradient
    gradients ── their norm ── AdamW

Of a layer, d is the gradient of its result, and becomes that of its input:

    x ── norm ── n ─ qkv ─ turned ─ attention ── mixed ─ output, + x ── y ── norm ── n' ─ gate, up ── h ── down, + y
    d ─┬─ down ── dh ── dgate, dup ── dn' ── norm, + d ── dy ─┬─ output ── dmixed ── dqkv ─ turned back ── dn
       └ and at each matrix W of y = W x: dW = dy x            └──────────────────────── norm, + dy ── d
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...kernels import (
    activation,
    add,
    attention_gradient,
    cross_entropy,
    embedding,
    gradients,
    matmul,
    norm,
    optimizer,
    rope,
)
from ...runtime.buffers import Arena, empty
from ...runtime.program import Program, Variable
from ..checkpoint import Checkpoint
from ..errors import ModelError
from ..training import LENGTH, Recipe, check_room
from ..weights import half_split_rows, interleaved_rows
from ..workspace import Steps
from . import config as configs
from .config import LlamaConfig
from .weights import GGUF_NAMES, JSON_NAMES

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of a layer, or what belongs to each of them; the names are those of LayerWeights (weights.py), but for
    gate_up [2 * hidden, features]: the rows of gate, then those of up."""

    attention_gain: Array
    qkv: Array
    bias: Array | None
    output: Array
    feed_forward_gain: Array
    gate_up: Array
    down: Array


class Weights:
    """All weights of a model, or as many numbers that belong to them. matrices, vectors: all of each kind, as one
    vector. logits: the embedding where the two are tied."""

    def __init__(self, config: LlamaConfig, tied: bool) -> None:
        features, hidden, size = config.features, config.hidden, config.head_features
        queries, rows = config.heads * size, (config.heads + 2 * config.kv_heads) * size
        embeddings = (1 if tied else 2) * config.vocabulary * features
        layer = rows * features + features * queries + 3 * hidden * features
        matrices = Arena(4 * (embeddings + config.layers * layer) + (1 << 20))
        vectors = Arena(4 * (features + config.layers * (2 * features + rows)) + (1 << 20))

        def matrix(*extents: int) -> Array:
            return matrices.empty(extents, np.dtype(np.float32))

        def vector(extent: int) -> Array:
            return vectors.empty((extent,), np.dtype(np.float32))

        self.embedding = matrix(config.vocabulary, features)
        self.layers = tuple(
            Layer(vector(features), matrix(rows, features), vector(rows) if config.biased else None,
                  matrix(features, queries), vector(features), matrix(2 * hidden, features), matrix(features, hidden))
            for _ in range(config.layers))
        self.gain = vector(features)
        self.logits = self.embedding if tied else matrix(config.vocabulary, features)
        self.matrices, self.vectors = (kind.reached.view(np.float32) for kind in (matrices, vectors))


@dataclass(frozen=True, slots=True)
class Kept:
    """What a layer's gradients need of its forward pass, of all tokens, in the order in which it is computed. qkv: with
    queries and keys turned. level: see attention_gradient.py."""

    x: Array
    attention_normed: Array
    qkv: Array
    level: Array
    mixed: Array
    y: Array
    feed_forward_normed: Array
    gate_up: Array
    hidden: Array


@dataclass(frozen=True, slots=True)
class Trained:
    """A tensor of the checkpoint, whose numbers are the trainer's. rows: they, in the kernels' order; heads: of which
    the file has the rows in the order of the interleaved pairing (0: it has not)."""

    rows: Array
    heads: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.rows.shape)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def read(self) -> Array:
        """As the file has them."""
        return interleaved_rows(self.rows, self.heads) if self.heads else self.rows

    def write(self, source: Array) -> None:
        self.rows[...] = half_split_rows(source, self.heads) if self.heads else source


def trained_tensors(config: LlamaConfig, weights: Weights, checkpoint: Checkpoint) -> dict[str, Trained]:
    """By the name of the file."""
    names = GGUF_NAMES if checkpoint.gguf else JSON_NAMES
    found = {names["embedding"]: Trained(weights.embedding), names["gain"]: Trained(weights.gain)}
    if weights.logits is not weights.embedding:
        found[names["logits"]] = Trained(weights.logits)
    interleaved = checkpoint.gguf and checkpoint.architecture == "llama"
    size = config.head_features
    parts = {"query": config.heads, "key": config.kv_heads, "value": config.kv_heads}
    for number, layer in enumerate(weights.layers):
        first = 0
        for role, heads in parts.items():
            last = first + heads * size
            turned = heads if interleaved and role != "value" else 0
            found[names[role].format(number)] = Trained(layer.qkv[first:last], turned)
            if layer.bias is not None:
                found[names[f"{role}_bias"].format(number)] = Trained(layer.bias[first:last])
            first = last
        gate, up = np.split(layer.gate_up, 2)
        for role, rows in (("attention_gain", layer.attention_gain), ("output", layer.output), ("gate", gate),
                           ("up", up), ("feed_forward_gain", layer.feed_forward_gain), ("down", layer.down)):
            found[names[role].format(number)] = Trained(rows)
    return found


class Trainer:
    """sequences, length: of the tokens of a step. tensors: of the checkpoint, as they are now, by name.

    `step` takes tokens and targets [sequences, length]; a target below 0 does not count.
    """

    def __init__(self, checkpoint: Checkpoint, sequences: int, length: int | None, *, threads: int | None = None,
                 interpret: bool = False) -> None:
        """Raises ModelError for a checkpoint that is no Llama's, or that lacks a tensor."""
        read = configs.from_gguf if checkpoint.gguf else configs.from_json
        self.config = config = read(checkpoint.metadata, checkpoint.where)
        if config.normed or config.mixture is not None:
            found = "experts" if config.mixture is not None else "heads that go through norms"
            raise ModelError(checkpoint.where, f"a model with {found}", "a Llama, a Mistral or a Qwen2",
                             "train such a model")
        length = min(LENGTH, config.positions) if length is None else length
        if not 1 <= length <= config.positions:
            raise ModelError("the tokens of a sequence", f"{length}",
                             f"1 to {config.positions}, {config.limit}")
        if sequences < 1:
            raise ModelError("the sequences of a step", f"{sequences}", "at least 1")
        self.checkpoint, self.sequences, self.length = checkpoint, sequences, length
        self.vocabulary = config.vocabulary
        names = GGUF_NAMES if checkpoint.gguf else JSON_NAMES
        tied = names["logits"] not in checkpoint.tensors
        check_room(self._room_bytes(tied))
        self._weights, self._gradients, self._means, self._squares = (Weights(config, tied) for _ in range(4))
        self.tensors, self.gradients, self.means, self.squares = (
            trained_tensors(config, kind, checkpoint)
            for kind in (self._weights, self._gradients, self._means, self._squares))
        for name, tensor in self.tensors.items():
            entry = checkpoint.tensors.get(name)
            where = f"{checkpoint.path}, tensor {name}"
            if entry is None or entry.shape != tensor.shape:
                raise ModelError(where, "nothing" if entry is None else f"shape {entry.shape}",
                                 f"a tensor of shape {tensor.shape}", "get the file again")
            tensor.write(entry.read())
        self._options = {"threads": threads, "interpret": interpret}
        self._make_room()
        factors = (checkpoint.tensors[names["rope_factors"]].read()
                   if names["rope_factors"] in checkpoint.tensors else None)
        self._cosine, self._sine = config.rope.tables(length, factors)
        self._back = -self._sine
        self._program = self._made([*self._forward(), *self._head(), *self._backward(), *self._improve()])
        self._scoring: Program | None = None

    def _room_bytes(self, tied: bool) -> int:
        """About what a step touches."""
        config, size = self.config, self.config.head_features
        features, hidden, width = config.features, config.hidden, config.heads * size
        rows = width + 2 * config.kv_heads * size
        weights = (1 if tied else 2) * config.vocabulary * features + config.layers * (
            (rows + width + 3 * hidden) * features)
        kept = config.layers * (4 * features + rows + width + 3 * hidden) + config.vocabulary
        return 16 * weights + 4 * kept * self.sequences * self.length

    def _make_room(self) -> None:
        config, rows = self.config, self.sequences * self.length
        features, hidden = config.features, config.hidden
        heads, width = config.heads + 2 * config.kv_heads, config.heads * config.head_features
        arena = Arena()

        def room(*extents: int) -> Array:
            return arena.empty(extents, np.dtype(np.float32))

        self.tokens, self.targets, self._wanted = (empty((rows,), np.dtype(np.int32)) for _ in range(3))
        for numbers in (self.tokens, self.targets, self._wanted):
            numbers.fill(0)
        self._kept = [Kept(
            room(rows, features), room(rows, features), room(rows, heads * config.head_features),
            room(self.sequences, config.kv_heads, config.group, self.length), room(rows, width),
            room(rows, features), room(rows, features), room(rows, 2 * hidden), room(rows, hidden),
        ) for _ in range(config.layers)]
        self._last, self._normed = room(rows, features), room(rows, features)
        self._logits = room(rows, config.vocabulary)
        self._losses, self._factor = room(rows), room(rows)
        self._d, self._dnormed, self._dhidden = room(rows, features), room(rows, features), room(rows, hidden)
        self._dgate_up = room(rows, 2 * hidden)
        self._dmixed, self._dqkv = room(rows, width), room(rows, heads * config.head_features)
        self._along = room(self.sequences, config.kv_heads, config.group, self.length)
        parts = [optimizer.parts_of(vector.size) for vector in (self._gradients.matrices, self._gradients.vectors)]
        self._partial = room(sum(parts))
        self._partials = np.split(self._partial, parts[:1])
        self.norm, self._clip, self.loss = room(1), room(1), room(1)

    # ---- the program

    def _made(self, steps: Steps) -> Program:
        return Program(steps, static=True, **self._options)

    def _forward(self) -> Steps:
        steps = [(embedding.embedding_f32, (self.tokens, self._weights.embedding, self._inputs(0)))]
        for number in range(self.config.layers):
            steps += self._layer(number)
        return [
            *steps,
            (norm.rms_norm, (self._last, self._weights.gain, self.config.epsilon, self._normed)),
            (matmul.matmul_nt_f32, (self._normed, self._weights.logits, self._logits)),
        ]

    def _backward(self) -> Steps:
        steps: Steps = []
        for number in reversed(range(self.config.layers)):
            steps += self._layer_back(number)
        return [*steps, (gradients.embedding_gradient, (self._d, self.tokens, self._gradients.embedding))]

    def _inputs(self, layer: int) -> Array:
        """What goes into a layer; of the last one's successor, what comes out of that."""
        return self._kept[layer].x if layer < len(self._kept) else self._last

    def _turn(self, qkv: Array, sine: Array) -> Steps:
        """Queries and keys, of each sequence by itself."""
        config = self.config
        heads = qkv.reshape(self.sequences, self.length, -1, 2, config.head_features // 2)
        turned = heads[:, :, : config.heads + config.kv_heads]
        return [(rope.rope_half_split_in_place, (one, self._cosine, sine, 0)) for one in turned]

    def _parts(self, qkv: Array) -> tuple[Array, Array, Array]:
        """Queries [sequences, length, kv_heads, group, head_features], keys and values."""
        config = self.config
        heads = qkv.reshape(self.sequences, self.length, -1, config.head_features)
        queries, keys, values = np.split(heads, [config.heads, config.heads + config.kv_heads], axis=2)
        return self._grouped(queries), keys, values

    def _grouped(self, rows: Array) -> Array:
        config = self.config
        return rows.reshape(self.sequences, self.length, config.kv_heads, config.group, config.head_features)

    def _layer(self, number: int) -> Steps:
        layer, kept, epsilon = self._weights.layers[number], self._kept[number], self.config.epsilon
        bias = [] if layer.bias is None else [(add.add_bias_in_place, (kept.qkv, layer.bias))]
        gate, up = np.split(kept.gate_up, 2, axis=1)
        return [
            (norm.rms_norm, (kept.x, layer.attention_gain, epsilon, kept.attention_normed)),
            (matmul.matmul_nt_f32, (kept.attention_normed, layer.qkv, kept.qkv)), *bias,
            *self._turn(kept.qkv, self._sine),
            (attention_gradient.attention_kept, (
                *self._parts(kept.qkv), self._scale, self._grouped(kept.mixed), kept.level)),
            (matmul.matmul_nt_residual_f32, (kept.mixed, layer.output, kept.x, kept.y)),
            (norm.rms_norm, (kept.y, layer.feed_forward_gain, epsilon, kept.feed_forward_normed)),
            (matmul.matmul_nt_f32, (kept.feed_forward_normed, layer.gate_up, kept.gate_up)),
            (activation.swiglu, (gate, up, kept.hidden)),
            (matmul.matmul_nt_residual_f32, (kept.hidden, layer.down, kept.y, self._inputs(number + 1))),
        ]

    @property
    def _scale(self) -> float:
        return float(self.config.head_features**-0.5)

    def _head(self) -> Steps:
        """From logits to the gradient of what comes out of the last layer."""
        weights, found, d = self._weights, self._gradients, self._d
        return [
            (gradients.cross_entropy_gradient, (
                self._logits, self.targets, Variable("share", 1.0), self._losses, self._logits)),
            (gradients.column_sums, (self._losses.reshape(-1, 1), self.loss)),
            *self._apart(weights.logits, found.logits, self._logits, self._normed, self._dnormed),
            *([] if found.logits is found.embedding else [(gradients.clear, (found.embedding,))]),
            (gradients.clear, (d,)),
            self._norm_back(self._last, weights.gain, found.gain),
        ]

    @staticmethod
    def _apart(matrix: Array, dmatrix: Array, dy: Array, x: Array, dx: Array) -> Steps:
        """From the gradient of y = W x to those of W and x."""
        return [(matmul.matmul_nn_f32, (dy, matrix, dx)), (matmul.matmul_tn_f32, (dy, x, dmatrix))]

    def _norm_back(self, x: Array, gain: Array, dgain: Array) -> tuple[Any, tuple[Any, ...]]:
        """Adds to d the gradient of what was normed."""
        return gradients.rms_norm_gradient, (
            x, gain, self.config.epsilon, self._dnormed, self._d, self._factor, self._d, dgain)

    def _layer_back(self, number: int) -> Steps:
        layer, found = self._weights.layers[number], self._gradients.layers[number]
        kept, d = self._kept[number], self._d
        (gate, up), (dgate, dup) = (np.split(rows, 2, axis=1) for rows in (kept.gate_up, self._dgate_up))
        queries, keys, values = self._parts(kept.qkv)
        dqueries, dkeys, dvalues = self._parts(self._dqkv)
        dmixed = self._grouped(self._dmixed)
        return [
            *self._apart(layer.down, found.down, d, kept.hidden, self._dhidden),
            (gradients.swiglu_gradient, (gate, up, self._dhidden, dgate, dup)),
            *self._apart(layer.gate_up, found.gate_up, self._dgate_up, kept.feed_forward_normed, self._dnormed),
            self._norm_back(kept.y, layer.feed_forward_gain, found.feed_forward_gain),
            *self._apart(layer.output, found.output, d, kept.mixed, self._dmixed),
            (attention_gradient.attention_gradient_queries, (
                queries, keys, values, kept.level, self._grouped(kept.mixed), dmixed, self._scale, dqueries,
                self._along)),
            (attention_gradient.attention_gradient_keys, (
                queries, keys, values, kept.level, self._along, dmixed, self._scale, dkeys, dvalues)),
            *self._turn(self._dqkv, self._back),
            *([] if found.bias is None else [(gradients.column_sums, (self._dqkv, found.bias))]),
            *self._apart(layer.qkv, found.qkv, self._dqkv, kept.attention_normed, self._dnormed),
            self._norm_back(kept.x, layer.attention_gain, found.attention_gain),
        ]

    def _improve(self) -> Steps:
        steps: Steps = []
        kinds = [[getattr(one, name) for one in (self._weights, self._means, self._squares, self._gradients)]
                 for name in ("matrices", "vectors")]
        for (*_, gradient), partial_sums in zip(kinds, self._partials, strict=True):
            steps.append((optimizer.squares, (gradient, partial_sums)))
        steps.append((optimizer.clip_factor, (self._partial, Variable("limit", 1.0), self._clip, self.norm)))
        for (weights, means, squares, gradient), keep in zip(
                kinds, (Variable("keep", 1.0), 1.0), strict=True):
            numbers = [Variable(name, value) for name, value in (
                ("rate", 0.0), ("spread", 1.0), ("beta1", 0.9), ("beta2", 0.95), ("epsilon", 1e-8))]
            steps.append((optimizer.adamw, (
                weights, means, squares, gradient, self._clip, keep, *numbers, weights, means, squares)))
        return steps

    # ---- running

    def step(self, tokens: Array, targets: Array, recipe: Recipe, number: int) -> tuple[float, float]:
        """The loss, a mean over the targets that count, and the norm of its gradient, before the weights are changed.
        number: of the step, from 1 on."""
        counted = self._take(tokens, targets)
        rate = recipe.rate_of(number)
        self._program(
            share=1.0 / counted, limit=recipe.clip, keep=1.0 - rate * recipe.decay, beta1=recipe.beta1,
            beta2=recipe.beta2, epsilon=recipe.epsilon, rate=rate / (1.0 - recipe.beta1**number),
            spread=(1.0 - recipe.beta2**number) ** -0.5)
        return float(self.loss[0]) / counted, float(self.norm[0])

    def loss_of(self, tokens: Array, targets: Array) -> float:
        """The same loss, without a change of the weights."""
        counted = self._take(tokens, targets)
        if self._scoring is None:
            self._scoring = self._made([
                *self._forward(), (cross_entropy.cross_entropy, (self._logits, self._wanted, self._losses))])
        self._scoring()
        return float(self._losses[self.targets >= 0].sum(dtype=np.float64)) / counted

    def _take(self, tokens: Array, targets: Array) -> int:
        """How many targets count. Raises ModelError for tokens that there are not."""
        flat, wanted = tokens.reshape(-1), targets.reshape(-1)
        counted = int((wanted >= 0).sum())
        if flat.shape != self.tokens.shape or wanted.shape != self.tokens.shape or not counted:
            raise ModelError("a step", f"tokens {tokens.shape}, targets {targets.shape}, of which {counted} count",
                             f"{self.sequences} x {self.length} of each, and a target that counts")
        if min(flat.min(), 0) < 0 or max(flat.max(), wanted.max()) >= self.vocabulary:
            raise ModelError("a step's tokens", f"{flat.min()} to {max(flat.max(), wanted.max())}",
                             f"0 to {self.vocabulary - 1}")
        self.tokens[:], self.targets[:] = flat, wanted
        np.maximum(wanted, 0, out=self._wanted)
        return counted
