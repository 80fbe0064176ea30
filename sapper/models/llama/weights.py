"""The weights of a Llama, or a model much like it, in the layout that its kernels take.

In: a loader, and a config. Out: `LlamaWeights`. Holds: matrices and vectors are as `Loader` makes them; the rows of
the query and key matrices are in the order of the half-split rotary pairing.

GGUF files of a Llama, not of a Qwen, hold query and key rows in the order of the interleaved pairing (rows 2 * i and
2 * i + 1 of a head make a pair); here they are put back, so that one kernel serves all kinds of file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint
from ..linear import Matrix
from ..mixture import DenseWeights, MixtureWeights, load_dense, load_mixture
from ..weights import Loader, Use, half_split_rows
from .config import LlamaConfig

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. attention_gain [features]; qkv [(heads + 2 * kv_heads) * head_features, features]: query rows, then
    key, then value rows. bias [rows of qkv] or None; query_gain, key_gain [2, head_features / 2], of the norms of each
    head's halves, or None. output [features, heads * head_features].
    """

    attention_gain: Array
    qkv: Matrix
    bias: Array | None
    query_gain: Array | None
    key_gain: Array | None
    output: Matrix
    feed_forward: DenseWeights | MixtureWeights


@dataclass(frozen=True, slots=True)
class LlamaWeights:
    """A whole model. embedding [vocabulary, features]; logits: the same matrix where the two are tied.
    rope_factors [head_features / 2] or None: what the file says that each frequency is divided by.
    """

    embedding: Matrix
    layers: tuple[LayerWeights, ...]
    gain: Array
    logits: Matrix
    rope_factors: Array | None

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that decoding one token reads (one row of the embedding is left out)."""
        count = self.gain.nbytes + self.logits.nbytes
        for layer in self.layers:
            count += layer.attention_gain.nbytes + layer.qkv.nbytes + layer.output.nbytes
            count += layer.feed_forward.step_bytes
        return count


GGUF_NAMES = {
    "embedding": "token_embd.weight", "gain": "output_norm.weight", "logits": "output.weight",
    "rope_factors": "rope_freqs.weight",
    "attention_gain": "blk.{}.attn_norm.weight", "query": "blk.{}.attn_q.weight", "key": "blk.{}.attn_k.weight",
    "value": "blk.{}.attn_v.weight", "output": "blk.{}.attn_output.weight",
    "feed_forward_gain": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight", "up": "blk.{}.ffn_up.weight", "down": "blk.{}.ffn_down.weight",
    "query_bias": "blk.{}.attn_q.bias", "key_bias": "blk.{}.attn_k.bias", "value_bias": "blk.{}.attn_v.bias",
    "query_gain": "blk.{}.attn_q_norm.weight", "key_gain": "blk.{}.attn_k_norm.weight",
    "router": "blk.{}.ffn_gate_inp.weight", "expert_gate": "blk.{}.ffn_gate_exps.weight",
    "expert_up": "blk.{}.ffn_up_exps.weight", "expert_down": "blk.{}.ffn_down_exps.weight",
}
JSON_NAMES = {
    "embedding": "model.embed_tokens.weight", "gain": "model.norm.weight", "logits": "lm_head.weight",
    "rope_factors": "",
    "attention_gain": "model.layers.{}.input_layernorm.weight", "query": "model.layers.{}.self_attn.q_proj.weight",
    "key": "model.layers.{}.self_attn.k_proj.weight", "value": "model.layers.{}.self_attn.v_proj.weight",
    "output": "model.layers.{}.self_attn.o_proj.weight",
    "feed_forward_gain": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight", "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
    "query_bias": "model.layers.{}.self_attn.q_proj.bias", "key_bias": "model.layers.{}.self_attn.k_proj.bias",
    "value_bias": "model.layers.{}.self_attn.v_proj.bias",
    "query_gain": "model.layers.{}.self_attn.q_norm.weight", "key_gain": "model.layers.{}.self_attn.k_norm.weight",
    "router": "model.layers.{}.mlp.gate.weight", "expert_gate": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
    "expert_up": "model.layers.{}.mlp.experts.{}.up_proj.weight",
    "expert_down": "model.layers.{}.mlp.experts.{}.down_proj.weight",
}


PUBLISHED = JSON_NAMES


def in_file(checkpoint: Checkpoint, config: LlamaConfig, role: str) -> dict[str, Callable[[Array], Array]]:
    """The tensors of a checkpoint that have the rows of a published matrix, and how each has them."""
    order = file_order(checkpoint, config, role)
    if order is None:
        return {role: lambda rows: rows}
    inverse = np.argsort(order)
    return {role: lambda rows: rows[inverse] if len(rows) == len(inverse) else rows}


def file_order(checkpoint: Checkpoint, config: LlamaConfig, role: str) -> Array | None:
    """Which row of a checkpoint's matrix is each row of the one that was published; None where they are the same."""
    heads = {"query": config.heads, "key": config.kv_heads}.get(role)
    if heads is None or not (checkpoint.gguf and checkpoint.architecture == "llama"):
        return None
    return half_split_rows(np.arange(heads * config.head_features), heads)


def load_weights(loader: Loader, config: LlamaConfig, interleaved: bool) -> LlamaWeights:
    """Read and lay out all weights. interleaved: how the rows of queries and keys are paired in the file.

    Raises ModelError for a tensor that is missing, of the wrong shape, or of a format that cannot be read.
    """
    features, size = config.features, config.head_features
    queries, keys = config.heads, config.kv_heads
    attention = [
        Use("query", queries * size, partial(half_split_rows, heads=queries) if interleaved else None),
        Use("key", keys * size, partial(half_split_rows, heads=keys) if interleaved else None),
        Use("value", keys * size),
    ]
    layers = []
    for i in range(config.layers):
        attention_gain = loader.vector("attention_gain", features, i)
        qkv = loader.joined(attention, features, i)
        bias = _bias(loader, attention, i) if config.biased else None
        query_gain, key_gain = (loader.vector(role, size, i).reshape(2, -1) if config.normed else None
                                for role in ("query_gain", "key_gain"))
        output = loader.joined([Use("output", features)], queries * size, i)
        feed_forward = (load_dense(loader, features, config.hidden, i) if config.mixture is None
                        else load_mixture(loader, features, config.mixture, i))
        layers.append(LayerWeights(attention_gain, qkv, bias, query_gain, key_gain, output, feed_forward))
    gain = loader.vector("gain", features)
    embedding = loader.joined([Use("embedding", config.vocabulary)], features)
    logits = loader.joined([Use("logits", config.vocabulary)], features) if loader.has("logits") else embedding
    factors = loader.entry("rope_factors", (size // 2,)).read() if loader.has("rope_factors") else None
    loader.arena.settle()
    return LlamaWeights(embedding, tuple(layers), gain, logits, factors)


def _bias(loader: Loader, attention: list[Use], layer: int) -> Array:
    parts = [loader.vector(f"{use.role}_bias", use.rows, layer) for use in attention]
    return np.concatenate(parts)
