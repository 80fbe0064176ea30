"""Emulators of foreign targets. For NVIDIA: PTX text on NumPy (`load`, see launch.py). For 64-bit Arm: machine code on
Unicorn (arm.py)."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from .counters import Counters
from .errors import ConvergenceError, DeadlockError, EmulationError, MemoryFault, ParseError, RaceError
from .kernel import run
from .launch import Module, Result, Uninitialised, load
from .machine import Options
from .tensor_map import TensorMap

CODE_RUNNERS = {"aarch64": ("arm", "unicorn", "arm")}
"""Family -> the module here that runs its machine code on another processor, the package that it needs, the extra that
brings that."""


def code_runner(family: str) -> tuple[Callable[..., None] | None, str]:
    """What runs machine code of a family (see `arm.run_compiled`), and the mend where a package is missing for it."""
    if family not in CODE_RUNNERS:
        return None, ""
    module, package, extra = CODE_RUNNERS[family]
    if find_spec(package) is None:
        return None, f"pip install 'sapper[{extra}]', whose emulator runs such code"
    runner: Callable[..., None] = import_module(f".{module}", __name__).run_compiled
    return runner, ""


__all__ = ["ConvergenceError", "Counters", "DeadlockError", "EmulationError", "MemoryFault", "Module", "Options",
           "ParseError", "RaceError", "Result", "TensorMap", "Uninitialised", "code_runner", "load", "run"]
