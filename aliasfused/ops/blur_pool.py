"""Blur and subsample in one pass.

    y[n,c,i,j] = sum_p sum_q a_p b_q x~[n,c, s_h i + p - top, s_w j + q - left]

with x~ = x extended beyond its border. With each axis written as a matrix, ``y = A x B^T``; its adjoint
``dx = A^T dy B`` is the other primitive op here, each is the other's backward, and nothing is saved for it. Taps that are
numbers travel in the call; taps that are tensors make the map trilinear in (x, a, b), and one more op gives their gradient.

Source: Zhang, Making Convolutional Networks Shift-Invariant Again, 2019.
"""

from __future__ import annotations

import torch

from ..kernels import reference
from ._library import define, empty, is_channels_last, multilinear
from ._window import PadMode, Row, Taps, Window, check_input, pair_of_rows, window1d, window2d

__all__ = ["apply", "blur_pool1d", "blur_pool2d"]

_GEOMETRY = "int[] stride, int[] padding, str pad_mode"
_FIXED = f"float[] taps_h, float[] taps_w, {_GEOMETRY}"
_LEARNED = f"Tensor taps_h, Tensor taps_w, {_GEOMETRY}"
_GRID = "SymInt H, SymInt W, bool channels_last"


def _fake_fwd(x, taps_h, taps_w, stride, padding, pad_mode):
    kernel = (_length(taps_h), _length(taps_w))
    left, right, top, bottom = padding
    height = (x.shape[-2] + top + bottom - kernel[0]) // stride[0] + 1
    width = (x.shape[-1] + left + right - kernel[1]) // stride[1] + 1
    return empty(x, (*x.shape[:-2], height, width), is_channels_last(x))


def _fake_bwd(dy, taps_h, taps_w, stride, padding, pad_mode, H, W, channels_last):
    return empty(dy, (*dy.shape[:-2], H, W), channels_last)


def _fake_grad(dy, x, other, axis, size, stride, padding, pad_mode):
    return other.new_empty((x.shape[1], size))


def _length(taps) -> int:
    return taps.shape[-1] if isinstance(taps, torch.Tensor) else len(taps)


_fwd = define(f"blur_pool_fwd(Tensor x, {_FIXED}) -> Tensor", _fake_fwd)
_bwd = define(f"blur_pool_bwd(Tensor dy, {_FIXED}, {_GRID}) -> Tensor", _fake_bwd)
_taps_fwd = define(f"blur_pool_taps_fwd(Tensor x, {_LEARNED}) -> Tensor", _fake_fwd)
_taps_bwd = define(f"blur_pool_taps_bwd(Tensor dy, {_LEARNED}, {_GRID}) -> Tensor", _fake_bwd)
# Gradient of the taps along `axis` (0: taps_h, 1: taps_w), `other` being the taps along the other axis: (C, size).
_taps_grad = define(
    f"blur_pool_taps_grad(Tensor dy, Tensor x, Tensor other, int axis, int size, {_GEOMETRY}) -> Tensor", _fake_grad
)


def _grid(x, *_):
    return x.shape[-2], x.shape[-1], is_channels_last(x)


def _into_batch(call, batch, in_dims, x, *rest):
    """A mapped image dimension joins the batch: (B, N, C, H, W) as (B N, C, H, W)."""
    x = x.movedim(in_dims[0], 0)
    return call(x.flatten(0, 1), *rest).unflatten(0, x.shape[:2]), 0


def _into_channels(call, batch, in_dims, *args):
    """Mapped images and taps alike join the channels, for each of which the taps may differ."""

    def fold(value, dim):
        if not isinstance(value, torch.Tensor):
            return value
        value = value.expand(batch, *value.shape) if dim is None else value.movedim(dim, 0)
        return value.flatten(0, 1) if value.dim() == 3 else value.transpose(0, 1).flatten(1, 2)

    y = call(*(fold(value, dim) for value, dim in zip(args, in_dims, strict=True)))
    channels = 0 if y.dim() == 2 else 1
    return y.unflatten(channels, (batch, y.shape[channels] // batch)), channels


def _vjp_down(wanted, dy, saved, rest):
    return (_up(dy, *rest),)


def _vjp_up(wanted, dx, saved, rest):
    return (_down(dx, *rest[:5]),)


def _vjp_learned_down(wanted, dy, saved, rest):
    (x, a, b), geometry = saved, rest[:3]
    return (
        _learned_up(dy, a, b, *rest) if wanted[0] else None,
        _grad(dy, x, b, 0, a.shape[1], *geometry) if wanted[1] else None,
        _grad(dy, x, a, 1, b.shape[1], *geometry) if wanted[2] else None,
    )


def _vjp_learned_up(wanted, dx, saved, rest):
    (dy, a, b), geometry = saved, rest[:3]
    return (
        _learned_down(dx, a, b, *geometry) if wanted[0] else None,
        _grad(dy, dx, b, 0, a.shape[1], *geometry) if wanted[1] else None,
        _grad(dy, dx, a, 1, b.shape[1], *geometry) if wanted[2] else None,
    )


def _vjp_grad(wanted, g, saved, rest):
    (dy, x, other), (axis, _, *geometry, H, W, channels_last) = saved, rest
    rows = (g, other) if axis == 0 else (other, g)
    return (
        _learned_down(x, *rows, *geometry) if wanted[0] else None,
        _learned_up(dy, *rows, *geometry, H, W, channels_last) if wanted[1] else None,
        _grad(dy, x, g, 1 - axis, other.shape[1], *geometry) if wanted[2] else None,
    )


_down = multilinear(_fwd, 1, _vjp_down, _into_batch, keep=_grid)
_up = multilinear(_bwd, 1, _vjp_up, _into_batch)
_learned_down = multilinear(_taps_fwd, 3, _vjp_learned_down, _into_channels, keep=_grid)
_learned_up = multilinear(_taps_bwd, 3, _vjp_learned_up, _into_channels)
_grad = multilinear(_taps_grad, 3, _vjp_grad, _into_channels, keep=lambda dy, x, *_: _grid(x))


def apply(x: torch.Tensor, window: Window) -> torch.Tensor:
    """Blur a checked (N,C,H,W) or (C,H,W) tensor with a checked window: what modules call."""
    x = check_input(x, window)
    if x.dim() == 3:
        return _apply4d(x.unsqueeze(0), window).squeeze(0)
    return _apply4d(x, window)


def _apply4d(x: torch.Tensor, window: Window) -> torch.Tensor:
    if not window.learned:
        if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
            return reference.unfused(x, *window)  # type: ignore[arg-type]
        return _down(x, *window)
    rows = pair_of_rows(window, x)
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return reference.unfused_taps(x, *rows, *window[2:])  # type: ignore[arg-type]
    return _learned_down(x, *rows, *window[2:])


def blur_pool2d(
    x: torch.Tensor,
    taps: Taps = 4,
    stride: int | tuple[int, int] = 2,
    *,
    padding: int | tuple[int, int] | tuple[int, int, int, int] | None = None,
    pad_mode: PadMode = "reflect",
) -> torch.Tensor:
    """Blur an image with a separable low-pass filter and keep every stride-th pixel, in one pass.

    1. x~ is x extended by ``pad_mode``: reflect (about the border pixel), replicate, zeros or circular, however far;
    2. ``y[n,c,i,j] = sum_p sum_q a_p b_q x~[n,c, s_h i + p - top, s_w j + q - left]``, summed in float32 (float64 for
       float64) and rounded once.

    Args:
        x: (N, C, H, W) or (C, H, W); float32, bfloat16, float16 or float64; any strides; N or C may be 0.
        taps: an int k is the normalised binomial of k taps; a sequence of floats is one row for both axes, used as
            given; a pair (h, w) of ints, rows or tensors names the axes apart. A tensor, (k,) shared or (C, k) per
            channel, is differentiable.
        stride: int >= 1 or (s_h, s_w), in input pixels.
        padding: None puts floor((k-1)/2) pixels before and ceil((k-1)/2) after on each axis, for ceil(H/s) outputs; an
            int, (p_h, p_w) or (left, right, top, bottom) is used as given.
        pad_mode: "reflect", "replicate", "zeros" or "circular".

    Returns:
        (N, C, H', W') with ``H' = floor((H + top + bottom - k_h) / s_h) + 1``, in the dtype of x (under autocast the
        dtype a convolution would give) and its memory format.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed; an output of no pixels is one.

    Gradients of any order exist for x and for tensor taps; the backward keeps nothing for fixed taps.

    Source: Zhang, Making Convolutional Networks Shift-Invariant Again, 2019.
    """
    return apply(x, window2d(taps, stride, padding, pad_mode))


def blur_pool1d(
    x: torch.Tensor,
    taps: int | Row | torch.Tensor = 3,
    stride: int = 2,
    *,
    padding: int | tuple[int, int] | None = None,
    pad_mode: PadMode = "reflect",
) -> torch.Tensor:
    """Blur a signal and keep every stride-th sample: :func:`blur_pool2d` along one axis.

    ``y[n,c,j] = sum_q b_q x~[n,c, s j + q - left]``.

    Args:
        x: (N, C, L) or (C, L).
        taps: an int (binomial), a sequence of floats, or a tensor (k,) or (C, k).
        stride: int >= 1.
        padding: None, an int, or (left, right).
        pad_mode: as for :func:`blur_pool2d`.

    Returns:
        (N, C, L') or (C, L') with ``L' = floor((L + left + right - k) / s) + 1``.
    """
    return apply1d(x, window1d(taps, stride, padding, pad_mode))


def apply1d(x: torch.Tensor, window: Window) -> torch.Tensor:
    """Blur a checked (N,C,L) or (C,L) tensor with a checked window of one row."""
    x = check_input(x, window, dims=1)
    y = _apply4d(x.unsqueeze(-2) if x.dim() == 3 else x[None, :, None], window).squeeze(-2)
    return y if x.dim() == 3 else y.squeeze(0)
