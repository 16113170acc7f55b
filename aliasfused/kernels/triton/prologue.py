"""What a map is made into before it is blurred, z out of x, and which pixels win: csrc/cpu/prologue.h for Triton.

    u = (x - center_c) scale_c + shift_c,   v = act(u),   z[i,j] = the maximum of v over a window, -inf beyond the border of v

Nothing of this is kept: a pixel of v is worked out wherever it is wanted. Tables, the affine (center, scale, shift) among
them, are tuples of numbers of each channel, empty where there is none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .act import value
from .tile import all_taps


class Prologue(NamedTuple):
    """Compile-time constants."""

    act: str
    numbers: tuple[float, ...]
    kernel: tuple[int, int]
    padding: tuple[int, int, int, int]  # left, right, top, bottom


class Plane(NamedTuple):
    """Of each element of a tile its image and channel of a tensor."""

    pointer: Any
    offset: Any
    h_stride: Any
    w_stride: Any
    height: Any
    width: Any


@triton.jit
def plane_of(x, n, c, strides, height, width):
    return Plane(x, n * strides[0] + c * strides[1], strides[2], strides[3], height, width)


@triton.jit
def at(plane, h, w, inside, ALIGN: tl.constexpr, ACC: tl.constexpr):
    """Pixels (h, w), zero where there is none, and whether there is one."""
    inside = inside & (h >= 0) & (h < plane.height) & (w >= 0) & (w < plane.width)
    offset = plane.offset + h.to(tl.int64) * plane.h_stride + w.to(tl.int64) * plane.w_stride
    if ALIGN > 1:
        offset = tl.multiple_of(offset, (1, ALIGN))
    return tl.load(plane.pointer + offset, mask=inside, other=0.0).to(ACC), inside


@triton.jit
def table_of(numbers, channel, channels, ROWS: tl.constexpr, ACC: tl.constexpr):
    """From a tensor (ROWS, C), or from None."""
    if numbers is None:
        return ()
    else:
        return all_taps(numbers, channel, 1, channels, channels, None, ROWS, ACC)


@triton.jit
def transformed(pixel, affine):
    """u."""
    if len(affine) > 0:
        pixel = (pixel - affine[0]) * affine[1] + affine[2]
    return pixel


@triton.jit
def beats(v, best):
    """Of equals the first wins; a nan beats all, the last one all others."""
    return (v > best) | (v != v)


@triton.jit
def maximum(x, affine, i, j, inside, PRE: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr):
    """z[i, j]."""
    best = tl.full(inside.shape, float("-inf"), ACC)
    for a in range(PRE.kernel[0]):
        for b in range(PRE.kernel[1]):
            pixel, there = at(x, i + (a - PRE.padding[2]), j + (b - PRE.padding[0]), inside, ALIGN, ACC)
            v = value(transformed(pixel, affine), PRE)
            best = tl.where(there & beats(v, best), v, best)
    return best


@triton.jit
def narrowed(left, right, x, affine, v, h, w, down, inside, PRE: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr):
    """To how many columns on its left and right pixel (h, w), of value v, loses nothing: row h + down counts from now on."""
    for along in range(1 - PRE.kernel[1], PRE.kernel[1]):
        pixel, there = at(x, h + down, w + along, inside & ((down != 0) | (along != 0)), ALIGN, ACC)
        other = value(transformed(pixel, affine), PRE)
        earlier = (down < 0) | ((down == 0) & (along < 0))
        lost = there & tl.where(earlier, ~beats(v, other), beats(other, v))
        left = tl.where(lost & (along <= 0), tl.minimum(left, -along - 1), left)
        right = tl.where(lost & (along >= 0), tl.minimum(right, along - 1), right)
    return left, right
