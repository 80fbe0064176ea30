"""The notation: operands to rows, loops, constants, pins, declared effects; and the emulator's own checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapper.assembly import x86
from sapper.assembly.build import Assembly, Region
from sapper.assembly.effects import effects_of
from sapper.assembly.errors import AssemblyError
from sapper.assembly.finish import finish
from sapper.codegen.machine import Instruction
from sapper.codegen.print import print_instruction
from tests.assembly.pieces import ZEN4, binary, interpret, native, piece


def first(write: Any) -> Instruction:
    made = piece(write)
    return next(item for item in made.body if isinstance(item, Instruction))


@pytest.mark.parametrize("write, text", [
    (lambda a: x86.vaddps(x86.zmm1, x86.zmm2, x86.zmm3), "vaddps zmm1, zmm2, zmm3"),
    (lambda a: x86.vaddps(x86.ymm1, x86.ymm2, x86.ptr[x86.rax]), "vaddps ymm1, ymm2, ymmword ptr [rax]"),
    (lambda a: x86.vaddps(x86.zmm1[x86.k2, x86.z], x86.zmm2, x86.broadcast[x86.rax + x86.rcx * 4 + 8]),
     "vaddps zmm1{k2}{z}, zmm2, dword ptr [rax + rcx*4 + 8]{1to16}"),
    (lambda a: x86.vmovups(x86.ptr[x86.rdi - 64][x86.k1], x86.zmm0), "vmovups zmmword ptr [rdi - 64]{k1}, zmm0"),
    (lambda a: x86.and_(x86.eax, 7), "and eax, 7"),
    (lambda a: x86.lock_add(x86.dword[x86.rax], x86.ecx), "lock add dword ptr [rax], ecx"),
    (lambda a: x86.vex_vpdpbusd(x86.ymm0, x86.ymm1, x86.ymm2), "{vex} vpdpbusd ymm0, ymm1, ymm2"),
    (lambda a: x86.add(x86.qword[x86.rax], 5), "add qword ptr [rax], 5"),
    (lambda a: x86.shl(x86.rax, x86.cl), "shl rax, cl"),
    (lambda a: x86.movzx(x86.eax, x86.byte[x86.rcx]), "movzx eax, byte ptr [rcx]"),
    (lambda a: x86.lea(x86.rax, x86.ptr[x86.rcx + x86.rdx * 8]), "lea rax, [rcx + rdx*8]"),
    (lambda a: x86.vgatherdps(x86.zmm1[x86.k1], x86.ptr[x86.rax + x86.zmm2 * 4]),
     "vgatherdps zmm1{k1}, dword ptr [rax + zmm2*4]"),
    (lambda a: x86.vcvtpd2ps(x86.xmm1, x86.broadcast.to(4)[x86.rax]), "vcvtpd2ps xmm1, qword ptr [rax]{1to4}"),
    (lambda a: x86.mov(x86.rax, 1 << 40), "mov rax, 1099511627776"),
])
def test_operands_choose_the_row(write: Any, text: str) -> None:
    assert print_instruction(first(write)) == text


@pytest.mark.parametrize("write, kind, part", [
    (lambda a: x86.vaddps(x86.zmm1, x86.ymm2, x86.zmm3), "operands", "no such operands"),
    (lambda a: x86.vaddps(x86.zmm1, x86.zmm2), "operands", "no such operands"),
    (lambda a: x86.vmovntdq(x86.ymm1, x86.ymm2), "operands", r"no such operands together[\s\S]*vmovntdq.256 m256 v256"),
    (lambda a: x86.mov(x86.dword[x86.rax], x86.dword[x86.rcx]), "operands", r"together[\s\S]*m32 r32 \| mov"),
    (lambda a: x86.add(x86.ptr[x86.rax], 5), "operands", "how large"),
    (lambda a: x86.vcvtpd2ps(x86.xmm1, x86.broadcast[x86.rax]), "operands", "how large"),
    (lambda a: x86.add(x86.rax, 1 << 40), "operands", "no such operands"),
    (lambda a: x86.shl(x86.rax, x86.dl), "operands", "no such operands"),
    (lambda a: x86.vaddps(x86.zmm1, x86.zmm2[x86.k1], x86.zmm3), "operands", "opmask"),
    (lambda a: x86.kmovw(x86.k1[x86.k2], x86.eax), "operands", "opmask"),
    (lambda a: x86.vgatherdps(x86.zmm1, x86.ptr[x86.rax + x86.zmm2 * 4]), "operands", "needs an opmask"),
    (lambda a: x86.zmm1[x86.rax], "notation", "under an opmask"),
    (lambda a: x86.rax + x86.rcx + x86.rdx, "notation", "too many parts"),
    (lambda a: x86.rax * 3, "notation", "scaled"),
    (lambda a: x86.rax.zmm, "notation", "no 512 bits"),
    (lambda a: x86.mov(x86.rax, 1.5), "notation", "an operand of mov"),
    (lambda a: x86.ptr["rax"], "notation", "an address"),
    (lambda a: a.pin("zmm99"), "notation", "no register"),
    (lambda a: (a.place(label := a.label()), a.place(label)), "notation", "placed twice"),
    (lambda a: a.loop(0, x86.rdi, 0).__enter__(), "loop", "go up"),
])
def test_what_means_nothing(write: Any, kind: str, part: str) -> None:
    with pytest.raises(AssemblyError, match=part) as caught:
        piece(write)
    assert caught.value.kind == kind
    assert caught.value.location is not None and caught.value.location.file == __file__


def test_names_that_are_not_there() -> None:
    with pytest.raises(AttributeError, match="vaddps"):
        x86.vadps  # noqa: B018
    with pytest.raises(AssemblyError, match="outside an assembly"):
        x86.nop()
    with pytest.raises(AssemblyError, match="not placed"):
        piece(lambda a: x86.jmp(a.label())).machine()
    with pytest.raises(AssemblyError, match="no virtual registers"):
        piece(lambda a: a.zmm(), naked=True)


def add_one(a: Assembly, x: Any, y: Any, n: Any) -> None:
    one, v = a.zmm(), a.zmm()
    x86.vbroadcastss(one, x86.ptr[a.constant(np.float32(1))])
    with a.loop(0, n, 16) as i:
        x86.vaddps(v, one, x86.ptr[x + i * 4])
        x86.vmovups(x86.ptr[y + i * 4], v)
    with a.loop(i, n) as i:
        x86.vaddss(v.xmm, one.xmm, x86.ptr[x + i * 4])
        x86.vmovss(x86.ptr[y + i * 4], v.xmm)
    x86.ret()


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 40])
def test_loops_before_and_after_allocation_and_on_this_cpu(count: int) -> None:
    from sapper.targets import host_target

    x = np.arange(count, dtype=np.float32)
    made = piece(binary(add_one))
    for machine in (made.machine(), finish(made, ZEN4).machine):
        y = np.zeros(count, np.float32)
        interpret(machine, x, y, count)
        assert np.array_equal(y, x + 1)
    if "avx512f" in host_target().features:
        y = np.zeros(count, np.float32)
        native(binary(add_one), x, y, count)
        assert np.array_equal(y, x + 1)


def test_the_same_assembly_gives_the_same_bytes() -> None:
    assert finish(piece(binary(add_one)), ZEN4).code == finish(piece(binary(add_one)), ZEN4).code


def test_reordering_keeps_the_meaning() -> None:
    made = finish(piece(binary(add_one)), ZEN4, reorder=True)
    x, y = np.arange(40, dtype=np.float32), np.zeros(40, np.float32)
    interpret(made.machine, x, y, 40)
    assert np.array_equal(y, x + 1)


def test_a_pinned_name_is_that_register() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        held = a.pin("zmm29")
        x86.vmovups(held, x86.ptr[x])
        x86.vmovups(x86.ptr[y], held)
        x86.ret()

    made = finish(piece(binary(write)), ZEN4)
    assert [print_instruction(i) for i in made.machine.body if isinstance(i, Instruction)][:2] == [
        "vmovups zmm29, zmmword ptr [rdi]", "vmovups zmmword ptr [rsi], zmm29"]


def declared(**effects: str) -> Assembly:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        a.declare(**effects)
        x86.mov(x86.rax, 7)
        x86.mul(n)
        x86.vmovaps(x86.zmm5, x86.ptr[x])
        x86.vmovups(x86.ptr[y], x86.zmm5)
        x86.ret()

    return piece(binary(write))


def test_effects_are_derived() -> None:
    found = effects_of(declared(), ZEN4)
    assert found.reads == {"x"} and found.writes == {"y"} and found.clobbers == {"rax", "rdx", "zmm5"}
    assert found.flags and found.aligned == {"x": 64} and found.features == {"avx512f"}
    finish(declared(reads="x", writes="y", clobbers="rax rdx zmm5"), ZEN4)


@pytest.mark.parametrize("effects, part", [
    ({"reads": "x", "writes": "y", "clobbers": "rax zmm5"}, "also rdx"),
    ({"reads": "x", "writes": "y", "clobbers": "rax rcx rdx zmm5"}, "not rcx"),
    ({"reads": "x", "writes": "", "clobbers": "rax rdx zmm5"}, "also y"),
    ({"reads": "x y", "writes": "y", "clobbers": "rax rdx zmm5"}, "not y"),
])
def test_declared_effects_that_differ(effects: dict[str, str], part: str) -> None:
    with pytest.raises(AssemblyError) as caught:
        finish(declared(**effects), ZEN4)
    assert caught.value.kind == "effects" and caught.value.found == part


def run(write: Any, *arguments: Any) -> AssemblyError:
    with pytest.raises(AssemblyError) as caught:
        interpret(piece(binary(write)).machine(), *arguments)
    return caught.value


def test_the_emulator_finds_misaligned_memory() -> None:
    memory = np.zeros(80, np.float32)
    start = (-memory.ctypes.data // 4) % 16 + 1

    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        x86.vmovaps(a.zmm(), x86.ptr[x])

    assert "aligned to 64 bytes" in run(write, memory[start:], memory, 0).headline


def test_the_emulator_finds_undefined_flags_registers_and_endless_loops() -> None:
    def flags(a: Assembly, x: Any, y: Any, n: Any) -> None:
        x86.mov(x86.rax, 3)
        x86.mul(n)  # leaves the zero flag undefined
        x86.sete(x86.al)

    def register(a: Assembly, x: Any, y: Any, n: Any) -> None:
        x86.add(n, a.r64())

    def endless(a: Assembly, x: Any, y: Any, n: Any) -> None:
        x86.jmp(a.here())

    x = np.zeros(4, np.float32)
    assert run(flags, x, x, 1).kind == "flags"
    assert run(register, x, x, 1).kind == "undefined"
    made = piece(binary(endless)).machine()
    with pytest.raises(AssemblyError) as caught:
        interpret(made, x, x, 1)
    assert caught.value.kind == "loop"


def test_masked_memory_touches_only_lanes_that_are_on() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        k, v = a.mask(), a.zmm()
        x86.kmovw(k, n.r32)
        x86.vmovups(v[k, x86.z], x86.ptr[x])
        x86.vmovups(x86.ptr[y][k], v)

    x, y = np.arange(5, dtype=np.float32), np.full(5, -1, np.float32)
    interpret(piece(binary(write)).machine(), x, y, 0b10110)
    assert np.array_equal(y, [-1, 1, 2, -1, 4])
    assert run(write, x, y, 0b100000).kind == "footprint"


def test_gathers_and_scatters() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        k, index, v = a.mask(), a.zmm(), a.zmm()
        x86.vmovups(index, x86.ptr[n])
        x86.vpxord(v, v, v)
        for move in (lambda: x86.vgatherdps(v[k], x86.ptr[x + index * 4]),
                     lambda: x86.vscatterdps(x86.ptr[y + index * 4][k], v)):
            x86.kxnorw(k, k, k)
            move()

    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    index = np.arange(16, dtype=np.int32) * 3
    interpret(piece(binary(write)).machine(), x, y, index)
    assert np.array_equal(y[index], x[index]) and y.sum() == x[index].sum()


def test_regions_may_be_declared_with_a_size() -> None:
    region = Region("x", False, 64)
    assert region.size_bytes == 64 and not region.writable


def test_another_rounding_mode_is_refused_where_it_is_interpreted() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        x86.vldmxcsr(x86.ptr[x])
        x86.ret()

    toward_zero = np.array([0x7F80], np.uint32)
    error = run(write, toward_zero, toward_zero.copy(), 1)
    assert error.kind == "notation" and "another rounding mode" in error.headline
