"""Matrix products and attention as PTX beside Triton's, without a GPU: `python bench/gpu_static.py --triton PYTHON`.

Both compilers get the same product, tile and warps, and one ptxas assembles both: the one of --ptxas, else one on the
path, else that of Triton's wheel. PYTHON is an interpreter that has Triton (it compiles offline; sapper does not need
it); without it only our rows are printed. On sm_80 both read rows past the end of a ragged tile from elsewhere, without
masks in the loop, and take K as a multiple of the tile's depth. From sm_90a on both read boxes by tensor maps, and ours
has a warp that does nothing but copy, on sm_100a one more that does nothing but start products (Triton 3.9 makes none
on sm_90a, even where it is asked to specialise warps). Needs ptxas and nvdisasm. The figures are of the machine code:
nothing is run, and no figure is a speed.

--examples prints kernels of examples/ instead, for large extents, with their products on matrix instructions and
without: instructions of a warp for 1024 multiply-adds, in the loop in which there are least.

Loop: the innermost loop with matrix instructions. Compile time: from the kernel to PTX, without ptxas, the median of
five runs that read no cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RUNS = 5


@dataclass(frozen=True)
class Setting:
    """tile: rows, columns, depth. warps: of Triton's blocks, or those of ours that multiply. boxes: operands come by
    tensor maps. instruction: of matrices. counted: opcodes of the table."""

    level: str
    tile: tuple[int, ...]
    warps: int
    stages: int
    boxes: bool
    instruction: str
    counted: tuple[str, ...]


SETTINGS = (
    Setting("sm_80", (128, 128, 64), 4, 3, False, "HMMA", ("HMMA", "LDSM", "LDGSTS", "BAR")),
    Setting("sm_90a", (128, 256, 64), 8, 4, True, "HGMMA", ("HGMMA", "UTMALDG", "SYNCS", "BAR")),
    Setting("sm_100a", (128, 256, 64), 4, 4, True, "UTCHMMA", ("UTCHMMA", "UTCBAR", "UTMALDG", "SYNCS", "BAR")),
)
ATTENTION = {
    "sm_80": (Setting("sm_80", (128, 64, 64), 4, 2, False, "HMMA", ("HMMA", "LDSM", "LDGSTS", "MUFU")),
              Setting("sm_80", (128, 64, 128), 8, 2, False, "HMMA", ("HMMA", "LDSM", "LDGSTS", "MUFU"))),
    "sm_90a": (Setting("sm_90a", (128, 64, 64), 8, 2, True, "HGMMA", ("HGMMA", "HMMA", "SYNCS", "MUFU")),
               Setting("sm_90a", (128, 64, 128), 8, 2, True, "HGMMA", ("HGMMA", "HMMA", "SYNCS", "MUFU"))),
}
"""Causal, bf16; tile: rows, keys, head."""
CASES = {"bf16 NN": ("bf16", "f32", False), "bf16 NT": ("bf16", "bf16", True), "f16 NN": ("f16", "f32", False)}
"""Name -> elements of a and b, of c, and whether b is (N, K)."""


def ours(case: str, setting: Setting) -> tuple[str, list[float]]:
    """The PTX of a case, and the seconds that each compilation took."""
    import sapper as sp
    from sapper import Tensor, bf16, f16, f32, targets, tiles, zeros
    from sapper.codegen.pipeline import compile_kernel
    from sapper.tile.schedule import Schedule

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
    alone = Schedule(cluster={"m": 1})      # Triton makes no clusters
    for _ in range(RUNS):
        begin = time.perf_counter()
        text = compile_kernel(kernel, {}, dict.fromkeys("abc", "contiguous"), dict.fromkeys("MNK", (2**31 - 1, 64)),
                              targets.target(setting.level), alone, frozenset("abc")).text()
        seconds.append(time.perf_counter() - begin)
    return text, seconds


def our_attention(setting: Setting) -> tuple[str, list[float]]:
    from sapper import targets
    from sapper.codegen.pipeline import compile_kernel
    from sapper.kernels import find

    kernel, seconds, text = find(f"attention_bf16_{setting.tile[2]}").kernel, [], ""
    names = ("q", "keys", "values", "out")
    for _ in range(RUNS):
        begin = time.perf_counter()
        text = compile_kernel(kernel, {}, dict.fromkeys(names, "contiguous"), dict.fromkeys("THGP", (2**31 - 1, 64)),
                              targets.target(setting.level), None, frozenset(names)).text()
        seconds.append(time.perf_counter() - begin)
    return text, seconds


WEIGHTS = ("int8", "int4", "fp8")
"""Of products of bf16 by weights (N, K) with f32 scales of 128 of the depth."""


def our_weights(case: str, setting: Setting) -> tuple[str, list[float]]:
    import sapper as sp
    from sapper import Tensor, bf16, f8e4m3, f32, i8, i32, targets, tiles, u8, zeros
    from sapper.codegen.pipeline import compile_kernel

    element = f8e4m3 if case == "fp8" else i8
    M, N, K, KB = sp.dims("M N K KB")

    @sp.kernel(name="product")
    def of_bytes(a: Tensor[bf16, M, K], b: Tensor[element, N, K], s: Tensor[f32, N, KB], c: Tensor[bf16, M, N]):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=f32)
            for k in tiles(K):
                acc += a[m, k] @ (b[n, k].to(f32) * s[n, k // 128]).to(bf16)
            c[m, n] = acc.to(bf16)

    @sp.kernel(name="product")
    def of_halves(a: Tensor[bf16, M, K], b: Tensor[u8, N, K // 2], s: Tensor[f32, N, KB], c: Tensor[bf16, M, N]):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=f32)
            for k in tiles(K):
                q = (b[n, k // 2].to(i32) >> (k % 2 * 4)) & 15
                acc += a[m, k] @ ((q - 8).to(f32) * s[n, k // 128]).to(bf16)
            c[m, n] = acc.to(bf16)

    kernel, seconds, text = of_halves if case == "int4" else of_bytes, [], ""
    for _ in range(RUNS):
        begin = time.perf_counter()
        text = compile_kernel(kernel, {}, dict.fromkeys("absc", "contiguous"),
                              dict.fromkeys(("M", "N", "K", "KB"), (2**31 - 1, 64)), targets.target(setting.level),
                              None, frozenset("absc")).text()
        seconds.append(time.perf_counter() - begin)
    return text, seconds


VECTOR = Setting("sm_80", (64, 128), 4, 3, False, "FFMA", ("LDG", "I2F", "F2F", "FFMA"))
"""Of Triton: rows and depth of a block at once; of both a lane then has as many weights in a round."""
VECTOR_WEIGHTS = 64


def our_vector(case: str) -> tuple[str, list[float]]:
    """A vector of bf16 by such weights."""
    import sapper as sp
    from sapper import Tensor, bf16, f32, i8, i32, targets, tiles, u8, zeros
    from sapper.codegen.pipeline import compile_kernel

    N, K, KB = sp.dims("N K KB")

    @sp.kernel(name="vector")
    def of_bytes(a: Tensor[bf16, K], b: Tensor[i8, N, K], s: Tensor[f32, N, KB], c: Tensor[bf16, N]):
        for n in tiles(N):
            acc = zeros(n, dtype=f32)
            for k in tiles(K):
                acc += a[k] @ (b[n, k].to(f32) * s[n, k // 128]).to(bf16)
            c[n] = acc.to(bf16)

    @sp.kernel(name="vector")
    def of_halves(a: Tensor[bf16, K], b: Tensor[u8, N, K // 2], s: Tensor[f32, N, KB], c: Tensor[bf16, N]):
        for n in tiles(N):
            acc = zeros(n, dtype=f32)
            for k in tiles(K):
                q = (b[n, k // 2].to(i32) >> (k % 2 * 4)) & 15
                acc += a[k] @ ((q - 8).to(f32) * s[n, k // 128]).to(bf16)
            c[n] = acc.to(bf16)

    kernel, seconds, text = of_halves if case == "int4" else of_bytes, [], ""
    for _ in range(RUNS):
        begin = time.perf_counter()
        text = compile_kernel(kernel, {}, dict.fromkeys("absc", "contiguous"),
                              dict.fromkeys(("N", "K", "KB"), (2**31 - 1, 64)), targets.target(VECTOR.level),
                              None, frozenset("absc")).text()
        seconds.append(time.perf_counter() - begin)
    return text, seconds


def vector_table(made: dict[str, dict[str, tuple[str, list[float]]]], ptxas: str) -> list[str]:
    """Its main loop, by weight of a lane."""
    lines = [f"| vector by | compiler | loop | {' | '.join(VECTOR.counted)} | per weight | registers | spilled |",
             "|---|---|" + "---:|" * (len(VECTOR.counted) + 4)]
    for case, compilers in made.items():
        for who, (text, _) in compilers.items():
            found = assembled(text, VECTOR, ptxas)
            cells = [case, who, found["loop"], *(found[name] for name in VECTOR.counted),
                     f"{found['loop'] / VECTOR_WEIGHTS:.1f}", found["registers"], found["spilled"]]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def tritons(case: str, setting: Setting, interpreter: str, **more: Any) -> tuple[str, list[float]]:
    """The same of Triton, by its own account of its stages. case: of CASES, or anything else for attention. more: of
    weights."""
    names = {"bf16": "bf16", "f16": "fp16", "f32": "fp32"}
    source, result, transposed = CASES.get(case, ("bf16", "bf16", False))
    wanted = {"level": setting.level, "tile": setting.tile, "warps": setting.warps, "stages": setting.stages,
              "runs": RUNS, "element": names[source], "result": names[result], "transposed": transposed,
              "boxes": setting.boxes, "attention": case not in CASES, **more}
    done = subprocess.run([interpreter, str(HERE / "gpu_static_triton.py"), json.dumps(wanted)], capture_output=True,
                          text=True, check=False)
    if done.returncode:
        raise SystemExit(f"Triton, {case}: {done.stderr[-2000:]}")
    text, seconds = json.loads(done.stdout.splitlines()[-1])
    return text, seconds


def assembled(text: str, setting: Setting, ptxas: str) -> dict[str, Any]:
    """Figures of the machine code of one kernel. ptxas: the program; empty: as it is found."""
    from sapper.targets.ptx.assembler import assemble

    (made,) = assemble([text], setting.level, ptxas).values()
    loop = next(loop for loop in made.loops() if loop[setting.instruction] or loop["HMMA"])
    return {"loop": loop.total(), **{name: loop[name] for name in setting.counted}, "registers": made.registers,
            "spilled": made.spilled_bytes}


def table(title: str, setting: Setting, made: dict[str, dict[str, tuple[str, list[float]]]], ptxas: str) -> list[str]:
    """made: by case and compiler, what they compiled, and the seconds."""
    head = [title, "compiler", "loop", *setting.counted, f"per {setting.instruction}", "registers", "spilled",
            "to PTX ms"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for case, compilers in made.items():
        for who, (text, seconds) in compilers.items():
            found = assembled(text, setting, ptxas)
            products = found[setting.instruction]
            cells = [case, who, found["loop"], *(found[name] for name in setting.counted),
                     f"{found['loop'] / products:.2f}" if products else "", found["registers"], found["spilled"],
                     f"{1e3 * statistics.median(seconds):.0f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


EXAMPLES = ("two_layers", "normed_product", "low_rank_product", "biased_attention", "gradient_of_queries",
            "nearest_centres", "gaussian_sums", "lstm_cell", "linear_gradient", "convolution_nhwc", "convolution_i8")
FEW = 16
"""Extents that are so small in an example are so; the others are large."""
PRODUCTS = {"HMMA": 2048, "IMMA": 4096, "FFMA": 32, "IMAD": 32}
"""Multiply-adds of an instruction of a warp: of 16 x 8 x 16 elements of 16 bits, 16 x 8 x 32 bytes, or 32 numbers."""
PARTS = 6
"""Products of parts of bf16 for one of f32 (sapper/lane/split_pieces.py)."""


def example_rows(level: str, ptxas: str) -> list[str]:
    from examples import examples
    from sapper import targets
    from sapper.codegen.pipeline import compile_kernel
    from sapper.targets.ptx.assembler import assemble
    from sapper.tile.schedule import Schedule

    lines = ["| example | products on | loop | MMA | FFMA | LDG | per 1024 | warps | registers | spilled |",
             "|---|---|" + "---:|" * 8]
    for example in (one for one in examples() if one.name in EXAMPLES):
        tensors = {name: type for name, type in example.kernel.parameters if hasattr(type, "dims")}
        dims = {dim for type in tensors.values() for dim in type.dims if isinstance(dim, str)}
        of_bytes = any(type.dtype.name == "i8" for type in tensors.values())
        for matrix in (False, True):
            compiled = compile_kernel(
                example.kernel, {}, dict.fromkeys(tensors, "contiguous"),
                {dim: (FEW, 1) if example.shape.get(dim, 0) in range(1, FEW + 1) else (8192, 64) for dim in dims},
                targets.target(level), None if matrix else Schedule(matrix=False), frozenset(tensors))
            (made,) = assemble([compiled.text()], level, ptxas).values()
            counted = ("HMMA", "IMMA") if matrix else ("IMAD",) if of_bytes else ("FFMA",)

            def cost(loop: Any, counted: tuple[str, ...] = counted, parts: int = 1 if of_bytes else PARTS) -> float:
                made = sum(PRODUCTS[name] * loop[name] / (parts if name == "HMMA" else 1) for name in counted)
                return 1024 * loop.total() / made if made else float("inf")

            loop = min(made.loops(), key=cost)
            cells = [example.name, "MMA" if matrix else counted[0], loop.total(), loop["HMMA"] + loop["IMMA"],
                     loop["FFMA"], loop["LDG"] + loop["LDGSTS"], f"{cost(loop):.0f}", compiled.warps, made.registers,
                     made.spilled_bytes]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", metavar="PYTHON", help="an interpreter that has Triton")
    parser.add_argument("--ptxas", metavar="PROGRAM", default="", help="which assembles both; as new as Triton's PTX")
    parser.add_argument("--level", choices=[setting.level for setting in SETTINGS], help="this one only")
    parser.add_argument("--examples", action="store_true", help="kernels of examples/ instead")
    options = parser.parse_args()
    if options.examples:
        sys.path.insert(0, str(HERE.parent))
        for level in [options.level] if options.level else [setting.level for setting in SETTINGS]:
            print("\n".join([level, *example_rows(level, options.ptxas)]), end="\n\n")
        return
    peer = options.triton
    for setting in SETTINGS:
        if options.level in (None, setting.level):
            print(f"{setting.level}, tile {' x '.join(map(str, setting.tile))}, {setting.warps} warps, "
                  f"{setting.stages} stages")
            made = {case: {"sapper": ours(case, setting), **({"Triton": tritons(case, setting, peer)} if peer else {})}
                    for case in CASES}
            print("\n".join(table("product", setting, made, options.ptxas)), end="\n\n")
    for setting in SETTINGS[:1]:
        if options.level in (None, setting.level):
            print(f"{setting.level}, bf16 by weights with scales, the same tile")
            made = {}
            for case in WEIGHTS:
                made[case] = {"sapper": our_weights(case, setting)}
                if peer and case != "fp8":      # which Triton does not have on this level
                    for who, loads in (("Triton", False), *([("Triton, a load each", True)] if case == "int4" else [])):
                        made[case][who] = tritons("bf16 NT", setting, peer, weights=case, loads=loads)
            print("\n".join(table("weights", setting, made, options.ptxas)), end="\n\n")
            made = {}
            for case in WEIGHTS[:2]:
                made[case] = {"sapper": our_vector(case)}
                for who, loads in (("Triton", False), *([("Triton, a load each", True)] if case == "int4" else [])):
                    if peer:
                        made[case][who] = tritons("bf16 NT", VECTOR, peer, weights=case, loads=loads, vector=True)
            print("\n".join(vector_table(made, options.ptxas)), end="\n\n")
    for level, settings in ATTENTION.items():
        if options.level in (None, level):
            print(f"{level}, causal attention, bf16, 128 queries, 64 keys at once")
            for setting in settings:
                case = f"head {setting.tile[2]}, {setting.warps} warps"
                both = {"sapper": our_attention(setting), **({"Triton": tritons(case, setting, peer)} if peer else {})}
                print("\n".join(table("attention", setting, {case: both}, options.ptxas)), end="\n\n")


if __name__ == "__main__":
    main()
