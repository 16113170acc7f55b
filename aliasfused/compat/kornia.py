"""kornia's ``BlurPool2D`` and ``blur_pool2d``, by the rule of its release 0.9.0, fused."""

from __future__ import annotations

from typing import Any

import torch

from .. import filters
from ..nn._blur import check_int
from ..ops._window import Padding, Stride
from ..ops.blur_pool import blur_pool2d as _blur_pool2d
from ._kernel import KernelBlur

__all__ = ["BlurPool2D", "blur_pool2d"]


def _sizes(kernel_size: int | tuple[int, int]) -> tuple[int, int]:
    sizes = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size, kernel_size)
    if len(sizes) != 2:
        raise ValueError(f"kernel_size must be an int or a pair of them (h, w), got {kernel_size!r}")
    for size in sizes:
        check_int("kernel_size", size)
    return sizes[0], sizes[1]


def blur_pool2d(input: torch.Tensor, kernel_size: int | tuple[int, int], stride: Stride = 2) -> torch.Tensor:
    """Blur with a binomial and keep every stride-th pixel, as ``kornia.filters.blur_pool2d`` of 0.9.0.

    1. pad zeros, floor((k-1)/2) before and ceil((k-1)/2) after on each axis, so that H' = ceil(H / s);
    2. correlate every channel with the binomial at ``stride``.

    Args:
        input: (N, C, H, W), floating.
        kernel_size: k >= 1, or (k_h, k_w), which kornia refuses unless they are equal.
        stride: int >= 1 or (s_h, s_w).

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    return _blur_pool2d(input, _sizes(kernel_size), stride, pad_mode="zeros")


class BlurPool2D(KernelBlur):
    """:func:`blur_pool2d` as a module, as ``kornia.filters.BlurPool2D`` of 0.9.0.

    The buffer ``kernel``, of shape (k, k), is no part of the state_dict.
    """

    _kernel = "kernel"

    def __init__(self, kernel_size: int | tuple[int, int], stride: Stride = 2) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride
        rows = filters.binomial(_sizes(kernel_size)[0]), filters.binomial(_sizes(kernel_size)[1])
        self._start(rows, (), persistent=False)

    def _geometry(self) -> tuple[Stride, Padding, Any]:
        return self.stride, None, "zeros"
