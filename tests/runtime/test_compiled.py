"""A compiled kernel on disk comes back equal, and anything else is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.runtime.compiled import CompiledKernel
from tests.strategies import examples

KERNEL = CompiledKernel(
    "f",
    b"\x00\n\xff",
    ("a.data", "dim.M"),
    scratch_bytes=64,
    counters=2,
    stored=("a",),
    tasks=(((1, ("M",), 14), (3, (), 2)), ((1, ("N", "N"), 1),)),
    work=((2.5, ("M", "N")), (1.0, ())),
)


def test_pack_and_unpack() -> None:
    assert CompiledKernel.unpack(KERNEL.pack()) == KERNEL


@settings(max_examples=examples(200))
@given(st.binary(max_size=60) | st.integers(0, len(KERNEL.pack())).map(lambda n: KERNEL.pack()[:n]))
def test_unpacking_garbage_is_refused_or_gives_a_kernel(packed: bytes) -> None:
    try:
        assert isinstance(CompiledKernel.unpack(packed), CompiledKernel)
    except ValueError as error:
        assert str(error)


def test_from_what_the_compiler_gives() -> None:
    made = CompiledKernel.of("g", SimpleNamespace(bytes=b"\xc3", slots=["a.data"], scratch_bytes=8), ("a",))
    assert made == CompiledKernel("g", b"\xc3", ("a.data",), 8, counters=None, stored=("a",))
    assert CompiledKernel.unpack(made.pack()) == made
    full = SimpleNamespace(code=b"\xc3", slots=[], scratch_bytes=0, counters=1, stored=["b"])
    full.tasks, full.work = [[[1, ["M"], 4]]], [[2.0, ["M"]]]
    made = CompiledKernel.of("g", full, ("a",))
    assert made.stored == ("b",) and made.counters == 1
    assert made.task_count({"M": 9}) == 3 and made.work_ns({"M": 9}) == 18.0


def test_tasks_and_work() -> None:
    assert KERNEL.task_count({"M": 15, "N": 1}) == 4
    assert KERNEL.task_count({"M": 0, "N": 7}) == 49
    assert KERNEL.work_ns({"M": 2, "N": 3}) == 16.0
    unknown = CompiledKernel("f", b"", ())
    assert unknown.task_count({}) is None and unknown.work_ns({}) is None


@pytest.mark.parametrize("head", [b"{}", b"[]", b'{"name": 3}', b"3"])
def test_header_without_facts(head: bytes) -> None:
    with pytest.raises(ValueError, match="packed kernel"):
        CompiledKernel.unpack(head + b"\ncode")
