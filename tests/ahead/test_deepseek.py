"""A DeepSeek as an executable: experts and latent attention with no Python in the process, the tokens of a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from sapper.models.deepseek.untrained_gguf import write_gguf
from sapper.models.errors import ModelError
from sapper.models.load import load_model
from tests.codegen.run_native import RUNNABLE
from tests.models.test_heads import config_of, in_formats

from .built import build, run

pytestmark = pytest.mark.skipif(not RUNNABLE, reason="this CPU runs no kernels")
DATA = Path(__file__).parent.parent / "models" / "data"
CONTEXT, TOKENS, PROMPT = 192, 150, "hello world"


def expected(path: Path, threads: int, tokens: int = TOKENS) -> bytes:
    """The bytes of what a session of the same context says, over more positions than one split has. Sums may depend on
    the number of threads, and near ties on those."""
    model = load_model(path)
    session = model.session(CONTEXT, threads=threads)
    fed, made = model.tokenizer.encode(PROMPT), b""
    for _ in range(tokens):
        session.feed(fed)
        fed = [session.pick()]
        if fed[0] in model.tokenizer.stops:
            break
        made += model.tokenizer.token_bytes(fed[0])
    return made + b"\n"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["deepseek_v2_lite", "deepseek_v3", "deepseek_v32"])
def test_it_says_what_a_session_says(tmp_path: Path, name: str) -> None:
    path = DATA / name
    build(path, tmp_path / "model", context=CONTEXT)
    for threads in (1, 2):
        wanted = expected(path, threads)
        assert len(wanted) > 20
        options = ["--threads", str(threads), "--tokens", str(TOKENS), "--raw", "--"]
        status, said, _ = run(tmp_path / "model", *options, PROMPT)
        assert (status, said) == (0, wanted)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("target", "tokens"), [(None, TOKENS), ("haswell", 24)])
def test_keys_and_values_in_blocks(tmp_path: Path, target: str | None, tokens: int) -> None:
    """A prompt widens them into memory of all layers, packed as the target's products read them. Another target rounds
    differently: near ties may turn later on."""
    path, config = tmp_path / "model.gguf", config_of()
    write_gguf(path, config)
    in_formats(path, {"attn_k_b": "Q5_0", "attn_v_b": "Q4_0", "attn_output": "Q8_0"}, config, together=False)
    build(path, tmp_path / "model", context=CONTEXT, target_name=target)
    for threads in (1, 2):
        options = ["--threads", str(threads), "--tokens", str(tokens), "--raw", "--"]
        status, said, _ = run(tmp_path / "model", *options, PROMPT)
        assert (status, said) == (0, expected(path, threads, tokens)) and len(said) > 10
    if target is not None:
        with pytest.raises(ModelError, match="expected a processor that multiplies pairs of bf16"):
            build(path, tmp_path / "rounded", context=CONTEXT, target_name=target, dtype="file-rounded")
