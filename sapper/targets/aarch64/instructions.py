"""The instruction table of AArch64: one row for each instruction form that generated code uses.

Leaves: `ROWS`, name -> `Row`. What the strings mean is said at the head of rows.py. Families below make the forms of a
line for several arrangements: `.4s` four elements of 32 bits, `.2s` two in the lower half, `.2d` two of 64 bits.
Source: Arm Architecture Reference Manual DDI 0487, C6.2 and C7.2 (encodings, operation).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import meaning as m
from .registers import LINK, SP
from .rows import Row

ROWS: dict[str, Row] = {}

Meaning = Callable[..., Any]
FLAGS = "nzcv"


def row(name: str, syntax: str, words: str | tuple[str, ...], meaning: Meaning | None, cost: str, **more: Any) -> None:
    if name in ROWS:
        raise ValueError(f"row {name}: found two; expected one")
    ROWS[name] = Row(name, syntax, words, meaning, cost, **more)


# --- General registers ------------------------------------------------------------------------------------------------

CONDITION_CODES: dict[str, int] = {"eq": 0, "ne": 1, "hs": 2, "lo": 3, "mi": 4, "pl": 5, "vs": 6, "vc": 7, "hi": 8,
                                   "ls": 9, "ge": 10, "lt": 11, "gt": 12, "le": 13}
"""One name for each condition, and its number in the word."""


def _arithmetic() -> None:
    meaning: Meaning
    row("mov.64", "mov <Xd>, <Xm>", "10101010000 mmmmm 000000 11111 ddddd", m.same, "alu")
    for name, opcode, meaning in (("movz", "110", m.shifted_immediate), ("movn", "100", m.inverted_immediate)):
        row(f"{name}.64", f"{name} <Xd>, <#i>, lsl <#s*16>", f"{opcode}100101 ss iiiiiiiiiiiiiiii ddddd", meaning,
            "alu")
    row("movk.64", "movk <Xd+>, <#i>, lsl <#s*16>", "111100101 ss iiiiiiiiiiiiiiii ddddd", m.kept_immediate, "alu")
    for name, bit, meaning in (("add", "0", m.add), ("sub", "1", m.subtract)):
        row(f"{name}.64", f"{name} <Xd>, <Xn>, <Xm>", f"1{bit}001011000 mmmmm 000000 nnnnn ddddd", meaning, "alu")
        row(f"{name}.imm.64", f"{name} <Pd>, <Pn>, <#i>", (
            f"1{bit}01000100 iiiiiiiiiiii nnnnn ddddd", f"high: 1{bit}01000101 iiiiiiiiiiii nnnnn ddddd"), meaning,
            "alu")
    row("add.word.64", "add <Pd>, <Pn>, <Wm>, sxtw <#i>", "10001011001 mmmmm 110 iii nnnnn ddddd", m.add_word,
        "alu shifted")
    row("subs.imm.64", "subs <Xd>, <Pn>, <#i>", (
        "1111000100 iiiiiiiiiiii nnnnn ddddd", "high: 1111000101 iiiiiiiiiiii nnnnn ddddd"), m.subtract_flags, "alu",
        flags_written=FLAGS)
    row("cmp.64", "cmp <Xn>, <Xm>", "11101011000 mmmmm 000000 nnnnn 11111", m.compare, "alu", flags_written=FLAGS)
    row("cmp.imm.64", "cmp <Pn>, <#i>", (
        "1111000100 iiiiiiiiiiii nnnnn 11111", "high: 1111000101 iiiiiiiiiiii nnnnn 11111"), m.compare, "alu",
        flags_written=FLAGS)
    row("cmn.imm.64", "cmn <Pn>, <#i>", (
        "1011000100 iiiiiiiiiiii nnnnn 11111", "high: 1011000101 iiiiiiiiiiii nnnnn 11111"), m.compare_negative, "alu",
        flags_written=FLAGS)
    row("cmp.32", "cmp <Wn>, <Wm>", "01101011000 mmmmm 000000 nnnnn 11111", m.compare_words, "alu",
        flags_written=FLAGS)
    row("mul.64", "mul <Xd>, <Xn>, <Xm>", "10011011000 mmmmm 011111 nnnnn ddddd", m.multiply, "mul")
    row("msub.64", "msub <Xd>, <Xn>, <Xm>, <Xa>", "10011011000 mmmmm 1aaaaa nnnnn ddddd", m.multiply_subtract, "mul")
    row("sdiv.64", "sdiv <Xd>, <Xn>, <Xm>", "10011010110 mmmmm 000011 nnnnn ddddd", m.divide, "div")
    for name, opcode, meaning in (("and", "00", m.bit_and), ("orr", "01", m.bit_or), ("eor", "10", m.bit_xor)):
        row(f"{name}.64", f"{name} <Xd>, <Xn>, <Xm>", f"1{opcode}01010000 mmmmm 000000 nnnnn ddddd", meaning, "alu")
        row(f"{name}.imm.64", f"{name} <Pd>, <Xn>, <#b>", f"1{opcode}100100 bbbbbbbbbbbbb nnnnn ddddd", meaning, "alu")
    row("lsl.imm.64", "lsl <Xd>, <Xn>, <#64-i,63-j>", "1101001101 iiiiii jjjjjj nnnnn ddddd", m.shift_left, "alu")
    row("lsr.imm.64", "lsr <Xd>, <Xn>, <#i>", "1101001101 iiiiii 111111 nnnnn ddddd", m.shift_right, "alu")
    row("asr.imm.64", "asr <Xd>, <Xn>, <#i>", "1001001101 iiiiii 111111 nnnnn ddddd", m.shift_right_signed, "alu")
    for name, opcode, meaning in (("lsl", "00", m.shift_left), ("lsr", "01", m.shift_right),
                                  ("asr", "10", m.shift_right_signed)):
        row(f"{name}.64", f"{name} <Xd>, <Xn>, <Xm>", f"10011010110 mmmmm 0010{opcode} nnnnn ddddd", meaning, "alu")
    for condition, number in CONDITION_CODES.items():
        row(f"csel.{condition}", f"csel <Xd>, <Xn>, <Xm>, {condition}",
            f"10011010100 mmmmm {number:04b}00 nnnnn ddddd", m.chosen(condition), "alu", flags_read=FLAGS)
        row(f"cset.{condition}", f"cset <Xd>, {condition}", f"1001101010011111 {number ^ 1:04b}01 11111 ddddd",
            m.truth(condition), "alu", flags_read=FLAGS)


def _control() -> None:
    row("b", "b <label>", "000101 llllllllllllllllllllllllll", None, "branch", control="jump")
    for condition, number in CONDITION_CODES.items():
        row(f"b.{condition}", f"b.{condition} <label>", f"01010100 lllllllllllllllllll 0{number:04b}", None, "branch",
            control="branch", flags_read=FLAGS)
    for letter, sf, bits in (("X", "1", 64), ("W", "0", 32)):
        row(f"cbz.{bits}", f"cbz <{letter}t>, <label>", f"{sf}0110100 lllllllllllllllllll ttttt", None, "branch",
            control="branch")
    row("ret", "ret", "11010110010111110000001111000000", None, "branch", control="return")
    row("svc", "svc #0", "11010100000000000000000000000001", None, "system", side_effects=True,
        implicit_reads=tuple(("gpr", n) for n in (0, 1, 2, 3, 8)), implicit_writes=(("gpr", 0),))
    row("yield", "yield", "11010101000000110010000000111111", None, "hint", side_effects=True)


# --- Memory -----------------------------------------------------------------------------------------------------------

def _ways(size: str, vector: str, opc: str, target: str = "ttttt") -> tuple[str, ...]:
    """The words of a load or store of one register. target: what stands in the field of the register."""
    head = f"{size}111{vector}0"
    return (f"scaled: {head}1{opc} iiiiiiiiiiii nnnnn {target}", f"near: {head}0{opc}0 iiiiiiiii 00 nnnnn {target}",
            f"index: {head}0{opc}1 mmmmm 011s10 nnnnn {target}")


def _memory() -> None:
    meaning: Meaning
    for name, letter, bits, size, opc, meaning in (
            ("ldr.64", "X", 64, "11", "01", m.loaded(64)), ("ldr.32", "W", 32, "10", "01", m.loaded(32)),
            ("ldrsw", "X", 32, "10", "10", m.loaded(32, True)), ("ldrh", "W", 16, "01", "01", m.loaded(16)),
            ("ldrsh", "X", 16, "01", "10", m.loaded(16, True)), ("ldrb", "W", 8, "00", "01", m.loaded(8)),
            ("ldrsb", "X", 8, "00", "10", m.loaded(8, True))):
        row(name, f"{name.partition('.')[0]} <{letter}t=>, <mem>", _ways(size, "0", opc), meaning, "load",
            memory_bits=bits)
    for name, letter, bits, size in (("str.64", "X", 64, "11"), ("str.32", "W", 32, "10"), ("strh", "W", 16, "01"),
                                     ("strb", "W", 8, "00")):
        row(name, f"{name.partition('.')[0]} <{letter}t>, <mem=>", _ways(size, "0", "00"), m.stored(bits), "store",
            memory_bits=bits)
    for letter, bits, size, wide, literal in (("Q", 128, "00", 1, "10"), ("D", 64, "11", 0, "01"),
                                              ("S", 32, "10", 0, "00"), ("H", 16, "01", 0, ""), ("B", 8, "00", 0, "")):
        constants = (f"literal: {literal}011100 lllllllllllllllllll ttttt",) if literal else ()
        row(f"ldr.{letter.lower()}", f"ldr <{letter}t=>, <mem>", (*_ways(size, "1", f"{wide}1"), *constants), m.same,
            "load vector", memory_bits=bits, dtypes="u8")
        row(f"str.{letter.lower()}", f"str <{letter}t>, <mem=>", _ways(size, "1", f"{wide}0"), m.same, "store",
            memory_bits=bits, dtypes="u8")
    for name, number in (("pldl1keep", 0), ("pldl2keep", 2), ("pldl3keep", 4), ("pstl1keep", 16), ("pstl2keep", 18),
                         ("pstl3keep", 20)):
        row(f"prfm.{name}", f"prfm {name}, <mem&>", _ways("11", "0", "10", f"{number:05b}"), None, "hint",
            memory_bits=64, side_effects=True)
    for letter, size, bits in (("X", "11", 64), ("W", "10", 32)):
        row(f"ldaddal.{bits}", f"ldaddal <{letter}m>, <{letter}t=>, <mem+>",
            f"plain: {size}111000111 mmmmm 000000 nnnnn ttttt", m.added_to(bits), "atomic", memory_bits=bits,
            side_effects=True, features=frozenset({"lse"}))
    row("ldar.32", "ldar <Wt=>, <mem>", "plain: 1000100011011111111111 nnnnn ttttt", m.loaded(32), "load",
        memory_bits=32, side_effects=True)
    # The frame: sums of the stack pointer and itself.
    for name, bit, meaning in (("add", "0", m.add), ("sub", "1", m.subtract)):
        row(f"{name}.stack", f"{name} <Pd+>, sp, <#i>", (
            f"1{bit}01000100 iiiiiiiiiiii 11111 ddddd", f"high: 1{bit}01000101 iiiiiiiiiiii 11111 ddddd"), meaning,
            "alu")
    stack = {"implicit_reads": (("gpr", SP),), "implicit_writes": (("gpr", SP),), "side_effects": True}
    for kind, letter, vector in (("gpr", "X", "0"), ("vec", "D", "1")):
        row(f"push.{kind}", f"str <{letter}t>, [sp, #-16]!", f"11111{vector}00000 111110000 11 11111 ttttt", None,
            "store", **stack)
        row(f"pop.{kind}", f"ldr <{letter}t=>, [sp], #16", f"11111{vector}00010 000010000 01 11111 ttttt", None, "load",
            **stack)


# --- Vectors ----------------------------------------------------------------------------------------------------------

ARRANGEMENTS = {"2s": ("0", "0", 64, 32), "4s": ("1", "0", 128, 32), "2d": ("1", "1", 128, 64)}
"""Arrangement -> the bits Q and sz of the word, bits of the register, bits of an element."""


def _elements(name: str, operands: str, word: str, meaning: Meaning, cost: str, kind: str,
              arrangements: tuple[str, ...] = ("2s", "4s", "2d"), **more: Any) -> None:
    """A row for each arrangement. `T` in the operands is the arrangement, q and z in the word are Q and sz. kind: "f"
    or "i", of elements."""
    mnemonic = name.partition(".")[0]
    for arrangement in arrangements:
        q, sz, length, bits = ARRANGEMENTS[arrangement]
        row(f"{name}.{arrangement}", f"{mnemonic} {operands.replace('T', arrangement)}",
            word.replace("q", q).replace("z", sz), meaning, cost, length=length, dtypes=f"{kind}{bits}", **more)


_THREE = "<Vd>.T, <Vn>.T, <Vm>.T"
_SUMS = "<Vd+>.T, <Vn>.T, <Vm>.T"
_TWO = "<Vd>.T, <Vn>.T"


def _floats() -> None:
    meaning: Meaning
    for name, u, high, opcode, meaning, cost in (
            ("fadd", 0, 0, "110101", m.add_rows, "fadd"), ("fsub", 0, 1, "110101", m.subtract_rows, "fadd"),
            ("fmul", 1, 0, "110111", m.multiply_rows, "fmul"), ("fdiv", 1, 0, "111111", m.divide_rows, "fdiv"),
            ("fcmeq", 0, 0, "111001", m.equal, "fadd"), ("fcmge", 1, 0, "111001", m.at_least, "fadd"),
            ("fcmgt", 1, 1, "111001", m.above, "fadd")):
        _elements(name, _THREE, f"0q{u}01110 {high}z1 mmmmm {opcode} nnnnn ddddd", meaning, cost, "f")
    for name, high, meaning in (("fmla", 0, m.fused), ("fmls", 1, m.fused_negative)):
        _elements(name, _SUMS, f"0q001110 {high}z1 mmmmm 110011 nnnnn ddddd", meaning, "fma", "f")
    # By one element: H, L of the word are the number of one of 32 bits, H that of one of 64.
    for name, opcode, meaning in (("fmla", "0001", m.fused), ("fmls", "0101", m.fused_negative)):
        for arrangement in ARRANGEMENTS:
            letter, low = ("d", "0") if arrangement == "2d" else ("s", "e")
            _elements(f"{name}.element", f"<Vd+>.T, <Vn>.T, <Em>.{letter}[<:e>]",
                      f"0q0011111 z{low} mmmmm {opcode} e 0 nnnnn ddddd", m.by_element(meaning), "fma", "f",
                      (arrangement,))
    for name, u, high, opcode, meaning, cost in (
            ("fneg", 1, 1, "01111", m.negate, "fadd"), ("fabs", 0, 1, "01111", m.absolute, "fadd"),
            ("fsqrt", 1, 1, "11111", m.root, "fsqrt"), ("frintn", 0, 0, "11000", m.nearest, "convert"),
            ("frintm", 0, 0, "11001", m.floor, "convert"), ("frintp", 0, 1, "11000", m.ceiling, "convert"),
            ("frintz", 0, 1, "11001", m.truncated, "convert"), ("scvtf", 0, 0, "11101", m.to_float, "convert"),
            ("fcvtzs", 0, 1, "11011", m.to_integer, "convert"), ("fcvtns", 0, 0, "11010", m.to_nearest, "convert")):
        _elements(name, _TWO, f"0q{u}01110 {high}z 10000 {opcode} 10 nnnnn ddddd", meaning, cost, "f")
    # Between widths: the lower half of a register, or all of it.
    for name, opcode, source, taken, made, meaning, z in (
            ("fcvtl.4s", "10111", "4h", "f16", "4s", m.widened("f32"), 0),
            ("fcvtl.2d", "10111", "2s", "f32", "2d", m.widened("f64"), 1),
            ("fcvtn.4h", "10110", "4s", "f32", "4h", m.narrowed("f16"), 0),
            ("fcvtn.2s", "10110", "2d", "f64", "2s", m.narrowed("f32"), 1)):
        row(name, f"{name[:5]} <Vd>.{made}, <Vn>.{source}", f"00001110 0{z} 10000 {opcode} 10 nnnnn ddddd", meaning,
            "convert", length=128, dtypes=taken)
    for letter, word in (("S", "1001111000100010000000"), ("D", "1001111001100010000000")):
        row(f"scvtf.{letter.lower()}", f"scvtf <{letter}d>, <Xn>", f"{word} nnnnn ddddd",
            m.scalar_to_float("f32" if letter == "S" else "f64"), "to vector", dtypes="u8")


_SIZES = {"2s": "10", "4s": "10", "2d": "11"}


def _integers(name: str, u: int, opcode: str, meaning: Meaning, cost: str = "vector",
              arrangements: tuple[str, ...] = ("2s", "4s", "2d")) -> None:
    for arrangement in arrangements:
        _elements(name, _THREE, f"0q{u}01110 {_SIZES[arrangement]}1 mmmmm {opcode} nnnnn ddddd", meaning, cost, "i",
                  (arrangement,))


def _integer_rows() -> None:
    meaning: Meaning
    narrow = ("2s", "4s")
    _integers("add", 0, "100001", m.add_rows)
    _integers("sub", 1, "100001", m.subtract_rows)
    _integers("mul", 0, "100111", m.multiply_rows, "vector mul", narrow)
    _integers("smax", 0, "011001", m.larger, "vector", narrow)
    _integers("smin", 0, "011011", m.smaller, "vector", narrow)
    _integers("cmeq", 1, "100011", m.equal)
    _integers("cmge", 0, "001111", m.at_least)
    _integers("cmgt", 0, "001101", m.above)
    _integers("sshl", 0, "010001", m.shift_by_rows, "vector shift")
    _integers("ushl", 1, "010001", m.shift_by_rows_unsigned, "vector shift")
    for arrangement in ("2s", "4s", "2d"):
        size = _SIZES[arrangement]
        for name, u, meaning in (("neg", 1, m.negate), ("abs", 0, m.absolute)):
            _elements(name, _TWO, f"0q{u}01110 {size} 10000 01011 10 nnnnn ddddd", meaning, "vector", "i",
                      (arrangement,))
        bits = ARRANGEMENTS[arrangement][3]
        left, right = f"<#{bits}+i>", f"<#{2 * bits}-i>"
        for name, u, opcode, amount, meaning in (("shl", 0, "010101", left, m.shift_left_rows),
                                                 ("sshr", 0, "000001", right, m.shift_right_rows_signed),
                                                 ("ushr", 1, "000001", right, m.shift_right_rows)):
            _elements(name, f"{_TWO}, {amount}", f"0q{u}011110 iiiiiii {opcode} nnnnn ddddd", meaning, "vector shift",
                      "i", (arrangement,))
    for name, u, size, meaning in (("and", 0, "00", m.bit_and), ("orr", 0, "10", m.bit_or),
                                   ("eor", 1, "00", m.bit_xor)):
        row(f"{name}.16b", f"{name} <Vd>.16b, <Vn>.16b, <Vm>.16b", f"01{u}01110 {size}1 mmmmm 000111 nnnnn ddddd",
            meaning, "vector", length=128, dtypes="u8")
    for name, size, meaning in (("bsl", "01", m.select_by_result), ("bit", "10", m.insert_where),
                                ("bif", "11", m.insert_unless)):
        row(f"{name}.16b", f"{name} <Vd+>.16b, <Vn>.16b, <Vm>.16b", f"01101110 {size}1 mmmmm 000111 nnnnn ddddd",
            meaning, "vector", length=128, dtypes="u8")
    row("mov.16b", "mov <Vd>.16b, <Vn>.16b", "01001110 101 NNNNN 000111 nnnnn ddddd", m.same, "vector", length=128,
        dtypes="u8")
    row("mvn.16b", "mvn <Vd>.16b, <Vn>.16b", "01101110 00 10000 00101 10 nnnnn ddddd", m.bit_not, "vector", length=128,
        dtypes="u8")
    row("ext.16b", "ext <Vd>.16b, <Vn>.16b, <Vm>.16b, <#i>", "01101110000 mmmmm 0 iiii 0 nnnnn ddddd", m.extracted,
        "vector", length=128, dtypes="u8")
    for q, length, source, made in (("0", 64, "8b", "2s"), ("1", 128, "16b", "4s")):
        for name, u, dtype in (("sdot", 0, "i8"), ("udot", 1, "u8")):
            row(f"{name}.{made}", f"{name} <Vd+>.{made}, <Vn>.{source}, <Vm>.{source}",
                f"0{q}{u}01110 100 mmmmm 100101 nnnnn ddddd", m.dot_of_four, "dot", length=length, dtypes=dtype,
                features=frozenset({"dotprod"}))
            row(f"{name}.element.{made}", f"{name} <Vd+>.{made}, <Vn>.{source}, <Em>.4b[<:e>]",
                f"0{q}{u}01111 10e mmmmm 1110 e 0 nnnnn ddddd", m.dot_by_element, "dot", length=length, dtypes=dtype,
                features=frozenset({"dotprod"}))
    _narrow_products()
    # From the lower half of a register, and to it.
    for source, made, code, taken, wide in (("8b", "8h", "00", 8, 16), ("4h", "4s", "01", 16, 32),
                                            ("2s", "2d", "10", 32, 64)):
        for name, u, letter in (("sxtl", 0, "i"), ("uxtl", 1, "u")):
            row(f"{name}.{made}", f"{name} <Vd>.{made}, <Vn>.{source}", f"00{u}011110 {taken:07b} 101001 nnnnn ddddd",
                m.widened(f"{letter}{wide}"), "vector shift", length=128, dtypes=f"{letter}{taken}")
        row(f"xtn.{source}", f"xtn <Vd>.{source}, <Vn>.{made}",
            f"00001110 {code} 10000 10010 10 nnnnn ddddd", m.narrowed(f"u{taken}"), "vector", length=128,
            dtypes=f"u{wide}")
    row("shll.4s", "shll <Vd>.4s, <Vn>.4h, #16", "00101110 01 10000 10011 10 nnnnn ddddd", m.shifted_wide,
        "vector shift", length=128, dtypes="u16")
    row("shrn.4h", "shrn <Vd>.4h, <Vn>.4s, <#32-i>", "000011110 iiiiiii 100001 nnnnn ddddd", m.shifted_narrow,
        "vector shift", length=128, dtypes="u32")


def _narrow_products() -> None:
    """Of bytes of two signs and of bf16, and matrices of 2 x 8 bytes or 2 x 4 bf16 (FEAT_I8MM, FEAT_BF16)."""
    bytes_, floats = {"features": frozenset({"i8mm"})}, {"features": frozenset({"bf16"})}
    for q, length, source, made in (("0", 64, "8b", "2s"), ("1", 128, "16b", "4s")):
        row(f"usdot.{made}", f"usdot <Vd+>.{made}, <Vn>.{source}, <Vm>.{source}",
            f"0{q}001110 100 mmmmm 100111 nnnnn ddddd", m.dot_of_signs("u1", "i1"), "dot", length=length, dtypes="u8",
            **bytes_)
        for name, us, first, second in (("usdot", 1, "u1", "i1"), ("sudot", 0, "i1", "u1")):
            row(f"{name}.element.{made}", f"{name} <Vd+>.{made}, <Vn>.{source}, <Em>.4b[<:e>]",
                f"0{q}001111 {us}0e mmmmm 1111 e 0 nnnnn ddddd", m.dot_of_signs(first, second), "dot", length=length,
                dtypes="u8", **bytes_)
        source = f"{length // 16}h"
        row(f"bfdot.{made}", f"bfdot <Vd+>.{made}, <Vn>.{source}, <Vm>.{source}",
            f"0{q}101110 010 mmmmm 111111 nnnnn ddddd", m.dot_of_bfloat16, "bf16 dot", length=length, dtypes="u16",
            **floats)
        row(f"bfdot.element.{made}", f"bfdot <Vd+>.{made}, <Vn>.{source}, <Em>.2h[<:e>]",
            f"0{q}001111 01e mmmmm 1111 e 0 nnnnn ddddd", m.dot_of_bfloat16, "bf16 dot", length=length, dtypes="u16",
            **floats)
    for name, u, b, first, second in (("smmla", 0, 0, "i1", "i1"), ("ummla", 1, 0, "u1", "u1"),
                                      ("usmmla", 0, 1, "u1", "i1")):
        row(f"{name}.4s", f"{name} <Vd+>.4s, <Vn>.16b, <Vm>.16b", f"01{u}01110 100 mmmmm 1010{b}1 nnnnn ddddd",
            m.matrices_of_bytes(first, second), "dot", length=128, dtypes="u8", **bytes_)
    row("bfmmla.4s", "bfmmla <Vd+>.4s, <Vn>.8h, <Vm>.8h", "01101110 010 mmmmm 111011 nnnnn ddddd",
        m.matrices_of_bfloat16, "bf16 matrices", length=128, dtypes="u16", **floats)
    row("bfcvtn.4h", "bfcvtn <Vd>.4h, <Vn>.4s", "00001110101 00001 011010 nnnnn ddddd", m.as_bfloat16, "bf16 convert",
        length=128, dtypes="f32", **floats)
    row("bfcvtn2.8h", "bfcvtn2 <Vd+>.8h, <Vn>.4s", "01001110101 00001 011010 nnnnn ddddd", m.upper_as_bfloat16,
        "bf16 convert", length=128, dtypes="f32", **floats)
    row("bfcvt.h", "bfcvt <Hd>, <Sn>", "0001111001100011010000 nnnnn ddddd",
        lambda a: m.as_bfloat16(a.view("f4")), "convert", dtypes="u8", **floats)


def _lanes() -> None:
    meaning: Meaning
    for q, length, size, kinds in (("0", 64, "00", "8b"), ("1", 128, "00", "16b"), ("0", 64, "01", "4h"),
                                   ("1", 128, "01", "8h")):
        for name, opcode, meaning in (("zip1", "0011", m.zip_low), ("zip2", "0111", m.zip_high)):
            row(f"{name}.{kinds}", f"{name} {_THREE.replace('T', kinds)}",
                f"0{q}001110 {size}0 mmmmm {opcode}10 nnnnn ddddd", meaning, "vector", length=length,
                dtypes="u8" if kinds[-1] == "b" else "u16")
    for arrangement in ("2s", "4s", "2d"):
        q, _, length, bits = ARRANGEMENTS[arrangement]
        size = _SIZES[arrangement]
        for name, opcode, meaning in (("zip1", "0011", m.zip_low), ("zip2", "0111", m.zip_high),
                                      ("uzp1", "0001", m.even), ("uzp2", "0101", m.odd),
                                      ("trn1", "0010", m.even_pairs), ("trn2", "0110", m.odd_pairs)):
            _elements(name, _THREE, f"0q001110 {size}0 mmmmm {opcode}10 nnnnn ddddd", meaning, "vector", "i",
                      (arrangement,))
        letter, general = ("d", "X") if bits == 64 else ("s", "W")
        place = "i1000" if bits == 64 else "ii100"
        if bits == 32:
            _elements("rev64", _TWO, f"0q001110 {size} 10000 00000 10 nnnnn ddddd", m.swapped, "vector", "i",
                      (arrangement,))
        row(f"dup.{arrangement}", f"dup <Vd>.{arrangement}, <{general}n>",
            f"0{q}001110000 {place.replace('i', '0')} 000011 nnnnn ddddd", m.spread(length, bits), "to vector",
            length=length, dtypes=f"u{bits}")
        row(f"dup.element.{arrangement}", f"dup <Vd>.{arrangement}, <En>.{letter}[<:i>]",
            f"0{q}001110000 {place} 000001 nnnnn ddddd", m.spread_element(length), "vector", length=length,
            dtypes=f"u{bits}")
    # One element.
    for letter, bits, place, source in (("b", 8, "iiii1", "jjjj"), ("h", 16, "iii10", "jjj0"),
                                        ("s", 32, "ii100", "jj00"), ("d", 64, "i1000", "j000")):
        row(f"ins.{letter}", f"mov <Vd+>.{letter}[<:i>], <Vn>.{letter}[<:j>]",
            f"01101110000 {place} 0{source}1 nnnnn ddddd", m.insert_element, "vector", length=128, dtypes=f"u{bits}")
        row(f"mov.element.{letter}", f"mov <{letter.upper()}d>, <Vn>.{letter}[<:i>]",
            f"01011110000 {place} 000001 nnnnn ddddd", m.element, "vector", length=128, dtypes=f"u{bits}")
    for general, letter, place, q in (("W", "s", "ii100", "0"), ("X", "d", "i1000", "1")):
        bits = 32 if letter == "s" else 64
        row(f"umov.{letter}", f"mov <{general}d>, <Vn>.{letter}[<:i>]", f"0{q}001110000 {place} 001111 nnnnn ddddd",
            m.element_number(False), "from vector", length=128, dtypes=f"u{bits}")
        row(f"ins.general.{letter}", f"mov <Vd+>.{letter}[<:i>], <{general}n>",
            f"01001110000 {place} 000111 nnnnn ddddd", m.insert_number, "to vector", length=128, dtypes=f"u{bits}")
    row("smov.s", "smov <Xd>, <Vn>.s[<:i>]", "01001110000 ii100 001011 nnnnn ddddd", m.element_number(True),
        "from vector", length=128, dtypes="u32")
    row("fmov.from_s", "fmov <Wd>, <Sn>", "0001111000100110000000 nnnnn ddddd", m.vector_to_number, "from vector",
        dtypes="u8")
    # All elements of a mask: of four at once, of two as a pair.
    for name, bit, meaning in (("umaxv", "0", m.largest), ("uminv", "1", m.smallest)):
        row(f"{name}.4s", f"{name} <Sd>, <Vn>.4s", f"01101110 10 11000 {bit}1010 10 nnnnn ddddd", meaning, "across",
            length=128, dtypes="u32")
    for name, opcode, meaning in (("umaxp", "101001", m.larger_pairs), ("uminp", "101011", m.smaller_pairs)):
        row(f"{name}.2s", f"{name} {_THREE.replace('T', '2s')}", f"00101110101 mmmmm {opcode} nnnnn ddddd", meaning,
            "vector", length=64, dtypes="u32")
    row("movi.zero", "movi <Vd>.2d, #0", "0110111100000000111001 00000 ddddd", m.repeated(0), "vector", length=128,
        dtypes="u8")
    row("movi.ones", "movi <Vd>.2d, #0xffffffffffffffff", "0110111100000111111001 11111 ddddd", m.repeated(0xFF),
        "vector", length=128, dtypes="u8")
    for shift, cmode in ((0, "0000"), (8, "0010"), (16, "0100"), (24, "0110")):
        row(f"movi.4s.{shift}", f"movi <Vd>.4s, <#i>, lsl #{shift}", f"0100111100000 iii {cmode} 01 iiiii ddddd",
            m.repeated_word(shift), "vector", length=128, dtypes="u32")


# --- Code by hand (translate.py) --------------------------------------------------------------------------------------

def _by_hand() -> None:
    row("udiv.64", "udiv <Xd>, <Xn>, <Xm>", "10011010110 mmmmm 000010 nnnnn ddddd", m.divide_unsigned, "div")
    row("smulh.64", "smulh <Xd>, <Xn>, <Xm>", "10011011010 mmmmm 011111 nnnnn ddddd", m.multiply_high, "mul")
    # Calls leave the return address in x30; what stands elsewhere in the file is reached by its distance.
    link: dict[str, Any] = {"side_effects": True, "implicit_writes": (("gpr", LINK),)}
    row("bl", "bl <label>", "100101 llllllllllllllllllllllllll", None, "branch", **link)
    row("blr", "blr <Xn>", "1101011000111111000000 nnnnn 00000", None, "branch", **link)
    row("br", "br <Xn>", "1101011000011111000000 nnnnn 00000", None, "branch", control="return")
    row("udf", "udf #0", "00000000000000000000000000000000", None, "branch", control="trap")
    row("distance", ".long <label> - .", "l" * 32, None, "branch")
    # Other threads, and what the processor says of itself.
    row("dmb", "dmb ish", "11010101000000110011101110111111", None, "system", side_effects=True)
    for name, place in (("cntvct_el0", "011 1110 0000 010"), ("id_aa64isar0_el1", "000 0000 0110 000"),
                        ("id_aa64isar1_el1", "000 0000 0110 001")):
        row(f"mrs.{name}", f"mrs <Xt=>, {name}", f"1101010100111 {place} ttttt", None, "system", side_effects=True)
    atomic: dict[str, Any] = {"memory_bits": 32, "side_effects": True, "features": frozenset({"lse"})}
    row("swpal.32", "swpal <Wm>, <Wt=>, <mem+>", "plain: 10111000111 mmmmm 100000 nnnnn ttttt", m.swapped_with(32),
        "atomic", **atomic)
    row("casal.32", "casal <Wm+>, <Wt>, <mem+>", "plain: 10001000111 mmmmm 111111 nnnnn ttttt", m.swapped_if_same(32),
        "atomic", **atomic)


_arithmetic()
_control()
_memory()
_floats()
_integer_rows()
_lanes()
_by_hand()
