"""A compiled kernel as the runtime needs it, and its form on disk.

Enters: what the compiler made. Leaves: a `CompiledKernel`, or its bytes (`pack`, `unpack`): one line of JSON, then the
machine code. Holds: `unpack(pack(k)) == k` but for the lines; unpacking never runs anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from ..ir.nodes import Location
from ..ir.scratch import Buffers, scratch_bytes
from . import settings

Term = tuple[float, tuple[str, ...]]


class CompiledKernel(NamedTuple):
    """Machine code and what is needed to call it.

    name: for messages. code: position-independent machine code; the entry is its first byte.
    slots: words of the argument block from word 3 on (docs/ir.md). scratch_bytes: of each worker, and besides them
        `scratch`: buffers whose size follows from dims, each (element bytes, ((constant, dims, multiple), ...)), where
        an axis takes constant * product of dims, rounded up to the multiple.
    counters: how many of the sync block's task counters it takes tasks from. 0 promises that it touches no sync block
        (no parallel loop, no barrier); such a kernel, and one of which it is unknown (None), is run by one worker.
    stored: names of the tensors that it writes.
    requires: each (tensor, dimension, constant, dim, coefficient, ...): with an extent below constant + the sum of
        coefficient * dim it would reach outside the tensor (docs/ir.md).
    tasks: for each parallel loop the factors (constant, dims, size): the quotients of constant * product of dims and
        size, rounded up, multiply to the most tasks that it can have; empty when unknown.
    work: estimated time on one core in nanoseconds, as a sum of coefficient times product of dims; empty when
        unknown. tasks and work only choose how many workers to wake.
    warps, near_bytes, tensor_maps, barriers, cluster, shared_scratch: of code for a GPU; see codegen.pipeline.Compiled.
        `code` is then text.
    lines: (offset, location) where the source line changes; frame: how its frame lies (codegen/unwind.py). Only for
        debuggers: they are not kept on disk, and the frame is only worked out where a debugger is told of it.
    """

    name: str
    code: bytes
    slots: tuple[str, ...]
    scratch_bytes: int = 0
    scratch: Buffers = ()
    counters: int | None = 0
    stored: tuple[str, ...] = ()
    tasks: tuple[tuple[tuple[int, tuple[str, ...], int], ...], ...] = ()
    work: tuple[Term, ...] = ()
    requires: tuple[tuple[str | int, ...], ...] = ()
    warps: int = 1
    near_bytes: int = 0
    tensor_maps: tuple[tuple[str, str, tuple[int | str, ...], tuple[int, ...]], ...] = ()
    barriers: bool = False
    cluster: int = 1
    shared_scratch: Buffers = ()
    lines: tuple[tuple[int, Location], ...] = ()
    frame: tuple[tuple[int, Any], ...] = ()

    @classmethod
    def of(cls, name: str, compiled: Any, stored: tuple[str, ...] = ()) -> CompiledKernel:
        """From a compiler's result: its `code` (or `bytes`), `slots`, `scratch_bytes`, and, where it has them,
        `counters`, `stored`, `tasks`, `work`, `requires`."""
        if isinstance(compiled, CompiledKernel):
            return compiled
        code = getattr(compiled, "code", None)
        if code is None:
            code = compiled.bytes
        return cls(
            name,
            bytes(code),
            tuple(compiled.slots),
            getattr(compiled, "scratch_bytes", 0),
            _tuples(getattr(compiled, "scratch", ())),
            getattr(compiled, "counters", None),
            tuple(getattr(compiled, "stored", None) or stored),
            _tuples(getattr(compiled, "tasks", ())),
            _tuples(getattr(compiled, "work", ())),
            _tuples(getattr(compiled, "requires", ())),
            getattr(compiled, "warps", 1),
            getattr(compiled, "near_bytes", 0),
            _tuples(getattr(compiled, "tensor_maps", ())),
            getattr(compiled, "barriers", False),
            getattr(compiled, "cluster", 1),
            _tuples(getattr(compiled, "shared_scratch", ())),
            tuple(compiled.made.line_table) if hasattr(compiled, "made") else (),
            _frame(compiled.made) if settings.debugging() and hasattr(compiled, "made") else (),
        )

    def scratch_for(self, dims: Mapping[str, int]) -> int:
        """Scratch bytes of each worker for these extents."""
        return self.scratch_bytes + scratch_bytes(self.scratch, dims)

    def shared_scratch_for(self, dims: Mapping[str, int]) -> int:
        """The same of what all workers share, behind the last one's."""
        return scratch_bytes(self.shared_scratch, dims)

    def task_count(self, dims: Mapping[str, int]) -> int | None:
        """Tasks of the parallel loop with the most; None when unknown."""
        return max((
            prod(-(-constant * prod(dims[name] for name in names) // size) for constant, names, size in loop)
            for loop in self.tasks
        ), default=None)

    def work_ns(self, dims: Mapping[str, int]) -> float | None:
        """Estimated time on one core in nanoseconds; None when unknown."""
        if not self.work:
            return None
        return sum(coefficient * prod(dims[name] for name in names) for coefficient, names in self.work)

    def pack(self) -> bytes:
        facts = self._asdict()
        del facts["code"], facts["lines"], facts["frame"]
        return json.dumps(facts, separators=(",", ":")).encode() + b"\n" + self.code

    @classmethod
    def unpack(cls, packed: bytes) -> CompiledKernel:
        """Raises ValueError when the bytes are no packed kernel."""
        head, newline, code = packed.partition(b"\n")
        if not newline:
            raise ValueError("packed kernel: found no header line")
        try:
            facts = json.loads(head)
            return cls(
                str(facts["name"]),
                code,
                tuple(map(str, facts["slots"])),
                int(facts["scratch_bytes"]),
                _tuples(facts["scratch"]),
                None if facts["counters"] is None else int(facts["counters"]),
                tuple(map(str, facts["stored"])),
                _tuples(facts["tasks"]),
                _tuples(facts["work"]),
                _tuples(facts["requires"]),
                int(facts["warps"]),
                int(facts["near_bytes"]),
                _tuples(facts["tensor_maps"]),
                bool(facts["barriers"]),
                int(facts["cluster"]),
                _tuples(facts["shared_scratch"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"packed kernel: found a header without {error}") from error


def _tuples(nested: Any) -> Any:
    """Lists to tuples, all the way down: JSON gives lists back."""
    if isinstance(nested, (list, tuple)):
        return tuple(_tuples(item) for item in nested)
    return nested


def _frame(made: Any) -> tuple[tuple[int, Any], ...]:
    from ..codegen.encode import encode
    from ..codegen.unwind import frame_rows

    return tuple(frame_rows(made.machine, encode(made.machine, made.target.features).offsets))
