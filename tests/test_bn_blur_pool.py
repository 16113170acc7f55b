"""A batch norm fused with what follows it: against BatchNorm2d in float64, in training and in evaluation, alone and among processes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn

import aliasfused
import tolerances
from agreement import assert_agree, bound, convolved, pascal, same
from aliasfused.nn import BNActBlurPool2d
from aliasfused.ops.channel_moments import channel_moments, merged
from cases import random
from truth import ACTIVATIONS

pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit:DeprecationWarning")
FORMATS = [torch.contiguous_format, torch.channels_last]
ACTS = ["none", "relu", "silu", ("leaky_relu", 0.1)]


class Unfused(nn.Module):
    """What it stands for, of torch's own modules and operations."""

    def __init__(
        self, channels, act="relu", k=4, stride=2, pad_mode="reflect", max_kernel=None, max_padding=0, **options
    ):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, **options)
        self.act, self.blur, self.maximum = act, (k, stride, pad_mode), (max_kernel, max_padding)

    def forward(self, x):
        z, (k, stride, pad_mode), (kernel, padding) = self.bn(x), self.blur, self.maximum
        z = ACTIVATIONS[self.act](z) if isinstance(self.act, str) else ACTIVATIONS[self.act[0]](*self.act[1:], z)
        z = z if kernel is None else F.max_pool2d(z, kernel, 1, padding)
        return convolved(z, pascal(k), pascal(k), stride, same(k, k), pad_mode)


def pair(channels=3, act="relu", max_kernel=None, max_padding=0, dtype=torch.float64, **options):
    """A fused module and its unfused form, with the same numbers in them."""
    fused = BNActBlurPool2d(channels, act, max_kernel_size=max_kernel, max_padding=max_padding, dtype=dtype, **options)
    unfused = Unfused(channels, act, max_kernel=max_kernel, max_padding=max_padding, dtype=dtype, **options)
    for i, (ours, theirs) in enumerate(zip(fused.parameters(), unfused.parameters(), strict=True)):
        with torch.no_grad():
            ours.copy_(random(channels, seed=10 + i))
            theirs.copy_(ours)
    return fused, unfused


def gradients(module, x, seed=9):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    wanted = [x, *module.parameters()]
    return y, torch.autograd.grad(y, wanted, random(*y.shape, dtype=y.dtype, seed=seed))


def assert_close(actual, expected, factor=1.0):
    """Of float64, where only roundings differ."""
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    assert_agree(actual, expected, 4000 * factor * torch.finfo(torch.float64).eps * scale)


# --- the batch norm alone: one tap at stride 1 hides nothing -------------------------------------------------------------


def maps(name: str) -> torch.Tensor:
    return {
        "usual": lambda: random(4, 5, 13, 17) * 3,
        "offset 10^2": lambda: random(4, 5, 13, 17) + 100,
        "offset 10^4": lambda: random(2, 5, 31, 33) * torch.tensor([1.0, 0.1, 2, 30, 5])[:, None, None] + 1e4,
        "batch of one": lambda: random(1, 7, 8, 9) - 2,
        "two values a channel": lambda: random(1, 3, 1, 2) * 5,
        "constant channels": lambda: (
            torch.tensor([0.0, 1.0, -3.7, 1e4])[:, None, None].double().expand(2, 4, 9, 7).clone()
        ),
        "nearly constant": lambda: 1000 + 1e-3 * random(2, 3, 16, 16),
        "outliers": lambda: (
            random(2, 3, 40, 41) + 500.0 * (torch.arange(2 * 3 * 40 * 41).view(2, 3, 40, 41) % 977 == 0)
        ),
    }[name]()


MAPS = [
    "usual",
    "offset 10^2",
    "offset 10^4",
    "batch of one",
    "two values a channel",
    "constant channels",
    "nearly constant",
    "outliers",
]


def error_limit(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """Elementwise: of u = (x - m) s w + b, m and v as far off as moments may be, and a rounding for each operation."""
    unit = torch.finfo(tolerances.accumulator(dtype)).eps
    wide = x.double()
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    _, off_mean, off_m2 = tolerances.moments(x)
    off_var = off_m2 * var.numel() / wide.numel()
    # |d (v + eps)^-1/2| <= dv / (2 (v + eps - dv)^3/2)
    steep = off_var / (2 * (var + eps - off_var).clamp(min=eps / 2))
    scale = weight.abs() / (var + eps).sqrt()
    distance, shape = (wide - mean[:, None, None]).abs(), (-1, 1, 1)
    error = scale.view(shape) * (off_mean.view(shape) + distance * (steep.view(shape) + 4 * unit))
    # The mean as it is subtracted is off by half a unit, for which the bias makes up.
    error = error + 4 * unit * (bias.abs() + scale * unit * mean.abs()).view(shape)
    u = (wide - mean[:, None, None]) * (weight / (var + eps).sqrt())[:, None, None] + bias[:, None, None]
    return error + tolerances.rounding(u, error, dtype)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MAPS)
def test_as_exact_as_float64(name, dtype, memory_format):
    """Errors against BatchNorm2d in float64 stay within roundings' bound, or are no more than torch's own."""
    x = maps(name).to(dtype).contiguous(memory_format=memory_format)
    channels, kind = x.shape[1], tolerances.accumulator(dtype)
    ours = BNActBlurPool2d(channels, "none", 1, 1, dtype=kind)
    weight, bias = random(channels, seed=1).to(kind), random(channels, seed=2).to(kind)
    torchs, exact = nn.BatchNorm2d(channels, dtype=kind), nn.BatchNorm2d(channels, dtype=torch.float64)
    with torch.no_grad():
        for module in (ours, torchs, exact):
            module.weight.copy_(weight), module.bias.copy_(bias)
    y, dx = _normalised(ours, x)
    aten, aten_dx = _normalised(torchs, x.contiguous())
    truth, truth_dx = _normalised(exact, x.double().contiguous())
    assert y.dtype is dtype and y.is_contiguous(memory_format=memory_format)
    limit = error_limit(x, weight.double(), bias.double(), ours.eps, dtype)
    tolerances.assert_within(y, truth, torch.maximum(limit, (aten.double() - truth).abs().max()), name)
    # The gradient: the largest of its three terms, each off by what the scale is off by, and by the sums' roundings.
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    scale = (weight.double() / (var + ours.eps).sqrt()).abs()[:, None, None]
    hat = (x.double() - mean[:, None, None]) / (var + ours.eps).sqrt()[:, None, None]
    dy = random(*x.shape, dtype=dtype, seed=9).double()
    terms = scale * (
        dy.abs() + dy.abs().mean((0, 2, 3), keepdim=True) + hat.abs() * (dy * hat).abs().mean((0, 2, 3), keepdim=True)
    )
    off = terms * (x.numel() / channels + 64) * torch.finfo(kind).eps
    limit = torch.maximum(off + tolerances.rounding(truth_dx, off, dtype), (aten_dx.double() - truth_dx).abs().max())
    tolerances.assert_within(dx, truth_dx, limit, name)
    _, off_mean, off_m2 = 0.1 * tolerances.moments(x)
    for which, off in (("running_mean", off_mean), ("running_var", off_m2 / (x.numel() / channels - 1))):
        truth = getattr(exact, which)
        tolerances.assert_within(getattr(ours, which), truth, off + tolerances.rounding(truth, off, kind), name)


def _normalised(module, x):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    (dx,) = torch.autograd.grad(y, x, random(*y.shape, seed=9).to(x.dtype).to(y.dtype))
    return y.detach(), dx


# --- the whole step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("max_kernel, max_padding", [(None, 0), (2, 0), (3, 1)])
@pytest.mark.parametrize("act", ACTS)
def test_training_and_evaluation(act, max_kernel, max_padding, memory_format):
    """Values, gradients and running statistics over three batches, then by the statistics they have left."""
    fused, unfused = pair(3, act, max_kernel, max_padding)
    for batch in range(3):
        x = (random(2, 3, 9, 8, seed=batch) * 2 + 5).contiguous(memory_format=memory_format)
        (y, grads), (expected, wanted) = gradients(fused, x), gradients(unfused, x)
        for a, b in zip((y, *grads), (expected, *wanted), strict=True):
            assert_close(a, b, x.numel())
        assert y.is_contiguous(memory_format=memory_format)
        for a, b in zip(fused.buffers(), unfused.buffers(), strict=True):
            assert_close(a, b) if a.is_floating_point() else assert_agree(a, b, 0.0)
    fused.eval(), unfused.eval()
    (y, grads), (expected, wanted) = gradients(fused, x), gradients(unfused, x)
    for a, b in zip((y, *grads), (expected, *wanted), strict=True):
        assert_close(a, b, x.numel())
    with torch.no_grad():
        assert_close(fused(x), expected)


@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"momentum": 0.7}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1}]
)
def test_options_of_a_batch_norm(options):
    fused, unfused = pair(**options)
    for training in (True, True, False, True):
        fused.train(training), unfused.train(training)
        x = random(2, 3, 7, 6, seed=int(training))
        (y, grads), (expected, wanted) = gradients(fused, x), gradients(unfused, x)
        for a, b in zip((y, *grads, *fused.buffers()), (expected, *wanted, *unfused.buffers()), strict=True):
            assert_close(a, b, x.numel()) if a.is_floating_point() else assert_agree(a, b, 0.0)


def test_gradients_that_nobody_asked_for():
    fused, _ = pair()
    x = random(2, 3, 7, 6)
    fused.weight.requires_grad_(False)
    fused(x).sum().backward()
    assert fused.weight.grad is None and fused.bias.grad is not None
    x.requires_grad_()
    fused.requires_grad_(False)
    fused(x).pow(2).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_maps_and_single_parameters(dtype):
    fused, unfused = pair(dtype=torch.float32)
    x = random(2, 3, 9, 8, dtype=dtype)
    y = fused(x)
    assert y.dtype is dtype and fused.running_mean.dtype is torch.float32
    assert_agree(y.float(), unfused(x.float()), bound(x, 64, 4.0))
    with torch.autocast("cpu", dtype=dtype):
        assert fused(x.float()).dtype is dtype


def test_an_empty_batch_moves_nothing():
    fused, unfused = pair()
    x = torch.empty(0, 3, 8, 8, dtype=torch.float64)
    assert gradients(fused, x)[0].shape == (0, 3, 4, 4)
    assert torch.equal(fused.running_mean, unfused.bn.running_mean) and torch.equal(
        fused.running_var, unfused.bn.running_var
    )


def test_little_is_kept():
    kept = []
    fused, x = BNActBlurPool2d(4), torch.randn(2, 4, 64, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused(x)
    assert sum(t.numel() for t in kept if t.data_ptr() != x.data_ptr()) <= x.numel() / 32


# --- as a module ---------------------------------------------------------------------------------------------------------


def test_state_is_that_of_a_batch_norm():
    bn, fused = nn.BatchNorm2d(5), BNActBlurPool2d(5, max_kernel_size=3, max_padding=1)
    assert list(fused.state_dict()) == list(bn.state_dict())
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in bn.named_parameters()]
    bn(torch.randn(2, 5, 4, 4))
    fused.load_state_dict(bn.state_dict())
    bn.load_state_dict(fused.state_dict())
    assert torch.equal(fused.running_var, bn.running_var) and fused.num_batches_tracked == 1
    old = {k: v for k, v in bn.state_dict().items() if k != "num_batches_tracked"}  # as before torch 0.4.1
    fused.load_state_dict(old)


def test_made_of_a_batch_norm():
    bn = nn.BatchNorm2d(3, momentum=0.3, eps=1e-3).eval()
    fused = BNActBlurPool2d.from_batchnorm2d(bn, "silu", 3, max_kernel_size=2)
    assert fused.weight is bn.weight and fused.running_var is bn.running_var and not fused.training
    fused.train()(torch.randn(4, 3, 8, 8))
    assert bn.num_batches_tracked == 1 and bool((bn.running_mean != 0).all())
    assert (fused.eps, fused.momentum, fused.affine, fused.track_running_stats) == (1e-3, 0.3, True, True)
    with pytest.raises(TypeError, match=r"bn must be a torch\.nn\.BatchNorm2d"):
        BNActBlurPool2d.from_batchnorm2d(nn.GroupNorm(1, 3))


def test_copied_and_pickled():
    fused = BNActBlurPool2d(3)
    x = torch.randn(2, 3, 8, 8)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert other.statistics.owner is other
        assert torch.equal(other.eval()(x), fused.eval()(x))


def test_tools_that_look_for_batch_norms():
    """Frozen by eval() on what is a BatchNorm2d; statistics taken anew, as for averaged weights; nothing else to be found."""
    model = nn.Sequential(BNActBlurPool2d(3))
    found = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert found == [model[0].statistics]
    x = torch.randn(4, 3, 8, 8) + 3
    found[0].eval()
    model(x)
    assert model[0].num_batches_tracked == 0
    model.train()
    model(x), model(2 * x)
    torch.optim.swa_utils.update_bn([x, x + 1], model)
    expected = nn.Sequential(nn.BatchNorm2d(3))
    torch.optim.swa_utils.update_bn([x, x + 1], expected)
    assert_agree(model[0].running_mean, expected[0].running_mean, 1e-6)
    assert model[0].momentum == 0.1 and model[0].num_batches_tracked == 2


def test_converted_to_a_synchronised_one():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 3, 1), BNActBlurPool2d(3)))
    assert isinstance(model[1], BNActBlurPool2d) and isinstance(model[1].statistics, nn.SyncBatchNorm)
    assert list(model.state_dict())[2:] == [f"1.{name}" for name in nn.BatchNorm2d(3).state_dict()]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model[1](x), BNActBlurPool2d(3)(x))  # one process has nobody to share with
    model[1].statistics = nn.GroupNorm(1, 3)
    with pytest.raises(TypeError, match="replaced by a GroupNorm"):
        model(x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BNActBlurPool2d(0), ValueError, "num_features must be an int >= 1"),
        (lambda: BNActBlurPool2d(3, "swish"), ValueError, "act must be one of"),
        (lambda: BNActBlurPool2d(3, max_kernel_size=0), ValueError, "kernel_size must be"),
        (lambda: BNActBlurPool2d(3, taps=torch.ones(2, requires_grad=True)), TypeError, "taps of a fused module"),
        (lambda: BNActBlurPool2d(3)(torch.ones(3, 8, 8)), ValueError, r"must be \(N, C, H, W\)"),
        (lambda: BNActBlurPool2d(3)(torch.ones(1, 4, 8, 8)), ValueError, "the batch norm's 3 channels"),
        (lambda: BNActBlurPool2d(3)(torch.ones(1, 3, 1, 1)), ValueError, "more than one value per channel"),
        (lambda: BNActBlurPool2d(3)(torch.ones(1, 3, 8, 8, dtype=torch.int32)), TypeError, "float"),
    ],
)  # fmt: skip
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- what PyTorch does to it ---------------------------------------------------------------------------------------------


def smooth(training=True):
    """A module that is a pure function in training, too, and differentiable everywhere."""
    fused, _ = pair(2, "silu", 2, track_running_stats=not training)
    return fused.train(training)


def as_function(module):
    def run(x, weight, bias):
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))

    return run


def values(batch=()):
    return random(*batch, 2, 2, 4, 5), random(*batch, 2, seed=1), random(*batch, 2, seed=2)


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_both_directions_and_twice(training):
    run = as_function(smooth(training))
    arguments = [v.requires_grad_() for v in values()]
    assert torch.autograd.gradcheck(run, arguments, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, arguments, check_fwd_over_rev=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["grad", "vmap", "vmap of grad", "hessian", "jvp"])
def test_transforms(name, training):
    fused, unfused = pair(2, "silu", 2, track_running_stats=not training)
    fused.train(training), unfused.train(training)
    batched = values((3,)) if "vmap" in name else values()

    def functions():
        yield as_function(fused)
        yield lambda x, w, b: torch.func.functional_call(unfused, {"bn.weight": w, "bn.bias": b}, (x,))

    def cubed(f):
        return lambda *args: (f(*args) ** 3).sum()

    transform = {
        "grad": lambda f: torch.func.grad(cubed(f), (0, 1, 2)),
        "vmap": torch.func.vmap,
        "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(cubed(f), (0, 1, 2))),
        "hessian": lambda f: torch.func.hessian(cubed(f)),
        "jvp": lambda f: lambda *args: torch.func.jvp(f, args, values()),
    }[name]
    ours, theirs = (torch.utils._pytree.tree_leaves(transform(f)(*batched)) for f in functions())
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, 100)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_compiled(training, dynamic):
    torch._dynamo.reset()
    fused, _ = pair(momentum=0.3)
    expected = copy.deepcopy(fused)
    compiled = torch.compile(fused.train(training), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected.train(training)
    for batch in range(2):
        x = random(2, 3, 8, 9 + batch, seed=batch)
        (y, grads), (wanted, others) = gradients(compiled, x), gradients(expected, x)
        for a, b in zip((y, *grads, *fused.buffers()), (wanted, *others, *expected.buffers()), strict=True):
            assert_close(a, b) if a.is_floating_point() else assert_agree(a, b, 0.0)


def test_exported_scripted_traced_and_lowered():
    module, x = BNActBlurPool2d(3, "silu", max_kernel_size=2), torch.randn(2, 3, 12, 13)
    module(x)
    module.eval()
    y, limit = module(x), bound(x, 60, 4.0)
    with torch.no_grad():
        assert_agree(torch.jit.script(nn.Sequential(module))(x), y, limit)
        assert_agree(torch.jit.trace(module, x)(x), y, limit)
        with pytest.raises(torch.jit.Error, match="call eval"):
            torch.jit.script(copy.deepcopy(module).train())(x)
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(), module))
    assert_agree(traced(x), module(x.relu()), 0.0)
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(module, (x,), dynamic_shapes=(dynamic,))
    other = torch.randn(3, 3, 9, 16)
    assert_agree(program.module()(other), module(other), 0.0)
    lowered = program.run_decompositions(aliasfused.decompositions())
    assert not any("aliasfused" in str(node.target) for node in lowered.graph.nodes)
    assert_agree(lowered.module()(x), y, limit)
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs what was exported")
    file = io.BytesIO()
    torch.onnx.export(module, (x,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_agree(torch.from_numpy(result), y, limit)


def test_training_lowers_to_aten():
    from torch.fx.experimental.proxy_tensor import make_fx

    fused, unfused = pair(2, "silu", track_running_stats=False)

    def gradient(x):
        return torch.autograd.grad(fused(x).square().sum(), x)[0]

    x = random(2, 2, 7, 8).requires_grad_()
    lowered = make_fx(gradient, decomposition_table=aliasfused.decompositions())(x)
    assert not any("aliasfused" in str(node.target) for node in lowered.graph.nodes)
    (expected,) = torch.autograd.grad(unfused(x).square().sum(), x)
    assert_close(lowered(x), expected, 100)


def test_opcheck():
    for memory_format in FORMATS:
        x = torch.randn(2, 3, 7, 6).contiguous(memory_format=memory_format)
        torch.library.opcheck(torch.ops.aliasfused.channel_moments.default, (x,))
    moments, sums, row, ops = channel_moments(x), torch.randn(2, 3), torch.rand(3), torch.ops.aliasfused
    table = ops.batch_norm_table(moments[1], moments[2], moments[0], row, None, 1e-5, False)
    torch.library.opcheck(ops.batch_norm_table.default, (row, row, None, row, row, 1e-5, True))
    torch.library.opcheck(ops.batch_norm_table.default, (moments[1], moments[2], moments[0], None, None, 1e-5, False))
    torch.library.opcheck(ops.batch_norm_gradient.default, (sums, moments, table, 1e-5))
    for momentum in (0.1, None):
        torch.library.opcheck(
            ops.batch_norm_follow.default, (row.clone(), row.clone(), torch.tensor(3), moments, momentum)
        )


def test_modules_in_one_dtype():
    """As ``module.type`` makes them, the count too."""
    fused = BNActBlurPool2d(3).type(torch.float64)
    expected = copy.deepcopy(fused).float()
    x = random(2, 3, 7, 6)
    fused(x), expected(x.float())
    assert fused.num_batches_tracked == expected.num_batches_tracked == 1
    assert_agree(fused.running_var, expected.running_var.double(), 1e-6)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("table", {0: torch.ones(3, 1)}, "mean must have one dimension"),
        ("table", {3: torch.ones(4)}, r"weight must have the shape \(3,\)"),
        ("follow", {3: torch.ones(2, 3)}, r"moments must have the shape \(3, 3\)"),
        ("follow", {2: None, 4: None}, "counted by num_batches_tracked"),
        ("gradient", {2: torch.ones(3)}, "table must have two dimensions"),
        ("gradient", {0: torch.ones(2, 4)}, r"sums must have the shape \(2, 3\)"),
    ],
)
def test_refused_by_the_ops(name, change, message):
    row, moments, op = torch.ones(3), torch.ones(3, 3), getattr(torch.ops.aliasfused, f"batch_norm_{name}")
    arguments = {
        "table": [row, row, None, row, row, 1e-5, False],
        "follow": [row, row, torch.tensor(0), moments, 0.1],
        "gradient": [torch.ones(2, 3), moments, moments, 1e-5],
    }[name]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        op(*arguments)


# --- among processes -----------------------------------------------------------------------------------------------------

WAYS = ["process_group", "converted", "made of a SyncBatchNorm", "ddp"]
SHARES = (3, 1)  # of the batch; one image of one process, whose statistics alone would be others


def _share(rank: int, place: str) -> None:
    """One of two processes: the share of the batch that is its own, and what it makes of it, to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=len(SHARES))
    try:
        torch.save({way: _shared(rank, way) for way in WAYS}, f"{place}/{rank}")
    finally:
        torch.distributed.destroy_process_group()


def _shared(rank: int, way: str) -> list:
    fused, _ = pair(3, "silu", 2)
    if way in ("process_group", "ddp"):
        fused.process_group = torch.distributed.group.WORLD
    if way == "converted":
        fused = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(fused))[0]
    if way == "made of a SyncBatchNorm":
        bn = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(3, dtype=torch.float64))
        bn.load_state_dict(fused.state_dict())
        fused = BNActBlurPool2d.from_batchnorm2d(bn, "silu", max_kernel_size=2)
    module = nn.parallel.DistributedDataParallel(fused) if way == "ddp" else fused
    x = random(sum(SHARES), 3, 8, 9).split(SHARES)[rank].clone().requires_grad_()
    y = module(x)
    (y * random(sum(SHARES), *y.shape[1:], seed=9).split(SHARES)[rank]).sum().backward()
    grads = [p.grad.clone() for p in fused.parameters()]
    if way != "ddp":
        for grad in grads:  # what DDP does, but for the mean
            torch.distributed.all_reduce(grad)
    statistics = [b.clone() for b in fused.buffers()]
    try:
        torch.autograd.grad(fused(x).sum(), x, create_graph=True)
    except NotImplementedError:
        return [y.detach(), x.grad, grads, statistics]
    return []


def test_processes_that_share_statistics(tmp_path):
    """Two of them against one with the whole batch."""
    torch.multiprocessing.spawn(_share, (str(tmp_path),), nprocs=len(SHARES))
    files = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(len(SHARES))]
    _, unfused = pair(3, "silu", 2)
    x = random(sum(SHARES), 3, 8, 9).requires_grad_()
    y = unfused(x)
    (y * random(*y.shape, seed=9)).sum().backward()
    for way in WAYS:
        assert all(file[way] for file in files), "a second derivative was not refused"
        ys, dxs, grads, statistics = zip(*(file[way] for file in files), strict=True)
        assert_close(torch.cat(ys), y.detach(), 10)
        assert_close(torch.cat(dxs), x.grad, 10)
        for of_one in grads:
            for grad, p in zip(of_one, unfused.parameters(), strict=True):
                assert_close(grad, p.grad / (len(SHARES) if way == "ddp" else 1), 10)
        for of_one in statistics:
            for a, b in zip(of_one, unfused.buffers(), strict=True):
                assert_close(a, b, 10) if a.is_floating_point() else assert_agree(a, b, 0.0)


def test_moments_of_parts_are_those_of_the_whole():
    x = random(6, 4, 5, 7) + 1e3
    parts = torch.stack([channel_moments(part) for part in (x[:1], x[1:1], x[1:4], x[4:])])
    whole = channel_moments(x)
    for a, b, limit in zip(merged(parts), whole, (0.0, 1e-12, 1e-9), strict=True):
        assert_agree(a, b, limit)


def test_an_empty_batch_has_gradients_of_zero():
    """As torch's own: a process without data must not spoil the mean over all."""
    norm = BNActBlurPool2d(3)
    norm(torch.randn(0, 3, 6, 5)).sum().backward()
    assert norm.weight.grad.tolist() == norm.bias.grad.tolist() == [0.0] * 3


def test_the_gradients_op_refuses_a_table_it_does_not_write():
    moments, sums = torch.ones(3, 2, dtype=torch.float64), torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="table must be of float32 or float64"):
        torch.ops.aliasfused.batch_norm_gradient(sums, moments, torch.ones(3, 2, dtype=torch.bfloat16), 1e-5)
