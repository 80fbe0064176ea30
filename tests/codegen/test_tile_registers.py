"""Tile registers end to end: machine code where this processor has them, elsewhere the meanings of the rows."""

from __future__ import annotations

from functools import partial

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper import bf16, f32, i8, i32, u8
from sapper.codegen.compile import compile_lane
from sapper.codegen.pipeline import facts_of, finish_lane, panels_of_kernel, to_lane
from sapper.kernels.quantized import FORMS, product_kernels
from sapper.lane.fuse import fuse
from sapper.runtime.packed import pack_array
from sapper.targets.x86_64.target import TARGETS
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Schedule
from tests.lane.run_lane import run_lane, specialize
from tests.lane.test_packed import ORDERS, PAIRS, PRODUCTS, arguments_of, expected_of
from tests.lane.test_tile_blocks import arguments_for
from tests.lane.test_tile_registers import gated
from tests.lane.test_tile_slots import TILES, chained, chained_arguments, chained_expected
from tests.strategies import examples

from .run_native import RUNNABLE, run_native
from .test_packed import mnemonics_of, run_rows

TARGET = TARGETS["sapphirerapids"]
NATIVE = pytest.mark.skipif("sapphirerapids" not in RUNNABLE, reason="this processor has no tile registers")
PRODUCTS_OF_TILES = {"tdpbf16ps", "tdpbssd", "tdpbsud", "tdpbusd", "tdpbuud"}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("types", [(bf16, bf16, f32), (i8, u8, i32)], ids=lambda t: f"{t[0].name}-{t[1].name}")
@pytest.mark.parametrize(("m", "packs"), [(33, False), (7, True)])
def test_rows(types, m, packs) -> None:
    """On a processor that this need not be: pieces of two tiles and of one, masked columns, a depth that is left."""
    kernel = PRODUCTS["nt", types]
    arguments = arguments_of("nt", types, m, 40, 77)
    packed = {"b": pack_array(arguments["b"], types[1], panels_of_kernel(kernel, "b", TARGET))} if packs else None
    assert len(run_rows(kernel.tile_ir(), arguments, TARGET, packed) & PRODUCTS_OF_TILES) == 1
    np.testing.assert_array_equal(arguments["c"], expected_of("nt", arguments))


def test_tiles_are_configured_once_and_then_as_before() -> None:
    function = PRODUCTS["nn", PAIRS[-1]].tile_ir()
    _, made, _ = mnemonics_of(function, arguments_of("nn", PAIRS[-1], 64, 64, 64), TARGET)
    names = [item.row.mnemonic for item in made.machine.body if hasattr(item, "row")]
    states = [name for name in names if name in ("sttilecfg", "ldtilecfg", "tileloadd", "ret")]
    assert list(dict.fromkeys(states)) == ["sttilecfg", "ldtilecfg", "tileloadd", "ret"]
    assert states[-2:] == ["ldtilecfg", "ret"] and states.count("ldtilecfg") == 2 and states.count("sttilecfg") == 1


def test_the_loop_over_the_depth_has_one_multiply_add_of_vectors() -> None:
    """The longest of all vectors, without which the processor lets what stores tiles go to sleep."""
    function = PRODUCTS["nt", PAIRS[-1]].tile_ir()
    _, made, _ = mnemonics_of(function, arguments_of("nt", PAIRS[-1], 64, 64, 256), TARGET)
    (loop,) = [part for part in made.text.split(".L.k")[1:] if "tdp" in part]
    loop = loop.split(" jg ")[0]
    assert loop.count("tdp") == 4 and loop.count("vfmadd231ps zmm") == 1


@pytest.mark.parametrize("name", ["zen4", "icelake-server", "haswell"])
def test_other_targets_have_none(name) -> None:
    function = PRODUCTS["nt", PAIRS[-1]].tile_ir()
    _, _, mnemonics = mnemonics_of(function, arguments_of("nt", PAIRS[-1], 64, 64, 64), TARGETS[name])
    assert not [mnemonic for mnemonic in mnemonics if "tile" in mnemonic or mnemonic in PRODUCTS_OF_TILES]


@NATIVE
@settings(max_examples=examples(12), deadline=None)
@given(m=st.integers(1, 70), n=st.integers(1, 70), k=st.integers(1, 140), order=st.sampled_from(ORDERS),
       types=st.sampled_from(PAIRS), threads=st.integers(1, 2))
def test_native(m, n, k, order, types, threads) -> None:
    function = PRODUCTS[order, types].tile_ir()
    arguments = arguments_of(order, types, m, n, k)
    run_native(function, arguments, TARGET, threads, schedule=Schedule(matrix=True))
    np.testing.assert_array_equal(arguments["c"], expected_of(order, arguments))


@pytest.mark.parametrize("tile", TILES)
def test_chained_tiles_of_any_size_fit_the_registers(tile) -> None:
    """None of eight can be spilled."""
    arguments = chained_arguments(160, 128, 64, 128)
    function = reduce_loops(chained.tile_ir({"D": 64}))
    lane = to_lane(function, Schedule(tile=tile), facts_of(TARGET),
                   specialize(function, arguments, {"T": 512, "P": 512}))
    assert "tdpbf16ps" in compile_lane(finish_lane(lane, TARGET), TARGET, checked=True).text


@NATIVE
@pytest.mark.parametrize("m", [5, 40])
def test_two_products_and_what_follows_as_interpreted(m) -> None:
    """Sums that round, denormals among them: the processor and the lane interpreter agree bit for bit."""
    random = np.random.default_rng(m)
    shapes = {"x": (m, 96), "gate": (40, 96), "up": (40, 96), "bias": (40,), "residual": (m, 40)}
    arguments = {name: random.standard_normal(shape).astype(
        np.float32 if name in ("bias", "residual") else ml_dtypes.bfloat16) for name, shape in shapes.items()}
    arguments["x"][0, :40] = 1e-39
    arguments["out"] = np.zeros((m, 40), ml_dtypes.bfloat16)
    wanted = {name: array.copy() for name, array in arguments.items()}
    run_lane(reduce_loops(gated.tile_ir()), wanted, Schedule(matrix=True), facts_of(TARGET))
    run_native(gated.tile_ir(), arguments, TARGET, schedule=Schedule(matrix=True))
    np.testing.assert_array_equal(arguments["out"].view(np.uint16), wanted["out"].view(np.uint16))


@NATIVE
@pytest.mark.parametrize(("form", "m", "task"), [("q4_64", 70, "matmul"), ("q8m_128", 33, "matmul_residual")])
def test_blocks_of_quantised_weights_as_interpreted(form, m, task) -> None:
    kernel = getattr(product_kernels(FORMS[form], FORMS[form].block), task)
    arguments = arguments_for(form, m, panels=3, task=task)
    wanted = {name: array.copy() for name, array in arguments.items()}
    run_lane(reduce_loops(kernel.tile_ir()), wanted, None, facts_of(TARGET),
             passes=partial(fuse, memory_operands=TARGET.memory_operands))
    _, made, _ = mnemonics_of(kernel.tile_ir(), arguments, TARGET)
    assert "tdpbusd" in made.text or "tdpbsud" in made.text
    run_native(kernel.tile_ir(), arguments, TARGET)
    np.testing.assert_array_equal(arguments["y"], wanted["y"])


@NATIVE
@pytest.mark.parametrize(("t", "p", "d", "stop"), [(40, 150, 64, 150), (33, 70, 96, 65)])
def test_chained_products(t, p, d, stop) -> None:
    arguments = chained_arguments(t, p, d, stop)
    _, made, _ = mnemonics_of(chained.tile_ir({"D": d}), arguments, TARGET)
    assert "tdpbf16ps" in made.text and "vdpbf16ps" not in made.text
    run_native(chained.tile_ir({"D": d}), arguments, TARGET)
    np.testing.assert_array_equal(arguments["out"], chained_expected(arguments))
