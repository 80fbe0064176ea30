"""Kernels on an NVIDIA device beside cuBLAS, PyTorch, Triton and a copy: `sapper bench gpu`, or `python bench/gpu.py`.

Needs a device, `pip install 'sapper[cuda]'`, and for the peers PyTorch with CUDA and Triton; a peer that is not there
is left out, as Triton's kernels are where bench/ is not on the path. Every result is checked before it is timed: some
rows against NumPy in f64, within what the kernel's rounding allows. Contestants of a case take turns; a sample is some
launches between two events, at least 2 ms of them; times are medians. It prints one table and ends within 10 minutes:
what does not fit is left out, and said. `--quick` takes small shapes, whose figures say nothing about speed.

What is wanted, of an H100 SXM: bf16 products 0.95 of cuBLAS, fp8 with block scales 1300 TFLOP/s, attention of 8192
positions 600 TFLOP/s, one token's attention and norms 0.9 of a copy's bandwidth.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, f8e4m3, f32, tiles, zeros

from ..kernels import find
from ..runtime import cuda
from ..runtime.cuda import CudaError
from ..runtime.dtypes import numpy_dtype
from ..runtime.errors import LaunchError

SECONDS = 540.0
ROUNDS = 9
SAMPLE_SECONDS = 0.002
CHECKED_ROWS = 16
RATE = "TFLOP/s"
M, N, K, MB, NB, KB = sp.dims("M N K MB NB KB")
BF16, F8 = numpy_dtype("bf16"), numpy_dtype("f8e4m3")
Call = Callable[[], Any]


OF_PRODUCTS = """Look at the other rows of this product: faster with clusters of 1, waits between workers cost more
  than the second cache gives (CLUSTER_WORTH of lane/depth_shares.py); slow at one size, a last wave (sapper tune
  --target); slow at all, the loop: under ncu stalls at mbarrier.try_wait are operands that come late,
  math_pipe_throttle is as it should be."""
OF_FP8 = """The sums of 128 of the depth are added in f32 while the other group multiplies (lane/groups.py): stalls
  of both groups at wgmma.wait_group at once say that they go in step, at mbarrier.try_wait that operands come late:
  try clusters {"m": 2}, {"n": 2} and {"m": 1}."""
OF_ATTENTION = """Two groups take turns (lane/chained_groups.py): compare with MatrixGroup(turns=False) in
  targets/ptx/target.py; processors that end early say that tasks are uneven (lane/tasks.py); the loop without a
  mask has 305 instructions for 64 keys, which must fit into the time of the other group's products."""
OF_MEMORY = """Under ncu dram__throughput: else too few warps at once (registers: tests/targets/ptx/recorded.json),
  loads of less than 16 bytes a lane (sapper explain), or rows that are read twice."""
"""Where to look."""


@sp.kernel
def matmul(a: Tensor[bf16, M, K], b: Tensor[bf16, N, K], c: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[n, k]
        c[m, n] = acc.to(bf16)


@sp.kernel
def matmul_fp8(a: Tensor[f8e4m3, M, K], sa: Tensor[f32, M, KB], b: Tensor[f8e4m3, N, K], sb: Tensor[f32, NB, KB],
               c: Tensor[bf16, M, N]):
    """Scales of 1 x 128 for activations and 128 x 128 for weights (DeepSeek-V3, 3.3)."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += (a[m, k].to(f32) * sa[m, k // 128]) @ (b[n, k].to(f32) * sb[n // 128, k // 128])
        c[m, n] = acc.to(bf16)


@dataclass
class Case:
    """ours: issues our kernel. check: None, or what is wrong with what it made. peers: name -> issues theirs, made when
    asked for. operations or bytes: of one launch. wanted: what the ratio to a peer of that name, or the rate in
    TFLOP/s, should be at least. hint: where to look if it is not."""

    name: str
    shape: str
    ours: Call
    check: Callable[[], str | None]
    peers: dict[str, Callable[[], Call | None]] = field(default_factory=dict)
    operations: float = 0.0
    bytes: float = 0.0
    wanted: tuple[float, str] | None = None
    hint: str = ""

    def told(self) -> str:
        """What is wanted, for people."""
        if self.wanted is None:
            return ""
        least, of = self.wanted
        return f"{least:g} {of}" if of == RATE else f"{least:g} x {of}"


def normal(random: np.random.Generator, *shape: int) -> Any:
    return random.standard_normal(shape, dtype=np.float32)


def rows_differ(made: Any, expected: Any, rows: Any, tolerance: float) -> str | None:
    """None, or the largest difference of some rows from what they should be. tolerance: of the largest element."""
    found = made[rows].astype(np.float64)
    allowed = tolerance * max(float(np.abs(expected).max()), 1e-30)
    worst = float(np.abs(found - expected).max()) if np.isfinite(found).all() else math.inf
    return None if worst <= allowed else f"differs by {worst:.3g}; allowed are {allowed:.3g}"


def torch_on(device: cuda.Device) -> Any:
    """PyTorch where it can use the device, else None."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() and torch.cuda.device_count() > device.ordinal else None


# ------------------------------------------------------------------------------------------------------------- cases

def product(random: np.random.Generator, shape: tuple[int, int, int], torch: Any,
            schedule: dict[str, Any] | None = None) -> Case:
    """shape: M, N, K. schedule: one that shows what the model's is worth."""
    height, width, depth = shape
    a, b = normal(random, height, depth).astype(BF16), normal(random, width, depth).astype(BF16)
    x, y, out = cuda.array(a), cuda.array(b), cuda.empty((height, width), "bf16")
    call = sp.prepare(matmul, x, y, out, **({"schedule": schedule} if schedule else {}))

    def check() -> str | None:
        rows = random.integers(0, height, CHECKED_ROWS)
        expected = a[rows].astype(np.float64) @ b.astype(np.float32).astype(np.float64).T
        # Products are exact in f32; sums of depth of them are rounded at most depth times, and the result to bf16.
        return rows_differ(out.numpy(), expected, rows, 2.0**-8 + depth * 2.0**-24)

    def cublas() -> Call:
        left, right = torch.from_dlpack(x), torch.from_dlpack(y)
        made = torch.empty(height, width, dtype=torch.bfloat16, device=left.device)
        return lambda: torch.matmul(left, right.T, out=made)

    peers: dict[str, Callable[[], Call | None]] = {"cuBLAS": cublas} if torch else {}
    if torch and height == width == depth:
        peers["Triton"] = lambda: triton_product(torch, x, y, height)
    cubed = height == width == depth
    asked = ", ".join(f"{entry} {value}" for entry, value in (schedule or {}).items())
    name = f"matmul bf16 NT, {asked}" if asked else "matmul bf16 NT"
    return Case(name, f"{height} cubed" if cubed else f"{height} x {width} x {depth}", call, check, peers,
                operations=2.0 * height * width * depth, wanted=(0.95, "cuBLAS"), hint=OF_PRODUCTS)


def triton_product(torch: Any, x: Any, y: Any, size: int) -> Call | None:
    """Its kernel of gpu_static.py; by tensor maps where the device has them."""
    try:
        import gpu_static_triton as theirs
        import triton
        from triton.tools.tensor_descriptor import TensorDescriptor
    except ImportError:
        return None
    a, b = torch.from_dlpack(x), torch.from_dlpack(y)
    c = torch.empty(size, size, dtype=torch.bfloat16, device=a.device)
    if x.device.capability < (9, 0):
        rows, columns, depth = 128, 128, 64
        grid = triton.cdiv(size, rows), triton.cdiv(size, columns)
        return lambda: theirs.product[grid](a, b, c, size, size, size, size, size, size, rows, columns, depth, True,
                                            num_warps=4, num_stages=3)
    rows, columns, depth = 128, 256, 64
    boxes = (TensorDescriptor.from_tensor(a, [rows, depth]), TensorDescriptor.from_tensor(b, [columns, depth]),
             TensorDescriptor.from_tensor(c, [rows, columns]))
    grid = triton.cdiv(size, rows), triton.cdiv(size, columns)
    return lambda: theirs.product_of_boxes[grid](*boxes, size, rows, columns, depth, True, num_warps=8, num_stages=4)


def product_fp8(random: np.random.Generator, size: int, torch: Any) -> Case:
    blocks = size // 128
    a, b = normal(random, size, size).astype(F8), normal(random, size, size).astype(F8)
    sa = random.uniform(0.5, 2.0, (size, blocks)).astype(np.float32)
    sb = random.uniform(0.5, 2.0, (blocks, blocks)).astype(np.float32)
    out = cuda.empty((size, size), "bf16")
    call = sp.prepare(matmul_fp8, cuda.array(a), cuda.array(sa), cuda.array(b), cuda.array(sb), out)

    def check() -> str | None:
        rows = random.integers(0, size, CHECKED_ROWS)
        left = a[rows].astype(np.float64) * np.repeat(sa[rows], 128, 1)
        right = b.astype(np.float32).astype(np.float64) * np.repeat(np.repeat(sb, 128, 0), 128, 1)
        # Within 128 of K the tensor cores keep about 14 bits of a sum (DeepSeek-V3, 3.3.2).
        return rows_differ(out.numpy(), left @ right.T, rows, 2.0**-8 + 2.0**-11)

    del torch
    return Case("matmul fp8, block scales", f"{size} cubed", call, check, operations=2.0 * size**3,
                wanted=(1300.0, RATE), hint=OF_FP8)


def attention(random: np.random.Generator, positions: int, heads: int, torch: Any) -> Case:
    depth, scale = 128, 128**-0.5
    q = normal(random, positions, heads, 1, depth).astype(BF16)
    keys, values = (normal(random, heads, positions, depth).astype(BF16) for _ in range(2))
    on_device = cuda.array(q), cuda.array(keys), cuda.array(values)
    out = cuda.empty(q.shape, "bf16")
    call = sp.prepare(find("attention_bf16_128").kernel, *on_device, 0, scale * math.log2(math.e), out)

    def check() -> str | None:
        rows = random.integers(0, positions, CHECKED_ROWS)
        expected = np.empty((len(rows), heads, 1, depth))
        for at, row in enumerate(rows):
            for head in range(heads):
                score = keys[head, :row + 1].astype(np.float64) @ q[row, head, 0].astype(np.float64) * scale
                weight = np.exp(score - score.max())
                expected[at, head, 0] = weight @ values[head, :row + 1].astype(np.float64) / weight.sum()
        return rows_differ(out.numpy(), expected, rows, 2.0**-7)

    def theirs() -> Call:
        shared = [torch.from_dlpack(one) for one in on_device]
        query, key, value = shared[0][:, :, 0].transpose(0, 1)[None], shared[1][None], shared[2][None]
        return lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)

    def tritons() -> Call | None:
        try:
            from gpu_static_triton import attention as kernel
        except ImportError:
            return None
        query, key, value = (torch.from_dlpack(one).reshape(heads, positions, depth) for one in on_device)
        made = torch.empty_like(query)
        return lambda: kernel[(positions // 128, heads)](query, key, value, made, positions, scale * math.log2(math.e),
                                                         depth, 128, 64, num_warps=8, num_stages=2)

    return Case("attention bf16, causal", f"T {positions}, {heads} heads of {depth}", call, check,
                {"PyTorch": theirs, "Triton": tritons} if torch else {},
                operations=2.0 * positions * (positions + 1) * heads * depth, wanted=(600.0, RATE),
                hint=OF_ATTENTION)


def decode(random: np.random.Generator, positions: int, heads: int, torch: Any) -> Case:
    """One token of a cache that four heads share: two kernels, beside a copy of half the cache, which moves as much."""
    depth, group, scale = 128, 4, 128**-0.5
    first, second = find("attention_decode_bf16_128"), find("merge_attention_bf16_128")
    given = first.make_arguments(random, {"H": heads, "G": group, "position": positions - 1}) | {
        "scale": scale * math.log2(math.e)}
    on_device = {key: cuda.array(value) if isinstance(value, np.ndarray) else value for key, value in given.items()}
    out = cuda.empty((heads, group, depth), "bf16")
    attends = sp.prepare(first.kernel, *on_device.values())
    joins = sp.prepare(second.kernel, *(on_device[name] for name in ("highest", "total", "partial", "position")), out)
    keys = on_device["keys"]
    target = cuda.empty(keys.shape, "bf16")

    def call() -> None:
        attends()
        joins()

    def check() -> str | None:
        made = {key: value.numpy() if isinstance(value, cuda.DeviceArray) else value for key, value in
                on_device.items()}
        return first.compare(made, first.reference(given)) or rows_differ(
            out.numpy(), second.reference(made)["out"], slice(None), 2.0**-7)

    def theirs() -> Call:
        query, key, value = (torch.from_dlpack(on_device[name]) for name in ("q", "keys", "values"))
        query, (key, value) = query.reshape(1, heads * group, 1, depth), (
            one[None, :, :positions] for one in (key, value))
        return lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)

    peers: dict[str, Callable[[], Call | None]] = {"copy": lambda: lambda: target.copy_from_device(keys)}
    return Case("attention bf16, one token", f"{positions} positions, {heads} x {group} heads of {depth}", call, check,
                peers | ({"PyTorch": theirs} if torch else {}), bytes=2.0 * keys.nbytes, wanted=(0.9, "copy"),
                hint=OF_MEMORY)


def norm(random: np.random.Generator, name: str, rows: int, columns: int, torch: Any) -> Case:
    """A kernel over rows, beside a copy of as many bytes by the driver."""
    entry = find(name)
    given = entry.make_arguments(random, {"M": rows, "N": columns})
    on_device = {key: cuda.array(value) if isinstance(value, np.ndarray) else value for key, value in given.items()}
    call = sp.prepare(entry.kernel, *on_device.values())
    x = next(value for value in on_device.values() if isinstance(value, cuda.DeviceArray) and len(value.shape) == 2)
    target = cuda.empty(x.shape, x.dtype.name)

    def check() -> str | None:
        made = {key: value.numpy() if isinstance(value, cuda.DeviceArray) else value for key, value in
                on_device.items()}
        return entry.compare(made, entry.reference(given))

    del torch
    return Case(name, f"{rows} x {columns}", call, check, {"copy": lambda: lambda: target.copy_from_device(x)},
                bytes=2.0 * x.nbytes, wanted=(0.9, "copy"), hint=OF_MEMORY)


def cases(quick: bool, torch: Any) -> Iterator[tuple[str, Callable[[], Case]]]:
    """What to measure, the most wanted first; each made when it is its turn, as two may not fit beside each other."""
    random = np.random.default_rng(0)
    for size in (256,) if quick else (4096, 8192):
        yield "matmul bf16", partial(product, random, (size, size, size), torch)
        if cuda.device().capability == (9, 0):
            for workers in (2, 1):          # the model takes 2 where it finds operands late otherwise
                yield "clusters", partial(product, random, (size, size, size), torch, {"cluster": {"m": workers}})
    for schedule in (None, {"split": {"k": 1}}):        # as the model has it, and by whole tiles
        yield "few tiles", partial(product, random, (64, 64, 2048) if quick else (128, 4096, 16384), torch, schedule)
    yield "matmul fp8", partial(product_fp8, random, 256 if quick else 8192, torch)
    yield "attention", partial(attention, random, 256 if quick else 8192, 2 if quick else 16, torch)
    yield "decode", partial(decode, random, 70 if quick else 32768, 1 if quick else 32, torch)
    for name in ("rms_norm_bf16", "layer_norm_bf16", "softmax_bf16", "rms_norm", "layer_norm", "softmax"):
        yield name, partial(norm, random, name, 64 if quick else 16384, 256 if quick else 8192, torch)


# ---------------------------------------------------------------------------------------------------------- measuring

def sample(call: Call, count: int) -> float:
    """Seconds of one launch, of `count` in a row; events tell half microseconds."""
    begin, end = cuda.Event(), cuda.Event()
    begin.record()
    for _ in range(count):
        call()
    end.record().synchronize()
    return max(end.since(begin), 0.5e-6) / count


def measure(contestants: dict[str, Call]) -> dict[str, float]:
    """Median seconds of each, in turns, each round beginning with another."""
    counts = {}
    for name, call in contestants.items():
        call()
        counts[name] = max(1, math.ceil(SAMPLE_SECONDS / max(sample(call, 3), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(ROUNDS):
        order = list(contestants)
        for name in order[number % len(order):] + order[:number % len(order)]:
            times[name].append(sample(contestants[name], counts[name]))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def lines_of(case: Case, times: dict[str, float]) -> list[dict[str, Any]]:
    first = next(iter(case.peers), None)
    rows = []
    for name, seconds in times.items():
        rate, unit = (case.operations / seconds / 1e12, RATE) if case.operations else (
            case.bytes / seconds / 1e9, "GB/s")
        ratio = times[first] / seconds if first in times and name != first else None
        rows.append({"case": case.name, "shape": case.shape, "who": name, "median_s": seconds, "rate": rate,
                     "unit": unit, "ratio": ratio, "peer": first, "wanted": case.told() if name == "sapper" else ""})
    return rows


def missed(case: Case, rows: list[dict[str, Any]]) -> str | None:
    """None, or by how much what is wanted was missed, and where to look."""
    mine = next((row for row in rows if row["who"] == "sapper"), None)
    if mine is None or case.wanted is None:
        return None
    least, of = case.wanted
    other = next((row for row in rows if row["who"] == of), None)
    if of != RATE and other is None:
        return None
    found = mine["rate"] if other is None else other["median_s"] / mine["median_s"]
    told = f"{case.name}, {case.shape}: {found:.3g}; wanted: {case.told()}. {case.hint}"
    return None if found >= least else told


def run(case: Case) -> tuple[list[dict[str, Any]], str | None]:
    """Rows of the table; what is wrong with our result, which is then not timed. A peer that fails is left out."""
    case.ours()
    wrong = case.check()
    contestants = {} if wrong else {"sapper": case.ours}
    for name, make in case.peers.items():
        try:
            call = make()
            if call is not None:
                call()
                contestants[name] = call
        except Exception as error:  # whatever another package raises says nothing of ours
            print(f"{case.name}, {case.shape}: {name} is left out: {first_line(error)}", file=sys.stderr)
    return (lines_of(case, measure(contestants)) if contestants else []), wrong


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def usable(device: cuda.Device) -> bool:
    """Whether the driver still does anything: after most faults of a kernel it refuses all of this process."""
    try:
        with device.current():
            device.call("cuCtxSynchronize")
    except CudaError:
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes: a test of the script")
    parser.add_argument("--case", default="", help="only those whose name has this in it")
    parser.add_argument("--json", help="write the rows to this file too")
    options = parser.parse_args(arguments)
    return run_gpu(options.quick, options.case, options.json)


def run_gpu(quick: bool = False, wanted: str = "", json_file: str | None = None) -> int:
    """Measure all cases whose name has `wanted` in it; 1 where a result is wrong, or there is no device."""
    try:
        device = cuda.device()
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    begin, failed, rows, hints = time.monotonic(), False, [], []
    torch = torch_on(device)
    print(f"{device}; driver {device.driver_version}; PyTorch {torch.__version__ if torch else 'without CUDA'}")
    head = ["case", "shape", "who", "ms", "rate", "of first peer", "wanted"]
    print("| " + " | ".join(head) + " |\n" + "|---" * 3 + "|---:" * 3 + "|---|")
    for name, make in cases(quick, torch):
        if wanted not in name:
            continue
        if time.monotonic() - begin > SECONDS:
            print(f"ended after {SECONDS:.0f} s; the rest was not measured")
            break
        try:
            case = make()
            found, wrong = run(case)
        except Exception as error:  # whatever it is, it is the finding
            failed = True
            print(f"| {name} | | sapper | FAILED: {first_line(error)} | | | |", flush=True)
            if usable(device):
                continue
            print("the device is lost to this process; measure the others with --case")
            break
        if wrong is not None:
            failed = True
            print(f"| {case.name} | {case.shape} | sapper | WRONG: {wrong} | | | {case.told()} |")
        for row in found:
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} x {row['peer']}"
            print(f"| {row['case']} | {row['shape']} | {row['who']} | {1e3 * row['median_s']:.4f} | "
                  f"{row['rate']:.0f} {row['unit']} | {ratio} | {row['wanted']} |", flush=True)
        rows += found
        hint = missed(case, found)
        hints += [] if hint is None else [hint]
    if hints and not quick:
        print("\nMissed:", *hints, sep="\n")
    if json_file is not None:
        with open(json_file, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    return int(failed)

