"""A model that becomes files (`sapper build MODEL`): loaded, and bound to the programs of its architecture.

In: a name, a file or a directory. Out: `Whole`. Holds: what is model-specific ends here; sapper/ahead sees programs and
arrays.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..ahead.plan import Model
from .locate import NAMES
from .tokenizer import Tokenizer

DEFAULT_CONTEXT = 2048


class Whole(NamedTuple):
    model: Model
    tokenizer: Tokenizer


def is_model(wanted: str) -> bool:
    """Whether a command line means a model and not kernels."""
    return wanted.lower() in NAMES or wanted.endswith(".gguf") or (Path(wanted) / "config.json").exists()


def load_whole(wanted: str, name: str, context: int | None = None, dtype: str = "file") -> Whole:
    """name: of the C functions. context: tokens of a conversation (None: as many as the model can, but at most
    DEFAULT_CONTEXT). dtype: how weights are held, as for `sapper generate`. Raises ModelError."""
    from .llama.model import load_model
    from .llama.whole import whole_model

    loaded = load_model(wanted, dtype)
    tokens = min(loaded.config.positions, DEFAULT_CONTEXT) if context is None else context
    return Whole(whole_model(loaded, name, tokens), loaded.tokenizer)
