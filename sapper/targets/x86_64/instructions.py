"""The instruction table of x86-64: one row for each instruction form.

Leaves: `ROWS`, name -> `Row`. What the strings mean is said at the head of rows.py; docs/add-an-instruction.md shows
how to add one. Families below make the 128/256/512 or 32/64-bit forms of one line.
Holds: names are stable; a row's encodings are in the order in which GNU as prefers them.
Source: Intel 64 and IA-32 Architectures SDM, volume 2 (encodings, operation), AMD64 APM volume 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import meaning as m
from .rows import Encoding, Operand, Row

__all__ = ["CONDITION_CODES", "ROWS", "Encoding", "Operand", "Row"]

ROWS: dict[str, Row] = {}

Meaning = Callable[..., Any]
FLAGS = "oszapc"


def row(name: str, operands: str, encodings: str, meaning: Meaning | None, **more: Any) -> None:
    """One row; the mnemonic is the name up to its first dot."""
    ROWS[name] = Row(name, name.partition(".")[0], operands, encodings, meaning, **more)


def wide(mnemonic: str, operands: str, encodings: str, meaning: Meaning | None, dtype: str,
         lengths: tuple[int, ...] = (128, 256, 512), masking: str = "kz", **more: Any) -> None:
    """A row for each vector length. Rows without an EVEX encoding have no masking."""
    if "EVEX" not in encodings:
        lengths = tuple(n for n in lengths if n < 512)
        masking = ""
    for length in lengths:
        name = f"{mnemonic}.{length}"
        ROWS[name] = Row(name, mnemonic, operands, encodings, meaning, length, dtype, masking, **more)


def sized(mnemonic: str, operands: str, encodings: str, meaning: Callable[[int], Meaning] | None,
          sizes: tuple[int, ...] = (32, 64), **more: Any) -> None:
    """A row for each general-register size. `{n}` in the operands is the size, `{w}` in the encodings the prefix of
    64-bit operands; `meaning(size)` gives the meaning."""
    for size in sizes:
        name = f"{mnemonic}.{size}"
        prefix = {64: "REX.W + ", 16: "66 "}.get(size, "")
        ROWS[name] = Row(name, mnemonic, operands.replace("{n}", str(size)).replace("{i}", str(min(size, 32))),
                         encodings.replace("{w}", prefix).replace("{W}", "W1" if size == 64 else "W0"),
                         meaning(size) if meaning else None, **more)


# --- General registers ---------------------------------------------------------------------------------------------

CONDITION_CODES: dict[str, int] = {
    "o": 0, "no": 1, "b": 2, "ae": 3, "e": 4, "ne": 5, "be": 6, "a": 7, "s": 8, "ns": 9, "p": 10, "np": 11, "l": 12,
    "ge": 13, "le": 14, "g": 15,
}
"""Suffixes of jcc, setcc and cmovcc, one name for each condition, and their number in the opcode."""
_CONDITION_FLAGS = ("o", "o", "c", "c", "z", "z", "cz", "cz", "s", "s", "p", "p", "so", "so", "zso", "zso")


def _general() -> None:
    alu = (("add", m.add), ("or", m.bit_or), ("adc", m.adc), ("sbb", m.sbb), ("and", m.bit_and), ("sub", m.sub),
           ("xor", m.bit_xor), ("cmp", m.cmp))
    for number, (mnemonic, meaning) in enumerate(alu):
        base = 8 * number
        sized(mnemonic, f"{'r' if mnemonic == 'cmp' else 'rw'}:r{{n}}/m{{n}}/ r:r{{n}}/m{{n}}/i{{i}}".replace("/ ", " "),
              f"base MI {{w}}83 /{number} ib | base AI {{w}}{base + 5:02X} id | base MI {{w}}81 /{number} id | "
              f"base MR {{w}}{base + 1:02X} /r | base Rm {{w}}{base + 3:02X} /r", meaning,
              flags_written=FLAGS, flags_read="c" if mnemonic in ("adc", "sbb") else "")
    for size in (8, 16):
        w = "66 " if size == 16 else ""
        low = size == 8
        row(f"cmp.{size}", f"r:r{size}/m{size} r:r{size}/m{size}/i{size}",
            (f"base AI 3C ib | base MI 80 /7 ib | base MR 38 /r | base Rm 3A /r" if low else
             f"base MI 66 83 /7 ib | base AI 66 3D iw | base MI 66 81 /7 iw | base MR 66 39 /r | base Rm 66 3B /r"),
            m.cmp(size), flags_written=FLAGS)
        row(f"test.{size}", f"r:r{size}/m{size} r:r{size}/i{size}",
            ("base AI A8 ib | base MI F6 /0 ib | base MR 84 /r" if low else
             "base AI 66 A9 iw | base MI 66 F7 /0 iw | base MR 66 85 /r"), m.test(size), flags_written=FLAGS)
        row(f"mov.{size}", f"w:r{size}/m{size} r:r{size}/m{size}/i{size}",
            ("base MR 88 /r | base Rm 8A /r | base OI B0+rd ib | base mI C6 /0 ib" if low else
             "base MR 66 89 /r | base Rm 66 8B /r | base OI 66 B8+rd iw | base mI 66 C7 /0 iw"), m.copy, )
        del w
    row("mov.32", "w:r32/m32 r:r32/m32/i32",
        "base MR 89 /r | base Rm 8B /r | base OI B8+rd id | base mI C7 /0 id", m.copy)
    row("mov.64", "w:r64/m64 r:r64/m64/i64",
        "base MR REX.W + 89 /r | base Rm REX.W + 8B /r | base MI REX.W + C7 /0 id | base OI REX.W + B8+rd io", m.copy)
    sized("lea", "w:r{n} a:m{n}", "base Rm {w}8D /r", lambda n: lambda address: address & ((1 << n) - 1))
    sized("imul", "rw:r{n} r:r{n}/m{n}", "base RM {w}0F AF /r", m.imul, flags_written=FLAGS)
    for size in (32, 64):
        w = "REX.W + " if size == 64 else ""
        row(f"imul.imm.{size}", f"w:r{size} r:r{size}/m{size} r:i32",
            f"base RMI {w}6B /r ib | base RMI {w}69 /r id", m.imul(size), flags_written=FLAGS)
    sized("test", "r:r{n}/m{n} r:r{n}/i{i}", "base AI {w}A9 id | base MI {w}F7 /0 id | base MR {w}85 /r", m.test,
          flags_written=FLAGS)
    for name, code in CONDITION_CODES.items():
        flags = _CONDITION_FLAGS[code]
        holds = m.condition(code)
        row(f"j{name}", "r:rel", f"base D {0x70 + code:X} cb | base D 0F {0x80 + code:X} cd", holds,
            flags_read=flags, control="branch")
        row(f"set{name}", "w:r8/m8", f"base M 0F {0x90 + code:X} /0", m.set_condition(holds), flags_read=flags)
        sized(f"cmov{name}", "rw:r{n} r:r{n}/m{n}", f"base RM {{w}}0F {0x40 + code:X} /r",
              lambda n, holds=holds: m.conditional_move(holds), flags_read=flags)  # type: ignore[misc]
    row("jmp", "r:rel", "base D EB cb | base D E9 cd", None, control="jump")
    row("jmp.indirect", "r:r64/m64", "base M FF /4", None, control="jump")
    row("call", "r:r64/m64", "base M FF /2", None, control="call", side_effects=True)
    row("call.label", "r:rel", "base D E8 cd", None, control="call", side_effects=True)
    row("ret", "", "base - C3".replace("- ", "- "), None, control="return")
    row("push", "r:r64", "base O 50+rd", None, side_effects=True, implicit_reads=(("gpr", 4),),
        implicit_writes=(("gpr", 4),))
    row("pop", "w:r64", "base O 58+rd", None, side_effects=True, implicit_reads=(("gpr", 4),),
        implicit_writes=(("gpr", 4),))
    row("vzeroupper", "", "avx - VEX.128.0F.WIG 77", None, side_effects=True)
    row("syscall", "", "base - 0F 05", None, side_effects=True, flags_written=FLAGS,
        implicit_reads=tuple(("gpr", n) for n in (0, 7, 6, 2, 10, 8, 9)),
        implicit_writes=(("gpr", 0), ("gpr", 1), ("gpr", 11)))


# --- Floating point ------------------------------------------------------------------------------------------------

_FLOAT_KINDS = (("ps", "", "W0", "f32", 32), ("pd", "66.", "W1", "f64", 64))
_SCALAR_KINDS = (("ss", "F3.", "W0", "f32", 32), ("sd", "F2.", "W1", "f64", 64))


def _moves() -> None:
    for mnemonic, prefix, load, store, w, dtype in (
            ("vmovups", "", "10", "11", "W0", "u32"), ("vmovupd", "66.", "10", "11", "W1", "u64"),
            ("vmovaps", "", "28", "29", "W0", "u32"), ("vmovapd", "66.", "28", "29", "W1", "u64")):
        wide(mnemonic, "w:v/m r:v/m",
             f"avx RM VEX.L.{prefix}0F.WIG {load} /r | avx MR VEX.L.{prefix}0F.WIG {store} /r | "
             f"avx512f RM EVEX.L.{prefix}0F.{w} {load} /r | avx512f mR EVEX.L.{prefix}0F.{w} {store} /r", m.copy, dtype)
    wide("vbroadcastss", "w:v r:x/m32", "avx2 RM VEX.L.66.0F38.W0 18 /r | avx512f RM EVEX.L.66.0F38.W0 18 /r",
         m.broadcast, "u32")
    wide("vbroadcastsd", "w:v r:x/m64", "avx2 RM VEX.L.66.0F38.W0 19 /r | avx512f RM EVEX.L.66.0F38.W1 19 /r",
         m.broadcast, "u64", lengths=(256, 512))


def _arithmetic() -> None:
    for mnemonic, opcode, meaning in (("vadd", "58", m.float_add), ("vmul", "59", m.float_multiply),
                                      ("vsub", "5C", m.float_subtract), ("vmin", "5D", m.float_minimum),
                                      ("vdiv", "5E", m.float_divide), ("vmax", "5F", m.float_maximum)):
        for suffix, prefix, w, dtype, bits in _FLOAT_KINDS:
            wide(mnemonic + suffix, f"w:v r:v r:v/m/b{bits}",
                 f"avx RVM VEX.L.{prefix}0F.WIG {opcode} /r | avx512f RVM EVEX.L.{prefix}0F.{w} {opcode} /r",
                 meaning, dtype)
        for suffix, prefix, w, dtype, bits in _SCALAR_KINDS:
            row(mnemonic + suffix, f"w:x r:x r:x/m{bits}",
                f"avx RVM VEX.LIG.{prefix}0F.WIG {opcode} /r | avx512f RVM EVEX.LIG.{prefix}0F.{w} {opcode} /r",
                m.scalar(meaning), dtype=dtype, length=128, masking="kz")
    for sign, base, meaning in (("vfmadd", 0x98, m.fma()), ("vfmsub", 0x9A, m.fma(negate_c=True)),
                                ("vfnmadd", 0x9C, m.fma(negate_ab=True)),
                                ("vfnmsub", 0x9E, m.fma(negate_ab=True, negate_c=True))):
        for order, offset in (("132", 0), ("213", 0x10), ("231", 0x20)):
            ordered = m.fma_order(meaning, order)
            for suffix, w, dtype, bits in (("ps", "W0", "f32", 32), ("pd", "W1", "f64", 64)):
                opcode = f"{base + offset:X}"
                wide(f"{sign}{order}{suffix}", f"rw:v r:v r:v/m/b{bits}",
                     f"fma RVM VEX.L.66.0F38.{w} {opcode} /r | avx512f RVM EVEX.L.66.0F38.{w} {opcode} /r",
                     ordered, dtype)
                opcode = f"{base + offset + 1:X}"
                row(f"{sign}{order}{'ss' if bits == 32 else 'sd'}", f"rw:x r:x r:x/m{bits}",
                    f"fma RVM VEX.LIG.66.0F38.{w} {opcode} /r | avx512f RVM EVEX.LIG.66.0F38.{w} {opcode} /r",
                    m.scalar(ordered), dtype=dtype, length=128, masking="kz")


_general()
_moves()
_arithmetic()
