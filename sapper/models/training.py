"""What training is but for the architecture: how much each step changes, which tokens it sees, what is left in the end.

In: a checkpoint, the tokens of a text. Out: `Recipe`, `batches`, and `write_trained`, a directory that `load_model`
reads. Holds: the same seed gives the same batches; a run that goes on from a directory with the state of the optimiser
does what one without a break would have done, to the last bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..ahead.draws import Draws
from ..runtime.system import available_bytes
from .adapted import Lora
from .adapter import write_adapter
from .checkpoint import Checkpoint, Entry
from .errors import ModelError
from .grouped import SETTINGS
from .load import ARCHITECTURES
from .safetensors_file import read_tensors
from .written import OWN, Piece, write_directory

Array = np.ndarray[Any, np.dtype[Any]]
STATE = "training.safetensors"
"""Beside a model: what AdamW knows of each of its tensors, NAME.mean and NAME.square, and how many steps there were."""
STEPS = "steps"
PADDING = "padding."
"""How names begin of what lies between tensors."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), its gradient clipped by its norm.

    rate: of learning, which rises over the first `warmup` steps and falls along half a cosine to `least` of itself at
    the last of `steps`. decay: of matrices, not of vectors. clip: the largest norm. balance: by how much a step moves
    the bias by which a DeepSeek-V3 chooses experts, towards those that got fewer tokens than others.
    """

    steps: int
    rate: float = 1e-4
    warmup: int = 10
    least: float = 0.1
    decay: float = 0.1
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    balance: float = 0.0

    def rate_of(self, number: int) -> float:
        """Of a step, from 1 on."""
        if number <= self.warmup:
            return self.rate * number / self.warmup
        done = (number - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (self.least + (1.0 - self.least) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0))))


USUAL_STEPS, LENGTH = 100, 512
"""Of a program; tokens of a sequence, unless the model has fewer positions."""
VALIDATED = 64
"""Most sequences of a text that a model is measured by."""


def windows(tokens: Array, length: int) -> Array:
    """Where each sequence of a text begins. Raises ModelError for a text that is too short."""
    count = (len(tokens) - 1) // length
    if count < 1:
        raise ModelError("the text", f"{len(tokens)} tokens", f"at least {length + 1}, a sequence and what follows it",
                         "take a longer text, or shorter sequences")
    return np.arange(count) * length


def batches(tokens: Array, sequences: int, length: int, seed: int) -> Iterator[tuple[Array, Array]]:
    """Tokens and what follows each of them, [sequences, length], without end: windows of the text, in another order
    each time that all were seen. Raises ModelError for a text that is too short."""
    starts = windows(tokens, length)
    draws = Draws(seed)
    waiting = starts[:0]
    while True:
        while len(waiting) < sequences:
            waiting = np.concatenate([waiting, starts[draws.order(len(starts))]])
        places = waiting[:sequences, None] + np.arange(length)
        waiting = waiting[sequences:]
        yield tokens[places], tokens[places + 1]


class Trained(Protocol):
    """A tensor that is trained: its numbers, those of AdamW's means and squares, in f32 as the file has them."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def read(self) -> Array: ...

    def write(self, source: Array) -> None: ...


class Training(Protocol):
    """A model in training. sequences, length: of the tokens of a step. tensors, their gradients of the last step, means
    and squares: by the names of the file. lora: the adapters that learn, None where all weights do."""

    checkpoint: Checkpoint
    config: Any
    lora: Lora | None
    sequences: int
    length: int
    vocabulary: int

    @property
    def tensors(self) -> Mapping[str, Trained]: ...

    @property
    def gradients(self) -> Mapping[str, Trained]: ...

    @property
    def means(self) -> Mapping[str, Trained]: ...

    @property
    def squares(self) -> Mapping[str, Trained]: ...

    def step(self, tokens: Array, targets: Array, recipe: Recipe, number: int) -> tuple[float, float]:
        """The loss and the norm of its gradient, before the weights are changed. number: of the step, from 1 on."""

    def pieces(self, kind: str = "weights", ending: str = "", laid_out: bool = False) -> list[Piece]:
        """What a file is to have of these, each name with an ending. laid_out: as they lie in memory."""

    def loss_of(self, tokens: Array, targets: Array) -> float:
        """The loss, without a change."""


def check_room(wanted_bytes: int, what: str = "16 bytes a weight") -> None:
    """Raises ModelError where the system has no memory for so much: it would end the process once it is touched."""
    there = available_bytes()
    if there is not None and wanted_bytes > there:
        raise ModelError("memory", f"{there / 2**30:.1f} GiB that are free",
                         f"{wanted_bytes / 2**30:.1f} GiB: {what}, and what layers keep of each token",
                         "take fewer tokens for a step, a smaller model, or end other programs")


def start(checkpoint: Checkpoint, sequences: int = 1, length: int | None = None, *, threads: int | None = None,
          interpret: bool = False, lora: Lora | None = None, base: str | None = None) -> Training:
    """A checkpoint in training. length: None for LENGTH, or all positions of a model that has fewer. lora: adapters
    that learn in place of all weights. base: what matrices are held in beside them, f32 or bf16; None for bf16 where
    that is what the file has. Raises ModelError for an architecture that can't be trained, for a broken file, and where
    memory is short."""
    package = ARCHITECTURES.get(checkpoint.architecture)
    if package is None:
        raise ModelError(checkpoint.where, f"a model of {checkpoint.architecture or 'no architecture'}",
                         "a Llama, a Mistral, a Qwen or a DeepSeek", "train such a model")
    trainer = import_module(f"{__package__}.{package}.training").Trainer
    made: Training = trainer(checkpoint, sequences, length, threads=threads, interpret=interpret, lora=lora,
                             base=base or ("bf16" if lora is not None and _is_bf16(checkpoint) else "f32"))
    return made


def _is_bf16(checkpoint: Checkpoint) -> bool:
    """Whether bf16 holds every matrix of a file as it is."""
    matrices = [entry for entry in checkpoint.tensors.values() if len(entry.shape) > 1]
    return all("BF16" in (getattr(entry, "type", ""), getattr(entry, "format", "")) for entry in matrices)


@dataclass(frozen=True, slots=True)
class Step:
    """number: from 1 on. loss, norm: see Training.step. seconds: it took."""

    number: int
    loss: float
    norm: float
    seconds: float


def steps(training: Training, recipe: Recipe, tokens: Array, *, seed: int = 0, done: int = 0) -> Iterator[Step]:
    """Train on a text, a step at a time, as far as the recipe goes. done: steps before. Raises ModelError as `batches`
    does, and for a step that leaves no numbers to go on from."""
    following = batches(tokens, training.sequences, training.length, seed)
    for number, (some, targets) in enumerate(islice(following, recipe.steps), 1):
        if number > done:
            started = time.perf_counter()
            loss, norm = training.step(some, targets, recipe, number)
            if not math.isfinite(loss + norm):
                raise ModelError(f"step {number}", f"a loss of {loss:g} with a gradient of norm {norm:g}",
                                 "finite numbers", "train with a lower rate, from the model or the last saved step")
            yield Step(number, loss, norm, time.perf_counter() - started)


def mean_loss(training: Training, tokens: Array) -> float:
    """Of the first VALIDATED sequences of a text. Raises ModelError for one that is too short."""
    starts = windows(tokens, training.length)[:VALIDATED]
    total = 0.0
    for first in range(0, len(starts), training.sequences):
        some = starts[first : first + training.sequences]
        places = np.resize(some, training.sequences)[:, None] + np.arange(training.length)
        targets = tokens[places + 1]
        targets[len(some) :] = -1
        total += training.loss_of(tokens[places], targets) * len(some)
    return total / len(starts)


def resume(training: Training, folder: Path | None = None) -> int:
    """Take up the state of the optimiser that lies beside the checkpoint, or the adapter: after how many steps. folder:
    of the adapter. Raises ModelError."""
    path = (folder or training.checkpoint.path) / STATE
    if not path.is_file():
        raise ModelError(path, "nothing", "the state of a training that was saved on its way",
                         "go on from a directory that --save-every made, or start anew without --resume")
    state = read_tensors(path)
    for kind, tensors in (("mean", training.means), ("square", training.squares)):
        for name, tensor in tensors.items():
            tensor.write(_entry(path, state, f"{name}.{kind}", tensor.shape).read())
    done = float(_entry(path, state, STEPS, (1,)).read()[0])
    if not (done >= 1.0 and done.is_integer()):
        raise ModelError(f"{path}, tensor {STEPS}", f"{done:g}", "a whole number from 1 on",
                         "start anew without --resume")
    return int(done)


def _entry(path: Path, state: Mapping[str, Entry], name: str, shape: tuple[int, ...]) -> Entry:
    entry = state.get(name)
    if entry is None or entry.shape != shape:
        raise ModelError(f"{path}, tensor {name}", "nothing" if entry is None else f"shape {entry.shape}",
                         f"a tensor of shape {shape}", "start anew without --resume")
    return entry


def write_trained(
    training: Training, target: Path, *, steps: int | None = None,
    report: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> None:
    """The model as it is now, in f32, as a new directory, or its adapters. steps: with the state of the optimiser,
    after so many. Raises ModelError as write_directory does."""
    beside = {} if steps is None else {STATE: state_pieces(training, steps)}
    if training.lora is not None:
        write_adapter(training, target, beside)
        return
    write_directory(training.checkpoint, target, config_of(training.checkpoint), model_pieces(training), beside=beside,
                    report=report)


def model_pieces(training: Training, laid_out: bool = False) -> list[Piece]:
    """The tensors that are trained, then the others of the checkpoint. laid_out: see Training.pieces."""
    others = {name: entry for name, entry in training.checkpoint.tensors.items()
              if name not in training.tensors and not name.startswith(PADDING)}
    return [*training.pieces(laid_out=laid_out), *(piece_of(name, entry) for name, entry in others.items())]


def padding(number: int, size_bytes: int, ending: str = "") -> list[Piece]:
    """The tensor that lies between others, if there is to be one; numbers tell them apart."""
    if not size_bytes:
        return []
    shape = (size_bytes // 4,)
    return [Piece("padding", ((f"{PADDING}{number}{ending}", "F32", shape),), lambda: (bytes(size_bytes),))]


def state_pieces(training: Training, steps: int, laid_out: bool = False) -> list[Piece]:
    """What `resume` reads."""
    done = Piece(STEPS, ((STEPS, "F64", (1,)),), lambda: (np.array([float(steps)]),))
    return [done, *training.pieces("means", ".mean", laid_out), *training.pieces("squares", ".square", laid_out)]


def config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What config.json says of a checkpoint whose tensors are f32."""
    return dict(OWN) if checkpoint.gguf else {
        **{key: value for key, value in checkpoint.metadata.items() if key not in (SETTINGS, "torch_dtype")},
        "dtype": "float32"}


def piece_of(name: str, tensor: Trained | Entry) -> Piece:
    """A tensor in f32."""
    return Piece(name, ((name, "F32", tensor.shape),), lambda: (np.ascontiguousarray(tensor.read()).data,))
