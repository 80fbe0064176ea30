"""DeepSeek's MTP head: parity with a reference in PyTorch (make_deepseek.py), and speculation changes no token."""

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapper.cli.chat import run_chat
from sapper.cli.generate import run_generate
from sapper.models import session as sessions
from sapper.models.conversation import Conversation
from sapper.models.deepseek.model import DeepseekModel
from sapper.models.deepseek.model import load_model as load_deepseek
from sapper.models.deepseek.speculative import Speculative
from sapper.models.deepseek.weights import PredictorWeights
from sapper.models.errors import ModelError
from sapper.models.generate import Generation
from sapper.models.linear import Dense
from sapper.models.load import load_model

DATA = Path(__file__).parent / "data"
CONTEXT = 160
TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(DATA / "deepseek_v3.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def model() -> DeepseekModel:
    return without_stops(load_deepseek(DATA / "deepseek_v3", "f32", predictor=True))


def without_stops(model: DeepseekModel) -> DeepseekModel:
    model.tokenizer.stops = frozenset()
    return model


def with_a_head(name: str) -> DeepseekModel:
    """A model whose head is its own last layer: it foresees nothing."""
    model = without_stops(load_deepseek(DATA / name, "f32"))
    weights, features = model.weights, model.config.features
    noise = np.random.default_rng(0).standard_normal((features, 2 * features), np.float32) / np.float32(features**0.5)
    head = PredictorWeights(weights.gain, weights.gain, Dense(noise, "f32"), weights.layers[-1], weights.gain)
    return dataclasses.replace(model, weights=dataclasses.replace(weights, predictor=head))


def tokens_of(model: DeepseekModel, prompt: list[int], count: int = 128, **options: Any) -> tuple[list[int], Any]:
    made = Generation(model, prompt, count, **options)
    list(made)
    return made.tokens, made.session


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_the_head_gives_the_logits_of_the_reference(
    model: DeepseekModel, recorded: dict[str, np.ndarray], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a prompt in one piece, in pieces, and token by token."""
    monkeypatch.setattr(sessions, "CHUNK", chunk)
    prompt = recorded["tokens"].tolist()
    session = model.session(CONTEXT, speculate=True)
    assert isinstance(session, Speculative)
    if chunk == 1:
        for token in prompt[:-1]:
            session.feed([token])
    else:
        session.feed(prompt[:-1])
    assert session._foresee(prompt[-1:]) == recorded["drafts"][len(prompt) - 2]
    wanted = recorded["draft_logits"][-1]
    assert np.abs(session._draft_logits - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("threads", [1, 3])
def test_greedy_tokens_are_those_without(model: DeepseekModel, recorded: dict[str, np.ndarray], threads: int) -> None:
    """Drafts that are right and ones that are wrong; as many are right as the reference says."""
    prompt, greedy = recorded["tokens"].tolist(), recorded["greedy"].tolist()
    tokens, session = tokens_of(model, prompt, speculate=True, threads=threads)
    assert tokens == greedy
    every = prompt + greedy
    position, right, wrong = len(prompt), 0, 0
    while position < len(every) - 1:  # every[position] is chosen and not fed
        if recorded["drafts"][position - 1] == every[position + 1]:
            right, position = right + 1, position + 2
        else:
            wrong, position = wrong + 1, position + 1
    assert recorded["draft_margins"].min() > 1e-4
    assert (session.accepted, session.drafted) == (right, right + wrong)
    assert right > 20 and wrong > 20


def test_drawn_tokens_are_those_without(model: DeepseekModel, recorded: dict[str, np.ndarray]) -> None:
    prompt = recorded["tokens"].tolist()
    options = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 3}
    alone, _ = tokens_of(model, prompt, 60, **options)
    tokens, session = tokens_of(model, prompt, 60, speculate=True, **options)
    assert tokens == alone
    assert 0 < session.accepted < session.drafted


@pytest.mark.parametrize("name", ["deepseek_v2_lite", "deepseek_v2", "deepseek_v32"])
@pytest.mark.parametrize("oracle", [lambda i: True, lambda i: i % 3 == 1, lambda i: False])
def test_any_pattern_of_right_drafts_gives_the_same_tokens(
    name: str, oracle: Callable[[int], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each attention, the sparse one included; drafts come from what is known to follow."""
    model = with_a_head(name)
    with np.load(DATA / f"{name}.npz") as file:
        prompt, greedy = file["tokens"].tolist(), file["greedy"].tolist()
    every = prompt + greedy
    foresee = Speculative._foresee

    def known(self: Speculative, tokens: Any, draft: bool = True) -> int:
        foresee(self, tokens, draft)
        following = self._predicted + 1
        right = every[following] if following < len(every) else 0
        return right if oracle(following) else (right + 1) % self.vocabulary

    monkeypatch.setattr(Speculative, "_foresee", known)
    tokens, session = tokens_of(model, prompt, speculate=True)
    assert tokens == greedy
    assert session.accepted == session.drafted if oracle(0) and oracle(2) else session.accepted < session.drafted


def test_the_context_may_be_filled_to_the_last_token(model: DeepseekModel, recorded: dict[str, np.ndarray]) -> None:
    prompt, greedy = recorded["tokens"].tolist(), recorded["greedy"].tolist()
    for context in (40, 41):
        session = model.session(context, speculate=True)
        made = Generation(model, prompt, 100, session=session)
        list(made)
        assert made.stop == "context" and session.position == context
        assert made.tokens == greedy[: context - len(prompt) + 1]


def test_a_conversation_goes_on(model: DeepseekModel, recorded: dict[str, np.ndarray]) -> None:
    """Tokens fed after others: the head sees the token between."""
    prompt = recorded["tokens"].tolist()
    one, other = (model.session(CONTEXT, speculate=True) for _ in range(2))
    one.feed(prompt)
    other.feed(prompt[:9])
    other.feed(prompt[9:10])
    other.feed(prompt[10:])
    for session in (one, other):
        session._foresee([7])
    np.testing.assert_allclose(one._draft_logits, other._draft_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kept", [0, 1, 7, 11])
def test_after_a_rewind_all_is_as_if_the_rest_had_not_been(
    model: DeepseekModel, recorded: dict[str, np.ndarray], kept: int
) -> None:
    prompt = recorded["tokens"].tolist()
    one, other = (model.session(CONTEXT, speculate=True) for _ in range(2))
    one.feed(prompt[:9])
    for token in (5, 6):
        one.follow(token, lambda logits: int(logits.argmax()))
    one.rewind(kept)
    if kept:
        other.feed([*prompt[:9], 5, 6][:kept])
    for session in (one, other):
        session.feed(prompt[9:])
        session._foresee([7])
    assert one.position == other.position
    np.testing.assert_allclose(one.logits, other.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(one._draft_logits, other._draft_logits, rtol=1e-4, atol=1e-4)


def test_turns_are_those_of_a_conversation_without_drafts(
    model: DeepseekModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that is broken off leaves a draft in the cache, which the next turn overwrites. Two drafts of three are
    what the other conversation said."""
    known: dict[tuple[int, ...], int] = {}
    foresee = Speculative._foresee

    def drafted(self: Speculative, tokens: Any, draft: bool = True) -> int:
        found = foresee(self, tokens, draft)
        before = (*self._fed, *tokens)
        return known.get(before, found) if len(before) % 3 else found

    monkeypatch.setattr(Speculative, "_foresee", drafted)
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)

    def talk(speculate: bool) -> list[list[int]]:
        conversation = Conversation(model, speculate=speculate)
        said = []
        for message in ("hello world", "or hello", "what"):
            answer = conversation.ask(message, 30)
            for number, _ in enumerate(answer):
                if number == 17 and message == "or hello":
                    answer.close()
                    break
            said.append(answer.generation.tokens)
            every = answer.generation.prompt + answer.generation.tokens
            known.update({tuple(every[:i]): token for i, token in enumerate(every)})
        if speculate:
            assert 10 < conversation.session.accepted < conversation.session.drafted
        return said

    alone = talk(False)
    assert talk(True) == alone


def test_chat_says_how_many_drafts_were_right(tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(DATA / "deepseek_v3", path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    out, err, lines = io.StringIO(), io.StringIO(), iter(["hello world", "/stats", "/quit"])
    options: dict[str, Any] = {"dtype": "f32", "tokens": 9, "out": out, "err": err}
    assert run_chat(str(path), speculate=True, read=lambda _: next(lines), **options) == 0
    assert "drafts right" in err.getvalue()
    assert run_chat(str(DATA / "qwen2"), speculate=True, **options) == 1
    assert "expected one with an MTP head" in err.getvalue()


def test_generate_says_how_many_drafts_were_right() -> None:
    out, err = io.StringIO(), io.StringIO()
    path = str(DATA / "deepseek_v3")
    assert run_generate(path, "hello world", 20, dtype="f32", json=True, speculate=True, out=out, err=err) == 0
    said = json.loads(out.getvalue())
    out = io.StringIO()
    assert run_generate(path, "hello world", 20, dtype="f32", json=True, out=out, err=err) == 0
    alone = json.loads(out.getvalue())
    assert said["tokens"] == alone["tokens"] and said["drafted"] >= said["accepted"] >= 0 and "drafted" not in alone
    assert run_generate(path, "hello", 5, dtype="f32", speculate=True, out=out, err=err) == 0
    assert "drafts right" in err.getvalue()


def test_models_without_a_head_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no MTP head; expected one, to draft with"):
        load_model(DATA / "deepseek_v2_lite", "f32", predictor=True)
    with pytest.raises(ModelError, match="a model of qwen2; expected one with an MTP head"):
        load_model(DATA / "qwen2", "f32", predictor=True)
    with pytest.raises(ModelError, match="load it with predictor=True"):
        load_model(DATA / "deepseek_v3", "f32").session(CONTEXT, speculate=True)
    path = tmp_path / "model"
    shutil.copytree(DATA / "deepseek_v3", path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if "eh_proj" not in k}
    from safetensors.numpy import load_file, save_file

    file = path / "model-mtp.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "eh_proj" not in k}, file)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"layers.3.eh_proj.weight: found nothing"):
        load_model(path, "f32", predictor=True)
