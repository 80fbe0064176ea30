"""What perf and gdb are told of generated code, by reading it and by running them."""

from __future__ import annotations

import gc
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from sapper.codegen.unwind import Frame
from sapper.ir.nodes import Location
from sapper.runtime import debuggers, settings
from sapper.runtime.debuggers import Gdb, JitDump
from sapper.runtime.errors import LaunchError
from sapper.runtime.loader import load

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="runs x86-64 code")

KERNEL = """\
import numpy as np
import sapper as sp
from sapper import Tensor, f32, tiles

N = sp.dims("N")


@sp.kernel
def scale(x: Tensor[f32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = x[n] * 3.0


x, y = np.ones(100_000, np.float32), np.zeros(100_000, np.float32)
for _ in range(ROUNDS):
    scale(x, y, threads=1)
print("sum", y.sum())
"""
LINE = 1 + KERNEL.splitlines().index("        y[n] = x[n] * 3.0")
SOURCE = Location("/a/kernels.py", 8)
LINES = [(3, Location("/a/kernels.py", 10, 5)), (9, Location("/a/kernels.py", 11, 9))]
CODE = b"\x90" * 15 + b"\xc3"


def program(directory: Path, rounds: int) -> Path:
    path = directory / "user_scale.py"
    path.write_text(KERNEL.replace("ROUNDS", str(rounds)), encoding="utf-8")
    return path


def run(command: list[str], directory: Path, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(directory),
                   "SAPPER_CACHE_DIR": str(directory / "cache"), **variables}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=100)
    return done.stdout + done.stderr


def test_nothing_is_told_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SAPPER_PERF", "SAPPER_GDB"):
        monkeypatch.delenv(name, raising=False)
    assert not settings.debugging() and settings.perf() == "" and not settings.gdb()
    out = run([sys.executable, str(program(tmp_path, 1))], tmp_path)
    assert "sum 300000" in out
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(("jit", "sapper-gdb", "perf"))] == []


def test_a_wrong_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPPER_PERF", "flamegraph")
    with pytest.raises(LaunchError, match="SAPPER_PERF: found 'flamegraph'; expected map or jitdump"):
        settings.debugging()


def test_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPPER_PERF", "map")
    monkeypatch.delenv("SAPPER_GDB", raising=False)
    block = load(CODE)
    path = Path(f"/tmp/perf-{os.getpid()}.map")
    try:
        debuggers.announce("mine", block, LINES, SOURCE)
        assert path.read_text(encoding="utf-8").splitlines()[-1] == f"{block.address:x} 10 sapper:mine"
    finally:
        path.unlink()


def test_the_jitdump(tmp_path: Path) -> None:
    dump = JitDump(str(tmp_path))
    block = load(CODE)
    for name in ("first", "second"):
        dump.add(name, block, LINES, SOURCE)
    data = Path(dump.path).read_bytes()
    magic, version, head, machine, _, pid, _, flags = struct.unpack_from("<IIIIIIQQ", data)
    assert (magic, version, head, machine, pid, flags) == (0x4A695444, 1, 40, 62, os.getpid(), 0)
    records = []
    at, last = head, 0
    while at < len(data):
        kind, size_bytes, when = struct.unpack_from("<IIQ", data, at)
        assert when >= last
        last = when
        records.append((kind, data[at + 16:at + size_bytes]))
        at += size_bytes
    assert [kind for kind, _ in records] == [2, 0, 2, 0]
    assert struct.unpack_from("<QQ", records[0][1]) == (block.address, 4)
    file = b"/a/kernels.py\0"
    assert records[0][1][16:] == b"".join(
        struct.pack("<QII", block.address + offset, line, 0) + file
        for offset, line in ((0, 8), (3, 10), (9, 11), (16, 11)))
    _, _, vma, address, size_bytes, index = struct.unpack_from("<IIQQQQ", records[3][1])
    assert (vma, address, size_bytes, index) == (block.address, block.address, len(CODE), 1)
    assert records[3][1][40:] == b"sapper:second\0" + CODE


def test_the_jitdump_has_unwinding_tables_before_the_code(tmp_path: Path) -> None:
    """.eh_frame, then its index; both as perf lays them out: the code, then the table at the next multiple of 8."""
    dump = JitDump(str(tmp_path))
    block = load(CODE)
    frame = [(0, Frame()), (1, Frame(offset=16, saved=((3, 16),)))]
    dump.add("mine", block, LINES, SOURCE, frame)
    data = Path(dump.path).read_bytes()
    at, kinds, found = 40, [], b""
    while at < len(data):
        kind, size_bytes = struct.unpack_from("<II", data, at)
        kinds.append(kind)
        found = data[at + 16:at + size_bytes] if kind == 4 else found
        at += size_bytes
    assert kinds == [2, 4, 0]
    whole, index_bytes, mapped = struct.unpack_from("<QQQ", found)
    table, index = found[24:24 + whole - index_bytes], found[24 + whole - index_bytes:]
    assert mapped == 0 and len(found) == 24 + whole
    entry = 4 + struct.unpack_from("<I", table)[0]
    code_at = entry + 8 + struct.unpack_from("<i", table, entry + 8)[0]
    assert code_at == -16  # from the table back to the code, whose 16 bytes lie before it
    version, *encodings, to_table, count, to_code, to_entry = struct.unpack_from("<BBBBiIii", index)
    assert (version, encodings, count) == (1, [0x1B, 3, 0x3B], 1)
    assert (to_table + 4, to_code, to_entry) == (-len(table), -16 - len(table), entry - len(table))


def test_gdbs_list(tmp_path: Path) -> None:
    gdb = Gdb()
    blocks = [load(CODE) for _ in range(3)]
    for number, block in enumerate(blocks):
        gdb.add(f"kernel_{number}", block, LINES, SOURCE)
    found = gdb.entries()
    assert [next(n for n in range(3) if f"kernel_{n}\0".encode() in content) for _, content in found] == [2, 1, 0]
    del block, blocks[1]
    gc.collect()
    assert [at for at, _ in gdb.entries()] == [found[0][0], found[2][0]]
    del blocks[1]
    gc.collect()
    assert gdb.entries() == [found[2]]
    if shutil.which("readelf"):
        path = tmp_path / "kernel.o"
        path.write_bytes(found[2][1])
        shown = subprocess.run(["readelf", "-W", "-S", "-s", "--debug-dump=decodedline", str(path)],
                               capture_output=True, text=True, check=True)
        assert not shown.stderr and f"{blocks[0].address:016x}" in shown.stdout and "kernel_0" in shown.stdout
        assert f"{blocks[0].address + 9:#x}" in shown.stdout
    blocks.clear()
    gc.collect()
    assert gdb.entries() == []


@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")
def test_gdb_stops_at_a_python_line(tmp_path: Path) -> None:
    path = program(tmp_path, 1)
    commands = ["set breakpoint pending on", "set debuginfod enabled off", f"break {path.name}:{LINE}", "run",
                "info line *$pc", "list", "info symbol $pc", "backtrace", "continue"]
    out = run(["gdb", "-batch", "-nx", *(x for c in commands for x in ("-ex", c)), "--args", sys.executable, str(path)],
              tmp_path, SAPPER_GDB="1")
    if "ptrace" in out.lower() or "Operation not permitted" in out:
        pytest.skip("this system allows no debugger")
    assert f"scale () at {path}:{LINE}" in out, out
    assert "y[n] = x[n] * 3.0" in out and f'Line {LINE} of "{path}"' in out and "scale + " in out
    # Its caller is next, in a library or in the program; without unwinding tables gdb takes a word of the frame for it.
    assert re.search(r"#0  scale \(\) at .*\n#1  0x\w+ in .* (from|at) /", out), out
    assert re.search(r"\n#\d+ .* in _?Py\w+ ", out), out
    assert "Backtrace stopped" not in out and "corrupt stack" not in out, out


@pytest.mark.skipif(shutil.which("perf") is None, reason="perf is not installed")
def test_perf_annotates_with_the_python_line(tmp_path: Path) -> None:
    path = program(tmp_path, 20_000)
    out = run(["perf", "record", "-k", "mono", "-e", "cpu-clock", "-o", "perf.data", sys.executable, str(path)],
              tmp_path, SAPPER_PERF="jitdump")
    if not (tmp_path / "perf.data").exists() or "Captured and wrote" not in out:
        pytest.skip(f"perf can't record here: {out[-200:]}")
    run(["perf", "inject", "--jit", "-i", "perf.data", "-o", "jit.data"], tmp_path)
    assert "sapper:scale" in run(["perf", "report", "-i", "jit.data", "--stdio"], tmp_path)
    if shutil.which("objdump"):
        shown = run(["perf", "annotate", "-i", "jit.data", "--stdio", "-l", "-s", "sapper:scale"], tmp_path)
        assert f"{path.name}:{LINE}" in shown, shown


def test_what_lies_on_disk_is_passed_over(tmp_path: Path) -> None:
    """An entry of the disk cache has no lines: with a tool to tell, the kernel is compiled anew and none is written."""
    path = program(tmp_path, 1)
    run([sys.executable, str(path)], tmp_path, SAPPER_PERF="jitdump")
    (dump,) = tmp_path.glob("jit-*.dump")
    assert f"{path}\0".encode() in dump.read_bytes()
    kept = {p.name for p in (tmp_path / "cache").glob("*")} if (tmp_path / "cache").exists() else set()
    run([sys.executable, str(path)], tmp_path)
    assert {p.name for p in (tmp_path / "cache").glob("*")} > kept
    run([sys.executable, str(path)], tmp_path, SAPPER_PERF="jitdump")
    dumps = [p.read_bytes() for p in tmp_path.glob("jit-*.dump")]
    assert len(dumps) == 2 and all(f"{path}\0".encode() in content for content in dumps)
