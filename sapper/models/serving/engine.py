"""The thread that runs a scheduler, and the limits on what it takes.

In: jobs of any thread. Out: their tokens, told by the engine's thread. Holds: a job that was taken is told its end,
also where the engine stops or fails; one that was not taken raises.
"""

from __future__ import annotations

import logging
import threading

from ..scheduler import Job, Scheduler

_log = logging.getLogger("sapper.serve")


class Full(Exception):
    """As many jobs wait as may."""


class Stopped(Exception):
    """The engine has stopped or failed."""


class Engine:
    """scheduler: what it runs. queue: how many jobs may wait. failure: what ended it, if something did."""

    def __init__(self, scheduler: Scheduler, queue: int) -> None:
        self.scheduler = scheduler
        self.failure: BaseException | None = None
        self._queue = queue
        self._changed = threading.Condition()
        self._closing = False
        self._inbox: list[Job] = []
        self._thread = threading.Thread(target=self._run, name="sapper-engine", daemon=True)

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Raises Full, Stopped, or ModelError for a job that cannot be."""
        with self._changed:
            if not self.healthy:
                raise Stopped
            scheduler = self.scheduler
            here = len(self._inbox) + len(scheduler.waiting) + len(scheduler.running)
            if here >= scheduler.batch.slots + self._queue:
                raise Full
            scheduler.check(job)
            self._inbox.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody wants its tokens any more; no harm if it has ended."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    def close(self, seconds: float = 10.0) -> None:
        """Cancel all jobs and end the thread, after the step that runs."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _run(self) -> None:
        scheduler = self.scheduler
        try:
            while True:
                with self._changed:
                    while scheduler.idle and not self._inbox and not self._closing:
                        self._changed.wait()
                    if self._closing:
                        break
                    scheduler.waiting += self._inbox
                    self._inbox.clear()
                scheduler.step()
        except BaseException as error:
            self.failure = error
            _log.exception("the engine failed")
        finally:
            with self._changed:
                self._closing = True
                scheduler.waiting += self._inbox
                scheduler.fail()
