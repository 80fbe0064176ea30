"""Models of a few architectures, in many tests and in processes that these start: each kernel is compiled once, and
all together take the threads that there are cores for. Tests of several threads name a number; these share what one
would do of kernels so small."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def own_cache(shared_cache: str, share_of_cores: None, all_share: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of an empty cache for each test."""
    monkeypatch.setenv("SAPPER_CACHE_DIR", shared_cache)
