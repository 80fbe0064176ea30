"""The README's example runs as it stands, and its links and commands exist."""

from __future__ import annotations

import linecache
import re
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_is_right() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    name = "<README.md>"
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)  # kernels read their own source
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(code, name, "exec"), names)
    x = names["x"].astype(np.float64)
    e = np.exp(x - x.max(axis=1, keepdims=True))
    np.testing.assert_allclose(names["y"], e / e.sum(axis=1, keepdims=True), rtol=1e-5)


def test_links_lead_somewhere() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "layers.md"):
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (document.parent / link).exists(), f"{document.name} links to {link}"


def test_commands_exist() -> None:
    from sapper.cli.app import app

    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None}
    known |= {group.name for group in app.registered_groups}
    assert set(re.findall(r"^    sapper (\w+)", README, re.MULTILINE)) <= known
    assert set(re.findall(r"^    make (\w+)", README, re.MULTILINE)) == {"demo", "test"}
