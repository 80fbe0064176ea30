"""Runs the rows on tile registers on the real CPU and compares them with their meaning; started by test_meaning.py.

Argument: a seed. Prints one JSON object: how often each row ran, and the differences found. Each row runs under
many configurations: the largest tiles, the smallest, ragged ones, and tiles without use.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import numpy as np

from sapper.codegen.encode import encode
from sapper.codegen.machine import Immediate, Instruction, Label, MachineFunction, Memory, Register
from sapper.targets.x86_64 import detect, tiles
from sapper.targets.x86_64.instructions import ROWS, Row
from sapper.targets.x86_64.meaning import execute
from tests.targets.native_rows import HOSTILE, load

# The block that a case works on, by byte offset from rdi.
TILES, CONFIGURATION, MEMORY, BLOCK_BYTES = 0, 8192, 8256, 8256 + 4096
MEMORY_MIDDLE = MEMORY + 2048
USED = (1, 2, 3)
RUNS = 60


def g(number: int) -> Register:
    return Register("gpr", number)


def ins(name: str, *operands: Any) -> Instruction:
    return Instruction(ROWS[name], list(operands))


def case_of(row: Row) -> Instruction:
    """The row on tiles 1, 2, 3, or memory in the middle of the block, its rows rsi bytes apart."""
    numbers = iter(USED)
    memory = Memory(g(7), g(6) if any(o.sibmem for o in row.operands) else None, disp=MEMORY_MIDDLE)
    return Instruction(row, [memory if o.kind == "mem" else Register("tile", next(numbers)) for o in row.operands])


def wrap(row: Row) -> list[Any]:
    """void case(void *block, int64 stride): configure, fill the tiles that are used, run, store them, release."""
    moved = [n for n in USED if row.name != "tilerelease"]
    load_all = [ins("tileloadd", Register("tile", n), Memory(g(7), g(0), disp=TILES + 1024 * n)) for n in USED]
    return [
        Label(row.name, 16), ins("ldtilecfg", Memory(g(7), disp=CONFIGURATION)), ins("mov.64", g(0), Immediate(64)),
        *load_all, case_of(row), ins("sttilecfg", Memory(g(7), disp=CONFIGURATION)),
        *(ins("tilestored", Memory(g(7), g(0), disp=TILES + 1024 * n), Register("tile", n)) for n in moved),
        ins("tilerelease"), ins("ret")]


def shapes_for(run: int, random: np.random.Generator) -> list[tuple[int, int]]:
    """Shapes of the eight tiles: of 1, 2, 3 as a product takes them, of the others any or none."""
    m, n, k = (16, 16, 16) if run < 8 else (1, 1, 1) if run == 8 else (int(x) for x in random.integers(1, 17, 3))
    others = [(int(r), int(b)) if r and b else (0, 0) for r, b in zip(random.integers(0, 17, 8),
                                                                     random.integers(0, 65, 8), strict=True)]
    return [others[0], (m, 4 * n), (m, 4 * k), (k, 4 * n), *others[4:]]


def fill(row: Row, block: np.ndarray, run: int, random: np.random.Generator) -> None:
    """Tiles and memory: random bits, hostile numbers, moderate ones."""
    block[:] = random.integers(0, 256, len(block), dtype=np.uint8)
    if row.mnemonic not in ("tdpbf16ps", "tdpfp16ps") or run % 4 == 0:
        return
    c, a, b = (block[TILES + 1024 * n:][:1024] for n in USED)
    if run % 4 == 1:
        c[:] = random.choice(HOSTILE["f4"], 256).view(np.uint8)
    else:
        size = -127 if run % 4 == 2 else int(random.integers(-30, 4))
        c[:] = (random.standard_normal(256) * 2.0 ** size).astype(np.float32).view(np.uint8)
    for part in (a, b):
        values = random.standard_normal(512) * 2.0 ** random.integers(-3, 3, 512)
        if run % 4 == 2 and row.mnemonic == "tdpbf16ps":
            values = values * 2.0 ** -63  # products and sums near the denormals
        if row.mnemonic == "tdpbf16ps":
            half = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        else:
            half = values.astype(np.float16).view(np.uint16)
        if run % 4 == 1:
            hostile = np.array([0, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFA1, 1, 0x807F, 0x0080, 0x7F7F, 0xFF7F],
                               np.uint16) if row.mnemonic == "tdpbf16ps" else HOSTILE["f2"]
            half = np.where(random.random(512) < 0.05, random.choice(hostile, 512), half)
        part[:] = half.view(np.uint8)


def tile_at(block: np.ndarray, number: int, shape: tuple[int, int]) -> np.ndarray:
    """The bytes of a tile in the block, rows 64 bytes apart."""
    return block[TILES + 1024 * number:][:1024].reshape(16, 64)[:shape[0], :shape[1]]


def expected(row: Row, before: np.ndarray, stride: int) -> np.ndarray:
    """The block as the row's meaning leaves it."""
    block = before.copy()
    configuration = block[CONFIGURATION:][:64].copy()
    shapes = tiles.shapes_of(configuration)
    instruction = case_of(row)
    raw: list[Any] = []
    shape = next((shapes[o.number] for o in instruction.operands if isinstance(o, Register)), (0, 0))
    places = [MEMORY_MIDDLE + stride * i for i in range(shape[0])]
    for spec, operand in zip(row.operands, instruction.operands, strict=True):
        if isinstance(operand, Register):
            raw.append(tile_at(block, operand.number, shapes[operand.number]).copy())
        elif spec.sibmem:
            raw.append(np.stack([block[at:at + shape[1]] for at in places]))
        else:
            raw.append(block[MEMORY_MIDDLE:MEMORY_MIDDLE + 64].copy())
    in_memory = tuple(isinstance(o, Memory) for o in instruction.operands)
    after, implied, _, _ = execute(row, raw, in_memory, implicit=(configuration,) if row.implicit_reads else ())
    state = dict(zip(row.implicit_writes, implied, strict=True))
    block[CONFIGURATION:][:64] = state.get(tiles.CONFIGURATION, configuration)
    for number in USED if row.name != "tilerelease" else ():
        if ("tile", number) in state:
            held = state["tile", number]
            tile_at(block, number, held.shape)[:] = held
    for spec, operand, value in zip(row.operands, instruction.operands, after, strict=True):
        if not spec.writes:
            continue
        if isinstance(operand, Register):
            tile_at(block, operand.number, value.shape)[:] = value
        elif spec.sibmem:
            for at, line in zip(places, value, strict=True):
                block[at:at + shape[1]] = line
        else:
            block[MEMORY_MIDDLE:MEMORY_MIDDLE + 64] = value
    return block


def main(seed: int) -> None:
    rows = [row for row in ROWS.values() if "amx_tile" in row.features and row.features <= detect.host().features]
    code = encode(MachineFunction("cases", [item for row in rows for item in wrap(row)], {}))
    address = load(code.code + b"\xcc" * (-len(code.code) % 4096))
    storage = np.zeros(BLOCK_BYTES + 64, np.uint8)
    block = storage[-storage.ctypes.data % 64:][:BLOCK_BYTES]
    random = np.random.default_rng(seed)
    differences: list[str] = []
    for row in rows:
        native = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(address + code.label_offsets[row.name])
        for run in range(RUNS):
            fill(row, block, run, random)
            shapes = shapes_for(run, random)
            block[CONFIGURATION:][:64] = np.frombuffer(tiles.configuration(shapes), np.uint8)
            if row.name == "ldtilecfg":
                # Tiles 1, 2, 3 stay in use, so that they can be stored.
                again = [(r, b) if n not in USED else shapes[n] for n, (r, b) in enumerate(shapes_for(run, random))]
                block[MEMORY_MIDDLE:][:64] = np.frombuffer(tiles.configuration(again), np.uint8)
            stride = int(random.choice([64, -64, 72, -100, 0, 1]))
            before = block.copy()
            wanted = expected(row, before, stride)
            native(block.ctypes.data, stride)
            wrong = np.flatnonzero(block != wanted)
            if len(wrong) and len(differences) < 10:
                at = int(wrong[0]) // 4 * 4
                was, found, meant = (f"{int(b[at:at + 4].view('u4')[0]):08x}" for b in (before, block, wanted))
                differences.append(f"{row.name} run {run}, shapes {shapes[1:4]}, stride {stride}: {len(wrong)} bytes, "
                                   f"at {at}: found {found}, meaning {meant}, before {was}")
    print(json.dumps({"runs": {row.name: RUNS for row in rows}, "differences": differences}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
