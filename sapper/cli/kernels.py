"""Which kernels a command line means, and what they are compiled for.

Enters: `FILE.py`, `FILE.py:KERNEL` or the name of a library kernel, and options as text. Leaves: `Found` kernels,
targets, specialisations. Holds: a user's file is imported under a name of its own (never `__main__`), what it prints
goes to stderr, and whatever it raises becomes a CommandError that names its line.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .errors import CommandError, UsageError


@dataclass(frozen=True, slots=True)
class Found:
    """name: as the user calls it. entry: what the library knows of it, or None."""

    name: str
    kernel: Any
    entry: Any = None


def find_kernels(wanted: str) -> list[Found]:
    """The kernels that a command line names: one, or all of a file. Raises CommandError."""
    path, _, name = wanted.rpartition(":")
    if not path and (wanted.endswith(".py") or os.sep in wanted):
        path, name = wanted, ""
    if path:
        return _in_file(path, name)
    entries = {found.name: found for found in library_kernels()}
    if wanted in entries:
        return [entries[wanted]]
    near = get_close_matches(wanted, entries, 3)
    raise UsageError(f"found no library kernel {wanted!r}; expected FILE.py:KERNEL, or one that `sapper kernels` lists"
                     + (f"; mend: perhaps {' or '.join(near)}" if near else ""))


def library_kernels() -> list[Found]:
    """All kernels of the library."""
    from ..kernels import library

    return [Found(entry.name, entry.kernel, entry) for entry in library()]


def find_kernel(wanted: str) -> Found:
    """The one kernel that a command line names. Raises CommandError."""
    found = find_kernels(wanted)
    if len(found) != 1:
        names = ", ".join(f.name for f in found)
        raise UsageError(f"{wanted} has {len(found)} kernels; expected one; mend: write {wanted}:NAME, one of: {names}")
    return found[0]


def _in_file(path: str, name: str) -> list[Found]:
    from ..lang.kernel import Kernel

    module = import_file(Path(path))
    all_kernels: dict[str, Any] = {}
    for variable, value in vars(module).items():
        if isinstance(value, Kernel) and not any(value is k for k in all_kernels.values()):
            all_kernels[variable] = value
    own = {n: k for n, k in all_kernels.items() if os.path.realpath(k.source_file) == os.path.realpath(path)}
    if not name:
        if not own:
            raise UsageError(f"{path}: found no kernel; expected a function with @sapper.kernel at the top level")
        return [Found(n, k) for n, k in own.items()]
    by_name = {k.name: k for k in all_kernels.values()} | all_kernels
    if name not in by_name:
        known = ", ".join(own or all_kernels) or "none"
        raise UsageError(f"{path}: found no kernel {name!r}; expected one of: {known}")
    return [Found(name, by_name[name])]


def find_function(wanted: str, name: str) -> Any:
    """A function beside the kernels of FILE.py or FILE.py:KERNEL, which were found before: the file is not imported
    again. Raises CommandError."""
    path, _, kernel = wanted.rpartition(":")
    file = path if path and not kernel.endswith(".py") else wanted
    if not file.endswith(".py"):
        raise UsageError(f"found a function {name!r} for {wanted}, which is no file; expected FILE.py[:KERNEL]")
    found = getattr(sys.modules[_module_of(Path(file).resolve())[1]], name, None)
    if not callable(found):
        what = "no such name" if found is None else f"a {type(found).__name__}"
        raise UsageError(f"{file}: {name}: found {what}; expected a function at the top level")
    return found


def import_file(path: Path) -> Any:
    """A Python file as a module. Raises CommandError with the line at fault."""
    if not path.is_file():
        found = "a directory" if path.is_dir() else "no such file"
        raise UsageError(f"{path}: found {found}; expected a file of Python")
    root, name = _module_of(path.resolve())
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise UsageError(f"{path}: found no Python source; expected a file that ends in .py")
    sys.path.insert(0, str(root))
    from ..lang.errors import KernelError

    try:
        with contextlib.redirect_stdout(sys.stderr):
            if "." in name:
                module = importlib.import_module(name)
                if os.path.realpath(module.__file__ or "") != str(path.resolve()):
                    raise ImportError(f"{name} is {module.__file__}")
                return module
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
    except KernelError:
        raise
    except (Exception, SystemExit) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path.resolve())]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else 1
        raise CommandError(f"{path}:{line}: the file can't be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(root))
    return module


def _module_of(path: Path) -> tuple[Path, str]:
    """The directory that a file is imported from, and the name it has there: a file of a package may import its
    neighbours, so it goes by its whole name."""
    root, names = path.parent, [path.stem]
    while (root / "__init__.py").is_file():
        names.insert(0, root.name)
        root = root.parent
    return (root, ".".join(names)) if len(names) > 1 else (root, f"_sapper_user_{path.stem}")


def find_target(name: str | None) -> Any:
    """The target of that name; of this CPU for None. Raises CommandError, UnsupportedCPU."""
    from ..targets import host_target, known_targets, target

    if name is None:
        return host_target()
    try:
        return target(name)
    except KeyError:
        raise UsageError(f"found no target {name!r}; expected one of: {', '.join(known_targets())}") from None
    except ValueError as error:
        raise UsageError(str(error)) from None


def parse_dims(text: str | None, kernel: Any, option: str, names: Iterable[str] = ()) -> dict[str, int]:
    """`N=576,K=64` as extents by dimension, in the order in which they are written. names: what is known, where that is
    not the dimensions of the kernel. Raises UsageError."""
    result: dict[str, int] = {}
    known = list(names) or kernel_dims(kernel)
    for part in (text or "").replace(",", " ").split():
        name, equals, value = part.partition("=")
        if not equals or not value.isdecimal():
            raise UsageError(f"--{option}: found {part!r}; expected NAME=EXTENT, such as N=576,K=64")
        if int(value) > 2**31 - 1:
            raise UsageError(f"--{option}: found {part!r}; expected an extent of at most {2**31 - 1}")
        if name not in known:
            raise UsageError(f"--{option}: found {name!r}; expected dimensions of {kernel.name}: {', '.join(known)}")
        if name in result:
            raise UsageError(f"--{option}: found {name} twice; expected one extent for each dimension")
        result[name] = int(value)
    return result


def parse_scalars(text: str | None, kernel: Any, option: str) -> dict[str, Any]:
    """`position=511,scale=0.125` as values of scalar parameters. Raises UsageError."""
    from ..runtime.arguments import integer_range

    result: dict[str, Any] = {}
    known = {name: type.dtype for name, type in kernel.parameters if not hasattr(type, "dims")}
    for part in (text or "").replace(",", " ").split():
        name, _, value = part.partition("=")
        if name not in known:
            raise UsageError(f"--{option}: found {part!r}; expected NAME=VALUE of a scalar of {kernel.name}: "
                             f"{', '.join(known) or 'it has none'}")
        dtype = known[name]
        try:
            if dtype.is_float:
                result[name] = float(value)
                continue
            low, high = (0, 1) if dtype.kind == "b" else integer_range(dtype)
            if not low <= int(value) <= high:
                raise ValueError
        except ValueError:
            wanted = "a number" if dtype.is_float else f"a whole number from {low} to {high}"
            raise UsageError(f"--{option}: found {part!r}; expected {wanted}, as {name} is {dtype.name}") from None
        result[name] = bool(int(value)) if dtype.kind == "b" else int(value)
    return result


def parse_extents(static: str | None, dims: str | None, kernel: Any) -> tuple[dict[str, int], dict[str, int]]:
    """The extents that are compiled in and the others of a call. Of dims that the kernel is specialised for the call's
    are compiled in, as they would be. Raises UsageError."""
    return compiled_in(kernel, parse_dims(static, kernel, "static"), parse_dims(dims, kernel, "dims"))


def compiled_in(kernel: Any, fixed: dict[str, int], free: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Moves the extents of dims that a kernel is specialised for to those that are fixed."""
    apart = {d: n for d, n in free.items() if d in kernel.specialise}
    return {**apart, **fixed}, {d: n for d, n in free.items() if d not in apart}


def kernel_dims(kernel: Any) -> list[str]:
    """Symbolic dimensions in order of first appearance."""
    from ..ir.extents import names_of

    return names_of(type for _, type in kernel.parameters)


def parse_schedule(text: str | None) -> Any:
    """JSON, or the name of a file that holds it, as a Schedule; None for None. Raises UsageError, ScheduleError."""
    from ..tile.schedule import Schedule

    if text is None:
        return None
    source = text
    if not text.lstrip().startswith("{"):
        try:
            source = Path(text).read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--schedule: {text}: {error.strerror}; expected JSON or a file with it") from None
    try:
        data = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--schedule: {error}; expected JSON such as '{{\"registers\": {{\"m\": 6}}}}'") from None
    if not isinstance(data, dict):
        raise UsageError(f"--schedule: found {type(data).__name__}; expected a JSON object")
    if data.get("assembly"):
        from ..kernels import by_hand as by_hand  # the library's blocks
    return Schedule.from_json(data)


def specialise(kernel: Any, static: dict[str, int], dims: dict[str, int]) -> dict[str, Any]:
    """Arguments of `compile_kernel` for a call with contiguous tensors.

    static: extents compiled in. dims: extents of the call whose code is wanted, as far as given; the others are large.
    """
    from ..runtime.specialise import LARGEST_CLASS, dim_class

    free = [d for d in kernel_dims(kernel) if d not in static]
    classes = {d: dim_class(dims[d]) if d in dims else (LARGEST_CLASS, 1) for d in free}
    tensors = {name: "contiguous" for name, type in kernel.parameters if hasattr(type, "dims")}
    return {"static_dims": static, "unit_strides": tensors, "dim_classes": classes}


def aligned_on(target: Any, kernel: Any, extents: Mapping[str, int]) -> frozenset[str]:
    """Contiguous tensors of a call whose rows all start at cache lines, for `compile_kernel`: on a GPU, where every
    allocation does (CUDA C++ Programming Guide, "Device Memory Accesses": 256 bytes), those whose rows are known to
    have whole lines. Of a CPU's nobody knows before the call."""
    from ..ir.extents import evaluate_nested, names_in
    from ..runtime.specialise import CACHE_LINE_BYTES

    if not target.lanes_are_threads:
        return frozenset()
    found = set()
    for name, type in kernel.parameters:
        dims = [evaluate_nested(d, extents) if all(n in extents for n in names_in(d)) else None
                for d in getattr(type, "dims", ())]
        row_bytes = None if not dims or dims[-1] is None else dims[-1] * type.dtype.size_bytes
        if len(dims) == 1 or (row_bytes is not None and not row_bytes % CACHE_LINE_BYTES):
            found.add(name)
    return frozenset(found)
