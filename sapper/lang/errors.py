"""Errors that teach: where, what was found, what was expected, and the likely mend.

KernelError is raised while a kernel is read and compiled, CallError when it is called with wrong arguments. Each
kind has an id such as "unknown-axis" (KINDS lists the compile-time ones); the message shows the author's own line.
"""

from __future__ import annotations

import linecache

from ..ir.nodes import Location

KINDS: dict[str, str] = {
    "assertion": "an assert does not hold, or is about neither constants nor extents",
    "axis-extent": "an axis walks another dimension than the one that it indexes",
    "axis-out-of-scope": "an axis is used outside the loop or block that brings it",
    "bad-annotation": "an annotation is neither Tensor[dtype, dims...] nor a dtype",
    "bad-argument": "a function's argument has the wrong kind",
    "bad-range": "a range that cannot be walked",
    "branch-type": "the two branches of an if give a name different types",
    "call-arguments": "a call does not fit the parameters of the function",
    "carried-type": "a value carried through a loop changes its type",
    "carried-kind": "a name that is not a tile or scalar is assigned in a loop and used again",
    "chained-comparison": "a < b < c on tiles",
    "constant-arithmetic": "arithmetic on constants fails",
    "constant-changed": "what a kernel closes over is not what it was at its first call",
    "contract-dtype": "@ on element types that have no product",
    "contract-no-shared-axis": "@ on two tiles that share no axis",
    "contract-parallel-axis": "@ contracts an axis of a loop that carries nothing",
    "contract-scalar": "@ on a scalar",
    "disjoint": "iterations asserted to be disjoint meet, or carry a value",
    "division-dtype": "/ on integers",
    "dtype-mix": "operands of different element types",
    "dtype-not-computed": "arithmetic on an element type that is only stored",
    "gather-dtype": "an index that is not an integer",
    "kernel-returns-value": "a kernel returns a value",
    "literal-dtype": "a float literal with an integer tile",
    "literal-range": "a literal that its element type cannot hold",
    "missing-annotation": "a kernel's parameter has no annotation",
    "missing-branch": "a name is assigned in one branch only",
    "missing-return": "a function that returns nothing is used as a value",
    "not-a-function": "something that is not a function is called, or made a kernel",
    "op-dtype": "an operation on an element type that has none",
    "out-of-bounds": "an index is certainly outside the tensor",
    "over": "`over` names no axis of the tile",
    "power": "** with something else than a small constant integer",
    "rank": "as many indices as the tensor has dimensions are needed",
    "read-after-write": "a tile of a loop reads what another element of the loop writes",
    "recursion": "a function calls itself",
    "reduce-parallel-axis": "a reduction over an axis of a loop that carries nothing",
    "return-in-the-middle": "a return that is not the last statement",
    "scalar-needed": "a tile where one value is needed",
    "source-unavailable": "the source of a function cannot be read, or is another one by now",
    "store-axes": "a stored value spans axes that the index lacks",
    "store-dtype": "a stored value has another element type than the tensor",
    "stores-nothing": "a kernel writes to none of its tensors",
    "subscript": "something that is not a tensor is indexed, or with something that is no index",
    "tensor-without-index": "a tensor is used as a value",
    "tuple": "a tuple is unpacked or indexed wrongly",
    "unbound-dim": "a dimension that no parameter has",
    "unknown-attribute": "an attribute that does not exist",
    "unknown-axis": "a value is used where an axis is expected",
    "unknown-name": "a name that is not defined",
    "unsupported-constant": "a Python object that has no meaning in a kernel",
    "unsupported-expression": "a Python expression that has no meaning in a kernel",
    "unsupported-function": "a Python function that has no meaning in a kernel",
    "unsupported-statement": "a Python statement that has no meaning in a kernel",
    "use-outside-loop": "a value or axis of a loop is used after it",
    "view": "a view has other elements than its tensor, or cuts its axes otherwise",
    "whole-axis": "a scan, or topk, along an axis of a loop",
    "write-race": "two iterations of a parallel loop write the same element",
}


def advice(found: str, expected: str, mend: str) -> list[str]:
    """The last lines of every message: what was found and expected, and the likely mend, as far as they are known."""
    texts = (("found", found), ("expected", expected), ("mend", mend))
    return [f"  {label + ':':9} {text}" for label, text in texts if text]


class KernelError(Exception):
    """A kernel that means nothing, found before it runs.

    kind: an id from KINDS. location: file, line and the columns under the caret (from 1, end exclusive).
    found, expected, mend: one line each.
    notes: further lines, such as the call that led into an inlined function.
    """

    def __init__(
        self,
        kind: str,
        headline: str,
        location: Location,
        found: str,
        expected: str,
        mend: str,
        notes: tuple[str, ...] = (),
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown kind of error {kind!r}")
        super().__init__(headline)
        self.kind = kind
        self.headline = headline
        self.location = location
        self.found = found
        self.expected = expected
        self.mend = mend
        self.notes = notes
        self.source = linecache.getline(location.file, location.line).rstrip("\n")

    @property
    def file(self) -> str:
        return self.location.file

    @property
    def line(self) -> int:
        return self.location.line

    def __str__(self) -> str:
        place = self.location
        lines = [f"{self.headline} [{self.kind}]", f"  {place.file}:{place.line}:{place.column}"]
        if self.source.strip():
            number = str(place.line)
            width = max(1, min(place.end_column, len(self.source) + 1) - place.column)
            indent = "".join("\t" if c == "\t" else " " for c in self.source[: place.column - 1])
            lines += [f"  {number} | {self.source}", f"  {' ' * len(number)} | {indent}{'^' * width}"]
        lines += advice(self.found, self.expected, self.mend)
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


class CallError(TypeError, ValueError):
    """A kernel called with arguments that do not fit it.

    kind: a short id such as "dtype", "shape", "read-only". argument: the parameter's name.
    """

    def __init__(self, kind: str, headline: str, argument: str = "", found: str = "", expected: str = "",
                 mend: str = "") -> None:
        super().__init__(headline)
        self.kind = kind
        self.headline = headline
        self.argument = argument
        self.found = found
        self.expected = expected
        self.mend = mend

    def __str__(self) -> str:
        lines = [f"{self.headline} [{self.kind}]"]
        lines += advice(self.found, self.expected, self.mend)
        return "\n".join(lines)
