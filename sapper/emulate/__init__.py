"""Emulators of foreign targets. For NVIDIA: PTX text on NumPy (`load`, see launch.py). For 64-bit Arm: machine code on
Unicorn (arm.py). For 64-bit RISC-V: machine code on qemu-riscv64 (riscv.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from shutil import which
from typing import Any, NamedTuple

from .counters import Counters
from .errors import ConvergenceError, DeadlockError, EmulationError, MemoryFault, ParseError, RaceError
from .kernel import run
from .launch import Module, Result, Uninitialised, load
from .machine import Options
from .tensor_map import TensorMap


class CodeRunner(NamedTuple):
    """module: the one here that runs machine code of a family on another processor, by `run_compiled`. is_there:
    whether what it needs is installed. mend: what brings that. facts: of the target, passed on by name."""

    module: str
    is_there: Callable[[], bool]
    mend: str
    facts: tuple[str, ...] = ()


CODE_RUNNERS = {
    "aarch64": CodeRunner("arm", lambda: find_spec("unicorn") is not None, "pip install 'sapper[arm]'"),
    "riscv64": CodeRunner("riscv", lambda: which("qemu-riscv64") is not None, "apt install qemu-user",
                          ("vector_bits",)),
}
"""By family."""


def code_runner(target: Any) -> tuple[Callable[..., None] | None, str]:
    """What runs machine code of a target (see `arm.run_compiled`), and the mend where something is missing for it."""
    found = CODE_RUNNERS.get(target.family)
    if found is None:
        return None, ""
    if not found.is_there():
        return None, f"{found.mend}, whose emulator runs such code"
    runner: Callable[..., None] = import_module(f".{found.module}", __name__).run_compiled
    return partial(runner, **{name: getattr(target, name) for name in found.facts}), ""


__all__ = ["ConvergenceError", "Counters", "DeadlockError", "EmulationError", "MemoryFault", "Module", "Options",
           "ParseError", "RaceError", "Result", "TensorMap", "Uninitialised", "code_runner", "load", "run"]
