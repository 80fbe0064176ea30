"""The entry point of the `sapper` command.

Enters: the command line. Leaves: the exit status: 0 done, 1 refused or found wrong, 2 usage, 130 Ctrl-C, 143 SIGTERM,
141 the reader of standard output went away. Holds: importing this module loads little of sapper; what a command needs
is loaded by that command, and what is missing is named with the command that installs it.
"""

from __future__ import annotations

import codecs
import errno
import gc
import io
import os
import signal
import sys

from .signals import Ended, as_ended, ending
from .warnings import warnings_as_lines

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STANDARD = (("stdin", "r", os.O_RDONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY))
"""By number. What is written to an output that nobody gave fails; what is told there is told to nobody."""
COLLECT_AFTER = 50_000
"""New objects after which Python's collector of cycles looks for dead ones. With its own 700 it runs a hundred times
while modules are loaded, which leave none."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (None: sys.argv); returns the exit status."""
    gc.set_threshold(COLLECT_AFTER)
    missing = _open_missing()
    try:
        with ending(), as_ended(), warnings_as_lines():
            return _run(sys.argv[1:] if arguments is None else arguments)
    except Ended as error:
        if error.status == 128 + signal.SIGPIPE:
            _drop_output()
        else:
            print(error, file=sys.stderr)
        return error.status
    except MemoryError as error:
        found = f"{error}" or "no memory for what was asked"
        print(f"error: found {found}; expected memory from the system; mend: free memory or raise the limit "
              "(ulimit -v)", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno == errno.EBADF and "stdout" in missing:
            _drop_output()
            print("error: standard output: found it closed; expected a file or a terminal", file=sys.stderr)
            return 1
        if error.errno not in NO_ROOM:
            raise
        _drop_output()
        where = error.filename or "standard output"
        print(f"error: {where}: found {error.strerror}; expected room for what is written", file=sys.stderr)
        return 1


def _open_missing() -> list[str]:
    """The null device where standard input, output or error is closed: else the next file, or connection, that is
    opened has its number, and gets what is printed. Returns which were."""
    missing = [name for name, _, _ in STANDARD if getattr(sys, name) is None]
    for number, (name, mode, flags) in enumerate(STANDARD):
        if name in missing:
            null = os.open(os.devnull, flags)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    return missing


def _run(arguments: list[str]) -> int:
    try:
        from .app import run
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("typer", "click", "rich"):
            raise
        print(f"error: found no package {error.name}; mend: pip install 'sapper[cli]'", file=sys.stderr)
        return 1
    if isinstance(sys.stdout, io.TextIOWrapper) and codecs.lookup(sys.stdout.encoding).name != "utf-8":
        sys.stdout.reconfigure(errors="replace")    # a terminal of Latin 1 has no bars, and no µ in ASCII
    status = run(arguments)
    sys.stdout.flush()
    return status


def _drop_output() -> None:
    """Nobody takes more: let the interpreter's last flush of stdout go nowhere rather than fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
