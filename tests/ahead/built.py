"""Models built for the tests, and a C program that runs one."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapper.ahead.written import written
from sapper.cli.build_model import run_build_model
from sapper.codegen.compile import encoded
from sapper.codegen.object import Part, write_executable
from sapper.codegen.translate import translated
from sapper.targets import module_of

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


OPENED = """\
    mov rbp, rsp
    sub rsp, 64
    and rsp, -64
    mov rdi, qword ptr [rbp + 16]
    xor esi, esi
    xor edx, edx
    mov eax, 2
    syscall
    mov r8, rax
    xor edi, edi
    mov rsi, @library_bytes
    mov edx, 5
    mov r10d, 2
    xor r9d, r9d
    mov eax, 9
    syscall
    mov r13, rax
    mov rdi, qword ptr [rbp + 24]
    mov esi, @threads
    mov rdx, rsp
    lea rax, [r13 + @open]
    call rax
    test eax, eax
    jne failed
    mov rbx, qword ptr [rsp]
"""
"""How a program without a C library begins: maps the library that its first argument names, which needs no other
address than the one where it lies, and opens a model with the weights of the second. rbp: the stack at entry; r13:
where the library lies; rbx: the model."""


def symbols(library: bytes) -> dict[str, int]:
    """Name -> address, of .dynsym."""
    at, count = struct.unpack_from("<Q", library, 40)[0], struct.unpack_from("<H", library, 60)[0]
    headers = [struct.unpack_from("<IIQQQQIIQQ", library, at + 64 * n) for n in range(count)]
    table = next(h for h in headers if h[1] == 11)
    names = headers[table[6]][4]
    found = {}
    for place in range(table[4], table[4] + table[5], 24):
        name, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", library, place)
        found[library[names + name:library.index(0, names + name)].decode()] = value
    return found


def program_of(text: str, library: bytes, facts: Any, numbers: dict[str, int], constants: dict[str, bytes]) -> bytes:
    """An executable, made of the same rows as a model's own code: OPENED in the place of {opened}. numbers: what the
    text names besides the library's functions."""
    places = {name.removeprefix("model_"): value for name, value in symbols(library).items()}
    made = written("caller", text.replace("{opened}", OPENED), {"library_bytes": len(library), **places, **numbers}, {},
                   constants)
    code = encoded(translated(made.machine, facts), facts)
    return write_executable([Part("caller", code)], "caller", system=module_of(facts.family, "system").SYSTEM)
