"""Weights in GGUF's Q3_K to Q6_K, their bytes put in another order once: matrices of any number of rows, embedding.

    q3k   weight = (d * scale) * (q - 4), q 0 ... 7; scale of 6 bits, signed, for 16 weights, d for 256
    q4k   weight = (d * scale) * q - d_min * minimum, q 0 ... 15; scale and minimum of 6 bits for 32 weights, d and
          d_min for 256
    q5k   the same, q 0 ... 31
    q6k   weight = (d * scale) * (q - 32), q 0 ... 63; scale of 8 bits, signed, for 16 weights, d for 256

A matrix [N, K] lies in panels of 16 rows, which are neighbours among the lanes; of 256 columns, a *super block*, a
panel holds all that there is, and is one stream from memory: w [P, S, R, 16, 4] bytes, R words of 4 bytes for each
lane, of which a word of quants holds four neighbours along K, as packed dot products (`vpdpbusd`) take them.

    q3k   24 words   of 32 weights 3: bytes a, b, c with weights i and 4 + i, 8 + i and 12 + i, 16 + i and 20 + i, i one
                     of 4, in bits 0 to 2 and 3 to 5 each. Weight 24 + i has bits 0 and 1 in the upper two of a and bit
                     2 in bit 6 of c, 28 + i in those of b and in bit 7 of c
           4 words   bytes [16, 16 lanes]: the scale of each 16 weights
           1 word    f16 [2, 16 lanes]: d, and nothing
    q4k   32 words   of 64 weights 8, the first 32 in the low halves of the bytes, the others in the high ones
           4 words   16 bytes [8, 16 lanes]: the scale of each 32 weights; 2 words of these, and 2 of the minima, which
                     are [2, 16 lanes, 4], words again
           1 word    f16 [2, 16 lanes]: d and d_min
    q5k   40 words   of 32 weights 5: bytes a ... e with one of the first 20 each in the lower 5 bits, and above them,
                     of weight 20 + i, bits 0 to 2 in a and 3 and 4 in the upper two of b, of 24 + i the same in c and
                     d, of 28 + i bits 0 to 2 in e, 3 in bit 5 of b and 4 in bit 5 of d
           5 words   as q4k
    q6k   48 words   of 16 weights 3: bytes with one of the first 12 each in the lower 6 bits. Of the last 4, weight
                     12 + i has bits 0 and 1, 2 and 3, 4 and 5 in the upper two of byte i of these words
           4 words   bytes [16, 16 lanes]: the scale of each 16 weights
           1 word    f16 [2, 16 lanes]: d, and nothing

The activations are quantised, 256 of a row to i8 with one scale (`quantize_super`, as llama.cpp's Q8_K has it: off by
at most max|x| / 254 each). The sums of products of quants meet their scales as integers, exactly, and so do the sums of
activations their minima: those, of up to 4064, are two digits, 64 * high + low, of i8. Of 256 products in i32 one f32
is made. What the quants of q3k and q6k are larger by is in what the sums begin with. With plain activations (`matvec`)
a product is of f32.

Formats: ggml's `block_q3_K` to `block_q6_K`, ggml-common.h; `dequantize_row_q3_K` to `dequantize_row_q6_K`,
ggml-quants.c, whose order of roundings `dequantize` keeps; `quantize_row_q8_K_ref`.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, abs, bf16, each, f16, f32, i8, i16, i32, max, round, sum, tiles, u8, where, whole, zeros

from .activation import silu, silu_reference
from .quantized import rows_apart
from .record import (
    EXACT,
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

C, E, J, K, M, P, Q, S, T = sp.dims("C E J K M P Q S T")
PANEL, SUPER, SLOT = 16, 256, 4
PAIR, HALF, SIXTEEN = 64, 32, 16
QUANT_WORDS = {"q3k": 24, "q4k": 32, "q5k": 40, "q6k": 48}
WITH_MINIMA = ("q4k", "q5k")
"""Whose blocks are of 32 weights, and have minima; the others' are of 16."""
WORDS = {form: count + 5 for form, count in QUANT_WORDS.items()}
"""Of a row's 256 weights, 4 bytes each."""
SCALE_TYPES = {form: u8 if form in WITH_MINIMA else i8 for form in WORDS}
EACH_TIME = {"q3k": 3, "q5k": 5, "q6k": 3}
"""Words of the quants that are packed together: q3k's 32, q5k's 32, q6k's 16."""
SCALES = QUANT_WORDS
MINIMA, FACTORS = ({form: count + more for form, count in WORDS.items()} for more in (-3, -1))
"""The words with which the scales, the minima and the factors begin."""
TWO_BITS = np.array([0, 2, 4], np.uint8)[:, None]
"""The first of those of a weight among q6k's last 4 that each of the three words has, [words, bytes]."""
TWO_BITS_OF_FOUR = np.array([0, 2, 4, 6], np.uint8)
LARGEST, DIGIT, DIGIT_BITS = 127.0, 64, 6


def rounded(x: Any) -> Any:
    """f32 as bf16 in the upper halves of an i32."""
    return x.to(bf16).to(f32).bits(i32)


@cache
def kernels_of(form: str) -> SimpleNamespace:
    """The kernels of a form. x, x_scales, digits, starts: as quantize_super makes them of C >= M rows.

    matmul, matmul_residual, matmul_swiglu     y [M, P, 16]
    matvec, matvec_residual, matvec_swiglu     y [P, 16] from x [S, 256] in f32
    expert_matmul_swiglu, expert_matmul, grouped_swiglu, grouped     as in moe_blocks.py
    dequantize, embedding                      rows in f32
    widen_pairs                                panels in bf16
    """
    words, scale_type = WORDS[form], SCALE_TYPES[form]
    first_scale, first_factor = SCALES[form] * PANEL * SLOT, FACTORS[form] * PANEL * SLOT // 2
    first_minimum, each_word = MINIMA[form], EACH_TIME.get(form, 0)

    size_bytes = words * PANEL * SLOT
    blocks = (8, 8, SLOT) if form in WITH_MINIMA else (SIXTEEN, 4, SLOT)
    pair_blocks = (*blocks[:-1], 2)  # of a super block's columns in pairs
    # Of so many blocks at a time, which one, and of its words the first of so many that lie alike.
    each_time, pieces = {
        "q3k": (2, ((0, 0, 1), (0, 1, 1), (0, 2, 1), (0, 3, 1), (1, 0, 1), (1, 1, 1), (1, 2, 1), (1, 3, 1))),
        "q4k": (2, ((0, 0, 8), (1, 0, 8))), "q5k": (1, ((0, 0, 5), (0, 5, 1), (0, 6, 1), (0, 7, 1))),
        "q6k": (1, ((0, 0, 3), (0, 3, 1))),
    }[form]
    groups = blocks[0] // each_time

    def scale_of(parts: Any, p: Any, s: Any, block: Any, l: Any) -> Any:
        """parts: super blocks in SCALE_TYPES. The scale of a block of 32, or 16, weights, as i32."""
        return parts[p, s, first_scale + block * PANEL + l].to(i32)

    def super_sum(
        nothing: Any, w: Any, parts: Any, factor: Any, x: Any, x_scales: Any, digits: Any, starts: Any, p: Any, s: Any,
        m: Any, l: Any, other: Any = None,
    ) -> Any:
        """The products of a super block of the panels p and the rows m. nothing: zeros of i32 over p, m and l. parts,
        factor: the same as w, as bytes and as f16. other: the super block of the activations where it is not s."""
        total, i, at = nothing, whole(SLOT), s if other is None else other
        if form == "q4k":
            for j in range(4):
                v = whole(8)
                packed = w[p, s, 8 * j + v, l, i]
                low, high = (packed & 15) @ x[at, m, 2 * j, v, i], (packed >> 4) @ x[at, m, 2 * j + 1, v, i]
                total += low * scale_of(parts, p, s, 2 * j, l) + high * scale_of(parts, p, s, 2 * j + 1, l)
        elif form == "q5k":
            for j in range(8):
                u = whole(1)  # so that all of a panel meets a word of x before the next one does
                a, b, c, d, e = [w[p, s, each_word * j + word + u, l, i] for word in range(each_word)]
                six, seven, eight = a >> 5 | b >> 3 & 24, c >> 5 | d >> 3 & 24, e >> 5 | b >> 2 & 8 | d >> 1 & 16
                found = (a & 31) @ x[at, m, j, u, i] + (b & 31) @ x[at, m, j, 1 + u, i] + (
                    c & 31) @ x[at, m, j, 2 + u, i] + (d & 31) @ x[at, m, j, 3 + u, i] + (
                    e & 31) @ x[at, m, j, 4 + u, i] + six @ x[at, m, j, 5 + u, i] + (
                    seven @ x[at, m, j, 6 + u, i]) + eight @ x[at, m, j, 7 + u, i]
                total += found * scale_of(parts, p, s, j, l)
        if form in WITH_MINIMA:
            v = whole(2)
            minima = w[p, s, first_minimum + v, l, i] & 63  # as they are: two products are then known to fit 16 bits
            least = ((minima @ digits[at, m, 0, v, i]) << 6) + minima @ digits[at, m, 1, v, i]
            scaled = total.to(f32) * factor[p, s, first_factor + l].to(f32)
            return (scaled - least.to(f32) * factor[p, s, first_factor + PANEL + l].to(f32)) * x_scales[at, m]
        if form == "q3k":
            for c in range(8):
                u = whole(1)
                a, b, e = [w[p, s, each_word * c + word + u, l, i] for word in range(each_word)]
                seven, eight, block = a >> 6 | e >> 4 & 4, b >> 6 | e >> 5 & 4, 2 * c
                found = (a & 7) @ x[at, m, block, u, i] + (a >> 3 & 7) @ x[at, m, block, 1 + u, i] + (
                    b & 7) @ x[at, m, block, 2 + u, i] + (b >> 3 & 7) @ x[at, m, block, 3 + u, i] + (
                    starts[at, block, m] >> 3)
                total += found * scale_of(parts, p, s, block, l)
                other = (e & 7) @ x[at, m, block + 1, u, i] + (e >> 3 & 7) @ x[at, m, block + 1, 1 + u, i] + (
                    seven @ x[at, m, block + 1, 2 + u, i]) + eight @ x[at, m, block + 1, 3 + u, i] + (
                    starts[at, block + 1, m] >> 3)
                total += other * scale_of(parts, p, s, block + 1, l)
        else:
            for c in range(8):
                for block in (2 * c, 2 * c + 1):
                    u = whole(1)
                    a, b, e = [w[p, s, each_word * block + word + u, l, i] for word in range(each_word)]
                    last = a >> 6 | b >> 4 & 12 | e >> 2 & 48
                    found = (a & 63) @ x[at, m, block, u, i] + (b & 63) @ x[at, m, block, 1 + u, i] + (
                        e & 63) @ x[at, m, block, 2 + u, i] + last @ x[at, m, block, 3 + u, i] + starts[at, block, m]
                    total += found * scale_of(parts, p, s, block, l)
        return total.to(f32) * factor[p, s, first_factor + l].to(f32) * x_scales[at, m]

    def piece_of(
        w: Any, parts: Any, factor: Any, p: Any, s: Any, c: Any, h: Any, first: int, v: Any, first_bit: Any, l: Any
    ) -> Any:
        """Weights of a block in f32, as ggml rounds them. w: as i32, as shifting a lane is quicker than reading bytes
        that lie apart. c, h: so many blocks of those of `pieces`, and which of these; first, v: of its words the first
        one, and which after that. first_bit: of the byte, or of each byte, of these words."""
        d = factor[p, s, first_factor + l].to(f32)
        if form == "q4k":
            q = w[p, s, 8 * c + v, l] >> first_bit + 4 * h & 15
            minimum = w[p, s, first_minimum + c // 2, l] >> 8 * (c % 2 * 2 + h) & 255
            least = factor[p, s, first_factor + PANEL + l].to(f32) * minimum.to(f32)
            return d * scale_of(parts, p, s, 2 * c + h, l).to(f32) * q.to(f32) - least
        if form == "q5k":
            def word_of(number: int) -> Any:
                return w[p, s, each_word * c + number + v, l] >> first_bit

            if first == 0:
                q = word_of(0) & 31
            elif first == 7:
                q = word_of(4) >> 5 & 7 | word_of(1) >> 2 & 8 | word_of(3) >> 1 & 16
            else:
                q = word_of(2 * first - 10) >> 5 & 7 | word_of(2 * first - 9) >> 3 & 24
            minimum = w[p, s, first_minimum + c // 4, l] >> 8 * (c % 4) & 255
            least = factor[p, s, first_factor + PANEL + l].to(f32) * minimum.to(f32)
            return d * scale_of(parts, p, s, c, l).to(f32) * q.to(f32) - least
        if form == "q3k":
            place = 4 * h + first
            if place < 6:
                q = w[p, s, each_word * c + place // 2 + v, l] >> first_bit + 3 * (place % 2) & 7
            else:
                a, e = [w[p, s, each_word * c + word + v, l] >> first_bit for word in (place - 6, 2)]
                q = a >> 6 & 3 | e >> place - 2 & 4
            return d * scale_of(parts, p, s, 2 * c + h, l).to(f32) * (q - 4).to(f32)
        if first:
            a, b, e = [w[p, s, each_word * c + word + v, l] >> first_bit for word in range(each_word)]
            six = a >> 6 & 3 | b >> 4 & 12 | e >> 2 & 48
        else:
            six = w[p, s, each_word * c + v, l] >> first_bit & 63
        return d * scale_of(parts, p, s, c, l).to(f32) * (six - 32).to(f32)

    def exact_sum(w: Any, parts: Any, factor: Any, x: Any, p: Any, s: Any, nothing: Any, l: Any) -> Any:
        """The products of a super block with plain activations. nothing: zeros over p and l."""
        total = nothing
        for c in range(groups):
            for h, first, count in pieces:
                v, i = whole(count), whole(SLOT)
                weight = piece_of(w, parts, factor, p, s, c, h, first, v, i.to(i32) * 8, l)
                total += weight @ x[s, each_time * c + h, first + v, i]
        return total

    @sp.kernel(name=f"matmul_{form}")
    def matmul(
        w: Tensor[u8, P, S, words, PANEL, SLOT], x: Tensor[i8, S, C, SUPER], x_scales: Tensor[f32, S, C],
        digits: Tensor[i8, S, C, SIXTEEN], starts: Tensor[i32, S, SIXTEEN, C], y: Tensor[f32, M, P, PANEL],
    ):
        parts, factor = w.view(P, S, size_bytes, dtype=scale_type), w.view(P, S, size_bytes // 2, dtype=f16)
        q, scales, begin = x.view(S, C, *blocks), x_scales.view(S, C), starts.view(S, SIXTEEN, C)
        digit = digits.view(S, C, 2, 2, SLOT)
        for p, m in tiles(P, M):
            l = whole(PANEL)
            acc = zeros(m, p, l, dtype=f32)
            for s in each(S):
                acc += super_sum(zeros(m, p, l, dtype=i32), w, parts, factor, q, scales, digit, begin, p, s, m, l)
            y[m, p, l] = acc

    @sp.kernel(name=f"matmul_residual_{form}")
    def matmul_residual(
        w: Tensor[u8, P, S, words, PANEL, SLOT], x: Tensor[i8, S, C, SUPER], x_scales: Tensor[f32, S, C],
        digits: Tensor[i8, S, C, SIXTEEN], starts: Tensor[i32, S, SIXTEEN, C], residual: Tensor[f32, M, P, PANEL],
        y: Tensor[f32, M, P, PANEL],
    ):
        parts, factor = w.view(P, S, size_bytes, dtype=scale_type), w.view(P, S, size_bytes // 2, dtype=f16)
        q, scales, begin = x.view(S, C, *blocks), x_scales.view(S, C), starts.view(S, SIXTEEN, C)
        digit = digits.view(S, C, 2, 2, SLOT)
        for p, m in tiles(P, M):
            l = whole(PANEL)
            acc = zeros(m, p, l, dtype=f32)
            for s in each(S):
                acc += super_sum(zeros(m, p, l, dtype=i32), w, parts, factor, q, scales, digit, begin, p, s, m, l)
            y[m, p, l] = residual[m, p, l] + acc

    @sp.kernel(name=f"matmul_swiglu_{form}")
    def matmul_swiglu(
        gate: Tensor[u8, P, S, words, PANEL, SLOT], up: Tensor[u8, P, S, words, PANEL, SLOT],
        x: Tensor[i8, S, C, SUPER], x_scales: Tensor[f32, S, C], digits: Tensor[i8, S, C, SIXTEEN],
        starts: Tensor[i32, S, SIXTEEN, C], y: Tensor[f32, M, P, PANEL],
    ):
        gates, gate_factor = gate.view(P, S, size_bytes, dtype=scale_type), gate.view(P, S, size_bytes // 2, dtype=f16)
        ups, up_factor = up.view(P, S, size_bytes, dtype=scale_type), up.view(P, S, size_bytes // 2, dtype=f16)
        q, scales, begin = x.view(S, C, *blocks), x_scales.view(S, C), starts.view(S, SIXTEEN, C)
        digit = digits.view(S, C, 2, 2, SLOT)
        for p, m in tiles(P, M):
            l = whole(PANEL)
            gate_sum = zeros(m, p, l, dtype=f32)
            up_sum = zeros(m, p, l, dtype=f32)
            for s in each(S):
                gate_sum += super_sum(
                    zeros(m, p, l, dtype=i32), gate, gates, gate_factor, q, scales, digit, begin, p, s, m, l)
                up_sum += super_sum(
                    zeros(m, p, l, dtype=i32), up, ups, up_factor, q, scales, digit, begin, p, s, m, l)
            y[m, p, l] = silu(gate_sum) * up_sum

    @sp.kernel(name=f"matvec_{form}")
    def matvec(w: Tensor[u8, P, S, words, PANEL, SLOT], x: Tensor[f32, S, SUPER], y: Tensor[f32, P, PANEL]):
        joined, parts = w.view(P, S, words, PANEL, dtype=i32), w.view(P, S, size_bytes, dtype=scale_type)
        factor, vector = w.view(P, S, size_bytes // 2, dtype=f16), x.view(S, *blocks)
        for p in tiles(P):
            l = whole(PANEL)
            acc = zeros(p, l, dtype=f32)
            for s in each(S):
                acc += exact_sum(joined, parts, factor, vector, p, s, zeros(p, l, dtype=f32), l)
            y[p, l] = acc

    @sp.kernel(name=f"matvec_residual_{form}")
    def matvec_residual(
        w: Tensor[u8, P, S, words, PANEL, SLOT], x: Tensor[f32, S, SUPER], residual: Tensor[f32, P, PANEL],
        y: Tensor[f32, P, PANEL],
    ):
        joined, parts = w.view(P, S, words, PANEL, dtype=i32), w.view(P, S, size_bytes, dtype=scale_type)
        factor, vector = w.view(P, S, size_bytes // 2, dtype=f16), x.view(S, *blocks)
        for p in tiles(P):
            l = whole(PANEL)
            acc = zeros(p, l, dtype=f32)
            for s in each(S):
                acc += exact_sum(joined, parts, factor, vector, p, s, zeros(p, l, dtype=f32), l)
            y[p, l] = residual[p, l] + acc

    @sp.kernel(name=f"matvec_swiglu_{form}")
    def matvec_swiglu(
        gate: Tensor[u8, P, S, words, PANEL, SLOT], up: Tensor[u8, P, S, words, PANEL, SLOT],
        x: Tensor[f32, S, SUPER], y: Tensor[f32, P, PANEL],
    ):
        gates, gate_parts = gate.view(P, S, words, PANEL, dtype=i32), gate.view(P, S, size_bytes, dtype=scale_type)
        ups, up_parts = up.view(P, S, words, PANEL, dtype=i32), up.view(P, S, size_bytes, dtype=scale_type)
        gate_factor, up_factor = (gate.view(P, S, size_bytes // 2, dtype=f16),
                                  up.view(P, S, size_bytes // 2, dtype=f16))
        vector = x.view(S, *blocks)
        for p in tiles(P):
            l = whole(PANEL)
            gate_sum = zeros(p, l, dtype=f32)
            up_sum = zeros(p, l, dtype=f32)
            for s in each(S):
                gate_sum += exact_sum(gates, gate_parts, gate_factor, vector, p, s, zeros(p, l, dtype=f32), l)
                up_sum += exact_sum(ups, up_parts, up_factor, vector, p, s, zeros(p, l, dtype=f32), l)
            y[p, l] = silu(gate_sum) * up_sum

    @sp.kernel(name=f"dequantize_{form}")
    def dequantize(w: Tensor[u8, P, S, words, PANEL, SLOT], y: Tensor[f32, P, PANEL, S, SUPER]):
        """A matrix [N, K], row by row."""
        joined, parts = w.view(P, S, words, PANEL, dtype=i32), w.view(P, S, size_bytes, dtype=scale_type)
        factor, rows = w.view(P, S, size_bytes // 2, dtype=f16), y.view(P, PANEL, S, *blocks)
        for p, s in each(P, S):
            l = whole(PANEL)
            for c in range(groups):
                for h, first, count in pieces:
                    v, i = whole(count), whole(SLOT)
                    rows[p, l, s, each_time * c + h, first + v, i] = piece_of(
                        joined, parts, factor, p, s, c, h, first, v, i.to(i32) * 8, l)

    @sp.kernel(name=f"embedding_{form}")
    def embedding(
        tokens: Tensor[i32, T], w: Tensor[u8, P, S, words, PANEL, SLOT], y: Tensor[f32, T, S, SUPER],
    ):
        """Rows tokens[t] of the matrix. The caller sees to it that 0 <= tokens[t] < N."""
        joined, parts = w.view(P, S, words, PANEL, dtype=i32), w.view(P, S, size_bytes, dtype=scale_type)
        factor, rows = w.view(P, S, size_bytes // 2, dtype=f16), y.view(T, S, *blocks)
        for t in each(T):
            p = tokens[t] // PANEL
            l = tokens[t] % PANEL
            for s in each(S):
                for c in range(groups):
                    for h, first, count in pieces:
                        v, i = whole(count), whole(SLOT)
                        rows[t, s, each_time * c + h, first + v, i] = piece_of(
                            joined, parts, factor, p, s, c, h, first, v, i.to(i32) * 8, l)

    def put_pairs(joined: Any, parts: Any, factor: Any, p: Any, slots: Any, q: Any, s: Any, j: Any) -> None:
        """Super block s of the panel p, its columns in pairs, into panel j of those that lie together as q. slots: [q,
        S, pair_blocks, J, 16] of i32."""
        l = whole(PANEL)
        for c in each(groups):
            for h, first, count in pieces:
                v = whole(count)
                for pair in (0, 1):
                    low = piece_of(joined, parts, factor, p, s, c, h, first, v, 16 * pair, l)
                    high = piece_of(joined, parts, factor, p, s, c, h, first, v, 16 * pair + 8, l)
                    slots[q, s, each_time * c + h, first + v, pair, j, l] = (
                        rounded(high) | (rounded(low) >> 16 & 0xFFFF))

    @sp.kernel(name=f"widen_pairs_{form}")
    def widen_pairs(
        w: Tensor[u8, Q, J, S, words, PANEL, SLOT], out: Tensor[bf16, Q, S, SUPER // 2, J, PANEL, 2],
    ):
        """Panels of J * 16 rows with columns in pairs, as products with rows of bf16 read them (widen.py)."""
        joined, parts = w.view(Q * J, S, words, PANEL, dtype=i32), w.view(Q * J, S, size_bytes, dtype=scale_type)
        factor = w.view(Q * J, S, size_bytes // 2, dtype=f16)
        slots = out.view(Q, S, *pair_blocks, J, PANEL, dtype=i32)
        for q, s, j in tiles(Q, S, J):
            put_pairs(joined, parts, factor, q * J + j, slots, q, s, j)

    return SimpleNamespace(
        matmul=matmul, matmul_residual=matmul_residual, matmul_swiglu=matmul_swiglu, matvec=matvec,
        matvec_residual=matvec_residual, matvec_swiglu=matvec_swiglu, dequantize=dequantize, embedding=embedding,
        widen_pairs=widen_pairs, super_sum=super_sum, blocks=blocks, put_pairs=put_pairs,
        pair_blocks=pair_blocks,
    )


@sp.kernel
def quantize_super(
    x: Tensor[f32, M, S, SUPER], q: Tensor[i8, S, C, SUPER], scales: Tensor[f32, S, C],
    digits: Tensor[i8, S, C, SIXTEEN], starts: Tensor[i32, S, SIXTEEN, C],
):
    """Rows of which 256 elements share a scale: x is about scale * q, scale = max|x| / 127. digits: of the sum of each
    32 of q, high [8] and low [8], 64 * high + low. starts: of each 16, -32 times the sum."""
    rows, places, factors = x.view(M, S, 4, 2, 2, SIXTEEN), q.view(S, C, 4, 2, 2, SIXTEEN), scales.view(S, C)
    pairs, begin = digits.view(S, C, 2, 4, dtype=i16), starts.view(S, 4, 2, 2, C)  # of C rows, M are filled
    for m, s in tiles(M, S):
        i, j = whole(SIXTEEN), whole(SUPER)
        largest = max(abs(x[m, s, j]), over=j)
        factors[s, m] = largest / LARGEST
        inverse = where(largest > 0.0, LARGEST / largest, 0.0)
        for c in each(4):
            highs, lows = zeros(m, s, dtype=i32), zeros(m, s, dtype=i32)
            for b in (0, 1):
                first = round(rows[m, s, c, b, 0, i] * inverse).to(i32)
                second = round(rows[m, s, c, b, 1, i] * inverse).to(i32)
                sums = sum(first, over=i), sum(second, over=i)
                places[s, m, c, b, 0, i] = first.to(i8)
                places[s, m, c, b, 1, i] = second.to(i8)
                begin[s, c, b, 0, m] = sums[0] * -32
                begin[s, c, b, 1, m] = sums[1] * -32
                total = sums[0] + sums[1]
                high = (total + DIGIT // 2) >> DIGIT_BITS
                highs |= (high & 255) << (8 * b)
                lows |= ((total - (high << DIGIT_BITS)) & 255) << (8 * b)
            pairs[s, m, 0, c] = highs.to(i16)
            pairs[s, m, 1, c] = lows.to(i16)


# ------------------------------------------------------------------------------------------------- layout and reference


def to_panels(words: Array) -> Array:
    """Rows of words [N, S, R, 4] in panels [N / 16, S, R, 16, 4], as a view; N a multiple of 16."""
    return np.moveaxis(words.reshape(-1, PANEL, *words.shape[1:]), 1, -2)


def _lanes(values: Array) -> Array:
    """[N, S, ...] to bytes [N / 16, S, words, 16, 4] with the lanes next to each other."""
    rows = values.shape[0] // PANEL
    found = np.ascontiguousarray(np.moveaxis(values.reshape(rows, PANEL, *values.shape[1:]), 1, -1))
    words = int(np.prod(values.shape[2:])) * values.itemsize // SLOT
    return found.view(np.uint8).reshape(rows, values.shape[1], words, PANEL, SLOT)


def panels_of(form: str, parts: tuple[Array, ...]) -> Array:
    """w of what the function of `SPLITS` gives; N a multiple of 16."""
    n, s = parts[-1].shape
    quants = _packed(form, parts[0], n, s)
    if form in WITH_MINIMA:
        _, scale, minimum, d, d_min = parts
        words = [to_panels(quants), _lanes(scale.reshape(n, s, 8)), to_panels(minimum.reshape(n, s, 2, SLOT)),
                 _lanes(np.stack([d, d_min], axis=2))]
    else:
        _, scale, d = parts
        words = [to_panels(quants), _lanes(scale.reshape(n, s, 16).view(np.uint8)),
                 _lanes(np.stack([d, np.zeros_like(d)], axis=2))]
    return np.concatenate(words, axis=2)


def _packed(form: str, quants: Array, n: int, s: int) -> Array:
    """The words of quants [N, S, words, 4]."""
    if form == "q4k":
        return quants.reshape(n, s, 32, SLOT)
    if form == "q5k":
        q = quants.reshape(n, s, 8, 8, SLOT)
        five, six, seven, eight = q[:, :, :, :5], *(q[:, :, :, word] for word in (5, 6, 7))
        upper = [six & 7, six >> 3 << 1 | eight >> 3 & 1, seven & 7, seven >> 3 << 1 | eight >> 4, eight & 7]
        words: Array = five | np.stack(upper, axis=3) << 5
    elif form == "q3k":
        q = (quants.reshape(n, s, 8, 2, 3 + 1, SLOT) + np.int8(4)).astype(np.uint8).reshape(n, s, 8, 8, SLOT)
        seven, eight = q[:, :, :, 6], q[:, :, :, 7]
        upper = [seven & 3, eight & 3, seven >> 2 | eight >> 2 << 1]
        words = q[:, :, :, 0:6:2] | q[:, :, :, 1:6:2] << 3 | np.stack(upper, axis=3) << 6
    else:
        q = (quants.reshape(n, s, SIXTEEN, 4, SLOT) + np.int8(32)).astype(np.uint8)
        words = q[:, :, :, :3] | (q[:, :, :, 3:] >> TWO_BITS & 3) << 6
    return words.reshape(n, s, QUANT_WORDS[form], SLOT)


def split_q3k(raw: Array) -> tuple[Array, ...]:
    """Bytes [N, S, 110] of block_q3_K to quants -4 ... 3 [N, G, 16], scale [N, G], d [N, S].

    32 bytes with the highest bits, bit h of byte i that of weight 32 * h + i; 64 with the other two, of 128 weights
    bits 2 * j of byte i those of weight 32 * j + i; 12 with 16 scales, whose lower 4 bits are in the first 8, the low
    halves first, and the other 2 in the last 4, bits 2 * j of byte i those of scale 4 * j + i; d.
    """
    n, s = raw.shape[:2]
    high = (raw[:, :, :32].reshape(n, s, 1, 32) >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 2
    two = raw[:, :, 32:96].reshape(n, s, 2, 1, 32) >> TWO_BITS_OF_FOUR[:, None] & 3
    quants = (high.reshape(n, s, 2, 4, 32) | two).astype(np.int8) - np.int8(4)
    low, last = raw[:, :, 96:104], raw[:, :, 104:108].reshape(n, s, 1, 4)
    upper = (last >> TWO_BITS_OF_FOUR[:, None] & 3).reshape(n, s, SIXTEEN) << 4
    scale = (np.concatenate([low & 15, low >> 4], axis=2) | upper).astype(np.int8) - np.int8(32)
    d = raw[:, :, 108:].copy().view("<f2")[:, :, 0]
    return quants.reshape(n, s * 16, SIXTEEN), scale.reshape(n, s * 16), d


def split_q4k(raw: Array) -> tuple[Array, ...]:
    """Bytes [N, S, 144] of block_q4_K to quants [N, G, 32], scale, minimum [N, G, 2], d, d_min [N, S].

    d, d_min, 12 bytes of scales and minima, 128 bytes of quants.
    """
    n, s = raw.shape[:2]
    return (raw[:, :, 16:].reshape(n, s * 4, HALF), *_scales_and_minima(raw))


def split_q5k(raw: Array) -> tuple[Array, ...]:
    """Bytes [N, S, 176] of block_q5_K to quants [N, G, 32], one a byte, and the others as of block_q4_K.

    As block_q4_K, with 32 bytes before the quants: bit h of byte i is the highest one of weight 32 * h + i.
    """
    n, s = raw.shape[:2]
    low = raw[:, :, 48:].reshape(n, s, 4, 1, HALF)
    quants = np.concatenate([low & 15, low >> 4], axis=3).reshape(n, s, 8, HALF)
    quants |= (raw[:, :, 16:48].reshape(n, s, 1, HALF) >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
    return (quants.reshape(n, s * 8, HALF), *_scales_and_minima(raw))


def _scales_and_minima(raw: Array) -> tuple[Array, ...]:
    """scale, minimum [N, G, 2], d, d_min of bytes that begin with d, d_min, and 12 bytes with 8 scales and 8 minima of
    6 bits (`get_scale_min_k4`, ggml-quants.c)."""
    n, s = raw.shape[:2]
    d, d_min = (raw[:, :, at : at + 2].copy().view("<f2")[:, :, 0] for at in (0, 2))
    low, middle, high = (raw[:, :, 4 + at : 8 + at] for at in (0, 4, 8))
    scale = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=2)
    minimum = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=2)
    return scale.reshape(n, s * 4, 2), minimum.reshape(n, s * 4, 2), d, d_min


def split_q6k(raw: Array) -> tuple[Array, ...]:
    """Bytes [N, S, 210] of block_q6_K to quants [N, G, 16], scale [N, G], d [N, S].

    128 bytes with the lower 4 bits, 64 with the upper 2, 16 scales, d. Of 128 weights, byte i of 64 has the lower bits
    of weights i and 64 + i; byte i of 32 the upper bits of weights i, 32 + i, 64 + i and 96 + i.
    """
    n, s = raw.shape[:2]
    lower = raw[:, :, :128].reshape(n, s, 2, 1, 64)
    upper = raw[:, :, 128:192].reshape(n, s, 2, 1, 32)
    four = np.concatenate([lower & 15, lower >> 4], axis=3).reshape(n, s, 2, 4, 32)
    two = (upper >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    quants = (four | (two << 4)).astype(np.int8) - np.int8(32)
    scale = raw[:, :, 192:208].copy().view(np.int8)
    d = raw[:, :, 208:].copy().view("<f2")[:, :, 0]
    return quants.reshape(n, s * 16, SIXTEEN), scale.reshape(n, s * 16), d


SPLITS = {"Q3_K": ("q3k", 110, split_q3k), "Q4_K": ("q4k", 144, split_q4k), "Q5_K": ("q5k", 176, split_q5k),
          "Q6_K": ("q6k", 210, split_q6k)}
"""ggml's name -> form, bytes of 256 weights, how they are taken apart."""


def rows_of(form: str, w: Array) -> Array:
    """The matrix [N, K] of panels w, in float64."""
    p, s = w.shape[:2]
    flat = w.reshape(p, s, WORDS[form] * PANEL * SLOT)
    at, size = SCALES[form] * 64, 8 if form in WITH_MINIMA else 16
    scale = flat[:, :, at : at + size * PANEL].reshape(p, s, size, PANEL)
    at = FACTORS[form] * 64
    d, d_min = flat[:, :, at : at + 64].copy().view("<f2").astype(np.float64).reshape(p, s, 2, PANEL).swapaxes(0, 2)
    d, d_min = (one.swapaxes(0, 1) for one in (d, d_min))
    q = _unpacked(form, w)
    if form in WITH_MINIMA:
        at = MINIMA[form]
        minimum = np.moveaxis(w[:, :, at : at + 2], 3, 2).reshape(p, s, PANEL, 8).swapaxes(2, 3)
        wide = q * (d[:, :, None] * scale)[:, :, :, None, :, None]
        wide -= (d_min[:, :, None] * minimum)[:, :, :, None, :, None]
    else:
        q = q.astype(np.float64) - (32 if form == "q6k" else 4)
        wide = q * (d[:, :, None] * scale.view(np.int8))[:, :, :, None, :, None]
    found: Array = np.moveaxis(wide, 4, 1).reshape(p * PANEL, s * SUPER)
    return found


def _unpacked(form: str, w: Array) -> Array:
    """The quants [P, S, blocks, words, 16, 4] of panels, one a byte."""
    p, s = w.shape[:2]
    words = w[:, :, : QUANT_WORDS[form]]
    if form == "q4k":
        words = words.reshape(p, s, 4, 8, PANEL, SLOT)
        return np.stack([words & 15, words >> 4], axis=3).reshape(p, s, 8, 8, PANEL, SLOT)
    if form == "q5k":
        words = words.reshape(p, s, 8, 5, PANEL, SLOT)
        a, b, c, d, e = (words[:, :, :, word : word + 1] >> 5 for word in range(5))
        upper = [a | b >> 1 << 3, c | d >> 1 << 3, e | (b & 1) << 3 | (d & 1) << 4]
        return np.concatenate([words & 31, *upper], axis=3)
    if form == "q3k":
        words = words.reshape(p, s, 8, 3, PANEL, SLOT)
        a, b, e = (words[:, :, :, word : word + 1] for word in range(3))
        six = [part >> place & 7 for part in (a, b, e) for place in (0, 3)]
        upper = [a >> 6 | (e >> 6 & 1) << 2, b >> 6 | e >> 7 << 2]
        return np.concatenate([*six, *upper], axis=3).reshape(p, s, SIXTEEN, 4, PANEL, SLOT)
    three = words.reshape(p, s, SIXTEEN, 3, PANEL, SLOT)
    last = np.bitwise_or.reduce(three >> 6 << TWO_BITS[:, None], axis=3, keepdims=True)
    return np.concatenate([three & 63, last], axis=3)


def quantize_rows(x: Array) -> dict[str, Array]:
    """q, scales, digits and starts of rows [M, S, 256] in f32, as quantize_super has them."""
    x = x.astype(np.float32)
    largest = np.abs(x).max(axis=-1)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(LARGEST) / largest, np.float32(0))
    q = np.rint(x * inverse[..., None])
    sixteens = q.reshape(*q.shape[:2], SIXTEEN, SIXTEEN).sum(axis=-1)
    total = sixteens.reshape(*q.shape[:2], 8, 2).sum(axis=-1)
    high = np.floor((total + DIGIT // 2) / DIGIT)
    return {
        "q": q.astype(np.int8).swapaxes(0, 1), "scales": (largest / np.float32(LARGEST)).T,
        "digits": np.concatenate([high, total - DIGIT * high], axis=2).astype(np.int8).swapaxes(0, 1),
        "starts": (sixteens * -32).astype(np.int32).transpose(1, 2, 0),
    }


def activations(arguments: Arguments) -> Array:
    """x [M, K], in float64."""
    x: Array = arguments["x"].astype(np.float64)
    if arguments["x"].dtype == np.float32:
        return x.reshape(1, -1)
    x = x * arguments["x_scales"][:, :, None].astype(np.float64)
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)


def reference(arguments: Arguments, form: str) -> dict[str, Array]:
    if "out" in arguments:
        w = arguments["w"]
        q, j, blocks = w.shape[:3]
        wide = rows_of(form, w.reshape(q * j, *w.shape[2:]))
        pairs = wide.reshape(q, j, PANEL, blocks, SUPER // 2, 2).transpose(0, 3, 4, 1, 2, 5)
        return {"out": pairs.astype(arguments["out"].dtype)}
    y = arguments["y"]
    if "x" not in arguments:
        wide = rows_of(form, arguments["w"])
        return {"y": (wide[arguments["tokens"]] if "tokens" in arguments else wide).reshape(y.shape)}
    x = activations(arguments)[: len(y) if y.ndim == 3 else 1]
    if "gate" in arguments:
        found = silu_reference(x @ rows_of(form, arguments["gate"]).T) * (x @ rows_of(form, arguments["up"]).T)
    else:
        found = x @ rows_of(form, arguments["w"]).T
    found = found.reshape(y.shape)
    return {"y": arguments["residual"] + found if "residual" in arguments else found}


def quantize_reference(arguments: Arguments) -> dict[str, Array]:
    rows, expected = len(arguments["x"]), {}
    for name, made in quantize_rows(arguments["x"]).items():
        expected[name] = arguments[name].copy()  # What lies beyond the rows stays as it is.
        place = expected[name][:, :, :rows] if name == "starts" else expected[name][:, :rows]
        place[...] = made
    return expected


# -------------------------------------------------------------------------------------------------- arguments and cases


def random_panels(random: "np.random.Generator", form: str, p: int, s: int) -> Array:
    """Weights near 1 / sqrt(K)."""
    unit = 1.0 / np.sqrt(SUPER * s + 1.0)
    n = p * PANEL
    d = (unit * random.uniform(0.002, 0.005, (n, s))).astype(np.float16)
    if form not in WITH_MINIMA:
        most, unit_scale = (32, 128) if form == "q6k" else (4, 32)
        values = random.integers(-most, most, (n, s * 16, SIXTEEN)).astype(np.int8)
        signed = random.integers(-unit_scale, unit_scale, (n, s * 16)).astype(np.int8)
        times = np.float16(0.5 if form == "q6k" else 16)
        return panels_of(form, (values, signed, (d * times).astype(np.float16)))
    quants = random.integers(0, *((32, (n, s * 8, HALF)) if form == "q5k" else (256, (n, s * 4, HALF))))
    scale, minimum = (random.integers(0, 64, (n, s * 4, 2)).astype(np.uint8) for _ in range(2))
    d_min = d * np.float16(7.5)
    d = d * np.float16(0.5) if form == "q5k" else d
    return panels_of(form, (quants.astype(np.uint8), scale, minimum, d, d_min.astype(np.float16)))


def random_activations(random: "np.random.Generator", s: int, rows: int, more: int = 0) -> Arguments:
    """Quantised rows, with room for some more."""
    made = quantize_rows(normal(random, rows + more, s, SUPER))
    names = {"q": "x", "scales": "x_scales", "digits": "digits", "starts": "starts"}
    return {names[name]: np.ascontiguousarray(part) for name, part in made.items()}


def make_arguments(random: "np.random.Generator", shape: Shape, form: str, task: str) -> Arguments:
    s = shape["S"]
    if task == "quantize":
        m, c = shape["M"], shape["C"]
        x = normal(random, m, s, SUPER)
        x[:, ::3] *= 20
        x[m // 2 :, 0] = 0
        return {"x": x, "q": np.full((s, c, SUPER), -1, np.int8), "scales": unwritten(s, c),
                "digits": np.full((s, c, SIXTEEN), -1, np.int8), "starts": unwritten(s, SIXTEEN, c, dtype="i32")}
    if task == "widen_pairs":
        q, j = shape["Q"], shape["J"]
        w = random_panels(random, form, q * j, s)
        return {"w": w.reshape(q, j, *w.shape[1:]), "out": unwritten(q, s, SUPER // 2, j, PANEL, 2, dtype="bf16")}
    p = shape["P"]
    names = ("gate", "up") if task.endswith("swiglu") else ("w",)
    weights: Arguments = {name: random_panels(random, form, p, s) for name in names}
    if task == "dequantize":
        return weights | {"y": unwritten(p, PANEL, s, SUPER)}
    if task == "embedding":
        t = shape["T"]
        tokens = random.integers(0, np.maximum(1, p * PANEL), t).astype(np.int32)
        return {"tokens": tokens} | weights | {"y": unwritten(t, s, SUPER)}
    if task.startswith("matvec"):
        weights["x"] = normal(random, s, SUPER)
        residual = {"residual": normal(random, p, PANEL)} if task.endswith("residual") else {}
        return weights | residual | {"y": unwritten(p, PANEL)}
    m = shape["M"]
    arguments = weights | random_activations(random, s, m, shape["C"] - m)
    if task.endswith("residual"):
        arguments["residual"] = normal(random, m, p, PANEL)
    return arguments | {"y": unwritten(m, p, PANEL)}


SUM = Tolerance(
    2e-5, 5e-5, "a sum of K rounded products near 1 / sqrt(K) in any order, of parts that partly cancel"
)
PLAIN = Tolerance(2e-6, 1e-6, "products and a difference, each rounded once, of parts that partly cancel")
BLOCK_BYTES = {form: SLOT * count for form, count in WORDS.items()}
"""Of a row's 256 weights; GGUF has 110, 144, 176 and 210."""
ROWS = (1, 4, 16, 512)
TASKS = ("matmul", "matmul_residual", "matmul_swiglu", "matvec", "matvec_residual", "matvec_swiglu", "dequantize",
         "embedding", "widen_pairs")


def _entry(form: str, task: str) -> LibraryKernel:
    kernel = quantize_super if task == "quantize" else getattr(kernels_of(form), task)
    count = 2 if task.endswith("swiglu") else 1
    cases = []
    for p, s in ((128, 8), (896, 16)):
        n, k = p * PANEL, s * SUPER
        weights, vectors = count * n * s * BLOCK_BYTES[form], k + 84 * s
        if task == "quantize":
            cases.append(Case({"M": 512, "S": s, "C": rows_apart(512, SUPER)}, flops=512 * 4 * k,
                              bytes=512 * (4 * k + vectors)))
        elif task == "embedding":
            cases.append(Case({"T": 128, "P": p, "S": s}, flops=256 * k, bytes=128 * (4 * k + s * BLOCK_BYTES[form])))
        elif task == "widen_pairs":
            cases.append(Case({"Q": p // 2, "J": 2, "S": s}, flops=2 * n * k, bytes=weights + 2 * n * k))
        elif task == "dequantize":
            cases.append(Case({"P": p, "S": s}, flops=2 * n * k, bytes=weights + 4 * n * k))
        elif task.startswith("matvec"):
            results = 4 * n * (2 if task.endswith("residual") else 1)
            cases.append(Case({"P": p, "S": s}, flops=2 * count * n * k, bytes=weights + results + 4 * k))
        else:
            for m in ROWS:
                results = 4 * m * n * (2 if task.endswith("residual") else 1)
                cases.append(Case({"P": p, "S": s, "C": rows_apart(m, SUPER), "M": m}, flops=2 * count * m * n * k,
                                  bytes=weights + results + m * vectors))
    check_shapes: list[dict[str, int]] = [{"P": p, "S": s} for p, s in ((0, 1), (1, 1), (3, 2), (2, 3))]
    if task == "quantize":
        check_shapes = [{"M": 0, "S": 2, "C": 1}, {"M": 1, "S": 1, "C": 1}, {"M": 5, "S": 2, "C": 7}]
    elif task == "widen_pairs":
        check_shapes = [{"Q": 0, "J": 2, "S": 1}, {"Q": 2, "J": 1, "S": 2}, {"Q": 1, "J": 3, "S": 1}]
    elif task == "embedding":
        check_shapes = [shape | {"T": 3} for shape in check_shapes[1:]]
    elif task.startswith("matmul"):
        check_shapes = [{"P": 0, "S": 1, "C": 1, "M": 1}, {"P": 3, "S": 2, "C": 1, "M": 1},
                        {"P": 2, "S": 1, "C": 9, "M": 7}, {"P": 1, "S": 2, "C": 31, "M": 31}]
    return LibraryKernel(
        name=kernel.name, kernel=kernel,
        reference=quantize_reference if task == "quantize" else lambda arguments: reference(arguments, form),
        make_arguments=lambda random, shape: make_arguments(random, shape, form, task),
        tolerance=EXACT if task == "quantize" else PLAIN if task in ("dequantize", "embedding") else SUM if (
            task != "widen_pairs") else rounded_to_bf16(PLAIN),
        cases=tuple(cases), check_shapes=tuple(check_shapes), dtype=form,
        products="i8" if task.startswith("matmul") else "f32",
    )


LISTED = {"q3k": ("matmul", "matvec_swiglu", "dequantize", "widen_pairs"), "q4k": TASKS,
          "q5k": ("matmul", "matmul_residual", "matmul_swiglu", "matvec", "embedding", "widen_pairs"), "q6k": TASKS}
"""The kernels of the library: of forms that are not all there some, with all that is the form's own."""
KERNELS = (*(_entry(form, task) for form, tasks in LISTED.items() for task in tasks), _entry("q4k", "quantize"))
