"""Products over several axes, as products of matrices.

Enters: a canonical tile function. Leaves: in place of a parallel loop over tiles that has one product, of rows or
columns or a depth of several axes, as a convolution's of channels and the places of a window, one of a matrix by a
matrix, each of whose rows, columns and depth are a single axis: axes that follow each other in memory are taken as one,
by views. What does not lie so, patches of an image, or only every other point, is copied first, by a loop of its own;
an image whose edges are cut off by `where` and clamped indices, once more before that, with its edges.
Other axes, as images of a batch, are loops around, as those over indices are that are so already: then each worker
copies for itself, some lines at a time, what it multiplies at once, so that copies stay in the caches and take so much
memory whatever the extents are. So the product can be staged as any of two matrices.

    for b, o, p, q in tiles(B, O, P, Q):                                 for b, t in each(B, P / lines):
        y[b, o, p, q] = w[o, c, i, j] @ x[b, c, 2 * p + i, 2 * q + j]        d[c, i, j, p, q] = x, of some lines
                                                                             for o, r in tiles(O, lines * Q):
                                                                                 y[b, o, r] = w[o, k] @ d[k, r]

Where the depth lies as one axis in neither operand, as that of a gradient does: if the last part of it does in one
(points of images, for the weights), a loop in order over the rest adds up products; else what is a matrix but for the
order of its axes is turned first (weights, for the input).

Holds: the meaning is the same, but for the order of sums.

Measured on a Zen 3, one thread: docs/choices/nests.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import pairwise
from math import prod

from ..ir.nodes import Function, Op, Value
from ..ir.types import TensorType
from .affine import affine
from .matrix_form import PIECE_COLUMNS, Bounds, Group, Product, axis_at, tile_of
from .matrix_writer import MatrixWriter
from .ops import load_of, place_of
from .plan import LATE, axes_of
from .product_parts import Typical, axes_brought
from .reduce_loops import as_reductions
from .sums import is_join
from .zeros import is_zero

LEAST_DEPTH = 8
"""Steps of the depth, in all, from which on a copy and a matrix are worth it."""

WELL_READ_ROWS = 48
"""How many rows meet patches of neighbouring points at least for these to be copied: they are read as well where they
lie. Measured on a Zen 3, one thread, windows of 3 x 3, times the speed where they are read in place: 32 channels of
56 x 56 points to 32 0.95, 64 to 48 1.05, 64 to 64, 8 images, 1.06, 96 of 28 x 28 to 96 1.7, 128 to 128 1.4, 3 x 3 x 3
of 32 channels of 8 x 28 x 28 to 32 1.4."""

_REFUSED = frozenset({"asm", "buffer", "view", "part"})


def multiply_as_matrices(function: Function, typical: Typical, is_contiguous: Callable[[Value], bool], fewest: int,
                         piece_bytes: int) -> None:
    """In place. typical: of an index scalar, None where nothing bounds it before the kernel runs. is_contiguous:
    whether a tensor is known to lie in C order. fewest: rows and columns from which on it is worth it, typically.
    piece_bytes: of a copy that a worker makes for itself, about."""
    for nest in [op for op in function.body.ops if op.attributes.get("parallel")]:
        loops = _nest(nest)
        found = _Finder(function, loops, typical, is_contiguous, fewest).product() if loops else None
        if found is not None:
            found.part(typical, piece_bytes)
            taken = {axis for op in function.walk() for axis in axes_brought(op)}
            at = function.body.ops.index(nest)
            function.body.ops[at:at + 1] = MatrixWriter(found, taken, piece_bytes).write()


def is_matrices(function: Function, loop: Op, typical: Typical, is_contiguous: Callable[[Value], bool],
                fewest: int) -> bool:
    """Whether a loop that is not yet in a function becomes a product of matrices."""
    return _Finder(function, [loop], typical, is_contiguous, fewest).product() is not None


def _nest(top: Op) -> list[Op]:
    """A loop over tiles, behind those over indices that do nothing but it; none of any other."""
    loops = [top]
    while loops[-1].name == "each":
        inside = [op for op in loops[-1].blocks[0].ops if op.blocks]
        beside = [op for op in loops[-1].blocks[0].ops if not op.blocks and op.name != "yield"]
        if loops[-1].results or loops[-1].attributes.get("step", 1) != 1 or loops[-1].attributes.get("pieces") or (
                len(inside) != 1 or not inside[0].attributes.get("parallel")) or any(
                op.name in ("load", "store", "whole", *LATE, *_REFUSED) for op in beside):
            return []
        loops += inside
    return loops if loops[-1].name == "tiles" else []


class _Finder:
    """Looks at one loop."""

    def __init__(self, function: Function, loops: list[Op], typical: Typical, is_contiguous: Callable[[Value], bool],
                 fewest: int) -> None:
        *self.around, self.loop = loops
        self.typical, self.is_contiguous, self.fewest = typical, is_contiguous, fewest
        self.counters: dict[Value, str] = {}
        self.top = {value for op in function.body.ops for value in op.results} | set(function.arguments)
        self.stored = {place_of(op.operands[0]) for op in function.walk() if op.name == "store"}
        self.ops: list[Op] = []
        self.sums: dict[Value, Value] = {}
        self.bounds: Bounds = {}

    def product(self) -> Product | None:
        """None where the loop is something else, or it is not worth it."""
        if "repeats" in self.loop.attributes or not self._look() or not all(map(self._is_known, self.bounds)):
            return None
        late = [op for op in self.ops if op.name in LATE]
        stores = [op for op in self.ops if op.name == "store"]
        if len(late) != 1 or late[0].name != "contract" or not stores or any(map(is_join, stores)):
            return None
        (contract,) = late
        axes = list(map(self._axis_at, stores[0].operands[2:]))
        if sorted(axis or "" for axis in axes) != sorted([*self.loop.attributes["axes"], *self.counters.values()]):
            return None
        outer, rows, columns = _sides([axis for axis in axes if axis], contract)
        self.stored_outer = outer
        if not rows or not columns:
            return None
        left, right = contract.operands if rows[0] in axes_of(contract.operands[0]) else contract.operands[::-1]
        over = contract.attributes["over"]
        if not all(set(over) <= set(axes_of(value)) for value in (left, right)):
            return None
        depths = self._depth(left, rows, over), self._depth(right, columns, over)
        turned, ordered = None, ()
        if not (depths[0] or depths[1]) and self._only_stores(contract, stores):
            depths = self._last_depth(left, rows, over), self._last_depth(right, columns, over)
            depths = depths if not (depths[0] and depths[1]) else (None, None)
            ordered = tuple(axis for axis in over if axis not in (depths[0] or depths[1] or over))
        if not (depths[0] or depths[1]):
            turned = self._turned(left, right)
        depth = depths[0] or depths[1] or tuple(over)
        few = min(map(self._extent, (rows, columns))) < self.fewest or self._extent(depth) < LEAST_DEPTH
        if few or not (depths[0] or depths[1] or turned):
            return None
        found = Product(self.loop, self.ops, contract, self.sums, self.counters, self.bounds, rows, columns, depth,
                         outer)
        if turned is not None or depths[0] != depths[1]:
            found.copied = (right if turned is left else left) if turned is not None else right if depths[0] else left
            found.turned, found.runs, found.ordered = turned, self._runs(turned, found), ordered
            well = found.copied is right and _goes_along(right, columns[-1])
            if not self._may_move(found) or (well and self._extent(rows) < WELL_READ_ROWS):
                return None
        groups = [group for group in (rows, columns, depth) if len(group) > 1]
        after = found.behind([v for op in stores for v in op.operands], through=False)
        changes = groups or found.copied is not None or not set(outer) <= set(self.counters.values())
        return found if changes and all(self._fits(op, groups) for op in (*after, *stores)) else None

    def _axis_at(self, place: Value) -> str | None:
        """The axis whose coordinate an index is, or the counter that is taken as one."""
        return self.counters.get(place) or axis_at(place)

    def _turned(self, left: Value, right: Value) -> Value | None:
        """The operand that is a matrix but for the order of its axes, where the other one is none."""
        plain = [value for value in (left, right) if self._is_plain(value)]
        return plain[0] if len(plain) == 1 and set(axes_of(plain[0])).isdisjoint(self.stored_outer) else None

    def _runs(self, turned: Value | None, found: Product) -> list[Group]:
        """The axes of a copy of the other operand in order, neighbours that are so there, too, together."""
        load = None if turned is None else load_of(turned)
        if load is None:
            return []
        own = list(map(axis_at, load.operands[1:]))
        axes = [*found.rows, *found.depth] if found.is_right else [*found.depth, *found.columns]
        runs: list[Group] = []
        for axis in axes:
            if runs and (runs[-1][-1], axis) in pairwise(own):
                runs[-1] = (*runs[-1], axis)
            else:
                runs.append((axis,))
        return runs if self._fits(load, [run for run in runs if len(run) > 1]) else [(axis,) for axis in axes]

    def _is_plain(self, value: Value) -> bool:
        load = load_of(value)
        return load is not None and load.operands[0] not in self.stored and all(
            axis_at(place) is not None for place in load.operands[1:])

    def _look(self) -> bool:
        """Take note of what the loop does, in order, where loops that add products up are sums, and of bounds; whether
        there is nothing else in it."""
        for number, op in enumerate(self.around):
            for place, counter in enumerate(op.blocks[0].arguments):
                axis = self.counters[counter] = f"{counter.name or 'i'}.{number}.{place}"   # like none that is written
                self.bounds[axis] = op.operands[2 * place], op.operands[2 * place + 1]
            self.ops += [inner for inner in op.blocks[0].ops if not inner.blocks and inner.name != "yield"]
        for op in self.loop.blocks[0].ops:
            if op.name == "yield":
                continue
            made = as_reductions(op, of_wholes=True) if op.name == "tiles" and op.results else None
            if made is not None:
                self.ops += made[0]
                self.sums |= dict(zip(op.results, made[1], strict=True))
            elif op.blocks or op.name in _REFUSED:
                return False
            else:
                self.ops.append(op)
        for op in (self.loop, *self.ops):
            for number, axis in enumerate(axes_brought(op)):
                self.bounds[axis] = op.operands[2 * number], op.operands[2 * number + 1]
        return True

    def _is_known(self, axis: str) -> bool:
        """Whether an axis begins at 0 and ends where it is known before the loop."""
        start, stop = self.bounds[axis]
        return is_zero(start) and stop in self.top and self.typical(stop) is not None

    def _extent(self, group: Group) -> int:
        return prod(self.typical(self.bounds[axis][1]) or 1 for axis in group)

    def _depth(self, value: Value, group: Group, over: Collection[str]) -> Group | None:
        """In which order an operand has the axes that are contracted, if these follow each other in memory, and those
        of the group do."""
        load = load_of(value)
        if load is None:
            return None
        depth = tuple(axis for axis in map(axis_at, load.operands[1:]) if axis is not None and axis in over)
        several = [axes for axes in (group, depth) if len(axes) > 1]
        return depth if sorted(depth) == sorted(over) and self._fits(load, several) else None

    def _last_depth(self, value: Value, group: Group, over: Collection[str]) -> Group | None:
        """The last of the axes that are contracted, in the order in which an operand has them, if these are many
        elements that follow each other in memory, and others are not among them."""
        load = load_of(value)
        own = [] if load is None else list(map(axis_at, load.operands[1:]))
        end = len(own)
        while end and own[end - 1] in over:
            end -= 1
        depth = tuple(axis for axis in own[end:] if axis)
        if load is None or not depth or len(depth) == len(over) or self._extent(depth) < PIECE_COLUMNS:
            return None
        return depth if self._fits(load, [axes for axes in (group, depth) if len(axes) > 1]) else None

    @staticmethod
    def _only_stores(contract: Op, stores: list[Op]) -> bool:
        """Whether nothing is done with a product but to store it, as it is."""
        (store, *others), type = stores, stores[0].operands[0].type
        return not others and store.operands[1] is contract.result and isinstance(type, TensorType) and (
            type.dtype is tile_of(contract.result).dtype and type.dtype.name in ("f32", "i32"))

    def _fits(self, op: Op, groups: list[Group]) -> bool:
        """Whether an op on memory, or of elements, has axes of groups as a whole only."""
        members = {axis for group in groups for axis in group}
        if op.name not in ("load", "store"):
            return members.isdisjoint(map(axis_at, op.operands))
        tensor, places = op.operands[0], op.operands[1 + (op.name == "store"):]
        dims = tensor.type.dims  # type: ignore[union-attr]
        at, merges = 0, False
        while at < len(places):
            group = next((g for g in groups if axis_at(places[at]) == g[0]), None)
            if group is None:
                if not members.isdisjoint(axes_of(places[at])):
                    return False
                at += 1
                continue
            found = tuple(map(axis_at, places[at:at + len(group)]))
            extents = dims if tensor.op is None or tensor.op.name != "buffer" else tensor.op.operands
            if found != group or not all(map(self._is_whole, group, extents[at:at + len(group)])):
                return False
            at, merges = at + len(group), True
        if tensor.op is not None and tensor.op.name == "buffer":
            return True
        return not merges or (tensor.op is None and self.is_contiguous(tensor) and not any(
            isinstance(dim, tuple) for dim in dims))

    def _is_whole(self, axis: str, dim: object) -> bool:
        """Whether an axis is all of a dimension."""
        if dim is self.bounds[axis][1]:
            return True
        stop = self.bounds[axis][1].op
        return stop is not None and dim == (stop.attributes.get("name") if stop.name == "dim" else
                                            stop.attributes.get("value") if stop.name == "const" else None)

    def _may_move(self, found: Product) -> bool:
        """Whether the operand that is copied may be made before the loop."""
        values = [value for value in (found.copied, found.turned) if value is not None]
        return all(op.name != "load" or place_of(op.operands[0]) not in self.stored
                   for op in found.behind(values, through=True))


def _goes_along(value: Value, axis: str) -> bool:
    """Whether neighbours along an axis lie side by side in memory."""
    load = load_of(value)
    form = None if load is None else affine(load.operands[-1])
    return form is not None and form.axes.get(axis) == 1


def _sides(axes: list[str], contract: Op) -> tuple[Group, Group, Group]:
    """Axes of a result in the order of memory, as loops around, rows and columns: those that follow each other and are
    of one operand alone, from the last one on."""
    own = [set(axes_of(value)) for value in contract.operands]
    groups: list[Group] = []
    for _ in range(2):
        side = next((s for s in (0, 1) if axes and axes[-1] in own[s] and axes[-1] not in own[1 - s]), None)
        end = len(axes)
        while side is not None and axes[:end] and axes[end - 1] in own[side] and axes[end - 1] not in own[1 - side]:
            end -= 1
        groups.append(tuple(axes[end:]))
        axes = axes[:end]
    return tuple(axes), groups[1], groups[0]
