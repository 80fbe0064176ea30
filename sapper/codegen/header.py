"""The C header of a library of kernels.

Enters: `CKernel`s (c_abi.py). Leaves: text that C99 and C++ take. Holds: it needs nothing but <stdint.h>, and every
struct has the size that the machine code counts with (checked in the header itself, where the compiler can).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..ir.types import DType, TensorType
from .c_abi import STATUS, SYNC_BYTES, CKernel, Field, Variant

_C_TYPES = {
    "f64": "double", "f32": "float", "f16": "uint16_t", "bf16": "uint16_t", "i64": "int64_t", "i32": "int32_t",
    "i16": "int16_t", "i8": "int8_t", "u8": "uint8_t", "i4": "int8_t",
    "f8e4m3": "uint8_t", "f8e5m2": "uint8_t", "bool": "uint8_t", "index": "int64_t",
}
_NOTES = {"f16": "f16 bits", "bf16": "bf16 bits", "f8e4m3": "fp8 e4m3 bits", "f8e5m2": "fp8 e5m2 bits",
          "i4": "-8 to 7", "bool": "0 or 1"}


def header_text(name: str, kernels: Sequence[CKernel], target: str, features: Iterable[str]) -> str:
    """The header called `name`.h. target, features: what the code was made for, told in a comment."""
    guard = re.sub(r"\W", "_", f"sapper_{name}_h").upper()
    lines = [
        f"/* {name}: {', '.join(k.name for k in kernels)}. Made by sapper for {target}; needs no Python.",
        f"   Features that the processor must have (else SAPPER_BAD_CPU): {' '.join(sorted(features))}.",
        "   Outputs may share no byte with another argument, nor with themselves through their strides. */",
        f"#ifndef {guard}", f"#define {guard}", "", "#include <stdint.h>", "",
        "#if defined(__cplusplus)", "#define SAPPER_RESTRICT __restrict", "#else",
        "#define SAPPER_RESTRICT restrict", "#endif", "",
        "#ifndef SAPPER_STATUS", "#define SAPPER_STATUS", "enum sapper_status {",
    ]
    for status, (number, meaning) in STATUS.items():
        lines.append(f"    SAPPER_{status} = {number}, /* {meaning} */")
    lines += [
        "};", "#endif", "",
        "/* The sync block of a call by several workers: 64-byte aligned, zeroed before each call. */",
        "#ifndef SAPPER_SYNC_BYTES", f"#define SAPPER_SYNC_BYTES {SYNC_BYTES}", "#endif", "",
        "#ifdef __cplusplus", 'extern "C" {', "#endif",
    ]
    for kernel in kernels:
        lines += ["", *_kernel_lines(kernel)]
    lines += ["", "#ifdef __cplusplus", "}", "#endif", "", f"#endif /* {guard} */"]
    return "\n".join(lines) + "\n"


def _kernel_lines(kernel: CKernel) -> list[str]:
    name = kernel.name
    types = [(p, str(t).replace("tensor<", "Tensor[").replace(">", "]")) for p, t in kernel.parameters]
    signature = ", ".join(f"{p}: {t}" for p, t in types)
    lines = [f"/* {name}({signature})"]
    lines += [f"   {line.strip()}".rstrip().replace("*/", "* /") for line in kernel.documentation.strip().splitlines()]
    for number, variant in enumerate(kernel.variants, 1):
        lines.append(f"   form {number}: {_assumptions(variant)}")
    lines[-1] += " */"
    lines.append(f"typedef struct {name}_call {{")
    for place in kernel.fields:
        lines.append(f"    {_member(kernel, place)};{_comment(place)}")
    lines += [f"}} {name}_call;", ""]
    check = f'(sizeof({name}_call) == {kernel.call_bytes}, "layout");'
    lines += ["#if defined(__cplusplus) && __cplusplus >= 201103L", f"static_assert{check}",
              "#elif defined(__STDC_VERSION__) && __STDC_VERSION__ >= 201112L", f"_Static_assert{check}", "#endif", ""]
    arguments = []
    for parameter, type in kernel.parameters:
        if isinstance(type, TensorType):
            arguments.append(_pointer(kernel, kernel.field(f"{parameter}.data"), restrict=True))
        else:
            place = kernel.field(f"scalar.{parameter}")
            arguments.append(f"{_c_type(place.dtype)} {place.name}")
    arguments += [f"int64_t {kernel.field(f'dim.{d}').name}" for d in kernel.dims]
    lines += [
        f"/* Contiguous tensors (C order), on the calling thread{_own_scratch(kernel)}. Returns a sapper_status. */",
        f"int {name}({', '.join(arguments) or 'void'});",
        "/* One worker of `workers`, each a thread of its own, all with the same call. Returns a sapper_status. */",
        f"int {name}_on(const {name}_call *call, int64_t worker, int64_t workers);",
        "/* Scratch memory for each worker in bytes (a multiple of 64), by the dimensions of the call; -1: refused. */",
        f"int64_t {name}_scratch_bytes(const {name}_call *call);",
    ]
    return lines


def _own_scratch(kernel: CKernel) -> str:
    return ", with the library's scratch memory" if any(v.scratch for v in kernel.variants) else ""


def _assumptions(variant: Variant) -> str:
    parts = [f"{d} = {n}" for d, n in variant.static.items()]
    parts += [f"{d} a multiple of {n}" for d, n in variant.divisors.items() if n > 1]
    contiguous = [name for name, pattern in variant.strides.items() if pattern == "contiguous"]
    if len(contiguous) == len(variant.strides):
        return ", ".join([*parts, "contiguous tensors"])
    return ", ".join([*parts, *(f"{name} contiguous" for name in contiguous), "any strides" if not contiguous
                      else "any strides else"])


def _c_type(dtype: DType | None) -> str:
    assert dtype is not None
    return _C_TYPES[dtype.name]


def _pointer(kernel: CKernel, place: Field, restrict: bool = False) -> str:
    tensor = place.holds.removesuffix(".data")
    const = "" if tensor in kernel.stored else "const "
    qualifier = "SAPPER_RESTRICT " if restrict and not const and tensor not in kernel.in_place else ""
    return f"{const}{_c_type(place.dtype)} *{qualifier}{place.name}"


def _member(kernel: CKernel, place: Field) -> str:
    if place.holds.endswith(".data"):
        return _pointer(kernel, place)
    if place.count:
        return f"int64_t {place.name}[{place.count}]"
    if place.holds in ("scratch", "sync"):
        return f"void *{place.name}"
    return f"{_c_type(place.dtype) if place.dtype else 'int64_t'} {place.name}"


def _comment(place: Field) -> str:
    notes = {"scratch": "64-byte aligned; may be null where NAME_scratch_bytes is 0",
             "scratch_bytes": "of all workers together", "sync": "SAPPER_SYNC_BYTES, 64-byte aligned, zero"}
    note = notes.get(place.holds, "")
    if place.count:
        note = "in elements"
    elif place.dtype is not None:
        note = _NOTES.get(place.dtype.name, "")
    return f" /* {note} */" if note else ""
