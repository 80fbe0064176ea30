"""`sapper emulate`: a kernel of PTX text on the emulator.

Enters: the text, the launch and the arguments as words. Leaves: checks and counters, printed. Holds: an argument is
`name=dtype[extents]`, with `:zeros`, `:empty` (reading it is an error), `:arange` or `:normal` (the default) after it,
or `name=number` for a scalar; `--expect "z = x + y"` compares arrays after the run with a NumPy expression of those
before.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .errors import CommandError, UsageError

DTYPES: dict[str, Any] = {
    "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64, "i8": np.int8, "i16": np.int16,
    "i32": np.int32, "i64": np.int64, "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
    "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2,
}
_ARRAY = re.compile(r"(\w+)\[([\d,x]*)\](?::(\w+))?")


def parse_shape(text: str, option: str) -> tuple[int, ...]:
    """ "4,2" or "4x2" as (4, 2)."""
    try:
        shape = tuple(int(word) for word in re.split(r"[,x]", text))
    except ValueError:
        raise UsageError(f"found --{option} {text!r}, expected one to three numbers: 4,2,1") from None
    if not 1 <= len(shape) <= 3 or min(shape) < 1:
        raise UsageError(f"found --{option} {text!r}, expected one to three positive numbers")
    return shape


def parse_argument(text: str, seed: int) -> tuple[str, Any, bool]:
    """(name, array or scalar, whether its elements count as written)."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"found --arg {text!r}, expected name=f32[1000] or name=1000")
    match = _ARRAY.fullmatch(value)
    if match is None:
        try:
            return name, float(value) if re.search(r"[.e]", value) else int(value, 0), True
        except ValueError:
            raise UsageError(f"found --arg {text!r}, expected name=f32[1000] or name=1000") from None
    dtype, extents, content = match.groups()
    if dtype not in DTYPES:
        raise UsageError(f"found dtype {dtype!r} in --arg {text!r}, expected one of {', '.join(DTYPES)}")
    shape = tuple(int(word) for word in re.split(r"[,x]", extents)) if extents else ()
    if content in ("zeros", "empty"):
        return name, np.zeros(shape, DTYPES[dtype]), content == "zeros"
    if content == "arange":
        return name, np.arange(int(np.prod(shape))).reshape(shape).astype(DTYPES[dtype]), True
    if content not in (None, "normal"):
        raise UsageError(f"found {content!r} in --arg {text!r}, expected zeros, empty, arange or normal")
    scale = 1 if np.dtype(DTYPES[dtype]).kind not in "iu" else 10
    return name, (np.random.default_rng(seed).standard_normal(shape) * scale).astype(DTYPES[dtype]), True


def run_emulate(file: str, kernel: str | None, grid: str, block: str | None, cluster: str | None, arguments: list[str],
                shared_bytes: int, options: Any, expectations: list[str], cooperative: bool,
                seed: int) -> dict[str, Any]:
    """Run it; the facts to print. options: of the emulator (`emulate.Options`). Raises CommandError where an
    expectation does not hold."""
    from .. import emulate

    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise CommandError(f"can't read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CommandError(f"{file} at byte {error.start}: found no text; expected PTX, not what an assembler made of "
                           "it") from None
    module = emulate.load(text)
    values = [parse_argument(word, seed + number) for number, word in enumerate(arguments)]
    if len({name for name, _, _ in values}) < len(values):
        raise UsageError(f"found --arg {', '.join(name for name, _, _ in values)}, expected a name of its own for each")
    before = {name: value.copy() if isinstance(value, np.ndarray) else value for name, value, _ in values}
    passed = [value if written else emulate.Uninitialised(value) for _, value, written in values]
    result = module.launch(
        kernel, grid=parse_shape(grid, "grid"), block=parse_shape(block, "block") if block else None,
        cluster=parse_shape(cluster, "cluster") if cluster else None, arguments=passed, shared_bytes=shared_bytes,
        cooperative=cooperative, options=options)
    after = {name: value for name, value, _ in values if isinstance(value, np.ndarray)}
    return {"counters": asdict(result.counters), "checked": [expect(line, before, after) for line in expectations]}


def expect(line: str, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Compare an array after the run with an expression of the arguments before it."""
    name, equals, expression = line.partition("=")
    name = name.strip()
    if not equals or name not in after:
        raise UsageError(f"found --expect {line!r}, expected ARRAY = EXPRESSION with an array of {', '.join(after)}")
    wide = {key: value.astype(np.float64) if isinstance(value, np.ndarray) else value for key, value in before.items()}
    found = after[name].astype(np.float64)
    functions: dict[str, Any] = {
        f.__name__: f for f in (abs, bool, enumerate, float, int, len, max, min, range, round, sum, zip)}
    functions["__import__"] = __import__  # methods of arrays import modules as they run
    try:
        wanted = np.asarray(eval(expression, {**wide, "np": np, "__builtins__": functions}), np.float64)
        wanted = np.broadcast_to(wanted, found.shape)
    except Exception as error:
        raise UsageError(f"--expect {line!r}: {type(error).__name__}: {error}; expected a NumPy expression of "
                         f"{', '.join(wide)}, of the shape of {name}") from None
    difference = float(np.abs(found - wanted).max()) if found.size else 0.0
    scale = float(np.abs(wanted).max()) if wanted.size else 0.0
    dtype = after[name].dtype
    information: Any = ml_dtypes.finfo
    bits = 0 if dtype.kind in "iu" else float(information(dtype).eps)
    if not difference <= 8 * bits * max(scale, 1.0):
        raise CommandError(f"{name} differs from {expression.strip()} by up to {difference:.3g}")
    return {"name": name, "expression": expression.strip(), "largest_difference": difference}


def report(facts: dict[str, Any]) -> list[str]:
    """Lines to print."""
    counters = facts["counters"]
    lines = [f"{entry['name']} = {entry['expression']}: holds, largest difference {entry['largest_difference']:.3g}"
             for entry in facts["checked"]]
    instructions = sorted(counters["instructions"].items(), key=lambda item: (-item[1], item[0]))
    lines.append(f"instructions of warps: {sum(count for _, count in instructions)}")
    lines += [f"  {count:>8}  {name}" for name, count in instructions]
    lines.append(f"shared memory: {counters['shared_accesses']} accesses, {counters['shared_cycles']} cycles "
                 f"({counters['shared_ideal']} without bank conflicts)")
    lines.append(f"global memory: {counters['global_accesses']} accesses, {counters['global_sectors']} sectors of 32 "
                 f"bytes "
                 f"({counters['global_ideal']} at least)")
    return lines
