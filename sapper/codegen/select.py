"""Instruction selection, the part that no target differs in: lane IR to machine IR over virtual registers.

Enters: a lane function, and a target's rules (a module such as sapper/targets/x86_64/select.py). Leaves: a
MachineFunction whose registers are virtual except where a rule names one (calling convention, division).
Holds: ops are visited in order; a value lives in one virtual register. The registers are not in SSA form:
  - a block argument of a loop is one register, written before the loop and at its yield; wherever the old value is
    dead by the time the new one is made, the new one is made in that very register (`target`), so that a carried
    accumulator is never moved;
  - constants, foldable loads, address sums and comparisons are *deferred*: nothing is emitted where they stand, and
    the rule of their user folds them in, or asks for them in a register.
A rule writes its result only by its last instruction that reads an operand, since the result's register may be that
of an operand which dies there.

Positions: ops are numbered in order of the text, an op with blocks twice (before and after them). A value that comes
from outside a loop and is read inside is used until the loop ends.
"""

from __future__ import annotations

from bisect import insort
from typing import Any

from ..ir.nodes import Block, Function, Location, Op, Value
from ..ir.types import MaskType, RowType, ScalarType, TileRegisterType, Type
from ..lane.ops import ADDRESS_AT, FIRST_WORDS, LANE_OPS
from .machine import (
    AnyRegister,
    Immediate,
    Instruction,
    Label,
    LabelReference,
    MachineFunction,
    Memory,
    Operand,
    Register,
    VirtualRegister,
)

WRITES_MEMORY = frozenset(["store", "store_lane0", "s_store", "scatter", "loop", "if", "tasks", "barrier",
                           "fence_streaming", "hand_over", "take_over", "sync_lanes", "sync_warps", "sync_cluster",
                           "async_copy", "async_commit", "async_wait", "signal_start", "signal_fence", "signal_arrive",
                           "signal_expect", "signal_wait", "tensor_copy", "store_matrix", "store_fence",
                           "tensor_store", "store_wait", "group_fence", "group_multiply", "group_commit", "group_wait",
                           "register_budget", "tile_configure", "tile_release", "tile_store"])
"""Ops that a load may not be moved over."""

_PURE = frozenset(name for name, spec in LANE_OPS.rows.items() if spec.pure) | {
    "load", "load_splat", "s_load", "gather", "tile_zero", "tile_load", "tile_multiply"}
_CONSTANTS = frozenset(["s_const", "splat_const"])
_DEFERRABLE = frozenset(["s_add", "s_sub", "s_cmp", "mask_any", "mask_all", "neg"])
_LIMIT = 2**31


class SelectionError(Exception):
    """A lane op that the target can't do; the message says where, what was found, what was expected, and the mend."""


def selection_error(op: Op, found: str, expected: str, mend: str) -> SelectionError:
    where = f"{op.location}: " if op.location else ""
    return SelectionError(f"{where}lane op {op.name}: found {found}; expected {expected}; mend: {mend}")


class Selector:
    """One selection. The rules of the target are called with it and the op, and use its methods.

    registers: where each value is. body: what was emitted. ordered: see MachineFunction. position: that of the op being
    selected. lanes: of the function. facts: what the target's rules keep for themselves (made by `rules.facts_of`).
    scope: the blocks around the op being selected, outermost first.
    """

    def __init__(self, function: Function, rules: Any, target: Any) -> None:
        self.function = function
        self.rules = rules
        self.target_description = target
        self.lanes: int = function.attributes["lanes"]
        self.body: list[Instruction | Label] = []
        self.constants: dict[str, tuple[int, bytes]] = {}
        self.constant_labels: dict[tuple[int, bytes], str] = {}
        self.ordered: set[str] = set()
        self.rows = rules.ROWS
        self.location: Location | None = None
        self.comment = ""
        self.position = self.positions = 0
        self.registers: dict[Value, VirtualRegister] = {}
        self.register_count = 0
        self.label_count = 0
        # What the scan finds.
        self.alias: dict[Value, Value] = {}
        self.uses: dict[Value, int] = {}
        self.uses_at: dict[Value, list[int]] = {}
        self.block_of: dict[Value, Block] = {}
        self.start: dict[Op, int] = {}
        self.end: dict[Op, int] = {}
        self.deferred: dict[Value, Op] = {}
        self.loop_constants: dict[Op, dict[Any, int]] = {}
        self.inner_loops: dict[Op, int] = {}
        self.bounds: dict[Value, Op] = {}
        self.live_rows: list[int] | None = None
        # State of the walk.
        self.target: dict[Value, VirtualRegister] = {}
        self.reserved: dict[VirtualRegister, int] = {}
        self.hoisted: dict[Any, VirtualRegister] = {}
        self.scope: list[Block] = []
        self.facts = rules.facts_of(self, target)

    # --- Emission ---------------------------------------------------------------------------------------------------

    def emit(self, name: str, *operands: Any) -> None:
        """One instruction; Python ints become immediates."""
        self.body.append(Instruction(
            self.rows[name], [Immediate(o) if type(o) is int else o for o in operands], None, False, self.location,
            self.comment))

    def emit_masked(self, name: str, mask: AnyRegister, zeroing: bool, *operands: Any) -> None:
        self.body.append(Instruction(
            self.rows[name], [Immediate(o) if type(o) is int else o for o in operands], mask, zeroing, self.location,
            self.comment))

    def branch(self, name: str, label: str) -> None:
        self.body.append(Instruction(self.rows[name], [LabelReference(label)], None, False, self.location))

    def label(self, name: str, align: int = 1) -> None:
        self.body.append(Label(name, align))

    def new_label(self, stem: str) -> str:
        self.label_count += 1
        return f".{stem}{self.label_count}"

    def new(self, kind: str) -> VirtualRegister:
        self.register_count += 1
        return VirtualRegister(kind, self.register_count)

    @staticmethod
    def physical(kind: str, number: int) -> Register:
        return Register(kind, number)

    @staticmethod
    def memory(base: AnyRegister | None, index: AnyRegister | None = None, scale: int = 1, disp: int = 0,
               broadcast: bool = False, label: str | None = None) -> Memory:
        return Memory(base, index, scale, disp, broadcast, label)

    def constant_label(self, alignment_bytes: int, data: bytes) -> str:
        """The label of `data` beside the code; equal data share one."""
        key = (alignment_bytes, data)
        label = self.constant_labels.get(key)
        if label is None:
            label = self.constant_labels[key] = f".constant{len(self.constants)}"
            self.constants[label] = key
        return label

    # --- Values -----------------------------------------------------------------------------------------------------

    def kind(self, type_: Type) -> str:
        if isinstance(type_, RowType):
            return str(self.facts.wide_kind) if type_.dtype.bits == 64 else "vec"
        if isinstance(type_, ScalarType):
            return "gpr"
        if isinstance(type_, TileRegisterType):
            return "tile"
        return str(self.facts.mask_kind) if isinstance(type_, MaskType) else "vec"

    def last_use(self, value: Value) -> int:
        """The position from which the value's register is free again."""
        value = self.alias.get(value, value)
        places = self.uses_at.get(value)
        if places:
            return places[-1]
        op = value.op
        return 0 if op is None else self.end[op] if op in self.end else self.start[op]

    def dead(self, value: Value) -> bool:
        return self.last_use(value) <= self.position

    def used_once(self, value: Value) -> bool:
        return self.uses.get(value, 0) == 1

    def may_take(self, register: VirtualRegister, value: Value) -> bool:
        """May `value` live in this register, whose present value dies here? Not beyond the op that the register is
        reserved for."""
        limit = self.reserved.get(register)
        return limit is None or self.last_use(value) <= limit

    def define(self, value: Value) -> VirtualRegister:
        """The register in which `value` is to be made."""
        register = self.target.get(value)
        if register is None:
            register = self.new(self.kind(value.type))
        self.registers[value] = register
        return register

    def tie(self, value: Value, candidates: tuple[Value, ...]) -> tuple[VirtualRegister, int]:
        """For a two-address instruction: the register in which `value` is made, and which of the candidate operands
        is already there and dies here, or -1 if none is and one must be copied."""
        wanted = self.target.get(value)
        registers = self.registers
        found = -1
        for place, candidate in enumerate(candidates):
            register = registers.get(candidate)
            if register is None:
                continue
            if wanted is register:
                # `aim` saw that this is its last use on this path, though another branch may use it further down.
                registers[value] = register
                return register, place
            if found < 0 and wanted is None and self.dead(candidate) and self.may_take(register, value):
                found = place
        if found >= 0:
            register = registers[candidates[found]]
            registers[value] = register
            return register, found
        if wanted is None:
            wanted = self.new(self.kind(value.type))
        registers[value] = wanted
        return wanted, -1

    def constant_of(self, value: Value) -> int | None:
        """The integer of an s_const, or None."""
        op = value.op
        if op is not None and op.name == "s_const":
            return int(op.attributes["value"])
        return None

    def small_constant(self, value: Value) -> int | None:
        """The integer of an s_const if it fits a sign-extended 32-bit immediate."""
        number = self.constant_of(value)
        return number if number is not None and -_LIMIT <= number < _LIMIT else None

    def scalar(self, value: Value) -> VirtualRegister:
        """A scalar in a general register."""
        register = self.registers.get(value)
        if register is not None:
            return register
        op = value.op
        assert op is not None
        if op.name == "s_const":
            register = self.new("gpr")
            self.rules.load_immediate(self, register, int(op.attributes["value"]))
            return register
        self.rules.RULES[op.name](self, op)
        return self.registers.pop(value)

    def vector(self, value: Value) -> VirtualRegister:
        """A row in a register: where it is, or made now if it was deferred."""
        register = self.registers.get(value)
        if register is not None:
            return register
        op = value.op
        assert op is not None
        if op.name == "splat_const":
            return self.constant(self.rules.constant_key(self, value))
        self.rules.RULES[op.name](self, op)
        return self.registers.pop(value)

    def operand(self, value: Value) -> Operand:
        """A row as the operand of an instruction that takes memory there: its register, or where it lies."""
        register = self.registers.get(value)
        if register is not None:
            return register
        op = value.op
        assert op is not None
        if op.name == "splat_const":
            return self.constant_operand(self.rules.constant_key(self, value))
        if value not in self.deferred:
            raise AssertionError(f"{value!r} is used before it is selected")
        memory = self.address(op, 0)
        memory.broadcast = op.name == "load_splat"
        return memory

    def is_memory(self, value: Value) -> bool:
        """Will `operand` give memory?"""
        if value in self.registers:
            return False
        op = value.op
        if op is not None and op.name == "splat_const":
            key = self.rules.constant_key(self, value)
            return key not in self.hoisted and not self.rules.is_cheap(key)
        return True

    def constant(self, key: Any) -> VirtualRegister:
        """A constant of the target's own making in a register."""
        register = self.hoisted.get(key)
        if register is None:
            register = self.new(self.rules.constant_kind(key))
            self.rules.make_constant(self, key, register)
        return register

    def constant_operand(self, key: Any) -> Operand:
        """A constant where memory may stand: its register if it has one, or if it costs no load; else memory."""
        register = self.hoisted.get(key)
        if register is not None:
            return register
        if self.rules.is_cheap(key):
            return self.constant(key)
        memory: Memory = self.rules.constant_memory(self, key)
        return memory

    def address(self, op: Op, at: int) -> Memory:
        """The memory operand whose base is operand `at` of the op, with constants and deferred sums folded in."""
        base, index, scale, disp = self.address_parts(op, at)
        base_register = self.scalar(base)
        if not -_LIMIT <= disp < _LIMIT:
            far = self.new("gpr")
            self.rules.load_immediate(self, far, disp)
            self.rules.add_register(self, far, base_register)
            base_register, disp = far, 0
        return Memory(base_register, None if index is None else self.scalar(index), scale, disp)

    def address_parts(self, op: Op, at: int) -> tuple[Value, Value | None, int, int]:
        """Base, index, scale and displacement of the address whose base is operand `at`, constants and deferred sums
        folded in."""
        attributes = op.attributes
        disp: int = attributes.get("disp", 0)
        scale: int = attributes.get("scale", 1)
        base = op.operands[at]
        index = op.operands[at + 1] if attributes.get("indexed") else None
        deferred = self.deferred
        while base in deferred:
            a, b = deferred[base].operands
            if deferred[base].name == "s_sub":
                disp -= self.constant_of(b)  # type: ignore[operator]
            elif (number := self.constant_of(b)) is not None:
                disp += number
            elif (number := self.constant_of(a)) is not None:
                disp += number
                a = b
            else:
                index, scale = b, 1
            base = a
        while index is not None:
            if (number := self.constant_of(index)) is not None:
                disp += number * scale
                index = None
            elif index in deferred:
                a, b = deferred[index].operands
                if deferred[index].name == "s_sub":
                    disp -= self.constant_of(b) * scale  # type: ignore[operator]
                elif (number := self.constant_of(b)) is not None:
                    disp += number * scale
                else:
                    disp += self.constant_of(a) * scale  # type: ignore[operator]
                    a = b
                index = a
            else:
                break
        return base, index, scale, disp

    # --- Scan -------------------------------------------------------------------------------------------------------

    def scan(self) -> None:
        """Number the ops, find uses, and decide what is deferred."""
        folds = self.rules.folds(self)
        own_constants = self.rules.OWN_CONSTANTS
        full_width = self.rules.FOLDED_DTYPES
        alias, uses, uses_at, block_of = self.alias, self.uses, self.uses_at, self.block_of
        start, end, bounds = self.start, self.end, self.bounds
        depth_of: dict[Value, int] = {}
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
                operands = op.operands
                foldable = folds.get(name)
                for place, value in enumerate(operands):
                    value = alias.get(value, value)
                    source: Any = value.owner
                    if source.__class__ is Op and source.name in _CONSTANTS:
                        if loop_stack and source.name == "splat_const":
                            key = self.rules.constant_key(self, value)
                            counts = self.loop_constants[loop_stack[-1]]
                            counts[key] = counts.get(key, 0) + 1
                        continue
                    uses[value] = uses.get(value, 0) + 1
                    defined = depth_of[value]
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
                            walk(nested, op)
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
                        walk(op.blocks[0], op)
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
                            source = value.owner
                            if source.__class__ is Op and source.name in _CONSTANTS:
                                continue
                            seen.add(value)
                            if depth_of[value] < depth:
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
                        if root.op is None or root.op.name not in _CONSTANTS:
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
        self.positions = position
        for op, argument, place in late:
            self.deferred[op.results[0]] = op
            uses_at[argument].append(place)
        for op in reversed(candidates):
            value = op.results[0]
            count = uses.get(value, 0)
            if value in self.deferred or not count:
                continue
            name = op.name
            if name == "load" or name == "load_splat":
                if folded_uses.get(value, 0) != count or count > (1 if name == "load" else
                                                                  self.facts.most_folded_splats):
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

    # --- Walk -------------------------------------------------------------------------------------------------------

    def run(self) -> MachineFunction:
        self.scan()
        self.rules.begin(self)
        self.block(self.function.body)
        self.rules.finish(self)
        attributes = self.function.attributes
        return MachineFunction(self.function.name, self.body, self.constants,
                               parameters=(*FIRST_WORDS, *attributes.get("slots", [])),
                               warps=attributes.get("warps", 1), near_bytes=attributes.get("near_bytes", 0),
                               cluster=attributes.get("cluster", 1),
                               near_buffers=tuple(tuple(b) for b in attributes.get("near_buffers", ())),
                               ordered=frozenset(self.ordered),
                               tensor_maps=tuple(attributes.get("tensor_maps", ())))

    def block(self, block: Block) -> None:
        """Select the ops of a block; its yield is the owner's affair."""
        rules = self.rules.RULES
        deferred, uses, alias = self.deferred, self.uses, self.alias
        self.scope.append(block)
        for op in block.ops:
            name = op.name
            if op.results:
                value = op.results[0]
                if value in deferred or name in _CONSTANTS:
                    continue
                if value not in uses and name in _PURE and value not in alias \
                        and not any(map(uses.get, op.results)):
                    continue
            elif name == "yield":
                self.position = self.start[op]
                continue
            self.position = self.start[op]
            if op.location is not None:
                self.location = op.location
            if name == "loop":
                self.loop(op)
            elif name == "if":
                self.conditional(op)
            elif name == "tasks":
                self.tasks(op)
            else:
                rule = rules.get(name)
                if rule is None:
                    raise selection_error(op, f"an op that {self.rules.FAMILY} has no rule for",
                                          "an op of legal_ops(target)",
                                          "expand it first (sapper/lane/math.py: expand_math)")
                rule(self, op)
        self.scope.pop()

    def parallel_moves(self, moves: list[tuple[VirtualRegister, VirtualRegister, Type]]) -> None:
        """All sources are read before any destination is written."""
        pending = [m for m in moves if m[0] is not m[1]]
        while pending:
            for place, (destination, source, type_) in enumerate(pending):
                if all(other[1] is not destination for other in pending if other[0] is not destination):
                    self.rules.move(self, destination, source, type_)
                    del pending[place]
                    break
            else:
                destination, _, type_ = pending[0]
                spare = self.new(destination.kind)
                self.rules.move(self, spare, destination, type_)
                pending = [(d, spare if s is destination else s, t) for d, s, t in pending]

    def assign(self, values: list[Value], registers: list[VirtualRegister]) -> None:
        """Put values into registers, all at once; constants and deferred increments come after the moves."""
        moves = []
        later = []
        for value, register in zip(values, registers, strict=True):
            source = self.registers.get(value)
            if source is not None:
                moves.append((register, source, value.type))
            else:
                later.append((value, register))
        self.parallel_moves(moves)
        for value, register in later:
            op = value.op
            assert op is not None
            if op.name == "s_const":
                self.rules.load_immediate(self, register, int(op.attributes["value"]))
            elif op.name == "splat_const":
                key = self.rules.constant_key(self, value)
                hoisted = self.hoisted.get(key)
                if hoisted is not None and not self.rules.is_cheap(key):
                    self.rules.move(self, register, hoisted, value.type)
                else:
                    self.rules.make_constant(self, key, register)
            elif value in self.deferred and self.target.get(value) is register:
                self.rules.RULES[op.name](self, op)
            else:
                made = self.scalar(value) if isinstance(value.type, ScalarType) else self.vector(value)
                self.rules.move(self, register, made, value.type)

    def aim(self, value: Value, register: VirtualRegister, block: Block, free_from: int) -> None:
        """Have `value`, yielded by the block, made in `register`, if it is made in this block after position
        `free_from`, when the register's old value is dead; and those that it is made from in place, likewise."""
        value = self.alias.get(value, value)
        op = value.op
        if op is None or self.block_of.get(value) is not block or value in self.target:
            return
        if value in self.deferred:
            if op.name in ("s_add", "s_sub"):
                self.target[value] = register
            return
        tied = self.rules.TIED
        while op.name not in _CONSTANTS and self.start[op] >= free_from:
            self.target[value] = register
            self.reserved[register] = self.start[op]
            for place in tied.get(op.name, ()):
                if place < 0:       # the last operands, in the order of the results
                    place = len(op.operands) - len(op.results) + op.results.index(value)
                operand = self.alias.get(op.operands[place], op.operands[place])
                source = operand.op
                if source is not None and self.block_of.get(operand) is block and self.used_once(operand) \
                        and operand not in self.target and operand not in self.deferred and not source.blocks \
                        and source.name not in _CONSTANTS and self.start[source] >= free_from:
                    value, op = operand, source
                    break
                if operand in self.registers and self.registers[operand] is register:
                    return
            else:
                return

    def nonempty(self, start: Value, stop: Value, depth: int = 6) -> bool:
        """Is start < stop provable?"""
        a, b = self.constant_of(start), self.constant_of(stop)
        if a is not None and b is not None:
            return a < b
        if not depth:
            return False
        op = stop.op
        loop = self.bounds.get(start)
        if loop is not None and loop.operands[1] is stop:
            return True  # a counter is below its bound in the whole body
        if op is None:
            return False
        if op.name == "s_add":
            for x, y in (op.operands, reversed(op.operands)):
                number = self.constant_of(y)
                if number is not None and ((x is start and number > 0) or (number >= 0 and
                                           self.nonempty(start, x, depth - 1))):
                    return True
            return False
        if op.name == "s_min":
            return all(self.nonempty(start, x, depth - 1) for x in op.operands)
        if op.name == "s_max":
            return any(self.nonempty(start, x, depth - 1) for x in op.operands)
        return False

    def pressure(self, op: Op) -> int:
        """How many rows are alive at once in a loop, at most; constants and deferred values not counted."""
        live = self.live_rows
        if live is None:
            changes = [0] * (self.positions + 2)
            for value, places in self.uses_at.items():
                if not isinstance(value.type, RowType) or value in self.deferred:
                    continue
                owner = value.owner
                if isinstance(owner, Op):
                    made = self.start[owner]
                    if owner.blocks:
                        made = self.end[owner]
                else:
                    made = self.start[owner.ops[0]] if owner is not None and owner.ops else 0
                changes[made] += 1
                changes[max(places[-1], made)] -= 1
            live = []
            count = 0
            for change in changes:
                count += change
                live.append(count)
            self.live_rows = live
        return max(live[self.start[op]:self.end[op] + 1])

    def hoist(self, op: Op) -> dict[Any, VirtualRegister]:
        """Before a loop: constants that it uses into registers, the most used first, as many as there is room for.
        Returns the former `hoisted`, to be put back after the loop."""
        former = self.hoisted
        counts = self.loop_constants[op]
        wanted = [key for key in counts if key not in former]
        if wanted:
            room = self.rules.constant_room(self, self.pressure(op), list(former))
            self.hoisted = dict(former)
            wanted.sort(key=lambda key: -counts[key])
            for key in wanted:
                kind = self.rules.constant_kind(key)
                if room.get(kind, 0) > 0:
                    room[kind] -= 1
                    register = self.new(kind)
                    self.rules.make_constant(self, key, register)
                    self.hoisted[key] = register
        return former

    def carried(self, initial: list[Value], results: list[Value]) -> list[VirtualRegister]:
        """Registers, one for each result, that what starts as `initial` may be changed in until it is the result."""
        registers: list[VirtualRegister] = []
        taken: set[VirtualRegister] = set()
        for value, result in zip(initial, results, strict=True):
            register = self.target.get(result)
            if register is None or register in taken:
                register = self.registers.get(value)
                if register is None or register in taken or not self.dead(value) \
                        or not self.may_take(register, result):
                    register = self.new(self.kind(result.type))
            taken.add(register)
            registers.append(register)
        return registers

    def loop(self, op: Op) -> None:
        """Bottom-tested, with a guard before it unless it provably runs."""
        block = op.blocks[0]
        counter, *arguments = block.arguments
        terminator = block.ops[-1] if block.ops and block.ops[-1].name == "yield" else None
        yields = terminator.operands if terminator is not None else []
        start, stop = op.operands[:2]
        initial = op.operands[2:]
        step: int = op.attributes["step"]
        begin, bound = self.constant_of(start), self.small_constant(stop)
        former_reserved = self.reserved
        self.reserved = dict(former_reserved)
        registers = self.carried(initial, op.results)
        taken = set(registers)
        self.assign(initial, registers)
        for argument, result, register in zip(arguments, op.results, registers, strict=True):
            self.registers[argument] = register
            self.registers[result] = register
            self.reserved.pop(register, None)
        if begin is not None and bound is not None and begin >= bound:
            self.reserved = former_reserved
            self.position = self.end[op]
            return
        for argument, value, register in zip(arguments, yields, registers, strict=True):
            # An argument that nobody reads is free at once.
            places = self.uses_at.get(argument)
            self.aim(value, register, block, places[-1] if places else self.start[op])
        once = begin is not None and bound is not None and begin + step >= bound
        label = self.new_label(op.attributes.get("label") or "loop")
        after = label + "_end"
        guarded = not self.nonempty(start, stop)
        counted = self.uses.get(counter, 0) > 0
        limit: Operand
        if once and not counted:
            number, limit = self.new("gpr"), Immediate(0)
        elif counted:
            number = self.copied(start, stop, taken)
            limit = Immediate(bound) if bound is not None else self.scalar(stop)
        else:
            # Nobody reads the counter: how much is left is counted down to 0, and the bound needs no register.
            limit = Immediate(0)
            if begin is not None and bound is not None:
                number = self.new("gpr")
                self.rules.load_immediate(self, number, bound - begin)
            else:
                number = self.copied(stop, start, taken, self.end[op])
                if begin != 0:
                    self.rules.subtract_register(self, number, self.scalar(start))
        self.registers[counter] = number
        if guarded:
            if counted:
                self.rules.compare_branch(self, "ge", number, limit, after)
            else:
                self.rules.compare_branch(self, "le", number, limit, after)
        former = self.hoist(op)
        if not once:
            self.label(label, 1 if op in self.inner_loops else self.facts.loop_align_bytes)
        self.block(block)
        if terminator is not None:
            self.position = self.start[terminator]
            self.assign(yields, registers)
        if not once and counted:
            self.rules.add_immediate(self, number, step)
            self.rules.compare_branch(self, "lt", number, limit, label)
        elif not once:
            self.rules.subtract_branch(self, number, step, label)
        if guarded:
            self.label(after)
        self.hoisted = former
        self.reserved = former_reserved
        self.position = self.end[op]

    def copied(self, value: Value, other: Value, taken: set[VirtualRegister],
               until: int | None = None) -> VirtualRegister:
        """A scalar in a register that may be overwritten: its own if it dies here (before `until`), unless that is
        wanted for something else."""
        register = self.registers.get(value)
        last = self.last_use(value)
        if register is None or register in taken or register in self.reserved \
                or last > (self.position if until is None else until) \
                or self.alias.get(value, value) is self.alias.get(other, other) \
                or (until is not None and self.uses.get(value, 0) > 1):
            number = self.constant_of(value)
            register = self.new("gpr")
            if number is not None:
                self.rules.load_immediate(self, register, number)
            else:
                self.rules.move(self, register, self.scalar(value), value.type)
        return register

    def tasks(self, op: Op) -> None:
        """From this worker's first number on, until one reaches the total."""
        block, counter = op.blocks[0], op.attributes["counter"]
        total = self.small_constant(op.operands[0])
        limit: Operand = Immediate(total) if total is not None else self.scalar(op.operands[0])
        label = self.new_label("task")
        former = self.hoist(op)
        former_reserved = self.reserved
        number = self.new("gpr")
        self.registers[block.arguments[0]] = number
        self.rules.before_tasks(self, number)
        self.label(label)
        self.rules.next_task(self, number)
        self.rules.compare_branch(self, "ge", number, limit, label + "_end")
        self.block(block)
        self.rules.after_task(self, counter, number)
        self.rules.jump(self, label)
        self.label(label + "_end")
        self.hoisted = former
        self.reserved = former_reserved
        self.position = self.end[op]

    def result_register(self, op: Op, place: int, taken: set[VirtualRegister]) -> tuple[VirtualRegister, Value | None]:
        """Where result `place` of an `if` goes; with the value that is there before it, if it keeps a value's."""
        result = op.results[place]
        yielded = [block.ops[-1].operands[place] for block in op.blocks]
        wanted = self.target.get(result)
        for value in yielded:
            value = self.alias.get(value, value)
            register = self.registers.get(value)
            if register is None or register in taken or self.last_use(value) > self.end[op]:
                continue
            if register is wanted or (wanted is None and self.may_take(register, result)):
                return register, value
        if wanted is not None and wanted not in taken:
            return wanted, None
        return self.new(self.kind(result.type)), None

    def conditional(self, op: Op) -> None:
        """Jump over the block that is not taken."""
        first, second = op.blocks
        former = self.reserved
        self.reserved = dict(former)
        taken: set[VirtualRegister] = set()
        registers: list[VirtualRegister] = []
        held: list[Value | None] = []
        for place in range(len(op.results)):
            register, value = self.result_register(op, place, taken)
            taken.add(register)
            registers.append(register)
            held.append(value)
        label = self.new_label("if")
        has_second = len(second.ops) > (1 if second.terminator else 0) or any(
            self.registers.get(v) is not r
            for v, r in zip(second.terminator.operands if second.terminator else [], registers, strict=True))
        self.rules.branch_unless(self, op.operands[0], label + "_else" if has_second else label + "_end")
        for block in (first, second):
            if block is second:
                if not has_second:
                    break
                self.label(label + "_else")
            self.reserved = dict(former)
            yields = block.terminator.operands if block.terminator else []
            low = self.start[block.ops[0]] if block.ops else 0
            high = self.start[block.ops[-1]] if block.ops else 0
            for value, register, old in zip(yields, registers, held, strict=True):
                free_from = 0
                if old is not None:
                    free_from = max((p for p in self.uses_at.get(old, ()) if low <= p <= high), default=0)
                    if any(v is old for v, r in zip(yields, registers, strict=True) if r is not register):
                        continue
                self.reserved.pop(register, None)
                self.aim(value, register, block, free_from)
            self.block(block)
            if block.terminator:
                self.position = self.start[block.terminator]
                self.assign(yields, registers)
            if block is first and has_second:
                self.rules.jump(self, label + "_end")
        self.label(label + "_end")
        for result, register in zip(op.results, registers, strict=True):
            self.registers[result] = register
        self.reserved = former
        self.position = self.end[op]


def select(function: Function, rules: Any, target: Any) -> MachineFunction:
    """Lane function -> machine function over virtual registers.

    rules: the target family's module of rules. target: its facts. Raises SelectionError for an op that the target
    can't do, or rows wider than its registers.
    """
    return Selector(function, rules, target).run()
