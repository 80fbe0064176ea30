"""Kernels called with device memory: what cuda-bindings passes to the driver, run on the emulator."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import sapper as sp
from sapper import CallError, Tensor, bf16, each, f32, maximum, sum, tiles, whole, zeros
from sapper.emulate import DeadlockError, Options, RaceError, machine
from sapper.emulate.memory import GLOBAL_BASE
from sapper.kernels import find
from sapper.runtime import cuda
from sapper.runtime.cache import disk_cache
from sapper.runtime.dtypes import numpy_dtype
from sapper.runtime.errors import ArgumentError, LaunchError
from sapper.targets.ptx.text import SYNC_BYTES

from .emulated_driver import CUBIN

if TYPE_CHECKING:
    from .emulated_driver import EmulatedDriver

M, N, K = sp.dims("M N K")
BF16 = numpy_dtype("bf16")


@sp.kernel
def product(a: Tensor[bf16, M, K], b: Tensor[bf16, N, K], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[n, k]
        c[m, n] = acc


@sp.kernel
def scale(x: Tensor[f32, N], factor: f32, out: Tensor[f32, N]):
    for n in tiles(N):
        out[n] = x[n] * factor


@sp.kernel
def two_steps(x: Tensor[f32, M, N], total: Tensor[f32, M], out: Tensor[f32, M]):
    """The second loop reads what all tasks of the first wrote: workers meet between."""
    for i in each(M):
        n = whole(N)
        total[i] = sum(x[i, n], over=n)
    for m in tiles(M):
        out[m] = total[m] * 2.0


@sp.kernel
def two_products(x: Tensor[f32, M, M], w: Tensor[f32, M, K], v: Tensor[f32, K, N], y: Tensor[f32, M, N]):
    for m in tiles(M):
        i, k = whole(M), whole(K)
        hidden = maximum(x[m, i] @ w[i, k], 0.0)
        for n in tiles(N):
            y[m, n] = hidden @ v[k, n]


def launches(device: EmulatedDriver) -> list[dict[str, Any]]:
    return [facts for name, facts in device.log if name == "launch"]


def normal(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", ["vector_add", "softmax", "rms_norm", "matmul_nn_f32", "top_k"])
def test_library_kernels(device: EmulatedDriver, name: str) -> None:
    entry = find(name)
    shape = min((s for s in entry.check_shapes if np.prod(list(s.values())) > 100),
                key=lambda s: int(np.prod(list(s.values()))))
    given = entry.make_arguments(np.random.default_rng(0), shape)
    on_device = {name: cuda.array(value) if isinstance(value, np.ndarray) else value for name, value in given.items()}
    entry.kernel(*on_device.values())
    made = {name: value.numpy() if isinstance(value, cuda.DeviceArray) else value for name, value in on_device.items()}
    wrong = entry.compare(made, entry.reference(given))
    assert wrong is None, wrong
    (facts,) = launches(device)
    assert facts["grid"][1:] == (1, 1) and facts["block"] == (128, 1, 1)


def test_a_product_by_tensor_maps(device: EmulatedDriver) -> None:
    """sm_90a: the maps' fields, shared memory above 48 KiB, a block of twelve warps at most."""
    a, b = normal(96, 128).astype(BF16), normal(160, 128).astype(BF16)
    given = cuda.array(a), cuda.array(b), cuda.empty((96, 160))
    product(*given)
    np.testing.assert_allclose(given[2].numpy(), a.astype(np.float32) @ b.astype(np.float32).T, rtol=1e-5, atol=1e-3)
    maps = [facts for name, facts in device.log if name == "map"]
    assert [(m["dtype"], m["address"], m["shape"], m["strides"], m["swizzle"]) for m in maps] == [
        (7, given[2].address, (160, 96), (640,), 3),
        (9, given[0].address, (128, 96), (256,), 3), (9, given[1].address, (128, 160), (256,), 3)]
    assert [m["box"][0] for m in maps] == [32, 64, 64]      # 128 bytes
    (facts,) = launches(device)
    assert facts["shared"] > 48 << 10
    assert facts["block"][0] % 128 == 0


def test_the_level_follows_the_device(device: EmulatedDriver) -> None:
    device.reset(capability=(8, 6))
    a, b = normal(96, 64).astype(BF16), normal(128, 64).astype(BF16)
    out = cuda.empty((96, 128))
    product(cuda.array(a), cuda.array(b), out)
    np.testing.assert_allclose(out.numpy(), a.astype(np.float32) @ b.astype(np.float32).T, rtol=1e-5, atol=1e-3)
    assert not [name for name, _ in device.log if name == "map"]
    assert cuda.device().target.name == "sm_86"


def test_workers_that_meet_are_launched_together(device: EmulatedDriver) -> None:
    device.reset(processors=3)
    x = normal(200, 40)
    total, out = cuda.empty(200), cuda.empty(200)
    two_steps(cuda.array(x), total, out)
    np.testing.assert_allclose(out.numpy(), 2 * x.sum(1), rtol=1e-4, atol=1e-4)
    (facts,) = launches(device)
    assert facts["cooperative"] and facts["grid"][0] == 2 * 3  # what the device holds at once
    scale(cuda.array(x[0]), 2.0, cuda.empty(40))
    assert not launches(device)[1]["cooperative"]


def test_what_workers_share_lies_behind_the_memory_of_all(device: EmulatedDriver) -> None:
    """Two products, between which all sums of the first one lie in memory."""
    x, w, v = normal(70, 70), normal(70, 90), normal(90, 80)
    out = cuda.empty((70, 80))
    two_products(cuda.array(x), cuda.array(w), cuda.array(v), out)
    np.testing.assert_allclose(out.numpy(), np.maximum(x @ w, 0) @ v, rtol=1e-4, atol=1e-3)
    (facts,) = launches(device)
    assert facts["cooperative"] and facts["shared"] > 48 << 10


def test_bound_calls_and_their_scalars(device: EmulatedDriver) -> None:
    x = normal(1000)
    out = cuda.empty(1000)
    call = sp.prepare(scale, cuda.array(x), 2.0, out)
    assert not launches(device)
    call()
    np.testing.assert_array_equal(out.numpy(), x * np.float32(2))
    call.set_scalar("factor", -0.5)
    call()
    np.testing.assert_array_equal(out.numpy(), x * np.float32(-0.5))
    with pytest.raises(ArgumentError, match="no such scalar"):
        call.set_scalar("x", 1.0)


def test_streams_and_scratch_memory_of_each(device: EmulatedDriver) -> None:
    x, out = cuda.array(normal(100)), cuda.empty(100)
    scale(x, 1.0, out)
    with cuda.Stream() as stream:
        scale(x, 1.0, out)
        scale(x, 2.0, out)
    scale(x, 3.0, out, target="sm_80")
    facts = launches(device)
    assert [each["stream"] for each in facts] == [0, int(stream.handle), int(stream.handle), 0]
    scratch = [each["words"][0] for each in facts]
    assert scratch[0] == scratch[3] != scratch[1] == scratch[2]


def test_the_stream_of_pytorch_is_used(device: EmulatedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch without CUDA is asked for its current stream as one with CUDA would answer."""
    torch = pytest.importorskip("torch")
    x, out = cuda.array(normal(100)), cuda.empty(100)
    theirs = cuda.Stream()

    class Current:
        cuda_stream = int(theirs.handle)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda ordinal: Current if ordinal == 0 else None)
    scale(x, 1.0, out)
    sp.prepare(scale, x, 1.0, out)(0)
    assert [each["stream"] for each in launches(device)] == [int(theirs.handle), 0]


class Foreign:
    """A tensor of another package: it gives its memory by DLPack only, and keeps what stream it was asked for."""

    def __init__(self, inner: cuda.DeviceArray, versioned: bool) -> None:
        self.inner, self.versioned, self.asked = inner, versioned, []  # type: ignore[var-annotated]

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.inner.__dlpack_device__()

    def __dlpack__(self, stream: int | None = None, **options: Any) -> Any:
        if not self.versioned and options:
            raise TypeError("an older protocol")
        self.asked.append(stream)
        return self.inner.__dlpack__(stream=stream, **options)


@pytest.mark.parametrize("versioned", [False, True])
def test_tensors_of_other_packages(device: EmulatedDriver, versioned: bool) -> None:
    x = normal(5, 20)
    given, out = Foreign(cuda.array(x[2]), versioned), Foreign(cuda.empty(20), versioned)
    with cuda.Stream() as stream:
        scale(given, 3.0, out)
        np.testing.assert_array_equal(out.inner.numpy(), x[2] * np.float32(3))
    assert given.asked == [int(stream.handle)]
    scale(given, 3.0, out)
    assert given.asked[1:] == [1]  # the default stream, as DLPack spells it


def test_an_exported_tensor_lives_as_long_as_its_capsule(device: EmulatedDriver) -> None:
    x = cuda.array(normal(20))
    address, capsule = x.address, x.__dlpack__()
    assert "dltensor" in repr(capsule)
    del x
    assert ("free", address) not in device.log
    del capsule
    assert ("free", address) in device.log


def test_a_consumer_of_a_capsule_on_another_stream_waits(device: EmulatedDriver) -> None:
    x = cuda.array(normal(20))
    other = cuda.Stream()
    x.__dlpack__(stream=int(other.handle))
    assert device.log[-2:] == [("record", 0), ("wait", (int(other.handle), 0))]
    before = len(device.log)
    x.__dlpack__(stream=-1)
    x.__dlpack__(stream=1)
    assert len(device.log) == before


def test_a_graph_runs_its_calls_again(device: EmulatedDriver) -> None:
    x, half, out = cuda.array(normal(50)), cuda.empty(50), cuda.empty(50)
    first, second = sp.prepare(scale, x, 0.5, half), sp.prepare(scale, half, 3.0, out)
    graph = cuda.capture(lambda: (first(), second()))
    assert not launches(device)
    graph()
    np.testing.assert_array_equal(out.numpy(), x.numpy() * np.float32(0.5) * np.float32(3))
    graph()
    assert len(launches(device)) == 4
    with pytest.raises(ZeroDivisionError):
        cuda.capture(lambda: 1 // 0)
    assert not device.captures


def test_memory_that_goes_does_not_break_a_capture(device: EmulatedDriver) -> None:
    x, out, given = cuda.array(normal(50)), cuda.empty(50), [cuda.empty(10)]
    prepared = sp.prepare(scale, x, 0.5, out)

    def work() -> None:
        given.clear()
        prepared()

    cuda.capture(work)()
    np.testing.assert_array_equal(out.numpy(), x.numpy() * np.float32(0.5))


@pytest.mark.parametrize(("code", "told"), [(719, 0), (1, 1)])
def test_handles_of_a_lost_device_go_quietly(device: EmulatedDriver, code: int, told: int,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", found.append)
    x = cuda.empty(5)
    device.refuse["cuMemFree"] = code
    del x
    assert len(found) == told


def test_events_measure(device: EmulatedDriver) -> None:
    start, end = cuda.Event().record(), cuda.Event()
    scale(cuda.array(normal(20)), 1.0, cuda.empty(20))
    end.record().synchronize()
    assert end.since(start) > 0


def test_cubins_are_kept_by_text_driver_and_device(device: EmulatedDriver) -> None:
    def compiled_anew() -> bool:
        before = len([name for name, _ in device.log if name == "compile"])
        cuda.load(PTX)["double"]
        return len([name for name, _ in device.log if name == "compile"]) > before

    assert disk_cache() is not None
    assert compiled_anew()
    assert not compiled_anew()
    device.version = 12080
    cuda.driver.forget()
    assert compiled_anew()
    device.version = 13000
    cuda.driver.forget()
    assert not compiled_anew()
    device.reset(capability=(8, 0))
    cuda.driver.forget()
    assert compiled_anew()


def test_a_cubin_that_the_driver_refuses_is_made_anew(device: EmulatedDriver) -> None:
    on, cache = cuda.device(), disk_cache()
    assert cache is not None
    key = f"cubin with a name\n{on.driver_version}\n{on.name}\n{on.capability}\n{PTX}"
    cache.put(key, b'{"name": "a module"}\nof another driver\0')
    cuda.load(PTX)
    assert [name for name, _ in device.log] == ["compile", "load"]


def test_what_moves_registers_between_warps_is_compiled_as_a_whole(device: EmulatedDriver) -> None:
    """The linker would ignore it: the driver gets the text."""
    text = PTX.replace("7.8", "8.0").replace("sm_90", "sm_90a").replace(
        " ld.param.u64 %d1, [x];", " setmaxnreg.dec.sync.aligned.u32 24;\n ld.param.u64 %d1, [x];")
    cuda.load(text)["double"]
    assert device.log == [("compile", len(text)), ("load", len(text))]
    cuda.load(PTX)["double"]
    assert device.log[2:] == [("compile", len(PTX)), ("load", len(CUBIN) + len(PTX))]


PTX = """
.version 7.8
.target sm_90
.address_size 64
.visible .entry double(.param .u64 x, .param .u32 count, .param .f32 factor)
.reqntid 32, 1, 1
{
 .reg .b32 %r<6>; .reg .f32 %f<4>; .reg .b64 %d<3>; .reg .pred %p;
 ld.param.u64 %d1, [x];
 ld.param.u32 %r1, [count];
 ld.param.f32 %f1, [factor];
 mov.u32 %r2, %ctaid.x;
 mov.u32 %r3, %tid.x;
 mad.lo.s32 %r2, %r2, 32, %r3;
 setp.ge.s32 %p, %r2, %r1;
 @%p ret;
 mad.wide.u32 %d2, %r2, 4, %d1;
 ld.global.f32 %f2, [%d2];
 mul.f32 %f2, %f2, %f1;
 st.global.f32 [%d2], %f2;
 ret;
}
"""


@pytest.mark.parametrize(("processors", "blocks"), [(5, 10), (1, 2)])
def test_clusters_that_share_the_depth_are_resident_at_once(device: EmulatedDriver, processors: int,
                                                            blocks: int) -> None:
    """As many clusters as the device says that it holds, two blocks on a processor; launched together, as they wait."""
    device.reset(processors=processors)
    entry = find("matmul_nt_bf16_bf16")
    given = entry.make_arguments(np.random.default_rng(3), {"M": 80, "N": 64, "K": 960})
    wanted = entry.reference(given)
    on_device = {name: cuda.array(value) for name, value in given.items()}
    entry.kernel(*on_device.values(), schedule={"tile": {"m": 64, "n": 64}, "cluster": {"m": 2}, "stream": "k"})
    assert entry.compare({name: value.numpy() for name, value in on_device.items()}, wanted) is None
    (facts,) = launches(device)
    assert facts["cooperative"] and facts["cluster"] == (2, 1, 1) and facts["grid"] == (blocks, 1, 1)


def test_ptx_of_others(device: EmulatedDriver) -> None:
    x = normal(70)
    given = cuda.array(x)
    cuda.load(PTX)["double"]((4,), (32,), [given, 70, np.float32(2.0)], cluster=(2,))
    np.testing.assert_array_equal(given.numpy(), 2 * x)
    (facts,) = launches(device)
    assert (facts["grid"], facts["cluster"]) == ((4, 1, 1), (2, 1, 1))
    with pytest.raises(LaunchError, match=r"double: found an argument float; .*numpy.float32"):
        cuda.load(PTX)["double"]((4,), (32,), [given, 70, 2.0])
    with pytest.raises(cuda.CudaError, match="cuModuleGetFunction: found CUDA_ERROR_NOT_FOUND"):
        cuda.load(PTX)["triple"]
    with pytest.raises(LaunchError, match="its compiler says: line 19"):
        cuda.load(PTX.replace("mul.f32", "mul.f33"))


# ------------------------------------------------------------------------------------------------------------ errors

def test_tensors_must_lie_on_one_device(device: EmulatedDriver) -> None:
    with pytest.raises(ArgumentError, match=r"found: +ndarray in memory of the host"):
        scale(cuda.array(normal(20)), 1.0, np.zeros(20, np.float32))
    with pytest.raises(ArgumentError, match=r"found: +1 argument"):
        scale(cuda.array(normal(20)))
    with pytest.raises(ArgumentError, match=r"found: +dtype f64"):
        scale(cuda.array(np.zeros(20)), 1.0, cuda.empty(20))
    with pytest.raises(ArgumentError, match="memory that overlaps"):
        x = cuda.array(normal(20))
        scale(x, 1.0, x)
    with pytest.raises(ArgumentError, match="leave threads out"):
        scale(x, 1.0, x, threads=2)
    with pytest.raises(ArgumentError, match=r"expected: a level that Emulated runs, such as sm_90a"):
        scale(x, 1.0, cuda.empty(20), target="sm_100a")


def test_the_interpreter_and_programs_refuse_device_memory(device: EmulatedDriver) -> None:
    x = cuda.array(normal(20))
    with pytest.raises(CallError, match="a tensor in CUDA memory"):
        scale(x, 1.0, cuda.empty(20), interpret=True)
    with pytest.raises(CallError, match="a tensor in CUDA memory"):
        sp.Program([(scale, (x, 1.0, cuda.empty(20)))])


def test_what_the_driver_refuses_is_said_in_its_words(device: EmulatedDriver) -> None:
    device.refuse["cuMemAlloc"] = 2
    with pytest.raises(cuda.CudaError, match=r"cuMemAlloc: found CUDA_ERROR_OUT_OF_MEMORY .*free device") as seen:
        cuda.empty(20)
    assert seen.value.name == "CUDA_ERROR_OUT_OF_MEMORY"
    device.refuse = {"cuInit": 100}
    cuda.driver.forget()
    with pytest.raises(LaunchError, match=r"does not start \(CUDA_ERROR_NO_DEVICE\).*emulate=True"):
        cuda.device()


def test_an_old_device_is_refused(device: EmulatedDriver) -> None:
    device.reset(capability=(7, 5))
    with pytest.raises(LaunchError, match=r"found compute capability 7.5; expected 8.0 or later"):
        scale(cuda.array(normal(20)), 1.0, cuda.empty(20))
    with pytest.raises(LaunchError, match="found device 3; expected one of 1"):
        cuda.device(3)


def test_a_race_on_the_emulated_device_fails_the_launch(device: EmulatedDriver) -> None:
    """So that the tests above can fail: nothing is lost between the emulator and the call."""
    text = PTX.replace("mad.wide.u32 %d2, %r2, 4, %d1", "mov.b64 %d2, %d1")
    with pytest.raises(cuda.CudaError, match="CUDA_ERROR_LAUNCH_FAILED"):
        cuda.load(text)["double"]((4,), (32,), [cuda.array(normal(70)), 70, np.float32(2.0)])
    assert isinstance(device.failure, RaceError)
    device.failure = None


def aborted(device: EmulatedDriver, issue: Callable[[], Any], most: int = 2000) -> None:
    """Issue work whose kernel ends midway, as soon as it has something in its sync block."""
    for steps in range(50, most, 50):
        device.options = Options(step_limit=steps)
        with pytest.raises(cuda.CudaError, match="CUDA_ERROR_LAUNCH_FAILED"):
            issue()
        assert isinstance(device.failure, DeadlockError)
        device.failure, device.options = None, Options(step_limit=20_000)
        at = launches(device)[-1]["words"][2] - GLOBAL_BASE
        if device.memory.bytes[at:at + SYNC_BYTES].any():
            return
    pytest.fail(f"nothing in the sync block after {most} instructions")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("way", ["call", "prepared", "graph"])
@pytest.mark.parametrize("kernel", [product, two_steps], ids=["flags", "arrivals"])
def test_a_kernel_that_was_aborted_leaves_nothing_behind(device: EmulatedDriver, kernel: Any, way: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags raised, or arrivals counted, which the next launch would take for its own."""
    device.reset(processors=6)
    monkeypatch.setattr(machine, "FUEL", 20)    # in whose steps the emulator looks whether it ran long enough
    if kernel is product:
        x = normal(64, 512).astype(BF16)
        options: dict[str, Any] = {"schedule": {"tile": {"m": 64, "n": 64}, "split": {"k": 6}}}
        given, wanted = (cuda.array(x), cuda.array(x), cuda.empty((64, 64))), x.astype(np.float64) @ x.astype(float).T
    else:
        x, options = normal(200, 40), {}
        given, wanted = (cuda.array(x), cuda.empty(200), cuda.empty(200)), 2 * x.sum(1)
    prepared = sp.prepare(kernel, *given, **options)
    issue: Callable[[], Any] = {"call": lambda: kernel(*given, **options), "prepared": prepared,
                                "graph": cuda.capture(prepared)}[way]
    for _ in range(2):
        aborted(device, issue)
        given[2].copy_from(np.full(given[2].shape, np.nan, np.float32))
        issue()
        np.testing.assert_allclose(given[2].numpy(), wanted, rtol=1e-4, atol=1e-3)
    cleared = [facts for name, facts in device.log if name == "set"]
    issue()
    assert [facts for name, facts in device.log if name == "set"] == cleared


def test_without_a_driver_one_line_says_what_to_do() -> None:
    """In a process of its own, where no library stands in for the driver."""
    code = "from sapper.runtime import cuda; cuda.empty(3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if not done.returncode:
        pytest.skip("a real driver is here")
    last = done.stderr.strip().splitlines()[-1]
    assert "LaunchError: CUDA: found no " in last and "mend: " in last and "emulate=True" in last


def test_calls_on_the_emulator() -> None:
    x, out = normal(100), np.zeros(100, np.float32)
    scale(x, 3.0, out, target="sm_80", emulate=True)
    np.testing.assert_array_equal(out, x * np.float32(3))
    with pytest.raises(ArgumentError, match="expected: a target that is emulated"):
        scale(x, 3.0, out, emulate=True)
    with pytest.raises(LaunchError, match="emulate=True"):
        sp.prepare(scale, x, 3.0, out, target="sm_80", emulate=True)
    with pytest.raises(ArgumentError, match=r"mend: .*emulate=True"):
        scale(x, 3.0, out, target="sm_80")


def test_scalars_are_where_all_indices_are_inside(device: EmulatedDriver) -> None:
    @sp.kernel
    def append(new: Tensor[f32, N], position: sp.i32, cache: Tensor[f32, M]):
        for n in tiles(N):
            cache[position + n] = new[n]

    new, cache = cuda.array(np.arange(3, dtype=np.float32)), cuda.array(np.zeros(9, np.float32))
    for position in (6, 0, 2):
        append(new, position, cache)
        with pytest.raises(ArgumentError, match="index 9 of dimension 0"):
            append(new, 7, cache)
    bound = sp.prepare(append, new, 0, cache)
    with pytest.raises(ArgumentError, match="index -1 of dimension 0"):
        bound.set_scalar("position", -1)
    bound.set_scalar("position", 5)
    bound()
    assert cache.numpy().tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 2]
