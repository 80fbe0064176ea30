"""The commands with a GPU as their target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sapper.cli import explain_emulated
from sapper.cli.app import run
from sapper.cli.explain import gather, measured_lines
from sapper.cli.explain_outline import bank_lines
from sapper.cli.explain_page import page
from sapper.ir.types import ROW_I32
from sapper.lane.matrix import MatrixLowering
from sapper.targets.ptx import assembler

from .browser import BROWSER, DRIVER, open_page

TURNED = """
import sapper as sp
from sapper import Schedule, Tensor, f32, tiles

M, N = sp.dims("M N")


@sp.kernel
def turned(x: Tensor[f32, N, M], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = x[n, m]
"""


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(list(arguments)) == 0
    return capsys.readouterr().out


def test_asm_prints_ptx(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "asm", "vector_add", "--target", "sm_86")
    assert text.startswith(".version 7.1\n.target sm_86\n") and "ld.global.b32" in text


def test_ir_at_the_machine_is_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    asm = output(capsys, "asm", "softmax", "--target", "sm_80")
    assert output(capsys, "ir", "softmax", "--stage", "machine", "--target", "sm_80") == asm
    assert "sync_lanes" not in output(capsys, "ir", "softmax", "--stage", "simplified", "--target", "sm_80")


def test_check_ends_on_the_emulator(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "check", "vector_add", "--target", "sm_80", "--runs", "4")
    assert "for threads, emulator" in text and "native left out: code of the family ptx can't run here" in text


def test_an_unknown_level_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["asm", "vector_add", "--target", "sm_70"]) != 0
    assert "found no target 'sm_70'; expected one of: v3, " in capsys.readouterr().err


needs_ptxas = pytest.mark.skipif(assembler.find_tool("ptxas") is None, reason="ptxas is not installed")


@needs_ptxas
def test_port_lists_registers_and_spills(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(output(capsys, "port", "softmax", "--target", "sm_80", "--target", "sm_90a", "--json"))
    assert [(row["target"], row["how"], row["spills"]) for row in rows] == [("sm_80", "generated", 0),
                                                                           ("sm_90a", "generated", 0)]
    assert all(16 < row["assembled"]["registers"] <= 255 for row in rows)
    assert all(row["cost"]["bound"] in ("issue", "fp32") and row["cost"]["cycles"] > 4 for row in rows)
    assert "ptxas" in rows[0]["assembled"]["assembler"]
    assert str(rows[0]["assembled"]["registers"]) in output(capsys, "port", "softmax", "--target", "sm_80")


def test_port_without_an_assembler(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembler, "find_tool", lambda name: None)
    text = output(capsys, "port", "vector_add", "--target", "sm_80")
    assert "generated" in text and "registers are not known: found no ptxas; expected it on the path" in text
    (row,) = json.loads(output(capsys, "port", "vector_add", "--target", "sm_80", "--json"))
    cost = row["cost"]
    adds = cost["operations"] // 32  # a warp's
    assert adds > 0 and cost["loaded_bytes"] == 2 * cost["stored_bytes"] == 8 * 32 * adds
    assert cost["cycles"] >= 3 * adds and cost["bound"] == "memory"  # two loads and a store
    assert "cycles: a lower bound for one pass of the hottest loop (on a GPU of one warp, of a whole SM)" in text


def test_port_finds_the_loop_of_the_product(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(output(capsys, "port", "matmul_nn_f32", "--target", "sm_80", "--target", "sm_90a", "--json"))
    assert all(row["cost"]["operations"] > 10_000 for row in rows)


def test_explain_outlines_the_loops(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    call = ("softmax", "--target", "sm_80", "--dims", "M=16,N=512")
    facts = json.loads(output(capsys, "explain", *call, "--json"))
    hottest = next(loop for loop in facts["loops"] if loop["hottest"])
    inside = [row["text"] for row in facts["rows"] if hottest["first"] <= row["place"] <= hottest["last"]]
    assert hottest["innermost"] and hottest["depth"] == 3 and len(inside) == hottest["instructions"]
    assert sum(text.startswith("fma.rn.f32 ") for text in inside) == hottest["opcodes"]["fma.rn.f32"] > 0
    assert inside[-1].endswith(f"{hottest['label']};")
    asm = output(capsys, "asm", *call)
    assert all(text in asm for text in inside)
    monkeypatch.setattr(assembler, "find_tool", lambda name: None)
    shown = output(capsys, "explain", *call, "--loop", hottest["label"])
    assert "registers are not known: found no ptxas" in shown and "e = exp(row - max(row, over=n))" in shown


PRODUCT = ("matmul_nn_bf16_bf16", "--shape", "M=130,N=128,K=192")


@pytest.fixture(scope="module")
def product() -> dict[str, Any]:
    """The facts of a product whose warps specialise, run on the emulator."""
    return gather(PRODUCT[0], "sm_90a", None, PRODUCT[2], None)


def test_explain_counts_on_the_emulator(product: dict[str, Any]) -> None:
    facts = product
    assert facts == json.loads(json.dumps(facts)) and facts["measured"]["emulated"]["instructions"] == sum(
        row["count"] for row in facts["rows"])
    hottest = next(loop for loop in facts["loops"] if loop["hottest"])
    # Three tiles of 64 rows in two columns of 64, four warps each, three pieces of 64 of the depth.
    assert hottest["opcodes"]["wgmma.commit_group.sync.aligned"] == 1 and hottest["passes"] == 3 * 2 * 4 * 3
    assert hottest["bound"] == "tensor" and hottest["operations"] == 2 * 64 * 64 * 64 // 4
    copies = next(loop for loop in facts["loops"] if loop["innermost"] and loop["loaded_bytes"])
    assert copies["loaded_bytes"] == 2 * 64 * 64 * 2 and copies["passes"] * 4 == hottest["passes"]
    assert facts["model_cycles"] >= hottest["cycles"] * hottest["passes"]


def test_explain_shows_registers_and_shared_memory_over_time(product: dict[str, Any]) -> None:
    facts = product
    buffers = [name for name, *_ in facts["near_buffers"]]
    assert buffers == [*(f"{name} {stage}" for stage in range(4) for name in "ab"), "sums", "full", "free", "counters"]
    assert facts["registers"][:12] == buffers and facts["kinds"][:12] == ["near"] * 12
    ends = [first + size for _, first, size in facts["near_buffers"]]
    assert ends == sorted(ends) and ends[-1] == facts["near_bytes"]

    def letters(row: dict[str, Any]) -> str:
        return row["registers"][:12]

    products = [row for row in facts["rows"] if row["text"].startswith("wgmma.mma_async")]
    tensors = [row for row in facts["rows"] if "cp.async.bulk.tensor" in row["text"]]
    stores = [row for row in tensors if ".global.shared::cta" in row["text"]]
    copies = [row for row in tensors if row not in stores]
    assert all(letters(row) == "rrrrrrrr|||" + letters(row)[-1] for row in products) and len(products) == 4
    assert [letters(row)[:8] for row in copies] == ["w.w.w.w.", ".w.w.w.w"] or \
        [letters(row)[:8] for row in copies] == ["w|w|w|w|", "|w|w|w|w"]
    assert stores and all(letters(row)[:9] == "||||||||r" for row in stores)
    # Sums are in registers from their first product to their store, and in no column twice.
    assert min(row["wanted"] for row in products) > 32 and all(row["wanted"] <= row["limit"] == 255 for row in products)
    for row in facts["rows"]:
        for letter, lives in zip(row["registers"][12:], facts["lives"][12:], strict=True):
            here = [name for first, last, name in lives if first <= row["place"] <= last]
            assert (letter != ".") == bool(here) and len(here) <= 2
            assert letter not in "rwx" or any(name in row["text"] for name in here)


def test_explain_says_what_a_budget_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    call = ("attention_bf16_64", "--target", "sm_90a", "--no-run")
    facts = json.loads(output(capsys, "explain", *call, "--json"))
    # Of warps that multiply, of all at the start, of the one that copies.
    assert [limit for _, limit in facts["wanted"]] == [240, 168, 24]
    assert "not run: switched off" in output(capsys, "explain", *call)
    assert "near_bytes" not in facts["rows"][0] and set(facts["kinds"]) <= {"gpr", "vec", "pred", "half"}


def test_explain_finds_conflicts_and_wasted_sectors(tmp_path: Path) -> None:
    path = tmp_path / "user_turned.py"
    path.write_text(TURNED, encoding="utf-8")
    facts = gather(f"{path}:turned", "sm_80", None, "M=64,N=64", None)
    noted = [row for row in facts["rows"] if row["comment"] and row["count"]]
    assert noted and all("st.global.b32" in row["text"] for row in noted)  # the loads are whole
    assert {row["comment"] for row in noted} == {"8.0 times the sectors that its bytes need"}
    assert "global memory: 4,608 sectors of 32 bytes, 4.50 times those that the bytes need" in measured_lines(facts)
    assert gather(f"{path}:turned", "sm_80", None, "M=64", None)["measured"] == {
        "missing": "give --shape N=... to run it"}


MEETING = """
import sapper as sp
from sapper import Tensor, bf16, f32, tiles, zeros

M, N, K = sp.dims("M N K")

@sp.kernel
def product(a: Tensor[bf16, K, M], b: Tensor[bf16, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[k, m] @ b[k, n]
        c[m, n] = acc
"""


def test_explain_says_what_is_proved_of_banks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "user_product.py"
    path.write_text(MEETING, encoding="utf-8")
    facts = gather(f"{path}:product", "sm_80", None, None, None, run=False)
    count = len(facts["banks"])
    assert bank_lines(facts) == [f"shared memory: {count} of {count} instructions are proved free of bank conflicts"]
    rows = {row["place"]: row for row in facts["rows"]}
    assert all("shared" in rows[fact["place"]]["text"] for fact in facts["banks"])
    # Chunks that are not swizzled meet.
    monkeypatch.setattr(MatrixLowering, "swizzled", lambda low, row, chunk, row_bytes: low.emit(
        0, "add", [low.bits(0, "shl", row, row_bytes.bit_length() - 1), low.bits(0, "shl", chunk, 4)], ROW_I32))
    facts = gather(f"{path}:product", "sm_80", None, None, None, run=False)
    rows = {row["place"]: row for row in facts["rows"]}
    loads = [fact for fact in facts["banks"] if "ldmatrix" in rows[fact["place"]]["text"]]
    assert {fact["said"] for fact in loads} == {"32 cycles for 4: lanes 0 and 1 meet in bank 0; rank 0 of 3"}
    assert rows[loads[0]["place"]]["comment"] == loads[0]["said"]
    assert bank_lines(facts)[1] == f"{len(loads)} of them: {loads[0]['said']}"


def test_explain_stops_a_call_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain_emulated, "MOST_STEPS", 1000)
    why = gather("softmax", "sm_80", None, "M=512,N=512", None)["measured"]["missing"]
    assert why == "the emulator stopped: 1000 instructions ran without an end; threads are at:"
    monkeypatch.setattr(explain_emulated, "MOST_STEPS", 400_000)
    monkeypatch.setattr(explain_emulated, "MOST_SECONDS", 0.0)
    why = gather("softmax", "sm_80", None, "M=512,N=512", None)["measured"]["missing"]
    assert why == "the emulator stopped: the run has no end yet, and its time is over (0 s); a smaller --shape has one"


def test_the_page_of_a_gpu_needs_no_network(product: dict[str, Any], tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "softmax.html"
    assert str(path) in output(capsys, "explain", "softmax", "--target", "sm_80", "--html", str(path))
    for text in (path.read_text(encoding="utf-8"), page(product)):
        assert "http:" not in text and "https:" not in text and "src=" not in text and text.count("</script>") == 2


@pytest.mark.skipif(DRIVER is None or BROWSER is None, reason="Chromium and its driver are not installed")
def test_the_page_of_a_gpu_in_a_browser(product: dict[str, Any], tmp_path: Path) -> None:
    facts = product
    path = tmp_path / "page.html"
    path.write_text(page(facts).replace("<head>", "<head><script>window.faults = []; "
                                        "addEventListener('error', (e) => faults.push(e.message));</script>"))
    hottest = next(loop for loop in facts["loops"] if loop["hottest"])
    rows = [row for row in facts["rows"] if hottest["first"] <= row["place"] <= hottest["last"]]
    with open_page(path) as opened:
        texts = "return [...document.querySelectorAll('.row .x')].map((x) => x.textContent.split('  #')[0])"
        assert opened.run(texts) == [row["text"] for row in rows]
        shown = opened.run("return [...document.querySelectorAll('.row .w')].map((x) => x.textContent)")
        assert shown == [str(row["wanted"]) for row in rows]
        # A source line marks its instructions, and an instruction its source line.
        product_line = next(row["line"] for row in rows if row["text"].startswith("wgmma.mma_async"))
        opened.hover(f".line[data-line='0:{product_line}'] .t")
        assert opened.run("return document.querySelectorAll('.row.on').length") == sum(
            row["line"] == product_line for row in rows)
        opened.hover(".row:nth-child(2) .x")
        assert opened.run("return document.querySelectorAll('.line.on').length") == 1
        heads = opened.run("return [...document.querySelectorAll('#loops th')].map((x) => x.textContent)")
        assert {"issue", "busiest unit", "bytes in", "operations", "registers", "passes", "share"} <= set(heads)
        units = opened.run("return [...document.querySelectorAll('.port span:first-child')].map((x) => x.textContent)")
        assert units == list(hottest["units"])
        charts = opened.run("return [...document.querySelectorAll('#over-time h2')].map((x) => x.textContent)")
        assert charts == ["Registers wanted and had", f"Shared memory: {facts['near_bytes']:,} bytes"]
        assert opened.run("return document.querySelectorAll('.buffers tr').length") == len(facts["near_buffers"])
        painted = ("const c = document.querySelector('{}'); let n = 0; const d = c.getContext('2d').getImageData(0, 0, "
                   "c.width, c.height).data; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n")
        assert all(opened.run(painted.format(canvas)) > 500 for canvas in ("#listing canvas", ".chart canvas"))
        # The chart leads to its place in the text: in its middle are rows of the middle.
        opened.click(".chart canvas")
        assert opened.run("return document.querySelectorAll('.row').length") in (len(rows), len(facts["rows"]))
        assert opened.run("return faults") == []
        assert opened.run("return document.documentElement.scrollWidth <= innerWidth")
        assert opened.screenshot()[:8] == b"\x89PNG\r\n\x1a\n"
