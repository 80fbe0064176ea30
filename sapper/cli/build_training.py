"""`sapper build MODEL --training`: a model in training as files.

Enters: a model, a target, the tokens of a step, the name of the output. Leaves: the code, a header, a directory with
the model in f32, whose safetensors file the code maps, and what was made. Holds: files, and then the directory, are
written whole or not at all; the code holds the digest of the header of the safetensors file.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from .build_model import c_name, content_of, ending_of, target_of_models
from .errors import UsageError
from .files import write_files

SUFFIXES = (".so", ".o", ".s", "")


def run_build_training(
    wanted: str, output: str, target_name: str | None, sequences: int, length: int | None, header: str | None,
) -> dict[str, Any]:
    """Build a model's library for training and its weights. sequences, length: of a step, as `sapper train` has them.
    Returns what was made: files, bytes, seconds."""
    from ..ahead.digest import digest
    from ..ahead.learn import ENDING
    from ..ahead.library import make_model_library, plan_model, report
    from ..models.checkpoint import open_checkpoint
    from ..models.training import config_of, model_pieces, start
    from ..models.vocabulary import vocabulary_of
    from ..models.whole_training import whole_of
    from ..models.written import MODEL, check_new, write_directory

    started = time.perf_counter()
    path = Path(output)
    ending = ending_of(path)
    if ending not in SUFFIXES:
        raise UsageError(f"-o {output}: found the ending {ending!r}; expected .so, .o, .s, or none for an executable")
    plain = path.name.removesuffix(ending)
    directory = path.with_name(plain if ending else plain + ENDING)
    header_path = Path(header) if header else path.with_name(f"{plain}.h")
    if header_path in (path, directory):
        raise UsageError(f"--header {header}: found the name of another file of the model; expected one of its own")
    check_new(directory)
    target = target_of_models(target_name)
    checkpoint = open_checkpoint(wanted)
    trainer: Any = start(checkpoint, sequences, length)
    loaded = time.perf_counter()
    size = trainer.vocabulary
    words = None if ending else vocabulary_of(checkpoint.tokenizer(size), size, chats=False)
    model = whole_of(trainer, c_name(plain.removeprefix("lib")), words)
    plan = plan_model(model, target)
    number = digest(model.head)
    library = make_model_library(plan, number)
    code = content_of(library, ending, path.name)
    compiled = time.perf_counter()
    write_files({path: code, header_path: library.h().encode()}, executable=() if ending else (path,))
    write_directory(checkpoint, directory, config_of(checkpoint), model_pieces(trainer, laid_out=True),
                    shard_bytes=plan.weights_bytes)
    return {
        "output": str(path), "weights": str(directory / MODEL), "header": str(header_path), "target": target.name,
        "size_bytes": len(code), "digest": f"{number:016x}", "sequences": trainer.sequences, "length": trainer.length,
        **report(plan), "load_s": round(loaded - started, 3), "compile_s": round(compiled - loaded, 3),
        "write_s": round(time.perf_counter() - compiled, 3),
    }


def report_training(made: dict[str, Any]) -> str:
    """What was made, for people."""
    mib = 1 << 20
    return "\n".join([
        f"{made['kernels']} kernels, {made['code_bytes']} bytes of code; a step on {made['sequences']} x "
        f"{made['length']} tokens is {made['train_launches']} launches, the loss alone {made['evaluate_launches']}",
        f"memory of a model: {made['weights_bytes'] / mib:.1f} MiB of weights, {made['state_bytes'] / mib:.1f} MiB of "
        f"state, {made['temporary_bytes'] / mib:.1f} MiB of temporaries (without sharing "
        f"{made['temporary_bytes_without_sharing'] / mib:.1f}), {made['scratch_bytes_of_a_worker'] / mib:.1f} MiB of "
        "scratch for each worker",
        f"{made['output']}: {made['size_bytes']} bytes for {made['target']}; declared in {made['header']}",
        f"{made['weights']}: {made['weights_bytes']} bytes, digest of its header {made['digest']}",
        f"loaded in {made['load_s']:.1f} s, compiled in {made['compile_s']:.1f} s, written in {made['write_s']:.1f} s",
    ])
