"""Records a terminal session: what a user types and what is shown, as plain text on standard output.

    python tools/record_session.py chat "smollm2 --dtype file-f32" "What is the capital of France?" /stats
    python tools/record_session.py shell "sapper build smollm2 -o model.s" "as model.s -o model.o" "ls"
    python tools/record_session.py readme

README.md shows such sessions. `chat` types a line when the prompt has come, and leaves control sequences of the line
editor out of the text. `shell` runs commands one after the other in a directory that is removed afterwards, and ends
where one fails; `sapper` is the one of this checkout. `readme` records the sessions of README.md anew, with the
commands and lines that stand there, and puts them in their place.
"""

import os
import pty
import re
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT = b"> "
CONTROL = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")
LIMIT_SECONDS = 60
README = Path(__file__).parents[1] / "README.md"
SESSION = re.compile(r"(?m)^    \$ .*\n(?:    .*\n)+")
CHAT = "$ sapper chat "


def record_chat(arguments: list[str], lines: list[str]) -> str:
    """The session of `sapper chat ARGUMENTS` in which these lines are typed; then the input ends."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-m", "sapper.cli.main", "chat", *arguments])
    seen = b""
    for line in [*lines, "/quit"]:
        limit = time.monotonic() + LIMIT_SECONDS
        while not CONTROL.sub(b"", seen).endswith(b"\n" + PROMPT):
            ready, _, _ = select.select([terminal], [], [], limit - time.monotonic())
            if not ready:
                raise SystemExit(f"found no prompt after {LIMIT_SECONDS} s; there is:\n{seen.decode(errors='replace')}")
            seen += os.read(terminal, 4096)
        os.write(terminal, line.encode() + b"\n")
        while not CONTROL.sub(b"", seen).endswith(line.encode() + b"\r\n"):
            seen += os.read(terminal, 1)
    os.waitpid(child, 0)
    os.close(terminal)
    text = CONTROL.sub(b"", seen).decode().replace("\r\n", "\n")
    return text[: text.rindex("> /quit")]


def record_shell(commands: list[str]) -> str:
    """The commands, each with what it printed. Raises CalledProcessError where one fails."""
    text = ""
    with tempfile.TemporaryDirectory() as tools, tempfile.TemporaryDirectory() as place:
        own = Path(tools) / "sapper"
        checkout = Path(__file__).parents[1]
        own.write_text(f"#!/bin/sh\nPYTHONPATH={checkout} exec {sys.executable} -m sapper.cli.main \"$@\"\n")
        own.chmod(0o755)
        environment = dict(os.environ, PATH=f"{tools}:{os.environ['PATH']}")
        for command in commands:
            done = subprocess.run(command, shell=True, cwd=place, env=environment, check=True, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            text += f"$ {command}\n{done.stdout}"
    return text


def chat_session(model: str, lines: list[str]) -> str:
    """The session with its command."""
    return f"{CHAT}{model}\n{record_chat(model.split(), lines)}"


def recorded_anew(text: str) -> str:
    """The text of a README with each session in it, a block of lines that begins with a command, as it is now."""
    def session(found: re.Match[str]) -> str:
        lines = [line.removeprefix("    ") for line in found[0].splitlines()]
        if lines[0].startswith(CHAT):
            new = chat_session(lines[0].removeprefix(CHAT), [line[2:] for line in lines if line.startswith("> ")])
        else:
            new = record_shell([line[2:] for line in lines if line.startswith("$ ")])
        return "".join(f"    {line}".rstrip() + "\n" for line in new.splitlines())

    return SESSION.sub(session, text)


def main() -> None:
    match sys.argv[1:]:
        case ["shell", *commands]:
            print(record_shell(commands), end="")
        case ["readme"]:
            README.write_text(recorded_anew(README.read_text(encoding="utf-8")), encoding="utf-8")
        case ["chat", model, *lines]:
            print(chat_session(model, lines), end="")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
