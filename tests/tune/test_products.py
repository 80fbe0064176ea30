"""Products that warps multiply together: the steps of a search, and their estimates; nothing is run."""

from __future__ import annotations

from typing import Any

import pytest

from sapper import targets
from sapper.codegen.pipeline import HINTS, compile_kernel, facts_of
from sapper.kernels import find
from sapper.lane.choices import Choices, choices
from sapper.tile.canonical import canonicalize
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import DimClass, Schedule, ScheduleError, Specialization
from sapper.tune import tuner
from sapper.tune.space import Step, steps
from sapper.tune.tuner import CALL, Known, Subject, tune_on_paper

MATMUL, GROUPED = find("matmul_nt_bf16_bf16"), find("grouped_matmul_bf16_bf16")
LARGE = {"M": 4096, "N": 4096, "K": 4096}


def chosen(kernel: Any, level: str, schedule: Schedule, extent: int | dict[str, int] = 4096) -> Choices:
    function = kernel.tile_ir()
    reduce_loops(function)
    canonicalize(function)
    names = [name for name, _ in kernel.parameters]
    dims = {dim: DimClass(extent if isinstance(extent, int) else extent[dim], 64)
            for dim in function.attributes["dims"]}
    return choices(function, schedule, facts_of(targets.target(level)),
                   Specialization(dims, dict.fromkeys(names, "contiguous"), frozenset(names)))


def neighbours(kernel: Any, level: str, schedule: Schedule) -> dict[str, Step]:
    return {step.label: step for step in steps(schedule, chosen(kernel, level, schedule), 24, threads=132)}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("schedule", [
    Schedule(), Schedule(tile={"m": 64, "n": 128}), Schedule(split={"k": 4}), Schedule(stream="k"),
    Schedule(cluster={"n": 4}), Schedule(tile={"m": 128, "n": 128}, cluster={"m": 2})], ids=lambda s: str(s.to_json()))
@pytest.mark.parametrize("level", ["sm_80", "sm_90a"])
def test_what_was_chosen_is_told_and_gives_itself(level: str, schedule: Schedule) -> None:
    if schedule.cluster and level == "sm_80":
        with pytest.raises(ScheduleError, match="cluster of"):
            chosen(MATMUL.kernel, level, schedule)
        return
    made = chosen(MATMUL.kernel, level, schedule, HINTS[8192])
    assert made.product is not None
    told = made.product.schedule()
    assert schedule.cluster.items() <= told.cluster.items() and told.stream == schedule.stream
    assert level == "sm_90a" or not told.cluster
    assert schedule.tile.items() <= told.tile.items() and schedule.split.items() <= told.split.items()
    assert not made.schedule.registers and not made.schedule.order      # which would take it off the instructions
    again = chosen(MATMUL.kernel, level, told, HINTS[8192])
    assert again.product == made.product and again.schedule == made.schedule
    dims = dict.fromkeys("MNK", (8192, 64))
    texts = [compile_kernel(MATMUL.kernel, {}, dict.fromkeys("abc", "contiguous"), dims, targets.target(level), one,
                            frozenset("abc")).text() for one in (schedule, made.schedule)]
    assert texts[0] == texts[1]


def test_steps_on_sm_90a() -> None:
    found = neighbours(MATMUL.kernel, "sm_90a", Schedule())
    assert {label: step.schedule.to_json() for label, step in found.items()} == {
        "tile m n 128 x 256 -> 128 x 128": {"tile": {"m": 128, "n": 128}},
        "tile m n 128 x 256 -> 64 x 128": {"tile": {"m": 64, "n": 128}},
        "tile m n 128 x 256 -> 64 x 64": {"tile": {"m": 64, "n": 64}},
        "k parted evenly among all workers": {"stream": "k"},
        "each tile's k split among 2 workers": {"split": {"k": 2}},
        **{f"clusters of {workers} along {axis}": {"cluster": {axis: workers}} for axis, workers in (
            ("m", 4), ("n", 2), ("n", 4))},
        "no clusters": {"cluster": {"m": 1}},
        "stores through the caches": {"streaming": []}}


def test_the_depth_is_gone_through_in_one_way_at_a_time() -> None:
    """A step from one way to another leaves the first, and the clusters; all of them are taken by the lowering."""
    for schedule in (Schedule(split={"k": 4}), Schedule(stream="k"), Schedule(cluster={"m": 2}),
                     Schedule(split={"k": 1}, cluster={"m": 1})):
        found = neighbours(MATMUL.kernel, "sm_90a", schedule)
        for step in found.values():
            one = step.schedule
            assert sum((one.stream is not None, any(n > 1 for n in one.split.values()))) <= 1
            assert step.part == "cluster" or one.cluster == schedule.cluster
            chosen(MATMUL.kernel, "sm_90a", one)
        assert ("no clusters" in found) == (1 not in schedule.cluster.values())
        assert ("whole tiles" in found) == bool(schedule.stream or schedule.split.get("k", 1) > 1)
    assert {"each tile's k split among 3 workers", "each tile's k split among 6 workers"} <= neighbours(
        MATMUL.kernel, "sm_90a", Schedule(split={"k": 4})).keys()


def test_on_sm_80_there_are_no_clusters_and_in_groups_no_shares() -> None:
    assert not any("cluster" in label for label in neighbours(MATMUL.kernel, "sm_80", Schedule()))
    grouped = neighbours(GROUPED.kernel, "sm_90a", Schedule())
    assert any(label.startswith("tile") for label in grouped) and not any("split" in label for label in grouped)


def test_what_the_lowering_refuses_is_told_once_with_its_reason() -> None:
    known = Known(GROUPED.kernel, targets.target("sm_90a"), dict.fromkeys("JFEBL", 512), ("x", "w", "y"))
    told: list[str] = []
    for _ in range(2):
        assert not any("cluster" in step.label for step in known.neighbours(Schedule(), 132, told.append))
    assert len(told) == 4 and all("refused" in line and "found a loop over groups" in line for line in told)


def test_attention_chained_in_registers_has_no_tile_to_choose() -> None:
    made = chosen(find("attention_bf16_128").kernel, "sm_90a", Schedule())
    assert made.product is None and not made.schedule.tile


# ------------------------------------------------------------------------------------------------------------ on paper

def known(level: str, extents: dict[str, int]) -> Known:
    return Known(MATMUL.kernel, targets.target(level), extents, "abc")


def test_the_estimate_is_the_models_for_the_very_extents() -> None:
    """128 x 4096 x 16384, as docs/choices/gpus.md has it."""
    few, tile = known("sm_90a", {"M": 128, "N": 4096, "K": 16384}), {"m": 128, "n": 128}
    both, unit = few.estimate(Schedule(tile=tile, split={"k": 4}, cluster={"n": 2}))
    shared, _ = few.estimate(Schedule(tile=tile, split={"k": 4}, cluster={"m": 1}))
    whole, _ = few.estimate(Schedule(tile={"m": 64, "n": 64}, split={"k": 1}, cluster={"m": 1}))
    assert unit == CALL and [round(cycles / 1e3) for cycles in (both, shared, whole)] == [56, 72, 127]
    assert chosen(MATMUL.kernel, "sm_90a", Schedule(), {"M": 128, "N": 4096, "K": 16384}).product == chosen(
        MATMUL.kernel, "sm_90a", Schedule(tile=tile, stream="k", cluster={"n": 2}),
        {"M": 128, "N": 4096, "K": 16384}).product


def test_a_cluster_brings_less_from_the_cache() -> None:
    """A piece of 128 x 256 is 48 KiB deep 64: 1536 cycles at 32 bytes a cycle; with half of b 32 KiB, as long as its
    products. Tiles are taken in whole clusters: of 9 along m three clusters of four."""
    tile = {"m": 128, "n": 256}
    large = known("sm_90a", LARGE)
    pieces = 4 * 4096 // 64         # 512 tiles on 132 processors
    assert large.estimate(Schedule(tile=tile, cluster={"m": 1}))[0] == pieces * 1536
    assert large.estimate(Schedule(tile=tile, cluster={"m": 2}))[0] == pieces * 1024
    assert large.estimate(Schedule())[0] == pieces * 1024       # which is what the model takes
    odd = known("sm_90a", {"M": 9 * 128, "N": 256 * 16, "K": 64})
    assert odd.estimate(Schedule(tile=tile, cluster={"m": 1}))[0] == 2 * 1536              # 144 tiles
    assert odd.estimate(Schedule(tile=tile, cluster={"m": 4}))[0] == 2 * 1024              # 192


def test_few_workers_have_more_of_the_cache() -> None:
    """As much as one takes: of 64 x 64 deep 64, 16 KiB come at 64 bytes a cycle; to all of them at 32."""
    tile = Schedule(tile={"m": 64, "n": 64}, cluster={"m": 1}, split={"k": 1})
    assert known("sm_90a", {"M": 64, "N": 64, "K": 640}).estimate(tile)[0] == 10 * 256
    assert known("sm_90a", {"M": 64 * 12, "N": 64 * 11, "K": 640}).estimate(tile)[0] == 10 * 512


def test_a_search_on_paper_runs_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "try_candidate", None)
    told: list[str] = []
    # A call is compiled for extents up to 8192, which are taken for 2048: of 2304 there is more than a wave of tiles.
    subject = Subject(MATMUL.name, MATMUL.kernel, {"M": 2304, "N": 2304, "K": 4096}, MATMUL.make_arguments)
    found = tune_on_paper(subject, targets.target("sm_90a"), 1e9, told.append)
    assert found.finished and found.unit == CALL and found.cycles < found.model_cycles
    assert known("sm_90a", subject.shape).estimate(found.schedule)[0] == found.cycles
    assert all("on paper" in line or "refused" in line for line in told) and len(told) >= found.tried
    stopped = tune_on_paper(subject, targets.target("sm_90a"), 1.0, told.append, clock=iter([0.0, 2.0, 2.0]).__next__)
    assert not stopped.finished and stopped.tried == 0 and stopped.schedule == Schedule()


@pytest.mark.parametrize("target", ["sm_90a", "zen4"])
def test_other_kernels_are_estimated_by_their_loops(target: str) -> None:
    entry = find("rms_norm")
    subject = Subject(entry.name, entry.kernel, {"M": 64, "N": 1024}, entry.make_arguments)
    found = tune_on_paper(subject, targets.target(target), 1e9, lambda _: None)
    assert found.unit in ("byte", "operation") and 0 < found.cycles <= found.model_cycles
