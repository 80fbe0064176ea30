"""The probes do the work that their rate counts, and the floor follows from the peaks. No figure is asserted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sapper.codegen.compile import compile_lane
from sapper.ir.verifier import verify
from sapper.lane.ops import LANE_OPS
from sapper.runtime.buffers import empty
from sapper.targets.x86_64.detect import host, host_target
from sapper.targets.x86_64.target import TARGETS
from sapper.tune import peaks as module
from sapper.tune.peaks import (
    CHAINS,
    COPY_ROWS,
    FLOPS,
    KIB,
    LEVELS,
    MIB,
    STREAMS,
    TILE_PRODUCTS,
    Peaks,
    Probe,
    arithmetic_program,
    copy_probe,
    copy_program,
    measure_peaks,
    read_probe,
    read_program,
    tile_probe,
)

TARGET = host_target()
MACHINES = [TARGET] + [TARGETS["v3"]] * (TARGETS["v3"].features <= host().features)
FEATURES = {"fma": {"fma"}, "dot2_bf16": {"avx512_bf16"}, "dot4_u8i8": {"avx512_vnni", "avx_vnni"},
            "pairs_u8i8": {"avx2"}}
PEAKS = Peaks(1, 100.0, None, None, {"L1": 64.0, "L2": 32.0, "L3": 16.0, "DRAM": 8.0}, 6.0, 10.0,
              {"L1": 100, "L2": 1000, "L3": 10000})


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("target", MACHINES, ids=lambda t: t.name)
@pytest.mark.parametrize("op", FLOPS)
def test_arithmetic_is_done(op: str, target: Any, threads: int) -> None:
    if not FEATURES[op] & target.features:
        pytest.skip(f"{target.name} here has none of {FEATURES[op]}")
    out = empty(threads * target.lanes, "i32" if "i8" in op else "f32")
    probe = Probe(arithmetic_program(op, target.lanes), target, threads, 1.0, out=out)
    probe.run(5)
    # Words that are multiplied again as bytes: 1 + 1, and from then on 2 + 0.
    expected = CHAINS * 0x20002 if op == "pairs_u8i8" else 5 * 2 * CHAINS * FLOPS[op] // 2
    assert (out == expected).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("multiply", TILE_PRODUCTS)
def test_products_of_tiles_are_done(multiply: str, threads: int) -> None:
    left, right, _, _ = TILE_PRODUCTS[multiply]
    unit = TARGET.tiles
    if unit is None or (left.name, right.name) not in unit.products:
        pytest.skip("this CPU has no such tiles")
    probe = tile_probe(multiply, threads, TARGET)
    probe.run(5)
    sums = probe.words["out"]
    assert (sums == 5 * 2 * unit.size * (32 // left.bits)).all()
    assert probe.work * 5 == 2 * sums.sum(dtype=np.float64)


def test_arithmetic_is_that_of_the_best_instruction() -> None:
    found = replace(PEAKS, bf16_flops=200.0, int8_ops=400.0)
    assert [found.arithmetic(p) for p in ("f32", "bf16", "i8", "f64")] == [100.0, 200.0, 400.0, 100.0]
    found = replace(found, tile_bf16_flops=3200.0)
    assert [found.arithmetic(p) for p in ("f32", "bf16", "i8")] == [100.0, 3200.0, 400.0]


@pytest.mark.parametrize(("ahead_bytes", "places"), [(0, 1), (0, 4), (3072, 1)])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("target", MACHINES, ids=lambda t: t.name)
def test_every_byte_is_read(target: Any, threads: int, ahead_bytes: int, places: int) -> None:
    part = 3 * STREAMS * target.lanes
    data = empty(threads * part)
    data[:] = np.arange(threads * part) % 97
    out = empty(threads * target.lanes)
    program = read_program(target.lanes, ahead_bytes, places)
    Probe(program, target, threads, 1.0, out=out, data=data, part_bytes=4 * part).run(2)
    assert out.reshape(threads, -1).sum(axis=1).tolist() == (2 * data.reshape(threads, -1).sum(axis=1)).tolist()


@pytest.mark.parametrize(("streaming", "ahead_bytes"), [(False, 0), (True, 0), (False, 1024)])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_byte_is_copied(threads: int, streaming: bool, ahead_bytes: int) -> None:
    part = 5 * COPY_ROWS * TARGET.lanes
    data, out = empty(threads * part + 16), empty(threads * part + 16)
    data[:] = np.arange(len(data))
    out.fill(-1.0)
    Probe(copy_program(TARGET.lanes, streaming, ahead_bytes), TARGET, threads, 1.0, out=out, data=data,
          part_bytes=4 * part).run(1)
    assert (out[: threads * part] == data[: threads * part]).all()
    assert (out[threads * part :] == -1.0).all()


def test_the_work_of_a_probe_is_what_its_workers_do() -> None:
    assert read_probe(64 * KIB, 2, TARGET).work == 64 * KIB
    assert copy_probe(64 * KIB, 2, TARGET, True).work == 2 * 64 * KIB
    assert read_probe(1, 2, TARGET).work == 2 * STREAMS * TARGET.lanes * 4  # a step for each, at least


def test_programs_are_well_formed_and_keep_their_accumulators_in_registers() -> None:
    lanes = TARGET.lanes
    for program in (arithmetic_program("fma", lanes), arithmetic_program("pairs_u8i8", lanes), read_program(lanes),
                    read_program(lanes, 0, 4), read_program(lanes, 3072), copy_program(lanes, True),
                    copy_program(lanes, False, 1024)):
        verify(program, LANE_OPS)
        assert compile_lane(program, TARGET, checked=True).statistics["spills"] == 0


def test_peaks_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.READ_BYTES, "L3", 64 * KIB)
    monkeypatch.setitem(module.READ_BYTES, "DRAM", 256 * KIB)
    monkeypatch.setattr(module, "COPY_BYTES", 128 * KIB)
    said: list[str] = []
    found = measure_peaks(1, 0.02, said.append)
    assert tuple(found.read) == LEVELS
    rates = (found.f32_flops, found.int8_ops, found.copy, found.copy_streaming, *found.read.values())
    assert all(rate is not None and rate > 0 for rate in rates)
    assert (found.bf16_flops is None) == (not TARGET.has("avx512_bf16"))
    assert (found.int8_products == "dot4_u8i8") == (TARGET.has("avx512_vnni") or TARGET.has("avx_vnni"))
    assert "fma" in said and "reads in DRAM" in said


@pytest.mark.parametrize(("held_mib", "told_mib", "found_mib"), [
    (64, 480, 64), (128, 480, 128),     # a virtual machine's part of a large cache
    (8, 480, 8), (480, 480, 480), (32, 32, 32), (6, 4, 4)])
def test_how_much_the_last_cache_holds_is_measured(held_mib: int, told_mib: int, found_mib: int) -> None:
    def reading(size_bytes: int) -> float:
        return 27.0 if size_bytes <= held_mib * MIB else 15.0

    assert module.held_bytes(reading, 28.0, told_mib * MIB) == found_mib * MIB


def test_the_level_is_the_smallest_that_holds_all() -> None:
    assert [PEAKS.level(size) for size in (100, 101, 1001, 10001)] == list(LEVELS)


@pytest.mark.parametrize(
    ("flops", "read", "written", "level", "seconds"),
    [
        (1000, 8, 0, "L1", 10.0),  # arithmetic
        (0, 640, 0, "L1", 10.0),
        (0, 600, 40, "L1", 10.0),  # in a cache all bytes alike
        (0, 80, 0, "DRAM", 10.0),
        (0, 50, 50, "DRAM", 10.0),  # a copy, with the faster stores
        (0, 130, 50, "DRAM", 20.0),  # a copy, and 80 bytes more read
        (0, 50, 150, "DRAM", 20.0),  # a copy, and 100 bytes more written
    ],
)
def test_floor(flops: int, read: int, written: int, level: str, seconds: float) -> None:
    assert PEAKS.floor_s(flops, read, written, level) == seconds


def test_the_floor_takes_the_peak_of_the_products() -> None:
    """Of those of a type that has none the multiply-adds' is what is left."""
    packed = replace(PEAKS, int8_ops=400.0)
    assert [packed.floor_s(1000, 0, 0, "L1", products) for products in ("f32", "bf16", "i8")] == [10.0, 10.0, 2.5]


def test_the_floor_takes_the_faster_copy() -> None:
    assert replace(PEAKS, copy=20.0).floor_s(0, 50, 50, "DRAM") == 5.0
