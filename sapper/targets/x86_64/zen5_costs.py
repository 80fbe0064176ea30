"""What the rows cost on Zen 5: latency, and the pipes that their operations take.

Leaves: `CORE`; zen_costs.py has how it is used and how the lines are read. Holds: a bound of these figures is not above
what was measured, of one row alone or of two beside each other; they are those of servers and desktops, whose pipes
have 512 bits.

Sources: measured on a Zen 5 (EPYC, family 26 model 2) with tests/targets/measure_costs.py. AMD publication 58455,
Software Optimization Guide for Zen 5, has the widths: eight macro-ops in a cycle, six integer pipes, four addresses,
two loads and one store of 512 bits, four pipes of vectors of which two multiply and two add; and that a load to a
vector takes 7 cycles, by which latencies between register files are parted. Which pipes a family takes is from loops of
it beside multiply-adds, additions and permutations.

- A latency of 1 is what a chain of vectors shows where the scheduler is not full; where it is, each link takes 2.
- A sum is ready for the next sum after 2 cycles, for other rows after 3.
- Multiply-adds and the stores of vectors share something, five in two cycles (`r`; a store of 512 bits is two), it may
  be reads of a third register: two multiply-adds and a store of 512 bits take 1.96 cycles, two products and it 1.01.
"""

from __future__ import annotations

from .zen_costs import Core, read_figures

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
1 g : add or adc sbb and sub xor cmp cmp.8 cmp.16 test.8 test.16 test not neg inc dec andn popcnt lzcnt bswap lea xchg
1 g : xadd seto cmovo setno cmovno setb cmovb setae cmovae sete cmove setne cmovne setbe seta sets cmovs setns cmovns
1 g : setp cmovp setnp cmovnp setl setge setle setg nop endbr64 nop.memory
1 g/- : mov mov.8 mov.16 movzx.8 movzx.16 movsx.8 movsx.16 movsxd
1 g:0.5 : sfence
1 g:11 : lfence
1 g:75 : mfence
1 g:96 : pause
1 i : vpsubsb vpsubsw vpsubusb vpsubusw vpcmpeqq vpcmpgtq kandb kandnb korb kxnorb kxorb kaddb knotb kshiftlb kshiftrb
1 i : kandw kandnw korw kxnorw kxorw kaddw knotw kshiftlw kshiftrw kandd kandnd kord kxnord kxord kaddd knotd kshiftld
1 i : kshiftrd kandq kandnq korq kxnorq kxorq kaddq knotq kshiftlq kshiftrq kunpckbw kunpckwd kunpckdq
1 i/- : kmovb kmovw kmovd kmovq
1 m : vmaskmovps.load vmaskmovpd.load vpmaskmovd.load vpmaskmovq.load vblendvps vblendpd vblendvpd
1 s : vmaskmovps.store vmaskmovpd.store vpmaskmovd.store vpmaskmovq.store vpblendvb vinsertf128 vinsertf32x4
1 s : vinsertf64x2 vinsertf32x8 vinsertf64x4 vinserti128 vinserti32x4 vinserti64x2 vinserti32x8 vinserti64x4
1 s/- : vbroadcastsd
1 v : vmovss.merge vmovsd.merge vmovhlps vmovlhps vblendps vblendmps vandps vandnps vorps vxorps vunpcklps vunpckhps
1 v : vshufps vpermilps.imm vblendmpd vandpd vandnpd vorpd vxorpd vunpcklpd vunpckhpd vshufpd vpermilpd.imm vpaddb
1 v : vpaddw vpaddd vpaddq vpsubb vpsubw vpsubd vpsubq vpminsb vpmaxsb vpminub vpmaxub vpminsw vpmaxsw vpminuw vpmaxuw
1 v : vpminsd vpmaxsd vpminud vpmaxud vpand vpandd vpandq vpandn vpandnd vpandnq vpor vpord vporq vpxor vpxord vpxorq
1 v : vpternlogd vpblendmd vpternlogq vpblendmq vpblendmb vpblendmw vpblendd vpblendw vpcmpeqb vpcmpgtb vpcmpeqw
1 v : vpcmpgtw vpcmpeqd vpcmpgtd vpunpcklbw vpunpckhbw vpunpcklwd vpunpckhwd vpunpckldq vpunpckhdq vpunpcklqdq
1 v : vpunpckhqdq vpshufd vpshuflw vpshufhw vpmovm2b vpmovm2w vpmovm2d vpmovm2q
1 v/- : vmovq vmovshdup vmovsldup
1 v/-;s/- : vbroadcastss vpbroadcastb vpbroadcastw vpbroadcastd vpbroadcastq
1 w:3;w:5;w:8.9 : vscatterdpd vscatterqps vscatterqpd vpscatterdq vpscatterqd vpscatterqq
1 w:6;w:9;w:16.8 : vscatterdps vpscatterdd
1 n:0.25 : prefetchnta prefetcht0 prefetcht1 prefetcht2 prefetchw
0;0;2 -;-;s : vbroadcastf32x4 vbroadcastf64x2 vbroadcasti32x4 vbroadcasti64x2
1;1;2 v/-;v/-;s : vmovddup
2 a : vaddps vaddpd vaddss vaddsd vsubps vsubpd vsubss vsubsd vminps vminpd vminss vminsd vmaxps vmaxpd vmaxss vmaxsd
2 a : vrangeps vcmpps vrangepd vcmppd
2 i : vpaddsb vpaddsw vpaddusb vpaddusw vpminsq vpminuq vpmaxsq vpmaxuq vpabsb vpabsw vpabsd vpabsq
2 m : vprold vprolvd vprord vprorvd vprolq vprolvq vprorq vprorvq vpsllw vpslld vpsllq vpsrlw vpsrld vpsrlq vpsraw
2 m : vpsrad vpsraq
2 s : vbroadcastf32x8 vbroadcastf64x4 vbroadcasti32x8 vbroadcasti64x4 vpermilps vpermilpd vpslldq vpsrldq vpacksswb
2 s : vpackuswb vpackssdw vpackusdw vpshufb vpalignr
2 x+s : vpinsrb
2 x+v : vpinsrd vpinsrq vpinsrw
2 y+r:0.4 : vmovq.from_vec vmovmskps vmovmskpd vpmovmskb
2 y+r:0.4/- : vmovd.from_vec
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
5 x : vmovq.to_vec
5 x/- : vmovd.to_vec
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

CORE = Core("Zen 5", 8, {"gpr": 4, "vec": 7, "mask": 7, "tile": 0}, read_figures(_FIGURES), PIPES, {64: 0.25, 512: 0.5},
            {256: 0.5, 512: 1.0}, 0.25, {256: "r:0.4", 512: "r:0.8"})
