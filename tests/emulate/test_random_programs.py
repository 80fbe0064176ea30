"""Random programs of branches and loops: every thread computes what it would alone, whatever way the others go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies.amount import examples

from .test_machine import run

# A program is a list of statements on a word w and the lane t: ("add", n), ("mix",), ("if", n, then, else),
# ("loop", n, body): n rounds at most, left early where w is odd; ("vote",): the lanes that are odd, of the whole warp.
SIMPLE = st.one_of(st.tuples(st.just("add"), st.integers(0, 99)), st.tuples(st.just("mix")))
BLOCK = st.recursive(
    st.lists(SIMPLE, max_size=3),
    lambda inner: st.lists(st.one_of(
        SIMPLE, st.tuples(st.just("if"), st.integers(1, 5), inner, inner),
        st.tuples(st.just("loop"), st.integers(1, 4), inner)), max_size=4), max_leaves=8)
PROGRAM = st.lists(st.one_of(st.tuples(st.just("block"), BLOCK), st.tuples(st.just("vote"))), max_size=4)


def emit(statements: Any, labels: Callable[[], str], depth: int = 0) -> str:
    """PTX on %r20 (w); %r30 + depth counts rounds."""
    text = ""
    for statement in statements:
        kind = statement[0]
        if kind == "add":
            text += f" add.u32 %r20, %r20, {statement[1]};\n"
        elif kind == "mix":
            text += " mad.lo.u32 %r20, %r20, 5, %r1;\n and.b32 %r20, %r20, 0xFFFF;\n"
        elif kind == "block":
            text += emit(statement[1], labels)
        elif kind == "vote":
            text += (" and.b32 %r21, %r20, 1;\n setp.ne.u32 %p1, %r21, 0;\n vote.sync.ballot.b32 %r22, %p1, -1;\n"
                     " popc.b32 %r22, %r22;\n add.u32 %r20, %r20, %r22;\n")
        elif kind == "if":
            other, end = labels(), labels()
            text += f" rem.u32 %r21, %r20, {statement[1]};\n setp.ne.u32 %p1, %r21, 0;\n @%p1 bra {other};\n"
            text += emit(statement[2], labels, depth) + f" bra {end};\n{other}:\n"
            text += emit(statement[3], labels, depth) + f"{end}:\n"
        else:
            head, end, count = labels(), labels(), 30 + depth
            text += f" mov.b32 %r{count}, 0;\n{head}:\n and.b32 %r21, %r20, 1;\n setp.ne.u32 %p1, %r21, 0;\n"
            text += f" @%p1 bra {end};\n" + emit(statement[2], labels, depth + 1)
            text += f" add.u32 %r{count}, %r{count}, 1;\n setp.lt.u32 %p1, %r{count}, {statement[1]};\n"
            text += f" @%p1 bra {head};\n{end}:\n"
    return text


def step(statements: Any, word: int, lane: int) -> int:
    for statement in statements:
        kind = statement[0]
        if kind == "add":
            word = (word + statement[1]) & 0xFFFFFFFF
        elif kind == "mix":
            word = (word * 5 + lane) & 0xFFFF
        elif kind == "if":
            word = step(statement[2 if word % statement[1] == 0 else 3], word, lane)
        else:
            for _ in range(statement[1]):
                if word & 1:
                    break
                word = step(statement[2], word, lane)
    return word


@settings(deadline=None, max_examples=examples(60))
@given(program=PROGRAM, lazy=st.booleans())
def test_threads_compute_what_they_would_alone(program: Any, lazy: bool) -> None:
    count = iter(range(1_000_000))
    body = " mov.b32 %r20, %r1;\n" + emit(program, lambda: f"L{next(count)}") + " st.global.u32 [%d2], %r20;"
    words = list(range(64))
    for statement in program:
        if statement[0] == "vote":
            odd = [sum(word & 1 for word in words[first:first + 32]) for first in (0, 32)]
            words = [word + odd[lane // 32] for lane, word in enumerate(words)]
        else:
            words = [step(statement[1], word, lane) for lane, word in enumerate(words)]
    assert run(body, threads=64, lazy=lazy)[:64] == words
