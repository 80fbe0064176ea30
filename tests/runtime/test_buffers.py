"""Arrays on huge pages, and dtypes both ways."""

from __future__ import annotations

import gc
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from sapper.ir.types import DTYPES, bf16, f32
from sapper.runtime import system
from sapper.runtime.buffers import HUGE_THRESHOLD_BYTES, Arena, Mapping, empty
from sapper.runtime.dtypes import NUMPY_NAMES, numpy_dtype, sapper_name
from sapper.runtime.errors import LaunchError
from sapper.runtime.scratch import COUNTER_BYTES, areas, stride_bytes, take_area


@pytest.mark.parametrize("name", NUMPY_NAMES)
def test_every_dtype_goes_to_numpy_and_back(name: str) -> None:
    assert sapper_name(numpy_dtype(name)) == name
    assert numpy_dtype(DTYPES[name]).itemsize == DTYPES[name].size_bytes


def test_dtypes_without_a_counterpart() -> None:
    assert sapper_name(np.dtype("complex64")) is None
    assert sapper_name(np.dtype(">f4")) is None
    assert numpy_dtype("bf16") == np.dtype(ml_dtypes.bfloat16)
    assert numpy_dtype(np.float32) == np.float32
    with pytest.raises(TypeError, match="i32 or i64"):
        numpy_dtype("index")


@pytest.mark.parametrize("shape", [(), 0, 5, (3, 0), (7, 9), (1024, 1025)])
@pytest.mark.parametrize("dtype", [f32, "bf16", np.int8])
def test_empty(shape: int | tuple[int, ...], dtype: object) -> None:
    array = empty(shape, dtype)  # type: ignore[arg-type]
    assert array.shape == ((shape,) if isinstance(shape, int) else shape)
    assert array.flags.c_contiguous and array.flags.writeable
    if array.size:
        assert array.ctypes.data % (2 << 20 if array.nbytes >= HUGE_THRESHOLD_BYTES else 64) == 0
    array[...] = 1
    assert (array == 1).all()


def test_memory_lives_as_long_as_a_view_of_it() -> None:
    part = empty((4096, 512), bf16)[5:9]
    gc.collect()
    part[...] = 3
    assert float(part.astype(np.float32).sum()) == 3 * 4 * 512


def test_mapping_is_given_back() -> None:
    def mapped() -> int:
        with open("/proc/self/statm") as numbers:
            return int(numbers.read().split()[0])

    gc.collect()
    before = mapped()
    for _ in range(50):
        Mapping(64 << 20)
    assert mapped() - before < 2 * (64 << 20) // 4096


def test_errors() -> None:
    with pytest.raises(ValueError, match="0 or more"):
        empty((3, -1))
    for shape in ((2.5, 3), "ab"):
        with pytest.raises(ValueError, match="expected integers"):
            empty(shape, "f32")  # type: ignore[arg-type]
    assert empty(np.int64(3), "f32").shape == (3,)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="found dtype 'f33'; expected a dtype of sapper"):
        empty(3, "f33")
    with pytest.raises(LaunchError, match="mmap"):
        empty(1 << 50, "f64")


def test_areas_are_large_enough_and_used_again() -> None:
    areas.clear()
    area = take_area(100)
    assert area.scratch % 4096 == 0 and area.sync % 64 == 0 and len(area.counters) == COUNTER_BYTES
    assert bytes(area.counters) == bytes(COUNTER_BYTES)
    areas.append(area)
    assert take_area(1 << 20) is area
    areas.append(area)
    larger = take_area(100 << 20)
    assert larger is not area and larger.capacity_bytes >= 100 << 20
    assert not areas
    assert [stride_bytes(n) for n in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]


def test_an_arena_puts_arrays_one_after_another() -> None:
    arena = Arena(1 << 20)
    first, second = arena.empty((3, 5), bf16), arena.empty(7)
    assert first.ctypes.data % (2 << 20) == 0
    assert second.ctypes.data == first.ctypes.data + 64
    assert first.shape == (3, 5) and second.dtype == np.float32
    first[...], second[...] = 1, 2
    assert (first == 1).all() and (second == 2).all()
    large = arena.empty((1 << 20) + 1, np.int8)  # more than what is left, and than a block
    large[...] = 3
    assert (second == 2).all() and arena.empty(0).shape == (0,)
    with pytest.raises(ValueError, match="0 or more"):
        arena.empty(-1)


def test_an_arena_begins_again() -> None:
    arena = Arena(1 << 20)
    assert not arena.reached.size
    first, second = arena.empty(16, np.int8), arena.empty(100, np.int8)
    arena.again()
    third = arena.empty(40, np.int8)
    assert third.ctypes.data == first.ctypes.data == arena.reached.ctypes.data
    assert arena.reached.size == 64 + 100  # what lies behind a smaller set was used all the same
    third[...] = 5
    assert (first == 5).all() and not second.any()
    large = arena.empty(2 << 20, np.int8)
    arena.again()
    assert arena.empty(8, np.int8).ctypes.data == large.ctypes.data and arena.reached.size == 2 << 20


def test_small_memory_may_lie_on_plain_pages() -> None:
    plain = Mapping(4096, huge=False)
    plain.bytes_view()[0] = 1
    assert not plain.huge and plain.address % (2 << 20) == 0
    assert resident_bytes(plain.address, 2 << 20) == 4096


def test_an_array_of_an_arena_outlives_it() -> None:
    part = Arena().empty((64, 64))[3:5]
    gc.collect()
    part[...] = 4
    assert part.sum() == 4 * 128


def resident_bytes(address: int, size_bytes: int) -> int:
    """Of a range of this process's memory: what has pages (proc(5), pagemap, bit 63)."""
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(address // 4096 * 8)
        entries = np.frombuffer(file.read(size_bytes // 4096 * 8), np.uint64)
    return 4096 * int((entries >> np.uint64(63)).sum())


def test_an_arena_that_is_told_how_much_fetches_it_and_gives_the_rest_back() -> None:
    arena = Arena(1 << 20)
    arena.expect(24 << 20)
    first = arena.empty(1 << 20, np.int8)
    assert first.ctypes.data % (2 << 20) == 0
    fetching = arena._fetching
    assert fetching is not None
    fetching._thread.join(60)
    if not system.populate(first.ctypes.data, 4096):
        pytest.skip("Linux before 5.14 fetches no memory")
    assert resident_bytes(first.ctypes.data, 24 << 20) == 24 << 20
    first[...] = 5
    arena.settle()
    assert resident_bytes(first.ctypes.data, 24 << 20) == 2 << 20 and (first == 5).all()
    second = arena.empty(22 << 20, np.int8)
    assert second.ctypes.data == first.ctypes.data + (1 << 20) and not second[-1]
    second[...] = 6
    assert (first == 5).all()


def test_an_arena_that_was_told_too_little_goes_on() -> None:
    arena = Arena(1 << 20)
    arena.expect(4 << 20)
    arrays = [arena.empty(3 << 20, np.int8) for _ in range(3)]
    for number, array in enumerate(arrays):
        array[...] = number
    assert arena._fetching is None
    arena.settle()
    assert [int(array.max()) for array in arrays] == [0, 1, 2]


def test_freed_memory_goes_back_to_the_system() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    pieces = [bytes(100_000) for _ in range(300)]  # each from the heap: the C library maps larger ones
    last = pieces.pop()  # keeps the end of the heap, so that freeing the others gives nothing back
    del pieces
    before = resident()
    system.trim_heap()
    assert resident() < before - 5000 and len(last) == 100_000


def test_mappings_outlive_the_modules_of_an_interpreter_that_ends() -> None:
    """A mapping in a cycle is freed when modules are gone."""
    code = ("from sapper.runtime import buffers\nmapping = buffers.Mapping(1 << 21)\n"
            "class Cycle: pass\ncycle = Cycle()\ncycle.own, cycle.mapping = cycle, mapping\n"
            "buffers.system = None\n")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not ended.stderr
