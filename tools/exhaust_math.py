"""Runs a function of f32 as machine code of this CPU on every one of the 2**32 floats, and prints the greatest error.

    python tools/exhaust_math.py exp [--target v3] [--processes 2] [--every 1]

The kernel is compiled as any other is (for the CPU at hand, or the named target, which it must have). Its results are
compared with NumPy's in f64, whose own error is below 2**-28 of the units that are counted here: units in the last
place of the f32 that is nearest to the exact result. Special values count too: where one of both is infinite or NaN
and the other is not, the error is infinite. It takes some three minutes of one core.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, f32, tiles

N = sp.dims("N")
CHUNK = 1 << 20
Array = np.ndarray[Any, np.dtype[Any]]

MEANINGS: dict[str, Callable[[Array], Array]] = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "rsqrt": lambda x: 1 / np.sqrt(x),
}


def kernel_of(name: str) -> Any:
    function = getattr(sp, name)

    @sp.kernel(name=f"all_{name}")
    def run(x: Tensor[f32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = function(x[n])

    return run


def worst_of(name: str, target: str | None, every: int, part: int, parts: int) -> tuple[float, float, int]:
    """(greatest error in ulp, where, how many floats) of one of `parts` shares of all floats, each `every`-th."""
    kernel, meaning = kernel_of(name), MEANINGS[name]
    worst, place, count = -1.0, 0.0, 0
    y = np.empty(CHUNK, np.float32)
    for start in range(part * CHUNK, 1 << 32, parts * CHUNK * every):
        x = np.arange(start, min(start + CHUNK * every, 1 << 32), every, dtype=np.uint64).astype(np.uint32)
        x = x.view(np.float32)
        found = y[:len(x)]
        kernel(x, found, threads=1, **({} if target is None else {"target": target}))
        with np.errstate(all="ignore"):
            exact = meaning(x.astype(np.float64))
            nearest = exact.astype(np.float32)
            errors = np.abs(found - exact) / np.spacing(np.abs(nearest)).astype(np.float64)
            same = (found == nearest) | (np.isnan(found) & np.isnan(nearest))
            errors[same & ~np.isfinite(errors)] = 0
            errors[~np.isfinite(errors)] = np.inf
            errors[np.isinf(found) != np.isinf(nearest)] = np.inf
        at = int(np.argmax(errors))
        count += len(x)
        if errors[at] > worst:
            worst, place = float(errors[at]), float(x[at])
    return worst, place, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=MEANINGS)
    parser.add_argument("--target", help="a target whose features this CPU has; its own otherwise")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="take each so-many-th float only")
    options = parser.parse_args()
    parts = options.processes
    with multiprocessing.get_context("spawn").Pool(parts) as pool:
        found = pool.starmap(worst_of, [(options.name, options.target, options.every, n, parts) for n in range(parts)])
    worst, place, _ = max(found)
    print(f"{options.name}: {worst:.4f} ulp at most, at {place!r} ({float(place).hex()}), "
          f"of {sum(count for _, _, count in found)} floats")


if __name__ == "__main__":
    main()
