"""The Triton kernels of the blur by predicted filters on CPU tensors: see interpret.py."""

from __future__ import annotations

import pytest
import torch
from torch._prims_common import suggest_memory_format

import aliasfused
import tolerances
from aliasfused.kernels.triton import adaptive_blur_pool as ours
from cases import LAYOUTS, AdaptiveCase, laid_out, random
from truth import Adaptive

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """The interpreter pays for each program, hardly for its size."""
    monkeypatch.setattr(ours, "THREADS", 1024)


def tensors(case: AdaptiveCase, dtype: torch.dtype, layout: str) -> list[torch.Tensor]:
    """x in this layout, logits and dy in those after it; or all in one of the two that are packed."""
    names = list(LAYOUTS)
    follow = (
        [layout] * 3
        if layout in ("nchw", "nhwc")
        else [names[(names.index(layout) + i) % len(names)] for i in (0, 1, 2)]
    )
    sizes = case.shape, case.logits_shape, (*case.shape[:2], *case.out)
    return [
        laid_out((scale * random(*size, seed=i)).to(dtype), name)
        for i, (size, scale, name) in enumerate(zip(sizes, (1, 3, 1), follow, strict=True))
    ]


def run(x, logits, dy, case: AdaptiveCase) -> list[torch.Tensor]:
    channels_last = suggest_memory_format(x) is torch.channels_last
    return [
        ours.adaptive_blur_pool_fwd(x, logits, *case.arguments),
        ours.adaptive_blur_pool_bwd(dy, logits, *case.arguments, *case.size, channels_last),
        ours.adaptive_blur_pool_logits_grad(dy, x, logits, *case.arguments),
    ]


def check(x, logits, dy, case: AdaptiveCase) -> list[torch.Tensor]:
    """Values, dtypes and memory formats."""
    args, blur = case.arguments, Adaptive(case.size, logits, *case.arguments)
    truths = blur.forward(x), blur.adjoint(dy), blur.logits_gradient(dy, x)
    ulps = 1.0 if x.dtype is BF16 else 0.5
    limits = (
        tolerances.adaptive_forward(x, logits, args, truths[0], ulps),
        tolerances.adaptive_adjoint(dy, logits, args, case.size, truths[1], ulps),
        tolerances.adaptive_logits_grad(dy, x, logits, args, truths[2], ulps),
    )
    results = run(x, logits, dy, case)
    for actual, like, truth, limit in zip(results, (x, x, logits), truths, limits, strict=True):
        assert actual.dtype is x.dtype and actual.is_contiguous(memory_format=suggest_memory_format(like))
        tolerances.assert_within(actual, truth, limit, case.reason)
    return results


CASES = (
    (BF16, "nhwc", AdaptiveCase("the usual filter, vectors of channels", (6, 9), groups=2, channels=16)),
    (FP32, "nhwc", AdaptiveCase("several vectors a group", (4, 5), 5, (2, 1), 2, pad_mode="replicate", batch=1, channels=16)),
    (FP16, "nhwc", AdaptiveCase("groups that are no vectors", (5, 4), groups=3, normalize="joint", pad_mode="zeros", channels=9)),
    (FP32, "nchw", AdaptiveCase("planes, the last of a group alone in its chunk", (7, 6), groups=1, batch=1, channels=9)),
    (BF16, "nchw", AdaptiveCase("a long filter, row by row", (9, 14), 5, (3, 2), 2, pad_mode="zeros", batch=1, channels=4)),
    (FP64, "slice", AdaptiveCase("no softmax", (5, 8), 3, (1, 2), 2, "none", "circular", 1, 4)),
    (FP16, "slice of nhwc", AdaptiveCase("a border repeated often", (3, 2), 5, (2, 1), 2, "joint", "replicate", 1, 6)),
    (FP64, "transposed", AdaptiveCase("mirrored several times", (2, 3), 7, (3, 2), 1, batch=1, channels=3)),
    (FP32, "steps", AdaptiveCase("wrapped several times", (2, 3), 9, (3, 3), 1, "none", "circular", 1, 2)),
    (FP64, "expanded", AdaptiveCase("pixels that no output reads, the same in all rows", (7, 9), 3, (4, 5), 2, batch=1)),
    (FP32, "nchw", AdaptiveCase("one tap and one pixel", (1, 1), 1, groups=2, normalize="joint", channels=4)),
    (BF16, "nhwc", AdaptiveCase("logits of all positions", (5, 8), groups=2, channels=16, batch=1, everywhere=True)),
    (FP32, "nchw", AdaptiveCase("of all positions, several zeros between two", (5, 7), 3, (2, 3), 1, "joint", channels=2, everywhere=True)),
    (FP64, "slice", AdaptiveCase("of all positions, row by row", (5, 6), 5, (3, 1), 1, "none", batch=1, channels=2, everywhere=True)),
)  # fmt: skip


@pytest.mark.parametrize(("dtype", "layout", "case"), CASES, ids=[case.reason for *_, case in CASES])
def test_results(dtype, layout, case):
    check(*tensors(case, dtype, layout), case)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_several_programs(layout, monkeypatch):
    """Tiles that end amid an image, and others beyond the last one; the same bits each time."""
    monkeypatch.setattr(ours, "THREADS", 32)
    case = AdaptiveCase("", (2, 39), 3, (2, 2), 2, "joint", batch=1, channels=2)
    if layout == "nhwc":
        case = AdaptiveCase("", (2, 3), 3, (2, 2), 34, "group", batch=1, channels=34)
    inputs = tensors(case, FP32, layout)
    for first, second in zip(check(*inputs, case), run(*inputs, case), strict=True):
        assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_far_logits():
    """What has no weight adds nothing; where no filter is left there is nan."""
    case = AdaptiveCase("", (2, 3), groups=1, stride=(1, 1), batch=1, channels=2)
    x, logits, dy = tensors(case, FP32, "nchw")
    logits *= 1000
    logits[:, ::2] = -torch.inf
    check(x, logits, dy, case)
    logits[..., 0] = -torch.inf
    y = ours.adaptive_blur_pool_fwd(x, logits, *case.arguments)
    assert y[..., 0].isnan().all() and not y[..., 1:].isnan().any()


def test_beyond_32_bit_addresses():
    """Memory that is never touched is never mapped."""
    far, case = 2**31 + 16, AdaptiveCase("", (2, 3), groups=1, stride=(1, 1), channels=2)
    check(
        *(
            torch.empty(far + 256, dtype=BF16).as_strided(t.shape, (far, 8, 4, 1)).copy_(t)
            for t in tensors(case, BF16, "nchw")
        ),
        case,
    )


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 0, 3, 3)])
def test_empty(shape):
    case = AdaptiveCase("", shape[2:], groups=1, batch=shape[0], channels=shape[1])
    for result in run(*tensors(case, FP32, "nchw"), case):
        assert not result.any()


def test_through_the_public_function():
    x = random(1, 2, 2, 3).requires_grad_()
    logits = random(1, 18, 1, 2, seed=1).requires_grad_()
    with aliasfused.use_backend("triton"):
        blur = lambda x, logits: aliasfused.adaptive_blur_pool2d(x, logits, groups=2, normalize="joint")  # noqa: E731
        assert torch.autograd.gradcheck(blur, (x, logits), fast_mode=True)
