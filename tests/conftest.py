"""For the whole suite: verified IR, a cache of its own for every test, and examples that are the same in every run.

Hypothesis runs under one of three profiles (`--hypothesis-profile=NAME`):

    suite    the default: the same examples each time; a failure is shown as it was found, so that the time is bounded
    shrink   the same examples, a failure reduced: to look at one that the suite found
    fuzz     other examples in each run, failures reduced and kept in .hypothesis: the default where SAPPER_FUZZ is set
    seek     other examples in each run (the same for one --hypothesis-seed), failures shown as they were found

`SAPPER_FUZZ=20` draws twenty times as many examples; reducing takes long, so add `-o faulthandler_timeout=0`.

A test that hangs is ended, with the stack of every thread, by `faulthandler_timeout` (pyproject.toml); the runner then
names it as failed and goes on.
"""

from __future__ import annotations

import gc
import itertools
import os
import signal
from collections.abc import Generator, Iterator
from functools import partial
from zlib import crc32

import pytest
from hypothesis import HealthCheck, Phase, settings

from sapper.codegen.compile import compile_lane
from sapper.lang import kernel as lang_kernel
from sapper.runtime.program import all_shared
from sapper.runtime.settings import available_cpus
from tests.strategies import FUZZ

os.environ.setdefault("SAPPER_VERIFY", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background so, and so would every program that a test interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

lang_kernel.KEPT_IRS = 1000
"""Many tests ask for the tile IR of the same kernel, among them those of the whole library."""

_common = settings(deadline=None, suppress_health_check=list(HealthCheck))
_same = settings(_common, derandomize=True, database=None)
settings.register_profile("suite", _same, phases=[Phase.explicit, Phase.generate])
settings.register_profile("shrink", _same)
settings.register_profile("fuzz", _common, print_blob=True)
settings.register_profile("seek", _common, database=None, phases=[Phase.explicit, Phase.generate])
settings.load_profile("fuzz" if FUZZ else "suite")

_numbers = itertools.count()


@pytest.hookimpl(trylast=True)  # of what -k leaves
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of sampled tests a part of their cases. Long tests first: what is left for the end is short, and no worker waits
    for another."""
    left_out = set() if FUZZ else _left_out(items)
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = sorted((item for item in items if item not in left_out),
                      key=lambda item: item.get_closest_marker("long") is None)


def _left_out(items: list[pytest.Item]) -> set[pytest.Item]:
    """All but every n-th case of tests marked `sampled(n)`, mixed by a digest of their names: the same in each run."""
    cases: dict[tuple[str, int], list[pytest.Item]] = {}
    for item in items:
        marker = item.get_closest_marker("sampled")
        if marker is not None:
            cases.setdefault((item.nodeid.partition("[")[0], marker.args[0]), []).append(item)
    return {item for (_, step), alike in cases.items()
            for place, item in enumerate(sorted(alike, key=lambda item: crc32(item.nodeid.encode()))) if place % step}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Modules and tests stay: looking for garbage among them takes a quarter of the time of collecting."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """What collecting tests made stays to the end: garbage collection need not walk it again and again (a sixth of
    the time of compiling)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture
def all_share() -> Iterator[None]:
    """Workers share launches of programs that are so short that one of them would do all: most are in tests."""
    with all_shared():
        yield


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache for this run of the suite, which all its processes share: entries are found by what they were made of."""
    base = tmp_path_factory.getbasetemp()
    return str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared-cache")


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, shared_cache: str) -> Iterator[str]:
    """The directory of the tests' own caches. What fixtures of a whole module compile goes to the shared one."""
    directory = str(tmp_path_factory.mktemp("caches"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SAPPER_CACHE_DIR", shared_cache)
        environment.setenv("SAPPER_TEST_SHARED", shared_cache)
        # Python started by tests compiles sapper once, also where nothing may be written beside the sources.
        environment.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        environment.setenv("PYTHONPYCACHEPREFIX", f"{shared_cache}-bytecode")
        yield directory


@pytest.fixture(autouse=True)
def own_cache(caches: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels of a test are kept in a directory that no other test and no user sees."""
    monkeypatch.setenv("SAPPER_CACHE_DIR", os.path.join(caches, str(next(_numbers))))


@pytest.fixture
def proved_code(shared_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls run code of which the allocation is proved by the independent checker. It is made once for all tests that
    ask for this, whichever comes first."""
    monkeypatch.setenv("SAPPER_CACHE_DIR", f"{shared_cache}-proved")
    monkeypatch.setattr("sapper.codegen.compile.compile_lane", partial(compile_lane, checked=True))


@pytest.fixture
def share_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many threads by default as there are cores for each process of the runner. Threads that meet at barriers,
    hundreds of times for a token of a model, wait there for those that another process keeps off their core."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    monkeypatch.setenv("SAPPER_THREADS", str(max(1, available_cpus() // processes)))
