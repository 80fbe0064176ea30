"""The bytes of a file, read where they are asked for.

In: a path. Out: `FileBytes` and its parts. Holds: files are read and never mapped. A mapped file that is cut short
while it is used ends the process with SIGBUS at the next byte that is gone; here it raises ModelError.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .errors import ModelError


class FileBytes:
    """len(): bytes of the file, as it was opened."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, also for an empty file."""
        self.path = path
        self._file = path.open("rb", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size
        if not self._size:
            raise OSError(f"{path} is empty")

    def __len__(self) -> int:
        return self._size

    def read(self, start: int, stop: int) -> memoryview:
        """Raises ModelError where the file has become shorter, or cannot be read."""
        view, done = np.empty(stop - start, np.uint8).data, 0
        while done < len(view):
            try:
                count = os.preadv(self._file.fileno(), [view[done:]], start + done)
            except OSError as error:
                raise ModelError(self.path, f"{error} at byte {start + done}", "a file that can be read") from None
            if not count:
                raise ModelError(self.path, f"no byte {start + done}: the file was cut short while it was read",
                                 f"{self._size} bytes, as when it was opened", "get the file again")
            done += count
        return view

    def part(self, start: int, stop: int) -> Stored:
        return Stored(self, start, stop)


class Stored:
    """A part of a file. len(): its bytes."""

    def __init__(self, file: FileBytes, start: int, stop: int) -> None:
        self._file, self._start, self._stop = file, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def read(self) -> memoryview:
        """Raises ModelError, as FileBytes.read."""
        return self._file.read(self._start, self._stop)

    def part(self, start: int, stop: int) -> Stored:
        return Stored(self._file, self._start + start, self._start + stop)
