"""What is written by hand in a target's assembly, beside the tile kernel that says what it computes.

Enters: what `@kernel.assembly(...)` and `asm(...)` are given. Leaves: `ByHand`, a whole kernel, which the runtime takes
where its conditions hold; `PIECES`, instructions and blocks on register rows, by name.
Holds: nothing here knows a target; pieces and `write` are handed to what does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class ByHand:
    """Assembly for one family of targets.

    name: for messages. family: "x86_64". features: those that the code needs. write: writes it, given the assembly.
    contiguous: tensors that must lie in C order. divisible: dim -> what its extent must be a multiple of (1, 16 or 64
    where the extent is not compiled in). no_spill, budget: see assembly.finish. reorder: the scheduler may choose the
    order inside straight stretches. flushes_denormals: denormal inputs and results count as zero, as vdpbf16ps has it;
    declared, since the kernel itself keeps them.
    """

    name: str
    family: str
    features: frozenset[str]
    write: Callable[[Any], None]
    contiguous: tuple[str, ...] = ()
    divisible: Mapping[str, int] = field(default_factory=dict)
    no_spill: bool = False
    budget: Mapping[str, int] = field(default_factory=dict)
    reorder: bool = False
    flushes_denormals: bool = False

    def refusal(self, target: Any, static_dims: Mapping[str, int], unit_strides: Mapping[str, Any],
                dim_classes: Mapping[str, tuple[int, int]]) -> str:
        """Why the code can't be taken for a specialisation (see runtime/launch.py), "" where it can."""
        if target.family != self.family:
            return f"the target is a {target.family}, not a {self.family}"
        missing = sorted(self.features - target.features)
        if missing:
            return f"{target.name} has no {', '.join(missing)}"
        for name in self.contiguous:
            if unit_strides.get(name) != "contiguous":
                return f"{name} is not contiguous"
        for dim, factor in self.divisible.items():
            extent = static_dims.get(dim)
            bound, divisor = dim_classes.get(dim, (0, 1))
            known = extent if extent is not None else 1 if bound == 1 else divisor
            if known % factor:
                return f"{dim} is not known to be a multiple of {factor}"
        return ""

    def calls(self) -> str:
        """What a call must be like, in words; "" where any call will do."""
        needs = [f"{', '.join(self.contiguous)} contiguous"] if self.contiguous else []
        return ", ".join(needs + [f"{dim} a multiple of {factor}" for dim, factor in self.divisible.items()])


class RowPiece(Protocol):
    """An instruction or a block that computes one row from others; made by what knows the target.

    key: "family:name", by which the IRs speak of it. features: those that its author declares. implements: the tile op
    that a schedule may let it stand for, "".
    """

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> str: ...

    @property
    def features(self) -> frozenset[str]: ...

    @property
    def implements(self) -> str: ...

    def usable(self, family: str, features: frozenset[str], lanes: int, inputs: tuple[Any, ...], result: Any) -> bool:
        """Whether it takes rows of these dtypes (of rows: f32, i32, f64, i64) on such a target."""
        ...

    def digest(self) -> str:
        """Changes when the piece does."""
        ...

    def run(self, rows: list[Any], immediates: list[int]) -> Any:
        """The result on rows as arrays: what the instructions mean."""
        ...

    def select(self, selector: Any, op: Any) -> None:
        """Emit it for a lane op."""
        ...


PIECES: dict[str, RowPiece] = {}
"""Pieces that kernels and schedules may name, by key."""
