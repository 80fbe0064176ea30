"""Element types: there is one object of each, also after a copy and in another process."""

import copy
import pickle

import pytest

from sapper.ir.types import DTYPES, DType, TileType, b32


@pytest.mark.parametrize("dtype", [*DTYPES.values(), b32], ids=repr)
def test_there_is_one_object_of_each(dtype: DType) -> None:
    assert pickle.loads(pickle.dumps(dtype)) is dtype
    assert copy.deepcopy(dtype) is dtype
    assert pickle.loads(pickle.dumps(TileType(dtype, ("i",)))) == TileType(dtype, ("i",))
