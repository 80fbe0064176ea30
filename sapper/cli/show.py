"""`sapper ir` and `sapper asm`: a kernel at any station, and the code that calls take, as text."""

from __future__ import annotations

from .code import Code, code_for
from .kernels import aligned_on, find_kernel, find_target, parse_extents, parse_schedule, specialise

STAGES = {
    "tile": "as the front end builds it from the source",
    "canonical": "tile IR with one way to say each thing",
    "lane": "rows and scalars of the lane machine, scheduled",
    "expanded": "lane IR in ops that the target has: exp and the like written as arithmetic",
    "simplified": "lane IR as it goes to the target",
    "machine": "the target's instructions on virtual registers, scheduled",
}


def show_ir(
    wanted: str, stage: str, target_name: str | None, static: str | None, dims: str | None, schedule: str | None,
    locations: bool,
) -> str:
    """The IR of a kernel after one station, as text that parses back (machine IR: as a listing)."""
    from ..codegen import pipeline
    from ..codegen.compile import rules_of
    from ..ir.text import print_function
    from ..tile.schedule import DimClass, Schedule, Specialization

    kernel = find_kernel(wanted).kernel
    fixed, free = parse_extents(static, dims, kernel)
    function = kernel.tile_ir(fixed)
    if stage == "tile":
        return print_function(function, locations)
    given = specialise(kernel, fixed, free)
    target = find_target(target_name)
    classes = {
        name: DimClass(pipeline.HINTS.get(bound, pipeline.LARGE), divisor)
        for name, (bound, divisor) in given["dim_classes"].items()
    }
    known = Specialization(classes, given["unit_strides"], aligned_on(target, kernel, {**fixed, **free}))
    lane = pipeline.to_lane(function, parse_schedule(schedule) or Schedule(), pipeline.facts_of(target), known)
    if stage == "canonical":
        return print_function(function, locations)
    if stage == "lane":
        return print_function(lane, locations)
    pipeline.expand_lane(lane, target)
    if stage == "expanded":
        return print_function(lane, locations)
    pipeline.simplify_lane(lane, target)
    if stage == "simplified":
        return print_function(lane, locations)
    from ..codegen.compile import text_of
    from ..codegen.schedule import schedule as schedule_instructions
    from ..codegen.select import select

    rules = rules_of(target)
    if target.assembler_allocates:
        return text_of(select(pipeline.for_threads(lane, target), rules, target), target)
    selected = select(lane, rules, target)
    schedule_instructions(selected, rules.register_file(target))
    return text_of(selected, target)


def code_named(
    wanted: str, target_name: str | None, static: str | None, dims: str | None, schedule: str | None
) -> Code:
    """The code that a call such as a command line describes takes: by hand only what passed its trial."""
    kernel = find_kernel(wanted).kernel
    fixed, free = parse_extents(static, dims, kernel)
    return code_for(kernel, find_target(target_name), parse_schedule(schedule), fixed, free, tried=True)


def listing(code: Code) -> str:
    """Its text, and before it what in it is by hand, and what is not used and why. The comments are those that GNU as
    and PTX have in common."""
    told = [f"by hand: {piece}" for piece in code.pieces]
    told += [f"{name} is not used: {reason}" for name, reason in code.refused.items()]
    comments = [f"/* {' '.join(line.split()).replace('*/', '* /')} */\n" for line in told]
    return "".join(comments) + str(code.compiled.text())


def hex_dump(code: bytes) -> str:
    """Offset and 16 bytes to a line."""
    lines = [f"{at:06x}  {code[at : at + 16].hex(' ')}" for at in range(0, len(code), 16)]
    return "\n".join(lines) + "\n"
