"""What module tests compare against: numpy's borders and torch's convolution, and how far rounding may part the two."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

NUMPY_MODES = {"reflect": "reflect", "replicate": "edge", "zeros": "constant", "circular": "wrap"}


def pascal(k: int) -> list[float]:
    return [math.comb(k - 1, p) / 2 ** (k - 1) for p in range(k)]


def extended(x: torch.Tensor, sides: tuple[int, int, int, int], pad_mode: str) -> torch.Tensor:
    """x with its border as numpy.pad defines it, differentiable: numpy pads the indices, torch looks them up."""
    left, right, top, bottom = sides
    for dim, before, after in ((-2, top, bottom), (-1, left, right)):
        index = np.arange(1, x.shape[dim] + 1)  # from one: zero is what numpy writes beyond a constant border
        index = torch.from_numpy(np.pad(index, (before, after), mode=NUMPY_MODES[pad_mode]))
        blank = torch.zeros_like(x.narrow(dim, 0, 1))
        x = torch.cat([blank, x], dim).index_select(dim, index)
    return x


def convolved(x: torch.Tensor, h, w, stride, sides, pad_mode: str) -> torch.Tensor:
    """The blur as everybody writes it, from rows (k,) or (C, k); channels of x (N, C, H, W) each on their own."""
    channels = x.shape[-3]
    h, w = (torch.as_tensor(row, dtype=x.dtype).expand(channels, -1) for row in (h, w))
    kernel = h[:, None, :, None] * w[:, None, None, :]
    return F.conv2d(extended(x, sides, pad_mode), kernel, stride=stride, groups=channels)


def same(kh: int, kw: int) -> tuple[int, int, int, int]:
    """The padding of antialiased-cnns: (left, right, top, bottom)."""
    return (kw - 1) // 2, kw // 2, (kh - 1) // 2, kh // 2


def bound(x: torch.Tensor, terms: int, gain: float = 1.0) -> float:
    """How far two sums of ``terms`` products may lie apart, accumulated in at least float32 and rounded to x's dtype.

    ``2 (terms + 2) u gain max|x|`` with u half the accumulator's eps (the two: rounding of taps and of their product),
    and one eps of x's dtype where that is a shorter one.
    """
    eps = torch.finfo(x.dtype).eps
    accumulator = min(eps, torch.finfo(torch.float32).eps)
    scale = gain * float(x.detach().abs().max()) if x.numel() else 0.0
    return ((terms + 2) * accumulator + (eps if eps > accumulator else 0.0)) * scale


def assert_agree(y: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    difference = float((y - expected).detach().abs().max()) if y.numel() else 0.0
    assert difference <= limit, f"differs by {difference:.3g}, rounding allows {limit:.3g}"
