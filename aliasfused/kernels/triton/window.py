"""Index arithmetic of one axis of a filtered subsampling, in both directions: csrc/window.h for Triton.

    y[o] = sum_p taps[p] * x~[stride*o + p - before],   x~ = x extended by the border rule

``t`` is a position of the extended axis x~, ``h`` an index of x (0 <= h < n), ``o`` an index of y, ``p`` a tap. A border
is *near* where a position read is at most one reflection or one turn away from x, which saves every division.
"""

# mypy: disable-error-code="assignment"
# (kernels grow tuples, which the kernel language types one by one)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def floor_mod(a, b):
    r = a % b
    return tl.where(r < 0, r + b, r)


@triton.jit
def source(t, n, BORDER: tl.constexpr, NEAR: tl.constexpr):
    """Index of x that position t shows; not in [0, n) where that is zero, and perhaps where no output reads t."""
    if BORDER == "reflect":
        if NEAR:
            t = tl.where(t < 0, -t, t)
            t = tl.where(t < n, t, 2 * (n - 1) - t)
        else:
            period = tl.maximum(2 * (n - 1), 1)
            t = floor_mod(t, period)
            t = tl.minimum(t, period - t)
    if BORDER == "replicate":
        t = tl.minimum(tl.maximum(t, 0), n - 1)
    if BORDER == "circular":
        if NEAR:
            t = tl.where(t < 0, t + n, t)
            t = tl.where(t < n, t, t - n)
        else:
            t = floor_mod(t, n)
    return t


@triton.jit
def read(o, p, n, before, STRIDE: tl.constexpr, BORDER: tl.constexpr):
    """The forward window, any border: the index of x that output o reads with tap p, or one that is not in [0, n)."""
    return source(o * STRIDE + p - before, n, BORDER, False)


def images(n: int, before: int, after: int, border: str) -> tuple[int, int]:
    """How many positions ``image`` has to try, and how many periods (replicate: pixels) before x the first of them lies."""
    if border == "replicate":
        return 1 + before + after, before
    if border == "zeros" or before == after == 0:
        return 1, 0
    if border == "circular" or n == 1:
        ahead, behind = -(-before // n), -(-after // n)
    else:
        ahead, behind = (before // (n - 1) + 1) // 2, -(-after // (2 * (n - 1)))
    return (2 if border == "reflect" else 1) * (ahead + behind + 1), ahead


@triton.jit
def image(h, j, n, ahead, BORDER: tl.constexpr):
    """The j-th position that shows index h, and whether there is one (h itself is among them): source(t) == h."""
    if BORDER == "zeros":
        t = h
        real = h >= 0
    if BORDER == "replicate":
        t = tl.where(j == 0, h, tl.where(j <= ahead, -j, n - 1 + j - ahead))
        real = (j == 0) | ((j <= ahead) & (h == 0)) | ((j > ahead) & (h == n - 1))
    if BORDER == "circular":
        t = h + n * (j - ahead)
        real = h >= 0
    if BORDER == "reflect":
        t = tl.where(j % 2 == 0, h, -h) + tl.maximum(2 * (n - 1), 1) * (j // 2 - ahead)
        real = (j % 2 == 0) | ((h > 0) & (h < n - 1))
    return t, real


@triton.jit
def read_by(h, z, n, out, before, ahead, k, STRIDE: tl.constexpr, BORDER: tl.constexpr):
    """The adjoint window, any border: the z-th (output, tap) that reads index h of x; the output is -1 where there is none."""
    taps = tl.cdiv(k, STRIDE)
    t, real = image(h, z // taps, n, ahead, BORDER)
    s = t + before
    p = floor_mod(s, STRIDE) + STRIDE * (z % taps)
    o = (s - p) // STRIDE
    return tl.where(real & (s >= p) & (o < out) & (p < k), o, -1), p


# The near adjoint, unrolled. Rows of x are taken in spans of SPAN (a multiple of STRIDE); M < SPAN is a row's place in its
# span and D an output's distance from the first output whose unpadded window starts there, so that the tap p between the
# two is known when compiling. So is the tap between the output and a mirror image of the row: it is p -+ 2 distances to
# the border. What is left for run time is whether the row is that close to the border.


@triton.constexpr_function
def overshoot(k, pad, border):
    """How far beyond the reach of its taps an output may lie from an index whose mirror image it reads."""
    return max(0, 2 * pad - k + 1) if border == "reflect" else 0


@triton.constexpr_function
def first_output(k, stride, before, border):
    """The least D for any row of a span."""
    return -((k - 1 + overshoot(k, before, border) - before) // stride)


@triton.constexpr_function
def end_output(m, k, stride, before, after, border):
    """One more than the greatest D for row m of a span."""
    return (m + before + overshoot(k, after, border)) // stride + 1


@triton.constexpr_function
def is_tap(p, k):
    return 0 <= p < k


@triton.constexpr_function
def may_be(row, m, span):
    """Whether row m of some span is the one numbered ``row``."""
    return (row - m) % span == 0


@triton.constexpr_function
def may_read(p, k, before, after, border):
    if border != "reflect":
        return 0 <= p < k
    return any(0 <= q < k for q in range(p - 2 * before, p + 2 * after + 1, 2))


@triton.jit
def blur_sum(values, taps, BEGIN: tl.constexpr, SIZE: tl.constexpr):
    """sum_p taps[p] * values[BEGIN + p], where each of the values is a tuple of SIZE tensors, and so is the sum."""
    # Triton 3.6 takes calls for the same where only the nesting of the tuples differs, so that SIZE tells them apart.
    totals = ()
    for e in tl.static_range(SIZE):
        total = taps[0] * values[BEGIN][e]
        for p in tl.static_range(1, len(taps)):
            total += taps[p] * values[BEGIN + p][e]
        totals = totals + (total,)
    return totals


@triton.jit
def adjoint_sum(
    values, taps, h, n,
    M: tl.constexpr, STRIDE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    BORDER: tl.constexpr, SPAN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """sum_o (taps with which output o reads index h, through its images too) * values[o], the first o being first_output.

    The values and the sum are tuples, as for blur_sum. EXACT: the length n is a multiple of SPAN.
    """
    K: tl.constexpr = len(taps)
    FIRST: tl.constexpr = first_output(K, STRIDE, BEFORE, BORDER)
    totals = ()
    for _ in tl.static_range(len(values[0])):
        totals = totals + (tl.full(values[0][0].shape, 0.0, values[0][0].dtype),)
    for d in tl.static_range(FIRST, end_output(M, K, STRIDE, BEFORE, AFTER, BORDER)):
        if may_read(M + BEFORE - STRIDE * d, K, BEFORE, AFTER, BORDER):
            weight = adjoint_weight(taps, h, n, M + BEFORE - STRIDE * d, M, BEFORE, AFTER, BORDER, SPAN, EXACT)
            sums = ()
            for e in tl.static_range(len(totals)):
                product = weight * values[d - FIRST][e]
                if not is_tap(M + BEFORE - STRIDE * d, K):
                    # Not even an infinite value is read where there is no image.
                    product = tl.where(weight != 0, product, 0.0)
                sums = sums + (totals[e] + product,)
            totals = sums
    return totals


@triton.jit
def adjoint_weight(
    taps, h, n,
    P: tl.constexpr, M: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    BORDER: tl.constexpr, SPAN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Tap P, where there is one, plus those on the images of h: the two mirror images, or all of the border replicated."""
    K: tl.constexpr = len(taps)
    weight = tl.full((1, 1), 0.0, taps[0].dtype)
    if is_tap(P, K):
        weight = taps[P]
    if BORDER == "reflect":
        for u in tl.static_range(1, BEFORE + 1):
            if is_tap(P - 2 * u, K) and may_be(u, M, SPAN):
                weight += tl.where(h == u, taps[P - 2 * u], 0.0)
        for u in tl.static_range(1, AFTER + 1):
            if is_tap(P + 2 * u, K) and (not EXACT or may_be(-1 - u, M, SPAN)):
                weight += tl.where(h == n - 1 - u, taps[P + 2 * u], 0.0)
    if BORDER == "replicate":
        for p in tl.static_range(K):
            if p < P and p >= P - BEFORE and may_be(0, M, SPAN):
                weight += tl.where(h == 0, taps[p], 0.0)
            if p > P and p <= P + AFTER and (not EXACT or may_be(-1, M, SPAN)):
                weight += tl.where(h == n - 1, taps[p], 0.0)
    return weight
