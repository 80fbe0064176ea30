"""What the emulator of AArch64 finds wrong in code, and `sapper check` by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sapper.cli.main import main
from sapper.codegen.machine import Immediate, Instruction, Label, LabelReference, MachineFunction, Memory, Register
from sapper.codegen.words import encode
from sapper.emulate.arm import run_code
from sapper.emulate.errors import DeadlockError, EmulationError, MemoryFault
from sapper.emulate.laid_out import Buffers
from sapper.targets import target
from sapper.targets.aarch64.instructions import ROWS

pytest.importorskip("unicorn", reason="the package unicorn is not installed")

X = [Register("gpr", number) for number in range(31)]


def code_of(*items: tuple[Any, ...] | str) -> bytes:
    """Instructions as (row, operands ...), labels as text; a return at the end."""
    body: list[Instruction | Label] = [
        Label(item) if isinstance(item, str) else Instruction(ROWS[item[0]], list(item[1:])) for item in items]
    return encode(MachineFunction("f", [*body, Instruction(ROWS["ret"], [])], {}), target("neoverse-v2")).code


FIRST = ("ldr.64", X[4], Memory(X[0], disp=24))
"""The address of the only array: word 3."""


def run(code: bytes, array: np.ndarray, workers: int = 1, at_end: bool = True) -> None:
    def words_of(buffers: Buffers) -> list[int]:
        return [buffers.add_array(array)]

    run_code(code, words_of, 0, workers, at_end)


def test_code_that_is_right() -> None:
    array = np.arange(4, dtype=np.int64)
    run(code_of(FIRST, ("ldr.64", X[5], Memory(X[4], disp=24)), ("str.64", Memory(X[4]), X[5])), array)
    assert array.tolist() == [3, 1, 2, 3]


def test_instructions_that_unicorn_lacks() -> None:
    """Four signed bytes by four unsigned ones in each lane; then the first two lanes as rows of a matrix."""
    array = np.array([[-1, 2, 3, 4] * 4, [1, 100, 1, 1] * 4, [0] * 16, [0] * 16], np.int8)
    v = [Register("vec", number) for number in range(4)]
    run(code_of(FIRST, *(("ldr.q", v[n], Memory(X[4], disp=16 * n)) for n in range(3)),
                ("sudot.element.4s", v[2], v[0], v[1], Immediate(3)), ("str.q", Memory(X[4], disp=32), v[2]),
                ("movi.zero", v[3]), ("smmla.4s", v[3], v[0], v[1]), ("str.q", Memory(X[4], disp=48), v[3])), array)
    assert array[2].view(np.int32).tolist() == [206] * 4 and array[3].view(np.int32).tolist() == [412] * 4


def test_a_word_that_is_no_instruction() -> None:
    code = bytearray(code_of(FIRST, ("yield",)))
    code[4:8] = bytes(4)
    with pytest.raises(MemoryFault, match="undefined: found an access beyond a buffer, or no instruction, at byte 0x4"):
        run(bytes(code), np.zeros(1))


@pytest.mark.parametrize(("at_end", "disp"), [(True, 32), (False, -8)])
@pytest.mark.parametrize("access", [
    lambda at: ("ldr.64", X[5], at), lambda at: ("str.64", at, X[5])], ids=["load", "store"])
def test_an_access_beyond_an_array(access: Callable[[Memory], tuple[Any, ...]], at_end: bool, disp: int) -> None:
    code = code_of(FIRST, access(Memory(X[4], disp=disp)))
    with pytest.raises(MemoryFault, match="beyond a buffer, or no instruction, at byte 0x4 of the code"):
        run(code, np.zeros(4, np.int64), at_end=at_end)


def test_registers_of_the_caller() -> None:
    with pytest.raises(EmulationError, match="found x19 changed at the return"):
        run(code_of(("movz.64", X[19], Immediate(1), Immediate(0))), np.zeros(1))
    with pytest.raises(EmulationError, match="found d8 changed at the return"):
        run(code_of(("movi.zero", Register("vec", 8))), np.zeros(1))
    with pytest.raises(EmulationError, match="found the stack pointer changed"):
        run(code_of(("push.gpr", X[3])), np.zeros(1))


def test_workers_that_wait_for_each_other_in_vain() -> None:
    """Worker 0 waits for a word that nobody writes."""
    code = code_of(("cmp.imm.64", X[1], Immediate(0)), ("b.ne", LabelReference(".end")), FIRST, ".again",
                   ("ldar.32", X[5], Memory(X[4])), ("cbz.32", X[5], LabelReference(".again")), ".end")
    array = np.zeros(1, np.int64)
    with pytest.raises(DeadlockError, match="found 1 of 2 workers still running"):
        run(code, array, workers=2)


def test_check_says_what_brings_the_emulator(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sapper.emulate.find_spec", lambda name: None)
    assert main(["check", "scale_inputs", "--target", "neoverse-n1", "--runs", "1"]) == 0
    assert "native left out: this CPU has no dotprod, lse, neon; mend: pip install 'sapper[arm]'" in (
        capsys.readouterr().out)


def test_check_runs_machine_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "softmax", "--target", "neoverse-n1", "--runs", "4"]) == 0
    assert "simplify, emulator" in capsys.readouterr().out
