"""The weights of a DeepSeek model, in the layout that its kernels take.

In: a loader with NAMES or GGUF_NAMES, and a config. Out: `DeepseekWeights`. Holds: matrices and vectors are as `Loader`
makes them; the rows that make turned features are in the order of the half-split rotary pairing, which changes no
score, as queries and keys are reordered alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ...kernels.quantized import PANEL
from ..block_rows import Order
from ..checkpoint import Checkpoint
from ..errors import ModelError
from ..k_matrix import RawK
from ..linear import Dense, Matrix
from ..mixture import DenseWeights, MixtureWeights, load_dense, load_mixture
from ..raw_blocks import RawBlocks
from ..weights import Loader, Use, half_split_rows
from .config import DeepseekConfig
from .heads import DenseHeads, KeyBlocks, Keys, ValueBlocks, Values

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class IndexWeights:
    """Of an indexer. gain, bias [its features]: of the norm of its keys. head_weights [its heads, features], f32."""

    gain: Array
    bias: Array
    head_weights: Dense


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """joined [(query_rank or heads * head_features) + key_rank + turned_features (+ index features), features]: what
    meets a layer's input: rows of the queries' latent vector, or of the queries where there is none, then of the latent
    vector of keys and values, of the shared key and of the index key. query_gain, query: from the queries' latent
    vector to the queries, and behind them the index queries, or None. key_gain [key_rank]. keys, values: what makes
    those of all heads of a latent vector. output [features, heads * value_features]. index: None where there is no
    indexer.
    """

    gain: Array
    joined: Matrix
    query_gain: Array | None
    query: Matrix | None
    key_gain: Array
    keys: Keys
    values: Values
    output: Matrix
    index: IndexWeights | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attention: AttentionWeights
    feed_forward: DenseWeights | MixtureWeights


@dataclass(frozen=True, slots=True)
class PredictorWeights:
    """An MTP head (DeepSeek-V3, 2024, section 2.2). embedding_gain, hidden_gain: of the norms of its two inputs; join
    [features, 2 * features]: from a token's embedding, and behind it the hidden state before the token, to what the
    layer gets; gain: of the norm before the logits. Embedding and logits are the model's, of which checkpoints have
    copies.
    """

    embedding_gain: Array
    hidden_gain: Array
    join: Matrix
    layer: LayerWeights
    gain: Array


@dataclass(frozen=True, slots=True)
class DeepseekWeights:
    """A whole model. embedding [vocabulary, features]; logits: the same matrix where the two are tied. predictor: None
    where none was asked for."""

    embedding: Matrix
    layers: tuple[LayerWeights, ...]
    gain: Array
    logits: Matrix
    predictor: PredictorWeights | None = None

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that decoding one token reads: of the experts, those that it goes through."""
        count = self.gain.nbytes + self.logits.nbytes
        for layer in self.layers:
            one = layer.attention
            count += one.gain.nbytes + one.joined.nbytes + one.key_gain.nbytes + one.output.nbytes
            count += one.keys.nbytes + one.values.nbytes
            if one.query is not None and one.query_gain is not None:
                count += one.query.nbytes + one.query_gain.nbytes
            if one.index is not None:
                count += one.index.gain.nbytes + one.index.bias.nbytes + one.index.head_weights.nbytes
            count += layer.feed_forward.step_bytes
        return count

    @property
    def step_size(self) -> int:
        """Weights that one token of a prompt meets: those of the layers, where all go but the last."""
        count = 0
        for layer in self.layers:
            one = layer.attention
            count += one.joined.size + one.keys.size + one.values.size + one.output.size
            count += layer.feed_forward.step_size
            count += one.query.size if one.query is not None else 0
            count += one.index.head_weights.size if one.index is not None else 0
        return count


LAYER = "model.layers.{}."
NAMES = {
    "embedding": "model.embed_tokens.weight", "gain": "model.norm.weight", "logits": "lm_head.weight",
    "attention_gain": LAYER + "input_layernorm.weight", "all_queries": LAYER + "self_attn.q_proj.weight",
    "query_latent": LAYER + "self_attn.q_a_proj.weight", "query_gain": LAYER + "self_attn.q_a_layernorm.weight",
    "query": LAYER + "self_attn.q_b_proj.weight", "key_latent": LAYER + "self_attn.kv_a_proj_with_mqa.weight",
    "key_gain": LAYER + "self_attn.kv_a_layernorm.weight", "expand": LAYER + "self_attn.kv_b_proj.weight",
    "index_query": LAYER + "self_attn.indexer.wq_b.weight", "index_key": LAYER + "self_attn.indexer.wk.weight",
    "index_gain": LAYER + "self_attn.indexer.k_norm.weight", "index_bias": LAYER + "self_attn.indexer.k_norm.bias",
    "index_weights": LAYER + "self_attn.indexer.weights_proj.weight",
    "output": LAYER + "self_attn.o_proj.weight", "feed_forward_gain": LAYER + "post_attention_layernorm.weight",
    "gate": LAYER + "mlp.gate_proj.weight", "up": LAYER + "mlp.up_proj.weight", "down": LAYER + "mlp.down_proj.weight",
    "router": LAYER + "mlp.gate.weight", "router_bias": LAYER + "mlp.gate.e_score_correction_bias",
    "expert_gate": LAYER + "mlp.experts.{}.gate_proj.weight", "expert_up": LAYER + "mlp.experts.{}.up_proj.weight",
    "expert_down": LAYER + "mlp.experts.{}.down_proj.weight",
    "shared_gate": LAYER + "mlp.shared_experts.gate_proj.weight",
    "shared_up": LAYER + "mlp.shared_experts.up_proj.weight",
    "shared_down": LAYER + "mlp.shared_experts.down_proj.weight",
    "predictor_embedding_gain": LAYER + "enorm.weight", "predictor_hidden_gain": LAYER + "hnorm.weight",
    "predictor_join": LAYER + "eh_proj.weight", "predictor_gain": LAYER + "shared_head.norm.weight",
}

PUBLISHED = NAMES

BLOCK = "blk.{}."
GGUF_NAMES = {
    "embedding": "token_embd.weight", "gain": "output_norm.weight", "logits": "output.weight",
    "attention_gain": BLOCK + "attn_norm.weight", "all_queries": BLOCK + "attn_q.weight",
    "query_latent": BLOCK + "attn_q_a.weight", "query_gain": BLOCK + "attn_q_a_norm.weight",
    "query": BLOCK + "attn_q_b.weight", "key_latent": BLOCK + "attn_kv_a_mqa.weight",
    "key_gain": BLOCK + "attn_kv_a_norm.weight", "expand": BLOCK + "attn_kv_b.weight",
    "expand_keys": BLOCK + "attn_k_b.weight", "expand_values": BLOCK + "attn_v_b.weight",
    "output": BLOCK + "attn_output.weight", "feed_forward_gain": BLOCK + "ffn_norm.weight",
    "gate": BLOCK + "ffn_gate.weight", "up": BLOCK + "ffn_up.weight", "down": BLOCK + "ffn_down.weight",
    "router": BLOCK + "ffn_gate_inp.weight", "router_bias": BLOCK + "exp_probs_b.bias",
    "expert_gate": BLOCK + "ffn_gate_exps.weight", "expert_up": BLOCK + "ffn_up_exps.weight",
    "expert_down": BLOCK + "ffn_down_exps.weight", "shared_gate": BLOCK + "ffn_gate_shexp.weight",
    "shared_up": BLOCK + "ffn_up_shexp.weight", "shared_down": BLOCK + "ffn_down_shexp.weight",
}
"""Of GGUF files: the experts of a layer lie in one tensor, and newer files have the rows of `expand` in two."""


def in_file(checkpoint: Checkpoint, config: DeepseekConfig, role: str) -> dict[str, Callable[[Array], Array]]:
    """The tensors of a checkpoint that have the rows of a published matrix, and how each has them."""
    if role != "expand" or not checkpoint.gguf or GGUF_NAMES[role].format(0) in checkpoint.tensors:
        return {role: lambda rows: rows}

    def of_heads(rows: Array) -> Array:
        return rows.reshape(config.heads, config.key_features + config.value_features, -1)

    return {"expand_keys": lambda rows: of_heads(rows)[:, : config.key_features].swapaxes(1, 2),
            "expand_values": lambda rows: of_heads(rows)[:, config.key_features :]}


def load_weights(loader: Loader, config: DeepseekConfig, predictor: bool = False) -> DeepseekWeights:
    """Read and lay out all weights; routers stay in f32. predictor: the first MTP head too.

    Raises ModelError for a tensor that is missing, of the wrong shape, or of a format that cannot be read.
    """
    if predictor and not config.predictors:
        raise ModelError(loader.where, "no MTP head", "one, to draft with", "generate without --speculate")
    layers = [_layer(loader, config, i) for i in range(config.layers)]
    gain = loader.vector("gain", config.features)
    rows = config.vocabulary
    embedding = loader.joined([Use("embedding", rows)], config.features)
    logits = loader.joined([Use("logits", rows)], config.features) if loader.has("logits") else embedding
    head = _predictor(loader, config) if predictor else None
    loader.arena.settle()
    return DeepseekWeights(embedding, tuple(layers), gain, logits, head)


def _layer(loader: Loader, config: DeepseekConfig, i: int) -> LayerWeights:
    attention = _attention(loader, config, i)
    mixture = config.mixture if i >= config.dense_layers else None
    feed_forward = (load_dense(loader, config.features, config.hidden, i) if mixture is None
                    else load_mixture(loader, config.features, mixture, i))
    return LayerWeights(attention, feed_forward)


def _predictor(loader: Loader, config: DeepseekConfig) -> PredictorWeights:
    layer, features = config.layers, config.features
    embedding_gain, hidden_gain = (
        loader.vector(f"predictor_{name}", features, layer) for name in ("embedding_gain", "hidden_gain"))
    join = loader.joined([Use("predictor_join", features)], 2 * features, layer)
    made = _layer(loader, config, layer)
    return PredictorWeights(embedding_gain, hidden_gain, join, made, loader.vector("predictor_gain", features, layer))


def _attention(loader: Loader, config: DeepseekConfig, layer: int) -> AttentionWeights:
    features, heads, turned = config.features, config.heads, config.turned_features

    def half_split(count: int) -> Order | None:
        """The order of the rows of so many heads, of which the last ones turn."""
        return partial(half_split_rows, heads=count, turned=turned) if config.interleaved else None

    queries = Use("query", heads * config.head_features, half_split(heads))
    gain = loader.vector("attention_gain", features, layer)
    first = Use("query_latent", config.query_rank) if config.query_rank else Use(
        "all_queries", queries.rows, queries.order)
    uses = [first, Use("key_latent", config.key_rank + turned, half_split(1))]
    indexer, all_queries = config.indexer, [queries]
    if indexer is not None:
        uses.append(Use("index_key", indexer.features))
        all_queries.append(Use("index_query", indexer.heads * indexer.features))
    joined = loader.joined(uses, features, layer)
    query_gain = query = None
    if config.query_rank:
        query_gain = loader.vector("query_gain", config.query_rank, layer)
        query = loader.joined(all_queries, config.query_rank, layer)
    key_gain = loader.vector("key_gain", config.key_rank, layer)
    keys, values = _keys(loader, config, layer), _values(loader, config, layer)
    output = loader.joined([Use("output", features)], heads * config.value_features, layer)
    index = None if indexer is None else IndexWeights(
        loader.vector("index_gain", indexer.features, layer), loader.vector("index_bias", indexer.features, layer),
        loader.wide("index_weights", indexer.heads, features, layer))
    return AttentionWeights(gain, joined, query_gain, query, key_gain, keys, values, output, index)


def _keys(loader: Loader, config: DeepseekConfig, layer: int) -> Keys:
    """In blocks where these follow what a query meets, and queries part between them."""
    heads, features, rank = config.heads, config.key_features, config.key_rank
    if not loader.has("expand_keys", layer):
        return DenseHeads.of(loader.dense([_rows_of(config, slice(features))], rank, layer), heads)
    shape = (heads, rank, features)
    raw = loader.raw("expand_keys", shape, (heads * rank, features), layer) if loader.quantises else None
    if isinstance(raw, RawBlocks) and rank % PANEL == 0 and config.head_features % raw.form.block == 0:
        return KeyBlocks(loader.held(raw.together([raw], loader.arena, False)), heads)
    rows = loader.entry("expand_keys", shape, layer).read().swapaxes(1, 2)
    return DenseHeads.of(loader.dense_of(rows.reshape(-1, rank)), heads)


def _values(loader: Loader, config: DeepseekConfig, layer: int) -> Values:
    """In blocks where the file has them so, along the latent space."""
    heads, features, rank = config.heads, config.value_features, config.key_rank
    apart, shape = loader.has("expand_values", layer), (heads, features, rank)
    use = _rows_of(config, slice(config.key_features, None))
    raw: Any = None
    if loader.quantises and features % PANEL == 0:
        raw = (loader.raw("expand_values", shape, (heads * features, rank), layer) if apart
               else loader.raw(use.role, (use.rows, rank), (use.rows, rank), layer))
    if isinstance(raw, (RawBlocks, RawK)):
        raw = raw if apart else raw.reordered(use.order)
        return ValueBlocks(loader.held(raw.together([raw], loader.arena, False)), heads)
    rows = (loader.dense_of(loader.entry("expand_values", shape, layer).read().reshape(-1, rank)) if apart
            else loader.dense([use], rank, layer))
    return DenseHeads.of(rows, heads)


def _rows_of(config: DeepseekConfig, part: slice) -> Use:
    """The rows of `expand` that make keys, or values: a part of each head's."""
    heads, features = config.heads, config.key_features + config.value_features

    def order(rows: Array) -> Array:
        return rows.reshape(heads, features, *rows.shape[1:])[:, part].reshape(-1, *rows.shape[1:])

    return Use("expand", heads * features, order, heads * len(range(features)[part]))


