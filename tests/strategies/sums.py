"""Random kernels that add to elements which they may meet again, or join them with values by another op."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from sapper.ir.types import DTYPES
from sapper.tile.semantics import numpy_dtype

FLOATS, INTEGERS = ("f32", "f64", "bf16", "f16"), ("i32", "i64", "i16", "i8", "u8")
ALONG_M = ("t[m]", "m // 3", "m % 4", "t[m] + 1", "t[m] // 2", "u[m]")
ALONG_N = ("n + 0", "n // 2", "n % 3", "r[n] + 2", "2 * n")
ALONG_BOTH = ("m + n", "t[m] + n", "p[m, n]", "p[m, n] // 2", "2 * m + n")
LOOPS = (["for m, n in tiles(M, N):"], ["for m in tiles(M):", "    for n in tiles(N):"],
         ["for m in each(M):", "    for n in tiles(N):"], ["for n, m in tiles(N, M):"],
         ["for n in each(N):", "    for m in tiles(M):"])


@st.composite
def sums(draw: st.DrawFn, dtypes: tuple[str, ...] = FLOATS + INTEGERS) -> tuple[str, str]:
    """The source of a kernel, and the dtype that it adds up."""
    dtype = draw(st.sampled_from(dtypes))
    values = ["x[m, n]", "x[m, n] * x[m, 0]", "y[m]", "-y[m]"]
    values += ["exp(x[m, n])", "2.0"] if dtype in FLOATS else ["1", "3"]
    operators = ["+", "-", "maximum"] if dtype in FLOATS else ["+", "-", "+", "&", "|", "^", "maximum", "minimum"]
    operator = draw(st.sampled_from(operators))
    loop = draw(st.sampled_from(LOOPS))
    indent = "    " * (len(loop) + 1)
    lines = [f"    {line}" for line in loop]
    if draw(st.booleans()):
        lines.append(f"{indent}z[m, n] = x[m, n] + x[m, n]")
    for _ in range(draw(st.integers(1, 2))):
        row, column = draw(st.one_of(
            st.tuples(st.sampled_from(ALONG_M), st.sampled_from(ALONG_N)),
            st.tuples(st.sampled_from(ALONG_BOTH), st.sampled_from((*ALONG_N, "3", "p[m, n]")))))
        index = f"{row}, {column}" if draw(st.booleans()) else f"{column}, {row}"
        value = draw(st.sampled_from(values))
        update = f"{operator}(out[{index}], {value})" if operator.isalpha() else f"out[{index}] {operator} {value}"
        if operator.isalpha() and draw(st.booleans()):
            update = f"{operator}({value}, out[{index}])"
        whole = operator.isalpha() or draw(st.booleans())
        lines.append(f"{indent}out[{index}] = {update}" if whole else f"{indent}out[{index}] {operator}= {value}")
    head = ("V, W = dims('V W')\n@kernel\n"
            f"def k(x: Tensor[{dtype}, M, N], y: Tensor[{dtype}, M], t: Tensor[i32, M], r: Tensor[i32, N],\n"
            f"      u: Tensor[i64, M], p: Tensor[u8, M, N], z: Tensor[{dtype}, M, N], out: Tensor[{dtype}, V, W]):\n")
    return head + "\n".join(lines) + "\n", dtype


def arguments_of_sums(dtype: str, rows: int, columns: int, spread: int, seed: int) -> dict[str, Any]:
    """spread: how many different places there are about."""
    random = np.random.default_rng(seed)
    kind = numpy_dtype(DTYPES[dtype])
    size = 2 * rows + 2 * columns + 3 + spread

    def numbers(*shape: int) -> np.ndarray:
        if dtype in FLOATS:
            return random.standard_normal(shape).astype(kind)
        return random.integers(0 if dtype == "u8" else -100, 100, shape).astype(kind)

    def places(dtype: str, *shape: int) -> np.ndarray:
        return random.integers(0, spread, shape).astype(dtype)

    return {"x": numbers(rows, columns), "y": numbers(rows), "t": places("i4", rows), "r": places("i4", columns),
            "u": places("i8", rows), "p": places("u1", rows, columns), "z": numbers(rows, columns),
            "out": numbers(size, size)}
