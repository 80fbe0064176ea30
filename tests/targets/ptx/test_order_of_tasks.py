"""What tasks are where workers are many, and in which order they take those of a causal mask."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from math import ceil

import numpy as np
import pytest

from sapper import emulate, targets
from sapper.codegen.pipeline import compile_kernel
from sapper.ir.nodes import Block, Function, Op, Value
from sapper.kernels import find
from sapper.lane.tasks import _grows

from .test_chained import lowered, specialization

SCALARS: dict[str, Callable[..., int]] = {
    "s_add": operator.add, "s_sub": operator.sub, "s_mul": operator.mul, "s_floordiv": operator.floordiv,
    "s_mod": operator.mod, "s_sar": operator.rshift, "s_shl": operator.lshift,
    "s_min": min, "s_max": max, "s_and": operator.and_, "s_xor": operator.xor}
COMPARED: dict[str, Callable[[int, int], bool]] = {"lt": operator.lt, "le": operator.le, "eq": operator.eq,
                                                   "gt": operator.gt, "ge": operator.ge, "ne": operator.ne}


class Scalars:
    """The scalars of a lane function outside of loops, for a call with these slots and workers, by task."""

    def __init__(self, lane: Function, slots: dict[str, int], workers: int) -> None:
        self.slots = [0, 0, 0, *(slots.get(name, 0) for name in lane.attributes["slots"])]
        self.workers = workers
        (self.tasks,) = [op for op in lane.walk() if op.name == "tasks"]
        self.known: dict[Value, int] = {}

    def of(self, value: Value) -> int:
        op = value.op
        if value in self.known or op is None:
            return self.known[value]
        if op.name == "arg":
            found = self.slots[op.attributes["slot"]]
        elif op.name == "s_const":
            found = op.attributes["value"]
        elif op.name == "workers":
            found = self.workers
        elif op.name == "s_cmp":
            found = int(COMPARED[op.attributes["cond"]](*map(self.of, op.operands)))
        elif op.name == "s_select":
            found = self.of(op.operands[1 if self.of(op.operands[0]) else 2])
        else:
            found = SCALARS[op.name](*map(self.of, op.operands))
        self.known[value] = found
        return found

    def rounds(self, task: int) -> tuple[int, int]:
        """Of the loops over keys of a task: passes, and where the last one ends."""
        block: Block = self.tasks.blocks[0]
        self.known = {block.arguments[0]: task}
        ranges: list[tuple[int, int, int]] = []

        def look(block: Block) -> None:
            for op in block.ops:
                if op.name == "loop":
                    first, last = map(self.of, op.operands[:2])
                    if op.attributes["label"] == "p":
                        ranges.append((first, last, op.attributes["step"]))
                    else:       # over blocks of rows, of which a task has one
                        assert first < last <= first + op.attributes["step"]
                        self.known[op.blocks[0].arguments[0]] = first
                        look(op.blocks[0])

        look(block)
        return sum(max(0, ceil((last - first) / step)) for first, last, step in ranges), ranges[-1][1]


@pytest.mark.parametrize(("rows", "heads"), [(8192, 16), (4096, 32), (1024, 64), (640, 3)])
def test_workers_have_as_much_to_do(rows: int, heads: int) -> None:
    """Of 132 who take tasks in turn. In the order of the loops one would have 1.59 times the mean, for 8192 rows and 16
    heads."""
    workers, blocks = 132, rows // 128
    slots = {"dim.T": rows, "dim.H": heads, "dim.G": 1, "dim.P": rows, "scalar.position": 0}
    scalars = Scalars(lowered(find("attention_bf16_128").kernel, specialization()), slots, workers)
    total = scalars.of(scalars.tasks.operands[0])
    assert total == heads * blocks
    found = [scalars.rounds(task) for task in range(total)]
    # Each block of rows of each head once.
    assert Counter(end for _, end in found) == {128 * (block + 1): heads for block in range(blocks)}
    passes = [count for count, _ in found]
    most = max(sum(passes[worker::workers]) for worker in range(workers))
    assert most <= max(1.1 * sum(passes) / workers, max(passes))


def test_tasks_of_one_length_stay_in_the_order_of_the_loops() -> None:
    """Parts of a cache: each begins where the one before ends. A choice between two numbers tells turned rounds."""
    def chooses(name: str) -> bool:
        (tasks,) = [op for op in lowered(find(name).kernel, specialization()).walk() if op.name == "tasks"]
        return any(op.name == "s_select" for op in tasks.blocks[0].ops)

    assert chooses("attention_bf16_128") and not chooses("attention_decode_bf16_128")


def test_what_grows_with_a_number() -> None:
    (loop,) = [op for op in find("attention_bf16_128").kernel.tile_ir().walk()
               if op.name == "tiles" and op.attributes["axes"] == ["p"]]
    blocks = {v for op in find("attention_bf16_128").kernel.tile_ir().walk() for b in op.blocks for v in b.arguments}
    assert blocks
    stop = loop.operands[1]
    assert stop.op is not None
    counters = [v for v in _leaves(stop) if v.op is None]
    assert any(_grows(stop, counter) for counter in counters)
    other = Op("sub", [counters[0], stop], [stop.type], {}, None, None).result
    assert not any(_grows(other, counter) and counter is not counters[0] for counter in counters)


def _leaves(value: Value) -> list[Value]:
    return [value] if value.op is None or not value.op.operands else [
        leaf for v in value.op.operands for leaf in _leaves(v)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("level", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("name", ["masked_matmul_nt_bf16_bf16", "masked_matmul_nt_f32", "masked_matmul_nt_i8"])
def test_columns_are_tasks_where_memory_tells_the_rows(name: str, level: str) -> None:
    """Of each expert's product: eight of them alone would leave most processors without work."""
    kernel = find(name).kernel
    tensors = [tensor for tensor, type in kernel.parameters if hasattr(type, "dims")]
    made = compile_kernel(kernel, {}, dict.fromkeys(tensors, "contiguous"), dict.fromkeys("BMNK", (8192, 64)),
                          targets.target(level), None, frozenset(tensors))
    (((experts, columns),),) = [made.tasks]
    assert experts == (1, ("B",), 1) and columns[1] == ("N",) and columns[2] <= 256
    for rows in (64, 150):
        arguments = find(name).make_arguments(np.random.default_rng(3), {"B": 3, "M": rows, "N": 320, "K": 128})
        wanted = find(name).reference(arguments)
        emulate.run(kernel, *arguments.values(), target=level, workers=5, aligned=["a", "w", "c"])
        wrong = find(name).compare(arguments, wanted)
        assert wrong is None, wrong
