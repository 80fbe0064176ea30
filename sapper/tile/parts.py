"""The parts of a kernel: what all workers do together and what one of them does alone, in turn.

Enters a canonical tile function; leaves it as it is where it has one part only, or else a function whose body is
`buffer` and `part` ops (and the scalars that size the buffers). Workers meet between parts. Holds: the meaning is the
same, save that a sum may round differently; a part reads nothing that another computed but through tensors and buffers.

    a parallel loop at the top          a part of all workers
    what stands between such loops      a part of the first worker
    a long reduction at the top         a part of all workers, which reduces CHUNKS pieces, then the rest of it

A value that a later part uses goes through a buffer; pure ops are computed again in each part that needs them. The
pieces of a reduction depend on its extent alone: the result is the same for any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import DType, TensorType, TileType, bf16, f16, f32, i32, index
from .ops import place_of
from .plan import COSTLY, LATE
from .schedule import LoweringError

CHUNKS = 64
"""Into how many pieces a reduction is split at most."""
CHUNK_ELEMENTS = 32768
"""Fewer elements than these are one piece: a few microseconds' work."""
CHUNK_MULTIPLE = 1024
"""Pieces but the last are a multiple of so many elements: whole registers, and as aligned as the first."""

INDEX = TileType(index)

Range = Callable[[Value, Value], bool]
"""Something that holds for a range from start to stop, two index scalars."""

Passed = Callable[[Op, Op, Value], bool]
"""Something that holds for a loop, a contraction in it and an operand of that."""


def split_parts(function: Function, is_long: Range, is_bounded: Range,
                is_passed: Passed = lambda loop, contraction, value: False) -> Function:
    """is_long: whether a reduction over a range is worth sharing among workers. is_bounded: whether memory can be
    sized by a range. is_passed: whether an operand of a contraction in a parallel loop, computed before that, is best
    in a buffer, as a tensor would be."""
    body = function.body
    parallel = [op for op in body.ops if op.attributes.get("parallel")]
    others = [op for op in body.ops if op.blocks or op.name in LATE or op.name == "store"]
    splits = _Reductions(body, is_long, is_bounded).any()
    if not splits and (not parallel or (len(others) == 1 and not _weights(body, is_passed))):
        return function
    made = copy_function(function)
    if splits:
        _Reductions(made.body, is_long, is_bounded).split()
    _Partition(made.body, is_bounded, _weights(made.body, is_passed)).rewrite()
    return made


def _weights(body: Block, is_passed: Passed) -> set[Op]:
    """Elementwise ops of a block that contractions in its parallel loops multiply."""
    ours = {op for op in body.ops if not op.blocks and op.name not in (*LATE, "load", "full")}
    return {v.op for loop in body.ops if loop.attributes.get("parallel") for op in loop.walk()
            if op.name == "contract" for v in op.operands if v.op in ours and is_passed(loop, op, v)}


# Copies.


def copy_op(op: Op, values: dict[Value, Value]) -> Op:
    """An op with all that is nested in it, on other operands. values: from old to new; the results are added."""
    blocks: list[Block] = []
    for block in op.blocks:
        inner = Block([a.type for a in block.arguments])
        for old, new in zip(block.arguments, inner.arguments, strict=True):
            new.name = old.name
            values[old] = new
        inner.ops = [copy_op(o, values) for o in block.ops]
        blocks.append(inner)
    made = Op(op.name, [values.get(v, v) for v in op.operands], [v.type for v in op.results], dict(op.attributes),
              blocks, op.location)
    for old, new in zip(op.results, made.results, strict=True):
        new.name = old.name
        values[old] = new
    return made


def copy_function(function: Function) -> Function:
    made = Function(function.name, function.stage, function.location)
    made.attributes = dict(function.attributes)
    values: dict[Value, Value] = {}
    for argument in function.arguments:
        values[argument] = made.add_argument(argument.name, argument.type)
    made.unite()
    made.body.ops = [copy_op(op, values) for op in function.body.ops]
    return made


def _replace(ops: Sequence[Op], values: dict[Value, Value]) -> None:
    for op in ops:
        for inner in op.walk():
            inner.operands = [values.get(v, v) for v in inner.operands]


def _tile(value: Value) -> TileType:
    assert isinstance(value.type, TileType)
    return value.type


class _Top:
    """The top block, and what its values are computed from."""

    def __init__(self, body: Block) -> None:
        self.body = body
        self.position = {op: number for number, op in enumerate(body.ops)}
        self.wholes = {op.attributes["axis"]: op for op in body.ops if op.name == "whole"}
        self.stores: dict[Value, list[int]] = {}
        for op, at in self.position.items():
            for inner in op.walk():
                if inner.name == "store":
                    self.stores.setdefault(place_of(inner.operands[0]), []).append(at)

    def local(self, value: Value) -> Op | None:
        return value.op if value.op in self.position else None

    def is_overwritten(self, load: Op, until: int) -> bool:
        """Whether what a load reads may change before position `until`."""
        return any(self.position[load] < at < until for at in self.stores.get(place_of(load.operands[0]), ()))

    def range_of(self, axis: str) -> tuple[Value, Value]:
        start, stop = self.wholes[axis].operands
        return start, stop


class Writer:
    """Appends ops on index scalars to a list."""

    def __init__(self, ops: list[Op], like: Op) -> None:
        self.ops = ops
        self.location = like.location

    def op(self, name: str, operands: list[Value], /, types: Sequence[TileType | TensorType] = (),
           blocks: list[Block] | None = None, **attributes: object) -> Op:
        made = Op(name, operands, list(types), dict(attributes), blocks, self.location)
        self.ops.append(made)
        return made

    def value(self, name: str, operands: list[Value], /, type: TileType = INDEX, **attributes: object) -> Value:
        return self.op(name, operands, [type], None, **attributes).result

    def number(self, value: int) -> Value:
        return self.value("const", [], value=value)

    def buffer(self, dtype: DType, extents: list[Value], apart: bool = False) -> Value:
        attributes = {"apart": True} if apart else {}
        return self.op("buffer", extents, [TensorType(dtype, ("?",) * len(extents))], None, **attributes).result

    def places(self, axes: Sequence[str], starts: Sequence[Value]) -> list[Value]:
        """The coordinates of axes, counted from where each starts."""
        found = []
        for axis, start in zip(axes, starts, strict=True):
            at = self.value("index", [], TileType(index, (axis,)), axis=axis)
            from_zero = start.op is not None and start.op.name == "const" and start.op.attributes["value"] == 0
            found.append(at if from_zero else self.value("sub", [at, start], TileType(index, (axis,))))
        return found


# Long reductions.


class _Reductions(_Top):
    """Reductions at the top over a long axis become a parallel loop over pieces of it, and one over its results."""

    def __init__(self, body: Block, is_long: Range, is_bounded: Range) -> None:
        super().__init__(body)
        self.is_long = is_long
        self.is_bounded = is_bounded

    def any(self) -> bool:
        return any(self.axis_of(op) is not None for op in self.body.ops)

    def axis_of(self, op: Op) -> str | None:
        """The axis along which an op of the top block is split, or None."""
        if op.name not in ("reduce", "contract"):
            return None
        axis = next((a for a in op.attributes["over"] if self.is_long(*self.range_of(a))), None)
        if axis is None or not all(self.is_bounded(*self.range_of(a)) for a in _tile(op.result).axes):
            return None
        return axis if self._pieces(op, axis) is not None else None

    def _pieces(self, op: Op, axis: str) -> list[Op] | None:
        """The ops that compute the operands of a reduction along an axis; None where they can't be computed again."""
        found: set[Op] = set()
        stack = list(op.operands)
        while stack:
            value = stack.pop()
            source = self.local(value)
            if source is None or source in found or axis not in _tile(value).axes:
                continue
            if source.name in LATE or source.blocks:
                return None
            if source.name == "load" and self.is_overwritten(source, self.position[op]):
                return None
            found.add(source)
            stack += [v for v in source.operands if isinstance(v.type, TileType)]
        return sorted(found, key=self.position.__getitem__)

    def split(self) -> None:
        out: list[Op] = []
        group: list[Op] = []
        replaced: dict[Value, Value] = {}
        ops = list(self.body.ops)
        axis = ""

        def flush() -> None:
            if group:
                replaced.update(self._emit(group, axis, out))
            group.clear()

        for op in ops:
            results = {member.result for member in group}
            mine = self.axis_of(op)
            uses = any(v in results for inner in op.walk() for v in inner.operands)
            if uses or op.name == "store" or op.blocks or (mine is not None and mine != axis):
                flush()
            _replace([op], replaced)
            if mine is None:
                out.append(op)
            else:
                group.append(op)
                axis = mine
        flush()
        self.body.ops = out

    def _emit(self, group: list[Op], axis: str, out: list[Op]) -> dict[Value, Value]:
        """The two steps of reductions over one axis; what stands for their results."""
        top = Writer(out, group[0])
        start, stop = self.range_of(axis)
        zero, one = top.number(0), top.number(1)
        extent = top.value("sub", [stop, start])
        pieces = top.value("floordiv", [top.value("add", [extent, top.number(CHUNK_ELEMENTS - 1)]),
                                        top.number(CHUNK_ELEMENTS)])
        count = top.value("min", [top.number(CHUNKS), pieces])
        granules = top.value("mul", [top.value("max", [count, one]), top.number(CHUNK_MULTIPLE)])
        rounded = top.value("sub", [top.value("add", [extent, granules]), one])
        size = top.value("mul", [top.value("floordiv", [rounded, granules]), top.number(CHUNK_MULTIPLE)])
        loop = Block([INDEX])
        each = Op("each", [zero, count], (), {"count": 1, "parallel": True}, [loop], group[0].location)
        inner = Writer(loop.ops, group[0])
        number = loop.arguments[0]
        first = inner.value("min", [inner.value("mul", [number, size]), extent])
        last = inner.value("min", [inner.value("add", [first, size]), extent])
        inner.op("whole", [inner.value("add", [start, first]), inner.value("add", [start, last])], axis=axis)
        values: dict[Value, Value] = {}
        needed = {piece for op in group for piece in self._pieces(op, axis) or []}
        for piece in sorted(needed, key=self.position.__getitem__):
            inner.ops.append(copy_op(piece, values))
        finals: list[Callable[[], tuple[Value, Value]]] = []
        stores: list[Callable[[], None]] = []  # after all reductions, which one walk then computes
        parts = f"{axis}_pieces_{len(out)}"
        for op in group:
            operands = [values.get(v, v) for v in op.operands]
            finals.append(self._partial(op, operands, number, inner, top, parts, stores))
        for store in stores:
            store()
        inner.op("yield", [])
        out.append(each)
        top.op("whole", [zero, count], axis=parts)
        return dict(final() for final in finals)

    def _partial(self, op: Op, operands: list[Value], number: Value, inner: Writer, top: Writer, parts: str,
                 stores: list[Callable[[], None]]) -> Callable[[], tuple[Value, Value]]:
        """Reduce one piece; what then reduces the results, once all are there. stores: what keeps the result of a piece
        is added."""
        result = _tile(op.result)
        kind = op.attributes.get("kind", "sum")
        starts = [self.range_of(a)[0] for a in result.axes]
        extents = [top.value("sub", [stop, start]) for start, stop in (self.range_of(a) for a in result.axes)]
        attributes = dict(op.attributes)

        def keep(value: Value) -> Callable[[Value | None], Value]:
            type = _tile(value)
            dtype = i32 if type.dtype is index else type.dtype
            memory = top.buffer(dtype, [top.number(CHUNKS), *extents])

            def store() -> None:
                kept = value if dtype is type.dtype else inner.value("cast", [value], TileType(dtype, type.axes))
                inner.op("store", [memory, kept, number, *inner.places(result.axes, starts)])

            stores.append(store)

            def read(at: Value | None) -> Value:
                piece = at if at is not None else top.value("index", [], TileType(index, (parts,)), axis=parts)
                axes = tuple(dict.fromkeys((*_tile(piece).axes, *result.axes)))
                found = top.value("load", [memory, piece, *top.places(result.axes, starts)], TileType(dtype, axes))
                return found if dtype is type.dtype else top.value("cast", [found], TileType(type.dtype, axes))

            return read

        if kind in ("argmax", "argmin"):
            place = keep(inner.value("reduce", operands, result, **attributes))
            extreme = kind.removeprefix("arg")
            best = keep(inner.value("reduce", operands, TileType(_tile(operands[0]).dtype, result.axes),
                                    **{**attributes, "kind": extreme}))
            return lambda: (op.result, place(
                top.value("reduce", [best(None)], TileType(index, result.axes), kind=kind, over=[parts])))
        narrow = result.dtype in (bf16, f16) and kind == "sum"
        dtype = f32 if narrow else result.dtype
        if narrow:
            operands = [inner.value("cast", operands, TileType(f32, _tile(operands[0]).axes))]
        part = keep(inner.value(op.name, operands, TileType(dtype, result.axes), **attributes))

        def final() -> tuple[Value, Value]:
            value = top.value("reduce", [part(None)], TileType(dtype, result.axes), kind=kind, over=[parts])
            return op.result, top.value("cast", [value], result) if narrow else value

        return final


# The partition.


@dataclass(slots=True)
class _Part:
    parallel: bool
    ops: list[Op] = field(default_factory=list)


class _Partition(_Top):
    """Cuts the top block into parts."""

    def __init__(self, body: Block, is_bounded: Range, anchored: set[Op]) -> None:
        super().__init__(body)
        self.is_bounded = is_bounded
        self.anchored = anchored
        self.parts: list[_Part] = []
        self.home: dict[Op, int] = {}

    def rewrite(self) -> None:
        self._form()
        while self._anchor():
            self._form()
        buffers: list[Op] = []
        outer: dict[Value, Value] = {}
        crossing = self._crossing()
        for value in crossing:
            self._buffer(value, crossing, buffers, outer)
        self._own_buffers(buffers, outer)
        blocks = [self._block(number, part, crossing, outer) for number, part in enumerate(self.parts)]
        self.body.ops = [*buffers, *[Op("part", [], (), {"parallel": part.parallel}, [block], part.ops[0].location)
                                     for part, block in zip(self.parts, blocks, strict=True)]]

    def _form(self) -> None:
        self.parts, self.home = [], {}
        for op in self.body.ops:
            parallel = bool(op.attributes.get("parallel"))
            if op.blocks or op.name in LATE or op.name == "store" or op in self.anchored:
                if parallel or not self.parts or self.parts[-1].parallel:
                    self.parts.append(_Part(parallel))
                self.parts[-1].ops.append(op)
                self.home[op] = len(self.parts) - 1

    def _anchor(self) -> bool:
        """Settle where pure ops are computed that may not be computed again in the part that uses them: a load whose
        tensor is overwritten before, and a tile that costs much. Whether there is another."""
        for part in self.parts:
            begins = self.position[part.ops[0]]
            for op in self._needed(part):
                if op in self.home or op.name in ("whole", "buffer"):
                    continue
                overwritten = op.name == "load" and self.is_overwritten(op, begins)
                costly = part.parallel and op.name in COSTLY and bool(_tile(op.result).axes)
                if overwritten or costly:
                    self.anchored.add(op)
                    return True
        return False

    def _needed(self, part: _Part) -> list[Op]:
        """The ops of the top block that a part needs, its own among them, in order; those of other parts too, but not
        what these are computed from."""
        found: set[Op] = set()
        mine = set(part.ops)
        stack = list(part.ops)
        while stack:
            op = stack.pop()
            if op in found:
                continue
            found.add(op)
            foreign = op in self.home and op not in mine
            inside = [] if foreign else list(op.walk())
            brought = {inner.attributes["axis"] for inner in inside if inner.name == "whole" and inner is not op}
            values = op.results if foreign else [v for inner in inside for v in (*inner.operands, *inner.results)]
            stack += [v.op for inner in inside for v in inner.operands if v.op is not None and v.op in self.position]
            stack += [self.wholes[a] for v in values if isinstance(v.type, TileType) for a in v.type.axes
                      if a in self.wholes and a not in brought]
        return sorted(found, key=self.position.__getitem__)

    def _crossing(self) -> dict[Value, Value | None]:
        """The values that pass from one part to another, each with the buffer that it will go through."""
        found: dict[Value, Value | None] = {}
        for number, part in enumerate(self.parts):
            used = {v for op in self._needed(part) if self.home.get(op, number) == number
                    for inner in op.walk() for v in inner.operands}
            for op in self._needed(part):
                if self.home.get(op, number) != number:
                    found.update(dict.fromkeys([v for v in op.results if v in used]))
        return found

    def _outside(self, value: Value, out: list[Op], outer: dict[Value, Value]) -> Value:
        """An index scalar, computed before all parts."""
        op = self.local(value)
        if op is None or value in outer:
            return outer.get(value, value)
        for operand in op.operands:
            if isinstance(operand.type, TileType):
                self._outside(operand, out, outer)
        out.append(copy_op(op, outer))
        return outer[value]

    def _buffer(self, value: Value, crossing: dict[Value, Value | None], out: list[Op],
                outer: dict[Value, Value]) -> None:
        assert value.op is not None
        writer = Writer(out, value.op)
        extents = []
        for axis in _tile(value).axes:
            if not self.is_bounded(*self.range_of(axis)):
                raise LoweringError(
                    f"a value over axis {axis} passes from one part of the kernel to another; found a range known only "
                    "when the kernel runs; expected one made of dimensions and numbers, for which memory can be kept; "
                    f"mend: walk {axis} to the end of its dimension, with where(...) for the range", value.op)
            start, stop = (self._outside(v, out, outer) for v in self.range_of(axis))
            zero = start.op is not None and start.op.name == "const" and start.op.attributes["value"] == 0
            extents.append(stop if zero else writer.value("sub", [stop, start]))
        dtype = _tile(value).dtype
        crossing[value] = writer.buffer(i32 if dtype is index else dtype, extents)

    def _own_buffers(self, out: list[Op], outer: dict[Value, Value]) -> None:
        """The buffers that split reductions brought stand before all parts."""
        for op in self.body.ops:
            if op.name == "buffer":
                self._outside(op.result, out, outer)

    def _block(self, number: int, part: _Part, crossing: dict[Value, Value | None],
               outer: dict[Value, Value]) -> Block:
        block = Block()
        values = {v: outer[v] for op in self.body.ops if op.name == "buffer" for v in op.results}
        for op in self._needed(part):
            if op.name == "buffer":
                continue
            if self.home.get(op, number) == number:
                block.ops.append(copy_op(op, values))
                continue
            for value in op.results:
                memory = crossing.get(value)
                if memory is not None:
                    values[value] = self._read(value, memory, values, Writer(block.ops, op))
        for op in part.ops:
            for value in op.results:
                memory = crossing.get(value)
                if memory is not None:
                    writer = Writer(block.ops, op)
                    type, kept = _tile(value), values[value]
                    if type.dtype is index:
                        kept = writer.value("cast", [kept], TileType(i32, type.axes))
                    writer.op("store", [memory, kept, *writer.places(type.axes, self._starts(type, values))])
        return block

    def _starts(self, type: TileType, values: dict[Value, Value]) -> list[Value]:
        starts = [self.range_of(axis)[0] for axis in type.axes]
        return [values.get(start, start) for start in starts]

    def _read(self, value: Value, memory: Value, values: dict[Value, Value], writer: Writer) -> Value:
        type = _tile(value)
        dtype = i32 if type.dtype is index else type.dtype
        places = writer.places(type.axes, self._starts(type, values))
        read = writer.value("load", [memory, *places], TileType(dtype, type.axes))
        return read if dtype is type.dtype else writer.value("cast", [read], type)
