"""What the kernels of a blur by predicted filters are made of: chunks of channels, what a tap reads, weights out of logits.

An element of a tile is a chunk, a few channels of a group at a pixel, so that a weight is worked out once for all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .window import source


class Filter(NamedTuple):
    """Compile-time constants."""

    k: int
    stride: tuple[int, int]
    border: str
    near: bool  # no tap lies further beyond a border than one reflection or one turn
    softmax: bool
    unrolled: int  # logits of the softmax, or none
    at_once: int  # taps that are unrolled: all, a row of them, or one


class Layout(NamedTuple):
    """Compile-time constants: a chunk's channels, whether every chunk has as many, whether they are neighbours in memory."""

    span: int
    whole: bool
    channels_last: bool


class Map(NamedTuple):
    pointer: Any
    strides: Any
    height: Any
    width: Any


@triton.jit
def at(n, c, h, w, strides):
    return n * strides[0] + c * strides[1] + h.to(tl.int64) * strides[2] + w.to(tl.int64) * strides[3]


@triton.jit
def chunk_of(column, per, each, LAYOUT: tl.constexpr):
    """The chunk's group, its first channel, and how many are left of the group."""
    column = column.to(tl.int32)
    group, ahead = column // per, column % per * LAYOUT.span
    return group.to(tl.int64), group.to(tl.int64) * each + ahead, each - ahead


@triton.jit
def deep(t, LAYOUT: tl.constexpr):
    """A tile with an axis more, of a chunk's channels: the last one where they are neighbours, else one that threads do not share."""
    if LAYOUT.channels_last:
        return t[:, :, None]
    else:
        return t[None, :, :]


@triton.jit
def zeros(inside, LAYOUT: tl.constexpr, ACC: tl.constexpr):
    """Of every channel of a tile."""
    ROWS: tl.constexpr = inside.shape[0]
    COLS: tl.constexpr = inside.shape[1]
    SPAN: tl.constexpr = LAYOUT.span
    if LAYOUT.channels_last:
        return tl.zeros((ROWS, COLS, SPAN), ACC)
    else:
        return tl.zeros((SPAN, ROWS, COLS), ACC)


@triton.jit
def channels_at(offset, left, inside, step, LAYOUT: tl.constexpr, ALIGN: tl.constexpr):
    """Where the channels of a chunk lie, the first one at ``offset``, and whether they exist."""
    if LAYOUT.channels_last:
        channel = tl.arange(0, LAYOUT.span)[None, None, :]
    else:
        channel = tl.arange(0, LAYOUT.span)[:, None, None]
    inside = deep(inside, LAYOUT)
    if not LAYOUT.whole:
        inside &= channel < deep(left, LAYOUT)
    offset = deep(offset, LAYOUT) + channel.to(tl.int64) * step
    if ALIGN > 1:
        offset = tl.multiple_of(offset, (1, 1, ALIGN))
    return offset, inside


@triton.jit
def load(x, n, first, h, w, left, inside, LAYOUT: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr):
    offset, inside = channels_at(at(n, first, h, w, x.strides), left, inside, x.strides[1], LAYOUT, ALIGN)
    return tl.load(x.pointer + offset, mask=inside, other=0.0).to(ACC)


@triton.jit
def store(y, strides, n, first, h, w, left, inside, value, LAYOUT: tl.constexpr, ALIGN: tl.constexpr):
    offset, inside = channels_at(at(n, first, h, w, strides), left, inside, strides[1], LAYOUT, ALIGN)
    tl.store(y + offset, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def shown(
    x, n, first, h, w, t, left, inside, FILTER: tl.constexpr, LAYOUT: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """What tap t of outputs (h, w) reads."""
    RADIUS: tl.constexpr = FILTER.k // 2
    BORDER: tl.constexpr = FILTER.border
    i = source(h * FILTER.stride[0] + (t // FILTER.k - RADIUS), x.height, BORDER, FILTER.near)
    j = source(w * FILTER.stride[1] + (t % FILTER.k - RADIUS), x.width, BORDER, FILTER.near)
    inside = inside & (i >= 0) & (i < x.height) & (j >= 0) & (j < x.width)
    return load(x, n, first, i, j, left, inside, LAYOUT, ALIGN, ACC)


@triton.jit
def ahead_of(t, step):
    """How far from the first of them the t-th logit lies."""
    return tl.full((), t, tl.int64) * step


@triton.jit
def softmax(first, count, step, inside, UNROLLED: tl.constexpr, ACC: tl.constexpr):
    """The maximum and one over the sum of so many logits."""
    most = tl.full(inside.shape, float("-inf"), ACC)
    total = tl.zeros(inside.shape, ACC)
    if UNROLLED > 0:
        for t in tl.static_range(UNROLLED):
            most = tl.maximum(most, tl.load(first + ahead_of(t, step), mask=inside, other=0.0).to(ACC))
        for t in tl.static_range(UNROLLED):
            total += tl.exp(tl.load(first + ahead_of(t, step), mask=inside, other=0.0).to(ACC) - most)
    else:
        for t in range(count):
            most = tl.maximum(most, tl.load(first + ahead_of(t, step), mask=inside, other=0.0).to(ACC))
        for t in range(count):
            total += tl.exp(tl.load(first + ahead_of(t, step), mask=inside, other=0.0).to(ACC) - most)
    return most, 1.0 / total


@triton.jit
def filters_at(
    logits, most, scale, n, group, h, w, inside, strides, table_strides, FILTER: tl.constexpr, ACC: tl.constexpr
):
    """Of outputs (h, w): where their logits begin, and what makes weights of these, from the tables where there are any."""
    TAPS: tl.constexpr = FILTER.k * FILTER.k
    first = logits + at(n, group * TAPS, h, w, strides)
    if not FILTER.softmax:
        return first, 0.0, 1.0
    elif most is None:
        maximum, rate = softmax(first, TAPS, strides[1], inside, FILTER.unrolled, ACC)
        return first, maximum, rate
    else:
        place = at(n, group, h, w, table_strides)
        return first, tl.load(most + place, mask=inside, other=0.0), tl.load(scale + place, mask=inside, other=0.0)


@triton.jit
def weight(logit, most, scale, inside, FILTER: tl.constexpr, ACC: tl.constexpr):
    value = tl.load(logit, mask=inside, other=0.0).to(ACC)
    return tl.exp(value - most) * scale if FILTER.softmax else value
