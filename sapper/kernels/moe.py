"""A mixture of experts: each token goes through the experts that its gate chose, and their results are added up.

Weights of all experts lie together: gate and up [E, F, I], down [E, I, F], from I features to F hidden ones and back.

One token reads the weights of its K experts and no others, as panels [E, B, I, L] of L output features, each of which
is one stream from memory; its vectors of output features are [B, L]:

    expert_matvec_swiglu    y[k] = silu(gate[e] @ x) * (up[e] @ x), e = experts[k]
    expert_matvec           y = residual + sum over k of weights[k] * products[k], products[k] = w[e] @ x[k]

Many tokens are put in the order of their experts, so that each expert's rows are one range, empty for some experts:

    group_tokens            where the row of each (token, expert) goes, and where each expert's rows begin and end
    grouped_matmul_swiglu   y[m] = silu(x[m] @ gate[e].T) * (x[m] @ up[e].T) for the rows m of each expert e
    grouped_matmul          y[m] = x[m] @ w[e].T
    grouped_matvec_swiglu, grouped_matvec   the same row by row, for experts of a few rows: an expert's block of weights
                            comes from memory for the first of its rows, and from the caches for the others
    combine_experts         y[t] = residual[t] + sum over k of weights[t, k] * rows[place[t, k]]

The rows themselves are gathered by `embedding_f32`. Groups may have any length, so the matrix kernels walk blocks of
output features outside and experts inside: what a core writes is then its own, whatever the lengths are. Their weights
are viewed as [E, B, L, ...], B blocks of L output features (`blocks_of`), which those of panels are as well when two
axes change places.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, each, f32, i8, i32, span, tiles, whole, zeros

from .activation import silu, silu_reference
from .record import (
    EXACT,
    NUMPY_DTYPES,
    Arguments,
    Array,
    Case,
    LibraryKernel,
    Shape,
    Tolerance,
    normal,
    rounded_to_bf16,
    unwritten,
)

T, K, E, F, I, J, B, L = sp.dims("T K E F I J B L")
LARGEST_BLOCK, SMALLEST_BLOCK = 64, 16
"""Output features that a core takes at once: their weights of one expert stay in its second cache."""
PANEL = 32
"""The same of panels. On a Zen 4 they stream at 90 % of what plain reads reach, panels of 64 at 78."""


def blocks_of(features: int, largest: int = LARGEST_BLOCK) -> tuple[int, int]:
    """B and L for that many output features: equal blocks of at most `largest`, or one if they would be tiny."""
    sizes = [size for size in range(SMALLEST_BLOCK, largest + 1) if features % size == 0]
    size = sizes[-1] if sizes else max(1, features)
    return features // size, size


LINE, PAGE = 16, 1024
"""Numbers in f32."""


def row_apart(columns: int) -> int:
    """From a row of so many numbers in f32 to the next: a line further where rows would share a few sets of a first
    cache, as many are read side by side. Of 16 experts of 768 x 1024 in fp8 (moe_fp8.py), 2048 rows on a Cascade Lake,
    gate and up take 0.65 of the time so, `down` 0.74."""
    return columns + (LINE if columns % (PAGE // 2) == 0 else 0)


def make_expert_matvec_swiglu(weight: Any) -> Any:
    @sp.kernel(name=f"expert_matvec_swiglu_{weight.name}")
    def expert_matvec_swiglu(
        gate: Tensor[weight, E, B, I, L], up: Tensor[weight, E, B, I, L], experts: Tensor[i32, K], x: Tensor[f32, I],
        y: Tensor[f32, K, B, L],
    ):
        for k, b in each(K, B):
            e = experts[k]
            l = whole(L)
            gate_sum = zeros(l, dtype=f32)
            up_sum = zeros(l, dtype=f32)
            for i in tiles(I):
                gate_sum += gate[e, b, i, l] @ x[i]
                up_sum += up[e, b, i, l] @ x[i]
            y[k, b, l] = silu(gate_sum) * up_sum

    return expert_matvec_swiglu


def add_products(weights: Any, products: Any, residual: Any, y: Any, panel: Any, l: Any) -> None:
    """y = residual + sum over k of weights[k] * products[k], of a panel of features."""
    total = residual[panel, l]
    for k in range(K):
        total += weights[k] * products[k, panel, l]
    y[panel, l] = total


def make_expert_matvec(weight: Any) -> Any:
    @sp.kernel(name=f"expert_matvec_{weight.name}")
    def expert_matvec(
        w: Tensor[weight, E, B, I, L], experts: Tensor[i32, K], weights: Tensor[f32, K], x: Tensor[f32, K, I],
        residual: Tensor[f32, B, L], products: Tensor[f32, K, B, L], y: Tensor[f32, B, L],
    ):
        # An expert's panels are read in one go, and not a panel of each expert by turns: where a stream begins, memory
        # is waited for, and what was asked for ahead of where it ends is of no use.
        for k, b in each(K, B):
            e = experts[k]
            l = whole(L)
            acc = zeros(l, dtype=f32)
            for i in tiles(I):
                acc += w[e, b, i, l] @ x[k, i]
            products[k, b, l] = acc
        for b in each(B):
            l = whole(L)
            add_products(weights, products, residual, y, b, l)

    return expert_matvec


@sp.kernel
def group_tokens(
    experts: Tensor[i32, T, K], start: Tensor[i32, E], stop: Tensor[i32, E], place: Tensor[i32, T, K],
    tokens: Tensor[i32, J],
):
    """Rows start[e] ... stop[e] - 1 are those of expert e, in the order of their tokens; row place[t, k] is that of
    token t and its expert k; tokens[row] is the token. J = T * K. A counting sort, in order.
    """
    for e in range(E):
        stop[e] = zeros(dtype=i32)
    for t in range(T):
        for k in range(K):
            stop[experts[t, k]] = stop[experts[t, k]] + 1
    rows = zeros(dtype=i32)
    for e in range(E):
        count = stop[e]
        start[e] = rows
        stop[e] = rows
        rows = rows + count
    token = zeros(dtype=i32)
    for t in range(T):
        for k in range(K):
            e = experts[t, k]
            row = stop[e]
            place[t, k] = row
            tokens[row] = token
            stop[e] = row + 1
        token = token + 1


def make_grouped_matmul_swiglu(weight: Any, left: Any = f32) -> Any:
    """left: of x, and of y, as the product that takes that rounds it again."""

    @sp.kernel(name=f"grouped_matmul_swiglu_{weight.name}" + ("_bf16" if left is bf16 else ""))
    def grouped_matmul_swiglu(
        x: Tensor[left, J, I], start: Tensor[i32, E], stop: Tensor[i32, E], gate: Tensor[weight, E, B, L, I],
        up: Tensor[weight, E, B, L, I], y: Tensor[left, J, B, L],
    ):
        for b in each(B):
            for e in each(E):
                for m, l in tiles(span(start[e], stop[e]), L):
                    gate_sum = zeros(m, l, dtype=f32)
                    up_sum = zeros(m, l, dtype=f32)
                    for i in tiles(I):
                        row = x[m, i]
                        gate_sum += row @ gate[e, b, l, i]
                        up_sum += row @ up[e, b, l, i]
                    y[m, b, l] = (silu(gate_sum) * up_sum).to(left)

    return grouped_matmul_swiglu


def make_grouped_matmul(weight: Any, left: Any = f32, result: Any = f32) -> Any:
    @sp.kernel(name=f"grouped_matmul_{weight.name}" + ("_bf16" if left is bf16 else ""))
    def grouped_matmul(
        x: Tensor[left, J, F], start: Tensor[i32, E], stop: Tensor[i32, E], w: Tensor[weight, E, B, L, F],
        y: Tensor[result, J, B, L],
    ):
        for b in each(B):
            for e in each(E):
                for m, l in tiles(span(start[e], stop[e]), L):
                    acc = zeros(m, l, dtype=result)
                    for f in tiles(F):
                        acc += x[m, f] @ w[e, b, l, f]
                    y[m, b, l] = acc

    return grouped_matmul


def make_grouped_matvec_swiglu(weight: Any) -> Any:
    @sp.kernel(name=f"grouped_matvec_swiglu_{weight.name}")
    def grouped_matvec_swiglu(
        x: Tensor[f32, J, I], start: Tensor[i32, E], stop: Tensor[i32, E], gate: Tensor[weight, E, B, L, I],
        up: Tensor[weight, E, B, L, I], y: Tensor[f32, J, B, L],
    ):
        for b in each(B):
            for e in range(E):
                for m in range(start[e], stop[e]):
                    for l in tiles(L):
                        gate_sum = zeros(l, dtype=f32)
                        up_sum = zeros(l, dtype=f32)
                        for i in tiles(I):
                            row = x[m, i]
                            gate_sum += gate[e, b, l, i] @ row
                            up_sum += up[e, b, l, i] @ row
                        y[m, b, l] = silu(gate_sum) * up_sum

    return grouped_matvec_swiglu


def make_grouped_matvec(weight: Any) -> Any:
    @sp.kernel(name=f"grouped_matvec_{weight.name}")
    def grouped_matvec(
        x: Tensor[f32, J, F], start: Tensor[i32, E], stop: Tensor[i32, E], w: Tensor[weight, E, B, L, F],
        y: Tensor[f32, J, B, L],
    ):
        for b in each(B):
            for e in range(E):
                for m in range(start[e], stop[e]):
                    for l in tiles(L):
                        acc = zeros(l, dtype=f32)
                        for f in tiles(F):
                            acc += w[e, b, l, f] @ x[m, f]
                        y[m, b, l] = acc

    return grouped_matvec


@sp.kernel
def combine_experts(
    rows: Tensor[f32, J, I], place: Tensor[i32, T, K], weights: Tensor[f32, T, K], residual: Tensor[f32, T, I],
    y: Tensor[f32, T, I],
):
    for t in each(T):
        i = whole(I)
        total = residual[t, i]
        for k in range(K):
            total = total + weights[t, k] * rows[place[t, k], i]
        y[t, i] = total


expert_matvec_swiglu_f32 = make_expert_matvec_swiglu(f32)
expert_matvec_swiglu_bf16 = make_expert_matvec_swiglu(bf16)
expert_matvec_f32 = make_expert_matvec(f32)
expert_matvec_bf16 = make_expert_matvec(bf16)
grouped_matmul_swiglu_f32 = make_grouped_matmul_swiglu(f32)
grouped_matmul_swiglu_bf16 = make_grouped_matmul_swiglu(bf16)
grouped_matmul_swiglu_bf16_bf16 = make_grouped_matmul_swiglu(bf16, bf16)
grouped_matmul_f32 = make_grouped_matmul(f32)
grouped_matmul_bf16 = make_grouped_matmul(bf16)
grouped_matmul_bf16_bf16 = make_grouped_matmul(bf16, bf16)
grouped_matvec_swiglu_f32 = make_grouped_matvec_swiglu(f32)
grouped_matvec_swiglu_bf16 = make_grouped_matvec_swiglu(bf16)
grouped_matvec_f32 = make_grouped_matvec(f32)
grouped_matvec_bf16 = make_grouped_matvec(bf16)
grouped_matmul_i8 = make_grouped_matmul(i8, i8, i32)

# ------------------------------------------------------------------------------------------- references and arguments


def _swiglu(x: Array, gate: Array, up: Array) -> Array:
    y: Array = silu_reference(gate.astype(np.float64) @ x) * (up.astype(np.float64) @ x)
    return y


def _rows(panels: Array) -> Array:
    """Panels [..., B, I, L] as rows [..., B * L, I], exact."""
    *before, b, i, l = panels.shape
    rows: Array = panels.astype(np.float64).swapaxes(-1, -2).reshape(*before, b * l, i)
    return rows


def matvec_swiglu_reference(arguments: Arguments) -> dict[str, Array]:
    y = np.empty(arguments["y"].shape)
    for k, e in enumerate(arguments["experts"]):
        gate, up = (_rows(arguments[name][e]) for name in ("gate", "up"))
        y[k] = _swiglu(arguments["x"].astype(np.float64), gate, up).reshape(y.shape[1:])
    return {"y": y}


def matvec_reference(arguments: Arguments) -> dict[str, Array]:
    products = np.empty(arguments["products"].shape)
    for k, e in enumerate(arguments["experts"]):
        products[k] = (_rows(arguments["w"][e]) @ arguments["x"][k]).reshape(products.shape[1:])
    total = np.einsum("k,kbl->bl", arguments["weights"].astype(np.float64), products)
    return {"products": products, "y": arguments["residual"] + total}


def group_reference(arguments: Arguments) -> dict[str, Array]:
    experts = arguments["experts"]
    order = np.argsort(experts, axis=None, kind="stable")
    place = np.empty(experts.size, np.int32)
    place[order] = np.arange(experts.size)
    stop = np.cumsum(np.bincount(experts.reshape(-1), minlength=arguments["start"].size))
    start = np.concatenate([[0], stop[:-1]])
    return {"start": start, "stop": stop, "place": place.reshape(experts.shape), "tokens": order // experts.shape[1]}


def grouped_reference(arguments: Arguments) -> dict[str, Array]:
    x = arguments["x"].astype(np.float64)
    y = np.empty((len(x), arguments["y"].shape[1] * arguments["y"].shape[2]))

    def matrix(name: str, e: int) -> Array:
        rows: Array = arguments[name][e].reshape(y.shape[1], x.shape[1])
        return rows

    for e, (start, stop) in enumerate(zip(arguments["start"], arguments["stop"], strict=True)):
        if "gate" in arguments:
            y[start:stop] = _swiglu(x[start:stop].T, matrix("gate", e), matrix("up", e)).T
        else:
            y[start:stop] = x[start:stop] @ matrix("w", e).astype(np.float64).T
    return {"y": y.reshape(arguments["y"].shape)}


def combine_reference(arguments: Arguments) -> dict[str, Array]:
    rows = arguments["rows"].astype(np.float64)[arguments["place"]]
    return {"y": arguments["residual"] + (arguments["weights"][:, :, None] * rows).sum(axis=1)}


def _weights(random: "np.random.Generator", weight: str, *extents: int) -> Array:
    """Scaled by 1 / sqrt of what is summed over, so that results are near 1."""
    return normal(random, *extents, dtype=weight, scale=1.0 / np.sqrt(extents[-1] + 1.0))


def matvec_arguments(random: "np.random.Generator", shape: Shape, weight: str, swiglu: bool) -> Arguments:
    e, k, b, i, l = (shape[name] for name in "EKBIL")
    names = ("gate", "up") if swiglu else ("w",)
    panels = {name: normal(random, e, b, i, l, dtype=weight, scale=1.0 / np.sqrt(i + 1.0)) for name in names}
    experts = {"experts": random.permutation(e)[:k].astype(np.int32)}
    if swiglu:
        return panels | experts | {"x": normal(random, i), "y": unwritten(k, b, l)}
    return panels | experts | {"weights": random.random(k, np.float32), "x": normal(random, k, i),
                               "residual": normal(random, b, l), "products": unwritten(k, b, l),
                               "y": unwritten(b, l)}


def group_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    t, k, e = shape["T"], shape["K"], shape["E"]
    experts = np.stack([random.permutation(e)[:k] for _ in range(t)]) if t else np.empty((0, k))
    return {
        "experts": experts.astype(np.int32), "start": unwritten(e, dtype="i32"), "stop": unwritten(e, dtype="i32"),
        "place": unwritten(t, k, dtype="i32"), "tokens": unwritten(t * k, dtype="i32"),
    }


def grouped_arguments(random: "np.random.Generator", shape: Shape, weight: str, swiglu: bool,
                      left: str = "f32") -> Arguments:
    """Experts of uneven load: every third has no rows."""
    e, b, l, j = shape["E"], shape["B"], shape["L"], shape["J"]
    busy = [n for n in range(e) if n % 3 != 1] or [0]
    counts = np.bincount(random.choice(busy, j), minlength=e)
    stop = np.cumsum(counts).astype(np.int32)
    depth = shape["I" if swiglu else "F"]
    names = ("gate", "up") if swiglu else ("w",)
    ranges = {"start": (stop - counts).astype(np.int32), "stop": stop}
    if weight == "i8":
        x, w = (random.integers(-128, 128, extents).astype(np.int8) for extents in ((j, depth), (e, b, l, depth)))
        return {"x": x} | ranges | {"w": w, "y": unwritten(j, b, l, dtype="i32")}
    ranges = {"x": normal(random, j, depth, dtype=left)} | ranges
    y = unwritten(j, b, l, dtype=left if swiglu else "f32")
    return ranges | {name: _weights(random, weight, e, b, l, depth) for name in names} | {"y": y}


def combine_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    t, k, i = shape["T"], shape["K"], shape["I"]
    return {
        "rows": normal(random, t * k, i), "place": random.permutation(t * k).reshape(t, k).astype(np.int32),
        "weights": random.random((t, k), np.float32), "residual": normal(random, t, i), "y": unwritten(t, i),
    }


TOLERANCE = Tolerance(
    1e-5, 2e-5, "a sum of rounded products near 1 / sqrt(count) in any order: near 2**-24 * sqrt(count) in practice"
)


def _matvec_entry(kernel: Any, weight: str, swiglu: bool) -> LibraryKernel:
    size, count = NUMPY_DTYPES[weight].itemsize, 2 if swiglu else 1
    cases = []
    for e, k, hidden, features in ((18, 6, 768, 1024), (66, 8, 1408, 2048)):
        outputs, inputs = (hidden, features) if swiglu else (features, hidden)
        b, l = blocks_of(outputs, PANEL)
        vectors = inputs + k * outputs if swiglu else k * inputs + (2 + k) * outputs + k
        cases.append(Case({"E": e, "K": k, "B": b, "I": inputs, "L": l}, flops=2 * count * k * hidden * features,
                          bytes=count * k * hidden * features * size + 4 * (vectors + k)))
    shapes = (1, 1, 1, 1, 1), (5, 3, 1, 19, 7), (4, 4, 2, 64, 24), (3, 2, 3, 100, 32)
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=matvec_swiglu_reference if swiglu else matvec_reference,
        make_arguments=lambda random, shape: matvec_arguments(random, shape, weight, swiglu), tolerance=TOLERANCE,
        cases=tuple(cases),
        check_shapes=tuple(dict(zip("EKBIL", shape, strict=True)) for shape in shapes),
        dtype=weight,
    )


def _grouped_entry(kernel: Any, weight: str, swiglu: bool, left: str = "f32", rows: int = 2048) -> LibraryKernel:
    """left: the type of the activations; of i8 the sums are i32. rows: of the case."""
    size, left_size = (1 if name == "i8" else NUMPY_DTYPES[name].itemsize for name in (weight, left))
    count = 2 if swiglu else 1
    inner = "I" if swiglu else "F"

    def shape(e: int, b: int, l: int, depth: int, j: int) -> dict[str, int]:
        return {"E": e, "B": b, "L": l, inner: depth, "J": j}

    e, b, l, depth, j = (16, 12, 64, 1024, rows) if swiglu else (16, 16, 64, 768, rows)
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=grouped_reference,
        make_arguments=lambda random, shape: grouped_arguments(random, shape, weight, swiglu, left),
        tolerance=Tolerance(0.0, 0.0, "sums of integers are exact") if weight == "i8" else
        rounded_to_bf16(TOLERANCE) if swiglu and left == "bf16" else TOLERANCE,
        cases=(Case(shape(e, b, l, depth, j), flops=2 * count * j * b * l * depth,
                    bytes=count * e * b * l * depth * size + j * (
                        (left_size if swiglu else 4) * b * l + left_size * depth) + 8 * e),),
        check_shapes=(shape(2, 1, 3, 4, 0), shape(1, 1, 1, 1, 1), shape(5, 1, 7, 3, 11), shape(7, 2, 35, 33, 29),
                      shape(3, 5, 13, 130, 40)),
        dtype=weight, products=left,
    )


KERNELS = (
    _matvec_entry(expert_matvec_swiglu_f32, "f32", True),
    _matvec_entry(expert_matvec_swiglu_bf16, "bf16", True),
    _matvec_entry(expert_matvec_f32, "f32", False),
    _matvec_entry(expert_matvec_bf16, "bf16", False),
    LibraryKernel(
        name="group_tokens", kernel=group_tokens, reference=group_reference, make_arguments=group_arguments,
        tolerance=EXACT,
        cases=(Case({"T": 512, "K": 6, "E": 18}, flops=0, bytes=4 * (3 * 512 * 6 + 2 * 18)),),
        check_shapes=({"T": 0, "K": 2, "E": 3}, {"T": 1, "K": 1, "E": 1}, {"T": 5, "K": 3, "E": 9},
                      {"T": 20, "K": 2, "E": 4}),
    ),
    _grouped_entry(grouped_matmul_swiglu_f32, "f32", True),
    _grouped_entry(grouped_matmul_swiglu_bf16, "bf16", True),
    _grouped_entry(grouped_matmul_swiglu_bf16_bf16, "bf16", True, "bf16"),
    _grouped_entry(grouped_matmul_f32, "f32", False),
    _grouped_entry(grouped_matmul_bf16, "bf16", False),
    _grouped_entry(grouped_matmul_bf16_bf16, "bf16", False, "bf16"),
    _grouped_entry(grouped_matmul_i8, "i8", False, "i8"),
    _grouped_entry(grouped_matvec_swiglu_f32, "f32", True, rows=24),
    _grouped_entry(grouped_matvec_swiglu_bf16, "bf16", True, rows=24),
    _grouped_entry(grouped_matvec_f32, "f32", False, rows=24),
    _grouped_entry(grouped_matvec_bf16, "bf16", False, rows=24),
    LibraryKernel(
        name="combine_experts", kernel=combine_experts, reference=combine_reference, make_arguments=combine_arguments,
        tolerance=Tolerance(1e-6, 2e-6, "a sum of a few rounded products, which may cancel"),
        cases=(Case({"T": 512, "K": 6, "I": 1024}, flops=2 * 512 * 6 * 1024,
                    bytes=4 * (512 * 6 * 1024 + 2 * 512 * 6 + 2 * 512 * 1024)),),
        check_shapes=({"T": 0, "K": 2, "I": 3}, {"T": 1, "K": 1, "I": 1}, {"T": 5, "K": 3, "I": 19},
                      {"T": 4, "K": 6, "I": 130}),
    ),
)
