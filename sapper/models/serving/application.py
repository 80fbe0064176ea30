"""The HTTP application: OpenAI's /v1/models, /v1/completions and /v1/chat/completions, /health and /metrics.

In: a model and limits. Out: `application`, for any ASGI server. Holds: a request has one answer or one error, in
OpenAI's form; a client that leaves, stalls or exceeds the time ends its job; nothing waits for a client but its own
answer.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send

from ..errors import ModelError
from ..load import Loaded
from ..scheduler import Job
from .engine import Engine, Full, Stopped
from .metrics import Metrics
from .requests import Request, RequestError, parse

LOOK_SECONDS = 0.25
"""How often a request looks whether its client is still there: one that gets its answer whole is not told otherwise."""


@dataclass(frozen=True, slots=True)
class Limits:
    """body_bytes: of a request. tokens: of an answer. seconds: of a request, from its arrival to its last token.
    stall_seconds: how long a client may take to send its body (connections.py has further uses).
    """

    body_bytes: int = 1 << 20
    tokens: int = 4096
    seconds: float = 600.0
    stall_seconds: float = 30.0


class Server:
    """name: of the model. key: what clients must give, or None."""

    def __init__(self, model: Loaded, name: str, engine: Engine, limits: Limits, key: str | None = None) -> None:
        self.model, self.name, self.engine, self.limits = model, name, engine, limits
        self.metrics = Metrics()
        self.started_at = int(time.time())
        self._key = key

    def application(self) -> Starlette:
        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self.engine.start()
            try:
                yield
            finally:
                await asyncio.to_thread(self.engine.close)

        routes = [
            Route("/health", self._answering(self._health, guarded=False)),
            Route("/metrics", self._answering(self._metrics)),
            Route("/v1/models", self._answering(self._models)),
            Route("/v1/models/{name:path}", self._answering(self._model)),
            Route("/v1/completions", self._answering(self._completions), methods=["POST"]),
            Route("/v1/chat/completions", self._answering(self._chat), methods=["POST"]),
        ]
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http_error})

    # ---- every request

    def _answering(self, handler: Any, guarded: bool = True) -> Any:
        """The handler with the key checked, its errors as answers, and its requests counted."""
        async def endpoint(request: HttpRequest) -> Response:
            try:
                if guarded:
                    self._check_key(request)
                response: Response = await handler(request)
            except RequestError as error:
                headers = {"Retry-After": "1"} if error.status in (429, 503) else None
                response = JSONResponse(error.body(), error.status, headers=headers)
            except ClientDisconnect:
                self.metrics.cancelled += 1
                response = Response(status_code=499)  # Nobody reads it; 499 as nginx has it in its logs.
            route = request.url.path if not request.path_params else "/v1/models/"
            self.metrics.count(route, response.status_code)
            return response

        return endpoint

    def _check_key(self, request: HttpRequest) -> None:
        if self._key is None:
            return
        given = request.headers.get("authorization", "")
        # Starlette reads headers as Latin-1: so encoded they are the bytes that came.
        if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {self._key}".encode()):
            raise RequestError(401, "the key: found another or none; expected this server's, as Authorization: Bearer",
                               "authentication_error", "invalid_api_key")

    # ---- small answers

    async def _health(self, _: HttpRequest) -> Response:
        healthy = self.engine.healthy
        return JSONResponse({"status": "ok" if healthy else "stopped"}, 200 if healthy else 503)

    async def _metrics(self, _: HttpRequest) -> Response:
        scheduler = self.engine.scheduler
        gauges = {
            "sapper_running": ("Sequences in the batch.", float(len(scheduler.running))),
            "sapper_waiting": ("Sequences that wait for a place.", float(len(scheduler.waiting))),
            "sapper_pages_free": ("Pages of the cache that nobody has.", float(scheduler.free_pages)),
            "sapper_pages": ("Pages of the cache.", float(scheduler.batch.pages)),
        }
        counters = {
            "sapper_steps_total": ("Steps run.", float(scheduler.steps)),
            "sapper_fed_tokens_total": ("Tokens that went through the model.", float(scheduler.tokens_fed)),
            "sapper_generated_tokens_total": ("Tokens made.", float(scheduler.tokens_made)),
            "sapper_evictions_total": ("Sequences that lost their pages.", float(scheduler.evictions)),
            "sapper_drafts_total": ("Tokens drafted.", float(scheduler.drafted)),
            "sapper_drafts_right_total": ("Drafts that were right.", float(scheduler.accepted)),
        }
        return PlainTextResponse(self.metrics.text(gauges, counters), media_type="text/plain; version=0.0.4")

    async def _models(self, _: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def _model(self, request: HttpRequest) -> Response:
        name = request.path_params["name"]
        if name != self.name:
            raise RequestError(404, f"found no model {name[:80]!r}; expected {self.name!r}", code="model_not_found")
        return JSONResponse(self._about())

    def _about(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started_at, "owned_by": "sapper"}

    # ---- completions

    async def _completions(self, request: HttpRequest) -> Response:
        return await self._complete(request, chat=False)

    async def _chat(self, request: HttpRequest) -> Response:
        return await self._complete(request, chat=True)

    async def _body(self, request: HttpRequest) -> bytes:
        """Raises RequestError where it is too large or too slow."""
        most = self.limits.body_bytes
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.stall_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise RequestError(413, f"the body: found more than {most} bytes; expected at most {most}")
                    parts.append(part)
        except TimeoutError:
            raise RequestError(408, f"the body: found no end of it after {self.limits.stall_seconds:g} s; expected it "
                               "sooner") from None
        return b"".join(parts)

    async def _complete(self, http: HttpRequest, chat: bool) -> Response:
        arrived = time.monotonic()
        body = await self._body(http)
        # A long prompt takes the tokenizer a while: others are answered meanwhile.
        request = await asyncio.to_thread(
            parse, body, chat, self.model, self.name, self.engine.scheduler.batch.context, self.limits.tokens)
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[str, str]]()

        def told(piece: str, job: Job) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, (piece, job.ending))

        job = Job(request.tokens, request.limit, request.sampling, request.stop, told)
        try:
            self.engine.submit(job)
        except Full:
            raise RequestError(429, "the queue: found it full; expected a place; mend: ask again later",
                               "rate_limit_error", "queue_full") from None
        except Stopped:
            raise RequestError(503, "the server stops", "server_error") from None
        except ModelError as error:
            raise RequestError(400, str(error)) from None
        self.metrics.prompt_tokens += len(request.tokens)
        answer = _Answer(self, http, request, job, pieces, arrived)
        if request.stream:
            return _Stream(answer.events())
        return JSONResponse(await answer.whole())


class _Answer:
    """A job's pieces as what the client gets."""

    def __init__(self, server: Server, http: HttpRequest, request: Request, job: Job,
                 pieces: asyncio.Queue[tuple[str, str]], arrived: float) -> None:
        self._server, self._http, self._request, self._job = server, http, request, job
        self._pieces, self._arrived = pieces, arrived
        self._id = ("chatcmpl-" if request.chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())

    async def _each(self) -> AsyncGenerator[tuple[str, str], None]:
        """Pieces with the ending, "" but for the last. Raises RequestError, ClientDisconnect."""
        server, job = self._server, self._job
        limit, look = self._arrived + server.limits.seconds, time.monotonic() + LOOK_SECONDS
        try:
            while True:
                try:
                    piece, ending = await asyncio.wait_for(self._pieces.get(), LOOK_SECONDS)
                except TimeoutError:
                    piece, ending = "", ""
                if time.monotonic() >= look:
                    if await self._http.is_disconnected():
                        raise ClientDisconnect
                    look = time.monotonic() + LOOK_SECONDS
                if ending in ("cancelled", "failed"):
                    raise RequestError(503, "the server stops", "server_error")
                if not ending and time.monotonic() > limit:
                    raise RequestError(408, f"the answer: found no end after {server.limits.seconds:g} s", "timeout",
                                       "time_limit")
                if piece or ending:
                    yield piece, ending
                if ending:
                    return
        finally:  # Also where the client left, or stalls: then nobody wants the rest.
            if not job.ending:
                server.engine.cancel(job)
            if job.first_at:
                server.metrics.first_token.add(job.first_at - self._arrived)
            server.metrics.whole.add(time.monotonic() - self._arrived)

    def _usage(self) -> dict[str, int]:
        prompt, made = len(self._request.tokens), len(self._job.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def _object(self, choices: list[dict[str, Any]], part: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if part else "chat.completion") if self._request.chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._server.name,
                "choices": choices}

    async def whole(self) -> dict[str, Any]:
        parts, ending = [], ""
        async with aclosing(self._each()) as pieces:
            async for piece, ending in pieces:  # noqa: B007  (the last one counts)
                parts.append(piece)
        text = "".join(parts)
        content = {"message": {"role": "assistant", "content": text}} if self._request.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": _reason(ending)}
        return {**self._object([choice], False), "usage": self._usage()}

    async def events(self) -> AsyncGenerator[str, None]:
        """Server-sent events."""
        chat = self._request.chat

        def event(content: dict[str, Any], reason: str | None = None) -> str:
            choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
            return _event(self._object([choice], True))

        try:
            if chat:
                yield event({"delta": {"role": "assistant", "content": ""}})
            async with aclosing(self._each()) as pieces:
                async for piece, ending in pieces:
                    if piece:
                        yield event({"delta": {"content": piece}} if chat else {"text": piece})
                    if ending:
                        yield event({"delta": {}} if chat else {"text": ""}, _reason(ending))
            if self._request.usage:
                yield _event({**self._object([], True), "usage": self._usage()})
            yield "data: [DONE]\n\n"
        except RequestError as error:
            yield _event(error.body())
        except ClientDisconnect:
            self._server.metrics.cancelled += 1
        except (asyncio.CancelledError, GeneratorExit):
            self._server.metrics.cancelled += 1
            raise


class _Stream(StreamingResponse):
    """Events to a client; they end with it."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events = events

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        finally:
            await self._events.aclose()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


def _reason(ending: str) -> str:
    return "length" if ending in ("length", "context") else "stop"


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    """Paths and methods that are not there, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    asked = f"found {request.method} {request.url.path}"
    if error.status_code == 405:
        told = RequestError(405, f"{asked}; expected {(error.headers or {}).get('Allow', 'another method')}")
    else:
        paths = "/v1/models, /v1/completions, /v1/chat/completions, /health or /metrics"
        told = RequestError(error.status_code, f"{asked}; expected {paths}")
    return JSONResponse(told.body(), error.status_code, headers=error.headers)
