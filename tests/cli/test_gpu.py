"""The commands with a GPU as their target."""

from __future__ import annotations

import pytest

from sapper.cli.app import run


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(list(arguments)) == 0
    return capsys.readouterr().out


def test_asm_prints_ptx(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "asm", "vector_add", "--target", "sm_86")
    assert text.startswith(".version 7.1\n.target sm_86\n") and "ld.global.b32" in text


def test_ir_at_the_machine_is_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    asm = output(capsys, "asm", "softmax", "--target", "sm_80")
    assert output(capsys, "ir", "softmax", "--stage", "machine", "--target", "sm_80") == asm
    assert "sync_lanes" not in output(capsys, "ir", "softmax", "--stage", "simplified", "--target", "sm_80")


def test_check_ends_on_the_emulator(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "check", "vector_add", "--target", "sm_80", "--runs", "4")
    assert "for threads, emulator" in text and "native left out: code for a GPU can't run here" in text


def test_an_unknown_level_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["asm", "vector_add", "--target", "sm_70"]) != 0
    assert "found no target 'sm_70'; expected one of: v3, " in capsys.readouterr().err
