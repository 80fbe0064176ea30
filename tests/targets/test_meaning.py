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
                  if name not in NOT_RUN and not reason.startswith("the host lacks")}
    assert not unexpected
    assert report["rows"] + len(report["skipped"]) == len(ROWS)
    assert report["runs"] > 4 * report["rows"] * 0.9


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
