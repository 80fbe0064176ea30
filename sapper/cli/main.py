"""The entry point of the `sapper` command.

Enters: the command line. Leaves: the exit status: 0 done, 1 refused or found wrong, 2 usage, 130 Ctrl-C, 141 the reader
of standard output went away. Holds: importing this module loads nothing of sapper but itself; what a command needs is
loaded by that command, and what is missing is named with the command that installs it.
"""

from __future__ import annotations

import os
import sys

INTERRUPTED, PIPE_CLOSED = 130, 141


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (None: sys.argv); returns the exit status."""
    try:
        try:
            from .app import run
        except ImportError as error:
            if (error.name or "").split(".")[0] not in ("typer", "click", "rich"):
                raise
            print(f"error: found no package {error.name}; mend: pip install 'sapper[cli]'", file=sys.stderr)
            return 1
        status = run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Nobody reads any more: let the interpreter's last flush of stdout go nowhere rather than fail.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        return PIPE_CLOSED


def entry() -> None:
    """For `python -m sapper.cli.main`."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
