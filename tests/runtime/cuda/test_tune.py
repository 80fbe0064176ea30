"""`sapper tune` on the emulated driver: candidates are compared and timed on the device, and calls take what is found.

Between its events each launch takes LAUNCH_SECONDS, whatever it does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sapper.cli.app import run
from sapper.kernels import find
from sapper.runtime import cuda, tuned
from sapper.runtime.dtypes import numpy_dtype
from sapper.runtime.errors import LaunchError
from sapper.targets import target
from sapper.tile.schedule import Schedule, ScheduleError
from sapper.tune import trial, tuner
from sapper.tune.database import Database, DatabaseError
from sapper.tune.trial import Trial, find_device, try_candidate
from sapper.tune.tuner import Subject, entries_of, tune, user_file, write_entries

from .emulated_driver import LAUNCH_SECONDS

if TYPE_CHECKING:
    from .emulated_driver import EmulatedDriver

MATMUL = find("matmul_nt_bf16_bf16")
SHAPE = {"M": 64, "N": 64, "K": 128}
LIMIT_S = 150.0
LEVEL = target("sm_90a")


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAPPER_TUNED", str(tmp_path))
    tuned.forget()
    return tmp_path


def subject() -> Subject:
    return Subject(MATMUL.name, MATMUL.kernel, SHAPE, MATMUL.make_arguments, MATMUL.reference, MATMUL.compare,
                   MATMUL.check_shapes[:1])


def task() -> Any:
    return tuner._task(subject(), LEVEL, 132, False)[0]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("schedule", [{"tile": {"m": 64, "n": 64}}, {"split": {"k": 2}}, {"stream": "k"},
                                      {"cluster": {"m": 2}, "split": {"k": 1}}], ids=str)
def test_a_candidate_is_compared_and_timed_on_the_device(device: EmulatedDriver, schedule: dict[str, Any]) -> None:
    found = try_candidate(task(), Schedule.from_json(schedule), Schedule(), 0.01, LIMIT_S)
    assert found.status == "timed" and found.ratio == pytest.approx(1.0)
    assert found.median_s == pytest.approx(LAUNCH_SECONDS)
    assert not device.log       # all of it was in a child


def test_cold_operands_are_copies_on_the_device(device: EmulatedDriver) -> None:
    made = task()
    made.cold, made.cache_bytes = True, 3 * made.arguments["b"].nbytes
    sets = trial._on_device(trial.copies(made.arguments, True, made.cache_bytes))
    assert len(sets) > 1 and len({one["b"].address for one in sets}) == len(sets)
    assert trial._on_device([made.arguments, made.arguments])[1]["a"].nbytes == made.arguments["a"].nbytes
    assert try_candidate(made, Schedule(tile={"m": 64, "n": 64}), Schedule(), 0.01, LIMIT_S).status == "timed"


def test_what_is_wrong_is_not_timed(device: EmulatedDriver) -> None:
    made = task()
    made.is_wrong = lambda after: None if (after["c"] != after["c"]).all() else "it was computed"
    found = try_candidate(made, Schedule(), Schedule(), 0.01, LIMIT_S)
    assert (found.status, found.message) == ("wrong", "it was computed")
    refused = try_candidate(made, Schedule(cluster={"m": 3}), Schedule(), 0.01, LIMIT_S)
    assert refused.status == "refused" and "a size that is none of 1, 2, 4" in refused.message


def test_no_device_and_another_level_are_told(device: EmulatedDriver) -> None:
    find_device(LEVEL)
    device.reset(capability=(8, 0))
    with pytest.raises(LaunchError, match=r"Emulated: found target sm_90a; expected a level .*; mend: --target sm_80"):
        find_device(LEVEL)
    device.refuse = {"cuInit": 100}
    with pytest.raises(LaunchError, match="CUDA_ERROR_NO_DEVICE"):
        find_device(LEVEL)
    with pytest.raises(DatabaseError, match=r"the model's own schedule: refused .*CUDA_ERROR_NO_DEVICE"):
        tune(subject(), LEVEL, Database(":memory:"), 1, False, 1.0, lambda _: None)


def test_a_search_is_kept_and_calls_take_it(device: EmulatedDriver, directory: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters are pretended to be twice as fast; the check of what is kept is a real one, on the emulator."""
    def faster(of: Any, candidate: Schedule, against: Schedule, budget_s: float = 0.0) -> Trial:
        assert of.device_target == "sm_90a"
        return Trial("timed", *(0.5 if one.cluster == {"m": 2} else 1.0 for one in (candidate, against)))

    monkeypatch.setattr(tuner, "try_candidate", faster)
    told: list[str] = []
    database = Database(str(directory / "trials.sqlite"))
    found = tune(subject(), LEVEL, database, 1, False, 1e9, told.append)
    assert found.finished and found.schedule.to_json() == {"cluster": {"m": 2}}
    assert found.model_s == pytest.approx(2 * found.median_s) and found.key.threads == LEVEL.processors
    assert any("+100.0 %" in line for line in told)
    path = user_file("sm_90a")
    assert path is not None
    write_entries(path, entries_of(database.results("sm_90a")))
    a, b = (np.ones((64, 128), np.float32).astype(numpy_dtype("bf16")) for _ in range(2))
    c = cuda.empty((64, 64))
    MATMUL.kernel(cuda.array(a), cuda.array(b), c)
    assert (c.numpy() == 128).all()
    launches = [facts for kind, facts in device.log if kind == "launch"]
    assert [facts["cluster"] for facts in launches] == [(2, 1, 1)]
    # Rows that lie otherwise can't follow it: the model's schedule takes its place.
    narrow = cuda.empty((64, 60))
    b = np.ones((60, 100), np.float32).astype(b.dtype)
    MATMUL.kernel(cuda.array(np.ascontiguousarray(a[:, :100])), cuda.array(b), narrow)
    assert (narrow.numpy() == 100).all()
    assert not [facts for kind, facts in device.log if kind == "launch"][-1]["cluster"]
    with pytest.raises(ScheduleError, match="cluster of 2"):
        MATMUL.kernel(cuda.array(np.ascontiguousarray(a[:, :100])), cuda.array(b), narrow,
                      schedule={"cluster": {"m": 2}})


def test_what_is_wrong_for_other_shapes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower check runs the code on other shapes, on the emulator."""
    run, seen = tuner.emulate.run, []

    def other(*arguments: Any, **options: Any) -> Any:
        result = run(*arguments, **options)
        seen.append((arguments[3].shape, result.counters.instructions))
        if arguments[3].shape[0] > 192:
            arguments[3][3, 5] = 99
        return result

    monkeypatch.setattr(tuner.emulate, "run", other)
    large = Subject(MATMUL.name, MATMUL.kernel, {"M": 4096, "N": 160, "K": 4096 + 32}, MATMUL.make_arguments)
    wrong = tuner._check_emulated(large, LEVEL, Schedule(cluster={"m": 2}))
    assert wrong is not None and wrong.startswith("emulator, M=320 K=352 N=160: c[3, 5] is 99.0; expected")
    assert [shape for shape, _ in seen] == [(192, 160), (320, 160)]
    assert all(any("multicast::cluster" in name for name in counts) for _, counts in seen)


def test_the_command(device: EmulatedDriver, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tune", "rms_norm", "--shape", "M=8,N=256", "--database", str(directory / "trials.sqlite"), "--target",
             "sm_90a", "--budget", "1s", "--json"]
    assert run(words) == 0
    out, told = capsys.readouterr()
    (result,) = json.loads(out)
    assert result["target"] == "sm_90a" and result["model_s"] > 0 and "rms_norm M=8 N=256, sm_90a" in told
    assert run([*words, "--threads", "2"]) == 2
    assert "found a GPU, sm_90a" in capsys.readouterr().err
