"""DeepSeek models with random weights, for measuring: as fast and as large as trained ones, without a file.

In: a config. Out: `Untrained`. Holds: the weights went through the same loader as a file's; a seed gives the same ones.
Where the form is that of a file, matrices are in Q4_0's blocks of 4 bits, cut from one pool of random bytes at places
of their own: no more is drawn, and no memory is held but that of the panels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...kernels.quantized import FORMS, PANEL, SLOT
from ...runtime.buffers import Arena
from ...runtime.system import trim_heap
from ..raw_blocks import Raw, RawBlocks
from ..weights import Loader
from .config import DeepseekConfig
from .session import Session, cache_dtype_of
from .weights import NAMES, DeepseekWeights, load_weights

SMALL_V2 = {
    "model_type": "deepseek_v2", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096,
    "moe_intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 16, "n_routed_experts": 16,
    "n_shared_experts": 2, "num_experts_per_tok": 4, "first_k_dense_replace": 1, "q_lora_rank": 512,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "max_position_embeddings": 4096,
}
"""config.json of a small model with DeepSeek-V2's attention: 431 million weights, of which a token meets 200 million.
"""


V2_LITE = {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "q_lora_rank": None,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "max_position_embeddings": 163840, "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 0.707, "mscale_all_dim": 0.707,
    },
}
"""config.json of DeepSeek-V2-Lite: 15.7 billion weights, of which a token meets 2.4 billion."""

WIDE_V2 = {**{key: value for key, value in V2_LITE.items() if key != "rope_scaling"}, "num_hidden_layers": 4,
           "q_lora_rank": 512}
"""config.json of 4 layers as wide as DeepSeek-V2-Lite's: 2.2 billion weights. Angles are not scaled; queries are of low
rank, as llama.cpp expects them of all models but those of 26 and 27 layers."""


@dataclass(frozen=True, slots=True)
class _RandomEntry:
    """A tensor as a file would have it: of a size that keeps activations near 1."""

    shape: tuple[int, ...]
    seed: int

    @property
    def nbytes(self) -> int:
        return 0

    def read(self) -> np.ndarray[Any, np.dtype[Any]]:
        noise = np.random.default_rng(self.seed).standard_normal(self.shape, dtype=np.float32)
        if len(self.shape) == 1:
            return 1.0 + 0.1 * noise
        noise *= np.float32(self.shape[-1] ** -0.5)
        return noise


class RandomLoader(Loader):
    """A loader that finds every tensor that it is asked for. seed: of the first one."""

    def __init__(self, form: str, seed: int) -> None:
        super().__init__("random weights", {}, NAMES, form)
        self._seed = seed

    def has(self, role: str, *places: int) -> bool:
        return True

    def entry(self, role: str, shape: tuple[int, ...], *places: int) -> _RandomEntry:
        self._seed += 1
        return _RandomEntry(shape, self._seed)


POOL_BYTES = 1 << 26


class RandomBlocks(RandomLoader):
    """The same in blocks of 4 bits, where their kernels take a matrix."""

    def __init__(self, form: str, seed: int) -> None:
        super().__init__(form, seed)
        self._random = np.random.default_rng(seed)
        self.arena = Arena(1 << 34)  # one block, as a file's weights have
        self._pool = self._random.integers(0, 256, POOL_BYTES, np.uint8)

    def raw(self, role: str, shape: tuple[int, ...], rows: tuple[int, ...], *places: int) -> Raw | None:
        form = FORMS["q4"]
        count, columns = rows
        if count % PANEL or columns % form.block:
            return None
        blocks, size = columns // form.block, form.words * SLOT
        # Rows of one part of the pool may overlap, as long as each begins at a byte of its own.
        step = min(blocks * size, (POOL_BYTES - blocks * size - 1) // count)
        first = int(self._random.integers(0, POOL_BYTES - step * count - blocks * size))
        quants = np.lib.stride_tricks.as_strided(self._pool[first:], (count, blocks, size), (step, size, 1))
        # Numbers from -8 to 7, all as likely, have a deviation of 4.6; activations are to stay near 1.
        scale = np.full((count, blocks), 1.0 / (4.6 * columns**0.5), np.float16)
        return RawBlocks(form, (quants, scale))


@dataclass(frozen=True, slots=True)
class Untrained:
    """A model without a tokenizer. dtype: as Model has it."""

    config: DeepseekConfig
    weights: DeepseekWeights
    dtype: str

    @property
    def cache_dtype(self) -> str:
        """As Model has it."""
        return cache_dtype_of(self.dtype, self.weights)

    def session(self, context: int | None = None, *, threads: int | None = None) -> Session:
        """A new conversation; see BaseSession."""
        return Session(self, context, threads=threads)


def untrained(config: DeepseekConfig, dtype: str = "bf16", seed: int = 0) -> Untrained:
    """A model with random weights. dtype: one of FORMS (sapper/models/weights.py). Raises ModelError for another."""
    loader = (RandomBlocks if dtype.startswith("file") else RandomLoader)(dtype, seed)
    weights = load_weights(loader, config)
    del loader
    trim_heap()
    return Untrained(config, weights, dtype)
