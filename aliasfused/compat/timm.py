"""timm's ``BlurPool2d``, fused: give the class as ``aa_layer`` to ``timm.create_model``."""

from __future__ import annotations

from typing import Any

import torch

from .. import filters
from ..nn._blur import check_int
from ..ops._window import Padding, Stride
from ._kernel import KernelBlur, outer

__all__ = ["BlurPool2d"]

_PAD_MODES = {"reflect": "reflect", "replicate": "replicate", "constant": "zeros", "circular": "circular"}


class BlurPool2d(KernelBlur):
    """Blur with a k x k binomial and keep every stride-th pixel, as ``timm.layers.BlurPool2d``.

    1. pad ((s-1) + (k-1)) // 2 on all four sides, so that H' = floor((H + 2 pad - k) / s) + 1: for even k this is not
       the grid of antialiased-cnns;
    2. correlate every channel with the binomial at ``stride``.

    Args:
        channels: None, or the number of channels, which inputs are then checked against.
        filt_size: k >= 1.
        stride: int >= 1.
        pad_mode: as in F.pad: "reflect", "replicate", "constant" (zeros) or "circular".
        device, dtype: of the buffer ``filt``, of shape (C or 1, 1, k, k), which is no part of the state_dict.

    A ``filt`` that is assigned is honoured as in :class:`aliasfused.compat.antialiased_cnns.BlurPool`.

    Raises:
        ValueError: naming the argument, what was given and what is allowed.
    """

    def __init__(
        self,
        channels: int | None = None,
        filt_size: int = 3,
        stride: int = 2,
        pad_mode: str = "reflect",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels is not None:
            check_int("channels", channels)
        check_int("filt_size", filt_size)
        check_int("stride", stride)
        self.channels, self.filt_size, self.stride, self.pad_mode = channels, filt_size, stride, pad_mode
        self.padding = [(stride - 1 + filt_size - 1) // 2] * 4
        row = filters.binomial(filt_size)
        self._start((row, row), (channels or 1, 1), persistent=False, device=device, dtype=dtype)

    def _geometry(self) -> tuple[Stride, Padding, Any]:
        if self.pad_mode not in _PAD_MODES:
            raise ValueError(f"pad_mode must be one of {', '.join(map(repr, _PAD_MODES))}, got {self.pad_mode!r}")
        return self.stride, tuple(self.padding), _PAD_MODES[self.pad_mode]  # type: ignore[return-value]

    def init_non_persistent_buffers(self) -> None:
        """Fill ``filt`` with the binomial again, as timm asks of modules that were made on the meta device."""
        row = filters.binomial(self.filt_size)
        with torch.no_grad():
            self.filt.copy_(outer((row, row)))
        self.refresh_taps()

    reset_parameters = init_non_persistent_buffers
