"""`sapper bench`: tiny cases end to end, the JSON file, peers that are missing, Ctrl-C. No time is asserted."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sapper.cli import (
    bench,
    bench_batch,
    bench_compile,
    bench_ggml,
    bench_models,
    bench_quantized,
    bench_suites,
    bench_threads,
    bench_train,
)
from sapper.cli.bench import print_table, run_bench
from sapper.cli.bench_compile import COMPILE_TARGETS, compile_rows
from sapper.cli.bench_suites import Row, Settings, jobs_of, rows_of
from sapper.kernels import library
from sapper.models.adapted import Lora
from sapper.models.checkpoint import open_checkpoint
from sapper.models.deepseek import untrained
from sapper.models.deepseek.config import from_json
from sapper.models.deepseek.model import DeepseekModel
from sapper.models.llama import model as llama_model
from sapper.models.load import load_model
from sapper.models.training import Recipe, start
from sapper.models.weights import FORMS
from sapper.models.workspace import Workspace
from sapper.tune import operands, peaks
from sapper.tune.measure import Timing, copies_to_be_cold
from tests.models import small as small_models
from tests.weights import find_smollm2

KEYS = ["case", "dtype", "shape", "threads", "peer", "median_s", "rate", "unit", "percent_of_floor",
        "ratio_to_best_peer", "operations", "bytes", "products"]
LLAMA = Path(__file__).parents[1] / "models" / "data" / "llama"
REPORT = Path(__file__).parents[2] / "bench" / "report.py"
ROOFLINE = REPORT.with_name("roofline.py")


@pytest.mark.parametrize("on_tiles", [False, True])
def test_operations_of_a_prompt_count_by_what_makes_their_products(
        on_tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of blocks are of bytes, and of bf16 where prompts are rounded."""
    monkeypatch.setattr(Workspace, "rounds_many", lambda self: on_tiles)
    small = untrained.SMALL_V2 | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 64,
                                  "moe_intermediate_size": 32, "n_routed_experts": 4, "kv_lora_rank": 32,
                                  "q_lora_rank": 32, "num_attention_heads": 2}
    config, tokens = from_json(small, "the test"), 9
    seen = sum(range(1, tokens + 1))
    attention = 2 * seen * config.layers * config.heads * (config.head_features + config.value_features)
    blocks = {"bf16", "f32"} if on_tiles else {"i8", "bf16", "f32"}
    for form, loaded, parts in (("Q4_0", "file", blocks),
                                ("bf16 rounded", "bf16-rounded", {"bf16", "f32"}), ("bf16", "bf16", {"f32"})):
        model = untrained.untrained(config, loaded)
        found = bench_models.deepseek_operations(form, model, tokens)
        assert found.keys() == parts
        assert sum(found.values()) == (
            2 * tokens * model.weights.step_size + 2 * model.weights.logits.size + attention)
        if form == "Q4_0" and not on_tiles:
            expand = config.layers * config.key_rank * config.heads * (config.key_features + config.value_features)
            assert found["bf16"] == 2 * tokens * expand + attention
            assert found["f32"] == 2 * tokens * 4 * 64


@pytest.mark.parametrize("pairs", [True, False])
def test_rounded_blocks_are_left_out_where_pairs_of_bf16_are_not_multiplied(
        pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workspace, "packs_pairs", lambda self: pairs)
    said: list[str] = []
    left_out = [form for form in ("bf16", "bf16 rounded", "4 bit", "4 bit rounded")
                if bench_models.is_left_out("smollm2", form, SimpleNamespace(say=said.append))]
    assert left_out == ([] if pairs else ["4 bit rounded"])
    assert len(said) == len(left_out)
    assert set(said) <= {"smollm2, 4 bit rounded, is left out: this processor does not multiply pairs of bf16"}


FRAGILE_PEER = """
import os
from types import SimpleNamespace
from . import llama_cpp
class Llama:
    def __init__(self, path, **options):
        self.repacks = llama_cpp.llama_model_default_params().use_extra_bufts
    def eval(self, tokens):
        if self.repacks:
            os.abort()
"""


def test_a_peer_that_ends_the_process_runs_without_its_layouts(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text(FRAGILE_PEER)
    (tmp_path / "llama_cpp" / "llama_cpp.py").write_text(
        "from types import SimpleNamespace\n"
        "def llama_model_default_params():\n    return SimpleNamespace(use_extra_bufts=True)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    said: list[str] = []
    settings = SimpleNamespace(say=said.append, report=lambda line: None)
    assert not bench_models.repacks_of(tmp_path / "a.gguf", settings)
    assert "a.gguf" in said[0]
    code = "from sapper.cli.bench_models import llama; llama('a.gguf', 1, False).eval([1, 2])"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


ROUNDS_BLOCKS = Workspace(1, 1).packs_pairs()
"""Whether this CPU multiplies pairs of bf16, to which weights in blocks are rounded."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small buffers for the peaks, and the environment put back afterwards."""
    monkeypatch.setitem(peaks.READ_BYTES, "L3", 256 << 10)
    monkeypatch.setitem(peaks.READ_BYTES, "DRAM", 1 << 20)
    monkeypatch.setattr(peaks, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(peaks, "SAMPLE_S", 5e-4)
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_THREAD_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):      # of whoever runs the tests
        monkeypatch.delenv(name, raising=False)


def settings(**changes: Any) -> Settings:
    given: dict[str, Any] = {"thread_counts": (1,), "against": (), "quick": True, "pattern": None}
    return Settings(**{**given, "say": lambda _: None, "report": lambda _: None, **changes})


def run_json(path: Path, *arguments: Any, **options: Any) -> list[dict[str, Any]]:
    assert run_bench(*arguments, json_file=str(path), quick=True, **options) == 0
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def test_a_case_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_json(tmp_path / "r.json", "others", threads=1, against="numpy", case="vector_add")
    assert [list(row) for row in rows] == [KEYS, KEYS]
    ours, theirs = rows
    assert (ours["peer"], theirs["peer"]) == ("sapper", "numpy")
    assert (ours["case"], ours["dtype"], ours["shape"], ours["threads"]) == ("vector_add", "f32", "16384", 1)
    assert ours["unit"] == "GB/s"
    assert ours["rate"] == pytest.approx(12 * 16384 / ours["median_s"] / 1e9, rel=1e-4)
    assert ours["ratio_to_best_peer"] == pytest.approx(theirs["median_s"] / ours["median_s"], rel=1e-4)
    assert theirs["ratio_to_best_peer"] == 1.0
    floors = [row["percent_of_floor"] * row["median_s"] for row in rows]
    assert floors[0] == pytest.approx(floors[1], rel=1e-3)
    printed = capsys.readouterr()
    assert "vector_add" in printed.out and "vs numpy" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize(("suite", "case", "unit"), [
    ("matmul", "matmul_nn_f32", "GFLOP/s"), ("rows", "rms_norm 5", "GB/s"), ("matvec", "matvec_bf16 576x1536", "GB/s")])
def test_suites_of_the_library(tmp_path: Path, suite: str, case: str, unit: str) -> None:
    (row,) = run_json(tmp_path / "r.json", suite, threads=1, against="", case=case)
    assert (row["case"], row["unit"], row["ratio_to_best_peer"]) == (case.split()[0], unit, None)
    assert row["percent_of_floor"] > 0


def test_two_threads(tmp_path: Path) -> None:
    rows = run_json(tmp_path / "r.json", "rows", threads=2, against=["numpy"], case="swiglu 5")
    assert [(row["peer"], row["threads"]) for row in rows] == [("sapper", 2), ("numpy", 2)]


TINY_V2 = {
    **untrained.SMALL_V2, "vocab_size": 4200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "moe_intermediate_size": 32, "num_attention_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8,
}


def test_a_deepseek_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TINY_V2
    monkeypatch.setattr(untrained, "SMALL_V2", config)
    rows = run_json(tmp_path / "r.json", "deepseek", threads=1, against="")
    forms = ("bf16", "bf16 rounded", "Q4_0", "Q4_0 rounded")[: 4 if ROUNDS_BLOCKS else 3]
    assert [(row["case"], row["dtype"], row["shape"], row["unit"]) for row in rows] == [
        (f"deepseek-v2 {part}", form, shape, "tokens/s") for form in forms
        for part, shape in (("prefill", "64"), ("decode", "1 after 64"))]
    assert all(row["rate"] > 0 and row["percent_of_floor"] > 0 for row in rows)
    weights = untrained.untrained(from_json(config, "the test")).weights
    matrices = 64 * (32 + 32 + 8) + 32 * 2 * 24 + 32 * 2 * 32 + 64 * 32  # of the attention of a layer
    assert weights.step_size == 2 * matrices + 3 * 64 * 96 + 64 * 8 + 6 * 3 * 64 * 32
    assert weights.step_bytes == pytest.approx(2 * (weights.step_size + 4200 * 64), rel=0.02)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_a_deepseek_beside_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each form beside the same file; nothing is left of the files."""
    monkeypatch.setattr(untrained, "SMALL_V2", {
        **TINY_V2, "hidden_size": 256, "moe_intermediate_size": 256, "q_lora_rank": 256, "kv_lora_rank": 64})
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    rows = run_json(tmp_path / "r.json", "deepseek", threads=1, against="llama", case="deepseek-v2 decode")
    assert [(row["dtype"], row["peer"]) for row in rows] == [
        one for base in ("bf16", "Q8_0", "Q4_0", "Q4_K")
        for form in (base, base + " rounded")[: 2 if ROUNDS_BLOCKS or base == "bf16" else 1]
        for one in ((form, "sapper"), (base, "llama"))]
    assert all(row["ratio_to_best_peer"] > 0 for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_several_sequences_of_a_deepseek(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrained, "SMALL_V2", TINY_V2)
    rows = run_json(tmp_path / "r.json", "batch", threads=1, against="", case="deepseek-v2")
    assert [(row["dtype"], row["shape"], row["unit"]) for row in rows] == [
        (form, f"{count} x 1 after 32", "tokens/s") for form in ("bf16", "bf16 rounded", "Q4_0") for count in (1, 4)]
    assert all(row["rate"] == pytest.approx(int(row["shape"].split()[0]) / row["median_s"], rel=1e-4) for row in rows)
    assert all(row["percent_of_floor"] > 0 for row in rows)


def test_a_step_reads_the_experts_that_its_tokens_meet() -> None:
    model = untrained.untrained(from_json(TINY_V2, "the test"), "bf16")
    expert, layers = 3 * 2 * 64 * 32, 1
    assert bench_batch.step_bytes(model, 1) == pytest.approx(model.weights.step_bytes)
    of_two = model.weights.step_bytes + layers * expert * (8 * (1 - (1 - 4 / 8) ** 2) - 4)
    assert bench_batch.step_bytes(model, 2) == pytest.approx(of_two)
    assert bench_batch.step_bytes(model, 64) == pytest.approx(model.weights.step_bytes + layers * expert * 4)
    met = {count: sum(bench_batch.step_operations("deepseek-v2", "bf16", model, count, 9).values())
           for count in (1, 3)}
    positions = 2 * 2 * (2 * 32 + 8) * 10 * 2  # of two heads and two layers
    assert met[1] == 2 * (model.weights.step_size + model.weights.logits.size) + positions and met[3] == 3 * met[1]


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_several_sequences_beside_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small model in the place of SmolLM2; its steps give what llama.cpp's do."""
    path = small_models.write_gguf(tmp_path / "small.gguf", small_models.random_weights(),
                                   numbers={"llama.context_length": 2048})
    monkeypatch.setattr(llama_model, "load_model", lambda name, form: load_model(path, form))
    rows = run_json(tmp_path / "r.json", "batch", threads=1, against="llama", case="smollm2")
    cases = [("step", "1 x 1 after 32"), ("step", "4 x 1 after 32"),
             ("first token", "64 beside 15 x 1"), ("wait", "64 beside 15 x 1")]
    assert [(row["dtype"], row["case"], row["shape"], row["peer"]) for row in rows] == [
        (dtype, f"smollm2 batch {part}", shape, peer) for form in ("bf16", "bf16 rounded", "4 bit")
        for part, shape in cases for dtype, peer in ((form, "sapper"), ("4 bit", "llama"))]
    assert all(row["ratio_to_best_peer"] > 0 for row in rows)
    batch = load_model(path, "f32").batch(3, 64)
    ours, peer = bench_batch.steps_of(batch, 20), bench_batch.Llama(path, 3, 64, 1, True)
    theirs = peer.steps(20)
    try:
        for _ in range(2):
            ours()
            theirs()
            logits = [np.ctypeslib.as_array(peer.library.llama_get_logits_ith(peer.context, row), (batch.vocabulary,))
                      for row in range(3)]
            np.testing.assert_allclose(batch.step_logits, logits, rtol=0.02, atol=0.02)
    finally:
        peer.close()


NEEDS_LLAMA = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None,
                                 reason="llama-cpp-python is not installed")


@pytest.fixture
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the suite `quantized`, cold for a 64th of the last cache."""
    monkeypatch.setattr(bench_quantized, "copies_to_be_cold",
                        lambda size_bytes, cache_bytes: copies_to_be_cold(size_bytes, cache_bytes >> 6))
    monkeypatch.setattr(bench_quantized, "SHAPE", (64, 256))
    monkeypatch.setattr(bench_quantized, "MIXTURE", {
        "hidden_size": 256, "moe_intermediate_size": 256, "n_routed_experts": 8, "num_experts_per_tok": 2})


BLOCK_BYTES = {"Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q3_K": (256, 116), "Q4_K": (256, 144),
               "Q5_K": (256, 176), "Q6_K": (256, 210)}
"""As files have them, but Q3_K, whose 110 are held in 116: scales are whole bytes."""
COUNTS = (1, 16, 512)


@NEEDS_LLAMA
def test_quantized_products_beside_llama(tmp_path: Path, small_products: None,
                                         capfd: pytest.CaptureFixture[str]) -> None:
    """Both give what the dequantised weights do, or they were not timed."""
    rows = run_json(tmp_path / "r.json", "quantized", threads=1, against="llama", case="product")
    assert [(row["case"], row["dtype"], row["shape"], row["peer"]) for row in rows] == [
        (f"product {form}", form, f"{count}x64x256", peer)
        for form in (*BLOCK_BYTES, "fp8") for count in COUNTS for peer in ("sapper", "llama")
        if (form, peer) != ("fp8", "llama")]
    for row in rows:
        count = int(row["shape"].split("x")[0])
        elements, size = BLOCK_BYTES.get(row["dtype"], (1, 1))
        assert row["operations"] == 2 * count * 64 * 256
        assert row["bytes"] == pytest.approx(64 * 256 // elements * size, rel=0.03)
        assert row["percent_of_floor"] > 0 and (row["ratio_to_best_peer"] or 1) > 0
        if row["dtype"] == "fp8":
            in_f32 = count <= 16 or Workspace(1, 1).widens_blocks()
            assert row["products"] == ("f32" if in_f32 else "bf16")
        else:
            assert row["products"] == ("bf16" if count > 16 and Workspace(1, 1).rounds_many() else "i8")
    assert "repack" not in capfd.readouterr().err


@NEEDS_LLAMA
def test_quantized_mixtures_beside_llama(tmp_path: Path, small_products: None) -> None:
    rows = run_json(tmp_path / "r.json", "quantized", threads=2, against="llama", case="mixture")
    forms = ("Q8_0", "Q4_0", "Q4_K", "bf16", "bf16 rounded")
    assert [(row["case"], row["dtype"], row["shape"], row["peer"]) for row in rows] == [
        (f"mixture {form}", dtype, f"{count} x 2 of 8", peer) for form in forms for count in COUNTS
        for dtype, peer in ((form, "sapper"), (form.removesuffix(" rounded"), "llama"))]
    for row in rows:
        count, form = int(row["shape"].split()[0]), row["case"].removeprefix("mixture ")
        assert row["operations"] == 2 * count * 2 * 3 * 256 * 256
        elements, size = BLOCK_BYTES.get(form, (1, 2))
        met = len(set(bench_quantized._routing(count).flat))
        assert row["bytes"] == pytest.approx(met * 3 * 256 * 256 // elements * size, rel=0.03)
        if form == "bf16":
            assert row["products"] == "f32"
        elif form == "bf16 rounded":
            assert row["products"] == ("bf16" if count > 8 or Workspace(1, 1).packs_pairs() else "f32")
        else:
            assert row["products"] == ("bf16" if count == 512 and Workspace(1, 1).rounds_many() else "i8")


def test_quantized_products_without_a_peer(tmp_path: Path, small_products: None) -> None:
    (row,) = run_json(tmp_path / "r.json", "quantized", threads=1, against="", case="product Q4_0 16x")
    assert (row["case"], row["shape"], row["peer"]) == ("product Q4_0", "16x64x256", "sapper")
    assert row["ratio_to_best_peer"] is None


@pytest.mark.parametrize("wrong", [np.nan, 1.0])
@pytest.mark.parametrize("who", ["sapper", pytest.param("llama", marks=NEEDS_LLAMA)])
def test_wrong_products_are_not_timed(who: str, wrong: float, small_products: None,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench_quantized.Products.work

    def spoiled(*given: Any) -> Any:
        work = real(*given)
        if who == "sapper":
            work.expected[-1, -1] += wrong
        else:
            runs, result = work.peers["llama"]
            work.peers["llama"] = runs, lambda: result() + np.float32(wrong)
        return work

    monkeypatch.setattr(bench_quantized.Products, "work", spoiled)
    said: list[str] = []
    given = settings(against=("llama",) if who == "llama" else (), pattern="product Q8_0 16x", say=said.append)
    assert not list(bench_quantized.quantized_rows(given)) and given.failed == 1
    assert said[0].startswith(f"error: product Q8_0 16x64x256: RuntimeError: {who} is off by")


def test_each_call_of_a_mixture_reads_other_experts(small_products: None) -> None:
    """As many sets as outlast the last cache; of few tokens a layer has several."""
    given = settings(pattern="mixture")
    subject = bench_quantized.Mixtures("Q8_0", (1, 16), given)
    cache_bytes = given.peaks(1).level_bytes["L3"] >> 6
    for count in (1, 16):
        chosen, work = bench_quantized._routing(count), subject.work(count, 1)
        assert chosen.shape == (count, 2) and all(len(set(row)) == 2 for row in chosen.tolist())
        sets = bench_quantized._sets(chosen)
        assert sets == {1: 4, 16: 1}[count] and len(work.programs) == sets * len(subject.model.weights.layers)
        assert len(work.programs) * work.read_bytes >= 2 * cache_bytes
        results = []
        for program in work.programs[:: len(subject.model.weights.layers)]:
            program()
            results.append(work.result.copy())
        assert all(np.abs(one - results[0]).max() > 0.1 for one in results[1:])     # those of other experts


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.parametrize("tiles", [True, pytest.param(False, marks=pytest.mark.skipif(
    Workspace(1, 1).has_tiles(), reason="llama.cpp would die of it in another test"))])
def test_mixtures_in_bf16_beside_torch(tiles: bool, tmp_path: Path, small_products: None,
                                       monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """But not where it releases the tile registers that llama.cpp has configured."""
    monkeypatch.setattr(Workspace, "has_tiles", lambda self: tiles)
    rows = run_json(tmp_path / "r.json", "quantized", threads=1, against="torch", case="mixture bf16 16 x")
    assert [(row["case"], row["peer"]) for row in rows] == [
        ("mixture bf16", peer) for peer in ("sapper", "torch")[: 1 if tiles else 2]]
    assert ("torch is left out of mixtures" in capsys.readouterr().err) == tiles
    rows = run_json(tmp_path / "r.json", "quantized", threads=1, against="torch", case="mixture Q8_0 16 x")
    assert [row["peer"] for row in rows] == ["sapper"]


@NEEDS_LLAMA
def test_a_format_that_ends_llama_runs_without_its_layouts(small_products: None,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_ggml.survives(8, 0, 32, 256)
    assert not bench_ggml.survives(4321, 0, 32, 256)    # no format: ggml ends the process
    made: list[bool] = []

    class Noted(bench_ggml.Ggml):
        def __init__(self, repacks: bool = True) -> None:
            made.append(repacks)
            super().__init__(repacks)

    monkeypatch.setattr(bench_ggml, "Ggml", Noted)
    monkeypatch.setattr(bench_ggml, "survives", lambda *given: False)
    said: list[str] = []
    given = settings(against=("llama",), pattern="product Q4_0 1x", say=said.append)
    (rows,) = bench_quantized.quantized_rows(given)
    assert made == [False] and [row.peer for row in rows] == ["sapper", "llama"]
    assert said == ["llama.cpp ends with Q4_0 in layouts that it makes for this processor: it runs without"]


@pytest.mark.parametrize("form", FORMS)
def test_a_model_with_random_weights_caches_as_a_loaded_one_does(form: str) -> None:
    config = from_json({**untrained.SMALL_V2, "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1}, "the test")
    made = untrained.untrained(config, form)
    assert made.cache_dtype == DeepseekModel(Path(), config, made.weights, None, form, "deepseek").cache_dtype
    session, narrow = made.session(16), form == "file" or "rounded" in form
    assert session.state()["layer 0 latents"].dtype.name == ("bfloat16" if narrow else "float32")
    kernels = {getattr(kernel, "name", "") for _, steps in session.step_sections() for kernel, _ in steps}
    assert ("latent_attention_decode_rounded" in kernels) == (narrow and Workspace(1, 1).packs_pairs())


def test_peaks(tmp_path: Path) -> None:
    rows = run_json(tmp_path / "r.json", "peaks", threads=1)
    assert {"peak multiply-add", "peak read L1", "peak read DRAM", "peak copy"} <= {row["case"] for row in rows}
    assert all(row["peer"] == "sapper" and row["rate"] > 0 and row["median_s"] is None for row in rows)


def test_calls(tmp_path: Path) -> None:
    rows = run_json(tmp_path / "r.json", "call", threads=1, against="numpy")
    assert [(row["case"], row["peer"], row["unit"]) for row in rows] == [
        ("call", "sapper", "us"), ("call", "numpy", "us"), ("bound call", "sapper", "us"),
        ("program call", "sapper", "us")]
    assert rows[0]["rate"] == pytest.approx(rows[0]["median_s"] * 1e6, rel=1e-4)


def test_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_threads, "CALLS", 100)  # barriers on a CPU that others use take a millisecond each
    rows = run_json(tmp_path / "r.json", "threads", threads=2, against="numpy")
    assert [(row["case"], row["threads"], row["peer"], row["unit"]) for row in rows] == [
        ("call in a program", 1, "sapper", "us"), ("call in a program", 2, "sapper", "us"),
        ("barrier", 2, "sapper", "us"), ("matmul alone", 2, "sapper", "GFLOP/s"),
        ("matmul alone", 2, "numpy", "GFLOP/s"), ("matmul beside a busy process", 2, "sapper", "GFLOP/s"),
        ("matmul beside a busy process", 2, "numpy", "GFLOP/s")]
    one, two, barrier = (row["median_s"] for row in rows[:3])
    assert 0 < one < 1e-4 and barrier == pytest.approx(max(0.0, two - one), rel=1e-3, abs=1e-9)


def test_the_busy_process_ends_whatever_happens() -> None:
    with pytest.raises(ValueError, match="a case fails"), bench_threads.busy_process() as neighbour:
        assert neighbour.poll() is None
        raise ValueError("a case fails")
    assert neighbour.returncode is not None


def test_compilation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPPER_CACHE_DIR", str(tmp_path / "mine"))
    rows = run_json(tmp_path / "r.json", "compile", threads=1, case="compile vector_add")
    assert [row["case"] for row in rows] == [
        "compile vector_add", "compile, median of all", "compile, worst", "from the disk cache, median",
        "from the disk cache, worst"]
    assert rows[2]["shape"] == "vector_add"
    assert rows[3]["median_s"] < rows[0]["median_s"]
    assert os.environ["SAPPER_CACHE_DIR"] == str(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_the_import_is_timed(tmp_path: Path) -> None:
    rows = run_json(tmp_path / "r.json", "compile", threads=1, case="import sapper")
    assert [row["case"] for row in rows] == [
        "import sapper", "import of the runtime, by the first call", "start of Python itself"]


def test_compilation_for_other_targets() -> None:
    found = [row for rows in compile_rows(settings(quick=False, pattern="compile vector_add"))
             for row in rows if row.case.startswith("compile for")]
    assert [row.case for row in found] == [
        f"compile for {name}, {which}" for name in COMPILE_TARGETS for which in ("median of all", "worst")]
    assert all(row.median_s is not None and row.median_s > 0 for row in found) and found[-1].shape == "vector_add"


def test_the_first_call_is_timed(tmp_path: Path) -> None:
    rows = run_json(tmp_path / "r.json", "compile", threads=1, case="first call")
    assert [row["case"] for row in rows] == ["first call of a process, from the disk cache"]
    assert 0 < rows[0]["median_s"] < 1


def test_the_start_of_a_model_is_timed(tmp_path: Path) -> None:
    find_smollm2()
    rows = run_json(tmp_path / "r.json", "compile", threads=1, case="smollm2 f")
    assert [(row["case"], row["unit"]) for row in rows] == [
        ("smollm2 from the disk cache", "ms"), ("smollm2 first token", "ms")]
    assert 0 < rows[0]["median_s"] < rows[1]["median_s"] < 60


def test_every_library_kernel_is_in_a_suite() -> None:
    suites = {suite: jobs_of(suite, quick=True) for suite in ("matmul", "matvec", "rows", "attention", "others")}
    assert {job.entry.name for jobs in suites.values() for job in jobs} == {entry.name for entry in library()}
    assert all(job.cold == (suite == "matvec") for suite, jobs in suites.items() for job in jobs)
    assert {job.entry.name for job in suites["rows"]} >= {
        "softmax", "rms_norm", "swiglu", "rope_half_split", "rotate_and_cache_bf16", "narrow_bf16", "quantize_rows",
        "quantize_groups_32_128", "quantize_fp8"}
    assert {"1x576x1536", "49152x576"} <= {job.case.label for job in jobs_of("matvec", quick=False)}


def test_cold_cases_go_through_copies_of_the_weights_only() -> None:
    entry = next(e for e in library() if e.name == "matvec_f32")
    import numpy

    arguments = operands.placed(entry.make_arguments(numpy.random.default_rng(0), {"N": 64, "K": 64}))
    sets = operands.copies(arguments, True, 3 * arguments["w"].nbytes)
    assert len(sets) == 6
    first = sets[0]["w"].ctypes.data    # one after another, as weights of a model lie
    assert [one["w"].ctypes.data for one in sets] == [first + n * arguments["w"].nbytes for n in range(6)]
    assert all((one["w"] == arguments["w"]).all() and one["x"] is arguments["x"] for one in sets)
    assert operands.copies(arguments, False, 1 << 20) == [arguments]


def test_rows_of_a_case() -> None:
    def timing(seconds: float) -> Timing:
        return Timing(seconds, seconds, seconds, 1, 1)

    rows = rows_of("c", "f32", "8", 2, {"sapper": timing(0.5), "numpy": timing(2.0), "torch": timing(1.0)}, 0.25, 10.0,
                   "GB/s", {"torch": "bf16"})
    assert rows == [
        Row("c", "f32", "8", 2, "sapper", 0.5, 20.0, "GB/s", 50.0, 2.0),
        Row("c", "f32", "8", 2, "numpy", 2.0, 5.0, "GB/s", 12.5, 0.5),
        Row("c", "bf16", "8", 2, "torch", 1.0, 10.0, "GB/s", 25.0, 1.0),
    ]
    (alone,) = rows_of("c", "", "", 1, {"sapper": timing(0.002)}, None, None, "ms")
    assert (alone.rate, alone.percent_of_floor, alone.ratio_to_best_peer) == (2.0, None, None)
    assert [f.name for f in fields(Row)] == KEYS


def test_the_floor_of_a_case_is_measured_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings()
    measured: list[list[str]] = []

    def fake(self: Settings, contestants: dict[str, Any], threads: int = 1) -> dict[str, Timing]:
        measured.append(list(contestants))
        return {name: Timing(2.0, 2.0, 2.0, 1, 1) for name in contestants}

    monkeypatch.setattr(Settings, "measure", fake)
    base = given.peaks(1)
    read, copy = given.memory_probes(1)
    ours = {"sapper": lambda: None}
    timings, found = bench_suites.with_floor(ours, base, given, reads=True, writes=True)
    assert list(timings) == ["sapper"]
    assert measured[-1] == ["sapper", "(read)", "(copy)"]
    assert (found.read["DRAM"], found.copy_streaming) == (read.work / 2.0, copy.work / 2.0)
    assert found.read["L1"] == base.read["L1"]
    _, found = bench_suites.with_floor(ours, base, given)
    assert measured[-1] == ["sapper"] and found is base
    _, found = bench_suites.with_floor(ours, base, given, products=("f32", "i8", "f32"))
    integers = base.fastest("i8")
    assert measured[-1] == ["sapper", "(f32_flops)", f"({integers})"]
    for products, name in (("f32", "f32_flops"), ("i8", integers)):
        probe, repeats = given.product_probe(products, base)
        assert getattr(found, name) == probe.work * repeats / 2.0
        assert found.arithmetic(products) == getattr(found, found.fastest(products)) >= getattr(found, name)
    assert found.read == base.read


@pytest.mark.parametrize(("name", "probed"), [("matmul_nn_f32", True), ("vector_add", False)])
def test_products_are_measured_with_a_case_that_is_mostly_of_them(name: str, probed: bool,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = Settings.product_probe

    def probe(self: Settings, products: str, found: Any) -> tuple[Any, int]:
        asked.append(products)
        return real(self, products, found)

    monkeypatch.setattr(Settings, "product_probe", probe)
    jobs = {job.entry.name: job for suite in ("matmul", "others") for job in jobs_of(suite, quick=True)}
    bench_suites.case_rows(jobs[name], 1, settings())
    assert asked == ["f32"] * probed


def test_a_peer_that_is_missing_takes_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    (row,) = run_json(tmp_path / "r.json", "others", threads=1, against="torch,mkl", case="vector_add")
    assert row["peer"] == "sapper"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "pip install torch" in lines[0] and "'mkl'" in lines[1]


def test_what_failed_is_told_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    real = bench_suites.case_rows

    def failing(job: Any, threads: int, given: Settings) -> list[Row]:
        if job.entry.name == "swiglu":
            raise RuntimeError("it is wrong")
        return real(job, threads, given)

    monkeypatch.setattr(bench_suites, "case_rows", failing)
    assert run_bench("rows", 1, "", quick=True, case="*[gw][ei][lg]*") == 1  # swiglu and gelu
    printed = capsys.readouterr()
    assert "error: swiglu 512x1536: RuntimeError: it is wrong" in printed.err
    assert "gelu" in printed.out


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    job = next(job for job in jobs_of("others", quick=True) if job.entry.name == "vector_add")
    monkeypatch.setattr(type(job.entry), "compare", lambda self, arguments, expected: "c[0] is wrong")
    with pytest.raises(RuntimeError, match="wrong"):
        bench_suites.case_rows(job, 1, settings())


@pytest.mark.parametrize(("results", "first", "wrong"), [
    ([1.0, np.nan], np.nan, False),         # NaN is what is computed
    ([1.0, None], np.nan, True),            # not written
    ([2.0, np.nan], 3.0, True),             # what was an input as well had none
    ([2.0, 4.0], 3.0, False)])
def test_what_a_large_case_leaves_unwritten_is_told_from_what_is_nan(results: list[float | None], first: float,
                                                                    wrong: bool) -> None:
    out = np.full(2, first, np.float32)

    def call() -> None:
        for place, result in enumerate(results):
            if result is not None:
                out[place] = result

    found = bench_suites.unwritten(call, {"out": out, "count": np.zeros(2, np.int32)})
    assert (found is not None) == wrong
    assert found is None or found.startswith("out holds NaN")


def test_ctrl_c_prints_and_writes_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(suite: str, given: Settings) -> Iterator[list[Row]]:
        yield [Row("first", "f32", "8", 1, "sapper", 0.1, 1.0, "GB/s")]
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "suite_rows", interrupted)
    assert run_bench("rows", 1, "", json_file=str(tmp_path / "r.json")) == 130
    assert "first" in capsys.readouterr().out
    assert [row["case"] for row in json.loads((tmp_path / "r.json").read_text())] == ["first"]


@pytest.mark.parametrize(("suite", "threads", "status", "message"), [
    ("speed", 1, 2, "found 'speed'; expected one of peaks"), ("rows", 0, 2, "found 0"),
    ("rows", 1, 1, "no case contains")])
def test_misuse(suite: str, threads: int, status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench(suite, threads, "", quick=True, case="no such case") == status
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench("peaks", 1, "", json_file=str(tmp_path / "none" / "r.json"), quick=True) == 1
    assert "No such file" in capsys.readouterr().err
    os.mkfifo(tmp_path / "pipe")
    assert run_bench("peaks", 1, "", json_file=str(tmp_path / "pipe"), quick=True) == 1
    assert "found no plain file" in capsys.readouterr().err and not (tmp_path / "pipe").is_file()


def test_numpy_is_left_to_choose_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OPENBLAS_L2_SIZE", "512")
    said: list[str] = []
    bench_suites.prepare_peers(3, said.append)
    assert "OPENBLAS_CORETYPE" not in os.environ and "OPENBLAS_L2_SIZE" not in os.environ
    assert os.environ["OPENBLAS_NUM_THREADS"] == "3"
    assert len(said) == ("numpy" in sys.modules)


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_report", REPORT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_report(report: ModuleType, tmp_path: Path) -> None:
    rows = [Row("m", "f32", "8x8", 1, "sapper", 0.5, 2.0, "GFLOP/s", 50.0, 2.0),
            Row("m", "f32", "8x8", 1, "numpy", 1.0, 1.0, "GFLOP/s", 25.0, 1.0)]
    (tmp_path / "r.json").write_text(bench.to_json(rows))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):  # twice gives the same
        assert report.main([str(tmp_path / "r.json"), str(readme)]) == 0
        text = readme.read_text()
        assert "| m | f32 | 8x8 | 1 | 500 ms | 2 GFLOP/s | 50 % | 2.00 |" in text
        assert text.startswith(f"before\n{report.BEGIN}\n") and text.endswith(f"{report.END}\nafter\n")
        assert "old" not in text
    assert report.BEGIN in REPORT.with_name("README.md").read_text()


def test_a_run_that_is_killed_leaves_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(suite: str, given: Settings) -> Iterator[list[Row]]:
        yield [Row("first", "f32", "8", 1, "sapper", 0.1, 1.0, "GB/s")]
        raise SystemExit(9)

    monkeypatch.setattr(bench, "suite_rows", killed)
    with pytest.raises(SystemExit):
        run_bench("rows", 1, "", json_file=str(tmp_path / "r.json"))
    assert [row["case"] for row in json.loads((tmp_path / "r.json").read_text())] == ["first"]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_piped_table_has_a_line_for_each_case() -> None:
    names = "deepseek-v2-lite 4 layers prefill", "bf16 rounded", "1024x4096x16384 of 64 experts"
    rows = [Row(*names, 2, peer, 1e-3, 1.0, "GB/s") for peer in ("sapper", "numpy", "torch", "llama")]
    out = StringIO()
    print_table(rows, Console(highlight=False, width=bench.PIPED_WIDTH, file=out))
    assert len(out.getvalue().splitlines()) == 2


def test_all_runs_pytorch_before_llama_multiplies_on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """`deepseek` has PyTorch's last product, and it and what follows llama.cpp's: it dies of released tiles."""
    ran: list[str] = []
    for name in ("peak_rows", "call_rows", "library_rows"):
        monkeypatch.setattr(bench_suites, name, lambda *given: ran.append("others") or iter(()))
    monkeypatch.setattr(bench_threads, "thread_rows", lambda given: iter(()))
    monkeypatch.setattr(bench_compile, "compile_rows", lambda given: iter(()))
    monkeypatch.setattr(bench_models, "deepseek_rows", lambda given: ran.append("deepseek") or iter(()))
    monkeypatch.setattr(bench_models, "model_rows", lambda given: ran.append("model") or iter(()))
    monkeypatch.setattr(bench_quantized, "quantized_rows", lambda given: ran.append("quantized") or iter(()))
    monkeypatch.setattr(bench_batch, "batch_rows", lambda given: ran.append("batch") or iter(()))
    monkeypatch.setattr(bench_train, "train_rows", lambda given: ran.append("train") or iter(()))
    assert not list(bench_suites.suite_rows("all", settings()))
    assert ran[-5:] == ["train", "deepseek", "quantized", "model", "batch"] and set(ran[:-5]) == {"others"}


def test_steps_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside PyTorch's where it is; of small models in the place of both."""
    path = small_models.write_gguf(tmp_path / "small.gguf", small_models.random_weights())
    monkeypatch.setattr(bench_train, "_smollm2", lambda folder, settings: open_checkpoint(str(path)))
    monkeypatch.setattr(bench_train, "WIDTHS", bench_train.WIDTHS | {
        "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32, "vocab_size": 512})
    monkeypatch.setattr(bench_train, "QUICK_TOKENS", 16)
    rows = run_json(tmp_path / "r.json", "train", threads=1, against="torch")
    peers = ("sapper", "torch")[: 1 + (importlib.util.find_spec("torch") is not None)]
    assert [(row["case"], row["shape"], row["unit"], row["peer"]) for row in rows] == [
        (name, "1 x 16", "tokens/s", peer)
        for name in ("smollm2 train step", "smollm2 train step, lora 16", "deepseek-v2 train step") for peer in peers]
    assert all(0 < row["percent_of_floor"] < 150 for row in rows)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.parametrize("lora", [None, Lora(4, 8.0)], ids=["whole", "adapters"])
def test_pytorch_trains_the_same_model(lora: Lora | None) -> None:
    trainer: Any = start(open_checkpoint(str(LLAMA)), 1, 12, threads=1, lora=lora, base="f32")
    recipe = Recipe(3, rate=1e-3, warmup=0, least=1.0, decay=0.0)
    random = np.random.default_rng(0)
    tokens, targets = random.integers(0, trainer.vocabulary, (2, 1, 12)).astype(np.int32)
    peer = bench_train.TorchModel(trainer, 1)
    step = peer.steps(tokens, targets, recipe)
    batch = [peer.torch.tensor(one, dtype=peer.torch.int64) for one in (tokens, targets)]
    for number in (1, 2, 3):
        loss = float(peer.loss(*batch).detach())
        step()
        assert trainer.step(tokens, targets, recipe, number)[0] == pytest.approx(loss, rel=1e-5)


def test_operations_of_a_step_of_training() -> None:
    """Thrice those of the forward pass: of each matrix that a token meets, and of attention."""
    trainer: Any = start(open_checkpoint(str(LLAMA)), 1, 8, threads=1)
    c = trainer.config
    layer = c.features * c.head_features * (2 * c.heads + 2 * c.kv_heads) + 3 * c.features * c.hidden
    met = c.layers * layer + c.vocabulary * c.features
    seen = 36 * c.layers * c.heads * 2 * c.head_features
    assert bench_train.step_operations(trainer, 8) == 3 * 2 * (8 * met + seen)
    trainer = start(open_checkpoint(str(LLAMA)), 1, 8, threads=1, lora=Lora(2, 4.0))
    made = c.head_features * (c.heads + 2 * c.kv_heads)
    sides = 3 * c.features + made + c.head_features * c.heads + c.features + 3 * (c.features + c.hidden)
    lowest = c.features * made + 3 * 2 * c.features
    assert bench_train.step_operations(trainer, 8) == 2 * (8 * (2 * met + 3 * 2 * c.layers * sides - lowest) + 3 * seen)


def test_roofline(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = subprocess.run([sys.executable, str(ROOFLINE), str(tmp_path / "r.json"), str(tmp_path)], capture_output=True,
                          text=True)
    assert done.returncode == 1 and "r.json" in done.stderr
    levels = [Row(f"peak read {level}", "f32", "", 1, "sapper", None, rate, "GB/s")
              for level, rate in (("L1", 200.0), ("L2", 100.0), ("L3", 90.0), ("DRAM", 30.0))]
    case = Row("m", "f32", "8x8", 1, "sapper", 0.5, 2.0, "GFLOP/s", 50.0, 2.0, 1000, 100, "f32")
    (tmp_path / "r.json").write_text(bench.to_json([*levels, case]))
    done = subprocess.run([sys.executable, str(ROOFLINE), str(tmp_path / "r.json"), str(tmp_path)], capture_output=True,
                          text=True)
    assert done.returncode == 1 and "peak multiply-add" in done.stderr
    peak = Row("peak multiply-add", "f32", "", 1, "sapper", None, 100.0, "GFLOP/s")
    (tmp_path / "r.json").write_text(bench.to_json([peak, *levels, case]))
    written = []
    for _ in range(2):  # twice gives the same
        subprocess.run([sys.executable, str(ROOFLINE), str(tmp_path / "r.json"), str(tmp_path)], check=True)
        written.append([(tmp_path / f"roofline.{kind}").read_bytes() for kind in ("png", "svg")])
    assert written[0] == written[1]
    assert written[0][0].startswith(b"\x89PNG")


@pytest.mark.parametrize(("page", "name"), [("README.md", "roofline"), ("other.md", "other-roofline")])
def test_a_page_has_a_roofline_of_its_own(report: ModuleType, tmp_path: Path, page: str, name: str) -> None:
    pytest.importorskip("matplotlib")
    levels = [Row(f"peak read {level}", "f32", "", 1, "sapper", None, 30.0, "GB/s")
              for level in ("L1", "L2", "L3", "DRAM")]
    peak = Row("peak multiply-add", "f32", "", 1, "sapper", None, 100.0, "GFLOP/s")
    (tmp_path / "r.json").write_text(bench.to_json([peak, *levels]))
    (tmp_path / page).write_text(f"{report.BEGIN}\n{report.END}\n")
    assert report.main([str(tmp_path / "r.json"), str(tmp_path / page)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"r.json", page, f"{name}.png", f"{name}.svg"}
    assert "| peak multiply-add | f32 |" in (tmp_path / page).read_text()


@pytest.mark.parametrize("content", ["", "{}", '[{"case": "x"}]', None])
def test_report_of_no_result(report: ModuleType, tmp_path: Path, content: str | None,
                             capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    assert report.main([str(path)]) == 1
    assert "r.json" in capsys.readouterr().err


def test_report_without_marks(report: ModuleType) -> None:
    with pytest.raises(report.ReportError, match="expected both"):
        report.replaced("no marks here", "table")


def test_what_is_changed_in_place_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int, str]] = []
    real = peaks.Peaks.floor_s

    def floor(self: peaks.Peaks, flops: int, read_bytes: int, written_bytes: int, level: str, products: str) -> float:
        asked.append((flops, read_bytes, written_bytes, level))
        return real(self, flops, read_bytes, written_bytes, level, products)

    monkeypatch.setattr(peaks.Peaks, "floor_s", floor)
    jobs = {job.entry.name: job for suite in ("others", "rows") for job in jobs_of(suite, quick=True)}
    bench_suites.case_rows(jobs["vector_add"], 1, settings())
    bench_suites.case_rows(jobs["rope_half_split_in_place"], 1, settings())
    # Each floor is asked for before and after its limits are measured.
    (_, read, written, _), (_, once, none, _) = asked[1::2]
    assert (read, written) == (2 * 4 * 16384, 4 * 16384)
    assert none == 0 and once < jobs["rope_half_split_in_place"].case.bytes


def test_each_row_of_the_table_is_beside_the_peer_of_its_own_turn() -> None:
    """A peer of another dtype is measured again for each dtype of ours."""
    def row(dtype: str, peer: str, seconds: float) -> Row:
        return Row("decode", dtype, "1", 2, peer, seconds, 1 / seconds, "tokens/s")

    console = Console(file=StringIO(), width=120)
    print_table([row("bf16", "sapper", 1.0), row("4 bit", "llama", 2.0), row("4 bit", "sapper", 1.0),
                 row("4 bit", "llama", 3.0)], console)
    lines = [line for line in console.file.getvalue().splitlines() if line.startswith("decode")]
    assert ["2.00 x" in lines[0], "3.00 x" in lines[1]] == [True, True]


def test_the_weights_that_a_token_meets_are_counted(tmp_path: Path) -> None:
    """Of the layers' matrices, all."""
    weights = small_models.random_weights(seed=1)
    model = load_model(small_models.write_gguf(tmp_path / "small.gguf", weights))
    matrices = [one for name, one in weights.items() if name.startswith("blk.") and one.ndim > 1]
    assert bench_models.smollm2_size(model) == sum(one.size for one in matrices)
