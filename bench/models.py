"""Layers and networks as other libraries have them, of PyTorch's own operations: what aliasfused takes the place of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from aliasfused import filters

Blur = Callable[[int], nn.Module]  # called with the number of channels; keeps every other pixel

# What ``accelerate(also=...)`` is told of the classes here.
ALSO = {f"{__name__}.BlurPool": "antialiased_cnns", f"{__name__}.Released": "adaptive"}


class BlurPool(nn.Module):
    """Padding and a depthwise convolution, the filter in a buffer: attributes and key as in antialiased-cnns."""

    filt: torch.Tensor

    def __init__(self, channels: int, filt_size: int = 4, stride: int = 2) -> None:
        super().__init__()
        self.channels, self.filt_size, self.stride = channels, filt_size, stride
        self.pad = nn.ReflectionPad2d(((filt_size - 1) // 2, filt_size // 2) * 2)
        row = torch.tensor(filters.binomial(filt_size), dtype=torch.float64)
        self.register_buffer("filt", torch.outer(row, row).to(torch.get_default_dtype()).repeat(channels, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(self.pad(x), self.filt, stride=self.stride, groups=x.shape[1])


def weigh_windows(padded: torch.Tensor, logits: torch.Tensor, k: int, stride: int, groups: int) -> torch.Tensor:
    """A blur by predicted filters as it is released with the paper: everything at every position, of which a few are kept.

    The softmax is over all filters of a position together.
    """
    n, _, h, w = logits.shape
    weights = logits.softmax(1).view(n, groups, 1, k * k, h, w)
    windows = F.unfold(padded, k).view(n, groups, -1, k * k, h, w)
    return (windows * weights).sum(3).flatten(1, 2)[:, :, ::stride, ::stride]


class Released(nn.Module):
    """A blur by predicted filters with its predictor: children, attributes and keys as in Adaptive-anti-Aliasing."""

    def __init__(self, channels: int, kernel_size: int = 3, stride: int = 2, group: int = 8) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.group = kernel_size, stride, group
        self.pad: nn.Module = nn.ReflectionPad2d(kernel_size // 2)
        self.conv = nn.Conv2d(channels, group * kernel_size**2, kernel_size, bias=False)
        self.bn = nn.BatchNorm2d(group * kernel_size**2)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = self.pad(x)
        return weigh_windows(padded, self.bn(self.conv(padded)), self.kernel_size, self.stride, self.group)


def antialiased_resnet(model: Any, blur: Blur = BlurPool, pool_only: bool = True) -> nn.Module:
    """Zhang's topology of one of torchvision's ResNets, of its own parts: strides become blurs."""
    model.maxpool = nn.Sequential(nn.MaxPool2d(2, 1), blur(64))
    if not pool_only:
        model.conv1.stride, model.maxpool = (1, 1), nn.Sequential(blur(64), nn.MaxPool2d(2, 1), blur(64))
    for layer in (model.layer2, model.layer3, model.layer4):
        first, conv = layer[0], "conv3" if hasattr(layer[0], "conv3") else "conv2"
        (first.conv2 if conv == "conv3" else first.conv1).stride = (1, 1)
        last = getattr(first, conv)
        setattr(first, conv, nn.Sequential(blur(last.in_channels), last))
        shortcut, norm = first.downsample
        shortcut.stride = (1, 1)
        first.downsample = nn.Sequential(blur(shortcut.in_channels), shortcut, norm)
    return model


def pools_blurred(layers: Iterable[nn.Module], size: int = 2, blur: Blur = BlurPool) -> nn.Sequential:
    """Every maximum taken densely, and a blur of the channels before it."""
    made: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.MaxPool2d):
            channels = next(conv.out_channels for conv in reversed(made) if isinstance(conv, nn.Conv2d))
            made += [nn.MaxPool2d(size, 1), blur(channels)]
        else:
            made.append(layer)
    return nn.Sequential(*made)


def antialiased_vgg(model: Any, blur: Blur = BlurPool) -> nn.Module:
    """Zhang's topology of one of torchvision's VGGs, of its own parts."""
    model.features = pools_blurred(model.features, blur=blur)
    return model
