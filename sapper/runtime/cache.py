"""Compiled kernels on disk.

Enters: a key (any bytes or text that say all that the entry depends on) and a payload. Leaves: the payload, or None.
Holds: a reader sees a whole entry or none. An entry is one file, written beside its place and renamed into it, so two
processes or a kill at any moment leave at worst a stray temporary file. Its head repeats the key's digest and holds the
payload's: a truncated, damaged or foreign file is told from a good one, dropped, and compiled anew (one warning).
A cache that can't be written is given up for the process, with one warning; nothing depends on it.

    offset 0   8   magic "SAPPERK1"
           8  32   SHA-256 of the key
          40   8   length of the payload, little-endian
          48  32   SHA-256 of the payload
          80   -   payload
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

from . import settings
from .errors import warn_once

MAGIC = b"SAPPERK1"
SUFFIX = ".kernel"
_HEAD = struct.Struct("<8s32sQ32s")
_TEMPORARY = ".writing-"
_STALE_SECONDS = 3600.0
_TOUCH_SECONDS = 60.0
_SWEEP_EVERY = 32
_ATTEMPTS = 8


class CacheEntry(NamedTuple):
    """One file of the cache: path, size in bytes, time of the last use in seconds since the epoch."""

    path: str
    size_bytes: int
    used_at: float


class DiskCache:
    """A directory of entries, the least recently used of which are dropped above limit_bytes."""

    def __init__(self, directory: str, limit_bytes: int) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes
        self._writable = True
        self._writes = 0

    def path(self, key: str | bytes) -> str:
        return os.path.join(self.directory, _digest(key).hex() + SUFFIX)

    def get(self, key: str | bytes) -> bytes | None:
        """The payload of a key; None when there is no sound entry."""
        digest = _digest(key)
        path = os.path.join(self.directory, digest.hex() + SUFFIX)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._give_up("read", error)
            return None
        try:
            status = os.fstat(descriptor)
            content = _read_all(descriptor, status.st_size)
        except OSError as error:
            self._give_up("read", error)
            return None
        finally:
            os.close(descriptor)
        payload = _open_entry(content, digest)
        if payload is None:
            warn_once(
                "cache-damaged",
                f"{path} is damaged or was written by something else; it is dropped and the kernel compiled again",
            )
            _remove(path)
            return None
        if time.time() - status.st_mtime > _TOUCH_SECONDS:
            _touch(path)
        return payload

    def put(self, key: str | bytes, payload: bytes) -> bool:
        """Keep a payload; False when it could not be kept."""
        if not self._writable:
            return False
        digest = _digest(key)
        head = _HEAD.pack(MAGIC, digest, len(payload), hashlib.sha256(payload).digest())
        for attempt in range(_ATTEMPTS):
            temporary = os.path.join(self.directory, f"{_TEMPORARY}{os.getpid()}-{os.urandom(6).hex()}")
            try:
                os.makedirs(self.directory, mode=0o700, exist_ok=True)
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                try:
                    _write_all(descriptor, head + payload)
                finally:
                    os.close(descriptor)
                os.replace(temporary, os.path.join(self.directory, digest.hex() + SUFFIX))
                break
            except FileNotFoundError as error:  # another process cleared the cache, and this file with it
                if attempt == _ATTEMPTS - 1:
                    self._give_up("write", error)
                    return False
            except OSError as error:
                _remove(temporary)
                self._give_up("write", error)
                return False
        if self._writes % _SWEEP_EVERY == 0:
            self.evict()
        self._writes += 1
        return True

    def entries(self) -> list[CacheEntry]:
        """All entries, the most recently used first."""
        found = [e for e in self._files() if e.path.endswith(SUFFIX)]
        return sorted(found, key=lambda e: (-e.used_at, e.path))

    def total_bytes(self) -> int:
        return sum(e.size_bytes for e in self.entries())

    def clear(self) -> int:
        """Drop every entry and stray temporary file; the number of entries dropped."""
        files = self._files()
        for entry in files:
            _remove(entry.path)
        return sum(entry.path.endswith(SUFFIX) for entry in files)

    def evict(self) -> int:
        """Drop the least recently used entries until four fifths of the limit are left, if it is passed, and
        temporary files that a killed process left; the number of entries dropped."""
        entries = []
        for entry in self._files():
            if entry.path.endswith(SUFFIX):
                entries.append(entry)
            elif time.time() - entry.used_at > _STALE_SECONDS:
                _remove(entry.path)
        total_bytes = sum(e.size_bytes for e in entries)
        if total_bytes <= self.limit_bytes:
            return 0
        dropped = 0
        for entry in sorted(entries, key=lambda e: (e.used_at, e.path)):
            if total_bytes * 5 <= self.limit_bytes * 4:
                break
            _remove(entry.path)
            total_bytes -= entry.size_bytes
            dropped += 1
        return dropped

    def _files(self) -> list[CacheEntry]:
        found = []
        try:
            with os.scandir(self.directory) as listing:
                for item in listing:
                    if not item.name.endswith(SUFFIX) and not item.name.startswith(_TEMPORARY):
                        continue
                    try:
                        status = item.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue  # another process dropped it
                    found.append(CacheEntry(item.path, status.st_size, status.st_mtime))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return found

    def _give_up(self, action: str, error: OSError) -> None:
        self._writable = False
        warn_once(
            "cache-unusable",
            f"can't {action} the compile cache {self.directory} ({error.strerror}); kernels are compiled in every "
            "process; mend: free space, or set SAPPER_CACHE_DIR to a writable directory",
        )


def _digest(key: str | bytes) -> bytes:
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()


def _open_entry(content: bytes, digest: bytes) -> bytes | None:
    if len(content) < _HEAD.size:
        return None
    magic, key_digest, length, payload_digest = _HEAD.unpack_from(content)
    payload = content[_HEAD.size :]
    if magic != MAGIC or key_digest != digest or length != len(payload):
        return None
    return payload if hashlib.sha256(payload).digest() == payload_digest else None


def _read_all(descriptor: int, size_bytes: int) -> bytes:
    parts = []
    while part := os.read(descriptor, size_bytes + 1):
        parts.append(part)
    return b"".join(parts)


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _remove(path: str) -> bool:
    """Unlink; False when it is gone already or may not be."""
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def _touch(path: str) -> bool:
    """Mark as used now; False when it is gone already or may not be."""
    try:
        os.utime(path)
    except OSError:
        return False
    return True


_open: dict[tuple[str, int], DiskCache] = {}


def disk_cache() -> DiskCache | None:
    """The cache that the environment asks for; None when it asks for none."""
    directory = settings.cache_directory()
    if directory is None:
        return None
    key = (directory, settings.cache_limit_bytes())
    cache = _open.get(key)
    if cache is None:
        cache = _open[key] = DiskCache(*key)
    return cache


_USERS_OF_THE_COMPILER = frozenset({"ahead", "cli", "emulate", "kernels", "models", "tune"})
"""Packages after `runtime` in docs/layers.md: nothing that code depends on imports them."""

_toolchain: str | None = None


def toolchain_key() -> str:
    """Size and time of each source file that compiled code may depend on: an edited compiler never meets old code."""
    global _toolchain
    if _toolchain is None:
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        lines = []
        pending = [root]
        while pending:
            with os.scandir(pending.pop()) as listing:
                for item in listing:
                    if item.name.endswith(".py"):
                        status = item.stat()
                        lines.append(f"{item.path[len(root) :]} {status.st_size} {status.st_mtime_ns}")
                    elif (item.is_dir(follow_symlinks=False) and item.name != "__pycache__"
                            and item.path[len(root) + 1 :] not in _USERS_OF_THE_COMPILER):
                        pending.append(item.path)
        _toolchain = "\n".join(sorted(lines))
    return _toolchain


def kept_code(name: str, make: Callable[[], tuple[bytes, dict[str, int]]]) -> tuple[bytes, dict[str, int]]:
    """Machine code of the runtime and its labels, from the cache when it is there: a process that compiles nothing need
    not load the encoder and the instruction table, which takes longer than everything else here."""
    cache = disk_cache()
    key = f"{name}\n" + toolchain_key()
    packed = cache.get(key) if cache is not None else None
    if packed is not None:
        head, _, code = packed.partition(b"\n")
        return code, json.loads(head)["labels"]
    code, offsets = make()
    if cache is not None:
        cache.put(key, json.dumps({"name": name, "labels": offsets}).encode() + b"\n" + code)
    return code, offsets
