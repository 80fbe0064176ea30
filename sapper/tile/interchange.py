"""Loops over indices inside the tiles of a product, taken around them.

Enters: a canonical tile function. Leaves: where all that a parallel loop over tiles does is a loop over indices whose
iterations write different elements, and that contracts to tiles of the former, as the taps of a convolution's gradient
do, the loop over indices around that over tiles, parallel too. So each index has a product of whole matrices, whose
operands are copied, and met by as many rows and columns as registers hold. Holds: the meaning is the same.

Measured on a Cascade Lake, one thread, gradient of the weights of 3 x 3 taps by 64 x 64 channels, of 2 x 32 x 32
points, in ms, before, now, and PyTorch beside them: 18.7, 1.7 and 2.2 to 2.6.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..ir.nodes import Block, Function, Op, Value
from .affine import affine
from .ops import place_of
from .plan import LATE, axes_of
from .sums import is_join


def interchange(function: Function) -> None:
    """In place."""
    blocks = [function.body]
    while blocks:
        block = blocks.pop()
        block.ops[:] = [_exchanged(op) or op for op in block.ops]
        blocks += [inner for op in block.ops for inner in op.blocks]


def _exchanged(tiles: Op) -> Op | None:
    """The loop that takes the place of one over tiles."""
    if tiles.name != "tiles" or not tiles.attributes["parallel"] or "repeats" in tiles.attributes:
        return None
    before: list[Op] = []       # what the body computes before the loop inside
    bounds: list[Value] = []
    counters: list[Value] = []
    block = tiles.blocks[0]
    while (loop := only_loop(block)) is not None:
        before += [op for op in block.ops if op is not loop and op.name != "yield"]
        inside = {result for op in before for result in op.results} | set(counters)
        if not inside.isdisjoint(loop.operands):
            return None
        bounds += loop.operands
        block = loop.blocks[0]
        counters += block.arguments
    if not counters or not _contracts(block, set(tiles.attributes["axes"])) or not all(
            write_apart(block, counter) for counter in counters):
        return None
    around = Block()
    around.arguments += counters
    for counter in counters:
        counter.owner = around
    products = Op("tiles", tiles.operands, [], tiles.attributes, [Block()], tiles.location)
    products.blocks[0].ops += [*before, *block.ops]
    around.ops += [products, Op("yield", [], [], {}, None, tiles.location)]
    return Op("each", bounds, [], {"count": len(counters), "parallel": True}, [around], tiles.location)


def only_loop(block: Block) -> Op | None:
    """The loop over indices that is all that a block does, but for what is computed of coordinates."""
    loops = [op for op in block.ops if op.blocks]
    others = [op for op in block.ops if not op.blocks]
    if len(loops) != 1 or loops[0].name != "each" or loops[0].results or loops[0].attributes.get("step", 1) != 1 or any(
            op.name in ("load", "store", *LATE) for op in others):
        return None
    return loops[0]


def _contracts(block: Block, axes: set[str]) -> bool:
    """Whether there are products in a block whose rows and columns are along the axes."""
    return any(op.name == "contract" and len(axes.intersection(axes_of(op.result))) > 1 for op in _inside(block))


def write_apart(block: Block, counter: Value) -> bool:
    """Whether iterations of a loop write different elements, which none of them reads but where it writes itself: of
    each tensor all stores have the counter as an index, at the same place."""
    stored: dict[Value, tuple[Value, set[tuple[int, int, int]]]] = {}
    written: set[tuple[Value, ...]] = set()
    for op in (op for op in _inside(block) if op.name == "store"):
        tensor, places = op.operands[0], set()
        for place, index in enumerate(op.operands[2:]):
            form = affine(index)
            if form is not None and not form.axes and form.scalars.keys() == {counter}:
                places.add((place, form.constant, form.scalars[counter]))
        first, known = stored.setdefault(place_of(tensor), (tensor, places))
        known &= places
        written.add((tensor, *op.operands[2:]))
        if is_join(op) or first is not tensor or not known:
            return False
    loads = [op for op in _inside(block) if op.name == "load" and place_of(op.operands[0]) in stored]
    return not loads or (len(written) == len(stored) and all(tuple(op.operands) in written for op in loads))


def _inside(block: Block) -> Iterator[Op]:
    for op in block.ops:
        yield from op.walk()
