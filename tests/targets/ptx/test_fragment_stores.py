"""Sums of matrix instructions that are stored from registers: which way is taken, on the emulator, with faults."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, bf16, emulate, f32, i8, i32, span, targets, tiles, zeros
from sapper.codegen.pipeline import Compiled, compile_kernel, facts_of, to_lane
from sapper.ir.text import parse_function, print_function
from sapper.ir.verifier import verify
from sapper.lane import fragment_stores
from sapper.lane.conversions import Way
from sapper.lane.fragment_stores import fragment
from sapper.lane.ops import LANE_OPS
from sapper.lane.rehearse import rehearse
from sapper.targets.ptx import assembler
from sapper.tile.ops import TILE_OPS
from sapper.tile.schedule import DimClass, Schedule, Specialization

from .kernels import bf16_nn, bf16_nt, f16_tn, gated, turned_bf16
from .left_out import missed, replaced
from .test_matrix import arguments_of, assert_near, expected
from .ways_table import lines

M, N, K = sp.dims("M N K")


@sp.kernel
def turned_f32(a: Tensor[bf16, M, K], b: Tensor[bf16, N, K], c: Tensor[f32, N, M]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[n, k]
        c[n, m] = acc


@sp.kernel
def both(a: Tensor[bf16, M, K], b: Tensor[bf16, N, K], bias: Tensor[f32, N], d: Tensor[f32, M, N],
         c: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[n, k]
        d[m, n] = acc + bias[n]
        c[m, n] = (acc + bias[n]).to(bf16)


@sp.kernel
def in_place(a: Tensor[bf16, M, K], b: Tensor[bf16, N, K], c: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[n, k]
        c[m, n] = (c[m, n].to(f32) + acc).to(bf16)


@sp.kernel
def some_columns(a: Tensor[bf16, M, K], b: Tensor[bf16, N, K], c: Tensor[bf16, M, N]):
    for m in tiles(M):
        for n in tiles(span(0, N - 7)):
            acc = zeros(m, n, dtype=f32)
            for k in tiles(K):
                acc += a[m, k] @ b[n, k]
            c[m, n] = acc.to(bf16)


@sp.kernel
def low_bytes(a: Tensor[i8, M, K], b: Tensor[i8, N, K], c: Tensor[i8, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=i32)
        for k in tiles(K):
            acc += a[m, k] @ b[n, k]
        c[m, n] = (acc >> 8).to(i8)


WAYS = {
    (bf16_nn, True): "as it is", (bf16_nn, False): "near memory", (bf16_nt, True): "shuffles",
    (bf16_nt, False): "near memory", (f16_tn, True): "as it is", (gated, True): "near memory",
    (turned_f32, True): "as it is", (turned_bf16, True): "shuffles", (both, True): "as it is and shuffles",
    (in_place, True): "near memory",
}
"""By kernel, and whether all tensors are aligned. Words fill sectors; gates are computed in a loop."""
KERNELS = [kernel for kernel, aligned in WAYS if aligned] + [low_bytes]


def arguments(kernel: Any, extents: dict[str, int]) -> dict[str, np.ndarray]:
    if kernel is low_bytes:
        random = np.random.default_rng(3)
        return {name: random.integers(-99, 99, [extents[d] for d in t.dims]).astype(np.int8)
                for name, t in kernel.parameters}
    made = arguments_of(kernel, extents)
    if kernel is in_place:
        made["c"][...] = np.random.default_rng(4).standard_normal(made["c"].shape)
    return made


def lane_of(kernel: Any, level: str = "sm_80", aligned: bool = True, schedule: Schedule | None = None) -> Any:
    names = [name for name, _ in kernel.parameters]
    known = Specialization({d: DimClass(4096, 16) for d in "MNK"}, dict.fromkeys(names, "contiguous"),
                           frozenset(names if aligned else "ab"))
    return to_lane(kernel.tile_ir(), schedule or Schedule(), facts_of(targets.target(level)), known)


def way_of(lane: Any) -> str:
    """Of the sums, as the program shows it."""
    ops = [op for op in lane.walk() if op.name in ("store_run", "scatter", "store_matrix", "exchange")]
    if any(op.attributes.get("near") or op.name == "store_matrix" for op in ops):
        return "near memory"
    turned = any(op.name == "exchange" for op in ops)
    plain = any(op.attributes["dtype"].name == "f32" or len(op.operands) < 5 or op.name == "scatter"
                for op in ops if op.name != "exchange")
    return " and ".join(name for name, found in (("as it is", plain), ("shuffles", turned)) if found)


@pytest.mark.parametrize(("kernel", "aligned"), WAYS, ids=lambda v: getattr(v, "name", str(v)))
def test_the_way_that_is_taken(kernel: Any, aligned: bool) -> None:
    lane = lane_of(kernel, aligned=aligned)
    verify(lane, LANE_OPS)
    text = print_function(lane)
    assert print_function(parse_function(text, {"tile": TILE_OPS, "lane": LANE_OPS})) == text
    assert way_of(lane) == WAYS[kernel, aligned]
    assert rehearse(lane) == []


def test_the_way_is_that_of_the_least_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other figures, another way: of a port that takes all at once, nothing is gained by shuffles."""
    facts = facts_of(targets.target("sm_80"))
    assert facts.moves is not None
    wide = dataclasses.replace(facts.moves, port_bytes=1 << 12)
    names = [name for name, _ in bf16_nt.parameters]
    known = Specialization({d: DimClass(4096, 16) for d in "MNK"}, dict.fromkeys(names, "contiguous"), frozenset(names))
    taken: list[Way] = []
    choose = fragment_stores.cheapest
    monkeypatch.setattr(fragment_stores, "cheapest", lambda *given: taken.append(choose(*given)) or taken[-1])
    for moves, best in ((facts.moves, "shuffles"), (wide, "as it is")):
        taken.clear()
        lane = to_lane(bf16_nt.tile_ir(), Schedule(), dataclasses.replace(facts, moves=moves), known)
        assert taken[-1].name == best and way_of(lane) == best
        assert len([op for op in lane.walk() if op.name == "exchange"]) == (taken[-1].price.issued > 64) * 32


@pytest.mark.sampled(3)
@pytest.mark.parametrize("level", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("kernel", [*KERNELS, some_columns], ids=lambda kernel: kernel.name)
def test_on_the_emulator(kernel: Any, level: str) -> None:
    """Races, uninitialised reads and accesses out of bounds raise; lazy: a copy lands only when it is waited for."""
    names = [name for name, _ in kernel.parameters]
    for extents, lazy in (({"M": 200, "N": 288, "K": 96}, True), ({"M": 77, "N": 96, "K": 64}, False)):
        if kernel in (turned_f32, turned_bf16):
            extents = {**extents, "M": extents["M"] // 64 * 64}
        given = arguments(kernel, extents)
        wanted = expected(kernel, given)
        emulate.run(kernel, *given.values(), target=level, workers=2, aligned=names,
                    options=emulate.Options(lazy=lazy))
        kept = ~np.isnan(wanted)
        assert_near(given[names[-1]][kept], wanted[kept])
        assert (np.isnan(given[names[-1]].astype(np.float32)) == ~kept).all()


@cache
def compiled(kernel: Any, level: str = "sm_80") -> Compiled:
    names = [name for name, _ in kernel.parameters]
    return compile_kernel(kernel, {}, dict.fromkeys(names, "contiguous"), dict.fromkeys("MNK", (4096, 16)),
                          targets.target(level), None, frozenset(names))


def test_instructions_and_sectors_are_those_of_the_price() -> None:
    """Of a tile of 128 x 128: each of four warps stores 64 x 64."""
    for kernel, packed, bits in ((bf16_nn, False, 0), (bf16_nt, True, 1)):
        given = arguments_of(kernel, {"M": 128, "N": 128, "K": 64})
        options = emulate.Options(lines=True)
        text = compiled(kernel)
        counters = emulate.run(kernel, *given.values(), target="sm_80", workers=1, code=text, options=options).counters
        stores = {line: found for line, found in counters.lines.items()
                  if "st.global" in text.text().splitlines()[line - 1]}
        registers = 64 * 64 // 32 // (2 if packed else 1)
        assert fragment(64, 64, packed).level_extent("register") == registers
        full = 128 * 128 * given["c"].itemsize // 32
        assert sum(found.global_sectors for found in stores.values()) == full
        assert sum(found.runs for found in stores.values()) == 4 * registers // 2
        assert counters.instructions.get("shfl.sync.bfly.b32", 0) == 4 * bits * registers // 2


FAULTS = {
    "other lanes": (r"(shfl\.sync\.bfly\.b32 %r\d+, %r\d+), 1,", r"\1, 2,", 0),
    "the wrong half is given": (r"selp\.b32 (%r\d+), (%r\d+), (%r\d+), (%p\d+);(\s+shfl)",
                                r"selp.b32 \1, \3, \2, \4;\5", 3),
    "neighbours change places": (r"(st\.global\S* \[[^]]*\], \{)(%r\d+), (%r\d+)\}", r"\1\3, \2}", 5),
    "columns of another block": (r"(st\.global\S* \[%rd\d+)\+32\]", r"\1+64]", 0),
    "rows past the end": (r"@%p\d+ (st\.global)", r"\1", None),
    "half of a pair": (r"cvt\.rn\.bf16x2\.f32 (%r\d+), (%r\d+), (%r\d+);", r"cvt.rn.bf16x2.f32 \1, \3, \2;", 9),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_faults_are_caught(fault: str | None) -> None:
    given = arguments_of(bf16_nt, {"M": 136, "N": 160, "K": 64})
    wanted = expected(bf16_nt, given)
    code = compiled(bf16_nt)
    text = code.text() if fault is None else replaced(code.text(), *FAULTS[fault])
    assert (text == code.text()) == (fault is None)
    try:
        emulate.run(bf16_nt, *given.values(), target="sm_80", workers=1, options=emulate.Options(lazy=True),
                    code=dataclasses.replace(code, text=lambda: text))
        assert_near(given["c"], wanted)
    except (emulate.EmulationError, AssertionError):
        assert fault is not None
    else:
        assert fault is None


@pytest.mark.parametrize("name", ["sync_warps", "async_wait"])
def test_the_rehearsal_finds_what_is_left_out(name: str) -> None:
    """No meeting stands between the last products and the stores: the next tile's first one does for both."""
    assert missed(lane_of(bf16_nt), name) == []


def test_a_lane_does_not_store_what_another_still_reads() -> None:
    assert "exchange" not in {op.name for op in lane_of(in_place).walk()}
    assert "exchange" in {op.name for op in lane_of(bf16_nt).walk()}


@pytest.mark.skipif(assembler.find_tool("ptxas") is None, reason="ptxas is not installed")
@pytest.mark.parametrize("level", ["sm_80", "sm_90a"])
def test_ptxas_spills_nothing(level: str) -> None:
    texts = [compiled(kernel, level).text() for kernel in KERNELS]
    found = assembler.assemble(texts, level)
    assert len(found) == len(KERNELS) and not any(made.spilled_bytes for made in found.values())


def test_the_tables_in_the_docs_are_what_is_chosen() -> None:
    docs = (Path(__file__).parents[3] / "docs" / "choices" / "gpus.md").read_text()
    for table in "\n".join(lines()).split("\n\n"):
        assert table in docs, "mend: python -m tests.targets.ptx.ways_table"


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_rows_of_a_few_bytes_are_stored_element_by_element(columns: int) -> None:
    """They count as aligned (aligned_tensors), whatever they start at."""
    given = arguments_of(bf16_nt, {"M": 96, "N": columns, "K": 64})
    wanted = expected(bf16_nt, given)
    names = list(given)
    code = compile_kernel(bf16_nt, {}, dict.fromkeys(names, "contiguous"), {
        "M": (4096, 16), "N": (4096, 1), "K": (4096, 16)}, targets.target("sm_80"), None, frozenset(names))
    emulate.run(bf16_nt, *given.values(), target="sm_80", workers=1, code=code)
    assert_near(given["c"], wanted)
