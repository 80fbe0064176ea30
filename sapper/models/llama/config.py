"""The numbers that describe a Llama, or a model much like it, from a GGUF's metadata or Hugging Face's config.json.

In: metadata as a dictionary. Out: `LlamaConfig`. Holds: every number was checked (models/numbers.py), and they fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError
from ..mixture import Mixture
from ..numbers import MAX_EXPERTS, MAX_FEATURES, MAX_LAYERS, MAX_POSITIONS, MAX_VOCABULARY, Numbers
from ..rope import Rope, rope_from_gguf, rope_from_json

GGUF_KINDS = ("llama", "qwen2", "qwen3", "qwen3moe")
"""What general.architecture calls them. Files of a Mistral say "llama"."""
JSON_KINDS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
"""What model_type calls them."""
NORMED, MIXED = ("qwen3", "qwen3_moe", "qwen3moe"), ("qwen3_moe", "qwen3moe")
"""Those whose heads have norms, and whose layers have experts."""
SCALINGS = ("linear", "llama3", "yarn")
FULL = "full_attention"
MISTRAL_WINDOW = 4096
"""Where config.json of a Mistral is silent about its window, transformers takes this one."""


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """A model's shape.

    layers; features: width of the residual stream; hidden: width of the feed-forward part; heads: of queries;
    kv_heads: of keys and values; head_features: of each head; vocabulary: tokens; positions: the longest context;
    rope: the angles; epsilon: of RMSNorm; biased: whether queries, keys and values have a bias (Qwen2); normed: whether
    each head of queries and keys goes through RMSNorm before it turns (Qwen3); windowed: whether `positions` are those
    that a token sees of a longer context, as a window slides over it (Mistral): up to there all see all before them.
    mixture: of the experts that each layer's feed-forward part has (Qwen3-MoE), or None.
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
    normed: bool = False
    windowed: bool = False
    mixture: Mixture | None = None

    @property
    def limit(self) -> str:
        """Why `positions` are not more."""
        if self.windowed:
            return "the window that its attention slides over a longer context, which is not supported"
        return "all that the model can"

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
        if self.mixture is not None:
            self.mixture.check(where)


def _mixture(experts: int, chosen: int, hidden: int, normalise: bool) -> Mixture:
    """Of a softmax over all experts."""
    return Mixture(experts, 0, chosen, hidden, 1, 1, False, normalise, 1.0)


def from_gguf(metadata: Mapping[str, Any], where: str) -> LlamaConfig:
    """The config in a GGUF's metadata. Raises ModelError for another architecture, and for numbers that are missing or
    absurd."""
    source = Numbers(where, metadata)
    kind = source.one_of("general.architecture", GGUF_KINDS)
    key = f"{kind}.{{}}".format
    mixture = None
    if kind in MIXED:  # llama.cpp always normalises theirs
        mixture = _mixture(
            source.whole(key("expert_count"), MAX_EXPERTS), source.whole(key("expert_used_count"), MAX_EXPERTS),
            source.whole(key("expert_feed_forward_length"), MAX_FEATURES), True)
    elif metadata.get(key("expert_count"), 0):
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
    positions = source.whole(key("context_length"), MAX_POSITIONS)
    window = source.whole(key("attention.sliding_window"), MAX_POSITIONS, 0, least=0) or positions
    config = LlamaConfig(
        layers=source.whole(key("block_count"), MAX_LAYERS),
        features=features,
        hidden=mixture.hidden if mixture else source.whole(key("feed_forward_length"), MAX_FEATURES),
        heads=heads,
        kv_heads=source.whole(key("attention.head_count_kv"), MAX_FEATURES, heads),
        head_features=head_features,
        vocabulary=vocabulary,
        positions=min(positions, window),
        rope=rope_from_gguf(source, kind, head_features // 2),
        epsilon=source.real(key("attention.layer_norm_rms_epsilon"), 0.0, 1.0),
        biased=kind == "qwen2",
        normed=kind in NORMED,
        windowed=window < positions,
        mixture=mixture,
    )
    config.check(where)
    return config


def from_json(values: Mapping[str, Any], where: str) -> LlamaConfig:
    """The config in Hugging Face's config.json. Raises ModelError as `from_gguf` does."""
    source = Numbers(where, values)
    kind = source.one_of("model_type", JSON_KINDS)
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if values.get(key):
            raise ModelError(f"{where}, key {key}", repr(values[key])[:80], "false", "take a model without")
    layer_types = values.get("layer_types")
    if layer_types is not None and not (isinstance(layer_types, list) and set(map(str, layer_types)) <= {FULL}):
        raise ModelError(f"{where}, key layer_types", repr(layer_types)[:80], f"{FULL!r} for each layer",
                         "take a model without windows of some layers")
    source.one_of("hidden_act", ("silu",), "silu")
    features = source.whole("hidden_size", MAX_FEATURES)
    heads = source.whole("num_attention_heads", MAX_FEATURES)
    head_features = values.get("head_dim") or max(1, features // heads)
    head_features = Numbers(where, {"head_dim": head_features}).whole("head_dim", MAX_FEATURES)
    mixture = _json_mixture(source) if kind in MIXED else None
    positions = source.whole("max_position_embeddings", MAX_POSITIONS, 2048)
    window = positions
    if kind == "mistral" and values.get("sliding_window", MISTRAL_WINDOW) is not None:
        window = source.whole("sliding_window", MAX_POSITIONS, MISTRAL_WINDOW)
    config = LlamaConfig(
        layers=source.whole("num_hidden_layers", MAX_LAYERS),
        features=features,
        hidden=mixture.hidden if mixture else source.whole("intermediate_size", MAX_FEATURES),
        heads=heads,
        kv_heads=source.whole("num_key_value_heads", MAX_FEATURES, heads),
        head_features=head_features,
        vocabulary=source.whole("vocab_size", MAX_VOCABULARY),
        positions=min(positions, window),
        rope=rope_from_json(values, where, head_features // 2, SCALINGS),
        epsilon=source.real("rms_norm_eps", 0.0, 1.0, 1e-6),
        biased=kind == "qwen2",
        normed=kind in NORMED,
        windowed=window < positions,
        mixture=mixture,
    )
    config.check(where)
    return config


def _json_mixture(source: Numbers) -> Mixture:
    """Of config.json, all of whose layers have experts."""
    where, values = source.where, source.values
    for key, usual in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        if values.get(key, usual) not in (usual, None):
            raise ModelError(f"{where}, key {key}", repr(values[key])[:80], repr(usual),
                             "take a model with experts in each layer")
    experts = "num_experts" if "num_experts" in values else "num_local_experts"  # as transformers 5 writes it
    return _mixture(source.whole(experts, MAX_EXPERTS), source.whole("num_experts_per_tok", MAX_EXPERTS),
                    source.whole("moe_intermediate_size", MAX_FEATURES), source.flag("norm_topk_prob", False))
