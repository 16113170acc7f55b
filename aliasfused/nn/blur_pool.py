"""Blurring as a module, its taps fixed or learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ..ops._window import Padding, PadMode, Row, Stride, Taps, Window, is_int, window1d, window2d
from . import _blur

Learnable = bool | Literal["normalised"]


def _numbers(name: str, taps: tuple[float, ...] | torch.Tensor) -> tuple[float, ...]:
    if not isinstance(taps, torch.Tensor):
        return taps
    if taps.dim() != 1:
        raise ValueError(
            f"{name} of a module must be one row, of shape (k,), got {tuple(taps.shape)}; taps per channel are "
            "parameters: give learnable=True and channels, and copy them into taps_h and taps_w"
        )
    return tuple(taps.tolist())


class _Learnable(_blur.Blur2d):
    """A blur that may hold its rows as parameters."""

    if TYPE_CHECKING:  # as real annotations TorchScript would refuse them
        learnable: Learnable
        normalised: bool
        taps_h: nn.Parameter | None
        taps_w: nn.Parameter | None

    def _set_up(self, window: Window, channels: int | None, learnable: Learnable, axes: str, **factory: Any) -> None:
        if channels is not None and not (is_int(channels) and channels >= 1):
            raise ValueError(f"channels must be None or an int >= 1, got {channels!r}")
        if learnable not in (False, True, "normalised"):
            raise ValueError(f"learnable must be False, True or 'normalised', got {learnable!r}")
        rows = _numbers("taps_h", window.taps_h), _numbers("taps_w", window.taps_w)
        if learnable == "normalised" and min(map(min, rows)) <= 0:
            raise ValueError(f"taps must be positive to be learnt as a softmax of their logarithms, got {rows}")
        self.channels, self.learnable, self.normalised = channels, learnable, learnable == "normalised"
        self._window = window._replace(taps_h=rows[0], taps_w=rows[1])
        for axis, taps in zip("hw", rows, strict=True):
            shape = (len(taps),) if channels is None else (channels, len(taps))
            learned = bool(learnable) and axis in axes
            self.register_parameter(f"taps_{axis}", nn.Parameter(torch.empty(shape, **factory)) if learned else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Put learned taps back to the ones the module was made with."""
        with torch.no_grad():
            for taps, row in zip((self.taps_h, self.taps_w), self._window[:2], strict=True):
                if taps is not None:
                    values = torch.tensor(row, dtype=torch.float64, device="cpu")
                    taps.copy_(values.log() if self.normalised else values)

    def window(self) -> Window:
        if not self.learnable:
            return self._window
        h, w, stride, padding, pad_mode = self._window
        if self.taps_h is not None:
            h = _blur.normalise(self.taps_h) if self.normalised else self.taps_h
        if self.taps_w is not None:
            w = _blur.normalise(self.taps_w) if self.normalised else self.taps_w
        return Window(h, w, stride, padding, pad_mode)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, {super().extra_repr()}, learnable={self.learnable!r}"


class BlurPool2d(_Learnable):
    """Blur an image with a separable low-pass filter and keep every stride-th pixel: :func:`aliasfused.blur_pool2d`.

    ``y[n,c,i,j] = sum_p sum_q a_p b_q x~[n,c, s_h i + p - top, s_w j + q - left]``.

    Args:
        channels: None, or the number of channels, which inputs are then checked against.
        filt_size: taps of the normalised binomial filter, at least 1.
        stride: int >= 1 or (s_h, s_w), in input pixels.
        pad_mode: "reflect", "replicate", "zeros" or "circular".
        taps: instead of ``filt_size``: a row of floats, a (k,) tensor, or a pair (h, w) of ints and rows.
        padding: None puts floor((k-1)/2) pixels before and ceil((k-1)/2) after, for ceil(H/s) outputs; an int,
            (p_h, p_w) or (left, right, top, bottom) is used as given.
        learnable: False keeps the taps as numbers: no parameter, no buffer, nothing in the state_dict. True makes them
            the parameters ``taps_h`` and ``taps_w``, of shape (C, k) if ``channels`` is given, else (k,), starting from
            the filter above. "normalised" makes the parameters logarithms whose softmax is the row of taps, so that
            these stay positive and sum to one.
        device, dtype: of the parameters.

    Shape:
        (N, C, H, W) or (C, H, W) to the same with ``H' = floor((H + top + bottom - k_h) / s_h) + 1``.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Zhang, Making Convolutional Networks Shift-Invariant Again, 2019.
    """

    def __init__(
        self,
        channels: int | None = None,
        filt_size: int = 4,
        stride: Stride = 2,
        pad_mode: PadMode = "reflect",
        *,
        taps: Taps | None = None,
        padding: Padding = None,
        learnable: Learnable = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _blur.check_int("filt_size", filt_size)
        window = window2d(filt_size if taps is None else taps, stride, padding, pad_mode)
        self._set_up(window, channels, learnable, "hw", device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return _blur.scripted(self.taps_h, self.taps_w, self.normalised, x, *self._window)  # type: ignore[arg-type]
        return _blur.blur2d(x, self.window(), self.channels)


class BlurPool1d(_Learnable):
    """Blur a signal and keep every stride-th sample: :class:`BlurPool2d` along one axis.

    ``y[n,c,j] = sum_q b_q x~[n,c, s j + q - left]``; learned taps are the parameter ``taps_w``.

    Args:
        filt_size: taps of the normalised binomial filter, at least 1.
        stride: int >= 1.
        taps: instead of ``filt_size``: a row of floats or a (k,) tensor.
        padding: None, an int, or (left, right).
        channels, pad_mode, learnable, device, dtype: as for :class:`BlurPool2d`.

    Shape:
        (N, C, L) or (C, L) to the same with ``L' = floor((L + left + right - k) / s) + 1``.
    """

    def __init__(
        self,
        channels: int | None = None,
        filt_size: int = 3,
        stride: int = 2,
        pad_mode: PadMode = "reflect",
        *,
        taps: int | Row | torch.Tensor | None = None,
        padding: int | tuple[int, int] | None = None,
        learnable: Learnable = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _blur.check_int("filt_size", filt_size)
        window = window1d(filt_size if taps is None else taps, stride, padding, pad_mode)
        self._set_up(window, channels, learnable, "w", device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return _blur.scripted(None, self.taps_w, self.normalised, x.unsqueeze(-2), *self._window).squeeze(-2)  # type: ignore[arg-type]
        return _blur.blur1d(x, self.window(), self.channels)
