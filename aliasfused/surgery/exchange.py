"""Make the blurs inside a model fused ones, with what stands before them, each after it was seen to give the same numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..compat import adaptive, antialiased_cnns, composer, kornia, timm
from ..compat._kernel import KernelBlur, outer
from ..nn._blur import Blur2d
from . import trial
from .fuse import Fused, fuse_chains
from .trace import full_name, hooked, twin

_PEERS: dict[str, type[KernelBlur]] = {
    "antialiased_cnns.blurpool.BlurPool": antialiased_cnns.BlurPool,
    "antialiased_cnns.blurpool.BlurPool1D": antialiased_cnns.BlurPool1D,
    "timm.layers.blur_pool.BlurPool2d": timm.BlurPool2d,
    "kornia.filters.blur_pool.BlurPool2D": kornia.BlurPool2D,
    "kornia.filters.blur_pool.MaxBlurPool2D": kornia.MaxBlurPool2D,
    "composer.algorithms.blurpool.blurpool_layers.BlurMaxPool2d": composer.BlurMaxPool2d,
    "composer.algorithms.blurpool.blurpool_layers.BlurConv2d": composer.BlurConv2d,
}
# Blurs by predicted filters, as released.
_ADAPTIVE: dict[str, type[nn.Module]] = {
    f"models_lpf.layers.pasa.{cls.__name__}": cls
    for cls in (adaptive.Downsample_PASA_group_softmax, adaptive.Downsample_PASA)
}
_LIBRARIES: dict[str, type[KernelBlur]] = {
    "antialiased_cnns": antialiased_cnns.BlurPool,
    "timm": timm.BlurPool2d,
    "kornia": kornia.BlurPool2D,
    "composer": composer.BlurPoolConv2d,
}


class Row(NamedTuple):
    """What became of one module."""

    name: str  # its path in the model, empty for the root
    cls: str  # the full name of the class it came with
    action: str  # "fused" or "left"
    reason: str  # why it was left, or no more was fused with it; "already fused"; else empty
    absorbed: tuple[str, ...] = ()  # paths of the batch norm, activation and maximum that the blur now does


class Report(tuple[Row, ...]):
    """The rows of :func:`accelerate`; prints as a table."""

    def __repr__(self) -> str:
        cells = [
            ("module", "class", "action", "absorbed", "reason"),
            *((row.name or "(root)", row.cls, row.action, ", ".join(row.absorbed), row.reason) for row in self),
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(" | ".join(map(str.ljust, row, widths)).rstrip(" |") for row in cells)


def accelerate(
    model: nn.Module, *, fuse: Literal["all", "blur"] = "all", also: Mapping[str, str] | None = None
) -> Report:
    """Make every BlurPool of antialiased-cnns, timm, kornia and composer inside a model a fused one, in place, the root too,
    and one step with it what stands before it; so too the released blurs by predicted filters.

    1. A blur is recognised by its class's module and name; subclasses are not, since their forward may differ.
    2. It is run old against new in float64 (float32 where a device has none) on two small inputs, one of odd height and
       even width, one the other way: ``|y_old - y_new| <= sum|K - h w^T| + 2 k_h k_w eps sum|K|`` for inputs within
       [-1, 1], K its kernel and h, w the rows read from it. Beyond that, or where the fused form refuses, it is left.
       Convolutions with a blur, and predicted filters with their predictor, are run as a whole, as in 5.
    3. The instance's class is exchanged. Weights, buffers, state_dict keys, hooks, shared references, mode, device and
       dtype are the instance's and stay.
    4. With ``fuse="all"``, what comes before a blur is drawn into it: any of ``BatchNorm2d`` (or timm's
       ``BatchNormAct2d``), an activation that :func:`aliasfused.act_blur_pool2d` has, and ``MaxPool2d`` of stride 1, in this
       order; Identity and drop layers of probability 0 are looked through. An ``AvgPool2d`` whose stride is its window is a
       blur too where an activation comes before it, and composer's convolutions begin with one where it comes first. torch.fx
       finds these chains in a copy; a module that is called or consumed elsewhere too, is shared, or has hooks, is no part of
       one.
    5. Old is run against new as before, now with the gradients of x and parameters and running statistics, in training and
       evaluation; they may differ in float64 by what float32 does to the old.
    6. By exchange of their classes the blur becomes the step, and what it absorbed passes its input on. The module tree
       stays; parameters, statistics, state_dict keys and the meaning of train and eval are still the batch norm's, which may
       also be replaced afterwards, as ``convert_sync_batchnorm`` does. In the residual blocks of torchvision and
       antialiased-cnns, where one activation serves several places, the block's class is exchanged as well.

    What reads a model between its modules (hooks and feature extraction that are set up afterwards, but also functions such as
    timm's ``forward_intermediates``) finds at an absorbed module what went into it; numbers of activations and maxima, and
    the probability 0 of drop layers, are those of the time of the call; TorchScript takes models of ``fuse="blur"`` only.

    Args:
        model: any module.
        fuse: "all", or "blur" for blurs alone.
        also: further classes, such as vendored copies: full name to the library whose attributes they have,
            "antialiased_cnns", "timm", "kornia", "composer" or "adaptive" (Adaptive-anti-Aliasing); under the same check.

    Returns:
        A :class:`Report`, one row a blur: its name in the model, its class, "fused" or "left", why, and what it absorbed.
        Calling again changes nothing.

    Warns:
        UserWarning: no blur was found.

    Raises:
        TypeError, ValueError: model is no module; ``fuse`` or a library in ``also`` is another one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if fuse not in ("all", "blur"):
        raise ValueError(f"fuse must be 'all' or 'blur', got {fuse!r}")
    for name, library in (also or {}).items():
        if library not in (libraries := (*_LIBRARIES, "adaptive")):
            raise ValueError(f"also[{name!r}] must be one of {', '.join(map(repr, libraries))}, got {library!r}")
    names = {module: name for name, module in model.named_modules()}
    rows = {row.name: row for module in names for row in _visit(module, names, also or {})}
    for chain in fuse_chains(model) if fuse == "all" else ():
        name = names[model.get_submodule(chain.blur)]
        action = "fused" if chain.absorbed else "left"
        row = rows.get(name) or Row(name, full_name(nn.AvgPool2d), action, "")
        known = "" if chain.absorbed else row.reason
        rows[name] = row._replace(reason="; ".join(filter(None, (known, chain.reason))), absorbed=chain.absorbed)
    report = Report(rows[name] for name in names.values() if name in rows)
    if not report:
        warnings.warn(
            "accelerate found no BlurPool of antialiased-cnns, timm, kornia or composer in "
            f"{full_name(type(model))}; copies of them under other names can be given as "
            "also={'pkg.module.Class': 'antialiased_cnns'}",
            stacklevel=2,
        )
    return report


def _visit(module: nn.Module, names: Mapping[nn.Module, str], also: Mapping[str, str]) -> Iterator[Row]:
    name, cls = names[module], full_name(type(module))
    if isinstance(module, adaptive._Released):
        yield Row(name, cls, "fused", "already fused")
    elif cls in _ADAPTIVE or also.get(cls) == "adaptive":
        reason = _exchange_adaptive(module)
        yield Row(name, cls, "left" if reason else "fused", reason)
    elif isinstance(module, Fused):
        yield Row(name, cls, "fused", "already fused", module.absorbed(names))
    elif isinstance(module, Blur2d):
        yield Row(name, cls, "fused", "already fused")
    elif cls in _PEERS or cls in also:
        target = _PEERS.get(cls) or (_LIBRARIES[also[cls]] if also[cls] != "composer" else _composers(module))
        reason = _exchange(module, target)
        yield Row(name, cls, "left" if reason else "fused", reason)
    elif known := [base for base in map(full_name, type(module).__mro__) if base in _PEERS or base in also]:
        yield Row(
            name, cls, "left", f"a subclass of {known[0]}, whose forward may differ; name it in also= to have it tried"
        )


def _composers(module: nn.Module) -> type[KernelBlur]:
    """Which of composer's classes has the attributes of this one, or ffcv's, which has fewest."""
    if hasattr(module, "filt2d"):
        return composer.BlurMaxPool2d
    return composer.BlurConv2d if hasattr(module, "blur_first") else composer.BlurPoolConv2d


def _exchange(module: nn.Module, target: type[KernelBlur]) -> str:
    """Exchange the class of one blur, or say why not."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if parametrize.is_parametrized(module):
        return "it is parametrised"
    if any(hooked(child) for child in module.modules() if child is not module):
        return "a module inside it has hooks, which the fused form would not call"
    try:
        kernel = getattr(module, target._kernel)
        if target is antialiased_cnns.BlurPool and kernel.dim() == 3:
            target = antialiased_cnns.BlurPool1D
        fused: Any = _like(module, {})
        fused.__class__ = target
        fused.refresh_taps()
        convolves = issubclass(target, (composer.BlurConv2d, composer.BlurPoolConv2d))
        reason = _difference_with_convolution(module, fused) if convolves else _difference(module, fused, kernel)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not reason:
        module.__class__ = target
        module.__dict__["_window"] = fused._window
    return reason


@torch.inference_mode(False)
def _difference_with_convolution(module: nn.Module, fused: Any) -> str:
    old = twin(module, trial.random_tensors(keep=[getattr(module, fused._kernel)]))
    new = twin(old)
    new.__class__, new.__dict__["_window"] = type(fused), fused._window
    reach = (k * d for k, d in zip(old.conv.kernel_size, old.conv.dilation, strict=True))
    return trial.difference(old, new, old.conv.in_channels, 2 * max(reach) + 5, [False])


@torch.inference_mode(False)
def _exchange_adaptive(module: Any) -> str:
    """Exchange the class of one blur by predicted filters, or say why not."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if any(hooked(child) for child in module.children()):
        return "a module inside it has hooks, which the fused form may not call"
    # The plain one, which has no groups, clamps where the other has a softmax.
    target = adaptive.Downsample_PASA_group_softmax if hasattr(module, "group") else adaptive.Downsample_PASA
    try:
        old = twin(module, trial.random_tensors())
        new = twin(old)
        new.__class__ = target
        reason = trial.difference(old, new, old.conv.in_channels, 2 * old.kernel_size + 5, (False, True))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not reason:
        module.__class__ = target
    return reason


def _like(module: nn.Module, buffers: dict[str, torch.Tensor]) -> nn.Module:
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
    old = _like(module, {fused._kernel: kernel.to(device, dtype)} if fused._kernel in module._buffers else {})
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
