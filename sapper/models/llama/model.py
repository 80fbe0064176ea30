"""Loads a Llama, Mistral, Qwen2 or Qwen3 model.

In: an opened checkpoint. Out: `LlamaModel`. Holds: what models/model.py says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from ..checkpoint import Checkpoint, open_checkpoint
from ..model import Model
from ..weights import Loader, check_form
from . import config as configs
from .config import LlamaConfig
from .weights import GGUF_NAMES, JSON_NAMES, LlamaWeights, load_weights

LlamaModel: TypeAlias = Model[LlamaConfig, LlamaWeights]


def load_model(model: str | Path, dtype: str = "file") -> LlamaModel:
    """Load such a model, as sapper.models.load does. Raises ModelError, also for other architectures."""
    check_form(dtype)
    return load(open_checkpoint(model), dtype)


def load(checkpoint: Checkpoint, dtype: str, target: Any = None) -> LlamaModel:
    """The model of a checkpoint. target: see Loader. Raises ModelError."""
    read = configs.from_gguf if checkpoint.gguf else configs.from_json
    config = read(checkpoint.metadata, checkpoint.where)
    names = GGUF_NAMES if checkpoint.gguf else JSON_NAMES
    loader = Loader(str(checkpoint.path), checkpoint.tensors, names, dtype, target)
    tokenizer = checkpoint.tokenizer(config.vocabulary)
    weights = load_weights(loader, config, interleaved=checkpoint.gguf and checkpoint.architecture == "llama")
    return LlamaModel(checkpoint.path, config, weights, tokenizer, dtype, "llama")
