"""A byte-level vocabulary as tables, so that machine code can turn text into tokens and tokens into text.

Enters: a `Vocabulary`. Leaves: a `Tables`: bytes that lie behind the weights in their file, and where each table is in
them. Holds: the tables are read as they lie; words_code.py has the code.

    byte tokens  u32 [256]                  the token of each byte, ~0 for none
    text ends    u32 [vocabulary + 1]       token t is the bytes from ends[t] to ends[t + 1] of `texts`
    merges       (u64 pair, u64 made)[2^k]  left << 32 | right -> rank << 32 | token; a hash table, empty pairs are ~0
    words        u32 [count]                tokens in the order of their bytes, where a word may be a token as a whole
    starts, classes, patterns               the automata of splits.py
    frame        the tokens and the text around a user's message, and the tokens that end an answer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .splits import Splitter, make_splitter

ALIGN_BYTES = 64
HASH = 0x9E3779B97F4A7C15
"""A pair's place in the hash table is the high bits of its product with this (Knuth's multiplicative hashing)."""
BYTES_OF_A_TOKEN = 16
"""A text has room for so many bytes for each token of the context, four times as many as usual."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around a user's message: tokens, text that is encoded with it, and the same behind it. trims: whether
    the message loses the white space at its ends."""

    prefix: Sequence[int] = ()
    before: bytes = b""
    after: bytes = b""
    suffix: Sequence[int] = ()
    trims: bool = False


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A byte-level BPE vocabulary.

    texts: bytes of each token, none for those that stand for no text. byte_tokens: token of each byte, or None: such a
    byte is left out. merges:
    (left, right, made), the first to be merged first. patterns: what cuts text into words (splits.py). whole_words:
    tokens that a word may be as a whole, whatever the merges say. begin: tokens in front of a raw text. stops: tokens
    that end an answer.
    """

    texts: Sequence[bytes]
    byte_tokens: Sequence[int | None]
    merges: Sequence[tuple[int, int, int]]
    patterns: Sequence[str]
    whole_words: Sequence[int] = ()
    begin: Sequence[int] = ()
    stops: Sequence[int] = ()
    frame: Frame = Frame()


@dataclass(slots=True)
class Tables:
    """content: bytes. places: name -> offset in them. numbers: what the code has to know besides."""

    content: bytearray = field(default_factory=bytearray)
    places: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    pattern_count: int = 0

    def add(self, name: str, values: Any, dtype: Any = np.uint32) -> None:
        self.content += bytes(-len(self.content) % ALIGN_BYTES)
        self.places[name] = len(self.content)
        self.content += values if isinstance(values, bytes) else np.asarray(values, dtype).tobytes()


def make_tables(vocabulary: Vocabulary) -> Tables:
    """Raises AheadError for patterns that splits.py does not take."""
    splitter: Splitter = make_splitter(vocabulary.patterns)
    frame = vocabulary.frame
    tables = Tables(pattern_count=len(splitter.tables))
    tables.add("byte_tokens", [0xFFFFFFFF if token is None else token for token in vocabulary.byte_tokens])
    tables.add("text_ends", np.cumsum([0, *map(len, vocabulary.texts)]))
    tables.add("texts", b"".join(vocabulary.texts))
    merges, bits = hash_table({left << 32 | right: rank << 32 | made
                               for rank, (left, right, made) in enumerate(vocabulary.merges)})
    tables.add("merges", merges, np.uint64)
    words = sorted(vocabulary.whole_words, key=lambda token: vocabulary.texts[token])
    tables.add("words", words)
    tables.add("starts", splitter.starts)
    tables.add("classes", splitter.classes, np.uint8)
    for number, table in enumerate(splitter.tables):
        tables.add(f"pattern{number}", table, np.uint16)
    tables.add("begin", vocabulary.begin)
    tables.add("prefix", frame.prefix)
    tables.add("before", frame.before)
    tables.add("after", frame.after)
    tables.add("suffix", frame.suffix)
    tables.add("stops", vocabulary.stops)
    tables.content += bytes(-len(tables.content) % 4096)
    tables.numbers = {
        "merge_shift": 64 - bits, "merge_mask": (1 << bits) - 1, "word_count": len(words),
        "range_count": len(splitter.starts), "class_count": splitter.count, "begin_count": len(vocabulary.begin),
        "prefix_count": len(frame.prefix), "before_bytes": len(frame.before), "after_bytes": len(frame.after),
        "suffix_count": len(frame.suffix), "stop_count": len(vocabulary.stops), "trims": int(frame.trims),
    }
    return tables


def hash_table(entries: Mapping[int, int]) -> tuple[Any, int]:
    """(keys and values in turn, bits of the size): at most half full; what finds its place taken is in the next one."""
    bits = max(1, (2 * len(entries)).bit_length())
    table = np.full((1 << bits, 2), 2**64 - 1, np.uint64)
    taken = [False] * (1 << bits)
    for key, value in entries.items():
        place = (key * HASH & 2**64 - 1) >> 64 - bits
        while taken[place]:
            place = (place + 1) & (1 << bits) - 1
        taken[place] = True
        table[place] = key, value
    return table, bits
