"""Kernels as RISC-V machine code on the emulator of sapper/emulate/riscv.py."""

from __future__ import annotations

from typing import Any

from sapper.codegen.compile import CompiledCode, compile_lane
from sapper.codegen.pipeline import facts_of, finish_lane, to_lane
from sapper.emulate.errors import EmulationError
from sapper.emulate.riscv import run_code
from sapper.ir.nodes import Function
from sapper.ir.scratch import scratch_bytes
from sapper.targets import target
from sapper.tile.schedule import Schedule
from tests.lane.run_lane import argument_words, dims_of, specialize


def compile_for(function: Function, arguments: dict[str, Any], name: str = "rva23u64",
                hints: dict[str, int] | None = None) -> tuple[CompiledCode, Function]:
    """Machine code for these arguments, its allocation proved by the independent checker; and its lane IR."""
    facts, assumed = target(name), specialize(function, arguments, hints)
    lane = finish_lane(to_lane(function, Schedule(), facts_of(facts), assumed), facts)
    return compile_lane(lane, facts, checked=True), lane


def run_emulated(function: Function, arguments: dict[str, Any], workers: int = 1, name: str = "rva23u64",
                 hints: dict[str, int] | None = None, at_end: bool = True) -> CompiledCode:
    """Compile for these arguments (the function is changed) and run; arrays take what was written.

    AssertionError, with the text, where the code reaches beyond its buffers, does not end or does not leave registers
    as it found them.
    """
    made, lane = compile_for(function, arguments, name, hints)
    dims = dims_of(function, arguments)
    try:
        run_code(made.bytes, lambda buffers: argument_words(function, lane.attributes["slots"], arguments,
                                                            lambda name: buffers.add_array(arguments[name])),
                 scratch_bytes(lane.attributes["scratch"], dims), workers, at_end, target(name).vector_bits)
    except EmulationError as error:
        raise AssertionError(f"{error}\n{made.text}") from None
    return made
