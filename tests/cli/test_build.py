"""`sapper build` from the command line: files, names, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
import subprocess
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapper import x86
from sapper.assembly.override import Override, compile_by_hand
from sapper.cli import files
from sapper.cli.errors import CommandError
from sapper.cli.files import write_files
from sapper.cli.kernels import import_file
from sapper.cli.main import main
from sapper.codegen.library import Form, c_kernel, make_library
from sapper.runtime.by_hand import judged
from sapper.targets import module_of
from sapper.targets.x86_64.target import target
from tests.codegen.c_caller import Loaded, in_child
from tests.codegen.run_native import RUNNABLE

from . import by_hand

KERNELS = '''
import sapper as sp
from sapper import Tensor, f32, tiles

M, N = sp.dims("M N")


@sp.kernel
def scale(x: Tensor[f32, M, N], factor: f32, y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = x[m, n] * factor


@sp.kernel
def shift(x: Tensor[f32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = x[n] + 1.0
'''


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "user_build.py"
    path.write_text(KERNELS, encoding="utf-8")
    return str(path)


def build(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["build", *arguments, "--target", "v3"])
    return status, *capsys.readouterr()


def test_a_file_becomes_a_library(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = build(capsys, file, "-o", str(tmp_path / "libk.so"))
    assert status == 0 and not err and "scale: 2 forms (contiguous, strided)" in out and "declared in" in out
    header = (tmp_path / "libk.h").read_text(encoding="utf-8")
    assert "int scale(const float *x" in header and "int shift(" in header
    assert (tmp_path / "libk.so").read_bytes()[:4] == b"\x7fELF"
    first = (tmp_path / "libk.so").read_bytes()
    build(capsys, file, "-o", str(tmp_path / "libk.so"))
    assert (tmp_path / "libk.so").read_bytes() == first
    assert os.stat(tmp_path / "libk.so").st_mode & 0o444 == 0o444


@pytest.mark.parametrize("ending", [".so", ".o", ".s"])
def test_forms_and_headers(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str) -> None:
    output, header = tmp_path / f"k{ending}", tmp_path / "other.h"
    status, out, _ = build(capsys, f"{file}:scale", f"{file}:shift", "-o", str(output), "--header", str(header),
                           "--static", "N=64", "--shape", "M=512", "--json")
    assert status == 0
    made = json.loads(out)
    assert made["functions"][0]["forms"] == ["scale.special", "scale.contiguous", "scale.strided"]
    assert made["size_bytes"] == output.stat().st_size and header.exists()
    text = header.read_text(encoding="utf-8")
    assert "form 1: N = 64, M a multiple of 64, contiguous tensors" in text
    status, out, _ = build(capsys, f"{file}:scale", "-o", str(output), "--static", "N=64", "--no-fallback", "--json")
    assert json.loads(out)["functions"][0]["forms"] == ["scale.special"]
    if ending == ".s" and shutil.which("as"):
        subprocess.run(["as", str(output), "-o", str(tmp_path / "as.o")], check=True, timeout=60)


@pytest.mark.parametrize(("arguments", "message"), [
    (("FILE", "-o", "k.dll"), "found the ending '.dll'; expected one of .so (a shared library), .o"),
    (("FILE", "-o", "k"), "found the ending ''; expected one of .so"),
    (("nowhere", "-o", "k"), "an executable is made of a model, and nowhere is none"),
    (("FILE", "-o", "k.o", "--context", "64"), "--context: found kernels; expected a model with it"),
    (("FILE", "-o", "k.o", "--dtype", "f32"), "--dtype: found kernels; expected a model with it"),
    (("FILE", "m.gguf", "-o", "k.o"), "m.gguf: found a model among others; expected it alone"),
    (("m.gguf", "-o", "k.o", "--static", "N=3"), "--static: found a model; expected kernels with it"),
    (("m.gguf", "-o", "k.o", "--scratch-mib", "0"), "--scratch-mib: found a model; expected kernels with it"),
    (("m.gguf", "-o", "k.o", "--no-fallback"), "--no-fallback: found a model; expected kernels with it"),
    (("m.gguf", "-o", "m", "--header", "m"), "found the name of another file of the model"),
    (("m.gguf", "-o", "m.s", "--header", "m.weights"), "found the name of another file of the model"),
    (("FILE", "-o", "k.o", "--header", "k.o"), "found the name of the library itself"),
    (("FILE", "-o", "k.o", "--static", "Z=3"), "--static: found 'Z'; expected dimensions of the kernels: M, N"),
    (("FILE", "-o", "k.o", "--shape", "M=x"), "--dims: found 'M=x'"),
    (("FILE:nothing", "-o", "k.o"), "found no kernel 'nothing'"),
])
def test_what_is_refused(file: str, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str,
                         tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    status, out, err = build(capsys, *[a.replace("FILE", file) for a in arguments])
    assert status == 2 and message in err and not out
    assert {p for p in tmp_path.iterdir() if p.name != "__pycache__"} <= before


def test_a_gpu_is_refused(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", file, "-o", str(tmp_path / "k.s"), "--target", "sm_80"]) == 2
    assert "`sapper asm --target sm_80` prints the text" in capsys.readouterr().err
    assert not (tmp_path / "k.s").exists()


@pytest.mark.parametrize(("name", "family"), [("neoverse-n1", "aarch64"), ("rva23u64", "riscv64")])
def test_other_families(file: str, name: str, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                        monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/codegen/test_library_families.py calls what is made."""
    assert main(["build", file, "-o", str(tmp_path / "f.so"), "--target", name]) == 0
    machine = module_of(family, "system").SYSTEM.machine
    assert (tmp_path / "f.so").read_bytes()[18:20] == machine.to_bytes(2, "little")
    monkeypatch.setattr("sapper.codegen.library.has_module", lambda family, name: False)
    assert main(["build", file, "-o", str(tmp_path / "g.so"), "--target", name]) == 1
    assert f"found a processor of the family {family}" in capsys.readouterr().err
    assert not (tmp_path / "g.so").exists()


def test_one_kernel_twice_is_refused(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = build(capsys, f"{file}:scale", file, "-o", str(tmp_path / "k.o"))
    assert status == 1 and "found the name scale twice" in err and not (tmp_path / "k.o").exists()


def test_places_that_cannot_be_written(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = build(capsys, file, "-o", str(tmp_path / "no" / "k.so"))
    assert status == 1 and "the file can't be written: No such file or directory" in err
    (tmp_path / "dir.so").mkdir()
    status, _, err = build(capsys, file, "-o", str(tmp_path / "dir.so"))
    assert status == 1 and "found a directory; expected the name of a file" in err
    assert not (tmp_path / "dir.h").exists()


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second file does not fit: neither is changed, and nothing is left behind."""
    first, second = tmp_path / "a.so", tmp_path / "a.h"
    first.write_bytes(b"old")
    synced = []

    def full(handle: int) -> None:
        synced.append(handle)
        if len(synced) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CommandError, match=r"a\.h: the file can't be written: No space left on device"):
        write_files({first: b"new", second: b"new"})
    assert first.read_bytes() == b"old" and list(tmp_path.iterdir()) == [first]


def test_what_is_no_plain_file_stays(tmp_path: Path) -> None:
    """Nor does a link to it become a file: a device that is renamed over is gone."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(CommandError, match=f"{path}: found no plain file; expected the name of a file"):
            write_files({tmp_path / "first": b"x", path: b"x"})
    assert stat.S_ISFIFO(os.lstat(pipe).st_mode) and link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, pipe]
    with pytest.raises(CommandError, match="can't be written"):
        write_files({Path("/proc/version"): b"x"})


def test_a_link_leads_to_the_file_that_is_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    write_files({tmp_path / "link": b"x"})
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"x"


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="found two files of that name"):
        write_files({tmp_path / "a": b"x", tmp_path / "." / "a" / ".." / "a": b"y"})
    assert not list(tmp_path.iterdir())


def built_by_hand(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, *arguments: str) -> dict[str, Any]:
    status, out, _ = build(capsys, f"{by_hand.write(tmp_path)}:{name}", "-o", str(tmp_path / "libk.so"), "--json",
                           *arguments)
    assert status == 0
    return json.loads(out)["functions"][0]


def test_a_kernel_by_hand_is_a_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = built_by_hand(capsys, tmp_path, "doubled")
    assert made["forms"] == ["doubled.by_hand1", "doubled.contiguous", "doubled.strided"] and not made["not_by_hand"]
    assert made["by_hand"] == {
        "by_hand1": "by_ymm (avx2), for calls with x, y contiguous, N a multiple of 16; else generated"}
    assert "form 1: N a multiple of 16, contiguous tensors" in (tmp_path / "libk.h").read_text(encoding="utf-8")
    made = built_by_hand(capsys, tmp_path, "doubled", "--no-fallback", "--static", "N=48")
    assert made["forms"] == ["doubled.by_hand1"]
    assert "form 1: N = 48, contiguous tensors" in (tmp_path / "libk.h").read_text(encoding="utf-8")
    status, out, _ = build(capsys, f"{by_hand.write(tmp_path)}:doubled", "-o", str(tmp_path / "libk.s"))
    assert status == 0 and "doubled: by_hand1 is by hand: by_ymm (avx2), for calls" in out
    if shutil.which("as"):
        subprocess.run(["as", "libk.s", "-o", "libk.o"], cwd=tmp_path, check=True, timeout=60)


def test_what_is_not_taken_by_hand_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, reason in [
        (("--schedule", "{}"), "a schedule asks for generated code"),
        (("--no-fallback", "--shape", "N=17"), "N is not known to be a multiple of 16"),
    ]:
        made = built_by_hand(capsys, tmp_path, "doubled", *arguments)
        assert made["by_hand"] == {} and made["not_by_hand"] == {"by_ymm": reason}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once in a process, so that another test may have had it
        made = built_by_hand(capsys, tmp_path, "tripled")
    assert made["forms"] == ["tripled.contiguous", "tripled.strided"] and made["by_hand"] == {}
    assert "does not compute what tripled does" in made["not_by_hand"]["twice_only"]


@pytest.mark.skipif("v3" not in RUNNABLE, reason="runs AVX2 code")
def test_c_calls_take_the_form_by_hand_where_it_is_for_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The form by hand is replaced by one that gives 7: what a call gives says which form it took."""
    kernel = import_file(Path(by_hand.write(tmp_path))).doubled
    chip = target("v3")
    found = judged(kernel, kernel.by_hand[0], chip)
    assert isinstance(found, Override)
    sevens = dataclasses.replace(kernel.by_hand[0], write=write_sevens)
    strides: dict[str, Any] = {"x": "contiguous", "y": "contiguous"}
    for form, taken in ((found.compiled, 2.0), (compile_by_hand(kernel, sevens, chip).compiled, 7.0)):
        forms = [Form("by_hand1", form, {}, {"N": 16}, strides)]
        loaded = Loaded(make_library([c_kernel(kernel, chip, by_hand=forms)], chip), tmp_path, f"lib{taken:.0f}.so")
        for columns, step, factor in ((32, 1, taken), (33, 1, 2.0), (32, 2, 2.0)):
            x = np.ones((3, columns * step), np.float32)[:, ::step]
            y = np.zeros((3, columns), np.float32)

            def call(loaded: Loaded = loaded, x: Any = x, y: Any = y) -> tuple[str, Any]:
                return loaded.on("doubled", {"x": x, "y": y}), y

            status, y = in_child(call)
            assert status == "OK" and (y == factor).all()


def write_sevens(a: Any) -> None:
    y, count, row = a.data("y"), a.r64(), a.ymm()
    x86.vbroadcastss(row, x86.ptr[a.constant(np.float32(7))])
    x86.mov(count, a.extent("M"))
    x86.imul(count, a.extent("N"))
    with a.loop(0, count, 8) as at:
        x86.vmovups(x86.ptr[y + at * 4], row)
    x86.ret()
