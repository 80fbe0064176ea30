"""Imports point one way: a package of sapper imports only itself and packages that come before it (docs/layers.md)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import sapper

ROOT = Path(sapper.__file__).parent
ORDER = ("ir", "lang", "tile", "lane", "targets", "codegen", "assembly", "runtime", "ahead", "emulate", "tune",
         "kernels", "models", "cli")
USERS = frozenset({"kernels", "models", "cli"})
"""These may also write `import sapper`, as a user does."""


def imports_of(text: str, package: tuple[str, ...]) -> list[tuple[int, str]]:
    """(line, absolute module) of every import in a module, those inside functions and for type checkers included.

    package: that of the module, such as ("sapper", "tile"). A name imported from a package counts as a module of it.
    """
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                wanted = str(node.args[0].value)
                dots = len(wanted) - len(wanted.lstrip("."))
                base = package[: len(package) - dots + 1] if dots else ()
                found.append((node.lineno, ".".join([*base, *([wanted[dots:]] if wanted[dots:] else [])])))
    return found


def violations(text: str, package: tuple[str, ...]) -> list[str]:
    """What a module of sapper imports against the order."""
    wrong = []
    own = package[1]
    for line, module in imports_of(text, package):
        parts = module.split(".")
        if parts[0] != "sapper":
            continue
        imported = parts[1] if len(parts) > 1 else ""
        if imported in ORDER:
            if ORDER.index(imported) > ORDER.index(own):
                wrong.append(f"line {line}: {own} imports {module}; {imported} comes later")
        elif own not in USERS and imported != "__version__":
            wrong.append(f"line {line}: {own} imports {module}; expected the package where it lives")
    return wrong


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT)


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    package = ("sapper", *path.relative_to(ROOT).parts[:-1])
    assert violations(path.read_text(encoding="utf-8"), package) == []


def test_every_package_has_its_place() -> None:
    packages = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert packages == set(ORDER)


def test_the_document_gives_the_same_order() -> None:
    document = ROOT.parent / "docs" / "layers.md"
    if not document.exists():
        pytest.skip("the documents are not beside the package")
    assert tuple(re.findall(r"^\| `(\w+)`", document.read_text(encoding="utf-8"), re.MULTILINE)) == ORDER


@pytest.mark.parametrize(("text", "package", "message"), [
    ("from ..tile import plan", ("sapper", "ir"), "ir imports sapper.tile.plan"),
    ("from .. import runtime", ("sapper", "lang"), "lang imports sapper.runtime"),
    ("def f():\n    from ..targets import target", ("sapper", "lane"), "line 2: lane imports sapper.targets.target"),
    ("from ...codegen import encode", ("sapper", "targets", "x86_64"), "targets imports sapper.codegen.encode"),
    ("import sapper.cli.main", ("sapper", "models"), "models imports sapper.cli.main"),
    ("import_module('..models', __name__)", ("sapper", "kernels"), "kernels imports sapper.models"),
    ("import sapper as sp", ("sapper", "tile"), "expected the package where it lives"),
    ("from sapper import f32", ("sapper", "runtime"), "expected the package where it lives"),
])
def test_a_violation_is_found(text: str, package: tuple[str, ...], message: str) -> None:
    (found,) = violations(text, package)
    assert message in found


@pytest.mark.parametrize(("text", "package"), [
    ("from ..ir.nodes import Op", ("sapper", "lang")), ("from .plan import x", ("sapper", "tile")),
    ("import numpy", ("sapper", "ir")), ("import sapper as sp", ("sapper", "kernels")),
    ("from sapper import f32", ("sapper", "models", "llama")), ("from .. import __version__", ("sapper", "runtime")),
])
def test_what_is_allowed(text: str, package: tuple[str, ...]) -> None:
    assert violations(text, package) == []
