"""`sapper quantize`: a model with its matrices in groups of 4 or 8 bits.

In: a model. Out: a directory that every command takes for a model; a summary on stdout, or one JSON object; progress on
stderr. Holds: the directory is there as a whole or not at all, whatever ends the command; raises ModelError and
CommandError for a user's mistakes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from .console import told_parts
from .errors import CommandError

BITS = {"int4": 4, "int8": 8}


def run_quantize(
    model: str, out: str, *, dtype: str, group: int, zero_points: bool | None, text: str | None, shard_mib: int,
    threads: int | None, progress: bool = True,
) -> dict[str, Any]:
    """The figures. zero_points: whether a group has a minimum (None: with 4 bits). text: a file over which perplexity
    is measured before and after."""
    try:
        from ..models.checkpoint import open_checkpoint
        from ..models.quantize import Settings, quantize_checkpoint
    except ImportError as error:
        raise CommandError(f"{error}; mend: pip install 'sapper[models]'") from None
    if dtype not in BITS:
        raise CommandError(f"--dtype: found {dtype!r}; expected one of {', '.join(BITS)}", 2)
    if group not in (32, 64, 128):
        raise CommandError(f"--group: found {group}; expected 32, 64 or 128", 2)
    if text is not None and not Path(text).is_file():
        raise CommandError(f"{text}: found no file; expected a text in UTF-8; mend: check the path")
    started = time.perf_counter()
    with told_parts(progress) as report:
        checkpoint = open_checkpoint(model)
        summary = quantize_checkpoint(
            checkpoint, Path(out), Settings(BITS[dtype], group, zero_points), shard_bytes=shard_mib << 20,
            workers=threads or 2, report=report)
    facts: dict[str, Any] = {
        "model": model, "out": out, "dtype": dtype, "group": group, "forms": summary.forms, "tensors": summary.tensors,
        "matrices": summary.matrices, "weights": summary.weights, "before_bytes": summary.before_bytes,
        "after_bytes": summary.after_bytes, "relative_error": round(summary.error, 6),
        "seconds": round(time.perf_counter() - started, 3),
    }
    if text is not None:
        from .perplexity import run_perplexity

        for name, which in (("perplexity_before", model), ("perplexity_after", out)):
            facts[name] = run_perplexity(which, text, context=None, stride=0, threads=threads, dtype="file",
                                         progress=progress)["perplexity"]
    return facts
