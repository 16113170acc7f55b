"""The ops in terms of aten: what a program exported with them can be lowered to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from ..kernels.reference import unfused_taps

__all__ = ["decompositions"]


def decompositions(border: Literal["pad", "gather"] = "pad") -> dict[torch._ops.OpOverload, Callable[..., torch.Tensor]]:
    """The table that lowers the blur ops of an exported program to padding and depthwise convolution.

    1. forward: ``conv(extend(x), outer(h, w))``, the taps rounded to the dtype of x as a convolution needs them;
    2. the adjoint and the taps' gradient: the vector-Jacobian product of 1.

    Args:
        border: "pad" extends by F.pad, whose reflection needs a map larger than the pad; "gather" by an index lookup, which
            serves maps of any size.

    Example:
        ``program = torch.export.export(model, args).run_decompositions(aliasfused.decompositions())``; for ONNX with small
        maps, ``torch.onnx.export(export(model, args).run_decompositions(aliasfused.decompositions("gather")), ...)``.

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

    def down(x: Any, taps_h: Any, taps_w: Any, *geometry: Any) -> Any:
        return unfused_taps(x, rows(x, taps_h), rows(x, taps_w), *geometry, border == "gather")

    def up(dy: Any, taps_h: Any, taps_w: Any, stride: Any, padding: Any, pad_mode: str, H: Any, W: Any, channels_last: bool) -> Any:
        x = dy.new_zeros((*dy.shape[:-2], H, W))
        dx = torch.func.vjp(lambda x: down(x, taps_h, taps_w, stride, padding, pad_mode), x)[1](dy)[0]
        return dx.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def taps_grad(dy: Any, x: Any, other: Any, axis: int, size: int, *geometry: Any) -> Any:
        def blur(taps: torch.Tensor) -> torch.Tensor:
            return down(x, *((taps, other) if axis == 0 else (other, taps)), *geometry)

        return torch.func.vjp(blur, other.new_zeros((x.shape[1], size)))[1](dy)[0]

    ops = torch.ops.aliasfused
    return {
        ops.blur_pool_fwd.default: down,
        ops.blur_pool_bwd.default: up,
        ops.blur_pool_taps_fwd.default: down,
        ops.blur_pool_taps_bwd.default: up,
        ops.blur_pool_taps_grad.default: taps_grad,
    }
