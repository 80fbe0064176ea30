"""Which tokens of a step attend together: all are in the order once, runs are as long as they can be, and find their
pages."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sapper.kernels.paged import PAGE
from sapper.models.runs import Runs, pages_for

CHUNK, CONTEXT, SHORTEST = 64, 4 * PAGE, 5
Piece = tuple[int, int, int]
PIECES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, CONTEXT - 40), st.integers(1, 40)), min_size=1,
                  max_size=8)


@given(PIECES)
def test_runs_are_what_stands_one_behind_the_other(steps: list[Piece]) -> None:
    tokens = [(slot, at) for slot, start, count in steps for at in range(start, start + count)][:CHUNK]
    slots, positions = np.array(tokens, np.int32).T
    table = np.arange(16, dtype=np.int32).reshape(4, 4) + 100
    runs = Runs(CHUNK, CONTEXT, SHORTEST)
    order, values = runs.arrange(slots, positions, table)
    assert sorted(order) == list(range(len(tokens)))
    start, count, position, base = (rows.array[: values["runs"]].tolist() for rows in runs.operands)
    page = runs.page.array[: values["pages"]].tolist()
    ordered = [tokens[row] for row in order]
    at, filled = values["loose"], 0
    for first, length, place, begin in zip(start, count, position, base, strict=True):
        slot = ordered[first][0]
        assert first == at and length >= SHORTEST and begin == filled * PAGE
        assert ordered[first : first + length] == [(slot, place + i) for i in range(length)]
        pages = pages_for(place + length)
        assert page[filled : filled + pages] == table[slot, :pages].tolist()
        at, filled = at + length, filled + pages
    assert at == len(tokens) and filled == values["pages"] <= runs.room
    alone = order[: values["loose"]]
    assert (np.diff(alone) > 0).all()
    if filled + pages_for(CONTEXT) <= runs.room:  # None was left alone for want of room.
        joined = [row for row in range(len(tokens)) if row and tokens[row] == (slots[row - 1], positions[row - 1] + 1)]
        longest = 1
        for row in range(1, len(tokens)):
            longest = longest + 1 if row in joined and row in alone and row - 1 in alone else 1
            assert longest < SHORTEST


def test_what_finds_no_room_attends_alone() -> None:
    runs = Runs(CHUNK, CONTEXT, SHORTEST)
    deep = CONTEXT - 10
    tokens = [(slot, deep + i) for slot in range(3) for i in range(10)]
    slots, positions = np.array(tokens, np.int32).T
    order, values = runs.arrange(slots, positions, np.zeros((3, 4), np.int32))
    assert values == {"loose": 20, "runs": 1, "pages": 4} and runs.room == 5
    assert order.tolist() == [*range(10, 30), *range(10)]
