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
