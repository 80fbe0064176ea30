"""Libraries of kernels for other families: a program calls them by the family's C ABI, where qemu-user is installed."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, bf16, f16, f32, f64, i8, i32, tiles
from sapper.codegen.c_abi import STATUS, dims_of
from sapper.codegen.compile import encoded
from sapper.codegen.library import Library, c_kernel, make_library
from sapper.codegen.listing import Listing, at
from sapper.codegen.machine import Immediate, MachineFunction, Memory
from sapper.codegen.object import Part, write_executable
from sapper.codegen.translate import Emitter, settled, translated
from sapper.kernels import find
from sapper.targets import module_of, target
from sapper.targets.x86_64.registers import R12, RAX, RBX, RDI, RDX, RSI
from tests.ahead.test_families import FAMILIES, Family

M, N = sp.dims("M N")
PRODUCT = find("matmul_nn_f32").kernel
STACK_WORDS = 16
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    found = FAMILIES[request.param]
    if shutil.which(found.emulator[0]) is None:
        pytest.skip(f"{found.emulator[0]} is not installed")
    return found


class Call(NamedTuple):
    """integers, floats: what the registers hold, as words. stack: what lies there."""

    integers: list[int]
    floats: list[int]
    stack: list[int]


def enter_with(facts: Any) -> MachineFunction:
    """with_arguments(rdi: integers, floats and words of the stack, rsi: a function) -> its result. In the family's own
    rows: the convention is what is tested."""
    of = module_of(facts.family, "translate")
    s = Emitter(of.rows(facts))
    stack, (block, function, word) = of.REGISTERS[4], of.BETWEEN
    of.push(s, of.LINK)
    of.move(s, block, of.REGISTERS[7])
    of.move(s, function, of.REGISTERS[6])
    of.add_number(s, stack, stack, -8 * STACK_WORDS)
    for place in range(STACK_WORDS):
        of.load(s, word, block, 8 * (16 + place), 64, False)
        of.store(s, word, stack, 8 * place, 64)
    for place in range(8):
        if facts.family == "aarch64":
            s.emit("ldr.d", s.physical("vec", place), s.memory(block, 8 * (8 + place)))
        else:
            s.emit("fld", s.physical("fpr", 10 + place), s.memory(block, 8 * (8 + place)))
    for place in range(8):
        of.load(s, place if facts.family == "aarch64" else 10 + place, block, 8 * place, 64, False)
    of.call_at(s, function)
    of.add_number(s, stack, stack, 8 * STACK_WORDS)
    of.pop(s, of.LINK)
    of.leave(s)
    return settled(MachineFunction("with_arguments", s.body, {}), facts)


def main_function(name: str, block: bytes, addresses: dict[int, int], size: int) -> MachineFunction:
    """Reads the data, calls the function with what the block holds and writes the data; the status is the process's.

    addresses: of words of the block, that of a byte of the data.
    """
    emit = Listing()
    emit("lea.64", RSI, Memory(label="test.data"))
    emit("mov.64", RDX, Immediate(size))
    emit.label("read")
    emit("xor.32", RDI, RDI)
    emit("xor.32", RAX, RAX)
    emit("syscall")
    emit("add.64", RSI, RAX)
    emit("sub.64", RDX, RAX)
    emit("jne", "read")
    emit("lea.64", RBX, Memory(label="test.block"))
    for place, (word,) in enumerate(struct.iter_unpack("<q", block)):
        emit("mov.64", RAX, Immediate(word))
        emit("mov.64", at(RBX, 8 * place), RAX)
    for place, offset in addresses.items():
        emit("lea.64", RAX, Memory(label="test.data"))
        emit("add.64", RAX, Immediate(offset))
        emit("mov.64", at(RBX, 8 * place), RAX)
    emit("mov.64", RDI, RBX)
    emit("lea.64", RSI, Memory(label=name))
    emit("lea.64", RAX, Memory(label="with_arguments"))
    emit("call.indirect", RAX)
    emit("mov.64", R12, RAX)
    emit("lea.64", RSI, Memory(label="test.data"))
    emit("mov.64", RDX, Immediate(size))
    emit.label("write")
    emit("mov.32", RDI, Immediate(1))
    emit("mov.32", RAX, Immediate(1))
    emit("syscall")
    emit("add.64", RSI, RAX)
    emit("sub.64", RDX, RAX)
    emit("jne", "write")
    emit("mov.64", RDI, R12)
    emit("mov.32", RAX, Immediate(231))
    emit("syscall")
    emit("ud2")
    return MachineFunction("main", emit.body, {},
                           externals=frozenset({"test.data", "test.block", "with_arguments", name}))


def passed(library: Library, arguments: dict[str, Any]) -> tuple[Call, dict[int, int], bytearray]:
    """The first kernel's arguments as C passes them, which words are addresses, and the data that they point to."""
    kernel, of = library.kernels[0], module_of(library.target.family, "translate")
    data, addresses = bytearray(), {}
    call = Call([], [], [])
    dims: dict[str, int] = {}
    words: list[tuple[int, bool, int | None]] = []
    for name, type in kernel.parameters:
        value = arguments[name]
        if hasattr(type, "dims"):
            dims |= {dim: extent for dim, extent in zip(type.dims, value.shape, strict=True) if isinstance(dim, str)}
            data += bytes(-len(data) % 64)
            words.append((0, False, len(data)))
            data += value.tobytes()
        else:
            size = type.dtype.size_bytes
            held = np.asarray(value, FLOATS.get(type.dtype.name)).tobytes()[:size]
            words.append((int.from_bytes(held.ljust(8, b"\xa5"), "little", signed=True),
                          type.dtype.is_float and size >= 4, None))
    words += [(dims[dim], False, None) for dim in dims_of(kernel.parameters)]
    for word, floating, offset in words:
        if floating and len(call.floats) < 8:
            call.floats.append(word)
        elif len(call.integers) < 8 and (not floating or of.FLOATS_GO_ON):
            if offset is not None:
                addresses[len(call.integers)] = offset
            call.integers.append(word)
        else:
            if offset is not None:
                addresses[16 + len(call.stack)] = offset
            call.stack.append(word)
    return call, addresses, data


def run_c(library: Library, family: Family, arguments: dict[str, Any], folder: Path) -> int:
    """Call the first kernel's NAME on a program's own memory; arrays take what it wrote. Its status."""
    call, addresses, data = passed(library, arguments)
    block = b"".join(struct.pack(f"<{most}q", *(words + [-1] * (most - len(words))))
                     for words, most in zip(call, (8, 8, STACK_WORDS), strict=True))
    name = library.kernels[0].name
    main = translated(main_function(name, block, addresses, len(data)), library.target)
    parts = [*library.parts, *(Part(made.name, encoded(made, library.target))
                               for made in (main, enter_with(library.target)))]
    program = folder / "program"
    program.write_bytes(write_executable(parts, "main", library.areas | {"test.data": len(data),
                                                                         "test.block": len(block)},
                                         system=library.system))
    program.chmod(0o755)
    done = subprocess.run([*family.emulator, str(program)], input=bytes(data), capture_output=True, timeout=60,
                          check=False)
    assert done.returncode >= 0 and len(done.stdout) == len(data), done
    at_byte = 0
    for parameter, type in library.kernels[0].parameters:
        if hasattr(type, "dims"):
            array = arguments[parameter]
            at_byte += -at_byte % 64
            array[...] = np.frombuffer(done.stdout, array.dtype, array.size, at_byte).reshape(array.shape)
            at_byte += array.nbytes
    return done.returncode


@sp.kernel
def mixed(a: f32, x: Tensor[f32, M, N], b: f64, c: i8, d: f16, e: bf16, f: i32, g: f32, h: f32, i: f32, j: f32, k: f32,
          l: f32, m: f32, y: Tensor[f32, M, N]):
    """More floats and more integers than there are registers for."""
    for r, s in tiles(M, N):
        total = a + b.to(f32) + c.to(f32) + d.to(f32) + e.to(f32) + f.to(f32) + g + h + i + j + k + l + m
        y[r, s] = x[r, s] * 2.0 + total


@sp.kernel
def halves(x: Tensor[f32, N], y: Tensor[f32, N // 2]):
    for n in tiles(N // 2):
        y[n] = x[n] + x[n + N // 2]


def library_of(kernel: Any, family: Family) -> Library:
    facts = target(family.target)
    return make_library([c_kernel(kernel, facts)], facts)


def test_arguments_in_registers_and_on_the_stack(family: Family, tmp_path: Path) -> None:
    x = np.arange(21, dtype=np.float32).reshape(3, 7)
    numbers = {"a": np.float32(1), "b": np.float64(2), "c": np.int8(-3), "d": np.float16(4.5),
               "e": np.uint16(0x40B0), "f": np.int32(-6),
               **{name: np.float32(10 * place) for place, name in enumerate("ghijklm")}}
    y = np.zeros_like(x)
    arguments = {"a": numbers["a"], "x": x, **{n: v for n, v in numbers.items() if n != "a"}, "y": y}
    assert run_c(library_of(mixed, family), family, arguments, tmp_path) == 0
    total = sum(float(v) for n, v in numbers.items() if n != "e") + 5.5
    np.testing.assert_allclose(y, x * 2 + np.float32(total), rtol=1e-6)


def test_a_product_with_memory_of_its_own(family: Family, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((70, 300), np.float32), rng.standard_normal((300, 90), np.float32)
    c = np.zeros((70, 90), np.float32)
    assert run_c(library_of(PRODUCT, family), family, {"a": a, "b": b, "c": c}, tmp_path) == 0
    np.testing.assert_allclose(c, a @ b, rtol=1e-4, atol=1e-3)


def test_computed_extents_and_what_is_refused(family: Family, tmp_path: Path) -> None:
    library = library_of(halves, family)
    x, y = np.arange(9, dtype=np.float32), np.zeros(4, np.float32)
    assert run_c(library, family, {"x": x, "y": y}, tmp_path) == 0
    np.testing.assert_array_equal(y, x[:4] + x[4:8])
    other = family._replace(emulator=family.lacking)
    assert run_c(library, other, {"x": x, "y": y}, tmp_path) == STATUS["BAD_CPU"][0]


def test_the_text_is_the_code(family: Family, tmp_path: Path) -> None:
    if shutil.which(f"{family.tools}as") is None:
        pytest.skip(f"{family.tools}as is not installed")
    library = library_of(PRODUCT, family)
    (tmp_path / "own.o").write_bytes(library.o())
    (tmp_path / "theirs.s").write_text(library.s())
    subprocess.run([f"{family.tools}as", "theirs.s", "-o", "theirs.o"], cwd=tmp_path, check=True)
    texts = []
    for name in ("own", "theirs"):
        subprocess.run([f"{family.tools}ld", "-Ttext=0x10000", "-Tbss=0x2000000", "-e", PRODUCT.name, f"{name}.o", "-o",
                        name], cwd=tmp_path, check=True)
        subprocess.run([f"{family.tools}objcopy", "-O", "binary", "-j", ".text", name, f"{name}.text"], cwd=tmp_path,
                       check=True)
        texts.append((tmp_path / f"{name}.text").read_bytes())
    ours, theirs = texts
    assert theirs[:len(ours)] == ours and len(theirs) < len(ours) + 64
