"""What an adaptive blur does: where its filters blur, and whether its groups belong together.

Source: Zou, Xiao, Yu & Lee, Delving Deeper into Anti-aliasing in ConvNets, 2020.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..nn._blur import check_int
from ..nn.adaptive_blur_pool import Adaptive2d
from . import _plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _check_tensor(name: str, value: object, shape: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating torch.Tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    return value if value.dtype is torch.float64 else value.float()


def predicted_weights(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The filters by which an adaptive module blurs x.

    1. the module's predictor runs, in the mode it is in: in training a batch norm goes by the batch and notes its statistics;
    2. what it predicts at the kept positions is normalised as the module does.

    Args:
        module: an :class:`aliasfused.nn.AdaptiveBlurPool2d`, or a layer of :mod:`aliasfused.compat.adaptive`.
        x: (N, C, H, W), what it is given.

    Returns:
        (N, G, k^2, H', W'), tap p k + q in place p k + q; float32, or float64 for float64; differentiable.

    Raises:
        TypeError, ValueError: module is another one; x as for the module.
    """
    if not isinstance(module, Adaptive2d):
        raise TypeError(
            "module must be an aliasfused.nn.AdaptiveBlurPool2d or one of aliasfused.compat.adaptive, got "
            f"{type(module).__name__}"
        )
    kernel_size, stride, groups, normalize, _ = module.geometry()
    logits = module.logits(x)
    if logits.shape[2:] == x.shape[2:]:
        logits = logits[:, :, :: stride[0], :: stride[1]]
    w = (logits if logits.dtype is torch.float64 else logits.float()).unflatten(1, (groups, kernel_size**2))
    if normalize == "none":
        return w
    return w.softmax(2) if normalize == "group" else w.flatten(1, 2).softmax(1).view_as(w)


def filter_variance(weights: torch.Tensor | nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    """How unequal the taps of each filter are: low where it blurs.

    ``v[n,g,i,j] = sum_t (w[n,g,t,i,j] - mean_t w)^2 / (k^2 - 1)``: 0 for the average over the window, 1/k^2 for a filter that
    passes one pixel on (1/9 at k = 3). Filters whose gain is not 1 (``normalize`` "joint" or "none") scale with its square.

    Args:
        weights: (N, G, k^2, H', W'), or a module whose :func:`predicted_weights` for x are taken.
        x: (N, C, H, W), with a module only.

    Returns:
        (N, G, H', W'), at least float32.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed; there must be two taps or more.
    """
    if isinstance(weights, nn.Module) != (x is not None):
        raise TypeError(f"x must be given with a module and with nothing else, got weights {type(weights).__name__}")
    if isinstance(weights, nn.Module):
        weights = predicted_weights(weights, x)  # type: ignore[arg-type]
    weights = _check_tensor("weights", weights, "(N, G, k^2, H, W)")
    if weights.shape[2] < 2:
        raise ValueError(f"weights must have two taps or more for a variance, got shape {tuple(weights.shape)}")
    return weights.var(2)


class GroupSimilarity(NamedTuple):
    """What :func:`group_similarity` returns."""

    within: torch.Tensor  # (): mean over pairs of channels of one group; NaN where groups are of one channel
    between: torch.Tensor  # (): mean over pairs of channels of different groups; NaN where there is one group
    matrix: torch.Tensor  # (C, C)


def group_similarity(features: torch.Tensor, groups: int) -> GroupSimilarity:
    """Whether channels that share a filter are more alike than others.

    1. ``s[c,d]`` is the cosine of channels c and d, each a vector over the positions of an image, averaged over images; that
       of a channel which is zero everywhere is 0;
    2. ``within`` is the mean of s over pairs c != d of the same group, ``between`` that over pairs of different groups.

    Args:
        features: (N, C, H, W), such as what an adaptive module is given or returns.
        groups: G, which divides C; a group is C/G channels that follow each other.

    Returns:
        :class:`GroupSimilarity`, at least float32.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    features = _check_tensor("features", features, "(N, C, H, W)")
    check_int("groups", groups)
    channels = features.shape[1]
    if channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of features, got {groups}")
    vectors = F.normalize(features.flatten(2), dim=2)
    matrix = (vectors @ vectors.mT).mean(0)
    group = torch.arange(channels, device=matrix.device) // (channels // groups)
    same = group[:, None] == group
    alone = torch.eye(channels, dtype=torch.bool, device=matrix.device)
    return GroupSimilarity(matrix[same & ~alone].mean(), matrix[~same].mean(), matrix)


def plot_filter_variance(variance: torch.Tensor, picture: torch.Tensor | None = None) -> Figure:
    """The map of each group's filter variance, dark where it blurs, beside the picture.

    Args:
        variance: (G, H', W'), an image of :func:`filter_variance`; all groups share the scale, which begins at 0.
        picture: (1 or 3, H, W) in [0, 1].

    Returns:
        A ``matplotlib.figure.Figure``: ``savefig`` writes it, a notebook shows it.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    variance = _check_tensor("variance", variance, "(G, H, W)").detach().cpu()
    height, width = variance.shape[1:]
    if picture is not None:
        picture = _check_tensor("picture", picture, "(1 or 3, H, W)").detach().cpu()
        if picture.shape[0] not in (1, 3):
            raise ValueError(f"picture must have shape (1 or 3, H, W), got {tuple(picture.shape)}")
        height, width = picture.shape[1:]
    panels = len(variance) + (picture is not None)
    columns = min(panels, 5)
    rows = -(-panels // columns)
    figure = _plot.figure(3 * columns + 0.7, 3 * rows * height / width + 0.3)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    if picture is not None:
        axes[0].imshow(picture.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy())
    place = {"extent": (0, width, height, 0), "vmin": 0.0, "vmax": float(variance.max()), "cmap": "viridis"}
    for group, (axis, values) in enumerate(zip(axes[panels - len(variance) :], variance, strict=False)):
        image = axis.imshow(values.numpy(), interpolation="nearest", **place)
        axis.set_title(f"group {group}" if len(variance) > 1 else "variance of the taps", fontsize="medium")
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def plot_group_similarity(features: torch.Tensor, groups: int) -> Figure:
    """:func:`group_similarity` as a matrix of channels, the groups' borders drawn, its two means in the title.

    Args:
        features, groups: as there.

    Returns, Raises:
        As :func:`plot_filter_variance`.
    """
    within, between, matrix = (value.detach().cpu() for value in group_similarity(features, groups))
    figure = _plot.figure(5, 4.2)
    axis = figure.subplots()
    channels = len(matrix)
    image = axis.imshow(matrix.numpy(), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
    for border in range(channels // groups, channels, channels // groups):
        axis.axhline(border - 0.5, color="black", linewidth=0.8)
        axis.axvline(border - 0.5, color="black", linewidth=0.8)
    axis.set_title(f"within groups {within:.2f}, between {between:.2f}", fontsize="medium")
    axis.set_xlabel("channel")
    axis.set_ylabel("channel")
    figure.colorbar(image, ax=axis, label="cosine")
    return figure
