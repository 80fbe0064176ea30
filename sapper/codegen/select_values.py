"""Instruction selection: where values are, and instructions of them.

Enters: a lane function, a target's rules, and what the scan found (select_scan.py). Leaves: instructions, and for each
value that is made its register, its memory operand or its constant. Holds: a value lives in one virtual register;
constants are made where they are wanted, unless they are held in a register (`hoisted`); deferred sums become parts of
addresses.
"""

from __future__ import annotations

from typing import Any

from ..ir.nodes import Block, Function, Location, Op, Value
from ..ir.types import MaskType, RowType, ScalarType, TileRegisterType, Type
from .machine import (
    AnyRegister,
    Immediate,
    Instruction,
    Label,
    LabelReference,
    Memory,
    Operand,
    Register,
    VirtualRegister,
)

_LIMIT = 2**31


class SelectedValues:
    """The state of one selection.

    registers: where each value is. body: what was emitted. ordered: see MachineFunction. position: that of the op being
    selected. lanes: of the function. facts: what the target's rules keep for themselves (made by `rules.facts_of`).
    scope: the blocks around the op being selected, outermost first.
    """

    def __init__(self, function: Function, rules: Any, target: Any) -> None:
        self.function = function
        self.rules = rules
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
        self.labels: set[str] = set()
        # What the scan finds. names: of all ops that there are.
        self.names: set[str] = set()
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
            self.rows[name], [Immediate(o) if type(o) is int else o for o in operands] if int in map(type, operands)
            else list(operands), None, False, self.location, self.comment))

    def emit_masked(self, name: str, mask: AnyRegister, zeroing: bool, *operands: Any) -> None:
        self.body.append(Instruction(
            self.rows[name], [Immediate(o) if type(o) is int else o for o in operands], mask, zeroing, self.location,
            self.comment))

    def branch(self, name: str, label: str, *operands: AnyRegister) -> None:
        """A jump. operands: registers that it asks, before the label."""
        self.body.append(Instruction(self.rows[name], [*operands, LabelReference(label)], None, False, self.location))

    def label(self, name: str, align: int = 1) -> None:
        self.body.append(Label(name, align))

    def new_label(self, stem: str) -> str:
        self.label_count += 1
        name = f".{stem}{self.label_count}"
        while name in self.labels:      # of the axes x2 and x22
            name += "_"
        self.labels.add(name)
        return name

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
            folded = self._without_constant(deferred[base])
            if folded is None:
                base, index = deferred[base].operands
                scale = 1
            else:
                base, number = folded
                disp += number
        while index is not None:
            if (constant := self.constant_of(index)) is not None:
                disp += constant * scale
                index = None
            elif index in deferred:
                folded = self._without_constant(deferred[index])
                assert folded is not None
                index, number = folded
                disp += number * scale
            else:
                break
        return base, index, scale, disp

    def _without_constant(self, op: Op) -> tuple[Value, int] | None:
        """A sum or difference as a value and a number to be added to it; None for a sum of two that are not known."""
        a, b = op.operands
        if (number := self.constant_of(b)) is not None:
            return a, number if op.name == "s_add" else -number
        return None if (number := self.constant_of(a)) is None else (b, number)
