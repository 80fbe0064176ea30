"""The commands with a GPU as their target."""

from __future__ import annotations

import json

import pytest

from sapper.cli.app import run
from sapper.targets.ptx import assembler


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


needs_ptxas = pytest.mark.skipif(assembler.find_tool("ptxas") is None, reason="ptxas is not installed")


@needs_ptxas
def test_port_lists_registers_and_spills(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(output(capsys, "port", "softmax", "--target", "sm_80", "--target", "sm_90a", "--json"))
    assert [(row["target"], row["how"], row["spills"]) for row in rows] == [("sm_80", "generated", 0),
                                                                           ("sm_90a", "generated", 0)]
    assert all(16 < row["assembled"]["registers"] <= 255 for row in rows)
    assert all(row["cost"]["bound"] in ("issue", "fp32") and row["cost"]["cycles"] > 4 for row in rows)
    assert "ptxas" in rows[0]["assembled"]["assembler"]
    assert str(rows[0]["assembled"]["registers"]) in output(capsys, "port", "softmax", "--target", "sm_80")


def test_port_without_an_assembler(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembler, "find_tool", lambda name: None)
    text = output(capsys, "port", "vector_add", "--target", "sm_80")
    assert "generated" in text and "registers are not known: found no ptxas; expected it on the path" in text
    (row,) = json.loads(output(capsys, "port", "vector_add", "--target", "sm_80", "--json"))
    cost = row["cost"]
    adds = cost["operations"] // 32  # a warp's
    assert adds > 0 and cost["loaded_bytes"] == 2 * cost["stored_bytes"] == 8 * 32 * adds
    assert cost["cycles"] >= 3 * adds and cost["bound"] == "memory"  # two loads and a store
    assert "cycles: a lower bound for one pass of the hottest loop (on a GPU of one warp, of a whole SM)" in text


def test_port_finds_the_loop_of_the_product(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(output(capsys, "port", "matmul_nn_f32", "--target", "sm_80", "--target", "sm_90a", "--json"))
    assert all(row["cost"]["operations"] > 10_000 for row in rows)


def test_explain_outlines_the_loops(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    call = ("softmax", "--target", "sm_80", "--dims", "M=512,N=512")
    facts = json.loads(output(capsys, "explain", *call, "--json"))
    hottest = next(loop for loop in facts["loops"] if loop["hottest"])
    inside = [row["text"] for row in facts["rows"] if hottest["first"] <= row["place"] <= hottest["last"]]
    assert hottest["innermost"] and hottest["depth"] == 3 and len(inside) == hottest["instructions"]
    assert sum(text.startswith("fma.rn.f32 ") for text in inside) == hottest["opcodes"]["fma.rn.f32"] > 0
    assert inside[-1].endswith(f"{hottest['label']};")
    asm = output(capsys, "asm", *call)
    assert all(text in asm for text in inside)
    monkeypatch.setattr(assembler, "find_tool", lambda name: None)
    shown = output(capsys, "explain", *call, "--loop", hottest["label"])
    assert "registers are not known: found no ptxas" in shown and "e = exp(row - max(row, over=n))" in shown


def test_explain_has_no_page_for_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "softmax", "--target", "sm_80", "--html", "softmax.html"]) == 2
    assert "--html: found target sm_80, whose assembler gives the registers" in capsys.readouterr().err
