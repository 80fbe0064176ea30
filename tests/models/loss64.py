"""The loss of a model in training, in float64 and plain NumPy, straight from the definition of its architecture.

In: the numbers of the model, and its weights by the names of `places`. Out: `Loss`, which is called with weights that
differ a little from the first ones; experts are those that the first ones chose. Holds: nothing of sapper's kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sapper.models.deepseek.config import DeepseekConfig
from sapper.models.workspace import named_arrays

Array = np.ndarray[Any, np.dtype[Any]]
LATENT_EPSILON = 1e-6


def places(weights: Any) -> dict[str, Array]:
    """All arrays of a trainer's weights, or of what belongs to them, as "layers 0 attention qkv"."""
    found = named_arrays(weights)
    if weights.logits is weights.embedding:
        del found["logits"]
    return found


def normed(x: Array, gain: Array, epsilon: float) -> Array:
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon) * gain


def softmax(x: Array) -> Array:
    power = np.exp(x - x.max(-1, keepdims=True))
    return power / power.sum(-1, keepdims=True)


def swiglu(x: Array, gate_up: Array, down: Array) -> Array:
    gate, up = np.split(x @ gate_up.swapaxes(-1, -2), 2, axis=-1)
    return (gate / (1.0 + np.exp(-gate)) * up) @ down.swapaxes(-1, -2)


def attended(q: Array, k: Array, v: Array, scale: float) -> Array:
    """[B, T, heads, features] each."""
    score = np.einsum("bthd,bphd->bhtp", q, k) * scale
    score = np.where(np.tri(q.shape[1], dtype=bool), score, -np.inf)
    return np.einsum("bhtp,bphd->bthd", softmax(score), v)


class Loss:
    """The mean over the targets that count. bias: by layer, of its choice of experts. interleaved: whether features
    2 * i and 2 * i + 1 turn together, or i and i + half of all."""

    def __init__(self, config: Any, interleaved: bool, tables: tuple[Array, Array], bias: Mapping[int, Array],
                 tokens: Array, targets: Array) -> None:
        self.config, self.interleaved, self.bias, self.tokens, self.targets = config, interleaved, bias, tokens, targets
        self.cosine, self.sine = (table.astype(np.float64)[None, :, None] for table in tables)
        self.chosen: dict[int, Array] = {}

    def turned(self, x: Array) -> Array:
        a, b = (x[..., 0::2], x[..., 1::2]) if self.interleaved else np.split(x, 2, axis=-1)
        parts = a * self.cosine - b * self.sine, a * self.sine + b * self.cosine
        return np.stack(parts, axis=-1).reshape(x.shape) if self.interleaved else np.concatenate(parts, axis=-1)

    def heads(self, rows: Array, count: int) -> Array:
        return rows.reshape(*self.tokens.shape, count, -1)

    def attention(self, n: Array, of: Mapping[str, Array]) -> Array:
        config = self.config
        if isinstance(config, DeepseekConfig):
            return self.latent(n, of)
        qkv = n @ of["qkv"].T + of.get("bias", 0.0)
        q, k, v = np.split(self.heads(qkv, config.heads + 2 * config.kv_heads),
                           [config.heads, config.heads + config.kv_heads], axis=2)
        if config.normed:
            q, k = (normed(one, of[f"{name}_gain"], config.epsilon) for one, name in ((q, "query"), (k, "key")))
        q, k = self.turned(q), self.turned(k)
        k, v = (np.repeat(one, config.heads // config.kv_heads, axis=2) for one in (k, v))
        return attended(q, k, v, config.head_features**-0.5)

    def latent(self, n: Array, of: Mapping[str, Array]) -> Array:
        config = self.config
        queries, latent, shared = np.split(n @ of["joined"].T, [-config.key_rank - config.turned_features,
                                                                -config.turned_features], axis=-1)
        if "query" in of:
            queries = normed(queries, of["query_gain"], LATENT_EPSILON) @ of["query"].T
        still, turning = np.split(self.heads(queries, config.heads), [config.key_features], axis=-1)
        expanded = self.heads(normed(latent, of["key_gain"], LATENT_EPSILON) @ of["expand"].T, config.heads)
        keys, values = np.split(expanded, [config.key_features], axis=-1)
        common = np.repeat(self.turned(shared[:, :, None]), config.heads, axis=2)
        scale = config.rope.scaling.score_factor / np.sqrt(config.key_features + config.turned_features)
        return attended(np.concatenate([still, self.turned(turning)], -1), np.concatenate([keys, common], -1), values,
                        scale)

    def choice(self, score: Array, layer: int) -> Array:
        """Of each token the experts that it takes: among the best of the best groups."""
        mixture = self.config.mixture
        ranked = score + self.bias.get(layer, 0.0)
        groups = ranked.reshape(*ranked.shape[:-1], mixture.groups, -1)
        best = np.sort(groups, axis=-1)[..., -2:].sum(-1) if mixture.sigmoid else groups.max(-1)
        kept = np.argsort(-best, axis=-1)[..., : mixture.kept]
        is_open = np.zeros(best.shape, bool)
        np.put_along_axis(is_open, kept, True, -1)
        ranked = np.where(is_open[..., None], groups, -np.inf).reshape(ranked.shape)
        return np.argsort(-ranked, axis=-1)[..., : mixture.chosen]

    def mixture(self, n: Array, of: Mapping[str, Array], layer: int) -> Array:
        mixture = self.config.mixture
        logits = n @ of["router"].T
        score = 1.0 / (1.0 + np.exp(-logits)) if mixture.sigmoid else softmax(logits)
        chosen = self.chosen.setdefault(layer, self.choice(score, layer))
        taken = np.take_along_axis(score, chosen, -1)
        if mixture.normalise:
            taken = taken / taken.sum(-1, keepdims=True)
        weight = np.zeros(score.shape)
        np.put_along_axis(weight, chosen, taken * mixture.scale, -1)
        of_experts = swiglu(n[None], of["gate_up"][:, None], of["down"][:, None])
        result = np.einsum("bte,ebtf->btf", weight, of_experts)
        return result + swiglu(n, of["shared gate_up"], of["shared down"]) if mixture.shared else result

    def __call__(self, weights: Mapping[str, Array]) -> float:
        config, x = self.config, weights["embedding"][self.tokens]
        for number in range(config.layers):
            def part(name: str, number: int = number) -> dict[str, Array]:
                before = f"layers {number} {name} "
                return {key.removeprefix(before): one for key, one in weights.items() if key.startswith(before)}

            n = normed(x, weights[f"layers {number} attention_gain"], config.epsilon)
            mixed = self.attention(n, part("attention")).reshape(*self.tokens.shape, -1)
            x = x + mixed @ weights[f"layers {number} output"].T
            n, of = normed(x, weights[f"layers {number} feed_forward_gain"], config.epsilon), part("feed_forward")
            x = x + (self.mixture(n, of, number) if "router" in of else swiglu(n, of["gate_up"], of["down"]))
        logits = normed(x, weights["gain"], config.epsilon) @ weights.get("logits", weights["embedding"]).T
        highest = logits.max(-1, keepdims=True)
        total = np.log(np.exp(logits - highest).sum(-1)) + highest[..., 0]
        wanted = np.take_along_axis(logits, np.maximum(self.targets, 0)[..., None], -1)[..., 0]
        counts = self.targets >= 0
        return float(np.where(counts, total - wanted, 0.0).sum() / counts.sum())
