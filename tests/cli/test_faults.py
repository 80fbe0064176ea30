"""Signals in every phase of the commands on models, and disks that are full: a line, a status, nothing half-written.

A phase is reached by the command itself, in this process; what stands there then sends the process the signal.
"""

from __future__ import annotations

import importlib
import io
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sapper.cli.main import main
from tests.ahead import test_plan
from tests.models import small

PHASES = {
    "load": "sapper.models.gguf_file.GgufFile.__init__",
    "pack": "sapper.models.weights.Loader.vector",
    "compile": "sapper.runtime.program.Launch.__init__",
    "prefill": "sapper.models.session.BaseSession._feed_several",
    "decode": "sapper.models.session.BaseSession._feed_one",
    "score": "sapper.models.session.BaseSession.losses",
    "prepare": "sapper.models.batch.Paged.prepare",
    "write weights": "sapper.ahead.digest.digest",
    "write code": "sapper.cli.build_model.content_of",
    "write groups": "sapper.models.quantize.quantized_rows",
    "write config": "sapper.models.written._write_config",
}
COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "generate": (["MODEL", "-p", "hello world", "--raw", "-n", "9"], ("load", "pack", "compile", "prefill", "decode")),
    "chat": (["MODEL", "-n", "3", "--context", "64"], ("load", "pack")),
    "serve": (["MODEL", "--port", "0"], ("load", "pack", "compile", "prepare")),
    "perplexity": (["MODEL", "TEXT", "-c", "16"], ("load", "pack", "compile", "score")),
    "build": (["MODEL", "-o", "OUT/model.so"], ("load", "pack", "compile", "write weights", "write code")),
    "quantize": (["MODEL", "-o", "OUT/int4"], ("load", "write config", "write groups")),
}
CASES = [(command, phase) for command, (_, phases) in COMMANDS.items() for phase in phases]
"""Of chat only what comes before its first line."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_gguf(tmp_path_factory.mktemp("faults") / "small.gguf", small.random_weights())


def arguments_of(command: str, model: Path, place: Path) -> list[str]:
    (place / "out").mkdir()
    (place / "text").write_text("hello world, hello there. " * 4)
    given = {"MODEL": str(model), "TEXT": str(place / "text")}
    return [command, *(given.get(one, one.replace("OUT", str(place / "out"))) for one in COMMANDS[command][0])]


def send_at(monkeypatch: pytest.MonkeyPatch, phase: str, number: signal.Signals) -> list[str]:
    """Where the phase begins the signal is sent, once. The list then has an element."""
    owner_name, _, name = PHASES[phase].rpartition(".")
    try:
        owner: Any = importlib.import_module(owner_name)
    except ModuleNotFoundError:
        module, _, kind = owner_name.rpartition(".")
        owner = getattr(importlib.import_module(module), kind)
    plain = getattr(owner, name)
    reached: list[str] = []

    def sending(*arguments: Any, **options: Any) -> Any:
        if not reached:
            reached.append(phase)
            os.kill(os.getpid(), number)
        return plain(*arguments, **options)

    monkeypatch.setattr(owner, name, sending)
    return reached


def use_tiny_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`build` compiles two kernels instead of a model's."""
    monkeypatch.setattr("sapper.models.whole.load_whole", lambda *_arguments, **_options: test_plan.model([], {}))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("command", "phase"), CASES, ids=lambda value: value)
def test_a_signal_in_any_phase(
    command: str, phase: str, number: signal.Signals, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if phase != "compile":
        monkeypatch.setenv("SAPPER_INTERPRET", "1")
    if phase.startswith("write"):
        use_tiny_programs(monkeypatch)
    before = signal.getsignal(number)
    reached = send_at(monkeypatch, phase, number)
    status = main(arguments_of(command, model, tmp_path))
    told = capsys.readouterr().err
    assert reached == [phase] and status == 128 + number, told
    assert told.strip().splitlines()[-1] in ("interrupted", "terminated") or "(stopped: interrupted" in told
    assert "Traceback" not in told and not list((tmp_path / "out").iterdir())
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_signal_while_a_chat_answers(
    phase: str, number: signal.Signals, status: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C ends the answer, and the next line gets one; SIGTERM ends the command."""
    monkeypatch.setenv("SAPPER_INTERPRET", "1")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nhello\n"))
    reached = send_at(monkeypatch, phase, number)
    assert main(arguments_of("chat", model, tmp_path)) == status
    said, told = capsys.readouterr()
    assert reached and "Traceback" not in told
    if status:
        assert told.endswith("terminated\n")
    else:
        assert said.count("\n") >= 2 and told.count("(stopped)") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_files_take_their_places_all_or_none(
    number: signal.Signals, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal between two of the renames waits for the last one."""
    use_tiny_programs(monkeypatch)
    plain = os.replace
    renamed: list[str] = []

    def sending(source: str, target: Path) -> None:
        renamed.append(target.name)
        os.kill(os.getpid(), number)
        plain(source, target)

    monkeypatch.setattr("sapper.cli.files.os.replace", sending)
    assert main(arguments_of("build", model, tmp_path)) == 128 + number
    assert sorted(renamed) == ["model.h", "model.so", "model.weights"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(renamed)


@pytest.mark.parametrize(("command", "room"), [("build", 512), ("build", 4096), ("quantize", 4096)])
def test_no_room_for_files(
    command: str, room: int, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The system refuses what goes beyond `room` bytes of a file; Python leaves SIGXFSZ ignored."""
    use_tiny_programs(monkeypatch)
    arguments = arguments_of(command, model, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        status = main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = capsys.readouterr().err
    assert status == 1 and "error: " in told and "File too large" in told and "expected" in told, told
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("command", ["generate", "perplexity"])
def test_no_room_for_what_is_said(command: str, model: Path, tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = run(arguments_of(command, model, tmp_path), full)
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[-1] == (
        "error: standard output: found No space left on device; expected room for what is written")


@pytest.mark.parametrize(("closed", "status", "told"), [
    (0, 0, ""), (1, 1, "error: standard output: found it closed; expected a file or a terminal\n"), (2, 0, "")])
def test_standard_files_may_be_closed(closed: int, status: int, told: str) -> None:
    """As services are started that need none: no traceback, and no file that is opened gets the number."""
    command = [sys.executable, "-m", "sapper", "--version"]
    done = subprocess.run(command, capture_output=True, preexec_fn=lambda: os.close(closed), text=True, check=False)
    assert (done.returncode, done.stderr) == (status, told)
    assert done.stdout == ("" if closed == 1 else "sapper 0.1.0\n")


@pytest.mark.parametrize(("said", "found"), [("", "no memory for what was asked"), ("a GiB", "a GiB")])
def test_no_memory_is_told(
    said: str, found: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_arguments: list[str]) -> int:
        raise MemoryError(said)

    monkeypatch.setattr("sapper.cli.app.run", refuse)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err.startswith(f"error: found {found}; expected memory from the system; mend: ")


def test_a_reader_that_went_away_is_no_error(model: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = run(arguments_of("generate", model, tmp_path), closed)
    assert (done.returncode, done.stderr) == (141, b"")


def run(arguments: list[str], out: Any) -> subprocess.CompletedProcess[bytes]:
    environment = dict(os.environ, SAPPER_INTERPRET="1")
    return subprocess.run([sys.executable, "-m", "sapper", *arguments], stdout=out, stderr=subprocess.PIPE,
                          env=environment, timeout=60, check=False)


def test_what_sapper_warns_of_is_a_line(model: Path, tmp_path: Path) -> None:
    """Without the place in its source that Python shows with a warning."""
    (tmp_path / "file").write_text("no directory")
    command = [sys.executable, "-m", "sapper", "generate", str(model), "-p", "hello", "--raw", "-n", "2"]
    made = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "SAPPER_CACHE_DIR": str(tmp_path / "file")}, check=False)
    assert made.returncode == 0, made.stderr
    told = [line for line in made.stderr.splitlines() if "compile cache" in line]
    assert told and all(line.startswith("warning: can't ") for line in told)
    assert "_give_up" not in made.stderr


def test_a_report_whose_reader_went_away_ends_as_other_commands_do() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = run(["explain", "softmax", "--target", "v3", "--no-run"], closed)
    assert done.returncode == 128 + signal.SIGPIPE and done.stderr == b""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_the_terminal_cannot_spell_is_left_out(encoding: str) -> None:
    done = subprocess.run([sys.executable, "-m", "sapper", "explain", "softmax", "--target", "v3", "--no-run"],
                          capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "bound by" in done.stdout.decode(encoding) and "???" in done.stdout.decode(encoding)
