"""Loads a DeepSeek model.

In: an opened checkpoint. Out: `DeepseekModel`. Holds: what models/model.py says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from ..checkpoint import Checkpoint, open_checkpoint
from ..model import Model
from ..weights import Loader, check_form
from .config import DeepseekConfig, from_gguf, from_json
from .weights import GGUF_NAMES, NAMES, DeepseekWeights, load_weights

DeepseekModel: TypeAlias = Model[DeepseekConfig, DeepseekWeights]


def load_model(model: str | Path, dtype: str = "file", predictor: bool = False) -> DeepseekModel:
    """Load a DeepSeek model, as sapper.models.load does. Raises ModelError, also for other architectures."""
    check_form(dtype)
    return load(open_checkpoint(model), dtype, predictor)


def load(checkpoint: Checkpoint, dtype: str, predictor: bool = False, target: Any = None) -> DeepseekModel:
    """The model of a checkpoint. predictor: with its MTP head. target: see Loader. Raises ModelError."""
    config = (from_gguf if checkpoint.gguf else from_json)(checkpoint.metadata, checkpoint.where)
    names = GGUF_NAMES if checkpoint.gguf else NAMES
    loader = Loader(str(checkpoint.path), checkpoint.tensors, names, dtype, target)
    tokenizer = checkpoint.tokenizer(config.vocabulary)
    weights = load_weights(loader, config, predictor)
    return DeepseekModel(checkpoint.path, config, weights, tokenizer, dtype, "deepseek")
