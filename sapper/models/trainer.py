"""A step of training: tokens in, loss out, every weight a little better. One program, every number of it by kernels.

In: a checkpoint, and what an architecture says of its attention. Out: `Trainer`, the base of those of the architectures
(ARCHITECTURE/training.py). Holds: weights, gradients and both of AdamW's means are f32, each kind in one piece of
memory; the program is made once.

    tokens ── embedding ── x ── layers, which keep what gradients need ── x ── norm, logits
    logits ── loss, and their gradient ── d ── layers backwards ── d ── embedding's gradient
    gradients ── their norm ── AdamW

Of a layer, d is the gradient of its result, and becomes that of its input:

    x ── norm ── n ── attention ── mixed ─ output, + x ── y ── norm ── n' ── feed-forward part, + y
    d ── feed-forward part backwards ── dn' ── norm, + d ── dy ─┬─ output ── dmixed ── attention backwards ── dn
                                                               └── norm, + dy ── d
    and at each matrix W of y = W x: dW = dy x
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels import cross_entropy, embedding, gradients, matmul, norm, optimizer, rope
from ..runtime.buffers import LINE_BYTES, Arena, empty
from ..runtime.program import Program, Variable
from ..runtime.system import round_up
from .checkpoint import Checkpoint
from .errors import ModelError
from .trained import Counter, FeedForwards, Kept, Layer, Memory, Places, Weights, through_matrix
from .training import LENGTH, Recipe, check_room, padding, piece_of
from .workspace import Sections, Steps
from .written import Piece

Array = np.ndarray[Any, np.dtype[Any]]
F32, I32 = np.dtype(np.float32), np.dtype(np.int32)
KINDS = ("weights", "gradients", "means", "squares")


@dataclass(frozen=True, slots=True)
class Trained:
    """A tensor of the checkpoint, whose numbers are the trainer's: `rows`, as they lie there."""

    rows: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.rows.shape)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def read(self) -> Array:
        return self.rows

    def write(self, source: Array) -> None:
        self.rows[...] = source


class Trainer(ABC):
    """sequences, length: of the tokens of a step. tensors: of the checkpoint, as they are now, by name. matrices,
    vectors: all of the weights, their gradients, means and squares, each kind as one vector. tokens, targets, wanted:
    of a step; wanted is 0 where a target does not count.

    `step` takes tokens and targets [sequences, length]; a target below 0 does not count.
    """

    def __init__(
        self, checkpoint: Checkpoint, config: Any, names: Mapping[str, str], sequences: int, length: int | None, *,
        threads: int | None = None, interpret: bool = False,
    ) -> None:
        """config: an architecture's; names: role -> the name of its tensor. Raises ModelError for a checkpoint that
        lacks a tensor, and for a step that can't be."""
        length = min(LENGTH, config.positions) if length is None else length
        if not 1 <= length <= config.positions:
            limit = getattr(config, "limit", "all that the model can")
            raise ModelError("the tokens of a sequence", f"{length}", f"1 to {config.positions}, {limit}")
        if sequences < 1:
            raise ModelError("the sequences of a step", f"{sequences}", "at least 1")
        self.checkpoint, self.config, self.sequences, self.length = checkpoint, config, sequences, length
        self.vocabulary, self._names, self._rows = config.vocabulary, names, sequences * length
        self._tied = names["logits"] not in checkpoint.tensors
        self._biases: dict[int, Array] = {}
        counted = Places(Counter(), Counter())
        self._weights_in(counted)
        room = Counter()
        self._make_room(room)
        check_room(4 * (counted.matrices.size_bytes + counted.vectors.size_bytes) + room.size_bytes)
        kinds = [Places(Arena(counted.matrices.size_bytes), Arena(counted.vectors.size_bytes)) for _ in range(4)]
        self._weights, self._gradients, self._means, self._squares = (self._weights_in(kind) for kind in kinds)
        self.matrices, self.vectors = ([kind.flat(part) for kind in kinds] for part in ("matrices", "vectors"))
        self.tensors, self.gradients, self.means, self.squares = (
            self._named(kind) for kind in (self._weights, self._gradients, self._means, self._squares))
        for name, tensor in self.tensors.items():
            tensor.write(self._read(name, tensor.shape))
        self.tensors |= {names["router_bias"].format(layer): Trained(bias) for layer, bias in self._biases.items()}
        self._options = {"threads": threads, "interpret": interpret}
        self._make_room(Arena())
        factors = names.get("rope_factors", "")
        self._cosine, self._sine = config.rope.tables(
            length, checkpoint.tensors[factors].read() if factors in checkpoint.tensors else None)
        self._back = -self._sine
        self._programs: dict[str, Program] = {}

    @property
    def weights(self) -> Weights:
        """As they lie in memory."""
        return self._weights

    @property
    def tables(self) -> tuple[Array, Array]:
        """Cosines and sines [length, pairs] of the angles by which features turn."""
        return self._cosine, self._sine

    # ---- what an architecture says

    @property
    @abstractmethod
    def _width(self) -> int:
        """Features of what attention gives, of all heads."""

    @abstractmethod
    def _attention_in(self, places: Places) -> Any:
        """A layer's weights of attention, but for its norm and its output."""

    @abstractmethod
    def _attention_tensors(self, one: Any, layer: int) -> dict[str, Array]:
        """These, by role, as the checkpoint has them."""

    @abstractmethod
    def _kept_of_attention(self, memory: Memory) -> Any:
        """What their gradients need of the forward pass."""

    @abstractmethod
    def _make_attention_room(self, memory: Memory) -> None:
        """What all layers use in turn."""

    @abstractmethod
    def _attend(self, one: Any, kept: Kept) -> Steps:
        """From kept.attention_normed to kept.mixed."""

    @abstractmethod
    def _attend_back(self, one: Any, found: Any, kept: Kept) -> Steps:
        """From _dmixed to _dnormed, and `found`, the gradients of the weights."""

    # ---- memory

    def _read(self, name: str, shape: tuple[int, ...]) -> Array:
        """A tensor of the checkpoint."""
        entry = self.checkpoint.tensors.get(name)
        if entry is None or entry.shape != shape:
            raise ModelError(f"{self.checkpoint.path}, tensor {name}",
                             "nothing" if entry is None else f"shape {entry.shape}", f"a tensor of shape {shape}",
                             "get the file again")
        return entry.read()

    def _mixes(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.config.mixture is not None and layer >= getattr(self.config, "dense_layers", 0)

    def _weights_in(self, places: Places) -> Weights:
        config, features = self.config, self.config.features
        embedded = places.matrix(config.vocabulary, features)
        layers = tuple(
            Layer(places.vector(features), self._attention_in(places), places.matrix(features, self._width),
                  places.vector(features), FeedForwards.weights_in(places, config, self._mixes(number)))
            for number in range(config.layers))
        gain = places.vector(features)
        return Weights(embedded, layers, gain, embedded if self._tied else places.matrix(config.vocabulary, features))

    def _named(self, weights: Weights) -> dict[str, Trained]:
        """By the names of the file."""
        names = self._names
        found = {names["embedding"]: Trained(weights.embedding), names["gain"]: Trained(weights.gain)}
        if not self._tied:
            found[names["logits"]] = Trained(weights.logits)
        for number, layer in enumerate(weights.layers):
            parts = {
                "attention_gain": layer.attention_gain, **self._attention_tensors(layer.attention, number),
                "output": layer.output, "feed_forward_gain": layer.feed_forward_gain,
                **FeedForwards.tensors(layer.feed_forward),
            }
            for role, rows in parts.items():
                if names[role].count("{}") > 1:  # a tensor for each expert
                    found |= {names[role].format(number, expert): Trained(one) for expert, one in enumerate(rows)}
                else:
                    found[names[role].format(number)] = Trained(rows)
        return found

    def _make_room(self, memory: Memory) -> None:
        config, rows, features = self.config, self._rows, self.config.features

        def room(*extents: int) -> Array:
            return memory.empty(extents, F32)

        self.tokens, self.targets, self.wanted = (memory.empty((rows,), I32) for _ in range(3))
        self._feed_forwards = FeedForwards(config, rows, memory)
        self._kept = [
            Kept(room(rows, features), room(rows, features), self._kept_of_attention(memory), room(rows, self._width),
                 room(rows, features), room(rows, features),
                 self._feed_forwards.kept_in(memory, self._mixes(number), self._bias_of(number)))
            for number in range(config.layers)]
        self._last, self._normed = room(rows, features), room(rows, features)
        self._logits = room(rows, config.vocabulary)
        self._losses, self._factor = room(rows), room(rows)
        self._d, self._dnormed, self._dmixed = room(rows, features), room(rows, features), room(rows, self._width)
        self._make_attention_room(memory)
        self.norm, self._clip, self.loss = room(1), room(1), memory.empty((1,), np.dtype(np.float64))

    def _bias_of(self, layer: int) -> Array | None:
        """Of the choice of experts. It is no weight: it has no gradient, and moves by the tokens that experts get."""
        mixture = self.config.mixture
        if not self._mixes(layer) or not mixture.sigmoid:
            return None
        if layer not in self._biases:
            read = self._read(self._names["router_bias"].format(layer), (mixture.experts,))
            self._biases[layer] = np.array(read, np.float32)
        return self._biases[layer]

    @property
    def apart(self) -> dict[str, Array]:
        """Tensors that are no part of matrices or vectors, by the names of the file: the biases of choices."""
        return {self._names["router_bias"].format(layer): bias for layer, bias in self._biases.items()}

    def pieces(self, kind: str = "weights", ending: str = "", laid_out: bool = False) -> list[Piece]:
        """What a file is to have of a kind (KINDS): the tensors, each under its name and an ending, in the order in
        which they begin in memory, then those that lie apart. laid_out: with what lies between, too, as tensors of its
        own, as such a file has no holes, and these on cache lines; where each takes whole ones that adds nothing."""
        tensors = {"weights": self.tensors, "gradients": self.gradients, "means": self.means, "squares": self.squares}
        named = tensors[kind]
        pieces: list[Piece] = []
        for flat in (self.matrices[KINDS.index(kind)], self.vectors[KINDS.index(kind)]):
            places = {tensor.rows.ctypes.data - flat.ctypes.data: name for name, tensor in named.items()}
            reached = 0
            for place in sorted(place for place in places if 0 <= place < flat.nbytes):
                pieces += padding(len(pieces), place - reached if laid_out else 0, ending)
                pieces.append(piece_of(places[place] + ending, named[places[place]]))
                reached = place + named[places[place]].nbytes
            end = round_up(flat.nbytes, LINE_BYTES)
            pieces += padding(len(pieces), end - reached if laid_out else 0, ending)
        for name in self.apart if kind == "weights" else ():
            pieces.append(piece_of(name, named[name]))
            pieces += padding(len(pieces), -pieces[-1].nbytes % LINE_BYTES if laid_out else 0)
        return pieces

    def buffers(self) -> dict[str, Any]:
        """What steps use besides weights and what belongs to these, by names."""
        others = ("matrices", "vectors", "tensors", "weights", "gradients", "means", "squares")
        return {name: value for key, value in vars(self).items() if (name := key.lstrip("_")) not in others}

    # ---- the program

    def sections(self) -> dict[str, Sections]:
        """The steps of each program, under headings."""
        mean = optimizer.mean_loss, (self._losses, self.targets, self.loss)
        scoring = cross_entropy.cross_entropy, (self._logits, self.wanted, self._losses)
        balance = [step for kept in self._kept for step in self._feed_forwards.balance(kept.feed_forward)]
        return {
            "train": [
                *self._forward(), ("loss", [*self._head(), mean]), *self._backward(), ("AdamW", self._improve()),
                *([("balance of experts", balance)] if balance else [])],
            "evaluate": [*self._forward(), ("loss", [scoring, mean])],
        }

    def _run(self, name: str, **variables: float) -> None:
        if name not in self._programs:
            steps = [step for _, some in self.sections()[name] for step in some]
            self._programs[name] = Program(steps, static=True, **self._options)
        self._programs[name](**variables)

    def _inputs(self, layer: int) -> Array:
        """What goes into a layer; of the last one's successor, what comes out of that."""
        return self._kept[layer].x if layer < len(self._kept) else self._last

    def _forward(self) -> Sections:
        return [
            ("embedding", [(embedding.embedding_f32, (self.tokens, self._weights.embedding, self._inputs(0)))]),
            *((f"layer {number}", self._layer(number)) for number in range(self.config.layers)),
            ("logits", [
                (norm.rms_norm, (self._last, self._weights.gain, self.config.epsilon, self._normed)),
                (matmul.matmul_nt_f32, (self._normed, self._weights.logits, self._logits))]),
        ]

    def _layer(self, number: int) -> Steps:
        layer, kept, epsilon = self._weights.layers[number], self._kept[number], self.config.epsilon
        return [
            (norm.rms_norm, (kept.x, layer.attention_gain, epsilon, kept.attention_normed)),
            *self._attend(layer.attention, kept),
            (matmul.matmul_nt_residual_f32, (kept.mixed, layer.output, kept.x, kept.y)),
            (norm.rms_norm, (kept.y, layer.feed_forward_gain, epsilon, kept.feed_forward_normed)),
            *self._feed_forwards.forward(
                layer.feed_forward, kept.feed_forward, kept.feed_forward_normed, kept.y, self._inputs(number + 1)),
        ]

    def _head(self) -> Steps:
        """From logits to the gradient of what comes out of the last layer."""
        weights, found, d = self._weights, self._gradients, self._d
        return [
            (gradients.cross_entropy_gradient, (
                self._logits, self.targets, Variable("share", 1.0), self._losses, self._logits)),
            *through_matrix(weights.logits, found.logits, self._logits, self._normed, self._dnormed),
            *([] if found.logits is found.embedding else [(gradients.clear, (found.embedding,))]),
            (gradients.clear, (d,)),
            self._norm_back(self._last, weights.gain, found.gain),
        ]

    def _norm_back(self, x: Array, gain: Array, dgain: Array) -> tuple[Any, tuple[Any, ...]]:
        """Adds to d the gradient of what was normed."""
        return gradients.rms_norm_gradient, (
            x, gain, self.config.epsilon, self._dnormed, self._d, self._factor, self._d, dgain)

    def _backward(self) -> Sections:
        return [
            *((f"layer {number}, backwards", self._layer_back(number))
              for number in reversed(range(self.config.layers))),
            ("embedding, backwards", [
                (gradients.embedding_gradient, (self._d, self.tokens, self._gradients.embedding))]),
        ]

    def _layer_back(self, number: int) -> Steps:
        layer, found = self._weights.layers[number], self._gradients.layers[number]
        kept = self._kept[number]
        return [
            *self._feed_forwards.backward(layer.feed_forward, found.feed_forward, kept.feed_forward,
                                          kept.feed_forward_normed, self._d, self._dnormed),
            self._norm_back(kept.y, layer.feed_forward_gain, found.feed_forward_gain),
            *through_matrix(layer.output, found.output, self._d, kept.mixed, self._dmixed),
            *self._attend_back(layer.attention, found.attention, kept),
            self._norm_back(kept.x, layer.attention_gain, found.attention_gain),
        ]

    def _turn(self, heads: Array, sine: Array, interleaved: bool) -> Steps:
        """heads [sequences, length, heads, features], of each sequence by itself. interleaved: see kernels/rope.py."""
        extents = (-1, 2) if interleaved else (2, -1)
        kernel = rope.rope_interleaved_in_place if interleaved else rope.rope_half_split_in_place
        return [(kernel, (one.reshape(*one.shape[:-1], *extents), self._cosine, sine, 0)) for one in heads]

    def _improve(self) -> Steps:
        gradient = [kind[1] for kind in (self.matrices, self.vectors)]
        parts = [optimizer.parts_of(one.size) for one in gradient]
        partial = empty((sum(parts),), F32)
        steps: Steps = [(optimizer.squares, one) for one in zip(gradient, np.split(partial, parts[:1]), strict=True)]
        steps.append((optimizer.clip_factor, (partial, Variable("limit", 1.0), self._clip, self.norm)))
        for (weights, found, means, squares), keep in (
                (self.matrices, Variable("keep", 1.0)), (self.vectors, 1.0)):
            numbers = [Variable(name, value) for name, value in (
                ("rate", 0.0), ("spread", 1.0), ("beta1", 0.9), ("beta2", 0.95), ("epsilon", 1e-8))]
            steps.append((optimizer.adamw, (
                weights, means, squares, found, self._clip, keep, *numbers, weights, means, squares)))
        return steps

    # ---- running

    def step(self, tokens: Array, targets: Array, recipe: Recipe, number: int) -> tuple[float, float]:
        """The loss, a mean over the targets that count, and the norm of its gradient, before the weights are changed.
        number: of the step, from 1 on. Raises ModelError for tokens that there are not, and for a balance of experts
        that have no bias."""
        if recipe.balance and not self._biases:
            raise ModelError(self.checkpoint.where, "a model that chooses experts without a bias, or has none",
                             "a DeepSeek-V3, whose experts can be balanced", "train without --balance")
        counted = self._take(tokens, targets)
        rate = recipe.rate_of(number)
        self._run(
            "train", share=1.0 / counted, limit=recipe.clip, keep=1.0 - rate * recipe.decay, beta1=recipe.beta1,
            beta2=recipe.beta2, epsilon=recipe.epsilon, rate=rate / (1.0 - recipe.beta1**number),
            spread=(1.0 - recipe.beta2**number) ** -0.5, **({"balance": recipe.balance} if self._biases else {}))
        return float(self.loss[0]), float(self.norm[0])

    def loss_of(self, tokens: Array, targets: Array) -> float:
        """The same loss, without a change of the weights."""
        self._take(tokens, targets)
        self._run("evaluate")
        return float(self.loss[0])

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
        np.maximum(wanted, 0, out=self.wanted)
        return counted
