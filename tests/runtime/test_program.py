"""Programs: the same results as kernel after kernel, with barriers just where data need them."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import CallError, Program, Rows, Tensor, Variable, f32, i32, prepare, tiles, whole
from sapper.codegen.print import print_function
from sapper.runtime.errors import LaunchError
from sapper.runtime.profile import middle, table
from sapper.runtime.program_code import program_code, program_function
from tests.strategies.amount import examples

M, N, P = sp.dims("M N P")
Array = np.ndarray[Any, np.dtype[Any]]


@sp.kernel
def axpy(x: Tensor[f32, N], factor: f32, y: Tensor[f32, N], out: Tensor[f32, N]):
    for n in tiles(N):
        out[n] = x[n] * factor + y[n]


@sp.kernel
def total(x: Tensor[f32, N], out: Tensor[f32, 1]):
    i = whole(N)
    out[0] = sp.sum(x[i], over=i)


def test_what_is_bound_is_not_copied() -> None:
    (x, y, out), memory = vectors(3), "it runs on the memory that it was bound to"
    for made in (prepare(axpy, x, 2.0, y, out), Program([(axpy, (x, 2.0, y, out))])):
        for what in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=memory):
                what(made)


@sp.kernel
def running(x: Tensor[f32, N], start: i32, out: Tensor[f32, N]):
    """Two parts that meet at a barrier of their own."""
    for n in tiles(N):
        out[n] = x[n] * 2.0
    for n in tiles(N):
        out[n] = out[n] + start.to(f32)


def vectors(count: int, size: int = 1000) -> list[Array]:
    return [np.random.default_rng(i).standard_normal(size).astype(np.float32) for i in range(count)]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.usefixtures("all_share")
def test_a_program_is_kernel_after_kernel(threads: int) -> None:
    x, y, z, w = vectors(4)
    out = np.zeros(1, np.float32)
    factor = Variable("factor", 2.0)
    program = Program([(axpy, (x, factor, x, y)), (axpy, (x, 3.0, x, z)), (axpy, (y, factor, z, w)), (total, (w, out))],
                      threads=threads)
    assert program.barriers == 3, "the first two kernels share nothing that one writes"
    for value in (2.0, -1.5, 0.25):
        program(factor=value) if value != 2.0 else program()
        expected = (x * np.float32(value) + x) * np.float32(value) + (x * np.float32(3) + x)
        np.testing.assert_allclose(w, expected, rtol=1e-6, atol=1e-6)  # a product and a sum, each rounded
        np.testing.assert_allclose(out[0], expected.sum(dtype=np.float64), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.usefixtures("all_share")
def test_many_runs_of_many_launches(threads: int) -> None:
    """Counters and barriers start anew in every launch and every run, whether workers spin or sleep."""
    a, b = (np.zeros(64, np.float32) for _ in range(2))
    one = np.ones(64, np.float32)
    program = Program([(axpy, (a, 1.0, one, b)), (axpy, (b, 1.0, one, a))] * 20, threads=threads)
    for run in range(1, 30):
        program()
        assert (a == 40 * run).all()


def shortest(program: Program) -> list[bool]:
    """Which launches one worker runs."""
    return [launch.alone for launch in program._launches]


def test_short_launches_that_wait_for_each_other_need_no_barrier() -> None:
    """A few numbers: one worker runs them. What many numbers come of is shared, and barriers stand around it only."""
    few = [np.ones(64, np.float32) for _ in range(3)]
    program = Program([(axpy, (few[0], 1.0, few[1], few[2])), (axpy, (few[2], 1.0, few[1], few[0]))] * 10, threads=2)
    assert program.barriers == 1 and program.threads == 1
    for run in range(1, 30):
        program()
        assert (few[0] == 1 + 20 * run).all()

    size = 400_000
    x, y = vectors(2, size)
    z, sums = np.zeros(size, np.float32), np.zeros((3, 64), np.float32)
    one = np.ones(64, np.float32)
    program = Program([
        (axpy, (one, 1.0, one, sums[0])), (axpy, (sums[0], 1.0, one, sums[1])), (axpy, (x, 2.0, y, z)),
        (axpy, (z[:64], 1.0, sums[1], sums[2])), (axpy, (sums[2], 1.0, one, sums[1])), (axpy, (z, 2.0, y, x)),
    ], threads=2)
    assert shortest(program) == [True, True, False, True, True, False] and program.barriers == 2
    for _ in range(20):
        z[...] = 0
        expected = x * np.float32(2) + y
        program()
        np.testing.assert_allclose(z, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(sums[1], expected[:64] + 3 + 1, rtol=1e-6, atol=1e-5)


@settings(max_examples=examples(90))
@given(st.lists(st.tuples(*[st.integers(0, 5)] * 3, st.booleans()), min_size=1, max_size=12), st.integers(1, 3),
       st.booleans())
def test_any_order_of_kernels_on_any_memory(
    steps: list[tuple[int, int, int, bool]], threads: int, halves: bool
) -> None:
    """Kernels that read and write the same few vectors, or halves of them that overlap; some are short."""
    def made() -> tuple[Array, list[Array]]:
        memory = np.arange(6 * 160, dtype=np.float32) % 7
        step = 80 if halves else 160
        return memory, [memory[step * i : step * i + 80] for i in range(6)]

    memory, parts = made()
    expected, plain = made()
    launches = []
    shorts = {}
    for i, j, k, short in steps:
        if k in (i, j):
            continue
        launches.append((axpy, (parts[i], 0.5, parts[j], parts[k])))
        shorts[len(shorts)] = short
        plain[k][...] = plain[i] * np.float32(0.5) + plain[j]
    numbers: dict[int, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sapper.runtime.program.is_short",
                      lambda launch: shorts[numbers.setdefault(id(launch), len(numbers))])
        program = Program(launches, threads=threads)
    for _ in range(2):
        program()
        assert np.array_equal(memory, expected)
        for i, j, k, _ in steps:
            if k not in (i, j):
                plain[k][...] = plain[i] * np.float32(0.5) + plain[j]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("all_share")
def test_kernels_with_barriers_of_their_own(threads: int) -> None:
    x, y, z = vectors(3, 5000)
    program = Program([(running, (x, Variable("start", 1), y)), (running, (x, Variable("start", 1), z))] * 3,
                      threads=threads)
    for start in (1, 9):
        program(start=start)
        assert np.array_equal(y, x * 2 + np.float32(start)) and np.array_equal(z, y)


@sp.kernel
def scaled_rows(x: Tensor[f32, M, N], table: Tensor[f32, P, N], start: i32, out: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        out[m, n] = x[m, n] + table[start + m, n]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("interpret", [False, True])
def test_the_number_of_rows_is_a_runtime_value(threads: int, interpret: bool) -> None:
    rows = 37
    x, table = (np.random.default_rng(i).standard_normal((rows * i, 19)).astype(np.float32) for i in (1, 2))
    y, z = np.zeros_like(x), np.zeros_like(x)
    count, start = Variable("count", rows), Variable("start", 0)
    options: dict[str, Any] = {"interpret": True} if interpret else {"threads": threads}
    program = Program([
        (scaled_rows, (Rows(x, count), table, start, Rows(y, count))),
        (scaled_rows, (Rows(y, count), table, 1, Rows(z, count))),
    ], static=True, **options)
    for value, first in ((rows, 0), (1, 5), (16, 3), (0, 2), (rows - 1, 0)):
        z[...] = 7.0
        program(count=value, start=first)
        expected = x[:value] + table[first : first + value] + table[1 : 1 + value]
        assert np.array_equal(z[:value], expected) and (z[value:] == 7.0).all()


@sp.kernel(specialise="M N")
def doubled(x: Tensor[f32, M, N], out: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        out[m, n] = x[m, n] * 2.0


def test_rows_are_not_compiled_in_where_a_kernel_is_specialised() -> None:
    x, z = np.ones((7, 5), np.float32), np.zeros((7, 5), np.float32)
    count = Variable("count", 7)
    program = Program([(doubled, (Rows(x, count), Rows(z, count)))])
    (launch,) = program._launches
    assert launch.specialisation.static_dims == (("N", 5),)
    program(count=3)
    assert (z[:3] == 2.0).all() and (z[3:] == 0.0).all()


@pytest.mark.parametrize("options", [{"threads": 1}, {"interpret": True}])
def test_the_first_value_of_a_variable_says_how_many_rows(options: dict[str, Any]) -> None:
    x, z = np.ones((7, 5), np.float32), np.zeros((7, 5), np.float32)
    count = Variable("count", 3)
    program = Program([(doubled, (Rows(x, count), Rows(z, count)))], **options)
    program()
    assert (z[:3] == 2.0).all() and (z[3:] == 0.0).all()
    eight = Variable("count", 8)
    more = Program([(doubled, (Rows(x, eight), Rows(z, eight)))], **options)
    more()
    assert (z == 2.0).all()
    with pytest.raises(CallError, match="0 to 7"):
        more(count=8)
    for wrong in (-1, 1.5):
        count = Variable("count", wrong)
        with pytest.raises(CallError, match=r"0 to 7|an integer"):
            Program([(doubled, (Rows(x, count), Rows(z, count)))], **options)()


def test_rows_that_do_not_fit() -> None:
    x, table = np.zeros((4, 3), np.float32), np.zeros((9, 3), np.float32)
    y = np.zeros_like(x)
    count = Variable("count", 4)
    program = Program([(scaled_rows, (Rows(x, count), table, 0, Rows(y, count)))], threads=1)
    for value in (5, -1):
        with pytest.raises(CallError, match=rf"(?s){value} rows.*0 to 4"):
            program(count=value)
    with pytest.raises(CallError, match=r"(?s)out.*dimension 0 \(M\) of a fixed extent.*Rows\(x, count\)"):
        Program([(scaled_rows, (Rows(x, count), table, 0, y))], threads=1)
    with pytest.raises(CallError, match=r"(?s)out.*rows by the variable count"):
        Program([(scaled_rows, (Rows(x, count), table, 0, Rows(y, Variable("other", 4))))], threads=1)


def test_a_value_that_does_not_fit_changes_no_other() -> None:
    """Whole numbers that are their own words are told from bools, from those out of range and from NumPy's."""
    x, table = np.zeros((4, 3), np.float32), np.arange(27, dtype=np.float32).reshape(9, 3)
    y = np.zeros_like(x)
    count, start = Variable("count", 4), Variable("start", 1)
    program = Program([(scaled_rows, (Rows(x, count), table, start, Rows(y, count)))], threads=1)
    for value, error in ((True, "an integer"), (2**31, "from -2147483648"), (1.0, "an integer"), ("3", "an integer")):
        with pytest.raises(CallError, match=error):
            program(count=2, start=value)
        with pytest.raises(CallError, match="no such variable"):
            program(start=3, count=2, begin=value)
        y[...] = -1.0
        program()
        assert np.array_equal(y, table[1:5])
    program(start=np.int64(2), count=np.int32(3))
    assert np.array_equal(y[:3], table[2:5]) and np.array_equal(y[3], table[4])


def test_an_empty_program_and_empty_tensors() -> None:
    Program([], threads=2)()
    nothing = np.zeros(0, np.float32)
    Program([(axpy, (nothing, 1.0, nothing, np.zeros(0, np.float32)))], threads=2)()


def test_under_the_interpreter() -> None:
    x, y, z = vectors(3, 10)
    program = Program([(axpy, (x, Variable("factor", 2.0), x, y)), (axpy, (y, 1.0, x, z))], interpret=True)
    program()
    assert np.array_equal(z, x * 2 + x + x)
    program(factor=0.0)
    assert np.array_equal(z, x + x)


def test_errors() -> None:
    x, y = vectors(2)
    program = Program([(axpy, (x, Variable("factor", 2.0), x, y))], threads=1)
    with pytest.raises(CallError, match=r"(?s)speed.*one of factor"):
        program(speed=1.0)
    with pytest.raises(CallError, match="a number"):
        program(factor="fast")
    with pytest.raises(CallError, match=r"shape|extent"):
        Program([(axpy, (x, 1.0, x[:5], y))])
    with pytest.raises(CallError, match="overlap"):
        Program([(axpy, (x, 1.0, y, y[:])), ])
    with pytest.raises(CallError, match="threads"):
        Program([(axpy, (x, 1.0, x, y))], threads=0)


def test_several_threads_share_a_program() -> None:
    x, y = vectors(2, 64)
    total_of = np.zeros(64, np.float32)
    program = Program([(axpy, (x, 1.0, y, total_of))], threads=2)
    callers = [threading.Thread(target=lambda: [program() for _ in range(100)]) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    assert not any(caller.is_alive() for caller in callers)
    assert np.array_equal(total_of, x + y)


def test_a_forked_child_runs_it() -> None:
    x, y = vectors(2, 640)
    out = np.zeros(640, np.float32)
    program = Program([(axpy, (x, 1.0, y, out))] * 2, threads=2)
    program()
    child = os.fork()
    if child == 0:
        out[...] = 0
        program()
        os._exit(0 if np.array_equal(out, x + y) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    program()


@pytest.mark.skipif(shutil.which("as") is None, reason="GNU as is not installed")
@pytest.mark.parametrize("profiled", [False, True])
def test_code_is_what_gnu_as_makes_of_its_text(tmp_path: Path, profiled: bool) -> None:
    source, made, flat = tmp_path / "p.s", tmp_path / "p.o", tmp_path / "p.bin"
    source.write_text(print_function(program_function(profiled)))
    subprocess.run(["as", str(source), "-o", str(made)], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(made), str(flat)], check=True)
    assert flat.read_bytes().rstrip(b"\0") == program_code(profiled).rstrip(b"\0")


@pytest.mark.parametrize("threads", [1, 2])
def test_a_profile_is_a_run_whose_times_add_up(threads: int) -> None:
    size = 400_000  # of a task there is work for both workers
    x, y, z = vectors(3, size)
    out = np.zeros(1, np.float32)
    factor = Variable("factor", 2.0)
    program = Program([(axpy, (x, factor, x, y)), (axpy, (y, 1.0, x, z)), (total, (z, out))], threads=threads)
    program(factor=3.0)
    wanted = z.copy()
    shares = []
    for _ in range(5):  # the first compiles what takes the times, and any may be held up between two kernels
        z[:] = 0
        start = time.perf_counter()
        found = program.profile(factor=3.0)
        taken = time.perf_counter() - start
        np.testing.assert_array_equal(z, wanted)
        assert [one.kernel for one in found] == ["axpy", "axpy", "total"]
        assert [one.read_bytes for one in found] == [8 * size, 8 * size, 4 * size]
        for worker in range(threads):
            times = [one.seconds[worker] + one.wait_seconds[worker] for one in found]
            assert all(one >= 0 for one in times) and sum(times) <= 1.2 * taken  # two clocks
        shares.append(sum(sum(one.seconds) for one in found) / taken)
    assert max(shares) > 0.1
    text = table(middle([found, program.profile(), program.profile()]))
    assert "axpy" in text and "together" in text and text.count("\n") == 4
    with pytest.raises(LaunchError, match="under the interpreter"):
        Program([(total, (z, out))], interpret=True).profile()


def test_steps_that_are_no_kernels_with_arguments_are_told() -> None:
    for step in (print, (print, ()), (1, 2, 3)):
        with pytest.raises(CallError, match="a step of a Program is a kernel and its arguments"):
            Program([step])  # type: ignore[list-item]
    with pytest.raises(CallError, match="prepare takes a kernel"):
        prepare(print)
