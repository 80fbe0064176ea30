"""`sapper build MODEL`: a whole model as files.

Enters: a model, a target, the name of the output. Leaves: the code, the weights beside it, a header, and what was made.
Holds: files are written whole or not at all; the code holds the digest of the weights that were written with it.
"""

from __future__ import annotations

import mmap
import re
import time
from pathlib import Path
from typing import Any

from ..targets import has_module
from .errors import UsageError
from .files import staging
from .kernels import find_target

SUFFIXES = (".so", ".o", ".s", "")


def run_build_model(
    wanted: str, output: str, target_name: str | None, context: int | None, dtype: str, header: str | None,
) -> dict[str, Any]:
    """Build a model's library and its weights. Returns what was made: files, bytes, seconds."""
    from ..ahead.digest import digest
    from ..ahead.library import make_model_library, plan_model, report, weights_pieces
    from ..models.whole import load_whole

    started = time.perf_counter()
    path = Path(output)
    ending = ending_of(path)
    if ending not in SUFFIXES:
        raise UsageError(f"-o {output}: found the ending {ending!r}; expected .so, .o, .s, or none for an "
                         "executable")
    plain = path.name.removesuffix(ending)
    weights = path.with_name(f"{plain}.weights")
    header_path = Path(header) if header else path.with_name(f"{plain}.h")
    if header_path in (path, weights):
        raise UsageError(f"--header {header}: found the name of another file of the model; expected one of its own")
    target = target_of_models(target_name)
    model = load_whole(wanted, c_name(plain.removeprefix("lib")), context, dtype,
                       words=not ending, target=target)
    loaded = time.perf_counter()
    plan = plan_model(model, target)
    compiled = time.perf_counter()
    with staging() as create:
        with create(weights) as file:
            for piece in weights_pieces(plan):
                file.write(piece)
            file.flush()
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
                number = digest(content)
        library = make_model_library(plan, number)
        made = content_of(library, ending, path.name)
        with create(path, 0o777 if not ending else 0o666) as file:
            file.write(made)
        with create(header_path) as file:
            file.write(library.h().encode())
    return {
        "output": str(path), "weights": str(weights), "header": str(header_path), "target": target.name,
        "size_bytes": len(made), "digest": f"{number:016x}", "context": model.context, **report(plan),
        "load_s": round(loaded - started, 3), "compile_s": round(compiled - loaded, 3),
        "write_s": round(time.perf_counter() - compiled, 3),
    }


def ending_of(path: Path) -> str:
    return path.suffix if path.suffix[1:].isalpha() else ""     # model_armv8.1-a has none


def target_of_models(name: str | None) -> Any:
    """A target that models are built for. Raises UsageError."""
    target = find_target(name)
    if target.assembler_allocates:
        raise UsageError(f"--target {target.name}: found a target whose own assembler makes the code; expected a CPU, "
                         f"whose bytes are made here; mend: `sapper asm --target {target.name}` prints a kernel's text")
    if not has_module(target.family, "system"):
        raise UsageError(f"--target {target.name}: found a family that says nothing of its system; expected "
                         "system.py and translate.py; mend: docs/add-a-target.md#code-by-hand")
    return target


def content_of(library: Any, ending: str, name: str) -> bytes:
    """The code in the form that the name asks for."""
    if ending == ".s":
        text: str = library.s()
        return text.encode()
    made: bytes = {"": library.executable, ".o": library.o, ".so": lambda: library.so(name)}[ending]()
    return made


def c_name(stem: str) -> str:
    """The stem of a file's name as the beginning of C names."""
    name = re.sub(r"[^A-Za-z0-9_]", "_", stem)
    return f"_{name}" if not name or name[0].isdigit() else name


def report_model(made: dict[str, Any]) -> str:
    """What was made, for people."""
    mib = 1 << 20
    return "\n".join([
        f"{made['kernels']} kernels, {made['code_bytes']} bytes of code; a step is {made['step_launches']} launches, "
        f"a chunk of a prompt {made['prefill_launches']}",
        f"memory of a model: {made['state_bytes'] / mib:.1f} MiB of state for {made['context']} tokens, "
        f"{made['temporary_bytes'] / mib:.1f} MiB of temporaries, "
        f"{made['scratch_bytes_of_a_worker'] / mib:.1f} MiB of scratch for each worker",
        f"{made['output']}: {made['size_bytes']} bytes for {made['target']}; declared in {made['header']}",
        f"{made['weights']}: {made['weights_bytes']} bytes, digest {made['digest']}",
        f"loaded in {made['load_s']:.1f} s, compiled in {made['compile_s']:.1f} s, written in {made['write_s']:.1f} s",
    ])
