"""An independent Llama in plain NumPy, for the tests: GGUF's own row order, interleaved pairs, no cache, no sapper.

In: a GGUF path. Out: `ReferenceLlama.logits(tokens)`, float32 arithmetic, every position at once.
"""

from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

Array = np.ndarray[Any, np.dtype[Any]]


class ReferenceLlama:
    def __init__(self, path: Any, round_weights: Any = None) -> None:
        """round_weights: what is done to each matrix after it was dequantised."""
        reader = GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith("llama.")}
        self.layers = fields["llama.block_count"]
        self.heads = fields["llama.attention.head_count"]
        self.kv_heads = fields.get("llama.attention.head_count_kv", self.heads)
        self.base = fields.get("llama.rope.freq_base", 10000.0)
        self.epsilon = fields["llama.attention.layer_norm_rms_epsilon"]
        self.weights: dict[str, Array] = {}
        for tensor in reader.tensors:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(shape)
            self.weights[tensor.name] = round_weights(weight) if round_weights and weight.ndim == 2 else weight

    def norm(self, x: Array, name: str) -> Array:
        scale = 1.0 / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + self.epsilon)
        return (x * scale).astype(np.float32) * self.weights[name]

    def rotate(self, x: Array) -> Array:
        """x [tokens, heads, features]: features 2 * i and 2 * i + 1 are a pair."""
        count, _, size = x.shape
        angle = np.arange(count)[:, None] * self.base ** (-np.arange(0, size, 2) / size)
        pairs = x.reshape(count, -1, size // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)[:, None, :]
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape).astype(np.float32)

    def attend(self, x: Array, block: str) -> Array:
        count = x.shape[0]
        q, k, v = ((x @ self.weights[f"{block}.attn_{part}.weight"].T) for part in "qkv")
        q = self.rotate(q.reshape(count, self.heads, -1))
        k = self.rotate(k.reshape(count, self.kv_heads, -1))
        v = v.reshape(count, self.kv_heads, -1)
        out = np.empty_like(q)
        for head in range(self.heads):
            group = head // (self.heads // self.kv_heads)
            score = q[:, head] @ k[:, group].T / np.sqrt(q.shape[-1])
            score[np.triu_indices(count, 1)] = -np.inf
            weight = np.exp(score - score.max(axis=1, keepdims=True))
            out[:, head] = weight / weight.sum(axis=1, keepdims=True) @ v[:, group]
        return out.reshape(count, -1) @ self.weights[f"{block}.attn_output.weight"].T

    def logits(self, tokens: list[int]) -> Array:
        """[tokens, vocabulary]: row t is about the token after t."""
        w = self.weights
        x = w["token_embd.weight"][tokens]
        for i in range(self.layers):
            block = f"blk.{i}"
            x = x + self.attend(self.norm(x, f"{block}.attn_norm.weight"), block)
            normed = self.norm(x, f"{block}.ffn_norm.weight")
            gate, up = normed @ w[f"{block}.ffn_gate.weight"].T, normed @ w[f"{block}.ffn_up.weight"].T
            x = x + (gate / (1.0 + np.exp(-gate)) * up) @ w[f"{block}.ffn_down.weight"].T
        return self.norm(x, "output_norm.weight") @ w.get("output.weight", w["token_embd.weight"]).T

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """The likeliest continuation, token by token."""
        made: list[int] = []
        for _ in range(count):
            made.append(int(self.logits([*tokens, *made])[-1].argmax()))
        return made
