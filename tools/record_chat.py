"""Records a terminal session of `sapper chat`: what a user types and what is shown, as plain text on standard output.

    python tools/record_chat.py "smollm2 --dtype file-f32" "What is the capital of France?" "And of Italy?" /stats

README.md shows such a session. A line is typed when the prompt has come; control sequences of the line editor are left
out of the text.
"""

import os
import pty
import re
import select
import sys
import time

PROMPT = b"> "
CONTROL = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")
LIMIT_SECONDS = 60


def record(arguments: list[str], lines: list[str]) -> str:
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


def main() -> None:
    model, *lines = sys.argv[1:]
    print("$ sapper chat " + model)
    print(record(model.split(), lines), end="")


if __name__ == "__main__":
    main()
