"""Make the blurs inside a model fused ones, each after it was seen to give the same numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..compat import antialiased_cnns, kornia, timm
from ..compat._kernel import KernelBlur, outer
from ..nn._blur import Blur2d

_PEERS: dict[str, type[KernelBlur]] = {
    "antialiased_cnns.blurpool.BlurPool": antialiased_cnns.BlurPool,
    "antialiased_cnns.blurpool.BlurPool1D": antialiased_cnns.BlurPool1D,
    "timm.layers.blur_pool.BlurPool2d": timm.BlurPool2d,
    "kornia.filters.blur_pool.BlurPool2D": kornia.BlurPool2D,
    "kornia.filters.blur_pool.MaxBlurPool2D": kornia.MaxBlurPool2D,
}
_LIBRARIES = {"antialiased_cnns": antialiased_cnns.BlurPool, "timm": timm.BlurPool2d, "kornia": kornia.BlurPool2D}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Row(NamedTuple):
    """What became of one module."""

    name: str  # its path in the model, empty for the root
    cls: str  # the full name of the class it came with
    action: str  # "fused" or "left"
    reason: str  # why it was left, else empty or "already fused"


class Report(tuple[Row, ...]):
    """The rows of :func:`accelerate`; prints as a table."""

    def __repr__(self) -> str:
        cells = [("module", "class", "action", "reason"), *((row.name or "(root)", *row[1:]) for row in self)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(" | ".join(map(str.ljust, row, widths)).rstrip(" |") for row in cells)


def accelerate(model: nn.Module, *, also: Mapping[str, str] | None = None) -> Report:
    """Make every BlurPool of antialiased-cnns, timm and kornia inside a model a fused one, in place, the root too; with
    kornia's the maximum before it.

    1. A blur is recognised by its class's module and name; subclasses are not, since their forward may differ.
    2. It is run old against new in float64 (float32 where a device has none) on two small inputs, one of odd height and
       even width, one the other way: ``|y_old - y_new| <= sum|K - h w^T| + 2 k_h k_w eps sum|K|`` for inputs within
       [-1, 1], K its kernel and h, w the rows read from it. Beyond that, or where the fused form refuses, it is left.
    3. The instance's class is exchanged. Weights, buffers, state_dict keys, hooks, shared references, mode, device and
       dtype are the instance's and stay.

    Args:
        model: any module.
        also: further classes, such as vendored copies: full name to the library whose attributes they have,
            "antialiased_cnns", "timm" or "kornia"; under the same check.

    Returns:
        A :class:`Report`, one row a blur: its name in the model, its class, "fused" or "left", and why. Calling again
        changes nothing.

    Warns:
        UserWarning: no blur was found.

    Raises:
        TypeError, ValueError: model is no module; ``also`` names another library.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, library in (also or {}).items():
        if library not in _LIBRARIES:
            raise ValueError(f"also[{name!r}] must be one of {', '.join(map(repr, _LIBRARIES))}, got {library!r}")
    report = Report(row for name, module in model.named_modules() for row in _visit(name, module, also or {}))
    if not report:
        warnings.warn(
            f"accelerate found no BlurPool of antialiased-cnns, timm or kornia in {_full_name(type(model))}; "
            "copies of them under other names can be given as also={'pkg.module.Class': 'antialiased_cnns'}",
            stacklevel=2,
        )
    return report


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _visit(name: str, module: nn.Module, also: Mapping[str, str]) -> Iterator[Row]:
    cls = _full_name(type(module))
    if isinstance(module, Blur2d):
        yield Row(name, cls, "fused", "already fused")
    elif cls in _PEERS or cls in also:
        reason = _exchange(module, _PEERS.get(cls) or _LIBRARIES[also[cls]])
        yield Row(name, cls, "left" if reason else "fused", reason)
    elif known := [base for base in map(_full_name, type(module).__mro__) if base in _PEERS or base in also]:
        yield Row(
            name, cls, "left", f"a subclass of {known[0]}, whose forward may differ; name it in also= to have it tried"
        )


def _exchange(module: nn.Module, target: type[KernelBlur]) -> str:
    """Exchange the class of one blur, or say why not."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if parametrize.is_parametrized(module):
        return "it is parametrised"
    inner = [child for child in module.modules() if child is not module]
    if any(getattr(child, hooks) for child in inner for hooks in _HOOKS):
        return "a module inside it has hooks, which the fused form would not call"
    try:
        kernel = getattr(module, target._kernel)
        if target is antialiased_cnns.BlurPool and kernel.dim() == 3:
            target = antialiased_cnns.BlurPool1D
        fused: Any = _twin(module, {})
        fused.__class__ = target
        fused.refresh_taps()
        reason = _difference(module, fused, kernel)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not reason:
        module.__class__ = target
        module.__dict__["_window"] = fused._window
    return reason


def _twin(module: nn.Module, buffers: dict[str, torch.Tensor]) -> nn.Module:
    """Another instance of the same class and attributes, with other buffers."""
    twin = object.__new__(type(module))
    twin.__dict__.update(vars(module), _buffers={**module._buffers, **buffers})
    return twin


def _difference(module: nn.Module, fused: KernelBlur, kernel: torch.Tensor) -> str:
    """Run old against new; what differs, or nothing."""
    device = torch.device("cpu") if kernel.is_meta else kernel.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    exact = outer(fused._window[:2])  # type: ignore[arg-type]
    kernel = exact.expand(kernel.shape) if kernel.is_meta else kernel.detach()
    old = _twin(module, {fused._kernel: kernel.to(device, dtype)} if fused._kernel in module._buffers else {})
    plane = kernel.double().cpu().reshape(-1, *exact.shape)[:1]
    bound = float((plane - exact).abs().sum() + 2 * exact.numel() * torch.finfo(dtype).eps * plane.abs().sum())
    n = 2 * max(*exact.shape, *fused._window.padding) + 5
    channels = kernel.shape[0] if kernel.dim() > 2 else 3
    generator = torch.Generator().manual_seed(0)
    for size in ((n,), (n + 1,)) if isinstance(fused, antialiased_cnns.BlurPool1D) else ((n, n + 1), (n + 1, n)):
        x = (2 * torch.rand(1, channels, *size, generator=generator, dtype=torch.float64, device="cpu") - 1).to(
            device, dtype
        )
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            expected, y = type(module).forward(old, x), fused.forward(x)
        if y.shape != expected.shape:
            return f"of {size} it makes {tuple(expected.shape[2:])}, the fused form {tuple(y.shape[2:])}"
        error = float((y - expected).abs().max())
        if not error <= bound:
            return f"the fused form differs by {error:.2g}, where rounding allows {bound:.2g}"
    return ""
