"""How far rounding may take a result from the unrounded float64 truth: computed from the blur, never typed in."""

from __future__ import annotations

import torch

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
