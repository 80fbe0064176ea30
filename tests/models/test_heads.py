"""What makes keys and values of latent vectors, in the blocks of a file: beside its widened weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from sapper.models.batch import Fed, Pick
from sapper.models.deepseek.config import DeepseekConfig
from sapper.models.deepseek.heads import DenseHeads, KeyBlocks, ValueBlocks
from sapper.models.deepseek.model import load_model
from sapper.models.deepseek.session import Session
from sapper.models.deepseek.untrained_gguf import write_gguf
from sapper.models.k_matrix import KMatrix, RawK
from sapper.models.linear import Blocks
from sapper.models.raw_blocks import RawBlocks
from sapper.models.sampling import Sampling
from sapper.models.weights import Loader
from sapper.models.workspace import Workspace
from sapper.runtime.buffers import Arena
from sapper.runtime.packed import Packed
from sapper.runtime.program import Program, Rows, Variable
from sapper.targets import host_target

from .test_k_matrix import SIZES, random_bytes
from .test_untrained_gguf import config_of as small_config
from .test_untrained_gguf import written_anew

HEADS, RANK, FEATURES, TURNED = 3, 256, 64, 32
FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
Kind = gguf.GGMLQuantizationType


def raw_of(kind: str, rows: int, columns: int) -> tuple[Any, np.ndarray]:
    """Random rows of a format as a loader takes them from a file, and in f32."""
    if kind in SIZES:
        stored: np.ndarray = random_bytes(kind, rows, columns).reshape(rows, -1)
    else:
        values = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)
        stored = gguf.quants.quantize(values, Kind[kind])
    found = (RawK if kind in SIZES else RawBlocks).parse(memoryview(stored.tobytes()), (rows, columns), kind)
    return found, gguf.quants.dequantize(stored, Kind[kind])


def kept_exactly(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Activations that no quantisation rounds: whole numbers, with 127 in each group."""
    x = random.integers(-127, 128, (rows, columns)).astype(np.float32)
    x[:, ::32] = 127
    return x


def run(steps: Any, rows: int) -> None:
    Program(steps, threads=2)(**({"rows": rows} if rows > 1 else {}))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind", FORMATS)
def test_queries_are_absorbed_by_blocks(kind: str, rows: int) -> None:
    """Behind what meets the keys a head's query has features that turn. Several rows lie in longer ones."""
    raw, wide = raw_of(kind, HEADS * RANK, FEATURES)
    keys = KeyBlocks(raw.together([raw], Arena(), False), HEADS)
    assert keys.size == wide.size and keys.nbytes == keys.together.nbytes
    random, size = np.random.default_rng(1), FEATURES + TURNED
    x = kept_exactly(random, 7, HEADS * size + 32)[:, : HEADS * size]
    y = np.full((7, HEADS * RANK), np.nan, np.float32)
    count = Variable("rows", 7)
    run(keys.absorb(*((x[:1], y[:1]) if rows == 1 else (Rows(x, count), Rows(y, count))), Workspace(FEATURES)), rows)
    queries = x[:rows].reshape(rows, HEADS, size)[..., :FEATURES].astype(np.float64)
    wanted = np.einsum("mhd,hcd->mhc", queries, wide.reshape(HEADS, RANK, FEATURES)).reshape(rows, -1)
    np.testing.assert_allclose(y[:rows], wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    assert np.isnan(y[rows:]).all()


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind", [*FORMATS, *SIZES])
def test_values_are_projected_by_blocks(kind: str, rows: int) -> None:
    raw, wide = raw_of(kind, HEADS * FEATURES, RANK)
    values = ValueBlocks(raw.together([raw], Arena(), False), HEADS)
    x = kept_exactly(np.random.default_rng(1), 7, HEADS * RANK)
    y, count = np.full((7, HEADS * FEATURES), np.nan, np.float32), Variable("rows", 7)
    run(values.project(*((x[:1], y[:1]) if rows == 1 else (Rows(x, count), Rows(y, count))), Workspace(RANK)), rows)
    found = x[:rows].reshape(rows, HEADS, RANK).astype(np.float64)
    wanted = np.einsum("mhc,hvc->mhv", found, wide.reshape(HEADS, FEATURES, RANK)).reshape(rows, -1)
    np.testing.assert_allclose(y[:rows], wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    assert np.isnan(y[rows:]).all()


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind", [*FORMATS, *SIZES])
def test_values_of_a_prompt_are_made_by_blocks(kind: str, rows: int) -> None:
    """Of all heads at once, into longer rows."""
    raw, wide = raw_of(kind, HEADS * FEATURES, RANK)
    values = ValueBlocks(raw.together([raw], Arena(), False), HEADS)
    assert values.quantises
    x = kept_exactly(np.random.default_rng(1), 7, RANK)
    y, count = np.full((7, HEADS * FEATURES + 16), np.nan, np.float32), Variable("rows", 7)
    steps = values.expand(Rows(x, count), Rows(y[:, :-16], count), Workspace(RANK))
    Program(steps, threads=2)(rows=rows)
    wanted = x[:rows].astype(np.float64) @ wide.astype(np.float64).T
    np.testing.assert_allclose(y[:rows, :-16], wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    assert np.isnan(y[rows:]).all() and np.isnan(y[:, -16:]).all()


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("kind", [*FORMATS, *SIZES])
def test_rows_are_widened_to_bf16(kind: str, rounded: bool) -> None:
    """Those that products of bf16 read are packed, where these take pairs."""
    raw, wide = raw_of(kind, HEADS * FEATURES, RANK)
    values = ValueBlocks(raw.together([raw], Arena(), False), HEADS)
    found, steps = values.rows(rounded, Workspace(RANK))
    run(steps, 1)
    assert isinstance(found, Packed) == (rounded and host_target().has("avx512_bf16"))
    np.testing.assert_array_equal(
        found.unpack() if isinstance(found, Packed) else found, wide.astype(ml_dtypes.bfloat16))
    if kind in FORMATS:
        raw, wide = raw_of(kind, HEADS * RANK, FEATURES)
        found, steps = KeyBlocks(raw.together([raw], Arena(), False), HEADS).rows(rounded, Workspace(RANK))
        run(steps, 1)
        turned = wide.reshape(HEADS, RANK, FEATURES).swapaxes(1, 2).reshape(-1, RANK)
        np.testing.assert_array_equal(found, turned.astype(ml_dtypes.bfloat16))


def config_of(**changes: Any) -> DeepseekConfig:
    return small_config(**{"kv_lora_rank": RANK, "qk_nope_head_dim": FEATURES, "qk_rope_head_dim": TURNED,
                           "v_head_dim": FEATURES, **changes})


def in_formats(path: Path, kinds: Mapping[str, str], config: DeepseekConfig, together: bool) -> None:
    """Write a file anew with tensors, by a part of their names, in other formats. together: keys and values in one
    tensor, a head's after the other's, as older files have them."""
    def wide(tensor: Any) -> np.ndarray:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).reshape(shape)

    with written_anew(path) as (source, writer):
        found = {tensor.name: (wide(tensor), tensor.tensor_type) for tensor in source.tensors}
        if together:
            for layer in range(config.layers):
                keys, values = (found.pop(f"blk.{layer}.attn_{part}_b.weight")[0] for part in "kv")
                rows = np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(-1, config.key_rank)
                found[f"blk.{layer}.attn_kv_b.weight"] = rows, Kind.F32
        for name, (values, was) in found.items():
            kind = next((kind for part, kind in kinds.items() if part in name), None)
            if kind in SIZES:
                raw = random_bytes(kind, values.size // values.shape[-1], values.shape[-1], len(name))
                writer.add_tensor(name, raw.reshape(*values.shape[:-1], -1), raw_dtype=Kind[kind])
            elif kind is None and was == Kind.F32:
                writer.add_tensor(name, values)
            else:
                chosen = was if kind is None else Kind[kind]
                writer.add_tensor(name, gguf.quants.quantize(values, chosen).view(np.uint8), raw_dtype=chosen)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("kinds", "together", "changes", "held"), [
    ({"attn_k_b": "Q4_0", "attn_v_b": "Q4_0"}, False, {}, (KeyBlocks, Blocks)),
    ({"attn_k_b": "Q5_0", "attn_v_b": "Q4_K"}, False, {"q_lora_rank": None}, (KeyBlocks, KMatrix)),
    ({"attn_k_b": "Q8_0", "attn_v_b": "Q6_K"}, False, {}, (KeyBlocks, KMatrix)),
    ({"attn_kv_b": "Q8_0"}, True, {}, (DenseHeads, Blocks)),
    ({"attn_kv_b": "Q4_K"}, True, {}, (DenseHeads, KMatrix)),
    ({"attn_k_b": "Q8_0"}, False, {"qk_rope_head_dim": 16}, (DenseHeads, None)),  # 80 features part within a block
])
def test_a_model_reads_them_as_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: dict[str, str], together: bool, changes: dict[str, Any],
    held: tuple[Any, Any],
) -> None:
    """Beside the same file with these widened at load, as "file-f32" has them: one token rounds its queries, and what
    they find, to 8 bits, and so does each of a batch; of a prompt all is the same where the processor multiplies pairs
    of bf16, else the latent vectors that make values are rounded."""
    path, config = tmp_path / "model.gguf", config_of(**changes)
    write_gguf(path, config)
    in_formats(path, {**kinds, "attn_output": "Q8_0"}, config, together)
    blocks = load_model(path, "file")
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "quantises", False)
        wide = load_model(path, "file")
    attention, dense = (model.weights.layers[1].attention for model in (blocks, wide))
    assert isinstance(attention.keys, held[0]) and isinstance(dense.keys, DenseHeads)
    assert isinstance(attention.values, ValueBlocks if held[1] else DenseHeads)
    assert held[1] is None or isinstance(attention.values.together, held[1])
    assert isinstance(dense.values, DenseHeads) and dense.values.size == attention.values.size
    sizes = [one.keys.nbytes + one.values.nbytes for one in (attention, dense)]
    assert sizes[0] < sizes[1] == 2 * (dense.keys.size + dense.values.size) or not held[1]
    assert wide.weights.step_bytes - blocks.weights.step_bytes == config.layers * (sizes[1] - sizes[0])
    found = []
    for model in (blocks, wide):
        session = model.session(64, threads=2)
        with monkeypatch.context() as patch:
            patch.setattr(Session, "shortest_run", 2)   # or as few would attend absorbed, as one does
            session.feed([5, 17, 200, 8])
        chunk = session.logits.copy()
        session.feed([9])
        batch = model.batch(2, 64, threads=2)
        batch.table[1] = np.arange(batch.table.shape[1]) + batch.table.shape[1]
        fed = [Fed(token, slot, i) for slot in (0, 1) for i, token in enumerate([5, 17, 200, 8, 9])]
        batch.step(fed, [Pick(4, Sampling(), 0.0), Pick(9, Sampling(), 0.0)])
        found.append((chunk, session.logits.copy(), *batch.step_logits[:2].copy()))
    if Workspace(1, 1).packs_pairs():
        np.testing.assert_allclose(found[0][0], found[1][0], rtol=0, atol=1e-5 * np.abs(found[1][0]).max())
    for logits, wanted in zip(*found, strict=True):
        cosine = logits @ wanted / np.linalg.norm(logits) / np.linalg.norm(wanted)
        assert cosine >= 0.9997
