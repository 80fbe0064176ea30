"""Planted faults: each is made by one change of text in PTX that is right, and must be caught."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sapper import emulate
from sapper.emulate import EmulationError, Options, TensorMap, Uninitialised

from .test_triton import descriptor, random, with_early_waits

DATA = Path(__file__).parent / "data"
BF16 = ml_dtypes.bfloat16


class Wrong(Exception):
    """The kernel ended, with a wrong result."""


def text_of(name: str) -> str:
    return (DATA / f"{name}.ptx").read_text(encoding="utf-8")


def change(pattern: str, replacement: str, which: int = 0) -> Callable[[str], str]:
    """Replaces one match of a pattern."""

    def mutate(text: str) -> str:
        matches = list(re.finditer(pattern, text))
        assert len(matches) > which, f"found {len(matches)} of {pattern!r}"
        match = matches[which]
        return text[:match.start()] + match.expand(replacement) + text[match.end():]

    return mutate


def matmul(text: str, block: int, shared_bytes: int, lazy: bool, dtype: Any = np.float32,
           tensor_fences: bool = True) -> None:
    m, n, k = 128, 128, 256
    a, b, c = random((m, k), BF16), random((k, n), BF16, 1), np.zeros((m, n), dtype)
    emulate.load(text).launch(grid=(m // block, n // block), shared_bytes=shared_bytes,
                              options=Options(lazy=lazy, tensor_fences=tensor_fences),
                              arguments=[a, b, Uninitialised(c), m, n, k, k, n, n, np.int64(0), np.int64(0)])
    if np.abs(c - a.astype(np.float32) @ b.astype(np.float32)).max() > 1e-3:
        raise Wrong


def matmul_tma(text: str, lazy: bool, swizzle: int = 128, shared_bytes: int = 73752, fences: bool = True) -> None:
    m, n, k = 64, 128, 320
    a, b, c = random((m, k), BF16), random((k, n), BF16, 1), np.zeros((m, n), BF16)
    first = [TensorMap(a, (64, 64), swizzle), *descriptor(a, (64, 64))[1:]]
    arguments = [*first, *descriptor(b, (64, 64)), *descriptor(c, (64, 64)), k, np.int64(0),
                 np.int64(0)]
    emulate.load(text).launch(grid=(1, 1), arguments=arguments, shared_bytes=shared_bytes,
                              options=Options(lazy=lazy, tensor_fences=fences))
    exact = a.astype(np.float32) @ b.astype(np.float32)
    if np.abs(c.astype(np.float32) - exact).max() > np.abs(exact).max() / 200:
        raise Wrong


def attention(text: str, shared_bytes: int, lazy: bool) -> None:
    length, width = 256, 64
    q, k, v = (random((length, width), BF16, seed) for seed in range(3))
    out = np.zeros((length, width), BF16)
    emulate.load(text).launch(grid=(4,), shared_bytes=shared_bytes, options=Options(lazy=lazy), arguments=[
        q, k, v, Uninitialised(out), length, np.float32(0.125 * np.log2(np.e)), np.int64(0), np.int64(0)])
    scores = q.astype(np.float64) @ k.astype(np.float64).T * 0.125
    scores[np.triu_indices(length, 1)] = -np.inf
    share = np.exp(scores - scores.max(axis=1, keepdims=True))
    exact = share @ v.astype(np.float64) / share.sum(axis=1, keepdims=True)
    if np.abs(out.astype(np.float64) - exact).max() > 0.02:
        raise Wrong


def sm80(text: str, lazy: bool) -> None:
    matmul(text, 128, 49152, lazy)


def sm90(text: str, lazy: bool) -> None:
    matmul(text, 128, 65536, lazy)


def sm100(text: str, lazy: bool) -> None:
    matmul(with_early_waits(text), 128, 81936, lazy, tensor_fences=False)


def tma100(text: str, lazy: bool) -> None:
    matmul_tma(with_early_waits(text), lazy, shared_bytes=73776, fences=False)


def attention80(text: str, lazy: bool) -> None:
    attention(text, 40960, lazy)


def attention90(text: str, lazy: bool) -> None:
    attention(text, 57344, lazy)


RUNS: dict[str, Callable[[str, bool], None]] = {
    "triton_matmul_bf16_sm80": sm80, "triton_matmul_bf16_sm90": sm90, "triton_matmul_tma_sm90": matmul_tma,
    "triton_attention_sm80": attention80, "triton_attention_sm90": attention90,
    "triton_matmul_bf16_sm100": sm100, "triton_matmul_tma_sm100": tma100,
}
BARRIER = r"bar\.sync\s+0;"
FAULTS: list[tuple[str, str, Callable[[str], str], bool, str]] = [
    # (name, file, change, lazy, what the message says)
    *[(f"dropped bar.sync {which} of matmul", "triton_matmul_bf16_sm80", change(BARRIER, "", which), False,
       "race|in flight")
      for which in range(2)],
    *[(f"dropped bar.sync {which} of attention", "triton_attention_sm80", change(BARRIER, "", which), False,
       "race|in flight") for which in (0, 1, 3)],  # 2 is not needed: each warp then writes where it itself wrote before
    *[(f"weakened wait_group {which}", "triton_matmul_bf16_sm80",
       change(r"(cp\.async\.wait_group\s+)(\d);", r"\g<1>7;", which), lazy, "in flight|WRONG")
      for which in range(1) for lazy in (False, True)],
    ("weakened wait_group of attention", "triton_attention_sm80",
     change(r"(cp\.async\.wait_group\s+)(\d);", r"\g<1>7;"), False, "in flight"),
    ("dropped commit_group", "triton_matmul_bf16_sm80", change(r"cp\.async\.commit_group;", "", 1), False,
     "in flight|race"),
    ("missing proxy fence before wgmma", "triton_matmul_bf16_sm90", change(r"fence\.proxy\.async[.\w:]*;", ""), False,
     "fence.proxy.async"),
    ("missing proxy fence before a tensor store", "triton_matmul_tma_sm90",
     change(r"fence\.proxy\.async[.\w:]*;(?=[^$]*cp\.async\.bulk\.tensor\.2d\.global)",
            ""), False, "fence.proxy.async"),
    ("missing wgmma.wait_group", "triton_matmul_bf16_sm90",
     change(r"(wgmma\.wait_group\.sync\.aligned\s+)0;", r"\g<1>4;", -1), False, "in flight"),
    ("missing wgmma.fence", "triton_attention_sm90", change(r"wgmma\.fence\.sync\.aligned;", "", 1), False,
     "wgmma.fence"),
    ("wrong swizzle of a descriptor", "triton_matmul_tma_sm90",
     change(r"4611686293305294848|4611686293313683456",
            str(0x8000004000010000)), False, "WRONG|nobody wrote|outside|race"),
    ("too few bytes expected", "triton_matmul_tma_sm90", change(r"(expect_tx\S+\s+_, \[%\w+\], )\d+;", r"\g<1>16384;"),
     False,
     "deadlock|nobody can go on|race|in flight|expected"),
    ("too many bytes expected", "triton_matmul_tma_sm90", change(r"(expect_tx\S+\s+_, \[%\w+\], )\d+;", r"\g<1>65536;"),
     False,
     "nobody can go on"),
    ("missing wait on an mbarrier", "triton_matmul_tma_sm90", change(r"@!complete bra\.uni waitLoop;", ""), True,
     "in flight|nobody wrote|race"),
    ("missing wait for a bulk store", "triton_matmul_tma_sm90", change(r"cp\.async\.bulk\.wait_group\s+0;", ""), False,
     "exits while"),
    ("swapped fragment of A", "triton_matmul_bf16_sm80",
     change(r"(mma\.sync\S+\s+\{[^}]*\}, \{ )(%r\d+), (%r\d+),", r"\1\3, \2,"), False, "WRONG"),
    ("swapped fragment of B", "triton_matmul_bf16_sm80",
     change(r"(mma\.sync\S+\s+\{[^}]*\}, \{[^}]*\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2"), False, "WRONG"),
    ("transposed ldmatrix", "triton_matmul_bf16_sm80", change(r"(ldmatrix\.\S+x4)\.trans", r"\1"), False, "WRONG"),
    *[(f"missing wait {which} for the sums in tensor memory", "triton_matmul_bf16_sm100",
       change(r"waitLoop:[^}]*bra\.uni waitLoop;", "", which), lazy, "race on|in flight|still")
      for which, lazy in ((0, False), (0, True), (1, False), (1, True))],
    ("sums in tensor memory that are not waited for long enough", "triton_matmul_bf16_sm100",
     change(r"@!complete bra\.uni waitLoop;", "", 1), True, "still writes"),
    *[("dropped tcgen05.commit", "triton_matmul_bf16_sm100", change(r"@%p\d+ tcgen05\.commit[^;]*;", ""), lazy,
       "nobody can go on") for lazy in (False, True)],
    ("missing proxy fence before tcgen05.mma", "triton_matmul_bf16_sm100", change(r"fence\.proxy\.async[.\w:]*;", ""),
     False, "fence.proxy.async"),
    ("missing tcgen05.wait::st", "triton_matmul_bf16_sm100", change(r"tcgen05\.wait::st\.sync\.aligned;", ""), False,
     r"expected tcgen05\.wait::st"),
    ("missing tcgen05.dealloc", "triton_matmul_bf16_sm100", change(r"@%p1 tcgen05\.dealloc[^;]*;", ""), False,
     "ends with tensor memory"),
    ("too few columns", "triton_matmul_bf16_sm100",
     lambda text: text.replace("[%r47], 128;", "[%r47], 64;").replace("%r577, 128;", "%r577, 64;"), False,
     "not allocated"),
    ("another warp's lanes", "triton_matmul_bf16_sm100", change(r"(tcgen05\.st\S+ \[%r\d+) \+ 0\]", r"\1 + 2097152]"),
     False, "its lanes are|expected less than 128"),
    *[("wrong bits of a descriptor of tcgen05.mma", "triton_matmul_bf16_sm100",
       lambda text, bits=bits: text.replace("1073758272", str(bits)), False, told)
      for bits, told in ((0x80004040, "WRONG|nobody wrote"), (0x40004080, "WRONG|nobody wrote|in flight"),
                         (0x40000040, "version"))],
    ("a transposed operand that is not", "triton_matmul_bf16_sm100",
     lambda text: text.replace("136381584", str(136381584 & ~(1 << 16))), False, "WRONG|nobody wrote|outside"),
    ("a product of another type", "triton_matmul_bf16_sm100",
     lambda text: text.replace("136381584", str(136381584 & ~(1 << 7))), False, "WRONG"),
    ("missing wait on an mbarrier before tcgen05.mma", "triton_matmul_tma_sm100",
     change(r"@!complete bra\.uni waitLoop;", ""), True, "in flight|nobody wrote|race"),
    ("a misaligned copy", "triton_matmul_bf16_sm80", change(r"(cp\.async\.cg\S+ \[ %r\d+ \+ )0", r"\g<1>8"), False,
     "multiple of 16"),
]


def test_the_texts_are_right_without_a_fault() -> None:
    for name, run in RUNS.items():
        run(text_of(name), True)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("file", "mutate", "lazy", "told"), [fault[1:] for fault in FAULTS],
                         ids=[f"{fault[0]}, {'lazy' if fault[3] else 'eager'}" for fault in FAULTS])
def test_a_planted_fault_is_caught(file: str, mutate: Callable[[str], str], lazy: bool, told: str) -> None:
    text = mutate(text_of(file))
    assert text != text_of(file)
    try:
        RUNS[file](text, lazy)
    except EmulationError as error:
        assert re.search(told, str(error)), str(error)
    except Wrong:
        assert "WRONG" in told
    else:
        pytest.fail("the fault was not caught")


def test_a_tensor_map_with_another_swizzle_than_the_products_gives_a_wrong_result() -> None:
    with pytest.raises(Wrong):
        matmul_tma(text_of("triton_matmul_tma_sm90"), lazy=False, swizzle=0)
