"""`sapper perplexity`: how well a model foretells a text.

In: a model and a file. Out: the figure on stdout, or one JSON object; progress on stderr. Holds: raises ModelError and
CommandError for a user's mistakes.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from .errors import CommandError


def run_perplexity(
    model: str, file: str, *, context: int | None, stride: int, threads: int | None, dtype: str,
    adapter: str | None = None, progress: bool,
) -> dict[str, Any]:
    """The figures. context, stride: the windows (models/perplexity.py). adapter: a directory with one."""
    try:
        from ..models.load import load_model
        from ..models.perplexity import Perplexity, perplexity
    except ImportError as error:
        raise CommandError(f"{error}; mend: pip install 'sapper[models]'") from None
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or error
        raise CommandError(f"{file}: found {found}; expected a text file in UTF-8; mend: check the path") from None
    loaded = load_model(model, dtype, adapter=adapter)
    tokens = loaded.tokenizer.encode(text)
    started = time.perf_counter()
    live = progress and sys.stderr.isatty()

    def report(done: int, windows: int, so_far: Perplexity) -> None:
        if not progress:
            return
        left = (time.perf_counter() - started) / done * (windows - done)
        line = f"window {done} of {windows}: perplexity {so_far.value:.4f} so far, {left:.0f} s left"
        print(f"\r{line:<78}" if live else line, end="" if live and done < windows else "\n", file=sys.stderr,
              flush=True)

    found = perplexity(loaded, tokens, context=context, stride=stride, threads=threads, report=report)
    seconds = time.perf_counter() - started
    return {
        "model": model, "file": file, "perplexity": found.value, "error": found.error, "tokens": found.tokens,
        "text_tokens": len(tokens), "windows": found.windows, "stride": stride, "dtype": dtype,
        **({} if adapter is None else {"adapter": adapter}),
        "seconds": round(seconds, 3),
    }
