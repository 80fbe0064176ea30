"""How clients are let in: uvicorn's settings, and an end for a client that only holds a connection.

In: an application and limits. Out: `settings`, and `Listening` that takes them. Holds: a connection on which no request
is being answered, or whose client takes nothing of an answer, is cut after `stall_seconds`: clients who say nothing,
half a header, or do not listen, keep nobody out for long. Of a server that is asked to stop every client is told so.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST = 256
"""Connections at once; further ones get status 503."""
HEADER_BYTES = 1 << 16
GRACE_SECONDS = 5
"""How long running answers may go on once the server is asked to stop."""
PARTING_SECONDS = 1.0
"""How long clients have to take what they are told then."""
LOOK_SECONDS = 0.1
"""How often a server that stops looks whether it was asked again."""


def settings(application: Any, stall_seconds: float) -> uvicorn.Config:
    class Patient(H11Protocol):
        """Waits so long for a request, from the connection's beginning or the last answer's end, and for a client to
        take what was written, and no longer."""

        _limit: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._end_wait()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle.response_complete:  # else the next request was there already
                self._wait()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._wait()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._end_wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_wait()
            super().connection_lost(exc)

        def _wait(self) -> None:
            self._end_wait()
            self._limit = self.loop.call_later(stall_seconds, self.transport.abort)

        def _end_wait(self) -> None:
            if self._limit is not None:
                self._limit.cancel()
                self._limit = None

    return uvicorn.Config(
        application, http=Patient, ws="none", log_level="warning", access_log=False, limit_concurrency=MOST,
        h11_max_incomplete_event_size=HEADER_BYTES, server_header=False,
    )


class Listening(uvicorn.Server):
    """end_answers: makes what is being answered end with an error for its client; it may block. Left to itself uvicorn
    would cancel the tasks that answer, which clients see as a connection that breaks, and logs as failures."""

    def __init__(self, settings: uvicorn.Config, end_answers: Callable[[], None]) -> None:
        super().__init__(settings)
        self._end_answers = end_answers
        self._hurried = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Who asks a second time does not want to wait."""
        self._hurried = self.should_exit
        super().handle_exit(signal.SIGTERM, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        late = asyncio.create_task(self._end_what_is_late())
        try:
            await super().shutdown(sockets)
        finally:
            late.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await late

    async def _end_what_is_late(self) -> None:
        waited = 0.0
        while waited < GRACE_SECONDS and not self._hurried:
            await asyncio.sleep(LOOK_SECONDS)
            waited += LOOK_SECONDS
        await asyncio.to_thread(self._end_answers)
        await asyncio.sleep(PARTING_SECONDS)
        for connection in list(self.server_state.connections):  # those that still send a request, or take no answer
            connection.transport.abort()
