"""Operands of products of every type that tensors have, however they lie: copied, kept as slots, read in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapper.codegen.pipeline import facts_of
from sapper.ir.types import bf16, f32
from sapper.lang.builtins import tiles, whole
from sapper.lang.dims import dims
from sapper.lang.kernel import kernel
from sapper.lang.tensor import Tensor
from sapper.targets.x86_64.target import TARGETS
from sapper.tile.canonical import canonicalize
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.rounding import expect
from tests.strategies import FUZZ, assert_expected
from tests.strategies.generate import HEADER
from tests.strategies.kernel_case import KernelCase, random_values

from .run_lane import run_lane, specialize

H, K, M, N, P = dims("H K M N P")
MIXES = [("i8", "i4", "i8"), ("u8", "i4", "i8"), ("i8", "bool_", "i8"), ("f32", "bool_", "f32"), ("f32", "i4", "f32"),
         ("bf16", "i4", "bf16"), ("bf16", "bool_", "bf16"), ("bf16", "f8e4m3", "bf16"), ("f32", "u8", "f32"),
         ("f16", "i8", "f16")]
"""The left operand, what the right one is stored as, and multiplied as."""
NUMPY = {"f32": np.float32, "i8": np.int8, "u8": np.uint8, "i32": np.int32}


@kernel
def rows_of_slots(a: Tensor[bf16, K, N, P], b: Tensor[f32, H, M, K], o: Tensor[f32, M, P, H, N]):
    """What is rounded is kept in pairs, rows of m side by side, and read along h."""
    for m in tiles(M):
        k = whole(K)
        for p in tiles(P):
            h = whole(H)
            for n in tiles(N):
                o[m, p, h, n] = (a[k, n, p] * 2) @ b[h, m, k].to(bf16).to(f32)


def drawn(made: Any, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random_values(random, tuple(sizes[d] for d in type.dims), type.dtype, False)
            for name, type in made.parameters}


def agrees(made: Any, sizes: dict[str, int], target: str, hints: dict[str, int]) -> None:
    arguments = drawn(made, sizes)
    expected = expect(made.tile_ir(), arguments, tile_sizes=(None, 9))
    function = reduce_loops(made.tile_ir())
    canonicalize(function)
    run_lane(function, arguments, facts=facts_of(TARGETS[target]),
             specialization=specialize(function, arguments, hints))
    assert_expected(arguments, expected, f"{made.name} on {target} at {sizes}, {hints}")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("target", ["zen3", "zen4"])
@pytest.mark.parametrize("order", ["n, k; h, k", "k, n; h, k", "n, k; k, h"])
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_types_that_are_widened(mix: tuple[str, str, str], order: str, target: str) -> None:
    """The byte in which an i4 lies holds more than its bits; a bool is a mask in registers, and not copied; what is
    kept widened is not read as it is stored. A run of the suite takes operands as they lie of some, computed ones of
    others; a search for faults both of all."""
    left, stored, widened = mix
    total = "i32" if left in ("i8", "u8") else "f32"
    first, second = order.split("; ")
    tensors = ", ".join(f"{name}: Tensor[{dtype}, {at.upper().replace('H', 'V')}]" for name, dtype, at in (
        ("a", left, first), ("b", stored, second), ("o", total, "n, h")))
    operands = (f"a[{first}]", f"maximum(a[{first}], 2)")
    for operand in operands if FUZZ else operands[MIXES.index(mix) % 2:][:1]:
        source = (f"{HEADER}K, N, V = dims('K N V')\n\n\n@kernel\ndef k({tensors}):\n    for n, h in tiles(N, V):\n"
                  f"        k = whole(K)\n        o[n, h] = {operand} @ b[{second}].to({widened})\n")
        agrees(KernelCase(source, "k", ()).load(), {"N": 17, "K": 13, "V": 18}, target, dict.fromkeys("NKV", 64))


@pytest.mark.parametrize("extents", [(2, 1, 2, 2, 1), (20, 5, 7, 18, 3)])
@pytest.mark.parametrize("hints", [(64, 512, 64, 64, 8), (512, 1, 64, 64, 512)])
def test_slots_that_are_read_along_another_axis_end_with_their_rows(extents: tuple[int, ...], hints: tuple[int, ...]
                                                                    ) -> None:
    """Lanes past the edge gathered what lies behind the memory of the slots."""
    agrees(rows_of_slots, dict(zip("MNKHP", extents, strict=True)), "zen4", dict(zip("MNKHP", hints, strict=True)))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("target", ["zen3", "zen4"])
@pytest.mark.parametrize(("left", "right", "result", "step", "total"), [
    ("f32", "f32", "f32", "t * t - t * 0.5", 7.5), ("i8", "u8", "i32", "(t & 15) | (t >> 1)", 15)])
def test_an_operand_of_which_all_is_read_twice(left: str, right: str, result: str, step: str, total: float,
                                               target: str) -> None:
    """Each of its steps is looked at once: as often as there are ways to it would be 2^40 times and more."""
    body = "        t = b[n, k]\n" + f"        t = {step}\n" * 40
    source = (f"{HEADER}K, N, V = dims('K N V')\n\n\n@kernel\ndef k(a: Tensor[{left}, V, K], b: Tensor[{right}, N, K], "
              f"o: Tensor[{result}, V, N]):\n    for h, n in tiles(V, N):\n        k = whole(K)\n{body}"
              "        o[h, n] = a[h, k] @ t\n")
    function = reduce_loops(KernelCase(source, "k", ()).load().tile_ir())
    canonicalize(function)
    value = 1.5 if right == "f32" else 3     # 1.5 * 1.5 - 0.75 = 1.5, and 3 | 1 = 3
    arguments = {"a": np.ones((3, 5), NUMPY[left]), "b": np.full((4, 5), value, NUMPY[right]),
                 "o": np.zeros((3, 4), NUMPY[result])}
    run_lane(function, arguments, facts=facts_of(TARGETS[target]),
             specialization=specialize(function, arguments, dict.fromkeys("NKV", 64)))
    np.testing.assert_array_equal(arguments["o"], np.full((3, 4), total))
