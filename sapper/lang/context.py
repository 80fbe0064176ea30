"""Who gives the surface functions (sapper/lang/builtins.py) their meaning while a kernel's Python runs.

Compiling never runs a kernel's function: it reads its source. When the function does run, under the reference
interpreter, a context object is current; `exp(x)` in the kernel calls `current().exp(x)`, and so on, method names
being the function names. Beside those methods a context has

    dim(name) -> int    the extent of a symbolic dimension in this call

This module also holds the hook through which a called kernel reaches the runtime, which `lang` may not import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

CURRENT: ContextVar[Any] = ContextVar("sapper_context", default=None)
"""The context object of this call, or None outside one."""


def current() -> Any:
    """The context object of this call, or None outside one."""
    return CURRENT.get()


@contextmanager
def use(context: Any) -> Iterator[Any]:
    """Make a context current for the body of a `with`."""
    token = CURRENT.set(context)
    try:
        yield context
    finally:
        CURRENT.reset(token)


make_launcher: Callable[[Any], Callable[..., Any]] | None = None
"""Given a Kernel, returns what runs when the kernel is called with its arguments. Set by sapper/__init__.py."""

emulate: Callable[..., Any] | None = None
"""Runs a kernel for a GPU on the emulator, which comes after the runtime. Set by sapper/__init__.py."""

features_of: Callable[[str, str, str], frozenset[str]] | None = None
"""The features that a kernel by hand asks for: (family, features, who). Raises ValueError for what no target has.
Likewise."""

verify_by_hand: Callable[..., int] | None = None
"""Compares a kernel by hand for a GPU with the kernel, on the emulator: (kernel, its code, target). Likewise."""
