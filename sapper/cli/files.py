"""Writing a command's output: whole or not at all.

Holds: a reader never sees half a file, under a full disk, an interrupt or a crash; what was there before stays. What is
no plain file is not replaced.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from ..runtime.signals import held
from .errors import CommandError

Create = Callable[..., AbstractContextManager[BinaryIO]]


def write_files(contents: Mapping[Path, bytes], executable: Collection[Path] = ()) -> None:
    """Write files beside their place and rename them when all are whole. Raises CommandError."""
    with staging() as create:
        for path, content in contents.items():
            with create(path, 0o777 if path in executable else 0o666) as file:
                file.write(content)


@contextlib.contextmanager
def staging() -> Iterator[Create]:
    """Gives a function that opens a file beside its place, and may be told its permissions; at the end all files are
    renamed, or after an error none is there.

    Raises CommandError for what the system refuses.
    """
    written: list[tuple[str, Path]] = []
    current = Path()

    @contextlib.contextmanager
    def create(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
        nonlocal current
        current = path
        place = Path(os.path.realpath(path))  # of a link, what it leads to
        if place.exists() and not place.is_file():  # a device would be gone
            found = "a directory" if place.is_dir() else "no plain file"
            raise CommandError(f"{path}: found {found}; expected the name of a file")
        if place in (other for _, other in written):
            raise CommandError(f"{path}: found two files of that name; expected a name for each")
        handle, temporary = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
        written.append((temporary, place))
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode & ~_umask())

    try:
        yield create
        with held():  # all of them or none
            for temporary, path in written:
                os.replace(temporary, path)
    except OSError as error:
        raise CommandError(f"{current}: the file can't be written: {error.strerror or error}; expected a directory "
                           "that can be written, with room for the file") from None
    finally:
        with held():
            for temporary, _ in written:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
