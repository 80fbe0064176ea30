"""`sapper bench gpu` on the emulated driver: every case is made, launched and checked, and a wrong kernel is told."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sapper.cli import bench_gpu
from sapper.cli.app import run

if TYPE_CHECKING:
    from .emulated_driver import EmulatedDriver

@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu, "ROUNDS", 2)
    monkeypatch.setattr(bench_gpu, "SAMPLE_SECONDS", 0.0)


@pytest.mark.sampled(3)
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


@pytest.mark.parametrize("lost", [False, True])
def test_a_case_that_fails_is_told_and_the_others_go_on(device: EmulatedDriver, capsys: pytest.CaptureFixture[str],
                                                        monkeypatch: pytest.MonkeyPatch, lost: bool) -> None:
    def aborted(*_: Any) -> None:
        if lost:
            device.refuse["cuCtxSynchronize"] = 719
        raise bench_gpu.CudaError("cuLaunchKernelEx", "CUDA_ERROR_LAUNCH_FAILED", "a kernel was aborted\nhere")

    cases = list(bench_gpu.cases(True, None))
    monkeypatch.setattr(bench_gpu, "cases", lambda *_: iter([("first", aborted), *cases[:1]]))
    assert bench_gpu.main(["--quick"]) == 1
    printed = capsys.readouterr().out
    assert "| first | | sapper | FAILED: CudaError: cuLaunchKernelEx: found CUDA_ERROR_LAUNCH_FAILED" in printed
    assert "\nhere" not in printed and ("measure the others with --case" in printed) == lost
    assert ("matmul bf16 NT" in printed) != lost


def test_a_peer_that_fails_is_left_out(device: EmulatedDriver, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise RuntimeError("another version\nof it")

    (_, make), *_ = bench_gpu.cases(True, None)
    case = make()
    case.peers = {"theirs": lambda: broken, "other": broken}
    rows, wrong = bench_gpu.run(case)
    assert wrong is None and [row["who"] for row in rows] == ["sapper"]
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in said] == [
        "theirs is left out: RuntimeError: another version", "other is left out: RuntimeError: another version"]


def test_without_a_device_one_line_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise bench_gpu.LaunchError("found no device; expected one")

    monkeypatch.setattr(bench_gpu.cuda, "device", missing)
    assert run(["bench", "gpu"]) == 1
    assert capsys.readouterr().err == "error: found no device; expected one\n"
    assert run(["bench", "gpu", "--threads", "2"]) == 2
    assert "found --threads or --against; expected neither" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- peers

class Shaped:
    """A tensor of a PyTorch that computes nothing, but holds that shapes agree."""

    def __init__(self, *shape: int) -> None:
        self.places, self.device = np.broadcast_to(np.uint8(0), shape), "cuda:0"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.places.shape

    @property
    def T(self) -> Shaped:
        return Shaped(*reversed(self.shape))

    def __getitem__(self, key: Any) -> Shaped:
        return Shaped(*self.places[key].shape)

    def reshape(self, *shape: int) -> Shaped:
        return Shaped(*self.places.reshape(shape).shape)

    def transpose(self, *axes: int) -> Shaped:
        return Shaped(*np.swapaxes(self.places, *axes).shape)


class Torch:
    """What the bench asks of PyTorch. issued: shapes of what each call was given."""

    __version__, bfloat16 = "2.0 of the tests", "bf16"

    def __init__(self) -> None:
        self.issued: list[tuple[Any, ...]] = []
        self.nn = SimpleNamespace(functional=self)

    def from_dlpack(self, array: Any) -> Shaped:
        return Shaped(*array.shape)

    def empty(self, *shape: int, dtype: str, device: str) -> Shaped:
        assert (dtype, device) == ("bf16", "cuda:0")
        return Shaped(*shape)

    def empty_like(self, tensor: Shaped) -> Shaped:
        return Shaped(*tensor.shape)

    def matmul(self, left: Shaped, right: Shaped, out: Shaped) -> None:
        assert left.shape[1] == right.shape[0] and out.shape == (left.shape[0], right.shape[1])
        self.issued.append(("matmul", *out.shape))

    def scaled_dot_product_attention(self, query: Shaped, key: Shaped, value: Shaped, scale: float,
                                     is_causal: bool = False, enable_gqa: bool = False) -> None:
        batch, heads, positions, depth = query.shape
        assert key.shape == value.shape and key.shape[0] == batch == 1 and key.shape[3] == depth
        assert scale == depth**-0.5
        assert heads == key.shape[1] or (enable_gqa and heads % key.shape[1] == 0)
        assert key.shape[2] == positions or not is_causal
        self.issued.append(("attention", *query.shape, key.shape[2]))


class Launched:
    """A kernel of Triton that notes its grid."""

    def __init__(self, issued: list[tuple[Any, ...]], name: str) -> None:
        self.issued, self.name = issued, name

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.issued.append((self.name, *grid, options["num_warps"]))


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Torch:
    """PyTorch and Triton, as far as the bench goes."""
    made = Torch()
    monkeypatch.setattr(bench_gpu, "torch_on", lambda device: made)
    described = SimpleNamespace(from_tensor=lambda tensor, box: (tensor.shape, box))
    theirs = {name: Launched(made.issued, name) for name in ("product", "product_of_boxes", "attention")}
    for name, module in {"triton": SimpleNamespace(cdiv=lambda a, b: -(-a // b)), "triton.tools": SimpleNamespace(),
                         "triton.tools.tensor_descriptor": SimpleNamespace(TensorDescriptor=described),
                         "gpu_static_triton": SimpleNamespace(**theirs)}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


def test_peers_are_given_the_same_work(device: EmulatedDriver, torch: Torch, tmp_path: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    """Which is counted where it arrives; a row for each, and what is wanted beside ours."""
    path = tmp_path / "rows.json"
    assert bench_gpu.main(["--quick", "--case", "matmul bf16", "--json", str(path)]) == 0
    assert {"matmul", "product_of_boxes"} == {name for name, *_ in torch.issued}
    assert ("matmul", 256, 256) in torch.issued and ("product_of_boxes", 2, 1, 8) in torch.issued
    rows = json.loads(path.read_text())
    assert [row["who"] for row in rows] == ["sapper", "cuBLAS", "Triton"]
    assert [row["wanted"] for row in rows] == ["0.95 x cuBLAS", "", ""]
    assert "PyTorch 2.0 of the tests" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["attention", "decode"])
def test_peers_of_attention(device: EmulatedDriver, torch: Torch, case: str,
                            capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu.main(["--quick", "--case", case]) == 0
    wanted = {("attention", 1, 2, 256, 128, 256), ("attention", 2, 2, 8)} if case == "attention" else {
        ("attention", 1, 4, 1, 128, 70)}
    assert set(torch.issued) == wanted and "| PyTorch | " in capsys.readouterr().out


def test_products_of_triton_without_boxes(device: EmulatedDriver, torch: Torch) -> None:
    """On a device before tensor maps."""
    x = SimpleNamespace(shape=(256, 256), device=SimpleNamespace(capability=(8, 0)))
    call = bench_gpu.triton_product(torch, x, x, 256)
    assert call is not None
    call()
    assert torch.issued == [("product", 2, 2, 4)]


def test_peers_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "triton", "gpu_static_triton"):
        monkeypatch.setitem(sys.modules, name, None)
    assert bench_gpu.torch_on(SimpleNamespace(ordinal=0)) is None       # type: ignore[arg-type]
    assert bench_gpu.triton_product(None, None, None, 256) is None


def test_what_does_not_fit_the_time_is_told(device: EmulatedDriver, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_gpu, "SECONDS", -1.0)
    assert bench_gpu.main(["--quick", "--case", "rms_norm"]) == 0
    assert "the rest was not measured" in capsys.readouterr().out


def case_of(wanted: tuple[float, str] | None) -> bench_gpu.Case:
    return bench_gpu.Case("a", "b", lambda: None, lambda: None, wanted=wanted, operations=1e12, hint="Look there.",
                          peers={"copy": lambda: None})


@pytest.mark.parametrize(("wanted", "times", "told"), [
    ((0.9, "copy"), {"sapper": 1.0, "copy": 0.8}, "a, b: 0.8; wanted: 0.9 x copy. Look there."),
    ((0.9, "copy"), {"sapper": 1.0, "copy": 0.95}, None), ((0.9, "copy"), {"sapper": 1.0}, None),
    ((600.0, "TFLOP/s"), {"sapper": 0.01}, "a, b: 100; wanted: 600 TFLOP/s. Look there."),
    ((600.0, "TFLOP/s"), {"sapper": 0.001}, None), (None, {"sapper": 1.0}, None), ((0.9, "copy"), {"copy": 1.0}, None)])
def test_what_is_missed_is_told_with_a_hint(wanted: tuple[float, str] | None, times: dict[str, float],
                                            told: str | None) -> None:
    case = case_of(wanted)
    assert bench_gpu.missed(case, bench_gpu.lines_of(case, times)) == told


def test_hints_come_last(device: EmulatedDriver, monkeypatch: pytest.MonkeyPatch,
                         capsys: pytest.CaptureFixture[str]) -> None:
    """The emulator is slower than a device, so that all is missed; small shapes in place of the whole ones."""
    whole = bench_gpu.cases
    monkeypatch.setattr(bench_gpu, "cases", lambda quick, torch: whole(True, torch))
    assert bench_gpu.run_gpu(wanted="fp8") == 0
    table, _, hints = capsys.readouterr().out.partition("\nMissed:\n")
    assert "matmul fp8" in table and "wanted: 1300 TFLOP/s. The sums of 128" in hints
