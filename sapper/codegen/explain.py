"""What finished code does to the processor: bounds of its loops, its registers over time, where each piece comes from.

Enters: a `MachineFunction` after allocation, its target, and how often each block ran where that is known. Leaves: an
`Explanation`, plain data for the command line. Holds: everything is derived from the rows and their costs; nothing
here knows an instruction by name.

A loop's iteration takes at least as long as
    ports      the busiest set of execution ports needs for what only they can do
    latency    the longest chain from one iteration to the next needs, memory left out
    front end  the instructions need to enter
so the largest of the three is the bound. They assume that every access hits L1 and every branch is foreseen. With
counts a block weighs what it ran per pass of the loop; without, each block of a loop is taken to run once.

Source for the bound on ports: each set of ports has to do what no other port can; the busiest set decides (P. Hall's
theorem; as in A. Abel and J. Reineke, "uops.info", ASPLOS 2019, section 4.6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..ir.nodes import Location
from ..targets import FAMILIES, module_of
from .compile import encoded, rules_of, style_of
from .liveness import Ranges, analyse
from .machine import Instruction, Label, MachineFunction, Memory, Register
from .print import local_label
from .row_facts import READ, WRITE, RowFacts, facts_table

_ITERATIONS = 64
"""So many passes show how a chain grows: longer cycles than that through different registers are not met."""
_FLAGS = -1


@dataclass(slots=True)
class Row:
    """One instruction. place: in the body. offset: in the code. block: which. registers: a letter for each column of
    `Explanation.registers`: `.` free, `|` holds a value, `r` read, `w` written, `x` both.
    """

    place: int
    offset: int
    text: str
    comment: str
    location: Location | None
    block: int
    registers: str
    labels: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Loop:
    """One loop. All figures are for one iteration. depth: 1 for an outermost one. first, last: places of its rows.

    passes: how often it ran in all, where that is known. uops: operations as the front end counts them. ports: cycles
    that each port is busy, when the work is shared out best. chain: places of the longest chain. loaded_bytes,
    stored_bytes: of memory operands, masks taken as full. operations: on floats. pressure: most registers wanted, by
    kind. lines: source lines that it comes from.
    """

    label: str
    depth: int
    innermost: bool
    blocks: list[int]
    first: int
    last: int
    instructions: float
    uops: float
    ports: dict[str, float]
    port_cycles: float
    latency_cycles: float
    front_end_cycles: float
    chain: list[int]
    loaded_bytes: float
    stored_bytes: float
    operations: float
    pressure: dict[str, int]
    lines: list[tuple[str, int]]
    passes: int | None = None

    @property
    def cycles(self) -> float:
        return max(self.port_cycles, self.latency_cycles, self.front_end_cycles)

    @property
    def bound(self) -> str:
        """Which of the three holds."""
        busiest = max(self.ports, key=lambda p: self.ports[p], default="")
        candidates = [(self.port_cycles, f"ports ({busiest})"), (self.latency_cycles, "latency"),
                      (self.front_end_cycles, "front end")]
        return max(candidates, key=lambda c: c[0])[1]


@dataclass(slots=True)
class Explanation:
    """A function explained. model: whose costs. registers, kinds: columns, in order. available: registers of each kind.

    pressure: the most that are wanted at one place. block_counts: how often each block ran in one call, if counted.
    block_cycles: the bound for one run of each block by itself.
    """

    name: str
    target: str
    model: str
    code_bytes: int
    rows: list[Row]
    loops: list[Loop]
    registers: list[str]
    kinds: list[str]
    available: dict[str, int]
    pressure: dict[str, int]
    statistics: dict[str, int]
    block_cycles: list[float]
    block_counts: list[int] | None = None

    def hottest(self) -> Loop | None:
        """The innermost loop with the most cycles where they were counted; or else, of the deepest, the one that does
        most in a pass (operations, bytes, cycles), as tails do less."""
        inner = [loop for loop in self.loops if loop.innermost]
        if self.block_counts is not None:
            return max(inner, key=lambda loop: loop.cycles * (loop.passes or 0), default=None)
        return _deepest(inner)

    def call_cycles(self) -> float | None:
        """The bound for one whole call: innermost loops by iterations, other blocks by themselves."""
        if self.block_counts is None:
            return None
        inner = [loop for loop in self.loops if loop.innermost]
        inside = {block for loop in inner for block in loop.blocks}
        total = sum(loop.cycles * (loop.passes or 0) for loop in inner)
        return total + sum(cycles * count for block, (cycles, count) in enumerate(
            zip(self.block_cycles, self.block_counts, strict=True)) if block not in inside)


def _deepest(inner: list[Loop]) -> Loop | None:
    return max(inner, key=lambda loop: (loop.depth, loop.operations, loop.loaded_bytes + loop.stored_bytes,
                                        loop.cycles), default=None)


class Unexplained(Exception):
    """Code of which no bounds can be given: the message says why."""


def costs_of(target: Any) -> Any:
    """The costs of the target's processor. Raises Unexplained."""
    try:
        return module_of(target.family, "costs").model_of(target)
    except ModuleNotFoundError:
        raise Unexplained(f"target {target.name}: found no table of what its instructions cost; expected "
                          f"{FAMILIES[target.family].replace('.', '/')}/costs.py") from None


def explain(
    function: MachineFunction, target: Any, statistics: Mapping[str, int] | None = None,
    block_counts: Sequence[int] | None = None,
) -> Explanation:
    """Explain a finished function. block_counts: how often each of its blocks (liveness.blocks_of) ran.

    Raises Unexplained for a target without costs.
    """
    return _Explainer(function, target, block_counts).explanation(dict(statistics or {}))


def hottest_loop(function: MachineFunction, target: Any) -> tuple[Loop | None, str]:
    """The hottest loop of a finished function that was not run, and whose costs its cycles are: what `explain` gives,
    where nothing else of it is wanted. Raises Unexplained for a target without costs."""
    explainer = _Explainer(function, target, None)
    return _deepest([loop for loop in explainer.loops(inner=True) if loop.innermost]), explainer.costs.MODEL


def register_map(function: MachineFunction, target: Any) -> tuple[list[str], dict[int, str]]:
    """The registers that finished code touches, in order, and for each instruction, by its place in the body, a letter
    for each of them (see `Row`)."""
    names = module_of(target.family, "registers")
    file = rules_of(target).register_file(target)
    flow = analyse(function, file)
    ranges = Ranges(flow, sum(len(numbers) for numbers in file.registers.values()))
    columns = touched_registers(flow, file, [p for p, i in enumerate(function.body) if isinstance(i, Instruction)])
    spelled = [flow.nodes[node] for node in columns]
    return ([str(names.register_name(r.kind, r.number, file.full_bits[r.kind])) for r in spelled],
            {place: register_letters(flow, ranges, columns, place)
             for place, item in enumerate(function.body) if isinstance(item, Instruction)})


def touched_registers(flow: Any, file: Any, places: Iterable[int]) -> list[int]:
    """Nodes of the registers that the code touches, by kind and number; the stack pointer is left out."""
    touched: set[int] = set()
    for place in places:
        touched.update(flow.uses[place], flow.writes[place], flow.changes[place])
    touched.discard(flow.node_of.get(file.stack_pointer, -1))
    return sorted(touched, key=lambda n: (flow.kind_of[n], flow.nodes[n].number))


def register_letters(flow: Any, ranges: Any, columns: Iterable[int], place: int) -> str:
    """What the instruction at a place does with each register of `columns`."""
    read = {*flow.uses[place], *flow.changes[place]}
    written = {*flow.writes[place], *flow.changes[place]}
    letters = []
    for node in columns:
        if node in read:
            letters.append("x" if node in written else "r")
        elif node in written:
            letters.append("w")
        else:
            letters.append("|" if ranges.points[node] >> 2 * place & 3 else ".")
    return "".join(letters)


@dataclass(slots=True)
class _Effect:
    """What one instruction needs. sources: (node, cycles until the result). targets: nodes that it writes. vector_bits:
    of its widest vector, 0 if it has none."""

    sources: list[tuple[int, float]]
    targets: tuple[int, ...]
    uses: list[tuple[tuple[str, ...], float]]
    uops: int
    loaded_bytes: float
    stored_bytes: float
    operations: int
    vector_bits: int


class _Effects(dict[int, _Effect]):
    """Of instructions by their places, each found when it is first asked for."""

    def __init__(self, find: Callable[[int], _Effect]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, place: int) -> _Effect:
        self[place] = found = self._find(place)
        return found


class _Explainer:
    def __init__(self, function: MachineFunction, target: Any, block_counts: Sequence[int] | None) -> None:
        self.function = function
        self.target = target
        self.costs = costs_of(target)
        self.abi = rules_of(target).register_file(target)
        self.flow = analyse(function, self.abi)
        allocatable = sum(len(numbers) for numbers in self.abi.registers.values())
        self.ranges = Ranges(self.flow, allocatable)
        self.facts = facts_table(self.abi)
        self.counts = None if block_counts is None else list(block_counts)
        self.block_of: list[int] = []
        for block in range(len(self.flow.block_start) - 1):
            self.block_of += [block] * (self.flow.block_start[block + 1] - self.flow.block_start[block])
        self.moves = set(self.flow.moves)
        self.effects = _Effects(self._effect_at)

    def explanation(self, statistics: dict[str, int]) -> Explanation:
        columns = touched_registers(self.flow, self.abi, [
            place for place, item in enumerate(self.function.body) if isinstance(item, Instruction)])
        code = encoded(self.function, self.target, checked=False)
        loops = self.loops()
        pressure = {kind: max(row, default=0)
                    for kind, row in zip(self.flow.kinds, self.ranges.pressure, strict=True)
                    if kind in self.abi.registers}
        block_cycles = [self._bounds(self._places([block]), {block: 1.0})[1] for block in range(self._block_count())]
        names = [self._register_name(node) for node in columns]
        kinds = [self.flow.kinds[self.flow.kind_of[node]] for node in columns]
        available = {kind: len(numbers) for kind, numbers in self.abi.registers.items() if numbers}
        return Explanation(
            self.function.name, self.target.name, self.costs.MODEL, code.code_bytes,
            self._rows(columns, code.offsets), loops, names, kinds, available, pressure, statistics, block_cycles,
            self.counts)

    def loops(self, inner: bool = False) -> list[Loop]:
        """inner: only those with no loop inside."""
        found = self.flow.loops
        return [self._loop(header, blocks, found) for header, blocks in sorted(found.items()) if not inner or not any(
            others < blocks for others in found.values())]

    def _block_count(self) -> int:
        return len(self.flow.block_start) - 1

    def _places(self, blocks: Iterable[int]) -> list[int]:
        starts = self.flow.block_start
        return [p for block in sorted(blocks) for p in range(starts[block], starts[block + 1])
                if isinstance(self.function.body[p], Instruction)]

    # ---- one instruction

    def _effect_at(self, place: int) -> _Effect:
        before = self.function.body[place - 1] if place else None
        item = self._item(place)
        return self._effect(place, item, self.facts[item.row],
                            self.facts[before.row] if isinstance(before, Instruction) else None)

    def _effect(self, place: int, item: Instruction, facts: RowFacts, previous: RowFacts | None) -> _Effect:
        row = item.row
        loaded = stored = 0
        addresses: set[int] = set()
        for operand, form, how in zip(item.operands, row.operands, facts.access, strict=True):
            if isinstance(operand, Memory):
                bits = form.broadcast_bits if operand.broadcast else form.memory_bits
                if form.index_bits:  # one access for each lane of the data
                    bits *= max((o.bits for o in row.operands if o.kind == "vec"), default=bits) // bits
                loaded += bits if how & READ else 0
                stored += bits if how & WRITE else 0
                addresses |= {self.flow.node_of[part] for part in (operand.base, operand.index)
                              if part is not None}
        latency = 0.0 if place in self.moves else float(self.costs.latency_of(row))
        targets = self.flow.writes[place] + self.flow.changes[place] + ((_FLAGS,) if facts.writes_flags else ())
        sources = [(node, latency) for node in self.flow.uses[place] + self.flow.changes[place]
                   if node not in addresses or node in self._registers(item)]
        if facts.reads_flags:
            sources.append((_FLAGS, latency))
        if loaded:
            kinds = [self.flow.kinds[self.flow.kind_of[node]] for node in targets if node >= 0]
            arrives = self.costs.LOAD_LATENCY.get(kinds[0] if kinds else "gpr", 0)
            after = 0.0 if facts.move_bits else latency
            sources += [(node, arrives + after) for node in sorted(addresses)]
        elif not stored:
            sources += [(node, latency) for node in sorted(addresses)]  # the address itself is the result
        joined = facts.reads_flags and facts.flow != 0 and previous is not None and previous.writes_flags
        uses = [] if place in self.moves else self.costs.uses_of(row, loaded, stored)
        vector_bits = max((o.bits for o in row.operands if o.kind == "vec"), default=0)
        # Where these are not fused, what loads and computes enters as two, if the address has an index.
        parted = vector_bits and loaded and len(uses) > 1 and not self.target.fuses_indexed and any(
            isinstance(o, Memory) and o.index is not None and not form.index_bits
            for o, form in zip(item.operands, row.operands, strict=True))
        return _Effect(sources, targets, uses, 0 if joined else 2 if parted else 1, loaded / 8, stored / 8,
                       self.costs.operations_of(row), vector_bits)

    def _registers(self, item: Instruction) -> set[int]:
        """The nodes of operands that are registers themselves, and of the mask."""
        parts = [o for o in [*item.operands, item.mask] if isinstance(o, Register)]
        return {self.flow.node_of[part] for part in parts}

    # ---- loops

    def _loop(self, header: int, blocks: set[int], loops: Mapping[int, set[int]]) -> Loop:
        inside = [h for h, others in loops.items() if h != header and others < blocks]
        depth = 1 + sum(header in others and h != header and blocks <= others for h, others in loops.items())
        passes = None if self.counts is None else self.counts[header]
        weights = {block: 1.0 if self.counts is None or not passes else self.counts[block] / passes for block in blocks}
        places = self._places(blocks)
        ports, port_cycles, uops = self._port_bound(places, weights)
        latency, chain = (0.0, []) if inside else self._chain(places)
        locations = [item.location for p in places if (item := self._item(p)).location is not None]
        start = self.flow.block_start[header]
        label = next((i.name for i in self.function.body[start:] if isinstance(i, Label)), "")

        def total(field_name: str) -> float:
            return float(sum(getattr(self.effects[p], field_name) * weights[self.block_of[p]] for p in places))

        return Loop(
            label, depth, not inside, sorted(blocks), places[0], places[-1],
            sum(weights[self.block_of[p]] for p in places), uops, ports, port_cycles, latency,
            uops / self.costs.ISSUE_WIDTH, chain, total("loaded_bytes"), total("stored_bytes"), total("operations"),
            {kind: max(row[p] for p in places) for kind, row in zip(self.flow.kinds, self.ranges.pressure, strict=True)
             if kind in self.abi.registers},
            sorted({(at.file, at.line) for at in locations if at is not None}), passes)

    def _item(self, place: int) -> Instruction:
        item = self.function.body[place]
        assert isinstance(item, Instruction)
        return item

    def _bounds(self, places: list[int], weights: Mapping[int, float]) -> tuple[dict[str, float], float]:
        ports, port_cycles, uops = self._port_bound(places, weights)
        return ports, max(port_cycles, uops / self.costs.ISSUE_WIDTH)

    def _port_bound(self, places: list[int], weights: Mapping[int, float]) -> tuple[dict[str, float], float, float]:
        """(cycles of each port, of the busiest set, uops)."""
        work: dict[tuple[str, ...], float] = {}
        uops = 0.0
        shut = self.costs.SHUT_BY_512 if any(self.effects[place].vector_bits >= 512 for place in places) else ()
        for place in places:
            weight, effect = weights[self.block_of[place]], self.effects[place]
            uops += effect.uops * weight
            for ports, cycles in effect.uses:
                if effect.vector_bits:
                    ports, cycles = _elsewhere(ports, cycles, shut)
                group = tuple(sorted(ports))
                work[group] = work.get(group, 0.0) + cycles * len(group) * weight
        busy = share_out(work)
        return busy, max(busy.values(), default=0.0), uops

    def _chain(self, places: list[int]) -> tuple[float, list[int]]:
        """(cycles by which the longest chain grows in a pass, its places), with as many units as anyone wants."""
        ready: dict[int, tuple[float, tuple[int, int] | None]] = {}  # node -> when, and who made it: (pass, place)
        made_by: dict[tuple[int, int], tuple[int, int] | None] = {}
        half: dict[int, float] = {}
        for number in range(_ITERATIONS):
            for place in places:
                effect = self.effects[place]
                begin, who = 0.0, None
                for node, cycles in effect.sources:
                    when, maker = ready.get(node, (0.0, None))
                    if maker is not None and when + cycles > begin:
                        begin, who = when + cycles, maker
                made_by[number, place] = who
                for node in effect.targets:
                    ready[node] = begin, (number, place)
            if number == _ITERATIONS // 2 - 1:
                half = {node: when for node, (when, _) in ready.items()}
        grown = {node: (when - half.get(node, 0.0)) / (_ITERATIONS // 2) for node, (when, _) in ready.items()}
        slowest = max(sorted(grown), key=lambda node: grown[node], default=None)
        if slowest is None or grown[slowest] <= 0:
            return 0.0, []
        chain: list[int] = []
        at = ready[slowest][1]
        # Back from the end: the way into the cycle, then round it until a place comes again.
        seen: dict[int, int] = {}
        trail: list[int] = []
        while at is not None:
            place = at[1]
            if place in seen:
                chain = trail[seen[place]:]
                break
            seen[place] = len(trail)
            trail.append(place)
            at = made_by[at]
        return grown[slowest], sorted(set(chain or trail))

    # ---- rows and registers

    def _register_name(self, node: int) -> str:
        register = self.flow.nodes[node]
        names = module_of(self.target.family, "registers")
        return str(names.register_name(register.kind, register.number, self.abi.full_bits[register.kind]))

    def _rows(self, columns: list[int], offsets: list[int]) -> list[Row]:
        rows: list[Row] = []
        labels: list[str] = []
        spelled = style_of(self.target).instruction
        for place, item in enumerate(self.function.body):
            if isinstance(item, Label):
                labels.append(item.name)
                continue
            letters = register_letters(self.flow, self.ranges, columns, place)
            rows.append(Row(place, offsets[place], spelled(item, local_label), item.comment, item.location,
                            self.block_of[place], letters, labels))
            labels = []
        return rows


def _elsewhere(ports: tuple[str, ...], cycles: float, shut: tuple[str, ...]) -> tuple[tuple[str, ...], float]:
    """The same work on the ports that are left, if any are."""
    left = tuple(port for port in ports if port not in shut)
    return (left, cycles * len(ports) / len(left)) if left else (ports, cycles)


def share_out(work: Mapping[tuple[str, ...], float]) -> dict[str, float]:
    """Cycles of each port when work (ports that may do it -> port cycles) is shared out so that the busiest has least.

    The busiest set of ports is found first and filled evenly, which its work allows as no part of it is busier; what is
    left is shared out over the other ports. Ports that no work has in common are looked at apart, since the sets of all
    would be many.
    """
    apart: list[tuple[set[str], dict[tuple[str, ...], float]]] = []
    for group, cycles in work.items():
        if cycles > 0:
            ports, together = set(group), {group: cycles}
            for other in [entry for entry in apart if not ports.isdisjoint(entry[0])]:
                apart.remove(other)
                ports |= other[0]
                together |= other[1]
            apart.append((ports, together))
    busy: dict[str, float] = {}
    for _, together in apart:
        busy |= _share_out_joined(together)
    return dict(sorted(busy.items()))


def _share_out_joined(left: dict[tuple[str, ...], float]) -> dict[str, float]:
    """`share_out` of work on ports that hang together."""
    busy: dict[str, float] = {}
    while left:
        unions: set[frozenset[str]] = {frozenset()}
        for group in left:
            unions |= {union | set(group) for union in unions}
        unions.discard(frozenset())
        best: tuple[float, int, tuple[str, ...]] = (-1.0, 0, ())
        for found in unions:
            inside = sum(cycles for group, cycles in left.items() if found.issuperset(group))
            best = max(best, (inside / len(found), len(found), tuple(sorted(found))))
        level, _, union = best
        busy.update(dict.fromkeys(union, level))
        rest: dict[tuple[str, ...], float] = {}
        for group, cycles in left.items():
            if not set(group) <= set(union):
                remaining = tuple(port for port in group if port not in union)
                rest[remaining] = rest.get(remaining, 0.0) + cycles
        left = rest
    return busy
