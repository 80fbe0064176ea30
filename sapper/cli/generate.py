"""`sapper generate`: a model answers a prompt.

In: the command's settings. Out: text on stdout as it comes, speeds on stderr; or one JSON object on stdout. Holds: the
function returns the exit status and raises nothing for a user's mistakes: 0 done, 1 refused, 130 where Ctrl-C ended an
answer that had begun.
"""

from __future__ import annotations

import json as json_text
import sys
import time
from typing import Any, TextIO

REFUSED, INTERRUPTED = 1, 130


def run_generate(
    model: str, prompt: str, tokens: int = 128, *, json: bool = False, threads: int | None = None, raw: bool = False,
    system: str | None = None, dtype: str = "file", adapter: str | None = None, interpret: bool = False,
    speculate: bool = False, profile: bool = False, out: TextIO | None = None, err: TextIO | None = None,
    **sampling: Any,
) -> int:
    """Generate text and print it.

    model: a GGUF file, a safetensors directory, or a name such as "smollm2". prompt: a user's message, or with raw the
    beginning of a text. tokens: at most so many. sampling: temperature, top_k, top_p, min_p, seed, stop, as Generation
    has them. json: print one object at the end: model, prompt, text, tokens, prompt_tokens, stop ("end", "stop",
    "length", "context", "interrupted"), load_s, prefill_tokens_per_s, decode_tokens_per_s. dtype: "file", "bf16" or
    "f32", how the weights are held. adapter: a directory with one, which is added to them. interpret: run under the
    reference interpreter. speculate: draft with the model's MTP head; the report then says how many drafts were right
    ("drafted", "accepted"). profile: also where the time of a step goes, kernel by kernel; in the object as a list
    "profile". out, err: where to print (None: stdout and stderr).
    """
    out, err = out or sys.stdout, err or sys.stderr
    try:
        from ..models.errors import ModelError
        from ..models.generate import Generation, prompt_tokens
        from ..models.load import load_model
    except ImportError as error:
        print(f"error: {error}; mend: pip install 'sapper[models]'", file=err)
        return REFUSED
    if raw and system is not None:
        print("error: --system: found --raw, which goes on with a text; expected one of them", file=err)
        return REFUSED
    status = 0
    generation: Generation | None = None
    pieces: list[str] = []
    started = time.perf_counter()
    load_seconds = 0.0
    try:
        loaded = load_model(model, dtype, speculate, adapter=adapter)
        load_seconds = time.perf_counter() - started
        generation = Generation(
            loaded, prompt_tokens(loaded, prompt, raw, system), tokens, threads=threads, interpret=interpret,
            speculate=speculate, **sampling,
        )
        for piece in generation:
            pieces.append(piece)
            if not json and piece:
                out.write(piece)
                out.flush()
    except ModelError as error:
        print(f"error: {error}", file=err)
        return REFUSED
    except KeyboardInterrupt:
        if generation is None:
            raise
        status = INTERRUPTED
    _report(generation, model, prompt, pieces, load_seconds, json, profile, out, err)
    return status


def _report(
    generation: Any, model: str, prompt: str, pieces: list[str], load_seconds: float, json: bool,
    profile: bool, out: TextIO, err: TextIO,
) -> None:
    launched = generation.session.profile() if profile else []
    drafted, accepted = (getattr(generation.session, name, 0) for name in ("drafted", "accepted"))
    if json:
        result = {
            "model": model,
            "prompt": prompt,
            "text": "".join(pieces),
            "tokens": generation.tokens,
            "prompt_tokens": generation.prompt_count,
            "stop": generation.stop or "interrupted",
            "load_s": round(load_seconds, 4),
            "prefill_tokens_per_s": round(generation.prefill_rate, 2),
            "decode_tokens_per_s": round(generation.decode_rate, 2),
            **({"drafted": drafted, "accepted": accepted} if drafted else {}),
            **({"profile": [one._asdict() for one in launched]} if profile else {}),
        }
        print(json_text.dumps(result), file=out, flush=True)
        return
    print(file=out, flush=True)
    print(
        f"{generation.prompt_count} prompt tokens at {generation.prefill_rate:.1f} tokens/s, "
        f"{made(generation)} "
        f"(stopped: {generation.stop or 'interrupted'}; loaded in {load_seconds:.1f} s)" + drafts(generation.session),
        file=err,
    )
    if profile:
        from ..runtime.profile import table

        print(f"\none token at position {generation.session.position}, median of several runs:\n{table(launched)}",
              end="", file=err)


def made(generation: Any) -> str:
    """How many tokens were made and how fast; of a single one, which comes of the prompt, nothing was timed."""
    count = len(generation.tokens)
    if count < 2:
        return "1 token" if count else "no tokens"
    return f"{count} tokens at {generation.decode_rate:.1f} tokens/s"


def drafts(session: Any) -> str:
    """How many drafts of a session were right, where it makes any."""
    drafted = getattr(session, "drafted", 0)
    return f"; {session.accepted} of {drafted} drafts right" if drafted else ""
