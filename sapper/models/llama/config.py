"""The numbers that describe a Llama or a Qwen2 model, from a GGUF's metadata or Hugging Face's config.json.

In: metadata as a dictionary. Out: `LlamaConfig`. Holds: every number was checked (models/numbers.py), and they fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError
from ..numbers import MAX_FEATURES, MAX_LAYERS, MAX_POSITIONS, MAX_VOCABULARY, Numbers
from ..rope import Rope, RopeScaling, rope_from_json


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """A Llama model's shape.

    layers; features: width of the residual stream; hidden: width of the feed-forward part; heads: of queries;
    kv_heads: of keys and values; head_features: of each head; vocabulary: tokens; positions: the longest context;
    rope: the angles; epsilon: of RMSNorm; biased: whether queries, keys and values have a bias (Qwen2).
    """

    layers: int
    features: int
    hidden: int
    heads: int
    kv_heads: int
    head_features: int
    vocabulary: int
    positions: int
    rope: Rope
    epsilon: float
    biased: bool = False

    @property
    def group(self) -> int:
        """Query heads for each key/value head."""
        return self.heads // self.kv_heads

    def check(self, where: str) -> None:
        """Raises ModelError where the numbers do not fit together."""
        if self.heads % self.kv_heads:
            raise ModelError(where, f"{self.heads} heads over {self.kv_heads} key/value heads", "a whole ratio")
        if self.head_features % 2:
            raise ModelError(where, f"heads of {self.head_features} features", "an even number")


def from_gguf(metadata: Mapping[str, Any], where: str) -> LlamaConfig:
    """The config in a GGUF's metadata, of Llama or Qwen2. Raises ModelError for another architecture, and for numbers
    that are missing or absurd."""
    source = Numbers(where, metadata)
    kind = source.one_of("general.architecture", ("llama", "qwen2"))
    key = f"{kind}.{{}}".format
    if metadata.get(key("expert_count"), 0):
        raise ModelError(f"{where}, key {key('expert_count')}", "experts", "a dense model",
                         "take a model without experts")
    features = source.whole(key("embedding_length"), MAX_FEATURES)
    heads = source.whole(key("attention.head_count"), MAX_FEATURES)
    head_features = source.whole(key("attention.key_length"), MAX_FEATURES, max(1, features // heads))
    value_features = source.whole(key("attention.value_length"), MAX_FEATURES, head_features)
    turned = source.whole(key("rope.dimension_count"), MAX_FEATURES, head_features)
    if not head_features == value_features == turned:
        raise ModelError(
            where, f"heads of {head_features} key, {value_features} value and {turned} turned features", "all the same"
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocabulary = source.whole(key("vocab_size"), MAX_VOCABULARY, len(tokens) if isinstance(tokens, list) else None)
    scaling = RopeScaling()
    scaled = metadata.get(key("rope.scaling.type"), "none")
    if scaled == "linear":
        scaling = RopeScaling("linear", source.real(key("rope.scaling.factor"), 1e-3, 1e6))
    elif scaled != "none":
        raise ModelError(f"{where}, key {key('rope.scaling.type')}", repr(scaled)[:80], "'none' or 'linear'")
    config = LlamaConfig(
        layers=source.whole(key("block_count"), MAX_LAYERS),
        features=features,
        hidden=source.whole(key("feed_forward_length"), MAX_FEATURES),
        heads=heads,
        kv_heads=source.whole(key("attention.head_count_kv"), MAX_FEATURES, heads),
        head_features=head_features,
        vocabulary=vocabulary,
        positions=source.whole(key("context_length"), MAX_POSITIONS),
        rope=Rope(source.real(key("rope.freq_base"), 1.0 + 1e-6, 1e12, 10000.0), head_features // 2, scaling),
        epsilon=source.real(key("attention.layer_norm_rms_epsilon"), 0.0, 1.0),
        biased=kind == "qwen2",
    )
    config.check(where)
    return config


def from_json(values: Mapping[str, Any], where: str) -> LlamaConfig:
    """The config in Hugging Face's config.json, of Llama or Qwen2. Raises ModelError as `from_gguf` does."""
    source = Numbers(where, values)
    kind = source.one_of("model_type", ("llama", "qwen2"))
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if values.get(key):
            raise ModelError(f"{where}, key {key}", repr(values[key])[:80], "false", "take a model without")
    source.one_of("hidden_act", ("silu",), "silu")
    features = source.whole("hidden_size", MAX_FEATURES)
    heads = source.whole("num_attention_heads", MAX_FEATURES)
    head_features = values.get("head_dim") or max(1, features // heads)
    head_features = Numbers(where, {"head_dim": head_features}).whole("head_dim", MAX_FEATURES)
    config = LlamaConfig(
        layers=source.whole("num_hidden_layers", MAX_LAYERS),
        features=features,
        hidden=source.whole("intermediate_size", MAX_FEATURES),
        heads=heads,
        kv_heads=source.whole("num_key_value_heads", MAX_FEATURES, heads),
        head_features=head_features,
        vocabulary=source.whole("vocab_size", MAX_VOCABULARY),
        positions=source.whole("max_position_embeddings", MAX_POSITIONS, 2048),
        rope=rope_from_json(values, where, head_features // 2, ("linear", "llama3")),
        epsilon=source.real("rms_norm_eps", 0.0, 1.0, 1e-6),
        biased=kind == "qwen2",
    )
    config.check(where)
    return config
