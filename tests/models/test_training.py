"""Training: gradients beside differences of an independent loss in float64, AdamW, what is written, runs that go on."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapper.models import training as trainings
from sapper.models.checkpoint import open_checkpoint
from sapper.models.deepseek.config import DeepseekConfig
from sapper.models.errors import ModelError
from sapper.models.llama.training import Trainer
from sapper.models.load import load_model
from sapper.models.training import Recipe, Training, batches, mean_loss, resume, start, steps, write_trained

from . import small
from .loss64 import Loss, places
from .test_deepseek import QUANTISED, as_fp8, config_of, write_gguf

DATA = Path(__file__).parent / "data"
Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, with rows of queries and keys in pairs."""
    return small.write_gguf(tmp_path_factory.mktemp("train") / "small.gguf", small.random_weights(tied=True))


def drawn(trainer: Training, seed: int = 0) -> tuple[Array, Array]:
    """Tokens and targets, of which some do not count."""
    random = np.random.default_rng(seed)
    shape = trainer.sequences, trainer.length
    tokens, targets = (random.integers(0, trainer.vocabulary, shape).astype(np.int32) for _ in range(2))
    targets[0, ::5] = -1
    return tokens, targets


def opened(kind: str, gguf: Path) -> Training:
    return start(open_checkpoint(gguf if kind == "gguf" else DATA / kind), 2, 16)


def loss_of(training: Any, tokens: Array, targets: Array) -> Loss:
    config, layers = training.config, range(training.config.layers)
    pattern = "model.layers.{}.mlp.gate.e_score_correction_bias"
    entries = {layer: training.checkpoint.tensors.get(pattern.format(layer)) for layer in layers}
    bias = {layer: entry.read().astype(np.float64) for layer, entry in entries.items() if entry is not None}
    interleaved = training.checkpoint.gguf or isinstance(config, DeepseekConfig)
    return Loss(config, interleaved, config.rope.tables(training.length), bias, tokens, targets)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gguf", "qwen3_moe", "deepseek_v2_lite", "deepseek_v2",
                                  "deepseek_v3"])
def test_gradients_and_loss(kind: str, gguf: Path) -> None:
    """Along its gradient, and along a random direction, each array changes the loss as the gradient says. A difference
    of 2 * 1e-5 in float64 is off by 1e-10 of a third derivative, which is some 1e4 times the first where the factor of
    scores is large; what is left is the f32 of the gradient, sums of up to 272 x 32 rounded products: 1e-5 of its
    length."""
    trainer: Any = opened(kind, gguf)
    tokens, targets = drawn(trainer)
    loss64 = loss_of(trainer, tokens, targets)
    weights = {name: array.astype(np.float64) for name, array in places(trainer._weights).items()}
    loss, norm = trainer.step(tokens, targets, Recipe(steps=1), 1)
    assert loss == pytest.approx(loss64(weights), rel=2e-6)
    gradients = {name: array.astype(np.float64) for name, array in places(trainer._gradients).items()}
    assert norm == pytest.approx(np.sqrt(sum(np.square(array).sum() for array in gradients.values())), rel=1e-5)
    random = np.random.default_rng(1)
    for name, gradient in gradients.items():
        length = np.sqrt(np.square(gradient).sum())
        for direction in (gradient / length, random.standard_normal(gradient.shape)):
            direction = direction / np.sqrt(np.square(direction).sum())
            ahead, behind = (
                loss64(weights | {name: weights[name] + step * direction}) for step in (1e-5, -1e-5))
            expected = (gradient * direction).sum()
            assert (ahead - behind) / 2e-5 == pytest.approx(expected, abs=1e-5 * length + 1e-8), name


def test_adamw() -> None:
    """Three steps of it, in float64, with the gradients that each had. A step moves a weight by up to the rate, of
    which f32 keeps 2**-22 after some roundings, and the sum with the weight 2**-24 of that."""
    trainer = Trainer(open_checkpoint(DATA / "llama"), 2, 16)
    recipe = Recipe(steps=3, rate=1e-3, warmup=2, decay=0.5, clip=0.5)
    weights = {name: array.astype(np.float64) for name, array in places(trainer._weights).items()}
    means = {name: np.zeros_like(array) for name, array in weights.items()}
    squares = {name: np.zeros_like(array) for name, array in weights.items()}
    rates = [0.5e-3, 1e-3, 1e-4]
    for number, rate in enumerate(rates, 1):
        assert recipe.rate_of(number) == pytest.approx(rate)
        _, norm = trainer.step(*drawn(trainer, number), recipe, number)
        for name, gradient in places(trainer._gradients).items():
            g = gradient.astype(np.float64) * min(1.0, 0.5 / norm)
            means[name] = 0.9 * means[name] + 0.1 * g
            squares[name] = 0.95 * squares[name] + 0.05 * g * g
            move = means[name] / (1 - 0.9**number) / (np.sqrt(squares[name] / (1 - 0.95**number)) + 1e-8)
            keep = 1 - rate * 0.5 if gradient.ndim > 1 else 1.0
            weights[name] = keep * weights[name] - rate * move
    for name, array in places(trainer._weights).items():
        np.testing.assert_allclose(array, weights[name], rtol=1e-6, atol=2e-8, err_msg=name)


@pytest.mark.parametrize("kind", ["qwen2", "deepseek_v2_lite"])
def test_threads_and_the_interpreter_agree(kind: str) -> None:
    """Each is off by up to 1e-5 of an array's largest gradient, as in test_gradients_and_loss: two by twice that."""
    checkpoint = open_checkpoint(DATA / kind)
    found = []
    for options in ({"threads": 1}, {"threads": 2}, {"interpret": True}):
        trainer: Any = start(checkpoint, 2, 16, **options)
        trainer.step(*drawn(trainer), Recipe(steps=1), 1)
        found.append({name: array.copy() for name, array in places(trainer._gradients).items()})
    for name, array in found[0].items():
        for other in found[1:]:
            np.testing.assert_allclose(other[name], array, rtol=0, atol=2e-5 * np.abs(array).max(), err_msg=name)


TEXT = "hello world, hello world; " * 40


def tokens_of(path: Path) -> Array:
    return np.array(open_checkpoint(path).tokenizer(1 << 20).encode(TEXT), np.int32)


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_it_learns_and_what_is_written_is_what_was_trained(kind: str, gguf: Path, tmp_path: Path) -> None:
    """Both from GGUF files; that of a DeepSeek has keys and values apart, and its experts in one tensor."""
    path = gguf if kind == "llama" else write_gguf(tmp_path / "deepseek.gguf", kind, split=True)
    training = start(open_checkpoint(path), 2, 16)
    tokens = tokens_of(path)
    before = mean_loss(training, tokens)
    losses = [step.loss for step in steps(training, Recipe(steps=30, rate=5e-3), tokens)]
    after = mean_loss(training, tokens)
    assert losses[0] > 4.0 and after < 0.5 < before
    write_trained(training, tmp_path / "out")
    model = load_model(tmp_path / "out", "f32")
    session = model.session(17)
    found = session.losses([int(token) for token in tokens[:17]])
    assert np.mean(found) == pytest.approx(training.loss_of(*(
        np.stack([tokens[first : first + 16]] * 2) for first in (0, 1))), rel=1e-4)
    session.rewind(0)
    session.feed(model.tokenizer.encode("hello world, hello"))
    assert model.tokenizer.decode([session.pick()]) == " world"


@pytest.mark.parametrize("kind", ["qwen2", "gguf", "deepseek_v3"])
def test_a_run_that_goes_on(kind: str, gguf: Path, tmp_path: Path) -> None:
    """To the last bit what one without a break does, the biases of a DeepSeek's choice of experts too. What is not
    trained, its MTP head, stays what it was."""
    path = gguf if kind == "gguf" else DATA / kind
    recipe = Recipe(steps=5, rate=1e-3, warmup=2, balance=0.01 if kind == "deepseek_v3" else 0.0)
    tokens = np.arange(200, dtype=np.int32) * 7 % 250
    whole = start(open_checkpoint(path), 2, 16)
    expected = [step.loss for step in steps(whole, recipe, tokens, seed=3)]
    first = start(open_checkpoint(path), 2, 16)
    found = []
    for step in steps(first, recipe, tokens, seed=3):
        found.append(step.loss)
        if step.number == 2:
            break
    write_trained(first, tmp_path / "half", steps=2)
    again = start(open_checkpoint(tmp_path / "half"), 2, 16)
    done = resume(again)
    assert done == 2
    found += [step.loss for step in steps(again, recipe, tokens, seed=3, done=done)]
    assert found == expected
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(again.tensors[name].read(), tensor.read(), err_msg=name)
    others = {name: entry for name, entry in whole.checkpoint.tensors.items() if name not in whole.tensors}
    assert all("layers.3." in name for name in others)
    assert (kind == "deepseek_v3") is bool(others)
    for name, entry in others.items():
        np.testing.assert_array_equal(again.checkpoint.tensors[name].read(), entry.read(), err_msg=name)


def test_experts_are_balanced() -> None:
    """As many steps up or down as the tokens of each say, and as far as the recipe does."""
    trainer: Any = start(open_checkpoint(DATA / "deepseek_v3"), 2, 16)
    biases = {layer: bias.copy() for layer, bias in trainer._biases.items()}
    for number in (1, 2):
        trainer.step(*drawn(trainer, number), Recipe(steps=2, balance=0.01), number)
        for layer, bias in biases.items():
            counts = np.bincount(trainer._kept[layer].feed_forward.experts.reshape(-1), minlength=8)
            bias += np.float32(0.01) * np.sign(12 - counts)
    assert list(biases) == [1, 2]
    for layer, bias in biases.items():
        np.testing.assert_allclose(trainer._biases[layer], bias, rtol=1e-6)
        name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        np.testing.assert_array_equal(trainer.tensors[name].read(), trainer._biases[layer])


def test_a_model_in_fp8_is_trained_in_f32(tmp_path: Path) -> None:
    """What is written has no more scales, and is the same model."""
    path, out = tmp_path / "fp8", tmp_path / "out"
    shutil.copytree(DATA / "deepseek_v3", path)
    as_fp8(path, np.random.default_rng(0))
    (path / "config.json").write_text(json.dumps(config_of("deepseek_v3", quantization_config=QUANTISED)))
    training = start(open_checkpoint(path), 2, 16)
    write_trained(training, out)
    read = [{name: entry.read() for name, entry in open_checkpoint(one).tensors.items()} for one in (path, out)]
    assert read[0].keys() == read[1].keys() and "quantization_config" not in (out / "config.json").read_text()
    for name, array in read[0].items():
        np.testing.assert_array_equal(read[1][name], array, err_msg=name)
    tokens = np.random.default_rng(0).integers(0, training.vocabulary, (2, 17)).astype(np.int32)
    losses = [load_model(out, "f32").session(17).losses(row.tolist()) for row in tokens]
    assert training.loss_of(tokens[:, :-1], tokens[:, 1:]) == pytest.approx(np.mean(losses), rel=1e-5)


def test_batches_see_each_window_once_before_any_twice() -> None:
    tokens = np.arange(51, dtype=np.int32)
    some = batches(tokens, 2, 5, seed=1)
    for _ in range(3):
        seen = [next(some) for _ in range(5)]
        assert sorted(int(row[0]) for rows, _ in seen for row in rows) == list(range(0, 50, 5))
        assert all((targets == rows + 1).all() for rows, targets in seen)


class TestFaults:
    def test_an_architecture_that_is_not_trained(self, tmp_path: Path) -> None:
        path = small.write_gguf(tmp_path / "other.gguf", {}, architecture="gpt2")
        with pytest.raises(ModelError, match="found a model of gpt2; expected a Llama, a Mistral, a Qwen or a Deep"):
            start(open_checkpoint(path))
        with pytest.raises(ModelError, match=r"found a model that chooses the positions it attends to \(V3.2\)"):
            start(open_checkpoint(DATA / "deepseek_v32"))

    @pytest.mark.parametrize(("sequences", "length", "match"), [
        (1, 257, "found 257; expected 1 to 256"), (0, 8, "found 0; expected at least 1"),
        (1 << 20, 256, "GiB that are free; expected"),
    ])
    def test_steps_that_cannot_be(self, sequences: int, length: int, match: str) -> None:
        with pytest.raises(ModelError, match=match):
            start(open_checkpoint(DATA / "llama"), sequences, length)

    def test_tokens_that_there_are_not(self) -> None:
        training = start(open_checkpoint(DATA / "llama"), 2, 16)
        good = np.zeros((2, 16), np.int32)
        for tokens, targets in ((good + 272, good), (good - 1, good), (good, good + 272), (good[:, :3], good),
                                (good, good - 1)):
            with pytest.raises(ModelError, match="a step"):
                training.step(tokens, targets, Recipe(steps=1), 1)

    def test_experts_that_have_no_bias(self) -> None:
        training = start(open_checkpoint(DATA / "deepseek_v2"), 2, 16)
        with pytest.raises(ModelError, match=r"found a model that chooses experts without a bias.*without --balance"):
            training.step(*drawn(training), Recipe(steps=1, balance=0.001), 1)

    def test_a_text_that_is_too_short(self) -> None:
        training = start(open_checkpoint(DATA / "llama"), 2, 16)
        with pytest.raises(ModelError, match="found 16 tokens; expected at least 17"):
            next(steps(training, Recipe(steps=1), np.zeros(16, np.int32)))

    def test_a_step_that_leaves_no_numbers(self) -> None:
        training = start(open_checkpoint(DATA / "llama"), 2, 16)
        next(iter(training.tensors.values())).rows[:] = np.inf
        with pytest.raises(ModelError, match=r"step 1: found a loss of nan .* mend: train with a lower rate"):
            next(steps(training, Recipe(steps=2), np.arange(60, dtype=np.int32)))

    def test_a_state_after_no_whole_number_of_steps(self, tmp_path: Path) -> None:
        training = start(open_checkpoint(DATA / "llama"), 2, 16)
        write_trained(training, tmp_path / "out", steps=0)
        with pytest.raises(ModelError, match="tensor steps: found 0; expected a whole number from 1 on"):
            resume(start(open_checkpoint(tmp_path / "out"), 2, 16))

    def test_no_state(self, tmp_path: Path) -> None:
        training = start(open_checkpoint(DATA / "llama"), 2, 16)
        with pytest.raises(ModelError, match=r"training.safetensors: found nothing"):
            resume(training)
        write_trained(training, tmp_path / "out", steps=1)
        state = tmp_path / "out" / trainings.STATE
        state.write_bytes(state.read_bytes()[:-1])
        again = start(open_checkpoint(tmp_path / "out"), 2, 16)
        with pytest.raises(ModelError, match="expected the tensor's size"):
            resume(again)

    def test_a_directory_that_is_there(self, tmp_path: Path) -> None:
        training = start(open_checkpoint(DATA / "llama"), 2, 16)
        with pytest.raises(ModelError, match="found something that is there"):
            write_trained(training, tmp_path)
