"""Running a sapper kernel on the emulator: compiled for a GPU as a call would be, then launched.

    emulate.run(matmul, a, b, c, target="sm_80")

Enters: a kernel and the arguments of a call (NumPy arrays, scalars). Leaves: the outputs are written, and a `Result`
with counters. Holds: the call is checked and specialised as any other; scratch memory starts as NaN, so that what a
kernel reads there before it wrote it shows.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codegen.pipeline import Compiled, compile_kernel
from ..ir.scratch import scratch_bytes
from ..runtime.arguments import Parameter, Signature, TensorView, fill_words
from ..runtime.dtypes import numpy_dtype
from ..runtime.launch import compile_for_call
from ..runtime.specialise import specialise
from ..targets import target as find_target
from ..targets.ptx.text import BLOCK_WARPS, SWIZZLE_BYTES, SYNC_BYTES
from .errors import EmulationError
from .launch import Argument, Result, load
from .machine import Options
from .tensor_map import TensorMap


def run(kernel: Any, *arguments: Any, target: str, workers: int = 4, schedule: Any = None,
        static: frozenset[str] = frozenset(), aligned: Iterable[str] | None = None,
        options: Options | None = None, code: Compiled | None = None, trial: bool = True) -> Result:
    """Compile a kernel for a GPU and run it on the emulator.

    target: such as "sm_80". workers: how many the launch has at least; where a worker is one warp, a block holds four,
    and clusters are whole.
    static: dims compiled in. aligned: tensors whose rows are taken to start at multiples of 64 bytes; None: the large
    ones that do. code: what to run in place of what a call would take, which is a piece by hand where the kernel has
    one that is right, and no schedule is given. trial: as a call does, take by hand only what passed its trial.
    Raises ArgumentError as a call does, EmulationError and its kinds, and ValueError for a target that is no GPU.
    """
    facts = find_target(target)
    if not facts.assembler_allocates:
        raise ValueError(f"target: found {target!r}; expected a GPU such as sm_80; mend: call the kernel itself")
    signature = Signature(kernel.name, [Parameter.of(name, type) for name, type in kernel.parameters],
                          kernel.options.get("in_place", ()))
    binding = signature.bind(arguments)
    known = specialise(signature, binding, static)
    compiled = code
    if compiled is None:
        make = compile_for_call if trial else compile_kernel
        compiled = make(kernel, static_dims=dict(known.static_dims), unit_strides=dict(known.unit_strides),
                        dim_classes=dict(known.dim_classes), target=facts, schedule=schedule,
                        aligned=frozenset(known.aligned if aligned is None else aligned))
    signature.check_stores(binding, compiled.stored)
    signature.check_requires(binding, compiled.requires)
    copies: dict[tuple[int, int], NDArray[np.uint8]] = {}
    tensors = {position: _memory_of(view, kernel.name, copies) for position, view in binding.tensors.items()}
    words: list[Argument] = list(fill_words(signature, compiled.slots, binding, lambda position: position))
    for number, slot in enumerate(compiled.slots):
        if slot.endswith(".data"):
            words[number] = tensors[int(words[number])]  # type: ignore[arg-type]
    for name, dtype, dims, box in compiled.tensor_maps:
        memory = tensors[signature.positions[name]]
        shape = [binding.dims[dim] if isinstance(dim, str) else dim for dim in dims]
        kind = numpy_dtype(dtype)
        array = memory[:math.prod(shape) * kind.itemsize].view(kind).reshape(shape)
        words.append(TensorMap(array, box, SWIZZLE_BYTES, memory))
    warps = compiled.warps if compiled.warps > 1 else BLOCK_WARPS
    blocks = -(-workers // compiled.cluster) * compiled.cluster if compiled.warps > 1 else -(-workers // warps)
    each = max(64, scratch_bytes(compiled.scratch, binding.dims))
    shared = scratch_bytes(compiled.shared_scratch, binding.dims)
    scratch = np.full(each * blocks * warps // compiled.warps + shared, 0xFF, np.uint8)
    result = load(compiled.text()).launch(
        grid=(blocks,), block=(32 * warps,), arguments=[scratch, each, np.zeros(SYNC_BYTES, np.uint8), *words],
        shared_bytes=compiled.near_bytes, cooperative=True, options=options)
    for (address, size_bytes), copy in copies.items():
        ctypes.memmove(address, copy.ctypes.data, size_bytes)
    return result


def _memory_of(view: TensorView, kernel: str, copies: dict[tuple[int, int], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """The bytes from a tensor's first element to its last, as an array; the same one for the same memory."""
    low, high = view.extent
    if low:
        raise EmulationError(f"{kernel}: found a tensor with a negative stride; expected its first element to be its "
                             "first in memory; mend: pass a copy")
    key = (view.address, high)
    if key not in copies:
        copies[key] = np.empty(max(high, 1), np.uint8)
        ctypes.memmove(copies[key].ctypes.data, view.address, high)
    return copies[key]
