"""All stations in order: from a kernel to machine code.

    tile IR → canonical → lane IR → math expanded → simplified → machine IR → allocated → bytes

Enters: a `lang.Kernel` and what one call allows to assume (`Specialization`). Leaves: a `Compiled`, which the runtime
loads and keeps on disk, and every IR on the way for those who ask (`stages`). Holds: same input, same bytes.
`SAPPER_TRACE=1` prints the IR after every pass to standard error; `SAPPER_TRACE=DIRECTORY` writes it to files there.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..ir.nodes import Function
from ..ir.text import print_function
from ..ir.types import TensorType
from ..lane.lower import lower
from ..lane.ops import BY_HAND
from ..lang.by_hand import piece_of
from ..tile.ops import memory_of
from ..tile.reduce_loops import reduce_loops
from ..tile.schedule import DimClass, Facts, Panels, Schedule, Specialization
from ..tile.work import Term, work
from .room import with_room

if TYPE_CHECKING:
    from .compile import CompiledCode

HINTS = {1: 1, 16: 8, 128: 64, 1024: 512, 8192: 2048}
"""Typical extent of a dimension class (least upper bound), for the model; LARGE for those above."""

LARGE = 16384


@dataclass(frozen=True, slots=True)
class Compiled:
    """Machine code and what is needed to call it.

    scratch: every scratch buffer as (element bytes, ((constant, dims, multiple), ...)); see lane.scratch.
    shared_scratch: likewise, what all workers share, behind the memory of the last of them.
    tasks, work: how many workers are worth waking; see runtime.compiled.
    requires: what the extents must fulfil; see docs/ir.md. warps, near_bytes: of each worker.
    tensor_maps: the maps that who launches the kernel makes and passes after the words of `slots`, each as (tensor,
    dtype, extents of its dimensions, numbers or names, box): rows of 128 bytes, swizzled, of a tensor in C order.
    barriers: workers wait for each other, so that all of a launch must run at once.
    cluster: so many workers, side by side, are launched together.
    made: the code with its machine IR and line table. pieces: keys of the assembly by hand in it. refused: keys of the
    micro-kernels that the schedule names and that are not in it, with the reasons.
    """

    name: str
    code: bytes
    slots: tuple[str, ...]
    scratch: tuple[Any, ...]
    counters: int
    stored: tuple[str, ...]
    requires: tuple[tuple[str | int, ...], ...]
    tasks: tuple[Any, ...]
    work: tuple[Term, ...]
    warps: int
    near_bytes: int
    text: Callable[[], str] = field(compare=False)
    made: CompiledCode = field(compare=False)
    pieces: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    tensor_maps: tuple[tuple[str, str, tuple[int | str, ...], tuple[int, ...]], ...] = ()
    barriers: bool = False
    cluster: int = 1
    shared_scratch: tuple[Any, ...] = ()


def facts_of(target: Any, by_hand: bool = True) -> Facts:
    """What the model knows of a target. by_hand: pieces of assembly may stand for what they mean."""
    from ..lane.two_by_two import PRODUCTS
    from .compile import rules_of

    legal = rules_of(target).legal_ops(target)
    return Facts(lanes=target.lanes, vector_registers=target.vector_registers, l1_bytes=target.l1_bytes,
                 l2_bytes=target.l2_bytes, l3_bytes=target.l3_bytes, fma_latency=target.fma_latency,
                 fma_per_cycle=target.fma_per_cycle,
                 wide_lanes=target.wide_lanes, indexed_addresses=target.indexed_addresses,
                 software_prefetch=target.software_prefetch, requests=target.requests,
                 rounded_at_once=target.rounded_at_once,
                 transposes_by_scatter=target.lanes_are_threads,
                 run_bytes=target.run_bytes, many_workers=target.lanes_are_threads,
                 matrix=target.matrix, matrix_group=target.matrix_group, tiles=target.tiles, dots=target.dots,
                 split_dots=target.dots - legal,
                 float8_rows=target.float8_rows, picks=target.picks, interleaves=target.interleaves,
                 shared_pipes=target.shared_pipes, moves=target.moves, joins=target.joins,
                 slow_division=target.slow_division, lane_factors=target.lane_factors,
                 flushes_as_it_rounds=target.flushes_as_it_rounds, two_by_two=legal >= set(PRODUCTS.values()),
                 sums_apart=target.sums_apart,
                 family=target.family if by_hand else "",
                 features=target.features if by_hand else frozenset())


def stored_tensors(function: Function) -> tuple[str, ...]:
    """Names of the tensors that a tile IR function stores to, in the order of its arguments."""
    stored = {memory_of(op.operands[0]) for op in function.walk() if op.name == "store"}
    return tuple(v.name for v in function.arguments if isinstance(v.type, TensorType) and v in stored)


def _trace(function: Any, after: str, text_of: Callable[[Any], str] = print_function) -> None:
    setting = os.environ.get("SAPPER_TRACE", "")
    if not setting or setting == "0":
        return
    text = f"; {function.name} after {after}\n{text_of(function)}\n"
    if setting == "1":
        sys.stderr.write(text)
        return
    os.makedirs(setting, exist_ok=True)
    number = len([n for n in os.listdir(setting) if n.startswith(f"{function.name}.")])
    with open(os.path.join(setting, f"{function.name}.{number:02}.{after}.txt"), "w", encoding="utf-8") as file:
        file.write(text)


def to_lane(function: Function, schedule: Schedule, facts: Facts, specialization: Specialization) -> Function:
    """Tile IR (changed in place to canonical form) to lane IR."""
    from ..ir.verifier import verify
    from ..tile.canonical import canonicalize
    from ..tile.moved import move_as_integers
    from ..tile.ops import TILE_OPS

    check = bool(os.environ.get("SAPPER_VERIFY"))
    for after, tile_pass in (("reduce_loops", reduce_loops), ("canonicalize", canonicalize),
                             ("move_as_integers", move_as_integers)):
        tile_pass(function)
        if check:
            verify(function, TILE_OPS)
        _trace(function, after)
    lane = lower(function, schedule, facts, specialization)
    _trace(lane, "lower")
    return lane


def finish_lane(lane: Function, target: Any) -> Function:
    """Lane IR as lowered to lane IR that the target can select."""
    return for_threads(simplify_lane(expand_lane(lane, target), target), target)


def _verify_lane(lane: Function) -> None:
    if os.environ.get("SAPPER_VERIFY"):
        from ..ir.verifier import verify
        from ..lane.ops import LANE_OPS

        verify(lane, LANE_OPS)


def expand_lane(lane: Function, target: Any) -> Function:
    """In place: what the target has no op for is written in those that it has."""
    from ..lane.divisions import divide_by_reciprocals
    from ..lane.float8 import expand_float8
    from ..lane.fuse import fuse
    from ..lane.math import expand_math
    from ..lane.packed_bits import pack_by_bits
    from ..lane.packed_pairs import compute_pairs
    from ..lane.rounded_words import round_words
    from ..lane.scaled_sums import scale_sums
    from ..lane.scaled_words import scale_words
    from ..lane.small_integers import convert_by_bits
    from ..lane.split_dots import split_dots
    from .compile import rules_of

    legal = rules_of(target).legal_ops(target)
    _verify_lane(lane)
    fuse(lane, target.memory_operands)
    _trace(lane, "fuse")
    if target.slow_division and divide_by_reciprocals(lane):
        _trace(lane, "divide_by_reciprocals")
    expand_math(lane, legal, target.slow_underflow)
    _trace(lane, "expand_math")
    expand_float8(lane, legal, target.quick_denormals)
    _trace(lane, "expand_float8")
    split_dots(lane, legal)
    _trace(lane, "split_dots")
    if "dot2_i16" in legal and "dot4_u8i8" not in legal and scale_words(lane):
        _trace(lane, "scale_words")
    if "dot4_u8i8" in legal and target.slow_products and scale_sums(lane):
        _trace(lane, "scale_sums")
    if not legal.isdisjoint({"pack2", "pack_bf16"}) and round_words(lane, legal):
        _trace(lane, "round_words")
    if "mul2" in legal and target.slow_conversions and pack_by_bits(lane):
        _trace(lane, "pack_by_bits")
    if "mul2" in legal and compute_pairs(lane):
        _trace(lane, "compute_pairs")
    if target.slow_conversions and convert_by_bits(lane):
        _trace(lane, "convert_by_bits")
    _verify_lane(lane)
    return lane


def simplify_lane(lane: Function, target: Any) -> Function:
    """In place: the same in fewer ops."""
    from ..ir.rewriter import eliminate_dead
    from ..lane.even_odd import take_even_and_odd
    from ..lane.float8 import join_loads
    from ..lane.float8_sums import ROWS, add_up_quickly
    from ..lane.joined_splats import join_splats
    from ..lane.nans import shorten_scalars
    from ..lane.ops import LANE_OPS
    from ..lane.simplify import simplify
    from ..lane.strength import point_at_operands, reduce_strength, split_blocks
    from ..lane.two_by_two import PRODUCTS, multiply_two_by_two
    from .compile import rules_of

    if not target.assembler_allocates:
        split_blocks(lane)
        _trace(lane, "split_blocks")
    simplify(lane, indexed_addresses=target.indexed_addresses)
    _trace(lane, "simplify")
    if target.lane_factors and join_splats(lane):
        _trace(lane, "join_splats")
    if rules_of(target).legal_ops(target) >= set(PRODUCTS.values()) and multiply_two_by_two(lane):
        eliminate_dead(lane, LANE_OPS)
        _trace(lane, "multiply_two_by_two")
    if "widen_float8" in rules_of(target).legal_ops(target) and lane.attributes["lanes"] == target.lanes:
        join_loads(lane, target.float8_rows)
        _trace(lane, "join_loads")
        if target.float8_rows == ROWS and add_up_quickly(lane):
            _trace(lane, "add_up_quickly")
    if ("pack2" in rules_of(target).legal_ops(target) and lane.attributes["lanes"] == target.lanes
            and take_even_and_odd(lane)):
        _trace(lane, "take_even_and_odd")
    if not target.assembler_allocates and reduce_strength(lane):
        eliminate_dead(lane, LANE_OPS)
        _trace(lane, "reduce_strength")
    if not target.assembler_allocates and not target.fuses_indexed and point_at_operands(
            lane, 2 if target.folded_loads else 1):
        eliminate_dead(lane, LANE_OPS)
        _trace(lane, "point_at_operands")
    if not target.assembler_allocates and not target.flushes_as_it_rounds and shorten_scalars(lane):
        _trace(lane, "shorten_scalars")
    return lane


def for_threads(lane: Function, target: Any) -> Function:
    """What lane IR needs besides where lanes are threads, and others give them registers. Raises AsyncError where warps
    do not wait for each other, copies or matrix instructions as they must."""
    from ..lane.rehearse import check as check_waits
    from ..lane.sink import sink
    from ..lane.synchronise import synchronise

    if target.assembler_allocates:
        sink(lane)
        _trace(lane, "sink")
    if target.lanes_are_threads:
        synchronise(lane)
        _trace(lane, "synchronise")
        check_waits(lane)
    _verify_lane(lane)
    return lane


def compile_function(function: Function, schedule: Schedule | None, target: Any,
                     specialization: Specialization, by_hand: bool = True) -> Compiled:
    """Compile a tile IR function for one target. by_hand: see facts_of. Raises AssemblyError where a piece by hand
    asks for registers that it can't have here."""
    from .compile import compile_lane

    stored = stored_tensors(function)
    facts = facts_of(target, by_hand)
    lane = finish_lane(to_lane(function, schedule or Schedule(), facts, specialization), target)
    ops = {op.name for op in lane.walk()}
    pieces = () if ops.isdisjoint(BY_HAND) else pieces_in(lane)
    made = compile_lane(lane, target)
    for key in pieces:
        piece_of(key).check_kept(made.machine, target)
    _trace(made.machine, "select" if target.assembler_allocates else "allocate", lambda _: made.text)
    known = lane.attributes
    compiled = Compiled(function.name, made.bytes, tuple(known["slots"]), _tuples(known["scratch"]), known["counters"],
                    stored, _tuples([*function.attributes.get("requires", []), *known.get("reached", [])]),
                    _tuples(known["tasks"]),
                    work(function, known["lanes"]), made.machine.warps, made.machine.near_bytes, lambda: made.text,
                    made, pieces, _tuples(known.get("refused", ())), _tuples(known.get("tensor_maps", ())),
                    not ops.isdisjoint(("barrier", "take_over")),
                    made.machine.cluster, _tuples(known.get("shared_scratch", ())))
    lane.take_apart()
    return compiled


def pieces_in(lane: Function) -> tuple[str, ...]:
    """Keys of the assembly by hand in a lane function."""
    return tuple(sorted({op.attributes["by"] for op in lane.walk() if op.name in BY_HAND}))


def compile_kernel(kernel: Any, static_dims: Mapping[str, int], unit_strides: Mapping[str, Any],
                   dim_classes: Mapping[str, tuple[int, int]], target: Any, schedule: Schedule | None,
                   aligned: frozenset[str] = frozenset(), by_hand: bool = True) -> Compiled:
    """Compile a `lang.Kernel`.

    static_dims: extents compiled in. unit_strides: see Specialization.strides. dim_classes: for each run-time dimension
    (least upper bound of its class, divisor). aligned: tensors whose rows all start at multiples of 64 bytes.
    by_hand: see facts_of.
    """
    dims = {name: DimClass(HINTS.get(bound, LARGE), divisor) for name, (bound, divisor) in dim_classes.items()}
    if schedule is not None and not isinstance(schedule, Schedule):
        schedule = Schedule.from_json(dict(schedule))

    def compiled() -> Compiled:
        function = kernel.tile_ir(dict(static_dims))
        code = compile_function(function, schedule, target, Specialization(dims, dict(unit_strides), aligned), by_hand)
        function.take_apart()
        return code

    collects = gc.isenabled()
    # The IRs are many small objects, all alive to the end: looking for garbage among them takes a third. Nor is much of
    # it left when they are done with: IRs are taken apart, and local functions that call themselves are deleted.
    gc.disable()
    try:
        return with_room(compiled)
    finally:
        if collects:
            gc.enable()


def panels_of_kernel(kernel: Any, name: str, target: Any) -> Panels:
    """How a tensor of a `lang.Kernel` is packed for a target. Raises as lane.packed.panels_for does."""
    from ..lane.packed import panels_for
    from ..tile.canonical import canonicalize

    function = kernel.tile_ir()
    reduce_loops(function)
    canonicalize(function)
    return panels_for(function, name, facts_of(target))


def _tuples(nested: Any) -> Any:
    if isinstance(nested, (list, tuple)):
        return tuple(_tuples(item) for item in nested)
    return nested
