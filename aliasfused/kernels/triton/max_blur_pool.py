"""Affine, activation, dense maximum, then blur and subsample, and the gradients, as gathers:

    y = A z B^T,   with z out of x as in prologue.py
    du = act'(u) (the sum of A^T dy B over the windows that the pixel wins)
    dx = du scale_c + correction[0,c] + correction[1,c] (x - center_c)
    sums[:,c] = sum over (n h w) of du and of du (x - center_c)

Neither z nor its gradient reaches memory. Every element written is one sum in one fixed order, without atomics. The kernels
serve every size, window and filter alike: an element works out by itself all that it needs, and neighbours share nothing.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch._prims_common import suggest_memory_format

from .act import pulled_back, value
from .launch import Axis, Blur, Operand, accumulator, empty, launch, tile
from .prologue import Prologue, at, maximum, narrowed, plane_of, table_of, transformed
from .tile import place, store_row, tap
from .window import read, read_by

THREADS = 128
SHARES = 64
SIZES = ["channels", "height", "width", "z_height", "z_width", "out_height", "out_width"]
STEPS = ["steps_h", "steps_w", "ahead_h", "ahead_w"]


class Side(NamedTuple):
    """An axis of z: its length, and what ``read_by`` wants to know."""

    n: Any
    steps: Any
    ahead: Any


@triton.jit
def gradient(
    dy, x, affine, rows, cols, h, w, inside,
    PRE: tl.constexpr, BLUR: tl.constexpr, DY_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x - center, and du, at (h, w).

    Which of two pixels beats the other is the same in every window that has both. So of the windows in whose row a a pixel
    is, it wins those that reach no further to its left and right than it loses nothing, in its rows -a ... k_h - 1 - a.
    """
    K_H: tl.constexpr = PRE.kernel[0]
    K_W: tl.constexpr = PRE.kernel[1]
    TAPS_H: tl.constexpr = BLUR.taps_h
    TAPS_W: tl.constexpr = BLUR.taps_w
    BORDER: tl.constexpr = BLUR.border
    pixel, _ = at(x, h, w, inside, X_ALIGN, ACC)
    u = transformed(pixel, affine)
    v = value(u, PRE)
    left = tl.full(inside.shape, K_W - 1, tl.int32)
    right = left
    total = tl.zeros(inside.shape, ACC)
    for a in range(K_H):
        if K_H * K_W > 1:
            left, right = narrowed(left, right, x, affine, v, h, w, -a, inside, PRE, X_ALIGN, ACC)
        to_left, to_right = left, right
        for down in range(1, K_H - a):
            to_left, to_right = narrowed(to_left, to_right, x, affine, v, h, w, down, inside, PRE, X_ALIGN, ACC)
        i = h + (PRE.padding[2] - a)
        inside_i = inside & (i >= 0) & (i < rows.n)
        for step_h in range(rows.steps):
            out_h, p = read_by(
                i, step_h, rows.n, dy.height, BLUR.padding[2], rows.ahead, len(TAPS_H), BLUR.stride[0], BORDER
            )
            inside_h = inside_i & (out_h >= 0)
            if tl.max((inside_h & (to_left + to_right >= K_W - 1)).to(tl.int32)) > 0:
                total_w = tl.zeros(inside.shape, ACC)
                for b in range(K_W):
                    j = w + (PRE.padding[0] - b)
                    inside_w = inside_h & (j >= 0) & (j < cols.n)
                    part = tl.zeros(inside.shape, ACC)
                    for step_w in range(cols.steps):
                        out_w, q = read_by(
                            j, step_w, cols.n, dy.width, BLUR.padding[0], cols.ahead, len(TAPS_W), BLUR.stride[1], BORDER
                        )  # fmt: skip
                        cotangent, _ = at(dy, out_h, out_w, inside_w, DY_ALIGN, ACC)
                        part += tap(None, q, None, 0, 0, None, TAPS_W, ACC) * cotangent
                    # Not before: a vector of channels is loaded whole, whoever has won.
                    total_w += tl.where((b <= to_left) & (K_W - 1 - b <= to_right), part, 0.0)
                total += tap(None, p, None, 0, 0, None, TAPS_H, ACC) * total_w
    if len(affine) > 0:
        pixel -= affine[0]
    return pixel, pulled_back(u, total, PRE)


@triton.jit(do_not_specialize=["total", *SIZES])
def forward(
    x, y, affine, total, channels, height, width, z_height, z_width, out_height, out_width, x_strides, y_strides,
    PRE: tl.constexpr, BLUR: tl.constexpr, X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = A z B^T."""
    TAPS_H: tl.constexpr = BLUR.taps_h
    TAPS_W: tl.constexpr = BLUR.taps_w
    BORDER: tl.constexpr = BLUR.border
    ALIGN: tl.constexpr = max(X_ALIGN, Y_ALIGN)
    n, c, h, w, inside = place(total, channels, out_height, out_width, CHANNELS_LAST, ALIGN, ROWS, COLS, WIDE)
    table = table_of(affine, c, channels, 3, ACC)
    image = plane_of(x, n, c, x_strides, height, width)
    total_h = tl.zeros((ROWS, COLS), ACC)
    for p in range(len(TAPS_H)):
        i = read(h, p, z_height, BLUR.padding[2], BLUR.stride[0], BORDER)
        inside_h = inside & (i >= 0) & (i < z_height)
        total_w = tl.zeros((ROWS, COLS), ACC)
        for q in range(len(TAPS_W)):
            j = read(w, q, z_width, BLUR.padding[0], BLUR.stride[1], BORDER)
            inside_w = inside_h & (j >= 0) & (j < z_width)
            z = tl.where(inside_w, maximum(image, table, i, j, inside_w, PRE, X_ALIGN, ACC), 0.0)
            total_w += tap(None, q, None, 0, 0, None, TAPS_W, ACC) * z
        total_h += tap(None, p, None, 0, 0, None, TAPS_H, ACC) * total_w
    offset = n * y_strides[0] + c * y_strides[1] + h.to(tl.int64) * y_strides[2]
    store_row(y, offset, y_strides[3], w, out_width, inside, (total_h,), 1, Y_ALIGN, CHANNELS_LAST)


@triton.jit(do_not_specialize=["total", *SIZES, *STEPS])
def backward(
    dy, x, dx, affine, correction, total, channels, height, width, z_height, z_width, out_height, out_width,
    steps_h, steps_w, ahead_h, ahead_w, dy_strides, x_strides, dx_strides,
    PRE: tl.constexpr, BLUR: tl.constexpr, DY_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, DX_ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx = du scale + correction[0] + correction[1] (x - center)."""
    ALIGN: tl.constexpr = max(DY_ALIGN, X_ALIGN, DX_ALIGN)
    n, c, h, w, inside = place(total, channels, height, width, CHANNELS_LAST, ALIGN, ROWS, COLS, WIDE)
    table = table_of(affine, c, channels, 3, ACC)
    pixel, result = gradient(
        plane_of(dy, n, c, dy_strides, out_height, out_width), plane_of(x, n, c, x_strides, height, width), table,
        Side(z_height, steps_h, ahead_h), Side(z_width, steps_w, ahead_w), h, w, inside, PRE, BLUR, DY_ALIGN, X_ALIGN, ACC,
    )  # fmt: skip
    if affine is not None:
        result *= table[1]
    if correction is not None:
        mending = table_of(correction, c, channels, 2, ACC)
        result += mending[0] + mending[1] * pixel
    offset = n * dx_strides[0] + c * dx_strides[1] + h.to(tl.int64) * dx_strides[2]
    store_row(dx, offset, dx_strides[3], w, width, inside, (result,), 1, DX_ALIGN, CHANNELS_LAST)


@triton.jit(do_not_specialize=["positions", *SIZES, *STEPS])
def sums(
    dy, x, dst, affine, positions, channels, height, width, z_height, z_width, out_height, out_width,
    steps_h, steps_w, ahead_h, ahead_w, dy_strides, x_strides,
    PRE: tl.constexpr, BLUR: tl.constexpr, SHARES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dst[s, :, c] = the sums of du and of du (x - center) over the s-th share of (n h w)."""
    pid = tl.program_id(0)
    share = pid % SHARES
    c = (pid // SHARES * COLS + tl.arange(0, COLS)[None, :]).to(tl.int64)
    table = table_of(affine, c, channels, 3, ACC)
    total = tl.zeros((ROWS, COLS), ACC)
    moment = tl.zeros((ROWS, COLS), ACC)
    for step in range(tl.cdiv(positions.to(tl.int64), SHARES * ROWS)):
        position = (step * SHARES + share).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (position < positions) & (c < channels)
        h, w = (position // width % height).to(tl.int32), (position % width).to(tl.int32)
        n = position // width // height
        pixel, du = gradient(
            plane_of(dy, n, c, dy_strides, out_height, out_width), plane_of(x, n, c, x_strides, height, width), table,
            Side(z_height, steps_h, ahead_h), Side(z_width, steps_w, ahead_w), h, w, inside, PRE, BLUR, 1, 1, ACC,
        )  # fmt: skip
        total += tl.where(inside, du, 0.0)
        moment += tl.where(inside, du * pixel, 0.0)
    row = dst + share * 2 * channels + c
    tl.store(row, tl.sum(total, axis=0)[None, :], mask=c < channels)
    tl.store(row + channels, tl.sum(moment, axis=0)[None, :], mask=c < channels)


def told(rest) -> tuple[Prologue, Blur]:
    """The arguments that follow the tensors, hashable."""
    values: list[Any] = [value if isinstance(value, str) else tuple(value) for value in rest]
    return Prologue(*values[:4]), Blur(*values[4:])


def axes(x, pre: Prologue, blur: Blur) -> tuple[Axis, Axis]:
    left, right, top, bottom = pre.padding
    return blur.axes(x.shape[2] + top + bottom + 1 - pre.kernel[0], x.shape[3] + left + right + 1 - pre.kernel[1])


def _common(x: Operand, pre: Prologue, blur: Blur, adjoint: bool) -> dict[str, Any]:
    rows, cols = axes(x, pre, blur)
    arguments = dict(
        channels=x.shape[1], height=x.shape[2], width=x.shape[3], z_height=rows.n, z_width=cols.n, out_height=rows.out,
        out_width=cols.out, x_strides=x.strides, PRE=pre, BLUR=blur, ACC=accumulator(x.dtype),
    )  # fmt: skip
    if adjoint:
        (steps_h, ahead_h), (steps_w, ahead_w) = rows.steps(blur.border, True), cols.steps(blur.border, True)
        arguments |= dict(steps_h=steps_h, steps_w=steps_w, ahead_h=ahead_h, ahead_w=ahead_w)
    return arguments


@functools.lru_cache(maxsize=1024)
def _plan(x: Operand, y: Operand, dx: Operand | None, pre: Prologue, blur: Blur, channels_last: bool, threads: int):
    """Programs and arguments, but for the tensors, of ``forward``; where there is a dx, of ``backward``, and y is dy."""
    operands = dict(x=x, y=y) if dx is None else dict(x=x, dy=y, dx=dx)
    align = {f"{name.upper()}_ALIGN": t.alignment(1) if channels_last else 1 for name, t in operands.items()}
    batch, channels, height, width = (y if dx is None else dx).shape
    if channels_last:
        programs, tiling = tile(batch * height * width, channels, threads * max(align.values()))
    else:
        programs, tiling = tile(batch * channels * height, width, threads)
    strides = {f"{name}_strides": t.strides for name, t in operands.items()}
    arguments = _common(x, pre, blur, dx is not None) | align | tiling | strides
    return programs, arguments | dict(CHANNELS_LAST=channels_last)


def max_blur_pool_fwd(x, affine, *rest):
    pre, blur = told(rest)
    channels_last = suggest_memory_format(x) is torch.channels_last
    rows, cols = axes(x, pre, blur)
    y = empty(x, rows.out, cols.out, channels_last)
    if y.numel():
        programs, arguments = _plan(Operand.of(x), Operand.of(y), None, pre, blur, channels_last, THREADS)
        affine = None if affine is None else affine.contiguous()
        launch(x.device, THREADS, forward, programs, dict(x=x, y=y, affine=affine) | arguments)
    return y


def max_blur_pool_bwd(dy, x, affine, correction, *rest):
    pre, blur = told(rest)
    channels_last = suggest_memory_format(x) is torch.channels_last
    dx = empty(x, x.shape[2], x.shape[3], channels_last)
    if dx.numel():
        operands = Operand.of(x), Operand.of(dy), Operand.of(dx)
        programs, arguments = _plan(*operands, pre, blur, channels_last, THREADS)
        affine, correction = (None if t is None else t.contiguous() for t in (affine, correction))
        tensors = dict(dy=dy, x=x, dx=dx, affine=affine, correction=correction)
        launch(x.device, THREADS, backward, programs, tensors | arguments)
    return dx


def max_blur_pool_sums(dy, x, affine, *rest):
    batch, channels, height, width = x.shape
    like = x.new_empty(0, dtype=torch.float64 if x.dtype is torch.float64 else torch.float32)
    if not dy.numel():
        return like.new_zeros((2, channels))
    # As in blur_pool_taps_grad: a program sums a share of the positions, for a block of channels.
    rows, cols = (THREADS // 32, 32) if suggest_memory_format(x) is torch.channels_last else (4 * THREADS, 1)
    positions = batch * height * width
    shares = min(-(-positions // rows), SHARES)
    partial = like.new_empty((shares, 2, channels))
    affine = None if affine is None else affine.contiguous()
    arguments = dict(
        dy=dy, x=x, dst=partial, affine=affine, positions=positions, dy_strides=dy.stride(), SHARES=shares, ROWS=rows, COLS=cols
    ) | _common(Operand.of(x), *told(rest), True)  # fmt: skip
    launch(x.device, THREADS, sums, -(-channels // cols) * shares, arguments)
    return partial.sum(0)
