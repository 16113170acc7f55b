"""What a batch norm works out per channel, in float64: csrc/batch_norm.h. A program has a block of channels.

The numbers of a module are compile-time constants, as Triton would hand them over in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch

THREADS = 128


@triton.jit
def block_of(channels, BLOCK: tl.constexpr):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return c, c < channels


@triton.jit
def wide(numbers, c, inside):
    # Of channels that are not there numbers by which, or by one less, may be divided.
    return tl.load(numbers + c, mask=inside, other=2.0).to(tl.float64)


@triton.jit
def move(running, c, factor, value, inside):
    moved = wide(running, c, inside) * (1 - factor) + value * factor
    if running.dtype.element_ty.primitive_bitwidth == 16:
        moved = moved.to(tl.float32)  # the interpreter knows no other way
    tl.store(running + c, moved, mask=inside)


@triton.jit
def inverse_deviation(var, EPS: tl.constexpr):
    return 1 / tl.sqrt(var + tl.full(var.shape, EPS, tl.float64))


@triton.jit(do_not_specialize=["channels"])
def table(mean, var, count, weight, bias, dst, channels, EPS: tl.constexpr, BLOCK: tl.constexpr):
    c, inside = block_of(channels, BLOCK)
    m = wide(mean, c, inside)
    v = wide(var, c, inside)
    if count is not None:
        v /= wide(count, c, inside)
    scale = inverse_deviation(v, EPS)
    if weight is not None:
        scale *= wide(weight, c, inside)
    center = m.to(dst.dtype.element_ty)
    shift = (center.to(tl.float64) - m) * scale
    if bias is not None:
        shift += wide(bias, c, inside)
    tl.store(dst + c, center, mask=inside)
    tl.store(dst + channels + c, scale, mask=inside)
    tl.store(dst + 2 * channels + c, shift, mask=inside)


@triton.jit(do_not_specialize=["channels", "mean_stride", "var_stride"])
def follow(moments, mean, var, batches, channels, mean_stride, var_stride, MOMENTUM: tl.constexpr, BLOCK: tl.constexpr):
    """With batches, how many there were, the average of all."""
    c, inside = block_of(channels, BLOCK)
    if batches is not None:
        factor = 1 / tl.broadcast_to(tl.load(batches), (BLOCK,)).to(tl.float64)
    else:
        factor = tl.full((BLOCK,), MOMENTUM, tl.float64)
    unbiased = wide(moments + 2 * channels, c, inside) / (wide(moments, c, inside) - 1)
    move(mean, c * mean_stride, factor, wide(moments + channels, c, inside), inside)
    move(var, c * var_stride, factor, unbiased, inside)


@triton.jit(do_not_specialize=["channels"])
def gradient(
    sums, moments, table, correction, dweight, dbias, channels, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c, inside = block_of(channels, BLOCK)
    n = tl.maximum(wide(moments, c, inside), 1)  # an empty batch has gradients: zero
    invstd = inverse_deviation(wide(moments + 2 * channels, c, inside) / n, EPS)
    scale = wide(table + channels, c, inside)
    off = wide(table, c, inside) - wide(moments + channels, c, inside)
    first = wide(sums, c, inside)
    second = wide(sums + channels, c, inside) + off * first
    slope = -scale * invstd * invstd * second / n
    tl.store(correction + c, slope * off - scale * first / n, mask=inside)
    tl.store(correction + channels + c, slope, mask=inside)
    tl.store(dweight + c, second * invstd, mask=inside)
    tl.store(dbias + c, first, mask=inside)


def _launch(kernel, like, channels, **arguments):
    if channels:
        programs = triton.cdiv(channels, THREADS)
        launch(like.device, THREADS, kernel, programs, dict(arguments, channels=channels, BLOCK=THREADS))


def _plain(*tensors):
    return (None if t is None else t.contiguous() for t in tensors)


def batch_norm_table(mean, var, count, weight, bias, eps, wide):
    channels = mean.shape[0]
    dst = mean.new_empty((3, channels), dtype=torch.float64 if wide else torch.float32)
    mean, var, count, weight, bias = _plain(mean, var, count, weight, bias)
    _launch(table, dst, channels, mean=mean, var=var, count=count, weight=weight, bias=bias, dst=dst, EPS=eps)
    return dst


def batch_norm_follow(running_mean, running_var, num_batches_tracked, moments, momentum):
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    (moments,) = _plain(moments)
    _launch(
        follow, moments, moments.shape[1], moments=moments, mean=running_mean, var=running_var,
        batches=num_batches_tracked if momentum is None else None, mean_stride=running_mean.stride(0),
        var_stride=running_var.stride(0), MOMENTUM=momentum,
    )  # fmt: skip


def batch_norm_gradient(sums, moments, table, eps):
    channels = table.shape[1]
    correction, dweight, dbias = (table.new_empty(shape) for shape in ((2, channels), channels, channels))
    sums, moments, table = _plain(sums, moments, table)
    _launch(
        gradient, table, channels, sums=sums, moments=moments, table=table, correction=correction, dweight=dweight,
        dbias=dbias, EPS=eps,
    )  # fmt: skip
    return correction, dweight, dbias
