"""What happens to a map before it is blurred: an affine, an activation, a maximum; checked once and held as one value."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from ._window import is_int

Act = str | tuple[str, float] | tuple[str, float, float]
ACTS = ("none", "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish")
ACTS_WITH_NUMBERS = {"leaky_relu": ("slope",), "softplus": ("beta", "threshold")}


class Prologue(NamedTuple):
    """In the order in which the raw ops take it."""

    act: str
    act_args: tuple[float, ...]
    kernel: tuple[int, int]
    max_padding: tuple[int, int, int, int]  # left, right, top, bottom

    @property
    def grown(self) -> tuple[int, int]:
        """By how much the maxima are more than the pixels, in height and width."""
        left, right, top, bottom = self.max_padding
        return top + bottom + 1 - self.kernel[0], left + right + 1 - self.kernel[1]

    @property
    def idle(self) -> bool:
        """Whether, but for an affine, it changes nothing."""
        return self.act == "none" and self.kernel == (1, 1)


def prologue(act: Act, kernel_size: int | tuple[int, int], max_padding: int | tuple[int, int]) -> Prologue:
    """Check the arguments of a prologue."""
    if type(act) is str and type(kernel_size) is int and type(max_padding) is int and not torch.compiler.is_compiling():
        return _cached(act, kernel_size, max_padding)
    return _prologue(act, kernel_size, max_padding)


def _prologue(act: Act, kernel_size: Any, max_padding: Any) -> Prologue:
    kernel = (kernel_size, kernel_size) if is_int(kernel_size) else kernel_size
    if not (isinstance(kernel, (tuple, list)) and len(kernel) == 2 and all(is_int(k) and 1 <= k < 128 for k in kernel)):
        raise ValueError(
            f"kernel_size must be an int >= 1 (and below 128) or a pair of them (h, w), got {kernel_size!r}"
        )
    pads = (max_padding, max_padding) if is_int(max_padding) else max_padding
    if not (
        isinstance(pads, (tuple, list))
        and len(pads) == 2
        and all(is_int(p) and 0 <= 2 * p <= k for p, k in zip(pads, kernel, strict=True))
    ):
        raise ValueError(
            "max_padding must be an int >= 0 or a pair of them (h, w), at most half of kernel_size "
            f"{tuple(kernel)}, got {max_padding!r}"
        )
    return Prologue(*_act(act), tuple(kernel), (pads[1], pads[1], pads[0], pads[0]))


_cached = functools.lru_cache(maxsize=256, typed=True)(_prologue)


def _act(act: Any) -> tuple[str, tuple[float, ...]]:
    name, *numbers = act if isinstance(act, tuple) and act else (act,)
    wanted = ACTS_WITH_NUMBERS.get(name, ()) if isinstance(name, str) else ()
    known = isinstance(name, str) and (name in ACTS or name in ACTS_WITH_NUMBERS)
    if not known or len(numbers) != len(wanted) or not all(_is_number(n) for n in numbers):
        raise ValueError(
            f"act must be one of {', '.join(map(repr, ACTS))}, ('leaky_relu', slope) or ('softplus', beta, threshold), got {act!r}"
        )
    if name == "softplus" and numbers[0] == 0:
        raise ValueError(f"the beta of act 'softplus' must not be 0, got {act!r}")
    return name, tuple(map(float, numbers))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def affine_of(x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None) -> torch.Tensor | None:
    """The (3, C) table (center, scale, shift) of ``x * scale + shift``, in the accumulation dtype of x; None for neither."""
    if scale is None and shift is None:
        return None
    dtype, channels = torch.float64 if x.dtype is torch.float64 else torch.float32, x.shape[-3]
    rows = [torch.zeros(channels, dtype=dtype, device=x.device)]
    for name, row, otherwise in (("scale", scale, 1.0), ("shift", shift, 0.0)):
        if row is None:
            rows.append(torch.full((channels,), otherwise, dtype=dtype, device=x.device))
            continue
        if not isinstance(row, torch.Tensor) or not row.is_floating_point():
            raise TypeError(f"{name} must be None or a tensor of a floating dtype, got {row!r}")
        if row.shape != (channels,):
            raise ValueError(
                f"{name} must have one number per channel of x, shape ({channels},), got {tuple(row.shape)}"
            )
        if row.device != x.device:
            raise ValueError(f"{name} must be on the device of x ({x.device}), got {row.device}")
        rows.append(row.to(dtype))
    return torch.stack(rows)
