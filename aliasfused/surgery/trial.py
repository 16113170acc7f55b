"""Old modules against new ones on random numbers, before anything in a model is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def random_tensors(keep: Iterable[torch.Tensor] = ()) -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes of a tensor one of its shape in float64 on the CPU: positive where it is a row, of both signs where it is more,
    zero where it counts, and its own values where it is one to ``keep``."""
    generator, kept = torch.Generator().manual_seed(0), set(map(id, keep))

    def make(t: torch.Tensor) -> torch.Tensor:
        if not t.is_floating_point():
            return torch.zeros_like(t, device="cpu")
        values = torch.rand(t.shape, generator=generator, dtype=torch.float64, device="cpu")
        values = values + 0.5 if t.dim() < 2 else (2 * values - 1) * (3 / values[0].numel()) ** 0.5
        if id(t) in kept:
            values = t.detach().to("cpu", torch.float64)
        return nn.Parameter(values) if isinstance(t, nn.Parameter) else values

    return make


def difference(old: nn.Module, new: nn.Module, channels: int, n: int, modes: Iterable[bool]) -> str:
    """What differs between two modules in float64, or nothing.

    Outputs, gradients of x and of the parameters, and buffers afterwards, on x of (n, n + 1) and of (n + 1, n) pixels, in
    the modes (training or not) given. They may differ by no more than float32 takes the old module's from float64.
    """
    generator = torch.Generator().manual_seed(0)
    for size in ((n, n + 1), (n + 1, n)):
        x = 3 * torch.randn(2, channels, *size, generator=generator, dtype=torch.float64, device="cpu")
        for training in modes:
            expected, found = _outcome(old, x, training), _outcome(new, x, training)
            rounded = _outcome(copy.deepcopy(old).float(), x.float(), training)
            for what, value in expected.items():
                if found[what].shape != value.shape:
                    return f"of {size} it makes {tuple(value.shape[2:])}, the fused form {tuple(found[what].shape[2:])}"
                error, bound = (float((y[what].double() - value).abs().max()) for y in (found, rounded))
                if not error <= bound:
                    return f"{what} of the fused form differs by {error:.2g}, where float32 rounds by {bound:.2g}"
    return ""


def _outcome(module: nn.Module, x: torch.Tensor, training: bool) -> dict[str, Any]:
    module = copy.deepcopy(module)
    for inner in module.modules():
        # A SyncBatchNorm would look for other processes.
        inner.training = training and not isinstance(inner, nn.SyncBatchNorm)
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        x = x.clone().requires_grad_()
        y = module(x + 0)  # for what is in place
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device="cpu").view(y.shape)
        inputs = {"x": x, **{name: p for name, p in module.named_parameters() if p.requires_grad}}
        grads = torch.autograd.grad(y, list(inputs.values()), weights, allow_unused=True, materialize_grads=True)
    outcome = {
        "the output": y.detach(),
        **{f"the gradient of {name}": g for name, g in zip(inputs, grads, strict=True)},
    }
    return {**outcome, **dict(module.named_buffers())}
