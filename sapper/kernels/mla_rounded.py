"""Multi-head latent attention of many tokens in products of bf16; see mla.py, whose naive way this is.

    expand_rounded             keys and values of all positions from a cache in bf16, rounded to bf16
    latent_attention_rounded   attention with them: queries and the weights of the softmax are rounded to bf16, as
                               PyTorch and FlashAttention do; scores and sums are f32
"""

from __future__ import annotations

import sapper as sp
from sapper import Tensor, bf16, each, exp2, f32, full, i32, min, span, tiles, where, whole, zeros

from .attention import ROUNDED_PRODUCTS
from .mla import LOG2_E, MINUS_INFINITY, QUERY_BLOCK, attention_entry, expand_entry, make_expand
from .online_softmax import attend
from .record import Tolerance

T, H, D, S, V, P = sp.dims("T H D S V P")

expand_rounded = make_expand(bf16, bf16, bf16, "expand_rounded")


@sp.kernel(specialise="D S V")
def latent_attention_rounded(
    q: Tensor[f32, T, H, D], q_turned: Tensor[f32, T, H, S], keys: Tensor[bf16, P, H, D], shared: Tensor[bf16, P, S],
    values: Tensor[bf16, P, H, V], position: i32, scale: f32, out: Tensor[f32, T, H, V],
):
    """Causal attention of T new tokens over P = position + T positions; shared: the turned keys."""
    for h in each(H):
        for block in each((T + QUERY_BLOCK - 1) // QUERY_BLOCK):
            first = block * QUERY_BLOCK
            stop = min(first + QUERY_BLOCK, T)
            for t in tiles(span(first, stop)):
                d = whole(D)
                s = whole(S)
                v = whole(V)
                query = (q[t, h, d] * (scale * LOG2_E)).to(bf16)
                turn = (q_turned[t, h, s] * (scale * LOG2_E)).to(bf16)
                highest = full(t, value=MINUS_INFINITY, dtype=f32)
                total = zeros(t, dtype=f32)
                acc = zeros(t, v, dtype=f32)
                for p in tiles(span(0, position + stop)):
                    score = query @ keys[p, h, d] + turn @ shared[p, s]
                    score = where(p <= position + t, score, MINUS_INFINITY)
                    highest, total, acc = attend(highest, total, acc, score, values[p, h, v], p, exp2, bf16)
                out[t, h, v] = acc / total


EXPANDED = Tolerance(2.0**-7, 2e-5, "a sum of products near 1 / sqrt(count) in any order, then once to bf16, where the "
                     "two may round apart")
KERNELS = (
    expand_entry(expand_rounded, "bf16", "bf16", "bf16", EXPANDED),
    attention_entry(latent_attention_rounded, "bf16", "bf16", ROUNDED_PRODUCTS["f32"]),
)
