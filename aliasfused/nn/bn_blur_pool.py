"""Batch norm, activation, maximum and blur as one module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, List, Optional  # noqa: UP035  (TorchScript reads these annotations)

import torch
import torch.distributed
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..kernels import reference
from ..ops import bn_blur_pool
from ..ops._prologue import Act, Prologue, prologue
from ..ops._window import Padding, PadMode, Stride, Window
from ..ops.bn_blur_pool import Norm
from . import _blur
from .max_blur_pool import Taps, _Step2d


@torch.fx.wrap
def norm_step2d(x: torch.Tensor, norm: Norm, before: Prologue, window: Window) -> torch.Tensor:
    """One node of a torch.fx trace: the checks and the op."""
    return bn_blur_pool.apply(x, before, window, norm)


def norm_of(module: Any, training: bool, group: Any = None) -> Norm:
    """What a module with BatchNorm2d's attributes does at this moment."""
    # As in torch: statistics that are not tracked serve evaluation alone.
    kept = not training or module.track_running_stats
    mean, var = (module.running_mean, module.running_var) if kept else (None, None)
    count = module.num_batches_tracked if training and kept else None
    return Norm(mean, var, count, module.weight, module.bias, training, module.momentum, module.eps, group)


def scripted(
    x: torch.Tensor,
    running_mean: Optional[torch.Tensor],  # noqa: UP045
    running_var: Optional[torch.Tensor],  # noqa: UP045
    weight: Optional[torch.Tensor],  # noqa: UP045
    bias: Optional[torch.Tensor],  # noqa: UP045
    training: bool,
    eps: float,
    act: str,
    act_args: List[float],  # noqa: UP006
    kernel: List[int],  # noqa: UP006
    max_padding: List[int],  # noqa: UP006
    taps_h: List[float],  # noqa: UP006
    taps_w: List[float],  # noqa: UP006
    stride: List[int],  # noqa: UP006
    padding: List[int],  # noqa: UP006
    pad_mode: str,
) -> torch.Tensor:
    """The step in TorchScript, one operation after the other; for inference."""
    if training or running_mean is None or running_var is None:
        raise RuntimeError("aliasfused: a scripted batch norm is for inference with running statistics; call eval()")
    scale = (running_var.double() + eps).rsqrt()
    shift = torch.zeros_like(scale)
    if weight is not None:
        scale = scale * weight
    if bias is not None:
        shift = shift + bias
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    table = torch.stack([running_mean.to(wide), scale.to(wide), shift.to(wide)])
    z = reference.prepared(x, table, act, act_args, kernel, max_padding)
    return _blur.scripted(None, None, False, z, taps_h, taps_w, stride, padding, pad_mode)


class _Statistics(nn.BatchNorm2d):
    """A batch norm without parameters and buffers, for tools that look for one inside a model.

    Whatever freezes batch norms by eval(), or resets their statistics as SWA does, reaches the module through it;
    ``convert_sync_batchnorm`` puts a SyncBatchNorm in its place, which the module then goes by.
    """

    __jit_unused_properties__ = ["momentum"]  # noqa: RUF012

    if TYPE_CHECKING:  # as a real annotation TorchScript would refuse it
        owner: BNActBlurPool2d

    def __init__(self, owner: BNActBlurPool2d) -> None:
        self.__dict__["owner"] = owner  # not a child
        super().__init__(owner.num_features, owner.eps, owner.momentum, affine=False, track_running_stats=False)

    @property
    def momentum(self) -> float | None:
        return self.owner.momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self.owner.momentum = value

    def reset_running_stats(self) -> None:
        self.owner.reset_running_stats()

    def extra_repr(self) -> str:
        return "its own"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class BNActBlurPool2d(_NormBase, _Step2d):
    """``BatchNorm2d``, activation, dense maximum, blur and subsampling in one pass (two, in training).

    1. ``u = (x - mean_c) / sqrt(var_c + eps) weight_c + bias_c``, as ``BatchNorm2d`` has it: by the batch's statistics in
       training, which the running ones follow, and by the running ones otherwise. Statistics are float64, the rest float32
       (float64 for float64);
    2. ``v = act(u)``;
    3. with ``max_kernel_size``, z is the maximum of v over a window at every position, -inf beyond the border;
    4. ``y = blur_pool2d(z, taps, stride, padding=padding, pad_mode=pad_mode)``.

    Parameters, buffers, state_dict keys and the meaning of train and eval are ``BatchNorm2d``'s; it is no instance of it, as
    whatever replaces batch norms by something else would lose activation and blur. Its child ``statistics``, which has
    neither parameters nor buffers, is one: ``eval()`` on it freezes the running statistics.
    ``SyncBatchNorm.convert_sync_batchnorm`` makes this module share its statistics as a SyncBatchNorm would.

    Args:
        num_features: channels.
        act: as for :func:`aliasfused.act_blur_pool2d`.
        filt_size, stride, pad_mode, taps, padding: of the blur, as for :class:`aliasfused.nn.BlurPool2d`.
        max_kernel_size, max_padding: of the maximum, None for no maximum, as for :class:`aliasfused.nn.MaxBlurPool2d`.
        eps, momentum, affine, track_running_stats, device, dtype: as for ``torch.nn.BatchNorm2d``.
        process_group: the processes (``torch.distributed.group.WORLD`` for all) that share a batch's statistics in training:
            their counts, means and squared distances are gathered, and backward adds up two sums per channel. None: none.

    Shape:
        (N, C, H, W) to the same with ``H' = floor((H + top + bottom - k_h) / s_h) + 1``, H being the maximum's height.

    For backward it keeps x and a few numbers per channel.

    Sources: Ioffe & Szegedy, Batch Normalization, 2015; Zhang, Making Convolutional Networks Shift-Invariant Again, 2019.
    """

    def __init__(
        self,
        num_features: int,
        act: Act = "relu",
        filt_size: int = 4,
        stride: Stride = 2,
        pad_mode: PadMode = "reflect",
        *,
        max_kernel_size: int | tuple[int, int] | None = None,
        max_padding: int | tuple[int, int] = 0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        taps: Taps | None = None,
        padding: Padding = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _blur.check_int("num_features", num_features)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        before = prologue(act, 1 if max_kernel_size is None else max_kernel_size, max_padding)
        self._set_up(before, False, filt_size, taps, stride, padding, pad_mode)
        self.process_group = process_group
        self.statistics = _Statistics(self)

    @classmethod
    def from_batchnorm2d(
        cls,
        bn: nn.BatchNorm2d,
        act: Act = "relu",
        filt_size: int = 4,
        stride: Stride = 2,
        pad_mode: PadMode = "reflect",
        **options: Any,
    ) -> BNActBlurPool2d:
        """A batch norm with what follows it: its Parameters and buffers themselves, not copies.

        Args:
            bn: a ``BatchNorm2d``, or a ``SyncBatchNorm``, whose process group is taken over.
            act, filt_size, stride, pad_mode: of what follows.
            options: ``max_kernel_size``, ``max_padding``, ``taps``, ``padding``.
        """
        if not isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            raise TypeError(f"bn must be a torch.nn.BatchNorm2d or SyncBatchNorm, got {type(bn).__name__}")
        module = cls(
            bn.num_features, act, filt_size, stride, pad_mode, eps=bn.eps, momentum=bn.momentum, affine=False,
            track_running_stats=False, **options,
        )  # fmt: skip
        module.affine, module.track_running_stats = bn.affine, bn.track_running_stats
        module._parameters.update(bn._parameters)
        module._buffers.update(bn._buffers)
        if isinstance(bn, nn.SyncBatchNorm):
            module.process_group = bn.process_group or torch.distributed.group.WORLD
        return module.train(bn.training)

    def _shares_with(self) -> Any:
        """The process group, if there is more than one process to share with."""
        group = self.process_group
        if isinstance(self.statistics, nn.SyncBatchNorm):
            group = self.statistics.process_group or torch.distributed.group.WORLD
        elif not isinstance(self.statistics, _Statistics):
            raise TypeError(
                f"the statistics of a BNActBlurPool2d were replaced by a {type(self.statistics).__name__}, by which it cannot go"
            )
        if group is None or not torch.distributed.is_initialized() or torch.distributed.get_world_size(group) == 1:
            return None
        return group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        training = self.training and self.statistics.training
        if torch.jit.is_scripting():
            mean, var, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
            return scripted(x, mean, var, weight, bias, training, self.eps, *self._before, *self._window)  # type: ignore[arg-type]
        group = self._shares_with() if training else None
        return norm_step2d(x, norm_of(self, training, group), self._before, self._window)

    def extra_repr(self) -> str:
        return f"{_NormBase.extra_repr(self)}, {_Step2d.extra_repr(self)}"
