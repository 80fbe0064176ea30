"""Assembly by hand beside generated code and peers: `python bench/by_hand.py [WORD]`, a table of what each gains here.

Each case runs all codes in turn on the same arrays, one thread, and takes the best of each one's turns. What this CPU
cannot run is named with the reason; peers that are not installed are left out. Every piece is checked against its
kernel before it is timed. WORD: only cases whose name has it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

import sapper as sp
from sapper import Schedule, Tensor, bf16, f32, tiles, zeros
from sapper.kernels.by_hand import blocked, codebook, matmul, rows
from sapper.kernels.by_hand import tiles as tiled
from sapper.kernels.matmul import make_matmul_nn
from sapper.lang.by_hand import pieces_named
from sapper.runtime.micro_kernel import whole_of
from sapper.targets import host_target

TURNS, TURNS_S = 15, 2.0
"""Each call has so many turns, or fewer where they take longer than so many seconds, but 5 at least."""
M, N, K = sp.dims("M N K")
random = np.random.default_rng(0)


@sp.kernel
def exponential(x: Tensor[f32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = sp.exp(x[n])


@sp.kernel
def to_bf16(x: Tensor[f32, N], y: Tensor[bf16, N]):
    for n in tiles(N):
        y[n] = x[n].to(bf16)


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


@dataclass(frozen=True, slots=True)
class Case:
    """The same work by hand, generated, and by peers. hand, generated: prepare a call, which tries and compiles it, so
    that only what is asked for takes that time."""

    name: str
    hand: Callable[[], Callable[[], Any]]
    generated: Callable[[], Callable[[], Any]]
    peers: dict[str, Callable[[], Any]]


def prepared(kernel: Any, *arguments: Any, **options: Any) -> Callable[[], Any]:
    return partial(sp.prepare, kernel, *arguments, threads=1, **options)


def torch_peer(make: Callable[[Any], Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """The call that `make(torch)` gives, on one thread; none where torch is not installed."""
    try:
        import torch
    except ModuleNotFoundError:
        return {}
    torch.set_num_threads(1)
    return {"torch": make(torch)}


def product_peers(a: Any, b: Any) -> dict[str, Callable[[], Any]]:
    """torch's (oneDNN or MKL) and NumPy's (OpenBLAS) product of f32 matrices; torch's of bf16, whose result is bf16."""
    c = np.empty((a.shape[0], b.shape[1]), np.float32)

    def with_torch(torch: Any) -> Callable[[], Any]:
        x, y = (torch.from_numpy(m.astype(np.float32)).to(dtype_of(torch)) for m in (a, b))
        z = torch.empty(c.shape, dtype=dtype_of(torch))
        return lambda: torch.mm(x, y, out=z)

    def dtype_of(torch: Any) -> Any:
        return torch.float32 if a.dtype == np.float32 else torch.bfloat16

    if a.dtype != np.float32:
        return torch_peer(with_torch)
    return torch_peer(with_torch) | {"numpy": lambda: np.matmul(a, b, out=c)}


def matmul_cases(name: str, attach: Callable[[Any], None], make: Callable[[], Any], dtype: Any, wanted: Any,
                 sizes: tuple[int, ...] = (256, 1024)) -> Iterator[Case]:
    hand, generated = make(), make()
    attach(hand)
    missing = sorted(hand.by_hand[0].features - host_target().features)
    if missing:
        print(f"{name:34} not measured: this CPU has no {', '.join(missing)}")
        return
    options = {} if wanted is None else {"target": wanted}
    for size in sizes:
        a, b = normal(size, size).astype(dtype), normal(size, size).astype(dtype)
        c, other = np.zeros((2, size, size), np.float32)
        yield Case(f"{name}, {size}", prepared(hand, a, b, c, **options), prepared(generated, a, b, other, **options),
                   product_peers(a, b))


def tile_cases(name: str, product: tiled.Product) -> Iterator[Case]:
    """A whole kernel on tile registers."""
    hand, generated = tiled.make_product(product), tiled.make_product(product)
    tiled.attach(hand, product)
    missing = sorted(hand.by_hand[0].features - host_target().features)
    if missing:
        print(f"{name:34} not measured: this CPU has no {', '.join(missing)}")
        return
    left, right, total = (t.dtype for _, t in hand.parameters)
    for size in (256, 1024):
        a, b = elements(left, size), elements(right, size)
        c, other = np.zeros((2, size, size), np.float32 if total is f32 else np.int32)
        yield Case(f"{name}, {size}", prepared(hand, a, b, c), prepared(generated, a, b, other),
                   product_peers(a, b) if total is f32 else integer_peer(a, b))


def make_swiglu(dtype: Any) -> Any:
    @sp.kernel(name="swiglu")
    def swiglu(x: Tensor[dtype, M, K], gate: Tensor[dtype, K, N], up: Tensor[dtype, K, N], y: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            one, other = zeros(m, n, dtype=f32), zeros(m, n, dtype=f32)
            for k in tiles(K):
                row = x[m, k]
                one += row @ gate[k, n]
                other += row @ up[k, n]
            y[m, n] = one * sp.sigmoid(one) * other

    return swiglu


def swiglu_peer(x: Any, gate: Any, up: Any) -> dict[str, Callable[[], Any]]:
    def with_torch(torch: Any) -> Callable[[], Any]:
        dtype = torch.float32 if x.dtype == np.float32 else torch.bfloat16
        a, b, c = (torch.from_numpy(m.astype(np.float32)).to(dtype) for m in (x, gate, up))
        return lambda: torch.nn.functional.silu(torch.mm(a, b)) * torch.mm(a, c)

    return torch_peer(with_torch)


def micro_kernel_cases(name: str, block: str, wanted: Any) -> Iterator[Case]:
    """A micro-kernel in generated loops."""
    piece: Any = pieces_named(block)[0]
    missing = sorted(piece.features - host_target().features)
    if missing:
        print(f"{name:34} not measured: this CPU has no {', '.join(missing)}")
        return
    options = {} if wanted is None else {"target": wanted}
    for size in (256, 1024):
        a, b, b1 = (elements(dtype, size) for dtype in (piece.dtype, piece.right_dtype, piece.right_dtype))
        c, other = np.zeros((2, size, size), np.float32 if piece.result is f32 else np.int32)
        given = (a, b) if piece.rights == 1 else (a, b, b1)
        kernel = make_swiglu(piece.dtype) if piece.rights == 2 else whole_of(piece)
        yield Case(f"{name}, {size}", prepared(kernel, *given, c, schedule=Schedule(assembly=(block,)), **options),
                   prepared(kernel, *given, other, **options),
                   swiglu_peer(*given) if piece.rights == 2 else integer_peer(a, b) if piece.result is not f32 else
                   product_peers(a.T if piece.left == "columns" else a, b))


def elements(dtype: Any, size: int) -> Any:
    """A square matrix of a dtype."""
    if dtype.is_float:
        return normal(size, size).astype(np.float32 if dtype is f32 else ml_dtypes.bfloat16)
    least = -(1 << 7) if dtype.name == "i8" else 0
    return random.integers(least, least + 256, (size, size)).astype(np.int8 if least else np.uint8)


def integer_peer(a: Any, b: Any) -> dict[str, Callable[[], Any]]:
    """torch's product of i8 matrices with sums of i32, which takes i8 only."""
    if a.dtype != np.int8:
        return {}

    def with_torch(torch: Any) -> Callable[[], Any]:
        x, y = torch.from_numpy(a), torch.from_numpy(b)
        return lambda: torch._int_mm(x, y)

    return torch_peer(with_torch)


def block_case(name: str, kernel: Any, schedule: Schedule, *arguments: Any, peers: Any = None) -> Case:
    """A block on rows in a generated kernel, whose last argument is its result."""
    *given, result = arguments
    return Case(name, prepared(kernel, *arguments, schedule=schedule), prepared(kernel, *given, np.zeros_like(result)),
                peers or {})


def cases() -> Iterator[Case]:
    def nn() -> Any:
        return make_matmul_nn(f32)

    yield from micro_kernel_cases("micro-kernel f32, 14 x 32, AVX-512", "f32_14x32", None)
    yield from micro_kernel_cases("micro-kernel f32, 14 x 32 over blocks", "f32_14x32_blocks", None)
    yield from micro_kernel_cases("micro-kernel f32, 14 x 32, left by columns", "f32_14x32_columns", None)
    yield from micro_kernel_cases("micro-kernel u8 by i8, 14 x 32, VNNI", "u8i8_14x32", None)
    yield from micro_kernel_cases("micro-kernel i8 by i8, 14 x 32 over blocks", "i8_14x32_blocks", None)
    yield from micro_kernel_cases("micro-kernel bf16, 14 x 32", "bf16_14x32", None)
    yield from micro_kernel_cases("micro-kernel SwiGLU f32, 2 x 14 x 16", "f32_2x14x16", None)
    yield from micro_kernel_cases("micro-kernel SwiGLU bf16, 2 x 14 x 16", "bf16_2x14x16", None)
    yield from micro_kernel_cases("micro-kernel f32, 6 x 16, AVX2", "f32_6x16", "v3")
    yield from matmul_cases("matmul f32, 14 x 32, AVX-512", lambda k: matmul.attach(k, matmul.AVX512), nn, np.float32,
                            None)
    yield from matmul_cases("matmul f32, 6 x 16, AVX2", lambda k: matmul.attach(k, matmul.AVX2), nn, np.float32, "v3")
    yield from matmul_cases("matmul f32 in blocks of the depth", blocked.attach, nn, np.float32, None, (1024,))
    yield from matmul_cases("matmul bf16, 14 x 32, vdpbf16ps", lambda k: matmul.attach(k, matmul.BF16),
                            make_matmul_bf16, ml_dtypes.bfloat16, None)
    yield from tile_cases("matmul bf16, 32 x 32, AMX", tiled.BF16)
    yield from tile_cases("matmul i8 by i8, 32 x 32, AMX", tiled.I8)
    yield from tile_cases("matmul u8 by i8, 32 x 32, AMX", tiled.U8_I8)
    if not set(rows.FEATURES.split()) <= host_target().features:
        print("the other pieces are not measured: this CPU has no AVX-512")
        return
    for count in (4096, 1 << 20):
        x, y = normal(count), np.zeros(count, np.float32)
        yield block_case(f"exp, table of 32, {count}", exponential, Schedule(assembly=("exp_by_table",)), x, y,
                         peers=torch_peer(lambda torch, x=x: _unary(torch.exp, torch.from_numpy(x), torch)))
    x, y = normal(4096), np.zeros(4096, ml_dtypes.bfloat16)
    yield block_case("cast to bf16, 4096", to_bf16, Schedule(assembly=("round_to_bf16",)), x, y,
                     peers=torch_peer(lambda torch, x=x: _cast(torch, x)))
    for columns in (64, 1024):
        x, s = normal(1024, columns), np.zeros(1024, np.float32)
        hand = rows.make_row_sum()
        rows.attach_row_sum(hand)
        generated = rows.make_row_sum()
        peers = torch_peer(lambda torch, x=x: _row_sum(torch, x))
        yield Case(f"row sum, 1024 x {columns}", prepared(hand, x, s), prepared(generated, x, np.zeros_like(s)), peers)
        yield block_case(f"row sum's last step, 1024 x {columns}", generated,
                         Schedule(assembly=("sum_of_each_row",), registers={"m": 16}), x, s, peers=peers)
    w = random.integers(-2**31, 2**31, 4096, dtype=np.int64).astype(np.int32)
    v = normal(8, 4096)
    y, z = np.zeros((2, 4096), np.float32)
    yield Case("4-bit dot, 4096 x 8", prepared(rows.make_dot4(True), w, v, y),
               prepared(rows.make_dot4(False), w, v, z), {})
    for count in (4096, 1 << 20):
        codes, book = random.integers(0, 256, count).astype(np.uint8), random.integers(-128, 128, 16).astype(np.int8)
        out, other, third = np.zeros((3, 2, count), np.int8)
        hand, generated = codebook.make_codebook(), codebook.make_codebook()
        codebook.attach(hand)
        yield Case(f"4-bit codebook, {count}", prepared(hand, codes, book, out),
                   prepared(generated, codes, book, other), {"numpy": _codebook(codes, book, third)})
    table = normal(100_000, 256)
    for tokens in (64, 4096):
        ids = random.integers(0, 100_000, tokens).astype(np.int32)
        y, z = np.zeros((2, tokens, 256), np.float32)
        hand, generated = rows.make_embedding(), rows.make_embedding()
        rows.attach_embedding(hand)
        yield Case(f"embedding, {tokens} of 100000 x 256", prepared(hand, table, ids, y),
                   prepared(generated, table, ids, z),
                   torch_peer(lambda torch, ids=ids: _embedding(torch, table, ids)))


def _unary(function: Any, x: Any, torch: Any) -> Callable[[], Any]:
    out = torch.empty_like(x)
    return lambda: function(x, out=out)


def _cast(torch: Any, x: Any) -> Callable[[], Any]:
    source, out = torch.from_numpy(x), torch.empty(x.shape, dtype=torch.bfloat16)
    return lambda: out.copy_(source)


def _row_sum(torch: Any, x: Any) -> Callable[[], Any]:
    source, out = torch.from_numpy(x), torch.empty(x.shape[0])
    return lambda: torch.sum(source, 1, out=out)


def _embedding(torch: Any, table: Any, ids: Any) -> Callable[[], Any]:
    source, chosen = torch.from_numpy(table), torch.from_numpy(ids)
    out = torch.empty((len(ids), table.shape[1]))
    return lambda: torch.index_select(source, 0, chosen, out=out)


def _codebook(codes: Any, book: Any, out: Any) -> Callable[[], Any]:
    def run() -> None:
        np.take(book, codes & 15, out=out[0])
        np.take(book, codes >> 4, out=out[1])

    return run


def best_of(*calls: Callable[[], None]) -> list[float]:
    """The best time of each call in seconds; short ones are repeated within a turn."""
    repeats = []
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        repeats.append(max(1, int(0.002 / max(1e-7, time.perf_counter() - start))))
    best = [float("inf")] * len(calls)
    end = time.perf_counter() + TURNS_S
    for turn in range(TURNS):
        if turn >= 5 and time.perf_counter() > end:
            break
        for at, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(repeats[at]):
                call()
            best[at] = min(best[at], (time.perf_counter() - start) / repeats[at])
    return best


def on_one_thread() -> None:
    """Start anew with NumPy's BLAS on one thread: it reads the setting when it is loaded."""
    wanted = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def main() -> None:
    on_one_thread()
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [case for case in cases() if wanted in case.name]
    if not chosen:
        sys.exit(f"error: found no piece with {wanted!r} in its name; expected a part of one of "
                 f"{', '.join(case.name for case in cases())}")
    print(f"{'piece':44} {'by hand':>10} {'generated':>10} {'ratio':>6}  peers (their time over that by hand)")
    for case in chosen:
        mine, generated, *others = best_of(case.hand(), case.generated(), *case.peers.values())
        told = ", ".join(f"{name} {peer / mine:.2f}" for name, peer in zip(case.peers, others, strict=True))
        print(f"{case.name:44} {mine * 1e6:8.1f}us {generated * 1e6:8.1f}us {generated / mine:6.2f}  {told}",
              flush=True)


if __name__ == "__main__":
    main()
