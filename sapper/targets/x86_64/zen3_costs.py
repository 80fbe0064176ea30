"""What the rows cost on Zen 3: latency, and the pipes that their operations take.

Leaves: `CORE`; zen_costs.py has how it is used and how the lines are read. Holds: a bound of these figures is not above
what was measured, of one row alone or of two beside each other.

Sources: measured on a Zen 3 (EPYC, family 25 model 1) with tests/targets/measure_costs.py. AMD publication 56665,
Software Optimization Guide for family 19h (LLVM's X86ScheduleZnver3.td quotes it), has the widths: six macro-ops in a
cycle, four integer pipes, three addresses, three loads, one store of a vector, four pipes of vectors of which two
multiply and two add; and that a load to a vector takes 7 cycles, by which latencies between register files are parted.
Two loads of vectors in a cycle are measured. Which pipes a family takes is from loops of it beside products, sums,
shuffles and integer products.

- What moves between the halves of 256 bits takes a multiplier, and one such starts in a cycle (`c`): broadcasts from a
  register, insertions, extractions, permutations. Conversions that change the width, and widening to 256 bits, are two
  operations, one of them such; not where the narrow operand is in memory.
- A result of sums or products is ready for shuffles and integer operations a cycle later than for its own kind, and
  the other way round: a shuffle in a chain of sums adds three cycles. The latencies are those within a kind.
- What reads three registers (multiply-adds, blends by a vector) and what leaves the vectors (stores, moves to general
  registers) share something (`r`): two multiply-adds and a store take from 1.62 to 1.94 cycles, five and a store from
  2.59 to 2.73, two products and a store 1.0.
- Stores of vectors and moves to general registers take turns (`y`); what sets flags has a pipe of its own (`f`).
- Moves between registers of one kind cost nothing but their place among the six.
"""

from __future__ import annotations

from .zen_costs import Core, read_figures

PIPES = {
    "v": ("fp0", "fp1", "fp2", "fp3"),                  # any pipe of vectors
    "m": ("fp0", "fp1"),                                # products, saturating sums, blends and picks by a vector
    "a": ("fp2", "fp3"),                                # sums, minima, comparisons of floats, conversions
    "s": ("fp1", "fp2"),                                # shuffles and shifts
    "p": ("fp0", "fp3"),                                # integer products
    "x": ("fp2",),                                      # from general registers
    "c": ("crossing",),                                 # see above
    "d": ("divider",),
    "r": ("third",),                                    # see above
    "y": ("from_fp",),                                  # to general registers and memory
    "f": ("flags",),
    "u": ("microcode",),                                # many operations, one instruction at a time
    "g": ("alu0", "alu1", "alu2", "alu3"),
    "k": ("alu1",),                                     # integer products
    "b": ("alu1", "alu2"),                              # shifts and bits
    "e": ("alu0", "alu3"),                              # what reads flags
    "n": ("agu",),
}

_FIGURES = """
0 - : mov xchg movnti vzeroupper vmovups vmovupd vmovaps vmovapd vmovdqu vmovdqa vmovntps vmovntpd vmovntdq vmovntdqa
0 - : vmovss vmovsd vbroadcastf128 vbroadcasti128 vmaskmovps.load vmaskmovpd.load vpmaskmovd.load vpmaskmovq.load
1 - : nop endbr64 nop.memory
1 a : vminps vminpd vminss vminsd vmaxps vmaxpd vmaxss vmaxsd vcmpps vcmppd
1 b : cdq cqo rol.imm rol.cl ror.imm ror.cl shl.imm shl.cl shr.imm shr.cl sar.imm sar.cl shlx shrx sarx rorx bzhi bt
1 e : seto cmovo setno cmovno setb cmovb setae cmovae sete cmove setne cmovne setbe cmovbe seta cmova sets cmovs setns
1 e : cmovns setp cmovp setnp cmovnp setl cmovl setge cmovge setle cmovle setg cmovg
1 g : add or adc sbb and sub xor cmp cmp.8 cmp.16 test.8 test.16 test not neg inc dec andn popcnt lzcnt bswap lea xadd
1 g/- : mov.8 mov.16 movzx.8 movzx.16 movsx.8 movsx.16 movsxd
1 g:1 : sfence
1 g:10 : lfence
1 g:60 : mfence
1 g:76 : pause
1 m : vpaddsb vpaddsw vpaddusb vpaddusw vpsubsb vpsubsw vpsubusb vpsubusw vpabsb vpabsw vpabsd vpcmpeqq
1 m+c : vinsertf128 vinserti128
1 m+c/- : vbroadcastsd
1 m+r:0.35 : vblendvps vblendvpd vpblendvb
1 n:0.33 : prefetchnta prefetcht0 prefetcht1 prefetcht2 prefetchw
1 s : vmovhlps vmovlhps vunpcklps vunpckhps vshufps vpermilps.imm vunpcklpd vunpckhpd vshufpd vpermilpd.imm vpunpcklbw
1 s : vpunpckhbw vpunpcklwd vpunpckhwd vpunpckldq vpunpckhdq vpunpcklqdq vpunpckhqdq vpshufd vpshuflw vpshufhw vpshufb
1 s : vpalignr vpslldq vpsrldq vpacksswb vpackuswb vpackssdw vpackusdw vpsllw vpslld vpsllq vpsrlw vpsrld vpsrlq vpsraw
1 s : vpsrad vpsllw.imm vpslld.imm vpsllq.imm vpsrlw.imm vpsrld.imm vpsrlq.imm vpsraw.imm vpsrad.imm vpsllvd vpsllvq
1 s : vpsrlvd vpsrlvq vpsravd
1 s/- : vmovshdup vmovsldup vmovddup
1 s/-;m+c/- : vbroadcastss vpbroadcastb vpbroadcastw vpbroadcastd vpbroadcastq
1 u:3.9;u:5.9 : vmaskmovpd.store vpmaskmovq.store
1 u:5.9;u:11.9 : vmaskmovps.store vpmaskmovd.store
1 v : vmovss.merge vmovsd.merge vblendps vblendpd vandps vandnps vorps vxorps vandpd vandnpd vorpd vxorpd vpaddb vpaddw
1 v : vpaddd vpaddq vpsubb vpsubw vpsubd vpsubq vpminsb vpmaxsb vpminub vpmaxub vpminsw vpmaxsw vpminuw vpmaxuw vpminsd
1 v : vpmaxsd vpminud vpmaxud vpand vpandn vpor vpxor vpblendd vpblendw vpcmpeqb vpcmpgtb vpcmpeqw vpcmpgtw vpcmpeqd
1 v : vpcmpgtd vpcmpgtq
1 v/- : vmovq
1 x+s/s : vpinsrb vpinsrw vpinsrd vpinsrq
1;4 s;m+c+s/s : vpmovsxbw vpmovzxbw vpmovsxbd vpmovzxbd vpmovsxbq vpmovzxbq vpmovsxwd vpmovzxwd vpmovsxwq vpmovzxwq
1;4 s;m+c+s/s : vpmovsxdq vpmovzxdq
2 2*g : blsr
2 b+g : tzcnt
2 y+r:0.75 : vmovq.from_vec
2 y+r:0.75/- : vmovd.from_vec
2;4 f+r:0.35 : vmovmskps vmovmskpd
2;4 y+r:0.75 : vpmovmskb
3 2*k : mul imul.wide
3 5*g : cmpxchg
3 6*g : bsf
3 a : vaddps vaddpd vaddss vaddsd vsubps vsubpd vsubss vsubsd vroundps vroundpd vroundss vroundsd vcvtdq2ps vcvtps2dq
3 a : vcvttps2dq vcvtss2sd vcvtsd2ss
3 k : imul imul.imm pext pdep
3 m : vmulps vmulpd vmulss vmulsd vpermilps vpermilpd vrcpps vrsqrtps
3 m+c : vperm2f128 vperm2i128 vextractf128 vextracti128
3 p : vpmullw vpmulhw vpmulhuw vpmulld vpmuludq vpmuldq vpmaddwd vpmaddubsw vpsadbw
3 y+s/s : vpextrb vpextrw vpextrd vpextrq
3;4 a;a+m+c/a : vcvtdq2pd vcvtps2pd vcvtph2ps
3;5 f+s : vptest vtestps vtestpd
3;6 a;a+m+c : vcvtpd2ps vcvtpd2dq vcvttpd2dq vcvtps2ph
4 6*g : bsr
4 f+a : vucomiss vucomisd
4 k+g : mulx
4 m+r:0.35 : vfmadd132ps vfmadd132ss vfmadd132pd vfmadd132sd vfmadd213ps vfmadd213ss vfmadd213pd vfmadd213sd vfmadd231ps
4 m+r:0.35 : vfmadd231ss vfmadd231pd vfmadd231sd vfmsub132ps vfmsub132ss vfmsub132pd vfmsub132sd vfmsub213ps vfmsub213ss
4 m+r:0.35 : vfmsub213pd vfmsub213sd vfmsub231ps vfmsub231ss vfmsub231pd vfmsub231sd vfnmadd132ps vfnmadd132ss
4 m+r:0.35 : vfnmadd132pd vfnmadd132sd vfnmadd213ps vfnmadd213ss vfnmadd213pd vfnmadd213sd vfnmadd231ps vfnmadd231ss
4 m+r:0.35 : vfnmadd231pd vfnmadd231sd vfnmsub132ps vfnmsub132ss vfnmsub132pd vfnmsub132sd vfnmsub213ps vfnmsub213ss
4 m+r:0.35 : vfnmsub213pd vfnmsub213sd vfnmsub231ps vfnmsub231ss vfnmsub231pd vfnmsub231sd
4 x : vmovq.to_vec
4 x/- : vmovd.to_vec
6 g:5.9 : lock.add lock.or lock.and lock.sub lock.xor lock.inc lock.dec
6 m+c+s : vpermpd.imm vpermq.imm
6 y+a : vcvttss2si vcvtss2si vcvttsd2si vcvtsd2si
7 g:6.9 : lock.xadd
7 x+a/a : vcvtsi2ss vcvtsi2sd
8 2*m+c : vpermps vpermd
9 g:8.9 : lock.cmpxchg
10 2*m+d:3 : vdivps vdivss
13 2*m+d:4.4 : vdivpd vdivsd
14 2*m+d:4.9 : vsqrtps vsqrtss
20 2*m+d:8.3 : vsqrtpd vsqrtsd
20 u:2.9;u:3.9 : vgatherdpd.vex vgatherqps.vex vgatherqpd.vex vpgatherdq.vex vpgatherqd.vex vpgatherqq.vex
20 u:3.9;u:7.9 : vgatherdps.vex vpgatherdd.vex
"""

CORE = Core("Zen 3", 6, {"gpr": 4, "vec": 7, "mask": 7, "tile": 0}, read_figures(_FIGURES), PIPES, {64: 0.0, 512: 0.5},
            {64: 0.5, 512: 1.0}, 1 / 3, {512: "y+r:0.75"})
