"""Blocks by hand ranked on paper, and as steps of the search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sapper as sp
from sapper import Schedule, Tensor, f32, tiles
from sapper.kernels.by_hand import rows as rows
from sapper.kernels.by_hand.contraction import f32_6x16, f32_14x32
from sapper.lang.by_hand import CONTRACTIONS, pieces_named
from sapper.runtime import tuned
from sapper.runtime.micro_kernel import product
from sapper.targets.x86_64.target import target
from sapper.tune.rank import Rank, fitting, rank, worth_a_trial

N, = sp.dims("N"),
V3, ZEN4 = target("v3"), target("zen4")
FACTS: dict[str, Any] = {"static_dims": {}, "unit_strides": dict.fromkeys("abc", "contiguous"),
                         "dim_classes": dict.fromkeys("MNK", (1024, 64))}
MODULE = "sapper.kernels.by_hand.contraction"


@sp.kernel
def exponential(a: Tensor[f32, N], b: Tensor[f32, N]):
    for n in tiles(N):
        b[n] = sp.exp(a[n])


def test_what_fits_is_found_with_the_module_that_it_is_written_in() -> None:
    assert fitting(product, ZEN4, **FACTS) == (f"{MODULE}:f32_14x32", f"{MODULE}:f32_14x32_blocks")
    assert fitting(product, V3, **FACTS) == (f"{MODULE}:f32_6x16",)
    assert fitting(product, ZEN4, Schedule(assembly=("f32_14x32",)), **FACTS) == ()
    assert fitting(product, ZEN4, Schedule(registers={"m": 12}), **FACTS) == ()
    dims = FACTS | {"dim_classes": {"N": (1024, 64)}}
    assert "sapper.kernels.by_hand.rows:exp_by_table" in fitting(exponential, ZEN4, **dims)


def test_the_module_is_imported_where_the_name_is_read() -> None:
    known = CONTRACTIONS.pop(f32_6x16.key)
    try:
        assert pieces_named("f32_6x16") == [] == pieces_named("no.such.module:f32_6x16")
    finally:
        CONTRACTIONS[known.key] = known
    assert pieces_named(f"{MODULE}:f32_6x16") == [f32_6x16]


def test_a_tuned_schedule_with_a_block_that_is_gone_is_left_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAPPER_TUNED", str(tmp_path))
    for name, found in ((f"{MODULE}:f32_6x16", True), ("no.such.module:f32_6x16", True), ("gone:f32_7x7", False)):
        entry = {"dims": {"M": 64}, "threads": 1, "source": "s", "schedule": {"assembly": [name]}}
        (tmp_path / "v3.json").write_text(json.dumps({"product": [entry]}))
        tuned.forget()
        expected = entry["schedule"] if found else None
        assert tuned.tuned_schedule("product", "s", "v3", {"M": 64}, 1) == expected
    tuned.forget()


def test_generated_code_and_a_block_are_ranked_by_their_bounds() -> None:
    ranks = rank(product, ZEN4, ["f32_14x32", "f32_6x16"], **FACTS)
    by_name = {r.name: r for r in ranks}
    # 56 multiply-adds of 16 lanes for each two steps: at most one of 512 bits in a cycle on Zen 4.
    assert by_name["f32_14x32"].cycles == pytest.approx(1 / 32)
    assert by_name["f32_14x32"].bound.startswith("ports") and by_name["f32_14x32"].used
    assert not by_name["f32_6x16"].used
    assert ranks == sorted(ranks, key=lambda r: (r.cycles, r.front_end, r.name))


def test_a_longer_block_for_exp_comes_second() -> None:
    ranks = rank(exponential, ZEN4, ["exp_by_table"], **FACTS | {"dim_classes": {"N": (1024, 64)}})
    assert [r.name for r in ranks] == ["", "exp_by_table"]
    assert {r.unit for r in ranks} == {"byte"}


def test_only_what_may_win_is_measured() -> None:
    ranks = [Rank("", 1.0, "byte", "latency"), Rank("near", 1.2, "byte", "latency"),
             Rank("far", 1.3, "byte", "latency"), Rank("elsewhere", 0.5, "byte", "latency", used=False)]
    assert worth_a_trial(ranks) == {"near"}


def test_the_search_tries_it_and_goes_on_from_its_tile() -> None:
    from sapper.codegen.pipeline import facts_of
    from sapper.lane.choices import choices
    from sapper.tile.canonical import canonicalize
    from sapper.tile.reduce_loops import reduce_loops
    from sapper.tile.schedule import DimClass, Specialization
    from sapper.tune.space import steps

    def around(schedule: Schedule) -> list[Any]:
        function = product.tile_ir()
        reduce_loops(function)
        canonicalize(function)
        made = choices(function, schedule, facts_of(ZEN4), Specialization(dict.fromkeys("MNK", DimClass(1024, 64))))
        return list(steps(schedule, made, 32, 1))

    tried = [step for step in around(Schedule()) if step.part == "block"]
    assert [step.label for step in tried] == ["block f32_14x32", "block f32_14x32_blocks"]
    assert tried[0].schedule == Schedule(assembly=(f"{MODULE}:f32_14x32",))
    after = {step.part for step in around(tried[0].schedule)}
    assert "block" not in after and "order" not in after and "stage a" not in after
    assert not any("registers m" in part or "registers n" in part for part in after)
    assert f32_14x32.rows == (14,)
