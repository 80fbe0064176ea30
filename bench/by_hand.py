"""Assembly by hand beside the generated code: `python bench/by_hand.py`, a table of what each piece gains here.

Each case runs both codes in turn on the same arrays, one worker, and takes the best of its turns. What this CPU cannot
run is named with the reason. Every piece is checked against its kernel before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

import sapper as sp
from sapper import Schedule, Tensor, bf16, f32, tiles, zeros
from sapper.kernels.by_hand import matmul, rows
from sapper.kernels.matmul import make_matmul_nn
from sapper.targets import host_target

TURNS = 15
M, N, K = sp.dims("M N K")
random = np.random.default_rng(0)


@sp.kernel
def exponential(x: Tensor[f32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = sp.exp(x[n])


def make_matmul_bf16() -> Any:
    @sp.kernel(name="matmul_bf16_bf16")
    def matmul_bf16(a: Tensor[bf16, M, K], b: Tensor[bf16, K, N], c: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=f32)
            for k in tiles(K):
                acc += a[m, k] @ b[k, n]
            c[m, n] = acc

    return matmul_bf16


def normal(*extents: int) -> Any:
    return random.standard_normal(extents, dtype=np.float32)


Case = tuple[str, Callable[[], None], Callable[[], None]]


def prepared(kernel: Any, *arguments: Any, **options: Any) -> Any:
    return sp.prepare(kernel, *arguments, threads=1, **options)


def matmul_cases(name: str, shape: Any, make: Callable[[], Any], dtype: Any, wanted: Any) -> Iterator[Case]:
    hand, generated = make(), make()
    matmul.attach(hand, shape)
    missing = sorted(hand.by_hand[0].features - host_target().features)
    if missing:
        print(f"{name:34} not measured: this CPU has no {', '.join(missing)}")
        return
    for size in (256, 1024):
        a, b = normal(size, size).astype(dtype), normal(size, size).astype(dtype)
        c, other = np.zeros((2, size, size), np.float32)
        options = {} if wanted is None else {"target": wanted}
        yield (f"{name}, {size} x {size} x {size}", prepared(hand, a, b, c, **options),
               prepared(generated, a, b, other, **options))


def cases() -> Iterator[Case]:
    def nn() -> Any:
        return make_matmul_nn(f32)

    yield from matmul_cases("matmul f32, 14 x 32, AVX-512", matmul.AVX512, nn, np.float32, None)
    yield from matmul_cases("matmul f32, 6 x 16, AVX2", matmul.AVX2, nn, np.float32, "v3")
    yield from matmul_cases("matmul bf16, 14 x 32, vdpbf16ps", matmul.BF16, make_matmul_bf16, ml_dtypes.bfloat16, None)
    if not set(rows.FEATURES.split()) <= host_target().features:
        print("the other pieces are not measured: this CPU has no AVX-512")
        return
    for count in (4096, 1 << 20):
        x, y, z = normal(count), np.zeros(count, np.float32), np.zeros(count, np.float32)
        yield (f"exp, table of 32, {count}", prepared(exponential, x, y, schedule=Schedule(assembly=("exp_by_table",))),
               prepared(exponential, x, z))
    for columns in (64, 1024):
        x = normal(1024, columns)
        s, other = np.zeros((2, 1024), np.float32)
        hand, generated = rows.make_row_sum(), rows.make_row_sum()
        rows.attach_row_sum(hand)
        yield f"row sum, 1024 x {columns}", prepared(hand, x, s), prepared(generated, x, other)
    w = random.integers(-2**31, 2**31, 4096, dtype=np.int64).astype(np.int32)
    v = normal(8, 4096)
    y, z = np.zeros((2, 4096), np.float32)
    yield ("4-bit dot, 4096 x 8", prepared(rows.make_dot4(True), w, v, y), prepared(rows.make_dot4(False), w, v, z))
    table = normal(100_000, 256)
    for tokens in (64, 4096):
        ids = random.integers(0, 100_000, tokens).astype(np.int32)
        y, z = np.zeros((2, tokens, 256), np.float32)
        hand, generated = rows.make_embedding(), rows.make_embedding()
        rows.attach_embedding(hand)
        yield f"embedding, {tokens} of 100000 x 256", prepared(hand, table, ids, y), prepared(generated, table, ids, z)


def best_of(*calls: Callable[[], None]) -> list[float]:
    """The best time of each call in seconds; short ones are repeated within a turn."""
    repeats = []
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        repeats.append(max(1, int(0.002 / max(1e-7, time.perf_counter() - start))))
    best = [float("inf")] * len(calls)
    for _ in range(TURNS):
        for at, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(repeats[at]):
                call()
            best[at] = min(best[at], (time.perf_counter() - start) / repeats[at])
    return best


def main() -> None:
    measured = list(cases())
    print(f"{'piece':44} {'by hand':>10} {'generated':>10} {'ratio':>6}")
    for name, hand, generated in measured:
        mine, other = best_of(hand, generated)
        print(f"{name:44} {mine * 1e6:8.1f}us {other * 1e6:8.1f}us {other / mine:6.2f}")


if __name__ == "__main__":
    main()
