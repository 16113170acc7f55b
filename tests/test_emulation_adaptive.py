"""The CUDA kernels of the blur by predicted filters, executed on the CPU: see test_emulation.py."""

from __future__ import annotations

import itertools
from random import Random

import pytest
import torch

import test_emulation as base
import tolerances
from test_emulation import BORDERS, DTYPES, MARGIN, TUNED_DTYPES, VIEWS, axes, guarded, in_nan, random
from truth import Adaptive

emulated, one_thread = base.emulated, base.one_thread
# In the order in which csrc/adaptive_blur_pool.h numbers them.
NORMALIZE = ("group", "joint", "none")
RESULTS = ("y", "dx", "dlogits")


def run(emulated, result: str, x, dy, logits, args, channels_last=False) -> tuple[torch.Tensor, str]:
    """One emulated call, and a second one that must give the same bits; and the name of the kernel."""
    k, stride, groups, normalize, pad_mode = args
    span = stride if logits.shape[2:] == x.shape[2:] else (1, 1)
    kept = logits[:, :, :: span[0], :: span[1]]
    like = {"y": dy, "dx": x, "dlogits": logits}[result]
    calls = []
    for _ in range(2):
        dst, buffer = guarded(like.shape, x.dtype, channels_last)
        kernel = emulated.adaptive_blur_pool(
            DTYPES[x.dtype], NORMALIZE.index(normalize), RESULTS.index(result), *x.shape[:2], groups,
            *axes(*x.shape[2:], k, k, stride, (k // 2,) * 4, pad_mode), 0 if result == "dx" else x.data_ptr(),
            0 if result == "y" else dy.data_ptr(), logits.data_ptr(), dst.data_ptr(), x.stride(), dy.stride(),
            kept.stride(), dst.stride(), span,
        )  # fmt: skip
        assert buffer[:MARGIN].isnan().all() and buffer[-MARGIN:].isnan().all(), f"written outside {result}"
        calls.append(dst)
    assert torch.equal(*(call.clone(memory_format=torch.contiguous_format).view(torch.uint8) for call in calls))
    return calls[0], kernel


def check(emulated, x, dy, logits, args, channels_last=False) -> set[str]:
    """All three results against the truth: the names of the kernels."""
    blur = Adaptive(x.shape[2:], logits, *args)
    y, dx, dlogits = blur.forward(x), blur.adjoint(dy), blur.logits_gradient(dy, x)
    wanted = {
        "y": (y, tolerances.adaptive_forward(x, logits, args, y)),
        "dx": (dx, tolerances.adaptive_adjoint(dy, logits, args, x.shape[2:], dx)),
        "dlogits": (dlogits, tolerances.adaptive_logits_grad(dy, x, logits, args, dlogits)),
    }
    kernels = set()
    for result, (truth, limit) in wanted.items():
        actual, kernel = run(emulated, result, x, dy, logits, args, channels_last)
        what = f"{result} of {x.dtype} {tuple(x.shape)} {x.stride()} {args} by {kernel}"
        tolerances.assert_within(actual, truth, limit, what)
        kernels.add(kernel)
    return kernels


def inputs(shape, dtype, args, layouts=(False, False, False), everywhere=False) -> list[torch.Tensor]:
    """x, dy and logits, each in NaN-filled memory; logits that are far enough from each other to matter."""
    k, stride, groups, *_ = args
    out = [-(-n // s) for n, s in zip(shape[2:], stride, strict=True)]
    logits = 3 * random(shape[0], groups * k * k, *(shape[2:] if everywhere else out), dtype=torch.float64, seed=2)
    tensors = random(*shape), random(*shape[:2], *out, seed=1), logits
    return [in_nan(t.to(dtype), last) for t, last in zip(tensors, layouts, strict=True)]


@pytest.mark.parametrize("pad_mode", BORDERS)
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_geometry(emulated, normalize, pad_mode):
    """Every filter and stride in every dtype, each with a size, layouts and groups that are drawn."""
    draw = Random(f"{normalize} {pad_mode}")
    for dtype, k, stride in itertools.product(DTYPES, (1, 3, 5, 7), ((1, 1), (2, 2), (3, 2))):
        size = draw.choice([(7, 9), (4, 5), (1, 1), (2, 11), (6, 3), (9, 1)])
        groups, each = draw.choice([(1, 3), (2, 8), (3, 1), (2, 5)])
        args = (k, stride, groups, normalize, pad_mode)
        layouts, everywhere = [draw.choice([False, True]) for _ in range(3)], draw.choice([False, True])
        tensors = inputs((2, groups * each, *size), dtype, args, layouts, everywhere)
        check(emulated, *tensors, args, draw.choice([False, True]))


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_several_tiles(emulated, channels_last, normalize):
    """Of pixels, of groups, of a group's channels; the last of each is not full. Borders that wrap join opposite tiles."""
    shapes = [
        ((1, 11 * 8, 9, 12), 11, 3, (2, 2)),
        ((1, 2 * 136, 5, 6), 2, 5, (2, 1)),
        ((2, 3 * 37, 7, 9), 3, 3, (1, 2)),
        ((1, 2, 37, 70), 1, 5, (1, 2)),
        ((1, 9, 41, 3), 9, 7, (2, 1)),
    ]
    for i, (shape, groups, k, stride) in enumerate(shapes):
        dtype = [torch.bfloat16, torch.float32][i % 2]
        args = (k, stride, groups, normalize, BORDERS[3 - i % 2])
        kernels = check(emulated, *inputs(shape, dtype, args, [channels_last] * 3, i % 2 == 0), args, channels_last)
        assert kernels == {"nhwc" if channels_last and k < 7 and shape[1] // groups % 8 == 0 else "element"}


@pytest.mark.parametrize("dtype", TUNED_DTYPES, ids=str)
@pytest.mark.parametrize("pad_mode", BORDERS)
def test_packs_of_channels(emulated, pad_mode, dtype):
    for k, normalize in itertools.product((3, 5, 9), NORMALIZE):
        args = (k, (2, 2), 2, normalize, pad_mode)
        kernels = check(emulated, *inputs((1, 16, 6, 9), dtype, args, (True, True, k > 3)), args, True)
        assert kernels == {"element" if k == 9 else "nhwc"}


@pytest.mark.parametrize("pad_mode", BORDERS)
def test_long_filters(emulated, pad_mode):
    """So many outputs read a tile of x that their softmaxes come in several parts; the longest filter that there is."""
    args = (9, (1, 1), 8, "group", pad_mode)
    check(emulated, *inputs((1, 32, 18, 16), torch.float32, args, (True, True, True)), args, True)
    args = (63, (3, 2), 1, "joint", pad_mode)
    for size in ((2, 5), (40, 1)):
        check(emulated, *inputs((1, 2, *size), torch.float32, args), args)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("view", VIEWS)
def test_views(emulated, view, channels_last):
    """x, dy and logits as views, the logits also every other one of a larger map."""
    for i, dtype in enumerate((torch.float32, torch.bfloat16)):
        x = VIEWS[view](in_nan(random(2, 16, 10, 32, dtype=dtype), channels_last))
        args = (3, (2, 2), 2 - x.shape[1] % 2, NORMALIZE[i], "reflect")
        _, dy, logits = inputs(x.shape, dtype, args)
        everywhere = in_nan(random(*logits.shape[:2], *x.shape[2:], dtype=dtype), channels_last)[:, :, ::2, ::2]
        check(emulated, x, in_nan(dy.mT).mT, everywhere, args, channels_last)
        check(
            emulated, x, dy[:1, :1, :1, :1].expand_as(dy), logits[:1, :, :1].expand_as(logits), args, not channels_last
        )


@pytest.mark.parametrize("normalize", ["group", "joint"])
def test_far_logits(emulated, normalize):
    """Nothing overflows; what has no weight adds nothing; where no filter is left there is nan, as in torch."""
    args = (3, (1, 1), 2, normalize, "zeros")
    for dtype in DTYPES:
        x, dy, logits = inputs((1, 4, 4, 5), dtype, args)
        logits *= 1000
        logits[:, ::2] = -torch.inf
        check(emulated, x, dy, logits, args)
        logits[:, :9, 0, 0] = -torch.inf
        logits[:, 2, 1, 1] = torch.nan
        for result, wanted in zip(RESULTS, truths(x, dy, logits, args), strict=True):
            assert torch.equal(run(emulated, result, x, dy, logits, args)[0].isnan(), wanted.isnan())


def truths(x, dy, logits, args) -> list[torch.Tensor]:
    blur = Adaptive(x.shape[2:], logits, *args)
    return [blur.forward(x), blur.adjoint(dy), blur.logits_gradient(dy, x)]


def test_beyond_32_bit_addresses(emulated):
    """Memory that is never touched is never mapped."""
    far, args = 2**31 + 16, (3, (1, 1), 1, "group", "reflect")
    for strides in ((far, 64, 8, 1), (far, 1, 128, 16)):
        tensors = inputs((2, 8, 4, 4), torch.bfloat16, args)
        spread = [torch.empty(far + 1024, dtype=t.dtype).as_strided(t.shape, strides).copy_(t) for t in tensors]
        check(emulated, *spread, args)


def test_too_many_taps(emulated):
    args = (65, (1, 1), 1, "none", "zeros")
    with pytest.raises(RuntimeError, match="at most 63"):
        run(emulated, "y", *inputs((1, 1, 2, 2), torch.float32, args), args)
