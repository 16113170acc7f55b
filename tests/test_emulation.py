"""The CUDA sources, executed on the CPU: nvcc's input compiled by g++ and run thread by thread (tests/emulation)."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F

import tolerances
from aliasfused import filters
from aliasfused.kernels import reference
from cases import coarse
from truth import Blur, Step

sys.path.insert(0, str(Path(__file__).parent / "emulation"))
import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
TUNED_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BORDERS = ["reflect", "replicate", "zeros", "circular"]
MARGIN = 64


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny products: a pool of threads would only wait for itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def emulated():
    path = build.build("emulated.so", "module.cpp", "-shared")
    spec = importlib.util.spec_from_file_location("emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def usual_padding(kh: int, kw: int) -> tuple[int, int, int, int]:
    return (kw - 1) // 2, kw // 2, (kh - 1) // 2, kh // 2


def random(*shape, dtype=torch.float32, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def guarded(shape, dtype, channels_last=False) -> tuple[torch.Tensor, torch.Tensor]:
    """A NaN-filled tensor in the middle of a NaN-filled buffer, and that buffer."""
    n, c, h, w = shape
    buffer = torch.full((2 * MARGIN + n * c * h * w,), torch.nan, dtype=dtype)
    strides = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    return buffer.as_strided(shape, strides, MARGIN), buffer


def in_nan(x: torch.Tensor, channels_last=False) -> torch.Tensor:
    view, _ = guarded(x.shape, x.dtype, channels_last)
    return view.copy_(x)


def axes(h, w, kh, kw, stride, padding, pad_mode):
    left, right, top, bottom = padding
    border = BORDERS.index(pad_mode)
    rows = (h, (h + top + bottom - kh) // stride[0] + 1, top, kh, stride[0], border)
    cols = (w, (w + left + right - kw) // stride[1] + 1, left, kw, stride[1], border)
    return rows, cols


def acc_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def tolerance(magnitude: torch.Tensor, truth: torch.Tensor, terms: int, dtype: torch.dtype) -> torch.Tensor:
    """Rounding of `terms` sums and products whose absolute values add up to `magnitude`, and of the result."""
    error = terms * torch.finfo(acc_dtype(dtype)).eps * magnitude
    info = torch.finfo(dtype)
    return error + 0.5 * info.eps * (truth.abs() + error) + info.smallest_normal * info.eps


def blur(emulated, src, taps_h, taps_w, stride, padding, pad_mode, *, adjoint=None, channels_last=False, tol=True):
    """One emulated call checked against the truth: (dst, name of the kernel). `adjoint` is the (H, W) of dx."""
    per_channel = taps_h.dim() == 2
    acc = acc_dtype(src.dtype)
    taps_h, taps_w = taps_h.to(acc).contiguous(), taps_w.to(acc).contiguous()
    h, w = adjoint or src.shape[2:]
    rows, cols = axes(h, w, taps_h.shape[-1], taps_w.shape[-1], stride, padding, pad_mode)
    shape = (*src.shape[:2], h, w) if adjoint else (*src.shape[:2], rows[1], cols[1])
    dst, buffer = guarded(shape, src.dtype, channels_last)
    kernel = emulated.blur_pool(
        DTYPES[src.dtype], bool(adjoint), *src.shape[:2], rows, cols, src.data_ptr(), dst.data_ptr(), src.stride(),
        dst.stride(), taps_h.data_ptr(), taps_w.data_ptr(), per_channel,
    )  # fmt: skip
    assert buffer[:MARGIN].isnan().all() and buffer[-MARGIN:].isnan().all(), "written outside dst"

    def truth(src, a, b):
        if adjoint:
            return reference.blur_pool_bwd(src, a, b, stride, padding, pad_mode, h, w, False)
        return reference.blur_pool_fwd(src, a, b, stride, padding, pad_mode)

    wanted = truth(src.double(), taps_h.double(), taps_w.double())
    magnitude = truth(src.double().abs(), taps_h.double().abs(), taps_w.double().abs())
    # Products and sums along both axes; the adjoint of a border that shows a pixel often has up to one for each output.
    terms = taps_h.shape[-1] + taps_w.shape[-1] + 2 + (rows[1] + cols[1] if adjoint else 0)
    error = (dst.double() - wanted).abs()
    bad = ~(error <= tolerance(magnitude, wanted, terms, src.dtype))
    assert not bad.any(), (
        f"{kernel}: {int(bad.sum())} of {bad.numel()} wrong, first {bad.nonzero()[0].tolist()}, most {error.max()}"
    )
    return dst, kernel


def both(emulated, n, c, h, w, dtype, taps_h, taps_w, stride, padding, pad_mode, channels_last):
    """Forward and adjoint of one geometry: the names of their kernels."""
    rows, cols = axes(h, w, taps_h.shape[-1], taps_w.shape[-1], stride, padding, pad_mode)
    x, dy = random(n, c, h, w, dtype=dtype), random(n, c, rows[1], cols[1], dtype=dtype, seed=1)
    common = (taps_h, taps_w, stride, padding, pad_mode)
    down = blur(emulated, in_nan(x, channels_last), *common, channels_last=channels_last)[1]
    up = blur(emulated, in_nan(dy, channels_last), *common, adjoint=(h, w), channels_last=channels_last)[1]
    return down, up


def test_16_bit_floats(emulated):
    values = random(4000) * torch.exp2(torch.arange(4000) % 60 - 35.0)
    special = torch.tensor(
        [0.0, -0.0, 65504.0, 65519.9, 65520.0, 2**-24, 2**-25, 2**-25 * 1.01, 2**-14, float("inf"), -float("inf")]
    )
    for convert, dtype in ((emulated.to_half, torch.float16), (emulated.to_bfloat16, torch.bfloat16)):
        both_kinds = torch.cat([values, special])
        assert torch.equal(torch.tensor([convert(float(v)) for v in both_kinds]), both_kinds.to(dtype).float())
        assert convert(float("nan")) != convert(float("nan"))


# A map for each kernel: rows of whole 16-byte packs, of whole pairs, of neither; channels in whole packs.
MAPS = {"nchw": (2, 3, 9, 32), "nchw_pair": (1, 3, 18, 14), "element": (1, 3, 14, 9), "nhwc": (1, 16, 10, 7)}


@pytest.mark.parametrize("dtype", TUNED_DTYPES, ids=str)
@pytest.mark.parametrize("k", range(2, 8))
@pytest.mark.parametrize("kernel", MAPS)
def test_tuned_kernels(emulated, kernel, k, dtype):
    n, c, h, w = MAPS[kernel]
    for pad_mode in BORDERS:
        taps = random(k, seed=2), random(k, seed=3)
        chosen = both(emulated, n, c, h, w, dtype, *taps, (2, 2), usual_padding(k, k), pad_mode, kernel == "nhwc")
        # The adjoint of wrapped taps joins opposite ends of the map, which no short stencil does.
        wraps = pad_mode == "circular" and chosen[1] == "any"
        assert chosen == (kernel, "any" if wraps else kernel)


SIZES = [(1, 1), (2, 2), (1, 16), (3, 2), (7, 7), (8, 8), (13, 13), (14, 16), (27, 5), (28, 28), (5, 55), (4, 56)]
FILTERS = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (7, 7), (8, 8), (12, 12), (1, 5), (5, 1), (3, 4)]


@pytest.mark.parametrize("pad_mode", BORDERS)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 3), (2, 3)], ids=str)
def test_geometry(emulated, stride, pad_mode):
    """Every filter on every size, each with the next dtype, layout and padding in turn."""
    dtypes = itertools.cycle(DTYPES)
    for index, ((h, w), (kh, kw)) in enumerate(itertools.product(SIZES, FILTERS)):
        usual = usual_padding(kh, kw)
        paddings = [
            usual,
            tuple(p + 2 for p in usual),
            (kw, kw + 1, kh + 3, kh),
            (kw // 2, (kw - 1) // 2, kh // 2, (kh - 1) // 2),
        ]
        padding = paddings[index % 4 if h * w > 1 else 0]
        both(
            emulated,
            1,
            4 if index % 3 else 3,
            h,
            w,
            next(dtypes),
            random(kh, seed=2),
            random(kw, seed=3),
            stride,
            padding,
            pad_mode,
            index % 2 == 0,
        )


@pytest.mark.parametrize("pad", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("k", range(2, 8))
def test_padding_of_tuned_filters(emulated, k, pad):
    """Pads narrower and wider than usual, and wider than the map."""
    for pad_mode, (h, w), channels_last in itertools.product(
        BORDERS, [(7, 8), (8, 7), (4, 4), (16, 17)], [False, True]
    ):
        if min(h, w) + 2 * pad >= k:
            both(
                emulated,
                1,
                8,
                h,
                w,
                torch.bfloat16,
                random(k, seed=2),
                random(k, seed=3),
                (2, 2),
                (pad,) * 4,
                pad_mode,
                channels_last,
            )


VIEWS = {
    "rows and columns cut": lambda x: x[:, :, 2:, 1:-1],
    "columns cut by a pack": lambda x: x[:, :, :, 8:],
    "channels cut": lambda x: x[:, 1:6],
    "channels cut by a pack": lambda x: x[:, 8:],
    "every second column": lambda x: x[..., ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "one image for all": lambda x: x[:1].expand(3, -1, -1, -1),
    "one channel for all": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "one column for all": lambda x: x[..., :1].expand(-1, -1, -1, 16),
    "one number for all": lambda x: x[:1, :1, :1, :1].expand(2, 8, 6, 16),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_strides(emulated, view, channels_last):
    for dtype, k, adjoint in itertools.product([torch.float32, torch.bfloat16], [3, 4, 8], [False, True]):
        src = VIEWS[view](in_nan(random(2, 16, 10, 32, dtype=dtype), channels_last))
        size = (2 * src.shape[2], 2 * src.shape[3]) if adjoint else None
        blur(
            emulated,
            src,
            random(k, seed=2),
            random(k, seed=3),
            (2, 2),
            usual_padding(k, k),
            "reflect",
            adjoint=size,
            channels_last=channels_last,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pad_mode", BORDERS)
def test_taps_per_channel(emulated, pad_mode, dtype):
    for channels_last, (kh, kw) in itertools.product([False, True], [(3, 3), (4, 1), (2, 9)]):
        taps = random(5, kh, seed=2), random(5, kw, seed=3)
        chosen = both(emulated, 2, 5, 7, 8, dtype, *taps, (2, 2), usual_padding(kh, kw), pad_mode, channels_last)
        assert chosen == ("any", "any")


def test_long_strips(emulated):
    """Only with very many threads does a strip have more than a few rows; what it does is the same for every kernel."""
    taps = random(5, seed=2), random(5, seed=3)
    chosen = both(emulated, 600, 110, 34, 2, torch.float32, *taps, (2, 2), usual_padding(5, 5), "zeros", False)
    assert chosen == ("nchw_pair", "nchw_pair")


@pytest.mark.parametrize("pad_mode", BORDERS)
@pytest.mark.parametrize(
    ("k", "h", "w"), [(2, 5, 16), (3, 6, 16), (4, 6, 7), (5, 5, 6), (6, 7, 8), (7, 8, 8), (8, 5, 5)]
)
def test_operator_and_transpose(emulated, k, h, w, pad_mode):
    """Unit impulses show the whole operator; its adjoint must be its transpose."""
    taps = random(k, seed=2), random(k, seed=3)
    rows, cols = axes(h, w, k, k, (2, 2), usual_padding(k, k), pad_mode)
    size_in, size_out = h * w, rows[1] * cols[1]
    common = (*taps, (2, 2), usual_padding(k, k), pad_mode)
    down = blur(emulated, torch.eye(size_in).view(size_in, 1, h, w), *common)[0].view(size_in, size_out)
    up = blur(emulated, torch.eye(size_out).view(size_out, 1, rows[1], cols[1]), *common, adjoint=(h, w))[0].view(
        size_out, size_in
    )
    eps = torch.finfo(torch.float32).eps
    # Each entry is a sum of at most (k + 1)^2 products of two taps, in either direction.
    assert (down.T - up).abs().max() <= 2 * (k + 1) ** 2 * eps * taps[0].abs().sum() * taps[1].abs().sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pad_mode", BORDERS)
@pytest.mark.parametrize("axis", [0, 1])
def test_taps_grad(emulated, axis, pad_mode, dtype):
    acc = acc_dtype(dtype)
    cases = [
        ((2, 3, 7, 8), (3, 3), (2, 2)),
        ((1, 2, 2, 1), (4, 5), (2, 2)),
        ((3, 2, 9, 40), (2, 5), (2, 3)),
        ((2, 4, 6, 5), (1, 4), (1, 1)),
    ]
    for (n, c, h, w), sizes, stride in cases:
        padding = usual_padding(*sizes)
        rows, cols = axes(h, w, *sizes, stride, padding, pad_mode)
        for channels_last in (False, True):
            x = in_nan(random(n, c, h, w, dtype=dtype), channels_last)
            dy = in_nan(random(n, c, rows[1], cols[1], dtype=dtype, seed=1), channels_last)
            if channels_last:
                dy = dy[:1, :, :1].expand_as(dy)
            other = random(c, sizes[1 - axis], dtype=acc, seed=2)
            dst, _ = guarded((1, 1, c, sizes[axis]), acc)
            emulated.taps_grad(
                DTYPES[dtype], n, c, rows, cols, axis, dy.data_ptr(), x.data_ptr(), dy.stride(), x.stride(),
                other.data_ptr(), dst.data_ptr(),
            )  # fmt: skip
            rest = (axis, sizes[axis], stride, padding, pad_mode)
            wanted = reference.blur_pool_taps_grad(dy.double(), x.double(), other.double(), *rest)
            magnitude = reference.blur_pool_taps_grad(dy.double().abs(), x.double().abs(), other.double().abs(), *rest)
            terms = n * rows[1] * cols[1] + sizes[1 - axis] + 2
            assert ((dst[0, 0].double() - wanted).abs() <= tolerance(magnitude, wanted, terms, acc)).all()


def test_too_many_taps(emulated):
    ones = torch.ones(1025)
    with pytest.raises(RuntimeError, match="1024 taps"):
        blur(emulated, torch.ones(1, 1, 4, 4), ones, ones, (2, 2), (600, 600, 600, 600), "replicate")


# --- affine, activation and maximum before the blur -------------------------------------------------------------------

# In the order in which csrc/max_blur_pool.h numbers them.
ACTS = {
    "none": (), "relu": (), "relu6": (), "silu": (), "gelu": (), "gelu_tanh": (), "hardswish": (),
    "leaky_relu": (-0.25,), "softplus": (2.0, 3.0),
}  # fmt: skip


@dataclasses.dataclass
class Steps:
    """One geometry of what the kernels are told, without the tensors."""

    act: str = "none"
    kernel: tuple[int, int] = (1, 1)
    max_padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    taps: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    pad_mode: str = "reflect"
    affine: torch.Tensor | None = None
    correction: torch.Tensor | None = None
    kernels: list[str] = dataclasses.field(default_factory=list, repr=False)

    @property
    def padding(self) -> tuple[int, int, int, int]:
        return usual_padding(*self.taps)

    @property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Taps: ones where there is one, so that the maximum can be seen through the blur."""
        return tuple(torch.ones(1) if k == 1 else random(k, seed=seed) for seed, k in enumerate(self.taps, 2))

    def prepared(self, size) -> tuple[int, int]:
        left, right, top, bottom = self.max_padding
        return size[0] + top + bottom + 1 - self.kernel[0], size[1] + left + right + 1 - self.kernel[1]

    def truth(self, size) -> Step:
        blur = Blur(self.prepared(size), *self.rows, self.stride, self.padding, self.pad_mode)
        return Step(self.act, ACTS[self.act], self.affine, self.kernel, self.max_padding, blur)

    def run(self, emulated, x, *, dy=None, dst=None, sums=None) -> None:
        """What is asked for; ``kernels`` are the names of those that did it."""
        acc, (left, _, top, _) = acc_dtype(x.dtype), self.max_padding
        taps = [row.to(acc) for row in self.rows]
        table, correction = (None if t is None else t.to(acc).contiguous() for t in (self.affine, self.correction))
        address = lambda t: 0 if t is None else t.data_ptr()  # noqa: E731
        src, numbers = x if dy is None else dy, (*ACTS[self.act], 0.0, 0.0)[:2]
        kernel = emulated.max_blur_pool(
            DTYPES[x.dtype], dy is not None, *x.shape[:2],
            *axes(*self.prepared(x.shape[2:]), *self.taps, self.stride, self.padding, self.pad_mode),
            src.data_ptr(), address(dst), src.stride(), (x if dst is None else dst).stride(), *map(address, taps),
            (list(ACTS).index(self.act), *numbers), address(table), (*self.kernel, top, left, *x.shape[2:]),
            x.data_ptr(), x.stride(), address(correction if dst is not None else None), address(sums),
        )  # fmt: skip
        self.kernels.append(kernel)

    def forward(self, emulated, x, channels_last=False) -> torch.Tensor:
        y, buffer = guarded((*x.shape[:2], *self.truth(x.shape[2:]).blur.out), x.dtype, channels_last)
        self.run(emulated, x, dst=y)
        assert buffer[:MARGIN].isnan().all() and buffer[-MARGIN:].isnan().all(), "written outside y"
        return y

    def backward(self, emulated, x, dy, channels_last=False) -> tuple[torch.Tensor, torch.Tensor]:
        """dx and the sums."""
        acc = acc_dtype(x.dtype)
        dx, buffer = guarded(x.shape, x.dtype, channels_last)
        sums, sums_buffer = guarded((1, 1, 2, x.shape[1]), acc)
        self.run(emulated, x, dy=dy, dst=dx)
        self.run(emulated, x, dy=dy, sums=sums)
        for guard in (buffer, sums_buffer):
            assert guard[:MARGIN].isnan().all() and guard[-MARGIN:].isnan().all(), "written outside dx or sums"
        return dx, sums[0, 0]

    def check(self, emulated, x, dy, channels_last=False) -> None:
        """Forward, gradient and sums against the truth; between x and the result nothing is rounded to the dtype."""
        truth, exact = self.truth(x.shape[2:]), x.to(acc_dtype(x.dtype))
        exact_dy = dy.to(exact.dtype)

        def close(actual, wanted, limit):
            tolerances.assert_within(
                actual, wanted, limit + tolerances.rounding(wanted, limit, actual.dtype), str(self)
            )

        y = truth.blur.forward(truth.prepared(x))
        close(self.forward(emulated, x, channels_last), y, tolerances.step_forward(truth, exact, y))
        dx, sums = self.backward(emulated, x, dy, channels_last)
        du, centred = truth.du(x.clone(), dy), truth.centred(x)
        wanted = du if self.affine is None else du * truth.affine[1, :, None, None]
        correction = None if self.correction is None else self.correction.to(exact.dtype)
        if correction is not None:
            wanted = wanted + correction.double()[0, :, None, None] + correction.double()[1, :, None, None] * centred
        close(dx, wanted, tolerances.step_backward(truth, exact, exact_dy, correction, wanted))
        wanted = torch.stack([du.sum((0, 2, 3)), (du * centred).sum((0, 2, 3))])
        close(sums, wanted, tolerances.step_sums(truth, exact, exact_dy, du))


def exact_affine(channels: int) -> torch.Tensor:
    """Center, scale and shift with which coarse numbers stay exact, and equals equal; some channels are turned round.

    They stay small, too: torch's gelu of -8 is the equal of its gelu of 0, and no longer less.
    """
    scale = torch.tensor([-1.0, 0.5, -0.75] * channels, dtype=torch.float64)[:channels]
    return torch.stack([coarse(channels, seed=3) / 4, scale, coarse(channels, seed=4) / 2])


def max_paddings(kh: int, kw: int) -> list[tuple[int, int, int, int]]:
    """None, the usual, one of unequal sides, and as much as there may be."""
    usual = (kw // 2, kw // 2, kh // 2, kh // 2)
    return [(0, 0, 0, 0), usual, (kw - 1, 0, 0, kh // 2), (kw - 1, kw - 1, kh - 1, kh - 1)]


@pytest.mark.parametrize("pad_mode", BORDERS)
@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 3), (2, 3), (5, 1)], ids=str)
def test_steps(emulated, kernel, pad_mode):
    """Every activation in every dtype, each with a size, filter, stride, padding, layout and affine that are drawn."""
    draw = Random(f"{kernel} {pad_mode}")
    for act, dtype in itertools.product(ACTS, DTYPES):
        h, w = draw.choice([(7, 9), (4, 5), (1, 1), (2, 11), (6, 16)])
        taps = draw.choice([(4, 4), (3, 3), (1, 1), (2, 5), (12, 9), (1, 3), (7, 8)])
        stride = draw.choice([(2, 2), (1, 1), (3, 3), (2, 1)])
        step = Steps(act, kernel, draw.choice(max_paddings(*kernel)), taps, stride, pad_mode)
        if min(step.prepared((h, w))) < 1:
            step.max_padding = max_paddings(*kernel)[-1]
        channels = draw.choice([1, 2, 5])
        step.affine = draw.choice([None, exact_affine(channels)])
        step.correction = draw.choice([None, random(2, channels, seed=5)])
        x = coarse(2, channels, h, w, dtype=dtype, seed=draw.randrange(1000))
        dy = random(2, channels, *step.truth((h, w)).blur.out, dtype=dtype, seed=1)
        x, dy = (in_nan(t, draw.choice([False, True])) for t in (x, dy))
        step.check(emulated, x, dy, draw.choice([False, True]))


# Windows of a maximum, and what they may see beyond x: nothing, as usual, of unequal sides.
WINDOWS = {
    1: [(0, 0, 0, 0)],
    2: [(0, 0, 0, 0), (0, 1, 0, 1), (1, 0, 1, 0)],
    3: [(1, 1, 1, 1), (1, 0, 1, 0), (2, 1, 0, 2)],
}
STRAIGHT = ["none", "relu", "relu6", "leaky_relu"]


@pytest.mark.parametrize("dtype", TUNED_DTYPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kernel", ["nchw", "element", "nhwc"])
def test_tuned_steps(emulated, kernel, window, dtype):
    """Rows of whole packs, of none, channels of whole packs: every border, filter and padding, each with an activation."""
    size, channels_last, acts = MAPS[kernel], kernel == "nhwc", itertools.cycle(STRAIGHT)
    for k, pad_mode, (i, max_padding) in itertools.product(range(2, 6), BORDERS, enumerate(WINDOWS[window])):
        affine = exact_affine(size[1]) if (k + i + BORDERS.index(pad_mode)) % 2 else None
        correction = random(2, size[1], seed=5) if k % 2 else None
        step = Steps(next(acts), (window, window), max_padding, (k, k), (2, 2), pad_mode, affine, correction)
        x = coarse(*size, dtype=dtype, seed=k)
        dy = random(*size[:2], *step.truth(size[2:]).blur.out, dtype=dtype, seed=1)
        step.check(emulated, in_nan(x, channels_last), in_nan(dy, channels_last), channels_last)
        down, up, sums = step.kernels
        # The usual sizes have kernels of their own in NCHW; what is wrapped joins opposite ends of the map.
        usual = max_padding[0] == (window - 1) // 2 and (kernel != "nchw" or size[3] - 1 <= step.prepared(size[2:])[1])
        expected = kernel if kernel != "nchw" or usual else "element"
        assert up == sums == ("any" if pad_mode == "circular" and up == "any" else expected), (step, up)
        if k not in (3, 4):
            assert down == "any"
        elif kernel != "nchw" or max_padding == WINDOWS[window][0]:
            assert down == ("element" if kernel == "nchw" and window > 1 and pad_mode == "circular" else kernel)
        else:
            assert down in (kernel, "element")


@pytest.mark.parametrize("window", WINDOWS)
def test_tiles_of_channels_that_are_not_full(emulated, window):
    """In packs, and one by one."""
    for dtype, channels in itertools.product((torch.float32, torch.bfloat16), (140, 13)):
        step = Steps("relu", (window, window), WINDOWS[window][0], (4, 4), (2, 2), affine=exact_affine(channels))
        x = coarse(3, channels, 6, 7, dtype=dtype)
        dy = random(3, channels, *step.truth((6, 7)).blur.out, dtype=dtype, seed=1)
        step.check(emulated, in_nan(x, True), in_nan(dy, True), True)
        assert step.kernels[2] == ("nhwc" if channels == 140 else "element")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_steps_on_views(emulated, view, channels_last):
    general = Steps("relu", (3, 2), (1, 0, 1, 1), (3, 4), (2, 2), "reflect")
    tuned = Steps("relu", (2, 2), (0, 0, 0, 0), (4, 4), (2, 2), "reflect")
    for dtype, step in itertools.product((torch.float32, torch.bfloat16), (general, tuned)):
        x = VIEWS[view](in_nan(coarse(2, 16, 10, 32, dtype=dtype), channels_last))
        step.affine = exact_affine(x.shape[1])
        dy = random(*x.shape[:2], *step.truth(x.shape[2:]).blur.out, dtype=dtype, seed=1)
        step.check(emulated, x, in_nan(dy.mT).mT, channels_last)
        step.check(emulated, x, dy[:1, :1, :1, :1].expand_as(dy), not channels_last)


@pytest.mark.parametrize("act", ACTS)
def test_activations(emulated, act):
    for dtype in (torch.float32, torch.float64):
        corners = torch.arange(-8, 8, 0.25).view(1, 1, 1, 64)
        x = torch.cat([corners, random(1, 1, 4, 64) * 30, random(1, 1, 1, 64) * 1000], 2).to(dtype)
        Steps(act).check(emulated, x, random(*x.shape, dtype=dtype, seed=2))


SPECIAL = {
    "nan": lambda x: x.masked_fill(random(*x.shape, seed=7) > 0.8, torch.nan),
    "infinities": lambda x: x.masked_fill(random(*x.shape, seed=7) > 1, torch.inf),
    "mostly -inf": lambda x: x.masked_fill(random(*x.shape, seed=7) > -1.2, -torch.inf),
    "all -inf": lambda x: torch.full_like(x, -torch.inf),
    "nan among -inf": lambda x: torch.full_like(x, -torch.inf).masked_fill(random(*x.shape, seed=7) > 1, torch.nan),
    "one number": torch.ones_like,
}


@pytest.mark.parametrize("act", ["none", "relu", "leaky_relu"])
@pytest.mark.parametrize("special", SPECIAL)
def test_winners(emulated, special, act):
    """Of windows with NaN, infinities and equals: bit by bit, as the filter is a one and gradients are whole numbers."""
    for dtype, kernel in itertools.product(DTYPES, [(1, 1), (2, 2), (3, 3), (2, 3), (1, 4)]):
        kh, kw = kernel
        # No further beyond x than torch sees, whose first of equals would else be one of the -inf that it is shown there.
        for max_padding in ((0, 0, 0, 0), (kw // 2, 0, 0, kh // 2), (kw // 2, kw // 2, kh // 2, kh // 2)):
            step = Steps(act, kernel, max_padding)
            x = SPECIAL[special](coarse(2, 3, 6, 7, dtype=dtype))
            truth = step.truth(x.shape[2:])
            z = truth.prepared(x)
            torch.testing.assert_close(step.forward(emulated, x).double(), z, rtol=0, atol=0, equal_nan=True)
            dy = coarse(*z.shape, dtype=dtype, seed=1).round()
            dx, sums = step.backward(emulated, x, dy)
            du = truth.du(x.clone(), dy)
            torch.testing.assert_close(dx.double(), du, rtol=0, atol=0, equal_nan=True)
            moments = (du * x.double()).sum((0, 2, 3))
            torch.testing.assert_close(
                sums.double(), torch.stack([du.sum((0, 2, 3)), moments]), rtol=0, atol=0, equal_nan=True
            )


class ExactSteps(Steps):
    """Through filters of eighths, which add up without rounding."""

    @property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.tensor(filters.binomial(k)) for k in self.taps)


@pytest.mark.parametrize("kernel", ["nchw", "element", "nhwc"])
@pytest.mark.parametrize("special", SPECIAL)
def test_tuned_winners(emulated, special, kernel):
    """The same of the tuned kernels, bit by bit too."""
    size = {"nchw": (2, 3, 6, 16), "element": (2, 3, 6, 7), "nhwc": (2, 8, 5, 6)}[kernel]
    channels_last = kernel == "nhwc"
    for dtype, window, k, act in itertools.product(TUNED_DTYPES, WINDOWS, (3, 4), ("none", "relu", "leaky_relu")):
        step = ExactSteps(act, (window, window), WINDOWS[window][0], (k, k), (2, 2), "reflect")
        x = in_nan(SPECIAL[special](coarse(*size, dtype=dtype)), channels_last)
        truth = step.truth(size[2:])
        same = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True, check_stride=False)
        # Not by matrices, in whose products a nan is everywhere.
        padded = F.pad(truth.prepared(x), [(k - 1) // 2, k // 2] * 2, mode="reflect")
        filter_2d = torch.outer(*step.rows).double().repeat(size[1], 1, 1, 1)
        y = F.conv2d(padded, filter_2d, stride=2, groups=size[1])
        same(step.forward(emulated, x, channels_last), y.to(dtype))
        dy = coarse(*y.shape, dtype=dtype, seed=1).round()
        dx, sums = step.backward(emulated, x, in_nan(dy, channels_last), channels_last)
        du = truth.du(x.clone(), dy)
        same(dx, du.to(dtype))
        same(sums, torch.stack([du.sum((0, 2, 3)), (du * x.double()).sum((0, 2, 3))]).float())
        assert step.kernels == [kernel] * 3


def test_too_many_taps_of_a_step(emulated):
    with pytest.raises(RuntimeError, match="1024 taps"):
        Steps(taps=(1025, 1), pad_mode="replicate").forward(emulated, torch.ones(1, 1, 4, 4))


# --- moments of the channels ------------------------------------------------------------------------------------------


def moments(emulated, x: torch.Tensor) -> tuple[str, bool]:
    """One emulated call checked against the truth, and a second against the first: its kernel, whether of several shares."""
    told = DTYPES[x.dtype], x.shape, x.data_ptr(), x.stride()
    size = emulated.channel_moments_scratch(*told)
    calls = []
    for _ in range(2):
        (dst, buffer), (scratch, around) = (guarded((1, 1, 1, n), torch.float64) for n in (3 * x.shape[1], size))
        kernel = emulated.channel_moments(*told, dst.data_ptr(), scratch.data_ptr())
        for guard in (buffer, around):
            assert guard[:MARGIN].isnan().all() and guard[-MARGIN:].isnan().all(), "written outside moments or scratch"
        assert not scratch.isnan().any()
        calls.append(dst.view(3, -1))
    assert torch.equal(*(call.view(torch.uint8) for call in calls))
    tolerances.assert_within(calls[0], reference.channel_moments(x), tolerances.moments(x), f"{kernel} of {told}")
    return kernel, size > 0


# (N, C, H, W) and the kernels in NCHW and NHWC, by what is whole packs of every dtype. Of several shares the last is short.
MOMENTS = {
    "pixels and channels": ((2, 16, 6, 8), "nchw", "nhwc"),
    "channels alone": ((2, 24, 7, 7), "element", "nhwc"),
    "pixels alone": ((2, 3, 5, 16), "nchw", "element"),
    "neither": ((3, 5, 7, 9), "element", "element"),
    "one pixel": ((1, 3, 1, 1), "element", "element"),
    "one pixel an image": ((5, 16, 1, 1), "nhwc", "nhwc"),
    "one channel": ((2, 1, 4, 16), "nchw", "nchw"),
    "a tile of columns that is not full": ((1, 8 * 11, 3, 1), "element", "nhwc"),
    "tiles of single channels": ((1, 35, 3, 3), "element", "element"),
    "shares": ((3, 1, 150, 160), "nchw", "nchw"),
    "shares of channels": ((3, 64, 40, 20), "nchw", "nhwc"),
    "shares of single elements": ((2, 3, 77, 79), "element", "element"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MOMENTS)
def test_moments(emulated, shape, dtype):
    size, *kernels = MOMENTS[shape]
    x = random(*size, dtype=dtype)
    chosen = [moments(emulated, in_nan(x, channels_last)) for channels_last in (False, True)]
    assert [kernel for kernel, _ in chosen] == kernels
    assert any(shared for _, shared in chosen) == shape.startswith("shares")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_moments_of_views(emulated, view, channels_last):
    for dtype in (torch.float32, torch.bfloat16):
        moments(emulated, VIEWS[view](in_nan(random(2, 16, 10, 32, dtype=dtype), channels_last)))


@pytest.mark.parametrize("channels_last", [False, True])
def test_moments_far_from_zero(emulated, channels_last):
    """Of what float32 leaves of the noise nothing more is lost; and equals have no deviation."""
    for dtype in (torch.float32, torch.float64):
        x = (1e4 + random(2, 16, 60, 64, dtype=torch.float64)).to(dtype)
        assert tolerances.moments(x)[2].max() < 1e-3 * reference.channel_moments(x)[2].min()
        moments(emulated, in_nan(x, channels_last))
    moments(emulated, in_nan(torch.full((2, 16, 60, 64), 1e4 / 3), channels_last))


def test_moments_beyond_32_bit_addresses(emulated):
    """Memory that is never touched is never mapped."""
    far = 2**31 + 16
    for strides in ((far, 16, 4, 1), (far, 1, 64, 16), (far, 17, 4, 1)):
        x = torch.empty(far + 512, dtype=torch.bfloat16).as_strided((2, 16, 4, 4), strides)
        moments(emulated, x.copy_(random(*x.shape)))


# --- numbers of a batch norm ------------------------------------------------------------------------------------------


def numbers(t: torch.Tensor | None) -> tuple[int, bool]:
    return (0, False) if t is None else (t.data_ptr(), t.dtype is torch.float64)


def blank(rows: int, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, channels) of NaN within NaN, and all of it."""
    t, buffer = guarded((1, 1, rows, channels), dtype)
    return t[0, 0], buffer


def assert_same(actual: torch.Tensor, expected: torch.Tensor, buffer: torch.Tensor) -> None:
    """Nothing is written around it, and it is the same sums of the same terms: roundings of float64, and one to its dtype."""
    assert buffer[:MARGIN].isnan().all() and buffer[-MARGIN:].isnan().all(), "written outside"
    expected = expected.double()
    limit = tolerances.batch_norm(expected, expected.abs() + 1, actual.dtype)
    tolerances.assert_within(actual, expected, limit + tolerances.rounding(expected, limit, actual.dtype))


@pytest.mark.parametrize("channels", [1, 5, 256, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_norm(emulated, dtype, channels):
    """One block and several of them, the last not full; with all that there may be, and without."""
    moments = reference.channel_moments(random(2, channels, 3, 5, dtype=torch.float64) + 3)
    count, mean, m2 = moments
    weight, bias = random(2, channels, dtype=dtype)
    sums = random(2, channels, dtype=dtype, seed=1)
    table, around = blank(3, channels, dtype)
    rows = [
        (mean, m2, count, weight, bias),
        (mean.to(dtype), m2.to(dtype), None, None, None),
        (mean, m2, None, weight, None),
    ]
    for given in rows:
        emulated.batch_norm_table(channels, 1e-3, [*map(numbers, given), numbers(table)])
        assert_same(table, reference.batch_norm_table(*given, 1e-3, dtype is torch.float64), around)
    results = [blank(n, channels, dtype) for n in (2, 1, 1)]
    told = [sums, moments, table, *(result for result, _ in results)]
    emulated.batch_norm_gradient(channels, 1e-3, [numbers(t) for t in told])
    for (result, buffer), expected in zip(
        results, reference.batch_norm_gradient(sums, moments, table, 1e-3), strict=True
    ):
        assert_same(result, expected.view_as(result), buffer)
    for momentum in (0.1, None):
        batches, running = torch.tensor(3), [blank(1, channels, dtype) for _ in range(2)]
        for row, _ in running:
            row.copy_(random(1, channels, dtype=dtype).abs())
        expected = [row[0].clone() for row, _ in running]
        reference.batch_norm_follow(*expected, batches.clone(), moments, momentum)
        rows = [numbers(moments), *(numbers(row) for row, _ in running)]
        emulated.batch_norm_follow(channels, momentum is None, momentum or 0, rows, batches.data_ptr())
        assert batches == 4
        for (row, buffer), wanted in zip(running, expected, strict=True):
            assert_same(row[0], wanted, buffer)


def test_memory_and_undefined_behaviour():
    """The same sources under AddressSanitizer and UndefinedBehaviorSanitizer, as a program of their own."""
    program = build.build("sanitize", "sanitize.cpp", *build.SANITIZE)
    environment = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
    result = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
