"""Measures latency and throughput of the rows on this CPU, from which sapper/targets/x86_64/costs.py was made.

Prints one line for each row: name, cycles of a chain through its registers (or -), cycles for each of many independent
ones. Cycles are those of a chain of `add` instructions (one cycle each) timed beside it. Not a test: run it by hand.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import native_rows as native

from sapper.codegen.encode import encode
from sapper.codegen.machine import Immediate, Instruction, Label, LabelReference, MachineFunction, Memory, Register
from sapper.targets.x86_64 import detect
from sapper.targets.x86_64.instructions import ROWS, Row

UNROLL, LOOPS = 48, 60


def ins(name: str, *operands: Any) -> Instruction:
    return Instruction(ROWS[name], list(operands))


def g(number: int) -> Register:
    return Register("gpr", number)


def timed(body: list[Any], number: int) -> list[Any]:
    """A function that leaves the time-stamp ticks of LOOPS runs of `body` at [rdi]."""
    return [
        Label(f"case{number}", 64), ins("mov.64", g(11), g(3)),
        *[ins("vmovups.512", Register("vec", n), Memory(g(7), disp=1024)) for n in range(16)],
        ins("vpxord.512", Register("vec", 15), Register("vec", 15), Register("vec", 15)),
        *[ins("kxnorq", Register("mask", n), Register("mask", n), Register("mask", n)) for n in range(1, 8)],
        *[ins("mov.32", g(n), Immediate(5)) for n in (0, 1, 2, 3, 8, 9, 10)],
        ins("push", g(12)), ins("push", g(13)), ins("mov.32", g(12), Immediate(LOOPS)), ins("lfence"), ins("rdtsc"),
        ins("mov.64", g(13), g(0)), ins("lfence"), ins("mov.32", g(0), Immediate(5)), ins("mov.32", g(2), Immediate(0)),
        Label(f"loop{number}", 32), *body, ins("dec.64", g(12)), ins("jne", LabelReference(f"loop{number}")),
        ins("lfence"), ins("rdtsc"), ins("sub.64", g(0), g(13)), ins("mov.64", Memory(g(7)), g(0)), ins("pop", g(13)),
        ins("pop", g(12)), ins("mov.64", g(3), g(11)), ins("vzeroupper"), ins("ret")]


def operands(row: Row, choose: Any) -> list[Any] | None:
    """Register operands; choose(position, kind) gives the number. None if the row has no register form."""
    made: list[Any] = []
    for position, spec in enumerate(row.operands):
        if spec.kind == "imm":
            made.append(Immediate(1))
        elif spec.index_bits:
            made.append(Memory(g(7), Register("vec", 15), 1, 2048))
        elif spec.kind in ("mem", "label"):
            made.append(Memory(g(7), disp=2048))
        elif spec.fixed is not None:
            made.append(Register(spec.kind, spec.fixed))
        else:
            made.append(Register(spec.kind, choose(position, spec.kind)))
    return made


def chained(row: Row) -> list[Any] | None:
    """Operands whose result is the next one's source; None where no register is both written and read."""
    kinds = [s for s in row.operands if s.kind in ("vec", "gpr", "mask") and s.fixed is None]
    if row.masking == "required" or not {s.kind for s in kinds if s.writes} & {s.kind for s in kinds if s.reads}:
        return None
    return operands(row, lambda position, kind: {"vec": 1, "gpr": 8, "mask": 2}[kind])


def spread(row: Row, n: int) -> list[Any] | None:
    """Operands of the n-th of many instructions that do not wait for one another."""
    written = {"vec": (4, 5, 6, 7, 8, 9, 10, 11, 12, 13), "gpr": (3, 8, 9, 10), "mask": (3, 4, 5, 6)}

    def choose(position: int, kind: str) -> int:
        if row.operands[position].writes:
            return int(written[kind][(n + position) % len(written[kind])])
        return {"vec": 1, "gpr": 1, "mask": 2}[kind] + (position == 2 and kind == "vec")

    return operands(row, choose)


def in_memory(item: Instruction) -> Instruction:
    """The same with memory wherever the row takes it."""
    return Instruction(item.row, [Memory(g(7), disp=2048) if s.memory and not s.index_bits else o
                                  for s, o in zip(item.row.operands, item.operands, strict=True)], item.mask)


def main() -> None:
    host = detect.host().features
    functions: list[Any] = timed([ins("add.64", g(8), g(8)) for _ in range(UNROLL)], 0)
    plans: list[tuple[str, str]] = []
    for row in ROWS.values():
        if (not row.features <= host or row.name in native.CANNOT_RUN or row.control or row.mnemonic in ("div", "idiv")
                or row.mnemonic.startswith("prefetch")):
            continue  # a chain of divisions would trap
        mask = Register("mask", 7) if row.masking == "required" else None
        for what in ("latency", "throughput"):
            body = []
            reload = []
            for n in range(UNROLL):
                made = chained(row) if what == "latency" else spread(row, n)
                if made is None:
                    break
                if mask is not None:
                    reload = [ins("kxnorq", mask, mask, mask)]
                body += [*reload, Instruction(row, made, mask)]
            else:
                try:
                    encode(MachineFunction("probe", list(body), {}))
                except ValueError:
                    changed = [in_memory(item) if item.row is row else item for item in body]
                    if what == "latency":
                        continue
                    for item in changed:
                        if sum(isinstance(o, Memory) for o in item.operands) > 1:
                            item.operands[0] = Register("vec", 4)
                    body = changed
                    try:
                        encode(MachineFunction("probe", list(body), {}))
                    except ValueError:
                        continue
                functions += timed(body, len(plans) + 1)
                plans.append((row.name, what))
    code = encode(MachineFunction("costs", functions, {}))
    address = native.load(code.code.ljust(-(-len(code.code) // 4096) * 4096, b"\xcc"))
    storage = np.zeros(8192 + 64, np.uint8)
    block = storage[-storage.ctypes.data % 64:][:8192]
    block[1024:1088] = np.full(16, 1.0, np.float32).view(np.uint8)
    pointer = block.ctypes.data

    def ticks(number: int) -> int:
        call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address + code.label_offsets[f"case{number}"])
        found = []
        for _ in range(7):
            call(pointer)
            found.append(int(block[:8].view(np.uint64)[0]))
        return min(found)

    figures: dict[str, dict[str, float]] = {}
    for number, (name, what) in enumerate(plans, 1):
        best = 1e9
        for _ in range(2):
            cycle = ticks(0) / (UNROLL * LOOPS)
            best = min(best, ticks(number) / (UNROLL * LOOPS) / cycle)
        figures.setdefault(name, {})[what] = best
    for name, found in figures.items():
        print(f"{name} {found['latency']:.2f}" if "latency" in found else f"{name} -", f"{found['throughput']:.2f}"
              if "throughput" in found else "-")


if __name__ == "__main__":
    main()
