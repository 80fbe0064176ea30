"""`sapper check`: kernels on random and hostile inputs, at every station of the compiler."""

from __future__ import annotations

import sys
from typing import Any

from .errors import is_told
from .kernels import Found, find_kernels, find_target, library_kernels, parse_schedule


def run_check(
    wanted: str | None, target_name: str | None, seed: int, runs: int, schedule: str | None, json: bool
) -> tuple[int, list[dict[str, Any]]]:
    """(exit status, one object for each kernel). Without json a line for each kernel is printed as it is done.

    wanted: see find_kernels; None: the whole library.
    """
    target = find_target(target_name)
    chosen = parse_schedule(schedule)
    results = []
    for found in library_kernels() if wanted is None else find_kernels(wanted):
        result = _check(found, target, seed, runs, chosen, progress=not json and sys.stderr.isatty())
        results.append(result)
        if not json:
            print("\n".join(_lines(wanted, result, seed, runs)), flush=True)
    return 0 if all(r["ok"] for r in results) else 1, results


def _check(found: Found, target: Any, seed: int, runs: int, schedule: Any, progress: bool) -> dict[str, Any]:
    from ..runtime.check import check_kernel
    from ..tile.schedule import ScheduleError

    def tell(label: str) -> None:
        if progress:
            print(f"\r\033[K{found.name}: {label}", end="", file=sys.stderr, flush=True)

    extra: dict[str, Any] = {} if found.entry is None else {
        "make_arguments": found.entry.make_arguments, "shapes": found.entry.check_shapes,
    }
    if target.assembler_allocates:
        from ..emulate import run
        from ..emulate.by_hand import verify

        extra["emulate"] = run
        extra["verify_by_hand"] = lambda kernel, made, target, seed, runs: verify(kernel, made, target, run, seed, runs)
    try:
        result = check_kernel(found.kernel, target, seed, runs, schedule, on_case=tell, **extra).to_json()
    except ScheduleError:  # of the caller, not of the kernel
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
    return result


def _lines(wanted: str | None, result: dict[str, Any], seed: int, runs: int) -> list[str]:
    name, wrong = result["kernel"], result["finding"]
    if wrong is not None:
        place = name if wanted is None else f"{wanted}:{name}" if wanted.endswith(".py") else wanted
        if not wrong["case"]:       # refused: sapper computed nothing, right or wrong
            return [f"{name}: does not compile: {wrong['message']}"]
        message = wrong["message"].replace("\n", f"\n{'':9}")
        return [f"{name}: WRONG at station `{wrong['station']}`", f"  case   {wrong['case']}",
                f"  found  {message}", f"  again  sapper check {place} --seed {seed} --runs {runs}"]
    if not result["ok"]:
        return [f"{name}: not checked: all {result['refused']} cases index outside a tensor; mend: give the extents "
                "that the kernel assumes as static sizes in its annotations"]
    stations = ", ".join(result["passed"])
    notes = [f"{result['refused']} cases refused"] if result["refused"] else []
    notes += [f"{station} left out: {why}" for station, why in result["skipped"].items()]
    return [f"{name}: right in {result['cases']} cases at {stations}" + "".join(f" ({note})" for note in notes),
            *(f"  {piece}: {proof['text']}" for piece, proof in result["proofs"].items())]
