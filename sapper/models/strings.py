"""The strings of a GGUF header, 100 000 at once: a kernel finds them, and all are decoded together.

In: bytes that begin with a string, each a length of 8 bytes and as many bytes. Out: as many strings as are whole.
"""

import numpy as np

import sapper as sp
from sapper import Tensor, i32, u8, zeros

N, S = sp.dims("N S")
SEPARATOR = b"\xff"
"""A byte that UTF-8 has not."""
LENGTH_BYTES = 8


@sp.kernel
def find_strings(head: Tensor[u8, N], start: Tensor[i32, S], stop: Tensor[i32, S]):
    """Where each string's text begins and ends; from the first on that is not whole, -1."""
    end = N.to(i32)
    at = zeros(dtype=i32)
    for i in range(S):
        there = at + LENGTH_BYTES <= end
        first = at if there else end - LENGTH_BYTES
        length = zeros(dtype=i32)
        for byte in range(4):
            length = length | head[first + byte].to(i32) << (8 * byte).to(i32)
        high = zeros(dtype=i32)
        for byte in range(4, LENGTH_BYTES):
            high = high | head[first + byte].to(i32)
        text = at + LENGTH_BYTES
        whole = there and high == 0 and length >= 0 and length <= end - text
        start[i] = text if whole else -1
        stop[i] = text + length if whole else -1
        at = text + length if whole else end


def leading_strings(head: memoryview, most: int) -> tuple[list[str], int]:
    """The first strings of `head`, at most so many, and how many bytes they take. What is no UTF-8 becomes surrogates.

    Their bytes are put together with a byte between them that UTF-8 has not, and decoded at once.
    """
    if most <= 0 or len(head) < LENGTH_BYTES:
        return [], 0
    raw = np.frombuffer(head, np.uint8)
    start, stop = (np.empty(most, np.int32) for _ in range(2))
    find_strings(raw, start, stop, threads=1)
    count = int(np.count_nonzero(start >= 0))
    if not count:
        return [], 0
    size_bytes = int(stop[count - 1])
    text, kept = raw[:size_bytes].copy(), np.ones(size_bytes, np.bool_)
    for byte in range(2, LENGTH_BYTES + 1):  # of a length one byte stays, as a separator
        kept[start[:count] - byte] = False
    text[start[:count] - 1] = SEPARATOR[0]
    joined = text[kept][1:].tobytes()
    if joined.count(SEPARATOR) == count - 1:
        return str(joined, "utf-8", "surrogateescape").split(str(SEPARATOR, "utf-8", "surrogateescape")), size_bytes
    pieces = zip(start[:count].tolist(), stop[:count].tolist(), strict=True)
    return [str(head[first:last], "utf-8", "surrogateescape") for first, last in pieces], size_bytes
