"""Emulators of foreign targets. For NVIDIA: PTX text on NumPy (`load`, see launch.py). For 64-bit Arm: machine code on
Unicorn (arm.py)."""

from __future__ import annotations

from .counters import Counters
from .errors import ConvergenceError, DeadlockError, EmulationError, MemoryFault, ParseError, RaceError
from .kernel import run
from .launch import Module, Result, Uninitialised, load
from .machine import Options
from .tensor_map import TensorMap

__all__ = ["ConvergenceError", "Counters", "DeadlockError", "EmulationError", "MemoryFault", "Module", "Options",
           "ParseError", "RaceError", "Result", "TensorMap", "Uninitialised", "load", "run"]
