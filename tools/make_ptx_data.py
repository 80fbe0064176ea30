"""Makes the PTX of other compilers that tests/emulate runs: tests/emulate/data/*.ptx.

    python tools/make_ptx_data.py [triton] [nvcc] [nvrtc]

Needs Triton (it compiles offline, without a GPU), nvcc, or NVRTC with its headers (pip install cuda-bindings
nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl), for the part that is asked for; all by default.
Debug information is left out, and variables that no kernel uses. The kernels stand in ptx_triton_kernels.py,
ptx_nvcc_kernels.cu and ptx_nvrtc_kernels.cu beside this file.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATA = HERE.parent / "tests" / "emulate" / "data"


def stripped(text: str) -> str:
    """PTX without comments, source locations and debug sections."""
    text = re.sub(r"\.section[^{]*\{[^}]*\}", "", text)
    lines = (re.sub(r"//.*", "", line).rstrip() for line in text.splitlines())
    debug = re.compile(r"\s*(\.loc\s|\.file\s|\$L__(tmp|func_begin|func_end)\d*:)")
    kept = [line for line in lines if line.strip() and not debug.match(line)]
    variable = re.compile(r"\s*\.global .*?\b(_Z\w+)(\[\d*\])*( = .*)?;$")
    named = [(line, variable.match(line)) for line in kept]
    used = set(re.findall(r"\b_Z\w+", "\n".join(line for line, found in named if found is None)))
    kept = [line for line, found in named if found is None or found[1] in used]
    return "\n".join(re.sub(r"^\s+", " ", line) for line in kept) + "\n"


def write(name: str, text: str) -> None:
    path = DATA / f"{name}.ptx"
    path.write_text(stripped(text), encoding="utf-8")
    print(f"{path.name}: {path.stat().st_size} bytes")


def make_triton() -> None:
    import ptx_triton_kernels as kernels
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    for case in kernels.CASES:
        if len(sys.argv) > 2 and case.name not in sys.argv[2:]:
            continue
        signature: dict[str, str] = {**case.signature, **dict.fromkeys(case.constants, "constexpr")}
        attributes: dict[Any, Any] = {(number,): [["tt.divisibility", 16]] for number, name in enumerate(signature)
                                      if name in case.divisible}
        for level in case.levels:
            kind = GluonASTSource if case.gluon else ASTSource
            source = kind(fn=case.kernel, signature=signature, constexprs=case.constants, attrs=attributes)
            options = {"num_warps": case.warps, "num_stages": case.stages, **case.options}
            compiled = triton.compile(source, target=GPUTarget("cuda", level, 32), options=options)
            metadata = compiled.metadata
            write(f"triton_{case.name}_sm{level}", compiled.asm["ptx"])
            if metadata.shared:
                print(f"    shared bytes: {metadata.shared}, tensor maps: {metadata.tensordesc_meta}")


def make_nvcc() -> None:
    source = HERE / "ptx_nvcc_kernels.cu"
    parts = re.findall(r"^// part (\w+) (sm_\w+)$", source.read_text(encoding="utf-8"), re.MULTILINE)
    for name, level in parts:
        command = ["nvcc", "-ptx", f"-arch={level}", "-std=c++17", "-O3", f"-DPART_{name.upper()}", str(source), "-o",
                   "-"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        write(f"nvcc_{name}_{level}", text)


def make_nvrtc() -> None:
    from cuda.bindings import nvrtc
    from cuda.pathfinder import find_nvidia_header_directory, load_nvidia_dynamic_lib

    load_nvidia_dynamic_lib("nvrtc")
    source = (HERE / "ptx_nvrtc_kernels.cu").read_text(encoding="utf-8")
    include = find_nvidia_header_directory("cudart")
    for name, level in re.findall(r"^// part (\w+) sm_(\w+)$", source, re.MULTILINE):
        options = [f"--gpu-architecture=compute_{level}", "--std=c++17", f"-I{include}", f"-I{include}/cccl",
                   "--device-int128", f"-DPART_{name.upper()}"]
        _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], [])
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        if int(result):
            raise SystemExit(log.decode())
        _, size = nvrtc.nvrtcGetPTXSize(program)
        text = b" " * size
        nvrtc.nvrtcGetPTX(program, text)
        write(f"nvrtc_{name}_sm_{level}", text.rstrip(b"\0 ").decode())


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["triton", "nvcc", "nvrtc"]
    DATA.mkdir(parents=True, exist_ok=True)
    if "triton" in wanted:
        make_triton()
    if "nvcc" in wanted:
        make_nvcc()
    if "nvrtc" in wanted:
        make_nvrtc()
