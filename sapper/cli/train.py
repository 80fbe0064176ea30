"""`sapper train`: a model goes on learning from a text.

In: a model and a text. Out: a directory that every command takes; a summary on stdout, or one JSON object; progress on
stderr. Holds: the directory is there as a whole or not at all, whatever ends the command; raises ModelError and
CommandError for a user's mistakes, before the first step where they can be told.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from .errors import CommandError


def run_train(
    model: str, text: str, out: str, *, recipe: dict[str, Any], sequences: int, length: int | None, seed: int,
    validate: str | None, save_every: int | None, resume: bool, threads: int | None, rank: int | None = None,
    alpha: float | None = None, modules: str = "all", base: str | None = None, adapter: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The figures. recipe: the fields of models.training.Recipe. length: of a sequence, as `start` has it. validate: a
    text whose loss is measured before and after. rank, alpha, modules, base: of adapters that learn in place of all
    weights; adapter: a directory with one to go on with."""
    try:
        import numpy as np

        from ..models import adapter as adapters
        from ..models import training as trainings
        from ..models.checkpoint import open_checkpoint
        from ..models.written import check_new
    except ImportError as error:
        raise CommandError(f"{error}; mend: pip install 'sapper[models]'") from None
    plan = trainings.Recipe(**recipe)
    saves = range(save_every, plan.steps, save_every) if save_every else range(0)
    for place in (out, *(f"{out}.step-{number}" for number in saves)):
        check_new(Path(place))
    texts = [_read(name) for name in (text, validate) if name is not None]
    started = time.perf_counter()
    checkpoint = open_checkpoint(model)
    taken = None if adapter is None else adapters.read_adapter(Path(adapter))
    lora = _lora(rank, alpha, modules, seed) if taken is None else adapters.lora_of(taken)
    training = trainings.start(checkpoint, sequences, length, threads=threads, lora=lora, base=base)
    if taken is not None:
        adapters.take_up(training, taken)
    tokenizer = checkpoint.tokenizer(training.vocabulary)
    tokens, *kept_back = (np.array(tokenizer.encode(one), np.int32) for one in texts)
    for one in (tokens, *kept_back):
        trainings.windows(one, training.length)
    done = trainings.resume(training, None if adapter is None else Path(adapter)) if resume else 0
    if done >= plan.steps:
        raise CommandError(f"--steps: found {plan.steps}; expected more than {done}, which were done before", 2)
    facts: dict[str, Any] = {
        "model": model, "text": text, "out": out, "steps": plan.steps, "done_before": done, "sequences": sequences,
        "length": training.length, "text_tokens": len(tokens),
    }
    if training.lora is not None:
        facts |= {"rank": training.lora.rank, "alpha": training.lora.alpha, "modules": list(training.lora.modules),
                  "trained": sum(tensor.nbytes // 4 for tensor in training.tensors.values())}
    before = [trainings.mean_loss(training, one) for one in kept_back]
    losses, times = [], []
    line = _Line(progress, plan.steps, done, sequences * training.length)
    for step in trainings.steps(training, plan, tokens, seed=seed, done=done):
        losses.append(step.loss)
        times.append(step.seconds)
        line.show(step)
        if step.number in saves:
            trainings.write_trained(training, Path(f"{out}.step-{step.number}"), steps=step.number)
    facts |= {"first_loss": losses[0], "last_loss": losses[-1],
              "tokens_per_second": round(sequences * training.length / median(times), 1)}
    for one, loss in zip(kept_back, before, strict=True):
        facts |= {"validation_before": loss, "validation_after": trainings.mean_loss(training, one)}
    trainings.write_trained(training, Path(out))
    return {**facts, "seconds": round(time.perf_counter() - started, 3)}


def _lora(rank: int | None, alpha: float | None, modules: str, seed: int) -> Any:
    """New adapters, if there are to be any."""
    from ..models.adapted import Lora

    if rank is None:
        return None
    named = () if modules == "all" else tuple(dict.fromkeys(modules.split(",")))
    return Lora(rank, 2.0 * rank if alpha is None else alpha, named, seed=seed)


class _Line:
    """How far it is, after each step, in one line of a terminal; elsewhere a line every five seconds."""

    def __init__(self, progress: bool, total: int, done: int, tokens: int) -> None:
        self._progress, self._total, self._done, self._tokens = progress, total, done, tokens
        self._live = progress and sys.stderr.isatty()
        self._started = self._last = time.perf_counter()

    def show(self, step: Any) -> None:
        now, ends = time.perf_counter(), step.number == self._total
        if not self._progress or not (self._live or ends or now - self._last >= 5.0 or step.number == self._done + 1):
            return
        self._last = now
        left = (now - self._started) / (step.number - self._done) * (self._total - step.number)
        text = (f"step {step.number} of {self._total}: loss {step.loss:.4f}, norm {step.norm:.2f}, "
                f"{self._tokens / step.seconds:.0f} tokens/s, {left:.0f} s left")
        print(f"\r{text:<78}" if self._live else text, end="" if self._live and not ends else "\n", file=sys.stderr,
              flush=True)


def _read(name: str) -> str:
    try:
        return Path(name).read_bytes().decode()     # line ends stay as they are
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or error
        raise CommandError(f"{name}: found {found}; expected a text file in UTF-8; mend: check the path") from None
