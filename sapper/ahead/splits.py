"""The patterns that cut text into words, as tables that a few instructions can walk.

Enters: regular expressions as tokenizers have them. Leaves: a `Splitter`: classes of characters, and for each pattern
an automaton. Holds: its matches are those of a backtracking engine: alternatives in their order, repetition greedy.

A state stands for an ordered list of places in the pattern (R. Cox, "Regular expression matching: the virtual machine
approach", 2009): behind a place that matches, none of lower rank is followed. A transition says, besides the next
state, whether a match ends before the character that is looked at; so `(?!\\S)`, which looks one character ahead,
needs no more than that.
Syntax: alternatives, (?:), (?i:), (?!class), classes, \\p{L}, \\p{N}, \\s, \\S, \\r, \\n, $, ? * + {m,n}.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from .errors import AheadError

Array = np.ndarray[Any, np.dtype[Any]]
CODE_POINTS = 0x110000
MATCH = 0x8000
"""Of a transition: a match ends before the character."""
DEAD = 0x7FFF
SPACES = (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
"""White_Space of the Unicode Character Database, PropList.txt."""
FIRST_SPACE = r"(?<!\s)"
"""Before a run of spaces it changes nothing: who looks from the left finds the run at its first one."""
_OTHER_CASES = {"s": "\u017f", "k": "\u212a"}
_ESCAPES = {"r": "\r", "n": "\n", "t": "\t"}


@cache
def _categories() -> Array:
    """The first letter of each code point's general category."""
    return np.frombuffer("".join(unicodedata.category(chr(c))[0] for c in range(CODE_POINTS)).encode(), np.uint8)


def _of(characters: Iterable[int]) -> Array:
    members = np.zeros(CODE_POINTS, bool)
    members[list(characters)] = True
    return members


def _property(name: str) -> Array:
    return np.equal(_categories(), ord(name))


@dataclass(slots=True)
class _Program:
    """The pattern as instructions: ("set", n), ("not", n), ("split", a, b), ("match",); sets: characters by number."""

    sets: list[Array]
    code: list[tuple[Any, ...]] = field(default_factory=list)

    def number(self, members: Array) -> int:
        for i, known in enumerate(self.sets):
            if np.array_equal(known, members):
                return i
        self.sets.append(members)
        return len(self.sets) - 1


class _Parser:
    """One pattern. A piece of code is a list of instructions with targets relative to themselves."""

    def __init__(self, pattern: str, program: _Program) -> None:
        self.pattern = pattern
        self.at = 0
        self.program = program
        self.folds = False

    def fail(self, expected: str) -> AheadError:
        return AheadError(f"the pattern {self.pattern!r}, character {self.at}", repr(self.pattern[self.at:self.at + 8]),
                          expected, "take another tokenizer, or teach sapper/ahead/splits.py")

    def take(self, text: str) -> bool:
        if self.pattern.startswith(text, self.at):
            self.at += len(text)
            return True
        return False

    def whole(self) -> list[tuple[Any, ...]]:
        if self.pattern.startswith(FIRST_SPACE + r"\s+"):
            self.at = len(FIRST_SPACE)
        code = self.alternatives()
        if self.at != len(self.pattern):
            raise self.fail("the end of the pattern")
        return [*code, ("match",)]

    def alternatives(self) -> list[tuple[Any, ...]]:
        first = self.sequence()
        if not self.take("|"):
            return first
        rest = self.alternatives()
        return [("split", 1, len(first) + 2), *first, ("jump", len(rest) + 1), *rest]

    def sequence(self) -> list[tuple[Any, ...]]:
        code: list[tuple[Any, ...]] = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            code += self.repeated(self.atom())
        return code

    def repeated(self, code: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        if self.take("*"):
            made = [("split", 1, len(code) + 2), *code, ("jump", -len(code) - 1)]
        elif self.take("+"):
            made = [*code, ("split", -len(code), 1)]
        elif self.take("?"):
            made = [("split", 1, len(code) + 1), *code]
        elif self.take("{"):
            inside, _, _ = self.pattern[self.at:].partition("}")
            low, _, high = inside.partition(",")
            if not low.isdigit() or not high.isdigit():
                raise self.fail("{least,most}")
            self.at += len(inside) + 1
            made = code * int(low)
            for _ in range(int(high) - int(low)):
                made = [*made, ("split", 1, len(code) + 1), *code]
            # Where an optional one is left out the next is tried too, which the greedy order never prefers.
        else:
            return code
        if self.at < len(self.pattern) and self.pattern[self.at] in "?+*":
            raise self.fail("a greedy repetition")
        return made

    def atom(self) -> list[tuple[Any, ...]]:
        if self.take("$"):  # before the end of a line
            return [("not", self.program.number(~_of((ord("\n"),))))]
        if self.take("(?!"):
            members = self.characters()
            if not self.take(")"):
                raise self.fail("one class inside (?!")
            return [("not", self.program.number(members))]
        before = self.folds
        if self.take("(?i:"):
            self.folds = True
        elif not self.take("(?:"):
            return [("set", self.program.number(self.characters()))]
        code = self.alternatives()
        if not self.take(")"):
            raise self.fail("a closing parenthesis")
        self.folds = before
        return code

    def characters(self) -> Array:
        """A class, an escape or a plain character."""
        if self.take("["):
            inverted = self.take("^")
            members = np.zeros(CODE_POINTS, bool)
            while not self.take("]"):
                if self.at >= len(self.pattern):
                    raise self.fail("a closing bracket")
                part = self.one()
                following = self.pattern[self.at + 1:self.at + 2]
                if isinstance(part, str) and following != "]" and self.take("-"):
                    last = self.one()
                    if not isinstance(last, str):
                        raise self.fail("a range of characters")
                    members |= _of(range(ord(part), ord(last) + 1))
                else:
                    members |= self.members(part)
            return ~members if inverted else members
        if self.pattern[self.at] in "()*+?{}]^.":
            raise self.fail("a class or a character")
        return self.members(self.one())

    def one(self) -> str | Array:
        """A character, or what an escape stands for."""
        if not self.take("\\"):
            self.at += 1
            return self.pattern[self.at - 1]
        letter = self.pattern[self.at:self.at + 1]
        self.at += 1
        if letter in "sS":
            spaces = _of(SPACES)
            return spaces if letter == "s" else ~spaces
        if letter in "pP":
            for name in "LNPSMZC":
                if self.take(f"{{{name}}}"):
                    return _property(name) if letter == "p" else ~_property(name)
            raise self.fail(r"\p{L}, \p{N} or another category of one letter")
        if letter in _ESCAPES:
            return _ESCAPES[letter]
        if not letter or letter.isalnum():
            self.at -= 1
            raise self.fail(r"\s, \S, \p{..}, \r, \n, \t or an escaped sign")
        return letter

    def members(self, part: str | Array) -> Array:
        if not isinstance(part, str):
            return part
        cases = {part, part.lower(), part.upper(), *_OTHER_CASES.get(part.lower(), "")} if self.folds else {part}
        return _of(ord(c) for c in cases if len(c) == 1)


@dataclass(frozen=True, slots=True)
class Splitter:
    """starts, classes: the class of a code point is that of the last range that starts at or before it. count: classes,
    of which the last stands for the end of the text. tables: of each pattern, [states, count] of u16: next state, or
    DEAD, with MATCH where a match ends before the character; it starts in state 0.
    """

    starts: Array
    classes: Array
    count: int
    tables: tuple[Array, ...]

    def split(self, text: str) -> list[str]:
        """The words of a text: what the machine code of words_code.py does, for its tests."""
        words = [text] if text else []
        for table in self.tables:
            words = [piece for word in words for piece in self._pieces(table, word)]
        return words

    def _pieces(self, table: Array, word: str) -> list[str]:
        numbers = [int(self.classes[np.searchsorted(self.starts, ord(c), "right") - 1]) for c in word]
        numbers.append(self.count - 1)
        pieces, here, gap = [], 0, 0
        while here < len(word):
            state, end = 0, here
            for at in range(here, len(numbers)):
                found = int(table[state, numbers[at]])
                if found & MATCH:
                    end = at
                state = found & DEAD
                if state == DEAD:
                    break
            if end == here:
                here += 1
                continue
            pieces += [piece for piece in (word[gap:here], word[here:end]) if piece]
            here = gap = end
        return [*pieces, word[gap:]] if gap < len(word) else pieces


def make_splitter(patterns: Sequence[str]) -> Splitter:
    """Each pattern cuts the pieces that the one before left; what lies between matches is a piece too.

    Raises AheadError for what the patterns may not have.
    """
    program = _Program([])
    codes = [_Parser(pattern, program).whole() for pattern in patterns]
    signature = np.zeros(CODE_POINTS, np.int64)
    for i, members in enumerate(program.sets):
        signature |= members.astype(np.int64) << i
    kinds, classes = np.unique(signature, return_inverse=True)
    starts = np.flatnonzero(np.diff(classes, prepend=-1))
    inside = [[bool(kind >> i & 1) for kind in kinds] + [False] for i in range(len(program.sets))]
    tables = tuple(_automaton(code, inside, len(kinds) + 1) for code in codes)
    return Splitter(starts.astype(np.uint32), classes[starts].astype(np.uint8), len(kinds) + 1, tables)


def _automaton(code: Sequence[tuple[Any, ...]], inside: Sequence[Sequence[bool]], count: int) -> Array:
    """inside: for each set, whether it has the characters of each class; the last class, the end, is in none."""
    states: dict[tuple[int, ...], int] = {(0,): 0}
    rows: list[list[int]] = []
    pending: list[tuple[int, ...]] = [(0,)]
    while pending:
        seeds = pending.pop(0)
        row = []
        for kind in range(count):
            following: list[int] = []
            matched = _follow(code, inside, seeds, kind, following)
            target = DEAD
            if following:
                key = tuple(dict.fromkeys(following))
                if key not in states:
                    states[key] = len(states)
                    pending.append(key)
                target = states[key]
            row.append(target | (MATCH if matched else 0))
        rows.append(row)
    if len(states) >= DEAD:
        raise AheadError("the patterns", f"{len(states)} states", f"fewer than {DEAD}")
    return np.array(rows, np.uint16)


def _follow(code: Sequence[tuple[Any, ...]], inside: Sequence[Sequence[bool]], seeds: Sequence[int], kind: int,
            following: list[int]) -> bool:
    """From the places `seeds`, in order, with a character of a class ahead: the places behind it, and whether the match
    ends before it (then what has lower rank is cut off)."""
    seen: set[int] = set()
    waiting = list(reversed(seeds))
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        op, *operands = code[place]
        if op == "match":
            return True
        if op == "set":
            if inside[operands[0]][kind]:
                following.append(place + 1)
        elif op == "not":
            if not inside[operands[0]][kind]:
                waiting.append(place + 1)
        elif op == "jump":
            waiting.append(place + operands[0])
        else:
            waiting += [place + operands[1], place + operands[0]]
    return False
