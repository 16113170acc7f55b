"""Of every channel how many pixels, their mean, and the sum of their squared distances from it: csrc/channel_moments.h.

x is read in packs of neighbours: channels of a pixel, or pixels of a channel. A program has a share of the packs'
positions for a block of channels, an element of its tile some pixels: it sums their differences from the first of them,
few to a sum, and merges the sums in float64. The moments of elements are merged in the program, those of shares after it,
all in one fixed order and without atomics.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import Operand, accumulator, launch

THREADS = 128
PROGRAMS = 132 * 8  # fill a large GPU
AHEAD = 4  # packs that a thread has on their way at once
LEAST = 64  # elements of a thread in a share: for less it is not worth while to merge another one
PIXELS_OF_SUM = 64  # the most that are summed in ACC


@triton.jit
def pack_at(x, position, column, inside, other, height, width, strides, SPAN: tl.constexpr, AXES: tl.constexpr):
    """The packs at these positions, of which AXES axes are left."""
    offset = column * strides[1]
    if AXES == 1:
        offset += position.to(tl.int64) * strides[3]
    else:
        w, position = position % width, position // width
        offset += w.to(tl.int64) * strides[3]
        if AXES == 2:
            offset += position.to(tl.int64) * strides[0]
        else:
            offset += (position % height).to(tl.int64) * strides[2] + (position // height).to(tl.int64) * strides[0]
    offset = tl.multiple_of(offset, (1, 1, SPAN)) + tl.arange(0, SPAN)[None, None, :]
    return tl.load(x + offset, mask=inside, other=other)


@triton.jit
def over_positions(value, CHANNELS_LAST: tl.constexpr):
    total = tl.sum(value, axis=0, keep_dims=True)
    return total if CHANNELS_LAST else tl.sum(total, axis=2, keep_dims=True)


@triton.jit(do_not_specialize=["positions", "share", "columns", "channels", "height", "width"])
def parts(
    x, dst, positions, share, columns, channels, height, width, strides,
    SPAN: tl.constexpr, CHANNELS_LAST: tl.constexpr, AXES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SUM: tl.constexpr, AHEAD: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dst[s, :, c] = the moments of the s-th share of channel c."""
    blocks = tl.cdiv(columns, COLS)
    s = (tl.program_id(0) // blocks).to(tl.int64 if WIDE else tl.int32)
    column = (tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)[None, :, None]).to(tl.int64)
    end = tl.minimum((s + 1) * share, positions)
    first = s * share + tl.arange(0, ROWS)[:, None, None]
    steps = tl.cdiv(tl.minimum(share, positions - s * share), ROWS).to(tl.int32)
    count = tl.zeros((ROWS, 1, 1), tl.float64)
    mean = tl.zeros((ROWS, COLS, SPAN), tl.float64)
    m2 = tl.zeros((ROWS, COLS, SPAN), tl.float64)
    for begin in range(0, steps, SUM):
        position = first + begin * ROWS
        inside = (position < end) & (column < columns)
        pivot = pack_at(x, position, column, inside, 0.0, height, width, strides, SPAN, AXES)
        total = tl.zeros((ROWS, COLS, SPAN), ACC)
        square = tl.zeros((ROWS, COLS, SPAN), ACC)
        for step in tl.range(begin, tl.minimum(begin + SUM, steps), loop_unroll_factor=AHEAD):
            position_here = first + step * ROWS
            inside = (position_here < end) & (column < columns)
            # What is not there is no further from the pivot than the pivot.
            pack = pack_at(x, position_here, column, inside, pivot, height, width, strides, SPAN, AXES)
            d = pack.to(ACC) - pivot.to(ACC)
            total += d
            square += d * d
        n = tl.minimum(tl.maximum(tl.cdiv(end - position, ROWS), 0), SUM).to(tl.float64)
        per = 1 / tl.maximum(n, 1.0)
        off = pivot.to(tl.float64) - mean + total.to(tl.float64) * per
        both = count + n
        weight = n / tl.maximum(both, 1.0)
        m2 += square.to(tl.float64) - total.to(tl.float64) * total.to(tl.float64) * per + off * off * (count * weight)
        mean += off * weight
        count = both
    whole = tl.sum(count, axis=0, keep_dims=True) * (1 if CHANNELS_LAST else SPAN)
    centre = over_positions(count * mean, CHANNELS_LAST) * (1 / whole)
    off = mean - centre
    spread = over_positions(m2 + count * (off * off), CHANNELS_LAST)
    if CHANNELS_LAST:
        c = column * SPAN + tl.arange(0, SPAN)[None, None, :]
    else:
        c = column
    row = dst + s.to(tl.int64) * 3 * channels + c
    tl.store(row, tl.broadcast_to(whole, centre.shape), mask=c < channels)
    tl.store(row + channels, centre, mask=c < channels)
    tl.store(row + 2 * channels, spread, mask=c < channels)


def _joined(outer: tuple[int, int], inner: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two axes, (size, stride) each, as one where the outer continues the inner."""
    if inner[0] == 1:
        return (1, 0), outer
    if outer[0] == 1 or outer[1] == inner[0] * inner[1]:
        return (1, 0), (outer[0] * inner[0], inner[1])
    return outer, inner


@functools.lru_cache(maxsize=1024)
def _plan(x: Operand, threads: int, most: int) -> tuple[int, int, dict[str, Any]]:
    """Shares, programs, and the arguments but for the tensors."""
    batch, (channels, c_stride), height, width = zip(x.shape, x.strides, strict=True)
    height, width = _joined(height, width)
    if height[0] == 1:
        batch, width = _joined(batch, width)
    channels_last = channels > 1 and c_stride < width[1]
    axes = (batch, (channels, c_stride), height, width)
    x = x._replace(shape=tuple(n for n, _ in axes), strides=tuple(s for _, s in axes))
    span = x.alignment(1 if channels_last else 3)
    if channels_last:
        columns, c_stride = channels // span, c_stride * span
    else:
        columns, width = channels, (width[0] // span, width[1] * span)
    positions = batch[0] * height[0] * width[0]
    cols = min(triton.next_power_of_2(columns), max(32 // span, 8)) if channels_last else 1
    rows, blocks = threads // cols, -(-columns // cols)
    shares = -(-most // blocks)
    share = max(-(-positions // shares // (rows * AHEAD)) * AHEAD, LEAST // span) * rows
    shares = -(-positions // share)
    return shares, shares * blocks, dict(
        positions=positions, share=share, columns=columns, channels=channels, height=height[0], width=width[0],
        strides=(batch[1], c_stride, height[1], width[1]), SPAN=span, CHANNELS_LAST=channels_last,
        AXES=3 if height[0] > 1 else 2 if batch[0] > 1 else 1,
        ROWS=rows, COLS=cols, SUM=PIXELS_OF_SUM, AHEAD=AHEAD, WIDE=positions + share >= 2**31, ACC=accumulator(x.dtype),
    )  # fmt: skip


def channel_moments(x):
    channels = x.shape[1]
    if not x.numel():
        return x.new_zeros((3, channels), dtype=torch.float64)
    shares, programs, arguments = _plan(Operand.of(x), THREADS, PROGRAMS)
    dst = x.new_empty((shares, 3, channels), dtype=torch.float64)
    launch(x.device, THREADS, parts, programs, dict(x=x, dst=dst) | arguments)
    if shares == 1:
        return dst[0]
    count, mean, m2 = dst.unbind(1)
    total = count.sum(0)
    whole = (count * mean).sum(0) / total
    return torch.stack([total, whole, (m2 + count * (mean - whole) ** 2).sum(0)])
