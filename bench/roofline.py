"""The roofline of a run of `sapper bench`: every case at the operations per byte that it needs and the rate it reached.

    python bench/roofline.py results.json [DIRECTORY [NAME]]

In: rows of a result, the suite `peaks` among them. Out: NAME.png and NAME.svg, roofline.png and roofline.svg by
default. Holds: a roof is a peak measured in the same run; a case's colour is that of the instruction whose peak its
floor counts. Needs matplotlib.

Williams, Waterman and Patterson: Roofline, an insightful visual performance model, CACM 2009.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

UNIT = 1e9
LEVELS = ("L1", "L2", "L3", "DRAM")
ROOFS = {"f32": ("peak multiply-add", "#1f77b4"), "bf16": ("peak vdpbf16ps", "#d9730d"),
         "i8": ("peak vpdpbusd", "#2a9134"), "i8 in pairs": ("peak vpmaddubsw", "#2a9134"),
         "bf16 on tiles": ("peak tdpbf16ps", "#d9730d"), "i8 on tiles": ("peak tdpbusd", "#2a9134")}
LEAST_INTENSITY, LARGEST_INTENSITY = 0.03, 2e3


def peaks_of(rows: list[dict[str, Any]], threads: int) -> dict[str, float]:
    """The suite `peaks` of so many threads: case -> GFLOP/s, GOP/s or GB/s."""
    return {row["case"]: row["rate"] for row in rows if row["threads"] == threads and row["case"].startswith("peak ")}


def draw(rows: list[dict[str, Any]], threads: int, axes: Any) -> int:
    """One panel. Returns how many cases are on it."""
    peaks = peaks_of(rows, threads)
    for label, (name, colour) in ROOFS.items():
        if name not in peaks:
            continue
        for level in LEVELS:
            slope = peaks[f"peak read {level}"]
            ridge = peaks[name] / slope
            axes.plot([LEAST_INTENSITY, ridge], [LEAST_INTENSITY * slope, peaks[name]], color="#bbbbbb", lw=0.8,
                      zorder=1)
            axes.plot([ridge, LARGEST_INTENSITY], [peaks[name]] * 2, color=colour, lw=1.2, zorder=1)
        axes.text(LARGEST_INTENSITY, peaks[name] * 1.06, f"{label} {peaks[name]:.0f} G/s", color=colour, ha="right",
                  fontsize=8)
    for number, level in enumerate(LEVELS):  # L2 and L3 are close: every other one stands further right
        slope, left = peaks[f"peak read {level}"], LEAST_INTENSITY * (1.1 if number % 2 else 3.5)
        axes.text(left, left * slope * 1.12, f"{level} {slope:.0f} GB/s", color="#777777", fontsize=7, rotation=38,
                  rotation_mode="anchor")
    count = 0
    for row in rows:
        if row["peer"] == "sapper" and row["threads"] == threads and row["operations"] and row["bytes"]:
            axes.scatter(row["operations"] / row["bytes"], row["operations"] / row["median_s"] / UNIT, s=14,
                         color=ROOFS[row["products"]][1], edgecolor="white", linewidth=0.4, zorder=3)
            count += 1
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(LEAST_INTENSITY, LARGEST_INTENSITY)
    axes.set_title(f"{threads} thread{'s' * (threads > 1)}, {count} cases", fontsize=10)
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("10⁹ operations per second")
    axes.grid(True, which="major", color="#eeeeee", zorder=0)
    return count


def plot(rows: list[dict[str, Any]], directory: Path, name: str = "roofline") -> list[Path]:
    """Write the two files, of that name. Raises ValueError where the result has no peaks."""
    counts = sorted({row["threads"] for row in rows if row["case"] == "peak multiply-add"})
    if not counts:
        raise ValueError("found no row `peak multiply-add`; expected the suite `peaks` in the result; mend: "
                         "sapper bench all")
    import matplotlib

    matplotlib.use("Agg")
    # The same rows give the same file: no date, no random identifiers.
    matplotlib.rcParams["svg.hashsalt"] = "sapper"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(counts), figsize=(6.5 * len(counts), 5.5), squeeze=False)
    for threads, axes in zip(counts, panels[0], strict=True):
        draw(rows, threads, axes)
    figure.tight_layout()
    paths = [directory / f"{name}.png", directory / f"{name}.svg"]
    for path in paths:
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    pyplot.close(figure)
    return paths


def main(arguments: list[str]) -> int:
    from report import ReportError, load_rows

    if not 1 <= len(arguments) <= 3:
        print("usage: python bench/roofline.py results.json [DIRECTORY [NAME]]", file=sys.stderr)
        return 2
    try:
        plot(load_rows(Path(arguments[0])), Path(arguments[1]) if len(arguments) > 1 else Path(__file__).parent,
             *arguments[2:])
    except (ReportError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
