"""The rotary embedding's angles, as a model's metadata describes them.

In: the base and the scaling. Out: `Rope`, whose `tables` gives cosine and sine for each position. Holds: computed in
float64, rounded once to f32.

    linear   every frequency divided by the factor
    llama3   low frequencies divided by the factor, high ones kept, with a ramp between two wavelengths (Llama 3.1)
    yarn     pairs that turn often in the original context kept, those that hardly turn divided by the factor, with a
             ramp between; tables and scores are scaled as well (Peng et al., 2023; DeepSeek's published code)

Tables of yarn are multiplied by what the factor says, unless config.json says otherwise in "attention_factor", and by
"attn_factor". The latter is that of vLLM and of GGUF; DeepSeek-R1-0528-Qwen3-8B undoes the former with it.
transformers, which does not know it, has tables there that are 1.14 times as large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.rope_yarn import mscale, ramp
from .errors import ModelError
from .numbers import MAX_POSITIONS, Numbers

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How frequencies are changed for contexts longer than those of the training.

    kind: "none", "linear", "llama3" or "yarn". factor: of the context's length. original_positions: of the training.
    low_factor, high_factor: of llama3. fast, slow: turns within the original context above which a pair is kept, and
    below which it is divided, of yarn. table_mscale, score_mscale: "mscale" and "mscale_all_dim" of yarn.
    stated: its "attention_factor", 0 where there is none. times: its "attn_factor".
    """

    kind: str = "none"
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_positions: int = 8192
    fast: float = 32.0
    slow: float = 1.0
    table_mscale: float = 0.0
    score_mscale: float = 0.0
    stated: float = 0.0
    times: float = 1.0

    def frequencies(self, base: float, pairs: int) -> Array:
        """The turn per position of each pair of features, in radians, float64, [pairs]."""
        frequency = base ** (-np.arange(pairs, dtype=np.float64) / pairs)
        if self.kind == "none":
            return frequency
        if self.kind == "linear":
            return frequency / self.factor
        if self.kind == "llama3":
            wavelengths = self.original_positions * frequency / (2 * math.pi)
            keep = np.clip((wavelengths - self.low_factor) / (self.high_factor - self.low_factor), 0.0, 1.0)
            return frequency * keep + frequency / self.factor * (1.0 - keep)
        low, high = ramp(base, pairs, self.original_positions, self.fast, self.slow)
        divide = np.clip((np.arange(pairs) - low) / max(high - low, 1e-3), 0.0, 1.0)
        return frequency * (1.0 - divide) + frequency / self.factor * divide

    @property
    def table_factor(self) -> float:
        """What cosine and sine are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        if self.stated:
            return self.stated * self.times
        if self.table_mscale and self.score_mscale:
            return mscale(self.factor, self.table_mscale) / mscale(self.factor, self.score_mscale) * self.times
        return mscale(self.factor) * self.times

    @property
    def score_factor(self) -> float:
        """What the scores of DeepSeek's attention are multiplied by, besides 1 / sqrt(features of a head)."""
        return mscale(self.factor, self.score_mscale) ** 2 if self.kind == "yarn" else 1.0


@dataclass(frozen=True, slots=True)
class Rope:
    """base: of the angles' frequencies. pairs: of features that turn in each head."""

    base: float
    pairs: int
    scaling: RopeScaling = RopeScaling()

    def tables(self, positions: int, factors: Array | None = None) -> tuple[Array, Array]:
        """Cosine and sine, f32, [positions, pairs]. factors [pairs]: what the file itself says that each frequency is
        divided by, in place of the scaling.
        """
        if factors is None:
            frequency = self.scaling.frequencies(self.base, self.pairs)
        else:
            frequency = RopeScaling().frequencies(self.base, self.pairs) / factors.astype(np.float64)
        angle = np.arange(positions, dtype=np.float64)[:, None] * frequency
        size = self.scaling.table_factor
        return (np.cos(angle) * size).astype(np.float32), (np.sin(angle) * size).astype(np.float32)


def rope_from_json(values: Mapping[str, Any], where: str, pairs: int, kinds: tuple[str, ...]) -> Rope:
    """The rotary embedding that config.json describes, in "rope_theta" and "rope_scaling" or, as newer files have it,
    both in "rope_parameters". kinds: of the scalings that the model knows, besides "default".

    Raises ModelError for a scaling of another kind, and for numbers that are missing or absurd.
    """
    key = "rope_parameters" if values.get("rope_parameters") is not None else "rope_scaling"
    place, entry = f"{where}, key {key}", values.get(key)
    if entry is not None and not isinstance(entry, dict):
        raise ModelError(place, repr(entry)[:80], "an object or null")
    base_source = Numbers(place, entry) if entry and "rope_theta" in entry else Numbers(where, values)
    base = base_source.real("rope_theta", 1.0 + 1e-6, 1e12, 10000.0)
    if entry is None:
        return Rope(base, pairs)
    kind = entry.get("rope_type", entry.get("type", "default" if key == "rope_parameters" else None))
    if kind == "default":
        return Rope(base, pairs)
    if kind not in kinds:
        known = ["default", *kinds]
        expected = ", ".join(repr(name) for name in known[:-1]) + f" or {known[-1]!r}"
        raise ModelError(place, repr(kind)[:80], expected)
    source = Numbers(place, entry)
    factor = source.real("factor", 1e-3, 1e6)
    if kind == "linear":
        return Rope(base, pairs, RopeScaling("linear", factor))
    original = source.whole("original_max_position_embeddings", MAX_POSITIONS)
    if kind == "llama3":
        low, high = source.real("low_freq_factor", 0.0, 1e6), source.real("high_freq_factor", 0.0, 1e6)
        if high <= low:
            raise ModelError(place, f"high_freq_factor {high:g} <= low_freq_factor {low:g}", "the high one larger")
        return Rope(base, pairs, RopeScaling("llama3", factor, low, high, original))
    fast, slow = source.real("beta_fast", 1e-3, 1e6, 32.0), source.real("beta_slow", 1e-3, 1e6, 1.0)
    if fast <= slow:
        raise ModelError(place, f"beta_fast {fast:g} <= beta_slow {slow:g}", "the fast one larger")
    if entry.get("truncate") not in (None, True):
        raise ModelError(f"{place}, truncate", repr(entry["truncate"])[:80], "no such key")
    stated = 0.0 if entry.get("attention_factor") is None else source.real("attention_factor", 1e-3, 1e3)
    return Rope(base, pairs, RopeScaling(
        "yarn", factor, original_positions=original, fast=fast, slow=slow,
        table_mscale=source.real("mscale", 0.0, 100.0, 0.0),
        score_mscale=source.real("mscale_all_dim", 0.0, 100.0, 0.0),
        stated=stated, times=source.real("attn_factor", 1e-3, 1e3, 1.0),
    ))


def rope_from_gguf(source: Numbers, kind: str, pairs: int) -> Rope:
    """The rotary embedding of an architecture in a GGUF's metadata; what Llama 3.1 does to its frequencies is a tensor
    there. llama.cpp does not read "yarn_attn_factor" of these architectures, nor does this. Raises ModelError as
    `rope_from_json` does."""
    key = f"{kind}.rope.{{}}".format
    base = source.real(key("freq_base"), 1.0 + 1e-6, 1e12, 10000.0)
    scaling = source.one_of(key("scaling.type"), ("none", "linear", "yarn"), "none")
    if scaling == "none":
        return Rope(base, pairs)
    factor = source.real(key("scaling.factor"), 1e-3, 1e6)
    if scaling == "linear":
        return Rope(base, pairs, RopeScaling("linear", factor))
    for name, usual in (("ext_factor", 1.0), ("beta_fast", 32.0), ("beta_slow", 1.0)):
        place = key(f"scaling.yarn_{name}")
        if source.real(place, 0.0, 1e6, usual) != usual:
            raise ModelError(f"{source.where}, key {place}", repr(source.values[place])[:80], f"{usual:g}")
    return Rope(base, pairs, RopeScaling(
        "yarn", factor,
        original_positions=source.whole(key("scaling.original_context_length"), MAX_POSITIONS),
        times=source.real(key("scaling.attn_factor"), 1e-3, 1e3, 1.0),
    ))
