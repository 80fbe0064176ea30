"""Drafts for several sequences: the tokens are those of sessions without any, whoever is in the batch and whatever of
the drafts is right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from sapper.cli.main import main
from sapper.kernels.paged import PAGE
from sapper.models import batch as batches
from sapper.models.batch import Known
from sapper.models.deepseek.model import DeepseekModel
from sapper.models.deepseek.model import load_model as load_deepseek
from sapper.models.deepseek.speculative_batch import SpeculativeBatch
from sapper.models.errors import ModelError
from sapper.models.generate import Generation
from sapper.models.sampling import Sampling
from sapper.models.scheduler import Job, Scheduler

DATA = Path(__file__).parent / "data"
GREEDY = Sampling()


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(DATA / "deepseek_v3.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def model() -> DeepseekModel:
    loaded = load_deepseek(DATA / "deepseek_v3", "f32", predictor=True)
    loaded.tokenizer.stops = frozenset()
    return loaded


def run(scheduler: Scheduler, jobs: Sequence[Job]) -> None:
    for job in jobs:
        scheduler.submit(job)
        scheduler.step()
    while scheduler.step():
        pass


def test_as_many_drafts_are_right_as_the_reference_says(model: DeepseekModel, recorded: dict[str, np.ndarray]) -> None:
    prompt, greedy = recorded["tokens"].tolist(), recorded["greedy"].tolist()
    scheduler = Scheduler(model, model.batch(2, 160, speculate=True))
    scheduler.batch.prepare()
    job = Job(prompt, len(greedy), GREEDY)
    run(scheduler, [job])
    assert job.tokens == greedy
    every = prompt + greedy
    position, right, wrong = len(prompt), 0, 0
    while position < len(every) - 2:  # the last token is asked for alone
        if recorded["drafts"][position - 1] == every[position + 1]:
            right, position = right + 1, position + 2
        else:
            wrong, position = wrong + 1, position + 1
    assert (scheduler.accepted, scheduler.drafted) == (right, right + wrong) and right > 20


@pytest.mark.parametrize("pages", [12, 3])
def test_tokens_are_those_of_each_alone(
    model: DeepseekModel, recorded: dict[str, np.ndarray], pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and drawn, ends at limits and at the context, evictions where pages are few; two drafts of three are what
    follows in truth."""
    context = 2 * PAGE + 20
    start = recorded["tokens"].tolist()
    asked = [
        (start * 4, 50, GREEDY), (start[:5], 1, GREEDY), (start * 4, 60, Sampling(0.8, 20, 0.9, seed=3)),
        (start[3:], 2, Sampling(1.2, 50, seed=4)), ((start * 12)[: context - 9], 40, GREEDY), (start[1:], 41, GREEDY),
    ]
    wanted = []
    known: dict[tuple[int, ...], int] = {}
    for prompt, limit, how in asked:
        session = model.session(context)
        made = Generation(model, prompt, limit, session=session, temperature=how.temperature, top_k=how.top_k,
                          top_p=how.top_p, seed=how.seed)
        list(made)
        wanted.append((made.tokens, made.stop))
        every = prompt + made.tokens
        known |= {tuple(every[:i]): token for i, token in enumerate(every)}

    batch = model.batch(3, context, pages, speculate=True)
    scheduler = Scheduler(model, batch)
    foresee = SpeculativeBatch.foresee

    def drafted(self: SpeculativeBatch, rows: Sequence[Known], ends: Sequence[int]) -> list[int]:
        found = foresee(self, rows, ends)
        slots = {job.slot: job for job in scheduler.running}
        for place, end in enumerate(ends):
            job = slots[rows[end].slot]
            before = tuple(job.all_tokens(0, job.length))
            if len(before) % 3:
                found[place] = known.get(before, found[place])
        return found

    monkeypatch.setattr(SpeculativeBatch, "foresee", drafted)
    jobs = [Job(prompt, limit, how) for prompt, limit, how in asked]
    run(scheduler, jobs)
    assert [(job.tokens, job.ending) for job in jobs] == wanted
    assert 20 < scheduler.accepted < scheduler.drafted and scheduler.free_pages == batch.pages
    assert bool(scheduler.evictions) == (pages == 3)


def test_many_slots_have_all_programs_made(model: DeepseekModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each brings a draft, so that more tokens may be picked than there are positions, and no more than a step has."""
    monkeypatch.setattr(batches, "CHUNK", 256)
    batch = model.batch(128, 100, pages=8, speculate=True)
    made = []
    monkeypatch.setattr(batch, "step", lambda fed, picks: made.append([row.position for row in fed]))
    monkeypatch.setattr(batch, "foresee", lambda rows, wanted: made.append([row.position for row in rows]))
    batch.prepare()
    assert {len(positions) for positions in made} == {1, 256} and batch.picks == batch.chunk == 256
    assert max(map(max, made)) == 99


def test_models_without_a_head_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match="load it with predictor=True"):
        load_deepseek(DATA / "deepseek_v3", "f32").batch(2, 64, speculate=True)
    assert main(["serve", str(DATA / "qwen2"), "--port", "0", "--speculate"]) == 1
    assert "expected one with an MTP head" in capsys.readouterr().err
