"""DeepSeek's forward pass: tokens in, logits out, with a cache of latent vectors.

In: a DeepseekModel. Out: `Session`, whose `feed` runs tokens and leaves the logits of the last one in `logits`. Holds:
what Mixing holds.

    tokens ── embedding ── x ── norm, joined ─┬─ (latent queries ── norm) ── queries ─┬─ attention ── output, + x ── y
                                              └─ compress ── cache ───────────────────┘
    y ── feed-forward (models/mixing.py) ── x
    x ── norm, logits of the last token

One token attends absorbed, several attend naively (sapper/kernels/mla.py; where prompts are rounded, both in products
of bf16, mla_rounded.py); where there is an indexer, to the positions that it chooses (sapper/kernels/sparse.py). Each
is one program; the variables of the second are `position`, `count`, `filled` (position + count) and `routed_N`
(count * N, where a token takes N experts: those of a layer).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ...kernels import embedding, mla, mla_rounded, norm, sparse
from ...runtime.buffers import empty
from ...runtime.program import Rows, Variable
from ..linear import Matrix
from ..mixing import Mixing, first
from ..session import SHORTEST_RUN
from ..weights import DTYPES
from ..workspace import Sections, Steps, Workspace, in_blocks
from .config import INDEX_EPSILON, LATENT_EPSILON, Indexer
from .heads import ValueBlocks
from .weights import AttentionWeights, DeepseekWeights, IndexWeights

if TYPE_CHECKING:
    from .model import DeepseekModel
    from .untrained import Untrained

Array = np.ndarray[Any, np.dtype[Any]]
F32, I32 = np.dtype(np.float32), np.dtype(np.int32)
APART_BYTES = 64
"""From a position's keys and values of all heads to the next one's, a line: what heads have is mostly a power of two
long, so that all positions of one would lie in a few sets of the caches. Measured on a Zen 3, latent_attention_f32 of
512 tokens and 16 heads in ms, rows 8 KiB apart and a line more: 24.0 and 19.6."""


def cache_dtype_of(form: str, weights: DeepseekWeights) -> str:
    """As Llama's. A latent vector is small beside the weights that a token meets: f32 costs little where activations
    stay f32. Where they are rounded or quantised, tokens attend in products of bf16 to a cache in it, which takes less
    from them than that does (docs/models.md)."""
    quantised = all(layer.attention.output.quantises for layer in weights.layers)
    return "bf16" if quantised or form.endswith("-rounded") else "f32"


class Session(Mixing):
    """One conversation with a DeepSeek model."""

    model: DeepseekModel | Untrained
    _expanded: Array
    _joined: Array
    _query_latent: Array
    _risen: Array
    _turned: Array
    _mixed: Array

    def __init__(
        self, model: DeepseekModel | Untrained, context: int | None = None, *, cache_dtype: str | None = None,
        threads: int | None = None, interpret: bool = False,
    ) -> None:
        """As BaseSession has it; cache_dtype is that of the latent vectors and of the shared keys."""
        config, cache_dtype = model.config, cache_dtype or model.cache_dtype
        mixture = config.mixture
        widest = max(config.features, config.hidden, config.query_rank, config.heads * config.value_features,
                     0 if mixture is None else mixture.taken * mixture.hidden)
        super().__init__(
            config.vocabulary, config.positions, context, cache_dtype, threads, interpret, Workspace(widest, threads)
        )
        self.model = model
        self._shortest_runs: dict[Any, int] = {}
        pairs, heads, rank = config.turned_features // 2, config.heads, config.key_rank
        self._cosine, self._sine = config.rope.tables(self.context)
        self._latents, self._keys = (
            self._caches(self._cached_layers, self._cache_extents(*one)) for one in ((rank,), (2, pairs)))
        # From here on memory that is not used is never there.
        splits = -(-self._most_kept // mla.SPLIT)      # of the shorter ones
        extents = ((splits, heads), (splits, heads), (splits, heads, rank))
        self._splits = tuple(self._arena.empty(one, F32) for one in extents)
        self._absorbed, self._met = (self._arena.empty((heads, rank), F32) for _ in range(2))
        rows = self.chunk
        self._x, self._y = (self._arena.empty((rows, config.features), F32) for _ in range(2))
        first = config.query_rank or heads * config.head_features
        indexer = config.indexer
        key_features, query_features = (0, 0) if indexer is None else (
            indexer.features, indexer.heads * indexer.features)
        attention: dict[str, tuple[int, ...]] = {
            "_joined": (rows, first + rank + config.turned_features + key_features),
            "_turned": (rows, heads, 2, pairs), "_mixed": (rows, heads * config.value_features),
        }
        if config.query_rank:
            attention |= {"_query_latent": (rows, config.query_rank),
                          "_risen": (rows, heads * config.head_features + query_features)}
        shared = 0 if mixture is None else mixture.shared * mixture.hidden
        turns: list[dict[str, tuple[int, ...]]] = [attention, {"_hidden": (rows, max(config.hidden, shared))}]
        if mixture is not None:
            turns += self._mixture_turns(rows, mixture)
        in_f32 = [{name: (extents, F32) for name, extents in part.items()} for part in turns]
        in_f32[0]["_expanded"] = ((self._most_filled * self._expanded_row(F32),), F32)
        self._take_turns(*in_f32)
        self._filled = Variable("filled", self._most_filled)
        self._places = np.arange(self._most_filled, dtype=I32)
        if mixture is not None:
            self._make_mixture_buffers(rows, mixture)
        if indexer is not None:
            self._make_index_buffers(rows, indexer)

    def _make_index_buffers(self, rows: int, indexer: Indexer) -> None:
        config, context, kind = self.model.config, self.context, DTYPES[self._cache_dtype]
        pairs, rest = config.turned_features // 2, indexer.features - config.turned_features
        self._index_keys, self._index_rests = (
            self._caches(self._cached_layers, self._cache_extents(*one)) for one in ((2, pairs), (rest,)))
        self._index_key = self._arena.empty((rows, indexer.features), F32)
        self._index_turned = self._arena.empty((rows, indexer.heads, 2, pairs), F32)
        self._index_weights = self._arena.empty((rows, indexer.heads), F32)
        self._index_scores = self._arena.empty((rows, context), F32)
        self._lowest, self._last_kept = (self._arena.empty((rows,), I32) for _ in range(2))
        kept = self._most_kept
        self._kept_places = self._arena.empty((kept,), I32)
        self._kept_latents, self._kept_keys = (
            self._arena.empty((kept, features), kind) for features in (config.key_rank, 2 * pairs))

    @property
    def _queries(self) -> Array:
        """What queries are part of, before they turn."""
        return self._risen if self.model.config.query_rank else self._joined

    @property
    def _head_queries(self) -> Array:
        """Those of all heads, as a row for each token."""
        config = self.model.config
        return self._queries[:, : config.heads * config.head_features]

    @property
    def _attends_rounded(self) -> bool:
        """Whether tokens attend in products of bf16: not where the processor has none, as rounding only takes time
        there. It follows the target of the code: memory is made for either way."""
        parts = [layer.attention for layer in self.model.weights.layers]
        return (self._cache_dtype == "bf16" and self.model.config.indexer is None and self._work.packs_pairs()
                and all(one.keys.rounded or one.output.quantises for one in parts))

    def _expanded_row(self, dtype: np.dtype[Any]) -> int:
        """How many numbers the keys and values of a position lie from the next one's."""
        config = self.model.config
        return config.heads * (config.key_features + config.value_features) + APART_BYTES // dtype.itemsize

    def _keys_and_values(self) -> list[Array]:
        """Room for those of all positions: [positions, heads * features] each."""
        config, dtype = self.model.config, DTYPES["bf16" if self._attends_rounded else "f32"]
        width = self._expanded_row(dtype)
        rows = self._expanded.view(dtype)[: self._most_filled * width].reshape(-1, width)
        ends = np.cumsum([config.heads * config.key_features, config.heads * config.value_features])
        return np.split(rows, ends, axis=1)[:2]

    @property
    def _cached_layers(self) -> int:
        return self.model.config.layers

    @property
    def _most_filled(self) -> int:
        """Positions whose keys and values are made at once."""
        return self.context

    @property
    def _most_kept(self) -> int:
        """Positions that one token can attend to."""
        config = self.model.config
        return self.context if config.indexer is None else min(config.indexer.kept, self.context)

    def _cache_extents(self, *features: int) -> tuple[int, ...]:
        """Of the latent vectors, and of the shared keys, of a layer."""
        return self.context, *features

    def state(self) -> dict[str, Array]:
        parts = {"latents": self._latents, "keys": self._keys}
        if self.model.config.indexer is not None:
            parts |= {"index keys": self._index_keys, "index rests": self._index_rests}
        return {f"layer {i} {part}": cache for part, caches in parts.items() for i, cache in enumerate(caches)}

    @property
    def shortest_run(self) -> int:
        target = self._work.target
        if target not in self._shortest_runs:   # asked before each step, and it takes some 0.1 ms to tell
            self._shortest_runs[target] = self._find_shortest_run()
        return self._shortest_runs[target]

    def _find_shortest_run(self) -> int:
        """By the multiply-adds of a position: for each query and head 2 C + S absorbed, D + S + V naively, where each
        head's key and value take C (D + V) besides (sapper/kernels/mla.py). One absorbed takes longer than one of the
        others: on tile registers 3 times, as queries in f32 are three parts; else 1.5 times, but no longer where the
        others are in bf16, twice as quick. Measured on 8 layers of DeepSeek-V2's attention: from 28 to 48 tokens on on
        tile registers, which this puts at 45; 180 on a Zen 4 (170); 100 on a Haswell, 55 in f32 on AVX-512 (both 100).
        """
        config = self.model.config
        tiles = self._cache_dtype == "bf16" and self._work.has_tiles()
        absorbed = (3.0 if tiles else 1.0 if self._attends_rounded else 1.5) * (
            2 * config.key_rank + config.turned_features)
        made = config.key_features + config.value_features
        saved = max(absorbed - made - config.turned_features, 1.0)
        return min(max(math.ceil(config.key_rank * made / saved), SHORTEST_RUN), self.chunk + 1)

    def _absorbs(self, count: int) -> bool:
        """Whether so many tokens attend absorbed. Those that an indexer chooses positions for do naively."""
        return count < self.shortest_run and self.model.config.indexer is None

    def _small_chunks(self) -> list[int]:
        most = self.shortest_run - 1
        return sorted({*super()._small_chunks(), *([most] if self._absorbs(most) and most < self.chunk else [])})

    @cached_property
    def _in_latent_space(self) -> tuple[Array, Array]:
        """Room for the queries there of tokens that attend absorbed, and for what they find: in that of the keys and
        values of more tokens, if it is enough."""
        extents = min(self.chunk, self.shortest_run), self.model.config.heads * self.model.config.key_rank
        size = math.prod(extents)
        if 2 * size > self._expanded.size:
            return empty(extents, F32), empty(extents, F32)
        return self._expanded[:size].reshape(extents), self._expanded[size : 2 * size].reshape(extents)

    def _chunk_values(self, count: int, most: int | None = None) -> dict[str, int]:
        values = super()._chunk_values(count)
        if not self._absorbs(most or count):
            values["filled"] = self.position + count
        return values | self._routed_values(count, self.model.weights.layers)

    # ---- what one token and several share

    def _parts(self) -> tuple[Array, Array, Array, Array]:
        """Views of all tokens' rows: queries [rows, heads, key_features], what of them turns [rows, heads, 2, pairs],
        latent vectors [rows, key_rank], shared keys [rows, 2, pairs].
        """
        config, joined, rows = self.model.config, self._joined, self.chunk
        size, pairs = config.head_features, config.turned_features // 2
        queries = in_blocks(self._head_queries, size)
        first = config.query_rank or config.heads * size
        last = first + config.key_rank
        return (
            queries[:, :, : config.key_features],
            queries[:, :, config.key_features :].reshape(rows, config.heads, 2, pairs),
            joined[:, first:last], joined[:, last : last + 2 * pairs].reshape(rows, 2, pairs),
        )

    def _compress(self, one: AttentionWeights, layer: int, position: Variable, rows: Any) -> Steps:
        """The new tokens' rows of the cache, and their turned queries. rows: which rows of an array are theirs."""
        _, turning, latent, key = self._parts()
        return [(getattr(mla, f"compress_{self._cache_dtype}"), (
            rows(turning), rows(latent), rows(key), one.key_gain, LATENT_EPSILON, self._cosine, self._sine, position,
            rows(self._turned), self._latents[layer], self._keys[layer],
        ))]

    def _index_parts(self, indexer: Indexer) -> tuple[Array, Array, Array]:
        """Views of all tokens' rows: what of the index queries turns [rows, index heads, 2, pairs], their rest, and the
        index keys before their norm [rows, index features]."""
        rows, features, turned = self.chunk, indexer.features, self.model.config.turned_features
        queries = self._queries[:, self._queries.shape[1] - indexer.heads * features :]
        queries = queries.reshape(rows, indexer.heads, features)
        return (queries[:, :, :turned].reshape(rows, indexer.heads, 2, turned // 2), queries[:, :, turned:],
                self._joined[:, self._joined.shape[1] - features :])

    def _index_key_parts(self) -> tuple[Array, Array]:
        """Views of the index keys after their norm: what turns [rows, 2, pairs], and the rest."""
        key, turned = self._index_key, self.model.config.turned_features
        return key[:, :turned].reshape(len(key), 2, turned // 2), key[:, turned:]

    def _index_kernels(self) -> tuple[Any, Any, Any]:
        """What writes the cache of index keys, what scores positions, and what chooses among them."""
        return (getattr(sparse, f"cache_index_{self._cache_dtype}"),
                getattr(sparse, f"index_scores_{self._cache_dtype}"), sparse.choose_positions)

    def _index(
        self, one: IndexWeights, indexer: Indexer, layer: int, rows: Any, where: Sequence[Any], place: Any
    ) -> Steps:
        """The new tokens' rows of the cache of index keys, the scores of all positions, and which are kept. The index
        weights of the tokens are there. where: arguments that say where the tokens stand; place: their positions."""
        cache_index, index_scores, choose = self._index_kernels()
        turning, rest, own_key = self._index_parts(indexer)
        key_turning, key_rest = self._index_key_parts()
        keys, rests = self._index_keys[layer], self._index_rests[layer]
        flat = self._index_turned.reshape(self.chunk, indexer.heads, -1)
        return [
            (norm.layer_norm, (rows(own_key), one.gain, one.bias, INDEX_EPSILON, rows(self._index_key))),
            (cache_index, (
                rows(turning), rows(key_turning), rows(key_rest), self._cosine, self._sine, *where,
                rows(self._index_turned), keys, rests,
            )),
            (index_scores, (
                rows(flat), rows(rest), rows(self._index_weights), keys.reshape(*keys.shape[:-2], -1), rests, *where,
                rows(self._index_scores),
            )),
            (choose, (
                rows(self._index_scores), place, self._most_kept, rows(self._lowest), rows(self._last_kept))),
        ]

    # ---- one token

    def step_sections(self) -> Sections:
        weights, position = self.model.weights, Variable("position", 0)
        sections = [("embedding", [*weights.embedding.look_up(self._token, self._x[:1]), *self._cut_one()])]
        for number, layer in enumerate(weights.layers):
            sections += [
                (f"layer {number}: attention", self._attend_one(layer.attention, number, position)),
                self._feed_forward_one(number, layer.feed_forward),
            ]
        epsilon = self.model.config.epsilon
        logits = weights.logits.apply_norm(self._x[0], weights.gain, epsilon, self.logits, self._work)
        return [*sections, ("logits", logits)]

    def _attend_one(self, one: AttentionWeights, layer: int, position: Variable) -> Steps:
        """x to y."""
        config, work = self.model.config, self._work
        x, y, joined = self._x[0], self._y[0], self._joined[0]
        if one.index is None:
            steps = one.joined.apply_norm(x, one.gain, config.epsilon, joined, work)
        else:
            steps, normed = work.norm(x, one.gain, config.epsilon)
            steps += [*one.joined.apply(normed, joined, work),
                      *one.index.head_weights.apply(normed, self._index_weights[0], work)]
        if one.query is not None and one.query_gain is not None:
            latent = joined[: config.query_rank]
            steps += one.query.apply_norm(latent, one.query_gain, LATENT_EPSILON, self._queries[0], work)
        return [*steps, *self._meet_one(one, layer, position), *one.output.apply_residual(self._mixed[0], x, y, work)]

    def _meet_one(self, one: AttentionWeights, layer: int, position: Variable) -> Steps:
        """From the queries, the latent vector, the shared key and the index weights of one token to what attention
        gives."""
        config = self.model.config
        steps = self._compress(one, layer, position, first)
        if one.index is not None and config.indexer is not None:
            steps += self._index(one.index, config.indexer, layer, first, (position,), position)
        return [*steps, *self._meet_row(one, layer, 0, position)]

    def _meet_row(self, one: AttentionWeights, layer: int, row: int, position: Variable) -> Steps:
        """Absorbed attention of the token of a row, which stands at `position`; the cache, and what the indexer found,
        are there."""
        config, of_row = self.model.config, slice(row, row + 1)
        seen = self._latents[layer], self._keys[layer].reshape(self.context, -1)
        turned = self._turned[row].reshape(config.heads, -1)
        steps: Steps = []
        if one.index is not None:
            chosen = [array[of_row] for array in (self._index_scores, self._lowest, self._last_kept)]
            kept = self._kept_latents, self._kept_keys
            steps = [
                (sparse.list_positions, (*chosen, position, self._kept_places)),
                (getattr(sparse, f"gather_positions_{self._cache_dtype}"), (
                    self._kept_places, *seen, position, *kept)),
            ]
            seen = kept
        attend, merge = (
            (mla.latent_attention_decode_rounded, mla.merge_long_splits) if self._attends_rounded
            else (getattr(mla, f"latent_attention_decode_{self._cache_dtype}"), mla.merge_splits))
        return [
            *steps,
            *one.keys.absorb(self._head_queries[of_row], self._absorbed.reshape(1, -1), self._work),
            (attend, (self._absorbed, turned, *seen, position, config.score_scale, *self._splits)),
            (merge, (*self._splits, position, self._met)),
            *one.values.project(self._met.reshape(1, -1), self._mixed[of_row], self._work),
        ]

    # ---- several tokens

    def chunk_sections(self) -> Sections:
        weights, position = self.model.weights, Variable("position", 0)
        sections = [("embedding", [*self._look_up(weights.embedding, self._x), *self._cut()])]
        for number, layer in enumerate(weights.layers):
            sections += [
                (f"layer {number}: attention", self._attend(layer.attention, number, position)),
                self._feed_forward(number, layer.feed_forward),
            ]
        return sections

    def head(self) -> tuple[Matrix, Array, float]:
        return self.model.weights.logits, self.model.weights.gain, self.model.config.epsilon

    def _attend(self, one: AttentionWeights, layer: int, position: Variable) -> Steps:
        """x to y, where x lies after its norm before."""
        config, x, y, joined, mixed = self.model.config, self._x, self._y, self._joined, self._mixed
        index = () if one.index is None else (one.index.head_weights,)
        normed = self._as_met(y, one.joined, *index)
        steps = [*self._norm(x, one.gain, config.epsilon, normed),
                 *self._multiply("matmul_nt", normed, [one.joined], joined)]
        if one.query is not None and one.query_gain is not None:
            latent = self._as_met(self._query_latent, one.query)
            steps += [*self._norm(joined[:, : config.query_rank], one.query_gain, LATENT_EPSILON, latent),
                      *self._multiply("matmul_nt", latent, [one.query], self._queries)]
        for weights in index:
            steps += self._multiply("matmul_nt", normed, [weights], self._index_weights)
        return [*steps, *self._meet(one, layer, position),
                *self._multiply("matmul_nt_residual", mixed, [one.output], x, y)]

    def _expand_quantised(self, values: ValueBlocks, latents: Array, part: Array) -> Steps:
        """The values of all positions, of latent vectors that are widened, as rows that are looked up, and quantised as
        what one token finds is. 512 tokens on two threads of a Zen 3, 8 layers of 16 heads of 128 x 512 in Q4_0: 23 ms
        in place of 48, weights widened to bf16."""
        filled, wide, steps = self._filled, latents, []
        if self._cache_dtype == "bf16":
            wide = self._work.wide(0, *latents.shape)
            steps = [(embedding.embedding_bf16, (Rows(self._places, filled), latents, Rows(wide, filled)))]
        return [*steps, *values.expand(Rows(wide, filled), Rows(part, filled), self._work)]

    def _expand(self, one: AttentionWeights, latents: Array) -> tuple[list[Array], Steps]:
        """Keys and values [positions, heads, features] of the filled ones of these latent vectors."""
        filled, expanded, steps = self._filled, self._keys_and_values(), []
        for heads, part in zip((one.keys, one.values), expanded, strict=True):
            if isinstance(heads, ValueBlocks) and heads.quantises and not self._work.packs_pairs():
                steps += self._expand_quantised(heads, latents, part)
                continue
            weights, more = heads.rows(self._attends_rounded, self._work)
            expand = (mla_rounded.expand_rounded if self._attends_rounded
                      else getattr(mla, f"expand_{self._cache_dtype}_{heads.dtype}"))
            steps += [*more, (expand, (Rows(latents, filled), weights, Rows(part, filled)))]
        return [part.reshape(len(part), self.model.config.heads, -1) for part in expanded], steps

    def _meet(self, one: AttentionWeights, layer: int, position: Variable) -> Steps:
        """From queries, latent vectors, shared keys and index weights of a chunk's tokens to what attention gives."""
        if self._absorbs(self._capacity):
            return self._meet_absorbed(one, layer, position)
        config, rows, filled = self.model.config, self._rows, self._filled
        latents, shared = self._latents[layer], self._keys[layer].reshape(self.context, -1)
        turned, out = (array.reshape(self.chunk, config.heads, -1) for array in (self._turned, self._mixed))
        (keys, values), expansion = self._expand(one, latents)
        steps = [*self._compress(one, layer, position, rows), *expansion]
        operands = (rows(self._parts()[0]), rows(turned), Rows(keys, filled), Rows(shared, filled),
                    Rows(values, filled))
        settings = position, config.score_scale, rows(out)
        if one.index is None or config.indexer is None:
            attend = (mla_rounded.latent_attention_rounded if self._attends_rounded
                      else getattr(mla, f"latent_attention_{self._cache_dtype}"))
            return [*steps, (attend, (*operands, *settings))]
        return [
            *steps, *self._index(one.index, config.indexer, layer, rows, (position,), position),
            (getattr(sparse, f"latent_attention_sparse_{self._cache_dtype}"), (
                *operands, rows(self._index_scores), rows(self._lowest), rows(self._last_kept), *settings)),
        ]

    def _meet_absorbed(self, one: AttentionWeights, layer: int, position: Variable) -> Steps:
        """The same for few tokens."""
        config, rows, (queries, found) = self.model.config, self._rows, self._in_latent_space
        turned = self._turned.reshape(self.chunk, config.heads, -1)
        attend = getattr(mla, f"latent_attention_rows_{self._cache_dtype}")
        return [
            *self._compress(one, layer, position, rows),
            *one.keys.absorb(rows(self._head_queries), rows(queries), self._work),
            (attend, (rows(in_blocks(queries, config.key_rank)), rows(turned), self._latents[layer],
                      self._keys[layer].reshape(self.context, -1), position, config.score_scale,
                      rows(in_blocks(found, config.key_rank)))),
            *one.values.project(rows(found), rows(self._mixed), self._work),
        ]
