"""`sapper emulate`: what it prints, and that mistakes are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sapper.cli.main import main

ADD = str(Path(__file__).parent.parent / "emulate" / "data" / "add.ptx")
LAUNCH = ["emulate", ADD, "--grid", "8", "--block", "128", "-a", "x=f32[1000]", "-a", "y=f32[1000]:arange"]


def test_vector_addition(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LAUNCH, "-a", "z=f32[1000]:empty", "-a", "n=1000", "--expect", "z = x + y"]) == 0
    out = capsys.readouterr().out
    assert "z = x + y: holds" in out and "add.rn.f32" in out and "global memory: 96 accesses" in out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LAUNCH, "-a", "z=f32[1000]:zeros", "-a", "n=1000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counters"]["instructions"]["st.global.f32"] == 32


@pytest.mark.parametrize(("more", "status", "message"), [
    (["-a", "z=f32[1000]", "-a", "n=1000", "--expect", "z = x - y"], 1, "z differs from x - y by up to"),
    (["-a", "z=f32[999]", "-a", "n=1000"], 1, "4 bytes out of bounds at argument 2+3996 (it has 3996 bytes)"),
    (["-a", "z=f32[1000]"], 1, "has 4 parameters, found 3 arguments; expected one for each of: "),
    (["-a", "z=f33[1000]", "-a", "n=1"], 2, "found dtype 'f33'"), (["-a", "z"], 2, "expected name=f32[1000]"),
    (["-a", "z=f32[9]:odd"], 2, "expected zeros, empty, arange or normal"),
    (["-a", "z=f32[1000]", "-a", "n=1000", "--expect", "q = x"], 2, "expected ARRAY = EXPRESSION"),
    (["-a", "z=f32[1000]", "-a", "n=1000", "--expect", "z = x +"], 2, "SyntaxError"),
    (["-a", "z=f32[1000]", "-a", "n=1000", "--expect", "z = x + q"], 2, "expected a NumPy expression of x, y, z, n"),
    (["-a", "z=f32[1000]", "-a", "n=1000", "--expect", "z = x[:7]"], 2, "of the shape of z"),
    (["-a", "z=f32[1000]", "-a", "n=5000000000"], 1, "found 5000000000; expected -2147483648 to 4294967295"),
    (["-a", "x=f32[1000]", "-a", "n=1000"], 2, "expected a name of its own for each"),
    (["--grid", "0"], 2, "expected one to three positive numbers"),
    (["--grid", "a"], 2, "expected one to three numbers"),
])
def test_mistakes_are_told(more: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LAUNCH, *more]) == status
    assert message in capsys.readouterr().err


def test_an_expectation_has_methods_of_arrays(capsys: pytest.CaptureFixture[str]) -> None:
    """Of which some import modules as they run."""
    expected = "z = x + y - x.sum() + np.add.reduce(x) + x.mean() - x.mean()"
    assert main([*LAUNCH, "-a", "z=f32[1000]", "-a", "n=1000", "--expect", expected]) == 0
    expected = "z = sum([x * k for k in range(2)]) + y * max(0, 1)"  # and Python's own functions
    assert main([*LAUNCH, "-a", "z=f32[1000]", "-a", "n=1000", "--expect", expected]) == 0
    assert "holds" in capsys.readouterr().out


def test_what_is_no_text_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a cubin, which ptxas makes of it."""
    (tmp_path / "add.cubin").write_bytes(b"\x7fELF\x02\x01\x01\x41\xff")
    assert main(["emulate", str(tmp_path / "add.cubin")]) == 1
    assert "at byte 8: found no text; expected PTX" in capsys.readouterr().err


def test_a_missing_file_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emulate", "missing.ptx"]) == 1
    assert "can't read missing.ptx" in capsys.readouterr().err


@pytest.mark.parametrize("short", [False, True])
def test_sums_as_short_as_those_of_tensor_cores(short: bool, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parent.parent / "emulate" / "data" / "triton_matmul_e4m3_sm90.ptx"
    words = ["a=e4m3[64,512]", "b=e4m3[64,512]", "c=f32[64,64]", "m=64", "n=64", "k=512", "sa=512", "sb=512", "sc=64",
             "unused=0", "scratch=0"]
    arguments = [part for word in words for part in ("-a", word)]
    assert main(["emulate", str(path), *arguments, "--shared", "24576", "--expect", "c = a @ b.T",
                 *(["--short-sums"] if short else [])]) == int(short)
    printed = capsys.readouterr()
    assert ("c differs from a @ b.T by up to 0." in printed.err) if short else ("holds" in printed.out)
