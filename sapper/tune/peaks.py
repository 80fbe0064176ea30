"""What this machine can do at most, measured by kernels of our own: arithmetic, and reading and copying memory.

Enters: a number of workers. Leaves: `Peaks`, once measured kept for the process. Holds: the kernels are lane programs
that our own stations compile; each figure is the best of several runs, as anything else on the machine only slows one.

The arithmetic loop keeps CHAINS independent accumulators, which is enough for any target's latency, and touches no
memory; neither does that of products of tiles. The reading loop adds up a buffer again and again. A copy counts the
bytes that it reads and those that it writes. Buffers lie on huge pages, and each worker has a part of its own.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..ir.nodes import Block, Builder, Function, Value
from ..ir.types import ROW_B32, ROW_F32, ROW_I32, S64, RowType, TileRegisterType, b32, bf16, f32, i8, i32, u8
from ..tile.schedule import TileUnit

KIB, MIB = 1 << 10, 1 << 20
CHAINS = 12
STREAMS = 8
"""Rows that one step of the reading loop takes, each with its own accumulator."""
ASKED_STREAMS = 2
"""The same of a loop that asks early for what it reads."""
COPY_ROWS = 4
LINE_BYTES = 64
LEVELS = ("L1", "L2", "L3", "DRAM")
READ_BYTES = {"L1": 16 * KIB, "L2": 512 * KIB, "L3": 8 * MIB, "DRAM": 256 * MIB}
"""What is read to measure a level: by each worker in L1 and L2, by all of them together in L3 and DRAM."""
COPY_BYTES = 128 * MIB
HELD = 0.75
"""A size is held by a cache if it is read at this share of the cache's speed, or faster."""
SAMPLE_S = 0.01
SAMPLES = 8

FLOPS = {"fma": 2, "dot2_bf16": 4, "dot4_u8i8": 8, "pairs_u8i8": 8}
"""Operations of each 32-bit lane: a multiplication and an addition for every product."""

SUMS = 4
"""Tiles that products are added to in turn: enough for the latency of one."""
TILE_PRODUCTS = {"tdpbf16ps": (bf16, bf16, f32, 0x3F803F80), "tdpbusd": (u8, i8, i32, 0x01010101)}
"""Instruction -> types of both operands and of the sums, and the slot in which each element of an operand is 1."""


@dataclass(frozen=True, slots=True)
class Peaks:
    """The machine's peaks with `threads` workers.

    f32_flops: of fused multiply-adds, operations per second. bf16_flops, int8_ops: of the packed dot products,
    tile_bf16_flops, tile_int8_ops: of the products of tiles, None where the CPU has none. int8_products: the lane op
    that int8_ops is of: without dot products of four bytes those of two, which products of whole bytes don't reach, as
    their sums don't fit it. read: level -> bytes read per
    second. copy, copy_streaming: bytes read and written per second, in DRAM, with ordinary stores and with such as
    large results leave by (copy_probe). level_bytes: how much a level holds, for all workers.
    """

    threads: int
    f32_flops: float
    bf16_flops: float | None
    int8_ops: float | None
    read: dict[str, float]
    copy: float
    copy_streaming: float
    level_bytes: dict[str, int]
    tile_bf16_flops: float | None = None
    tile_int8_ops: float | None = None
    int8_products: str = "dot4_u8i8"

    def level(self, size_bytes: int) -> str:
        """The smallest level that holds so many bytes."""
        return next((name for name in LEVELS[:-1] if size_bytes <= self.level_bytes[name]), "DRAM")

    def fastest(self, products: str) -> str:
        """The field that has the speed of products of "f32", "bf16" or "i8": of the instruction that does the most, of
        the widened ones where none takes them narrow."""
        narrow = {"bf16": ("tile_bf16_flops", "bf16_flops"), "i8": ("tile_int8_ops", "int8_ops")}
        best: str = max((*narrow.get(products, ()), "f32_flops"), key=lambda name: getattr(self, name) or 0.0)
        return best

    def arithmetic(self, products: str) -> float:
        """Operations per second of such products."""
        rate: float = getattr(self, self.fastest(products))
        return rate

    def product_probe(self, products: str, target: Any) -> Probe:
        """What measures that speed anew."""
        name = self.fastest(products)
        multiply = {"tile_bf16_flops": "tdpbf16ps", "tile_int8_ops": "tdpbusd"}.get(name)
        if multiply is not None:
            return tile_probe(multiply, self.threads, target)
        op = {"f32_flops": "fma", "bf16_flops": "dot2_bf16", "int8_ops": self.int8_products}[name]
        return arithmetic_probe(op, self.threads, target)

    def floor_s(self, flops: int, read_bytes: int, written_bytes: int, level: str, products: str = "f32") -> float:
        """The least time for a task in seconds: its arithmetic at its peak, or its memory at that of the level where
        its data lie, whichever takes longer. In DRAM a byte written beside one read costs what a copy costs;
        within the caches all bytes are counted at the speed of reading.
        """
        if level == "DRAM":
            paired = min(read_bytes, written_bytes)
            copy = max(self.copy, self.copy_streaming)
            memory_s = 2 * paired / copy + (read_bytes - paired) / self.read[level]
            memory_s += (written_bytes - paired) / copy
        else:
            memory_s = (read_bytes + written_bytes) / self.read[level]
        return max(flops / self.arithmetic(products), memory_s)


class Probe:
    """A lane program, compiled and loaded, with its arguments, for `threads` workers.

    function: the program; its slots are "scalar.<name>" words only. work: what one repetition of all workers does, in
    the unit of the rate. words: of the argument block, by the scalar's name; the address of an array is that array.
    """

    def __init__(self, function: Function, target: Any, threads: int, work: float, **words: Any) -> None:
        from ..codegen.compile import compile_lane
        from ..runtime.loader import load

        self.threads = threads
        self.work = work
        self._code = load(compile_lane(function, target).bytes)
        self.words = words
        slots = [slot.removeprefix("scalar.") for slot in function.attributes["slots"]]
        values = [words.get(name, 0) for name in slots]
        self._block = (ctypes.c_int64 * (3 + len(slots)))(
            0, 0, 0, *(value if isinstance(value, int) else value.ctypes.data for value in values))
        self._view = memoryview(self._block).cast("B").cast("q")
        self._repeats = 3 + slots.index("repeats")

    def run(self, repeats: int = 1) -> float:
        """Seconds for so many repetitions by each of the workers; of one worker those of its CPU time."""
        from ..runtime import workers

        address = ctypes.addressof(self._block)
        self._block[self._repeats] = repeats
        if self.threads == 1:
            start = time.thread_time()
            self._code.function(address, 0, 1)
            return time.thread_time() - start
        start = time.perf_counter()
        workers.launch(self._code.address, self._view, address, self.threads, 0)
        return time.perf_counter() - start

    def sample(self, sample_s: float = SAMPLE_S, samples: int = SAMPLES) -> tuple[int, float]:
        """Repetitions that last half a sample at least, and their time, the best of several."""
        self.run()  # starts the workers and warms the caches
        repeats = 1
        while (taken := min(self.run(repeats) for _ in range(samples))) < sample_s / 2:
            # The best of several says how long it is: one alone may have waited for a CPU.
            repeats *= min(16, max(2, round(sample_s / max(taken, 1e-9))))
        return repeats, taken

    def best_rate(self, sample_s: float = SAMPLE_S, samples: int = SAMPLES) -> float:
        """The best of several rates, in units of `work` per second, of runs that last half a sample at least."""
        repeats, taken = self.sample(sample_s, samples)
        return self.work * repeats / taken


class Program:
    """A lane function under construction: `argument(name)` for a word of the block, loops as nested builders."""

    def __init__(self, name: str, lanes: int, *scalars: str) -> None:
        self.function = Function(name, "lane")
        self.function.attributes = {"lanes": lanes, "slots": [f"scalar.{s}" for s in scalars], "scratch_bytes": 0}
        self.builder = Builder(self.function.body)
        self.argument = {s: self.builder.value("arg", [], S64, slot=3 + i) for i, s in enumerate(scalars)}

    def constant(self, value: int) -> Value:
        return self.builder.value("s_const", [], S64, value=value)

    def scalar(self, name: str, *operands: Value) -> Value:
        return self.builder.value(name, list(operands), S64)

    def loop(self, stop: Value, step: int, carried: list[Value],
             body: Callable[[Value, list[Value]], list[Value]]) -> list[Value]:
        """`body` is given the counter and the carried values, and returns those of the next round."""
        block = Block([S64, *(v.type for v in carried)])
        start, outside = self.constant(0), self.builder
        self.builder = Builder(block)
        self.builder.add("yield", body(block.arguments[0], list(block.arguments[1:])))
        self.builder = outside
        return self.builder.add("loop", [start, stop, *carried], [v.type for v in carried], [block], step=step).results

    def store_sum(self, rows: list[Value], row: RowType, dtype: Any) -> None:
        """Keep the sum of the accumulators at `out`, so that no station may leave the work out."""
        total = rows[0]
        for value in rows[1:]:
            total = self.builder.value("add", [total, value], row)
        lane_bytes = self.function.attributes["lanes"] * dtype.size_bytes
        place = self.scalar("s_mul", self.scalar("worker"), self.constant(lane_bytes))
        self.builder.add("store", [total, self.argument["out"], place], dtype=dtype, scale=1, disp=0, indexed=True)


def arithmetic_program(op: str, lanes: int) -> Function:
    """`repeats` rounds of CHAINS independent multiply-adds. op: a key of FLOPS."""
    program = Program(f"peak_{op}", lanes, "repeats", "out")
    row, dtype, operand, value = {
        "fma": (ROW_F32, f32, ROW_F32, 1.0), "dot2_bf16": (ROW_F32, f32, ROW_B32, 0x3F803F80),
        "dot4_u8i8": (ROW_I32, i32, ROW_B32, 0x01010101), "pairs_u8i8": (ROW_B32, i32, ROW_B32, 0x01010101),
    }[op]
    b = program.builder
    factor = b.value("splat_const", [], operand if operand is ROW_F32 else ROW_I32, value=value)
    if operand is ROW_B32:
        factor = b.value("bitcast", [factor], ROW_B32)
    kept = ROW_I32 if row is ROW_B32 else row
    start = [factor] * CHAINS       # of words, which are multiplied again as bytes
    if row is not ROW_B32:
        start = [b.value("splat_const", [], row, value=0.0 if row is ROW_F32 else 0) for _ in range(CHAINS)]

    def operands(before: Value) -> list[Value]:
        if op == "pairs_u8i8":
            return [before, factor]
        return [factor, factor, before] if op == "fma" else [before, factor, factor]

    def body(_counter: Value, accumulators: list[Value]) -> list[Value]:
        for _ in range(2):
            accumulators = [program.builder.value(op, operands(a), row) for a in accumulators]
        return accumulators

    sums = program.loop(program.argument["repeats"], 1, start, body)
    if row is ROW_B32:
        sums = [b.value("bitcast", [a], kept) for a in sums]
    program.store_sum(sums, kept, dtype)
    return program.function


def tile_program(multiply: str, unit: TileUnit) -> Function:
    """`repeats` rounds of products of two tiles at `data`, added to SUMS others. multiply: a key of TILE_PRODUCTS.

    Each worker's sums go to its SUMS tiles at `out`; it keeps how tiles were configured in its part of `kept`.
    """
    program = Program(f"peak_tile_{multiply}", unit.size, "repeats", "out", "data", "kept")
    program.function.attributes["tile"] = unit.size
    left_dtype, right_dtype, sum_dtype, _ = TILE_PRODUCTS[multiply]
    row_bytes = unit.size * b32.size_bytes
    tile_bytes = unit.size * row_bytes

    def mine(array: str, bytes_: int) -> Value:
        part = program.scalar("s_mul", program.scalar("worker"), program.constant(bytes_))
        return program.scalar("s_add", program.argument[array], part)

    kept, out, stride = mine("kept", unit.kept_bytes), mine("out", SUMS * tile_bytes), program.constant(row_bytes)
    program.builder.add("tile_configure", [kept])
    kind = TileRegisterType(sum_dtype)
    left, right = (program.builder.value("tile_load", [program.argument["data"], stride], TileRegisterType(b32))
                   for _ in range(2))

    def body(_counter: Value, sums: list[Value]) -> list[Value]:
        for _ in range(2):
            sums = [program.builder.value("tile_multiply", [total, left, right], kind, dtype=left_dtype,
                                          right_dtype=right_dtype) for total in sums]
        return sums

    sums = program.loop(program.argument["repeats"], 1,
                        [program.builder.value("tile_zero", [], kind) for _ in range(SUMS)], body)
    for number, total in enumerate(sums):
        program.builder.add("tile_store", [total, out, stride], disp=number * tile_bytes)
    program.builder.add("tile_release", [kept])
    return program.function


def read_program(lanes: int, ahead_bytes: int = 0, places: int = 1) -> Function:
    """`repeats` times the sum of the worker's part of the buffer at `data`, `part_bytes` long. ahead_bytes: how early
    each line is asked for, 0 for not at all. places: at how many places of the part it reads at once, some of STREAMS
    rows at each."""
    program = Program("peak_read", lanes, "repeats", "out", "data", "part_bytes")
    part = program.argument["part_bytes"]
    row_bytes, streams = 4 * lanes, ASKED_STREAMS if ahead_bytes else STREAMS
    bases = [program.scalar("s_add", program.argument["data"], program.scalar("s_mul", program.scalar("worker"), part))]
    side = part if places == 1 else program.scalar("s_floordiv", part, program.constant(places))
    while len(bases) < places:
        bases.append(program.scalar("s_add", bases[-1], side))
    start = [program.builder.value("splat_const", [], ROW_F32, value=0.0) for _ in range(streams)]

    def rows(offset: Value, accumulators: list[Value]) -> list[Value]:
        b = program.builder
        loads = [b.value("load", [base, offset], ROW_F32, dtype=f32, scale=1, disp=i * row_bytes, indexed=True)
                 for base in bases for i in range(streams // places)]
        for line in range(0, streams * row_bytes, LINE_BYTES) if ahead_bytes else ():
            b.add("prefetch", [bases[0], offset], level=2, scale=1, disp=line + ahead_bytes, indexed=True)
        return [b.value("add", [a, x], ROW_F32) for a, x in zip(accumulators, loads, strict=True)]

    def again(_: Value, accumulators: list[Value]) -> list[Value]:
        return program.loop(side, streams // places * row_bytes, accumulators, rows)

    program.store_sum(program.loop(program.argument["repeats"], 1, start, again), ROW_F32, f32)
    return program.function


def copy_program(lanes: int, streaming: bool, store_ahead_bytes: int = 0) -> Function:
    """`repeats` times a copy of the worker's part of `data` to that of `out`. store_ahead_bytes: how early lines are
    asked for to be written, and others twice as early to be read; 0 for not at all."""
    program = Program("peak_copy", lanes, "repeats", "out", "data", "part_bytes")
    part = program.argument["part_bytes"]
    row_bytes = 4 * lanes
    begin = program.scalar("s_mul", program.scalar("worker"), part)
    source = program.scalar("s_add", program.argument["data"], begin)
    target = program.scalar("s_add", program.argument["out"], begin)

    def rows(offset: Value, _: list[Value]) -> list[Value]:
        b = program.builder
        loads = [b.value("load", [source, offset], ROW_F32, dtype=f32, scale=1, disp=i * row_bytes, indexed=True)
                 for i in range(COPY_ROWS)]
        for i, value in enumerate(loads):
            b.add("store", [value, target, offset], dtype=f32, scale=1, disp=i * row_bytes, indexed=True,
                  streaming=streaming)
        for line in range(0, COPY_ROWS * row_bytes, LINE_BYTES) if store_ahead_bytes else ():
            b.add("prefetch", [source, offset], level=2, scale=1, disp=line + 2 * store_ahead_bytes, indexed=True)
            b.add("prefetch", [target, offset], level=1, write=True, scale=1, disp=line + store_ahead_bytes,
                  indexed=True)
        return []

    def again(_: Value, __: list[Value]) -> list[Value]:
        return program.loop(part, COPY_ROWS * row_bytes, [], rows)

    program.loop(program.argument["repeats"], 1, [], again)
    if streaming:
        program.builder.add("fence_streaming", [])
    return program.function


def arithmetic_probe(op: str, threads: int, target: Any) -> Probe:
    """Operations of `op` (a key of FLOPS) on `threads` workers."""
    from ..runtime.buffers import empty

    work = 2.0 * CHAINS * target.lanes * FLOPS[op] * threads
    return Probe(arithmetic_program(op, target.lanes), target, threads, work, out=empty(threads * target.lanes))


def tile_probe(multiply: str, threads: int, target: Any) -> Probe:
    """Operations of products of tiles (a key of TILE_PRODUCTS) on `threads` workers."""
    from ..runtime.buffers import empty

    unit = target.tiles
    left, _, total, ones = TILE_PRODUCTS[multiply]
    words = unit.size * unit.size
    data, out = empty(words, "i32"), empty(threads * SUMS * words, total.name)
    data.fill(ones)
    work = 2.0 * words * unit.size * (b32.bits // left.bits) * SUMS * 2 * threads
    return Probe(tile_program(multiply, unit), target, threads, work, out=out, data=data,
                 kept=empty(threads * unit.kept_bytes // b32.size_bytes, "i32"))


def _part_bytes(size_bytes: int, threads: int, step_bytes: int) -> int:
    """Each worker's part of a buffer: whole steps, at least one."""
    return max(step_bytes, size_bytes // threads // step_bytes * step_bytes)


def read_probe(size_bytes: int, threads: int, target: Any, memory: bool = False) -> Probe:
    """Bytes that `threads` workers together read from a buffer of size_bytes, each from its own part. memory: it comes
    from DRAM, and is asked for early where the target gains by that, or read at several places where the processor sees
    these coming (a Zen 3, one thread: 19 GB/s at one place, 24 at four). Asked for line by line one place is as good (a
    Granite Rapids: 15.9, by four or eight 15.6 to 16.0)."""
    from ..runtime.buffers import empty

    part = _part_bytes(size_bytes, threads, STREAMS * target.lanes * 4)
    data = empty(part * threads // 4)
    data.fill(1.0)  # A page that was never written is the system's one page of zeros.
    asks = target.requests
    ahead_bytes = asks.stream_ahead_bytes if memory and asks.line_by_line else 0
    places = asks.row_streams if memory and asks.row_streams and not asks.again and not ahead_bytes else 1
    return Probe(read_program(target.lanes, ahead_bytes, places), target, threads, float(part * threads),
                 out=empty(threads * target.lanes), data=data, part_bytes=part)


def copy_probe(size_bytes: int, threads: int, target: Any, streaming: bool) -> Probe:
    """Bytes read and written, together, by a copy from a buffer of size_bytes to another. streaming: by such stores as
    the target's large results leave by: past the caches, or to lines that are asked for to be written."""
    from ..runtime.buffers import empty

    part = _part_bytes(size_bytes, threads, COPY_ROWS * target.lanes * 4)
    data, out = empty(part * threads // 4), empty(part * threads // 4)
    data.fill(1.0)
    out.fill(0.0)
    ahead_bytes = target.requests.store_ahead_bytes if streaming else 0
    return Probe(copy_program(target.lanes, streaming and not ahead_bytes, ahead_bytes), target, threads,
                 2.0 * part * threads, out=out, data=data, part_bytes=part)


def measure_peaks(threads: int, scale: float = 1.0, report: Callable[[str], None] | None = None) -> Peaks:
    """Measure anew, in about 0.1 s a figure, and 0.2 s in DRAM.

    scale: of the time, and of what is read and copied in DRAM, for a quick look. report: is told what is measured next.
    """
    from ..targets.x86_64.detect import host_target

    target = host_target()
    sample_s = SAMPLE_S * scale
    say = report or (lambda _: None)

    def arithmetic(op: str) -> float:
        say(op)
        return arithmetic_probe(op, threads, target).best_rate(sample_s)

    def products(multiply: str, feature: str) -> float | None:
        say(multiply)
        return tile_probe(multiply, threads, target).best_rate(sample_s) if target.has(feature) else None

    def reading(size_bytes: int, memory: bool = False) -> float:
        return read_probe(size_bytes, threads, target, memory).best_rate(sample_s)

    read = {}
    for level, size_bytes in READ_BYTES.items():
        say(f"reads in {level}")
        if level in ("L1", "L2"):
            size_bytes *= threads
        elif level == "DRAM":
            size_bytes = int(size_bytes * scale)
        read[level] = reading(size_bytes, level == "DRAM")
    say("how much L3 holds")
    l3_bytes = held_bytes(reading, read["L3"], target.l3_bytes)

    def copying(streaming: bool) -> float:
        say("copies past the caches" if streaming else "copies")
        return copy_probe(int(COPY_BYTES * scale), threads, target, streaming).best_rate(sample_s)

    of_bytes = "dot4_u8i8" if target.has("avx512_vnni") or target.has("avx_vnni") else "pairs_u8i8"
    return Peaks(
        threads, arithmetic("fma"), arithmetic("dot2_bf16") if target.has("avx512_bf16") else None,
        arithmetic(of_bytes), read, copying(False),
        copying(True), {"L1": target.l1_bytes * threads, "L2": target.l2_bytes * threads, "L3": l3_bytes},
        products("tdpbf16ps", "amx_bf16"), products("tdpbusd", "amx_int8"), of_bytes,
    )


def held_bytes(reading: Callable[[int], float], rate: float, told_bytes: int) -> int:
    """How much the last cache holds for this process: of a large one that others share, or a virtual machine has a part
    of, less than the processor tells. reading: bytes per second from a buffer of so many bytes. rate: of what is held.
    """
    size_bytes = READ_BYTES["L3"]
    while 2 * size_bytes < told_bytes:
        if reading(2 * size_bytes) < HELD * rate:
            return size_bytes
        size_bytes *= 2
    return told_bytes


@cache
def peaks(threads: int = 1) -> Peaks:
    """The peaks with `threads` workers, measured at the first call in this process."""
    return measure_peaks(threads)
