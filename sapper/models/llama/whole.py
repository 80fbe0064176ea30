"""A Llama model as what sapper/ahead makes a file of: its two programs, and the names of their arrays.

In: a LlamaModel. Out: `ahead.Model`. Holds: the programs are those of a Session, each with one launch more, which finds
the likeliest token.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from ...ahead.plan import Model
from ...kernels import sampling
from .model import LlamaModel
from .session import Session


def whole_model(model: LlamaModel, name: str, context: int, cache_dtype: str = "f32") -> Model:
    """name: of the C functions. context: tokens that a conversation may have. Raises ModelError."""
    session = Session(model, context, cache_dtype=cache_dtype)
    likeliest = ("likeliest token", [(sampling.argmax_rows, (session.logits.reshape(1, -1), session.picked))])
    programs = {"prefill": [*session.prefill_sections(), likeliest], "step": [*session.step_sections(), likeliest]}
    config = model.config
    return Model(
        name, programs, session.arrays() | _named("", model.weights), tuple(session.cache_arrays()), context,
        config.vocabulary, session.chunk,
        f"{model.path.name}: {config.layers} layers of {config.features} features, {config.heads} heads, "
        f"{config.kv_heads} of keys and values, {config.vocabulary} tokens; weights {model.dtype}",
    )


def _named(name: str, value: Any) -> dict[str, Any]:
    """Every array in a structure of weights, by where it stands."""
    if isinstance(value, np.ndarray):
        return {name: value}
    if isinstance(value, tuple):
        return {k: v for i, part in enumerate(value) for k, v in _named(f"{name} {i}".strip(), part).items()}
    if is_dataclass(value) and not isinstance(value, type):
        parts = [_named(f"{name} {f.name}".strip(), getattr(value, f.name)) for f in fields(value)]
        return {k: v for part in parts for k, v in part.items()}
    return {}
