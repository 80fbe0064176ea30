"""What of a bound call may change from run to run without an index leaving its tensor.

Enters: a call's binding, and what its kernel requires. Leaves: whether scalars, and extents that may be fewer, may be
others. Holds: inside `free` nothing is computed of indices; elsewhere they are looked through again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .arguments import Binding, Free, Signature, looked_through


class Bounds:
    """Of one bound call.

    rows: dimensions of which a run may have fewer than the binding says, and how many there are at first. state: the
    call as it is now, and from and to where each scalar and each of these dimensions may be (`Free`).
    """

    __slots__ = ("_most", "_requires", "_signature", "state")

    def __init__(self, signature: Signature, binding: Binding, requires: Iterable[Sequence[Any]],
                 rows: Mapping[str, int] | None = None) -> None:
        self._signature = signature
        self._requires = looked_through(requires)
        self._most = {dim: binding.dims[dim] for dim in rows or ()}
        self.state: tuple[Binding, Free] = binding, {}
        if self._requires:
            self._look_through(binding._replace(dims=binding.dims | dict(rows or {})))

    @property
    def free(self) -> Free:
        return self.state[1]

    def _look_through(self, binding: Binding) -> None:
        free, proved = self._signature.freedom(binding, self._requires, self._most)
        if not proved:
            self._signature.check_requires(binding, self._requires)
        self.state = binding, free

    def allow(self, changes: Mapping[tuple[str, str], int]) -> None:
        """Take other values; those that are not named stay. Raises ArgumentError, and then none has changed."""
        if not self._requires:
            return
        before, positions = self.state[0], self._signature.positions
        binding = before._replace(
            dims=before.dims | {name: size for (kind, name), size in changes.items() if kind == "dim"},
            scalars=before.scalars | {positions[n]: word for (kind, n), word in changes.items() if kind == "scalar"})
        if all(low <= changes.get(leaf, low) <= high for leaf, (low, high) in self.free.items()):
            self.state = binding, self.free
        else:
            self._look_through(binding)
