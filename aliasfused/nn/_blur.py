"""What every blurring module shares, here and in ``compat``: one call, eager or scripted."""

from __future__ import annotations

from typing import TYPE_CHECKING, List, Optional  # noqa: UP035  (TorchScript reads these annotations)

import torch
from torch import nn

from ..kernels import reference
from ..ops._window import Window, is_int, length
from ..ops.blur_pool import apply, apply1d


def check_int(name: str, value: object, least: int = 1) -> None:
    if not is_int(value) or value < least:
        raise ValueError(f"{name} must be an int >= {least}, got {value!r}")


def _check_channels(x: torch.Tensor, channels: int | None, dim: int) -> None:
    if channels is not None and isinstance(x, torch.Tensor) and x.dim() >= -dim and x.shape[dim] != channels:
        raise ValueError(f"x must have the module's {channels} channels in dimension {dim}, got shape {tuple(x.shape)}")


@torch.fx.wrap
def blur2d(x: torch.Tensor, window: Window, channels: int | None) -> torch.Tensor:
    """One node of a torch.fx trace: the checks and the op."""
    _check_channels(x, channels, -3)
    return apply(x, window)


@torch.fx.wrap
def blur1d(x: torch.Tensor, window: Window, channels: int | None) -> torch.Tensor:
    """:func:`blur2d` along one axis."""
    _check_channels(x, channels, -2)
    return apply1d(x, window)


@torch.fx.wrap
def normalise(log_taps: torch.Tensor) -> torch.Tensor:
    """Taps that are positive and sum to one: the softmax of their logarithms, at least in float32."""
    return log_taps.softmax(-1) if log_taps.dtype == torch.float64 else log_taps.float().softmax(-1)


def _row(learned: Optional[torch.Tensor], taps: List[float], normalised: bool, x: torch.Tensor) -> torch.Tensor:  # noqa: UP006, UP045
    if learned is None:
        row = torch.tensor(taps, dtype=torch.float64, device=x.device)
    elif normalised:
        row = normalise(learned)
    else:
        row = learned
    return row.expand(x.shape[1], len(taps))


def scripted(
    learned_h: Optional[torch.Tensor],  # noqa: UP045
    learned_w: Optional[torch.Tensor],  # noqa: UP045
    normalised: bool,
    x: torch.Tensor,
    taps_h: List[float],  # noqa: UP006
    taps_w: List[float],  # noqa: UP006
    stride: List[int],  # noqa: UP006
    padding: List[int],  # noqa: UP006
    pad_mode: str,
) -> torch.Tensor:
    """The blur in TorchScript: pad (or, on maps smaller than the pad, gather) and convolve; for inference."""
    learned = learned_h is not None or learned_w is not None
    trains = x.requires_grad
    if learned_h is not None:
        trains = trains or learned_h.requires_grad
    if learned_w is not None:
        trains = trains or learned_w.requires_grad
    if torch.is_grad_enabled() and trains:
        raise RuntimeError(
            "aliasfused: a scripted blur is for inference, under torch.no_grad(); train the eager or compiled module"
        )
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    gather = max(padding[0], padding[1]) >= x.shape[-1] or max(padding[2], padding[3]) >= x.shape[-2]
    if learned:
        row_h, row_w = _row(learned_h, taps_h, normalised, batch), _row(learned_w, taps_w, normalised, batch)
        y = reference.unfused_taps(batch, row_h, row_w, stride, padding, pad_mode, gather)
    else:
        y = reference.unfused(batch, taps_h, taps_w, stride, padding, pad_mode, gather)
    return y if x.dim() == 4 else y.squeeze(0)


class Blur2d(nn.Module):
    """A blur of two axes whose window is a value of the module."""

    channels = None  # type: int | None
    if TYPE_CHECKING:  # as a real annotation TorchScript would refuse it
        _window: Window

    def window(self) -> Window:
        """Taps and geometry as they are now."""
        return self._window

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return scripted(None, None, False, x, *self._window)  # type: ignore[arg-type]
        return blur2d(x, self._window, self.channels)

    def extra_repr(self) -> str:
        h, w, stride, padding, pad_mode = self._window
        return f"taps={length(h)}x{length(w)}, {stride=}, {padding=}, {pad_mode=}"


class Blur1d(Blur2d):
    """:class:`Blur2d` along one axis, its window being of one row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return scripted(None, None, False, x.unsqueeze(-2), *self._window).squeeze(-2)  # type: ignore[arg-type]
        return blur1d(x, self._window, self.channels)
