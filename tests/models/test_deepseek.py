"""DeepSeek and Qwen2 on small random checkpoints: parity with what transformers computed (make_deepseek.py)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapper.kernels import mla
from sapper.models import session as sessions
from sapper.models.deepseek.model import load_model as load_deepseek
from sapper.models.generate import Generation
from sapper.models.load import Model, load_model
from sapper.models.rope import RopeScaling

DATA = Path(__file__).parent / "data"
NAMES = ("deepseek_v2_lite", "deepseek_v2", "deepseek_v3", "qwen2")
CONTEXT = 160


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> Model:
    return load_model(DATA / name, "f32")


@pytest.fixture(scope="module")
def recorded(name: str) -> dict[str, Any]:
    with np.load(DATA / f"{name}.npz") as file:
        return {"tokens": file["tokens"].tolist(), "logits": file["logits"], "logits_bf16": file["logits_bf16"],
                "greedy": file["greedy"].tolist()}


def assert_same(logits: np.ndarray, wanted: np.ndarray) -> None:
    assert np.abs(logits - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_decode_gives_the_logits_of_transformers(model: Model, recorded: dict[str, Any]) -> None:
    session = model.session(CONTEXT)
    for token, wanted in zip(recorded["tokens"], recorded["logits"], strict=True):
        session.feed([token])
        assert_same(session.logits, wanted)


@pytest.mark.parametrize("chunk", [512, 7])
def test_prefill_gives_the_logits_of_transformers(
    model: Model, recorded: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "CHUNK", chunk)
    session = model.session(CONTEXT)
    session.feed(recorded["tokens"])
    assert_same(session.logits, recorded["logits"][-1])


def test_one_token_between_chunks(model: Model, recorded: dict[str, Any]) -> None:
    """Naive and absorbed attention over one cache, and buffers that grow."""
    session = model.session(CONTEXT)
    tokens = recorded["tokens"]
    for part in (tokens[:2], tokens[2:3], tokens[3:12], tokens[12:13], tokens[13:]):
        session.feed(part)
        assert_same(session.logits, recorded["logits"][session.position - 1])


def test_greedy_tokens_are_those_of_transformers(model: Model, recorded: dict[str, Any]) -> None:
    """128 tokens: over more than one split of the positions."""
    made = Generation(model, recorded["tokens"], len(recorded["greedy"]))
    stops, model.tokenizer.stops = model.tokenizer.stops, frozenset()
    try:
        list(made)
    finally:
        model.tokenizer.stops = stops
    assert made.tokens == recorded["greedy"]
    assert len(recorded["tokens"]) + len(made.tokens) > 2 * mla.SPLIT


@pytest.mark.parametrize("cache", ["f32", "bf16"])
def test_bf16_is_within_its_rounding(name: str, recorded: dict[str, Any], cache: str) -> None:
    """The checkpoint's weights are numbers of bf16. Activations stay in f32 here, so the logits are nearer to those of
    f32 than a forward pass in bf16 throughout is, also where the cache is rounded."""
    session = load_model(DATA / name, "bf16").session(CONTEXT, cache_dtype=cache)
    session.feed(recorded["tokens"][:-1])
    session.feed(recorded["tokens"][-1:])
    wanted, theirs = recorded["logits"][-1], recorded["logits_bf16"][-1]
    cosine = session.logits @ wanted / np.linalg.norm(session.logits) / np.linalg.norm(wanted)
    assert cosine >= (0.9999 if cache == "f32" else 0.999)
    assert np.abs(session.logits - wanted).max() < np.abs(theirs - wanted).max()


def test_the_interpreter_agrees(model: Model, recorded: dict[str, Any]) -> None:
    session = model.session(CONTEXT, interpret=True)
    session.feed(recorded["tokens"][:5])
    assert_same(session.logits, recorded["logits"][4])
    session.feed(recorded["tokens"][5:6])
    assert_same(session.logits, recorded["logits"][5])


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads: int) -> None:
    with np.load(DATA / "deepseek_v3.npz") as file:
        tokens, logits = file["tokens"].tolist(), file["logits"]
    session = load_model(DATA / "deepseek_v3", "f32").session(CONTEXT, threads=threads)
    session.feed(tokens[:20])
    session.feed(tokens[20:21])
    assert_same(session.logits, logits[20])


def test_a_token_reads_the_experts_that_it_takes_and_no_others() -> None:
    """All others hold NaN after the gate has chosen, and no logit does."""
    model = load_deepseek(DATA / "deepseek_v3", "f32")
    session = model.session(CONTEXT)
    session.feed([5])
    wanted = session.logits.copy()
    taken = session._experts[0]
    last = model.weights.layers[-1].feed_forward
    others = np.setdiff1d(np.arange(len(last.gate.weights)), taken)
    assert len(others) == model.config.mixture.experts - model.config.mixture.chosen
    for matrices in (last.gate, last.up, last.down):
        matrices.weights[others] = np.nan
    session.position = 0
    session.feed([5])
    np.testing.assert_array_equal(session.logits, wanted)


def test_score_scales_are_those_of_the_published_models() -> None:
    """0.13523 for V3, 0.11472 for V2-Lite: (0.1 * mscale_all_dim * ln 40 + 1)**2 / sqrt(192)."""
    v3 = RopeScaling("yarn", 40.0, original_positions=4096, table_mscale=1.0, score_mscale=1.0)
    lite = RopeScaling("yarn", 40.0, original_positions=4096, table_mscale=0.707, score_mscale=0.707)
    assert v3.score_factor / 192**0.5 == pytest.approx(0.13523, abs=5e-6)
    assert lite.score_factor / 192**0.5 == pytest.approx(0.11472, abs=5e-6)
    assert v3.table_factor == lite.table_factor == 1.0


def test_yarn_keeps_fast_pairs_and_divides_slow_ones() -> None:
    """V3's: of 32 pairs those up to 10 turn 32 times or more in 4096 positions, those from 24 on once or less."""
    scaling = RopeScaling("yarn", 40.0, original_positions=4096)
    plain, found = RopeScaling().frequencies(10000.0, 32), scaling.frequencies(10000.0, 32)
    np.testing.assert_array_equal(found[:11], plain[:11])
    np.testing.assert_allclose(found[23:], plain[23:] / 40, rtol=1e-12)
    between = found[11:23] / plain[11:23]
    assert (np.diff(between) < 0).all() and between[0] < 1 and between[-1] > 1 / 40
    assert scaling.table_factor == pytest.approx(1.0 + 0.1 * np.log(40))
