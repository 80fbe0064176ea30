"""A kernel's arguments as its author asks for them, whatever the target.

Enters: names of tensors, scalars and dimensions. Leaves: registers that hold words of the argument block (docs/ir.md).
Holds: a name that the kernel does not have is an error at the author's line that lists those that it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ir.types import TensorType
from .errors import AssemblyError, author_location
from .notation import Reg


class Arguments:
    """What assemblies of whole kernels have in common.

    name: of the kernel. parameters: its own, by name. stored: tensors that it stores to. slots: words asked for so far.
    """

    __slots__ = ()
    name: str
    parameters: Mapping[str, Any]
    stored: tuple[str, ...]
    slots: list[str]

    def _word(self, slot: str) -> Reg:
        """A register with a word of the argument block."""
        raise NotImplementedError

    def slot_number(self, slot: str) -> int:
        """Which word after those that every kernel has; a slot that is asked for first is added."""
        if slot not in self.slots:
            self.slots.append(slot)
        return self.slots.index(slot)

    def parameter(self, name: str, tensor: bool) -> Any:
        """The type of a tensor, or of a scalar. Raises AssemblyError where the kernel has none of this name."""
        found = self.parameters.get(name)
        if found is None or isinstance(found, TensorType) != tensor:
            known = [n for n, t in self.parameters.items() if isinstance(t, TensorType) == tensor]
            raise AssemblyError("notation", f"{self.name} has no {'tensor' if tensor else 'scalar'} {name}",
                                author_location(), name, ", ".join(known) or "none")
        return found

    def stride(self, name: str, dimension: int) -> Reg:
        """The stride of a tensor's dimension in elements."""
        rank = len(self.parameter(name, True).dims)
        if not 0 <= dimension < rank:
            raise AssemblyError("notation", f"{name} has no dimension {dimension}", author_location(), str(dimension),
                                f"0 to {rank - 1}")
        return self._word(f"{name}.stride.{dimension}")

    def extent(self, dim: str) -> Reg:
        """The extent of a symbolic dimension."""
        known = [d for t in self.parameters.values() if isinstance(t, TensorType) for d in t.dims if isinstance(d, str)]
        if dim not in known:
            raise AssemblyError("notation", f"{self.name} has no dimension {dim}", author_location(), dim,
                                ", ".join(dict.fromkeys(known)))
        return self._word(f"dim.{dim}")

    def scalar(self, name: str) -> Reg:
        """The word of a scalar parameter: integers sign-extended, f32 bits in the low half, f64 bits."""
        self.parameter(name, False)
        return self._word(f"scalar.{name}")
