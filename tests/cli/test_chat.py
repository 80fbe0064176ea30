"""`sapper chat` and `sapper perplexity`: commands, pipes, a terminal with Ctrl-C, mistakes."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sapper.cli.chat import run_chat
from sapper.cli.main import main
from tests.models import small


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("chat") / "small.gguf"
    return str(small.write_gguf(path, small.random_weights(), numbers={"llama.context_length": 2048}))


def talk(model: str, *lines: str, **options) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    given = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    status = run_chat(model, tokens=3, context=256, interpret=True, read=read, out=out, err=err, **options)
    return status, out.getvalue(), err.getvalue()


def test_answers_go_to_stdout_and_all_else_to_stderr(model: str) -> None:
    status, out, err = talk(model, "hello", "", "/stats", "hello", "/stats", "/help")
    assert status == 0 and out.endswith("\n")
    assert "context 256 tokens" in err and "of 36 prompt tokens were new" not in err
    assert err.count("prompt tokens were new") == 2 and "(stopped: length)" in err and "/reset" in err


def test_reset_forgets(model: str) -> None:
    once = talk(model, "hello")[1]
    assert talk(model, "hello", "/reset", "hello")[1] == once * 2
    assert talk(model, "hello", "/system x", "hello")[1] != once * 2


def test_a_line_goes_on_after_a_backslash(model: str) -> None:
    assert talk(model, "a\\", "b")[1] == talk(model, "a\nb")[1] != talk(model, "a", "b")[1]


def test_mistakes_are_told_and_the_program_goes_on(model: str) -> None:
    status, out, err = talk(model, "/foo", "x" * 600, "/stats", "hello")
    assert status == 0 and out.strip()
    assert "found no command /foo" in err and "error: the message: found" in err and "nothing was asked" in err


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": -1.0}, "sampling"), ({"top_p": 0.0}, "sampling"), ({"dtype": "f16"}, "dtype of the weights"),
])
def test_wrong_settings_are_refused(model: str, options: dict, message: str) -> None:
    status, _, err = talk(model, **options)
    assert status == 1 and message in err and err.startswith("error: ")


def test_a_model_that_is_not_there() -> None:
    assert talk("no/such/model")[0] == 1


def test_a_pipe_is_read_without_prompts(model: str) -> None:
    command = [sys.executable, "-m", "sapper", "chat", model, "-n", "2", "--context", "256"]
    environment = dict(os.environ, SAPPER_INTERPRET="1")
    done = subprocess.run(command, input="hello\n/quit\nhello\n", capture_output=True, text=True, env=environment,
                          timeout=100)
    assert done.returncode == 0 and "> " not in done.stdout and done.stdout.count("\n") >= 1
    assert "Traceback" not in done.stderr


READS = (["0", "0x0"], ["23", "0x1"], ["270", "0x1"])
"""read(2) of standard input, select(2) and pselect6(2) of it alone: what /proc/PID/syscall begins with."""


def test_ctrl_c_ends_an_answer_and_not_the_program(model: str) -> None:
    """In a terminal: an answer of many tokens is stopped, another is given, Ctrl-C at the prompt does nothing."""
    child, terminal = pty.fork()
    if child == 0:  # pragma: no cover
        os.environ["SAPPER_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "sapper", "chat", model, "--context", "2048"])
    seen = b""

    def until(text: bytes, start: int = 0) -> int:
        nonlocal seen
        limit = time.monotonic() + 30
        while text not in seen[start:]:
            assert select.select([terminal], [], [], limit - time.monotonic())[0], seen.decode()
            try:
                seen += os.read(terminal, 4096)
            except OSError:
                raise AssertionError(f"it ended: {seen.decode()}") from None
        return seen.index(text, start) + len(text)

    try:
        place = until(b"> ")
        os.write(terminal, b"hello\n")
        place = until(b"hello\r\n", place)
        while len(seen) == place:  # until the answer begins
            until(b"", place)
            seen += os.read(terminal, 1)
        os.kill(child, signal.SIGINT)
        place = until(b"(stopped)", place)
        place = until(b"> ", place)
        limit = time.monotonic() + 30  # before it waits for a key, the line editor would keep the signal until one
        while Path(f"/proc/{child}/syscall").read_text().split()[:2] not in READS:
            assert time.monotonic() < limit
            time.sleep(0.01)
        os.kill(child, signal.SIGINT)
        place = until(b"leaves)", place)
        until(b"> ", place)
        os.write(terminal, b"/quit\n")
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        child = 0
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(terminal)
    assert b"Traceback" not in seen


def test_perplexity_prints_a_figure_and_json(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAPPER_INTERPRET", "1")
    text = tmp_path / "text.txt"
    text.write_text("hello world, hello there. " * 4)
    assert main(["perplexity", model, str(text), "--context", "16"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("perplexity ") and "window 1 of " in shown.err
    assert main(["perplexity", model, str(text), "--context", "16", "--json"]) == 0
    shown = capsys.readouterr()
    facts = json.loads(shown.out)
    assert shown.err == "" and facts["perplexity"] > 1 and facts["windows"] * 7 == facts["tokens"]
    for arguments, message in (([str(tmp_path / "none")], "expected a text file"),
                               ([str(text), "--context", "4000"], "at least 8000, two windows")):
        assert main(["perplexity", model, *arguments]) == 1
        assert message in capsys.readouterr().err
    text.write_bytes(b"\xff\xfe")
    assert main(["perplexity", model, str(text)]) == 1
