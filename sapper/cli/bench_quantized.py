"""What `sapper bench quantized` measures: products with weights in blocks, and mixtures of experts with such weights.

In: `Settings`. Out: `Row`s. Holds: weights are made as bytes of a file and go through the models' own loader; what runs
is what a step of a model runs for so many tokens, each of another sequence (sapper/models/batch.py): for one token the
kernels of vectors, for several those of rows, with activations quantised or rounded in the same program. Weights come
from DRAM: each call takes other ones, as many as outlast the last cache. llama.cpp's ggml has the same bytes, the same
rows and the same experts; PyTorch has experts in bf16. Results are compared with those of the dequantised weights
before they are timed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import ml_dtypes
import numpy as np

from ..kernels.record import torch_view
from ..models.deepseek.config import from_json
from ..models.deepseek.session import Session
from ..models.deepseek.untrained import SMALL_V2, Untrained
from ..models.deepseek.untrained_gguf import tensors_of
from ..models.deepseek.weights import GGUF_NAMES, load_weights
from ..models.experts import PanelExperts
from ..models.gguf_file import FORMATS as KINDS
from ..models.gguf_file import TensorEntry
from ..models.linear import Matrix
from ..models.mixture import MixtureWeights
from ..models.safetensors_file import TensorEntry as SafetensorsEntry
from ..models.scaled import BLOCK, ScaledEntry
from ..models.scaled import FP8 as FP8_TYPE
from ..models.scaled_matrix import ScaledMatrix
from ..models.weights import Loader, Use
from ..models.workspace import Workspace
from ..runtime.buffers import Arena, empty
from ..runtime.program import Program, Rows, Variable
from ..tune.measure import copies_to_be_cold, rotating
from .bench_models import BF16, ROUNDED, loaded_as
from .bench_suites import Row, Settings, attempt, rows_of, set_peer_threads, with_floor

if TYPE_CHECKING:
    from .bench_ggml import Build, Ggml, Graph

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
FP8 = "fp8"
ROWS = (1, 4, 16, 128, 512)
SHAPE = (4096, 4096)
"""Rows and columns of a matrix."""
FORMATS = ("Q8_0", "Q4_0", "Q4_1", "Q3_K", "Q4_K", "Q5_K", "Q6_K", FP8)
MIXTURE = {"hidden_size": 1024, "moe_intermediate_size": 768, "n_routed_experts": 16, "num_experts_per_tok": 4}
"""As config.json has it."""
MIXTURE_FORMS = ("Q8_0", "Q4_0", "Q4_K", BF16, BF16 + ROUNDED)
BESIDE = {"vocab_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "n_shared_experts": 0,
          "first_k_dense_replace": 0, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32,
          "qk_rope_head_dim": 32, "v_head_dim": 32}
"""The rest of the model that has these mixtures: next to nothing, and it does not run."""
PARTS = {"Q8_0": {0: 1 / 73}, "Q4_0": {0: 1 / 4.6}, "Q4_1": {0: 1 / 4.6, 2: -7.5 / 4.6},
         "Q3_K": {108: 1 / 43.4}, "Q4_K": {0: 1 / 258, 2: 7.5 / 258}, "Q5_K": {0: 1 / 526, 2: 15.5 / 526},
         "Q6_K": {208: 1 / 1365}}
"""Format -> where a block has numbers in f16 (ggml-common.h), and what they are for weights of deviation 1 where all
others are random bytes."""


def quantized_rows(settings: Settings) -> Iterator[list[Row]]:
    """Matrices in each format, and mixtures of experts."""
    for form in FORMATS:
        yield from _of_form(form, _product_case, Products, settings)
    for form in MIXTURE_FORMS:
        yield from _of_form(form, _mixture_case, Mixtures, settings)


def _of_form(form: str, case_of: Callable[[str, int], tuple[str, str]], kind: type[Subject],
             settings: Settings) -> Iterator[list[Row]]:
    wanted = [(count, case_of(form, count)) for count in (ROWS[::2] if settings.quick else ROWS)]
    wanted = [(count, case) for count, case in wanted if settings.wants(" ".join(case))]
    if not wanted:
        return
    settings.report(f"weights in {form}")
    try:
        subject = kind(form, [count for count, _ in wanted], settings)
    except ImportError as error:    # of a package that reads files
        settings.say(f"{form} is left out: {error}")
        return
    try:
        for count, case in wanted:
            for threads in settings.thread_counts:
                yield from attempt(" ".join(case), settings, partial(
                    _rows_of_case, case, form, subject, count, threads, settings))
    finally:
        subject.close()


def _product_case(form: str, count: int) -> tuple[str, str]:
    """A case and its shape."""
    return f"product {form}", "x".join(map(str, (count, *SHAPE)))


def _mixture_case(form: str, count: int) -> tuple[str, str]:
    return f"mixture {form}", f"{count} x {MIXTURE['num_experts_per_tok']} of {MIXTURE['n_routed_experts']}"


# ------------------------------------------------------------------------------------------------------------- a case


Peer: TypeAlias = tuple[Sequence[Callable[[], Any]], Callable[[], Array]]


@dataclass(frozen=True, slots=True)
class Work:
    """What a case does for so many tokens. programs: ours, on one set of weights after the other; result: where they
    leave it. peers: by name those of others on the same sets, and what gives the result of the first one. expected:
    that result. operations; read_bytes: of the weights that one call reads. products: by what ours are made."""

    programs: Sequence[Program]
    result: Array
    peers: Mapping[str, Peer]
    expected: Array
    operations: int
    read_bytes: int
    products: str


class Subject(ABC):
    """Weights of one form, cold: as many sets as outlast the last cache. tolerance: how far a result may be from the
    expected one, in standard deviations of its row. Of another weight, row or expert it would be off by about 1."""

    tolerance: ClassVar[float]

    def __init__(self, form: str, counts: Sequence[int], settings: Settings) -> None:
        """counts: of tokens, that there will be cases of."""
        self.form = form
        self.peer = self._peer(settings)

    def _peer(self, settings: Settings) -> Ggml | None:
        kind = _kind_of(self.form)
        if "llama" not in settings.against or kind is None:
            return None
        from .bench_ggml import Ggml, survives

        settings.report(f"trying {self.form} with llama.cpp")
        repacks = all(survives(kind, *shape) for shape in self.shapes())
        if not repacks:
            settings.say(f"llama.cpp ends with {self.form} in layouts that it makes for this processor: it runs "
                         "without")
        return Ggml(repacks)

    def close(self) -> None:
        if self.peer is not None:
            self.peer.close()

    def _of_graphs(self, graphs: Sequence[Graph], shape: tuple[int, ...], threads: int) -> dict[str, Peer]:
        return {"llama": ([graph.runner(threads) for graph in graphs], lambda: graphs[0].result(shape))}

    @abstractmethod
    def shapes(self) -> list[tuple[int, int, int]]:
        """Of the matrices: experts (0: one matrix alone), rows, columns."""

    @abstractmethod
    def work(self, count: int, threads: int) -> Work:
        """What a case of so many tokens does."""


def _rows_of_case(case: tuple[str, str], form: str, subject: Subject, count: int, threads: int,
                  settings: Settings) -> list[Row]:
    settings.report(f"{' '.join(case)}, {threads} thread{'s' * (threads > 1)}")
    work = subject.work(count, threads)
    work.programs[0]()
    _check("sapper", work.result, work.expected, subject.tolerance)
    places = cycle(range(len(work.programs)))
    contestants: dict[str, Callable[[], Any]] = {"sapper": rotating(work.programs, places)}
    for peer, (runs, result) in work.peers.items():
        runs[0]()
        _check(peer, result(), work.expected, subject.tolerance)
        contestants[peer] = rotating(runs, places)
    timings, peaks = with_floor(contestants, settings.peaks(threads), settings, products=(work.products,), reads=True)
    arithmetic_s = work.operations / peaks.arithmetic(work.products)
    memory_s = peaks.floor_s(0, work.read_bytes, 0, "DRAM")
    rate, unit = ((work.operations, "GOP/s" if work.products == "i8" else "GFLOP/s") if arithmetic_s >= memory_s
                  else (work.read_bytes, "GB/s"))
    return rows_of(case[0], form, case[1], threads, timings, max(arithmetic_s, memory_s), rate / 1e9, unit,
                   dict.fromkeys(work.peers, form.removesuffix(ROUNDED)),
                   (work.operations, work.read_bytes, work.products))


def _check(who: str, found: Array, expected: Array, tolerance: float) -> None:
    """Raises RuntimeError for a result that is too far from the expected one, or no number; tolerance: see Subject."""
    off = float((np.abs(found - expected) / expected.std(axis=1, keepdims=True)).max())
    if not off <= tolerance:
        raise RuntimeError(f"{who} is off by {off:.3g} standard deviations of a row; expected {tolerance} at most")


def _copies(size_bytes: int, settings: Settings) -> int:
    """Of what one call reads, to be cold."""
    return max(copies_to_be_cold(size_bytes, settings.peaks(threads).level_bytes["L3"])
               for threads in settings.thread_counts)


# ------------------------------------------------------------------------------------------------------------- weights


def _kind_of(form: str) -> int | None:
    """ggml's number of a format, where it has it."""
    base = form.removesuffix(ROUNDED).upper()
    return next((number for number, (name, _, _) in KINDS.items() if name == base), None)


def _entry(form: str, shape: tuple[int, ...], random: np.random.Generator) -> Any:
    """A tensor of a file with random weights of deviation 1 / sqrt(columns)."""
    if form == FP8:
        return _fp8_entry(shape, random)
    kind = _kind_of(form)
    assert kind is not None
    return TensorEntry("weights", shape, kind, _bytes(_blocks_of(form.removesuffix(ROUNDED), shape, random)))


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _blocks_of(form: str, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    """As a GGUF file has them."""
    factor = shape[-1] ** -0.5
    if form == BF16:
        return (random.standard_normal(shape, np.float32) * np.float32(factor)).astype(ml_dtypes.bfloat16)
    elements, size = next((elements, size) for name, elements, size in KINDS.values() if name == form)
    blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // elements, size), np.uint8)
    if form == "Q8_0":      # who quantises makes no -128
        quants = blocks[..., 2:].view(np.int8)
        np.maximum(quants, -127, out=quants)
    for place, value in PARTS[form].items():
        numbers = value * factor * random.uniform(0.8, 1.2, (*blocks.shape[:-1], 1))
        blocks[..., place : place + 2] = numbers.astype("<f2").view(np.uint8)
    return blocks


class _AtHand:
    """An array as a part of a file (models/stored.py)."""

    def __init__(self, array: Array) -> None:
        self._bytes = _bytes(array)

    def __len__(self) -> int:
        return len(self._bytes)

    def read(self) -> memoryview:
        return self._bytes


def _fp8_entry(shape: tuple[int, ...], random: np.random.Generator) -> ScaledEntry:
    """As a checkpoint has it."""
    deviation = 30.0  # the largest of 16 million is then some 170 of the 448 that there are
    codes = (random.standard_normal(shape, np.float32) * deviation).astype(ml_dtypes.float8_e4m3fn)
    extents = tuple(-(-extent // BLOCK) for extent in shape)
    scale = (random.uniform(0.8, 1.2, extents) / (deviation * shape[-1] ** 0.5)).astype(np.float32)
    parts: list[Any] = [_AtHand(codes), _AtHand(scale)]
    return ScaledEntry("the benchmark", SafetensorsEntry("weight", shape, FP8_TYPE, parts[0]),
                       SafetensorsEntry("scale", extents, "F32", parts[1]))


# ------------------------------------------------------------------------------------------------------------ products


class Products(Subject):
    """Matrices of SHAPE. Activations of 8 bits leave results off by 0.005 to 0.007, the farthest of 2 million by 0.04,
    those of llama.cpp alike."""

    tolerance = 0.08

    def __init__(self, form: str, counts: Sequence[int], settings: Settings) -> None:
        super().__init__(form, counts, settings)
        rows, columns = SHAPE
        entry = _entry(form, SHAPE, np.random.default_rng(1))
        copies = _copies(entry.nbytes, settings)
        loader = Loader("the benchmark", {f"{one}.weight": entry for one in range(copies)},
                        {"matrix": "{}.weight"}, "file")
        self.matrices = [loader.joined([Use("matrix", rows)], columns, one) for one in range(copies)]
        loader.arena.settle()
        self.wide = entry.read()
        self.held: list[list[int]] = []
        if self.peer is not None:
            self.held = self.peer.weights(entry.type, [SHAPE], [np.frombuffer(entry.data, np.uint8)], copies,
                                          self._build(self.peer, 1))

    def shapes(self) -> list[tuple[int, int, int]]:
        return [(0, *SHAPE)]

    def work(self, count: int, threads: int) -> Work:
        rows, columns = SHAPE
        x, y, work = empty((count, columns)), empty((count, rows)), Workspace(columns, threads)
        x[...] = _rows_of_x(count, columns)
        programs = [self._program(matrix, x, y, work, threads) for matrix in self.matrices]
        peers = {} if self.peer is None else self._of_graphs(
            self.peer.graphs(self.held, self._build(self.peer, count)), y.shape, threads)
        return Work(programs, y, peers, x @ self.wide.T, 2 * count * rows * columns, self.matrices[0].nbytes,
                    _products_of(self.matrices[0], count, work))

    @staticmethod
    def _build(peer: Ggml, count: int) -> Build:
        from .bench_ggml import product

        return product(*peer.inputs(_rows_of_x(count, SHAPE[1])))

    @staticmethod
    def _program(matrix: Matrix, x: Array, y: Array, work: Workspace, threads: int) -> Program:
        """As sessions make theirs (models/session.py)."""
        if len(x) == 1:
            return Program(matrix.apply(x[0], y[0], work), static=True, threads=threads)
        count = Variable("count", len(x))
        steps = matrix.apply_rows("matmul_nt", Rows(x, count), (), [Rows(y, count)], work)
        return Program(steps, static=True, threads=threads)


def _rows_of_x(count: int, columns: int) -> Array:
    return np.random.default_rng(count).standard_normal((count, columns), np.float32)


def _products_of(matrix: Matrix, count: int, work: Workspace) -> str:
    """By what a matrix is multiplied with so many rows: "f32", "bf16" or "i8"."""
    if isinstance(matrix, ScaledMatrix):
        return "f32" if matrix.in_f32(count, work) else "bf16"
    if count > 1 and matrix.rounds_rows(count, work):
        return "bf16"
    return "i8" if matrix.quantises else "f32"


# ------------------------------------------------------------------------------------------------------------ mixtures


class MixtureSession(Session):
    """A session of which the experts alone run."""

    def program(self, one: MixtureWeights, chosen: Array, shares: Array) -> Program:
        """What the chosen experts of each token of a step, i32 [tokens, taken], add to its row of `_y` by their shares,
        f32, made of its row of `_x`; to `_between`."""
        count = len(chosen)
        self._experts, self._shares = np.zeros_like(self._experts), np.zeros_like(self._shares)
        self._experts[:count], self._shares[:count] = chosen, shares
        self._capacity = count
        operands = self._x, self._y, self._between
        steps = (self._experts_of_one(one, *(rows[0] for rows in operands)) if count == 1
                 else self._experts_of_several(one, *operands))
        return self._program([("experts", steps)])

    def operands(self, count: int) -> tuple[Array, Array, Array]:
        """What `program` reads and where its result is."""
        return self._x[:count], self._y[:count], self._between[:count]

    def products(self, one: MixtureWeights, count: int) -> str:
        """By what they are made: "f32", "bf16" or "i8"."""
        if one.gate.rounds(2, count * one.taken, self._work):
            return "bf16"
        return "i8" if isinstance(one.gate, PanelExperts) and one.gate.together.quantises else "f32"


class Mixtures(Subject):
    """Layers with a mixture each. Where few tokens meet few of a layer's experts, it is as many sets of weights as have
    these apart. Results are off by 0.012 to 0.02, the farthest of 500 000 by 0.11: the hidden rows are rounded too, and
    as products of two numbers have longer tails."""

    tolerance = 0.25

    def __init__(self, form: str, counts: Sequence[int], settings: Settings) -> None:
        super().__init__(form, counts, settings)
        random = np.random.default_rng(1)
        features, hidden, experts = (MIXTURE[key] for key in (
            "hidden_size", "moe_intermediate_size", "n_routed_experts"))
        shapes = {"expert_gate": (experts, hidden, features), "expert_up": (experts, hidden, features),
                  "expert_down": (experts, features, hidden)}
        self.entries = {role: _entry(form, shape, random) for role, shape in shapes.items()}
        expert_bytes = sum(entry.nbytes for entry in self.entries.values()) // experts
        layers = max(-(-_copies(len(set(chosen.flat)) * expert_bytes, settings) // _sets(chosen))
                     for chosen in map(_routing, counts))
        config = from_json({**SMALL_V2, **MIXTURE, **BESIDE, "num_hidden_layers": layers}, "the benchmark")
        names = {GGUF_NAMES[role].format(layer): entry for role, entry in self.entries.items()
                 for layer in range(layers)}
        tensors = {name: names[name] if name in names else
                   TensorEntry(name, shape, 0, _bytes(np.zeros(shape, np.float32)))
                   for name, shape in tensors_of(config).items() if 0 not in shape}
        dtype = loaded_as(form)
        self.model = Untrained(config, load_weights(Loader("the benchmark", tensors, GGUF_NAMES, dtype), config), dtype)
        self.wide = {role: entry.read() for role, entry in self.entries.items()}
        self.held: list[list[int]] = []
        if self.peer is not None:
            self.held = self.peer.weights(
                self.entries["expert_gate"].type, list(shapes.values()),
                [np.frombuffer(entry.data, np.uint8) for entry in self.entries.values()], layers,
                self._build(self.peer, _routing(1), np.ones((1, MIXTURE["num_experts_per_tok"]), np.float32)))

        self.for_torch = self._torch_weights(layers) if form.startswith(BF16) and _has_torch(settings) else []

    def _torch_weights(self, layers: int) -> list[list[Any]]:
        """Gate, up and down of each layer, as they lie in a file, on huge pages."""
        arena = Arena()

        def copy(entry: TensorEntry) -> Any:
            made = arena.empty(entry.shape, np.dtype(ml_dtypes.bfloat16))
            made[...] = np.frombuffer(entry.data, made.dtype).reshape(entry.shape)
            return torch_view(made)

        return [[copy(entry) for entry in self.entries.values()] for _ in range(layers)]

    def shapes(self) -> list[tuple[int, int, int]]:
        return [(MIXTURE["n_routed_experts"], *pair) for pair in (
            (MIXTURE["moe_intermediate_size"], MIXTURE["hidden_size"]),
            (MIXTURE["hidden_size"], MIXTURE["moe_intermediate_size"]))]

    def work(self, count: int, threads: int) -> Work:
        session = MixtureSession(self.model, threads=threads)
        mixtures = [layer.feed_forward for layer in self.model.weights.layers
                    if isinstance(layer.feed_forward, MixtureWeights)]
        x, residual, result = session.operands(count)
        x[...], residual[...] = _rows_of_x(count, x.shape[1]), 1.0
        chosen = _routing(count)
        shares = np.random.default_rng(count).dirichlet(np.ones(chosen.shape[1]), count).astype(np.float32)
        met, one = len(set(chosen.flat)), mixtures[0]
        turns = [chosen + turn * met for turn in range(_sets(chosen))]
        programs = [session.program(layer, turn, shares) for turn in turns for layer in mixtures]
        peers: dict[str, Peer] = {}
        if self.for_torch:
            set_peer_threads("torch", threads)
            peers["torch"] = _torch_peer(self.for_torch, x, residual, turns, shares)
        if self.peer is not None:
            graphs = [graph for turn in turns
                      for graph in self.peer.graphs(self.held, self._build(self.peer, turn, shares))]
            peers |= self._of_graphs(graphs, result.shape, threads)
        size = one.gate.size + one.up.size + one.down.size
        read_bytes = one.gate.nbytes + one.up.nbytes + one.down.nbytes
        return Work(programs, result, peers, self._expected(x, chosen, shares) + residual,
                    2 * chosen.size * size, met * read_bytes, session.products(one, count))

    @staticmethod
    def _build(peer: Ggml, chosen: Array, shares: Array) -> Build:
        from .bench_ggml import mixture

        count, features = len(chosen), MIXTURE["hidden_size"]
        x, residual = _rows_of_x(count, features)[:, None], np.ones((count, features), np.float32)
        return mixture(peer.inputs(x, chosen, shares[..., None], residual), (*chosen.shape, features))

    def _expected(self, x: Array, chosen: Array, shares: Array) -> Array:
        """What the experts add."""
        made = np.zeros_like(x)
        for expert in set(chosen.flat):
            gate, up, down = (self.wide[role][expert] for role in ("expert_gate", "expert_up", "expert_down"))
            tokens, places = np.nonzero(chosen == expert)
            gated = x[tokens] @ gate.T
            hidden = gated / (1 + np.exp(-gated)) * (x[tokens] @ up.T)
            made[tokens] += shares[tokens, places, None] * (hidden @ down.T)
        return made


def _has_torch(settings: Settings) -> bool:
    """Whether PyTorch takes part: not where it would release tile registers after a product, as llama.cpp, which has
    configured them once, would die of that (bench_suites.SUITES)."""
    if "torch" not in settings.against:
        return False
    if Workspace(1, 1).has_tiles():
        settings.say("torch is left out of mixtures: it releases the tile registers that llama.cpp has configured")
        return False
    return True


def _torch_peer(layers: Sequence[Sequence[Any]], x: Array, residual: Array, turns: Sequence[Array],
                shares: Array) -> Peer:
    """As transformers walks a mixture: expert by expert, its rows gathered, and added to the result."""
    import torch

    rows, behind, parts = (torch.from_numpy(one.copy()).bfloat16() for one in (x, residual, shares))
    found: list[Any] = [None]

    def runner(weights: Sequence[Any], chosen: Any) -> Callable[[], None]:
        gate, up, down = weights

        def run() -> None:
            with torch.inference_mode():
                total = behind.clone()
                for expert in chosen.unique().tolist():
                    tokens, places = torch.where(chosen == expert)
                    taken = rows[tokens]
                    hidden = torch.nn.functional.silu(taken @ gate[expert].T) * (taken @ up[expert].T)
                    total.index_add_(0, tokens, hidden @ down[expert].T * parts[tokens, places, None])
                found[0] = total

        return run

    runs = [runner(weights, torch.from_numpy(turn)) for turn in turns for weights in layers]
    return runs, lambda: np.asarray(found[0].float().numpy())


def _routing(count: int) -> Array:
    """The experts of so many tokens, i32 [tokens, taken], other ones for each; those that any meets are the first."""
    random, experts = np.random.default_rng(count), MIXTURE["n_routed_experts"]
    chosen = np.stack([random.permutation(experts)[: MIXTURE["num_experts_per_tok"]] for _ in range(count)])
    return np.unique(chosen, return_inverse=True)[1].reshape(chosen.shape).astype(np.int32)


def _sets(chosen: Array) -> int:
    """How many times the experts that are met are in a layer."""
    return MIXTURE["n_routed_experts"] // len(set(chosen.flat))
