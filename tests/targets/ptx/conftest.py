"""Of cases that the emulator can run in either of its modes each takes one, so that the suite ends in time."""

from __future__ import annotations

from zlib import crc32

import pytest

from tests.strategies.amount import FUZZ


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test with several cases, each of them eager and lazy, half are run eagerly, mixed by a digest of their
    names, and the others lazily; in a search for faults all are run in both ways."""
    cases: dict[str, dict[str, list[pytest.Item]]] = {}
    for item in items:
        name, _, parameters = item.nodeid.partition("[")
        parts = parameters.rstrip("]").split("-")
        if "tests/targets/ptx/" in name and {"eager", "lazy"}.intersection(parts):
            case = "-".join(part for part in parts if part not in ("eager", "lazy"))
            cases.setdefault(name, {}).setdefault(case, []).append(item)
    dropped: set[pytest.Item] = set()
    for modes in cases.values():
        if not FUZZ and len(modes) > 1:
            mixed = sorted(modes, key=lambda case: crc32(case.encode()))
            dropped.update(modes[case][number % 2] for number, case in enumerate(mixed) if len(modes[case]) == 2)
    if dropped:
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = [item for item in items if item not in dropped]
