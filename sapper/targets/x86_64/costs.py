"""What the rows cost on Zen 4: latency, reciprocal throughput, pipes.

Enters: a row. Leaves: a `Cost`, for its register form (memory operands add `LOAD_LATENCY`). Holds: figures are cycles.
Source: measured on a Zen 4 (EPYC, family 25 model 17) with tests/targets/measure_costs.py: a chain through the row's
own registers, and many independent ones, against a chain of `add`. Latency between register files is from chains of two
rows, parted by the published figures (AMD publication 57647, Software Optimization Guide for Zen 4). Rows that break
dependencies when both sources are one register (vpxor) count as if they did not. Rows on tiles, which no Zen 4 has, are
of Intel 248966, chapter on AMX (measured on a Xeon of 2024: the same, but a product's latency to the next one on its
sums is 16, and tileloaddt1 takes 18). Lines are
`latency throughput : families`; three figures are for 128, 256, 512 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from sys import modules
from typing import TYPE_CHECKING, Any

from .tiles import ROW_BYTES, ROWS

if TYPE_CHECKING:
    from .rows import Row

MODEL = "Zen 4"
"""Whose figures these are."""
ISSUE_WIDTH = 6
"""Macro-ops that enter in a cycle; a comparison and the jump after it are one (57647, 2.9 and 2.8.3)."""
LOAD_LATENCY = {"gpr": 4, "vec": 7, "mask": 7, "tile": 0}
"""Cycles from an address to a register by a load that hits L1 (57647, 2.12); of a tile the row's own latency."""
SHUT_BY_512: tuple[str, ...] = ()
"""Ports that take no operations of vectors while any of 512 bits is on its way."""
_LOAD_CYCLES = {64: 1 / 3, 256: 0.5, 512: 1.0}
_STORE_CYCLES = {64: 0.5, 256: 1.0, 512: 2.0}
"""Cycles of the load and store units for an access of up to so many bits that hits L1 (57647, 2.12): three loads of
general registers or two of 256 bits in a cycle, two stores of general registers or one of 256 bits."""

_FIGURES = """
1 0.25 : add or and sub xor cmp cmp.8 cmp.16 test.8 test.16 test not neg inc dec andn blsr popcnt tzcnt lzcnt bsf bsr
1 0.25 : bswap mov.8 mov.16 mov movzx.8 movzx.16 movsx.8 movsx.16 movsxd lea nop endbr64 nop.memory vmovups vmovupd
1 0.25 : vmovaps vmovapd vmovdqu vmovdqa vmovdqu8 vmovdqu16 vmovdqu32 vmovdqu64 vmovdqa32 vmovdqa64 vmovss.merge
1 0.25 : vmovsd.merge vmovq vblendps vpand vpandn vpor vpxor vpblendd vpblendw vpcmpeqb vpcmpgtb vpcmpeqw vpcmpgtw
1 0.25 : vpcmpeqd vpcmpgtd kandnb kxorb kandnw kxorw kandnd kxord kandnq kxorq
1 0.33 : xchg xadd vmovhlps vmovlhps
1 0.25,0.25,0.5 : vblendmps vandps vandnps vorps vxorps vblendmpd vandpd vandnpd vorpd vxorpd vpaddw vpaddd vpaddq
1 0.25,0.25,0.5 : vpsubb vpsubw vpsubd vpsubq vpminsb vpmaxsb vpminub vpmaxub vpminsw vpmaxsw vpminuw vpmaxuw vpminsd
1 0.25,0.25,0.5 : vpmaxsd vpminud vpmaxud vpandd vpandq vpandnd vpandnq vpord vporq vpxord vpxorq vpblendmd vpblendmq
1 0.25,0.25,0.5 : vpblendmb vpblendmw vpmovm2b vpmovm2w vpmovm2d vpmovm2q vpaddb vpternlogd vpternlogq
1 0.5 : cdq cqo rol.imm rol.cl ror.imm ror.cl shl.imm shl.cl shr.imm shr.cl sar.imm sar.cl shlx shrx sarx rorx bzhi bt
1 0.5 : movnti push pop jo seto cmovo jno setno cmovno jb setb cmovb jae setae cmovae je sete cmove jne setne cmovne
1 0.5 : jbe setbe cmovbe ja cmova js sets cmovs jns setns cmovns jp setp cmovp jnp setnp cmovnp jl setl cmovl jge setge
1 0.5 : cmovge jle setle cmovle jg setg prefetchnta prefetcht0 prefetcht1 prefetcht2 prefetchw vmovss vmovsd
1 0.5 : vmaskmovps.load vmaskmovpd.load vpmaskmovd.load vpmaskmovq.load vbroadcastf128 vbroadcasti128 vblendvps
1 0.5 : vblendpd vblendvpd vpblendvb vpcmpeqq vpcmpgtq vinsertf128 vinserti128 kmovb kandb korb kxnorb kaddb knotb
1 0.5 : kshiftlb kshiftrb kmovw kandw korw kxnorw kaddw knotw kshiftlw kshiftrw kmovd kandd kord kxnord kaddd knotd
1 0.5 : kshiftld kshiftrd kunpckbw kunpckwd seta cmovg
1 0.33,0.33,0.67 : vmovshdup vmovsldup vunpcklps vunpckhps vshufps vpermilps.imm vunpcklpd vunpckhpd vshufpd
1 0.33,0.33,0.67 : vpermilpd.imm vpunpcklbw vpunpckhbw vpunpcklwd vpunpckhwd vpunpckldq vpunpckhdq vpunpcklqdq
1 0.33,0.33,0.67 : vpunpckhqdq vpshufd vpshuflw vpshufhw
1 0.33,0.5,1 : vbroadcastss vpbroadcastb vpbroadcastw vpbroadcastd vpbroadcastq
1 0.5,0.5,1 : vmovntdqa vbroadcastsd vbroadcastf32x4 vbroadcastf64x2 vbroadcasti32x4 vbroadcasti64x2 vpsubsb vpsubsw
1 0.5,0.5,1 : vpsubusb vpsubusw vpsllw.imm vpsllvw vpslld.imm vpsllvd vpsllq.imm vpsllvq vpsrlw.imm vpsrlvw vpsrld.imm
1 0.5,0.5,1 : vpsrlvd vpsrlq.imm vpsrlvq vpsraw.imm vpsravw vpsrad.imm vpsravd vpsraq.imm vpsravq vinsertf32x4
1 0.5,0.5,1 : vinsertf64x2 vinserti32x4 vinserti64x2
1 1 : adc sbb pushfq popfq jmp jmp.indirect call call.indirect ret int3 ud2 sfence vzeroupper vldmxcsr vstmxcsr
1 1 : vbroadcastf32x8 vbroadcastf64x4 vbroadcasti32x8 vbroadcasti64x4 vinsertf32x8 vinsertf64x4 vinserti32x8
1 1 : vinserti64x4 vpinsrd vpinsrq kmovq kandq korq kxnorq kaddq knotq kshiftlq kunpckdq
1 1.33 : vpinsrw
1 1,1,2 : vmovntps vmovntpd vmovntdq
1 4,6,6 : vmaskmovpd.store vpmaskmovq.store
1 4,6,10 : vscatterdpd vpscatterdq
1 4,6,11 : vscatterqps vpscatterqd
1 4,7,11 : vpscatterqq
1 4,7,12 : vscatterqpd
1 6,12,12 : vmaskmovps.store vpmaskmovd.store
1 17 : lfence
1 20 : clflushopt
1 6,12,22 : vscatterdps vpscatterdd
1 58 : mfence
1 88 : pause
2 0.5 : vminss vminsd vmaxss vmaxsd vcmpps vcmppd
1,1,2 0.33,0.33,1 : vmovddup
2 0.5,0.5,1 : vrangeps vrangepd
2 0.5,0.5,1 : vminps vminpd vmaxps vmaxpd vpermilps vpermilpd vpaddsb vpaddsw vpaddusb vpaddusw vpminsq vpminuq vpmaxsq
2 0.5,0.5,1 : vpmaxuq vpabsb vpabsw vpabsd vpabsq vprold vprolvd vprord vprorvd vprolq vprolvq vprorq vprorvq vpsllw
2 0.5,0.5,1 : vpslld vpsllq vpsrlw vpsrld vpsrlq vpsraw vpsrad vpsraq vpslldq vpsrldq vpacksswb vpackuswb vpackssdw
2 0.5,0.5,1 : vpackusdw vpshufb vpalignr
2 1 : vpinsrb kshiftrq
3 0.5 : vaddss vaddsd vmulss vmulsd vsubss vsubsd vroundps vroundpd vroundss vrndscaless vroundsd vrndscalesd vcvtss2sd
3 0.5 : vcvtsd2ss vperm2f128 vperm2i128 vextractf128 vextracti128
3 0.5,0.5,1 : vaddps vaddpd vmulps vmulpd vsubps vsubpd vrndscaleps vgetmantps vgetexpps vrndscalepd vgetmantpd
3 0.5,0.5,1 : vgetexppd vcvtdq2ps vcvtps2dq vcvttps2dq vcvtqq2pd vcvtuqq2pd vcvtpd2qq vcvttpd2qq vcvtudq2ps vcvttps2udq
3 0.5,0.5,1 : vpmullw vpmulhw vpmulhuw vpmulld vpmullq vpmuludq vpmuldq vpmaddwd vpmaddubsw vpsadbw
3 1 : imul imul.imm mul imul.wide pext pdep vmovd.to_vec vmovd.from_vec vmovq.to_vec vmovq.from_vec kortestq ktestq
3 1.33 : kortestb ktestb kortestw ktestw kortestd ktestd
3 3 : cmpxchg
4 0.5 : vfmadd132ss vfmadd132sd vfmadd213ss vfmadd213sd vfmadd231ss vfmadd231sd vfmsub132ss vfmsub132sd vfmsub213ss
4 0.5 : vfmsub213sd vfmsub231ss vfmsub231sd vfnmadd132ss vfnmadd132sd vfnmadd213ss vfnmadd213sd vfnmadd231ss
4 0.5 : vfnmadd231sd vfnmsub132ss vfnmsub132sd vfnmsub213ss vfnmsub213sd vfnmsub231ss vfnmsub231sd vrcpps vrsqrtps
2,2,4 0.5,0.5,1 : vpmovsxbw vpmovzxbw vpmovsxbd vpmovzxbd vpmovsxbq vpmovzxbq vpmovsxwd vpmovzxwd vpmovsxwq vpmovzxwq
2,2,4 0.5,0.5,1 : vpmovsxdq vpmovzxdq
2,3,4 0.5,0.5,1 : valignq
2,4,4 0.5,0.5,1 : vpmovwb vpmovswb vpmovuswb vpmovdw vpmovsdw vpmovusdw vpmovqd vpmovsqd vpmovusqd
3,3,4 0.5,0.5,1 : vshuff32x4 vshuff64x2 vshufi32x4 vshufi64x2 vextractf32x4 vextractf64x2 vextracti32x4 vextracti64x2
4 0.5,0.5,1 : vfmadd132ps vfmadd132pd vfmadd213ps vfmadd213pd vfmadd231ps vfmadd231pd vfmsub132ps vfmsub132pd
4 0.5,0.5,1 : vfmsub213ps vfmsub213pd vfmsub231ps vfmsub231pd vfnmadd132ps vfnmadd132pd vfnmadd213ps vfnmadd213pd
4 0.5,0.5,1 : vfnmadd231ps vfnmadd231pd vfnmsub132ps vfnmsub132pd vfnmsub213ps vfnmsub213pd vfnmsub231ps vfnmsub231pd
4 0.5,0.5,1 : vpdpbusd vpdpbusds vpdpwssd vpdpwssds vpermpd.imm vpermq.imm
4 0.5 : vpdpbusd.vex vpdpbusds.vex vpdpwssd.vex vpdpwssds.vex
4 1 : mulx vpbroadcastb.general vpbroadcastw.general vpbroadcastd.general vpbroadcastq.general vtestps vtestpd vucomiss
4 1 : vucomisd vptest vextractf32x8 vextractf64x4 vextracti32x8 vextracti64x4 vpextrb vpextrd vpextrq vpextrw
4 1 : kmovb.to_mask kmovw.to_mask kmovd.to_mask
4 1.33 : vcvtsi2ss vcvtsi2sd
4 2 : kmovq.to_mask
2,4,5 0.5,0.5,1 : vpmovdb vpmovsdb vpmovusdb vpmovqb vpmovsqb vpmovusqb vpmovqw vpmovsqw vpmovusqw vpermw vpermb
2,4,5 0.5,0.5,1 : valignd
3,4,5 0.5,0.5,1 : vpermt2ps vpermi2ps vpermt2pd vpermi2pd vpermt2d vpermi2d vpermt2q vpermi2q vpermt2w vpermi2w
3,4,5 0.5,0.5,1 : vpermt2b vpermi2b
4,4,5 0.5,0.5,1 : vfpclassps vfpclasspd
4,4,5 0.5,0.5,1 : vcmpps.k vcmppd.k vpcmpeqb.k vpcmpgtb.k vpcmpb vpcmpub vptestmb vptestnmb vpcmpeqw.k vpcmpgtw.k
4,4,5 0.5,0.5,1 : vpcmpw vpcmpuw vptestmw vptestnmw vpcmpeqd.k vpcmpgtd.k vpcmpd vpcmpud vptestmd vptestnmd vpcmpeqq.k
4,4,5 0.5,0.5,1 : vpcmpgtq.k vpcmpq vpcmpuq vptestmq vptestnmq vpermps vpermd vpermpd vpermq vpmovb2m vpmovw2m vpmovd2m
4,4,5 0.5,0.5,1 : vpmovq2m
5 0.5,0.5,1 : vrcp14ps vrsqrt14ps vrcp14pd vrsqrt14pd
5 1 : vmovmskps vmovmskpd vpmovmskb kmovb.from_mask kmovw.from_mask kmovd.from_mask
2,4,5 0.67,0.67,1.33 : vexpandps vcompresspd vexpandpd vpcompressd vpexpandd vpcompressq vpexpandq
2,4,5 1,0.67,1.33 : vcompressps
5 2 : kmovq.from_mask
6 0.67,0.67,1 : vdpbf16ps
6 1 : vscalefss vscalefsd
3,4,6 0.5,0.67,1.33 : vcvtdq2pd vcvtps2pd vcvttps2qq vcvtph2ps
6 1,1,2 : vreduceps vscalefps vreducepd vscalefpd
3,6,7 0.5,0.67,1.33 : vcvtpd2ps vcvtpd2dq vcvttpd2dq vcvtps2ph vcvtneps2bf16 vcvtne2ps2bf16
3,6,7 0.5,1,1.33 : vcvtqq2ps
7 7 : lock.and lock.sub lock.xor lock.inc lock.add lock.or lock.dec
8 1 : vcvttss2si vcvtss2si vcvttsd2si vcvtsd2si
8 8 : lock.xadd
9 9 : lock.cmpxchg
11 3 : vdivss
11 3,3,6 : vdivps
13 5 : vdivsd
13 5,5,9 : vdivpd
15 5 : vsqrtss
15 5,5,10 : vsqrtps
18 10 : div idiv
20 3,4,4 : vgatherdpd.vex vgatherqps.vex vgatherqpd.vex vpgatherdq.vex vpgatherqd.vex vpgatherqq.vex
20 4,8,8 : vgatherdps.vex vpgatherdd.vex
21 8 : vsqrtsd
21 8,8,16 : vsqrtpd
20,20,28 4,5,9 : vgatherdpd vgatherqps vgatherqpd vpgatherdq vpgatherqd vpgatherqq
20,20,28 5,9,17 : vgatherdps vpgatherdd
100 100 : cpuid xgetbv rdtsc rdtscp syscall
1 1 : tilezero
13 13 : tilerelease
19 19 : sttilecfg
1 16 : tilestored
45 8 : tileloadd
48 33 : tileloaddt1
52 16 : tdpbf16ps tdpfp16ps tdpbssd tdpbsud tdpbusd tdpbuud
100 100 : ldtilecfg
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """latency in cycles, throughput in cycles for each instruction, ports that may execute it."""

    latency: int
    throughput: float
    ports: tuple[str, ...]


@lru_cache(maxsize=1)
def _table() -> dict[str, tuple[list[float], list[float]]]:
    """Family -> latencies and throughputs, one or three of each."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for line in _FIGURES.strip().split("\n"):
        figures, _, families = line.partition(" : ")
        latency, throughput = ([float(x) for x in column.split(",")] for column in figures.split())
        for family in families.split():
            found[family] = latency, throughput
    return found


def family_of(name: str) -> str:
    """A row's name without its size."""
    stem, _, size = name.rpartition(".")
    return stem if size in ("32", "64", "128", "256", "512") else name


# Pipes in order of use (57647, figure 1 and 2.11): the first ones of the order, as many as the throughput shows. Which
# families share pipes is from loops of 16 multiply-adds, or additions, and 8 others, on the machine above: minima,
# maxima and shifts slow additions down and not multiply-adds, comparisons the other way round.
_MULTIPLY = ("fp0", "fp1", "fp3", "fp2")
_ADD = ("fp2", "fp3", "fp1", "fp0")
_SHUFFLE = ("fp1", "fp2", "fp0", "fp3")
_GENERAL = ("alu0", "alu1", "alu2", "alu3")
_ADDERS = ("vaddp", "vadds", "vsubp", "vsubs", "vcvt", "vround", "vrndscale", "vget", "vmin", "vmax", "vrange",
           "vpsll", "vpsrl", "vpsra")
_TWICE_ADDERS = ("vscalef", "vreduce")
"""Two operations of the adders each."""
_MULTIPLIERS = ("vmul", "vfm", "vfn", "vpmul", "vpmadd", "vpdp", "vdp", "vcmp", "vfpclass", "vpsadbw", "vrcp", "vrsqrt")


def _ports(row: Row, throughput: float) -> tuple[str, ...]:
    if row.control:
        return ("branch",)
    operands = row.operands
    if row.mnemonic.startswith("prefetch"):
        return ("load",)
    if (operands and operands[0].kind == "mem") or row.mnemonic.startswith(("vmovnt", "movnti", "push")):
        return ("store",)
    count = max(1, min(4, round(1 / throughput)))
    if row.mnemonic.startswith("tileload"):
        return ("load",)
    if row.mnemonic.startswith(("tile", "tdp")):
        return ("tiles",)
    if not any(o.kind in ("vec", "mask") for o in operands):
        return _GENERAL[:count]
    if row.mnemonic.startswith(("vdiv", "vsqrt")):
        return ("fp1",)
    if row.mnemonic.startswith(_TWICE_ADDERS):
        return _ADD[:2]
    if row.mnemonic.startswith(_ADDERS):
        return _ADD[:count]
    return (_MULTIPLY if row.name.startswith(_MULTIPLIERS) else _SHUFFLE)[:count]


def model_of(target: Any) -> Any:
    """What the bounds of code for a target are worked out from: this module, or a `Core` of zen_costs, intel_costs."""
    if target.core == "zen4":
        return modules[__name__]
    if target.core in ("zen3", "zen5"):
        return import_module(f".{target.core}_costs", __package__).CORE
    from .intel_costs import core

    return core(target.core)


def latency_of(row: Row) -> int:
    """Cycles from a row's register inputs to its result."""
    return cost_of(row).latency


def cost_of(row: Row) -> Cost:
    """The cost of a row. Raises KeyError for a row that the figures lack (a test forbids it)."""
    family = family_of(row.name)
    figures = _table().get(family)
    if figures is None:
        raise KeyError(f"costs of {family}: found none; expected it in a line of _FIGURES in "
                       "sapper/targets/x86_64/costs.py; mend: docs/add-an-instruction.md#its-feature-and-its-cost")
    latency, throughput = figures
    place = {128: 0, 256: 1, 512: 2}.get(row.length, 0)
    cycles = throughput[place if len(throughput) > 1 else 0]
    # A 512-bit operation occupies its pipe twice, so the number of pipes is that of the 256-bit form.
    narrow = throughput[min(place, 1) if len(throughput) > 1 else 0]
    return Cost(int(latency[place if len(latency) > 1 else 0]), cycles, _ports(row, narrow))


_PLAIN_LOADS = ("mov", "vmov", "vbroadcast", "vpbroadcastd", "vpbroadcastq", "kmov", "pop", "prefetch")
"""Rows whose form with a memory source is a load and nothing else."""


def is_scattered(row: Row) -> bool:
    """Whether a row is a gather or a scatter."""
    return any(o.index_bits for o in row.operands)


def accesses_of(row: Row, loaded_bits: int, stored_bits: int, load_cycles: dict[int, float],
                store_cycles: dict[int, float]) -> list[tuple[tuple[str, ...], float]]:
    """What the accesses of one instruction keep busy, as `uses_of`; nothing for gathers and scatters.

    load_cycles, store_cycles: cycles of an access of up to so many bits; vectors and masks count as more than 64.
    """
    if is_scattered(row):
        return []
    least = 65 if any(o.kind in ("vec", "mask") for o in row.operands) else 0
    return [((unit,), next((cycles for most, cycles in table.items() if max(bits, least) <= most), table[512]))
            for unit, bits, table in (("load", loaded_bits, load_cycles), ("store", stored_bits, store_cycles)) if bits]


def parse_uses(text: str, ports_of: Callable[[str], tuple[str, ...]]) -> list[tuple[tuple[str, ...], float]]:
    """What the text of a use keeps busy, as `uses_of`: parts joined by `+`, each `ports`, `count*ports`, or
    `ports:cycles`; `-` is nothing. ports_of: the ports that a name stands for."""
    uses: list[tuple[tuple[str, ...], float]] = []
    for use in text.split("+") if text != "-" else ():
        count, star, ports = use.rpartition("*")
        name, colon, cycles = ports.partition(":")
        where = ports_of(name)
        uses.append((where, float(cycles) if colon else (int(count) if star else 1) / len(where)))
    return uses


def uses_of(row: Row, loaded_bits: int, stored_bits: int) -> list[tuple[tuple[str, ...], float]]:
    """What one instruction keeps busy: (ports that may do it, cycles of all of them together for one such).

    loaded_bits, stored_bits: of its memory operand, 0 for none. Gathers and scatters count by their row alone, whose
    figures were measured with their accesses.
    """
    uses = accesses_of(row, loaded_bits, stored_bits, _LOAD_CYCLES, _STORE_CYCLES)
    return uses + own_uses(row, bool(loaded_bits or stored_bits))


def own_uses(row: Row, in_memory: bool) -> list[tuple[tuple[str, ...], float]]:
    """What one instruction keeps busy but for its access of memory; in_memory: whether it has one."""
    moves = in_memory and row.mnemonic.startswith(_PLAIN_LOADS) and not is_scattered(row)
    return [] if moves or not row.ports else [(row.ports, row.throughput)]


_OPERATIONS = {"vfm": 2, "vfn": 2, "vdpbf16ps": 4, "vpdpbusd": 8, "vpdpwssd": 4, "vadd": 1, "vsub": 1, "vmul": 1,
               "vdiv": 1, "vsqrt": 1, "vmin": 1, "vmax": 1, "vrcp": 1, "vrsqrt": 1}


def operations_of(row: Row) -> int:
    """Arithmetic operations on floats, and of packed dot products, that one instruction does in all its lanes, or
    on the largest tiles.

    A multiply-add counts as two. Integer arithmetic, conversions and moves do not count.
    """
    if row.mnemonic.startswith("tdp"):
        return 2 * ROWS * (ROW_BYTES // 4) * ROW_BYTES // (1 if row.mnemonic.endswith("d") else 2)
    count = next((n for prefix, n in _OPERATIONS.items() if row.name.startswith(prefix)), 0)
    if not count or not row.operands or row.operands[0].kind != "vec":
        return 0
    return count * (1 if row.scalar else row.length // (64 if row.mnemonic.endswith("d") and "vpdp" not in row.mnemonic
                                                        else 32))
