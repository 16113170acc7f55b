"""Run by test_native_cpu.py in a process of its own for each instruction set: all that vectors can get wrong.

Tensors lie against pages that must not be touched, before and behind in turn, so that one element read or written too many
ends the process. And memory that is allocated holds numbers below the normal ones, of which nothing may be computed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import mmap
import platform
import sys
from random import Random

import torch

import aliasfused
import tolerances
from aliasfused.kernels import reference
from cases import BORDERS, DTYPES, STEPS, coarse, random, row
from test_contract import Told
from truth import Adaptive, Blur

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
LIBC.malloc.restype, LIBC.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)


class Watched:
    """The raw ops, each run where the allocator has only numbers below the normal ones to give. A processor may take a
    hundred times as long for these, and notes that it has met one: as no tensor holds any, that was in memory nobody wrote.
    """

    def __getattr__(self, name: str):
        op = getattr(torch.ops.aliasfused, name)
        return lambda *args: self.run(op, *args)

    @staticmethod
    def run(op, *args):
        soil(1 << 22)
        x87_and_mxcsr = (ctypes.c_uint32 * 8)()
        LIBM.fegetenv(x87_and_mxcsr)
        x87_and_mxcsr[7] &= ~0x3F
        LIBM.fesetenv(x87_and_mxcsr)
        result = op(*args)
        LIBM.fegetenv(x87_and_mxcsr)
        assert not x87_and_mxcsr[7] & 2, f"{op} of {described(args)}: computes with what nobody wrote"
        return result


def described(args) -> list:
    return [(tuple(a.shape), a.stride(), a.dtype) if isinstance(a, torch.Tensor) else a for a in args]


def soil(size: int) -> None:
    place = LIBC.malloc(size)
    torch.frombuffer((ctypes.c_char * size).from_address(place), dtype=torch.int32).fill_(0x1234)
    LIBC.free(place)


LIBM = ctypes.CDLL("libm.so.6") if platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc" else None
OPS = Watched() if LIBM else torch.ops.aliasfused


def fenced(values: torch.Tensor, channels_last: bool, at_end: bool) -> torch.Tensor:
    """The values in memory that begins, or ends, at a page that cannot be read."""
    size = values.numel() * values.element_size()
    pages = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, pages + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (address, address + PAGE + pages):
        if LIBC.mprotect(guard, PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (pages - size if at_end else 0)
    flat = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset)
    n, c, h, w = values.shape
    view = flat.view(n, h, w, c).permute(0, 3, 1, 2) if channels_last else flat.view(n, c, h, w)
    return view.copy_(values)


def sweep() -> int:
    """Widths on both sides of every vector's length, each tuned filter, each border, both layouts, both directions."""
    checked = 0
    for w in (1, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 130):
        for k, s in ((2, 2), (3, 2), (4, 2), (5, 2), (6, 2), (7, 2), (3, 1), (5, 3), (12, 2)):
            dtype = DTYPES[checked % 4] if w > 17 else None
            border = BORDERS[(checked // 4) % 4]
            for d in [dtype] if dtype else DTYPES:
                both(5, w, k, s, border, d, at_end=bool(checked % 2), channels_last=False, channels=2)
                both(3, 6, k, s, border, d, at_end=bool(checked % 2), channels_last=True, channels=w)
                checked += 1
    short_rows = ((6, 7), (5, 9), (13, 13), (14, 14), (3, 28))  # several to a vector
    for size, k, dtype in itertools.product(short_rows, (2, 3, 4, 5, 7), DTYPES):
        both(*size, k, 2, BORDERS[checked % 4], dtype, at_end=bool(checked % 2), channels_last=False, channels=37)
        checked += 1
    return checked


def both(h, w, k, s, border, dtype, at_end, channels_last, channels) -> None:
    kind = tolerances.accumulator(dtype)
    rows = row(k).to(kind), row(k, 1).to(kind)
    args = ((s, s), ((k - 1) // 2, k // 2) * 2, border)
    blur = Blur((h, w), *rows, *args)
    numbers = [r.tolist() for r in rows]
    x = fenced(random(2, channels, h, w, dtype=dtype), channels_last, at_end)
    truth = blur.forward(x)
    y = OPS.blur_pool_fwd(x, *numbers, *args)
    what = f"h {h}, w {w}, k {k}, s {s}, {border}, {dtype}, channels {channels}, channels_last {channels_last}"
    tolerances.assert_within(y, truth, tolerances.forward(blur, x, truth), what)
    # The last channel's taps are twice the others': taps that are equal everywhere are not taken channel by channel.
    per_channel = [r.repeat(channels, 1) for r in rows]
    per_channel[0][-1] *= 2
    twice = torch.ones(channels, 1, 1, dtype=torch.float64)
    twice[-1] = 2
    limit = tolerances.forward(blur, x, truth) * twice
    y = OPS.blur_pool_taps_fwd(x, *per_channel, *args)
    tolerances.assert_within(y, truth * twice, limit, f"{what}, taps per channel")
    dy = fenced(random(2, channels, *blur.out, dtype=dtype, seed=1), channels_last, at_end)
    truth = blur.adjoint(dy)
    limit = tolerances.adjoint(blur, dy, truth)
    dx = OPS.blur_pool_bwd(dy, *numbers, *args, h, w, channels_last)
    tolerances.assert_within(dx, truth, limit, f"adjoint, {what}")
    dx = OPS.blur_pool_taps_bwd(dy, *per_channel, *args, h, w, channels_last)
    tolerances.assert_within(dx, truth * twice, limit * twice, f"adjoint, {what}, taps per channel")
    for axis in (0, 1):
        truth = blur.taps_gradient(dy, x, axis)
        limit = tolerances.taps_gradient(blur, dy, x, axis, truth)
        grad = OPS.blur_pool_taps_grad(dy, x, per_channel[1 - axis], axis, k, *args)
        own = twice[:, :, 0] if axis else 1.0
        tolerances.assert_within(grad, truth * own, limit * own, f"taps {axis}, {what}")


def steps() -> int:
    """What stands before a blur: every row of STEPS, and the usual ones at widths on both sides of every vector's length."""
    usual = [step for step in STEPS if step.act in ("none", "relu", "silu") and step.batch and step.size[0] > 6][:6]
    widths = (6, 7, 8, 15, 16, 17, 31, 33, 65)
    every = [
        *STEPS,
        *(dataclasses.replace(s, size=(s.size[0], w), channels=c) for s in usual for w in widths for c in (2, w)),
    ]
    for checked, step in enumerate(every):
        for dtype in DTYPES[checked % 2 :: 2] if checked >= len(STEPS) else DTYPES:
            one_step(step, dtype, at_end=bool(checked % 2), channels_last=bool(checked // 2 % 2))
    return len(every)


def one_step(step, dtype, at_end, channels_last) -> None:
    if not step.batch:
        return
    told, what = Told(step, dtype, "cpu"), f"{step}, {dtype}, channels_last {channels_last}"
    x = fenced(coarse(*step.shape, dtype=dtype), channels_last, at_end)
    y, truth = OPS.max_blur_pool_fwd(x, told.affine, *told.rest), told.truth.blur.forward(told.truth.prepared(x))
    tolerances.assert_within(y, truth, tolerances.step_forward(told.truth, x, truth), what)
    dy = fenced(random(*y.shape, dtype=dtype, seed=1), channels_last, at_end)
    du = told.truth.du(x, dy)
    truth = du if told.affine is None else du * told.truth.affine[1, :, None, None]
    dx = OPS.max_blur_pool_bwd(dy, x, told.affine, None, *told.rest)
    tolerances.assert_within(dx, truth, tolerances.step_backward(told.truth, x, dy, None, truth), f"gradient, {what}")
    sums = OPS.max_blur_pool_sums(dy, x, told.affine, *told.rest)
    truth = torch.stack([du.sum((0, 2, 3)), (du * told.truth.centred(x)).sum((0, 2, 3))])
    tolerances.assert_within(sums, truth, tolerances.step_sums(told.truth, x, dy, du), f"sums, {what}")


def moments() -> int:
    """Runs that end on both sides of every vector's length, fewer and more of them than are summed at once."""
    every = list(itertools.product((1, 7, 8, 15, 16, 17, 31, 32, 33, 65, 130, 2111), (False, True), DTYPES))
    for checked, (n, channels_last, dtype) in enumerate(every):
        shape = (2, n, 9, 11) if channels_last else (2, 3, 2, n)
        x = fenced(random(*shape).add(3).to(dtype), channels_last, at_end=bool(checked % 2))
        mean = x.double().mean((0, 2, 3))
        squares = (x.double() - mean[:, None, None]).square().sum((0, 2, 3))
        truth = torch.stack([torch.full_like(mean, x.numel() // x.shape[1]), mean, squares])
        tolerances.assert_within(OPS.channel_moments(x), truth, tolerances.moments(x), f"moments of {shape}, {dtype}")
    return len(every)


def norms() -> int:
    """What a batch norm works out per channel, for as many as vectors of doubles hold, more and fewer."""
    every = list(itertools.product((1, 2, 3, 4, 7, 8, 9, 31, 64), (torch.float32, torch.float64)))
    for channels, dtype in every:
        moments = reference.channel_moments(random(2, channels, 5, 7) + 3)
        rows, wide = random(4, channels, seed=1).to(dtype), dtype is torch.float64
        given = (*moments[[1, 2, 0]], *rows[:2], 1e-3, wide)
        table, truth = OPS.batch_norm_table(*given), reference.batch_norm_table(*given)
        pairs = [(table, truth)]
        given = (rows[2:], moments, truth, 1e-3)
        pairs += zip(OPS.batch_norm_gradient(*given), reference.batch_norm_gradient(*given), strict=True)
        running = rows[:2].abs()
        wanted, batches = running.clone(), torch.tensor(3)
        reference.batch_norm_follow(*wanted, batches.clone(), moments, None)
        OPS.batch_norm_follow(*running, batches, moments, None)
        for actual, truth in [*pairs, (running, wanted)]:
            limit = 2 * tolerances.batch_norm(truth.double(), truth.double().abs() + 1, dtype)
            tolerances.assert_within(actual, truth.double(), limit, f"a batch norm of {channels} channels, {dtype}")
    return len(every)


def adaptive() -> int:
    """Rows of outputs, and groups of channels, that end on both sides of every vector's length; NCHW also both, as it is copied."""
    lengths, kinds = (1, 4, 7, 8, 9, 15, 16, 17, 31, 33, 65), ("rows", "groups", "both")
    every = list(itertools.product(lengths, (3, 5, 7), (1, 2), kinds))
    draw = Random(0)
    for checked, (n, k, stride, kind) in enumerate(every):
        dtype, end, channels_last = DTYPES[checked % 4], bool(checked % 2), kind == "groups"
        size, groups = (4, 3) if channels_last else (5, n * stride), 2
        channels = 4 if kind == "rows" else 2 * n
        arguments = (k, (stride, stride), groups, draw.choice(("group", "joint", "none")), draw.choice(BORDERS))
        grid = [-(-m // stride) for m in size]
        x = fenced(random(1, channels, *size, dtype=dtype), channels_last, end)
        given = draw.choice((grid, size))
        logits = fenced(random(1, groups * k * k, *given, dtype=dtype, seed=1), channels_last, not end)
        dy = fenced(random(1, channels, *grid, dtype=dtype, seed=2), channels_last, end)
        blur, what = Adaptive(size, logits, *arguments), f"adaptive {size}, {arguments}, {dtype}, {channels} channels"
        truth = blur.forward(x)
        limit = tolerances.adaptive_forward(x, logits, arguments, truth)
        tolerances.assert_within(OPS.adaptive_blur_pool_fwd(x, logits, *arguments), truth, limit, what)
        truth = blur.adjoint(dy)
        limit = tolerances.adaptive_adjoint(dy, logits, arguments, size, truth)
        dx = OPS.adaptive_blur_pool_bwd(dy, logits, *arguments, *size, channels_last)
        tolerances.assert_within(dx, truth, limit, f"adjoint, {what}")
        truth = blur.logits_gradient(dy, x)
        limit = tolerances.adaptive_logits_grad(dy, x, logits, arguments, truth)
        dlogits = OPS.adaptive_blur_pool_logits_grad(dy, x, logits, *arguments)
        tolerances.assert_within(dlogits, truth, limit, f"logits, {what}")
    return len(every)


def conversions() -> None:
    """Every value of the short dtypes unharmed by a blur of one tap, and every tie of two neighbours rounded to even."""
    for dtype in (torch.bfloat16, torch.float16):
        # The processor's own conversion to bfloat16 writes zero for what is below the normal numbers.
        least = torch.finfo(dtype).tiny if sys.argv[1] == "avx512bf16" and dtype is torch.bfloat16 else 0.0
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            x = every.view(1, 32, 32, 64).contiguous(memory_format=layout)
            same(aliasfused.blur_pool2d(x, 1, 1), x.where(~(x.double().abs() < least), 0), f"{dtype}: one tap")
            # Neighbours a unit in the last place apart: their mean lies half-way, and is exact in the accumulator.
            halves = (x.double()[..., :-1] + x.double()[..., 1:]) * 0.5
            y = aliasfused.blur_pool2d(x, (1, [0.5, 0.5]), 1, padding=0)
            same(y, halves.float().to(dtype).where(~(halves.abs() < least), 0), f"{dtype}: ties")
    # What does not fit is infinite, and what fits just so is not.
    x = torch.full((1, 1, 4, 40), 65504.0, dtype=torch.float16)
    assert torch.equal(aliasfused.blur_pool2d(x, 4), torch.full((1, 1, 2, 20), 65504.0, dtype=torch.float16))
    assert aliasfused.blur_pool2d(x, (1, [0.5, 0.502])).isinf().all()


def same(y: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    wrong = ~((y == expected) | (y.isnan() & expected.isnan()))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} values differ; the first is {y[at]!r}, expected {expected[at]!r}"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    native = next(b for b in aliasfused.backends() if (b.name, b.device) == ("native", "cpu"))
    assert native.detail.partition(" of ")[0] == sys.argv[1], native.reason or native.detail
    conversions()
    counts = f"{sweep()} geometries, {steps()} steps, {moments()} moments, {norms()} norms, {adaptive()} adaptive"
    print(f"{sys.argv[1]}: {counts}, every value of the short dtypes")
