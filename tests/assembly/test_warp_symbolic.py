"""PTX rows on values that are not known: what the terms say against what the meanings give; proofs of blocks."""

from __future__ import annotations

import zlib
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, bf16, f16, f32, i32, ptx, tiles
from sapper.assembly import prove, terms
from sapper.assembly.errors import AssemblyError
from sapper.assembly.symbolic import Lanes, NotSymbolic, unknown
from sapper.assembly.warp import WarpAssembly
from sapper.assembly.warp_mutate import mutants, planted
from sapper.assembly.warp_rows import WARP, run_rows
from sapper.codegen.machine import Immediate, Instruction, VirtualRegister
from sapper.emulate import run
from sapper.kernels.by_hand import nibbles
from sapper.lang.by_hand import PIECES
from sapper.runtime.check import check_kernel
from sapper.runtime.proofs import prove_pieces
from sapper.targets import target
from sapper.targets.ptx import assembly as table
from sapper.targets.ptx.instructions import TABLE
from sapper.targets.ptx.rows import form

WARP_LANES, FEW_LANES = 32, 3
NUMBERS = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}
COMPUTED = [row for row in TABLE.rows.values() if row.meaning is not None and row.unit in ("", WARP)
            and not row.operand_text.startswith("w:type*") and row.opcode not in ("mma", "wmma", "movmatrix")]
"""Rows that compute values on registers, but for those on fragments of matrices."""
DECIDED_BY_DATA = {"fns", "redux.f32"}
"""Rows whose meaning branches on its operands."""
KNOWN = {"shfl": 2, "vote": 1, "match": 1, "redux": 1, "elect": 0}
"""By opcode, of these the operands from this one on, lanes and members, are known."""


def step(mnemonic: str, lanes: int, random: np.random.Generator) -> tuple[WarpAssembly, dict[Any, Any], list[Any]]:
    """An assembly of one instruction, what its registers hold, and those that it writes."""
    found = form(mnemonic)
    held: dict[Any, Any] = {}
    operands: list[Any] = []
    written: list[Any] = []
    read = 0
    for number, spec in enumerate(found.operands):
        if spec.role == "i":
            operands.append(Immediate(int(random.integers(0, 256))))
            continue
        kind = next(kind for kind, bits in table.VIRTUAL.values() if bits == spec.bits)
        parts = tuple(VirtualRegister(kind, 10 * number + n) for n in range(spec.count or 1))
        if spec.reads and read >= KNOWN.get(found.row.opcode, 99):
            operands.append(Immediate(0xFFFFFFFF if found.operands[-1] is spec else
                                      int(random.integers(0, 32)) if read == 1 else 31))
            read += 1
            continue
        read += spec.reads
        if spec.reads:
            small = spec.type == "u32" and random.integers(0, 2)  # counts and places
            held |= {part: random.integers(0, 40 if small else 2**63, lanes).astype(NUMBERS[spec.bits])
                     for part in parts}
        if spec.writes:
            written += parts
        operands.append(parts if spec.count else parts[0])
    assembly = WarpAssembly(mnemonic, table)
    assembly.body.append(Instruction(found, operands))
    return assembly, held, written


def test_every_row_computes_on_terms_what_it_computes_on_values() -> None:
    refused: dict[str, str] = {}
    ran = set()
    for row in COMPUTED:
        for mnemonic in row.mnemonics(24):
            if any(spec.bits not in NUMBERS for spec in form(mnemonic).operands):
                continue  # by hand there are no registers of 8 bits
            random = np.random.default_rng(zlib.crc32(mnemonic.encode()))
            lanes = WARP_LANES if row.unit == WARP else FEW_LANES
            assembly, held, written = step(mnemonic, lanes, random)
            inputs = {f"x{n}.{lane}": np.array([int(value)], np.uint64)
                      for n, words in enumerate(held.values()) for lane, value in enumerate(words)}
            hidden: dict[Any, Any] = {r: unknown(f"x{n}", (lanes,), words.dtype)
                                      for n, (r, words) in enumerate(held.items())}
            try:
                run_rows(assembly, hidden, lanes)
            except NotSymbolic as error:
                refused[row.name] = str(error)
                assert str(error).startswith(f"{mnemonic}: ")
                terms.forget()
                continue
            run_rows(assembly, held, lanes)
            for register in written:
                wanted, found = held[register], hidden[register]
                if isinstance(found, Lanes):
                    got = np.array([int(v[0]) for v in terms.evaluate_all(found.terms(), inputs)], np.uint64)
                else:
                    got = found.astype(np.uint64)
                assert np.array_equal(got, wanted.astype(np.uint64)), mnemonic
            ran.add(row.name)
            terms.forget()
    approximate = {name for name, why in refused.items() if why.endswith("only approximate")}
    assert set(refused) - approximate <= DECIDED_BY_DATA, refused
    assert len(ran) > 100 and {"prmt", "lop3", "shf", "bfe", "bfi", "mad.wide", "shfl", "vote.ballot"} <= ran


# --- Blocks ---------------------------------------------------------------------------------------------------------

N, = sp.dims("N"),
SM80 = target("sm_80")
needs_z3 = pytest.mark.skipif(find_spec("z3") is None, reason="z3 is not installed: pip install 'sapper[prove]'")


def used(kernel: Any, number: int = 0) -> tuple[Any, list[int], Any]:
    """A piece that a kernel names, its immediates, its meaning."""
    op = [o for o in kernel.tile_ir().walk() if o.name == "asm"][number]
    return PIECES[op.attributes["by"]], op.attributes["immediates"], prove.meaning_in_language(
        op.operands[0], op.operands[1:])


def kill_all(block: Any, immediates: list[int], meaning: Any, inputs: list[Any]) -> set[str]:
    """Every planted error is refuted, by a value that was run; the kinds."""
    assembly, _, _ = block.assemble((32,) * (1 + len(inputs)), immediates)
    kinds = set()
    for number, mutant in enumerate(mutants(assembly)):
        try:
            proof = prove.prove_block(planted(block, number), immediates, meaning, inputs, WARP_LANES)
        except AssemblyError:  # a register that nothing wrote
            kinds.add(mutant.kind)
            continue
        assert proof.proved is False and proof.text.startswith("lane "), f"{mutant}: {proof}"
        kinds.add(mutant.kind)
    return kinds


@pytest.mark.parametrize("narrow", [bf16, f16], ids=str)
def test_four_bits_to_pairs_of_floats_are_proved(narrow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "find_spec", lambda name: None)
    kernel = nibbles.make_unpack(narrow, True)
    proofs = prove_pieces(kernel, SM80)
    assert [name.split()[1] for name in proofs] == ["0", "4", "8", "12"]
    assert all(str(p).startswith("proved for all inputs: 32 lanes, each value of the 1") for p in proofs.values())
    report = check_kernel(kernel, SM80, runs=2, emulate=run)
    assert report.ok and len(report.proofs) == 4


@pytest.mark.sampled(3)
@pytest.mark.parametrize("narrow, at", [(bf16, 0), (bf16, 3), (f16, 0), (f16, 1)])
def test_every_error_planted_there_is_refuted(narrow: Any, at: int) -> None:
    block, immediates, meaning = used(nibbles.make_unpack(narrow, True), at)
    assert {"left out", "wrong number", "clobber", "swapped operands"} <= kill_all(block, immediates, meaning,
                                                                                  [np.int32])


@ptx.block("bytes_backwards", inputs="i32", result="i32")
def bytes_backwards(out: Any, word: Any) -> None:
    ptx.prmt_b32(out, word, word, 0x0123)


@ptx.block("halves_and_sum", inputs="i32 i32", result="i32")
def halves_and_sum(out: Any, a: Any, b: Any) -> None:
    """A half of a within b, turned left by seven, and three times b added: bfi, shf, mad."""
    ptx.bfi_b32(out, a, b, 8, 16)
    ptx.shf_l_wrap_b32(out, out, out, 7)
    ptx.mad_lo_s32(out, b, 3, out)


@ptx.block("even_lanes", inputs="i32", result="i32")
def even_lanes(out: Any, word: Any) -> None:
    """What the neighbour holds, in lanes whose own is negative: a shuffle, a comparison, a choice."""
    current = ptx.current()
    other, negative = current.b32(), current.pred()
    ptx.shfl_sync_bfly_b32(other, word, 1, 31, 0xFFFFFFFF)
    ptx.setp_lt_s32(negative, word, 0)
    ptx.selp_b32(out, other, word, negative)


def test_bytes_that_are_permuted_need_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "find_spec", lambda name: None)

    @sp.kernel
    def swapped(x: Tensor[i32, N], y: Tensor[i32, N]):
        for n in tiles(N):
            y[n] = sp.asm(bytes_backwards, x[n], meaning=lambda t: t << 24 | (t & 0xFF00) << 8 | t >> 8 & 0xFF00
                          | t >> 24 & 0xFF)

    (proof,) = prove_pieces(swapped, SM80).values()
    assert str(proof) == "proved for all inputs: 32 lanes, the same bits moved"
    block, immediates, meaning = used(swapped)
    assert {"wrong number", "clobber"} <= kill_all(block, immediates, meaning, [np.int32])


@needs_z3
def test_arithmetic_of_words_is_proved_by_z3() -> None:
    @sp.kernel
    def joined(x: Tensor[i32, N], z: Tensor[i32, N], y: Tensor[i32, N]):
        for n in tiles(N):
            y[n] = sp.asm(halves_and_sum, x[n], z[n], meaning=lambda a, b: (
                ((a & 0xFFFF) << 8 | b & ~0xFFFF00) << 7 | ((a & 0xFFFF) << 8 | b & ~0xFFFF00) >> 25 & 127) + b * 3)

    (proof,) = prove_pieces(joined, SM80).values()
    assert str(proof) in ("proved for all inputs: 32 lanes, z3", "proved for all inputs: 32 lanes, the same bits moved")
    block, immediates, meaning = used(joined)
    assert {"wrong number", "swapped operands", "left out"} <= kill_all(block, immediates, meaning, [np.int32] * 2)


def test_a_block_that_looks_at_its_neighbours_is_followed() -> None:
    def meaning(rows: list[Any]) -> Any:
        (x,) = rows
        return np.where(x < 0, x.reshape(-1, 2)[:, ::-1].reshape(-1), x)

    proof = prove.prove_block(even_lanes, [], meaning, [np.int32], WARP_LANES)
    assert str(proof) == "proved for all inputs: 32 lanes, the same bits moved"
    assert "off by one" in kill_all(even_lanes, [], meaning, [np.int32])


def test_rows_that_hold_the_same_are_one() -> None:
    """A funnel shift turns a word only if both of its words are that one."""
    @sp.kernel
    def turned(x: Tensor[i32, N], y: Tensor[i32, N]):
        for n in tiles(N):
            y[n] = sp.asm(ptx.shf_l_wrap_b32, x[n], x[n], 7, meaning=lambda a, b: a << 7 | (a >> 25 & 127))

    @sp.kernel
    def replaced(x: Tensor[i32, N], z: Tensor[i32, N], y: Tensor[i32, N]):
        for n in tiles(N):
            y[n] = sp.asm(ptx.shf_l_wrap_b32, x[n], z[n], 7, meaning=lambda a, b: a << 7 | (a >> 25 & 127))

    (proof,) = prove_pieces(turned, SM80).values()
    assert str(proof) == "proved for all inputs: 32 lanes, the same bits moved"
    (proof,) = prove_pieces(replaced, SM80).values()
    assert proof.proved is False


def test_why_a_step_is_not_followed() -> None:
    @sp.kernel
    def reciprocal(x: Tensor[f32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = sp.asm(ptx.rcp_approx_f32, x[n], meaning=lambda t: 1.0 / t)

    @sp.kernel
    def tripled(x: Tensor[f32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = sp.asm(ptx.mul_rn_f32, x[n], x[n] + 2.0, meaning=lambda t, u: t * u)

    (proof,) = prove_pieces(reciprocal, SM80).values()
    assert str(proof) == "not proved: rcp.approx.f32: it is only approximate"
    (proof,) = prove_pieces(tripled, SM80).values()
    assert str(proof) == "not proved: mul.rn.f32, multiply of floats on 64 bits"
