"""Drawn tokens of a library: the random numbers of a seed, the settings that it takes, the tokens of a session."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapper.ahead.draw import MAX_TEMPERATURE
from sapper.ahead.draws import Draws
from sapper.models.errors import ModelError
from sapper.models.generate import Generation
from sapper.models.load import load_model
from sapper.models.sampling import CANDIDATES, Sampling
from tests.codegen.run_native import RUNNABLE
from tests.models.small import random_weights, write_gguf

from .built import build

PROMPT, BAD_SAMPLING = [5, 17, 200], 11
needs_cpu = pytest.mark.skipif(not RUNNABLE, reason="this CPU runs no kernels")


def test_random_numbers_are_those_of_splitmix64() -> None:
    """The first outputs for seed 1234567, as https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64 has them."""
    known = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821)
    draws = Draws(1234567)
    assert [draws.random() for _ in known] == [(number >> 40) / 2**24 for number in known]
    state, first = draws.state, draws.random()
    draws.state = state
    assert draws.random() == first
    assert Draws(-1).random() == Draws(2**64 - 1).random(), "a seed counts modulo 2^64"


class How(ctypes.Structure):
    _fields_ = (("temperature", ctypes.c_float), ("top_k", ctypes.c_int32), ("top_p", ctypes.c_float),
                ("min_p", ctypes.c_float), ("seed", ctypes.c_uint64))


class Library:
    """A model opened in this process."""

    def __init__(self, path: Path) -> None:
        self._code = ctypes.CDLL(str(path))
        self._model = ctypes.c_void_p()
        assert self("open", str(path.with_suffix(".weights")).encode(), ctypes.c_int64(2), ctypes.byref(self._model),
                    own=False) == 0

    def __call__(self, name: str, *arguments: Any, own: bool = True) -> int:
        return int(getattr(self._code, f"model_{name}")(*([self._model] if own else []), *arguments))

    def sampling(self, how: Sampling) -> int:
        return self("sampling", ctypes.byref(How(how.temperature, how.top_k, how.top_p, how.min_p, how.seed)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("draw") / "small.gguf", random_weights(seed=3))


@pytest.fixture(scope="module")
def library(checkpoint: Path) -> Iterator[Library]:
    build(checkpoint, checkpoint.with_name("model.so"))
    found = Library(checkpoint.with_name("model.so"))
    yield found
    found("close")


@needs_cpu
def test_tokens_are_those_of_a_generation(checkpoint: Path, library: Library) -> None:
    model = load_model(checkpoint)
    for how in (Sampling(1.5, 30, 0.95, 0.01, 7), Sampling(0.0), Sampling(3.0, CANDIDATES, seed=2**63 + 5)):
        wanted = Generation(model, PROMPT, 12, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p,
                            min_p=how.min_p, seed=how.seed)
        list(wanted)
        assert library("rewind", ctypes.c_int64(0)) == library.sampling(how) == 0
        assert library("prefill", (ctypes.c_int32 * 3)(*PROMPT), ctypes.c_int64(3)) == 0
        tokens = []
        for _ in wanted.tokens:
            tokens.append(library("pick"))
            assert library("step", tokens[-1]) == 0
        assert tokens == wanted.tokens
    assert library("sampling", None) == 0
    assert library("pick") == library("likeliest")


NUMBERS = st.one_of(st.sampled_from([0.0, 1.0, -1.0, MAX_TEMPERATURE, 2 * MAX_TEMPERATURE, float("nan"), float("inf")]),
                    st.floats(-2.0, 2.0, width=32))


@needs_cpu
@given(st.builds(Sampling, NUMBERS, st.integers(-2, CANDIDATES + 2), NUMBERS, NUMBERS))
def test_settings_out_of_range_are_refused(library: Library, how: Sampling) -> None:
    """As in Python; what has a sign bit is negative here."""
    try:
        how.check()
        refused = how.top_k > CANDIDATES
    except ModelError:
        refused = True
    if not any(str(value) == "-0.0" for value in (how.temperature, how.top_p, how.min_p)):
        assert library.sampling(how) == (BAD_SAMPLING if refused else 0)
