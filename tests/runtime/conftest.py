"""Kernels for the runtime's tests, assembled by our own encoder, so that no compiler stands between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sapper.codegen.encode import encode
from sapper.codegen.machine import Immediate, Instruction, Label, LabelReference, MachineFunction, Memory, Register
from sapper.ir.types import TensorType, TileType, f32, i64
from sapper.runtime import launch as launch_module
from sapper.runtime.compiled import CompiledKernel
from sapper.targets.x86_64.instructions import ROWS
from sapper.targets.x86_64.registers import R8, R9, R10, R11, RAX, RCX, RDI, RDX, RSI


def assemble(*lines: str | tuple[Any, ...]) -> bytes:
    """Labels as strings; instructions as (row, operands...): ints are general registers, ("vec", n) others."""
    body: list[Instruction | Label] = []
    for line in lines:
        if isinstance(line, str):
            body.append(Label(line))
            continue
        row, *operands = line
        converted: list[Any] = []
        for operand in operands:
            if isinstance(operand, int):
                converted.append(Register("gpr", operand))
            elif isinstance(operand, tuple):
                converted.append(Register(*operand))
            elif isinstance(operand, str):
                converted.append(LabelReference(operand))
            else:
                converted.append(operand)
        body.append(Instruction(ROWS[row], converted))
    return encode(MachineFunction("test", body, {})).code


def at(base: int, disp: int = 0, index: int | None = None, scale: int = 1) -> Memory:
    return Memory(Register("gpr", base), None if index is None else Register("gpr", index), scale, disp)


def word(number: int) -> Memory:
    """Word `number` of the argument block, while rdi still holds it."""
    return at(RDI, 8 * number)


XMM0, XMM1 = ("vec", 0), ("vec", 1)

# f32: out[i] = a[i] + x for i < M, M a multiple of 4; slots a.data, out.data, dim.M, scalar.x
ADD_F32 = assemble(
    ("mov.64", RAX, word(3)), ("mov.64", RCX, word(4)), ("mov.64", RDX, word(5)), ("vbroadcastss.128", XMM1, word(6)),
    "loop", ("sub.64", RDX, Immediate(4)), ("jb", "done"),
    ("vaddps.128", XMM0, XMM1, at(RAX, 0, RDX, 4)), ("vmovups.128", at(RCX, 0, RDX, 4), XMM0),
    ("jmp", "loop"), "done", ("ret",),
)  # fmt: skip
ADD_SLOTS = ("a.data", "out.data", "dim.M", "scalar.x")

# i64: out[i] = a[i * stride] + x for i < M; slots a.data, out.data, dim.M, scalar.x, a.stride.0
ADD_I64 = assemble(
    ("mov.64", RAX, word(3)), ("mov.64", RCX, word(4)), ("mov.64", RDX, word(5)), ("mov.64", R9, word(6)),
    ("mov.64", RSI, word(7)), ("xor.32", R10, R10),
    "loop", ("sub.64", RDX, Immediate(1)), ("jb", "done"),
    ("mov.64", R8, at(RAX)), ("add.64", R8, R9), ("mov.64", at(RCX), R8),
    ("lea.64", RAX, at(RAX, 0, RSI, 8)), ("add.64", RCX, Immediate(8)),
    ("jmp", "loop"), "done", ("ret",),
)  # fmt: skip
ADD_I64_SLOTS = (*ADD_SLOTS, "a.stride.0")

# Tasks 0 to M-1 from counter 0; a task adds one to out[task], spends some time, and writes its worker into who[task].
# Every worker also writes its index and the number of workers at the start of its own scratch.
# Slots out.data, who.data, dim.M, scalar.x (turns of the waiting loop)
TASKS = assemble(
    ("mov.64", RAX, word(0)), ("mov.64", RCX, RSI), ("imul.64", RCX, word(1)), ("mov.64", at(RAX, 0, RCX), RSI),
    ("mov.64", at(RAX, 8, RCX), RDX),
    ("mov.64", R8, word(3)), ("mov.64", R9, word(4)), ("mov.64", R10, word(2)),
    "next", ("mov.32", RAX, Immediate(1)), ("lock.xadd.32", at(R10), RAX), ("cmp.64", RAX, word(5)), ("jae", "done"),
    ("add.64", at(R8, 0, RAX, 8), Immediate(1)), ("mov.64", at(R9, 0, RAX, 8), RSI),
    ("mov.64", R11, word(6)),
    "spin", ("sub.64", R11, Immediate(1)), ("jae", "spin"), ("jmp", "next"),
    "done", ("ret",),
)  # fmt: skip

# Copies words 0 to 4 of the argument block to out, whose address is word 3.
RECORD = assemble(
    ("mov.64", RAX, word(3)),
    *(line for n in range(5) for line in (("mov.64", RCX, word(n)), ("mov.64", at(RAX, 8 * n), RCX))),
    ("ret",),
)
TASK_SLOTS = ("out.data", "who.data", "dim.M", "scalar.x")


class FakeKernel:
    """What the launcher needs of a lang.Kernel."""

    def __init__(self, name: str, parameters: list[tuple[str, TensorType | TileType]], **options: Any) -> None:
        self.name = name
        self.parameters = parameters
        self.options = options
        self.defaults: dict[str, Any] = {}
        self.specialise: frozenset[str] = frozenset()
        self.launcher: Callable[..., Any] = launch_module.make_launcher(self)

    def source_digest(self) -> str:
        return f"digest of {self.name}"

    def check_constants(self) -> None:
        """It closes over nothing."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.launcher(*arguments, **options)


class Compiler:
    """Stands for the compiler: gives the code that it holds, and notes what it was asked."""

    def __init__(self) -> None:
        self.results: dict[str, CompiledKernel] = {}
        self.calls: list[dict[str, Any]] = []

    def compile_kernel(self, kernel: FakeKernel, **facts: Any) -> CompiledKernel:
        self.calls.append({"kernel": kernel.name, **facts})
        return self.results[kernel.name]


@pytest.fixture
def compiler(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    """A runtime with the stand-in compiler and a disk cache of its own."""
    monkeypatch.setenv("SAPPER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SAPPER_INTERPRET", raising=False)
    monkeypatch.delenv("SAPPER_THREADS", raising=False)
    before = launch_module.configuration()
    made = Compiler()
    launch_module.configure(made.compile_kernel, lambda wanted: wanted or "this CPU", str, toolchain_key=lambda: "test")
    yield made
    launch_module.set_configuration(before)


def tensor(dtype: Any, *dims: str | int) -> TensorType:
    return TensorType(dtype, dims)


@pytest.fixture
def add_f32(compiler: Compiler) -> FakeKernel:
    compiler.results["add_f32"] = CompiledKernel("add_f32", ADD_F32, ADD_SLOTS, stored=("out",))
    return FakeKernel("add_f32", [("a", tensor(f32, "M")), ("x", TileType(f32)), ("out", tensor(f32, "M"))])


@pytest.fixture
def add_i64(compiler: Compiler) -> FakeKernel:
    compiler.results["add_i64"] = CompiledKernel("add_i64", ADD_I64, ADD_I64_SLOTS, stored=("out",))
    return FakeKernel("add_i64", [("a", tensor(i64, "M")), ("x", TileType(i64)), ("out", tensor(i64, "M"))])


@pytest.fixture
def tasks(compiler: Compiler) -> FakeKernel:
    compiler.results["tasks"] = CompiledKernel(
        "tasks", TASKS, TASK_SLOTS, scratch_bytes=100, counters=1, stored=("out", "who"), tasks=(((1, ("M",), 1),),),
        work=((100_000.0, ("M",)),),
    )  # fmt: skip
    return FakeKernel("tasks", [("out", tensor(i64, "M")), ("who", tensor(i64, "M")), ("x", TileType(i64))])
