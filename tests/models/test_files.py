"""GGUF and safetensors files: what is read, and that a broken one gives ModelError and nothing else."""

import json
import math
import shutil
import struct
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from sapper.models.errors import ModelError
from sapper.models.generate import Generation
from sapper.models.gguf_file import GgufFile, TensorEntry
from sapper.models.llama.model import load_model
from sapper.models.llama.weights import GGUF_NAMES, JSON_NAMES
from sapper.models.locate import find_model
from sapper.models.safetensors_file import SafetensorsDirectory

from . import small

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_gguf(tmp_path_factory.mktemp("files") / "small.gguf", small.random_weights())


def test_metadata_and_tensors_are_as_the_gguf_package_reads_them(gguf_path: Path) -> None:
    mine, reader = GgufFile(gguf_path), gguf.GGUFReader(gguf_path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert mine.metadata == fields
    assert list(mine.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        np.testing.assert_array_equal(mine.tensors[tensor.name].read(), tensor.data)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_formats_are_widened(tmp_path: Path, kind: str) -> None:
    """A quantised tensor comes back within half a step of its block."""
    form = gguf.GGMLQuantizationType[kind]
    weight = np.random.default_rng(1).standard_normal((6, 64)).astype(np.float32)
    path = small.write_gguf(tmp_path / "x.gguf", {"w": weight}, formats={"w": form})
    found = GgufFile(path).tensors["w"].read()
    assert found.dtype == np.float32 and found.shape == (6, 64)
    step = {"F16": 2**-10, "BF16": 2**-7, "Q8_0": 1 / 100, "Q5_0": 1 / 14, "Q4_0": 1 / 6, "Q4_1": 1 / 6}[kind]
    assert np.abs(found - weight).max() <= step * np.abs(weight).max()


def entry(kind: str, raw: bytes, elements: int) -> TensorEntry:
    return TensorEntry("w", (1, elements), int(gguf.GGMLQuantizationType[kind]), memoryview(raw))


def test_k_blocks_are_widened() -> None:
    """Blocks by hand, as ggml-common.h has them: Q4_K is d * scale * q - dmin * minimum, Q6_K d * scale * (q - 32)."""
    half = np.array([0.5, 0.25], dtype=np.float16).tobytes()
    scales = bytes([2, 2, 2, 2, 1, 1, 1, 1, 0x12, 0x12, 0x12, 0x12])  # 6-bit scales 2, minimums 1
    raw = half + scales + bytes([0x73]) * 128
    values = entry("Q4_K", raw, 256).read().reshape(8, 32)
    np.testing.assert_array_equal(values[0::2], 0.5 * 2 * 3 - 0.25)
    np.testing.assert_array_equal(values[1::2], 0.5 * 2 * 7 - 0.25)
    raw = bytes([0x21]) * 128 + bytes(64) + bytes([3] * 16) + np.array([0.5], dtype=np.float16).tobytes()
    values = entry("Q6_K", raw, 256).read().reshape(2, 4, 32)
    np.testing.assert_array_equal(values[:, :2], 0.5 * 3 * (1 - 32))
    np.testing.assert_array_equal(values[:, 2:], 0.5 * 3 * (2 - 32))


def test_a_format_that_cannot_be_widened_is_named() -> None:
    with pytest.raises(ModelError, match="format Q8_K"):
        entry("Q8_K", bytes(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_K][1]), 256).read()


@pytest.mark.parametrize(("name", "numbers", "reals", "strings"), [
    ("qwen2", {}, {}, {}),
    ("qwen3", {"llama.attention.key_length": 24, "llama.attention.value_length": 24, "llama.rope.dimension_count": 24,
               "llama.rope.scaling.original_context_length": 64},
     {"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.attn_factor": 1.25 / (1 + 0.1 * math.log(4))},
     {"llama.rope.scaling.type": "yarn"}),
    ("qwen3_moe", {"llama.attention.key_length": 16, "llama.attention.value_length": 16, "llama.expert_count": 8,
                   "llama.expert_used_count": 3, "llama.expert_feed_forward_length": 24}, {}, {}),
])
def test_a_qwen_is_the_same_in_both_kinds_of_file(
    tmp_path: Path, name: str, numbers: dict[str, int], reals: dict[str, float], strings: dict[str, str]
) -> None:
    """Its rows are not reordered for GGUF, as a Llama's are; queries, keys and values have biases, or norms; experts of
    a layer lie in one tensor. What GGUF multiplies tables of yarn by is a factor of what the context's growth makes of
    them, in f32."""
    source = SafetensorsDirectory(DATA / name)
    weights, taken = {}, set()
    for role, pattern in JSON_NAMES.items():
        for layer in range(2):
            names = [pattern.format(layer, expert) for expert in range(8 if "experts" in pattern else 1)]
            parts = [source.tensors[one].read() for one in names if one in source.tensors]
            if parts:
                weights[GGUF_NAMES[role].format(layer)] = np.stack(parts) if len(names) > 1 else parts[0]
                taken |= set(names)
    assert taken == set(source.tensors)
    path = small.write_gguf(
        tmp_path / "q.gguf", weights, architecture=name.replace("_", ""),
        strings={"tokenizer.ggml.pre": "deepseek-r1-qwen", **strings},
        numbers={"llama.context_length": 256, "llama.feed_forward_length": 80,
                 "llama.vocab_size": source.config["vocab_size"], **numbers},
        reals={"llama.rope.freq_base": 1e6, "llama.attention.layer_norm_rms_epsilon": 1e-6, **reals})
    tokens = np.load(DATA / f"{name}.npz")["tokens"].tolist()
    sessions = [load_model(one, "f32").session(64) for one in (path, DATA / name)]
    for session in sessions:
        session.feed(tokens)
    wanted = sessions[1].logits
    assert np.abs(sessions[0].logits - wanted).max() <= (1e-5 if reals else 0) * np.abs(wanted).max()


def test_a_mistral_is_a_llama_whose_window_limits_the_context(tmp_path: Path) -> None:
    """Up to its window every token sees all before it."""
    directory = small.write_directory(tmp_path / "checkpoint", small.random_weights())
    sessions = []
    for kind in ({}, {"model_type": "mistral", "sliding_window": 8}):
        (directory / "config.json").write_text(json.dumps({**small.JSON_CONFIG, **kind}))
        model = load_model(directory, "f32")
        sessions.append(model.session(8))
        sessions[-1].feed([5, 17, 200, 3, 99])
    np.testing.assert_array_equal(sessions[0].logits, sessions[1].logits)
    assert model.session().context == model.positions == 8
    for make in (model.session, partial(model.batch, 1)):
        with pytest.raises(ModelError, match="found 9 tokens; expected 1 to 8, the window that its attention slides"):
            make(9)
    with pytest.raises(ModelError, match="found 9 tokens; expected at most 8, the window"):
        Generation(model, [1] * 9, 1)


def test_a_model_in_several_files(tmp_path: Path, gguf_path: Path) -> None:
    weights = small.random_weights()
    small.write_gguf(tmp_path / "m.gguf", weights, most_tensors=9)
    first, second, third = sorted(tmp_path.glob("*.gguf"))
    assert first.name == "m-00001-of-00003.gguf"
    whole, parts = (load_model(path, "f32").session(8) for path in (gguf_path, first))
    for session in (whole, parts):
        session.feed([1, 2, 3])
    np.testing.assert_array_equal(whole.logits, parts.logits)
    with pytest.raises(ModelError, match=r"in 3 files; expected the first: NAME-00001-of-00003\.gguf"):
        load_model(second)
    renamed = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelError, match="expected the first: NAME-00001"):
        load_model(renamed)
    renamed.rename(first)
    raw = third.read_bytes()
    small.replace(third, second.read_bytes())
    with pytest.raises(ModelError, match=r"keys split\.no and split\.count: found others; expected 2 and 3"):
        load_model(first)
    small.replace(third, raw[: len(raw) - 1])
    with pytest.raises(ModelError, match=r"00003-of-00003.*the file is cut short"):
        load_model(first)
    third.unlink()
    with pytest.raises(ModelError, match=r"00003-of-00003.*a GGUF file"):
        load_model(first)


@pytest.mark.parametrize("count", [0, -1, 10_000, True])
def test_a_number_of_files_that_cannot_be(tmp_path: Path, count: int) -> None:
    raw = header(text(b"split.count"), struct.pack("<IB", 7, 1) if count is True else struct.pack("<Iq", 11, count),
                 keys=1)
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(ModelError, match=r"split\.count"):
        load_model(tmp_path / "m.gguf")


def test_bytes_that_are_no_utf8_survive(tmp_path: Path) -> None:
    raw = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IQ", 8, 2) + b"\xff\xc3"
    (tmp_path / "x.gguf").write_bytes(raw)
    assert GgufFile(tmp_path / "x.gguf").metadata["k"].encode("utf-8", "surrogateescape") == b"\xff\xc3"


def header(*parts: bytes, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + b"".join(parts)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, extents: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(extents)}QIQ", len(extents), *extents, kind, offset)


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "expected a GGUF file"),
    "magic": (b"GGML" + bytes(40), "first bytes b'GGML'"),
    "version": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
    "short": (b"GGUF\x03", "to the end of the file"),
    "key count": (header(keys=2**63), "keys"),
    "tensor count": (header(tensors=2**40), "tensors"),
    "string length": (header(struct.pack("<Q", 2**62), bytes(20), keys=1), "4611686018427387904 more"),
    "value type": (header(text(b"k"), struct.pack("<I", 77), keys=1), "value type 77"),
    "array length": (header(text(b"k"), struct.pack("<IIQ", 9, 8, 2**61), bytes(9), keys=1), "no more than the file"),
    "array of numbers": (header(text(b"k"), struct.pack("<IIQ", 9, 10, 2**61), keys=1), "more"),
    "deep array": (header(text(b"k"), struct.pack("<I", 9), struct.pack("<IQ", 9, 1) * 9, bytes(90), keys=1), "nested"),
    "twice": (header(*[text(b"k") + struct.pack("<IB", 0, 1)] * 2, keys=2), "'k' for the second time"),
    "alignment": (header(text(b"general.alignment"), struct.pack("<II", 4, 3), keys=1), "a power of two"),
    "alignment type": (header(text(b"general.alignment"), struct.pack("<I", 8) + text(b"x"), keys=1), "a power of two"),
    "dimensions": (header(text(b"w"), struct.pack("<I", 2**31), bytes(40), tensors=1), "2147483648 dimensions"),
    "no dimensions": (header(text(b"w"), struct.pack("<I", 0), bytes(40), tensors=1), "0 dimensions"),
    "format": (header(tensor(b"w", [4], 999), bytes(99), tensors=1), "format 999"),
    "removed format": (header(tensor(b"w", [4], 4), bytes(99), tensors=1), "format 4"),
    "no elements": (header(tensor(b"w", [4, 0]), bytes(99), tensors=1), "shape"),
    "part of a block": (header(tensor(b"w", [31], 2), bytes(99), tensors=1), "a multiple of 32"),
    "overflow": (header(tensor(b"w", [2**63, 2**63]), bytes(99), tensors=1), "no byte beyond"),
    "offset": (header(tensor(b"w", [4], 0, 2**63), bytes(99), tensors=1), "no byte beyond"),
    "same tensor": (header(tensor(b"w", [1]), tensor(b"w", [1]), bytes(99), tensors=2), "'w' for the second time"),
}


@pytest.mark.parametrize(("raw", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_header_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "x.gguf").write_bytes(raw)
    with pytest.raises(ModelError, match=message):
        GgufFile(tmp_path / "x.gguf")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        GgufFile(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="one of: smollm2"):
        find_model(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(tmp_path)


EXTREMES = (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


def test_a_thousand_mutated_headers(tmp_path: Path, gguf_path: Path) -> None:
    """Bytes changed, cut out or put in, anywhere in the header: the model loads, or ModelError says why not."""
    good = gguf_path.read_bytes()
    file = GgufFile(gguf_path)
    header_bytes = len(good) - sum(len(entry.data) for entry in file.tensors.values())
    random = np.random.default_rng(11)
    path = tmp_path / "mutant.gguf"
    refused = 0
    for i in range(1000):
        raw = bytearray(good)
        for _ in range(random.integers(1, 4)):
            at = int(random.integers(0, header_bytes if i % 3 else 2000))
            change = random.integers(0, 5)
            if change == 0:
                raw[at : at + 1] = random.bytes(1)
            elif change == 1:
                raw[at : at + 8] = random.bytes(8)
            elif change == 2:
                raw[at : at + 8] = struct.pack("<Q", EXTREMES[random.integers(0, len(EXTREMES))])
            elif change == 3:
                del raw[at : at + int(random.integers(1, 9))]
            else:
                del raw[int(random.integers(0, len(raw))) :]
        small.replace(path, raw)
        try:
            load_model(path, "f32")
        except ModelError as error:
            refused += 1
            assert "found" in str(error) and "expected" in str(error)
    assert 300 < refused < 1000


def test_a_missing_tensor_and_a_wrong_shape_are_named(tmp_path: Path) -> None:
    for name in ("token_embd.weight", "blk.1.attn_k.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        weights = small.random_weights()
        weight = weights.pop(name)
        with pytest.raises(ModelError, match=f"tensor {name}: found nothing"):
            load_model(small.write_gguf(tmp_path / "missing.gguf", weights))
        weights[name] = np.concatenate([weight, weight])
        with pytest.raises(ModelError, match=rf"tensor {name}: found shape \({2 * weight.shape[0]},"):
            load_model(small.write_gguf(tmp_path / "shape.gguf", weights))


NUMBERS: list[tuple[dict[str, Any], str]] = [
    ({"llama.block_count": 0}, "block_count: found 0"),
    ({"llama.block_count": 2**32 - 1}, "block_count: found 4294967295"),
    ({"llama.attention.head_count": 0}, "head_count: found 0"),
    ({"llama.attention.head_count_kv": 3}, "4 heads over 3"),
    ({"llama.rope.dimension_count": 8}, "8 turned features"),
    ({"llama.embedding_length": 4_000_000_000}, "embedding_length"),
    ({"llama.vocab_size": 100}, "tokens in the tokenizer"),
    ({"llama.context_length": 2**31}, "context_length"),
    ({"llama.expert_count": 8}, "experts"),
    ({"llama.attention.sliding_window": 2**31}, "sliding_window: found"),
    ({"tokenizer.ggml.eos_token_id": 99999}, "eos_token_id"),
]


@pytest.mark.parametrize(("numbers", "message"), NUMBERS)
def test_absurd_numbers_are_refused(tmp_path: Path, numbers: dict[str, Any], message: str) -> None:
    path = small.write_gguf(tmp_path / "x.gguf", small.random_weights(), numbers=numbers)
    with pytest.raises(ModelError, match=message):
        load_model(path)


def test_other_architectures_and_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"general.architecture: found 'gpt2'; expected 'llama'"):
        load_model(small.write_gguf(tmp_path / "a.gguf", {}, architecture="gpt2"))
    for key, value in (("tokenizer.ggml.model", "bert"), ("tokenizer.ggml.pre", "martian"),
                       ("llama.rope.scaling.type", "longrope")):
        with pytest.raises(ModelError, match=f"{key}: found '{value}'"):
            load_model(small.write_gguf(tmp_path / "a.gguf", small.random_weights(), strings={key: value}))


# ---- safetensors


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return small.write_directory(tmp_path / "checkpoint", small.random_weights())


def write_safetensors(path: Path, header: Any, body: bytes = bytes(64)) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + body)


BROKEN_HEADERS: list[tuple[Any, str]] = [
    (b"{", "no JSON"),
    (b"[" * 100_000, "no JSON"),
    ([], "no JSON object"),
    ({"w": 5}, "expected shape, dtype"),
    ({"w": {"shape": [2], "dtype": "F32", "data_offsets": [0]}}, "expected shape, dtype"),
    ({"w": {"shape": [-2], "dtype": "F32", "data_offsets": [0, 8]}}, "sane size"),
    ({"w": {"shape": [2**60], "dtype": "F32", "data_offsets": [0, 8]}}, "sane size"),
    ({"w": {"shape": [2], "dtype": "F32", "data_offsets": [0, 4]}}, "the tensor's size"),
    ({"w": {"shape": [2], "dtype": "F32", "data_offsets": [60, 68]}}, "within 64 bytes"),
    ({"w": {"shape": [2], "dtype": "F32", "data_offsets": [8, 0]}}, "the tensor's size"),
    ({"w": {"shape": [2], "dtype": 7, "data_offsets": [0, 8]}}, "sane size"),
]


@pytest.mark.parametrize(("header", "message"), BROKEN_HEADERS)
def test_a_broken_safetensors_header_is_refused(tmp_path: Path, header: Any, message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_safetensors(tmp_path / "x.safetensors", header)
    with pytest.raises(ModelError, match=message):
        SafetensorsDirectory(tmp_path)


def test_broken_safetensors_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no \*\.safetensors file"):
        SafetensorsDirectory(tmp_path)
    cases = ((b"", "safetensors file"), (b"abc", "a header of 3 bytes"), (bytes([255] * 20), "a header of"))
    for raw, message in cases:
        (tmp_path / "x.safetensors").write_bytes(raw)
        with pytest.raises(ModelError, match=message):
            SafetensorsDirectory(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(ModelError, match="a JSON file"):
        SafetensorsDirectory(tmp_path)


def test_a_dtype_that_is_not_floating_is_refused_when_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_safetensors(tmp_path / "x.safetensors", {"w": {"shape": [8], "dtype": "I8", "data_offsets": [0, 8]}})
    with pytest.raises(ModelError, match="dtype I8"):
        SafetensorsDirectory(tmp_path).tensors["w"].read()


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mistral3"}, "model_type: found 'mistral3'"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_bias": True}, "attention_bias"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers: found '2'"),
    ({"num_hidden_layers": None}, "num_hidden_layers: found nothing"),
    ({"hidden_size": 1e300}, "hidden_size"),
    ({"head_dim": 15}, "an even number"),
    ({"rms_norm_eps": -1}, "rms_norm_eps"),
    ({"rope_theta": float("nan")}, "rope_theta"),
    ({"rope_scaling": {"rope_type": "dynamic"}}, "'dynamic'"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "factor: found nothing"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64,
                       "attention_factor": "1"}}, "attention_factor: found '1'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "attn_factor": 0}},
     "attn_factor: found 0"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "truncate": False}},
     "truncate: found False"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: found .*sliding"),
    ({"layer_types": 2}, "layer_types: found 2"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window: found 0"),
    ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window"),
    ({"model_type": "qwen3"}, "self_attn.q_norm.weight: found nothing"),
    ({"model_type": "qwen3_moe"}, "num_local_experts: found nothing"),
    ({"model_type": "qwen3moe"}, "model_type: found 'qwen3moe'"),
    ({"model_type": "qwen2"}, "self_attn.q_proj.bias: found nothing"),
    ({"rope_scaling": [1]}, "an object or null"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1,
                       "original_max_position_embeddings": 8192}}, "the high one larger"),
]


@pytest.mark.parametrize(("config", "message"), CONFIGS)
def test_absurd_configs_are_refused(directory: Path, config: dict[str, Any], message: str) -> None:
    (directory / "config.json").write_text(json.dumps({**small.JSON_CONFIG, **config}))
    with pytest.raises(ModelError, match=message):
        load_model(directory)


def test_a_directory_without_tokenizer_or_tensor_is_refused(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_model(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_model(directory)


def damaged(random: np.random.Generator, good: bytes, first: int, last: int) -> bytes:
    """Bytes changed, cut out, put in twice, or everything behind a place left out, between two places."""
    raw = bytearray(good)
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(first, last))
        change = random.integers(0, 5)
        if change == 0:
            raw[at : at + 1] = random.bytes(1)
        elif change == 1:
            raw[at : at + 1] = random.choice([b"9" * 30, b"-", b"e", b"null", b"[", b"{", b'"', b"0", b"NaN", b","])
        elif change == 2:
            del raw[at : at + int(random.integers(1, 9))]
        elif change == 3:
            raw[at:at] = raw[at : at + 20]
        else:
            del raw[at if random.integers(0, 2) else last :]
    return bytes(raw)


@pytest.mark.parametrize("file", ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json",
                                  "qwen3/config.json"])
def test_mutated_directories(tmp_path: Path, file: str) -> None:
    """Of 1000 mutants of a configuration or a header (200 of a tokenizer, or of one with more keys) each loads, or
    ModelError says why not."""
    *fixture, file = file.split("/")
    if fixture:
        directory = shutil.copytree(DATA / fixture[0], tmp_path / "checkpoint")
    else:
        directory = small.write_directory(tmp_path / "checkpoint", small.random_weights())
    path = directory / file
    good = path.read_bytes()
    header = file.endswith("safetensors")
    last = 8 + struct.unpack("<Q", good[:8])[0] if header else len(good)
    random = np.random.default_rng(5)
    refused, count = 0, 200 if fixture or file == "tokenizer.json" else 1000
    for _ in range(count):
        small.replace(path, damaged(random, good, 0, last))
        try:
            load_model(directory, "f32")
        except ModelError as error:
            refused += 1
            assert "found" in str(error) and "expected" in str(error)
    assert 0.3 * count < refused < count


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_file_that_is_cut_short_while_it_is_open(tmp_path: Path, kind: str) -> None:
    """No SIGBUS, as a mapped file would give."""
    if kind == "gguf":
        path = small.write_gguf(tmp_path / "x.gguf", small.random_weights())
        entries: Any = GgufFile(path).tensors
    else:
        directory = small.write_directory(tmp_path / "checkpoint", small.random_weights())
        path = directory / "model-00001-of-00002.safetensors"
        entries = SafetensorsDirectory(directory).tensors
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 3)
    with pytest.raises(ModelError, match="cut short while it was read"):
        for entry in entries.values():
            entry.read()
