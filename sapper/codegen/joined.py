"""Registers joined by copies: classes of nodes that share one place, so that the copies between them vanish.

Enters: a function with its flow and live ranges. Leaves: `Classes`. Holds: nodes are in one class only if copies join
them and their ranges have no point in common; a class is known by its lowest node, its root. Copies in inner loops
are looked at first.
"""

from __future__ import annotations

from functools import cached_property

from .liveness import Flow, Ranges, analyse
from .machine import Instruction, MachineFunction, Memory
from .row_facts import Abi, facts_table


class Classes:
    """The classes of a function's registers.

    parent: leads each node towards its root. points: the range of the class of each root. members: of each root whose
    class has several. hints: for each node others whose register would make a copy vanish. copies: places of copies of
    all that anyone looks at.
    """

    def __init__(self, function: MachineFunction, abi: Abi) -> None:
        self.abi = abi
        self.facts = facts_table(abi)
        self.body = function.body
        self.flow: Flow = analyse(function, abi)
        self.ranges = Ranges(self.flow, sum(len(numbers) for numbers in abi.registers.values()))
        nodes = self.flow.nodes
        self.parent = list(range(len(nodes)))
        self.members: dict[int, list[int]] = {}
        self.hints: dict[int, list[int]] = {}
        for node in range(self.flow.physical, len(nodes)):
            hint = nodes[node].hint  # type: ignore[union-attr]
            if hint is not None:
                self.hints[node] = [self.flow.node_of[(hint.kind, hint.number)]]  # type: ignore[index]
        self.join()

    def reordered(self, start: int, order: list[int], block: int) -> None:
        """Follow instructions of a block that took another order: see Flow.reorder. It may not part what is joined."""
        self.flow.reorder(start, order)
        self.ranges.renew(block)
        self.__dict__.pop("mentions", None)
        self.__dict__.pop("definitions", None)

    def find(self, node: int) -> int:
        """The root of a node."""
        parent = self.parent
        while parent[node] != node:
            node = parent[node]
        return node

    def of(self, root: int) -> list[int]:
        """The nodes of a class."""
        return self.members.get(root) or [root]

    def separate(self, root: int) -> None:
        """Every node of the class is one by itself from now on."""
        for member in self.members.pop(root, ()):
            self.parent[member] = member
            self.points[member] = self.ranges.points[member]

    @cached_property
    def mentions(self) -> list[list[int]]:
        """For each node the places that name it, in order."""
        return self._places_in(self.flow.uses, self.flow.changes, self.flow.writes)

    @cached_property
    def definitions(self) -> list[list[int]]:
        """For each node the places that write it, in order."""
        return self._places_in(self.flow.changes, self.flow.writes)

    def _places_in(self, *named: list[tuple[int, ...]]) -> list[list[int]]:
        """For each node the places, in order, at which one of the lists has it; these have an item for each place."""
        found: list[list[int]] = [[] for _ in self.flow.nodes]
        for place, groups in enumerate(zip(*named, strict=True)):
            for group in groups:
                for node in group:
                    places = found[node]
                    if not places or places[-1] != place:
                        places.append(place)
        return found

    @cached_property
    def block_of(self) -> list[int]:
        """For each place its block."""
        found: list[int] = []
        starts = self.flow.block_start
        for block in range(len(starts) - 1):
            found += [block] * (starts[block + 1] - starts[block])
        return found

    def bits(self, node: int) -> int:
        """The most bits that any row reads or writes of a node; addresses count in full."""
        if node < self.flow.physical:
            return self.abi.full_bits.get(self.flow.kinds[self.flow.kind_of[node]], 0)
        register = self.flow.nodes[node]
        most = 0
        for place in self.mentions[node]:
            item = self.body[place]
            assert isinstance(item, Instruction)
            facts = self.facts[item.row]
            if item.mask is register:
                most = max(most, 64)
            for operand, width in zip(item.operands, facts.bits, strict=True):
                if operand is register:
                    most = max(most, width)
                elif type(operand) is Memory and (operand.base is register or operand.index is register):
                    # An index vector is as wide as the row's vectors.
                    most = max(most, 64 if register.kind == "gpr" else max(facts.bits))
        return most

    def _copies_all(self, place: int, target: int, source: int) -> bool:
        """A copy of fewer bits than the register has is only a copy if nobody looks at the rest."""
        flow = self.flow
        if flow.kind_of[target] != flow.kind_of[source]:
            return False
        bits = self.facts[self.body[place].row].move_bits  # type: ignore[union-attr]
        return bits >= self.abi.full_bits[flow.kinds[flow.kind_of[target]]] or \
            max(self.bits(target), self.bits(source)) <= bits

    def join(self) -> None:
        """Join what can be; what is joined already stays so."""
        flow, parent = self.flow, self.parent
        self.points = points = self.ranges.points[:]
        for root, nodes in self.members.items():
            for node in nodes:
                points[root] |= points[node]
        self.copies: set[int] = set()
        block_of, weight = self.block_of, flow.weight
        for place in sorted(flow.moves, key=lambda p: (-weight[block_of[p]], p)):
            target, source = flow.writes[place][0], flow.uses[place][0]
            if not self._copies_all(place, target, source):
                continue
            self.copies.add(place)
            target, source = self.find(target), self.find(source)
            if target == source:
                continue
            if target < flow.physical or source < flow.physical or points[target] & points[source]:
                for node, other in ((target, source), (source, target)):
                    if node >= flow.physical and other not in self.hints.setdefault(node, []):
                        self.hints[node].append(other)
                continue
            first, second = min(target, source), max(target, source)
            parent[second] = first
            points[first] |= points[second]
            self.members.setdefault(first, [first]).extend(self.members.pop(second, [second]))
            if second in self.hints:
                self.hints.setdefault(first, []).extend(self.hints.pop(second))
