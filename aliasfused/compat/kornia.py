"""kornia's ``BlurPool2D`` and ``MaxBlurPool2D`` and their functions, by the rules of its release 0.9.0, fused."""

from __future__ import annotations

from typing import Any

import torch

from .. import filters
from ..nn import max_blur_pool as _step
from ..nn._blur import check_int
from ..ops._prologue import prologue
from ..ops._window import Padding, Stride
from ..ops.blur_pool import blur_pool2d as _blur_pool2d
from ..ops.max_blur_pool import max_blur_pool2d as _max_blur_pool2d
from ._kernel import KernelBlur

__all__ = ["BlurPool2D", "MaxBlurPool2D", "blur_pool2d", "max_blur_pool2d"]


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


def max_blur_pool2d(
    input: torch.Tensor,
    kernel_size: int | tuple[int, int],
    stride: Stride = 2,
    max_pool_size: int | tuple[int, int] = 2,
    ceil_mode: bool | None = None,
) -> torch.Tensor:
    """Take the maximum at every position, then :func:`blur_pool2d`, as ``kornia.filters.max_blur_pool2d`` of 0.9.0.

    1. z is the maximum over ``max_pool_size`` pixels, at stride 1 and without padding;
    2. the blur of z with zeros beyond its border, so that H' = ceil((H - max_pool_size + 1) / s).

    Args:
        input: (N, C, H, W), floating.
        kernel_size, stride: of the blur, as for :func:`blur_pool2d`.
        max_pool_size: of the maximum, int >= 1 or (h, w).
        ceil_mode: has no effect, as in kornia: at stride 1 there is nothing to round.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    return _max_blur_pool2d(input, max_pool_size, _sizes(kernel_size), stride, pad_mode="zeros")


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


class MaxBlurPool2D(BlurPool2D):
    """:func:`max_blur_pool2d` as a module, as ``kornia.filters.MaxBlurPool2D`` of 0.9.0.

    The buffer ``kernel``, of shape (k, k), is no part of the state_dict.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: Stride = 2,
        max_pool_size: int | tuple[int, int] = 2,
        ceil_mode: bool | None = None,
    ) -> None:
        prologue("none", max_pool_size, 0)
        super().__init__(kernel_size, stride)
        self.max_pool_size, self.ceil_mode = max_pool_size, bool(ceil_mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            size = self.max_pool_size
            kernel = [size, size] if isinstance(size, int) else [size[0], size[1]]
            return _step.scripted(x, False, "none", (), kernel, (0, 0, 0, 0), *self._window)  # type: ignore[arg-type]
        return _step.step2d(x, prologue("none", self.max_pool_size, 0), self._window, False)
