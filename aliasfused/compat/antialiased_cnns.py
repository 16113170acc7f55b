"""antialiased-cnns' ``BlurPool`` and ``BlurPool1D``, fused: change the import, keep the checkpoint."""

from __future__ import annotations

from typing import Any, List  # noqa: UP035  (TorchScript reads these annotations)

import torch
from torch import nn

from .. import filters
from ..kernels import reference
from ..nn import _blur
from ..ops._window import Padding, Stride, same_padding
from ._kernel import KernelBlur

__all__ = ["BlurPool", "BlurPool1D"]

_PAD_TYPES = {
    "refl": "Reflection",
    "reflect": "Reflection",
    "repl": "Replication",
    "replicate": "Replication",
    "zero": "Zero",
}
_PAD_MODES = {"ReflectionPad": "reflect", "ReplicationPad": "replicate", "ZeroPad": "zeros", "CircularPad": "circular"}


def _sliced(
    x: torch.Tensor,
    taps_h: List[float],  # noqa: UP006
    taps_w: List[float],  # noqa: UP006
    stride: List[int],  # noqa: UP006
    padding: List[int],  # noqa: UP006
    pad_mode: str,
) -> torch.Tensor:
    """One tap takes no arithmetic: every stride-th pixel, a view where nothing is padded."""
    return reference.extend(x, padding, pad_mode, True)[..., :: stride[0], :: stride[1]]


class BlurPool(KernelBlur):
    """Blur with a k x k binomial and keep every stride-th pixel, as ``antialiased_cnns.BlurPool``.

    1. pad floor((k-1)/2) + pad_off before and ceil((k-1)/2) + pad_off after on each axis;
    2. correlate every channel with ``filt`` at ``stride``; for ``filt_size`` 1 take a strided slice.

    Args:
        channels: C, the number of channels.
        pad_type: "refl" or "reflect", "repl" or "replicate", "zero".
        filt_size: k >= 1.
        stride: int >= 1.
        pad_off: further padding on every side, >= 0.

    The buffer ``filt``, of shape (C, 1, k, k), is part of the state_dict, so published checkpoints load strictly. A
    filter other than the binomial is honoured if it is the same for all channels and separable; it is read when it is
    loaded or assigned, never in a call. After writing into it in place, call :meth:`refresh_taps`.

    Raises:
        ValueError: naming the argument, or the state_dict's key of a filter that cannot be used.
    """

    def __init__(
        self, channels: int, pad_type: str = "reflect", filt_size: int = 4, stride: int = 2, pad_off: int = 0
    ) -> None:
        super().__init__()
        self._set_up(channels, pad_type, filt_size, stride, pad_off, axes=2)

    def _set_up(self, channels: int, pad_type: str, filt_size: int, stride: int, pad_off: int, axes: int) -> None:
        arguments = {"channels": channels, "filt_size": filt_size, "stride": stride, "pad_off": pad_off}
        for name, value in arguments.items():
            _blur.check_int(name, value, 0 if name == "pad_off" else 1)
            setattr(self, name, value)
        if not isinstance(pad_type, str) or pad_type not in _PAD_TYPES:
            raise ValueError(f"pad_type must be one of {', '.join(map(repr, _PAD_TYPES))}, got {pad_type!r}")
        self.pad_sizes = [side + pad_off for side in same_padding(filt_size)] * axes
        self.off = (stride - 1) // 2
        self.pad = getattr(nn, f"{_PAD_TYPES[pad_type]}Pad{axes}d")(self.pad_sizes)
        row = filters.binomial(filt_size)
        self._start((row if axes == 2 else (1.0,), row), (channels, 1)[:axes], persistent=True)

    def _geometry(self) -> tuple[Stride, Padding, Any]:
        kind = type(self.pad).__name__[:-2]
        if kind not in _PAD_MODES:
            raise ValueError(f"pad must be a module of {', '.join(_PAD_MODES)}, got {type(self.pad).__name__}")
        return self.stride, tuple(self.pad.padding), _PAD_MODES[kind]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.filt_size == 1:
            return _sliced(x, *self._window)  # type: ignore[arg-type]
        if torch.jit.is_scripting():
            return _blur.scripted(None, None, False, x, *self._window)  # type: ignore[arg-type]
        return _blur.blur2d(x, self._window, self.channels)


class BlurPool1D(BlurPool):
    """:class:`BlurPool` along one axis: ``filt`` has shape (C, 1, k), inputs (N, C, L)."""

    def __init__(
        self, channels: int, pad_type: str = "reflect", filt_size: int = 3, stride: int = 2, pad_off: int = 0
    ) -> None:
        KernelBlur.__init__(self)
        self._set_up(channels, pad_type, filt_size, stride, pad_off, axes=1)

    def _geometry(self) -> tuple[Stride, Padding, Any]:
        stride, sides, pad_mode = super()._geometry()
        return (1, stride), (*sides, 0, 0), pad_mode  # type: ignore[return-value,misc]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.filt_size == 1:
            return _sliced(x.unsqueeze(-2), *self._window).squeeze(-2)  # type: ignore[arg-type]
        if torch.jit.is_scripting():
            return _blur.scripted(None, None, False, x.unsqueeze(-2), *self._window).squeeze(-2)  # type: ignore[arg-type]
        return _blur.blur1d(x, self._window, self.channels)
