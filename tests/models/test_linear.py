"""Matrices in the blocks of a file: the same weights, and the same logits as when they are widened."""

from dataclasses import replace
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

from sapper.kernels.moe_blocks import panel_blocks
from sapper.kernels.quantized import FORMS, matrix
from sapper.models import load
from sapper.models.errors import ModelError
from sapper.models.experts import BlockExperts, DenseExperts
from sapper.models.gguf_file import TensorEntry
from sapper.models.linear import Blocks, Dense
from sapper.models.llama.model import load_model
from sapper.models.raw_blocks import RawBlocks, in_panels, of_one_form
from sapper.models.weights import Loader, Use
from sapper.models.workspace import Workspace, packed_pairs_in
from sapper.runtime.buffers import Arena
from sapper.runtime.program import Program, Rows, Variable
from sapper.targets import host_target, target

from . import small

Kind = gguf.GGMLQuantizationType
KINDS = {"Q4_0": FORMS["q4"], "Q4_1": FORMS["q4m"], "Q5_0": FORMS["q8"], "Q5_1": FORMS["q8m"], "Q8_0": FORMS["q8"]}


def stored(kind: str, rows: int = 32, columns: int = 96, scale: float = 1.0) -> np.ndarray:
    values = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32) * np.float32(scale)
    return gguf.quants.quantize(values, Kind[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_hold_the_weights_of_the_file(kind: str) -> None:
    raw = [stored(kind, rows) for rows in (32, 16)]
    pieces = [RawBlocks.parse(memoryview(r.tobytes()), (len(r), 96), kind) for r in raw]
    made = in_panels(pieces, Arena())
    assert made.form == KINDS[kind]
    assert made.shape == (48, 96) and made.size == 48 * 96
    found = matrix(made.form, *made.parts)
    expected = np.concatenate([gguf.quants.dequantize(r, Kind[kind]) for r in raw])
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)  # gguf rounds the product and the sum to f32


def random_blocks(kind: str, rows: int, powers: tuple[int, int] = (104, 144)) -> np.ndarray:
    """Bytes of 96 columns, every one random, but for scales in f16, which are finite, and codes of powers of two."""
    random, size = np.random.default_rng(rows), gguf.GGML_QUANT_SIZES[Kind[kind]][1]
    raw = random.integers(0, 256, (rows, 3, size), dtype=np.uint8)
    if kind == "MXFP4":
        raw[..., 0] = random.integers(*powers, raw.shape[:2])
    else:
        raw[..., :2] = random.standard_normal(raw.shape[:2]).astype("<f2").view(np.uint8).reshape(*raw.shape[:2], 2)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", ["IQ4_NL", "MXFP4"])
def test_codes_are_held_as_the_whole_numbers_that_they_stand_for(kind: str) -> None:
    """Every number of the file, exactly: the powers of two are all that f16 has."""
    raw = random_blocks(kind, 64)
    made = in_panels([RawBlocks.parse(memoryview(raw.tobytes()), (64, 96), kind)], Arena())
    assert made.form == FORMS["q8"]
    wanted = gguf.quants.dequantize(raw, Kind[kind])
    np.testing.assert_array_equal(matrix(made.form, *made.parts), wanted)
    wide, _, steps = made.widened(Workspace(96))
    Program(steps)()
    np.testing.assert_array_equal(wide, wanted)


def test_quants_take_over_what_no_f16_is_of_a_power_of_two() -> None:
    """Codes of 1 to 12 become 8 times as large; codes of 8 an eighth; those of nothing meet any power."""
    for power, byte, held in ((146, 0x77, True), (147, 0x77, False), (147, 0x55, True), (101, 0x66, True),
                              (100, 0x66, False), (0, 0x08, True), (255, 0x80, True), (103, 0x11, False)):
        raw = random_blocks("MXFP4", 16)
        raw[5, 17:34] = [power, *[byte] * 16]
        found = RawBlocks.parse(memoryview(raw.tobytes()), (16, 96), "MXFP4")
        assert (found is not None) == held, power
        if found is not None:
            np.testing.assert_array_equal(
                matrix(FORMS["q8"], *in_panels([found], Arena()).parts), gguf.quants.dequantize(raw, Kind["MXFP4"]))


@pytest.mark.parametrize("powers", [(104, 144), (100, 150)])
def test_a_loader_keeps_powers_of_two_where_all_are_f16(powers: tuple[int, int]) -> None:
    raw = random_blocks("MXFP4", 32, powers)
    entry = TensorEntry("w", (32, 96), Kind.MXFP4, memoryview(raw.tobytes()))
    made = Loader("here", {"w": entry}, {"w": "w"}, "file").joined([Use("w", 32)], 96)
    assert isinstance(made, Blocks if powers[0] == 104 else Dense)
    if isinstance(made, Dense):
        y = np.empty((32, 96), np.float32)
        Program(made.look_up(np.arange(32, dtype=np.int32), y))()
        np.testing.assert_array_equal(y, entry.read())  # of 4 bits, which bf16 has


def test_what_has_no_kernel_is_not_kept_in_blocks() -> None:
    data = memoryview(stored("Q8_0", 24).tobytes())
    assert RawBlocks.parse(data, (24, 96), "Q8_0") is None, "24 rows are no whole panels"
    assert RawBlocks.parse(memoryview(bytes(16 * 96 * 2)), (16, 96), "F16") is None


def test_forms_with_and_without_minima_are_put_together() -> None:
    raw = {kind: RawBlocks.parse(memoryview(stored(kind, 16).tobytes()), (16, 96), kind) for kind in KINDS}
    wider = of_one_form([raw["Q4_0"], raw["Q4_1"]])
    assert wider is not None and [piece.form.name for piece in wider] == ["q4m", "q4m"]
    found = matrix(FORMS["q4m"], *in_panels(wider[:1], Arena()).parts)
    np.testing.assert_array_equal(found, matrix(FORMS["q4"], *in_panels([raw["Q4_0"]], Arena()).parts))
    wider = of_one_form([raw["Q8_0"], raw["Q5_0"], raw["Q5_1"]])  # the first two have signed quants
    assert wider is not None and [piece.form.name for piece in wider] == ["q8m", "q8m", "q8m"]
    found = matrix(FORMS["q8m"], *in_panels(wider[:2], Arena()).parts)
    np.testing.assert_array_equal(found, matrix(FORMS["q8"], *in_panels([raw["Q8_0"], raw["Q5_0"]], Arena()).parts))
    assert of_one_form([raw["Q4_0"], raw["Q8_0"]]) is None
    assert of_one_form([raw["Q4_0"], None]) is None
    huge = RawBlocks.parse(memoryview(stored("Q4_0", 16, scale=6e4).tobytes()), (16, 96), "Q4_0")
    assert of_one_form([huge, raw["Q4_1"]]) is None, "-8 times a scale near 15000 is no f16"


FORMATS = {
    "q4m": {"attn_q": "Q4_1", "attn_k": "Q4_1", "attn_v": "Q4_0", "attn_output": "Q4_1", "ffn_gate": "Q4_0",
            "ffn_up": "Q4_1", "ffn_down": "Q4_1"},
    "q8": dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"), "Q8_0")
          | {"ffn_down": "Q5_0"},
    "mixed": {"attn_q": "Q4_1", "attn_k": "Q8_0", "attn_output": "Q8_0", "ffn_gate": "Q4_0", "ffn_up": "Q8_0",
              "ffn_down": "F16"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_the_widened_weights(name: str, tmp_path: Path) -> None:
    """A prompt, then tokens one by one; f32 with the same weights is the reference."""
    formats = {f"blk.{i}.{part}.weight": Kind[kind] for i in range(small.LAYERS)
               for part, kind in FORMATS[name].items()}
    path = small.write_gguf(tmp_path / "model.gguf", small.random_weights(3), formats=formats)
    models = [load_model(path, form) for form in ("file-f32", "f32")]
    layer = models[0].weights.layers[0]
    after = layer.feed_forward
    if name == "mixed":  # Parts of different forms are widened together, and what has no kernel alone; bf16 is coarse.
        assert isinstance(layer.qkv, Dense) and isinstance(after.gate, Dense) and isinstance(after.down, Dense)
        assert isinstance(layer.output, Blocks)
        return
    layer_matrices = (layer.qkv, after.gate, after.up, after.down)
    assert all(isinstance(m, Blocks) and m.form.name[:2] == name[:2] for m in layer_matrices)
    sessions = [model.session(64, threads=threads) for model, threads in zip(models, (2, 1), strict=True)]
    for tokens in ([5, 9, 200, 31, 7], [12], [77], [3, 4]):
        for session in sessions:
            session.feed(tokens)
        # The matrices outside the layers are bf16 in one and f32 in the other: 2**-9 of logits of a few units.
        np.testing.assert_allclose(sessions[0].logits, sessions[1].logits, rtol=0.02, atol=0.08)
        assert sessions[0].logits.argmax() == sessions[1].logits.argmax()


BF16 = pytest.mark.skipif(not host_target().has("avx512_bf16"), reason="this processor multiplies no pairs of bf16")


def rounded_blocks(kind: str, rows: int) -> Blocks:
    raw = RawBlocks.parse(memoryview(stored(kind, rows).tobytes()), (rows, 96), kind)
    made = in_panels([raw], Arena())
    return Blocks(made.form, made.parts, rounded=True)


def rounded(x: np.ndarray) -> np.ndarray:
    found: np.ndarray = x.astype(ml_dtypes.bfloat16).astype(np.float64)
    return found


def in_pairs(weights: np.ndarray) -> Dense:
    packed = packed_pairs_in(Arena(), *weights.shape)
    assert packed is not None
    packed.put(0, weights.astype(ml_dtypes.bfloat16))
    return Dense(packed, "bf16", rounded=True)


@BF16
def test_weights_in_pairs_meet_a_row_that_is_rounded() -> None:
    """Alone, after its norm, before gate and up are joined, beside what is added; and rows of them are looked up."""
    random = np.random.default_rng(5)
    weights, ups = random.standard_normal((2, 70, 96), np.float32) / 8
    one, up, work = in_pairs(weights), in_pairs(ups), Workspace(96)
    x, gain, residual = (random.standard_normal(size, np.float32) for size in (96, 96, 70))
    normed = x / np.sqrt(np.mean(x.astype(np.float64) ** 2) + 1e-5) * gain
    plain, after, joined, added = (np.zeros(70, np.float32) for _ in range(4))
    found, tokens = np.zeros((3, 96), np.float32), np.array([0, 69, 33], np.int32)
    Program([*one.apply(x, plain, work), *one.apply_norm(x, gain, 1e-5, after, work),
             *one.apply_norm_swiglu(up, x, gain, 1e-5, joined, work), *one.apply_residual(x, residual, added, work),
             *one.look_up(tokens, found)], threads=2)()
    np.testing.assert_allclose(plain, rounded(weights) @ rounded(x), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(added, residual + rounded(weights) @ rounded(x), rtol=1e-5, atol=1e-4)
    # A number near the middle of two of bf16 may go either way: 2**-8 of one of 96 products near 1 / 8.
    gate = rounded(weights) @ rounded(normed)
    np.testing.assert_allclose(after, gate, rtol=1e-5, atol=2e-3)
    wanted = gate / (1 + np.exp(-gate)) * (rounded(ups) @ rounded(normed))
    np.testing.assert_allclose(joined, wanted, rtol=1e-2, atol=5e-3)
    np.testing.assert_array_equal(found, rounded(weights)[tokens])


@BF16
@pytest.mark.parametrize("count", [1, 3, 21, 40])
def test_weights_in_pairs_meet_rows_that_are_rounded(count: int) -> None:
    random, rows = np.random.default_rng(count), Variable("count", 40)
    weights = random.standard_normal((70, 96), np.float32) / 8
    x, y = random.standard_normal((40, 96), np.float32), np.zeros((40, 70), np.float32)
    steps = in_pairs(weights).apply_rows("matmul_nt", Rows(x, rows), [], [Rows(y, rows)], Workspace(96))
    Program(steps, threads=2)(count=count)
    np.testing.assert_allclose(y[:count], rounded(x[:count]) @ rounded(weights).T, rtol=1e-5, atol=1e-4)
    assert not y[count:].any()


@BF16
def test_weights_are_held_in_pairs_for_who_reads_them_so(tmp_path: Path) -> None:
    """Of a file in bf16, and one in blocks; another processor's code gets them plain."""
    for formats in ({}, FORMATS["q4m"]):
        path = small.write_gguf(tmp_path / "model.gguf", small.random_weights(3), formats={
            f"blk.{i}.{part}.weight": Kind[kind] for i in range(small.LAYERS) for part, kind in formats.items()})
        layers = [load.load_model(path, "bf16-rounded", target=other).weights.layers[0]
                  for other in (None, target("haswell"))]
        paired, plain = ([layer.qkv, layer.output, after.gate, after.up, after.down]
                         for layer in layers for after in [layer.feed_forward])
        assert all(one.in_pairs for one in paired) and not any(one.in_pairs for one in plain)
        for one, other in zip(paired, plain, strict=True):
            np.testing.assert_array_equal(one.weights.unpack(), other.array)


@BF16
def test_experts_in_pairs_meet_rounded_rows() -> None:
    """One token's, and those of several, in f32 or rounded already; as many experts as there are have no rows."""
    random, work = np.random.default_rng(7), Workspace(96)
    gates, ups = random.standard_normal((2, 4, 64, 96), np.float32) / 8

    def experts(wide: np.ndarray) -> DenseExperts:
        panels = wide.astype(ml_dtypes.bfloat16).reshape(4, 2, 32, 48, 2).swapaxes(2, 3)
        return DenseExperts(np.ascontiguousarray(panels), "bf16", rounded=True)

    gate, up, x = experts(gates), experts(ups), random.standard_normal((30, 96), np.float32)
    chosen, shares = np.array([2, 0], np.int32), np.array([0.25, 0.5], np.float32)
    hidden, result, rows = np.zeros((2, 64), np.float32), np.zeros(64, np.float32), x[:2].copy()
    Program([*gate.apply_swiglu(up, chosen, x[0], hidden, work),
             *up.apply_weighted(chosen, shares, rows, np.ones(64, np.float32), result, work)], threads=2)()
    ranges = np.array([0, 9, 9, 9], np.int32), np.array([9, 9, 9, 30], np.int32)
    wanted = rounded_groups(gates, x, ranges, ups)
    alone = np.zeros(1, np.int32), np.ones(1, np.int32)
    for e, made in zip(chosen, hidden, strict=True):
        np.testing.assert_allclose(made, rounded_groups(gates[[e]], x[:1], alone, ups[[e]])[0], rtol=1e-4, atol=1e-4)
    each = [rounded(ups[e]) @ rounded(row) for e, row in zip(chosen, rows, strict=True)]
    np.testing.assert_allclose(result, 1 + shares @ np.array(each), rtol=1e-5, atol=1e-4)
    count = Variable("count", 30)
    for given in (np.float32, ml_dtypes.bfloat16):
        assert gate.rounds(2, 30, work) and gate.rounds(2, 1, work)
        made = np.zeros((30, 64), given)
        Program(gate.apply_groups([up], Rows(x.astype(given), count), ranges, Rows(made, count), work), threads=2)()
        relative = 1e-4 if given is np.float32 else 2.0**-8
        np.testing.assert_allclose(made.astype(np.float64), wanted, rtol=relative, atol=1e-4)
    summed = np.zeros((30, 64), np.float32)
    Program(gate.apply_groups([], Rows(x, count), ranges, Rows(summed, count), work), threads=2)()
    np.testing.assert_allclose(summed, rounded_groups(gates, x, ranges), rtol=1e-5, atol=1e-4)


@BF16
@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_weights_may_be_rounded_to_bf16(kind: str, near: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product of what both are rounded to, whatever part of the weights is at hand, and by whom."""
    monkeypatch.setattr("sapper.models.rounded.PACKED_BYTES", 2 * 96 * 64)
    monkeypatch.setattr("sapper.models.rounded.NEAR_BYTES", 2 * 70 * 96 - (not near))
    blocks, random = rounded_blocks(kind, 160), np.random.default_rng(2)
    x, residual = random.standard_normal((70, 96), np.float32), random.standard_normal((70, 160), np.float32)
    y, count = np.zeros((70, 160), np.float32), Variable("count", 70)
    steps = blocks.apply_rows("matmul_nt_residual", Rows(x, count), [], [Rows(residual, count), Rows(y, count)],
                              Workspace(96))
    assert len(steps) == 1 + (1 if near else 2 * 3), "64 rows of the weights at a time, and 32"
    program = Program(steps, threads=2)
    for rows in (70, 17):
        y[:] = 0
        program(count=rows)
        wide, narrow = (part.astype(ml_dtypes.bfloat16).astype(np.float64)
                        for part in (matrix(blocks.form, *blocks.parts), x[:rows]))
        np.testing.assert_allclose(y[:rows], residual[:rows] + narrow @ wide.T, rtol=1e-5, atol=1e-4)
        assert not y[rows:].any()


def test_few_rows_are_quantised() -> None:
    count = Variable("count", 8)
    x, y = np.zeros((8, 96), np.float32), np.zeros((8, 32), np.float32)
    work = Workspace(96)
    steps = rounded_blocks("Q4_0", 32).apply_rows("matmul_nt", Rows(x, count), [], [Rows(y, count)], work)
    assert [kernel.name for kernel, _ in steps] == ["quantize_groups_32_32", "matmul_q4_by32"]


@pytest.mark.parametrize(("name", "rows", "rounds"), [("sapphirerapids", 32, True), ("sapphirerapids", 24, False),
                                                      ("zen5", 64, False)])
def test_many_rows_are_rounded_where_tile_registers_multiply_bf16(name: str, rows: int, rounds: bool) -> None:
    """And quantised elsewhere, as few are; so are all in a file, which has one program for both."""
    made = in_panels([RawBlocks.parse(memoryview(stored("Q4_0", 32).tobytes()), (32, 96), "Q4_0")], Arena())
    blocks, count = Blocks(made.form, made.parts), Variable("count", rows)
    x, y = np.zeros((rows, 96), np.float32), np.zeros((rows, 32), np.float32)
    for chooses in (True, False):
        work = Workspace(96, 2)
        work.target, work.chooses = target(name), chooses
        steps = blocks.apply_rows("matmul_nt", Rows(x, count), [], [Rows(y, count)], work)
        names = [kernel.name for kernel, _ in steps]
        assert ("matmul_near_q4" in names) == (rounds and chooses), names
        assert blocks.rounds(work) == (name == "sapphirerapids" and chooses)


def rounded_groups(
    wide: np.ndarray, x: np.ndarray, ranges: tuple[np.ndarray, np.ndarray], ups: np.ndarray | None = None
) -> np.ndarray:
    """What experts [E, N, K] give for their rows, all of it rounded to bf16 first; with ups: SwiGLU of both."""
    y = np.zeros((len(x), wide.shape[1]))
    narrow = x.astype(ml_dtypes.bfloat16).astype(np.float64)
    for e, (first, last) in enumerate(zip(*ranges, strict=True)):
        gate, *up = (narrow[first:last] @ one[e].astype(ml_dtypes.bfloat16).astype(np.float64).T
                     for one in (wide, ups) if one is not None)
        y[first:last] = gate / (1 + np.exp(-gate)) * up[0] if up else gate
    return y


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_weights_of_experts_may_be_rounded_to_bf16(kind: str) -> None:
    """The product of what both are rounded to, of experts with some rows and with none, on two threads."""
    raw = [RawBlocks.parse(memoryview(stored(kind, rows).tobytes()), (rows, 96), kind) for rows in (192, 384)]
    gates, ups = (BlockExperts(replace(in_panels([piece], Arena()), rounded=True), 3)
                  for piece in (raw[0], raw[1].split(2, 0)[1]))
    wide = [matrix(one.together.form, *one.together.parts).reshape(3, 64, 96) for one in (gates, ups)]
    x, count = np.random.default_rng(2).standard_normal((100, 96)).astype(ml_dtypes.bfloat16), Variable("count", 100)
    first, last, work = np.zeros(3, np.int32), np.zeros(3, np.int32), Workspace(96)
    for others, kernel, dtype, relative in (([], "grouped_rounded", np.float32, 1e-5),
                                            ([ups], "grouped_swiglu_rounded", ml_dtypes.bfloat16, 2.0**-8)):
        y = np.zeros((100, 64), dtype)
        steps = gates.apply_groups(others, Rows(x, count), (first, last), Rows(y, count), work)
        assert [one.name for one, _ in steps] == [f"{kernel}_{gates.together.form.name}"]
        program = Program(steps, threads=2)
        for rows, ends in ((100, (45, 45, 100)), (17, (0, 16, 17)), (0, (0, 0, 0))):
            y[:], last[:], first[:] = 0, ends, (0, *ends[:2])
            program(count=rows)
            wanted = rounded_groups(wide[0], x[:rows], (first, last), wide[1] if others else None)
            np.testing.assert_allclose(y[:rows].astype(np.float64), wanted, rtol=relative, atol=1e-4)
            assert not y[rows:].any()


def test_rounded_experts_may_meet_rows_in_f32() -> None:
    """As where others of the mixture do not round. Rows are not copied, so results must not lie where they do."""
    weights = np.zeros((2, 1, 64, 32), ml_dtypes.bfloat16)
    experts, count = DenseExperts(weights, "bf16", rounded=True), Variable("count", 64)
    weights[:] = np.random.default_rng(1).standard_normal(weights.shape)
    x, y = np.random.default_rng(2).standard_normal((64, 64), np.float32), np.zeros((64, 32), np.float32)
    ranges = np.array([0, 40], np.int32), np.array([40, 64], np.int32)
    steps = experts.apply_groups([], Rows(x, count), ranges, Rows(y, count), Workspace(64))
    assert [kernel.name for kernel, _ in steps] == ["grouped_matmul_bf16"] and not experts.copies
    Program(steps)()
    wide = weights[:, 0].astype(np.float64)
    np.testing.assert_allclose(y, np.concatenate([x[:40] @ wide[0], x[40:] @ wide[1]]), rtol=1e-5, atol=1e-4)


def test_few_rows_of_experts_are_quantised() -> None:
    count = Variable("count", 95)
    x, y = np.zeros((95, 96), np.float32), np.zeros((95, 64), np.float32)
    experts = BlockExperts(rounded_blocks("Q4_0", 192), 3)
    ranges = np.zeros(3, np.int32), np.zeros(3, np.int32)
    steps = experts.apply_groups([], Rows(x, count), ranges, Rows(y, count), Workspace(96))
    assert [kernel.name for kernel, _ in steps] == ["quantize_groups_32_32", "grouped_q4_by32"]


@pytest.mark.parametrize("exact", [True, False])
def test_rows_of_experts_may_lie_apart(exact: bool) -> None:
    """As those do that are a multiple of 2 KiB long."""
    experts = BlockExperts(replace(rounded_blocks("Q4_0", 192), rounded=False, exact=exact), 3)
    ranges, work = (np.array([0, 3, 3], np.int32), np.array([3, 3, 7], np.int32)), Workspace(96)
    found = []
    for between in (0, 16):
        x, y = (np.zeros((7, columns + between), np.float32)[:, :columns] for columns in (96, 64))
        x[:], count = np.random.default_rng(4).standard_normal((7, 96), np.float32), Variable("count", 7)
        Program(experts.apply_groups([experts], Rows(x, count), ranges, Rows(y, count), work))()
        found.append(y)
    assert found[0].all()
    np.testing.assert_array_equal(*found)


def test_groups_of_rows_do_not_lie_pages_apart() -> None:
    """Those of a row would be in one set of the first cache."""
    work = Workspace(32)
    for rows in (1, 100, 128, 512, 3072):
        for group in (32, 64, 128):
            q, scales, sums, starts = work.quants(rows, 4 * group, 32, group)
            assert q.strides[0] % 4096 and q.shape[1] == scales.shape[1] == sums.shape[2] == starts.shape[2] >= rows
        q, *rest = work.super_quants(rows, 1024)
        assert q.strides[0] % 4096 and all(rows <= one.shape[1 + (one.ndim == 3 and one is rest[-1])] for one in rest)
    assert work.quants(1, 64, 32, 32)[0].shape == (2, 1, 32)    # kernels of one row know that it is one


@pytest.mark.parametrize("panels", [1, 2, 7, 12, 48, 64, 88, 128])
def test_panels_are_parted_into_equal_blocks(panels: int) -> None:
    blocks, size = panel_blocks(panels)
    assert blocks * size == panels and size in (1, 2, 4, 8)
    assert size == 1 or blocks >= 12
    for workers in (1, 2, 3, 16):
        blocks, size = panel_blocks(panels, workers)
        assert blocks * size == panels
        assert -(-blocks // workers) * workers <= 1.1 * blocks or size == 1, "workers share them evenly"
    assert panel_blocks(panels, 1) == (1, panels)
    assert panels % 2 or panel_blocks(panels, 2) == (2, panels // 2)


@BF16
def test_rounded_rows_leave_logits_nearer_than_quantised_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workspace, "rounds_many", lambda self: False)      # as elsewhere than on tile registers
    formats = {f"blk.{i}.{part}.weight": Kind[kind] for i in range(small.LAYERS)
               for part, kind in FORMATS["q8"].items()}
    path = small.write_gguf(tmp_path / "model.gguf", small.random_weights(3), formats=formats)
    logits = {}
    for form in ("file-f32", "file", "file-rounded"):
        session = load_model(path, form).session(64)
        session.feed([7 * n % 250 for n in range(60)])
        logits[form] = session.logits.copy()
    errors = {form: float(np.square(logits[form] - logits["file-f32"]).mean()) for form in ("file", "file-rounded")}
    assert 0 < errors["file-rounded"] < errors["file"]


def test_what_multiplies_no_pairs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workspace, "packs_pairs", lambda self: False)
    count = Variable("count", 64)
    x, y = np.zeros((64, 96), np.float32), np.zeros((64, 32), np.float32)
    with pytest.raises(ModelError, match="AVX512-BF16"):
        rounded_blocks("Q4_0", 32).apply_rows("matmul_nt", Rows(x, count), [], [Rows(y, count)], Workspace(96))


def test_under_the_interpreter(tmp_path: Path) -> None:
    formats = {f"blk.{i}.{part}.weight": Kind[kind] for i in range(small.LAYERS)
               for part, kind in FORMATS["q4m"].items()}
    model = load_model(small.write_gguf(tmp_path / "m.gguf", small.random_weights(3), formats=formats), "file")
    sessions = model.session(32, interpret=True), model.session(32)
    for tokens in ([5, 9, 20], [12]):
        for session in sessions:
            session.feed(tokens)
        np.testing.assert_allclose(sessions[0].logits, sessions[1].logits, rtol=1e-4, atol=1e-4)
