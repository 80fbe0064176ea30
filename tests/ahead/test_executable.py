"""A model as an executable: no Python in its process, the same tokens as a session, clear messages."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from sapper.cli.errors import UsageError
from sapper.models.errors import ModelError
from sapper.models.generate import Generation, generate, prompt_tokens
from sapper.models.llama.session import Session
from sapper.models.load import load_model
from tests.codegen.run_native import RUNNABLE
from tests.models.small import random_weights, write_gguf
from tests.weights import find_smollm2

from .built import build, run

pytestmark = pytest.mark.skipif(not RUNNABLE, reason="this CPU runs no kernels")
CONTEXT = 96
TRIMMING = "{% for m in messages %}<|start|>{{ m['role'] }}: {{ m['content'] | trim }}<|im_end|>{% endfor %}<|start|>"


def checkpoint(directory: Path, **strings: str) -> Path:
    named = {f"tokenizer.{key}": value for key, value in strings.items()}
    return write_gguf(directory / "small.gguf", random_weights(seed=3), strings=named)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the checkpoint, the executable)"""
    directory = tmp_path_factory.mktemp("small")
    path = checkpoint(directory)
    build(path, directory / "model")
    return path, directory / "model"


def expected(path: Path, prompt: str, tokens: int, raw: bool = False) -> bytes:
    """The bytes of what a session of the same context says."""
    model = load_model(path)
    session = Session(model, CONTEXT, threads=1)
    fed = prompt_tokens(model, prompt, raw)
    made = b""
    for _ in range(tokens):
        session.feed(fed)
        fed = [session.pick()]
        if fed[0] in model.tokenizer.stops:
            break
        made += model.tokenizer.token_bytes(fed[0])
        if session.position == session.context:
            break
    return made + b"\n"


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize(("prompt", "raw"), [("hello world", False), ("hello world", True), ("  it's 12\n", False)])
def test_it_says_what_a_session_says(small: tuple[Path, Path], threads: str, prompt: str, raw: bool) -> None:
    path, program = small
    options = ["--threads", threads, "--tokens", "20", *(["--raw"] if raw else []), "--"]
    status, said, told = run(program, *options, *prompt.split(" "))
    assert (status, said) == (0, expected(path, prompt, 20, raw))
    count = len(prompt_tokens(load_model(path), prompt, raw))
    assert told.startswith(f"{count} prompt tokens at ") and told.endswith(" tokens/s\n")
    assert run(program, *options, text=prompt.encode() + b"\n")[1] == said, "from standard input"


@pytest.mark.parametrize("settings", [
    {"temperature": 0.7}, {"temperature": 1.3, "top_k": 5, "seed": 7}, {"temperature": 2.0, "top_p": 0.85, "seed": 3},
    {"temperature": 0.95, "top_k": 128, "top_p": 0.9, "min_p": 0.015, "seed": 123456789012345678},
], ids=str)
def test_it_draws_what_a_session_draws(small: tuple[Path, Path], settings: dict[str, float]) -> None:
    path, program = small
    model = load_model(path)
    made = Generation(model, model.tokenizer.encode("hello world"), 30, threads=1, **settings)
    list(made)
    wanted = b"".join(map(model.tokenizer.token_bytes, made.tokens)) + b"\n"
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    for threads in ("1", "2"):
        status, said, _ = run(program, "--tokens", "30", "--raw", "--threads", threads, *options, "hello world")
        assert (status, said) == (0, wanted)
    assert said != run(program, "--tokens", "30", "--raw", "hello world")[1], "the likeliest"


def test_it_ends_where_the_context_does(small: tuple[Path, Path]) -> None:
    path, program = small
    status, said, told = run(program, "--raw", "--tokens", "5000", text=b"hello " * 20)
    assert status == 0 and said == expected(path, "hello " * 20, 5000, raw=True) and told.startswith("40 prompt tokens")


def test_a_template_may_trim(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, chat_template=TRIMMING)
    build(path, tmp_path / "model")
    for prompt in (" \n hello  world\t\n", "hello", "   ", ""):
        said = run(tmp_path / "model", "--tokens", "5", text=prompt.encode() + b"\n")
        assert said[:2] == (0, expected(path, prompt, 5)), repr(prompt)


def test_messages(small: tuple[Path, Path], tmp_path: Path) -> None:
    _, program = small
    usage = "model [--tokens N]"
    for arguments in (["--bogus"], ["-x", "hello"], ["--tokens"], ["--tokens", "0"], ["--tokens", "x"], ["--weights"],
                      ["--tokens", "1.5"], ["--seed", "-1"], ["--seed", "1" * 19], ["--temperature", "1.2.3"],
                      ["--temperature", "."], ["--temperature", "-1"], ["--top-p", "0." + "1" * 15], ["--min-p", ""],
                      ["hello", "--tokens", "5"], ["hello", "world", "--raw"]):
        status, said, told = run(program, *arguments)
        assert (status, said) == (2, b"") and told.startswith(usage), arguments
    assert run(program, "--tokens", "3", "--", "a", "--raw", "--")[0] == 0
    assert run(program, "--tokens", "3", "a", "-x", "--", "b")[0] == 0
    assert run(program, "--help")[:2] == (0, run(program, "--bogus")[2].encode())
    status, _, told = run(program, "--weights", "nowhere", "x")
    assert (status, told) == (1, "nowhere: the weights file can't be opened or mapped\n")
    content = program.with_suffix(".weights").read_bytes()
    for wrong, message in ((content[:-4096], "another size"), (content[:-1] + b"x", "digest")):
        (tmp_path / "w").write_bytes(wrong)
        status, said, told = run(program, "--weights", str(tmp_path / "w"), "hello")
        assert (status, said) == (1, b"") and told.startswith(f"{tmp_path}/w: ") and message in told
    for wrong in (["--temperature", "1000001"], ["--top-k", "129"], ["--top-p", "0"], ["--top-p", "1.001"],
                  ["--min-p", "1.001"]):
        assert run(program, *wrong, "hello") == (1, b"", "a setting of sampling is out of its range\n")
    assert run(program, "--threads", "300", "hello")[2] == "threads is not in 1 .. 256\n"
    for text in (b"hello" * 2000, b"0123456789" * 10):
        assert run(program, text=text) == (
            1, b"", "the prompt is too long; expected at most 96 tokens and 1536 bytes with the chat template\n")
    assert run(program, "--raw", text=b"\n") == (1, b"", "the prompt is empty; expected some text\n")
    if shutil.which("prlimit") is not None:  # room for the weights, not for the model's memory
        limited = ["prlimit", "--as=2000000", str(program), "x"]
        done = subprocess.run(limited, capture_output=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (1, b"the system gives no memory\n")
    with open("/dev/full", "wb") as full:
        done = subprocess.run([str(program), "hello"], stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (1, b"standard output can't be written\n")
        assert subprocess.run([str(program), "hello"], stdout=subprocess.DEVNULL, stderr=full, timeout=60,
                              check=False).returncode == 1


@pytest.mark.parametrize("threads", ["1", "2"])
def test_weights_that_are_cut_short_while_they_are_mapped(
    small: tuple[Path, Path], tmp_path: Path, threads: str
) -> None:
    """The prompt comes when they are mapped and cut: what reads them next says so, whichever worker it is."""
    program = tmp_path / "model"
    weights = tmp_path / "model.weights"
    shutil.copy(small[1], program)
    shutil.copy(small[1].with_suffix(".weights"), weights)
    process = subprocess.Popen([str(program), "--threads", threads, "--raw"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    doing = Path(f"/proc/{process.pid}/syscall")
    deadline = time.monotonic() + 20
    while not doing.read_text().startswith("0 0x0 "):  # read(2) of the prompt: the weights are mapped and checked
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.truncate(weights, 4096)
    _, told = process.communicate(b"hello world", timeout=20)
    assert (process.returncode, told) == (1, b"the weights file was cut short while it was used\n")


@pytest.mark.skipif(shutil.which("as") is None, reason="GNU as is not installed")
def test_it_is_static_and_what_as_and_ld_make_of_the_text(small: tuple[Path, Path], tmp_path: Path) -> None:
    path, program = small
    assert os.access(program, os.X_OK) and b"ld-linux" not in program.read_bytes()
    build(path, tmp_path / "model.s")
    subprocess.run(["as", "model.s", "-o", "model.o"], cwd=tmp_path, check=True)
    subprocess.run(["ld", "-static", "-e", "model_start", "model.o", "-o", "model"], cwd=tmp_path, check=True)
    assert run(tmp_path / "model", "--tokens", "9", "hello")[:2] == run(program, "--tokens", "9", "hello")[:2]


def test_the_end_of_a_version_is_no_ending(small: tuple[Path, Path], tmp_path: Path) -> None:
    path, program = small
    build(path, tmp_path / "model-1.2")
    assert sorted(file.name for file in tmp_path.glob("model*")) == ["model-1.2", "model-1.2.h", "model-1.2.weights"]
    assert run(tmp_path / "model-1.2", "--tokens", "9", "hello")[:2] == run(program, "--tokens", "9", "hello")[:2]


def test_what_cannot_be_an_executable(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="or none for an executable"):
        build(tmp_path, tmp_path / "model.exe")
    path = checkpoint(tmp_path, chat_template="{{ messages[0]['content'] | upper }}")
    with pytest.raises(ModelError, match="a message changed"):
        build(path, tmp_path / "model")
    assert not (tmp_path / "model").exists() and not (tmp_path / "model.weights").exists()


def test_smollm2(tmp_path: Path) -> None:
    """As a session that quantises its prompt however long it is: a program ahead of time has one way for all."""
    path = find_smollm2()
    build(path, tmp_path / "model", context=256)
    prompt = "What is the capital of France?"
    status, said, _ = run(tmp_path / "model", "--tokens", "24", prompt)
    session = load_model(path).session(256)
    session._work.chooses = False
    assert (status, said.decode()) == (0, "".join(generate(session.model, prompt, 24, session=session)) + "\n")
