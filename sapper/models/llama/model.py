"""A Llama model, loaded: config, weights, tokenizer and the tables of the rotary embedding.

In: an opened checkpoint of Llama or Qwen2. Out: `LlamaModel`. Holds: the config, the weights and the tokenizer agree
with one another. What happens here at load may use NumPy's arithmetic; the forward pass (session.py) may not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint, open_checkpoint
from ..tokenizer import Tokenizer
from ..weights import check_form
from . import config as configs
from .config import LlamaConfig
from .session import Session
from .weights import LlamaWeights, load_weights

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class LlamaModel:
    """path: where it came from. dtype: how the matrices are held, one of FORMS."""

    path: Path
    config: LlamaConfig
    weights: LlamaWeights
    tokenizer: Tokenizer
    dtype: str

    @property
    def positions(self) -> int:
        """The longest context."""
        return self.config.positions

    def session(
        self, context: int | None = None, *, cache_dtype: str = "f32", threads: int | None = None,
        interpret: bool = False,
    ) -> Session:
        """A new conversation; see BaseSession."""
        return Session(self, context, cache_dtype=cache_dtype, threads=threads, interpret=interpret)


def load_model(model: str | Path, dtype: str = "file") -> LlamaModel:
    """Load a Llama or Qwen2 model, as sapper.models.load does. Raises ModelError, also for other architectures."""
    check_form(dtype)
    return load(open_checkpoint(model), dtype)


def load(checkpoint: Checkpoint, dtype: str) -> LlamaModel:
    """The model of a checkpoint. Raises ModelError."""
    read = configs.from_gguf if checkpoint.gguf else configs.from_json
    config = read(checkpoint.metadata, checkpoint.where)
    tokenizer = checkpoint.tokenizer(config.vocabulary)
    weights = load_weights(checkpoint, config, dtype)
    return LlamaModel(checkpoint.path, config, weights, tokenizer, dtype)
