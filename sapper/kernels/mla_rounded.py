"""Multi-head latent attention of many tokens in products of bf16; see mla.py, whose naive way this is.

    expand_rounded             keys and values of all positions from a cache in bf16, rounded to bf16
    latent_attention_rounded   attention with them: queries and the weights of the softmax are rounded to bf16, as
                               PyTorch and FlashAttention do; scores and sums are f32
"""

from sapper import bf16

from .attention import ROUNDED_PRODUCTS
from .mla import attention_entry, expand_entry, make_expand, make_latent_attention
from .record import Tolerance

expand_rounded = make_expand(bf16, bf16, bf16, "expand_rounded")
latent_attention_rounded = make_latent_attention("latent_attention_rounded", bf16, products=bf16)

EXPANDED = Tolerance(2.0**-7, 2e-5, "a sum of products near 1 / sqrt(count) in any order, then once to bf16, where the "
                     "two may round apart")
KERNELS = (
    expand_entry(expand_rounded, "bf16", "bf16", "bf16", EXPANDED),
    attention_entry(latent_attention_rounded, "bf16", "bf16", ROUNDED_PRODUCTS["f32"]),
)
