"""Adapters of low rank as files, as PEFT has them, and models with an adapter merged into their matrices.

In: a directory with `adapter_config.json` and `adapter_model.safetensors`. Out: `Adapter`; `with_adapter`, a checkpoint
whose tensors are W + scale * B A where the adapter has them; `write_adapter`. Holds: what an adapter has that is not
LoRA on plain matrices is refused by its name, and so is an adapter of another model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .adapted import MAX_RANK, Lora, module_of
from .checkpoint import Checkpoint, Entry
from .errors import ModelError
from .load import ARCHITECTURES
from .numbers import Numbers
from .safetensors_file import TensorEntry, read_json, read_tensors
from .written import Piece, write_files

if TYPE_CHECKING:
    from .training import Training

Array = np.ndarray[Any, np.dtype[Any]]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
READ = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias",
        "init_lora_weights")
WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "runtime_config",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size",
    "ensure_weight_tying", "velora_config")
"""What is of training, or says which tensors there are, which is read off these."""
CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How init_lora_weights begins where the matrices were changed before the first step: their adapters are of these."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A [rank, in], B [out, rank], of a matrix that gets scale * B A."""

    down: TensorEntry
    up: TensorEntry
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """pairs: by the name of the matrix, as models publish it. config: adapter_config.json."""

    path: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, Pair]


def tensor_names(matrix: str) -> tuple[str, str]:
    """Of A and B, of a matrix of that name."""
    return tuple(f"{PREFIX}{matrix.removesuffix('.weight')}{ending}" for ending in (DOWN, UP))  # type: ignore[return-value]


# ---- reading


def read_adapter(path: Path) -> Adapter:
    """Raises ModelError for files that are missing or broken, and for what is not LoRA of plain matrices."""
    if not (path / CONFIG).is_file():
        raise ModelError(path, f"no {CONFIG}", "a directory with an adapter, as sapper train --lora or PEFT writes it",
                         "check the path")
    config, where = read_json(path / CONFIG), str(path / CONFIG)
    _check(config, where)
    numbers = Numbers(where, config)
    rank = numbers.whole("r", MAX_RANK)
    alpha = numbers.real("lora_alpha", 0.0, 1e6)
    stable = numbers.flag("use_rslora", False)
    ranks, alphas = (_patterns(config, key, where) for key in ("rank_pattern", "alpha_pattern"))
    tensors = read_tensors(path / WEIGHTS)
    pairs = {}
    for name, entry in tensors.items():
        module = name.removeprefix(PREFIX).removesuffix(DOWN).removesuffix(UP)
        if name not in tensor_names(module):
            raise ModelError(f"{path / WEIGHTS}, tensor {name}", "a tensor that is no A or B of a matrix",
                             f"names as {PREFIX}MODULE{DOWN}", "take an adapter of LoRA on matrices alone")
        if name.endswith(UP):
            continue
        own = _of(ranks, module, rank)
        if type(own) is not int or not 1 <= own <= MAX_RANK:
            raise ModelError(f"{where}, key rank_pattern", repr(own)[:80], f"whole numbers from 1 to {MAX_RANK}")
        scale = _of(alphas, module, alpha) / (math.sqrt(own) if stable else own)
        up = tensors.get(tensor_names(module)[1])
        shapes = entry.shape, None if up is None else up.shape
        if up is None or len(entry.shape) != 2 or len(up.shape) != 2 or entry.shape[0] != own or up.shape[1] != own:
            raise ModelError(f"{path / WEIGHTS}, matrix {module}", f"A of shape {shapes[0]}, B of shape {shapes[1]}",
                             f"a rank of {own} of both, as {CONFIG} says", "get the adapter again")
        pairs[f"{module}.weight"] = Pair(entry, up, scale)
    alone = [name for name in tensors if name.endswith(UP) and f"{name[len(PREFIX):-len(UP)]}.weight" not in pairs]
    if alone or not pairs:
        raise ModelError(f"{path / WEIGHTS}{', tensor ' + alone[0] if alone else ''}",
                         "B without an A" if alone else "no tensors", "A and B of each matrix", "get the adapter again")
    return Adapter(path, config, pairs)


def _check(config: Mapping[str, Any], where: str) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{where}, key peft_type", repr(config.get("peft_type"))[:80], "'LORA'",
                         "take an adapter of that kind")
    begun = config.get("init_lora_weights", True)
    wrong = {key: config[key] for key, usual in (("bias", "none"), ("fan_in_fan_out", False))
             if config.get(key, usual) != usual}
    if isinstance(begun, str) and begun.lower().startswith(CHANGED):
        wrong["init_lora_weights"] = begun
    wrong |= {key: value for key, value in config.items() if value and key not in (*READ, *WITHOUT_EFFECT)}
    for key, value in wrong.items():
        raise ModelError(f"{where}, key {key}", repr(value)[:80], "an adapter without, of LoRA on matrices alone",
                         "merge it with PEFT, and take the merged model")


def _patterns(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, dict) or not all(type(value) in (int, float) for value in found.values()):
        raise ModelError(f"{where}, key {key}", repr(found)[:80], "an object: a pattern of names -> a number")
    for pattern in found:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ModelError(f"{where}, key {key}", f"{pattern!r}: {error}", "regular expressions") from None
    return found


def _of(patterns: Mapping[str, Any], module: str, usual: Any) -> Any:
    """The number of the first pattern that is the end of a module's name, or all of it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return usual


# ---- merging


@dataclass(frozen=True, slots=True)
class MergedEntry:
    """A tensor W + scale * B A. place: how it has the rows of the matrix as that was published."""

    base: Entry
    pair: Pair
    place: Callable[[Array], Array]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.shape)    # it is not what the file has

    def read(self) -> Array:
        added = (np.float32(self.pair.scale) * self.pair.up.read()) @ self.pair.down.read()
        merged: Array = self.base.read() + self.place(added)
        return merged


def with_adapter(checkpoint: Checkpoint, path: str | Path) -> Checkpoint:
    """A checkpoint with an adapter in its matrices. Raises ModelError as read_adapter does, and where the adapter is
    that of another model."""
    adapter = read_adapter(Path(path))
    package = ARCHITECTURES.get(checkpoint.architecture)
    if package is None:
        raise ModelError(checkpoint.where, f"a model of {checkpoint.architecture or 'no architecture'}",
                         f"one of {', '.join(ARCHITECTURES)}", "take a model of such an architecture")
    weights, configs = (import_module(f"{__package__}.{package}.{part}") for part in ("weights", "config"))
    config = (configs.from_gguf if checkpoint.gguf else configs.from_json)(checkpoint.metadata, checkpoint.where)
    roles = {name: role for role, name in weights.PUBLISHED.items() if name}
    own = weights.GGUF_NAMES if checkpoint.gguf else weights.PUBLISHED
    merged = {}
    for published, pair in adapter.pairs.items():
        role, numbers = roles.get(re.sub(r"\d+", "{}", published)), re.findall(r"\d+", published)
        places = {} if role is None else weights.in_file(checkpoint, config, role)
        for part, place in places.items():
            name = own.get(part, "").format(*numbers)
            entry = checkpoint.tensors.get(name)
            if entry is None:
                places = {}
                break
            merged[name] = MergedEntry(entry, pair, place)
            _check_shape(checkpoint, adapter, published, merged[name])
        if not places:
            raise _other_model(checkpoint, adapter, published, f"no such matrix in {checkpoint.path.name}",
                               "an adapter of this model")
    return replace(checkpoint, tensors={**checkpoint.tensors, **merged})


def _check_shape(checkpoint: Checkpoint, adapter: Adapter, published: str, entry: MergedEntry) -> None:
    rows, columns = entry.pair.up.shape[0], entry.pair.down.shape[1]
    try:
        shape = entry.place(np.broadcast_to(np.float32(), (rows, columns))).shape
    except (IndexError, ValueError):    # rows that are no such matrix'
        shape = rows, columns
    if shape != entry.shape:
        raise _other_model(checkpoint, adapter, published, f"B A of shape {(rows, columns)}",
                           f"shape {entry.shape}, as {checkpoint.path.name} has it")


def _other_model(checkpoint: Checkpoint, adapter: Adapter, matrix: str, found: str, expected: str) -> ModelError:
    return ModelError(f"{adapter.path / WEIGHTS}, matrix {matrix}", found, expected,
                      f"take the model that {CONFIG} names: {adapter.config.get('base_model_name_or_path')!r}")


# ---- training


def lora_of(adapter: Adapter) -> Lora:
    """What training goes on with. Raises ModelError for ranks or factors that differ."""
    numbers = Numbers(str(adapter.path / CONFIG), adapter.config)
    rank = numbers.whole("r", MAX_RANK)
    made = Lora(rank, numbers.real("lora_alpha", 0.0, 1e6), tuple(dict.fromkeys(map(module_of, adapter.pairs))),
                numbers.flag("use_rslora", False))
    for name, pair in adapter.pairs.items():
        if pair.down.shape[0] != rank or pair.scale != made.scale:
            raise ModelError(f"{adapter.path / CONFIG}, matrix {name}",
                             f"a rank of {pair.down.shape[0]} and a factor of {pair.scale:g}",
                             f"{rank} and {made.scale:g}, those of all", "train an adapter of one rank")
    return made


def take_up(training: Training, adapter: Adapter) -> None:
    """The numbers of an adapter in place of those that were drawn. Raises ModelError where it has others."""
    read = {name: entry for matrix, pair in adapter.pairs.items()
            for name, entry in zip(tensor_names(matrix), (pair.down, pair.up), strict=True)}
    for name in {**training.tensors, **read}:
        wanted, found = training.tensors.get(name), read.get(name)
        if wanted is None or found is None or wanted.shape != found.shape:
            raise ModelError(f"{adapter.path / WEIGHTS}, tensor {name}",
                             "nothing" if found is None else f"shape {found.shape}",
                             "nothing" if wanted is None else f"shape {wanted.shape}",
                             "take the model that the adapter is of")
        wanted.write(found.read())


def config_of(lora: Lora, training: Training) -> dict[str, Any]:
    """adapter_config.json."""
    experts = training.config.mixture is not None
    matrices = [name[len(PREFIX) : -len(DOWN)] for name in training.tensors if name.endswith(DOWN)]
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(training.checkpoint.path),
        "r": lora.rank, "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        # Where there are experts, whose matrices may have the same last names, each is named in full.
        "target_modules": matrices if experts else sorted(lora.modules), "use_rslora": lora.stable,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
        "inference_mode": True, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "use_dora": False,
    }


def write_adapter(training: Training, target: Path, beside: Mapping[str, Sequence[Piece]]) -> None:
    """Write it as a new directory, with further safetensors files. Raises ModelError as write_directory does."""
    lora = training.lora
    assert lora is not None
    text = json.dumps(config_of(lora, training), indent=2, ensure_ascii=False).encode()
    write_files(target, {CONFIG: text}, {WEIGHTS: training.pieces(), **beside})


def merge(checkpoint: Checkpoint, path: str | Path, target: Path, *, dtype: str = "f32",
          report: Callable[[int, int, str], None] = lambda done, total, name: None) -> tuple[int, int]:
    """Write a checkpoint with an adapter in its matrices as a directory: how many have one, and the bytes of all
    tensors. dtype: of matrices, f32 or bf16. Raises ModelError as with_adapter and write_directory do."""
    from .training import config_of as config_f32
    from .weights import DTYPES
    from .written import check_new, write_directory

    check_new(target)
    whole = with_adapter(checkpoint, path)
    named = {"f32": "F32", "bf16": "BF16"}

    def piece(name: str, entry: Entry) -> Piece:
        own = dtype if len(entry.shape) > 1 else "f32"
        return Piece(name, ((name, named[own], entry.shape),),
                     lambda: (np.ascontiguousarray(entry.read().astype(DTYPES[own], copy=False)).view(np.uint8).data,))

    config = config_f32(whole)
    if not checkpoint.gguf and dtype == "bf16":
        config["dtype"] = "bfloat16"
    size = write_directory(whole, target, config, [piece(*one) for one in whole.tensors.items()], report=report)
    return sum(isinstance(entry, MergedEntry) for entry in whole.tensors.values()), size
