"""A model in training that becomes files (`sapper build MODEL --training`).

In: a `Trainer`. Out: `ahead.Training`. Holds: what lies in memory as one vector, all matrices or all vectors, lies so
in the files that `sapper train` writes, the model and AdamW's state, which the code maps, reads and writes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..ahead.plan import Training
from ..ahead.words import Vocabulary
from ..kernels import optimizer
from ..runtime.buffers import empty
from .errors import ModelError
from .trainer import KINDS, Trainer
from .training import USUAL_STEPS, Recipe, model_pieces, state_pieces
from .workspace import named_arrays
from .written import header_of

USUAL = Recipe(USUAL_STEPS)

Array = np.ndarray[Any, np.dtype[Any]]


def whole_of(trainer: Trainer, name: str, words: Vocabulary | None = None) -> Training:
    """name: of the C functions. words: the tokenizer of a program of its own. Raises ModelError for tensors that are
    not in one piece in training."""
    for tensor, trained in trainer.tensors.items():
        if not trained.rows.flags.c_contiguous:
            raise ModelError(f"{trainer.checkpoint.path}, tensor {tensor}", "one of which training has parts apart, of "
                             "experts or heads", "tensors as directories of safetensors have them",
                             "build from such a directory")
    f64 = np.dtype(np.float64)
    recipe, steps = empty((len(optimizer.RECIPE),), f64), empty((1,), f64)
    numbers = empty((len(optimizer.NUMBERS),), np.dtype(np.float32))
    filled = {"tokens": trainer.tokens, "targets": trainer.targets, "wanted": trainer.wanted, "recipe": recipe,
              "numbers": numbers, "loss": trainer.loss, "norm": trainer.norm, "steps": steps}
    programs = {"numbers": [("numbers of a step", [(optimizer.step_numbers, (
        recipe, trainer.targets, steps, steps, numbers))])], **trainer.sections()}
    if words is not None:
        settings = empty((len(optimizer.SETTINGS), 2), np.dtype(np.int64))
        told = empty((3,), np.dtype(np.int32))
        fixed = empty((len(optimizer.FIXED),), f64)
        fixed[:] = [getattr(USUAL, key) for key in optimizer.FIXED]
        filled |= {"settings": settings, "told": told}
        programs |= {"plan": [("a step's recipe", [(optimizer.plan_step, (settings, fixed, steps, recipe))])],
                     "tell": [("what is told", [(optimizer.tell_step, (trainer.loss, trainer.norm, told))])]}
    flat = {f"{part} of {kind}": one
            for part, some in (("matrices", trainer.matrices), ("vectors", trainer.vectors))
            for kind, one in zip(KINDS, some, strict=True)}
    weights = ("matrices of weights", "vectors of weights", *trainer.apart)
    known = [*filled.values(), *flat.values(), *trainer.apart.values()]
    buffers = {key: array for key, array in named_arrays(trainer.buffers()).items()
               if all(array is not one for one in known)}
    below = dict.fromkeys(optimizer.RECIPE, math.inf) | dict.fromkeys(("beta1", "beta2"), 1.0)
    variables = {key: place for place, key in enumerate(optimizer.NUMBERS)}
    if not trainer.apart:       # there are no experts to be balanced
        below["balance"] = math.ulp(0.0)
        del variables["balance"]
    model = model_pieces(trainer, laid_out=True)
    return Training(
        name=name, description=f"{trainer.checkpoint.path.name}, {trainer.config}",
        programs=programs,
        arrays=buffers | filled | flat | trainer.apart, state=tuple(key for key in flat if key not in weights),
        weights=weights, head=header_of(model), content_bytes=sum(piece.nbytes for piece in model),
        saved=tuple(f"{part} of {kind}" for kind in ("means", "squares") for part in ("matrices", "vectors")),
        state_head=header_of(state_pieces(trainer, 0, laid_out=True)),
        variables={name: variables if name == "train" else {} for name in programs}, recipe=below,
        vocabulary=trainer.vocabulary,
        sequences=trainer.sequences, length=trainer.length, words=words,
        settings={key: getattr(USUAL, key) for key in optimizer.SETTINGS})
