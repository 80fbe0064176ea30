"""The pages of a cache: which are free, which are used by how many, and what the full ones hold.

In: pages taken, shared and given back. Out: `Pages`. Holds: a page that a sequence may still write has one user; one
that is full is never written, and is found again by its tokens and those before them, as long as no one needs the room.

A full page is a node of a tree: its key is the node of the page before it (0 for none) and its own tokens. One that
nobody uses is idle: it can be found, and the idle one that was given back first is taken when none is empty. What came
behind a page that is gone is not found any more.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..kernels.paged import PAGE

Key = tuple[int, tuple[int, ...]]


class Pages:
    """count: of all pages."""

    def __init__(self, count: int) -> None:
        self._empty = list(range(count))[::-1]
        self._users = [0] * count
        self._idle: dict[int, None] = {}
        self._known: dict[Key, tuple[int, int]] = {}
        self._key_of: dict[int, Key] = {}
        self._nodes = 0

    @property
    def free(self) -> int:
        """Pages that can be taken."""
        return len(self._empty) + len(self._idle)

    def find(self, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """(page, node) of the pages that hold the beginning of these tokens, as many as there are."""
        found: list[tuple[int, int]] = []
        for start in range(0, len(tokens) - PAGE + 1, PAGE):
            one = self._known.get((found[-1][1] if found else 0, tuple(tokens[start : start + PAGE])))
            if one is None:
                break
            found.append(one)
        return found

    def have(self, count: int, shared: Sequence[tuple[int, int]]) -> bool:
        """Whether so many pages can be taken when `shared` are used."""
        return count <= self.free - sum(page in self._idle for page, _ in shared)

    def share(self, page: int) -> None:
        """One user more of a page that was found."""
        self._idle.pop(page, None)
        self._users[page] += 1

    def take(self) -> int:
        """A page to write; there is a free one."""
        if self._empty:
            page = self._empty.pop()
        else:
            page = next(iter(self._idle))
            del self._idle[page]
            del self._known[self._key_of.pop(page)]
        self._users[page] = 1
        return page

    def remember(self, page: int, node: int, tokens: Sequence[int]) -> int:
        """A page is full: its tokens, behind those of `node`. Its own node, or that of a page that holds the same."""
        key = node, tuple(tokens)
        if key not in self._known:
            self._nodes += 1
            self._known[key] = page, self._nodes
            self._key_of[page] = key
        return self._known[key][1]

    def give_back(self, page: int) -> None:
        self._users[page] -= 1
        if self._users[page]:
            return
        if page in self._key_of:
            self._idle[page] = None
        else:
            self._empty.append(page)
