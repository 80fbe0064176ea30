"""Multi-head latent attention of one token in products of bf16, for matrix instructions; see mla.py.

Heads are rows: all of them read the same cache, LONG_SPLIT positions a task. Queries and weights are rounded to bf16,
scores and sums are f32. Signature and results are those of `latent_attention_decode_rounded`, and `merge_long_splits`
joins the splits.
"""

from __future__ import annotations

import sapper as sp
from sapper import Tensor, bf16, each, exp2, f32, full, i32, min, span, tiles, whole, zeros

from .mla import LOG2_E, LONG_SPLIT, MINUS_INFINITY, decode_entry
from .online_softmax import attend_scaled

H, C, S, P, B = sp.dims("H C S P B")


@sp.kernel(specialise="H C S")
def latent_attention_decode_narrow(
    q: Tensor[f32, H, C], q_turned: Tensor[f32, H, S], latents: Tensor[bf16, P, C], keys: Tensor[bf16, P, S],
    position: i32, scale: f32, highest: Tensor[f32, B, H], total: Tensor[f32, B, H], partial: Tensor[f32, B, H, C],
):
    for b in each(position // LONG_SPLIT + 1):
        for h in tiles(H):
            c = whole(C)
            s = whole(S)
            factor = scale * LOG2_E
            query = q[h, c].to(bf16)
            turn = q_turned[h, s].to(bf16)
            top = full(h, value=MINUS_INFINITY, dtype=f32)
            sums = zeros(h, dtype=f32)
            acc = zeros(h, c, dtype=f32)
            for p in tiles(span(b * LONG_SPLIT, min(b * LONG_SPLIT + LONG_SPLIT, position + 1))):
                score = query @ latents[p, c] + turn @ keys[p, s]
                top, sums, acc = attend_scaled(top, sums, acc, score, factor, latents[p, c], p, exp2, bf16)
            highest[b, h] = top * scale
            total[b, h] = sums
            partial[b, h, c] = acc


KERNELS = (decode_entry(latent_attention_decode_narrow, "bf16", True),)
