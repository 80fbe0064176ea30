"""Small random Llama models on disk, for the tests: the same weights as a GGUF file and as a safetensors directory."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from sapper.models.tokenizer import byte_characters

LAYERS, FEATURES, HIDDEN, HEADS, KV_HEADS, SIZE, POSITIONS = 2, 64, 96, 4, 2, 16, 96
WORDS = ["he", "ll", "hell", "hello", "\u0120w", "or", "ld", "\u0120wor", "\u0120world"]
PAIRS = ["h e", "l l", "he ll", "hell o", "\u0120 w", "o r", "l d", "\u0120w or", "\u0120wor ld"]
CONTROL_TOKENS = ["<|start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}<|start|>"

TOKENS = [*byte_characters(), *WORDS, *CONTROL_TOKENS]
KINDS = [1] * (256 + len(WORDS)) + [3] * len(CONTROL_TOKENS)
VOCABULARY = len(TOKENS)


def random_weights(seed: int = 0, tied: bool = False) -> dict[str, np.ndarray]:
    """Weights under their GGUF names, query and key rows in the interleaved order."""
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def gain() -> np.ndarray:
        return (1.0 + 0.1 * random.standard_normal(FEATURES)).astype(np.float32)

    weights = {"token_embd.weight": matrix(VOCABULARY, FEATURES) * np.float32(4), "output_norm.weight": gain()}
    if not tied:
        weights["output.weight"] = matrix(VOCABULARY, FEATURES)
    for i in range(LAYERS):
        weights |= {
            f"blk.{i}.attn_norm.weight": gain(), f"blk.{i}.ffn_norm.weight": gain(),
            f"blk.{i}.attn_q.weight": matrix(HEADS * SIZE, FEATURES),
            f"blk.{i}.attn_k.weight": matrix(KV_HEADS * SIZE, FEATURES),
            f"blk.{i}.attn_v.weight": matrix(KV_HEADS * SIZE, FEATURES),
            f"blk.{i}.attn_output.weight": matrix(FEATURES, HEADS * SIZE),
            f"blk.{i}.ffn_gate.weight": matrix(HIDDEN, FEATURES), f"blk.{i}.ffn_up.weight": matrix(HIDDEN, FEATURES),
            f"blk.{i}.ffn_down.weight": matrix(FEATURES, HIDDEN),
        }
    return weights


NUMBERS = {
    "llama.block_count": LAYERS, "llama.context_length": POSITIONS, "llama.embedding_length": FEATURES,
    "llama.feed_forward_length": HIDDEN, "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KV_HEADS,
    "llama.rope.dimension_count": SIZE, "llama.vocab_size": VOCABULARY,
    "tokenizer.ggml.eos_token_id": VOCABULARY - 1,
}
REALS = {"llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0}


def replace(path: Path, raw: bytes | bytearray) -> None:
    """A new file under a name. To empty the old one would take milliseconds where ext4 writes it out first."""
    path.unlink(missing_ok=True)
    path.write_bytes(raw)


def write_gguf(
    path: Path, weights: dict[str, np.ndarray], *, numbers: dict[str, int] | None = None,
    strings: dict[str, str] | None = None, formats: dict[str, Any] | None = None, architecture: str = "llama",
    most_tensors: int = 0, reals: dict[str, float] | None = None,
) -> Path:
    """A GGUF file. numbers, strings, reals: keys to add or change; those of a Llama become the architecture's.
    formats: tensor name -> a ggml format to quantise to. most_tensors: of each file, where there are to be several,
    NAME-00001-of-00002.gguf and so on."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=most_tensors)
    for key, value in {**NUMBERS, **(numbers or {})}.items():
        writer.add_uint32(key.replace("llama", architecture), value)
    for key, real in {**REALS, **(reals or {})}.items():
        writer.add_float32(key.replace("llama", architecture), real)
    writer.add_array("tokenizer.ggml.tokens", TOKENS)
    writer.add_array("tokenizer.ggml.token_type", KINDS)
    writer.add_array("tokenizer.ggml.merges", PAIRS)
    texts = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.chat_template": TEMPLATE}
    for key, text in {**texts, **(strings or {})}.items():
        writer.add_string(key.replace("llama", architecture), text)
    for name, weight in weights.items():
        kind = (formats or {}).get(name)
        if kind is None:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved_to_half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """What a Hugging Face checkpoint of the same model holds: in each head first all even rows, then all odd ones."""
    parts = [np.concatenate([head[0::2], head[1::2]]) for head in np.split(rows, heads)]
    return np.concatenate(parts)


JSON_CONFIG = {
    "model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": FEATURES, "intermediate_size": HIDDEN,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": SIZE, "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
}


def write_directory(path: Path, weights: dict[str, np.ndarray], config: dict[str, Any] | None = None) -> Path:
    """The same model as a Hugging Face directory, its weights spread over two files."""
    from sapper.models.llama.weights import GGUF_NAMES, JSON_NAMES

    path.mkdir()
    renamed = {}
    for role, pattern in GGUF_NAMES.items():
        for i in range(LAYERS):
            weight = weights.get(pattern.format(i))
            if weight is None:
                continue
            if role in ("query", "key"):
                weight = interleaved_to_half_split(weight, HEADS if role == "query" else KV_HEADS)
            renamed[JSON_NAMES[role].format(i)] = np.ascontiguousarray(weight)
    names = sorted(renamed)
    save_file({name: renamed[name] for name in names[:5]}, path / "model-00001-of-00002.safetensors")
    save_file({name: renamed[name] for name in names[5:]}, path / "model-00002-of-00002.safetensors")
    (path / "config.json").write_text(json.dumps({**JSON_CONFIG, **(config or {})}))
    write_tokenizer(path)
    return path


def write_tokenizer(path: Path) -> None:
    """The tokenizer of these models, as a Hugging Face directory has it."""
    from tokenizers import decoders

    from sapper.models.gguf_file import GgufFile
    from sapper.models.tokenizer import from_gguf

    beside = write_gguf(path / "vocabulary.gguf", {})
    tokenizer = from_gguf(GgufFile(beside).metadata, "small")
    tokenizer.inner.decoder = decoders.ByteLevel()
    tokenizer.inner.save(str(path / "tokenizer.json"))
    beside.unlink()
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))
