"""Targets: one folder for each family of chips, holding its facts and its instruction rows.

`target("zen4")` and `known_targets()` give facts without touching the host; `host_target()` asks the processor that
runs this process. Families are imported when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .x86_64.target import Target


def target(name: str) -> Target:
    """The facts of the target called `name` ("v3", "v4", "zen4", ...). Raises KeyError that lists the known ones."""
    from .x86_64 import target as facts

    return facts.target(name)


def known_targets() -> tuple[str, ...]:
    """Names of all targets."""
    from .x86_64 import target as facts

    return facts.known_targets()


def host_target() -> Target:
    """The target to compile for on this machine. Raises sapper.targets.x86_64.detect.UnsupportedCPU."""
    from .x86_64 import detect

    return detect.host_target()
