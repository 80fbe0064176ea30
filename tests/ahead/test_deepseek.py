"""A DeepSeek as an executable: experts and latent attention with no Python in the process, the tokens of a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from sapper.models.load import load_model
from tests.codegen.run_native import RUNNABLE

from .built import build, run

pytestmark = pytest.mark.skipif(not RUNNABLE, reason="this CPU runs no kernels")
DATA = Path(__file__).parent.parent / "models" / "data"
CONTEXT, TOKENS, PROMPT = 192, 150, "hello world"


def expected(path: Path) -> bytes:
    """The bytes of what a session of the same context says, over more positions than one split has."""
    model = load_model(path)
    session = model.session(CONTEXT, threads=1)
    fed, made = model.tokenizer.encode(PROMPT), b""
    for _ in range(TOKENS):
        session.feed(fed)
        fed = [session.pick()]
        if fed[0] in model.tokenizer.stops:
            break
        made += model.tokenizer.token_bytes(fed[0])
    return made + b"\n"


@pytest.mark.parametrize("name", ["deepseek_v2_lite", "deepseek_v3", "deepseek_v32"])
def test_it_says_what_a_session_says(tmp_path: Path, name: str) -> None:
    path = DATA / name
    build(path, tmp_path / "model", context=CONTEXT)
    wanted = expected(path)
    assert len(wanted) > 20
    for threads in ("1", "2"):
        options = ["--threads", threads, "--tokens", str(TOKENS), "--raw", "--"]
        status, said, _ = run(tmp_path / "model", *options, PROMPT)
        assert (status, said) == (0, wanted)
