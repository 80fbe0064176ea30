"""How many of all planted errors of the kernels by hand are found.

    python tools/plant_errors.py [KERNEL[:FROM:TO] ...]

Each is checked statically, then interpreted from the meanings of its rows, on the cases that a piece must pass before
it is used; no CPU needs to have its features. Micro-kernels are run too, where this CPU can. The last line for each
kernel is the kill rate, and survivors are named. The exit status is 1 if there are any. FROM, TO: places in the list of
planted errors, to do a part.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, f16, f32, tiles, zeros
from sapper.assembly.contraction import Contraction, Tile
from sapper.assembly.errors import AssemblyError
from sapper.assembly.mutate import Mutant, mutants
from sapper.assembly.override import compile_by_hand
from sapper.assembly.prove import meaning_in_language, prove_block
from sapper.assembly.warp_mutate import mutants as warp_mutants
from sapper.assembly.warp_mutate import planted as planted_block
from sapper.kernels.by_hand import blocked, codebook, contraction, fragments, matmul, rows
from sapper.kernels.by_hand import tiles as tiled
from sapper.kernels.by_hand.nibbles import make_unpack
from sapper.kernels.matmul import make_matmul_nn
from sapper.lang.by_hand import CONTRACTIONS, PIECES
from sapper.runtime.by_hand import expected_cases, survivors, trials_of
from sapper.runtime.micro_kernel import check_micro_kernel
from sapper.runtime.product import check_product
from sapper.targets.ptx.target import target as ptx_target
from sapper.targets.x86_64.target import target

EVERY_S = 10.0
"""So often a line says how far it is."""
M, N, K = sp.dims("M N K")


@sp.kernel
def matmul_bf16(a: Tensor[bf16, M, K], b: Tensor[bf16, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[k, n]
        c[m, n] = acc


KERNELS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "f32-14x32": (lambda: make_matmul_nn(f32), lambda kernel: matmul.attach(kernel, matmul.AVX512)),
    "f32-6x16": (lambda: make_matmul_nn(f32), lambda kernel: matmul.attach(kernel, matmul.AVX2)),
    "bf16-14x32": (lambda: matmul_bf16, lambda kernel: matmul.attach(kernel, matmul.BF16)),
    "row-sum": (rows.make_row_sum, rows.attach_row_sum),
    "embedding": (rows.make_embedding, rows.attach_embedding),
    **{f"tiles-{name}": (lambda p=product: tiled.make_product(p),  # type: ignore[misc]
                         lambda kernel, p=product: tiled.attach(kernel, p, 64))  # type: ignore[misc]
       for name, product in (("bf16", tiled.BF16), ("i8", tiled.I8), ("u8i8", tiled.U8_I8))},
    "codebook": (codebook.make_codebook, codebook.attach),
    "f32-blocked": (lambda: make_matmul_nn(f32), lambda kernel: blocked.attach(kernel, 32)),
}
MICRO_KERNELS: dict[str, tuple[Contraction, str]] = {
    "loop-f32-14x32": (contraction.f32_14x32, "zen4"),
    "loop-f32-6x16": (contraction.f32_6x16, "haswell"),
    "loop-f32-14x32-blocks": (contraction.f32_14x32_blocks, "zen4"),
    "loop-f32-14x32-columns": (contraction.f32_14x32_columns, "zen4"),
    "loop-bf16-14x32": (contraction.bf16_14x32, "zen4"),
    "loop-u8i8-14x32": (contraction.u8i8_14x32, "zen4"),
    "loop-i8-14x32-blocks": (contraction.i8_14x32_blocks, "zen4"),
    "loop-f32-2x14x16": (contraction.f32_2x14x16, "zen4"),
    "loop-bf16-2x14x16": (contraction.bf16_2x14x16, "zen4"),
}
"""Inner loops of generated contractions, and a target to check them for."""
PRODUCTS = {"product-bf16-2x2": fragments.serpentine_2x2, "product-f16-2x2": fragments.serpentine_2x2_f16}
"""Products of a warp's fragments, on PTX."""
UNPACKS = {"unpack4-bf16x2": bf16, "unpack4-f16x2": f16}
"""Blocks of a kernel, on PTX, each at four places of a word: by a proof that fails."""


class Progress:
    """Counts what was planted and prints how far it is. name: of the kernel. total: how many there are."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.seen, self.alive = name, total, 0, 0
        self.start = self.told = time.monotonic()

    def __call__(self, mutant: Mutant, lives: bool) -> None:
        self.seen += 1
        self.alive += lives
        if lives:
            print(f"{self.name}: lives: {mutant}", flush=True)
        if time.monotonic() - self.told > EVERY_S:
            self.told = time.monotonic()
            print(f"{self.name}: {self.seen} of {self.total} in {self.told - self.start:.0f} s, {self.alive} live",
                  flush=True)

    def close(self) -> None:
        killed = self.seen - self.alive
        print(f"{self.name}: {killed} of {self.seen} found, {killed / self.seen:.2%}, "
              f"in {time.monotonic() - self.start:.0f} s", flush=True)


def run(wanted: str) -> list[Mutant]:
    name, _, part = wanted.partition(":")
    if name in MICRO_KERNELS:
        return run_micro_kernel(wanted)
    if name in PRODUCTS:
        return run_product(wanted)
    if name in UNPACKS:
        return run_blocks(wanted)
    make, attach = KERNELS[name]
    kernel: Any = make()
    kernel.by_hand.clear()
    attach(kernel)
    chip = target("sapphirerapids" if name.startswith("tiles") else "zen4")
    made = compile_by_hand(kernel, kernel.by_hand[0], chip)
    planted = list(mutants(made.assembly))
    if part:
        planted = planted[slice(*map(int, part.split(":")))]
    progress = Progress(wanted, len(planted))
    trials = trials_of(kernel, made, expected_cases(kernel, made.piece))
    alive = survivors(kernel, made, chip, planted, trials, progress)
    progress.close()
    return alive


def run_product(wanted: str) -> list[Mutant]:
    name, _, part = wanted.partition(":")
    planted = list(warp_mutants(PRODUCTS[name].assemble()))
    if part:
        planted = planted[slice(*map(int, part.split(":")))]
    progress, alive = Progress(wanted, len(planted)), []
    for mutant in planted:
        lives = check_product(PRODUCTS[name].planted(mutant.assembly), ptx_target("sm_80")).finding is None
        progress(mutant, lives)
        alive += [mutant] * lives
    progress.close()
    return alive


def run_blocks(wanted: str) -> list[Mutant]:
    name, _, part = wanted.partition(":")
    chip = ptx_target("sm_80")
    uses = []
    for op in make_unpack(UNPACKS[name], True).tile_ir().walk():
        if op.name == "asm":
            block: Any = PIECES[op.attributes["by"]]
            immediates = op.attributes["immediates"]
            meaning = meaning_in_language(op.operands[0], op.operands[1:])
            assembly, _, _ = block.assemble((32, 32), immediates)
            uses += [(number, mutant, block, immediates, meaning)
                     for number, mutant in enumerate(warp_mutants(assembly))]
    if part:
        uses = uses[slice(*map(int, part.split(":")))]
    progress, alive = Progress(wanted, len(uses)), []
    for number, mutant, block, immediates, meaning in uses:
        try:
            wrong = planted_block(block, number)
            lives = prove_block(wrong, immediates, meaning, [np.int32], chip.lanes).proved is not False
        except AssemblyError:
            lives = False
        progress(mutant, lives)
        alive += [mutant] * lives
    progress.close()
    return alive


def run_micro_kernel(wanted: str) -> list[Mutant]:
    name, _, part = wanted.partition(":")
    piece, chip = MICRO_KERNELS[name]
    planted = list(mutants(piece.assemble((piece.rows[0], piece.vectors[0]))))
    if part:
        planted = planted[slice(*map(int, part.split(":")))]
    progress, alive = Progress(wanted, len(planted)), []
    for mutant in planted:
        assert isinstance(mutant.assembly, Tile)
        wrong = piece.planted(mutant.assembly)
        CONTRACTIONS[wrong.key] = wrong
        lives = check_micro_kernel(wrong, target(chip)).finding is None
        del CONTRACTIONS[wrong.key]
        progress(mutant, lives)
        alive += [mutant] * lives
    progress.close()
    return alive


def main(wanted: list[str]) -> int:
    known = [*KERNELS, *MICRO_KERNELS, *PRODUCTS, *UNPACKS]
    unknown = [name for name in wanted if name.partition(":")[0] not in known]
    if unknown:
        print(f"found {', '.join(unknown)}; expected kernels of: {', '.join(known)}", file=sys.stderr)
        return 2
    alive = [run(name) for name in wanted or known]
    return int(any(alive))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
