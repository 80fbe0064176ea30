"""Where the time of a program goes: how long each worker was in each kernel, and waited after it.

Enters: the launches of a program and the time stamps that its machine code kept. Leaves: a `Launched` for each launch.
Holds: a worker's times add up to the run. `summed` joins runs and kernels of one name; `table` prints them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .program import Launch


class Launched(NamedTuple):
    """One kernel of a run. read_bytes: of its arguments that it only reads, as long as they are (a cache that is not
    full counts in full). seconds, wait_seconds: of each worker, in the kernel and at the barrier after it."""

    kernel: str
    read_bytes: int
    seconds: tuple[float, ...]
    wait_seconds: tuple[float, ...]


def times_of(launches: Sequence[Launch], times: Any, cycles_per_ns: float) -> list[Launched]:
    """times [workers, 2 * launches + 1]: cycles before and after each launch, and at the end."""
    seconds = (times[:, 1:] - times[:, :-1]) * (1e-9 / cycles_per_ns)
    return [
        Launched(launch.signature.kernel, sum(high - low for low, high in launch.reads),
                 tuple(seconds[:, 2 * place].tolist()), tuple(seconds[:, 2 * place + 1].tolist()))
        for place, launch in enumerate(launches)
    ]


def middle(runs: Sequence[Sequence[Launched]]) -> list[Launched]:
    """The median of several runs of one program, time by time."""
    def medians(times: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
        return tuple(median(of_worker) for of_worker in zip(*times, strict=True))

    return [same[0]._replace(seconds=medians(one.seconds for one in same),
                             wait_seconds=medians(one.wait_seconds for one in same))
            for same in zip(*runs, strict=True)]


def table(launched: Iterable[Launched]) -> str:
    """Kernels by name, those that take longest first: how many, the workers' mean time in them and after them at
    barriers, the share of the whole, and bytes read per second of that time."""
    sums: dict[str, list[float]] = {}
    for one in launched:
        row = sums.setdefault(one.kernel, [0, 0.0, 0.0, 0])
        row[0] += 1
        row[1] += sum(one.seconds) / len(one.seconds)
        row[2] += sum(one.wait_seconds) / len(one.wait_seconds)
        row[3] += one.read_bytes
    whole = sum(row[1] + row[2] for row in sums.values()) or 1.0
    width = max(map(len, sums), default=0)
    lines = [f"{'kernel':{width}}  count        ms   wait ms  share  read GB/s"]
    for name, (count, inside, waits, read) in sorted(sums.items(), key=lambda item: -item[1][1] - item[1][2]):
        rate = read / (inside + waits) / 1e9 if inside + waits else 0.0
        lines.append(f"{name:{width}}  {count:5.0f}  {1e3 * inside:8.3f}  {1e3 * waits:8.3f}  "
                     f"{100 * (inside + waits) / whole:4.1f} %  {rate:9.1f}")
    lines.append(f"{'together':{width}}         {1e3 * sum(row[1] for row in sums.values()):8.3f}  "
                 f"{1e3 * sum(row[2] for row in sums.values()):8.3f}")
    return "\n".join(lines) + "\n"
