"""What the rows cost on Zen 5: latency, and the pipes that their operations take.

Enters: a row. Leaves: a latency in cycles and what it keeps busy, for bounds of finished code (codegen/explain.py); no
code depends on it. Holds: a bound of these figures is not above what was measured, of one row alone or of two beside
each other; they are those of servers and desktops, whose pipes have 512 bits. A family that is not here (what traps,
jumps, moves the stack, divides integers, or no Zen 5 has) takes Zen 4's figures.

Sources: measured on a Zen 5 (EPYC, family 26 model 2) with tests/targets/measure_costs.py. AMD publication 58455,
Software Optimization Guide for Zen 5, has the widths: eight macro-ops in a cycle, six integer pipes, four addresses,
two loads and one store of 512 bits, four pipes of vectors of which two multiply and two add; and that a load to a
vector takes 7 cycles, by which latencies between register files are parted. Which pipes a family takes is from loops of
it beside multiply-adds, additions and permutations.

- A latency of 1 is what a chain of vectors shows where the scheduler is not full; where it is, each link takes 2.
- A sum is ready for the next sum after 2 cycles, for other rows after 3.
- Multiply-adds and the stores of vectors share something, five in two cycles (`r`; a store of 512 bits is two), it may
  be reads of a third register: two multiply-adds and a store of 512 bits take 1.96 cycles, two products and it 1.01.

Lines are `latency uses : families`; figures for 128, 256 and 512 bits are parted by `;` (fewer: the last one holds for
the rest). Uses are parted by `+`, as in intel_costs.py: `m` is an operation on a pipe of `PIPES["m"]`, `2*m` two of
them, `d:4` the divider for four cycles, `-` nothing but the access of memory.
"""

from __future__ import annotations

import re
from functools import lru_cache

from .costs import accesses_of, cost_of, family_of, is_scattered, operations_of, parse_uses
from .rows import Row

__all__ = ["ISSUE_WIDTH", "LOAD_LATENCY", "MODEL", "latency_of", "operations_of", "uses_of"]

MODEL = "Zen 5"
ISSUE_WIDTH = 8
LOAD_LATENCY = {"gpr": 4, "vec": 7, "mask": 7, "tile": 0}
"""See costs.py."""
_LOAD_CYCLES = {64: 0.25, 512: 0.5}
_STORE_CYCLES = {256: 0.5, 512: 1.0}
_ADDRESS_CYCLES = 0.25
_STORE_READS = {256: 0.4, 512: 0.8}

PIPES = {
    "v": ("fp0", "fp1", "fp2", "fp3"),                  # any pipe of vectors
    "m": ("fp0", "fp1"),                                # products
    "a": ("fp2", "fp3"),                                # sums, conversions, shifts by immediates and by lanes
    "s": ("fp1", "fp2"),                                # permutations, comparisons to masks
    "i": ("fp0", "fp3"),                                # saturating sums, masks
    "d": ("divider",),
    "r": ("third",),                                    # see above
    "x": ("to_fp",),                                    # from general registers
    "y": ("from_fp0", "from_fp1"),                      # to general registers and flags
    "g": tuple(f"alu{n}" for n in range(6)),
    "k": ("alu0", "alu1", "alu2"),                      # integer products
    "b": ("alu1", "alu2", "alu3"),                      # shifts and bits
    "n": ("agu",),
    "l": ("load",),
    "w": ("store",),
}

_FIGURES = """
0 - : movnti vzeroupper vmovups vmovupd vmovaps vmovapd vmovdqu vmovdqa vmovdqu8 vmovdqu16 vmovdqu32 vmovdqu64 vmovdqa32
0 - : vmovdqa64 vmovntps vmovntpd vmovntdq vmovntdqa vmovss vmovsd vbroadcastf128 vbroadcasti128
1 2*g : cmovbe cmova cmovl cmovge cmovle cmovg
1 a : vpsllw.imm vpsllvw vpslld.imm vpsllvd vpsllq.imm vpsllvq vpsrlw.imm vpsrlvw vpsrld.imm vpsrlvd vpsrlq.imm vpsrlvq
1 a : vpsraw.imm vpsravw vpsrad.imm vpsravd vpsraq.imm vpsravq
1 b : cdq cqo rol.imm rol.cl ror.imm ror.cl shl.imm shl.cl shr.imm shr.cl sar.imm sar.cl shlx shrx sarx rorx bzhi blsr
1 b : tzcnt bsf bsr bt
1 g : mov add or adc sbb and sub xor cmp cmp.8 cmp.16 test.8 test.16 test not neg inc dec andn popcnt lzcnt bswap mov.8
1 g : mov.16 movzx.8 movzx.16 movsx.8 movsx.16 movsxd lea xchg xadd seto cmovo setno cmovno setb cmovb setae cmovae sete
1 g : cmove setne cmovne setbe seta sets cmovs setns cmovns setp cmovp setnp cmovnp setl setge setle setg nop endbr64
1 g : nop.memory
1 g:0.5 : sfence
1 g:11 : lfence
1 g:75 : mfence
1 g:96 : pause
1 i : vpsubsb vpsubsw vpsubusb vpsubusw vpcmpeqq vpcmpgtq kmovb kandb kandnb korb kxnorb kxorb kaddb knotb kshiftlb
1 i : kshiftrb kmovw kandw kandnw korw kxnorw kxorw kaddw knotw kshiftlw kshiftrw kmovd kandd kandnd kord kxnord kxord
1 i : kaddd knotd kshiftld kshiftrd kmovq kandq kandnq korq kxnorq kxorq kaddq knotq kshiftlq kshiftrq kunpckbw kunpckwd
1 i : kunpckdq
1 m : vmaskmovps.load vmaskmovpd.load vpmaskmovd.load vpmaskmovq.load vblendvps vblendpd vblendvpd
1 s : vmaskmovps.store vmaskmovpd.store vpmaskmovd.store vpmaskmovq.store vbroadcastsd vpblendvb vinsertf128
1 s : vinsertf32x4 vinsertf64x2 vinsertf32x8 vinsertf64x4 vinserti128 vinserti32x4 vinserti64x2 vinserti32x8
1 s : vinserti64x4
1 v : vmovss.merge vmovsd.merge vmovq vmovshdup vmovsldup vmovhlps vmovlhps vblendps vblendmps vandps vandnps vorps
1 v : vxorps vunpcklps vunpckhps vshufps vpermilps.imm vblendmpd vandpd vandnpd vorpd vxorpd vunpcklpd vunpckhpd vshufpd
1 v : vpermilpd.imm vpaddb vpaddw vpaddd vpaddq vpsubb vpsubw vpsubd vpsubq vpminsb vpmaxsb vpminub vpmaxub vpminsw
1 v : vpmaxsw vpminuw vpmaxuw vpminsd vpmaxsd vpminud vpmaxud vpand vpandd vpandq vpandn vpandnd vpandnq vpor vpord
1 v : vporq vpxor vpxord vpxorq vpternlogd vpblendmd vpternlogq vpblendmq vpblendmb vpblendmw vpblendd vpblendw vpcmpeqb
1 v : vpcmpgtb vpcmpeqw vpcmpgtw vpcmpeqd vpcmpgtd vpunpcklbw vpunpckhbw vpunpcklwd vpunpckhwd vpunpckldq vpunpckhdq
1 v : vpunpcklqdq vpunpckhqdq vpshufd vpshuflw vpshufhw vpmovm2b vpmovm2w vpmovm2d vpmovm2q
1 v;s : vbroadcastss vpbroadcastb vpbroadcastw vpbroadcastd vpbroadcastq
1 w:3;w:5;w:8.9 : vscatterdpd vscatterqps vscatterqpd vpscatterdq vpscatterqd vpscatterqq
1 w:6;w:9;w:16.8 : vscatterdps vpscatterdd
1 n:0.25 : prefetchnta prefetcht0 prefetcht1 prefetcht2 prefetchw
0;0;2 -;-;s : vbroadcastf32x4 vbroadcastf64x2 vbroadcasti32x4 vbroadcasti64x2
1;1;2 v;v;s : vmovddup
2 a : vaddps vaddpd vaddss vaddsd vsubps vsubpd vsubss vsubsd vminps vminpd vminss vminsd vmaxps vmaxpd vmaxss vmaxsd
2 a : vrangeps vcmpps vrangepd vcmppd
2 i : vpaddsb vpaddsw vpaddusb vpaddusw vpminsq vpminuq vpmaxsq vpmaxuq vpabsb vpabsw vpabsd vpabsq
2 m : vprold vprolvd vprord vprorvd vprolq vprolvq vprorq vprorvq vpsllw vpslld vpsllq vpsrlw vpsrld vpsrlq vpsraw
2 m : vpsrad vpsraq
2 s : vbroadcastf32x8 vbroadcastf64x4 vbroadcasti32x8 vbroadcasti64x4 vpermilps vpermilpd vpslldq vpsrldq vpacksswb
2 s : vpackuswb vpackssdw vpackusdw vpshufb vpalignr
2 x+s : vpinsrb
2 x+v : vpinsrd vpinsrq vpinsrw
2 y+r:0.4 : vmovd.from_vec vmovq.from_vec vmovmskps vmovmskpd vpmovmskb
3 2*k : mul imul.wide
3 a : vroundps vrndscaleps vgetmantps vgetexpps vroundpd vrndscalepd vgetmantpd vgetexppd vroundss vrndscaless vroundsd
3 a : vrndscalesd vcvtdq2ps vcvtps2dq vcvttps2dq vcvtqq2pd vcvtuqq2pd vcvtpd2qq vcvttpd2qq vcvtudq2ps vcvttps2udq
3 a : vcvtss2sd vcvtsd2ss
3 b : pext pdep
3 g:2.9 : cmpxchg
3 k : imul imul.imm
3 m : vmulps vmulpd vmulss vmulsd vpmullw vpmulhw vpmulhuw vpmulld vpmullq vpmuludq vpmuldq vpmaddwd vpmaddubsw vpsadbw
3 s : vperm2f128 vperm2i128 vextractf128 vextracti128
2;2;4 s : vpmovsxbw vpmovzxbw vpmovsxbd vpmovzxbd vpmovsxbq vpmovzxbq vpmovsxwd vpmovzxwd vpmovsxwq vpmovzxwq vpmovsxdq
2;2;4 s : vpmovzxdq
2;4 s : vpmovwb vpmovswb vpmovuswb vpmovdw vpmovsdw vpmovusdw vpmovqd vpmovsqd vpmovusqd
4 2*k : mulx
4 m+r:0.4 : vfmadd132ps vfmadd132ss vfmadd132pd vfmadd132sd vfmadd213ps vfmadd213ss vfmadd213pd vfmadd213sd vfmadd231ps
4 m+r:0.4 : vfmadd231ss vfmadd231pd vfmadd231sd vfmsub132ps vfmsub132ss vfmsub132pd vfmsub132sd vfmsub213ps vfmsub213ss
4 m+r:0.4 : vfmsub213pd vfmsub213sd vfmsub231ps vfmsub231ss vfmsub231pd vfmsub231sd vfnmadd132ps vfnmadd132ss
4 m+r:0.4 : vfnmadd132pd vfnmadd132sd vfnmadd213ps vfnmadd213ss vfnmadd213pd vfnmadd213sd vfnmadd231ps vfnmadd231ss
4 m+r:0.4 : vfnmadd231pd vfnmadd231sd vfnmsub132ps vfnmsub132ss vfnmsub132pd vfnmsub132sd vfnmsub213ps vfnmsub213ss
4 m+r:0.4 : vfnmsub213pd vfnmsub213sd vfnmsub231ps vfnmsub231ss vfnmsub231pd vfnmsub231sd vpdpbusd vpdpbusd.vex
4 m+r:0.4 : vpdpbusds vpdpbusds.vex vpdpwssd vpdpwssd.vex vpdpwssds vpdpwssds.vex
4 s : vrcpps vrsqrtps vpermpd.imm vpermq.imm vextractf32x8 vextractf64x4 vextracti32x8 vextracti64x4
4 y : kmovb.from_mask kmovw.from_mask kmovd.from_mask kmovq.from_mask
4 y+a : vucomiss vucomisd
4 y+s : vpextrb
4 y+v : vpextrd vpextrq vpextrw
2;3;5 s : valignq
2;4;5 2*s : vcompressps vexpandps vcompresspd vexpandpd vpcompressd vpexpandd vpcompressq vpexpandq
2;4;5 s : vpmovdb vpmovsdb vpmovusdb vpmovqb vpmovsqb vpmovusqb vpmovqw vpmovsqw vpmovusqw vpermw vpermb valignd
3;3;5 s : vshuff32x4 vshuff64x2 vshufi32x4 vshufi64x2 vextractf32x4 vextractf64x2 vextracti32x4 vextracti64x2
3;4;5 s : vpermt2ps vpermi2ps vpermt2pd vpermi2pd vpermt2d vpermi2d vpermt2q vpermi2q vpermt2w vpermi2w vpermt2b
3;4;5 s : vpermi2b
4;4;5 s : vpermps vpermd vpermpd vpermq
5 s : vrcp14ps vrsqrt14ps vrcp14pd vrsqrt14pd
5 x : vmovd.to_vec vmovq.to_vec
5 x+s : kmovb.to_mask kmovw.to_mask kmovd.to_mask kmovq.to_mask
5 y+a : vcvttss2si vcvtss2si vcvttsd2si vcvtsd2si
3;4;6 s : vfpclassps vcmpps.k vfpclasspd vcmppd.k vpcmpeqb.k vpcmpgtb.k vpcmpb vpcmpub vptestmb vptestnmb vpcmpeqw.k
3;4;6 s : vpcmpgtw.k vpcmpw vpcmpuw vptestmw vptestnmw vpcmpeqd.k vpcmpgtd.k vpcmpd vpcmpud vptestmd vptestnmd
3;4;6 s : vpcmpeqq.k vpcmpgtq.k vpcmpq vpcmpuq vptestmq vptestnmq vpmovb2m vpmovw2m vpmovd2m vpmovq2m
3;5;6 a;a+s : vcvtdq2pd vcvtps2pd vcvttps2qq vcvtph2ps
6 2*a : vreduceps vscalefps vreducepd vscalefpd vscalefss vscalefsd
6 m+r:0.4 : vdpbf16ps
6 y : kortestb ktestb kortestw ktestw kortestd ktestd kortestq ktestq
6 y+s : vtestps vtestpd vptest
3;6;7 a;a+s : vcvtpd2ps vcvtpd2dq vcvttpd2dq vcvtqq2ps vcvtps2ph vcvtneps2bf16 vcvtne2ps2bf16
7 x+s : vpbroadcastb.general vpbroadcastw.general vpbroadcastd.general vpbroadcastq.general
8 x+a : vcvtsi2ss vcvtsi2sd
10 m+d:2.5;m+d:2.5;2*m+d:2.5 : vdivps vdivss
13 m+d:4;m+d:4;2*m+d:4 : vdivpd vdivsd
14 m+d:4.5;m+d:4.5;2*m+d:4.5 : vsqrtps vsqrtss
16;17 l:3;l:4 : vgatherdpd.vex vpgatherdq.vex
16;18 l:3;l:4 : vgatherqps.vex vgatherqpd.vex vpgatherqd.vex vpgatherqq.vex
19 g:19 : lock.add lock.or lock.and lock.sub lock.xor lock.inc lock.dec lock.xadd lock.cmpxchg
20 m+d:7.5;m+d:7.5;2*m+d:7.5 : vsqrtpd vsqrtsd
16;17;22 l:3;l:4;l:7 : vgatherdpd vpgatherdq
17;22 l:4;l:5.6 : vgatherdps.vex vpgatherdd.vex
16;18;24 l:3;l:4;l:7 : vgatherqpd vpgatherqq
16;18;25 l:3;l:4;l:6.7 : vgatherqps vpgatherqd
17;22;30 l:4;l:5.6;l:12.5 : vgatherdps vpgatherdd
"""

_PLAIN_LOADS = re.compile(r"mov|vmov(?!ddup\.512)|vp?broadcast(s[sd]|[bwdq])\.\d|kmov|pop")
"""Rows whose form with memory is an access and nothing else, whatever their form with registers is."""


@lru_cache(maxsize=1)
def _table() -> dict[str, tuple[list[str], list[str]]]:
    """Family -> latencies and uses, one to three of each."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for line in _FIGURES.strip().split("\n"):
        figures, _, families = line.partition(" : ")
        latency, uses = (column.split(";") for column in figures.split())
        for family in families.split():
            found[family] = latency, uses
    return found


def _of_width(figures: list[str], row: Row) -> str:
    return figures[min({256: 1, 512: 2}.get(row.length, 0), len(figures) - 1)]


def latency_of(row: Row) -> int:
    """Cycles from a row's register inputs to its result."""
    found = _table().get(family_of(row.name))
    return cost_of(row).latency if found is None else int(_of_width(found[0], row))


def uses_of(row: Row, loaded_bits: int, stored_bits: int) -> list[tuple[tuple[str, ...], float]]:
    """What one instruction keeps busy; see costs.uses_of."""
    uses = accesses_of(row, loaded_bits, stored_bits, _LOAD_CYCLES, _STORE_CYCLES)
    uses += [(("agu",), _ADDRESS_CYCLES)] * len(uses)
    if stored_bits and not is_scattered(row) and any(o.kind == "vec" for o in row.operands):
        uses.append((PIPES["r"], _STORE_READS[256 if stored_bits <= 256 else 512]))
    if (loaded_bits or stored_bits) and _PLAIN_LOADS.match(row.name):
        return uses
    found = _table().get(family_of(row.name))
    if found is not None:
        return uses + parse_uses(_of_width(found[1], row), PIPES.__getitem__)
    cost = cost_of(row)
    return [*uses, (cost.ports, cost.throughput)]
