"""Instruction selection: the scan before it.

Enters: a lane function. Leaves: the position of every op, the uses of every value, and what is deferred. Holds:
nothing is emitted.

Positions: ops are numbered in order of the text, an op with blocks twice (before and after them). A value that comes
from outside a loop and is read inside is used until the loop ends.
"""

from __future__ import annotations

from bisect import insort

from ..ir.nodes import Block, Op, Value
from ..lane.ops import ADDRESS_AT
from .select_values import SelectedValues

WRITES_MEMORY = frozenset(["store", "store_lane0", "s_store", "scatter", "join", "loop", "if", "tasks", "barrier",
                           "fence_streaming", "hand_over", "take_over", "sync_lanes", "sync_warps", "sync_cluster",
                           "async_copy", "async_commit", "async_wait", "signal_start", "signal_fence", "signal_arrive",
                           "signal_expect", "signal_wait", "tensor_copy", "store_matrix", "store_fence",
                           "tensor_store", "store_wait", "group_fence", "group_multiply", "group_commit", "group_wait",
                           "register_budget", "tile_configure", "tile_release", "tile_store"])
"""Ops that a load may not be moved over."""

CONSTANTS = frozenset(["s_const", "splat_const"])
_PRODUCTS = frozenset(["fma", "dot2_bf16", "dot4_u8i8", "dot2_i16"])
_LOADS = frozenset(["load", "load_splat", "prefetch"])
_DEFERRABLE = frozenset(["s_add", "s_sub", "s_cmp", "mask_any", "mask_all", "any_zero_bf16", "neg"])


class ScannedValues(SelectedValues):
    """Values, and the scan of the function."""

    def scan(self) -> None:
        """Number the ops, find uses, and decide what is deferred."""
        folds = self.rules.folds(self)
        own_constants = self.rules.OWN_CONSTANTS
        full_width = self.rules.FOLDED_DTYPES
        alias, uses, uses_at, block_of = self.alias, self.uses, self.uses_at, self.block_of
        start, end, bounds, names = self.start, self.end, self.bounds, self.names
        depth_of: dict[Value, int] = {}     # of all but constants
        loops: list[list[Value]] = []
        loop_stack: list[Op] = []
        candidates: list[Op] = []
        load_epoch: dict[Value, int] = {}
        folded_uses: dict[Value, int] = {}
        address_uses: dict[Value, int] = {}
        plain_base_uses: dict[Value, int] = {}
        condition_uses: dict[Value, int] = {}
        signed_uses: dict[Value, int] = {}
        absorbs_sign = self.rules.ABSORBS_SIGN
        indexed = self.facts.indexed_addresses
        late: list[tuple[Op, Value, int]] = []
        position = 0
        epoch = 0

        def walk(block: Block, owner: Op | None) -> None:
            nonlocal position, epoch
            depth = len(loops)
            for argument in block.arguments:
                depth_of[argument] = depth
                block_of[argument] = block
            for op in block.ops:
                position += 1
                start[op] = position
                name = op.name
                names.add(name)
                operands = op.operands
                foldable = folds.get(name)
                for place, value in enumerate(operands):
                    value = alias.get(value, value)
                    defined = depth_of.get(value)
                    if defined is None:
                        if loop_stack and value.op.name == "splat_const":   # type: ignore[union-attr]
                            key = self.rules.constant_key(self, value)
                            counts = self.loop_constants[loop_stack[-1]]
                            counts[key] = counts.get(key, 0) + 1
                        continue
                    uses[value] = uses.get(value, 0) + 1
                    if defined < depth:
                        loops[defined].append(value)
                    elif value in uses_at:
                        uses_at[value].append(position)
                    else:
                        uses_at[value] = [position]
                    if foldable is not None and place in foldable and load_epoch.get(value) == epoch \
                            and block_of[value] is block:
                        folded_uses[value] = folded_uses.get(value, 0) + 1
                if name in absorbs_sign:
                    for value in operands:
                        signed_uses[value] = signed_uses.get(value, 0) + 1
                if loop_stack and name in own_constants:
                    counts = self.loop_constants[loop_stack[-1]]
                    for key in own_constants[name](self, op):
                        counts[key] = counts.get(key, 0) + 1
                at = ADDRESS_AT.get(name)
                if at is not None:
                    base = operands[at]
                    address_uses[base] = address_uses.get(base, 0) + 1
                    if op.attributes.get("indexed"):
                        index = operands[at + 1]
                        address_uses[index] = address_uses.get(index, 0) + 1
                    elif name not in ("gather", "scatter") and block_of.get(base) is block:
                        plain_base_uses[base] = plain_base_uses.get(base, 0) + 1
                if op.blocks:
                    epoch += 1
                    if name == "if":
                        condition = operands[0]
                        if block_of.get(condition) is block:
                            condition_uses[condition] = 1
                        for nested in op.blocks:
                            walk(nested, op)  # noqa: F821
                            epoch += 1
                    else:
                        if loop_stack:
                            self.inner_loops[loop_stack[-1]] = 1
                        loop_stack.append(op)
                        self.loop_constants[op] = {}
                        inside: list[Value] = []
                        loops.append(inside)
                        if name == "loop":
                            bounds[op.blocks[0].arguments[0]] = op
                        walk(op.blocks[0], op)  # noqa: F821
                        loops.pop()
                        loop_stack.pop()
                        position += 1
                        if name == "loop" and uses.get(op.blocks[0].arguments[0]):
                            uses_at[op.blocks[0].arguments[0]].append(position)   # the increment reads it
                        # The bound is read until the loop ends, like all that comes from outside.
                        inside.append(alias.get(operands[1 if name == "loop" else 0],
                                                operands[1 if name == "loop" else 0]))
                        if name == "loop" and op.blocks[0].arguments[0] in uses_at:
                            # The counter goes on to the next round.
                            uses_at[op.blocks[0].arguments[0]].append(position)
                        seen: set[Value] = set()
                        for value in inside:
                            if value in seen:
                                continue
                            defined = depth_of.get(value)
                            if defined is None:
                                continue
                            seen.add(value)
                            if defined < depth:
                                continue  # already noted for a loop further out
                            uses_at.setdefault(value, []).append(position)
                    position += 1
                    end[op] = position
                    epoch += 1
                elif name in WRITES_MEMORY:
                    epoch += 1
                elif name == "yield":
                    if owner is not None and owner.name == "loop":
                        late_increments(block, op, position)
                elif name == "s_select":
                    condition = operands[0]
                    if block_of.get(condition) is block:
                        condition_uses[condition] = 1
                if op.results:
                    for value in op.results:
                        if name not in CONSTANTS:
                            depth_of[value] = depth
                        block_of[value] = block
                    value = op.results[0]
                    if name == "load" or name == "load_splat":
                        if not op.attributes.get("masked") and op.attributes["dtype"].name in full_width:
                            load_epoch[value] = epoch
                            candidates.append(op)
                    elif name in _DEFERRABLE:
                        candidates.append(op)
                    elif name == "bitcast" or (name == "cvt" and value.type == operands[0].type):
                        root = alias.get(operands[0], operands[0])
                        if root.op is None or root.op.name not in CONSTANTS:
                            alias[value] = root

        def late_increments(block: Block, terminator: Op, place: int) -> None:
            for number, value in enumerate(terminator.operands):
                op = value.op
                if op is None or op.name not in ("s_add", "s_sub") or block_of[value] is not block:
                    continue
                argument = block.arguments[number + 1]
                a, b = op.operands
                other = b if a is argument else a if b is argument and op.name == "s_add" else None
                if other is not None and other not in block.arguments and argument not in terminator.operands \
                        and uses[value] == 1 and uses_at[argument][-1] > start[op] \
                        and (self.constant_of(other) is not None or block_of[other] is not block):
                    late.append((op, argument, place))

        walk(self.function.body, None)
        del walk    # it holds itself, and so all that it reads
        self.positions = position
        for op, argument, place in late:
            self.deferred[op.results[0]] = op
            uses_at[argument].append(place)
        spread = self._spread_in_place([op.results[0] for op in candidates if op.name == "load_splat" and
                                        folded_uses.get(op.results[0], 0) == uses.get(op.results[0])])
        for op in reversed(candidates):
            value = op.results[0]
            count = uses.get(value, 0)
            if value in self.deferred or not count:
                continue
            name = op.name
            if name == "load":
                if folded_uses.get(value, 0) != count or count > 1:
                    continue
            elif name == "load_splat":
                if value not in spread:
                    continue
            elif name == "s_add" or name == "s_sub":
                a, b = op.operands
                if self.small_constant(b) is not None or (name == "s_add" and self.small_constant(a) is not None):
                    if address_uses.get(value, 0) != count:
                        continue
                elif name == "s_sub" or not indexed or plain_base_uses.get(value, 0) != count:
                    continue
            elif name == "neg":
                if signed_uses.get(value, 0) != count:
                    continue
            elif count != 1 or value not in condition_uses:
                continue
            self.deferred[value] = op
            places = uses_at[value]
            for used in op.operands:
                used = alias.get(used, used)
                if used in uses_at:
                    for place in places:
                        insort(uses_at[used], place)
                if name == "s_add" or name == "s_sub":
                    address_uses[used] = address_uses.get(used, 0) + 1

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
