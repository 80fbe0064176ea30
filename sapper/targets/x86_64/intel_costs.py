"""What the rows cost on Intel's cores: latency, and the ports that their operations take.

Enters: a row and a core's name. Leaves: a latency in cycles and what it keeps busy, for bounds of finished code
(codegen/explain.py); no code depends on it. Holds: figures are of whole classes of instructions. What is in no class,
as it is of no weight in a loop or its figures are not public, takes Zen 4's time on any port that computes.

Sources: Intel 248966, Optimization Reference Manual (ports of each core, loads and stores in a cycle, width of
allocation); A. Abel and J. Reineke, uops.info (operations and ports of each instruction on Haswell, Skylake-X, Ice
Lake, Alder Lake P); A. Fog, Instruction tables (divisions, gathers); the scheduling models X86SchedHaswell,
SkylakeServer, IceLake and SapphireRapids of LLVM, which tabulate these. Where the last gives Sapphire Rapids one port
for 512-bit multiplication, 248966 has two: ports 0 and 5. For vdpbf16ps the figures are those of other products.

Granite Rapids has Sapphire Rapids' ports; what differs in its column was measured on one with
tests/targets/measure_costs.py, which prints latencies and throughputs: vdpbf16ps starts every other cycle at every
width, so that it does half of the work that multiply-adds of f32 do.

Skylake-SP's column was compared with a Cascade Lake, which has its ports, likewise. There gathers take some 25 cycles
at every width: microcode that keeps them from handing on stale data (Intel, Gather Data Sampling, INTEL-SA-00828).

One line for each class: `class : Haswell | Skylake-SP | Ice Lake-SP | Sapphire Rapids | Granite Rapids`, each
`latency uses` for 128, 256 and 512 bits, parted by `;` (fewer: the last one holds for the rest). Uses are parted by
`+`: `01` is an operation on port 0 or 1, `2*01` two of them, `0:5` port 0 for five cycles (its divider), `A` and `B`
ports 10 and 11, `T` the tiles' own unit, `-` nothing. `=`, or nothing at the end, repeats the core before.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from .costs import cost_of, family_of, is_scattered, parse_uses
from .rows import Row
from .tiles import ROWS

_CLASSES = r"""
move : nop.*|endbr64|vzeroupper|mov|mov\.\d+|vmov[au]p[sd]|vmovdq[au]\d*
alu : add|or|and|sub|xor|cmp(\.\d+)?|test(\.\d+)?|not|neg|inc|dec|movzx.*|movsx.*|cdq|cqo
lea : lea
shift : (rol|ror|shl|shr|sar)\.imm|rorx|shlx|shrx|sarx|bt
shift_cl : (rol|ror|shl|shr|sar)\.cl
flag : set\w+|jmp|j\w+|call|ret|jmp\.indirect|call\.indirect
carry : cmov\w+|adc|sbb
bits : popcnt|lzcnt|tzcnt|bsf|bsr|pext|pdep
bit_logic : andn|blsr|bzhi
swap : bswap
multiply : imul(\.imm)?
multiply_wide : mul|mulx|imul\.wide
divide : div|idiv
add_float : v(add|sub)[ps][sd]
multiply_float : vmul[ps][sd]
fma : vfn?m(add|sub)\d+[ps][sd]
minmax_float : v(min|max)[ps][sd]|vcmpp[sd]|vrangep[sd]
compare_mask : vcmpp[sd]\.k|vfpclassp[sd]|vpcmp(eq|gt)[bwdq]\.k|vpcmpu?[bwdq]|vptestn?m[bwdq]
divide_single : vdiv[ps]s
divide_double : vdiv[ps]d
root_single : vsqrt[ps]s
root_double : vsqrt[ps]d
estimate : vr(cp|sqrt)(14)?p[sd]
round : vround[ps][sd]|vrndscale[ps][sd]
exponent : vget(exp|mant)p[sd]|vscalef[ps][sd]|vreducep[sd]
logic_float : v(and|andn|or|xor)p[sd]
logic : vp(and|andn|or|xor)[dq]?|vpternlog[dq]
add_int : vp(add|sub)[bwdq]
simple_int : vp(min|max)[su][bwd]|vpabs[bwdq]|vp(add|sub)u?s[bw]|vpcmp(eq|gt)[bwd]|vpcmpeqq
wide_minmax : vp(min|max)[su]q|vpcmpgtq
multiply_int : vpmulu?dq|vpmulhu?w|vpmullw|vpmadd(wd|ubsw)|vpdp\w+(\.vex)?
multiply_dword : vpmulld
multiply_qword : vpmullq
dot_bf16 : vdpbf16ps
sad : vpsadbw
shuffle : vpermilp[sd](\.imm)?|vshufp[sd]|vunpck[lh]p[sd]|vmov(sh|sl|d)dup|vmov(hl|lh)ps|vmovs[sd](\.merge)?|vmovq
shuffle_int : vpshuf(b|d|hw|lw)|vpunpck\w+|vpalignr|vpack\w+|vps[lr]ldq|vpblendw
cross : vperm2[fi]128|vperm[dq](\.imm)?|vpermp[sd](\.imm)?|v(insert|extract)[fi]\w+|vshuf[fi]\w+|valign.|vpmov[sz]x\w+
narrow_half : vpmov(us|s)?qd
broadcast : vbroadcast\w+|vpbroadcast\w+(\.general)?
permute_two : vperm[ti]2(ps|pd|d|q)
permute_narrow : vpermw|vpermb
permute_two_narrow : vperm[ti]2[bw]
narrow : vpmov(us|s)?(wb|dw|db|qw|qb)
blend : vblendp[sd]|vpblendd
blend_vector : vblendvp[sd]|vpblendvb
blend_mask : vp?blendm\w+
shift_imm : vps(ll|rl|ra)[wdq]\.imm|vpro[lr][dq]
shift_each : vps(ll|rl|ra)v[wdq]|vpro[lr]v[dq]
shift_all : vps(ll|rl|ra)[wdq]
convert : vcvt(dq|udq)2ps|vcvtt?ps2u?dq|vcvtu?qq2pd|vcvtt?pd2qq
convert_width : vcvtdq2pd|vcvtps2pd|vcvtpd2(ps|dq)|vcvttpd2dq|vcvtqq2ps|vcvttps2qq|vcvts[sd]2s[sd]
convert_bf16 : vcvtne\w+
convert_half : vcvtph2ps|vcvtps2ph
to_general : vmov[dq]\.from_vec|vmovmskp[sd]|vpmovmskb|vcvtt?s[sd]2si|vucomis[sd]
to_vector : vmov[dq]\.to_vec|vcvtsi2s[sd]
test_vector : vptest|vtestp[sd]
insert : vpinsr[bwdq]
extract : vpextr[bwdq]
compress : vp?(compress|expand)(ps|pd|d|q)
mask_logic : k(and|andn|or|xor|xnor|not|mov)[bwdq]
mask_shift : kshift[lr][bwdq]|kadd[bwdq]|kunpck\w+
mask_test : k(or)?test[bwdq]|kmov[bwdq]\.from_mask
to_mask : kmov[bwdq]\.to_mask|vpmov[bwdq]2m
from_mask : vpmovm2[bwdq]
masked_load : vp?maskmov\w+\.load
masked_store : vp?maskmov\w+\.store
gather : v(p?gather)\w+(\.vex)?
scatter : v(p?scatter)\w+
tile_product : tdp\w+
tile_load : tileloadd
tile_load_past : tileloaddt1
tile_store : tilestored
tile_zero : tilezero
tile_state : ldtilecfg|sttilecfg|tilerelease
"""

_FIGURES = """
move : 0 - | = | = | =
alu : 1 0156 | = | = | 1 0156A
lea : 1 15 | = | 1 0156 | 1 0156A
shift : 1 06 | = | = | =
shift_cl : 2 2*06+0156 | 2 3*06 | 2 2*06 | =
flag : 1 06 | = | = | =
carry : 2 06+0156 | 1 06 | = | =
bits : 3 1 | = | = | =
bit_logic : 1 15 | = | = | 1 15A
swap : 2 15+06 | = | = | =
multiply : 3 1 | = | = | =
multiply_wide : 4 1+6 | 4 1+5 | = | =
divide : 39 0:24 | 35 0:21 | 14 1:4 | 10 1:4
add_float : 3 1 | 4 01 ; 4 01 ; 4 05 | = | 3 15 ; 3 15 ; 4 05 | 2 15 ; 2 15 ; 4 05
multiply_float : 5 01 | 4 01 ; 4 01 ; 4 05 | = | = | 3 01 ; 3 01 ; 4 05
fma : 5 01 | 4 01 ; 4 01 ; 4 05 | = | =
minmax_float : 3 1 | 4 01 ; 4 01 ; 4 05 | = | =
compare_mask : 3 5 | = | = | =
divide_single : 13 0:7 ; 21 0:14 | 11 0:3 ; 11 0:5 ; 18 0:10 | = | = | 11 0:3 ; 11 0:5 ; 17 0:10
divide_double : 20 0:14 ; 35 0:28 | 14 0:4 ; 14 0:8 ; 23 0:16 | = | = | 13 0:4 ; 13 0:8 ; 22 0:16
root_single : 11 0:7 ; 21 0:14 | 12 0:3 ; 12 0:6 ; 20 0:12 | = | = | 12 0:3 ; 12 0:6 ; 20 0:13
root_double : 16 0:14 ; 35 0:28 | 18 0:6 ; 18 0:12 ; 32 0:24 | = | =
estimate : 5 0 ; 11 2*0+015 | 4 0 ; 4 0 ; 7 2*0+05 | = | = | 4 0 ; 4 0 ; 6 2*0+05
round : 6 2*1 | 8 2*01 ; 8 2*01 ; 8 2*05 | = | =
exponent : 4 01 | 4 01 ; 4 01 ; 4 05 | = | =
logic_float : 1 5 | 1 015 ; 1 015 ; 1 05 | = | =
logic : 1 015 | 1 015 ; 1 015 ; 1 05 | = | =
add_int : 1 15 | 1 015 ; 1 015 ; 1 05 | = | =
simple_int : 1 15 | 1 01 ; 1 01 ; 1 0 | = | =
wide_minmax : 5 0 | 3 5 | = | = | 3 0
multiply_int : 5 0 | 5 01 ; 5 01 ; 5 05 | = | =
multiply_dword : 10 2*0 | 10 2*01 ; 10 2*01 ; 10 2*05 | = | =
multiply_qword : 15 3*0 | 15 3*01 ; 15 3*01 ; 15 3*05 | = | =
dot_bf16 : 5 01 | 5 01 ; 5 01 ; 5 05 | = | = | 8 2*0
sad : 5 0 | 3 5 | = | =
shuffle : 1 5 | = | 1 15 ; 1 15 ; 1 5 | =
shuffle_int : 1 5 | = | 1 15 ; 1 15 ; 1 5 | =
cross : 1 5 ; 3 5 | = | = | =
narrow_half : 1 5 ; 3 5 | = | = | =
broadcast : 1 5 ; 3 5 | = | = | =
permute_two : 3 5 | = | = | =
permute_narrow : 3 5 | 6 2*5 | 3 5 | = | 4 5
permute_two_narrow : 3 5 | 7 2*5+05 | = | =
narrow : 4 2*5 | = | = | = | 2 2*15 ; 4 2*15 ; 4 2*5
blend : 1 015 | = | = | =
blend_vector : 2 2*5 | 2 2*015 | = | 3 3*015
blend_mask : 1 015 | 1 015 ; 1 015 ; 1 05 | = | =
shift_imm : 1 0 | 1 01 ; 1 01 ; 1 0 | = | =
shift_each : 3 2*0+5 | 1 01 ; 1 01 ; 1 0 | = | =
shift_all : 2 0+5 ; 4 0+5 | 2 5+01 ; 4 5+01 ; 4 5+0 | = | 2 15+01 ; 4 5+01 ; 4 5+0
convert : 3 1 | 4 01 ; 4 01 ; 4 05 | = | =
convert_width : 4 1+5 ; 6 1+5 | 5 5+01 ; 7 5+01 ; 7 5+05 | = | =
convert_bf16 : 6 1+5 | 7 5+01 | = | 7 5+01 ; 7 5+01 ; 7 5+05 | 8 5+01 ; 8 5+01 ; 8 2*0+5
convert_half : 2 0+5 ; 4 0+5 | 5 5+01 ; 7 5+01 ; 7 5+0 | = | 6 5+01 ; 8 5+01 ; 11 5+0 | 5 5+01 ; 8 5+01 ; 8 5+0
to_general : 2 0 | = | = | 3 0
to_vector : 1 5 | = | = | 3 5
test_vector : 2 0+5 ; 4 0+5 | 3 0+5 | = | 4 0+5 ; 6 0+5
insert : 2 2*5 | = | = | 4 15+5
extract : 2 0+5 | 3 0+5 | = | 4 0+15
compress : 3 2*5 | = | = | =
mask_logic : 1 0 | = | = | =
mask_shift : 4 5 | = | = | =
mask_test : 3 0 | = | = | =
to_mask : 3 5 | = | = | =
from_mask : 3 05 | = | = | =
masked_load : 2 2*5 | 1 015 | = | =
masked_store : 1 0+15 | 1 0 | = | =
gather : 14 5 | 25 0:25 | 20 0+5 | =
scatter : 11 0+5 | = | = | =
tile_product : 52 T:16 | = | = | = | 16 T:16
tile_load : 45 - | = | = | =
tile_load_past : 48 - | = | = | =
tile_store : 16 - | = | = | =
tile_zero : 16 T | = | = | =
tile_state : 100 T:16 | = | = | =
"""


class Core(NamedTuple):
    """One of Intel's cores, as `costs` gives Zen 4's figures.

    ISSUE_WIDTH: operations that are allocated in a cycle. LOAD_LATENCY: cycles to a register, by kind. loads, stores:
    (ports for accesses of up to 256 bits, ports for 512). column: of the tables above. SHUT_BY_512: see costs.py; port
    1, whose unit for vectors is half of port 0's of 512 bits (248966). Measured on a Cascade Lake: 16 numbers of e4m3
    widened by operations of 256 bits beside some of 512 take 4.9 cycles, where three ports would take 3.0.
    """

    MODEL: str
    ISSUE_WIDTH: int
    LOAD_LATENCY: dict[str, int]
    loads: tuple[str, str]
    stores: tuple[str, str]
    column: int
    SHUT_BY_512: tuple[str, ...] = ()

    def latency_of(self, row: Row) -> int:
        found = _figures(row, self.column)
        return cost_of(row).latency if found is None else found[0]

    def uses_of(self, row: Row, loaded_bits: int, stored_bits: int) -> list[tuple[tuple[str, ...], float]]:
        """What one instruction keeps busy; see costs.uses_of."""
        uses: list[tuple[tuple[str, ...], float]] = []
        for bits, (narrow, wide) in ((loaded_bits, self.loads), (stored_bits, self.stores)):
            if bits:
                ports = _ports(wide if bits > 256 and not is_scattered(row) else narrow)
                uses.append((ports, _accesses(row) / len(ports)))
        if is_access(row) and (loaded_bits or stored_bits):
            return uses
        found = _figures(row, self.column)
        if found is not None:
            return uses + found[1]
        cost = cost_of(row)
        if cost.ports == ("load",):  # a prefetch, whose operand is an address: nothing is loaded
            ports = _ports(self.loads[0])
            return [(ports, 1 / len(ports))]
        return uses if cost.ports == ("store",) else [*uses, (_ports("0156"), cost.throughput)]

    def operations_of(self, row: Row) -> int:
        from .costs import operations_of

        return operations_of(row)


def _core(model: str, width: int, loads: tuple[str, str], stores: tuple[str, str], general: int, vector: int,
          column: int) -> Core:
    return Core(model, width, {"gpr": general, "vec": vector, "mask": vector, "tile": 0}, loads, stores, column,
                () if column == 0 else ("p1",))


_CORES = {
    "haswell": _core("Haswell", 4, ("23", "23"), ("4", "4"), 4, 6, 0),
    "skylake-avx512": _core("Skylake-SP", 4, ("23", "23"), ("4", "4"), 4, 6, 1),
    "icelake-server": _core("Ice Lake-SP", 5, ("23", "23"), ("49", "4"), 5, 6, 2),
    "sapphirerapids": _core("Sapphire Rapids", 6, ("23B", "23"), ("49", "4"), 5, 7, 3),
    "graniterapids": _core("Granite Rapids", 6, ("23B", "23"), ("49", "4"), 5, 7, 4),
}


def core(name: str) -> Core:
    """The core of a target, by `Target.core`. Raises KeyError that lists the known ones."""
    found = _CORES.get(name)
    if found is None:
        known = ", ".join(["zen3", "zen4", "zen5", *_CORES])
        raise KeyError(f"costs of instructions: found {name!r}; expected one of {known}")
    return found


def is_access(row: Row) -> bool:
    """Whether the form of a row with a memory operand is a load or a store and nothing else."""
    return row.mnemonic.startswith(("mov", "vmov", "vbroadcast", "vpbroadcastd", "vpbroadcastq", "kmov", "pop", "push",
                                    "prefetch", "tileload", "tilestore")) and not row.mnemonic.startswith("vmovmsk")


def _accesses(row: Row) -> int:
    """How many accesses of memory one instruction makes: gathers and scatters one for each lane, tiles one a row."""
    if any(o.sibmem for o in row.operands):
        return ROWS
    form = next((o for o in row.operands if o.index_bits), None)
    return 1 if form is None else max(o.bits for o in row.operands if o.kind == "vec") // form.memory_bits


def _ports(text: str) -> tuple[str, ...]:
    return tuple("tiles" if c == "T" else f"p{10 + 'AB'.index(c) if c in 'AB' else c}" for c in text)


@lru_cache(maxsize=1)
def _classes() -> dict[str, re.Pattern[str]]:
    lines = (line.partition(" : ") for line in _CLASSES.strip().split("\n"))
    return {name: re.compile(pattern) for name, _, pattern in lines}


@lru_cache(maxsize=1)
def _table() -> dict[str, list[list[str]]]:
    """Class -> for each core, `latency uses` for one to three widths."""
    found: dict[str, list[list[str]]] = {}
    for line in _FIGURES.strip().split("\n"):
        name, _, columns = line.partition(" : ")
        cores: list[list[str]] = []
        for column in columns.split(" | "):
            cores.append(cores[-1] if column == "=" else [part.strip() for part in column.split(";")])
        found[name] = cores + cores[-1:] * (len(_CORES) - len(cores))
    return found


@lru_cache(maxsize=4096)
def class_of(family: str) -> str | None:
    """The class of a family of rows; None for what takes Zen 4's figures."""
    return next((name for name, pattern in _classes().items() if pattern.fullmatch(family)), None)


def _figures(row: Row, column: int) -> tuple[int, list[tuple[tuple[str, ...], float]]] | None:
    name = class_of(family_of(row.name))
    if name is None:
        return None
    widths = _table()[name][column]
    latency, _, text = widths[min({256: 1, 512: 2}.get(row.length, 0), len(widths) - 1)].partition(" ")
    return int(latency), parse_uses(text, _ports)
