"""Which accesses of shared memory have bank conflicts: proved of the text, nothing runs.

Enters: a function of PTX text, any compiler's. Leaves: a `SharedAccess` for each instruction that reaches shared memory
by the lanes' own addresses, with its proof (banks.py) or the reason why there is none. Holds: a proof is of every
run: of all blocks, warps, passes of loops and arguments. Lanes that a predicate switches off make no access dearer.

Each register is followed as a `Spread`: what its lanes have of their own, known to the bit, and which bits one unknown
number, the same for all lanes of a warp, may change besides. Registers that are written in several places, as what a
loop carries, are what all of these agree on.

A branch on a predicate that differs between lanes parts a warp. What one lane has seen then says nothing of another, so
registers written in several places, and what memory gives, are not followed where there is such a branch; `bra.uni` is
taken at its word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..lane.banks import LANES, WORD_BYTES, Proof, prove
from ..targets.ptx.rows import BITS, Form
from . import parse
from .inline import inline_calls
from .unit_memory import space_of

BITS_KEPT = 64
MASK = (1 << BITS_KEPT) - 1
MOST_THREADS = 1024
"""Of a block."""
_MOST_PASSES = 32
"""Until nothing changes; every loop around another takes one or two more."""


class Spread(NamedTuple):
    """table: of each lane. free: bits that one number, the same for all lanes, is added to by exclusive or. carry: from
    this bit on a lane has f(table), where f is one function for all lanes whose n low bits depend on the n low bits of
    its argument alone, one to one; 64: none."""

    table: tuple[int, ...]
    free: int = 0
    carry: int = BITS_KEPT

    @property
    def uniform(self) -> bool:
        return self.table.count(self.table[0]) == LANES

    @property
    def exact(self) -> bool:
        return self.free == 0 and self.carry == BITS_KEPT

    @property
    def support(self) -> int:
        """Bits that may be set in any lane."""
        bits = self.free | MASK & ~_below(self.carry)
        for number in self.table:
            bits |= number
        return bits

    @property
    def apart(self) -> bool:
        """Whether it is the sum of the table and one number, as their bits are different ones."""
        return self.carry == BITS_KEPT and not self.free & _any(self.table)


LANE = Spread(tuple(range(LANES)))


def _below(bit: int) -> int:
    return (1 << bit) - 1


def _any(table: tuple[int, ...]) -> int:
    bits = 0
    for number in table:
        bits |= number
    return bits


def _lowest(bits: int) -> int:
    """The place of the lowest bit that is set; 64 of none."""
    return (bits & -bits).bit_length() - 1 if bits else BITS_KEPT


def known(number: int) -> Spread:
    return Spread((number & MASK,) * LANES)


def one_of_all(multiple: int = 1) -> Spread:
    """A number that is the same for all lanes, a multiple of a power of two."""
    return Spread((0,) * LANES, MASK & -multiple)


def _uniform(support: int) -> Spread:
    return Spread((0,) * LANES, support & MASK)


def _zip(function: Callable[[int, int], int], a: Spread, b: Spread) -> tuple[int, ...]:
    return tuple(function(x, y) & MASK for x, y in zip(a.table, b.table, strict=True))


def add(a: Spread, b: Spread) -> Spread | None:
    if a.exact and b.exact:
        return Spread(_zip(int.__add__, a, b))
    if not a.support & b.support:
        return Spread(_zip(int.__or__, a, b), a.free | b.free, min(a.carry, b.carry))
    if a.uniform and b.uniform:
        longest = max(a.support, b.support).bit_length() + 1
        return _uniform(_below(longest) & -(1 << _lowest(a.support | b.support)))
    if a.uniform:
        a, b = b, a
    if b.uniform:
        place = _lowest(b.support)
        return Spread(a.table, a.free & _below(place), min(a.carry, place))
    if a.apart and b.apart:
        place = _lowest(a.free | b.free)
        return Spread(_zip(int.__add__, a, b), 0, place)
    return None


def negative(a: Spread) -> Spread | None:
    if a.exact:
        return Spread(tuple(-number & MASK for number in a.table))
    return one_of_all(1 << _lowest(a.support)) if a.uniform else None


def subtract(a: Spread, b: Spread) -> Spread | None:
    other = negative(b)
    return None if other is None else add(a, other)


def exclusive_or(a: Spread, b: Spread) -> Spread | None:
    if a.carry == b.carry == BITS_KEPT:
        return Spread(_zip(int.__xor__, a, b), a.free | b.free)
    if a.carry > b.carry:
        a, b = b, a
    if b.uniform or b.support <= _below(a.carry):
        low = _below(a.carry)
        return Spread(_zip(lambda x, y: x ^ y & low, a, b), (a.free | b.free) & low, a.carry)
    return None


def both(a: Spread, b: Spread) -> Spread | None:
    """`and`."""
    if a.uniform and b.uniform and not (a.exact and b.exact):
        return _uniform(a.support & b.support)
    if not b.exact:
        a, b = b, a
    if not b.exact:
        return None
    if a.carry == BITS_KEPT and (b.uniform or not a.free & _any(b.table)):
        return Spread(_zip(int.__and__, a, b), a.free & b.table[0])
    mask = b.table[0]
    if not b.uniform:
        return None
    if mask <= _below(a.carry):
        return Spread(_zip(int.__and__, a, b), a.free & mask)
    # Some high bits, or all but some low ones, of what is one to one from a bit on.
    if mask & (mask + 1) == 0 or mask | _below(a.carry) == MASK:
        return Spread(_zip(int.__and__, a, b), a.free & mask, a.carry)
    return None


def either(a: Spread, b: Spread) -> Spread | None:
    if a.exact and b.exact:
        return Spread(_zip(int.__or__, a, b))
    if not a.support & b.support:
        return add(a, b)
    return _uniform(a.support | b.support) if a.uniform and b.uniform else None


def shift_left(a: Spread, places: int) -> Spread:
    return Spread(tuple(number << places & MASK for number in a.table), a.free << places & MASK,
                  min(a.carry + places, BITS_KEPT))


def shift_right(a: Spread, places: int) -> Spread | None:
    if a.carry == BITS_KEPT:
        return Spread(tuple(number >> places for number in a.table), a.free >> places)
    # What is shifted in stands above all that is compared.
    return Spread(tuple(number >> places for number in a.table), a.free >> places, a.carry - places) \
        if places <= a.carry and not a.uniform else None


def widened(a: Spread, bits: int) -> Spread:
    """The sign of a number of so many bits goes on to the left."""
    if not a.support >> (bits - 1):
        return a
    if a.uniform:
        return one_of_all(1 << _lowest(a.support))
    return Spread(a.table, a.free & _below(bits - 1), min(a.carry, bits - 1))


def multiply(a: Spread, b: Spread) -> Spread | None:
    if a.exact and b.exact:
        return Spread(_zip(int.__mul__, a, b))
    if not b.exact or not b.uniform:
        a, b = b, a
    if not b.exact or not b.uniform:
        places = min(_lowest(a.support) + _lowest(b.support), BITS_KEPT)
        return one_of_all(1 << places) if a.uniform and b.uniform else None
    factor = b.table[0]
    if factor & (factor - 1) == 0:
        return shift_left(a, factor.bit_length() - 1) if factor else known(0)
    if a.apart:
        return Spread(_zip(int.__mul__, a, b), 0, min(_lowest(a.free) + _lowest(factor), BITS_KEPT))
    return None


def agreed(a: Spread, b: Spread) -> Spread | None:
    """What is either of the two, in all lanes alike. Of a number that a loop counts no bound is kept: it would take as
    many passes to settle as it has bits."""
    if a.uniform and b.uniform:
        return a if a == b else one_of_all(1 << _lowest(a.support | b.support))
    differs = _zip(int.__xor__, a, b)
    carry = min(a.carry, b.carry)
    if differs.count(differs[0]) == LANES:
        return Spread(a.table, (a.free | b.free | differs[0]) & _below(carry), carry)
    far = _zip(int.__sub__, a, b)
    if far.count(far[0]) == LANES:
        carry = min(carry, _lowest(far[0]))
        return Spread(a.table, (a.free | b.free) & _below(carry), carry)
    return None


@dataclass(frozen=True, slots=True)
class SharedAccess:
    """place: in the body; line: of the text. kind: "load", "store" or "copy". width: bytes of a lane. proof: None where
    there is none, for a reason. masked: a predicate may switch lanes off, and cycles are the most it takes."""

    place: int
    line: int
    text: str
    kind: str
    width: int
    proof: Proof | None
    reason: str = ""
    masked: bool = False


def shared_accesses(text: str, kernel: str | None = None, block: tuple[int, ...] = ()) -> list[SharedAccess]:
    """Those of a kernel of PTX text. kernel: its name, if the text has several. block: threads by dimension, if the
    text does not say; none: whole warps along x. Raises EmulationError for calls that can't be followed."""
    module = parse.parse(text)
    entries = [function for function in module.functions.values() if function.entry]
    function = next(f for f in entries if kernel is None or f.name == kernel)
    return _Follower(inline_calls(module, function), module, block or function.required_threads).run()


_SAME = frozenset({"mov", "cvta", "cvt"})
_PURE = frozenset({"min", "max", "div", "rem", "mul", "mad", "not", "neg", "abs", "clz", "popc", "brev", "fma", "add",
                   "sub", "bfi", "bfe", "lop3", "shf", "prmt", "setp", "set", "selp", "slct", "and", "or", "xor", "shl",
                   "shr", "cvt", "mov", "ex2", "rcp", "mul24", "mad24", "sad", "dp4a", "isspacep", "testp"})
"""Opcodes whose results depend on their operands alone."""
_LIKE_IN_ALL = frozenset({"vote", "activemask", "redux"})
"""Opcodes that give all lanes the same."""
_UNIFORM_SPECIALS = ("ctaid", "nctaid", "ntid", "cluster", "ncluster", "warpid", "nwarpid", "is_explicit_cluster",
                     "dynamic_smem_size", "total_smem_size", "smid", "nsmid", "gridid")


class _Follower:
    """values: what is known of each register, by slot; None: nothing. parted: a branch may part a warp."""

    def __init__(self, function: parse.Function, module: parse.Module, block: tuple[int, ...]) -> None:
        self.function, self.block = function, block
        self.whole_rows = not block or block[0] % LANES == 0
        self.alignments = {v.name: v.alignment for v in (*module.variables.values(), *function.variables)
                           if v.space == "shared"}
        self.writers: dict[int, list[int]] = {}
        for place, instruction in enumerate(function.body):
            for slot in _written(instruction):
                self.writers.setdefault(slot, []).append(place)
        self.values: dict[int, Spread | None] = {}
        self.parted = False
        self.parting: set[int] = set()

    def run(self) -> list[SharedAccess]:
        accesses = [(place, *found) for place, instruction in enumerate(self.function.body)
                    if (found := _shared(instruction)) is not None]
        branches = {place: i.guard for place, i in enumerate(self.function.body)
                    if i.guard is not None and i.form.row.opcode == "bra" and "uni" not in i.form}
        wanted = self.needed([*(address.base for _, address, *_ in accesses), *branches.values()])
        self.follow(wanted)
        while parting := [place for place, guard in branches.items() if not self.same_for_all(guard)]:
            before = self.parted, len(self.parting)
            for place in parting:
                self.part(place)
            if before == (self.parted, len(self.parting)):
                break
            self.follow(wanted)
        return [self.judged(*found) for found in accesses]

    def part(self, place: int) -> None:
        """Lanes go different ways from a branch on, and meet behind it: what is written on the way is not the same for
        all. Where that way has branches of its own nobody looks where they meet."""
        (label,) = self.function.body[place].operands
        target = self.function.place_of(label) if isinstance(label, parse.Label) else None
        way = range(0) if target is None else range(min(place, target), max(place, target))
        if target is None or any(self.function.body[p].form.row.unit == "control" for p in way if p != place):
            self.parted = True
        self.parting.update(way)

    def needed(self, operands: Iterable[parse.Operand]) -> list[int]:
        """Places of the instructions that operands are made of, in order."""
        stack = [operand.slot for operand in operands if isinstance(operand, parse.Register)]
        slots, places = set(stack), set()
        while stack:
            for place in self.writers.get(stack.pop(), ()):
                if place in places:
                    continue
                places.add(place)
                instruction = self.function.body[place]
                for operand in (*instruction.operands, instruction.guard):
                    for register in _registers(operand):
                        if register.slot not in slots:
                            slots.add(register.slot)
                            stack.append(register.slot)
        return sorted(places)

    def follow(self, places: list[int]) -> None:
        self.values = {}
        if self.settles(places, _MOST_PASSES):
            return
        for place in places:        # what never settles is not known, and what is made of it
            for slot in _written(self.function.body[place]):
                if len(self.writers[slot]) > 1:
                    self.values[slot] = None
        self.settles(places, len(places))

    def settles(self, places: list[int], most: int) -> bool:
        """Go on until nothing changes."""
        for _ in range(most):
            before = dict(self.values)
            for place in places:
                self.step(place)
            if self.values == before:
                return True
        return False

    def step(self, place: int) -> None:
        instruction = self.function.body[place]
        operands = [self.value(operand) for operand in _sources(instruction)]
        if any(operand is _UNDEFINED for operand in operands):
            return
        made = self.result(instruction, operands)      # type: ignore[arg-type]
        if place in self.parting or (instruction.guard is not None and not self.same_for_all(instruction.guard)):
            made = None
        for slot in _written(instruction):
            if made is not None:
                made = both(made, known(_below(BITS[self.function.registers[slot][1]])))
            if len(self.writers[slot]) == 1:
                self.values[slot] = made
            elif self.parted or made is None:
                self.values[slot] = None
            elif slot not in self.values:
                self.values[slot] = made
            else:
                old = self.values[slot]
                self.values[slot] = None if old is None else agreed(old, made)

    def same_for_all(self, guard: parse.Register) -> bool:
        value = self.values.get(guard.slot)
        return value is not None and value.uniform

    def value(self, operand: parse.Operand | None) -> Spread | object | None:
        if isinstance(operand, parse.Register):
            return self.values.get(operand.slot, _UNDEFINED if operand.slot in self.writers else None)
        if isinstance(operand, parse.Immediate):
            return known(operand.bits)
        if isinstance(operand, parse.Symbol):
            made = add(one_of_all(self.alignments.get(operand.name, 1)), known(operand.offset))
            return made
        if isinstance(operand, parse.Special):
            return self.special(operand.name)
        return None

    def special(self, name: str) -> Spread | None:
        if name == "laneid":
            return LANE
        if name == "tid.x" and self.whole_rows:
            most = self.block[0] if self.block else MOST_THREADS
            return Spread(LANE.table, _below((most - 1).bit_length()) & ~(LANES - 1))
        if name in ("tid.y", "tid.z") and self.whole_rows:
            return _uniform(MOST_THREADS - 1)
        return one_of_all() if name.startswith(_UNIFORM_SPECIALS) else None

    def result(self, instruction: parse.Instruction, operands: list[Spread | None]) -> Spread | None:
        form = instruction.form
        opcode, unit = form.row.opcode, form.row.unit
        if unit == "memory":
            (address,) = operands
            fixed = space_of(form.get("space")) == "param" or not self.parted
            return one_of_all() if address is not None and address.uniform and fixed else None
        if opcode in _LIKE_IN_ALL:
            return None if self.parted else one_of_all()
        if opcode == "shfl":
            return _broadcast(form.mnemonic, operands)
        if unit or opcode not in _PURE | _SAME or any(operand is None for operand in operands):
            return None
        some = [operand for operand in operands if operand is not None]
        type = form.get("type") or form.get("size") or form.get("dtype") or form.get("b32")
        made = None
        if not type.startswith(("f", "bf", "tf")) and "cc" not in form:
            made = _made(form, some, type)
        return one_of_all() if made is None and all(operand.uniform for operand in some) else made

    def judged(self, place: int, address: parse.Address, kind: str, width: int, lanes: int) -> SharedAccess:
        instruction = self.function.body[place]
        base = self.value(address.base)
        proof, reason = None, ""
        if not isinstance(base, Spread):
            reason = "its address is not followed" + (": a branch may part the warp" if self.parted else "")
        elif width < WORD_BYTES and base.carry < 2:
            reason = "where its words begin is not known"
        else:
            proof = prove(base.table[:lanes], width)
        return SharedAccess(place, instruction.line, instruction.text, kind, width, proof, reason,
                            instruction.guard is not None)


_UNDEFINED = object()
"""Of a register that nothing has written yet, on the way so far."""


def _made(form: Form, operands: list[Spread], type: str) -> Spread | None:
    """What an instruction on integers makes, without what is above the bits of its register; None where it is not
    followed."""
    opcode, bits, signed = form.row.opcode, BITS.get(type, 32), type.startswith("s")
    first, *rest = operands
    if opcode in _SAME:
        source = form.get("atype")
        return None if rest else widened(first, BITS[source]) if source.startswith("s") else first
    if opcode in ("add", "sub", "and", "or", "xor"):
        return {"add": add, "sub": subtract, "and": both, "or": either, "xor": exclusive_or}[opcode](first, rest[0])
    if opcode in ("mul", "mad") and "hi" not in form:
        if signed and "wide" in form:
            first, rest[0] = widened(first, bits), widened(rest[0], bits)
        product = multiply(first, rest[0])
        return product if opcode == "mul" or product is None else add(product, rest[1])
    if opcode == "selp":
        return chosen(first, *rest)
    if opcode in ("shl", "shr", "bfe") and all(by.exact and by.uniform for by in rest):
        places = min(rest[0].table[0], bits)
        if opcode == "shl":
            return shift_left(first, places)
        made = shift_right(first, places) if not (signed and first.support >> (bits - 1)) else None
        if opcode == "shr" or made is None:
            return made
        return None if signed else both(made, known(_below(min(rest[1].table[0], bits))))
    pair = rest and first.exact and rest[0].exact and not (first.support | rest[0].support) >> (bits - 1)
    if pair and opcode in ("min", "max"):
        return Spread(_zip(min if opcode == "min" else max, first, rest[0]))
    if pair and opcode in ("div", "rem") and 0 not in rest[0].table:
        return Spread(_zip(int.__floordiv__ if opcode == "div" else int.__mod__, first, rest[0]))
    if pair and opcode == "setp" and len(rest) == 1 and form.get("cmp") in _COMPARE:
        return Spread(_zip(_COMPARE[form.get("cmp")], first, rest[0]))
    return None


_COMPARE: dict[str, Callable[[int, int], int]] = {
    "eq": lambda a, b: int(a == b), "ne": lambda a, b: int(a != b), "lt": lambda a, b: int(a < b),
    "le": lambda a, b: int(a <= b), "gt": lambda a, b: int(a > b), "ge": lambda a, b: int(a >= b),
    "lo": lambda a, b: int(a < b), "ls": lambda a, b: int(a <= b), "hi": lambda a, b: int(a > b),
    "hs": lambda a, b: int(a >= b)}


def chosen(a: Spread, b: Spread, taken: Spread) -> Spread | None:
    """a in the lanes where `taken` is 1, b in the others."""
    if taken.exact and taken.uniform:
        return a if taken.table[0] else b
    if taken.uniform:
        return agreed(a, b)
    if taken.exact and a.exact and b.exact:
        return Spread(tuple(x if take else y for x, y, take in zip(a.table, b.table, taken.table, strict=True)))
    return None


def _broadcast(mnemonic: str, operands: list[Spread | None]) -> Spread | None:
    """What one lane gives to all of its warp."""
    value, lane, ends, members = operands[:4]
    if not mnemonic.startswith("shfl.sync.idx") or None in (value, lane, ends, members):
        return None
    assert value is not None and lane is not None
    if not lane.uniform or ends != known(LANES - 1) or members != known(_below(LANES)):
        return None
    if value.exact and lane.exact:
        return known(value.table[lane.table[0] % LANES])
    return one_of_all()


def _registers(operand: parse.Operand | None) -> list[parse.Register]:
    if isinstance(operand, parse.Register):
        return [operand]
    if isinstance(operand, parse.Address):
        return _registers(operand.base)
    return [r for item in operand.items for r in _registers(item)] if isinstance(operand, parse.Vector) else []


def _written(instruction: parse.Instruction) -> list[int]:
    """Slots of the registers that an instruction writes."""
    return [register.slot for known, operand in zip(instruction.form.operands, instruction.operands, strict=False)
            if known.writes for register in _registers(operand)]


def _sources(instruction: parse.Instruction) -> list[parse.Operand | None]:
    """What its result is made of: of a load the address."""
    pairs = list(zip(instruction.form.operands, instruction.operands, strict=False))
    if instruction.form.row.unit == "memory":
        return [o.base for _, o in pairs if isinstance(o, parse.Address)]
    found: list[parse.Operand | None] = []
    for known, operand in pairs:
        if known.role in ("r", "rw", "i") and operand is not None:
            found += operand.items if isinstance(operand, parse.Vector) else [operand]
    return found


def _shared(instruction: parse.Instruction) -> tuple[parse.Address, str, int, int] | None:
    """(address, kind, bytes of a lane, lanes that give addresses) of an access of shared memory by lanes; None of other
    instructions, atomic ones among them."""
    form = instruction.form
    if form.row.unit not in ("memory", "matrix_memory", "cp_async") or space_of(form.get("space")) != "shared":
        return None
    addresses = [operand for operand in instruction.operands if isinstance(operand, parse.Address)]
    if not addresses or form.get("space") == "shared::cluster":
        return None
    kind = "load" if form.row.opcode in ("ld", "ldmatrix") else "store"
    if form.row.unit == "matrix_memory":
        return addresses[0], kind, 16, 8 * int(form.get("num")[1:])
    if form.row.unit == "cp_async":
        size = instruction.operands[2]
        return addresses[0], "copy", size.bits if isinstance(size, parse.Immediate) else 16, LANES
    return addresses[0], kind, BITS[form.get("type")] // 8 * int(form.get("vec", "v1")[1:]), LANES
