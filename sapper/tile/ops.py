"""The tile IR's op table: what a kernel can say.

Values are tiles with named axes; a scalar is a tile without axes. Elementwise ops broadcast by name: the result
spans the union of the operands' axes, in order of first appearance. Integer arithmetic wraps.
"""

from __future__ import annotations

from ..ir.nodes import Block, Op, Value
from ..ir.ops import OpSpec, OpTable

UNARY_FLOAT = ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "tanh", "sigmoid", "erf", "sin", "cos",
               "floor", "ceil", "round")
UNARY = ("neg", "abs")
BINARY = ("add", "sub", "mul", "min", "max")
BINARY_FLOAT = ("div",)
BINARY_INTEGER = ("floordiv", "mod", "shl", "shr")
BITWISE = ("and", "or", "xor")
COMPARE = ("eq", "ne", "lt", "le", "gt", "ge")

_DOC = {
    "max": "a if a > b else b", "min": "a if a < b else b",
    "round": "to the nearest integer, ties to even", "rsqrt": "1 / sqrt(a)",
    "floordiv": "rounded towards minus infinity; division by zero is undefined",
    "mod": "a - b * floordiv(a, b)", "shr": "arithmetic for signed, logical for unsigned",
    "and": "bitwise; logical for bool", "or": "bitwise; logical for bool", "xor": "bitwise; logical for bool",
}



def memory_of(tensor: Value) -> Value:
    """The tensor whose memory a tensor is: its own, unless it is a view."""
    while tensor.op is not None and tensor.op.name == "view":
        tensor = tensor.op.operands[0]
    return tensor


def load_of(value: Value) -> Op | None:
    """What loads a value, if nothing but casts follow."""
    while value.op is not None and value.op.name == "cast":
        value = value.op.operands[0]
    return value.op if value.op is not None and value.op.name == "load" else None


def place_of(tensor: Value) -> Value:
    """One tensor for all whose elements may be the same memory: views of it, and arguments that a call may give in its
    place (@kernel(in_place=...))."""
    memory = memory_of(tensor)
    owner = memory.owner
    return owner.same.get(memory, memory) if isinstance(owner, Block) and owner.same else memory


TILE_OPS = OpTable("tile", [
    # Scalars and tiles from nothing.
    OpSpec("dim", (0, 0), attributes=("name",), doc="extent of a symbolic dimension, an index scalar"),
    OpSpec("const", (0, 0), attributes=("value",), doc="a scalar constant"),
    OpSpec("full", (1, 1), doc="a scalar spread over the axes of the result type"),
    OpSpec("index", (0, 0), attributes=("axis",), doc="index[axis]: the coordinate along an axis in scope"),
    OpSpec("whole", (2, 2), (0, 0), attributes=("axis",), pure=False,
           doc="start, stop: brings an axis into scope as one tile, to the end of the block"),
    OpSpec("view", (1, None), attributes=("groups",),
           doc="tensor, an index scalar for each extent -> the same memory with these extents, of the result's dtype; "
               "groups: [count, count] of neighbouring axes before and after, whose elements are the same"),
    # Memory. The result of a load spans the union of the index operands' axes.
    OpSpec("load", (1, None), doc="tensor, one integer value for each dimension -> tile"),
    OpSpec("store", (2, None), (0, 0), optional=("join",), pure=False,
           doc="tensor, value, one integer value for each dimension; the indices span all axes of the value; join "
               "(add | max | min | and | or | xor): an element becomes what this op makes of it and all values for it, "
               "in any order; bits of integers only"),
    # Elementwise.
    *[OpSpec(name, (1, 1), doc=_DOC.get(name, name)) for name in (*UNARY, *UNARY_FLOAT)],
    *[OpSpec(name, (2, 2), doc=_DOC.get(name, name))
      for name in (*BINARY, *BINARY_FLOAT, *BINARY_INTEGER, *BITWISE)],
    OpSpec("not", (1, 1), doc="bitwise; logical for bool"),
    *[OpSpec(name, (2, 2), doc="comparison -> bool; unordered is false except for ne") for name in COMPARE],
    OpSpec("select", (3, 3), doc="condition, a, b: a where the condition holds, else b"),
    OpSpec("cast", (1, 1), doc="to the result's dtype: floats round to nearest even; float to integer truncates; "
                               "integers wrap; bool is 0 or 1; anything to bool is `!= 0`"),
    OpSpec("bitcast", (1, 1), doc="the same bits as another dtype of the same width"),
    OpSpec("asm", (2, None), attributes=("by", "immediates", "tolerance"),
           doc="meaning, inputs: the first operand; a target that has the piece `by` computes it from the inputs "
               "instead, within the relative error `tolerance`"),
    # Reductions.
    OpSpec("reduce", (1, 1), attributes=("kind", "over"),
           doc="kind sum | max | min | argmax | argmin over the axes `over` (a list); NaN elements take "
               "no part in max, min, argmax, argmin; argmax gives the index coordinate (dtype index), the lowest on "
               "ties; sums of bf16 and f16 are f32 inside and rounded once"),
    OpSpec("contract", (2, 2), attributes=("over",),
           doc="sum(a * b) over the axes `over`; f32 for bf16, f16, f32 operands, f64 for f64, i32 for i8 and u8"),
    # Axes taken in their order.
    OpSpec("scan", (1, 1), attributes=("kind", "over"),
           doc="kind sum | max | min along the one axis of `over`: each element with all before it; NaN elements take "
               "no part in max and min; sums of bf16 and f16 are f32 inside and rounded element by element"),
    OpSpec("topk", (1, 1), (2, 2), attributes=("over", "into"),
           doc="the largest elements over the one axis of `over`, falling, and their coordinates (dtype index): as "
               "many as the axis `into` has, which takes its place; the lower coordinate first on ties. NaN elements "
               "take no part; a place that no element above the lowest value fills has that value and the first "
               "coordinate"),
    # Parts (sapper/tile/parts.py).
    OpSpec("buffer", (0, None), optional=("apart", "own"),
           doc="an index scalar for each extent -> a tensor of the kernel's own, which all its parts see; what it "
               "holds at first is not said. apart: of the outermost extent each is a line further apart, so that "
               "several are not all in one set of a cache. own: each worker has one for itself, of one extent"),
    OpSpec("part", (0, 0), (0, 0), attributes=("parallel",), blocks=1, pure=False,
           doc="what all workers do together or, if parallel is false, the first one alone; the next part begins when "
               "it is complete. Sibling parts may bring an axis of the same name"),
    # Control. Block arguments and yields carry values.
    OpSpec("tiles", (2, None), (0, None), attributes=("axes", "parallel"), optional=("meets", "ordered", "repeats"),
           blocks=1, pure=False,
           doc="start, stop for each axis, then initial carried values; block arguments are the carried values; "
               "meets: names of the tensors for whose sake it is ordered, as its iterations are not proved to be apart "
               "there; repeats: the axes along which stores that join may meet an element again"),
    OpSpec("each", (2, None), (0, None), attributes=("count", "parallel"),
           optional=("asserted", "meets", "ordered", "step"), blocks=1, pure=False,
           doc="start, stop for each of `count` indices, then initial carried values; block arguments are the "
               "indices (index scalars), then the carried values; step (a positive int, default 1); asserted: it is "
               "parallel because its author says so; meets: as of tiles"),
    OpSpec("if", (1, 1), (0, None), blocks=2, pure=False, doc="scalar bool; both blocks yield the results"),
    OpSpec("yield", (0, None), (0, 0), pure=False, doc="ends a block"),
])
