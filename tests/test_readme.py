"""The README's example runs as it stands, and its links and commands exist."""

from __future__ import annotations

import linecache
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.weights import find_smollm2

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


def test_what_is_said_of_a_model_in_one_file_holds(monkeypatch: pytest.MonkeyPatch, shared_cache: str) -> None:
    """Of the session that `python tools/record_session.py readme` recorded: all but bytes of code, times and speeds."""
    from sapper.ahead.library import plan_model, report
    from sapper.models.whole import load_whole
    from sapper.targets import target

    monkeypatch.setenv("SAPPER_CACHE_DIR", shared_cache)
    (wanted, dtype, name, session) = re.findall(
        r"^    \$ sapper build (\S+) --dtype (\S+) -o (\w+)\.s\n((?:    .*\n)+)", README, re.MULTILINE)[0]
    (target_name,) = re.findall(r" bytes for (\w+); declared in", session)
    assert wanted == "smollm2"
    model = load_whole(find_smollm2(), name, None, dtype, words=False)
    found, mib = report(plan_model(model, target(target_name))), 1 << 20
    for said in (
        f"    {found['kernels']} kernels, ",
        f"; a step is {found['step_launches']} launches, a chunk of a prompt {found['prefill_launches']}\n",
        f"    memory of a model: {found['state_bytes'] / mib:.1f} MiB of state for {model.context} tokens, "
        f"{found['temporary_bytes'] / mib:.1f} MiB of temporaries, "
        f"{found['scratch_bytes_of_a_worker'] / mib:.1f} MiB of scratch for each worker\n",
        f"    {name}.weights: {found['weights_bytes']} bytes, ",
    ):
        assert said in session, "README.md says something else; mend: python tools/record_session.py readme"
