"""The examples beside NumPy and PyTorch: `python bench/examples.py [WORD] [--json FILE]`, one thread.

Each example runs in turn with the same in NumPy and, where that is installed, in PyTorch as one would write it; times
are medians of CPU time. Results are checked first. WORD: only examples whose name has it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(name, None)
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples import Example, examples  # noqa: E402
from sapper import prepare  # noqa: E402

TURNS, SAMPLE_S = 15, 2e-3


def calls_of(example: Example, torch: Any) -> dict[str, Callable[[], object]]:
    """What is timed, by the name of who does it."""
    arguments = example.make_arguments(np.random.default_rng(0), example.shape)
    inputs, results = example.split(arguments)
    calls: dict[str, Callable[[], object]] = {"sapper": prepare(example.kernel, *arguments, threads=1)}
    calls["sapper"]()
    for found, expected in zip(results, example.reference(*inputs), strict=True):
        off = np.abs(found.astype(np.float64) - expected).max()
        if off > example.tolerance * np.abs(expected).max():
            raise SystemExit(f"{example.name}: off by {off}; expected what NumPy gives")
    calls["numpy"] = lambda: example.reference(*inputs)
    if torch is not None and example.torch is not None:
        peer = example.torch
        tensors = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in inputs]
        calls["torch"] = lambda: peer(*tensors)
    return calls


def timed(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, in turns."""
    rounds: dict[str, int] = {}
    for name, call in calls.items():
        call()
        start = time.thread_time()
        call()
        rounds[name] = max(1, int(SAMPLE_S / max(time.thread_time() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            start = time.thread_time()
            for _ in range(rounds[name]):
                call()
            samples[name].append((time.thread_time() - start) / rounds[name])
    return {name: median(found) for name, found in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("word", nargs="?", default="")
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    options = parser.parse_args()
    chosen = [example for example in examples() if options.word in example.name]
    if not chosen:
        parser.error(f"word: found {options.word!r}, which is in no name; expected a part of one of "
                     f"{', '.join(example.name for example in examples())}")
    try:
        import torch

        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
    except ImportError:
        torch = None  # type: ignore[assignment]
    print("| example | shape | sapper | numpy / sapper | torch / sapper |\n|---|---|--:|--:|--:|")
    figures = []
    for example in chosen:
        found = timed(calls_of(example, torch))
        own = found["sapper"]
        ratios = [f"{found[peer] / own:.2f}" if peer in found else "" for peer in ("numpy", "torch")]
        shape = " ".join(f"{name}={extent}" for name, extent in example.shape.items())
        print(f"| {example.name} | {shape} | {own * 1e6:.4g} µs | {' | '.join(ratios)} |", flush=True)
        figures.append({"example": example.name, "shape": dict(example.shape), "seconds": found})
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
