"""Loops over tiles of a product whose axes are not all known at the same time.

Enters: a tile function. Leaves: in a parallel loop, of a product's tiles the axes that start and end at what is known
before that loop stand outside, and inside those that do not, as rows of which memory tells how many there are. So tiles
of the former are tasks where a target has many workers. Holds: the meaning is the same.
"""

from __future__ import annotations

from ..ir.nodes import Block, Function, Op


def part_nests(function: Function) -> None:
    """In place."""
    for op in [op for op in function.walk() if op.name == "each" and op.attributes["parallel"]]:
        counters = set(op.blocks[0].arguments)
        for at, inner in enumerate(op.blocks[0].ops):
            if inner.name != "tiles" or not inner.attributes["parallel"] or not any(
                    o.name == "contract" for o in inner.walk()):
                continue
            axes: list[str] = inner.attributes["axes"]
            bounds = [inner.operands[2 * n:2 * n + 2] for n in range(len(axes))]
            inside = {r for o in op.blocks[0].ops for r in o.results} | counters
            known = [not inside.intersection(both) for both in bounds]
            if all(known) or not any(known):
                continue
            outer = Op("tiles", [v for both, fits in zip(bounds, known, strict=True) if fits for v in both], [],
                       {"parallel": True, "axes": [a for a, fits in zip(axes, known, strict=True) if fits]},
                       [Block()], inner.location)
            inner.operands[:] = [v for both, fits in zip(bounds, known, strict=True) if not fits for v in both]
            inner.attributes["axes"] = [a for a, fits in zip(axes, known, strict=True) if not fits]
            op.blocks[0].ops[at] = outer
            outer.blocks[0].ops += [inner, Op("yield", [], [], {}, None, inner.location)]
