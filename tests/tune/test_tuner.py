"""Trials in child processes, the database, and schedules that calls find."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, f32, i32, span, tiles, whole, zeros
from sapper.kernels import library
from sapper.kernels.by_hand import rows as rows
from sapper.lang.by_hand import PIECES
from sapper.runtime import tuned
from sapper.runtime.errors import SapperWarning
from sapper.targets import host_target
from sapper.tile.schedule import Schedule, ScheduleError
from sapper.tune import tuner
from sapper.tune.database import Database, DatabaseError, Key, Result
from sapper.tune.trial import Trial, check_candidate, in_child, try_candidate
from sapper.tune.tuner import Subject, entries_of, tune, write_entries

MATMUL = {k.name: k for k in library()}["matmul_nn_f32"]
SHAPE = {"M": 40, "N": 64, "K": 33}
KEY = Key("k", "digest", "zen4", (("M", 5),), 1, False)
M, N, T, D, P = sp.dims("M N T D P")


@sp.kernel
def double(x: Tensor[f32, M, N], out: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        out[m, n] = 2.0 * x[m, n]


def subject() -> Subject:
    return Subject(MATMUL.name, MATMUL.kernel, SHAPE, MATMUL.make_arguments, MATMUL.reference, MATMUL.compare,
                   MATMUL.check_shapes[:2])


def task() -> Any:
    return tuner._task(subject(), host_target(), 1, False)[0]


def test_a_candidate_is_timed_beside_the_best() -> None:
    trial = try_candidate(task(), Schedule(registers={"m": 4}), Schedule(), budget_s=0.02, time_limit_s=150)
    assert trial.status == "timed" and trial.ratio is not None and 0.1 < trial.ratio < 10
    assert check_candidate(task(), Schedule(registers={"m": 4}), time_limit_s=150).status == "timed"


def test_a_wrong_one_is_never_timed() -> None:
    wrong = replace(task(), is_wrong=lambda _: "c[0, 0] is 1, expected 2", check=lambda _: "native: wrong")
    trial = try_candidate(wrong, Schedule(), Schedule())
    assert (trial.status, trial.ratio) == ("wrong", None) and "expected 2" in trial.message
    assert check_candidate(wrong, Schedule()).status == "wrong"


def test_a_schedule_that_cannot_be_followed_is_refused() -> None:
    trial = try_candidate(task(), Schedule(lane="q"), Schedule())
    assert trial.status == "refused" and "no axis 'q'" in trial.message


@sp.kernel
def exponential(x: Tensor[f32, N], out: Tensor[f32, N]):
    for n in tiles(N):
        out[n] = sp.exp(x[n])


@pytest.mark.skipif("avx512f" not in host_target().features, reason="no AVX-512")
@pytest.mark.filterwarnings("ignore:kernel exponential")
def test_a_block_by_hand_that_is_wrong_is_never_timed() -> None:
    """Calls with it take the generated code, which may well win by chance."""
    def nothing_like_it(out: Any, x: Any) -> None:
        sp.x86.vaddps(out, x, x)

    sp.x86.block("twice", inputs="f32", result="f32", features="avx512f", implements="exp")(nothing_like_it)
    try:
        of_exp = tuner._task(Subject("exponential", exponential, {"N": 1000}), host_target(), 1, False)[0]
        trial = try_candidate(of_exp, Schedule(assembly=("twice",)), Schedule(), budget_s=0.02, time_limit_s=150)
        assert trial.status == "wrong" and "twice" in trial.message
        sound = try_candidate(of_exp, Schedule(assembly=("sapper.kernels.by_hand.rows:exp_by_table",)), Schedule(),
                              budget_s=0.02, time_limit_s=150)
        assert sound.status == "timed"
    finally:
        del PIECES["x86_64:twice"]


def kill_itself() -> Trial:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("not reached")


@pytest.mark.parametrize(("work", "status", "message"), [
    (kill_itself, "crashed", "SIGKILL"), (lambda: time.sleep(60), "time limit", "0.2 s"),
    (lambda: 1 // 0, "crashed", "ZeroDivisionError"),
])
def test_whatever_a_child_does_the_caller_goes_on(work: Any, status: str, message: str) -> None:
    trial = in_child(work, 0.2 if status == "time limit" else 10.0)
    assert trial.status == status and message in trial.message


def test_a_search_finds_its_trials_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def pretend(_task: Any, candidate: Schedule, against: Schedule, budget_s: float = 0.0) -> Trial:
        made.append(candidate)
        faster = candidate.registers.get("m") == 12
        return Trial("timed", 0.5 if faster else 1.0, 0.5 if against.registers.get("m") == 12 else 1.0)

    monkeypatch.setattr(tuner, "try_candidate", pretend)
    monkeypatch.setattr(tuner, "check_candidate", lambda *_: Trial("timed"))
    monkeypatch.setattr(tuner, "choices", lambda *given: _large(*given))
    database = Database(str(tmp_path / "trials.sqlite"))
    first = tune(subject(), host_target(), database, 1, False, 1e9, lambda _: None)
    assert first.finished and first.schedule.registers == {"m": 12} and first.model_s == 2 * first.median_s
    before = len(made)
    again = tune(subject(), host_target(), database, 1, False, 1e9, lambda _: None)
    assert again == first and len(made) == before + 1        # only the last run, best against the model's
    assert database.results() == [first] and database.results("another") == []


def _large(*given: Any) -> Any:
    """The choices for large extents on one CPU: steps as in a search on a matrix of some size, whatever the test's and
    this machine are."""
    from sapper.codegen.pipeline import facts_of
    from sapper.lane.choices import choices
    from sapper.targets import target
    from sapper.tile.schedule import DimClass, Specialization

    large = Specialization({d: DimClass(512, 64) for d in "MNK"}, given[3].strides)
    return choices(*given[:2], facts_of(target("zen4")), large)


@sp.kernel
def sums_so_far(x: Tensor[f32, T, P], position: i32, sums: Tensor[f32, T], scale: f32):
    for t in tiles(T):
        total = zeros(t, dtype=f32)
        for p in tiles(span(0, position + T)):
            total += sp.sum(x[t, p], over=p)
        sums[t] = total * scale


def test_a_call_is_tuned_with_its_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are given, or the largest that fit; a search for others does not take its trials."""
    shape = {"T": 32, "P": 100}
    monkeypatch.setattr(tuner, "try_candidate", lambda *_: Trial("timed", 1.0, 1.0))
    database = Database(str(tmp_path / "trials.sqlite"))

    def found(**scalars: Any) -> Result:
        return tune(Subject("sums_so_far", sums_so_far, shape, scalars=scalars), host_target(), database, 1, False, 1e9,
                    lambda _: None)

    largest, first = found(), found(position=7, scale=0.5)
    assert (largest.key.scalars, first.key.scalars) == ((("position", 68),), (("position", 7),))
    assert tuner.label_of(Subject("sums_so_far", sums_so_far, shape)) == "T=32 P=100 position=68"
    assert database.results() == sorted([largest, first], key=lambda r: json.dumps(r.key.row))
    assert Result.from_json(json.loads(json.dumps(first.to_json()))) == first


def test_a_call_that_cannot_be_made_is_told_at_once(tmp_path: Path) -> None:
    """Not after a search all of whose candidates crash."""
    told: list[str] = []
    wrong = Subject("sums_so_far", sums_so_far, {"T": 32, "P": 100}, scalars={"position": 500})
    with pytest.raises(DatabaseError, match=r"can't be timed: the model's own schedule: crashed [\s\S]* index 531 "):
        tune(wrong, host_target(), Database(str(tmp_path / "trials.sqlite")), 1, False, 1e9, told.append)
    assert told == []


def test_of_several_scalars_the_longest_call_counts() -> None:
    few, many = Schedule(registers={"n": 1}), Schedule(registers={"n": 2})
    results = [Result(KEY._replace(scalars=(("position", at),)), schedule, at, 2.0 * at, 1, True)
               for at, schedule in ((1, few), (9, many), (3, few))]
    (entries,) = entries_of(results).values()
    assert [entry["schedule"] for entry in entries] == [many.to_json()]
    assert entries[0]["dims"] == {"M": 5}


@sp.kernel(specialise="D")
def rotated(x: Tensor[f32, T, D], out: Tensor[f32, T, D]):
    for t in tiles(T):
        d = whole(D)
        out[t, d] = x[t, d] * sp.sum(x[t, d], over=d)


def test_extents_that_calls_compile_in_are_known_to_the_search() -> None:
    known = tuner.Known(rotated, host_target(), {"T": 64, "D": 48}, ())
    assert known.static == {"D": 48} and set(known.classes) == {"T"}
    assert "D" not in [op.attributes.get("name") for op in known.function().walk() if op.name == "dim"]


def test_a_gain_that_does_not_last_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "try_candidate", lambda *_: Trial("timed", 0.99, 1.0))
    assert tuner._result(KEY, task(), Schedule(lane="n"), 3, True) == Result(KEY, Schedule(), 1.0, 1.0, 3, True)


def test_results_travel_as_json() -> None:
    result = Result(KEY, Schedule(registers={"m": 6}), 1.0, 1.5, 7, True)
    assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_a_database_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("not SQLite, but long enough to be read as a file of some kind" * 40)
    with pytest.raises(DatabaseError, match="mend"):
        Database(str(tmp_path / "x"))
    with pytest.raises(DatabaseError, match="mend"):
        Database(str(tmp_path / "x" / "y"))


def test_a_damaged_or_older_database_is_told(tmp_path: Path) -> None:
    older = sqlite3.connect(tmp_path / "older.sqlite")
    older.executescript("CREATE TABLE trials (kernel TEXT); CREATE TABLE results (kernel TEXT)")
    older.close()
    row = Database(str(tmp_path / "row.sqlite"))
    row.add_results([Result(KEY, Schedule(), 1.0, 2.0, 1, True)])
    row._connection.executescript("UPDATE results SET schedule = '{'")
    torn = Database(str(tmp_path / "torn.sqlite"))
    torn.add_results([Result(KEY, Schedule(), 1.0, 2.0, 1, True)])
    torn.close()
    whole = (tmp_path / "torn.sqlite").read_bytes()
    (tmp_path / "torn.sqlite").write_bytes(whole[:4096] + bytes(len(whole) - 4096))
    for name in ("older", "row", "torn"):
        database = Database(str(tmp_path / f"{name}.sqlite"))
        with pytest.raises(DatabaseError, match="mend"):
            database.results()
        if name != "row":
            with pytest.raises(DatabaseError, match="mend"):
                database.trial(KEY, "compiler", Schedule(), Schedule())


WRITER = """
import sys
from sapper.tile.schedule import Schedule
from sapper.tune.database import Database, Key
from sapper.tune.trial import Trial
database, own = Database(sys.argv[1]), sys.argv[2]
for at in range(int(sys.argv[3])):
    key = Key(own, "digest", "zen4", (("M", at),), 1, False)
    database.add_trial(key, "compiler", Schedule(), Schedule(), Trial("timed", 1.0, 2.0))
    print(at, flush=True)
"""


def test_several_processes_write_and_one_is_killed(tmp_path: Path) -> None:
    path = str(tmp_path / "trials.sqlite")
    Database(path).close()
    command = [sys.executable, "-c", WRITER, path]
    killed = subprocess.Popen([*command, "killed", "1000000"], stdout=subprocess.PIPE)
    others = [subprocess.Popen([*command, name, "20"], stdout=subprocess.DEVNULL) for name in ("a", "b")]
    assert killed.stdout is not None and killed.stdout.readline()
    assert [other.wait(60) for other in others] == [0, 0]
    killed.kill()
    killed.communicate()
    rows = sqlite3.connect(path).execute("SELECT kernel, count(*) FROM trials GROUP BY kernel").fetchall()
    assert dict(rows)["a"] == dict(rows)["b"] == 20 and dict(rows)["killed"] >= 1


# ------------------------------------------------------------------------------------------------ what calls read


def result_for(kernel: Any, schedule: Schedule, dims: dict[str, int], threads: int = 1, cold: bool = False) -> Result:
    key = Key(kernel.name, kernel.source_digest(), host_target().name, tuple(sorted(dims.items())), threads, cold)
    return Result(key, schedule, 1.0, 2.0, 1, True)


def test_calls_find_the_nearest_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPPER_TUNED", str(tmp_path))
    few, many = Schedule(registers={"n": 1}), Schedule(registers={"n": 2})
    results = [result_for(double, few, {"M": 8, "N": 64}), result_for(double, many, {"M": 8, "N": 1024}),
               result_for(double, Schedule(), {"M": 64, "N": 64})]
    entries = entries_of(results)
    assert [len(found) for found in entries.values()] == [2]
    write_entries(str(tmp_path / f"{host_target().name}.json"), entries)

    def found(threads: int = 1, source: str | None = None, **dims: int) -> Any:
        return tuned.tuned_schedule(double.name, source or double.source_digest(), host_target().name, dims, threads)

    assert found(M=8, N=64) == found(M=9, N=100) == few.to_json()
    assert found(M=8, N=800) == many.to_json()
    assert found(M=8, N=65536) is found(M=1, N=64) is None
    assert found(threads=2, M=8, N=64) is found(source="x", M=8, N=64) is None
    x, out = np.ones((8, 64), np.float32), np.empty((8, 64), np.float32)
    from sapper.runtime.launch import Launcher

    assert Launcher(double, {"threads": 1}).schedule_for({"M": 8, "N": 64}) == few.to_json()
    assert Launcher(double, {"threads": 1, "schedule": many}).schedule_for({"M": 8, "N": 64}) == many
    assert Launcher(double, {"threads": 1}).schedule_for({"M": 8, "N": 64}, packed=True) is None
    double(x, out, threads=1)
    assert (out == 2).all()
    monkeypatch.setenv("SAPPER_TUNED", "off")
    assert found(M=8, N=64) is None


def test_a_cache_directory_that_is_a_file_has_no_schedules(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """What is wrong with it the compile cache tells: not that a file of schedules is, which has to be deleted."""
    (tmp_path / "file").write_text("in the way")
    assert tuned.read(str(tmp_path / "file" / "tuned" / "zen3.json")) == {} and not recwarn.list


def test_other_results_stay_in_the_file_that_calls_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of another database, and of another kernel of that name; what a search no longer finds faster goes."""
    monkeypatch.setenv("SAPPER_TUNED", str(tmp_path / "tuned"))
    few, many = Schedule(registers={"n": 1}), Schedule(registers={"n": 2})
    target = host_target().name
    one, other = (Database(str(tmp_path / f"{name}.sqlite")) for name in ("one", "other"))

    def found(n: int, source: str = "") -> Any:
        return tuned.tuned_schedule("double", source or double.source_digest(), target, {"M": 8, "N": n}, 1)

    mine = result_for(double, few, {"M": 8, "N": 64})
    one.add_results([mine, replace(mine, key=mine.key._replace(source="older"), schedule=many, model_s=99.0)])
    path = tuner.publish(one, target)
    assert found(64) == few.to_json() and found(64, "older") == many.to_json()
    other.add_results([result_for(double, many, {"M": 8, "N": 1024})])
    assert tuner.publish(other, target) == path
    assert found(64) == few.to_json() and found(1024) == many.to_json()
    one.add_results([replace(mine, schedule=Schedule())])
    tuner.publish(one, target)
    assert found(64) is None and found(1024) == many.to_json() and found(64, "older") == many.to_json()
    assert os.listdir(tmp_path / "tuned") == [f"{target}.json"]
    monkeypatch.setattr(os, "replace", lambda *_: os.stat("/nowhere"))
    with pytest.raises(DatabaseError, match="SAPPER_TUNED"):
        tuner.publish(one, target)
    assert os.listdir(tmp_path / "tuned") == [f"{target}.json"]


def test_a_schedule_that_no_longer_lowers_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler may have changed since it was found; a schedule that the caller names is still an error."""
    monkeypatch.setenv("SAPPER_TUNED", str(tmp_path))
    gone = Schedule(lane="gone")
    entries = entries_of([result_for(double, gone, {"M": 8, "N": 64})])
    write_entries(str(tmp_path / f"{host_target().name}.json"), entries)
    x, out = np.ones((8, 64), np.float32), np.zeros((8, 64), np.float32)
    double(x, out, threads=1)
    assert (out == 2).all()
    with pytest.raises(ScheduleError, match="no axis 'gone'"):
        double(x, out, threads=1, schedule=gone)


@pytest.mark.parametrize("text", [
    "{", "[]", '{"double": [{}]}', '{"double": 3}',
    '{"double": [{"source": 1, "threads": 1, "schedule": {}, "dims": {}}]}'])
def test_a_damaged_file_is_left_aside(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "zen4.json"
    path.write_text(text)
    monkeypatch.setattr("sapper.runtime.errors._warned", set())
    tuned.forget()
    with pytest.warns(SapperWarning, match="tune again"):
        assert tuned.read(str(path)) == {}
    assert tuned.read(str(path)) == {}


def test_the_librarys_schedules_are_sound() -> None:
    """Each names a kernel of the library with the source that it has now, and still lowers."""
    from sapper.codegen.pipeline import facts_of
    from sapper.lane.choices import choices
    from sapper.targets import target
    from sapper.tile.canonical import canonicalize
    from sapper.tile.reduce_loops import reduce_loops
    from sapper.tile.schedule import Specialization

    kernels = {k.name: k.kernel for k in library()}
    for path in sorted(Path(tuned.library_directory()).glob("*.json")):
        for name, entries in tuned.read(str(path)).items():
            for entry in entries:
                assert entry["source"] == kernels[name].source_digest(), f"{path.name}: {name} is to be tuned anew"
                function = kernels[name].tile_ir()
                reduce_loops(function)
                canonicalize(function)
                choices(function, Schedule.from_json(entry["schedule"]), facts_of(target(path.stem)), Specialization())


@pytest.mark.long
@pytest.mark.parametrize("path", sorted(Path(tuned.library_directory()).glob("*.json")), ids=lambda path: path.stem)
def test_the_librarys_schedules_compute_the_same(path: Path) -> None:
    """As far as this CPU runs their target's code; else down to machine IR."""
    from sapper.runtime.check import check_kernel
    from sapper.targets import target

    kernels = {k.name: k for k in library()}
    found = {(name, json.dumps(entry["schedule"])) for name, entries in tuned.read(str(path)).items()
             for entry in entries}
    for name, text in sorted(found):
        entry, schedule = kernels[name], Schedule.from_json(json.loads(text))
        report = check_kernel(entry.kernel, target(path.stem), runs=2, schedule=schedule,
                              make_arguments=entry.make_arguments, shapes=entry.check_shapes)
        assert report.finding is None, f"{path.name}: {name} {text}: {report.finding}"
