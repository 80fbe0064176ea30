"""How a target's memory is best asked for before it is read: facts, measured on each processor.

Leaves: `Requests`, which a target has and the model reads (lane/prefetches.py, lane/stream_prefetches.py say what was
measured where).
"""

from __future__ import annotations

from typing import NamedTuple

KEEP_COST = 8
"""Instructions for a vector that cost as much as storing and loading it again in the first cache, about."""

KEPT, READ_AGAIN = 1, 2
"""What is stored a row behind in the caches."""


class Requests(NamedTuple):
    """Distances are in bytes from what is read at the time; caches are 1 or 2.

    stream_ahead_bytes: how early a single stream is asked for, if arithmetic keeps up with memory. line_by_line:
    such a stream is best asked for and read a line or two at a time, and asked into the second cache: the first has
    too few places for requests. stream_level: the cache that streams and packed panels are asked into.
    panel_ahead_bytes: how early packed panels are, if arithmetic keeps up; 0: as stream_ahead_bytes says.
    block_ahead_bytes: how early weights in blocks are, into the second cache, and by a single row all of them
    together, into that of stream_level; 0: as the loop over them wants. block_rows_ahead_bytes: the same by several
    rows, each of the weights by itself, into that of stream_level; 0: as block_ahead_bytes says. block_level: the cache
    that a single row asks for blocks into; 0: stream_level.
    widened_ahead_bytes: how early loops that unpack weights in blocks, and store them, ask for them, into the first
    cache; 0: not at all.
    long_row_ahead_bytes: how early each of several rows at once is, along itself and into the first cache, where half
    of that has no room for the next rows; 0: 2 KiB where the first cache takes streams, else the next rows are asked
    for.
    scales_ahead_bytes: of weights in blocks, a single row in packed products asks for what moves by a line or less
    with each block, as scales do, so early and into the first cache, and for all else again and again; 0: for all
    of them, as above. row_streams: from how many places at a time the rows of matrices that meet a vector are best
    read; 0: rows lie side by side, or come one by one. short_row_streams: the same where half of the first cache
    surely holds the vector; 0: half as many. Without again these are the places of packed panels that a single row
    meets, too, but where panel_streams says how many of them there are. panel_parts: from how many places of their
    depth several rows, but few, meet such panels at a time, each asked for long_row_ahead_bytes ahead; 0: as one
    stream. again: each line of these, and of what few rows meet while arithmetic keeps up, is asked for again and
    again; else these streams are not asked for at all, as the processor sees them coming, and all else once.
    block_places: from how many places at a time the panels of a matrix in blocks that a single row meets are read, not
    asked for; 0: as one stream, asked for block_ahead_bytes ahead. places_ahead_bytes: without again, how early rows
    that a single one meets are asked for all the same, once and into the first cache, where the processor brings those
    that it sees coming only as far as the second; 0: not at all. rows_in_blocks: a matrix [in, out] that few rows meet
    is read in blocks of so many of its rows, a line of each and then the next ones, though two multiply-adds start in a
    cycle; 0: several lines of each row at once there.
    rows_end_to_end: of so many rows of a matrix [in, out] a few vectors meet all columns before any meets the next
    ones, as the processor follows so many rows by itself; 0: of more rows, and of fewer columns at a time. A single
    vector meets rows from row_streams places, without again. next_rows: what many rows that meet weights in blocks have
    in the next pass is asked for, into the first cache. rows_together: so many of few rows meet each block of such
    weights, or of panels of pairs, at once, though registers do not hold their sums, and what is left of them as many
    as these do hold.
    blocks_written_out: a single row meets a block of weights by instructions for each of its parts, not by a loop over
    these, as the processor follows each load by how far it has moved on.
    part_bytes: many rows walk loops over weights in blocks by parts of about so many bytes of what they meet, which
    stay in the first cache for some hundred of them; 0: whole loops by each tile of rows.

    reread_ahead_bytes: how early panels that one piece of many rows after another meets, and which the first cache does
    not hold, are asked into it; 0: not at all, as the processor brings them from the second early enough. If it does
    not, so are rows of values (WalkChoice.rows_again, rows_later), and panels of pairs that rows of a nest meet
    (panels_again), by few rows stream_ahead_bytes ahead.
    few_at_once: so many of few rows meet the rows of a matrix that lie along the depth at once, as far as registers
    hold the sums, as what each piece of them reads again comes from the second cache slowly; 0: as many as of the
    matrix. depth_block: so many steps of the depth many rows meet in a block of panels before any meets the next ones,
    where all of it would have the rows come from the last cache for each panel or two; 0: all, as that is quick.

    block_loads: rows meet a block of weights at once that read no more words of 32 bits of their own in it, as all of
    these are loaded before the products; 0: they are read as they are met.

    keep_cost: a value that several walks read is kept in scratch memory between them if it takes more instructions for
    each row of lanes (tile/plan.py), else made again.

    Beside stores past the caches: row_requests, stream_requests: how many times a line is asked for, of rows and of
    what is read as one stream, as far as that is not line by line; once, it is asked for nearer. request_level: the
    cache that it is asked into, where 1 makes those stores wait on some processors. late_stores: which rows
    that much is computed for are best stored a row behind, beside the arithmetic of the next one, in the caches too
    (tile/plan.py): none, those that are kept (KEPT), or also those that are read again for that (READ_AGAIN).

    last_whole: what is left of a row that is only stored is its last whole vector, part of which is stored again, as a
    store under a mask takes long.

    pairs_in_caches: two rows that wait for sums of themselves are worked on at once only where they surely stay in the
    last cache, or wait that long: from memory they take longer (lane/row_waits.py).

    store_ahead_bytes: how early lines are asked for, to be written, that walks store one after the other, if twice the
    first cache has no room for all of them. None goes past the caches then. 0: no line is.
    """

    stream_ahead_bytes: int = 2 << 10
    line_by_line: bool = False
    stream_level: int = 2
    panel_ahead_bytes: int = 0
    block_ahead_bytes: int = 0
    block_rows_ahead_bytes: int = 0
    block_level: int = 0
    widened_ahead_bytes: int = 0
    scales_ahead_bytes: int = 0
    long_row_ahead_bytes: int = 0
    row_streams: int = 0
    short_row_streams: int = 0
    panel_streams: int = 0
    panel_parts: int = 0
    again: bool = True
    block_places: int = 0
    places_ahead_bytes: int = 0
    rows_in_blocks: int = 0
    rows_end_to_end: int = 0
    next_rows: bool = False
    rows_together: int = 0
    blocks_written_out: bool = False
    part_bytes: int = 0
    reread_ahead_bytes: int = 0
    few_at_once: int = 0
    depth_block: int = 0
    block_loads: int = 0
    keep_cost: int = KEEP_COST
    row_requests: int = 3
    stream_requests: int = 3
    request_level: int = 2
    late_stores: int = 0
    pairs_in_caches: bool = False
    store_ahead_bytes: int = 0
    last_whole: bool = False

    @property
    def once(self) -> bool:
        """Whether each line of what is read beside large results is asked for once, stream_ahead_bytes ahead or more:
        where memory is best read line by line, or lines are asked for to be written."""
        return self.line_by_line or self.store_ahead_bytes > 0


USUAL = Requests()
"""What serves where nothing was measured: as a Zen 4 has it, but for scales_ahead_bytes, row_streams and
late_stores."""
