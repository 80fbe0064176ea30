"""Frequencies of the rotary embedding, and the row order of the two kinds of file."""

import math

import numpy as np
import pytest

from sapper.models.llama.config import LlamaConfig, RopeScaling, from_json
from sapper.models.llama.weights import half_split_rows

from . import small


def config(scaling: RopeScaling) -> LlamaConfig:
    return LlamaConfig(2, 64, 96, 4, 2, 16, 100, 131072, 500000.0, 1e-5, scaling)


def test_plain_frequencies_fall_geometrically() -> None:
    found = config(RopeScaling()).frequencies()
    np.testing.assert_allclose(found, [500000.0 ** (-i / 8) for i in range(8)], rtol=1e-12)
    np.testing.assert_allclose(config(RopeScaling("linear", 4.0)).frequencies(), found / 4, rtol=1e-12)


def test_llama3_frequencies_are_those_of_its_paper() -> None:
    """Wavelengths below original / high stay, those above original / low are stretched, between them is a ramp."""
    factor, low, high, original = 8.0, 1.0, 4.0, 8192
    plain = config(RopeScaling()).frequencies()
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
    found = config(RopeScaling("llama3", factor, low, high, original)).frequencies()
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert (found < plain).any() and (found == plain).any()


def test_factors_of_the_file_come_first() -> None:
    factors = np.arange(1, 9, dtype=np.float32)
    plain = config(RopeScaling()).frequencies()
    np.testing.assert_allclose(config(RopeScaling("linear", 2.0)).frequencies(factors), plain / factors, rtol=1e-7)


def test_json_scaling_is_read() -> None:
    values = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}
    read = from_json({**small.JSON_CONFIG, "rope_scaling": values}, "here")
    assert read.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert from_json({**small.JSON_CONFIG, "rope_scaling": {"type": "default"}}, "here").rope_scaling == RopeScaling()
    assert from_json({**small.JSON_CONFIG, "head_dim": None}, "here").head_features == small.SIZE


@pytest.mark.parametrize("heads", [1, 3])
def test_rows_go_from_interleaved_to_half_split(heads: int) -> None:
    rows = np.arange(heads * 8 * 2).reshape(heads * 8, 2)
    np.testing.assert_array_equal(half_split_rows(rows, heads), small.interleaved_to_half_split(rows, heads))
