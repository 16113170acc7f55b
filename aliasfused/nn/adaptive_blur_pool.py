"""Blurs whose filters are predicted from what they blur, as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from .. import filters
from ..kernels import reference
from ..ops._library import fused
from ..ops._window import PadMode, Stride, check_tensor
from ..ops.adaptive_blur_pool import Normalize, apply, check
from . import _blur

Geometry = tuple[int, tuple[int, int], int, Normalize, PadMode]


@torch.fx.wrap
def adaptive2d(x: torch.Tensor, logits: torch.Tensor, *geometry: Any) -> torch.Tensor:
    """One node of a torch.fx trace: the checks and the op."""
    return apply(x, logits, *geometry)


@torch.fx.wrap
def bordered(x: torch.Tensor, channels: int, radius: int, pad_mode: PadMode) -> torch.Tensor:
    """x with its border: by F.pad, and by a look-up where the map is smaller than that."""
    x = check_tensor("x", x)
    if x.dim() != 4 or x.shape[1] != channels or min(x.shape[2:]) < 1:
        raise ValueError(f"x must have shape (N, {channels}, H, W) with pixels in it, got {tuple(x.shape)}")
    alone = torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
    return reference.extend(x, [radius] * 4, pad_mode, not alone and radius >= min(x.shape[2:]))


def _in_steps(x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, ...], *border: Any) -> torch.Tensor:
    return F.conv2d(bordered(x, *border), weight, None, stride)


def _vjp(wanted: Any, dy: torch.Tensor, saved: Any, rest: Any) -> tuple[torch.Tensor | None, ...]:
    (x, weight), (stride, *border) = saved, rest
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        z = bordered(x, *border)
    # Under autocast the convolution was one of another dtype.
    operands = dy, z.detach().to(dy.dtype), weight.to(dy.dtype), None
    ones, zeros = (1, 1), (0, 0)
    dz, dweight, _ = torch.ops.aten.convolution_backward(
        *operands, stride, zeros, ones, False, zeros, 1, (*wanted, False)
    )
    dx = torch.autograd.grad(z, x, dz.to(z.dtype))[0] if wanted[0] else None
    return dx, dweight.to(weight.dtype) if wanted[1] else None


_fused = fused(_in_steps, 2, _vjp, _in_steps)


@torch.fx.wrap
def bordered_convolution(x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, ...], *border: Any) -> torch.Tensor:
    """The convolution of x with its border, of which backward makes a copy of its own: none is kept meanwhile.

    A compiler decides itself what to keep.
    """
    steps = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
    run = _in_steps if steps or not isinstance(x, torch.Tensor) else _fused
    return run(x, weight, stride, *border)


@torch.fx.wrap
def averaged(logits: torch.Tensor, x: torch.Tensor, stride: tuple[int, int]) -> torch.Tensor:
    """The mean over positions, shown at every kept one."""
    grid = [-(-n // s) for n, s in zip(x.shape[2:], stride, strict=True)]
    return logits.mean((2, 3), keepdim=True).expand(-1, -1, *grid)


@torch.fx.wrap
def seen(z: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """(N, C, k, k): the mean of what each weight of a convolution of z meets."""
    for dim in (2, 3):
        size = z.shape[dim] - kernel_size + 1
        z = torch.stack([z.narrow(dim, p, size).mean(dim) for p in range(kernel_size)], dim)
    return z


def _affine(
    mean: torch.Tensor, var: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A norm by running statistics as ``x scale + shift``, in at least float32."""
    wide = torch.float64 if var.dtype is torch.float64 else torch.float32
    scale = (var.to(wide) + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


@torch.fx.wrap
def folded(z: torch.Tensor, kernel: torch.Tensor, stride: tuple[int, int], *norm: Any) -> torch.Tensor:
    """The convolution of z, the norm behind it within its weight and bias."""
    scale, shift = _affine(*norm)
    return F.conv2d(z, (kernel * scale[:, None, None, None]).to(kernel.dtype), shift.to(kernel.dtype), stride)


class FrozenBatchNorm2d(nn.Module):
    """``BatchNorm2d`` that stays as it was loaded: weight, bias and running statistics are buffers.

    ``y = (x - running_mean) / sqrt(running_var + eps) weight + bias``, in training too. A ``num_batches_tracked`` of a batch
    norm's checkpoint is passed over.

    Args:
        num_features: channels.
        eps: 0, as in maskrcnn-benchmark.
    """

    if TYPE_CHECKING:  # as real annotations TorchScript would refuse them
        running_mean: torch.Tensor
        running_var: torch.Tensor
        weight: torch.Tensor
        bias: torch.Tensor

    def __init__(self, num_features: int, eps: float = 0.0) -> None:
        super().__init__()
        _blur.check_int("num_features", num_features)
        self.num_features, self.eps = num_features, eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))
        self.train()

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        return super().train(False)

    def _load_from_state_dict(self, state_dict, prefix, *rest):  # type: ignore[no-untyped-def]
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale, shift = _affine(self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        return (x * scale[:, None, None] + shift[:, None, None]).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _listened(child: nn.Module) -> bool:
    return "forward" in vars(child) or any(getattr(child, hooks) for hooks in _HOOKS)


def _is_plain(conv: nn.Module) -> bool:
    """Whether a predictor's convolution is the one that was made, and nobody would miss its being called."""
    if not isinstance(conv, nn.Conv2d) or type(conv).forward is not nn.Conv2d.forward or _listened(conv):
        return False
    how = (conv.bias, conv.padding, conv.dilation, conv.groups)
    return how == (None, (0, 0), (1, 1), 1)


class Adaptive2d(nn.Module):
    """A convolution and a norm that predict filters, and the blur by them. The norm is the child of the name ``_norm``."""

    _norm = "norm"
    predict = "dense"
    vary = "space"

    if TYPE_CHECKING:  # as a real annotation TorchScript would refuse it
        conv: nn.Conv2d

    def geometry(self) -> Geometry:
        """kernel_size, stride, groups, normalize and pad_mode, checked."""
        raise NotImplementedError

    def _folds(self, norm: Any) -> bool:
        """Whether the norm goes by running statistics at this moment, and nobody would miss the maps before it."""
        if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d):
            return False
        return not (norm.training or norm.running_mean is None or _listened(norm)) and _is_plain(self.conv)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """What :func:`aliasfused.adaptive_blur_pool2d` is given: (N, G k^2, H', W'), or (N, G k^2, H, W) where all are needed."""
        _, stride, _, _, pad_mode = self.geometry()
        conv, norm = self.conv, getattr(self, self._norm)
        image, dense = self.vary == "image", self.predict == "dense"
        border = (conv.in_channels, conv.kernel_size[0] // 2, pad_mode)
        if self._folds(norm):
            # What is linear may be averaged before it is done.
            z = bordered(x, *border)
            z, step = (seen(z, conv.kernel_size[0]), (1, 1)) if image and dense else (z, stride)
            logits = folded(z, conv.weight, step, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        elif _is_plain(conv):
            logits = norm(bordered_convolution(x, conv.weight, conv.stride, *border))
        else:
            logits = norm(conv(bordered(x, *border)))
        return averaged(logits, x, stride) if image else logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return adaptive2d(x, self.logits(x), *self.geometry())


class AdaptiveBlurPool2d(Adaptive2d):
    """Blur every position and group of channels by a filter that is predicted from the map, and keep every stride-th pixel.

    1. ``z = norm(conv(x~))``: logits, k^2 for each of G groups; conv is k x k without bias, x~ is x extended by ``pad_mode``;
    2. with ``vary="image"``, z is replaced by its mean over positions: one filter per image and group;
    3. ``y = adaptive_blur_pool2d(x, z, k, stride, G)``: a softmax makes filters of them, for the kept positions alone.

    In training a batch norm's statistics are over all positions, kept or not, as in the released layer. Where the norm is a
    ``BatchNorm2d`` that goes by running statistics (in evaluation, or frozen), it is folded into the convolution and this
    runs at the stride: equal, and s^2 cheaper. Other norms, and children with hooks, see the whole map always.

    Args:
        channels: C.
        kernel_size: k of filters and of the predictor, odd.
        stride: int >= 1 or (s_h, s_w).
        groups: G, which divides C. 1: filters vary over positions alone.
        normalize: "group": each filter sums to one; "joint": all filters of a position together do, as released with the
            paper; "none": the norm's outputs are the filters.
        pad_mode: "reflect", "replicate", "zeros" or "circular", of the predictor and of the blur.
        predict: "dense", or "strided": the predictor runs at the stride in training too, s^2 cheaper. That is another model:
            the norm's statistics are over the kept positions.
        vary: "space", or "image": the ablation whose filters vary over channels alone. The mean is over all positions
            (with ``predict="strided"``: the kept ones).
        norm_layer: called with G k^2, returns the norm.
        init: of the predictor. "kaiming": ``kaiming_normal_`` by fan_out, the norm as it comes. "box" or "binomial": the same,
            but the norm's weight is 0 and its bias what makes this filter everywhere, from which training then departs.

    Shape:
        (N, C, H, W) to (N, C, H', W') with ``H' = ceil(H / s_h)``.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    For backward the blur keeps x and the logits; no filter reaches memory, and the predictor's x with its border is made again
    rather than kept (in eager training). TorchScript takes it by ``torch.jit.trace`` only.

    Source: Zou, Xiao, Yu & Lee, Delving Deeper into Anti-aliasing in ConvNets, 2020.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        stride: Stride = 2,
        groups: int = 8,
        normalize: Normalize = "group",
        pad_mode: PadMode = "reflect",
        predict: Literal["dense", "strided"] = "dense",
        vary: Literal["space", "image"] = "space",
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        init: Literal["kaiming", "box", "binomial"] = "kaiming",
    ) -> None:
        super().__init__()
        _blur.check_int("channels", channels)
        geometry = check(kernel_size, stride, groups, normalize, pad_mode)
        if channels % groups:
            raise ValueError(f"groups must divide the {channels} channels, got {groups}")
        choices = {
            "predict": (predict, ("dense", "strided")),
            "vary": (vary, ("space", "image")),
            "init": (init, ("kaiming", "box", "binomial")),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        self.channels, self.predict, self.vary, self.init = channels, predict, vary, init
        self.kernel_size, self.stride, self.groups, self.normalize, self.pad_mode = geometry
        outputs = groups * kernel_size**2
        step = self.stride if predict == "strided" else 1
        self.conv = nn.Conv2d(channels, outputs, kernel_size, step, bias=False)
        norm = None if isinstance(norm_layer, nn.Module) or not callable(norm_layer) else norm_layer(outputs)
        if not isinstance(norm, nn.Module):
            raise TypeError(
                f"norm_layer must be called with {outputs} and return a torch.nn.Module, got {norm_layer!r}"
            )
        self.norm = norm
        if init != "kaiming" and any(getattr(self.norm, name, None) is None for name in ("weight", "bias")):
            raise ValueError(f"init must be 'kaiming' where norm_layer has no weight and bias, got {init!r}")
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make the predictor what ``init`` says."""
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        norm: Any = self.norm
        if hasattr(norm, "reset_parameters"):
            norm.reset_parameters()
        if self.init == "kaiming":
            return
        row = filters.binomial(self.kernel_size) if self.init == "binomial" else (1.0,) * self.kernel_size
        taps = torch.tensor(row, dtype=torch.float64, device="cpu")
        taps = torch.outer(taps, taps).flatten()
        norm.weight.zero_()
        norm.bias.copy_((taps / taps.sum() if self.normalize == "none" else taps.log()).repeat(self.groups))

    def geometry(self) -> Geometry:
        return check(self.kernel_size, self.stride, self.groups, self.normalize, self.pad_mode)

    def extra_repr(self) -> str:
        names = ("channels", "kernel_size", "stride", "groups", "normalize", "pad_mode", "predict", "vary")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
