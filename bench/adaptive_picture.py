"""``python -m bench.adaptive_picture``: a photograph at a quarter of its size, without a filter, by a Gaussian, by an adaptive blur.

The adaptive blur is an ``AdaptiveBlurPool2d`` of 7 x 7 filters, one for all channels, at stride 4. It blurs the picture
together with 8 maps that two convolutions draw from it, so that its predictor sees more than colours. All of it is fitted to
reconstruct, for 300 steps of Adam on crops of the photograph at random places:

    minimise  mean |up(y(x)) - x|^2,   up: bilinear, y[i, j] being in the place of x[4 i, 4 j]

As the grid of a crop lies anywhere, this is two errors in one: that of the mean over the 16 places a grid can have, which is
blur, and the variance between them, which is aliasing. The Gaussian is the one with the least such error on what is shown.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib

matplotlib.use("Agg")  # a file is drawn, never a window

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import typer
from matplotlib.colors import LogNorm
from torch import nn

import aliasfused
from aliasfused import filters, metrics

from .picture import photograph
from .rows import ROOT

FACTOR = 4
FILTER = 7
FEATURES = 8
STEPS = 300
BATCH, SIZE = 8, 96
MARGIN = 2 * FACTOR  # where crops end, their own border takes part
SIGMAS = [0.5 + 0.05 * step for step in range(31)]


class Decimator(nn.Module):
    """(N, 3, H, W) to every fourth pixel of it, by filters that are predicted from it."""

    def __init__(self) -> None:
        super().__init__()
        conv = functools.partial(nn.Conv2d, kernel_size=5, padding=2, padding_mode="reflect")
        self.features = nn.Sequential(conv(3, FEATURES), nn.ReLU(), conv(FEATURES, FEATURES), nn.ReLU())
        self.blur = aliasfused.nn.AdaptiveBlurPool2d(
            3 + FEATURES, FILTER, FACTOR, groups=1, predict="strided", init="binomial"
        )

    def given(self, x: torch.Tensor) -> torch.Tensor:
        """What the blur blurs, and predicts from."""
        return torch.cat([x, self.features(x)], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blur(self.given(x))[:, :3]


def up(y: torch.Tensor) -> torch.Tensor:
    """Bilinear; the last pixels continue beyond the grid."""
    height, width = y.shape[2:]
    y = F.pad(y, (0, 1, 0, 1), mode="replicate")
    size = (FACTOR * height + 1, FACTOR * width + 1)
    return F.interpolate(y, size, mode="bilinear", align_corners=True)[..., :-1, :-1]


def fit(decimate: nn.Module, x: torch.Tensor) -> None:
    """By what the module's docstring says."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(decimate.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.02, total_steps=STEPS)
    for _ in range(STEPS):
        corners = torch.rand(BATCH, 2, generator=generator) * (torch.tensor(x.shape[2:]) - SIZE)
        crops = torch.cat([x[..., top : top + SIZE, left : left + SIZE] for top, left in corners.int().tolist()])
        error = (up(decimate(crops)) - crops)[..., MARGIN:-MARGIN, MARGIN:-MARGIN].square().mean()
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        schedule.step()
    decimate.eval()


class Error(NamedTuple):
    """Mean squares over the picture, its rim left out, of colours in [0, 1]."""

    blur: float  # of the mean over the places of the grid
    aliasing: float  # between these places

    @property
    def decibels(self) -> float:
        return -10 * math.log10(self.blur + self.aliasing)

    def __str__(self) -> str:
        return f"{self.decibels:.2f} dB, aliasing {1e4 * self.aliasing:.1f}e-4"


@torch.no_grad()
def measure(decimate: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Error:
    """Reconstruct from the grid in each of its 16 places."""
    height, width = (FACTOR * (n // FACTOR - 1) for n in x.shape[2:])
    pictures = []
    for top, left in itertools.product(range(FACTOR), repeat=2):
        picture = up(decimate(x[..., top : top + height, left : left + width]))
        pictures.append(picture[..., MARGIN - top : height - MARGIN - top, MARGIN - left : width - MARGIN - left])
    all_places, mean = torch.stack(pictures), torch.stack(pictures).mean(0)
    wanted = x[..., MARGIN : height - MARGIN, MARGIN : width - MARGIN]
    return Error(float((mean - wanted).square().mean()), float((all_places - mean).square().mean()))


def gaussian(sigma: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: aliasfused.blur_pool2d(x, filters.gaussian(sigma, 17), FACTOR)


def best_sigma(x: torch.Tensor) -> float:
    return min(SIGMAS, key=lambda sigma: sum(measure(gaussian(sigma), x)))


def main(path: Annotated[Path, typer.Argument(help="The PNG to write.")] = ROOT / "docs" / "adaptive.png") -> None:
    """Fit a small adaptive blur to a photograph, draw what it makes of it and where it blurs, and print the errors."""
    torch.manual_seed(0)
    china, flower = (
        torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255
        for picture in importlib.import_module("sklearn.datasets").load_sample_images().images
    )
    x, adaptive = photograph(), Decimator()
    fit(adaptive, china)
    sigma = best_sigma(x)
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        f"x[..., ::{FACTOR}, ::{FACTOR}]": lambda x: x[..., ::FACTOR, ::FACTOR],
        f"Gaussian, sigma = {sigma:.2f}": gaussian(sigma),
        f"adaptive, {FILTER} x {FILTER}": adaptive,
    }
    figure, axes = plt.subplots(2, 2, figsize=(8, 9.4), layout="constrained")
    for axis, (name, decimate) in zip(axes.flat, ways.items(), strict=False):
        with torch.no_grad():
            y, error = decimate(x), measure(decimate, x)
        axis.imshow(y[0].clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
        axis.set_title(f"{name}\n{error}", fontsize="medium")
        print(f"{name}: {error}")
    with torch.no_grad():
        variance = metrics.filter_variance(adaptive.blur, adaptive.given(x))[0, 0]
    low, high = variance.quantile(torch.tensor([0.005, 0.995])).tolist()
    row = torch.tensor(filters.gaussian(sigma, FILTER))
    print(f"variance of the taps: median {variance.median():.4f}, largest {variance.max():.4f};", end=" ")
    print(f"the Gaussian's {torch.outer(row, row).var():.4f}, one pixel's {FILTER**-2:.4f}")
    axis = axes.flat[-1]
    image = axis.imshow(variance, norm=LogNorm(low, high), interpolation="nearest")
    axis.set_title(f"variance of the {FILTER} x {FILTER} taps\ndark where it blurs", fontsize="medium")
    figure.colorbar(image, ax=axis, orientation="horizontal", shrink=0.8, aspect=40)
    for axis in axes.flat:
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    sigma = best_sigma(flower)
    print(f"a photograph it was not fitted to: {measure(adaptive, flower)}", end="; ")
    print(f"the best Gaussian, sigma = {sigma:.2f}: {measure(gaussian(sigma), flower)}")


if __name__ == "__main__":
    typer.run(main)
