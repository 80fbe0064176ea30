"""Blocks of queries shared out to two workers, which do about as much each though later ones see more positions.

A task's work is counted by running it; tasks are then handed out as `tasks` of lane IR does: to who is done first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapper.ir.nodes import Op
from sapper.kernels import library
from sapper.lane import interpret
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts

from .run_lane import run_lane
from .test_expert_tasks import largest_share, sizes_of_tasks

LIBRARY = {k.name: k for k in library()}
FACTS = Facts(lanes=16, vector_registers=32)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("heads", "group"), [(1, 1), (1, 2), (3, 1), (3, 3), (4, 1)])
@pytest.mark.parametrize("name", ["attention_f32", "attention_rounded_bf16"])
def test_two_workers_share_a_causal_mask(name: str, heads: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Op] = []

    def counting(program: interpret.Program, op: Op, build: Any = interpret._BUILDERS["load"]) -> Any:
        step = build(program, op)

        def run(environment: Any) -> None:
            loads.append(op)
            step(environment)

        return run

    monkeypatch.setitem(interpret._BUILDERS, "load", counting)
    found = sizes_of_tasks(monkeypatch, loads.clear, lambda: len(loads))
    entry = LIBRARY[name]
    shape = {"T": 128, "H": heads, "G": group, "D": 16, "position": 0}
    arguments = entry.make_arguments(np.random.default_rng(1), shape)
    expected = entry.reference(arguments)
    run_lane(reduce_loops(entry.kernel.tile_ir()), arguments, facts=FACTS, workers=2)
    assert entry.compare(arguments, expected) is None
    (sizes,) = found
    assert largest_share(sizes) < 0.55, f"{sizes}"
