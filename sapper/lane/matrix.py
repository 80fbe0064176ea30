"""Contractions on matrix instructions: a worker's warps compute one tile together.

Enters a walk that contracts two tensors of 16-bit elements, or of 8 bits along the depth; leaves lane IR appended to
the current level. Each tile of rows x columns goes through three steps:

    copy      all warps bring pieces of both operands, `depth` deep, to near memory, several stages ahead
    multiply  each warp takes its part of rows and columns through the matrix instruction, sums in registers
    finish    the walk's stores take the sums from registers (fragment_stores.py), or from near memory, where they read
              them like any other value: whichever takes less time

How pieces lie in near memory: pieces.py. What holds: a stage is written only after all warps have left it
(`sync_warps` after the piece before), and read only after every warp's copies have landed and all warps have met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import TYPE_CHECKING, NamedTuple

from ..ir.nodes import Block, Op, Value
from ..ir.types import ROW_F32, ROW_I32, S64, DType, TensorType, TileType, bf16, f8e4m3, f8e5m2, f32, i32
from ..lang.by_hand import PRODUCTS, ProductPiece
from ..tile.affine import affine
from ..tile.plan import Walk, axes_of, is_scalar_integer, plan_block
from ..tile.product_parts import axes_brought
from ..tile.schedule import MatrixGroup, MatrixUnit, Panels
from ..tile.sums import is_join
from . import fragments, stage_sums
from .block_nests import PANEL, number_of
from .depth_shares import DepthShares
from .pieces import CHUNK_BYTES, ELEMENT_BYTES, SWIZZLED_ROWS, Piece, PlainDepth, WindowDepth
from .state import Access, Capacity, Open, Scalar, row_dtype

if TYPE_CHECKING:
    from .computed_pieces import Computed

FLOAT8 = (f8e4m3, f8e5m2)
FEWEST = 64
"""Extents for which a tile is worth its size."""
SPLIT_DTYPES, PLANES = ("f32", "bf16"), 3
"""Operands of which one at least is f32 and split, and into how many parts of bf16."""
PADDING_BYTES = 32
"""After each row of sums in near memory: rows then start in different banks."""


@dataclass(frozen=True, slots=True)
class MatrixWalk:
    """A walk that the matrix instructions can take. rows, columns, depth: its axes. left, right: the loads of each
    reduction. scales: of each reduction the loads by whose elements those of left and right are multiplied first, if
    they are. plain: the type that elements have in near memory, where they are brought through registers. planes: how
    many parts each operand is a sum of, left and right: there (split_pieces.py), or, run, in registers, of so many
    neighbours that a lane reads together (part_pieces.py). around: short axes that it contracts
    too, each place of which has all of the depth (the window of a convolution), the outermost first. computed: operands
    that are no loads (computed_pieces.py); left or right then has the op that makes them."""

    rows: str
    columns: str
    depth: str
    left: tuple[Op, ...]
    right: tuple[Op, ...]
    scales: tuple[tuple[Op | None, Op | None], ...] = ()
    plain: DType | None = None
    planes: tuple[int, int] = (1, 1)
    run: int = 0
    around: tuple[str, ...] = ()
    computed: tuple[Computed, ...] = ()

    def computed_of(self, op: Op) -> Computed | None:
        """What an operand is computed of that this op makes; None if it is a load."""
        return next((found for found in self.computed if found.value.op is op), None)

    @property
    def split(self) -> bool:
        return self.planes != (1, 1)

    @property
    def element_bytes(self) -> tuple[int, int]:
        """Of left and right elements as they come to near memory."""
        left, right = (f32.size_bytes if self.run and parts > 1 else self.dtype.size_bytes for parts in self.planes)
        return left, right

    @property
    def products(self) -> int:
        """Of fragments that make one, where lanes split them."""
        return len(plane_pairs(*self.planes)) if self.run else 1

    @property
    def is_scaled(self) -> bool:
        return any(scale is not None for pair in self.scales for scale in pair)

    @property
    def dtype(self) -> DType:
        """Of the left elements in near memory."""
        return self.plain or _dtype_of(self.left[0])


class _Wanted(NamedTuple):
    """What match_matrix_walk takes, as its arguments say."""

    dtypes: tuple[str, ...]
    scaled: bool
    along_depth: bool
    plain: bool
    split: bool
    computes: bool


class _Contraction(NamedTuple):
    """One contraction of a MatrixWalk. kinds: types that its operands have in near memory, where they are brought
    through registers. computed: by the op that makes it, what an operand is computed of."""

    left: Op
    right: Op
    scales: tuple[Op | None, Op | None]
    rows: str
    columns: str
    kinds: frozenset[DType]
    computed: dict[Op, Computed]

    def goes_with(self, first: _Contraction, split: bool) -> bool:
        """Whether it has the rows of the first one and columns that lie alike, so that one walk takes both."""
        return self.left.operands == first.left.operands and (self.rows, self.columns) == (first.rows, first.columns) \
            and (not split or _dtype_of(self.right) is _dtype_of(first.right))


class Sum(NamedTuple):
    """A row of sums: lane l has that of row + l div 4, column + 2 (l mod 4) (sapper/lane/fragments.py: C). In lists
    each second one has the next column."""

    value: Value
    row: int
    column: int


Part = tuple[Scalar, int, Scalar]
"""Of an axis: where a warp's part starts, how many there are at most, and where the walk's end."""


class MatrixLowering(DepthShares):
    """Finds walks for the matrix instructions and emits them. warps: of a worker, 1 if there is no such walk. part: of
    the function, at hand; part_walks: those that are such a walk, and whether loops in order stand around it;
    warps_have_tasks: each of them, instead of their worker.

    near_buffers: what lies in near memory, as (name, first byte, bytes); they overlap where one has the place of
    another that is no longer wanted."""

    warps = 1
    part: Block
    part_walks: dict[Block, tuple[MatrixWalk, bool]]
    warps_have_tasks = False
    near_bytes_used = 0
    near_buffers: tuple[tuple[str, int, int], ...] = ()
    matrix_walk: MatrixWalk | None = None

    def find_matrix_walk(self) -> None:
        """Settle, before anything is emitted, which parts of the function are one nest of parallel tiles with one walk
        of contractions. Only there do several warps play a worker: other code would be run by each of them."""
        body, unit = self.function.body, self.facts.matrix
        self.part = body
        self.part_walks = {}
        for block in [op.blocks[0] for op in body.ops if op.name == "part"] or [body]:
            self.in_order = False
            walk = self.only_walk(block)
            found = None if unit is None or walk is None else self._match(walk, unit)
            if unit is not None and found is not None:
                self.part_walks[block] = found, self.in_order
                self.warps = unit.warps[0] * unit.warps[1]
        self.matrix_walk, _ = self.part_walks.get(body, (None, False))

    def _match(self, walk: Walk, unit: MatrixUnit) -> MatrixWalk | None:
        return None if self.schedule.matrix is False else self.match_matrix_walk(
            walk, unit.dtypes, False) or self.match_matrix_walk(
            walk, unit.byte_dtypes, False, along_depth=True) or self._match_scaled(
            walk, unit) or self.match_matrix_walk(
            walk, unit.dtypes, False, plain=True) or self.match_matrix_walk(
            walk, SPLIT_DTYPES, False, plain=True, split=True) or self.match_matrix_walk(
            walk, unit.dtypes, False, plain=True, computes=True)

    def _match_scaled(self, walk: Walk, unit: MatrixUnit) -> MatrixWalk | None:
        """Bytes along the depth that scales multiply, of whose blocks no piece meets two along the depth."""
        from .places import forms_place

        found = self.match_matrix_walk(walk, unit.byte_dtypes, True, along_depth=True)
        if found is None or self.schedule.chunks or len(found.right) > 1 or not found.is_scaled:
            return None
        deep = unit.depth * ELEMENT_BYTES
        for scale, outer in zip(found.scales[0], (found.rows, found.columns), strict=True):
            for index in () if scale is None else scale.operands[1:]:
                form = forms_place(index, {outer: FEWEST // 2, found.depth: deep})
                if form is None or (found.depth in axes_of(index) and form[1] > 1):
                    return None
        return found if found.dtype.is_float or stage_sums.are_exact(
            found.dtype, _dtype_of(found.right[0]), deep) else None

    def take_part(self, part: Block) -> None:
        """Go on to a part of the function. Where only others are products on matrix instructions, each warp has tasks
        of its own there."""
        if part is self.function.body:
            return
        self.part, self.taken_tile = part, None
        self.matrix_walk, self.in_order = self.part_walks.get(part, (None, False))
        self.warps_have_tasks = self.warps > 1 and self.matrix_walk is None
        self.settle_product()

    def name_stages(self, pieces: Sequence[tuple[Op, int, int]], stages: int, stage_bytes: int) -> None:
        """Note the buffers of operands, as (its load, first byte in a stage, bytes)."""
        self.name_buffers((f"{op.operands[0].name} {stage}", stage * stage_bytes + at, size)
                          for stage in range(stages) for op, at, size in pieces)

    def name_buffers(self, buffers: Iterable[tuple[str, int, int]]) -> None:
        """Note buffers of near memory, those without a byte left out."""
        self.near_buffers = tuple(dict.fromkeys((*self.near_buffers, *(found for found in buffers if found[2]))))

    few_registers = False
    """Whether what is computed leaves so few that a value which waits for the end of a tile is better made there."""

    in_order = False
    """Whether loops that run in order stand around the walk: those of ragged groups."""

    shared_loops: frozenset[Op] = frozenset()
    """Loops beside it in these: what makes in memory what it reads, and what is done in its place. A worker's warps
    share them."""

    def only_walk(self, part: Block | None = None) -> Walk | None:
        """The walk of a function, or of a part of it, that is one nest of parallel tiles around it. Between these may
        stand a loop over groups that runs in order: every warp reads where a group starts and ends, and whether there
        is anything to do. What a group makes in memory before its product may stand there, too."""
        block = part or self.function.body
        control = [op for op in block.ops if op.blocks]
        if len(control) != 1 or not control[0].attributes.get("parallel") or self.schedule.registers:
            return None
        if any(map(is_join, control[0].walk())):     # several warps would each add what they all compute
            return None
        inner = control[0]
        while nested := [op for op in inner.blocks[0].ops if op.blocks]:
            *beside, last = nested
            blocks = [inner.blocks[0]]
            if last.name == "if":
                blocks.append(last.blocks[1])
                beside += [op for op in last.blocks[1].ops if op.blocks]
            elif last.name not in ("tiles", "each"):
                return None
            elif not last.attributes.get("parallel"):
                self.in_order = True
                if last.name != "each" or not all(is_scalar_integer(v) for op in last.blocks[0].ops
                                                  if not op.blocks for v in op.results):
                    return None
            if last.results or any(isinstance(item, Walk) for block in blocks
                                   for item in plan_block(block, self.wholes).items):
                return None
            if (beside or last.name == "if") and not (self.in_order and all(map(_can_be_shared, beside))):
                return None
            self.shared_loops |= {*beside}
            inner = last
        items = plan_block(inner.blocks[0], self.wholes).items
        return items[0] if len(items) == 1 and isinstance(items[0], Walk) and inner.name == "tiles" else None

    def match_matrix_walk(self, walk: Walk, dtypes: tuple[str, ...], scaled: bool,
                          along_depth: bool = False, plain: bool = False, split: bool = False,
                          computes: bool = False) -> MatrixWalk | None:
        """The walk's operands, where it contracts elements of these types. scaled: they may be multiplied first.
        along_depth: both lie along the depth, and may differ in type. plain: they lie anyhow, or are rounded, or, of
        f32, split. computes: those that are no loads are computed (computed_pieces.py)."""
        if not _contracts_two_axes(walk) or (scaled and len(walk.reduced) > 1):
            return None
        wanted = _Wanted(dtypes, scaled, along_depth, plain, split, computes)
        contractions: list[_Contraction] = []
        for op in walk.reductions:
            made = self._contraction(op, walk, wanted)
            if made is None or (contractions and not made.goes_with(contractions[0], split)):
                return None
            contractions.append(made)
        kinds = {kind for one in contractions for kind in one.kinds}
        if len(kinds) > 1:
            return None
        computed = {op: of for one in contractions for op, of in one.computed.items()}
        if computed and not kinds:
            kinds.add(bf16)
        rows, columns = contractions[0].rows, contractions[0].columns
        left, right = tuple(one.left for one in contractions), tuple(one.right for one in contractions)
        alike = plain or _dtype_of(left[0]) is _dtype_of(right[0])
        if len(contractions) == 1 and not scaled and alike and self._stored_along(rows, walk):
            # The same product of its operands the other way round: stores go along the columns of its sums.
            rows, columns, left, right = columns, rows, right, left
        *around, depth = walk.reduced
        if not self._are_long_enough(rows, columns, depth, (*left, *right), computed):
            return None
        planes = [PLANES if split and _dtype_of(op) is f32 else 1 for op in (left[0], right[0])]
        found = MatrixWalk(rows, columns, depth, left, right, tuple(one.scales for one in contractions),
                           next(iter(kinds), None), (planes[0], planes[1]), self._run_of(planes, (*left, *right), walk),
                           tuple(around), tuple(computed.values()))
        return found if self._tiles_of(found) else None

    def _run_of(self, planes: Sequence[int], operands: Sequence[Op], walk: Walk) -> int:
        """MatrixWalk.run: where all that is read can be copied as it lies, and registers are enough (of ptxas 13.0): if
        the right operand is split, not for elements across rows, each of which is read by itself, nor for two right
        ones, of each of which tiles have so few columns that their rows are split too often."""
        *around, depth = walk.reduced
        forms = [affine(op.operands[-1]) for op in operands if _dtype_of(op) is f32]
        along = all(form is not None and depth in form.axes for form in forms)
        most = 2 if planes[1] > 1 else len(operands)
        if max(planes) == 1 or len(operands) > most or (planes[1] > 1 and not along) or any(
                map(self._panel_of, walk.outer)) or any(
                self._outer_axis(op, depth, SPLIT_DTYPES, around) is None for op in operands):
            return 0
        return 4 if min(planes) > 1 else 2

    def _contraction(self, op: Op, walk: Walk, wanted: _Wanted) -> _Contraction | None:
        """The operands of one contraction of a walk, where they are what is wanted."""
        *around, depth = walk.reduced
        loads: list[Op | None]
        scales: list[Op | None] = [None, None]
        computed: list[Computed | None] = [None, None]
        if wanted.plain:
            loads = [_load_of(v) if wanted.split else _rounded_load_of(v, wanted.dtypes) for v in op.operands]
            if wanted.computes:
                computed = [None if _is_affine(load) else self._computed(v, depth, wanted.dtypes, around)
                            for load, v in zip(loads, op.operands, strict=True)]
        elif wanted.scaled:
            both = [_scaled_load_of(v) for v in op.operands]
            loads, scales = [load for load, _ in both], [scale for _, scale in both]
        else:
            loads = [_load_of(v) for v in op.operands]
        left, right = (load if of is None else of.value.op for load, of in zip(loads, computed, strict=True))
        if left is None or right is None or not self._go_together(left, right, depth, wanted):
            return None
        axes = [self._beside(_tile(side.result), depth, around) if of is not None else
                self._plain_axis(side, depth, around) if wanted.plain else
                self._outer_axis(side, depth, wanted.dtypes, around)
                for side, of in zip((left, right), computed, strict=True)]
        rows, columns = axes
        if rows is None or columns is None or {rows, columns} != set(walk.outer):
            return None
        kinds = frozenset() if not wanted.plain else frozenset(
            bf16 if wanted.split else _narrow(v) if of is None else _dtype(of.value)
            for v, of in zip(op.operands, computed, strict=True) if of is None or _dtype(of.value) not in FLOAT8)
        by_op = {of.value.op: of for of in computed if of is not None and of.value.op is not None}
        return _Contraction(left, right, (scales[0], scales[1]), rows, columns, kinds, by_op)

    def _go_together(self, left: Op, right: Op, depth: str, wanted: _Wanted) -> bool:
        """Whether the types of two operands are what is wanted."""
        if wanted.split and not all(_dtype_of(op).name in wanted.dtypes for op in (left, right)):
            return False
        if wanted.along_depth:
            return self._together_along(depth, left, right)
        return wanted.plain or _dtype_of(left) is _dtype_of(right)

    def _are_long_enough(self, rows: str, columns: str, depth: str, operands: Sequence[Op],
                         computed: Mapping[Op, Computed]) -> bool:
        """Whether no axis is too short for tiles; that of the columns of panels is as long as these."""
        loads = [op for op in operands if op not in computed]
        placed = {depth, *(axis for op in computed for axis in _tile(op.result).axes)}
        axes = (rows, depth) if self._panel_of(columns) else (rows, columns, depth)
        return all(self._extent_of(axis, axis in placed or self._starts_pieces(axis, loads)) >= FEWEST for axis in axes)

    def _computed(self, value: Value, depth: str, dtypes: tuple[str, ...],
                  around: Sequence[str]) -> Computed | None:
        """What an operand is computed of, piece by piece. Numbers of 8 bits are ones of 16, too."""
        from .computed_pieces import find_computed

        unit = self.facts.matrix
        while _dtype(value) not in FLOAT8 and _dtype(value).name not in dtypes and value.op is not None \
                and value.op.name == "cast" and _widens(value.op):
            value = value.op.operands[0]
        assert isinstance(value.type, TileType) and unit is not None
        outer = self._beside(value.type, depth, around)
        if outer is None or around or self.schedule.chunks or (
                _dtype(value) not in FLOAT8 and _dtype(value).name not in dtypes):
            return None     # chunks need not start where a tile does
        return find_computed(self.stride_classes, value, {outer: FEWEST, depth: unit.depth})

    def _stored_along(self, axis: str, walk: Walk) -> bool:
        """Whether all that follows the walk's sums are stores that go along an axis."""
        return bool(walk.after) and all(isinstance(root, Op) and root.name == "store" and self.axis_along(root) == axis
                                        for root in walk.after)

    @staticmethod
    def _together_along(depth: str, *loads: Op) -> bool:
        """Whether these loads do, and one instruction multiplies both."""
        forms = [affine(op.operands[-1]) for op in loads]
        dtypes = [_dtype_of(op) for op in loads]
        return all(form is not None and depth in form.axes for form in forms) and (
            dtypes[0] is dtypes[1] or all(dtype.is_integer for dtype in dtypes))

    @staticmethod
    def _starts_pieces(axis: str, loads: Sequence[Op]) -> bool:
        """Whether neighbours along an axis are neighbours in memory: pieces of 16 bytes then start where it does."""
        forms = [affine(op.operands[-1]) for op in loads]
        return any(form is None or axis in form.axes for form in forms)

    def _extent_from_zero(self, axis: str) -> int:
        return self._extent_of(axis, True)

    def _extent_of(self, axis: str, from_zero: bool) -> int:
        """A typical extent of an axis. from_zero: 0 for one whose pieces may start anywhere."""
        for op in self.function.walk():
            if op.name not in ("tiles", "whole"):
                continue
            axes = op.attributes["axes"] if op.name == "tiles" else [op.attributes["axis"]]
            if axis in axes:
                start, stop = op.operands[2 * axes.index(axis):][:2]
                known = start.op is not None and start.op.name == "const" and start.op.attributes["value"] == 0
                return self.hint(stop)[0] if known or not from_zero else 0
        return 0

    def hint(self, value: Value) -> tuple[int, int, Capacity | None]:
        raise NotImplementedError("control knows the extents")

    def _outer_axis(self, load: Op, depth: str, dtypes: tuple[str, ...], around: Sequence[str] = ()) -> str | None:
        """The axis of a load beside the depth and those around it, if 16-byte pieces of it can be copied: elements of a
        type that the instruction has, one of the two axes contiguous, every row at a multiple of 16 bytes."""
        tensor = load.operands[0]
        t, tile = tensor.type, load.result.type
        assert isinstance(t, TensorType) and isinstance(tile, TileType)
        if t.dtype.name not in dtypes or not self.in_lines(tensor):
            return None
        last = t.dims[-1]
        divisor = self.hint(tensor.op.operands[-1])[1] if tensor.op is not None else \
            last if isinstance(last, int) else self.specialization.dims[last].divisor \
            if last in self.specialization.dims else 1
        forms = [affine(v) for v in load.operands[1:]]
        chunk = CHUNK_BYTES // t.dtype.size_bytes
        if divisor % chunk or any(form is None for form in forms):
            return None
        axes = [list(form.axes.items()) for form in forms if form is not None]
        final = forms[-1]
        assert final is not None
        if len(axes[-1]) != 1 or axes[-1][0][1] != 1 or final.scalars or final.constant % chunk \
                or sum(map(len, axes)) != 2 + len(around):
            return None
        return self._beside(tile, depth, around)

    def _plain_axis(self, load: Op, depth: str, around: Sequence[str]) -> str | None:
        """The axis of a load beside the depth and those around it, if its elements can be read one by one."""
        tile = load.result.type
        assert isinstance(tile, TileType)
        forms = [affine(v) for v in load.operands[1:]]
        if any(form is None for form in forms) or isinstance(
                self.stride_classes.get(load.operands[0].name), Panels):
            return None
        return self._beside(tile, depth, around)

    @staticmethod
    def _beside(tile: TileType, depth: str, around: Sequence[str]) -> str | None:
        """The only axis of a tile that is none of these, all of which it has."""
        others = [axis for axis in tile.axes if axis not in (depth, *around)]
        return others[0] if len(others) == 1 and len(tile.axes) == 2 + len(around) else None

    def piece(self, found: MatrixWalk, op: Op, outer: str, extent: int, depth: int, at: int) -> Piece:
        """An operand's piece, copied as it can be."""
        computed = found.computed_of(op)
        if computed is not None:
            from .computed_pieces import ComputedPiece
            from .spread import SpreadLowering

            assert found.plain is not None and isinstance(self, SpreadLowering)
            return ComputedPiece(self, computed, outer, found.depth, extent, depth, at, found.plain)
        if found.plain is None or self._outer_axis(op, found.depth, (found.plain.name,), found.around) is not None:
            return Piece(self, op, outer, found.depth, extent, depth, at)
        from .part_pieces import PartPiece
        from .plain_pieces import PlainPiece
        from .split_pieces import SplitPiece

        if found.run and _dtype_of(op) is f32:
            return PartPiece(self, op, outer, found.depth, extent, depth, at, found.plain, found.run,
                             min(found.planes) > 1)
        if found.split and _dtype_of(op) is f32:
            return SplitPiece(self, op, outer, found.depth, extent, depth, at, found.plain)
        return PlainPiece(self, op, outer, found.depth, extent, depth, at, found.plain)

    @property
    def around(self) -> tuple[str, ...]:
        """Axes round the depth."""
        return () if self.matrix_walk is None else self.matrix_walk.around

    # Rows of numbers.

    def bits(self, level: int, name: str, row: Value, number: int) -> Value:
        """A row shifted by a number, or joined with it bit by bit; made once."""
        memo = self.levels[level].memo
        key = ("bits", name, row, number)
        if key not in memo:
            if name in ("shl", "shr"):
                memo[key] = self.emit(level, name, [row], ROW_I32, amount=number)
            else:
                memo[key] = self.emit(level, name, [row, self.constant(number, i32)], ROW_I32)
        found: Value = memo[key]
        return found

    def thread(self) -> Value:
        """row<i32>: the number of each lane in its worker."""
        memo = self.levels[0].memo
        if "thread" not in memo:
            first = self.row_of(self.mul(self.warp(), self.lanes))
            memo["thread"] = self.emit(0, "add", [first, self.iota()], ROW_I32)
        found: Value = memo["thread"]
        return found

    def swizzled(self, row: Value, chunk: Value, row_bytes: int) -> Value:
        """Bytes from the start of a piece to a chunk of a row. Two rows of 64 bytes are as one of 128."""
        rows_of_line = max(1, fragments.ROW_BYTES // row_bytes)
        mine = self.bits(0, "shr", row, rows_of_line.bit_length() - 1) if rows_of_line > 1 else row
        turn = self.bits(0, "and", mine, SWIZZLED_ROWS // rows_of_line - 1)
        turned = self.emit(0, "xor", [chunk, turn], ROW_I32)
        start = self.bits(0, "shl", row, row_bytes.bit_length() - 1)
        return self.emit(0, "add", [start, self.bits(0, "shl", turned, 4)], ROW_I32)

    def parts(self, body: Callable[[], None]) -> None:
        """Emit the function's body, for each part that a warp may play: here all of them play the same."""
        body()

    # The walk.

    def matrix_unit(self) -> MatrixUnit | MatrixGroup:
        assert self.facts.matrix is not None
        return self.facts.matrix

    taken_tile: tuple[int, int] | None = None

    def take_tile(self, tile: tuple[int, int]) -> None:
        self.taken_tile = tile

    def fitting_tiles(self) -> list[tuple[int, int]]:
        """Rows and columns that a worker may compute at once, the largest first."""
        walk = self.matrix_walk
        assert walk is not None
        fitting = self._tiles_of(walk)
        forced = {axis: size for axis, size in self.schedule.tile.items() if axis in (walk.rows, walk.columns)}
        found = [tile for tile in fitting if forced.items() <= {walk.rows: tile[0], walk.columns: tile[1]}.items()]
        return (found[:1] if forced else found) or fitting

    def _tiles_of(self, walk: MatrixWalk) -> list[tuple[int, int]]:
        """Those of a walk: the sums of several contractions share the registers. None, where all are too narrow."""
        unit = self.facts.matrix
        assert unit is not None
        down, across = self._warps_of(walk)
        planes = walk.split and not walk.run
        # There are as many planes of rows and columns as stages hold; split in registers, parts take room of sums.
        halves = 2 if planes or (walk.run and walk.planes[1] == 1) else 1
        # Each warp has whole fragments of rows, and whole rows of lanes to store; rows of a piece are swizzled whole.
        least = [fragments.PANEL if any(self._lies_across(op, walk) for op in loads) else 0
                 for loads in (walk.left, walk.right)]
        if self._has_few_columns(walk):
            return [(rows // halves, self._panel_of(walk.columns) or columns) for rows, columns in unit.narrow_shapes
                    if rows // halves >= max(least[0], fragments.ROWS * down)]
        narrow = len(walk.right) * (2 if self._turns(walk) or (
            walk.planes[1] > 1 if walk.split else self._promotes(walk)) else 1)
        tiles = [(rows // halves, columns // narrow) for rows, columns in unit.shapes]

        def fit(tiles: list[tuple[int, int]]) -> list[tuple[int, int]]:
            return [(rows, columns) for rows, columns in tiles
                    if rows >= max(least[0], fragments.ROWS * down)
                    and columns >= max(least[1], self.lanes * across)]

        return fit(tiles) or ([] if planes else fit([(rows // 2, 2 * columns) for rows, columns in tiles]))

    def _warps_of(self, walk: MatrixWalk) -> tuple[int, int]:
        """Along rows and columns of a tile. Planes of two matrices leave room for few columns of each, and panels may
        have no more: all warps have them, so that each has whole rows of lanes."""
        unit = self.facts.matrix
        assert unit is not None
        whole_rows = walk.run > 0 and walk.planes[1] == 1       # which one warp alone splits
        return (prod(unit.warps), 1) if whole_rows or self._has_few_columns(walk) else unit.warps

    def _has_few_columns(self, walk: MatrixWalk) -> bool:
        return (walk.planes[1] > 1 and not walk.run and len(walk.right) > 1) or self._panel_of(walk.columns) > 0

    def _panel_of(self, axis: str) -> int:
        """How long an axis is that is a panel's columns, of one or two fragments or a row of lanes; 0 of any other."""
        found = [[number_of(v) for v in op.operands[2 * axes.index(axis):][:2]] for op in self.function.walk()
                 if op.name in ("tiles", "whole") and axis in (axes := axes_brought(op))]
        return next((length for length in (PANEL, self.lanes) if found == [[0, length]]), 0)

    def matrix_tile(self) -> tuple[int, int]:
        """Rows and columns that a worker computes at once: what the model took (settle_product), or the largest of
        which there is one for each worker."""
        unit, walk = self.facts.matrix, self.matrix_walk
        assert unit is not None and walk is not None
        if self.taken_tile is not None:
            return self.taken_tile
        fitting = self.fitting_tiles()
        extents = [self._extent_of(axis, False) for axis in (walk.rows, walk.columns)]
        enough = (tile for tile in fitting if prod(
            -(-extent // size) for extent, size in zip(extents, tile, strict=True)) * self._nests() >= unit.workers)
        return next(enough, fitting[-1])

    def _nests(self) -> int:
        """A typical number of times that the walk is done for other matrices."""
        loops = [op for outer in self.part.ops for op in outer.walk()
                 if op.name == "each" and op.attributes.get("parallel")]
        return prod(max(1, self.hint(stop)[0]) for op in loops for stop in op.operands[1::2])

    @staticmethod
    def _stages(walk: MatrixWalk, unit: MatrixUnit) -> int:
        """Pieces that come through registers are not waited for: two are enough, one that is read and one written."""
        return 2 if walk.split and not walk.run else unit.stages

    @staticmethod
    def _lies_across(op: Op, walk: MatrixWalk) -> bool:
        """Whether neighbours of a tensor are none along the depth: pieces then have rows of outer coordinates."""
        computed = walk.computed_of(op)
        if computed is not None:
            return computed.along != walk.depth
        form = affine(op.operands[-1])
        return form is None or walk.depth not in form.axes

    @staticmethod
    def _turns(walk: MatrixWalk) -> bool:
        """Whether elements come through registers from rows that do not lie along the depth: each needs an address."""
        return walk.plain is not None and not walk.run and any(
            MatrixLowering._lies_across(op, walk) for op in (*walk.left, *walk.right)
            if walk.computed_of(op) is None)

    @staticmethod
    def _promotes(walk: MatrixWalk) -> bool:
        """Whether sums are added up in f32 after each stage: the instruction keeps fewer bits of sums of 8-bit floats
        (see GroupLowering._add_block), or scales multiply them. Both sums need registers."""
        return (walk.dtype.is_float and walk.dtype.bits == 8) or walk.is_scaled

    def matrix(self, walk: Walk, found: MatrixWalk) -> None:
        """Emit the walk: all tiles of its open rows and columns."""
        unit = self.facts.matrix
        assert unit is not None
        rows, columns = self.open[found.rows], self.open[found.columns]
        high, wide = self.matrix_tile()

        def tile(row: Value, column: Value) -> None:
            with self.located(walk.reductions[0]), self.segment_depth(found.depth):
                self._tile(walk, found, unit, row, column)

        if self.turn is not None:
            self.segment_tile(found, tile)
            return
        if self.cluster_axis is not None:       # a tile of whose rows, or columns, there may be none
            tile(self.value(rows.offset), self.value(columns.offset))
            return
        self._count(columns, wide, lambda column: self._count(rows, high, lambda row: tile(row, column)))

    def _count(self, o: Open, step: int, body: Callable[[Value], None]) -> None:
        if o.once:
            body(self.value(o.offset))
            return
        self.counted("tile", o.offset, self.add(o.offset, o.extent), step, body)

    def _tile(self, walk: Walk, found: MatrixWalk, unit: MatrixUnit, row: Value, column: Value) -> None:
        high, wide = self.matrix_tile()
        depth = self.piece_depth()
        down, across = self._warps_of(found)
        warp_rows, warp_columns = high // down, wide // across
        mine_row = self.mul(self.scalar("s_floordiv", self.warp(), across), warp_rows)
        mine_column = self.mul(self.scalar("s_mod", self.warp(), across), warp_columns)
        left = self.piece(found, found.left[0], found.rows, high, depth, 0)
        right = []
        stage_bytes = left.bytes
        for op in found.right:
            right.append(self.piece(found, op, found.columns, wide, depth, stage_bytes))
            stage_bytes += right[-1].bytes
        left.place(mine_row, True)
        for piece in right:
            piece.place(mine_column, False)
        row_end, column_end = self._ends(found)
        left.prepare(row, self.sub(row_end, row))
        for piece in right:
            piece.prepare(column, self.sub(column_end, column))
        pieces = (left, *right)
        way = (WindowDepth if found.around else PlainDepth)(self, found, pieces, depth)
        stages = self._stages(found, unit)
        self._fill_stages(way, stages, stage_bytes)

        blocks = (warp_rows // fragments.ROWS, warp_columns // fragments.COLUMNS)
        count = len(right) * blocks[0] * blocks[1] * 4
        sum_dtype = row_dtype(walk.reductions[0].result.type.dtype)  # type: ignore[union-attr]
        zero = self.constant(0.0 if sum_dtype.is_float else 0, sum_dtype)
        end = self.add(self.near(), stages * stage_bytes)
        ahead = stages - 1
        first = way.first(ahead)
        carried = [self.near(), self.value(self.add(self.near(), ahead * stage_bytes)), *first, *[zero] * count]
        block = Block([S64, *[v.type for v in carried]])
        self.enter(block)
        here, reading, writing = block.arguments[:3]
        place, sums = block.arguments[3:3 + len(first)], block.arguments[3 + len(first):]
        self.effect("async_wait", [], pending=stages - 2)
        self.effect("sync_warps", [])
        way.copy(writing, place, here, ahead)
        self.effect("async_commit", [])

        def between(step: int, steps: int) -> None:
            """The second half of the products: by then what was fetched is there."""
            for piece in pieces if 2 * step >= steps else ():
                piece.finish(writing, step - steps // 2, steps - steps // 2)

        if not self._promotes(found):
            sums = self._multiply(left, right, reading, blocks, sums, between)
        else:
            scales = self.stage_scales(found, here, (self.add(row, mine_row), warp_rows, row_end),
                                       (self.add(column, mine_column), warp_columns, column_end))
            bytes_of = None if found.dtype.is_float else (left.dtype, right[0].dtype)
            begin = zero if bytes_of is None else stage_sums.start_row(self, *bytes_of)
            made = self._multiply(left, right, reading, blocks, [begin] * count, between)
            if bytes_of is not None:
                made = stage_sums.as_floats(self, made, *bytes_of)
            sums = stage_sums.add_scaled(self, sums, made, scales, blocks)
        self.effect("yield", [self._next(reading, stage_bytes, end), self._next(writing, stage_bytes, end),
                              *way.following(place), *sums])
        self.leave()
        loop = Op("loop", [self.value(way.start), self.value(way.stop), *carried], [v.type for v in carried],
                  {"step": way.step, "label": found.depth}, [block], self.location)
        self.finish(loop)
        self.effect("async_wait", [], pending=0)
        stays = self.stays(walk, found, warp_rows, warp_columns, self.warps, stages * stage_bytes)
        own_bytes = 0 if stays else warp_rows * self.sum_row_bytes(warp_columns) * len(right)
        if own_bytes:
            self.effect("sync_warps", [])
        self.near_bytes_used = max(self.near_bytes_used, stages * stage_bytes, own_bytes * self.warps)
        self.name_stages([(piece.origin, piece.at, piece.bytes) for piece in pieces], stages, stage_bytes)
        self.name_buffers([("sums", 0, own_bytes * self.warps)])

        def store(sums: list[Value], row: Value, column: Value) -> None:
            row_end, column_end = self._ends(found)
            values = iter(sums)
            placed = [[Sum(next(values), i * fragments.ROWS + register // 2 * 8, j * fragments.COLUMNS + register % 2)
                       for i in range(blocks[0]) for j in range(blocks[1]) for register in range(4)] for _ in right]
            down = self.add(row, mine_row), warp_rows, row_end
            across = self.add(column, mine_column), warp_columns, column_end
            if stays:
                self.store_held(walk, found, placed, down, across)
            else:
                own = self.add(self.near(), self.mul(self.warp(), own_bytes))
                self._finish_tile(walk, found, placed, down, across, own)

        self.finish_segment(found, list(loop.results)[2 + len(first):], row, column, store)

    def _ends(self, found: MatrixWalk) -> tuple[Scalar, Scalar]:
        """Where the rows at hand end, and the columns."""
        rows, columns = self.open[found.rows], self.open[found.columns]
        return self.add(rows.offset, rows.extent), self.add(columns.offset, columns.extent)

    def _fill_stages(self, way: PlainDepth | WindowDepth, stages: int, stage_bytes: int) -> None:
        """Start the copies of all stages but one, once the last tile's sums are read: its place is free then."""
        self.effect("sync_warps", [])
        for number in range(stages - 1):
            way.copy_early(self.value(self.add(self.near(), number * stage_bytes)), number)
            self.effect("async_commit", [])

    def stage_scales(self, found: MatrixWalk, here: Value, rows: Part,
                     columns: Part) -> tuple[list[Value], list[Value]]:
        raise NotImplementedError("axes that are spread know their loads")

    def stays(self, walk: Walk, found: MatrixWalk, high: int, wide: int, warps: int, at_hand: int) -> bool:
        raise NotImplementedError("stores of sums know their ways")

    def store_held(self, walk: Walk, found: MatrixWalk, sums: list[list[Sum]], rows: Part, columns: Part) -> None:
        raise NotImplementedError("stores of sums know their ways")

    def piece_depth(self) -> int:
        unit, found = self.facts.matrix, self.matrix_walk
        assert unit is not None and found is not None
        return unit.depth * ELEMENT_BYTES // (f32 if found.run else found.dtype).size_bytes

    def _next(self, stage: Value, stage_bytes: int, end: Scalar) -> Value:
        following = self.value(self.add(stage, stage_bytes))
        over = self.emit(self.depth, "s_cmp", [following, self.value(end)], S64, cond="eq")
        return self.emit(self.depth, "s_select", [over, self.near(), following], S64)

    def _multiply(self, left: Piece, right: list[Piece], stage: Value, blocks: tuple[int, int], sums: list[Value],
                  between: Callable[[int, int], None]) -> list[Value]:
        """between: emits what is done among the products of a step of the depth, of so many."""
        sums = list(sums)
        hand = self._product_by_hand(left, right, blocks)
        high, wide = (1, 1) if hand is None else (hand.rows, hand.columns)
        depths = range(0, left.depth, fragments.DEPTH_BYTES // left.dtype.size_bytes)
        for step, depth in enumerate(depths):
            a = left.registers(stage, range(0, blocks[0] * fragments.ROWS, fragments.ROWS), depth)
            between(step, len(depths))
            for number, piece in enumerate(right):
                for pair in range(blocks[1] // 2):
                    b = piece.registers(stage, [pair * 2 * fragments.COLUMNS], depth)
                    for one, other in plane_pairs(left.planes, piece.planes):
                        for i in range(0, blocks[0], high):
                            for half in range(0, 2, wide):
                                places = [((number * blocks[0] + i + row) * blocks[1] + 2 * pair + half + column) * 4
                                          + register for row in range(high) for column in range(wide)
                                          for register in range(4)]
                                mine = [*(v for row in a[one][i:i + high] for v in row),
                                        *b[other][0][2 * half:2 * (half + wide)], *(sums[place] for place in places)]
                                types = [sums[place].type for place in places]
                                if hand is None:
                                    made = Op("matrix_multiply", mine, types, {
                                        "dtype": left.dtype, "right_dtype": piece.dtype}, None, self.location)
                                else:
                                    made = Op("asm_multiply", mine, types, {
                                        "by": hand.key, "rows": high, "columns": wide}, None, self.location)
                                self.finish(made)
                                for place, value in zip(places, made.results, strict=True):
                                    sums[place] = value
        return sums

    def _product_by_hand(self, left: Piece, right: list[Piece], blocks: tuple[int, int]) -> ProductPiece | None:
        """The first product of fragments that the schedule names and that fits; why the others do not is kept."""
        for key in self.products:
            piece = PRODUCTS[key]
            missing = sorted(piece.features - self.facts.features)
            dtypes = {left.dtype, *(p.dtype for p in right)}
            if key.partition(":")[0] != self.facts.family:
                reason = f"it is written for {key.partition(':')[0]}"
            elif missing:
                reason = f"the target has no {', '.join(missing)}"
            elif dtypes != {piece.dtype}:
                reason = f"the operands are of {', '.join(sorted(d.name for d in dtypes))}; it takes {piece.dtype.name}"
            elif blocks[0] % piece.rows:
                reason = f"a warp has {blocks[0]} blocks of {fragments.ROWS} rows; it takes {piece.rows} at a time"
            else:
                return piece
            self.refused.setdefault(key, reason)
        return None

    def sum_row_bytes(self, columns: int) -> int:
        """Of a row of sums in near memory, of which all lanes read something."""
        return max(columns, self.lanes) * f32.size_bytes + PADDING_BYTES

    def _finish_tile(self, walk: Walk, found: MatrixWalk, sums: list[list[Sum]], rows: Part, columns: Part,
                     base: Scalar) -> None:
        """Sums of each reduction to near memory from `base` on, and the walk's stores from there, each warp for its own
        part."""
        row_bytes = self.sum_row_bytes(columns[1])
        group, member = self.bits(0, "shr", self.iota(), 2), self.bits(0, "and", self.iota(), 3)
        lane_row = self.emit(0, "mul", [group, self.constant(row_bytes, i32)], ROW_I32)
        offsets = self.emit(0, "add", [lane_row, self.bits(0, "shl", member, 3)], ROW_I32)
        kept = {}
        for number, (op, some) in enumerate(zip(walk.reductions, sums, strict=True)):
            at = number * rows[1] * row_bytes
            t = op.result.type
            assert isinstance(t, TileType)
            rounds = t.dtype.name in ("bf16", "f16")
            for (value, row, column), (neighbour, _, _) in zip(some[::2], some[1::2], strict=True):
                pair = [self.emit(self.depth, "round_to", [v], ROW_F32, dtype=t.dtype) if rounds else v
                        for v in (value, neighbour)]
                self.effect("store_run", [self.value(base), offsets, *pair], dtype=row_dtype(t.dtype), gathered=True,
                            scale=1, disp=at + row * row_bytes + column * f32.size_bytes, near=True, disjoint=True,
                            streaming=False)
            kept[op.result] = Access(base, at, {found.rows: row_bytes, found.columns: f32.size_bytes},
                                     row_dtype(t.dtype), relative=True, near=True)
        outer = {axis: self.open[axis] for axis in (found.rows, found.columns)}
        for axis, (start, most, stop) in ((found.rows, rows), (found.columns, columns)):
            extent = self.scalar("s_min", self.scalar("s_max", self.sub(stop, start), 0), most)
            self.open[axis] = Open(start, extent, most, gcd(outer[axis].divisor, most))
        self.buffers.update(kept)
        self.walk(Walk(walk.outer, (), [], list(walk.after)))
        for value in kept:
            del self.buffers[value]
        self.open.update(outer)


def plane_pairs(left: int, right: int) -> list[tuple[int, int]]:
    """Which parts of both operands are multiplied, the smallest products first: those that are left out are below what
    f32 keeps of the whole (split_pieces.py)."""
    pairs = [(i, j) for i in range(left) for j in range(right) if i + j < max(left, right)]
    return sorted(pairs, key=lambda pair: -sum(pair))


def _dtype_of(load: Op) -> DType:
    return _dtype(load.result)


def _tile(value: Value) -> TileType:
    assert isinstance(value.type, TileType)
    return value.type


def _dtype(value: Value) -> DType:
    return _tile(value).dtype


def _scaled_load_of(value: Value) -> tuple[Op | None, Op | None]:
    """The load that a value is, but for widening, and the load that it was multiplied by, if it was. Integers may have
    become floats first."""
    def loaded(value: Value) -> Op | None:
        op = value.op
        if op is not None and op.name == "cast" and _dtype(value) is f32 and _dtype(op.operands[0]).is_integer:
            value = op.operands[0]
        return _load_of(value)

    load = loaded(value)
    if load is not None or value.op is None or value.op.name != "mul":
        return load, None
    loads = [loaded(v) for v in value.op.operands]
    loads.sort(key=lambda op: op is None or _dtype_of(op).bits)
    return (loads[0], loads[1]) if None not in loads else (None, None)


def _contracts_two_axes(walk: Walk) -> bool:
    """Whether a walk is one contraction, or two, with rows and columns."""
    return not walk.inner and len(walk.outer) == 2 and bool(walk.reduced) and 1 <= len(walk.reductions) <= 2 and all(
        op.name == "contract" for op in walk.reductions)


def _load_of(value: Value) -> Op | None:
    """The load that a value is, but for widening."""
    while value.op is not None and value.op.name == "cast" and _widens(value.op):
        value = value.op.operands[0]
    return value.op if value.op is not None and value.op.name == "load" else None


def _can_be_shared(loop: Op) -> bool:
    """Whether warps can have a part of a loop each."""
    return loop.name in ("tiles", "each") and bool(loop.attributes["parallel"]) and not loop.results and \
        loop.attributes.get("step", 1) == 1


def _is_affine(load: Op | None) -> bool:
    """Whether it is there, and of a place that needs no quotients."""
    return load is not None and all(affine(v) is not None for v in load.operands[1:])


def _widens(cast: Op) -> bool:
    """Whether a cast keeps every value, and integers integers."""
    before, after = (v.type.dtype for v in (cast.operands[0], cast.result))  # type: ignore[union-attr]
    return bool(before.is_float == after.is_float and before.is_integer == after.is_integer
                and before.bits < after.bits and (before.kind != "i" or after.kind != "u"))


def _unwidened(value: Value) -> Value:
    while value.op is not None and value.op.name == "cast" and _widens(value.op):
        value = value.op.operands[0]
    return value


def _narrow(value: Value) -> DType:
    """The type of a value before it was widened."""
    return _unwidened(value).type.dtype  # type: ignore[union-attr]


def _rounded_load_of(value: Value, dtypes: tuple[str, ...]) -> Op | None:
    """The load of elements of these types that a value is, or of f32 elements that are rounded to them."""
    value = _unwidened(value)
    op = value.op
    if op is None or _narrow(value).name not in dtypes:
        return None
    if op.name == "cast" and op.operands[0].type.dtype is f32:  # type: ignore[union-attr]
        op = op.operands[0].op
    return op if op is not None and op.name == "load" else None
