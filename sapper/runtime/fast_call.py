"""The path of a call like one seen before: a Python function written out for the kernel's parameters.

Enters: a signature, and entries by the shapes, strides and dtypes of their calls. Leaves: the function. Holds: it
checks what may differ between calls of one form (addresses, overlap, alignment, writability, where scalars may be), and
hands all other calls to who binds them from the start.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from . import arguments as _arguments
from .arguments import WRITEABLE_FLAG, Signature

if TYPE_CHECKING:
    from ..ir.types import DType

ARRAY, PACKED, TORCH = "array", "packed", "torch"
"""Kinds of tensors that this path knows: NumPy's arrays, Packed, and tensors of PyTorch in memory of the host."""
_CLASS = {ARRAY: "ndarray", PACKED: "Packed", TORCH: "Tensor"}
_FORM = {ARRAY: "a{0}.shape, a{0}.strides, a{0}.dtype", PACKED: "a{0}.layout",
         TORCH: "a{0}.shape, a{0}.stride(), a{0}.dtype"}


def kind_of(value: Any) -> str | None:
    """One of the kinds; None for any other object. Subclasses may mean something else by what is read here."""
    if type(value) is numpy.ndarray:
        return ARRAY
    torch = sys.modules.get("torch")
    if torch is not None and type(value) is torch.Tensor:
        return TORCH
    return None


def _fits_scalar(position: int, dtype: DType) -> str:
    """The condition under which an argument is a scalar of a dtype as it is; of f16 and bf16 none is."""
    if dtype.kind == "f":
        return f"type(a{position}) is float" if dtype.bits >= 32 else "False"
    if dtype.kind == "b":
        return f"type(a{position}) is bool"
    return f"type(a{position}) is int"


def _lie_apart(i: int, j: int, kind: dict[int, str], same: bool) -> str:
    """The condition under which two tensors share no memory, or all of it if they may be the same."""
    exact = f" or (p{i} == p{j} and low{i} == low{j} and high{i} == high{j}" if same else ""
    exact += f" and ({_FORM[kind[i]].format(i)}) == ({_FORM[kind[j]].format(j)}))" if same else ""
    return f"(p{i} + high{i} <= p{j} + low{j} or p{j} + high{j} <= p{i} + low{i}{exact})"


class _Parts(NamedTuple):
    """What a call is written of, parameter by parameter. unpack: names of what an entry holds. known: conditions on
    classes. key: what entries are found by. checks: conditions on values. writes: of words of the argument block."""

    unpack: list[str]
    known: list[str]
    key: list[str]
    checks: list[str]
    writes: list[str]


def _parts_of(signature: Signature, kind: dict[int, str]) -> _Parts:
    known = [f"type(a{i}) is {_CLASS[kind[i]]}" for i in kind]
    # A tensor without strides or elsewhere, and one that gradients are wanted of, is told by who binds it.
    known += [f"a{i}.layout is strided and a{i}.is_cpu and not a{i}.requires_grad" for i in kind if kind[i] == TORCH]
    parts = _Parts(["blocks", "new_block", "function", "run"], known, [], [], [])
    aligned: list[str] = []
    for i, parameter in enumerate(signature.parameters):
        dtype = parameter.dtype
        if parameter.dims is not None:
            parts.unpack.extend((f"w{i}", f"low{i}", f"high{i}", f"mask{i}"))
            parts.key.append(_FORM[kind[i]].format(i))
            aligned.append(f"p{i} & mask{i}")
            parts.writes.append(f"block[w{i}] = p{i}")
            continue
        parts.unpack.append(f"w{i}")
        known.append(_fits_scalar(i, dtype))
        if dtype.kind == "f" and dtype.bits >= 32:
            parts.writes.append(f"floats[2 * w{i}] = a{i}" if dtype.bits == 32 else f"doubles[w{i}] = a{i}")
            if dtype.bits == 32:  # larger ones are refused; NaN and infinities pass
                parts.checks.append(f"not {2.0**128 - 2.0**103!r} <= abs(a{i}) < inf")
        elif dtype.kind != "f":
            parts.unpack.extend((f"low{i}", f"high{i}"))
            parts.writes.append(f"block[w{i}] = a{i}")
            parts.checks.append(f"low{i} <= a{i} <= high{i}")
    if aligned:
        parts.checks.append(f"not ({' | '.join(aligned)})")
    return parts


def _memory_checks(signature: Signature, stored: Iterable[str], kind: dict[int, str], flags: str) -> Iterator[str]:
    """That what is stored to may be written, and shares no memory with other arguments."""
    # A packed tensor is never stored to: a kernel that does so refuses it.
    stored_positions = [i for name in stored if kind[i := signature.positions[name]] != PACKED]
    for i in stored_positions:
        if kind[i] == ARRAY:
            yield f"{flags.format(i)} & {WRITEABLE_FLAG}"
        for j in kind:
            if j != i and not (j in stored_positions and j < i):
                same = frozenset((signature.parameters[i].name, signature.parameters[j].name)) in signature.in_place
                yield _lie_apart(i, j, kind, same)


def make_fast_call(
    signature: Signature,
    stored: Iterable[str],
    entries: dict[Any, Any],
    slow_call: Callable[..., None],
    words: memoryview | None = _arguments.MEMORY_WORDS,
    kinds: tuple[str, ...] = (),
) -> Callable[..., None]:
    """The function that runs a call like one seen before, and hands any other to slow_call. kinds: of the tensors, in
    order; arrays by default.

    It is written out for the kernel's parameters, as a loop over them would take twice as long. For `f(a, x, out)` with
    an f32 scalar x and a stored f32 tensor out it reads

        def call(*arguments, **options):
            if not options and len(arguments) == 3:
                a0, a1, a2 = arguments
                if type(a0) is ndarray and type(a2) is ndarray and type(a1) is float:
                    entry = entries.get((a0.shape, a0.strides, a0.dtype, a2.shape, a2.strides, a2.dtype))
                    if entry is not None:
                        blocks, new_block, function, run, w0, low0, high0, mask0, w1, w2, low2, high2, mask2 = entry
                        p0 = memory[(id(a0) >> 3) + 2]
                        p2 = memory[(id(a2) >> 3) + 2]
                        if (not (p0 & mask0 | p2 & mask2) and memory[(id(a2) >> 3) + 8] & 1024
                                and (p2 + high2 <= p0 + low0 or p0 + high0 <= p2 + low2)):
                            ...
    """
    tensors, parameters = signature.tensor_positions, signature.parameters
    kind = dict(zip(tensors, kinds or (ARRAY,) * len(tensors), strict=True))
    address = {ARRAY: "memory[(id(a{0}) >> 3) + 2]" if words is not None else "address_of(a{0})",
               PACKED: "a{0}.address", TORCH: "a{0}.data_ptr()"}
    flags = "memory[(id(a{0}) >> 3) + 8]" if words is not None else "flags_of(a{0})"
    parts = _parts_of(signature, kind)
    checks = [*parts.checks, *_memory_checks(signature, stored, kind, flags)]
    names = "".join(f"a{i}, " for i in range(len(parameters)))
    lines = [
        "def call(*arguments, **options):",
        f" if not options and len(arguments) == {len(parameters)}:",
        f"  ({names}) = arguments" if names else "  pass",
        f"  if {' and '.join(parts.known) or 'True'}:",
        f"   entry = entries.get(({', '.join(parts.key)}{',' if parts.key else ''}))",
        "   if entry is not None:",
        f"    {', '.join(parts.unpack)} = entry",
        *(f"    p{i} = {address[kind[i]].format(i)}" for i in tensors),
        f"    if {' and '.join(checks) or 'True'}:",
        "     try: views = blocks.pop()",
        "     except IndexError: views = new_block()",
        "     block, floats, doubles, at = views",
        *(f"     {write}" for write in parts.writes),
        "     if run is None: function(at, 0, 1)",
        "     else: run(block, at)",
        "     blocks.append(views)",
        "     return",
        " slow_call(*arguments, **options)",
    ]
    bounded = sum(parameters[i].dtype.kind != "f" for i in signature.scalar_positions)
    assert len(parts.unpack) == 4 + 4 * len(tensors) + len(signature.scalar_positions) + 2 * bounded
    names_seen: dict[str, Any] = {
        "entries": entries,
        "memory": words,
        "address_of": _arguments.address_through_interface,
        "flags_of": _arguments.flags_through_interface,
        "ndarray": numpy.ndarray,
        "slow_call": slow_call,
        "inf": float("inf"),
    }
    if PACKED in kinds:
        from .packed import Packed

        names_seen["Packed"] = Packed
    if TORCH in kinds:
        torch = sys.modules["torch"]
        names_seen |= {"Tensor": torch.Tensor, "strided": torch.strided}
    exec(compile("\n".join(lines), f"<call of kernel {signature.kernel}>", "exec"), names_seen)
    made: Callable[..., None] = names_seen["call"]
    return made
