"""What was tried and what was found, in one SQLite file.

Holds: a trial is one row, written in one transaction, so a kill at any moment loses at most the trial that was
running, and several processes may write at once. A search that is begun again finds the trials of the one before. Times
depend on the compiler, so trials of another version of it are not used again; a schedule that was found stays.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..targets import known_targets
from ..tile.schedule import Schedule
from .trial import Trial

WAIT_S = 30.0
"""How long a process waits for another that writes."""

_TABLES = """
CREATE TABLE IF NOT EXISTS trials (
    kernel TEXT, source TEXT, target TEXT, compiler TEXT, dims TEXT, threads INTEGER, cold INTEGER,
    schedule TEXT, against TEXT, status TEXT, median_s REAL, against_s REAL, message TEXT, at REAL,
    PRIMARY KEY (kernel, source, target, compiler, dims, threads, cold, schedule, against));
CREATE TABLE IF NOT EXISTS results (
    kernel TEXT, source TEXT, target TEXT, dims TEXT, threads INTEGER, cold INTEGER,
    schedule TEXT, median_s REAL, model_s REAL, tried INTEGER, finished INTEGER, at REAL,
    PRIMARY KEY (kernel, source, target, dims, threads, cold));
"""


class DatabaseError(Exception):
    """The file can't be used: what it is, what was expected, the mend."""


class Key(NamedTuple):
    """What a result is for. source: digest of the kernel's. target: its name. dims: extents by name. cold: see Task.
    scalars: values of the integers that the call was tuned with, as its position."""

    kernel: str
    source: str
    target: str
    dims: tuple[tuple[str, int], ...]
    threads: int
    cold: bool
    scalars: tuple[tuple[str, int], ...] = ()

    @property
    def row(self) -> tuple[Any, ...]:
        call: Any = [dict(self.dims), dict(self.scalars)] if self.scalars else dict(self.dims)
        return self.kernel, self.source, self.target, json.dumps(call), self.threads, int(self.cold)

    @staticmethod
    def of_row(kernel: str, source: str, target: str, call: str, threads: int, cold: int) -> Key:
        data = json.loads(call)
        dims, scalars = data if isinstance(data, list) else (data, {})
        return Key(kernel, source, target, tuple(dims.items()), threads, bool(cold), tuple(scalars.items()))


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a search. schedule: the fastest, empty where the model's own is. median_s, model_s: its time and
    that of the model's schedule in the same run, seconds. finished: no step from it helps."""

    key: Key
    schedule: Schedule
    median_s: float
    model_s: float
    tried: int
    finished: bool

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `Result.from_json` reads it back."""
        key = self.key
        return {"kernel": key.kernel, "source": key.source, "target": key.target, "dims": dict(key.dims),
                "scalars": dict(key.scalars), "threads": key.threads, "cold": key.cold,
                "schedule": self.schedule.to_json(),
                "median_s": self.median_s, "model_s": self.model_s, "tried": self.tried, "finished": self.finished}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Result:
        """Raises KeyError, TypeError, ValueError for what is no result."""
        dims, scalars = (tuple((str(name), int(value)) for name, value in part.items())
                         for part in (data["dims"], data.get("scalars", {})))  # older files have no scalars
        key = Key(str(data["kernel"]), str(data["source"]), str(data["target"]), dims, int(data["threads"]),
                  bool(data["cold"]), scalars)
        if key.target not in known_targets():  # files are named after it
            raise ValueError(f"found target {key.target!r}; expected one of {', '.join(known_targets())}")
        median_s, model_s = float(data["median_s"]), float(data["model_s"])
        if not (0 < median_s < math.inf and 0 < model_s < math.inf):
            raise ValueError(f"found times of {median_s:g} and {model_s:g} s; expected numbers above 0")
        tried = int(data["tried"])
        for name, value, least in (("threads", key.threads, 1), ("tried", tried, 0), *((n, v, 0) for n, v in dims)):
            if not least <= value < 2**63:
                raise ValueError(f"found {name} of {value}; expected a number from {least}")
        return Result(key, Schedule.from_json(data["schedule"]), median_s, model_s, tried, bool(data["finished"]))


class Database:
    """The file at `path`, made if it is not there. Raises DatabaseError."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=WAIT_S)
            self._connection.executescript(_TABLES)
        except (OSError, sqlite3.OperationalError) as error:  # no room, a directory that can't be written
            raise DatabaseError(f"{path}: {error}; expected a file that can be written, with room for trials; mend: "
                                "name another with --database, or set SAPPER_CACHE_DIR") from error
        except sqlite3.Error as error:
            raise DatabaseError(f"{path}: {error}; expected a file of `sapper tune`; mend: name another with "
                                "--database, or delete it") from error

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._connection:
                yield self._connection
        except sqlite3.Error as error:
            raise DatabaseError(f"{self.path}: {error}; expected room to write; mend: free some, and go on") from error

    def _rows(self, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> DatabaseError:
        return DatabaseError(f"{self.path}: {error}; expected a whole file of this version of `sapper tune`; mend: "
                             "name another with --database, or delete it")

    def trial(self, key: Key, compiler: str, schedule: Schedule, against: Schedule) -> Trial | None:
        """What came of a trial made before."""
        rows = self._rows(
            "SELECT status, median_s, against_s, message FROM trials WHERE kernel = ? AND source = ? AND target = ? "
            "AND dims = ? AND threads = ? AND cold = ? AND compiler = ? AND schedule = ? AND against = ?",
            (*key.row, _digest(compiler), _text(schedule), _text(against)))
        return Trial(*rows[0]) if rows else None

    def add_trial(self, key: Key, compiler: str, schedule: Schedule, against: Schedule, trial: Trial) -> None:
        with self._write() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO trials (kernel, source, target, dims, threads, cold, compiler, schedule, "
                "against, status, median_s, against_s, message, at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*key.row, _digest(compiler), _text(schedule), _text(against), trial.status, trial.median_s,
                 trial.against_s, trial.message, time.time()))

    def add_results(self, results: Iterable[Result]) -> None:
        """All of them or none."""
        with self._write() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [(*result.key.row, _text(result.schedule), result.median_s, result.model_s, result.tried,
                  int(result.finished), time.time()) for result in results])

    def results(self, target: str | None = None) -> list[Result]:
        """All results, or those of a target, in a fixed order."""
        rows = self._rows(
            "SELECT kernel, source, target, dims, threads, cold, schedule, median_s, model_s, tried, finished "
            "FROM results ORDER BY target, kernel, dims, threads, cold")
        try:
            return [
                Result(Key.of_row(kernel, source, of, dims, threads, cold),
                       Schedule.from_json(json.loads(schedule)), float(median_s), float(model_s), tried, bool(finished))
                for kernel, source, of, dims, threads, cold, schedule, median_s, model_s, tried, finished in rows
                if target in (None, of)
            ]
        except (ValueError, TypeError, AttributeError) as error:
            raise self._damaged(error) from error


def _text(schedule: Schedule) -> str:
    return json.dumps(schedule.to_json(), sort_keys=True)


def _digest(compiler: str) -> str:
    return hashlib.sha256(compiler.encode()).hexdigest()
