"""The numbers that describe a DeepSeek model of the second or third generation.

In: Hugging Face's config.json as a dictionary. Out: `DeepseekConfig`. Holds: every number was checked
(models/numbers.py), and they fit together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError
from ..numbers import MAX_EXPERTS, MAX_FEATURES, MAX_LAYERS, MAX_POSITIONS, MAX_VOCABULARY, Numbers
from ..rope import Rope, rope_from_json

LATENT_EPSILON = 1e-6
"""Of the norms of the latent vectors: the published code leaves them at RMSNorm's default."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """How a layer's experts are chosen (sapper/kernels/gate.py).

    experts: routed ones; shared: those that every token takes; chosen: routed experts of a token; hidden: features of
    one expert; groups, kept: of experts, and how many of them are looked at; sigmoid: scores are sigmoids, with a bias,
    or else a softmax; normalise, scale: of the weights.
    """

    experts: int
    shared: int
    chosen: int
    hidden: int
    groups: int
    kept: int
    sigmoid: bool
    normalise: bool
    scale: float

    @property
    def taken(self) -> int:
        """Experts that a token goes through."""
        return self.chosen + self.shared


@dataclass(frozen=True, slots=True)
class DeepseekConfig:
    """A DeepSeek model's shape.

    layers; dense_layers: the first ones, which have no mixture; features: width of the residual stream; hidden: of a
    dense layer's feed-forward part; heads; key_features, turned_features, value_features: of each head; key_rank: of
    the latent vector of keys and values; query_rank: of that of the queries, 0 where there is none; vocabulary: tokens;
    positions: the longest context; rope: the angles; interleaved: whether features 2 * i and 2 * i + 1 turn together;
    epsilon: of RMSNorm; mixture: None where all layers are dense.
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
    third = source.one_of("model_type", ("deepseek_v2", "deepseek_v3")) == "deepseek_v3"
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
    )


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
    if experts % groups or (third and experts // groups < 2):
        raise ModelError(where, f"{experts} experts in {groups} groups", "groups of one size, of two experts or more")
    if kept > groups or chosen > kept * (experts // groups):
        raise ModelError(
            where, f"{chosen} experts of a token, from {kept} of {groups} groups of {experts // groups}",
            "as many as there are to choose from",
        )
    normalise = source.flag("norm_topk_prob", third)
    scale = source.real("routed_scaling_factor", 1e-6, 1e6, 1.0)
    if normalise and not third and scale != 1.0:
        # The published code of the second generation then leaves the factor out, others apply it.
        found = f"true, and routed_scaling_factor {scale:g}"
        raise ModelError(f"{where}, key norm_topk_prob", found, "one or the other")
    shared = 0 if values.get("n_shared_experts") is None else source.whole("n_shared_experts", 64, least=0)
    hidden = source.whole("moe_intermediate_size", MAX_FEATURES)
    return Mixture(experts, shared, chosen, hidden, groups, kept, third, normalise, scale)
