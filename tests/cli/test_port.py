"""`sapper port`: every kernel on every target, with its cost, or with the reason why not."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from sapper.cli import port
from sapper.cli.code import code_for
from sapper.cli.kernels import find_kernels
from sapper.cli.main import main
from sapper.targets import known_targets, target

from . import by_hand

KERNELS = '''
import sapper as sp
from sapper import Tensor, f16, f32, i16, tiles

M, N = sp.dims("M N")


@sp.kernel
def scale(x: Tensor[f32, M, N], factor: f32, y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = x[m, n] * factor


@sp.kernel
def bits(x: Tensor[f16, N], y: Tensor[i16, N]):
    for n in tiles(N):
        y[n] = x[n].bits(i16)
'''


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "user_port.py"
    path.write_text(KERNELS, encoding="utf-8")
    return str(path)


def test_every_kernel_and_target_has_a_row(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["port", file, "--shape", "N=1024", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["kernel"], r["target"]) for r in rows] == [(k, t) for k in ("scale", "bits") for t in known_targets()]
    for row in rows:
        if row["kernel"] == "bits":
            assert row["how"] == "impossible" and "bits of f16 as i16 are not supported" in row["reason"]
            assert "interpreter" in row["substitute"]
        elif row["cost"] is not None:
            cost = row["cost"]
            assert row["how"] == "generated" and row["pieces"] == [] and cost["cycles"] > 0
            assert cost["operations_per_cycle"] == pytest.approx(cost["operations"] / cost["cycles"])
        else:
            assert row["no_cost"]
    by_target = {r["target"]: r["cost"] for r in rows if r["kernel"] == "scale"}
    # Four vectors of 8 or of 16 lanes in a pass, bound by the one store of 256 bits in a cycle.
    assert by_target["v3"]["operations"] == 32 and by_target["v3"]["cycles"] == 4
    assert by_target["zen4"]["operations"] == 64 and by_target["zen4"]["cycles"] == 8


def test_several_processes_say_what_one_does(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, and a mistake is told as elsewhere."""
    def rows() -> list[dict[str, Any]]:
        return list(port.run_port(file, None, "N=1024", None, ["v3", "zen4", "neoverse-n1"]))

    alone = rows()
    monkeypatch.setattr(port, "JOBS_A_WORKER", 2)
    monkeypatch.setattr(port.os, "sched_getaffinity", lambda _: range(3))
    assert rows() == alone

    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("in a worker")

    monkeypatch.setattr(port, "code_for", fail)
    with pytest.raises(ZeroDivisionError, match="in a worker"):
        rows()


@pytest.mark.parametrize("name", ["zen4", "sm_80"])
def test_labels_are_no_instructions(name: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["port", f"{file}:scale", "--target", name, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    (found,) = find_kernels(f"{file}:scale")
    text = code_for(found.kernel, target(name), None, {}, {}).compiled.text()
    lines = [line.split("#")[0].split("//")[0].strip() for line in text.splitlines()]
    labels = [line for line in lines if re.fullmatch(r"[.$\w]+:", line)]
    starts = [line for line in lines if re.match(r"(@!?%p\d+ )?[a-z]", line) and line not in labels]
    assert len(labels) > 3 and row["instructions"] == len(starts)


def test_the_table(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["port", file, "--target", "v3", "--target", "zen4"]) == 0
    out = capsys.readouterr().out
    assert "ports (p4)" in out and "ports (store)" in out and "by the costs of Haswell, Zen 4" in out
    assert "bits on v3, bits on zen4: " in out and "instead: the interpreter runs it" in out
    assert main(["port", file, "--target", "nowhere"]) == 2
    assert "found no target 'nowhere'" in capsys.readouterr().err
    for wrong in ("garbage", "Q=3"):
        assert main(["port", file, "--target", "v3", "--shape", wrong]) == 2
        assert "expected dimensions of the kernels: " in capsys.readouterr().err


def test_a_narrow_terminal_breaks_lines_and_cuts_no_figure(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    narrow = Console(file=StringIO(), width=40)
    monkeypatch.setattr("sapper.cli.port.report_console", lambda: narrow)
    assert main(["port", file, "--target", "v3"]) == 0
    out = narrow.file.getvalue()
    assert "…" not in out and "bytes/cycle  bound by" in out and "ports (p4)" in out


def test_a_kernel_by_hand_is_named_with_its_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def row(*arguments: str) -> dict[str, Any]:
        assert main(["port", f"{by_hand.write(tmp_path)}:doubled", "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)[0]

    mine = row("--target", "v3")
    assert mine["how"] == "hand-written" and not mine["not_by_hand"]
    assert mine["pieces"] == [{"name": "by_ymm", "kind": "kernel", "features": ["avx2"],
                               "calls": "x, y contiguous, N a multiple of 16"}]
    assert mine["cost"]["operations"] == 8 and mine["cost"]["loaded_bytes"] == 32  # one vector in a pass
    assert row("--target", "v3", "--shape", "N=48")["how"] == row("--target", "v3", "--static", "N=48")["how"] == \
        "hand-written"
    for arguments, reason in [
        (("--shape", "N=8"), "N is not known to be a multiple of 16"),
        (("--static", "N=8"), "N is not known to be a multiple of 16"),
        (("--schedule", "{}"), "a schedule asks for generated code"),
    ]:
        other = row("--target", "v3", *arguments)
        assert other["how"] == "generated" and other["pieces"] == [] and other["not_by_hand"] == {"by_ymm": reason}
    gpu = row("--target", "sm_90a")
    assert gpu["how"] == "generated" and "not a x86_64" in gpu["not_by_hand"]["by_ymm"]


def test_an_instruction_is_named_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "one.py"
    file.write_text("import sapper as sp\nfrom sapper import Tensor, f32, ptx, tiles, x86\nN = sp.dims('N')\n"
                    "@sp.kernel\ndef one(x: Tensor[f32, N], y: Tensor[f32, N]):\n    for n in tiles(N):\n"
                    "        y[n] = sp.asm(ptx.rcp_approx_f32, x[n], tolerance=1e-3, meaning=lambda t:\n"
                    "                      sp.asm(x86.vrcp14ps, t, meaning=lambda u: 1.0 / u, tolerance=1e-3))\n")
    assert main(["port", str(file), "--target", "v3", "--target", "v4", "--target", "sm_80"]) == 0
    out = capsys.readouterr().out
    assert "one on v4: by hand: vrcp14ps" in out and "one on sm_80: by hand: rcp.approx.f32" in out
    assert "one on v3: " not in out


def test_a_block_is_named_where_the_target_has_its_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["port", f"{by_hand.write(tmp_path)}:bytes_of", "--target", "v3", "--target", "v4"]) == 0
    out = capsys.readouterr().out
    assert "bytes_of on v4: by hand: last_byte (avx512f)" in out and "bytes_of on v3: " not in out
    named = ["--schedule", '{"assembly": ["exp_by_table"]}']
    assert main(["port", f"{by_hand.write(tmp_path)}:exponential", "--target", "v3", "--target", "v4", "--json",
                 *named]) == 0
    v3, v4 = json.loads(capsys.readouterr().out)
    assert v3["how"] == "generated" and "v3 has no form of it" in v3["not_by_hand"]["exp_by_table"]
    assert v4["how"] == "hand-written" and v4["pieces"][0]["name"] == "exp_by_table" and not v4["not_by_hand"]
