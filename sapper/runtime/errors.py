"""What the runtime raises. Every message says where, what was found, what was expected, and a likely mend."""

from __future__ import annotations


class ArgumentError(TypeError, ValueError):
    """A kernel was called with an argument that it can't take.

    kernel, parameter: names (parameter is "" when the whole call is at fault); found, expected, mend: the message's parts.
    """

    def __init__(self, kernel: str, parameter: str, found: str, expected: str, mend: str) -> None:
        where = f"{kernel}: argument `{parameter}`" if parameter else f"{kernel}"
        super().__init__(f"{where}: found {found}; expected {expected}; mend: {mend}")
        self.kernel = kernel
        self.parameter = parameter
        self.found = found
        self.expected = expected
        self.mend = mend


class LaunchError(RuntimeError):
    """A kernel can't be run here at all: no memory for code or scratch, no worker threads, a bad setting."""


class RuntimeWarningOnce(UserWarning):
    """Something is slower than it should be (no disk cache, no huge pages), said once in a process."""
