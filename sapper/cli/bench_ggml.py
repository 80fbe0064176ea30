"""Single products of llama.cpp, for `sapper bench quantized`: its library ggml, through the functions of ggml.h.

In: weights as GGUF files have them, and rows of f32. Out: `Ggml`, whose graphs run one product, or one mixture of
experts, on ggml's CPU backend. Holds: weights lie as llama.cpp lays a model's out for this processor, where it has a
layout for what they are used for, and have asked for huge pages as ours have; all graphs of a case share the memory
between their weights, as the layers of a model do.

ggml comes with the package llama-cpp-python. Raises ImportError without it, and RuntimeError where ggml says no.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import numpy

Array: TypeAlias = numpy.ndarray[Any, numpy.dtype[Any]]
Build = Callable[["Graph", Sequence[int]], int]
"""A graph and its weights -> its result, a tensor."""
F32, I32 = 0, 26
"""ggml's numbers of types (enum ggml_type)."""
CPU_DEVICE = 0
"""Of enum ggml_backend_dev_type."""
TENSORS = 64
"""Of a graph, at most."""
TRIAL_S = 120
POINTER, SIZE, INT, LONG = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64


class _InitParams(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = (("mem_size", SIZE), ("mem_buffer", POINTER), ("no_alloc", ctypes.c_bool))


SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (POINTER, (_InitParams,)), "ggml_free": (None, (POINTER,)),
    "ggml_tensor_overhead": (SIZE, ()), "ggml_graph_overhead": (SIZE, ()),
    "ggml_nbytes": (SIZE, (POINTER,)),
    "ggml_new_tensor": (POINTER, (POINTER, INT, INT, ctypes.POINTER(LONG))),
    "ggml_view_2d": (POINTER, (POINTER, POINTER, LONG, LONG, SIZE, SIZE)),
    "ggml_mul_mat": (POINTER, (POINTER,) * 3), "ggml_mul_mat_id": (POINTER, (POINTER,) * 4),
    "ggml_swiglu_split": (POINTER, (POINTER,) * 3), "ggml_mul": (POINTER, (POINTER,) * 3),
    "ggml_add": (POINTER, (POINTER,) * 3), "ggml_set_output": (None, (POINTER,)),
    "ggml_new_graph": (POINTER, (POINTER,)), "ggml_build_forward_expand": (None, (POINTER, POINTER)),
    "ggml_gallocr_new": (POINTER, (POINTER,)), "ggml_gallocr_free": (None, (POINTER,)),
    "ggml_gallocr_alloc_graph": (ctypes.c_bool, (POINTER, POINTER)),
    "ggml_backend_dev_by_type": (POINTER, (INT,)), "ggml_backend_dev_init": (POINTER, (POINTER, ctypes.c_char_p)),
    "ggml_backend_dev_backend_reg": (POINTER, (POINTER,)), "ggml_backend_dev_buffer_type": (POINTER, (POINTER,)),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, (POINTER, POINTER)),
    "ggml_backend_reg_get_proc_address": (POINTER, (POINTER, ctypes.c_char_p)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (POINTER, (POINTER, POINTER)),
    "ggml_backend_buffer_free": (None, (POINTER,)), "ggml_backend_free": (None, (POINTER,)),
    "ggml_backend_buffer_get_base": (POINTER, (POINTER,)), "ggml_backend_buffer_get_size": (SIZE, (POINTER,)),
    "ggml_backend_tensor_set": (None, (POINTER, POINTER, SIZE, SIZE)),
    "ggml_backend_tensor_get": (None, (POINTER, POINTER, SIZE, SIZE)),
    "ggml_backend_graph_compute": (INT, (POINTER, POINTER)),
}
"""Function -> what it gives and takes, as ggml.h, ggml-alloc.h and ggml-backend.h declare it."""


@cache
def _library() -> Any:
    """ggml's functions, declared; it keeps its news to itself."""
    import llama_cpp
    from llama_cpp._ggml import libggml

    from .bench_models import quiet_llama

    llama_cpp.llama_log_set(quiet_llama(), POINTER())   # ggml's, too

    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(libggml, name)
        function.restype, function.argtypes = result, arguments
    return libggml


def _there(pointer: int | None, what: str) -> int:
    if not pointer:
        raise RuntimeError(f"ggml could not make {what}")
    return pointer


class Ggml:
    """ggml's CPU backend, and what was made with it until `close`. repacks: in layouts that it makes for this
    processor, where it has some."""

    def __init__(self, repacks: bool = True) -> None:
        self.library = library = _library()
        self._device = _there(library.ggml_backend_dev_by_type(CPU_DEVICE), "a CPU device")
        self._backend = _there(library.ggml_backend_dev_init(self._device, None), "a CPU backend")
        registry = library.ggml_backend_dev_backend_reg(self._device)
        self._set_threads = ctypes.CFUNCTYPE(None, POINTER, INT)(_there(
            library.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads"), "threads"))
        self._plain: int = library.ggml_backend_dev_buffer_type(self._device)
        self._layouts = self._extra(registry) if repacks else []
        self._closing: list[Callable[[], None]] = [lambda: library.ggml_backend_free(self._backend)]

    def _extra(self, registry: int) -> list[int]:
        """The kinds of memory that have layouts of their own, in the order in which llama.cpp tries them."""
        place = self.library.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not place:
            return []
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(POINTER), POINTER)(place)(self._device)
        found: list[int] = []
        while kinds and kinds[len(found)]:
            found.append(kinds[len(found)])
        return found

    def close(self) -> None:
        while self._closing:
            self._closing.pop()()

    def context(self) -> int:
        """Room for the descriptions of TENSORS tensors and of a graph, but not for what is in them."""
        size = TENSORS * self.library.ggml_tensor_overhead() + self.library.ggml_graph_overhead()
        made = _there(self.library.ggml_init(_InitParams(size, None, True)), "a context")
        self._closing.append(lambda: self.library.ggml_free(made))
        return made

    def tensor(self, context: int, kind: int, shape: Sequence[int]) -> int:
        """shape: outermost axis first; ggml counts from the innermost one."""
        extents = (LONG * len(shape))(*reversed(shape))
        return _there(self.library.ggml_new_tensor(context, kind, len(shape), extents), f"a tensor {tuple(shape)}")

    def _place(self, context: int, kind: int) -> int:
        """Memory of a kind for all tensors of a context."""
        buffer = _there(self.library.ggml_backend_alloc_ctx_tensors_from_buft(context, kind), "memory for tensors")
        self._closing.append(lambda: self.library.ggml_backend_buffer_free(buffer))
        return buffer

    def inputs(self, *arrays: Array) -> list[int]:
        """Arrays of f32 and i32 as tensors."""
        context = self.context()
        made = [self.tensor(context, I32 if one.dtype.kind == "i" else F32, one.shape) for one in arrays]
        self._place(context, self._plain)
        for tensor, array in zip(made, arrays, strict=True):
            self._fill(tensor, array)
        return made

    def _fill(self, tensor: int, array: Array) -> None:
        array = numpy.ascontiguousarray(array)
        assert array.nbytes == self.library.ggml_nbytes(tensor)
        self.library.ggml_backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)

    def weights(self, kind: int, shapes: Sequence[Sequence[int]], data: Sequence[Array], copies: int,
                build: Build) -> list[list[int]]:
        """Tensors of these shapes with these bytes, so many times. kind: ggml's number of their format. build: what
        they are used for, by which their layout is chosen."""
        layout = next((one for one in self._layouts if self._takes(one, kind, shapes, build)), self._plain)
        found = []
        for _ in range(copies):
            context = self.context()
            made = [self.tensor(context, kind, shape) for shape in shapes]
            _ask_for_huge_pages(self.library, self._place(context, layout))
            for tensor, array in zip(made, data, strict=True):
                self._fill(tensor, array)
            found.append(made)
        return found

    def _takes(self, layout: int, kind: int, shapes: Sequence[Sequence[int]], build: Build) -> bool:
        """Whether products with weights in that layout can be computed, as llama.cpp asks before it loads a model."""
        context = self.context()
        made = [self.tensor(context, kind, shape) for shape in shapes]
        self._place(context, layout)
        graph = Graph(self, self.context())
        build(graph, made)
        return all(self.library.ggml_backend_dev_supports_op(self._device, product) for product in graph.products)

    def graphs(self, weights: Sequence[Sequence[int]], build: Build) -> list[Graph]:
        """A graph for each set of weights; all have their results in the same memory."""
        memory = _there(self.library.ggml_gallocr_new(self._plain), "memory for graphs")
        self._closing.append(lambda: self.library.ggml_gallocr_free(memory))
        made = []
        for one in weights:
            graph = Graph(self, self.context())
            graph.end(build(graph, one), memory)
            made.append(graph)
        return made

    def run(self, graph: int, threads: int) -> None:
        self._set_threads(self._backend, threads)
        status = self.library.ggml_backend_graph_compute(self._backend, graph)
        if status:
            raise RuntimeError(f"ggml could not compute a graph: it gave {status}")


def _ask_for_huge_pages(library: Any, buffer: int) -> None:
    """Before it is filled; of whole pages, as the system wants them."""
    from ..runtime.system import PAGE_BYTES, advise_huge_pages, round_up

    base, size = library.ggml_backend_buffer_get_base(buffer), library.ggml_backend_buffer_get_size(buffer)
    first = round_up(base, PAGE_BYTES)
    advise_huge_pages(first, max(0, base + size - first) // PAGE_BYTES * PAGE_BYTES)


class Graph:
    """Operations on tensors, those of ggml.h, in order. products: those that have weights."""

    def __init__(self, ggml: Ggml, context: int) -> None:
        self.ggml, self._library, self._context = ggml, ggml.library, context
        self._graph = _there(self._library.ggml_new_graph(context), "a graph")
        self._result = 0
        self.products: list[int] = []

    def mul_mat(self, weights: int, x: int) -> int:
        """x [rows, K] by weights [N, K]: [rows, N]"""
        self.products.append(self._library.ggml_mul_mat(self._context, weights, x))
        return self.products[-1]

    def mul_mat_id(self, weights: int, x: int, chosen: int) -> int:
        """x [tokens, 1 or taken, K] by those of weights [experts, N, K] in chosen [tokens, taken]: [tokens, taken, N]
        """
        self.products.append(self._library.ggml_mul_mat_id(self._context, weights, x, chosen))
        return self.products[-1]

    def swiglu(self, gate: int, up: int) -> int:
        return int(self._library.ggml_swiglu_split(self._context, gate, up))

    def mul(self, a: int, b: int) -> int:
        return int(self._library.ggml_mul(self._context, a, b))

    def add(self, a: int, b: int) -> int:
        return int(self._library.ggml_add(self._context, a, b))

    def columns(self, x: int, index: int, tokens: int, taken: int, features: int) -> int:
        """x[:, index] of x [tokens, taken, features], f32."""
        return int(self._library.ggml_view_2d(
            self._context, x, features, tokens, 4 * taken * features, 4 * index * features))

    def end(self, result: int, memory: int) -> None:
        self._result = result
        self._library.ggml_set_output(result)
        self._library.ggml_build_forward_expand(self._graph, result)
        if not self._library.ggml_gallocr_alloc_graph(memory, self._graph):
            raise RuntimeError("ggml could not make memory for a graph")

    def runner(self, threads: int) -> Callable[[], None]:
        ggml, graph = self.ggml, self._graph

        def run() -> None:
            ggml.run(graph, threads)

        return run

    def result(self, shape: tuple[int, ...]) -> Array:
        """What the last run of this graph, or of another that shares its memory, gave, in f32."""
        made = numpy.empty(shape, numpy.float32)
        assert made.nbytes == self._library.ggml_nbytes(self._result)
        self._library.ggml_backend_tensor_get(self._result, made.ctypes.data, 0, made.nbytes)
        return made


def product(x: int) -> Build:
    """x by one matrix."""
    return lambda graph, weights: graph.mul_mat(weights[0], x)


def mixture(inputs: Sequence[int], extents: tuple[int, int, int]) -> Build:
    """What the chosen experts (gate, up, down) make of x, by shares, and residual. inputs: x [tokens, 1, features],
    chosen [tokens, taken], shares [tokens, taken, 1], residual [tokens, features]; extents: tokens, taken, features.
    The operations are those of llama.cpp's models (build_moe_ffn)."""
    x, chosen, shares, residual = inputs
    tokens, taken, features = extents

    def build(graph: Graph, weights: Sequence[int]) -> int:
        gate, up, down = weights
        hidden = graph.swiglu(graph.mul_mat_id(gate, x, chosen), graph.mul_mat_id(up, x, chosen))
        found = graph.mul(graph.mul_mat_id(down, hidden, chosen), shares)
        total = graph.columns(found, 0, tokens, taken, features)
        for index in range(1, taken):
            total = graph.add(total, graph.columns(found, index, tokens, taken, features))
        return graph.add(total, residual)

    return build


@cache
def survives(kind: int, experts: int, rows: int, columns: int) -> bool:
    """Whether ggml multiplies weights in the layouts that it makes for this processor: it ends the process where it
    finds no kernel for them, so another one tries. experts: 0 for a matrix alone."""
    code = f"from sapper.cli.bench_ggml import trial; trial({kind}, {experts}, {rows}, {columns})"
    try:
        return not subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=TRIAL_S).returncode
    except subprocess.TimeoutExpired:
        return False


def trial(kind: int, experts: int, rows: int, columns: int) -> None:
    """Multiply zeros, one row and several."""
    shape = (experts, rows, columns) if experts else (rows, columns)
    ggml = Ggml()
    try:
        for tokens in (1, 2, 17):
            if experts:
                x, chosen = ggml.inputs(numpy.zeros((tokens, 1, columns), numpy.float32),
                                        numpy.zeros((tokens, 1), numpy.int32))
                build = _of_first_expert(x, chosen)
            else:
                build = product(*ggml.inputs(numpy.zeros((tokens, columns), numpy.float32)))
            size_bytes = ggml.library.ggml_nbytes(ggml.tensor(ggml.context(), kind, shape))
            weights = ggml.weights(kind, [shape], [numpy.zeros(size_bytes, numpy.uint8)], 1, build)
            for graph in ggml.graphs(weights, build):
                graph.runner(1)()
    finally:
        ggml.close()


def _of_first_expert(x: int, chosen: int) -> Build:
    return lambda graph, weights: graph.mul_mat_id(weights[0], x, chosen)
