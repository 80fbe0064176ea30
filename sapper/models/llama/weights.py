"""The weights of a Llama model, in the layout that its kernels take.

In: a GGUF file or a safetensors directory, and a config. Out: `LlamaWeights`. Holds: matrices are [out, in], dense in
bf16 or f32 or in blocks as in the file (linear.py); gains are f32; all lie in memory that asks for huge pages, in the
order in which a token meets them; the rows of the query and key matrices are in the order of the half-split rotary
pairing.

GGUF files of this architecture hold query and key rows in the order of the interleaved pairing (rows 2 * i and 2 * i +
1 of a head make a pair); here they are put back, so that one kernel serves both kinds of file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from ...runtime.buffers import Arena
from ..errors import ModelError
from ..gguf_file import TensorEntry
from .config import LlamaConfig
from .linear import Dense, Matrix, RawBlocks, in_panels

Array = np.ndarray[Any, np.dtype[Any]]
DTYPES = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}
ROWS_AT_ONCE = 4096


class Entry(Protocol):
    """A tensor of a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> Array: ...


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. qkv [(heads + 2 * kv_heads) * head_features, features]: query rows, then key, then value rows.
    output [features, heads * head_features]; gate, up [hidden, features], of one form; down [features, hidden]; gains
    [features].
    """

    attention_gain: Array
    qkv: Matrix
    output: Matrix
    feed_forward_gain: Array
    gate: Matrix
    up: Matrix
    down: Matrix


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
        self, where: str, tensors: Mapping[str, Entry], names: Mapping[str, str], dtype: str, paired: bool
    ) -> None:
        self.where = where
        self.tensors = tensors
        self.names = names
        self.blocks = dtype == "file"
        self.dtype = "bf16" if self.blocks else dtype
        self.paired = paired
        self.arena = Arena()

    def entry(self, role: str, shape: tuple[int, ...], layer: int = 0) -> Entry:
        """The tensor of that role, its shape checked."""
        name = self.names[role].format(layer)
        where = f"{self.where}, tensor {name}"
        entry = self.tensors.get(name)
        if entry is None:
            raise ModelError(where, "nothing", f"a tensor of shape {shape}", "get the file again")
        if entry.shape != shape:
            raise ModelError(where, f"shape {entry.shape}", f"shape {shape}", "get the file again")
        return entry

    def gain(self, role: str, features: int, layer: int = 0) -> Array:
        target = self.arena.empty((features,), np.dtype(np.float32))
        target[:] = self.entry(role, (features,), layer).read()
        return target

    def matrices(self, uses: Sequence[tuple[str, int, int]], columns: int, layer: int = 0) -> list[Matrix]:
        """One matrix for each use, all of one form."""
        blocks = self._all_blocks(uses, columns, layer)
        return [self.joined([use], columns, layer, blocks) for use in uses]

    def joined(
        self, uses: Sequence[tuple[str, int, int]], columns: int, layer: int = 0, blocks: bool | None = None
    ) -> Matrix:
        """The rows of all uses, one after the other, as one matrix.

        A use: role, rows, and heads whose pairs of rows are to be split (0: none). blocks: whether it is held in blocks
        (None: if all uses can be).
        """
        if blocks is None:
            blocks = self._all_blocks(uses, columns, layer)
        if blocks:
            pieces = [raw for use in uses if (raw := self._raw(use, columns, layer)) is not None]
            return in_panels(pieces, self.arena)
        dtype = DTYPES[self.dtype]
        target = self.arena.empty((sum(rows for _, rows, _ in uses), columns), dtype)
        start = 0
        for role, rows, heads in uses:
            source = self._split(self.entry(role, (rows, columns), layer).read(), heads)
            # Some rows at a time: less memory is touched, and it stays in the cache.
            for first in range(0, rows, ROWS_AT_ONCE):
                part = source[first : first + ROWS_AT_ONCE]
                target[start + first : start + first + len(part)] = part.astype(dtype)
            start += rows
        return Dense(target, self.dtype)

    def _split(self, rows: Array, heads: int) -> Array:
        return half_split_rows(rows, heads) if heads and self.paired else rows

    def _all_blocks(self, uses: Sequence[tuple[str, int, int]], columns: int, layer: int) -> bool:
        """Whether all can be held in blocks of one form."""
        found = [self._raw(use, columns, layer) for use in uses] if self.blocks else [None]
        return None not in found and len({raw.form for raw in found if raw is not None}) == 1

    def _raw(self, use: tuple[str, int, int], columns: int, layer: int) -> RawBlocks | None:
        role, rows, heads = use
        entry = self.entry(role, (rows, columns), layer)
        raw = RawBlocks.parse(entry.data, entry.shape, entry.format) if isinstance(entry, TensorEntry) else None
        return raw and raw.reordered(lambda part: self._split(part, heads))


def load_weights(
    where: str, tensors: Mapping[str, Entry], config: LlamaConfig, dtype: str, gguf: bool
) -> LlamaWeights:
    """Read and lay out all weights.

    where: the file, for messages. tensors: of the file, by name. dtype: of the matrices: "f32", "bf16", or "file": the
    blocks of the file where there are kernels for them, and bf16 elsewhere. gguf: the names and the row order of a GGUF
    file, or else of a Hugging Face checkpoint.
    Raises ModelError for a tensor that is missing, of the wrong shape, or of a format that cannot be read.
    """
    loader = _Loader(where, tensors, GGUF_NAMES if gguf else JSON_NAMES, dtype, gguf)
    features, hidden, size = config.features, config.hidden, config.head_features
    queries, keys = config.heads, config.kv_heads
    attention = [("query", queries * size, queries), ("key", keys * size, keys), ("value", keys * size, 0)]
    layers = []
    for i in range(config.layers):
        attention_gain = loader.gain("attention_gain", features, i)
        qkv = loader.joined(attention, features, i)
        output = loader.joined([("output", features, 0)], queries * size, i)
        feed_forward_gain = loader.gain("feed_forward_gain", features, i)
        gate, up = loader.matrices([("gate", hidden, 0), ("up", hidden, 0)], features, i)
        down = loader.joined([("down", features, 0)], hidden, i)
        layers.append(LayerWeights(attention_gain, qkv, output, feed_forward_gain, gate, up, down))
    gain = loader.gain("gain", features)
    tied = loader.names["logits"] not in tensors
    embedding = loader.joined([("embedding", config.vocabulary, 0)], features)
    logits = embedding if tied else loader.joined([("logits", config.vocabulary, 0)], features)
    factors = None
    if loader.names["rope_factors"] in tensors:
        factors = loader.entry("rope_factors", (size // 2,)).read()
    return LlamaWeights(embedding, tuple(layers), gain, logits, factors)
