"""Ops of the lane interpreter for units beside the lanes: warps and their memory, matrices, tiles, copies, signals.

Leaves: `BUILDERS`, which interpret.py adds to its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..ir.extents import names_in, shape_of
from ..ir.nodes import Op
from ..ir.types import DTYPES
from ..lang.by_hand import PRODUCTS
from . import fragments
from .arithmetic import ELEMENTS, LOW, NUMPY_ROWS, multiply_tiles
from .memory import Array, LaneError
from .strands import Signal, Step, Worker, at_op, bytes_at

if TYPE_CHECKING:
    from .interpret import Program


def _build_warp(program: Program, op: Op) -> Step:
    result = program.slot(op.result)

    def warp(e: list[Any]) -> None:
        e[result] = e[0].warp

    return warp


def _build_near_memory(program: Program, op: Op) -> Step:
    result = program.slot(op.result)

    def near_memory(e: list[Any]) -> None:
        e[result] = e[0].launch.near[e[0].number]

    return near_memory


def _build_sync_warps(program: Program, op: Op) -> Step:
    workers = program.function.attributes.get("cluster", 1) if op.name == "sync_cluster" else 1

    def sync_warps(e: list[Any]) -> None:
        e[0].launch.meet(e[0].strand, op, workers)

    return sync_warps


def _build_hand_over(program: Program, op: Op) -> Step:
    def hand_over(e: list[Any]) -> None:
        e[0].launch.hand_over(e[0].strand)

    return hand_over


def _build_take_over(program: Program, op: Op) -> Step:
    other = program.slot(op.operands[0])

    def take_over(e: list[Any]) -> None:
        worker: Worker = e[0]
        worker.launch.take_over(worker.strand, e[other] * worker.launch.warps + worker.warp, op)

    return take_over


def _build_async_copy(program: Program, op: Op) -> Step:
    near, near_offsets, base, offsets = [program.slot(v) for v in op.operands[:4]]
    mask = program.slot(op.operands[4]) if op.attributes.get("masked") else None
    disp, source_disp = op.attributes.get("disp", 0), op.attributes.get("source_disp", 0)
    zeros = np.zeros(16, np.uint8)

    def async_copy(e: list[Any]) -> None:
        for lane in range(program.lanes):
            target = bytes_at(e[0], op, e[near] + int(e[near_offsets][lane]) + disp, 16, True, lane)
            target[:] = zeros if mask is not None and not e[mask][lane] else bytes_at(
                e[0], op, e[base] + int(e[offsets][lane]) + source_disp, 16, False, lane)

    return async_copy


def _build_load_matrix(program: Program, op: Op) -> Step:
    base, offsets = [program.slot(v) for v in op.operands]
    results = [program.slot(v) for v in op.results]
    flip, disp = op.attributes.get("flip", 0), op.attributes.get("disp", 0)
    transposed = op.attributes["transposed"]

    def load_matrix(e: list[Any]) -> None:
        rows = [bytes_at(e[0], op, ((e[base] + int(e[offsets][lane])) ^ flip) + disp, 16, False, lane).view(np.uint16)
                for lane in range(program.lanes)]
        for number, result in enumerate(results):
            matrix = np.stack(rows[8 * number:8 * number + 8])
            matrix = np.ascontiguousarray(matrix.T if transposed else matrix)
            e[result] = matrix.reshape(-1).view(np.uint32)

    return load_matrix


def _build_store_matrix(program: Program, op: Op) -> Step:
    base, offsets, *held = [program.slot(v) for v in op.operands]
    flip, disp = op.attributes.get("flip", 0), op.attributes.get("disp", 0)

    def store_matrix(e: list[Any]) -> None:
        rows = np.concatenate([np.ascontiguousarray(e[slot]).view(np.uint8).reshape(8, 16) for slot in held])
        for lane, row in enumerate(rows):
            bytes_at(e[0], op, ((e[base] + int(e[offsets][lane])) ^ flip) + disp, 16, True, lane)[:] = row

    return store_matrix


def _build_asm_multiply(program: Program, op: Op) -> Step:
    piece, rows, columns = PRODUCTS[op.attributes["by"]], op.attributes["rows"], op.attributes["columns"]
    operands, results = [program.slot(v) for v in op.operands], [program.slot(v) for v in op.results]
    first, last = 4 * rows, 4 * rows + 2 * columns

    def asm_multiply(e: list[Any]) -> None:
        values = [e[v] for v in operands]
        for result, value in zip(results, piece.run(values[:first], values[first:last], values[last:]), strict=True):
            e[result] = value

    return asm_multiply


def _build_matrix_multiply(program: Program, op: Op) -> Step:
    operands, results = [program.slot(v) for v in op.operands], [program.slot(v) for v in op.results]
    dtype = op.attributes["dtype"]
    kinds = ELEMENTS[dtype], ELEMENTS[op.attributes.get("right_dtype", dtype)]
    slots = 4 // dtype.size_bytes
    deep = fragments.DEPTH_BYTES // dtype.size_bytes
    exact = np.float64 if dtype.is_float else np.int64

    def spread(registers: list[Array], kind: Any, places: fragments.Places, shape: tuple[int, int]) -> NDArray[Any]:
        made = np.zeros(shape, exact)
        held = np.stack(registers).view(kind).reshape(len(registers), program.lanes, -1).transpose(0, 2, 1)
        made[places] = held.astype(exact)
        return made

    def matrix_multiply(e: list[Any]) -> None:
        registers = [e[v] for v in operands]
        a = spread(registers[:4], kinds[0], fragments.left_places(slots), (fragments.ROWS, deep))
        b = spread(registers[4:6], kinds[1], fragments.right_places(slots), (deep, fragments.COLUMNS))
        sums = np.stack(registers[6:])
        c = sums.astype(exact) + (a @ b)[fragments.C]
        for result, row in zip(results, c.astype(sums.dtype), strict=True):
            e[result] = row

    return matrix_multiply


def _build_tile_state(program: Program, op: Op) -> Step:
    begins = op.name == "tile_configure"

    def tile_state(e: list[Any]) -> None:
        if e[0].tiles is begins:
            raise LaneError(f"{at_op(op)}: found tiles that are {'' if begins else 'not '}configured; expected each "
                            "tile_configure to be followed by its tile_release")
        e[0].tiles = begins

    return tile_state


def _configured(worker: Worker, op: Op) -> None:
    if not worker.tiles:
        raise LaneError(f"{at_op(op)}: found no tile_configure before it; expected one in this worker")


def _tile_rows(program: Program, op: Op, first: int) -> Callable[[list[Any]], Iterator[tuple[int, int, int]]]:
    """What gives number, address and size of each row in memory. first: the operand that is the base."""
    base, stride = (program.slot(v) for v in op.operands[first:])
    disp = op.attributes.get("disp", 0)
    size: int = program.function.attributes["tile"]
    return lambda e: ((row, (e[base] + row * e[stride] + disp) & LOW, 4 * size) for row in range(size))


def _build_tile_zero(program: Program, op: Op) -> Step:
    result, kind = program.slot(op.result), NUMPY_ROWS[op.result.type.dtype]  # type: ignore[union-attr]
    size = program.function.attributes["tile"]
    zeros = np.zeros((size, size), kind)

    def tile_zero(e: list[Any]) -> None:
        _configured(e[0], op)
        e[result] = zeros

    return tile_zero


def _build_tile_load(program: Program, op: Op) -> Step:
    rows, kind = _tile_rows(program, op, 0), NUMPY_ROWS[op.result.type.dtype]  # type: ignore[union-attr]
    result = program.slot(op.result)

    def tile_load(e: list[Any]) -> None:
        _configured(e[0], op)
        e[result] = np.stack([bytes_at(e[0], op, at, size, False, None).view(kind) for _, at, size in rows(e)])

    return tile_load


def _build_tile_store(program: Program, op: Op) -> Step:
    rows, value = _tile_rows(program, op, 1), program.slot(op.operands[0])

    def tile_store(e: list[Any]) -> None:
        _configured(e[0], op)
        for row, at, size in rows(e):
            bytes_at(e[0], op, at, size, True, None)[:] = e[value][row].view(np.uint8)

    return tile_store


def _build_tile_multiply(program: Program, op: Op) -> Step:
    c, a, b = (program.slot(v) for v in op.operands)
    kinds = ELEMENTS[op.attributes["dtype"]], ELEMENTS[op.attributes["right_dtype"]]
    result = program.slot(op.result)

    def tile_multiply(e: list[Any]) -> None:
        _configured(e[0], op)
        e[result] = multiply_tiles(e[c], e[a], e[b], kinds)

    return tile_multiply


def _build_signal(act: Callable[[Worker, Op, int, list[int]], None]) -> Callable[[Program, Op], Step]:
    """act: worker, op, address of the signal, the other operands."""
    def build(program: Program, op: Op) -> Step:
        address, *others = [program.slot(v) for v in op.operands]
        disp = op.attributes.get("disp", 0)
        return lambda e: act(e[0], op, e[address] + disp, [e[slot] for slot in others])

    return build


def _signal_start(worker: Worker, op: Op, address: int, _: list[int]) -> None:
    bytes_at(worker, op, address, 8, True, None)
    worker.launch.signals[address] = Signal(op.attributes["arrivals"])


def _signal_arrive(worker: Worker, op: Op, address: int, _: list[int]) -> None:
    for away in worker.launch.near_to(worker, op):
        worker.launch.count(worker.launch.signal(address + away, op), 1, op.attributes.get("bytes", 0))


def _signal_wait(worker: Worker, op: Op, address: int, others: list[int]) -> None:
    worker.launch.wait(worker.strand, worker.launch.signal(address, op), others[0], op)


def _build_tensor_copy(program: Program, op: Op) -> Step:
    """tensor_copy, to near memory, and tensor_store, from there."""
    stores = op.name == "tensor_store"
    near, *others = [program.slot(v) for v in op.operands]
    coordinates = others if stores else others[1:]
    disp, signal_disp = op.attributes.get("disp", 0), op.attributes.get("signal_disp", 0)
    attributes = program.function.attributes
    name, dtype, dims, box = attributes["tensor_maps"][op.attributes["map"]]
    words = {slot: 3 + number for number, slot in enumerate(attributes["slots"])}
    kind = ELEMENTS[DTYPES[dtype]]

    def tensor_copy(e: list[Any]) -> None:
        worker: Worker = e[0]
        sizes = {name: worker.words[words[f"dim.{name}"]] for dim in dims for name in names_in(dim)}
        shape = shape_of(dims, sizes)
        inside = np.zeros(box, kind)
        start = e[near] + disp
        places = fragments.swizzled(start + np.arange(inside.nbytes)) - start
        if stores:
            inside.reshape(-1).view(np.uint8)[:] = bytes_at(worker, op, start, inside.nbytes, False, None)[places]
        where = [(max(0, e[at]), min(e[at] + n, extent))
                 for at, n, extent in zip(coordinates, box, shape, strict=True)]
        if all(first < last for first, last in where):
            size_bytes = math.prod(shape) * kind.itemsize
            tensor = bytes_at(worker, op, worker.words[words[f"{name}.data"]], size_bytes, stores, None).view(kind)
            part = tensor.reshape(shape)[tuple(slice(*bounds) for bounds in where)]
            mine = inside[tuple(slice(first - e[at], last - e[at])
                                for at, (first, last) in zip(coordinates, where, strict=True))]
            if stores:
                part[:] = mine
            else:
                mine[:] = part
        for away in () if stores else worker.launch.near_to(worker, op):
            bytes_at(worker, op, start + away, inside.nbytes, True, None)[places] = inside.reshape(-1).view(np.uint8)
            worker.launch.count(worker.launch.signal(e[others[0]] + signal_disp + away, op), 0, -inside.nbytes)

    return tensor_copy


def _near_operand(e: list[Any], op: Op, side: str, at: int, first: int, extent: int) -> NDArray[np.float64]:
    """(outer, depth) of a group's operand in near memory, of the outer coordinates from `first` on."""
    attributes = op.attributes
    kind = ELEMENTS[attributes.get("right_dtype" if side == "right" else "dtype", attributes["dtype"])]
    size = kind.itemsize
    offsets = fragments.near_offsets(
        np.arange(first, first + extent)[:, None], np.arange(fragments.GROUP_DEPTH_BYTES // size)[None, :],
        attributes[f"{side}_rows"], attributes.get(f"{side}_panel_bytes", 0), size)
    places = fragments.swizzled(e[at] + attributes.get(f"{side}_disp", 0) + offsets)
    low, high = int(places.min()), int(places.max()) + size
    held = bytes_at(e[0], op, low, high - low, False, None)
    raw = np.stack([held[places - low + byte] for byte in range(size)], axis=-1)
    elements: NDArray[np.float64] = raw.view(kind)[..., 0].astype(np.float64)
    return elements


def _build_group_multiply(program: Program, op: Op) -> Step:
    """The left operand in near memory, or in registers."""
    in_registers = op.name == "group_multiply_rows"
    slots = [program.slot(v) for v in op.operands]
    right, left, sums = (slots[0], slots[1:5], slots[5:]) if in_registers else (slots[1], slots[:1], slots[2:])
    results = [program.slot(v) for v in op.results]
    kind = ELEMENTS[op.attributes["dtype"]]
    columns, fresh = len(sums) * fragments.COLUMNS // 4, op.attributes.get("fresh", False)

    def group_multiply(e: list[Any]) -> None:
        if in_registers:
            a = np.zeros((fragments.ROWS, fragments.DEPTH))
            held = np.stack([e[slot] for slot in left]).view(kind).reshape(4, program.lanes, -1).transpose(0, 2, 1)
            a[fragments.A] = held.astype(np.float64)
        else:
            a = _near_operand(e, op, "left", left[0], e[0].warp % 4 * fragments.ROWS, fragments.ROWS)
        product = a @ _near_operand(e, op, "right", right, 0, columns).T
        rows, within = fragments.C
        for number, (result, slot) in enumerate(zip(results, sums, strict=True)):
            register = number % 4
            part = product[rows[register], number // 4 * fragments.COLUMNS + within[register]]
            before = 0.0 if fresh else e[slot].astype(np.float64)
            e[result] = (before + part).astype(np.float32)

    return group_multiply


def _build_group_wait(program: Program, op: Op) -> Step:
    pairs = [(program.slot(result), program.slot(v)) for result, v in zip(op.results, op.operands, strict=True)]

    def group_wait(e: list[Any]) -> None:
        for result, held in pairs:
            e[result] = e[held]

    return group_wait


SUMS_FIRST = 64
"""Where the columns that are set aside begin: not at 0, so that a place that leaves it out is wrong."""


def _build_sums_open(program: Program, op: Op) -> Step:
    address, columns = program.slot(op.operands[0]), op.attributes["columns"]

    def sums_open(e: list[Any]) -> None:
        worker: Worker = e[0]
        if worker.number in worker.launch.sums:
            raise LaneError(f"{at_op(op)}: found columns that are set aside; expected sums_close of these before")
        first = min(SUMS_FIRST, fragments.SUMS_COLUMNS - columns)
        bytes_at(worker, op, e[address], 4, True, None).view(np.uint32)[:] = first
        worker.launch.sums[worker.number] = (np.full((fragments.SUMS_ROWS, fragments.SUMS_COLUMNS), np.nan, np.float32),
                                             range(first, first + columns))

    return sums_open


def _build_sums_close(program: Program, op: Op) -> Step:
    def sums_close(e: list[Any]) -> None:
        if e[0].launch.sums.pop(e[0].number, None) is None:
            raise LaneError(f"{at_op(op)}: found no columns that are set aside; expected sums_open before")

    return sums_close


def _sums_at(worker: Worker, op: Op, place: int, rows: int, columns: int) -> NDArray[np.float32]:
    """A view of rows x columns sums. Raises LaneError where they are not all set aside."""
    row, column = divmod(place, fragments.ROW_PLACES)
    held, aside = worker.launch.sums.get(worker.number, (None, range(0)))
    if held is None or row + rows > fragments.SUMS_ROWS or column not in aside or column + columns > aside.stop:
        raise LaneError(f"{at_op(op)}, worker {worker.number}: found {rows} x {columns} sums at row {row}, column "
                        f"{column}; expected columns that sums_open set aside")
    return held[row:row + rows, column:column + columns]


def _build_sums_multiply(program: Program, op: Op) -> Step:
    left, right, place, adds = (program.slot(v) for v in op.operands)
    rows, columns, whole = op.attributes["rows"], op.attributes["columns"], op.attributes["dtype"].is_integer

    def sums_multiply(e: list[Any]) -> None:
        sums = _sums_at(e[0], op, e[place], rows, columns)
        product = _near_operand(e, op, "left", left, 0, rows) @ _near_operand(e, op, "right", right, 0, columns).T
        if whole:
            totals = sums.view(np.int32)
            totals[:] = (product.astype(np.int64) + (totals if e[adds] else 0)).astype(np.int32)
        else:
            sums[:] = product if not e[adds] else sums.astype(np.float64) + product

    return sums_multiply


def _build_sums_multiply_rows(program: Program, op: Op) -> Step:
    left, right, place, adds = (program.slot(v) for v in op.operands)
    rows, columns = op.attributes["rows"], op.attributes["columns"]
    kind = ELEMENTS[op.attributes["dtype"]]

    def sums_multiply_rows(e: list[Any]) -> None:
        at = e[left] + op.attributes.get("left_disp", 0)
        packed = _sums_at(e[0], op, at, rows, fragments.DEPTH // 2)
        a = np.ascontiguousarray(packed).view(kind).reshape(rows, fragments.DEPTH).astype(np.float64)
        sums = _sums_at(e[0], op, e[place], rows, columns)
        product = a @ _near_operand(e, op, "right", right, 0, columns).T
        sums[:] = product if not e[adds] else sums.astype(np.float64) + product

    return sums_multiply_rows


def _own_rows(program: Program, worker: Worker, op: Op, place: int) -> None:
    row = place // fragments.ROW_PLACES
    if row // program.lanes != worker.warp % 4:
        raise LaneError(f"{at_op(op)}: found row {row} at hand of warp {worker.warp}; expected one of rows "
                        f"{worker.warp % 4 * program.lanes} .. + {program.lanes - 1}")


def _build_sums_store(program: Program, op: Op) -> Step:
    place, *rows = (program.slot(v) for v in op.operands)
    columns = len(rows) * 2
    down, across = fragments.A      # of pairs: each register's two slots side by side

    def sums_store(e: list[Any]) -> None:
        _own_rows(program, e[0], op, e[place])
        sums = _sums_at(e[0], op, e[place], fragments.ROWS, columns).view(np.uint32)
        for number, slot in enumerate(rows):
            block, register = divmod(number, 4)
            sums[down[register, 0], 8 * block + across[register, 0] // 2] = np.asarray(e[slot]).view(np.uint32)

    return sums_store


def _build_sums_load(program: Program, op: Op) -> Step:
    place, results = program.slot(op.operands[0]), [program.slot(v) for v in op.results]
    columns = len(results) * fragments.COLUMNS // 4
    kind = NUMPY_ROWS[op.results[0].type.dtype]  # type: ignore[union-attr]

    def sums_load(e: list[Any]) -> None:
        _own_rows(program, e[0], op, e[place])
        sums = _sums_at(e[0], op, e[place], fragments.ROWS, columns)
        rows, within = fragments.C
        for number, result in enumerate(results):
            e[result] = sums[rows[number % 4], number // 4 * fragments.COLUMNS + within[number % 4]].view(kind)

    return sums_load


BUILDERS: dict[str, Callable[[Program, Op], Step]] = {
    "warp": _build_warp, "near_memory": _build_near_memory, "sync_warps": _build_sync_warps,
    "sync_cluster": _build_sync_warps,
    "hand_over": _build_hand_over, "take_over": _build_take_over,
    "async_copy": _build_async_copy, "load_matrix": _build_load_matrix, "matrix_multiply": _build_matrix_multiply,
    "asm_multiply": _build_asm_multiply, "tile_configure": _build_tile_state, "tile_release": _build_tile_state,
    "tile_zero": _build_tile_zero, "tile_load": _build_tile_load, "tile_store": _build_tile_store,
    "tile_multiply": _build_tile_multiply, "signal_start": _build_signal(_signal_start),
    "signal_arrive": _build_signal(_signal_arrive), "signal_expect": _build_signal(_signal_arrive),
    "sums_signal": _build_signal(_signal_arrive), "sums_open": _build_sums_open, "sums_close": _build_sums_close,
    "sums_multiply": _build_sums_multiply, "sums_multiply_rows": _build_sums_multiply_rows,
    "sums_load": _build_sums_load, "sums_store": _build_sums_store,
    "signal_wait": _build_signal(_signal_wait), "tensor_copy": _build_tensor_copy,
    "store_matrix": _build_store_matrix, "tensor_store": _build_tensor_copy,
    "group_multiply": _build_group_multiply, "group_multiply_rows": _build_group_multiply,
    "group_wait": _build_group_wait,
}
