"""A batch norm and what follows it, down to the blur: the rooms of the moments and of the fused step put together.

    u = (x - mean_c) invstd_c weight_c + bias_c,   invstd_c = 1 / sqrt(var_c + eps)
    y = D max(act(u))                                                       as in max_blur_pool

with the running statistics for mean and var, or those of the batch, var = moments[2] / n. In the second case x moves them, and

    dx = invstd weight (du - S0 / n - (x - mean) invstd^2 S1 / n),   S0 = sum du,   S1 = sum du (x - mean)
    dweight = S1 invstd,   dbias = S0

which are the sums and the correction that max_blur_pool offers: forward is one pass for the moments and one for all else,
backward one for the sums and one for dx. Statistics are float64 until they meet pixels. There the mean is split into what the
accumulation dtype holds, which is subtracted from x, and the rest, which joins the bias.

Source: Ioffe & Szegedy, Batch Normalization, 2015.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed

from . import max_blur_pool
from ._library import fused, transformed
from ._prologue import Prologue
from ._window import Window, check_input
from .channel_moments import channel_moments, merged

__all__ = ["Norm", "apply"]


class Norm(NamedTuple):
    """What there is to know of a batch norm when it is applied; tensors are (C,), or None where it has none."""

    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    num_batches_tracked: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    training: bool  # whether it normalises by the batch's statistics, and lets the running ones follow
    momentum: float | None  # of the running statistics; None for their plain average
    eps: float
    group: Any = None  # the processes that share the batch's statistics


def apply(x: torch.Tensor, before: Prologue, window: Window, norm: Norm) -> torch.Tensor:
    """Run a batch norm and a checked prologue and window over (N,C,H,W): what modules call."""
    x = check_input(x, window, grown=before.grown)
    if x.dim() != 4:
        raise ValueError(f"x of a batch norm must be (N, C, H, W), got shape {tuple(x.shape)}")
    for name in ("running_mean", "weight"):
        row = getattr(norm, name)
        if row is not None and row.shape != (x.shape[1],):
            raise ValueError(
                f"x must have the batch norm's {row.shape[0]} channels in dimension 1, got {tuple(x.shape)}"
            )
    if not norm.training and norm.running_mean is not None:
        invstd = (norm.running_var.double() + norm.eps).rsqrt()  # type: ignore[union-attr]
        table = _table(norm.running_mean.double(), invstd, norm.weight, norm.bias, _accumulator(x))
        return max_blur_pool.run(x, table, before, window)
    if x.shape[0] * x.shape[2] * x.shape[3] == 1 and norm.group is None:
        raise ValueError(f"x must have more than one value per channel in training, got shape {tuple(x.shape)}")
    arguments = (norm.eps, norm.group, *before, *window)
    if max_blur_pool.takes_steps(window) or transformed():
        moments = _moments_in_steps(x)
        y = _in_steps(x, norm.weight, norm.bias, None, *arguments)
    else:
        moments = channel_moments(x.detach())
        if norm.group is not None:
            moments = _gathered(moments, norm.group)
        y = _fused(x, norm.weight, norm.bias, moments, *arguments)
    if norm.training and norm.running_mean is not None and (x.numel() or norm.group is not None):
        _follow(norm, moments.detach())
    return y


def _accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _table(mean: Any, invstd: Any, weight: Any, bias: Any, dtype: torch.dtype) -> torch.Tensor:
    """(center, scale, shift) of a normalisation, out of statistics in float64."""
    scale = invstd if weight is None else invstd * weight
    center = mean.to(dtype)
    shift = (center - mean) * scale
    if bias is not None:
        shift = shift + bias
    return torch.stack([center, scale.to(dtype), shift.to(dtype)])


def _invstd(moments: torch.Tensor, eps: float) -> torch.Tensor:
    return (moments[2] / moments[0] + eps).rsqrt()


@torch.no_grad()
def _follow(norm: Norm, moments: torch.Tensor) -> None:
    """Running statistics move towards the batch's; its variance is the unbiased one."""
    factor: Any = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if factor is None:
            factor = norm.num_batches_tracked.double().reciprocal()
    count, mean, m2 = moments
    for running, value in ((norm.running_mean, mean), (norm.running_var, m2 / (count - 1))):
        if running is not None and factor is not None:
            running.copy_(running.double() * (1 - factor) + value * factor)


@torch.compiler.disable
def _gathered(moments: torch.Tensor, group: Any) -> torch.Tensor:
    """The moments of the batch of all processes in the group."""
    parts = [torch.empty_like(moments) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, moments, group=group)
    return merged(torch.stack(parts))


def _moments_in_steps(x: torch.Tensor) -> torch.Tensor:
    """As channel_moments, of torch's own differentiable operations."""
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    count = torch.full_like(mean, x.shape[0] * x.shape[2] * x.shape[3])
    return torch.stack([count, mean, var * count])


def _table_of(x: Any, weight: Any, bias: Any, moments: torch.Tensor, eps: float) -> torch.Tensor:
    return _table(moments[1], _invstd(moments, eps), weight, bias, _accumulator(x))


def _fwd(x: Any, weight: Any, bias: Any, moments: Any, eps: float, group: Any, *rest: Any) -> torch.Tensor:
    return max_blur_pool.fwd(x, _table_of(x, weight, bias, moments, eps), *rest)


def _in_steps(x: Any, weight: Any, bias: Any, moments: Any, eps: float, group: Any, *rest: Any) -> torch.Tensor:
    if group is not None:
        raise NotImplementedError(
            "a batch norm with a process_group has neither forward-mode nor second derivatives, and works neither under "
            "torch.func's transforms nor with learned taps"
        )
    return max_blur_pool.in_steps(x, _table_of(x, weight, bias, _moments_in_steps(x), eps), *rest)


def _vjp(wanted: Any, dy: Any, saved: Any, rest: Any) -> tuple[torch.Tensor | None, ...]:
    (x, weight, bias, moments), (eps, group, *rest) = saved, rest
    (count, mean, _), invstd, table = moments, _invstd(moments, eps), _table_of(x, weight, bias, moments, eps)
    (center, scale, _), sums = table.double(), max_blur_pool.sums(dy, x, table, *rest).double()
    # Of distances from the mean, not from what is subtracted in its place.
    sums = torch.stack([sums[0], sums[1] + (center - mean) * sums[0]])
    dweight = (sums[1] * invstd).to(weight.dtype) if wanted[1] else None
    dbias = sums[0].to(bias.dtype) if wanted[2] else None
    if not wanted[0]:
        return None, dweight, dbias, None
    if group is not None:
        sums = sums.clone()  # those of the parameters stay this process' own
        torch.distributed.all_reduce(sums, group=group)
    slope = -scale * invstd.square() * sums[1] / count
    correction = torch.stack([slope * (center - mean) - scale * sums[0] / count, slope]).to(table.dtype)
    return max_blur_pool.bwd(dy, x, table, correction, *rest), dweight, dbias, None


_fused = fused(_fwd, 4, _vjp, _in_steps)
