"""Operations on whole tiles: what makes one of nothing, reductions, scans, contractions; and scalars that rule.

Enters: operands (operands.py) and axes with their nodes in the source. Leaves: tile IR ops. Holds: an axis that is
reduced is whole, or that of a loop which carries the result on; one that is taken in its order is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..ir.nodes import Value
from ..ir.types import DType, TileType, bf16, bool_, f16, f32, f64, i8, i32, index, u8
from .affine import Affine
from .bindings import Axis, axes_of, dtype_of, near
from .elementwise import Elementwise

PRODUCT_DTYPE: dict[tuple[str, str], DType] = {
    **{(a.name, b.name): f32 for a in (bf16, f32) for b in (bf16, f32)},
    **{(a.name, b.name): f32 for a in (f16, f32) for b in (f16, f32)},
    **{(a.name, b.name): i32 for a in (i8, u8) for b in (i8, u8)},
    ("f64", "f64"): f64,
}


class Operations(Elementwise):
    """All operations on values."""

    # Tiles from nothing.

    def full(self, axes: Sequence[Any], value: Any, dtype: Any, node: Any, axis_nodes: Sequence[Any],
             value_node: Any) -> Value:
        """A scalar spread over axes."""
        dtype = bool_ if dtype is bool else dtype
        if dtype is not None and not isinstance(dtype, DType):
            self.fail("bad-argument", "dtype is no dtype", node, self.describe(dtype), "a dtype such as f32",
                      "write dtype=f32")
        names = tuple(self.axis(a, n, "zeros and full need").name for a, n in zip(axes, axis_nodes, strict=True))
        if len(set(names)) < len(names):
            self.fail("bad-argument", "an axis is named twice", node, ", ".join(names), "different axes",
                      "name each axis once")
        value = self.operand(value, value_node)
        if isinstance(value, Value):
            have = dtype_of(value)
            if axes_of(value):
                self.fail("scalar-needed", "full spreads one value", value_node, self.describe(value), "a scalar",
                          "assign the tile itself: zeros and full make one from a single value")
            if dtype is not None and have != dtype and value not in self.weak:
                self.fail("dtype-mix", f"full of {dtype.name} from {have.name}", value_node, have.name, dtype.name,
                          f"write {self.text(value_node)}.to({dtype.name})")
        if dtype is None and (not isinstance(value, Value) or value in self.weak):
            self.fail("call-arguments", "full needs a dtype", node, self.describe(value), "dtype=...",
                      "write dtype=f32")
        if dtype is not None and not dtype.compute:
            self.fail("dtype-not-computed", f"{dtype.name} can be stored and cast, but not computed with", node,
                      f"a tile of {dtype.name}", "a dtype that can be computed with", "cast where it is stored")
        scalar = self.value(value, dtype, value_node)
        if not names:
            return scalar
        self.at(node)
        return self.emit("full", [scalar], TileType(dtype_of(scalar), names))

    # Reductions and contractions.

    def over_axes(self, over: Any, type: TileType, node: Any, what: str) -> list[Axis]:
        axes = [self.axis(a, node, "over needs") for a in (over if isinstance(over, tuple) else (over,))]
        for axis in axes:
            if axis.name not in type.axes:
                self.fail("over", f"{what} over axis {axis.name}, which the tile does not span", node,
                          f"{axis.name}; the tile is {type}",
                          f"one of {', '.join(type.axes)}" if type.axes else "a tile (this is a scalar)",
                          near(axis.name, type.axes, "reduce over an axis that it spans"))
        if not axes or len({a.name for a in axes}) < len(axes):
            self.fail("over", f"{what} needs different axes", node, str([a.name for a in axes]), "one or more axes",
                      "name each axis once")
        return axes

    def reduce(self, kind: str, a: Any, over: Any, node: Any, a_node: Any, over_node: Any) -> Value:
        """sum, max, min, argmax, argmin of a tile over axes."""
        a = self.operand(a, a_node)
        if not isinstance(a, Value):
            self.fail("over", f"{kind} of a number", a_node, repr(a), "a tile", "use the number itself")
        self.need_compute(a, a_node, kind)
        type: TileType = a.type  # type: ignore[assignment]
        axes = self.over_axes(over, type, over_node, kind)
        for axis in axes:
            self.need_sequential(axis, "reduce-parallel-axis", kind, node)
        if type.dtype.kind == "b":
            self.fail("op-dtype", f"{kind} on bool", node, str(type), "numbers", f"write {self.text(a_node)}.to(i32)")
        if kind in ("argmax", "argmin") and len(axes) > 1:
            self.fail("over", f"{kind} over several axes", node, ", ".join(x.name for x in axes), "one axis",
                      "reduce one axis after the other")
        names = [axis.name for axis in axes]
        dtype = index if kind in ("argmax", "argmin") else type.dtype
        self.at(node)
        return self.emit_fresh("reduce", [a], TileType(dtype, tuple(x for x in type.axes if x not in names)),
                               kind=kind, over=names)

    def ordered(self, what: str, a: Any, over: Any, node: Any, a_node: Any, over_node: Any) -> tuple[Value, Axis]:
        """The operand and the axis of an op that takes an axis in its order."""
        a = self.operand(a, a_node)
        if not isinstance(a, Value):
            self.fail("over", f"{what} of a number", a_node, repr(a), "a tile", "use the number itself")
        self.need_compute(a, a_node, what)
        type: TileType = a.type  # type: ignore[assignment]
        axes = self.over_axes(over, type, over_node, what)
        if len(axes) > 1:
            self.fail("over", f"{what} over several axes", node, ", ".join(x.name for x in axes), "one axis",
                      "name one axis; go over the others one after another")
        if type.dtype.kind == "b":
            self.fail("op-dtype", f"{what} on bool", node, str(type), "numbers", f"write {self.text(a_node)}.to(i32)")
        self.need_whole(axes[0], what, over_node)
        return a, axes[0]

    def need_whole(self, axis: Axis, what: str, node: Any) -> None:
        if axis.loop is not None:
            self.fail("whole-axis", f"{what} along axis {axis.name} of a loop", node,
                      f"{axis.name}, of which a tile is a part whose size the schedule picks", "an axis of `whole`",
                      f"take {axis.name} = whole(...)")

    def scan(self, kind: str, what: str, a: Any, over: Any, node: Any, a_node: Any, over_node: Any) -> Value:
        """cumsum, cummax, cummin"""
        a, axis = self.ordered(what, a, over, node, a_node, over_node)
        self.at(node)
        return self.emit_fresh("scan", [a], a.type, kind=kind, over=[axis.name])

    def topk(self, a: Any, into: Any, over: Any, node: Any, nodes: Sequence[Any], over_node: Any
             ) -> tuple[Value, Value]:
        """topk(a, into, over=...)"""
        a, axis = self.ordered("topk", a, over, node, nodes[0], over_node)
        into = self.axis(into, nodes[1], "topk gives its results along")
        self.need_whole(into, "topk", nodes[1])
        type: TileType = a.type
        if into.start != Affine(0) or into.name in type.axes:
            self.fail("unknown-axis", "the second axis of topk counts the results", nodes[1], self.describe(into),
                      "an axis from 0 that the tile does not span", "take another: k = whole(8)")
        axes = (*[x for x in type.axes if x != axis.name], into.name)
        self.at(node)
        op = self.builder.add("topk", [a], [TileType(type.dtype, axes), TileType(index, axes)], over=[axis.name],
                              into=into.name)
        for value in op.results:
            self.levels[value] = self.level
        return op.results[0], op.results[1]

    def emit_fresh(self, name: str, operands: list[Value], type: TileType, **attributes: Any) -> Value:
        return self.builder.value(name, operands, type, **attributes)

    def need_sequential(self, axis: Axis, kind: str, what: str, node: Any) -> None:
        """Reducing over the axis of a loop gives one tile's part; unless the loop carries it on, it is lost."""
        loop = axis.loop
        if loop is not None and not loop.carries:
            name = next((own for own, bound in self.frame.env.items() if bound is axis), axis.name)
            mend = f"take {name} = whole(...), or carry the result: acc += ... in the loop over {name}"
            if what == "@":
                mend += (f"; for a product for each {name}, walk it one by one, for {name} in each(...), or write "
                         "sum(a * b, over=...)")
            self.fail(kind, f"{what} over axis {name} of a loop that carries no value", node,
                      f"{what} over {name}: the part of one tile, whose size the schedule picks",
                      "an axis of `whole`, or a loop that accumulates", mend)

    def _product_mend(self, a: Value, b: Value, over: Sequence[str]) -> str:
        """How to multiply and add up two tiles that have no product."""
        if not (dtype_of(a).is_integer and dtype_of(b).is_integer):
            return "cast both to f32"
        before = [v.op.operands[0] if v.op is not None and v.op.name == "cast" else v for v in (a, b)]
        if PRODUCT_DTYPE.get((dtype_of(before[0]).name, dtype_of(before[1]).name)) is i32:
            return "leave .to(...) out: products of i8 and u8 are summed in i32"
        own = {axis.name: name for name, axis in self.frame.env.items() if isinstance(axis, Axis)}
        names = ", ".join(own.get(name, name) for name in over)
        return f"write sum(a * b, over={names if len(over) == 1 else f'({names})'}), of equal dtypes"

    def contract(self, a: Any, b: Any, node: Any, a_node: Any, b_node: Any) -> Value:
        """a @ b: the sum of products over the axes that both span."""
        a, b = self.operand(a, a_node), self.operand(b, b_node)
        for side, side_node in ((a, a_node), (b, b_node)):
            if not isinstance(side, Value) or not axes_of(side):
                self.fail("contract-scalar", "@ on a scalar", side_node, self.describe(side), "a tile", "write *")
            self.need_compute(side, side_node, "@")
        left: TileType = a.type
        right: TileType = b.type
        over = [axis for axis in left.axes if axis in right.axes]
        if not over:
            self.fail("contract-no-shared-axis", "@ on tiles that share no axis", node, f"{left} @ {right}",
                      "an axis that both span", "index both with the axis to sum over, or write * for an outer product")
        for name in over:
            self.need_sequential(self.axes[name], "contract-parallel-axis", "@", node)
        dtype = PRODUCT_DTYPE.get((left.dtype.name, right.dtype.name))
        if dtype is None:
            if left.dtype != right.dtype and left.dtype.kind == right.dtype.kind == "f":
                self.mix(left.dtype, right.dtype, "@", node, a_node, b_node)
            self.fail("contract-dtype", f"@ on {left.dtype.name} and {right.dtype.name}", node, f"{left} @ {right}",
                      "floats of 16 or 32 bits (f32), f64 (f64), or i8 and u8 (i32)", self._product_mend(a, b, over))
        axes = tuple(x for x in self.joined_axes(a, b) if x not in over)
        self.at(node)
        return self.emit_fresh("contract", [a, b], TileType(dtype, axes), over=over)

    # Scalars.

    def index_scalar(self, value: Any, node: Any, what: str) -> Any:
        """An int, Dim or integer scalar as an int or an index Value."""
        value = self.operand(value, node)
        if isinstance(value, (bool, float)):
            self.fail("bad-range", f"{what} is no integer", node, repr(value), "an integer",
                      "write an int, or .to(i32)")
        if isinstance(value, int):
            return value
        type: TileType = value.type
        if type.axes:
            self.fail("scalar-needed", f"{what} is a tile", node, self.describe(value), "a scalar",
                      "load it with an index of each(...)")
        if type.dtype.kind not in "xiu":
            self.fail("bad-range", f"{what} is no integer", node, self.describe(value), "an integer scalar",
                      f"write {self.text(node)}.to(i32)")
        self.need_compute(value, node, what)
        if type.dtype.kind != "x":
            self.at(node)
            value = self.raw_cast(value, index)
        return value

    def condition(self, value: Any, node: Any, what: str) -> Any:
        """A Python bool, or a scalar bool Value."""
        if value is None or isinstance(value, (str, tuple)):
            return bool(value)
        value = self.operand(value, node)
        if isinstance(value, (bool, int, float)):
            return bool(value)
        type: TileType = value.type
        if type.axes:
            self.fail("scalar-needed", f"{what} is a tile", node, self.describe(value), "a scalar bool",
                      "write where(condition, a, b)" if what.startswith("the condition") else "write & | ~ on tiles")
        if type.dtype != bool_:
            self.fail("op-dtype", f"{what} is no bool", node, self.describe(value), "bool",
                      f"write {self.text(node)} != 0")
        return value
