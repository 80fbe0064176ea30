"""Checks that a function is well formed: what every pass may rely on and must leave behind.

Enters: a Function and the op table of its stage. Leaves: nothing, or VerificationError. Holds afterwards: every op is
in the table with the counts and attributes that it asks for; each value is defined once and used only where its
definition is in scope; blocks yield what their op returns; types follow the rules of the stage (tile_rules.py,
lane_rules.py, docs/ir.md).
"""

from __future__ import annotations

from .checker import Checker, VerificationError
from .lane_rules import LANE_RULES
from .nodes import Function
from .ops import OpTable
from .tile_rules import TILE_RULES
from .types import TensorType, TileType

_RULES = {"tile": TILE_RULES, "lane": LANE_RULES}


def verify(function: Function, table: OpTable) -> None:
    """Raise VerificationError, naming op, source location, found and expected, if the function breaks a rule."""
    if function.stage != table.stage or function.stage not in _RULES:
        raise VerificationError(function, None, f"stage {function.stage}", f"{table.stage}")
    rules = _RULES[function.stage]
    missing = [name for name in table.rows if name not in rules]
    if missing:
        raise VerificationError(function, None, f"ops {missing} in the table", "a rule for every op of the table")
    check = Checker(function, table, rules)
    if function.stage == "tile":
        for argument in function.arguments:
            kind = argument.type
            if not isinstance(kind, (TensorType, TileType)) or (isinstance(kind, TileType) and kind.axes):
                check.fail(f"argument %{argument.name} of type {kind}", "a tensor or a scalar")
        if "dims" in function.attributes:
            check.dims = set(function.attributes["dims"])
    else:
        if function.arguments:
            check.fail(f"{len(function.arguments)} arguments", "none: lane functions read the argument block by `arg`")
        lanes = function.attributes.get("lanes")
        if type(lanes) is not int or lanes < 1 or lanes & (lanes - 1):
            check.fail(f"attribute lanes = {lanes!r}", "a power of 2")
        check.lanes = lanes
        slots = function.attributes.get("slots", [])
        if not isinstance(slots, (list, tuple)) or not all(type(s) is str for s in slots):
            check.fail(f"attribute slots = {slots!r}", "a list of strings")
        check.slots = len(slots)
        scratch_bytes = function.attributes.get("scratch_bytes", 0)
        if type(scratch_bytes) is not int or scratch_bytes < 0:
            check.fail(f"attribute scratch_bytes = {scratch_bytes!r}", "a size in bytes")
    check.run()

__all__ = ["VerificationError", "verify"]
