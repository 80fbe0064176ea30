"""The forward pass on small random models: parity with the NumPy reference, however the tokens are fed."""

from dataclasses import replace
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

from sapper.models import session as sessions
from sapper.models.errors import ModelError
from sapper.models.generate import Generation, generate, prompt_tokens
from sapper.models.llama.model import LlamaModel, load_model
from sapper.models.llama.session import Session

from . import small
from .reference_llama import ReferenceLlama

DATA = Path(__file__).parent / "data"
TOKENS = [5, 17, 200, 3, 3, 99, 256, 31, 64, 7, 8]


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_gguf(tmp_path_factory.mktemp("small") / "small.gguf", small.random_weights())


@pytest.fixture(scope="module")
def model(gguf_path: Path) -> LlamaModel:
    return load_model(gguf_path, "f32")


@pytest.fixture(scope="module")
def expected(gguf_path: Path) -> np.ndarray:
    """Logits after each of TOKENS."""
    return ReferenceLlama(gguf_path).logits(TOKENS)


def session_of(model: LlamaModel, **options) -> Session:
    return model.session(32, interpret=True, **options)


def test_prefill_and_decode_match_the_reference(model: LlamaModel, expected: np.ndarray) -> None:
    session = session_of(model)
    session.feed(TOKENS[:7])
    np.testing.assert_allclose(session.logits, expected[6], rtol=1e-4, atol=1e-4)
    for i in range(7, len(TOKENS)):
        session.feed(TOKENS[i : i + 1])
        np.testing.assert_allclose(session.logits, expected[i], rtol=1e-4, atol=1e-4)
    assert session.position == len(TOKENS)


def test_few_tokens_have_a_program_of_their_own(
    model: LlamaModel, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where many are rounded: they are quantised then."""
    monkeypatch.setattr(Session, "few_tokens", lambda self: 4)
    session = session_of(model)
    session.feed(TOKENS[:3])
    session.feed(TOKENS[3:10])
    np.testing.assert_allclose(session.logits, expected[9], rtol=1e-4, atol=1e-4)
    assert sorted(session._prefills) == [4, session.chunk]
    session.rewind(3)
    session.feed(TOKENS[3:7])
    np.testing.assert_allclose(session.logits, expected[6], rtol=1e-4, atol=1e-4)
    assert len(session._prefills) == 2


def test_norms_of_heads_take_no_launch_of_their_own() -> None:
    """Of a Qwen3: they are in the kernel that turns the heads and fills the cache, of one token and of many."""
    names = {}
    for kind in ("qwen2", "qwen3"):
        session = load_model(DATA / kind, "f32").session(32)
        for part, sections in (("step", session.step_sections()), ("prefill", session.prefill_sections())):
            names[kind, part] = [kernel.name for _, steps in sections for kernel, _ in steps
                                 if kernel.name != "add_bias_in_place"]
    for part in ("step", "prefill"):
        assert "norm_rotate_and_cache_f32" in names["qwen3", part]
        assert [name.removeprefix("norm_rot") for name in names["qwen3", part]] == [
            name.removeprefix("rot") for name in names["qwen2", part]]


def test_one_by_one_is_the_same(model: LlamaModel, expected: np.ndarray) -> None:
    session = session_of(model)
    for i, token in enumerate(TOKENS[:4]):
        session.feed([token])
        np.testing.assert_allclose(session.logits, expected[i], rtol=1e-4, atol=1e-4)


def test_chunks_are_the_same(model: LlamaModel, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "CHUNK", 4)
    session = session_of(model)
    session.feed(TOKENS)
    np.testing.assert_allclose(session.logits, expected[-1], rtol=1e-4, atol=1e-4)
    session = session_of(model)  # Growing buffers, and one token between.
    for part in (TOKENS[:2], TOKENS[2:3], TOKENS[3:8], TOKENS[8:9], TOKENS[9:]):
        session.feed(part)
    np.testing.assert_allclose(session.logits, expected[-1], rtol=1e-4, atol=1e-4)


def test_bf16_weights_match_a_reference_with_rounded_weights(gguf_path: Path) -> None:
    def rounded(weight: np.ndarray) -> np.ndarray:
        return weight.astype(ml_dtypes.bfloat16).astype(np.float32)

    wanted = ReferenceLlama(gguf_path, round_weights=rounded).logits(TOKENS)
    session = session_of(load_model(gguf_path, "bf16"), cache_dtype="f32")
    session.feed(TOKENS[:-1])
    session.feed(TOKENS[-1:])
    np.testing.assert_allclose(session.logits, wanted[-1], rtol=2e-4, atol=2e-4)


def test_rounded_rows_are_within_the_rounding_of_bf16(gguf_path: Path) -> None:
    found = []
    for form in ("bf16", "bf16-rounded"):
        session = session_of(load_model(gguf_path, form))
        session.feed(TOKENS[:-1])
        session.feed(TOKENS[-1:])
        found.append(session.logits.copy())
    # 2**-9 at most of each activation, which the sums of products average.
    error = np.abs(found[1] - found[0])
    assert 1e-5 < error.max() < 4 * 2.0**-9 * np.abs(found[0]).max()


def test_a_bf16_cache_is_near(model: LlamaModel, expected: np.ndarray) -> None:
    session = session_of(model, cache_dtype="bf16")
    session.feed(TOKENS[:-1])
    session.feed(TOKENS[-1:])
    np.testing.assert_allclose(session.logits, expected[-1], rtol=0.05, atol=0.05)
    assert np.abs(session.logits - expected[-1]).max() > 1e-6


@pytest.mark.parametrize(("dtype", "cache"), [
    ("f32", "float32"), ("file-f32", "float32"), ("bf16", "bfloat16"), ("file", "bfloat16"),
])
def test_the_cache_is_as_exact_as_the_weights(gguf_path: Path, dtype: str, cache: str) -> None:
    loaded = load_model(gguf_path, dtype)
    for session in (loaded.session(8), loaded.batch(2, 8), Session(loaded, 8)):
        assert {array.dtype.name for array in session.state().values()} == {cache}
    assert {array.dtype.name for array in loaded.session(8, cache_dtype="f32").state().values()} == {"float32"}


def test_tied_logits_and_quantised_weights(tmp_path: Path) -> None:
    weights = small.random_weights(3, tied=True)
    q4, q8 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0
    formats = {name: q4 for name, weight in weights.items() if weight.ndim == 2} | {"token_embd.weight": q8}
    path = small.write_gguf(tmp_path / "q.gguf", weights, formats=formats)
    loaded = load_model(path, "f32")
    assert loaded.weights.logits is loaded.weights.embedding
    session = session_of(loaded)
    session.feed(TOKENS[:3])
    wanted = ReferenceLlama(path).logits(TOKENS[:3])[-1]
    np.testing.assert_allclose(session.logits, wanted, rtol=2e-4, atol=2e-4)


def test_a_safetensors_directory_is_the_same_model(tmp_path: Path, model: LlamaModel, expected: np.ndarray) -> None:
    directory = small.write_directory(tmp_path / "checkpoint", small.random_weights())
    loaded = load_model(directory, "f32")
    for mine, other in zip(loaded.weights.layers, model.weights.layers, strict=True):
        np.testing.assert_array_equal(mine.qkv.weights.unpack(), other.qkv.weights.unpack())
    assert replace(loaded.config, epsilon=model.config.epsilon) == model.config  # The GGUF holds it as f32.
    session = session_of(loaded)
    session.feed(TOKENS)
    np.testing.assert_allclose(session.logits, expected[-1], rtol=1e-4, atol=1e-4)
    assert loaded.tokenizer.encode("hello world<|im_end|>") == model.tokenizer.encode("hello world<|im_end|>")
    assert loaded.tokenizer.stops == model.tokenizer.stops
    assert loaded.tokenizer.token_bytes(264) == model.tokenizer.token_bytes(264) == b" world"


def test_greedy_tokens_match_the_reference(model: LlamaModel, gguf_path: Path) -> None:
    made = Generation(model, TOKENS[:4], 8, interpret=True)
    list(made)
    wanted = ReferenceLlama(gguf_path).greedy(TOKENS[:4], len(made.tokens))
    assert made.tokens == wanted
    assert made.stop == "length"


def test_a_seed_gives_the_same_text_and_the_temperature_matters(model: LlamaModel) -> None:
    def tokens(**options) -> list[int]:
        run = Generation(model, TOKENS[:4], 6, interpret=True, **options)
        list(run)
        return run.tokens

    hot = tokens(temperature=2.0, top_k=100, seed=1)
    assert hot == tokens(temperature=2.0, top_k=100, seed=1)
    assert hot != tokens(temperature=2.0, top_k=100, seed=2)
    assert tokens(temperature=5.0, top_k=1, seed=9) == tokens()


def test_generation_stops_at_an_end_token_and_at_the_context(model: LlamaModel) -> None:
    free = Generation(model, TOKENS[:4], 3, interpret=True)
    list(free)
    stopping = LlamaModel(model.path, model.config, model.weights, model.tokenizer, model.dtype, "llama")
    original = model.tokenizer.stops
    try:
        model.tokenizer.stops = frozenset({free.tokens[1]})
        run = generate(stopping, "hello", 50, raw=True, interpret=True)
        run.prompt = TOKENS[:4]
        list(run)
    finally:
        model.tokenizer.stops = original
    assert run.stop == "end"
    assert run.tokens == free.tokens[: free.tokens.index(free.tokens[1])]
    long = Generation(model, [1] * (small.POSITIONS - 1), 10, interpret=True)
    list(long)
    assert long.stop in ("context", "end")
    assert len(long.tokens) <= 2


def test_rates_count_prompt_and_later_tokens(model: LlamaModel) -> None:
    run = Generation(model, TOKENS[:4], 3, interpret=True)
    assert run.decode_rate == run.prefill_rate == 0.0
    text = "".join(run)
    assert text == model.tokenizer.decode(run.tokens)
    assert run.prefill_rate == pytest.approx(4 / run.prefill_seconds)
    assert run.decode_rate == pytest.approx(2 / run.decode_seconds)


def test_the_likeliest_token_is_known_behind_every_feed(model: LlamaModel) -> None:
    """Other draws, from the same logits or from others, leave it as it is."""
    session = session_of(model)
    for tokens in (TOKENS[:5], TOKENS[5:6]):
        session.feed(tokens)
        likeliest = int(session.logits.argmax())
        assert session.picked[0] == session.pick() == likeliest
        assert session.pick(1.0, small.VOCABULARY, 0.999) != likeliest
        others = np.zeros_like(session.logits)
        others[(likeliest + 1) % len(others)] = 1.0
        assert session.pick(logits=others) == (likeliest + 1) % len(others)
        assert session.pick() == session.pick(logits=session.logits.copy()) == likeliest


def test_prompts_go_through_the_template(model: LlamaModel) -> None:
    start, end = small.VOCABULARY - 2, small.VOCABULARY - 1
    tokens = prompt_tokens(model, "hello world")
    assert tokens[0] == start and tokens[-1] == start and end in tokens
    assert prompt_tokens(model, "hello world", raw=True) == [259, 264]
    assert prompt_tokens(model, "x", system="y").count(end) == 2


@pytest.mark.parametrize(("tokens", "message"), [
    ([], "the tokens: found none"), ([small.VOCABULARY], "numbers from 0 to"), ([-1], "numbers from 0 to"),
    ([1] * 33, "at most 32"),
])
def test_wrong_tokens_are_refused(model: LlamaModel, tokens: list[int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        session_of(model).feed(tokens)


def test_wrong_settings_are_refused(model: LlamaModel, gguf_path: Path) -> None:
    with pytest.raises(ModelError, match=f"1 to {small.POSITIONS}"):
        model.session(small.POSITIONS + 1)
    with pytest.raises(ModelError, match="dtype of the cache"):
        model.session(8, cache_dtype="i8")
    with pytest.raises(ModelError, match="dtype of the weights"):
        load_model(gguf_path, "f16")
    with pytest.raises(ModelError, match="at least 1"):
        Generation(model, [1], 0)
    with pytest.raises(ModelError, match="the prompt: found 97 tokens"):
        Generation(model, [1] * 97, 1)
    session = session_of(model)
    session.feed([1])
    for wrong in ({"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": 1.0, "top_k": 0}, {"u": 1.0}):
        with pytest.raises(ModelError, match="sampling"):
            session.pick(**wrong)


def test_many_candidates_are_put_in_order_otherwise_and_give_the_same_tokens(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of logits that are equal, in their order, and of more candidates than there are tokens."""
    session = model.session(32)
    logits = np.round(np.random.default_rng(0).standard_normal(model.config.vocabulary).astype(np.float32) * 4) / 2

    def drawn(top_k: int) -> list[int]:
        return [session.pick(2.0, top_k, u, top_p=0.9, logits=logits) for u in np.linspace(0, 0.999, 40)]

    kernel = [drawn(100), drawn(10**6)]
    monkeypatch.setattr(sessions, "SORTED_FROM", 50)
    assert [drawn(100), drawn(10**6)] == kernel and len(set(kernel[1])) > 10
