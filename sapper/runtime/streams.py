"""What a kernel of a program reads from memory once, in the order of its tasks: what workers that wait can ask for.

Enters: a kernel, bound to its arguments. Leaves: its `Stream`, or None. Holds: a worker's first task reads the part of
the stream that `program_code` works out for it from these numbers, as `lane.tasks` shares a range among tasks and
`tasks` of lane IR hands them out; asking for anything else would cost time and change no result.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from .arguments import TensorView, slot_words
from .system import round_up

if TYPE_CHECKING:
    from .program import Launch

WORD_BYTES = 8
LEAST_BYTES = 64 << 10
"""Less is there before anybody could have asked for it."""
MOST_GRANULE_BYTES = 2**31 - 1


class Stream(NamedTuple):
    """Consecutive granules of `granule_bytes` at `address`, which is also `word` bytes into the argument block."""

    word: int
    granules: int
    granule_bytes: int
    address: int

    @property
    def bytes(self) -> int:
        return self.granules * self.granule_bytes


def stream_of(launch: Launch) -> Stream | None:
    """Of a kernel whose only parallel loop walks the first dimension of weights: the largest that it reads."""
    names = launch.signature.parameters
    if len(launch.compiled.tasks) != 1:
        return None
    shared: list[tuple[int, int]] = []  # extents that have more than one granule, and these
    for constant, dims, granule in launch.compiled.tasks[0]:
        extent = constant * math.prod(launch.binding.dims[dim] for dim in dims)
        if extent > granule:
            shared.append((extent, granule))
    if len(shared) != 1:
        return None
    ((extent, granule),) = shared
    most, where = 0, 0
    for position, view in launch.binding.tensors.items():
        granule_bytes = _granule_bytes(view, extent, granule)
        if most < granule_bytes <= MOST_GRANULE_BYTES and names[position].name not in launch.compiled.stored:
            most, where = granule_bytes, position
    granules, slot = -(-extent // granule), f"{names[where].name}.data"
    if granules * most < LEAST_BYTES or slot not in launch.compiled.slots:
        return None
    return Stream(WORD_BYTES * slot_words(launch.compiled.slots)[slot], granules, most,
                  launch.binding.tensors[where].address)


def _granule_bytes(view: TensorView, extent: int, granule: int) -> int:
    """Of so many indices of the first dimension; 0 where they are not next to each other, or that is not its extent."""
    size = view.dtype.size_bytes
    if view.panels is not None:
        columns, depth = view.shape[view.panels.columns], view.shape[view.panels.depth]
        if columns != extent or granule % view.panels.width:
            return 0
        return granule * size * round_up(depth, view.panels.elements)
    if view.shape[:1] != (extent,):
        return 0
    contiguous = all(stride == math.prod(view.shape[axis + 1 :]) for axis, stride in enumerate(view.strides))
    return granule * size * math.prod(view.shape[1:]) if contiguous else 0
