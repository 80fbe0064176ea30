"""Calls: the fast path and the slow one agree, specialisation, caches, options, bound calls, and what a call costs."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.ir.nodes import Function, Op
from sapper.ir.types import TensorType, TileType, bf16, bool_, f32, f64, i8, i32, i64
from sapper.lang.errors import CallError
from sapper.runtime import launch as module
from sapper.runtime.arguments import Parameter, Signature
from sapper.runtime.compiled import CompiledKernel
from sapper.runtime.entries import choose_threads
from sapper.runtime.errors import ArgumentError, LaunchError, SapperWarning
from sapper.runtime.fast_call import make_fast_call
from sapper.runtime.launch import prepare, stored_tensors
from sapper.runtime.scratch import areas
from sapper.runtime.specialise import LARGEST_CLASS, dim_class
from tests.strategies import examples

from .conftest import ADD_F32, ADD_SLOTS, RECORD, Compiler, FakeKernel, tensor


def floats(count: int, value: float = 0.0) -> np.ndarray[Any, Any]:
    return np.full(count, value, np.float32)


# ---- calls


def test_calls_compute(add_f32: FakeKernel) -> None:
    for turn in range(5):
        a, out = np.arange(16, dtype=np.float32) + turn, floats(16)
        assert add_f32(a, 2.5, out) is None
        np.testing.assert_array_equal(out, a + np.float32(2.5))


@settings(max_examples=examples(60))
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 3), st.booleans(), st.integers(-5, 5)), max_size=12))
def test_any_sequence_of_shapes_and_strides(calls: list[tuple[int, int, bool, int]]) -> None:
    """Calls that meet entries made by earlier ones give what a fresh one would."""
    compiler, before = Compiler(), module.configuration()
    module.configure(compiler.compile_kernel, lambda wanted: "cpu", str, toolchain_key=lambda: "test")
    try:
        kernel = _add_i64(compiler)
        for size, step, reverse, x in calls:
            a = np.arange(100, dtype=np.int64)[: size * step : step]
            a = a[::-1] if reverse else a
            out = np.zeros(len(a), np.int64)
            kernel(a, x, out)
            np.testing.assert_array_equal(out, a + x)
    finally:
        module.set_configuration(before)


def _add_i64(compiler: Compiler) -> FakeKernel:
    from .conftest import ADD_I64, ADD_I64_SLOTS

    compiler.results["hypothesis"] = CompiledKernel("hypothesis", ADD_I64, ADD_I64_SLOTS, stored=("out",))
    return FakeKernel("hypothesis", [("a", tensor(i64, "M")), ("x", TileType(i64)), ("out", tensor(i64, "M"))])


def test_slots_that_a_kernel_drops_are_not_written(compiler: Compiler) -> None:
    compiler.results["partial"] = CompiledKernel("partial", RECORD, ("out.data", "dim.N"), stored=("out",))
    kernel = FakeKernel("partial", [("a", tensor(f32, "M")), ("x", TileType(f32)), ("out", tensor(i64, "N"))])
    out = np.zeros(5, np.int64)
    for _ in range(3):
        kernel(floats(4), 1.0, out)
        assert out.tolist()[3:] == [out.ctypes.data, 5]


SCALARS = [
    (f32, 1.5, 0x3FC00000), (f32, -1, 0xBF800000), (f32, float("inf"), 0x7F800000), (f32, np.float32(2), 0x40000000),
    (f64, 1.0, 0x3FF0000000000000), (f64, 3, 0x4008000000000000), (bf16, 1.0, 0x3F800000),
    (i32, -2, -2), (i64, 2**62, 2**62), (i8, -128, -128), (i32, np.int32(7), 7), (bool_, True, 1),
    (bool_, np.False_, 0),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "value", "word"), SCALARS)
def test_scalars_arrive_as_words(compiler: Compiler, dtype: Any, value: Any, word: int) -> None:
    compiler.results["record"] = CompiledKernel("record", RECORD, ("out.data", "scalar.x"), stored=("out",))
    kernel = FakeKernel("record", [("out", tensor(i64, "N")), ("x", TileType(dtype))])
    out = np.zeros(5, np.int64)
    for _ in range(3):  # the slow path, then the fast one
        out[...] = -7
        kernel(out, value)
        assert out[4] == word


@pytest.mark.parametrize(
    ("dtype", "good", "wrong"),
    [(f32, 1.0, 1e39), (f32, 1.0, -3.4028236e38), (f32, 1.0, "1"), (i32, 1, 2**31), (i32, 1, 1.0), (bool_, True, 1),
     (i8, 1, 128), (i64, 1, 2**63)],
)  # fmt: skip
def test_wrong_scalars_are_refused_after_good_ones(compiler: Compiler, dtype: Any, good: Any, wrong: Any) -> None:
    compiler.results["record"] = CompiledKernel("record", RECORD, ("out.data", "scalar.x"), stored=("out",))
    kernel = FakeKernel("record", [("out", tensor(i64, "N")), ("x", TileType(dtype))])
    out = np.zeros(5, np.int64)
    kernel(out, good)
    kernel(out, good)
    with pytest.raises(ArgumentError):
        kernel(out, wrong)


def test_nothing_gets_past_the_fast_path(add_f32: FakeKernel) -> None:
    """After good calls each bad one is refused as a first call would be."""
    a, out = floats(8, 1.0), floats(8)
    for _ in range(3):
        add_f32(a, 1.0, out)
    assert "slow_call" not in getattr(add_f32.launcher, "__name__", "")
    frozen = floats(8)
    frozen.flags.writeable = False
    memory = floats(16)
    raw = np.zeros(40, np.uint8)
    unaligned = raw[1 - raw.ctypes.data % 4 + 4 :][:32].view(np.float32)
    for kind, arguments in {
        "read-only": (a, 1.0, frozen),
        "overlap": (memory[:8], 1.0, memory[4:12]),
        "alignment": (unaligned, 1.0, out),
        "dtype": (a.astype(np.float64), 1.0, out),
        "byte-order": (a.astype(">f4"), 1.0, out),
        "rank": (a.reshape(2, 4), 1.0, out),
        "shape": (a[:4], 1.0, out),
        "count": (a, 1.0, out, 3),
        "type": (list(a), 1.0, out),
        "scalar": (a, None, out),
    }.items():
        with pytest.raises(ArgumentError) as caught:
            add_f32(*arguments)
        assert caught.value.kind == kind
    add_f32(frozen, 1.0, out)
    add_f32(memory[:8], 1.0, memory[8:])


def test_in_place_pairs(compiler: Compiler) -> None:
    compiler.results["inplace"] = CompiledKernel("inplace", ADD_F32, ADD_SLOTS, stored=("out",))
    kernel = FakeKernel(
        "inplace", [("a", tensor(f32, "M")), ("x", TileType(f32)), ("out", tensor(f32, "M"))], in_place=[("out", "a")]
    )
    memory = floats(12)
    for turn in range(1, 4):
        kernel(memory[:8], 1.0, memory[:8])
        assert memory.tolist() == [float(turn)] * 8 + [0.0] * 4
    with pytest.raises(ArgumentError):
        kernel(memory[:8], 1.0, memory[4:])


def test_keywords_and_defaults(add_f32: FakeKernel) -> None:
    a, out = floats(4, 1.0), floats(4)
    add_f32.defaults["x"] = 3.0
    add_f32(a, out=out)
    assert out.tolist() == [4.0] * 4
    add_f32(a, x=5.0, out=out)
    assert out.tolist() == [6.0] * 4
    with pytest.raises(ArgumentError, match="2 arguments, and none for out"):
        add_f32(a)
    with pytest.raises(ArgumentError, match="by position and by name"):
        add_f32(a, 1.0, out, x=2.0)
    with pytest.raises(ArgumentError, match="thread_count"):
        add_f32(a, 1.0, out, thread_count=3)


def test_dlpack_arguments(add_f32: FakeKernel) -> None:
    torch = pytest.importorskip("torch")
    out = torch.zeros(8)
    for _ in range(3):
        add_f32(torch.ones(8), 2.0, out)
    assert out.tolist() == [3.0] * 8


def test_tensors_of_pytorch_take_the_fast_path(add_f32: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside arrays, too; what is not as it was is bound, and told, as at first."""
    torch = pytest.importorskip("torch")
    launcher = module.launcher_with(add_f32)
    out, array = torch.zeros(8), floats(8)
    wide = torch.ones(8, 2)
    calls = [(torch.ones(8), 2.0, out), (wide[:, 1], 2.0, out), (torch.ones(8), 2.0, array), (floats(8, 1.0), 2.0, out)]
    for call in calls * 2:
        add_f32(*call)
    bound: list[Any] = []

    def bind(arguments: Any, _bind: Any = launcher.bind) -> Any:
        bound.append(arguments)
        return _bind(arguments)

    monkeypatch.setattr(launcher, "bind", bind)
    for call in calls:
        call[2][:] = 0.0
        add_f32(*call)
        assert call[2].tolist() == [3.0] * 8 and not bound
    wanted = torch.ones(8, requires_grad=True)
    for refused, kind in ((wanted, "export"), (torch.ones(8).to_sparse(), None), (torch.ones(8, device="meta"), None),
                          (torch.ones(8, dtype=torch.float64), "dtype"), (out, "overlap")):
        with pytest.raises(ArgumentError) as told:
            add_f32(refused, 2.0, out)
        assert kind in (None, told.value.kind) and len(bound) == 1
        bound.clear()
    add_f32(wanted.detach(), 2.0, out)
    add_f32(torch.nn.Parameter(torch.ones(8), requires_grad=False), 2.0, out)
    assert len(bound) == 1      # of another class


def test_a_tensor_that_lies_nowhere_is_told(add_f32: FakeKernel) -> None:
    class Elsewhere:
        def __dlpack__(self) -> None: ...

        def __dlpack_device__(self) -> None:
            raise ValueError("Unknown device type meta")

    with pytest.raises(ArgumentError, match="Unknown device type meta"):
        add_f32(Elsewhere(), 1.0, floats(5))


def test_array_subclasses_and_zero_extents(add_f32: FakeKernel, tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "data", np.float32, "w+", shape=8)
    for _ in range(2):
        add_f32(floats(8, 1.0), 1.0, mapped)
        assert mapped.tolist() == [2.0] * 8
        add_f32(floats(0), 1.0, floats(0))


def test_path_without_memory_words(add_f32: FakeKernel) -> None:
    """Where NumPy's header can't be read directly the same function is made with the documented attributes."""
    launcher = module.launcher_with(add_f32)
    a, out = floats(8, 1.0), floats(8)
    for _ in range(2):
        add_f32(a, 1.0, out)
    refused: list[Any] = []
    call = make_fast_call(
        launcher.signature, ("out",), launcher.entries, lambda *arguments, **options: refused.append(arguments), None
    )
    call(a, 4.0, out)
    assert out.tolist() == [5.0] * 8 and not refused
    out.flags.writeable = False
    call(a, 4.0, out)
    assert len(refused) == 1


# ---- specialisation and caches


def test_dim_classes() -> None:
    assert [dim_class(n) for n in (0, 1, 2, 16, 17, 128, 129, 10**6)] == [
        (16, 64), (1, 1), (16, 1), (16, 16), (128, 1), (128, 64), (1024, 1), (LARGEST_CLASS, 64)]


def test_what_the_compiler_is_told(compiler: Compiler) -> None:
    compiler.results["two"] = CompiledKernel("two", b"\xc3", (), stored=("b",))
    kernel = FakeKernel("two", [("a", tensor(f32, "M", "K", 3)), ("b", tensor(f32, "M", 1))])
    a, b = np.zeros((5, 200, 3), np.float32), np.zeros((5, 1), np.float32)
    kernel(a, b)
    kernel(np.asfortranarray(a), b)
    kernel(a, b, static="K", schedule={"tile": {"M": 4}}, target="other CPU")
    first, second, third = compiler.calls
    assert first == {
        "kernel": "two", "static_dims": {}, "unit_strides": {"a": "contiguous", "b": "contiguous"},
        "dim_classes": {"M": (16, 1), "K": (1024, 1)}, "target": "this CPU", "schedule": None,
        "aligned": frozenset(),
    }  # fmt: skip
    assert second["unit_strides"] == {"a": (True, False, False), "b": "contiguous"}
    assert third["static_dims"] == {"K": 200} and third["dim_classes"] == {"M": (16, 1)}
    assert third["schedule"] == {"tile": {"M": 4}} and third["target"] == "other CPU"


def test_one_compilation_for_each_specialisation(add_f32: FakeKernel, compiler: Compiler) -> None:
    for size in (4, 8, 12, 16, 4, 200, 408, 8):
        add_f32(floats(size), 1.0, floats(size))
    assert [call["dim_classes"]["M"] for call in compiler.calls] == [(16, 1), (16, 16), (1024, 1)]
    add_f32(floats(8), 1.0, floats(8), static=True)
    add_f32(floats(12), 1.0, floats(12), static=["M"])
    assert [call["static_dims"] for call in compiler.calls[3:]] == [{"M": 8}, {"M": 12}]
    for wrong in ("Q", 5):  # type: Any
        with pytest.raises(ArgumentError, match=f"found: +{wrong!r}"):
            add_f32(floats(8), 1.0, floats(8), static=wrong)


def test_a_specialised_kernel_has_code_for_a_few_extents_and_then_for_any(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SPECIALISED_FORMS", 2)
    compiler.results["k"] = CompiledKernel("k", RECORD, ("out.data",), stored=("out",))
    kernel = FakeKernel("k", [("a", tensor(f32, "T", "D")), ("out", tensor(i64, "N"))])
    kernel.specialise = frozenset({"D"})

    def called(t: int, d: int, **options: Any) -> list[Any]:
        before = len(compiler.calls)
        kernel(floats(t * d).reshape(t, d), np.zeros(5, np.int64), **options)
        return [(call["static_dims"], "D" in call["dim_classes"]) for call in compiler.calls[before:]]

    assert called(3, 64) == [({"D": 64}, False)]
    assert called(5, 64) == []                          # T has a class as ever
    assert called(3, 64, static="T") == [({"T": 3, "D": 64}, False)]
    assert called(3, 128) == [({"D": 128}, False)]
    assert called(3, 96) == [({}, True)]
    assert called(4, 112) == []                         # the same class
    assert called(200, 64) == [({"D": 64}, False)] and called(200, 96) == [({}, True)]
    bound = prepare(kernel, floats(6).reshape(2, 3), np.zeros(5, np.int64))
    assert compiler.calls[-1]["static_dims"] == {} and bound.entry.compiled.name == "k"


def test_disk_cache_serves_the_next_process(compiler: Compiler, add_f32: FakeKernel) -> None:
    add_f32(floats(8), 1.0, floats(8))
    again = FakeKernel("add_f32", add_f32.parameters)
    out = floats(8)
    again(floats(8), 1.0, out)
    assert out.tolist() == [1.0] * 8 and len(compiler.calls) == 1
    again(floats(8), 1.0, out, schedule={"unroll": 2})
    assert len(compiler.calls) == 2
    other = FakeKernel("add_f32", add_f32.parameters)
    other.source_digest = lambda: "another source"  # type: ignore[method-assign]
    other(floats(8), 1.0, out)
    assert len(compiler.calls) == 3
    module.configure(compiler.compile_kernel, lambda wanted: "this CPU", str, toolchain_key=lambda: "newer")
    FakeKernel("add_f32", add_f32.parameters)(floats(8), 1.0, out)
    assert len(compiler.calls) == 4


def test_damaged_cache_entries_are_compiled_again(
    compiler: Compiler, add_f32: FakeKernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sapper.runtime.errors._warned", set())
    add_f32(floats(8), 1.0, floats(8))
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    out = floats(8)
    with pytest.warns(SapperWarning, match="damaged"):
        FakeKernel("add_f32", add_f32.parameters)(floats(8), 1.0, out)
    assert out.tolist() == [1.0] * 8 and len(compiler.calls) == 2


def test_works_without_disk_cache(compiler: Compiler, add_f32: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPPER_CACHE_DIR", "off")
    add_f32(floats(8), 1.0, floats(8))
    FakeKernel("add_f32", add_f32.parameters)(floats(8), 1.0, floats(8))
    assert len(compiler.calls) == 2


def test_threads_compiling_at_once_compile_once(compiler: Compiler, add_f32: FakeKernel) -> None:
    compile_kernel, started = compiler.compile_kernel, threading.Barrier(4)

    def slowly(kernel: Any, **facts: Any) -> Any:
        time.sleep(0.02)
        return compile_kernel(kernel, **facts)

    module.configure(slowly, lambda wanted: "this CPU", str, toolchain_key=lambda: "test")
    outs = [floats(8) for _ in range(4)]

    def work(out: Any) -> None:
        started.wait()
        add_f32(floats(8, 1.0), 1.0, out)

    threads = [threading.Thread(target=work, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiler.calls) == 1 and all(out.tolist() == [2.0] * 8 for out in outs)


def test_many_threads_on_the_fast_path(add_i64: FakeKernel) -> None:
    wrong: list[int] = []

    def work(x: int) -> None:
        a, out = np.arange(50), np.zeros(50, np.int64)
        for _ in range(300):
            out[...] = 0
            add_i64(a, x, out)
            if out.tolist() != (a + x).tolist():
                wrong.append(x)

    threads = [threading.Thread(target=work, args=(x,)) for x in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_entries_do_not_pile_up(add_f32: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ENTRIES", 10)
    memory, out = floats(400), floats(400)
    for size in range(0, 400, 4):
        add_f32(memory[:size], 1.0, out[:size])
        assert (out[:size] == 1.0).all()
    launcher = module.launcher_with(add_f32)
    assert len(launcher.entries) <= 10 and len(launcher.layouts) <= 10


def test_stored_tensors_are_read_off_the_tile_ir(compiler: Compiler) -> None:
    function = Function("f", "tile")
    a = function.add_argument("a", TensorType(f32, ("M",)))
    b = function.add_argument("b", TensorType(f32, ("M",)))
    x = function.add_argument("x", TileType(f32))
    function.body.ops.append(Op("store", [b, x, x]))
    assert stored_tensors(function) == ("b",)
    made = FakeKernel("plain", [(v.name, v.type) for v in (a, b, x)])  # type: ignore[misc]
    made.tile_ir = lambda static: function  # type: ignore[attr-defined]
    compiler.results["plain"] = SimpleNamespace(bytes=b"\xc3", slots=[], scratch_bytes=0)  # type: ignore[assignment]
    memory = floats(4)
    with pytest.raises(ArgumentError, match="overlap"):
        made(memory, memory, 1.0)


# ---- threads


def test_choice_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPPER_THREADS", "8")
    kernel = CompiledKernel("k", b"\xc3", (), counters=1, tasks=(((1, ("M",), 4),),), work=((100_000.0, ("M",)),))
    assert choose_threads(kernel, {"M": 100}, 0, None) == (8, 8, True)
    assert choose_threads(kernel, {"M": 9}, 0, None) == (3, 3, False)  # three tasks
    assert choose_threads(kernel, {"M": 0}, 0, None) == (1, 1, False)
    assert choose_threads(kernel, {"M": 100}, 0, 20) == (20, 20, True)
    assert choose_threads(kernel, {"M": 100}, 0, 1).most == 1
    small = CompiledKernel("k", b"\xc3", (), counters=1, tasks=(((1, ("M",), 4),),), work=((10.0, ("M",)),))
    assert choose_threads(small, {"M": 100}, 0, None).most == 1  # a microsecond
    assert choose_threads(small, {"M": 100}, 0, 4).most == 1  # the caller's number is a limit
    assert choose_threads(small, {"M": 600}, 0, 4) == (2, 1, False)  # is worth asking who is awake
    assert choose_threads(small, {"M": 10_000}, 0, 4) == (4, 2, False)
    unknown = CompiledKernel("k", b"\xc3", (), counters=1)
    assert choose_threads(unknown, {"M": 9}, 1 << 10, None).most == 1
    assert choose_threads(unknown, {"M": 9}, 100 << 20, None) == (8, 8, True)
    unproved = CompiledKernel("k", b"\xc3", (), counters=None)
    assert choose_threads(unproved, {"M": 100}, 100 << 20, 5).most == 1
    sequential = CompiledKernel("k", b"\xc3", ())
    assert choose_threads(sequential, {"M": 100}, 100 << 20, 5).most == 1


def test_a_compiled_kernel_says_how_many_workers_it_is_worth() -> None:
    from sapper.kernels import find

    entry = find("rms_norm")
    for shape, workers in (({"M": 3, "N": 576}, 1), ({"M": 1, "N": 1 << 18}, 1), ({"M": 512, "N": 1 << 12}, 2)):
        arguments = entry.make_arguments(np.random.default_rng(0), shape)
        assert prepare(entry.kernel, *arguments.values(), threads=2).entry.threads == workers, shape
        assert prepare(entry.kernel, *arguments.values(), threads=1).entry.threads == 1


def test_bad_options(add_f32: FakeKernel) -> None:
    for threads in (0, -1, 1.5, "two", 10**6):
        with pytest.raises(ArgumentError) as caught:
            add_f32(floats(4), 1.0, floats(4), threads=threads)
        assert caught.value.kind == "option"


def doubling() -> Any:
    """A kernel that this process has not called, always the same one to the cache on disk."""

    import sapper as sp

    size = sp.dims("N")

    @sp.kernel
    def double(x: sp.Tensor[f32, size], y: sp.Tensor[f32, size]):  # type: ignore[no-untyped-def]
        for n in sp.tiles(size):
            y[n] = x[n] + x[n]

    return double


def test_a_trace_shows_what_the_cache_has(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module.configure()
    for trace, shown in (("", False), ("1", True), ("0", False)):
        monkeypatch.setenv("SAPPER_TRACE", trace)
        doubling()(floats(5), floats(5))
        assert ("; double after lower" in capsys.readouterr().err) == shown


def test_a_trace_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module.configure()
    (tmp_path / "file").touch()
    for where in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nope")):
        monkeypatch.setenv("SAPPER_TRACE", str(where))
        with pytest.raises(LaunchError, match=r"SAPPER_TRACE: found .*; expected 1, or a directory"):
            doubling()(floats(5), floats(5))


def test_unknown_use_of_the_sync_block_gets_one(compiler: Compiler) -> None:
    for counters, is_there in ((0, False), (None, True), (1, True)):
        name = f"record {counters}"
        compiler.results[name] = CompiledKernel(name, RECORD, ("out.data",), counters=counters, stored=("out",))
        kernel = FakeKernel(name, [("out", tensor(i64, "N"))])
        out = np.zeros(5, np.int64)
        for _ in range(2):
            kernel(out)
            assert (out[2] != 0) == is_there and out[2] % 64 == 0


# ---- bound calls


def test_bound_call(add_f32: FakeKernel) -> None:
    a, out = floats(8, 1.0), floats(8)
    bound = prepare(add_f32, a, 2.0, out)
    assert out.tolist() == [0.0] * 8
    bound()
    assert out.tolist() == [3.0] * 8
    a[...] = 5.0
    bound.set_scalar("x", 0.5)
    bound()
    assert out.tolist() == [5.5] * 8
    with pytest.raises(ArgumentError):
        bound.set_scalar("x", "1")
    with pytest.raises(ArgumentError, match="y"):
        bound.set_scalar("y", 1.0)


def test_bound_call_keeps_its_arguments_alive(add_f32: FakeKernel) -> None:
    a = floats(8, 1.0)
    gone = weakref.ref(a)
    out = floats(8)
    bound = prepare(add_f32, a, 2.0, out)
    del a
    gc.collect()
    assert gone() is not None
    bound()
    assert out.tolist() == [3.0] * 8
    del bound
    gc.collect()
    module.launcher_with(add_f32).call(floats(8), 1.0, out)
    assert gone() is None


def test_bound_call_with_scratch_and_workers(tasks: FakeKernel) -> None:
    for threads in (1, 3):
        out, who = np.zeros(20, np.int64), np.zeros(20, np.int64)
        bound = prepare(tasks, out, who, 10, threads=threads)
        for turn in range(1, 20):
            bound()
            assert (out == turn).all()


def test_bound_call_in_the_work_area_that_is_free(tasks: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever that is, its counters are those that start at zero; one that is too small is dropped."""
    monkeypatch.setattr("sapper.runtime.vectorcall.functions", lambda: None)  # machine code has its own on the stack
    out, who = np.zeros(20, np.int64), np.zeros(20, np.int64)
    bound = prepare(tasks, out, who, 10, threads=1)
    bound()
    others = areas[:]
    areas.clear()
    bound()
    assert (out == 2).all() and areas and all(area not in others for area in areas)
    areas[:] = [others[-1]]
    bound()
    assert (out == 3).all() and areas == [others[-1]]
    others[-1].capacity_bytes = -1
    bound()
    assert (out == 4).all() and len(areas) == 1 and areas != [others[-1]]


def test_bound_call_that_fails_can_be_called_again(tasks: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sapper.runtime.vectorcall.functions", lambda: None)
    out, who = np.zeros(20, np.int64), np.zeros(20, np.int64)
    bound = prepare(tasks, out, who, 10, threads=1)
    others = areas[:]
    areas.clear()
    with monkeypatch.context() as patched:
        patched.setattr("sapper.runtime.scratch.WorkArea", lambda size: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            bound()
    areas[:] = others
    bound()
    assert (out == 1).all()


def test_bound_call_from_many_threads(tasks: FakeKernel) -> None:
    out, who = np.zeros(20, np.int64), np.zeros(20, np.int64)
    bound = prepare(tasks, out, who, 10, threads=1)
    threads = [threading.Thread(target=lambda: [bound() for _ in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (out == 400).all()


# ---- the interpreter


def test_interpreter_runs_instead(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    function = Function("f", "tile")
    out = function.add_argument("out", TensorType(f32, ("M",)))
    function.body.ops.append(Op("store", [out, out]))
    module.configure(
        compiler.compile_kernel, lambda wanted: "cpu", str, lambda kernel, arguments: seen.append((kernel, arguments))
    )
    monkeypatch.setenv("SAPPER_INTERPRET", "1")
    kernel = FakeKernel("f", [("out", tensor(f32, "M")), ("x", TileType(f32))])
    kernel.tile_ir = lambda static=None: function  # type: ignore[attr-defined]
    kernel.defaults["x"] = 2.0
    array = floats(3)
    kernel(array)
    assert seen[0][0] is kernel and np.shares_memory(seen[0][1][0], array) and seen[0][1][1] == 2.0
    array.flags.writeable = False
    with pytest.raises(ArgumentError, match="read-only"):
        kernel(array)
    with pytest.raises(LaunchError, match="interpreter"):
        prepare(kernel, array, 1.0)
    monkeypatch.delenv("SAPPER_INTERPRET")
    compiled = FakeKernel("f", kernel.parameters)
    compiled.tile_ir = kernel.tile_ir  # type: ignore[attr-defined]
    compiled(floats(3), 1.0, interpret=True)
    assert len(seen) == 2 and not compiler.calls


# ---- cost


def costs_at_most(limit_us: float, call: Any, turns: int = 500) -> bool:
    """Whether a call takes so little when nothing else disturbs it: tried until it does, at most for ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        start = time.perf_counter()
        for _ in range(turns):
            call()
        if (time.perf_counter() - start) / turns * 1e6 <= limit_us:
            return True
    return False


def test_a_call_costs_at_most_five_microseconds(compiler: Compiler) -> None:
    slots = ("a.data", "b.data", "c.data", "dim.M", "dim.N", "dim.K")
    for name, facts in (("plain", {}), ("scratch", {"scratch_bytes": 10_000, "counters": 1})):
        compiler.results[name] = CompiledKernel(name, b"\xc3", slots, stored=("c",), **facts)  # type: ignore[arg-type]
        b_type = tensor(bf16, "K", "N")
        kernel = FakeKernel(name, [("a", tensor(f32, "M", "K")), ("b", b_type), ("c", tensor(f32, "M", "N"))])
        a, c = np.zeros((4, 8), np.float32), np.zeros((4, 12), np.float32)
        b = np.zeros((8, 12), ml_dtypes.bfloat16)
        kernel(a, b, c)
        assert costs_at_most(5.0, lambda: kernel(a, b, c))  # noqa: B023
        assert costs_at_most(2.0, prepare(kernel, a, b, c))


def test_signature_without_parameters(compiler: Compiler) -> None:
    compiler.results["nothing"] = CompiledKernel("nothing", b"\xc3", ())
    kernel = FakeKernel("nothing", [])
    for _ in range(3):
        kernel()
    assert Signature("k", [Parameter("x", f32, None)]).tensor_positions == ()


# ---- with the other parts


def test_real_kernel_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    import sapper as sp

    monkeypatch.setenv("SAPPER_INTERPRET", "1")
    module.configure()
    size = sp.dims("M")

    @sp.kernel
    def add(a: sp.Tensor[sp.f32, size], x: sp.f32, out: sp.Tensor[sp.f32, size]):  # type: ignore[no-untyped-def]
        for m in sp.tiles(size):
            out[m] = a[m] + x

    a, out = np.arange(5, dtype=np.float32), floats(5)
    add(a, 2.0, out)
    assert out.tolist() == (a + 2).tolist()
    frozen = floats(5)
    frozen.flags.writeable = False
    with pytest.raises(ArgumentError, match="read-only"):
        add(a, 2.0, frozen)
    torch = pytest.importorskip("torch")
    result = torch.zeros(5)
    add(torch.ones(5), 0.5, result)
    assert result.tolist() == [1.5] * 5


def test_targets_are_found_and_checked() -> None:
    from sapper.targets.x86_64.detect import host_target

    here = module._find_target(None)
    assert here == host_target()
    assert module._find_target("v3").name == "v3"
    with pytest.raises(CallError, match=r"'zen'\n  expected: one of v3, v4, zen3.*\n  mend:     did you mean zen.\?"):
        module._find_target("zen")
    with pytest.raises(LaunchError, match=r"found no .*neon in this CPU"):
        module._find_target("neoverse-n1")
    with pytest.raises(LaunchError, match="teleport"):
        module._find_target(here._replace(features=here.features | {"teleport"}))
    with pytest.raises(CallError, match="found:    3"):
        module._target_key(3)
    key = module._target_key(here)
    assert key == module._target_key(here._replace(features=frozenset(sorted(here.features, reverse=True))))
    assert key != module._target_key(here._replace(l2_bytes=1))


@pytest.mark.parametrize("options", [{}, {"interpret": True}, {"static": "HALF"}], ids=str)
def test_extents_that_indices_need_are_checked(options: dict[str, Any]) -> None:
    """RoPE whose rows are shorter than its tables say would read outside them."""
    module.configure()
    kernel = _pairs()
    good = np.ones((3, 8), np.float32)
    table, out = np.ones((3, 4), np.float32), np.zeros((3, 8), np.float32)
    kernel(good, table, out, **options)
    np.testing.assert_array_equal(out, 2 * good)
    for short in (np.ones((3, 7), np.float32), np.ones((3, 0), np.float32)):
        with pytest.raises(ArgumentError, match=r"at least 8\b") as caught:
            kernel(short, table, out, **options)
        assert caught.value.kind == "shape"
    kernel(np.ones((3, 9), np.float32), table, out, **options)


def _pairs() -> Any:
    import sapper as sp

    rows, half, wide, wider = sp.dims("T HALF D E")

    @sp.kernel
    def pairs(x: sp.Tensor[sp.f32, rows, wide], table: sp.Tensor[sp.f32, rows, half],  # type: ignore[no-untyped-def]
              out: sp.Tensor[sp.f32, rows, wider]):
        for t, i in sp.tiles(rows, half):
            out[t, 2 * i] = x[t, 2 * i] + table[t, i]
            out[t, 2 * i + 1] = x[t, 2 * i + 1] + table[t, i]

    return pairs


def test_a_kernel_that_means_nothing_fails_under_the_interpreter_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import sapper as sp
    from sapper.lang.errors import KernelError

    monkeypatch.setenv("SAPPER_INTERPRET", "1")
    module.configure()
    size = sp.dims("M")

    @sp.kernel
    def beyond(a: sp.Tensor[sp.f32, size]):  # type: ignore[no-untyped-def]
        for m in sp.tiles(size):
            a[m] = a[m + 1]

    with pytest.raises(KernelError, match="reaches beyond its end"):
        beyond(floats(3))
