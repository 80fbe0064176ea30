"""`sapper tune` from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sapper.cli.app import run
from sapper.cli.errors import UsageError
from sapper.cli.kernels import find_kernel
from sapper.cli.tune import _subjects, seconds_of
from sapper.runtime.errors import LaunchError
from sapper.tile.schedule import Schedule
from sapper.tune import trial, tuner
from sapper.tune.database import Key, Result


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAPPER_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_tune_report_export_and_import(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--shape", "N=3000", "--threads", "1"]
    assert run(["tune", "vector_add", *shape, "--budget", "2s", "--json"]) == 0
    out, told = capsys.readouterr()
    (result,) = json.loads(out)
    assert result["dims"] == {"N": 3000} and result["model_s"] > 0 and "vector_add N=3000, 1 thread" in told
    assert list((directory / "tuned").glob("*.json"))
    assert run(["tune", "--report"]) == 0
    assert "of 1 cases" in capsys.readouterr().out
    exported = directory / "found.json"
    assert run(["tune", "--export", str(exported)]) == 0
    assert run(["tune", "--import", str(exported), "--database", str(directory / "other.sqlite")]) == 0
    capsys.readouterr()
    assert run(["tune", "--report", "--json", "--database", str(directory / "other.sqlite")]) == 0
    assert json.loads(capsys.readouterr().out) == [result]


def test_short_times_are_shown(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = directory / "found.json"
    file.write_text(json.dumps([RESULT | {"median_s": 2.34e-7, "model_s": 3.45e-7}]))
    assert run(["tune", "--import", str(file)]) == 0 and run(["tune", "--report"]) == 0
    out = capsys.readouterr().out
    assert "234 ns" in out and "345 ns" in out


def test_a_dimension_that_is_given_twice_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tune", "vector_add", "--shape", "N=3,N=4"]) == 2
    assert "--shape: found N twice" in capsys.readouterr().err


@pytest.mark.parametrize(("made", "mend"), [("directory", "SAPPER_CACHE_DIR"), ("text", "or delete it")])
def test_a_database_that_can_not_be_used_is_told(made: str, mend: str, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    """Only what is there, and is something else, is to be deleted."""
    path = tmp_path / "trials"
    if made == "directory":
        path.mkdir()
    else:
        path.write_text("something else" * 100)
    assert run(["tune", "--report", "--database", str(path)]) == 1
    told = capsys.readouterr().err
    assert mend in told and ("delete" in told) == (made == "text")


RESULT = {"kernel": "vector_add", "source": "x", "target": "zen4", "dims": {"N": 3000}, "threads": 1, "cold": False,
          "schedule": {"registers": {"n": 2}}, "median_s": 1.0, "model_s": 2.0, "tried": 1, "finished": True}


@pytest.mark.parametrize("wrong", [
    {"median_s": 0}, {"median_s": float("nan")}, {"model_s": float("inf")}, {"threads": 0}, {"dims": {"N": -5}},
    {"dims": {"N": 2**70}}, {"tried": 2**70}, {"target": "../zen4"}, {"target": "nothing"}, {"schedule": {"odd": 1}},
], ids=str)
def test_what_is_no_result_is_not_imported(wrong: dict[str, Any], directory: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    """None of the file is, and its target names no file elsewhere."""
    file = directory / "found.json"
    file.write_text(json.dumps([RESULT, RESULT | wrong]))
    assert run(["tune", "--import", str(file)]) == 2
    assert "export it again" in capsys.readouterr().err
    assert run(["tune", "--report", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert not list(directory.rglob("zen4.json"))


def test_what_was_found_is_there_for_calls_at_once(directory: Path, capsys: pytest.CaptureFixture[str],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the search for the second shape loses nothing of the first."""
    def search(subject: Any, target: Any, database: Any, *_: Any) -> Result:
        key = Key(subject.name, "source", target.name, tuple(subject.shape.items()), 1, False)
        if database.results():
            raise KeyboardInterrupt
        result = Result(key, Schedule(registers={"n": 2}), 1.0, 2.0, 1, True)
        database.add_results([result])
        return result

    monkeypatch.setattr(tuner, "tune", search)
    assert run(["tune", "vector_add", "--threads", "1"]) == 130
    (file,) = (directory / "tuned").iterdir()
    assert list(json.loads(file.read_text())) == ["vector_add"]


def test_a_users_kernel_needs_its_whole_shape(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = directory / "mine.py"
    source.write_text("""import sapper as sp
from sapper import Tensor, f32, tiles
M, N = sp.dims("M N")
@sp.kernel
def double(x: Tensor[f32, M, N], out: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        out[m, n] = 2.0 * x[m, n]
""")
    assert run(["tune", f"{source}:double", "--shape", "M=4"]) == 2
    assert "found no N; expected every dimension" in capsys.readouterr().err
    assert run(["tune", f"{source}:double", "--shape", "M=4,N=100", "--budget", "1s", "--threads", "1"]) == 0
    assert "tried" in capsys.readouterr().out


def test_attention_is_tuned_at_a_position(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tune", "attention_decode_f32", "--budget", "1s", "--threads", "1"]
    assert run([*words, "--shape", "H=2,G=1,D=16", "--set", "position=40"]) == 0
    assert "attention_decode_f32 H=2 G=1 D=16 position=40 P=46, 1 thread" in capsys.readouterr().err
    assert run(["tune", "--report", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["scalars"] == {"position": 40} and result["dims"] == {"D": 16, "G": 1, "H": 2, "P": 46}


def test_a_scalar_may_stand_among_the_extents() -> None:
    """`position` in --shape, as the library's cases name it, or in --set, as a user's kernels do."""
    found = find_kernel("attention_decode_f32")
    (one,) = _subjects(found, "H=2,G=1,D=16,position=40", None)
    (other,) = _subjects(found, "H=2,G=1,D=16", "position=40")
    assert (one.shape, one.scalars) == (other.shape, other.scalars)


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "expected one of: a kernel to tune"), (["softmax", "--report"], "expected one of"),
    (["nothing"], "no library kernel"), (["softmax", "--budget", "soon"], "expected a time such as"),
    (["softmax", "--shape", "Q=3"], "expected dimensions of softmax"), (["--import", "/nowhere"], "tune --export"),
    (["attention_decode_f32", "--shape", "P=3"], "expected dimensions of attention_decode_f32: H, G, D, position"),
    (["attention_decode_f32", "--set", "P=3"], "NAME=VALUE of a scalar of attention_decode_f32: position, scale"),
    (["attention_decode_f32", "--set", "position=1.5"], "as position is i32"),
    (["attention_decode_f32", "--set", "scale=high"], "expected a number, as scale is f32"),
    (["--report", "--set", "position=3"], "expected a kernel to tune"),
    (["softmax", "--threads", "9999"], "from 1 to 1024"),
    (["softmax", "--shape", "M=2147483647,N=2147483647"], "memory for them"),
    (["cross_entropy", "--shape", "T=3,V=0"], "expected extents of which cross_entropy has arguments"),
    (["matmul_nn_f32", "--shape", "M=2147483647,K=1048576", "--on-paper"], "memory for them"),
    (["--import", __file__], "export it again"), (["--report", "--database", __file__], "mend"),
])
def test_mistakes_are_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tune", *arguments]) in (1, 2)
    assert message in capsys.readouterr().err


def test_no_place_for_trials(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SAPPER_CACHE_DIR", "off")
    assert run(["tune", "softmax"]) == 1
    assert "--database FILE" in capsys.readouterr().err


def test_budgets() -> None:
    assert [seconds_of(t) for t in ("60", "60s", "1.5m", "1h")] == [60, 60, 90, 3600]
    with pytest.raises(UsageError):
        seconds_of("0s")


def test_estimates_are_called_so_and_not_kept(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tune", "matmul_nt_bf16_bf16", "--shape", "M=128,N=512,K=1024", "--target", "sm_90a", "--on-paper"]
    assert run(words) == 0
    out, told = capsys.readouterr()
    assert "sm_90a, on paper: estimates of the model, nothing is timed" in told and "% on paper" in told
    assert out.startswith("on paper") and "cycles of a processor for a call" in out
    assert run([*words, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["estimate"] is True and result["unit"] == "call" and result["cycles"] <= result["model_cycles"]
    assert not list(directory.rglob("*.sqlite")) and not list(directory.rglob("tuned"))


@pytest.mark.parametrize(("arguments", "message"), [
    (["softmax", "--target", "sm_90a"], "or compare the model's estimates: --on-paper"),
    (["softmax", "--target", "nothing"], "found no target 'nothing'"),
    (["softmax", "--target", "haswell"], "found a CPU that is not this one"),
    (["softmax", "--on-paper", "--threads", "2"], "nothing is timed or kept"),
    (["--report", "--on-paper"], "expected a kernel to tune"),
])
def test_what_needs_a_device_says_so(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str],
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise LaunchError("found no device; expected one")

    monkeypatch.setattr(trial.cuda, "device", missing)
    assert run(["tune", *arguments]) in (1, 2)
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1
