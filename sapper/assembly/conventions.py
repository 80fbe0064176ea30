"""What assembly by hand owes its caller, and the calls that it makes: stack, saved registers, upper halves, MXCSR, and
tiles (tiles.py).

Enters: instructions one by one, and the state before each. Leaves: the state after it, or AssemblyError once the states
are final. Holds: a function that is not naked leaves its frame alone; a naked one returns as it was entered.
Source: System V ABI AMD64 supplement, 3.2; SDM volume 1, 10.2.3 (MXCSR).
"""

from __future__ import annotations

from typing import Any

from ..codegen.machine import Immediate, Instruction, Memory, Register
from ..codegen.row_facts import WRITE
from .build import Region
from .state import NOTHING, State, Token, at
from .tiles import TileChecks


class Conventions(TileChecks):
    """The part of the static checks that follows the stack and what must be restored."""

    # --- Stack, calls, returns --------------------------------------------------------------------------------------

    def moves_stack(self, item: Instruction, state: State) -> bool:
        """Follow the stack pointer. True for an instruction that only puts a register on the stack, or takes it off."""
        row = item.row
        moved = self.table.STACK.get(row.name)
        target = item.operands[0] if item.operands else None
        if moved is None and target == self.stack and self.facts[row].access[0] & WRITE:
            amount = item.operands[1] if len(item.operands) > 1 else None
            if isinstance(amount, Memory) and (amount.base, amount.index, row.mnemonic) == (self.stack, None, "lea"):
                call = self.assembly.returns.get(item)
                place = ("slot", state.depth)
                if self.final and call is not None and state.values.get(place) != frozenset({("made", None, call)}):
                    raise self.fail("stack", "a routine returns with an unbalanced stack", item,
                                    "something else than the return address", "the depth at its call")
                self.shift(item, state, -amount.disp)
                if amount.disp < 0:
                    state.values["slot", state.depth] = frozenset({("made", None, item)})
                return False
            if row.mnemonic == "and" and isinstance(amount, Immediate) and amount.value < 0:
                self.realign(item, state, -amount.value)
                return False
            if row.mnemonic not in ("sub", "add") or not isinstance(amount, Immediate):
                raise self.fail("stack", "the stack pointer is changed in a way that can't be followed", item,
                                row.mnemonic, "push, pop, sub rsp, n, add rsp, n, lea rsp, [rsp + n], and rsp, -n")
            moved = amount.value if row.mnemonic == "sub" else -amount.value
            self.shift(item, state, moved)
            return False
        if moved is not None:
            self.shift(item, state, moved)
            if moved < 0:
                return True
            mine: frozenset[Token] = frozenset({("made", None, item)})
            is_register = isinstance(target, Register)
            state.values[("slot", state.depth)] = state.values.get(target, NOTHING) if is_register else mine
            state.points[("slot", state.depth)] = state.where(target)
            return True
        if row.mnemonic in self.table.MOVES and len(item.operands) == 2:
            source = item.operands[1]
            if isinstance(target, Memory) and target.base == self.stack and target.index is None:
                place = ("slot", state.depth - target.disp)
                is_register = isinstance(source, Register) and row.operands[1].bits == 64
                state.values[place] = state.values.get(source, NOTHING) if is_register else \
                    frozenset({("made", None, item)})
                state.points[place] = state.where(source) if is_register else frozenset()
                return is_register
        for spec, operand in zip(row.operands, item.operands, strict=True):
            if isinstance(operand, Memory) and self.stack in (operand.base, operand.index) and spec.writes:
                over = self.bytes_of(spec, operand, state) if operand.index is None else None
                for place in [p for p in state.values if type(p) is tuple]:
                    if over is None or (place[1] - 8 < over.stop - 1 and over.start <= place[1]):
                        state.values[place] = frozenset({("made", None, item)})
                        state.points[place] = frozenset()
        return False

    def realign(self, item: Instruction, state: State, align: int) -> None:
        """The stack pointer goes down to a multiple: how far is not known, so that the function can't return, and what
        lay on the stack is not found any more."""
        self.shift(item, state, (-state.depth - 8) % align)
        state.stack = None
        for place in [p for p in state.values if type(p) is tuple]:
            del state.values[place]

    def shift(self, item: Instruction, state: State, moved: int) -> None:
        if not self.assembly.naked:
            raise self.fail("stack", "only a naked function moves the stack pointer", item, item.row.mnemonic,
                            "virtual registers, which spill by themselves", "Assembly(naked=True)")
        state.depth += moved
        if state.depth < 0:
            raise self.fail("stack", "the stack pointer rises above the return address", item,
                            f"{-state.depth} bytes above it", "as many bytes pushed as popped")

    def restored(self, item: Instruction, state: State) -> tuple[frozenset[Token], frozenset[Region]] | None:
        """What an instruction takes off the stack into its first operand, None if it takes nothing that is known."""
        if self.table.STACK.get(item.row.name, 0) < 0:
            place = ("slot", state.depth)
            if not item.operands:
                self.flags_from(item, state.values.get(place, NOTHING))
                return None
        else:
            source = item.operands[1] if len(item.operands) == 2 else None
            if (item.row.mnemonic not in self.table.MOVES or not isinstance(source, Memory)
                    or source.base != self.stack or source.index is not None):
                return None
            place = ("slot", state.depth - source.disp)
        values = state.values.get(place)
        return None if values is None else (values, state.points.get(place, frozenset()))

    def flags_from(self, item: Instruction, values: frozenset[Token]) -> None:
        """popfq sets more than the flags of a comparison: the direction flag must be what it was."""
        saved = all(token[0] == "made" and token[2] is not None and token[2].row.name in self.table.STACK
                    and token[2].row.flags_read for token in values)
        if self.final and not saved:
            raise self.fail("state", f"{item.row.mnemonic} may leave the direction flag changed", item,
                            "a word that is not known to be of the flags", "what pushfq saved")

    def leave(self, item: Instruction, state: State) -> None:
        if not self.assembly.naked or not self.final:
            self.leave_modes(item, state)
            return
        if state.depth:
            raise self.fail("stack", "the function returns with an unbalanced stack", item, f"{state.depth} bytes left",
                            "the depth of entry", f"pop, or add rsp, {state.depth}")
        for register in self.saved:
            if state.values.get(register) != frozenset({("entry", register)}):
                raise self.fail("callee-saved", f"{self.name(register)} is not restored before the return", item,
                                "a changed register", "what it held at entry", "push it first and pop it here")
        if state.wide is not None:
            raise self.fail("mixing", "the function returns with upper halves in use", item,
                            f"{state.wide.row.name} at {at(state.wide)}", "vzeroupper before the return",
                            "the caller's SSE code would be slow otherwise")
        self.leave_modes(item, state)

    def leave_modes(self, item: Instruction, state: State) -> None:
        self.leave_tiles(item, state, "returns")
        changed = [m for m in state.modes if m is not None]
        if changed and self.final:
            raise self.fail("state", "the function returns with MXCSR changed", item,
                            f"vldmxcsr at {at(changed[0])}", "the caller's mode", "store it first and load it here")

    def call(self, item: Instruction, state: State) -> None:
        if not self.assembly.naked:
            raise self.fail("stack", "a call out of a function whose frame is made for it", item, "call",
                            "a naked function", "Assembly(naked=True)")
        if self.final and (state.depth + 8) % self.table.STACK_ALIGN_BYTES:
            raise self.fail("stack", "a call with a misaligned stack", item, f"{state.depth} bytes pushed",
                            f"8 more than a multiple of {self.table.STACK_ALIGN_BYTES}", "sub rsp, 8 before it")
        if self.final and state.wide is not None:
            raise self.fail("mixing", "a call with upper halves in use", item, f"{state.wide.row.name} at "
                            f"{at(state.wide)}", "vzeroupper before the call")
        self.leave_tiles(item, state, "calls")
        kept = {*self.saved, self.stack}
        gone = frozenset({("gone", "a call destroys it", item)})
        if state.stack is not None:
            state.stack = frozenset(byte for byte in state.stack if byte <= state.depth)
        for register in list(state.values):
            below = type(register) is tuple and register[1] > state.depth
            if below or (isinstance(register, Register) and register not in kept):
                state.values[register] = gone
                state.points.pop(register, None)
        state.values[Register(*self.table.RESULT)] = frozenset({("made", None, item)})
        state.flags = {}

    # --- Upper halves, MXCSR ----------------------------------------------------------------------------------------

    def track_modes(self, item: Instruction, state: State, writes: list[Any]) -> None:
        name = item.row.name
        if name == "vzeroupper":
            state.wide = None
            gone = frozenset({("gone", "vzeroupper cleared its upper half", item)})
            for register, tokens in state.values.items():
                if type(register) is not tuple and register.kind == "vec" and any(
                        token[0] != "made" or _is_wide(token[2]) for token in tokens):
                    state.values[register] = gone
        elif _is_wide(item):
            state.wide = item
        if name == "vstmxcsr":
            state.saved[_address(item.operands[0])] = state.modes
        elif name == "vldmxcsr":
            state.modes = state.saved.get(_address(item.operands[0]), frozenset({item}))
        elif state.saved:
            stored = [(o, spec.memory_bits // 8) for spec, o in zip(item.row.operands, item.operands, strict=True)
                      if isinstance(o, Memory) and spec.writes]
            for address in list(state.saved):
                if address[0] in writes or any(self.may_meet(address, memory, size) for memory, size in stored):
                    del state.saved[address]

    def may_meet(self, address: tuple[Any, ...], memory: Memory, bytes_: int) -> bool:
        """Whether a store may lie over the four bytes of MXCSR that were kept at an address."""
        base, index, scale, disp, label = address
        if label is not None or memory.label is not None:
            return bool(label == memory.label)
        if (base, index, scale) == (memory.base, memory.index, memory.scale):
            return bool(memory.disp < disp + 4 and disp < memory.disp + bytes_)
        return bool((base == self.stack) == (memory.base == self.stack))

    def track_stack(self, item: Instruction, state: State) -> None:
        """Which bytes below the entry stack pointer hold something; any may, once a register has its address."""
        if state.stack is None:
            return
        row, operands = item.row, item.operands
        if self.table.STACK.get(row.name, 0) > 0:
            state.stack |= frozenset(range(state.depth - 7, state.depth + 1))
        for spec, operand in zip(row.operands, operands, strict=True):
            if isinstance(operand, Memory) and self.stack in (operand.base, operand.index):
                if spec.role == "a" and row.mnemonic != "lea":
                    continue
                if row.mnemonic == "lea" and operands[0] == self.stack:
                    continue
                if row.mnemonic == "lea" or (spec.writes and operand.index is not None):
                    state.stack = None
                    return
                if spec.writes:
                    state.stack |= frozenset(self.bytes_of(spec, operand, state))
        if row.mnemonic in self.table.MOVES and operands[1] == self.stack:
            state.stack = None

    @staticmethod
    def bytes_of(spec: Any, memory: Memory, state: State) -> range:
        """The bytes of an access on the stack, counted downwards from the entry stack pointer."""
        first = state.depth - memory.disp
        return range(first - spec.memory_bits // 8 + 1, first + 1)

    def check_stack(self, item: Instruction, spec: Any, memory: Memory, state: State) -> None:
        """An access through the stack pointer."""
        name = item.row.mnemonic
        if not self.assembly.naked:
            raise self.fail("stack", f"{name} reaches into the frame, which is made for the function", item,
                            f"byte {memory.disp} from the stack pointer on", "virtual registers, which spill by "
                            "themselves", "hold it in a register, or write the frame: Assembly(naked=True)")
        if spec.role == "a":
            return
        if memory.index is None and memory.disp < -self.table.RED_ZONE_BYTES:
            raise self.fail("stack", f"{name} reaches below the red zone, where a signal may write", item,
                            f"byte {memory.disp} from the stack pointer on",
                            f"at most {self.table.RED_ZONE_BYTES} bytes below it", "sub rsp, n first")
        if spec.reads and memory.index is None and state.stack is not None and item.mask is None:
            missing = [b for b in self.bytes_of(spec, memory, state) if b > 0 and b not in state.stack]
            if missing:
                why = "a call destroys what lies below the stack pointer" if missing[0] > state.depth else \
                    "nothing was put there on some path"
                raise self.fail("undefined", f"{name} reads bytes of the stack that hold nothing of use", item,
                                f"byte {memory.disp} from the stack pointer on: {why}", "a store on every path to it",
                                "store it first")


def _is_wide(item: Instruction) -> bool:
    """Whether an instruction writes more than 128 bits of a vector register."""
    return any(spec.kind == "vec" and spec.writes and spec.bits > 128 and not isinstance(operand, Memory)
               for spec, operand in zip(item.row.operands, item.operands, strict=True))


def _address(operand: Any) -> tuple[Any, ...]:
    return operand.base, operand.index, operand.scale, operand.disp, operand.label
