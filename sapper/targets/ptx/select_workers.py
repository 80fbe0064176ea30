"""Selection rules of PTX: workers and warps meet, and workers hand over to each other; those of a cluster.

See select.py. Each warp of each worker has a flag in the sync block, zero unless it has handed over what nobody has
taken over yet. Lane 0 speaks for its warp: the meeting of the lanes before its release, and after its acquire, makes
what any lane stored visible to every lane of the warp that takes over (PTX ISA 8.9, causality order).
"""

from __future__ import annotations

from typing import Any

from ...ir.nodes import Op
from .select_common import Rule
from .select_control import branch_if, jump
from .select_lanes import shuffle, sync_lanes
from .select_scalars import load_word
from .text import FLAG_BYTES, FLAGS_AT, NOBODY

# --- Warps of a worker -----------------------------------------------------------------------------------------------

def warp(s: Any, op: Op) -> None:
    s.emit("mov.b64", s.define(op.results[0]), s.facts.warp)


def sync_warps(s: Any, op: Op) -> None:
    del op
    s.emit("bar.sync", 0)


# --- All workers -----------------------------------------------------------------------------------------------------

_ARRIVED, _GENERATION = 512, 516
"""Bytes from the sync block: how many workers have arrived (u32), and how often all have (u32)."""


def barrier(s: Any, op: Op) -> None:
    """The last warp to arrive resets the count and raises the generation, which the others watch.

    Every warp of the launch must be resident at once (a cooperative launch). Lane 0 speaks for its warp; what it reads
    goes to all lanes by a shuffle, so that the loop stays uniform. The fences on both sides, with the meeting of the
    lanes, make all that any lane wrote before visible to every lane after (PTX ISA 8.9, causality order). Of a worker
    of several warps the first one arrives and watches, when all of them have met, and they meet again before they go
    on.
    """
    facts = s.facts
    outside = s.new_label("barrier_done")
    if facts.warps > 1:
        sync_warps(s, op)
        other = s.new("pred")
        s.emit("setp.ne.s64", other, facts.warp, 0)
        branch_if(s, other, True, outside)
    sync, total = s.new("gpr"), s.new("vec")
    generation, arrived, now = s.new("vec"), s.new("vec"), s.new("vec")
    last, spin, after = s.new_label("barrier_last"), s.new_label("barrier_spin"), s.new_label("barrier")
    at_generation = s.memory(sync, disp=_GENERATION)
    sync_lanes(s, None)
    s.emit("fence.acq_rel.gpu")
    load_word(s, sync, 2)
    # The generation is read before arriving: afterwards the last one may raise it at any moment.
    s.emit("mov.b32", generation, 0)
    s.emit("mov.b32", arrived, 0)
    s.emit_masked("ld.acquire.gpu.global.u32", facts.first, False, generation, at_generation)
    s.emit_masked("atom.acq_rel.gpu.global.add.u32", facts.first, False, arrived, s.memory(sync, disp=_ARRIVED), 1)
    for register in (generation, arrived):
        shuffle(s, register, register, "idx", 0, False)
    s.emit("cvt.u32.u64", total, facts.workers)
    s.emit("sub.s32", total, total, 1)
    complete, waits = s.new("pred"), s.new("pred")
    s.emit("setp.eq.s32", complete, arrived, total)
    branch_if(s, complete, True, last)
    s.label(spin)
    s.emit("mov.b32", now, 0)
    s.emit_masked("ld.acquire.gpu.global.u32", facts.first, False, now, at_generation)
    shuffle(s, now, now, "idx", 0, False)
    s.emit("setp.eq.s32", waits, now, generation)
    branch_if(s, waits, True, spin)
    jump(s, after)
    s.label(last)
    zero = s.new("vec")
    s.emit("mov.b32", zero, 0)
    s.emit_masked("st.relaxed.gpu.global.u32", facts.first, False, s.memory(sync, disp=_ARRIVED), zero)
    s.emit_masked("red.release.gpu.global.add.u32", facts.first, False, at_generation, 1)
    s.label(after)
    s.emit("fence.acq_rel.gpu")
    sync_lanes(s, None)
    if facts.warps > 1:
        s.label(outside)
        sync_warps(s, op)


# --- From one worker to another --------------------------------------------------------------------------------------

def _flag(s: Any, worker: Any) -> Any:
    """The flag of this warp in a worker, whose number is a 64-bit register."""
    facts = s.facts
    sync, number, at, place = (s.new("gpr") for _ in range(4))
    load_word(s, sync, 2)
    s.emit("mul.lo.s64", number, worker, facts.warps)
    s.emit("add.s64", at, number, facts.warp)
    s.emit("mad.lo.s64", place, at, FLAG_BYTES, sync)
    return s.memory(place, disp=FLAGS_AT)


def hand_over(s: Any, op: Op) -> None:
    del op
    one = s.new("vec")
    s.emit("mov.b32", one, 1)
    flag = _flag(s, s.facts.worker)
    sync_lanes(s, None)
    s.emit_masked("st.release.gpu.global.u32", s.facts.first, False, flag, one)


def take_over(s: Any, op: Op) -> None:
    """The lanes go the same way, so that the loop is uniform. The flag is zero again for the next launch."""
    flag = _flag(s, s.scalar(op.operands[0]))
    spin, raised, waits = s.new_label("take_over"), s.new("vec"), s.new("pred")
    s.label(spin)
    s.emit("mov.b32", raised, 0)
    s.emit_masked("ld.acquire.gpu.global.u32", s.facts.first, False, raised, flag)
    shuffle(s, raised, raised, "idx", 0, False)
    s.emit("setp.eq.s32", waits, raised, 0)
    s.branch("bra.uni", spin)
    s.body[-1].mask = waits
    zero = s.new("vec")
    s.emit("mov.b32", zero, 0)
    s.emit_masked("st.relaxed.gpu.global.u32", s.facts.first, False, flag, zero)
    sync_lanes(s, None)


# --- Clusters --------------------------------------------------------------------------------------------------------

def sync_cluster(s: Any, op: Op) -> None:
    """Signals that were started before are seen by all after, with their fence (PTX ISA, "barrier.cluster")."""
    del op
    s.emit("barrier.cluster.arrive.release.aligned")
    s.emit("barrier.cluster.wait.acquire.aligned")


def arrive_everywhere(s: Any, signal: Any, workers: int) -> None:
    """Lane r arrives at the signal of the worker of rank r. It says that what was read is no longer needed, and hands
    over nothing that was written: so it takes the scope of a block, as CUTLASS does (ClusterBarrier). With that of the
    cluster ptxas puts two MEMBAR and the wait for their errors into the loop over the depth."""
    key = "lanes of ranks", workers
    mine, block = s.facts.addresses.get(key, (None, None))
    if mine is None or block not in s.scope:
        mine = s.new("pred")
        s.emit("setp.lt.s32", mine, s.facts.lane, workers)
        s.facts.addresses[key] = mine, s.scope[-1]
    here, there = signal.base, s.new("vec")
    if signal.disp:
        here = s.new("vec")
        s.emit("add.s32", here, signal.base, signal.disp)
    s.emit_masked("mapa.shared::cluster.u32", mine, False, there, here, s.facts.lane)
    s.emit_masked("mbarrier.arrive.shared::cluster.b64", mine, False, NOBODY, s.memory(there))


def cluster_mask(s: Any, op: Op) -> Any:
    """Of the workers that get a copy: all of a cluster."""
    key = "cluster mask", op.attributes["workers"]
    mask, block = s.facts.addresses.get(key, (None, None))
    if mask is None or block not in s.scope:
        mask = s.new("half")
        s.emit("mov.b16", mask, (1 << op.attributes["workers"]) - 1)
        s.facts.addresses[key] = mask, s.scope[-1]
    return mask


RULES: dict[str, Rule] = {
    "warp": warp, "sync_warps": sync_warps, "barrier": barrier,
    "hand_over": hand_over, "take_over": take_over, "sync_cluster": sync_cluster,
}
