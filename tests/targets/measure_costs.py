"""Measures latency and throughput of the rows on this CPU, of which the tables of costs of sapper/targets/x86_64 are.

    measure_costs.py                     for each row: name, cycles of a chain through its registers (or -), the same
                                         among nops, by which the scheduler is never full, and cycles for each of many
                                         independent ones (or -)
    measure_costs.py --beside ROW ...    for each row on vectors or masks, as wide as it can: name, and for each ROW
                                         given the cycles of one of each, and of one beside two of ROW: whether they
                                         share pipes. Sixteen registers are too few for a ROW that adds to its result:
                                         there a product, and no multiply-add, shows the multipliers
    measure_costs.py --chains            for rows that lead from one kind of register to another and back: their
                                         cycles together
    measure_costs.py --accesses          loads and stores by their bits: cycles for each, and cycles from an address to
                                         a register

Cycles are those of a chain of `add` instructions (one cycle each) timed beside it. Not a test: run it by hand.
"""

from __future__ import annotations

import argparse
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

UNROLL, LOOPS, NOPS = 48, 400, 7
SAVED = (12, 13, 14, 15, 5)
POINTER_BYTES = 1152
"""Where a pointer to the block itself lies, for chains of loads."""
FEATURES = detect.host().features
WIDEST = 512 if "avx512f" in FEATURES else 256
WRITTEN = {"vec": (*range(3, 15), *range(16, 26)), "gpr": (3, 5, 6, 8, 9, 10, 14, 15), "mask": (3, 4, 5, 6)}
"""Registers of results that do not wait for one another; vectors from 16 on only for rows that can name them."""
BESIDE = range(16, 32) if WIDEST == 512 else range(9, 15)
"""Vectors that are left to the rows that others run beside."""
CHAINS = (
    ("vmovd.to_vec", "vmovd.from_vec"), ("vmovq.to_vec", "vmovq.from_vec"),
    ("vpbroadcastd.general.512", "vmovd.from_vec"), ("vpbroadcastb.general.512", "vmovd.from_vec"),
    ("vmovd.to_vec", "vpmovmskb.128"), ("vmovd.to_vec", "vmovmskps.128"), ("vmovd.to_vec", "vpextrd"),
    ("vmovd.to_vec", "vpextrw"), ("vmovd.to_vec", "vpextrb"), ("vmovq.to_vec", "vpextrq"),
    ("kmovb.to_mask", "kmovb.from_mask"), ("kmovq.to_mask", "kmovq.from_mask"),
    ("vpmovm2d.128", "vpmovd2m.128"), ("vpmovm2d.256", "vpmovd2m.256"), ("vpmovm2d.512", "vpmovd2m.512"),
    ("vpmovm2d.128", "vpcmpeqd.k.128"), ("vpmovm2d.256", "vpcmpeqd.k.256"), ("vpmovm2d.512", "vpcmpeqd.k.512"),
    ("vpmovm2d.512", "vcmpps.k.512"), ("vpmovm2d.512", "vptestmd.512"), ("vpmovm2d.512", "vfpclassps.512"),
    ("vcvtsi2ss.64", "vcvttss2si.64"), ("vcvtsi2sd.64", "vcvttsd2si.64"), ("vmovd.to_vec", "vcvttss2si.32"),
    ("vmovd.to_vec", "vucomiss", "cmovb.64"), ("vmovd.to_vec", "vptest.256", "cmovb.64"),
    ("vmovd.to_vec", "vtestps.256", "cmovb.64"), ("kmovw.to_mask", "kortestw", "cmovb.64"),
    ("kmovw.to_mask", "ktestw", "cmovb.64"), ("cmp.64", "cmovb.64"), ("vcvtdq2pd.512", "vcvttpd2dq.512"),
)
"""Rows that lead from one kind of register to another, or to the flags, and at last back."""


def ins(name: str, *operands: Any) -> Instruction:
    return Instruction(ROWS[name], list(operands))


def g(number: int) -> Register:
    return Register("gpr", number)


def v(number: int) -> Register:
    return Register("vec", number)


def timed(body: list[Any], number: int) -> list[Any]:
    """A function that leaves the time-stamp ticks of LOOPS runs of `body` at [rdi]."""
    return [
        Label(f"case{number}", 64), ins("mov.64", g(11), g(3)),
        *[ins(f"vmovups.{WIDEST}", v(n), Memory(g(7), disp=1024)) for n in range(32 if WIDEST == 512 else 16)],
        ins("vpxor.256", v(15), v(15), v(15)),
        *[ins("kxnorq", Register("mask", n), Register("mask", n), Register("mask", n)) for n in range(1, 8)
          if WIDEST == 512],
        *[ins("push", g(n)) for n in SAVED],
        *[ins("mov.32", g(n), Immediate(5)) for n in (0, 1, 2, 3, 5, 6, 8, 9, 10, 14, 15)],
        ins("mov.32", g(12), Immediate(LOOPS)), ins("lfence"), ins("rdtsc"),
        ins("mov.64", g(13), g(0)), ins("lfence"), ins("mov.32", g(0), Immediate(5)), ins("mov.32", g(2), Immediate(0)),
        Label(f"loop{number}", 32), *body, ins("dec.64", g(12)), ins("jne", LabelReference(f"loop{number}")),
        ins("lfence"), ins("rdtsc"), ins("sub.64", g(0), g(13)), ins("mov.64", Memory(g(7)), g(0)),
        *[ins("pop", g(n)) for n in reversed(SAVED)],
        ins("mov.64", g(3), g(11)), ins("vzeroupper"), ins("ret")]


def operands(row: Row, choose: Any) -> list[Any]:
    """Register operands; choose(position, kind) gives the number."""
    made: list[Any] = []
    for position, spec in enumerate(row.operands):
        if spec.kind == "imm":
            made.append(Immediate(1))
        elif spec.index_bits:
            made.append(Memory(g(7), v(15), 1, 2048))
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


def spread(row: Row, n: int, high: bool) -> list[Any]:
    """Operands of the n-th of many instructions that do not wait for one another. high: of BESIDE and above too."""
    most = 32 if high and row.evex_features is not None and row.evex_features <= FEATURES else 16
    if not high:
        most = BESIDE[0]

    def choose(position: int, kind: str) -> int:
        if row.operands[position].writes:
            numbers = [m for m in WRITTEN[kind] if kind != "vec" or m < most]
            return int(numbers[(n + position) % len(numbers)])
        return {"vec": 1, "gpr": 1, "mask": 2}[kind] + (position == 2 and kind == "vec")

    return operands(row, choose)


def beside(row: Row, n: int) -> Instruction:
    """The n-th of many that wait neither for one another nor for what `spread` makes without high vectors."""
    return Instruction(row, operands(row, lambda position, kind: (
        BESIDE[n % len(BESIDE)] if row.operands[position].writes else 1 + (position == 2))))


def in_memory(item: Instruction) -> Instruction:
    """The same with memory wherever the row takes it, but for a first operand beside another in memory."""
    made = [Memory(g(7), disp=2048) if s.memory and not s.index_bits else o
            for s, o in zip(item.row.operands, item.operands, strict=True)]
    if sum(isinstance(o, Memory) for o in made) > 1:
        made[0] = v(4)
    return Instruction(item.row, made, item.mask)


def encodes(body: list[Any]) -> bool:
    try:
        encode(MachineFunction("probe", list(body), {}))
    except ValueError:
        return False
    return True


def independent(row: Row, count: int, high: bool = True) -> list[Any] | None:
    """`count` of a row that do not wait for one another, in registers, or else in memory; None if neither encodes."""
    mask = Register("mask", 7) if row.masking == "required" else None
    items = [Instruction(row, spread(row, n, high), mask) for n in range(count)]
    if not encodes(items[:1]):
        items = [in_memory(item) for item in items]
        if not encodes(items[:1]):
            return None
    return [i for item in items for i in ([ins("kxnorq", mask, mask, mask), item] if mask is not None else [item])]


def measurable() -> list[Row]:
    return [row for row in ROWS.values()     # a chain of divisions would trap
            if row.features <= FEATURES and row.name not in native.CANNOT_RUN and not row.control
            and row.mnemonic not in ("div", "idiv")]


def cycles_of(bodies: list[list[Any]]) -> list[float]:
    """Cycles of one run of each body: the least of many."""
    chain = [ins("add.64", g(8), g(8)) for _ in range(UNROLL)]
    functions = [i for number, body in enumerate([chain, *bodies]) for i in timed(body, number)]
    code = encode(MachineFunction("costs", functions, {}))
    address = native.load(code.code.ljust(-(-len(code.code) // 4096) * 4096, b"\xcc"))
    storage = np.zeros(8192 + 64, np.uint8)
    block = storage[-storage.ctypes.data % 64:][:8192]
    block[1024:1088] = np.full(16, 1.0, np.float32).view(np.uint8)
    pointer = block.ctypes.data
    block[POINTER_BYTES:POINTER_BYTES + 8] = np.array([pointer], np.uint64).view(np.uint8)

    def ticks(number: int) -> int:
        call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address + code.label_offsets[f"case{number}"])
        found = []
        for _ in range(7):
            call(pointer)
            found.append(int(block[:8].view(np.uint64)[0]))
        return min(found)

    measured = []
    for number in range(1, len(bodies) + 1):
        best = float("inf")
        for _ in range(2):
            best = min(best, ticks(number) / (ticks(0) / UNROLL))
        measured.append(best)
    return measured


def print_rows() -> None:
    plans: list[tuple[str, int, list[Any]]] = []
    for row in measurable():
        made = chained(row)
        chain = None if made is None else Instruction(row, made)
        bodies = [None if chain is None else [chain] * UNROLL,
                  None if chain is None else [chain, *[ins("nop")] * NOPS] * UNROLL, independent(row, UNROLL)]
        for place, body in enumerate(bodies):
            if body is not None and encodes(body[:1]):
                plans.append((row.name, place, body))
    figures: dict[str, list[str]] = {}
    for (name, place, _), cycles in zip(plans, cycles_of([body for _, _, body in plans]), strict=True):
        figures.setdefault(name, ["-", "-", "-"])[place] = f"{cycles / UNROLL:.3f}"
    for name, found in figures.items():
        print(name, *found)


def print_beside(references: list[str]) -> None:
    plans: list[tuple[str, list[Any]]] = []
    for row in measurable():
        wider = ROWS.get(f"{row.name.rpartition('.')[0]}.{row.length * 2}")
        if wider is not None and wider.features <= FEATURES:
            continue
        if not any(o.kind in ("vec", "mask") for o in row.operands):
            continue
        for name in references:
            for times in (1, 2):
                made = independent(row, UNROLL // (times + 1), high=False)
                if made is None or row.name == name:
                    continue
                others = [beside(ROWS[name], n) for n in range(UNROLL // (times + 1) * times)]
                size = len(made) * (times + 1) // UNROLL     # with what a mask takes
                body: list[Any] = []
                for n in range(0, len(made), size):
                    body += [*made[n:n + size], *others[n // size * times:n // size * times + times]]
                plans.append((row.name, body))
    found: dict[str, list[str]] = {}
    for (name, body), cycles in zip(plans, cycles_of([body for _, body in plans]), strict=True):
        one = sum(item.row.name == name for item in body)
        found.setdefault(name, []).append(f"{cycles / one:.3f}")
    for name, figures in found.items():
        print(name, *figures)


def print_chains() -> None:
    plans = []
    numbers = {"vec": 1, "gpr": 8, "mask": 2}
    for names in CHAINS:
        rows = [ROWS[name] for name in names]
        if not all(row.features <= FEATURES for row in rows):
            continue
        chain = [Instruction(row, operands(row, lambda position, kind: numbers[kind])) for row in rows]
        plans.append((" ".join(names), chain * UNROLL))
    for (name, _), cycles in zip(plans, cycles_of([body for _, body in plans]), strict=True):
        print(f"{name} {cycles / UNROLL:.2f}")


def print_accesses() -> None:
    plans: list[tuple[str, list[Any]]] = []
    loads = {32: "mov.32", 64: "mov.64"} | {bits: f"vmovups.{bits}" for bits in (128, 256, 512) if bits <= WIDEST}

    def access(bits: int, n: int, stores: bool) -> Instruction:
        register = g(WRITTEN["gpr"][n % 8]) if bits <= 64 else v(WRITTEN["vec"][n % 12])
        place = Memory(g(7), disp=2048 + n % 8 * 64)
        return ins(loads[bits], place, register) if stores else ins(loads[bits], register, place)

    for bits in loads:
        plans.append((f"load of {bits}", [access(bits, n, False) for n in range(UNROLL)]))
        plans.append((f"store of {bits}", [access(bits, n, True) for n in range(UNROLL)]))
        plans.append((f"load or store of {bits}, two to one", [access(bits, n, n % 3 == 2) for n in range(UNROLL)]))
    at = Memory(g(7), disp=POINTER_BYTES)
    plans.append(("load to a general register, latency", [ins("mov.64", g(7), at)] * UNROLL))
    for bits in (bits for bits in loads if bits >= 128):
        back = [ins(f"vmovups.{bits}", v(1), at), ins("vmovq.from_vec", g(7), v(1))]
        plans.append((f"load of {bits} and vmovq to a general register, latency of both, half", back * (UNROLL // 2)))
    for (name, _), cycles in zip(plans, cycles_of([body for _, body in plans]), strict=True):
        print(f"{name}: {cycles / UNROLL:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--beside", nargs="+", metavar="ROW", help="rows whose pipes are looked for")
    what.add_argument("--chains", action="store_true")
    what.add_argument("--accesses", action="store_true")
    asked = parser.parse_args()
    if asked.beside:
        print_beside(asked.beside)
    elif asked.chains:
        print_chains()
    elif asked.accesses:
        print_accesses()
    else:
        print_rows()


if __name__ == "__main__":
    main()
