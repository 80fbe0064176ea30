"""Models built for the tests, and a C program that runs one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapper.cli.build_model import run_build_model

NEEDS_GCC = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
CALLER = r"""
#include <stdio.h>
#include <stdlib.h>
#include "model.h"

/* caller WEIGHTS THREADS STEPS TOKEN...: logits of the prompt, then of each greedy step; statuses to stderr */
int main(int argc, char **argv) {
    model_model *model = 0;
    static int32_t tokens[4096];
    int status = model_open(argv[1], atoi(argv[2]), &model), steps = atoi(argv[3]), count = argc - 4;
    fprintf(stderr, "open %d\n", status);
    if (status) return 1;
    for (int i = 0; i < count; i++) tokens[i] = atoi(argv[i + 4]);
    status = model_prefill(model, tokens, count);
    fprintf(stderr, "prefill %d position %d\n", status, (int)model_position(model));
    for (int i = 0; !status && i <= steps; i++) {
        int32_t token = model_likeliest(model);
        fwrite(&token, 4, 1, stdout);
        fwrite(model_logits(model), 4, MODEL_VOCABULARY, stdout);
        if (i < steps) status = model_step(model, token);
    }
    fprintf(stderr, "status %d position %d\n", status, (int)model_position(model));
    fprintf(stderr, "rewind %d %d\n", model_rewind(model, 1 << 20), model_rewind(model, 0));
    fprintf(stderr, "tokens %d %d\n", model_step(model, -1), model_step(model, MODEL_VOCABULARY));
    fprintf(stderr, "none %d\n", model_prefill(model, tokens, 0));
    model_close(model);
    model_close(0);
    return 0;
}
"""


def build(model: Path | str, output: Path, **options: Any) -> dict[str, Any]:
    """`sapper build` for this CPU."""
    given = {"target_name": None, "context": None, "dtype": "file", "header": None, **options}
    return run_build_model(str(model), str(output), **given)


def compile_caller(library: Path) -> Path:
    """The C program above, linked against a library called model.so."""
    source, program = library.with_name("caller.c"), library.with_name("caller")
    source.write_text(CALLER)
    subprocess.run(["gcc", "-std=c99", "-Wall", "-Werror", "-pedantic", str(source), str(library), "-o", str(program),
                    f"-Wl,-rpath,{library.parent}"], check=True)
    return program


def run(program: Path, *arguments: str, text: bytes | None = None) -> tuple[int, bytes, str]:
    """(status, standard output, standard error) of an executable, in an empty environment."""
    done = subprocess.run([str(program), *arguments], input=text, stdin=subprocess.DEVNULL if text is None else None,
                          capture_output=True, timeout=60, check=False, env={})
    return done.returncode, done.stdout, done.stderr.decode()


def call(program: Path, weights: Path, threads: int, steps: int, tokens: list[int]) -> tuple[Any, list[str]]:
    """(token and logits of each row, lines of statuses)."""
    done = subprocess.run([str(program), str(weights), str(threads), str(steps), *map(str, tokens)],
                          capture_output=True, timeout=60, check=False)
    assert done.returncode in (0, 1), done
    return np.frombuffer(done.stdout, np.int32), done.stderr.decode().splitlines()
