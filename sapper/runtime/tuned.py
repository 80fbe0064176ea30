"""Schedules that a search found: those that come with the library, and the user's own.

Enters: a kernel's name and source, a target, the extents of a call. Leaves: the schedule found for this shape or for
the nearest one, or None: then the model chooses. Holds: a schedule found for another source is never used; a damaged
file is left aside with one warning; what is read is kept for the process.

One JSON file for each target, `{"kernel": [{"source", "dims", "threads", "schedule", ...}, ...]}`: the library's in
sapper/kernels/tuned/, and the user's, which come first, in SAPPER_TUNED or `tuned/` in the cache directory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from ..lang.by_hand import pieces_named
from . import settings
from .errors import warn_once

NEAR = 2.0
"""How far away, in doublings of all extents together, a tuned shape may be."""

Entries = dict[str, list[dict[str, Any]]]
_files: dict[str, Entries] = {}


def library_directory() -> str:
    """Where the schedules that come with the library lie."""
    return os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "kernels", "tuned")


def tuned_schedule(name: str, source: str, target: str, dims: Mapping[str, int], threads: int) -> dict[str, Any] | None:
    """The schedule (an object for `Schedule.from_json`) of the nearest shape that was tuned. threads: the most workers
    that the call may take; schedules for one worker and for several are kept apart."""
    for directory in (settings.tuned_directory(), library_directory()):
        if directory is None:
            continue
        best: tuple[float, dict[str, Any]] | None = None
        for entry in read(os.path.join(directory, f"{target}.json")).get(name, ()):
            if entry["source"] != source or (entry["threads"] > 1) != (threads > 1):
                continue
            away = _distance(entry["dims"], dims)
            if away <= NEAR and (best is None or away < best[0]) and _blocks_are_here(entry["schedule"]):
                best = away, entry["schedule"]
        if best is not None:
            return best[1]
    return None


def _blocks_are_here(schedule: Mapping[str, Any]) -> bool:
    """Whether the blocks by hand that a schedule names are known; those of a module that is gone are not."""
    return all(pieces_named(name) for name in schedule.get("assembly", ()))


def _distance(tuned: Mapping[str, int], dims: Mapping[str, int]) -> float:
    """Doublings between two shapes; infinite where an extent is 1 in one only, as that is another kind of work."""
    if tuned.keys() != dims.keys():
        return math.inf
    away = 0.0
    for name, extent in dims.items():
        if (tuned[name] <= 1) != (extent <= 1):
            return math.inf
        away += abs(math.log2(max(1, extent) / max(1, tuned[name])))
    return away


def read(path: str) -> Entries:
    """The entries of a file; none where there is no file."""
    found = _files.get(path)
    if found is None:
        found = _files[path] = _read(path)
    return found


def forget() -> None:
    """Read the files anew from now on: one was written."""
    _files.clear()


def _read(path: str) -> Entries:
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        for entries in data.values():
            for entry in entries:
                if not (isinstance(entry["source"], str) and isinstance(entry["threads"], int)
                        and isinstance(entry["schedule"], dict) and all(isinstance(d, int) for d in
                                                                        entry["dims"].values())):
                    raise ValueError("an entry lacks source, threads, schedule or dims")
    except (FileNotFoundError, NotADirectoryError):     # the compile cache tells what is wrong with its directory
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        warn_once(f"tuned {path}", f"{path}: {error}; expected schedules that `sapper tune` wrote; they are left "
                                   "aside; mend: delete the file, and tune again")
        return {}
    return dict(data)
