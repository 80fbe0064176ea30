"""What `sapper bench train` measures: a step of training, forward, backward and AdamW, in f32; and one of adapters.

In: `Settings`. Out: `Row`s. Holds: PyTorch trains a model of the same weights by its own kernels: attention through
`scaled_dot_product_attention`, experts one after the other over their tokens, AdamW fused; with adapters the others
require no gradient. Operations are the useful ones, thrice those of the forward pass, but for matrices that stay as
they are twice; the floor adds to them what AdamW reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .bench_models import DEEPSEEK, PROMPT_TOKENS
from .bench_suites import Row, Settings, attempt, rows_of, with_floor

QUICK_TOKENS = 64
RANK = 16
"""Of adapters, in all matrices of a layer."""
STEP_BYTES = 16, 12
"""Of a weight that AdamW reads and writes: itself, both means, the gradient."""
WIDTHS = {
    "hidden_size": 512, "intermediate_size": 2048, "moe_intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "vocab_size": 8192,
}
"""Of the DeepSeek: 28 million weights, of which a token meets 20 million."""


def train_rows(settings: Settings) -> Iterator[list[Row]]:
    """SmolLM2-135M, whole and with adapters, and a small DeepSeek-V2 with random weights."""
    for name, opened, rank in (("smollm2", _smollm2, 0), ("smollm2", _smollm2, RANK), (DEEPSEEK, _deepseek, 0)):
        if settings.wants(_case(name, rank)):
            settings.report(f"loading {name}")
            with TemporaryDirectory(prefix="sapper-bench-") as folder:
                checkpoint = opened(Path(folder), settings)
                for threads in settings.thread_counts if checkpoint is not None else ():
                    yield from attempt(name, settings, partial(_step_rows, name, checkpoint, threads, settings, rank))


def _case(name: str, rank: int) -> str:
    return f"{name} train step{f', lora {rank}' if rank else ''}"


def _smollm2(folder: Path, settings: Settings) -> Any:
    from ..models.checkpoint import open_checkpoint
    from ..models.errors import ModelError

    try:
        return open_checkpoint("smollm2")
    except (ModelError, ImportError) as error:
        settings.say(f"no model to train: {error}")
        return None


def _deepseek(folder: Path, settings: Settings) -> Any:
    from ..models.checkpoint import open_checkpoint
    from ..models.deepseek.config import from_json
    from ..models.deepseek.untrained import SMALL_V2
    from ..models.deepseek.untrained_gguf import write_gguf

    path = folder / "random.gguf"
    try:
        write_gguf(path, from_json(SMALL_V2 | WIDTHS, "the benchmark"))
    except ImportError as error:
        settings.say(f"no model to train: {error}")
        return None
    return open_checkpoint(str(path))


def _step_rows(name: str, checkpoint: Any, threads: int, settings: Settings, rank: int) -> list[Row]:
    import numpy

    from ..models.adapted import Lora
    from ..models.training import Recipe, start

    tokens = QUICK_TOKENS if settings.quick else PROMPT_TOKENS
    settings.report(f"{_case(name, rank)}, {threads} thread{'s' * (threads > 1)}")
    lora = Lora(rank, 2.0 * rank) if rank else None
    trainer: Any = start(checkpoint, 1, tokens, threads=threads, lora=lora, base="f32")
    random = numpy.random.default_rng(0)
    fed, wanted = (random.integers(0, trainer.vocabulary, (1, tokens)).astype(numpy.int32) for _ in range(2))
    recipe = Recipe(1, rate=1e-5, warmup=0)
    contestants: dict[str, Callable[[], Any]] = {"sapper": lambda: trainer.step(fed, wanted, recipe, 1)}
    if "torch" in settings.against:
        contestants["torch"] = TorchModel(trainer, threads).steps(fed, wanted, recipe)
    weights = sum(flat[0].size for flat in (trainer.matrices, trainer.vectors))
    operations, (read, written) = step_operations(trainer, tokens), (weights * size for size in STEP_BYTES)
    timings, peaks = with_floor(contestants, settings.peaks(threads), settings, products=("f32",), reads=True,
                                writes=True, rounds=5)
    floor_s = operations / peaks.arithmetic("f32") + peaks.floor_s(0, read, written, "DRAM")
    return rows_of(_case(name, rank), "f32", f"1 x {tokens}", threads, timings, floor_s, tokens, "tokens/s",
                   totals=(operations, read + written, "f32"))


def step_operations(trainer: Any, tokens: int) -> int:
    """Of a step on one sequence. A token meets the experts that it takes; each sees those before it and itself. Of what
    stays as it is there are no gradients, and none of what goes into the lowest layer."""
    from ..models.adapted import adapted_in, base_of, bases

    config, weights = trainer.config, bases(trainer.weights)
    met = weights.logits.size
    for layer in weights.layers:
        attention = [one for one in _arrays(layer.attention) if one.ndim > 1]
        met += layer.output.size + sum(one.size for one in attention)
        part = layer.feed_forward
        if hasattr(part, "router"):
            mixture = config.mixture
            met += part.router.size + (part.gate_up.size + part.down.size) * mixture.chosen // mixture.experts
            part = part.shared
        met += 0 if part is None else part.gate_up.size + part.down.size
    of_value = getattr(config, "value_features", config.head_features)
    seen = tokens * (tokens + 1) // 2
    attended = 2 * seen * config.layers * config.heads * (config.head_features + of_value)
    if trainer.lora is None:
        return int(3 * (2 * tokens * met + attended))
    layers = trainer.weights.layers
    adapters = sum(one.down.size + sum(part.up.size for part in one.parts)
                   for layer in layers for one in adapted_in(layer))
    lowest = sum(base_of(one).size + one.down.size for one in adapted_in(layers[0].attention))
    return int(2 * tokens * (2 * met + 3 * adapters - lowest) + 3 * attended)


def _arrays(one: Any) -> list[Any]:
    from ..models.workspace import named_arrays

    return list(named_arrays(one).values())


class TorchModel:
    """A trainer's model as a PyTorch user would write it. Heads turn by halves, which PyTorch does in less time than by
    neighbours; of random tokens it makes no difference."""

    def __init__(self, trainer: Any, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch, self.config = torch, trainer.config
        self.parameters: list[Any] = []
        self.frozen = trainer.lora is not None
        weights = trainer.weights
        self.embedding, self.gain = self._of(weights.embedding), self._of(weights.gain)
        self.logits = self.embedding if weights.logits is weights.embedding else self._of(weights.logits)
        self.layers = [self._layer(layer) for layer in weights.layers]
        self.cosine, self.sine = (torch.tensor(table)[None, :, None] for table in trainer.tables)

    def _of(self, array: Any) -> Any:
        """A tensor that learns, or stays as it is; of one with adapters it and these: rows, A, B and the factor."""
        from ..models.adapted import Adapted

        if isinstance(array, Adapted):
            return self.torch.tensor(array.base), [
                (part.rows, self._learning(array.down[part.ranks]), self._learning(part.up), array.scale)
                for part in array.parts]
        return self.torch.tensor(array) if self.frozen else self._learning(array)

    def _learning(self, array: Any) -> Any:
        made = self.torch.nn.Parameter(self.torch.tensor(array))
        self.parameters.append(made)
        return made

    def _times(self, x: Any, matrix: Any) -> Any:
        """y = W x, and what adapters add."""
        if not isinstance(matrix, tuple):
            return x @ matrix.T
        base, adapters = matrix
        return x @ base.T + self.torch.cat([x @ down.T @ up.T * scale for _, down, up, scale in adapters], -1)

    def _layer(self, layer: Any) -> dict[str, Any]:
        attention, part = layer.attention, layer.feed_forward
        found = {name: self._of(getattr(layer, name)) for name in ("attention_gain", "output", "feed_forward_gain")}
        found |= {name: self._of(array) for name in attention.__slots__
                  if (array := getattr(attention, name)) is not None}
        if not hasattr(part, "router"):
            return {**found, "dense": (self._of(part.gate_up), self._of(part.down))}
        found["router"] = self._of(part.router)
        found["experts"] = [(self._of(a), self._of(b)) for a, b in zip(part.gate_up, part.down, strict=True)]
        return {**found, "dense": part.shared and (self._of(part.shared.gate_up), self._of(part.shared.down))}

    def _norm(self, x: Any, gain: Any, epsilon: float | None = None) -> Any:
        return self.torch.nn.functional.rms_norm(x, gain.shape, gain, epsilon or self.config.epsilon)

    def _turned(self, x: Any) -> Any:
        a, b = x.chunk(2, -1)
        return self.torch.cat([a * self.cosine - b * self.sine, a * self.sine + b * self.cosine], -1)

    def _attended(self, queries: Any, keys: Any, values: Any, **options: Any) -> Any:
        queries, keys, values = (one.transpose(1, 2) for one in (queries, keys, values))
        mixed = self.torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, **options)
        return mixed.transpose(1, 2).flatten(2)

    def _llama(self, n: Any, layer: dict[str, Any]) -> Any:
        config = self.config
        heads = self._times(n, layer["qkv"]).unflatten(-1, (-1, config.head_features))
        queries, keys, values = heads.split([config.heads, config.kv_heads, config.kv_heads], 2)
        return self._attended(self._turned(queries), self._turned(keys), values, enable_gqa=True)

    def _deepseek(self, n: Any, layer: dict[str, Any]) -> Any:
        from ..models.deepseek.config import LATENT_EPSILON

        config, cat = self.config, self.torch.cat
        first = config.query_rank or config.heads * config.head_features
        queries, latent, shared = (n @ layer["joined"].T).split([first, config.key_rank, config.turned_features], -1)
        if config.query_rank:
            queries = self._norm(queries, layer["query_gain"], LATENT_EPSILON) @ layer["query"].T
        still, turning = queries.unflatten(-1, (config.heads, -1)).split(
            [config.key_features, config.turned_features], -1)
        expanded = self._norm(latent, layer["key_gain"], LATENT_EPSILON) @ layer["expand"].T
        keys, values = expanded.unflatten(-1, (config.heads, -1)).split(
            [config.key_features, config.value_features], -1)
        turned = self._turned(shared[:, :, None]).expand(-1, -1, config.heads, -1)
        return self._attended(cat([still, self._turned(turning)], -1), cat([keys, turned], -1), values,
                              scale=config.score_scale)

    def _dense(self, x: Any, gate_up: Any, down: Any) -> Any:
        gate, up = self._times(x, gate_up).chunk(2, -1)
        return self._times(self.torch.nn.functional.silu(gate) * up, down)

    def _mixed(self, n: Any, layer: dict[str, Any]) -> Any:
        """What a mixture, or a dense part, adds."""
        if "router" not in layer:
            return self._dense(n, *layer["dense"])
        mixture, rows = self.config.mixture, n.flatten(0, 1)
        weights, chosen = (rows @ layer["router"].T).softmax(-1).topk(mixture.chosen, -1)
        total = self._dense(rows, *layer["dense"]) if layer["dense"] else self.torch.zeros_like(rows)
        for number, expert in enumerate(layer["experts"]):
            token, place = (chosen == number).nonzero(as_tuple=True)
            share = (weights[token, place] * mixture.scale)[:, None]
            total = total.index_add(0, token, self._dense(rows[token], *expert) * share)
        return total.view_as(n)

    def loss(self, tokens: Any, targets: Any) -> Any:
        x = self.embedding[tokens]
        for layer in self.layers:
            attend = self._llama if "qkv" in layer else self._deepseek
            x = x + self._times(attend(self._norm(x, layer["attention_gain"]), layer), layer["output"])
            x = x + self._mixed(self._norm(x, layer["feed_forward_gain"]), layer)
        logits = self._norm(x, self.gain) @ self.logits.T
        return self.torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def steps(self, tokens: Any, targets: Any, recipe: Any) -> Callable[[], None]:
        """What runs a step on these."""
        torch = self.torch
        batch = [torch.tensor(numbers, dtype=torch.int64) for numbers in (tokens, targets)]
        optimizer = torch.optim.AdamW(self.parameters, lr=recipe.rate, betas=(recipe.beta1, recipe.beta2),
                                      eps=recipe.epsilon, weight_decay=recipe.decay, fused=True)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            self.loss(*batch).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, recipe.clip)
            optimizer.step()

        return step
