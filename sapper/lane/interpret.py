"""The lane interpreter: runs any lane program, at any lane count, on real memory with NumPy.

Enters: a lane function, the argument block as 64-bit words (docs/ir.md, "Lane IR"), and a Memory that knows every
buffer the program may touch. Leaves: what the program stored. Holds: each op means what its line in
sapper/lane/ops.py says (arithmetic.py has the pure ones), and no byte outside a registered buffer is read or written:
LaneError names op, lane, address and the nearest buffer instead.

Rows are NumPy vectors of `lanes` elements (b32: uint32), masks vectors of bool, scalars Python integers. No vector
is ever changed in place, so values may share storage. Workers take turns (strands.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import RowType, f32
from ..lang.by_hand import CONTRACTIONS, PIECES
from ..tile import semantics
from .arithmetic import ELEMENTS, LOW, ROW_OF_ELEMENTS, fma32, halves, pure_function, wrap64
from .interpret_units import BUILDERS as UNIT_BUILDERS
from .memory import Array, LaneError, Memory
from .strands import Aborted, Launch, Step, Worker, at_op, bytes_at
from .synchronise import values_of_run

TOGETHER = 3
"""So many multiply-adds are quicker in one piece, with what it takes to put their operands together."""


class Program:
    """A lane function made ready to run. Compile once, run often."""

    def __init__(self, function: Function) -> None:
        if function.stage != "lane":
            raise LaneError(f"found a {function.stage} function; expected a lane function")
        self.function = function
        self.lanes: int = function.attributes["lanes"]
        self._slots: dict[Value, int] = {}
        self._steps = self.block(function.body)

    def run(self, words: NDArray[np.int64], memory: Memory, workers: int = 1) -> None:
        """Run a launch of `workers` workers; see run()."""
        attributes = self.function.attributes
        launch = Launch([int(w) for w in words], memory, workers, attributes.get("warps", 1),
                         attributes.get("near_bytes", 0), attributes.get("cluster", 1))
        if launch.strands == 1:
            self._run_worker(launch, 0)
            return
        threads = [threading.Thread(target=self._run_thread, args=(launch, n), daemon=True)
                   for n in range(launch.strands)]
        for thread in threads:
            thread.start()
        launch.turns[0].release()
        for thread in threads:
            thread.join()
        if launch.failure is not None:
            raise launch.failure

    def _run_worker(self, launch: Launch, number: int) -> None:
        environment: list[Any] = [None] * (len(self._slots) + 1)
        environment[0] = Worker(launch, number)
        with np.errstate(all="ignore"):
            for step in self._steps:
                step(environment)

    def _run_thread(self, launch: Launch, number: int) -> None:
        launch.turns[number].acquire()
        try:
            if launch.failure is None:
                self._run_worker(launch, number)
        except Aborted:
            return  # the worker that failed has said why
        except BaseException as error:
            launch.failure = error
        finally:
            launch.running[number] = False
            launch.next_turn(number)

    # From ops to steps.

    def slot(self, value: Value) -> int:
        return self._slots.setdefault(value, len(self._slots) + 1)

    def block(self, block: Block) -> list[Step]:
        """The steps of a block. Multiply-adds of f32 wait for the first op that needs one of them, and are then done
        together: they touch no memory and can't fail, and NumPy takes hardly longer for all of them than for one."""
        steps: list[Step] = []
        waiting: dict[Value, Op] = {}
        for op in block.ops:
            if op.blocks or op.name == "yield" or not waiting.keys().isdisjoint(op.operands):
                steps += self._multiply_adds(list(waiting.values()))
                waiting.clear()
            if op.name == "fma" and isinstance(op.result.type, RowType) and op.result.type.dtype is f32:
                waiting[op.result] = op
            elif op.name != "yield":
                steps.append(self._op(op))
        return steps + self._multiply_adds(list(waiting.values()))

    def _multiply_adds(self, ops: list[Op]) -> list[Step]:
        if len(ops) < TOGETHER:
            return [self._op(op) for op in ops]
        results = [self.slot(op.result) for op in ops]
        first, second, third = ([self.slot(op.operands[i]) for op in ops] for i in range(3))
        shape = len(ops), self.lanes

        def together(e: list[Any]) -> None:
            a, b, c = (np.concatenate([e[v] for v in slots]) for slots in (first, second, third))
            for place, row in zip(results, fma32(a, b, c).reshape(shape), strict=True):
                e[place] = row

        return [together]

    def _op(self, op: Op) -> Step:
        function = pure_function(op, self.lanes)
        if function is not None:
            return self._pure(op, function)
        build = _BUILDERS.get(op.name)
        if build is None:
            raise LaneError(f"found op {op.name}; expected an op of the lane IR")
        return build(self, op)

    def _pure(self, op: Op, function: Callable[..., Any]) -> Step:
        operands = [self.slot(v) for v in op.operands]
        if len(op.results) > 1:
            results = [self.slot(v) for v in op.results]

            def several(e: list[Any]) -> None:
                for place, made in zip(results, function(*[e[v] for v in operands]), strict=True):
                    e[place] = made

            return several
        result = self.slot(op.result)
        if op.name in ("s_floordiv", "s_mod"):
            a, b = operands

            def divide(e: list[Any]) -> None:
                if e[b] == 0:
                    raise LaneError(f"{at_op(op)}: found the divisor 0; expected another")
                e[result] = function(e[a], e[b])

            return divide
        if not operands:
            value = function()

            def constant(e: list[Any]) -> None:
                e[result] = value

            return constant
        if len(operands) == 1:
            (a,) = operands

            def unary(e: list[Any]) -> None:
                e[result] = function(e[a])

            return unary
        if len(operands) == 2:
            a, b = operands

            def binary(e: list[Any]) -> None:
                e[result] = function(e[a], e[b])

            return binary
        if len(operands) > 3:
            def several(e: list[Any]) -> None:
                e[result] = function(*[e[operand] for operand in operands])

            return several
        a, b, c = operands

        def ternary(e: list[Any]) -> None:
            e[result] = function(e[a], e[b], e[c])

        return ternary

    def address(self, op: Op, first: int) -> tuple[Callable[[list[Any]], int], int | None]:
        """What computes the address of the memory operand at operand `first`, and the slot of the mask or None."""
        attributes = op.attributes
        disp = attributes.get("disp", 0)
        scale = attributes.get("scale", 1)
        base = self.slot(op.operands[first])
        mask = self.slot(op.operands[-1]) if attributes.get("masked") else None
        if attributes.get("indexed"):
            index = self.slot(op.operands[first + 1])
            return (lambda e: (e[base] + e[index] * scale + disp) & LOW), mask
        return (lambda e: (e[base] + disp) & LOW), mask

    def offsets(self, op: Op, first: int) -> tuple[Callable[[list[Any]], list[int]], int | None]:
        """The same for gather and scatter: an address for each lane."""
        attributes = op.attributes
        disp = attributes.get("disp", 0)
        scale = attributes.get("scale", 1)
        base = self.slot(op.operands[first])
        offsets = self.slot(op.operands[first + 1])
        mask = self.slot(op.operands[-1]) if attributes.get("masked") else None
        return (lambda e: [(e[base] + o * scale + disp) & LOW for o in e[offsets].tolist()]), mask


def _build_arg(program: Program, op: Op) -> Step:
    slot, result = op.attributes["slot"], program.slot(op.result)

    def arg(e: list[Any]) -> None:
        words = e[0].words
        if slot >= len(words):
            raise LaneError(f"{at_op(op)}: found an argument block of {len(words)} words; expected at least {slot + 1}")
        e[result] = words[slot]

    return arg


def _build_worker(program: Program, op: Op) -> Step:
    result = program.slot(op.result)

    def worker(e: list[Any]) -> None:
        e[result] = e[0].number

    return worker


def _build_workers(program: Program, op: Op) -> Step:
    result = program.slot(op.result)

    def workers(e: list[Any]) -> None:
        e[result] = e[0].launch.workers

    return workers


def _build_s_load(program: Program, op: Op) -> Step:
    address, _ = program.address(op, 0)
    kind, result = ELEMENTS[op.attributes["dtype"]], program.slot(op.result)

    def s_load(e: list[Any]) -> None:
        e[result] = int(bytes_at(e[0], op, address(e), kind.itemsize, False, None).view(kind)[0])

    return s_load


def _build_s_store(program: Program, op: Op) -> Step:
    address, _ = program.address(op, 1)
    value = program.slot(op.operands[0])
    size_bytes = ELEMENTS[op.attributes["dtype"]].itemsize

    def s_store(e: list[Any]) -> None:
        data = (e[value] & ((1 << 8 * size_bytes) - 1)).to_bytes(size_bytes, "little")
        bytes_at(e[0], op, address(e), size_bytes, True, None)[:] = np.frombuffer(data, np.uint8)

    return s_store


def _build_load(program: Program, op: Op) -> Step:
    address, mask = program.address(op, 0)
    kind, row = ELEMENTS[op.attributes["dtype"]], ROW_OF_ELEMENTS[op.attributes["dtype"]]
    result, lanes, size_bytes = program.slot(op.result), program.lanes, kind.itemsize
    bits, times = op.attributes.get("bits"), 2 if op.attributes.get("twice") else 1
    lanes //= times

    def load(e: list[Any]) -> None:
        at = address(e)
        whole = e[0].memory.find(at, lanes * size_bytes, False)
        if isinstance(whole, str):  # some lane is outside; which one, and is it on?
            raw = np.zeros(lanes, kind)
            on = e[mask] if mask is not None else np.ones(lanes, bool)
            for lane in np.flatnonzero(on).tolist():
                lane_at = (at + lane * size_bytes) & LOW
                raw[lane] = bytes_at(e[0], op, lane_at, size_bytes, False, lane).view(kind)[0]
        else:
            raw = whole.view(kind)
        value = raw.astype(row) if times == 1 else np.tile(raw.astype(row), times)
        if bits is not None and (value.view(np.uint32) & np.uint32(~bits & 0xFFFFFFFF)).any():
            raise LaneError(f"{at_op(op)}: found {value.view(np.uint32)}; expected no bits but {bits:#x}")
        e[result] = value if mask is None else np.where(e[mask], value, row.type(0))

    return load


def _build_asm(program: Program, op: Op) -> Step:
    piece, immediates = PIECES[op.attributes["by"]], list(op.attributes["immediates"])
    operands, result = [program.slot(v) for v in op.operands], program.slot(op.result)

    def asm(e: list[Any]) -> None:
        e[result] = piece.run([e[o] for o in operands], immediates)

    return asm


def _build_asm_contract(program: Program, op: Op) -> Step:
    piece, rows, rights = CONTRACTIONS[op.attributes["by"]], op.attributes["rows"], op.attributes["rights"]
    operands, results = [program.slot(v) for v in op.operands], [program.slot(v) for v in op.results]
    tile = rows, len(results) // (rows * rights)
    first = 3 + rights

    def asm_contract(e: list[Any]) -> None:
        values = [e[o] for o in operands]
        for result, value in zip(results, piece.run(e[0].memory, tile, values[:first], values[first:]), strict=True):
            e[result] = value

    return asm_contract


def _build_load_splat(program: Program, op: Op) -> Step:
    address, _ = program.address(op, 0)
    kind, row = ELEMENTS[op.attributes["dtype"]], ROW_OF_ELEMENTS[op.attributes["dtype"]]
    result, lanes = program.slot(op.result), program.lanes

    def load_splat(e: list[Any]) -> None:
        e[result] = bytes_at(e[0], op, address(e), kind.itemsize, False, None).view(kind).astype(row).repeat(lanes)

    return load_splat


def _build_gather(program: Program, op: Op) -> Step:
    addresses, mask = program.offsets(op, 0)
    kind, row = ELEMENTS[op.attributes["dtype"]], ROW_OF_ELEMENTS[op.attributes["dtype"]]
    result, lanes = program.slot(op.result), program.lanes

    base, offsets = program.slot(op.operands[0]), program.slot(op.operands[1])
    scale, disp = op.attributes.get("scale", 1), op.attributes.get("disp", 0)
    step = scale // kind.itemsize if scale % kind.itemsize == 0 else 0

    def gather(e: list[Any]) -> None:
        if step and mask is None:
            # All lanes in one piece of a buffer, as is usual.
            places = e[offsets]
            low, high = int(places.min()), int(places.max())
            span = e[0].memory.find((e[base] + low * scale + disp) & LOW, (high - low) * scale + kind.itemsize, False)
            if not isinstance(span, str):
                e[result] = span.view(kind)[(places - low) * step].astype(row)
                return
        raw = np.zeros(lanes, kind)
        on = e[mask].tolist() if mask is not None else [True] * lanes
        for lane, at in enumerate(addresses(e)):
            if on[lane]:
                raw[lane] = bytes_at(e[0], op, at, kind.itemsize, False, lane).view(kind)[0]
        e[result] = raw.astype(row)

    return gather


def _narrowing(op: Op) -> Callable[[Array], Array]:
    """From a row to elements in memory. An exact store takes the upper halves as they are, whatever is below; one of
    rows without denormals takes these for 0."""
    kind = ELEMENTS[op.attributes["dtype"]]
    if op.attributes.get("denormals") == "none":
        return lambda row: halves(row).astype(np.uint16).view(kind)
    if op.attributes.get("exact"):
        return lambda row: (row.view(np.uint32) >> 16).astype(np.uint16).view(kind)
    return lambda row: row.astype(kind)


def _build_store(program: Program, op: Op) -> Step:
    address, mask = program.address(op, 1)
    kind = ELEMENTS[op.attributes["dtype"]]
    value, lanes, size_bytes = program.slot(op.operands[0]), program.lanes, kind.itemsize
    streaming = op.attributes.get("streaming", False)
    aligned_bytes = min(lanes * size_bytes, 64)
    narrowed = _narrowing(op)

    def store(e: list[Any]) -> None:
        at = address(e)
        if streaming and at % aligned_bytes:
            raise LaneError(f"{at_op(op)}: found the address {at:#x}; expected one aligned to {aligned_bytes} bytes")
        raw = narrowed(e[value])
        whole = e[0].memory.find(at, lanes * size_bytes, True)
        if mask is None and not isinstance(whole, str):
            whole.view(kind)[:] = raw
        elif mask is not None and not isinstance(whole, str):
            np.copyto(whole.view(kind), raw, where=e[mask])
        else:
            on = e[mask] if mask is not None else np.ones(lanes, bool)
            for lane in np.flatnonzero(on).tolist():
                lane_at = (at + lane * size_bytes) & LOW
                bytes_at(e[0], op, lane_at, size_bytes, True, lane).view(kind)[0] = raw[lane]

    return store


def _run_addresses(program: Program, op: Op, run: int) -> tuple[Callable[[list[Any]], list[int]], int | None]:
    """Where the run of each lane begins, and the slot of the mask or None."""
    run_bytes = run * ELEMENTS[op.attributes["dtype"]].itemsize
    gathered, flip = op.attributes.get("gathered"), op.attributes.get("flip", 0)
    disp = op.attributes.get("disp", 0)
    of_lanes, mask = program.offsets(op, 0) if gathered else (None, None)
    address, _ = program.address(op, 0)

    def aligned(e: list[Any]) -> list[int]:
        if of_lanes is not None:
            found = [((at - disp ^ flip) + disp) & LOW for at in of_lanes(e)] if flip else of_lanes(e)
        else:
            start = address(e)
            found = [(start + lane * run_bytes) & LOW for lane in range(program.lanes)]
        for at in found:
            if at % run_bytes:
                raise LaneError(f"{at_op(op)}: found the address {at:#x}; expected one aligned to {run_bytes} bytes")
        return found

    return aligned, mask


def _build_load_run(program: Program, op: Op) -> Step:
    run, lanes = len(op.results), program.lanes
    (addresses, mask), results = _run_addresses(program, op, run), [program.slot(v) for v in op.results]
    kind, row = ELEMENTS[op.attributes["dtype"]], ROW_OF_ELEMENTS[op.attributes["dtype"]]

    def load_run(e: list[Any]) -> None:
        raw = np.zeros((lanes, run), kind)
        on = e[mask].tolist() if mask is not None else [True] * lanes
        for lane, at in enumerate(addresses(e)):
            if on[lane]:
                raw[lane] = bytes_at(e[0], op, at, run * kind.itemsize, False, lane).view(kind)
        for place, result in enumerate(results):
            e[result] = raw[:, place].astype(row)

    return load_run


def _build_store_run(program: Program, op: Op) -> Step:
    values, lanes = [program.slot(v) for v in values_of_run(op)], program.lanes
    run = len(values)
    addresses, mask = _run_addresses(program, op, run)
    kind, narrowed = ELEMENTS[op.attributes["dtype"]], _narrowing(op)

    def store_run(e: list[Any]) -> None:
        rows = np.stack([narrowed(e[value]) for value in values], axis=1)
        on = e[mask].tolist() if mask is not None else [True] * lanes
        for lane, at in enumerate(addresses(e)):
            if on[lane]:
                bytes_at(e[0], op, at, run * kind.itemsize, True, lane).view(kind)[:] = rows[lane]

    return store_run


def _build_store_lane0(program: Program, op: Op) -> Step:
    address, _ = program.address(op, 1)
    kind, value, narrowed = ELEMENTS[op.attributes["dtype"]], program.slot(op.operands[0]), _narrowing(op)

    def store_lane0(e: list[Any]) -> None:
        bytes_at(e[0], op, address(e), kind.itemsize, True, 0).view(kind)[0] = narrowed(e[value][:1])[0]

    return store_lane0


def _build_scatter(program: Program, op: Op) -> Step:
    addresses, mask = program.offsets(op, 1)
    kind, value, lanes = ELEMENTS[op.attributes["dtype"]], program.slot(op.operands[0]), program.lanes

    def scatter(e: list[Any]) -> None:
        raw = e[value].astype(kind)
        on = e[mask].tolist() if mask is not None else [True] * lanes
        for lane, at in enumerate(addresses(e)):
            if on[lane]:
                bytes_at(e[0], op, at, kind.itemsize, True, lane).view(kind)[0] = raw[lane]

    return scatter


def _build_join(program: Program, op: Op) -> Step:
    addresses, mask = program.offsets(op, 1)
    kind, value, lanes = ELEMENTS[op.attributes["dtype"]], program.slot(op.operands[0]), program.lanes
    name, dtype = op.attributes["kind"], op.attributes["dtype"]

    def join(e: list[Any]) -> None:
        raw = e[value].astype(kind)
        on = e[mask].tolist() if mask is not None else [True] * lanes
        for lane, at in enumerate(addresses(e)):
            if on[lane]:
                element = bytes_at(e[0], op, at, kind.itemsize, True, lane).view(kind)
                element[0] = semantics.elementwise(name, [element[0], raw[lane]], dtype)

    return join


def _nothing(e: list[Any]) -> None:
    """A hint, or an order that the interpreter keeps anyway."""


def _build_nothing(program: Program, op: Op) -> Step:
    return _nothing


def _yields(program: Program, block: Block) -> list[int]:
    terminator = block.terminator
    return [program.slot(v) for v in terminator.operands] if terminator is not None else []


def _build_loop(program: Program, op: Op) -> Step:
    start, stop, *initial = [program.slot(v) for v in op.operands]
    (block,) = op.blocks
    counter, *carried = [program.slot(v) for v in block.arguments]
    steps = program.block(block)
    yields = _yields(program, block)
    results = [program.slot(v) for v in op.results]
    by = op.attributes["step"]

    def loop(e: list[Any]) -> None:
        values = [e[v] for v in initial]
        i, end = e[start], e[stop]
        while i < end:
            e[counter] = i
            for slot, value in zip(carried, values, strict=True):
                e[slot] = value
            for step in steps:
                step(e)
            values = [e[v] for v in yields]
            i = i + by
        for slot, value in zip(results, values, strict=True):
            e[slot] = value

    return loop


def _build_if(program: Program, op: Op) -> Step:
    condition = program.slot(op.operands[0])
    then, otherwise = [(program.block(block), _yields(program, block)) for block in op.blocks]
    results = [program.slot(v) for v in op.results]

    def branch(e: list[Any]) -> None:
        steps, yields = then if e[condition] else otherwise
        for step in steps:
            step(e)
        for slot, value in zip(results, [e[v] for v in yields], strict=True):
            e[slot] = value

    return branch


def _build_tasks(program: Program, op: Op) -> Step:
    total = program.slot(op.operands[0])
    (block,) = op.blocks
    index = program.slot(block.arguments[0])
    steps = program.block(block)
    counter = op.attributes["counter"]

    def tasks(e: list[Any]) -> None:
        worker: Worker = e[0]
        if worker.launch.warps > 1:
            for task in range(worker.number, e[total], worker.launch.workers):
                e[index] = task
                for step in steps:
                    step(e)
            return
        task = worker.number
        while task < e[total]:
            e[index] = task
            for step in steps:
                step(e)
            worker.launch.give_way(worker.strand)
            task = worker.launch.workers + worker.launch.counters[counter]
            worker.launch.counters[counter] += 1

    return tasks


def _build_barrier(program: Program, op: Op) -> Step:
    def barrier(e: list[Any]) -> None:
        e[0].launch.barrier(e[0].strand, op)

    return barrier


_BUILDERS: dict[str, Callable[[Program, Op], Step]] = {
    "arg": _build_arg, "worker": _build_worker, "workers": _build_workers, "s_load": _build_s_load,
    "s_store": _build_s_store, "load": _build_load, "load_splat": _build_load_splat, "asm": _build_asm,
    "asm_contract": _build_asm_contract, "gather": _build_gather, "store": _build_store,
    "store_lane0": _build_store_lane0, "load_run": _build_load_run, "store_run": _build_store_run,
    "scatter": _build_scatter, "join": _build_join,
    "loop": _build_loop, "if": _build_if, "tasks": _build_tasks, "barrier": _build_barrier,
    **UNIT_BUILDERS,
    **dict.fromkeys(("async_commit", "async_wait", "fence_streaming", "group_commit", "group_fence", "prefetch",
                     "register_budget", "signal_fence", "store_fence", "store_wait", "sums_acquire", "sums_release",
                     "sync_lanes", "tile_wake"),
                    _build_nothing),
}


def run(function: Function, words: NDArray[np.int64], memory: Memory, workers: int = 1) -> None:
    """Run a lane function.

    words: the argument block (docs/ir.md: scratch address, scratch bytes of a worker, sync block address, then the
    words of the attribute `slots`). memory: every buffer that the words point to. workers: how many take part.
    Raises LaneError for an access outside the buffers, a scalar division by zero, a misaligned streaming store, or
    a barrier that not every worker reaches.
    """
    Program(function).run(words, memory, workers)


def bind_arguments(
    function: Function,
    arrays: Mapping[str, Array],
    scalars: Mapping[str, Any] | None = None,
    dims: Mapping[str, int] | None = None,
    workers: int = 1,
) -> tuple[NDArray[np.int64], Memory]:
    """The argument block and memory of a call, as the function's attributes `slots` and `scratch_bytes` ask for.

    arrays: by tensor name. scalars: by name, as NumPy scalars of the right dtype (np.float32 bits go to the low
    half; Python floats count as f64, integers are sign-extended). dims: by name. LaneError for a slot nobody fills.
    """
    memory = Memory()
    addresses = {name: memory.add_array(name, array) for name, array in arrays.items()}
    scratch_bytes = -(-function.attributes.get("scratch_bytes", 0) // 64) * 64
    scratch = memory.allocate("scratch", scratch_bytes * workers) if scratch_bytes else 0
    words = [scratch, scratch_bytes, memory.allocate("sync", 9 * 64)]
    for slot in function.attributes.get("slots", ()):
        words.append(_word(slot, arrays, addresses, scalars or {}, dims or {}))
    return np.array([wrap64(w) for w in words], np.int64), memory


def _word(slot: str, arrays: Mapping[str, Array], addresses: Mapping[str, int], scalars: Mapping[str, Any],
          dims: Mapping[str, int]) -> int:
    kind, _, rest = slot.partition(".")
    if kind == "dim" and rest in dims:
        return int(dims[rest])
    if kind == "scalar" and rest in scalars:
        value = scalars[rest]
        if isinstance(value, np.float32):
            return int(value.view(np.uint32))
        if isinstance(value, (float, np.float64)):
            return int(np.float64(value).view(np.int64))
        return int(value)
    if kind in arrays and rest == "data":
        return addresses[kind]
    if kind in arrays and rest.startswith("stride."):
        array = arrays[kind]
        return int(array.strides[int(rest[len("stride.") :])]) // array.itemsize
    raise LaneError(f"found slot {slot!r} in function.attributes; expected one that the arguments fill")
