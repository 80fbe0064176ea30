"""Text that is nearly right, for parsers: seeded mutations of good texts, and what a parser may make of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

PIECES = ("%", "{", "}", "(", ")", "[", "]", ":", "=", ",", "<", "-", "+", "*", '"', "\\", "nan", "9" * 30, "\n", "\0",
          "é", "@", "1e999", ".", "#", "0x", "0", "-1", "٣", "²", "\ud800", "_", ";", "'", "$", "/*",
          "9" * 5000, "(" * 3000, "[" * 3000, "{" * 3000, "-" * 3000)
"""What is put into a text: marks of all notations, numbers out of any range (Python reads at most 4300 digits), digits
that are no ASCII, half a surrogate, what nests deeper than Python can recurse."""


def mutations(texts: Sequence[str], pieces: Sequence[str] = (), count: int = 1000, seed: int = 20240) -> Iterator[str]:
    """`count` texts, each one of `texts` with one to four changes: a part left out, a piece put in, the end cut off, a
    part of the text said once more elsewhere. pieces: of the notation, beside PIECES."""
    source = random.Random(seed)
    all_pieces = (*PIECES, *pieces)
    for number in range(count):
        text = texts[number % len(texts)]
        for _ in range(source.randint(1, 4)):
            if not text:
                break
            at = source.randrange(len(text))
            action = source.randrange(4)
            if action == 0:
                text = text[:at] + text[at + source.randint(1, 12):]
            elif action == 1:
                text = text[:at] + source.choice(all_pieces) + text[at:]
            elif action == 2:
                # Mostly near the end: what is cut off early is refused early, and all the same.
                text = text[:max(at, source.randrange(len(text)))]
            else:
                other = source.randrange(len(text))
                text = text[:at] + text[other:other + 20] + text[at:]
        yield text


def refusals(texts: Iterator[str], parse: Callable[[str], Any], error: type[Exception] | tuple[type[Exception], ...]
             ) -> list[Exception]:
    """The errors with which a parser refuses some of the texts. Any other exception of it fails, and names the text."""
    found: list[Exception] = []
    for text in texts:
        try:
            parse(text)
        except error as refusal:
            assert str(refusal), f"no message for {text!r}"
            found.append(refusal)
        except Exception as other:
            raise AssertionError(f"{type(other).__name__} instead of an error of its own for {text!r}") from other
    return found
