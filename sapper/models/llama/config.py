"""The numbers that describe a Llama model, from a GGUF's metadata or from Hugging Face's config.json.

In: metadata as a dictionary. Out: `LlamaConfig`. Holds: every number was checked to be of its type, positive and sane,
so what is computed from them (sizes of weights and caches) neither overflows nor exhausts memory by accident.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ModelError

Array = np.ndarray[Any, np.dtype[Any]]
MAX_LAYERS = 1024
MAX_FEATURES = 1 << 20
MAX_POSITIONS = 1 << 24
MAX_VOCABULARY = 1 << 22


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the angles' frequencies are changed for long contexts.

    kind: "none", "linear" (divided by factor) or "llama3" (low frequencies divided by factor, high ones kept, with a
    ramp between the two wavelengths; Llama 3.1).
    """

    kind: str = "none"
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """A Llama model's shape.

    layers; features: width of the residual stream; hidden: width of the feed-forward part; heads: of queries;
    kv_heads: of keys and values; head_features: of each head; vocabulary: tokens; positions: the longest context;
    rope_base: of the angles' frequencies; epsilon: of RMSNorm.
    """

    layers: int
    features: int
    hidden: int
    heads: int
    kv_heads: int
    head_features: int
    vocabulary: int
    positions: int
    rope_base: float
    epsilon: float
    rope_scaling: RopeScaling = RopeScaling()

    @property
    def group(self) -> int:
        """Query heads for each key/value head."""
        return self.heads // self.kv_heads

    @property
    def qkv_features(self) -> int:
        """Rows of the joined query, key and value weights."""
        return (self.heads + 2 * self.kv_heads) * self.head_features

    def frequencies(self, factors: Array | None = None) -> Array:
        """The turn per position of each pair of features, in radians, float64, [head_features / 2].

        factors: what each frequency is divided by, where the file gives that itself.
        """
        pairs = self.head_features // 2
        frequency = self.rope_base ** (-np.arange(pairs, dtype=np.float64) / pairs)
        scaling = self.rope_scaling
        if factors is not None:
            return frequency / factors.astype(np.float64)
        if scaling.kind == "linear":
            return frequency / scaling.factor
        if scaling.kind == "llama3":
            wavelengths = scaling.original_positions * frequency / (2 * math.pi)
            ramp = (wavelengths - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
            keep = np.clip(ramp, 0.0, 1.0)
            return frequency * keep + frequency / scaling.factor * (1.0 - keep)
        return frequency

    def check(self, where: str) -> None:
        """Raises ModelError where the numbers do not fit together."""
        if self.heads % self.kv_heads:
            raise ModelError(where, f"{self.heads} heads over {self.kv_heads} key/value heads", "a whole ratio")
        if self.head_features % 2:
            raise ModelError(where, f"heads of {self.head_features} features", "an even number")


class _Source:
    """Reads checked numbers out of a dictionary."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where = where
        self.values = values

    def whole(self, key: str, most: int, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if value is None:
            raise ModelError(f"{self.where}, key {key}", "nothing", "a whole number")
        if type(value) is not int or not 1 <= value <= most:
            raise ModelError(f"{self.where}, key {key}", repr(value)[:80], f"a whole number from 1 to {most}")
        return value

    def real(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if value is None:
            raise ModelError(f"{self.where}, key {key}", "nothing", "a number")
        if type(value) not in (int, float) or not low <= value <= high:
            raise ModelError(f"{self.where}, key {key}", repr(value)[:80], f"a number from {low:g} to {high:g}")
        return float(value)


def from_gguf(metadata: Mapping[str, Any], where: str) -> LlamaConfig:
    """The config in a GGUF's metadata. Raises ModelError for another architecture, or numbers missing or absurd."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ModelError(
            f"{where}, key general.architecture", repr(architecture)[:80], "'llama'",
            "take a model of that architecture",
        )
    if metadata.get("llama.expert_count", 0):
        raise ModelError(f"{where}, key llama.expert_count", "experts", "a dense model", "take a model without experts")
    source = _Source(where, metadata)
    features = source.whole("llama.embedding_length", MAX_FEATURES)
    heads = source.whole("llama.attention.head_count", MAX_FEATURES)
    head_features = source.whole("llama.attention.key_length", MAX_FEATURES, max(1, features // heads))
    value_features = source.whole("llama.attention.value_length", MAX_FEATURES, head_features)
    turned = source.whole("llama.rope.dimension_count", MAX_FEATURES, head_features)
    if not head_features == value_features == turned:
        raise ModelError(
            where, f"heads of {head_features} key, {value_features} value and {turned} turned features", "all the same"
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocabulary = source.whole("llama.vocab_size", MAX_VOCABULARY, len(tokens) if isinstance(tokens, list) else None)
    scaling = RopeScaling()
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        scaling = RopeScaling("linear", source.real("llama.rope.scaling.factor", 1e-3, 1e6))
    elif kind != "none":
        raise ModelError(f"{where}, key llama.rope.scaling.type", repr(kind)[:80], "'none' or 'linear'")
    config = LlamaConfig(
        layers=source.whole("llama.block_count", MAX_LAYERS),
        features=features,
        hidden=source.whole("llama.feed_forward_length", MAX_FEATURES),
        heads=heads,
        kv_heads=source.whole("llama.attention.head_count_kv", MAX_FEATURES, heads),
        head_features=head_features,
        vocabulary=vocabulary,
        positions=source.whole("llama.context_length", MAX_POSITIONS),
        rope_base=source.real("llama.rope.freq_base", 1.0, 1e12, 10000.0),
        epsilon=source.real("llama.attention.layer_norm_rms_epsilon", 0.0, 1.0),
        rope_scaling=scaling,
    )
    config.check(where)
    return config


def from_json(values: Mapping[str, Any], where: str) -> LlamaConfig:
    """The config in Hugging Face's config.json. Raises ModelError as `from_gguf` does."""
    if values.get("model_type") != "llama":
        raise ModelError(
            f"{where}, key model_type", repr(values.get("model_type"))[:80], "'llama'",
            "take a model of that architecture",
        )
    for key in ("attention_bias", "mlp_bias"):
        if values.get(key):
            raise ModelError(f"{where}, key {key}", repr(values[key])[:80], "false", "take a model without biases")
    if values.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{where}, key hidden_act", repr(values["hidden_act"])[:80], "'silu'")
    source = _Source(where, values)
    features = source.whole("hidden_size", MAX_FEATURES)
    heads = source.whole("num_attention_heads", MAX_FEATURES)
    head_features = values.get("head_dim") or max(1, features // heads)
    config = LlamaConfig(
        layers=source.whole("num_hidden_layers", MAX_LAYERS),
        features=features,
        hidden=source.whole("intermediate_size", MAX_FEATURES),
        heads=heads,
        kv_heads=source.whole("num_key_value_heads", MAX_FEATURES, heads),
        head_features=_Source(where, {"head_dim": head_features}).whole("head_dim", MAX_FEATURES),
        vocabulary=source.whole("vocab_size", MAX_VOCABULARY),
        positions=source.whole("max_position_embeddings", MAX_POSITIONS, 2048),
        rope_base=source.real("rope_theta", 1.0, 1e12, 10000.0),
        epsilon=source.real("rms_norm_eps", 0.0, 1.0, 1e-6),
        rope_scaling=_json_scaling(values.get("rope_scaling"), where),
    )
    config.check(where)
    return config


def _json_scaling(values: Any, where: str) -> RopeScaling:
    if values is None:
        return RopeScaling()
    place = f"{where}, key rope_scaling"
    if not isinstance(values, dict):
        raise ModelError(place, repr(values)[:80], "an object or null")
    kind = values.get("rope_type", values.get("type"))
    source = _Source(place, values)
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", source.real("factor", 1e-3, 1e6))
    if kind != "llama3":
        raise ModelError(place, repr(kind)[:80], "'default', 'linear' or 'llama3'")
    low, high = source.real("low_freq_factor", 0.0, 1e6), source.real("high_freq_factor", 0.0, 1e6)
    if high <= low:
        raise ModelError(place, f"high_freq_factor {high:g} <= low_freq_factor {low:g}", "the high one larger")
    original = source.whole("original_max_position_embeddings", MAX_POSITIONS)
    return RopeScaling("llama3", source.real("factor", 1e-3, 1e6), low, high, original)
