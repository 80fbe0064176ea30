"""The library compiled for every target: the text that is printed and the bytes that run are the same program.

GNU as assembles all of a target's kernels in one run; what it makes must equal our encoder's bytes. That a target's
code keeps to its features is checked by the encoder, which is given them; here, that it does check.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sapper.codegen.compile import CompiledCode, compile_lane
from sapper.codegen.encode import EncodeError, encode
from sapper.codegen.pipeline import facts_of, finish_lane, to_lane
from sapper.kernels import library
from sapper.targets.x86_64.target import TARGETS, V3_OPTIONAL_FEATURES, V4_OPTIONAL_FEATURES, Target
from sapper.tile.schedule import Schedule
from tests.lane.run_lane import specialize
from tests.strategies import FUZZ

LIBRARY = library()


FEW = V3_OPTIONAL_FEATURES | V4_OPTIONAL_FEATURES - {"avx512_bf16"}
"""Features of a few instructions each, for products of bytes, bytes that are picked and tile registers."""


def compiled(target: Target) -> list[CompiledCode]:
    """Every library kernel, for the largest of the shapes that it is checked at. Targets with the same features, but
    for a few, choose among the same instructions: they take every ninth kernel in turns, each its part of those of one
    type and of one kind of products. In a search for faults each takes all."""
    alike = [other.name for other in TARGETS.values() if other.features - FEW == target.features - FEW]
    dealt = sorted(LIBRARY, key=lambda entry: (entry.products, entry.dtype))
    taken = LIBRARY if FUZZ else dealt[alike.index(target.name)::9 * len(alike)]
    made = []
    for entry in taken:
        function = entry.kernel.tile_ir()
        arguments = entry.make_arguments(np.random.default_rng(0), entry.check_shapes[-1])
        lane = to_lane(function, Schedule(), facts_of(target), specialize(function, arguments))
        made.append(compile_lane(finish_lane(lane, target), target))
    return made


@pytest.mark.skipif(shutil.which("as") is None, reason="GNU as is not installed")
@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_text_and_bytes_are_the_same_program(name: str, tmp_path: Path) -> None:
    made = compiled(TARGETS[name])
    # One source file with a section for each kernel (sections are relaxed apart), local labels made unique.
    parts = []
    for number, code in enumerate(made):
        section = f'.section .text.{number}, "ax"'
        parts.append(code.text.replace("\n.text\n", f"\n{section}\n").replace(".L", f".Lk{number}_"))
    source, made_file = tmp_path / "all.s", tmp_path / "all.o"
    source.write_text("".join(parts))
    done = subprocess.run(["as", "-o", made_file, source], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[:2000]
    theirs = sections(made_file.read_bytes())
    for number, code in enumerate(made):
        assert theirs[f".text.{number}"] == code.bytes, f"{code.name} for {name}"


def sections(file: bytes) -> dict[str, bytes]:
    """Name -> content of the sections of an ELF64 file (gABI, chapter 4)."""
    (start,) = struct.unpack_from("<Q", file, 40)
    size, count, names = struct.unpack_from("<HHH", file, 58)
    headers = [struct.unpack_from("<IIQQQQ", file, start + size * n) for n in range(count)]
    name_table = headers[names][4]
    return {file[name_table + h[0]:file.index(0, name_table + h[0])].decode(): file[h[4]:h[4] + h[5]] for h in headers}


def test_the_encoder_refuses_what_a_target_lacks() -> None:
    """The code of a wide target holds instructions that the narrow one must not be given."""
    entry = next(e for e in LIBRARY if e.name == "matmul_nn_f32")
    function = entry.kernel.tile_ir()
    arguments = entry.make_arguments(np.random.default_rng(0), entry.check_shapes[-1])
    wide, narrow = TARGETS["zen4"], TARGETS["v3"]
    lane = finish_lane(to_lane(function, Schedule(), facts_of(wide), specialize(function, arguments)), wide)
    machine = compile_lane(lane, wide).machine
    encode(machine, wide.features)
    with pytest.raises(EncodeError, match="avx512f"):
        encode(machine, narrow.features)
