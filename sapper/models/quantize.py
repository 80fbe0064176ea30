"""Quantises a model's matrices in groups, and writes them as a directory that `load_model` reads.

In: a checkpoint of any kind. Out: safetensors files, `config.json` and what else the model needs (grouped.py has their
format, written.py writes them). Holds: tensors are read, quantised and written one by one.

Of each group the scale (and minimum) is searched for that leaves the least squared error: ranges somewhat smaller than
what the group spans are tried, each followed by the least-squares fit to the quants that it gives, as f16 holds it.
Routers, and what DeepSeek makes keys and values with, stay as they are; embeddings and outputs take 8 bits in any case.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.quantized import BLOCKS, PANEL, Form
from .checkpoint import Checkpoint, Entry
from .errors import ModelError
from .grouped import dequantized, part_names, part_shapes
from .safetensors_file import DTYPES
from .safetensors_file import TensorEntry as SafetensorsEntry
from .written import OWN, SHARD_BYTES, Piece, check_new, write_directory

Array = np.ndarray[Any, np.dtype[Any]]
KEPT = ("mlp.gate.weight", "ffn_gate_inp.weight", "kv_b_proj.weight", "attn_kv_b.weight", "attn_k_b.weight",
        "attn_v_b.weight")
"""How the names of matrices end that stay as they are."""
FINE = ("embed_tokens.weight", "lm_head.weight", "token_embd.weight")
"""And of those that take 8 bits: every token's logits come from them. GGUF's output has no more of a name than this."""
OUTPUT = "output.weight"
SHRINKS = {4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.7), 8: (1.0,)}
"""By bits: which parts of a group's range are tried."""
ROWS_AT_ONCE = 256
LARGEST_F16 = 65504.0


def _fit(form: Form, x: Array, q: Array) -> tuple[Array, ...]:
    """The scale (and minimum) of each block that leaves the least squared error with these quants, as f16."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if not form.minimum:
            centred = q - np.float32(form.offset)
            scale = (centred * x).sum(-1) / np.square(centred).sum(-1)
            return (np.nan_to_num(scale, nan=0.0).astype(np.float16),)
        middle = q.mean(-1), x.mean(-1)
        away = q - middle[0][..., None]
        scale = np.nan_to_num((away * x).sum(-1) / np.square(away).sum(-1), nan=0.0).astype(np.float16)
        return scale, (middle[1] - scale.astype(np.float32) * middle[0]).astype(np.float16)


def _assign(form: Form, x: Array, scales: tuple[Array, ...]) -> Array:
    """The quant nearest to each weight, as whole f32 numbers."""
    scale = scales[0].astype(np.float32)[..., None]
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = np.where(scale != 0, 1 / scale, np.float32(0))
        q = (x - scales[1].astype(np.float32)[..., None]) * inverse if form.minimum else x * inverse + form.offset
    found: Array = np.clip(np.rint(q), 0, (1 << form.bits) - 1)
    return found


def quantized_rows(form: Form, rows: Array) -> tuple[Array, ...]:
    """Rows [n, K] in f32 as quants [n, B, bytes], scale and perhaps minimum [n, B] in f16; K a multiple of the block,
    weights such that f16 can hold their scales."""
    x = rows.reshape(len(rows), -1, form.block)
    levels = (1 << form.bits) - 1
    low, high = x.min(-1), x.max(-1)
    largest = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0]
    best: tuple[Array, ...] = ()
    least = np.full(low.shape, np.inf, np.float32)
    for shrink in SHRINKS[form.bits]:
        with np.errstate(over="ignore"):
            start: tuple[Array, ...]
            if form.minimum:
                margin = (high - low) * np.float32((1 - shrink) / 2)
                start = ((high - low - 2 * margin) / levels).astype(np.float16), (low + margin).astype(np.float16)
            else:  # the largest magnitude, of whichever sign, is -offset: there is one more level on that side
                start = ((largest * np.float32(-shrink / form.offset)).astype(np.float16),)
        tried: list[tuple[Array, ...]] = [start, _fit(form, x, _assign(form, x, start))]
        for scales in tried:
            q = _assign(form, x, scales)
            wide = q - np.float32(form.offset)
            with np.errstate(over="ignore", invalid="ignore"):
                wide = wide * scales[0].astype(np.float32)[..., None]
                if form.minimum:
                    wide += scales[1].astype(np.float32)[..., None]
                error = np.square(x - wide).sum(-1)
            better = (error < least) | ~np.isfinite(least)
            parts = q.astype(np.uint8), *scales
            best = parts if not best else tuple(
                np.where(better[..., None] if new.ndim == 3 else better, new, old)
                for new, old in zip(parts, best, strict=True))
            least = np.where(better, error, least)
    q8 = best[0]
    if form.bits == 4:
        half = form.block // 2
        q8 = q8[:, :, :half] | q8[:, :, half:] << 4
    return q8, *best[1:]


@dataclass(frozen=True, slots=True)
class Settings:
    """bits: 4 or 8. group: weights that share a scale, fewer where a row's length asks for it. minimum: whether they
    share that too (None: with 4 bits)."""

    bits: int
    group: int = 64
    minimum: bool | None = None

    def form_of(self, name: str, shape: tuple[int, ...]) -> Form | None:
        """How a tensor is stored; None as it is."""
        if len(shape) < 2 or shape[-2] % PANEL or shape[-1] % BLOCKS[0] or name.endswith(KEPT):
            return None
        block = next(size for size in reversed(BLOCKS) if size <= self.group and shape[-1] % size == 0)
        bits = 8 if name == OUTPUT or name.endswith(FINE) else self.bits
        return Form(bits, block, bits == 4 if self.minimum is None else self.minimum)


@dataclass(slots=True)
class Summary:
    """tensors, matrices: how many there are, and were quantised. before_bytes, after_bytes: of all tensors. weights: in
    the matrices; error: root of their squared error over that of their squares. forms: how many matrices each has."""

    tensors: int = 0
    matrices: int = 0
    before_bytes: int = 0
    after_bytes: int = 0
    weights: int = 0
    squared_error: float = 0.0
    squares: float = 0.0
    forms: dict[str, int] | None = None

    @property
    def error(self) -> float:
        return math.sqrt(self.squared_error / self.squares) if self.squares else 0.0


def quantize_checkpoint(
    checkpoint: Checkpoint, target: Path, settings: Settings, *, shard_bytes: int = SHARD_BYTES, workers: int = 2,
    report: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Summary:
    """Write a checkpoint with its matrices quantised as a directory `target`, which must not exist.

    report: called before each tensor with the number of bytes that were written, will be, and its name.
    Raises ModelError for a checkpoint that can't be read or a target that can't be written; then nothing is left.
    """
    check_new(target)
    summary = Summary(forms={})
    pieces = [_piece(name, entry, settings, summary, workers) for name, entry in checkpoint.tensors.items()]
    config = OWN if checkpoint.gguf else {**checkpoint.metadata, **OWN}
    summary.after_bytes = write_directory(
        checkpoint, target, config, pieces, shard_bytes=shard_bytes, report=report)
    return summary


def _piece(name: str, entry: Entry, settings: Settings, summary: Summary, workers: int) -> Piece:
    summary.tensors += 1
    summary.before_bytes += _stored_bytes(entry)
    form = settings.form_of(name, entry.shape)
    if form is None:
        if isinstance(entry, SafetensorsEntry):
            return Piece(name, ((name, _known(entry), entry.shape),), lambda: (entry.data,))
        dtype = "F32" if len(entry.shape) < 2 or name.endswith(KEPT) else "BF16"
        return Piece(name, ((name, dtype, entry.shape),), lambda: (
            np.ascontiguousarray(entry.read().astype(DTYPES[dtype])).view(np.uint8).data,))
    shapes, chosen = part_shapes(entry.shape, form), form
    tensors = tuple(zip(part_names(name, form), ("U8", "F16"), shapes, strict=True))
    summary.matrices += 1
    summary.weights += math.prod(entry.shape)
    assert summary.forms is not None
    summary.forms[form.name] = summary.forms.get(form.name, 0) + 1
    return Piece(name, tensors, lambda: _quantized(name, entry, chosen, summary, workers))


def _known(entry: SafetensorsEntry) -> str:
    if entry.type not in DTYPES:
        raise ModelError(f"tensor {entry.name}", f"dtype {entry.type}", f"one of {', '.join(DTYPES)}",
                         "take a checkpoint whose weights are floats")
    return entry.type


def _stored_bytes(entry: Any) -> int:
    sources = [getattr(entry, part) for part in ("weight", "quants", "scale", "scales") if hasattr(entry, part)]
    return sum(len(part.source) for part in sources or [entry])


def _quantized(name: str, entry: Entry, form: Form, summary: Summary, workers: int) -> tuple[Any, ...]:
    """Bytes of the quants and of the scales."""
    wide = entry.read().reshape(-1, entry.shape[-1])
    if not np.isfinite(wide).all():
        raise ModelError(f"tensor {name}", "weights that are infinite or no numbers", "finite weights",
                         "get the model again")

    def some(first: int) -> tuple[Array, Array, float, float]:
        rows = wide[first : first + ROWS_AT_ONCE]
        largest, most = float(np.abs(rows).max(initial=0.0)), LARGEST_F16 * (form.offset or 1)
        if largest > most:
            raise ModelError(f"tensor {name}", f"weights up to {largest:g}",
                             f"none beyond {most:g}, what scales in f16 can make", "take another checkpoint")
        quants, *scales = quantized_rows(form, rows)
        error = dequantized(form, quants, *scales) - rows
        return quants, np.stack(scales, axis=-1), float(np.square(error).sum()), float(np.square(rows).sum())

    with ThreadPoolExecutor(workers) as pool:
        made = list(pool.map(some, range(0, len(wide), ROWS_AT_ONCE)))
    summary.squared_error += sum(part[2] for part in made)
    summary.squares += sum(part[3] for part in made)
    return tuple(np.ascontiguousarray(np.concatenate([part[i] for part in made])).view(np.uint8).data for i in (0, 1))
