"""The tables of ways in docs/choices/gpus.md ("Lanes that are threads"): python -m tests.targets.ptx.ways_table

What the choice (sapper/lane/conversions.py) gives for conversions, and for kernels as they are lowered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from unittest import mock

from sapper import targets
from sapper.codegen.pipeline import facts_of, to_lane
from sapper.kernels import find
from sapper.lane import fragment_stores
from sapper.lane.conversions import NEAR_MEMORY, Way, cheapest, conversions
from sapper.lane.fragment_stores import fragment, in_rows
from sapper.lane.layout import Layout
from sapper.targets.ptx.target import MOVES
from sapper.tile.schedule import DimClass, Schedule, Specialization

from .kernels import bf16_nt, gated

KERNELS: dict[str, Any] = {
    **{name: find(name).kernel for name in (
        "matmul_nt_bf16_bf16", "matmul_nt_bf16", "matmul_nt_residual_bf16_bf16", "matmul_nt_i8_scaled",
        "grouped_matmul_bf16_bf16", "attention_bf16_128")},
    "sums in bf16": bf16_nt, "gated": gated}
PADDINGS = (4, 32)
"""Bytes after each row in near memory: of single words, and of pairs."""
PACKED = fragment(64, 64, True)
CONVERSIONS = {
    "attention's weights, 16 x 16, as left operand": (
        Layout.parse("m: 2@register × 8@lane; n: 2@register × 4@lane"),
        Layout.parse("m: 2@register(stride 1) × 8@lane; n: 2@register(stride 2) × 4@lane")),
    "sums of 64 x 64 as rows": (fragment(64, 64), in_rows(64, 64, 32, False)),
    "sums of 64 x 64 in bf16, two blocks turned": (PACKED, fragment_stores.turned(PACKED, "n", 1)),
    "a square of 32 rows, turned": (Layout.parse("m: 32@register; n: 32@lane"),
                                    Layout.parse("m: 32@lane; n: 32@register")),
}


def chosen(kernel: Any, level: str, aligned: bool) -> tuple[list[Way], list[Way], str]:
    """The ways from registers of a kernel's last store, the last choice: of that store, or with near memory, and what
    the program does where there was none."""
    asked: list[list[Way]] = []

    def recorded(ways: Iterable[Way], *rest: Any) -> Way:
        asked.append(list(ways))
        return cheapest(asked[-1], *rest)

    tensors = [name for name, type in kernel.parameters if hasattr(type, "dims")]
    known = Specialization(dict.fromkeys(kernel.tile_ir().attributes["dims"], DimClass(8192, 64)),
                           dict.fromkeys(tensors, "contiguous"), frozenset(tensors if aligned else tensors[:-1]))
    with mock.patch.object(fragment_stores, "cheapest", recorded):
        lane = to_lane(kernel.tile_ir(), Schedule(), facts_of(targets.target(level)), known)
    through = [ways for ways in asked if ways[-1].name == NEAR_MEMORY]
    stores = [ways for ways in asked if ways[-1].name != NEAR_MEMORY]
    boxed = any(op.name == "tensor_store" for op in lane.walk())
    store = stores[-1] if stores else []
    return store, through[-1] if through else store, "boxes" if boxed else NEAR_MEMORY


def cell(ways: list[Way], *names: str) -> str:
    found = [way.price.cycles(MOVES) for way in ways if way.name in names]
    return f"{min(found):.0f}" if found else "–"


def lines() -> list[str]:
    made = ["| what | names | shuffles | near memory | taken |", "|---|---|---|---|---|"]
    for what, (source, target) in CONVERSIONS.items():
        ways = [way for padding in PADDINGS for way in conversions(source, target, MOVES, padding)]
        cells = [cell(ways, *names) for names in (("as it is", "names"), ("shuffles",), (NEAR_MEMORY,))]
        made.append(f"| {what} | {' | '.join(cells)} | {cheapest(ways, MOVES).name} |")
    made += ["", "| kernel | output | level | as it is | shuffles | near memory | taken |",
             "|---|---|---|---|---|---|---|"]
    for name, kernel in KERNELS.items():
        for level in ("sm_80", "sm_90a"):
            for aligned in (True, False):
                store, last, otherwise = chosen(kernel, level, aligned)
                loads = last[0].price.cycles(MOVES) - cheapest(store, MOVES).price.cycles(MOVES) \
                    if last is not store else 0
                cells = [cell(store, "as it is"), cell(store, "shuffles"), cell(last, NEAR_MEMORY)]
                cells[:2] = [f"{text} + {loads:.0f}" if loads and text != "–" else text for text in cells[:2]]
                taken = cheapest(last, MOVES).name if last else otherwise
                made.append(f"| {name} | {'aligned' if aligned else 'anywhere'} | {level} | {' | '.join(cells)} | "
                            f"{taken} |")
    return made


if __name__ == "__main__":
    print("\n".join(lines()))
