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

select_scan.py looks at the function first, select_values.py knows where values are; this is the walk over the ops.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import RowType, ScalarType, Type
from ..lane.ops import FIRST_WORDS, LANE_OPS
from ..targets import FAMILIES
from .machine import Immediate, MachineFunction, Operand, VirtualRegister
from .select_scan import CONSTANTS, ScannedValues

_PURE = frozenset(name for name, spec in LANE_OPS.rows.items() if spec.pure) | {
    "load", "load_splat", "s_load", "gather", "tile_zero", "tile_load", "tile_multiply"}


class SelectionError(Exception):
    """A lane op that the target can't do; the message says where, what was found, what was expected, and the mend."""


class Selector(ScannedValues):
    """One selection. The rules of the target are called with it and the op, and use its methods."""

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
                if value in deferred or name in CONSTANTS:
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
                    where = f"{op.location}: " if op.location else ""
                    raise SelectionError(
                        f"{where}lane op {name}: found no rule of the family {self.rules.FAMILY}; expected one for "
                        "each op but those that legal_ops leaves out; mend: a rule in "
                        f"{FAMILIES[self.rules.FAMILY].replace('.', '/')}/select.py")
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
        while op.name not in CONSTANTS and self.start[op] >= free_from:
            self.target[value] = register
            self.reserved[register] = self.start[op]
            for place in tied.get(op.name, ()):
                if place < 0:       # the last operands, in the order of the results
                    place = len(op.operands) - len(op.results) + op.results.index(value)
                operand = self.alias.get(op.operands[place], op.operands[place])
                source = operand.op
                if source is not None and self.block_of.get(operand) is block and self.used_once(operand) \
                        and operand not in self.target and operand not in self.deferred and not source.blocks \
                        and source.name not in CONSTANTS and self.start[source] >= free_from:
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
                made = self._made(value)
                changes[made] += 1
                changes[max(places[-1], made)] -= 1
            live = self.live_rows = list(accumulate(changes))
        return max(live[self.start[op]:self.end[op] + 1])

    def passing(self, op: Op) -> int:
        """How many of these rows a loop does not touch: they were made before it and are used after it alone."""
        start, end = self.start[op], self.end[op]
        return sum(self._made(value) < start and places[-1] > end and not any(start <= place <= end for place in places)
                   for value, places in self.uses_at.items()
                   if isinstance(value.type, RowType) and value not in self.deferred)

    def _made(self, value: Value) -> int:
        """From where on a row is in a register."""
        owner = value.owner
        if isinstance(owner, Op):
            return self.end[owner] if owner.blocks else self.start[owner]
        return self.start[owner.ops[0]] if owner is not None and owner.ops else 0

    def hoist(self, op: Op) -> dict[Any, VirtualRegister]:
        """Before a loop: constants that it uses into registers, the most used first, as many as there is room for.
        Returns the former `hoisted`, to be put back after the loop."""
        former = self.hoisted
        counts = self.loop_constants[op]
        wanted = [key for key in counts if key not in former]
        if wanted:
            room = self.rules.constant_room(self, op, self.pressure(op), list(former))
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
