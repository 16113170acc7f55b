"""The CUDA sources, executed on the CPU: nvcc's input compiled by g++ and run thread by thread (tests/emulation)."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aliasfused.kernels import reference

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


def test_memory_and_undefined_behaviour():
    """The same sources under AddressSanitizer and UndefinedBehaviorSanitizer, as a program of their own."""
    program = build.build("sanitize", "sanitize.cpp", *build.SANITIZE)
    environment = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
    result = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
