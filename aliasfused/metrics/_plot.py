"""What is drawn: figures without a window, so that nothing has to be closed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("aliasfused.metrics draws with matplotlib: pip install 'aliasfused[metrics]'") from error
    return Figure(figsize=(width, height), layout="constrained")
