"""The processor that this process runs on: features that the operating system enables too, caches, the target to use.

Leaves: `host()`, a `Host`, and `host_target()`. Holds: nothing is executed but CPUID (which every x86-64 processor has)
and XGETBV (only where CPUID says that it is enabled), from a page that is never writable and executable at once.

Tile registers are a process's own only after it asked the system for them, and it keeps room for them in every thread
that uses them. Detection asks, once, where the processor has them: whatever runs afterwards in this process, in threads
of any age and in forked children, may use them; a process that the system refuses them has a host without them.
Source: Intel SDM volume 2, CPUID, XGETBV; volume 1, 13.3 and 13.14; AMD APM volume 3, appendix E (leaves 0x8000001D,
0x80000002); Linux, Documentation/arch/x86/xstate.rst.
"""

# Without `from __future__ import annotations`: see target.py.
import ctypes
import os
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from .target import TARGETS, V3_FEATURES, V3_OPTIONAL_FEATURES, V4_FEATURES, V4_OPTIONAL_FEATURES, Target

# void cpuid(uint32 leaf, uint32 subleaf, uint32 out[4]); the encoder's own bytes (a test compares them):
#   mov r8, rdx · mov r9, rbx · mov eax, edi · mov ecx, esi · cpuid · mov [r8], eax · mov [r8 + 4], ebx ·
#   mov [r8 + 8], ecx · mov [r8 + 12], edx · mov rbx, r9 · ret
CPUID_CODE = bytes.fromhex("4989d04989d989f889f10fa241890041895804418948084189500c4c89cbc3")
# uint64 xgetbv(uint32 index): mov ecx, edi · xgetbv · shl rdx, 32 · or rax, rdx · ret
XGETBV_CODE = bytes.fromhex("89f90f01d048c1e2204809d0c3")
_XGETBV_OFFSET = 64

SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA = 158, 0x1023, 18
"""The system call by which a process asks for tile registers, its function, and the number of their state component
(<asm/unistd_64.h>, <asm/prctl.h>, <asm/fpu/types.h> of Linux)."""

# <sys/mman.h> of Linux on x86-64.
_PROT_READ, _PROT_WRITE, _PROT_EXEC = 1, 2, 4
_MAP_PRIVATE, _MAP_ANONYMOUS = 0x02, 0x20

# feature: (leaf, subleaf, register 0 .. 3 = eax ebx ecx edx, bit, XCR0 bits that the system must enable)
_AVX_STATE, _AVX512_STATE, TILE_STATE = 0x6, 0xE6, 0x60000
FEATURE_BITS: dict[str, tuple[int, int, int, int, int]] = {
    "fma": (1, 0, 2, 12, _AVX_STATE), "popcnt": (1, 0, 2, 23, 0), "xsave": (1, 0, 2, 26, 0),
    "avx": (1, 0, 2, 28, _AVX_STATE), "f16c": (1, 0, 2, 29, _AVX_STATE),
    "bmi1": (7, 0, 1, 3, 0), "avx2": (7, 0, 1, 5, _AVX_STATE), "bmi2": (7, 0, 1, 8, 0),
    "avx512f": (7, 0, 1, 16, _AVX512_STATE), "avx512dq": (7, 0, 1, 17, _AVX512_STATE),
    "clflushopt": (7, 0, 1, 23, 0), "avx512bw": (7, 0, 1, 30, _AVX512_STATE), "avx512vl": (7, 0, 1, 31, _AVX512_STATE),
    "avx512_vbmi": (7, 0, 2, 1, _AVX512_STATE), "avx512_vbmi2": (7, 0, 2, 6, _AVX512_STATE),
    "vaes": (7, 0, 2, 9, _AVX_STATE), "avx512_vnni": (7, 0, 2, 11, _AVX512_STATE),
    "avx_vnni": (7, 1, 0, 4, _AVX_STATE), "avx512_bf16": (7, 1, 0, 5, _AVX512_STATE),
    "avx512_fp16": (7, 0, 3, 23, _AVX512_STATE), "prefetchi": (7, 1, 3, 14, 0),
    "amx_bf16": (7, 0, 3, 22, TILE_STATE), "amx_tile": (7, 0, 3, 24, TILE_STATE),
    "amx_int8": (7, 0, 3, 25, TILE_STATE), "amx_fp16": (7, 1, 0, 21, TILE_STATE),
    "lzcnt": (0x80000001, 0, 2, 5, 0), "prfchw": (0x80000001, 0, 2, 8, 0), "rdtscp": (0x80000001, 0, 3, 27, 0),
}


class Host(NamedTuple):
    """What CPUID says. vendor: "AuthenticAMD", "GenuineIntel", ...; brand: the marketing name.

    features: those of `FEATURE_BITS` that both the processor has and the operating system enables.
    l1_bytes, l2_bytes, l3_bytes: data or unified caches, 0 where the processor does not say.
    """

    vendor: str
    brand: str
    family: int
    model: int
    features: frozenset[str]
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    cache_line_bytes: int


class UnsupportedCPU(RuntimeError):
    """The host lacks what the lowest level needs, or is no x86-64 processor."""


Cpuid = Callable[[int, int], tuple[int, int, int, int]]


def _executable_page(code: bytes) -> int:
    """The address of a page with `code`: filled while writable, then made executable and no longer writable."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size_bytes = os.sysconf("SC_PAGE_SIZE")
    address = libc.mmap(None, size_bytes, _PROT_READ | _PROT_WRITE, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap of a page for code failed")
    ctypes.memmove(address, code, len(code))
    if libc.mprotect(address, size_bytes, _PROT_READ | _PROT_EXEC):
        raise OSError(ctypes.get_errno(), "mprotect to read and execute failed; does a security policy forbid it?")
    return int(address)


@lru_cache(maxsize=1)
def _native() -> tuple[Cpuid, Callable[[int], int]]:
    """CPUID and XGETBV as Python functions. Raises UnsupportedCPU elsewhere than on x86-64."""
    machine = os.uname().machine
    if machine not in ("x86_64", "AMD64"):
        raise UnsupportedCPU(f"host detection: found machine {machine!r}; expected x86_64")
    address = _executable_page(CPUID_CODE.ljust(_XGETBV_OFFSET, b"\xcc") + XGETBV_CODE)
    raw = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(address)
    xgetbv = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint32)(address + _XGETBV_OFFSET)

    def cpuid(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        out = (ctypes.c_uint32 * 4)()
        raw(leaf, subleaf, ctypes.addressof(out))
        return out[0], out[1], out[2], out[3]

    return cpuid, lambda index: int(xgetbv(index))


def request_tiles() -> bool:
    """Ask the system for tile registers, for this whole process; whether they are granted. Asking again does nothing.

    Linux refuses where it knows none (before 5.16) and where a thread's alternate signal stack has no room for them.
    """
    return bool(ctypes.CDLL(None).syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0)


def _text(*registers: int) -> str:
    return b"".join(r.to_bytes(4, "little") for r in registers).decode("ascii", "replace").strip("\0 ")


def read_host(cpuid: Cpuid, xgetbv: Callable[[int], int], granted: Callable[[], bool]) -> Host:
    """A `Host` from the two instructions given as functions (so that tests can play any processor).

    granted: asked whether the system gives tile registers, where the processor has them and it enables them.
    """
    highest, b, c, d = cpuid(0, 0)
    vendor = _text(b, d, c)
    highest_extended = cpuid(0x80000000, 0)[0]
    signature, _, leaf1_c, _ = cpuid(1, 0)
    family, model = signature >> 8 & 15, signature >> 4 & 15
    if family in (6, 15):
        model |= (signature >> 16 & 15) << 4
    if family == 15:
        family += signature >> 20 & 0xFF
    enabled = xgetbv(0) if leaf1_c >> 27 & 1 else 0
    leaves: dict[tuple[int, int], tuple[int, int, int, int]] = {}
    features = set()
    for name, (leaf, subleaf, register, bit, state) in FEATURE_BITS.items():
        if leaf > (highest_extended if leaf >= 0x80000000 else highest):
            continue
        if subleaf and cpuid(leaf, 0)[0] < subleaf:
            continue
        if (leaf, subleaf) not in leaves:
            leaves[leaf, subleaf] = cpuid(leaf, subleaf)
        if leaves[leaf, subleaf][register] >> bit & 1 and enabled & state == state:
            features.add(name)
    if "amx_tile" in features and not granted():
        features = {name for name in features if not name.startswith("amx")}
    brand = ""
    if highest_extended >= 0x80000004:
        brand = _text(*(r for leaf in (0x80000002, 0x80000003, 0x80000004) for r in cpuid(leaf, 0)))
    sizes, line = _caches(cpuid, vendor, highest, highest_extended)
    return Host(vendor, brand, family, model, frozenset(features), sizes.get(1, 0), sizes.get(2, 0),
                sizes.get(3, 0), line)


def _caches(cpuid: Cpuid, vendor: str, highest: int, highest_extended: int) -> tuple[dict[int, int], int]:
    """level -> bytes of the data or unified cache, and the line size, from the deterministic cache leaves."""
    sizes: dict[int, int] = {}
    line = 64
    amd = vendor in ("AuthenticAMD", "HygonGenuine")
    leaf = 0x8000001D if amd and highest_extended >= 0x8000001D else 4
    if leaf == 4 and highest < 4:
        return sizes, line
    for subleaf in range(16):
        a, b, c, _ = cpuid(leaf, subleaf)
        kind, level = a & 31, a >> 5 & 7
        if kind == 0:
            break
        if kind in (1, 3):
            line = (b & 0xFFF) + 1
            sizes[level] = ((b >> 22) + 1) * ((b >> 12 & 0x3FF) + 1) * line * (c + 1)
    return sizes, line


@lru_cache(maxsize=1)
def host() -> Host:
    """The host's processor; detected once. Raises UnsupportedCPU on other machines than x86-64."""
    return read_host(*_native(), request_tiles)


class Microarchitecture(NamedTuple):
    """By what processors are known that a row of `TARGETS` describes.

    models: those of the family. features: those that came with it; they tell too, where a hypervisor shows another
    model than there is, and for models that come later. None: the models only.
    """

    target: str
    vendor: str
    family: int
    models: frozenset[int]
    features: frozenset[str] = frozenset()

    def describes(self, found: Host) -> bool:
        by_model = found.family == self.family and found.model in self.models
        return found.vendor == self.vendor and (by_model or (bool(self.features) and self.features <= found.features))


MICROARCHITECTURES = [
    Microarchitecture("graniterapids", "GenuineIntel", 6, frozenset({0xAD, 0xAE}),
                      frozenset({"avx512_fp16", "avx512_bf16", "prefetchi"})),
    Microarchitecture("sapphirerapids", "GenuineIntel", 6, frozenset({0x8F, 0xCF}),
                      frozenset({"avx512_fp16", "avx512_bf16"})),
    # Clients of the years of Ice Lake have one FMA of 512 bits, and no row of their own.
    Microarchitecture("v4", "GenuineIntel", 6, frozenset({0x66, 0x7D, 0x7E, 0x8C, 0x8D, 0xA7})),
    Microarchitecture("icelake-server", "GenuineIntel", 6, frozenset({0x6A, 0x6C}),
                      frozenset({"avx512_vbmi2", "avx512_vnni"})),
    # It shows the model of a Skylake-SP.
    Microarchitecture("cascadelake", "GenuineIntel", 6, frozenset(), frozenset({"avx512_vnni"})),
    Microarchitecture("skylake-avx512", "GenuineIntel", 6, frozenset({0x55})),
    Microarchitecture("alderlake", "GenuineIntel", 6,
                      frozenset({0x97, 0x9A, 0xAA, 0xAC, 0xB5, 0xB7, 0xBA, 0xBF, 0xC5, 0xC6}), frozenset({"avx_vnni"})),
    Microarchitecture("haswell", "GenuineIntel", 6, frozenset({0x3C, 0x3D, 0x3F, 0x45, 0x46, 0x47, 0x4F, 0x56})),
    # The Zen 5 of monolithic mobile processors does 512-bit operations in halves, as Zen 4 does.
    Microarchitecture("zen4", "AuthenticAMD", 0x1A, frozenset({*range(0x20, 0x30), *range(0x60, 0x70)})),
    Microarchitecture("zen5", "AuthenticAMD", 0x1A, frozenset({*range(0x20), *range(0x40, 0x50), *range(0x70, 0x80)}),
                      frozenset({"avx512_bf16", "avx_vnni"})),
    Microarchitecture("zen4", "AuthenticAMD", 0x19, frozenset({*range(0x10, 0x20), *range(0x60, 0x80),
                                                               *range(0xA0, 0xB0)}), frozenset({"avx512_bf16"})),
    # Also what later ones are where AVX-512 is hidden: their pipes of 256 bits are no fewer.
    Microarchitecture("zen3", "AuthenticAMD", 0x19, frozenset({*range(0x10), *range(0x20, 0x60)}), frozenset({"vaes"})),
]
"""The first that describes a processor, and whose level it has, is taken: so the newest of each vendor come first, and
one whose AVX-512 is hidden gets the row of the newest without it.

Sources: Intel 319433, table 1-1, and SDM volume 4, table 2-1; AMD 57647, 58455 and revision guides. Models of Zen 3
and Zen 5: Linux, arch/x86/kernel/cpu/amd.c, and LLVM, lib/TargetParser/Host.cpp, which names 20h to 2Fh and 60h to 6Fh
of the latter Strix and Krackan. VAES came with Zen 3: GCC, common/config/i386/cpuinfo.h, tells family 19h by it. CPUID
does not say how wide the pipes are: that those two have 256 bits, and the rest (Turin, Granite Ridge, Strix Halo) 512,
is of A. Yee, "Zen5's AVX512 Teardown", 2024, and of Chips and Cheese, "AMD's Strix Point: Zen 5 Hits Mobile", 2024, and
"AMD's Chiplet APU: An Overview of Strix Halo", 2025.
"""


def choose_target(found: Host) -> Target:
    """The target for a processor: the first row that describes it and whose level it has, or else the highest level
    whose features are all there; with the optional features that the host has and its own cache sizes.
    Raises UnsupportedCPU below x86-64-v3."""
    levels = {name: V4_FEATURES if row.has("avx512f") else V3_FEATURES for name, row in TARGETS.items()}
    named = next((known.target for known in MICROARCHITECTURES
                  if known.describes(found) and levels[known.target] <= found.features), "")
    if named:
        base = TARGETS[named]
    elif found.features >= V4_FEATURES:
        base = TARGETS["v4"]
    elif found.features >= V3_FEATURES:
        base = TARGETS["v3"]
    else:
        missing = ", ".join(sorted(V3_FEATURES - found.features))
        raise UnsupportedCPU(f"host {found.brand or found.vendor}: found no {missing}; expected the features of "
                             "x86-64-v3 (AVX2, FMA, BMI2, F16C), enabled by the operating system too")
    optional = V4_OPTIONAL_FEATURES if base.features >= V4_FEATURES else V3_OPTIONAL_FEATURES
    features = (base.features | optional) & found.features
    return base._replace(
        features=features, l1_bytes=found.l1_bytes or base.l1_bytes, l2_bytes=found.l2_bytes or base.l2_bytes,
        l3_bytes=found.l3_bytes or base.l3_bytes, cache_line_bytes=found.cache_line_bytes or base.cache_line_bytes)


@lru_cache(maxsize=1)
def host_target() -> Target:
    """The target to compile for on this machine. Raises UnsupportedCPU."""
    return choose_target(host())
