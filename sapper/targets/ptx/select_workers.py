"""Selection rules of PTX for what workers hand over to each other, and for those of a cluster.

Enters, leaves, holds: as select.py. Each warp of each worker has a flag in the sync block, zero unless it has handed
over what nobody has taken over yet. Lane 0 speaks for its warp: the meeting of the lanes before its release, and after
its acquire, makes what any lane stored visible to every lane of the warp that takes over (PTX ISA 8.9, causality
order).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...ir.nodes import Op
from ...lane.ops import FIRST_WORDS
from .text import FLAG_BYTES, FLAGS_AT, NOBODY

ALL_LANES = 0xFFFFFFFF


def _flag(s: Any, worker: Any) -> Any:
    """The flag of this warp in a worker, whose number is a 64-bit register."""
    facts = s.facts
    sync, number, at, place = (s.new("gpr") for _ in range(4))
    s.emit("ld.param.b64", sync, s.memory(None, label=FIRST_WORDS[2]))
    s.emit("mul.lo.s64", number, worker, facts.warps)
    s.emit("add.s64", at, number, facts.warp)
    s.emit("mad.lo.s64", place, at, FLAG_BYTES, sync)
    return s.memory(place, disp=FLAGS_AT)


def hand_over(s: Any, op: Op) -> None:
    del op
    one = s.new("vec")
    s.emit("mov.b32", one, 1)
    flag = _flag(s, s.facts.worker)
    s.emit("bar.warp.sync", ALL_LANES)
    s.emit_masked("st.release.gpu.global.u32", s.facts.first, False, flag, one)


def take_over(s: Any, op: Op) -> None:
    """The lanes go the same way, so that the loop is uniform. The flag is zero again for the next launch."""
    flag = _flag(s, s.scalar(op.operands[0]))
    spin, raised, waits = s.new_label("take_over"), s.new("vec"), s.new("pred")
    s.label(spin)
    s.emit("mov.b32", raised, 0)
    s.emit_masked("ld.acquire.gpu.global.u32", s.facts.first, False, raised, flag)
    s.emit("shfl.sync.idx.b32", raised, raised, 0, 31, ALL_LANES)
    s.emit("setp.eq.s32", waits, raised, 0)
    s.branch("bra.uni", spin)
    s.body[-1].mask = waits
    zero = s.new("vec")
    s.emit("mov.b32", zero, 0)
    s.emit_masked("st.relaxed.gpu.global.u32", s.facts.first, False, flag, zero)
    s.emit("bar.warp.sync", ALL_LANES)


# --- Clusters --------------------------------------------------------------------------------------------------------

def sync_cluster(s: Any, op: Op) -> None:
    """Signals that were started before are seen by all after, with their fence (PTX ISA, "barrier.cluster")."""
    del op
    s.emit("barrier.cluster.arrive.release.aligned")
    s.emit("barrier.cluster.wait.acquire.aligned")


def arrive_everywhere(s: Any, signal: Any, workers: int) -> None:
    """Lane r arrives at the signal of the worker of rank r."""
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
    s.emit_masked("mbarrier.arrive.release.cluster.shared::cluster.b64", mine, False, NOBODY, s.memory(there))


def cluster_mask(s: Any, op: Op) -> Any:
    """Of the workers that get a copy: all of a cluster."""
    key = "cluster mask", op.attributes["workers"]
    mask, block = s.facts.addresses.get(key, (None, None))
    if mask is None or block not in s.scope:
        mask = s.new("half")
        s.emit("mov.b16", mask, (1 << op.attributes["workers"]) - 1)
        s.facts.addresses[key] = mask, s.scope[-1]
    return mask


RULES: dict[str, Callable[[Any, Op], None]] = {
    "hand_over": hand_over, "take_over": take_over, "sync_cluster": sync_cluster}
