"""sapper's dtypes and NumPy's, both ways. ml_dtypes is imported only when one of its types is asked for."""

from __future__ import annotations

import functools
from typing import Any, Union, cast

import numpy

from ..ir.types import DTYPES, DType

AnyDType = Union[DType, str, type, "numpy.dtype[Any]"]

NUMPY_NAMES: dict[str, str] = {
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "f8e4m3": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
    "i64": "int64",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "i4": "int4",
    "u8": "uint8",
    "bool": "bool",
}
"""sapper's name -> NumPy's name. An int4 of ml_dtypes takes a byte; pairs in one byte are passed as u8."""

SAPPER_NAMES: dict[str, str] = {theirs: ours for ours, theirs in NUMPY_NAMES.items()}

_ML_DTYPES = frozenset({"bf16", "f8e4m3", "f8e5m2", "i4"})
_found: dict[str, numpy.dtype[Any]] = {}


def numpy_dtype(dtype: AnyDType) -> numpy.dtype[Any]:
    """The NumPy dtype of a sapper dtype or its name; anything else is given to numpy.dtype."""
    name = dtype.name if isinstance(dtype, DType) else dtype
    if not isinstance(name, str) or name not in DTYPES:
        given: numpy.dtype[Any] = numpy.dtype(cast(Any, dtype))
        return given
    found = _found.get(name)
    if found is None:
        theirs = NUMPY_NAMES.get(name)
        if theirs is None:
            raise TypeError(f"found dtype {name}; expected one with a NumPy type; mend: hold it as i32 or i64")
        if name in _ML_DTYPES:
            import ml_dtypes

            found = numpy.dtype(getattr(ml_dtypes, theirs))
        else:
            found = numpy.dtype(theirs)
        _found[name] = found
    return found


@functools.cache
def sapper_name(dtype: numpy.dtype[Any]) -> str | None:
    """The name of the sapper dtype with the same elements; None if there is none, or in foreign byte order."""
    if not dtype.isnative:
        return None
    return SAPPER_NAMES.get(dtype.name)
