"""What a piece of assembly does, derived from its rows, and compared with what its author declares.

Enters: an `Assembly` that the static checks have passed. Leaves: `Effects`; `AssemblyError` ("effects") where a
declaration says less or more than is true. Holds: virtual registers are no effect, as the allocator keeps them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..codegen.machine import Instruction, Memory, Register
from ..codegen.row_facts import WRITE, facts_table
from ..ir.nodes import Location
from .build import Assembly
from .errors import AssemblyError
from .static import accessed_regions


@dataclass(frozen=True, slots=True)
class Effects:
    """reads, writes: regions of memory by name. clobbers: physical registers written, by name, but the stack pointer.

    flags: whether the flags are changed. aligned: region -> the largest alignment in bytes that an access to it needs.
    features: those of the forms used.
    """

    reads: frozenset[str]
    writes: frozenset[str]
    clobbers: frozenset[str]
    flags: bool
    aligned: dict[str, int]
    features: frozenset[str]


def effects_of(assembly: Assembly, target: Any) -> Effects:
    """Derive the effects. Raises AssemblyError for what static.py finds."""
    table = assembly.table
    facts = facts_table(table.register_file(target))
    clobbers: set[str] = set()
    features: set[str] = set()
    flags = False
    for item in assembly.body:
        if not isinstance(item, Instruction):
            continue
        known = facts[item.row]
        written = [o for how, o in zip(known.access, item.operands, strict=True)
                   if how & WRITE and isinstance(o, Register)]
        written += [Register(*pair) for pair in known.writes]
        clobbers |= {name_of(table, r) for r in written if (r.kind, r.number) != table.STACK_POINTER}
        flags = flags or known.writes_flags
        evex = item.mask is not None or any(isinstance(o, Memory) and o.broadcast for o in item.operands)
        features |= (item.row.evex_features or frozenset()) if evex else item.row.features
    reads: set[str] = set()
    writes: set[str] = set()
    aligned: dict[str, int] = {}
    for item, spec, region in accessed_regions(assembly, target):
        if spec.reads:
            reads.add(region)
        if spec.writes:
            writes.add(region)
        if item.row.mnemonic in table.ALIGNED:
            aligned[region] = max(aligned.get(region, 1), spec.memory_bits // 8)
    return Effects(frozenset(reads), frozenset(writes), frozenset(clobbers), flags, aligned, frozenset(features))


def name_of(table: Any, register: Register) -> str:
    """The name of a register at its full size."""
    full: tuple[int, str] = max((bits, name) for name, (kind, number, bits) in table.REGISTERS.items()
               if (kind, number) == (register.kind, register.number))
    return full[1]


def compare(assembly: Assembly, target: Any, reads: str = "", writes: str = "", clobbers: str = "",
            features: str | None = None, aligned: Mapping[str, int] | None = None,
            location: Location | None = None) -> Effects:
    """Compare a declaration (names separated by blanks) with what is derived. Raises AssemblyError."""
    found = effects_of(assembly, target)
    for what, declared, derived in (("reads", reads, found.reads), ("writes", writes, found.writes),
                                    ("clobbers", clobbers, found.clobbers)):
        names = frozenset(declared.split())
        if names != derived:
            more, less = sorted(derived - names), sorted(names - derived)
            wrong = [f"also {' '.join(more)}"] if more else []
            wrong += [f"not {' '.join(less)}"] if less else []
            raise AssemblyError(
                "effects", f"{assembly.name} {what} something else than it declares", location, "; ".join(wrong),
                " ".join(sorted(names)) or "nothing", f"declare {what}={' '.join(sorted(derived))!r}, or mend the code")
    if features is not None:
        missing = sorted(found.features - assembly.table.with_implied(frozenset(features.split())))
        if missing:
            raise AssemblyError("effects", f"{assembly.name} needs features that it does not declare", location,
                                " ".join(missing), features or "none",
                                f"declare features={' '.join(sorted({*features.split(), *missing}))!r}")
    if aligned is not None:
        for region, bytes_ in sorted(found.aligned.items()):
            if aligned.get(region, 1) % bytes_:
                raise AssemblyError("effects", f"{assembly.name} needs {region} aligned otherwise than it declares",
                                    location, f"{bytes_} bytes", f"{aligned.get(region, 1)} bytes",
                                    f"declare aligned={{{region!r}: {bytes_}}}, or take unaligned moves")
    return found
