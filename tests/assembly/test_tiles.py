"""Tiles in assembly by hand: what the static checks refuse, what the interpreter of rows does, both syntaxes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sapper.assembly import x86
from sapper.assembly.build import Assembly, Region
from sapper.assembly.effects import effects_of
from sapper.assembly.errors import AssemblyError
from sapper.assembly.finish import finish
from sapper.assembly.polynomial import Polynomial, Symbol
from sapper.assembly.static import check_static, shown
from sapper.codegen.machine import Instruction
from sapper.targets.x86_64.detect import host
from sapper.targets.x86_64.target import target
from tests.assembly.pieces import ZEN4, interpret, piece

CHIP = target("sapphirerapids")
WHOLE = [(16, 64)] * 8
Write = Callable[..., None]


def configure(a: Assembly, shapes: list[tuple[int, int]]) -> None:
    x86.ldtilecfg(x86.ptr[a.constant(x86.tile_configuration(shapes))])


def on_rows(write: Write, shapes: list[tuple[int, int]] | None = WHOLE, size_bytes: int | None = 4096) -> Any:
    """A piece with x (4 KiB, written too) and a stride of 64 in registers, configured if shapes are given."""
    def body(a: Assembly) -> None:
        x, stride = a.input(x86.rdi, Region("x", True, size_bytes)), a.r64()
        x86.mov(stride, 64)
        if shapes is not None:
            configure(a, shapes)
        write(a, x, stride)

    return body


def refused(write: Write, shapes: list[tuple[int, int]] | None = WHOLE, chip: Any = CHIP) -> AssemblyError:
    """The error of a piece, at the line of `write` that ends in `# here`."""
    with pytest.raises(AssemblyError) as caught:
        check_static(piece(on_rows(write, shapes)), chip)
    error = caught.value
    lines, first = inspect.getsourcelines(write)
    assert error.location is not None and error.location.file == __file__
    assert lines[error.location.line - first].rstrip().endswith("# here"), error
    return error


def end() -> None:
    x86.tilerelease()
    x86.ret()


def test_a_tile_before_any_configuration() -> None:
    def write(a: Assembly, x: Any, stride: Any) -> None:
        x86.tilezero(a.tile())  # here
        end()

    error = refused(write, None)
    assert error.kind == "undefined" and "tilecfg" in error.headline and "nothing was ever put there" in error.found


def test_a_tile_that_is_configured_on_one_path_only() -> None:
    def write(a: Assembly, x: Any, stride: Any) -> None:
        over = a.label()
        x86.cmp(stride, 3)
        x86.jl(over)
        configure(a, WHOLE)
        a.place(over)
        x86.tilezero(x86.tmm0)  # here
        end()

    assert refused(write, None).kind == "undefined"


def test_a_tile_after_its_release() -> None:
    def write(a: Assembly, x: Any, stride: Any) -> None:
        x86.tilezero(x86.tmm1)
        x86.tilerelease()
        x86.tilestored(x86.ptr[x + stride], x86.tmm1)  # here
        x86.ret()

    error = refused(write)
    assert error.kind == "undefined" and "the tiles were released" in error.found


def test_a_tile_whose_value_a_configuration_took() -> None:
    def write(a: Assembly, x: Any, stride: Any) -> None:
        tile = a.tile()
        x86.tileloadd(tile, x86.ptr[x + stride])
        configure(a, WHOLE)
        x86.tilestored(x86.ptr[x + stride], tile)  # here
        end()

    error = refused(write)
    assert error.kind == "undefined" and "makes all tiles zero" in error.found


def test_tiles_that_are_not_released() -> None:
    def write(a: Assembly, x: Any, stride: Any) -> None:
        x86.tilezero(x86.tmm0)
        x86.ret()  # here

    error = refused(write)
    assert error.kind == "state" and "returns with tiles in use" in error.headline and "tilerelease" in error.expected


def test_a_call_with_tiles_in_use() -> None:
    def write(a: Assembly) -> None:
        a.input(x86.rdi, Region("x", True, 64))
        x86.ldtilecfg(x86.ptr[x86.rdi])
        x86.push(x86.rbx)
        x86.call(x86.rdi)
        end()

    with pytest.raises(AssemblyError, match="calls with tiles in use") as caught:
        check_static(piece(write, naked=True), CHIP)
    assert caught.value.kind == "state"


@pytest.mark.parametrize("shapes", [
    [(16, 64), (8, 64), (16, 64)],  # rows of the sums and of the left one
    [(16, 64), (16, 32), (16, 64)],  # the depth
    [(16, 32), (16, 64), (16, 64)],  # columns
    [(16, 62), (16, 64), (16, 62)],  # no whole elements
])
def test_shapes_that_do_not_fit_a_product(shapes: list[tuple[int, int]]) -> None:
    def write(a: Assembly, x: Any, stride: Any) -> None:
        x86.tdpbf16ps(x86.tmm0, x86.tmm1, x86.tmm2)  # here
        end()

    error = refused(write, shapes)
    assert error.kind == "operands" and "traps on tiles of these shapes" in error.headline
    assert f"{shapes[0][0]} x {shapes[0][1]}, {shapes[1][0]} x {shapes[1][1]}" in error.found


def test_a_tile_that_the_configuration_leaves_out() -> None:
    def write(a: Assembly, x: Any, stride: Any) -> None:
        x86.tileloadd(x86.tmm3, x86.ptr[x + stride])  # here
        end()

    assert "without rows" in refused(write, [(16, 64)] * 3).found


def test_a_tile_without_a_name_under_several_shapes() -> None:
    def write(a: Assembly, x: Any, stride: Any) -> None:
        x86.tilezero(a.tile())  # here
        end()

    error = refused(write, [(16, 64)] * 7)
    assert error.kind == "operands" and "name it" in error.mend


def test_a_configuration_that_traps() -> None:
    def write(a: Assembly, x: Any, stride: Any) -> None:
        x86.ldtilecfg(x86.ptr[a.constant(bytes([2]) + bytes(63))])  # here
        end()

    error = refused(write, None)
    assert error.kind == "operands" and "palette 2" in error.found


def test_tiles_that_the_target_lacks() -> None:
    def write(a: Assembly, x: Any, stride: Any) -> None:
        x86.ldtilecfg(x86.ptr[x])  # here
        end()

    assert refused(write, None, ZEN4).kind == "feature"
    assert "amx_tile" in refused(write, None, ZEN4).found


def test_a_product_of_a_tile_with_itself() -> None:
    def write(a: Assembly, x: Any, stride: Any) -> None:
        x86.tdpbssd(x86.tmm0, x86.tmm1, x86.tmm1)
        end()

    with pytest.raises(AssemblyError, match="three that differ"):
        finish(piece(on_rows(write)), CHIP)


# --- Bounds ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("disp, scale, rows, inside", [
    (0, 1, 16, True), (3072, 1, 16, True), (3073, 1, 16, False), (192, 4, 16, True), (193, 4, 16, False),
    (448, 4, 15, True), (449, 4, 15, False), (-64, 1, 16, False)])
def test_the_first_row_and_the_last_lie_inside(disp: int, scale: int, rows: int, inside: bool) -> None:
    """Of 4096 bytes; rows 64 bytes apart, times the scale."""
    def write(a: Assembly, x: Any, stride: Any) -> None:
        x86.tileloadd(x86.tmm0, x86.ptr[x + stride * scale + disp])
        x86.tilestored(x86.ptr[x + stride * scale + disp], x86.tmm0)
        end()

    made = piece(on_rows(write, [(rows, 64)]))
    if inside:
        accesses, unknown = shown(made, CHIP)
        assert len(accesses) == 2 and not unknown
    else:
        with pytest.raises(AssemblyError, match="tileloadd reaches outside x"):
            check_static(made, CHIP)


def test_bounds_hold_for_all_extents() -> None:
    """Rows of 4 * N bytes of a matrix of 16 by N: a tile of whole rows where N is 16 at least."""
    def body(a: Assembly, columns: Polynomial) -> None:
        x, n = a.input(x86.rdi, Region("x", False, columns * 64)), a.input(x86.rsi, None, columns)
        stride = a.r64()
        x86.imul(stride, n, 4)
        configure(a, WHOLE)
        x86.tileloadd(x86.tmm0, x86.ptr[x + stride])
        end()

    any_columns = Polynomial.of(Symbol.new("N"))
    accesses, unknown = shown(piece(lambda a: body(a, any_columns + 16)), CHIP)
    assert len(accesses) == 1 and not unknown
    with pytest.raises(AssemblyError, match="reaches outside x"):
        check_static(piece(lambda a: body(a, any_columns + 15)), CHIP)


def test_rows_of_an_unknown_configuration_are_left_to_running() -> None:
    def write(a: Assembly, x: Any, stride: Any) -> None:
        x86.ldtilecfg(x86.ptr[x])
        x86.tileloadd(x86.tmm0, x86.ptr[x + stride])
        end()

    accesses, unknown = shown(piece(on_rows(write, None)), CHIP)
    assert [i.row.mnemonic for i in accesses] == ["ldtilecfg"] and [i.row.mnemonic for i in unknown] == ["tileloadd"]


def test_effects_name_the_tiles() -> None:
    def write(a: Assembly, x: Any, stride: Any) -> None:
        x86.tileloadd(x86.tmm2, x86.ptr[x + stride])
        x86.tilestored(x86.ptr[x + stride], x86.tmm2)
        end()

    found = effects_of(piece(on_rows(write)), CHIP)
    assert found.features == {"amx_tile"} and {"tilecfg", "tmm2", "tmm7"} <= found.clobbers
    assert found.reads == {"x", "constants"} and found.writes == {"x"}


# --- The interpreter of rows ----------------------------------------------------------------------------------------

def product(a: Assembly, x: Any, stride: Any) -> None:
    """x holds a, b and c, 1 KiB each: c += a @ b, of bytes."""
    left, right, total = a.tile(), a.tile(), a.tile()
    x86.tileloadd(left, x86.ptr[x + stride])
    x86.tileloadd(right, x86.ptr[x + stride + 1024])
    x86.tileloadd(total, x86.ptr[x + stride + 2048])
    x86.tdpbssd(total, left, right)
    x86.tilestored(x86.ptr[x + stride + 2048], total)
    end()


INTEL = """
    tileloadd @left, [@x + @stride*1]
    tileloadd @right, [@x + @stride + 1024]
    tileloadd @total, [@x + @stride + 2048]
    tdpbssd @total, @left, @right
    tilestored [@x + @stride + 2048], @total
    tilerelease
    ret
"""
ATT = """
    tileloadd (@x,@stride,1), @left
    tileloadd 1024(@x,@stride), @right
    tileloadd 2048(@x,@stride), @total
    tdpbssd @right, @left, @total
    tilestored @total, 2048(@x,@stride)
    tilerelease
    ret
"""


def as_text(text: str, syntax: str) -> Write:
    return lambda a, x, stride: a.text(text, syntax, x=x, stride=stride, left=a.tile(), right=a.tile(), total=a.tile())


def run_product(write: Write) -> np.ndarray:
    random = np.random.default_rng(0)
    x = random.integers(0, 256, 4096).astype(np.uint8)
    a = x[:1024].view(np.int8).reshape(16, 64).astype(np.int64)
    b = x[1024:2048].view(np.int8).reshape(16, 16, 4).transpose(0, 2, 1).reshape(64, 16).astype(np.int64)
    wanted = (x[2048:3072].view(np.int32).reshape(16, 16) + a @ b).astype(np.int32)
    made = piece(on_rows(write))
    check_static(made, CHIP)
    interpret(made.machine(), x)
    assert np.array_equal(x[2048:3072].view(np.int32).reshape(16, 16), wanted)
    return x


@pytest.mark.parametrize("write", [product, as_text(INTEL, "intel"), as_text(ATT, "att")],
                         ids=["python", "intel", "att"])
def test_a_product(write: Write) -> None:
    run_product(write)


def test_text_and_python_give_the_same_bytes() -> None:
    codes = {finish(piece(on_rows(w)), CHIP).code for w in (product, as_text(INTEL, "intel"), as_text(ATT, "att"))}
    assert len(codes) == 1


@pytest.mark.skipif(not {"amx_tile", "amx_int8"} <= host().features, reason="no tile registers, or none granted")
def test_a_product_on_this_cpu() -> None:
    from sapper.runtime.loader import load

    wanted = run_product(product)
    x = np.random.default_rng(0).integers(0, 256, 4096).astype(np.uint8)
    load(finish(piece(on_rows(product)), CHIP).code).function(x.ctypes.data, 0, 1)
    assert np.array_equal(x, wanted)


@pytest.mark.parametrize("shapes, write, part", [
    (None, lambda a, x, s: x86.tilezero(x86.tmm0), "never written"),
    ([(16, 64)] * 3, lambda a, x, s: x86.tilezero(a.tile()), "not all tiles have the same shape"),
    ([(16, 64), (8, 64), (16, 64)], lambda a, x, s: x86.tdpbssd(x86.tmm0, x86.tmm1, x86.tmm2), "traps"),
    (WHOLE, lambda a, x, s: x86.tileloadd(x86.tmm0, x86.ptr[x + s + 3500]), "may not"),
])
def test_the_interpreter_refuses(shapes: Any, write: Write, part: str) -> None:
    with pytest.raises(AssemblyError) as caught:
        interpret(piece(on_rows(write, shapes)).machine(), np.zeros(4096, np.uint8))
    assert part in caught.value.headline


def test_a_configuration_clears_what_tiles_held() -> None:
    def write(a: Assembly, x: Any, stride: Any) -> None:
        x86.tileloadd(x86.tmm0, x86.ptr[x + stride])
        configure(a, [(2, 8)])
        x86.tilestored(x86.ptr[x + stride], x86.tmm0)
        x86.sttilecfg(x86.ptr[x + 2048])
        end()

    x = np.full(4096, 7, np.uint8)
    interpret(piece(on_rows(write)).machine(), x)
    assert not x[:8].any() and not x[64:72].any() and (x[8:64] == 7).all() and (x[72:2048] == 7).all()
    assert x[2048:2112].tobytes() == x86.tile_configuration([(2, 8)])


def test_the_first_register_of_an_address_is_the_base() -> None:
    """How far rows lie apart is the second one, or the one that is scaled, if only by 1."""
    def places(write: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
        made = piece(lambda a: x86.tileloadd(x86.tmm0, x86.ptr[write(x86.rdi, x86.rsi)]))
        (item,) = (i for i in made.body if isinstance(i, Instruction))
        memory: Any = item.operands[1]
        return memory.base.number, memory.index.number

    assert places(lambda x, s: x + s) == places(lambda x, s: s * 1 + x) == places(lambda x, s: x + 64 + s) == (7, 6)
    assert places(lambda x, s: s + x) == (6, 7)
