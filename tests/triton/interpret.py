"""The Triton kernels on CPU tensors, run by tests/test_triton.py in a process of its own with TRITON_INTERPRET=1.

A batch of unit impulses, one an image, shows the whole operator at once, and its adjoint likewise: most tests feed that.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._prims_common import suggest_memory_format

import aliasfused
import test_contract as contract
import tolerances
from aliasfused import filters
from aliasfused.kernels import reference
from aliasfused.kernels.triton import blur_pool as ours
from aliasfused.kernels.triton import channel_moments as moments
from aliasfused.kernels.triton import max_blur_pool as steps
from aliasfused.kernels.triton.launch import Operand
from cases import StepCase, coarse, laid_out, random
from test_contract import Told
from truth import Step

BORDERS = ("reflect", "replicate", "zeros", "circular")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """The interpreter pays for each program, hardly for its size."""
    for module in (ours, moments, steps):
        monkeypatch.setattr(module, "THREADS", 1024)


@pytest.fixture
def launched(monkeypatch):
    """What was launched, as (kernel, arguments)."""
    calls = []
    launch = ours.launch

    def spy(device, threads, kernel, programs, arguments):
        calls.append((kernel, arguments))
        launch(device, threads, kernel, programs, arguments)

    monkeypatch.setattr(ours, "launch", spy)
    return calls


def row(k: int, seed: int = 0) -> list[float]:
    """Taps without symmetry or positivity, so that no mistake in order or sign cancels."""
    return torch.randn(k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + k)).tolist()


def same(k_h: int, k_w: int) -> list[int]:
    return [(k_w - 1) // 2, k_w // 2, (k_h - 1) // 2, k_h // 2]


def impulses(height: int, width: int) -> torch.Tensor:
    return torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)


def assert_close(actual: torch.Tensor, x: torch.Tensor, taps: tuple, truth) -> None:
    """Terms * eps * sum |tap| * max |x|, and the last place of the output: the interpreter cuts bfloat16 where a GPU rounds."""
    expected = truth(x.double())
    a, b = (
        torch.as_tensor(t, dtype=torch.float64).reshape(-1, len(t) if isinstance(t, list) else t.shape[-1])
        for t in taps
    )
    weight = (a.abs().sum(-1) * b.abs().sum(-1)).max() * (x.double().abs().max() if x.numel() else 0)
    acc = torch.float64 if x.dtype is torch.float64 else torch.float32
    # Each axis' sum has at most k terms, or with the images of a pixel at either border three times as many.
    bound = 4 * (a.shape[-1] + b.shape[-1]) * torch.finfo(acc).eps * weight + torch.finfo(x.dtype).eps * expected.abs()
    bound = bound + torch.finfo(x.dtype).smallest_normal
    excess = (actual.double() - expected).abs() - bound
    assert actual.dtype is x.dtype
    assert not excess.numel() or excess.max() <= 0, f"off by {excess.max():.3g} more than rounding explains"


def assert_operator(height, width, k, stride, padding, border):
    """Forward against the dense matrix, and the adjoint against its transpose."""
    taps = row(k[0]), row(k[1], 50)
    x = impulses(height, width)
    y = ours.blur_pool_fwd(x, *taps, stride, padding, border)
    truth = reference.blur_pool_fwd(x, *taps, stride, padding, border)
    assert y.shape == truth.shape
    torch.testing.assert_close(y, truth, rtol=0, atol=1e-14 * 2 ** sum(k).bit_length())
    dx = ours.blur_pool_bwd(impulses(*y.shape[2:]), *taps, stride, padding, border, height, width, False)
    torch.testing.assert_close(dx.flatten(1), truth.flatten(1).mT, rtol=0, atol=1e-13 * 2 ** sum(k).bit_length())


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("k", range(1, 9))
def test_stride_two(k, border):
    """Every unrolled filter; the sizes alternate between those whose rows are vectors and those whose rows are not."""
    height, width = [(7, 8), (8, 5), (6, 4), (9, 6)][(k + BORDERS.index(border)) % 4]
    assert_operator(height, width, (k, k), (2, 2), same(k, k), border)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize(
    ("size", "k", "stride"),
    [
        ((5, 6), (3, 3), (1, 1)),
        ((1, 9), (1, 5), (1, 2)),
        ((7, 4), (3, 4), (2, 1)),
        ((7, 7), (3, 3), (3, 3)),
        ((5, 7), (4, 3), (2, 3)),
        ((13, 2), (12, 3), (2, 2)),
    ],
)
def test_other_strides_and_filters(size, k, stride, border):
    assert_operator(*size, k, stride, same(*k), border)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("size", [(1, 3), (2, 1)])
def test_pads_larger_than_the_image(size, border):
    assert_operator(*size, (4, 3), (2, 2), [4, 3, 3, 2], border)


@pytest.mark.parametrize(
    ("padding", "border"),
    [([4, 1, 1, 5], "reflect"), ([3, 3, 4, 4], "replicate"), ([0, 0, 0, 0], "reflect"), ([6, 0, 0, 7], "zeros")],
)
def test_pads_other_than_the_default(padding, border):
    """Padding up to k - 1, or none, is still unrolled; its vectors of x may end before the outputs do."""
    assert_operator(8, 8, (5, 5), (2, 1), padding, border)


@pytest.mark.parametrize("size", [13, 14, 27])
def test_sizes_of_real_networks(size):
    x = torch.randn(1, 2, size, size)
    taps, args = (row(4), row(4)), ((2, 2), same(4, 4), "reflect")
    assert_close(ours.blur_pool_fwd(x, *taps, *args), x, taps, lambda x: reference.blur_pool_fwd(x, *taps, *args))
    dy = torch.randn(1, 2, -(-size // 2), -(-size // 2))
    rest = (*args, size, size, False)
    assert_close(ours.blur_pool_bwd(dy, *taps, *rest), dy, taps, lambda dy: reference.blur_pool_bwd(dy, *taps, *rest))


def layouts(dtype):
    base = torch.randn(2, 4, 8, 16).to(dtype)
    yield base
    yield base.to(memory_format=torch.channels_last)
    yield base[:, 1:, 1:, 3:]
    yield base[:, :, ::2, ::3]
    yield base[:1, :1, :1, :1].expand(2, 4, 5, 6)


@pytest.mark.parametrize("layout", range(5), ids=["nchw", "nhwc", "slice", "steps", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_dtypes_and_layouts(dtype, layout):
    """Values, and the memory format of x for the output and for dx, whatever that of dy."""
    x = next(itertools.islice(layouts(dtype), layout, None))
    taps, args = (row(4), row(3)), ((2, 2), same(4, 3), "reflect")
    y = ours.blur_pool_fwd(x, *taps, *args)
    assert_close(y, x, taps, lambda x: reference.blur_pool_fwd(x, *taps, *args))
    assert y.stride() == reference.blur_pool_fwd(x, *taps, *args).stride()
    dy = torch.ones((), dtype=dtype).expand(y.shape) if layout % 2 else torch.randn(y.shape).to(dtype)
    rest = (*args, *x.shape[2:], layout == 1)
    dx = ours.blur_pool_bwd(dy, *taps, *rest)
    assert_close(dx, dy, taps, lambda dy: reference.blur_pool_bwd(dy, *taps, *rest))
    assert dx.stride() == reference.blur_pool_bwd(dy, *taps, *rest).stride()


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("k", range(2, 8))
def test_tuned(k, dtype, channels_last, launched):
    """The tuned kernel serves what it is meant to, with vectors of 16 bytes of x."""
    vector = 16 // dtype.itemsize
    shape = (2, vector, 6, 6) if channels_last else (2, 1, 10, 2 * vector)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(shape).to(dtype).to(memory_format=memory_format)
    taps, args = (list(filters.binomial(k)),) * 2, ((2, 2), same(k, k), "reflect")
    y = ours.blur_pool_fwd(x, *taps, *args)
    assert_close(y, x, taps, lambda x: reference.blur_pool_fwd(x, *taps, *args))
    dy = torch.randn(y.shape).to(dtype).to(memory_format=memory_format)
    rest = (*args, *shape[2:], channels_last)
    assert_close(ours.blur_pool_bwd(dy, *taps, *rest), dy, taps, lambda dy: reference.blur_pool_bwd(dy, *taps, *rest))
    (down, forward), (up, backward) = launched
    assert down is up is ours.patch
    assert forward["SRC_ALIGN"] == backward["DST_ALIGN"] == vector


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_several_programs(channels_last, monkeypatch, launched):
    """Tiles that end amid an image, and others beyond the last one, in both directions of the tile."""
    monkeypatch.setattr(ours, "THREADS", 32)
    x = torch.randn((2, 33, 4, 4) if channels_last else (1, 3, 12, 70), dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    taps, args = (row(2), row(2)), ((2, 2), same(2, 2), "reflect")
    y = ours.blur_pool_fwd(x, *taps, *args)
    assert_close(y, x, taps, lambda x: reference.blur_pool_fwd(x, *taps, *args))
    rest = (*args, *x.shape[2:], channels_last)
    assert_close(ours.blur_pool_bwd(y, *taps, *rest), y, taps, lambda dy: reference.blur_pool_bwd(dy, *taps, *rest))
    for _, arguments in launched:
        columns = arguments["channels" if channels_last else "groups"]
        assert arguments["total"] > arguments["ROWS"] and columns > arguments["COLS"]


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize(
    ("channels_last", "stride"), [(False, (2, 2)), (True, (1, 3))], ids=["nchw-unrolled", "nhwc-looped"]
)
def test_taps_per_channel(border, channels_last, stride):
    """Both directions and both gradients, with taps whose rows are not contiguous."""
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    a, b = torch.randn(3, 3, dtype=torch.float64).mT, torch.randn(3, 8, dtype=torch.float64)[:, ::2]
    args = (stride, same(3, 4), border)
    y = ours.blur_pool_taps_fwd(x, a, b, *args)
    assert_close(y, x, (a, b), lambda x: reference.blur_pool_taps_fwd(x, a, b, *args))
    dy = torch.randn_like(y)
    rest = (*args, 7, 5, channels_last)
    assert_close(
        ours.blur_pool_taps_bwd(dy, a, b, *rest), dy, (a, b), lambda dy: reference.blur_pool_taps_bwd(dy, a, b, *rest)
    )
    for other, axis, size in ((b, 0, 3), (a, 1, 4)):
        grad = ours.blur_pool_taps_grad(dy, x, other, axis, size, *args)
        torch.testing.assert_close(
            grad, reference.blur_pool_taps_grad(dy, x, other, axis, size, *args), rtol=1e-12, atol=1e-12
        )


def test_shared_taps_and_gradient_in_several_shares(monkeypatch):
    """Rows of stride 0, bfloat16 pixels with float32 taps, and a sum split over programs: the same bits each time."""
    monkeypatch.setattr(ours, "THREADS", 32)
    x, dy = torch.randn(2, 3, 8, 18).bfloat16(), torch.randn(2, 3, 8, 18).bfloat16()
    other = torch.randn(1, 3).expand(3, 3)
    args = (dy, x, other, 0, 3, (1, 1), same(3, 3), "reflect")
    grad = ours.blur_pool_taps_grad(*args)
    assert grad.dtype is torch.float32
    torch.testing.assert_close(grad, reference.blur_pool_taps_grad(*args), rtol=1e-4, atol=1e-4)
    assert torch.equal(grad, ours.blur_pool_taps_grad(*args))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)])
def test_empty(shape):
    x, taps, args = torch.empty(shape), (row(3), row(3)), ((2, 2), same(3, 3), "reflect")
    y = ours.blur_pool_fwd(x, *taps, *args)
    assert y.shape == (*shape[:2], 2, 2)
    assert ours.blur_pool_bwd(y, *taps, *args, 4, 4, False).shape == shape
    grad = ours.blur_pool_taps_grad(y, x, torch.ones(shape[1], 3), 0, 3, *args)
    assert torch.equal(grad, torch.zeros(shape[1], 3))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("k", [3, 4])
def test_infinity_stays_within_its_window(k):
    """An output that does not read a pixel does not know its value: no tap of zero is multiplied with it."""
    taps, args = ([0.25] * k,) * 2, ((2, 2), same(k, k), "reflect")
    dy = torch.zeros(1, 1, 4, 4)
    dy[0, 0, 1, 2] = torch.inf
    touched = reference.blur_pool_bwd((dy != 0).float(), *taps, *args, 7, 7, False) != 0
    dx = ours.blur_pool_bwd(dy, *taps, *args, 7, 7, False)
    assert torch.equal(dx, torch.where(touched, torch.inf, 0.0))


def test_beyond_32_bit_addresses():
    """Strides that take an offset past 2^31 elements; memory that is never touched is never mapped."""
    far = 2**31 + 16
    x = torch.empty(far + 64, dtype=torch.bfloat16).as_strided((2, 2, 4, 4), (far, 16, 4, 1))
    x.copy_(torch.randn(2, 2, 4, 4))
    taps = row(3), row(3)
    for stride in ((2, 2), (3, 3)):
        args = (stride, same(3, 3), "reflect")
        y = ours.blur_pool_fwd(x, *taps, *args)
        assert_close(y, x, taps, lambda x, args=args: reference.blur_pool_fwd(x, *taps, *args))
    rest = ("none", (), (1, 2), (0,) * 4, [1.0], [1.0], (1, 1), (0,) * 4, "zeros")
    assert torch.equal(steps.max_blur_pool_fwd(x, None, *rest), F.max_pool2d(x, (1, 2), 1))
    dy, near = x[..., :3], (x[..., :3].clone(), x.clone())
    dx = steps.max_blur_pool_bwd(dy, x, None, None, *rest)
    assert torch.equal(dx, steps.max_blur_pool_bwd(*near, None, None, *rest))
    assert_moments(x)


def test_through_the_public_function():
    """use_backend routes CPU tensors here; gradients of first and second order of pixels and taps are right."""
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    a = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    with aliasfused.use_backend("triton"):
        assert torch.autograd.gradcheck(lambda x: aliasfused.blur_pool2d(x, 3), x, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda a: aliasfused.blur_pool2d(x, (a, 1)), a, fast_mode=True)
        scale = torch.ones(2, dtype=torch.float64, requires_grad=True)
        step = functools.partial(aliasfused.max_blur_pool2d, kernel_size=(1, 2), taps=2, act="silu")
        assert torch.autograd.gradcheck(lambda x, scale: step(x, scale=scale), (x, scale), fast_mode=True)


def test_status():
    rows = {b.device: b for b in aliasfused.backends() if b.name == "triton"}
    assert rows["cpu"].available and rows["cpu"].detail.startswith("triton ")
    assert rows["cuda"].available == (torch.version.cuda is not None)


def assert_step(case: StepCase, dtype: torch.dtype, layout: str) -> None:
    """Forward, backward and sums against the truth; where there is an affine, backward is given a correction too."""
    x = laid_out(coarse(*case.shape, dtype=dtype), layout)
    dy = laid_out(random(*case.shape[:2], *case.out, dtype=dtype, seed=1), layout)
    told, ulps = Told(case, dtype, "cpu"), 1.0 if dtype is torch.bfloat16 else 0.5
    y = steps.max_blur_pool_fwd(x, told.affine, *told.rest)
    truth = told.truth.blur.forward(told.truth.prepared(x))
    assert y.dtype is dtype and y.stride() == reference.max_blur_pool_fwd(x, told.affine, *told.rest).stride()
    tolerances.assert_within(y, truth, tolerances.step_forward(told.truth, x, truth, ulps), "y")
    correction = told.correction if case.affine else None
    dx = steps.max_blur_pool_bwd(dy, x, told.affine, correction, *told.rest)
    du, centred = told.truth.du(x, dy), told.truth.centred(x)
    truth = du
    if case.affine:
        shift, slope = correction.double()[:, :, None, None].unbind()
        truth = du * told.truth.affine[1, :, None, None] + shift + slope * centred
    assert (
        dx.dtype is dtype
        and dx.stride() == reference._like(x, x, suggest_memory_format(x) is torch.channels_last).stride()
    )
    tolerances.assert_within(dx, truth, tolerances.step_backward(told.truth, x, dy, correction, truth, ulps), "dx")
    sums = steps.max_blur_pool_sums(dy, x, told.affine, *told.rest)
    assert sums.dtype is tolerances.accumulator(dtype)
    truth = torch.stack([du.sum((0, 2, 3)), (du * centred).sum((0, 2, 3))])
    tolerances.assert_within(sums, truth, tolerances.step_sums(told.truth, x, dy, du), "sums")


ACTS = {
    "none": (), "relu": (), "relu6": (), "silu": (), "gelu": (), "gelu_tanh": (), "hardswish": (), "leaky_relu": (-0.5,),
    "softplus": (2.0, 1.5),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("act", ACTS)
def test_activations(act, dtype):
    """Without a maximum; at corners too, as arguments are eighths between -4 and 4, or with an affine -10 and 10."""
    affine = act == "relu6" or list(ACTS).index(act) % 2 == DTYPES.index(dtype)
    assert_step(
        StepCase("", (9, 13), (2, 3), (2, 2), None, "zeros", 2, 3, act, ACTS[act], affine=affine), dtype, "nhwc"
    )


@pytest.mark.parametrize("act", ["silu", "softplus"])
def test_tails(act):
    """What is small is right in all its digits."""
    x = torch.linspace(-80, 0, 161).view(1, 1, 1, -1)
    numbers, truth = ((1.0, 20.0), F.softplus) if act == "softplus" else ((), F.silu)
    y = steps.max_blur_pool_fwd(x, None, act, numbers, (1, 1), (0,) * 4, [1.0], [1.0], (1, 1), (0,) * 4, "zeros")
    torch.testing.assert_close(y.double(), truth(x.double()), rtol=4 * torch.finfo(torch.float32).eps, atol=0)


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
STEPS = (
    (BF16, "nhwc", StepCase("the usual one",
        (5, 6), kernel=(2, 2), act="relu", affine=True, batch=1,
    )),
    (FP32, "slice", StepCase("every window's border is one of x",
        (5, 4), (3, 3), kernel=(2, 2), max_padding=(1, 1, 1, 1), pad_mode="replicate", channels=1,
    )),
    (FP16, "slice of nhwc", StepCase("a pad ahead and one behind",
        (4, 5), (3, 3), (3, 1), kernel=(2, 2), max_padding=(1, 0, 0, 1), pad_mode="circular", affine=True, batch=1,
    )),
    (FP64, "nhwc", StepCase("of a ResNet",
        (5, 6), (3, 3), act="relu", kernel=(3, 3), max_padding=(1, 1, 1, 1), affine=True, batch=1,
    )),
    (BF16, "nchw", StepCase("no pad",
        (6, 5), (2, 2), (1, 2), act="hardswish", kernel=(3, 3), pad_mode="circular", channels=1,
    )),
    (FP32, "slice of nhwc", StepCase("three pads of four",
        (4, 4), (3, 2), act="leaky_relu", act_args=(0.25,), kernel=(3, 3), max_padding=(1, 0, 1, 1), pad_mode="zeros",
    )),
    (FP64, "transposed", StepCase("unequal sides",
        (5, 7), (3, 2), (2, 3), None, "zeros", 1, 2, "silu", (), (2, 3), (1, 1, 0, 0), True,
    )),
    (FP32, "nhwc", StepCase("unequal sides, stride 1",
        (3, 4), (2, 3), (1, 1), None, "replicate", 1, 3, "relu6", (), (2, 3), (0, 1, 1, 0), True,
    )),
    (FP16, "steps", StepCase("the other axis alone",
        (5, 3), (3, 1), (3, 2), None, "reflect", 1, 1, "softplus", (1.0, 20.0), (3, 1), (0, 0, 1, 1),
    )),
    (FP32, "expanded", StepCase("the same pixel everywhere",
        (4, 5), (1, 2), kernel=(2, 2), pad_mode="zeros", channels=1,
    )),
    (FP64, "nchw", StepCase("fewer pixels than in a window",
        (1, 2), (2, 2), kernel=(3, 3), max_padding=(1, 1, 1, 1),
    )),
    (FP64, "nchw", StepCase("a larger window, pixels that no output reads",
        (6, 7), (1, 2), (4, 3), None, "zeros", 1, 1, "gelu", (), (5, 4), (2, 2, 2, 2),
    )),
)  # fmt: skip


@pytest.mark.parametrize(("dtype", "layout", "case"), STEPS, ids=[case.reason for _, _, case in STEPS])
def test_steps(dtype, layout, case):
    assert_step(case, dtype, layout)


@pytest.mark.parametrize(
    ("kernel", "max_padding"),
    [((2, 2), (1, 0, 0, 1)), ((3, 3), (1, 1, 1, 1)), ((2, 3), (1, 1, 1, 0)), ((1, 2), (0,) * 4)],
)
def test_who_wins_a_window(kernel, max_padding):
    """Of equals the first, of nans the last, and of -inf alone the first that is in x: as in torch's maximum."""
    values = torch.tensor([-torch.inf, -torch.inf, -torch.inf, 0, 1, 1, torch.inf, torch.nan], dtype=torch.float64)
    x = values[torch.randint(len(values), (1, 16, 4, 5), generator=torch.Generator().manual_seed(0))]
    rest = ("none", (), kernel, max_padding, [1.0], [1.0], (1, 1), (0,) * 4, "zeros")
    truth = Step("none", (), None, kernel, max_padding, None)
    channels_last = x.to(memory_format=torch.channels_last)
    z = steps.max_blur_pool_fwd(channels_last, None, *rest)
    torch.testing.assert_close(z, truth.maxima(x), rtol=0, atol=0, equal_nan=True, check_stride=False)
    dz = coarse(*z.shape)
    dx = steps.max_blur_pool_bwd(dz, channels_last, None, None, *rest)
    torch.testing.assert_close(dx, truth.spread(x, dz), rtol=0, atol=0, check_stride=False)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_steps_in_several_programs_and_shares(layout, monkeypatch):
    """The same bits each time."""
    monkeypatch.setattr(steps, "THREADS", 32)
    monkeypatch.setattr(steps, "SHARES", 2)
    size, channels = ((3, 3), 34) if layout == "nhwc" else ((3, 100), 2)
    case = StepCase("", size, (1, 2), (1, 2), None, "zeros", 1, channels, "relu", (), (1, 2))
    assert_step(case, torch.float64, layout)
    x, dy = (
        laid_out(random(*case.shape, dtype=torch.float32), layout),
        random(*case.shape[:2], *case.out, dtype=torch.float32),
    )
    rest = Told(case, torch.float32, "cpu").rest
    first, second = (steps.max_blur_pool_sums(dy, x, None, *rest) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)])
def test_empty_step(shape):
    x, rest = torch.empty(shape), ("relu", (), (2, 2), (0,) * 4, row(3), row(3), (2, 2), same(3, 3), "reflect")
    y = steps.max_blur_pool_fwd(x, None, *rest)
    assert y.shape == (*shape[:2], 2, 2)
    assert steps.max_blur_pool_bwd(y, x, None, None, *rest).shape == shape
    assert torch.equal(steps.max_blur_pool_sums(y, x, None, *rest), torch.zeros(2, shape[1]))


def assert_moments(x: torch.Tensor) -> None:
    """The same bits each time."""
    actual = moments.channel_moments(x)
    assert torch.equal(actual, moments.channel_moments(x))
    tolerances.assert_within(actual, reference.channel_moments(x), tolerances.moments(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_moments(dtype):
    """Whole vectors, halves of them and single pixels or channels; one pixel, one channel, none."""
    for x in layouts(dtype):
        assert_moments(x)
    for shape in ((2, 12, 3, 4), (3, 5, 7, 3), (1, 3, 1, 1), (4, 40, 1, 1), (2, 1, 5, 8), (0, 3, 2, 2), (2, 0, 2, 2)):
        x = random(*shape, dtype=dtype)
        assert_moments(x)
        assert_moments(x.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "slice"])
def test_moments_in_several_shares_and_sums(layout, monkeypatch):
    """Of what float32 leaves of noise far from zero nothing more is lost."""
    for threads, programs, shape in ((32, 99, (2, 3, 32, 36)), (8, 1, (1, 2, 46, 50))):
        monkeypatch.setattr(moments, "THREADS", threads)
        monkeypatch.setattr(moments, "PROGRAMS", programs)
        x = laid_out((1e4 + random(*shape)).float(), layout)
        assert_moments(x)
        shares, _, plan = moments._plan(Operand.of(x), threads, programs)
        assert shares > 1 if programs > 1 else plan["share"] > plan["ROWS"] * plan["SUM"]


@pytest.mark.parametrize(("channels", "offset"), contract.NORMS)
def test_batch_norm(channels, offset):
    """By the contract of the backends."""
    case, place = (channels, offset), ("triton", "cpu")
    for dtype in (torch.float32, torch.float64):
        contract.test_batch_norm_gradient(*case, dtype, dtype is torch.float64, *place)
    for rows in (torch.float32, torch.float64, torch.bfloat16):
        contract.test_batch_norm_table(*case, rows, rows is torch.float64, *place)
        contract.test_batch_norm_follow(*case, rows, 0.1, *place)
    contract.test_batch_norm_table(*case, None, True, *place)
    contract.test_batch_norm_follow(*case, torch.float32, None, *place)
