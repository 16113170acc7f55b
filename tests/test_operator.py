"""The public functions as operators: all of each at once by unit impulses, and the properties, errors and limits of them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import tolerances
from aliasfused import blur_pool1d, blur_pool2d
from cases import BORDERS, DTYPES, random, row
from truth import Blur


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@st.composite
def blurs(draw):
    """(size, taps per axis, stride, padding, pad_mode) of small maps that any window fits into."""
    size = draw(st.sampled_from([(1, 60), (2, 40), (3, 35), (7, 13), (11, 9), (13, 6), (40, 2), (60, 1)]))
    size = tuple(draw(st.integers(1, n)) if draw(st.booleans()) else n for n in size)
    taps = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    stride = draw(st.one_of(st.just((2, 2)), st.tuples(st.integers(1, 5), st.integers(1, 5))))
    padding = draw(st.one_of(st.none(), st.tuples(*[st.integers(0, 12)] * 4)))
    sides = padding or ((taps[1] - 1) // 2, taps[1] // 2, (taps[0] - 1) // 2, taps[0] // 2)
    assume(size[0] + sides[2] + sides[3] >= taps[0] and size[1] + sides[0] + sides[1] >= taps[1])
    return size, taps, stride, padding, sides, draw(st.sampled_from(BORDERS))


def impulses(height: int, width: int, channels: int, dtype, memory_format) -> torch.Tensor:
    """One unit impulse an image; channel c carries c + 1 of it, so that channels cannot be taken for one another."""
    x = torch.eye(height * width, dtype=dtype).view(-1, 1, height, width)
    return (x * torch.arange(1, channels + 1, dtype=dtype).view(1, -1, 1, 1)).contiguous(memory_format=memory_format)


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    blurs(), st.sampled_from(DTYPES), st.integers(1, 3),
    st.sampled_from([torch.contiguous_format, torch.channels_last]), st.booleans(),
)  # fmt: skip
def test_impulses_show_the_whole_operator_and_its_transpose(window, dtype, channels, memory_format, learned):
    size, taps, stride, padding, sides, pad_mode = window
    kind = tolerances.accumulator(dtype)
    if learned:
        rows = tuple(random(channels, k, seed=i).to(kind) for i, k in enumerate(taps))
    else:
        rows = tuple(row(k, seed).to(kind) for seed, k in enumerate(taps))
    blur = Blur(size, *rows, stride, sides, pad_mode)
    arguments = (rows if learned else tuple(r.tolist() for r in rows), stride)

    x = impulses(*size, channels, dtype, memory_format).requires_grad_()
    y = blur_pool2d(x, *arguments, padding=padding, pad_mode=pad_mode)
    assert y.shape[2:] == blur.out
    truth = blur.forward(x.detach())
    tolerances.assert_within(y.detach(), truth, tolerances.forward(blur, x.detach(), truth), "operator")

    dy = impulses(*y.shape[2:], channels, dtype, memory_format)
    x = torch.zeros(len(dy), channels, *size, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    (dx,) = torch.autograd.grad(blur_pool2d(x, *arguments, padding=padding, pad_mode=pad_mode), x, dy)
    truth = blur.adjoint(dy)
    tolerances.assert_within(dx, truth, tolerances.adjoint(blur, dy, truth), "adjoint")


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(blurs(), st.sampled_from([torch.contiguous_format, torch.channels_last]))
def test_adjoint_identity(window, memory_format):
    """<Ax, y> = <x, A'y>, with neither side compared to a matrix."""
    size, taps, stride, padding, _, pad_mode = window
    x = random(2, 3, *size).contiguous(memory_format=memory_format).requires_grad_()
    rows = tuple(row(k, seed).tolist() for seed, k in enumerate(taps))
    y = blur_pool2d(x, rows, stride, padding=padding, pad_mode=pad_mode)
    dy = random(*y.shape, seed=1)
    (dx,) = torch.autograd.grad(y, x, dy)
    products = (y * dy).detach(), (x * dx).detach()
    scale = max(float(p.abs().sum()) for p in products) * sum(map(math.fsum, (map(abs, r) for r in rows)))
    terms = y.numel() + x.numel() + sum(taps) * 32
    assert abs(float(products[0].sum() - products[1].sum())) <= terms * torch.finfo(torch.float64).eps * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pad_mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("k", range(1, 9))
def test_a_constant_passes_with_gain_one(k, pad_mode, dtype):
    """Binomial taps and products of them are exact, so a power of two comes back to the bit, whatever the order of sums."""
    for size in ((9, 21), (2, 1)):
        for stride in (1, 2, 3):
            y = blur_pool2d(torch.full((1, 2, *size), 4.0, dtype=dtype), k, stride, padding=11, pad_mode=pad_mode)
            assert torch.equal(y, torch.full_like(y, 4.0))


EYE, SQUARE6, SQUARE5 = torch.eye(5), torch.arange(36.0).reshape(6, 6), torch.arange(25.0).reshape(5, 5)
GOLDEN = {
    "kornia's documentation, zeros": (EYE, 3, "zeros", [[0.3125, 0.0625, 0], [0.0625, 0.375, 0.0625], [0, 0.0625, 0.3125]]),
    "identity, reflect": (EYE, 3, "reflect", [[0.5, 0.125, 0], [0.125, 0.375, 0.125], [0, 0.125, 0.5]]),
    "kornia's documentation, after a maximum": (
        F.max_pool2d(EYE[None], 2, 1)[0], 3, "zeros", [[0.5625, 0.3125], [0.3125, 0.875]],
    ),
    "antialiased-cnns 6x6 k2": (SQUARE6, 2, "reflect", [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5], [27.5, 29.5, 31.5]]),
    "antialiased-cnns 6x6 k3": (SQUARE6, 3, "reflect", [[3.5, 5, 7], [12.5, 14, 16], [24.5, 26, 28]]),
    "antialiased-cnns 6x6 k4": (SQUARE6, 4, "reflect", [[5.25, 7, 8.75], [15.75, 17.5, 19.25], [26.25, 28, 29.75]]),
    "antialiased-cnns 6x6 k5": (SQUARE6, 5, "reflect", [[5.25, 6.5, 8.375], [12.75, 14, 15.875], [24, 25.25, 27.125]]),
    "antialiased-cnns 5x5 k3": (SQUARE5, 3, "reflect", [[3, 4.5, 6], [10.5, 12, 13.5], [18, 19.5, 21]]),
    "antialiased-cnns 5x5 k4": (SQUARE5, 4, "reflect", [[4.5, 6.25, 7], [13.25, 15, 15.75], [17, 18.75, 19.5]]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
    """Binary fractions all, so equal to the bit; recorded from the libraries that users come from."""
    x, k, pad_mode, expected = GOLDEN[name]
    assert torch.equal(blur_pool2d(x[None], k, pad_mode=pad_mode)[0], torch.tensor(expected))


def test_golden_taps_gradient():
    """d/da of a sum of outputs is the sum of what each tap reads: zeros beyond the border, blurred along the other axis."""
    x = torch.arange(9.0).reshape(1, 3, 3).requires_grad_()
    h = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    blur_pool2d(x, (h, 1), (2, 1), pad_mode="zeros").sum().backward()
    # Rows of x sum to 3, 12, 21; outputs are centred on rows 0 and 2.
    assert torch.equal(h.grad, torch.tensor([12.0, 3.0 + 21.0, 12.0]))
    assert torch.equal(x.grad, torch.tensor([2.0, 4.0, 2.0]).view(1, 3, 1).expand(1, 3, 3))


@pytest.mark.parametrize(("padding", "pad_mode"), [(None, "reflect"), ((3, 0), "reflect"), (2, "circular")])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_one_axis_is_two_with_a_row_of_one(k, padding, pad_mode):
    x = random(2, 3, 17)
    y = blur_pool1d(x, k, 3, padding=padding, pad_mode=pad_mode)
    sides = {None: ((k - 1) // 2, k // 2), 2: (2, 2)}.get(padding, padding)
    taps = [math.comb(k - 1, p) / 2 ** (k - 1) for p in range(k)]
    blur, x2 = Blur((1, 17), [1.0], taps, (1, 3), (*sides, 0, 0), pad_mode), x[:, :, None]
    truth = blur.forward(x2)
    tolerances.assert_within(y[:, :, None], truth, tolerances.forward(blur, x2, truth))
    assert torch.equal(blur_pool1d(x[0], k, 3, padding=padding, pad_mode=pad_mode), y[0])


X2, X1 = torch.ones(1, 2, 5, 5), torch.ones(1, 2, 5)
REFUSED_BY_BOTH = [
    ({"taps": 0}, ValueError, r"taps .*>= 1, got 0"),
    ({"taps": -3}, ValueError, r"taps .*>= 1, got -3"),
    ({"taps": True}, TypeError, r"taps must be .*got True"),
    ({"taps": 2.5}, TypeError, r"taps must be .*got 2\.5"),
    ({"taps": None}, TypeError, r"taps must be .*got None"),
    ({"taps": "121"}, TypeError, r"taps must be .*got '121'"),
    ({"taps": []}, ValueError, r"taps .*non-empty.*got \[\]"),
    ({"taps": [1, 2, 1]}, ValueError, r"taps .*finite floats.*got \[1, 2, 1\]"),
    ({"taps": [0.5, math.nan]}, ValueError, r"taps .*finite.*nan"),
    ({"taps": [0.5, math.inf, 0.5]}, ValueError, r"taps .*finite.*inf"),
    ({"taps": torch.ones(1, 1, 3)}, ValueError, r"taps .*\(k,\) or \(C, k\).*\(1, 1, 3\)"),
    ({"taps": torch.ones(0)}, ValueError, r"taps .*k >= 1.*\(0,\)"),
    ({"taps": torch.ones(3, dtype=torch.int64)}, TypeError, r"taps .*floating.*int64"),
    ({"taps": torch.ones(3, 3)}, ValueError, r"taps.* one per channel of x \(2\), got shape \(3, 3\)"),
    ({"taps": torch.ones(3, device="meta")}, ValueError, r"taps.* device of x \(cpu\), got meta"),
    ({"stride": 0}, ValueError, r"stride .*>= 1.*got 0"),
    ({"stride": 2.0}, ValueError, r"stride .*got 2\.0"),
    ({"stride": True}, ValueError, r"stride .*got True"),
    ({"stride": 2**40}, ValueError, r"stride .*below 2\*\*30.*got 1099511627776"),
    ({"padding": -1}, ValueError, r"padding .*>= 0.*got -1"),
    ({"padding": 2**62}, ValueError, r"padding .*below 2\*\*30"),
    ({"pad_mode": ["reflect"]}, ValueError, r"pad_mode .*got \['reflect'\]"),
    ({"padding": 1.5}, ValueError, r"padding .*got 1\.5"),
    ({"padding": "same"}, ValueError, r"padding .*got 'same'"),
    ({"padding": (1, 2, 3)}, ValueError, r"padding .*got \(1, 2, 3\)"),
    ({"padding": (0, -1)}, ValueError, r"padding .*got \(0, -1\)"),
    ({"pad_mode": "constant"}, ValueError, r"pad_mode .*'reflect', 'replicate', 'zeros', 'circular', got 'constant'"),
    ({"pad_mode": None}, ValueError, r"pad_mode .*got None"),
    ({"taps": 7, "padding": 0}, ValueError, r"(width|length) 5 with padding \(0, 0\) is shorter than the 7 taps"),
]  # fmt: skip
REFUSED_2D = [
    ({"x": [[1.0]]}, TypeError, r"x must be a torch\.Tensor, got list"),
    ({"x": torch.ones(5, 5)}, ValueError, r"x must have shape \(N, C, H, W\) or \(C, H, W\), got \(5, 5\)"),
    ({"x": torch.ones(1, 1, 1, 5, 5)}, ValueError, r"x must have shape .*got \(1, 1, 1, 5, 5\)"),
    ({"x": torch.ones(1, 1, 5, 5, dtype=torch.int32)}, TypeError, r"x must be float32.*got torch\.int32"),
    ({"x": torch.ones(1, 1, 5, 5, dtype=torch.complex64)}, TypeError, r"x must be float32.*complex64"),
    ({"x": torch.ones(1, 1, 5, 5).to_sparse()}, TypeError, r"x must be a dense .*sparse"),
    ({"x": torch.ones(1, 1, 0, 5)}, ValueError, r"x must have a height of at least 1, got 0"),
    ({"x": torch.ones(1, 1, 5, 0)}, ValueError, r"x must have a width of at least 1, got 0"),
    ({"x": torch.ones(1, 1, 2, 9), "taps": 4, "padding": 0}, ValueError, r"height 2 with padding .*4 taps"),
    ({"taps": (0, 3)}, ValueError, r"taps\[0\] .*>= 1, got 0"),
    ({"taps": (3, None)}, TypeError, r"taps\[1\] .*got None"),
    ({"taps": (3, [1])}, ValueError, r"taps\[1\] .*got \[1\]"),
    ({"taps": (3, 3, 3)}, ValueError, r"taps .*got \(3, 3, 3\)"),
    ({"taps": (torch.ones(3, 3), 3)}, ValueError, r"taps.* one per channel of x \(2\), got shape \(3, 3\)"),
    ({"stride": (2, 0)}, ValueError, r"stride .*got \(2, 0\)"),
    ({"stride": (1, 2, 3)}, ValueError, r"stride .*got \(1, 2, 3\)"),
    ({"padding": (1, 2, 3, -4)}, ValueError, r"padding .*got \(1, 2, 3, -4\)"),
]  # fmt: skip
REFUSED_1D = [
    ({"x": [1.0]}, TypeError, r"x must be a torch\.Tensor, got list"),
    ({"x": torch.ones(5)}, ValueError, r"x must have shape \(N, C, L\) or \(C, L\), got \(5,\)"),
    ({"x": torch.ones(1, 1, 1, 5)}, ValueError, r"x must have shape .*got \(1, 1, 1, 5\)"),
    ({"x": torch.ones(1, 1, 5, dtype=torch.bool)}, TypeError, r"x must be float32.*bool"),
    ({"x": torch.ones(1, 1, 0)}, ValueError, r"x must have a length of at least 1, got 0"),
    ({"taps": (3, 3)}, ValueError, r"taps .*got \(3, 3\)"),
    ({"stride": (1, 2)}, ValueError, r"stride .*got \(1, 2\)"),
    ({"padding": (1, 2, 3, 4)}, ValueError, r"padding .*got \(1, 2, 3, 4\)"),
]  # fmt: skip


def _refusals(function, x, rows):
    for i, (arguments, error, message) in enumerate(rows):
        yield pytest.param(
            function, {"x": x} | arguments, error, message, id=f"{function.__name__}-{i}-{'-'.join(arguments)}"
        )


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        *_refusals(blur_pool2d, X2, REFUSED_BY_BOTH + REFUSED_2D),
        *_refusals(blur_pool1d, X1, REFUSED_BY_BOTH + REFUSED_1D),
    ],
)
def test_a_wrong_argument_is_named(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(**arguments)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pad_mode", BORDERS)
def test_an_infinity_stays_within_the_windows_that_read_it(value, dtype, memory_format, pad_mode):
    """No result is told of a pixel that it does not read, not even times zero; positive taps, so that none vanish."""
    for k, stride, size in (
        (3, 2, (7, 37)),
        (4, 2, (6, 70)),
        (7, 2, (5, 33)),
        (5, 1, (4, 40)),
        (4, 3, (7, 41)),
        (12, 2, (3, 19)),
        (3, 2, (13, 13)),  # short rows, and planes, lie side by side in one vector
        (4, 2, (14, 14)),
        (5, 2, (5, 28)),
    ):
        blur = Blur(size, [1.0] * k, [1.0] * k, (stride,) * 2, ((k - 1) // 2, k // 2) * 2, pad_mode)
        for down, shape, touch in ((True, size, blur.forward), (False, blur.out, blur.adjoint)):
            for place in ((0, 0), (shape[0] - 1, shape[1] // 2), (shape[0] // 2, shape[1] - 1)):
                x = torch.zeros(1, 3, *shape, dtype=dtype)
                x[(0, 1, *place)] = value
                touched = touch(torch.isfinite(x).logical_not()) > 0
                x = x.contiguous(memory_format=memory_format)
                taps, stride2 = [1.0 / k] * k, (stride, stride)
                if down:
                    y = blur_pool2d(x, taps, stride2, pad_mode=pad_mode)
                else:
                    sides = ((k - 1) // 2, k // 2) * 2
                    last = memory_format is torch.channels_last
                    y = torch.ops.aliasfused.blur_pool_bwd(x, taps, taps, stride2, sides, pad_mode, *size, last)
                assert torch.equal(~torch.isfinite(y), touched), (k, stride, down, place)
                assert not y[~touched].any()


@pytest.mark.parametrize("memory_format", ["rows", "pixels"])
def test_addresses_beyond_32_bits(memory_format):
    """Strides that take offsets past 2^31 elements; memory that is never touched is never mapped."""
    far = 2**31 + 16
    strides = (far, 48, 6, 1) if memory_format == "rows" else (far, 1, 18, 3)
    x = torch.empty(far + 200, dtype=torch.bfloat16).as_strided((2, 3, 5, 6), strides)
    x.copy_(random(2, 3, 5, 6))
    for stride in ((2, 2), (1, 3)):
        blur = Blur((5, 6), row(3), row(4), stride, (1, 2, 1, 1), "reflect")
        truth = blur.forward(x)
        y = torch.ops.aliasfused.blur_pool_fwd(x, row(3).tolist(), row(4).tolist(), stride, (1, 2, 1, 1), "reflect")
        tolerances.assert_within(y, truth, tolerances.forward(blur, x, truth))
        dy = x[:, :, : y.shape[2], : y.shape[3]]
        truth = blur.adjoint(dy)
        dx = torch.ops.aliasfused.blur_pool_bwd(
            dy, row(3).tolist(), row(4).tolist(), stride, (1, 2, 1, 1), "reflect", 5, 6, False
        )
        tolerances.assert_within(dx, truth, tolerances.adjoint(blur, dy, truth))


@pytest.mark.large
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_more_outputs_than_32_bits_count(memory_format):
    """One row shown again and again (no memory), blurred to more than 2^31 outputs (4.3 GB): all rows are alike."""
    channels, width, height = 16, 2**14, 2**13 + 8
    line = random(1, channels, 1, width, dtype=torch.bfloat16)
    if memory_format is torch.channels_last:
        line = line.contiguous(memory_format=memory_format)
    y = blur_pool2d(line.expand(1, channels, height, width), (2, 3), 1, pad_mode="replicate")
    assert y.numel() > 2**31
    expected = blur_pool2d(line, (1, 3), 1, pad_mode="replicate")
    assert all(torch.equal(y[:, :, i : i + 64], expected.expand_as(y[:, :, i : i + 64])) for i in range(0, height, 64))
