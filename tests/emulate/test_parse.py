"""PTX text that is nearly right: the parser's own errors, with the line."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sapper.emulate import EmulationError, ParseError, Uninitialised, load
from tests.strategies.malformed import mutations, refusals

DATA = Path(__file__).parent / "data"
FILES = ("add", "nvcc_bulk_sm_90", "nvcc_reduce_sm_80", "triton_scan_sm80", "nvcc_cluster_sm_90")
ADD = (DATA / "add.ptx").read_text(encoding="utf-8")


@pytest.mark.parametrize(("good", "bad", "told"), [
    (".version 7.0", ".version seven", "expected a version"),
    (".reg .f32 %f<4>", ".reg .f32 %f<4000000>", "found 4000000 registers %f, expected at most"),
    (".reg .f32 %f<4>", ".reg .lo %f<4>", "found '.lo', expected the type of registers"),
    (".reg .f32 %f<4>", ".reg .f32 <4>", "found '<', expected a name"),
    (".reg .f32 %f<4>", ".reg .f32 %f<08>", "found '08>;"),
    (".reg .f32 %f<4>", ".shared .b8 big[9999999999]", "found big of 9999999999 bytes, expected at most"),
    (".reg .f32 %f<4>", ".global .none x = {1}", "found the type 'none' of a variable"),
    (".reg .f32 %f<4>", ".reg .f32 %f<" + "9" * 5000 + ">", "9', expected PTX"),
    ("[%rd5]", "[[%rd5]]", "an address in an address"),
    ("[%rd5]", "{{%rd5}}", "expected a part of a vector"),
    ("ld.global.f32 %f1, [%rd5];", "ld.global.f32 %f1, [%rd5 + ];", "found ']', expected a number"),
    ("@%p1", "@!!%p1", "expected a predicate"),
])
def test_errors(good: str, bad: str, told: str) -> None:
    assert ADD.count(good)
    with pytest.raises(ParseError, match=r"^line \d+: ") as caught:
        load(ADD.replace(good, bad, 1))
    assert told in str(caught.value)


def test_a_text_that_ends_anywhere_is_refused_there() -> None:
    body = ADD.index("{")
    for end in range(body, ADD.rindex("}")):
        with pytest.raises(ParseError):
            load(ADD[:end])


def test_a_thousand_malformed_texts() -> None:
    """Each is a module, or is refused."""
    texts = [(DATA / f"{name}.ptx").read_text(encoding="utf-8") for name in FILES]
    pieces = (".reg .b32 %r1;", "%r1", ".version", ".target", ".b32", ".entry", " bra ", ".section", "@%p1",
              "0f3f80000", "mov.u32 ", ".shared .b8 x[", " = {1, {2}}", "~")
    found = refusals(mutations(texts, pieces), load, EmulationError)
    assert 800 < len(found) < 1000


def exchanged(text: str, count: int) -> Iterator[str]:
    """Texts in which one word is another word of its kind: nearly half of them still parse."""
    source = random.Random(4)
    words = list(re.finditer(r"%\w+(?:\.\w)?|\.\w+|\w+|\S", text))
    more = {"number": ["4294967295", "0", "1048576"], ".": [".s8", ".f64", ".u16", ".pred", ".v2", ".b128", ".shared"]}

    def kind(word: str) -> str:
        if word[0] in "%.":
            return word[0]
        return "number" if word[0].isdigit() else "name" if word.isidentifier() else "mark"

    for _ in range(count):
        word = source.choice(words)
        same = [other.group() for other in words if kind(other.group()) == kind(word.group())]
        yield text[:word.start()] + source.choice(same + more.get(kind(word.group()), [])) + text[word.end():]


def test_wrong_programs_run_or_are_refused() -> None:
    """What the emulator is given may do anything: what it does wrong is told as the emulator's own error."""
    def launch(text: str) -> None:
        x, y, z = np.ones(40, np.float32), np.ones(40, np.float32), np.zeros(40, np.float32)
        with np.errstate(all="ignore"):
            load(text).launch(grid=(2,), block=(32,), arguments=[x, y, Uninitialised(z), np.uint32(40)])

    found = refusals(exchanged(ADD, 1000), launch, EmulationError)
    assert 500 < len(found) < 950
    assert sum(not isinstance(error, ParseError) for error in found) > 100, "wrong programs must be run, too"
