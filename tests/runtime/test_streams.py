"""Streams: what a worker that waits asks for is what its first task reads."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

import sapper as sp
from sapper import Program, Tensor, bf16, each, f32, tiles, whole, zeros
from sapper.codegen.encode import encode
from sapper.codegen.listing import Listing, at
from sapper.codegen.machine import MachineFunction
from sapper.kernels import add, find, matvec, mla, norm
from sapper.lane.lower import lower
from sapper.runtime.buffers import empty
from sapper.runtime.loader import load
from sapper.runtime.packed import packed_empty
from sapper.runtime.program import (
    AHEAD,
    BLOCK,
    GRANULE_BYTES,
    GRANULES,
    LAUNCH_BYTES,
    STREAM_WORD,
    Launch,
)
from sapper.runtime.program_code import ASKED_BYTES, find_stream
from sapper.targets.x86_64.registers import R8, R9, R12, R13, RBP, RDI, RDX, RSI
from sapper.tile.canonical import canonicalize
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts, Schedule, Specialization
from tests.lane.run_lane import evaluate

pytestmark = pytest.mark.usefixtures("all_share")


def launches_of(program: Program) -> list[Launch]:
    return program._launches


def step(rows: int, columns: int, packed: bool, threads: int) -> Program:
    """A norm, weights, a sum, weights again, which the last launch writes."""
    weights = [packed_empty(matvec.matvec_bf16, "w", rows, columns) if packed else empty((rows, columns), bf16)
               for _ in range(2)]
    for one in weights:
        (one.data if packed else one).view(np.uint8)[...] = 0
    x, gain, normed = (empty((1, columns)) for _ in range(3))
    y, z = empty((1, rows)), empty((rows,))
    for one in (x, gain, normed, y, z):
        one[...] = 1
    return Program([
        (norm.rms_norm, (x, gain[0], 1e-5, normed)), (matvec.matvec_bf16, (weights[0], normed[0], y[0])),
        (add.add_bias_in_place, (y, z)), (matvec.matvec_residual_bf16, (weights[1], normed[0], y[0], z)),
    ], threads=threads, static=True)


@pytest.mark.parametrize("packed", [True, False])
def test_weights_are_streams(packed: bool) -> None:
    launches = launches_of(step(576, 640, packed, 2))
    assert [launch.stream is not None for launch in launches] == [False, True, False, True]
    assert [launch.ahead for launch in launches] == [1, 2, 1, 0]
    for launch in (launches[1], launches[3]):
        stream = launch.stream
        assert stream is not None and stream.bytes == 576 * 640 * 2
        assert launch.words[stream.word // 8 - 3] == stream.address
        assert stream.granule_bytes % (640 * 2) == 0


H, D, C = sp.dims("H D C")


@sp.kernel
def absorb_heads(q: Tensor[f32, H, D], w: Tensor[f32, H, D, C], y: Tensor[f32, H, C]):
    for h in each(H):
        c = whole(C)
        acc = zeros(c, dtype=f32)
        for d in tiles(D):
            acc += q[h, d] @ w[h, d, c]
        y[h, c] = acc


def test_the_matrices_of_all_heads_are_one_stream() -> None:
    """Of latent attention; a kernel whose tasks are parts of columns, too, reads none from end to end."""
    q, w, y = empty((16, 128)), empty((16, 128, 512)), empty((16, 512))
    for array in (q, w, y):
        array[...] = 1
    found = {}
    for kernel in (mla.absorb_f32, absorb_heads):
        program = Program([(kernel, (q, w, y))], threads=2, static=True)
        program()
        np.testing.assert_array_equal(y, np.full(y.shape, 128, np.float32))
        found[kernel] = launches_of(program)[0].stream
    assert found[mla.absorb_f32] is None
    stream = found[absorb_heads]
    assert stream is not None and stream.bytes == w.nbytes and stream.granule_bytes == w[0].nbytes


def test_what_is_small_or_written_is_none() -> None:
    assert not any(launch.ahead for launch in launches_of(step(32, 64, True, 2)))
    rows, columns = 576, 640
    w = empty((rows, columns))
    w[...] = 0
    bias, x, y = (empty((n,)) for n in (columns, columns, rows))
    for one in (bias, x, y):
        one[...] = 1
    program = Program([(add.add_bias_in_place, (w, bias)), (matvec.matvec_f32, (w, x, y))], threads=2, static=True)
    program()
    assert launches_of(program)[1].stream is not None and not any(launch.ahead for launch in launches_of(program))
    np.testing.assert_array_equal(y, np.full(rows, columns, np.float32))


def test_the_largest_of_several_is_the_stream() -> None:
    """Weights in blocks: their quants, and not their scales; the one row of activations is shared by nobody."""
    entry = find("matmul_q4m_by32")
    arguments = entry.make_arguments(np.random.default_rng(0), {"P": 240, "G": 18, "C": 1, "M": 1})
    operands = list(arguments.values())
    small = [np.ones(16, np.float32) for _ in range(3)]
    program = Program([(add.vector_add, small), (add.vector_add, [small[2], *small[:2]]), (entry.kernel, operands)],
                      threads=2, static=True)
    launch = launches_of(program)[2]
    stream, at_once = launch.stream, launch.compiled.tasks[0][0][2]
    quants = max((array for array in operands if isinstance(array, np.ndarray)), key=lambda array: array.nbytes)
    assert stream is not None and (stream.address, stream.bytes) == (quants.ctypes.data, quants.nbytes)
    assert stream.granules == 240 // at_once and launches_of(program)[0].ahead == 2


@pytest.mark.parametrize("granules", [1, 5, 18, 31, 120])
def test_a_worker_asks_for_what_its_first_task_reads(granules: int) -> None:
    """The machine code against how a range is shared among tasks."""
    emit = Listing()
    emit.label("find", 16)
    for register in (RBP, R12, R13):
        emit("push", register)
    emit("lea.64", RBP, at(RDI, LAUNCH_BYTES))
    emit("mov.64", R12, RSI)
    emit("mov.64", R13, RDX)
    emit("push", RDI)
    find_stream(emit)
    emit("pop", RDI)
    emit("mov.64", at(RDI, 2 * LAUNCH_BYTES), R8)
    emit("mov.64", at(RDI, 2 * LAUNCH_BYTES + 8), R9)
    for register in (R13, R12, RBP):
        emit("pop", register)
    emit("ret")
    code = load(encode(MachineFunction("find", emit.body, {})).code)

    function = reduce_loops(matvec.matvec_f32.tile_ir())
    canonicalize(function)
    lane = lower(function, Schedule(), Facts(), Specialization())
    (((_, _, granule),),) = lane.attributes["tasks"]
    (tasks,) = [op for op in lane.walk() if op.name == "tasks"]
    loop = next(op for op in tasks.blocks[0].ops if op.name == "loop")

    block = (ctypes.c_int64 * 4)(0, 0, 0, 1 << 40)
    memory = np.zeros(2 * LAUNCH_BYTES // 4 + 4, np.int32)
    there = LAUNCH_BYTES // 4
    memory[AHEAD // 4] = LAUNCH_BYTES
    memory[there + STREAM_WORD // 4], memory[there + GRANULES // 4] = 24, granules
    memory[there + BLOCK // 4 :][:2].view(np.int64)[0] = ctypes.addressof(block)
    for granule_bytes in (64 * granule, ASKED_BYTES):
        memory[there + GRANULE_BYTES // 4] = granule_bytes
        for workers in (1, 2, 3, 8):
            known: dict[object, int] = {"workers": workers, **dict.fromkeys(range(3, 8), granules * granule)}
            total = evaluate(tasks.operands[0], known)
            starts = [evaluate(loop.operands[0], {**known, tasks.blocks[0].arguments[0]: task}) // granule
                      for task in range(total)]
            for worker in range(workers) if workers > 1 else ():      # alone nobody waits
                code.function(memory.ctypes.data, worker, workers)
                first, last = memory[2 * there :].view(np.int64).tolist()
                if worker >= total:
                    assert first == last
                    continue
                count = [*starts, granules][worker + 1] - starts[worker]
                assert first == (1 << 40) + starts[worker] * granule_bytes
                assert last == first + min(count * granule_bytes, ASKED_BYTES)
    memory[AHEAD // 4] = 0
    code.function(memory.ctypes.data, 0, 2)
    assert memory[2 * there :].view(np.int64).tolist() == [0, 0]
