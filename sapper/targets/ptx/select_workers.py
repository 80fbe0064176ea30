"""Selection rules of PTX for what workers hand over to each other.

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
from .text import FLAG_BYTES, FLAGS_AT

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


RULES: dict[str, Callable[[Any, Op], None]] = {"hand_over": hand_over, "take_over": take_over}
