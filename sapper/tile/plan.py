"""Walks: which ops of a block are computed together, in one nest of loops over the axes that they span.

Enters a block of tile IR; leaves a `Plan`: its walks and control ops, in order. Pure ops are not placed: they are
computed inside whichever walk needs them. What must exist between walks (results of reductions; costly values
that several walks read) is *kept*: in registers where all of its axes are resident, in scratch memory otherwise.

A walk iterates over `outer` axes and, inside, over `reduced` axes. Its roots are
  reduce   a reduction or contraction over `reduced`, for each point of `outer`
  inner    a store, or a kept value, at each point of outer and reduced
  after    a store, or a kept value, at each point of `outer`, once the reductions there are complete
What holds: every value that a walk reads and that is not pure is a root of an earlier walk, or of this walk at an
earlier level. A walk loads what it needs at a point before it stores there, and comes to its points in any order, so
no point of it loads what another one stores (`_Planner.may_meet`); what is loaded before a store and used after it is
kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from ..ir.nodes import Block, Op, Value
from ..ir.types import TileType, bool_, f32
from ..lang.affine import Affine, fixed_when_meeting
from .affine import affine
from .ops import place_of
from .requests import KEEP_COST, KEPT, READ_AGAIN

COSTLY = {"exp": 10, "exp2": 9, "log": 12, "log2": 12, "tanh": 16, "sigmoid": 14, "erf": 16, "sin": 16, "cos": 16,
          "scan": 12, "topk": 8, "rsqrt": 5, "sqrt": 4, "div": 4, "floordiv": 12, "mod": 14}
"""Rough instructions per row; a shared value is kept when computing it again costs more than the target says."""

ORDERED = ("scan", "topk")
"""Ops that take an axis in its order: each is an item of a plan by itself, and its results are in scratch memory."""

LATE = ("reduce", "contract", *ORDERED)
"""Ops whose results exist only once the walk that computes them is complete."""


@dataclass(slots=True)
class Walk:
    outer: tuple[str, ...]
    reduced: tuple[str, ...] = ()
    reductions: list[Op] = field(default_factory=list)
    inner: list[Op | Value] = field(default_factory=list)
    after: list[Op | Value] = field(default_factory=list)

    @property
    def axes(self) -> tuple[str, ...]:
        return self.outer + self.reduced

    def roots(self) -> list[Op | Value]:
        return [*self.reductions, *self.inner, *self.after]


@dataclass(slots=True)
class Plan:
    """items: walks and control ops in order. kept: values that outlive their walk in scratch memory."""

    items: list[Walk | Op]
    kept: set[Value]
    crossing: set[str]
    """Axes of values that pass from one walk, or control op, to another."""


@dataclass(slots=True)
class Late:
    """The last walk of a block, which may be done for one row while another, the host, works on the next row.

    rows, buffers: the kept values that it reads. Those of a row's axes only; those that the host writes, element by
    element just after this walk has read what stood there. Without a buffer it reads a row of memory again.
    """

    walk: Walk
    host: Walk
    rows: list[Value]
    buffers: list[Value]


BUSY_OPS = 1.25
"""Ops for each byte of a row from which arithmetic takes so much of the time that stores should leave beside it.
Measured on a Zen 5, where the last walk follows on its row and a row behind. 8192 x 4096, past the caches, in percent
of what a copy reaches: layer_norm in bf16 (3.5) 77 and 96, in f32 (1.0) 97 and 78. 512 rows of 512 and 768 in the last
cache, us: layer_norm in bf16 34.5 and 32.5, softmax in bf16 (4.2) 35.2 and 33.5, in f32 (1.8) 36.1 and 35.8, layer_norm
in f32 38.1 and 39.8, rms_norm in f32 (0.5) 22.2 and 24.4. 128 x 1024: softmax in f32 21.1 and 16.0.
On a Zen 4 likewise, us: softmax in f32 of 512 x 512, 128 x 1024 and 64 x 4096 66.7 and 57.1, 36.2 and 30.3, 69.8 and
56.2, in bf16 59.8 and 58.5, 28.2 and 27.3; layer_norm in bf16, whose rows are read again, 63.2 and 68.1."""


def late_walk(plan: Plan, block: Block, row_axes: frozenset[str], streams: Callable[[Op], bool],
              beside_arithmetic: int = 0) -> Late | None:
    """The last walk, if it only stores, and may and should follow a row behind, or None.

    Past the caches it should where it reads nothing but what its host has kept. beside_arithmetic: and wherever much is
    computed (BUSY_OPS), if its host has kept what it reads (KEPT), or also if it reads a row again (READ_AGAIN). A host
    must then not be the first to read a row from memory if the stores go past the caches, as they would wait for that
    too: layer_norm in bf16 reaches 88 % of what a copy does beside its first walk, and 96 beside its second.

    row_axes: the axes of the loops round the block. streams: whether a store goes past the caches. Holds: no other walk
    reads what it stores or changes what it reads, but for the buffers that the host writes.
    """
    walks = [item for item in plan.items if isinstance(item, Walk)]
    if len(walks) < 2 or len(walks) != len(plan.items) or walks[-1].reductions:
        return None
    late = walks[-1]
    stores = [op for op in late.inner if isinstance(op, Op) and op.name == "store"]
    if len(stores) < len(late.inner):
        return None
    streaming = all(map(streams, stores))
    loaded = {place_of(op.operands[0]) for op in block.ops if op.name == "load"}
    stored = {place_of(op.operands[0]) for op in block.ops if op.name == "store"}
    if loaded & stored:
        return None
    rows: list[Value] = []
    buffers: list[Value] = []
    stack = [v for op in stores for v in op.operands[1:]]
    seen: set[Value] = set()
    while stack:
        value = stack.pop()
        if value in seen or value.op not in block.ops:
            continue
        seen.add(value)
        if value in plan.kept:
            (rows if set(axes_of(value)) <= row_axes else buffers).append(value)
        elif value.op is not None:
            if value.op.name in LATE:
                return None
            stack += [v for v in value.op.operands if isinstance(v.type, TileType)]
    if any(set(axes_of(v)) != row_axes or v.type.dtype is bool_ for v in rows):  # type: ignore[union-attr]
        return None
    work = _RowWork(plan.kept, block, row_axes)
    hosts = []
    for walk in walks[:-1]:
        waits = work.add(walk) and streaming and not buffers
        makes = set(walk.axes) == set(late.axes) and all(v in walk.inner for v in buffers)
        if makes and not waits and not _by_slots(walk):
            hosts.append(walk)
    work.add(late)
    if not (streaming and buffers) and not (work.is_busy and beside_arithmetic >= (KEPT if buffers else READ_AGAIN)):
        return None
    return Late(late, hosts[0 if buffers else -1], rows, buffers) if hosts else None


def _by_slots(walk: Walk) -> bool:
    """Whether a walk may take several elements to a lane, as packed dot products do: others have its pieces then."""
    operands = [v.type for op in walk.reductions if op.name == "contract" for v in op.operands]
    return any(isinstance(t, TileType) and t.dtype.size_bytes < f32.size_bytes for t in operands)


@dataclass(slots=True)
class _RowWork:
    """What the walks of a row take. operations: for an element. size_bytes: of what is read or stored of an element.

    read: loads of the row so far.
    """

    kept: set[Value]
    block: Block
    row_axes: frozenset[str]
    operations: int = 0
    size_bytes: int = 0
    read: set[Op] = field(default_factory=set)

    @property
    def is_busy(self) -> bool:
        return self.operations >= BUSY_OPS * self.size_bytes

    def add(self, walk: Walk) -> bool:
        """Count a walk, the next of the row; gives whether it reads some of the row for the first time."""
        values = _computed(walk, self.kept, self.block)
        first = {v.op for v in values if v.op is not None and v.op.name == "load"
                 and self.row_axes <= set(axes_of(v))} - self.read
        self.read |= first
        computed = [v.op for v in values if v.op is not None and v.op.name not in ("load", "index", "full", "const")
                    and not set(axes_of(v)) <= self.row_axes]
        self.operations += sum(COSTLY.get(op.name, 1) for op in [*computed, *walk.reductions])
        stored = [root.operands[1] for root in walk.inner if isinstance(root, Op) and root.name == "store"]
        types = [v.type for v in [*(op.result for op in first), *stored]]
        self.size_bytes += sum(t.dtype.size_bytes for t in types if isinstance(t, TileType))
        return bool(first)


def _computed(walk: Walk, kept: set[Value], block: Block) -> set[Value]:
    """What a walk computes or reads for its roots: nothing of what earlier walks have kept."""
    found: set[Value] = set()
    stack = [v for root in walk.roots() for v in ([root] if isinstance(root, Value) else root.operands)]
    roots = {root for root in walk.roots() if isinstance(root, Value)}
    while stack:
        value = stack.pop()
        op = value.op
        if (value in found or op is None or op not in block.ops or not isinstance(value.type, TileType)
                or op.name in LATE or (value in kept and value not in roots)):
            continue
        found.add(value)
        stack += op.operands
    return found


def axes_of(value: Value) -> tuple[str, ...]:
    assert isinstance(value.type, TileType)
    return value.type.axes


def ops_behind(value: Value, ends: Callable[[Value], bool] = lambda _: False) -> list[Op]:
    """The ops that a value is computed from, through tiles, each once though several may read it; loads, and what ends
    says, are where it stops: the latter are left out."""
    found: dict[Op, None] = {}
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if one.op is None or one.op in found or ends(one):
            continue
        found[one.op] = None
        if one.op.name != "load":
            waiting += [v for v in reversed(one.op.operands) if isinstance(v.type, TileType)]
    return list(found)


def is_scalar_integer(value: Value) -> bool:
    """Such values are computed at once, where they are defined, as 64-bit scalars."""
    t = value.type
    return isinstance(t, TileType) and not t.axes and (t.dtype.is_integer or t.dtype.kind == "b")


def early_scalars(block: Block) -> list[Value]:
    """The integer scalars of a block that can be computed when it begins: that wait for no reduction, no control op and
    no store."""
    late: set[Value] = set()
    stored: set[Value] = set()
    found: list[Value] = []
    for op in block.ops:
        if op.blocks or op.name == "store":
            stored |= {place_of(inner.operands[0]) for inner in op.walk() if inner.name == "store"}
        waits = (op.blocks or op.name in LATE or any(v in late for v in op.operands)
                 or (op.name == "load" and place_of(op.operands[0]) in stored))
        for result in op.results:
            if waits:
                late.add(result)
            elif is_scalar_integer(result) and op.name not in ("const", "full"):
                found.append(result)
    return found


KeepsOperand = Callable[[Op, Value, bool], bool]
"""Whether an operand of a contraction, not costly by itself, is kept before it; the flag: before a loop round it."""


def plan_block(block: Block, wholes: frozenset[str], yields_kept: frozenset[int] = frozenset(),
               keeps_operand: KeepsOperand = lambda op, value, outside: False,
               is_bounded: Callable[[str], bool] = lambda axis: True, keep_cost: int = KEEP_COST) -> Plan:
    """Form the walks of a block. wholes: the axes that `whole` brings; of all others the front end has proved that what
    one element stores no other loads. yields_kept: which operands of its terminator go to scratch memory. is_bounded:
    whether there can be memory for a value over an axis; otherwise it is computed where it is needed. keep_cost: see
    Requests."""
    return _Planner(block, wholes, yields_kept, keeps_operand, is_bounded, keep_cost).plan()


class _Planner:
    def __init__(self, block: Block, wholes: frozenset[str], yields_kept: frozenset[int],
                 keeps_operand: KeepsOperand, is_bounded: Callable[[str], bool], keep_cost: int) -> None:
        self.block = block
        self.keep_cost = keep_cost
        self.is_bounded = is_bounded
        self.wholes = wholes
        self.yields_kept = yields_kept
        self.keeps_operand = keeps_operand
        self.items: list[Walk | Op] = []
        self.kept: set[Value] = set()
        self.position = {op: i for i, op in enumerate(block.ops)}
        self.closures: dict[Value, frozenset[Value]] = {}
        self.accesses: dict[Value, list[Op]] = {}
        for op in block.ops:
            if op.name in ("load", "store"):
                self.accesses.setdefault(place_of(op.operands[0]), []).append(op)
        self.costly = [op for op in block.ops if (op.name in COSTLY and op.name not in LATE)
                       or (op.name == "load" and any(map(self._gathers, op.operands[1:])))]
        self.closures.clear()  # they end at what is kept, which is nothing yet

    @cached_property
    def users(self) -> dict[Value, list[Op]]:
        """The ops of this block that read each value, themselves or inside; once for each time."""
        users: defaultdict[Value, list[Op]] = defaultdict(list)
        for op in self.block.ops:
            for inner in op.walk() if op.blocks else (op,):
                for v in inner.operands:
                    users[v].append(op)
        return users

    # What a value needs: the pure values of this block that are computed on the way, and the roots they end at.

    def local(self, value: Value) -> Op | None:
        op = value.op
        return op if op is not None and op in self.position else None

    def closure(self, value: Value) -> frozenset[Value]:
        known = self.closures.get(value)
        if known is None:
            op = self.local(value)
            reached: set[Value] = {value}
            if op is not None and op.name not in LATE and not op.blocks and value not in self.kept:
                for operand in op.operands:
                    if isinstance(operand.type, TileType):
                        reached |= self.closures.get(operand) or self.closure(operand)
            known = self.closures[value] = frozenset(reached)
        return known

    def needs(self, root: Op | Value) -> frozenset[Value]:
        if isinstance(root, Value):
            op = self.local(root)
            operands = op.operands if op is not None else []
            return frozenset().union(*[self.closure(v) for v in operands if isinstance(v.type, TileType)], {root})
        return frozenset().union(*[self.closure(v) for v in root.operands if isinstance(v.type, TileType)])

    def cost(self, value: Value) -> int:
        if not self.costly:
            return 0
        reached = self.closure(value)
        total = 0
        for op in self.costly:
            if op.result in reached:
                total += COSTLY.get(op.name, 0)
                if op.name == "load" and any(map(self._gathers, op.operands[1:])):
                    total += 10
        return total

    def _gathers(self, value: Value) -> bool:
        return bool(axes_of(value)) and any(
            o is not None and o.name == "load" for o in (self.local(v) for v in self.closure(value)))

    # Grouping.

    def plan(self) -> Plan:
        self._group()
        self._keep_shared()
        self._keep_reductions()
        self._keep_overwritten()
        return Plan(self.items, self.kept, self._crossing())

    def _group(self) -> None:
        for op in self.block.ops:
            if op.blocks:
                for value in self._costly_for(op):
                    self._add(value, axes_of(value), ())
                self.items.append(op)
            elif op.name in ORDERED:
                self.items.append(op)
            elif op.name in LATE:
                kept = [value for term in self._terms_with(op) for value in self._kept_operands(term, False)]
                for value in sorted(kept, key=self._is_loaded):     # what is computed is so by the walk before
                    self._add(value, axes_of(value), ())
                self._add(op, axes_of(op.result), tuple(op.attributes["over"]))
            elif op.name == "store":
                self._add(op, self._store_axes(op), ())
            elif op.name == "yield":
                for i, value in enumerate(op.operands):
                    if i in self.yields_kept:
                        self._add(value, axes_of(value), ())

    def _is_loaded(self, value: Value) -> bool:
        op = self.local(value)
        return op is not None and op.name == "load"

    def _terms_with(self, op: Op) -> list[Op]:
        """A reduction, and contractions after it whose results are only added to its own, and whose operands could be
        computed before it: all these are kept together, and one walk contracts them."""
        if op.name != "contract":
            return [op]
        total = op.result
        while len(users := self.users[total]) == 1 and users[0].name == "add":
            total = users[0].result
        terms, waiting = [op], [total]
        while waiting:
            value = waiting.pop()
            term = self.local(value)
            if term is None or term is op or (value is not total and len(self.users[value]) != 1):
                continue
            if term.name == "add":
                waiting += reversed(term.operands)
            elif term.name == "contract" and term.attributes["over"] == op.attributes["over"] and (
                    set(axes_of(value)) == set(axes_of(op.result))
                    and all(self._is_before(v, op) for operand in term.operands for v in self.closure(operand))):
                terms.append(term)
        if total is not op.result:
            self.closures.clear()       # they end at what is going to be kept
        return terms

    def _is_before(self, value: Value, op: Op) -> bool:
        """Whether nothing that a value needs waits for what is planned after an op."""
        made = self.local(value)
        waits = made is not None and (bool(made.blocks) or made.name in LATE or made.name == "load")
        return not waits or self.position[made] < self.position[op]     # type: ignore[index]

    @staticmethod
    def _store_axes(op: Op) -> tuple[str, ...]:
        axes: list[str] = list(axes_of(op.operands[1]))
        for index in op.operands[2:]:
            axes += [a for a in axes_of(index) if a not in axes]
        return tuple(axes)

    def _kept_operands(self, op: Op, outside: bool) -> list[Value]:
        return [v for v in op.operands if op.name == "contract" and self.local(v) is not None
                and self.local(v).name not in LATE  # type: ignore[union-attr]
                and not self.local(v).blocks and self.keeps_operand(op, v, outside)]  # type: ignore[union-attr]

    def _costly_for(self, control: Op) -> list[Value]:
        """Values of this block that a control op reads and that cost too much to compute again inside it."""
        wanted: dict[Value, None] = {}
        operands: set[Value] = set()
        position = self.position
        for inner in control.walk():
            if inner.name == "contract":
                operands.update(self._kept_operands(inner, True))
            for v in inner.operands:
                if v.owner in position and isinstance(v.type, TileType):
                    wanted[v] = None
        return [v for v in wanted if not is_scalar_integer(v) and axes_of(v) and all(map(self.is_bounded, axes_of(v)))
                and self.local(v).name not in LATE  # type: ignore[union-attr]
                and not self.local(v).blocks  # type: ignore[union-attr]
                and (self.cost(v) > 0 or v in operands)]

    def _add(self, root: Op | Value, axes: tuple[str, ...], over: tuple[str, ...]) -> None:
        if isinstance(root, Value):
            if root in self.kept:
                return
            self.kept.add(root)
        walk = self.items[-1] if self.items and isinstance(self.items[-1], Walk) else None
        needs = self.needs(root)
        if walk is not None and not self._waits(root, needs, walk):
            depends = any(r.result in needs for r in walk.reductions)
            outer, every = set(walk.outer), set(walk.axes)
            if over:
                if not depends and set(axes) | set(over) == every and (
                        not walk.reductions or outer == set(axes)) and not walk.after:
                    if not walk.reductions:
                        walk.outer, walk.reduced = axes, over
                    assert isinstance(root, Op)
                    walk.reductions.append(root)
                    return
            elif set(axes) == outer and walk.reductions:
                if not self._indexed_by(root, needs, {r.result for r in walk.reductions}):
                    walk.after.append(root)
                    return
            elif set(axes) == every and not depends:
                walk.inner.append(root)
                return
        walk = Walk(axes, over)
        if over:
            assert isinstance(root, Op)
            walk.reductions.append(root)
        else:
            walk.inner.append(root)
        self.items.append(walk)

    # The order of memory.

    @cached_property
    def early(self) -> frozenset[Value]:
        return frozenset(early_scalars(self.block))

    def may_meet(self, access: Op, other: Op) -> bool:
        """Whether two accesses of one memory may touch the same element at two different points of a walk."""
        first, second = (op.operands[1 if op.name == "load" else 2:] for op in (access, other))
        wholes = {a for v in (*first, *second) for a in axes_of(v)} & self.wholes
        tensors = access.operands[0], other.operands[0]
        if tensors[0] is not tensors[1] and any(tensor.op is not None for tensor in tensors):
            return True         # of two views nothing is known; two arguments in one place have the same strides
        if not wholes or first == second:  # a store alone meets itself nowhere: the front end asks for that
            return False
        fixed = fixed_when_meeting(self._forms(first), self._forms(second), lambda symbol: symbol in wholes,
                                   lambda symbol: None)
        return fixed is not None and not wholes <= fixed

    @staticmethod
    def _forms(indices: list[Value]) -> list[Affine]:
        forms = []
        for value in indices:
            found = affine(value)
            # What is not affine differs from all else: from another such value as from itself at another point.
            forms.append(Affine(0, {object(): 1}) if found is None else
                         Affine(found.constant, {**found.axes, **found.scalars}))
        return forms

    def _waits(self, root: Op | Value, needs: frozenset[Value], walk: Walk) -> bool:
        """Whether a root may not join a walk because of what either stores and the other loads or stores."""
        stores = [r for r in walk.roots() if isinstance(r, Op) and r.name == "store"]
        loads = [op for op in (self.local(v) for v in needs) if op is not None and op.name == "load"] if stores else []
        for store in stores:
            memory = place_of(store.operands[0])
            if any(place_of(load.operands[0]) is memory and (
                    self.position[load] > self.position[store] or self.may_meet(load, store)) for load in loads):
                return True
        if not isinstance(root, Op) or root.name != "store":
            return False
        memory = place_of(root.operands[0])
        before = [op for op in self.accesses[memory] if self.position[op] < self.position[root]]
        if not before:
            return False
        needed = frozenset().union(*[self.needs(r) for r in walk.roots()])
        results = {r.result for r in walk.reductions}
        first = min((self.position[s] for s in stores if place_of(s.operands[0]) is memory), default=None)
        for op in before:
            if op.name == "store":
                if op in stores and self.may_meet(op, root):
                    return True
            elif ((first is not None and self.position[op] > first)  # it has to be kept between the two stores
                  or (op.result in needed and self.may_meet(op, root))
                  or any(self.closure(v) & results for v in op.operands[1:])):
                return True
        return False

    def _indexed_by(self, root: Op | Value, needs: frozenset[Value], results: set[Value]) -> bool:
        """Whether a result is part of an index that is one for all elements: addresses are settled before a walk."""
        accesses = [root] if isinstance(root, Op) else []
        accesses += [op for op in (self.local(v) for v in needs) if op is not None and op.name == "load"]
        return any(not axes_of(index) and self.closure(index) & results
                   for op in accesses for index in op.operands[2 if op.name == "store" else 1:])

    def _walks(self) -> list[Walk]:
        return [w for w in self.items if isinstance(w, Walk)]

    def _keep_shared(self) -> None:
        """A costly value that several walks read is kept by the first of them, or before it, if that has more axes; and
        so is one that a single walk would make again and again."""
        for op in reversed(self.block.ops):
            if len(op.results) != 1 or op.blocks or op.name in LATE:
                continue
            value = op.result
            if not isinstance(value.type, TileType) or not value.type.axes or value in self.kept:
                continue
            cost = self.cost(value)
            if cost <= min(self.keep_cost, KEEP_COST) or not all(map(self.is_bounded, value.type.axes)):
                continue
            readers = [w for w in self._walks() if any(value in self.needs(r) for r in w.roots())]
            # A walk over further axes would make it for each of their coordinates.
            once = all(set(w.axes) <= set(value.type.axes) for w in readers)
            if not (len(readers) > 1 and cost > (self.keep_cost if once else KEEP_COST)) and not (
                    readers and self._is_made_again(value, readers[0])):
                continue
            first = readers[0]
            axes = set(axes_of(value))
            if axes == set(first.axes):
                first.inner.append(value)
            elif axes == set(first.outer) and first.reductions:
                first.after.append(value)
            elif axes < set(first.axes):
                place = next(i for i, item in enumerate(self.items) if item is first)
                self.items.insert(place, Walk(axes_of(value), (), [], [value]))
            else:
                continue
            self.kept.add(value)
            self.closures.clear()

    def _is_made_again(self, value: Value, walk: Walk) -> bool:
        """Whether a walk makes a value anew for each row, as it sums the axes of the value in each, where the rows are
        an axis of `whole`: a decay of columns, in sums of all rows of a state. (What is but multiplied in products is
        packed for them.)"""
        axes = set(axes_of(value))
        rows = set(walk.outer) - axes
        made = [*(op for op in walk.reductions if op.name == "reduce"), *walk.inner]
        return bool(rows & self.wholes) and axes < set(walk.axes) and bool(axes.intersection(walk.reduced)) and any(
            value in self.needs(root) for root in made)

    def _keep_reductions(self) -> None:
        """The result of a reduction that others than its walk read is kept, after the elementwise ops that follow."""
        for walk in self._walks():
            for reduction in walk.reductions:
                value = reduction.result
                readers = [i for i in self.items if i is not walk and self._reads(i, value)]
                terminator = self.block.terminator
                yielded = terminator is not None and any(
                    value in self.closure(v) for i, v in enumerate(terminator.operands)
                    if i not in self.yields_kept and isinstance(v.type, TileType))
                if not readers and not yielded:
                    continue
                while True:
                    users = self.users.get(value, [])
                    user = users[0] if len(users) == 1 else None
                    if (user is None or (yielded and not self._adds_integers(user)) or user.blocks
                            or len(user.results) != 1 or user not in self.position
                            or user.name in (*LATE, "load", "store", "yield", "full")
                            or set(axes_of(user.result)) != set(walk.outer)
                            or not self._ready(user, walk) or user.result in self.kept):
                        break
                    value = user.result
                if value not in walk.after:
                    walk.after.append(value)
                self.kept.add(value)
                self.closures.clear()

    @staticmethod
    def _adds_integers(op: Op) -> bool:
        """Whether an op is a sum that contractions may share (lane/reductions.py): its parts need not be kept."""
        return op.name == "add" and op.result.type.dtype.is_integer  # type: ignore[union-attr]

    def _reads(self, item: Walk | Op, value: Value) -> bool:
        if isinstance(item, Walk):
            return any(value in self.needs(r) for r in item.roots() if r is not value)
        return any(value in self.closure(v) for inner in item.walk() for v in inner.operands
                   if isinstance(v.type, TileType))

    def _ready(self, user: Op, walk: Walk) -> bool:
        """Whether all that `user` reads exists when `walk` ends: nothing of a later walk, and nothing stored since."""
        index = next(i for i, item in enumerate(self.items) if item is walk)
        later = {r.result for item in self.items[index + 1:] if isinstance(item, Walk) for r in item.reductions}
        later |= {v for item in self.items[index + 1:] if isinstance(item, Op) for v in item.results}
        needed = self.closure(user.result)
        if any(v in later for v in needed):
            return False
        loads = [op for op in (self.local(v) for v in needed) if op is not None and op.name == "load"]
        stores = [(store, self.position[item if isinstance(item, Op) else store])
                  for item in self.items[index:] if loads for store in self._stores(item)]
        return not any(place_of(store.operands[0]) is place_of(load.operands[0]) and at < self.position[load]
                       for load in loads for store, at in stores)

    @staticmethod
    def _stores(item: Walk | Op) -> list[Op]:
        ops = item.walk() if isinstance(item, Op) else item.roots()
        return [op for op in ops if isinstance(op, Op) and op.name == "store"]

    def _keep_overwritten(self) -> None:
        """What is loaded before its tensor is overwritten, and used after, is kept before that happens."""
        loaded = {memory for memory, accesses in self.accesses.items() if any(op.name == "load" for op in accesses)}
        index = 0
        while loaded and index < len(self.items):
            item = self.items[index]
            stores = self._stores(item)
            may_overwrite = any(place_of(store.operands[0]) in loaded for store in stores)
            found = next((load for load in (self._loads_after(index) if may_overwrite else ())
                          if any(self._overwrites(item, store, load, index) for store in stores)), None)
            if found is None:
                index += 1
                continue
            self.kept.add(found.result)
            self.closures.clear()
            self.items.insert(index, Walk(axes_of(found.result), (), [], [found.result]))

    def _overwrites(self, item: Walk | Op, store: Op, load: Op, index: int) -> bool:
        if place_of(store.operands[0]) is not place_of(load.operands[0]):
            return False
        if isinstance(item, Op):
            return self.position[load] < self.position[item]
        return self.position[load] < self.position[store] and (
            self.may_meet(load, store) or load in self._loads_after(index + 1))

    def _loads_after(self, index: int) -> list[Op]:
        """The loads, not kept, that the items from `index` on and the terminator read; a load of this block that a loop
        reads is loaded in it anew each time."""
        terminator = self.block.terminator
        stack = [v for i, v in enumerate(terminator.operands) if i not in self.yields_kept] if terminator else []
        for item in self.items[index:]:
            if isinstance(item, Walk):
                stack += [v for r in item.roots() for v in ((r.op.operands if r.op is not None else [])
                                                            if isinstance(r, Value) else r.operands)]
                stack += [r for r in item.roots() if isinstance(r, Value)]
            else:
                stack += [v for inner in item.walk() for v in inner.operands]
        seen: set[Value] = set()
        found: list[Op] = []
        while stack:
            value = stack.pop()
            op = self.local(value)
            if op is None or value in seen or value in self.kept or value in self.early or op.blocks:
                continue
            seen.add(value)
            if op.name == "load":
                found.append(op)
            if op.name not in LATE:
                stack += op.operands
        return sorted(found, key=self.position.__getitem__)

    def _crossing(self) -> set[str]:
        crossing: set[str] = set()
        for value in self.kept:
            crossing |= set(axes_of(value))
        for walk in self._walks():
            for reduction in walk.reductions:
                if any(self._reads(i, reduction.result) for i in self.items if i is not walk):
                    crossing |= set(axes_of(reduction.result))
        return crossing
