"""How much memory a process takes beside a model's weights and its cache: at most 150 MB, where it compiled too."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sapper.kernels import matmul
from sapper.models.workspace import Workspace, named_arrays
from sapper.runtime.program import Program
from tests.weights import find_smollm2

LIMIT_BYTES = 150_000_000

MEASURED = """
import sys

def in_memory(key):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

import hashlib, numpy  # which a process has anyway
before = in_memory("VmRSS")
numpy.random.default_rng(0)  # only random weights need it; what is in a file does not
generator = in_memory("VmRSS") - before
from sapper.models.deepseek.config import from_json
from sapper.models.deepseek.untrained import SMALL_V2, V2_LITE, untrained
from sapper.models.workspace import named_arrays
from sapper.models.load import load_model

def model_of(name):
    if name == "smollm2":
        return load_model(name, "file")
    config = dict(SMALL_V2 if name == "small" else V2_LITE)
    return untrained(from_json(config | {"num_hidden_layers": 2}, name), "file")

model = model_of(sys.argv[1])
session = model.session(1024, threads=2)
tokens = [7 * number % 1000 for number in range(600)]
session.feed(tokens)
for token in tokens[:4]:
    session.feed([token])
arrays = [*named_arrays(model.weights).values(), *session.state().values()]
kept = sum({array.ctypes.data: array.nbytes for array in arrays}.values())
print(in_memory("VmHWM") - kept - generator, kept)
"""


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ["smollm2", "small", "lite"])
def test_a_process_that_compiles_takes_little_beside_weights_and_cache(name: str) -> None:
    """SmolLM2's file; two layers of the bench's small DeepSeek and of V2-Lite, in blocks of 4 bits."""
    if name == "smollm2":
        find_smollm2()
    environment = {key: value for key, value in os.environ.items() if key != "SAPPER_VERIFY"}
    run = subprocess.run([sys.executable, "-c", MEASURED, name], capture_output=True, text=True, timeout=150,
                         env=environment, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    beside, kept = map(int, run.stdout.split())
    assert kept > 50_000_000 and beside < LIMIT_BYTES


def test_what_is_asked_for_again_lies_where_it_lay() -> None:
    work = Workspace(64)
    small, large = work.quants(4, 64, 32, 32), work.quants(40, 128, 32, 32)
    assert [array.shape for array in large] == [(4, 40, 32), (4, 40), (4, 1, 40), (4, 1, 40)]
    assert small[0].ctypes.data == large[0].ctypes.data
    ends = sorted((array.ctypes.data, array.ctypes.data + array.nbytes) for array in large)
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert work.wide(0, 3, 5).ctypes.data == work.wide(0, 300, 5).ctypes.data != work.wide(1, 3, 5).ctypes.data
    named = named_arrays(work, "work")
    assert list(named) == ["work normed", "work quants", "work wide 0", "work wide 1"]
    for array in large:
        assert named["work quants"].ctypes.data <= array.ctypes.data
        assert array.ctypes.data + array.nbytes <= named["work quants"].ctypes.data + named["work quants"].nbytes


def test_memory_of_a_small_program_is_on_plain_pages() -> None:
    """A huge page would be there as a whole."""
    x = np.ones((4, 4), np.float32)
    program = Program([(matmul.matmul_nt_f32, (x, x, np.empty_like(x)))])
    program()
    assert not program._mapping.huge and program._mapping.size_bytes < 1 << 20
