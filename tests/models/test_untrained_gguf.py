"""DeepSeek models with random weights as GGUF files, and such files with their matrices in other formats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from sapper.models.deepseek.config import DeepseekConfig, from_gguf, from_json
from sapper.models.deepseek.model import load_model
from sapper.models.deepseek.untrained import SMALL_V2, V2_LITE
from sapper.models.deepseek.untrained_gguf import write_gguf
from sapper.models.gguf_file import GgufFile
from sapper.models.k_matrix import KExperts
from sapper.models.mixture import MixtureWeights

from .test_k_matrix import SIZES, random_bytes

SMALL = {**SMALL_V2, "vocab_size": 320, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256,
         "num_hidden_layers": 2, "num_attention_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "n_shared_experts": 1, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
         "v_head_dim": 32, "max_position_embeddings": 256}


def config_of(**changes: object) -> DeepseekConfig:
    return from_json({**SMALL, **changes}, "the test")


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"n_shared_experts": 2, "norm_topk_prob": True}])
def test_what_is_written_is_read(tmp_path: Path, changes: dict[str, object]) -> None:
    """The config is the same; logits follow from the seed alone."""
    config, path = config_of(**changes), tmp_path / "model.gguf"
    write_gguf(path, config, seed=3)
    read = from_gguf(GgufFile(path).metadata, "the file")
    assert replace(read, epsilon=config.epsilon) == config and np.isclose(read.epsilon, config.epsilon)  # f32 there
    found = []
    for seed in (3, 3, 4):
        write_gguf(path, config, seed)
        session = load_model(path, "f32").session(32)
        session.feed([5, 17, 200, 8])
        found.append(session.logits.copy())
    assert np.isfinite(found[0]).all() and 0.1 < found[0].std() < 10
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


def test_what_there_are_no_words_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found scaled angles"):
        write_gguf(tmp_path / "model.gguf", from_json(V2_LITE, "the test"))
    assert not (tmp_path / "model.gguf").exists()


@contextmanager
def written_anew(path: Path) -> Iterator[tuple[gguf.GGUFReader, gguf.GGUFWriter]]:
    """A file, and what writes it anew with its metadata: the tensors are to be added."""
    source = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "deepseek2")
    for field in source.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    yield source, writer
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").replace(path)


def with_experts_in(kind: str, path: Path) -> None:
    """Give a file's experts random bytes of that format; everything else is as it was."""
    with written_anew(path) as (source, writer):
        for seed, tensor in enumerate(source.tensors):
            name, rows = tensor.name, int(np.prod(tensor.shape[1:]))
            if "ffn_" in name and "inp" not in name and "norm" not in name and "blk.1" in name:
                raw = random_bytes(kind, rows, int(tensor.shape[0]), seed)
                shape = (*(int(n) for n in reversed(tensor.shape[1:])), raw[0].size)
                writer.add_tensor(name, raw.reshape(shape), raw_dtype=gguf.GGMLQuantizationType[kind])
            else:
                writer.add_tensor(name, np.array(tensor.data), raw_dtype=tensor.tensor_type)


@pytest.mark.parametrize("kind", SIZES)
def test_experts_in_super_blocks_stay_so(tmp_path: Path, kind: str) -> None:
    """As a GGUF has them, those of a layer in one tensor; beside the same file widened to f32."""
    path = tmp_path / "model.gguf"
    write_gguf(path, config_of())
    with_experts_in(kind, path)
    blocks, wide = load_model(path, "file"), load_model(path, "f32")
    mixture = blocks.weights.layers[1].feed_forward
    assert isinstance(mixture, MixtureWeights)
    assert all(isinstance(one, KExperts) for one in (mixture.gate, mixture.up, mixture.down))
    found = []
    for model in (blocks, wide):
        session = model.session(64)
        session.feed([5, 17, 200, 8])
        chunk = session.logits.copy()
        session.feed([9])
        found.append((chunk, session.logits.copy()))
    for logits, wanted in zip(*found, strict=True):
        assert logits @ wanted / np.linalg.norm(logits) / np.linalg.norm(wanted) >= 0.9995
