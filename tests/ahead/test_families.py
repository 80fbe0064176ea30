"""Models for other families of processors: as whole programs of Linux, where qemu-user is installed, they say what they
say on this processor; where it is not, what can be seen from outside."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from sapper.ahead.digest import digest
from sapper.ahead.library import make_model_library, plan_model, weights_pieces
from sapper.cli.errors import UsageError
from sapper.models.load import load_model
from sapper.models.whole import load_whole
from sapper.targets import module_of, target
from tests.codegen.run_native import RUNNABLE
from tests.models.small import VOCABULARY, random_weights, write_gguf

from .built import build, program_of, run, symbols

pytestmark = pytest.mark.skipif(not RUNNABLE, reason="this CPU runs no kernels")
STEPS, THREADS = 4, 2
PROMPT = [int(t) for t in np.random.default_rng(5).integers(0, VOCABULARY, 21)]


class Family(NamedTuple):
    """emulator: the command that runs programs on a processor that has just what the target has."""

    target: str
    emulator: tuple[str, ...]
    tools: str
    lacking: tuple[str, ...]


FAMILIES = {
    "aarch64": Family("neoverse-n1", ("qemu-aarch64", "-cpu", "neoverse-n1"), "aarch64-linux-gnu-",
                      ("qemu-aarch64", "-cpu", "cortex-a57")),
    "riscv64": Family("rva23u64", ("qemu-riscv64", "-cpu", "max,vlen=128"), "riscv64-linux-gnu-",
                      ("qemu-riscv64", "-cpu", "max,vlen=256")),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def emulated(family: Family) -> tuple[str, ...]:
    if shutil.which(family.emulator[0]) is None:
        pytest.skip(f"{family.emulator[0]} is not installed")
    return family.emulator


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("small") / "small.gguf", random_weights(seed=3))


@pytest.fixture(scope="module")
def own(checkpoint: Path) -> Path:
    """The executable of this processor."""
    build(checkpoint, checkpoint.with_name("model"))
    return checkpoint.with_name("model")


@pytest.fixture(scope="module")
def made(family: Family, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The executable of the family; its weights, text, object, library and header beside it."""
    path, facts = tmp_path_factory.mktemp(family.target) / "model", target(family.target)
    plan = plan_model(load_whole(str(checkpoint), "model", words=True, target=facts), facts)
    weights = b"".join(weights_pieces(plan))
    library = make_model_library(plan, digest(weights))
    for ending, content in ((".weights", weights), (".s", library.s().encode()), (".o", library.o()),
                            (".so", library.so("model.so")), (".h", library.h().encode()), ("", library.executable())):
        path.with_suffix(ending).write_bytes(content)
    path.chmod(0o755)
    return path


def run_on(emulator: tuple[str, ...], program: Path, *arguments: str,
           text: bytes | None = None) -> tuple[int, bytes, str]:
    return run(Path(emulator[0]), *emulator[1:], str(program), *arguments, text=text)


@pytest.mark.parametrize("options", [
    ("--threads", "1", "hello world"), ("--threads", "2", "it's 12"), ("--threads", "3", "--raw", " hello"),
    ("--threads", "2", "--temperature", "1.3", "--top-k", "5", "--seed", "123456789012345678", "hello"),
    ("--temperature", "0.95", "--top-k", "128", "--top-p", "0.9", "--min-p", "0.015", "--raw", "hello world"),
], ids=" ".join)
def test_it_says_what_it_says_here(made: Path, own: Path, emulated: tuple[str, ...], options: tuple[str, ...]) -> None:
    status, said, told = run_on(emulated, made, "--tokens", "20", *options)
    assert (status, said) == run(own, "--tokens", "20", *options)[:2], told
    assert told.endswith(" tokens/s\n")
    *others, prompt = ("--tokens", "20", *options)
    assert run_on(emulated, made, *others, text=prompt.encode() + b"\n")[:2] == (status, said), "standard input"


@pytest.mark.sampled(20)
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "deepseek_v32", "qwen2", "qwen3",
                                  "qwen3_moe"])
@pytest.mark.parametrize("other", ["neoverse-n1", "neoverse-v2", "armv8.1-a", "rva23u64", "spacemit-x60"])
def test_other_architectures(name: str, other: str, tmp_path: Path) -> None:
    """Experts and a latent cache, on all targets."""
    facts = target(other)
    kind = f"max,vlen={facts.vector_bits}" if facts.vector_state else "max"
    emulator = (*FAMILIES[facts.family].emulator[:2], kind)
    if shutil.which(emulator[0]) is None:
        pytest.skip(f"{emulator[0]} is not installed")
    said = []
    for directory, wanted in ((tmp_path / "own", None), (tmp_path / "other", other)):
        directory.mkdir()
        build(Path(__file__).parents[1] / "models" / "data" / name, directory / "model", target_name=wanted, context=64)
        options = ("--raw", "--threads", "2", "--tokens", "20", "hello world it's")
        program = directory / "model"
        said.append(run_on(emulator, program, *options) if wanted else run(program, *options))
    assert said[0][:2] == said[1][:2], said


def test_a_family_that_says_nothing_of_its_system(checkpoint: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sapper.cli.build_model.has_module", lambda family, name: False)
    with pytest.raises(UsageError, match="says nothing of its system"):
        build(checkpoint, tmp_path / "model", target_name="rva23u64")


def test_messages(made: Path, own: Path, emulated: tuple[str, ...], family: Family, tmp_path: Path) -> None:
    shutil.copy(made.with_suffix(".weights"), tmp_path / "cut")
    with (tmp_path / "cut").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    for arguments in (["--bogus"], ["--help"], ["--tokens", "0"], ["--threads", "300", "x"], ["--top-p", "0", "x"],
                      ["--weights", "nowhere", "x"], ["--weights", str(tmp_path / "cut"), "x"], ["--raw", ""],
                      ["hello" * 2000]):
        assert run_on(emulated, made, *arguments) == run(own, *arguments), arguments
    assert run_on(family.lacking, made, "x") == (1, b"", "the processor lacks what the code was made for\n")


def test_the_text_is_the_code(made: Path, family: Family, tmp_path: Path) -> None:
    """GNU's assembler and linker make the same of it."""
    if shutil.which(f"{family.tools}as") is None:
        pytest.skip(f"{family.tools}as is not installed")

    def tool(name: str, *arguments: str) -> None:
        subprocess.run([family.tools + name, *arguments], cwd=tmp_path, check=True)

    tool("as", str(made.with_suffix(".s")), "-o", "model.o")
    shutil.copy(made.with_suffix(".o"), tmp_path / "own.o")
    texts = []
    for name in ("model", "own"):
        tool("ld", "-static", "-e", "model_start", f"{name}.o", "-o", name)
        tool("objcopy", "-O", "binary", "-j", ".text", name, f"{name}.text")
        texts.append((tmp_path / f"{name}.text").read_bytes())
    theirs, ours = texts
    assert theirs[:len(ours)] == ours and len(theirs) - len(ours) < 64      # an assembler may pad the end
    if shutil.which(family.emulator[0]) is not None:
        for name in ("model", "own"):
            said = run_on(family.emulator, tmp_path / name, "--weights", str(made.with_suffix(".weights")),
                          "--tokens", "5", "hello")
            assert said[:2] == run_on(family.emulator, made, "--tokens", "5", "hello")[:2]


CALLER = """
    # caller LIBRARY WEIGHTS: maps the library, which needs no other address than the one where it lies, and calls it
    # rbx: model; r12: steps left; r13: where the library lies
{opened}    mov rdi, rbx
    lea rsi, @tokens
    mov edx, @count
    lea rax, [r13 + @prefill]
    call rax
    mov r12d, @steps
told:
    test eax, eax
    jne failed
    mov rdi, rbx
    lea rax, [r13 + @logits]
    call rax
    mov edi, 1
    mov rsi, rax
    mov edx, @logits_bytes
    mov eax, 1
    syscall
    sub r12, 1
    jb done
    mov rdi, rbx
    lea rax, [r13 + @likeliest]
    call rax
    mov esi, eax
    mov rdi, rbx
    lea rax, [r13 + @step]
    call rax
    jmp told
done:
    mov rdi, rbx
    lea rax, [r13 + @position]
    call rax
    mov r12, rax
    mov rdi, rbx
    lea rax, [r13 + @close]
    call rax
    mov rdi, r12                    # tokens that were run are the status
    mov eax, 231
    syscall
    ud2
failed:
    mov edi, 255
    mov eax, 231
    syscall
    ud2
"""


def caller(library: bytes, facts: Any) -> bytes:
    """The program above, made of the same rows as the model's own code."""
    numbers = {"threads": THREADS, "count": len(PROMPT), "steps": STEPS, "logits_bytes": 4 * VOCABULARY}
    return program_of(CALLER, library, facts, numbers, {"tokens": np.array(PROMPT, np.int32).tobytes()})


def test_a_program_calls_the_library(made: Path, checkpoint: Path, emulated: tuple[str, ...], family: Family) -> None:
    """By the family's C ABI, in another program; logits are near those of a session here."""
    library = made.with_suffix(".so")
    program = made.with_name("caller")
    program.write_bytes(caller(library.read_bytes(), target(family.target)))
    program.chmod(0o755)
    status, said, told = run_on(emulated, program, str(library), str(made.with_suffix(".weights")))
    assert status == len(PROMPT) + STEPS, told
    logits = np.frombuffer(said, np.float32).reshape(STEPS + 1, VOCABULARY)
    session = load_model(checkpoint).session(threads=1)
    fed = PROMPT
    for row in logits:
        session.feed(fed)
        np.testing.assert_allclose(row, session.logits, rtol=0, atol=3e-3)      # sums have another order
        fed = [int(row.argmax())]


def test_files_are_of_the_family(made: Path, family: Family, checkpoint: Path, tmp_path: Path) -> None:
    """Without an emulator, too."""
    system = module_of(target(family.target).family, "system").SYSTEM
    for name, kind in (("model", 2), ("model.so", 3), ("model.o", 1)):
        content = made.with_name(name).read_bytes()
        found = struct.unpack_from("<4sBBBBQHHIQQQIHHHHHH", content)
        assert found[:2] == (b"\x7fELF", 2) and found[6:8] == (kind, system.machine) and found[12] == system.flags
        for place in range(found[10], found[10] + 56 * found[15], 56):
            what, flags, offset, address, _, _, _, align = struct.unpack_from("<IIQQQQQQ", content, place)
            assert flags & 3 != 3, "writable and executable"
            assert what != 1 or (align == system.page_bytes and offset % align == address % align)
    assert set(symbols(made.with_suffix(".so").read_bytes())) >= {"model_open", "model_prefill", "model_close"}
    header = made.with_suffix(".h").read_text()
    assert f"Linux on {system.name};" in header
    build(checkpoint, tmp_path / "model", target_name=family.target)
    for ending in ("", ".h", ".weights"):
        assert (tmp_path / f"model{ending}").read_bytes() == made.with_suffix(ending).read_bytes(), "same model"


def test_a_target_whose_assembler_makes_the_code(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="whose own assembler makes the code"):
        build(checkpoint, tmp_path / "model", target_name="sm_80")
