"""The lane IR's op table: the abstract machine that every target lowers from.

A value is one of
  s64          one 64-bit integer, the same for all lanes: addresses, loop counters, truth values (0 or 1)
  row<dtype>   one element in each lane: f32, i32, f64, i64, or b32 (a slot of packed narrow elements)
  mask         one truth value in each lane
  tile<dtype>  a matrix register: so many rows of so many 32-bit elements (f32, i32 or b32) as the attribute `tile` says
The number of lanes is the function's attribute `lanes`. A floating scalar is a row whose lanes are all equal.

A worker is one warp, or as many as the attribute `warps` says: each of them runs the whole function, with rows of its
own, on tasks that they have in common; `warp` tells them apart, `near_memory` they share.

A memory operand is `base` (s64), then `index` (s64) if the attribute `indexed` is true; the address is
base + index * scale + disp, scale 1, 2, 4 or 8, disp in bytes; it lies in near memory if the attribute `near` is true.
A mask operand comes last if `masked` is true: lanes
that are off touch no memory, and a masked load gives 0 there.
"""

from __future__ import annotations

from ..ir.ops import OpSpec, OpTable

_ADDRESS = ("scale", "disp", "indexed", "near")

MATH = ("exp", "exp2", "log", "log2", "tanh", "sigmoid", "erf", "sin", "cos", "rsqrt")
"""Row ops without an instruction of their own on most chips; sapper/lane/math.py expands them."""

BOUNDED = frozenset({"exp", "exp2"})
"""Those that are shorter where it is known that their operand is never large."""

COARSE = frozenset({"exp", "sigmoid", "erf", "tanh"})
"""Those that are shorter where a result of 8 significant bits is all that comes of them."""

ABSOLUTE = frozenset({"erf"})
"""Those that are shorter where it is their absolute error that counts."""

BY_HAND = frozenset({"asm", "asm_contract", "asm_multiply"})
"""Ops that pieces of assembly by hand carry out."""

ADDRESS_AT = {"load": 0, "load_run": 0, "store_run": 0, "load_splat": 0, "s_load": 0, "prefetch": 0, "gather": 0,
              "store": 1, "store_lane0": 1, "s_store": 1, "scatter": 1, "join": 1}
"""The operand that is the base of a memory operand; the index, if there is one, follows it."""

FIRST_WORDS = ("scratch", "scratch_bytes", "sync")
"""Words 0 to 2 of the argument block (docs/ir.md); the slots follow."""

TASK_COUNTERS = 8
"""Counters of tasks in the sync block (docs/ir.md). Where more loops share out tasks, barriers set them back."""

CONDITIONS = ("eq", "ne", "lt", "le", "gt", "ge")

SHORT = "short_nan"
"""Of a splat: see sapper/lane/nans.py."""

LANE_OPS = OpTable("lane", [
    # Scalars.
    OpSpec("arg", (0, 0), attributes=("slot",), doc="64-bit word `slot` of the argument block"),
    OpSpec("worker", (0, 0), doc="index of this worker, from 0"),
    OpSpec("workers", (0, 0), doc="how many workers run this launch"),
    OpSpec("s_const", (0, 0), attributes=("value",), doc="a 64-bit constant"),
    *[OpSpec(f"s_{name}", (2, 2), doc=f"{name}, 64 bits, wrapping")
      for name in ("add", "sub", "mul", "min", "max", "and", "or", "xor", "shl", "shr", "sar")],
    OpSpec("s_floordiv", (2, 2), doc="rounded towards minus infinity; the divisor must not be 0"),
    OpSpec("s_mod", (2, 2), doc="a - b * floordiv(a, b)"),
    OpSpec("s_cmp", (2, 2), attributes=("cond",), doc="signed comparison -> 0 or 1"),
    OpSpec("s_select", (3, 3), doc="condition, a, b: a if the condition is not 0"),
    OpSpec("s_load", (1, 2), attributes=("dtype",), optional=_ADDRESS, pure=False,
           doc="integer or bool from memory, sign- or zero-extended"),
    OpSpec("s_store", (2, 3), (0, 0), attributes=("dtype",), optional=_ADDRESS, pure=False,
           doc="value, then address: low bits of a scalar to memory"),
    # Rows from scalars, and back.
    OpSpec("splat", (1, 1), optional=(SHORT,),
           doc="a scalar in every lane (i32: its low 32 bits); with `short_nan` these are no NaN of f32 that has any "
               "of its lower 16 bits set"),
    OpSpec("splat_const", (0, 0), attributes=("value",), doc="a constant in every lane"),
    OpSpec("iota", (0, 0), doc="row<i32>: the number of the lane, from 0"),
    OpSpec("lane0", (1, 1), doc="lane 0 of an integer row as a scalar, sign-extended"),
    # Arithmetic. max is `a if a > b else b`, min is `a if a < b else b`.
    *[OpSpec(name, (2, 2), doc=f"{name}; integers wrap") for name in ("add", "sub", "mul", "min", "max")],
    OpSpec("div", (2, 2), optional=("coarse",), doc="floats only; with `coarse` few bits of it count"),
    OpSpec("fma", (3, 3), doc="a * b + c, rounded once; floats only"),
    *[OpSpec(name, (1, 1), doc=name) for name in ("neg", "abs", "sqrt", "floor", "ceil", "round", "trunc")],
    *[OpSpec(name, (1, 1), optional=("most",) * (name in BOUNDED) + ("coarse",) * (name in COARSE)
             + ("absolute",) * (name in ABSOLUTE),
             doc=f"{name}; expanded by lane/math.py where the target has no such instruction"
                 + ("; the operand is NaN or at most `most`" if name in BOUNDED else "")
                 + ("; with `coarse` it may be as inexact as docs/math.md says" if name in COARSE else "")
                 + ("; with `absolute` it is added to a number of 1 or more" if name in ABSOLUTE else ""))
      for name in MATH],
    OpSpec("scale_exponent", (2, 3), doc="a * 2**floor(n) for float rows a and n, rounded once (overflow to "
                                         "infinity, gradual underflow); with a third, 0 where n is below that, also "
                                         "of an a that is NaN"),
    OpSpec("fraction", (1, 1), optional=("down",),
           doc="row<f32>: a - round(a), with `down` a - floor(a) rounded down; 0 for infinities; only where the target "
               "has it"),
    OpSpec("reciprocal", (1, 1),
           doc="row<f32>: 1 / a within 1 ulp, 0 below the normal numbers; only where the target has it"),
    OpSpec("copy_sign", (2, 2), doc="row<f32> a, b: the bits of a, but its sign of b; only where the target has it"),
    OpSpec("lookup", (1, 1), attributes=("table",), doc="row<f32>: table[i mod 16] for a row<i32> i; table: 16 floats; "
                                                        "only where the target has it"),
    OpSpec("pick", (2, 2), doc="a (row of f32 or i32), i (row<i32>): a[i mod lanes]; only where the target has it"),
    *[OpSpec(name, (2, 2), doc=f"bitwise {name}, integer rows") for name in ("and", "or", "xor")],
    OpSpec("not", (1, 1), doc="bitwise, integer rows"),
    *[OpSpec(name, (1, 2), optional=("amount",), doc=f"{name} by the attribute `amount` or by a row (0 .. bits-1)")
      for name in ("shl", "shr", "sar")],
    OpSpec("idiv", (2, 2), doc="floor division of integer rows; the divisor must not be 0"),
    OpSpec("imod", (2, 2), doc="a - b * idiv(a, b)"),
    OpSpec("asm", (1, None), attributes=("by", "immediates"),
           doc="the piece by hand of this name (lang/by_hand.py) on rows; only a target that has it can select it"),
    OpSpec("asm_contract", (5, None), (1, None), attributes=("by", "rows", "rights"), pure=False,
           doc="depth, left, left_stride, then `rights` times right (s64), then sums (rows of f32 or i32: for each "
               "right those of a tile of `rows` times some vectors, row by row) -> the sums with the products of "
               "`depth` steps added: left[r, d] lies at left + r * left_stride + d steps, at left + d * left_stride + "
               "r steps, or in blocks, as the piece says; row v of right[d] at right + (d * vectors + v) rows; by the "
               "piece by hand of this name (lang/by_hand.py), which reads memory and stores nothing; depth is a "
               "multiple of the piece's step"),
    OpSpec("asm_multiply", (10, None), (4, None), attributes=("by", "rows", "columns"),
           doc="`rows` times a (four row<b32>), `columns` times b (two), for each row those of each column c (four "
               "row<f32>) -> every c + a @ b, as of matrix_multiply; by the piece by hand of this name"),
    # Masks.
    OpSpec("cmp", (2, 2), attributes=("cond",), doc="rows -> mask; integers signed; unordered is false except ne"),
    OpSpec("select", (3, 3), doc="mask, a, b: a in lanes that are on, else b"),
    OpSpec("mask_first", (1, 1), doc="on in lanes < count (s64; none if <= 0, all if >= lanes)"),
    *[OpSpec(f"mask_{name}", (2, 2), doc=f"{name} of two masks") for name in ("and", "or", "xor")],
    OpSpec("mask_not", (1, 1), doc="the other lanes"),
    OpSpec("mask_any", (1, 1), doc="-> s64: 1 if any lane is on"),
    OpSpec("mask_all", (1, 1), doc="-> s64: 1 if all lanes are on"),
    OpSpec("mask_to_row", (1, 1), doc="-> row<i32>: 1 where on, else 0"),
    # Conversions.
    OpSpec("cvt", (1, 1), optional=("nearest",),
           doc="between f32, f64, i32, i64 rows: to a float rounds to nearest even; float to integer truncates (out of "
               "range: unspecified), `nearest`, of f32 to i32, rounds to nearest even; integer to narrower wraps"),
    OpSpec("bitcast", (1, 1), doc="the same bits as another row type of the same width"),
    OpSpec("round_to", (1, 1), attributes=("dtype",), doc="f32 row rounded to a value of bf16, f16 or fp8 (nearest "
                                                         "even; too large: infinity, NaN in f8e4m3)"),
    OpSpec("widen_float8", (1, 1), (2, 4), attributes=("dtype",), optional=("scaled",),
           doc="row<b32> of four fp8 numbers each -> four row<f32>, or two of the first half of them, which the other "
               "half repeats: of all numbers in the order of memory, row r has those from r * lanes on; `scaled`, of "
               "two: times 2**-120, NaN as 480 of its sign is, and row r has those of each four at 2 * r, then those "
               "that follow them, so that `zip` of both rows, and of what that gives, is the order of memory; only "
               "where the target has it"),
    # Between lanes.
    OpSpec("shuffle_xor", (1, 1), attributes=("distance",), doc="lane i gets lane i ^ distance"),
    OpSpec("broadcast_lane", (1, 1), attributes=("lane",), doc="every lane gets lane `lane`"),
    OpSpec("exchange", (2, 2), (2, 2), attributes=("distance",),
           doc="a, b -> a', b' with d = distance (a power of 2): where lane i has bit d clear, a'[i] = a[i] and "
               "b'[i] = a[i + d]; where set, a'[i] = b[i - d] and b'[i] = b[i]. log2(lanes) stages over as many "
               "rows transpose a square"),
    OpSpec("unzip", (2, 2), (2, 2), doc="a, b -> their even elements, first those of a, and their odd ones"),
    OpSpec("zip", (2, 2), (2, 2), doc="a, b -> low, high: element i of a and then of b, for all i; what unzip undoes"),
    # Memory. Memory dtype -> row: f32 and narrower floats -> f32; f64 -> f64; i8, u8, i16, i32, bool -> i32;
    # i64 -> i64; b32.
    OpSpec("load", (1, 3), attributes=("dtype",), optional=(*_ADDRESS, "masked", "beside", "bits", "twice"), pure=False,
           doc="consecutive elements, one a lane; `beside`: as many elements behind them (1), or before them (-1), are "
               "read as well, by another load, and may be touched by this one; never with a mask; `bits`, of b32: all "
               "that may be set in a lane; `twice`, of b32 without a mask: only half as many, which the other half of "
               "the lanes has, too"),
    OpSpec("load_splat", (1, 2), attributes=("dtype",), optional=_ADDRESS, pure=False,
           doc="one element in every lane"),
    OpSpec("gather", (2, 3), attributes=("dtype",), optional=("scale", "disp", "masked", "near"), pure=False,
           doc="base, offsets (row<i32>, signed): element at base + offset * scale + disp for each lane"),
    OpSpec("load_run", (1, 3), (1, 16), attributes=("dtype",),
           optional=(*_ADDRESS, "gathered", "masked", "handed", "flip"), pure=False,
           doc="neighbours for each lane, as many as there are results: result r has of lane l the element l * results "
               "+ r; with `gathered`, after the base, offsets (row<i32>) of the lanes' own first elements, and a mask "
               "may follow, and with `flip` addresses are ((base + offset) xor flip) + disp; they are multiples of a "
               "lane's bytes"),
    OpSpec("store_run", (3, 19), (0, 0), attributes=("dtype",),
           optional=(*_ADDRESS, "gathered", "masked", "streaming", "disjoint", "handed"), pure=False,
           doc="address, with `gathered` offsets, then as many values as there are neighbours for each lane: as "
               "load_run has them; `disjoint` as of scatter; `handed`, of either: memory by which workers hand over"),
    OpSpec("store", (2, 4), (0, 0), attributes=("dtype",),
           optional=(*_ADDRESS, "masked", "streaming", "exact", "denormals"), pure=False,
           doc="value, address: narrowing rounds floats to nearest even and wraps integers; `exact` says that the "
               "value is one of bf16 already, whose upper half is stored; `denormals`, of bf16, that it has \"none\", "
               "or some, which is \"rare\"; `streaming` bypasses the caches and needs an address aligned to the row, "
               "or to 64 bytes if that is less"),
    OpSpec("store_lane0", (2, 3), (0, 0), attributes=("dtype",), optional=(*_ADDRESS, "exact"), pure=False,
           doc="value, address: lane 0 only"),
    OpSpec("scatter", (3, 4), (0, 0), attributes=("dtype",),
           optional=("scale", "disp", "masked", "near", "disjoint"),
           pure=False, doc="value, base, offsets (row<i32>); no two scatters of one memory that are `disjoint` touch "
                           "the same byte unless a load of it lies between them"),
    OpSpec("join", (3, 4), (0, 0), attributes=("kind", "dtype"), optional=("scale", "disp", "masked"), pure=False,
           doc="value, base, offsets (row<i32>): an element of memory becomes what the op `kind` (add | max | min | "
               "and | or | xor) makes of it and the value, in one step for each lane, whichever lane or worker comes "
               "first; only where the target has it (Facts.joins)"),
    OpSpec("prefetch", (1, 2), (0, 0), optional=(*_ADDRESS, "level", "write"), pure=False,
           doc="hint; level 1, 2 or 3; `write`: to be written"),
    # Packed dot products.
    OpSpec("dot2_bf16", (3, 3), doc="acc (f32), a, b (b32, two bf16 each): acc + a1 * b1 + a0 * b0, each "
                                 "product added with one rounding; denormals are zero on the way in and out"),
    OpSpec("fma2_bf16", (3, 3), doc="acc (f32), a, b (b32, two bf16 each): acc + a1 * b1 + a0 * b0, each product added "
                                    "with one rounding; always split into two fma"),
    OpSpec("dot4_u8i8", (3, 3), doc="acc (i32), a (b32, four u8), b (b32, four i8): acc + sum a * b, wrapping; "
                                    "split into the four below where no instruction does it"),
    OpSpec("dot4_i8i8", (3, 3), doc="the same of i8 and i8; split where no instruction does it"),
    OpSpec("dot4_u8u8", (3, 3), doc="the same of u8 and u8; likewise"),
    *[OpSpec(name, (3, 3), doc="acc, a, b, in each four lanes matrices of two rows of two slots: lane 2 i + j is acc, "
                               f"and by {dot} slots 0 of rows i and j, then slots 1; only where the target has it")
      for name, dot in (("two_by_two_bf16", "dot2_bf16"), ("two_by_two_i8i8", "dot4_i8i8"),
                        ("two_by_two_u8u8", "dot4_u8u8"), ("two_by_two_u8i8", "dot4_u8i8"))],
    OpSpec("dot2_i16", (3, 3), doc="acc (i32), a, b (b32, two i16 each): acc + sum a * b, wrapping; only where the "
                                   "target has it"),
    OpSpec("pairs_u8i8", (2, 2), doc="a (b32, four u8), b (b32, four i8) -> b32, two i16: the sums a0 * b0 + a1 * b1 "
                                     "and a2 * b2 + a3 * b3, saturating; only where the target has it"),
    OpSpec("add_i16", (2, 2), doc="b32 rows of two i16: their sums, wrapping; only where the target has it"),
    OpSpec("max_u8", (2, 2), doc="b32 rows of four u8: the greater of each; only where the target has it"),
    OpSpec("widen_bytes", (1, 1), attributes=("dtype", "odd"),
           doc="row<b32> of four i8 or u8 -> two i16: elements 0 and 2, or 1 and 3 if `odd`; only where the target "
               "has it"),
    OpSpec("pack_bf16", (2, 2), doc="f32 rows a, b -> b32: a as bf16 in the lower half of each slot, b in the upper; "
                                    "nearest even, denormals are zero; only where the target has it"),
    OpSpec("is_denormal", (1, 1), doc="row<f32> -> mask: lanes that hold a denormal; only where the target has it"),
    OpSpec("concat_bf16", (2, 2), doc="f32 rows a, b -> b32: their elements as bf16, two a slot, first those of a; "
                                      "nearest even, denormals are zero; only where the target has it"),
    OpSpec("any_zero_bf16", (1, None),
           doc="b32 rows -> s64: 1 if any of their elements, two of bf16 a slot, is 0 or -0; only where the target has "
               "it"),
    OpSpec("interleave", (2, 4), (2, 4),
           doc="two rows<b32> of two elements of 16 bits in each slot, or four of four bytes -> as many: element j of "
               "slot i of row n is element n * lanes + i of operand j; only where the target has it"),
    # Several warps, near memory, matrix instructions.
    OpSpec("warp", (0, 0), doc="index of this warp in its worker, from 0"),
    OpSpec("near_memory", (0, 0), doc="address of the worker's near memory, whose size is the attribute `near_bytes`"),
    OpSpec("sync_warps", (0, 0), (0, 0), pure=False,
           doc="no warp of the worker passes before all have arrived; what they stored before is seen by all after"),
    OpSpec("async_copy", (4, 5), (0, 0), optional=("disp", "source_disp", "masked"), pure=False,
           doc="near base, near offsets (row<i32>), base, offsets (row<i32>): 16 bytes of every lane from memory to "
               "near memory, zeros where the mask is off; they are there after the async_wait that waits for them"),
    OpSpec("async_commit", (0, 0), (0, 0), pure=False, doc="the copies since the last one are a group"),
    OpSpec("async_wait", (0, 0), (0, 0), attributes=("pending",), pure=False,
           doc="this warp's copies have landed, but for the `pending` last groups"),
    OpSpec("load_matrix", (2, 2), (4, 4), attributes=("transposed",), optional=("flip", "disp"), pure=False,
           doc="near base, near offsets (row<i32>) -> four row<b32>: four matrices of 8 x 8 elements of 16 bits; "
               "lane 8 j + i gives the address of row i of matrix j, ((base + offset) xor flip) + disp; in row j, "
               "lane l gets elements 2 (l mod 4) and the next of row l div 4, or of column l div 4 if transposed"),
    OpSpec("pack2", (2, 2), attributes=("dtype",),
           doc="two f32 rows -> row<b32>: each rounded to bf16 or f16 (nearest even), the first in the low half"),
    *[OpSpec(name, (2, 2), attributes=("dtype",),
             doc=f"{name[:-1]} of row<b32> of two bf16 or f16 each, rounded to that (nearest even); only where the "
                 "target has it") for name in ("add2", "sub2", "mul2")],
    OpSpec("unpack", (1, 1), attributes=("dtype", "place"),
           doc="row<b32> of elements of `dtype` side by side -> the one at `place` in each lane, from the lowest "
               "bits, as a load has it; only where the target has it"),
    OpSpec("matrix_multiply", (10, 10), (4, 4), attributes=("dtype",), optional=("right_dtype",),
           doc="a (four row<b32>), b (two), c (four row<f32>) -> c + a @ b, of 16 x 16, 16 x 8 and 16 x 8 elements "
               "that lie in the lanes as sapper/lane/fragments.py says; dtype of a and b: bf16 or f16. Or of i8 or u8, "
               "`right_dtype` of b: 16 x 32 by 32 x 8, c row<i32>, wrapping"),
    # Matrix registers that memory alone fills and empties. A row of a tile lies at base + row * stride + disp.
    OpSpec("tile_configure", (1, 1), (0, 0), pure=False,
           doc="this worker may use tiles from here on, to its tile_release; memory at the address keeps how they were "
               "configured before"),
    OpSpec("tile_release", (1, 1), (0, 0), pure=False,
           doc="tiles are configured again as they were, which memory at the address says"),
    OpSpec("tile_zero", (0, 0), pure=False, doc="a tile of zeros"),
    OpSpec("tile_load", (2, 2), optional=("disp",), pure=False, doc="base, stride -> a tile from memory"),
    OpSpec("tile_store", (3, 3), (0, 0), optional=("disp",), pure=False, doc="tile, base, stride: to memory"),
    OpSpec("tile_wake", (0, 0), (0, 0), pure=False,
           doc="hint: tiles are stored before long, and what stores them should not be asleep by then"),
    OpSpec("tile_multiply", (3, 3), attributes=("dtype", "right_dtype"), pure=False,
           doc="c (tile<f32> or <i32>), a, b (tile<b32>) -> c[i, j] + the sum over d of a[i, d] . b[d, j], products of "
               "slots: of four i8 or u8, exact and wrapping, or of two bf16, the sums of the first and of the second "
               "products apart, each product added with one rounding, then both, then to c; denormals are zero on the "
               "way in and out"),
    # Signals, copies of boxes, matrix instructions of a group of warps. What an op of a warp does, it does once, not in
    # every lane.
    OpSpec("signal_start", (1, 1), (0, 0), attributes=("arrivals",), optional=("disp",), pure=False,
           doc="near address of 8 bytes: a signal in phase 0; a phase is over after so many arrivals and all the bytes "
               "that were announced in it"),
    OpSpec("signal_fence", (0, 0), (0, 0), pure=False,
           doc="copies see the signals that this warp started, and other warps after they met it"),
    OpSpec("signal_arrive", (1, 1), (0, 0), optional=("disp", "workers"), pure=False,
           doc="signal: one arrival of this warp; `workers`: at that of each of so many workers of its cluster"),
    OpSpec("signal_expect", (1, 1), (0, 0), attributes=("bytes",), optional=("disp",), pure=False,
           doc="signal: one arrival of this warp, which announces so many bytes"),
    OpSpec("signal_wait", (2, 2), (0, 0), optional=("disp", "workers"), pure=False,
           doc="signal, parity (s64, 0 or 1): until its last phase of that parity is over; the one before phase 0 "
               "has parity 1; what was done before its arrivals, and its copies, are there then; `workers`: these may "
               "be of so many workers"),
    OpSpec("tensor_copy", (3, 7), (0, 0), attributes=("map",), optional=("disp", "signal_disp", "workers"), pure=False,
           doc="near address, signal, coordinates by dimension: this warp has the box of tensor map `map` (attribute "
               "`tensor_maps` of the function) that starts there copied to near memory, zeros where it is outside the "
               "tensor; its rows of 128 bytes lie one after the other, 16-byte chunk c of those at address 128 r at "
               "c ^ (r mod 8); the signal counts its bytes; `workers`: to the same place of so many workers of its "
               "cluster, for the signal of each"),
    OpSpec("sync_cluster", (0, 0), (0, 0), pure=False,
           doc="as sync_warps, of all warps of the workers of a cluster: those that stand side by side, as many as the "
               "function's attribute `cluster`"),
    OpSpec("store_matrix", (6, 6), (0, 0), optional=("flip", "disp"), pure=False,
           doc="near base, near offsets (row<i32>), four row<b32>: to near memory what load_matrix would give back, "
               "not transposed"),
    OpSpec("store_fence", (0, 0), (0, 0), pure=False,
           doc="what this warp stored in near memory is seen by the copies of boxes that it starts after"),
    OpSpec("tensor_store", (2, 6), (0, 0), attributes=("map",), optional=("disp",), pure=False,
           doc="near address, coordinates by dimension: this warp has a box of near memory, in rows as tensor_copy "
               "leaves them, copied to the box of tensor map `map` that starts there, without what is outside of the "
               "tensor"),
    OpSpec("store_wait", (0, 0), (0, 0), attributes=("pending",), pure=False,
           doc="ends a batch of this warp's tensor_stores; what they read, but for the last `pending` batches, may be "
               "written again, or given up"),
    OpSpec("group_fence", (0, 0), (0, 0), pure=False, doc="the sums that the next group_multiply takes are in place"),
    OpSpec("group_multiply", (2 + 4, None), (4, None),
           attributes=("dtype", "left_rows", "right_rows"),
           optional=("left_disp", "right_disp", "left_panel_bytes", "right_panel_bytes", "fresh"), pure=False,
           doc="near addresses of a and b, c (row<f32> each) -> c + a @ b (`fresh`: a @ b, whatever c is), of 64 x D, "
               "D x N and 64 x N elements of `dtype`, of which D are 32 bytes, as the tensor copies left them: "
               "left_rows, right_rows: rows of 128 bytes lie along the depth; otherwise along 64 rows of a, columns "
               "of b, and the next 64 start panel_bytes further. All warps of a group of 4 issue it; warp w of it has "
               "rows 16 w .., its registers hold 16 x 8 elements by fours (fragments.C). It is done, and its sums may "
               "be read, after its group_wait"),
    OpSpec("group_multiply_rows", (1 + 4 + 4, None), (4, None), attributes=("dtype", "right_rows"),
           optional=("right_disp", "right_panel_bytes", "fresh"), pure=False,
           doc="near address of b, a (four row<b32>: each warp's 16 x 16 elements of 16 bits, fragments.A), c -> as "
               "group_multiply, with a in registers"),
    OpSpec("group_commit", (0, 0), (0, 0), pure=False, doc="the group_multiply ops since the last one are a batch"),
    OpSpec("group_wait", (0, None), (0, None), attributes=("pending",), pure=False,
           doc="all but the `pending` last batches of this warp's group are done; sums in flight -> the sums"),
    # Sums in a memory of their own: 128 rows x 512 columns of f32 of each worker; a place there is row << 16 | column.
    OpSpec("sums_open", (1, 1), (0, 0), attributes=("columns",), pure=False,
           doc="near address: so many columns, a power of two from 32 on, are set aside for this worker, and where "
               "they begin is left in the 4 bytes there"),
    OpSpec("sums_close", (1, 1), (0, 0), attributes=("columns",), pure=False,
           doc="place: the columns that sums_open set aside from there on are given up"),
    OpSpec("sums_multiply", (4, 4), (0, 0), attributes=("dtype", "rows", "columns", "left_rows", "right_rows"),
           optional=("right_dtype", "left_disp", "right_disp", "left_panel_bytes", "right_panel_bytes"), pure=False,
           doc="near addresses of a and b, place of c, adds (s64): c + a @ b, or a @ b if adds is 0, of rows x D, D x "
               "columns and rows x columns elements, as group_multiply has them in near memory; of i8 or u8, "
               "`right_dtype` of b, with sums of i32, wrapping. This warp starts it; those that one warp starts are "
               "done in turn, and others know by a sums_signal"),
    OpSpec("sums_multiply_rows", (4, 4), (0, 0), attributes=("dtype", "rows", "columns", "right_rows"),
           optional=("left_disp", "right_disp", "right_panel_bytes"), pure=False,
           doc="place of a, near address of b, place, adds (s64): as sums_multiply, with a in sums memory: rows x 16 "
               "elements of 16 bits in 8 columns, as sums_store puts them"),
    OpSpec("sums_store", (1 + 4, None), (0, 0), pure=False,
           doc="place, row<b32>: 16 rows from there on of pairs of 16-bit elements, 16 of them in 8 columns for each "
               "four registers (fragments.A). Warp w writes rows 32 (w mod 4) .. + 31 alone"),
    OpSpec("sums_signal", (1, 1), (0, 0), optional=("disp", "workers"), pure=False,
           doc="signal: one arrival, once all products that this warp started are done; `workers`: as signal_arrive"),
    OpSpec("sums_load", (1, 1), (4, None), pure=False,
           doc="place -> 16 rows of sums from there on, 8 columns for each four row<f32>, or row<i32>, which hold 16 x "
               "8 elements (fragments.C). Warp w reads rows 32 (w mod 4) .. + 31 alone"),
    OpSpec("sums_acquire", (0, 0), (0, 0), pure=False,
           doc="sums_multiply and sums_load after it come after what the warp waited for before it"),
    OpSpec("sums_release", (0, 0), (0, 0), pure=False,
           doc="who is told something after it comes after this warp's sums_load and sums_store"),
    OpSpec("register_budget", (0, 0), (0, 0), attributes=("registers", "more"), pure=False,
           doc="a thread of this group of warps has so many registers from here on; more: than before"),
    # Control.
    OpSpec("loop", (2, None), (0, None), attributes=("step",), optional=("label",), blocks=1, pure=False,
           doc="start, stop, then carried values; block arguments: the counter, then the carried values. Runs while "
               "counter < stop, counter += step (a positive constant)"),
    OpSpec("if", (1, 1), (0, None), blocks=2, pure=False, doc="s64, taken if not 0; both blocks yield the results"),
    OpSpec("tasks", (1, 1), (0, 0), attributes=("counter",), blocks=1, pure=False,
           doc="total: block argument i; the workers share out i = 0 .. total-1. Worker w begins with i = w; they go "
               "on from i = workers in order of demand, by shared counter `counter` (0 .. 7), which is zero before"),
    OpSpec("barrier", (0, 0), (0, 0), optional=("reset",), pure=False,
           doc="no worker passes before all have arrived; reset: a counter of tasks that is zero again from here on"),
    OpSpec("hand_over", (0, 0), (0, 0), pure=False,
           doc="what this warp stored before is there for the same warp of the worker that takes it over"),
    OpSpec("take_over", (1, 1), (0, 0), pure=False,
           doc="worker: until the same warp of that worker handed over, once for each take_over"),
    OpSpec("sync_lanes", (0, 0), (0, 0), pure=False,
           doc="what any lane of this worker stored before it is seen by its other lanes after it; nothing where lanes "
               "are parts of one register"),
    OpSpec("fence_streaming", (0, 0), (0, 0), pure=False, doc="streaming stores before it are visible after it"),
    OpSpec("yield", (0, None), (0, 0), pure=False, doc="ends a block"),
])
