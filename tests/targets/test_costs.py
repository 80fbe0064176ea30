"""Every row has figures, and they are of the right order."""

from __future__ import annotations

import pytest

from sapper.targets.x86_64 import costs, intel_costs
from sapper.targets.x86_64.costs import _table, cost_of, family_of, model_of
from sapper.targets.x86_64.instructions import ROWS
from sapper.targets.x86_64.target import target

PIPES = {f"fp{n}" for n in range(4)} | {f"alu{n}" for n in range(4)} | {"load", "store", "branch", "tiles"}


def test_every_row_has_a_cost_and_no_figure_is_orphaned() -> None:
    for row in ROWS.values():
        cost = cost_of(row)
        assert 1 <= cost.latency <= 100 and 0 < cost.throughput <= 100, row.name
        assert cost.ports and set(cost.ports) <= PIPES, row.name
    assert set(_table()) == {family_of(name) for name in ROWS}


@pytest.mark.parametrize(("name", "latency", "throughput"), [
    ("vaddps.256", 3, 0.5), ("vaddps.512", 3, 1), ("vfmadd231ps.256", 4, 0.5), ("vfmadd231ps.512", 4, 1),
    ("vdivps.256", 11, 3), ("add.64", 1, 0.25), ("imul.64", 3, 1), ("vpaddd.256", 1, 0.25)])
def test_figures_of_well_known_rows(name: str, latency: int, throughput: float) -> None:
    row = ROWS[name]
    assert (row.latency, row.throughput) == (latency, throughput)


def test_multiplies_and_adds_take_different_pipes() -> None:
    assert set(ROWS["vfmadd231ps.512"].ports) == {"fp0", "fp1"}
    assert set(ROWS["vaddps.512"].ports) == {"fp2", "fp3"}
    assert ROWS["jne"].ports == ("branch",)


# ---- Intel's cores, for bounds

UNCLASSED = {
    "xchg", "xadd", "movnti", "push", "pop", "prefetchnta", "prefetcht0", "prefetcht1", "prefetcht2", "prefetchw",
    "vmovntdqa", "pushfq", "popfq", "int3", "ud2", "sfence", "vldmxcsr", "vstmxcsr", "vmovntps", "vmovntpd",
    "vmovntdq", "lfence", "clflushopt", "mfence", "pause", "cmpxchg", "lock.and", "lock.sub", "lock.xor",
    "lock.inc", "lock.add", "lock.or", "lock.dec", "lock.xadd", "lock.cmpxchg", "cpuid", "xgetbv", "rdtsc",
    "rdtscp", "syscall"}


def test_every_row_is_in_one_class_of_intels_cores() -> None:
    patterns = intel_costs._classes()
    assert set(patterns) == set(intel_costs._table())
    for family in _table():
        classes = [name for name, pattern in patterns.items() if pattern.fullmatch(family)]
        assert len(classes) == (0 if family in UNCLASSED else 1), family


@pytest.mark.parametrize("name", ["v3", "v4", "haswell", "skylake-avx512", "icelake-server", "sapphirerapids",
                                  "graniterapids"])
def test_every_row_has_figures_on_intels_cores(name: str) -> None:
    core = model_of(target(name))
    ports = {f"p{n}" for n in range(12)} | {"tiles"}
    for row in ROWS.values():
        assert 0 <= core.latency_of(row) <= 100, row.name
        for loaded, stored in ((0, 0), (512, 0), (0, 512), (64, 0)):
            for where, cycles in core.uses_of(row, loaded, stored):
                assert where and set(where) <= ports and 0 < cycles <= 100, row.name


@pytest.mark.parametrize(("name", "row", "loaded", "latency", "uses"), [
    ("haswell", "vfmadd231ps.256", 0, 5, [(("p0", "p1"), 0.5)]),
    ("haswell", "vaddps.256", 256, 3, [(("p2", "p3"), 0.5), (("p1",), 1.0)]),
    ("haswell", "vdivps.256", 0, 21, [(("p0",), 14.0)]),
    ("skylake-avx512", "vfmadd231ps.256", 0, 4, [(("p0", "p1"), 0.5)]),
    ("skylake-avx512", "vfmadd231ps.512", 512, 4, [(("p2", "p3"), 0.5), (("p0", "p5"), 0.5)]),
    ("skylake-avx512", "vpmulld.512", 0, 10, [(("p0", "p5"), 1.0)]),
    ("icelake-server", "vpdpbusd.512", 0, 5, [(("p0", "p5"), 0.5)]),
    ("sapphirerapids", "vaddps.256", 0, 3, [(("p1", "p5"), 0.5)]),
    ("sapphirerapids", "vmovups.512", 512, 0, [(("p2", "p3"), 0.5)]),
    ("sapphirerapids", "vmovups.256", 256, 0, [(("p2", "p3", "p11"), 1 / 3)]),
    ("sapphirerapids", "vpermt2w.512", 0, 7, [(("p5",), 2.0), (("p0", "p5"), 0.5)]),
    ("graniterapids", "vmulps.256", 0, 3, [(("p0", "p1"), 0.5)]),
    ("graniterapids", "vdpbf16ps.512", 0, 8, [(("p0",), 2.0)]),
    ("sapphirerapids", "tdpbf16ps", 0, 52, [(("tiles",), 16.0)]),
    ("sapphirerapids", "tileloadd", 8192, 45, [(("p2", "p3"), 8.0)]),
    ("graniterapids", "tdpbssd", 0, 16, [(("tiles",), 16.0)]),
    ("sapphirerapids", "add.64", 0, 1, [(("p0", "p1", "p5", "p6", "p10"), 0.2)]),
])
def test_figures_of_intels_cores(name: str, row: str, loaded: int, latency: int,
                                 uses: list[tuple[tuple[str, ...], float]]) -> None:
    core = model_of(target(name))
    assert core.latency_of(ROWS[row]) == latency
    assert core.uses_of(ROWS[row], loaded, 0) == uses


@pytest.mark.parametrize(("name", "operations"), [("tdpbf16ps", 16384), ("tdpbusd", 32768), ("vdpbf16ps.512", 64),
                                                  ("tileloadd", 0)])
def test_operations_of_products(name: str, operations: int) -> None:
    assert costs.operations_of(ROWS[name]) == operations


def test_a_gather_makes_an_access_for_each_lane() -> None:
    core = model_of(target("skylake-avx512"))
    assert core.uses_of(ROWS["vgatherdps.512"], 512, 0)[0] == (("p2", "p3"), 8.0)
    assert core.uses_of(ROWS["vscatterdps.512"], 0, 512)[0] == (("p4",), 16.0)


def test_zen_4_keeps_what_was_measured() -> None:
    model = model_of(target("zen4"))
    assert (model.MODEL, model.latency_of(ROWS["vfmadd231ps.512"])) == ("Zen 4", 4)
