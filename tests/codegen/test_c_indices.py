"""Machine code that looks through indices says what sapper.ir.indices says, for random ways to compute them."""

from __future__ import annotations

import ctypes

from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.codegen.c_indices import check_index
from sapper.codegen.encode import encode
from sapper.codegen.listing import Listing, at
from sapper.codegen.machine import Immediate, MachineFunction
from sapper.ir.indices import Row, outside
from sapper.runtime.loader import load
from sapper.targets.x86_64.registers import RAX, RDI
from tests.strategies import examples
from tests.strategies.indices import SIZES, rows, rows_of_sums

PLACES = [("dim", "A"), ("dim", "B"), ("scalar", "p"), ("scalar", "f")]


def checked(row: Row, sizes: dict[tuple[str, str], int]) -> bool:
    """Whether the code finds a value outside."""
    emit = Listing()

    def read(emit: Listing, kind: str, name: str) -> None:
        emit("mov.64", RAX, at(RDI, 8 * PLACES.index((kind, name))))

    check_index(emit, row, read, "refuse")
    emit("mov.32", RAX, Immediate(0))
    emit("ret")
    emit.label("refuse")
    emit("mov.32", RAX, Immediate(1))
    emit("ret")
    code = load(bytes(encode(MachineFunction("check", emit.body, {})).code))
    words = (ctypes.c_int64 * len(PLACES))(*(sizes[place] for place in PLACES))
    return bool(ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(code.address)(ctypes.addressof(words)))


@settings(max_examples=examples(150))
@given(st.one_of(rows(), rows_of_sums()), SIZES)
def test_code_and_python_find_the_same(row: Row, sizes: dict[tuple[str, str], int]) -> None:
    assert checked(row, sizes) == (outside(row, sizes) is not None)


def test_the_ends_of_integers_are_no_way_around() -> None:
    """p + k wraps: the largest is then below the extent."""
    nodes = [["number", 0], ["dim", "A"], ["counter", 0], ["scalar", "p"], ["add", 3, 2], ["dim", "B"]]
    row = Row("x", "indexed", 0, "x[p + k]", nodes, [[0, 1, 1]], [], 4, 4, 5)
    sizes = {("dim", "A"): 4, ("dim", "B"): 9, ("scalar", "p"): 2**63 - 2, ("scalar", "f"): 0}
    assert checked(row, sizes) and outside(row, sizes) is not None
    sizes["scalar", "p"] = 5
    assert not checked(row, sizes) and outside(row, sizes) is None
