"""The kernel that `sapper demo` shows."""
# The annotations of kernels are sapper's language: M is a dimension, f32 an element type.
# mypy: ignore-errors

import sapper as sp
from sapper import Tensor, f32, tiles, zeros

M, N, K = sp.dims("M N K")


@sp.kernel
def matmul(
    a: Tensor[f32, M, K],
    b: Tensor[f32, K, N],
    c: Tensor[f32, M, N],
):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[k, n]
        c[m, n] = acc
