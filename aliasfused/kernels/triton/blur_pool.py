"""Blur and subsample, and the adjoint, as gathers: every element written is one sum in one fixed order, without atomics.

    y = A x B^T,   dx = A^T dy B     (A, B: the matrices of the two axes, see window.py)

``patch`` does the common case, strides of 1 and 2 with up to 8 taps: a thread owns a patch of the result, filters each row
it reads along W once, and sums those along H. Where W is contiguous a row of the patch is one vector; where C is, every
pixel is a vector of channels. ``gather`` does every other case, ``taps_grad`` the gradient of tensor taps.

Taps that are numbers are compile-time constants, however many: no memory is read for them, and another row of numbers is
another kernel.
``PRE(value, channel)`` is applied to each pixel as it is loaded.
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

from .launch import Axis, Operand, accumulator, empty, launch, span, tile
from .tile import all_taps, identity, load, load_row, place, store_row, tap
from .window import adjoint_sum, blur_sum, end_output, first_output, read, read_by, source

THREADS = 128
SHARES = 64
# How many rows of y, or of pairs of rows of dx, a thread owns, and where C is contiguous how many columns of y (where W is,
# they fill a vector): by adjoint, contiguous axis and longest row of taps. A larger patch reads fewer pixels twice and
# keeps more of them in registers.
PATCH = {
    (False, "W"): ((5, (4, 0)), (8, (2, 0))),
    (True, "W"): ((8, (2, 0)),),
    (False, "C"): ((3, (4, 2)), (4, (2, 2)), (5, (4, 1)), (8, (2, 1))),
    (True, "C"): ((8, (2, 1)),),
}


@triton.jit(
    do_not_specialize=["total", "channels", "strips", "groups", "src_height", "src_width", "dst_height", "dst_width"]
)
def patch(
    src, dst, a, b, total, channels, strips, groups, src_height, src_width, dst_height, dst_width,
    src_n_stride, src_c_stride, src_h_stride, src_w_stride, dst_n_stride, dst_c_stride, dst_h_stride, dst_w_stride,
    a_c_stride, a_k_stride, b_c_stride, b_k_stride,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, K_H: tl.constexpr, K_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TOP: tl.constexpr,
    BOTTOM: tl.constexpr, BORDER: tl.constexpr, ADJOINT: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    EXACT_H: tl.constexpr, EXACT_W: tl.constexpr, SRC_ALIGN: tl.constexpr, DST_ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    PRE: tl.constexpr,
):  # fmt: skip
    """dst = A src B^T, or with ADJOINT dst = A^T src B. A patch is OUT_H x OUT_W pixels of y and as many strides of x."""
    ALIGN: tl.constexpr = max(SRC_ALIGN, DST_ALIGN)
    n, c, strip, group, inside = place(total, channels, strips, groups, CHANNELS_LAST, ALIGN, ROWS, COLS, WIDE)
    taps_h = all_taps(a, c, a_c_stride, a_k_stride, channels, TAPS_H, K_H, ACC)
    taps_w = all_taps(b, c, b_c_stride, b_k_stride, channels, TAPS_W, K_W, ACC)
    IN_H: tl.constexpr = OUT_H * STRIDE_H
    IN_W: tl.constexpr = OUT_W * STRIDE_W
    DST_H: tl.constexpr = IN_H if ADJOINT else OUT_H
    DST_W: tl.constexpr = IN_W if ADJOINT else OUT_W
    SRC_W: tl.constexpr = OUT_W if ADJOINT else IN_W
    FIRST_H: tl.constexpr = first_output(K_H, STRIDE_H, TOP, BORDER) if ADJOINT else -TOP
    FIRST_W: tl.constexpr = first_output(K_W, STRIDE_W, LEFT, BORDER) if ADJOINT else -LEFT
    END_W: tl.constexpr = (
        end_output(IN_W - 1, K_W, STRIDE_W, LEFT, RIGHT, BORDER) if ADJOINT else IN_W - STRIDE_W + K_W - LEFT
    )
    rows = ()
    for m in tl.static_range(DST_H):
        # The rows of src that row m of the patch needs and the rows above it did not, each filtered along W.
        for r in tl.static_range(
            len(rows), end_output(m, K_H, STRIDE_H, TOP, BOTTOM, BORDER) - FIRST_H if ADJOINT else m * STRIDE_H + K_H
        ):
            if ADJOINT:
                i = strip * OUT_H + (r + FIRST_H)
            else:
                i = source(strip * IN_H + (r + FIRST_H), src_height, BORDER, True)
            pixels = load_row(
                src, n * src_n_stride + c * src_c_stride + i.to(tl.int64) * src_h_stride, src_w_stride,
                group * SRC_W, src_width, inside & (i >= 0) & (i < src_height), c, FIRST_W, END_W, SRC_W, SRC_ALIGN,
                CHANNELS_LAST, "zeros" if ADJOINT else BORDER, ACC, PRE,
            )  # fmt: skip
            row = ()
            for e in tl.static_range(DST_W):
                if ADJOINT:
                    w = group * IN_W + e
                    row = row + adjoint_sum(
                        pixels, taps_w, w, dst_width, e, STRIDE_W, LEFT, RIGHT, BORDER, IN_W, EXACT_W
                    )
                else:
                    row = row + blur_sum(pixels, taps_w, STRIDE_W * e, 1)
            rows = rows + (row,)
        o = strip * DST_H + m
        if ADJOINT:
            sums = adjoint_sum(rows, taps_h, o, dst_height, m, STRIDE_H, TOP, BOTTOM, BORDER, IN_H, EXACT_H)
        else:
            sums = blur_sum(rows, taps_h, m * STRIDE_H, DST_W)
        offset = n * dst_n_stride + c * dst_c_stride + o.to(tl.int64) * dst_h_stride
        store_row(
            dst, offset, dst_w_stride, group * DST_W, dst_width, inside & (o < dst_height), sums, DST_W, DST_ALIGN, CHANNELS_LAST
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "total", "channels", "strips", "groups", "src_height", "src_width", "k_h", "k_w", "left", "top",
        "steps_h", "steps_w", "ahead_h", "ahead_w",
    ]
)  # fmt: skip
def gather(
    src, dst, a, b, total, channels, strips, groups, src_height, src_width, k_h, k_w, left, top, steps_h, steps_w,
    ahead_h, ahead_w, src_n_stride, src_c_stride, src_h_stride, src_w_stride, dst_n_stride, dst_c_stride, dst_h_stride,
    dst_w_stride, a_c_stride, a_k_stride, b_c_stride, b_k_stride,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, BORDER: tl.constexpr,
    ADJOINT: tl.constexpr, SRC_ALIGN: tl.constexpr, DST_ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    """The same for every stride, number of taps and width of border: strips and groups are the rows and columns of dst."""
    ALIGN: tl.constexpr = max(SRC_ALIGN, DST_ALIGN)
    n, c, h, w, inside = place(total, channels, strips, groups, CHANNELS_LAST, ALIGN, ROWS, COLS, WIDE)
    total_h = tl.zeros((ROWS, COLS), ACC)
    for step_h in range(steps_h):
        if ADJOINT:
            i, p = read_by(h, step_h, strips, src_height, top, ahead_h, k_h, STRIDE_H, BORDER)
        else:
            i, p = read(h, step_h, src_height, top, STRIDE_H, BORDER), step_h
        inside_h = inside & (i >= 0) & (i < src_height)
        if tl.max(inside_h.to(tl.int32)) > 0:
            offset = n * src_n_stride + c * src_c_stride + i.to(tl.int64) * src_h_stride
            total_w = tl.zeros((ROWS, COLS), ACC)
            for step_w in range(steps_w):
                if ADJOINT:
                    j, q = read_by(w, step_w, groups, src_width, left, ahead_w, k_w, STRIDE_W, BORDER)
                else:
                    j, q = read(w, step_w, src_width, left, STRIDE_W, BORDER), step_w
                inside_w = inside_h & (j >= 0) & (j < src_width)
                pixel = load(src, offset + j.to(tl.int64) * src_w_stride, inside_w, c, SRC_ALIGN, ACC, PRE)
                total_w += tap(b, q, c, b_c_stride, b_k_stride, inside_w, TAPS_W, ACC) * pixel
            total_h += tap(a, p, c, a_c_stride, a_k_stride, inside_h, TAPS_H, ACC) * total_w
    offset = n * dst_n_stride + c * dst_c_stride + h.to(tl.int64) * dst_h_stride
    store_row(dst, offset, dst_w_stride, w, groups, inside, (total_h,), 1, DST_ALIGN, CHANNELS_LAST)


@triton.jit(
    do_not_specialize=[
        "positions", "channels", "out_height", "out_width", "height", "width", "size", "other_size", "left", "top",
    ]
)  # fmt: skip
def taps_grad(
    dy, x, other, dst, positions, channels, out_height, out_width, height, width, size, other_size, left, top,
    dy_n_stride, dy_c_stride, dy_h_stride, dy_w_stride, x_n_stride, x_c_stride, x_h_stride, x_w_stride,
    other_c_stride, other_k_stride,
    AXIS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, BORDER: tl.constexpr, SHARES: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    """dst[s, c, p] = sum of dy[n,c,i,j] (x~ shifted to tap p, blurred by ``other``)[n,c,i,j] over the s-th share of (n i j)."""
    pid = tl.program_id(0)
    tap_p = pid % size
    share = pid // size % SHARES
    c = (pid // size // SHARES * COLS + tl.arange(0, COLS)[None, :]).to(tl.int64)
    total = tl.zeros((ROWS, COLS), ACC)
    for step in range(tl.cdiv(positions.to(tl.int64), SHARES * ROWS)):
        position = (step * SHARES + share).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (position < positions) & (c < channels)
        i, j = position // out_width % out_height, position % out_width
        n = position // out_width // out_height
        at = n * dy_n_stride + c * dy_c_stride + i * dy_h_stride + j * dy_w_stride
        cotangent = load(dy, at, inside, c, 1, ACC, identity)
        blurred = tl.zeros((ROWS, COLS), ACC)
        for q in range(other_size):
            h = read(i, tap_p if AXIS == 0 else q, height, top, STRIDE_H, BORDER)
            w = read(j, q if AXIS == 0 else tap_p, width, left, STRIDE_W, BORDER)
            inside_q = inside & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            at = n * x_n_stride + c * x_c_stride + h * x_h_stride + w * x_w_stride
            pixel = load(x, at, inside_q, c, 1, ACC, PRE)
            blurred += tap(other, q, c, other_c_stride, other_k_stride, inside_q, None, ACC) * pixel
        total += cotangent * blurred
    at = (share * channels + c) * size + tap_p
    tl.store(dst + at, tl.sum(total, axis=0)[None, :], mask=c < channels)


def plan(adjoint, src, dst, taps_h, taps_w, stride, padding, border, channels_last) -> tuple[Any, int, dict[str, Any]]:
    """The kernel, its number of programs and its arguments for dst = A src B^T, or the adjoint."""
    fixed = not isinstance(taps_h, torch.Tensor)
    rows = [tuple(t) if fixed else Operand.of(t) for t in (taps_h, taps_w)]
    kernel, programs, arguments = _plan(
        adjoint, Operand.of(src), Operand.of(dst), *rows, tuple(stride), tuple(padding), border, channels_last, THREADS
    )
    return (
        kernel,
        programs,
        arguments | dict(src=src, dst=dst, a=None if fixed else taps_h, b=None if fixed else taps_w),
    )


@functools.lru_cache(maxsize=1024)
def _plan(adjoint, src, dst, taps_h, taps_w, stride, padding, border, channels_last, threads):
    fixed = not isinstance(taps_h, Operand)
    k = (len(taps_h), len(taps_w)) if fixed else (taps_h.shape[1], taps_w.shape[1])
    x, y = (dst, src) if adjoint else (src, dst)
    rows = Axis.of(x.shape[2], y.shape[2], k[0], stride[0], padding[2])
    cols = Axis.of(x.shape[3], y.shape[3], k[1], stride[1], padding[0])
    dim = 1 if channels_last else 3
    x_align, y_align = x.alignment(dim), y.alignment(dim)
    if rows.unrolls(border, adjoint) and cols.unrolls(border, adjoint):
        out_h, out_w = next(
            size for longest, size in PATCH[adjoint, "C" if channels_last else "W"] if max(k) <= longest
        )
        if not channels_last:
            out_w, x_align, y_align = span(cols, x_align, y_align)
        in_h, in_w = out_h * rows.stride, out_w * cols.stride
        height, width = (in_h, in_w) if adjoint else (out_h, out_w)
        kernel = patch
        arguments = dict(
            dst_height=dst.shape[2], dst_width=dst.shape[3], K_H=k[0], K_W=k[1], LEFT=cols.before, RIGHT=cols.after,
            TOP=rows.before, BOTTOM=rows.after, OUT_H=out_h, OUT_W=out_w, EXACT_H=rows.n % in_h == 0, EXACT_W=cols.n % in_w == 0,
        )  # fmt: skip
    else:
        if not channels_last:
            x_align = y_align = 1
        height = width = 1
        kernel = gather
        (steps_h, ahead_h), (steps_w, ahead_w) = rows.steps(border, adjoint), cols.steps(border, adjoint)
        arguments = dict(
            k_h=k[0], k_w=k[1], left=cols.before, top=rows.before,
            steps_h=steps_h, steps_w=steps_w, ahead_h=ahead_h, ahead_w=ahead_w,
        )  # fmt: skip
    (batch, channels), strips, groups = src.shape[:2], -(-dst.shape[2] // height), -(-dst.shape[3] // width)
    if channels_last:
        programs, tiling = tile(batch * strips * groups, channels, threads * max(x_align, y_align))
    else:
        programs, tiling = tile(batch * channels * strips, groups, threads)
    arguments |= tiling | src.stride_arguments("src") | dst.stride_arguments("dst")
    for name, taps in (("a", taps_h), ("b", taps_w)):
        arguments |= {f"{name}_{axis}_stride": 0 if fixed else taps.strides[i] for i, axis in enumerate("ck")}
    arguments |= dict(
        channels=channels, strips=strips, groups=groups, src_height=src.shape[2], src_width=src.shape[3],
        TAPS_H=taps_h if fixed else None, TAPS_W=taps_w if fixed else None, STRIDE_H=stride[0], STRIDE_W=stride[1],
        BORDER=border, ADJOINT=adjoint, CHANNELS_LAST=channels_last, ACC=accumulator(src.dtype), PRE=identity,
        SRC_ALIGN=y_align if adjoint else x_align, DST_ALIGN=x_align if adjoint else y_align,
    )  # fmt: skip
    return kernel, programs, arguments


def blur_pool_fwd(x, taps_h, taps_w, stride, padding, pad_mode):
    left, right, top, bottom = padding
    k_h, k_w = (t.shape[1] if isinstance(t, torch.Tensor) else len(t) for t in (taps_h, taps_w))
    channels_last = suggest_memory_format(x) is torch.channels_last
    height = (x.shape[2] + top + bottom - k_h) // stride[0] + 1
    y = empty(x, height, (x.shape[3] + left + right - k_w) // stride[1] + 1, channels_last)
    if y.numel():
        launch(x.device, THREADS, *plan(False, x, y, taps_h, taps_w, stride, padding, pad_mode, channels_last))
    return y


def blur_pool_bwd(dy, taps_h, taps_w, stride, padding, pad_mode, H, W, channels_last):
    dx = empty(dy, H, W, channels_last)
    if dx.numel():
        launch(dy.device, THREADS, *plan(True, dy, dx, taps_h, taps_w, stride, padding, pad_mode, channels_last))
    return dx


blur_pool_taps_fwd = blur_pool_fwd
blur_pool_taps_bwd = blur_pool_bwd


def blur_pool_taps_grad(dy, x, other, axis, size, stride, padding, pad_mode):
    channels = x.shape[1]
    if not dy.numel():
        return other.new_zeros((channels, size))
    positions = dy.numel() // channels
    # Every share of the positions is summed by one program for each tap and block of channels, and the shares after that.
    rows, cols = (THREADS // 32, 32) if suggest_memory_format(x) is torch.channels_last else (4 * THREADS, 1)
    shares = min(-(-positions // rows), SHARES)
    partial = other.new_empty((shares, channels, size))
    arguments = dict(
        dy=dy, x=x, other=other, dst=partial, positions=positions, channels=channels, out_height=dy.shape[2],
        out_width=dy.shape[3], height=x.shape[2], width=x.shape[3], size=size, other_size=other.shape[1],
        left=padding[0], top=padding[2], other_c_stride=other.stride(0), other_k_stride=other.stride(1),
        AXIS=axis, STRIDE_H=stride[0], STRIDE_W=stride[1], BORDER=pad_mode, SHARES=shares, ROWS=rows, COLS=cols,
        ACC=accumulator(x.dtype), PRE=identity,
    ) | Operand.of(dy).stride_arguments("dy") | Operand.of(x).stride_arguments("x")  # fmt: skip
    launch(x.device, THREADS, taps_grad, -(-channels // cols) * shares * size, arguments)
    return partial.sum(0)
