"""A batch norm and what follows it, down to the blur: the rooms of moments, of batch norms and of the fused step put together.

    u = (x - mean_c) / sqrt(var_c + eps) weight_c + bias_c
    y = D max(act(u))                                                       as in max_blur_pool

with the running statistics for mean and var, or those of the batch, var = moments[2] / n, which the running ones follow:

1. forward: one pass over x for the moments, their table and the running statistics (batch_norm), one pass for all else;
2. backward: one pass for the sums, from which batch_norm makes the gradients of weight and bias and a correction, one for dx.

Statistics are float64 until they meet pixels. Processes that share a batch gather its moments and add up their sums.

Source: Ioffe & Szegedy, Batch Normalization, 2015.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed

from ..kernels import reference
from . import batch_norm, max_blur_pool
from ._library import fused, transformed, wants_autograd
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
    group, affine = norm.group, (norm.weight, norm.bias)
    steps = max_blur_pool.takes_steps(window) or transformed()
    if not norm.training and norm.running_mean is not None:
        steps = steps or torch.compiler.is_compiling() or wants_autograd(*(t for t in affine if t is not None))
        make = reference.batch_norm_table if steps else batch_norm.table
        table = make(norm.running_mean, norm.running_var, None, *affine, norm.eps, _wide(x))
        return max_blur_pool.run(x, table, before, window)
    if x.shape[0] * x.shape[2] * x.shape[3] == 1 and group is None:
        raise ValueError(f"x must have more than one value per channel in training, got shape {tuple(x.shape)}")
    table = None
    with torch.no_grad():
        if steps:
            moments = _moments_in_steps(x.detach())
        else:
            moments = channel_moments(x)
            if group is not None:
                moments = _gathered(moments, group)
            count, mean, m2 = moments.unbind()
            table = batch_norm.table(mean, m2, count, *affine, norm.eps, _wide(x))
        if norm.training and norm.running_mean is not None and (x.numel() or group is not None):
            _follow(norm, moments, steps)
    run = _in_steps if steps else _fused
    return run(x, *affine, moments, table, norm.eps, group, *before, *window)


def _wide(x: torch.Tensor) -> bool:
    return x.dtype is torch.float64


def _follow(norm: Norm, moments: torch.Tensor, steps: bool) -> None:
    """Running statistics move towards the batch's; its variance is the unbiased one."""
    running = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    if norm.momentum is None and norm.num_batches_tracked is None:
        return
    if steps or torch.compiler.is_compiling():  # graphs have torch's own operations for what is changed in place
        reference.batch_norm_follow(*running, moments, norm.momentum)
    else:
        batch_norm.follow(*running, moments, norm.momentum)


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


def _fwd(x: Any, weight: Any, bias: Any, moments: Any, table: Any, eps: float, group: Any, *rest: Any) -> torch.Tensor:
    return max_blur_pool.fwd(x, table, *rest)


def _in_steps(
    x: Any, weight: Any, bias: Any, moments: Any, table: Any, eps: float, group: Any, *rest: Any
) -> torch.Tensor:
    if group is not None:
        raise NotImplementedError(
            "a batch norm with a process_group has neither forward-mode nor second derivatives, and works neither under "
            "torch.func's transforms nor with learned taps"
        )
    count, mean, m2 = _moments_in_steps(x)
    return max_blur_pool.in_steps(x, reference.batch_norm_table(mean, m2, count, weight, bias, eps, _wide(x)), *rest)


def _vjp(wanted: Any, dy: Any, saved: Any, rest: Any) -> tuple[torch.Tensor | None, ...]:
    (x, weight, bias, moments, table), (eps, group, *rest) = saved, rest
    sums = max_blur_pool.sums(dy, x, table, *rest)
    correction, dweight, dbias = batch_norm.gradient(sums, moments, table, eps)
    dx = None
    if wanted[0]:
        if group is not None:  # those of the parameters stay this process' own
            sums = sums.double()
            torch.distributed.all_reduce(sums, group=group)
            correction = batch_norm.gradient(sums, moments, table, eps)[0]
        dx = max_blur_pool.bwd(dy, x, table, correction, *rest)
    grads = (dweight.to(weight.dtype) if wanted[1] else None, dbias.to(bias.dtype) if wanted[2] else None)
    return dx, *grads, None, None


_fused = fused(_fwd, 5, _vjp, _in_steps)
