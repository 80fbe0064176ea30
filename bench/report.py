"""Writes the results of `sapper bench ... --json FILE` as a table into bench/README.md, and its roofline beside it.

    python bench/report.py results.json [README.md]

In: the JSON file. Out: the text between the two marks in the README is replaced; where the result has the suite
`peaks`, its roofline (bench/roofline.py), beside README.md as roofline.png and .svg, beside another NAME.md as
NAME-roofline.png and .svg. Holds: nothing else changes.
"""

from __future__ import annotations

import json
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
KEYS = ("case", "dtype", "shape", "threads", "peer", "median_s", "rate", "unit", "percent_of_floor",
        "ratio_to_best_peer", "operations", "bytes", "products")


class ReportError(Exception):
    """What is wrong with the files, and how to mend it."""


def load_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a result. Raises ReportError if the file is no such result."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: found {error}; expected what `sapper bench all --json FILE` writes") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) == set(KEYS) for row in rows):
        raise ReportError(f"{path}: expected a list of objects with the keys {', '.join(KEYS)}")
    return rows


def time_text(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: a line for each case and number of threads; the peers' times over ours beside it."""
    peers = list(dict.fromkeys(row["peer"] for row in rows if row["peer"] != "sapper"))
    heads = ["case", "dtype", "shape", "threads", "time", "rate", "of floor", *(f"{peer} / sapper" for peer in peers)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * 3 + "--:|" * (len(heads) - 3)]
    for at, row in enumerate(rows):
        if row["peer"] != "sapper":
            continue
        # Its peers, measured in turn with it, come behind it.
        others = {r["peer"]: r["median_s"] for r in takewhile(lambda r: r["peer"] != "sapper", rows[at + 1:])}
        cells = [row["case"], row["dtype"], row["shape"], str(row["threads"]), time_text(row["median_s"])]
        cells.append("" if row["rate"] is None or row["unit"] in ("ms", "us") else f"{row['rate']:.4g} {row['unit']}")
        cells.append("" if row["percent_of_floor"] is None else f"{row['percent_of_floor']:.0f} %")
        for peer in peers:
            other = others.get(peer)
            cells.append(f"{other / row['median_s']:.2f}" if other and row["median_s"] else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def replaced(text: str, new: str) -> str:
    """The text with what stands between the marks replaced. Raises ReportError where a mark is missing."""
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise ReportError(f"the README: found no {BEGIN} before {END}; expected both, each on a line")
    return f"{text[: begin + len(BEGIN)]}\n\n{new}\n\n{text[end:]}"


def main(arguments: list[str]) -> int:
    if not 1 <= len(arguments) <= 2:
        print("usage: python bench/report.py results.json [README.md]", file=sys.stderr)
        return 2
    readme = Path(arguments[1]) if len(arguments) == 2 else Path(__file__).with_name("README.md")
    try:
        rows = load_rows(Path(arguments[0]))
        readme.write_text(replaced(readme.read_text(encoding="utf-8"), table(rows)), encoding="utf-8")
        if any(row["case"] == "peak multiply-add" for row in rows):
            sys.path.insert(0, str(Path(__file__).parent))
            from roofline import plot

            plot(rows, readme.parent, "roofline" if readme.stem == "README" else f"{readme.stem}-roofline")
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
