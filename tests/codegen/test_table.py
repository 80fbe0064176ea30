"""Constant tables: the bytes are those that GNU as makes of the text."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from sapper.codegen.encode import encode
from sapper.codegen.listing import Listing
from sapper.codegen.machine import MachineFunction
from sapper.codegen.object import Part, write_object
from sapper.codegen.print import print_file
from sapper.codegen.table import Line, Table


def function(name: str) -> MachineFunction:
    emit = Listing()
    emit("ret")
    return MachineFunction(name, emit.body, {})


@pytest.mark.skipif(shutil.which("as") is None, reason="GNU as is not installed")
def test_bytes_and_text_agree(tmp_path: Path) -> None:
    table = Table("numbers", [
        Line(comment="a heading"), Line(4, ["last", -1, 2**32 - 1, "first", "numbers"], "functions by their distance"),
        Line(8, [1, -(2**63)], "", {0: "ONE"}), Line(), Line(1, [0, 255, -128]),
    ], {"ONE": 1})
    items = [(function("first"), True), (table, False), (function("last"), True)]
    text = print_file(items, {}, notes={"numbers": ["what it is"], "": ["the file"]})
    assert text.startswith("\n# the file\n.intel_syntax") and "# what it is\n.balign 16" in text
    assert ".quad ONE, -9223372036854775808" in text and "# a heading" in text
    (tmp_path / "t.s").write_text(text)
    subprocess.run(["as", "t.s", "-o", "as.o"], cwd=tmp_path, check=True)
    parts = [Part(i.name, i.encoded() if isinstance(i, Table) else encode(i), e) for i, e in items]
    (tmp_path / "own.o").write_bytes(write_object(parts))
    for name in ("as", "own"):
        copy = ["objcopy", "-O", "binary", "-j", ".text", f"{name}.o", f"{name}.text"]
        subprocess.run(copy, cwd=tmp_path, check=True)
    assert (tmp_path / "as.text").read_bytes() == (tmp_path / "own.text").read_bytes()


def test_a_name_takes_four_bytes() -> None:
    with pytest.raises(ValueError, match="found other in 8 bytes; expected 4"):
        Table("numbers", [Line(8, ["other"])]).encoded()
