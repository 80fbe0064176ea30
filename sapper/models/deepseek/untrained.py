"""DeepSeek models with random weights, for measuring: as fast and as large as trained ones, without a file.

In: a config. Out: `Untrained`. Holds: the weights went through the same loader as a file's; a seed gives the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..weights import Loader
from .config import DeepseekConfig
from .session import Session
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


@dataclass(frozen=True, slots=True)
class _RandomEntry:
    """A tensor as a file would have it: of a size that keeps activations near 1."""

    shape: tuple[int, ...]
    seed: int

    def read(self) -> np.ndarray[Any, np.dtype[Any]]:
        noise = np.random.default_rng(self.seed).standard_normal(self.shape, dtype=np.float32)
        return 1.0 + 0.1 * noise if len(self.shape) == 1 else noise * np.float32(self.shape[-1] ** -0.5)


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


@dataclass(frozen=True, slots=True)
class Untrained:
    """A model without a tokenizer."""

    config: DeepseekConfig
    weights: DeepseekWeights

    def session(self, context: int | None = None, *, threads: int | None = None) -> Session:
        """A new conversation; see BaseSession."""
        return Session(self, context, threads=threads)


def untrained(config: DeepseekConfig, dtype: str = "bf16", seed: int = 0) -> Untrained:
    """A model with random weights. dtype: "bf16" or "f32"."""
    return Untrained(config, load_weights(RandomLoader(dtype, seed), config))

