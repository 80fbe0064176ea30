"""What a schedule says is done, or an error says what is done instead."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import sapper.kernels
from sapper.codegen.pipeline import facts_of
from sapper.ir.text import print_function
from sapper.kernels import library
from sapper.lane.choices import choices
from sapper.lane.lower import lower
from sapper.targets.x86_64.target import TARGETS
from sapper.tile.canonical import canonicalize
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import DimClass, Facts, Schedule, ScheduleError, Specialization, UnfollowedError

LIBRARY = {entry.name: entry for entry in library()}
AVX512 = Facts(lanes=16, vector_registers=32)


def lowered(name: str, schedule: Schedule, facts: Facts = AVX512) -> str:
    function = LIBRARY[name].kernel.tile_ir()
    reduce_loops(function)
    canonicalize(function)
    dims = {dim: DimClass(512) for t in function.tensors() for dim in t.type.dims if isinstance(dim, str)}  # type: ignore[union-attr]
    return print_function(lower(function, schedule, facts, Specialization(dims)))


@pytest.mark.parametrize(("name", "schedule", "message"), [
    ("matmul_q4", Schedule(registers={"m": 3}), "registers m = 3: .*mend: tile says how many of m there are at once"),
    ("softmax", Schedule(registers={"m": 2}), "registers m = 2: found no loop .* expected one of n"),
    ("softmax", Schedule(order=("m",)), "order m: found loops n"),
    ("matmul_nn_f32", Schedule(order=("k", "m")), "order k m: found loops m n k, .* summed over stays inside"),
    ("matmul_nn_f32", Schedule(tile={"m": 32}), "tile m = 32: .*mend: registers says how many of m a loop holds"),
    ("softmax", Schedule(tile={"n": 32}), "tile n = 32: .*expected some of m"),
    ("attention_f32", Schedule(chunks={"t": 4}), "chunks t = 4: found no tasks along t"),
    ("matmul_nn_f32", Schedule(chunks={"k": 4}), "chunks k = 4: found no tasks along k; expected some of m, n"),
    ("softmax", Schedule(stage=("x",)), "stage x: found a tensor that no contraction reads; expected some of none"),
    ("rms_norm", Schedule(streaming=("x",)), "streaming x: found a tensor that is not stored .*expected some of y"),
    ("softmax", Schedule(matrix=True), "matrix true: found no contraction"),
])
def test_what_nothing_follows_is_an_error(name: str, schedule: Schedule, message: str) -> None:
    with pytest.raises(UnfollowedError, match=f"schedule of {name}: {message}") as found:
        lowered(name, schedule)
    assert getattr(schedule, found.value.entry) and re.search("mend: ", str(found.value))


@pytest.mark.parametrize(("name", "schedule"), [
    ("matmul_q4", Schedule(tile={"m": 3})), ("softmax", Schedule(tile={"m": 4})),
    ("softmax", Schedule(registers={"n": 2})), ("matmul_nn_f32", Schedule(registers={"m": 3, "n": 1})),
    ("matmul_nn_f32", Schedule(order=("m", "n", "k"), stage=())), ("matmul_nn_f32", Schedule(stage=("b",))),
    ("matmul_nn_f32", Schedule(chunks={"m": 3})), ("matmul_nt_f32", Schedule(lane="k")),
    ("attention_f32", Schedule(tile={"p": 16})), ("softmax", Schedule(lanes=8)),
    ("matvec_f32", Schedule(requests={"row_streams": 4, "short_row_streams": 4, "again": False})),
    ("matmul_nn_f32", Schedule(requests={"reread_ahead_bytes": 1024})),
])
def test_what_is_followed_makes_other_code(name: str, schedule: Schedule) -> None:
    assert lowered(name, schedule) != lowered(name, Schedule())


@pytest.mark.parametrize("name", ["matmul_nn_f32", "matmul_q4", "softmax", "matvec_f32", "attention_f32", "rms_norm",
                                  "transpose_f32", "gate_sigmoid", "rope_interleaved"])
def test_what_is_told_can_be_asked_for(name: str) -> None:
    function = LIBRARY[name].kernel.tile_ir()
    reduce_loops(function)
    canonicalize(function)
    told = choices(function, Schedule(), AVX512, Specialization()).schedule
    function = LIBRARY[name].kernel.tile_ir()
    reduce_loops(function)
    canonicalize(function)
    lower(function, told, AVX512, Specialization())


@pytest.mark.parametrize("target", ["zen4", "zen3", "graniterapids"])
def test_schedules_that_come_with_the_library_are_followed(target: str) -> None:
    text = (Path(sapper.kernels.__file__).parent / "tuned" / f"{target}.json").read_text()
    found = {(name, json.dumps(entry["schedule"])) for name, entries in json.loads(text).items() for entry in entries}
    refused = []
    for name, schedule in sorted(found):
        try:
            lowered(name, Schedule.from_json(json.loads(schedule)), facts_of(TARGETS[target]))
        except ScheduleError as error:
            refused.append(str(error))
    assert found and not refused
