"""The instruction table of RISC-V: one row for each instruction form that generated code uses.

Leaves: `table(VLEN)`, name -> `Row`. What the strings mean is said at the head of rows.py. Rows of vectors whose
elements the processor has to be set to end with them: `vadd.vv.e32`. Rows without a word stand for several
instructions, which settle.py puts in their place.
Source: RISC-V Instruction Set Manual, Volume I: chapters 2, 13, 14, 20, 21, 28 and 30, and 35 (RV32/64G Instruction Set
Listings).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from . import meaning as m
from .registers import LINK, PAIR, STACK
from .rows import ANY, Row

Meaning = Callable[..., Any]
_SYSTEM_CALL = 17
_V, _HALF, _VECTOR_HALF, _BITS, _BLOCKS = (frozenset({name}) for name in ("v", "zfhmin", "zvfhmin", "zbb", "zicbop"))


class _Table:
    """Rows of processors with vector registers of so many bits, made in groups."""

    def __init__(self, vector_bits: int) -> None:
        self.rows: dict[str, Row] = {}
        self.vector_bits = vector_bits
        self.lanes = vector_bits // 32

    def row(self, name: str, syntax: str, word: str, meaning: Meaning | None, cost: str, **more: Any) -> None:
        if name in self.rows:
            raise ValueError(f"row {name}: found two; expected one")
        self.rows[name] = Row(name, syntax, word, meaning, cost, **more)

    # --- General registers --------------------------------------------------------------------------------------------

    def arithmetic(self) -> None:
        meaning: Meaning
        row = self.row
        row("li", "li <Xd>, <#i>", "", m.number, "alu")
        row("lui", "lui <Xd>, <#u>", "uuuuuuuuuuuuuuuuuuuu ddddd 0110111", m.upper, "alu")
        row("li.short", "li <Xd>, <#i>", "iiiiiiiiiiii 00000 000 ddddd 0010011", m.number, "alu")
        row("mv", "mv <Xd>, <Xs>", "000000000000 sssss 000 ddddd 0010011", m.same, "alu")
        row("addiw", "addiw <Xd>, <Xs>, <#i>", "iiiiiiiiiiii sssss 000 ddddd 0011011", m.add_word, "alu")
        for name, code, meaning in (("addi", "000", m.add), ("xori", "100", m.bit_xor), ("ori", "110", m.bit_or),
                                    ("andi", "111", m.bit_and), ("slti", "010", m.less)):
            row(name, f"{name} <Xd>, <Xs>, <#i>", f"iiiiiiiiiiii sssss {code} ddddd 0010011", meaning, "alu")
        for name, high, code, meaning, cost, features in (
                ("add", "0000000", "000", m.add, "alu", frozenset()),
                ("sub", "0100000", "000", m.subtract, "alu", frozenset()),
                ("sll", "0000000", "001", m.shift_left, "alu", frozenset()),
                ("slt", "0000000", "010", m.less, "alu", frozenset()),
                ("xor", "0000000", "100", m.bit_xor, "alu", frozenset()),
                ("srl", "0000000", "101", m.shift_right, "alu", frozenset()),
                ("sra", "0100000", "101", m.shift_right_signed, "alu", frozenset()),
                ("or", "0000000", "110", m.bit_or, "alu", frozenset()),
                ("and", "0000000", "111", m.bit_and, "alu", frozenset()),
                ("mul", "0000001", "000", m.multiply, "mul", frozenset()),
                ("div", "0000001", "100", m.divide, "div", frozenset()),
                ("rem", "0000001", "110", m.remainder, "div", frozenset()),
                ("min", "0000101", "100", m.smaller_number, "alu", _BITS),
                ("max", "0000101", "110", m.larger_number, "alu", _BITS)):
            row(name, f"{name} <Xd>, <Xs>, <Xt>", f"{high} ttttt sssss {code} ddddd 0110011", meaning, cost,
                features=features)
        for name, high, code, meaning in (("slli", "000000", "001", m.shift_left),
                                          ("srli", "000000", "101", m.shift_right),
                                          ("srai", "010000", "101", m.shift_right_signed)):
            row(name, f"{name} <Xd>, <Xs>, <#u>", f"{high} uuuuuu sssss {code} ddddd 0010011", meaning, "alu")
        row("max.zero", "max <Xd>, <Xs>, zero", "0000101 00000 sssss 110 ddddd 0110011", m.positive, "alu",
            features=_BITS)
        row("seqz", "seqz <Xd>, <Xs>", "000000000001 sssss 011 ddddd 0010011", m.is_zero, "alu")
        row("snez", "snez <Xd>, <Xt>", "0000000 ttttt 00000 011 ddddd 0110011", m.is_not_zero, "alu")
        row("neg", "neg <Xd>, <Xt>", "0100000 ttttt 00000 000 ddddd 0110011", m.negate, "alu")

    def control(self) -> None:
        row, vectors = self.row, tuple(("vec", n) for n in range(32))
        row("j", "j <label>", "jjjjjjjjjjjjjjjjjjjj 00000 1101111", None, "branch", control="jump")
        for name, code in (("beq", "000"), ("bne", "001"), ("blt", "100"), ("bge", "101")):
            row(name, f"{name} <Xs>, <Xt>, <label>", f"bbbbbbb ttttt sssss {code} bbbbb 1100011", None, "branch",
                control="branch")
            row(f"{name}z", f"{name}z <Xs>, <label>", f"bbbbbbb 00000 sssss {code} bbbbb 1100011", None, "branch",
                control="branch")
        for name, code in (("bgtz", "100"), ("blez", "101")):
            row(name, f"{name} <Xt>, <label>", f"bbbbbbb ttttt 00000 {code} bbbbb 1100011", None, "branch",
                control="branch")
        row("ret", "ret", "000000000000 00001 000 00000 1100111", None, "branch", control="return")
        # Linux keeps no vector registers through a call of the system.
        row("ecall", "ecall", "000000000000 00000 000 00000 1110011", None, "system", side_effects=True,
            implicit_reads=tuple(("gpr", n) for n in (*range(10, 16), _SYSTEM_CALL)),
            implicit_writes=(("gpr", 10), *vectors))
        row("pause", "pause", "000000010000 00000 000 00000 0001111", None, "hint", side_effects=True)
        row("fence", "fence rw, rw", "000000110011 00000 000 00000 0001111", None, "hint", side_effects=True)
        # For what calls functions: the address is in a register, the return address goes to ra.
        row("jalr", "jalr <Xs>", "000000000000 sssss 000 00001 1100111", None, "branch", side_effects=True,
            implicit_writes=(("gpr", LINK),))

    # --- Memory -------------------------------------------------------------------------------------------------------

    def memory(self) -> None:
        row, meaning = self.row, m.loaded(64)
        for name, code, meaning, bits in (
                ("lb", "000", m.loaded(8, True), 8), ("lh", "001", m.loaded(16, True), 16),
                ("lw", "010", m.loaded(32, True), 32), ("ld", "011", m.loaded(64), 64), ("lbu", "100", m.loaded(8), 8),
                ("lhu", "101", m.loaded(16), 16), ("lwu", "110", m.loaded(32), 32)):
            row(name, f"{name} <Xd>, <mem>", f"mmmmmmmmmmmm sssss {code} ddddd 0000011", meaning, "load",
                memory_bits=bits)
        for name, code, bits in (("sb", "000", 8), ("sh", "001", 16), ("sw", "010", 32), ("sd", "011", 64)):
            row(name, f"{name} <Xt>, <mem=>", f"mmmmmmm ttttt sssss {code} mmmmm 0100011", m.stored(bits), "store",
                memory_bits=bits)
        for letter, code, bits in (("h", "001", 16), ("w", "010", 32), ("d", "011", 64)):
            features = _HALF if letter == "h" else frozenset()
            row(f"fl{letter}", f"fl{letter} <Fd>, <mem>", f"mmmmmmmmmmmm sssss {code} ddddd 0000111", m.boxed(bits),
                "load", memory_bits=bits, features=features)
            row(f"fs{letter}", f"fs{letter} <Ft>, <mem=>", f"mmmmmmm ttttt sssss {code} mmmmm 0100111", m.stored(bits),
                "store", memory_bits=bits, features=features)
        for name, code in (("r", "00001"), ("w", "00011")):
            row(f"prefetch.{name}", f"prefetch.{name} <mem&>", f"mmmmmmm {code} sssss 110 00000 0010011", None, "hint",
                memory_bits=512, side_effects=True, features=_BLOCKS)
        for letter, code, bits in (("w", "010", 32), ("d", "011", 64)):
            row(f"amoadd.{letter}", f"amoadd.{letter}.aqrl <Xd>, <Xt>, <mem+>",
                f"0000011 ttttt sssss {code} ddddd 0101111", m.added_to(bits), "atomic", memory_bits=bits,
                side_effects=True)
        # The frame.
        row("add.stack", "add <Xd+>, sp, <#i>", "", None, "alu")
        row("sub.stack", "sub <Xd+>, sp, <#i>", "", None, "alu")
        row("and.stack", "andi <Xd+>, sp, <#i>", f"iiiiiiiiiiii {STACK:05b} 111 ddddd 0010011", m.bit_and, "alu")
        stack: dict[str, Any] = {"implicit_reads": (("gpr", STACK),), "implicit_writes": (("gpr", STACK),),
                                 "side_effects": True}
        for kind, letter in (("gpr", "X"), ("fpr", "F")):
            row(f"push.{kind}", f"push <{letter}t>", "", None, "store", **stack)
            row(f"pop.{kind}", f"pop <{letter}d>", "", None, "load", **stack)

    def floats(self) -> None:
        row = self.row
        row("fmv.d", "fmv.d <Fd>, <Fs>", "0010001 SSSSS sssss 000 ddddd 1010011", m.same, "fadd")
        row("fmv.w.x", "fmv.w.x <Fd>, <Xs>", "1111000 00000 sssss 000 ddddd 1010011", m.boxed(32), "to float")
        row("fmv.d.x", "fmv.d.x <Fd>, <Xs>", "1111001 00000 sssss 000 ddddd 1010011", m.same, "to float")
        row("fcvt.s.h", "fcvt.s.h <Fd>, <Fs>", "0100000 00010 sssss 000 ddddd 1010011", m.half_to_single, "fadd",
            features=_HALF)
        # A number of so many bits in a float register.
        row("fconst.32", "fli.s <Fd>, <#i>", "", m.boxed(32), "to float")
        row("fconst.64", "fli.d <Fd>, <#i>", "", m.number, "to float")

    # --- Vectors ------------------------------------------------------------------------------------------------------

    def vector(self, name: str, syntax: str, head: str, t: str, s: str, form: str, meaning: Meaning | None, cost: str,
               dtypes: str = "", element: int = 0, opcode: str = "1010111", **more: Any) -> None:
        """head: the first seven bits. t, s: fields vs2 and vs1, or what stands there. form: funct3."""
        fields = {"t": "ttttt", "s": "sssss", "i": "iiiii", "u": "uuuuu", "": "00000"}
        self.row(name + (f".e{element}" if element > 0 else ""), syntax,
                 f"{head} {fields.get(t, t)} {fields.get(s, s)} {form} ddddd {opcode}", meaning, cost, dtypes=dtypes,
                 element=element, vector_bits=self.vector_bits, **{"features": _V, **more})

    def three(self, name: str, code: str, ways: str, dtype: str, meaning: Meaning, cost: str,
              of_products: bool = False, result: str = "") -> None:
        """A row with the second operand as each of `ways` has it (v, x, i, u, f), for elements of 32 and 64 bits."""
        for bits in (32, 64):
            kind = f"{dtype}{bits}"
            made = result or kind
            for way in ways:
                operand = {"v": "<Vs>", "x": "<Xs>", "i": "<#i>", "u": "<#u>", "f": "<Fs>"}[way]
                form = {"v": "000", "x": "100", "i": "011", "u": "011", "f": "101"}[way]
                if of_products or dtype == "f":
                    form = {"v": "001", "f": "101", "x": "110"}[way]
                    form = "010" if form == "001" and dtype != "f" else form
                of = {"v": meaning, "f": m.by_float(meaning)}.get(way, m.by_number(meaning))
                full = f"{name}.v{way.replace('u', 'i')}"
                self.vector(full, f"{full} <Vd>, <Vt>, {operand}", f"{code}1", "t", way if way in "iu" else "s",
                            form, of, cost, f"{made} {kind}" + (f" {kind}" if way == "v" else ""), bits)

    def sums(self, name: str, code: str, scalar: str, dtype: str, meaning: Meaning, cost: str) -> None:
        """Multiply-adds whose destination is the sum, or a factor."""
        for bits in (32, 64):
            kind = f"{dtype}{bits}"
            row, spread = ("001", "101") if dtype == "f" else ("010", "110")
            self.vector(f"{name}.vv", f"{name}.vv <Vd+>, <Vs>, <Vt>", f"{code}1", "t", "s", row, meaning, cost,
                        f"{kind} {kind} {kind}", bits)
            number = m.scalar_between(meaning, m.float_row if dtype == "f" else m.number_row)
            self.vector(f"{name}.v{scalar}", f"{name}.v{scalar} <Vd+>, <{scalar.upper()}s>, <Vt>", f"{code}1", "t", "s",
                        spread, number, cost, f"{kind} {kind}", bits)

    def one(self, name: str, code: str, place: str, form: str, pairs: tuple[tuple[int, str, str], ...],
            meaning: Callable[[str], Meaning], cost: str, apart: bool = False, **more: Any) -> None:
        """A row of one operand. pairs: elements, dtype of the result, of the operand. apart: the result may not be in
        the operand's register, so it is one that was there before (`undefined`)."""
        for element, made, taken in pairs:
            self.vector(name, f"{name} <Vd{'+' * apart}>, <Vt>", f"{code}1", "t", place, form, meaning(made), cost,
                        f"{made} {taken}", element, **more)

    def vector_integers(self) -> None:
        three = self.three
        three("vadd", "000000", "vxi", "i", m.add_rows, "vector")
        three("vsub", "000010", "vx", "i", m.subtract_rows, "vector")
        three("vrsub", "000011", "xi", "i", m.subtract_from, "vector")
        three("vmin", "000101", "vx", "i", m.smaller, "vector")
        three("vmax", "000111", "vx", "i", m.larger, "vector")
        three("vand", "001001", "vxi", "u", m.bit_and, "vector")
        three("vor", "001010", "vxi", "u", m.bit_or, "vector")
        three("vxor", "001011", "vxi", "u", m.bit_xor, "vector")
        three("vsll", "100101", "vxu", "u", m.shift_left_rows, "vector")
        three("vsrl", "101000", "vxu", "u", m.shift_right_rows, "vector")
        three("vsra", "101001", "vxu", "i", m.shift_right_rows, "vector")
        three("vmseq", "011000", "vxi", "i", m.equal, "vector", result="m")
        three("vmsne", "011001", "vxi", "i", m.unequal, "vector", result="m")
        three("vmslt", "011011", "vx", "i", m.below, "vector", result="m")
        three("vmsle", "011101", "vxi", "i", m.at_most, "vector", result="m")
        three("vmsgt", "011111", "xi", "i", m.above, "vector", result="m")
        three("vmul", "100101", "vx", "i", m.multiply_rows, "vector mul", True)
        three("vdiv", "100001", "v", "i", m.divide_rows, "vector div", True)
        three("vrem", "100011", "v", "i", m.remainder_rows, "vector div", True)
        self.sums("vmacc", "101101", "x", "i", m.multiply_add, "vector mul")
        for bits in (32, 64):
            self.vector("vadd.vi.masked", "vadd.vi <Vd+>, <Vt>, <#i>, v0.t", "0000000", "t", "i", "011",
                        m.masked(m.by_number(m.add_rows)), "vector", f"i{bits} i{bits}", bits, masked=True)
            self.vector("vadd.vv.masked", "vadd.vv <Vd+>, <Vt>, <Vs>, v0.t", "0000000", "t", "s", "000",
                        m.masked(m.add_rows), "vector", f"i{bits} i{bits} i{bits}", bits, masked=True)
        extend, code = m.extended, "010010"
        self.one("vsext.vf2", code, "00111", "010", ((32, "i32", "i16"), (64, "i64", "i32")), extend, "vector", True)
        self.one("vzext.vf2", code, "00110", "010", ((32, "u32", "u16"), (64, "u64", "u32")), extend, "vector", True)
        self.one("vsext.vf4", code, "00101", "010", ((32, "i32", "i8"),), extend, "vector", True)
        self.one("vzext.vf4", code, "00100", "010", ((32, "u32", "u8"),), extend, "vector", True)
        for element in (8, 16, 32):
            self.vector("vnsrl.wi", "vnsrl.wi <Vd>, <Vt>, <#u>", "1011001", "t", "u", "011",
                        m.narrowed_right(f"u{element}"), "vector", f"u{element} u{2 * element}", element)

    def vector_floats(self) -> None:
        three = self.three
        three("vfadd", "000000", "vf", "f", m.add_rows, "vector fadd")
        three("vfsub", "000010", "vf", "f", m.subtract_rows, "vector fadd")
        three("vfrsub", "100111", "f", "f", m.subtract_from, "vector fadd")
        three("vfmul", "100100", "vf", "f", m.multiply_rows, "fma")
        three("vfdiv", "100000", "vf", "f", m.divide_floats, "fdiv")
        three("vfrdiv", "100001", "f", "f", m.divide_by, "fdiv")
        three("vfsgnj", "001000", "v", "f", m.with_sign, "vector")
        three("vmfeq", "011000", "vf", "f", m.equal, "vector", result="m")
        three("vmfne", "011100", "vf", "f", m.unequal, "vector", result="m")
        three("vmflt", "011011", "vf", "f", m.below, "vector", result="m")
        three("vmfle", "011001", "vf", "f", m.at_most, "vector", result="m")
        three("vmfgt", "011101", "f", "f", m.above, "vector", result="m")
        three("vmfge", "011111", "f", "f", m.at_least, "vector", result="m")
        self.sums("vfmacc", "101100", "f", "f", m.fused, "fma")
        self.sums("vfnmsac", "101111", "f", "f", m.fused_negative, "fma")
        self.sums("vfmadd", "101000", "f", "f", m.fused_factor, "fma")
        self.sums("vfnmsub", "101011", "f", "f", m.fused_negative_factor, "fma")
        whole = ((32, "f32", "f32"), (64, "f64", "f64"))
        self.one("vfsqrt.v", "010011", "00000", "001", whole, lambda _: m.root, "fdiv")
        for name, code, meaning in (("vfneg.v", "001001", m.negative), ("vfabs.v", "001010", m.absolute)):
            for bits in (32, 64):   # vs1 is vs2
                self.vector(name, f"{name} <Vd>, <Vt>", f"{code}1", "t", "TTTTT", "001", meaning, "vector",
                            f"f{bits} f{bits}", bits)
        code, form = "010010", "001"
        integers = ((32, "i32", "f32"), (64, "i64", "f64"))
        self.one("vfcvt.x.f.v", code, "00001", form, integers, m.to_nearest, "convert")
        self.one("vfcvt.rtz.x.f.v", code, "00111", form, integers, m.to_integer, "convert")
        self.one("vfcvt.f.x.v", code, "00011", form, ((32, "f32", "i32"), (64, "f64", "i64")), m.converted, "convert")
        self.one("vfwcvt.f.x.v", code, "01011", form, ((32, "f64", "i32"),), m.converted, "convert", True)
        self.one("vfwcvt.rtz.x.f.v", code, "01111", form, ((32, "i64", "f32"),), m.to_integer, "convert", True)
        self.one("vfwcvt.f.f.v", code, "01100", form, ((32, "f64", "f32"),), m.converted, "convert", True)
        self.one("vfwcvt.f.f.v", code, "01100", form, ((16, "f32", "f16"),), m.converted, "convert", True,
                 features=_VECTOR_HALF)
        self.one("vfncvt.f.x.w", code, "10011", form, ((32, "f32", "i64"),), m.converted, "convert")
        self.one("vfncvt.rtz.x.f.w", code, "10111", form, ((32, "i32", "f64"),), m.to_integer, "convert")
        self.one("vfncvt.f.f.w", code, "10100", form, ((32, "f32", "f64"),), m.converted, "convert")
        self.one("vfncvt.f.f.w", code, "10100", form, ((16, "f16", "f32"),), m.converted, "convert",
                 features=_VECTOR_HALF)

    def lanes_and_masks(self) -> None:
        vector = self.vector
        for bits in (32, 64):
            kind, count = f"u{bits}", self.vector_bits // bits
            vector("vmv.v.x", "vmv.v.x <Vd>, <Xs>", "0101111", "", "s", "100", m.spread_number(count, bits), "vector",
                   kind, bits)
            vector("vmv.v.i", "vmv.v.i <Vd>, <#i>", "0101111", "", "i", "011", m.spread_number(count, bits), "vector",
                   kind, bits)
            vector("vfmv.v.f", "vfmv.v.f <Vd>, <Fs>", "0101111", "", "s", "101", m.spread_float(count, bits), "vector",
                   f"f{bits}", bits)
            self.row(f"vconst.e{bits}", "vli <Vd>, <#i>", "", m.spread_number(count, bits), "vector",
                     dtypes=kind, element=bits, vector_bits=self.vector_bits, features=_V)
            vector("vid.v", "vid.v <Vd>", "0101001", "", "10001", "010", m.numbers(count, bits), "vector", kind, bits)
            vector("vmv.x.s", "vmv.x.s <Xd>, <Vt>", "0100001", "t", "", "010", m.first_number, "from vector", kind,
                   bits)
            for way, operand, field, form in (("vvm", "<Vs>", "s", "000"), ("vxm", "<Xs>", "s", "100"),
                                              ("vim", "<#i>", "i", "011")):
                vector(f"vmerge.{way}", f"vmerge.{way} <Vd>, <Vt>, {operand}, v0", "0101110", "t", field, form,
                       m.chosen if way == "vvm" else m.chosen_number, "vector",
                       f"{kind} {kind}" + f" {kind}" * (way == "vvm"), bits, masked=True)
            vector("vfmerge.vfm", "vfmerge.vfm <Vd>, <Vt>, <Fs>, v0", "0101110", "t", "s", "101",
                   m.chosen_float, "vector", f"f{bits} f{bits}", bits, masked=True)
            vector("vrgather.vv", "vrgather.vv <Vd+>, <Vt>, <Vs>", "0011001", "t", "s", "000", m.gathered, "permute",
                   f"{kind} {kind} {kind}", bits)
            vector("vrgather.vv.masked", "vrgather.vv <Vd+>, <Vt>, <Vs>, v0.t", "0011000", "t", "s", "000",
                   m.gathered_where, "permute", f"{kind} {kind} {kind}", bits, masked=True)
            vector("vrgather.vi", "vrgather.vi <Vd+>, <Vt>, <#u>", "0011001", "t", "u", "011", m.gathered_number,
                   "permute", f"{kind} {kind}", bits)
            vector("vslideup.vi.masked", "vslideup.vi <Vd+>, <Vt>, <#u>, v0.t", "0011100", "t", "u", "011",
                   m.slid_up_where, "permute", f"{kind} {kind}", bits, masked=True)
            vector("vslidedown.vi.masked", "vslidedown.vi <Vd+>, <Vt>, <#u>, v0.t", "0011110", "t", "u", "011",
                   m.slid_down_where, "permute", f"{kind} {kind}", bits, masked=True)
        for name, code, meaning in (("vmand", "011001", m.mask_and), ("vmor", "011010", m.mask_or),
                                    ("vmxor", "011011", m.mask_xor)):
            vector(f"{name}.mm", f"{name}.mm <Vd>, <Vt>, <Vs>", f"{code}1", "t", "s", "010", meaning, "vector",
                   "m m m", ANY)
        vector("vmnot.m", "vmnot.m <Vd>, <Vt>", "0111011", "t", "TTTTT", "010", m.mask_not, "vector", "m m", ANY)
        vector("vcpop.m", "vcpop.m <Xd>, <Vt>", "0100001", "t", "10000", "010", m.how_many, "from vector", "m", ANY)
        # A destination that may be any register: what is not in the operands' registers begins with it.
        self.row("undefined", "undefined <Vd>", "", None, "none", vector_bits=self.vector_bits)
        vector("vmv1r.v", "vmv1r.v <Vd>, <Vt>", "1001111", "t", "", "011", m.same, "vector", "u8 u8", ANY)
        self.row("vmv1r.v.mask", "vmv1r.v v0, <Vt>", "1001111 ttttt 00000 011 00000 1010111", None, "vector",
                 dtypes="u8", element=ANY, vector_bits=self.vector_bits, implicit_writes=(("vec", 0),), features=_V)

    def vector_memory(self) -> None:
        """Elements of 8 to 64 bits, as many as there are lanes, whatever elements the processor is set to."""
        widths = {8: "000", 16: "101", 32: "110", 64: "111"}
        pair = (("vec", PAIR), ("vec", PAIR + 1))
        for bits, width in widths.items():
            memory_bits, kind = min(bits * self.lanes, self.vector_bits), f"u{bits}"
            more: dict[str, Any] = {"element": ANY, "memory_bits": memory_bits, "vector_bits": self.vector_bits}
            load, store = (f"sssss {width} ddddd {code}" for code in ("0000111", "0100111"))
            vector = self.row
            vector(f"vle{bits}.v", f"vle{bits}.v <Vd>, <mem>", f"000000100000 {load}", m.same, "load vector",
                   dtypes=f"{kind} {kind}", features=_V, **more)
            vector(f"vle{bits}.v.masked", f"vle{bits}.v <Vd+>, <mem>, v0.t", f"000000000000 {load}", m.loaded_where,
                   "load vector", dtypes=f"{kind} {kind}", masked=True, features=_V, **more)
            vector(f"vse{bits}.v", f"vse{bits}.v <Vd->, <mem=>", f"000000100000 {store}", m.same, "store vector",
                   dtypes=f"{kind} {kind}", features=_V, **more)
            vector(f"vse{bits}.v.masked", f"vse{bits}.v <Vd->, <mem=>, v0.t", f"000000000000 {store}",
                   m.stored_where, "store vector", dtypes=f"{kind} {kind}", masked=True, features=_V, **more)
            for masked, vm, name, end in ((False, "1", "", ""), (True, "0", ".masked", ", v0.t")):
                mark = "+" if masked else ""
                # From lane to lane so many bytes further.
                vector(f"vlse{bits}.v{name}", f"vlse{bits}.v <Vd{mark}>, <mem>{end}", f"000010{vm}xxxxx {load}", None,
                       "gather", masked=masked, features=_V, **more)
                vector(f"vsse{bits}.v{name}", f"vsse{bits}.v <Vd->, <mem=>{end}", f"000010{vm}xxxxx {store}", None,
                       "scatter", masked=masked, features=_V, **more)
                # By offsets of 64 bits for each lane, in v30, and v31 where a register does not hold them. What is
                # loaded may be in neither.
                alone = more | {"element": bits, "masked": masked, "implicit_reads": pair, "features": _V}
                vector(f"vluxei64.v.{bits}{name}", f"vluxei64.v <Vd+>, <mem>{end}",
                       f"000001{vm}wwwww sssss 111 ddddd 0000111", None, "gather", **alone)
                vector(f"vsoxei64.v.{bits}{name}", f"vsoxei64.v <Vd->, <mem=>{end}",
                       f"000011{vm}wwwww sssss 111 ddddd 0100111", None, "scatter", **alone)
        more = {"element": 64, "vector_bits": self.vector_bits, "implicit_writes": pair, "features": _V}
        self.row("vsext.vf2.pair", "vsext.vf2 v30, <Vt>", "0100101 ttttt 00111 010 11110 1010111", None, "vector",
                 **more)
        self.row("vsll.vi.pair", "vsll.vi v30, v30, <#u>", "1001011 11110 uuuuu 011 11110 1010111", None, "vector",
                 implicit_reads=pair, **more)
        # Whole registers: these ask nothing of the processor's state.
        self.row("vl1re8.v", "vl1re8.v <Vd>, <mem>", "000000101000 sssss 000 ddddd 0000111", m.same, "load vector",
                 dtypes="u8 u8", memory_bits=self.vector_bits, vector_bits=self.vector_bits, features=_V)
        self.row("vs1r.v", "vs1r.v <Vd->, <mem=>", "000000101000 sssss 000 ddddd 0100111", m.same, "store vector",
                 dtypes="u8 u8", memory_bits=self.vector_bits, vector_bits=self.vector_bits, features=_V)

    def state(self) -> None:
        """So many lanes, of elements of so many bits: what is behind them is lost, what a mask leaves off stays."""
        multiples = {"mf8": "101", "mf4": "110", "mf2": "111", "m1": "000", "m2": "001"}
        for place, bits in enumerate((8, 16, 32, 64)):
            for multiple in (("mf4", "mf8"), ("mf2", "mf4"), ("m1", "mf2"), ("m2", "m1"))[place]:
                self.row(f"vsetivli.e{bits}.{multiple}", f"vsetivli zero, <#u>, e{bits}, {multiple}, ta, mu",
                         f"11 00 01 {place:03b} {multiples[multiple]} uuuuu 111 00000 1010111", None, "state",
                         side_effects=True, features=_V)

    # --- Code by hand (translate.py) ----------------------------------------------------------------------------------

    def by_hand(self) -> None:
        meaning: Meaning
        row = self.row
        row("divu", "divu <Xd>, <Xs>, <Xt>", "0000001 ttttt sssss 101 ddddd 0110011", m.divide_unsigned, "div")
        row("mulh", "mulh <Xd>, <Xs>, <Xt>", "0000001 ttttt sssss 001 ddddd 0110011", m.multiply_high, "mul")
        for name, code in (("bltu", "110"), ("bgeu", "111")):
            row(name, f"{name} <Xs>, <Xt>, <label>", f"bbbbbbb ttttt sssss {code} bbbbb 1100011", None, "branch",
                control="branch")
        # A call leaves the return address in ra; what stands elsewhere in the file is reached by its distance.
        row("jal", "jal ra, <label>", "jjjjjjjjjjjjjjjjjjjj 00001 1101111", None, "branch", side_effects=True,
            implicit_writes=(("gpr", LINK),))
        row("jr", "jr <Xs>", "000000000000 sssss 000 00000 1100111", None, "branch", control="return")
        row("unimp", "unimp", "110000000000 00000 001 00000 1110011", None, "branch", control="trap")
        row("distance", ".long <label> - .", "l" * 32, None, "branch")
        # Other threads, and what the processor says of itself.
        row("rdtime", "rdtime <Xd>", "110000000001 00000 010 ddddd 1110011", None, "system", side_effects=True)
        row("csrr.vlenb", "csrr <Xd>, vlenb", "110000100010 00000 010 ddddd 1110011", None, "system",
            side_effects=True, features=_V)
        atomic: dict[str, Any] = {"memory_bits": 32, "side_effects": True}
        row("amoswap.w", "amoswap.w.aqrl <Xd>, <Xt>, <mem+>", "0000111 ttttt sssss 010 ddddd 0101111",
            m.swapped_with(32), "atomic", **atomic)
        row("lr.w", "lr.w.aqrl <Xd>, <mem>", "0001011 00000 sssss 010 ddddd 0101111", None, "atomic", **atomic)
        row("sc.w", "sc.w.aqrl <Xd>, <Xt>, <mem=>", "0001111 ttttt sssss 010 ddddd 0101111", None, "atomic", **atomic)
        row("fmv.x.w", "fmv.x.w <Xd>, <Fs>", "1110000 00000 sssss 000 ddddd 1010011", m.word_of_float, "fadd")
        for name, word, meaning in (
                ("fcvt.s.l", "1101000 00010", m.float_of_number(32)),
                ("fcvt.d.l", "1101001 00010", m.float_of_number(64)),
                ("fcvt.s.d", "0100000 00001", m.of_floats(m.same, 64, 32))):
            taken = "X" if name.endswith("l") else "F"
            row(name, f"{name} <Fd>, <{taken}s>", f"{word} sssss 111 ddddd 1010011", meaning, "fadd")
        row("fmul.s", "fmul.s <Fd>, <Fs>, <Ft>", "0001000 ttttt sssss 111 ddddd 1010011",
            m.of_floats(m.multiply_rows, 32), "fadd")
        row("fdiv.d", "fdiv.d <Fd>, <Fs>, <Ft>", "0001101 ttttt sssss 111 ddddd 1010011",
            m.of_floats(m.divide_floats, 64), "div")


@cache
def table(vector_bits: int) -> dict[str, Row]:
    """The rows of processors with vector registers of so many bits."""
    made = _Table(vector_bits)
    made.arithmetic()
    made.control()
    made.memory()
    made.floats()
    made.vector_integers()
    made.vector_floats()
    made.lanes_and_masks()
    made.vector_memory()
    made.state()
    made.by_hand()
    return made.rows


ROWS = table(128)
"""Of the shortest registers."""
