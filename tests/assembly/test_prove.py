"""Pieces that move and combine bits are proved for all inputs; a planted error gives a value that shows it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Schedule, Tensor, bf16, f32, i32, tiles, x86
from sapper.assembly import prove
from sapper.assembly.block import Block
from sapper.assembly.errors import AssemblyError
from sapper.assembly.mutate import mutants
from sapper.assembly.override import KernelAssembly, Override, compile_by_hand
from sapper.cli.main import main
from sapper.kernels.by_hand import rows
from sapper.lang.by_hand import PIECES
from sapper.runtime.check import check_kernel
from sapper.runtime.proofs import prove_kernel, prove_pieces
from sapper.targets.x86_64.target import target

M, N = sp.dims("M N")
ZEN4, V3 = target("zen4"), target("v3")
needs_z3 = pytest.mark.skipif(find_spec("z3") is None, reason="z3 is not installed: pip install 'sapper[prove]'")


@sp.kernel
def rounded(x: Tensor[f32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = sp.asm(rows.round_to_bf16, x[n], meaning=lambda t: t.to(bf16).to(f32))


@sp.kernel
def narrowed(x: Tensor[f32, N], y: Tensor[bf16, N]):
    for n in tiles(N):
        y[n] = x[n].to(bf16)


@sp.kernel
def nibble(x: Tensor[i32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = sp.asm(rows.unpack4, x[n], 12, meaning=lambda p: (p << 16 >> 28).to(f32))


@sp.kernel
def turned(x: Tensor[i32, N], y: Tensor[i32, N]):
    for n in tiles(N):
        y[n] = sp.asm(x86.vprold, x[n], 7, meaning=lambda t: t << 7 | t >> 25 & 127)


def the(proofs: dict[str, Any]) -> Any:
    (only,) = proofs.values()
    return only


def no_z3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "find_spec", lambda name: None)


def test_few_bits_are_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    no_z3(monkeypatch)
    proofs = prove_pieces(nibble, ZEN4)
    assert list(proofs) == ["unpack4 12"]
    assert str(the(proofs)) == "proved for all inputs: 16 lanes, each value of the 4 bits that matter"


def test_the_same_bits_moved_need_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    no_z3(monkeypatch)
    assert str(the(prove_pieces(turned, ZEN4))) == "proved for all inputs: 16 lanes, the same bits moved"
    assert not prove_pieces(turned, V3)  # the meaning stands there


@needs_z3
def test_a_cast_by_integer_instructions() -> None:
    schedule = Schedule(assembly=("round_to_bf16",))
    assert str(the(prove_pieces(narrowed, ZEN4, schedule))) == "proved for all inputs: 16 lanes, z3"
    assert not prove_pieces(narrowed, ZEN4)
    assert str(the(prove_pieces(rounded, ZEN4))) == "proved for all inputs: 16 lanes, z3"


def test_without_a_solver_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    no_z3(monkeypatch)
    proof = the(prove_pieces(rounded, ZEN4))
    assert proof.proved is None
    assert "depends on 32 bits" in proof.text and "pip install 'sapper[prove]'" in proof.text
    assert check_kernel(rounded, ZEN4, runs=2).ok


@needs_z3
def test_one_wrong_value_of_all_is_found_and_replayed() -> None:
    @sp.kernel
    def nearly(x: Tensor[f32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = sp.asm(rows.round_to_bf16, x[n], meaning=lambda t: sp.where(t == 1234.5, 0.0, t).to(bf16).to(f32))

    report = check_kernel(nearly, ZEN4, runs=2)  # no drawn value is this one
    assert report.finding is not None and report.finding.station == "proof"
    assert report.finding.case == "round_to_bf16"
    assert "for np.float32(1234.5) (0x449a5000) found np.float32(1232.0) (0x449a0000), expected np.float32(0.0)" \
        in report.finding.message


def planted(block: Any, immediates: list[int], chosen: Any) -> Block:
    """A block that writes what the mutant has, over the mutant's own registers."""
    class Wrong(Block):
        def assemble(self, sizes: Any, given: Any, first_register: int = 0) -> Any:
            assembly, out, inputs = block.assemble(sizes, given, first_register)
            made = list(mutants(assembly, [out.register]))[chosen].assembly
            return made, out, inputs

    return Wrong(x86.table, f"{block.name}_{chosen}", block.write, block.inputs, block.result, block.features)


@pytest.mark.parametrize("kernel", [
    pytest.param(rounded, marks=needs_z3), nibble], ids=["round_to_bf16", "unpack4"])
def test_every_planted_error_is_refuted_by_a_value(kernel: Any) -> None:
    """By a proof that fails, each with a value that was run; no case is drawn."""
    (op,) = [o for o in kernel.tile_ir().walk() if o.name == "asm"]
    block: Any = PIECES[op.attributes["by"]]
    meaning = prove.meaning_in_language(op.operands[0], op.operands[1:])
    immediates = op.attributes["immediates"]
    dtype = np.int32 if kernel is nibble else np.float32
    assembly, out, _ = block.assemble((512, 512), immediates)
    kinds = set()
    for number, mutant in enumerate(mutants(assembly, [out.register])):
        try:
            proof = prove.prove_block(planted(block, immediates, number), immediates, meaning, [dtype], 16)
        except AssemblyError:  # a register that nothing wrote
            continue
        assert proof.proved is False, f"{mutant}: {proof}"
        assert proof.text.startswith("lane ") and "expected" in proof.text
        kinds.add(mutant.kind)
    assert "wrong immediate" in kinds


def test_what_rounds_is_not_proved() -> None:
    @sp.kernel
    def scaled(x: Tensor[f32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = sp.asm(x86.vmulps, x[n], x[n] + 1.0, meaning=lambda a, b: b * a)

    proof = the(prove_pieces(scaled, ZEN4))
    assert proof.proved is None and "multiply" in proof.text


def test_what_may_be_off_is_not_proved() -> None:
    @sp.kernel
    def reciprocal(x: Tensor[f32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = sp.asm(x86.vrcp14ps, x[n], meaning=lambda t: 1.0 / t, tolerance=2.0**-13)

    assert str(the(prove_pieces(reciprocal, ZEN4))) == "not proved: it has a tolerance"


@pytest.mark.parametrize("body, part", [
    (lambda out, x: x86.vrcp14ps(out, x), "vrcp14ps: it is only approximate"),
    (lambda out, x: x86.vexpandps(out[_mask(x), x86.z], x), "vexpandps: a place or a count depends on the data"),
])
def test_why_a_step_can_not_be_followed(body: Any, part: str) -> None:
    block = Block(x86.table, "step", body, None, None)
    proof = prove.prove_block(block, [], lambda given: given[0], [np.float32], 16)
    assert proof.proved is None and part in proof.text


def _mask(x: Any) -> Any:
    k = x86.current().mask()
    x86.vptestmd(k, x, x)
    return k


# --- Kernels that move bits -------------------------------------------------------------------------------------------

def write_transposed(a: Any) -> None:
    """y[n, m] = x[m, n], by blocks of four by four."""
    x, y, rows_, columns = a.data("x"), a.data("y"), a.extent("M"), a.extent("N")
    x_bytes, y_bytes = a.r64(), a.r64()
    x86.imul(x_bytes, columns, 4)
    x86.imul(y_bytes, rows_, 4)
    with a.loop(0, rows_, 4) as m:
        source, target_ = a.r64(), a.r64()
        x86.mov(source, m)
        x86.imul(source, x_bytes)
        x86.add(source, x)
        x86.lea(target_, x86.ptr[y + m * 4])
        with a.loop(0, columns, 4):
            four = [a.xmm() for _ in range(4)]
            at = a.r64()
            x86.mov(at, source)
            for v in four:
                x86.vmovups(v, x86.ptr[at])
                x86.add(at, x_bytes)
            low, high = [a.xmm() for _ in range(2)], [a.xmm() for _ in range(2)]
            for pair in range(2):
                x86.vunpcklps(low[pair], four[pair], four[pair + 2])
                x86.vunpckhps(high[pair], four[pair], four[pair + 2])
            for half in (low, high):
                for unpack in (x86.vunpcklps, x86.vunpckhps):
                    row = a.xmm()
                    unpack(row, *half)
                    x86.vmovups(x86.ptr[target_], row)
                    x86.add(target_, y_bytes)
            x86.add(source, 16)
    x86.ret()


def transposing() -> tuple[Any, Override]:
    @sp.kernel
    def transposed(x: Tensor[f32, M, N], y: Tensor[f32, N, M]):
        for m, n in tiles(M, N):
            y[n, m] = x[m, n]

    transposed.assembly(features="avx", contiguous="x y", divisible={"M": 4, "N": 4})(write_transposed)
    return transposed, compile_by_hand(transposed, transposed.by_hand[0], V3)


def test_a_transposing_kernel_is_proved_for_all_values(monkeypatch: pytest.MonkeyPatch) -> None:
    no_z3(monkeypatch)
    proof = prove_kernel(*transposing())
    assert proof.proved and "for all values of x at M=" in str(proof) and "the same bits moved" in str(proof)


def test_planted_errors_in_a_transposing_kernel_give_a_value() -> None:
    kernel, made = transposing()
    seen = 0
    for mutant in mutants(made.assembly):
        if mutant.kind != "swapped operands" or "unpck" not in mutant.item.row.name:
            continue
        assert isinstance(mutant.assembly, KernelAssembly)
        wrong = Override(made.piece, mutant.assembly, mutant.assembly.machine(), made.finished, made.compiled)
        proof = prove_kernel(kernel, wrong)
        assert proof.proved is False and "expected" in proof.text and "boundary M=" in proof.text
        seen += 1
        if seen == 2:
            break
    assert seen == 2


def test_moves_by_known_indices() -> None:
    kernel = rows.make_embedding()
    rows.attach_embedding(kernel)
    proof = prove_kernel(kernel, compile_by_hand(kernel, kernel.by_hand[0], ZEN4))
    assert proof.proved and "values of table, ids as drawn" in str(proof)


def test_kernels_that_add_are_not_tried() -> None:
    kernel = rows.make_row_sum()
    rows.attach_row_sum(kernel)
    proof = prove_kernel(kernel, compile_by_hand(kernel, kernel.by_hand[0], ZEN4))
    assert str(proof) == "not proved: reduce of the kernel is more than moving bits"


def test_a_jump_on_data_is_not_followed() -> None:
    @sp.kernel
    def clamped(x: Tensor[i32, N], y: Tensor[i32, N]):
        for n in tiles(N):
            y[n] = sp.maximum(x[n], 0)

    @clamped.assembly(contiguous="x y")
    def by_jumps(a: Any) -> None:
        x, y, n = a.data("x"), a.data("y"), a.extent("N")
        with a.loop(0, n) as i:
            value, over = a.r64(), a.label()
            x86.mov(value.r32, x86.dword[x + i * 4])
            x86.test(value.r32, value.r32)
            x86.jns(over)
            x86.xor(value.r32, value.r32)
            a.place(over)
            x86.mov(x86.dword[y + i * 4], value.r32)
        x86.ret()

    proof = prove_kernel(clamped, compile_by_hand(clamped, clamped.by_hand[0], V3))
    assert str(proof) == "not proved: jns: a decision depends on the data"


def test_check_says_what_is_proved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "user_proof.py"
    path.write_text('''
import sapper as sp
from sapper import Tensor, f32, i32, tiles
from sapper.kernels.by_hand import rows

N, = sp.dims("N"),


@sp.kernel
def low(x: Tensor[i32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = sp.asm(rows.unpack4, x[n], 0, meaning=lambda p: (p << 28 >> 28).to(f32))
''', encoding="utf-8")
    assert main(["check", f"{path}:low", "--target", "zen4", "--runs", "2"]) == 0
    assert "  unpack4 0: proved for all inputs: 16 lanes" in capsys.readouterr().out
    assert main(["check", f"{path}:low", "--target", "zen4", "--runs", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["proofs"]["unpack4 0"]["proved"] is True
