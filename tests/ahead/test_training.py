"""A model in training as a library: programs without Python train it, bit for bit as `sapper train` does, and each goes
on where the other stopped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapper.ahead.plan import Plan, Training
from sapper.ahead.training import training_functions
from sapper.cli.build_model import content_of
from sapper.cli.build_training import run_build_training
from sapper.cli.main import main
from sapper.codegen.compile import encoded
from sapper.codegen.translate import translated
from sapper.models.checkpoint import open_checkpoint
from sapper.models.safetensors_file import read_tensors
from sapper.models.training import Recipe, resume, start
from sapper.targets import target
from tests.codegen.run_native import RUNNABLE

from .built import NEEDS_GCC, program_of, run
from .test_families import FAMILIES

pytestmark = pytest.mark.skipif(not RUNNABLE, reason="this CPU runs no kernels")
DATA = Path(__file__).parents[1] / "models" / "data"
SEQUENCES, LENGTH, THREADS, STEPS = 2, 8, 2, 3
DAMAGE: list[tuple[Callable[[bytes], bytes], int]] = [
    (lambda content: content[:-1], 2), (lambda content: bytes([content[0] ^ 1]) + content[1:], 3)]
"""Of a file, and the status that tells of it."""
RECIPE = Recipe(STEPS, rate=1e-2, warmup=0, balance=1e-3)


class Constant(Recipe):
    """The same rate in all steps."""

    def rate_of(self, number: int) -> float:
        return self.rate


def build(model: Path | str, output: Path, target_name: str | None = None) -> dict[str, Any]:
    return run_build_training(str(model), str(output), target_name, SEQUENCES, LENGTH, None)


def drawn(vocabulary: int, steps: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and targets, of which some do not count."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(steps):
        tokens, targets = random.integers(0, vocabulary, (2, SEQUENCES, LENGTH)).astype(np.int32)
        targets[0, ::5] = -1
        found.append((tokens, targets))
    return found


def trained(training: Any, batches: Sequence[tuple[np.ndarray, np.ndarray]], done: int = 0) -> np.ndarray:
    """The loss before, that of the step and the norm, of each step in this process."""
    recipe = Constant(**{name: getattr(RECIPE, name) for name in RECIPE.__slots__} | {
        "balance": RECIPE.balance * bool(training.apart)})
    return np.array([(training.loss_of(*batch), *training.step(*batch, recipe, number))
                     for number, batch in enumerate(batches, done + 1)])


CALLER = """
    # caller LIBRARY WEIGHTS SAVED STATE [OLD STATE]: maps the library and calls it
    # rbx: model; rbp: the stack at entry; r12: the next step; r13: where the library lies; r14: its tokens
{opened}    mov rsi, qword ptr [rbp]
    cmp rsi, 6
    jb begin
    mov rdi, rbx
    mov rsi, qword ptr [rbp + 48]
    lea rax, [r13 + @load_state]
    call rax
    test eax, eax
    jne failed
begin:
    lea r14, @content
    xor r12d, r12d
step:
    mov rdi, rbx
    mov rsi, r14
    lea rdx, [r14 + @tokens_bytes]
    mov rcx, rsp
    lea rax, [r13 + @evaluate]
    call rax
    test eax, eax
    jne failed
    mov rdi, rbx
    mov rsi, r14
    lea rdx, [r14 + @tokens_bytes]
    lea rcx, @recipe
    lea r8, [rsp + 8]
    lea rax, [r13 + @train]
    call rax
    test eax, eax
    jne failed
    mov edi, 1
    mov rsi, rsp
    mov edx, 20
    mov eax, 1
    syscall
    add r14, @batch_bytes
    add r12, 1
    cmp r12, @batches
    jb step
    mov rdi, rbx
    mov rsi, qword ptr [rbp + 32]
    lea rax, [r13 + @save]
    call rax
    test eax, eax
    jne failed
    mov rdi, rbx
    mov rsi, qword ptr [rbp + 40]
    lea rax, [r13 + @save_state]
    call rax
    test eax, eax
    jne failed
    mov rdi, rbx
    lea rax, [r13 + @steps]
    call rax
    mov r12, rax
    mov rdi, rbx
    lea rax, [r13 + @close]
    call rax
    mov rdi, r12                    # steps so far are the status
    mov eax, 231
    syscall
    ud2
failed:
    lea edi, [rax + 100]
    mov eax, 231
    syscall
    ud2
"""


def caller(library: Path, facts: Any, batches: Sequence[tuple[np.ndarray, np.ndarray]], balanced: bool = False) -> Path:
    """The program above as an executable beside the library. balanced: whether experts are."""
    numbers = {"threads": THREADS, "tokens_bytes": 4 * SEQUENCES * LENGTH, "batch_bytes": 8 * SEQUENCES * LENGTH,
               "batches": len(batches)}
    recipe = np.array([RECIPE.rate, RECIPE.decay, RECIPE.clip, RECIPE.beta1, RECIPE.beta2, RECIPE.epsilon,
                       RECIPE.balance * balanced])
    content = b"".join(array.tobytes() for batch in batches for array in batch)
    program = library.with_name(f"caller{len(batches)}")
    program.write_bytes(program_of(CALLER, library.read_bytes(), facts, numbers,
                                   {"content": content, "recipe": recipe.tobytes()}))
    program.chmod(0o755)
    return program


def called(program: Path, library: Path, weights: Path, *others: Path,
           emulator: Sequence[str] = ()) -> tuple[int, np.ndarray]:
    """Its status, and of each step the loss before, that of the step and the norm."""
    command = [*emulator, str(program), str(library), str(weights), *map(str, others)]
    status, said, _ = run(Path(command[0]), *command[1:])
    rows = np.frombuffer(said, np.dtype([("before", "<f8"), ("loss", "<f8"), ("norm", "<f4")]))
    return status, np.array([[row["before"], row["loss"], row["norm"]] for row in rows]).reshape(-1, 3)


def same_as_file(tensors: dict[str, Any], path: Path, ending: str = "") -> None:
    found = read_tensors(path)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name + ending].read(), tensor.read(), err_msg=name)


@pytest.mark.parametrize("name", ["deepseek_v3", pytest.param("llama", marks=pytest.mark.sampled(9)),
                                  pytest.param("qwen3_moe", marks=pytest.mark.sampled(9))])
def test_programs_train_as_this_process_does(name: str, tmp_path: Path) -> None:
    """And each goes on from what the other has written."""
    library, weights = tmp_path / "model.so", tmp_path / "model" / "model.safetensors"
    facts = build(DATA / name, library)
    assert facts["weights"] == str(weights) and facts["weights_bytes"] == weights.stat().st_size
    training = start(open_checkpoint(DATA / name), SEQUENCES, LENGTH, threads=THREADS)
    same_as_file(training.tensors, weights)
    batches = drawn(training.vocabulary, 2 * STEPS, seed=1)

    saved, state = tmp_path / "model" / "saved", tmp_path / "model" / "training.safetensors"
    balanced = bool(training.apart)
    program = caller(library, target(facts["target"]), batches[:STEPS], balanced)
    status, rows = called(program, library, weights, saved, state)
    assert status == STEPS
    np.testing.assert_array_equal(rows, trained(training, batches[:STEPS]))
    same_as_file(training.tensors, saved)
    same_as_file(training.means, state, ".mean")
    same_as_file(training.squares, state, ".square")
    assert sorted(path.name for path in saved.parent.iterdir() if "part" in path.name) == []

    size = int.from_bytes(saved.read_bytes()[:8], "little")
    header = json.loads(saved.read_bytes()[8 : 8 + size])
    for bias, numbers in training.apart.items():        # which no gradient moves is read from the file, too
        at = 8 + size + header[bias]["data_offsets"][0]
        np.memmap(saved, np.float32, "r+", at, numbers.shape)[:] -= np.arange(len(numbers))
    os.replace(saved, weights)                  # the directory is now one that --save-every made
    further = start(open_checkpoint(weights.parent), SEQUENCES, LENGTH, threads=THREADS)
    assert resume(further) == STEPS
    expected = trained(further, batches[STEPS:], STEPS)
    program = caller(library, target(facts["target"]), batches[STEPS:], balanced)
    status, rows = called(program, library, weights, tmp_path / "saved", tmp_path / "state", state)
    assert status == 2 * STEPS
    np.testing.assert_array_equal(rows, expected)
    same_as_file(further.tensors, tmp_path / "saved")
    broken = tmp_path / "broken"
    for change, expected_status in DAMAGE:
        broken.write_bytes(change(state.read_bytes()))
        assert called(program, library, weights, tmp_path / "x", tmp_path / "y", broken)[0] == 100 + expected_status
    assert called(program, library, weights, tmp_path / "x", tmp_path / "y", tmp_path / "none")[0] == 101


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan[Training]]:
    """A library, its text and its target beside it; and its plan."""
    path, plans = tmp_path_factory.mktemp("training") / "model.so", []

    def with_text(library: Any, ending: str, name: str) -> bytes:
        path.with_suffix(".s").write_text(library.s())
        plans.append(library.plan)
        return content_of(library, ending, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sapper.cli.build_training.content_of", with_text)
        path.with_suffix(".target").write_text(build(DATA / "llama", path)["target"])
    return path, plans[0]


@pytest.fixture(scope="module")
def library(made: tuple[Path, Plan[Training]]) -> Path:
    return made[0]


USER = r"""
#include <stdio.h>
#include <string.h>
#include "model.h"

#define COUNT (MODEL_SEQUENCES * MODEL_LENGTH)

int main(int argc, char **argv) {
    model_model *model = 0;
    int32_t tokens[COUNT] = {0}, targets[COUNT] = {0};
    sapper_recipe recipe = {1e-2, 0.1, 1.0, 0.9, 0.95, 1e-8, 0.0}, wrong;
    sapper_trained trained;
    double loss = 0, numbers[] = {-1.0, 1.0, 1e309, -1e309, 1e309 - 1e309};
    printf("%d", model_open(argv[1], 0, &model));
    printf(" %d\n", model_open(argv[argc - 1], 1, &model));
    if (!model) return 1;
    for (int place = 0; place < 7; place++)
        for (int number = 0; number < 5; number++) {
            wrong = recipe;
            memcpy((double *)&wrong + place, numbers + number, 8);
            printf("%d ", model_train(model, tokens, targets, &wrong, &trained));
        }
    printf("\n%d", (int)model_steps(model));
    tokens[COUNT - 1] = MODEL_VOCABULARY;
    printf(" %d", model_train(model, tokens, targets, &recipe, &trained));
    tokens[COUNT - 1] = -1;
    printf(" %d", model_evaluate(model, tokens, targets, &loss));
    tokens[COUNT - 1] = 0, targets[0] = MODEL_VOCABULARY;
    printf(" %d", model_evaluate(model, tokens, targets, &loss));
    for (int i = 0; i < COUNT; i++) targets[i] = -1;
    printf(" %d", model_train(model, tokens, targets, &recipe, &trained));
    targets[3] = 5;
    printf(" %d", model_train(model, tokens, targets, &recipe, 0));
    printf(" %d", model_evaluate(model, tokens, targets, &loss));
    printf(" %d %d\n", model_save(model, "/nowhere/saved"), model_save_state(model, "/nowhere/saved"));
    printf("%.17g\n", loss);
    model_close(model);
    model_close(0);
    return 0;
}
"""


def user_of(code: Path, library: Path) -> Path:
    """The program above, with a library or an object file."""
    source, program = code.with_suffix(".c"), code.with_suffix(".user")
    source.write_text(USER)
    subprocess.run(["gcc", "-std=c99", "-Wall", "-Wno-overflow", "-Werror", "-I", str(library.parent), str(source),
                    str(code), "-o", str(program), f"-Wl,-rpath,{code.parent}"], check=True)
    return program


@NEEDS_GCC
def test_what_a_c_program_may_do_wrong(library: Path, tmp_path: Path) -> None:
    """With the library, and with what GNU's assembler makes of the text."""
    weights = library.parent / "model" / "model.safetensors"
    program = user_of(library, library)
    lines = run(program, str(weights))[1].decode().splitlines()
    of_betas, of_others = "12 12 12 12 12 ", "12 0 12 12 12 "
    assert lines[:3] == ["6 0", of_others * 3 + of_betas * 2 + of_others + of_betas, "4 8 8 8 8 0 0 13 13"]
    assert float(lines[3]) > 0
    assembled = tmp_path / "assembled.o"
    subprocess.run(["as", str(library.with_suffix(".s")), "-o", str(assembled)], check=True)
    assert run(user_of(assembled, library), str(weights))[1].decode().splitlines() == lines
    broken = tmp_path / "broken"
    for change, status in DAMAGE:
        broken.write_bytes(change(weights.read_bytes()))
        assert run(program, str(broken))[1].decode() == f"6 {status}\n"


def test_the_text_says_what_is_where(library: Path) -> None:
    content = library.with_suffix(".s").read_text()
    for part in ("# model: a language model in training as one assembly file.", "# ---- train, layer 1, backwards",
                 "# ---- train, AdamW", "# ---- evaluate, loss", "model.constants:", "model_train:",
                 "matrices of weights", "vectors of squares"):
        assert part in content, part


def test_a_file_that_can_not_be_written(library: Path, tmp_path: Path) -> None:
    """What was there before stays, and nothing else does."""
    weights = library.parent / "model" / "model.safetensors"
    batches = drawn(272, 1, seed=2)
    program = caller(library, target(library.with_suffix(".target").read_text()), batches)
    saved = tmp_path / "saved"
    saved.write_bytes(b"before")
    command = f"exec {program} {library} {weights} {saved} {tmp_path}/state"
    assert run(Path(shutil.which("bash") or ""), "-c", f"ulimit -f 100; trap '' XFSZ; {command}")[0] == 113
    assert saved.read_bytes() == b"before" and [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert called(program, library, weights, tmp_path / ("x" * 300), tmp_path / "state")[0] == 113
    (tmp_path / "directory").mkdir()
    assert called(program, library, weights, tmp_path / "directory", tmp_path / "state")[0] == 113
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "saved"]


@pytest.mark.parametrize("family", FAMILIES)
def test_functions_have_a_meaning_on_other_families(family: str, made: tuple[Path, Plan[Training]]) -> None:
    """Each is machine code there, also where no emulator runs it."""
    facts = target(FAMILIES[family].target)
    for function, _ in training_functions(made[1], 0):
        assert encoded(translated(function.machine, facts), facts).code_bytes > 0, function.machine.name


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family: str, tmp_path: Path) -> None:
    """Near what this processor computes: sums have another order."""
    found = FAMILIES[family]
    if shutil.which(found.emulator[0]) is None:
        pytest.skip(f"{found.emulator[0]} is not installed")
    library, weights = tmp_path / "model.so", tmp_path / "model" / "model.safetensors"
    build(DATA / "llama", library, found.target)
    training = start(open_checkpoint(DATA / "llama"), SEQUENCES, LENGTH, threads=THREADS)
    batches = drawn(training.vocabulary, 2 * STEPS, seed=1)
    saved, state = tmp_path / "saved", tmp_path / "state"
    for done in (0, STEPS):
        some = batches[done : done + STEPS]
        status, rows = called(caller(library, target(found.target), some), library, saved if done else weights, saved,
                              state, *([state] if done else []), emulator=found.emulator)
        assert status == done + STEPS
        np.testing.assert_allclose(rows, trained(training, some, done), rtol=2e-4)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", str(DATA / "llama"), "--training", "--length", "8", "-o", str(tmp_path / "learner.so")]
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["sequences"], facts["length"], facts["train_launches"] > facts["evaluate_launches"]) == (1, 8, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["learner", "learner.h", "learner.so"]
    assert "int learner_train(" in (tmp_path / "learner.h").read_text()
    assert main(arguments) == 1
    assert "learner: found something that is there" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (["llama", "--training", "-o", "learner.exe"], "or none for an executable"),
    (["llama", "--training", "-o", "learner.so", "--context", "64"], "--context: found a model in training"),
    (["llama", "-o", "learner.so", "--length", "64"], "--length: found a model that answers"),
    (["llama", "--training", "-o", "learner.so", "--length", "5000"], "found 5000; expected 1 to 256"),
    (["llama", "--training", "-o", "learner.so", "--target", "sm_80"], "whose own assembler makes the code"),
    (["llama", "--training", "-o", "learner.so", "--header", "learner"], "the name of another file"),
])
def test_refusals(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["build", str(DATA / arguments[0]), *arguments[1:]]) in (1, 2)
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
