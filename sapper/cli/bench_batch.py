"""What `sapper bench batch` measures: several sequences through one model at once.

In: `Settings`. Out: `Row`s. Holds: a step brings one token of each of N sequences, behind BEHIND others of theirs, and
gives the next ones; it is one call of `Paged.step`. A prompt that comes while others decode goes through the scheduler,
which reads it in pieces beside their tokens. llama.cpp reads the same file; for it a step is one `llama_decode`, and a
prompt as many as its batches of PROMPT_TOKENS take.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

from .bench_models import (
    AS_IN_FILE,
    BF16,
    DECODE_TOKENS,
    DEEPSEEK,
    PROMPT_TOKENS,
    ROUNDED,
    Operations,
    is_left_out,
    loaded_as,
    prompt_tokens_of,
    quiet_llama,
    repacks_of,
    smollm2_size,
    together,
    tokens_of,
)
from .bench_suites import Row, Settings, attempt, rows_of, with_floor

SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
BEHIND = 300
"""Tokens of each sequence before those that are measured."""
BESIDE = 15
"""Sequences that decode while a prompt comes."""
CONTEXT = 1024
STEPS_S = 0.25
"""A sample of steps lasts about so long: the first ones after a peer's turn find the caches full of its data."""
ROUNDS = 5
"""Samples of each contestant, at least: there are many cases."""
SMOLLM2_FORMS, DEEPSEEK_FORMS = (BF16, BF16 + ROUNDED, AS_IN_FILE), (BF16, BF16 + ROUNDED, "Q4_0")
Fed = tuple[int, int, int, bool]
"""A token of a step: itself, its sequence, its position, and whether logits are wanted behind it."""


def batch_rows(settings: Settings) -> Iterator[list[Row]]:
    """SmolLM2-135M beside llama.cpp on its 4-bit file; and a small DeepSeek-V2 with random weights."""
    from ..models.deepseek import untrained
    from ..models.deepseek.config import from_json
    from ..models.errors import ModelError
    from ..models.llama.model import load_model

    for form in _wanted("smollm2", SMOLLM2_FORMS, settings):
        settings.report(f"loading SmolLM2, {form}")
        try:
            loaded = load_model("smollm2", loaded_as(form))
        except (ModelError, ImportError) as error:
            settings.say(f"no model to run: {error}")
            break
        yield from _of_model("smollm2", form, loaded, settings)
        for threads in settings.thread_counts:
            yield from attempt("smollm2 batch first token", settings, partial(
                _prompt_rows, form, loaded, threads, settings))
        del loaded
    for form in _wanted(DEEPSEEK, DEEPSEEK_FORMS, settings):
        settings.report(f"loading a DeepSeek with random weights, {form}")
        made = untrained.untrained(from_json(dict(untrained.SMALL_V2), "the benchmark"), loaded_as(form))
        yield from _of_model(DEEPSEEK, form, made, settings)
        del made


def _wanted(name: str, forms: Sequence[str], settings: Settings) -> list[str]:
    cases = [_step_case(name, count, settings) for count in _counts(settings)]
    if name != DEEPSEEK:  # whose random weights have no tokenizer
        cases += _prompt_cases(settings)
    if not any(settings.wants(" ".join(case)) for case in cases):
        return []
    return [form for form in forms if not is_left_out(name, form, settings)]


def _counts(settings: Settings) -> tuple[int, ...]:
    return (1, 4) if settings.quick else SEQUENCES


def _behind(settings: Settings) -> int:
    return 32 if settings.quick else BEHIND


def _step_case(name: str, count: int, settings: Settings) -> tuple[str, str]:
    """A case and its shape."""
    return f"{name} batch step", f"{count} x 1 after {_behind(settings)}"


def _prompt_cases(settings: Settings) -> list[tuple[str, str]]:
    shape = f"{prompt_tokens_of(settings)} beside {BESIDE} x 1"
    return [("smollm2 batch first token", shape), ("smollm2 batch wait", shape)]


def _of_model(name: str, form: str, model: Any, settings: Settings) -> Iterator[list[Row]]:
    for threads in settings.thread_counts:
        for count in _counts(settings):
            label = " ".join(_step_case(name, count, settings))
            if settings.wants(label):
                yield from attempt(label, settings, partial(
                    _step_rows, name, form, model, count, threads, settings))


# --------------------------------------------------------------------------------------------------------------- steps


def _step_rows(name: str, form: str, model: Any, count: int, threads: int, settings: Settings) -> list[Row]:
    behind = _behind(settings)
    case, shape = _step_case(name, count, settings)
    settings.report(f"{case} {shape}, {form}, {threads} thread{'s' * (threads > 1)}")
    batch = _batch(model, count, behind + DECODE_TOKENS, threads)
    contestants: dict[str, Callable[[], Any]] = {"sapper": steps_of(batch, behind)}
    operations = step_operations(name, form, model, count, behind)
    read_bytes = step_bytes(model, count) + count * (behind + 1) * position_bytes(batch)
    peer = _llama(name, model, count, behind + DECODE_TOKENS, threads, settings)
    try:
        if peer is not None:
            contestants["llama"] = peer.steps(behind)
        timings, peaks = with_floor(contestants, settings.peaks(threads), settings, products=tuple(operations),
                                    reads=True, sample_s=STEPS_S, rounds=ROUNDS)
    finally:
        if peer is not None:
            peer.close()
    arithmetic_s = sum(number / peaks.arithmetic(products) for products, number in operations.items())
    floor_s = max(arithmetic_s, peaks.floor_s(0, read_bytes, 0, "DRAM"))
    most = max(operations, key=lambda products: operations[products])
    return rows_of(case, form, shape, threads, timings, floor_s, count, "tokens/s", {"llama": AS_IN_FILE},
                   (sum(operations.values()), read_bytes, most))


def _batch(model: Any, slots: int, context: int, threads: int) -> Any:
    """As `sapper serve` makes it; random weights have no method for it."""
    if hasattr(model, "batch"):
        batch = model.batch(slots, context, threads=threads)
    else:
        from ..models.deepseek.batch import Batch

        batch = Batch(model, slots, context, threads=threads)
    batch.prepare()
    return batch


def steps_of(batch: Any, behind: int) -> Callable[[], Any]:
    """What runs the next step of a batch of which all slots decode, their tokens behind so many others. All have the
    same ones there, which are read once and copied: each slot has pages of its own."""
    from ..models.batch import Fed as Token
    from ..models.batch import Pick
    from ..models.sampling import Sampling

    tokens = _tokens(max(behind, batch.slots), batch.vocabulary)
    batch.table[...] = [range(first, first + batch.table.shape[1])
                        for first in range(0, batch.table.size, batch.table.shape[1])]
    for start in range(0, behind, batch.chunk):
        batch.step([Token(tokens[at], 0, at) for at in range(start, min(start + batch.chunk, behind))])
    for cache in batch.state().values():
        for pages in batch.table[1:]:
            cache[pages] = cache[batch.table[0]]
    picks = [Pick(slot, Sampling(), 0.0) for slot in range(batch.slots)]
    position = behind

    def step() -> None:
        nonlocal position
        batch.step([Token(tokens[(position + slot) % len(tokens)], slot, position) for slot in range(batch.slots)],
                   picks)
        position = position + 1 if position + 1 < batch.context else behind

    return step


def _tokens(count: int, vocabulary: int) -> list[int]:
    return [token % vocabulary for token in tokens_of(count)]


def step_operations(name: str, form: str, model: Any, count: int, behind: int) -> Operations:
    """Of a step of so many tokens, each of which sees `behind` others and itself, by what makes the products. All meet
    the matrix of the logits, and a DeepSeek's attend in the latent space."""
    from ..models.workspace import Workspace

    config, weights = model.config, model.weights
    rounded = weights.logits.rounds_rows(count, Workspace(1, 1))
    products = "bf16" if rounded else "f32" if form.startswith(BF16) else "i8"
    if name != DEEPSEEK:
        met, others, routers = smollm2_size(model), 0, 0
        of_position = 4 * config.heads * config.head_features
    else:
        others = sum(one.attention.keys.size + one.attention.values.size for one in weights.layers)
        routers = sum(one.feed_forward.router.size for one in _mixtures(model))
        met = weights.step_size - others - routers
        of_position = 2 * config.heads * (2 * config.key_rank + config.turned_features)
    return together(
        (products, 2 * count * (met + weights.logits.size)),
        *([("f32", 2 * count * routers)] if routers else []),
        (model.cache_dtype, count * (2 * others + config.layers * of_position * (behind + 1))))


def step_bytes(model: Any, count: int) -> int:
    """Of the weights that a step of so many tokens reads: of a mixture as many experts as they meet on average, if
    each takes any, all as likely."""
    size: int = model.weights.step_bytes
    for one in _mixtures(model):
        mixture = model.config.mixture
        met = mixture.experts * (1 - (1 - mixture.chosen / mixture.experts) ** count)
        size += round((met - mixture.chosen) * (one.feed_forward.gate.nbytes + one.feed_forward.up.nbytes
                                                + one.feed_forward.down.nbytes))
    return size


def position_bytes(batch: Any) -> int:
    """Of the cache, for a token of a sequence."""
    from ..kernels.paged import PAGE

    total = sum(cache.nbytes for cache in batch.state().values())
    return int(total // (batch.pages * PAGE))


def _mixtures(model: Any) -> list[Any]:
    """The layers that have experts."""
    return [one for one in model.weights.layers if hasattr(getattr(one, "feed_forward", None), "router")]


# -------------------------------------------------------------------------------------------------------------- prompts


def _prompt_rows(form: str, model: Any, threads: int, settings: Settings) -> list[Row]:
    """Of a prompt that comes while others decode: the time to its first token, and the longest step meanwhile, for
    which the others wait."""
    cases = [case for case in _prompt_cases(settings) if settings.wants(" ".join(case))]
    if not cases:
        return []
    settings.report(f"{cases[0][0]}, {form}, {threads} thread{'s' * (threads > 1)}")
    clock = thread_time if threads == 1 else perf_counter
    waits: dict[str, list[float]] = {"sapper": []}
    contestants = {"sapper": _prompts_of(model, threads, waits["sapper"], clock, settings)}
    peer = _llama("smollm2", model, BESIDE + 1, CONTEXT, threads, settings)
    try:
        if peer is not None:
            waits["llama"] = []
            contestants["llama"] = peer.prompts(_behind(settings), prompt_tokens_of(settings), waits["llama"], clock)
        timings = settings.measure(contestants, threads)
    finally:
        if peer is not None:
            peer.close()
    return _rows_of_prompt(cases, form, threads, timings, waits)


def _rows_of_prompt(cases: Sequence[tuple[str, str]], form: str, threads: int, timings: dict[str, Any],
                    waits: dict[str, list[float]]) -> list[Row]:
    from ..tune.measure import timing_of

    rows = []
    for case, shape in cases:
        found = timings if case.endswith("first token") else {
            who: timing_of(seconds, 1) for who, seconds in waits.items()}
        rows += rows_of(case, form, shape, threads, found, None, None, "ms", {"llama": AS_IN_FILE})
    return rows


def _prompts_of(model: Any, threads: int, waits: list[float], clock: Callable[[], float],
                settings: Settings) -> Callable[[], None]:
    """What submits a prompt that no page holds yet to a scheduler, and runs steps until its first token is there."""
    import numpy

    from ..models.sampling import Sampling
    from ..models.scheduler import Job, Scheduler

    tokenizer = copy.copy(model.tokenizer)
    tokenizer.stops = frozenset()  # those that decode go on
    scheduler = Scheduler(replace(model, tokenizer=tokenizer), _batch(model, BESIDE + 1, CONTEXT, threads))
    random, count = numpy.random.default_rng(0), prompt_tokens_of(settings)

    def job(tokens: int, limit: int) -> Job:
        made = Job(random.integers(100, scheduler.batch.vocabulary, tokens).tolist(), limit, Sampling())
        scheduler.submit(made)
        return made

    others = [job(_behind(settings), CONTEXT) for _ in range(BESIDE)]
    while not all(one.tokens for one in others):
        scheduler.step()

    def come() -> None:
        made, longest = job(count, 1), 0.0
        while not made.ending:
            started = clock()
            scheduler.step()
            longest = max(longest, clock() - started)
        waits.append(longest)
        if any(one.ending for one in others):
            raise RuntimeError("a sequence that was to decode has ended: CONTEXT is too short for so many rounds")

    return come


# ----------------------------------------------------------------------------------------------------------- llama.cpp


def _llama(name: str, model: Any, count: int, context: int, threads: int, settings: Settings) -> Llama | None:
    """The peer with the same file, where there is one."""
    if name == DEEPSEEK or "llama" not in settings.against:
        return None
    return Llama(model.path, count, context, threads, repacks_of(model.path, settings))


class Llama:
    """Several sequences of llama.cpp. repacks: see bench_models.llama. Raises RuntimeError where it can't."""

    def __init__(self, path: Path, count: int, context: int, threads: int, repacks: bool) -> None:
        import llama_cpp.llama_cpp as library

        self.library: Any = library
        library.llama_log_set(quiet_llama(), ctypes.c_void_p())
        library.llama_backend_init()
        wanted = library.llama_model_default_params()
        if not repacks:
            wanted.use_extra_bufts = False
        self.model: Any = library.llama_model_load_from_file(str(path).encode(), wanted)
        shape = library.llama_context_default_params()
        shape.n_ctx, shape.n_seq_max = count * (-(-context // 256) * 256), count
        shape.n_batch = shape.n_ubatch = PROMPT_TOKENS
        shape.n_threads = shape.n_threads_batch = threads
        self.context: Any = library.llama_init_from_model(self.model, shape) if self.model else None
        if not self.context:
            raise RuntimeError(f"llama.cpp could not make a context of {count} sequences of {path}")
        self.memory: Any = library.llama_get_memory(self.context)
        self.vocabulary: int = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.model))
        self.batch: Any = library.llama_batch_init(PROMPT_TOKENS, 0, 1)
        self.count = count

    def close(self) -> None:
        self.library.llama_batch_free(self.batch)
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)

    def decode(self, fed: Sequence[Fed]) -> None:
        """Run tokens, at most PROMPT_TOKENS, and wait for what they give."""
        batch = self.batch
        batch.n_tokens = len(fed)
        for row, (token, sequence, position, wanted) in enumerate(fed):
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, wanted
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        failed = self.library.llama_decode(self.context, batch)
        if failed:
            raise RuntimeError(f"llama_decode gave {failed}")
        self.library.llama_synchronize(self.context)

    def fill(self, behind: int, sequences: int) -> list[int]:
        """Let so many sequences have the same tokens; these."""
        tokens = _tokens(max(behind, self.count), self.vocabulary)
        self.decode([(tokens[at], 0, at, at == behind - 1) for at in range(behind)])
        for sequence in range(1, sequences):
            self.library.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)
        return tokens

    def steps(self, behind: int) -> Callable[[], None]:
        """As steps_of has it."""
        tokens, position = self.fill(behind, self.count), behind

        def step() -> None:
            nonlocal position
            self.decode([(tokens[(position + one) % len(tokens)], one, position, True) for one in range(self.count)])
            position += 1
            if position == behind + DECODE_TOKENS:
                position = behind
                for one in range(self.count):
                    self.library.llama_memory_seq_rm(self.memory, one, behind, -1)

        return step

    def prompts(self, behind: int, prompt_tokens: int, waits: list[float],
                clock: Callable[[], float]) -> Callable[[], None]:
        """As _prompts_of has it: the last sequence is that of the prompt."""
        others, tokens = self.count - 1, self.fill(behind, self.count - 1)
        prompt, position = _tokens(prompt_tokens, self.vocabulary), behind

        def come() -> None:
            nonlocal position
            self.library.llama_memory_seq_rm(self.memory, others, -1, -1)
            read, longest = 0, 0.0
            while read < len(prompt):
                end = min(len(prompt), read + PROMPT_TOKENS - others)
                fed = [(tokens[(position + one) % len(tokens)], one, position, True) for one in range(others)]
                fed += [(prompt[at], others, at, at == len(prompt) - 1) for at in range(read, end)]
                started = clock()
                self.decode(fed)
                longest = max(longest, clock() - started)
                read, position = end, position + 1
            waits.append(longest)

        return come
