"""The strings of a GGUF header: what a kernel finds is what a loop over bytes finds, whole strings and none beyond."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapper.models.strings import find_strings, leading_strings


def header(*texts: bytes) -> bytes:
    return b"".join(struct.pack("<Q", len(text)) + text for text in texts)


def slowly(head: bytes, most: int) -> tuple[list[str], int]:
    found: list[str] = []
    at = 0
    while len(found) < most and at + 8 <= len(head):
        (length,) = struct.unpack_from("<Q", head, at)
        if at + 8 + length > len(head):
            break
        found.append(str(head[at + 8 : at + 8 + length], "utf-8", "surrogateescape"))
        at += 8 + length
    return found, at


@given(st.lists(st.binary(max_size=300), max_size=20), st.integers(0, 25), st.integers(0, 400))
def test_strings_are_those_of_a_loop(texts: list[bytes], most: int, cut: int) -> None:
    """Bytes that are no UTF-8, such as the one that parts them, and a header that ends anywhere."""
    head = header(*texts)
    head = head[: max(0, len(head) - cut)]
    assert leading_strings(memoryview(head), most) == slowly(head, most)


@pytest.mark.parametrize("length", [1 << 31, 1 << 32, (1 << 64) - 1, 1 << 63, 0xFF000000, 5])
def test_absurd_lengths_end_it(length: int) -> None:
    head = header(b"good", b"\xff") + struct.pack("<Q", length) + b"1234"
    assert leading_strings(memoryview(head), 10) == (["good", "\udcff"], 21)


def test_the_kernel_reads_nothing_outside() -> None:
    from sapper.runtime.guarded import run_guarded

    for head in (header(b"ab", b"cde"), header(b"ab") + b"\x09" + bytes(7), header(b"ab") + b"\x01\x00"):
        raw = np.frombuffer(head, np.uint8)
        runs = run_guarded(find_strings, [raw, np.empty(5, np.int32), np.empty(5, np.int32)])
        assert runs and all(run.crash is None for run in runs)
