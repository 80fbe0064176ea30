"""A DeepSeek model, loaded: config, weights and tokenizer.

In: an opened checkpoint. Out: `DeepseekModel`. Holds: the config, the weights and the tokenizer agree with one another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import Checkpoint, open_checkpoint
from ..tokenizer import Tokenizer
from ..weights import Loader, check_form
from .config import DeepseekConfig, from_gguf, from_json
from .session import Session
from .weights import GGUF_NAMES, NAMES, DeepseekWeights, load_weights


@dataclass(frozen=True, slots=True)
class DeepseekModel:
    """path: where it came from. dtype: how the matrices are held, one of FORMS."""

    path: Path
    config: DeepseekConfig
    weights: DeepseekWeights
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


def load_model(model: str | Path, dtype: str = "file") -> DeepseekModel:
    """Load a DeepSeek model, as sapper.models.load does. Raises ModelError, also for other architectures."""
    check_form(dtype)
    return load(open_checkpoint(model), dtype)


def load(checkpoint: Checkpoint, dtype: str) -> DeepseekModel:
    """The model of a checkpoint. Raises ModelError."""
    config = (from_gguf if checkpoint.gguf else from_json)(checkpoint.metadata, checkpoint.where)
    tokenizer = checkpoint.tokenizer(config.vocabulary)
    names = GGUF_NAMES if checkpoint.gguf else NAMES
    weights = load_weights(Loader(str(checkpoint.path), checkpoint.tensors, names, dtype), config)
    return DeepseekModel(checkpoint.path, config, weights, tokenizer, dtype)
