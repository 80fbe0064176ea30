"""`sapper explain`: the text, the JSON, and the page in a browser."""

from __future__ import annotations

import json
import platform
import warnings
from pathlib import Path

import pytest

from sapper.cli.console import time_text
from sapper.cli.explain import gather
from sapper.cli.explain_page import page
from sapper.cli.main import main
from sapper.runtime.errors import SapperWarning
from sapper.targets.x86_64.target import TARGETS
from tests.codegen.run_native import RUNNABLE

from . import by_hand
from .browser import BROWSER, DRIVER, open_page

KERNELS = '''
import sapper as sp
from sapper import Tensor, f32, exp, tiles, whole

M, N = sp.dims("M N")


@sp.kernel
def normal(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    """</script> <b>"""
    for m in tiles(M):
        n = whole(N)
        e = exp(x[m, n])
        y[m, n] = e / sp.sum(e, over=n)
'''
SCATTERS = """
import sapper as sp
from sapper import Tensor, each, f32, i32, tiles

M, N, V = sp.dims("M N V")


@sp.kernel
def scatter(x: Tensor[f32, M, N], place: Tensor[i32, M], y: Tensor[f32, V, N], z: Tensor[f32, M]):
    for m in each(M):
        z[m] = x[m, 0]
    for m in each(M):
        for n in tiles(N):
            y[place[m], n] = x[m, n]
"""
HOST = next((name for name in ("v4", "v3") if name in RUNNABLE), None)
NEEDS_HOST = pytest.mark.skipif(platform.machine() != "x86_64" or HOST is None, reason="runs x86-64 code")


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "user_normal.py"
    path.write_text(KERNELS, encoding="utf-8")
    return f"{path}:normal"


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capfd.readouterr()
    status = main(list(arguments))
    return status, *capfd.readouterr()


@NEEDS_HOST
def test_a_call_that_runs_is_counted_and_timed(file: str) -> None:
    facts = gather(file, HOST, None, "M=8,N=100", None)
    measured = facts["measured"]
    assert measured["dims"] == {"M": 8, "N": 100} and measured["seconds"] > 0 and measured["ratio"] > 0
    hottest = next(loop for loop in facts["loops"] if loop["hottest"])
    assert measured["hottest"] == hottest["label"] and 0 < measured["hottest_share"] <= 1
    assert hottest["passes"] > 0 and all(row["count"] is not None for row in facts["rows"])
    assert facts == json.loads(json.dumps(facts))


@NEEDS_HOST
def test_a_library_kernel_whose_arguments_need_more_than_dimensions_runs_too() -> None:
    assert gather("attention_decode_f32", HOST, None, "H=2,G=1,D=16,P=40", None)["measured"]["seconds"] > 0
    assert gather("embedding_f32", HOST, None, "T=3,V=7,E=16", None)["measured"]["seconds"] > 0


@NEEDS_HOST
def test_scalars_of_the_call_that_runs_may_be_given(capfd: pytest.CaptureFixture[str]) -> None:
    """Else they are the largest that fit. A position decides how often the loop over positions runs."""
    shape = "H=2,G=1,D=16,P=400"

    def passes(scalars: str | None) -> int:
        facts = gather("attention_decode_f32", HOST, None, shape, None, scalars=scalars)
        return max(row["count"] for row in facts["rows"])

    assert passes("position=0") < passes("position=100") < passes(None)
    command = ("explain", "attention_decode_f32", "--target", str(HOST), "--shape", shape, "--set")
    assert "expected: 0 to 399" in run(capfd, *command, "position=400")[2]
    assert "expected NAME=VALUE of a scalar of attention_decode_f32: position, scale" in run(
        capfd, *command, "place=3")[2]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", list(TARGETS))
def test_every_target_is_explained(file: str, name: str) -> None:
    facts = gather(file, name, None, None, None, run=False)
    lines = KERNELS.splitlines()
    (source,) = facts["sources"]
    assert [text for _, text in source["lines"]] == lines[source["lines"][0][0] - 1:]
    named = {row["line"] for row in facts["rows"] if row["line"] is not None}
    assert {lines[n - 1].strip() for n in named} >= {"e = exp(x[m, n])", "y[m, n] = e / sp.sum(e, over=n)"}
    assert facts["measured"] == {"missing": "switched off"}
    assert [loop["hottest"] for loop in facts["loops"]].count(True) == 1


def test_why_nothing_ran_is_said(file: str) -> None:
    assert gather(file, "v3", None, "M=8", None)["measured"]["missing"] == "give --shape N=... to run it"
    lacking = next((name for name in TARGETS if name not in RUNNABLE), None)
    if lacking is not None:
        assert "this CPU has no " in gather(file, lacking, None, "M=8,N=8", None)["measured"]["missing"]


@NEEDS_HOST
def test_the_terminal_shows_all_parts(file: str, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "explain", file, "--target", str(HOST), "--shape", "M=8,N=100")
    assert status == 0 and not err
    for part in ("normal for ", "run here with M=8 N=100", "innermost loops", "ports in a pass of", "e = exp(x[m, n])",
                 "source lines and their instructions", "instructions at ", " run"):
        assert part in out, part
    status, out, _ = run(capfd, "explain", file, "--target", "v3", "--no-run", "--all")
    assert status == 0 and "not run: switched off" in out and "ret" in out and "ymm" in out
    facts = json.loads(run(capfd, "explain", file, "--target", "v3", "--no-run", "--json")[1])
    label = facts["loops"][0]["label"]
    status, out, _ = run(capfd, "explain", file, "--target", "v3", "--no-run", "--loop", label)
    assert status == 0 and f"{label}:" in out


def test_an_unknown_loop_is_refused(file: str, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "explain", file, "--target", "v3", "--no-run", "--loop", "nowhere")
    assert status == 2 and "found no loop 'nowhere'; expected one of: " in err and not out


@pytest.mark.parametrize("name", ["v3", "sm_80"])
def test_a_loop_that_nothing_proves_parallel_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
                                                     ) -> None:
    path = tmp_path / "user_scatter.py"
    path.write_text(SCATTERS, encoding="utf-8")
    _, out, _ = run(capfd, "explain", f"{path}:scatter", "--target", name, "--no-run")
    first = SCATTERS.splitlines().index("    for m in each(M):") + 1
    assert f"line {first + 2}: this loop runs in order, on one worker" in out and f"y (line {first + 4})" in out
    assert out.count("runs in order") == 1 and "disjoint=True" in out
    path = tmp_path / "user_asserted.py"
    path.write_text(SCATTERS.replace("each(M):\n        for", "each(M, disjoint=True):\n        for"), encoding="utf-8")
    assert "runs in order" not in run(capfd, "explain", f"{path}:scatter", "--target", name, "--no-run")[1]


def test_times_are_readable() -> None:
    assert [time_text(s) for s in (2.5, 0.0031, 4.2e-6, 1.5e-8)] == ["2.5 s", "3.1 ms", "4.2 µs", "15 ns"]
    assert [time_text(s) for s in (0.99996, 0.9996e-3, 0.9994)] == ["1 s", "1 ms", "999 ms"]


def test_the_page_needs_no_network(file: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "normal.html"
    status, out, _ = run(capfd, "explain", file, "--target", "v3", "--no-run", "--html", str(path))
    assert status == 0 and str(path) in out
    text = path.read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text and "src=" not in text and text.count("</script>") == 2
    nowhere = str(tmp_path / "no" / "x.html")
    status, _, err = run(capfd, "explain", file, "--target", "v3", "--no-run", "--html", nowhere)
    assert status == 1 and "the file can't be written: No such file or directory" in err


@pytest.mark.parametrize(("name", "said"), [("rva23u64", '["mask","float"]'), ("neoverse-n1", '["mask","mask"]')])
def test_the_page_shows_the_registers_of_each_family(file: str, name: str, said: str, tmp_path: Path,
                                                     capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.html"
    status, _, err = run(capfd, "explain", file, "--target", name, "--no-run", "--html", str(path))
    assert status == 0, err
    assert said in path.read_text(encoding="utf-8")


@pytest.mark.skipif(DRIVER is None or BROWSER is None, reason="Chromium and its driver are not installed")
def test_the_page_in_a_browser(file: str, tmp_path: Path) -> None:
    facts = gather(file, "zen4" if "zen4" in RUNNABLE else "v3", None, "M=8,N=100", None)
    path = tmp_path / "page.html"
    path.write_text(page(facts).replace("<head>", "<head><script>window.faults = []; "
                                        "addEventListener('error', (e) => faults.push(e.message));</script>"))
    hottest = next(loop for loop in facts["loops"] if loop["hottest"])
    with open_page(path) as opened:
        assert opened.run("return faults") == []
        assert opened.run("return document.querySelectorAll('#loops tr').length") == 1 + sum(
            loop["innermost"] for loop in facts["loops"])
        rows = [row for row in facts["rows"] if hottest["first"] <= row["place"] <= hottest["last"]]
        texts = opened.run("return [...document.querySelectorAll('.row .x')].map((x) => x.textContent.split('  #')[0])")
        assert texts == [row["text"] for row in rows]
        # A source line marks its instructions, and an instruction its source line.
        line = rows[0]["line"]
        mine = sum(row["line"] == line for row in rows)
        opened.hover(f".line[data-line='0:{line}'] .t")
        assert opened.run("return document.querySelectorAll('.row.on').length") == mine > 0
        opened.hover(".row:nth-child(2) .x")
        marked = opened.run("return [...document.querySelectorAll('.line.on')].map((x) => x.dataset.line)")
        assert marked == [f"0:{line}"]
        opened.hover("h1")
        assert opened.run("return document.querySelectorAll('.on').length") == 0
        opened.click(f".line[data-line='0:{line}']")
        assert opened.run("return document.querySelectorAll('.row.pinned').length") == mine
        # The registers are drawn, in both themes.
        count = ("const c = document.querySelector('#listing canvas'); let n = 0; "
                 "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; "
                 "for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n")
        assert opened.run(count) > 1000
        assert opened.screenshot()[:8] == b"\x89PNG\r\n\x1a\n"
        ground = "return getComputedStyle(document.body).backgroundColor"
        before = opened.run(ground)
        opened.click("#theme")
        assert opened.run(ground) != before and opened.run(count) > 1000
        # All instructions, and another loop.
        opened.run("const r = document.getElementById('range'); r.value = ''; r.onchange();")
        assert opened.run("return document.querySelectorAll('.row').length") == len(facts["rows"])
        if len(facts["loops"]) > 1:
            opened.click("#loops tr:nth-child(3)")
            assert opened.run("return document.querySelectorAll('.row').length") < len(facts["rows"])
        assert opened.run("return faults") == []
        # Nothing lies beyond the right edge on a laptop's screen but the registers, which scroll by themselves.
        assert opened.run("return document.documentElement.scrollWidth <= innerWidth")


def test_a_kernel_by_hand_is_shown_with_its_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    facts = gather(f"{by_hand.write(tmp_path)}:doubled", "v3", None, None, None, run=False)
    assert [p["name"] for p in facts["pieces"]] == ["by_ymm"] and not facts["not_by_hand"]
    added = next(row for row in facts["rows"] if row["text"].startswith("vaddps"))
    assert added["line"] == by_hand.line_of("x86.vaddps(row, row, row)")
    lines = dict(map(tuple, facts["sources"][added["source"]]["lines"]))
    assert lines[added["line"]].strip() == "x86.vaddps(row, row, row)"
    status, out, _ = run(capfd, "explain", f"{by_hand.write(tmp_path)}:doubled", "--target", "v3", "--no-run")
    assert status == 0 and "by hand: by_ymm (avx2), for calls with x, y contiguous, N a multiple of 16" in out
    assert "by hand: by_ymm" in page(facts)


@NEEDS_HOST
def test_what_a_call_does_not_take_by_hand_is_told(tmp_path: Path) -> None:
    file = by_hand.write(tmp_path)
    assert gather(f"{file}:doubled", HOST, None, "M=3,N=32", None)["pieces"][0]["name"] == "by_ymm"
    ragged = gather(f"{file}:doubled", HOST, None, "M=3,N=17", None)
    assert ragged["not_by_hand"] == {"by_ymm": "N is not known to be a multiple of 16"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SapperWarning)  # once in a process, so that another test may have had it
        wrong = gather(f"{file}:tripled", HOST, None, "N=32", None)
    assert "failed its trial" in wrong["not_by_hand"]["twice_only"]
    for facts in (ragged, wrong):
        assert facts["pieces"] == [] and facts["measured"]["seconds"] > 0
