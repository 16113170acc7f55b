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


def main(device: str = "cuda") -> None:
    calls = 0
    for shape, memory_format, k, dtype in itertools.product(SHAPES, FORMATS, range(1, 9), DTYPES):
        x = torch.randn(shape, device=device).to(dtype).to(memory_format=memory_format).requires_grad_()
        # Every shape and format meets every border over the filters, and every filter over the shapes.
        mode, stride = MODES[(calls // 4 + calls // 32 + calls // 128) % 4], 3 if k == 1 else 2

        def whole(y: torch.Tensor) -> None:
            """Backward, of a gradient in the format of y."""
            y.backward(torch.randn_like(y))

        whole(aliasfused.blur_pool2d(x, k, stride, pad_mode=mode))
        if k in (3, 8):
            taps = torch.rand(shape[1], k, device=device, dtype=torch.float64).to(x.dtype).requires_grad_()
            aliasfused.blur_pool2d(x, taps, stride, pad_mode=mode).sum().backward()
            wide = torch.float64 if x.dtype is torch.float64 else torch.float32
            norm = aliasfused.nn.BNActBlurPool2d(shape[1], "relu", k, pad_mode=mode, device=device, dtype=wide)
            whole(norm(x))
        if k in (3, 4, 5, 8):
            scale = torch.rand(shape[1], device=device, requires_grad=True)
            for window, some in itertools.product((1, 2, 3), (None, scale)):
                for padding in {(window - 1) // 2, window // 2}:
                    if min(shape[2:]) + 2 * padding >= window:
                        whole(
                            aliasfused.max_blur_pool2d(
                                x, window, k, stride, act="relu", scale=some, max_padding=padding, pad_mode=mode
                            )
                        )
        if k in (3, 5, 7):
            # At the kept positions, and at all.
            for size in ([-(-n // 2) for n in shape[2:]], shape[2:]):
                logits = torch.randn(shape[0], k * k, *size, device=device).to(x.dtype).to(memory_format=memory_format)
                y = aliasfused.adaptive_blur_pool2d(x, logits.requires_grad_(), k, groups=1, pad_mode=mode)
                y.sum().backward()
        calls += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} cases")


if __name__ == "__main__":
    main()
