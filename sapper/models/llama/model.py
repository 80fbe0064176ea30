"""A Llama model, loaded: config, weights, tokenizer and the tables of the rotary embedding.

In: a GGUF file, or a directory with safetensors. Out: `LlamaModel`. Holds: the config, the weights and the tokenizer
agree with one another. What happens here at load may use NumPy's arithmetic; the forward pass (session.py) may not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import tokenizer as tokenizers
from ..errors import ModelError
from ..gguf_file import GgufFile
from ..locate import find_model
from ..safetensors_file import SafetensorsDirectory
from . import config as configs
from .config import LlamaConfig
from .weights import LlamaWeights, load_weights

FORMS = ("file", "bf16", "f32")
"""How the matrices may be held: in one dtype, or in the blocks of the file."""
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class LlamaModel:
    """path: where it came from. dtype: how the matrices are held, one of FORMS."""

    path: Path
    config: LlamaConfig
    weights: LlamaWeights
    tokenizer: tokenizers.Tokenizer
    dtype: str

    def rope_tables(self, positions: int) -> tuple[Array, Array]:
        """Cosine and sine, f32, [positions, head_features / 2]."""
        angle = np.arange(positions, dtype=np.float64)[:, None] * self.config.frequencies(self.weights.rope_factors)
        return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def load_model(model: str | Path, dtype: str = "file") -> LlamaModel:
    """Load a model. model: a path, or a name that sapper.models.locate knows. dtype: "file", "bf16" or "f32".

    With "f32" and "bf16", block formats are widened at load; bf16 rounds each weight once more, to 8 bits of precision.
    With "file", matrices in Q4_0, Q4_1 and Q8_0 stay what they are, and the others become bf16.
    Raises ModelError for whatever is wrong with the file.
    """
    if dtype not in FORMS:
        raise ModelError("the dtype of the weights", repr(dtype), f"one of {', '.join(FORMS)}")
    path = find_model(model)
    if path.is_dir():
        directory = SafetensorsDirectory(path)
        config = configs.from_json(directory.config, str(path / "config.json"))
        tokenizer = tokenizers.from_directory(path)
        weights = load_weights(str(path), directory.tensors, config, dtype, gguf=False)
    else:
        file = GgufFile(path)
        config = configs.from_gguf(file.metadata, str(path))
        tokenizer = tokenizers.from_gguf(file.metadata, str(path))
        weights = load_weights(str(path), file.tensors, config, dtype, gguf=True)
    if tokenizer.size > config.vocabulary:
        raise ModelError(
            path, f"{tokenizer.size} tokens in the tokenizer", f"at most {config.vocabulary}, the rows of the embedding"
        )
    return LlamaModel(path, config, weights, tokenizer, dtype)
