"""Models quantised in groups: what is written is near the weights, loads as what was written, and runs everywhere."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from sapper.kernels.quantized import FORMS, Form
from sapper.models.checkpoint import open_checkpoint
from sapper.models.errors import ModelError
from sapper.models.grouped import GroupedEntry, dequantized
from sapper.models.linear import Blocks
from sapper.models.load import load_model
from sapper.models.quantize import Settings, quantize_checkpoint, quantized_rows

from . import small


@pytest.mark.parametrize("name", FORMS)
def test_the_error_is_below_that_of_the_whole_range(name: str) -> None:
    """Rounding to levels that divide a group's range errs by a twelfth of a step's square; the search may only better
    it. f16 holds scale and minimum to 2**-11."""
    form = FORMS[name]
    random = np.random.default_rng(form.block)
    rows = (random.standard_normal((48, 4 * form.block)) * random.uniform(0.01, 3, (48, 1))).astype(np.float32)
    quants, *scales = quantized_rows(form, rows)
    assert quants.shape == (48, 4, form.block * form.bits // 8) and all(s.dtype == np.float16 for s in scales)
    error = np.square(dequantized(form, quants, *scales) - rows).reshape(48, 4, -1).mean(-1)
    x = rows.reshape(48, 4, -1)
    reach = x.max(-1) - x.min(-1) if form.minimum else 2 * np.abs(x).max(-1)
    step = reach / ((1 << form.bits) - 1)
    assert np.sqrt(error.mean()) < np.sqrt((np.square(step) / 12).mean()) * (1.02 if form.bits == 4 else 1.4)


@pytest.mark.parametrize("form", [Form(4), Form(4, minimum=True), Form(8)], ids=lambda form: form.name)
def test_numbers_of_a_form_come_back(form: Form) -> None:
    """Whole numbers that a block's quants hold exactly, of which the extremes occur; blocks of one number, of zeros."""
    random = np.random.default_rng(1)
    q = random.integers(0, 1 << form.bits, (16, 3, 32))
    q[:, :, 0], q[:, :, 1] = 0, (1 << form.bits) - 1
    rows = (q - form.offset).astype(np.float32).reshape(16, 96)
    rows[0, :32] = 0
    np.testing.assert_array_equal(dequantized(form, *quantized_rows(form, rows)), rows)
    if form.minimum:
        rows[1, :32] = 0.75
        np.testing.assert_array_equal(dequantized(form, *quantized_rows(form, rows))[1, :32], rows[1, :32])


def test_the_search_betters_a_group_with_an_outlier() -> None:
    rows = np.random.default_rng(2).standard_normal((16, 128)).astype(np.float32)
    rows[:, 5] = 6.0
    form = FORMS["q4m_128"]
    found = np.square(dequantized(form, *quantized_rows(form, rows)) - rows).mean()
    step = (rows.max(1) - rows.min(1)) / 15
    assert found < 0.9 * (np.square(step) / 12).mean()


@pytest.fixture(params=["gguf", "directory"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    weights = small.random_weights(3)
    if request.param == "gguf":
        return small.write_gguf(tmp_path / "model.gguf", weights)
    return small.write_directory(tmp_path / "model", weights)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("settings", "form"), [
    (Settings(4, 64), "q4m"), (Settings(4, 64, False), "q4"), (Settings(8), "q8"), (Settings(8, 32, True), "q8m"),
], ids=lambda value: str(value) if isinstance(value, str) else "")
def test_a_model_is_what_was_written(source: Path, tmp_path: Path, settings: Settings, form: str) -> None:
    """Logits with the same weights in f32 are the reference; the file's own are near."""
    target = tmp_path / "small-quantised"
    summary = quantize_checkpoint(open_checkpoint(source), target, settings, shard_bytes=40_000)
    assert summary.matrices == 7 * small.LAYERS, "the vocabulary of 267 rows makes no panels"
    assert len(list(target.glob("model-*-of-*.safetensors"))) > 1 and (target / "model.safetensors.index.json").exists()
    models = [load_model(target, kind) for kind in ("file-f32", "f32", "file")]
    layer = models[0].weights.layers[0]
    # Rows of 64 may be one group, rows of 96 are three.
    wide = f"{form}_64" if settings.group == 64 else form
    assert isinstance(layer.feed_forward.gate, Blocks) and layer.feed_forward.gate.form.name == wide
    assert isinstance(layer.feed_forward.down, Blocks) and layer.feed_forward.down.form.name == form
    sessions = [model.session(64) for model in models]
    original = load_model(source, "f32").session(64)
    for tokens in ([5, 9, 200, 31, 7], [12], [77]):
        for session in (*sessions, original):
            session.feed(tokens)
        exact, widened, fast = (session.logits for session in sessions)
        np.testing.assert_allclose(exact, widened, rtol=0.02, atol=0.08)  # the embedding is bf16 in one
        spread = np.abs(widened).max()
        assert np.abs(fast - widened).max() < 0.05 * spread, "activations of 8 bits"
        assert np.corrcoef(widened, original.logits)[0, 1] > (0.95 if settings.bits == 4 else 0.9995)


def test_it_can_be_quantised_again(source: Path, tmp_path: Path) -> None:
    """What takes no new rounding stays: 8 bits of a model in 8 bits."""
    first, second = tmp_path / "first", tmp_path / "second"
    quantize_checkpoint(open_checkpoint(source), first, Settings(8, 32))
    summary = quantize_checkpoint(open_checkpoint(first), second, Settings(8, 32))
    assert summary.error < 2e-3
    one, two = (open_checkpoint(path).tensors for path in (first, second))
    assert list(one) == list(two)
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}


def test_directories_keep_their_tokenizer(tmp_path: Path) -> None:
    source = small.write_directory(tmp_path / "model", small.random_weights(3))
    (source / "huge.bin").write_bytes(b"not copied")
    quantize_checkpoint(open_checkpoint(source), tmp_path / "out", Settings(4))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in names and "huge.bin" not in names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["quantization_config"]["quant_method"] == "sapper"


@pytest.mark.parametrize("split", [False, True])
def test_experts_stay_in_groups(tmp_path: Path, split: bool) -> None:
    """What keys and values are made with, and routers, stay as they are."""
    from sapper.models.experts import BlockExperts
    from sapper.models.mixture import MixtureWeights

    from .test_deepseek import write_gguf

    source = write_gguf(tmp_path / "x.gguf", "deepseek_v2_lite", split, hidden=32)
    quantize_checkpoint(open_checkpoint(source), tmp_path / "out", Settings(8, 32))
    model, original = load_model(tmp_path / "out"), load_model(source, "f32")
    mixtures = [layer.feed_forward for layer in model.weights.layers if isinstance(layer.feed_forward, MixtureWeights)]
    assert mixtures
    kinds = {type(part) for one in mixtures for part in (one.gate, one.up, one.down)}
    assert kinds == {BlockExperts}
    sessions = [one.session(32) for one in (model, original)]
    for tokens in ([5, 9, 100, 31, 7], [12]):
        for session in sessions:
            session.feed(tokens)
        # Of random weights, a choice of experts that is near a tie may turn.
        assert np.corrcoef(sessions[0].logits, sessions[1].logits)[0, 1] > 0.995


class TestFaults:
    def test_something_is_there(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(ModelError, match="found something that is there; expected a new directory"):
            quantize_checkpoint(open_checkpoint(source), tmp_path / "out", Settings(4))

    def test_nothing_is_left_of_an_interrupt_as_soon_as_there_is_something(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make, place = Path.mkdir, tmp_path / "place"
        place.mkdir()

        def interrupted(path: Path, mode: int) -> None:
            make(path, mode)
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "mkdir", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(open_checkpoint(source), place / "out", Settings(4))
        assert not any(place.iterdir())

    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
    def test_nothing_is_left(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        calls = 0

        def full(handle: int) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise error

        monkeypatch.setattr(os, "fsync", full)
        before = set(tmp_path.iterdir())
        expected = ModelError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
            quantize_checkpoint(open_checkpoint(source), tmp_path / "out", Settings(4))
        assert set(tmp_path.iterdir()) == before and calls == 2

    def test_weights_that_are_no_numbers(self, tmp_path: Path) -> None:
        for value, message in ((np.nan, "that are infinite or no numbers"), (1e30, "up to 1e\\+30")):
            weights = small.random_weights(3)
            weights["blk.0.ffn_up.weight"][3, 5] = value
            source = small.write_gguf(tmp_path / "bad.gguf", weights)
            with pytest.raises(ModelError, match=f"blk.0.ffn_up.weight: found weights {message}"):
                quantize_checkpoint(open_checkpoint(source), tmp_path / "out", Settings(8))
            assert not (tmp_path / "out").exists()

    def test_a_directory_that_was_tampered_with(self, tmp_path: Path) -> None:
        from safetensors.numpy import load_file, save_file

        source = small.write_directory(tmp_path / "model", small.random_weights(3))
        target = tmp_path / "out"
        quantize_checkpoint(open_checkpoint(source), target, Settings(4))
        config = json.loads((target / "config.json").read_text())
        tensors = load_file(target / "model.safetensors")
        quants = next(name for name in tensors if name.endswith(".quants"))
        scales = quants.removesuffix("quants") + "scales"

        def refused(message: str) -> None:
            with pytest.raises(ModelError, match=message):
                load_model(target)

        save_file({name: part for name, part in tensors.items() if name != scales}, target / "model.safetensors")
        refused("a part of a matrix; expected its quants and its scales")
        for wrong in (tensors[scales][:, :1], tensors[scales].astype(np.float32)):
            save_file(tensors | {scales: np.ascontiguousarray(wrong)}, target / "model.safetensors")
            refused(r"expected F16 \(")
        save_file(tensors, target / "model.safetensors")
        assert isinstance(open_checkpoint(target).tensors[quants.rsplit(".", 2)[0]], GroupedEntry)
        config["quantization_config"]["version"] = 2
        (target / "config.json").write_text(json.dumps(config))
        refused("version: found 2; expected 1")
