"""Runs a tile IR function as lane IR under the lane interpreter, on real memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from sapper.ir.nodes import Function, Value
from sapper.ir.scratch import scratch_bytes
from sapper.ir.types import TileType, f32, f64
from sapper.ir.verifier import verify
from sapper.lane.interpret import run
from sapper.lane.lower import lower
from sapper.lane.memory import Memory
from sapper.lane.ops import LANE_OPS
from sapper.tile.schedule import DimClass, Facts, Schedule, Specialization


def dims_of(function: Function, arguments: dict[str, Any]) -> dict[str, int]:
    dims: dict[str, int] = {}
    for tensor in function.tensors():
        for dim, extent in zip(tensor.type.dims, arguments[tensor.name].shape, strict=True):
            if isinstance(dim, str):
                dims[dim] = extent
    return dims


def specialize(function: Function, arguments: dict[str, Any], hints: dict[str, int] | None = None) -> Specialization:
    """What a call with these arguments allows to assume; hints replace the true extents in the model's eyes."""
    dims = dims_of(function, arguments)
    strides: dict[str, str | tuple[bool, ...]] = {}
    for tensor in function.tensors():
        array = arguments[tensor.name]
        strides[tensor.name] = "contiguous" if array.flags.c_contiguous else tuple(
            s == array.itemsize for s in array.strides)
    classes = {d: DimClass((hints or {}).get(d, max(1, n)), 64 if n % 64 == 0 else 16 if n % 16 == 0 else 1)
               for d, n in dims.items()}
    return Specialization(classes, strides)


def word(value: Any, dtype: Any) -> int:
    if dtype is f32 or dtype.name in ("bf16", "f16"):
        return int(np.float32(value).view(np.int32))
    if dtype is f64:
        return int(np.float64(value).view(np.int64))
    return int(value)


def argument_words(function: Function, slots: list[str], arguments: dict[str, Any], address: Any) -> list[int]:
    """The words of the argument block from word 3 on."""
    dims = dims_of(function, arguments)
    types = {v.name: v.type for v in function.arguments}
    words = []
    for slot in slots:
        name, kind, *rest = slot.split(".")
        if kind == "data":
            words.append(address(name))
        elif kind == "stride":
            words.append(arguments[name].strides[int(rest[0])] // arguments[name].itemsize)
        elif name == "dim":
            words.append(dims[kind])
        else:
            t = types[kind]
            assert isinstance(t, TileType)
            words.append(word(arguments[kind], t.dtype))
    return words


def run_lane(function: Function, arguments: dict[str, Any], schedule: Schedule | None = None,
             facts: Facts | None = None, specialization: Specialization | None = None, workers: int = 1,
             passes: Any = None, packed: dict[str, Any] | None = None) -> Function:
    """Lower a canonical tile IR function, apply `passes` to the lane IR, and run it; arguments change in place.

    packed: what stands for some of the arguments in memory.
    """
    specialization = specialization or specialize(function, arguments)
    specialization.strides.update({name: one.panels for name, one in (packed or {}).items()})
    lane = lowered(function, schedule, facts, specialization, passes)
    run_lowered(function, lane, arguments, workers, packed)
    return lane


def lowered(function: Function, schedule: Schedule | None, facts: Facts | None, specialization: Specialization,
            passes: Any = None) -> Function:
    """The lane function of a canonical tile IR function."""
    lane = lower(function, schedule or Schedule(), facts or Facts(), specialization)
    verify(lane, LANE_OPS)
    if passes is not None:
        passes(lane)
        verify(lane, LANE_OPS)
    return lane


def run_lowered(function: Function, lane: Function, arguments: dict[str, Any], workers: int = 1,
                packed: dict[str, Any] | None = None) -> None:
    """Run the lane function of a tile IR function."""
    memory = Memory()
    each = max(64, scratch_bytes(lane.attributes["scratch"], dims_of(function, arguments)))
    words = [memory.allocate("scratch", each * workers), each, memory.allocate("sync", 1024)]
    found = memory.find(words[0], each * workers, True)
    assert not isinstance(found, str)
    found[:] = 0xFF     # NaN, as floats: nothing counts on what lies there
    held = {**arguments, **{name: one.data for name, one in (packed or {}).items()}}
    words += argument_words(function, lane.attributes["slots"], arguments,
                            lambda name: memory.add_array(name, held[name]))
    run(lane, np.array(words, dtype=np.int64), memory, workers)


def evaluate(value: Value, known: dict[object, int]) -> int:
    """A scalar of lane IR; known: values of block arguments, of argument words by slot, and of `workers`."""
    op = value.op
    if op is None:
        return known[value]
    if op.name in ("s_const", "arg", "workers"):
        return int(op.attributes["value"]) if op.name == "s_const" else known[op.attributes.get("slot", op.name)]
    operands = [evaluate(v, known) for v in op.operands]
    if op.name == "s_select":
        return operands[1 if operands[0] else 2]
    if op.name == "s_cmp":
        return int({"eq": operands[0] == operands[1], "ge": operands[0] >= operands[1],
                        "lt": operands[0] < operands[1]}[op.attributes["cond"]])
    a, b = operands
    return {"s_add": a + b, "s_sub": a - b, "s_mul": a * b, "s_min": min(a, b), "s_max": max(a, b),
            "s_floordiv": a // (b or 1), "s_mod": a % (b or 1), "s_or": a | b, "s_and": a & b, "s_sar": a >> b}[op.name]
