"""`sapper build`: kernels as a library for C."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import UsageError
from .files import write_files
from .kernels import find_kernels, find_target, kernel_dims, parse_dims, parse_schedule

SUFFIXES = {".so": "a shared library", ".o": "an object file", ".s": "assembly for GNU as"}


def run_build(
    wanted: list[str], output: str, target_name: str | None, static: str | None, dims: str | None,
    schedule: str | None, fallback: bool, scratch_mib: int, header: str | None,
) -> dict[str, Any]:
    """Build a library and its header. Returns what was made: files, functions, bytes."""
    from ..codegen.library import c_kernel, make_library

    path = Path(output)
    if path.suffix not in SUFFIXES:
        kinds = ", ".join(f"{suffix} ({what})" for suffix, what in SUFFIXES.items())
        raise UsageError(f"-o {output}: found the ending {path.suffix!r}; expected one of {kinds}")
    header_path = Path(header) if header else path.with_suffix(".h")
    if header_path == path:
        raise UsageError(f"--header {header}: found the name of the library itself; expected another")
    target = find_target(target_name)
    if target.assembler_allocates:
        raise UsageError(f"--target {target.name}: found a target whose own assembler makes the code; expected a CPU, "
                         f"whose bytes are made here; mend: `sapper asm --target {target.name}` prints the text")
    chosen = parse_schedule(schedule)
    kernels = [found.kernel for name in wanted for found in find_kernels(name)]
    extents = _extents(kernels, static, "static"), _extents(kernels, dims, "dims")
    from ..runtime.launch import dim_class

    made = []
    for kernel in kernels:
        own = kernel_dims(kernel)
        fixed = {d: n for d, n in extents[0].items() if d in own}
        classes = {d: dim_class(n) for d, n in extents[1].items() if d in own and d not in fixed}
        made.append(c_kernel(kernel, target, chosen, fixed, classes, fallback))
    library = make_library(made, target, scratch_mib << 20)
    name = path.stem
    if path.suffix == ".so":
        content = library.so(path.name)
    else:
        content = library.o() if path.suffix == ".o" else library.s().encode()
    write_files({path: content, header_path: library.h(name.removeprefix("lib")).encode()})
    functions = [{"name": k.name, "forms": [v.symbol for v in k.variants],
                  "code_bytes": sum(v.code.code_bytes for v in k.variants)} for k in made]
    return {"output": str(path), "header": str(header_path), "target": target.name, "size_bytes": len(content),
            "functions": functions}


def _extents(kernels: list[Any], text: str | None, option: str) -> dict[str, int]:
    """`M=512,N=64`, where each name is a dimension of some kernel of the library. Raises UsageError."""
    if not text:
        return {}
    names = {part.partition("=")[0] for part in text.replace(",", " ").split()}
    known = dict.fromkeys(d for kernel in kernels for d in kernel_dims(kernel))
    for name in sorted(names - set(known)):
        expected = ", ".join(known) or "none"
        raise UsageError(f"--{option}: found {name!r}; expected dimensions of the kernels: {expected}")
    result: dict[str, int] = {}
    for kernel in kernels:
        own = [part for part in text.replace(",", " ").split() if part.partition("=")[0] in kernel_dims(kernel)]
        result |= parse_dims(",".join(own), kernel, option)
    return result


def report(made: dict[str, Any]) -> str:
    """What was made, for people."""
    lines = []
    for function in made["functions"]:
        forms = ", ".join(name.rpartition(".")[2] for name in function["forms"])
        lines.append(f"{function['name']}: {len(function['forms'])} forms ({forms}), {function['code_bytes']} bytes")
    lines.append(f"{made['output']}: {made['size_bytes']} bytes for {made['target']}; declared in {made['header']}")
    return "\n".join(lines)
