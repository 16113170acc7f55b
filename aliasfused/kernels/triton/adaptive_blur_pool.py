"""Blur by predicted filters and subsample, and the gradients, as gathers: csrc/adaptive_blur_pool.h.

    y[n,c,i,j]       = sum_p sum_q w[n,g,p,q,i,j] x~[n,c, s_h i + p - r, s_w j + q - r]
    dx               = sum over the outputs that read a pixel, of w dy
    dw[n,g,p,q,i,j]  = sum over the channels c of g, of dy[n,c,i,j] x~[n,c, s_h i + p - r, s_w j + q - r]
    dlogits          = w (dw - mean), the mean the sum of w dw over the softmax;  dw where there is none

No filter is ever in memory: a weight is worked out of its logit where it is wanted, once for a chunk of channels. Where many
want weights of one softmax, a table has its maximum and one over its sum. Every element written is one sum in one fixed order,
without atomics.
"""

# mypy: disable-error-code="assignment"
# (kernels grow tuples, which the kernel language types one by one)

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch._prims_common import suggest_memory_format

from .adaptive_filters import (
    Filter,
    Layout,
    Map,
    ahead_of,
    at,
    chunk_of,
    deep,
    filters_at,
    load,
    shown,
    softmax,
    store,
    weight,
    zeros,
)
from .launch import VECTOR_BYTES, Operand, accumulator, empty, launch, tile
from .tile import place
from .window import source

THREADS = 128
CHANNELS = 8  # of a chunk, at most
UNROLLED = 25  # logits of a softmax, at most; more of them are a loop
SIZES = ["total", "height", "width", "out_height", "out_width", "columns", "per", "each"]


@triton.jit(do_not_specialize=["total", "columns", "out_height", "out_width", "count"])
def softmaxes(
    logits, most, scale, total, columns, out_height, out_width, count, logits_strides, table_strides,
    UNROLLED: tl.constexpr, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The tables: of every group of every output, or of all of its groups together, which then are one column."""
    n, group, h, w, inside = place(total, columns, out_height, out_width, CHANNELS_LAST, 1, ROWS, COLS, WIDE)
    maximum, rate = softmax(
        logits + at(n, group * count, h, w, logits_strides), count, logits_strides[1], inside, UNROLLED, ACC
    )
    tl.store(most + at(n, group, h, w, table_strides), maximum, mask=inside)
    tl.store(scale + at(n, group, h, w, table_strides), rate, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def forward(
    x, y, logits, most, scale, total, height, width, out_height, out_width, columns, per, each,
    x_strides, y_strides, logits_strides, table_strides, FILTER: tl.constexpr, LAYOUT: tl.constexpr, X_ALIGN: tl.constexpr,
    Y_ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y."""
    AT_ONCE: tl.constexpr = FILTER.at_once
    n, column, h, w, inside = place(total, columns, out_height, out_width, LAYOUT.channels_last, 1, ROWS, COLS, WIDE)
    group, first, left = chunk_of(column, per, each, LAYOUT)
    source_map = Map(x, x_strides, height, width)
    logit, maximum, rate = filters_at(
        logits, most, scale, n, group, h, w, inside, logits_strides, table_strides, FILTER, ACC
    )
    result = zeros(inside, LAYOUT, ACC)
    for begin in range(0, FILTER.k * FILTER.k, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            pixel = shown(source_map, n, first, h, w, begin + i, left, inside, FILTER, LAYOUT, X_ALIGN, ACC)
            w_t = weight(logit + ahead_of(begin + i, logits_strides[1]), maximum, rate, inside, FILTER, ACC)
            result += deep(w_t, LAYOUT) * pixel
    store(y, y_strides, n, first, h, w, left, inside, result, LAYOUT, Y_ALIGN)


@triton.constexpr_function
def direct(k, stride):
    """How many outputs may read a pixel where it lies."""
    return (k - 1) // stride + 1


@triton.constexpr_function
def beyond(k, stride, border):
    """How many (output, tap) pairs ``reader`` tries beyond one border."""
    return 0 if border == "zeros" else ((k // 2 - 1) // stride + 1) * (k // 2)


@triton.jit
def readers(h, n, inside, K: tl.constexpr, STRIDE: tl.constexpr, BORDER: tl.constexpr):
    """How many pairs to try for these indices: what lies beyond a border is shown near it."""
    near = inside & ((h <= K // 2) | (h >= n - 1 - K // 2))
    return direct(K, STRIDE) + 2 * beyond(K, STRIDE, BORDER) * tl.max(near.to(tl.int32))


@triton.jit
def reader(h, z, n, out, K: tl.constexpr, STRIDE: tl.constexpr, BORDER: tl.constexpr):
    """The z-th (output, tap) that reads index h of x; the output is negative where there is none.

    First those that read it where it lies; then all that read beyond the border ahead, and behind, if that shows h.
    """
    RADIUS: tl.constexpr = K // 2
    BEYOND: tl.constexpr = beyond(K, STRIDE, BORDER)
    o, p = (h + RADIUS) // STRIDE - z, (h + RADIUS) % STRIDE + STRIDE * z
    o = tl.where((o < out) & (p < K), o, -1)
    if BEYOND > 0:
        z -= direct(K, STRIDE)
        behind = z >= BEYOND
        o_far, p_far = z % BEYOND // RADIUS, z % RADIUS
        o_far, p_far = tl.where(behind, out - 1 - o_far, o_far), tl.where(behind, K - 1 - p_far, p_far)
        t = o_far * STRIDE + p_far - RADIUS
        real = tl.where(behind, t >= n, t < 0) & (o_far < out) & (source(t, n, BORDER, False) == h)
        o, p = tl.where(z < 0, o, tl.where(real, o_far, -1)), tl.where(z < 0, p, p_far)
    return o, p


@triton.jit(do_not_specialize=SIZES)
def backward(
    dy, dx, logits, most, scale, total, height, width, out_height, out_width, columns, per, each,
    x_strides, y_strides, logits_strides, table_strides, FILTER: tl.constexpr, LAYOUT: tl.constexpr, X_ALIGN: tl.constexpr,
    Y_ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx."""
    K: tl.constexpr = FILTER.k
    BORDER: tl.constexpr = FILTER.border
    n, column, h, w, inside = place(total, columns, height, width, LAYOUT.channels_last, 1, ROWS, COLS, WIDE)
    group, first, left = chunk_of(column, per, each, LAYOUT)
    source_map = Map(dy, y_strides, out_height, out_width)
    result = zeros(inside, LAYOUT, ACC)
    steps_w = readers(w, width, inside, K, FILTER.stride[1], BORDER)
    for step_h in range(readers(h, height, inside, K, FILTER.stride[0], BORDER)):
        i, p = reader(h, step_h, height, out_height, K, FILTER.stride[0], BORDER)
        for step_w in range(steps_w):
            j, q = reader(w, step_w, width, out_width, K, FILTER.stride[1], BORDER)
            reads = inside & (i >= 0) & (j >= 0)
            logit, maximum, rate = filters_at(
                logits, most, scale, n, group, i, j, reads, logits_strides, table_strides, FILTER, ACC
            )
            w_t = weight(logit + (p * K + q).to(tl.int64) * logits_strides[1], maximum, rate, reads, FILTER, ACC)
            result += deep(w_t, LAYOUT) * load(source_map, n, first, i, j, left, reads, LAYOUT, Y_ALIGN, ACC)
    store(dx, x_strides, n, first, h, w, left, inside, result, LAYOUT, X_ALIGN)


@triton.jit
def correlations(
    x, dy, n, group, h, w, begin, per, each, inside,
    FILTER: tl.constexpr, LAYOUT: tl.constexpr, X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dw of the taps from ``begin`` on, as a tuple."""
    AT_ONCE: tl.constexpr = FILTER.at_once
    AXIS: tl.constexpr = 2 if LAYOUT.channels_last else 0
    totals = ()
    for _ in tl.static_range(AT_ONCE):
        totals = totals + (tl.zeros(inside.shape, ACC),)
    for chunk in range(per):
        first, left = group * each + chunk * LAYOUT.span, tl.full(inside.shape, each - chunk * LAYOUT.span, tl.int32)
        results = load(dy, n, first, h, w, left, inside, LAYOUT, Y_ALIGN, ACC)
        sums = ()
        for i in tl.static_range(AT_ONCE):
            pixel = shown(x, n, first, h, w, begin + i, left, inside, FILTER, LAYOUT, X_ALIGN, ACC)
            sums = sums + (totals[i] + tl.sum(results * pixel, axis=AXIS),)
        totals = sums
    return totals


@triton.jit(do_not_specialize=SIZES)
def logits_gradient(
    dy, x, dst, logits, most, scale, mean, total, height, width, out_height, out_width, columns, per, each,
    x_strides, y_strides, dst_strides, all_strides, logits_strides, table_strides, mean_strides, FILTER: tl.constexpr,
    LAYOUT: tl.constexpr, SPAN: tl.constexpr, X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dlogits, with the mean of a group's own taps where none is given; where there is no dst, the group's part of the mean.

    An output has SPAN rows and columns of dlogits, of which all elements but the first are zero.
    """
    TAPS: tl.constexpr = FILTER.k * FILTER.k
    AT_ONCE: tl.constexpr = FILTER.at_once
    n, group, h, w, inside = place(total, columns, out_height, out_width, LAYOUT.channels_last, 1, ROWS, COLS, WIDE)
    images, results = Map(x, x_strides, height, width), Map(dy, y_strides, out_height, out_width)
    logit, maximum, rate = filters_at(
        logits, most, scale, n, group, h, w, inside, logits_strides, table_strides, FILTER, ACC
    )
    if AT_ONCE == TAPS:
        dw = correlations(images, results, n, group, h, w, 0, per, each, inside, FILTER, LAYOUT, X_ALIGN, Y_ALIGN, ACC)
    own = tl.zeros(inside.shape, ACC)
    if FILTER.softmax and (mean is None or dst is None):
        for begin in range(0, TAPS, AT_ONCE):
            if AT_ONCE < TAPS:
                dw = correlations(
                    images, results, n, group, h, w, begin, per, each, inside, FILTER, LAYOUT, X_ALIGN, Y_ALIGN, ACC
                )
            for i in tl.static_range(AT_ONCE):
                own += (
                    weight(logit + ahead_of(begin + i, logits_strides[1]), maximum, rate, inside, FILTER, ACC) * dw[i]
                )
    if dst is None:
        tl.store(mean + at(n, group, h, w, mean_strides), own, mask=inside)
    else:
        if mean is not None:
            own = tl.load(mean + at(n, group, h, w, mean_strides), mask=inside, other=0.0)
        row = dst + at(n, group * TAPS, h, w, dst_strides)
        for begin in range(0, TAPS, AT_ONCE):
            if AT_ONCE < TAPS:
                dw = correlations(
                    images, results, n, group, h, w, begin, per, each, inside, FILTER, LAYOUT, X_ALIGN, Y_ALIGN, ACC
                )
            for i in tl.static_range(AT_ONCE):
                value = dw[i]
                if FILTER.softmax:
                    w_t = weight(logit + ahead_of(begin + i, logits_strides[1]), maximum, rate, inside, FILTER, ACC)
                    value = w_t * (value - own)
                tl.store(row + ahead_of(begin + i, dst_strides[1]), value.to(dst.dtype.element_ty), mask=inside)
        for e in range(1, SPAN[0] * SPAN[1]):
            i, j = h * SPAN[0] + e // SPAN[1], w * SPAN[1] + e % SPAN[1]
            between = inside & (i < height) & (j < width)
            zero = tl.zeros(inside.shape, dst.dtype.element_ty)
            for t in range(TAPS):
                tl.store(dst + at(n, group * TAPS + t, i, j, all_strides), zero, mask=between)


def _tiles(size, columns: int, channels_last: bool, threads: int) -> tuple[int, dict[str, Any]]:
    """Of the pixels of a map of this size, and ``columns`` of each."""
    batch, _, height, width = size
    if channels_last:
        programs, arguments = tile(batch * height * width, columns, threads)
    else:
        programs, arguments = tile(batch * columns * height, width, threads)
    return programs, arguments | dict(columns=columns)


@functools.lru_cache(maxsize=1024)
def _plan(dst: str, x: Operand, y: Operand, logits: Operand, args, channels_last: bool, threads: int):
    """Programs and arguments, but for the tensors, of the kernel that makes y, dx or dlogits; x may be dx, and y dy."""
    k, stride, groups, normalize, border = args
    near = border in ("replicate", "zeros") or k // 2 < min(x.shape[2:]) + (border == "circular")
    each = x.shape[1] // groups
    # Chunks are vectors, or else as many channels as there may be.
    span = min(VECTOR_BYTES // x.dtype.itemsize, each & -each)
    x_align, y_align = (min(t.alignment(1), span) if channels_last else 1 for t in (x, y))
    if x_align == y_align == 1:
        span = min(CHANNELS, triton.next_power_of_2(each))
    per = -(-each // span)
    columns = groups if dst == "dlogits" else groups * per
    programs, tiling = _tiles((x if dst == "dx" else y).shape, columns, channels_last, threads)
    at_once = k * k if k <= 3 else k if k <= 7 else 1
    return programs, tiling | dict(
        height=x.shape[2], width=x.shape[3], out_height=y.shape[2], out_width=y.shape[3], per=per, each=each,
        x_strides=x.strides, y_strides=y.strides, logits_strides=logits.strides, X_ALIGN=x_align, Y_ALIGN=y_align,
        FILTER=Filter(k, stride, border, near, normalize != "none", k * k if k * k <= UNROLLED else 0, at_once),
        LAYOUT=Layout(span, each % span == 0, channels_last), ACC=accumulator(x.dtype),
    )  # fmt: skip


def _kept(logits: torch.Tensor, size, stride) -> tuple[torch.Tensor, tuple[int, int]]:
    """The logits of the outputs where they lie, and how far apart: those of x's size are of all positions."""
    s_h, s_w = stride if tuple(logits.shape[2:]) == tuple(size) else (1, 1)
    return logits[:, :, ::s_h, ::s_w], (s_h, s_w)


def _numbers(logits: torch.Tensor, columns: int) -> torch.Tensor:
    """(N, columns, H', W') in the accumulator's dtype, in the memory format of logits."""
    batch, _, height, width = logits.shape
    memory_format = suggest_memory_format(logits)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.empty((batch, columns, height, width), dtype=dtype, device=logits.device, memory_format=memory_format)


def _tables(logits: torch.Tensor, groups: int, normalize: str) -> dict[str, Any]:
    """Of every group of every output the maximum, and one over the sum, of its softmax."""
    columns = groups if normalize == "group" else 1
    count = logits.shape[1] // columns
    most, scale = (_numbers(logits, columns) for _ in range(2))
    channels_last = suggest_memory_format(logits) is torch.channels_last
    programs, arguments = _tiles(logits.shape, columns, channels_last, THREADS)
    arguments |= dict(
        logits=logits, most=most, scale=scale, out_height=logits.shape[2], out_width=logits.shape[3], count=count,
        logits_strides=logits.stride(), table_strides=most.stride(), UNROLLED=count if count <= UNROLLED else 0,
        CHANNELS_LAST=channels_last, ACC=accumulator(logits.dtype),
    )  # fmt: skip
    launch(logits.device, THREADS, softmaxes, programs, arguments)
    shape = logits.shape[0], groups, *logits.shape[2:]
    return dict(most=most, scale=scale, table_strides=most.expand(shape).stride())


NO_TABLES = dict(most=None, scale=None, table_strides=None)


def _run(kernel, dst: str, x, y, logits, rest, channels_last: bool, tensors: dict[str, Any]) -> None:
    k, stride, groups, normalize, pad_mode = rest
    operands = Operand.of(x), Operand.of(y), Operand.of(logits)
    args = k, tuple(stride), groups, normalize, pad_mode
    programs, arguments = _plan(dst, *operands, args, channels_last, THREADS)
    launch(x.device, THREADS, kernel, programs, dict(logits=logits) | tensors | arguments)


def adaptive_blur_pool_fwd(x, logits, *rest):
    stride, groups, normalize = rest[1:4]
    logits, _ = _kept(logits, x.shape[2:], stride)
    channels_last = suggest_memory_format(x) is torch.channels_last
    y = empty(x, logits.shape[2], logits.shape[3], channels_last)
    if y.numel():
        tables = _tables(logits, groups, normalize) if normalize == "joint" else NO_TABLES
        _run(forward, "y", x, y, logits, rest, channels_last, dict(x=x, y=y) | tables)
    return y


def adaptive_blur_pool_bwd(dy, logits, *rest):
    *rest, height, width, channels_last = rest
    stride, groups, normalize = rest[1:4]
    logits, _ = _kept(logits, (height, width), stride)
    dx = empty(dy, height, width, channels_last)
    if dx.numel():
        tables = NO_TABLES if normalize == "none" else _tables(logits, groups, normalize)
        _run(backward, "dx", dx, dy, logits, rest, channels_last, dict(dy=dy, dx=dx) | tables)
    return dx


def adaptive_blur_pool_logits_grad(dy, x, logits, *rest):
    stride, groups, normalize = rest[1:4]
    dlogits = empty(logits, logits.shape[2], logits.shape[3], suggest_memory_format(logits) is torch.channels_last)
    if not dy.numel():
        return dlogits.zero_()
    logits, span = _kept(logits, x.shape[2:], stride)
    dst, _ = _kept(dlogits, x.shape[2:], stride)
    channels_last = suggest_memory_format(x) is torch.channels_last
    run = functools.partial(_run, logits_gradient, "dlogits", x, dy, logits, rest, channels_last)
    tensors = dict(dy=dy, x=x, dst=dst, dst_strides=dst.stride(), all_strides=dlogits.stride(), SPAN=span)
    if normalize != "joint":
        run(tensors | NO_TABLES | dict(mean=None, mean_strides=None))
        return dlogits
    tensors |= _tables(logits, groups, normalize)
    parts = _numbers(logits, groups)
    run(tensors | dict(dst=None, dst_strides=None, mean=parts, mean_strides=parts.stride()))
    mean = parts.sum(1, keepdim=True).expand_as(parts)
    run(tensors | dict(mean=mean, mean_strides=mean.stride()))
    return dlogits
