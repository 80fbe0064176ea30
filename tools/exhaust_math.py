"""Runs a function of f32 as machine code of this CPU on every one of the 2**32 floats, and prints the greatest error.

    python tools/exhaust_math.py exp [--short] [--add 1] [--target v3] [--processes 2] [--every 1]

The kernel is compiled as any other is (for the CPU at hand, or the named target, which it must have). Its results are
compared with NumPy's in f64, whose own error is below 2**-28 of the units that are counted here: units in the last
place of the f32 that is nearest to the exact result. Special values count too: where one of both is infinite or NaN
and the other is not, the error is infinite. It takes some three minutes of one core.

With --short the result is rounded to bf16, for which short forms serve (docs/math.md): it must be what some number
within their error of the exact result rounds to. How many floats have another result than the nearest, and how many
a wrong one, is printed. With --add a number is added to each result, as to that of erf in GELU: where it is 1 or more,
it is the absolute error of erf that counts. Units are then at least those of this number.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

import sapper as sp
from sapper import Tensor, bf16, f32, tiles

N = sp.dims("N")
CHUNK = 1 << 20
Array = np.ndarray[Any, np.dtype[Any]]

_erf_of_each = np.vectorize(math.erf, otypes=[float])


def erf(x: Array) -> Array:
    """In f64; taken one by one where it is neither 2 / sqrt(pi) x nor 1."""
    size = np.abs(x)
    y = np.where(size < 1e-9, x * (2 / math.sqrt(math.pi)), np.sign(x))
    between = (size >= 1e-9) & (size < 6)
    y[between] = _erf_of_each(x[between]) if between.any() else 0
    return y


MEANINGS: dict[str, Callable[[Array], Array]] = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "rsqrt": lambda x: 1 / np.sqrt(x),
    "erf": erf,
}
SHORT = ("exp", "sigmoid")
SHORT_RELATIVE, SHORT_OF_EACH = 2.0**-18.4, 2.0**-23.7
"""What the short forms are held to: an error of the result times (relative + abs x times of each)."""


def kernel_of(name: str, short: bool, added: float = 0.0) -> Any:
    of_each, dtype = getattr(sp, name), bf16 if short else f32

    def function(x):
        return of_each(x) + added if added else of_each(x)

    @sp.kernel(name=f"all_{name}")
    def run(x: Tensor[f32, N], y: Tensor[dtype, N]):
        for n in tiles(N):
            y[n] = function(x[n]).to(dtype)

    return run


def strays(name: str, target: str | None, every: int, part: int, parts: int) -> tuple[int, int, float, int]:
    """(results that are not the nearest, wrong ones, the last wrong one's operand, how many floats) of a share."""
    kernel, meaning = kernel_of(name, True), MEANINGS[name]
    other, wrong, place, count = 0, 0, 0.0, 0
    y = np.empty(CHUNK, bfloat16)
    for x in chunks(every, part, parts):
        found = y[:len(x)]
        kernel(x, found, threads=1, **({} if target is None else {"target": target}))
        with np.errstate(all="ignore"):
            exact = meaning(x.astype(np.float64))
            error = np.abs(exact) * (SHORT_RELATIVE + np.where(np.isfinite(x), np.abs(x), 0.0) * SHORT_OF_EACH)
            # By way of f32, as f64 to bf16 rounds twice too; a denormal number's own unit is part of the error.
            error = np.where(np.isfinite(exact), error + 2.0**-149, 0.0)
            low, nearest, high = ((exact + by).astype(np.float32).astype(bfloat16).astype(np.float32)
                                  for by in (-error, 0.0, error))
            values = found.astype(np.float32)
            good = ((low <= values) & (values <= high)) | (np.isnan(values) & np.isnan(nearest))
        other += int(np.count_nonzero(good & (values != nearest) & ~np.isnan(nearest)))
        wrong += int(np.count_nonzero(~good))
        if not good.all():
            place = float(x[np.argmin(good)])
        count += len(x)
    return other, wrong, place, count


def chunks(every: int, part: int, parts: int) -> Iterator[Array]:
    """One of `parts` shares of all floats, each `every`-th."""
    for start in range(part * CHUNK, 1 << 32, parts * CHUNK * every):
        yield np.arange(start, min(start + CHUNK * every, 1 << 32), every, dtype=np.uint64).astype(np.uint32).view(
            np.float32)


def worst_of(name: str, target: str | None, every: int, part: int, parts: int,
             added: float = 0.0) -> tuple[float, float, int]:
    """(greatest error in ulp, where, how many floats) of one of `parts` shares of all floats, each `every`-th. added:
    to each result."""
    kernel, meaning = kernel_of(name, False, added), MEANINGS[name]
    worst, place, count = -1.0, 0.0, 0
    y = np.empty(CHUNK, np.float32)
    for x in chunks(every, part, parts):
        found = y[:len(x)]
        kernel(x, found, threads=1, **({} if target is None else {"target": target}))
        with np.errstate(all="ignore"):
            exact = meaning(x.astype(np.float64)) + added
            nearest = exact.astype(np.float32)
            errors = np.abs(found - exact) / np.spacing(np.maximum(np.abs(nearest), np.float32(abs(added)))).astype(
                np.float64)
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
    parser.add_argument("--short", action="store_true", help="results of which bf16 is wanted: exp and sigmoid")
    parser.add_argument("--add", type=float, default=0.0, help="a number to be added to each result")
    parser.add_argument("--target", help="a target whose features this CPU has; its own otherwise")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="take each so-many-th float only")
    options = parser.parse_args()
    if options.short and options.name not in SHORT:
        parser.error(f"--short: found {options.name}; expected one of {', '.join(SHORT)}")
    parts = options.processes
    measure = strays if options.short else functools.partial(worst_of, added=options.add)
    with multiprocessing.get_context("spawn").Pool(parts) as pool:
        found = pool.starmap(measure, [(options.name, options.target, options.every, n, parts) for n in range(parts)])
    if options.short:
        others, wrong, count = (sum(share[at] for share in found) for at in (0, 1, 3))
        where = next((f", one at {share[2]!r} ({share[2].hex()})" for share in found if share[1]), "")
        print(f"{options.name}: of {count} floats {others} give a neighbour of the nearest bf16, {wrong} a wrong one"
              f"{where}")
        return
    worst, place, _ = max(found)
    added = f" and {options.add:g}" if options.add else ""
    print(f"{options.name}{added}: {worst:.4f} ulp at most, at {place!r} ({float(place).hex()}), "
          f"of {sum(count for _, _, count in found)} floats")


if __name__ == "__main__":
    main()
