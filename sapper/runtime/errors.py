"""What the runtime raises. Every message says where, what was found, what was expected, and a likely mend."""

from __future__ import annotations

import warnings

from ..lang.errors import CallError


class ArgumentError(CallError):
    """A kernel was called with an argument that it can't take.

    kind: one of KINDS. kernel, argument: names (argument is "" when the whole call is at fault).
    """

    KINDS = (
        "alignment", "byte-order", "count", "device", "dtype", "export", "option", "overlap", "range", "rank",
        "read-only", "scalar", "self-overlap", "shape", "stride", "type",
    )  # fmt: skip

    def __init__(self, kind: str, kernel: str, parameter: str, found: str, expected: str, mend: str) -> None:
        if kind not in self.KINDS:
            raise ValueError(f"unknown kind of argument error {kind!r}")
        where = f"argument `{parameter}` of kernel {kernel}" if parameter else f"the call of kernel {kernel}"
        super().__init__(kind, f"{where} does not fit", parameter, found, expected, mend)
        self.kernel = kernel


class LaunchError(RuntimeError):
    """A kernel can't be run here at all: no memory for code or scratch, no worker threads, a bad setting."""


class SapperWarning(UserWarning):
    """Something is slower than it should be (no disk cache, a damaged cache entry); said once in a process."""


_warned: set[str] = set()


def warn_once(topic: str, message: str) -> None:
    """Issue a SapperWarning the first time that this process meets the topic."""
    if topic not in _warned:
        _warned.add(topic)
        warnings.warn(message, SapperWarning, stacklevel=3)
