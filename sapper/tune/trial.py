"""One candidate schedule, tried in a child process: compiled, compared with what is right, then timed beside the best.

Enters: a `Task` (kernel, arguments, what is right) and two schedules. Leaves: a `Trial`. Holds: whatever a candidate
does (loops for ever, crashes, runs out of memory), the caller goes on, at the latest after a time limit; a candidate is
timed only when its result was right; both schedules are timed in turns in one process, so what slows the machine slows
both alike; one that is clearly slower is given up after a few samples.
"""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy

from ..lane.rows import LoweringError
from ..runtime import cuda, system
from ..runtime.by_hand import trusted
from ..runtime.errors import LaunchError
from ..runtime.launch import prepare
from ..targets import host_target
from ..targets import target as known_target
from ..targets.ptx.target import runs_on
from ..tile.schedule import Schedule, ScheduleError
from .measure import Clock, Run, measure, rotating
from .operands import copies

TIME_LIMIT_S = 20.0
HOPELESS = 1.10
"""A candidate slower than this after a few samples is not timed further."""
SETTLE_S = 0.012


@dataclass(slots=True)
class Task:
    """What is tuned.

    kernel, arguments: a call, its arrays in memory of the runtime. is_wrong: of the arguments after a run, what is
    wrong with them, or None. threads: workers. cold: large operands come from DRAM. cache_bytes: of the last cache.
    check: a slower check of a schedule on other shapes, for those that are about to be kept; None where it is right.
    device_target: the level whose code a CUDA device runs, where the calls are of such a device; None: of this CPU.
    """

    kernel: Any
    arguments: dict[str, Any]
    is_wrong: Callable[[Mapping[str, Any]], str | None]
    threads: int
    cold: bool
    cache_bytes: int
    check: Callable[[Schedule], str | None]
    device_target: str | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """status: "timed", "refused" (a schedule that can't be followed), "wrong", "crashed" or "time limit".

    median_s: of the candidate. against_s: of the schedule that it was timed beside, in the same run.
    """

    status: str
    median_s: float | None = None
    against_s: float | None = None
    message: str = ""

    @property
    def ratio(self) -> float | None:
        """The candidate's time over the other's; None where it was not timed."""
        if self.median_s is None or not self.against_s:
            return None
        return self.median_s / self.against_s


def try_candidate(task: Task, candidate: Schedule, against: Schedule, budget_s: float = 0.25,
                  time_limit_s: float = TIME_LIMIT_S) -> Trial:
    """Try a schedule. budget_s: of measuring, for each of the two."""
    return in_child(lambda: _try(task, candidate, against, budget_s), time_limit_s)


def check_candidate(task: Task, candidate: Schedule, time_limit_s: float = 3 * TIME_LIMIT_S) -> Trial:
    """The slower check of a schedule: "timed" (without a time) or "wrong"."""
    def check() -> Trial:
        wrong = task.check(candidate)
        return Trial("timed") if wrong is None else Trial("wrong", message=wrong)

    return in_child(check, time_limit_s)


def find_device(target: Any) -> None:
    """Raises LaunchError, with what is missing and what to do, where no CUDA device runs a target's code. The driver is
    asked in a child process: children of one that has asked it may not."""
    found = in_child(lambda: _asked(target), TIME_LIMIT_S)
    if found.status != "timed":
        raise LaunchError(found.message)


def _asked(target: Any) -> Trial:
    on = cuda.device()
    if not runs_on(target, on.capability):
        return Trial("refused", message=f"{on.name}: found target {target.name}; expected a level that it runs; "
                                        f"mend: --target {on.target.name}")
    return Trial("timed")


def in_child(work: Callable[[], Trial], time_limit_s: float) -> Trial:
    """What `work` gives, made in a forked child, which has ended when this returns or raises."""
    context = get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_be_child, args=(send, work), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads: the child makes its own
        child.start()
    try:
        send.close()
        if not receive.poll(time_limit_s):
            return Trial("time limit", message=f"still running after {time_limit_s:g} s")
        try:
            return Trial(**json.loads(receive.recv_bytes()))
        except EOFError:
            child.join(1.0)
            code = child.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"status {code}"
            return Trial("crashed", message=f"the child process ended with {how}")
    finally:
        receive.close()
        child.kill()
        child.join()


def _be_child(send: Connection, work: Callable[[], Trial]) -> None:
    system.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends this process
    os.environ.pop("SAPPER_TRACE", None)
    try:
        trial = work()
    except (ScheduleError, LoweringError, LaunchError) as error:
        trial = Trial("refused", message=str(error))
    except Exception as error:
        trial = Trial("crashed", message=f"{type(error).__name__}: {error}")
    send.send_bytes(json.dumps(asdict(trial)).encode())


def _try(task: Task, candidate: Schedule, against: Schedule, budget_s: float) -> Trial:
    if candidate.assembly and not trusted(task.kernel, _target(task), candidate):
        # Calls would take the generated code in its place: whether that is fast is another question.
        return Trial("wrong", message=f"{', '.join(candidate.assembly)}: by hand, and not what it stands for here")
    sets = copies(task.arguments, task.cold, task.cache_bytes)
    if task.device_target is not None:
        sets = _on_device(sets)
    run = _prepared(task, candidate, sets)
    wrong = task.is_wrong({name: value.numpy() if isinstance(value, cuda.DeviceArray) else value
                           for name, value in sets[0].items()})
    if wrong is not None:
        return Trial("wrong", message=wrong)
    contestants = {"candidate": run, "against": _prepared(task, against, sets)}
    # One worker is timed by the CPU time of its thread, to which it adds nothing that others run meanwhile.
    clock, settle_s = (time.thread_time, 0.0) if task.threads == 1 else (time.perf_counter, SETTLE_S)
    if task.device_target is not None:
        clock, settle_s = _device_clock(), 0.0
    times = measure(contestants, budget_s=budget_s / 5, rounds=3, settle_s=settle_s, clock=clock)
    if times["candidate"].low_s <= HOPELESS * times["against"].high_s:
        times = measure(contestants, budget_s=budget_s, settle_s=settle_s, clock=clock)
    return Trial("timed", times["candidate"].median_s, times["against"].median_s)


def _target(task: Task) -> Any:
    return host_target() if task.device_target is None else known_target(task.device_target)


def _on_device(sets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same sets in memory of the device; what several of them share they still share."""
    made: dict[int, Any] = {}

    def placed(value: Any) -> Any:
        if not isinstance(value, numpy.ndarray):
            return value
        if id(value) not in made:
            made[id(value)] = cuda.array(value)
        return made[id(value)]

    return [{name: placed(value) for name, value in one.items()} for one in sets]


def _device_clock() -> Clock:
    """Seconds of the device: when all that was issued before is done."""
    start = cuda.Event().record()
    return lambda: cuda.Event().record().synchronize().since(start)


def _prepared(task: Task, schedule: Schedule, sets: list[dict[str, Any]]) -> Run:
    """A closure that runs the kernel on one set of operands after another; the first of them has been run once."""
    where: dict[str, Any] = {"threads": task.threads} if task.device_target is None else {"target": task.device_target}
    calls = [prepare(task.kernel, *one.values(), schedule=schedule, **where) for one in sets]
    calls[0]()
    return rotating(calls)
