"""Selection rules of x86-64 for tile registers (AMX): palette 1, all tiles whole.

Enters and leaves as sapper/targets/x86_64/select.py says. Holds: the configuration is a constant beside the code; a
function leaves them configured as it found them, which is more than the System V ABI asks (AMD64 supplement, 3.2.1):
llama.cpp configures them once for each thread, and dies of another's release. No tile is copied: there is no
instruction for it, and `tile_multiply` works in place.
Source: Intel SDM volume 2, LDTILECFG, TILELOADD, TDPBF16PS, TDPBSSD and their kin.
"""

from __future__ import annotations

from typing import Any

from ...ir.nodes import Op
from .select_common import OwnConstants, Rule
from .tiles import CONFIGURATION_BYTES, ROW_BYTES, ROWS, TILES, configuration

_PRODUCTS = {("bf16", "bf16"): "tdpbf16ps", ("i8", "i8"): "tdpbssd", ("i8", "u8"): "tdpbsud", ("u8", "i8"): "tdpbusd",
             ("u8", "u8"): "tdpbuud"}


def tile_configure(s: Any, op: Op) -> None:
    size = s.function.attributes["tile"]
    if size != ROWS:
        raise ValueError(f"function {s.function.name}: found tiles of {size} rows; expected {ROWS} on this target; "
                         "mend: lower for it")
    whole = configuration([(ROWS, ROW_BYTES)] * TILES)
    s.emit("sttilecfg", s.memory(s.scalar(op.operands[0])))
    s.emit("ldtilecfg", s.memory(None, label=s.constant_label(CONFIGURATION_BYTES, whole)))


def tile_release(s: Any, op: Op) -> None:
    """What sttilecfg wrote: if nothing was configured, palette 0, of which ldtilecfg makes that again."""
    s.emit("ldtilecfg", s.memory(s.scalar(op.operands[0])))


def tile_zero(s: Any, op: Op) -> None:
    s.emit("tilezero", s.define(op.result))


def _rows(s: Any, op: Op, first: int) -> Any:
    """The memory of a tile's rows, whose base is operand `first`."""
    base, stride = (s.scalar(v) for v in op.operands[first:])
    return s.memory(base, stride, 1, op.attributes.get("disp", 0))


def tile_load(s: Any, op: Op) -> None:
    s.emit("tileloadd", s.define(op.result), _rows(s, op, 0))


def tile_store(s: Any, op: Op) -> None:
    s.emit("tilestored", _rows(s, op, 1), s.registers[op.operands[0]])


def tile_multiply(s: Any, op: Op) -> None:
    name = _PRODUCTS[op.attributes["dtype"].name, op.attributes["right_dtype"].name]
    left, right = (s.registers[v] for v in op.operands[1:])
    total, place = s.tie(op.result, (op.operands[0],))
    if place < 0:
        raise ValueError(f"function {s.function.name}: found sums of tile_multiply that are read again; expected their "
                         "last use, as no instruction copies tiles; mend: store them first")
    s.emit(name, total, left, right)


def tile_wake(s: Any, op: Op) -> None:
    """A multiply-add of 512 bits. Where none ran for some 2100 cycles, the next tilestored takes 1000 cycles more on a
    Granite Rapids, as products of tiles alone don't keep the unit from sleeping; loads, stores and sums of integers of
    512 bits don't either."""
    zero = s.new("vec")
    s.emit("vxorps.128", zero, zero, zero)
    s.emit("vfmadd231ps.512", zero, zero, zero)


RULES: dict[str, Rule] = {
    "tile_configure": tile_configure, "tile_release": tile_release, "tile_zero": tile_zero, "tile_load": tile_load,
    "tile_store": tile_store, "tile_wake": tile_wake, "tile_multiply": tile_multiply,
}
OWN_CONSTANTS: dict[str, OwnConstants] = {}
