"""Low-pass filters as rows of taps, and what they do to a spectrum.

A *row* is a tuple of floats, the taps of a one-dimensional filter; a *pair* of rows ``(h, w)`` is the separable
two-dimensional filter with ``kernel[p, q] = h[p] * w[q]``. Every designer returns a row that sums to one, so constants
pass unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["alias_fraction", "binomial", "factor", "frequency_response", "gaussian", "kaiser", "rect"]

Row = tuple[float, ...]


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value!r}")
    return value


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 < value < math.inf):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return float(value)


def _normalised(values: Sequence[float]) -> Row:
    total = math.fsum(values)
    return tuple(v / total for v in values)


def binomial(k: int) -> Row:
    """The binomial row of ``k`` taps: ``C(k-1, p) / 2**(k-1)``; its response is ``cos(w/2)**(k-1)``.

    Args:
        k: number of taps, at least 1 (1 is the identity, 2 the box, 3 the triangle [1, 2, 1]/4).

    Raises:
        ValueError: k is not an int >= 1.

    Source: Zhang, Making Convolutional Networks Shift-Invariant Again, 2019.
    """
    k = _count("k", k)
    return tuple(math.comb(k - 1, p) / 2 ** (k - 1) for p in range(k))


def rect(k: int) -> Row:
    """The box of ``k`` equal taps ``1/k``: blurring with it at stride k is average pooling.

    Raises:
        ValueError: k is not an int >= 1.
    """
    k = _count("k", k)
    return (1 / k,) * k


def gaussian(sigma: float, numtaps: int) -> Row:
    """A sampled Gaussian: ``exp(-(p - (numtaps-1)/2)**2 / (2 sigma**2))``, normalised.

    Args:
        sigma: standard deviation in input pixels, positive.
        numtaps: number of taps; even counts are centred between two pixels.

    Raises:
        ValueError: an argument is out of range, or sigma is so small that an even filter vanishes.
    """
    sigma, numtaps = _positive("sigma", sigma), _count("numtaps", numtaps)
    centre = (numtaps - 1) / 2
    # The smallest exponent is taken out first, so that a tiny sigma gives the box of the central taps, not 0/0.
    nearest = 0.0 if numtaps % 2 else 0.25
    exponents = (((p - centre) ** 2 - nearest) / (2 * sigma) / sigma for p in range(numtaps))
    return _normalised([math.exp(-e) for e in exponents])


def kaiser(numtaps: int, cutoff: float, width: float) -> Row:
    """The Kaiser-windowed sinc, the low-pass filter of StyleGAN3.

    1. attenuation ``A = 2.285 (numtaps - 1) pi width + 7.95`` dB (Kaiser's formula, sampling rate 2);
    2. ``beta`` of the window from A: ``0.1102 (A - 8.7)`` above 50 dB, ``0.5842 (A-21)**0.4 + 0.07886 (A-21)`` above 21, else 0;
    3. taps ``cutoff sinc(cutoff (p - (numtaps-1)/2)) * window_p``, normalised to sum one.

    Args:
        numtaps: number of taps.
        cutoff: where the response is about one half, in units of the Nyquist frequency (sampling rate 2), in (0, 1).
        width: width of the transition band in the same units, positive.

    Raises:
        ValueError: an argument is out of range.

    Equal to ``scipy.signal.firwin(numtaps, cutoff, width=width, fs=2)``.
    """
    numtaps, cutoff, width = _count("numtaps", numtaps), _positive("cutoff", cutoff), _positive("width", width)
    if cutoff >= 1:
        raise ValueError(f"cutoff must be below 1 (the Nyquist frequency at sampling rate 2), got {cutoff!r}")
    attenuation = 2.285 * (numtaps - 1) * math.pi * width + 7.95
    if attenuation > 50:
        beta = 0.1102 * (attenuation - 8.7)
    elif attenuation > 21:
        beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    else:
        beta = 0.0
    window = torch.kaiser_window(numtaps, periodic=False, beta=beta, dtype=torch.float64)
    t = torch.arange(numtaps, dtype=torch.float64) - (numtaps - 1) / 2
    if not bool(torch.isfinite(window).all()):
        raise ValueError(
            f"width {width!r} with {numtaps} taps asks for more attenuation than a float64 window can hold"
        )
    return _normalised((torch.sinc(cutoff * t) * window).tolist())


def factor(kernel2d: torch.Tensor | Sequence[Sequence[float]]) -> tuple[Row, Row]:
    """Split a separable 2-D kernel into its rows ``(h, w)`` with ``kernel = outer(h, w)``.

    1. singular value decomposition in float64;
    2. ``h = u_1 sqrt(s_1)``, ``w = v_1 sqrt(s_1)``, scaled so that both sum to the same value where the sum is not zero;
    3. the residual ``|kernel - outer(h, w)|`` is checked.

    Args:
        kernel2d: (kh, kw) tensor or nested sequence, finite.

    Raises:
        ValueError: not two-dimensional, not finite, or of rank above one: the largest residual exceeds
            ``4 * eps * max|kernel|``, eps that of the kernel's own dtype (float64 for sequences).
    """
    kernel = (
        torch.as_tensor(kernel2d) if isinstance(kernel2d, torch.Tensor) else torch.tensor(kernel2d, dtype=torch.float64)
    )
    if kernel.dim() != 2 or kernel.numel() == 0:
        raise ValueError(f"kernel2d must be a non-empty (kh, kw) matrix, got shape {tuple(kernel.shape)}")
    eps = torch.finfo(kernel.dtype).eps if kernel.is_floating_point() else torch.finfo(torch.float64).eps
    kernel = kernel.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(kernel).all()):
        raise ValueError("kernel2d must be finite, got inf or nan")
    u, s, vh = torch.linalg.svd(kernel)
    h, w = u[:, 0] * s[0].sqrt(), vh[0] * s[0].sqrt()
    # The decomposition leaves the sign and the split of the gain open: a positive sum, shared equally.
    sum_h, sum_w = float(h.sum()), float(w.sum())
    if sum_h < 0:
        h, w, sum_h, sum_w = -h, -w, -sum_h, -sum_w
    if sum_h * sum_w > 0:
        gain = math.sqrt(sum_w / sum_h)
        h, w = h * gain, w / gain
    residual, limit = float((kernel - torch.outer(h, w)).abs().max()), 4 * eps * float(kernel.abs().max())
    if residual > limit:
        raise ValueError(
            f"kernel2d is not separable (its rank is above one): residual {residual:.3g} exceeds 4 * eps * max = {limit:.3g}"
        )
    return tuple(h.tolist()), tuple(w.tolist())


def frequency_response(
    taps: Sequence[float] | tuple[Sequence[float], Sequence[float]], w: float | Sequence[float] | torch.Tensor
) -> torch.Tensor:
    """The complex response ``H(w) = sum_p taps[p] exp(-i w (p - (k-1)/2))``, the phase measured from the filter's centre.

    Args:
        taps: a row, or a pair of rows: then the response at every pair of frequencies, ``H_h(w_i) H_w(w_j)``.
        w: angular frequency in radians per input pixel (pi is the Nyquist frequency), any shape.

    Returns:
        complex128 tensor of the shape of w (real-valued for symmetric taps); for a pair the shape of w twice over.

    Raises:
        ValueError: taps are empty or not finite.
    """
    if _is_pair(taps):
        rows = [frequency_response(row, w) for row in taps]  # type: ignore[arg-type]
        return torch.tensordot(rows[0], rows[1], 0)
    row = torch.tensor(_row(taps), dtype=torch.complex128)  # type: ignore[arg-type]
    position = torch.arange(len(row), dtype=torch.float64) - (len(row) - 1) / 2
    omega = torch.as_tensor(w, dtype=torch.float64)
    return torch.exp(-1j * omega[..., None] * position) @ row


def alias_fraction(
    taps: Sequence[float] | tuple[Sequence[float], Sequence[float]], stride: int | tuple[int, int] = 2
) -> float:
    """The share of a white signal's filtered energy that lies above the new Nyquist frequency, hence aliases.

    1. energy below ``w_c = pi/stride``: ``E_c = 1/pi * int_0^{w_c} |H|^2 dw = sum_{p,q} t_p t_q sin(w_c (p-q)) / (pi (p-q))``;
    2. whole energy ``E = sum_p t_p^2``; one axis: ``1 - E_c/E``;
    3. a pair ``(h, w)`` keeps the product of what its axes keep: ``1 - (1-a_h)(1-a_w)``.

    Args:
        taps: a row (one dimension), or a pair of rows (two dimensions).
        stride: int >= 1, or a pair of them for a pair of rows.

    Returns:
        A float in [0, 1].

    Raises:
        ValueError: stride below 1, or taps that are empty, not finite or without energy.
    """
    if _is_pair(taps):
        strides = stride if isinstance(stride, tuple) else (stride, stride)
        if len(strides) != 2:
            raise ValueError(f"stride must be an int >= 1 or a pair of them (h, w), got {stride!r}")
        kept = [1 - alias_fraction(row, s) for row, s in zip(taps, strides, strict=True)]  # type: ignore[arg-type]
        return 1 - kept[0] * kept[1]
    t = torch.tensor(_row(taps), dtype=torch.float64)  # type: ignore[arg-type]
    energy = float(t @ t)
    if energy == 0:
        raise ValueError("taps must not all be zero")
    edge = 1 / _count("stride", stride)  # type: ignore[arg-type]
    distance = torch.arange(len(t), dtype=torch.float64)
    kernel = edge * torch.sinc(edge * (distance[:, None] - distance))
    return max(0.0, 1 - float(t @ kernel @ t) / energy)


def _is_pair(taps: Sequence[float] | tuple[Sequence[float], Sequence[float]]) -> bool:
    return len(taps) == 2 and not isinstance(taps[0], (int, float))


def _row(taps: Sequence[float]) -> Row:
    row = tuple(float(t) for t in taps)
    if not row or not all(map(math.isfinite, row)):
        raise ValueError(f"taps must be a non-empty sequence of finite numbers, got {taps!r}")
    return row
