"""Selection of x86-64 for fp8: rows of f32 from e4m3 or e5m2 in memory, and back.

See select.py. Both ways go by f16, whose conversions every target here has (F16C), and which holds all values exactly:
  e5m2 is the upper byte of f16 (5 bits of exponent, bias 15);
  e4m3 in f16's place is 2**-8 of the number (bias 7 against 15), gradual underflow included.
So the words are right after a shift, with no denormal f32 on the way (for which some processors take a hundred cycles).
A number is rounded in f32 first: adding the power of two whose last place is fp8's at that exponent, and taking it off
again, rounds to nearest even. Where AVX-512 takes bytes from lanes of 32 bits, e4m3 needs no f16: the sum's last places
count, and with what the exponent adds they are the code. Source: OCP 8-bit Floating Point Specification, 2023; Intel
SDM volume 2.
"""

from __future__ import annotations

import struct
from typing import Any

from ...ir.nodes import Op
from .select_common import Key

FLOAT8 = frozenset({"f8e4m3", "f8e5m2"})

# e4m3: NaN is all ones and there is no infinity. A code whose sign is extended has it in bit 14 of its word, too. The
# word and 0x80 have another bit 14 than the word just where that is to be set: of negative numbers, whose bit 14 stays
# set unless 0x80 carries through, and of NaN, which makes f16's NaN.
_CARRY: Key = ("s", 4, 0x00800080)
_BIT_14: Key = ("s", 4, 0x40004000)
_SCALE: Key = ("s", 4, (127 + 8) << 23)
_UNSCALE: Key = ("s", 4, (127 - 8) << 23)
_TOO_LARGE: Key = ("s", 4, 0x43F00000)
"""480: what would follow 448, and is NaN."""
_COUNTING: Key = ("s", 4, ((23 - 3) << 23) + 56)
"""From an exponent e to the power that rounds e4m3 there, and 56 of its last place: with n of them more, 8 to 16 for
normal numbers, and the exponent's own 8 * (e + 127), this is 8 * (e + 6) + n, the code, in a byte."""
_CODE: Key = ("s", 4, 0x7F)
_LOW_BYTES: Key = ("s", 4, 0x007F007F)

_SIGN: Key = ("s", 4, 0x80000000)
_MAGNITUDE: Key = ("s", 4, 0x7FFFFFFF)
_EXPONENT: Key = ("s", 4, 0x7F800000)
_LEAST: dict[str, Key] = {"f8e4m3": ("s", 4, (127 - 6) << 23), "f8e5m2": ("s", 4, (127 - 14) << 23)}
"""The least normal number."""
_PLACES: dict[str, Key] = {"f8e4m3": ("s", 4, (23 - 3) << 23), "f8e5m2": ("s", 4, (23 - 2) << 23)}
"""From an exponent to that of the power of two which rounds there."""
_MOST: Key = ("s", 4, (127 + 17) << 23)
"""Above all of e5m2; the power that rounds is still finite."""

UNPACKING: dict[str, tuple[Key, ...]] = {"f8e4m3": (_CARRY, _BIT_14, _SCALE), "f8e5m2": ()}
ROUNDING: dict[str, tuple[Key, ...]] = {
    name: (_SIGN, _MAGNITUDE, _EXPONENT, _LEAST[name], _PLACES[name],
           *((_TOO_LARGE, _UNSCALE, _LOW_BYTES) if name == "f8e4m3" else (_MOST,)))
    for name in sorted(FLOAT8)}


def packing_constants(s: Any, name: str) -> tuple[Key, ...]:
    if s.facts.opmask and name == "f8e4m3":
        return _MAGNITUDE, _TOO_LARGE, _EXPONENT, _LEAST[name], _COUNTING, _CODE
    return ROUNDING[name]


def _word_bits(s: Any) -> int:
    """Register bits of a row's words."""
    return int(max(128, s.facts.bits4 // 2))


def unpack(s: Any, name: str, register: Any, source: Any, on: Any = None) -> None:
    """Bytes, one a lane, to a row of f32; under an opmask the others become 0. source: a register, or memory of at
    least 8 bytes."""
    width = _word_bits(s)
    words = s.new("vec")
    extend = f"vpmov{'s' if name == 'f8e4m3' else 'z'}xbw.{width}"
    if on is not None:
        s.emit_masked(extend, on, True, words, source)
    else:
        s.emit(extend, words, source)
    shifted = s.new("vec")
    s.emit(f"vpsllw.imm.{width}", shifted, words, 7 if name == "f8e4m3" else 8)
    _from_words(s, name, register, shifted)


def _from_words(s: Any, name: str, register: Any, words: Any) -> None:
    """f16 words, where bit 14 is the sign or clear for e4m3, to the numbers."""
    if name == "f8e4m3":
        words = _with_nan(s, words, _word_bits(s))
    _from_halves(s, name, register, words)


def _with_nan(s: Any, words: Any, width: int) -> Any:
    """Such words of e4m3 as f16."""
    carried = s.new("vec")
    s.emit(f"vpaddw.{width}", carried, words, s.constant(_CARRY))
    if s.facts.opmask:
        s.emit(f"vpternlogd.{width}", words, carried, s.constant(_BIT_14), 0x78)  # words ^ (carried & bit 14)
        return words
    bit, made = s.new("vec"), s.new("vec")
    s.emit(f"vpand.{width}", bit, carried, s.constant(_BIT_14))
    s.emit(f"vpxor.{width}", made, words, bit)
    return made


def _from_halves(s: Any, name: str, register: Any, halves: Any) -> None:
    """f16 to the numbers."""
    bits, scaled = s.facts.bits4, s.new("vec") if name == "f8e4m3" else register
    s.emit(f"vcvtph2ps.{bits}", scaled, halves)
    if name == "f8e4m3":
        s.emit(f"vmulps.{bits}", register, scaled, s.constant_operand(_SCALE))


def _to_words(s: Any, name: str, row: Any) -> Any:
    """f32 to f16 words of the nearest fp8 number, bit 14 clear for e4m3; what is too large for it is 480."""
    bits, letter = s.facts.bits4, "d" if s.facts.opmask else ""
    magnitude, power, total, rounded, words = (s.new("vec") for _ in range(5))
    s.emit(f"vpand{letter}.{bits}", magnitude, row, s.constant_operand(_MAGNITUDE))
    s.emit(f"vpand{letter}.{bits}", power, magnitude, s.constant_operand(_EXPONENT))
    least, most = s.new("vec"), power
    if name == "f8e5m2":
        most = s.new("vec")
        s.emit(f"vpminsd.{bits}", most, power, s.constant_operand(_MOST))
    s.emit(f"vpmaxsd.{bits}", least, most, s.constant_operand(_LEAST[name]))
    adder = s.new("vec")
    s.emit(f"vpaddd.{bits}", adder, least, s.constant_operand(_PLACES[name]))
    s.emit(f"vaddps.{bits}", total, magnitude, adder)
    s.emit(f"vsubps.{bits}", rounded, total, adder)
    if name == "f8e4m3":
        # vminps gives its second operand for NaN. Beyond 2**107 the power overflows: total, or the difference, is then
        # large, infinite or NaN, all of which become 480 here.
        bounded, scaled = s.new("vec"), s.new("vec")
        s.emit(f"vminps.{bits}", bounded, rounded, s.constant_operand(_TOO_LARGE))
        s.emit(f"vmulps.{bits}", scaled, bounded, s.constant_operand(_UNSCALE))
        rounded = scaled
    if s.facts.opmask:
        s.emit(f"vpternlogd.{bits}", rounded, row, s.constant_operand(_SIGN), 0xF8)  # rounded | row & sign
        signed = rounded
    else:
        sign, signed = s.new("vec"), s.new("vec")
        s.emit(f"vpand.{bits}", sign, row, s.constant_operand(_SIGN))
        s.emit(f"vpor.{bits}", signed, rounded, sign)
    s.emit(f"vcvtps2ph.{bits}", words, signed, 0)
    return words


def pack(s: Any, name: str, row: Any) -> Any:
    """f32 to words whose low bytes are the nearest fp8 numbers, the upper ones 0. e4m3 with opmasks: see counted."""
    width = _word_bits(s)
    words, high = _to_words(s, name, row), s.new("vec")
    s.emit(f"vpsrlw.imm.{width}", high, words, 8)
    if name == "f8e5m2":
        return high
    low, masked, sign, both = (s.new("vec") for _ in range(4))
    s.emit(f"vpsrlw.imm.{width}", low, words, 7)
    s.emit(f"vpand.{width}", masked, low, s.constant(_LOW_BYTES))
    s.emit(f"vpandn.{width}", sign, s.constant(_LOW_BYTES), high)
    s.emit(f"vpor.{width}", both, masked, sign)
    return both


def counted(s: Any, row: Any) -> Any:
    """f32 to lanes whose low bytes are the nearest e4m3 numbers; above these they have anything."""
    bits = s.facts.bits4
    magnitude, bounded, power, least, adder, total, steps, code, sign = (s.new("vec") for _ in range(9))
    s.emit(f"vpandd.{bits}", magnitude, row, s.constant_operand(_MAGNITUDE))
    s.emit(f"vpminsd.{bits}", bounded, magnitude, s.constant_operand(_TOO_LARGE))  # NaN, too
    s.emit(f"vpandd.{bits}", power, bounded, s.constant_operand(_EXPONENT))
    s.emit(f"vpmaxsd.{bits}", least, power, s.constant_operand(_LEAST["f8e4m3"]))
    s.emit(f"vpaddd.{bits}", adder, least, s.constant_operand(_COUNTING))
    s.emit(f"vaddps.{bits}", total, bounded, adder)
    s.emit(f"vpsrld.imm.{bits}", steps, least, 23 - 3)
    s.emit(f"vpaddd.{bits}", code, total, steps)
    s.emit(f"vpsrld.imm.{bits}", sign, row, 24)
    s.emit(f"vpternlogd.{bits}", code, sign, s.constant_operand(_CODE), 0xE4)  # code where the mask is set, else sign
    return code


def by_lanes(s: Any, name: str, row: Any) -> tuple[Any, str]:
    """f32 to a register, and the instruction that takes the nearest fp8 numbers from it as bytes, which may store them.
    Of targets with opmasks."""
    if name == "f8e4m3":
        return counted(s, row), f"vpmovdb.{s.facts.bits4}"
    return pack(s, name, row), f"vpmovwb.{_word_bits(s)}"


def packed_bytes(s: Any, name: str, row: Any) -> Any:
    """f32 to bytes, one a lane, in the low part of a register."""
    made = s.new("vec")
    if s.facts.opmask:
        register, instruction = by_lanes(s, name, row)
        s.emit(instruction, made, register)
    else:
        words = pack(s, name, row)
        s.emit("vpackuswb.128", made, words, words)
    return made


def round_row(s: Any, name: str, register: Any, row: Any) -> None:
    """f32 to the nearest number of fp8, as f32."""
    _from_words(s, name, register, _to_words(s, name, row))


# 16 numbers of e4m3 at once (AVX2), where denormals are quick: the 7 bits below the sign, moved to where f32 has its
# exponent and mantissa, are the number times 2**-120, gradual underflow included, and a product mends that. Both halves
# of a register have all 16 bytes, of which a lane takes two, to the upper halves of its words; words are bf16 then,
# once a shift has brought copies of the sign in between and these are cleared. 10 operations for 16 numbers in place of
# 16. Where neither NaN nor the product is wanted, nor the order (lane/float8_sums.py), 4: products of bytes, of two the
# one by 16 and the other by 0, widen and move them at once, the even ones in one half and the odd ones in the other.

_TWO_ROWS: Key = ("d", bytes(byte for lane in range(8) for byte in (0x80, lane, 0x80, 8 + lane)))
_SIGN_AND_CODE: Key = ("s", 4, 0x87F087F0)
_TWICE_NAN: Key = ("s", 4, 0xFE00FE00)
"""A word of NaN, whose lower byte is 0, times 2."""
_RAISE: Key = ("s", 4, (127 + 120) << 23)
_SIXTEEN_TIMES: Key = ("d", bytes((16, 0) * 8 + (0, 16) * 8))
_SIGN_AND_NUMBER: Key = ("s", 4, 0x87F00000)
_UPPER_WORD: Key = ("s", 4, 0xFFFF0000)
_BY_HALVES: tuple[Key, ...] = (_TWO_ROWS, _SIGN_AND_CODE, _RAISE, _TWICE_NAN, _UPPER_WORD)


def _widen_half(s: Any, op: Op) -> None:
    words, twice, nan, moved, some, made, low, high = (s.new("vec") for _ in range(8))
    if op.attributes.get("scaled"):
        s.emit("vpmaddubsw.256", words, s.constant(_SIXTEEN_TIMES), s.operand(op.operands[0]))
        s.emit("vpslld.imm.256", moved, words, 16)
        s.emit("vpand.256", s.define(op.results[0]), moved, s.constant_operand(_SIGN_AND_NUMBER))
        s.emit("vpand.256", s.define(op.results[1]), words, s.constant_operand(_SIGN_AND_NUMBER))
        return
    s.emit("vpshufb.256", words, s.operand(op.operands[0]), s.constant_operand(_TWO_ROWS))
    s.emit("vpaddw.256", twice, words, words)
    s.emit("vpcmpeqw.256", nan, twice, s.constant_operand(_TWICE_NAN))
    s.emit("vpsraw.imm.256", moved, words, 4)
    s.emit("vpand.256", some, moved, s.constant_operand(_SIGN_AND_CODE))
    s.emit("vpor.256", made, some, nan)
    s.emit("vpslld.imm.256", low, made, 16)
    s.emit("vpand.256", high, made, s.constant_operand(_UPPER_WORD))
    for result, row in zip(op.results, (low, high), strict=True):
        s.emit("vmulps.256", s.define(result), row, s.constant_operand(_RAISE))


# A register of 64 numbers at once (AVX512_VBMI). VPERMI2B finds a byte among 128 by 7 bits: the two bytes of a bf16
# number, which holds all of fp8 exactly, by the code without its sign. Then the bytes are put together, and two numbers
# are taken from each lane, the lower by a shift. The codes are put in the order that this undoes first. 10 instructions
# for 64 numbers, where 16 at a time need 24.


def _upper_halves(mantissa: int, bias: int, first_special: int, infinite: bool) -> list[int]:
    """The bf16 bits of codes 0 ... 127."""
    found = []
    for code in range(128):
        exponent, fraction = code >> mantissa, code & (1 << mantissa) - 1
        if code >= first_special:
            number = float("inf") if infinite and not fraction else float("nan")
        elif exponent:
            number = (1 + fraction / (1 << mantissa)) * 2.0 ** (exponent - bias)
        else:
            number = fraction / (1 << mantissa) * 2.0 ** (1 - bias)
        found.append(struct.unpack("<I", struct.pack("<f", number))[0] >> 16)
    return found


def _tables(halves: list[int]) -> tuple[Key, ...]:
    """Registers with the upper bytes, then the lower ones."""
    parts = (bytes(h >> 8 for h in halves), bytes(h & 255 for h in halves))
    return tuple(("d", part[start : start + 64]) for part in parts for start in (0, 64))


_TABLES = {"f8e4m3": _tables(_upper_halves(3, 7, 0x7F, False)), "f8e5m2": _tables(_upper_halves(2, 15, 0x7C, True))}
_ORDER: Key = ("d", bytes(16 * row + 4 * quarter + lane for quarter in range(4) for first in (0, 2)
                          for lane in range(4) for row in (first, first + 1)))
"""Joining bytes takes the lower, then the upper half of each quarter: lane by lane, those of two rows."""
_BYTE_SIGNS: Key = ("s", 4, 0x80808080)
_UPPER_HALF: Key = ("s", 4, 0xFFFF0000)
_BY_TABLES = {name: (_ORDER, t[0], t[2], t[1], t[3], _UPPER_HALF, _BYTE_SIGNS) for name, t in _TABLES.items()}
"""Those first that no memory operand can be."""

# Without them, where instructions of 512 bits go to two pipes: 32 words at once, to which codes are widened by joining
# bytes, 0 below. That takes the lower, then the upper half of each quarter, so rows 0 and 1 are put into lower halves
# first. 19 instructions for 64 numbers, where 16 at a time need 24, which take the same pipes though most are of 256
# bits.
_QUARTERS: Key = ("d", struct.pack("<8Q", 0, 4, 1, 5, 2, 6, 3, 7))
_ZERO: Key = ("s", 4, 0)
_BY_WORDS: dict[str, tuple[Key, ...]] = {name: (_QUARTERS, _ZERO, *UNPACKING[name]) for name in UNPACKING}


def widening_constants(s: Any, op: Op) -> tuple[Key, ...]:
    if len(op.results) == 2:
        return (_SIXTEEN_TIMES, *(_SIGN_AND_NUMBER,) * 2) if op.attributes.get("scaled") else _BY_HALVES
    return (_BY_TABLES if "avx512_vbmi" in s.facts.features else _BY_WORDS)[op.attributes["dtype"].name]


def widen_register(s: Any, op: Op) -> None:
    if len(op.results) == 2:
        _widen_half(s, op)
        return
    if "avx512_vbmi" in s.facts.features:
        _widen_by_tables(s, op)
        return
    name = op.attributes["dtype"].name
    codes = s.new("vec")
    s.emit("vpermq.512", codes, s.constant(_QUARTERS), s.operand(op.operands[0]))
    for first, half in ((0, "l"), (2, "h")):
        words, upper = s.new("vec"), s.new("vec")
        s.emit(f"vpunpck{half}bw.512", words, s.constant(_ZERO), codes)
        if name == "f8e4m3":
            shifted = s.new("vec")
            s.emit("vpsraw.imm.512", shifted, words, 1)
            words = _with_nan(s, shifted, 512)
        s.emit("vextracti64x4.512", upper, words, 1)
        _from_halves(s, name, s.define(op.results[first]), words)
        _from_halves(s, name, s.define(op.results[first + 1]), upper)


def _widen_by_tables(s: Any, op: Op) -> None:
    upper_low, upper_high, lower_low, lower_high = _TABLES[op.attributes["dtype"].name]
    codes, upper, lower = s.new("vec"), s.new("vec"), s.new("vec")
    s.emit("vpermb.512", codes, s.constant(_ORDER), s.operand(op.operands[0]))
    for made, low, high in ((upper, upper_low, upper_high), (lower, lower_low, lower_high)):
        s.emit("vmovaps.512", made, codes)
        s.emit("vpermi2b.512", made, s.constant(low), s.constant_operand(high))
    s.emit("vpternlogd.512", upper, codes, s.constant_operand(_BYTE_SIGNS), 0xF8)
    for first, half in ((0, "l"), (2, "h")):
        both = s.new("vec")
        s.emit(f"vpunpck{half}bw.512", both, lower, upper)
        s.emit("vpslld.imm.512", s.define(op.results[first]), both, 16)
        s.emit("vpandd.512", s.define(op.results[first + 1]), both, s.constant_operand(_UPPER_HALF))
