"""`sapper serve`: a model behind HTTP, as OpenAI's API has it.

In: the command's settings. Out: a server that runs until SIGINT or SIGTERM; what it does is told on stderr. Holds: the
exit status is 0 where it was asked to stop once it listened, 1 where it could not start or failed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import sys
import time

from ..runtime.signals import NUMBERS
from .errors import CommandError

KEY_VARIABLE = "SAPPER_SERVE_KEY"


def run_serve(
    model: str, *, host: str, port: int, key: str | None, name: str | None, slots: int, context: int | None,
    pages: int | None, queue: int, body_bytes: int, tokens: int, seconds: float, stall_seconds: float,
    threads: int | None, dtype: str, speculate: bool, adapter: str | None = None,
) -> int:
    """Serve. key: None takes that of the environment variable KEY_VARIABLE, if it is set. name: of the model, for
    clients (None: as given on the command line). slots: sequences at once. queue: how many more may wait. speculate:
    draft with the model's MTP head. adapter: a directory with one, which is added to the weights. Other limits:
    models/serving/application.py."""
    try:
        from ..models.load import load_model
        from ..models.scheduler import Scheduler
        from ..models.serving import connections
        from ..models.serving.application import Limits, Server
        from ..models.serving.engine import Engine
    except ImportError as error:
        raise CommandError(f"{error}; mend: pip install 'sapper[models,serve]'") from None
    key = key or os.environ.get(KEY_VARIABLE) or None
    listener = _listen(host, port)
    with contextlib.closing(listener):
        started = time.perf_counter()
        loaded = load_model(model, dtype, speculate, adapter=adapter)
        longest = min(loaded.positions, 4096) if context is None else context
        batch = loaded.batch(slots, longest, pages, threads=threads, speculate=speculate)
        batch.prepare()
        server = Server(loaded, name or model, Engine(Scheduler(loaded, batch), queue),
                        Limits(body_bytes, tokens, seconds, stall_seconds), key)
        where = listener.getsockname()
        shown = f"[{where[0]}]" if ":" in where[0] else where[0]
        print(f"{loaded.path.name}, loaded in {time.perf_counter() - started:.1f} s; {slots} sequences of {longest} "
              f"tokens; http://{shown}:{where[1]}/v1", file=sys.stderr)
        if key is None and not ipaddress.ip_address(where[0]).is_loopback:
            print(f"warning: found no key; whoever reaches {where[0]} may ask; mend: set {KEY_VARIABLE}",
                  file=sys.stderr)
        running = connections.Listening(connections.settings(server.application(), stall_seconds), server.engine.close)

        def stop(*_: object) -> None:
            running.should_exit = True

        # uvicorn handles these two itself once it runs, and raises them again when it has stopped.
        for number in NUMBERS:
            signal.signal(number, stop)
        running.run(sockets=[listener])
    if server.engine.failure is not None:
        raise CommandError(f"the engine failed: {server.engine.failure!r}")
    print("stopped", file=sys.stderr)
    return 0 if running.started else 1


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket: an address that is taken is told before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        found = getattr(error, "strerror", None) or error
        raise CommandError(f"{host}:{port}: found {found}; expected a free address of this machine; mend: --port 0 "
                           "takes any free port") from None
    return listener
