"""Products of ragged groups beside other loops: what a group makes in memory before them, and what is done in their
place, is shared by a worker's warps. Panels of 16 and 32 columns on matrix instructions (sapper/lane/matrix.py)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, bf16, each, emulate, f32, i32, span, targets, tiles, whole, zeros
from sapper.codegen.pipeline import Compiled, compile_kernel
from sapper.emulate.conflicts import shared_accesses
from sapper.ir.nodes import Op
from sapper.kernels import find
from sapper.lane.lower import Lowering
from sapper.targets.ptx import assembler
from sapper.tile.interpret import interpret

from .test_block_products import tensors_of

E, H, J, K, M, N, Q = sp.dims("E H J K M N Q")

CASES = {
    "grouped_rounded_q4": {"E": 3, "P": 1, "R": 2, "B": 4, "J": 80},
    "grouped_rounded_q4k": {"E": 3, "P": 1, "R": 1, "S": 1, "J": 40},
    "grouped_swiglu_rounded_q8": {"E": 4, "P": 2, "R": 1, "B": 5, "J": 33},
    "grouped_rounded_q4m_128": {"E": 3, "P": 1, "R": 1, "B": 1, "J": 70},
    "grouped_fp8": {"E": 3, "N": 1, "T": 2, "K": 134, "A": 1, "J": 60},
    "grouped_swiglu_fp8": {"E": 3, "N": 1, "T": 2, "K": 144, "A": 1, "J": 60},
}
"""Groups without rows, with few, and with more than a tile; a depth that ends inside of a piece, or at one."""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CASES)
def test_on_the_emulator(name: str) -> None:
    """Lazily, where races would show, and where tensors are aligned."""
    entry = find(name)
    arguments = entry.make_arguments(np.random.default_rng(5), CASES[name])
    aligned = [] if CASES[name].get("K", 0) % 16 else tensors_of(entry.kernel)
    run = emulate.run(entry.kernel, *arguments.values(), target="sm_80" if aligned else "sm_90a", workers=1,
                      aligned=aligned, options=emulate.Options(lazy=True))
    assert entry.compare(arguments, entry.reference(arguments)) is None
    assert any(opcode.startswith("mma.sync") for opcode in run.counters.instructions)


@sp.kernel
def filled(x: Tensor[bf16, J, H, 2], w: Tensor[f32, E, Q, H, 2, 32], first: Tensor[i32, E], last: Tensor[i32, E],
           bias: Tensor[f32, Q, 32], near: Tensor[bf16, Q, H, 32, 2], y: Tensor[f32, J, Q, 32],
           seen: Tensor[f32, Q, 32], stop: Tensor[i32, Q, 1]):
    """Columns in pairs, made for each group, as is where its rows end. Groups of no more than three rows have a bias in
    place of a product, and see what the first row has by then."""
    for q in each(Q):
        for e in range(E):
            if last[e] - first[e] > 3:
                for h in tiles(H):
                    l, i = whole(32), whole(2)
                    near[q, h, l, i] = w[e, q, h, i, l].to(bf16)
                for i in tiles(1):
                    stop[q, i] = last[e]
                for m, l in tiles(span(first[e], stop[q, 0]), 32):
                    acc = zeros(m, l, dtype=f32)
                    for h, i in tiles(H, 2):
                        acc += x[m, h, i] @ near[q, h, l, i]
                    y[m, q, l] = acc
            else:
                for l in tiles(32):
                    seen[q, l] = y[0, q, l]
                for m in tiles(span(first[e], last[e])):
                    l = whole(32)
                    y[m, q, l] = bias[q, l]


@sp.kernel
def gated(x: Tensor[f32, M, K], gate: Tensor[f32, K, N], up: Tensor[f32, K, N], y: Tensor[f32, M, N]):
    """Both matrices lie across the depth."""
    for m, n in tiles(M, N):
        gate_sum = zeros(m, n, dtype=f32)
        up_sum = zeros(m, n, dtype=f32)
        for k in tiles(K):
            gate_sum += x[m, k] @ gate[k, n]
            up_sum += x[m, k] @ up[k, n]
        y[m, n] = gate_sum * up_sum


def arguments_of_filled() -> dict[str, np.ndarray]:
    """Groups of 0, 70, 2, 5 and 66 rows."""
    random = np.random.default_rng(4)
    last = np.cumsum([0, 70, 2, 5, 66], dtype=np.int32)
    first = np.array([0, *last[:-1]], np.int32)
    return {
        "x": random.standard_normal((143, 40, 2)).astype(ml_dtypes.bfloat16),
        "w": random.standard_normal((5, 2, 40, 2, 32), dtype=np.float32), "first": first, "last": last,
        "bias": random.standard_normal((2, 32), dtype=np.float32),
        "near": np.zeros((2, 40, 32, 2), ml_dtypes.bfloat16), "y": np.full((143, 2, 32), np.nan, np.float32),
        "seen": np.zeros((2, 32), np.float32), "stop": np.zeros((2, 1), np.int32)}


def compiled(kernel: Any, level: str) -> Compiled:
    names = tensors_of(kernel)
    return compile_kernel(kernel, {}, dict.fromkeys(names, "contiguous"), dict.fromkeys(
        kernel.tile_ir().attributes["dims"], (256, 16)), targets.target(level), None, frozenset(names))


@pytest.mark.parametrize("level", ["sm_80", "sm_90a"])
def test_what_is_made_and_what_is_done_in_its_place(level: str) -> None:
    arguments = arguments_of_filled()
    copies = {name: array.copy() for name, array in arguments.items()}
    interpret(filled.tile_ir(), copies)
    code = compiled(filled, level)
    counters = emulate.run(filled, *arguments.values(), target=level, workers=2, code=code,
                           options=emulate.Options(lazy=True)).counters
    assert code.warps == 4 and any(opcode.startswith("mma.sync") for opcode in counters.instructions)
    np.testing.assert_array_equal(arguments["near"], copies["near"])
    for name in ("y", "seen"):
        np.testing.assert_allclose(arguments[name], copies[name], rtol=1e-5, atol=1e-4)


def test_warps_wait_for_what_others_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after such a loop: without either, the emulator finds a race."""
    by_warps, effect = Lowering._by_warps, Lowering.effect
    for left_out in (0, 1):
        def without(low: Lowering, op: Op, left_out: int = left_out) -> None:
            number = -1

            def some(name: str, *rest: Any, **attributes: Any) -> None:
                nonlocal number
                number += name == "sync_warps"
                if name != "sync_warps" or number != left_out:
                    effect(low, name, *rest, **attributes)

            monkeypatch.setattr(low, "effect", some, raising=False)
            by_warps(low, op)
            monkeypatch.delattr(low, "effect")

        with monkeypatch.context() as patch:
            patch.setattr(Lowering, "_by_warps", without)
            code = compiled(filled, "sm_80")
        with pytest.raises(emulate.RaceError):
            emulate.run(filled, *arguments_of_filled().values(), target="sm_80", workers=2, code=code)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("extents", [(70, 64, 80), (129, 100, 70)], ids=str)
def test_gates_of_matrices_across_the_depth(extents: tuple[int, int, int], aligned: bool) -> None:
    """As exact as f32."""
    m, n, k = extents
    random = np.random.default_rng(m)
    x, gate, up = (random.standard_normal(shape, dtype=np.float32) for shape in ((m, k), (k, n), (k, n)))
    y = np.full((m, n), np.nan, np.float32)
    names = ["x", "gate", "up"] if aligned and n % 16 == 0 and k % 16 == 0 else []
    counters = emulate.run(gated, x, gate, up, y, target="sm_80", workers=2, aligned=names).counters
    assert any(opcode.startswith("mma.sync") for opcode in counters.instructions)
    x, gate, up = (a.astype(np.float64) for a in (x, gate, up))
    terms = (np.abs(x) @ np.abs(gate)) * (np.abs(x) @ np.abs(up))
    assert (np.abs(y - (x @ gate) * (x @ up)) <= 2 * (k + 5) * 2.0**-24 * terms).all()


@pytest.mark.parametrize("name", ["grouped_rounded_q4", "grouped_swiglu_fp8", "grouped_matmul_swiglu_f32"])
def test_without_bank_conflicts(name: str) -> None:
    """Rows of 64 and of 32 bytes in near memory, too."""
    accesses = shared_accesses(compiled(find(name).kernel, "sm_80").text())
    assert accesses and all(access.proof is not None and access.proof.free for access in accesses)


@pytest.mark.skipif(None in map(assembler.find_tool, ("ptxas", "nvdisasm")),
                    reason="ptxas or nvdisasm is not installed")
@pytest.mark.parametrize(("name", "products", "most"), [
    ("grouped_rounded_q4", 32, 165), ("grouped_fp8", 96, 820), ("grouped_matmul_swiglu_f32", 192, 1080)])
def test_machine_code(name: str, products: int, most: int) -> None:
    """Of the loop over the depth, 64 of it a round; f32 takes six products for each, and to be split."""
    kernel = find(name).kernel
    names = tensors_of(kernel)
    text = compile_kernel(kernel, {}, dict.fromkeys(names, "contiguous"), dict.fromkeys(
        kernel.tile_ir().attributes["dims"], (2**31 - 1, 64)), targets.target("sm_80"), None, frozenset(names)).text()
    (made,) = assembler.assemble([text], "sm_80").values()
    loop = next(loop for loop in made.loops() if loop["HMMA"])
    assert not made.spilled_bytes and loop["HMMA"] == products and loop.total() <= most
