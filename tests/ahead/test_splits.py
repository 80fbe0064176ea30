"""Words of a text: the automata against the regular expression engine of `tokenizers`."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.ahead.errors import AheadError
from sapper.ahead.splits import Splitter, make_splitter
from sapper.models.tokenizer import SPLITS
from tests.strategies.amount import examples

tokenizers = pytest.importorskip("tokenizers")
# Who knows another version of Unicode may see letters where the other one sees nothing yet.
ALPHABET = st.characters(exclude_categories=("Cn", "Cs")) | st.sampled_from(
    "abstrSTREVMld''   \n\n\r\t0123.,!?-_\u00a0\u017f\u00e9\u4e2d\u0660")
PATTERNS = {**SPLITS, "last spaces": (r"\p{L}+", r"\s+$"), "deepseek": (
    r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f]+",
    r"[!-/:-~]?[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")}


@cache
def splitter(name: str) -> Splitter:
    return make_splitter(PATTERNS[name])


def words(patterns: tuple[str, ...], text: str) -> list[str]:
    cut = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in patterns])
    return [word for word, _ in cut.pre_tokenize_str(text)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=examples(60))
@given(text=st.text(ALPHABET, max_size=40))
def test_words_are_those_of_the_tokenizers_library(name: str, text: str) -> None:
    assert splitter(name).split(text) == words(PATTERNS[name], text)


def test_known_words() -> None:
    assert splitter("smollm").split("It's 12  o'clock, \n\n don't!") == [
        "It", "'s", " ", "1", "2", " ", " o", "'", "clock", ",", " \n\n", " don", "'t", "!"]
    assert splitter("llama3").split("I'LL pay 12345 !!\n\nNow") == [
        "I", "'LL", " pay", " ", "123", "45", " !!\n\n", "Now"]


@pytest.mark.parametrize(("pattern", "expected"), [
    ("a*?", "a greedy repetition"), (r"\b", "escaped sign"), ("(a)", "a class or a character"), ("(?:a", "parenthesis"),
    ("[a", "bracket"), ("a{2}", "least,most"), (r"\p{Lu}", "category"), ("(?!ab)", "one class"), ("a)", "the end"),
])
def test_what_patterns_may_not_have(pattern: str, expected: str) -> None:
    with pytest.raises(AheadError, match=expected):
        make_splitter([pattern])
