"""`sapper check`: kernels on random and hostile inputs, at every station of the compiler."""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

from .errors import CommandError, UsageError, is_told
from .kernels import (
    Found,
    find_function,
    find_kernels,
    find_target,
    kernel_dims,
    library_kernels,
    parse_dims,
    parse_schedule,
)


def run_check(
    wanted: str | None, target_name: str | None, seed: int, runs: int, schedule: str | None, json: bool,
    arguments: str | None = None, shapes: Sequence[str] = (),
) -> tuple[int, list[dict[str, Any]]]:
    """(exit status, one object for each kernel). Without json a line for each kernel is printed as it is done.

    wanted: see find_kernels; None: the whole library. arguments: a function of the file that makes them of a NumPy
    generator and a dict of extents. shapes: such as N=576,K=64.
    """
    target = find_target(target_name)
    chosen = parse_schedule(schedule)
    kernels = library_kernels() if wanted is None else find_kernels(wanted)
    make = None if arguments is None or wanted is None else find_function(wanted, arguments)
    again = "".join(f" --{option} {shlex.quote(value)}" for option, values in (
        ("arguments", [arguments] if arguments else []), ("shape", shapes)) for value in values)
    results = []
    for found in kernels:
        extra: dict[str, Any] = {} if found.entry is None else {
            "make_arguments": found.entry.make_arguments, "shapes": found.entry.check_shapes}
        if make is not None:
            extra["make_arguments"] = _maker(found, make)
        if shapes:
            extra["shapes"] = tuple(_shape(found, text) for text in shapes)
        result = _check(found, target, seed, runs, chosen, not json and sys.stderr.isatty(), extra)
        results.append(result)
        if not json:
            print("\n".join(_lines(wanted, result, f"--seed {seed} --runs {runs}{again}")), flush=True)
    return 0 if all(r["ok"] for r in results) else 1, results


def _shape(found: Found, text: str) -> dict[str, int]:
    """The extents of all dimensions of a kernel. Raises CommandError."""
    shape = parse_dims(text, found.kernel, "shape")
    lacking = [dim for dim in kernel_dims(found.kernel) if dim not in shape]
    if lacking:
        raise UsageError(f"--shape: found {text}; expected also an extent of {', '.join(lacking)}")
    return shape


def _maker(found: Found, make: Callable[..., Any]) -> Callable[[Any, Mapping[str, int]], dict[str, Any]]:
    """The user's function; where it fails, or makes what no call would take, this is told of it, not of the kernel."""
    from ..lang.errors import CallError
    from ..runtime.arguments import Parameter, Signature

    kernel = found.kernel
    names = [name for name, _ in kernel.parameters]
    signature = Signature(kernel.name, [Parameter.of(*one) for one in kernel.parameters],
                          kernel.options.get("in_place", ()))

    def arguments(random: Any, shape: Mapping[str, int]) -> dict[str, Any]:
        try:
            with redirect_stdout(sys.stderr):
                made = make(random, dict(shape))
        except Exception as error:
            here, *theirs = traceback.extract_tb(error.__traceback__)
            at = theirs[0] if theirs else here      # the function's line, also where a library raises
            raise CommandError(f"{at.filename}:{at.lineno}: {make.__name__} of {dict(shape)} fails: "
                               f"{type(error).__name__}: {error}") from error
        if not isinstance(made, dict) or set(made) != set(names):
            what = f"a dict of {', '.join(map(str, made)) or 'nothing'}" if isinstance(made, dict) else repr(made)
            raise CommandError(f"{make.__name__} of {dict(shape)}: found {what}; expected a dict with a value for each "
                               f"parameter of {found.name}: {', '.join(names)}")
        values = {name: made[name] for name in names}
        try:
            signature.bind(tuple(values.values()))
        except CallError as error:
            raise CommandError(f"{make.__name__} of {dict(shape)}: {error}") from error
        return values

    return arguments


def _check(found: Found, target: Any, seed: int, runs: int, schedule: Any, progress: bool,
           extra: dict[str, Any]) -> dict[str, Any]:
    from ..runtime.check import check_kernel
    from ..tile.schedule import ScheduleError

    def tell(label: str) -> None:
        if progress:
            print(f"\r\033[K{found.name}: {label}", end="", file=sys.stderr, flush=True)

    mend = ""
    if target.assembler_allocates:
        from ..emulate import run
        from ..emulate.by_hand import verify

        extra |= {"emulate": run, "verify_by_hand": lambda kernel, made, target, seed, runs: verify(
            kernel, made, target, run, seed, runs)}
    else:
        from ..emulate import code_runner

        extra["run_code"], mend = code_runner(target)
    try:
        result = check_kernel(found.kernel, target, seed, runs, schedule, on_case=tell, **extra).to_json()
    except (ScheduleError, CommandError):  # of the caller, not of the kernel
        raise
    except Exception as error:
        if not is_told(error):
            raise
        result = {"kernel": found.name, "ok": False, "cases": 0, "passed": {}, "skipped": {}, "refused": 0,
                  "proofs": {}, "finding": {"station": "front end", "case": "", "message": str(error)}}
    finally:
        if progress:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
    result["kernel"] = found.name
    if mend and "native" in result["skipped"]:
        result["skipped"]["native"] += f"; mend: {mend}"
    return result


def _lines(wanted: str | None, result: dict[str, Any], options: str) -> list[str]:
    name, wrong = result["kernel"], result["finding"]
    if wrong is not None:
        place = name if wanted is None else f"{wanted}:{name}" if wanted.endswith(".py") else wanted
        if not wrong["case"]:       # refused: sapper computed nothing, right or wrong
            return [f"{name}: does not compile: {wrong['message']}"]
        message = wrong["message"].replace("\n", f"\n{'':9}")
        return [f"{name}: WRONG at station `{wrong['station']}`", f"  case   {wrong['case']}",
                f"  found  {message}", f"  again  sapper check {place} {options}"]
    if not result["ok"]:
        return [f"{name}: not checked: all {result['refused']} cases index outside a tensor; mend: give the extents "
                "that the kernel assumes as static sizes in its annotations"]
    stations = ", ".join(result["passed"])
    notes = [f"{result['refused']} cases refused"] if result["refused"] else []
    notes += [f"{station} left out: {why}" for station, why in result["skipped"].items()]
    return [f"{name}: right in {result['cases']} cases at {stations}" + "".join(f" ({note})" for note in notes),
            *(f"  {piece}: {proof['text']}" for piece, proof in result["proofs"].items())]
