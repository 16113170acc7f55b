"""The downsampling step as modules: maximum or activation, then blur."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, List  # noqa: UP035  (TorchScript reads these annotations)

import torch
from torch import nn

from ..kernels import reference
from ..ops import max_blur_pool
from ..ops._prologue import Act, Prologue, prologue
from ..ops._window import Padding, PadMode, Row, Stride, Window, window2d
from . import _blur

Taps = int | Row | tuple[int | Row, int | Row]


@torch.fx.wrap
def step2d(x: torch.Tensor, before: Prologue, window: Window, ceil_mode: bool) -> torch.Tensor:
    """One node of a torch.fx trace: the checks and the op."""
    if ceil_mode and isinstance(x, torch.Tensor) and x.dim() in (3, 4):
        before = rounded_up(before, window.stride, x.shape[-2], x.shape[-1])
    return max_blur_pool.apply(x, before, window)


def rounded_up(before: Prologue, stride: tuple[int, int], height: int, width: int) -> Prologue:
    """The prologue with padding enough behind the map for as many outputs as ``max_pool2d(ceil_mode=True)`` has."""
    left, right, top, bottom = before.max_padding
    more = [
        _more(size, k, s, pad)
        for size, k, s, pad in zip((width, height), before.kernel[::-1], stride[::-1], (left, top), strict=True)
    ]
    return before._replace(max_padding=(left, right + more[0], top, bottom + more[1]))


def scripted(
    x: torch.Tensor,
    ceil_mode: bool,
    act: str,
    act_args: List[float],  # noqa: UP006
    kernel: List[int],  # noqa: UP006
    max_padding: List[int],  # noqa: UP006
    taps_h: List[float],  # noqa: UP006
    taps_w: List[float],  # noqa: UP006
    stride: List[int],  # noqa: UP006
    padding: List[int],  # noqa: UP006
    pad_mode: str,
) -> torch.Tensor:
    """The step in TorchScript, one operation after the other; for inference."""
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    left, right, top, bottom = max_padding
    if ceil_mode:
        right += _more(x.shape[-1], kernel[1], stride[1], left)
        bottom += _more(x.shape[-2], kernel[0], stride[0], top)
    z = reference.prepared(batch, None, act, act_args, kernel, [left, right, top, bottom])
    y = _blur.scripted(None, None, False, z, taps_h, taps_w, stride, padding, pad_mode)
    return y if x.dim() == 4 else y.squeeze(0)


def _more(size: int, k: int, stride: int, pad: int) -> int:
    rounded, beginning = -(-(size + 2 * pad - k) // stride) + 1, -(-(size + pad) // stride)
    # As torch: no window begins beyond the map. The built-in min would fix a symbolic size, and TorchScript has no other.
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        return max((min(rounded, beginning) - 1) * stride + 1 - (size + 2 * pad - k + 1), 0)
    outputs = torch.sym_min(rounded, beginning)
    return torch.sym_max((outputs - 1) * stride + 1 - (size + 2 * pad - k + 1), 0)


class _Step2d(nn.Module):
    """A prologue and a blur, both values of the module."""

    if TYPE_CHECKING:  # as real annotations TorchScript would refuse them
        _before: Prologue
        _window: Window

    def _set_up(self, before: Prologue, ceil_mode: bool, filt_size: int, taps: Taps | None, *geometry: Any) -> None:
        _blur.check_int("filt_size", filt_size)
        self.ceil_mode, self._before = ceil_mode, before
        self._window = window2d(filt_size if taps is None else taps, *geometry)
        if self._window.learned:
            raise TypeError("taps of a fused module must be numbers; learned ones have nn.BlurPool2d(learnable=True)")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return scripted(x, self.ceil_mode, *self._before, *self._window)  # type: ignore[arg-type]
        return step2d(x, self._before, self._window, self.ceil_mode)

    def extra_repr(self) -> str:
        (act, act_args, kernel, max_padding), (h, w, stride, padding, pad_mode) = self._before, self._window
        text = f"taps={len(h)}x{len(w)}, {stride=}, {padding=}, {pad_mode=}"
        if kernel != (1, 1):
            text = f"kernel_size={kernel}, max_padding={max_padding[2], max_padding[0]}, ceil_mode={self.ceil_mode}, {text}"
        return text if act == "none" else f"act={(act, *act_args) if act_args else act!r}, {text}"


class MaxBlurPool2d(_Step2d):
    """An anti-aliased ``MaxPool2d``: dense maximum, blur and subsample in one pass, :func:`aliasfused.max_blur_pool2d`.

    1. z is the maximum over a window at every position, -inf beyond the border;
    2. with ``ceil_mode``, z has windows partly outside, to the right and below, until it has ``(outputs - 1) stride + 1``
       positions, for as many outputs as ``MaxPool2d(ceil_mode=True)`` has;
    3. ``y = blur_pool2d(z, taps, stride, padding=padding, pad_mode=pad_mode)``.

    Args:
        kernel_size: of the maximum, int >= 1 or (h, w).
        stride: int >= 1 or (s_h, s_w), in input pixels.
        filt_size: taps of the normalised binomial filter; 1 makes it ``MaxPool2d`` exactly.
        max_padding: of the maximum, int or (h, w), at most half of the window.
        pad_mode, padding: of the blur, as for :class:`aliasfused.nn.BlurPool2d`.
        ceil_mode: round the number of outputs up, as ``MaxPool2d`` does.
        act: what x passes through before the maximum, as for :func:`aliasfused.max_blur_pool2d`.
        taps: instead of ``filt_size``: a row of floats or a pair (h, w) of ints and rows.

    Shape:
        (N, C, H, W) or (C, H, W) to the same with, for the usual padding, ``MaxPool2d``'s height and width.

    Source: Zhang, Making Convolutional Networks Shift-Invariant Again, 2019.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int] = 2,
        stride: Stride = 2,
        filt_size: int = 4,
        max_padding: int | tuple[int, int] = 0,
        pad_mode: PadMode = "reflect",
        ceil_mode: bool = False,
        *,
        act: Act = "none",
        taps: Taps | None = None,
        padding: Padding = None,
    ) -> None:
        super().__init__()
        if not isinstance(ceil_mode, bool):
            raise ValueError(f"ceil_mode must be a bool, got {ceil_mode!r}")
        self._set_up(prologue(act, kernel_size, max_padding), ceil_mode, filt_size, taps, stride, padding, pad_mode)

    @classmethod
    def from_maxpool2d(cls, pool: nn.MaxPool2d, filt_size: int = 4, **options: Any) -> MaxBlurPool2d:
        """The anti-aliased form of a ``MaxPool2d``: its window, stride, padding and rounding, and a filter.

        Args:
            pool: without dilation and without indices, which have no anti-aliased form.
            filt_size: taps of the filter.
            options: ``pad_mode``, ``act``, ``taps``, ``padding``.
        """
        if not isinstance(pool, nn.MaxPool2d):
            raise TypeError(f"pool must be a torch.nn.MaxPool2d, got {type(pool).__name__}")
        if pool.return_indices or pool.dilation not in (1, (1, 1)):
            raise ValueError(f"pool must have neither dilation nor return_indices, got {pool!r}")
        stride = pool.kernel_size if pool.stride is None else pool.stride
        return cls(pool.kernel_size, stride, filt_size, pool.padding, ceil_mode=pool.ceil_mode, **options)


class ActBlurPool2d(_Step2d):
    """Activate, blur and subsample in one pass: :func:`aliasfused.act_blur_pool2d`.

    ``y = blur_pool2d(act(x), taps, stride, padding=padding, pad_mode=pad_mode)``.

    Args:
        act: "none", "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish", ("leaky_relu", slope) or
            ("softplus", beta, threshold).
        filt_size, stride, pad_mode, taps, padding: as for :class:`aliasfused.nn.BlurPool2d`.

    Shape:
        (N, C, H, W) or (C, H, W) to the same with ``H' = floor((H + top + bottom - k_h) / s_h) + 1``.
    """

    def __init__(
        self,
        act: Act = "relu",
        filt_size: int = 4,
        stride: Stride = 2,
        pad_mode: PadMode = "reflect",
        *,
        taps: Taps | None = None,
        padding: Padding = None,
    ) -> None:
        super().__init__()
        self._set_up(prologue(act, 1, 0), False, filt_size, taps, stride, padding, pad_mode)
