"""The price of anti-aliasing: what a ResNet-50's training step pays for its blurs, all but the convolutions.

A strided network activates the small map that its strided convolution has made. An anti-aliased one activates the large
map and blurs it. At every site, forward and backward at its real shape,

    price = time of (batch norm, ReLU, blur at C x H x H) - time of (batch norm, ReLU at C x H/2 x H/2)

and the same of the stem, whose maximum strides in one and is dense in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

import aliasfused

from .cases import DTYPES, FORMATS, Layout
from .models import BlurPool
from .rows import Machine
from .timing import GraphClock, Turn, WallClock, interleave, training

Variant = Literal["plain", "unfused", "fused"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
STEM = (64, 112)
STAGES = ((128, 56), (256, 28), (512, 14))
BATCH = {"cpu": 8, "cuda": 64}


@dataclass(frozen=True)
class PriceRow:
    """One site, as it is in one of the three networks: forward and backward, in microseconds."""

    site: str
    stem: bool
    layout: str
    dtype: str
    batch: int
    variant: str
    min_us: float
    machine: Machine


def chain(variant: Variant, channels: int, stem: bool, device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """What stands between two convolutions, in training; batch norms are in float32, as under autocast."""
    if variant == "fused":
        maximum = dict(max_kernel_size=3, max_padding=1) if stem else {}
        return aliasfused.nn.BNActBlurPool2d(channels, "relu", 3, device=device, **maximum)  # type: ignore[arg-type]
    steps: list[nn.Module] = [nn.BatchNorm2d(channels, device=device), nn.ReLU(inplace=True)]
    if stem:
        steps.append(nn.MaxPool2d(3, 2 if variant == "plain" else 1, 1))
    if variant == "unfused":
        steps.append(BlurPool(channels, 3).to(device, dtype))
    return nn.Sequential(*steps)


def measure(device: str, machine: Machine, seconds: float, step: Callable[[str], None]) -> list[PriceRow]:
    """All sites and variants, in both layouts and dtypes."""
    clock, rows = WallClock() if device == "cpu" else GraphClock(), []
    for dtype in ("fp32", "bf16"):
        for layout in get_args(Layout):
            step(f"{layout} {dtype}")
            for channels, size in (STEM, *STAGES):
                stem = (channels, size) == STEM
                turns = []
                for variant in VARIANTS:
                    small = size // 2 if variant == "plain" and not stem else size
                    x = torch.randn(BATCH[device], channels, small, small, device=device).to(DTYPES[dtype])
                    x = x.contiguous(memory_format=FORMATS[layout])
                    module = chain(variant, channels, stem, device, DTYPES[dtype])
                    turns.append(Turn(clock.prepare(lambda module=module, x=x: training(module, x))))  # type: ignore[misc]
                for variant, sample in zip(VARIANTS, interleave(turns, seconds), strict=True):
                    site = f"{channels}@{size}"
                    rows.append(PriceRow(site, stem, layout, dtype, BATCH[device], variant, sample.min_us, machine))
    return rows


def price(rows: list[PriceRow], variant: Variant, stem: bool) -> float:
    """Microseconds more than the plain network's."""
    time = {v: sum(row.min_us for row in rows if row.variant == v and row.stem == stem) for v in VARIANTS}
    return time[variant] - time["plain"]


def prices(rows: Sequence[PriceRow]) -> Iterator[tuple[tuple[bool, str, str], list[PriceRow]]]:
    """What makes one price: the stem, or the three stages, in a layout and dtype."""
    for kind in dict.fromkeys((row.stem, row.layout, row.dtype) for row in rows):
        yield kind, [row for row in rows if (row.stem, row.layout, row.dtype) == kind]
