"""Loops of assembly by hand are shown to end.

Enters: a piece, its blocks, what each instruction writes. Leaves: nothing, or `AssemblyError` at the last branch of a
loop; and the branches that leave one at equality, which footprint.py shows not to be missed.
Holds: a loop ends if each of its cycles has a branch out of it on a counter that moves by one constant, or by an input
that is at least 1, towards a bound that the loop leaves alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..codegen.machine import Immediate, Instruction, Label, LabelReference, Memory, Register, VirtualRegister
from .build import Assembly
from .errors import AssemblyError
from .polynomial import Known

Equality = tuple[Any, Any, int]
"""A counter, what it is compared with (None: 0), and its step, 1 or -1; the step comes before the comparison."""


class Loops:
    """starts, follow: see blocks_of (codegen/liveness.py). writes_of: the registers that an instruction writes."""

    def __init__(self, assembly: Assembly, starts: list[int], follow: list[list[int]],
                 writes_of: Callable[[Instruction], list[Any]]) -> None:
        self.assembly, self.table, self.body = assembly, assembly.table, assembly.body
        self.starts, self.follow, self.writes_of = starts, follow, writes_of
        self.equalities: dict[int, Equality] = {}

    def check(self) -> None:
        """Raise AssemblyError for a loop that can't be shown to end."""
        self.prove(list(range(len(self.follow))))

    def prove(self, blocks: list[int]) -> None:
        """Show that no path stays among these blocks for ever.

        In each cycle there must be blocks that can be passed only finitely often before the cycle is left; a path that
        stays for ever would have to avoid all of them in the end, so what is left without them is shown the same way.
        """
        for cycle in cycles_of(blocks, self.follow):
            bounded = [block for block in cycle if self.ends(block, set(cycle))]
            if not bounded:
                last = self.body[self.starts[cycle[-1] + 1] - 1]
                found = last.name if isinstance(last, Label) else last.row.mnemonic
                raise AssemblyError(
                    "loop", "this loop can't be shown to end", getattr(last, "location", None), found,
                    "in each round a branch out of it, on a counter that changes by one constant in each round, "
                    "compared with what the loop does not change",
                    "use a.loop(start, stop, step), or jl/jg instead of jne for steps other than 1")
            self.prove([block for block in cycle if block not in bounded])

    def ends(self, block: int, inside: set[int]) -> bool:
        """Whether the branch at a block's end leaves the cycle after finitely many passes of the block."""
        last = self.body[self.starts[block + 1] - 1]
        if isinstance(last, Label) or last.row.control != "branch":
            return False
        target = next(o.name for o in last.operands if isinstance(o, LabelReference))
        jumps = [s for s in self.follow[block] if self.labelled(s, target)]
        leaves = [s for s in self.follow[block] if s not in inside]
        if len(leaves) != 1:
            return False
        code = last.row.mnemonic.removeprefix("j")
        stay = code if leaves[0] not in jumps else _OPPOSITE[code]
        setter = None
        for place in range(self.starts[block], self.starts[block + 1] - 1):
            item = self.body[place]
            if isinstance(item, Instruction) and item.row.flags_written:
                setter = item
        if setter is None:
            return False
        writers: dict[Any, list[tuple[int, Instruction]]] = {}
        for member in inside:
            for place in range(self.starts[member], self.starts[member + 1]):
                item = self.body[place]
                if isinstance(item, Instruction):
                    for register in self.writes_of(item):
                        writers.setdefault(register, []).append((member, item))
        operands = setter.operands
        mnemonic = setter.row.mnemonic
        if mnemonic in ("cmp", "test"):
            first, second = operands[0], operands[1]
            if mnemonic == "test":
                return first == second and self.closes(first, writers, block, inside, stay, setter)
            fixed = isinstance(second, Immediate) or second not in writers
            if fixed and not isinstance(second, Memory):
                return self.closes(first, writers, block, inside, stay, setter)
            return (not isinstance(first, Memory) and first not in writers
                    and self.closes(second, writers, block, inside, _MIRRORED.get(stay, stay),
                                    setter))
        return self.closes(operands[0], writers, block, inside, stay, setter)

    def steady(self, item: Instruction, writers: dict[Any, list[tuple[int, Instruction]]]) -> int | None:
        """2 or -2 for a register that moves up or down by another, which the cycle leaves alone and which holds a copy
        of an input that is at least 1 (the number of workers); else None."""
        if item.row.mnemonic not in ("add", "sub") or not isinstance(item.operands[1], (Register, VirtualRegister)):
            return None
        by = item.operands[1]
        makers = [i for i in self.body if isinstance(i, Instruction) and by in self.writes_of(i)]
        if by in writers or by == item.operands[0] or len(makers) > 1:
            return None
        if makers and (makers[0].row.mnemonic not in self.table.MOVES or makers[0].operands[1] in writers):
            return None
        number = self.assembly.numbers.get(makers[0].operands[1] if makers else by)
        if number is None or not Known(self.assembly.assumed).proves(number - 1):
            return None
        return 2 if item.row.mnemonic == "add" else -2

    def labelled(self, block: int, name: str) -> bool:
        for place in range(self.starts[block], self.starts[block + 1]):
            item = self.body[place]
            if not isinstance(item, Label):
                return False
            if item.name == name:
                return True
        return False

    def closes(self, counter: Any, writers: dict[Any, list[tuple[int, Instruction]]], block: int, inside: set[int],
               stay: str, setter: Instruction) -> bool:
        """Whether a counter moves by one constant in each round, towards the end of the condition to stay."""
        if not isinstance(counter, (Register, VirtualRegister)) or len(writers.get(counter, ())) != 1:
            return False
        member, item = writers[counter][0]
        if any(block in cycle for cycle in cycles_of([b for b in sorted(inside) if b != member], self.follow)):
            return False  # a round may leave it out
        amount = _step(item) or self.steady(item, writers)
        if amount is None or (setter is not item and setter.row.mnemonic not in ("cmp", "test")):
            return False
        if abs(amount) == 1 and stay == "ne":
            # Once in each round, or equality might be stepped over.
            rest = cycles_of([b for b in sorted(inside) if b != block], self.follow)
            if any(member in cycle for cycle in rest):
                return False
            if member == block:
                bound = next((o for o in setter.operands if o != counter), None)
                self.equalities[block] = counter, bound if setter.row.mnemonic == "cmp" else None, amount
            return True
        carries = setter.row.mnemonic not in ("inc", "dec")
        up, down = {"l", "le", "s"}, {"g", "ge", "ns"}
        if setter.row.mnemonic == "cmp":
            up, down = {"l", "le", "b", "be"}, {"g", "ge", "a", "ae"}
        elif carries and setter is item:
            up, down = up | {"ae"}, down | {"ae", "a"}
        return stay in (up if amount > 0 else down)


def cycles_of(blocks: list[int], follow: list[list[int]]) -> list[list[int]]:
    """The strongly connected parts of a graph's blocks that have a cycle, each sorted (R. Tarjan, "Depth-first search
    and linear graph algorithms", 1972)."""
    among = set(blocks)
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    found: list[list[int]] = []
    for root in blocks:
        work = [(root, 0)] if root not in number else []
        while work:
            block, at = work.pop()
            if at == 0:
                number[block] = low[block] = len(number)
                stack.append(block)
            targets = [t for t in follow[block] if t in among]
            for position in range(at, len(targets)):
                target = targets[position]
                if target not in number:
                    work += [(block, position + 1), (target, 0)]
                    break
                if target in stack:
                    low[block] = min(low[block], number[target])
            else:
                if low[block] == number[block]:
                    part = stack[stack.index(block):]
                    del stack[stack.index(block):]
                    if len(part) > 1 or block in targets:
                        found.append(sorted(part))
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[block])
    return sorted(found)


_OPPOSITE = {"o": "no", "b": "ae", "e": "ne", "be": "a", "s": "ns", "p": "np", "l": "ge", "le": "g"}
_OPPOSITE |= {b: a for a, b in _OPPOSITE.items()}
_MIRRORED = {"l": "g", "g": "l", "le": "ge", "ge": "le", "b": "a", "a": "b", "be": "ae", "ae": "be"}


def _step(item: Instruction) -> int | None:
    """The constant by which an instruction moves its register, None if it does something else."""
    mnemonic, operands = item.row.mnemonic, item.operands
    if mnemonic in ("inc", "dec"):
        return 1 if mnemonic == "inc" else -1
    if mnemonic in ("add", "sub") and isinstance(operands[1], Immediate):
        value = operands[1].value if mnemonic == "add" else -operands[1].value
        return value or None
    if mnemonic == "lea" and isinstance(operands[1], Memory):
        memory = operands[1]
        if memory.base == operands[0] and memory.index is None and memory.label is None:
            return memory.disp or None
    return None
