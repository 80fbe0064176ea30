"""The environment variables that the runtime reads, each in one place.

SAPPER_THREADS     workers of a launch; default: the CPUs that this process may use
SAPPER_SPIN        microseconds that a worker without work spins before it sleeps; default 50
SAPPER_INTERPRET   1 runs every kernel under the reference interpreter
SAPPER_CACHE_DIR   where compiled kernels are kept; empty or "off": nowhere; default: $XDG_CACHE_HOME/sapper
SAPPER_CACHE_MIB   size limit of that directory in MiB; default 256
SAPPER_TUNED       where schedules that `sapper tune` found lie; empty or "off": none; default: "tuned" in the cache's
SAPPER_TRACE       1, or a directory: the IR after every pass; see codegen/pipeline.py. Kernels are compiled anew
SAPPER_PERF        "map" or "jitdump": tell perf of generated code; see debuggers.py. Kernels are then compiled anew
SAPPER_GDB         1 tells gdb of generated code; likewise
"""

from __future__ import annotations

import os

from .errors import LaunchError

MAX_THREADS = 1024


def _positive(name: str, default: int, most: int, least: int = 1) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or not least <= int(text) <= most:
        raise LaunchError(f"{name}: found {text!r}; expected a whole number from {least} to {most}; mend: unset it")
    return int(text)


def available_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def threads() -> int:
    return _positive("SAPPER_THREADS", min(available_cpus(), MAX_THREADS), MAX_THREADS)


def spin_us() -> int:
    """How long a worker without work spins before it sleeps: about what waking it costs, so that at worst it spins
    as long as the launch that comes after would have waited."""
    return _positive("SAPPER_SPIN", 50, 500_000, 0)


def interpret() -> bool:
    return os.environ.get("SAPPER_INTERPRET", "").strip().lower() not in ("", "0", "false", "off", "no")


def cache_directory() -> str | None:
    """Where compiled kernels are kept; None when the user wants no cache."""
    chosen = os.environ.get("SAPPER_CACHE_DIR")
    if chosen is not None:
        return None if chosen.strip() in ("", "off", "0") else os.path.expanduser(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "sapper")


def tuned_directory() -> str | None:
    """Where the user's own tuned schedules lie; None when they shall not be used."""
    chosen = os.environ.get("SAPPER_TUNED")
    if chosen is not None:
        return None if chosen.strip() in ("", "off", "0") else os.path.expanduser(chosen)
    cache = cache_directory()
    return None if cache is None else os.path.join(cache, "tuned")


def perf() -> str:
    """How perf is told of generated code: "map", "jitdump", or "" for not at all."""
    chosen = os.environ.get("SAPPER_PERF", "").strip().lower()
    if chosen in ("", "0", "off"):
        return ""
    if chosen not in ("map", "jitdump"):
        raise LaunchError(f"SAPPER_PERF: found {chosen!r}; expected map or jitdump; mend: unset it")
    return chosen


def gdb() -> bool:
    return os.environ.get("SAPPER_GDB", "").strip().lower() not in ("", "0", "false", "off", "no")


def trace() -> bool:
    """Whether the IR is shown after every pass. Raises LaunchError for a directory that cannot be written."""
    where = os.environ.get("SAPPER_TRACE", "")
    if where not in ("", "0", "1"):
        try:
            os.makedirs(where, exist_ok=True)
            found = "" if os.access(where, os.W_OK) else "permission denied"
        except OSError as error:
            found = str(error.strerror)
        if found:
            raise LaunchError(f"SAPPER_TRACE: found {where!r}, {found}; expected 1, or a directory that can be "
                              "written; mend: name another one, or unset it")
    return where not in ("", "0")


def debugging() -> bool:
    """Whether any tool is to be told of code."""
    return perf() != "" or gdb()


def cache_limit_bytes() -> int:
    return _positive("SAPPER_CACHE_MIB", 256, 1 << 20) << 20
