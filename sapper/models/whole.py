"""A model that becomes files (`sapper build MODEL`): loaded, and bound to the programs of its architecture.

In: a name, a file or a directory. Out: `ahead.Model`. Holds: what is model-specific ends here; sapper/ahead sees
programs and arrays.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..ahead.errors import AheadError
from ..ahead.plan import Model
from .errors import ModelError
from .load import load_model
from .vocabulary import vocabulary_of
from .workspace import named_arrays

DEFAULT_CONTEXT = 2048


def load_whole(
    wanted: str, name: str, context: int | None = None, dtype: str = "file", words: bool = False, target: Any = None
) -> Model:
    """name: of the C functions. context: tokens of a conversation (None: as many as the model can, but at most
    DEFAULT_CONTEXT). dtype: how weights are held, as for `sapper generate`. words: the model must have a tokenizer that
    can be built in; else it has one if it can. target: of the code (None: this CPU). Raises ModelError."""
    loaded = load_model(wanted, dtype, target=target)
    session = loaded.session(min(loaded.positions, DEFAULT_CONTEXT) if context is None else context)
    model = session.whole(name, f"{loaded.path.name}, {loaded.config}", named_arrays(loaded.weights), target)
    try:
        return replace(model, words=vocabulary_of(loaded.tokenizer, model.vocabulary))
    except (ModelError, AheadError):
        if words:
            raise
        return model
