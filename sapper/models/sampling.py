"""How a token is drawn from logits: the settings, checked.

In: numbers of a user. Out: `Sampling`. Holds: the order of the cuts is llama.cpp's: the top_k likeliest tokens; of
these the fewest whose probabilities reach top_p; of these the ones that have min_p of the likeliest's probability or
more; and only then the temperature (sapper/kernels/sampling.py). A seed gives the same numbers in Python and in a
model's file (sapper/ahead/draw.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ahead.draws import Draws
from .errors import ModelError

MAX_TEMPERATURE = 1e6
BELOW_ONE = 1.0 - 2.0**-24
"""The largest f32 below 1: a random number that lies above would round to 1, beyond the last candidate."""
CANDIDATES = 128
"""Most tokens among which one is drawn (top_k) in a batch, and in a model's file."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature: 0 takes the likeliest token. top_k: at most so many candidates. top_p in (0, 1]: until their
    probabilities reach it. min_p in [0, 1]: at least this part of the likeliest one's. seed: of the draws."""

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """Raises ModelError for a number out of its range."""
        if not 0.0 <= self.temperature <= MAX_TEMPERATURE or self.top_k < 1 or not 0.0 < self.top_p <= 1.0 \
                or not 0.0 <= self.min_p <= 1.0:
            raise ModelError(
                "sampling", f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}, min_p "
                f"{self.min_p}", "temperature >= 0, top_k >= 1, top_p in (0, 1], min_p in [0, 1]",
            )

    def draws(self) -> Draws:
        """Random numbers for one answer."""
        return Draws(self.seed)
