"""Calls by machine code: what they take, what they hand to Python, and that they keep CPython's rules."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapper import Tensor, bf16, bool_, dims, f32, i32, i64, kernel, prepare, tiles, where
from sapper.codegen.machine import Immediate
from sapper.lang import context
from sapper.lang.kernel import Kernel
from sapper.runtime import launch as module
from sapper.runtime import vectorcall
from sapper.runtime.compiled import CompiledKernel
from sapper.runtime.entries import BoundCall
from sapper.runtime.errors import ArgumentError
from sapper.targets.x86_64.registers import RAX, RCX

from .conftest import ADD_I64, ADD_I64_SLOTS, Compiler, FakeKernel, TileType, assemble, at, tensor, word

CFunction = type(len)

# Says so in element 1 of out, and waits until element 0 is not 0.
WAITS = assemble(
    ("mov.64", RAX, word(3)), ("mov.32", RCX, Immediate(1)), ("mov.64", at(RAX, 8), RCX),
    "wait", ("mov.64", RCX, at(RAX)), ("test.64", RCX, RCX), ("je", "wait"), ("ret",),
)


M, N = dims("M N")

# Some tens of milliseconds.
SPINS = assemble(("mov.64", RCX, Immediate(100_000_000)),
                 "spin", ("sub.64", RCX, Immediate(1)), ("jne", "spin"), ("ret",))


@kernel
def shifted(x: Tensor[f32, M, N], by: f32, n: i32, up: bool_, out: Tensor[f32, M, N]) -> None:
    for i, j in tiles(M, N):
        out[i, j] = where(up, x[i, j] + by, x[i, j] - by) * n.to(f32)


def array(*shape: int) -> Any:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def refuse(*arguments: Any, **options: Any) -> None:
    raise AssertionError(f"handed to Python: {arguments} {options}")


def test_a_call_seen_twice_needs_no_python(add_f32: FakeKernel) -> None:
    a, out = array(8), array(8)
    assert not isinstance(add_f32.launcher, CFunction)
    for _ in range(3):
        add_f32(a, 1.0, out)
    assert isinstance(add_f32.launcher, CFunction)
    taken = module.launcher_with(add_f32).vectorcall
    assert taken is not None
    taken.fall_back(refuse)
    add_f32.launcher(a + 1, 3.0, out)
    assert (out == a + 4).all()
    for other in ((a, 1, out), (a, 1.0), (array(9), 1.0, array(9)), (a.astype(np.float64), 1.0, out), (a, 1.0, a),
                  (a[::2], 1.0, out[::2]), (None, None, None), (a, 1.0, out.view(np.memmap))):
        with pytest.raises(AssertionError, match="handed to Python"):
            add_f32.launcher(*other)
    with pytest.raises(AssertionError, match=r"handed to Python.*threads"):
        add_f32.launcher(a, 1.0, out, threads=1)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 3), st.booleans()), max_size=40))
def test_many_forms(calls: list[tuple[int, int, int, bool]]) -> None:
    """More than a table holds, in any order: each call has its own extents and strides."""
    memory = np.arange(200, dtype=np.float32)
    for m, n, kind, up in calls:
        x = memory[: m * n].reshape(m, n)
        x = (x, np.asfortranarray(x), memory[: 2 * m * n].reshape(m, 2 * n)[:, ::2], x[::-1])[kind]
        out = np.zeros((m, n), np.float32)
        shifted(x, 0.5, m, up, out)
        assert (out == (x + 0.5 if up else x - 0.5) * m).all()


@pytest.mark.parametrize(
    "bad", [(1e39, 1, True), (0.5, 2**31, True), (0.5, -(2**31) - 1, True), (0.5, -(2**70), True), (0.5, 1.0, True),
            (0.5, 1, 2)])
def test_values_that_do_not_fit_are_refused(bad: tuple[Any, Any, Any]) -> None:
    x, out = array(3, 4), array(3, 4)
    for _ in range(3):
        shifted(x, 0.5, 2, True, out)
    with pytest.raises(ArgumentError):
        shifted(x, *bad, out)
    for by in (float("inf"), -2.0**127, 1e-45, 3.4028234663852886e38):
        shifted(x, by, -(2**31), False, out)
        with np.errstate(all="ignore"):
            assert (out == (x - np.float32(by)) * np.float32(-(2.0**31))).all()
    shifted(x, float("nan"), 1, True, out)
    assert np.isnan(out).all()


def test_objects_are_counted() -> None:
    x, out, by, n = array(3, 4), array(3, 4), 0.12345, 12345
    bound = prepare(shifted, x, by, n, True, out)
    for _ in range(3):
        shifted(x, by, n, True, out)
    counted = (x, out, by, n, None, True, shifted, shifted.launcher, bound, bound._idle)

    def counts() -> list[int]:
        return [sys.getrefcount(value) for value in counted]

    gc.collect()
    before = counts()
    for _ in range(2000):
        shifted(x, by, n, True, out)
        bound()
        with pytest.raises(ArgumentError):
            shifted(x, by, n, True, x)
    gc.collect()
    # What else the process does counts None and True up or down by a few; one of each call would be 2000.
    assert all(abs(now - then) < 50 for now, then in zip(counts(), before, strict=True))


def test_what_is_dropped_goes(compiler: Compiler) -> None:
    def once() -> list[weakref.ref[Any]]:
        compiler.results["add"] = CompiledKernel("add", ADD_I64, ADD_I64_SLOTS, stored=("out",))
        fake = FakeKernel("add", [("a", tensor(i64, "M")), ("x", TileType(i64)), ("out", tensor(i64, "M"))])
        for _ in range(3):
            fake(np.zeros(4, np.int64), 1, np.zeros(4, np.int64))
        launcher = module.launcher_with(fake)
        assert isinstance(launcher.call, CFunction) and launcher.vectorcall is not None
        return [weakref.ref(launcher), weakref.ref(launcher.call), weakref.ref(launcher.vectorcall._table)]

    gone = [ref for _ in range(20) for ref in once()]
    gc.collect()
    assert not any(ref() for ref in gone)


def test_under_an_interpreter_a_kernel_is_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    x, out = array(3, 4), array(3, 4)
    for _ in range(3):
        shifted(x, 0.5, 2, True, out)
    assert type(Kernel.__call__).__name__ == "method_descriptor"
    seen: list[Any] = []
    monkeypatch.setattr(shifted, "python_function", lambda *arguments: seen.append(arguments))
    with context.use(object()):
        shifted(x, 1)
        with pytest.raises(TypeError):
            shifted(x, no=1)
    assert len(seen) == 1 and seen[0][0] is x
    shifted(x=x, by=1.0, n=1, up=False, out=out)
    assert (out == x - 1).all()


def test_a_launcher_lives_until_its_call_ends(compiler: Compiler) -> None:
    """It is replaced, and all else that names it is dropped, while its kernel runs."""
    compiler.results["waits"] = CompiledKernel("waits", WAITS, ("out.data",), stored=("out",))

    @kernel
    def waits(out: Tensor[i64, M]) -> None:
        for m in tiles(M):
            out[m] = 1

    out = np.ones(2, np.int64)
    for _ in range(3):
        waits(out)
    assert isinstance(waits.launcher, CFunction) and type(Kernel.__call__).__name__ == "method_descriptor"
    running = weakref.ref(waits.launcher)
    out[:] = 0
    thread = threading.Thread(target=waits, args=(out,))
    thread.start()
    while not out[1]:
        time.sleep(0)
    waits.launcher = refuse
    del waits.__dict__["_runtime_registry"]
    gc.collect()
    lives = running() is not None
    out[0] = 1
    thread.join()
    gc.collect()
    assert lives and running() is None


def test_threads_call_while_forms_change() -> None:
    """And what they call is put in place again and again."""
    x = array(64, 64)
    wrong: list[Any] = []
    stop = threading.Event()

    def work(n: int) -> None:
        out = np.zeros_like(x)
        while not stop.is_set():
            shifted(x, 0.0, n, True, out)
            if not (out == x * n).all():
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for size in range(1, 40, 4):
        shifted(x[:size], 0.0, 1, True, np.zeros_like(x[:size]))
        shifted(x[:size], 0.0, 1, True, np.zeros_like(x[:size]))
        shifted.launcher = module.make_launcher(shifted)
        gc.collect()
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_bound_calls() -> None:
    x, out = array(3, 4), array(3, 4)
    bound = prepare(shifted, x, 0.5, 2, True, out)
    assert type(BoundCall.__call__).__name__ == "method_descriptor"
    bound()
    assert (out == (x + 0.5) * 2).all()
    bound.set_scalar("n", 3)
    bound()
    assert (out == (x + 0.5) * 3).all()
    for wrong in ((1,), (None,)):
        with pytest.raises(TypeError):
            bound(*wrong)
    with pytest.raises(TypeError):
        bound(n=1)
    bound()


def test_a_short_kernel_keeps_the_gil() -> None:
    """By the estimate, so that it need not wait for other threads of Python afterwards."""
    launcher = module.Launcher(shifted, {"threads": 1})
    for size in (4, 2048):
        x, out = array(size, size), array(size, size)
        for _ in range(3):
            launcher.call(x, 0.5, 1, True, out)
            assert (out == x + np.float32(0.5)).all()
        assert launcher.prepare(x, 0.5, 1, True, out)._form[vectorcall.HOLDS_GIL // 8] == (size == 4)  # type: ignore
    assert launcher.vectorcall is not None
    forms = [made[vectorcall.HOLDS_GIL // 8] for made, _ in launcher.vectorcall._table.forms]
    assert forms == [1, 0]


@pytest.mark.parametrize("work", [(), ((100.0, ()),)], ids=["unknown", "short"])
def test_other_threads_of_python_run_beside_a_kernel_that_is_not_short(compiler: Compiler, work: Any) -> None:
    compiler.results["spins"] = CompiledKernel("spins", SPINS, ("out.data",), stored=("out",), work=work)
    fake = FakeKernel("spins", [("out", tensor(i64, "M"))])
    out, turns, stop = np.zeros(1, np.int64), [0], threading.Event()
    for _ in range(3):
        fake(out)

    def count() -> None:
        while not stop.is_set():
            turns[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=count)
    thread.start()
    before = sys.getswitchinterval()
    sys.setswitchinterval(10)   # from now on only who lets go of the GIL loses it
    try:
        end = time.monotonic() + 0.05
        while time.monotonic() < end:   # what was asked for before is over
            pass
        first = turns[0]
        fake.launcher(out)
        assert (turns[0] > first) == (not work)
    finally:
        sys.setswitchinterval(before)
        stop.set()
        thread.join()


def test_a_bound_call_waits_for_who_runs_it() -> None:
    x, out = array(3, 4), array(3, 4)
    bound = prepare(shifted, x, 0.5, 2, True, out)
    bound._take()
    thread = threading.Thread(target=bound)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive() and (out == x).all()
    bound._idle = True
    thread.join(10)
    assert not thread.is_alive() and (out == (x + 0.5) * 2).all()
    bound()


def test_where_objects_lie_otherwise_python_calls(add_f32: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectorcall, "functions", lambda: None)
    a, out = array(8), array(8)
    for _ in range(4):
        add_f32(a, 1.0, out)
        assert (out == a + 1).all()
    launcher = module.launcher_with(add_f32)
    assert launcher.vectorcall is None and not isinstance(launcher.call, CFunction)
    bound = launcher.prepare(a, 2.0, out)
    assert bound._form is None  # type: ignore[union-attr]
    for _ in range(3):
        bound()
    assert (out == a + 2).all()


def test_scalars_of_other_kinds_are_python_s(compiler: Compiler) -> None:
    compiler.results["k"] = CompiledKernel("k", b"\xc3", ("out.data",), stored=("out",))
    fake = FakeKernel("k", [("x", TileType(bf16)), ("out", tensor(f32, "M"))])
    for _ in range(3):
        fake(1.0, array(3))
    assert module.launcher_with(fake).vectorcall is None


def test_what_lies_otherwise_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert vectorcall._lies_as_read()
    with monkeypatch.context() as patched:
        patched.setattr("sys.abiflags", "t")
        assert not vectorcall._lies_as_read()
    monkeypatch.setattr("sapper.runtime.arguments.MEMORY_WORDS", None)
    assert not vectorcall._lies_as_read()


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


def test_tensors_of_pytorch_need_no_python(torch: Any, add_f32: FakeKernel) -> None:
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this PyTorch does not offer views of its tensors")
    a, out, array_out = torch.arange(8.0), torch.zeros(8), array(8)
    for _ in range(3):
        add_f32(a, 1.0, out)
        add_f32(a, 2.0, array_out)
    taken = module.launcher_with(add_f32).vectorcall
    assert taken is not None
    taken.fall_back(refuse)
    add_f32.launcher(a + 1, 3.0, out)
    assert (out == a + 4).all()
    add_f32.launcher(a + 1, 5.0, array_out)
    assert (array_out == (a + 6).numpy()).all()
    memory = torch.arange(16.0)
    for x, other in ((a, torch.zeros(8, requires_grad=True)), (a.requires_grad_(), out), (a.detach(), out[:7]),
                     (a.to_sparse(), out), (memory[:8], memory[4:12]), (a.detach().double(), out),
                     (memory[::2], out), (torch.nn.Parameter(a), out)):
        with pytest.raises(AssertionError, match="handed to Python"):
            add_f32.launcher(x, 1.0, other)


@given(st.data())
def test_many_forms_of_pytorch(data: st.DataObject) -> None:
    torch = pytest.importorskip("torch")
    memory = torch.arange(200, dtype=torch.float32)
    for _ in range(data.draw(st.integers(1, 20))):
        m, n, kind, own = (data.draw(st.integers(*ends)) for ends in ((1, 5), (1, 5), (0, 3), (0, 1)))
        x = memory[: m * n].reshape(m, n)
        x = (x, x.t().contiguous().t(), memory[: 2 * m * n].reshape(m, 2 * n)[:, ::2], x.numpy())[kind]
        out = torch.zeros(m, n) if own else np.zeros((m, n), np.float32)
        shifted(x, 0.5, m, True, out)
        assert (np.asarray(out) == (np.asarray(x) + 0.5) * m).all()
