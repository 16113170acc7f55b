"""The ops in terms of aten: what a program exported with them can be lowered to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..kernels import reference
from ..kernels.reference import (
    adaptive_in_steps,
    border_index,
    extend,
    filters_of,
    kept,
    logits_steps,
    prepared,
    shown_to_taps,
)

__all__ = ["decompositions"]


def _convolution_backward(dy: Any, x: Any, kernel: Any, stride: Any, wanted: list[bool]) -> Any:
    geometry = (stride, [0, 0], [1, 1], False, [0, 0], x.shape[1])
    return torch.ops.aten.convolution_backward.default(dy, x, kernel, None, *geometry, wanted)


def _activation_backward(dv: Any, u: Any, act: str, args: Any) -> Any:
    aten = torch.ops.aten
    if act == "relu":
        return aten.threshold_backward.default(dv, u, 0)
    if act == "relu6":
        return aten.hardtanh_backward.default(dv, u, 0, 6)
    if act == "silu":
        return aten.silu_backward.default(dv, u)
    if act in ("gelu", "gelu_tanh"):
        return aten.gelu_backward.default(dv, u, approximate="tanh" if act == "gelu_tanh" else "none")
    if act == "hardswish":
        return aten.hardswish_backward.default(dv, u)
    if act == "leaky_relu":
        return aten.leaky_relu_backward.default(dv, u, args[0], False)
    if act == "softplus":
        return aten.softplus_backward.default(dv, u, *args)
    return dv


def decompositions(
    border: Literal["pad", "gather"] = "pad",
) -> dict[torch._ops.OpOverload, Callable[..., torch.Tensor]]:
    """The table that lowers the blur ops of an exported program to padding and depthwise convolution.

    1. forward: ``conv(extend(x), outer(h, w))``, the taps rounded to the dtype of x as a convolution needs them;
    2. adjoint: the convolution's own, then every pixel collects the positions of the extension that show it;
    3. taps' gradient: the convolution's with respect to its kernel, contracted with the other axis' taps;
    4. what comes before a blur (affine, activation, maximum) and its gradients: aten's own, in at least float32;
    5. a channel's moments: aten's variance and mean, in float64, as is what a batch norm makes of them;
    6. a blur by predicted filters: a softmax, and a product for every tap.

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
        return folded(dx, padding, pad_mode, H, W, channels_last)

    def folded(dx: Any, padding: Any, pad_mode: str, H: Any, W: Any, channels_last: bool) -> Any:
        """Every pixel's share of an extension's gradient."""
        left, right, top, bottom = padding
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

    def step(x: Any, affine: Any, act: str, act_args: Any, kernel: Any, max_padding: Any, *window: Any) -> Any:
        return down(prepared(x, affine, act, act_args, kernel, max_padding), *window)

    def argument_grad(
        dy: Any, x: Any, affine: Any, act: str, act_args: Any, kernel: Any, max_padding: Any, *window: Any
    ) -> Any:
        """du and x - center, in at least float32."""
        wide = x.dtype if x.dtype is torch.float64 else torch.float32
        left, right, top, bottom = max_padding
        u = centred = x.to(wide)
        if affine is not None:
            center, scale, shift = affine[:, None, :, None, None].unbind()
            centred = u - center
            u = centred * scale + shift
        H, W = x.shape[2] + top + bottom + 1 - kernel[0], x.shape[3] + left + right + 1 - kernel[1]
        taps_h, taps_w, stride, padding, pad_mode = window
        dv = up(dy, taps_h, taps_w, stride, padding, pad_mode, H, W, False).to(wide)
        if tuple(kernel) != (1, 1):
            aten = torch.ops.aten
            v = F.pad(prepared(x, affine, act, act_args, [1, 1], max_padding).to(wide), max_padding, value=-torch.inf)
            windows = (kernel, [1, 1], [0, 0], [1, 1], False)
            where = aten.max_pool2d_with_indices.default(v, *windows)[1]
            dv = aten.max_pool2d_with_indices_backward.default(dv, v, *windows, where)
            dv = dv[:, :, top : top + x.shape[2], left : left + x.shape[3]]
        return _activation_backward(dv, u, act, act_args), centred

    def step_backward(dy: Any, x: Any, affine: Any, correction: Any, *rest: Any) -> Any:
        dx, centred = argument_grad(dy, x, affine, *rest)
        if affine is not None:
            dx = dx * affine[1, :, None, None]
        if correction is not None:
            shift, slope = correction[:, :, None, None].unbind()
            dx = dx + shift + slope * centred
        return dx.to(x.dtype).contiguous(memory_format=torch._prims_common.suggest_memory_format(x))

    def step_sums(dy: Any, x: Any, affine: Any, *rest: Any) -> Any:
        du, centred = argument_grad(dy, x, affine, *rest)
        return torch.stack([du.sum((0, 2, 3)), (du * centred).sum((0, 2, 3))])

    def moments(x: Any) -> Any:
        var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        count = torch.full_like(mean, x.shape[0] * x.shape[2] * x.shape[3])
        return torch.stack([count, mean, var * count])

    def adaptive(x: Any, logits: Any, k: int, stride: Any, groups: int, normalize: str, pad_mode: str) -> Any:
        return adaptive_in_steps(x, logits, k, stride, groups, normalize, pad_mode, border == "gather")

    def adaptive_up(
        dy: Any,
        logits: Any,
        k: int,
        stride: Any,
        groups: int,
        normalize: str,
        pad_mode: str,
        H: Any,
        W: Any,
        channels_last: bool,
    ) -> Any:
        w, radius = filters_of(kept(logits, (H, W), stride), k, groups, normalize), k // 2
        cotangent = dy.to(w.dtype).unflatten(1, (groups, dy.shape[1] // groups))
        # Apart by the stride, and each tap's share moved to where the tap reads.
        size = [s * (n - 1) + 1 for s, n in zip(stride, dy.shape[2:], strict=True)]
        total: Any = 0
        for tap in range(k * k):
            part = (w[:, :, None, tap] * cotangent).flatten(1, 2)
            spread = part.new_zeros((*part.shape[:2], *size))
            spread = spread_out(spread, part, stride)
            p, q = divmod(tap, k)
            height, width = H + 2 * radius, W + 2 * radius
            total = total + F.pad(spread, [q, width - size[1] - q, p, height - size[0] - p])
        return folded(total.to(dy.dtype), [radius] * 4, pad_mode, H, W, channels_last)

    def spread_out(spread: Any, part: Any, stride: Any) -> Any:
        """``spread[..., ::s_h, ::s_w] = part``, as a function."""
        rows = torch.slice_scatter(spread[:, :, :: stride[0]], part, 3, step=stride[1])
        return torch.slice_scatter(spread, rows, 2, step=stride[0])

    def adaptive_grad(
        dy: Any, x: Any, logits: Any, k: int, stride: Any, groups: int, normalize: str, pad_mode: str
    ) -> Any:
        w = filters_of(kept(logits, x.shape[2:], stride), k, groups, normalize)
        cotangent = dy.to(w.dtype).unflatten(1, (groups, dy.shape[1] // groups))
        shown = shown_to_taps(x, dy.shape[2:], k, stride, groups, pad_mode, border == "gather")
        dw = torch.stack([(cotangent * pixels).sum(2) for pixels in shown], 2)
        if normalize != "none":
            dw = w * (dw - (w * dw).sum([2] if normalize == "group" else [1, 2], keepdim=True))
        dw, steps = dw.flatten(1, 2).to(x.dtype), logits_steps(logits, x.shape[2:], stride)
        if max(steps) > 1:
            dw = spread_out(dw.new_zeros(logits.shape), dw, steps)
        return dw.contiguous(memory_format=torch._prims_common.suggest_memory_format(logits))

    ops = torch.ops.aliasfused
    return {
        ops.adaptive_blur_pool_fwd.default: adaptive,
        ops.adaptive_blur_pool_bwd.default: adaptive_up,
        ops.adaptive_blur_pool_logits_grad.default: adaptive_grad,
        ops.batch_norm_table.default: reference.batch_norm_table,
        ops.batch_norm_follow.default: reference.batch_norm_follow,
        ops.batch_norm_gradient.default: reference.batch_norm_gradient,
        ops.channel_moments.default: moments,
        ops.max_blur_pool_fwd.default: step,
        ops.max_blur_pool_bwd.default: step_backward,
        ops.max_blur_pool_sums.default: step_sums,
        ops.blur_pool_fwd.default: down,
        ops.blur_pool_bwd.default: up,
        ops.blur_pool_taps_fwd.default: down,
        ops.blur_pool_taps_bwd.default: up,
        ops.blur_pool_taps_grad.default: taps_grad,
    }
