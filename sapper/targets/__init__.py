"""Targets: one folder for each family of chips, holding its facts and its instruction rows.

`target("zen4")` and `known_targets()` give facts without touching the host; `host_target()` asks the processor that
runs this process. Families are imported when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .x86_64.target import Target

FAMILIES = {"x86_64": "sapper.targets.x86_64", "ptx": "sapper.targets.ptx",
            "aarch64": "sapper.targets.aarch64", "riscv64": "sapper.targets.riscv64"}
"""The package of each family. One outside this tree enters itself: FAMILIES["reed"] = "my_chip.reed"."""


def module_of(family: str, name: str) -> Any:
    """A module of a family's package, such as "select"; docs/add-a-target.md says what each holds."""
    return import_module(f"{FAMILIES[family]}.{name}")


def has_module(family: str, name: str) -> bool:
    """Whether a family's package has a module of that name."""
    return find_spec(f"{FAMILIES[family]}.{name}") is not None


def target(name: str) -> Any:
    """The facts of the target called `name` ("v3", "zen4", "sm_80", ...). Raises KeyError that lists the known ones,
    ValueError for one whose facts contradict each other or what its family knows."""
    for family in FAMILIES:
        found = module_of(family, "target").TARGETS.get(name)
        if found is not None:
            fault = found.fault if found.name == name else f"found the name {found.name} in its row; expected {name}"
            if fault:
                raise ValueError(f"target {name}: {fault}")
            return found
    raise KeyError(f"target: found {name!r}; expected one of {', '.join(known_targets())}")


def known_targets() -> tuple[str, ...]:
    """Names of all targets, family by family."""
    return tuple(name for family in FAMILIES for name in module_of(family, "target").TARGETS)


def host_target() -> Target:
    """The target to compile for on this machine. Raises sapper.targets.x86_64.detect.UnsupportedCPU."""
    from .x86_64 import detect

    return detect.host_target()
