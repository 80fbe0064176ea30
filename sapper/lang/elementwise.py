"""Elementwise operations: arithmetic, comparisons, functions, casts, choices.

Enters: operands (operands.py) with their nodes in the source. Leaves: tile IR ops, or a Python number where all
operands are Python's own. Holds: both sides of an op have one dtype, to which only weak numbers and index scalars are
brought by themselves; a result spans the axes of all operands; every other mix is an error that names the cast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..ir.extents import OPERATORS
from ..ir.nodes import Value
from ..ir.types import DType, TileType, bf16, bool_, f32, i32, i64, index
from .bindings import axes_of, dtype_of
from .operands import Operands

SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "mod": "%", "shl": "<<", "shr": ">>",
           "and": "&", "or": "|", "xor": "^", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
           "min": "minimum", "max": "maximum"}
PYTHON_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    **OPERATORS,
    "div": lambda a, b: a / b, "shl": lambda a, b: a << b, "shr": lambda a, b: a >> b,
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "min": lambda a, b: a if a < b else b, "max": lambda a, b: a if a > b else b,
}
PYTHON_UNARY: dict[str, Callable[[Any], Any]] = {
    "abs": abs, "exp": math.exp, "exp2": lambda x: 2.0**x, "log": math.log, "log2": math.log2, "sqrt": math.sqrt,
    "rsqrt": lambda x: 1.0 / math.sqrt(x), "tanh": math.tanh, "sigmoid": lambda x: 1.0 / (1.0 + math.exp(-x)),
    "erf": math.erf, "sin": math.sin, "cos": math.cos,
    "floor": lambda x: float(math.floor(x)), "ceil": lambda x: float(math.ceil(x)), "round": lambda x: float(round(x)),
}
UNARY_FLOAT = frozenset(PYTHON_UNARY) - {"abs"}
COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
MOVABLE = frozenset({"const", "dim", "index", "full", "cast", "bitcast", "select", "neg", "abs", "not", "add", "sub",
                     "mul", "div", "min", "max", "shl", "shr", "and", "or", "xor", *COMPARISONS, *UNARY_FLOAT})
"""Ops without effect or hazard, which may run though their result is not wanted (division by zero is a hazard)."""


class Elementwise(Operands):
    """Operands, and elementwise operations of them."""

    def unify(self, a: Any, b: Any, what: str, node: Any, a_node: Any, b_node: Any) -> tuple[Value, Value]:
        """Two operands, at least one of them a Value, brought to one dtype by the rules of the language."""
        if not isinstance(a, Value):
            return self.constant(a, dtype_of(b), a_node), b
        if not isinstance(b, Value):
            return a, self.constant(b, dtype_of(a), b_node)
        left: DType = dtype_of(a)
        right: DType = dtype_of(b)
        if left == right:
            return a, b
        if a in self.weak:
            if b not in self.weak or left.kind != "f":
                return self.strengthen(a, right, a_node), b
            return a, self.strengthen(b, left, b_node)
        if b in self.weak:
            return a, self.strengthen(b, left, b_node)
        if left.kind == "x" and right in (i32, i64):
            return a, self.raw_cast(b, index)
        if right.kind == "x" and left in (i32, i64):
            return self.raw_cast(a, index), b
        self.mix(left, right, what, node, a_node, b_node)

    def mix(self, left: DType, right: DType, what: str, node: Any, a_node: Any, b_node: Any) -> NoReturn:
        if left.kind == right.kind == "f":
            narrow, wide = (a_node, right) if left.bits < right.bits or left == bf16 else (b_node, left)
        elif (left.kind == "f") != (right.kind == "f"):
            narrow, wide = (b_node, left) if left.kind == "f" else (a_node, right)
        else:
            narrow, wide = (a_node, right) if left.bits < right.bits else (b_node, left)
        if wide.kind == "x":        # a coordinate takes the other's type, or what is computed would be an index
            small, coordinate = (left, b_node) if narrow is a_node else (right, a_node)
            mend = f"write {self.text(coordinate)}.to({small.name})"
        else:
            mend = f"write {self.text(narrow)}.to({wide.name})"
        self.fail("dtype-mix", f"{what} mixes {left.name} and {right.name}", node, f"{left.name} and {right.name}",
                  "equal dtypes", mend)

    def binary(self, name: str, a: Any, b: Any, node: Any, a_node: Any, b_node: Any) -> Any:
        """An elementwise op on two operands; two Python numbers give one."""
        a, b = self.operand(a, a_node), self.operand(b, b_node)
        symbol = SYMBOLS[name]
        if not isinstance(a, Value) and not isinstance(b, Value):
            try:
                return PYTHON_BINARY[name](a, b)
            except (ArithmeticError, TypeError, ValueError) as error:
                self.fail("constant-arithmetic", "arithmetic on constants fails", node,
                          f"{a!r} {symbol} {b!r}: {error}", "constants that it is defined for", "change the constants")
        for side, side_node in ((a, a_node), (b, b_node)):
            if isinstance(side, Value):
                self.need_compute(side, side_node, symbol)
        if name in ("floordiv", "mod") and not isinstance(b, Value) and b == 0:
            self.fail("constant-arithmetic", "division by zero", node, f"{symbol} 0",
                      "a divisor other than 0", "divide by something else")
        simple = self.simplified(name, a, b)
        if simple is not None:
            return simple
        weak = all(not isinstance(v, Value) or v in self.weak for v in (a, b))
        if weak:  # the wider kind of the two: a float if either is one
            kinds = [dtype_of(v) if isinstance(v, Value) else self.default_dtype(v)
                     for v in (a, b)]
            joint = f32 if f32 in kinds else i32 if i32 in kinds else kinds[0]
            if joint.kind != "b" and bool_ not in kinds:
                a, b = self.value(a, joint, a_node), self.value(b, joint, b_node)
        a, b = self.unify(a, b, symbol, node, a_node, b_node)
        dtype: DType = dtype_of(a)
        self.check_domain(name, dtype, symbol, node, a_node)
        self.at(node)
        axes = self.joined_axes(a, b)
        if name in COMPARISONS:
            return self.emit(name, [a, b], TileType(bool_, axes))
        result = self.emit(name, [a, b], TileType(dtype, axes))
        if dtype.kind in "xi" and dtype.size_bytes >= 4 and name in ("add", "sub", "mul") and result not in self.forms:
            left, right = self.form_of(a), self.form_of(b)
            if name == "mul":
                if not right.terms:
                    self.forms[result] = left.times(right.constant)
                elif not left.terms:
                    self.forms[result] = right.times(left.constant)
            else:
                self.forms[result] = left.plus(right, 1 if name == "add" else -1)
        if weak and name not in COMPARISONS:
            self.weak.add(result)
        return result

    def simplified(self, name: str, a: Any, b: Any) -> Any:
        """x + 0, x * 1 and the like on indices, which affine expressions of constants leave behind."""
        if isinstance(a, Value) and isinstance(b, int) and dtype_of(a).kind == "x":
            if (b == 0 and name in ("add", "sub")) or (b == 1 and name in ("mul", "floordiv")):
                return a
        elif (isinstance(b, Value) and isinstance(a, int) and dtype_of(b).kind == "x"
              and ((a == 0 and name == "add") or (a == 1 and name == "mul"))):
            return b
        return None

    def check_domain(self, name: str, dtype: DType, symbol: str, node: Any, a_node: Any) -> None:
        if name == "div" and dtype.kind != "f":
            self.fail("division-dtype", f"/ on {dtype.name}", node, dtype.name, "floats",
                      f"write // to divide integers, or {self.text(a_node)}.to(f32)")
        if name in ("floordiv", "mod", "shl", "shr") and dtype.kind not in "xiu":
            mend = "write floor(a / b)" if name == "floordiv" else "cast to an integer dtype"
            self.fail("op-dtype", f"{symbol} on {dtype.name}", node, dtype.name, "integers", mend)
        if name in ("and", "or", "xor") and dtype.kind == "f":
            self.fail("op-dtype", f"{symbol} on {dtype.name}", node, dtype.name, "integers or bools",
                      "compare first, or write .bits(i32)")
        if dtype.kind == "b" and name not in ("and", "or", "xor", "eq", "ne"):
            self.fail("op-dtype", f"{symbol} on bool", node, "bool", "numbers", f"write {self.text(a_node)}.to(f32)")

    def unary(self, name: str, a: Any, node: Any, a_node: Any) -> Any:
        """An elementwise function of one operand (also "neg"); a Python number gives one."""
        a = self.operand(a, a_node)
        if not isinstance(a, Value):
            try:
                return -a if name == "neg" else PYTHON_UNARY[name](a)
            except (ArithmeticError, ValueError) as error:
                self.fail("constant-arithmetic", f"{name} of a constant fails", node, f"{name}({a!r}): {error}",
                          "a constant that it is defined for", "change the constant")
        self.need_compute(a, a_node, name)
        dtype: DType = dtype_of(a)
        if a in self.weak and name in UNARY_FLOAT and dtype.kind != "f":
            a, dtype = self.raw_cast(a, f32), f32
            self.weak.add(a)
        if (name in UNARY_FLOAT and dtype.kind != "f") or dtype.kind == "b":
            wanted = "floats" if name in UNARY_FLOAT else "numbers"
            self.fail("op-dtype", f"{name} on {dtype.name}", node, dtype.name, wanted,
                      f"write {self.text(a_node)}.to(f32)")
        self.at(node)
        result = self.emit(name, [a], a.type)
        if name == "neg" and dtype.kind in "xi" and dtype.size_bytes >= 4:
            self.forms[result] = self.form_of(a).times(-1)
        if a in self.weak:
            self.weak.add(result)
        return result

    def invert(self, a: Any, node: Any, a_node: Any) -> Any:
        """~a"""
        a = self.operand(a, a_node)
        if not isinstance(a, Value):
            if isinstance(a, bool):
                return not a
            if isinstance(a, int):
                return ~a
            self.fail("op-dtype", "~ on a float", node, repr(a), "an integer or a bool",
                      "write -a, or convert it to an integer")
        self.need_compute(a, a_node, "~")
        if dtype_of(a).kind == "f":
            self.fail("op-dtype", f"~ on {dtype_of(a).name}", node, dtype_of(a).name,
                      "integers or bools", f"write {self.text(a_node)}.bits(i32)")
        self.at(node)
        return self.emit("not", [a], TileType(dtype_of(a), axes_of(a)))

    def power(self, a: Any, b: Any, node: Any, a_node: Any, b_node: Any) -> Any:
        """a ** b for a constant small integer b, as products."""
        a = self.operand(a, a_node)
        b = self.operand(b, b_node)
        if not isinstance(a, Value) and not isinstance(b, Value):
            try:
                result = a**b
            except ArithmeticError as error:
                self.fail("constant-arithmetic", "arithmetic on constants fails", node, f"{a!r} ** {b!r}: {error}",
                          "constants that it is defined for", "change the constants")
            if isinstance(result, complex):
                self.fail("constant-arithmetic", "arithmetic on constants fails", node, f"{a!r} ** {b!r} is complex",
                          "a real result", "take a positive base, or an integer power")
            return result
        if isinstance(b, float) and b.is_integer():
            b = int(b)
        if isinstance(b, Value) or not isinstance(b, int) or isinstance(b, bool) or not -16 <= b <= 16:
            mend = {0.5: "write sqrt(x)", -0.5: "write rsqrt(x)"}.get(b) if isinstance(b, float) else None
            self.fail("power", "** needs a small constant integer", node, self.describe(b), "an integer from -16 to 16",
                      mend or ("write exp2(x)" if a == 2 else "write exp(log(x) * y)"))
        if b < 0 and dtype_of(a).kind != "f":
            self.fail("power", "a negative power of an integer", node, f"{dtype_of(a).name} ** {b}", "a float",
                      f"write {self.text(a_node)}.to(f32)")
        if b == 0:
            one = self.constant(1, dtype_of(a), node)
            return self.emit("full", [one], TileType(dtype_of(a), axes_of(a))) if axes_of(a) else one
        result = None
        square, exponent = a, abs(b)
        while True:
            if exponent & 1:
                result = square if result is None else self.binary("mul", result, square, node, a_node, a_node)
            exponent >>= 1
            if not exponent:
                break
            square = self.binary("mul", square, square, node, a_node, a_node)
        return self.binary("div", 1, result, node, node, a_node) if b < 0 else result

    def where(self, condition: Any, a: Any, b: Any, node: Any, nodes: Sequence[Any]) -> Any:
        """a where the condition holds, else b."""
        condition = self.operand(condition, nodes[0])
        a, b = self.operand(a, nodes[1]), self.operand(b, nodes[2])
        if isinstance(condition, Value):
            if dtype_of(condition) != bool_:
                self.fail("op-dtype", "the condition of where is no bool", nodes[0], self.describe(condition), "bool",
                          f"write {self.text(nodes[0])} != 0")
        elif not isinstance(condition, bool):
            self.fail("op-dtype", "the condition of where is no bool", nodes[0], self.describe(condition), "bool",
                      f"write {self.text(nodes[0])} != 0")
        else:
            return a if condition else b
        a, b, weak = self.pair(a, b, "where", node, nodes[1], nodes[2])
        for side, side_node in ((a, nodes[1]), (b, nodes[2])):
            self.need_compute(side, side_node, "where")
        self.at(node)
        result = self.emit("select", [condition, a, b],
                           TileType(dtype_of(a), self.joined_axes(condition, a, b)))
        if weak:
            self.weak.add(result)
        return result

    def pair(self, a: Any, b: Any, what: str, node: Any, a_node: Any, b_node: Any) -> tuple[Value, Value, bool]:
        """Two operands of one dtype, numbers allowed on both sides; whether the result is weak."""
        weak = all(not isinstance(v, Value) or v in self.weak for v in (a, b))
        if weak:
            kinds = [dtype_of(v) if isinstance(v, Value) else self.default_dtype(v)
                     for v in (a, b)]
            joint = f32 if f32 in kinds else kinds[0]
            a, b = self.value(a, joint, a_node), self.value(b, joint, b_node)
        a, b = self.unify(a, b, what, node, a_node, b_node)
        return a, b, weak

    def cast(self, a: Any, dtype: Any, node: Any, a_node: Any) -> Any:
        """a.to(dtype)"""
        dtype = bool_ if dtype is bool else dtype
        if not isinstance(dtype, DType):
            self.fail("bad-argument", "to() needs a dtype", node, self.describe(dtype), "a dtype such as f32",
                      "write .to(f32)")
        a = self.operand(a, a_node)
        if not isinstance(a, Value):
            if dtype.kind in "xiu" and isinstance(a, float):
                a = int(a)
            elif dtype.kind == "b":
                a = bool(a)
            if not dtype.compute:
                return self.raw_cast(self.constant(a, f32 if dtype.kind == "f" else i32, a_node), dtype)
            return self.constant(a, dtype, a_node)
        if dtype_of(a) == dtype and a not in self.weak:
            return a
        self.at(node)
        if dtype_of(a) == dtype:
            return self.builder.value("cast", [a], a.type)
        return self.raw_cast(a, dtype)

    def bits(self, a: Any, dtype: Any, node: Any, a_node: Any) -> Any:
        """a.bits(dtype)"""
        if not isinstance(dtype, DType) or dtype.kind in "xb":
            self.fail("bad-argument", "bits() needs a dtype", node, self.describe(dtype), "a dtype such as i32",
                      "write .bits(i32)")
        value = self.value(a, None, a_node)
        have: DType = dtype_of(value)
        if have.kind in "xb" or have.bits != dtype.bits:
            self.fail("op-dtype", f"bits() from {have.name} to {dtype.name}", node, f"{have.bits} bits to {dtype.bits}",
                      "dtypes of one width", "write .to(dtype) to convert the value")
        self.at(node)
        return self.emit("bitcast", [value], TileType(dtype, axes_of(value)))
