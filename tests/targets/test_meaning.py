"""The meaning of every row against the real CPU, bit for bit, and `execute` by itself where no CPU is needed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sapper.targets.x86_64 import tiles
from sapper.targets.x86_64.detect import host
from sapper.targets.x86_64.instructions import ROWS
from sapper.targets.x86_64.meaning import execute

ROOT = Path(__file__).resolve().parents[2]
NOT_RUN = {"syscall", "int3", "ud2", "ret", "call", "call.indirect", "jmp", "jmp.indirect", "push", "pop", "pushfq",
           "popfq",
           "cpuid", "xgetbv", "rdtsc", "rdtscp", "vldmxcsr", "vstmxcsr"}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the rows need an x86-64 processor to run on")
def test_every_row_of_this_cpu_against_its_meaning(tmp_path: Path) -> None:
    progress = tmp_path / "progress"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("native_rows.py")), str(progress), "2024"], capture_output=True,
        text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    running = progress.read_text().strip() if progress.exists() else "nothing"
    assert done.returncode == 0, f"exit {done.returncode} while running {running}\n{done.stderr[-2000:]}"
    report = json.loads(done.stdout)
    assert not report["differences"], "\n".join(report["differences"])
    unexpected = {name: reason for name, reason in report["skipped"].items()
                  if name not in NOT_RUN and not reason.startswith(("the host lacks", "on tiles"))}
    assert not unexpected
    assert report["rows"] + len(report["skipped"]) == len(ROWS)
    assert report["runs"] > 4 * report["rows"] * 0.9


@pytest.mark.skipif("amx_tile" not in host().features, reason="no tile registers, or the system grants none")
def test_every_row_on_tiles_against_its_meaning() -> None:
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("native_tiles.py")), "2024"],
                          capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert not report["differences"], "\n".join(report["differences"])
    of_host = {row.name for row in ROWS.values() if "amx_tile" in row.features and row.features <= host().features}
    assert set(report["runs"]) == of_host and min(report["runs"].values()) >= 50


# --- execute --------------------------------------------------------------------------------------------------------

def vector(*lanes: float, dtype: str = "f4", size_bytes: int = 16) -> np.ndarray:
    raw = np.zeros(size_bytes, np.uint8)
    values = np.array(lanes, dtype)
    raw[:values.nbytes] = values.view(np.uint8)
    return raw


def test_execute_merges_and_zeroes_by_the_opmask() -> None:
    row = ROWS["vaddps.128"]
    old, a, b = vector(9, 9, 9, 9), vector(1, 2, 3, 4), vector(10, 20, 30, 40)
    after, _, _, mask = execute(row, [old, a, b], (False,) * 3, mask=0b0101)
    assert after[0].view("f4").tolist() == [11, 9, 33, 9]
    assert mask == 0b0101
    after, _, _, _ = execute(row, [old, a, b], (False,) * 3, mask=0b0101, zeroing=True)
    assert after[0].view("f4").tolist() == [11, 0, 33, 0]


def test_execute_spreads_a_broadcast_element() -> None:
    after, _, _, _ = execute(ROWS["vmulps.128"], [vector(), vector(1, 2, 3, 4), np.array([2], "f4").view(np.uint8)],
                             (False, False, True))
    assert after[0].view("f4").tolist() == [2, 4, 6, 8]


def test_execute_integer_flags_and_implicit_registers() -> None:
    after, _, flags, _ = execute(ROWS["sub.64"], [1, 2], (False, False))
    assert after[0] == (1 << 64) - 1
    assert (flags["c"], flags["z"], flags["s"], flags["o"]) == (1, 0, 1, 0)
    _, implicit, _, _ = execute(ROWS["mul.64"], [1 << 63], (False,), implicit=(4,))
    assert implicit == [0, 2]
    with pytest.raises(OverflowError, match="traps"):
        execute(ROWS["div.64"], [0], (False,), implicit=(1, 0))


def test_fma_rounds_once() -> None:
    # 1 + 2**-12 squared less 1 + 2**-11 is 2**-24 exactly; a product rounded to f32 first would give 0.
    a = vector(1 + 2 ** -12)
    after, _, _, _ = execute(ROWS["vfmadd213ss"], [a, a, vector(-(1 + 2 ** -11))], (False,) * 3)
    assert after[0].view("f4")[0] == 2 ** -24


def test_nan_payload_of_the_first_operand_wins_quieted() -> None:
    first = np.array([0x7F800001] * 4, np.uint32).view(np.uint8)
    second = np.array([0x7FC12345] * 4, np.uint32).view(np.uint8)
    after, _, _, _ = execute(ROWS["vaddps.128"], [vector(), first, second], (False,) * 3)
    assert after[0].view(np.uint32).tolist() == [0x7FC00001] * 4
    after, _, _, _ = execute(ROWS["vsubps.128"], [vector(), vector(np.inf), vector(np.inf)], (False,) * 3)
    assert after[0].view(np.uint32)[0] == 0xFFC00000


def test_gather_clears_its_mask_and_keeps_lanes_that_are_off() -> None:
    after, _, _, mask = execute(ROWS["vgatherdps.128"], [vector(9, 9, 9, 9), vector(1, 2, 3, 4)], (False, True),
                                mask=0b0011)
    assert after[0].view("f4").tolist() == [1, 2, 9, 9]
    assert mask == 0


def test_a_row_without_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="mfence"):
        execute(ROWS["mfence"], [], ())


def tile(values: list[list[float]], dtype: str) -> np.ndarray:
    return np.array(values, dtype).view(np.uint8)


def test_products_of_tiles_take_pairs_and_fours_along_the_depth() -> None:
    total, a = tile([[10, 20]], "f4"), np.array([[1, 2, 3, 4]], "f4").view("u4") >> 16
    b = np.array([[1, 10, 2, 20], [3, 30, 4, 40]], "f4").view("u4") >> 16  # row k: pairs of column 0, of column 1
    raw = [total, *(x.astype("u2").view(np.uint8) for x in (a, b))]
    after, _, _, _ = execute(ROWS["tdpbf16ps"], raw, (False,) * 3, implicit=(None,))
    assert after[0].view("f4").tolist() == [[10 + 1 + 20 + 9 + 120, 20 + 2 + 40 + 12 + 160]]
    raw = [tile([[2**31 - 1]], "i4"), tile([[255, 1, 0, 0]], "u1"), tile([[-1, 1, 0, 0]], "i1")]
    after, _, _, _ = execute(ROWS["tdpbusd"], raw, (False,) * 3, implicit=(None,))
    assert after[0].view("i4").tolist() == [[2**31 - 1 - 254]]
    after, _, _, _ = execute(ROWS["tdpbssd"], raw, (False,) * 3, implicit=(None,))
    assert after[0].view("i4").tolist() == [[2 - 2**31 - 1 + 0]]  # wraps


def test_tiles_of_shapes_that_do_not_fit_trap() -> None:
    square = np.zeros((16, 64), np.uint8)
    for shapes in ((16, 64, 8, 64), (16, 60, 16, 64), (8, 64, 16, 64), (16, 62, 16, 62)):
        a, b = np.zeros(shapes[:2], np.uint8), np.zeros(shapes[2:], np.uint8)
        with pytest.raises(OverflowError, match="traps; expected tiles of M x 4N, M x 4K and K x 4N"):
            execute(ROWS["tdpbssd"], [square, a, b], (False,) * 3, implicit=(None,))


def test_tile_configurations_that_trap() -> None:
    good = np.frombuffer(tiles.configuration([(16, 64), (3, 8)]), np.uint8)
    state = dict(zip(ROWS["ldtilecfg"].implicit_writes, execute(ROWS["ldtilecfg"], [good], (True,))[1], strict=True))
    assert state["tile", 0].shape == (16, 64) and state["tile", 1].shape == (3, 8) and state["tile", 2].shape == (0, 0)
    for place, value, message in ((0, 2, "palette 2"), (3, 1, "reserved"), (32, 1, "reserved"), (56, 1, "reserved"),
                                  (16, 65, "tile 0 of 16 rows of 65"), (48, 17, "tile 0 of 17 rows"),
                                  (49, 0, "tile 1")):
        bad = good.copy()
        bad[place] = value
        with pytest.raises(OverflowError, match=message):
            execute(ROWS["ldtilecfg"], [bad], (True,))
    with pytest.raises(ValueError, match=r"tile 1: found 17 rows of 64 bytes; expected 1 to 16 rows"):
        tiles.configuration([(1, 1), (17, 64)])
    with pytest.raises(ValueError, match="found 9 shapes; expected at most 8"):
        tiles.configuration([(1, 4)] * 9)
