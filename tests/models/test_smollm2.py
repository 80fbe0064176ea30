"""SmolLM2-135M-Instruct, compiled: logits against the NumPy reference, tokens against those that llama.cpp gave."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sapper.models.generate import Generation, generate
from sapper.models.llama.model import LlamaModel, load_model
from tests.weights import find_smollm2

from .reference_llama import ReferenceLlama

pytest.importorskip("sapper.codegen.pipeline", reason="there is no compiler")
RECORDED = json.loads((Path(__file__).parent / "data" / "smollm2.json").read_text())
RUNS = [pytest.param(run, id=run["prompt"]) for run in RECORDED["runs"]]


@pytest.fixture(scope="module")
def path() -> Path:
    return find_smollm2()


@pytest.fixture(scope="module")
def model(path: Path) -> LlamaModel:
    return load_model(path, "f32")


@pytest.fixture(scope="module")
def blocks(path: Path) -> LlamaModel:
    """In the blocks of the file, activations in f32: with quantised ones near ties fall the other way."""
    return load_model(path, "file-f32")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("form", ["model", "blocks"])
@pytest.mark.parametrize("run", RUNS)
def test_greedy_tokens_are_those_of_llama_cpp(form: str, run: dict, request: pytest.FixtureRequest) -> None:
    """64 tokens: there with the weights of the file widened to f32, here so too, and in the blocks of the file."""
    model: LlamaModel = request.getfixturevalue(form)
    made = Generation(model, run["tokens"], len(run["greedy"]))
    list(made)
    wanted = run["greedy"]
    if made.stop == "end":  # The recorded run went on past the end.
        wanted = wanted[: next(i for i, token in enumerate(wanted) if token in model.tokenizer.stops)]
    assert made.tokens == wanted


def test_logits_match_the_reference(model: LlamaModel, path: Path) -> None:
    tokens = RECORDED["runs"][0]["tokens"] + RECORDED["runs"][0]["greedy"][:4]
    wanted = ReferenceLlama(path).logits(tokens)
    session = model.session(256, threads=2)
    session.feed(tokens[:-4])
    for i in range(len(tokens) - 5, len(tokens) - 1):
        np.testing.assert_allclose(session.logits, wanted[i], rtol=1e-3, atol=2e-3)
        session.feed(tokens[i + 1 : i + 2])
    np.testing.assert_allclose(session.logits, wanted[-1], rtol=1e-3, atol=2e-3)


def test_quantised_activations_change_little(blocks: LlamaModel, path: Path) -> None:
    """Over a text, the loss of quantised activations is that of exact ones but for a percent, and logits are off by
    far less than they vary: errors of 0.4 % of a block's largest activation, in 30 layers of seven products."""
    tokens = [token for run in RECORDED["runs"] for token in run["tokens"] + run["greedy"]][:200]
    losses, errors = [], []
    sessions = [load_model(path, "file").session(256), blocks.session(256)]
    for token, following in pairwise(tokens):
        for session in sessions:
            session.feed([token])
        pair = [session.logits.astype(np.float64) for session in sessions]
        losses.append([np.log(np.exp(logits - logits[following]).sum()) for logits in pair])
        errors.append(np.sqrt(np.mean((pair[0] - pair[1]) ** 2)) / pair[1].std())
    quantised, exact = np.mean(losses, axis=0)
    assert abs(quantised - exact) < 0.02 * exact
    assert np.mean(errors) < 0.08


def test_bf16_answers_a_question() -> None:
    loaded = load_model(find_smollm2(), "bf16")
    text = "".join(generate(loaded, "What is the capital of France?", 32))
    assert "Paris" in text
