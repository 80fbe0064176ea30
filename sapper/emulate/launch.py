"""Loading PTX text and launching its kernels on the emulator: the API.

    module = emulate.load(text)
    result = module.launch("add", grid=(4,), block=(128,), arguments=[x, y, z, np.int32(n)])

Enters: text, NumPy arrays (contiguous; written in place by the kernel) and scalars. Leaves: a `Result` with counters.
Holds: blocks run in batches, each of as many whole clusters as keep `BATCH_THREADS` lanes busy; `cooperative=True`
keeps all of them resident at once, as a grid barrier needs. Same input, same result: nothing is random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from . import parse
from .counters import Counters
from .decode import decode
from .errors import EmulationError
from .inline import inline_calls
from .machine import Machine, Options, Shape
from .memory import GLOBAL_BASE, SHARED_START, GlobalMemory, Memory
from .tensor_map import TensorMap
from .unit_memory import smallest_access

BATCH_THREADS = 1024
"""Threads of the blocks that run together, about; more would help only kernels with few instructions."""
MOST_THREADS, MOST_SHARED_BYTES = 1024, 227 * 1024
"""Of a block, on any device so far (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")."""
WORKSPACE_BYTES = 16
"""Of the memory in which blocks of a cooperative launch count who is at the barrier of the grid."""


class Uninitialised:
    """An argument whose elements count as never written: a kernel that reads them before it wrote them is wrong."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array


Argument = Union[NDArray[Any], np.generic, int, float, bytes, Uninitialised, TensorMap]


@dataclass(slots=True)
class Result:
    """What a launch leaves beside the written arrays."""

    counters: Counters = field(default_factory=Counters)


class Module:
    """A loaded PTX text."""

    def __init__(self, module: parse.Module) -> None:
        self.parsed = module

    @property
    def kernels(self) -> list[str]:
        return [name for name, function in self.parsed.functions.items() if function.entry]

    def launch(self, kernel: str | None = None, *, grid: Sequence[int] = (1,), block: Sequence[int] | None = None,
               arguments: Sequence[Argument] = (), shared_bytes: int = 0, cluster: Sequence[int] | None = None,
               cooperative: bool = False, options: Options | None = None, memory: GlobalMemory | None = None) -> Result:
        """Run a kernel; arrays among the arguments are written in place.

        kernel: a name of `kernels`; None: the only one. block: threads; None: what .reqntid says. shared_bytes: dynamic
        shared memory. cluster: blocks; None: what .reqnctapercluster says, or one. memory: of the device,
        as earlier launches left it, for arguments that are addresses in it (bytes of each parameter); None: a new one.
        Raises EmulationError and its kinds.
        """
        if kernel is None:
            if len(self.kernels) != 1:
                raise EmulationError(f"found kernels {', '.join(self.kernels) or '(none)'}, expected a name")
            kernel = self.kernels[0]
        function = self.parsed.functions.get(kernel)
        if function is None:
            raise EmulationError(f"no kernel {kernel!r}; found {', '.join(self.kernels) or '(none)'}")
        shape = Shape(_three(grid), _three(block or function.required_threads or (1,)),
                      _three(cluster or function.required_cluster or (1,)))
        if min(*shape.block, *shape.cluster) < 1 or min(shape.grid) < 0 or shape.threads > MOST_THREADS:
            raise EmulationError(f"found a grid of {shape.grid}, blocks of {shape.block}; expected sizes above 0, and "
                                 f"at most {MOST_THREADS} threads in a block")
        if not 0 <= shared_bytes <= MOST_SHARED_BYTES:
            raise EmulationError(f"found {shared_bytes} bytes of shared memory, expected 0 to {MOST_SHARED_BYTES}")
        if any(g % c for g, c in zip(shape.grid, shape.cluster, strict=True)):
            raise EmulationError(f"grid {shape.grid} is no multiple of the cluster {shape.cluster}")
        if function.required_threads and _three(function.required_threads) != shape.block:
            raise EmulationError(f"found a block of {shape.block}, expected {_three(function.required_threads)} "
                                 f"(.reqntid)")
        function = inline_calls(self.parsed, function)
        launch = _Launch(self.parsed, function, shape, shared_bytes, options or Options(), memory)
        return launch.run(arguments, cooperative)


def load(text: str) -> Module:
    """The module of a PTX text. Raises ParseError with the line."""
    return Module(_parsed(text))


@lru_cache(maxsize=8)
def _parsed(text: str) -> parse.Module:
    """Texts are often loaded again, to be run in another way; no launch changes what was parsed."""
    return parse.parse(text)


def _three(sizes: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*(int(size) for size in sizes), 1, 1, 1)[:3]
    return x, y, z


class _Launch:
    def __init__(self, module: parse.Module, function: parse.Function, shape: Shape, shared_bytes: int,
                 options: Options, memory: GlobalMemory | None) -> None:
        self.module, self.function, self.shape, self.options = module, function, shape, options
        self.dynamic_bytes = shared_bytes
        self.device = GlobalMemory() if memory is None else memory
        self.device.begin_launch()
        self.copies: list[tuple[NDArray[Any], int]] = []
        self.addresses: dict[int, int] = {}
        """id of an array of this call's arguments (all are alive) -> its address."""

    def run(self, arguments: Sequence[Argument], cooperative: bool) -> Result:
        parameters, layout = self._parameters(arguments)
        symbols, shared_total, local_total = self._symbols(layout)
        result = Result()
        cluster, blocks = self.shape.cluster_blocks, self._block_order()
        batch = max(BATCH_THREADS // self.shape.padded_threads // cluster, 1) * cluster
        workspace = 0
        if cooperative:
            batch = len(blocks)
            workspace = self.device.allocate(WORKSPACE_BYTES, "the workspace of the grid", written=True)
        for start in range(0, len(blocks), batch):
            resident = blocks[start:start + batch]
            memory = Memory(self.device, parameters, len(resident), shared_total, self.dynamic_bytes, symbols,
                            local_total,
                            len(resident) * self.shape.padded_threads, workspace)
            machine = Machine(self.function, self.module, self.shape, resident, memory, self.options, result.counters,
                              decode)
            if self.options.races:
                if self.device.shadow is None:
                    self.device.shadow_for(smallest_access(machine)[1])
                assert self.device.shadow is not None
                self.device.shadow.base = self.device.agents_used
            machine.run()
            self.device.agents_used += machine.clocks.count
        for array, address in self.copies:
            offset = address - GLOBAL_BASE
            flat = self.device.bytes[offset:offset + array.nbytes]
            array[...] = flat.view(array.dtype).reshape(array.shape) if array.size else array
        return result

    def _block_order(self) -> list[int]:
        """Blocks in the order in which they run: those of a cluster together, by rank."""
        (gx, gy, gz), (cx, cy, cz) = self.shape.grid, self.shape.cluster
        order = []
        for z in range(0, gz, cz):
            for y in range(0, gy, cy):
                for x in range(0, gx, cx):
                    order += [(x + i) + gx * ((y + j) + gy * (z + k))
                              for k in range(cz) for j in range(cy) for i in range(cx)]
        return order

    def _parameters(self, arguments: Sequence[Argument]) -> tuple[bytes, dict[str, int]]:
        """The bytes of the parameters, and the offset of each."""
        wanted = self.function.parameters
        if len(arguments) != len(wanted):
            named = ", ".join(f"{p.name} of {p.size_bytes} bytes" for p in wanted)
            raise EmulationError(f"{self.function.name} has {len(wanted)} parameters, found {len(arguments)} arguments"
                                 f"; expected one for each of: {named or 'none'}")
        for argument in arguments:
            if isinstance(argument, (np.ndarray, Uninitialised)):
                self._place(argument)
        data, layout = bytearray(), {}
        for parameter, argument in zip(wanted, arguments, strict=True):
            data += bytes(-len(data) % parameter.alignment)
            layout[parameter.name] = len(data)
            piece = self._argument(parameter, argument)
            if len(piece) > parameter.size_bytes:
                raise EmulationError(f"parameter {parameter.name} has {parameter.size_bytes} bytes, found {len(piece)}")
            data += piece.ljust(parameter.size_bytes, b"\0")
        return bytes(data), layout

    def _place(self, argument: NDArray[Any] | Uninitialised) -> int:
        array = argument.array if isinstance(argument, Uninitialised) else argument
        known = self.addresses.get(id(array))
        if known is not None:
            return known
        if not array.flags.c_contiguous:
            raise EmulationError("found an array that is not contiguous")
        address = self.device.allocate(array.nbytes, f"argument {len(self.copies)}",
                                       not isinstance(argument, Uninitialised))
        offset = address - GLOBAL_BASE
        self.device.bytes[offset:offset + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        self.copies.append((array, address))
        self.addresses[id(array)] = address
        return address

    def _argument(self, parameter: parse.Variable, argument: Argument) -> bytes:
        if isinstance(argument, TensorMap):
            return argument.encode(self._place(argument.memory))
        if isinstance(argument, (np.ndarray, Uninitialised)):
            return self._place(argument).to_bytes(8, "little")
        if isinstance(argument, bytes):
            return argument
        if isinstance(argument, np.generic):
            return argument.tobytes()
        size = parameter.size_bytes
        if isinstance(argument, float):
            return np.float64(argument).tobytes() if size == 8 else np.float32(argument).tobytes()
        least, most = -(1 << 8 * size - 1), (1 << 8 * size) - 1
        if not least <= int(argument) <= most:
            raise EmulationError(f"parameter {parameter.name} has {size} bytes, found {int(argument)}; expected "
                                 f"{least} to {most}")
        return (int(argument) & most).to_bytes(size, "little")

    def _symbols(self, layout: dict[str, int]) -> tuple[dict[str, tuple[str, int]], int, int]:
        """(name -> (space, address), bytes of shared memory, bytes of local memory of a thread)."""
        symbols = {name: ("param", offset) for name, offset in layout.items()}
        shared, local = SHARED_START, 0
        external = []
        for variable in (*self.module.variables.values(), *self.function.variables):
            if variable.space == "shared":
                if variable.size_bytes == 0:
                    external.append(variable)
                    continue
                shared = -(-shared // variable.alignment) * variable.alignment
                symbols[variable.name] = ("shared", shared)
                shared += variable.size_bytes
            elif variable.space in ("local", "param"):  # a variable that passes a parameter is one of the thread
                local = -(-local // variable.alignment) * variable.alignment
                symbols[variable.name] = ("local", local)
                local += variable.size_bytes
            elif variable.space in ("global", "const"):
                address = self.device.allocate(variable.size_bytes, variable.name, written=True)
                offset = address - GLOBAL_BASE
                if variable.initial is not None:
                    self.device.bytes[offset:offset + len(variable.initial)] = np.frombuffer(variable.initial, np.uint8)
                symbols[variable.name] = (variable.space, address)
        for variable in external:  # dynamic shared memory starts where the static ends, for all of its names
            start = -(-shared // max(variable.alignment, 16)) * max(variable.alignment, 16)
            symbols[variable.name] = ("shared", start)
        end = max([shared, *(symbols[variable.name][1] + self.dynamic_bytes for variable in external)])
        return symbols, end - SHARED_START, local


