"""`sapper merge`: a model with an adapter in its matrices.

In: a model and a directory with an adapter. Out: a directory that every command takes for a model; a summary on stdout,
or one JSON object; progress on stderr. Holds: the directory is there as a whole or not at all, whatever ends the
command; raises ModelError and CommandError for a user's mistakes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from .console import told_parts
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
    started = time.perf_counter()
    with told_parts(progress) as report:
        checkpoint = open_checkpoint(model)
        matrices, size = merge(checkpoint, adapter, Path(out), dtype=dtype, report=report)
    return {"model": model, "adapter": adapter, "out": out, "dtype": dtype, "matrices": matrices,
            "tensors": len(checkpoint.tensors), "bytes": size, "seconds": round(time.perf_counter() - started, 3)}
