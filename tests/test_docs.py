"""The documentation is run: every page's Python, in order and in one namespace, and its commands.

A block ```python is executed. A block ```text right after it is what it prints; `...` stands for anything. A block
```console is a session of the command line: the lines after `$ sapper` are run, what follows is what they print.
Other blocks are only shown. `<!-- needs smollm2 -->` in a page skips it where that model is not installed.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sapper.lang.errors import KINDS
from tests.weights import find_smollm2

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md"))
LINKING = [*PAGES, *sorted(path for folder in ("", "bench", "examples") for path in (ROOT / folder).glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\s*$")
LINK = re.compile(r"\]\(([^)#:]*)(?:#([^)]*))?\)")


@dataclass(frozen=True)
class CodeBlock:
    """kind: the word after the fence. line: of the first line of the text, from 1."""

    kind: str
    text: str
    line: int


def blocks_of(page: str) -> list[CodeBlock]:
    found: list[CodeBlock] = []
    kind, start, lines = None, 0, []
    for number, line in enumerate(page.splitlines(), 1):
        fence = FENCE.match(line)
        if kind is None and fence is not None:
            kind, start, lines = fence[1], number + 1, []
        elif kind is not None and line.strip() == "```":
            found.append(CodeBlock(kind, "\n".join(lines), start))
            kind = None
        elif kind is not None:
            lines.append(line)
    assert kind is None, f"line {start}: the block is never closed"
    return found


def agrees(expected: str, printed: str) -> bool:
    pattern = r"[^\0]*?".join(re.escape(part) for part in expected.strip().split("..."))
    return re.fullmatch(pattern, "\n".join(line.rstrip() for line in printed.strip().splitlines())) is not None


def test_expected_output_is_really_compared() -> None:
    assert agrees("a\n...\nc", "a\nb\nb\nc") and agrees("x = ... ms", "x = 1.5 ms")
    assert not agrees("a\nc", "a\nb\nc") and not agrees("a", "a\nb") and not agrees("x = ...", "y = 1")


def run_page(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if "<!-- needs smollm2 -->" in text:
        find_smollm2()
    name = str(path.relative_to(ROOT))
    lines = [line + "\n" for line in text.splitlines()]
    linecache.cache[name] = (len(text), None, lines, name)
    namespace: dict[str, object] = {"__name__": "page"}
    blocks = blocks_of(text)
    printed = ""
    for position, block in enumerate(blocks):
        where = f"{name}:{block.line}"
        if block.kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * (block.line - 1) + block.text, name, "exec"), namespace)
            printed = out.getvalue()
            follows = blocks[position + 1].kind if position + 1 < len(blocks) else ""
            assert follows == "text" or not printed, f"{where} prints, and the page does not show it:\n{printed}"
        elif block.kind == "text":
            assert position and blocks[position - 1].kind == "python", f"{where}: no code prints this"
            assert agrees(block.text, printed), f"{where}: printed\n{printed}\nexpected\n{block.text}"
        elif block.kind == "console":
            run_console(block, where)


def run_console(block: CodeBlock, where: str) -> None:
    sessions: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            sessions.append((line[2:], []))
        else:
            sessions[-1][1].append(line)
    for command, output in sessions:
        words = shlex.split(command)
        if words[0] != "sapper":
            continue
        pytest.importorskip("typer")
        from sapper.cli.app import run

        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            status = run(words[1:])
        assert status == 0, f"{where}: {command} ended with status {status}"
        if output:
            assert agrees("\n".join(output), out.getvalue()), f"{where}: {command} printed\n{out.getvalue()}"


@contextlib.contextmanager
def own_pieces() -> Iterator[None]:
    """What a page writes by hand, no other page has. The library's pieces are there before: imports happen once."""
    import sapper.kernels.by_hand.contraction
    import sapper.kernels.by_hand.matmul
    import sapper.kernels.by_hand.rows  # noqa: F401
    from sapper.lang.by_hand import CONTRACTIONS, PIECES

    before = dict(PIECES), dict(CONTRACTIONS)
    try:
        yield
    finally:
        for registry, entries in zip((PIECES, CONTRACTIONS), before, strict=True):
            registry.clear()
            registry.update(entries)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_page(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, share_of_cores: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAPPER_CACHE_DIR", str(tmp_path / "cache"))
    for variable in ("SAPPER_INTERPRET", "SAPPER_TRACE", "SAPPER_VERIFY"):
        monkeypatch.delenv(variable, raising=False)
    with own_pieces():
        run_page(path)


def anchors_of(page: str) -> set[str]:
    """What links can name: the headings, as GitHub writes them."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", LINKING, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for file, anchor in LINK.findall(path.read_text(encoding="utf-8")):
        target = path.parent / file if file else path
        assert target.exists(), f"{path.name} links to {file}, which does not exist"
        assert not anchor or anchor in anchors_of(target.read_text(encoding="utf-8")), (
            f"{path.name} links to {file}#{anchor}; {target.name} has no such heading")


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / target[0]).resolve() for target in LINK.findall(index)}
    pages = [path for path in PAGES if path.resolve() not in linked and path.name != "README.md"]
    missing = [str(path.relative_to(ROOT)) for path in pages]
    assert not missing, f"docs/README.md does not link to {', '.join(missing)}"


def test_the_language_page_names_every_kind_of_error() -> None:
    page = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (.+) \|$", page.split("## Errors")[1], re.MULTILINE))
    assert rows == KINDS


def test_the_language_page_names_every_function() -> None:
    import sapper

    page = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
    missing = [name for name in sapper.__all__ if re.search(rf"`[^`]*\b{re.escape(name)}\b[^`]*`", page) is None]
    assert not missing, f"docs/language.md does not mention {', '.join(missing)}"
