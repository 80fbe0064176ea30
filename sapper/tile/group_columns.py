"""Columns of products of ragged groups, as an axis around the loop over groups.

Enters a canonical tile function. Leaves: where all that a loop in order does is one nest of parallel loops around a
tile, as that over the experts of a mixture, of which memory tells the rows, the columns of the nest that do not depend
on the group are axes of a loop over tiles around the loop in order; a counter is one of them, too:

    each e in order:                          tiles t:
        each t:                                   each e in order:
            tiles m of first[e] .. last[e]:           tiles m of first[e] .. last[e]:
                y[m, t, l] = ...                          y[m, t, l] = ...        over t, too

if the caller says that this serves. So columns are tasks, and tiles have several panels. Holds: the meaning is the
same, as what is stored for different columns lies apart, whatever the group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

from ..ir.checker import union_of_axes
from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import TileType, index
from .affine import affine
from .ops import place_of
from .plan import LATE, axes_of
from .product_parts import axes_brought
from .sums import is_join

Serves = Callable[[], bool]


def lift_columns(function: Function, serves: Serves) -> bool:
    """In place; whether a loop was changed. serves: whether the function as it is then does."""
    taken = {axis for op in function.walk() for axis in axes_brought(op)}
    blocks = [function.body]
    while blocks:
        block = blocks.pop()
        for place, op in enumerate(block.ops):
            made = _lifted(op, taken)
            if made is not None:
                block.ops[place] = made
                if serves():
                    return True
                block.ops[place] = op
        blocks += [inner for op in block.ops if op.name != "tiles" for inner in op.blocks]
    return False


def _lifted(groups: Op, taken: set[str]) -> Op | None:
    """The loop over tiles that takes the place of a loop in order over groups."""
    if groups.name != "each" or groups.attributes["parallel"] or groups.results:
        return None
    before, counted, nest = _nest(groups.blocks[0])
    if nest is None:
        return None
    inside = {*groups.blocks[0].arguments, *(v for op in before for v in op.results)}
    counters = [v for loop in counted for v in loop.blocks[0].arguments]
    bounds = [v for loop in counted for v in loop.operands]
    tiles: list[str] = nest.attributes["axes"]
    apart = [n for n in range(len(tiles)) if inside.isdisjoint(nest.operands[2 * n:2 * n + 2])
             and not set(counters).intersection(nest.operands[2 * n:2 * n + 2])]
    left = [n for n in range(len(tiles)) if n not in apart]
    if not left or not (apart or counters) or not inside.isdisjoint(bounds):
        return None
    names: dict[Value, str] = {}
    for counter in counters:
        names[counter] = next(name for n in count() if (
            name := f"{counter.name}_{n}" if n else str(counter.name)) not in {*taken, *names.values()})
    needs = _depending(counters, [*before, *nest.blocks[0].ops])
    if needs is None or any(v in needs for n in left for v in nest.operands[2 * n:2 * n + 2]):
        return None
    columns = [*names.values(), *(tiles[n] for n in apart)]
    loop = Op("each", groups.operands, (), groups.attributes, [Block([v.type for v in groups.blocks[0].arguments])],
              groups.location)
    values = dict(zip(groups.blocks[0].arguments, loop.blocks[0].arguments, strict=True))
    for old, new in values.items():
        new.name = old.name
    ops = loop.blocks[0].ops
    late = [op for op in before if needs.intersection(op.results)]
    if not _copy([op for op in before if op not in late], ops, values, needs, ()):
        return None
    rows = Op("tiles", [values.get(v, v) for n in left for v in nest.operands[2 * n:2 * n + 2]], (),
              {**nest.attributes, "axes": [tiles[n] for n in left]}, [Block()], nest.location)
    body = rows.blocks[0].ops
    for counter, name in names.items():
        body.append(Op("index", [], [TileType(index, (name,))], {"axis": name}, None, groups.location))
        values[counter] = body[-1].result
    if not _copy([*late, *nest.blocks[0].ops], body, values, needs, tuple(names.values())) or not all(
            _stores_apart(rows, column) for column in columns):
        return None
    taken.update(names.values())
    ops += [rows, Op("yield", [], (), {}, None, groups.location)]
    around = Op("tiles", [*bounds, *(v for n in apart for v in nest.operands[2 * n:2 * n + 2])], (),
                {"axes": columns, "parallel": True}, [Block()], groups.location)
    around.blocks[0].ops = [loop, Op("yield", [], (), {}, None, groups.location)]
    return around


def _nest(block: Block) -> tuple[list[Op], list[Op], Op | None]:
    """What is computed before a loop over tiles that is all that a block does, parallel loops over indices around it,
    and that loop."""
    before: list[Op] = []
    counted: list[Op] = []
    while True:
        loops = [op for op in block.ops if op.blocks]
        if len(loops) != 1 or loops[0].results or not loops[0].attributes.get("parallel") or any(
                op.name in ("store", "whole", *LATE) for op in block.ops):
            return before, counted, None
        before += [op for op in block.ops if op not in loops and op.name != "yield"]
        if loops[0].name == "tiles":
            return before, counted, None if "repeats" in loops[0].attributes else loops[0]
        if loops[0].name != "each" or loops[0].attributes.get("step", 1) != 1:
            return before, counted, None
        counted += loops
        (block,) = loops[0].blocks


def _depending(counters: Sequence[Value], ops: Sequence[Op]) -> set[Value] | None:
    """All values that are made of the counters; None where how a loop runs is."""
    needs = set(counters)
    while True:
        before = len(needs)
        for op in (inner for outer in ops for inner in outer.walk()):
            bounds = op.operands if op.name == "whole" else op.operands[:len(op.operands) - len(op.results)]
            if op.blocks or op.name == "whole":
                if op.name == "if" or needs.intersection(bounds):
                    return None
            elif needs.intersection(op.operands):
                needs.update(op.results)
            for block in op.blocks:
                carried = block.arguments[len(block.arguments) - len(op.results):]
                for values in zip(op.operands[len(bounds):], carried, op.results, block.ops[-1].operands, strict=True):
                    if needs.intersection(values):
                        needs.update(values[1:])
        if len(needs) == before:
            return needs


def _copy(ops: Sequence[Op], made: list[Op], values: dict[Value, Value], needs: set[Value],
          axes: tuple[str, ...]) -> bool:
    """Appends ops whose values span these axes, too, where they need them; false: one can't. values: by the old."""
    for op in ops:
        operands = [values.get(v, v) for v in op.operands]
        first = len(operands) - len(op.results)
        if op.blocks:
            for number, result in enumerate(op.results):
                begin = op.operands[first + number]
                if result in needs and begin not in needs:
                    if begin.op is None or begin.op.name != "full":
                        return False
                    made.append(Op("full", operands[first + number].op.operands,  # type: ignore[union-attr]
                                   [_wider(begin, axes)], {}, None, op.location))
                    operands[first + number] = made[-1].result
        elif op.name == "full" and needs.intersection(op.operands):
            return False
        over = op.attributes.get("over", ())
        found = tuple(axis for axis in union_of_axes(operands) if axis not in over)
        types = [v.type if v not in needs else _wider(v, axes) if op.blocks else
                 TileType(v.type.dtype, found) for v in op.results]     # type: ignore[union-attr]
        copy = Op(op.name, operands, types, op.attributes, [Block() for _ in op.blocks], op.location)
        for inner, block in zip(op.blocks, copy.blocks, strict=True):
            for old in inner.arguments:
                new = Value(_wider(old, axes) if old in needs else old.type, block, old.name)
                block.arguments.append(new)
                values[old] = new
            if not _copy(inner.ops, block.ops, values, needs, axes):
                return False
        for old, new in zip(op.results, copy.results, strict=True):
            new.name = old.name
            values[old] = new
        made.append(copy)
    return True


def _wider(value: Value, axes: tuple[str, ...]) -> TileType:
    assert isinstance(value.type, TileType)
    return TileType(value.type.dtype, (*axes_of(value), *axes))


def _stores_apart(rows: Op, column: str) -> bool:
    """Whether what is stored for different places along an axis lies apart, whatever else it depends on, and is not
    read: all stores have the axis alone as an index, at the same place."""
    places: dict[Value, tuple[Value, set[int]]] = {}
    for op in (op for op in rows.walk() if op.name == "store"):
        tensor, *indices = op.operands[0], *op.operands[2:]
        forms = list(map(affine, indices))
        mine = {n for n, form in enumerate(forms) if form is not None and form.axes == {column: 1} and not form.scalars}
        first, known = places.setdefault(place_of(tensor), (tensor, mine))
        known &= mine
        if is_join(op) or first is not tensor or not known:
            return False
    return bool(places) and not any(
        op.name == "load" and place_of(op.operands[0]) in places for op in rows.walk())

