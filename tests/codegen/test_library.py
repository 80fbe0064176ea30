"""Built libraries: what their functions compute, what they refuse, and that C programs can use them."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sapper
from sapper.codegen.c_abi import BuildError, library_parts, needed_features
from sapper.codegen.library import Library, c_kernel, make_library
from sapper.codegen.machine import Instruction, MachineFunction, Register
from sapper.targets.x86_64.detect import FEATURE_BITS, host
from sapper.targets.x86_64.instructions import ROWS
from sapper.targets.x86_64.target import TARGETS
from sapper.tile.rounding import expect
from tests.strategies import assert_expected, built, examples, kernels

from . import library_kernels as source
from .c_caller import Loaded, in_child
from .run_native import RUNNABLE

MACHINES = [name for name in ("v3", "v4") if name in RUNNABLE]
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64" or not MACHINES, reason="runs x86-64 code")
NEEDS_GCC = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
NEEDS_BINUTILS = pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils are not installed")
ALL = (source.scale, source.matmul, source.pairs, source.many, source.twice, source.blocks, source.halves,
       source.digits, source.picked, source.placed, source.beside)


def build(*wanted, machine: str = "v3", **options) -> Library:
    return make_library([c_kernel(k, TARGETS[machine], **options) for k in wanted], TARGETS[machine])


@pytest.fixture(scope="module", params=MACHINES)
def loaded(request, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(build(*ALL, machine=request.param), tmp_path_factory.mktemp("library"))


def matrices(m: int, k: int, n: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(m + k + n)
    return {"a": random.standard_normal((m, k), np.float32), "b": random.standard_normal((k, n), np.float32),
            "c": np.full((m, n), np.nan, np.float32)}


@pytest.mark.parametrize("shape", [(1, 1, 1), (15, 33, 70), (0, 4, 4), (64, 64, 64), (40, 0, 9)])
def test_plain_calls(loaded: Loaded, shape: tuple[int, int, int]) -> None:
    arguments = matrices(*shape)
    assert loaded.plain("matmul", arguments) == "OK"
    np.testing.assert_allclose(arguments["c"], arguments["a"] @ arguments["b"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_calls_with_strides_and_workers(loaded: Loaded, workers: int) -> None:
    for m, k, n in ((1, 3, 5), (70, 33, 129), (130, 64, 64)):
        arguments = matrices(m, k, n)
        expected = arguments["a"] @ arguments["b"]
        arguments["a"] = np.asfortranarray(arguments["a"])
        arguments["b"] = np.repeat(arguments["b"], 2, axis=1)[:, ::2]
        arguments["c"] = np.full((n, m), np.nan, np.float32).T
        assert loaded.on("matmul", arguments, workers) == "OK"
        np.testing.assert_allclose(arguments["c"], expected, rtol=1e-4, atol=1e-4)


def test_every_scalar_type_arrives(loaded: Loaded) -> None:
    values = {"a": -128, "b": 255, "c": -30000, "d": -(2**31), "e": 2**40 + 1, "f": True, "g": 1.5, "h": -2.25,
              "i": 0.333251953125, "j": -1.5, "k": 3.0, "l": 4.0, "m": 5.0, "o": 6.0, "p": 7.0, "q": 8.0, "r": 9.0,
              "s": -7}
    for truth in (True, False):
        values["f"] = truth
        for call in (loaded.plain, loaded.on):
            arguments = {"x": np.arange(3, dtype=np.int64), **values, "out": np.zeros((3, 3))}
            assert call("many", arguments) == "OK"
            whole = (np.arange(3) + values["a"] * 2 + values["b"] * 3 + values["c"] * 5 + values["d"] * 7
                     + values["e"] * 11 + values["s"] * 13)
            np.testing.assert_array_equal(arguments["out"][:, 0], whole)
            np.testing.assert_array_equal(
                arguments["out"][:, 1], 1.5 - 4.5 + 0.333251953125 * 3 - 7.5 + 21 + 44)
            np.testing.assert_array_equal(arguments["out"][:, 2], (10 + 18 + 35 + 56 + 99) * (1 if truth else -1))


def test_a_tensor_may_be_changed_in_place(loaded: Loaded) -> None:
    x = np.arange(5, dtype=np.float32)
    assert loaded.plain("twice", {"x": x, "y": x, "register": 2.0}) == "OK"
    np.testing.assert_array_equal(x, [0, 2, 4, 6, 8])


def test_what_is_refused(loaded: Loaded) -> None:
    def given() -> dict[str, np.ndarray]:
        return matrices(8, 8, 8)

    assert loaded.plain("matmul", given(), M=-1) == "BAD_EXTENT"
    assert loaded.plain("matmul", given(), K=2**31) == "BAD_EXTENT"
    call = {"dim.N": -(2**63)}
    assert loaded.on("matmul", given(), scratch=64, **call) == "BAD_EXTENT"
    assert loaded.on("matmul", given(), **{"a.data": 0}) == "BAD_POINTER"
    assert loaded.on("matmul", given(), **{"c.data": given()["c"].ctypes.data + 1}) == "BAD_POINTER"
    assert loaded.on("matmul", given(), sync=0) == "BAD_SYNC"
    assert loaded.on("matmul", given(), sync=given()["c"].ctypes.data // 64 * 64 + 8) == "BAD_SYNC"
    out = np.zeros((2, 4), np.float32)
    assert loaded.plain("pairs", {"x": np.zeros((2, 7), np.float32), "out": out}) == "BAD_EXTENT"
    assert loaded.plain("pairs", {"x": np.ones((2, 8), np.float32), "out": out}) == "OK"
    np.testing.assert_array_equal(out, 2)
    function = loaded.library.scale_on
    call, keep = loaded.fill("scale", {"x": out, "factor": 2.0, "out": np.zeros_like(out)})
    for worker, workers in ((1, 1), (-1, 2), (0, 0), (0, -1), (-2, -1)):
        assert function(call, ctypes.c_int64(worker), ctypes.c_int64(workers)) == 6
    del keep


def test_views_are_checked(loaded: Loaded) -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 12).view(np.uint8)
    out = np.zeros((2, 12), np.float32)
    for call in (loaded.plain, loaded.on):
        assert call("blocks", {"x": x, "out": out}) == "OK"
        np.testing.assert_array_equal(out, x.view(np.float32) + np.arange(12))
        assert call("blocks", {"x": x[:, :47].copy(), "out": out}) == "BAD_EXTENT"  # no multiple of 4
        assert call("blocks", {"x": x, "out": out[:, :11].copy()}) == "BAD_EXTENT"  # K // 4 columns do not fit
    assert loaded.on("blocks", {"x": np.asfortranarray(x), "out": out}) == "BAD_STRIDE"
    assert loaded.on("blocks", {"x": x, "out": out}, **{"x.data": x.ctypes.data + 1}) == "BAD_POINTER"


def test_extents_are_computed(loaded: Loaded) -> None:
    x, w = np.arange(30, dtype=np.float32).reshape(2, 5, 3), np.full(4, 2, np.float32)
    for call in (loaded.plain, loaded.on):
        arguments = {"x": x, "w": w, "out": np.zeros((2, 23), np.float32)}
        assert call("halves", arguments) == "OK"
        np.testing.assert_array_equal(arguments["out"][:, :5], x[..., 0] + 2 * x[..., 2])
        assert call("halves", arguments | {"w": w[:0]}) == "BAD_EXTENT"     # K // 0


def test_indices_are_checked(loaded: Loaded) -> None:
    x, w = np.arange(40, dtype=np.float32), np.zeros(40, np.float32)
    for n in (1, 3, 4, 9):
        at = np.arange(n) // 2 * 3 + np.arange(n) % 2 ^ 1
        length = at.max() + 1
        for call in (loaded.plain, loaded.on):
            out = np.zeros(n, np.float32)
            assert call("digits", {"x": x[:length], "w": w[:n], "out": out}) == "OK"
            np.testing.assert_array_equal(out, at)
            assert call("digits", {"x": x[:length - 1], "w": w[:n], "out": out}) == "BAD_EXTENT"
            assert call("digits", {"x": x[:length], "w": w[:n - 1], "out": out}) == "BAD_EXTENT"
            assert call("digits", {"x": x[:0], "w": w[:0], "out": out[:0]}) == "OK"


def test_scalars_in_indices_are_checked(loaded: Loaded) -> None:
    cache = np.zeros(9, np.float32)

    def call(count: int, position: int, back: bool) -> tuple[str, str]:
        given = {"x": np.arange(count, dtype=np.float32), "position": position, "back": back, "cache": cache}
        return loaded.plain("placed", given), loaded.on("placed", given)

    for arguments in ((3, 0, False), (3, 6, False), (9, 0, False), (0, -77, False), (7, 6, True), (7, 8, True),
                      (1, 0, True)):
        assert call(*arguments) == ("OK", "OK"), arguments
    assert cache.tolist() == [0, 4, 2, 4, 6, 1, 3, 5, 0]
    for arguments in ((3, -1, False), (3, 7, False), (10, 0, False), (1, 2**31 - 1, False), (1, -(2**31), False),
                      (2, 0, True), (1, 9, True), (2, 5, True), (6, 8, True)):     # x[5] of 2, x[6] of 6
        assert call(*arguments) == ("BAD_EXTENT", "BAD_EXTENT"), arguments


def test_offsets_of_32_bits_are_checked(loaded: Loaded) -> None:
    x, at, out = np.arange(8, dtype=np.uint8).reshape(4, 2), np.array([3, 0, 2], np.int32), np.zeros(3, np.uint8)
    arguments = {"x": x, "at": at, "out": out}
    assert loaded.plain("picked", arguments) == loaded.on("picked", arguments | {"x": x[::-1]}, 2) == "OK"
    assert out.tolist() == [1, 6, 2]
    assert loaded.plain("picked", arguments, M=3, N=2**30) == "BAD_EXTENT"
    for stride in (2**30, -(2**30), 2**40):
        assert loaded.on("picked", arguments, **{"x.stride": [stride, 1]}) == "BAD_EXTENT"


def test_scratch_memory_is_checked(loaded: Loaded) -> None:
    arguments = matrices(64, 512, 512)
    call, keep = loaded.fill("matmul", arguments)
    size_bytes = loaded.scratch_bytes("matmul", call)
    assert size_bytes > 0 and size_bytes % 64 == 0
    assert loaded.on("matmul", arguments, scratch_bytes=size_bytes) == "OK"
    assert loaded.on("matmul", arguments, scratch=0, scratch_bytes=size_bytes) == "BAD_SCRATCH"
    assert loaded.on("matmul", arguments, scratch=keep[0].ctypes.data + 8, scratch_bytes=1 << 40) == "BAD_SCRATCH"
    arguments["a"] = np.asfortranarray(arguments["a"])
    arguments["b"] = np.asfortranarray(arguments["b"])
    assert loaded.on("matmul", arguments, scratch_bytes=0) == "BAD_SCRATCH"
    call, _ = loaded.fill("matmul", arguments, **{"dim.M": -5})
    assert loaded.scratch_bytes("matmul", call) == -1
    call, _ = loaded.fill("scale", {"x": arguments["a"], "factor": 1.0, "out": arguments["a"]})
    assert loaded.scratch_bytes("scale", call) == 0


@pytest.mark.parametrize(("m", "n", "k"), [(3, 40, 1), (2, 1, 70), (0, 1, 1)])
def test_scratch_memory_may_be_computed_of_a_sum(loaded: Loaded, m: int, n: int, k: int) -> None:
    x = np.random.default_rng(n).standard_normal((m, n), np.float32)
    arguments = {"x": x, "own": np.ones(k, np.float32), "out": np.zeros((m, n + k), np.float32)}
    call, keep = loaded.fill("beside", arguments, 1)
    assert loaded.scratch_bytes("beside", call) >= 4 * (n + k)
    power = np.exp(np.concatenate([x, np.ones((m, k), np.float32)], 1))
    for run in (loaded.plain, loaded.on):
        arguments["out"][...] = 0
        assert run("beside", arguments) == "OK"
        np.testing.assert_allclose(arguments["out"], power / power.sum(1, keepdims=True), rtol=1e-5)
    assert keep


def test_a_kernel_that_is_larger_than_the_librarys_scratch_says_so(tmp_path: Path) -> None:
    kernel = c_kernel(source.matmul, TARGETS["v3"])
    library = Loaded(make_library([kernel], TARGETS["v3"], scratch_bytes=64), tmp_path)
    arguments = matrices(64, 256, 256)
    assert library.plain("matmul", arguments) == "BAD_SCRATCH"
    assert library.plain("matmul", arguments) == "BAD_SCRATCH"  # and the lock is free again
    assert library.on("matmul", arguments) == "OK"


def test_the_librarys_scratch_serves_one_thread_at_a_time(tmp_path: Path) -> None:
    """The lock's place is in .symtab; a thread that finds it taken gets BUSY."""
    library = build(source.matmul)
    loaded = Loaded(library, tmp_path)
    lock = lock_of(loaded, library)
    lock.value = 1
    assert loaded.plain("matmul", matrices(4, 4, 4)) == "BUSY"
    assert lock.value == 1
    lock.value = 0
    assert loaded.plain("matmul", matrices(4, 4, 4)) == "OK"
    assert lock.value == 0


def lock_of(loaded: Loaded, library: Library) -> ctypes.c_int32:
    """The lock, which lies at a known distance from the function that takes it (see object.py)."""
    parts, _, _ = library_parts(library.kernels, library.target.features, library.target)
    plain = next(p for p in parts if p.name == "matmul")
    offset, _, addend = next(r for r in plain.code.relocations if r[1] == "sapper.lock")
    base = ctypes.cast(loaded.library.matmul, ctypes.c_void_p).value
    assert base is not None
    field = base + offset
    return ctypes.c_int32.from_address(field - addend + ctypes.c_int32.from_address(field).value)


def test_the_first_form_that_suits_a_call_is_taken(tmp_path: Path) -> None:
    options = {"static": {"N": 64}, "classes": {"M": (1024, 16)}}
    library = build(source.scale, **options)
    assert [v.symbol for v in library.kernels[0].variants] == ["scale.special", "scale.contiguous", "scale.strided"]
    loaded = Loaded(library, tmp_path)
    strict = Loaded(build(source.scale, **options, fallback=False), tmp_path, "libstrict.so")
    for shape, order, status in (((32, 64), "C", "OK"), ((32, 65), "C", "BAD_EXTENT"), ((33, 64), "C", "BAD_EXTENT"),
                                 ((32, 64), "F", "BAD_STRIDE"), ((0, 64), "C", "OK")):
        x = np.asarray(np.random.default_rng(0).standard_normal(shape, np.float32), order=order)
        for which, expected in ((loaded, "OK"), (strict, status)):
            out = np.zeros_like(x)
            assert which.on("scale", {"x": x, "factor": 2.0, "out": out}) == expected
            np.testing.assert_array_equal(out, 2 * x if expected == "OK" else 0)
    one = np.ones((1, 64), np.float32)[:, ::1]
    odd = np.lib.stride_tricks.as_strided(one, (1, 64), (12, 4))  # the stride of an extent of 1 does not matter
    assert Loaded(build(source.scale, static={"M": 1, "N": 64}, fallback=False), tmp_path, "libone.so").on(
        "scale", {"x": odd, "factor": 2.0, "out": np.zeros_like(one)}) == "OK"


def test_a_processor_without_the_features_is_refused(tmp_path: Path) -> None:
    """avx512_fp16 stands for any feature that this processor lacks."""
    lacking = next((f for f in FEATURE_BITS if f not in host().features), None)
    if lacking is None:
        pytest.skip("this processor has every feature")
    library = build(source.scale)
    parts, functions, areas = library_parts(library.kernels, [*library.target.features, lacking], library.target)
    loaded = Loaded(Library(library.kernels, parts, functions, areas, library.target), tmp_path)
    x = np.ones((2, 2), np.float32)
    for _ in range(2):
        assert loaded.plain("scale", {"x": x, "factor": 2.0, "out": x.copy()}) == "BAD_CPU"
        assert loaded.on("scale", {"x": x, "factor": 2.0, "out": x.copy()}) == "BAD_CPU"


TILES = ["amx_tile", "amx_bf16"]
ASKS = """
import ctypes, sys
import numpy as np
library, system = ctypes.CDLL(sys.argv[1]), ctypes.CDLL(None)
def granted():
    mask = ctypes.c_uint64()
    system.syscall(158, 0x1022, ctypes.byref(mask))  # arch_prctl(ARCH_GET_XCOMP_PERM)
    return mask.value >> 18 & 1
x = np.ones((2, 2), np.float32)
before, address = granted(), ctypes.c_void_p(x.ctypes.data)
status = library.scale(address, ctypes.c_float(2.0), address, ctypes.c_int64(2), ctypes.c_int64(2))
print(before, status, granted())
"""


@pytest.mark.skipif(not set(TILES) <= host().features, reason="no tile registers, or the system grants none")
def test_a_library_with_tiles_asks_the_system_for_them(tmp_path: Path) -> None:
    library = build(source.scale)
    for features, asks in ((TILES, 1), ([], 0)):
        parts, functions, areas = library_parts(library.kernels, [*library.target.features, *features], library.target)
        path = tmp_path / f"libasks{asks}.so"
        path.write_bytes(Library(library.kernels, parts, functions, areas, library.target).so(path.name))
        done = subprocess.run([sys.executable, "-c", ASKS, str(path)], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["0", "0", str(asks)]


def test_only_code_with_tiles_needs_them() -> None:
    features = frozenset({"avx2", *TILES, "amx_int8"})
    bare = MachineFunction("f", [Instruction(ROWS["ret"], [])], {})
    tiled = MachineFunction("g", [Instruction(ROWS["tdpbf16ps"], [Register("tile", n) for n in range(3)])], {})
    assert needed_features(features, [bare]) == {"avx2"}
    assert needed_features(features, [bare, tiled]) == {"avx2", *TILES}
    spelled = build(source.scale, machine="sapphirerapids").h("scale")
    assert "avx512_bf16" in spelled and "amx" not in spelled


@settings(max_examples=examples(25), deadline=None, suppress_health_check=list(HealthCheck))
@given(case=kernels(), seed=st.integers(0, 1000), machine=st.sampled_from(MACHINES), workers=st.integers(1, 2),
       special=st.booleans(), plain=st.booleans())
def test_random_kernels(tmp_path_factory, case, seed, machine, workers, special, plain) -> None:
    """Called through C a kernel does what its tile IR means, in whatever form the call finds."""
    kernel, original = built(case)
    arguments = case.make_arguments(seed, strided=not plain)
    expectations = expect(original, arguments)
    static = dict(list(case.sizes(seed).items())[:1]) if special else {}
    loaded = Loaded(build(kernel, machine=machine, static=static), tmp_path_factory.mktemp("random"))

    def run() -> tuple[str, dict[str, np.ndarray]]:
        status = loaded.plain(kernel.name, arguments) if plain else loaded.on(kernel.name, arguments, workers)
        return status, {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}

    status, outputs = in_child(run)
    assert status == "OK", case
    assert_expected(outputs, expectations, repr(case))


# ---- for C


C_PROGRAM = """
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "HEADER"

static matmul_call call;
static void *work(void *worker) { return (void *)(long)matmul_on(&call, (long)worker, 2); }

int main(void) {
    enum { M = 37, N = 65, K = 29 };
    static float a[M * K], b[K * N], c[M * N], d[N][M];
    for (int i = 0; i < M * K; i++) a[i] = (float)(i % 7) - 3;
    for (int i = 0; i < K * N; i++) b[i] = (float)(i % 5) - 2;
    if (matmul(a, b, c, M, K, N) != SAPPER_OK) return 1;
    /* the same into a transposed matrix, by two threads with memory of their own */
    call = (matmul_call){.a = a, .a_stride = {K, 1}, .b = b, .b_stride = {N, 1}, .c = &d[0][0], .c_stride = {1, M},
                         .M = M, .N = N, .K = K};
    int64_t each = matmul_scratch_bytes(&call);
    call.scratch_bytes = 2 * each;
    call.scratch = each ? aligned_alloc(64, 2 * each) : 0;
    call.sync = aligned_alloc(64, SAPPER_SYNC_BYTES);
    memset(call.sync, 0, SAPPER_SYNC_BYTES);
    pthread_t other;
    void *status;
    pthread_create(&other, 0, work, (void *)1);
    long mine = (long)work(0);
    pthread_join(other, &status);
    if (mine || status) return 2;
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            float sum = 0;
            for (int k = 0; k < K; k++) sum += a[m * K + k] * b[k * N + n];
            if (c[m * N + n] != sum || d[n][m] != sum) return 3;
        }
    float x[2] = {1, 2}, y[2];
    if (scale(x, 2.5f, y, 1, 2) != SAPPER_OK || y[1] != 5) return 4;
    if (scale(x, 2.5f, y, 1, -2) != SAPPER_BAD_EXTENT) return 5;
    printf("right\\n");
    return 0;
}
"""


@NEEDS_GCC
@pytest.mark.parametrize("form", ["so", "o", "s"])
def test_a_c_program_uses_it(tmp_path: Path, form: str) -> None:
    library = build(source.scale, source.matmul, source.many, source.twice)
    (tmp_path / "k.h").write_text(library.h("k"), encoding="utf-8")
    (tmp_path / "main.c").write_text(C_PROGRAM.replace("HEADER", "k.h"), encoding="utf-8")
    path = tmp_path / f"libk.{form}"
    path.write_bytes(library.s().encode() if form == "s" else library.o() if form == "o" else library.so("libk.so"))
    run(["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "main.c", f"libk.{form}", "-o", "main", "-pthread",
         "-Wl,-rpath,$ORIGIN", "-Wl,--fatal-warnings"], tmp_path)
    assert run(["./main"], tmp_path) == "right\n"


@NEEDS_GCC
def test_the_header_is_c99_and_cpp(tmp_path: Path) -> None:
    library = build(*ALL)
    (tmp_path / "k.h").write_text(library.h("k"), encoding="utf-8")
    for name in ("a.c", "a.cpp"):
        (tmp_path / name).write_text('#include "k.h"\n#include "k.h"\nint main(void) { return SAPPER_OK; }\n')
    run(["gcc", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-c", "a.c"], tmp_path)
    if shutil.which("g++"):
        run(["g++", "-std=c++98", "-Wall", "-Wextra", "-Werror", "-c", "a.cpp"], tmp_path)
        run(["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-c", "a.cpp"], tmp_path)
    text = library.h("k")
    assert "float register_)" in text or "float register_," in text
    assert "out = factor * x." in text and "SAPPER_RESTRICT out" in text


def run(command: list[str], directory: Path) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@NEEDS_BINUTILS
def test_binutils_read_the_library(tmp_path: Path) -> None:
    library = build(source.scale, source.matmul)
    (tmp_path / "libk.so").write_bytes(library.so("libk.so"))
    (tmp_path / "k.o").write_bytes(library.o())
    assert library.so("libk.so") == build(source.scale, source.matmul).so("libk.so")
    for file in ("libk.so", "k.o"):
        done = subprocess.run(["readelf", "-W", "-a", "--debug-dump=info,abbrev,decodedline", file], cwd=tmp_path,
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and not done.stderr and "arning" not in done.stdout, done.stderr
        lines = Path(source.__file__).read_text(encoding="utf-8").splitlines()
        at = next(i for i, line in enumerate(lines, 1) if "acc += a[m, k] @ b[k, n]" in line)
        assert any(re.match(rf"\S*library_kernels\.py +{at} +0x", line) for line in done.stdout.splitlines())
    exported = run(["nm", "-D", "--defined-only", "libk.so"], tmp_path)
    assert [line.split()[1:] for line in exported.splitlines()] == [
        ["T", f"{kernel}{end}"] for kernel in ("matmul", "scale") for end in ("", "_on", "_scratch_bytes")]
    assert "There are no relocations" in run(["readelf", "-r", "libk.so"], tmp_path)
    segments = run(["readelf", "-lW", "libk.so"], tmp_path)
    assert "RWE" not in segments and "GNU_STACK" in segments
    assert "libk.so" in run(["readelf", "-d", "libk.so"], tmp_path)


@NEEDS_GCC
def test_the_assembly_has_the_bytes_of_the_object(tmp_path: Path) -> None:
    library = build(source.scale, source.matmul)
    (tmp_path / "k.o").write_bytes(library.o())
    (tmp_path / "k.s").write_text(library.s(), encoding="utf-8")
    run(["as", "k.s", "-o", "as.o"], tmp_path)
    text = []
    for name in ("k.o", "as.o"):
        run(["objcopy", "-O", "binary", "-j", ".text", name, f"{name}.bin"], tmp_path)
        text.append((tmp_path / f"{name}.bin").read_bytes())
    assert text[0] == text[1]
    shown = run(["objdump", "-dl", "-M", "intel", "as.o"], tmp_path)
    assert "library_kernels.py:" in shown


@NEEDS_BINUTILS
def test_it_asks_for_no_other_library(tmp_path: Path) -> None:
    (tmp_path / "libk.so").write_bytes(build(source.scale).so("libk.so"))
    assert "NEEDED" not in run(["readelf", "-d", "libk.so"], tmp_path)
    symbols = run(["readelf", "-W", "--dyn-syms", "libk.so"], tmp_path).splitlines()
    assert [line for line in symbols if " UND " in line and not line.strip().startswith("0:")] == []


def test_names_that_do_not_do_are_refused() -> None:
    with pytest.raises(BuildError, match="found a name that C can't spell"):
        c_kernel(sapper.kernel(name="double")(source.twice.python_function), TARGETS["v3"])
    scale = c_kernel(source.scale, TARGETS["v3"])
    with pytest.raises(BuildError, match="found the name scale twice"):
        make_library([scale, scale], TARGETS["v3"])
    with pytest.raises(BuildError, match="bytes of scratch memory"):
        make_library([scale], TARGETS["v3"], 1 << 31)
    with pytest.raises(BuildError, match="CPUID"):
        library_parts([scale], ["mmx"], TARGETS["v3"])
