"""A pattern search over schedules: from a start, one step after another that makes the kernel faster.

Enters: a start, a function that gives a schedule's neighbours, and one that tries a candidate against the best so far.
Leaves: the best schedule and how it was found. Holds: no candidate is tried twice against the same best; a step counts
only if it gains more than MARGIN, as times scatter; parts whose steps helped are tried first from then on; the search
ends when no step helps, or when `enough` says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..tile.schedule import Schedule
from .space import Step

MARGIN = 0.015

Neighbours = Callable[[Schedule], Iterable[Step]]
Try = Callable[[Step, Schedule], float | None]
"""(candidate, best so far) -> the candidate's time over that of the best; None for one that can't be used."""


@dataclass(slots=True)
class Found:
    """best: the fastest schedule. gained: labels of the steps that led to it. tried: candidates. failed: those that
    could not be used. finished: no step from `best` helps, as opposed to time having run out."""

    best: Schedule
    gained: list[str] = field(default_factory=list)
    tried: int = 0
    failed: int = 0
    finished: bool = False


def search(start: Schedule, neighbours: Neighbours, attempt: Try, enough: Callable[[], bool]) -> Found:
    """See the head of the module. enough: asked before each candidate."""
    found = Found(start)
    tried: set[str] = {_text(start)}
    helpful: list[str] = []
    while True:
        step = _better(found, neighbours, attempt, enough, tried, helpful)
        if step is None:
            found.finished = not enough()
            return found
        found.best = step.schedule
        found.gained.append(step.label)
        helpful[:] = [step.part, *(part for part in helpful if part != step.part)]


def _better(found: Found, neighbours: Neighbours, attempt: Try, enough: Callable[[], bool], tried: set[str],
            helpful: list[str]) -> Step | None:
    """The first step that gains, those of helpful parts first; None if none does or time is over."""
    known = {part: at for at, part in enumerate(helpful)}
    for step in sorted(neighbours(found.best), key=lambda s: known.get(s.part, len(known))):
        text = _text(step.schedule)
        if text in tried:
            continue
        if enough():
            return None
        tried.add(text)
        found.tried += 1
        ratio = attempt(step, found.best)
        if ratio is None:
            found.failed += 1
        elif ratio < 1.0 - MARGIN:
            return step
    return None


def _text(schedule: Schedule) -> str:
    return json.dumps(schedule.to_json(), sort_keys=True)
