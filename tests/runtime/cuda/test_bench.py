"""bench/gpu.py on the emulated driver: every case is made, launched and checked, and a wrong kernel is told."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .emulated_driver import EmulatedDriver

SCRIPT = Path(__file__).parents[3] / "bench" / "gpu.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found = runpy.run_path(str(SCRIPT), run_name="gpu")
    shared = found["main"].__globals__
    monkeypatch.setitem(shared, "ROUNDS", 2)
    monkeypatch.setitem(shared, "SAMPLE_SECONDS", 0.0)
    return shared


@pytest.mark.parametrize("case", ["matmul bf16", "matmul fp8", "attention", "norm"])
def test_cases_are_right(device: EmulatedDriver, script: dict[str, Any], case: str,
                         capsys: pytest.CaptureFixture[str]) -> None:
    assert script["main"](["--quick", "--case", case]) == 0
    printed = capsys.readouterr().out
    assert "| sapper | " in printed and "WRONG" not in printed
    if case == "norm":
        assert "x copy" in printed


def test_a_wrong_result_is_not_timed(device: EmulatedDriver, script: dict[str, Any],
                                     capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = script["sp"].prepare
    monkeypatch.setattr(script["sp"], "prepare", lambda kernel, x, y, out: prepared(kernel, y, x, out))
    assert script["main"](["--quick", "--case", "matmul bf16"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG: differs by" in printed and "TFLOP/s" not in printed
