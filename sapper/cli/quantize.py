"""`sapper quantize`: a model with its matrices in groups of 4 or 8 bits.

In: a model. Out: a directory that every command takes for a model; a summary on stdout, or one JSON object; progress on
stderr. Holds: the directory is there as a whole or not at all, whatever ends the command; raises ModelError and
CommandError for a user's mistakes.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

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
    live = progress and sys.stderr.isatty()
    started = time.perf_counter()
    last = 0.0

    def report(done: int, total: int, name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        if progress and now - last >= (0.2 if live else 5.0):
            last = now
            line = f"{100 * done / max(1, total):.0f} %: {name}"
            print(f"\r{line:<78.78}" if live else line, end="" if live else "\n", file=sys.stderr, flush=True)

    try:
        checkpoint = open_checkpoint(model)
        summary = quantize_checkpoint(
            checkpoint, Path(out), Settings(BITS[dtype], group, zero_points), shard_bytes=shard_mib << 20,
            workers=threads or 2, report=report)
    finally:
        if live:
            print(f"\r{'':<78}\r", end="", file=sys.stderr, flush=True)
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
