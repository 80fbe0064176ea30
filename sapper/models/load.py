"""Loads a model of any architecture that there is.

In: a path or a name. Out: a `Model`. Holds: which package loads what stands in one
table.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from ..runtime.system import trim_heap
from .checkpoint import Checkpoint, open_checkpoint
from .errors import ModelError
from .model import Model
from .weights import check_form

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "llama", "qwen3_moe": "llama",
                 "qwen3moe": "llama", "deepseek_v2": "deepseek",
                 "deepseek_v3": "deepseek", "deepseek_v32": "deepseek", "deepseek2": "deepseek"}
"""What a checkpoint calls its architecture -> the package that has it."""


Loaded: TypeAlias = Model[Any, Any]


def load_model(model: str | Path, dtype: str = "file", predictor: bool = False, target: Any = None,
               adapter: str | Path | None = None) -> Loaded:
    """Load a model. model: a path, or a name that sapper.models.locate knows. dtype: one of weights.FORMS.

    With "f32" and "bf16", block formats are widened at load; bf16 rounds each weight once more, to 8 bits of precision.
    With "file", matrices in Q4_0, Q4_1 and Q8_0 stay what they are, and the others become bf16. What the former are
    multiplied by is quantised to 8 bits, a scale for every 32 numbers; with "file-f32" it stays f32, which is slower.
    With "file-rounded", rows of activations of many tokens, and the weights that they meet, are rounded to bf16
    instead, which makes prompts faster where the CPU has tile registers. "bf16-rounded" is "bf16" with rows of
    activations rounded to bf16 too, which makes prompts twice as fast.
    predictor: with the MTP head, for sessions that speculate. target: whose code reads the weights (None: this CPU's).
    adapter: a directory with one of low rank (adapter.py), which is added to the matrices; these are then held as what
    is not quantised in the file. Raises ModelError for whatever is wrong with the files.
    """
    check_form(dtype)
    with without_collection():
        checkpoint = open_checkpoint(model)
        if adapter is not None:
            from .adapter import with_adapter

            checkpoint = with_adapter(checkpoint, adapter)
        loaded = load_checkpoint(checkpoint, dtype, predictor, target)
    trim_heap()  # of what was read
    return loaded


@contextmanager
def without_collection() -> Iterator[None]:
    """Python's collector of cycles off: a vocabulary's 100 000 strings and pairs would set it to work for nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def load_checkpoint(checkpoint: Checkpoint, dtype: str, predictor: bool = False, target: Any = None) -> Loaded:
    package = ARCHITECTURES.get(checkpoint.architecture)
    if package is None:
        key = "general.architecture" if checkpoint.gguf else "model_type"
        found = repr(checkpoint.metadata.get(key))[:80]
        raise ModelError(
            f"{checkpoint.where}, key {key}", found, f"one of {', '.join(ARCHITECTURES)}",
            "take a model of such an architecture",
        )
    if predictor and package != "deepseek":
        raise ModelError(checkpoint.where, f"a model of {checkpoint.architecture}", "one with an MTP head",
                         "generate without --speculate")
    options = {"predictor": predictor} if predictor else {}
    loaded: Loaded = import_module(f"{__package__}.{package}.model").load(checkpoint, dtype, target=target, **options)
    return loaded
