"""The worker pool: the machine code, many launches, idling, fork, threads, signals and exit."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from sapper.codegen.machine import Immediate
from sapper.codegen.print import print_file
from sapper.runtime import settings, workers
from sapper.runtime.cache import kept_code
from sapper.runtime.errors import LaunchError
from sapper.runtime.loader import load
from sapper.runtime.workers_code import clock_function, launch_function, work_function, workers_code
from sapper.targets.x86_64.registers import RAX, RDI, RDX, RSI

from .conftest import TASKS, FakeKernel, assemble, at, word


@pytest.fixture(autouse=True)
def fresh_pool() -> Iterator[None]:
    yield
    workers.stop()
    assert workers.pool_size() == 1


def run_tasks(kernel: FakeKernel, count: int, threads: int, turns: int = 0) -> np.ndarray[Any, Any]:
    out, who = np.zeros(count, np.int64), np.full(count, -1, np.int64)
    kernel(out, who, turns, threads=threads)
    assert (out == 1).all(), "each task runs exactly once"
    assert ((who >= 0) & (who < threads)).all()
    return who


@pytest.mark.skipif(shutil.which("as") is None, reason="GNU as is not installed")
def test_code_is_what_gnu_as_makes_of_its_text(tmp_path: Path) -> None:
    source, made, flat = tmp_path / "w.s", tmp_path / "w.o", tmp_path / "w.bin"
    functions = clock_function(), work_function(), launch_function()
    source.write_text(print_file([(function, True) for function in functions], {}))
    subprocess.run(["as", str(source), "-o", str(made)], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(made), str(flat)], check=True)
    code, labels = workers_code()
    assert flat.read_bytes().rstrip(b"\0") == code.rstrip(b"\0")
    assert {"clock", "work", "launch"} <= labels.keys()


@pytest.mark.parametrize("held", [{1}, {2}, {4}, {1, 2}, {1, 5}, {3, 40}, set(range(1, 100))], ids=str)
@pytest.mark.parametrize("seconds", [0.002, 0.3, 2.0])
def test_the_clocks_rate_is_right_where_the_thread_is_held_up(held: set[int], seconds: float) -> None:
    """held: the reads of either clock before which another thread has the CPU for so long."""
    passed, reads = 0, 0

    def read() -> int:
        nonlocal passed, reads
        passed, reads = passed + 50 + (int(seconds * 1e9) if reads in held else 0), reads + 1
        return passed

    rate = workers.clock_rate(lambda: int(3.7 * read()) & 0xFFFFFFFF, read)
    assert rate == pytest.approx(3.7, rel=0.01)


@pytest.mark.parametrize("threads", [2, 3, 5, 16])
def test_every_task_runs_once_on_any_number_of_workers(tasks: FakeKernel, threads: int) -> None:
    for turn in range(50):
        run_tasks(tasks, 40, threads, turns=10 * turn)
    assert workers.pool_size() == threads


def test_all_workers_take_part(tasks: FakeKernel) -> None:
    deadline = time.monotonic() + 20
    while set(run_tasks(tasks, 64, 4, turns=1_000_000)) != {0, 1, 2, 3}:
        assert time.monotonic() < deadline


def test_fewer_workers_than_the_pool_has(tasks: FakeKernel) -> None:
    run_tasks(tasks, 30, 6)
    for threads in (2, 6, 3, 2, 5) * 10:
        run_tasks(tasks, 30, threads, turns=50)
    assert workers.pool_size() == 6


def test_thousands_of_small_launches(tasks: FakeKernel) -> None:
    """Workers that spin, workers that fall asleep, and everything between: no wake-up is lost."""
    for turn in range(3000):
        run_tasks(tasks, 3, 2 + turn % 2)
        if turn % 100 == 0:
            time.sleep(0.0005)


# Every worker adds one to out[its index]. Slot out.data.
RUNS = assemble(("mov.64", RAX, word(3)), ("add.64", at(RAX, 0, RSI, 8), Immediate(1)), ("ret",))


def run_by(pool: workers.Pool, kernel: int, out: np.ndarray[Any, Any], count: int) -> None:
    """One launch of RUNS, in a thread that is given up after a while."""
    words = (ctypes.c_int64 * 5)(0, 0, 0, out.ctypes.data, 0)
    view = memoryview(words).cast("B").cast("q")
    thread = threading.Thread(target=pool.launch, args=(kernel, view, ctypes.addressof(words), count, 0), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "the launch has not returned"


def test_the_launcher_stands_in_for_who_does_not_start() -> None:
    """First nobody is there, so that all depends on the launcher; then threads begin where it left off."""
    code, pool, out = load(RUNS), workers.Pool(workers._loaded_code()), np.zeros(4, np.int64)
    pool.size = 4
    for turn in range(1, 6):
        run_by(pool, code.address, out, 4)
        assert out.tolist() == [turn] * 4
    pool.size = 1
    for turn in range(6, 12):
        run_by(pool, code.address, out, 4)
        assert out.tolist() == [turn] * 4
    pool.stop()


@pytest.mark.parametrize("count", [2, 3, 8])
def test_every_worker_runs_once_in_each_launch(count: int) -> None:
    """By its own thread or by the launcher, whoever comes first; more threads than there are CPUs come late."""
    code, pool, out = load(RUNS), workers.Pool(workers._loaded_code()), np.zeros(count, np.int64)
    words = (ctypes.c_int64 * 5)(0, 0, 0, out.ctypes.data, 0)
    view = memoryview(words).cast("B").cast("q")
    for turn in range(1, 4001):
        pool.launch(code.address, view, ctypes.addressof(words), count, 0)
        assert (out == turn).all()
        if turn % 200 == 0:
            time.sleep(0.0005)
    pool.stop()


# Worker 0 writes into out[0] how many there are. Slot out.data.
ASKED = assemble(
    ("test.64", RSI, RSI), ("jne", "done"), ("mov.64", RAX, word(3)), ("mov.64", at(RAX), RDX), "done", ("ret",)
)


def asked_by(pool: workers.Pool, kernel: int, most: int, least: int) -> int:
    """How many workers a launch asks."""
    out = np.zeros(1, np.int64)
    words = (ctypes.c_int64 * 4)(0, 0, 0, out.ctypes.data)
    pool.launch(kernel, memoryview(words).cast("B").cast("q"), ctypes.addressof(words), most, 0, least, False)
    return int(out[0])


def pool_of_nobody(size: int, sleepers: set[int], spin_ns: int) -> workers.Pool:
    """Workers that never come, of whom some say that they sleep: the launcher stands in for all."""
    pool = workers.Pool(workers._loaded_code())
    pool.size = size
    pool._set_word(workers.SPIN_CYCLES, int(spin_ns * workers.cycles_per_ns()))
    for index in sleepers:
        pool._set_word(workers.MAILBOXES + workers.MAILBOX_BYTES * index + workers.SLEEPS, 1)
    return pool


@pytest.mark.parametrize(("sleepers", "least", "asked"), [
    (set(), 1, 4), ({1}, 1, 1), ({2}, 1, 2), ({3}, 1, 3), ({1, 2}, 3, 3), ({3}, 2, 3), ({1, 2, 3}, 4, 4),
    ({1, 2, 3}, 5, 4)])
def test_who_sleeps_is_asked_where_that_is_worth_it(sleepers: set[int], least: int, asked: int) -> None:
    code, pool = load(ASKED), pool_of_nobody(4, sleepers, 0)
    assert asked_by(pool, code.address, 4, least) == asked


def test_a_series_of_launches_wakes_who_sleeps() -> None:
    """Once it has gone on for as long as workers spin."""
    code, pool = load(ASKED), pool_of_nobody(2, {1}, 20_000_000)
    for _ in range(2):
        time.sleep(0.025)
        start = time.perf_counter()
        assert asked_by(pool, code.address, 2, 1) == 1
        while asked_by(pool, code.address, 2, 1) == 1:
            assert time.perf_counter() < start + 20
        assert time.perf_counter() - start > 0.019
    assert asked_by(pool, code.address, 2, 1) == 2


# Writes the CPUs that the launching thread may use to out. Slot out.data.
ALLOWED = assemble(
    ("test.64", RSI, RSI), ("jne", "done"), ("mov.64", RDX, word(3)), ("xor.32", RDI, RDI),
    ("mov.32", RSI, Immediate(128)), ("mov.32", RAX, Immediate(204)), ("syscall",), "done", ("ret",),
)  # fmt: skip


@pytest.mark.parametrize("hold", [False, True])
def test_the_launching_thread_is_held_where_that_is_wanted(hold: bool) -> None:
    if settings.available_cpus() < 2:
        pytest.skip("one CPU only")
    code, pool, out = load(ALLOWED), workers.Pool(workers._loaded_code()), np.zeros(128, np.uint8)
    words = (ctypes.c_int64 * 4)(0, 0, 0, out.ctypes.data)
    pool.launch(code.address, memoryview(words).cast("B").cast("q"), ctypes.addressof(words), 2, 0, 2, hold)
    pool.stop()
    assert np.unpackbits(out).sum() == (1 if hold else settings.available_cpus())


def test_launch_by_one_worker_starts_no_thread(tasks: FakeKernel) -> None:
    run_tasks(tasks, 100, 1)
    out, who = np.zeros(1, np.int64), np.zeros(1, np.int64)
    tasks(out, who, 0)  # one task
    assert (out == 1).all()
    assert workers.pool_size() == 1


def test_each_worker_has_its_scratch(tasks: FakeKernel) -> None:
    run_tasks(tasks, 8, 4)
    pool = workers._pool
    assert pool is not None
    words = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_int64 * 2048).from_address(pool.area.scratch))
    assert words[[0, 512, 1024, 1536]].tolist() == [0, 1, 2, 3]
    assert words[[1, 513, 1025, 1537]].tolist() == [4, 4, 4, 4]


@pytest.mark.parametrize("threads", [2, 4])
def test_idle_workers_use_no_cpu(tasks: FakeKernel, threads: int) -> None:
    """Two spin for a while before they sleep, four on fewer CPUs sleep at once."""
    run_tasks(tasks, 8, threads)
    time.sleep(0.01)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05


def test_a_worker_waits_longer_after_long_work(tasks: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a part of the time that it took, if it is to spin at all; after short work for settings.spin_us. More workers
    than CPUs never spin."""

    mailbox = workers.MAILBOXES + workers.MAILBOX_BYTES

    def word(offset: int) -> int:
        pool = workers._pool
        assert pool is not None
        return ctypes.c_int32.from_address(pool.control + offset).value

    def spun(turns: int, share: int) -> int:
        """Cycles that worker 1 says it waits before it sleeps. share: how many of the 8 tasks it is to have done: other
        processes may keep it from its CPU, and then the launcher does all of them."""
        give_up = time.perf_counter() + 60
        while (run_tasks(tasks, 8, 2, turns=turns) == 1).sum() < share:
            assert time.perf_counter() < give_up, "it has its share at last"
        while not word(mailbox + workers.SLEEPS):
            assert time.perf_counter() < give_up + 10, "it sleeps at last"
        return word(mailbox + workers.SPINS)

    long = 256
    while min(_taken_s(tasks, long) for _ in range(5)) < 0.04:
        long *= 2
    most, least = word(workers.JOIN_CYCLES), word(workers.SPIN_CYCLES)
    if settings.available_cpus() < 2:
        assert most == least == 0
        return
    assert 0 < least < most / 2
    assert median(spun(long, 3) for _ in range(5)) == most
    assert least <= median(spun(long // 64, 1) for _ in range(5)) < most / 4
    workers.stop()
    monkeypatch.setenv("SAPPER_SPIN", "0")
    assert spun(long, 3) == 0


@pytest.mark.parametrize("spin_us", [0, 800])
def test_a_worker_is_awake_while_it_waits(spin_us: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its CPU time shows, which other processes do not add to. The clock that ends a wait runs on while they keep it
    from its CPU, so that of waits that are awake the longest is looked at; and what a hypervisor takes of a CPU counts
    as the thread's, so that of those that are not the middle one is."""
    monkeypatch.setenv("SAPPER_SPIN", str(spin_us))
    code, pool, out = load(RUNS), workers.Pool(workers._loaded_code()), np.zeros(2, np.int64)
    words = (ctypes.c_int64 * 5)(0, 0, 0, out.ctypes.data, 0)
    view = memoryview(words).cast("B").cast("q")
    awake, before = [], 0.0
    for _ in range(20):
        pool.launch(code.address, view, ctypes.addressof(words), 2, 0)
        time.sleep(0.005)
        after = time.clock_gettime(time.pthread_getcpuclockid(pool._threads[0].ident))
        awake.append(after - before)
        before = after
    pool.stop()
    if settings.available_cpus() < 2:
        spin_us = 0
    waits = sorted(awake[1:])   # the first also starts the thread
    assert waits[-1] > 0.0004 if spin_us else waits[len(waits) // 2] < 0.0004


def _taken_s(tasks: FakeKernel, turns: int) -> float:
    start = time.perf_counter()
    run_tasks(tasks, 8, 2, turns=turns)
    return time.perf_counter() - start


def test_python_runs_while_a_kernel_does(tasks: FakeKernel) -> None:
    """The GIL is free: another Python thread makes progress while all workers are inside the kernel."""
    progress: list[float] = []

    def count() -> None:
        while not done.is_set():
            progress.append(time.perf_counter())
            time.sleep(0.001)

    done = threading.Event()
    thread = threading.Thread(target=count)
    thread.start()
    deadline, inside = time.monotonic() + 20, 0
    while inside <= 3 and time.monotonic() < deadline:  # others may keep the thread off a CPU as long as it takes
        start = time.perf_counter()
        run_tasks(tasks, 64, 2, turns=4_000_000)
        end = time.perf_counter()
        inside = len([t for t in progress if start < t < end])
    done.set()
    thread.join()
    assert inside > 3


def test_several_python_threads_launch_at_once(tasks: FakeKernel) -> None:
    failures: list[BaseException] = []

    def work(threads: int) -> None:
        try:
            for _ in range(200):
                run_tasks(tasks, 5, threads, turns=20)
        except BaseException as error:
            failures.append(error)

    launching = [threading.Thread(target=work, args=(threads,)) for threads in (1, 2, 3, 1)]
    for thread in launching:
        thread.start()
    for thread in launching:
        thread.join()
    assert not failures


def forked(body: Callable[[], Any]) -> int:
    """The process id of a child that runs `body`, ended by a signal if it takes 20 s. Status 0: all went well."""
    child = os.fork()
    if child == 0:
        status = 1
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    return child


def test_forked_child_makes_its_own_pool(tasks: FakeKernel) -> None:
    def body() -> None:
        assert workers.pool_size() == 1
        run_tasks(tasks, 20, 3)
        workers.stop()

    run_tasks(tasks, 20, 3)
    for _ in range(3):
        child = forked(body)
        run_tasks(tasks, 20, 3)
        assert os.waitpid(child, 0)[1] == 0


def test_fork_while_another_thread_launches(tasks: FakeKernel) -> None:
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            run_tasks(tasks, 5, 2, turns=1000)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(5):
            assert os.waitpid(forked(lambda: run_tasks(tasks, 20, 2)), 0)[1] == 0
    finally:
        done.set()
        thread.join()


def test_stop_and_start_again(tasks: FakeKernel) -> None:
    for _ in range(3):
        run_tasks(tasks, 20, 4)
        names = {t.name for t in threading.enumerate()}
        assert {"sapper-1", "sapper-2", "sapper-3"} <= names
        workers.stop()
        assert not {t.name for t in threading.enumerate()} & {"sapper-1", "sapper-2", "sapper-3"}


SCRIPT = f"""
import sys, threading, time, os, signal
import numpy as np
from sapper.runtime import workers
from sapper.runtime.loader import load
block = load(bytes.fromhex("{TASKS.hex()}"))
def launch(turns, tasks=4):
    out, who = np.zeros(tasks, np.int64), np.zeros(tasks, np.int64)
    words = np.array([0, 0, 0, out.ctypes.data, who.ctypes.data, tasks, turns], np.int64)
    workers.launch(block.address, memoryview(words), words.ctypes.data, 3, 4096)
    assert (out == 1).all()
launch(1)
"""


def script(body: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT + body], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_interpreter_exits_cleanly() -> None:
    process = script("print('done')")
    output, complaints = process.communicate(timeout=30)
    assert (process.returncode, output, complaints) == (0, "done\n", "")


def test_interpreter_exits_cleanly_after_an_exception() -> None:
    process = script("raise SystemExit(7)")
    _, complaints = process.communicate(timeout=30)
    assert (process.returncode, complaints) == (7, "")


def test_interrupt_arrives_when_the_launch_returns() -> None:
    process = script(
        """
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    print("running", flush=True)
    for _ in range(1000):
        launch(3_000_000)
except KeyboardInterrupt:
    launch(1)
    print("interrupted", workers.pool_size())
"""
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    time.sleep(0.05)  # into a launch, most often; it may come before the first as well
    process.send_signal(2)
    output, complaints = process.communicate(timeout=30)
    assert (process.returncode, output, complaints) == (0, "interrupted 3\n", "")


def test_workers_keep_off_the_cpu_of_the_launcher() -> None:
    """Where there is a CPU for each. The script's process alone is pinned."""
    if settings.available_cpus() < 2:
        pytest.skip("one CPU only")
    process = script(
        """
allowed = sorted(os.sched_getaffinity(0))
pool = workers._pool
for cpu in allowed * 2:
    os.sched_setaffinity(0, {cpu})
    launch(1)
    assert os.sched_getaffinity(0) == {cpu}, "the launcher's own is put back"
    for thread in pool._threads:
        found = os.sched_getaffinity(thread.native_id)
        expected = set(allowed) - {cpu} if len(allowed) >= 3 else set(allowed)
        assert found == expected, (cpu, found, expected)
os.sched_setaffinity(0, allowed)
workers.stop()
words = np.array([0, 0, 0, 0, 0, 0, 0], np.int64)
def launch_on(count):
    workers.launch(block.address, memoryview(words), words.ctypes.data, count, 4096)
launch_on(2)
assert os.sched_getaffinity(0) == set(allowed)
for cpu in allowed:
    os.sched_setaffinity(0, {cpu})
    launch_on(2)
    assert os.sched_getaffinity(workers._pool._threads[0].native_id) == set(allowed) - {cpu}
os.sched_setaffinity(0, allowed)
launch_on(len(allowed) + 1)
for thread in workers._pool._threads:
    assert os.sched_getaffinity(thread.native_id) == set(allowed)
launch_on(2)
for thread in workers._pool._threads:
    assert os.sched_getaffinity(thread.native_id) == set(allowed)
"""
    )
    _, complaints = process.communicate(timeout=30)
    assert (process.returncode, complaints) == (0, "")


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPPER_THREADS", "5")
    assert settings.threads() == 5
    monkeypatch.delenv("SAPPER_THREADS")
    assert settings.threads() == len(os.sched_getaffinity(0)) == settings.available_cpus()
    for wrong in ("0", "-1", "two", "1.5", "100000"):
        monkeypatch.setenv("SAPPER_THREADS", wrong)
        with pytest.raises(LaunchError, match="SAPPER_THREADS"):
            settings.threads()
    assert settings.spin_us() == 50
    monkeypatch.setenv("SAPPER_SPIN", "0")
    assert settings.spin_us() == 0
    monkeypatch.setenv("SAPPER_SPIN", "500001")
    with pytest.raises(LaunchError, match=r"SAPPER_SPIN.*from 0 to 500000"):
        settings.spin_us()


def test_no_more_threads(tasks: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    run_tasks(tasks, 8, 2)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(LaunchError, match="SAPPER_THREADS=2"):
            run_tasks(tasks, 8, 3)
    run_tasks(tasks, 8, 3)


def test_workers_code_comes_from_the_cache(tasks: FakeKernel) -> None:
    first = kept_code("workers", workers_code)
    assert kept_code("workers", lambda: pytest.fail("made again")) == first == workers_code()
    load(first[0])
