"""A few calls of every kernel, small enough for compute-sanitizer: ``compute-sanitizer python -m bench.sanitize``."""

from __future__ import annotations

import itertools
import os

# Each tensor in an allocation of its own, so that the end of a tensor is an end the tool knows.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

import aliasfused
from aliasfused.ops._window import PadMode

# Rows of whole 16-byte packs, of whole pairs, of neither; channels in whole packs or not.
SHAPES = ((2, 8, 9, 16), (2, 8, 6, 14), (2, 3, 7, 7), (1, 5, 2, 1))
FORMATS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MODES: tuple[PadMode, ...] = ("reflect", "replicate", "zeros", "circular")


def main() -> None:
    calls = 0
    for shape, memory_format, k in itertools.product(SHAPES, FORMATS, range(1, 9)):
        x = torch.randn(shape, device="cuda").to(DTYPES[calls % 4]).to(memory_format=memory_format).requires_grad_()
        mode, stride = MODES[calls // 4 % 4], 3 if k == 1 else 2
        y = aliasfused.blur_pool2d(x, k, stride, pad_mode=mode)
        y.backward(torch.randn_like(y))
        torch.ops.aliasfused.channel_moments(x)
        if k in (3, 8):
            taps = torch.rand(shape[1], k, device="cuda", dtype=torch.float64).to(x.dtype).requires_grad_()
            aliasfused.blur_pool2d(x, taps, stride, pad_mode=mode).sum().backward()
            scale = torch.rand(shape[1], device="cuda", requires_grad=True)
            y = aliasfused.max_blur_pool2d(x, 2, k, stride, act="relu", scale=scale, max_padding=1, pad_mode=mode)
            y.sum().backward()
        calls += 1
    torch.cuda.synchronize()
    print(f"{calls} cases")


if __name__ == "__main__":
    main()
