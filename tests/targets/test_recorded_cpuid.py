"""The target of processors whose CPUID was recorded: what their leaves say, also where a hypervisor replaced the model.

Sources: the Granite Rapids, the Cascade Lake, the Zen 3 and the Zen 5 in virtual machines were recorded with detect.py;
the others are of libcpuid's tests (github.com/anrieff/libcpuid, tests/intel/core_11th_gen/rocket-lake-i7.test,
tests/intel/core_10th_gen/ice-lake-xeon-d.test, tests/amd/zen4/epyc-genoa.test,
tests/amd/zen5/amd-ryzen-ai-9-hx-370-with-radeon-890m.test), whose XCR0 is what leaf 13 allows.
"""

from __future__ import annotations

import pytest

from sapper.targets.x86_64 import detect

# Lines are `leaf subleaf: eax ebx ecx edx`; what is not listed reads as zeros. xcr0 is the last one.
DUMPS = {
    "Granite Rapids that shows the model of a Rocket Lake": """
        00000000 0: 00000024 756e6547 6c65746e 49656e69
        00000001 0: 000a0671 01020800 fffa3203 1f8bfbff
        00000004 0: 04000121 02c0003f 0000003f 00000000
        00000004 1: 04000122 03c0003f 0000003f 00000000
        00000004 2: 04000143 03c0003f 000007ff 00000000
        00000004 3: 04004163 03c0003f 00077fff 00000000
        00000007 0: 00000002 f1bf2ffb 1a415f46 23c14010
        00000007 1: 00001c30 00000000 00000000 00084000
        80000000 0: 80000008 00000000 00000000 00000000
        80000001 0: 00000000 00000000 00000121 2c100800
        xcr0: 000600e7""",
    "Rocket Lake (Core i7-11700K)": """
        00000000 0: 0000001b 756e6547 6c65746e 49656e69
        00000001 0: 000a0671 00100800 7ffafbbf bfebfbff
        00000004 0: 1c004121 02c0003f 0000003f 00000000
        00000004 1: 1c004122 01c0003f 0000003f 00000000
        00000004 2: 1c004143 01c0003f 000003ff 00000000
        00000004 3: 1c03c163 03c0003f 00003fff 00000006
        00000007 0: 00000000 f2bf67eb 00405f4e bc000410
        80000000 0: 80000008 00000000 00000000 00000000
        80000001 0: 00000000 00000000 00000121 2c100000
        xcr0: 000002ff""",
    "Ice Lake (Xeon D-1718T in a virtual machine)": """
        00000000 0: 0000001b 756e6547 6c65746e 49656e69
        00000001 0: 000606c1 00200800 fffaf387 bfebfbff
        00000004 0: 3c004121 02c0003f 0000003f 00000000
        00000004 1: 3c004122 01c0003f 0000003f 00000000
        00000004 2: 3c004143 04c0003f 000003ff 00000000
        00000004 3: 3c07c163 04c0003f 00001fff 00000000
        00000007 0: 00000000 f3bfbfb9 00415f46 bc000410
        80000000 0: 80000008 00000000 00000000 00000000
        80000001 0: 00000000 00000000 00000121 2c100800
        xcr0: 000000e7""",
    "Cascade Lake (Xeon in a virtual machine)": """
        00000000 0: 00000016 756e6547 6c65746e 49656e69
        00000001 0: 00050657 01020800 fffa3203 1f8bfbff
        00000004 0: 04000121 01c0003f 0000003f 00000000
        00000004 1: 04000122 01c0003f 0000003f 00000000
        00000004 2: 04000143 03c0003f 000003ff 00000000
        00000004 3: 04004163 0280003f 0000cfff 00000005
        00000007 0: 00000000 d19f67eb 0000081c bc000400
        80000000 0: 80000008 00000000 00000000 00000000
        80000001 0: 00000000 00000000 00000121 2c100800
        xcr0: 000002ff""",
    "Zen 4 (EPYC 9124)": """
        00000000 0: 00000010 68747541 444d4163 69746e65
        00000001 0: 00a10f11 00200800 7efa320b 178bfbff
        00000007 0: 00000001 f1bf97a9 00415fce 10000010
        00000007 1: 00000020 00000000 00000000 00000000
        80000000 0: 80000028 68747541 444d4163 69746e65
        80000001 0: 00a10f11 40000000 75c237ff 2fd3fbff
        8000001d 0: 00004121 01c0003f 0000003f 00000000
        8000001d 1: 00004122 01c0003f 0000003f 00000000
        8000001d 2: 00004143 01c0003f 000007ff 00000002
        8000001d 3: 0001c163 03c0003f 00003fff 00000001
        xcr0: 000002e7""",
    "Zen 3 (EPYC in a virtual machine)": """
        00000000 0: 0000000d 68747541 444d4163 69746e65
        00000001 0: 00a00f11 01020800 fffa3203 178bfbff
        00000007 0: 00000000 219c07ab 00400684 00000010
        80000000 0: 80000021 68747541 444d4163 69746e65
        80000001 0: 00a00f11 40000000 004003f3 2fd3fbff
        8000001d 0: 00000121 01c0003f 0000003f 00000000
        8000001d 1: 00000122 01c0003f 0000003f 00000000
        8000001d 2: 00000143 01c0003f 000003ff 00000002
        8000001d 3: 00004163 03c0003f 00007fff 00000001
        xcr0: 00000007""",
    "Zen 5 (EPYC in a virtual machine)": """
        00000000 0: 0000001c 68747541 444d4163 69746e65
        00000001 0: 00b00f21 01020800 fffa3203 178bfbff
        00000007 0: 00000001 f1bf07ab 00405fc6 00000110
        00000007 1: 00000030 00000000 00000000 00000000
        80000000 0: 80000021 68747541 444d4163 69746e65
        80000001 0: 00b00f21 40000000 004003f3 2fd3fbff
        8000001d 0: 00000121 02c0003f 0000003f 00000000
        8000001d 1: 00000122 01c0003f 0000003f 00000000
        8000001d 2: 00000143 03c0003f 000003ff 00000002
        8000001d 3: 00004163 03c0003f 00007fff 00000001
        xcr0: 000000e7""",
    "Zen 5 of a mobile processor (Ryzen AI 9 HX 370)": """
        00000000 0: 00000010 68747541 444d4163 69746e65
        00000001 0: 00b20f40 00180800 7ed8320b 178bfbff
        00000007 0: 00000001 f1bf97ab 19405fce 10000110
        00000007 1: 00000030 00000000 00000000 00000000
        80000000 0: 80000028 68747541 444d4163 69746e65
        80000001 0: 00b20f40 10000000 75c237ff 2fd3fbff
        8000001d 0: 00004121 02c0003f 0000003f 00000000
        8000001d 1: 00004122 01c0003f 0000003f 00000000
        8000001d 2: 00004143 03c0003f 000003ff 00000002
        8000001d 3: 0001c163 03c0003f 00003fff 00000001
        xcr0: 000002e7""",
}
CASCADE_LAKE = "Cascade Lake (Xeon in a virtual machine)"
ZEN_3, ZEN_4 = "Zen 3 (EPYC in a virtual machine)", "Zen 4 (EPYC 9124)"
ZEN_5, MOBILE_ZEN_5 = "Zen 5 (EPYC in a virtual machine)", "Zen 5 of a mobile processor (Ryzen AI 9 HX 370)"


def recorded(dump: str, model: int | None = None) -> detect.Host:
    """The host that a dump is of. model: shown instead of its own."""
    leaves: dict[tuple[int, int], tuple[int, ...]] = {}
    xcr0 = 0
    for line in dump.split("\n"):
        place, _, words = line.partition(":")
        if place.strip() == "xcr0":
            xcr0 = int(words, 16)
        elif words:
            leaf, subleaf = (int(word, 16) for word in place.split())
            leaves[leaf, subleaf] = tuple(int(word, 16) for word in words.split())
    if model is not None:
        signature, *rest = leaves[1, 0]
        leaves[1, 0] = (signature & ~0xF00F0 | (model >> 4) << 16 | (model & 15) << 4, *rest)

    def cpuid(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        a, b, c, d = leaves.get((leaf, subleaf), (0, 0, 0, 0))
        return a, b, c, d

    return detect.read_host(cpuid, lambda _: xcr0, lambda: True)


@pytest.mark.parametrize(("name", "target", "caches_kib"), [
    ("Granite Rapids that shows the model of a Rocket Lake", "graniterapids", (48, 2048, 480 << 10)),
    ("Rocket Lake (Core i7-11700K)", "v4", (48, 512, 16 << 10)),
    ("Ice Lake (Xeon D-1718T in a virtual machine)", "icelake-server", (48, 1280, 10 << 10)),
    (CASCADE_LAKE, "cascadelake", (32, 1024, 36608)),
    (ZEN_3, "zen3", (32, 512, 32 << 10)),
    (ZEN_4, "zen4", (32, 1024, 16 << 10)),
    (ZEN_5, "zen5", (48, 1024, 32 << 10)),
    (MOBILE_ZEN_5, "zen4", (48, 1024, 16 << 10)),    # it does 512 bits in halves
])
def test_recorded_processors_get_the_row_of_their_core(name: str, target: str, caches_kib: tuple[int, ...]) -> None:
    chosen = detect.choose_target(recorded(DUMPS[name]))
    assert chosen.name == target
    assert (chosen.l1_bytes, chosen.l2_bytes, chosen.l3_bytes) == tuple(kib << 10 for kib in caches_kib)
    assert chosen.has("avx512_vnni") == (name != ZEN_3)
    assert chosen.has("avx512_vbmi") == (name not in (CASCADE_LAKE, ZEN_3))
    assert chosen.has("avx512_bf16") == (target in ("graniterapids", "zen4", "zen5"))


@pytest.mark.parametrize(("name", "target"), [
    ("Granite Rapids that shows the model of a Rocket Lake", "graniterapids"),
    ("Ice Lake (Xeon D-1718T in a virtual machine)", "icelake-server"),
    (CASCADE_LAKE, "cascadelake"),
    (ZEN_3, "zen3"),
    (ZEN_4, "zen4"),
    (ZEN_5, "zen5"),
])
def test_a_model_that_is_in_no_table_is_known_by_its_features(name: str, target: str) -> None:
    assert detect.choose_target(recorded(DUMPS[name], model=0xFE)).name == target


def test_a_core_that_lacks_a_feature_of_its_row_keeps_the_row_without_it() -> None:
    found = recorded(DUMPS["Granite Rapids that shows the model of a Rocket Lake"], model=0xAD)
    chosen = detect.choose_target(found._replace(features=found.features - {"avx512_bf16", "prefetchi"}))
    assert chosen.name == "graniterapids" and not chosen.has("avx512_bf16") and chosen.has("avx512_vnni")


def test_a_skylake_has_what_a_cascade_lake_has_but_its_products_of_bytes() -> None:
    found = recorded(DUMPS[CASCADE_LAKE])
    chosen = detect.choose_target(found._replace(features=found.features - {"avx512_vnni"}))
    assert chosen.name == "skylake-avx512" and not chosen.has("avx512_vnni")
    assert chosen.requests == detect.choose_target(found).requests


def test_a_zen_5_that_shows_the_model_of_a_zen_4_is_known_by_its_features() -> None:
    shown = recorded(DUMPS[ZEN_5])._replace(family=0x19, model=0x11)
    assert detect.choose_target(shown).name == "zen5"
    assert detect.choose_target(shown._replace(features=shown.features - {"avx_vnni"})).name == "zen4"


@pytest.mark.parametrize("hidden", ["avx512_bf16", "avx_vnni", "avx512_vnni", "avx512_vbmi"])
def test_a_zen_5_is_known_by_its_model_where_a_feature_is_hidden(hidden: str) -> None:
    found = recorded(DUMPS[ZEN_5])
    chosen = detect.choose_target(found._replace(features=found.features - {hidden}))
    assert chosen.name == "zen5" and chosen.features == detect.TARGETS["zen5"].features - {hidden}


@pytest.mark.parametrize(("model", "name"), [
    (0x02, "zen5"), (0x08, "zen5"), (0x11, "zen5"),           # Turin, Shimada Peak, Turin Dense
    (0x44, "zen5"), (0x70, "zen5"),                           # Granite Ridge and Fire Range, Strix Halo
    (0x20, "zen4"), (0x24, "zen4"), (0x60, "zen4"), (0x68, "zen4"),     # Strix Point, Krackan Point
])
@pytest.mark.parametrize("hidden", [frozenset(), frozenset({"avx512_bf16", "avx_vnni"})], ids=["all", "without bf16"])
def test_the_width_of_a_zen_5_is_told_by_its_model(model: int, name: str, hidden: frozenset[str]) -> None:
    found = recorded(DUMPS[ZEN_5], model=model)
    assert (found.family, found.model) == (0x1A, model)
    assert detect.choose_target(found._replace(features=found.features - hidden)).name == name


@pytest.mark.parametrize("name", [ZEN_4, ZEN_5, MOBILE_ZEN_5])
def test_a_later_zen_without_avx512_has_the_row_of_zen_3(name: str) -> None:
    found = recorded(DUMPS[name])
    chosen = detect.choose_target(found._replace(features=frozenset(f for f in found.features if "512" not in f)))
    assert chosen.name == "zen3" and chosen.l2_bytes == 1 << 20
    assert chosen.has("avx_vnni") == (name != ZEN_4)


@pytest.mark.parametrize(("model", "name"), [
    (0x01, "zen3"), (0x08, "zen3"), (0x21, "zen3"), (0x30, "zen3"), (0x44, "zen3"), (0x50, "zen3"),
    # Milan, Chagall, Vermeer, Trento, Rembrandt, Cezanne; models of Zen 4 have no AVX-512 here, and none has VAES
    (0x11, "v3"), (0x61, "v3"), (0x75, "v3"), (0xA0, "v3"),
])
def test_a_zen_3_is_known_by_its_model_where_vaes_is_hidden(model: int, name: str) -> None:
    found = recorded(DUMPS[ZEN_3], model=model)
    assert (found.family, found.model) == (0x19, model)
    assert detect.choose_target(found._replace(features=found.features - {"vaes"})).name == name
    assert detect.choose_target(found).name == "zen3"


def test_a_zen_2_is_a_v3() -> None:
    found = recorded(DUMPS[ZEN_3], model=0x31)._replace(family=0x17)
    assert detect.choose_target(found._replace(features=found.features - {"vaes"})).name == "v3"


def test_a_granite_rapids_without_avx512_has_the_row_of_its_clients() -> None:
    found = recorded(DUMPS["Granite Rapids that shows the model of a Rocket Lake"])
    chosen = detect.choose_target(found._replace(features=frozenset(f for f in found.features if "512" not in f)))
    assert chosen.name == "alderlake" and chosen.has("avx_vnni")
