"""NVIDIA's assembler, where it is at hand: what it makes of PTX. Only tests and reports ask it, no kernel needs it.

Enters: modules of PTX with one kernel each, a level. Leaves: `Assembled` for each: registers, spills, machine code's
instructions, and its opcodes where a disassembler is at hand too. Holds: nothing is kept on disk.
Sources: CUDA Binary Utilities (nvdisasm, the opcodes of each architecture); ELF-64 object file format (sections).
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

INSTRUCTION_BYTES = 16
"""Of machine code, sm_70 and later."""

_WHEELS = ("nvidia/*/bin", "nvidia/*/*/bin", "triton/backends/nvidia/bin")
"""Where Python packages have the programs."""


class AssemblerError(Exception):
    """The assembler is missing, or took exception to a text: the message says which."""


@dataclass(frozen=True, slots=True)
class Sass:
    """One instruction of machine code. target: place of the instruction that it may jump to."""

    opcode: str
    target: int | None = None


@dataclass(frozen=True, slots=True)
class Assembled:
    """registers: of a thread. spilled_bytes: stored and loaded, in the text. instructions: with the padding at the end.
    code: the machine code without it, or None where there is no disassembler."""

    registers: int
    spilled_bytes: int
    instructions: int
    code: tuple[Sass, ...] | None

    def opcodes(self) -> dict[str, int] | None:
        """Opcode without its modifiers (HMMA, LDGSTS, ...) -> how often it stands in the code."""
        return None if self.code is None else dict(sorted(Counter(item.opcode for item in self.code).items()))

    def loops(self) -> list[Counter[str]]:
        """Opcodes of each stretch of code that ends in a jump back to its begin, in the order of their ends."""
        code = self.code or ()
        return [Counter(item.opcode for item in code[place.target:end + 1])
                for end, place in enumerate(code) if place.target is not None and place.target < end]


@cache
def find_tool(name: str) -> str | None:
    """The program `name` (ptxas, nvdisasm): on the path, else in a package such as nvidia-cuda-nvcc."""
    places = (path for root in sys.path for pattern in _WHEELS for path in sorted(Path(root).glob(f"{pattern}/{name}")))
    return shutil.which(name) or next(map(str, places), None)


def tool(name: str) -> str:
    """The same; raises AssemblerError where it is missing."""
    found = find_tool(name)
    if found is None:
        raise AssemblerError(f"found no {name}; expected it on the path, from the CUDA toolkit, or in the Python "
                             "package nvidia-cuda-nvcc")
    return found


@cache
def version(path: str) -> str:
    """Of ptxas, such as "13.0.88"."""
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V([\d.]+)", text)
    return found.group(1) if found else "unknown"


def name() -> str:
    """Who assembles, such as "ptxas 13.0.88". Raises AssemblerError where it is missing."""
    return f"ptxas {version(tool('ptxas'))}"


def flags(level: str) -> list[str]:
    """With its version and the text, all that ptxas's code depends on."""
    return [f"-arch={level}", "-v"]


def assemble(texts: Sequence[str], level: str, ptxas: str = "") -> dict[str, Assembled]:
    """By name of the kernel. All texts go through one run of ptxas (of the one at `ptxas`, if given).

    Raises AssemblerError where ptxas is missing, or reports an error or a warning.
    """
    heads = [text[:text.index(".visible")] for text in texts]
    newest = max(heads, key=lambda head: [int(n) for n in re.findall(r"\.version (\d+)\.(\d+)", head)[0]])
    near = next((line for head in heads for line in head.splitlines() if line.startswith(".extern")), "")
    bodies = [text[text.index(".visible"):] for text in texts]
    head = [line for line in newest.splitlines() if not line.startswith(".extern")]
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "all.ptx"), Path(folder, "all.cubin")
        source.write_text("\n".join([*head, near, *bodies]), encoding="utf-8")
        done = subprocess.run([ptxas or tool("ptxas"), *flags(level), "-o", str(made), str(source)],
                              capture_output=True, text=True, check=False)
        if done.returncode or "warning" in done.stderr:
            raise AssemblerError(f"ptxas for {level}: {done.stderr[:3000].strip()}")
        sizes = code_bytes(made.read_bytes())
        code = disassemble(made)
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    return {name: Assembled(int(registers), int(stores) + int(loads), sizes[name] // INSTRUCTION_BYTES,
                            None if code is None else code[name])
            for name, stores, loads, registers in re.findall(pattern, done.stderr, re.DOTALL)}


def code_bytes(cubin: bytes) -> dict[str, int]:
    """kernel -> bytes of its section .text.NAME."""
    (start,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + size * n) for n in range(count)]
    table = headers[names][4]
    found = {cubin[table + h[0]:cubin.index(0, table + h[0])].decode(): h[5] for h in headers}
    return {name.removeprefix(".text."): length for name, length in found.items() if name.startswith(".text.")}


def disassemble(cubin: Path) -> Mapping[str, tuple[Sass, ...]] | None:
    """kernel -> its machine code, up to the jump to itself that ends it; None where there is no nvdisasm."""
    program = find_tool("nvdisasm")
    if program is None:
        return None
    text = subprocess.run([program, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    sections = re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)[1:]
    return {name: _read(lines) for name, lines in zip(sections[::2], sections[1::2], strict=True)}


def _read(listing: str) -> tuple[Sass, ...]:
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in listing.splitlines():
        label = re.match(r"(\.L_x_\d+):", line)
        if label is not None:
            labels[label.group(1)] = len(found)
        item = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)([^;]*)", line)
        if item is not None:
            target = re.search(r"`\((\.L_x_\d+)\)", item.group(2))
            found.append((item.group(1), target.group(1) if target else ""))
    while found and found[-1][0] == "NOP":
        found.pop()
    code = tuple(Sass(opcode, labels.get(name)) for opcode, name in found)
    return code[:-1] if code and code[-1].target == len(code) - 1 else code
