"""Element types and row types: there is one object of each, also after a copy and in another process."""

import copy
import pickle

import pytest

from sapper.ir.types import DTYPES, DType, RowType, TileType, b32


@pytest.mark.parametrize("dtype", [*DTYPES.values(), b32], ids=repr)
def test_there_is_one_object_of_each(dtype: DType) -> None:
    assert pickle.loads(pickle.dumps(dtype)) is dtype
    assert copy.deepcopy(dtype) is dtype
    assert pickle.loads(pickle.dumps(TileType(dtype, ("i",)))) == TileType(dtype, ("i",))


@pytest.mark.parametrize("dtype", [*DTYPES.values(), b32], ids=repr)
def test_there_is_one_row_type_of_each(dtype: DType) -> None:
    row = RowType(dtype)
    assert row is RowType(dtype) and row.dtype is dtype
    assert pickle.loads(pickle.dumps(row)) is row
    assert copy.deepcopy(row) is row and copy.copy(row) is row
