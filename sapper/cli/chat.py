"""`sapper chat`: a conversation with a model in the terminal.

In: the command's settings, lines of a user. Out: answers on stdout as they come; all else on stderr. Holds: once the
model is loaded Ctrl-C ends an answer, never the program; Ctrl-D or /quit do. The status is 0, or 1 after a refusal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from .generate import REFUSED, drafts
from .generate import made as made_text

HELP = """/help    this text
/reset   forget what was said
/system  TEXT: a system message; forgets what was said
/stats   what the last answer took
/quit    leave, as Ctrl-D does
Ctrl-C ends an answer. A line that ends in \\ goes on in the next one. All else is a message."""
PROMPT, MORE = "> ", "… "


def run_chat(
    model: str, *, system: str | None = None, tokens: int | None = None, context: int | None = None,
    threads: int | None = None, dtype: str = "file", adapter: str | None = None,
    interpret: bool = False, speculate: bool = False, read: Callable[[str], str] | None = None,
    out: TextIO | None = None, err: TextIO | None = None, **sampling: Any,
) -> int:
    """Talk with a model until the input ends; returns the exit status.

    tokens: of an answer, at most. context: of the conversation. sampling: temperature, top_k, top_p, min_p, seed, stop.
    speculate: draft with the model's MTP head. adapter: a directory with one, which is added to the weights.
    read: gives the user's next line for a prompt, and raises EOFError at the end (None: standard input).
    """
    out, err = out or sys.stdout, err or sys.stderr
    try:
        from ..models.conversation import Conversation
        from ..models.errors import ModelError
        from ..models.load import load_model
        from ..models.sampling import Sampling
    except ImportError as error:
        print(f"error: {error}; mend: pip install 'sapper[models]'", file=err)
        return REFUSED
    settings: dict[str, Any] = {"context": context, "threads": threads, "interpret": interpret, "speculate": speculate}
    try:
        Sampling(**{key: value for key, value in sampling.items() if key != "stop"}).check()
        started = time.perf_counter()
        loaded = load_model(model, dtype, speculate, adapter=adapter)
        conversation = Conversation(loaded, system, **settings)
    except ModelError as error:
        print(f"error: {error}", file=err)
        return REFUSED
    seconds, size = time.perf_counter() - started, conversation.session.context
    print(f"{loaded.path.name}, loaded in {seconds:.1f} s; context {size} tokens; /help says what there is", file=err)
    talk = _Talk(conversation, tokens, sampling, out, err)
    ask_line = read or _line_reader(out)
    while True:
        try:
            line = _message(ask_line)
            command, _, rest = line.partition(" ")
            if not line.strip():
                continue
            if command in ("/quit", "/exit"):
                return 0
            if command == "/system" and rest.strip():
                talk.conversation = Conversation(loaded, rest.strip(), **settings)
            elif not talk.obey(command):
                talk.answer(line)
        except EOFError:
            if sys.stdin.isatty() and read is None:
                print(file=err)
            return 0
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)", file=err)
        except ModelError as error:
            print(f"error: {error}", file=err)


class _Talk:
    """What the lines of a user do to a conversation."""

    def __init__(
        self, conversation: Any, limit: int | None, sampling: dict[str, Any], out: TextIO, err: TextIO
    ) -> None:
        self.conversation = conversation
        self._limit, self._sampling, self._out, self._err = limit, sampling, out, err
        self._last: Any = None

    def obey(self, command: str) -> bool:
        """Do what a command says; False for what is none. A line that begins with / and is no command is told."""
        if command == "/help":
            print(HELP, file=self._err)
        elif command == "/reset":
            self.conversation.reset()
            print("(forgotten)", file=self._err)
        elif command == "/stats":
            self._stats()
        elif command.startswith("/") and command[1:].isalpha():
            print(f"found no command {command}; expected /help, /reset, /system TEXT, /stats or /quit", file=self._err)
        else:
            return False
        return True

    def answer(self, message: str) -> None:
        conversation, out = self.conversation, self._out
        dropped = conversation.dropped
        answer = conversation.ask(message, self._limit, **self._sampling)
        if conversation.dropped > dropped:
            print("(the context is full: the oldest turns are forgotten)", file=self._err)
        made = self._last = answer.generation
        try:
            for piece in answer:
                out.write(piece)
                out.flush()
            print(file=out, flush=True)
        except KeyboardInterrupt:
            answer.close()
            print(" …", file=out, flush=True)
            print("(stopped)", file=self._err)
            return
        if made.stop in ("length", "context"):
            print(f"(stopped: {made.stop})", file=self._err)

    def _stats(self) -> None:
        made, conversation = self._last, self.conversation
        if made is None:
            print("(nothing was asked yet)", file=self._err)
            return
        print(f"{conversation.fed} of {made.prompt_count} prompt tokens were new, first token after "
              f"{made.prefill_seconds * 1e3:.0f} ms; {made_text(made)}; "
              f"{conversation.session.position} of {conversation.session.context} tokens of the context"
              + drafts(conversation.session), file=self._err)


def _message(read: Callable[[str], str]) -> str:
    """A user's next message: a line, and those that follow one which ends in a backslash."""
    line = read(PROMPT)
    while line.endswith("\\"):
        line = line[:-1] + "\n" + read(MORE)
    return line


def _line_reader(out: TextIO) -> Callable[[str], str]:
    """Lines of a terminal, with its line editor; of a pipe or a file without prompts."""
    if sys.stdin.isatty() and out.isatty():
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input uses it where it is loaded)
        return input

    def line(prompt: str) -> str:
        text = sys.stdin.readline()
        if not text:
            raise EOFError
        return text.rstrip("\n")

    return line
