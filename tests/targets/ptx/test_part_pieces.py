"""Products of f32 whose operands lanes split into parts of bf16, in registers: on the emulator, and as text."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import Tensor, bf16, emulate, f32, targets, tiles, zeros
from sapper.codegen.pipeline import Compiled, compile_kernel
from sapper.emulate.conflicts import shared_accesses
from sapper.kernels import find
from sapper.targets.ptx import assembler
from sapper.targets.ptx.target import TARGETS
from sapper.tile.schedule import Schedule
from tests.strategies import examples

from .left_out import replaced
from .test_ptxas import needs_nvdisasm, needs_ptxas

LIBRARY = ("matmul_nt_f32", "matmul_nt_bf16", "matmul_nn_bf16", "matmul_tn_bf16")
BESIDE = ("matmul_swiglu_bf16", "grouped_matmul_swiglu_bf16", "matmul_nt_residual_f32", "matmul_nt_bias_gelu_f32",
          "batched_matmul_nt_f32", "grouped_matmul_f32", "expand_bf16_f32")
PRODUCTS = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"

M, N, K = sp.dims("M N K")


@sp.kernel
def right_f32(a: Tensor[bf16, K, M], b: Tensor[f32, N, K], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[k, m] @ b[n, k]
        c[m, n] = acc


KERNELS = {**{name: find(name).kernel for name in LIBRARY}, "right_tt_f32": right_f32}


def text_of(kernel: Any, level: str, schedule: Schedule | None = None, divisor: int = 16) -> str:
    names = [name for name, type in kernel.parameters if hasattr(type, "dims")]
    known = {d: (8192, divisor if d == "K" else 16) for d in kernel.tile_ir().attributes["dims"]}
    made = compile_kernel(kernel, {}, dict.fromkeys(names, "contiguous"), known, targets.target(level), schedule,
                          frozenset(names))
    assert isinstance(made, Compiled)
    return made.text()


def operands_of(name: str, m: int, n: int, k: int, seed: int = 0) -> list[np.ndarray]:
    order, types = name.split("_")[1], [type.dtype for _, type in KERNELS[name].parameters[:2]]
    random = np.random.default_rng(seed)
    shapes = ((m, k) if order[0] == "n" else (k, m), (k, n) if order[1] == "n" else (n, k))
    return [random.standard_normal(shape).astype(np.float32 if dtype is f32 else ml_dtypes.bfloat16)
            for shape, dtype in zip(shapes, types, strict=True)]


def either(name: str, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with the depth between them."""
    order = name.split("_")[1]
    return a if order[0] == "n" else a.T, b if order[1] == "n" else b.T


def multiplied(name: str, operands: list[np.ndarray], level: str, lazy: bool = False,
               schedule: Schedule | None = None, workers: int = 3) -> tuple[np.ndarray, Any]:
    kernel = KERNELS[name]
    a, b = either(name, *operands)
    c = np.full((a.shape[0], b.shape[1]), np.nan, np.float32)
    made = emulate.run(kernel, *operands, c, target=level, workers=workers, schedule=schedule,
                       aligned=[name for name, _ in kernel.parameters], options=emulate.Options(lazy=lazy))
    return c, made.counters


def assert_as_exact_as_floats(name: str, operands: list[np.ndarray], c: np.ndarray) -> None:
    """As sums of k products in f32, in any order; what is left out of products is worth as much as four roundings."""
    a, b = (v.astype(np.float64) for v in either(name, *operands))
    assert (np.abs(c - a @ b) <= (a.shape[1] + 4) * 2.0 ** -24 * (np.abs(a) @ np.abs(b))).all()


@pytest.mark.parametrize("level", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("name", KERNELS)
def test_on_the_emulator(name: str, level: str) -> None:
    """Races, uninitialised reads and accesses out of bounds raise; lazy: a copy lands only when it is waited for."""
    for shape, lazy in (((128, 144, 80), True), ((80, 64, 160), False)):
        operands = operands_of(name, *shape)
        c, counters = multiplied(name, operands, level, lazy)
        assert_as_exact_as_floats(name, operands, c)
        assert counters.instructions["cp.async.cg.shared.global"] and counters.instructions[PRODUCTS]
        assert not any(text.startswith("fma.rn.f32") for text in counters.instructions)


@pytest.mark.parametrize("name", [name for name in BESIDE if name != "expand_bf16_f32"])
def test_with_more_than_one_product_on_the_emulator(name: str) -> None:
    """Of gate and up, of groups and of batches, and with what follows a product."""
    entry = find(name)
    extents = {"B": 2, "E": 3, "M": 72, "N": 144, "K": 96, "L": 96, "I": 144, "F": 144, "J": 64}
    arguments = entry.make_arguments(np.random.default_rng(3), {d: extents[d] for d in entry.check_shapes[-1]})
    expected = entry.reference(arguments)
    made = emulate.run(entry.kernel, *arguments.values(), target="sm_80", workers=3,
                       aligned=[name for name, value in arguments.items() if np.ndim(value) > 1])
    assert entry.compare(arguments, expected) is None
    assert made.counters.instructions["cp.async.cg.shared.global"] and made.counters.instructions[PRODUCTS]


@settings(max_examples=examples(6), deadline=None)
@given(name=st.sampled_from(sorted(KERNELS)), m=st.integers(4, 9), n=st.integers(4, 9), k=st.integers(4, 9),
       tile=st.sampled_from([None, {"m": 64, "n": 64}]), lazy=st.booleans(), seed=st.integers(0, 99))
def test_extents_end_anywhere_in_tiles(name, m, n, k, tile, lazy, seed) -> None:
    operands = operands_of(name, 16 * m, 16 * n, 16 * k, seed)
    c, counters = multiplied(name, operands, "sm_80", lazy, tile and Schedule(tile=tile), 1 + seed % 3)
    assert counters.instructions[PRODUCTS]
    assert_as_exact_as_floats(name, operands, c)


@pytest.mark.parametrize("name", ["matmul_nt_f32", "matmul_tn_bf16", "matmul_nt_bf16", "right_tt_f32"])
def test_no_bit_of_a_float_is_lost(name: str) -> None:
    """Times one, floats come back as they were."""
    operands = operands_of(name, 64, 64, 64)
    one = 0 if name == "right_tt_f32" else 1
    random = np.random.default_rng(1)
    wide = np.ldexp(random.uniform(1, 2, (64, 64)), random.integers(-100, 126, (64, 64)))
    operands[1 - one] = (wide * random.choice([-1, 1], (64, 64))).astype(np.float32)
    operands[one] = np.eye(64, dtype=operands[one].dtype)
    c, _ = multiplied(name, operands, "sm_80")
    a, b = either(name, *operands)
    np.testing.assert_array_equal(c, a if one == 1 else b)


@pytest.mark.parametrize("name", ["matmul_nt_f32", "matmul_nt_bf16"])
def test_infinities_and_nans_are_what_they_are_in_floats(name: str) -> None:
    a, b = operands_of(name, 64, 64, 64)
    for row, value in enumerate((np.inf, -np.inf, np.nan, np.array(0x7F800001, np.uint32).view(np.float32))):
        a[row, 7 + row] = value
    b[6, 7] = 0             # by an infinity: no number
    b[8, 7] = 1             # whose second part is none
    b[10, 7] = 2.0**100 * (1 + 2.0**-7)
    if name == "matmul_nt_f32":
        b[5, 3] = b[9, 7] = b[11, 8] = -np.inf
        a[4, 3] = 1
    with np.errstate(invalid="ignore"):
        expected = a @ b.astype(np.float32).T
        c, _ = multiplied(name, [a, b], "sm_80")
    odd = ~np.isfinite(expected)
    assert odd.sum() >= 4 * 64
    np.testing.assert_array_equal(c[odd], expected[odd])
    assert np.isfinite(c[~odd]).all()


@pytest.mark.parametrize("name", KERNELS)
def test_copies_and_reads_meet_in_no_bank(name: str) -> None:
    accesses = shared_accesses(text_of(KERNELS[name], "sm_80"))
    kinds = {re.split(r"[ .]", access.text)[0] for access in accesses}
    assert {"cp", "ld"} <= kinds and len(accesses) > 20
    assert [access for access in accesses if access.proof is None or not access.proof.free] == []


def test_a_schedule_without_matrix_instructions_gets_none() -> None:
    for name in ("matmul_nt_f32", "matmul_nt_bf16"):
        assert "mma.sync" not in text_of(KERNELS[name], "sm_80", Schedule(matrix=False))


FAULTS = {
    "copies are swizzled otherwise": (r"and\.b32 (%r\d+), (%r\d+), 1;", r"and.b32 \1, \2, 2;", 0),
    "fragments are": (r"and\.b32 (%r\d+), (%r\d+), 1;", r"and.b32 \1, \2, 2;", 1),
    "the second half of a piece": (r"xor\.b32 (%r\d+), (%r\d+), 64;", r"xor.b32 \1, \2, 0;", 0),
    "halves of a slot": (r"(prmt\.b32 %r\d+, )(%r\d+), (%r\d+), 30258;", r"\1\3, \2, 30258;", 4),
    "a part is not what is left": (r"(sub\.rn\.f32 %r\d+, )(%r\d+), (%r\d+);", r"\1\2, \2;", 0),
    "the first stage is not committed": (r"cp\.async\.commit_group;", "", 0),
    "one copy too few is waited for": (r"cp\.async\.wait_group 1;", "cp.async.wait_group 2;", 0),
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_faults_are_caught(fault: str | None) -> None:
    names = [name for name, _ in KERNELS["matmul_nt_f32"].parameters]
    made = compile_kernel(KERNELS["matmul_nt_f32"], {}, dict.fromkeys(names, "contiguous"),
                          dict.fromkeys("MNK", (4096, 16)), targets.target("sm_80"),
                          Schedule(tile={"m": 64, "n": 64}), frozenset(names))
    text = made.text() if fault is None else replaced(made.text(), *FAULTS[fault])
    extents = {"M": 64, "N": 64, "K": 160}
    operands = operands_of("matmul_nt_f32", *extents.values())
    arguments = dict(zip(names, [*operands, np.full((64, 64), np.nan, np.float32)], strict=True))
    words = [arguments[s.split(".")[0]] if s.endswith("data") else extents[s.split(".")[1]] for s in made.slots]
    try:
        emulate.load(text).launch(grid=(1,), block=(128,), shared_bytes=made.near_bytes,
                                  arguments=[np.zeros(64), 64, np.zeros(1024, np.uint8), *words],
                                  options=emulate.Options(lazy=True))
        assert_as_exact_as_floats("matmul_nt_f32", operands, arguments[names[-1]])
    except (emulate.EmulationError, AssertionError):
        assert fault is not None
    else:
        assert fault is None


@needs_ptxas
@pytest.mark.parametrize("level", TARGETS)
def test_nothing_spills(level: str) -> None:
    """Sums, parts of fragments and addresses are all that a thread has room for."""
    kernels = [*KERNELS.values(), *(find(name).kernel for name in BESIDE)]
    texts = [text_of(kernel, level) for kernel in kernels[list(TARGETS).index(level) % 2::2]]
    for name, made in assembler.assemble(texts, level).items():
        assert made.spilled_bytes == 0, name


@needs_ptxas
@needs_nvdisasm
@pytest.mark.parametrize(("name", "most"), [("matmul_nt_f32", 5.0), ("matmul_nt_bf16", 2.5)])
def test_the_loop_has_few_instructions_beside_products(name: str, most: float) -> None:
    """For each of theirs, which keeps tensor cores of an A100 busy for 8 issues of its scheduler."""
    (made,) = assembler.assemble([text_of(KERNELS[name], "sm_80")], "sm_80").values()
    loop = min((found for found in made.loops() if found["HMMA"]), key=lambda found: sum(found.values()))
    assert loop["HMMA"] >= 96 and sum(loop.values()) - loop["HMMA"] <= most * loop["HMMA"]
