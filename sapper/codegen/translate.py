"""Code by hand, which is written once in scalar rows of x86-64, as machine code of another family.

Enters: a function whose rows are some of x86-64's on general registers, and a target whose family has `translate.py`.
Leaves: a function of that family's rows that does the same. Holds: what the code by hand is made of is this list of
operations on sixteen registers of 64 bits, and nothing else; what is outside it raises TranslationError.

    mov movzx movsx movsxd lea push pop xchg cmovCC setCC   cmp test and what computes, before jCC, cmovCC, setCC, sbb
    add sub and or xor not neg imul shl shr sar rol         jmp call ret, by label or register; syscall, by number
    mul div, cqo idiv; lock: xadd, sub, cmpxchg (32 bits)   rdtsc pause prefetcht1 ud2; some operations on one float

A register holds what it does on x86-64: 32 bits written clear those above. Of flags there are none: what sets them
leaves two numbers in registers, and a condition compares these. After a difference (cmp, sub) the numbers are its
sides: `s` then means less, which is the sign where nothing overflows. After any other result they are that and 0, with
which there is no carry: conditions of it are refused. Where `jo` follows they differ if a sum, difference or product of
64 bits overflowed.

The stack. A call leaves its return address in a register, which is pushed where the function or routine begins and
popped where it returns: so it is one word of the stack here as there. Each push takes 16 bytes, and what is taken from
the stack for a frame is made a multiple of that. Code must not reach from one frame into another; `lea rsp, [rbp - 8n]`
goes to where n words had been pushed after rsp was copied.

Functions, those of the C ABI and kernels among them, are called with arguments where the family wants them, which is
where rdi, rsi, rdx, rcx, r8, r9 are kept; their result goes from and to rax.
The dividend and the product of `div` and `mul` have 64 bits, and `idiv` comes behind `cqo`. A system call is known by
the number in eax, which stands before it in the same block (targets/linux.py); it destroys rcx and r11, as there.
`rdtsc` leaves the lower half of a clock in eax and edx as it was.

Memory. x86-64 shows loads and stores of a thread in order, but for a load before an older store, and locked
instructions are barriers. Functions that count on it (`ordered`) have barriers for that, where this family needs them.
Source: Intel SDM volume 2 (operation), volume 3, 9.2.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..targets import module_of
from ..targets.linux import CALLS
from .c_abi import CHECK_CPU, CPU_AREA, Arguments, check_cpu
from .listing import Listing
from .machine import Immediate, Instruction, Label, LabelReference, MachineFunction, Memory, Register

RAX, RCX, RDX, RSP, RSI, RDI, R8, R9, R10 = 0, 1, 2, 4, 6, 7, 8, 9, 10
PUSH_BYTES = 16
ASK_CPU = "sapper.ask_cpu"
WORD_BITS = 64
INVERSE = {a: b for pair in (("e", "ne"), ("b", "ae"), ("be", "a"), ("l", "ge"), ("le", "g"), ("s", "ns"), ("o", "no"))
           for a, b in (pair, pair[::-1])}
"""Conditions, each with the one that holds where it does not."""
_CARRY = {"b", "ae", "be", "a"}
_COMPARES = {"cmp", "sub"}
_COMPUTES = {"add": "add", "sub": "sub", "and": "and", "or": "or", "xor": "xor", "imul": "mul"}
_OVERFLOW = {"o", "no"}
_SETS_FLAGS = {"cmp", "test", "cmpxchg", "add", "sub", "and", "or", "xor", "shl", "shr", "neg"}
_OVERFLOWS = {"add", "sub", "imul"}
_LEAVES_FLAGS = {"mov", "movzx", "movsx", "movsxd", "cqo", "vcvtph2ps", "vmovsd", "lea", "push",
                 "pop", "not", "xchg", "pause", "prefetcht1", "rdtsc", "jmp",
                 "call", "ret", "ud2", "vcvtsi2sd", "vcvtsi2ss", "vcvtsd2ss", "vdivsd", "vmulss", "vmovd", "vmovq",
                 "vmovss"}
_STACK = Register("gpr", RSP)


class TranslationError(Exception):
    """Code by hand that has no meaning on other families."""


def translated(function: MachineFunction, target: Any, ordered: bool = False) -> MachineFunction:
    """The function as the target's family has it, which may be as it is (`code_by_hand`). ordered: other threads read
    what it writes meanwhile, or write what it reads. Raises TranslationError."""
    if target.code_by_hand:
        return function
    made = _Translation(function, target, ordered).made()
    return settled(made, target)


def settled(function: MachineFunction, target: Any) -> MachineFunction:
    """The function, each of whose rows has a word now."""
    from .compile import rules_of, settle_vectors

    settle_vectors(function, rules_of(target).register_file(target), target, target.lanes)
    return function


def cpu_check(target: Any, features: frozenset[str], often: bool) -> tuple[list[MachineFunction], dict[str, int]]:
    """The function `CHECK_CPU`, which says whether the processor has what code for the target needs: 1 or 0; one that
    it calls; and areas that it keeps the answer in.

    features: what is needed, where a family tells them one by one; else it is all that the target has. often: the
    answer is kept.
    """
    if target.code_by_hand:
        return [check_cpu(features)], {CPU_AREA: 64}
    of = module_of(target.family, "translate")
    s = Emitter(of.rows(target))
    of.check_cpu(s, target)
    ask = settled(MachineFunction(ASK_CPU if often else CHECK_CPU, s.body, {}), target)
    return ([translated(_kept_answer(), target), ask], {CPU_AREA: 64}) if often else ([ask], {})


def _kept_answer() -> MachineFunction:
    """The area holds 0 before, then 1 or 2 for what ASK_CPU says. Several threads may ask at once: all find the
    same."""
    emit = Listing()
    emit("mov.32", RAX, Memory(label=CPU_AREA))
    emit("test.32", RAX, RAX)
    emit("jne", "known")
    emit("lea.64", RAX, Memory(label=ASK_CPU))
    emit("call.indirect", RAX)
    emit("mov.32", RCX, Immediate(2))
    emit("test.32", RAX, RAX)
    emit("cmove.32", RAX, RCX)
    emit("mov.32", Memory(label=CPU_AREA), RAX)
    emit.label("known")
    emit("and.32", RAX, Immediate(1))
    emit("ret")
    return MachineFunction(CHECK_CPU, emit.body, {}, externals=frozenset({CPU_AREA, ASK_CPU}))


def gathering(name: str, target: Any) -> tuple[MachineFunction | None, Arguments | None]:
    """The function `name` of C, which puts its arguments in memory and calls another with their address, and where they
    are then; neither where code by hand takes them as they are passed."""
    if target.code_by_hand:
        return None, None
    of = module_of(target.family, "translate")
    arguments = Arguments(of.INTEGERS, of.FLOATS, of.FLOATS_GO_ON, f"{name}.gathered")
    s = Emitter(of.rows(target))
    words = of.INTEGERS + of.FLOATS + 1
    bytes_ = -(-8 * words // PUSH_BYTES) * PUSH_BYTES
    stack, block, function = of.REGISTERS[RSP], of.REGISTERS[RDI], of.BETWEEN[0]
    of.push(s, of.LINK)
    of.add_number(s, stack, stack, -bytes_)
    of.store_arguments(s, stack)
    of.add_number(s, function, stack, bytes_ + PUSH_BYTES)
    of.store(s, function, stack, 8 * (words - 1), 64)
    of.move(s, block, stack)
    _load_address(s, of, function, arguments.symbol)
    of.call_at(s, function)
    of.add_number(s, stack, stack, bytes_)
    of.pop(s, of.LINK)
    of.leave(s)
    made = MachineFunction(name, s.body, {}, externals=frozenset({arguments.symbol}))
    return settled(made, target), arguments


class Emitter:
    """What a family's translate.py writes with. body: what was written."""

    def __init__(self, rows: Mapping[str, Any]) -> None:
        self.rows = rows
        self.body: list[Instruction | Label] = []
        self.comment = ""
        self._labels = 0

    def emit(self, row: str, *operands: Any) -> None:
        """Operands: a general register by number, a label by name, anything else as it is."""
        made = [Register("gpr", o) if type(o) is int else LabelReference(o) if type(o) is str else o for o in operands]
        self.body.append(Instruction(self.rows[row], made, comment=self.comment))
        self.comment = ""

    immediate, physical = Immediate, Register

    @staticmethod
    def memory(base: int, disp: int = 0) -> Memory:
        return Memory(Register("gpr", base), disp=disp)

    def label(self, name: str, align: int = 1) -> None:
        self.body.append(Label(name, align))

    def new_label(self) -> str:
        self._labels += 1
        return f"at.{self._labels}"


class _Translation:
    """One function. of: the family's part; r: its registers by x86-64's numbers; first, second, third: registers for
    what is between; left, right: what conditions compare. compared: by the place of a branch, what it compares instead,
    where nothing else looks at that."""

    def __init__(self, function: MachineFunction, target: Any, ordered: bool) -> None:
        self.function, self.ordered = function, ordered
        self.of = module_of(target.family, "translate")
        self.s = Emitter(self.of.rows(target))
        self.features: frozenset[str] = target.features
        self.r: tuple[int, ...] = self.of.REGISTERS
        self.first, self.second, self.third = self.of.BETWEEN
        self.left, self.right = self.of.COMPARED
        self.compared: dict[int, tuple[int, int]] = {}
        body = function.body
        self.places = {item.name: place for place, item in enumerate(body) if isinstance(item, Label)}
        self.routines = {called for item in body if (called := _called(item))}
        self.main = self._reached([0])
        self.wanted = self._wanted_conditions()

    def made(self) -> MachineFunction:
        s, body = self.s, self.function.body
        if any(place in self.main and _leaves(item) for place, item in enumerate(body)):
            self.of.push(s, self.of.LINK)
        for place, item in enumerate(body):
            if isinstance(item, Label):
                s.label(item.name, item.align)
                continue
            s.comment = item.comment
            self._instruction(place, item)
        for name in sorted(self.routines):
            s.label(f"{name}.call")
            self.of.push(s, self.of.LINK)
            self.of.jump(s, name)
        made = MachineFunction(self.function.name, s.body, self.function.constants, externals=self.function.externals)
        return made

    # --- Flow -------------------------------------------------------------------------------------------------------

    def _follow(self, place: int) -> list[int]:
        """The places that may come after one, without those inside routines."""
        item = self.function.body[place]
        if isinstance(item, Label):
            return [place + 1]
        control = item.row.control
        target = next((self.places[o.name] for o in item.operands
                       if isinstance(o, LabelReference) and o.name in self.places), None)
        if control == "jump":
            return [] if target is None else [target]
        if control in ("return", "trap"):
            return []
        return [place + 1] if control != "branch" or target is None else [place + 1, target]

    def _reached(self, starts: Iterable[int]) -> set[int]:
        waiting, found = list(starts), set[int]()
        while waiting:
            place = waiting.pop()
            if place not in found and place < len(self.function.body):
                found.add(place)
                waiting += self._follow(place)
        return found

    def _wanted_conditions(self) -> list[frozenset[str]]:
        """For each place the conditions of what it leaves that are looked at later; a routine's, by who called it."""
        body = self.function.body
        after = list[frozenset[str]]([frozenset()] * (len(body) + 1))
        before = list[frozenset[str]]([frozenset()] * (len(body) + 1))
        inside = {name: self._reached([self.places[name]]) for name in self.routines}
        calls = [(place, called) for place, item in enumerate(body) if (called := _called(item))]
        changed = True
        while changed:
            changed = False
            for place in range(len(body) - 1, -1, -1):
                item = body[place]
                if isinstance(item, Instruction) and item.row.control == "return" and place not in self.main:
                    following = [call + 1 for call, name in calls if place in inside[name]]
                elif called := _called(item):
                    following = [self.places[called]]
                else:
                    following = self._follow(place)
                left = frozenset[str]().union(*(before[n] for n in following))
                wants = left
                if isinstance(item, Instruction):
                    wants = frozenset(_condition(item)) | (left if _keeps_flags(item) else frozenset())
                if (left, wants) != (after[place], before[place]):
                    after[place], before[place], changed = left, wants, True
        return after[:-1]

    # --- Operands ---------------------------------------------------------------------------------------------------

    def _number(self, register: Any) -> int:
        number: int = self.r[register.number]
        return number

    def _address(self, memory: Memory) -> tuple[int, int]:
        """(register, displacement) of memory. May take the first register between."""
        s, of = self.s, self.of
        if memory.label is not None:
            _load_address(self.s, self.of, self.first, memory.label)
            return self.first, memory.disp
        if memory.index is None:
            return (self._number(memory.base), memory.disp)
        of.shift(s, "shl", self.first, self._number(memory.index), memory.scale.bit_length() - 1)
        if memory.base is not None:
            base = self._number(memory.base)
            if memory.base == _STACK:
                of.move(s, self.second, base)
                base = self.second
            of.binary(s, "add", self.first, self.first, base)
        return self.first, memory.disp

    def _load(self, register: int, memory: Memory, bits: int, signed: bool = False) -> None:
        base, disp = self._address(memory)
        self.of.load(self.s, register, base, disp, bits, signed)
        if self.ordered and memory.base != _STACK:
            self.of.fence(self.s)

    def _store(self, register: int, memory: Memory, bits: int) -> None:
        """The register is not the first or second between, if the memory has an index."""
        base, disp = self._address(memory)
        if self.ordered and memory.base != _STACK:
            self.of.fence(self.s)
        self.of.store(self.s, register, base, disp, bits)

    def _value(self, operand: Any, bits: int, between: int) -> int:
        """A register with the operand's bits; above them there may be others, but not of memory."""
        if isinstance(operand, Register):
            if operand != _STACK:
                return self._number(operand)
            self.of.move(self.s, between, self._number(operand))
        elif isinstance(operand, Immediate):
            self.of.number(self.s, between, operand.value)
        else:
            self._load(between, operand, bits)
        return between

    def _extend(self, register: int, source: int, bits: int, signed: bool = False) -> None:
        """The lower bits of the source alone, or with their sign."""
        if bits == WORD_BITS:
            self.of.move(self.s, register, source)
            return
        self.of.shift(self.s, "shl", register, source, WORD_BITS - bits)
        self.of.shift(self.s, "sar" if signed else "shr", register, register, WORD_BITS - bits)

    def _side(self, register: int, operand: Any, bits: int) -> None:
        """An operand as a condition compares it: with its sign."""
        if isinstance(operand, Immediate):
            half = 1 << bits - 1
            self.of.number(self.s, register, (operand.value + half) % (2 * half) - half)
        elif isinstance(operand, Memory):
            self._load(register, operand, bits, True)
        else:
            self._extend(register, self._value(operand, bits, register), bits, True)

    def _sides(self, left: Any, right: Any, bits: int) -> None:
        self._side(self.left, left, bits)
        self._side(self.right, right, bits)

    def _result_flags(self, place: int, register: int, bits: int) -> None:
        if not self.wanted[place]:
            return
        if self.wanted[place] & _CARRY:
            raise self._error(place, "a carry")
        self._extend(self.left, register, bits, True)
        self.of.number(self.s, self.right, 0)

    def _error(self, place: int, found: str) -> TranslationError:
        item = self.function.body[place]
        assert isinstance(item, Instruction)
        text = f"{item.row.name} {', '.join(map(str, item.operands))}".strip()
        return TranslationError(f"function {self.function.name}, place {place}: found {found}, in {text}; expected "
                                "what sapper/codegen/translate.py lists; mend: say it by these operations")

    # --- Instructions -----------------------------------------------------------------------------------------------

    def _instruction(self, place: int, item: Instruction) -> None:
        name, bits = _mnemonic(item), _bits(item)
        wanted = self.wanted[place]
        if wanted and not _keeps_flags(item) and name not in (_OVERFLOWS if wanted & _OVERFLOW else _SETS_FLAGS):
            raise self._error(place, "flags")
        condition = _condition(item)
        rule: Callable[..., None] | None
        if condition:
            rule = {"j": self._branch, "cmov": self._conditional_move, "set": self._truth, "sbb": self._subtract_borrow,
                    }["sbb" if name == "sbb" else _split(name)[0]]
        elif name in _COMPUTES:
            rule = self._compute
        else:
            rule = getattr(self, f"_{name}", None)
        if rule is None:
            raise self._error(place, "a row without a rule")
        rule(place, item, bits)

    def _mov(self, place: int, item: Instruction, bits: int) -> None:
        target, source = item.operands
        if isinstance(target, Memory):
            self._store(self._value(source, bits, self.third), target, bits)
            return
        register = self._number(target)
        if bits == 8:
            self._insert_byte(register, self._value(source, bits, self.third))
        elif isinstance(source, Immediate):
            self.of.number(self.s, register, source.value % (1 << bits) if bits < WORD_BITS else source.value)
        elif isinstance(source, Memory):
            self._load(register, source, bits)
        else:
            self._extend(register, self._number(source), bits)

    def _insert_byte(self, register: int, source: int) -> None:
        self._extend(self.third, source, 8)
        self.of.shift(self.s, "shr", register, register, 8)
        self.of.shift(self.s, "shl", register, register, 8)
        self.of.binary(self.s, "or", register, register, self.third)

    def _movzx(self, place: int, item: Instruction, bits: int) -> None:
        target, source = item.operands
        if isinstance(source, Memory):
            self._load(self._number(target), source, bits)
        else:
            self._extend(self._number(target), self._number(source), bits)

    def _movsx(self, place: int, item: Instruction, bits: int) -> None:
        register = self._number(item.operands[0])
        self._side(register, item.operands[1], bits)
        self._extend(register, register, int(item.row.name.rpartition(".")[2]))

    def _movsxd(self, place: int, item: Instruction, bits: int) -> None:
        self._side(self._number(item.operands[0]), item.operands[1], 32)

    def _lea(self, place: int, item: Instruction, bits: int) -> None:
        target, memory = item.operands
        assert isinstance(memory, Memory)
        register = self._number(target)
        if memory.label is not None and not memory.disp and bits == WORD_BITS:
            _load_address(self.s, self.of, register, memory.label)
            return
        base, disp = self._address(memory)
        if target == _STACK:
            if disp % 8 or disp > 0 or memory.base == _STACK:
                raise self._error(place, "a stack pointer")
            disp = disp // 8 * PUSH_BYTES
        self.of.add_number(self.s, register, base, disp)
        if bits < WORD_BITS:
            self._extend(register, register, bits)

    def _push(self, place: int, item: Instruction, bits: int) -> None:
        self.of.push(self.s, self._number(item.operands[0]))

    def _pop(self, place: int, item: Instruction, bits: int) -> None:
        self.of.pop(self.s, self._number(item.operands[0]))

    def _compute(self, place: int, item: Instruction, bits: int) -> None:
        name = _mnemonic(item)
        target, *sources = item.operands
        left, right = (target, sources[0]) if len(sources) == 1 else sources
        if target == _STACK:
            self._move_stack(place, name, right)
            return
        if self.wanted[place] & _OVERFLOW:
            self._compute_checked(place, name, target, right, bits)
            return
        differs = name in _COMPARES
        if self.wanted[place] and differs:
            self._sides(left, right, bits)
        in_memory = isinstance(target, Memory)
        if in_memory:
            self._load(self.third, target, bits)    # type: ignore[arg-type]
        register = self.third if in_memory else self._number(target)
        if name == "xor" and left == right:
            self.of.number(self.s, register, 0)
        elif name in ("add", "sub") and isinstance(right, Immediate) and not in_memory:
            self.of.add_number(self.s, register, register, right.value if name == "add" else -right.value)
            if bits < WORD_BITS:
                self._extend(register, register, bits)
        else:
            a = register if in_memory else self._value(left, bits, self.second)
            b = self._value(right, bits, self.second if in_memory else self.third)
            self.of.binary(self.s, _COMPUTES[name], register, a, b)
            if bits < WORD_BITS and not in_memory:
                self._extend(register, register, bits)
        if not differs:
            self._result_flags(place, register, bits)
        if in_memory:
            self._store(register, target, bits)     # type: ignore[arg-type]

    def _compute_checked(self, place: int, name: str, target: Any, right: Any, bits: int) -> None:
        """And whether it overflows."""
        s, of = self.s, self.of
        if self.wanted[place] - _OVERFLOW or bits != WORD_BITS or not isinstance(target, Register):
            raise self._error(place, "an overflow")
        register, b = self._number(target), self._value(right, bits, self.third)
        if name == "imul":      # the upper half of the product is the lower one's sign
            of.binary(s, "high", self.left, register, b)
            of.binary(s, "mul", register, register, b)
            of.shift(s, "sar", self.right, register, WORD_BITS - 1)
            return
        of.move(s, self.left, register)
        if b == register:
            of.move(s, self.third, b)
            b = self.third
        of.binary(s, _COMPUTES[name], register, register, b)
        # A sum has another sign than both sides; what the difference and the smaller side add up to likewise.
        of.binary(s, "xor", self.right, self.left if name == "sub" else register, b)
        of.binary(s, "xor", self.left, self.left, register)
        of.binary(s, "and", self.left, self.left, self.right)
        of.shift(s, "sar", self.left, self.left, WORD_BITS - 1)
        of.number(s, self.right, 0)

    def _move_stack(self, place: int, name: str, number: Any) -> None:
        stack = self._number(_STACK)
        if not isinstance(number, Immediate) or self.wanted[place] or name not in ("add", "sub", "and"):
            raise self._error(place, "a stack pointer")
        if name == "and":
            self.of.move(self.s, self.first, stack)
            self.of.number(self.s, self.second, number.value)
            self.of.binary(self.s, "and", self.first, self.first, self.second)
            self.of.move(self.s, stack, self.first)
            return
        bytes_ = -(-number.value // PUSH_BYTES) * PUSH_BYTES
        self.of.add_number(self.s, stack, stack, bytes_ if name == "add" else -bytes_)

    def _not(self, place: int, item: Instruction, bits: int) -> None:
        register = self._number(item.operands[0])
        self.of.number(self.s, self.second, -1)
        self.of.binary(self.s, "xor", register, register, self.second)
        if bits < WORD_BITS:
            self._extend(register, register, bits)

    def _neg(self, place: int, item: Instruction, bits: int) -> None:
        register = self._number(item.operands[0])
        self.of.number(self.s, self.second, 0)
        self.of.binary(self.s, "sub", register, self.second, register)
        if bits < WORD_BITS:
            self._extend(register, register, bits)
        self._result_flags(place, register, bits)

    def _shl(self, place: int, item: Instruction, bits: int) -> None:
        register, amount = self._number(item.operands[0]), item.operands[1]
        if isinstance(amount, Immediate):
            self.of.shift(self.s, "shl", register, register, amount.value)
        elif bits == WORD_BITS:
            self.of.binary(self.s, "shl", register, register, self._number(amount))
        else:
            raise self._error(place, "such an amount")
        if bits < WORD_BITS:
            self._extend(register, register, bits)
        self._result_flags(place, register, bits)

    def _shr(self, place: int, item: Instruction, bits: int) -> None:
        register, amount = self._number(item.operands[0]), item.operands[1]
        if not isinstance(amount, Immediate):
            raise self._error(place, "such an amount")
        if bits < WORD_BITS:
            self._extend(register, register, bits)
        self.of.shift(self.s, "shr", register, register, amount.value)
        self._result_flags(place, register, bits)

    def _sar(self, place: int, item: Instruction, bits: int) -> None:
        register, amount = self._number(item.operands[0]), item.operands[1]
        if not isinstance(amount, Immediate) or bits != WORD_BITS or self.wanted[place]:
            raise self._error(place, "such an amount")
        self.of.shift(self.s, "sar", register, register, amount.value)

    def _rol(self, place: int, item: Instruction, bits: int) -> None:
        register, amount = self._number(item.operands[0]), item.operands[1]
        if not isinstance(amount, Immediate) or bits != WORD_BITS:
            raise self._error(place, "such an amount")
        self.of.shift(self.s, "shr", self.second, register, WORD_BITS - amount.value)
        self.of.shift(self.s, "shl", register, register, amount.value)
        self.of.binary(self.s, "or", register, register, self.second)

    def _mul(self, place: int, item: Instruction, bits: int) -> None:
        rax = self.r[RAX]
        self.of.binary(self.s, "mul", rax, rax, self._number(item.operands[0]))
        self.of.number(self.s, self.r[RDX], 0)

    def _div(self, place: int, item: Instruction, bits: int) -> None:
        rax, divisor = self.r[RAX], self._number(item.operands[0])
        self.of.binary(self.s, "div", self.second, rax, divisor)
        self.of.binary(self.s, "mul", self.third, self.second, divisor)
        self.of.binary(self.s, "sub", self.r[RDX], rax, self.third)
        self.of.move(self.s, rax, self.second)

    def _cqo(self, place: int, item: Instruction, bits: int) -> None:
        self.of.shift(self.s, "sar", self.r[RDX], self.r[RAX], WORD_BITS - 1)

    def _idiv(self, place: int, item: Instruction, bits: int) -> None:
        rax, divisor = self.r[RAX], self._number(item.operands[0])
        self.of.binary(self.s, "signed div", self.second, rax, divisor)
        self.of.binary(self.s, "mul", self.third, self.second, divisor)
        self.of.binary(self.s, "sub", self.r[RDX], rax, self.third)
        self.of.move(self.s, rax, self.second)

    # --- Conditions -------------------------------------------------------------------------------------------------

    def _only_next(self, place: int) -> bool:
        """Whether the instruction behind it is a branch, and nothing else looks at what it leaves."""
        body = self.function.body
        behind = body[place + 1] if place + 1 < len(body) else None
        return isinstance(behind, Instruction) and behind.row.control == "branch" and not self.wanted[place + 1]

    def _cmp(self, place: int, item: Instruction, bits: int) -> None:
        left, right = item.operands
        if bits == WORD_BITS and self._only_next(place):
            self.compared[place + 1] = self._value(left, bits, self.left), self._value(right, bits, self.right)
        else:
            self._sides(left, right, bits)

    def _test(self, place: int, item: Instruction, bits: int) -> None:
        if self.wanted[place] & _CARRY:
            raise self._error(place, "a carry")
        left, right = item.operands
        if left == right and bits == WORD_BITS and self._only_next(place):
            self.compared[place + 1] = self._value(left, bits, self.left), self.of.ZERO
            return
        if left == right:
            self._side(self.left, left, bits)
        else:
            a = self._value(left, bits, self.third)
            self.of.binary(self.s, "and", self.left, a, self._value(right, bits, self.second))
            self._extend(self.left, self.left, bits, True)
        self.of.number(self.s, self.right, 0)

    def _jump_if(self, condition: str, label: str, place: int = -1) -> None:
        left, right = self.compared.get(place, (self.left, self.right))
        meant = {"s": "l", "ns": "ge", "o": "ne", "no": "e"}.get(condition, condition)
        self.of.branch(self.s, meant, left, right, label)

    def _branch(self, place: int, item: Instruction, bits: int) -> None:
        target = item.operands[0]
        assert isinstance(target, LabelReference)
        self._jump_if(_condition(item)[0], target.name, place)

    def _conditional_move(self, place: int, item: Instruction, bits: int) -> None:
        register, behind = self._number(item.operands[0]), self.s.new_label()
        source = self._value(item.operands[1], bits, self.second)
        self._jump_if(INVERSE[_condition(item)[0]], behind)
        self.of.move(self.s, register, source)
        self.s.label(behind)
        if bits < WORD_BITS:
            self._extend(register, register, bits)

    def _truth(self, place: int, item: Instruction, bits: int) -> None:
        behind = self.s.new_label()
        self.of.number(self.s, self.third, 1)
        self._jump_if(_condition(item)[0], behind)
        self.of.number(self.s, self.third, 0)
        self.s.label(behind)
        self._insert_byte(self._number(item.operands[0]), self.third)

    def _subtract_borrow(self, place: int, item: Instruction, bits: int) -> None:
        register, behind = self._number(item.operands[0]), self.s.new_label()
        if bits != WORD_BITS or self.wanted[place]:
            raise self._error(place, "such a difference")
        right = self._value(item.operands[1], bits, self.second)
        self.of.binary(self.s, "sub", register, register, right)
        self._jump_if("ae", behind)
        self.of.add_number(self.s, register, register, -1)
        self.s.label(behind)

    # --- Ways -------------------------------------------------------------------------------------------------------

    def _jmp(self, place: int, item: Instruction, bits: int) -> None:
        target = item.operands[0]
        if isinstance(target, LabelReference):
            self.of.jump(self.s, target.name)
            return
        if place not in self.main:
            raise self._error(place, "a way out of a routine")
        self.of.pop(self.s, self.of.LINK)
        self.of.jump_to(self.s, self._number(target))

    def _call(self, place: int, item: Instruction, bits: int) -> None:
        target = item.operands[0]
        if isinstance(target, LabelReference):
            self.of.call(self.s, f"{target.name}.call")
            return
        self.of.call_at(self.s, self._number(target))
        self.of.move(self.s, self.r[RAX], self.of.RESULT)

    def _ret(self, place: int, item: Instruction, bits: int) -> None:
        if place in self.main:
            if place in self._reached(self.places[name] for name in self.routines):
                raise self._error(place, "a return of the function and of a routine")
            self.of.move(self.s, self.of.RESULT, self.r[RAX])
        self.of.pop(self.s, self.of.LINK)
        self.of.leave(self.s)

    def _ud2(self, place: int, item: Instruction, bits: int) -> None:
        self.of.trap(self.s)

    def _syscall(self, place: int, item: Instruction, bits: int) -> None:
        """rdi is where the result comes; it is kept, as are arguments that this system wants elsewhere."""
        s, of, kept = self.s, self.of, self.left
        number, order = self._system_call(place)
        given = [self.r[n] for n in (RDI, RSI, RDX, R10, R8, R9)]
        wanted = [self.r[n] for n in (RDI, RSI, RDX, RCX, R8, R9)]
        of.move(s, kept, given[0])
        moves = [(at, source) for at, source in enumerate(order) if source < 0 or given[source] != wanted[at]]
        between = dict(zip((source for _, source in moves if source >= 0), of.BETWEEN, strict=False))
        for source, register in between.items():
            of.move(s, register, given[source])
        for at, source in moves:
            if source < 0:
                of.number(s, wanted[at], source)
            else:
                of.move(s, wanted[at], between[source])
        of.system_call(s, number)
        of.move(s, self.r[RAX], wanted[0])
        of.move(s, given[0], kept)
        for at, _ in moves:
            if at and at in between and given[at] == wanted[at]:
                of.move(s, given[at], between[at])

    def _system_call(self, place: int) -> tuple[int, tuple[int, ...]]:
        for item in reversed(self.function.body[:place]):
            if isinstance(item, Label):
                break
            if item.operands and item.operands[0] == Register("gpr", RAX) and item.row.operands[0].writes:
                value = item.operands[1] if len(item.operands) > 1 else None
                if _mnemonic(item) == "xor" and value == item.operands[0]:
                    value = Immediate(0)
                if isinstance(value, Immediate) and value.value in CALLS:
                    return CALLS[value.value]
                break
        raise self._error(place, "a system call that is not known")

    # --- Other threads ----------------------------------------------------------------------------------------------

    def _atomic(self, memory: Any) -> int:
        """The register with the address; what came before is done."""
        base, disp = self._address(memory)
        self.of.add_number(self.s, self.first, base, disp)
        self.of.fence(self.s)
        address: int = self.first
        return address

    def _xadd(self, place: int, item: Instruction, bits: int) -> None:
        register = self._number(item.operands[1])
        self.of.add_to(self.s, register, register, self._atomic(item.operands[0]))
        self._after_atomic(register)

    def _after_atomic(self, register: int) -> None:
        self.of.fence(self.s)
        self._extend(register, register, 32)

    def _locked_sub(self, place: int, item: Instruction, bits: int) -> None:
        memory, number = item.operands
        assert isinstance(number, Immediate)
        address = self._atomic(memory)
        self.of.number(self.s, self.second, -number.value)
        self.of.add_to(self.s, self.second, self.second, address)
        self.of.fence(self.s)

    def _xchg(self, place: int, item: Instruction, bits: int) -> None:
        register = self._number(item.operands[1])
        self.of.swap(self.s, register, register, self._atomic(item.operands[0]))
        self._after_atomic(register)

    def _cmpxchg(self, place: int, item: Instruction, bits: int) -> None:
        address, rax = self._atomic(item.operands[0]), self.r[RAX]
        self._extend(self.left, rax, bits, True)
        self._extend(self.second, rax, bits, True)
        self.of.compare_swap(self.s, self.second, self._number(item.operands[1]), address)
        self._extend(self.right, self.second, bits, True)
        self._extend(rax, self.second, bits)
        self.of.fence(self.s)

    def _rdtsc(self, place: int, item: Instruction, bits: int) -> None:
        self.of.clock(self.s, self.r[RAX])
        self._extend(self.r[RAX], self.r[RAX], 32)

    def _pause(self, place: int, item: Instruction, bits: int) -> None:
        self.of.pause(self.s)

    def _prefetcht1(self, place: int, item: Instruction, bits: int) -> None:
        memory = item.operands[0]
        assert isinstance(memory, Memory)
        self.of.prefetch(self.s, self.features, *self._address(memory))

    # --- Floats -----------------------------------------------------------------------------------------------------

    def _vmovd(self, place: int, item: Instruction, bits: int) -> None:
        target, source = item.operands
        if item.row.name.endswith("to_vec"):
            self.of.to_single(self.s, _float(target), self._number(source))
        else:
            self.of.from_single(self.s, self._number(target), _float(source))
            self._extend(self._number(target), self._number(target), 32)

    def _vmovq(self, place: int, item: Instruction, bits: int) -> None:
        """What follows, which converts a number, writes all of what is looked at."""
        if not item.row.name.endswith("to_vec"):
            raise self._error(place, "such a move")

    def _vcvtph2ps(self, place: int, item: Instruction, bits: int) -> None:
        self.of.widen_half(self.s, *map(_float, item.operands))

    def _vcvtsi2sd(self, place: int, item: Instruction, bits: int) -> None:
        self._to_float(item, 64)

    def _vcvtsi2ss(self, place: int, item: Instruction, bits: int) -> None:
        self._to_float(item, 32)

    def _to_float(self, item: Instruction, bits: int) -> None:
        self._side(self.second, item.operands[2], int(item.row.name.rpartition(".")[2]))
        self.of.to_float(self.s, bits, _float(item.operands[0]), self.second)

    def _vdivsd(self, place: int, item: Instruction, bits: int) -> None:
        self.of.divide_double(self.s, *map(_float, item.operands))

    def _vcvtsd2ss(self, place: int, item: Instruction, bits: int) -> None:
        self.of.narrow(self.s, _float(item.operands[0]), _float(item.operands[2]))

    def _vmulss(self, place: int, item: Instruction, bits: int) -> None:
        memory = item.operands[2]
        assert isinstance(memory, Memory)
        self._load(self.second, memory, 32)
        self.of.multiply_single(self.s, _float(item.operands[0]), _float(item.operands[1]), self.second)

    def _vmovss(self, place: int, item: Instruction, bits: int) -> None:
        memory, register = item.operands
        if not isinstance(memory, Memory):
            raise self._error(place, "such a move")
        self.of.from_single(self.s, self.second, _float(register))
        self._store(self.second, memory, 32)


def _load_address(s: Emitter, of: Any, register: int, label: str) -> None:
    """Where something of the file is: by its distance, which stands behind a call that jumps over it."""
    behind = s.new_label()
    of.call(s, behind)
    of.distance(s, label)
    s.label(behind)
    of.load(s, register, of.LINK, 0, 32, True)
    of.binary(s, "add", register, register, of.LINK)


def _float(operand: Any) -> int:
    number: int = operand.number
    return number


def _called(item: Instruction | Label) -> str:
    """The routine that it calls, or ""."""
    if isinstance(item, Instruction) and _mnemonic(item) == "call" and isinstance(item.operands[0], LabelReference):
        return item.operands[0].name
    return ""


def _leaves(item: Instruction | Label) -> bool:
    """Whether the function ends there: it returns, or jumps to another one."""
    return isinstance(item, Instruction) and (item.row.control == "return" or (
        _mnemonic(item) == "jmp" and not isinstance(item.operands[0], LabelReference)))


def _mnemonic(item: Instruction) -> str:
    """Without `lock` before it."""
    name: str = item.row.name.removeprefix("lock.").partition(".")[0]
    return f"locked_{name}" if item.row.name == "lock.sub.32" else name


def _bits(item: Instruction) -> int:
    """What the row's name says of bits."""
    found = [part for part in item.row.name.split(".") if part.isdigit()]
    return int(found[0]) if found else WORD_BITS


def _split(name: str) -> tuple[str, str]:
    for stem in ("cmov", "set", "j"):
        rest = name.removeprefix(stem)
        if rest != name and rest in INVERSE:
            return stem, rest
    return name, ""


def _condition(item: Instruction) -> tuple[str, ...]:
    """The condition that it looks at, or none."""
    name = _mnemonic(item)
    condition = "b" if name == "sbb" else _split(name)[1]
    return (condition,) if condition else ()


def _keeps_flags(item: Instruction) -> bool:
    name = _mnemonic(item)
    return name in _LEAVES_FLAGS or bool(_split(name)[1])
