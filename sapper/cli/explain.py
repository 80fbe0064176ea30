"""`sapper explain`: what a kernel's code does to the processor, line by line; the page is explain_page.py's.

Enters: a kernel and what it is compiled for, as text. Leaves: facts as plain data (`--json` prints them), or text.
Holds: with extents for every dimension, and a CPU that runs the target's code, the call is run: blocks are counted, the
call is timed. Without, all figures are the model's, and the facts say why nothing was run.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from .code import Code, Piece, code_for, code_that_ran
from .console import console as report_console
from .console import print_whole, time_text
from .errors import is_told
from .kernels import (
    Found,
    find_kernel,
    find_target,
    kernel_dims,
    parse_extents,
    parse_scalars,
    parse_schedule,
    specialise,
)

REGISTER_COLUMNS = 48
"""So many registers fit beside the instructions on a terminal."""
CONTEXT_LINES = 3


def gather(
    wanted: str, target_name: str | None, static: str | None, dims: str | None, schedule: str | None, run: bool = True,
    scalars: str | None = None,
) -> dict[str, Any]:
    """Everything that is known of a kernel's code, as JSON takes it. scalars: `position=511`, of the call that is
    run."""
    from ..codegen.explain import explain

    found = find_kernel(wanted)
    target = find_target(target_name)
    kernel = found.kernel
    fixed, free = parse_extents(static, dims, kernel)
    chosen, values = parse_schedule(schedule), parse_scalars(scalars, kernel, "set")
    if target.assembler_allocates:
        from .explain_outline import outline_facts

        code = code_for(kernel, target, chosen, fixed, free)
        why_not, arguments = arguments_for(found, fixed, free, values) if run else ("switched off", None)
        return outline_facts(found, code.compiled, target, why_not, arguments) | {"static": fixed, "dims": free} \
            | _by_hand(code) | {"in_order": in_order(kernel, fixed)}
    why_not, profile = "switched off", None
    if run:
        why_not, profile = _profile(found, target, fixed, free, chosen, values)
    code = code_for(kernel, target, chosen, fixed, free)
    if profile is not None:
        code = code_that_ran(code, profile.compiled)
    made = code.compiled.made
    explanation = explain(made.machine, target, made.statistics, None if profile is None else profile.block_counts)
    facts = _facts(explanation, kernel)
    facts["kernel"], facts["static"], facts["dims"] = found.name, fixed, free
    facts |= _by_hand(code) | {"in_order": in_order(kernel, fixed)}
    facts["ranks"] = _ranks(kernel, target, chosen, fixed, free)
    facts["measured"] = {"missing": why_not} if profile is None else _measured(explanation, profile)
    return facts


def in_order(kernel: Any, static: Mapping[str, int]) -> list[dict[str, Any]]:
    """The loops that one worker runs in order because nothing proves their iterations apart: the line of each, the
    tensors in which they may meet, and the lines that write to these."""
    from ..tile.ops import memory_of

    found: list[dict[str, Any]] = []

    def visit(block: Any) -> None:
        for op in block.ops:
            if "meets" in op.attributes:
                stores = [inner for inner in op.walk() if inner.name == "store"]
                found.append({"line": op.location.line, "meets": {
                    name: sorted({s.location.line for s in stores if memory_of(s.operands[0]).name == name})
                    for name in op.attributes["meets"]}})
            elif not op.attributes.get("parallel"):
                for inner in op.blocks:
                    visit(inner)

    visit(kernel.tile_ir(static).body)
    return found


def _by_hand(code: Code) -> dict[str, Any]:
    return {"pieces": [asdict(piece) for piece in code.pieces], "not_by_hand": code.refused}


def _ranks(kernel: Any, target: Any, schedule: Any, static: dict[str, int], dims: dict[str, int]) -> list[Any]:
    """The generated code and the blocks by hand that would fit, the cheapest on paper first; none if none fits."""
    from ..kernels import by_hand as by_hand  # the library's blocks
    from ..tile.schedule import Schedule
    from ..tune.rank import fitting, rank

    base = Schedule.from_json(dict(schedule)) if isinstance(schedule, Mapping) else schedule or Schedule()
    known = specialise(kernel, static, dims)
    blocks = fitting(kernel, target, base, **known)
    return [asdict(r) for r in rank(kernel, target, blocks, base, **known)] if blocks else []


def _profile(
    found: Found, target: Any, static: Mapping[str, int], dims: Mapping[str, int], schedule: Any,
    scalars: Mapping[str, Any],
) -> tuple[str, Any]:
    """(why there is none, the profile of a call)."""
    from ..targets.x86_64.detect import host
    from ..tune.profile import NotProfiled, profile

    lacking = sorted(target.features - host().features)
    why_not, arguments = arguments_for(
        found, static, dims, scalars, f"this CPU has no {', '.join(lacking)}" if lacking else "")
    if why_not:
        return why_not, None
    try:
        return "", profile(found.kernel, arguments, target, static, schedule)
    except NotProfiled as error:
        return str(error), None


def arguments_for(found: Found, static: Mapping[str, int], dims: Mapping[str, int], scalars: Mapping[str, Any],
                  otherwise: str = "") -> tuple[str, Any]:
    """(why there are none, the arguments of a call). scalars: values that are given. otherwise: why none are wanted
    where a shape is given."""
    import numpy

    from ..runtime.cases import arguments_of_shape

    kernel, shape = found.kernel, {**dims, **static}
    missing = [d for d in kernel_dims(kernel) if d not in shape]
    if missing:
        return f"give --shape {','.join(f'{d}=...' for d in missing)} to run it", None
    if otherwise:
        return otherwise, None
    try:
        # The library draws better arguments, where dimensions are all that it asks for.
        if found.entry is not None and set(found.entry.check_shapes[0]) <= set(shape):
            return "", {**found.entry.make_arguments(numpy.random.default_rng(0), shape), **scalars}
        return "", arguments_of_shape(kernel, kernel.tile_ir(), shape, scalars)
    except Exception as error:
        if not is_told(error):
            raise
        return f"no arguments of this shape could be made: {error}", None


def _facts(explanation: Any, kernel: Any) -> dict[str, Any]:
    locations = [row.location for row in explanation.rows if row.location is not None]
    sources = sources_of(kernel, [(at.file, at.line) for at in locations])
    number_of = {source["file"]: number for number, source in enumerate(sources)}
    rows = []
    counts = explanation.block_counts
    for row in explanation.rows:
        at = row.location
        rows.append({
            "place": row.place, "offset": row.offset, "text": row.text, "comment": row.comment, "block": row.block,
            "source": None if at is None else number_of[at.file], "line": None if at is None else at.line,
            "column": None if at is None else at.column, "registers": row.registers, "labels": row.labels,
            "count": None if counts is None else counts[row.block],
        })
    hottest = explanation.hottest()
    loops = [{
        "label": loop.label, "depth": loop.depth, "innermost": loop.innermost, "blocks": loop.blocks,
        "first": loop.first, "last": loop.last, "instructions": loop.instructions, "uops": loop.uops,
        "ports": loop.ports, "port_cycles": loop.port_cycles, "latency_cycles": loop.latency_cycles,
        "front_end_cycles": loop.front_end_cycles, "cycles": loop.cycles, "bound": loop.bound, "chain": loop.chain,
        "loaded_bytes": loop.loaded_bytes, "stored_bytes": loop.stored_bytes, "operations": loop.operations,
        "pressure": loop.pressure, "passes": loop.passes, "hottest": loop is hottest,
        "lines": [[number_of[file], line] for file, line in loop.lines],
    } for loop in explanation.loops]
    return {
        "name": explanation.name, "target": explanation.target, "model": explanation.model,
        "code_bytes": explanation.code_bytes, "statistics": explanation.statistics, "registers": explanation.registers,
        "kinds": explanation.kinds,
        "available": explanation.available, "pressure": explanation.pressure, "model_cycles": explanation.call_cycles(),
        "sources": sources, "rows": rows, "loops": loops,
    }


def sources_of(kernel: Any, places: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
    """The source that the code comes from: the kernel's function, and of other files the lines about those named."""
    wanted: dict[str, set[int]] = {kernel.source_file: set(_function_lines(kernel))}
    for file, line in places:
        wanted.setdefault(file, set()).add(line)
    sources = []
    for file, lines in wanted.items():
        text = [line.rstrip("\n") for line in linecache.getlines(file)]
        shown = sorted({n for line in lines for n in range(line - CONTEXT_LINES, line + CONTEXT_LINES + 1)
                        if 1 <= n <= len(text)} if file != kernel.source_file else lines)
        sources.append({"file": file, "lines": [[n, text[n - 1] if n <= len(text) else ""] for n in shown]})
    return sources


def _function_lines(kernel: Any) -> range:
    import inspect

    try:
        lines, first = inspect.getsourcelines(kernel.python_function)
    except OSError:
        return range(kernel.source_line, kernel.source_line + 1)
    return range(first, first + len(lines))


def _measured(explanation: Any, profile: Any) -> dict[str, Any]:
    """Of the call that was run: time, cycles, and what they say of the model."""
    timing, clock = profile.timing, profile.cycles_per_s
    total = explanation.call_cycles()
    seconds = max(timing.low_s - profile.call_s, 1e-9)
    cycles = seconds * clock
    hottest = explanation.hottest()
    operations = sum(loop.operations * (loop.passes or 0) for loop in explanation.loops if loop.innermost)
    loaded = sum(loop.loaded_bytes * (loop.passes or 0) for loop in explanation.loops if loop.innermost)
    result = {
        "dims": profile.dims, "seconds": seconds, "median_seconds": timing.median_s - profile.call_s,
        "call_seconds": profile.call_s, "spread": timing.spread,
        "clock_hz": clock, "cycles": cycles, "model_cycles": total, "ratio": cycles / total if total else None,
        "operations": operations, "operations_per_second": operations / seconds, "loaded_bytes": loaded,
    }
    if hottest is not None and hottest.passes:
        result |= {"hottest": hottest.label, "hottest_share": hottest.cycles * hottest.passes / total,
                   "cycles_per_pass_at_most": cycles / hottest.passes}
    return result


# ------------------------------------------------------------------------------------------------------- the terminal


def print_report(facts: Mapping[str, Any], loop: str | None, everything: bool) -> None:
    """The report in the terminal. loop: the label of the loop whose code is shown; the hottest for None."""
    console = report_console()
    console.print(f"[bold]{facts['name']}[/] for {facts['target']}: {len(facts['rows'])} instructions, "
                  f"{facts['code_bytes']} bytes; costs of {facts['model']}", soft_wrap=True)
    for line in remarks(facts):
        console.print(line, markup=False, soft_wrap=True)
    console.print(_registers_line(facts), soft_wrap=True)
    for line in measured_lines(facts):
        console.print(line, soft_wrap=True)
    console.print()
    print_whole(console, _loop_table(facts))
    chosen = next((x for x in facts["loops"] if (x["label"] == loop if loop else x["hottest"])), None)
    if chosen is not None:
        console.print()
        _print_ports(console, chosen)
        _print_chain(console, facts, chosen)
    print_code(console, facts, None if everything else chosen)


def print_code(console: Any, facts: Mapping[str, Any], loop: Mapping[str, Any] | None) -> None:
    """The instructions of a loop, or all, then the source lines with theirs."""
    rows = facts["rows"]
    if loop is not None:
        rows = [row for row in rows if loop["first"] <= row["place"] <= loop["last"]]
    console.print()
    print_rows(console, facts, rows)
    console.print()
    print_lines(console, facts)


def remarks(facts: Mapping[str, Any]) -> list[str]:
    """What of the code is by hand, what is not used, and what runs in order for want of a proof."""
    used = [f"by hand: {Piece(**piece)}" for piece in facts["pieces"]]
    for r in facts.get("ranks", ()):
        if r["name"] and r["used"]:
            generated = next(other for other in facts["ranks"] if not other["name"])
            used.append(f"a block would fit: {r['name']}, at least {r['cycles']:.4f} cycles for each {r['unit']} "
                        f"(front end {r['front_end']:.4f}); this code {generated['cycles']:.4f} "
                        f"({generated['front_end']:.4f})")
    used += [f"{name} is not used: {reason}" for name, reason in facts["not_by_hand"].items()]
    for loop in facts["in_order"]:
        met = " and ".join(f"{name} ({_lines(lines)})" for name, lines in loop["meets"].items())
        used.append(f"line {loop['line']}: this loop runs in order, on one worker, as nothing proves that its "
                    f"iterations are apart in {met}. If none touches what another writes, walk it with each(..., "
                    "disjoint=True); or index a view, in which what differs is an axis of its own")
    return used


def _lines(lines: list[int]) -> str:
    return f"line{'s' * (len(lines) > 1)} {', '.join(map(str, lines))}"


def _registers_line(facts: Mapping[str, Any]) -> str:
    parts = [f"{facts['pressure'][kind]} of {count} {kind}" for kind, count in facts["available"].items()]
    return (f"registers wanted at once: {', '.join(parts)}; {facts['statistics'].get('spills', 0)} spills, "
            f"{facts['statistics'].get('reloads', 0)} reloads in the text")


def measured_lines(facts: Mapping[str, Any]) -> list[str]:
    """What the run said, in sentences."""
    measured = facts["measured"]
    if "missing" in measured:
        return [f"not run: {measured['missing']}"]
    if "emulated" in measured:
        return emulated_lines(facts)
    shape = " ".join(f"{d}={n}" for d, n in measured["dims"].items()) or "the call"
    lines = [
        f"run here with {shape} on one thread: {time_text(measured['seconds'])} (median "
        f"{time_text(measured['median_seconds'])}; the call's own {time_text(measured['call_seconds'])} left out) at "
        f"{measured['clock_hz'] / 1e9:.2f} GHz = "
        f"{measured['cycles']:,.0f} cycles; the model's bound is {measured['model_cycles']:,.0f}, so it took "
        f"{measured['ratio']:.2f} times as long",
    ]
    if measured["operations"]:
        lines.append(f"{measured['operations']:,.0f} operations on floats: "
                     f"{measured['operations_per_second'] / 1e9:.1f} G/s, "
                     f"{measured['operations'] / measured['cycles']:.1f} per cycle")
    if "hottest" in measured:
        lines.append(f"of the model's cycles {measured['hottest_share']:.0%} are in loop {measured['hottest']}: "
                     f"at most {measured['cycles_per_pass_at_most']:.1f} cycles per pass were measured")
    return lines


def emulated_lines(facts: Mapping[str, Any]) -> list[str]:
    """What the emulator counted, in sentences."""
    counted = facts["measured"]["emulated"]
    shape = " ".join(f"{d}={n}" for d, n in {**facts["dims"], **facts["static"]}.items()) or "the call"
    lines = [f"run on the emulator with {shape}: {counted['instructions']:,} instructions of warps, for which one SM "
             f"takes at least {facts['model_cycles']:,.0f} cycles"]
    for what, taken, least, unit in (("global memory", "global_sectors", "global_ideal", "sectors of 32 bytes"),
                                     ("shared memory", "shared_cycles", "shared_ideal", "cycles of its banks")):
        if counted[least]:
            lines.append(f"{what}: {counted[taken]:,} {unit}, {counted[taken] / counted[least]:.2f} times those that "
                         f"the bytes need")
    return lines


def heat(facts: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], float | None]]:
    """Innermost loops with their share of the model's cycles, the hottest first; by depth where nothing was counted."""
    total = facts["model_cycles"]
    inner = [loop for loop in facts["loops"] if loop["innermost"]]
    if total:
        shares = [(loop, loop["cycles"] * (loop["passes"] or 0) / total) for loop in inner]
        return sorted(shares, key=lambda pair: (-pair[1], pair[0]["first"]))
    return sorted([(loop, None) for loop in inner], key=lambda pair: (
        not pair[0]["hottest"], -pair[0]["depth"], -pair[0]["cycles"], pair[0]["first"]))


def _loop_table(facts: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title="innermost loops, one pass (cycles: at least)", title_justify="left",
                  title_style="bold")
    for column in ("loop", "lines", "instr", "ports", "latency", "front", "bound by", "bytes in", "out", "ops",
                   "passes", "share"):
        table.add_column(column, justify="left" if column in ("loop", "lines", "bound by") else "right", no_wrap=True)
    for loop, share in heat(facts)[:12]:
        style = "bold" if loop["hottest"] else ""
        table.add_row(
            loop["label"], span(loop["lines"]), f"{loop['instructions']:.0f}", f"{loop['port_cycles']:.1f}",
            f"{loop['latency_cycles']:.1f}", f"{loop['front_end_cycles']:.1f}", loop["bound"],
            f"{loop['loaded_bytes']:.0f}", f"{loop['stored_bytes']:.0f}", f"{loop['operations']:.0f}",
            "" if loop["passes"] is None else f"{loop['passes']:,}", "" if share is None else f"{share:.1%}",
            style=style)
    return table


def span(lines: list[list[int]]) -> str:
    numbers = [line for _, line in lines]
    if not numbers:
        return ""
    return str(numbers[0]) if len(set(numbers)) == 1 else f"{min(numbers)}-{max(numbers)}"


def _print_ports(console: Any, loop: Mapping[str, Any]) -> None:
    console.print(f"[bold]ports in a pass of {loop['label']}[/], of {loop['cycles']:.1f} cycles")
    for port, cycles in loop["ports"].items():
        width = round(40 * cycles / loop["cycles"]) if loop["cycles"] else 0
        busiest = cycles >= loop["port_cycles"] - 1e-9
        console.print(f"  {port:<7} {cycles:7.1f} [{'red' if busiest else 'blue'}]{'█' * width}[/]")


def _print_chain(console: Any, facts: Mapping[str, Any], loop: Mapping[str, Any]) -> None:
    if not loop["chain"]:
        return
    console.print(f"[bold]longest chain from pass to pass[/]: {loop['latency_cycles']:.1f} cycles")
    chain = set(loop["chain"])
    texts = [row["text"] for row in facts["rows"] if row["place"] in chain]
    for text in texts[:6]:
        console.print(f"  {text}", markup=False)
    if len(texts) > 6:
        console.print(f"  ... {len(texts) - 6} more")


def print_rows(console: Any, facts: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> None:
    """Instructions under the source line that each stretch comes from, the registers beside them."""
    from rich.text import Text

    columns = _columns(facts, rows)
    names = [facts["registers"][c] for c in columns]
    counted = any(row["count"] is not None for row in rows)
    width = min(64, max((len(row["text"]) for row in rows), default=0))
    margin = " " * (8 + (12 if counted else 0) + width + 2)
    for level in range(max((len(name) for name in names), default=0)):
        console.print(Text(margin + "".join(name[level] if level < len(name) else " " for name in names), style="dim"),
                      soft_wrap=True)
    texts = {(s, line): text for s, source in enumerate(facts["sources"]) for line, text in source["lines"]}
    last = None
    styles = {"|": "blue", "r": "green", "w": "bold red", "x": "bold magenta", ".": "dim"}
    for row in rows:
        at = (row["source"], row["line"])
        if at != last and row["line"] is not None:
            console.print(Text(f"{row['line']:>5} │ {texts.get(at, '').strip()}", style="bold yellow"), soft_wrap=True)
            last = at
        for label in row["labels"]:
            console.print(Text(f"{label}:", style="cyan"), soft_wrap=True)
        line = Text(f"{row['offset']:6x}  ", style="dim")
        if counted:
            line.append(f"{row['count']:>10,}  ", style="dim")
        line.append(f"{row['text'][:width]:<{width}}  ", style="default")
        for column in columns:
            letter = row["registers"][column]
            line.append({"|": "│", ".": " "}.get(letter, letter), style=styles[letter])
        console.print(line, soft_wrap=True)


def _columns(facts: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> list[int]:
    """The registers that the rows touch, before those that only pass through, as many as fit."""
    everything = range(len(facts["registers"]))
    touched = [c for c in everything if any(row["registers"][c] in "rwx" for row in rows)]
    passing = [c for c in everything if c not in touched and any(row["registers"][c] == "|" for row in rows)]
    return sorted((touched + passing)[:REGISTER_COLUMNS])


def print_lines(console: Any, facts: Mapping[str, Any]) -> None:
    """The source, with how many instructions came of each line, and where they are."""
    from rich.text import Text

    console.print("[bold]source lines and their instructions[/]")
    for number, source in enumerate(facts["sources"]):
        console.print(Text(source["file"], style="dim"), soft_wrap=True)
        for line, text in source["lines"]:
            mine = [row for row in facts["rows"] if row["source"] == number and row["line"] == line]
            ran = sum(row["count"] for row in mine if row["count"] is not None)
            notes = f"{len(mine)} instructions at {_ranges(mine)}" if mine else ""
            notes += f", {ran:,} run" if ran else ""
            console.print(Text.assemble((f"{line:>5} ", "dim"), f"{text:<72} ", (notes, "green")), soft_wrap=True)


def _ranges(rows: list[Mapping[str, Any]]) -> str:
    """Offsets of stretches of neighbouring instructions."""
    stretches: list[list[int]] = []
    last = None
    for row in rows:
        if last is None or row["place"] > last + 1:
            stretches.append([row["offset"], row["offset"]])
        stretches[-1][1] = row["offset"]
        last = row["place"]
    shown = [f"{a:x}" if a == b else f"{a:x}-{b:x}" for a, b in stretches[:4]]
    return ", ".join(shown) + (f" and {len(stretches) - 4} more" if len(stretches) > 4 else "")
