"""How far rounding may take a result from the unrounded float64 truth: computed from the blur, never typed in."""

from __future__ import annotations

import math

import torch

from truth import Adaptive

# Native CPU kernels pad short sums up to the longest of a vector, of so many terms at most (csrc/cpu, Pattern).
PADDED_TERMS = 16


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def rounding(truth: torch.Tensor, error: torch.Tensor, dtype: torch.dtype, ulps: float = 0.5) -> torch.Tensor:
    """``ulps`` units in the last place of dtype around truth, of its subnormal numbers near zero."""
    info = torch.finfo(dtype)
    return ulps * info.eps * (truth.abs() + error).clamp(min=info.smallest_normal)


def of_sum(
    magnitude: torch.Tensor, truth: torch.Tensor, terms: int, dtype: torch.dtype, ulps: float = 0.5
) -> torch.Tensor:
    """Of sums of products whose absolute values add up to ``magnitude``, rounded to dtype once.

    ``terms * eps * magnitude`` with the accumulator's eps, which is twice its rounding unit; then ``ulps`` of the output.
    """
    error = terms * torch.finfo(accumulator(dtype)).eps * magnitude
    return error + rounding(truth, error, dtype, ulps)


def forward(blur, x: torch.Tensor, truth: torch.Tensor, ulps: float = 0.5) -> torch.Tensor:
    return of_sum(blur.absolute().forward(x.abs()), truth, blur.terms(False) + PADDED_TERMS, x.dtype, ulps)


def adjoint(blur, dy: torch.Tensor, truth: torch.Tensor, ulps: float = 0.5) -> torch.Tensor:
    return of_sum(blur.absolute().adjoint(dy.abs()), truth, blur.terms(True) + PADDED_TERMS, dy.dtype, ulps)


def taps_gradient(blur, dy: torch.Tensor, x: torch.Tensor, axis: int, truth: torch.Tensor) -> torch.Tensor:
    """A sum over every output, of products with sums along the other axis; it is left in the accumulator's dtype."""
    magnitude = blur.absolute().taps_gradient(dy.abs(), x.abs(), axis)
    terms = dy.shape[0] * dy.shape[2] * dy.shape[3] + blur.terms(False)
    return of_sum(magnitude, truth, terms, accumulator(x.dtype))


def assert_within(actual: torch.Tensor, truth: torch.Tensor, limit: torch.Tensor, what: str = "") -> None:
    """Elementwise; a NaN is never within."""
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    error = (actual.double().cpu() - truth).abs()
    wrong = ~(error <= limit)
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} results are wrong; the first, {first}, is "
            f"{float(actual[first])!r}, expected {float(truth[first])!r} within {float(limit[first]):.3g}"
        )


# Of the activations: the steepest (hardswish), and the units in the last place that their formulas may lose.
STEEPEST, LOST = 1.5, 16


def _argument(step, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What an activation is of, and how far rounding may take it."""
    u, eps = step.argument(x), torch.finfo(accumulator(x.dtype)).eps
    if step.affine is None:
        return u, torch.zeros_like(u)
    _, scale, shift = step.affine[:, :, None, None].abs().unbind()
    return u, 3 * eps * (step.centred(x).abs() * scale + shift)


def step_forward(step, x: torch.Tensor, truth: torch.Tensor, ulps: float = 0.5) -> torch.Tensor:
    """Of a blur of maxima of activations: what these may be off by, rounded to dtype once more, and what the blur adds."""
    u, off = _argument(step, x)
    v = step.act(u)
    off = STEEPEST * off + LOST * torch.finfo(accumulator(x.dtype)).eps * (u.abs() + v.abs())
    z, off = step.maxima(v), step.maxima(off)
    off = off + rounding(z, off, x.dtype)
    absolute, terms = step.blur.absolute(), step.blur.terms(False) + PADDED_TERMS
    return absolute.forward(off) + of_sum(absolute.forward(z.abs() + off), truth, terms, x.dtype, ulps)


def step_du(step, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Of the gradient at the activation's argument: slope times a sum of adjoint values, each of which was rounded to dtype."""
    u, off = _argument(step, x)
    eps = torch.finfo(accumulator(x.dtype)).eps
    dz = step.blur.adjoint(dy)
    limit = adjoint(step.blur, dy, dz)
    # The slope, which is at most STEEPEST, changes no faster than an argument does away from corners.
    slope = LOST * eps * (1 + u.abs()) + off
    won = step.spread(x, dz.abs() + limit)
    return STEEPEST * step.spread(x, limit) + (slope + step.kernel[0] * step.kernel[1] * eps) * won


def step_backward(step, x, dy, correction, truth: torch.Tensor, ulps: float = 0.5) -> torch.Tensor:
    eps, limit = torch.finfo(accumulator(x.dtype)).eps, step_du(step, x, dy)
    if step.affine is not None:
        limit = limit * step.affine[1, :, None, None].abs()
    magnitude = truth.abs()
    if correction is not None:
        shift, slope = correction.double()[:, :, None, None].abs().unbind()
        magnitude = magnitude + 2 * (shift + slope * step.centred(x).abs())
    limit = limit + 4 * eps * magnitude
    return limit + rounding(truth, limit, x.dtype, ulps)


def step_sums(step, x: torch.Tensor, dy: torch.Tensor, du: torch.Tensor) -> torch.Tensor:
    eps, limit, centred = torch.finfo(accumulator(x.dtype)).eps, step_du(step, x, dy), step.centred(x).abs()
    terms = du.shape[0] * du.shape[2] * du.shape[3] + 4
    error = limit + terms * eps * (du.abs() + limit)
    return torch.stack([error.sum((0, 2, 3)), (error * centred).sum((0, 2, 3))])


# The most pixels that any backend's channel_moments sums in the accumulator's dtype (pixels_of_sum in csrc/channel_moments.h).
PIXELS_OF_SUM = 64


def moments(x: torch.Tensor) -> torch.Tensor:
    """Of channel_moments(x), (3, C): the count is exact. u, U: the rounding units of the accumulator and of float64.

    Of at most t terms d = x - p, p some pixel of the channel, sums of d and of d^2 are off by g sum |d| and g sum d^2,
    g = (t + 8) u. With r = max |x - mean|, |d| <= |x - mean| + r, so that q = sum d^2 <= (sqrt(m2) + sqrt(n) r)^2: the mean
    is off by g (sum |x - mean| / n + r), m2 within groups by 3 g q, between them by 2 g sqrt(m2 q) + g^2 q, in all < 6 g q.
    In float64 n merges lose 8 U max |x| each in the mean, the truth as much: e. Squares of distances between means, weighed
    by min(n_a, n_b) and so in all by w = n log2(2 n) / 2 at most, change by 4 e sqrt(w m2) + 4 e^2 w; n sums, by 4 n U m2.
    """
    x = x.cpu()
    if x.shape[0] * x.shape[2] * x.shape[3] == 0:
        return x.new_zeros((3, x.shape[1]), dtype=torch.float64)
    pixels = x.double().transpose(0, 1).flatten(1)
    n = pixels.shape[1]
    unit, info = torch.finfo(torch.float64).eps / 2, torch.finfo(accumulator(x.dtype))
    g = (min(n, PIXELS_OF_SUM) + 8) * info.eps / 2
    away = (pixels - pixels.mean(1, keepdim=True)).abs()
    r, m2 = away.amax(1), (away**2).sum(1)
    q = (m2.sqrt() + n**0.5 * r) ** 2
    e, w = 16 * n * unit * pixels.abs().amax(1), n * math.log2(2 * n) / 2
    mean_error = g * (away.mean(1) + r) + e
    m2_error = 6 * g * q + 4 * e * (w * m2).sqrt() + 4 * e**2 * w + 4 * n * unit * m2 + n * info.smallest_normal
    return torch.stack([torch.zeros_like(m2), mean_error, m2_error])


# What a number of a batch norm takes of operations in float64, at most, one after the other.
BATCH_NORM_TERMS = 16


def batch_norm(truth: torch.Tensor, magnitude: torch.Tensor, dtype: torch.dtype, ulps: float = 0.5) -> torch.Tensor:
    """Of sums whose terms add up to ``magnitude``, in float64, rounded to dtype; to a 16-bit one by way of float32."""
    error = of_sum(magnitude, truth, BATCH_NORM_TERMS, torch.float64)
    error = error if dtype.itemsize > 2 else error + rounding(truth, error, torch.float32)
    return error + rounding(truth, error, dtype, ulps)


# Of a softmax's weight, in units of the accumulator's eps: what exp and the quotient may lose beside the terms of the sum.
LOST_BY_EXP = 8


def adaptive_weights(blur: Adaptive, dtype: torch.dtype) -> torch.Tensor:
    """Of weights w = e / sum e with e = exp(-d), d = max z - z.

    d, and what exp makes of it for another base, lose 2 d eps of e and LOST_BY_EXP eps besides; a sum of e loses what its
    terms do on average, and eps a term; what lies below the smallest number is lost as a whole.
    """
    w, info = blur.weights, torch.finfo(accumulator(dtype))
    if not blur.over:
        return torch.zeros_like(w)
    d = (blur.logits.amax(blur.over, keepdim=True) - blur.logits).masked_fill(w == 0, 0)
    terms = math.prod(w.shape[i] for i in blur.over)
    units = 2 * d + (2 * w * d).sum(blur.over, keepdim=True) + terms + 2 * LOST_BY_EXP
    return info.eps * units * w + info.smallest_normal


def adaptive_forward(
    x: torch.Tensor, logits: torch.Tensor, args, truth: torch.Tensor, ulps: float = 0.5
) -> torch.Tensor:
    """``args``: kernel_size, stride, groups, normalize, pad_mode."""
    blur = Adaptive(x.shape[2:], logits, *args)
    off, w = adaptive_weights(blur, x.dtype), blur.weights.abs()
    magnitude = blur.blurred(w + off, x.abs())
    return blur.blurred(off, x.abs()) + of_sum(magnitude, truth, args[0] ** 2 + PADDED_TERMS, x.dtype, ulps)


def adaptive_adjoint(
    dy: torch.Tensor, logits: torch.Tensor, args, size, truth: torch.Tensor, ulps: float = 0.5
) -> torch.Tensor:
    blur = Adaptive(size, logits, *args)
    off, w = adaptive_weights(blur, dy.dtype), blur.weights.abs()
    terms = int(torch.bincount(blur.reads.flatten()).max()) + PADDED_TERMS
    return blur.spread(off, dy.abs()) + of_sum(blur.spread(w + off, dy.abs()), truth, terms, dy.dtype, ulps)


def adaptive_logits_grad(
    dy: torch.Tensor, x: torch.Tensor, logits: torch.Tensor, args, truth: torch.Tensor, ulps: float = 0.5
) -> torch.Tensor:
    """Of w (dw - sum w dw): each factor's own, and a rounding for each operation between them."""
    blur = Adaptive(x.shape[2:], logits, *args)
    eps, (off, w) = torch.finfo(accumulator(x.dtype)).eps, (adaptive_weights(blur, x.dtype), blur.weights)
    magnitude = blur.correlated(dy.abs(), x.abs())
    error = (x.shape[1] // args[2] + PADDED_TERMS) * eps * magnitude
    if blur.over:
        terms = math.prod(w.shape[i] for i in blur.over)
        weighed = ((w + off) * magnitude).sum(blur.over, keepdim=True)
        mean_error = (off * magnitude + (w + off) * error).sum(blur.over, keepdim=True) + (terms + 2) * eps * weighed
        error = off * (magnitude + weighed) + (w + off) * (error + mean_error + 4 * eps * (magnitude + weighed))
    error = blur.among_zeros(error.flatten(1, 2))
    return error + rounding(truth, error, logits.dtype, ulps)
