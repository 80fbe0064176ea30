"""Every kind of compile-time error: found where the author wrote it, with what was found, expected, and a mend.

Each case is a function that defines a kernel; the line that must be blamed ends in the comment `# here`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import (
    KernelError,
    Tensor,
    argmax,
    bf16,
    bool_,
    each,
    exp,
    f8e4m3,
    f16,
    f32,
    full,
    i4,
    i8,
    i32,
    kernel,
    span,
    sum,
    tiles,
    u8,
    where,
    whole,
    zeros,
)
from sapper.lang.errors import KINDS

M, N, K, B = sp.dims("M N K B")
UNBOUND = sp.dims("UNBOUND")
TABLE = {"a": 1}

CASES: list[tuple[str, str, Callable[[], Any]]] = []


def case(kind: str, mend: str = "") -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a function that makes a kernel; mend: a part of the mend that must be given."""

    def register(make: Callable[[], Any]) -> Callable[[], Any]:
        CASES.append((kind, mend, make))
        return make

    return register


# Names, statements and expressions.


@case("unknown-name", "acc")
def unknown_name():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            acc = a[m]  # noqa: F841
            out[m] = ac + 1  # noqa: F821  # here

    return k


@case("unknown-name")
def read_before_assignment():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[m] + later  # noqa: F821  # here
            later = 1.0  # noqa: F841

    return k


@case("unknown-name", "from sapper import cos")
def missing_import():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = cos(a[m])  # noqa: F821  # here

    return k


@case("unknown-attribute", "to")
def unknown_attribute():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[m].too(f32)  # here

    return k


@case("unknown-attribute", "write a[m].to(dtype)")
def numpys_cast():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[m].astype(f32)  # here

    return k


@case("unknown-attribute", "no transposing")
def transposed():
    @kernel
    def k(a: Tensor[f32, M, N], out: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            out[m, n] = a[m, n].T  # here

    return k


@case("unknown-attribute", "inf")
def unknown_module_attribute():
    @kernel
    def k(out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = math.infi  # here

    return k


@case("unsupported-statement", "range")
def while_loop():
    @kernel
    def k(out: Tensor[f32, M]):
        while True:  # here
            pass

    return k


@case("unsupported-statement", "raises nothing")
def try_statement():
    @kernel
    def k(out: Tensor[f32, M]):
        try:  # noqa: SIM105  # here
            out[0] = 1.0
        except ValueError:
            pass

    return k


@case("unsupported-statement", "nothing to close")
def with_statement():
    @kernel
    def k(out: Tensor[f32, M]):
        with open("x"):  # here
            pass

    return k


@case("unsupported-statement", "span")
def break_statement():
    @kernel
    def k(out: Tensor[f32, M]):
        for m in range(M):
            out[m] = 1.0
            break  # here

    return k


@case("unsupported-statement", "outside")
def import_statement():
    @kernel
    def k(out: Tensor[f32, M]):
        import math as mathematics  # noqa: F401  # here

    return k


@case("unsupported-statement", "after the loop")
def for_else():
    @kernel
    def k(out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = 1.0
        else:
            pass  # here

    return k


@case("unsupported-statement")
def annotated_assignment():
    @kernel
    def k(out: Tensor[f32, M]):
        for m in tiles(M):
            x: f32 = 1.0  # here
            out[m] = x

    return k


@case("bad-range", "loop")
def comprehension_over_an_extent():
    @kernel
    def k(out: Tensor[f32, M]):
        x = [i for i in range(M)]  # noqa: C416, F841  # here

    return k


@case("assertion", "where")
def comprehension_of_what_a_tensor_says():
    @kernel
    def k(n: i32, out: Tensor[f32, M]):
        x = [i for i in range(3) if i < n]  # noqa: F841  # here

    return k


@case("unsupported-expression", "a tuple")
def generator_expression():
    @kernel
    def k(out: Tensor[f32, M]):
        x = (i for i in range(3))  # noqa: F841  # here

    return k


@case("literal-range", "0x85ebca6b - 2**32")
def bits_of_a_literal():
    @kernel
    def k(out: Tensor[i32, M]):
        for m in tiles(M):
            out[m] = out[m] * 0x85ebca6b  # here

    return k


@case("unsupported-expression", "store results")
def generator():
    @kernel
    def k(out: Tensor[f32, M]):
        yield 1  # here

    return k


@case("unsupported-expression", "tuple")
def list_display():
    @kernel
    def k(out: Tensor[f32, M]):
        x = [1, 2]  # noqa: F841  # here

    return k


@case("unsupported-expression")
def membership_in_string():
    @kernel
    def k(out: Tensor[f32, M]):
        x = "a" in "abc"  # noqa: F841  # here

    return k


@case("unsupported-function", "interpret=True")
def print_call():
    @kernel
    def k(out: Tensor[f32, M]):
        print(1)  # here

    return k


@case("unsupported-function", "interpret=True")
def breakpoint_call():
    @kernel
    def k(out: Tensor[f32, M]):
        breakpoint()  # here

    return k


@case("unsupported-function", "sapper's exp")
def math_of_tile():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = math.exp(a[m])  # here

    return k


@case("unsupported-constant", "tuple")
def dictionary():
    @kernel
    def k(out: Tensor[f32, M]):
        out[0] = TABLE["a"]  # here

    return k


@case("unsupported-constant")
def object_in_arithmetic():
    @kernel
    def k(out: Tensor[f32, M]):
        out[0] = TABLE + 1  # here

    return k


@case("not-a-function", "index it")
def tensor_called():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a(m)  # here

    return k


@case("not-a-function", ".to(f32)")
def dtype_called():
    @kernel
    def k(a: Tensor[i32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = f32(a[m])  # here

    return k


@case("tuple")
def unpacked_too_far():
    @kernel
    def k(out: Tensor[f32, M]):
        x, y = (1, 2, 3)  # noqa: F841  # here

    return k


@case("tuple", "tensor")
def tuple_at_run_time():
    @kernel
    def k(out: Tensor[i32, M]):
        for m in each(M):
            out[m] = (1, 2)[m]  # here

    return k


@case("assertion")
def false_assertion():
    @kernel
    def k(out: Tensor[f32, M]):
        assert TABLE is None, "no table"  # here

    return k


@case("assertion", "the constants")
def assertion_of_constants_beside_extents():
    @kernel
    def k(out: Tensor[f32, M]):
        assert M % 4 == 0 and TABLE is None  # here

    return k


@case("assertion", "before the call")
def run_time_assertion():
    @kernel
    def k(n: i32, out: Tensor[f32, M]):
        assert n > 0  # here

    return k


@case("constant-arithmetic")
def division_by_zero():
    @kernel
    def k(out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = 1 / 0  # here

    return k


@case("constant-arithmetic")
def logarithm_of_zero():
    @kernel
    def k(out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = sp.log(0.0)  # here

    return k


# Functions.


def recursive(x):
    return recursive(x) + 1  # blamed: recursion


def without_result(x):
    x + 1


def early(x):
    if x > 0:
        return x  # blamed: return-in-the-middle
    return 0


@case("recursion")
def recursion():
    @kernel
    def k(n: i32, out: Tensor[i32, M]):
        for m in tiles(M):
            out[m] = recursive(n)

    return k


@case("missing-return", "return")
def missing_return():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = without_result(a[m])  # here

    return k


@case("return-in-the-middle", "both branches")
def return_in_the_middle():
    @kernel
    def k(n: i32, out: Tensor[i32, M]):
        for m in tiles(M):
            out[m] = early(n)

    return k


@case("return-in-the-middle")
def return_in_a_loop():
    @kernel
    def k(out: Tensor[i32, M]):
        for m in tiles(M):  # noqa: B007
            return  # here

    return k


@case("kernel-returns-value", "out")
def kernel_returns():
    @kernel
    def k(a: Tensor[f32, M]):
        return 1  # here

    return k


@case("stores-nothing", "write out")
def kernel_that_stores_nothing():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):  # here
            out = a[m] * 2.0  # noqa: F841

    return k


@case("bad-range", "the schedule picks how large a tile is")
def tile_size_beside_the_extent():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M, 64):  # here
            out[m] = a[m]

    return k


@case("tensor-without-index", "walk it: for m in tiles(M), and index a[m]")
def tensor_as_a_whole():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a * 2.0  # here

    return k


@case("carried-type", "to add up over n, contract: a[..., n] @ b[n, ...]")
def product_that_is_not_summed():
    @kernel
    def k(a: Tensor[f32, M, N], b: Tensor[f32, N], out: Tensor[f32, M]):
        for m in tiles(M):
            total = zeros(m, dtype=f32)
            for n in tiles(N):
                total += a[m, n] * b[n]  # here
            out[m] = total

    return k


@case("bad-annotation", "write Tensor[f64, M, N]")
def element_type_of_numpy():
    @kernel
    def k(a: Tensor[np.float64, M]):  # here
        pass

    return k


@case("call-arguments")
def too_few_arguments():
    def two(x, y):
        return x + y

    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = two(a[m])  # here

    return k


@case("call-arguments", "dtype")
def unknown_keyword():
    @kernel
    def k(out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = zeros(m, dtyp=f32)  # here

    return k


@case("call-arguments", "dtype=f32")
def zeros_without_dtype():
    @kernel
    def k(out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = zeros(m)  # here

    return k


@case("call-arguments")
def exp_of_two():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = exp(a[m], a[m])  # here

    return k


def lambda_without_source():
    return eval("lambda x: x + 1")


@case("source-unavailable")
def source_unavailable():
    add_one = lambda_without_source()

    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = add_one(a[m])  # here

    return k


# Annotations.


@case("missing-annotation", "Tensor")
def missing_annotation():
    @kernel
    def k(a, out: Tensor[f32, M]):  # here
        out[0] = 1.0

    return k


@case("bad-annotation", "f32")
def python_float_annotation():
    @kernel
    def k(
        a: float,  # here
        out: Tensor[f32, M],
    ):
        out[0] = a

    return k


@case("bad-annotation")
def stored_only_scalar():
    @kernel
    def k(a: i4, out: Tensor[f32, M]):  # here
        out[0] = 1.0

    return k


@case("bad-annotation")
def unresolved_annotation():
    @kernel
    def k(a: Tensor[f32, Q], out: Tensor[f32, M]):  # noqa: F821  # here
        out[0] = 1.0

    return k


def test_tensor_annotation_alone():
    for make in (lambda: Tensor[float, M], lambda: Tensor[f32, "M"], lambda: Tensor[f32, 1.5],
                 lambda: Tensor[f32, -1]):
        with pytest.raises(KernelError) as caught:
            make()
        assert caught.value.kind == "bad-annotation"
        assert caught.value.file == __file__


# Axes, indices, ranks.


@case("unknown-axis", "whole(N)")
def dimension_as_axis():
    @kernel
    def k(a: Tensor[f32, M, N], out: Tensor[f32, M]):
        for m in tiles(M):
            n = whole(N)
            out[m] = sum(a[m, n], over=N)  # here

    return k


@case("unknown-axis")
def index_as_axis():
    @kernel
    def k(out: Tensor[f32, M]):
        for m in each(M):
            x = zeros(m, dtype=f32)  # noqa: F841  # here

    return k


@case("over")
def wrong_over():
    @kernel
    def k(a: Tensor[f32, M, N], out: Tensor[f32, M]):
        for m in tiles(M):
            n = whole(N)
            j = whole(M)
            x = a[m, n]
            out[m] = sum(x, over=j)  # here

    return k


@case("over", "over=n")
def missing_over():
    @kernel
    def k(a: Tensor[f32, M, N], out: Tensor[f32, M]):
        for m in tiles(M):
            n = whole(N)
            out[m] = sum(a[m, n])  # here

    return k


@case("over", "over=n")
def axis_as_second_operand():
    @kernel
    def k(a: Tensor[f32, M, N], out: Tensor[f32, M]):
        for m in tiles(M):
            n = whole(N)
            out[m] = max(a[m, n], n)  # here

    return k


@case("over")
def argmax_of_two_axes():
    @kernel
    def k(a: Tensor[f32, M, N], out: Tensor[i32, 1]):
        m = whole(M)
        n = whole(N)
        out[0] = argmax(a[m, n], over=(m, n)).to(i32)  # here

    return k


@case("rank", "one index for each")
def rank():
    @kernel
    def k(a: Tensor[f32, M, N], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[m]  # here

    return k


@case("rank")
def rank_of_store():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M, N]):
        for m in tiles(M):
            out[m] = a[m]  # here

    return k


@case("subscript", "whole")
def slice_index():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[0:4]  # here

    return k


@case("subscript", "named")
def none_index():
    @kernel
    def k(a: Tensor[f32, M, N], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[m, None]  # here

    return k


@case("subscript")
def tile_indexed():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            x = a[m]
            out[m] = x[m]  # here

    return k


@case("subscript", "where")
def tile_assigned():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            x = a[m]
            x[m] = 1.0  # here
            out[m] = x

    return k


@case("gather-dtype", ".to(i32)")
def float_index():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[a[m]]  # here

    return k


@case("tensor-without-index", "a[")
def tensor_without_index():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a + 1.0  # here

    return k


@case("unbound-dim")
def unbound_dimension():
    @kernel
    def k(out: Tensor[f32, M]):
        for m in tiles(UNBOUND):  # here
            out[m] = 1.0

    return k


@case("call-arguments", "did you mean in_place?")
def option_that_there_is_not():
    @kernel(inplace=[("out", "a")])  # here
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[m]

    return k


@case("call-arguments", 'in_place=[("out", "x")]')
def in_place_of_no_tensor():
    @kernel(in_place=[("out", "b")])  # here
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[m]

    return k


@case("unbound-dim", "leave K out")
def specialised_for_a_dimension_that_it_lacks():
    @kernel(specialise="N K")  # here
    def k(a: Tensor[f32, M, N], out: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            out[m, n] = a[m, n]

    return k


@case("axis-extent", "walk N")
def axis_of_another_dimension():
    @kernel
    def k(a: Tensor[f32, M, N], out: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            out[m, n] = a[m, m]  # here

    return k


@case("out-of-bounds")
def constant_out_of_bounds():
    @kernel
    def k(a: Tensor[f32, 4], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[4]  # here

    return k


@case("out-of-bounds", "M - 1")
def negative_index():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[-1]  # here

    return k


@case("out-of-bounds", "earlier")
def shifted_out_of_bounds():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[m + 1]  # here

    return k


@case("out-of-bounds")
def affine_out_of_bounds():
    @kernel
    def k(a: Tensor[f32, 16], out: Tensor[f32, 9]):
        for i in tiles(9):
            out[i] = a[2 * i]  # here

    return k


@case("out-of-bounds", "later")
def below_the_start():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[m - 1]  # here

    return k


# Dtypes.


@case("dtype-mix", "a[m].to(f32)")
def dtype_mix():
    @kernel
    def k(a: Tensor[bf16, M], b: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[m] + b[m]  # here

    return k


@case("dtype-mix", "x.to(f32)")
def dtype_mix_in_accumulation():
    @kernel
    def k(a: Tensor[bf16, M, K], out: Tensor[f32, M]):
        for m in tiles(M):
            acc = zeros(m, dtype=f32)
            for j in tiles(K):
                x = sum(a[m, j], over=j)
                acc += x  # here
            out[m] = acc

    return k


@case("literal-dtype", "1")
def float_literal_with_integers():
    @kernel
    def k(a: Tensor[i32, M], out: Tensor[i32, M]):
        for m in tiles(M):
            out[m] = a[m] + 1.0  # here

    return k


@case("literal-range")
def literal_too_large():
    @kernel
    def k(a: Tensor[i8, M], out: Tensor[i8, M]):
        for m in tiles(M):
            out[m] = a[m] + 300  # here

    return k


@case("division-dtype", "//")
def integer_division():
    @kernel
    def k(a: Tensor[i32, M], out: Tensor[i32, M]):
        for m in tiles(M):
            out[m] = a[m] / a[m]  # here

    return k


@case("op-dtype", ".to(f32)")
def exp_of_integers():
    @kernel
    def k(a: Tensor[i32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = exp(a[m])  # here

    return k


@case("op-dtype", "bits")
def bitwise_on_floats():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[m] & a[m]  # here

    return k


@case("op-dtype", "!= 0")
def integer_condition():
    @kernel
    def k(a: Tensor[i32, M], out: Tensor[i32, M]):
        for m in tiles(M):
            out[m] = where(a[m], 1, 0)  # here

    return k


@case("op-dtype")
def sum_of_bools():
    @kernel
    def k(a: Tensor[bool_, M], out: Tensor[i32, 1]):
        m = whole(M)
        out[0] = sum(a[m], over=m)  # here

    return k


@case("dtype-not-computed", ".to(f32)")
def arithmetic_on_fp8():
    @kernel
    def k(a: Tensor[f8e4m3, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[m] * a[m]  # here

    return k


@case("dtype-not-computed", ".to(i32)")
def arithmetic_on_i4():
    @kernel
    def k(a: Tensor[i4, M], out: Tensor[i32, M]):
        for m in tiles(M):
            out[m] = a[m] + 1  # here

    return k


@case("power", "sqrt")
def fractional_power():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[m] ** 0.5  # here

    return k


@case("store-dtype", ".to(bf16)")
def store_dtype():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[bf16, M]):
        for m in tiles(M):
            out[m] = a[m]  # here

    return k


@case("store-axes", "over=n")
def store_axes():
    @kernel
    def k(a: Tensor[f32, M, N], out: Tensor[f32, M]):
        for m in tiles(M):
            n = whole(N)
            out[m] = a[m, n]  # here

    return k


@case("store-axes", "or a @ b for its products")
def sums_of_products_element_by_element():
    @kernel
    def k(a: Tensor[f32, M, K], b: Tensor[f32, K, N], out: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            for k in tiles(K):
                out[m, n] += a[m, k] * b[k, n]  # here

    return k


@case("store-axes", "write out[n + 0 * m]")
def sum_at_an_index_that_lacks_the_rows():
    @kernel
    def k(a: Tensor[f32, M, N], out: Tensor[f32, N]):
        for m in tiles(M):
            n = whole(N)
            out[n] += a[m, n]  # here

    return k


@case("store-axes", r"write out[at[n].to(i32) + 0 * m, 0]")
def sum_at_places_of_bytes_that_lack_the_rows():
    @kernel
    def k(a: Tensor[f32, M, N], at: Tensor[u8, N], out: Tensor[f32, K, 1]):
        for m, n in tiles(M, N):
            out[at[n], 0] += a[m, n]  # here

    return k


@case("store-axes", r"write out[(at[n] // 2).to(i32) + 0 * m]")
def sum_at_halved_places_of_bytes_that_lack_the_rows():
    @kernel
    def k(a: Tensor[f32, M, N], at: Tensor[i8, N], out: Tensor[f32, K]):
        for m, n in tiles(M, N):
            out[at[n] // 2] += a[m, n]  # here

    return k


# Contractions.


@case("contract-no-shared-axis", "outer product")
def contraction_without_shared_axis():
    @kernel
    def k(a: Tensor[f32, M], b: Tensor[f32, N], out: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            out[m, n] = a[m] @ b[n]  # here

    return k


@case("contract-parallel-axis",
      "in the loop over m; for a product for each m, walk it one by one, for m in each(...), or write sum")
def contraction_of_too_many():
    @kernel
    def k(a: Tensor[f32, M, K], b: Tensor[f32, M, K], out: Tensor[f32, M]):
        for m in tiles(M):
            j = whole(K)
            out[m] = a[m, j] @ b[m, j]  # here

    return k


@case("contract-scalar", "*")
def contraction_of_scalar():
    @kernel
    def k(a: Tensor[f32, M], x: f32, out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[m] @ x  # here

    return k


@case("contract-dtype")
def contraction_of_i32():
    @kernel
    def k(a: Tensor[i32, M, K], b: Tensor[i32, K], out: Tensor[i32, M]):
        for m in tiles(M):
            j = whole(K)
            out[m] = a[m, j] @ b[j]  # here

    return k


@case("dtype-mix")
def contraction_of_f16_and_bf16():
    @kernel
    def k(a: Tensor[f16, M, K], b: Tensor[bf16, K], out: Tensor[f32, M]):
        for m in tiles(M):
            j = whole(K)
            out[m] = a[m, j] @ b[j]  # here

    return k


@case("contract-parallel-axis", "take m = whole(...)")
def contraction_of_rows_of_both_in_a_second_loop():
    """The axis is called as it is written, though the name was taken by an axis before."""
    @kernel
    def k(a: Tensor[f32, M, K], b: Tensor[f32, M, K], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = 0.0
        for m in tiles(M):
            j = whole(K)
            out[m] = a[m, j] @ b[m, j]  # here

    return k


@case("dtype-mix", "write j.to(u8)")
def shift_by_a_coordinate():
    @kernel
    def k(a: Tensor[u8, M], out: Tensor[u8, M]):
        for m in tiles(M):
            for j in range(4):
                out[m] = a[m] >> j  # here

    return k


@case("reduce-parallel-axis", "carry")
def reduction_of_parallel_axis():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[m] / sum(a[m], over=m)  # here

    return k


# Scalars, ranges and control.


@case("scalar-needed", "where")
def tile_condition():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            if a[m] > 0:  # here
                out[m] = 1.0

    return k


@case("scalar-needed", "&")
def and_of_tiles():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = where(a[m] > 0 and a[m] < 1, 1.0, 0.0)  # here

    return k


@case("scalar-needed")
def tile_bound():
    @kernel
    def k(a: Tensor[i32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            for j in range(a[m]):  # here
                out[j] = 1.0

    return k


@case("scalar-needed")
def full_of_tile():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = full(m, value=a[m])  # here

    return k


@case("chained-comparison", "(0 < a[m]) & (a[m] < 1)")
def chained_comparison():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = where(0 < a[m] < 1, 1.0, 0.0)  # here

    return k


@case("bad-range", "tiles")
def loop_over_dimension():
    @kernel
    def k(out: Tensor[f32, M]):
        for m in M:  # here
            out[m] = 1.0

    return k


@case("bad-range", "write m = whole(...), or for m in tiles(...)")
def loop_over_a_whole_axis():
    @kernel
    def k(out: Tensor[f32, M]):
        for m in whole(M):  # here
            out[m] = 1.0

    return k


@case("bad-range", "each extent")
def too_many_variables():
    @kernel
    def k(out: Tensor[f32, M]):
        for m, n in tiles(M):  # noqa: B007  # here
            out[m] = 1.0

    return k


@case("bad-range", "start + i * step")
def range_without_a_step():
    @kernel
    def k(out: Tensor[f32, M]):
        for m in range(8, 0, 0):  # here
            out[m] = 1.0

    return k


@case("bad-range", ".to(i32)")
def float_bound():
    @kernel
    def k(n: f32, out: Tensor[f32, M]):
        for m in tiles(span(0, n)):  # here
            out[m] = 1.0

    return k


@case("bad-argument", "for r in")
def tiles_assigned():
    @kernel
    def k(out: Tensor[f32, M]):
        r = tiles(M)  # noqa: F841  # here

    return k


@case("bad-argument")
def cast_to_nothing():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[m].to("f32")  # here

    return k


# Scopes, branches and carried values.


@case("use-outside-loop", "before the loop")
def value_used_after_its_loop():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            x = a[m]
        for m in tiles(M):
            out[m] = x  # here

    return k


@case("use-outside-loop", "into the loop")
def axis_used_after_its_loop():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = a[m]
        out[m] = 1.0  # here

    return k


@case("axis-out-of-scope", "before the block")
def axis_leaves_its_branch():
    @kernel
    def k(a: Tensor[f32, M], n: i32, out: Tensor[f32, M]):
        if n > 0:
            i = whole(M)
            x = a[i]  # here
        else:
            j = whole(M)
            x = a[j]
        m = whole(M)
        out[m] = x

    return k


@case("missing-branch", "before the if")
def missing_branch():
    @kernel
    def k(a: Tensor[f32, M], n: i32, out: Tensor[f32, M]):
        for m in tiles(M):
            if n > 0:
                x = a[m]
            out[m] = x  # here

    return k


@case("branch-type", "full")
def branch_type():
    @kernel
    def k(a: Tensor[f32, M], n: i32, out: Tensor[f32, M]):
        for m in tiles(M):
            if n > 0:
                x = a[m]  # here
            else:
                x = a[0]
            out[m] = x

    return k


@case("branch-type")
def branch_objects():
    @kernel
    def k(n: i32, out: Tensor[f32, M]):
        for m in tiles(M):
            if n > 0:
                x = "one"  # here
            else:
                x = "two"
            out[m] = 1.0 if x == "one" else 2.0

    return k


@case("carried-type", "zeros(m")
def carried_scalar_becomes_tile():
    @kernel
    def k(a: Tensor[f32, M, K], out: Tensor[f32, M]):
        for m in tiles(M):
            acc = 0.0
            for j in tiles(K):
                acc = acc + sum(a[m, j], over=j)  # here
            out[m] = acc

    return k


@case("carried-type", ".to(bf16)")
def carried_dtype():
    @kernel
    def k(a: Tensor[bf16, M], out: Tensor[bf16, 1]):
        x = full(value=0, dtype=bf16)
        for m in each(M):
            x = x.to(f32) + a[m].to(f32)  # here
        out[0] = x

    return k


@case("carried-kind")
def carried_tuple():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        pair = (0.0, 1.0)
        for m in each(M):  # here
            out[m] = pair[0] + a[m]
            pair = (1.0, 2.0)

    return k


# Axes taken in their order.


@case("whole-axis", "n = whole")
def scan_of_a_tile():
    @kernel
    def k(a: Tensor[f32, N], out: Tensor[f32, N]):
        for n in tiles(N):
            out[n] = sp.cumsum(a[n], over=n)  # here

    return k


@case("whole-axis")
def results_along_a_loop():
    @kernel
    def k(a: Tensor[f32, N], out: Tensor[f32, K]):
        n = whole(N)
        for k in tiles(K):
            out[k] = sp.topk(a[n], k, over=n)[0]  # here

    return k


@case("unknown-axis", "k = whole(8)")
def topk_counts_by_its_own_axis():
    @kernel
    def k(a: Tensor[f32, N], out: Tensor[f32, N]):
        n = whole(N)
        out[n] = sp.topk(a[n], n, over=n)[0]  # here

    return k


@case("unknown-axis")
def topk_with_a_number():
    @kernel
    def k(a: Tensor[f32, N], out: Tensor[f32, N]):
        n = whole(N)
        out[n] = sp.topk(a[n], 8, over=n)[0]  # here

    return k


@case("over", "over=n")
def scan_without_over():
    @kernel
    def k(a: Tensor[f32, N], out: Tensor[f32, N]):
        n = whole(N)
        out[n] = sp.cumsum(a[n])  # here

    return k


@case("op-dtype", "to(i32)")
def scan_of_bools():
    @kernel
    def k(a: Tensor[bool, N], out: Tensor[bool, N]):
        n = whole(N)
        out[n] = sp.cummax(a[n], over=n)  # here

    return k


# Views.


@case("view", "a.view(M, N // 2, 2)")
def view_of_other_elements():
    @kernel
    def k(a: Tensor[f32, M, N], out: Tensor[f32, M]):
        halves = a.view(M, N, 2)  # here
        for m in tiles(M):
            out[m] = halves[m, 0, 0]

    return k


@case("view")
def view_that_leaves_a_rest():
    @kernel
    def k(a: Tensor[f32, 10], out: Tensor[f32, 2]):
        out[0] = a.view(10 // 4, 4)[1, 1]  # here

    return k


@case("bad-argument", "span")
def view_with_a_run_time_extent():
    @kernel
    def k(a: Tensor[f32, N], length: i32, out: Tensor[f32, 2]):
        out[0] = a.view(length, 2)[0, 0]  # here

    return k


@case("bad-argument")
def view_as_something_else():
    @kernel
    def k(a: Tensor[f32, N], out: Tensor[f32, 2]):
        out[0] = a.view(dtype=3)[0]  # here

    return k


@case("out-of-bounds")
def index_outside_a_view():
    @kernel
    def k(a: Tensor[f32, N], out: Tensor[f32, 2]):
        out[0] = a.view(N // 16, 16)[0, 16]  # here

    return k


# Races.


@case("write-race", "index out with k")
def store_without_parallel_axis():
    @kernel
    def k(a: Tensor[f32, M, K], out: Tensor[f32, M]):
        for m in tiles(M):
            for k in tiles(K):  # noqa: B007
                out[m] = a[m, 0]  # here

    return k


@case("contract-parallel-axis", "acc += ...")
def accumulation_in_memory():
    @kernel
    def k(a: Tensor[f32, M, K], b: Tensor[f32, K, N], out: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            for k in tiles(K):
                out[m, n] += a[m, k] @ b[k, n]  # here

    return k


@case("write-race", "range(...)")
def same_element_in_each():
    @kernel
    def k(a: Tensor[f32, B], out: Tensor[f32, 1]):
        for b in each(B):
            out[0] = a[b]  # here

    return k


@case("write-race", "each")
def two_stores_that_meet():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(span(0, M - 1)):
            out[m] = a[m]
            out[m + 1] = a[m]  # here

    return k


@case("write-race", "loop")
def scatter_of_a_whole_axis():
    @kernel
    def k(a: Tensor[f32, M], places: Tensor[i32, M], out: Tensor[f32, N]):
        m = whole(M)
        out[places[m]] = a[m]  # here

    return k


@case("write-race", "each")
def order_depends_on_the_tile_size():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, N]):
        for m in tiles(span(0, M - 3)):
            for j in range(3):
                out[m + j] = a[m]  # here

    return k


@case("read-after-write", "each")
def recurrence_in_tiles():
    @kernel
    def k(a: Tensor[f32, M]):
        for m in tiles(span(1, M)):
            a[m] = a[m - 1] + 1.0  # here

    return k


@case("read-after-write", "after the loop")
def read_of_a_sum_that_is_not_complete():
    @kernel
    def k(a: Tensor[f32, M], places: Tensor[i32, M], out: Tensor[f32, N], y: Tensor[f32, M]):
        for m in tiles(M):
            out[places[m]] += a[m]
            y[m] = out[places[m]]  # here

    return k


@case("write-race", "after the loop")
def store_to_a_sum_that_is_not_complete():
    @kernel
    def k(a: Tensor[f32, M], places: Tensor[i32, M], out: Tensor[f32, N]):
        for m in tiles(M):
            out[places[m]] += a[m]
            out[places[m]] = a[m]  # here

    return k


@case("write-race", "each")
def sum_that_the_tile_size_would_repeat():
    @kernel
    def k(a: Tensor[f32, M, N], places: Tensor[i32, M], out: Tensor[f32, N]):
        for m, _ in tiles(M, N):
            out[places[m]] += 1.0  # here

    return k


@case("read-after-write", "each")
def product_at_places_that_may_repeat():
    @kernel
    def k(a: Tensor[f32, M], places: Tensor[i32, M], out: Tensor[f32, N]):
        for m in tiles(M):
            out[places[m]] *= a[m]  # here

    return k


@case("disjoint", "store total to a tensor")
def assertion_on_a_loop_that_carries():
    @kernel
    def k(a: Tensor[f32, B], out: Tensor[f32, 1]):
        total = zeros(dtype=f32)
        for b in each(B, disjoint=True):  # here
            total += a[b]
        out[0] = total

    return k


@case("call-arguments")
def assertion_on_tiles():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M, disjoint=True):  # here
            out[m] = a[m]

    return k


@case("bad-argument")
def assertion_of_no_bool():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in each(M, disjoint=3):  # here
            out[m] = a[m]

    return k


@case("write-race")
def assertion_that_certainly_fails():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in each(M, disjoint=True):
            out[0] = a[m]  # here

    return k


@case("unsupported-statement", "name each value")
def starred_name():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        first, *_ = (1.0, 2.0, 3.0)  # here
        for m in tiles(M):
            out[m] = a[m] * first

    return k


@case("unsupported-expression", "outside the kernel")
def string_with_values():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        name = f"a{M}"  # noqa: F841  # here
        for m in tiles(M):
            out[m] = a[m]

    return k


@case("not-a-function", "write def")
def kernel_of_a_class():
    @kernel  # here
    class K:
        pass

    return K


@case("not-a-function", "write def")
def kernel_of_a_builtin():
    return kernel(len)  # here


@case("not-a-function", "write def")
def kernel_that_waits():
    @kernel  # here
    async def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        pass

    return k


@case("not-a-function", "write def")
def kernel_of_a_lambda():
    return kernel(lambda a, out: None)  # here


@pytest.mark.parametrize(("kind", "mend", "make"), CASES, ids=[make.__name__ for _, _, make in CASES])
def test_error(kind: str, mend: str, make: Callable[[], Any]) -> None:
    with pytest.raises(KernelError) as caught:
        make().tile_ir()
    error = caught.value
    assert error.kind == kind, str(error)
    assert error.file == __file__
    lines, first = inspect.getsourcelines(make)
    blamed = [first + position for position, line in enumerate(lines) if "# here" in line]
    if not blamed:  # the error is in a function that the kernel calls
        source = inspect.getsource(inspect.getmodule(make)).splitlines()
        blamed = [position + 1 for position, line in enumerate(source) if line.endswith(f"# blamed: {kind}")]
        assert "called from" in str(error)
    assert error.line in blamed, str(error)
    assert mend in error.mend, str(error)
    assert error.found and error.expected and error.mend
    text = str(error)
    shown = [line for line in text.splitlines() if line.strip().startswith(f"{error.line} |")]
    assert len(shown) == 1
    assert set(text.splitlines()[text.splitlines().index(shown[0]) + 1].partition("|")[2].strip()) == {"^"}


def test_every_kind_has_a_case():
    tested = {kind for kind, _, _ in CASES}
    assert set(KINDS) - tested == {"constant-changed"}      # of a call: test_parts.py


def test_caret_is_under_the_expression():
    @kernel
    def k(a: Tensor[bf16, M], b: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = exp(b[m]) + a[m]

    with pytest.raises(KernelError) as caught:
        k.tile_ir()
    error = caught.value
    line = error.source
    assert line[error.location.column - 1 : error.location.end_column - 1] == "exp(b[m]) + a[m]"
    assert str(error).splitlines()[0] == "+ mixes f32 and bf16 [dtype-mix]"
    assert "found:    f32 and bf16" in str(error)
    assert "expected: equal dtypes" in str(error)
    assert "mend:     write a[m].to(f32)" in str(error)


def test_columns_count_characters():
    @kernel
    def k(a: Tensor[bf16, M], b: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            ж = a[m]
            out[m] = b[m] + ж

    with pytest.raises(KernelError) as caught:
        k.tile_ir()
    error = caught.value
    assert error.source[error.location.column - 1 : error.location.end_column - 1] == "b[m] + ж"


def test_unknown_kind_is_refused():
    from sapper.ir.nodes import Location

    with pytest.raises(ValueError, match="unknown kind"):
        KernelError("no-such-kind", "x", Location("f", 1), "", "", "")


def test_call_error_is_a_type_and_a_value_error():
    error = sp.CallError("dtype", "argument a has the wrong dtype", "a", "f64", "f32", "write a.astype(np.float32)")
    assert isinstance(error, TypeError) and isinstance(error, ValueError)
    assert "found:    f64" in str(error) and "mend:     write a.astype" in str(error)


def test_builtins_outside_a_kernel():
    with pytest.raises(RuntimeError, match="outside a kernel"):
        exp(1.0)
