"""The tile IR of a kernel is made anew for each who asks, from what was kept."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sapper.kernels
from sapper import KernelError, Tensor, dims, f32, kernel, tiles
from sapper.ir.kept import Kept
from sapper.ir.text import print_function
from sapper.ir.verifier import verify
from sapper.lang import kernel as module
from sapper.lang.frontend import build
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS

N = dims("N")
factor = 2.0


@kernel
def scaled(x: Tensor[f32, N], y: Tensor[f32, N]):
    for i in tiles(N):
        y[i] = x[i] * factor


def test_what_is_kept_is_the_function() -> None:
    """Of every eighth kernel of the library, with one that may have the same memory for two tensors."""
    entries = sapper.kernels.library()
    for entry in [*entries[::8], next(entry for entry in entries if entry.kernel.options.get("in_place"))]:
        function = build(entry.kernel, {})
        before = print_function(function)
        kept = Kept(function)
        function.take_apart()
        one, other = kept.made(), kept.made()
        verify(one, TILE_OPS)
        assert print_function(one) == print_function(other) == before
        assert (one.body.same is None) is not bool(entry.kernel.options.get("in_place"))
        one.attributes["dims"].append("more")
        one.take_apart()
        assert print_function(other) == print_function(kept.made()) == before


def test_it_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled.tile_ir()
    scaled.tile_ir({"N": 4})
    monkeypatch.setattr("sapper.lang.frontend.build", lambda *_: pytest.fail("the source was read again"))
    assert scaled.tile_ir() is not scaled.tile_ir()
    assert scaled.tile_ir().attributes["dims"] == ["N"] and scaled.tile_ir({"N": 4}).attributes["dims"] == []


MODULE = """
from sapper import Tensor, dims, f32, kernel, tiles

N = dims("N")


def inlined(t):
    return t + {added}


@kernel
def scaled(x: Tensor[f32, N], y: Tensor[f32, N]):
    for i in tiles(N):
        y[i] = inlined(x[i] * {factor})
"""


def test_files_that_are_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a program runs: a kernel is what was imported, and never what its file holds by now."""
    file = tmp_path / "edited_kernels.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    written = iter(range(1, 100))

    def write(factor: float, added: float, above: str = "") -> None:
        file.write_text(above + MODULE.format(factor=factor, added=added))
        os.utime(file, ns=(0, 10**9 * next(written)))  # the clock of files is coarse

    def results(kernel: Any) -> list[float]:
        arguments = {"x": np.float32([1, 2]), "y": np.zeros(2, np.float32)}
        interpret(kernel.tile_ir(), arguments)
        return arguments["y"].tolist()

    write(2.0, 0.5)
    edited = importlib.import_module("edited_kernels")
    write(3.0, 0.5)
    with pytest.raises(KernelError, match="the source of scaled has changed since it was read"):
        results(edited.scaled)
    write(2.0, 0.7)
    with pytest.raises(KernelError, match="the source of inlined has changed since it was read"):
        results(edited.scaled)
    write(2.0, 0.5, "# lines above\n\n")
    assert results(edited.scaled) == [2.5, 4.5]
    for factor in (5.0, 6.0):
        write(factor, 0.5)
        importlib.reload(edited)
        assert results(edited.scaled) == [factor + 0.5, 2 * factor + 0.5]


def test_what_it_closes_over_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (2.0, 3.0, 2.0):
        monkeypatch.setitem(globals(), "factor", value)
        arguments = {"x": np.float32([1, 2]), "y": np.zeros(2, np.float32)}
        interpret(scaled.tile_ir(), arguments)
        assert arguments["y"].tolist() == [value, 2 * value]


def test_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_IRS", 2)
    for extent in (1, 2, 3):
        scaled.tile_ir({"N": extent})
    assert [key[1:] for key in module._kept] == [(("N", 2),), (("N", 3),)]
