"""Strings that end a text, however the text is cut."""

import random

import pytest

from sapper.models.errors import ModelError
from sapper.models.stops import StopStrings


def through(strings: list[str], pieces: list[str]) -> tuple[str, bool]:
    stops = StopStrings(strings)
    out = "".join(stops.push(piece) for piece in pieces)
    return out + stops.finish(), stops.met


@pytest.mark.parametrize(("strings", "text", "wanted"), [
    (["\n\n"], "a\nb\n\nc", "a\nb"), (["END", "EN!"], "xEN!END", "x"), ([], "all", "all"), (["aab"], "aaab", "a"),
    (["abc"], "ab", "ab"), (["b", "ab"], "ab", ""), (["é"], "caé", "ca"),
])
def test_every_cut_gives_the_same(strings: list[str], text: str, wanted: str) -> None:
    for seed in range(20):
        draw = random.Random(seed)
        pieces, rest = [], text
        while rest:
            size = draw.randint(1, 3)
            pieces.append(rest[:size])
            rest = rest[size:]
        found, met = through(strings, pieces)
        met_wanted = any(string in text for string in strings)
        assert met == met_wanted
        assert found == wanted or (strings == ["b", "ab"] and found == "")


def test_what_cannot_be_a_stop_is_not_held() -> None:
    stops = StopStrings(["STOP"])
    assert stops.push("abcS") == "abc" and stops.push("x") == "Sx" and not stops.met
    assert stops.push("STO") == "" and stops.push("P!") == "" and stops.met and stops.push("more") == ""


def test_an_empty_string_is_refused() -> None:
    with pytest.raises(ModelError, match="one character at least"):
        StopStrings(["a", ""])
