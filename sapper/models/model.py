"""A model, loaded: config, weights and tokenizer.

In: what an architecture's `load` found. Out: `Model`, which makes sessions. Holds: the config, the weights and the
tokenizer agree with one another. What happens at load may use NumPy's arithmetic; the forward pass may not.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .batch import Paged
    from .session import BaseSession

Config = TypeVar("Config")
Weights = TypeVar("Weights")


@dataclass(frozen=True)
class Model(Generic[Config, Weights]):
    """path: where it came from. dtype: how the matrices are held, one of FORMS. package: the architecture's, in
    sapper/models."""

    path: Path
    config: Config
    weights: Weights
    tokenizer: Tokenizer
    dtype: str
    package: str

    @property
    def positions(self) -> int:
        """The longest context."""
        config: Any = self.config
        return int(config.positions)

    @property
    def limit(self) -> str:
        """Why it is no longer."""
        return str(getattr(self.config, "limit", "all that the model can"))

    @property
    def cache_dtype(self) -> str:
        """What keys and values are held in unless a session is told otherwise."""
        return str(self._module("session").cache_dtype_of(self.dtype, self.weights))

    def session(
        self, context: int | None = None, *, cache_dtype: str | None = None, threads: int | None = None,
        interpret: bool = False, speculate: bool = False,
    ) -> BaseSession:
        """A new conversation; see BaseSession. cache_dtype: None for self.cache_dtype. speculate: draft tokens with the
        MTP head, which was loaded."""
        kind = self._module("speculative").Speculative if speculate else self._module("session").Session
        made: BaseSession = kind(self, context, cache_dtype=cache_dtype, threads=threads, interpret=interpret)
        return made

    def batch(
        self, slots: int, context: int | None = None, pages: int | None = None, *, cache_dtype: str | None = None,
        threads: int | None = None, interpret: bool = False, speculate: bool = False,
    ) -> Paged:
        """Several sequences at once; see Paged. speculate: as of a session."""
        kind = self._module("speculative_batch").SpeculativeBatch if speculate else self._module("batch").Batch
        made: Paged = kind(
            self, slots, context, pages, cache_dtype=cache_dtype, threads=threads, interpret=interpret)
        return made

    def _module(self, name: str) -> Any:
        return import_module(f"{__package__}.{self.package}.{name}")
