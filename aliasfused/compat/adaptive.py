"""The layers released with "Delving Deeper into Anti-aliasing in ConvNets", fused: change the import, keep the checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from ..nn._blur import check_int
from ..nn.adaptive_blur_pool import Adaptive2d, FrozenBatchNorm2d, Geometry
from ..ops.adaptive_blur_pool import Normalize, check
from .antialiased_cnns import _PAD_MODES, _PAD_TYPES

__all__ = ["Downsample_PASA", "Downsample_PASA_group_softmax", "FrozenBatchNorm2d"]


class _Released(Adaptive2d):
    """A predictor in the children ``conv`` and ``bn``; stride, pad and group are read from the attributes in every call."""

    _norm = "bn"
    _normalize: Normalize = "none"
    group = 1

    def _set_up(self, in_channels: int, kernel_size: int, stride: int, pad_type: str, frozen: bool, size: int) -> None:
        check_int("in_channels", in_channels)
        check_int("group", self.group)
        check_int("stride", stride)
        check(kernel_size, stride, self.group, self._normalize, "reflect")
        if in_channels % self.group:
            raise ValueError(f"group must divide the {in_channels} in_channels, got {self.group}")
        if not isinstance(pad_type, str) or pad_type not in _PAD_TYPES:
            raise ValueError(f"pad_type must be one of {', '.join(map(repr, _PAD_TYPES))}, got {pad_type!r}")
        self.kernel_size, self.stride = kernel_size, stride
        self.pad = getattr(nn, f"{_PAD_TYPES[pad_type]}Pad2d")(kernel_size // 2)
        outputs = self.group * kernel_size**2
        self.conv = nn.Conv2d(in_channels, outputs, size, bias=False)
        self.bn = FrozenBatchNorm2d(outputs) if frozen else nn.BatchNorm2d(outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def geometry(self) -> Geometry:
        kind = type(self.pad).__name__[:-2]
        if kind not in _PAD_MODES:
            raise ValueError(f"pad must be a module of {', '.join(_PAD_MODES)}, got {type(self.pad).__name__}")
        return check(self.kernel_size, self.stride, self.group, self._normalize, _PAD_MODES[kind])  # type: ignore[arg-type]


class Downsample_PASA_group_softmax(_Released):
    """Blur by filters predicted for every position and group, as the layer of this name in Adaptive-anti-Aliasing.

    1. ``z = bn(conv(pad(x)))``, at full resolution in training; in evaluation, or with ``frozen``, at the stride, which is equal;
    2. ``w = softmax(z)`` over all G k^2 channels: the filters of a position sum to one together, a group's mean gain is 1/G;
    3. ``y[n,c,i,j] = sum_p sum_q w[n, g k^2 + p k + q, s i, s j] pad(x)[n,c, s i + p, s j + q]`` with ``g = c // (C/G)``.

    Args:
        in_channels: C.
        kernel_size: k, odd.
        stride: s, int >= 1.
        pad_type: "refl" or "reflect", "repl" or "replicate", "zero".
        group: G, which divides C; 8 in all released models.
        frozen: the batch norm of the detection models: :class:`FrozenBatchNorm2d`, all of it buffers.

    The keys of the state_dict are theirs: ``conv.weight`` and, below ``bn.``, those of the batch norm. Maps smaller than the
    border, which the original refuses, are extended further.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Zou, Xiao, Yu & Lee, Delving Deeper into Anti-aliasing in ConvNets, 2020.
    """

    _normalize = "joint"

    def __init__(
        self,
        in_channels: int,
        kernel_size: int,
        stride: int = 1,
        pad_type: str = "reflect",
        group: int = 2,
        *,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.group = group
        self._set_up(in_channels, kernel_size, stride, pad_type, frozen, kernel_size)


class Downsample_PASA(_Released):
    """Blur by filters predicted for every position, as the layer of this name in Adaptive-anti-Aliasing.

    1. ``z = bn(conv(x~))``, conv being 3 x 3 whatever k is;
    2. ``w = clamp(z, min=1e-4)``, divided by its sum over the k^2 channels;
    3. ``y[n,c,i,j] = sum_p sum_q w[n, p k + q, s i, s j] pad(x)[n,c, s i + p, s j + q]``.

    Args:
        in_channels: C.
        kernel_size: k, odd; with another than 3 the original fails in its first call.
        stride, pad_type, frozen: as for :class:`Downsample_PASA_group_softmax`.

    The buffer ``filt_d``, (1, k^2, 1, 1), is in the state_dict, as there: distances from the centre, which nothing reads.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """

    def __init__(
        self, in_channels: int, kernel_size: int, stride: int = 1, pad_type: str = "reflect", *, frozen: bool = False
    ) -> None:
        super().__init__()
        self._set_up(in_channels, kernel_size, stride, pad_type, frozen, 3)
        away = torch.arange(kernel_size, dtype=torch.get_default_dtype()) - kernel_size // 2
        self.register_buffer("filt_d", torch.hypot(away[:, None], away).reshape(1, -1, 1, 1))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """The filters themselves: nothing is left for the op to normalise."""
        w = super().logits(x).clamp(min=1e-4)
        return w / w.sum(1, keepdim=True)
