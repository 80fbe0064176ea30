"""The instruction table of x86-64: one row for each instruction form.

Leaves: `ROWS`, name -> `Row`. What the strings mean is said at the head of rows.py; docs/add-an-instruction.md shows
how to add one. Families below make the 128/256/512 or 32/64-bit forms of one line.
Holds: names are stable; a row's encodings are in the order in which GNU as prefers them.
Source: Intel 64 and IA-32 Architectures SDM, volume 2 (encodings, operation), AMD64 APM volume 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import meaning_floats as fp
from . import meaning_general as g
from . import meaning_lanes as v
from . import tiles
from .rows import Encoding, Operand, Row

__all__ = ["CONDITION_CODES", "ROWS", "Encoding", "Operand", "Row"]

ROWS: dict[str, Row] = {}

Meaning = Callable[..., Any]
FLAGS = "oszapc"


def _add(made: Row) -> None:
    if made.name in ROWS:
        raise ValueError(f"row {made.name}: found two; expected one, or a word behind the mnemonic")
    ROWS[made.name] = made


def row(name: str, operands: str, encodings: str, meaning: Meaning | None, **more: Any) -> None:
    """One row; the mnemonic is the name up to its first dot unless it is given."""
    mnemonic = more.pop("mnemonic", None) or name.partition(".")[0]
    _add(Row(name, mnemonic, operands, encodings, meaning, **more))


def wide(family: str, operands: str, encodings: str, meaning: Meaning, dtype: str,
         lengths: tuple[int, ...] = (128, 256, 512), masking: str = "kz", by_length: bool = False, **more: Any) -> None:
    """A row for each vector length, named `family.length`. Rows without an EVEX encoding have no masking.
    by_length: `meaning(length)` gives the meaning."""
    if "EVEX" not in encodings:
        lengths = tuple(n for n in lengths if n < 512)
        masking = ""
    mnemonic = more.pop("mnemonic", None) or family.partition(".")[0]
    for length in lengths:
        name = f"{family}.{length}"
        _add(Row(name, mnemonic, operands, encodings, meaning(length) if by_length else meaning, length, dtype, masking,
                 **more))


def sized(family: str, operands: str, encodings: str, meaning: Callable[[int], Meaning] | None,
          sizes: tuple[int, ...] = (32, 64), **more: Any) -> None:
    """A row for each general-register size, named `family.size`.

    `{n}` in the operands is the size, `{i}` that of an immediate; `{w}` in the encodings is the prefix of 64-bit
    operands, `{W}` the W bit of a VEX prefix; `meaning(size)` gives the meaning."""
    mnemonic = family.partition(".")[0]
    for size in sizes:
        name = f"{family}.{size}"
        prefix = {64: "REX.W + ", 16: "66 "}.get(size, "")
        _add(Row(name, mnemonic, operands.replace("{n}", str(size)).replace("{i}", str(min(size, 32))),
                 encodings.replace("{w}", prefix).replace("{W}", "W1" if size == 64 else "W0"),
                 meaning(size) if meaning else None, **more))


# --- General registers ---------------------------------------------------------------------------------------------

CONDITION_CODES: dict[str, int] = {
    "o": 0, "no": 1, "b": 2, "ae": 3, "e": 4, "ne": 5, "be": 6, "a": 7, "s": 8, "ns": 9, "p": 10, "np": 11, "l": 12,
    "ge": 13, "le": 14, "g": 15,
}
"""Suffixes of jcc, setcc and cmovcc, one name for each condition, and their number in the opcode."""
_CONDITION_FLAGS = ("o", "o", "c", "c", "z", "z", "cz", "cz", "s", "s", "p", "p", "so", "so", "zso", "zso")
_RAX, _RCX, _RDX, _RSP = ("gpr", 0), ("gpr", 1), ("gpr", 2), ("gpr", 4)


def _integer_arithmetic() -> None:
    for number, (mnemonic, meaning) in enumerate((
            ("add", g.add), ("or", g.bit_or), ("adc", g.adc), ("sbb", g.sbb), ("and", g.bit_and), ("sub", g.sub),
            ("xor", g.bit_xor), ("cmp", g.cmp))):
        base = 8 * number
        role = "r" if mnemonic == "cmp" else "rw"
        sized(mnemonic, f"{role}:r{{n}}/m{{n}} r:r{{n}}/m{{n}}/i{{i}}",
              f"base MI {{w}}83 /{number} ib | base AI {{w}}{base + 5:02X} id | base MI {{w}}81 /{number} id | "
              f"base MR {{w}}{base + 1:02X} /r | base Rm {{w}}{base + 3:02X} /r", meaning,
              flags_written=FLAGS, flags_read="c" if mnemonic in ("adc", "sbb") else "")
        if mnemonic in ("add", "or", "and", "sub", "xor"):
            for size in (32, 64):
                w = "REX.W + " if size == 64 else ""
                row(f"lock.{mnemonic}.{size}", f"rw:m{size} r:r{size}/i32",
                    f"base mI LOCK {w}83 /{number} ib | base mI LOCK {w}81 /{number} id | "
                    f"base mR LOCK {w}{base + 1:02X} /r", meaning(size), mnemonic=f"lock {mnemonic}",
                    flags_written=FLAGS, side_effects=True)
    row("cmp.8", "r:r8/m8 r:r8/m8/i8", "base AI 3C ib | base MI 80 /7 ib | base MR 38 /r | base Rm 3A /r", g.cmp(8),
        flags_written=FLAGS)
    row("cmp.16", "r:r16/m16 r:r16/m16/i16", "base MI 66 83 /7 ib | base AI 66 3D iw | base MI 66 81 /7 iw | "
        "base MR 66 39 /r | base Rm 66 3B /r", g.cmp(16), flags_written=FLAGS)
    row("test.8", "r:r8/m8 r:r8/i8", "base AI A8 ib | base MI F6 /0 ib | base MR 84 /r", g.test(8), flags_written=FLAGS)
    row("test.16", "r:r16/m16 r:r16/i16", "base AI 66 A9 iw | base MI 66 F7 /0 iw | base MR 66 85 /r", g.test(16),
        flags_written=FLAGS)
    sized("test", "r:r{n}/m{n} r:r{n}/i{i}", "base AI {w}A9 id | base MI {w}F7 /0 id | base MR {w}85 /r", g.test,
          flags_written=FLAGS)
    sized("imul", "rw:r{n} r:r{n}/m{n}", "base RM {w}0F AF /r", g.imul, flags_written=FLAGS)
    sized("imul.imm", "w:r{n} r:r{n}/m{n} r:i32", "base RMI {w}6B /r ib | base RMI {w}69 /r id", g.imul,
          flags_written=FLAGS)
    for mnemonic, digit, wide_meaning in (("mul", 4, g.multiply_wide(False)), ("imul", 5, g.multiply_wide(True)),
                                          ("div", 6, g.divide(False)), ("idiv", 7, g.divide(True))):
        reads = (_RAX,) if "mul" in mnemonic else (_RAX, _RDX)
        sized(mnemonic + ".wide" if mnemonic == "imul" else mnemonic, "r:r{n}/m{n}", f"base M {{w}}F7 /{digit}",
              wide_meaning, flags_written=FLAGS, implicit_reads=reads, implicit_writes=(_RAX, _RDX))
    row("cdq", "", "base - 99", g.sign_fill(32), implicit_reads=(_RAX,), implicit_writes=(_RDX,))
    row("cqo", "", "base - REX.W + 99", g.sign_fill(64), implicit_reads=(_RAX,), implicit_writes=(_RDX,))
    sized("not", "rw:r{n}/m{n}", "base M {w}F7 /2", g.invert)
    sized("neg", "rw:r{n}/m{n}", "base M {w}F7 /3", g.negate, flags_written=FLAGS)
    for mnemonic, digit, step in (("inc", 0, 1), ("dec", 1, -1)):
        sized(mnemonic, "rw:r{n}/m{n}", f"base M {{w}}FF /{digit}", g.increment(step), flags_written="oszap")
        for size in (32, 64):
            row(f"lock.{mnemonic}.{size}", f"rw:m{size}", f"base m LOCK {'REX.W + ' if size == 64 else ''}FF /{digit}",
                g.increment(step)(size), mnemonic=f"lock {mnemonic}", flags_written="oszap", side_effects=True)
    for mnemonic, digit in (("rol", 0), ("ror", 1), ("shl", 4), ("shr", 5), ("sar", 7)):
        written = "oc" if digit < 2 else FLAGS
        sized(f"{mnemonic}.imm", "rw:r{n}/m{n} r:i8", f"base M1 {{w}}D1 /{digit} | base MI {{w}}C1 /{digit} ib",
              g.shift_general(mnemonic), flags_written=written)
        sized(f"{mnemonic}.cl", "rw:r{n}/m{n} r:cl", f"base MC {{w}}D3 /{digit}", g.shift_general(mnemonic),
              flags_written=written)
    for mnemonic, prefix, kind in (("shlx", "66", "shl"), ("shrx", "F2", "shr"), ("sarx", "F3", "sar")):
        sized(mnemonic, "w:r{n} r:r{n}/m{n} r:r{n}", f"bmi2 RMV VEX.LZ.{prefix}.0F38.{{W}} F7 /r",
              g.shift_without_flags(kind))
    sized("rorx", "w:r{n} r:r{n}/m{n} r:i8", "bmi2 RMI VEX.LZ.F2.0F3A.{W} F0 /r ib", g.shift_without_flags("ror"))
    sized("mulx", "w:r{n} w:r{n} r:r{n}/m{n}", "bmi2 RVM VEX.LZ.F2.0F38.{W} F6 /r", g.multiply_no_flags,
          implicit_reads=(_RDX,))
    sized("bzhi", "w:r{n} r:r{n}/m{n} r:r{n}", "bmi2 RMV VEX.LZ.0F38.{W} F5 /r", g.zero_high, flags_written=FLAGS)
    sized("pext", "w:r{n} r:r{n} r:r{n}/m{n}", "bmi2 RVM VEX.LZ.F3.0F38.{W} F5 /r", g.extract_bits)
    sized("pdep", "w:r{n} r:r{n} r:r{n}/m{n}", "bmi2 RVM VEX.LZ.F2.0F38.{W} F5 /r", g.deposit_bits)
    sized("andn", "w:r{n} r:r{n} r:r{n}/m{n}", "bmi1 RVM VEX.LZ.0F38.{W} F2 /r", g.and_not, flags_written=FLAGS)
    sized("blsr", "w:r{n} r:r{n}/m{n}", "bmi1 VM VEX.LZ.0F38.{W} F3 /1", g.reset_lowest, flags_written=FLAGS)
    sized("popcnt", "w:r{n} r:r{n}/m{n}", "popcnt RM F3 {w}0F B8 /r", g.count_bits, flags_written=FLAGS)
    sized("tzcnt", "w:r{n} r:r{n}/m{n}", "bmi1 RM F3 {w}0F BC /r", g.count_trailing, flags_written=FLAGS)
    sized("lzcnt", "w:r{n} r:r{n}/m{n}", "lzcnt RM F3 {w}0F BD /r", g.count_leading, flags_written=FLAGS)
    sized("bsf", "rw:r{n} r:r{n}/m{n}", "base RM {w}0F BC /r", g.scan(False), flags_written=FLAGS)
    sized("bsr", "rw:r{n} r:r{n}/m{n}", "base RM {w}0F BD /r", g.scan(True), flags_written=FLAGS)
    sized("bt", "r:r{n} r:r{n}/i8", "base MI {w}0F BA /4 ib | base MR {w}0F A3 /r", g.bit_test, flags_written="oszapc")
    sized("bswap", "rw:r{n}", "base O {w}0F C8+rd", g.swap_bytes)


def _integer_moves() -> None:
    row("mov.8", "w:r8/m8 r:r8/m8/i8", "base MR 88 /r | base Rm 8A /r | base OI B0+rd ib | base mI C6 /0 ib", g.copy)
    row("mov.16", "w:r16/m16 r:r16/m16/i16",
        "base MR 66 89 /r | base Rm 66 8B /r | base OI 66 B8+rd iw | base mI 66 C7 /0 iw", g.copy)
    row("mov.32", "w:r32/m32 r:r32/m32/i32",
        "base MR 89 /r | base Rm 8B /r | base OI B8+rd id | base mI C7 /0 id", g.copy)
    row("mov.64", "w:r64/m64 r:r64/m64/i64",
        "base MR REX.W + 89 /r | base Rm REX.W + 8B /r | base MI REX.W + C7 /0 id | base OI REX.W + B8+rd io", g.copy)
    for mnemonic, opcode, is_signed in (("movzx", 0xB6, False), ("movsx", 0xBE, True)):
        for source in (8, 16):
            sized(f"{mnemonic}.{source}", f"w:r{{n}} r:r{source}/m{source}",
                  f"base RM {{w}}0F {opcode + (source == 16):X} /r",
                  (lambda n, source=source: g.sign_extend(source, n)) if is_signed  # type: ignore[misc]
                  else (lambda n: g.copy))
    row("movsxd", "w:r64 r:r32/m32", "base RM REX.W + 63 /r", g.sign_extend(32, 64))
    sized("lea", "w:r{n} a:m{n}", "base Rm {w}8D /r", lambda n: lambda address: address & ((1 << n) - 1))
    sized("movnti", "w:m{n} r:r{n}", "base mR {w}0F C3 /r", lambda n: g.copy)
    sized("xchg", "rw:r{n}/m{n} rw:r{n}", "base AO {w}90+rd | base OA {w}90+rd | base MR {w}87 /r",
          lambda n: g.exchange)
    for lock in ("", "lock."):
        shape = "m{n}" if lock else "r{n}/m{n}"
        head = "LOCK " if lock else ""
        letter = "m" if lock else "M"
        for size in (32, 64):
            w = "REX.W + " if size == 64 else ""
            place = shape.replace("{n}", str(size))
            row(f"{lock}xadd.{size}", f"rw:{place} rw:r{size}", f"base {letter}R {head}{w}0F C1 /r",
                g.exchange_add(size), mnemonic=lock.replace(".", " ") + "xadd", flags_written=FLAGS,
                side_effects=bool(lock))
            row(f"{lock}cmpxchg.{size}", f"rw:{place} r:r{size}", f"base {letter}R {head}{w}0F B1 /r",
                g.compare_exchange(size), mnemonic=lock.replace(".", " ") + "cmpxchg", flags_written=FLAGS,
                side_effects=bool(lock), implicit_reads=(_RAX,), implicit_writes=(_RAX,))
    row("push", "r:r64", "base O 50+rd", None, side_effects=True, implicit_reads=(_RSP,), implicit_writes=(_RSP,))
    row("pop", "w:r64", "base O 58+rd", None, side_effects=True, implicit_reads=(_RSP,), implicit_writes=(_RSP,))
    row("pushfq", "", "base - 9C", None, side_effects=True, flags_read=FLAGS, implicit_reads=(_RSP,),
        implicit_writes=(_RSP,))
    row("popfq", "", "base - 9D", None, side_effects=True, flags_written=FLAGS, implicit_reads=(_RSP,),
        implicit_writes=(_RSP,))


def _control() -> None:
    for name, code in CONDITION_CODES.items():
        flags = _CONDITION_FLAGS[code]
        holds = g.condition(code)
        row(f"j{name}", "r:rel", f"base D {0x70 + code:X} cb | base D 0F {0x80 + code:X} cd", holds,
            flags_read=flags, control="branch")
        row(f"set{name}", "w:r8/m8", f"base M 0F {0x90 + code:X} /0", g.set_condition(holds), flags_read=flags)
        sized(f"cmov{name}", "rw:r{n} r:r{n}/m{n}", f"base RM {{w}}0F {0x40 + code:X} /r",
              lambda n, holds=holds: g.conditional_move(holds), flags_read=flags)  # type: ignore[misc]
    row("jmp", "r:rel", "base D EB cb | base D E9 cd", None, control="jump")
    row("jmp.indirect", "r:r64/m64", "base M FF /4", None, control="jump")
    row("call", "r:rel", "base D E8 cd", None, control="call", side_effects=True)
    row("call.indirect", "r:r64/m64", "base M FF /2", None, control="call", side_effects=True)
    row("ret", "", "base - C3", None, control="return")
    row("int3", "", "base - CC", None, control="trap", side_effects=True)
    row("ud2", "", "base - 0F 0B", None, control="trap", side_effects=True)


def _system() -> None:
    for name, code in (("nop", "90"), ("pause", "F3 90"), ("mfence", "0F AE F0"), ("lfence", "0F AE E8"),
                       ("sfence", "0F AE F8"), ("endbr64", "F3 0F 1E FA")):
        row(name, "", f"base - {code}", None, side_effects=True)
    row("nop.memory", "a:m32", "base m 0F 1F /0", None, side_effects=True)
    row("vzeroupper", "", "avx - VEX.128.0F.WIG 77", None, side_effects=True)
    row("vldmxcsr", "r:m32", "avx m VEX.LZ.0F.WIG AE /2", None, side_effects=True)
    row("vstmxcsr", "w:m32", "avx m VEX.LZ.0F.WIG AE /3", None, side_effects=True)
    row("cpuid", "", "base - 0F A2", None, side_effects=True, implicit_reads=(_RAX, _RCX),
        implicit_writes=(_RAX, ("gpr", 3), _RCX, _RDX))
    row("xgetbv", "", "xsave - 0F 01 D0", None, side_effects=True, implicit_reads=(_RCX,), implicit_writes=(_RAX, _RDX))
    row("rdtsc", "", "base - 0F 31", None, side_effects=True, implicit_writes=(_RAX, _RDX))
    row("rdtscp", "", "rdtscp - 0F 01 F9", None, side_effects=True, implicit_writes=(_RAX, _RDX, _RCX))
    row("syscall", "", "base - 0F 05", None, side_effects=True, flags_written=FLAGS,
        implicit_reads=tuple(("gpr", n) for n in (0, 7, 6, 2, 10, 8, 9)), implicit_writes=(_RAX, _RCX, ("gpr", 11)))
    for hint, digit in (("nta", 0), ("t0", 1), ("t1", 2), ("t2", 3)):
        row(f"prefetch{hint}", "a:m8", f"base m 0F 18 /{digit}", None, side_effects=True)
    row("prefetchw", "a:m8", "prfchw m 0F 0D /1", None, side_effects=True)
    row("clflushopt", "a:m8", "clflushopt m 66 0F AE /7", None, side_effects=True)


# --- Vectors: moves -------------------------------------------------------------------------------------------------

_FLOAT_KINDS = (("ps", "", "W0", "f32", 32), ("pd", "66.", "W1", "f64", 64))
_SCALAR_KINDS = (("ss", "F3.", "W0", "f32", 32), ("sd", "F2.", "W1", "f64", 64))
_LETTER_BITS = (("b", 8), ("w", 16), ("d", 32), ("q", 64))


def _moves() -> None:
    for mnemonic, prefix, load, store, w, dtype in (
            ("vmovups", "", "10", "11", "W0", "u32"), ("vmovupd", "66.", "10", "11", "W1", "u64"),
            ("vmovaps", "", "28", "29", "W0", "u32"), ("vmovapd", "66.", "28", "29", "W1", "u64")):
        wide(mnemonic, "w:v/m r:v/m",
             f"avx RM VEX.L.{prefix}0F.WIG {load} /r | avx MR VEX.L.{prefix}0F.WIG {store} /r | "
             f"avx512f RM EVEX.L.{prefix}0F.{w} {load} /r | avx512f mR EVEX.L.{prefix}0F.{w} {store} /r", g.copy, dtype)
    for mnemonic, prefix in (("vmovdqu", "F3."), ("vmovdqa", "66.")):
        wide(mnemonic, "w:v/m r:v/m", f"avx RM VEX.L.{prefix}0F.WIG 6F /r | avx MR VEX.L.{prefix}0F.WIG 7F /r", g.copy,
             "u8")
    for mnemonic, prefix, w, dtype, feature in (
            ("vmovdqu8", "F2.", "W0", "u8", "avx512bw"), ("vmovdqu16", "F2.", "W1", "u16", "avx512bw"),
            ("vmovdqu32", "F3.", "W0", "u32", "avx512f"), ("vmovdqu64", "F3.", "W1", "u64", "avx512f"),
            ("vmovdqa32", "66.", "W0", "u32", "avx512f"), ("vmovdqa64", "66.", "W1", "u64", "avx512f")):
        wide(mnemonic, "w:v/m r:v/m",
             f"{feature} RM EVEX.L.{prefix}0F.{w} 6F /r | {feature} mR EVEX.L.{prefix}0F.{w} 7F /r", g.copy, dtype)
    for mnemonic, prefix, opcode, w in (("vmovntps", "", "2B", "W0"), ("vmovntpd", "66.", "2B", "W1"),
                                        ("vmovntdq", "66.", "E7", "W0")):
        wide(mnemonic, "w:v/m r:v",
             f"avx mR VEX.L.{prefix}0F.WIG {opcode} /r | avx512f mR EVEX.L.{prefix}0F.{w} {opcode} /r", g.copy, "u8",
             masking="")
    wide("vmovntdqa", "w:v r:v/m", "avx2 Rm VEX.L.66.0F38.WIG 2A /r | avx512f Rm EVEX.L.66.0F38.W0 2A /r", g.copy, "u8",
         masking="")
    for suffix, prefix, w, dtype, bits in _SCALAR_KINDS:
        dtype = f"u{bits}"
        row(f"vmov{suffix}", f"w:x/m{bits} r:x/m{bits}",
            f"avx Rm VEX.LIG.{prefix}0F.WIG 10 /r | avx mR VEX.LIG.{prefix}0F.WIG 11 /r | "
            f"avx512f Rm EVEX.LIG.{prefix}0F.{w} 10 /r | avx512f mR EVEX.LIG.{prefix}0F.{w} 11 /r", g.copy,
            dtype=dtype, length=128, masking="kz")
        row(f"vmov{suffix}.merge", "w:x r:x r:x",
            f"avx RVU VEX.LIG.{prefix}0F.WIG 10 /r | avx UVR VEX.LIG.{prefix}0F.WIG 11 /r | "
            f"avx512f RVU EVEX.LIG.{prefix}0F.{w} 10 /r", fp.scalar(lambda a, b: b), dtype=dtype, length=128,
            masking="kz",
            scalar=True)
    row("vmovd.to_vec", "w:x r:r32/m32", "avx RM VEX.128.66.0F.W0 6E /r | avx512f RM EVEX.L0.66.0F.W0 6E /r",
        v.from_general(32), dtype="u32", length=128)
    row("vmovd.from_vec", "w:r32/m32 r:x", "avx MR VEX.128.66.0F.W0 7E /r | avx512f MR EVEX.L0.66.0F.W0 7E /r",
        v.to_general, dtype="u32", length=128)
    row("vmovq.to_vec", "w:x r:r64", "avx RU VEX.128.66.0F.W1 6E /r | avx512f RU EVEX.L0.66.0F.W1 6E /r",
        v.from_general(64), dtype="u64", length=128)
    row("vmovq.from_vec", "w:r64 r:x", "avx UR VEX.128.66.0F.W1 7E /r | avx512f UR EVEX.L0.66.0F.W1 7E /r",
        v.to_general, dtype="u64", length=128)
    row("vmovq", "w:x/m64 r:x/m64",
        "avx RM VEX.128.F3.0F.WIG 7E /r | avx MR VEX.128.66.0F.WIG D6 /r | avx512f RU EVEX.L0.F3.0F.W1 7E /r | "
        "avx512f Rm EVEX.L0.66.0F.W1 6E /r | avx512f mR EVEX.L0.66.0F.W1 7E /r", lambda a: a[:1], dtype="u64",
        length=128)
    for mnemonic, opcode, odd, prefix in (("vmovshdup", "16", True, "F3."), ("vmovsldup", "12", False, "F3.")):
        wide(mnemonic, "w:v r:v/m",
             f"avx RM VEX.L.{prefix}0F.WIG {opcode} /r | avx512f RM EVEX.L.{prefix}0F.W0 {opcode} /r",
             v.duplicate(odd), "u32")
    encoding = "avx RM VEX.L.F2.0F.WIG 12 /r | avx512f RM EVEX.L.F2.0F.W1 12 /r"
    wide("vmovddup", "w:v r:v/m64", encoding, v.duplicate(False), "u64", lengths=(128,))
    wide("vmovddup", "w:v r:v/m", encoding, v.duplicate(False), "u64", lengths=(256, 512))
    row("vmovhlps", "w:x r:x r:x", "avx RVU VEX.128.0F.WIG 12 /r | avx512f RVU EVEX.L0.0F.W0 12 /r",
        lambda a, b: np.concatenate([b[1:], a[1:]]), dtype="u64", length=128)
    row("vmovlhps", "w:x r:x r:x", "avx RVU VEX.128.0F.WIG 16 /r | avx512f RVU EVEX.L0.0F.W0 16 /r",
        lambda a, b: np.concatenate([a[:1], b[:1]]), dtype="u64", length=128)
    for mnemonic, prefix, opcode, dtype in (("vmovmskps", "", "50", "u32"), ("vmovmskpd", "66.", "50", "u64"),
                                            ("vpmovmskb", "66.", "D7", "u8")):
        wide(mnemonic, "w:r32 r:v", f"{'avx2' if dtype == 'u8' else 'avx'} RU VEX.L.{prefix}0F.WIG {opcode} /r",
             v.sign_bits, dtype)
    for mnemonic, load, store, w, bits, feature in (
            ("vmaskmovps", "2C", "2E", "W0", 32, "avx"), ("vmaskmovpd", "2D", "2F", "W0", 64, "avx"),
            ("vpmaskmovd", "8C", "8E", "W0", 32, "avx2"), ("vpmaskmovq", "8C", "8E", "W1", 64, "avx2")):
        wide(f"{mnemonic}.load", "w:v r:v r:v/m", f"{feature} RVm VEX.L.66.0F38.{w} {load} /r", v.masked_load,
             f"u{bits}")
        wide(f"{mnemonic}.store", "rw:v/m r:v r:v", f"{feature} mVR VEX.L.66.0F38.{w} {store} /r", v.masked_store,
             f"u{bits}")


def _broadcasts() -> None:
    wide("vbroadcastss", "w:v r:x/m32", "avx2 RM VEX.L.66.0F38.W0 18 /r | avx512f RM EVEX.L.66.0F38.W0 18 /r",
         lambda length: v.broadcast(length // 32), "u32", by_length=True)
    wide("vbroadcastsd", "w:v r:x/m64", "avx2 RM VEX.L.66.0F38.W0 19 /r | avx512f RM EVEX.L.66.0F38.W1 19 /r",
         lambda length: v.broadcast(length // 64), "u64", lengths=(256, 512), by_length=True)
    for (letter, bits), opcode, general in zip(_LETTER_BITS, ("78", "79", "58", "59"), ("7A", "7B", "7C", "7C"),
                                               strict=True):
        feature = "avx512bw" if bits < 32 else "avx512f"
        w = "W1" if bits == 64 else "W0"
        wide(f"vpbroadcast{letter}", f"w:v r:x/m{bits}",
             f"avx2 RM VEX.L.66.0F38.W0 {opcode} /r | {feature} RM EVEX.L.66.0F38.{w} {opcode} /r",
             lambda length, bits=bits: v.broadcast(length // bits), f"u{bits}", by_length=True)
        wide(f"vpbroadcast{letter}.general", f"w:v r:r{max(32, bits)}", f"{feature} RU EVEX.L.66.0F38.{w} {general} /r",
             lambda length, bits=bits: v.broadcast_general(length // bits, bits), f"u{bits}",
             by_length=True)
    for mnemonic, opcode, feature in (("vbroadcastf128", "1A", "avx"), ("vbroadcasti128", "5A", "avx2")):
        wide(mnemonic, "w:v r:x/m128", f"{feature} Rm VEX.256.66.0F38.W0 {opcode} /r", v.repeat(2), "u32",
             lengths=(256,))
    for kind, part, opcode, w, feature in (
            ("f", "32x4", "1A", "W0", "avx512f"), ("f", "64x2", "1A", "W1", "avx512dq"),
            ("f", "32x8", "1B", "W0", "avx512dq"), ("f", "64x4", "1B", "W1", "avx512f"),
            ("i", "32x4", "5A", "W0", "avx512f"), ("i", "64x2", "5A", "W1", "avx512dq"),
            ("i", "32x8", "5B", "W0", "avx512dq"), ("i", "64x4", "5B", "W1", "avx512f")):
        bits = int(part[:2]) * int(part[3])
        wide(f"vbroadcast{kind}{part}", f"w:v r:{'x' if bits == 128 else 'y'}/m{bits}",
             f"{feature} Rm EVEX.L.66.0F38.{w} {opcode} /r",
             lambda length, bits=bits: v.repeat(length // bits), f"u{part[:2]}",
             lengths=(256, 512) if bits == 128 else (512,), by_length=True)


# --- Vectors: floating point ----------------------------------------------------------------------------------------

def _float_arithmetic() -> None:
    for mnemonic, opcode, meaning in (("vadd", "58", fp.float_add), ("vmul", "59", fp.float_multiply),
                                      ("vsub", "5C", fp.float_subtract), ("vmin", "5D", fp.float_minimum),
                                      ("vdiv", "5E", fp.float_divide), ("vmax", "5F", fp.float_maximum)):
        for suffix, prefix, w, dtype, bits in _FLOAT_KINDS:
            wide(mnemonic + suffix, f"w:v r:v r:v/m/b{bits}",
                 f"avx RVM VEX.L.{prefix}0F.WIG {opcode} /r | avx512f RVM EVEX.L.{prefix}0F.{w} {opcode} /r",
                 meaning, dtype)
        for suffix, prefix, w, dtype, bits in _SCALAR_KINDS:
            _scalar(mnemonic + suffix, f"w:x r:x r:x/m{bits}",
                    f"avx RVM VEX.LIG.{prefix}0F.WIG {opcode} /r | avx512f RVM EVEX.LIG.{prefix}0F.{w} {opcode} /r",
                    meaning, dtype)
    for suffix, prefix, w, dtype, bits in _FLOAT_KINDS:
        wide(f"vsqrt{suffix}", f"w:v r:v/m/b{bits}",
             f"avx RM VEX.L.{prefix}0F.WIG 51 /r | avx512f RM EVEX.L.{prefix}0F.{w} 51 /r", fp.float_sqrt, dtype)
    for suffix, prefix, w, dtype, bits in _SCALAR_KINDS:
        _scalar(f"vsqrt{suffix}", f"w:x r:x r:x/m{bits}",
                f"avx RVM VEX.LIG.{prefix}0F.WIG 51 /r | avx512f RVM EVEX.LIG.{prefix}0F.{w} 51 /r",
                lambda a, b: fp.float_sqrt(b), dtype)
    for sign, base, meaning in (("vfmadd", 0x98, fp.fma()), ("vfmsub", 0x9A, fp.fma(negate_c=True)),
                                ("vfnmadd", 0x9C, fp.fma(negate_ab=True)),
                                ("vfnmsub", 0x9E, fp.fma(negate_ab=True, negate_c=True))):
        for order, offset in (("132", 0), ("213", 0x10), ("231", 0x20)):
            ordered = fp.fma_order(meaning, order)
            for suffix, w, dtype, bits in (("s", "W0", "f32", 32), ("d", "W1", "f64", 64)):
                opcode = f"66.0F38.{w} {base + offset:X} /r"
                wide(f"{sign}{order}p{suffix}", f"rw:v r:v r:v/m/b{bits}",
                     f"fma RVM VEX.L.{opcode} | avx512f RVM EVEX.L.{opcode}", ordered, dtype)
                opcode = f"66.0F38.{w} {base + offset + 1:X} /r"
                _scalar(f"{sign}{order}s{suffix}", f"rw:x r:x r:x/m{bits}",
                        f"fma RVM VEX.LIG.{opcode} | avx512f RVM EVEX.LIG.{opcode}", ordered, dtype)


def _scalar(name: str, operands: str, encodings: str, meaning: Meaning, dtype: str, **more: Any) -> None:
    """A row on lane 0 of xmm registers; the upper lanes come from the first source."""
    row(name, operands, encodings, fp.scalar(meaning), dtype=dtype, length=128,
        masking="kz" if "EVEX" in encodings else "", scalar=True, **more)


def _float_rest() -> None:
    for suffix, w, dtype, bits, step in (("ps", "W0", "f32", 32, 0), ("pd", "W1", "f64", 64, 1)):
        b = f"r:v/m/b{bits}"
        wide(f"vround{suffix}", "w:v r:v/m r:i8", f"avx RMI VEX.L.66.0F3A.WIG {8 + step:02X} /r ib", fp.float_round,
             dtype)
        wide(f"vrndscale{suffix}", f"w:v {b} r:i8", f"avx512f RMI EVEX.L.66.0F3A.{w} {8 + step:02X} /r ib",
             fp.round_scale, dtype)
        wide(f"vreduce{suffix}", f"w:v {b} r:i8", f"avx512dq RMI EVEX.L.66.0F3A.{w} 56 /r ib", fp.reduce, dtype)
        wide(f"vrange{suffix}", f"w:v r:v {b} r:i8", f"avx512dq RVMI EVEX.L.66.0F3A.{w} 50 /r ib", fp.select_range,
             dtype)
        wide(f"vfpclass{suffix}", f"w:k {b} r:i8", f"avx512dq RMI EVEX.L.66.0F3A.{w} 66 /r ib", fp.classify, dtype,
             masking="k")
        wide(f"vgetmant{suffix}", f"w:v {b} r:i8", f"avx512f RMI EVEX.L.66.0F3A.{w} 26 /r ib", fp.get_mantissa, dtype)
        wide(f"vgetexp{suffix}", f"w:v {b}", f"avx512f RM EVEX.L.66.0F38.{w} 42 /r", fp.get_exponent, dtype)
        wide(f"vscalef{suffix}", f"w:v r:v {b}", f"avx512f RVM EVEX.L.66.0F38.{w} 2C /r", fp.scale_exponent, dtype)
        wide(f"vrcp14{suffix}", f"w:v {b}", f"avx512f RM EVEX.L.66.0F38.{w} 4C /r", fp.reciprocal, dtype,
             tolerance=2.0 ** -14)
        wide(f"vrsqrt14{suffix}", f"w:v {b}", f"avx512f RM EVEX.L.66.0F38.{w} 4E /r", fp.reciprocal_sqrt, dtype,
             tolerance=2.0 ** -14)
        prefix = "66." if bits == 64 else ""
        wide(f"vcmp{suffix}", "w:v r:v r:v/m r:i8", f"avx RVMI VEX.L.{prefix}0F.WIG C2 /r ib", v.compare_floats_lanes,
             dtype)
        wide(f"vcmp{suffix}.k", f"w:k r:v r:v/m/b{bits} r:i8", f"avx512f RVMI EVEX.L.{prefix}0F.{w} C2 /r ib",
             v.compare_floats, dtype, masking="k")
        blend, variable = f"{0x0C + step:02X}", f"{0x4A + step:X}"
        unsigned = f"u{bits}"
        wide(f"vblend{suffix}", "w:v r:v r:v/m r:i8", f"avx RVMI VEX.L.66.0F3A.WIG {blend} /r ib", v.blend_by_immediate,
             unsigned)
        wide(f"vblendv{suffix}", "w:v r:v r:v/m r:v", f"avx RVML VEX.L.66.0F3A.W0 {variable} /r /is4",
             v.blend_by_vector, unsigned)
        wide(f"vblendm{suffix}", f"w:v r:v r:v/m/b{bits}", f"avx512f RVM EVEX.L.66.0F38.{w} 65 /r", v.second, unsigned,
             blend=True)
        for mnemonic, opcode, operation in (("vand", "54", lambda a, b: a & b), ("vandn", "55", lambda a, b: ~a & b),
                                            ("vor", "56", lambda a, b: a | b), ("vxor", "57", lambda a, b: a ^ b)):
            wide(mnemonic + suffix, f"w:v r:v r:v/m/b{bits}",
                 f"avx RVM VEX.L.{prefix}0F.WIG {opcode} /r | avx512dq RVM EVEX.L.{prefix}0F.{w} {opcode} /r",
                 operation, unsigned)
        wide(f"vunpckl{suffix}", f"w:v r:v r:v/m/b{bits}",
             f"avx RVM VEX.L.{prefix}0F.WIG 14 /r | avx512f RVM EVEX.L.{prefix}0F.{w} 14 /r", v.interleave(False),
             unsigned)
        wide(f"vunpckh{suffix}", f"w:v r:v r:v/m/b{bits}",
             f"avx RVM VEX.L.{prefix}0F.WIG 15 /r | avx512f RVM EVEX.L.{prefix}0F.{w} 15 /r", v.interleave(True),
             unsigned)
        wide(f"vshuf{suffix}", f"w:v r:v r:v/m/b{bits} r:i8",
             f"avx RVMI VEX.L.{prefix}0F.WIG C6 /r ib | avx512f RVMI EVEX.L.{prefix}0F.{w} C6 /r ib",
             v.shuffle_two, unsigned)
        wide(f"vpermil{suffix}.imm", f"w:v {b} r:i8",
             f"avx RMI VEX.L.66.0F3A.W0 {4 + step:02X} /r ib | avx512f RMI EVEX.L.66.0F3A.{w} {4 + step:02X} /r ib",
             v.shuffle_one if bits == 32 else v.permute_pairs, unsigned)
        wide(f"vpermil{suffix}", f"w:v r:v r:v/m/b{bits}",
             f"avx RVM VEX.L.66.0F38.W0 {0x0C + step:02X} /r | avx512f RVM EVEX.L.66.0F38.{w} {0x0C + step:02X} /r",
             v.permute_in_128, unsigned)
        wide(f"vtest{suffix}", "r:v r:v/m", f"avx RM VEX.L.66.0F38.W0 {0x0E + step:02X} /r", g.test_vector(bits),
             unsigned,
             flags_written=FLAGS)
    for suffix, w, dtype, bits, step in (("ss", "W0", "f32", 32, 2), ("sd", "W1", "f64", 64, 3)):
        _scalar(f"vround{suffix}", f"w:x r:x r:x/m{bits} r:i8", f"avx RVMI VEX.LIG.66.0F3A.WIG {8 + step:02X} /r ib",
                lambda a, b, imm: fp.float_round(b, imm), dtype)
        _scalar(f"vrndscale{suffix}", f"w:x r:x r:x/m{bits} r:i8",
                f"avx512f RVMI EVEX.LIG.66.0F3A.{w} {8 + step:02X} /r ib", lambda a, b, imm: fp.round_scale(b, imm),
                dtype)
        _scalar(f"vscalef{suffix}", f"w:x r:x r:x/m{bits}", f"avx512f RVM EVEX.LIG.66.0F38.{w} 2D /r",
                fp.scale_exponent, dtype)
        row(f"vucomi{suffix}", f"r:x r:x/m{bits}",
            f"avx RM VEX.LIG.{'66.' if bits == 64 else ''}0F.WIG 2E /r | "
            f"avx512f RM EVEX.LIG.{'66.' if bits == 64 else ''}0F.{w} 2E /r", fp.compare_ordered, dtype=dtype,
            length=128,
            flags_written=FLAGS)
    wide("vrcpps", "w:v r:v/m", "avx RM VEX.L.0F.WIG 53 /r", fp.estimate(fp.reciprocal), "f32",
         tolerance=1.5 * 2.0 ** -12)
    wide("vrsqrtps", "w:v r:v/m", "avx RM VEX.L.0F.WIG 52 /r", fp.estimate(fp.reciprocal_sqrt), "f32",
         tolerance=1.5 * 2.0 ** -12)
    wide("vptest", "r:v r:v/m", "avx RM VEX.L.66.0F38.WIG 17 /r", g.test_vector(0), "u64", flags_written=FLAGS)


def _conversions() -> None:
    def both(mnemonic: str, operands: str, code: str, w: str, meaning: Meaning, dtype: str) -> None:
        prefix, opcode = code.split()
        wide(mnemonic, operands, f"avx RM VEX.L.{prefix}0F.WIG {opcode} /r | "
             f"avx512f RM EVEX.L.{prefix}0F.{w} {opcode} /r", meaning, dtype)

    both("vcvtdq2ps", "w:v.f32 r:v/m/b32", "NP. 5B", "W0", fp.to_float("f4"), "i32")
    both("vcvtps2dq", "w:v.i32 r:v/m/b32", "66. 5B", "W0", fp.to_integer("i4", False), "f32")
    both("vcvttps2dq", "w:v.i32 r:v/m/b32", "F3. 5B", "W0", fp.to_integer("i4", True), "f32")
    both("vcvtdq2pd", "w:v.f64 r:h/m/b32", "F3. E6", "W0", fp.to_float("f8"), "i32")
    both("vcvtps2pd", "w:v.f64 r:h/m/b32", "NP. 5A", "W0", fp.to_float("f8"), "f32")
    both("vcvtpd2ps", "w:h.f32 r:v/m/b64", "66. 5A", "W1", fp.to_float("f4"), "f64")
    both("vcvtpd2dq", "w:h.i32 r:v/m/b64", "F2. E6", "W1", fp.to_integer("i4", False), "f64")
    both("vcvttpd2dq", "w:h.i32 r:v/m/b64", "66. E6", "W1", fp.to_integer("i4", True), "f64")
    for mnemonic, operands, code, feature, meaning, dtype in (
            ("vcvtqq2pd", "w:v.f64 r:v/m/b64", "F3.0F.W1 E6", "avx512dq", fp.to_float("f8"), "i64"),
            ("vcvtuqq2pd", "w:v.f64 r:v/m/b64", "F3.0F.W1 7A", "avx512dq", fp.to_float("f8"), "u64"),
            ("vcvtqq2ps", "w:h.f32 r:v/m/b64", "0F.W1 5B", "avx512dq", fp.to_float("f4"), "i64"),
            ("vcvtpd2qq", "w:v.i64 r:v/m/b64", "66.0F.W1 7B", "avx512dq", fp.to_integer("i8", False), "f64"),
            ("vcvttpd2qq", "w:v.i64 r:v/m/b64", "66.0F.W1 7A", "avx512dq", fp.to_integer("i8", True), "f64"),
            ("vcvttps2qq", "w:v.i64 r:h/m/b32", "66.0F.W0 7A", "avx512dq", fp.to_integer("i8", True), "f32"),
            ("vcvtudq2ps", "w:v.f32 r:v/m/b32", "F2.0F.W0 7A", "avx512f", fp.to_float("f4"), "u32"),
            ("vcvttps2udq", "w:v.u32 r:v/m/b32", "0F.W0 78", "avx512f", fp.to_integer("u4", True), "f32")):
        wide(mnemonic, operands, f"{feature} RM EVEX.L.{code} /r", meaning, dtype)
    wide("vcvtph2ps", "w:v.f32 r:h/m", "f16c RM VEX.L.66.0F38.W0 13 /r | avx512f RM EVEX.L.66.0F38.W0 13 /r",
         fp.half_to_float, "u16")
    wide("vcvtps2ph", "w:h/m.u16 r:v r:i8",
         "f16c MRI VEX.L.66.0F3A.W0 1D /r ib | avx512f MRI EVEX.L.66.0F3A.W0 1D /r ib", fp.float_to_half, "f32")
    wide("vcvtneps2bf16", "w:h.u16 r:v/m/b32", "avx512_bf16 RM EVEX.L.F3.0F38.W0 72 /r", fp.float_to_bf16, "f32")
    wide("vcvtne2ps2bf16", "w:v.u16 r:v r:v/m/b32", "avx512_bf16 RVM EVEX.L.F2.0F38.W0 72 /r",
         lambda a, b: np.concatenate([fp.float_to_bf16(b), fp.float_to_bf16(a)]), "f32")
    for suffix, prefix, dtype, bits in (("ss", "F3.", "f32", 32), ("sd", "F2.", "f64", 64)):
        sized(f"vcvtsi2{suffix}", "w:x r:x r:r{n}/m{n}",
              f"avx RVM VEX.LIG.{prefix}0F.{{W}} 2A /r | avx512f RVM EVEX.LIG.{prefix}0F.{{W}} 2A /r",
              lambda n, dtype=dtype: fp.insert_converted(n), dtype=dtype, length=128)  # type: ignore[misc]
        for letter, opcode, truncate in (("t", "2C", True), ("", "2D", False)):
            sized(f"vcvt{letter}{suffix}2si", f"w:r{{n}} r:x/m{bits}",
                  f"avx RM VEX.LIG.{prefix}0F.{{W}} {opcode} /r | avx512f RM EVEX.LIG.{prefix}0F.{{W}} {opcode} /r",
                  lambda n, truncate=truncate: fp.extract_converted(n, truncate), dtype=dtype,  # type: ignore[misc]
                  length=128)
    row("vcvtss2sd", "w:x r:x r:x/m32.f32", "avx RVM VEX.LIG.F3.0F.WIG 5A /r | avx512f RVM EVEX.LIG.F3.0F.W0 5A /r",
        fp.insert_float, dtype="f64", length=128, masking="kz", scalar=True)
    row("vcvtsd2ss", "w:x r:x r:x/m64.f64", "avx RVM VEX.LIG.F2.0F.WIG 5A /r | avx512f RVM EVEX.LIG.F2.0F.W1 5A /r",
        fp.insert_float, dtype="f32", length=128, masking="kz", scalar=True)
    sizes = dict(_LETTER_BITS)
    for wider, narrower, part, step in (("w", "b", "h", 0), ("d", "b", "q", 1), ("q", "b", "e", 2), ("d", "w", "h", 3),
                                        ("q", "w", "q", 4), ("q", "d", "h", 5)):
        feature = "avx512bw" if wider == "w" else "avx512f"
        for letter, base, kind in (("s", 0x20, "i"), ("z", 0x30, "u")):
            code = f"{base + step:X} /r"
            wide(f"vpmov{letter}x{narrower}{wider}", f"w:v.{kind}{sizes[wider]} r:{part}/m",
                 f"avx2 RM VEX.L.66.0F38.WIG {code} | "
                 f"{feature} RM EVEX.L.66.0F38.{'W0' if narrower == 'd' else 'WIG'} {code}",
                 v.extend(f"{kind}{sizes[wider] // 8}"), f"{kind}{sizes[narrower]}")
        for saturation, base, kind in (("", 0x30, "u"), ("s", 0x20, "i"), ("us", 0x10, "u")):
            wide(f"vpmov{saturation}{wider}{narrower}", f"w:{part}/m.{kind}{sizes[narrower]} r:v",
                 f"{feature} MR EVEX.L.F3.0F38.W0 {base + step:X} /r",
                 v.narrow(f"{kind}{sizes[narrower] // 8}", bool(saturation)), f"{kind}{sizes[wider]}")


# --- Vectors: integers ----------------------------------------------------------------------------------------------

def _vector_integers() -> None:
    def both(mnemonic: str, opcode: str, w: str, meaning: Meaning, dtype: str, broadcast: int = 0,
             feature: str = "avx512f", table: str = "0F", operands: str = "w:v r:v r:v/m", masking: str = "kz") -> None:
        """VEX and EVEX forms of one opcode; broadcast: bits of an EVEX broadcast element."""
        wide(mnemonic, operands + (f"/b{broadcast}" if broadcast else ""),
             f"avx2 RVM VEX.L.66.{table}.WIG {opcode} /r | {feature} RVM EVEX.L.66.{table}.{w} {opcode} /r", meaning,
             dtype, masking=masking)

    add, subtract = lambda a, b: a + b, lambda a, b: a - b
    for name, meaning, opcodes in (("vpadd", add, ("FC", "FD", "FE", "D4")),
                                   ("vpsub", subtract, ("F8", "F9", "FA", "FB"))):
        for (letter, bits), opcode in zip(_LETTER_BITS, opcodes, strict=True):
            both(name + letter, opcode, {64: "W1", 32: "W0"}.get(bits, "WIG"), meaning, f"u{bits}",
                 bits if bits >= 32 else 0, "avx512f" if bits >= 32 else "avx512bw")
    for name, meaning, opcodes in (("vpadds", np.add, ("EC", "ED", "DC", "DD")),
                                   ("vpsubs", np.subtract, ("E8", "E9", "D8", "D9"))):
        mnemonics = (f"{name}b", f"{name}w", f"{name[:-1]}usb", f"{name[:-1]}usw")
        for mnemonic, opcode, dtype in zip(mnemonics, opcodes, ("i8", "i16", "u8", "u16"), strict=True):
            both(mnemonic, opcode, "WIG", v.saturating(meaning), dtype, 0, "avx512bw")
    multiply = lambda a, b: a * b  # noqa: E731
    both("vpmullw", "D5", "WIG", multiply, "u16", 0, "avx512bw")
    both("vpmulhw", "E5", "WIG", v.multiply_high, "i16", 0, "avx512bw")
    both("vpmulhuw", "E4", "WIG", v.multiply_high, "u16", 0, "avx512bw")
    both("vpmulld", "40", "W0", multiply, "u32", 32, table="0F38")
    wide("vpmullq", "w:v r:v r:v/m/b64", "avx512dq RVM EVEX.L.66.0F38.W1 40 /r", multiply, "u64")
    both("vpmuludq", "F4", "W1", v.multiply_even("u4"), "u64", 64)
    both("vpmuldq", "28", "W1", v.multiply_even("i4"), "u64", 64, table="0F38")
    both("vpmaddwd", "F5", "WIG", v.multiply_add_words, "i16", 0, "avx512bw", operands="w:v.i32 r:v r:v/m")
    both("vpmaddubsw", "04", "WIG", v.multiply_add_bytes, "u8", 0, "avx512bw", table="0F38",
         operands="w:v.i16 r:v r:v/m")
    both("vpsadbw", "F6", "WIG", v.sum_of_differences, "u8", 0, "avx512bw", operands="w:v.u64 r:v r:v/m",
         masking="")
    for dtype, table, low, high in (("i8", "0F38", "38", "3C"), ("u8", "0F", "DA", "DE"), ("i16", "0F", "EA", "EE"),
                                    ("u16", "0F38", "3A", "3E"), ("i32", "0F38", "39", "3D"),
                                    ("u32", "0F38", "3B", "3F")):
        bits = int(dtype[1:])
        letter = {"i": "s", "u": "u"}[dtype[0]] + {8: "b", 16: "w", 32: "d"}[bits]
        for name, opcode, meaning in (("vpmin", low, np.minimum), ("vpmax", high, np.maximum)):
            both(name + letter, opcode, "W0" if bits == 32 else "WIG", meaning, dtype, 32 if bits == 32 else 0,
                 "avx512f" if bits == 32 else "avx512bw", table)
    for mnemonic, opcode, meaning, dtype in (("vpminsq", "39", np.minimum, "i64"),
                                             ("vpminuq", "3B", np.minimum, "u64"),
                                             ("vpmaxsq", "3D", np.maximum, "i64"),
                                             ("vpmaxuq", "3F", np.maximum, "u64")):
        wide(mnemonic, "w:v r:v r:v/m/b64", f"avx512f RVM EVEX.L.66.0F38.W1 {opcode} /r", meaning, dtype)
    for (letter, bits), opcode in zip(_LETTER_BITS[:3], ("1C", "1D", "1E"), strict=True):
        feature, w, b = ("avx512f", "W0", "/b32") if bits == 32 else ("avx512bw", "WIG", "")
        wide(f"vpabs{letter}", f"w:v r:v/m{b}", f"avx2 RM VEX.L.66.0F38.WIG {opcode} /r | "
             f"{feature} RM EVEX.L.66.0F38.{w} {opcode} /r", v.absolute, f"i{bits}")
    wide("vpabsq", "w:v r:v/m/b64", "avx512f RM EVEX.L.66.0F38.W1 1F /r", v.absolute, "i64")
    for name, opcode, operation in (("vpand", "DB", lambda a, b: a & b), ("vpandn", "DF", lambda a, b: ~a & b),
                                    ("vpor", "EB", lambda a, b: a | b), ("vpxor", "EF", lambda a, b: a ^ b)):
        wide(name, "w:v r:v r:v/m", f"avx2 RVM VEX.L.66.0F.WIG {opcode} /r", operation, "u64")
        for letter, bits, w in (("d", 32, "W0"), ("q", 64, "W1")):
            wide(name + letter, f"w:v r:v r:v/m/b{bits}", f"avx512f RVM EVEX.L.66.0F.{w} {opcode} /r", operation,
                 f"u{bits}")
    for letter, bits, w in (("d", 32, "W0"), ("q", 64, "W1")):
        b, u = f"/b{bits}", f"u{bits}"
        wide(f"vpternlog{letter}", f"rw:v r:v r:v/m{b} r:i8", f"avx512f RVMI EVEX.L.66.0F3A.{w} 25 /r ib",
             v.ternary_logic, u)
        wide(f"vpblendm{letter}", f"w:v r:v r:v/m{b}", f"avx512f RVM EVEX.L.66.0F38.{w} 64 /r", v.second, u, blend=True)
        for mnemonic, digit, opcode, rotate in (("vprol", 1, "15", v.rotate_left), ("vpror", 0, "14", v.rotate_right)):
            wide(f"{mnemonic}{letter}", f"w:v r:v/m{b} r:i8", f"avx512f VMI EVEX.L.66.0F.{w} 72 /{digit} ib", rotate, u)
            wide(f"{mnemonic}v{letter}", f"w:v r:v r:v/m{b}", f"avx512f RVM EVEX.L.66.0F38.{w} {opcode} /r", rotate, u)
    for letter, bits, w in (("b", 8, "W0"), ("w", 16, "W1")):
        wide(f"vpblendm{letter}", "w:v r:v r:v/m", f"avx512bw RVM EVEX.L.66.0F38.{w} 66 /r", v.second, f"u{bits}",
             blend=True)
    wide("vpblendvb", "w:v r:v r:v/m r:v", "avx2 RVML VEX.L.66.0F3A.W0 4C /r /is4", v.blend_by_vector, "u8")
    wide("vpblendd", "w:v r:v r:v/m r:i8", "avx2 RVMI VEX.L.66.0F3A.W0 02 /r ib", v.blend_by_immediate, "u32")
    wide("vpblendw", "w:v r:v r:v/m r:i8", "avx2 RVMI VEX.L.66.0F3A.WIG 0E /r ib", v.blend_by_immediate, "u16")
    dots = (("vpdpbusd", "50", 4, True, False), ("vpdpbusds", "51", 4, True, True), ("vpdpwssd", "52", 2, False, False),
            ("vpdpwssds", "53", 2, False, True))
    for mnemonic, opcode, group, unsigned, saturate in dots:
        meaning = v.dot_product(group, unsigned, saturate)
        wide(mnemonic, "rw:v r:v r:v/m/b32", f"avx512_vnni RVM EVEX.L.66.0F38.W0 {opcode} /r", meaning, "i32")
        # Processors have either or both, so these are rows of their own; without the prefix, as takes the other one.
        wide(f"{mnemonic}.vex", "rw:v r:v r:v/m", f"avx_vnni RVM VEX.L.66.0F38.W0 {opcode} /r", meaning, "i32",
             mnemonic=f"{{vex}} {mnemonic}")
    wide("vdpbf16ps", "rw:v.f32 r:v r:v/m/b32", "avx512_bf16 RVM EVEX.L.F3.0F38.W0 52 /r", fp.dot_bf16, "u32")


def _compares() -> None:
    equal, greater = lambda a, b: a == b, lambda a, b: a > b
    for (letter, bits), eq, gt in zip(_LETTER_BITS, ("0F.WIG 74", "0F.WIG 75", "0F.WIG 76", "0F38.WIG 29"),
                                      ("0F.WIG 64", "0F.WIG 65", "0F.WIG 66", "0F38.WIG 37"), strict=True):
        feature = "avx512f" if bits >= 32 else "avx512bw"
        b = f"/b{bits}" if bits >= 32 else ""
        for mnemonic, code, operation in (("vpcmpeq", eq, equal), ("vpcmpgt", gt, greater)):
            wide(mnemonic + letter, "w:v r:v r:v/m", f"avx2 RVM VEX.L.66.{code} /r", v.compare_lanes(operation),
                 f"i{bits}")
            short = code if bits < 32 else code.replace("WIG", "W1" if bits == 64 else "W0")
            wide(f"{mnemonic}{letter}.k", f"w:k r:v r:v/m{b}", f"{feature} RVM EVEX.L.66.{short} /r", operation,
                 f"i{bits}",
                 masking="k")
        w = "W1" if letter in "wq" else "W0"
        for sign, opcode in (("", "3F" if bits < 32 else "1F"), ("u", "3E" if bits < 32 else "1E")):
            wide(f"vpcmp{sign}{letter}", f"w:k r:v r:v/m{b} r:i8", f"{feature} RVMI EVEX.L.66.0F3A.{w} {opcode} /r ib",
                 v.compare_integers, f"{sign or 'i'}{bits}", masking="k")
        for name, prefix, truth in (("vptestm", "66", lambda a, b: a & b != 0),
                                    ("vptestnm", "F3", lambda a, b: a & b == 0)):
            wide(name + letter, f"w:k r:v r:v/m{b}",
                 f"{feature} RVM EVEX.L.{prefix}.0F38.{w} {'26' if bits < 32 else '27'} /r", truth, f"u{bits}",
                 masking="k")


def _shifts() -> None:
    for name, codes, digit, meaning, variable in (
            ("vpsll", {16: "F1", 32: "F2", 64: "F3"}, 6, v.shift_left, {16: "12", 32: "47", 64: "47"}),
            ("vpsrl", {16: "D1", 32: "D2", 64: "D3"}, 2, v.shift_right, {16: "10", 32: "45", 64: "45"}),
            ("vpsra", {16: "E1", 32: "E2", 64: "E2"}, 4, v.shift_right_signed, {16: "11", 32: "46", 64: "46"})):
        for letter, bits in _LETTER_BITS[1:]:
            evex_only = name == "vpsra" and bits == 64
            feature, w = ("avx512bw", "WIG") if bits == 16 else ("avx512f", "W1" if bits == 64 else "W0")
            b = f"/b{bits}" if bits > 16 else ""
            group = {16: "71", 32: "72", 64: "72" if evex_only else "73"}[bits]
            vex = "" if evex_only else f"avx2 RVM VEX.L.66.0F.WIG {codes[bits]} /r | "
            wide(name + letter, f"w:v r:v r:x/m128.u{bits}", f"{vex}{feature} RVM EVEX.L.66.0F.{w} {codes[bits]} /r",
                 v.by_low_quadword(meaning), f"u{bits}")
            vex = "" if evex_only else f"avx2 VUI VEX.L.66.0F.WIG {group} /{digit} ib | "
            wide(f"{name}{letter}.imm", f"w:v r:v/m{b} r:i8",
                 f"{vex}{feature} VMI EVEX.L.66.0F.{w} {group} /{digit} ib",
                 meaning, f"u{bits}")
            w = "W0" if bits == 32 else "W1"
            vex = f"avx2 RVM VEX.L.66.0F38.{w} {variable[bits]} /r | " if bits > 16 and not evex_only else ""
            wide(f"{name}v{letter}", f"w:v r:v r:v/m{b}", f"{vex}{feature} RVM EVEX.L.66.0F38.{w} {variable[bits]} /r",
                 meaning, f"u{bits}")
    for mnemonic, digit, left in (("vpslldq", 7, True), ("vpsrldq", 3, False)):
        wide(mnemonic, "w:v r:v/m r:i8", f"avx2 VUI VEX.L.66.0F.WIG 73 /{digit} ib | "
             f"avx512bw VMI EVEX.L.66.0F.WIG 73 /{digit} ib", v.shift_bytes(left), "u8", masking="")


# --- Vectors: between lanes -----------------------------------------------------------------------------------------

def _shuffles() -> None:
    for name, opcode, source, target in (("vpacksswb", "0F.WIG 63", "i16", "i8"),
                                         ("vpackuswb", "0F.WIG 67", "i16", "u8"),
                                         ("vpackssdw", "0F.W0 6B", "i32", "i16"),
                                         ("vpackusdw", "0F38.W0 2B", "i32", "u16")):
        b = "/b32" if source == "i32" else ""
        wide(name, f"w:v.{target} r:v r:v/m{b}", f"avx2 RVM VEX.L.66.{opcode.replace('W0', 'WIG')} /r | "
             f"avx512bw RVM EVEX.L.66.{opcode} /r", v.pack(f"{target[0]}{int(target[1:]) // 8}"), source)
    for suffix, low, high, bits in (("bw", "60", "68", 8), ("wd", "61", "69", 16), ("dq", "62", "6A", 32),
                                    ("qdq", "6C", "6D", 64)):
        feature, b = ("avx512f", f"/b{bits}") if bits >= 32 else ("avx512bw", "")
        w = {32: "W0", 64: "W1"}.get(bits, "WIG")
        for name, opcode, is_high in (("vpunpckl", low, False), ("vpunpckh", high, True)):
            wide(name + suffix, f"w:v r:v r:v/m{b}", f"avx2 RVM VEX.L.66.0F.WIG {opcode} /r | "
                 f"{feature} RVM EVEX.L.66.0F.{w} {opcode} /r", v.interleave(is_high), f"u{bits}")
    wide("vpshufb", "w:v r:v r:v/m", "avx2 RVM VEX.L.66.0F38.WIG 00 /r | avx512bw RVM EVEX.L.66.0F38.WIG 00 /r",
         v.shuffle_bytes, "u8")
    wide("vpshufd", "w:v r:v/m/b32 r:i8", "avx2 RMI VEX.L.66.0F.WIG 70 /r ib | avx512f RMI EVEX.L.66.0F.W0 70 /r ib",
         v.shuffle_one, "u32")
    for name, prefix, is_high in (("vpshuflw", "F2", False), ("vpshufhw", "F3", True)):
        wide(name, "w:v r:v/m r:i8",
             f"avx2 RMI VEX.L.{prefix}.0F.WIG 70 /r ib | avx512bw RMI EVEX.L.{prefix}.0F.WIG 70 /r ib",
             v.shuffle_words(is_high), "u16")
    wide("vpalignr", "w:v r:v r:v/m r:i8",
         "avx2 RVMI VEX.L.66.0F3A.WIG 0F /r ib | avx512bw RVMI EVEX.L.66.0F3A.WIG 0F /r ib",
         v.align_bytes, "u8")
    for name, opcode, feature in (("vperm2f128", "06", "avx"), ("vperm2i128", "46", "avx2")):
        wide(name, "w:v r:v r:v/m r:i8", f"{feature} RVMI VEX.L.66.0F3A.W0 {opcode} /r ib", v.permute_halves, "u32",
             lengths=(256,))
    big = (256, 512)
    for name, opcode in (("vpermps", "16"), ("vpermd", "36")):
        wide(name, "w:v r:v r:v/m/b32",
             f"avx2 RVM VEX.L.66.0F38.W0 {opcode} /r | avx512f RVM EVEX.L.66.0F38.W0 {opcode} /r",
             v.permute, "u32", lengths=big)
    for name, opcode, variable in (("vpermpd", "01", "16"), ("vpermq", "00", "36")):
        wide(f"{name}.imm", "w:v r:v/m/b64 r:i8",
             f"avx2 RMI VEX.L.66.0F3A.W1 {opcode} /r ib | avx512f RMI EVEX.L.66.0F3A.W1 {opcode} /r ib",
             v.permute_immediate, "u64", lengths=big)
        wide(name, "w:v r:v r:v/m/b64", f"avx512f RVM EVEX.L.66.0F38.W1 {variable} /r", v.permute, "u64", lengths=big)
    wide("vpermw", "w:v r:v r:v/m", "avx512bw RVM EVEX.L.66.0F38.W1 8D /r", v.permute, "u16")
    wide("vpermb", "w:v r:v r:v/m", "avx512_vbmi RVM EVEX.L.66.0F38.W0 8D /r", v.permute, "u8")
    for suffix, w, bits, two, into, feature in (
            ("ps", "W0", 32, "7F", "77", "avx512f"), ("pd", "W1", 64, "7F", "77", "avx512f"),
            ("d", "W0", 32, "7E", "76", "avx512f"), ("q", "W1", 64, "7E", "76", "avx512f"),
            ("w", "W1", 16, "7D", "75", "avx512bw"), ("b", "W0", 8, "7D", "75", "avx512_vbmi")):
        b = f"/b{bits}" if bits >= 32 else ""
        wide(f"vpermt2{suffix}", f"rw:v r:v r:v/m{b}", f"{feature} RVM EVEX.L.66.0F38.{w} {two} /r", v.permute_two,
             f"u{bits}")
        wide(f"vpermi2{suffix}", f"rw:v r:v r:v/m{b}", f"{feature} RVM EVEX.L.66.0F38.{w} {into} /r",
             v.permute_two_index,
             f"u{bits}")
    for letter, w, bits in (("d", "W0", 32), ("q", "W1", 64)):
        wide(f"valign{letter}", f"w:v r:v r:v/m/b{bits} r:i8", f"avx512f RVMI EVEX.L.66.0F3A.{w} 03 /r ib",
             v.align_lanes,
             f"u{bits}")
    for kind, opcode in (("f", "23"), ("i", "43")):
        for part, w, bits in (("32x4", "W0", 32), ("64x2", "W1", 64)):
            wide(f"vshuf{kind}{part}", f"w:v r:v r:v/m/b{bits} r:i8", f"avx512f RVMI EVEX.L.66.0F3A.{w} {opcode} /r ib",
                 v.shuffle_128, f"u{bits}", lengths=big)
    for kind, insert, extract in (("f", 0x18, 0x19), ("i", 0x38, 0x39)):
        feature = "avx" if kind == "f" else "avx2"
        wide(f"vinsert{kind}128", "w:v r:v r:x/m128 r:i8", f"{feature} RVMI VEX.L.66.0F3A.W0 {insert:X} /r ib",
             v.insert_part,
             "u32", lengths=(256,))
        wide(f"vextract{kind}128", "w:x/m128 r:v r:i8", f"{feature} MRI VEX.L.66.0F3A.W0 {extract:X} /r ib",
             v.extract_part(128), "u32", lengths=(256,))
        for part, w, offset, feature in (("32x4", "W0", 0, "avx512f"), ("64x2", "W1", 0, "avx512dq"),
                                         ("32x8", "W0", 2, "avx512dq"), ("64x4", "W1", 2, "avx512f")):
            bits = int(part[:2]) * int(part[3])
            piece = f"{'x' if bits == 128 else 'y'}/m{bits}"
            lengths = big if bits == 128 else (512,)
            wide(f"vinsert{kind}{part}", f"w:v r:v r:{piece} r:i8",
                 f"{feature} RVMI EVEX.L.66.0F3A.{w} {insert + offset:X} /r ib",
                 v.insert_part, f"u{part[:2]}", lengths=lengths)
            wide(f"vextract{kind}{part}", f"w:{piece} r:v r:i8",
                 f"{feature} MRI EVEX.L.66.0F3A.{w} {extract + offset:X} /r ib",
                 v.extract_part(bits), f"u{part[:2]}", lengths=lengths)
    for letter, bits, extract_code, insert_code, feature in (
            ("b", 8, "0F3A.{W} 14", "0F3A.{W} 20", "avx512bw"), ("d", 32, "0F3A.W0 16", "0F3A.W0 22", "avx512dq"),
            ("q", 64, "0F3A.W1 16", "0F3A.W1 22", "avx512dq")):
        vex_x, evex_x = extract_code.replace("{W}", "W0"), extract_code.replace("{W}", "WIG")
        vex_i, evex_i = insert_code.replace("{W}", "W0"), insert_code.replace("{W}", "WIG")
        general = f"r{max(32, bits)}/m{bits}"
        row(f"vpextr{letter}", f"w:{general} r:x r:i8",
            f"avx MRI VEX.128.66.{vex_x} /r ib | {feature} MRI EVEX.L0.66.{evex_x} /r ib", v.extract_lane,
            dtype=f"u{bits}",
            length=128)
        row(f"vpinsr{letter}", f"w:x r:x r:{general} r:i8",
            f"avx RVMI VEX.128.66.{vex_i} /r ib | {feature} RVMI EVEX.L0.66.{evex_i} /r ib", v.insert_lane,
            dtype=f"u{bits}",
            length=128)
    row("vpextrw", "w:r32/m16 r:x r:i8",
        "avx RUI VEX.128.66.0F.W0 C5 /r ib | avx mRI VEX.128.66.0F3A.W0 15 /r ib | "
        "avx512bw RUI EVEX.L0.66.0F.WIG C5 /r ib | avx512bw mRI EVEX.L0.66.0F3A.WIG 15 /r ib", v.extract_lane,
        dtype="u16",
        length=128)
    row("vpinsrw", "w:x r:x r:r32/m16 r:i8",
        "avx RVMI VEX.128.66.0F.W0 C4 /r ib | avx512bw RVMI EVEX.L0.66.0F.WIG C4 /r ib",
        v.insert_lane, dtype="u16", length=128)
    for kind, bits, w in (("ps", 32, "W0"), ("pd", 64, "W1")):
        wide(f"vcompress{kind}", "w:v/m r:v", f"avx512f MR EVEX.L.66.0F38.{w} 8A /r", g.copy, f"u{bits}",
             disp8_bits=bits,
             packing="compress")
        wide(f"vexpand{kind}", "w:v r:v/m", f"avx512f RM EVEX.L.66.0F38.{w} 88 /r", g.copy, f"u{bits}", disp8_bits=bits,
             packing="expand")
    for letter, bits, w in (("d", 32, "W0"), ("q", 64, "W1")):
        wide(f"vpcompress{letter}", "w:v/m r:v", f"avx512f MR EVEX.L.66.0F38.{w} 8B /r", g.copy, f"u{bits}",
             disp8_bits=bits,
             packing="compress")
        wide(f"vpexpand{letter}", "w:v r:v/m", f"avx512f RM EVEX.L.66.0F38.{w} 89 /r", g.copy, f"u{bits}",
             disp8_bits=bits,
             packing="expand")


def _gathers() -> None:
    """Indices of 32 (d) or 64 (q) bits, elements of 32 or 64; the shorter of the two takes half a register."""
    for prefix, elements, base in (("v", (("ps", 32, "W0"), ("pd", 64, "W1")), (0x92, 0xA2)),
                                   ("vp", (("d", 32, "W0"), ("q", 64, "W1")), (0x90, 0xA0))):
        for index_letter, index_bits, step in (("d", 32, 0), ("q", 64, 1)):
            for suffix, bits, w in elements:
                register = "h" if index_bits > bits else "v"
                index = "h" if index_bits < bits else "v"
                name = f"{prefix}gather{index_letter}{suffix}"
                gather, scatter = f"{base[0] + step:X}", f"{base[1] + step:X}"
                wide(f"{name}.vex", f"rw:{register} r:vm{bits}{index} rw:{register}",
                     f"avx2 RmV VEX.L.66.0F38.{w} {gather} /r", v.gather_by_vector, f"u{bits}", lengths=(128, 256))
                wide(name, f"rw:{register} r:vm{bits}{index}", f"avx512f Rm EVEX.L.66.0F38.{w} {gather} /r", v.second,
                     f"u{bits}", masking="required")
                wide(f"{prefix}scatter{index_letter}{suffix}", f"w:vm{bits}{index} r:{register}",
                     f"avx512f mR EVEX.L.66.0F38.{w} {scatter} /r", g.copy, f"u{bits}", masking="required")


# --- Opmasks ---------------------------------------------------------------------------------------------------------

def _masks() -> None:
    for letter, size, code, feature in (("b", 8, "66.0F.W0", "avx512dq"), ("w", 16, "0F.W0", "avx512f"),
                                        ("d", 32, "66.0F.W1", "avx512bw"), ("q", 64, "0F.W1", "avx512bw")):
        general = {"b": "66.0F.W0", "w": "0F.W0", "d": "F2.0F.W0", "q": "F2.0F.W1"}[letter]
        register = f"r{max(32, size)}"
        row(f"kmov{letter}", f"w:k/m{size} r:k/m{size}",
            f"{feature} RM VEX.L0.{code} 90 /r | {feature} mR VEX.L0.{code} 91 /r", g.low_bits(size))
        row(f"kmov{letter}.to_mask", f"w:k r:{register}", f"{feature} RU VEX.L0.{general} 92 /r", g.low_bits(size))
        row(f"kmov{letter}.from_mask", f"w:{register} r:k", f"{feature} RU VEX.L0.{general} 93 /r", g.low_bits(size))
        for mnemonic, opcode, operation in (
                ("kand", "41", lambda a, b: a & b), ("kandn", "42", lambda a, b: ~a & b),
                ("kor", "45", lambda a, b: a | b),
                ("kxnor", "46", lambda a, b: ~(a ^ b)), ("kxor", "47", lambda a, b: a ^ b),
                ("kadd", "4A", lambda a, b: a + b)):
            needed = "avx512dq" if mnemonic == "kadd" and size == 16 else feature
            row(mnemonic + letter, "w:k r:k r:k", f"{needed} RVU VEX.L1.{code} {opcode} /r",
                g.mask_binary(operation, size))
        row(f"knot{letter}", "w:k r:k", f"{feature} RU VEX.L0.{code} 44 /r", g.mask_invert(size))
        row(f"kortest{letter}", "r:k r:k", f"{feature} RU VEX.L0.{code} 98 /r", g.mask_test_zero(size),
            flags_written=FLAGS)
        row(f"ktest{letter}", "r:k r:k", f"{'avx512dq' if size == 16 else feature} RU VEX.L0.{code} 99 /r",
            g.mask_test_common(size), flags_written=FLAGS)
        w = "W1" if letter in "wq" else "W0"
        upper = size >= 32
        row(f"kshiftl{letter}", "w:k r:k r:i8", f"{feature} RUI VEX.L0.66.0F3A.{w} {'33' if upper else '32'} /r ib",
            g.mask_shift(size, True))
        row(f"kshiftr{letter}", "w:k r:k r:i8", f"{feature} RUI VEX.L0.66.0F3A.{w} {'31' if upper else '30'} /r ib",
            g.mask_shift(size, False))
    for mnemonic, code, half, feature in (("kunpckbw", "66.0F.W0", 8, "avx512f"), ("kunpckwd", "0F.W0", 16, "avx512bw"),
                                          ("kunpckdq", "0F.W1", 32, "avx512bw")):
        row(mnemonic, "w:k r:k r:k", f"{feature} RVU VEX.L1.{code} 4B /r", g.mask_unpack(half))
    for letter, bits in _LETTER_BITS:
        feature, w = ("avx512dq" if bits >= 32 else "avx512bw"), ("W1" if letter in "wq" else "W0")
        to_vector, to_mask = ("38", "39") if bits >= 32 else ("28", "29")
        wide(f"vpmovm2{letter}", "w:v r:k", f"{feature} RU EVEX.L.F3.0F38.{w} {to_vector} /r",
             lambda length, bits=bits: v.from_mask(length // bits, bits), f"u{bits}", masking="",
             by_length=True)
        wide(f"vpmov{letter}2m", "w:k r:v", f"{feature} RU EVEX.L.F3.0F38.{w} {to_mask} /r", v.top_bit, f"u{bits}",
             masking="")


# --- Tiles (AMX) -----------------------------------------------------------------------------------------------------

def _tiles() -> None:
    state = (tiles.CONFIGURATION, *tiles.EVERY_TILE)
    configured = (tiles.CONFIGURATION,)
    row("ldtilecfg", "r:m512.u8", "amx_tile m VEX.128.NP.0F38.W0 49 /0", tiles.load_configuration,
        implicit_writes=state, side_effects=True)
    row("sttilecfg", "w:m512.u8", "amx_tile m VEX.128.66.0F38.W0 49 /0", tiles.keep, implicit_reads=configured)
    row("tilerelease", "", "amx_tile - VEX.128.NP.0F38.W0 49 /0", tiles.release, implicit_writes=state,
        side_effects=True)
    row("tilezero", "w:t", "amx_tile R VEX.128.F2.0F38.W0 49 /r", tiles.zero, implicit_reads=configured)
    for mnemonic, prefix in (("tileloadd", "F2"), ("tileloaddt1", "66")):
        row(mnemonic, "w:t r:sibmem", f"amx_tile Rm VEX.128.{prefix}.0F38.W0 4B /r", tiles.keep,
            implicit_reads=configured)
    row("tilestored", "w:sibmem r:t", "amx_tile mR VEX.128.F3.0F38.W0 4B /r", tiles.keep, implicit_reads=configured)
    for mnemonic, prefix, opcode, feature, meaning in (
            ("tdpbf16ps", "F3", "5C", "amx_bf16", fp.tile_dot_bf16), ("tdpfp16ps", "F2", "5C", "amx_fp16",
                                                                     fp.tile_dot_f16),
            ("tdpbssd", "F2", "5E", "amx_int8", tiles.dot_integers("i1", "i1")),
            ("tdpbsud", "F3", "5E", "amx_int8", tiles.dot_integers("i1", "u1")),
            ("tdpbusd", "66", "5E", "amx_int8", tiles.dot_integers("u1", "i1")),
            ("tdpbuud", "NP", "5E", "amx_int8", tiles.dot_integers("u1", "u1"))):
        row(mnemonic, "rw:t r:t r:t", f"amx_tile+{feature} RUV VEX.128.{prefix}.0F38.W0 {opcode} /r", meaning,
            implicit_reads=configured)


for _family in (_integer_arithmetic, _integer_moves, _control, _system, _moves, _broadcasts, _float_arithmetic,
                _float_rest,
                _conversions, _vector_integers, _compares, _shifts, _shuffles, _gathers, _masks, _tiles):
    _family()
