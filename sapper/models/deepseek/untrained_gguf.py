"""A DeepSeek model with random weights as a GGUF file, for measuring beside other programs that read such files.

In: a path and a config. Out: the file, in bf16, as llama.cpp's converter writes architecture deepseek2: experts of a
layer in one tensor, keys and values made by two. Holds: a seed gives the same file; weights keep activations near 1.
The vocabulary is the 256 bytes and names of numbers, so that a tokenizer loads; no text makes sense.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .config import DeepseekConfig
from .weights import GGUF_NAMES

Array = np.ndarray[Any, np.dtype[Any]]
NORMAL, CONTROL = 1, 3
"""What GGUF calls kinds of tokens."""


def tensors_of(config: DeepseekConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model's file, outermost axis first, in the order of the layers."""
    c = config
    attention: dict[str, tuple[int, ...]] = {
        "attention_gain": (c.features,), "key_latent": (c.key_rank + c.turned_features, c.features),
        "key_gain": (c.key_rank,), "expand_keys": (c.heads, c.key_rank, c.key_features),
        "expand_values": (c.heads, c.value_features, c.key_rank),
        "output": (c.features, c.heads * c.value_features), "feed_forward_gain": (c.features,),
    }
    if c.query_rank:
        attention |= {"query_latent": (c.query_rank, c.features), "query_gain": (c.query_rank,),
                      "query": (c.heads * c.head_features, c.query_rank)}
    else:
        attention["all_queries"] = (c.heads * c.head_features, c.features)
    found: dict[str, tuple[int, ...]] = {GGUF_NAMES["embedding"]: (c.vocabulary, c.features)}
    for layer in range(c.layers):
        mixture = c.mixture if layer >= c.dense_layers else None
        if mixture is None:
            inner: dict[str, tuple[int, ...]] = {
                "gate": (c.hidden, c.features), "up": (c.hidden, c.features), "down": (c.features, c.hidden)}
        else:
            shared = mixture.shared * mixture.hidden
            inner = {
                "router": (mixture.experts, c.features),
                "expert_gate": (mixture.experts, mixture.hidden, c.features),
                "expert_up": (mixture.experts, mixture.hidden, c.features),
                "expert_down": (mixture.experts, c.features, mixture.hidden),
                "shared_gate": (shared, c.features), "shared_up": (shared, c.features),
                "shared_down": (c.features, shared),
            }
        found |= {GGUF_NAMES[role].format(layer): shape for role, shape in (attention | inner).items()}
    return {**found, GGUF_NAMES["gain"]: (c.features,), GGUF_NAMES["logits"]: (c.vocabulary, c.features)}


def write_gguf(path: Path, config: DeepseekConfig, seed: int = 0) -> None:
    """Write the file. Raises ValueError for a config that it has no words for: scaled angles, sigmoid gates, an
    indexer; ImportError without the package gguf; OSError."""
    mixture = config.mixture
    if config.rope.scaling.kind != "none" or config.indexer is not None or mixture is None or mixture.sigmoid:
        raise ValueError("write_gguf: found scaled angles, an indexer, no mixture or a sigmoid gate; expected a model "
                         "as SMALL_V2 is")
    import gguf

    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "deepseek2")
    for key, value in _numbers(config).items():
        if isinstance(value, float):
            writer.add_float32(f"deepseek2.{key}", value)
        else:
            writer.add_uint32(f"deepseek2.{key}", value)
    writer.add_bool("deepseek2.expert_weights_norm", mixture.normalise)
    _write_vocabulary(writer, config.vocabulary)
    shapes = tensors_of(config)
    for name, shape in shapes.items():
        wide = len(shape) == 1 or "ffn_gate_inp" in name  # routers stay in f32, as converters leave them
        count = int(np.prod(shape))
        writer.add_tensor_info(name, (*shape[:-1], shape[-1] * (4 if wide else 2)), np.dtype(np.uint8),
                               count * (4 if wide else 2), raw_dtype=kinds.F32 if wide else kinds.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for place, (name, shape) in enumerate(shapes.items()):
        kind = kinds.F32 if len(shape) == 1 or "ffn_gate_inp" in name else kinds.BF16
        writer.write_tensor_data(gguf.quants.quantize(_random(shape, seed + place), kind).view(np.uint8))
    writer.close()


def _numbers(config: DeepseekConfig) -> dict[str, int | float]:
    c, mixture = config, config.mixture
    assert mixture is not None
    return {
        "block_count": c.layers, "context_length": c.positions, "embedding_length": c.features,
        "feed_forward_length": c.hidden, "attention.head_count": c.heads, "attention.head_count_kv": 1,
        "attention.kv_lora_rank": c.key_rank, "vocab_size": c.vocabulary,
        "attention.key_length": c.key_rank + c.turned_features, "attention.value_length": c.key_rank,
        "attention.key_length_mla": c.head_features, "attention.value_length_mla": c.value_features,
        **({"attention.q_lora_rank": c.query_rank} if c.query_rank else {}),
        "rope.dimension_count": c.turned_features, "rope.freq_base": float(c.rope.base),
        "attention.layer_norm_rms_epsilon": float(c.epsilon),
        "expert_count": mixture.experts, "expert_used_count": mixture.chosen, "expert_shared_count": mixture.shared,
        "leading_dense_block_count": c.dense_layers, "expert_feed_forward_length": mixture.hidden,
        "expert_gating_func": 1, "expert_weights_scale": float(mixture.scale),
    }


def _write_vocabulary(writer: Any, count: int) -> None:
    """Byte-level tokens, as GPT-2's tokenizer writes bytes, one pair of them, and then numbers."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
    tokens = [*(characters[byte] for byte in range(256)), "ab", *(f"<{i}>" for i in range(257, count))]
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", [NORMAL] * 257 + [CONTROL] * (count - 257))
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    for key, text in (("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "gpt-2")):
        writer.add_string(key, text)


def _random(shape: tuple[int, ...], seed: int) -> Array:
    noise = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return 1.0 + 0.1 * noise if len(shape) == 1 else noise * np.float32(shape[-1] ** -0.5)
