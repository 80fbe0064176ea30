"""Facts of targets, and host detection played by invented processors."""

from __future__ import annotations

import ctypes
import platform
import threading
from typing import Any

import pytest

from sapper import targets
from sapper.codegen.encode import encode
from sapper.codegen.machine import Immediate, Instruction, MachineFunction, Memory, Register
from sapper.targets.aarch64.target import TARGETS as ARM
from sapper.targets.plain import by_name
from sapper.targets.ptx.levels import LEVELS
from sapper.targets.ptx.target import TARGETS as GPUS
from sapper.targets.riscv64.target import TARGETS as RISCV
from sapper.targets.rule_tables import joined
from sapper.targets.x86_64 import detect, tiles
from sapper.targets.x86_64.instructions import ROWS
from sapper.targets.x86_64.target import TARGETS, V3_FEATURES, V3_OPTIONAL_FEATURES, V4_FEATURES


def g(number: int) -> Register:
    return Register("gpr", number)


def ins(name: str, *operands: object) -> Instruction:
    return Instruction(ROWS[name], list(operands))  # type: ignore[arg-type]


def test_known_targets_have_consistent_facts() -> None:
    assert set(targets.known_targets()) >= {"v3", "v4", "zen3", "zen4", "zen5", "sapphirerapids", "icelake-server",
                                            "cascadelake", "skylake-avx512", "haswell"}
    assert set(targets.known_targets()) == set(TARGETS) | set(GPUS) | set(ARM) | set(RISCV)
    for name in TARGETS:
        found = targets.target(name)
        assert found.name == name
        assert found.features >= V3_FEATURES
        wide = "avx512f" in found.features
        assert (found.lanes, found.vector_bits, found.vector_registers) == ((16, 512, 32) if wide else (8, 256, 16))
        assert found.mask_kind == ("opmask" if wide else "vector")
        assert found.l1_bytes < found.l2_bytes < found.l3_bytes
    assert targets.target("zen4").has("avx512_bf16")
    assert not targets.target("haswell").has("avx512f")


@pytest.mark.parametrize("change, part", [
    ({"name": "zen6"}, "found the name zen6 in its row"),
    ({"core": "zen6"}, "found 'zen6'; expected one of zen3"),
    ({"features": TARGETS["zen4"].features | {"avx512_bf61"}}, "found the features avx512_bf61"),
    ({"features": TARGETS["zen4"].features - {"avx512vl"}}, "without avx512vl"),
    ({"features": TARGETS["v3"].features - {"fma"}}, "without fma"),
    ({"asks": (("row_stream", 4),)}, "found asks row_stream"),
    ({"l1_bytes": 32}, "expected bytes, at least 1024"),
    ({"l3_bytes": 1024}, "each cache as large as the one before it"),
    ({"fma_per_cycle": 0}, "found fma_per_cycle 0"),
    ({"fma_latency": -1}, "found fma_latency -1"),
])
def test_facts_that_can_not_be_are_told_when_a_target_is_asked_for(
        monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], part: str) -> None:
    monkeypatch.setitem(TARGETS, "mine", TARGETS["zen4"]._replace(**{"name": "mine", **change}))
    with pytest.raises(ValueError, match=r"^target mine: ") as caught:
        targets.target("mine")
    assert part in str(caught.value)


def test_two_targets_of_one_name_are_told() -> None:
    with pytest.raises(ValueError, match="found two called v3"):
        by_name([TARGETS["v3"], TARGETS["zen4"], TARGETS["v3"]._replace(l1_bytes=1024)])


def test_gpus_are_levels_of_the_instruction_table() -> None:
    for name, found in GPUS.items():
        assert targets.target(name) is found and found.name == name and name in LEVELS
        assert found.lanes == found.wide_lanes == 32
        unit = found.matrix
        (rows, columns), *smaller = unit.shapes
        assert all(a <= rows and b <= columns for a, b in smaller) and unit.workers == found.processors
        stage_bytes = (rows + columns) * unit.depth * 2
        assert unit.stages * stage_bytes <= found.shared_bytes
        assert rows * columns // (32 * unit.warps[0] * unit.warps[1]) < found.registers


def test_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(KeyError, match="found 'z80'; expected one of v3, v4"):
        targets.target("z80")


def test_every_feature_of_a_row_can_be_detected_or_is_common_to_all() -> None:
    asked = set().union(*(e.features for row in ROWS.values() for e in row.encodings))
    assert asked <= set(detect.FEATURE_BITS)
    assert set().union(*(t.features for t in TARGETS.values())) <= set(detect.FEATURE_BITS)


def test_detection_code_is_what_the_encoder_makes() -> None:
    body = [ins("mov.64", g(8), g(2)), ins("mov.64", g(9), g(3)), ins("mov.32", g(0), g(7)), ins("mov.32", g(1), g(6)),
            ins("cpuid"), ins("mov.32", Memory(g(8)), g(0)), ins("mov.32", Memory(g(8), disp=4), g(3)),
            ins("mov.32", Memory(g(8), disp=8), g(1)), ins("mov.32", Memory(g(8), disp=12), g(2)),
            ins("mov.64", g(3), g(9)), ins("ret")]
    assert encode(MachineFunction("cpuid", list(body), {})).code == detect.CPUID_CODE
    body = [ins("mov.32", g(1), g(7)), ins("xgetbv"), ins("shl.imm.64", g(2), Immediate(32)), ins("or.64", g(0), g(2)),
            ins("ret")]
    assert encode(MachineFunction("xgetbv", list(body), {})).code == detect.XGETBV_CODE


class Processor:
    """A processor that has `features`, described by the bits of CPUID."""

    def __init__(self, features: set[str], vendor: bytes = b"GenuineIntel", family: int = 6, model: int = 0x55,
                 enabled: int = 0x600E7) -> None:
        self.features, self.vendor, self.family, self.model, self.enabled = features, vendor, family, model, enabled
        self.xgetbv_calls = 0

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        b, d, c = (int.from_bytes(self.vendor[i:i + 4], "little") for i in (0, 4, 8))
        if leaf == 0:
            return 13, b, c, d
        if leaf == 0x80000000:
            return 0x80000004, 0, 0, 0
        if 0x80000002 <= leaf <= 0x80000004:
            part = b"An invented processor".ljust(48, b"\0")[16 * (leaf - 0x80000002):][:16]
            return tuple(int.from_bytes(part[i:i + 4], "little") for i in (0, 4, 8, 12))  # type: ignore[return-value]
        if leaf == 4:
            level, kind, size = ((1, 1, 48 << 10), (1, 2, 32 << 10), (2, 3, 2 << 20), (3, 3, 60 << 20),
                                 (0, 0, 0))[min(subleaf, 4)]
            return level << 5 | kind, 63, max(0, size // 64 - 1), 0
        out = [0, 0, 0, 0]
        for name in self.features:
            at_leaf, at_subleaf, register, bit, _ = detect.FEATURE_BITS[name]
            if (leaf, subleaf) == (at_leaf, at_subleaf):
                out[register] |= 1 << bit
        if leaf == 7 and subleaf == 0:
            out[0] = 1
        if leaf == 1:
            family, extended = (self.family, 0) if self.family < 15 else (15, self.family - 15)
            out[0] = extended << 20 | (self.model >> 4) << 16 | family << 8 | (self.model & 15) << 4 | 2
            out[2] |= (1 << 27) if self.enabled else 0
        return out[0], out[1], out[2], out[3]

    def xgetbv(self, _: int) -> int:
        self.xgetbv_calls += 1
        return self.enabled


ALL = set(detect.FEATURE_BITS)
SAPPHIRE_RAPIDS = ALL - {"prefetchi"}


def read(processor: Processor, granted: bool = True) -> detect.Host:
    return detect.read_host(processor.cpuid, processor.xgetbv, lambda: granted)


def test_a_known_processor_gets_its_row_with_its_own_caches() -> None:
    found = read(Processor(SAPPHIRE_RAPIDS, model=0x8F))
    assert found.brand == "An invented processor"
    assert (found.l1_bytes, found.l2_bytes, found.l3_bytes, found.cache_line_bytes) == (48 << 10, 2 << 20, 60 << 20, 64)
    chosen = detect.choose_target(found)
    assert (chosen.name, chosen.l3_bytes) == ("sapphirerapids", 60 << 20)
    for features, family, model, name in ((ALL - {"avx_vnni"}, 0x19, 0x11, "zen4"), (ALL, 0x1A, 0x02, "zen5")):
        assert detect.choose_target(read(Processor(features, b"AuthenticAMD", family, model))).name == name


def test_features_that_the_processor_lacks_are_never_chosen() -> None:
    # A hypervisor hides AVX-512 from a Zen 4.
    hidden = {f for f in ALL if not f.startswith("avx512")}
    chosen = detect.choose_target(read(Processor(hidden, b"AuthenticAMD", 0x19, 0x11)))
    assert chosen.name == "zen3" and chosen.features <= hidden
    # An unknown processor with AVX-512 and VNNI but no BF16.
    chosen = detect.choose_target(read(Processor(ALL - {"avx512_bf16"}, b"SomeoneElse!", 6, 1)))
    assert chosen.name == "v4" and "avx512_vnni" in chosen.features and "avx512_bf16" not in chosen.features
    for missing in sorted(V4_FEATURES - V3_FEATURES):
        chosen = detect.choose_target(read(Processor(ALL - {missing}, b"AuthenticAMD", 0x19, 0x11)))
        assert chosen.name == "zen3" and chosen.features == V3_FEATURES | V3_OPTIONAL_FEATURES


def test_a_client_with_avx_vnni_has_its_own_row() -> None:
    of_client = {f for f in ALL if not f.startswith(("avx512", "amx"))}
    for model in (0x97, 0xC6, 0xFE):     # Alder Lake, Arrow Lake, and one that no table has
        chosen = detect.choose_target(read(Processor(of_client, model=model)))
        assert chosen.name == "alderlake" and chosen.has("avx_vnni")
    assert detect.choose_target(read(Processor(of_client - {"avx_vnni"}, model=0x97))).features == V3_FEATURES


def test_state_that_the_system_does_not_enable_hides_the_features() -> None:
    chosen = detect.choose_target(read(Processor(ALL - {"avx_vnni"}, enabled=0x7)))
    assert chosen.name == "v3" and chosen.features == V3_FEATURES
    processor = Processor(ALL, enabled=0)
    with pytest.raises(detect.UnsupportedCPU, match="avx2"):
        detect.choose_target(read(processor))
    assert processor.xgetbv_calls == 0  # it would be an illegal instruction there


AMX = {name for name in ALL if name.startswith("amx")}


def test_tiles_are_there_where_the_processor_has_them_and_the_system_grants_them() -> None:
    assert read(Processor(ALL)).features >= AMX
    assert not read(Processor(ALL), granted=False).features & AMX  # it refused
    assert not read(Processor(ALL, enabled=0xE7)).features & AMX  # it saves none
    assert read(Processor(ALL, enabled=0xE7)).features == ALL - AMX

    def asked() -> bool:
        raise AssertionError("a process asked for tiles that its processor lacks")

    without = Processor(ALL - AMX)
    assert not detect.read_host(without.cpuid, without.xgetbv, asked).features & AMX


@pytest.mark.skipif("amx_tile" not in detect.host().features, reason="no tile registers, or the system grants none")
def test_tiles_are_granted_once_for_all_threads() -> None:
    assert detect.request_tiles() and detect.request_tiles()
    code = encode(MachineFunction("f", [ins("ldtilecfg", Memory(g(7))), ins("tilezero", Register("tile", 0)),
                                        ins("tilerelease"), ins("ret")], {})).code
    address = detect._executable_page(code)
    raw = ctypes.create_string_buffer(tiles.configuration([(16, 64)]), 64)
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
    thread = threading.Thread(target=run, args=(ctypes.addressof(raw),))
    thread.start()
    thread.join()


def test_a_processor_below_v3_is_refused_with_what_it_lacks() -> None:
    with pytest.raises(detect.UnsupportedCPU, match=r"found no bmi2, fma; expected the features of x86-64-v3"):
        detect.choose_target(read(Processor(ALL - {"fma", "bmi2"})))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")
def test_the_host_is_detected() -> None:
    found = detect.host()
    assert found.vendor and found.l1_bytes > 0
    with open("/proc/cpuinfo") as file:
        flags = set(next(line for line in file if line.startswith("flags")).split())
    for name, kernel_name in (("avx2", "avx2"), ("avx512f", "avx512f"), ("fma", "fma"), ("avx512_bf16", "avx512_bf16"),
                              ("bmi2", "bmi2"), ("f16c", "f16c"), ("lzcnt", "abm"), ("avx512_vnni", "avx512_vnni")):
        assert (name in found.features) == (kernel_name in flags)
    if found.features >= V3_FEATURES:
        assert targets.host_target().features <= found.features


def test_an_op_has_one_rule_in_all_tables_of_a_family() -> None:
    assert joined("family", [{"add": 1}, {}, {"sub": 2}]) == {"add": 1, "sub": 2}
    with pytest.raises(ValueError, match="selection rules of family: found two for add; expected one"):
        joined("family", [{"add": 1, "mul": 2}, {"sub": 3, "add": 4}])
