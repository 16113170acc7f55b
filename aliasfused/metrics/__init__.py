"""Measurements of what a layer does, in PyTorch; drawn with matplotlib, which is imported where something is drawn."""

from .adaptive import (
    GroupSimilarity,
    filter_variance,
    group_similarity,
    plot_filter_variance,
    plot_group_similarity,
    predicted_weights,
)

__all__ = [
    "GroupSimilarity",
    "filter_variance",
    "group_similarity",
    "plot_filter_variance",
    "plot_group_similarity",
    "predicted_weights",
]
