"""A model as a library: a C program runs it and gets, bit for bit, the logits of a session."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sapper.cli.main import main
from sapper.models import session as sessions
from sapper.models.deepseek.session import Session as DeepseekSession
from sapper.models.load import load_model
from sapper.models.workspace import Workspace
from sapper.targets.x86_64.detect import host
from sapper.targets.x86_64.target import target
from tests.codegen.run_native import RUNNABLE
from tests.models.small import VOCABULARY, random_weights, write_gguf

from .built import NEEDS_GCC, build, call, compile_caller

pytestmark = [NEEDS_GCC, pytest.mark.skipif(not RUNNABLE, reason="this CPU runs no kernels")]
CHUNK, STEPS = 16, 6
PROMPT = [int(t) for t in np.random.default_rng(5).integers(0, VOCABULARY, 37)]


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions, "CHUNK", CHUNK)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gguf import GGMLQuantizationType

    weights = random_weights()
    formats = {name: GGMLQuantizationType.Q4_1 for name in weights if name.endswith(("ffn_down.weight", "attn_q.weight",
                                                                                     "attn_k.weight", "attn_v.weight"))}
    return write_gguf(tmp_path_factory.mktemp("checkpoint") / "small.gguf", weights, formats=formats)


@pytest.fixture(scope="module")
def library(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("library") / "model.so"
    build(checkpoint, path)
    compile_caller(path)
    return path


def expected(
    checkpoint: Path, tokens: list[int], steps: int, threads: int = 1, context: int | None = None,
) -> np.ndarray:
    """Token and logits of the prompt and of each greedy step, as words."""
    session = load_model(checkpoint).session(context, threads=threads)
    rows = []
    for step in range(steps + 1):
        session.feed(tokens if step == 0 else [int(rows[-1][0])])
        rows.append(np.concatenate([[np.int32(session.logits.argmax())], session.logits.view(np.int32)]))
    return np.concatenate(rows)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, CHUNK, CHUNK + 1, len(PROMPT)])
def test_a_c_program_gets_the_logits_of_a_session(
    checkpoint: Path, library: Path, threads: int, count: int,
) -> None:
    rows, told = call(library.with_name("caller"), library.with_suffix(".weights"), threads, STEPS, PROMPT[:count])
    assert told == ["open 0", f"prefill 0 position {count}", f"status 0 position {count + STEPS}", "rewind 10 0",
                    "tokens 8 8", "none 8"]
    # A row's sums are added in another order by how many rows a worker takes: the session takes as many workers.
    assert np.array_equal(rows, expected(checkpoint, PROMPT[:count], STEPS, threads))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "qwen2", "qwen3", "qwen3_moe"])
def test_other_architectures(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More variables, experts, a latent cache: nothing in sapper/ahead knows of them. How sums are split among workers
    may depend on their number, so it is the same on both sides; and few tokens attend naively, as a C program has one
    way for all prompts."""
    monkeypatch.setattr(DeepseekSession, "shortest_run", 1)
    directory = Path(__file__).parents[1] / "models" / "data" / name
    build(directory, tmp_path / "model.so", context=64)
    compile_caller(tmp_path / "model.so")
    vocabulary = json.loads((directory / "config.json").read_text())["vocab_size"]
    tokens = [int(t) for t in np.random.default_rng(1).integers(0, vocabulary, CHUNK + 5)]
    for threads in (1, 2):
        rows, told = call(tmp_path / "caller", tmp_path / "model.weights", threads, STEPS, tokens)
        assert told[2] == f"status 0 position {len(tokens) + STEPS}"
        assert np.array_equal(rows, expected(directory, tokens, STEPS, threads, context=64))


def test_what_does_not_fit_is_told(library: Path) -> None:
    caller, weights = library.with_name("caller"), library.with_suffix(".weights")
    assert call(caller, weights, 1, 0, [VOCABULARY])[1][1] == "prefill 8 position 0"
    assert call(caller, weights, 1, 0, [1] * 97)[1][1] == "prefill 9 position 0"
    assert call(caller, weights, 2, 3, [1] * 95)[1][2] == "status 9 position 96"
    for threads in (0, -1, 257):
        assert call(caller, weights, threads, 0, [1])[1] == ["open 6"]


def test_other_weights_are_refused(library: Path, tmp_path: Path) -> None:
    caller, content = library.with_name("caller"), library.with_suffix(".weights").read_bytes()
    wrong = tmp_path / "model.weights"
    assert call(caller, wrong, 1, 0, [1])[1] == ["open 1"]
    assert call(caller, tmp_path, 1, 0, [1])[1] == ["open 1"], "a directory"
    wrong.write_bytes(content[:-1])
    assert call(caller, wrong, 1, 0, [1])[1] == ["open 2"]
    for place in (0, len(content) // 2 + 3, len(content) - 1):
        wrong.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert call(caller, wrong, 1, 0, [1])[1] == ["open 3"]
    wrong.write_bytes(content)
    assert call(caller, wrong, 1, 0, [1])[1][0] == "open 0"


@pytest.mark.skipif(shutil.which("as") is None, reason="GNU as is not installed")
def test_the_assembly_file_is_the_library(checkpoint: Path, library: Path, tmp_path: Path) -> None:
    build(checkpoint, tmp_path / "model.s")
    (tmp_path / "own").mkdir()
    build(checkpoint, tmp_path / "own" / "model.o")
    text = (tmp_path / "model.s").read_text()
    assert (tmp_path / "model.weights").read_bytes() == library.with_suffix(".weights").read_bytes()
    subprocess.run(["as", "model.s", "-o", "model.o"], cwd=tmp_path, check=True)
    subprocess.run(["ld", "-shared", "model.o", "-o", "model.so"], cwd=tmp_path, check=True)
    for place in (tmp_path, tmp_path / "own"):
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", "model.o", "text"], cwd=place, check=True)
    assert (tmp_path / "text").read_bytes() == (tmp_path / "own" / "text").read_bytes()
    compile_caller(tmp_path / "model.so")
    rows, _ = call(tmp_path / "caller", tmp_path / "model.weights", 2, 2, PROMPT)
    assert np.array_equal(rows, expected(checkpoint, PROMPT, 2, 2))
    for part in ("# ---- step, layer 1: feed-forward", "matvec.py", "registers, a letter for each", "layer 1 keys",
                 ": layers 0 qkv parts 0"):
        assert part in text, f"the file says {part}"
    attention = "attention_rounded_f32" if Workspace(1).multiplies_bf16() else "attention_bf16"
    assert text.count(f"\nkernel.{attention}:") == 1


def test_code_for_another_processor_asks_first(checkpoint: Path, tmp_path: Path) -> None:
    """A build needs no CPU that could run it; one that can't says so before any instruction that would fault."""
    if not target("zen4").features - host().features:
        pytest.skip("this CPU has all that Zen 4 has")
    build(checkpoint, tmp_path / "model.so", target_name="zen4")
    assert call(compile_caller(tmp_path / "model.so"), tmp_path / "model.weights", 1, 0, [1])[1] == ["open 7"]


def test_same_model_same_bytes(
    checkpoint: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    """From the command line, too."""
    assert main(["build", str(checkpoint), "-o", str(tmp_path / "model.so"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["weights_bytes"] == (tmp_path / "model.weights").stat().st_size and made["context"] == 96
    assert main(["build", str(checkpoint), "-o", str(tmp_path / "other.so"), "--context", "7", "--dtype", "f32"]) == 0
    assert "MiB of state for 7 tokens" in capsys.readouterr().out
    assert main(["build", str(checkpoint), "-o", str(tmp_path / "model.dll")]) == 2
    assert "or none for an executable" in capsys.readouterr().err
    for ending in (".so", ".weights", ".h"):
        assert (tmp_path / f"model{ending}").read_bytes() == library.with_suffix(ending).read_bytes()
