"""The numbers that describe a DeepSeek model of the second or third generation, V3.2 and its indexer included.

In: Hugging Face's config.json or a GGUF's metadata, as a dictionary. Out: `DeepseekConfig`. Holds: every number was
checked (models/numbers.py), and they fit together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError
from ..mixture import Mixture
from ..numbers import MAX_EXPERTS, MAX_FEATURES, MAX_LAYERS, MAX_POSITIONS, MAX_VOCABULARY, Numbers
from ..rope import Rope, RopeScaling, rope_from_json

LATENT_EPSILON = 1e-6
"""Of the norms of the latent vectors: the published code leaves them at RMSNorm's default."""
INDEX_EPSILON = 1e-6
"""Of the norm of index keys, likewise."""


@dataclass(frozen=True, slots=True)
class Indexer:
    """How the positions that a token attends to are chosen (sapper/kernels/sparse.py).

    heads; features: of each index query and of an index key, the first of which turn; kept: positions of a token.
    """

    heads: int
    features: int
    kept: int


@dataclass(frozen=True, slots=True)
class DeepseekConfig:
    """A DeepSeek model's shape.

    layers; dense_layers: the first ones, which have no mixture; features: width of the residual stream; hidden: of a
    dense layer's feed-forward part; heads; key_features, turned_features, value_features: of each head; key_rank: of
    the latent vector of keys and values; query_rank: of that of the queries, 0 where there is none; vocabulary: tokens;
    positions: the longest context; rope: the angles; interleaved: whether features 2 * i and 2 * i + 1 turn together;
    epsilon: of RMSNorm; mixture: None where all layers are dense; indexer: None where tokens attend to all positions;
    predictors: layers behind the others that foresee further tokens (MTP heads), of which the first can be used.
    """

    layers: int
    dense_layers: int
    features: int
    hidden: int
    heads: int
    key_features: int
    turned_features: int
    value_features: int
    key_rank: int
    query_rank: int
    vocabulary: int
    positions: int
    rope: Rope
    interleaved: bool
    epsilon: float
    mixture: Mixture | None
    indexer: Indexer | None = None
    predictors: int = 0

    @property
    def head_features(self) -> int:
        """Of a query."""
        return self.key_features + self.turned_features

    @property
    def score_scale(self) -> float:
        """What scores are multiplied by before the softmax."""
        return self.rope.scaling.score_factor / math.sqrt(self.head_features)


def from_json(values: Mapping[str, Any], where: str) -> DeepseekConfig:
    """The config in Hugging Face's config.json. Raises ModelError for another architecture, and for numbers that are
    missing, absurd or do not fit.
    """
    source = Numbers(where, values)
    kind = source.one_of("model_type", ("deepseek_v2", "deepseek_v3", "deepseek_v32"))
    third = kind != "deepseek_v2"
    for key in ("attention_bias", "mlp_bias"):
        if values.get(key):
            raise ModelError(f"{where}, key {key}", repr(values[key])[:80], "false", "take a model without biases")
    source.one_of("hidden_act", ("silu",), "silu")
    heads = source.whole("num_attention_heads", MAX_FEATURES)
    if values.get("num_key_value_heads") not in (None, heads):
        raise ModelError(f"{where}, key num_key_value_heads", repr(values["num_key_value_heads"])[:80],
                         f"{heads}, as many as there are heads")
    turned = source.whole("qk_rope_head_dim", MAX_FEATURES)
    if turned % 2:
        raise ModelError(f"{where}, key qk_rope_head_dim", str(turned), "an even number")
    layers = source.whole("num_hidden_layers", MAX_LAYERS)
    dense = min(source.whole("first_k_dense_replace", MAX_LAYERS, 0, least=0), layers)
    return DeepseekConfig(
        layers=layers,
        dense_layers=dense,
        features=source.whole("hidden_size", MAX_FEATURES),
        hidden=source.whole("intermediate_size", MAX_FEATURES),
        heads=heads,
        key_features=source.whole("qk_nope_head_dim", MAX_FEATURES),
        turned_features=turned,
        value_features=source.whole("v_head_dim", MAX_FEATURES),
        key_rank=source.whole("kv_lora_rank", MAX_FEATURES),
        query_rank=0 if values.get("q_lora_rank") is None else source.whole("q_lora_rank", MAX_FEATURES),
        vocabulary=source.whole("vocab_size", MAX_VOCABULARY),
        positions=source.whole("max_position_embeddings", MAX_POSITIONS),
        rope=rope_from_json(values, where, turned // 2, ("yarn",)),
        interleaved=source.flag("rope_interleave", True),
        epsilon=source.real("rms_norm_eps", 0.0, 1.0, 1e-6),
        mixture=_mixture(source, third) if dense < layers else None,
        indexer=_indexer(source, turned) if kind == "deepseek_v32" else None,
        predictors=source.whole("num_nextn_predict_layers", MAX_LAYERS, 0, least=0),
    )


def _indexer(source: Numbers, turned: int) -> Indexer:
    where, values = source.where, source.values
    if values.get("q_lora_rank") is None:
        raise ModelError(f"{where}, key q_lora_rank", "nothing", "a number, as index queries are made of the queries' "
                         "latent vector")
    features = source.whole("index_head_dim", MAX_FEATURES)
    if features <= turned:
        raise ModelError(f"{where}, key index_head_dim", str(features), f"more than the {turned} features that turn")
    return Indexer(source.whole("index_n_heads", MAX_FEATURES), features, source.whole("index_topk", MAX_POSITIONS))


def _mixture(source: Numbers, third: bool) -> Mixture:
    """third: of the third generation, whose keys have other defaults."""
    where, values = source.where, source.values
    if source.whole("moe_layer_freq", MAX_LAYERS, 1) != 1:
        raise ModelError(f"{where}, key moe_layer_freq", repr(values["moe_layer_freq"])[:80], "1")
    method = source.one_of(
        "topk_method", ("noaux_tc",) if third else ("greedy", "group_limited_greedy"),
        "noaux_tc" if third else "greedy",
    )
    source.one_of("scoring_func", ("sigmoid",) if third else ("softmax",), "sigmoid" if third else "softmax")
    experts = source.whole("n_routed_experts", MAX_EXPERTS)
    grouped = method != "greedy"
    groups = source.whole("n_group", MAX_EXPERTS) if grouped else 1
    kept = source.whole("topk_group", MAX_EXPERTS) if grouped else 1
    chosen = source.whole("num_experts_per_tok", MAX_EXPERTS)
    normalise = source.flag("norm_topk_prob", third)
    scale = source.real("routed_scaling_factor", 1e-6, 1e6, 1.0)
    if normalise and not third and scale != 1.0:
        # The published code of the second generation then leaves the factor out, others apply it.
        found = f"true, and routed_scaling_factor {scale:g}"
        raise ModelError(f"{where}, key norm_topk_prob", found, "one or the other")
    shared = 0 if values.get("n_shared_experts") is None else source.whole("n_shared_experts", 64, least=0)
    hidden = source.whole("moe_intermediate_size", MAX_FEATURES)
    mixture = Mixture(experts, shared, chosen, hidden, groups, kept, third, normalise, scale)
    mixture.check(where)
    return mixture


SOFTMAX, SIGMOID = 1, 2
"""What GGUF's expert_gating_func says."""


def from_gguf(metadata: Mapping[str, Any], where: str) -> DeepseekConfig:
    """The config in a GGUF's metadata, architecture deepseek2. Raises ModelError as `from_json` does."""
    source = Numbers(where, metadata)
    source.one_of("general.architecture", ("deepseek2",))
    key = "deepseek2.{}".format
    # Newer files state the lengths of the absorbed form first, and those of the heads under names of their own.
    lengths = [key(f"attention.{part}_length") for part in ("key", "value")]
    head, value = (source.whole(f"{name}_mla" if f"{name}_mla" in metadata else name, MAX_FEATURES) for name in lengths)
    turned = source.whole(key("rope.dimension_count"), MAX_FEATURES)
    if turned % 2 or turned >= head:
        raise ModelError(where, f"{turned} turned features of {head}", "an even number, and less than all")
    tokens = metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, list) else None
    layers = source.whole(key("block_count"), MAX_LAYERS)
    dense = min(source.whole(key("leading_dense_block_count"), MAX_LAYERS, 0, least=0), layers)
    ranked = key("attention.q_lora_rank") in metadata
    return DeepseekConfig(
        layers=layers,
        dense_layers=dense,
        features=source.whole(key("embedding_length"), MAX_FEATURES),
        hidden=source.whole(key("feed_forward_length"), MAX_FEATURES),
        heads=source.whole(key("attention.head_count"), MAX_FEATURES),
        key_features=head - turned,
        turned_features=turned,
        value_features=value,
        key_rank=source.whole(key("attention.kv_lora_rank"), MAX_FEATURES),
        query_rank=source.whole(key("attention.q_lora_rank"), MAX_FEATURES) if ranked else 0,
        vocabulary=source.whole(key("vocab_size"), MAX_VOCABULARY, count),
        positions=source.whole(key("context_length"), MAX_POSITIONS),
        rope=_gguf_rope(source, turned // 2),
        interleaved=True,
        epsilon=source.real(key("attention.layer_norm_rms_epsilon"), 0.0, 1.0),
        mixture=_gguf_mixture(source) if dense < layers else None,
    )


def _gguf_rope(source: Numbers, pairs: int) -> Rope:
    base = source.real("deepseek2.rope.freq_base", 1.0 + 1e-6, 1e12, 10000.0)
    if source.one_of("deepseek2.rope.scaling.type", ("none", "yarn"), "none") == "none":
        return Rope(base, pairs)
    # The file has 0.1 * mscale_all_dim only; "mscale" is the same in every published model, so tables stay as they are.
    mscale = 10.0 * source.real("deepseek2.rope.scaling.yarn_log_multiplier", 0.0, 10.0, 0.0)
    return Rope(base, pairs, RopeScaling(
        "yarn", source.real("deepseek2.rope.scaling.factor", 1e-3, 1e6),
        original_positions=source.whole("deepseek2.rope.scaling.original_context_length", MAX_POSITIONS),
        table_mscale=mscale, score_mscale=mscale,
    ))


def _gguf_mixture(source: Numbers) -> Mixture:
    key = "deepseek2.{}".format
    groups = source.whole(key("expert_group_count"), MAX_EXPERTS, 1)
    mixture = Mixture(
        experts=source.whole(key("expert_count"), MAX_EXPERTS),
        shared=source.whole(key("expert_shared_count"), 64, 0, least=0),
        chosen=source.whole(key("expert_used_count"), MAX_EXPERTS),
        hidden=source.whole(key("expert_feed_forward_length"), MAX_FEATURES),
        groups=groups,
        kept=source.whole(key("expert_group_used_count"), MAX_EXPERTS, groups),
        sigmoid=source.whole(key("expert_gating_func"), SIGMOID, SOFTMAX) == SIGMOID,
        normalise=source.flag(key("expert_weights_norm"), False),
        scale=source.real(key("expert_weights_scale"), 1e-6, 1e6, 1.0),
    )
    mixture.check(source.where)
    return mixture
