"""The examples: machine code and interpreter give what NumPy gives, on the extents that are timed and on odd ones."""

from __future__ import annotations

from itertools import cycle

import numpy as np
import pytest

from examples import Example, examples

EXAMPLES = {one.name: one for one in examples()}


def run(example: Example, shape: dict[str, int], **options: object) -> None:
    arguments = example.make_arguments(np.random.default_rng(3), shape)
    inputs, results = example.split(arguments)
    wanted = example.reference(*inputs)
    example.kernel(*arguments, **options)
    assert len(results) == len(wanted) == example.results
    for found, expected in zip(results, wanted, strict=True):
        if found.dtype.kind == "i":
            assert np.array_equal(found, expected)
        else:
            assert np.abs(found.astype(np.float64) - expected).max() <= example.tolerance * np.abs(expected).max()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", EXAMPLES)
def test_machine_code(name):
    run(EXAMPLES[name], EXAMPLES[name].small)
    run(EXAMPLES[name], EXAMPLES[name].shape, threads=2)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", EXAMPLES)
def test_without_avx512(name):
    run(EXAMPLES[name], EXAMPLES[name].small, target="haswell")


@pytest.mark.parametrize("name", EXAMPLES)
def test_interpreter(name):
    run(EXAMPLES[name], EXAMPLES[name].small, interpret=True)


def test_a_wrong_result_is_seen():
    one = EXAMPLES["recurrence"]
    wrong = Example(one.kernel, one.make_arguments, lambda a, b: (one.reference(a, b)[0] + 0.01,), one.shape, one.small)
    with pytest.raises(AssertionError):
        run(wrong, wrong.small)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "target"), [*zip(EXAMPLES, cycle(("sm_80", "sm_90a")), strict=False)])
def test_as_ptx_on_the_emulator(name, target):
    run(EXAMPLES[name], EXAMPLES[name].small, target=target, emulate=True)
