"""The whole downsampling step in one pass: affine, activation, dense maximum, then blur and subsample.

    u = (x - center_c) scale_c + shift_c
    v = act(u)
    z[n,c,i,j] = max over 0 <= a < k_h, 0 <= b < k_w of v[n,c, i + a - p_t, j + b - p_l],  -inf beyond the border of v
    y = D z, the blur of blur_pool

and its gradients. With dz = D^T dy and M^T the sum, for every pixel, of what it has won as a maximum,

    du   = act'(u) M^T dz
    dx   = du scale_c + correction[0,c] + correction[1,c] (x - center_c)
    sums = for every channel (sum du, sum du (x - center_c))

from which those of scale, shift and center follow, and with the right correction those of a batch norm. Neither v nor z nor
dz reaches memory; only x is kept for the backward, which works out v and the winners again.

Sources: Zhang, Making Convolutional Networks Shift-Invariant Again, 2019 (maximum, then blur); Ioffe & Szegedy, Batch
Normalization, 2015.
"""

from __future__ import annotations

import torch

from ..kernels import reference
from . import blur_pool
from ._library import define, empty, fused, is_channels_last
from ._prologue import Act, Prologue, affine_of, prologue
from ._window import Padding, PadMode, Stride, Taps, Window, check_input, window2d

__all__ = ["act_blur_pool2d", "apply", "max_blur_pool2d"]

_BLUR = "float[] taps_h, float[] taps_w, int[] stride, int[] padding, str pad_mode"
_REST = f"str act, float[] act_args, int[] kernel, SymInt[] max_padding, {_BLUR}"


def _fake_fwd(x, affine, act, act_args, kernel, max_padding, taps_h, taps_w, stride, padding, pad_mode):
    (m_left, m_right, m_top, m_bottom), (left, right, top, bottom) = max_padding, padding
    height = x.shape[-2] + m_top + m_bottom + 1 - kernel[0] + top + bottom
    width = x.shape[-1] + m_left + m_right + 1 - kernel[1] + left + right
    out = (height - len(taps_h)) // stride[0] + 1, (width - len(taps_w)) // stride[1] + 1
    return empty(x, (*x.shape[:-2], *out), is_channels_last(x))


def _fake_bwd(dy, x, *rest):
    return empty(x, tuple(x.shape), is_channels_last(x))


def _fake_sums(dy, x, *rest):
    return x.new_empty((2, x.shape[1]), dtype=torch.float64 if x.dtype is torch.float64 else torch.float32)


fwd = define(f"max_blur_pool_fwd(Tensor x, Tensor? affine, {_REST}) -> Tensor", _fake_fwd)
bwd = define(
    f"max_blur_pool_bwd(Tensor dy, Tensor x, Tensor? affine, Tensor? correction, {_REST}) -> Tensor", _fake_bwd
)
sums = define(f"max_blur_pool_sums(Tensor dy, Tensor x, Tensor? affine, {_REST}) -> Tensor", _fake_sums)


def in_steps(x: torch.Tensor, affine: torch.Tensor | None, *rest) -> torch.Tensor:
    """The same, one after the other: affine, activation and maximum as torch's own operations, then the blur."""
    return blur_pool.apply(reference.prepared(x, affine, *rest[:4]), Window(*rest[4:]))


def _vjp(wanted, dy, saved, rest):
    x, affine = saved
    dx = bwd(dy, x, affine, None, *rest) if wanted[0] else None
    if not wanted[1]:
        return dx, None
    shift, scale = sums(dy, x, affine, *rest)
    return dx, torch.stack([-affine[1] * shift, scale, shift])


_fused = fused(fwd, 2, _vjp, in_steps)


def takes_steps(window: Window) -> bool:
    """Taps that are tensors have gradients of their own. They, and what leaves PyTorch, take the steps one by one."""
    return window.learned or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


def run(x: torch.Tensor, affine: torch.Tensor | None, before: Prologue, window: Window) -> torch.Tensor:
    """Of a checked (N,C,H,W) and the table (3,C) of an affine."""
    return (in_steps if takes_steps(window) else _fused)(x, affine, *before, *window)


def apply(
    x: torch.Tensor,
    before: Prologue,
    window: Window,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run a checked prologue and window over (N,C,H,W) or (C,H,W): what modules call."""
    x = check_input(x, window, grown=before.grown)
    affine = affine_of(x, scale, shift)
    if before.idle and affine is None:
        return blur_pool.apply(x, window)
    y = run(x if x.dim() == 4 else x.unsqueeze(0), affine, before, window)
    return y if x.dim() == 4 else y.squeeze(0)


def max_blur_pool2d(
    x: torch.Tensor,
    kernel_size: int | tuple[int, int] = 2,
    taps: Taps = 4,
    stride: Stride = 2,
    *,
    act: Act = "none",
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    max_padding: int | tuple[int, int] = 0,
    padding: Padding = None,
    pad_mode: PadMode = "reflect",
) -> torch.Tensor:
    """Max-pool densely, blur and keep every stride-th pixel, in one pass: an anti-aliased ``max_pool2d``.

    1. ``v = act(x scale_c + shift_c)``, in float32 (float64 for float64);
    2. z is the maximum of v over a window at every position, -inf beyond the border, as ``F.max_pool2d(v, kernel_size,
       stride=1, padding=max_padding)`` takes it: of equals the first wins, a NaN beats all;
    3. ``y = blur_pool2d(z, taps, stride, padding=padding, pad_mode=pad_mode)``.

    Args:
        x: (N, C, H, W) or (C, H, W); float32, bfloat16, float16 or float64; any strides; N or C may be 0.
        kernel_size: of the maximum, int >= 1 or (h, w).
        taps, stride, padding, pad_mode: as for :func:`aliasfused.blur_pool2d`. Taps that are tensors run the three steps
            one by one.
        act: "none", "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish", ("leaky_relu", slope) or
            ("softplus", beta, threshold).
        scale, shift: (C,) each, or None for 1 and 0.
        max_padding: int or (h, w), at most half of the window.

    Returns:
        (N, C, H', W') with ``H' = ceil((H + 2 p_h - k_h + 1) / s_h)`` for the usual padding, in the dtype and memory format
        of x.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Gradients of any order exist for x, scale and shift; the backward keeps x and nothing else. Second derivatives,
    forward-mode derivatives and torch.func's transforms run the steps one by one.

    Source: Zhang, Making Convolutional Networks Shift-Invariant Again, 2019.
    """
    return apply(x, prologue(act, kernel_size, max_padding), window2d(taps, stride, padding, pad_mode), scale, shift)


def act_blur_pool2d(
    x: torch.Tensor,
    act: Act = "relu",
    taps: Taps = 4,
    stride: Stride = 2,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    padding: Padding = None,
    pad_mode: PadMode = "reflect",
) -> torch.Tensor:
    """Scale, activate, blur and keep every stride-th pixel, in one pass: :func:`max_blur_pool2d` without a maximum.

    ``y = blur_pool2d(act(x scale_c + shift_c), taps, stride, padding=padding, pad_mode=pad_mode)``, all but the blur in
    float32 (float64 for float64); a folded batch norm is such a scale and shift.

    Arguments, result, errors and gradients are those of :func:`max_blur_pool2d`.
    """
    return apply(x, prologue(act, 1, 0), window2d(taps, stride, padding, pad_mode), scale, shift)
