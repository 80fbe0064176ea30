"""Selection rules of PTX: matrix instructions of groups of warps, copies of boxes, the signals between these.

See select.py. Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions", "cp.async.bulk.tensor", "mbarrier".
"""

from __future__ import annotations

from typing import Any

from ...ir.nodes import Op, Value
from ...lane.fragments import GROUP_DEPTH_BYTES
from .select_common import ALL_LANES, Rule, low_half, move
from .select_lanes import sync_lanes
from .select_memory import near_address, near_scalar
from .select_workers import arrive_everywhere, cluster_mask
from .text import NOBODY, TensorPlace

# --- Signals ---------------------------------------------------------------------------------------------------------

def _once(mnemonic: str, attribute: str = "", result: bool = False) -> Rule:
    """One lane acts on a signal. attribute: what is counted; result: the instruction has one, which is not wanted."""
    def rule(s: Any, op: Op) -> None:
        signal = near_scalar(s, op.operands[0], op.attributes.get("disp", 0))
        operands = [signal, *([op.attributes[attribute]] if attribute else [])]
        s.emit_masked(mnemonic, s.facts.first, False, *([NOBODY] if result else []), *operands)
    return rule


_arrive_here = _once("mbarrier.arrive.shared::cta.b64", result=True)


def signal_arrive(s: Any, op: Op) -> None:
    if "workers" not in op.attributes:
        _arrive_here(s, op)
        return
    signal = near_scalar(s, op.operands[0], op.attributes.get("disp", 0))
    arrive_everywhere(s, signal, op.attributes["workers"])


def signal_fence(s: Any, op: Op) -> None:
    del op
    s.emit("fence.mbarrier_init.release.cluster")


def signal_wait(s: Any, op: Op) -> None:
    """The instruction itself waits for a while."""
    signal = near_scalar(s, op.operands[0], op.attributes.get("disp", 0))
    parity = low_half(s, op.operands[1])
    over, label = s.new("pred"), s.new_label("signal")
    waits = s.new("pred")
    s.label(label)
    s.emit("mbarrier.try_wait.parity.shared::cta.b64", over, signal, parity)
    s.emit("not.pred", waits, over)
    s.branch("bra", label)
    s.body[-1].mask = waits


# --- Copies of boxes -------------------------------------------------------------------------------------------------

def elected(s: Any) -> Any:
    """A predicate that is on in one lane: in one that ptxas knows to be one, so that it makes no loop over lanes."""
    made, block = s.facts.addresses.get(("elected",), (None, None))
    if made is None or block not in s.scope:
        made = s.new("pred")
        s.emit("elect.sync", s.new("vec"), made, ALL_LANES)
        s.facts.addresses["elected",] = made, s.scope[-1]
    return made


def tensor_copy(s: Any, op: Op) -> None:
    near, signal, *coordinates = op.operands
    target = near_scalar(s, near, op.attributes.get("disp", 0))
    report = near_scalar(s, signal, op.attributes.get("signal_disp", 0))
    where = tuple(low_half(s, v) for v in reversed(coordinates))          # the innermost dimension first
    place = TensorPlace(s.facts.maps[op.attributes["map"]], where)
    mnemonic = f"cp.async.bulk.tensor.{len(where)}d.shared::cluster.global.mbarrier::complete_tx::bytes"
    if "workers" in op.attributes:
        s.emit_masked(f"{mnemonic}.multicast::cluster", elected(s), False, target, place, report, cluster_mask(s, op))
    else:
        s.emit_masked(mnemonic, elected(s), False, target, place, report)


def store_matrix(s: Any, op: Op) -> None:
    base, offsets, *held = op.operands
    memory = near_address(s, base, offsets, op.attributes.get("disp", 0), op.attributes.get("flip", 0))
    s.emit("stmatrix.sync.aligned.m8n8.x4.shared.b16", memory, tuple(s.vector(v) for v in held))


def store_fence(s: Any, op: Op) -> None:
    """Each lane makes its own stores visible to the asynchronous proxy; then the lane that starts the copies knows."""
    s.emit("fence.proxy.async.shared::cta")
    sync_lanes(s, op)


def tensor_store(s: Any, op: Op) -> None:
    near, *coordinates = op.operands
    where = tuple(low_half(s, v) for v in reversed(coordinates))
    s.emit_masked(f"cp.async.bulk.tensor.{len(where)}d.global.shared::cta.bulk_group", elected(s), False,
                  TensorPlace(s.facts.maps[op.attributes["map"]], where),
                  near_scalar(s, near, op.attributes.get("disp", 0)))


def store_wait(s: Any, op: Op) -> None:
    """The lane that started the copies waits until they have read."""
    s.emit_masked("cp.async.bulk.commit_group", elected(s), False)
    s.emit_masked("cp.async.bulk.wait_group.read", elected(s), False, op.attributes["pending"])
    sync_lanes(s, op)


# --- Matrix instructions ---------------------------------------------------------------------------------------------

DESCRIPTOR_UNIT, DESCRIPTOR_BITS = 4, 14
"""Bits of an address that a matrix descriptor leaves out, and that it has."""
SWIZZLE_128_BYTES = 1 << 62
ROWS_OF_8_BYTES = 1024
"""Eight swizzled rows: the pattern of 128-byte swizzling repeats (PTX ISA, "Matrix Descriptor Format")."""


def group_fence(s: Any, op: Op) -> None:
    del op
    s.emit("wgmma.fence.sync.aligned")


def group_commit(s: Any, op: Op) -> None:
    del op
    s.emit("wgmma.commit_group.sync.aligned")


def group_wait(s: Any, op: Op) -> None:
    """The sums stay where they are."""
    s.emit("wgmma.wait_group.sync.aligned", op.attributes["pending"])
    for value, result in zip(op.operands, op.results, strict=True):
        in_place(s, value, result)


def in_place(s: Any, value: Value, result: Value) -> Any:
    """The register in which `result` is to be made of `value`, which is there."""
    register, place = s.tie(result, (value,))
    if place < 0:
        move(s, register, s.vector(value), result.type)
    return register


def descriptor(s: Any, op: Op, side: str, base: Value) -> Any:
    """Where an operand starts in near memory and how its rows lie: 14 bits each of address, bytes between panels and
    bytes between groups of eight rows, by 16 bytes; and the swizzle."""
    rows = op.attributes[f"{side}_rows"]
    panel_bytes = 16 if rows else op.attributes[f"{side}_panel_bytes"]      # rows along the depth have no panels: 1
    key = (base, "descriptor")
    start, block = s.facts.addresses.get(key, (None, None))
    if start is None or block not in s.scope:
        start = s.new("vec")
        address = near_scalar(s, base).base
        if s.function.attributes.get("cluster", 1) > 1:     # above its 18 bits an address has the rank of the worker
            s.emit("bfe.u32", start, address, DESCRIPTOR_UNIT, DESCRIPTOR_BITS)
        else:
            s.emit("shr.u32", start, address, DESCRIPTOR_UNIT)
        s.facts.addresses[key] = start, s.scope[-1]
    low, high, made = s.new("vec"), s.new("vec"), s.new("gpr")
    disp = op.attributes.get(f"{side}_disp", 0)
    s.emit("add.s32", low, start, (disp >> DESCRIPTOR_UNIT) | (panel_bytes >> DESCRIPTOR_UNIT) << 16)
    s.emit("mov.b32", high, SWIZZLE_128_BYTES >> 32 | ROWS_OF_8_BYTES >> DESCRIPTOR_UNIT)
    s.emit("mov.b64", made, (low, high))
    return made


def group_multiply(s: Any, op: Op) -> None:
    """a in near memory or, as `group_multiply_rows`, in registers."""
    dtype = op.attributes["dtype"]
    name = dtype.name.removeprefix("f8") if dtype.bits == 8 else dtype.name
    fresh = op.attributes.get("fresh", False)
    if op.name == "group_multiply_rows":
        right, *rest = op.operands
        a: Any = tuple(s.vector(v) for v in rest[:4])
        sums, sides = rest[4:], ["right"]
    else:
        left, right, *sums = op.operands
        a, sides = descriptor(s, op, "left", left), ["left", "right"]
    b = descriptor(s, op, "right", right)
    # What is summed anew takes registers of what is no longer wanted: ptxas keeps others free for it through the loop.
    made = tuple(s.tie(result, (value,))[0] if fresh else in_place(s, value, result)
                 for value, result in zip(sums, op.results, strict=True))
    adds = s.new("pred")
    s.emit("setp.ne.s32" if fresh else "setp.eq.s32", adds, s.facts.lane, s.facts.lane)
    transposed = () if dtype.bits == 8 else (int(not op.attributes[f"{side}_rows"]) for side in sides)
    shape = f"m64n{2 * len(sums)}k{GROUP_DEPTH_BYTES // dtype.size_bytes}"
    s.emit(f"wgmma.mma_async.sync.aligned.{shape}.f32.{name}.{name}", made, a, b, adds, 1, 1, *transposed)


def register_budget(s: Any, op: Op) -> None:
    s.emit(f"setmaxnreg.{'inc' if op.attributes['more'] else 'dec'}.sync.aligned.u32", op.attributes["registers"])


RULES: dict[str, Rule] = {
    "signal_start": _once("mbarrier.init.shared::cta.b64", "arrivals"), "signal_fence": signal_fence,
    "signal_arrive": signal_arrive,
    "signal_expect": _once("mbarrier.arrive.expect_tx.shared::cta.b64", "bytes", result=True),
    "signal_wait": signal_wait, "tensor_copy": tensor_copy, "store_matrix": store_matrix,
    "store_fence": store_fence, "tensor_store": tensor_store, "store_wait": store_wait, "group_fence": group_fence,
    "group_multiply": group_multiply, "group_multiply_rows": group_multiply,
    "group_commit": group_commit, "group_wait": group_wait, "register_budget": register_budget,
}
