"""Runs a tile IR function as machine code, in a child process between guard pages."""

from __future__ import annotations

from typing import Any

import numpy as np

from sapper.codegen.compile import CompiledCode, compile_lane
from sapper.codegen.pipeline import facts_of, finish_lane, stored_tensors, to_lane
from sapper.ir.nodes import Function
from sapper.runtime.arguments import Parameter, Signature
from sapper.runtime.compiled import CompiledKernel, _tuples
from sapper.runtime.guarded import PLACEMENTS, run_compiled_guarded
from sapper.targets.x86_64.detect import host
from sapper.targets.x86_64.target import TARGETS, Target
from sapper.tile.schedule import Schedule, Specialization
from tests.lane.run_lane import specialize

RUNNABLE = tuple(t.name for t in TARGETS.values() if t.features <= host().features)
"""Targets whose code this processor runs."""


def compile_checked(function: Function, specialization: Specialization, target: Target,
                    schedule: Schedule | None = None) -> tuple[CompiledCode, CompiledKernel]:
    """Compile (the function is changed), with the allocation proved by the independent checker."""
    stored = stored_tensors(function)
    lane = finish_lane(to_lane(function, schedule or Schedule(), facts_of(target), specialization), target)
    made = compile_lane(lane, target, checked=True)
    return made, CompiledKernel(function.name, made.bytes, tuple(made.slots), 0, _tuples(lane.attributes["scratch"]),
                                lane.attributes["counters"], stored)


def run_compiled(function: Function, compiled: CompiledKernel, arguments: dict[str, Any], threads: int = 1,
                 placements: tuple[str, ...] = PLACEMENTS, in_place: tuple = (), text: str = "") -> None:
    """Run; the arguments take what the last placement's run wrote, and the others must have written the same.

    AssertionError with the text, its assembly, when the code crashes, reaches beyond its buffers or does not end.
    """
    signature = Signature(function.name, [Parameter.of(v.name, v.type) for v in function.arguments], in_place)
    binding = signature.bind(tuple([arguments[v.name] for v in function.arguments]))
    runs = run_compiled_guarded(signature, compiled, binding, threads=threads if compiled.counters else 1,
                                time_limit_s=10.0, placements=placements)
    for run in runs:
        assert run.crash is None, f"buffers at the {run.placement}: {run.crash}\n{text}"
    for name, values in runs[-1].outputs.items():
        for other in runs[:-1]:
            assert values.tobytes() == other.outputs[name].tobytes(), f"{name} depends on where the buffers lie"
        arguments[name][...] = values


def run_native(function: Function, arguments: dict[str, Any], target: Target, threads: int = 1,
               hints: dict[str, int] | None = None, schedule: Schedule | None = None, in_place: tuple = ()) -> None:
    """Compile for these arguments, and run."""
    types = [(value, value.type) for value in function.arguments]
    made, compiled = compile_checked(function, specialize(function, arguments, hints), target, schedule)
    for value, type in types:       # what is only moved is compiled as integers of its size (tile/moved.py)
        value.type = type
    run_compiled(function, compiled, arguments, threads, in_place=in_place, text=made.text)


def threads_of(name: str) -> int:
    """1 or 2 workers, fixed for a name, so that both are tried."""
    return 1 + int(np.frombuffer(name.encode(), np.uint8).sum()) % 2
