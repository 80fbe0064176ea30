"""Workers that share the depth of a product: split-K and stream-K, where tiles alone would leave workers idle.

Enters a walk on matrix instructions (matrix.py, groups.py) whose schedule, or the model, has its depth shared. Leaves
lane IR in which every worker goes through its *segments*: a tile, and which pieces of its depth. A worker has first its
share of the shared tiles, then whole tiles in turn:

    stream  as many whole waves of tiles as there are but one are dealt out as ever; what is left, less than two for
            each worker, is one line of (tile, piece of the depth) that the workers part evenly
            (Osama et al., "Stream-K: Work-centric Parallel Decomposition for Dense Matrix-Matrix Multiplication on the
            GPU", 2023)
    split   each tile goes to so many workers, as far as there are workers; where there are none left, tiles are whole

A share begins at position w R / G of R shared tiles and G sharers, a fraction of a tile at a whole piece. With G a
multiple of R it is split-K. So a worker begins one tile at most that another one had begun: of that it has no more than
part of the sums, which it leaves in its scratch memory, a warp after the other, as they lie in registers (`hand_over`).
Who begins a tile adds those of the workers that follow, in their order (`take_over`): the same sums in every run. No
worker waits before it has handed over, so that nobody waits forever where all of them run at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import gcd, prod
from typing import TYPE_CHECKING, NamedTuple

from ..ir.nodes import Block, Op, Value
from ..ir.types import S64, DType, RowType, f32, i32
from ..tile.schedule import MatrixGroup, MatrixUnit, ScheduleError
from .model import Model
from .state import Scalar

if TYPE_CHECKING:
    from .matrix import MatrixWalk

MOST_SHARERS, MOST_TILES, MOST_TILES_OF_AXIS = 1 << 15, (1 << 31) - 1, 1 << 25
"""Bounds that keep all divisions in 32 bits; a launch has fewer tasks anyway (ranges.py)."""
RUN_ROWS = 4
"""Rows of 32 bits that a lane stores together."""
LEAST_PIECES, WORTH = 8, 0.8
"""Pieces of the depth below which the model cuts no tile, as to store the sums of a tile and to read them again takes
as long as some; and the part of the time that sharing must leave to be chosen."""
CLUSTER_WORTH = 0.9
"""The part of the time that a cluster must leave to be chosen: its workers wait for each other at each piece."""
Cluster = tuple[str | None, int]
"""Along which axis workers have tiles side by side, and how many."""
ALONE: Cluster = (None, 1)

SHARE = ("first_tile", "first_piece", "end_piece", "mine", "segments", "whole", "workers", "pieces", "tiles",
         "shared", "sharers", "rows", "columns")
TILE = ("row", "column", "row_end", "column_end")
RECORD = (*SHARE, *TILE)
"""What a warp keeps of its worker's share in near memory, 32 bits each, as its registers are full of sums: where the
share begins, the last piece of its last tile, how many shared tiles it touches, how many segments it has, how many
tiles are whole, how many workers there are, pieces of the depth, tiles, shared ones, workers that share them, tiles
along rows and columns; and of the tile at hand where it is, and where rows and columns end."""
WORD_BYTES = i32.size_bytes


class Plan(NamedTuple):
    """About how long a processor works on a product with such a tile and cluster."""

    cycles: float
    tile: tuple[int, int]
    cluster: Cluster


class DepthShares(Model):
    """shares: into how many parts a tile's depth is split at most, 0 where workers part all of it evenly; None: tiles
    are whole. cluster: workers of one; cluster_axis: along which their tiles lie (clusters.py). turn: of a worker's
    segments, the one that is being emitted, counted from 0. multiplies: whether the warps at hand have sums. only_warp:
    the one at hand, where there is one. keeping: ops on records, which lie behind all else in near memory."""

    shares: int | None = None
    turn: Value | None = None
    multiplies = True
    only_warp: int | None = None
    keeping: tuple[Op, ...] = ()
    least_pieces = 1
    cluster = 1
    cluster_axis: str | None = None
    part: Block
    matrix_walk: MatrixWalk | None
    warps: int
    in_order: bool

    def piece_depth(self) -> int:
        raise NotImplementedError("matrix instructions say how deep a piece is")

    def rank(self) -> Scalar:
        raise NotImplementedError("clusters say who is who")

    def matrix_unit(self) -> MatrixUnit | MatrixGroup:
        raise NotImplementedError("matrix instructions say which they are")

    def fitting_tiles(self) -> list[tuple[int, int]]:
        raise NotImplementedError("matrix instructions have tiles")

    def name_buffers(self, buffers: Iterable[tuple[str, int, int]]) -> None:
        raise NotImplementedError("matrix instructions name what lies in near memory")

    def take_tile(self, tile: tuple[int, int]) -> None:
        raise NotImplementedError("matrix instructions have tiles")

    def matrix_tile(self) -> tuple[int, int]:
        raise NotImplementedError("matrix instructions have tiles")

    def _extent_of(self, axis: str, from_zero: bool) -> int:
        raise NotImplementedError("matrix instructions ask for extents")

    def _nests(self) -> int:
        raise NotImplementedError("matrix instructions ask for extents")

    def warp(self) -> Value:
        return self.emit_once("warp")

    def near(self) -> Value:
        return self.emit_once("near_memory")

    # The choice.

    def settle_product(self) -> None:
        """Which tile a worker has, whether workers share its depth, and which are a cluster, before anything is
        emitted: of what the schedule leaves open, what takes least time by the model. Raises ScheduleError where the
        schedule asks for what can't be."""
        split, stream = self.schedule.split, self.schedule.stream
        found, asked = self.matrix_walk, next(iter(split), stream)
        reason = self._unshareable(asked)
        if asked is not None and reason is not None:
            entry = "split" if split else "stream"
            raise ScheduleError(f"schedule of {self.function.name}: {entry} of {asked}: found {reason}; expected one "
                                f"product over whole extents; mend: leave {entry} out")
        self.check_cluster()
        if found is None or self.warps == 1:
            return
        parts = split.get(asked or "", 0)
        shared = self._quickest(found, parts) if reason is None and parts != 1 else None
        best = self._quickest(found, None)
        if shared is not None and (asked is not None or shared.cycles <= WORTH * best.cycles):
            self.least_pieces = LEAST_PIECES if asked is None else 1
            self.shares, best = parts, shared
        if not self.in_order:       # of groups of rows too little is known to compare tiles
            self.take_tile(best.tile)
        self.cluster_axis, self.cluster = best.cluster

    def _quickest(self, found: MatrixWalk, shares: int | None) -> Plan:
        """The tile and the cluster that take least time; of tiles that take as long the largest, and a cluster only
        where it is worth it, or asked for."""
        plans = []
        for tile in self.fitting_tiles():
            alone, *clusters = (Plan(self._cycles(found, tile, cluster, shares), tile, cluster)
                                for cluster in self.clusters_of(tile))
            better = min(clusters, key=lambda plan: plan.cycles, default=alone)
            plans.append(better if better.cycles <= CLUSTER_WORTH * alone.cycles else alone)
        return min(plans, key=lambda plan: plan.cycles)

    def check_cluster(self) -> None:
        """Raises ScheduleError where the schedule asks for a cluster that can't be."""
        raise NotImplementedError("clusters say which there are")

    def clusters_of(self, tile: tuple[int, int]) -> list[Cluster]:
        """Which workers with such tiles may be a cluster, for the model: first none, or the one that is asked for."""
        raise NotImplementedError("clusters say which there are")

    def _unshareable(self, asked: str | None) -> str | None:
        """What stands against sharing the depth: of the axis that the schedule names, or, None, of whatever it is."""
        found = self.matrix_walk
        if found is None or self.warps == 1:
            return "a walk that is not one product on matrix instructions of several warps"
        if self.part is not self.function.body:
            return "other loops beside that of the product"
        if asked not in (None, found.depth) or len(self.schedule.split) > 1:
            return f"another axis than {found.depth}, which its product contracts"
        if self.in_order:
            return "a loop over groups, whose workers do not know what the others have to do"
        if found.around:
            return f"other axes, {', '.join(found.around)}, that it contracts besides"
        if self.schedule.chunks:
            return "chunks too, of which each is a task of one worker"
        if self._depth_end(found) is None:
            return f"an extent of {found.depth} that is known only inside of its loops"
        return None

    def can_share(self) -> bool:
        """Whether a schedule may have the depth shared."""
        return self._unshareable(None) is None

    def product_cycles(self) -> float:
        """About how long a processor works on the product, as tile, shares and clusters are settled."""
        found = self.matrix_walk
        assert found is not None
        return self._cycles(found, self.matrix_tile(), (self.cluster_axis, self.cluster), self.shares)

    def _cycles(self, found: MatrixWalk, tile: tuple[int, int], cluster: Cluster, shares: int | None) -> float:
        """About how long a processor works, for typical extents: on pieces, each as long as its products or as its
        operands take to come, and on sums that are handed over. shares: see DepthShares."""
        unit = self.matrix_unit()
        axis, together = cluster
        rows, columns, depth = (self._extent_of(axis, False) for axis in (found.rows, found.columns, found.depth))
        depth *= prod(self._extent_of(axis, False) for axis in found.around)
        counts = [-(-extent // size) for extent, size in zip((rows, columns), tile, strict=True)]
        # Workers of a cluster take neighbouring tiles together, and each a part of what all of them read.
        beside = [together if axis == own else 1 for own in (found.rows, found.columns)]
        tiles = prod(-(-count // some) for count, some in zip(counts, beside, strict=True)) * self._nests()
        teams = unit.workers // together
        deep, size, products = self.piece_depth(), found.dtype.size_bytes, len(found.right)
        row_bytes, (left, right) = deep * size, found.element_bytes
        brought = (tile[0] * left / beside[1] + products * tile[1] * right / beside[0]) * deep
        arriving = (tile[0] * left + products * tile[1] * right) * deep
        pieces = -(-depth // deep)

        def piece(busy: float) -> float:
            """Where so many workers share what the cache gives."""
            multiplied = products * tile[0] * tile[1] * found.products
            return max(multiplied * row_bytes / 2 / unit.products, arriving / unit.port_bytes,
                       brought * busy / unit.workers / unit.cache_bytes)

        whole = -(-tiles // teams) * pieces * piece(min(tiles, teams) * together)
        if shares is None:
            return whole
        cut = max(1, min(pieces // LEAST_PIECES, shares or pieces))
        some = tiles if shares else tiles % teams + min(tiles // teams, 1) * teams
        sharers = min(teams, some * cut)
        if not some or (sharers <= some and sharers < teams) or (shares and tiles * 2 > teams):
            return whole
        each = (tiles - some) // teams + some / sharers
        handed = (1 + max(1, -(-sharers // some) - 1)) * products * tile[0] * tile[1] * f32.size_bytes
        return each * pieces * piece(sharers * together) + handed / unit.cache_bytes

    def _depth_end(self, found: MatrixWalk) -> Value | None:
        """The extent of the depth, where it is one of the call and the depth starts at 0."""
        for op in self.function.walk():
            if op.name == "whole" and op.attributes["axis"] == found.depth:
                start, stop = (v.op for v in op.operands[:2])
                if start is not None and start.name == "const" and start.attributes["value"] == 0 \
                        and stop is not None and stop.name in ("dim", "const"):
                    return op.operands[1]
        return None

    def most_shares(self) -> list[list[object]]:
        """Into how many segments a tile is cut at most: a factor of how many tasks there are (Lowering._most_tasks)."""
        found = self.matrix_walk
        if self.shares is None or found is None:
            return []
        if self.shares:
            return [[self.shares, [], 1]]
        end = self._depth_end(found)
        assert end is not None and end.op is not None
        size = self.piece_depth() * self.least_pieces
        known = end.op.attributes
        return [[1, [known["name"]], size] if end.op.name == "dim" else [known["value"], [], size]]

    # Segments.

    def each_segment(self, tiles: Scalar, counts: Mapping[str | None, Scalar],
                     one: Callable[[Scalar, Mapping[str | None, Scalar]], None]) -> None:
        """Emit a worker's segments. counts: of tiles along axes, where they are not constant. one: emits the segment of
        a tile, from its number and such counts."""
        found = self.matrix_walk
        assert found is not None
        axes = {name: axis for name, axis in (("rows", found.rows), ("columns", found.columns)) if axis in counts}
        if not self.keeping:
            self._record_share(tiles)
            self._record(0, tuple(axes), *(counts[axis] for axis in axes.values()))
        (segments,) = self._recorded("segments")

        def segment(turn: Value) -> None:
            first_tile, mine, whole, workers, tiles = self._recorded("first_tile", "mine", "whole", "workers", "tiles")
            own = self.add(self.team(self.depth), self.mul(self.sub(turn, mine), workers))
            place = self._where("lt", turn, mine, self.add(whole, self.add(first_tile, turn)), own)
            self.turn = turn
            known = dict(counts)
            for axis, count in zip(axes.values(), self._recorded(*axes), strict=True):
                known[axis] = self._within(1, count, MOST_TILES_OF_AXIS)
            one(self.scalar("s_max", self.scalar("s_min", place, self.sub(tiles, 1)), 0), known)
            self.turn = None

        self.counted("segment", 0, segments, 1, segment)

    def _record_share(self, tiles: Scalar) -> None:
        """Compute a worker's share before its warps part, of whom those that copy have few registers."""
        found, least = self.matrix_walk, self.least_pieces
        assert found is not None
        end = self._depth_end(found)
        assert end is not None
        pieces = self.scalar("s_max", self.ceil_div(self.integer(end), self.piece_depth()), 1)
        worker, workers = self.team(0), self.teams()
        tiles = self.scalar("s_min", tiles, MOST_TILES)
        if self.shares:
            each = self.scalar("s_floordiv", workers, self.scalar("s_max", tiles, 1))
            cut = self._within(1, self.scalar("s_min", self.scalar("s_min", each, self.shares), pieces), MOST_SHARERS)
            shared = self._where("gt", cut, 1, self.scalar("s_min", tiles, MOST_SHARERS), 0)
            sharers = self._within(1, self.mul(shared, cut), MOST_SHARERS)
        else:
            rest = self.scalar("s_mod", tiles, workers)
            wave = self._where("ge", tiles, workers, workers, 0)
            shared = self._where("eq", rest, 0, 0, self.add(rest, wave))
            cut = self.scalar("s_max", self.scalar("s_floordiv", pieces, least), 1)
            sharers = self.scalar("s_max", self.scalar("s_min", self.mul(shared, cut), workers), 1)
        first_tile, first_piece = self._position(worker, shared, sharers, pieces)
        last_tile, last_piece = self._position(self.add(worker, 1), shared, sharers, pieces)
        end_piece = self._where("gt", last_piece, 0, last_piece, pieces)
        mine = self.add(self.sub(last_tile, first_tile), self.scalar("s_min", last_piece, 1))
        whole = self.sub(tiles, shared)
        rest = self.scalar("s_max", self.sub(whole, worker), 0)
        turns = self.scalar("s_floordiv", self.add(rest, self.sub(workers, 1)), workers)
        segments = self._where("lt", worker, workers, self.add(mine, turns), 0)
        self._record(0, SHARE[:-2], first_tile, first_piece, end_piece, mine, segments, whole, workers, pieces, tiles,
                   shared, sharers)

    def _word(self, name: str) -> int:
        """From a warp's first word: those of a kind lie side by side, one of each warp."""
        return RECORD.index(name) * self.warps * WORD_BYTES

    def _own_word(self, level: int) -> Value:
        """The first word of this warp; one that is alone needs no register for it."""
        if self.only_warp is not None and level:
            return self.emit(level, "s_add", [self.near(), self.value(self.only_warp * WORD_BYTES)], S64)
        own = self.emit(level, "s_mul", [self.warp(), self.value(WORD_BYTES)], S64)
        return self.emit(level, "s_add", [self.near(), own], S64)

    def _record(self, level: int, names: tuple[str, ...], *values: Scalar) -> None:
        place = self._own_word(level)
        for name, value in zip(names, values, strict=True):
            kept = Op("s_store", [self.value(value), place], (), {
                "dtype": i32, "near": True, "disp": self._word(name)}, None, self.location)
            self.levels[level].builder.block.ops.append(kept)
            self.keeping += (kept,)

    def _recorded(self, *names: str) -> list[Value]:
        """Read anew, so that no register holds it meanwhile."""
        place, made = self._own_word(self.depth), []
        for name in names:
            made.append(self.emit(self.depth, "s_load", [place], S64, dtype=i32, near=True,
                                  disp=self._word(name)))
            self.keeping += (self.levels[-1].builder.block.ops[-1],)
        return made

    def place_records(self, end: int) -> int:
        """Records lie behind the first `end` bytes of near memory; gives where they end."""
        for op in self.keeping:
            op.attributes["disp"] += end
        self.name_buffers([("shares", end, self.records_bytes())])
        return end + self.records_bytes()

    def records_bytes(self) -> int:
        return 0 if self.shares is None else len(RECORD) * self.warps * WORD_BYTES

    def emit_once(self, name: str) -> Value:
        """An op without operands, at the outermost level."""
        memo = self.levels[0].memo
        if name not in memo:
            memo[name] = self.emit(0, name, [], S64)
        found: Value = memo[name]
        return found

    def _within(self, low: int, value: Scalar, high: int) -> Scalar:
        """A value that lies there anyway, so that ranges.py knows."""
        return self.scalar("s_min", self.scalar("s_max", value, low), high)

    def _where(self, condition: str, a: Scalar, b: Scalar, then: Scalar, other: Scalar) -> Value:
        level = max(map(self.depth_of, (a, b, then, other)))
        chosen = self.emit(level, "s_cmp", [self.value(a), self.value(b)], S64, cond=condition)
        return self.emit(level, "s_select", [chosen, self.value(then), self.value(other)], S64)

    def _position(self, sharer: Scalar, tiles: Scalar, sharers: Scalar, pieces: Scalar) -> tuple[Scalar, Scalar]:
        """The tile and the piece at which a sharer begins: floor(sharer * tiles * pieces / sharers), without a product
        of more than 32 bits that is divided."""
        places = self.mul(self.scalar("s_min", sharer, sharers), tiles)
        tile, part = self.scalar("s_floordiv", places, sharers), self.scalar("s_mod", places, sharers)
        whole, rest = (self.scalar(name, pieces, sharers) for name in ("s_floordiv", "s_mod"))
        return tile, self.add(self.mul(part, whole), self.scalar("s_floordiv", self.mul(part, rest), sharers))

    def segment_tile(self, found: MatrixWalk, body: Callable[[Value, Value], None]) -> None:
        """The one tile of a segment."""
        rows, columns = self.open[found.rows], self.open[found.columns]
        row, column = self.value(rows.offset), self.value(columns.offset)
        if self.multiplies:
            self._record(self.depth, TILE, row, column, self.add(row, rows.extent), self.add(column, columns.extent))
        body(row, column)

    @contextmanager
    def segment_depth(self, axis: str) -> Iterator[None]:
        """The depth is that of the segment inside."""
        outer = self.open[axis]
        if self.turn is not None:
            first_piece, end_piece, mine, pieces = self._recorded("first_piece", "end_piece", "mine", "pieces")
            deep = self.piece_depth()
            first = self.mul(self._where("eq", self.turn, 0, first_piece, 0), deep)
            last = self.mul(self._where("eq", self.turn, self.sub(mine, 1), end_piece, pieces), deep)
            self.open[axis] = replace(outer, offset=self.add(outer.offset, first), divisor=gcd(outer.divisor, deep),
                                      extent=self.sub(self.scalar("s_min", last, outer.extent), first))
        yield
        self.open[axis] = outer

    # Sums.

    def team(self, level: int) -> Scalar:
        """The number of this worker's cluster: a share is a cluster's, whose workers have tiles side by side."""
        return self.scalar("s_floordiv", self.emit(level, "worker", [], S64), self.cluster)

    def teams(self) -> Scalar:
        teams: Scalar = self.emit_once("workers")
        if self.cluster > 1:        # there is one at least: so that ranges.py knows
            teams = self.scalar("s_max", self.scalar("s_floordiv", teams, self.cluster), 1)
        return self.scalar("s_min", teams, MOST_SHARERS)

    def member(self, team: Scalar) -> Scalar:
        """The worker of another cluster that has this one's rank."""
        return self.add(self.mul(team, self.cluster), self.rank())

    def finish_segment(self, found: MatrixWalk, sums: list[Value], row: Value, column: Value,
                       store: Callable[[list[Value], Value, Value], None]) -> None:
        """What becomes of the sums of a tile, or of a segment of it: who began the tile stores it."""
        if self.turn is None:
            store(sums, row, column)
            return
        totals = self._taken_over(self.turn, sums)
        begins = self.emit(self.depth, "s_cmp", [self._first_piece(self.turn), self.value(0)], S64, cond="eq")

        def finish() -> None:
            outer = {axis: self.open[axis] for axis in (found.rows, found.columns)}
            row, column, *ends = self._recorded(*TILE)
            for (axis, open_), start, end in zip(outer.items(), (row, column), ends, strict=True):
                self.open[axis] = replace(open_, offset=start, extent=self.sub(end, start))
            store(totals, row, column)
            self.open.update(outer)

        self.fork(begins, finish, lambda: self._handed_over(totals))

    def _first_piece(self, turn: Value) -> Value:
        (first_piece,) = self._recorded("first_piece")
        return self._where("eq", turn, 0, first_piece, 0)

    def _shares_of(self, worker: Scalar, sums: list[Value]) -> Value:
        """Where a worker leaves the sums of this warp."""
        of_warp = len(sums) * self.lanes * 4
        memo = self.levels[0].memo
        if "shares" not in memo:
            memo["shares"] = self.scratch([(len(sums) * self.warps, 1), (self.lanes, 1)], _dtype_of(sums), shared=True)
            memo["scratch bytes"] = self.emit(0, "arg", [], S64, slot=1)
        start = self.add(memo["shares"], self.mul(worker, memo["scratch bytes"]))
        own = self.emit(self.depth, "s_mul", [self.warp(), self.value(of_warp)], S64)
        return self.value(self.add(start, own))

    def _handed_over(self, sums: list[Value]) -> None:
        place, dtype = self._shares_of(self.emit(self.depth, "worker", [], S64), sums), _dtype_of(sums)
        for at in range(0, len(sums), RUN_ROWS):
            self.effect("store_run", [place, *sums[at:at + RUN_ROWS]], dtype=dtype, disp=at * self.lanes * 4,
                        handed=True)
        self.effect("hand_over", [])

    def _taken_over(self, turn: Value, sums: list[Value]) -> list[Value]:
        """Who began the tile adds those of the workers that follow, up to the one that ends it, in turn."""
        first_tile, end_piece, mine, pieces, shared, sharers = self._recorded(
            "first_tile", "end_piece", "mine", "pieces", "shared", "sharers")
        following = self._within(1, shared, 2 * MOST_SHARERS)
        tile = self._within(0, self.add(first_tile, turn), 2 * MOST_SHARERS - 1)
        ends = self.mul(self.add(tile, 1), self._within(1, sharers, MOST_SHARERS))
        stop = self.scalar("s_floordiv", self.add(ends, self.sub(following, 1)), following)
        last = self._where("eq", turn, self.sub(mine, 1), end_piece, pieces)
        stop = self._where("eq", last, pieces, 0, stop)
        stop = self._where("eq", self._first_piece(turn), 0, stop, 0)
        team = self.value(self.team(self.depth))
        block = Block([S64, *[v.type for v in sums]])
        self.enter(block)
        before, *totals = block.arguments
        other = self.value(self.member(self.emit(self.depth, "s_add", [before, self.value(1)], S64)))
        dtype = _dtype_of(sums)
        self.effect("take_over", [other])
        place = self._shares_of(other, sums)
        made = []
        for at in range(0, len(sums), RUN_ROWS):
            some = Op("load_run", [place], [RowType(dtype)] * RUN_ROWS, {
                "dtype": dtype, "disp": at * self.lanes * 4, "handed": True}, None, self.location)
            self.finish(some)
            made += [self.emit(self.depth, "add", [total, value], RowType(dtype))
                     for total, value in zip(totals[at:at + RUN_ROWS], some.results, strict=True)]
        self.effect("yield", made)
        self.leave()
        loop = Op("loop", [team, self.value(self.sub(stop, 1)), *sums], [v.type for v in sums],
                  {"step": 1, "label": "worker"}, [block], self.location)
        self.finish(loop)
        return list(loop.results)


def _dtype_of(sums: list[Value]) -> DType:
    type = sums[0].type
    assert isinstance(type, RowType)
    return type.dtype
