"""`sapper explain` for targets whose own assembler gives registers: loops, opcodes, and what the assembler says.

Enters: a compiled kernel, and the arguments of a call if there are any. Leaves: facts as plain data (`--json` prints
them), or text. Holds: cycles are lower bounds, from throughputs (targets/ptx/costs.py); what a call does is counted on
the emulator; registers are those of the text, in its order, and the assembler's own count stands beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .console import console as report_console
from .console import print_whole
from .errors import CommandError
from .explain import measured_lines, print_code, remarks, sources_of, span
from .explain_emulated import Emulated, emulate_call, near_letters
from .kernels import Found

COMMONEST = 6
"""So many opcodes of a loop stand in its line."""
COUNTERS = ("shared_accesses", "shared_cycles", "shared_ideal", "global_accesses", "global_sectors", "global_ideal")
NEAR = "near"
"""Kind of the columns that are buffers of shared memory."""


def outline_facts(found: Found, compiled: Any, target: Any, why_not: str, arguments: Any) -> dict[str, Any]:
    """What is known of a kernel's code, as JSON takes it. why_not: there are no arguments of a call. assembled: see
    codegen.outline.assembled.

    registers, kinds: columns, of registers and, after a run, of buffers of shared memory. lives: of each column, the
    registers of the text that lie there, as [first place, last place, name].
    """
    from ..codegen.outline import assembled, costs_of, outline

    machine = compiled.made.machine
    banks = bank_facts(compiled)
    said = {fact["place"]: fact["said"] for fact in banks if fact["cycles"] != fact["phases"]}
    outlined = outline(machine, target)
    emulated = None
    if not why_not:
        try:
            emulated = emulate_call(found.kernel, compiled, target, arguments)
        except CommandError as error:
            why_not = str(error)
    costs = costs_of(target)
    shown = sources_of(found.kernel, [(row.location.file, row.location.line) for row in outlined.rows if row.location])
    number_of = {source["file"]: number for number, source in enumerate(shown)}
    columns, letters = outlined.lives.columns, outlined.lives.letters
    buffers = [] if emulated is None else [list(buffer) for buffer in machine.near_buffers]
    near, held_bytes = near_letters(machine, target, emulated) if emulated else ([""] * len(letters), [])
    rows = [{
        "place": row.place, "offset": row.place, "text": row.text, "labels": row.labels,
        "registers": near[row.place] + letters[row.place], "wanted": row.wanted, "limit": row.limit,
        "source": row.location and number_of[row.location.file], "line": row.location and row.location.line,
        **(_counted(emulated, row.place) | {"near_bytes": held_bytes[row.place]} if emulated else
           {"count": None, "comment": said.get(row.place, "")}),
    } for row in outlined.rows]
    hottest = outlined.hottest()
    loops = [{
        "label": loop.label, "depth": loop.depth, "innermost": loop.innermost, "first": loop.first, "last": loop.last,
        "instructions": loop.instructions, "opcodes": loop.opcodes, "hottest": loop is hottest,
        "lines": [[number_of[file], line] for file, line in loop.lines], "cycles": loop.cycles, "bound": loop.bound,
        "units": loop.units, "operations": loop.operations, "loaded_bytes": loop.loaded_bytes,
        "stored_bytes": loop.stored_bytes, "wanted": loop.wanted,
        "passes": None if emulated is None else _runs(
            emulated, next(row.place for row in outlined.rows if row.place > loop.first)),
    } for loop in outlined.loops]
    return {
        "kernel": found.name, "name": outlined.name, "target": target.name, "model": costs.MODEL,
        "available": target.registers, "wanted": [list(pair) for pair in outlined.most],
        "assembled": assembled(compiled.text(), target), "sources": shown, "rows": rows, "loops": loops,
        "registers": [name for name, *_ in buffers] + [f"{column.kind}{n}" for n, column in enumerate(columns)],
        "kinds": [NEAR] * len(buffers) + [column.kind for column in columns],
        "lives": [[] for _ in buffers] + [
            [[first // 2, last // 2, outlined.names[register]] for first, last, register in column.lives]
            for column in columns],
        "banks": banks, "near_bytes": machine.near_bytes,
        "near_buffers": [list(buffer) for buffer in machine.near_buffers],
        "model_cycles": None if emulated is None else _call_cycles(machine, target, emulated),
        "measured": {"missing": why_not} if emulated is None else {"emulated": {
            "instructions": sum(emulated.total.instructions.values()),
            **{name: getattr(emulated.total, name) for name in COUNTERS}}},
    }


def bank_facts(compiled: Any) -> list[dict[str, Any]]:
    """Of each access of shared memory what is proved of its banks: cycles for a warp (None: nothing is), the phases
    that it has in any case, and why. Nothing runs for it."""
    from ..emulate.conflicts import shared_accesses
    from ..targets.ptx.text import first_line

    text = compiled.text()
    first = first_line(text, compiled.made.machine)
    return [{"place": access.line - first, "cycles": access.proof and access.proof.total,
             "phases": len(access.proof.cycles) if access.proof else 0, "masked": access.masked,
             "said": str(access.proof) if access.proof else access.reason} for access in shared_accesses(text)]


def _runs(emulated: Emulated, place: int) -> int:
    counted = emulated.places.get(place)
    return 0 if counted is None else int(counted.runs)


def _counted(emulated: Emulated, place: int) -> dict[str, Any]:
    """Of one instruction: how often warps ran it, its counters of memory, and what they say against it."""
    counted = emulated.places.get(place)
    if counted is None:
        return {"count": 0, "comment": ""}
    notes = []
    for taken, least, what in ((counted.shared_cycles, counted.shared_ideal, "cycles: banks conflict"),
                               (counted.global_sectors, counted.global_ideal, "sectors that its bytes need")):
        if taken > least:
            notes.append(f"{taken / least:.1f} times the {what}" if least else f"{taken} {what}")
    return {"count": counted.runs, "comment": "; ".join(notes),
            "memory": {name: getattr(counted, name) for name in COUNTERS if getattr(counted, name)}}


def _call_cycles(machine: Any, target: Any, emulated: Emulated) -> float:
    """Of one SM for the whole call, at best: those of its busiest unit."""
    from ..codegen.outline import costs_of

    costs = costs_of(target)
    units: dict[str, float] = {}
    for place, counted in emulated.places.items():
        cost = costs.cost_of_item(machine.body[place], target.name)
        units["issue"] = units.get("issue", 0.0) + counted.runs * cost.issues / costs.SCHEDULERS
        if cost.unit:
            units[cost.unit] = units.get(cost.unit, 0.0) + counted.runs * cost.cycles
    return max(units.values(), default=0.0)


def print_outline(facts: Mapping[str, Any], loop: str | None, everything: bool) -> None:
    """The report in the terminal. loop: the label of the loop whose code is shown; of the deepest the longest for None.
    """
    console = report_console()
    console.print(f"[bold]{facts['name']}[/] for {facts['target']}: {len(facts['rows'])} instructions of text",
                  soft_wrap=True)
    for line in (*remarks(facts), registers_line(facts), *bank_lines(facts), *assembled_lines(facts),
                 *measured_lines(facts)):
        console.print(line, markup=False, soft_wrap=True)
    console.print()
    print_whole(console, _loop_table(facts))
    chosen = next((x for x in facts["loops"] if (x["label"] == loop if loop else x["hottest"])), None)
    print_code(console, {**facts, "registers": []}, None if everything else chosen)


def registers_line(facts: Mapping[str, Any]) -> str:
    """How many registers are wanted of those that a thread has, which warps may hand over, and of shared memory."""
    wanted = ", ".join(f"{most} of {limit}" for most, limit in facts["wanted"])
    near = f"; {facts['near_bytes']:,} bytes of shared memory" if facts["near_bytes"] else ""
    return f"registers of 32 bits wanted at once, in the order of the text: {wanted}{near}"


def bank_lines(facts: Mapping[str, Any]) -> list[str]:
    """What is proved of bank conflicts, in sentences."""
    accesses = facts["banks"]
    others = [fact["said"] for fact in accesses if fact["cycles"] != fact["phases"]]
    if not accesses:
        return []
    lines = [f"shared memory: {len(accesses) - len(others)} of {len(accesses)} instructions are proved free of bank "
             "conflicts"]
    return lines + [f"{others.count(said)} of them: {said}" for said in dict.fromkeys(others)]


def assembled_lines(facts: Mapping[str, Any]) -> list[str]:
    """What the assembler said, in sentences."""
    made = facts["assembled"]
    if "missing" in made:
        return [f"registers are not known: {made['missing']}"]
    lines = [f"{made['assembler']}: {made['registers']} of {facts['available']} registers, {made['spilled_bytes']} "
             f"bytes spilled, {made['instructions']} instructions of machine code"]
    if made["opcodes"] is None:
        return [*lines, "its opcodes are not known: found no nvdisasm"]
    return [*lines, f"machine code: {counts_text(made['opcodes'], len(made['opcodes']))}"]


def counts_text(counts: Mapping[str, int], most: int) -> str:
    """The commonest of them, in words."""
    pairs = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    rest = sum(number for _, number in pairs[most:])
    return ", ".join([*(f"{number} {name}" for name, number in pairs[:most]), *([f"{rest} others"] if rest else [])])


def _loop_table(facts: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title="loops, one pass of a warp, cycles of an SM at best",
                  title_justify="left", title_style="bold")
    for column in ("loop", "depth", "lines", "instr", "cycles", "bound by", "bytes in", "out", "ops", "regs", "passes",
                   "opcodes"):
        table.add_column(column, justify="left" if column in ("loop", "lines", "bound by", "opcodes") else "right",
                         no_wrap=column != "opcodes")
    for loop in facts["loops"]:
        table.add_row(loop["label"], str(loop["depth"]), span(loop["lines"]), str(loop["instructions"]),
                      f"{loop['cycles']:.1f}", loop["bound"], f"{loop['loaded_bytes']:,}", f"{loop['stored_bytes']:,}",
                      f"{loop['operations']:,}", str(loop["wanted"]),
                      "" if loop["passes"] is None else f"{loop['passes']:,}", counts_text(loop["opcodes"], COMMONEST),
                      style="bold" if loop["hottest"] else "")
    return table
