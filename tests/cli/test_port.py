"""`sapper port`: every kernel on every target, with its cost, or with the reason why not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from sapper.cli.main import main
from sapper.cli.port import by_hand
from sapper.targets import known_targets, target

KERNELS = '''
import sapper as sp
from sapper import Tensor, f32, tiles

M, N = sp.dims("M N")


@sp.kernel
def scale(x: Tensor[f32, M, N], factor: f32, y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = x[m, n] * factor


@sp.kernel
def parts(x: Tensor[f32, N], y: Tensor[f32, 9, N]):
''' + "".join(f"    for n in tiles(N):\n        y[{i}, n] = x[n] + {i}.0\n" for i in range(9))


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "user_port.py"
    path.write_text(KERNELS, encoding="utf-8")
    return str(path)


def test_every_kernel_and_target_has_a_row(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["port", file, "--shape", "N=1024", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["kernel"], r["target"]) for r in rows] == [(k, t) for k in ("scale", "parts") for t in known_targets()]
    for row in rows:
        if row["kernel"] == "parts":
            assert row["how"] == "impossible" and "more than 8 parallel loops" in row["reason"]
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


def test_the_table(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["port", file, "--target", "v3", "--target", "zen4"]) == 0
    out = capsys.readouterr().out
    assert "ports (store)" in out and "by the costs of Zen 4" in out
    assert "parts on v3, parts on zen4: " in out and "instead: the interpreter runs it" in out
    assert main(["port", file, "--target", "nowhere"]) == 2
    assert "found no target 'nowhere'" in capsys.readouterr().err


def test_pieces_by_hand_are_named_where_the_target_has_their_features() -> None:
    whole = SimpleNamespace(name="whole", family="x86_64", features=frozenset({"avx512f"}))
    kernel = SimpleNamespace(by_hand=[whole])
    compiled = SimpleNamespace(pieces=("fma_14x2",))
    assert by_hand(kernel, compiled, target("zen4")) == ["whole", "fma_14x2"]
    assert by_hand(kernel, SimpleNamespace(), target("v3")) == []
    assert by_hand(SimpleNamespace(), SimpleNamespace(), target("v3")) == []
