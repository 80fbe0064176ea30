"""What files were when kernels of theirs were defined: later they may hold something else.

Enters: functions, as `@kernel` is given them. Leaves: `noted`, what the file of a function was then. Holds: it costs no
more than asking for a file's facts.
"""

from __future__ import annotations

import os
from types import FunctionType
from weakref import WeakKeyDictionary

Stamp = tuple[int, int] | None
"""When a file was written, and its size; None where there is no such file."""

_of_functions: WeakKeyDictionary[FunctionType, Stamp] = WeakKeyDictionary()
_of_files: dict[str, Stamp] = {}
"""At the last kernel that was defined in it: what its kernels call was read then, too."""


def note(function: FunctionType) -> None:
    """Keep what the file of a kernel is now."""
    file = function.__code__.co_filename
    _of_functions[function] = _of_files[file] = stamp(file)


def noted(function: FunctionType) -> Stamp:
    """Of a kernel's function, or of another one in its file; None where nothing is known."""
    return _of_functions.get(function, _of_files.get(function.__code__.co_filename))


def stamp(file: str) -> Stamp:
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size
