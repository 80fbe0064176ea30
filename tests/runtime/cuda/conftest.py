"""The emulated driver, one library in a process; tests that need it are skipped without cuda-bindings and binutils.

Where a real driver is, they are skipped too, and test_device.py runs on the device, whole."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sapper.runtime.cuda import driver as found

if TYPE_CHECKING:
    from .emulated_driver import EmulatedDriver


REAL = Path("/dev/nvidiactl").exists()


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> EmulatedDriver:
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    if shutil.which("as") is None or shutil.which("ld") is None:
        pytest.skip("binutils are not installed")
    if REAL:
        pytest.skip("a real driver is here")
    from .emulated_driver import EmulatedDriver

    return EmulatedDriver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def device(library: EmulatedDriver) -> Iterator[EmulatedDriver]:
    """A fresh device of compute capability 9.0 with two processors."""
    library.reset()
    found.forget()
    gc.freeze()     # what the test leaves is collected; to walk what was there before would take longer than most tests
    yield library
    gc.collect()
    found.forget()
    assert library.failure is None, library.failure


@pytest.fixture
def any_device(request: pytest.FixtureRequest) -> EmulatedDriver | None:
    """The emulated device; None: a real one is here."""
    if REAL:
        return None
    emulated: EmulatedDriver = request.getfixturevalue("device")
    return emulated
