"""Axes that are known before a loop go outside it, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest

from sapper.ir.nodes import Function
from sapper.ir.text import print_function
from sapper.ir.verifier import verify
from sapper.kernels import find
from sapper.tile.canonical import canonicalize
from sapper.tile.interpret import interpret
from sapper.tile.nests import part_nests
from sapper.tile.ops import TILE_OPS
from sapper.tile.reduce_loops import reduce_loops


def canonical(name: str) -> Function:
    function: Function = find(name).kernel.tile_ir()
    reduce_loops(function)
    canonicalize(function)
    return function


@pytest.mark.parametrize("name", ["masked_matmul_nt_f32", "masked_matmul_nt_bf16_bf16", "masked_matmul_nt_i8"])
def test_columns_stand_outside_rows_that_memory_counts(name: str) -> None:
    function, entry = canonical(name), find(name)
    assert next(op.attributes["axes"] for op in function.walk() if op.name == "tiles") == ["m", "n"]
    part_nests(function)
    verify(function, TILE_OPS)
    assert [op.attributes["axes"] for op in function.walk() if op.name == "tiles"][:2] == [["n"], ["m"]]
    for shape in entry.check_shapes:
        arguments = entry.make_arguments(np.random.default_rng(1), shape)
        expected = entry.reference(arguments)
        interpret(function, arguments, 3)
        assert entry.compare(arguments, expected) is None
    once = print_function(function)
    part_nests(function)
    assert print_function(function) == once


@pytest.mark.parametrize("name", ["matmul_nt_f32", "batched_matmul_nt_f32", "grouped_matmul_f32", "attention_f32"])
def test_what_is_known_together_stays_together(name: str) -> None:
    function = canonical(name)
    before = print_function(function)
    part_nests(function)
    assert print_function(function) == before
