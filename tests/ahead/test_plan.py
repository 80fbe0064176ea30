"""Plans: what lies where, and what a file can't hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import Rows, Tensor, Variable, f32, i32, tiles
from sapper.ahead.errors import AheadError
from sapper.ahead.library import memory_of, plan_model, weights_pieces
from sapper.ahead.plan import CONSTANT, STATE, TEMPORARY, Model
from sapper.targets.x86_64.target import target
from tests.strategies.amount import examples

N = sp.dims("N")
SIZE = 40


@sp.kernel
def add(x: Tensor[f32, N], y: Tensor[f32, N], out: Tensor[f32, N]):
    for n in tiles(N):
        out[n] = x[n] + y[n]


@sp.kernel
def scale(x: Tensor[f32, N], factor: f32, out: Tensor[f32, N]):
    for n in tiles(N):
        out[n] = x[n] * factor


@sp.kernel
def use(tokens: Tensor[i32, N], out: Tensor[i32, N]):
    for n in tiles(N):
        out[n] = tokens[n] + 1


def model(steps: list[Any], arrays: dict[str, Any], state: tuple[str, ...] = ()) -> Model:
    """A model whose step is the given one; its inputs and outputs have a launch each."""
    given = {name: np.zeros(1, np.int32) for name in ("tokens", "last", "token", "picked")}
    given["logits"] = np.zeros(SIZE, np.float32)
    constant = np.ones(SIZE, np.float32)
    ends = [(add, (constant, constant, given["logits"])), (use, (given["token"], given["picked"])),
            (use, (given["tokens"], given["picked"])), (use, (given["last"], given["picked"]))]
    programs = {"prefill": [("all", ends)], "step": [("all", [*steps, *ends])]}
    return Model("m", programs, given | arrays, state, 4, SIZE, 1)


def vectors(count: int) -> list[Any]:
    return [np.full(SIZE, i, np.float32) for i in range(count)]


@settings(max_examples=examples(40))
@given(st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=12))
def test_temporaries_that_are_alive_together_lie_apart(steps: list[tuple[int, int, int]]) -> None:
    """Random programs: memory that is written and read later is touched by nothing else in between."""
    constants, places = vectors(2), vectors(6)
    written: list[int] = []
    launches = []
    for i, j, k in steps:
        inputs = [places[n] if n in written else constants[n % 2] for n in (i, j)]
        if any(inputs[n] is places[k] for n in (0, 1)):
            continue
        launches.append((add, (*inputs, places[k])))
        written.append(k)
    plan = plan_model(model(launches, {f"p{i}": p for i, p in enumerate(places)}), target("v3"))
    step = plan.programs["step"].launches
    memory: dict[int, tuple[int, int]] = {}  # byte of the placed memory -> (region, byte of it) that wrote it last
    for launch in step:
        for low, high in launch.reads:
            region = plan.region_at(low)
            if region.kind == TEMPORARY:
                for byte in range(low, high):
                    assert memory[region.offset + byte - region.low] == (region.low, byte)
        for low, high in launch.writes:
            region = plan.region_at(low)
            for byte in range(low, high):
                memory[region.offset + byte - region.low] = region.low, byte
    for launch in step:
        assert all(plan.region_at(low).offset % 64 == 0 for low, _ in (*launch.reads, *launch.writes))


def test_kinds_and_places() -> None:
    (weight, other), (x, y, kept) = vectors(2), vectors(3)
    steps = [(add, (weight, other, x)), (add, (x, weight, y)), (add, (y, other, kept))]
    plan = plan_model(model(steps, {"weight": weight, "x": x, "kept": kept}, ("kept",)), target("v3"))
    kinds = {region.name: region.kind for region in plan.regions}
    assert kinds["weight"] == CONSTANT and kinds["x"] == TEMPORARY and kinds["kept"] == STATE
    content = b"".join(bytes(piece) for piece in weights_pieces(plan))
    assert len(content) == plan.weights_bytes and plan.weights_bytes % 4096 == 0
    for region in plan.of_kind(CONSTANT):
        assert content[region.offset : region.offset + region.size_bytes] == bytes(memory_of(region))
    assert [region.name for region in plan.of_kind(CONSTANT) if region.offset == 0] == ["weight"], "the order of use"
    assert plan.place("kept") >= plan.huge_bytes > plan.programs["step"].control


def test_what_a_file_cannot_hold() -> None:
    (weight,), (x, y) = vectors(1), vectors(2)
    with pytest.raises(AheadError, match=r"launch 0 \(add\): found a read of x before all.*name it in `state`"):
        plan_model(model([(add, (x, weight, y)), (add, (weight, weight, x))], {"x": x}), target("v3"))
    with pytest.raises(AheadError, match="half"):
        half = x[: SIZE // 2]
        plan_model(model([(add, (weight[: SIZE // 2], weight[: SIZE // 2], half)), (add, (x, weight, y))], {"half": x}),
                   target("v3"))
    with pytest.raises(AheadError, match=r"variable factor: found f32; expected an integer"):
        plan_model(model([(scale, (weight, Variable("factor", 1.0), y))], {}), target("v3"))
    with pytest.raises(AheadError, match="array lost: found no launch that touches it"):
        plan_model(model([(add, (weight, weight, y))], {"lost": x}, ("lost",)), target("v3"))


def test_each_form_of_a_kernel_is_compiled_once() -> None:
    (weight,), (x, y) = vectors(1), vectors(2)
    count = Variable("count", SIZE)
    steps = [(add, (weight, weight, x)), (add, (weight, x, y)), (add, (*[Rows(v, count) for v in (weight, x, y)],))]
    plan = plan_model(model(steps, {}), target("v3"))
    assert [(code.symbol, code.users) for code in plan.codes if "add" in code.symbol] == [
        ("kernel.add", 4), ("kernel.add.2", 1)]
