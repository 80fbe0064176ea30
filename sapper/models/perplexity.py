"""Perplexity of a text: how many tokens a model wavers between, on average.

In: a model and the tokens of a text. Out: `Perplexity`. Holds: windows and counted tokens are those of llama.cpp's
`llama-perplexity`, so that the figures compare:

    stride 0    windows of `context` tokens one after the other, what is left over at the end is not used. Of each, the
                tokens behind index context // 2 count, so that every one that counts has half a window before it.
    stride S    a window begins every S tokens, and its last S tokens count. (llama.cpp makes its window S / 2 longer
                than its option says; here the window is as given.)

The first token of every window is BOS where the model wants one. The error is that of a mean: the deviation of the
tokens' losses over the root of their number less one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .errors import ModelError
from .load import Loaded

CONTEXT = 512


@dataclass(frozen=True, slots=True)
class Perplexity:
    """value: exp of the mean loss. error: one standard deviation of it. tokens: how many count. windows."""

    value: float
    error: float
    tokens: int
    windows: int


def windows_of(count: int, context: int, stride: int) -> list[tuple[int, int]]:
    """Where each window of a text of so many tokens begins, and the index in it of the token behind which they count.
    Raises ModelError for a text that is too short, or a window or stride that cannot be."""
    if context < 4 or not 0 <= stride < context:
        raise ModelError("the windows", f"{context} tokens every {stride or context}", "4 at least, and a stride below")
    if count < 2 * context:
        raise ModelError("the text", f"{count} tokens", f"at least {2 * context}, two windows",
                         "take a longer text or a smaller context")
    if not stride:
        return [(i * context, context // 2) for i in range(count // context)]
    return [(i * stride, context - stride - 1) for i in range(-(-(count - context) // stride))]


def perplexity(
    model: Loaded, tokens: Sequence[int], *, context: int | None = None, stride: int = 0, threads: int | None = None,
    interpret: bool = False, cache_dtype: str | None = None,
    report: Callable[[int, int, Perplexity], None] = lambda done, windows, so_far: None,
) -> Perplexity:
    """context: of a window (None: CONTEXT, or what the model can). report: called after each window with its number,
    how many there are, and the figure so far. Raises ModelError."""
    size = min(CONTEXT, model.positions) if context is None else context
    windows = windows_of(len(tokens), size, stride)
    session = model.session(size, threads=threads, interpret=interpret, cache_dtype=cache_dtype)
    begin = model.tokenizer.begin if model.tokenizer.add_begin else None
    total = squares = 0.0
    count = 0
    result = Perplexity(0.0, 0.0, 0, 0)
    for number, (start, first) in enumerate(windows, 1):
        window = list(tokens[start : start + size])
        if begin is not None:
            window[0] = begin
        session.rewind(0)
        for loss in session.losses(window, first):
            total += loss
            squares += loss * loss
            count += 1
        mean = total / count
        value = math.exp(min(mean, 700.0))
        deviation = math.sqrt(max(0.0, squares / count - mean * mean) / max(1, count - 1))
        result = Perplexity(value, value * deviation, count, number)
        report(number, len(windows), result)
    return result
