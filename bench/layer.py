"""Blurs by predicted filters beside the released formulation: the last step alone, and the whole layer, predictor included.

All layers of a case have the same weights, filters of a position that sum to one together as released, and are evaluated and
trained at the places of a ResNet-50's seven.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import nn

from aliasfused.compat.adaptive import Downsample_PASA_group_softmax
from aliasfused.nn import AdaptiveBlurPool2d

from .cases import DTYPES, FORMATS, GROUPS, OP_SITES, Case, Layout
from .models import Released
from .peers import FusedAdaptive, ReleasedAdaptive
from .rows import Machine
from .timing import Call, GraphClock, Turn, WallClock, interleave, kept_bytes, peak_bytes, training

BATCH = {"cpu": 8, "cuda": 64}
# At which the bars are judged.
CHANNELS = 256
QUICK_SITE = f"{CHANNELS}@28"
# Of both parts the first is the released one, which the others are compared with.
VARIANTS = {
    "apply": ("released", "logits everywhere", "logits kept"),
    "layer": ("released", "compat", "dense", "strided"),
}


@dataclass(frozen=True)
class LayerRow:
    """One layer at one site: evaluated (direction forward), or trained (forward and backward, of x and parameters)."""

    case: Case
    part: str  # apply: logits are given; layer: they are predicted
    variant: str
    min_us: float
    peak_bytes: int  # allocated during one such call, above what was held before
    kept_bytes: int | None  # in training, for backward: x and logits included, without parameters
    difference: float  # largest, of evaluated outputs from those released, relative to the largest
    machine: Machine


def grid(device: str, bars: bool) -> list[Case]:
    """Sites, groups, layouts and dtypes; a first look is at one site."""
    return [
        Case(op, site.network, site.channels, site.size, BATCH[device], layout, dtype, 3, "forward")
        for op in (GROUPS if bars else ("adaptive_g8",))
        for site in OP_SITES[op]
        for layout in get_args(Layout)
        for dtype in (("fp32", "bf16") if bars else ("fp32",))
        if bars or f"{site.channels}@{site.size}" == QUICK_SITE
    ]


def build(case: Case, device: str, part: str, variant: str) -> nn.Module:
    """A layer, with the weights that all of a case have."""
    if part == "apply":
        if variant == "released":
            return ReleasedAdaptive(case, device)
        return FusedAdaptive(case, device, variant.removeprefix("logits "), "joint")
    groups = GROUPS[case.op]
    torch.manual_seed(0)
    weights = Released(case.channels, case.k, case.stride, groups).state_dict()
    if variant == "released":
        layer: nn.Module = Released(case.channels, case.k, case.stride, groups)
    elif variant == "compat":
        layer = Downsample_PASA_group_softmax(case.channels, case.k, case.stride, group=groups)
    else:
        layer = AdaptiveBlurPool2d(
            case.channels,
            case.k,
            case.stride,
            groups,
            "joint",
            predict="strided" if variant == "strided" else "dense",
        )
    layer.load_state_dict(dict(zip(layer.state_dict(), weights.values(), strict=True)))
    return layer.to(device, DTYPES[case.dtype], memory_format=FORMATS[case.layout])  # type: ignore[call-overload]


def evaluated(layer: nn.Module, x: torch.Tensor) -> Call:
    layer.eval()

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return layer(x)

    return call


def trained(layer: nn.Module, x: torch.Tensor) -> Call:
    return training(layer.train(), x)


def measure(
    cases: Iterable[Case], device: str, machine: Machine, seconds: float, step: Callable[[str], None]
) -> list[LayerRow]:
    """Time the layers of each case in turns; ``step`` is told what begins."""
    rows = []
    for case in cases:
        step(str(case))
        x = case.input(device)
        for part, variants in VARIANTS.items():
            rows += _measure(case, part, variants, x, device, machine, seconds)
    return rows


def _measure(
    case: Case, part: str, variants: tuple[str, ...], x: torch.Tensor, device: str, machine: Machine, seconds: float
) -> list[LayerRow]:
    clock = WallClock() if device == "cpu" else GraphClock()
    layers = {variant: build(case, device, part, variant) for variant in variants}
    differences = {variant: difference(case, part, variant, layer, x, device) for variant, layer in layers.items()}
    rows = []
    for direction, work in (("forward", evaluated), ("forward+backward", trained)):
        turns = [Turn(clock.prepare(functools.partial(work, layer, x))) for layer in layers.values()]
        for (variant, layer), sample in zip(layers.items(), interleave(turns, seconds), strict=True):
            row = LayerRow(
                replace(case, direction=direction),  # type: ignore[arg-type]
                part,
                variant,
                sample.min_us,
                peak_bytes=peak_bytes(work(layer, x), device),
                kept_bytes=kept(layer, x, part) if work is trained else None,
                difference=differences[variant],
                machine=machine,
            )
            rows.append(row)
    return rows


def kept(layer: nn.Module, x: torch.Tensor, part: str) -> int:
    """What training keeps. The logits of an apply step are an input of it, and count."""
    held = () if part == "apply" else (*layer.parameters(), *layer.buffers())
    x = x.detach().requires_grad_()
    return kept_bytes(lambda: layer.train()(x), held)


def difference(case: Case, part: str, variant: str, layer: nn.Module, x: torch.Tensor, device: str) -> float:
    """Of what a layer gives from what the released one gives."""
    released = build(case, device, part, "released")
    expected, found = (evaluated(module, x)().float() for module in (released, layer))  # type: ignore[attr-defined]
    return float((found - expected).abs().max() / expected.abs().max())
