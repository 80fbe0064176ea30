"""The library's kernels as PTX: right on the emulator for a ragged shape, the same text for all levels but its head."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from sapper import emulate, targets
from sapper.cli.kernels import specialise
from sapper.codegen.pipeline import Compiled, compile_function, compile_kernel
from sapper.kernels import find, library
from sapper.kernels.attention_narrow import KERNELS as NARROW_ATTENTION
from sapper.kernels.record import LibraryKernel
from sapper.runtime.arguments import Parameter, Signature
from sapper.runtime.specialise import specialise as specialise_call
from sapper.targets.ptx.target import TARGETS
from sapper.tile.schedule import Schedule
from tests.kernels.shapes import interpreted
from tests.lane.run_lane import specialize
from tests.strategies.amount import FUZZ, dealt

LIBRARY = library()


ALIGNED = frozenset({"q", "keys", "values", "out"})
"""Tensors of kernels that want them so for matrix instructions."""


def text_of(entry: LibraryKernel, level: str) -> str:
    """As `sapper asm --target LEVEL` prints it: for large extents. Attention in 16 bits: of aligned tensors."""
    return text_of_name(entry.name, level)


@cache
def text_of_name(name: str, level: str) -> str:
    """Made once for all tests of it, in whichever of the runner's processes."""
    shared = os.environ.get("SAPPER_TEST_SHARED")
    if shared is None:
        return made(name, level)
    kept = Path(shared, f"{name}.{level}.ptx")
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        whole = kept.with_suffix(f".{os.getpid()}")
        whole.write_text(made(name, level))
        whole.rename(kept)
    return kept.read_text()


def made(name: str, level: str) -> str:
    entry = find(name)
    return compile_kernel(entry.kernel, target=targets.target(level), schedule=None,
                          aligned=ALIGNED if entry in NARROW_ATTENTION else frozenset(),
                          **specialise(entry.kernel, {}, {})).text()


def check(entry: LibraryKernel, shape: dict[str, int], workers: int, level: str = "sm_80") -> None:
    arguments = entry.make_arguments(np.random.default_rng(5), shape)
    with np.errstate(all="ignore"):
        expected = entry.reference(arguments)
    emulate.run(entry.kernel, *arguments.values(), target=level, workers=workers)
    wrong = entry.compare(arguments, expected)
    assert wrong is None, wrong


def test_half_a_warp_holds_the_panel_that_rows_meet() -> None:
    """16 rows of weights by 4 of activations at a time: 43 276 instructions of warps; where sums that the loop over
    blocks carries lie in memory, and each row unpacks its own weights, 247 408."""
    entry = find("matmul_q4")
    arguments = entry.make_arguments(np.random.default_rng(5), {"P": 2, "G": 1, "C": 32, "M": 32})
    run = emulate.run(entry.kernel, *arguments.values(), target="sm_80", workers=1)
    assert entry.compare(arguments, entry.reference(arguments)) is None
    assert sum(run.counters.instructions.values()) < 60_000


MOST_VOLUME = 40_000 if FUZZ else 20_000
"""The product of the extents of a shape for the emulator."""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("entry", dealt(LIBRARY, 0, 2), ids=lambda entry: entry.name)
def test_on_the_emulator(entry: LibraryKernel) -> None:
    """The raggedest of the shapes that a NumPy emulator gets through in a second or two."""
    shapes = [s for s in entry.check_shapes if 0 < np.prod([n for k, n in s.items() if k != "position"]) <= MOST_VOLUME]
    check(entry, interpreted(entry, shapes[-1]), workers=8)


ROW_BYTES = 64


def whole_rows(entry: LibraryKernel, shape: dict[str, int]) -> dict[str, int]:
    """Rows of matrices that are multiplied of whole 64 bytes, ragged beside tiles still: of K and N, but not an N that
    counts blocks of panels."""
    rows = {"K", *(str(type.dims[-1]) for _, type in entry.kernel.parameters if getattr(type, "dims", ()))}
    return shape | {dim: -(-shape[dim] // 32) * 32 for dim in rows & set("KN")
                    if {"K", "N"} <= shape.keys() and shape[dim]}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("entry", dealt(LIBRARY, 1, 2), ids=lambda entry: entry.name)
def test_aligned_on_the_emulator(entry: LibraryKernel) -> None:
    """What a call gets whose rows start at multiples of 64 bytes: boxes and matrix instructions; in a search for faults
    also what it gets of others. All levels but sm_90a get what sm_80 gets, or more types; where sm_90a gets the text of
    sm_80, too, it is not run again."""
    shapes = [s for s in entry.check_shapes if 0 < np.prod([n for k, n in s.items() if k != "position"]) <= MOST_VOLUME]
    arguments = entry.make_arguments(np.random.default_rng(6), whole_rows(entry, interpreted(entry, shapes[-1])))
    signature = Signature(entry.kernel.name, [Parameter.of(*one) for one in entry.kernel.parameters],
                          entry.kernel.options.get("in_place", ()))
    known = specialise_call(signature, signature.bind(tuple(arguments.values())), frozenset())
    aligned = frozenset(name for name, value in arguments.items() if isinstance(value, np.ndarray) and value.ndim > 1
                        and value.shape[-1] * value.itemsize % ROW_BYTES == 0)
    codes = {(level, names): compile_kernel(
        entry.kernel, static_dims=dict(known.static_dims), unit_strides=dict(known.unit_strides),
        dim_classes=dict(known.dim_classes), target=targets.target(level), schedule=None, aligned=names)
        for level in ("sm_80", "sm_90a") for names in dict.fromkeys((aligned, *[frozenset[str]()] * bool(FUZZ)))}
    ran: set[str] = set()
    with np.errstate(all="ignore"):
        expected = entry.reference(arguments)
    for (level, _), code in codes.items():
        if body(code) in ran:
            continue
        ran.add(body(code))
        given = {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in arguments.items()}
        emulate.run(entry.kernel, *given.values(), target=level, workers=6, code=code)
        wrong = entry.compare(given, expected)
        assert wrong is None, (level, wrong)


def body(code: Compiled) -> str:
    """The text behind the lines that name the level."""
    return code.text().split("\n", 2)[2]


def test_empty_and_single_elements() -> None:
    for name in ("vector_add", "softmax", "matmul_nn_f32", "rotate_and_cache_f32"):
        entry = find(name)
        for shape in entry.check_shapes[:2]:
            check(entry, shape, workers=1, level="sm_90a")


def test_levels_differ_in_their_heads_only() -> None:
    entry = find("softmax")
    bodies = set()
    for level in TARGETS:
        _, target, rest = text_of(entry, level).split("\n", 2)
        assert target == f".target {level}"
        bodies.add(rest)
    assert len(bodies) == 1


def test_the_lowest_version_of_ptx_that_knows_the_level() -> None:
    heads = {level: text_of(find("vector_add"), level).split("\n", 1)[0] for level in TARGETS}
    assert {level: head.removeprefix(".version ") for level, head in heads.items()} == {
        "sm_80": "7.0", "sm_86": "7.1", "sm_89": "7.8", "sm_90a": "8.0", "sm_100a": "8.6", "sm_120a": "8.7"}


def test_the_same_bytes_each_time() -> None:
    for name in ("attention_bf16", "rotate_and_cache_f32"):
        assert made(name, "sm_80") == text_of(find(name), "sm_80")


def test_a_cpu_is_no_target_of_the_emulator() -> None:
    with pytest.raises(ValueError, match="found 'v3'; expected a GPU such as sm_80"):
        emulate.run(find("vector_add").kernel, *[np.zeros(4, np.float32)] * 3, target="v3")


def test_a_tensor_that_runs_backwards_is_refused() -> None:
    back = np.zeros(4, np.float32)[::-1]
    with pytest.raises(emulate.EmulationError, match="found a tensor with a negative stride"):
        emulate.run(find("vector_add").kernel, back, np.zeros(4, np.float32), np.zeros(4, np.float32), target="sm_80")


@pytest.mark.parametrize("name", ["grouped_matmul_swiglu_f32", "grouped_matmul_swiglu_bf16"])
def test_rules_for_few_registers_are_not_for_threads(name: str) -> None:
    """A lane of theirs is a thread: squares that a CPU of 16 registers takes made twice the code of gate and up."""
    entry = find(name)
    function = entry.kernel.tile_ir()
    arguments = entry.make_arguments(np.random.default_rng(0), entry.check_shapes[-1])
    code = compile_function(function, Schedule(), targets.target("sm_90a"), specialize(function, arguments))
    assert code.text().count("\n") < 800


def test_rows_of_a_product_share_what_they_meet() -> None:
    """A warp takes several rows of a product that matrix instructions do not make: each step of its loops,
    over whole rows of lanes and what is left, loads what they meet once."""
    assert text_of_name("matmul_nt_i8", "sm_80").count("ld.global.s8") >= 2 * (8 + 1)
