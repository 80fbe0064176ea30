"""Writing a command's output: whole or not at all.

Holds: a reader never sees half a file, under a full disk, an interrupt or a crash; what was there before stays.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .errors import CommandError


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write files beside their place and rename them when all are whole. Raises CommandError."""
    written: list[tuple[str, Path]] = []
    path = Path()
    try:
        for path, content in contents.items():
            if path.is_dir():
                raise CommandError(f"{path}: found a directory; expected the name of a file")
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent or ".")
            written.append((temporary, path))
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
        for temporary, path in written:
            os.replace(temporary, path)
    except OSError as error:
        raise CommandError(f"{path}: the file can't be written: {error.strerror or error}; expected a directory that "
                           "can be written, with room for the file") from None
    finally:
        for temporary, _ in written:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
