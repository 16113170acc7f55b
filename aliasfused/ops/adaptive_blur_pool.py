"""Blur by filters that are predicted for every output pixel and group of channels, and subsample.

    w[n,g,t,i,j] = softmax of logits[n, g k^2 + t, i, j]         over t ("group"), over g and t ("joint"), or no softmax ("none")
    y[n,c,i,j]   = sum_p sum_q w[n, g(c), p k + q, i, j] x~[n,c, s_h i + p - r, s_w j + q - r]

with k odd, r = k // 2, g(c) = c // (C / G), and x~ = x extended beyond its border. The gradients, with W the map x -> y:

    dx      = W^T dy
    dw      = sum over the channels c of g, of dy[n,c,i,j] x~[n,c, s_h i + p - r, s_w j + q - r]
    dlogits = w (dw - sum w dw), the sum over what the softmax is over;  dw where there is none

Logits may also come for all positions of x. Those at (s_h i, s_w j) are read then, and the gradient of the others is zero.

No filter ever reaches memory: whoever needs w makes it of the logits. x and logits are kept for the backward.

Source: Zou, Xiao, Yu & Lee, Delving Deeper into Anti-aliasing in ConvNets, 2020.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from ..kernels import reference
from ._library import define, empty, fused, is_channels_last
from ._window import PAD_MODES, PadMode, Stride, check_tensor, is_int

__all__ = ["adaptive_blur_pool2d", "apply"]

Normalize = Literal["group", "joint", "none"]
NORMALIZE = ("group", "joint", "none")
_ARGUMENTS = "int kernel_size, int[] stride, int groups, str normalize, str pad_mode"


def _grid(batch: int, size: tuple[int, ...], logits: torch.Tensor, k: int, stride: Any, groups: int) -> tuple[int, ...]:
    """The size of y for x of ``size``, if the logits are of either size that there may be."""
    grid = tuple((n - 1) // s + 1 for n, s in zip(size, stride, strict=True))
    begins, given = (batch, groups * k**2), tuple(logits.shape)
    if given[:2] != begins or given[2:] not in (grid, tuple(size)):
        raise ValueError(
            f"logits must have shape {(*begins, *grid)}, at the kept positions, or {(*begins, *size)}, at all, got {given}"
        )
    return grid


def _fake_fwd(x, logits, kernel_size, stride, groups, normalize, pad_mode):
    grid = _grid(x.shape[0], x.shape[2:], logits, kernel_size, stride, groups)
    return empty(x, (*x.shape[:2], *grid), is_channels_last(x))


def _fake_bwd(dy, logits, kernel_size, stride, groups, normalize, pad_mode, H, W, channels_last):
    _grid(dy.shape[0], (H, W), logits, kernel_size, stride, groups)
    return empty(dy, (*dy.shape[:2], H, W), channels_last)


def _fake_logits_grad(dy, x, logits, kernel_size, stride, groups, normalize, pad_mode):
    _grid(x.shape[0], x.shape[2:], logits, kernel_size, stride, groups)
    return empty(logits, tuple(logits.shape), is_channels_last(logits))


_fwd = define(f"adaptive_blur_pool_fwd(Tensor x, Tensor logits, {_ARGUMENTS}) -> Tensor", _fake_fwd)
_bwd = define(
    f"adaptive_blur_pool_bwd(Tensor dy, Tensor logits, {_ARGUMENTS}, SymInt H, SymInt W, bool channels_last) -> Tensor",
    _fake_bwd,
)
_logits_grad = define(
    f"adaptive_blur_pool_logits_grad(Tensor dy, Tensor x, Tensor logits, {_ARGUMENTS}) -> Tensor", _fake_logits_grad
)


def _vjp(wanted, dy, saved, rest):
    x, logits = saved
    dx = _bwd(dy, logits, *rest, x.shape[2], x.shape[3], is_channels_last(x)) if wanted[0] else None
    return dx, _logits_grad(dy, x, logits, *rest) if wanted[1] else None


_fused = fused(_fwd, 2, _vjp, reference.adaptive_in_steps)


def apply(
    x: torch.Tensor,
    logits: torch.Tensor,
    kernel_size: int,
    stride: tuple[int, int],
    groups: int,
    normalize: Normalize,
    pad_mode: PadMode,
) -> torch.Tensor:
    """Run over tensors what else is checked already: what modules call."""
    x, logits = check_tensor("x", x), check_tensor("logits", logits)
    if x.dim() != 4 or min(x.shape[2:]) < 1:
        raise ValueError(f"x must have shape (N, C, H, W) with pixels in it, got {tuple(x.shape)}")
    if x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} channels of x, got {groups}")
    if (logits.dtype, logits.device) != (x.dtype, x.device):
        raise TypeError(
            f"logits must have the dtype and device of x ({x.dtype}, {x.device}), got {logits.dtype}, {logits.device}"
        )
    _grid(x.shape[0], x.shape[2:], logits, kernel_size, stride, groups)
    steps = torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
    run = reference.adaptive_in_steps if steps else _fused
    return run(x, logits, kernel_size, stride, groups, normalize, pad_mode)


def check(
    kernel_size: int, stride: Stride, groups: int, normalize: Normalize, pad_mode: PadMode
) -> tuple[int, tuple[int, int], int, Normalize, PadMode]:
    """The arguments that are no tensors, in the order of the raw ops."""
    if not is_int(kernel_size) or kernel_size < 1 or kernel_size % 2 == 0 or kernel_size > 63:
        raise ValueError(f"kernel_size must be an odd int from 1 to 63, got {kernel_size!r}")
    strides = (stride, stride) if is_int(stride) else stride
    if not (
        isinstance(strides, (tuple, list)) and len(strides) == 2 and all(is_int(s) and 1 <= s < 2**30 for s in strides)
    ):
        raise ValueError(f"stride must be an int >= 1 or a pair of them (h, w), got {stride!r}")
    if not is_int(groups) or groups < 1:
        raise ValueError(f"groups must be an int >= 1, got {groups!r}")
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {', '.join(map(repr, NORMALIZE))}, got {normalize!r}")
    if pad_mode not in PAD_MODES:
        raise ValueError(f"pad_mode must be one of {', '.join(map(repr, PAD_MODES))}, got {pad_mode!r}")
    return kernel_size, tuple(strides), groups, normalize, pad_mode  # type: ignore[return-value]


def adaptive_blur_pool2d(
    x: torch.Tensor,
    logits: torch.Tensor,
    kernel_size: int = 3,
    stride: Stride = 2,
    groups: int = 8,
    *,
    normalize: Normalize = "group",
    pad_mode: PadMode = "reflect",
) -> torch.Tensor:
    """Blur every output pixel and group of channels by a filter of its own, and keep every stride-th pixel, in one pass.

    1. w is the softmax of the k^2 logits of a group at an output pixel (``normalize="group"``: filters are positive and sum to
       one, so constants stay), of the logits of all groups there together ("joint": as released with the paper, a group's
       mean gain is 1/G), or the logits themselves ("none"); in float32 (float64 for float64);
    2. x~ is x extended by ``pad_mode``;
    3. ``y[n,c,i,j] = sum_p sum_q w[n, c // (C/G), p k + q, i, j] x~[n,c, s_h i + p - k//2, s_w j + q - k//2]``.

    Args:
        x: (N, C, H, W); float32, bfloat16, float16 or float64; any strides; N may be 0.
        logits: (N, G k^2, H', W') at the kept positions, or (N, G k^2, H, W), of which the kept ones are read where they are and
            the others have a gradient of zero; tap p k + q of group g is channel g k^2 + p k + q. Its dtype is that of x.
        kernel_size: k, odd.
        stride: int >= 1 or (s_h, s_w).
        groups: G, which divides C; a group is C/G channels that follow each other.
        normalize, pad_mode: as above; pad_mode is "reflect", "replicate", "zeros" or "circular".

    Returns:
        (N, C, H', W') with ``H' = ceil(H / s_h)``, in the dtype and memory format of x.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Gradients of any order exist for x and logits; the backward keeps these two and nothing else. Second derivatives,
    forward-mode derivatives and torch.func's transforms run tap by tap, of torch's own operations.

    Source: Zou, Xiao, Yu & Lee, Delving Deeper into Anti-aliasing in ConvNets, 2020.
    """
    return apply(x, logits, *check(kernel_size, stride, groups, normalize, pad_mode))
