"""The tile interpreter on small functions built by hand: loops, memory, errors, races."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from sapper.ir.nodes import Block, Builder, Function, Location, Op, Value
from sapper.ir.types import TensorType, TileType, bf16, f32, i8, i32, index
from sapper.tile.interpret import RaceError, interpret

INDEX = TileType(index)
PLACE = Location("kernel.py", 7, 5, 9)


class Make:
    """A function under construction, with shorthands for what kernels are full of."""

    def __init__(self, **arguments) -> None:
        self.function = Function("f", "tile")
        self.at = {name: self.function.add_argument(name, type) for name, type in arguments.items()}
        self.builder = Builder(self.function.body, PLACE)
        self.axes: dict[str, Value] = {}

    def const(self, value, dtype=index) -> Value:
        return self.builder.value("const", [], TileType(dtype), value=value)

    def dim(self, name: str) -> Value:
        op = Op("dim", [], [INDEX], {"name": name})
        self.builder.block.ops.append(op)
        return op.result

    def op(self, name: str, *operands: Value, dtype=None, axes=None, **attributes) -> Value:
        if axes is None:
            axes = tuple(dict.fromkeys(a for o in operands if isinstance(o.type, TileType) for a in o.type.axes))
        return self.builder.value(name, list(operands), TileType(dtype or operands[-1].type.dtype, axes), **attributes)

    def coordinate(self, axis: str) -> Value:
        return self.builder.value("index", [], TileType(index, (axis,)), axis=axis)

    def load(self, tensor: str, *indices: Value) -> Value:
        axes = tuple(dict.fromkeys(a for i in indices for a in i.type.axes))
        source = self.at[tensor]
        return self.builder.value("load", [source, *indices], TileType(source.type.dtype, axes))

    def store(self, tensor: str, value: Value, *indices: Value) -> None:
        self.builder.add("store", [self.at[tensor], value, *indices])

    def whole(self, axis: str, start: Value, stop: Value) -> Value:
        self.builder.add("whole", [start, stop], axis=axis)
        return self.coordinate(axis)

    def loop(self, name: str, bounds: list[Value], body, carried: tuple[Value, ...] = (), **attributes) -> list[Value]:
        count = attributes.get("count", 0)
        types = [v.type for v in carried]
        block = Block([INDEX] * count + types)
        op = self.builder.add(name, [*bounds, *carried], types, [block], **attributes)
        outer, self.builder.block = self.builder.block, block
        yielded = body(*block.arguments)
        self.builder.add("yield", list(yielded or ()))
        self.builder.block = outer
        return op.results

    def tiles(self, axes: list[str], bounds: list[Value], body, carried=(), parallel=True, **attributes) -> list[Value]:
        return self.loop("tiles", bounds, body, carried, axes=axes, parallel=parallel, **attributes)

    def each(self, bounds: list[Value], body, carried=(), parallel=True, **attributes) -> list[Value]:
        return self.loop("each", bounds, body, carried, count=len(bounds) // 2, parallel=parallel, **attributes)


def matmul() -> Function:
    make = Make(a=TensorType(bf16, ("M", "K")), b=TensorType(bf16, ("K", "N")), c=TensorType(f32, ("M", "N")))
    zero = make.const(0)

    def body():
        m, n = make.coordinate("m"), make.coordinate("n")
        start = make.op("full", make.const(0.0, f32), axes=("m", "n"))

        def inner(total):
            k = make.coordinate("k")
            product = make.op("contract", make.load("a", m, k), make.load("b", k, n), dtype=f32, axes=("m", "n"),
                              over=["k"])
            return [make.op("add", total, product)]

        (total,) = make.tiles(["k"], [zero, make.dim("K")], inner, (start,), parallel=False)
        make.store("c", total, m, n)

    make.tiles(["m", "n"], [zero, make.dim("M"), zero, make.dim("N")], body)
    return make.function


@pytest.mark.parametrize("sizes", [None, 1, 4, {"m": 3, "n": 100, "k": 2}])
@pytest.mark.parametrize("shape", [(5, 7, 9), (1, 1, 1), (0, 3, 2), (3, 2, 0)])
def test_matmul_means_the_same_for_every_tile_size(sizes, shape):
    rows, columns, depth = shape
    rng = np.random.default_rng(0)
    a = rng.standard_normal((rows, depth)).astype(ml_dtypes.bfloat16)
    b = rng.standard_normal((columns, depth)).astype(ml_dtypes.bfloat16).T  # strided
    c = np.full((rows, columns), np.nan, np.float32)
    interpret(matmul(), {"a": a, "b": b, "c": c}, sizes)
    np.testing.assert_allclose(c, a.astype(float) @ b.astype(float), rtol=1e-5, atol=1e-6)


def copy(stop_beyond: int = 0, shift: int = 0) -> Function:
    make = Make(x=TensorType(f32, ("M",)), out=TensorType(f32, ("M",)))

    def body():
        m = make.coordinate("m")
        make.store("out", make.load("x", make.op("add", m, make.const(shift))), m)

    stop = make.op("add", make.dim("M"), make.const(stop_beyond))
    make.tiles(["m"], [make.const(0), stop], body)
    return make.function


def test_out_of_bounds_names_everything():
    x, out = np.zeros(4, np.float32), np.zeros(4, np.float32)
    with pytest.raises(IndexError, match=r"kernel.py:7:5: load of x out of bounds: dimension 0 has extent 4, found "
                                         r"index 5; expected 0 <= index < 4"):
        interpret(copy(stop_beyond=2), {"x": x, "out": out})
    with pytest.raises(IndexError, match="found index -1"):
        interpret(copy(shift=-1), {"x": x, "out": out})
    interpret(copy(shift=3), {"x": x[:0], "out": out[:0]})  # nothing is accessed


def test_arguments_are_checked():
    x, out = np.zeros(4, np.float32), np.zeros(4, np.float32)
    with pytest.raises(ValueError, match=r"dimension 0 of out is 3; expected M = 4 \(from dimension 0 of x\)"):
        interpret(copy(), {"x": x, "out": out[:3]})
    with pytest.raises(TypeError, match="argument out holds float64; expected f32"):
        interpret(copy(), {"x": x, "out": np.zeros(4)})
    with pytest.raises(ValueError, match="argument x has 2 dimensions; expected 1"):
        interpret(copy(), {"x": np.zeros((4, 1), np.float32), "out": out})
    with pytest.raises(TypeError, match="'out' is missing"):
        interpret(copy(), {"x": x})
    with pytest.raises(TypeError, match="no parameter 'y'"):
        interpret(copy(), {"x": x, "out": out, "y": 1})
    with pytest.raises(TypeError, match="is a list"):
        interpret(copy(), {"x": [1.0], "out": out})
    fixed = Make(x=TensorType(f32, (3,)))
    with pytest.raises(ValueError, match="dimension 0 of x is 4; expected 3"):
        interpret(fixed.function, {"x": x})


def test_scalars():
    make = Make(n=TileType(i8), y=TileType(bf16), out=TensorType(i8, (1,)), wide=TensorType(bf16, (1,)))
    make.store("out", make.op("add", make.at["n"], make.at["n"]), make.const(0))
    make.store("wide", make.at["y"], make.const(0))
    out, wide = np.zeros(1, np.int8), np.zeros(1, ml_dtypes.bfloat16)
    interpret(make.function, {"n": 100, "y": 0.1, "out": out, "wide": wide})
    assert out[0] == -56 and wide[0] == ml_dtypes.bfloat16(0.1)
    with pytest.raises(OverflowError, match=r"n is 200; expected a i8 in -128 .. 127"):
        interpret(make.function, {"n": 200, "y": 0.1, "out": out, "wide": wide})
    with pytest.raises(TypeError, match="n is a float; expected a i8"):
        interpret(make.function, {"n": 1.5, "y": 0.1, "out": out, "wide": wide})
    with pytest.raises(TypeError, match="expected a scalar bf16"):
        interpret(make.function, {"n": 1, "y": np.zeros(2), "out": out, "wide": wide})


def test_each_with_step_and_carried_scalar():
    make = Make(x=TensorType(i32, ("M",)), out=TensorType(i32, (2,)))
    (total, count) = make.each(
        [make.const(1), make.dim("M")],
        lambda at, total, count: [make.op("add", total, make.load("x", at)),
                                  make.op("add", count, make.const(1, i32))],
        (make.const(0, i32), make.const(0, i32)), parallel=False, step=2)
    make.store("out", total, make.const(0))
    make.store("out", count, make.const(1))
    out = np.zeros(2, np.int32)
    interpret(make.function, {"x": np.arange(6, dtype=np.int32), "out": out})
    np.testing.assert_array_equal(out, [1 + 3 + 5, 3])
    interpret(make.function, {"x": np.arange(1, dtype=np.int32), "out": out})
    np.testing.assert_array_equal(out, [0, 0])


def test_each_of_two_runs_in_row_major_order():
    make = Make(out=TensorType(i32, ("M", "N")))

    def body(m, n, count):
        make.store("out", count, m, n)
        return [make.op("add", count, make.const(1, i32))]

    zero = make.const(0)
    make.each([zero, make.dim("M"), zero, make.dim("N")], body, (make.const(0, i32),), parallel=False)
    out = np.zeros((2, 3), np.int32)
    interpret(make.function, {"out": out})
    np.testing.assert_array_equal(out, np.arange(6).reshape(2, 3))


def test_if_takes_one_branch():
    make = Make(n=TileType(i32), x=TensorType(f32, (1,)), out=TensorType(f32, (1,)))
    blocks = [Block(), Block()]
    condition = make.op("gt", make.at["n"], make.const(0, i32))
    branch = make.builder.add("if", [condition], [TileType(f32)], blocks)
    for block, at in zip(blocks, (0, 100), strict=True):  # the second would be out of bounds
        make.builder.block = block
        make.builder.add("yield", [make.load("x", make.const(at))])
    make.builder.block = make.function.body
    make.store("out", branch.result, make.const(0))
    out = np.zeros(1, np.float32)
    interpret(make.function, {"n": 1, "x": np.ones(1, np.float32), "out": out})
    assert out[0] == 1.0
    with pytest.raises(IndexError, match="found index 100"):
        interpret(make.function, {"n": 0, "x": np.ones(1, np.float32), "out": out})


@pytest.mark.parametrize("size", [None, 1, 2])
def test_argmax_gives_absolute_coordinates(size):
    make = Make(x=TensorType(f32, ("M", "N")), out=TensorType(i32, ("M",)))

    def body():
        m = make.coordinate("m")
        n = make.whole("n", make.const(2), make.dim("N"))
        at = make.op("reduce", make.load("x", m, n), dtype=index, axes=("m",), kind="argmax", over=["n"])
        make.store("out", make.op("cast", at, dtype=i32), m)

    make.tiles(["m"], [make.const(0), make.dim("M")], body)
    x = np.array([[9, 9, 1, 5, 5], [9, 9, 3, 2, 1], [0, 0, 0, 0, 7]], np.float32)
    out = np.zeros(3, np.int32)
    interpret(make.function, {"x": x, "out": out}, size)
    np.testing.assert_array_equal(out, [3, 2, 4])


def test_gather_and_transposed_store():
    make = Make(table=TensorType(f32, ("V", "N")), at=TensorType(i32, ("M",)), out=TensorType(f32, ("N", "M")))
    zero = make.const(0)

    def body():
        m, n = make.coordinate("m"), make.coordinate("n")
        make.store("out", make.load("table", make.load("at", m), n), n, m)

    make.tiles(["m", "n"], [zero, make.dim("M"), zero, make.dim("N")], body)
    table, at = np.arange(12, dtype=np.float32).reshape(4, 3), np.array([3, 0, 3], np.int32)
    out = np.zeros((3, 3), np.float32)
    interpret(make.function, {"table": table, "at": at, "out": out}, check_races=True)
    np.testing.assert_array_equal(out, table[at].T)
    with pytest.raises(IndexError, match="load of table out of bounds: dimension 0 has extent 4, found index 4"):
        interpret(make.function, {"table": table, "at": at + 1, "out": out})


def scatter() -> Function:
    make = Make(at=TensorType(i32, ("M",)), out=TensorType(i32, ("N",)))

    def body():
        m = make.coordinate("m")
        make.store("out", make.op("cast", m, dtype=i32), make.load("at", m))

    make.tiles(["m"], [make.const(0), make.dim("M")], body)
    return make.function


def test_races():
    out = np.zeros(5, np.int32)
    interpret(scatter(), {"at": np.array([4, 0, 2], np.int32), "out": out}, check_races=True)
    np.testing.assert_array_equal(out, [1, 0, 2, 0, 0])
    with pytest.raises(RaceError, match=r"kernel.py:7:5: out\[4\] is written by two iterations of a parallel loop"):
        interpret(scatter(), {"at": np.array([4, 0, 4], np.int32), "out": out}, check_races=True)


def test_races_between_reads_and_writes():
    make = Make(x=TensorType(f32, ("M",)))

    def body(at):
        make.store("x", make.load("x", make.op("add", at, make.const(1))), at)

    make.each([make.const(0), make.op("sub", make.dim("M"), make.const(1))], body)
    with pytest.raises(RaceError, match=r"x\[1\] is written by one iteration of a parallel loop and read by another"):
        interpret(make.function, {"x": np.zeros(4, np.float32)}, check_races=True)
    interpret(make.function, {"x": np.zeros(4, np.float32)})
    interpret(make.function, {"x": np.zeros(2, np.float32)}, check_races=True)  # a single iteration


def test_a_store_that_writes_an_element_twice_is_a_race():
    make = Make(out=TensorType(i32, (1,)))
    n = make.whole("n", make.const(0), make.const(2))
    make.store("out", make.op("cast", n, dtype=i32), make.op("mul", n, make.const(0)))
    with pytest.raises(RaceError, match="written twice by one store"):
        interpret(make.function, {"out": np.zeros(1, np.int32)}, check_races=True)


def test_what_cannot_be_run_is_refused():
    make = Make(out=TensorType(i32, (1,)))
    make.op("nonsense", make.const(0, i32))
    with pytest.raises(ValueError, match=r"kernel.py:7:5: the tile interpreter knows no op 'nonsense'"):
        interpret(make.function, {"out": np.zeros(1, np.int32)})
    with pytest.raises(ValueError, match="tile size of axis m is 0"):
        interpret(copy(), {"x": np.zeros(1, np.float32), "out": np.zeros(1, np.float32)}, {"m": 0})
