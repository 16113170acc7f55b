"""What a batch norm works out per channel, in float64, around the passes over pixels.

Its table makes it an affine of max_blur_pool, u = (x - center) scale + shift. Of mean m, variance v, weight w and bias b

    scale_c = w_c / sqrt(v_c + eps)
    center_c = m_c as the accumulation dtype of x holds it
    shift_c = b_c + (center_c - m_c) scale_c

so that a large mean costs nothing. Running statistics follow those of the batch, moments (n, m, M) of channel_moments,

    running_mean <- (1 - f) running_mean + f m,   running_var <- (1 - f) running_var + f M / (n - 1)

with f the momentum, or 1 / batches for their plain average. And from S0 = sum du and S1 = sum du (x - m), as the sums of
max_blur_pool give them, v = M / n,

    dx = scale (du - S0 / n - (x - m) S1 / (n (v + eps))) = du scale + correction[0] + correction[1] (x - center)
    dweight = S1 / sqrt(v + eps),   dbias = S0

Source: Ioffe & Szegedy, Batch Normalization, 2015.
"""

from __future__ import annotations

import torch

from ._library import define

__all__ = ["follow", "gradient", "table"]


def _fake_table(mean, var, count, weight, bias, eps, wide):
    return mean.new_empty((3, mean.shape[0]), dtype=torch.float64 if wide else torch.float32)


def _fake_follow(running_mean, running_var, num_batches_tracked, moments, momentum):
    return None


def _fake_gradient(sums, moments, table, eps):
    channels = table.shape[1]
    return table.new_empty((2, channels)), table.new_empty(channels), table.new_empty(channels)


# They know no autograd, as channel_moments does not. `var` is, with a count, the sum of so many squared distances; rows may be
# of any floating dtype.
table = define(
    "batch_norm_table(Tensor mean, Tensor var, Tensor? count, Tensor? weight, Tensor? bias, float eps, bool wide) -> Tensor",
    _fake_table,
)
follow = define(
    "batch_norm_follow(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, Tensor moments, "
    "float? momentum) -> ()",
    _fake_follow,
)
gradient = define(
    "batch_norm_gradient(Tensor sums, Tensor moments, Tensor table, float eps) -> (Tensor correction, Tensor dweight, "
    "Tensor dbias)",
    _fake_gradient,
)
