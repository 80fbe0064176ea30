"""Continuous batching: who takes part in each step, and which pages of the cache are whose.

In: jobs (a prompt and how to go on from it), submitted at any time. Out: their tokens and texts, as they come. Holds: a
job's tokens are those that it would get alone; the order of admission is that of submission.

    waiting ── admit ──> running ── ends, cancelled ──> done
       └────── evict ──────┘

A job is admitted where a slot is free and pages for its whole prompt are. In each step every running job whose tokens
are all cached but one brings that one; what is left of the step's tokens, which are fewer where some decode, goes to
prompts, first come first served.
Where a job needs a page and none is free, the job admitted last loses its pages and waits at the head of the queue:
its tokens are read again as a prompt, those that it has made as well. Pages that are full are kept and found again by
the tokens up to their end (pages.py): a job that begins as another did reads on from there.

Where the batch drafts, a job that decodes brings a draft as well, and gets two tokens where that was right: those that
it would get without.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..kernels.paged import PAGE
from .batch import SHARED_CHUNK, Fed, Known, Paged, Pick
from .errors import ModelError
from .load import Loaded
from .pages import Pages
from .runs import pages_for
from .sampling import CANDIDATES, Sampling
from .stops import StopStrings
from .tokenizer import TextStream


class Job:
    """A prompt that is gone on from.

    tokens: those made so far, without one that ended it. ending: "" while it runs, then as Generation has it ("end",
    "stop", "length", "context"), or "cancelled" or "failed". told(piece, job): called by the thread of `Scheduler.step`
    for every token, and once with ending set; piece is text, perhaps "". first_at: of time.monotonic, when its first
    token was made.
    """

    def __init__(
        self, prompt: Sequence[int], limit: int, sampling: Sampling, stop: Sequence[str] = (),
        told: Callable[[str, Job], None] = lambda piece, job: None,
    ) -> None:
        """Raises ModelError for a setting that cannot be."""
        if not len(prompt):
            raise ModelError("the tokens", "none", "at least one", "give a prompt")
        if limit < 1:
            raise ModelError("the number of tokens", str(limit), "at least 1")
        sampling.check()
        self.prompt = list(prompt)
        self.limit = limit
        self.sampling = sampling
        self.told = told
        self.tokens: list[int] = []
        self.ending = ""
        self.cancelled = False
        self.first_at = 0.0
        self.slot = -1
        self.fed = 0
        self.pages: list[int] = []
        self.chain: list[int] = []
        self.draft: int | None = None
        self.stops = StopStrings(stop)
        self.random = sampling.draws()
        self.stream: TextStream | None = None

    @property
    def length(self) -> int:
        """Tokens in all, of which `fed` are in the cache."""
        return len(self.prompt) + len(self.tokens)

    def all_tokens(self, start: int, stop: int) -> list[int]:
        """The tokens of prompt and answer from a position to another."""
        count = len(self.prompt)
        return self.prompt[start:stop] + self.tokens[max(start - count, 0) : max(stop - count, 0)]


class Drawn(NamedTuple):
    """A token that a job gets in a step, behind a row. drafted: behind a draft, so only if that was right."""

    job: Job
    row: int
    drafted: bool = False


class Scheduler:
    """Runs jobs on a batch, for one thread; others may set `Job.cancelled`.

    waiting, running: jobs. evictions, steps, tokens_fed, tokens_made, tokens_shared, drafted, accepted: counts since
    the beginning; tokens_shared of those that were not fed, as pages held them.
    """

    def __init__(self, model: Loaded, batch: Paged) -> None:
        self.model = model
        self.batch = batch
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.evictions = self.steps = self.tokens_fed = self.tokens_made = self.tokens_shared = 0
        self.drafted = self.accepted = 0
        self._slots = list(range(batch.slots))[::-1]
        self._pages = Pages(batch.pages)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def free_pages(self) -> int:
        return self._pages.free

    def submit(self, job: Job) -> None:
        """Raises ModelError as `check` does."""
        self.check(job)
        self.waiting.append(job)

    def check(self, job: Job) -> None:
        """Raises ModelError for a prompt that does not fit, or a top_k larger than a batch can."""
        if len(job.prompt) >= self.batch.context:
            raise ModelError("the prompt", f"{len(job.prompt)} tokens", f"fewer than {self.batch.context}, the context",
                             "take a shorter prompt, or a larger context")
        wrong = next((token for token in job.prompt if not 0 <= token < self.batch.vocabulary), None)
        if wrong is not None:
            raise ModelError("the tokens", f"{wrong}", f"numbers from 0 to {self.batch.vocabulary - 1}")
        if job.sampling.temperature > 0 and job.sampling.top_k > CANDIDATES:
            raise ModelError("sampling", f"top_k {job.sampling.top_k}", f"at most {CANDIDATES}")

    def step(self) -> bool:
        """Run one step; False if there was nothing to do."""
        self._drop_cancelled()
        self._admit()
        fed, drawn = self._plan()
        if not fed:
            return False
        states, rows = [], []
        for job, row, _ in drawn:
            states.append(job.random.state)
            rows.append(Pick(row, job.sampling, job.random.random()))
        picked = self.batch.step(fed, rows)
        self.steps += 1
        self.tokens_fed += len(fed)
        for job in self.running:
            self._remember_pages(job)
        for (job, _, drafted), state, token in zip(drawn, states, picked, strict=True):
            if not drafted:
                self._take(job, token)
            elif job.ending or job.tokens[-1] != job.draft:
                job.random.state = state  # as if it had not been drawn
            else:
                self.accepted += 1
                job.fed += 1
                self._take(job, token)
        if self.batch.tokens_of_a_slot > 1:
            self._foresee(fed)
        return True

    def _foresee(self, fed: Sequence[Fed]) -> None:
        """The head's rows of what was fed, where the token behind is known, and the next drafts."""
        jobs = {job.slot: job for job in self.running}
        rows: list[Known] = []
        drafting: list[tuple[Job, int]] = []
        for row, (_, slot, position) in enumerate(fed):
            job = jobs.get(slot)
            if job is None or position >= job.fed:  # It ended, or this was a draft, and wrong.
                continue
            if position + 1 == job.fed == job.length - 1:
                drafting.append((job, len(rows)))
            rows.append(Known(row, job.all_tokens(position + 1, position + 2)[0], slot, position))
        if rows:
            drafts = self.batch.foresee(rows, [row for _, row in drafting])
            for (job, _), draft in zip(drafting, drafts, strict=True):
                job.draft = draft

    def fail(self, jobs: Sequence[Job] | None = None) -> None:
        """End all jobs, as the batch cannot go on."""
        for job in jobs if jobs is not None else [*self.running, *self.waiting]:
            self._end(job, "failed")
        self.waiting.clear()

    # ---- parts of a step

    def _drop_cancelled(self) -> None:
        for job in [job for job in self.running if job.cancelled]:
            self._end(job, "cancelled")
        for job in [job for job in self.waiting if job.cancelled]:
            self.waiting.remove(job)
            self._end(job, "cancelled")

    def _admit(self) -> None:
        while self.waiting and self._slots:
            job = self.waiting[0]
            count = pages_for(job.length)
            # The last token is fed in any case, for its logits.
            found = self._pages.find(job.all_tokens(0, (job.length - 1) // PAGE * PAGE))
            if not self._pages.have(count - len(found), found):
                return
            self.waiting.popleft()
            job.slot = self._slots.pop()
            for page, node in found:
                self._pages.share(page)
                self._put_page(job, page)
                job.chain.append(node)
            job.fed = len(found) * PAGE
            self.tokens_shared += job.fed
            self._give_pages(job, count)
            self.running.append(job)

    def _put_page(self, job: Job, page: int) -> None:
        self.batch.table[job.slot, len(job.pages)] = page
        job.pages.append(page)

    def _give_pages(self, job: Job, count: int) -> None:
        while len(job.pages) < count:
            self._put_page(job, self._pages.take())

    def _remember_pages(self, job: Job) -> None:
        """Pages that are full now can be found from now on."""
        while (len(job.chain) + 1) * PAGE <= job.fed:
            number = len(job.chain)
            tokens = job.all_tokens(number * PAGE, (number + 1) * PAGE)
            job.chain.append(self._pages.remember(job.pages[number], job.chain[-1] if job.chain else 0, tokens))

    def _take_back(self, job: Job) -> None:
        self.running.remove(job)
        self._slots.append(job.slot)
        for page in reversed(job.pages):
            self._pages.give_back(page)
        job.slot, job.fed, job.pages, job.chain, job.draft = -1, 0, [], [], None

    def _evict(self) -> Job:
        job = self.running[-1]
        self._take_back(job)
        self.waiting.appendleft(job)
        self.evictions += 1
        return job

    def _plan(self) -> tuple[list[Fed], list[Drawn]]:
        """The tokens of this step, and which jobs get one after which row."""
        for job in list(self.running):  # Pages for all of a job's tokens; the prompts' are there since admission.
            while job.slot >= 0 and len(job.pages) < pages_for(job.length):
                if self._pages.free:
                    self._give_pages(job, len(job.pages) + 1)
                else:
                    self._evict()
        for job in self.running:  # For drafts, what is left.
            if job.draft is not None and (
                    job.length == self.batch.context or len(job.tokens) + 1 >= job.limit
                    or (len(job.pages) < pages_for(job.length + 1) and not self._pages.free)):
                job.draft = None
            elif job.draft is not None:
                self._give_pages(job, pages_for(job.length + 1))
        fed: list[Fed] = []
        drawn: list[Drawn] = []
        decoding = [job for job in self.running if job.length - job.fed == 1]
        reading = [job for job in self.running if job.length - job.fed > 1]
        left = max(SHARED_CHUNK, self.batch.picks) if decoding else self.batch.chunk
        for job in decoding + reading:  # For those that decode there is always room: a step has that of all slots.
            count = min(job.length - job.fed, left)
            if count <= 0:
                break
            for position, token in enumerate(job.all_tokens(job.fed, job.fed + count), job.fed):
                fed.append(Fed(token, job.slot, position))
            job.fed += count
            left -= count
            if job.fed == job.length:
                drawn.append(Drawn(job, len(fed) - 1))
                if job.draft is not None:
                    drawn.append(Drawn(job, len(fed), drafted=True))
                    fed.append(Fed(job.draft, job.slot, job.length))
                    self.drafted += 1
                    left -= 1
        return fed, drawn

    def _take(self, job: Job, token: int) -> None:
        """A job's next token."""
        if job.stream is None:
            job.stream = TextStream(self.model.tokenizer)
        if not job.first_at:
            job.first_at = time.monotonic()
        if token in self.model.tokenizer.stops:
            self._end(job, "end")
            return
        job.tokens.append(token)
        self.tokens_made += 1
        piece = job.stops.push(job.stream.push(token))
        if job.stops.met:
            self._end(job, "stop", piece)
        elif len(job.tokens) == job.limit:
            self._end(job, "length", piece)
        elif job.length > self.batch.context:
            self._end(job, "context", piece)
        else:
            job.told(piece, job)

    def _end(self, job: Job, ending: str, piece: str = "") -> None:
        if job.slot >= 0:
            self._take_back(job)
        if job.stream is not None:
            piece += job.stops.push(job.stream.finish()) + job.stops.finish()
        job.ending = ending
        job.told(piece, job)
