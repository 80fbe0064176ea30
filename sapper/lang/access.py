"""Loads and stores: their indices, and what can be proved about them.

Provable indices out of bounds are errors. At the end of each loop the accesses made in it tell whether its iterations
may run in any order: a loop whose writes are proved disjoint is parallel, one where they may meet is ordered, and
one where every iteration certainly writes the same element is an error. What the extents must fulfil for indices to
stay inside, where that can be said with dimensions alone, becomes the function attribute "requires": a list of
[tensor, dimension, constant, name, coefficient, ...], the extent being at least constant + sum(coefficient * name).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from ..ir.indices import Known, Row, TooMany, outside, proves, surely_outside
from ..ir.nodes import Block, Op, Value
from ..ir.types import TensorType, TileType, bool_, index, spell_nested
from .affine import Affine, extreme, fixed_when_meeting, have_other_rests
from .bindings import Axis, Frame, LoopScope, axes_of, dtype_of, is_tensor
from .dims import Dim, DimExpression, extent_of
from .errors import KernelError
from .indices import Computation
from .reach import Reach, Unknown, is_below
from .strides import Product, Strides, factors_of
from .views import Views


class Access:
    """One load or store: the tensor, an affine form for each dimension, and where it stands.

    op: the load or store. scopes: the loops around it. wholes: the axes that it spans and no loop walks. update: the
    statement that it is one half of. join: of a store, the op by which it joins its value with what is there.
    """

    __slots__ = ("forms", "frame", "guards", "join", "node", "op", "scopes", "store", "tensor", "update", "wholes")

    def __init__(self, op: Op, tensor: Value, store: bool, forms: list[Affine], wholes: list[Axis], node: Any,
                 frame: Frame, guards: int, scopes: tuple[LoopScope, ...]) -> None:
        self.op = op
        self.update: Update | None = None
        self.join: str | None = None
        self.tensor = tensor
        self.store = store
        self.forms = forms
        self.wholes = wholes
        self.node = node
        self.frame = frame
        self.guards = guards
        self.scopes = scopes


class Offset:
    """The place of an axis in its range: the coordinate less the first one."""

    __slots__ = ("axis",)

    def __init__(self, axis: Axis) -> None:
        self.axis = axis


class Undecided(NamedTuple):
    """An index of which more has to be known. values: of all dimensions; form: of this one; nodes: of the access, and
    of the index. frame, scopes, branches: where it stands."""

    tensor: Value
    dimension: int
    values: list[Value]
    form: Affine
    nodes: tuple[Any, Any]
    frame: Frame
    scopes: tuple[LoopScope, ...]
    branches: tuple[tuple[Value, bool], ...]


class Update:
    """A statement like `out[i] += x` or `out[i] = maximum(out[i], x)`, which reads and writes one element. join: the
    op that it joins x with; block: where it stands; load: what it reads. Where an element may be met again, it becomes
    a store that joins."""

    __slots__ = ("block", "join", "load")

    def __init__(self, join: str, block: Block, load: Access) -> None:
        self.join = join
        self.block = block
        self.load = load


class Accesses(Views):
    """Operations and views, and memory."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.accesses: list[Access] = []
        self.requirements: dict[tuple[Any, ...], int] = {}
        self.undecided: list[Undecided] = []
        self.offsets: dict[Axis, Offset] = {}
        self.scopes: tuple[LoopScope, ...] = ()
        self.strides = Strides(self.form_of, self.static, self.dim_expressions)
        self.reach = Reach(self.form_of, self.range_of, self.static, self.dim_expressions)

    def load(self, tensor: Value, items: Sequence[Any], node: Any, item_nodes: Sequence[Any]) -> Value:
        """tensor[items]"""
        values, forms = self.indices(tensor, items, node, item_nodes)
        self.at(node)
        type = TileType(dtype_of(tensor), self.joined_axes(*values) if values else ())
        result = self.builder.value("load", [tensor, *values], type)
        self.levels[result] = self.level
        assert result.op is not None
        self.record(result.op, False, forms, type.axes, node)
        return result

    def store(self, tensor: Value, items: Sequence[Any], value: Any, node: Any, item_nodes: Sequence[Any],
              value_node: Any, joins: bool = False) -> None:
        """tensor[items] = value. joins: it may be what is there, joined with a value."""
        if not is_tensor(tensor):
            self.fail("subscript", "only a tensor's elements can be assigned", node, self.describe(tensor), "a tensor",
                      other_than_assigning(tensor))
        values, forms = self.indices(tensor, items, node, item_nodes)
        type: TensorType = tensor.type  # type: ignore[assignment]
        dtype = type.dtype
        value = self.operand(value, value_node)
        if isinstance(value, Value):
            have = dtype_of(value)
            if have != dtype and value not in self.weak:
                self.fail("store-dtype", f"a value of {have.name} is stored to tensor {tensor.name} of {dtype.name}",
                          value_node, have.name, dtype.name, f"write {self.text(value_node)}.to({dtype.name})")
        if not isinstance(value, Value) and not dtype.compute:
            value = self.cast(value, dtype, value_node, value_node)
        value = self.value(value, dtype, value_node)
        spanned = self.joined_axes(*values) if values else ()
        lacking = [axis for axis in axes_of(value) if axis not in spanned]
        if lacking:
            names = ", ".join(lacking)
            mend = f"index {tensor.name} with {names}, or reduce the value: sum(..., over={lacking[0]})"
            if joins and item_nodes and all(self.is_tiled(axis) for axis in lacking):
                first, others = self.text(item_nodes[0]), map(ast.unparse, item_nodes[1:])
                narrow = values[0].type.dtype       # type: ignore[union-attr]
                if narrow is not index and narrow.size_bytes < 4:
                    first = f"{first}.to(i32)"
                first = " + ".join([first, *(f"0 * {axis}" for axis in lacking)])
                mend = f"reduce the value: sum(..., over={lacking[0]}), or a @ b for its products; to take every " \
                       f"value along {names}, write {tensor.name}[{', '.join([first, *others])}]"
            self.fail("store-axes", f"the stored value spans {names}, the index of {tensor.name} does not", node,
                      f"{value.type} stored at an index that spans [{', '.join(spanned)}]",
                      "an index that spans all axes of the value", mend)
        self.at(node)
        op = self.builder.add("store", [tensor, value, *values])
        self.check_scatter(self.record(op, True, forms, spanned, node))

    def is_tiled(self, axis: str) -> bool:
        loop = self.axes[axis].loop
        return loop is not None and loop.kind == "tiles"

    def record(self, op: Op, store: bool, forms: list[Affine], spanned: tuple[str, ...], node: Any) -> Access:
        wholes = [self.axes[name] for name in spanned if self.axes[name].loop is None]
        access = Access(op, op.operands[0], store, forms, wholes, node, self.frame, self.guards + self.ragged,
                        self.scopes)
        self.accesses.append(access)
        return access

    def indices(self, tensor: Value, items: Sequence[Any], node: Any, item_nodes: Sequence[Any]
                ) -> tuple[list[Value], list[Affine]]:
        type: TensorType = tensor.type  # type: ignore[assignment]
        if len(items) != len(type.dims):
            self.fail("rank", f"tensor {tensor.name} has {len(type.dims)} dimensions", node,
                      f"{len(items)} {'index' if len(items) == 1 else 'indices'}", f"{len(type.dims)}: {type}",
                      f"write {tensor.name}[()]" if not type.dims else "leave None out: axes have names, and tiles "
                      "broadcast by these" if None in items else "give one index for each dimension")
        values: list[Value] = []
        forms: list[Affine] = []
        undecided: list[tuple[int, Affine, Any]] = []
        for dimension, (item, item_node) in enumerate(zip(items, item_nodes, strict=True)):
            if item is None or isinstance(item, (slice, str, tuple)) or item is Ellipsis:
                self.fail("subscript", "this is no index", item_node, self.describe(item), "an axis or an integer",
                          "bring an axis with whole(...) and index with it; axes are named, so None is not needed")
            item = self.operand(item, item_node)
            if isinstance(item, (bool, float)) or (
                    isinstance(item, Value) and dtype_of(item).kind not in "xiu"):
                mend = f"write {self.text(item_node)}.to(i32)"
                if isinstance(item, Value) and dtype_of(item) == bool_:
                    mend = "write where(...) on the values"
                self.fail("gather-dtype", f"index {dimension} of {tensor.name} is no integer", item_node,
                          self.describe(item), "an integer", mend)
            if isinstance(item, Value):
                self.need_compute(item, item_node, "an index")
            value = self.value(item, index, item_node)
            form = self.form_of(value)
            if not self.check_bounds(tensor, dimension, form, item_node):
                undecided.append((dimension, form, item_node))
            values.append(value)
            forms.append(form)
        self.undecided += [Undecided(tensor, dimension, values, form, (node, item_node), self.frame, self.scopes,
                                     tuple(self.branches)) for dimension, form, item_node in undecided]
        return values, forms

    # Ranges of symbols.

    def range_of(self, symbol: Any) -> tuple[Affine, Affine] | None:
        if isinstance(symbol, str):
            size = self.static.get(symbol)
            return None if size is None else (Affine(size), Affine(size + 1))
        if isinstance(symbol, Axis):
            return symbol.start, symbol.stop
        return self.ranges.get(symbol)

    def spread_of(self, symbol: Any) -> int | None:
        """Last minus first value of what a symbol walks, at most, if known."""
        rest = self.strides.rest(Affine(0, {symbol: 1}))
        if rest is not None and rest[1] > 0:
            return rest[1] - 1
        bounds = None if isinstance(symbol, Product) else self.range_of(
            symbol.axis if isinstance(symbol, Offset) else symbol)
        if bounds is None:
            return None
        widest = [extreme(extent, self.range_of, True) for extent in self.bounds_of(bounds[1].plus(bounds[0], -1))]
        return min((max(form.constant - 1, 0) for form in widest if not form.terms), default=None)

    def reach_of(self, symbol: Any) -> tuple[int, int] | None:
        """The first and the last value of what a symbol walks, at least and at most, if known."""
        spread = self.spread_of(symbol)
        if spread is None:
            return None
        bounds = None if isinstance(symbol, Offset) else self.range_of(symbol)      # a rest has none, and begins at 0
        first = Affine(0) if bounds is None else extreme(bounds[0], self.range_of, False)
        last = first if bounds is None else extreme(bounds[0], self.range_of, True)
        return None if first.terms or last.terms else (first.constant, last.constant + spread)

    def bounds_of(self, form: Affine) -> list[Affine]:
        """Forms that a form is at most: itself, and with an operand in place of a minimum that is added."""
        found = [form]
        for symbol, coefficient in form.terms.items():
            op = symbol.op if isinstance(symbol, Value) else None
            if op is not None and op.name == "min" and coefficient == 1:
                found += [form.plus(Affine(0, {symbol: -1})).plus(self.form_of(part)) for part in op.operands]
        return found

    def from_start(self, form: Affine, varies: Callable[[Any], bool]) -> Affine:
        """The form with an axis whose range starts elsewhere in other iterations as that start and the place in it."""
        for axis, coefficient in list(form.terms.items()):
            if isinstance(axis, Axis) and any(map(varies, axis.start.terms)):
                place = self.offsets.setdefault(axis, Offset(axis))
                form = form.plus(Affine(0, {axis: -1, place: 1}).plus(axis.start), coefficient)
        return form

    def dim_form(self, value: Any, node: Any) -> Affine:
        """The affine form of an int, Dim, DimExpression or integer scalar, dimensions kept by name."""
        if isinstance(value, Dim):
            self.dimension(value, node)
            return Affine(0, {value.name: 1})
        if isinstance(value, DimExpression) and value.op in ("add", "sub"):
            return self.dim_form(value.left, node).plus(self.dim_form(value.right, node),
                                                        1 if value.op == "add" else -1)
        if isinstance(value, DimExpression) and value.op == "mul":
            left, right = self.dim_form(value.left, node), self.dim_form(value.right, node)
            if not left.terms:
                return right.times(left.constant)
            if not right.terms:
                return left.times(right.constant)
        if isinstance(value, DimExpression):
            value = self.dimension(value, node)
        return self.form_of(value) if isinstance(value, Value) else Affine(int(value))

    # Proofs.

    def check_bounds(self, tensor: Value, dimension: int, form: Affine, node: Any) -> bool:
        """Whether an index is proved to be inside, or asked of the call by what dimensions are. An error where it
        certainly is not."""
        known = self.extents_of(tensor)[dimension]
        extent = spell_nested(extent_of(known))
        symbol = form.single
        if symbol is not None and isinstance(node, ast.Name) and tensor not in self.views:
            bounds = self.range_of(symbol) if not isinstance(symbol, str) else None
            walked = bounds[1].single if bounds is not None and bounds[0] == Affine(0) else None
            if isinstance(walked, str) and walked != extent and not (
                    type(known) is DimExpression and self.is_inside(form, tensor, dimension, node)):
                name = symbol.name if isinstance(symbol, (Axis, Value)) else str(symbol)
                alike = f", or declare both dimensions {walked}" if isinstance(known, Dim) else ""
                self.fail("axis-extent", f"{name} walks {walked}, dimension {dimension} of {tensor.name} is {extent}",
                          node, f"{name} from 0 to {walked}", f"a range of {extent}",
                          f"write 0 for {name}: an extent of 1 is not stretched, its element is named"
                          if known == 1 else
                          f"walk {extent}{alike}; if part of {extent} is meant, write {name} + 0")
        if any(self.is_empty(symbol) for symbol in form.terms):
            return True
        lowest = extreme(form, self.range_of, False)
        size = extreme(self.extent_form(tensor, dimension, node), self.range_of, True)
        highest = extreme(form, self.range_of, True)
        excess = highest.plus(size, -1)
        natural = self.reach.is_natural(lowest)
        inside = natural and any(not left.terms and left.constant < 0 for most in self.bounds_of(highest)
                                 for left in [extreme(most, self.range_of, True).plus(size, -1)])
        if (self.guards or self.ragged) and not self.are_settled(form):
            return inside   # a condition or an empty range may keep the index in bounds
        last = str(known - 1) if isinstance(known, int) else f"{extent} - 1"
        if not lowest.terms and lowest.constant < 0:
            self.fail("out-of-bounds", f"index {dimension} of {tensor.name} is negative", node,
                      f"an index of {lowest.constant}", f"0 to {last}",
                      f"write {extent} - {-lowest.constant}" if not form.terms else
                      f"start the range later: span(start, stop), or take maximum({ast.unparse(node)}, 0)")
        if not excess.terms and excess.constant >= 0:
            highest = excess.plus(size)
            shown = str(highest.constant)
            if highest.terms:
                shown = f"{extent} + {excess.constant}" if excess.constant else str(extent)
            self.fail("out-of-bounds", f"index {dimension} of {tensor.name} reaches beyond its end", node,
                      f"an index of {shown}", f"0 to {last}",
                      f"end the range earlier: span(start, stop), or take minimum({ast.unparse(node)}, {last})"
                      if form.terms else "give a smaller index")
        if self.guards or inside:
            return inside
        decided = natural or self.ask_inside(tensor, dimension, form, False, node)
        if not excess.terms:
            return decided
        if tensor in self.views or not isinstance(known, (int, Dim)) or not all(
                isinstance(symbol, str) for symbol in excess.terms):
            decided = self.ask_inside(tensor, dimension, form, True, node) and decided
        else:
            needed = excess.plus(size).plus(Affine(1))
            terms = [part for name, coefficient in sorted(needed.terms.items()) for part in (name, coefficient)]
            key = (tensor.name, dimension, *terms)
            self.requirements[key] = max(needed.constant, self.requirements.get(key, needed.constant))
        return decided

    def ask_inside(self, tensor: Value, dimension: int, form: Affine, largest: bool, node: Any) -> bool:
        """Let the call check that an index made of axes and dimensions ends below the extent (begins at 0 or above),
        unless a loop around is empty. An error where it certainly does not. Whether that says all."""
        values = self.reach.values(form, largest)
        exact = self.reach.exact
        if values is None:
            return False
        walked = self.reach.counts([*self.reach.walked(form), *(v for scope in self.scopes for v in scope.variables)])
        if any(isinstance(count, int) and count <= 0 for count in walked):
            return True
        walked = [count for count in walked if not isinstance(count, int)]
        size = self.reach.at(self.extent_form(tensor, dimension, node), {})
        for value in values:
            below, above = (value, size) if largest else (-1, value)
            if not isinstance(below, int) or not isinstance(above, int):
                if not is_below(below, above, walked):
                    self.condition_on(tensor, "inside", below, above, *walked)
            elif below >= above:
                self.fail("out-of-bounds", f"index {dimension} of {tensor.name} " + (
                    "reaches beyond its end" if largest else "is negative"), node, f"an index of {value}",
                    f"0 to {size - 1 if isinstance(size, int) else f'{spell_nested(size)} - 1'}",
                    "end the range earlier, or start it later: span(start, stop)")
        return exact

    def look_through_undecided(self) -> None:
        """Once the kernel is read, as what a loop carries is known at its end."""
        outside = self.frame
        for one in self.undecided:
            self.frame = one.frame
            self.look_through(one)
        self.frame = outside

    def look_through(self, undecided: Undecided) -> None:
        """Let the call go through all values of an index, where it is made of what is known then. An error where that
        is known already, and one is not inside."""
        tensor, dimension, values, form, nodes, _, scopes, branches = undecided
        made = Computation(self.walks, self.carries, self.dim_expressions, self.static, self.function.arguments)
        try:
            for condition, taken in branches:
                made.holds(condition, taken)
            for scope in scopes:
                for variable in scope.variables:
                    made.runs(variable.name if isinstance(variable, Axis) else self.counters.get(variable, variable))
            for axis in self.joined_axes(*values):
                made.runs(axis)
            ends = self.ends_of(form, made) or (made.value(values[dimension]),) * 2
            extent = made.extent(extent_of(self.extents_of(tensor)[dimension]))
        except Unknown:
            return
        row = Row(*made.row(tensor.name, dimension, ast.unparse(nodes[0]), *ends, extent))
        leaves = made.leaves()
        if not proves(row, leaves):
            self.refuse_outside(row, leaves, nodes[1], bool(branches))
            if leaves:
                self.condition_on(tensor, *row[1:])

    def refuse_outside(self, row: Row, leaves: Mapping[tuple[str, str], Known], node: Any, branched: bool) -> None:
        """An error where an index is certainly outside, or where no call would know more and it takes too many values
        to look at. leaves: what it is made of that a call knows. branched: it stands in a branch."""
        text = ast.unparse(node)
        try:
            found = outside(row, {}) if not leaves else None if branched else surely_outside(row, leaves)
        except TooMany:
            self.fail("out-of-bounds", f"index {row.dimension} of {row.tensor} takes too many values to look through",
                      node, text, "an index that rises or falls along each axis, or is made of digits",
                      f"take minimum(maximum({text}, 0), ...)")
        if found is not None:
            value, extent = found
            self.fail("out-of-bounds", f"index {row.dimension} of {row.tensor} " + (
                      "is negative" if value < 0 else "reaches beyond its end"), node, f"an index of {value}",
                      f"0 to {extent - 1}", f"take maximum({text}, 0)" if value < 0 else
                      f"take minimum({text}, {extent - 1}), or a longer tensor")

    def ends_of(self, form: Affine, made: Computation) -> tuple[int, int] | None:
        """The smallest and the largest value of a sum of coordinates whose ranges hang on none, where nothing else
        does: places of nodes."""
        for symbol in form.terms:
            bounds = None if isinstance(symbol, str) else self.range_of(symbol)
            if bounds is None and symbol in self.counters:
                return None     # how many steps it takes is not known before
            if bounds is not None:
                key = symbol.name if isinstance(symbol, Axis) else self.counters.get(symbol, symbol)
                if key in made.walked or key not in self.walks:
                    return None
                made.runs(key)
        ends = [made.form(extreme(form, self.range_of, largest)) for largest in (False, True)]
        return None if made.walked else (ends[0], ends[1])

    def is_inside(self, form: Affine, tensor: Value, dimension: int, node: Any) -> bool:
        """Whether an index is below the extent whatever dimensions are, as one below E is below E + 1."""
        size = extreme(self.extent_form(tensor, dimension, node), self.range_of, True)
        excess = extreme(form, self.range_of, True).plus(size, -1)
        return excess.constant < 0 and all(isinstance(s, str) and factor < 0 for s, factor in excess.terms.items())

    def is_settled(self, symbol: Any) -> bool:
        """Whether a symbol is an axis whose range is made of dimensions and numbers; or, where no branch is open, the
        index of a loop with such a range, if no loop around may be empty that depends on it."""
        bounds = self.range_of(symbol)
        if isinstance(symbol, Axis) or self.guards or bounds is None:
            return isinstance(symbol, Axis) and all(map(self.is_known, (*symbol.start.terms, *symbol.stop.terms)))
        counter = self.counters.get(symbol, symbol)
        return all(map(self.is_known, (*bounds[0].terms, *bounds[1].terms))) and not any(
            scope.empty or any(self.reads(end, counter) for end in scope.ends) for scope in self.scopes)

    def reads(self, value: Value, counter: Value) -> bool:
        """Whether a scalar may depend on the index of a loop."""
        stored = {access.tensor for access in self.accesses if access.store}
        read = [value]
        for one in read:
            op = one.op
            if one is counter or (op is not None and (op.blocks or not stored.isdisjoint(op.operands))):
                return True
            symbols = [s for bound in self.ranges.get(one, ()) for s in bound.terms] if op is None else op.operands
            read += [v for v in symbols if isinstance(v, Value) and v not in read]
        return False

    def are_settled(self, form: Affine) -> bool:
        """Whether an index is made of settled symbols, and of more than numbers."""
        if self.guards:
            return bool(form.terms) and all(map(self.is_settled, form.terms))
        walked = self.reach.walked_by(form)
        return bool(walked) and all(map(self.is_settled, walked))

    def is_known(self, symbol: Any) -> bool:
        """Whether a symbol is a dimension, or computed from dimensions."""
        return isinstance(symbol, str) or symbol in self.dim_expressions

    def is_empty(self, symbol: Any) -> bool:
        bounds = self.range_of(symbol)
        return bounds is not None and self.empty_range(*bounds)

    def empty_range(self, start: Affine, stop: Affine) -> bool:
        """Whether a range is certainly empty."""
        extent = extreme(stop.plus(start, -1), self.range_of, True)
        return not extent.terms and extent.constant <= 0

    def depends(self, symbol: Any, variable: Any, loop: LoopScope) -> bool:
        """Whether a symbol of an index may depend on a variable of a loop."""
        if symbol is variable:
            return True
        if isinstance(symbol, str):
            return False
        level = symbol.level if isinstance(symbol, Axis) else self.level_of(symbol)
        if level < loop.level or any(symbol is other for other in loop.variables):
            return False
        bounds = self.range_of(symbol)
        if bounds is None:
            return True
        return any(self.depends(s, variable, loop) for bound in bounds for s in bound.terms)

    def finish_loop(self, loop: LoopScope, first: int) -> dict[str, Any]:
        """The attributes parallel, ordered (meets: by which tensors) and repeats of a loop whose accesses begin at
        self.accesses[first]."""
        if loop.kind == "range" or (loop.carries and loop.kind == "each"):
            return {"parallel": False}
        if loop.kind == "tiles":
            self.join_updates(loop, first)
        by_tensor: dict[Value, list[Access]] = {}
        written: set[Value] = set()
        for access in self.accesses[first:]:
            by_tensor.setdefault(self.memory_of(access.tensor), []).append(access)
            if access.store:
                written.add(self.memory_of(access.tensor))
        asserted = False
        meets: dict[str, None] = {}
        repeats: set[Any] = set()
        for tensor, accesses in by_tensor.items():
            if tensor not in written:
                continue
            for position, access in enumerate(accesses):
                if access.store and not loop.carries:
                    self.check_race(access, loop)
                for other in accesses[position:]:
                    if not (access.store or other.store):
                        continue
                    fixed = self.meeting(access, other, loop)
                    if fixed is None or all(variable in fixed for variable in loop.variables):
                        continue
                    if loop.disjoint:
                        asserted = True
                        continue
                    if loop.kind == "tiles" and access.join and other.join and self.join_alike(access, other):
                        repeats |= set(loop.variables) - fixed
                        continue
                    if loop.kind == "tiles":
                        self.hazard(access, other, loop, fixed)
                    meets[tensor.name] = None
        if loop.carries:
            return {"parallel": False}
        if asserted:
            return {"parallel": True, "asserted": True}
        if meets:
            return {"parallel": False, "ordered": True, "meets": list(meets)}
        names = [axis.name for axis in loop.variables if axis in repeats]
        return {"parallel": True, "repeats": names} if names else {"parallel": True}

    def join_updates(self, loop: LoopScope, first: int) -> None:
        """Statements that add to elements which they, or others of their kind, may meet again in a loop over tiles
        become stores that join."""
        accesses = [access for access in self.accesses[first:] if joins_by(access) is not None]
        met: dict[Access, None] = {}
        for position, access in enumerate(accesses):
            for other in accesses[position:]:
                if (access.store or other.store) and self.join_alike(access, other):
                    fixed = self.meeting(access, other, loop)
                    if fixed is not None and not fixed.issuperset(loop.variables):
                        met |= {access: None, other: None}
        for access in met:
            if access.store and access.join is None:
                self.join_update(access)

    def join_alike(self, access: Access, other: Access) -> bool:
        """Whether two accesses are of statements that join by the same op, and elements of the same type of one memory:
        then the order of these does not matter."""
        return joins_by(access) == joins_by(other) and dtype_of(access.tensor) == dtype_of(other.tensor) and (
            self.memory_of(access.tensor) is self.memory_of(other.tensor))

    def join_update(self, store: Access) -> None:
        update, op = store.update, store.op
        assert update is not None
        made, read = op.operands[1].op, update.load.op
        assert made is not None
        (value,) = (operand for operand in made.operands if operand is not read.result)
        if made.name == "sub":
            made.name, made.operands = "neg", [value]
            value = made.results[0]
            value.type = made.operands[0].type
        else:
            update.block.ops.remove(made)
        op.operands[1] = value
        op.attributes["join"] = store.join = update.join
        update.block.ops.remove(read)
        self.accesses.remove(update.load)
        store.update = None
        self.check_spanned(store)

    def meeting(self, access: Access, other: Access, loop: LoopScope) -> set[Any] | None:
        """What two accesses of two iterations agree in when they meet, None if they never do. An axis has many
        coordinates in one iteration, those of outer loops too. Of two views of one tensor nothing is known but of their
        first dimensions, as far as these are the same."""
        alike = self.dimensions_alike(access.tensor, other.tensor)
        forms, others = access.forms[:alike], other.forms[:alike]

        def varies(symbol: Any) -> bool:
            if isinstance(symbol, str):
                return False
            return isinstance(symbol, (Axis, Offset)) or bool(axes_of(symbol)) or self.level_of(symbol) >= loop.level

        if any(self.is_apart(form, second, varies) for form, second in zip(forms, others, strict=True)):
            return None
        fixed = self.agreeing([self.from_start(form, varies) for form in forms],
                              [self.from_start(form, varies) for form in others], varies)
        if fixed is not None:       # an axis is where its start and the place from there are
            fixed |= {place.axis for place in fixed if isinstance(place, Offset) and all(
                factor in fixed or not varies(factor) for symbol in self.strides.expanded(place.axis.start).terms
                for factor in factors_of(symbol))}
        return fixed

    def agreeing(self, forms: list[Affine], others: list[Affine], varies: Callable[[Any], bool]) -> set[Any] | None:
        """What two accesses at these places agree in when they meet, None if they never do."""
        forms, others = ([self.strides.expanded(form) for form in one] for one in (forms, others))
        for pair in zip(forms, others, strict=True):        # u[(s + 1) % 3] and u[s % 3] are apart
            (number, divisor), (second, by) = (self.strides.rest(form) or (form, 0) for form in pair)
            if divisor == by != 0 and have_other_rests(
                    number, second, divisor, lambda symbol: any(map(varies, factors_of(symbol)))):
                return None
        forms, others = self.strides.apart(forms, others, varies, self.ranges_of)
        wholes: list[Affine] = []
        while True:
            fixed = fixed_when_meeting([*forms, *wholes], [*others, *wholes],
                                       lambda symbol: any(map(varies, factors_of(symbol))), self.spread_of,
                                       self.reach_of)
            if fixed is None:
                return None
            symbols = dict.fromkeys(symbol for form in (*forms, *wholes) for symbol in form.terms)
            made = [whole for whole in self.strides.wholes(
                symbol for symbol in symbols if symbol in fixed or not any(map(varies, factors_of(symbol))))
                if whole not in wholes]
            if not made:
                return fixed
            wholes += made

    def ranges_of(self, symbol: Any) -> list[tuple[Affine, Affine]]:
        """Ranges that what a symbol walks lies in."""
        bounds = self.range_of(symbol.axis if isinstance(symbol, Offset) else symbol)
        if bounds is None:
            return []
        if isinstance(symbol, Offset):
            return [(Affine(0), extent) for extent in self.bounds_of(bounds[1].plus(bounds[0], -1))]
        return [(bounds[0], stop) for stop in self.bounds_of(bounds[1])]

    def dimensions_alike(self, tensor: Value, other: Value) -> int:
        """How many of the first dimensions of two views of one memory are the same ones."""
        if dtype_of(tensor) != dtype_of(other):
            return 0
        pairs = zip(map(str, self.extents_of(tensor)), map(str, self.extents_of(other)), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def is_apart(self, form: Affine, other: Affine, varies: Callable[[Any], bool]) -> bool:
        """Whether all that one index may be lies past all that the other may be, as of the halves of a row: i and
        i + D // 2 for i below D // 2."""
        walked = [symbol for symbol in (*form.terms, *other.terms) if isinstance(symbol, Axis)]
        extents = [axis.stop.single for axis in walked if axis.start == Affine(0)]   # none is empty where they meet

        def range_of(symbol: Any) -> tuple[Affine, Affine] | None:
            """A dimension whose extent is fixed is a number in indices already."""
            return self.range_of(symbol) if varies(symbol) or isinstance(symbol, str) else None

        for upper, lower in ((form, other), (other, form)):
            least, most = extreme(upper, range_of, False), extreme(lower, range_of, True)
            gap = least.plus(most, -1)
            if gap.constant > 0 and not any(map(varies, (*least.terms, *most.terms))) and all(
                    count > 0 and (isinstance(symbol, str) or symbol in extents)
                    for symbol, count in gap.terms.items()):
                return True
        return False

    def check_spanned(self, access: Access) -> None:
        """A value is joined once for each element of the index: it must span all tiles that it is joined in, or how
        often that is would depend on their size."""
        spanned = {axis for index in access.op.operands[2:] for axis in axes_of(index)}
        for loop in access.scopes:
            lacking = [axis.name for axis in loop.variables if loop.kind == "tiles" and axis.name not in spanned]
            if lacking:
                names, tensor = ", ".join(lacking), access.tensor.name
                self.fail_at(access, "write-race",
                             f"every iteration along {names} writes the same elements of {tensor}",
                             f"a value joined with {tensor} at an index that does not span {names}",
                             "an index that spans all axes of the loops over tiles around it",
                             f"walk {names} with each(...), or reduce over {names} before")

    def check_race(self, access: Access, loop: LoopScope) -> None:
        if access.guards != loop.guards or access.join is not None:
            return
        for variable, name in zip(loop.variables, loop.names, strict=True):
            if self.spread_of(variable) == 0:
                continue
            if not any(self.depends(symbol, variable, loop) for form in access.forms for symbol in form.terms):
                tensor = access.tensor.name
                in_order = ", walk it with range(...), which runs in order," if loop.kind == "each" else ","
                self.fail_at(access, "write-race", f"every iteration along {name} writes the same elements of {tensor}",
                             f"a store to {tensor} whose index does not depend on {name}",
                             f"an index that differs for each {name}",
                             f"index {tensor} with {name}{in_order} or carry the value through the loop and store it "
                             "after it")

    def check_scatter(self, access: Access) -> None:
        """One store of axes that no loop walks must write each element once: nothing says in what order it writes."""
        wholes = access.wholes

        def varies(symbol: Any) -> bool:
            if isinstance(symbol, Value):
                return any(axis.name in axes_of(symbol) for axis in wholes)
            return symbol in wholes

        if not wholes:
            return
        fixed = self.agreeing(access.forms, access.forms, varies)
        if fixed is not None and not all(axis in fixed for axis in wholes):
            names = ", ".join(axis.name for axis in wholes)
            tensor = access.tensor.name
            self.fail("write-race", f"one store along {names} may write an element of {tensor} twice", access.node,
                      f"a store to {tensor} at indices not proved different along {names}",
                      "an index that differs for each",
                      f"walk {names} with a loop, whose writes then run in order; sums, as `{tensor}[...] += x`, may "
                      "meet in one over tiles(...)")

    def hazard(self, access: Access, other: Access, loop: LoopScope, fixed: set[Any]) -> None:
        """Raise if the order of two accesses of a loop over tiles, which may meet, depends on the size of a tile.

        One store alone keeps its order along one axis if everything else agrees where it meets itself: the axis's
        coordinates come in order in a tile and from tile to tile.
        """
        tensor = access.tensor.name
        names = ", ".join(loop.names)
        if access.join is not None or other.join is not None:
            plain, join = (other, access.join) if other.join is None else (access, other.join)
            kind, what = ("write-race", "stored to") if plain.store else ("read-after-write", "read")
            doing, done = ("added to", "added") if join == "add" else ("updated", "taken")
            self.fail_at(plain, kind, f"{tensor} is {doing} and {what}, and iterations along {names} may meet",
                         f"{tensor} {what} where only some of the values may have been {done}",
                         f"no other access to what is {doing} in the loop along {names}",
                         f"use {tensor} after the loop, or walk {names} with each(...)")
        if access is other:
            depth = access.scopes.index(loop) + 1
            inner = [v for scope in access.scopes[depth:] for v in scope.variables]
            own = [v for v in loop.variables if v not in fixed and any(
                self.depends(s, v, loop) for form in access.forms for s in form.terms)]
            if len(own) <= 1 and all(v in fixed for v in (*inner, *access.wholes)):
                return
            self.fail_at(access, "write-race",
                         f"a store to {tensor} may meet itself in different iterations along {names}",
                         "writes whose order would depend on the tile size", "an index proved to differ",
                         f"walk {names} with each(...)")
        if access.store and other.store:
            self.fail_at(other, "write-race", f"two stores to {tensor} may meet in different iterations along {names}",
                         "two stores whose order would depend on the tile size", "stores to elements proved different",
                         f"walk {names} with each(...); or, where they are parts of a row, index one view of it: "
                         "x.view(M, 2, N // 2)[m, 0, n]")
        self.fail_at(other, "read-after-write",
                     f"{tensor} is read and written, and iterations along {names} may meet",
                     "a read of what another element of the same tile may write",
                     "the same index in both, or another tensor",
                     f"walk {names} with each(...), or write to another tensor")

    def fail_at(self, access: Access, kind: str, headline: str, found: str, expected: str, mend: str) -> None:
        raise KernelError(kind, headline, access.frame.parsed.location(access.node), found, expected, mend)


def joins_by(access: Access) -> str | None:
    """The op by which a store joins its value, or the statement that an access is one half of could."""
    return access.join if access.update is None else access.update.join


def other_than_assigning(value: Any) -> str:
    """What to do in place of assigning to an element of what is no tensor."""
    return ("make a new tuple: [new if k == 0 else v[k] for k in range(4)]" if isinstance(value, tuple)
            else "make a new tile with where(...)")
