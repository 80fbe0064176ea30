"""Matrix products as PTX beside Triton's, without a GPU: `python bench/gpu_static.py --triton PYTHON`.

Both compilers get the same product, tile and warps, and one ptxas assembles both: that of Triton's wheel if there is
none on the path. PYTHON is an interpreter that has Triton (it compiles offline; sapper does not need it); without it
only our rows are printed. Both read rows past the end of a ragged tile from elsewhere, without masks in the loop, and
take K as a multiple of the tile's depth. Needs ptxas and nvdisasm. The figures are of the machine code: nothing is run,
and no figure is a speed.

Loop: the innermost loop with matrix instructions. Compile time: from the kernel to PTX, without ptxas, the median of
five runs that read no cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LEVEL = "sm_80"
TILE = (128, 128, 64)
WARPS, STAGES = 4, 3
RUNS = 5
COUNTED = ("HMMA", "LDSM", "LDGSTS", "BAR")
CASES = {"bf16 NN": ("bf16", "f32", False), "bf16 NT": ("bf16", "bf16", True), "f16 NN": ("f16", "f32", False)}
"""Name -> elements of a and b, of c, and whether b is (N, K)."""


def ours(case: str) -> tuple[str, list[float]]:
    """The PTX of a case, and the seconds that each compilation took."""
    import sapper as sp
    from sapper import Tensor, bf16, f16, f32, targets, tiles, zeros
    from sapper.codegen.pipeline import compile_kernel

    dtypes: dict[str, Any] = {"bf16": bf16, "f16": f16, "f32": f32}
    source, result, transposed = CASES[case]
    element, sum_element = dtypes[source], dtypes[result]
    M, N, K = sp.dims("M N K")

    @sp.kernel(name="product")
    def nn(a: Tensor[element, M, K], b: Tensor[element, K, N], c: Tensor[sum_element, M, N]):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=f32)
            for k in tiles(K):
                acc += a[m, k] @ b[k, n]
            c[m, n] = acc.to(sum_element)

    @sp.kernel(name="product")
    def nt(a: Tensor[element, M, K], b: Tensor[element, N, K], c: Tensor[sum_element, M, N]):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=f32)
            for k in tiles(K):
                acc += a[m, k] @ b[n, k]
            c[m, n] = acc.to(sum_element)

    kernel, seconds, text = nt if transposed else nn, [], ""
    for _ in range(RUNS):
        begin = time.perf_counter()
        text = compile_kernel(kernel, {}, dict.fromkeys("abc", "contiguous"), dict.fromkeys("MNK", (2**31 - 1, 64)),
                              targets.target(LEVEL), None, frozenset("ab")).text()
        seconds.append(time.perf_counter() - begin)
    return text, seconds


def tritons(case: str, interpreter: str) -> tuple[str, list[float]]:
    """The same of Triton, by its own account of its stages."""
    names = {"bf16": "bf16", "f16": "fp16", "f32": "fp32"}
    source, result, transposed = CASES[case]
    wanted = {"level": LEVEL, "tile": TILE, "warps": WARPS, "stages": STAGES, "runs": RUNS, "element": names[source],
              "result": names[result], "transposed": transposed}
    done = subprocess.run([interpreter, str(HERE / "gpu_static_triton.py"), json.dumps(wanted)], capture_output=True,
                          text=True, check=False)
    if done.returncode:
        raise SystemExit(f"Triton, {case}: {done.stderr[-2000:]}")
    text, seconds = json.loads(done.stdout.splitlines()[-1])
    return text, seconds


def assembled(text: str) -> dict[str, Any]:
    """Figures of the machine code of one kernel."""
    from sapper.targets.ptx.assembler import assemble

    (made,) = assemble([text], LEVEL).values()
    loop = next(loop for loop in made.loops() if loop["HMMA"])
    return {"loop": loop.total(), **{name: loop[name] for name in COUNTED}, "registers": made.registers,
            "spilled": made.spilled_bytes}


def table(triton: str | None) -> list[str]:
    head = ["product", "compiler", "loop", *COUNTED, "per HMMA", "registers", "spilled", "to PTX ms"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for case in CASES:
        found = {"sapper": ours(case)}
        if triton is not None:
            found["Triton"] = tritons(case, triton)
        for who, (text, seconds) in found.items():
            made = assembled(text)
            cells = [case, who, made["loop"], *(made[name] for name in COUNTED), f"{made['loop'] / made['HMMA']:.2f}",
                     made["registers"], made["spilled"], f"{1e3 * statistics.median(seconds):.0f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", metavar="PYTHON", help="an interpreter that has Triton")
    options = parser.parse_args()
    print(f"{LEVEL}, tile {' x '.join(map(str, TILE))}, {WARPS} warps")
    print("\n".join(table(options.triton)))


if __name__ == "__main__":
    main()
