"""Tensors in fp8 with scales for blocks of 128 x 128, as DeepSeek-V3's checkpoints hold them.

In: the tensors of a directory and its config. Out: tensors without the scales, of which those that had some are
`ScaledEntry`. Holds: they are made wide by a kernel of ours (sapper/kernels/fp8.py) when they are read, or used as they
are (scaled_matrix.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.buffers import empty
from .errors import ModelError
from .safetensors_file import TensorEntry

Array = np.ndarray[Any, np.dtype[Any]]
SCALE = "_scale_inv"
FP8 = "F8_E4M3"
BLOCK = 128
"""Rows and columns that share a scale (sapper/kernels/fp8.py, imported where a matrix is read)."""


@dataclass(frozen=True, slots=True)
class ScaledEntry:
    """A matrix of fp8 numbers, and the scales of its blocks."""

    where: str
    weight: TensorEntry
    scale: TensorEntry

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        """What it takes in the file."""
        return self.weight.nbytes + self.scale.nbytes

    def read(self) -> Array:
        """Its elements, scaled, as f32. Raises as `parts` does."""
        from ..kernels import fp8

        raw, scale = self.parts()
        wide = empty(self.shape)
        fp8.dequantize_fp8(raw, scale, wide)
        return wide

    def parts(self) -> tuple[Array, Array]:
        """Its bits and the scales. Raises ModelError for another format, or scales that do not fit."""
        place = f"{self.where}, tensor {self.weight.name}"
        if self.weight.type != FP8 or len(self.shape) != 2 or len(self.weight.data) != self.shape[0] * self.shape[1]:
            raise ModelError(place, f"{self.weight.type} {self.shape}", f"a matrix of {FP8}", "get the file again")
        wanted = tuple(-(-extent // BLOCK) for extent in self.shape)
        if self.scale.shape != wanted:
            raise ModelError(f"{place}{SCALE}", f"shape {self.scale.shape}", f"shape {wanted}", "get the file again")
        raw = np.frombuffer(self.weight.data, np.uint8).reshape(self.shape)
        return raw, np.ascontiguousarray(self.scale.read())


def with_scales(
    where: str, tensors: Mapping[str, TensorEntry], config: Mapping[str, Any]
) -> Mapping[str, TensorEntry | ScaledEntry]:
    """The tensors of a model. Raises ModelError for a quantisation that is not fp8 in blocks of 128 x 128."""
    settings = config.get("quantization_config")
    if settings is None:
        return tensors
    place = f"{where}, key quantization_config"
    if not isinstance(settings, dict):
        raise ModelError(place, repr(settings)[:80], "an object or null")
    block = [BLOCK, BLOCK]
    for key, known in (("quant_method", ("fp8",)), ("fmt", ("e4m3", None)), ("weight_block_size", (block,))):
        if settings.get(key) not in known:
            expected = " or ".join(repr(one) for one in known if one is not None)
            raise ModelError(f"{place}, {key}", repr(settings.get(key))[:80], expected, "take another checkpoint")
    scaled: dict[str, TensorEntry | ScaledEntry] = {}
    for name, entry in tensors.items():
        scale = tensors.get(name + SCALE)
        if not name.endswith(SCALE):
            scaled[name] = entry if scale is None else ScaledEntry(where, entry, scale)
    return scaled
