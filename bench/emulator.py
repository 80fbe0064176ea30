"""How long the emulator takes for one tile of a matrix product: `python bench/emulator.py`.

128 x 128 x 256 in bf16, as Triton compiles it for sm_80, sm_90 and sm_100 (tests/emulate/data), parsing and all checks
included: the thread's own time, median and least of ten runs. It shall take half a second at most.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from sapper import emulate
from sapper.emulate import Options, Uninitialised

DATA = Path(__file__).parent.parent / "tests" / "emulate" / "data"
TILES = {"triton_matmul_bf16_sm80": 49152, "triton_matmul_bf16_sm90": 65536, "triton_matmul_bf16_sm100": 81936}
"""Files, and the bytes of shared memory that they ask for."""
RUNS = 10
M, N, K = 128, 128, 256


def seconds_of(name: str, shared_bytes: int) -> float:
    """Of one run. Raises AssertionError for a wrong product."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in ((M, K), (K, N)))
    c = np.zeros((M, N), np.float32)
    scratch = [np.int64(0), np.int64(0)]        # Triton's, which stay unused
    start = time.thread_time()
    module = emulate.load((DATA / f"{name}.ptx").read_text(encoding="utf-8"))
    module.launch(grid=(1, 1), shared_bytes=shared_bytes,
                  arguments=[a, b, Uninitialised(c), M, N, K, K, N, N, *scratch], options=Options(tensor_fences=False))
    taken = time.thread_time() - start
    np.testing.assert_allclose(c, a.astype(np.float32) @ b.astype(np.float32), rtol=1e-4, atol=1e-3)
    return taken


def main() -> None:
    for name, shared_bytes in TILES.items():
        times = [seconds_of(name, shared_bytes) for _ in range(RUNS)]
        print(f"{name}: {statistics.median(times):.2f} s, at least {min(times):.2f} s")


if __name__ == "__main__":
    main()
