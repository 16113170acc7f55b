"""The contract of the raw ops, the same for every backend, on ``--device``: see aliasfused/ops and csrc/blur_pool.h.

Each row of cases.py is run in every dtype, with numbers for taps and with taps per channel. Layouts take turns, two a row
and dtype, so that over the dtypes every row is seen in every layout, and over the rows every dtype.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import aliasfused
import tolerances
from cases import ADAPTIVE, CASES, DTYPES, LAYOUTS, STEPS, Case, StepCase, coarse, laid_out, random, row
from truth import Adaptive, Blur, Step

OPS = torch.ops.aliasfused
NAMES = ("native", "triton", "reference")


def status(name: str, device: str) -> aliasfused.kernels.Backend:
    return next(b for b in aliasfused.backends() if (b.name, b.device) == (name, device))


def cells() -> list:
    """(case, dtype, layout, taps, channels_last): the first layout with taps that are numbers, the second per channel."""
    names = list(LAYOUTS)
    rows = []
    for i, case in enumerate(CASES):
        for d, dtype in enumerate(DTYPES):
            for per_channel, skip in enumerate((0, 3)):
                layout = names[(i + d + skip) % len(names)]
                values = (case, dtype, layout, bool(per_channel), (i + d // 2 + per_channel) % 2 == 0)
                rows.append(pytest.param(*values, id=f"{str(dtype)[6:]}-{layout}-{case}"))
    return rows


def cells_of(cases) -> list:
    """(case, dtype, layout): layouts take turns, two a row and dtype."""
    names, rows = list(LAYOUTS), []
    for i, case in enumerate(cases):
        for d, dtype in enumerate(DTYPES):
            for skip in (0, 3):
                layout = names[(i + d + skip) % len(names)]
                rows.append(pytest.param(case, dtype, layout, id=f"{str(dtype)[6:]}-{layout}-{case}"))
    return rows


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        device = metafunc.config.getoption("device")
        metafunc.parametrize("backend", [name for name in NAMES if status(name, device).available])
    if "case" in metafunc.fixturenames:
        metafunc.parametrize(("case", "dtype", "layout", "per_channel", "channels_last"), cells())
    if "step" in metafunc.fixturenames:
        metafunc.parametrize(("step", "dtype", "layout"), cells_of(STEPS))
    if "adaptive" in metafunc.fixturenames:
        metafunc.parametrize(("adaptive", "dtype", "layout"), cells_of(ADAPTIVE))


@pytest.mark.parametrize("name", NAMES)
def test_backend_serves_the_device(name, device):
    """Where one does not, no test below runs it: this is the line that says so."""
    row = status(name, device)
    if not row.available:
        pytest.skip(f"backend {name} on {device}: {row.reason}")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def taps_of(case: Case, dtype: torch.dtype, per_channel: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As the kernels take them: in the accumulation dtype, (k,) or (C, k)."""
    dtype = tolerances.accumulator(dtype)
    if per_channel:
        return tuple(random(case.channels, k, seed=i).div(k**0.5).to(dtype) for i, k in enumerate(case.taps))
    return tuple(row(k, seed).to(dtype) for seed, k in enumerate(case.taps))


def on(device: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.to(device) for t in tensors]


def ulps_of(backend: str, device: str, dtype: torch.dtype) -> float:
    """A half, but for Triton's interpreter, which cuts float32 to bfloat16 where a GPU rounds."""
    return 1.0 if backend == "triton" and device == "cpu" and dtype is torch.bfloat16 else 0.5


def checked(backend: str, op, *args) -> torch.Tensor:
    """The op's result, after what holds for every op: strides as its fake says, inputs unharmed, the same bits again."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    before = [t.clone() for t in tensors]
    fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors]
    waiting = iter(fakes)
    fake = op(*(next(waiting) if isinstance(a, torch.Tensor) else a for a in args))
    results = []
    with aliasfused.use_backend(backend):
        for threads in (1, 1, 2) if backend == "native" else (1, 1):
            torch.set_num_threads(threads)
            # What an allocator hands out next is most likely what it was given back last: now that is poison.
            torch.full_like(fake, torch.nan, device=tensors[0].device)
            results.append(op(*args))
    y = results[0]
    assert (y.shape, y.stride(), y.dtype) == (fake.shape, fake.stride(), fake.dtype)
    assert y.device == tensors[0].device
    for t, b in zip(tensors, before, strict=True):
        assert torch.equal(t, b), "an input was changed"
    for again in results[1:]:
        assert torch.equal(again, y), "the same call gave other bits"
    return y


def test_forward(backend, case, dtype, layout, per_channel, channels_last, device):
    x = laid_out(random(*case.shape, dtype=dtype), layout, device)
    rows = taps_of(case, dtype, per_channel)
    args = (case.stride, case.sides, case.pad_mode)
    if per_channel:
        y = checked(backend, OPS.blur_pool_taps_fwd, x, *on(device, *rows), *args)
    else:
        y = checked(backend, OPS.blur_pool_fwd, x, *(r.tolist() for r in rows), *args)
    blur = Blur(case.size, *rows, *args)
    assert y.shape == (*case.shape[:2], *case.out)
    x = x.cpu()
    truth = blur.forward(x)
    tolerances.assert_within(y, truth, tolerances.forward(blur, x, truth, ulps_of(backend, device, dtype)), case.reason)


def test_adjoint(backend, case, dtype, layout, per_channel, channels_last, device):
    """dy in every layout, and dx in the format that the call names, whatever dy looks like."""
    dy = laid_out(random(*case.shape[:2], *case.out, dtype=dtype, seed=1), layout, device)
    rows = taps_of(case, dtype, per_channel)
    args = (case.stride, case.sides, case.pad_mode)
    grid = (*case.size, channels_last)
    if per_channel:
        dx = checked(backend, OPS.blur_pool_taps_bwd, dy, *on(device, *rows), *args, *grid)
    else:
        dx = checked(backend, OPS.blur_pool_bwd, dy, *(r.tolist() for r in rows), *args, *grid)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert dx.shape == case.shape
    assert dx.is_contiguous(memory_format=memory_format)
    blur = Blur(case.size, *rows, *args)
    dy = dy.cpu()
    truth = blur.adjoint(dy)
    tolerances.assert_within(
        dx, truth, tolerances.adjoint(blur, dy, truth, ulps_of(backend, device, dtype)), case.reason
    )


def test_gradient_of_the_taps(backend, case, dtype, layout, per_channel, channels_last, device):
    """Along each axis in turn; x in the layout of the row, dy in the one after it."""
    names, axis = list(LAYOUTS), int(per_channel)
    x = laid_out(random(*case.shape, dtype=dtype), layout, device)
    values = random(*case.shape[:2], *case.out, dtype=dtype, seed=1)
    dy = laid_out(values, names[(names.index(layout) + 1) % len(names)], device)
    rows = taps_of(case, dtype, True)
    args = (case.stride, case.sides, case.pad_mode)
    other = rows[1 - axis].to(device)
    grad = checked(backend, OPS.blur_pool_taps_grad, dy, x, other, axis, case.taps[axis], *args)
    blur = Blur(case.size, *rows, *args)
    dy, x = dy.cpu(), x.cpu()
    truth = blur.taps_gradient(dy, x, axis)
    tolerances.assert_within(grad, truth, tolerances.taps_gradient(blur, dy, x, axis, truth), case.reason)


def test_taps_of_any_strides(backend, device):
    """Rows that are a transposed matrix, every other column of one, or one row shown for every channel."""
    x = random(2, 3, 6, 7, dtype=torch.float32).to(device)
    args = ((2, 2), (1, 2, 1, 1), "reflect")
    a, b = random(3, 3, dtype=torch.float32).mT, random(3, 8, dtype=torch.float32)[:, ::2]
    for rows in ((a, b), (a[:1].expand(3, 3), b[:1].expand(3, 4))):
        blur = Blur((6, 7), *rows, *args)
        truth = blur.forward(x.cpu())
        with aliasfused.use_backend(backend):
            y = OPS.blur_pool_taps_fwd(x, *(r.to(device) for r in rows), *args)
        tolerances.assert_within(y, truth, tolerances.forward(blur, x.cpu(), truth))


class Told:
    """A row of STEPS: its truth, and the arguments of the raw ops that follow the tensors."""

    def __init__(self, step: StepCase, dtype: torch.dtype, device: str) -> None:
        rows = taps_of(step, dtype, False)
        geometry = (step.stride, step.sides, step.pad_mode)
        kind, channels = tolerances.accumulator(dtype), step.channels
        # Affines that are exact in every dtype, so that equals stay equal; one channel is turned round.
        scale = torch.tensor([2.0, -1.0, 0.5] * channels)[:channels]
        table = torch.stack([coarse(channels, seed=3) / 4, scale.double(), coarse(channels, seed=4) / 2]).to(kind)
        self.affine = table.to(device) if step.affine else None
        self.correction = random(2, channels, dtype=kind, seed=5).to(device) if step.affine else None
        self.truth = Step(
            step.act, step.act_args, table if step.affine else None, step.kernel, step.max_padding,
            Blur(step.prepared, *rows, *geometry),
        )  # fmt: skip
        self.rest = (step.act, step.act_args, step.kernel, step.max_padding, *(r.tolist() for r in rows), *geometry)


def test_step_forward(backend, step, dtype, layout, device):
    x = laid_out(coarse(*step.shape, dtype=dtype), layout, device)
    told = Told(step, dtype, device)
    y = checked(backend, OPS.max_blur_pool_fwd, x, told.affine, *told.rest)
    assert y.shape == (*step.shape[:2], *step.out)
    x = x.cpu()
    truth = told.truth.blur.forward(told.truth.prepared(x))
    limit = tolerances.step_forward(told.truth, x, truth, ulps_of(backend, device, dtype))
    tolerances.assert_within(y, truth, limit, step.reason)


@pytest.mark.parametrize("act", ["relu", "relu6", "hardswish"])
def test_nothing_flows_back_where_an_activation_is_flat(backend, act, device):
    """Not even of an infinite gradient. One pixel an image, so that nothing else meets it."""
    x = torch.tensor([-4.0, -3.0, 0.0, 1.0, 6.0, 7.0]).view(-1, 1, 1, 1).requires_grad_()
    dy = torch.full_like(x, torch.inf)
    (expected,) = torch.autograd.grad(getattr(F, act)(x), x, dy)
    rest = (act, [], (1, 1), (0, 0, 0, 0), [1.0], [1.0], (1, 1), (0, 0, 0, 0), "zeros")
    dx = checked(backend, OPS.max_blur_pool_bwd, *on(device, dy, x.detach()), None, None, *rest)
    assert torch.equal(dx.cpu(), expected)


def test_step_backward(backend, step, dtype, layout, device):
    """x in the layout of the row, dy in the one after it, where the row's is dense in that too; with a correction if an affine."""
    names = list(LAYOUTS)
    x = laid_out(coarse(*step.shape, dtype=dtype), layout, device)
    values = random(*step.shape[:2], *step.out, dtype=dtype, seed=1)
    for other in (names[(names.index(layout) + 1) % len(names)], *[layout] * (layout in ("nchw", "nhwc"))):
        check_step_backward(backend, step, dtype, x, laid_out(values, other, device), device)


def check_step_backward(backend, step, dtype, x, dy, device):
    told = Told(step, dtype, device)
    dx = checked(backend, OPS.max_blur_pool_bwd, dy, x, told.affine, told.correction, *told.rest)
    sums = checked(backend, OPS.max_blur_pool_sums, dy, x, told.affine, *told.rest)
    dy, x = dy.cpu(), x.cpu()
    du = told.truth.du(x, dy)
    truth, correction = du, None
    if told.affine is not None:
        correction = told.correction.cpu()
        shift, slope = correction.double()[:, :, None, None].unbind()
        truth = du * told.truth.affine[1, :, None, None] + shift + slope * told.truth.centred(x)
    ulps = ulps_of(backend, device, dtype)
    tolerances.assert_within(
        dx, truth, tolerances.step_backward(told.truth, x, dy, correction, truth, ulps), step.reason
    )
    truth = torch.stack([du.sum((0, 2, 3)), (du * told.truth.centred(x)).sum((0, 2, 3))])
    assert sums.dtype is tolerances.accumulator(dtype)
    tolerances.assert_within(sums, truth, tolerances.step_sums(told.truth, x, dy, du), step.reason)


# Sizes that fill vectors and do not, several sums to a channel and parts to a map; a mean that is large against the deviation.
MOMENTS = (
    (2, 3, 9, 14, 0), (1, 1, 1, 1, 3), (3, 5, 1, 2, 0), (1, 33, 1, 7, 10), (2, 17, 13, 31, 1e4), (4, 70, 5, 3, 1), (1, 64, 28, 27, 0),
    (1, 2, 300, 301, 100), (40, 3, 30, 31, 5), (2, 331, 9, 11, 0), (0, 3, 4, 4, 0), (2, 0, 4, 4, 0),
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", MOMENTS, ids=lambda shape: "x".join(map(str, shape[:4])))
def test_channel_moments(shape, layout, dtype, backend, device):
    *shape, offset = shape
    if backend == "triton" and device == "cpu" and math.prod(shape) > 1000:
        pytest.skip("Triton's interpreter is slow")
    x = laid_out(random(*shape).add(offset).to(dtype), layout, device)
    moments = checked(backend, OPS.channel_moments, x)
    x = x.cpu()
    count = x.numel() // max(x.shape[1], 1)
    mean = x.double().sum((0, 2, 3)) / max(count, 1)
    truth = torch.stack(
        [torch.full_like(mean, count), mean, (x.double() - mean[:, None, None]).square().sum((0, 2, 3))]
    )
    tolerances.assert_within(moments, truth, tolerances.moments(x))


# (C, what is added to x): fewer channels than a block of any backend and more; a mean that is large against the deviation.
NORMS = ((1, 0), (5, 1e4), (300, 3))
EPS = 1e-3


def normalised(channels: int, offset: float) -> tuple[torch.Tensor, ...]:
    """Pixels, and their count, mean, variance and moments."""
    x = random(2, channels, 5, 7) + offset
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    count = torch.full_like(mean, x.numel() // channels)
    return x, count, mean, var, torch.stack([count, mean, var * count])


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rows", [None, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("channels", "offset"), NORMS)
def test_batch_norm_table(channels, offset, rows, wide, backend, device):
    """Of moments, and of statistics in the dtype of the module; weights and statistics lie with gaps between them."""
    _, count, mean, var, moments = normalised(channels, offset)
    weight = bias = None
    if rows is not None:
        mean, var, weight, bias = (
            t.repeat_interleave(2).to(rows)[::2]
            for t in (mean, var, random(channels, seed=1), random(channels, seed=2))
        )
    w, b = (torch.full_like(count, value) if t is None else t.double() for t, value in ((weight, 1), (bias, 0)))
    weight, bias = (t if t is None else t.to(device) for t in (weight, bias))
    dtype = torch.float64 if wide else torch.float32
    for given in ((mean, var, None), (moments[1], moments[2], count)):
        given = [t if t is None else t.to(device) for t in given]
        actual = checked(backend, OPS.batch_norm_table, *given, weight, bias, EPS, wide)
        of, variance = (mean.double(), var.double()) if given[2] is None else (moments[1], moments[2] / count)
        scale = w / (variance + EPS).sqrt()
        rest = (actual[0].double().cpu() - of) * scale
        truth = torch.stack([of, scale, b + rest])
        magnitude = torch.stack([of.abs(), scale.abs(), b.abs() + rest.abs()])
        assert actual.dtype is dtype and torch.equal(actual[0].cpu(), of.to(dtype))
        tolerances.assert_within(actual, truth, tolerances.batch_norm(truth, magnitude, dtype))


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("rows", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("channels", "offset"), NORMS)
def test_batch_norm_follow(channels, offset, rows, momentum, backend, device):
    """Towards the batch's, of unbiased variance, and counted; what lies between statistics stays."""
    x, *_, moments = normalised(channels, offset)
    start = torch.stack([random(2 * channels), random(2 * channels, seed=1).abs()]).to(rows)
    batches = torch.tensor(4)

    def moved(start, batches, moments):
        start, batches = start.clone(), batches.clone()
        OPS.batch_norm_follow(*start[:, ::2], batches, moments, momentum)
        return torch.cat([start, batches.expand(2, 1).to(rows)], 1)

    actual = checked(backend, moved, *on(device, start, batches, moments))
    assert torch.equal(actual[:, 1:-1:2].cpu(), start[:, 1::2]) and bool((actual[:, -1] == 5).all())
    before, batch = start[:, ::2].double(), torch.stack([moments[1], x.var((0, 2, 3))])
    truth = before + (1 / 5 if momentum is None else momentum) * (batch - before)
    limit = tolerances.batch_norm(truth, before.abs() + batch.abs(), rows, ulps_of(backend, device, rows))
    tolerances.assert_within(actual[:, :-1:2], truth, limit)


@pytest.mark.parametrize("exact", [False, True], ids=["sums", "sums of processes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("channels", "offset"), NORMS)
def test_batch_norm_gradient(channels, offset, dtype, exact, backend, device):
    """Against torch's own in float64. Sums added up among processes are float64 whatever the table is."""
    x, count, mean, var, moments = normalised(channels, offset)
    dy, weight = random(*x.shape, seed=3), random(channels, seed=1)
    scale = weight / (var + EPS).sqrt()
    table = torch.stack([mean, scale, scale]).to(dtype)  # the shift is not looked at
    centred = x - table[0].double()[:, None, None]
    sums = torch.stack([dy.sum((0, 2, 3)), (dy * centred).sum((0, 2, 3))]).to(torch.float64 if exact else dtype)

    def rows(*arguments):
        correction, dweight, dbias = OPS.batch_norm_gradient(*arguments, EPS)
        return torch.stack([*correction, dweight, dbias])

    actual = checked(backend, rows, *on(device, sums, moments, table)).cpu()
    assert actual.dtype is dtype
    leaves = x.requires_grad_(), weight.requires_grad_(), torch.zeros_like(mean).requires_grad_()
    grads = torch.autograd.grad(F.batch_norm(x, None, None, *leaves[1:], True, eps=EPS), leaves, dy)
    first, second, dweight, dbias = actual.double()
    scale, far = scale.detach().abs()[:, None, None], centred.detach().abs() + (x.detach() - mean[:, None, None]).abs()
    dx = dy * table[1].double()[:, None, None] + first[:, None, None] + second[:, None, None] * centred
    share, spread = (dy.abs().mean((0, 2, 3), keepdim=True), (dy.abs() * far).mean((0, 2, 3), keepdim=True))
    spread = spread[0] / (var + EPS)[:, None, None]
    # The scale, the sums, what is made of them: each off by a rounding to dtype. Torch's mean is, by as many roundings of x.
    unit = 4 * torch.finfo(dtype).eps + x.numel() / channels * torch.finfo(torch.float64).eps * (1 + offset)
    tolerances.assert_within(dx.detach(), grads[0], unit * scale * (dy.abs() + share + far * spread))
    total = count * (spread[:, 0, 0] * (var + EPS).sqrt())
    tolerances.assert_within(dweight, grads[1], unit * total)
    tolerances.assert_within(dbias, grads[2], unit * count * share[0, :, 0, 0])


def test_adaptive(backend, adaptive, dtype, layout, device):
    """x in the layout of the row, logits in the next one, dy in the one after that."""
    names = list(LAYOUTS)
    of_logits, of_dy = (names[(names.index(layout) + i) % len(names)] for i in (1, 2))
    x = laid_out(random(*adaptive.shape, dtype=dtype), layout, device)
    logits = laid_out(random(*adaptive.logits_shape, dtype=dtype, seed=1), of_logits, device)
    arguments, ulps = adaptive.arguments, ulps_of(backend, device, dtype)
    y = checked(backend, OPS.adaptive_blur_pool_fwd, x, logits, *arguments)
    dy = laid_out(random(*y.shape, dtype=dtype, seed=2), of_dy, device)
    grid = (*adaptive.size, layout == "nhwc")
    dx = checked(backend, OPS.adaptive_blur_pool_bwd, dy, logits, *arguments, *grid)
    dlogits = checked(backend, OPS.adaptive_blur_pool_logits_grad, dy, x, logits, *arguments)
    x, logits, dy = x.cpu(), logits.cpu(), dy.cpu()
    blur = Adaptive(adaptive.size, logits, *arguments)
    truth = blur.forward(x)
    limit = tolerances.adaptive_forward(x, logits, arguments, truth, ulps)
    tolerances.assert_within(y, truth, limit, adaptive.reason)
    truth = blur.adjoint(dy)
    limit = tolerances.adaptive_adjoint(dy, logits, arguments, adaptive.size, truth, ulps)
    tolerances.assert_within(dx, truth, limit, adaptive.reason)
    truth = blur.logits_gradient(dy, x)
    limit = tolerances.adaptive_logits_grad(dy, x, logits, arguments, truth, ulps)
    tolerances.assert_within(dlogits, truth, limit, adaptive.reason)


def test_every_row_has_a_reason_and_a_name_of_its_own():
    for cases in (CASES, STEPS, ADAPTIVE):
        assert all(case.reason for case in cases)
        assert len({str(case) for case in cases}) == len(cases)
