"""The feed-forward part of a layer: dense, or a mixture of experts; how these are chosen, and their weights.

In: a loader whose names have the roles "feed_forward_gain", "gate", "up", "down", and of a mixture "router",
"router_bias", "expert_gate" and so on, "shared_gate" and so on. Out: `DenseWeights` or `MixtureWeights`. Holds: a
layer's shared experts stand behind its routed ones, each of the same size, as experts that every token takes with
weight 1, or apart where the file has them in another form of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.quantized import PANEL
from .checkpoint import Entry, Parted
from .errors import ModelError
from .experts import Experts
from .linear import Dense, Matrix
from .raw_blocks import Raw, of_one_form
from .weights import Loader, Use

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Mixture:
    """How a layer's experts are chosen (sapper/kernels/gate.py).

    experts: routed ones; shared: those that every token takes; chosen: routed experts of a token; hidden: features of
    one expert; groups, kept: of experts, and how many of them are looked at; sigmoid: scores are sigmoids, with a bias,
    or else a softmax; normalise, scale: of the weights.
    """

    experts: int
    shared: int
    chosen: int
    hidden: int
    groups: int
    kept: int
    sigmoid: bool
    normalise: bool
    scale: float

    @property
    def taken(self) -> int:
        """Experts that a token goes through."""
        return self.chosen + self.shared

    def check(self, where: str) -> None:
        """Raises ModelError where the numbers do not fit together."""
        experts, groups = self.experts, self.groups
        if experts % groups or (self.sigmoid and experts // groups < 2):
            expected = "groups of one size, of two experts or more"
            raise ModelError(where, f"{experts} experts in {groups} groups", expected)
        if self.kept > groups or self.chosen > self.kept * (experts // groups):
            raise ModelError(
                where,
                f"{self.chosen} experts of a token, from {self.kept} of {groups} groups of {experts // groups}",
                "as many as there are to choose from",
            )


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """gate, up [hidden, features]; down [features, hidden]."""

    gain: Array
    gate: Matrix
    up: Matrix
    down: Matrix

    @property
    def step_bytes(self) -> int:
        return self.gain.nbytes + self.gate.nbytes + self.up.nbytes + self.down.nbytes

    @property
    def step_size(self) -> int:
        """Weights that one token meets."""
        return self.gate.size + self.up.size + self.down.size

    @property
    def hidden(self) -> int:
        return self.gate.size // self.gain.size


@dataclass(frozen=True, slots=True)
class MixtureWeights:
    """router [experts, features], f32; bias [experts], f32, or None. gate, up: experts [hidden, features], the shared
    ones last; down: experts [features, hidden]; experts: how many these are, and taken: how many of them a token goes
    through. shared: the shared experts together, where they are not among those.
    """

    gain: Array
    router: Dense
    bias: Array | None
    gate: Experts
    up: Experts
    down: Experts
    experts: int
    taken: int
    shared: DenseWeights | None = None

    @property
    def step_bytes(self) -> int:
        experts = self.gate.nbytes + self.up.nbytes + self.down.nbytes
        shared = self.shared.step_bytes if self.shared is not None else 0
        return self.gain.nbytes + self.router.nbytes + self.taken * experts + shared

    @property
    def step_size(self) -> int:
        """Weights that one token meets."""
        shared = self.shared.step_size if self.shared is not None else 0
        return self.router.size + self.taken * (self.gate.size + self.up.size + self.down.size) + shared


def load_dense(loader: Loader, features: int, hidden: int, layer: int) -> DenseWeights:
    gain = loader.vector("feed_forward_gain", features, layer)
    gate, up = loader.matrices([Use("gate", hidden), Use("up", hidden)], features, layer)
    return DenseWeights(gain, gate, up, loader.joined([Use("down", features)], hidden, layer))


def load_mixture(loader: Loader, features: int, mixture: Mixture, layer: int) -> MixtureWeights:
    """The router stays in f32."""
    hidden = mixture.hidden
    gain = loader.vector("feed_forward_gain", features, layer)
    router = loader.wide("router", mixture.experts, features, layer)
    bias = loader.vector("router_bias", mixture.experts, layer) if mixture.sigmoid else None
    shapes = {"gate": (hidden, features), "up": (hidden, features), "down": (features, hidden)}
    axes = {"gate": 0, "up": 0, "down": 1}
    parts = {role: _Parts(loader, role, mixture, shape, axes[role], layer) for role, shape in shapes.items()}
    together, routed = (_forms(parts, with_shared) for with_shared in (True, False))
    apart = together != routed
    gates, ups, downs = (
        part.joined(routed[role] is not None, with_shared=not apart) for role, part in parts.items())
    if not apart:
        return MixtureWeights(gain, router, bias, gates, ups, downs, mixture.experts + mixture.shared, mixture.taken)
    wide = hidden * mixture.shared
    gate, up = loader.matrices([Use("shared_gate", wide), Use("shared_up", wide)], features, layer)
    shared = DenseWeights(gain, gate, up, loader.joined([Use("shared_down", features)], wide, layer))
    return MixtureWeights(gain, router, bias, gates, ups, downs, mixture.experts, mixture.chosen, shared)


def _forms(parts: Mapping[str, _Parts], with_shared: bool) -> dict[str, Any]:
    """In which form of blocks each role's experts can be held; None if they can't."""
    forms = {role: part.form(with_shared) for role, part in parts.items()}
    if forms["gate"] != forms["up"]:  # They are used together, by one kernel.
        forms["gate"] = forms["up"] = None
    return forms


class _Parts:
    """The matrices of one role of all experts of a layer: the routed ones, and behind them the shared ones.

    shape: of one expert's matrix. axis: on which the shared ones follow one another in their tensor. All shapes are
    checked when it is made, before memory is taken for so many.
    """

    def __init__(
        self, loader: Loader, role: str, mixture: Mixture, shape: tuple[int, int], axis: int, layer: int
    ) -> None:
        self.loader, self.mixture, self.shape, self.axis = loader, mixture, shape, axis
        experts, name = mixture.experts, f"expert_{role}"
        self.routed: list[Entry]
        pieces: list[Raw | None] = [None]
        shared: list[Raw | None] = []
        if loader.names[name].count("{}") > 1:
            self.routed = [loader.entry(name, shape, layer, expert) for expert in range(experts)]
            if loader.blocks:
                pieces = [loader.raw(name, shape, shape, layer, expert) for expert in range(experts)]
        else:
            together = loader.entry(name, (experts, *shape), layer)
            assert isinstance(together, Parted)
            self.routed = [together.part(expert) for expert in range(experts)]
            if shape[0] % PANEL == 0:
                pieces = [loader.raw(name, together.shape, (experts * shape[0], shape[1]), layer)]
        self.shared: Entry | None = None
        if mixture.shared:
            wide = (shape[0] * mixture.shared, shape[1]) if axis == 0 else (shape[0], shape[1] * mixture.shared)
            self.shared = loader.entry(f"shared_{role}", wide, layer)
            raw = loader.raw(f"shared_{role}", wide, wide, layer)
            shared += [None] if raw is None else raw.split(mixture.shared, axis)
        self._pieces = {with_shared: (of_one_form(found) if loader.blocks else None) or []
                        for with_shared, found in ((False, pieces), (True, pieces + shared))}

    def form(self, with_shared: bool) -> Any:
        """Of the blocks in which the routed experts, or all, can be held; None if they can't."""
        pieces = self._pieces[with_shared]
        return pieces[0].form if pieces else None

    def joined(self, blocks: bool, with_shared: bool) -> Experts:
        """The routed experts, or all."""
        mixture = self.mixture
        count = mixture.experts + mixture.shared * with_shared
        if blocks:
            pieces = self._pieces[with_shared]
            found = pieces[0].experts(pieces, count, self.loader.arena, self.loader.exact)
            if found is not None:
                return self.loader.held(found)
        shared = np.split(self.shared.read(), mixture.shared, axis=self.axis) if self.shared and with_shared else []

        def read(expert: int) -> Array:
            return self.routed[expert].read() if expert < mixture.experts else shared[expert - mixture.experts]

        return self.loader.experts(count, *self.shape, read)
