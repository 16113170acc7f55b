"""``python -m bench.picture``: a photograph decimated with and without the filter, side by side."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")  # a file is drawn, never a window

import matplotlib.pyplot as plt
import torch
import typer

import aliasfused

from .rows import ROOT

FACTOR = 4
CROP = (slice(40, 400), slice(60, 380))


def photograph() -> torch.Tensor:
    """(1, 3, H, W) in [0, 1]: the tiled roofs of a pavilion, finer than the grid they are sampled on.

    china.jpg, inside scikit-learn: a photograph by danielbuechele (Flickr), CC BY 2.0.
    """
    picture = importlib.import_module("sklearn.datasets").load_sample_images().images[0]
    return torch.from_numpy(picture[CROP].copy()).permute(2, 0, 1)[None].float() / 255


def main(path: Annotated[Path, typer.Argument(help="The PNG to write.")] = ROOT / "docs" / "decimate.png") -> None:
    """Keep every fourth pixel of a photograph, and of what the low-pass filter leaves of it."""
    x = photograph()
    # The filter passes what the coarser grid can hold, a quarter of the band.
    taps = aliasfused.filters.kaiser(4 * FACTOR, cutoff=1 / FACTOR, width=0.2)
    panels = {
        f"x[..., ::{FACTOR}, ::{FACTOR}]": x[..., ::FACTOR, ::FACTOR],
        f"aliasfused.blur_pool2d(x, taps, stride={FACTOR})": aliasfused.blur_pool2d(x, taps, stride=FACTOR),
    }
    figure, axes = plt.subplots(1, 2, figsize=(8, 4.8), layout="constrained")
    for axis, (title, y) in zip(axes, panels.items(), strict=True):
        axis.imshow(y[0].clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
        axis.set_title(title, family="monospace", fontsize="medium")
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    typer.run(main)
