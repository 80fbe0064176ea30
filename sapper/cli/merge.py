"""`sapper merge`: a model with an adapter in its matrices.

In: a model and a directory with an adapter. Out: a directory that every command takes for a model; a summary on stdout,
or one JSON object; progress on stderr. Holds: the directory is there as a whole or not at all, whatever ends the
command; raises ModelError and CommandError for a user's mistakes.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from .errors import CommandError

DTYPES = ("f32", "bf16")


def run_merge(model: str, adapter: str, out: str, *, dtype: str, progress: bool = True) -> dict[str, Any]:
    """The figures. dtype: of the matrices that are written."""
    try:
        from ..models.adapter import merge
        from ..models.checkpoint import open_checkpoint
    except ImportError as error:
        raise CommandError(f"{error}; mend: pip install 'sapper[models]'") from None
    if dtype not in DTYPES:
        raise CommandError(f"--dtype: found {dtype!r}; expected one of {', '.join(DTYPES)}", 2)
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
        matrices, size = merge(checkpoint, adapter, Path(out), dtype=dtype, report=report)
    finally:
        if live:
            print(f"\r{'':<78}\r", end="", file=sys.stderr, flush=True)
    return {"model": model, "adapter": adapter, "out": out, "dtype": dtype, "matrices": matrices,
            "tensors": len(checkpoint.tensors), "bytes": size, "seconds": round(time.perf_counter() - started, 3)}
