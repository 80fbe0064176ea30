"""The README's example runs as it stands, its commands exist, and its figures are those that were measured."""

from __future__ import annotations

import json
import linecache
import re
from itertools import takewhile
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


def stands_for(number: str, value: float | None) -> bool:
    """Whether the number is the value, as far as its digits go."""
    return value is not None and f"{value:.{len(number.partition('.')[2])}f}" == number


def measured(file: Path) -> list[tuple[float, list[float | None]]]:
    """Rate of each of our rows; its percentage of the floor, and how many times as long its peers took."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    found = []
    for at, row in enumerate(rows):
        if row["peer"] == "sapper" and row["rate"] is not None and row["median_s"]:
            peers = takewhile(lambda other: other["peer"] != "sapper", rows[at + 1:])
            ratios = [peer["median_s"] / row["median_s"] for peer in peers]
            found.append((row["rate"], [row["percent_of_floor"], *ratios]))
    return found


def test_figures_are_those_of_the_runs_that_are_kept() -> None:
    """Every number of a figure, in the lines below a link to a page of bench/, stands in the run of that page: rates,
    and beside them only what belongs to rows of such rates."""
    sections = re.findall(r"\[more\]\(bench/(\w+)\.md[\s\S]*?\n\n((?:    .+\n)+)", README)
    assert [name for name, _ in sections] == ["README", "graniterapids", "zen5", "zen3", "cascadelake"]
    for name, lines in sections:
        rows = measured(ROOT / "bench" / ("results.json" if name == "README" else f"{name}.json"))
        for line in lines.splitlines():
            figures = re.split(r"  +", line.strip(), maxsplit=1)[1]
            numbers = re.findall(r"\b\d+(?:\.\d+)?\b", figures)
            at = [row for row in rows if any(stands_for(number, row[0]) for number in numbers)]
            for number in numbers:
                assert any(stands_for(number, value) for rate, others in at for value in (rate, *others)), (
                    f"README.md: {line.strip()}: {number} is not in bench/{name}")


def test_examples_are_counted_and_timed() -> None:
    from examples import examples

    names = {example.name for example in examples()}
    assert re.findall(r"\(examples\): (\d+) kernels", README) == [str(len(names))]
    tables = (ROOT / "bench" / "README.md").read_text(encoding="utf-8").split("## On a GPU")[0]
    assert set(re.findall(r"^\| (\w+) \| \S+=", tables, re.MULTILINE)) == names
