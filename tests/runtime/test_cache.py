"""The disk cache: whole entries or none, whatever happens to the files, the disk or the processes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sapper.runtime import cache as module
from sapper.runtime import errors
from sapper.runtime.cache import DiskCache, disk_cache, toolchain_key
from sapper.runtime.errors import LaunchError, SapperWarning

LIMIT = 1 << 20


@pytest.fixture(autouse=True)
def forget_warnings() -> Iterator[None]:
    errors._warned.clear()
    yield
    errors._warned.clear()


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(str(tmp_path / "deep" / "cache"), LIMIT)


def test_put_and_get(cache: DiskCache) -> None:
    assert cache.get("key") is None
    assert cache.put("key", b"payload") and cache.put(b"other", b"")
    assert cache.get("key") == b"payload" and cache.get(b"other") == b""
    assert cache.put("key", b"new") and cache.get("key") == b"new"
    assert len(cache.entries()) == 2
    assert cache.total_bytes() == sum(e.size_bytes for e in cache.entries()) == 2 * 80 + 3
    assert cache.clear() == 2 and cache.entries() == [] and cache.get("key") is None
    assert os.listdir(cache.directory) == []


def damaged(cache: DiskCache, content: bytes, warned: bool) -> None:
    """A damaged entry is no entry, is dropped, and can be written anew."""
    path = cache.path("key")
    Path(path).write_bytes(content)
    if warned:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once in a process
            assert cache.get("key") is None
    else:
        with pytest.warns(SapperWarning, match="damaged"):
            assert cache.get("key") is None
    assert not os.path.exists(path)
    assert cache.put("key", b"payload") and cache.get("key") == b"payload"


def test_truncation_at_every_length(cache: DiskCache) -> None:
    cache.put("key", b"payload")
    whole = Path(cache.path("key")).read_bytes()
    for length in range(len(whole)):
        damaged(cache, whole[:length], warned=length > 0)


def test_every_byte_changed(cache: DiskCache) -> None:
    cache.put("key", b"payload")
    whole = Path(cache.path("key")).read_bytes()
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 0x10
        damaged(cache, bytes(changed), warned=position > 0)


def test_garbage_and_foreign_entries(cache: DiskCache) -> None:
    cache.put("key", b"payload")
    cache.put("other", b"payload")
    damaged(cache, os.urandom(300), warned=False)
    damaged(cache, Path(cache.path("key")).read_bytes() + b"x", warned=True)
    damaged(cache, Path(cache.path("other")).read_bytes(), warned=True)  # a sound entry of another key


def test_least_recently_used_entries_go_first(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), limit_bytes=10_000)
    now = time.time()
    for i in range(9):
        cache.put(f"key {i}", bytes(1000))
        os.utime(cache.path(f"key {i}"), (now, now - 1000 + i))
    assert cache.evict() == 0
    assert cache.get("key 0") is not None  # used just now
    cache.put("key 9", bytes(1000))
    assert cache.evict() == 3
    assert cache.total_bytes() <= 8_000
    assert [i for i in range(10) if cache.get(f"key {i}") is None] == [1, 2, 3]
    assert [e.path for e in cache.entries()][-1] == cache.path("key 4") or cache.entries()


def test_writing_evicts_by_itself(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), limit_bytes=20_000)
    for i in range(100):
        cache.put(f"key {i}", bytes(1000))
    assert cache.total_bytes() < 20_000 + 32 * 1080


def test_strays_of_killed_writers_are_removed_after_a_while(cache: DiskCache) -> None:
    cache.put("key", b"payload")
    old, fresh = (Path(cache.directory) / f".writing-{n}" for n in ("1-old", "2-fresh"))
    old.write_bytes(b"part")
    fresh.write_bytes(b"part")
    os.utime(old, (0, 0))
    foreign = Path(cache.directory) / "README"
    foreign.write_text("not ours")
    cache.evict()
    assert not old.exists() and fresh.exists() and foreign.exists()
    cache.clear()
    assert not fresh.exists() and foreign.exists()


@pytest.mark.parametrize("call", ["write", "open", "replace"])
def test_full_disk_works_without_cache_and_says_so_once(
    cache: DiskCache, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*arguments: Any, **keywords: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    os.makedirs(cache.directory)
    monkeypatch.setattr(module.os, call, full)
    with pytest.warns(SapperWarning, match="No space left"):
        assert not cache.put("key", b"payload")
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cache.put("key", b"payload")
        assert cache.get("key") is None
    assert os.listdir(cache.directory) == []


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = DiskCache(str(tmp_path / "file"), LIMIT)
    with pytest.warns(SapperWarning, match="compile cache"):
        assert cache.get("key") is None
        assert not cache.put("key", b"payload")
    assert cache.entries() == [] and cache.clear() == 0


def test_read_only_directory(cache: DiskCache) -> None:
    cache.put("key", b"payload")
    if os.geteuid() == 0:
        # Permission bits don't bind the superuser; a directory of /proc takes no files from anyone.
        with pytest.warns(SapperWarning, match="can't write"):
            assert not DiskCache("/proc/self", LIMIT).put("key", b"payload")
        return
    os.chmod(cache.directory, 0o500)
    with pytest.warns(SapperWarning, match="can't write"):
        assert not cache.put("new", b"payload")
    assert cache.get("key") == b"payload"
    os.chmod(cache.directory, 0o700)


RACER = """
import select
import sys
from sapper.runtime.cache import DiskCache
cache = DiskCache(sys.argv[1], 1 << 22)
payloads = [bytes([n]) * (30000 + 50000 * n) for n in range(8)]
print("ready", flush=True)
sys.stdin.readline()
told, turn = False, 0
while not select.select([sys.stdin], [], [], 0)[0]:
    for n in range(8):
        found = cache.get(f"key {n}")
        assert found is None or found == payloads[n], "torn entry"
        if found is not None and not told:
            told = True
            print("found an entry", flush=True)
        assert cache.put(f"key {n}", payloads[n])
    turn += 1
    if turn % 10 == 9:
        cache.clear()
"""


def racer(directory: Path) -> subprocess.Popen[str]:
    """A process that waits for a line, then uses the cache until its standard input says more, or ends."""
    command = [sys.executable, "-W", "error", "-c", RACER, str(directory)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_processes_racing(tmp_path: Path) -> None:
    """Three processes write, read and clear the same entries: each sees whole ones only, and no warning."""
    processes = [racer(tmp_path) for _ in range(3)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "found an entry\n"
    time.sleep(0.5)  # of a race of all three
    assert [process.poll() for process in processes] == [None] * 3
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0, 0, 0]


SUICIDE = """
import os
import signal
import sys
from sapper.runtime import cache as module
real = {name: getattr(os, name) for name in ("open", "write", "close", "replace")}
calls, last = 0, int(sys.argv[2])

def dying(name):
    def call(*arguments, **keywords):
        global calls
        calls += 1
        if calls == last and name == "write":
            real[name](arguments[0], bytes(arguments[1])[:100])  # so much was written of it
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return real[name](*arguments, **keywords)
    return call

for name in real:
    setattr(os, name, dying(name))
module.DiskCache(sys.argv[1], 1 << 22).put("key", b"new" * 1000)
"""


def test_a_writer_killed_at_any_step_leaves_the_old_entry_or_the_new(tmp_path: Path) -> None:
    """kill -9 at each call of the system that a write makes, and in the middle of writing."""
    seen = []
    for step in range(1, 20):
        cache = DiskCache(str(tmp_path), LIMIT)
        assert cache.put("key", b"old" * 2000)
        done = subprocess.run([sys.executable, "-S", "-c", SUICIDE, str(tmp_path), str(step)], check=False,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            seen.append(cache.get("key"))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    assert step > 4, "every call was passed alive too early"
    assert set(seen[:-1]) <= {b"old" * 2000, b"new" * 1000} and seen[-1] == b"new" * 1000
    assert len(os.listdir(tmp_path)) > 1, "no stray file: no writer was killed while it wrote"


def test_a_cache_that_is_cleared_during_a_write_is_written_again(cache: DiskCache,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process's `clear` takes the temporary file away, too."""
    replace, cleared = os.replace, []

    def clear_first(source: str, target: str) -> None:
        if len(cleared) < 3:
            cleared.append(DiskCache(cache.directory, LIMIT).clear())
            assert not os.path.exists(source)
        replace(source, target)

    monkeypatch.setattr(module.os, "replace", clear_first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.put("key", b"payload") and cache.get("key") == b"payload"
    assert len(cleared) == 3 and len(os.listdir(cache.directory)) == 1


def test_killed_writers_leave_no_bad_entry(tmp_path: Path) -> None:
    for attempt in range(6):
        process = racer(tmp_path)
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        time.sleep(0.01 + 0.007 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()
    cache = DiskCache(str(tmp_path), LIMIT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in range(8):
            assert cache.get(f"key {n}") in (None, bytes([n]) * (30000 + 50000 * n))
            assert cache.put(f"key {n}", b"anew") and cache.get(f"key {n}") == b"anew"


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPPER_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SAPPER_CACHE_MIB", "3")
    chosen = disk_cache()
    assert chosen is not None and (chosen.directory, chosen.limit_bytes) == (str(tmp_path), 3 << 20)
    assert disk_cache() is chosen
    monkeypatch.setenv("SAPPER_CACHE_DIR", "off")
    assert disk_cache() is None
    monkeypatch.delenv("SAPPER_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    chosen = disk_cache()
    assert chosen is not None and chosen.directory == str(tmp_path / "xdg" / "sapper")
    monkeypatch.setenv("SAPPER_CACHE_MIB", "lots")
    with pytest.raises(LaunchError, match="SAPPER_CACHE_MIB"):
        disk_cache()


def test_loading_an_entry_takes_less_than_a_millisecond(cache: DiskCache) -> None:
    cache.put("key", os.urandom(20_000))
    times = []
    for _ in range(20):
        start = time.perf_counter()
        assert cache.get("key") is not None
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3


def test_toolchain_key_covers_the_compiler() -> None:
    assert "/codegen/encode.py" in toolchain_key() and "/targets/x86_64/instructions.py" in toolchain_key()
    assert "/runtime/compiled.py" in toolchain_key() and "/__init__.py" in toolchain_key()


def test_toolchain_key_leaves_out_what_may_not_be_imported_by_the_compiler() -> None:
    table = Path(__file__).parents[2].joinpath("docs", "layers.md").read_text(encoding="utf-8")
    layers = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(layers[layers.index("runtime") + 1 :]) == module._USERS_OF_THE_COMPILER
    for layer in layers:
        assert (f"\n/{layer}/" in toolchain_key()) == (layer not in module._USERS_OF_THE_COMPILER)


FIRST_CALL = """
import sys
import numpy
from sapper.kernels.add import vector_add
before = set(sys.modules)
a, out = numpy.ones(16, numpy.float32), numpy.zeros(16, numpy.float32)
vector_add(a, a, out)
assert (out == 2).all()
print(*sorted(name for name in set(sys.modules) - before if name.startswith("sapper.")))
"""


def test_a_first_call_from_disk_loads_no_compiler_and_no_pool(tmp_path: Path) -> None:
    def loaded() -> list[str]:
        done = subprocess.run([sys.executable, "-c", FIRST_CALL], env={**os.environ, "SAPPER_CACHE_DIR": str(tmp_path)},
                              capture_output=True, text=True, check=True, timeout=100)
        return done.stdout.split()

    assert "sapper.codegen.encode" in loaded()
    assert loaded() == [
        "sapper.ir.scratch", "sapper.lang.digest", "sapper.runtime", "sapper.runtime.arguments",
        "sapper.runtime.buffers", "sapper.runtime.cache", "sapper.runtime.compiled", "sapper.runtime.dtypes",
        "sapper.runtime.entries", "sapper.runtime.errors", "sapper.runtime.fast_call",
        "sapper.runtime.launch", "sapper.runtime.loader", "sapper.runtime.scratch", "sapper.runtime.settings",
        "sapper.runtime.specialise", "sapper.runtime.system", "sapper.runtime.tuned",
        "sapper.runtime.vectorcall", "sapper.targets", "sapper.targets.plain", "sapper.targets.x86_64",
        "sapper.targets.x86_64.detect", "sapper.targets.x86_64.target",
    ]
