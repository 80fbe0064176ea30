"""The weights of a Llama model, in the layout that its kernels take.

In: a GGUF file or a safetensors directory, and a config. Out: `LlamaWeights`. Holds: matrices are [out, in], C order,
of one dtype (bf16 or f32); gains are f32; all lie in memory that asks for huge pages, in the order in which a token
meets them; the rows of the query and key matrices are in the order of the half-split rotary pairing.

GGUF files of this architecture hold query and key rows in the order of the interleaved pairing (rows 2 * i and 2 * i +
1 of a head make a pair); here they are put back, so that one kernel serves both kinds of file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...runtime.buffers import Arena
from ..errors import ModelError
from .config import LlamaConfig

Array = np.ndarray[Any, np.dtype[Any]]
ROWS_AT_ONCE = 4096


class Entry(Protocol):
    """A tensor of a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> Array: ...


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. qkv [(heads + 2 * kv_heads) * head_features, features]: query rows, then key, then value rows.
    output [features, heads * head_features]; gate, up [hidden, features]; down [features, hidden]; gains [features].
    """

    attention_gain: Array
    qkv: Array
    output: Array
    feed_forward_gain: Array
    gate: Array
    up: Array
    down: Array


@dataclass(frozen=True, slots=True)
class LlamaWeights:
    """A whole model. embedding [vocabulary, features]; logits: the same array where the two are tied.
    rope_factors [head_features / 2] or None: what the file says that each frequency is divided by.
    """

    embedding: Array
    layers: tuple[LayerWeights, ...]
    gain: Array
    logits: Array
    rope_factors: Array | None

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that decoding one token reads (one row of the embedding is left out)."""
        count = self.gain.nbytes + self.logits.nbytes
        for layer in self.layers:
            count += layer.attention_gain.nbytes + layer.feed_forward_gain.nbytes
            count += layer.qkv.nbytes + layer.output.nbytes + layer.gate.nbytes + layer.up.nbytes + layer.down.nbytes
        return count


GGUF_NAMES = {
    "embedding": "token_embd.weight", "gain": "output_norm.weight", "logits": "output.weight",
    "rope_factors": "rope_freqs.weight",
    "attention_gain": "blk.{}.attn_norm.weight", "query": "blk.{}.attn_q.weight", "key": "blk.{}.attn_k.weight",
    "value": "blk.{}.attn_v.weight", "output": "blk.{}.attn_output.weight",
    "feed_forward_gain": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight", "up": "blk.{}.ffn_up.weight", "down": "blk.{}.ffn_down.weight",
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
}


def half_split_rows(rows: Array, heads: int) -> Array:
    """Rows [heads * D, ...] of the interleaved pairing in the order of the half-split one."""
    pairs = rows.shape[0] // heads // 2
    return rows.reshape(heads, pairs, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


class _Loader:
    def __init__(
        self, where: str, tensors: Mapping[str, Entry], names: Mapping[str, str], dtype: np.dtype[Any], paired: bool
    ) -> None:
        self.where = where
        self.tensors = tensors
        self.names = names
        self.dtype = dtype
        self.paired = paired
        self.arena = Arena()

    def read(self, role: str, shape: tuple[int, ...], layer: int = 0) -> Array:
        """The tensor of that role, as f32, its shape checked."""
        name = self.names[role].format(layer)
        where = f"{self.where}, tensor {name}"
        entry = self.tensors.get(name)
        if entry is None:
            raise ModelError(where, "nothing", f"a tensor of shape {shape}", "get the file again")
        if entry.shape != shape:
            raise ModelError(where, f"shape {entry.shape}", f"shape {shape}", "get the file again")
        return entry.read()

    def gain(self, role: str, features: int, layer: int = 0) -> Array:
        target = self.arena.empty((features,), np.dtype(np.float32))
        target[:] = self.read(role, (features,), layer)
        return target

    def fill(self, target: Array, source: Array) -> None:
        """Narrow the rows of source into target, some at a time: less memory is touched, and it stays in the cache."""
        for start in range(0, target.shape[0], ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            target[part] = source[part].astype(self.dtype)

    def matrix(self, role: str, rows: int, columns: int, layer: int = 0) -> Array:
        source = self.read(role, (rows, columns), layer)
        target = self.arena.empty((rows, columns), self.dtype)
        self.fill(target, source)
        return target

    def qkv(self, config: LlamaConfig, layer: int) -> Array:
        features, size = config.features, config.head_features
        target = self.arena.empty((config.qkv_features, features), self.dtype)
        start = 0
        for role, heads in (("query", config.heads), ("key", config.kv_heads), ("value", config.kv_heads)):
            rows = self.read(role, (heads * size, features), layer)
            if self.paired and role != "value":
                rows = half_split_rows(rows, heads)
            self.fill(target[start : start + heads * size], rows)
            start += heads * size
        return target


def load_weights(
    where: str, tensors: Mapping[str, Entry], config: LlamaConfig, dtype: np.dtype[Any], gguf: bool
) -> LlamaWeights:
    """Read, widen and lay out all weights.

    where: the file, for messages. tensors: of the file, by name. dtype: of the matrices, float32 or bfloat16. gguf: the
    names and the row order of a GGUF file, or else of a Hugging Face checkpoint.
    Raises ModelError for a tensor that is missing, of the wrong shape, or of a format that cannot be read.
    """
    loader = _Loader(where, tensors, GGUF_NAMES if gguf else JSON_NAMES, dtype, gguf)
    features, hidden, heads = config.features, config.hidden, config.heads * config.head_features
    layers = tuple(
        LayerWeights(
            attention_gain=loader.gain("attention_gain", features, i),
            qkv=loader.qkv(config, i),
            output=loader.matrix("output", features, heads, i),
            feed_forward_gain=loader.gain("feed_forward_gain", features, i),
            gate=loader.matrix("gate", hidden, features, i),
            up=loader.matrix("up", hidden, features, i),
            down=loader.matrix("down", features, hidden, i),
        )
        for i in range(config.layers)
    )
    gain = loader.gain("gain", features)
    tied = loader.names["logits"] not in tensors
    embedding = loader.matrix("embedding", config.vocabulary, features)
    logits = embedding if tied else loader.matrix("logits", config.vocabulary, features)
    factors = None
    if loader.names["rope_factors"] in tensors:
        factors = loader.read("rope_factors", (config.head_features // 2,))
    return LlamaWeights(
        embedding=embedding,
        layers=layers,
        gain=gain,
        logits=logits,
        rope_factors=factors,
    )
