"""A step of training: tokens in, loss out, every weight a little better. One program, every number of it by kernels.

In: a checkpoint, and what an architecture says of its attention. Out: `Trainer`, the base of those of the architectures
(ARCHITECTURE/training.py). Holds: weights, gradients and both of AdamW's means are f32, each kind in one piece of
memory; the program is made once. With adapters (adapted.py) these are the weights that learn, and all others stay as
they are, in f32 or bf16: they have neither gradients nor means. What of a layer is made of other numbers in little time
(norms, hidden features) is then made again for gradients and not kept.

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

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..kernels import cross_entropy, embedding, gradients, norm, optimizer, rope
from ..runtime.buffers import LINE_BYTES, Arena, empty
from ..runtime.program import Program, Variable
from ..runtime.system import round_up
from .adapted import (
    MAX_RANK,
    AdaptedPlaces,
    Again,
    Lora,
    adapted_in,
    bases,
    product,
    product_residual,
    through_matrix,
    with_weights,
)
from .adapter import tensor_names
from .checkpoint import Checkpoint
from .errors import ModelError
from .trained import Counter, FeedForwards, Kept, Layer, Memory, Places, Weights
from .training import LENGTH, Recipe, check_room, padding, piece_of
from .weights import DTYPES
from .workspace import Sections, Steps
from .written import Piece

Array = np.ndarray[Any, np.dtype[Any]]
F32, I32 = np.dtype(np.float32), np.dtype(np.int32)
KINDS = ("weights", "gradients", "means", "squares")


@dataclass(frozen=True, slots=True)
class Trained:
    """A tensor of the checkpoint, or of an adapter, whose numbers are the trainer's: `rows`, as they lie there. order:
    which of them is each of the tensor's (None: the same)."""

    rows: Array
    order: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.rows.shape)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def read(self) -> Array:
        return self.rows if self.order is None else self.rows[self.order]

    def write(self, source: Array) -> None:
        if self.order is None:
            self.rows[...] = source
        else:
            self.rows[self.order] = source


class Trainer(ABC):
    """sequences, length: of the tokens of a step. tensors: that learn, of the checkpoint or of an adapter, as they are
    now, by name. matrices, vectors: all of these weights, their gradients, means and squares, each kind as one vector.
    tokens, targets, wanted: of a step; wanted is 0 where a target does not count. lora: what adapters there are, with
    the modules that have them; None where all weights learn.

    `step` takes tokens and targets [sequences, length]; a target below 0 does not count.
    """

    def __init__(
        self, checkpoint: Checkpoint, config: Any, names: Mapping[str, str], sequences: int, length: int | None, *,
        threads: int | None = None, interpret: bool = False, lora: Lora | None = None, base: str = "f32",
    ) -> None:
        """config: an architecture's; names: role -> the name of its tensor. lora: train such adapters. base: what the
        matrices then are held in, "f32" or "bf16". Raises ModelError for a checkpoint that lacks a tensor, and for a
        step that can't be."""
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
        self.lora = lora
        held = self._hold_all() if lora is None else self._hold_adapters(lora, DTYPES[base])
        for name, tensor in held.items():
            tensor.write(self._read(name, tensor.shape))
        self._options = {"threads": threads, "interpret": interpret}
        self._make_room(Arena())
        factors = names.get("rope_factors", "")
        self._cosine, self._sine = config.rope.tables(
            length, checkpoint.tensors[factors].read() if factors in checkpoint.tensors else None)
        self._back = -self._sine
        self._programs: dict[str, Program] = {}

    def _hold_all(self) -> dict[str, Trained]:
        """Room for weights that all learn; the tensors that are to be read."""
        counted = Places(Counter(), Counter())
        self._weights_in(counted)
        check_room(4 * (counted.matrices.size_bytes + counted.vectors.size_bytes) + self._room_bytes())
        kinds = [Places(Arena(counted.matrices.size_bytes), Arena(counted.vectors.size_bytes)) for _ in range(4)]
        self._hold(kinds)
        self.tensors, self.gradients, self.means, self.squares = (
            self._named(kind) for kind in (self._weights, self._gradients, self._means, self._squares))
        held = dict(self.tensors)
        self.tensors |= {self._names["router_bias"].format(layer): Trained(bias)
                         for layer, bias in self._biases.items()}
        return held

    def _hold_adapters(self, lora: Lora, dtype: np.dtype[Any]) -> dict[str, Trained]:
        """The same of adapters, which are drawn, and of weights that stay as they are."""
        self.lora = lora = replace(lora, modules=self._modules(lora))
        matrices, vectors, numbers, lows = (Counter() for _ in range(4))
        self._weights_in(AdaptedPlaces(
            lora, self._rows, self._published, Places(matrices, vectors, dtype), numbers, lows))
        sizes = [one.size_bytes for one in (matrices, vectors, lows)]
        check_room(4 * numbers.size_bytes + sum(sizes) + self._room_bytes(),
                   "the weights, 16 bytes a number of an adapter")
        base = Places(Arena(sizes[0]), Arena(sizes[1]), dtype)
        of_each: list[tuple[Any, Any]] = [(base, Arena(sizes[2])), *((None, Again()) for _ in range(3))]
        self._hold([AdaptedPlaces(lora, self._rows, self._published, of_kind, Arena(numbers.size_bytes), room)
                    for of_kind, room in of_each])
        self.tensors, self.gradients, self.means, self.squares = (
            self._of_adapters(kind) for kind in (self._weights, self._gradients, self._means, self._squares))
        random = np.random.default_rng(lora.seed)
        for down, up in zip(*[iter(self.tensors.values())] * 2, strict=True):
            down.write(random.uniform(-1.0, 1.0, down.shape) * down.shape[1] ** -0.5)
            up.write(np.zeros(up.shape))
        return self._named(bases(self._weights))

    def _modules(self, lora: Lora) -> tuple[str, ...]:
        """Those that have adapters. Raises ModelError for some that the model lacks, and for a rank that can't be."""
        if not 1 <= lora.rank <= MAX_RANK:
            raise ModelError("the rank of adapters", f"{lora.rank}", f"1 to {MAX_RANK}")
        if not 0.0 < lora.alpha < math.inf:
            raise ModelError("the alpha of adapters", f"{lora.alpha:g}", "a number above 0")
        counted = AdaptedPlaces(lora, self._rows, self._published, None, Counter(), Counter())
        self._weights_in(counted)
        for module in lora.modules:
            if module not in counted.seen:
                raise ModelError("the matrices to be adapted", repr(module),
                                 f"all, or some of {', '.join(counted.seen)}", "choose among these")
        usual = [module for module, attends in counted.seen.items() if attends or self.config.mixture is None]
        return tuple(module for module in counted.seen if module in (lora.modules or usual))

    def _hold(self, kinds: Sequence[Any]) -> None:
        self._weights, self._gradients, self._means, self._squares = (self._weights_in(kind) for kind in kinds)
        self.matrices, self.vectors = ([kind.flat(part) for kind in kinds] for part in ("matrices", "vectors"))

    def _room_bytes(self) -> int:
        room = Counter()
        self._make_room(room)
        return room.size_bytes

    def _of_adapters(self, weights: Weights) -> dict[str, Trained]:
        """Of each adapter A and B, by the names of a file."""
        found = {}
        for number, layer in enumerate(weights.layers):
            for one in adapted_in(layer):
                for part in one.parts:
                    name = self._published[part.role].format(number)
                    down, up = tensor_names(name)
                    found[down] = Trained(one.down[part.ranks])
                    found[up] = Trained(part.up, self._order_of(part.role))
        return found

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
    def _published(self) -> Mapping[str, str]:
        """role -> the name of its tensor where models are published as safetensors."""

    def _order_of(self, role: str) -> Array | None:
        """Which row of a matrix of this checkpoint is each of such a tensor's (None: the same)."""
        return None

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
    def _attend_back(self, one: Any, found: Any, kept: Kept, dnormed: Array | None) -> Steps:
        """From _dmixed to dnormed, if that is asked for, and `found`, the gradients of the weights."""

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

    def _weights_in(self, places: Any) -> Weights:
        config, features = self.config, self.config.features
        embedded = places.matrix(config.vocabulary, features)
        layers = tuple(
            Layer(places.vector(features), self._attention_in(places),
                  places.matrix(features, self._width, of={"output": features}), places.vector(features),
                  FeedForwards.weights_in(places, config, self._mixes(number)))
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
        self._feed_forwards = FeedForwards(config, rows, memory, again=self.lora is not None)
        self._made_again = None if self.lora is None else room(rows, features)

        def normed() -> Array:
            return room(rows, features) if self._made_again is None else self._made_again

        self._kept = [
            Kept(room(rows, features), normed(), self._kept_of_attention(memory), room(rows, self._width),
                 room(rows, features), normed(),
                 self._feed_forwards.kept_in(memory, self._mixes(number), self._bias_of(number)))
            for number in range(config.layers)]
        self._last, self._normed = room(rows, features), room(rows, features)
        self._logits = room(rows, config.vocabulary)
        self._losses, self._factor = room(rows), room(rows)
        self._d, self._dnormed, self._dmixed = room(rows, features), room(rows, features), room(rows, self._width)
        self._make_attention_room(memory)
        self.norm, self._clip, self.loss = room(1), room(1), memory.empty((1,), np.dtype(np.float64))

    @property
    def _balances(self) -> bool:
        """Whether a step moves biases of choices."""
        return bool(self._biases) and self.lora is None

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
        """Tensors that change and are no part of matrices or vectors, by the names of the file: biases of choices."""
        return {self._names["router_bias"].format(layer): bias
                for layer, bias in self._biases.items() if self._balances}

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
                *([("balance of experts", balance)] if self._balances else [])],
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
            ("embedding", [(with_weights("embedding", self._weights.embedding, embedding), (
                self.tokens, self._weights.embedding, self._inputs(0)))]),
            *((f"layer {number}", self._layer(number)) for number in range(self.config.layers)),
            ("logits", [
                (norm.rms_norm, (self._last, self._weights.gain, self.config.epsilon, self._normed)),
                *product(self._weights.logits, self._normed, self._logits)]),
        ]

    def _layer(self, number: int) -> Steps:
        layer, kept = self._weights.layers[number], self._kept[number]
        return [
            self._norm_attention(number),
            *self._attend(layer.attention, kept),
            *product_residual(layer.output, kept.mixed, kept.x, kept.y),
            self._norm_feed_forward(number),
            *self._feed_forwards.forward(
                layer.feed_forward, kept.feed_forward, kept.feed_forward_normed, kept.y, self._inputs(number + 1)),
        ]

    def _norm_attention(self, number: int) -> tuple[Any, tuple[Any, ...]]:
        layer, kept = self._weights.layers[number], self._kept[number]
        return norm.rms_norm, (kept.x, layer.attention_gain, self.config.epsilon, kept.attention_normed)

    def _norm_feed_forward(self, number: int) -> tuple[Any, tuple[Any, ...]]:
        layer, kept = self._weights.layers[number], self._kept[number]
        return norm.rms_norm, (kept.y, layer.feed_forward_gain, self.config.epsilon, kept.feed_forward_normed)

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

    def _norm_back(self, x: Array, gain: Array, dgain: Array | None) -> tuple[Any, tuple[Any, ...]]:
        """Adds to d the gradient of what was normed. dgain: None where the gain stays as it is."""
        if dgain is None:
            return gradients.rms_norm_past, (x, gain, self.config.epsilon, self._dnormed, self._d, self._d)
        return gradients.rms_norm_gradient, (
            x, gain, self.config.epsilon, self._dnormed, self._d, self._factor, self._d, dgain)

    def _backward(self) -> Sections:
        return [
            *((f"layer {number}, backwards", self._layer_back(number))
              for number in reversed(range(self.config.layers))),
            *([] if self._gradients.embedding is None else [("embedding, backwards", [
                (gradients.embedding_gradient, (self._d, self.tokens, self._gradients.embedding))])]),
        ]

    def _layer_back(self, number: int) -> Steps:
        layer, found = self._weights.layers[number], self._gradients.layers[number]
        kept = self._kept[number]
        deepest = number == 0 and self._gradients.embedding is None     # whose input has no gradient
        attends = not deepest or any(adapted_in(found.attention))
        mixes = attends or found.output is not None
        attends_again, feeds_again = (
            self._made_again is not None and any(adapted_in(one)) for one in (found.attention, found.feed_forward))
        return [
            *([self._norm_feed_forward(number)] if feeds_again else []),
            *self._feed_forwards.backward(layer.feed_forward, found.feed_forward, kept.feed_forward,
                                          kept.feed_forward_normed, self._d, self._dnormed),
            *([self._norm_back(kept.y, layer.feed_forward_gain, found.feed_forward_gain),
               *through_matrix(layer.output, found.output, self._d, kept.mixed, self._dmixed)] if mixes else []),
            *([self._norm_attention(number)] if attends_again else []),
            *(self._attend_back(layer.attention, found.attention, kept, None if deepest else self._dnormed)
              if attends else []),
            *([] if deepest else [self._norm_back(kept.x, layer.attention_gain, found.attention_gain)]),
        ]

    def _turn(self, heads: Array, sine: Array, interleaved: bool) -> Steps:
        """heads [sequences, length, heads, features], of each sequence by itself. interleaved: see kernels/rope.py."""
        extents = (-1, 2) if interleaved else (2, -1)
        kernel = rope.rope_interleaved_in_place if interleaved else rope.rope_half_split_in_place
        return [(kernel, (one.reshape(*one.shape[:-1], *extents), self._cosine, sine, 0)) for one in heads]

    def _improve(self) -> Steps:
        gradient = [kind[1] for kind in (self.matrices, self.vectors) if kind[1].size]
        parts = [optimizer.parts_of(one.size) for one in gradient]
        partial = empty((sum(parts),), F32)
        steps: Steps = [(optimizer.squares, one) for one in zip(gradient, np.split(partial, parts[:1]), strict=False)]
        steps.append((optimizer.clip_factor, (partial, Variable("limit", 1.0), self._clip, self.norm)))
        for (weights, found, means, squares), keep in (
                (self.matrices, Variable("keep", 1.0)), (self.vectors, 1.0)):
            if not weights.size:
                continue
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
        if recipe.balance and self.lora is not None:
            raise ModelError("--balance", "adapters, beside which the choice of experts stays as it is", "none",
                             "train without --balance, or without --lora")
        if recipe.balance and not self._biases:
            raise ModelError(self.checkpoint.where, "a model that chooses experts without a bias, or has none",
                             "a DeepSeek-V3, whose experts can be balanced", "train without --balance")
        counted = self._take(tokens, targets)
        rate = recipe.rate_of(number)
        self._run(
            "train", share=1.0 / counted, limit=recipe.clip, keep=1.0 - rate * recipe.decay, beta1=recipe.beta1,
            beta2=recipe.beta2, epsilon=recipe.epsilon, rate=rate / (1.0 - recipe.beta1**number),
            spread=(1.0 - recipe.beta2**number) ** -0.5, **({"balance": recipe.balance} if self._balances else {}))
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
