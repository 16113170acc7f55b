"""The ops in terms of aten: what a program exported with them can be lowered to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..kernels.reference import border_index, extend

__all__ = ["decompositions"]


def _convolution_backward(dy: Any, x: Any, kernel: Any, stride: Any, wanted: list[bool]) -> Any:
    geometry = (stride, [0, 0], [1, 1], False, [0, 0], x.shape[1])
    return torch.ops.aten.convolution_backward.default(dy, x, kernel, None, *geometry, wanted)


def decompositions(
    border: Literal["pad", "gather"] = "pad",
) -> dict[torch._ops.OpOverload, Callable[..., torch.Tensor]]:
    """The table that lowers the blur ops of an exported program to padding and depthwise convolution.

    1. forward: ``conv(extend(x), outer(h, w))``, the taps rounded to the dtype of x as a convolution needs them;
    2. adjoint: the convolution's own, then every pixel collects the positions of the extension that show it;
    3. taps' gradient: the convolution's with respect to its kernel, contracted with the other axis' taps.

    Args:
        border: "pad" extends by F.pad, whose reflection needs a map larger than the pad; "gather" by an index lookup,
            which serves maps of any size.

    Example:
        ``torch.export.export(model, args).run_decompositions(aliasfused.decompositions())``; to ONNX, for maps that may
        be smaller than the pad, ``torch.onnx.export`` of a program lowered with ``decompositions("gather")``.

    Raises:
        ValueError: another border.
    """
    if border not in ("pad", "gather"):
        raise ValueError(f"border must be 'pad' or 'gather', got {border!r}")

    def rows(x: torch.Tensor, taps: torch.Tensor | list[float]) -> torch.Tensor:
        if isinstance(taps, torch.Tensor):
            return taps
        dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
        # A tensor made from a list would be a constant with a mutation, which a functional graph refuses.
        return torch.stack([torch.scalar_tensor(t, dtype=dtype, device=x.device) for t in taps]).expand(x.shape[1], -1)

    def kernel(x: torch.Tensor, taps_h: Any, taps_w: Any) -> torch.Tensor:
        return (rows(x, taps_h)[:, None, :, None] * rows(x, taps_w)[:, None, None, :]).to(x.dtype)

    def down(x: Any, taps_h: Any, taps_w: Any, stride: Any, padding: Any, pad_mode: str) -> Any:
        extended = extend(x, padding, pad_mode, border == "gather")
        return F.conv2d(extended, kernel(x, taps_h, taps_w), stride=stride, groups=x.shape[1])

    def up(
        dy: Any, taps_h: Any, taps_w: Any, stride: Any, padding: Any, pad_mode: str, H: Any, W: Any, channels_last: bool
    ) -> Any:
        left, right, top, bottom = padding
        extended = dy.new_empty((*dy.shape[:2], H + top + bottom, W + left + right))
        dx = _convolution_backward(dy, extended, kernel(dy, taps_h, taps_w), stride, [True, False, False])[0]
        for dim, n, before, after in ((2, H, top, bottom), (3, W, left, right)):
            if pad_mode == "zeros":
                dx = dx.narrow(dim, before, n)
            else:
                index = border_index(dx, n, before, after, pad_mode)
                dx = dx.new_zeros((*dx.shape[:dim], n, *dx.shape[dim + 1 :])).index_add(dim, index, dx)
        return dx.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def taps_grad(dy: Any, x: Any, other: Any, axis: int, size: int, stride: Any, padding: Any, pad_mode: str) -> Any:
        sizes = (size, other.shape[1]) if axis == 0 else (other.shape[1], size)
        extended = extend(x, padding, pad_mode, border == "gather")
        weight = dy.new_empty((x.shape[1], 1, *sizes))
        grad = _convolution_backward(dy, extended, weight, stride, [False, True, False])[1].squeeze(1).to(other.dtype)
        return (grad * (other[:, None, :] if axis == 0 else other[:, :, None])).sum(2 - axis)

    ops = torch.ops.aliasfused
    return {
        ops.blur_pool_fwd.default: down,
        ops.blur_pool_bwd.default: up,
        ops.blur_pool_taps_fwd.default: down,
        ops.blur_pool_taps_bwd.default: up,
        ops.blur_pool_taps_grad.default: taps_grad,
    }
