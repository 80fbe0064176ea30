"""Frequencies of the rotary embedding, and the row order of the two kinds of file."""

import math

import numpy as np
import pytest

from sapper.kernels.rope_yarn import ramp, yarn_tables
from sapper.models.errors import ModelError
from sapper.models.llama.config import from_gguf, from_json
from sapper.models.rope import Rope, RopeScaling
from sapper.models.weights import half_split_rows

from . import small


def frequencies(scaling: RopeScaling) -> np.ndarray:
    return scaling.frequencies(500000.0, 8)


def test_plain_frequencies_fall_geometrically() -> None:
    found = frequencies(RopeScaling())
    np.testing.assert_allclose(found, [500000.0 ** (-i / 8) for i in range(8)], rtol=1e-12)
    np.testing.assert_allclose(frequencies(RopeScaling("linear", 4.0)), found / 4, rtol=1e-12)


def test_llama3_frequencies_are_those_of_its_paper() -> None:
    """Wavelengths below original / high stay, those above original / low are stretched, between them is a ramp."""
    factor, low, high, original = 8.0, 1.0, 4.0, 8192
    plain = frequencies(RopeScaling())
    wanted = []
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            wanted.append(frequency)
        elif wavelength > original / low:
            wanted.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            wanted.append((1 - smooth) * frequency / factor + smooth * frequency)
    found = frequencies(RopeScaling("llama3", factor, low, high, original))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert (found < plain).any() and (found == plain).any()


def test_factors_of_the_file_come_first() -> None:
    factors = np.arange(1, 9, dtype=np.float32)
    plain = Rope(500000.0, 8).tables(3, factors)
    for found, wanted in zip(Rope(500000.0, 8, RopeScaling("linear", 2.0)).tables(3, factors), plain, strict=True):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(plain[1][1], np.sin(frequencies(RopeScaling()) / factors), rtol=1e-6)


@pytest.mark.parametrize(("factor", "table", "score"), [(40.0, 1.0, 1.0), (40.0, 0.707, 0.0), (4.0, 0.0, 0.0)])
def test_the_kernel_makes_a_models_yarn_tables(factor: float, table: float, score: float) -> None:
    """As DeepSeek-V3 has them, and two others, at positions within and far beyond the original context."""
    rope = Rope(10000.0, 32, RopeScaling("yarn", factor, original_positions=4096, table_mscale=table,
                                         score_mscale=score))
    low, high = ramp(10000.0, 32, 4096)
    assert (low, high) == (10, 23)
    made = np.zeros((2, 9000, 32), np.float32)
    yarn_tables(math.log2(10000.0), factor, float(low), float(high), rope.scaling.table_factor, made[0], made[1])
    for found, wanted in zip(made, rope.tables(9000), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-7, atol=1e-9)


def test_json_scaling_is_read() -> None:
    values = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}
    read = from_json({**small.JSON_CONFIG, "rope_scaling": values}, "here")
    assert read.rope.scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert from_json({**small.JSON_CONFIG, "rope_scaling": {"type": "default"}}, "here").rope.scaling == RopeScaling()
    assert from_json({**small.JSON_CONFIG, "head_dim": None}, "here").head_features == small.SIZE


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(("more", "factor"), [
    ({}, 1.1386294361), ({"attention_factor": None}, 1.1386294361), ({"attention_factor": 1.25}, 1.25),
    ({"attn_factor": 0.8782488562869419}, 1.0),  # as in DeepSeek-R1-0528-Qwen3-8B
    ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
])
def test_what_tables_of_yarn_are_multiplied_by(more: dict[str, float], factor: float) -> None:
    read = from_json({**small.JSON_CONFIG, "model_type": "qwen3", "rope_scaling": {**YARN, **more}}, "here")
    assert read.rope.scaling.table_factor == pytest.approx(factor, rel=1e-9)
    assert read.rope.tables(1)[0] == pytest.approx(factor, rel=1e-6)
    assert read.normed and not read.biased


METADATA = {"general.architecture": "qwen3", **{key.replace("llama", "qwen3"): value
                                                for key, value in (small.NUMBERS | small.REALS).items()},
            "qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.factor": 4.0,
            "qwen3.rope.scaling.original_context_length": 32768}


def test_yarn_of_gguf_is_read_as_llama_cpp_reads_it() -> None:
    plain = from_gguf({**METADATA, "qwen3.rope.scaling.yarn_attn_factor": 0.5,
                       "qwen3.rope.scaling.yarn_beta_fast": 32.0}, "here")
    assert plain.rope.scaling == RopeScaling("yarn", 4.0, original_positions=32768)
    halved = from_gguf({**METADATA, "qwen3.rope.scaling.attn_factor": 0.5}, "here")
    assert halved.rope.scaling.table_factor == pytest.approx(plain.rope.scaling.table_factor / 2)
    for name, value in (("ext_factor", 0.5), ("beta_fast", 8.0), ("beta_slow", 2.0)):
        with pytest.raises(ModelError, match=f"yarn_{name}: found {value}; expected"):
            from_gguf({**METADATA, f"qwen3.rope.scaling.yarn_{name}": value}, "here")


@pytest.mark.parametrize(("window", "positions"), [({}, 4096), ({"sliding_window": None}, 32768),
                                                   ({"sliding_window": 65536}, 32768), ({"sliding_window": 9}, 9)])
def test_a_window_limits_the_positions(window: dict[str, int], positions: int) -> None:
    """Of a Mistral; one that names none has that of transformers."""
    values = {**small.JSON_CONFIG, **window, "max_position_embeddings": 32768}
    read = from_json({**values, "model_type": "mistral"}, "here")
    assert (read.positions, read.windowed) == (positions, positions < 32768)
    assert from_json(values, "here").positions == 32768
    found = from_gguf({**METADATA, "qwen3.context_length": 32768,
                       "qwen3.attention.sliding_window": window.get("sliding_window") or 0}, "here")
    assert found.positions == (positions if window.get("sliding_window") else 32768)


@pytest.mark.parametrize("heads", [1, 3])
def test_rows_go_from_interleaved_to_half_split(heads: int) -> None:
    rows = np.arange(heads * 8 * 2).reshape(heads * 8, 2)
    np.testing.assert_array_equal(half_split_rows(rows, heads), small.interleaved_to_half_split(rows, heads))
