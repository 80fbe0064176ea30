"""Fits the polynomials of sapper/lane/math.py and prints sapper/lane/polynomials.py.

    python tools/fit_polynomials.py > sapper/lane/polynomials.py

Needs mpmath. Each fit is a weighted least-squares one at Chebyshev points. The coefficients are rounded to the target's
dtype one by one, from the lowest power up, and the rest is fitted again after each, so that the rest makes up for
the rounding of what came before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from mpmath import cos, erf, erfc, expm1, floor, linspace, log, log1p, lu_solve, matrix, mp, mpf, nint, pi, sin, sqrt

mp.prec = 250

Real = Callable[[mpf], mpf]


def least_squares(samples: list[tuple[mpf, mpf, mpf]], powers: list[int]) -> list[mpf]:
    """Coefficients c of sum(c[k] * x**powers[k]) with the least sum of (weight * (target - sum))**2.

    samples: (x, target, weight). At Chebyshev points this comes within a factor of two of the least maximum.
    """
    count = len(powers)
    gram, right = matrix(count, count), matrix(count, 1)
    for x, target, weight in samples:
        row = [weight * x**p for p in powers]
        value = weight * target
        for i in range(count):
            right[i] += row[i] * value
            for j in range(i, count):
                gram[i, j] += row[i] * row[j]
    for i in range(count):
        for j in range(i):
            gram[i, j] = gram[j, i]
    solved = lu_solve(gram, right)
    return [solved[k] for k in range(count)]


def fitted(dtype: type[np.floating], target: Real, weight: Real, low: mpf, high: mpf, powers: list[int],
           end: mpf | None = None) -> tuple[list[float], mpf]:
    """Rounded coefficients and the greatest weighted error. end: a value to be met at `high`."""
    rounded: list[float] = []
    centre, half = (low + high) / 2, (high - low) / 2
    points = [centre - half * cos(pi * (k + mpf("0.5")) / 160) for k in range(160)]
    samples = [(x, target(x), weight(x)) for x in points]
    if end is not None:
        samples.append((high, end, mpf(1000)))
    for position, power in enumerate(powers):
        value = float(dtype(float(least_squares(samples, powers[position:])[0])))
        rounded.append(value)
        samples = [(x, t - mpf(value) * x**power, w) for x, t, w in samples]

    def rest(x: mpf) -> mpf:
        return target(x) - sum(mpf(c) * x**p for c, p in zip(rounded, powers, strict=True))

    return rounded, max(abs(weight(x) * rest(x)) for x in linspace(low, high, 2001))


def fit(name: str, dtype: type[np.floating], target: Real, weight: Real, low: mpf, high: mpf, powers: list[int],
        comment: str) -> None:
    """Print one table."""
    rounded, error = fitted(dtype, target, weight, low, high, powers)
    print(f"# {comment}; error 2**{float(log(error, 2)):.1f}")
    print(f"{name} = (")
    for value in rounded:
        print(f"    {value!r},")
    print(")\n")
    print(name, float(log(error, 2)), file=sys.stderr)


def quotient(dtype: type[np.floating], samples: list[tuple[mpf, mpf, mpf]], degree: int,
             rounds: int = 10) -> tuple[list[float], list[float], mpf]:
    """Rounded coefficients of p and q, both of that degree, q(0) = 1, and the greatest error weight * (p / q - target).

    samples: (x, target, weight). Least squares of p - target * q over the q of the round before (Loeb, 1957), each
    point weighted by its error besides (Lawson, 1961), which brings the greatest ones down.
    """
    names = [name for k in range(degree + 1) for name in ([("q", k)] if k else []) + [("p", k)]]
    below, shares = [mpf(1)] * len(samples), [mpf(1)] * len(samples)
    rounded: dict[tuple[str, int], mpf] = {}

    def solved() -> dict[tuple[str, int], mpf]:
        """With what is rounded already."""
        free = [name for name in names if name not in rounded]
        gram, right = matrix(len(free), len(free)), matrix(len(free), 1)
        for (x, target, weight), share, under in zip(samples, shares, below, strict=True):
            scale = weight * sqrt(share) / under
            terms = {(side, k): scale * x**k * (1 if side == "p" else -target) for side, k in names}
            value = scale * target - sum(c * terms[name] for name, c in rounded.items())
            for i, name in enumerate(free):
                right[i] += terms[name] * value
                for j in range(len(free)):
                    gram[i, j] += terms[name] * terms[free[j]]
        found = lu_solve(gram, right)
        return {**rounded, **{name: found[i] for i, name in enumerate(free)}}

    def errors(c: dict[tuple[str, int], mpf]) -> tuple[list[mpf], list[mpf]]:
        """q and the weighted errors at the samples."""
        under = [1 + sum(c["q", k] * x**k for k in range(1, degree + 1)) for x, _, _ in samples]
        return under, [abs(w * (sum(c["p", k] * x**k for k in range(degree + 1)) / q - t))
                       for (x, t, w), q in zip(samples, under, strict=True)]

    best: tuple[mpf, list[mpf], list[mpf]] | None = None
    for _ in range(rounds):
        below, found = errors(solved())
        if best is None or max(found) < best[0]:
            best = max(found), shares, below
        mean = sum(s * error for s, error in zip(shares, found, strict=True)) / sum(shares)
        shares = [s * max(error / mean, mpf("0.02")) for s, error in zip(shares, found, strict=True)]
    assert best is not None
    _, shares, below = best
    for name in names:
        rounded[name] = mpf(float(dtype(float(solved()[name]))))
    p, q = ([float(rounded[side, k]) for k in range(first, degree + 1)] for side, first in (("p", 0), ("q", 1)))
    return p, [1.0, *q], max(errors(rounded)[1])


def fit_erf_quotient() -> None:
    """erf by one quotient, whose limit is such that the quotient is 1 there when it is computed in f32."""
    limit, count = mpf("3.87"), 70
    xs = [limit * (1 - cos(pi * (k + mpf("0.5")) / count)) / 2 for k in range(count)]
    above, below, error = quotient(np.float32, [(x**2, erf(x) / x, x) for x in xs], 5)
    print(f"# erf(x) = x * p(z) / q(z), z = x**2, |x| <= {float(limit)}; absolute; error 2**{float(log(error, 2)):.1f}")
    print(f"ERF_LIMIT_F32 = {float(limit)}")
    for name, values in (("ABOVE", above), ("BELOW", below)):
        print(f"ERF_{name}_F32 = (")
        for value in values:
            print(f"    {value!r},")
        print(")\n" if name == "BELOW" else ")")


def without_zero(ratio: Real, at_zero: mpf) -> Real:
    """A ratio with a removable singularity at 0."""
    return lambda x: at_zero if abs(x) < mpf(10) ** -25 else ratio(x)


def split(name: str, value: mpf, parts: int, bits: int, last_bits: int) -> None:
    """Print a constant as a sum of floats, all but the last of which have `bits` significant bits."""
    rest = value
    found = []
    for part in range(parts):
        width = bits if part < parts - 1 else last_bits
        unit = mpf(2) ** (int(floor(log(abs(rest), 2))) + 1 - width)
        piece = nint(rest / unit) * unit
        found.append(float(piece))
        rest -= piece
    print(f"{name} = ({', '.join(map(repr, found))})")


def print_tables(name: str, rows: list[list[float]], comment: str) -> None:
    print(f"# {comment}")
    print(f"{name} = (")
    for row in rows:
        print("    (")
        for start in range(0, len(row), 4):
            print(f"        {', '.join(map(repr, row[start : start + 4]))},")
        print("    ),")
    print(")\n")


def fit_tables() -> None:
    """Tables for `lookup`: powers of two, and erf by pieces."""
    powers = [float(np.float32(float(mpf(2) ** (mpf(j) / 16)))) for j in range(16)]
    print_tables("EXP2_TABLE_F32", [powers], "2**(j / 16)")
    width = log(2) / 32 * mpf("1.001")
    fit("EXPM1_TABLE_F32", np.float32, without_zero(lambda r: (expm1(r) - r) / r**2, mpf("0.5")), lambda r: r**2,
        -width, width, [0, 1], "expm1(r) = r + r**2 * q(r), |r| <= ln(2) / 32; relative to e**r")
    for name, degree, relative in (("ERF_TABLE_F32", 5, True), ("ERF_SHORT_TABLE_F32", 4, False)):
        pieces, worst = [], mpf(0)
        for j in range(16):
            centre, last = mpf(j) / 4, j == 15

            def piece(u: mpf, centre: mpf = centre) -> mpf:
                return erf(centre + u)

            def weight(u: mpf, piece: Real = piece, relative: bool = relative) -> mpf:
                return mpf(1) if not relative else 1 / piece(u) if piece(u) else mpf(0)

            rounded, error = fitted(np.float32, piece, weight, -mpf(1) / 8 if j else mpf(0), mpf(1) / 8,
                                    list(range(0 if j else 1, degree + 1)), mpf(1) if last else None)
            pieces.append(rounded if j else [0.0, *rounded])
            worst = max(worst, error)
        print_tables(name, [list(column) for column in zip(*pieces, strict=True)],
                     "erf(j / 4 + u) = sum of table[k][j] * u**k, |u| <= 1/8, 0 <= j < 16; "
                     f"{'relative' if relative else 'absolute'}; error 2**{float(log(worst, 2)):.1f}")


def main() -> None:
    print('"""Coefficients of sapper/lane/math.py, lowest power first: made by tools/fit_polynomials.py."""\n')
    for bits, width, short in (("F32", 24, 15), ("F64", 53, 41)):
        split(f"LN2_{bits}", log(2), 2, short, width)
        split(f"HALF_PI_{bits}", pi / 2, 3, width, width)
    split("LOG2E_F64", 1 / log(2), 2, 53, 53)
    print()
    fit_tables()
    half_ln2 = log(2) / 2 * mpf("1.0002")
    root_low, root_high = sqrt(mpf("0.5")) - 1 - mpf("1e-4"), sqrt(mpf(2)) - 1 + mpf("1e-4")
    quarter_pi = pi / 4 * mpf("1.0005")
    ln2 = log(2)
    one = mpf(1)
    for bits, dtype in (("F32", np.float32), ("F64", np.float64)):
        f32 = bits == "F32"
        degree = 4 if f32 else 10
        fit(f"EXPM1_{bits}", dtype, without_zero(lambda r: (expm1(r) - r) / r**2, one / 2),
            without_zero(lambda r: r**2 / expm1(r), mpf(0)), -half_ln2, half_ln2, list(range(degree + 1)),
            "expm1(r) = r + r**2 * q(r), |r| <= ln(2) / 2; relative")
        degree = 5 if f32 else 11
        fit(f"EXP2_{bits}", dtype, without_zero(lambda r: expm1(r * ln2) / r, ln2), lambda r: r / 2**r,
            -mpf("0.5001"), mpf("0.5001"), list(range(degree + 1)), "2**r = 1 + r * q(r), |r| <= 1/2; relative")
        if f32:
            fit("EXP2_SHORT_F32", dtype, lambda r: mpf(2)**r, lambda r: 1 / mpf(2)**r, mpf(0), one, list(range(5)),
                "2**r, 0 <= r <= 1; relative")
            fit("EXP2_NEAREST_F32", dtype, lambda r: mpf(2)**r, lambda r: 1 / mpf(2)**r, -mpf("0.5001"),
                mpf("0.5001"), list(range(5)), "2**r, |r| <= 1/2; relative")
            fit("LOG_F32", dtype, without_zero(lambda f: (log1p(f) - f) / f**2, -one / 2),
                without_zero(lambda f: f**2 / log1p(f), mpf(0)), root_low, root_high, list(range(9)),
                "log(1 + f) = f + f**2 * q(f), sqrt(1/2) - 1 <= f <= sqrt(2) - 1; relative")
            fit("LOG2_F32", dtype, without_zero(lambda f: log1p(f) / ln2 / f - 1, 1 / ln2 - 1),
                without_zero(lambda f: f * ln2 / log1p(f), ln2), root_low, root_high, list(range(10)),
                "log2(1 + f) = f + f * q(f), sqrt(1/2) - 1 <= f <= sqrt(2) - 1; relative")
        else:
            # with s = f / (2 + f): log(1 + f) = log((1 + s) / (1 - s))
            fit("LOG_F64", dtype,
                without_zero(lambda z: ((log1p(sqrt(z)) - log1p(-sqrt(z))) / sqrt(z) - 2) / z, mpf(2) / 3),
                lambda z: z / 2, mpf(0), mpf("0.02946"), list(range(7)),
                "log(1 + f) = 2 s + s z q(z), s = f / (2 + f), z = s**2; relative")
        degree = 3 if f32 else 5
        fit(f"SIN_{bits}", dtype, without_zero(lambda z: (sin(sqrt(z)) / sqrt(z) - 1) / z, -one / 6), lambda z: z,
            mpf(0), quarter_pi**2, list(range(degree + 1)), "sin(r) = r + r * z * q(z), z = r**2, |r| <= pi / 4")
        degree = 2 if f32 else 5
        fit(f"COS_{bits}", dtype, without_zero(lambda z: (cos(sqrt(z)) - 1 + z / 2) / z**2, one / 24), lambda z: z**2,
            mpf(0), quarter_pi**2, list(range(degree + 1)), "cos(r) = 1 - z / 2 + z**2 * q(z), z = r**2, |r| <= pi / 4")
        erf_split = mpf(1)
        degree = 7 if f32 else 15
        fit(f"ERF_SMALL_{bits}", dtype, without_zero(lambda z: erf(sqrt(z)) / sqrt(z) - 1, 2 / sqrt(pi) - 1),
            lambda z: one, mpf(0), erf_split**2, list(range(degree + 1)), "erf(x) = x + x * q(z), z = x**2, |x| <= 1")
        top = mpf(4) if f32 else mpf(6)
        centre, half = (top + erf_split) / 2, (top - erf_split) / 2
        degree = 7 if f32 else 18

        def tail(u: mpf, centre: mpf = centre, half: mpf = half) -> mpf:
            return erfc(centre + half * u)

        fit(f"ERF_LARGE_{bits}", dtype, lambda u, tail=tail: log(tail(u)), tail,
            -one, one, list(range(degree + 1)),
            f"log(erfc(t)), t = {float(centre)} + {float(half)} * u, 1 <= t <= {int(top)}; absolute, of erf")
        if f32:
            fit("ERF_LOG2_F32", dtype, without_zero(lambda t: log(erfc(t)) / ln2 / t, -2 / sqrt(pi) / ln2),
                lambda t: t * erfc(t) * ln2, mpf(0), top, list(range(8)),
                "log2(erfc(t)) = t * p(t), 0 <= t <= 4; absolute, of erf")
            fit("ERF_LOG2_POWER_F32", dtype, without_zero(lambda r: expm1(r * ln2) / r, ln2), lambda r: r / 2**r,
                -mpf("0.5001"), mpf("0.5001"), list(range(5)), "2**r = 1 + r * q(r), |r| <= 1/2; relative")
            fit("ERF_TAIL_F32", dtype, lambda t: log(erfc(t)) / ln2, lambda t: erfc(t) * ln2, erf_split * mpf("0.999"),
                top, list(range(6)), "log2(erfc(t)), 1 <= t <= 4; absolute, of erf")
            fit("ERF_TAIL_POWER_F32", dtype, lambda r: mpf(2)**r, lambda r: 1 / mpf(2)**r, -mpf("0.5001"),
                mpf("0.5001"), list(range(6)), "2**r, |r| <= 1/2; relative")
            fit_erf_quotient()


if __name__ == "__main__":
    main()
