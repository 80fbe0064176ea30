"""Attention of single tokens in shares of positions: workers have as many each, and logits do not depend on them."""

from pathlib import Path

import numpy as np
import pytest

from sapper.kernels.shares import GRAIN
from sapper.models.batch import Fed, Pick
from sapper.models.load import load_model
from sapper.models.sampling import Sampling
from sapper.models.shares import Shares, workers_of
from sapper.runtime import settings
from sapper.runtime.program import Program

DATA = Path(__file__).parent / "data"
NEXT = Pick(0, Sampling(), 0.0)


@pytest.mark.parametrize(("workers", "rows", "lengths"), [
    (2, 1, [300]), (2, 1, [300, 310, 290]), (2, 3, [301]), (4, 1, [1500, 20, 30, 700, 15, 64]), (3, 2, [40] * 7),
    (16, 1, [900])])
def test_workers_have_as_many_positions(workers: int, rows: int, lengths: list[int]) -> None:
    """Of rows that are no multiple of them, fewer than they are, and of very different lengths."""
    sharing = Shares(workers, 1, 1)
    Program(sharing.of_tokens(np.array(lengths, np.int32) - 1, rows), threads=workers)()
    ends = np.cumsum([0, *np.repeat(lengths, rows)])
    row, at = sharing.cuts
    begins = ends[row] + at
    assert begins[0] == 0 and begins[-1] == ends[-1]
    assert (abs(np.diff(begins) - ends[-1] / workers) <= 2 * GRAIN).all()


def test_rows_that_are_not_parted_are_whole() -> None:
    """As many as workers, and as long: nothing is left to merge. One worker has all rows."""
    sharing = Shares(3, 1, 1)
    Program(sharing.of_tokens(np.full(3, 99, np.int32), 1), threads=3)()
    assert not sharing.cuts[1].any()
    assert sharing.merge(np.zeros((3, 1, 1), np.float32)) and not Shares(1, 1, 1).merge(np.zeros((3, 1, 1), np.float32))


def test_workers_are_those_of_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "threads", lambda: 7)
    assert (workers_of({"threads": 3}), workers_of({}), workers_of({"interpret": True})) == (3, 7, 7)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "deepseek_v2_lite", "deepseek_v32"])
def test_logits_do_not_depend_on_the_workers(name: str) -> None:
    """Steps of one, two and three sequences, of different lengths."""
    loaded = load_model(DATA / name, "f32")
    lengths, draw = (150, 70, 20), np.random.default_rng(1)
    texts = [[int(n) for n in draw.integers(0, loaded.tokenizer.size, length)] for length in lengths]
    found: dict[int, list[np.ndarray]] = {}
    for threads in (1, 3):
        batch = loaded.batch(3, 200, threads=threads)
        batch.table[...] = np.arange(12).reshape(3, 4)
        for slot, text in enumerate(texts):
            batch.step([Fed(token, slot, at) for at, token in enumerate(text[:-1])])
        found[threads] = []
        for slots in ((0,), (1, 2), (0, 1, 2)):
            batch.step([Fed(texts[slot][-1], slot, lengths[slot] - 1) for slot in slots],
                       [NEXT._replace(row=row) for row in range(len(slots))])
            found[threads].append(batch.step_logits[: len(slots)].copy())
    for mine, alone in zip(found[3], found[1], strict=True):
        np.testing.assert_allclose(mine, alone, rtol=1e-4, atol=1e-4)
