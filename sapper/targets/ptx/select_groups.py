"""Selection rules of PTX: matrix instructions of groups of warps, copies of boxes, the signals between these.

See select.py. Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions", "TensorCore 5th Generation Family
Instructions", "cp.async.bulk.tensor", "mbarrier".
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
TENSOR_SWIZZLE_128_BYTES = 2 << 61 | 1 << 46
"""Of a descriptor of tcgen05: three bits, and what bits 46 to 48 always are (PTX ISA, "Shared memory descriptor")."""
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


def descriptor(s: Any, op: Op, side: str, base: Value, swizzle: int = SWIZZLE_128_BYTES) -> Any:
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
    s.emit("mov.b32", high, swizzle >> 32 | ROWS_OF_8_BYTES >> DESCRIPTOR_UNIT)
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


# --- Sums in tensor memory -------------------------------------------------------------------------------------------

def sums_open(s: Any, op: Op) -> None:
    """Nobody else on the SM asks for more after it."""
    s.emit("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32", near_scalar(s, op.operands[0]),
           op.attributes["columns"])
    s.emit("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned")


def sums_close(s: Any, op: Op) -> None:
    s.emit("tcgen05.dealloc.cta_group::1.sync.aligned.b32", low_half(s, op.operands[0]), op.attributes["columns"])


def instruction_descriptor(op: Op) -> int:
    """Types, majors and shape of a product with sums of f32, or i32 (PTX ISA, "Instruction descriptor")."""
    dtype = op.attributes["dtype"]
    elements = {"f16": 0, "bf16": 1, "f8e4m3": 0, "u8": 0, "i8": 1}
    a, b = elements[dtype.name], elements[op.attributes.get("right_dtype", dtype).name]
    sums = 2 if dtype.is_integer else 1
    left, right = (int(not op.attributes.get(f"{side}_rows", True)) for side in ("left", "right"))
    rows, columns = op.attributes["rows"], op.attributes["columns"]
    made: int = sums << 4 | a << 7 | b << 10 | left << 15 | right << 16 | columns >> 3 << 17 | rows >> 4 << 24
    return made


def sums_multiply(s: Any, op: Op) -> None:
    """One lane starts it."""
    left, right, place, adds = op.operands
    if op.name == "sums_multiply_rows":
        a = near_scalar(s, left, op.attributes.get("left_disp", 0))
    else:
        a = descriptor(s, op, "left", left, TENSOR_SWIZZLE_128_BYTES)
    b = descriptor(s, op, "right", right, TENSOR_SWIZZLE_128_BYTES)
    keeps, known = s.new("pred"), s.constant_of(adds)
    if known is None:
        s.emit("setp.ne.s64", keeps, s.scalar(adds), 0)
    else:
        s.emit("setp.eq.s32" if known else "setp.ne.s32", keeps, s.facts.lane, s.facts.lane)
    dtype = op.attributes["dtype"]
    kind = "i8" if dtype.is_integer else "f8f6f4" if dtype.bits == 8 else "f16"
    s.emit_masked(f"tcgen05.mma.cta_group::1.kind::{kind}", elected(s), False, near_scalar(s, place), a, b,
                  instruction_descriptor(op), keeps)


def sums_signal(s: Any, op: Op) -> None:
    """By the lane that started the products, as an instruction tells what its own thread did."""
    signal = near_scalar(s, op.operands[0], op.attributes.get("disp", 0))
    name = "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster"
    if "workers" in op.attributes:
        s.emit_masked(f"{name}.multicast::cluster.b64", elected(s), False, signal, cluster_mask(s, op))
    else:
        s.emit_masked(f"{name}.b64", elected(s), False, signal)


def sums_load(s: Any, op: Op) -> None:
    """16 lanes by 256 bits are the rows and columns of fragments.C."""
    s.emit(f"tcgen05.ld.sync.aligned.16x256b.x{len(op.results) // 4}.b32",
           tuple(s.define(result) for result in op.results),
           near_scalar(s, op.operands[0]))
    s.emit("tcgen05.wait::ld.sync.aligned")


def sums_store(s: Any, op: Op) -> None:
    """16 lanes by 128 bits are the rows and pairs of fragments.A."""
    place, *rows = op.operands
    s.emit(f"tcgen05.st.sync.aligned.16x128b.x{len(rows) // 2}.b32", near_scalar(s, place),
           tuple(s.vector(v) for v in rows))
    s.emit("tcgen05.wait::st.sync.aligned")


def _sums_fence(when: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        del op
        s.emit(f"tcgen05.fence::{when}_thread_sync")
    return rule


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
    "sums_open": sums_open, "sums_close": sums_close, "sums_multiply": sums_multiply, "sums_signal": sums_signal,
    "sums_multiply_rows": sums_multiply, "sums_load": sums_load, "sums_store": sums_store,
    "sums_acquire": _sums_fence("after"), "sums_release": _sums_fence("before"),
}
