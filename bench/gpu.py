"""`sapper bench gpu` with Triton's kernels of gpu_static_triton.py among the peers: `python bench/gpu.py`."""

from __future__ import annotations

from sapper.cli.bench_gpu import main

if __name__ == "__main__":
    raise SystemExit(main())
