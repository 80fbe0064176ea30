"""Every static check of assembly by hand: a fault, its kind, and the author's line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sapper.assembly import x86
from sapper.assembly.build import Assembly, Region
from sapper.assembly.errors import AssemblyError
from sapper.assembly.finish import finish
from sapper.assembly.polynomial import Polynomial, Symbol
from sapper.assembly.static import check_static
from tests.assembly.pieces import V3, ZEN4, binary, piece


def refused(write: Callable[..., None], naked: bool = False, target: Any = ZEN4) -> AssemblyError:
    with pytest.raises(AssemblyError) as caught:
        check_static(piece(write, naked), target)
    error = caught.value
    assert error.location is not None
    assert error.location.file == __file__
    return error


def at_mark(write: Callable[..., Any], error: AssemblyError) -> bool:
    """Whether the error is at the line of `write` that ends in `# here`."""
    lines, first = inspect.getsourcelines(write)
    return error.location is not None and lines[error.location.line - first].rstrip().endswith("# here")


def test_undefined_virtual_register() -> None:
    def write(a: Assembly) -> None:
        v = a.zmm()
        x86.vaddps(v, v, v)  # here
        x86.ret()

    error = refused(write)
    assert error.kind == "undefined" and at_mark(write, error)


def test_undefined_on_one_path_only() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        r, over = a.r64(), a.label()
        x86.cmp(n, 4)
        x86.jl(over)
        x86.mov(r, 1)
        a.place(over)
        x86.mov(x86.ptr[y], r)  # here
        x86.ret()

    error = refused(binary(write))
    assert error.kind == "undefined" and at_mark(write, error)


def test_register_stale_after_vzeroupper() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        x86.vmovups(x86.zmm3, x86.ptr[x])
        x86.vzeroupper()
        x86.vmovups(x86.ptr[y], x86.zmm3)  # here
        x86.ret()

    error = refused(binary(write))
    assert error.kind == "undefined" and "vzeroupper" in error.found and at_mark(write, error)


def test_register_of_the_caller() -> None:
    def write(a: Assembly) -> None:
        x86.lea(x86.rax, x86.ptr[x86.rbx + 8])  # here
        x86.ret()

    error = refused(write)
    assert error.kind == "undefined" and "rbx" in error.headline and at_mark(write, error)


def test_pinned_value_clobbered_by_an_implied_write() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        held = a.pin("rdx")
        x86.mov(held, 5)
        x86.mov(x86.rax, 7)
        x86.mul(x86.rax)
        x86.mov(x86.ptr[y], held)  # here
        x86.ret()

    error = refused(binary(write))
    assert error.kind == "clobber" and "mul" in error.found and at_mark(write, error)


def test_pinned_value_that_is_read_in_time() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        held = a.pin("rdx")
        x86.mov(held, 5)
        x86.mov(x86.ptr[y], held)
        x86.mov(x86.rax, 7)
        x86.mul(x86.rax)
        x86.mov(x86.ptr[y + 8], x86.rdx)
        x86.ret()

    check_static(piece(binary(write)), ZEN4)


def test_callee_saved_register_not_restored() -> None:
    def write(a: Assembly) -> None:
        x86.xor(x86.ebx, x86.ebx)
        x86.ret()  # here

    error = refused(write, naked=True)
    assert error.kind == "callee-saved" and "rbx" in error.headline and at_mark(write, error)


def test_callee_saved_register_restored_from_the_wrong_slot() -> None:
    def write(a: Assembly) -> None:
        x86.push(x86.rbx)
        x86.push(x86.rbp)
        x86.pop(x86.rbx)
        x86.pop(x86.rbp)
        x86.ret()  # here

    error = refused(write, naked=True)
    assert error.kind == "callee-saved" and at_mark(write, error)


def test_callee_saved_registers_restored() -> None:
    def write(a: Assembly) -> None:
        x86.push(x86.rbx)
        x86.sub(x86.rsp, 16)
        x86.mov(x86.ptr[x86.rsp + 8], x86.rbp)
        x86.xor(x86.ebx, x86.ebx)
        x86.xor(x86.ebp, x86.ebp)
        x86.mov(x86.rbp, x86.ptr[x86.rsp + 8])
        x86.add(x86.rsp, 16)
        x86.pop(x86.rbx)
        x86.ret()

    check_static(piece(write, naked=True), ZEN4)


def test_callee_saved_registers_of_a_framed_function_are_saved_by_the_frame() -> None:
    def write(a: Assembly) -> None:
        x86.xor(x86.ebx, x86.ebx)
        x86.ret()

    made = finish(piece(write), ZEN4)
    assert next(i.row.name for i in made.machine.body if hasattr(i, "row")) == "push"


def test_flags_from_the_caller() -> None:
    def write(a: Assembly) -> None:
        over = a.label()
        x86.je(over)  # here
        x86.nop()
        a.place(over)
        x86.ret()

    error = refused(write)
    assert error.kind == "flags" and at_mark(write, error)


def test_flags_broken_between_setter_and_user() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        over = a.label()
        x86.cmp(n, 4)  # here
        x86.add(n, 1)
        x86.jl(over)
        x86.nop()
        a.place(over)
        x86.ret()

    error = refused(binary(write))
    assert error.kind == "flags" and "add" in error.found and at_mark(write, error)


def test_carry_that_an_increment_leaves_alone() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        over = a.label()
        x86.cmp(n, 4)
        x86.inc(n)
        x86.jb(over)
        x86.nop()
        a.place(over)
        x86.ret()

    check_static(piece(binary(write)), ZEN4)


def test_carry_of_the_caller_past_an_increment() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        over = a.label()
        x86.inc(n)
        x86.jb(over)  # here
        x86.nop()
        a.place(over)
        x86.ret()

    error = refused(binary(write))
    assert error.kind == "flags" and "cf of the caller" in error.found and at_mark(write, error)


def test_flag_that_an_instruction_leaves_undefined() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        over = a.label()
        x86.imul(n, n)
        x86.je(over)  # here
        x86.nop()
        a.place(over)
        x86.ret()

    error = refused(binary(write))
    assert error.kind == "flags" and "imul" in error.found and at_mark(write, error)


def test_store_over_the_return_address() -> None:
    def write(a: Assembly) -> None:
        x86.push(x86.rbx)
        x86.mov(x86.ptr[x86.rsp + 8], x86.rbx)  # here
        x86.pop(x86.rbx)
        x86.ret()

    error = refused(write, naked=True)
    assert error.kind == "stack" and "return address" in error.headline and at_mark(write, error)


def test_flags_on_the_stack_are_counted() -> None:
    def write(a: Assembly) -> None:
        x86.xor(x86.eax, x86.eax)
        x86.pushfq()
        x86.ret()  # here

    error = refused(write, naked=True)
    assert error.kind == "stack" and at_mark(write, error)


def test_direction_flag_from_an_unknown_word() -> None:
    def write(a: Assembly) -> None:
        a.input(x86.rdi)
        x86.push(x86.rdi)
        x86.popfq()  # here
        x86.ret()

    error = refused(write, naked=True)
    assert error.kind == "state" and "direction" in error.headline and at_mark(write, error)


def test_flags_saved_and_restored() -> None:
    def write(a: Assembly) -> None:
        a.input(x86.rdi)
        x86.test(x86.rdi, x86.rdi)
        x86.pushfq()
        x86.add(x86.rdi, 1)
        x86.popfq()
        x86.ret()

    check_static(piece(write, naked=True), ZEN4)


def test_undefined_opmask() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        v = a.zmm()
        x86.vmovups(v[a.mask(), x86.z], x86.ptr[x])  # here
        x86.ret()

    error = refused(binary(write))
    assert error.kind == "undefined" and at_mark(write, error)


def test_call_with_upper_halves_in_use() -> None:
    def write(a: Assembly) -> None:
        a.input(x86.rdi)
        x86.sub(x86.rsp, 8)
        x86.vpxor(x86.ymm3, x86.ymm3, x86.ymm3)
        x86.call(x86.rdi)  # here
        x86.add(x86.rsp, 8)
        x86.ret()

    error = refused(write, naked=True)
    assert error.kind == "mixing" and at_mark(write, error)


def test_callee_saved_register_not_restored_on_one_path() -> None:
    def write(a: Assembly) -> None:
        a.input(x86.rdi)
        over = a.label()
        x86.mov(x86.rax, x86.rdi)
        x86.test(x86.rdi, x86.rdi)
        x86.je(over)
        x86.mov(x86.r12, x86.rdi)
        a.place(over)
        x86.ret()  # here

    error = refused(write, naked=True)
    assert error.kind == "callee-saved" and "r12" in error.headline and at_mark(write, error)


def test_unbalanced_stack() -> None:
    def write(a: Assembly) -> None:
        x86.push(x86.rbx)
        x86.ret()  # here

    error = refused(write, naked=True)
    assert error.kind == "stack" and "8 bytes" in error.found and at_mark(write, error)


def test_pop_above_the_return_address() -> None:
    def write(a: Assembly) -> None:
        x86.pop(x86.rax)  # here
        x86.ret()

    error = refused(write, naked=True)
    assert error.kind == "stack" and at_mark(write, error)


def test_stack_depths_that_differ_where_paths_meet() -> None:
    def write(a: Assembly) -> None:
        a.input(x86.rdi)
        over = a.label()
        x86.test(x86.rdi, x86.rdi)
        x86.je(over)
        x86.push(x86.rdi)
        a.place(over)
        x86.ret()  # here

    error = refused(write, naked=True)
    assert error.kind == "stack" and at_mark(write, error)


def test_stack_pointer_of_a_framed_function() -> None:
    def write(a: Assembly) -> None:
        x86.push(x86.rbx)  # here
        x86.pop(x86.rbx)
        x86.ret()

    error = refused(write)
    assert error.kind == "stack" and "naked" in error.headline and at_mark(write, error)


def call(a: Assembly, shift: int) -> None:
    a.input(x86.rdi)
    x86.sub(x86.rsp, shift)
    x86.call(x86.rdi)  # here
    x86.add(x86.rsp, shift)
    x86.ret()


def test_misaligned_call() -> None:
    error = refused(lambda a: call(a, 16), naked=True)
    assert error.kind == "stack" and "misaligned" in error.headline and at_mark(call, error)


def test_aligned_call() -> None:
    check_static(piece(lambda a: call(a, 8), naked=True), ZEN4)


def test_register_that_a_call_destroys() -> None:
    def write(a: Assembly) -> None:
        a.input(x86.rdi)
        x86.mov(x86.rcx, 3)
        x86.sub(x86.rsp, 8)
        x86.call(x86.rdi)
        x86.add(x86.rsp, 8)
        x86.add(x86.rax, x86.rcx)  # here
        x86.ret()

    error = refused(write, naked=True)
    assert error.kind == "undefined" and "call" in error.found and at_mark(write, error)


@pytest.mark.parametrize("register", ["ymm2", "zmm2"])
def test_missing_vzeroupper(register: str) -> None:
    def write(a: Assembly) -> None:
        wide = getattr(x86, register)
        x86.vxorps(wide, wide, wide)
        x86.ret()  # here

    error = refused(write, naked=True)
    assert error.kind == "mixing" and at_mark(write, error)


def test_no_vzeroupper_is_needed_for_128_bits() -> None:
    def write(a: Assembly) -> None:
        x86.vxorps(x86.xmm2, x86.xmm2, x86.xmm2)
        x86.ret()

    check_static(piece(write, naked=True), ZEN4)


def test_memory_through_what_is_no_pointer() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        x86.vmovups(a.zmm(), x86.ptr[n])  # here
        x86.ret()

    error = refused(binary(write))
    assert error.kind == "footprint" and at_mark(write, error)


@pytest.mark.parametrize("offset", [-4, 61, 64])
def test_constant_offset_outside_the_region(offset: int) -> None:
    def write(a: Assembly) -> None:
        x = a.input(x86.rdi, Region("x", False, 64))
        y = a.r64()
        x86.lea(y, x86.ptr[x + offset - 8])
        x86.add(y, 8)
        x86.vmovss(a.xmm(), x86.ptr[y])  # here
        x86.ret()

    error = refused(write)
    assert error.kind == "footprint" and "64 bytes" in error.expected and at_mark(write, error)


def copying(stop: int, disp: int = 0, start: int = 0) -> Callable[[Assembly], None]:
    def write(a: Assembly) -> None:
        x = a.input(x86.rdi, Region("x", False, 4096))
        with a.loop(start, stop, 16) as i:
            x86.vmovups(a.zmm(), x86.ptr[x + i * 4 + disp])  # here
        x86.ret()

    return write


@pytest.mark.parametrize("start, stop, disp", [(0, 1024, 0), (0, 1023, 0), (16, 1040, -64), (0, 1008, 64)])
def test_index_inside_the_region(start: int, stop: int, disp: int) -> None:
    check_static(piece(copying(stop, disp, start)), ZEN4)


@pytest.mark.parametrize("start, stop, disp, found", [
    (0, 1040, 0, "bytes 4096 to 4159 where round 1 = 64"), (0, 1024, 4, "bytes 4036 to 4099 where round 1 = 63"),
    (0, 1024, -4, "bytes -4 to 59 where round 1 = 0"), (-1, 1024, 0, "bytes -4 to 59 where round 1 = 0")])
def test_index_outside_the_region(start: int, stop: int, disp: int, found: str) -> None:
    error = refused(copying(stop, disp, start))
    assert error.kind == "footprint" and error.found == found and at_mark(copying, error)


def test_index_without_a_bound() -> None:
    def write(a: Assembly) -> None:
        x = a.input(x86.rdi, Region("x", False, 4096))
        n = a.input(x86.rsi)
        with a.loop(0, n, 16) as i:
            x86.vmovups(a.zmm(), x86.ptr[x + i * 4])  # here
        x86.ret()

    error = refused(write)
    assert error.kind == "footprint" and "bytes 262080 to 262143" in error.found and at_mark(write, error)


def test_index_that_is_worked_out() -> None:
    """Two loops, the offset by lea, shl and imul; the bound of one path only does not count."""
    def write(a: Assembly, most: int) -> None:
        x = a.input(x86.rdi, Region("x", False, 4096))
        row, at = a.r64(), a.r64()
        with a.loop(0, 4) as m:
            x86.imul(row, m, 1024)
            x86.mov(at, row)
            x86.vmovss(a.xmm(), x86.ptr[x + at])
            with a.loop(0, most) as n:
                x86.lea(at, x86.ptr[n * 8])
                x86.shl(at, 2)
                x86.vmovss(a.xmm(), x86.ptr[x + at + 3072])  # here
        x86.ret()

    check_static(piece(lambda a: write(a, 32)), ZEN4)
    error = refused(lambda a: write(a, 33))
    assert error.kind == "footprint" and at_mark(write, error)
    assert error.found == "bytes 4096 to 4099 where round 2 = 32"


def test_past_the_end_of_a_constant() -> None:
    def write(a: Assembly) -> None:
        x86.vmovups(a.zmm(), x86.ptr[a.constant(np.arange(16, dtype=np.float32)) + 4])  # here
        x86.ret()

    error = refused(write)
    assert error.kind == "footprint" and "constant" in error.headline and at_mark(write, error)


def test_last_element_inside_the_region() -> None:
    def write(a: Assembly) -> None:
        x = a.input(x86.rdi, Region("x", False, 64))
        x86.vmovss(a.xmm(), x86.ptr[x + 60])
        x86.ret()

    check_static(piece(write), ZEN4)


def test_store_through_a_read_only_operand() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        v, at = a.zmm(), a.r64()
        x86.vmovups(v, x86.ptr[x])
        x86.lea(at, x86.ptr[x + n * 4])
        x86.vmovups(x86.ptr[at], v)  # here
        x86.ret()

    error = refused(binary(write))
    assert error.kind == "read-only" and "x" in error.headline and at_mark(write, error)


def test_sums_and_choices_with_memory() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        end = a.label()
        x86.cmp(n, 1)
        x86.jl(end)
        x86.add(n, x86.ptr[x])
        x86.cmp(n, x86.ptr[x])
        x86.cmovl(n, x86.ptr[x])
        x86.mov(x86.ptr[y], n)
        a.place(end)
        x86.ret()

    check_static(piece(binary(write)), ZEN4)


def test_store_to_a_constant() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        x86.mov(x86.ptr[a.constant(np.int64(3))], n)  # here
        x86.ret()

    error = refused(binary(write))
    assert error.kind == "read-only" and at_mark(write, error)


@pytest.mark.parametrize("operands", [lambda a: (a.zmm(), a.zmm()), lambda a: (x86.ymm1, x86.ymm20)])
def test_missing_feature(operands: Any) -> None:
    def write(a: Assembly) -> None:
        to, source = operands(a)
        x86.vmovups(to, source)  # here
        x86.ret()

    error = refused(write, target=V3)
    assert error.kind == "feature" and "avx512f" in error.found and at_mark(write, error)


def test_unreachable_code() -> None:
    def write(a: Assembly) -> None:
        end = a.label()
        x86.jmp(end)
        x86.mov(x86.rax, 1)  # here
        a.place(end)
        x86.ret()

    error = refused(write)
    assert error.kind == "unreachable" and at_mark(write, error)


def test_code_that_runs_off_its_end() -> None:
    def write(a: Assembly) -> None:
        x86.mov(x86.rax, 1)  # here

    error = refused(write)
    assert error.kind == "running-off" and at_mark(write, error)


def endless(step: Callable[[Any], None], leave: Callable[[Any, Any, Any], None]) -> Callable[[Assembly], None]:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        counter, end = a.r64(), a.label()
        x86.mov(counter, 0)
        head = a.here()
        step(counter)
        leave(counter, n, head)
        a.place(end)
        x86.ret()

    return binary(write)


@pytest.mark.parametrize("step, leave", [
    (lambda c: x86.add(c, 2), lambda c, n, head: (x86.cmp(c, n), x86.jne(head))),
    (lambda c: x86.add(c, 2), lambda c, n, head: (x86.cmp(c, n), x86.jg(head))),
    (lambda c: x86.sub(c, 1), lambda c, n, head: (x86.cmp(c, n), x86.jl(head))),
    (lambda c: x86.add(c, c), lambda c, n, head: (x86.cmp(c, n), x86.jl(head))),
    (lambda c: x86.nop(), lambda c, n, head: (x86.cmp(c, n), x86.jl(head))),
    (lambda c: x86.add(c, 1), lambda c, n, head: (x86.add(n, 1), x86.cmp(c, n), x86.jl(head))),
], ids=["not by one to equality", "away", "down", "doubling", "standing still", "moving bound"])
def test_loop_that_cannot_be_shown_to_end(step: Any, leave: Any) -> None:
    assert refused(endless(step, leave)).kind == "loop"


@pytest.mark.parametrize("begin, ends", [(1, True), (0, False), (-1, False)])
def test_equality_must_lie_ahead(begin: int, ends: bool) -> None:
    def write(a: Assembly) -> None:
        counter = a.r64()
        x86.mov(counter, begin)
        head = a.here()
        x86.nop()
        x86.dec(counter)
        x86.jne(head)  # here
        x86.ret()

    if ends:
        check_static(piece(write), ZEN4)
    else:
        error = refused(write)
        assert error.kind == "loop" and "begins at its bound" in error.found and at_mark(write, error)


@pytest.mark.parametrize("asks", [False, True])
def test_equality_of_a_count_that_may_be_none(asks: bool) -> None:
    def write(a: Assembly) -> None:
        n = a.input(x86.rdx, None, Polynomial.of(Symbol.new("N")))
        counter, end = a.r64(), a.label()
        x86.mov(counter, n)
        if asks:
            x86.test(n, n)
            x86.je(end)
        head = a.here()
        x86.dec(counter)
        x86.jne(head)  # here
        a.place(end)
        x86.ret()

    if asks:
        check_static(piece(write), ZEN4)
    else:
        error = refused(write)
        assert error.kind == "loop" and "N = 0" in error.found and at_mark(write, error)


def test_loop_without_a_way_out() -> None:
    def write(a: Assembly) -> None:
        head = a.here()
        x86.nop()
        x86.jmp(head)  # here

    error = refused(write)
    assert error.kind == "loop" and at_mark(write, error)


@pytest.mark.parametrize("step, leave", [
    (lambda c: x86.add(c, 2), lambda c, n, head: (x86.cmp(c, n), x86.jl(head))),
    (lambda c: x86.inc(c), lambda c, n, head: (x86.cmp(n, c), x86.jg(head))),
    (lambda c: x86.inc(c), lambda c, n, head: (x86.cmp(c, 100), x86.jne(head))),
    (lambda c: x86.nop(), lambda c, n, head: (x86.inc(c), x86.cmp(c, 1), x86.jne(head))),
    (lambda c: x86.nop(), lambda c, n, head: (x86.sub(c, 4), x86.jg(head))),
    (lambda c: x86.sub(c, 3), lambda c, n, head: (x86.test(c, c), x86.jg(head))),
], ids=["up", "mirrored", "to equality by one", "at once", "down in steps", "test"])
def test_loops_that_end(step: Any, leave: Any) -> None:
    check_static(piece(endless(step, leave)), ZEN4)


def test_mxcsr_left_changed() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        x86.vldmxcsr(x86.ptr[x])
        x86.ret()  # here

    error = refused(binary(write))
    assert error.kind == "state" and at_mark(write, error)


def test_mxcsr_restored() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        x86.vstmxcsr(x86.ptr[y])
        x86.vldmxcsr(x86.ptr[x])
        x86.vldmxcsr(x86.ptr[y])
        x86.ret()

    check_static(piece(binary(write)), ZEN4)


def test_spill_where_none_may_be() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        held = [a.zmm() for _ in range(33)]
        for i, v in enumerate(held):
            x86.vmovups(v, x86.ptr[x + 64 * i])  # here
        for i, v in enumerate(held):
            x86.vmovups(x86.ptr[y + 64 * i], v)
        x86.ret()

    assert finish(piece(binary(write)), ZEN4).spills > 0
    with pytest.raises(AssemblyError) as caught:
        finish(piece(binary(write)), ZEN4, no_spill=True)
    assert caught.value.kind == "registers" and at_mark(write, caught.value)
    assert "33 are wanted" in caught.value.found


def test_register_budget() -> None:
    def write(a: Assembly, x: Any, y: Any, n: Any) -> None:
        held = [a.zmm() for _ in range(9)]
        for i, v in enumerate(held):
            x86.vmovups(v, x86.ptr[x + 64 * i])
        for i, v in enumerate(held):
            x86.vmovups(x86.ptr[y + 64 * i], v)
        x86.ret()

    assert finish(piece(binary(write)), ZEN4, True, {"vec": 9}).spills == 0
    with pytest.raises(AssemblyError, match="registers") as caught:
        finish(piece(binary(write)), ZEN4, True, {"vec": 8})
    assert caught.value.kind == "registers"
