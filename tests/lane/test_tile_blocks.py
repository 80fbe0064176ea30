"""Tile registers inside a loop over blocks of quantised weights, at their own station."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.kernels.quantized import FORMS, make_arguments, product_kernels, product_reference
from sapper.lane.choices import choices
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Schedule
from tests.strategies import examples

from .run_lane import run_lane, specialize
from .test_tile_registers import MACHINES, tiles_in

MANY = {"M": 1024}


def arguments_for(form, m, panels=2, groups=2, spare=0, task="matmul"):
    shape = {"P": panels, "G": groups, "C": m + spare, "M": m}
    return make_arguments(np.random.default_rng(m), shape, FORMS[form], FORMS[form].block, task)


def run_form(form, arguments, schedule=None, hints=None, task="matmul"):
    kernel = getattr(product_kernels(FORMS[form], FORMS[form].block), task)
    return run_lane(reduce_loops(kernel.tile_ir()), arguments, schedule, MACHINES[16],
                    specialize(kernel.tile_ir(), arguments, MANY if hints is None else hints))


@settings(max_examples=examples(12), deadline=None)
@given(form=st.sampled_from(["q4_64", "q8_64", "q4m_128", "q8m_128"]), m=st.integers(0, 70), groups=st.integers(1, 3),
       spare=st.integers(0, 1), task=st.sampled_from(["matmul", "matmul_swiglu"]))
def test_blocks_are_bit_for_bit_those_of_vectors(form, m, groups, spare, task) -> None:
    """Rows that fill no tile, and tensors that end where the last row does: nothing beyond is read."""
    arguments = arguments_for(form, m, groups=groups, spare=spare, task=task)
    wanted = {name: array.copy() for name, array in arguments.items()}
    assert tiles_in(run_form(form, arguments, task=task))
    assert not tiles_in(run_form(form, wanted, Schedule(matrix=False), task=task))
    np.testing.assert_array_equal(arguments["y"], wanted["y"])


def test_both_halves_of_the_bytes_share_the_sums() -> None:
    """A block of 64 in 4 bits is one tile deep: one product, though it is the sum of two contractions."""
    arguments = arguments_for("q4_64", 32)
    lane = run_form("q4_64", arguments)
    assert tiles_in(lane) == 1
    np.testing.assert_allclose(arguments["y"], product_reference(arguments, FORMS["q4_64"])["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("form", "hints", "schedule"), [
    ("q4", None, None),                                 # to scale the sums takes longer than to make them
    ("q4_64", {"M": 8}, None),
    ("q4_64", None, Schedule(matrix=False)),
    ("q4_64", None, Schedule(tile={"m": 12})),
])
def test_the_model_leaves_to_vectors(form, hints, schedule) -> None:
    assert not tiles_in(run_form(form, arguments_for(form, 20), schedule, hints))


def test_what_the_model_chose_can_be_asked_for() -> None:
    kernel = product_kernels(FORMS["q4_64"], 64).matmul
    arguments = arguments_for("q4_64", 64)
    specialization = specialize(kernel.tile_ir(), arguments, MANY)
    told = choices(reduce_loops(kernel.tile_ir()), Schedule(), MACHINES[16], specialization).schedule
    assert told.matrix and "m" not in told.tile and "m" not in told.registers
    assert tiles_in(run_form("q4_64", arguments, told))


def test_buffers_of_whole_pages_begin_at_different_places_of_a_page() -> None:
    """Those of the two sums that are carried, and of what is added to them: loads of one do not wait for stores of
    another."""
    arguments = arguments_for("q4_64", 64, task="matmul_swiglu")
    starts, start = [], 0
    for size, axes in run_form("q4_64", arguments, task="matmul_swiglu").attributes["scratch"]:
        for constant, dims, multiple in axes:
            assert not dims
            size *= -(-constant // multiple) * multiple
        if size and size % 4096 == 0:
            starts.append(start % 4096)
        start += -(-size // 64) * 64
    assert len(starts) > 3 and len(set(starts)) == len(starts)
