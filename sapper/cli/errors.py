"""What a command says instead of a traceback.

Holds: `is_told` knows the errors that sapper raises for what a user wrote, passed or lacks. Any other exception is a
mistake in sapper and keeps its traceback.
"""

from __future__ import annotations

import sys


class CommandError(Exception):
    """A command that can't go on. status: the exit status, 2 where the command line itself is at fault."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class UsageError(CommandError):
    """The command line is at fault."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 2)


_TOLD = {
    "sapper.lang.errors": ("KernelError", "CallError"),
    "sapper.runtime.errors": ("LaunchError",),
    "sapper.tile.schedule": ("ScheduleError",),
    "sapper.lane.rows": ("LoweringError",),
    "sapper.codegen.select": ("SelectionError",),
    "sapper.codegen.row_facts": ("AllocationError",),
    "sapper.codegen.encode": ("EncodeError",),
    "sapper.codegen.c_abi": ("BuildError",),
    "sapper.codegen.explain": ("Unexplained",),
    "sapper.targets.ptx.text": ("LevelError",),
    "sapper.targets.x86_64.detect": ("UnsupportedCPU",),
    "sapper.emulate.errors": ("EmulationError",),
    "sapper.ahead.errors": ("AheadError",),
    "sapper.models.errors": ("ModelError",),
    "sapper.tune.tuner": ("ShapeError",),
}


def is_told(error: BaseException) -> bool:
    """Whether an error is shown as a message. Modules that are not loaded can't have raised it."""
    if isinstance(error, CommandError):
        return True
    for module, names in _TOLD.items():
        loaded = sys.modules.get(module)
        if loaded is not None and isinstance(error, tuple(getattr(loaded, name) for name in names)):
            return True
    return False
