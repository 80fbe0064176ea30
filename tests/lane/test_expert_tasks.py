"""Experts of a mixture shared out to two workers: each reads about as many bytes, whatever experts tokens take.

A task's bytes are counted by running it; tasks are then handed out as `tasks` of lane IR does: to who is done first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sapper.ir.nodes import Op
from sapper.kernels import library
from sapper.lane import interpret
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts

from .run_lane import run_lane

LIBRARY = {k.name: k for k in library()}
WORKERS = 2
WEIGHTS = ("gate", "up", "w", "quants")
FACTS = Facts(lanes=16, vector_registers=32, dots=frozenset({"dot4_u8i8"}))


def sizes_of_tasks(monkeypatch: pytest.MonkeyPatch, begin: Callable[[], object], size: Callable[[], int]
                   ) -> list[list[int]]:
    """Have the first worker do all tasks, one by one. Gives their sizes, for each loop that shares out tasks, once it
    has run. begin: called before each task; size: that of the task just done."""
    found: list[list[int]] = []

    def tasks(program: interpret.Program, op: Op) -> Any:
        total, (block,) = program.slot(op.operands[0]), op.blocks
        index, steps = program.slot(block.arguments[0]), program.block(block)

        def run(environment: Any) -> None:
            if environment[0].number:
                return
            sizes = []
            for task in range(environment[total]):
                begin()
                environment[index] = task
                for step in steps:
                    step(environment)
                sizes.append(size())
            found.append(sizes)

        return run

    monkeypatch.setitem(interpret._BUILDERS, "tasks", tasks)
    return found


def bytes_of_tasks(name: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """For each loop that shares out tasks, the bytes of weights that each of them reads. Checks the results too."""
    entry = LIBRARY[name]
    places: list[range] = []
    seen: set[int] = set()
    add_array = interpret.Memory.add_array

    def remember(self: Any, key: str, array: Any) -> int:
        address = add_array(self, key, array)
        if key in WEIGHTS:
            places.append(range(address // 64, -(-(address + array.nbytes) // 64)))
        return address

    def recording(build: Any) -> Any:
        def load(program: interpret.Program, op: Op) -> Any:
            (address, _), step = program.address(op, 0), build(program, op)

            def run(environment: Any) -> None:
                seen.add(address(environment) // 64)
                step(environment)

            return run

        return load

    def bytes_of_weights() -> int:
        return 64 * sum(any(line in place for place in places) for line in seen)

    monkeypatch.setattr(interpret.Memory, "add_array", remember)
    found = sizes_of_tasks(monkeypatch, seen.clear, bytes_of_weights)
    for load in ("load", "load_run", "gather"):
        monkeypatch.setitem(interpret._BUILDERS, load, recording(interpret._BUILDERS[load]))
    expected = entry.reference(arguments)
    run_lane(reduce_loops(entry.kernel.tile_ir()), arguments, facts=FACTS, workers=WORKERS)
    assert entry.compare(arguments, expected) is None
    return found


def largest_share(sizes: list[int]) -> float:
    """Of the worker that has most, where tasks go to who is done first."""
    done = [0] * WORKERS
    for size in sizes:
        done[done.index(min(done))] += size
    return max(done) / sum(done)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("taken", [1, 2, 3, 5, 6, 7, 8, 9])
@pytest.mark.parametrize(("name", "extents"), [
    ("expert_matmul_swiglu_q4", {"G": 1}), ("expert_matmul_q4", {"G": 2}),
    ("expert_matmul_swiglu_q4k", {"S": 1}), ("expert_matmul_q6k", {"S": 1}),
    ("expert_matvec_swiglu_bf16", {"I": 16}), ("expert_matvec_bf16", {"I": 16}),
])
def test_one_token_reads_as_much_on_each_worker(name: str, extents: dict[str, int], taken: int,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of experts a token takes, also where workers do not divide it."""
    panels = {"B": 8, "L": 32} if "matvec" in name else {"P": 8}
    arguments = LIBRARY[name].make_arguments(
        np.random.default_rng(taken), extents | panels | {"E": 10, "K": taken})
    sizes = bytes_of_tasks(name, arguments, monkeypatch)[0]
    assert sum(sizes) > 0 and largest_share(sizes) < 0.54, f"{sizes}"


RAGGED = {"all to one": [0, 0, 9, 9, 9], "empty": [0, 0, 0, 0, 0], "ragged": [0, 1, 1, 8, 9], "even": [0, 2, 4, 7, 9]}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("routing", RAGGED)
@pytest.mark.parametrize(("name", "extents"), [
    ("grouped_swiglu_q4", {"G": 1}), ("grouped_q4", {"G": 1}), ("grouped_swiglu_q4k", {"S": 1}),
    ("grouped_q6k", {"S": 1}),
])
def test_groups_of_tokens_read_as_much_on_each_worker(name: str, extents: dict[str, int], routing: str,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever experts they take: workers share the rows of each expert's matrix, not the experts."""
    cuts = np.array(RAGGED[routing], np.int32)
    arguments = LIBRARY[name].make_arguments(
        np.random.default_rng(1), extents | {"N": 8, "T": 1, "E": 4, "C": 9, "J": 9})
    arguments |= {"first": cuts[:-1].copy(), "last": cuts[1:].copy()}
    sizes = bytes_of_tasks(name, arguments, monkeypatch)[0]
    if routing == "empty":
        assert sum(sizes) == 0
    else:
        assert sum(sizes) > 0 and largest_share(sizes) < 0.54, f"{sizes}"


@pytest.mark.parametrize("name", ["masked_matmul_nt_f32", "masked_matmul_nt_bf16_bf16", "masked_matmul_nt_i8"])
def test_weights_that_no_rows_meet_are_not_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor copied: so many experts have no token where there are few."""
    def read(*rows: int) -> int:
        arguments = LIBRARY[name].make_arguments(
            np.random.default_rng(1), {"B": len(rows), "M": 40, "N": 64, "K": 64})
        arguments["rows"][:] = rows
        with monkeypatch.context() as patch:
            return sum(bytes_of_tasks(name, arguments, patch)[0])

    every = read(40, 3, 17)
    assert 3 * read(0, 40, 0) == every > 0
    assert read(0, 0, 0) == 0
