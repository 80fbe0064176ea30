"""`sapper bench gpu` on the emulated driver: every case is made, launched and checked, and a wrong kernel is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sapper.cli import bench_gpu
from sapper.cli.app import run

if TYPE_CHECKING:
    from .emulated_driver import EmulatedDriver

@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu, "ROUNDS", 2)
    monkeypatch.setattr(bench_gpu, "SAMPLE_SECONDS", 0.0)


@pytest.mark.parametrize("case", ["matmul bf16", "clusters", "few tiles", "matmul fp8", "attention", "decode", "norm"])
def test_cases_are_right(device: EmulatedDriver, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "gpu", "--quick", "--case", case]) == 0
    printed = capsys.readouterr().out
    assert "| sapper | " in printed and "WRONG" not in printed
    if case in ("norm", "decode"):
        assert "x copy" in printed
    together = [facts for kind, facts in device.log if kind == "launch" and (facts["cooperative"] or facts["cluster"])]
    assert bool(together) == (case in ("few tiles", "clusters"))
    assert (case == "few tiles") == ("matmul bf16 NT, split" in printed)
    assert (case == "clusters") == ("matmul bf16 NT, cluster" in printed)


def test_a_wrong_result_is_not_timed(device: EmulatedDriver, capsys: pytest.CaptureFixture[str],
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = bench_gpu.sp.prepare
    monkeypatch.setattr(bench_gpu.sp, "prepare", lambda kernel, x, y, out: prepared(kernel, y, x, out))
    assert bench_gpu.main(["--quick", "--case", "matmul bf16"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG: differs by" in printed and "TFLOP/s" not in printed


def test_without_a_device_one_line_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise bench_gpu.LaunchError("found no device; expected one")

    monkeypatch.setattr(bench_gpu.cuda, "device", missing)
    assert run(["bench", "gpu"]) == 1
    assert capsys.readouterr().err == "error: found no device; expected one\n"
    assert run(["bench", "gpu", "--threads", "2"]) == 2
    assert "found --threads or --against; expected neither" in capsys.readouterr().err
