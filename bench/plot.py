"""The rows as a picture: ratios to the best peer and shares of copy speed, site by site."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is drawn, never a window

import matplotlib.pyplot as plt

from .report import Cell
from .rows import Machine

MARKERS = {"NCHW": "o", "NHWC": "s"}
COLOURS = {"fp32": "tab:blue", "bf16": "tab:orange", "fp16": "tab:green"}


def _smallest_last(site: str) -> list[int]:
    return [-int(n) for n in site.split("@")][::-1]


def plot(cells: Sequence[Cell], machine: Machine, path: Path) -> None:
    """Write a PNG: above the ratios (logarithmic), below the shares; forward left, backward right."""
    directions = ("forward", "backward")
    cells = [c for c in cells if c.ours.ok and c.case.purpose != "call"]
    # One op after the other, as they were measured, and of each the large maps first.
    ops = list(dict.fromkeys(c.case.op for c in cells))
    places = sorted({(c.case.op, c.case.site) for c in cells}, key=lambda p: (ops.index(p[0]), *_smallest_last(p[1])))
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, sharey="row", squeeze=False, layout="constrained")
    for column, direction in enumerate(directions):
        above, below = axes[0][column], axes[1][column]
        above.set_title(direction)
        for cell in cells:
            case = cell.case
            if case.direction != direction:
                continue
            series = list(MARKERS).index(case.layout) * len(COLOURS) + list(COLOURS).index(case.dtype)
            at = places.index((case.op, case.site)) + 0.12 * (series - 2.5)
            style = {"color": COLOURS[case.dtype], "marker": MARKERS[case.layout], "markersize": 5, "linestyle": "none"}
            ratio = cell.ratio()
            if ratio is not None and case.purpose == "ratio":
                above.plot(at, ratio, **style)
            # Where there is an input too large for a cache, its share is the one to show.
            if cell.ours.share is not None and not _has_larger(cell, cells):
                below.plot(at, cell.ours.share, **style)
        above.set_yscale("log", base=2)
        above.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        above.axhline(1, color="black", linewidth=0.8)
        below.axhline(1, color="black", linewidth=0.8)
        labels = [site if op == "blur_pool" else f"{op.removesuffix('_blur_pool')} {site}" for op, site in places]
        below.set_xticks(range(len(places)), labels, rotation=45, ha="right")
        for axis in (above, below):
            axis.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("times as fast as the best peer")
    axes[1][0].set_ylabel("share of copy speed")
    axes[1][0].set_ylim(bottom=0)
    used = {(c.case.dtype, c.case.layout) for c in cells}
    for dtype, layout in sorted(used):
        style = {"color": COLOURS[dtype], "marker": MARKERS[layout], "linestyle": "none"}
        axes[0][1].plot([], [], label=f"{dtype} {layout}", **style)
    if used:
        axes[0][1].legend(fontsize="small", ncols=2)
    where = f"{machine.name}, {machine.threads} threads, torch {machine.torch}, {machine.commit}"
    figure.suptitle(where, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _has_larger(cell: Cell, cells: Sequence[Cell]) -> bool:
    def about(c: Cell) -> tuple[object, ...]:
        return (c.ours.backend, c.case.op, c.case.site, c.case.layout, c.case.dtype, c.case.k, c.case.direction)

    return any(about(other) == about(cell) and other.case.batch > cell.case.batch for other in cells)
