"""What every launch needs to know of its tensors: how an axis is padded, how memory is aligned, how a tile covers it."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .window import images

VECTOR_BYTES = 16
UNROLLED = 8


class Axis(NamedTuple):
    """One axis of a blur, as in window.py; ``after`` counts the positions behind x that are read."""

    n: int
    out: int
    k: int
    stride: int
    before: int
    after: int

    @classmethod
    def of(cls, n: int, out: int, k: int, stride: int, before: int) -> Axis:
        return cls(n, out, k, stride, before, max(stride * (out - 1) + k - before - n, 0))

    def unrolls(self, border: str, adjoint: bool) -> bool:
        """Whether the unrolled window of window.py covers this axis."""
        if self.stride > 2 or self.k > UNROLLED:
            return False
        pad = max(self.before, self.after)
        if border == "reflect":
            return pad < self.n and (not adjoint or pad < self.k)
        if border == "circular":
            return pad <= self.n and not adjoint
        return border == "zeros" or not adjoint or pad < self.k

    def steps(self, border: str, adjoint: bool) -> tuple[int, int]:
        """How many (index, tap) pairs the looped window tries, and where its images begin."""
        if not adjoint:
            return self.k, 0
        count, ahead = images(self.n, self.before, self.after, border)
        return count * -(-self.k // self.stride), ahead


class Blur(NamedTuple):
    """A blur by numbers, which are compile-time constants, as is all else that does not depend on sizes."""

    taps_h: tuple[float, ...]
    taps_w: tuple[float, ...]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # left, right, top, bottom
    border: str

    def axes(self, height: int, width: int) -> tuple[Axis, Axis]:
        """Of a map of this size."""
        (k_h, k_w), (left, right, top, bottom) = (len(self.taps_h), len(self.taps_w)), self.padding
        out_height = (height + top + bottom - k_h) // self.stride[0] + 1
        out_width = (width + left + right - k_w) // self.stride[1] + 1
        return Axis.of(height, out_height, k_h, self.stride[0], top), Axis.of(
            width, out_width, k_w, self.stride[1], left
        )


class Operand(NamedTuple):
    """What a plan depends on of a tensor, hashable."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # elements beyond a multiple of VECTOR_BYTES

    @classmethod
    def of(cls, t: torch.Tensor) -> Operand:
        return cls(tuple(t.shape), t.stride(), t.dtype, t.data_ptr() % VECTOR_BYTES // t.element_size())

    def alignment(self, dim: int) -> int:
        """The longest vector along ``dim``, in elements, that starts at every multiple of its length in every row."""
        if self.strides[dim] != 1:
            return 1
        steps = [s for d, (s, n) in enumerate(zip(self.strides, self.shape, strict=True)) if d != dim and n > 1]
        size = VECTOR_BYTES // self.dtype.itemsize
        while any(value % size for value in (self.shape[dim], self.offset, *steps)):
            size //= 2
        return size

    def stride_arguments(self, name: str) -> dict[str, int]:
        return {f"{name}_{axis}_stride": s for axis, s in zip("nchw", self.strides, strict=True)}


def span(cols: Axis, in_align: int, out_align: int) -> tuple[int, int, int]:
    """Columns of y in a patch so that those of x make the longest vector, and the vectors of x and of y in it."""
    out_w = max(in_align // cols.stride, 1)
    if -(-cols.out // out_w) * out_w * cols.stride > cols.n:
        return 1, 1, 1  # the last vector of x would lie in the border
    return out_w, min(in_align, out_w * cols.stride), min(out_align, out_w)


def tile(total: int, columns: int, elements: int) -> tuple[int, dict[str, Any]]:
    """Cover total x columns by tiles of so many elements, as wide as a warp if there are as many columns."""
    cols = min(triton.next_power_of_2(columns), 32)
    rows = elements // cols
    programs = -(-total // rows) * -(-columns // cols)
    return programs, dict(total=total, ROWS=rows, COLS=cols, WIDE=total > 2**31 - rows)


def accumulator(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype is torch.float64 else tl.float32


def empty(like: torch.Tensor, height: int, width: int, channels_last: bool) -> torch.Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (*like.shape[:2], height, width), dtype=like.dtype, device=like.device, memory_format=memory_format
    )


def options(threads: int) -> dict[str, Any]:
    """How a kernel is compiled. A product and a sum are one instruction and one rounding, whatever Triton's default."""
    return dict(num_warps=threads // 32, enable_fp_fusion=True)


def launch(device: torch.device, threads: int, kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    # The dispatcher does not choose the device for kernels registered from Python, and Triton launches on the current one.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](**arguments, **options(threads))
