"""Continuous batching: what a sequence gets in company is what it gets alone; pages, eviction, cancelling, drawing."""

import random
from pathlib import Path

import numpy as np
import pytest

from sapper.kernels.paged import PAGE
from sapper.models import batch as batches
from sapper.models import scheduler as schedulers
from sapper.models.batch import CHUNK, Fed, Pick
from sapper.models.errors import ModelError
from sapper.models.generate import Generation
from sapper.models.load import Loaded, load_model
from sapper.models.sampling import CANDIDATES, Sampling
from sapper.models.scheduler import Job, Scheduler
from tests.weights import find_smollm2

from . import small

DATA = Path(__file__).parent / "data"
GREEDY = Sampling()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    return load_model(small.write_gguf(path, small.random_weights(), numbers={"llama.context_length": 320}), "f32")


@pytest.fixture(scope="module", params=["deepseek_v2_lite", "deepseek_v3", "deepseek_v32", "qwen2", "qwen3"])
def checkpoint(request: pytest.FixtureRequest) -> Loaded:
    return load_model(DATA / request.param, "f32")


def prompts(model: Loaded, *sizes: int) -> list[list[int]]:
    draw = np.random.default_rng(len(sizes))
    return [[int(n) for n in draw.integers(0, model.tokenizer.size, size)] for size in sizes]


def alone(model: Loaded, prompt: list[int], limit: int, **options) -> Generation:
    made = Generation(model, prompt, limit, **options)
    made.text = "".join(made)
    return made


def run_all(scheduler: Scheduler) -> int:
    steps = 0
    while scheduler.step():
        steps += 1
        assert steps < 5000
    assert scheduler.idle and scheduler.free_pages == scheduler.batch.pages
    return steps


def test_logits_are_those_of_a_session(model: Loaded) -> None:
    batch = model.batch(3, 200)
    batch.table[...] = np.random.default_rng(0).permutation(12).reshape(3, 4)
    one, other = prompts(model, 150, 9)
    fed = [Fed(token, 2, i) for i, token in enumerate(one)] + [Fed(token, 0, i) for i, token in enumerate(other)]
    batch.step(fed, [Pick(len(fed) - 1, GREEDY, 0.0), Pick(149, GREEDY, 0.0)])
    for row, prompt in enumerate((other, one)):
        session = model.session(200)
        session.feed(prompt)
        np.testing.assert_allclose(batch.step_logits[row], session.logits, rtol=1e-4, atol=1e-4)


def test_tokens_of_a_step_may_come_in_any_order(model: Loaded) -> None:
    batch = model.batch(2, 100)
    batch.table[...] = [[0, 1], [2, 3]]
    fed = [Fed(token, 1, i) for i, token in enumerate(prompts(model, 70)[0])]
    first = batch.step(fed, [Pick(69, GREEDY, 0.0)])
    logits = batch.step_logits[0].copy()
    order = random.Random(0).sample(range(70), 70)
    assert batch.step([fed[i] for i in order], [Pick(order.index(69), GREEDY, 0.0)]) == first
    # A row's sum is made in another order where it lies in another block of rows.
    np.testing.assert_allclose(batch.step_logits[0], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "form", "tolerance"), [
    ("qwen2", "f32", 1e-4), ("qwen3", "f32", 1e-4), ("qwen3_moe", "f32", 1e-4), ("deepseek_v2_lite", "f32", 1e-4),
    ("deepseek_v2_lite", "bf16", 1e-4),
    ("qwen2", "bf16", 2.0**-5),  # Queries that attend together are rounded to bf16, those that attend alone are not.
])
def test_pieces_of_prompts_attend_as_a_session_does(name: str, form: str, tolerance: float) -> None:
    """Steps of pieces of three prompts, in any order, with tokens that attend alone between them."""
    model = load_model(DATA / name, form)
    draw = np.random.default_rng(3)
    lengths = (150, 90, 41)
    batch = model.batch(3, 200)
    batch.table[...] = draw.permutation(12).reshape(3, 4)
    texts = prompts(model, *lengths)
    fed = [0, 0, 0]
    while any(at < length for at, length in zip(fed, lengths, strict=True)):
        step: list[Fed] = []
        for slot in draw.permutation(3):
            stop = min(fed[slot] + int(draw.choice([1, 7, 40, 64])), lengths[slot])
            step += [Fed(texts[slot][at], int(slot), at) for at in range(fed[slot], stop)]
            fed[slot] = stop
        ends = [row for row, token in enumerate(step) if token.position == lengths[token.slot] - 1]
        batch.step(step, [Pick(row, GREEDY, 0.0) for row in ends])
        for row, logits in zip(ends, batch.step_logits, strict=False):
            session = model.session(200)
            session.feed(texts[step[row].slot])
            np.testing.assert_allclose(logits, session.logits, rtol=tolerance, atol=tolerance)


def test_greedy_tokens_in_company_are_those_of_each_alone(model: Loaded) -> None:
    """Jobs come while others run, prompts are longer than a step takes."""
    scheduler = Scheduler(model, model.batch(3))
    jobs = [Job(prompt, limit, GREEDY) for prompt, limit in zip(
        prompts(model, 5, 300, 1, 80, 40, 17), (40, 15, 60, 30, 1, 25), strict=True)]
    pieces: dict[int, list[str]] = {}
    for number, job in enumerate(jobs):
        job.told = lambda piece, job, number=number: pieces.setdefault(number, []).append(piece)
    waiting = list(jobs)
    while waiting or not scheduler.idle:
        if waiting:
            scheduler.submit(waiting.pop(0))
        scheduler.step()
    assert scheduler.evictions == 0
    for number, job in enumerate(jobs):
        wanted = alone(model, job.prompt, job.limit)
        assert (job.tokens, job.ending) == (wanted.tokens, wanted.stop)
        assert "".join(pieces[number]) == wanted.text


def test_a_prompt_takes_a_part_of_each_step_where_others_decode(model: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "CHUNK", 90)
    monkeypatch.setattr(schedulers, "SHARED_CHUNK", 30)
    scheduler = Scheduler(model, model.batch(2))
    first, second = (Job(prompt, 20, GREEDY) for prompt in prompts(model, 100, 70))
    fed = []
    for job in (first, None, second, None, None, None):
        if job is not None:
            scheduler.submit(job)
        before = scheduler.tokens_fed
        scheduler.step()
        fed.append(scheduler.tokens_fed - before)
    assert fed == [90, 10, 30, 30, 1 + 70 - 58, 2]
    run_all(scheduler)
    assert second.tokens == alone(model, second.prompt, 20).tokens


def test_few_tokens_go_one_by_one_where_that_is_sooner(model: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = model.batch(4, 128)
    batch.prepare()
    assert 1 <= batch._singly <= 3
    for singly in (1, 3):
        monkeypatch.setattr(batch, "_singly", singly)
        scheduler = Scheduler(model, batch)
        jobs = [Job(prompt, 20, GREEDY) for prompt in prompts(model, 6, 3, 9, 2)]
        for job in jobs:
            scheduler.submit(job)
        run_all(scheduler)
        for job in jobs:
            assert job.tokens == alone(model, job.prompt, 20).tokens


@pytest.mark.parametrize(("few", "capacities"), [(0, {4, CHUNK}), (48, {4, 48, CHUNK})])
def test_no_request_waits_for_a_program(
    model: Loaded, monkeypatch: pytest.MonkeyPatch, few: int, capacities: set[int]
) -> None:
    """Of steps of few tokens, of more where those have a program of their own, and of as many as a step may have."""
    batch = model.batch(4, 128)
    monkeypatch.setattr(batch, "few_tokens", lambda: few)
    batch.prepare()
    assert set(batch._steps) == capacities and batch._one is not None


def test_a_full_cache_evicts_and_nothing_is_lost(model: Loaded) -> None:
    pages = -(-320 // PAGE)
    scheduler = Scheduler(model, model.batch(4, pages=pages))
    jobs = [Job(prompt, 120, GREEDY) for prompt in prompts(model, 60, 50, 40, 30)]
    for job in jobs:
        scheduler.submit(job)
    run_all(scheduler)
    assert scheduler.evictions > 0
    for job in jobs:
        wanted = alone(model, job.prompt, job.limit)
        assert (job.tokens, job.ending) == (wanted.tokens, wanted.stop)


@pytest.mark.sampled(3)
def test_architectures_agree_with_their_sessions(checkpoint: Loaded) -> None:
    scheduler = Scheduler(checkpoint, checkpoint.batch(2, 160))
    jobs = [Job(prompt, limit, GREEDY) for prompt, limit in zip(prompts(checkpoint, 3, 90, 20), (30, 10, 20),
                                                                strict=True)]
    for job in jobs:
        scheduler.submit(job)
    run_all(scheduler)
    for job in jobs:
        wanted = alone(checkpoint, job.prompt, job.limit)
        assert (job.tokens, job.ending) == (wanted.tokens, wanted.stop)


def test_the_interpreter_agrees(model: Loaded) -> None:
    scheduler = Scheduler(model, model.batch(2, 80, interpret=True))
    jobs = [Job(prompt, 3, GREEDY) for prompt in prompts(model, 2, 5)]
    for job in jobs:
        scheduler.submit(job)
    run_all(scheduler)
    for job in jobs:
        assert job.tokens == alone(model, job.prompt, 3).tokens


def test_draws_depend_on_the_seed_and_not_on_the_company(model: Loaded) -> None:
    def tokens(*settings: Sampling) -> list[list[int]]:
        scheduler = Scheduler(model, model.batch(4, 128))
        jobs = [Job([5, 17, 200], 12, one) for one in settings]
        for job in jobs:
            scheduler.submit(job)
        run_all(scheduler)
        return [job.tokens for job in jobs]

    hot, other, sharp = Sampling(1.5, 50, 0.9, 0.01, 1), Sampling(1.5, 50, 0.9, 0.01, 2), Sampling(5.0, 1, seed=3)
    together = tokens(hot, other, GREEDY, sharp)
    assert together[0] == tokens(hot)[0] and together[0] != together[1] and together[2] == together[3]
    wanted = alone(model, [5, 17, 200], 12, temperature=1.5, top_k=50, top_p=0.9, min_p=0.01, seed=1)
    assert together[0] == wanted.tokens
    assert alone(model, [5, 17, 200], 12, temperature=3.0, min_p=1.0).tokens == together[2]
    assert alone(model, [5, 17, 200], 12, temperature=3.0, top_p=1e-6).tokens == together[2]


def test_a_cancelled_job_gives_its_place_back(model: Loaded) -> None:
    scheduler = Scheduler(model, model.batch(1, 128))
    running, waiting, last = (Job([7], 100, GREEDY) for _ in range(3))
    for job in (running, waiting, last):
        scheduler.submit(job)
    for _ in range(3):
        scheduler.step()
    running.cancelled = waiting.cancelled = True
    run_all(scheduler)
    assert running.ending == waiting.ending == "cancelled" and 0 < len(running.tokens) <= 3 and not waiting.tokens
    assert last.ending and last.tokens == alone(model, [7], 100).tokens


def test_what_does_not_fit_is_refused(model: Loaded) -> None:
    scheduler = Scheduler(model, model.batch(1, 64))
    for job, message in ((Job([1] * 64, 1, GREEDY), "fewer than 64"), (Job([-1], 1, GREEDY), "numbers from 0"),
                         (Job([1], 1, Sampling(1.0, CANDIDATES + 1)), "top_k")):
        with pytest.raises(ModelError, match=message):
            scheduler.submit(job)
    for make, message in ((lambda: Job([], 1, GREEDY), "none"), (lambda: Job([1], 0, GREEDY), "at least 1"),
                          (lambda: Job([1], 1, Sampling(-1.0)), "temperature"),
                          (lambda: model.batch(0), "1 to"), (lambda: model.batch(2, 128, 1), "2 at least")):
        with pytest.raises(ModelError, match=message):
            make()


def test_a_context_that_is_full_ends_the_answer(model: Loaded) -> None:
    scheduler = Scheduler(model, model.batch(1, 66))
    job = Job(prompts(model, 60)[0], 100, GREEDY)
    scheduler.submit(job)
    run_all(scheduler)
    session = model.session(66)
    made = alone(model, job.prompt, 100, session=session)
    assert (job.tokens, job.ending) == (made.tokens, made.stop)


def test_smollm2_answers_several_at_once() -> None:
    """With activations in f32: in 8 bits, where a last bit may move a number by a step, programs that sum in another
    order may choose otherwise."""
    loaded = load_model(find_smollm2(), "file-f32")
    scheduler = Scheduler(loaded, loaded.batch(4, 256))
    texts = ("The capital of France is", "Once upon a time", "2 + 2 =")
    jobs = [Job(loaded.tokenizer.encode(text), 24, GREEDY) for text in texts]
    for job in jobs:
        scheduler.submit(job)
    run_all(scheduler)
    for job in jobs:
        assert job.tokens == alone(loaded, job.prompt, 24).tokens


# ---- pages that are shared


@pytest.mark.sampled(3)
def test_what_begins_alike_is_read_once(checkpoint: Loaded) -> None:
    """Jobs with one beginning, at once and one after the other: the tokens of each alone, fewer tokens fed."""
    batch = checkpoint.batch(3, 250)
    scheduler = Scheduler(checkpoint, batch)
    (beginning,) = prompts(checkpoint, 2 * PAGE + 9)
    endings = prompts(checkpoint, 5, 30, PAGE)
    scheduler.submit(Job(beginning, 3, GREEDY))
    run_all(scheduler)
    fed = scheduler.tokens_fed
    jobs = [Job(beginning + ending, 12, GREEDY) for ending in endings]
    for job in jobs:
        scheduler.submit(job)
    run_all(scheduler)
    assert scheduler.tokens_shared == 3 * 2 * PAGE
    assert scheduler.tokens_fed - fed < sum(len(job.prompt) + 12 for job in jobs) - scheduler.tokens_shared + 3
    for job in jobs:
        assert job.tokens == alone(checkpoint, job.prompt, 12).tokens
    again = Job(jobs[2].prompt, 12, GREEDY)  # all full pages are known, the last token is fed nevertheless
    scheduler.submit(again)
    run_all(scheduler)
    assert again.tokens == jobs[2].tokens


def test_any_order_of_jobs_on_few_pages(model: Loaded) -> None:
    """Random prompts that begin alike or not, more than the pages hold: evictions, idle pages taken, jobs cancelled."""
    draw = random.Random(5)
    beginnings = prompts(model, PAGE, PAGE + 20, 2 * PAGE)
    batch = model.batch(3, 250, 6)
    scheduler = Scheduler(model, batch)
    jobs = []
    for _ in range(14):
        prompt = draw.choice(beginnings) + prompts(model, draw.randrange(1, 60))[0]
        jobs.append(Job(prompt, draw.randrange(1, 30), GREEDY))
        scheduler.submit(jobs[-1])
        for _ in range(draw.randrange(12)):
            scheduler.step()
        if draw.random() < 0.2:
            draw.choice(jobs).cancelled = True
        used = [page for job in scheduler.running for page in set(job.pages)]
        assert len(set(used)) + scheduler.free_pages == batch.pages
        for job in scheduler.running:  # what is written belongs to one
            assert all(used.count(page) == 1 for page in job.pages[job.fed // PAGE :])
    run_all(scheduler)
    assert scheduler.tokens_shared > 0
    known: dict[tuple[int, ...], list[int]] = {}
    for job in jobs:
        if job.ending == "cancelled":
            continue
        wanted = known.setdefault(tuple(job.prompt), alone(model, job.prompt, 30).tokens)
        assert job.tokens == wanted[: len(job.tokens)]
