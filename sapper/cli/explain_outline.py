"""`sapper explain` for targets whose own assembler gives registers: loops, opcodes, and what the assembler says.

Enters: a compiled kernel. Leaves: facts as plain data (`--json` prints them), or text. Holds: nothing is run;
cycles are lower bounds, from throughputs (targets/ptx/costs.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .console import console as report_console
from .explain import by_hand_lines, print_code, sources_of, span
from .kernels import Found

COMMONEST = 6
"""So many opcodes of a loop stand in its line."""


def outline_facts(found: Found, compiled: Any, target: Any) -> dict[str, Any]:
    """What is known of a kernel's code, as JSON takes it. assembled: see codegen.outline.assembled."""
    from ..codegen.outline import assembled, outline

    outlined = outline(compiled.made.machine, target)
    shown = sources_of(found.kernel, [(row.location.file, row.location.line) for row in outlined.rows if row.location])
    number_of = {source["file"]: number for number, source in enumerate(shown)}
    rows = [{
        "place": row.place, "offset": row.place, "text": row.text, "labels": row.labels, "registers": "", "count": None,
        "source": row.location and number_of[row.location.file], "line": row.location and row.location.line,
    } for row in outlined.rows]
    hottest = outlined.hottest()
    loops = [{
        "label": loop.label, "depth": loop.depth, "innermost": loop.innermost, "first": loop.first, "last": loop.last,
        "instructions": loop.instructions, "opcodes": loop.opcodes, "hottest": loop is hottest,
        "lines": [[number_of[file], line] for file, line in loop.lines], "cycles": loop.cycles, "bound": loop.bound,
        "units": loop.units, "operations": loop.operations, "loaded_bytes": loop.loaded_bytes,
        "stored_bytes": loop.stored_bytes,
    } for loop in outlined.loops]
    return {"kernel": found.name, "name": outlined.name, "target": target.name, "available": target.registers,
            "assembled": assembled(compiled.text(), target), "sources": shown, "rows": rows, "loops": loops,
            "registers": []}


def print_outline(facts: Mapping[str, Any], loop: str | None, everything: bool) -> None:
    """The report in the terminal. loop: the label of the loop whose code is shown; of the deepest the longest for None.
    """
    console = report_console()
    console.print(f"[bold]{facts['name']}[/] for {facts['target']}: {len(facts['rows'])} instructions of text",
                  soft_wrap=True)
    for line in (*by_hand_lines(facts), *assembled_lines(facts)):
        console.print(line, markup=False, soft_wrap=True)
    console.print()
    console.print(_loop_table(facts))
    chosen = next((x for x in facts["loops"] if (x["label"] == loop if loop else x["hottest"])), None)
    print_code(console, facts, None if everything else chosen)


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
    for column in ("loop", "depth", "lines", "instr", "cycles", "bound by", "opcodes"):
        table.add_column(column, justify="right" if column in ("depth", "instr", "cycles") else "left",
                         no_wrap=column != "opcodes")
    for loop in facts["loops"]:
        table.add_row(loop["label"], str(loop["depth"]), span(loop["lines"]), str(loop["instructions"]),
                      f"{loop['cycles']:.1f}", loop["bound"], counts_text(loop["opcodes"], COMMONEST),
                      style="bold" if loop["hottest"] else "")
    return table
