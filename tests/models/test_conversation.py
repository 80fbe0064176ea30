"""Conversations: only new tokens are fed, the cache holds what a fresh session would, full contexts lose old turns."""

from pathlib import Path

import numpy as np
import pytest

from sapper.models.conversation import Conversation
from sapper.models.errors import ModelError
from sapper.models.generate import Generation
from sapper.models.llama.model import LlamaModel, load_model

from . import small


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    directory = tmp_path_factory.mktemp("small")
    return load_model(small.write_gguf(directory / "s.gguf", small.random_weights(), numbers=LONG, strings=SAYS), "f32")


SAYS = {"tokenizer.chat_template": small.TEMPLATE + "assistant: "}
LONG = {"llama.context_length": 256}


def test_only_new_tokens_are_fed(model: LlamaModel) -> None:
    talk = Conversation(model, interpret=True)
    first = talk.ask("hello", 5)
    text = "".join(first)
    assert talk.fed == first.generation.prompt_count
    assert talk.messages[-1] == {"role": "assistant", "content": text}
    before = talk.session.position
    second = talk.ask("world", 5)
    assert talk.fed == second.generation.prompt_count - before
    assert second.generation.prompt[: len(first.generation.prompt)] == first.generation.prompt
    "".join(second)
    alone = Generation(model, second.generation.prompt, 5, interpret=True)
    list(alone)
    assert alone.tokens == second.generation.tokens


@pytest.mark.parametrize("shown", [0, 1, 3])
def test_it_goes_on_after_an_answer_that_was_broken_off(model: LlamaModel, shown: int) -> None:
    talk = Conversation(model, interpret=True)
    answer = talk.ask("hello", 8)
    for _, _ in zip(range(shown), answer, strict=False):
        pass
    answer.close()
    answer.close()
    assert len(talk.messages) == 2
    after = talk.ask("hello", 4)
    "".join(after)
    alone = Generation(model, after.generation.prompt, 4, interpret=True)
    list(alone)
    assert alone.tokens == after.generation.tokens
    np.testing.assert_allclose(alone.session.logits, talk.session.logits, rtol=1e-3, atol=1e-4)


def test_a_setting_that_cannot_be_leaves_the_conversation_as_it_was(model: LlamaModel) -> None:
    """A message that was never answered would stand before the next one, which some templates refuse."""
    talk, other = (Conversation(model, context=80, interpret=True) for _ in range(2))
    for one in (talk, other):
        "".join(one.ask("hello world", 4))
    messages = list(talk.messages)
    for _ in range(3):
        with pytest.raises(ModelError, match="sampling"):
            talk.ask("hello " * 4, 4, top_p=2.0)
    assert talk.messages == messages and talk.dropped == 0
    answers = [one.ask("world", 4) for one in (talk, other)]
    assert "".join(answers[0]) == "".join(answers[1])
    assert answers[0].generation.prompt == answers[1].generation.prompt and talk.messages == other.messages


def test_an_answer_has_room_in_a_context_that_turns_fill(model: LlamaModel) -> None:
    """Turns go so that a quarter of the context is left, or as much as the answer may take; a message alone may leave
    less."""
    talk = Conversation(model, context=80, interpret=True)
    for limit, room in ((4, 4), (4, 4), (None, 20), (4, 4), (4, 4), (30, 20), (4, 4)):
        answer = talk.ask("hello world", limit)
        "".join(answer)
        assert len(answer.generation.prompt) + room <= 80
    assert talk.dropped > 0
    most = "hello " * 24
    talk.reset()
    prompt = talk.ask(most, 4).generation.prompt
    assert 60 < len(prompt) < 80


def test_a_full_context_forgets_the_oldest_turns(model: LlamaModel) -> None:
    talk = Conversation(model, "x", context=80, interpret=True)
    for number in range(6):
        "".join(talk.ask(f"hello world {number}", 4))
    assert talk.dropped > 0 and talk.messages[0] == {"role": "system", "content": "x"}
    assert talk.messages[-2]["content"] == "hello world 5"
    with pytest.raises(ModelError, match="fewer than 80, the context"):
        talk.ask("y" * 100)
    assert talk.messages[-1]["role"] == "assistant"
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "x"}] and talk.session.position == 0


def test_a_stop_string_cuts_the_answer(model: LlamaModel) -> None:
    whole = Generation(model, [5, 17], 6, interpret=True)
    text = "".join(whole)
    cut = text[2:4]
    made = Generation(model, [5, 17], 6, stop=[cut], interpret=True)
    assert "".join(made) == text[: text.find(cut)] and made.stop == "stop"


def test_a_model_without_a_template_is_refused(model: LlamaModel, tmp_path: Path) -> None:
    path = small.write_gguf(tmp_path / "s.gguf", small.random_weights(), strings={"tokenizer.chat_template": ""})
    with pytest.raises(ModelError, match="no chat template"):
        Conversation(load_model(path, "f32"), interpret=True)
