"""Instruction selection: the scan before it.

Enters: a lane function. Leaves: the position of every op, the uses of every value, and what is deferred. Holds:
nothing is emitted.

Positions: ops are numbered in order of the text, an op with blocks twice (before and after them). A value that comes
from outside a loop and is read inside is used until the loop ends.
"""

from __future__ import annotations

from bisect import insort
from collections import defaultdict
from typing import Any

from ..ir.nodes import Block, Op, Value
from ..lane.ops import ADDRESS_AT
from .select_values import SelectedValues

WRITES_MEMORY = frozenset(["store", "store_lane0", "s_store", "scatter", "join", "loop", "if", "tasks", "barrier",
                           "fence_streaming", "hand_over", "take_over", "sync_lanes", "sync_warps", "sync_cluster",
                           "async_copy", "async_commit", "async_wait", "signal_start", "signal_fence", "signal_arrive",
                           "signal_expect", "signal_wait", "tensor_copy", "store_matrix", "store_fence",
                           "tensor_store", "store_wait", "group_fence", "group_multiply", "group_commit", "group_wait",
                           "sums_open", "sums_close", "sums_multiply", "sums_multiply_rows", "sums_signal",
                           "sums_load", "sums_store", "sums_acquire", "sums_release", "register_budget",
                           "tile_configure", "tile_release", "tile_store"])
"""Ops that a load may not be moved over."""

CONSTANTS = frozenset(["s_const", "splat_const"])
_PRODUCTS = frozenset(["fma", "dot2_bf16", "dot4_u8i8", "dot4_i8i8", "dot4_u8u8", "dot2_i16",
                       "two_by_two_bf16", "two_by_two_i8i8", "two_by_two_u8u8", "two_by_two_u8i8"])
_LOADS = frozenset(["load", "load_splat", "prefetch"])
_DEFERRABLE = frozenset(["s_add", "s_sub", "s_cmp", "mask_any", "mask_all", "any_zero_bf16", "neg", "broadcast_lane"])


class _Scan:
    """One walk over the ops. What it finds goes to `values`; what decides what is deferred stays here.

    candidates: ops that may be deferred. late: increments of what loops carry, each with the loop's argument and the
    place of the loop's end. folded, addressed, plain_bases, signed, laned: how often each value is an operand that may
    in memory, a part of an address, a base without an index in its own block, an operand whose sign the instruction
    takes, a factor that may be one lane of a register. conditions: of branches and selections in their own block.
    """

    def __init__(self, values: ScannedValues) -> None:
        self.values = values
        self.folds = values.rules.folds(values)
        self.position = 0
        self.candidates: list[Op] = []
        self.late: list[tuple[Op, Value, int]] = []
        self.folded: defaultdict[Value, int] = defaultdict(int)
        self.addressed: defaultdict[Value, int] = defaultdict(int)
        self.plain_bases: defaultdict[Value, int] = defaultdict(int)
        self.signed: defaultdict[Value, int] = defaultdict(int)
        self.laned: defaultdict[Value, int] = defaultdict(int)
        self.conditions: set[Value] = set()
        # In how many loops each value is made, constants aside; the loops around, and what each reads from outside.
        self._depth_of: dict[Value, int] = {}
        self._loops: list[Op] = []
        self._read_inside: list[list[Value]] = []
        # Between two ops of one epoch nothing writes memory: a load may be moved from one to the other.
        self._epoch = 0
        self._loaded: dict[Value, int] = {}
        self.joined: list[tuple[Op, Op, Op]] = []
        """Of sums that go back to where a term came from, that load, the sum and the store."""

    def block(self, block: Block, owner: Op | None = None) -> None:
        values = self.values
        depth = len(self._loops)
        for argument in block.arguments:
            self._depth_of[argument] = depth
            values.block_of[argument] = block
        absorbs_sign, own_constants = values.rules.ABSORBS_SIGN, values.rules.OWN_CONSTANTS
        takes_lane = values.rules.TAKES_LANE
        for op in block.ops:
            self.position += 1
            values.start[op] = self.position
            name = op.name
            values.names.add(name)
            self._operands(op, block, depth)
            if name in absorbs_sign:
                for value in op.operands:
                    self.signed[value] += 1
            for place in takes_lane.get(name, ()):
                self.laned[op.operands[place]] += 1
            if name in own_constants:
                for key in own_constants[name](values, op):
                    self._constant(key)
            if name in ADDRESS_AT:
                self._address(op, block)
            if op.blocks:
                self._epoch += 1
                if name == "if":
                    self._condition(op, block)
                    for nested in op.blocks:
                        self.block(nested, op)
                        self._epoch += 1
                else:
                    self._loop(op, depth)
                self.position += 1
                values.end[op] = self.position
                self._epoch += 1
            elif name in WRITES_MEMORY:
                if name == "s_store":
                    self._joined_in_memory(op, block)
                self._epoch += 1
            elif name == "yield":
                if owner is not None and owner.name == "loop":
                    self._late_increments(op, block)
            elif name == "s_select":
                self._condition(op, block)
            if op.results:
                self._results(op, block, depth)

    def _operands(self, op: Op, block: Block, depth: int) -> None:
        """The uses of what an op reads."""
        values, uses, uses_at = self.values, self.values.uses, self.values.uses_at
        foldable = self.folds.get(op.name)
        for place, value in enumerate(op.operands):
            value = values.alias.get(value, value)
            defined = self._depth_of.get(value)
            if defined is None:
                if value.op.name == "splat_const":   # type: ignore[union-attr]
                    self._constant(values.rules.constant_key(values, value))
                continue
            uses[value] = uses.get(value, 0) + 1
            if defined < depth:
                self._read_inside[defined].append(value)
            elif value in uses_at:
                uses_at[value].append(self.position)
            else:
                uses_at[value] = [self.position]
            if foldable is not None and place in foldable and self._loaded.get(value) == self._epoch and (
                    values.block_of[value] is block):
                self.folded[value] += 1

    def _joined_in_memory(self, op: Op, block: Block) -> None:
        """A scalar that is stored: what is there and something more?"""
        total = op.operands[0].op
        if total is None or total.name != "s_add" or self.values.block_of.get(total.result) is not block or (
                op.attributes["dtype"].bits not in self.values.rules.SUMS_IN_MEMORY):
            return
        for term in total.operands:
            load = term.op
            if load is not None and load.name == "s_load" and self._loaded.get(term) == self._epoch and (
                    self.values.block_of[term] is block) and load.operands == op.operands[1:] and (
                    load.attributes == op.attributes):
                self.joined.append((load, total, op))
                return

    def _constant(self, key: Any) -> None:
        """The innermost loop reads it."""
        if self._loops:
            counts = self.values.loop_constants[self._loops[-1]]
            counts[key] = counts.get(key, 0) + 1

    def _address(self, op: Op, block: Block) -> None:
        at = ADDRESS_AT[op.name]
        base = op.operands[at]
        self.addressed[base] += 1
        if op.attributes.get("indexed"):
            self.addressed[op.operands[at + 1]] += 1
        elif op.name not in ("gather", "scatter") and self.values.block_of.get(base) is block:
            self.plain_bases[base] += 1

    def _condition(self, op: Op, block: Block) -> None:
        if self.values.block_of.get(op.operands[0]) is block:
            self.conditions.add(op.operands[0])

    def _loop(self, op: Op, depth: int) -> None:
        """A loop, or tasks: what comes from outside, its bound too, is read until it ends."""
        values, uses_at = self.values, self.values.uses_at
        counted = op.name == "loop"
        body = op.blocks[0]
        if self._loops:
            values.inner_loops[self._loops[-1]] = 1
        values.loop_constants[op] = {}
        if counted:
            values.bounds[body.arguments[0]] = op
        inside: list[Value] = []
        self._loops.append(op)
        self._read_inside.append(inside)
        self.block(body, op)
        self._loops.pop()
        self._read_inside.pop()
        self.position += 1
        if counted and body.arguments[0] in uses_at:
            uses_at[body.arguments[0]].append(self.position)    # by the increment, for the next round
        bound = op.operands[1 if counted else 0]
        for value in dict.fromkeys([*inside, values.alias.get(bound, bound)]):
            # What is made further out was noted for a loop further out.
            if self._depth_of.get(value) == depth:
                uses_at.setdefault(value, []).append(self.position)

    def _late_increments(self, terminator: Op, block: Block) -> None:
        """What a loop carries and only adds to, where its last value is read after the sum: the sum may go last."""
        values = self.values
        for number, value in enumerate(terminator.operands):
            op = value.op
            if op is None or op.name not in ("s_add", "s_sub") or values.block_of[value] is not block:
                continue
            argument = block.arguments[number + 1]
            a, b = op.operands
            other = b if a is argument else a if b is argument and op.name == "s_add" else None
            if other is not None and other not in block.arguments and argument not in terminator.operands \
                    and values.uses[value] == 1 and values.uses_at[argument][-1] > values.start[op] \
                    and (values.constant_of(other) is not None or values.block_of[other] is not block):
                self.late.append((op, argument, self.position))

    def _results(self, op: Op, block: Block, depth: int) -> None:
        values, name = self.values, op.name
        for value in op.results:
            if name not in CONSTANTS:
                self._depth_of[value] = depth
            values.block_of[value] = block
        value = op.results[0]
        if name in ("load", "load_splat"):
            if not (op.attributes.get("masked") or op.attributes.get("twice")) and (
                    op.attributes["dtype"].name in values.rules.FOLDED_DTYPES):
                self._loaded[value] = self._epoch
                self.candidates.append(op)
        elif name in _DEFERRABLE:
            self.candidates.append(op)
        elif name == "s_load":
            self._loaded[value] = self._epoch
        elif name == "bitcast" or (name == "cvt" and value.type == op.operands[0].type):
            root = values.alias.get(op.operands[0], op.operands[0])
            if root.op is None or root.op.name not in CONSTANTS:
                values.alias[value] = root


class ScannedValues(SelectedValues):
    """Values, and the scan of the function."""

    def scan(self) -> None:
        """Number the ops, find uses, and decide what is deferred."""
        found = _Scan(self)
        found.block(self.function.body)
        self.positions = found.position
        for op, argument, place in found.late:
            self.deferred[op.results[0]] = op
            self.uses_at[argument].append(place)
        for load, total, store in found.joined:
            if self.uses[load.result] == self.uses[total.result] == 1:
                for op in (load, total):
                    self.deferred[op.result] = op
                for term in total.operands:
                    if term in self.uses_at and term is not load.result:
                        insort(self.uses_at[term], self.start[store])
        spread = self._spread_in_place([
            op.results[0] for op in found.candidates
            if op.name == "load_splat" and found.folded.get(op.results[0], 0) == self.uses.get(op.results[0])])
        for op in reversed(found.candidates):   # what reads it is decided before it
            value = op.results[0]
            if value not in self.deferred and self.uses.get(value, 0) and self._may_wait(op, found, spread):
                self._defer(op, found)

    def _may_wait(self, op: Op, found: _Scan, spread: set[Value]) -> bool:
        """Whether all that read the result of a candidate can take in the op itself."""
        value, name = op.results[0], op.name
        count = self.uses[value]
        if name == "load":
            return count == 1 == found.folded.get(value, 0)
        if name == "load_splat":
            return value in spread
        if name == "neg":
            return found.signed.get(value, 0) == count
        if name == "broadcast_lane":
            return found.laned.get(value, 0) == count
        if name in ("s_add", "s_sub"):
            a, b = op.operands
            if self.small_constant(b) is not None or (name == "s_add" and self.small_constant(a) is not None):
                return found.addressed.get(value, 0) == count
            return name == "s_add" and self.facts.indexed_addresses and found.plain_bases.get(value, 0) == count
        return count == 1 and value in found.conditions

    def _defer(self, op: Op, found: _Scan) -> None:
        """Its operands are read where its result is."""
        self.deferred[op.results[0]] = op
        places = self.uses_at[op.results[0]]
        for used in op.operands:
            used = self.alias.get(used, used)
            if used in self.uses_at:
                for place in places:
                    insort(self.uses_at[used], place)
            if op.name in ("s_add", "s_sub"):
                found.addressed[used] += 1

    def _spread_in_place(self, splats: list[Value]) -> set[Value]:
        """Of elements that are loaded only to be operands, those that each of their users spreads for itself: with few
        users, or with two, evenly among all of a block, as many as its products leave loads for. An index in their
        address would take the instruction that is saved."""
        facts = self.facts
        chosen = {value for value in splats if self.uses[value] <= facts.most_folded_splats}
        pairs: dict[Block, list[Value]] = {}
        for value in splats if facts.folded_loads else ():
            op = value.op
            if value not in chosen and self.uses[value] == 2 and op is not None and not op.attributes.get("indexed"):
                pairs.setdefault(self.block_of[value], []).append(value)
        for block, values in pairs.items():
            names = [op.name for op in block.ops]
            products, loads = (sum(name in kind for name in names) for kind in (_PRODUCTS, _LOADS))
            count = min(len(values), max(0, int(products * facts.folded_loads) - loads))
            chosen.update(value for place, value in enumerate(values)
                          if place * count // len(values) < (place + 1) * count // len(values))
        return chosen
