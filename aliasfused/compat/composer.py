"""composer's ``blur_2d``, ``BlurMaxPool2d`` and ``BlurConv2d``, and ffcv's ``BlurPoolConv2d``, fused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import filters
from ..nn import _blur
from ..nn import max_blur_pool as _step
from ..ops._prologue import prologue
from ..ops._window import Padding, Stride, Window, window2d
from ..ops.blur_pool import blur_pool2d
from ._kernel import KernelBlur, read_rows

__all__ = ["BlurConv2d", "BlurMaxPool2d", "BlurPoolConv2d", "blur_2d"]

_ROW = filters.binomial(3)
Size = int | tuple[int, int]


def _half(kernel: torch.Tensor) -> tuple[int, int]:
    for size in kernel.shape[-2:]:
        if size % 2 == 0:
            raise ValueError(f"the filter must have odd sides, got {tuple(kernel.shape[-2:])}")
    return kernel.shape[-2] // 2, kernel.shape[-1] // 2


def blur_2d(
    input: torch.Tensor, channels: int = -1, stride: Stride = 1, filter: torch.Tensor | None = None
) -> torch.Tensor:
    """Blur and keep every stride-th pixel, zeros beyond the border, as ``composer.algorithms.blurpool.blur_2d``.

    ``y = blur_pool2d(input, rows, stride, padding=(k_h // 2, k_w // 2), pad_mode="zeros")``.

    Args:
        input: (N, C, H, W), floating.
        channels: composer's hint of C; -1 for any.
        stride: int >= 1 or (s_h, s_w).
        filter: (1 or C, 1, k_h, k_w) of odd sides and rank one, the same for all channels; None for [1 2 1] x [1 2 1] / 16.
            Its taps are read to the host in every call.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    if channels > 0 and input.shape[1] != channels:
        raise ValueError(f"input must have {channels} channels, got shape {tuple(input.shape)}")
    if filter is None:
        return blur_pool2d(input, _ROW, stride, padding=1, pad_mode="zeros")
    return blur_pool2d(input, read_rows(filter, "filter"), stride, padding=_half(filter), pad_mode="zeros")


class _ComposerBlur(KernelBlur):
    """A blur of a persistent (C, 1, 3, 3) buffer with k // 2 zeros beyond every border."""

    if TYPE_CHECKING:  # as real annotations TorchScript would refuse them
        blur_stride: Any
        filt2d: torch.Tensor
        conv: nn.Conv2d

    def _geometry(self) -> tuple[Stride, Padding, Any]:
        return self.blur_stride, _half(getattr(self, self._kernel)), "zeros"

    def _begin(self, channels: int) -> None:
        kernel = torch.tensor(_ROW)[:, None] * torch.tensor(_ROW)
        self.register_buffer(self._kernel, kernel.repeat(channels, 1, 1, 1))
        self._window = window2d((_ROW, _ROW), *self._geometry())


class BlurMaxPool2d(_ComposerBlur):
    """Dense maximum, then :func:`blur_2d` at the stride, as ``composer.algorithms.blurpool.BlurMaxPool2d``.

    1. ``z = max_pool2d(x, kernel_size, stride=1, padding=padding, dilation=dilation)``; ``ceil_mode`` has nothing to round;
    2. ``blur_2d(z, stride=stride, filter=filt2d)``.

    Both in one pass, but that a maximum with gaps (``dilation`` other than 1) is torch's own.

    Args:
        kernel_size: of the maximum, int >= 1 or (h, w).
        stride: of the blur; None for ``kernel_size``.
        padding: of the maximum, at most half of the window.
        dilation, ceil_mode: as for ``MaxPool2d``.

    The buffer ``filt2d``, (1, 1, 3, 3), is in the state_dict, as there.
    """

    _kernel = "filt2d"

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        prologue("none", kernel_size, padding)
        self.kernel_size, self.stride = kernel_size, kernel_size if stride is None else stride
        self.padding, self.dilation, self.ceil_mode = padding, dilation, ceil_mode
        self._begin(1)

    def _geometry(self) -> tuple[Stride, Padding, Any]:
        return self.stride, _half(self.filt2d), "zeros"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            z = F.max_pool2d(x, self.kernel_size, 1, self.padding, self.dilation)
            return _blur.scripted(None, None, False, z, *self._window)  # type: ignore[arg-type]
        if self.dilation not in (1, (1, 1)):
            z = F.max_pool2d(x, self.kernel_size, 1, self.padding, self.dilation)
            return _blur.blur2d(z, self._window, None)
        return _step.step2d(x, prologue("none", self.kernel_size, self.padding), self._window, False)


class _BlurThenConv(_ComposerBlur):
    """A blur before a strided convolution, its child ``conv``."""

    _kernel = "blur_filter"
    blur_stride = 1  # type: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self.conv(_blur.scripted(None, None, False, x, *self._window))  # type: ignore[arg-type]
        return self._blur_first(x)

    def _blur_first(self, x: torch.Tensor) -> torch.Tensor:
        conv = self.conv
        pointwise = conv.kernel_size == (1, 1) and conv.padding == (0, 0) and type(conv) is nn.Conv2d
        listened = "forward" in vars(conv) or any(getattr(conv, hooks) for hooks in _HOOKS)
        if not pointwise or conv.stride == (1, 1) or listened:
            return conv(self._blurred(x, self._window))
        # A convolution of one pixel sees each stride-th alone: no other need be blurred.
        blurred = self._blurred(x, self._window._replace(stride=conv.stride))  # type: ignore[arg-type]
        return F.conv2d(blurred, conv.weight, conv.bias, groups=conv.groups)

    def _blurred(self, x: torch.Tensor, window: Window) -> torch.Tensor:
        return _blur.blur2d(x, window, None)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class BlurConv2d(_BlurThenConv):
    """A strided convolution with a blur before or after it, as ``composer.algorithms.blurpool.BlurConv2d``.

    ``blur_first``: ``conv(blur_2d(x))``, the convolution at the stride; a convolution of one pixel is blurred at the stride,
    which is equal and a quarter of the work. Else ``blur_2d(conv(x), stride=stride)``, the convolution at stride 1.

    Args:
        in_channels, out_channels, kernel_size, padding, dilation, groups, bias: of the convolution, the child ``conv``.
        stride: int or (h, w); None, allowed where the blur comes last, for ``kernel_size``.
        blur_first: which comes first.

    The buffer ``blur_filter``, (C, 1, 3, 3), is in the state_dict, as there.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        blur_first: bool = True,
    ) -> None:
        super().__init__()
        if blur_first and stride is None:
            raise ValueError("stride must be given where the blur comes first, got None")
        last = kernel_size if stride is None else stride
        self.blur_first = blur_first
        conv_stride = last if blur_first else 1
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, conv_stride, padding, dilation, groups, bias)
        self.blur_stride = 1 if blur_first else last
        self._begin(in_channels if blur_first else out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            if self.blur_first:
                return self.conv(_blur.scripted(None, None, False, x, *self._window))  # type: ignore[arg-type]
            return _blur.scripted(None, None, False, self.conv(x), *self._window)  # type: ignore[arg-type]
        return self._blur_first(x) if self.blur_first else _blur.blur2d(self.conv(x), self._window, None)


class BlurPoolConv2d(_BlurThenConv):
    """A blur before a convolution that is there already, as in ffcv-imagenet: ``conv(blur(x))``.

    Args:
        conv: the convolution; it becomes the child ``conv``, itself and not a copy.

    The buffer ``blur_filter``, (C, 1, 3, 3), is in the state_dict, as there. A convolution of one pixel is blurred at its
    stride, which is equal and a quarter of the work.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be a torch.nn.Conv2d, got {type(conv).__name__}")
        self.conv = conv
        self._begin(conv.in_channels)
