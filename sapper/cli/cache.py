"""`sapper cache`: what the disk cache holds."""

from __future__ import annotations

import json
import time
from typing import Any

HEAD_BYTES = 80
"""Before the payload of an entry; see sapper/runtime/cache.py."""


def show() -> dict[str, Any]:
    """directory (None: switched off), size_bytes, limit_bytes, entries: name, size, time of the last use."""
    from ..runtime.cache import disk_cache

    cache = disk_cache()
    if cache is None:
        return {"directory": None, "size_bytes": 0, "limit_bytes": 0, "entries": []}
    entries = [
        {"name": _name(e.path), "size_bytes": e.size_bytes, "path": e.path,
         "used_at": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(e.used_at))}
        for e in cache.entries()
    ]
    return {"directory": cache.directory, "size_bytes": cache.total_bytes(), "limit_bytes": cache.limit_bytes,
            "entries": entries}


def _name(path: str) -> str:
    """From the line of JSON at the head of the payload: of a kernel, of code of the runtime, of a layout."""
    try:
        with open(path, "rb") as file:
            file.seek(HEAD_BYTES)
            return str(json.loads(file.readline())["name"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "(damaged)"


def clear() -> int:
    """Drop every entry; how many there were."""
    from ..runtime.cache import disk_cache

    cache = disk_cache()
    return 0 if cache is None else cache.clear()
