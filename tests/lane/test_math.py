"""The expansions of mathematical ops: errors in ulp against wider arithmetic, special values, and what is left."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sapper.ir.nodes import Block, Builder, Function, Location, Value
from sapper.ir.types import ROW_F32, ROW_F64, S64
from sapper.ir.verifier import verify
from sapper.lane.arithmetic import pure_function
from sapper.lane.interpret import bind_arguments, run
from sapper.lane.math import EXPANDABLE, expand_math
from sapper.lane.ops import COARSE, LANE_OPS
from sapper.targets.x86_64.select import legal_ops
from sapper.targets.x86_64.target import target

ROUNDING = frozenset({"round", "floor", "ceil", "trunc"})
AVX2, AVX512 = ROUNDING, ROUNDING | {"scale_exponent", "lookup", "fraction", "copy_sign"}
APPROXIMATE = ROUNDING | {"exp2.f32", "reciprocal", "rsqrt.f32"}
"""Instructions that give f32 but for its last bits, as on NVIDIA."""
NOTHING: frozenset[str] = frozenset()


@pytest.mark.parametrize(("name", "legal"), [("v3", AVX2), ("v4", AVX512)])
def test_these_are_the_ops_that_targets_have(name: str, legal: frozenset[str]) -> None:
    assert legal_ops(target(name)) & (EXPANDABLE | AVX512) == legal


def expanded(name: str, dtype: type, legal: frozenset[str], lanes: int, operands: int = 1, slow_underflow: bool = False,
             **attributes: float) -> Function:
    row = ROW_F32 if dtype is np.float32 else ROW_F64
    function = Function("f", "lane")
    function.attributes = {"lanes": lanes, "slots": [f"x{n}.data" for n in range(operands)] + ["y.data"]}
    build = Builder(function.body, Location("k.py", 5, 1))
    words = [build.value("arg", [], S64, slot=3 + n) for n in range(operands + 1)]
    values = [build.value("load", [w], row, dtype=row.dtype) for w in words[:-1]]
    build.add("store", [build.value(name, values, row, **attributes), words[-1]], dtype=row.dtype)
    assert expand_math(function, legal, slow_underflow) == (name not in legal)
    verify(function, LANE_OPS)
    left = EXPANDABLE - {known.partition(".")[0] for known in legal}
    assert not any(op.name in left for op in function.walk())
    return function


def evaluate(name: str, legal: frozenset[str], *inputs: np.ndarray, slow_underflow: bool = False,
             **attributes: float) -> np.ndarray:
    lanes = 1 << (len(inputs[0]) - 1).bit_length()
    padded = [np.concatenate([x, np.ones(lanes - len(x), x.dtype)]) for x in inputs]
    function = expanded(name, inputs[0].dtype.type, legal, lanes, len(inputs), slow_underflow, **attributes)
    y = np.zeros(lanes, inputs[0].dtype)
    run(function, *bind_arguments(function, {**{f"x{n}": x for n, x in enumerate(padded)}, "y": y}))
    return y[: len(inputs[0])]


def _sigmoid(x: Any) -> Any:
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


_erf = np.vectorize(math.erf, otypes=[float])

# name -> (meaning in wider arithmetic, greatest error in ulp for f32 and f64, as docs/math.md says)
FUNCTIONS: dict[str, tuple[Callable[[Any], Any], float, float]] = {
    "exp": (np.exp, 1.0, 1.0),
    "exp2": (np.exp2, 1.0, 1.0),
    "log": (np.log, 1.0, 1.0),
    "log2": (np.log2, 1.0, 2.0),
    "tanh": (np.tanh, 2.5, 3.0),
    "sigmoid": (_sigmoid, 3.0, 3.0),
    "erf": (_erf, 2.5, 4.0),
    "sin": (np.sin, 2.0, 2.0),
    "cos": (np.cos, 2.0, 2.0),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 1.5, 1.5),
}


def sample(dtype: type, name: str, per_exponent: int, more: int) -> np.ndarray:
    """Every exponent, some mantissas each, both signs, special values, and more where the function is interesting."""
    source = np.random.default_rng(5)
    if dtype is np.float32:
        exponents = np.repeat(np.arange(255, dtype=np.uint32), per_exponent)
        mantissas = source.integers(0, 1 << 23, len(exponents), dtype=np.uint32)
        positive = ((exponents << np.uint32(23)) | mantissas).view(np.float32)
    else:
        wide = np.repeat(np.arange(0, 2047, 8, dtype=np.uint64), per_exponent)
        positive = ((wide << np.uint64(52)) | source.integers(0, 1 << 52, len(wide), dtype=np.uint64)).view(np.float64)
    low, high = {"exp": (-104, 89), "exp2": (-151, 129), "log": (0.5, 2), "log2": (0.5, 2), "rsqrt": (0, 4),
                 "sin": (-1e4, 1e4), "cos": (-1e4, 1e4)}.get(name, (-6, 6))
    if dtype is np.float64 and name.startswith("exp"):
        low, high = 8 * low, 8 * high
    tiny = np.finfo(dtype).smallest_subnormal
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, tiny, -tiny, np.finfo(dtype).max, np.finfo(dtype).min])
    halves = np.arange(-50, 51) * (np.pi / 2)
    x = np.concatenate([positive, -positive, special, halves, source.uniform(low, high, more)]).astype(dtype)
    if name in ("sin", "cos"):
        x = x[~(np.abs(x) > 1e5)]
    return x


def errors_in_ulp(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Where one is infinite or NaN both must be; infinity as the error otherwise."""
    rounded = exact.astype(found.dtype)
    error = np.abs(found.astype(exact.dtype) - exact) / np.spacing(np.abs(rounded)).astype(exact.dtype)
    finite = np.isfinite(rounded) & np.isfinite(found)
    same = (found == rounded) | (np.isnan(found) & np.isnan(rounded))
    return np.where(finite, error, np.where(same, 0.0, np.inf))


@pytest.mark.parametrize("legal", [NOTHING, AVX2, AVX512, AVX512 - {"lookup", "fraction"}],
                         ids=["nothing", "avx2", "avx512", "avx512 without tables"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_f32_errors(name: str, legal: frozenset[str]) -> None:
    meaning, bound, _ = FUNCTIONS[name]
    x = sample(np.float32, name, 100, 20000)
    with np.errstate(all="ignore"):
        exact = meaning(x.astype(np.float64))
        errors = errors_in_ulp(evaluate(name, legal, x), exact)
    worst = int(np.argmax(errors))
    assert errors[worst] <= bound, f"{name}({x[worst]!r}) is {errors[worst]} ulp off {exact[worst]!r}"


@pytest.mark.parametrize(("name", "bound"), [("exp", 2.0), ("tanh", 3.5), ("sigmoid", 3.5), ("erf", 2.5)])
def test_f32_errors_by_powers_and_reciprocals(name: str, bound: float) -> None:
    """Which are exact here but for one rounding: what the instructions themselves lose comes to it."""
    meaning = FUNCTIONS[name][0]
    x = sample(np.float32, name, 30, 20000)
    x = x[~(x < -86)] if name == "sigmoid" else x    # gradual underflow of a quotient is not had
    with np.errstate(all="ignore"):
        errors = errors_in_ulp(evaluate(name, APPROXIMATE, x), meaning(x.astype(np.float64)))
    worst = int(np.argmax(errors))
    assert errors[worst] <= bound, f"{name}({x[worst]!r}) is {errors[worst]} ulp off"
    assert not any(op.name in ("div", "shl") for op in expanded(name, np.float32, APPROXIMATE, 32).walk()
                   if name != "tanh" or op.name == "div")


@pytest.mark.parametrize(("name", "ops"), [("exp", 2), ("sigmoid", 4), ("tanh", 5), ("erf", 16)])
def test_short_forms_by_powers_and_reciprocals(name: str, ops: int) -> None:
    """For results of few bits, those of erf and tanh with an absolute error."""
    function = expanded(name, np.float32, APPROXIMATE, 32, coarse=True)
    assert len([op for op in function.walk() if op.name not in ("splat_const", "arg", "load", "store")]) == ops
    x = sample(np.float32, name, 3, 2000)
    x = x[~(x < -86)] if name == "sigmoid" else x    # gradual underflow of a quotient is not had
    with np.errstate(all="ignore"):
        found, exact = evaluate(name, APPROXIMATE, x, coarse=True), FUNCTIONS[name][0](x.astype(np.float64))
        size = np.where(np.isfinite(x), np.abs(x), 0)
        slack = 2.0**-20 if name in ("erf", "tanh") else np.abs(exact) * (2.0**-21 + size * 2.0**-23) + 1e-37
        settled = np.isfinite(exact) & np.isfinite(found)
        assert (np.abs(found - exact) <= slack)[settled].all()
        assert (settled | (found == exact.astype(np.float32)) | np.isnan(exact)).all()
    assert np.array_equal(np.isnan(found), np.isnan(exact))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_f64_errors(name: str) -> None:
    meaning, _, bound = FUNCTIONS[name]
    x = sample(np.float64, name, 2, 700)
    with np.errstate(all="ignore"):
        exact = meaning(x.astype(np.longdouble)).astype(np.longdouble)
        for legal in (NOTHING, AVX2, AVX512):
            errors = errors_in_ulp(evaluate(name, legal, x), exact)
            worst = int(np.argmax(errors))
            assert errors[worst] <= bound, f"{name}({x[worst]!r}) is {errors[worst]} ulp off {exact[worst]!r}"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("legal", [NOTHING, AVX2, AVX512], ids=["nothing", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["exp", "exp2"])
def test_an_operand_that_is_never_large_needs_no_limit(name: str, dtype: type, legal: frozenset[str]) -> None:
    """The same bits, by one op less; and no op less where it may be too large after all."""
    x = sample(dtype, name, 3, 2000)
    x = x[~(x > 0)]
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(evaluate(name, legal, x, most=0.0), evaluate(name, legal, x))
    least, limited, too_large = (sum(op.name == "min" for op in expanded(name, dtype, legal, 16, **more).walk())
                                 for more in ({"most": 0.0}, {}, {"most": 1e4}))
    free = name == "exp2" and dtype is np.float32 and "fraction" in legal
    assert (least, limited, too_large) == ((0, 0, 0) if free else (0, 1, 1))


# name -> (relative error, more of it for each unit of abs(x), absolute error), as docs/math.md says
SHORT = {"exp": (2.0**-18.4, 2.0**-23.7, 2.0**-149), "sigmoid": (2.0**-18.4, 2.0**-23.7, 2.0**-149),
         "erf": (0.0, 0.0, 2.0**-21.8)}
SHORT_ERF_BY_A_QUOTIENT = 2.0**-21.4


@pytest.mark.parametrize("legal", [NOTHING, AVX2, AVX512], ids=["nothing", "avx2", "avx512"])
@pytest.mark.parametrize("name", SHORT)
def test_short_forms_are_as_near_as_is_said(name: str, legal: frozenset[str]) -> None:
    meaning = FUNCTIONS[name][0]
    x = sample(np.float32, name, 100, 50000)
    with np.errstate(all="ignore"):
        exact = meaning(x.astype(np.float64))
        found = evaluate(name, legal, x, coarse=True).astype(np.float64)
        relative, of_each, absolute = SHORT[name]
        if name == "erf" and "lookup" not in legal:
            absolute = SHORT_ERF_BY_A_QUOTIENT
        bound = np.abs(exact) * (relative + np.where(np.isfinite(x), np.abs(x), 0) * of_each) + absolute
        rounded = exact.astype(np.float32)
        same = (found == rounded) | (np.isnan(found) & np.isnan(rounded))
        good = same | (np.isfinite(rounded) & np.isfinite(found) & (np.abs(found - exact) <= bound))
        # Next to the greatest number either may overflow alone.
        good |= (exact > 3.4e38) & (found > 3.4e38)
    worst = int(np.argmin(good))
    assert good.all(), f"{name}({x[worst]!r}) is {found[worst]!r}, expected {exact[worst]!r}"
    long, short = (sum(op.name not in ("splat_const", "bitcast") for op in expanded(
        name, np.float32, legal, 16, **more).walk()) for more in ({}, {"coarse": True}))
    fewer = {"exp": 2, "sigmoid": 2, "erf": 15} if "lookup" not in legal else {"exp": 4, "sigmoid": 4, "erf": 2}
    assert short <= long - fewer[name]


def erf_of_product(factor: float, lanes: int, legal: frozenset[str], **how: bool) -> tuple[Function, Value]:
    """What stores erf(factor x), expanded, and the product that it was of."""
    function = Function("f", "lane")
    function.attributes = {"lanes": lanes, "slots": ["x.data", "y.data"]}
    build = Builder(function.body)
    source, target = (build.value("arg", [], S64, slot=3 + n) for n in range(2))
    product = build.value("mul", [build.value("load", [source], ROW_F32, dtype=ROW_F32.dtype),
                                  build.value("splat_const", [], ROW_F32, value=factor)], ROW_F32)
    build.add("store", [build.value("erf", [product], ROW_F32, **how), target], dtype=ROW_F32.dtype)
    expand_math(function, legal)
    verify(function, LANE_OPS)
    return function, product


@pytest.mark.parametrize("legal", [AVX2, NOTHING], ids=["avx2", "nothing"])
@pytest.mark.parametrize("factor", [1.0, math.sqrt(0.5), 2.0**-9, -1.0])
def test_an_erf_whose_absolute_error_counts_is_made_of_erfc(factor: float, legal: frozenset[str]) -> None:
    """In fewer ops, exactly 1 far out, with the sign of the operand, and taking in a factor above 0."""
    function, product = erf_of_product(factor, 1 << 18, legal, absolute=True)
    assert any(product in op.operands for op in function.walk()) == (factor < 2.0**-8)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e30, -5.7, 5.7], np.float32)
    x = np.concatenate([special, np.random.default_rng(4).uniform(-6, 6, (1 << 18) - 8).astype(np.float32)])
    y = np.zeros_like(x)
    run(function, *bind_arguments(function, {"x": x, "y": y}))
    np.testing.assert_allclose(y, _erf(x.astype(np.float64) * factor), rtol=0, atol=2.6 * 2.0**-24)
    assert (np.signbit(y) == np.signbit(x * np.float32(factor)))[~np.isnan(x)].all()
    far = np.array([4.0, 9.0, 1e30, np.inf], np.float32)
    assert evaluate("erf", legal, np.concatenate([far, -far]), absolute=True).tolist() == [1.0] * 4 + [-1.0] * 4
    long, short = (sum(op.name not in ("splat_const", "bitcast") for op in expanded(
        "erf", np.float32, legal, 16, **more).walk()) for more in ({}, {"absolute": True}))
    assert short <= long - 9


@pytest.mark.parametrize("legal", [AVX512, APPROXIMATE], ids=["avx512", "approximate"])
def test_an_erf_whose_absolute_error_counts_is_the_usual_one_elsewhere(legal: frozenset[str]) -> None:
    x = sample(np.float32, "erf", 3, 2000)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(evaluate("erf", legal, x, absolute=True), evaluate("erf", legal, x))


@pytest.mark.parametrize(("inside", "outside", "joined"), [
    (math.sqrt(0.5), 0.5, True), (1.0, 1.0, True), (math.sqrt(0.5), 1.0, True), (1.0, -0.5, False),
    (-1.0, 0.5, False)])
@pytest.mark.parametrize("summed", [False, True])
def test_a_product_with_erf_sets_no_sign(inside: float, outside: float, joined: bool, summed: bool) -> None:
    """GELU: where g and y are multiples of one value, with factors above 0, g (1 + erf y) is g + |g| erf |y|."""
    function = Function("f", "lane")
    function.attributes = {"lanes": 4096, "slots": ["x.data", "y.data"]}
    build = Builder(function.body)
    source, target = (build.value("arg", [], S64, slot=3 + n) for n in range(2))
    x_row = build.value("load", [source], ROW_F32, dtype=ROW_F32.dtype)

    def multiple(factor: float) -> Value:
        of = build.value("splat_const", [], ROW_F32, value=factor)
        return x_row if factor == 1.0 else build.value("mul", [x_row, of], ROW_F32)

    erf = build.value("erf", [multiple(inside)], ROW_F32, absolute=True)
    total = build.value("add", [build.value("splat_const", [], ROW_F32, value=1.0), erf], ROW_F32)
    product = build.value("fma", [multiple(outside), total, x_row], ROW_F32) if summed else build.value(
        "mul", [total, multiple(outside)], ROW_F32)
    build.add("store", [product, target], dtype=ROW_F32.dtype)
    expand_math(function, AVX2)
    verify(function, LANE_OPS)
    assert any(op.name == "or" for op in function.walk()) != joined
    x = np.concatenate([np.random.default_rng(2).uniform(-6, 6, 4091), [0.0, -0.0, np.inf, np.nan, 1e30]])
    x = x.astype(np.float32)
    y = np.zeros_like(x)
    with np.errstate(all="ignore"):
        run(function, *bind_arguments(function, {"x": x, "y": y}))
        wide = x.astype(np.float64)
        exact = outside * wide * (1 + _erf(wide * inside)) + (wide if summed else 0)
    np.testing.assert_allclose(y, exact, rtol=3e-7, atol=8e-7)


@pytest.mark.parametrize("legal", [AVX2, AVX512], ids=["avx2", "avx512"])
def test_a_short_erf_ends_in_one(legal: frozenset[str]) -> None:
    """1 + erf(x) is 0 for an x far below 0: in GELU it is multiplied by it."""
    x = np.array([4.0, 9.0, 1e30, np.inf], np.float32)
    assert evaluate("erf", legal, np.concatenate([x, -x]), coarse=True).tolist() == [1.0] * 4 + [-1.0] * 4


def test_a_short_exp_of_what_is_not_above_zero_is_the_same() -> None:
    """2**n by one power or by two: the same bits."""
    x = sample(np.float32, "exp", 20, 5000)
    x = x[~(x > 0)]
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(evaluate("exp", AVX2, x, most=0.0, coarse=True),
                                      evaluate("exp", AVX2, x, coarse=True))


@pytest.mark.parametrize("legal", [AVX2, AVX512], ids=["avx2", "avx512"])
@pytest.mark.parametrize("factor", [math.sqrt(0.5), 1.0, 3.0, 2.0**-6, 2.0**-70, -1.0])
def test_erf_of_a_product_takes_it_into_its_multiply_adds(factor: float, legal: frozenset[str]) -> None:
    """Where the factor is neither negative nor so small that the limit over it overflows, or one of its powers that
    coefficients take in is not normal."""
    function, product = erf_of_product(factor, 4096, legal, coarse=True)
    used = any(product in op.operands for op in function.walk())
    assert used == (factor not in ((math.sqrt(0.5), 1.0, 3.0) + (2.0**-6,) * (legal is AVX512)))
    x = np.concatenate([np.random.default_rng(2).uniform(-6, 6, 4090), [0.0, -0.0, np.inf, -np.inf, np.nan, 1e30]])
    x = x.astype(np.float32)
    y = np.zeros_like(x)
    run(function, *bind_arguments(function, {"x": x, "y": y}))
    np.testing.assert_allclose(y, _erf(x.astype(np.float64) * factor), rtol=0,
                               atol=2.0**-21.5 if legal is AVX512 else SHORT_ERF_BY_A_QUOTIENT)
    assert (np.signbit(y) == np.signbit(x * np.float32(factor)))[~np.isnan(x)].all()


@pytest.mark.parametrize("name", sorted(COARSE))
def test_a_target_without_short_forms_takes_the_usual_ones(name: str) -> None:
    legal = AVX512 - {"fraction", "lookup"}
    x = sample(np.float32, name, 3, 2000)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(evaluate(name, legal, x, coarse=True), evaluate(name, legal, x))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["tanh", "erf"])
def test_odd_functions_keep_the_sign_of_zero(name: str, dtype: type) -> None:
    found = evaluate(name, NOTHING, np.array([0.0, -0.0], dtype))
    assert found.tolist() == [0, 0] and np.signbit(found).tolist() == [False, True]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", sorted(ROUNDING))
def test_rounding_is_exact(name: str, dtype: type) -> None:
    limit = 2.0 ** (23 if dtype is np.float32 else 52)
    x = np.array([0.0, -0.0, 0.3, -0.3, 0.5, -0.5, 0.7, -0.7, 1.5, -1.5, 2.5, -2.5, 1.0, -1.0, limit - 0.5, limit,
                  -limit, limit + 1, limit / 2 + 0.5, 1e30, -1e30, np.inf, -np.inf, np.nan, 1e-40, -1e-40], dtype)
    x = np.concatenate([x, np.random.default_rng(3).uniform(-100, 100, 1000).astype(dtype)])
    meaning = {"round": np.rint, "floor": np.floor, "ceil": np.ceil, "trunc": np.trunc}[name]
    found = evaluate(name, NOTHING, x)
    np.testing.assert_array_equal(found, meaning(x))
    np.testing.assert_array_equal(np.signbit(found)[~np.isnan(x)], np.signbit(meaning(x))[~np.isnan(x)])


@pytest.mark.parametrize("legal", [NOTHING, AVX2], ids=["nothing", "avx2"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scale_exponent_is_exact(dtype: type, legal: frozenset[str]) -> None:
    source = np.random.default_rng(9)
    largest = 300 if dtype is np.float32 else 2200
    values = [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, float(np.finfo(dtype).max), float(np.finfo(dtype).tiny),
              float(np.finfo(dtype).smallest_subnormal)]
    powers = [0.0, -0.0, 0.9, -0.1, 127.0, -126.0, -149.0, 1e30, -1e30, np.inf, -np.inf, np.nan]
    a, n = (v.ravel() for v in np.meshgrid(np.array(values, dtype), np.array(powers, dtype)))
    bits = source.integers(0, 255 << 23 if dtype is np.float32 else 2047 << 52, 4000)
    random_a = bits.astype(np.uint32 if dtype is np.float32 else np.uint64).view(dtype)
    a = np.concatenate([a, random_a])
    n = np.concatenate([n, source.uniform(-largest, largest, 4000).astype(dtype)])
    reference = Function("r", "lane")
    build = Builder(reference.body)
    row = ROW_F32 if dtype is np.float32 else ROW_F64
    x = build.value("splat_const", [], row, value=0.0)
    op = build.add("scale_exponent", [x, x], [row])
    meaning = pure_function(op, len(a))
    assert meaning is not None
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(evaluate("scale_exponent", legal, a, n), meaning(a, n))


def test_exp_is_short() -> None:
    """With the rounding and scaling instructions exp is 13 ops, and its constants lie at the head."""
    function = expanded("exp", np.float32, AVX512 - {"lookup"}, 16)
    names = [op.name for op in function.body.ops]
    constants = names.count("splat_const")
    assert names[:constants] == ["splat_const"] * constants and constants <= 12
    assert names[constants:] == ["arg", "arg", "load", "max", "min", "mul", "round", *["fma"] * 8, "scale_exponent",
                                 "store"]


def test_exp_without_scaling_instructions_is_short() -> None:
    """2**n is shifted out of what rounding leaves in the low bits; for n that are not above 0 one power is enough."""
    with_limit, without = ([op.name for op in expanded("exp", np.float32, AVX2, 16, **more).body.ops if op.name not in (
        "splat_const", "arg", "load", "store", "bitcast")] for more in ({}, {"most": 0.0}))
    assert with_limit == ["max", "min", "fma", "sub", "shl", "shl", "and", "sub", *["fma"] * 8, "mul", "mul"]
    assert without == ["max", "fma", "sub", "shl", *["fma"] * 8, "mul"]


def test_exp_of_a_target_with_exp2_is_a_power_and_a_correction() -> None:
    """An infinite power has none to be added."""
    with_limit, without = ([op.name for op in expanded("exp", np.float32, APPROXIMATE, 32, **more).body.ops
                            if op.name not in ("splat_const", "arg", "load", "store")] for more in ({}, {"most": 0.0}))
    assert without == ["max", "mul", "fma", "fma", "exp2", "fma"]
    assert with_limit == ["max", "min", "mul", "fma", "fma", "exp2", "add", "mul"]


def test_exp_with_a_table_takes_fewer_multiplications() -> None:
    function = expanded("exp", np.float32, AVX512, 16)
    names = [op.name for op in function.body.ops if op.name not in ("splat_const", "arg", "load", "store", "bitcast")]
    assert names == ["max", "min", "fma", "sub", "fma", "fma", "lookup", "mul", "fma", "fma", "fma", "scale_exponent"]


def test_erf_with_tables_ends_in_one() -> None:
    x = np.array([3.8749, 3.875, 4.0, 9.0, np.inf], np.float32)
    found = evaluate("erf", AVX512, np.concatenate([x, -x]))
    assert found.tolist() == [1.0] * 5 + [-1.0] * 5
    assert np.all(np.diff(evaluate("erf", AVX512, np.linspace(0, 4, 4001, dtype=np.float32))) >= -2.0**-23)


def test_results_keep_their_values_locations_and_nesting() -> None:
    function = Function("f", "lane")
    function.attributes = {"lanes": 4}
    build = Builder(function.body)
    condition = build.value("worker", [], S64)
    one = build.value("splat_const", [], ROW_F32, value=1.0)
    blocks = [Block(), Block()]
    inner = Builder(blocks[0], Location("k.py", 9, 2))
    result = inner.value("exp", [one], ROW_F32)
    result.name = "e"
    again = inner.value("sin", [result], ROW_F32)
    inner.add("yield", [again])
    Builder(blocks[1]).add("yield", [one])
    build.add("if", [condition], [ROW_F32], blocks)
    assert expand_math(function, frozenset()) == 2
    verify(function, LANE_OPS)
    assert result.op is not None and result.op.results == [result] and result.name == "e"
    assert all(op.location == Location("k.py", 9, 2) for op in blocks[0].ops[:-1])
    assert expand_math(function, frozenset()) == 0


def test_legal_ops_stay() -> None:
    function = expanded("exp", np.float32, EXPANDABLE, 8)
    assert [op.name for op in function.body.ops] == ["arg", "arg", "load", "exp", "store"]


@pytest.mark.parametrize("most", [math.inf, 0.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["exp", "exp2"])
def test_where_underflow_is_slow_results_are_the_same(name: str, dtype: type, most: float) -> None:
    """The same bits from no more ops: a power of two that is taken for 0 has taken the place of a limit."""
    x = np.concatenate([sample(dtype, name, 3, 3000), [-104.32, -104.2, -103.98, -103.97]]).astype(dtype)
    x = x[~(x > most)]
    with np.errstate(all="ignore"):
        plain, slow = (evaluate(name, AVX512, x, slow_underflow=slow, most=most) for slow in (False, True))
    assert np.array_equal(plain, slow, equal_nan=True)
    few, many = (len(expanded(name, dtype, AVX512, 16, slow_underflow=slow, most=most).body.ops)
                 for slow in (True, False))
    assert few <= many


def underflows(function: Function, x: np.ndarray) -> list[str]:
    """The float ops of a function without blocks whose result is below the normal numbers, or rounded to 0, in any
    lane. x: what it loads."""
    found: list[str] = []
    values: dict[Value, Any] = {}
    for op in function.body.ops:
        made = (lambda *_: x) if op.name == "load" else pure_function(op, len(x)) if op.results else None
        if made is None:
            continue
        operands = [values.get(v) for v in op.operands]
        result = values[op.result] = made(*operands)
        if op.result.type not in (ROW_F32, ROW_F64) or op.name in ("load", "bitcast", "splat_const"):
            continue
        below = (result != 0) & (np.abs(result) < np.finfo(result.dtype).tiny)
        if op.name in ("mul", "div", "scale_exponent"):
            first, second, *least = operands
            below |= (result == 0) & (first != 0) & (second != 0) & np.isfinite(second) & (
                ~(second < least[0]) if least else True)
        if below.any():
            found.append(op.name)
    return found


FAR = {"exp": [-105.5, -110, -200, -1e4, -1e30, 0.5, -80, 88, 200],
       "exp2": [-151.6, -160, -300, -1e4, -1e30, 0.5, -120, 127, 300],
       "sigmoid": [-105.5, -110, -200, -1e4, -1e30, 0.5, -80, 80, 90, 104, 200, 1e4, 1e30]}
"""Operands of f32 whose results are 0, normal or infinite."""


@pytest.mark.parametrize("legal", [NOTHING, AVX2, AVX512], ids=["nothing", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "most"), [("exp", math.inf), ("exp", 0.0), ("exp2", math.inf), ("sigmoid", math.inf)])
def test_nothing_underflows_on_the_way_to_zero(name: str, most: float, dtype: type, legal: frozenset[str]) -> None:
    """Nor on the way to 1, of sigmoid. exp2 of f32 takes its operand as it comes where it scales: it does underflow."""
    x = np.array([*FAR[name], -np.inf], dtype) * (1 if dtype is np.float32 else 8)
    x = np.resize(x[x <= most], 16)
    more = {"most": most} if name != "sigmoid" else {}
    function = expanded(name, dtype, legal, len(x), slow_underflow=True, **more)
    with np.errstate(all="ignore"):
        expected = ["scale_exponent"] if name == "exp2" and dtype is np.float32 and "fraction" in legal else []
        assert underflows(function, x) == expected
        # A result that is below the normal numbers is made with an underflow, and is seen.
        least = np.array([-90 if name != "exp2" else -130.5], dtype) * (1 if dtype is np.float32 else 8)
        assert underflows(function, np.repeat(least, len(x)))


def test_a_short_exp_by_one_power_or_by_two_has_no_underflow_on_the_way_to_zero() -> None:
    for most in (math.inf, 0.0):
        function = expanded("exp", np.float32, AVX2, 8, slow_underflow=True, most=most, coarse=True)
        x = np.array([-105.5, -110, -200, -1e4, -1e30, -np.inf, -80, 0], np.float32)
        with np.errstate(all="ignore"):
            assert underflows(function, x) == []
