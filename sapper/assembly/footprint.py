"""Where every access of a piece lies, as a formula: base + affine index, shown to stay inside its region.

Enters: an `Assembly`, its blocks, what each instruction writes. Leaves: nothing, or `AssemblyError` at the first access
that leaves its region for some extents, which it names; and how many accesses were shown, and how many were not.
Holds: general registers are followed as polynomials (polynomial.py) over extents, strides, and the rounds of loops.

    a loop          a register that moves by the same amount in each round is start + round * amount. What the branch
                    back tells of the last round holds for this one, if it held before the first.
    paths meet      where one of them is the loop and the other passes it by, they leave start + rounds * amount, with
                    rounds from 0 on; else what differs is not known any more.
    an opmask       whose lowest n lanes are on bounds the bytes of an access under it.

What depends on data (gathers, lanes that a comparison chose) is not known: there the run under the interpreter and
between guard pages decides, as it does for all accesses. So an access is refused only with numbers for which it is
wrong.
Source: P. Cousot and N. Halbwachs, "Automatic discovery of linear restraints among variables of a program" (1978), for
the plan; here the loops are closed at once, by what the registers of a round differ in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..codegen.machine import Immediate, Instruction, Label, LabelReference, Memory, Register, VirtualRegister
from .build import Assembly, Region
from .emulate import lane_bytes
from .errors import AssemblyError
from .loops import Equality, cycles_of
from .polynomial import Known, Polynomial, Symbol

Value = tuple["Region | None", "Polynomial | None"]
"""Of a register: the region that it points into, if any, and its number or its byte offset there, None if not known."""

_MOST_FACTS = 48


@dataclass(slots=True)
class State:
    """values: of general registers. lanes: of a register whose lowest bits are on and no others, how many.
    compared: (what, with what) of the last comparison. known: what holds here."""

    values: dict[Any, Value] = field(default_factory=dict)
    lanes: dict[Any, Polynomial] = field(default_factory=dict)
    compared: tuple[Polynomial, Polynomial] | None = None
    known: Known = field(default_factory=Known)

    def copy(self) -> State:
        return State(dict(self.values), dict(self.lanes), self.compared, self.known)


class Footprint:
    """One walk. shown, unknown: accesses that were shown to stay inside, and those that are left to running.

    shapes: (rows, bytes of a row) of the tile that an instruction loads or stores, where they are known."""

    def __init__(self, assembly: Assembly, starts: list[int], follow: list[list[int]],
                 writes_of: Callable[[Instruction], list[Any]], equalities: Mapping[int, Equality],
                 shapes: Mapping[Instruction, tuple[int, int] | None]) -> None:
        self.assembly, self.table = assembly, assembly.table
        self.starts, self.follow, self.writes_of = starts, follow, writes_of
        self.equalities = equalities
        self.shapes = shapes
        self.shown: dict[Instruction, None] = {}
        self.unknown: dict[Instruction, None] = {}
        self.rounds = 0

    def run(self) -> None:
        entry = State(known=Known(self.assembly.assumed))
        for register, region in self.assembly.inputs.items():
            number = self.assembly.numbers.get(register)
            if region is not None:
                entry.values[register] = region, Polynomial.of(0)
            else:
                made = Symbol.new(f"{register.kind} {register.number}", natural=False)
                entry.values[register] = None, Polynomial.of(made) if number is None else number
        self.parts(list(range(len(self.follow))), None, {0: [entry]}, True)

    # --- The graph --------------------------------------------------------------------------------------------------

    def parts(self, blocks: list[int], head: int | None, entering: dict[int, list[State]],
              final: bool) -> dict[int, list[State]]:
        """Follow the blocks of a loop (or of all), edges back to `head` taken out. Gives the states on edges that leave
        them, those to the head too."""
        leaving: dict[int, list[State]] = {}
        among = set(blocks)
        follow = [[s for s in self.follow[b] if s != head] if b in among else [] for b in range(len(self.follow))]
        cycles = {b: cycle for cycle in cycles_of(blocks, follow) for b in cycle}
        done: set[int] = set()
        for block in self._in_order(blocks, follow, cycles):
            cycle = cycles.get(block, [block])
            if block in done:
                continue
            done.update(cycle)
            heads = [b for b in cycle if entering.get(b)]
            if not heads:
                continue
            if block not in cycles:
                edges = self.block(block, self.joined(entering[block]), final)
            elif len(heads) == 1:
                edges = self.loop(cycle, heads[0], self.joined(entering[heads[0]]), final)
            else:
                edges = self._nothing_known(cycle, final)
            for target, states in edges:
                (entering if target in among and target != head else leaving).setdefault(target, []).extend(states)
        return leaving

    @staticmethod
    def _in_order(blocks: list[int], follow: list[list[int]], cycles: dict[int, list[int]]) -> Iterator[int]:
        """Blocks so that all before a part come before it; of a cycle one stands for all."""
        among = set(blocks)
        seen: set[int] = set()
        order: list[int] = []
        for root in blocks:
            work = [(root, False)]
            while work:
                block, left = work.pop()
                part = cycles.get(block, [block])
                if left:
                    order.append(block)
                    continue
                if part[0] in seen:
                    continue
                seen.add(part[0])
                work.append((block, True))
                work += [(s, False) for b in part for s in follow[b] if s in among and s not in part]
        return reversed(order)

    def _nothing_known(self, cycle: list[int], final: bool) -> list[tuple[int, list[State]]]:
        """A cycle with two ways in: each block by itself, from nothing."""
        edges = []
        for block in cycle:
            edges += [(t, s) for t, s in self.block(block, State(), final) if t not in cycle]
        return edges

    def loop(self, cycle: list[int], head: int, start: State, final: bool) -> list[tuple[int, list[State]]]:
        """See the head of the file. First a round from unknown numbers says by what each register moves."""
        if final:
            for block in cycle:
                if block in self.equalities:
                    self._ends_at(block, start)
        written = {r for b in cycle for item in self._items(b) for r in self.writes_of(item)}
        moving = {r: Symbol.new("before", False, False) for r, (_, number) in start.values.items()
                  if r in written and number is not None}
        first = min((s.number for s in moving.values()), default=0)
        born = Symbol.new("round", False, False).number  # whatever is made in the loop comes after
        trial = self._at_head(start, written)
        trial.values |= {r: (start.values[r][0], Polynomial.of(s)) for r, s in moving.items()}
        back = self.parts(cycle, head, {head: [trial]}, False).get(head, [])
        after = self.joined(back) if back else trial
        amounts = {}
        for register, before in moving.items():
            region, number = after.values.get(register, (None, None))
            if number is None or region != start.values[register][0]:
                continue
            amount = number - Polynomial.of(before)
            if all(s.number < born and s not in moving.values() for s in amount.symbols):
                amounts[register] = amount
        self.rounds += final
        turn = Symbol.new(f"round {self.rounds}" if final else "round")
        entered = self._at_head(start, written)
        last_round: dict[Symbol, Polynomial] = {}
        for register, amount in amounts.items():
            region, number = start.values[register]
            assert number is not None
            entered.values[register] = region, number + Polynomial.of(turn) * amount
            last_round[moving[register]] = number + (Polynomial.of(turn) - 1) * amount
        told = []
        for fact in after.known.facts:
            moved = fact
            for symbol in fact.symbols & last_round.keys():
                moved = moved.replaced(symbol, last_round[symbol])
            if moved is not fact and all(s is turn or s.number < first for s in moved.symbols) \
                    and start.known.proves(moved.replaced(turn, Polynomial.of(0))):
                told.append(moved)
        entered.known = start.known.and_(told)
        edges = self.parts(cycle, head, {head: [entered]}, final)
        edges.pop(head, None)
        return list(edges.items())

    def _ends_at(self, block: int, start: State) -> None:
        """A loop that ends where its counter equals a bound must begin before it, or it goes round all numbers."""
        counter, bound, step = self.equalities[block]
        first = self.number(counter, start)
        last = Polynomial.of(0) if bound is None else self.number(bound, start)
        if first is None or last is None:
            return
        rounds = (last - first) * step
        if start.known.proves(rounds - 1):
            return
        numbers = start.known.refutes(rounds - 1)
        if numbers is not None:
            branch = list(self._items(block))[-1]
            named = ", ".join(f"{s.name} = {numbers[s]}" for s in sorted(rounds.symbols) if s in numbers)
            raise AssemblyError("loop", "this loop can't be shown to end", branch.location,
                                "a counter that begins at its bound, or beyond" + (f", where {named}" if named else ""),
                                "a first round only where there is one",
                                "ask before the loop, or leave it by jl or jg")

    def _at_head(self, start: State, written: set[Any]) -> State:
        made = start.copy()
        made.compared = None
        for register in written:
            if register in made.values:
                made.values[register] = made.values[register][0], None
            made.lanes.pop(register, None)
        return made

    def joined(self, states: list[State]) -> State:
        found = states[0]
        for other in states[1:]:
            found = self._both(found, other)
        return found

    def _both(self, one: State, two: State) -> State:
        """What holds whichever way was taken."""
        differing = [r for r, v in one.values.items() if r in two.values and v != two.values[r]]
        turn = self._passed_by(one, two, differing)
        if turn is None and (turn := self._passed_by(two, one, differing)) is not None:
            one, two = two, one
        made = State()
        rounds = Polynomial.of(Symbol.new("rounds"))
        for register, (region, number) in one.values.items():
            if register not in two.values:
                continue
            other_region, other = two.values[register]
            if (region, number) == (other_region, other):
                made.values[register] = region, number
            elif region == other_region:
                before = None if turn is None or number is None else number.replaced(turn, Polynomial.of(-1))
                joined = None if number is None or turn is None or before != other else \
                    number.replaced(turn, rounds - 1)
                made.values[register] = region, joined
        made.lanes = {r: n for r, n in one.lanes.items() if two.lanes.get(r) == n}
        facts = [f for f in one.known.facts if two.known.proves(f)]
        if turn is not None:
            for fact in one.known.facts:
                if turn in fact.symbols and two.known.proves(fact.replaced(turn, Polynomial.of(-1))):
                    facts.append(fact.replaced(turn, rounds - 1))
        made.known = Known(facts[:_MOST_FACTS])
        return made

    @staticmethod
    def _passed_by(one: State, two: State, differing: list[Any]) -> Symbol | None:
        """The rounds of a loop that path `one` has come through and path `two` has passed by, if it is that."""
        for register in differing:
            (region, number), (other_region, other) = one.values[register], two.values[register]
            if number is None or other is None or region != other_region:
                continue
            for symbol in sorted(number.symbols - other.symbols, reverse=True):
                if symbol.free and number.replaced(symbol, Polynomial.of(-1)) == other:
                    return symbol
        return None

    # --- Blocks -----------------------------------------------------------------------------------------------------

    def _items(self, block: int) -> Iterator[Instruction]:
        for place in range(self.starts[block], self.starts[block + 1]):
            item = self.assembly.body[place]
            if isinstance(item, Instruction):
                yield item

    def block(self, block: int, state: State, final: bool) -> list[tuple[int, list[State]]]:
        state = state.copy()
        last = None
        for item in self._items(block):
            if final:
                self.check(item, state)
            self.step(item, state)
            last = item
        targets = self.follow[block]
        if last is None or last.row.control != "branch" or len(set(targets)) != 2:
            return [(t, [state]) for t in targets]
        name = next(o.name for o in last.operands if isinstance(o, LabelReference))
        edges = []
        for target in targets:
            jumps = self._labelled(target, name)
            edge = state.copy()
            edge.known = state.known.and_(self._told(last.row.mnemonic, jumps, state))
            edges.append((target, [edge]))
        return edges

    def _labelled(self, block: int, name: str) -> bool:
        for place in range(self.starts[block], self.starts[block + 1]):
            item = self.assembly.body[place]
            if not isinstance(item, Label):
                return False
            if item.name == name:
                return True
        return False

    def _told(self, mnemonic: str, taken: bool, state: State) -> list[Polynomial]:
        """What a branch says of the numbers that were compared."""
        if state.compared is None:
            return []
        a, b = state.compared
        condition = self.table.CONDITIONS.get(mnemonic, "") if taken else self.table.CONDITIONS.get(
            self.table.OPPOSITE.get(mnemonic, ""), "")
        known = state.known
        if condition.startswith("u"):  # as numbers without a sign: the same where neither is negative
            if not known.proves(b) or (condition in ("u>", "u>=") and not known.proves(a)):
                return []
            if condition in ("u<", "u<="):
                return [a, b - a - (condition == "u<")]
            condition = condition[1:]
        if condition == "!=":
            return [a - b - 1] if known.proves(a - b) else [b - a - 1] if known.proves(b - a) else []
        return {"<": [b - a - 1], "<=": [b - a], ">": [a - b - 1], ">=": [a - b],
                "=": [a - b, b - a]}.get(condition, [])

    # --- One instruction --------------------------------------------------------------------------------------------

    def step(self, item: Instruction, state: State) -> None:
        value, lanes = self.result(item, state)
        compared = self.comparison(item, state)
        for register in self.writes_of(item):
            state.values.pop(register, None)
            state.lanes.pop(register, None)
        if item.row.flags_written or item.row.control == "call":
            state.compared = compared
        if item.operands and isinstance(item.operands[0], (Register, VirtualRegister)):
            if value is not None:
                state.values[item.operands[0]] = value
            if lanes is not None:
                state.lanes[item.operands[0]] = lanes
        if item.row.name in self.table.DIVISIONS:
            for pair in item.row.implicit_writes:
                made = Symbol.new(item.row.mnemonic, True, False)
                state.values[Register(*pair)] = None, Polynomial.of(made)

    def number(self, operand: Any, state: State) -> Polynomial | None:
        """A number; None for what is not known, and for an address."""
        if isinstance(operand, Immediate):
            return Polynomial.of(operand.value)
        region, number = state.values.get(operand, (None, None)) if not isinstance(operand, Memory) else (None, None)
        return number if region is None else None

    def comparison(self, item: Instruction, state: State) -> tuple[Polynomial, Polynomial] | None:
        kind = self.table.ARITHMETIC.get(item.row.mnemonic)
        operands = item.operands
        if kind is None or not operands or item.row.operands[0].bits != 64:
            return None
        first = operands[0]
        if kind == "compare":
            a, b = (state.values.get(o, (None, None)) if not isinstance(o, (Memory, Immediate)) else
                    (None, self.number(o, state)) for o in operands)
            return None if a[0] != b[0] or a[1] is None or b[1] is None else (a[1], b[1])
        if kind == "test":
            a_number = self.number(first, state)
            return (a_number, Polynomial.of(0)) if a_number is not None and first == operands[1] else None
        before, by = self.number(first, state), self._amount(item, kind, state)
        if before is None or by is None or kind not in ("add", "subtract", "increment", "decrement"):
            return None
        return (before, by) if kind in ("subtract", "decrement") else (before, by * -1)

    def _amount(self, item: Instruction, kind: str, state: State) -> Polynomial | None:
        return Polynomial.of(1) if kind in ("increment", "decrement") else self.number(item.operands[-1], state)

    def result(self, item: Instruction, state: State) -> tuple[Value | None, Polynomial | None]:
        """(value, lanes that are on) of the register that an instruction writes."""
        table, row, operands = self.table, item.row, item.operands
        if not operands or not isinstance(operands[0], (Register, VirtualRegister)) or item.mask is not None:
            return None, None
        kind = table.ARITHMETIC.get(row.mnemonic)
        target, source = operands[0], operands[-1]
        bits = row.operands[0].bits
        if kind == "move" and bits >= 32 and isinstance(source, Immediate):
            value = source.value if bits == 64 else source.value & 0xFFFFFFFF
            return (None, Polynomial.of(value)), None
        if kind == "exclusive" and source == target and bits >= 32:
            return (None, Polynomial.of(0)), None
        if kind == "mask" and not isinstance(source, (Memory, Immediate)):
            return None, state.lanes.get(source)
        if kind == "low bits" and (count := self.number(source, state)) is not None:
            ones = self.number(operands[1], state)
            width = bits - 1
            if ones == Polynomial.of(-1) and state.known.proves(count) \
                    and state.known.proves(Polynomial.of(width) - count):
                return None, count
            return None, None
        if bits != 64 or kind is None:
            return None, None
        if kind == "move":
            if isinstance(source, Memory):
                return self.word(source), None
            return state.values.get(source), state.lanes.get(source)
        if kind == "address" and isinstance(source, Memory):
            return self.address(source, state), None
        region, before = state.values.get(target, (None, None))
        if kind in ("add", "subtract", "increment", "decrement"):
            by = self._amount(item, kind, state)
            down = kind in ("subtract", "decrement")
            other = state.values.get(source, (None, None))[0] if not isinstance(source, (Memory, Immediate)) else None
            if other is not None:
                return self._with_pointer(region, before, state.values[source], down), None
            if before is None or by is None:
                return (region, None) if region is not None else None, None
            return (region, before - by if down else before + by), None
        if kind == "multiply":
            a, b = (self.number(o, state) for o in operands[-2:])
            return None if a is None or b is None else (None, a * b), None
        if kind in ("left", "right", "and"):
            return self._bits(kind, self.number(target, state), source, state, (region, before)), None
        if kind in ("least", "greatest") and not isinstance(source, Memory):
            return self._chosen(kind, state.values.get(target), state.values.get(source), state), None
        return None, None

    @staticmethod
    def _with_pointer(region: Region | None, before: Polynomial | None, other: Value, down: bool) -> Value | None:
        if region is None and not down:
            return other[0], None if before is None or other[1] is None else before + other[1]
        if region == other[0] and down:
            return None, None if before is None or other[1] is None else before - other[1]
        return None

    def _bits(self, kind: str, number: Polynomial | None, source: Any, state: State, whole: Value) -> Value | None:
        if not isinstance(source, Immediate):
            return None
        if kind == "left":
            return None if number is None else (None, number * (1 << source.value))
        if whole[0] is not None or number is None or not state.known.proves(number):
            return (whole[0], None) if whole[0] is not None and kind == "and" else None
        # What is left of a number that is not negative lies between 0 and it; a quotient is bounded both ways.
        size = 1 << source.value if kind == "right" else -source.value if source.value < 0 else source.value + 1
        if size & (size - 1):
            return None
        made = Symbol.new("part", True, False)
        part = Polynomial.of(made)
        state.known = state.known.and_([number - part * size, part * size + (size - 1) - number])
        if kind == "right":
            return None, part
        return (None, part * size) if source.value < 0 else (None, number - part * size)

    def _chosen(self, kind: str, one: Value | None, two: Value | None, state: State) -> Value | None:
        """The smaller or larger of two numbers, if they are those that were compared, in this order."""
        if one is None or two is None or one[0] != two[0] or one[1] is None or two[1] is None:
            return None
        a, b = one[1], two[1]
        if state.compared is None or state.compared not in ((a, b), (b, a)):
            return (one[0], None) if one[0] is not None else None
        smaller = (kind == "greatest") == (state.compared == (a, b))  # taken where the first is greater
        made = Polynomial.of(Symbol.new("choice", state.known.proves(a) and state.known.proves(b), False))
        state.known = state.known.and_([a - made, b - made] if smaller else [made - a, made - b])
        return one[0], made

    def word(self, source: Memory) -> Value | None:
        """What an argument block has at a place."""
        if source.index is not None or source.base is None:
            return None
        region = self.assembly.words.get(source.base, {}).get(source.disp)
        if region is not None:
            return region, Polynomial.of(0)
        number = self.assembly.word_numbers.get((source.base, source.disp))
        return None if number is None else (None, number)

    def address(self, memory: Memory, state: State) -> Value | None:
        if memory.label is not None:
            return None
        region: Region | None = None
        total: Polynomial | None = Polynomial.of(memory.disp)
        for part, scale in ((memory.base, 1), (memory.index, memory.scale)):
            if part is None:
                continue
            its_region, number = state.values.get(part, (None, None))
            if its_region is not None:
                if region is not None or scale != 1:
                    return None
                region = its_region
            total = None if total is None or number is None else total + number * scale
        return region, total

    # --- Accesses ---------------------------------------------------------------------------------------------------

    def check(self, item: Instruction, state: State) -> None:
        for spec, operand in zip(item.row.operands, item.operands, strict=True):
            if not isinstance(operand, Memory) or spec.role == "a" or operand.label is not None:
                continue
            first = Memory(operand.base, disp=operand.disp) if spec.sibmem else operand
            found = None if spec.index_bits else self.address(first, state)
            region, offset = found or (None, None)
            if region is None:
                continue
            size, offsets = self._extent(item, spec, operand, offset, state)
            if size is None or not offsets:
                if region.size_bytes is not None:
                    self.unknown[item] = None
                continue
            goals = [(goal, start) for start in offsets for goal in region.goals(start, size)]
            wrong = [(goal, start) for goal, start in goals if not state.known.proves(goal)]
            for goal, start in wrong:
                numbers = state.known.refutes(goal)
                if numbers is not None:
                    raise self._outside(item, region, start, size, numbers)
            (self.unknown if wrong else self.shown)[item] = None

    def _extent(self, item: Instruction, spec: Any, operand: Memory, offset: Polynomial | None,
                state: State) -> tuple[Polynomial | None, list[Polynomial]]:
        """How many bytes an access touches in one piece, and where such pieces begin: of a tile the first row and the
        last, between which the others lie. None, or no place, for what is not known."""
        if not spec.sibmem:
            bytes_ = (spec.broadcast_bits if operand.broadcast else spec.memory_bits) // 8
            return self._bytes(item, spec, operand, bytes_, state), [] if offset is None else [offset]
        shape = self.shapes.get(item)
        stride = Polynomial.of(0) if operand.index is None else self.number(operand.index, state)
        if shape is None or offset is None or stride is None:
            return None, []
        return Polynomial.of(shape[1]), [offset, offset + stride * operand.scale * (shape[0] - 1)]

    def _bytes(self, item: Instruction, spec: Any, operand: Memory, bytes_: int, state: State) -> Polynomial | None:
        """How many bytes from its address on an access touches; None where lanes are chosen that are not known."""
        if item.mask is None or operand.broadcast:
            return Polynomial.of(bytes_)
        on = state.lanes.get(item.mask)
        return None if on is None or item.row.scalar else on * lane_bytes(item)

    def _outside(self, item: Instruction, region: Region, offset: Polynomial, size: Polynomial,
                 numbers: dict[Symbol, int]) -> AssemblyError:
        start, bytes_ = (self._at(p, numbers) for p in (offset, size))
        named = sorted(s for s in {*offset.symbols, *size.symbols, *region.symbols} if s in numbers)
        where = ", ".join(f"{s.name} = {numbers[s]}" for s in named)
        found = f"bytes {start} to {start + bytes_ - 1}" + (f" where {where}" if where else "")
        return AssemblyError("footprint", f"{item.row.mnemonic} reaches outside {region.name}", item.location, found,
                             region.described({s: numbers.get(s, 1) for s in region.symbols}))

    @staticmethod
    def _at(polynomial: Polynomial, numbers: dict[Symbol, int]) -> int:
        return polynomial.value({s: numbers.get(s, 1) for s in polynomial.symbols})

