"""The arguments every blurring op takes, checked once and held as one value."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeGuard

import torch

from .. import filters

PadMode = Literal["reflect", "replicate", "zeros", "circular"]
LIMIT = 2**30  # of strides and pads: what kernels hold in 32 bits
PAD_MODES = ("reflect", "replicate", "zeros", "circular")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Row = Sequence[float]
Taps = int | Row | torch.Tensor | tuple[int | Row | torch.Tensor, int | Row | torch.Tensor]
Stride = int | tuple[int, int]
Padding = int | tuple[int, int] | tuple[int, int, int, int] | None


class Window(NamedTuple):
    """Taps and geometry of a blur, in the order in which the raw ops take them."""

    taps_h: tuple[float, ...] | torch.Tensor
    taps_w: tuple[float, ...] | torch.Tensor
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # left, right, top, bottom
    pad_mode: str

    @property
    def learned(self) -> bool:
        return isinstance(self.taps_h, torch.Tensor) or isinstance(self.taps_w, torch.Tensor)


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def length(taps: tuple[float, ...] | torch.Tensor) -> int:
    return taps.shape[-1] if isinstance(taps, torch.Tensor) else len(taps)


def window2d(taps: Taps, stride: Stride, padding: Padding, pad_mode: str) -> Window:
    """Check the arguments of a 2-D blur. Plain ints, the common case, are looked up."""
    if (
        type(taps) is int
        and type(stride) is int
        and type(pad_mode) is str
        and (padding is None or type(padding) is int)
    ):
        if torch.compiler.is_compiling():
            return _window2d(taps, stride, padding, pad_mode)
        return _cached_window2d(taps, stride, padding, pad_mode)
    return _window2d(taps, stride, padding, pad_mode)


def _window2d(taps: Taps, stride: Stride, padding: Padding, pad_mode: str) -> Window:
    if isinstance(taps, tuple) and len(taps) == 2 and not any(isinstance(t, float) for t in taps):
        taps_h, taps_w = row("taps[0]", taps[0]), row("taps[1]", taps[1])
    else:
        taps_h = taps_w = row("taps", taps)
    strides = (stride, stride) if is_int(stride) else stride
    if not (
        isinstance(strides, (tuple, list)) and len(strides) == 2 and all(is_int(s) and 1 <= s < LIMIT for s in strides)
    ):
        raise ValueError(f"stride must be an int >= 1 (and below 2**30) or a pair of them (h, w), got {stride!r}")
    sides = _padding2d(padding, length(taps_h), length(taps_w))
    if not isinstance(pad_mode, str) or pad_mode not in PAD_MODES:
        raise ValueError(f"pad_mode must be one of {', '.join(map(repr, PAD_MODES))}, got {pad_mode!r}")
    return Window(taps_h, taps_w, tuple(strides), sides, pad_mode)  # type: ignore[arg-type]


_cached_window2d = functools.lru_cache(maxsize=256, typed=True)(_window2d)


def window1d(
    taps: int | Row | torch.Tensor, stride: int, padding: int | tuple[int, int] | None, pad_mode: str
) -> Window:
    """Check the arguments of a 1-D blur, which is a 2-D blur of one row."""
    if not (is_int(stride) and 1 <= stride < LIMIT):
        raise ValueError(f"stride must be an int >= 1 (and below 2**30), got {stride!r}")
    taps = row("taps", taps)
    if padding is None:
        padding = same_padding(length(taps))
    sides = (padding, padding) if is_int(padding) else padding
    if not (isinstance(sides, (tuple, list)) and len(sides) == 2 and all(is_int(p) and 0 <= p < LIMIT for p in sides)):
        raise ValueError(
            f"padding must be None, an int >= 0 (and below 2**30) or a pair of them (left, right), got {padding!r}"
        )
    return _window2d(((1.0,), taps), (1, stride), (*sides, 0, 0), pad_mode)


def row(name: str, taps: object) -> tuple[float, ...] | torch.Tensor:
    """One axis' taps: an int is a binomial, floats are used as given, a tensor is checked and kept."""
    if isinstance(taps, torch.Tensor):
        if taps.dim() not in (1, 2) or taps.shape[-1] < 1:
            raise ValueError(f"{name} as a tensor must have shape (k,) or (C, k) with k >= 1, got {tuple(taps.shape)}")
        if taps.dtype not in DTYPES:
            raise TypeError(f"{name} as a tensor must be of a floating dtype, got {taps.dtype}")
        return taps
    if is_int(taps):
        if taps < 1:
            raise ValueError(f"{name} as an int counts the taps of a binomial and must be >= 1, got {taps}")
        return filters.binomial(taps)
    if isinstance(taps, Sequence) and not isinstance(taps, (str, bytes)):
        # Compared, not math.isfinite: torch.compile makes floats of a list symbolic, and traces comparisons only.
        if not taps or not all(isinstance(t, float) and -math.inf < t < math.inf for t in taps):
            raise ValueError(
                f"{name} as a row must be a non-empty sequence of finite floats (an int alone counts binomial taps), got {taps!r}"
            )
        return tuple(map(float, taps))
    raise TypeError(f"{name} must be an int, a sequence of floats, a tensor or a pair (h, w) of these, got {taps!r}")


def same_padding(k: int) -> tuple[int, int]:
    """Before and after: floor((k-1)/2) and ceil((k-1)/2), which gives ceil(n/stride) outputs."""
    return (k - 1) // 2, k // 2


def _padding2d(padding: Padding, kh: int, kw: int) -> tuple[int, int, int, int]:
    if padding is None:
        return (*same_padding(kw), *same_padding(kh))
    if is_int(padding):
        sides: tuple[Any, ...] = (padding,) * 4
    elif isinstance(padding, (tuple, list)) and len(padding) == 2:
        sides = (padding[1], padding[1], padding[0], padding[0])
    else:
        sides = tuple(padding) if isinstance(padding, (tuple, list)) else ()
    if len(sides) != 4 or not all(is_int(p) and 0 <= p < LIMIT for p in sides):
        raise ValueError(
            "padding must be None, an int >= 0 (and below 2**30), a pair (h, w) or four of them (left, right, top, bottom), "
            f"got {padding!r}"
        )
    return sides


def check_input(x: torch.Tensor, window: Window, dims: int = 2, grown: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """Check x against a window before any memory is touched, and as ``check_tensor`` does.

    ``grown`` is by how much the map that is blurred is higher and wider than x.
    """
    x = check_tensor("x", x)
    if x.dim() - dims not in (1, 2):
        raise ValueError(
            f"x must have shape {'(N, C, H, W) or (C, H, W)' if dims == 2 else '(N, C, L) or (C, L)'}, got {tuple(x.shape)}"
        )
    left, right, top, bottom = window.padding
    _check_axis("width" if dims == 2 else "length", x.shape[-1], left, right, length(window.taps_w), grown[1])
    if dims == 2:
        _check_axis("height", x.shape[-2], top, bottom, length(window.taps_h), grown[0])
    return x


def check_tensor(name: str, x: torch.Tensor) -> torch.Tensor:
    """Check what every op asks of a tensor; under autocast, cast it as a convolution would."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {x.layout}")
    device = x.device.type
    if device != "meta" and x.dtype is not torch.float64 and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return x


def _check_axis(name: str, size: int, before: int, after: int, taps: int, grown: int) -> None:
    if size < 1:
        raise ValueError(f"x must have a {name} of at least 1, got {size}")
    if size + grown < 1:
        raise ValueError(f"x of {name} {size} leaves no maximum: the window, less its padding, is {1 - grown}")
    if size + grown + before + after < taps:
        what = f"x of {name} {size}" if grown == 0 else f"x of {name} {size}, whose maxima are {size + grown},"
        raise ValueError(
            f"{what} with padding ({before}, {after}) is shorter than the {taps} taps: the output would be empty; "
            "give more padding or fewer taps"
        )


def pair_of_rows(window: Window, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both axes' taps as (C, k) tensors in the accumulation dtype of x, on its device."""
    return _channel_rows("taps_h", window.taps_h, x), _channel_rows("taps_w", window.taps_w, x)


def _channel_rows(name: str, taps: tuple[float, ...] | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    channels = x.shape[1]
    if not isinstance(taps, torch.Tensor):
        return torch.tensor(taps, dtype=dtype, device=x.device).expand(channels, -1)
    if taps.device != x.device:
        raise ValueError(f"{name} must be on the device of x ({x.device}), got {taps.device}")
    if taps.dim() == 2 and taps.shape[0] not in (1, channels):
        raise ValueError(
            f"{name} must have one row or one per channel of x ({channels}), got shape {tuple(taps.shape)}"
        )
    return taps.to(dtype).expand(channels, taps.shape[-1])
