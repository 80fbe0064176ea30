"""`sapper explain --html`: the report as one page that needs no network.

Enters: the facts of explain.py or explain_outline.py. Leaves: the text of the page: explain.html with the facts in it
as JSON, and what differs between targets that have registers and those whose assembler gives them: see `View`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .explain import measured_lines, remarks
from .explain_outline import assembled_lines, bank_lines, registers_line

_PLACE = "__FACTS__"
COLOURS = {"gpr": "gpr", "vec": "vec", "mask": "mask", "fpr": "mask", "wide": "gpr", "half": "vec", "pred": "mask",
           "near": "near"}
"""Kind of a column -> its colour's name in the page."""


@dataclass(slots=True)
class View:
    """head: one line about the whole. lines: below it. bounds: (title, cycles of each loop), of which the largest
    holds. parts: title and, for each loop, cycles of what a pass is shared out over. columns: (title, key of a loop) of
    what targets have of their own. colours: of the columns of registers. legend: (colour, words)."""

    head: str
    lines: list[str]
    bounds: list[tuple[str, list[float]]]
    parts: tuple[str, list[dict[str, float]]]
    columns: list[tuple[str, str]] = field(default_factory=list)
    colours: list[str] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)


def page(facts: Mapping[str, Any]) -> str:
    """The page. What would end the script that holds the facts is escaped."""
    template = Path(__file__).with_name("explain.html").read_text(encoding="utf-8")
    view = (_outline_view if "assembled" in facts else _register_view)(facts)
    view.colours = [COLOURS[kind] for kind in facts["kinds"]]
    content = json.dumps({**facts, "view": asdict(view)}, separators=(",", ":"))
    return template.replace(_PLACE, content.replace("<", "\\u003c").replace("\u2028", "\\u2028"))


def _register_view(facts: Mapping[str, Any]) -> View:
    """Of code with registers: bounds by ports, latency and front end."""
    wanted = ", ".join(f"{facts['pressure'][kind]} of {count} {kind}" for kind, count in facts["available"].items())
    loops = facts["loops"]
    return View(
        f"for {facts['target']}: {len(facts['rows']):,} instructions, {facts['code_bytes']:,} bytes; registers wanted "
        f"at once: {wanted}; {facts['statistics'].get('spills', 0)} spills; costs of {facts['model']}",
        [*remarks(facts), *measured_lines(facts)],
        [(title, [loop[key] for loop in loops]) for title, key in (
            ("ports", "port_cycles"), ("latency", "latency_cycles"), ("front end", "front_end_cycles"))],
        ("Ports", [loop["ports"] for loop in loops]),
        legend=[("gpr", "general"), ("vec", "vector"), ("mask", "float" if "fpr" in facts["kinds"] else "mask")])


def _outline_view(facts: Mapping[str, Any]) -> View:
    """Of text whose assembler gives registers: bounds by issue slots and the busiest unit of an SM."""
    loops = facts["loops"]
    units = [{name: cycles for name, cycles in loop["units"].items() if name != "issue"} for loop in loops]
    return View(
        f"for {facts['target']}: {len(facts['rows']):,} instructions of text; {registers_line(facts)}; costs: "
        f"{facts['model']}, of an SM, a pass of one warp",
        [*remarks(facts), *bank_lines(facts), *assembled_lines(facts), *measured_lines(facts)],
        [("issue", [loop["units"]["issue"] for loop in loops]),
         ("busiest unit", [max(unit.values(), default=0.0) for unit in units])],
        ("Units", [loop["units"] for loop in loops]), [("registers", "wanted")],
        legend=[("gpr", "64 bits"), ("vec", "32 bits"), ("mask", "predicate"), ("near", "shared memory")])
