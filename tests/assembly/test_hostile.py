"""Blocks of a hostile author: each wrong in its own way, refused at the line that is wrong, with what would mend it.

A block ends its wrong line in `# here`. Naked ones write their own prologue; the others get a frame that is made for
them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from sapper.assembly import x86
from sapper.assembly.build import Assembly, Region
from sapper.assembly.errors import AssemblyError
from sapper.assembly.finish import finish
from sapper.assembly.polynomial import Polynomial, Symbol
from sapper.targets.x86_64.target import target
from tests.assembly.pieces import ZEN4, piece


@dataclass(frozen=True)
class Wrong:
    """kind: of the error. part: of its message. naked: as of Assembly. chip: for which it is checked."""

    write: Callable[..., None]
    kind: str
    part: str
    naked: bool
    chip: Any


WRONG: list[Wrong] = []


def wrong(kind: str, part: str = "", naked: bool = False, chip: Any = ZEN4) -> Callable[[Any], Any]:
    def add(write: Any) -> Any:
        WRONG.append(Wrong(write, kind, part, naked, chip))
        return write

    return add


class Frame:
    """Arguments of a block: x (read) and y (written), n elements of 4 bytes each; n itself."""

    def __init__(self, a: Assembly) -> None:
        n = Polynomial.of(Symbol.new("N"))
        self.x = a.input(x86.rdi, Region("x", False, n * 4))
        self.y = a.input(x86.rsi, Region("y", True, n * 4))
        self.n = a.input(x86.rdx, None, n)


# --- Registers --------------------------------------------------------------------------------------------------------

@wrong("undefined", "upper")
def byte_of_a_register(a: Assembly, f: Frame) -> None:
    r = a.r64()
    x86.cmp(f.n, 4)
    x86.jl(end := a.label())
    x86.cmp(f.n, 8)
    x86.sete(r.at(8))
    x86.mov(x86.ptr[f.y], r)  # here
    a.place(end)
    x86.ret()


@wrong("undefined", "vzeroupper")
def row_across_vzeroupper(a: Assembly, f: Frame) -> None:
    v = a.ymm()
    x86.cmp(f.n, 8)
    x86.jl(end := a.label())
    x86.vmovups(v, x86.ptr[f.x])
    x86.vzeroupper()
    x86.vmovups(x86.ptr[f.y], v)  # here
    a.place(end)
    x86.ret()


@wrong("undefined")
def merging_into_nothing(a: Assembly, f: Frame) -> None:
    v, k = a.zmm(), a.mask()
    x86.kxorw(k, k, k)
    x86.vpaddd(v[k], v, v)  # here
    x86.ret()


@wrong("undefined")
def accumulator_never_cleared(a: Assembly, f: Frame) -> None:
    total = a.zmm()
    with a.loop(0, f.n, 16) as i:
        x86.vaddps(total, total, x86.ptr[f.x + i * 4])  # here
    x86.ret()


@wrong("clobber", "div")
def quotient_over_a_pinned_value(a: Assembly, f: Frame) -> None:
    held = a.pin("rdx")
    x86.mov(held, 7)
    x86.mov(x86.rax, 5)
    x86.mov(x86.rcx, 3)
    x86.xor(x86.edx, x86.edx)
    x86.div(x86.rcx)
    x86.mov(x86.rax, held)  # here
    x86.ret()


@wrong("clobber")
def two_names_for_one_register(a: Assembly, f: Frame) -> None:
    total, other = a.pin("zmm5"), a.pin("zmm5")
    x86.vpxord(total, total, total)
    x86.vpternlogd(other, other, other, 0xFF)
    x86.vaddps(x86.zmm6, total, total)  # here
    x86.ret()


@wrong("undefined", "call", naked=True)
def mask_after_a_call(a: Assembly, f: Frame) -> None:
    x86.kxnorw(x86.k1, x86.k1, x86.k1)
    x86.push(x86.rdi)
    x86.call(x86.rdi)
    x86.pop(x86.rdi)
    x86.kmovw(x86.eax, x86.k1)  # here
    x86.ret()


@wrong("undefined", "call", naked=True)
def red_zone_across_a_call(a: Assembly, f: Frame) -> None:
    x86.mov(x86.ptr[x86.rsp - 16], x86.rdi)
    x86.sub(x86.rsp, 8)
    x86.call(x86.rdi)
    x86.add(x86.rsp, 8)
    x86.mov(x86.rax, x86.ptr[x86.rsp - 16])  # here
    x86.ret()


@wrong("callee-saved", naked=True)
def saved_below_a_call(a: Assembly, f: Frame) -> None:
    x86.mov(x86.ptr[x86.rsp - 24], x86.rbx)
    x86.xor(x86.ebx, x86.ebx)
    x86.sub(x86.rsp, 8)
    x86.call(x86.rdi)
    x86.add(x86.rsp, 8)
    x86.ret()  # here


@wrong("callee-saved", "r15", naked=True)
def saved_in_pairs_but_one(a: Assembly, f: Frame) -> None:
    for register in (x86.rbx, x86.r12, x86.r15):
        x86.push(register)
    x86.mov(x86.r15, x86.rdi)
    x86.mov(x86.r12, x86.rdi)
    x86.add(x86.rsp, 8)
    x86.pop(x86.r12)
    x86.pop(x86.rbx)
    x86.ret()  # here


# --- Flags ------------------------------------------------------------------------------------------------------------

@wrong("flags", "add")
def comparison_before_the_pointer_moves(a: Assembly, f: Frame) -> None:
    end = a.label()
    x86.cmp(f.n, 16)
    x86.add(f.x, 64)
    x86.jl(end)  # here
    x86.nop()
    a.place(end)
    x86.ret()


@wrong("flags", "address")
def countdown_before_the_pointer_moves(a: Assembly, f: Frame) -> None:
    end = a.label()
    x86.sub(f.n, 16)
    x86.add(f.x, 64)
    x86.js(end)  # here
    x86.nop()
    a.place(end)
    x86.ret()


@wrong("flags", "call", naked=True)
def flags_of_a_call(a: Assembly, f: Frame) -> None:
    end = a.label()
    x86.sub(x86.rsp, 8)
    x86.test(x86.rdi, x86.rdi)
    x86.je(end)
    x86.call(x86.rdi)
    x86.je(end)  # here
    a.place(end)
    x86.add(x86.rsp, 8)
    x86.ret()


@wrong("flags", "shl")
def zero_of_a_shift_by_cl(a: Assembly, f: Frame) -> None:
    """A shift by no bits leaves the flags as they were."""
    end = a.label()
    x86.mov(x86.rcx, f.n)
    x86.shl(f.n, x86.cl)
    x86.je(end)  # here
    x86.nop()
    a.place(end)
    x86.ret()


@wrong("flags", "mul")
def zero_of_a_product(a: Assembly, f: Frame) -> None:
    end = a.label()
    x86.mov(x86.rax, f.n)
    x86.mul(x86.rax)
    x86.jne(end)  # here
    x86.nop()
    a.place(end)
    x86.ret()


# --- Stack ------------------------------------------------------------------------------------------------------------

@wrong("stack", "unbalanced", naked=True)
def push_without_a_pop(a: Assembly, f: Frame) -> None:
    x86.push(x86.rdi)
    x86.push(x86.rsi)
    x86.pop(x86.rax)
    x86.ret()  # here


@wrong("stack", "misaligned", naked=True)
def call_after_two_pushes(a: Assembly, f: Frame) -> None:
    x86.push(x86.rdi)
    x86.push(x86.rsi)
    x86.call(x86.rdi)  # here
    x86.add(x86.rsp, 16)
    x86.ret()


@wrong("stack", "different", naked=True)
def push_in_a_loop(a: Assembly, f: Frame) -> None:
    head = a.here()
    x86.push(x86.rdi)  # here
    x86.sub(x86.rdx, 1)
    x86.jg(head)
    x86.ret()


@wrong("stack", "followed", naked=True)
def stack_pointer_from_memory(a: Assembly, f: Frame) -> None:
    x86.mov(x86.rsp, x86.ptr[x86.rdi])  # here
    x86.ret()


@wrong("stack", "return address", naked=True)
def over_the_return_address(a: Assembly, f: Frame) -> None:
    x86.sub(x86.rsp, 24)
    x86.mov(x86.ptr[x86.rsp + 24], x86.rdi)  # here
    x86.add(x86.rsp, 24)
    x86.ret()


@wrong("stack", "128", naked=True)
def below_the_red_zone(a: Assembly, f: Frame) -> None:
    x86.mov(x86.ptr[x86.rsp - 136], x86.rdi)  # here
    x86.ret()


@wrong("stack", "frame")
def into_the_frame_that_is_made(a: Assembly, f: Frame) -> None:
    x86.mov(x86.rax, x86.ptr[x86.rsp + 8])  # here
    x86.ret()


@wrong("stack", "frame")
def over_the_frame_that_is_made(a: Assembly, f: Frame) -> None:
    x86.mov(x86.ptr[x86.rsp - 8], f.n)  # here
    x86.ret()


@wrong("undefined", "stack", naked=True)
def slot_never_written(a: Assembly, f: Frame) -> None:
    x86.sub(x86.rsp, 24)
    x86.mov(x86.ptr[x86.rsp + 8], x86.rdi)
    x86.mov(x86.rax, x86.ptr[x86.rsp + 16])  # here
    x86.add(x86.rsp, 24)
    x86.ret()


@wrong("stack", "naked")
def frame_by_hand_in_a_framed_block(a: Assembly, f: Frame) -> None:
    x86.sub(x86.rsp, 64)  # here
    x86.add(x86.rsp, 64)
    x86.ret()


@wrong("stack", "call")
def call_in_a_framed_block(a: Assembly, f: Frame) -> None:
    x86.call(f.n)  # here
    x86.ret()


# --- Upper halves, modes ----------------------------------------------------------------------------------------------

@wrong("mixing", "vzeroupper", naked=True)
def wide_on_one_path(a: Assembly, f: Frame) -> None:
    end = a.label()
    x86.test(x86.rdi, x86.rdi)
    x86.je(end)
    x86.vpxor(x86.ymm1, x86.ymm1, x86.ymm1)
    a.place(end)
    x86.ret()  # here


@wrong("mixing", "call", naked=True)
def wide_across_a_call(a: Assembly, f: Frame) -> None:
    x86.push(x86.rdi)
    x86.vpternlogd(x86.zmm1, x86.zmm1, x86.zmm1, 0xFF)
    x86.call(x86.rdi)  # here
    x86.vzeroupper()
    x86.pop(x86.rdi)
    x86.ret()


@wrong("state", "MXCSR")
def flush_to_zero_left_on(a: Assembly, f: Frame) -> None:
    x86.vldmxcsr(x86.ptr[a.constant(np.uint32(0x9FC0))])
    x86.ret()  # here


@wrong("state", "MXCSR")
def mode_restored_on_one_path(a: Assembly, f: Frame) -> None:
    end = a.label()
    x86.cmp(f.n, 4)
    x86.jl(end)
    x86.vstmxcsr(x86.ptr[f.y])
    x86.vldmxcsr(x86.ptr[a.constant(np.uint32(0x9FC0))])
    x86.cmp(f.n, 100)
    x86.jl(end)
    x86.vldmxcsr(x86.ptr[f.y])
    a.place(end)
    x86.ret()  # here


@wrong("state", "MXCSR")
def mode_restored_from_what_was_overwritten(a: Assembly, f: Frame) -> None:
    end = a.label()
    x86.cmp(f.n, 4)
    x86.jl(end)
    x86.vstmxcsr(x86.ptr[f.y])
    x86.vldmxcsr(x86.ptr[a.constant(np.uint32(0x9FC0))])
    x86.mov(x86.dword[f.y], f.n.r32)
    x86.vldmxcsr(x86.ptr[f.y])
    a.place(end)
    x86.ret()  # here


@wrong("state", "direction", naked=True)
def direction_flag_from_a_word(a: Assembly, f: Frame) -> None:
    x86.mov(x86.rax, 0x400)
    x86.push(x86.rax)
    x86.popfq()  # here
    x86.ret()


# --- Memory -----------------------------------------------------------------------------------------------------------

@wrong("read-only", "x")
def store_to_an_input(a: Assembly, f: Frame) -> None:
    with a.loop(0, f.n) as i:
        x86.mov(x86.dword[f.x + i * 4], 0)  # here
    x86.ret()


@wrong("read-only", "x")
def change_of_an_input(a: Assembly, f: Frame) -> None:
    with a.loop(0, f.n) as i:
        x86.lock_add(x86.dword[f.x + i * 4], 1)  # here
    x86.ret()


@wrong("read-only", "x")
def store_through_one_of_two(a: Assembly, f: Frame) -> None:
    at = a.r64()
    x86.mov(at, f.y)
    x86.cmp(f.n, 4)
    x86.jl(end := a.label())
    x86.cmp(f.n, 8)
    x86.cmovl(at, f.x)
    x86.mov(x86.dword[at], 1)  # here
    a.place(end)
    x86.ret()


@wrong("read-only", "x")
def scatter_to_an_input(a: Assembly, f: Frame) -> None:
    index, k = a.zmm(), a.mask()
    x86.vpxord(index, index, index)
    x86.kxnorw(k, k, k)
    x86.vpscatterdd(x86.ptr[f.x + index * 4][k], index)  # here
    x86.ret()


@wrong("read-only", "constants")
def store_to_a_constant(a: Assembly, f: Frame) -> None:
    v = a.zmm()
    x86.vpxord(v, v, v)
    x86.vmovups(x86.ptr[a.constant(np.zeros(16, np.float32))], v)  # here
    x86.ret()


@wrong("footprint", "constant")
def past_a_constant(a: Assembly, f: Frame) -> None:
    x86.vpermps(a.zmm(), zeroed(a), x86.ptr[a.constant(np.zeros(8, np.float32))])  # here
    x86.ret()


def zeroed(a: Assembly) -> Any:
    v = a.zmm()
    x86.vpxord(v, v, v)
    return v


@wrong("footprint", "no pointer")
def number_as_an_address(a: Assembly, f: Frame) -> None:
    x86.mov(x86.rax, x86.ptr[f.n + 8])  # here
    x86.ret()


@wrong("footprint", "bytes -4 to -1")
def before_the_first(a: Assembly, f: Frame) -> None:
    with a.loop(0, f.n) as i:
        x86.vmovss(a.xmm(), x86.ptr[f.x + i * 4 - 4])  # here
    x86.ret()


@wrong("footprint", "bytes 4 to 7")
def one_past_the_last(a: Assembly, f: Frame) -> None:
    with a.loop(0, f.n) as i:
        x86.vmovss(a.xmm(), x86.ptr[f.x + i * 4 + 4])  # here
    x86.ret()


@wrong("footprint")
def tail_without_a_mask(a: Assembly, f: Frame) -> None:
    with a.loop(0, f.n, 16) as i:
        x86.vmovups(a.zmm(), x86.ptr[f.x + i * 4])
    with a.loop(i, f.n):
        x86.vmovups(a.zmm(), x86.ptr[f.x + i * 4])  # here
    x86.ret()


@wrong("footprint")
def rounds_that_are_too_many(a: Assembly, f: Frame) -> None:
    """Up to and with n, where the last element is n - 1."""
    counter = a.r64()
    x86.xor(counter.r32, counter.r32)
    head = a.here()
    x86.vmovss(a.xmm(), x86.ptr[f.x + counter * 4])  # here
    x86.inc(counter)
    x86.cmp(counter, f.n)
    x86.jle(head)
    x86.ret()


@wrong("footprint", "N = 0")
def first_round_without_a_question(a: Assembly, f: Frame) -> None:
    counter = a.r64()
    x86.xor(counter.r32, counter.r32)
    head = a.here()
    x86.vmovss(a.xmm(), x86.ptr[f.x + counter * 4])  # here
    x86.inc(counter)
    x86.cmp(counter, f.n)
    x86.jl(head)
    x86.ret()


@wrong("footprint")
def mask_of_one_lane_too_many(a: Assembly, f: Frame) -> None:
    with a.loop(0, f.n, 16) as i:
        x86.nop()
    ones, rest = a.r64(), a.mask()
    x86.sub(f.n, i)
    x86.inc(f.n)
    x86.mov(ones, -1)
    x86.bzhi(ones, ones, f.n)
    x86.kmovw(rest, ones.r32)
    x86.vmovups(a.zmm()[rest, x86.z], x86.ptr[f.x + i * 4])  # here
    x86.ret()


@wrong("footprint")
def mask_of_what_is_behind(a: Assembly, f: Frame) -> None:
    """The lanes of the rest, at the place of the last whole vector's end, one element on."""
    with a.loop(0, f.n, 16) as i:
        x86.nop()
    ones, rest = a.r64(), a.mask()
    x86.sub(f.n, i)
    x86.mov(ones, -1)
    x86.bzhi(ones, ones, f.n)
    x86.kmovw(rest, ones.r32)
    x86.vmovups(a.zmm()[rest, x86.z], x86.ptr[f.x + i * 4 + 4])  # here
    x86.ret()


@wrong("footprint")
def elements_taken_for_bytes(a: Assembly, f: Frame) -> None:
    with a.loop(0, f.n) as i:
        x86.vmovss(a.xmm(), x86.ptr[f.x + i * 8])  # here
    x86.ret()


@wrong("footprint")
def pointer_that_runs_on(a: Assembly, f: Frame) -> None:
    """Two loops over one pointer, the second without its start."""
    for _ in range(2):
        with a.loop(0, f.n):
            x86.vmovss(a.xmm(), x86.ptr[f.x])  # here
            x86.add(f.x, 4)
    x86.ret()


@wrong("footprint", "(4*N)")
def broadcast_at_the_end(a: Assembly, f: Frame) -> None:
    x86.vaddps(a.zmm(), zeroed(a), x86.broadcast[f.x + f.n * 4])  # here
    x86.ret()


# --- Features, operands -----------------------------------------------------------------------------------------------

@wrong("feature", "avx512_bf16", chip=target("v4"))
def bf16_on_v4(a: Assembly, f: Frame) -> None:
    v = zeroed(a)
    x86.vdpbf16ps(v, v, v)  # here
    x86.ret()


@wrong("feature", "avx512", chip=target("v3"))
def opmask_on_v3(a: Assembly, f: Frame) -> None:
    k = a.mask()
    x86.kxorw(k, k, k)  # here
    x86.ret()


@wrong("feature", "avx512", chip=target("v3"))
def broadcast_on_v3(a: Assembly, f: Frame) -> None:
    v = a.ymm()
    x86.vpxor(v, v, v)
    x86.vaddps(v, v, x86.broadcast[a.constant(np.float32(1))])  # here
    x86.ret()


@wrong("feature", "avx512_vnni", chip=target("skylake-avx512"))
def vnni_on_skylake(a: Assembly, f: Frame) -> None:
    v = zeroed(a)
    x86.vpdpbusd(v, v, v)  # here
    x86.ret()


@wrong("operands")
def widths_that_do_not_meet(a: Assembly, f: Frame) -> None:
    x86.vaddps(a.zmm(), a.ymm(), a.zmm())  # here


@wrong("operands")
def mask_on_a_source(a: Assembly, f: Frame) -> None:
    k, v = a.mask(), a.zmm()
    x86.vaddps(v, v[k], v)  # here


@wrong("operands")
def immediate_too_large(a: Assembly, f: Frame) -> None:
    x86.vpslld(a.zmm(), a.zmm(), 300)  # here


@wrong("unknown-instruction", "vfmadd231ps")
def slip_of_the_pen(a: Assembly, f: Frame) -> None:
    a.text("vfmadd23ps zmm0, zmm1, zmm2")  # here


# --- Control ----------------------------------------------------------------------------------------------------------

@wrong("loop")
def counter_that_is_doubled(a: Assembly, f: Frame) -> None:
    counter = a.r64()
    x86.xor(counter.r32, counter.r32)
    head = a.here()
    x86.shl(counter, 1)
    x86.cmp(counter, f.n)
    x86.jl(head)  # here
    x86.ret()


@wrong("loop")
def step_of_nothing(a: Assembly, f: Frame) -> None:
    counter, step = a.r64(), a.r64()
    x86.xor(counter.r32, counter.r32)
    x86.xor(step.r32, step.r32)
    head = a.here()
    x86.add(counter, step)
    x86.cmp(counter, f.n)
    x86.jl(head)  # here
    x86.ret()


@wrong("loop")
def counter_in_memory(a: Assembly, f: Frame) -> None:
    x86.cmp(f.n, 4)
    x86.jl(end := a.label())
    head = a.here()
    x86.dec(x86.dword[f.y])
    x86.jne(head)  # here
    a.place(end)
    x86.ret()


@wrong("loop")
def step_left_out_on_one_path(a: Assembly, f: Frame) -> None:
    counter, over = a.r64(), a.label()
    x86.xor(counter.r32, counter.r32)
    head = a.here()
    x86.test(f.n, 1)
    x86.je(over)
    x86.inc(counter)
    a.place(over)
    x86.cmp(counter, f.n)
    x86.jl(head)  # here
    x86.ret()


@wrong("loop")
def stepping_over_equality(a: Assembly, f: Frame) -> None:
    counter = a.r64()
    x86.xor(counter.r32, counter.r32)
    head = a.here()
    x86.add(counter, 16)
    x86.cmp(counter, f.n)
    x86.jne(head)  # here
    x86.ret()


@wrong("unreachable")
def behind_the_return(a: Assembly, f: Frame) -> None:
    x86.ret()
    x86.vzeroupper()  # here
    x86.ret()


@wrong("running-off")
def no_return(a: Assembly, f: Frame) -> None:
    x86.mov(x86.rax, f.n)  # here


@wrong("notation", "twice")
def label_in_two_places(a: Assembly, f: Frame) -> None:
    end = a.here()
    a.place(end)  # here


@wrong("notation", "placed")
def label_in_no_place(a: Assembly, f: Frame) -> None:
    end = a.label("end")  # here
    x86.jmp(end)


# --- Declarations -----------------------------------------------------------------------------------------------------

@wrong("effects", "y")
def stores_that_are_not_declared(a: Assembly, f: Frame) -> None:
    a.declare(reads="x", clobbers="rax")  # here
    x86.cmp(f.n, 1)
    x86.jl(end := a.label())
    x86.mov(x86.eax, x86.dword[f.x])
    x86.mov(x86.dword[f.y], x86.eax)
    a.place(end)
    x86.ret()


@wrong("effects", "zmm7")
def clobber_that_is_not_declared(a: Assembly, f: Frame) -> None:
    a.declare(clobbers="zmm6")  # here
    x86.vpxord(x86.zmm7, x86.zmm7, x86.zmm7)
    x86.vmovaps(x86.zmm6, x86.zmm7)
    x86.ret()


@wrong("effects", "avx512_bf16")
def feature_that_is_not_declared(a: Assembly, f: Frame) -> None:
    a.declare(features="avx512f")  # here
    v = zeroed(a)
    x86.vdpbf16ps(v, v, v)
    x86.ret()


@wrong("effects", "64")
def alignment_that_is_not_declared(a: Assembly, f: Frame) -> None:
    a.declare(reads="x", aligned={"x": 32})  # here
    x86.cmp(f.n, 16)
    x86.jl(end := a.label())
    x86.vmovaps(a.zmm(), x86.ptr[f.x])
    a.place(end)
    x86.ret()


def marked(write: Callable[..., Any]) -> int:
    lines, first = inspect.getsourcelines(write)
    return first + next(i for i, line in enumerate(lines) if line.rstrip().endswith("# here"))


@pytest.mark.parametrize("block", WRONG, ids=[w.write.__name__ for w in WRONG])
def test_it_is_refused_at_its_line_with_a_mend(block: Wrong) -> None:
    def body(a: Assembly) -> None:
        block.write(a, Frame(a))

    with pytest.raises(AssemblyError) as caught:
        finish(piece(body, block.naked), block.chip)
    error = caught.value
    assert error.kind == block.kind, error
    assert block.part in str(error), error
    assert error.location is not None and error.location.file == __file__
    assert error.location.line == marked(block.write), error
    assert error.mend, error


def test_there_are_many() -> None:
    assert len(WRONG) >= 60 and len({w.kind for w in WRONG}) >= 15
