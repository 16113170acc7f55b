"""Of every channel how many pixels it has, their mean, and the sum of their squared distances from it, in one pass.

    moments[0,c] = n = N H W
    moments[1,c] = m_c = sum over n,i,j of x[n,c,i,j] / n
    moments[2,c] = sum over n,i,j of (x[n,c,i,j] - m_c)^2

in float64 whatever the dtype of x, so that nothing is lost where a mean is large against the deviation, and so that the
moments of parts (of a batch, of processes) merge into those of the whole.

Source: Chan, Golub & LeVeque, Algorithms for Computing the Sample Variance, 1983.
"""

from __future__ import annotations

import torch

from ._library import define

__all__ = ["channel_moments", "merged"]


def _fake(x):
    return x.new_empty((3, x.shape[1]), dtype=torch.float64)


# Knows no autograd: whoever normalises by moments has the gradient of the whole in hand.
channel_moments = define("channel_moments(Tensor x) -> Tensor", _fake)


def merged(parts: torch.Tensor) -> torch.Tensor:
    """The moments (3, C) of the whole from those of its parts (P, 3, C), some of which may be of nothing."""
    count, mean, m2 = parts.unbind(1)
    total = count.sum(0)
    whole = (count * mean).sum(0) / total.clamp(min=1)
    return torch.stack([total, whole, (m2 + count * (mean - whole) ** 2).sum(0)])
