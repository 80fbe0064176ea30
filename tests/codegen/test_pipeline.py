"""All stations in order: the trace, and what holds for every compilation."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from sapper.codegen.pipeline import compile_kernel
from sapper.kernels import find
from sapper.lang.errors import KernelError
from sapper.targets.x86_64.target import TARGETS


def compile_add() -> bytes:
    tensors = dict.fromkeys("abc", "contiguous")
    return compile_kernel(find("vector_add").kernel, {}, tensors, {"N": (2**31 - 1, 1)}, TARGETS["v3"], None).code


PASSES = ["reduce_loops", "canonicalize", "move_as_integers", "lower", "fuse", "expand_math", "expand_float8",
          "split_dots", "split_blocks", "simplify", "allocate"]


def test_trace_to_standard_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("SAPPER_TRACE", raising=False)
    code = compile_add()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("SAPPER_TRACE", "1")
    assert compile_add() == code
    text = capsys.readouterr().err
    heads = [line for line in text.splitlines() if line.startswith("; ")]
    assert heads == [f"; vector_add after {name}" for name in PASSES]
    assert "tile func @vector_add" in text and "lane func @vector_add" in text and "vaddps" in text


def test_trace_to_a_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "trace"
    monkeypatch.setenv("SAPPER_TRACE", str(folder))
    compile_add()
    assert sorted(p.name for p in folder.iterdir()) == [
        f"vector_add.{number:02}.{name}.txt" for number, name in enumerate(PASSES)]
    assert "vaddps" in (folder / f"vector_add.{len(PASSES) - 1:02}.allocate.txt").read_text()


def test_garbage_collection_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_add()
    assert gc.isenabled()

    class Broken:
        def tile_ir(self, static: dict[str, int]) -> None:
            assert not gc.isenabled()
            raise KernelError.__new__(KernelError)

    with pytest.raises(KernelError):
        compile_kernel(Broken(), {}, {}, {}, TARGETS["v3"], None)
    assert gc.isenabled()
    gc.disable()
    try:
        compile_add()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_little_is_left_to_the_garbage_collector() -> None:
    compile_add()       # imports what compiles
    gc.collect()
    gc.disable()
    try:
        compiled = compile_kernel(find("grouped_swiglu_q6k").kernel, {}, {}, {}, TARGETS["zen4"], None)
        left = gc.collect()
    finally:
        gc.enable()
    count = compiled.made.machine.instruction_count()
    assert count > 1000
    assert left < 4 * count, "found IR that refers to itself; expected it to be taken apart when it is done with"
