"""The downsampling step as users call it: against eager torch, by value; its ties, its gradients of every order, its refusals."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import aliasfused
from agreement import assert_agree, bound, convolved, pascal, same
from aliasfused import act_blur_pool2d, blur_pool2d, max_blur_pool2d
from aliasfused.nn import ActBlurPool2d, MaxBlurPool2d
from cases import BORDERS, DTYPES, coarse, random
from truth import ACTIVATIONS

pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit:DeprecationWarning")
OPS = torch.ops.aliasfused
ACTS = [
    "none", "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish", ("leaky_relu", 0.1), ("softplus", 2.0, 1.5),
]  # fmt: skip
FORMATS = [torch.contiguous_format, torch.channels_last]


def activated(act, u: torch.Tensor) -> torch.Tensor:
    return ACTIVATIONS[act](u) if isinstance(act, str) else ACTIVATIONS[act[0]](*act[1:], u)


def unfused(x, kernel=2, k=4, stride=2, act="none", scale=None, shift=None, max_padding=0, pad_mode="reflect"):
    """Everything one after the other, of torch's own operations."""
    if scale is not None:
        x = x * scale[:, None, None]
    if shift is not None:
        x = x + shift[:, None, None]
    z = F.max_pool2d(activated(act, x), kernel, 1, max_padding)
    return convolved(z, pascal(k), pascal(k), stride, same(k, k), pad_mode)


def gradients(f, *tensors):
    """Of a sum of f's results, each with a weight of its own."""
    tensors = [t.clone().requires_grad_() for t in tensors]
    y = f(*tensors)
    return torch.autograd.grad(y, tensors, random(*y.shape, dtype=y.dtype, seed=9))


# --- which pixel is the maximum --------------------------------------------------------------------------------------

ODD = {
    "equals": coarse(2, 3, 9, 10) // 2,
    "zeros alone": torch.zeros(1, 2, 5, 6, dtype=torch.float64),
    "nan": torch.where(coarse(2, 3, 9, 10, seed=1) > 3, torch.nan, coarse(2, 3, 9, 10)),
    "-inf": torch.where(coarse(2, 3, 9, 10, seed=2) > -3, -torch.inf, coarse(2, 3, 9, 10)),
    "-inf alone": torch.full((1, 2, 5, 6), -torch.inf, dtype=torch.float64),
    "inf and nan": torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0], dtype=torch.float64)
    .repeat(24)
    .view(1, 2, 6, 8),
}


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kernel", "max_padding"), [(2, 0), (2, 1), (3, 0), (3, 1), ((2, 3), (0, 1)), ((5, 4), (2, 2))]
)
@pytest.mark.parametrize("name", ODD)
def test_winners_are_torchs(name, kernel, max_padding, dtype, memory_format):
    """One tap at stride 1 hides nothing: values and gradients are those of max_pool2d, to the bit (of few terms: exact)."""
    x = ODD[name].to(dtype).contiguous(memory_format=memory_format)
    ours = x.clone().requires_grad_()
    torchs = x.clone().requires_grad_()
    y = max_blur_pool2d(ours, kernel, 1, 1, max_padding=max_padding)
    expected = F.max_pool2d(torchs, kernel, 1, max_padding)
    assert torch.equal(torch.nan_to_num(y), torch.nan_to_num(expected))
    assert torch.equal(y.isnan(), expected.isnan())
    dy = coarse(*y.shape, dtype=dtype, seed=5)
    (dx,), (expected,) = torch.autograd.grad(y, ours, dy), torch.autograd.grad(expected, torchs, dy)
    assert torch.equal(dx, expected)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_are_torchs(act, dtype):
    """Values and slopes from deep in one tail to deep in the other, corners and specials among them."""
    special = [0.0, -0.0, 3.0, -3.0, 6.0, 0.75, 1e-30, -1e-30, 1e4, -1e4, torch.inf, torch.nan]
    u = torch.cat([torch.linspace(-30, 30, 4001, dtype=torch.float64), torch.tensor(special, dtype=torch.float64)])
    u = u.to(dtype).view(1, 1, 1, -1)
    y, expected = act_blur_pool2d(u, act, 1, 1), activated(act, u.double())
    eps = torch.finfo(dtype).eps
    assert torch.equal(y.isnan(), expected.isnan())
    finite = expected.isfinite()
    assert torch.equal(y[~finite].nan_to_num(), expected[~finite].to(dtype).nan_to_num())
    assert ((y - expected).abs() <= 16 * eps * torch.maximum(u.abs().double(), expected.abs()))[finite].all()
    (slope,) = gradients(lambda u: act_blur_pool2d(u, act, 1, 1), u)
    (expected,) = gradients(lambda u: activated(act, u), u.double())
    finite = expected.isfinite() & u.isfinite()
    assert ((slope - expected).abs() <= 32 * eps * (1 + u.abs().double()))[finite].all()


# --- values and gradients --------------------------------------------------------------------------------------------


@st.composite
def steps(draw):
    size = draw(st.tuples(st.integers(1, 17), st.integers(1, 19)))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    max_padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    assume(all(n + 2 * p >= k for n, k, p in zip(size, kernel, max_padding, strict=True)))
    options = {
        "act": draw(st.sampled_from(ACTS)),
        "max_padding": max_padding,
        "pad_mode": draw(st.sampled_from(BORDERS)),
    }
    return size, kernel, draw(st.integers(1, 7)), draw(st.integers(1, 3)), options


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps(), st.integers(1, 5), st.sampled_from(FORMATS), st.booleans())
def test_values_and_gradients(step, channels, memory_format, affine):
    """In float64, where a step and torch's operations one by one may differ by roundings alone."""
    size, kernel, k, stride, options = step
    x = coarse(2, channels, *size).contiguous(memory_format=memory_format)
    rows = [coarse(channels, seed=s).add(0.0625) for s in (1, 2)] if affine else []
    fused, expected = (
        lambda x, *rows, f=f: f(x, kernel, k, stride, **options, **dict(zip(("scale", "shift"), rows, strict=False)))
        for f in (max_blur_pool2d, unfused)
    )
    y = expected(x, *rows)
    limit = 4000 * torch.finfo(torch.float64).eps
    assert_agree(fused(x, *rows), y, limit * max(1.0, float(y.abs().max())))
    for grad, wanted in zip(gradients(fused, x, *rows), gradients(expected, x, *rows), strict=True):
        assert_agree(grad, wanted, limit * max(1.0, float(wanted.abs().max())) * size[0] * size[1])


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 2, 0), ((3, 2), (2, 3), (1, 1)), (2, 3, 1), (5, 4, 2)]
)
def test_one_tap_is_max_pool(kernel, stride, padding, ceil_mode):
    for size in itertools.product(range(6, 12), (7, 8, 13)):
        pool = nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil_mode)
        x = random(2, 3, *size)
        assert torch.equal(MaxBlurPool2d.from_maxpool2d(pool, filt_size=1)(x), pool(x))
        assert MaxBlurPool2d.from_maxpool2d(pool)(x).shape == pool(x).shape


def test_a_step_that_does_nothing_is_a_blur():
    x = random(1, 2, 7, 8)
    assert torch.equal(act_blur_pool2d(x, "none"), blur_pool2d(x))
    assert torch.equal(max_blur_pool2d(x, 1), blur_pool2d(x))


def test_without_a_batch():
    x = random(3, 9, 8)
    assert torch.equal(max_blur_pool2d(x, act="relu"), max_blur_pool2d(x[None], act="relu")[0])


@pytest.mark.parametrize("memory_format", FORMATS)
def test_only_x_is_kept(memory_format):
    kept = []
    x = random(2, 3, 8, 9).contiguous(memory_format=memory_format).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        max_blur_pool2d(x, 3, act="relu", max_padding=1)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_taps_that_are_tensors_learn():
    x, taps = coarse(1, 2, 9, 8), random(2, 3)
    fused = gradients(lambda x, taps: max_blur_pool2d(x, 2, taps, act="relu"), x, taps)
    expected = gradients(lambda x, taps: blur_pool2d(F.max_pool2d(x.relu(), 2, 1), taps), x, taps)
    for a, b in zip(fused, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x = torch.randn(1, 2, 8, 8)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(max_blur_pool2d(x, act="relu"), max_blur_pool2d(x.to(dtype), act="relu"))


# --- what PyTorch does to it -----------------------------------------------------------------------------------------


def smooth(x, scale, shift):
    return max_blur_pool2d(x, 2, 3, act="silu", scale=scale, shift=shift, max_padding=1)


def smooth_unfused(x, scale, shift):
    return unfused(x, 2, 3, act="silu", scale=scale, shift=shift, max_padding=1)


def values(batch=()):
    return random(*batch, 1, 2, 5, 4), random(*batch, 2, seed=1), random(*batch, 2, seed=2)


def agree(actual, expected):
    for a, e in zip(*(torch.utils._pytree.tree_leaves(t) for t in (actual, expected)), strict=True):
        assert float(e.abs().max()) > 0
        assert_agree(a, e, 4000 * torch.finfo(torch.float64).eps * max(1.0, float(e.abs().max())))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradcheck_both_directions_and_twice(memory_format):
    x, scale, shift = (v.requires_grad_() for v in values())
    x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradcheck(smooth, (x, scale, shift), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(smooth, (x, scale, shift), check_fwd_over_rev=True)


def test_a_scale_that_comes_from_x():
    """Its own way back to x is not counted twice, whether the gradient is differentiated again or not."""

    def gated(x, step):
        scale = x.mean((0, 2, 3)).exp()
        return (step(x, scale) ** 2).sum()

    x = random(2, 3, 7, 6).requires_grad_()
    (expected,) = torch.autograd.grad(gated(x, lambda x, s: unfused(x, act="silu", scale=s)), x)
    for create_graph in (False, True):
        y = gated(x, lambda x, s: max_blur_pool2d(x, act="silu", scale=s))
        agree(torch.autograd.grad(y, x, create_graph=create_graph), [expected])


def cubed(f):
    return lambda *args: (f(*args) ** 3).sum()


@pytest.mark.parametrize("name", ["grad", "vmap", "vmap of grad", "jacrev", "hessian", "jvp"])
def test_transforms(name):
    batched = values((3,)) if "vmap" in name else values()
    for argument in range(3):
        transform = {
            "grad": lambda f, n=argument: torch.func.grad(cubed(f), n),
            "vmap": torch.func.vmap,
            "vmap of grad": lambda f, n=argument: torch.func.vmap(torch.func.grad(cubed(f), n)),
            "jacrev": lambda f, n=argument: torch.func.jacrev(f, n),
            "hessian": lambda f, n=argument: torch.func.hessian(cubed(f), n),
            "jvp": lambda f: lambda *args: torch.func.jvp(f, args, values()),
        }[name]
        agree(transform(smooth)(*batched), transform(smooth_unfused)(*batched))


@pytest.mark.parametrize("name", ["step", "dynamic step", "grad", "vmap of grad"])
def test_compiled_by_value(name):
    torch._dynamo.reset()
    arguments = values((3,)) if "vmap" in name else values()
    if "step" in name:
        f = torch.compile(cubed(smooth), fullgraph=True, backend="aot_eager", dynamic="dynamic" in name)
        arguments = [a.requires_grad_() for a in arguments]
        agree(
            torch.autograd.grad(f(*arguments), arguments),
            torch.autograd.grad(cubed(smooth_unfused)(*arguments), arguments),
        )
        return
    wrap = torch.func.vmap if "vmap" in name else lambda f: f
    f, expected = (wrap(torch.func.grad(cubed(f), (0, 1, 2))) for f in (smooth, smooth_unfused))
    agree(torch.compile(f, fullgraph=True, backend="aot_eager")(*arguments), expected(*arguments))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(memory_format):
    x = torch.randn(2, 3, 7, 6).contiguous(memory_format=memory_format)
    affine, correction = torch.randn(3, 3), torch.randn(2, 3)
    rest = ("relu", [], [2, 3], [1, 1, 0, 0], pascal(3), pascal(4), [2, 2], [1, 2, 1, 1], "reflect")
    dy = torch.randn_like(OPS.max_blur_pool_fwd(x, affine, *rest))
    for op, arguments in (
        (OPS.max_blur_pool_fwd, (x, affine, *rest)),
        (OPS.max_blur_pool_fwd, (x, None, *rest)),
        (OPS.max_blur_pool_bwd, (dy, x, affine, correction, *rest)),
        (OPS.max_blur_pool_bwd, (dy, x, None, None, *rest)),
        (OPS.max_blur_pool_sums, (dy, x, affine, *rest)),
    ):
        torch.library.opcheck(op.default, arguments)


MODULES = {
    "max": lambda: MaxBlurPool2d(3, max_padding=1),
    "max of an activation, rounded up": lambda: MaxBlurPool2d(
        (3, 2), (2, 3), 3, ceil_mode=True, act=("leaky_relu", 0.2)
    ),
    "activation": lambda: ActBlurPool2d("silu", 3, (1, 2), "zeros"),
}
DYNAMIC = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}


@pytest.mark.parametrize("name", MODULES)
def test_exported_scripted_traced_and_lowered(name):
    module, x = MODULES[name](), torch.randn(2, 3, 12, 13)
    y, limit = module(x), bound(x, 60, 4.0)
    scripted = torch.jit.script(nn.Sequential(module))
    with torch.no_grad():
        assert_agree(scripted(x), y, limit)
        assert_agree(torch.jit.trace(module, x)(x), y, limit)
    assert_agree(torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(), module))(x), module(x.relu()), 0.0)
    program = torch.export.export(module, (x,), dynamic_shapes=(DYNAMIC,))
    other = torch.randn(3, 3, 9, 16)
    assert_agree(program.module()(other), module(other), 0.0)
    assert sum("aliasfused" in str(node.target) for node in program.graph.nodes) == 1
    lowered = program.run_decompositions(aliasfused.decompositions())
    assert not any("aliasfused" in str(node.target) for node in lowered.graph.nodes)
    assert_agree(lowered.module()(x), y, limit)
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs what was exported")
    exported = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    file = io.BytesIO()
    exported.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_agree(torch.from_numpy(result), y, limit)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kernel", [1, 2])
def test_gradients_lower_to_aten(act, kernel):
    from torch.fx.experimental.proxy_tensor import make_fx

    def gradient(x, scale, shift):
        y = max_blur_pool2d(x, kernel, act=act, scale=scale, shift=shift)
        return torch.autograd.grad(y.square().sum(), (x, scale, shift))

    x, scale, shift = (v.requires_grad_() for v in (random(1, 2, 7, 8), random(2, seed=1), random(2, seed=2)))
    lowered = make_fx(gradient, decomposition_table=aliasfused.decompositions())(x, scale, shift)
    assert not any("aliasfused" in str(node.target) for node in lowered.graph.nodes)
    agree(lowered(x, scale, shift), gradient(x, scale, shift))


# --- refusals --------------------------------------------------------------------------------------------------------

X = torch.ones(1, 2, 5, 6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kernel_size": 0}, ValueError, "kernel_size must be an int >= 1 .*got 0"),
        ({"kernel_size": 2.0}, ValueError, "kernel_size must be .*got 2.0"),
        ({"kernel_size": (2, 2, 2)}, ValueError, "kernel_size must be .*pair"),
        ({"kernel_size": True}, ValueError, "kernel_size must be .*got True"),
        ({"max_padding": 2}, ValueError, r"max_padding must be .*at most half of kernel_size \(2, 2\), got 2"),
        ({"max_padding": -1}, ValueError, "max_padding must be .*got -1"),
        ({"max_padding": (1, 1, 1, 1)}, ValueError, "max_padding must be .*pair"),
        ({"act": "swish"}, ValueError, "act must be one of 'none', 'relu'.*got 'swish'"),
        ({"act": "leaky_relu"}, ValueError, r"act must be .*\('leaky_relu', slope\).*got 'leaky_relu'"),
        ({"act": ("relu", 1.0)}, ValueError, "act must be"),
        ({"act": ("softplus", 1.0)}, ValueError, "act must be"),
        ({"act": ("softplus", 0.0, 20.0)}, ValueError, "beta of act 'softplus' must not be 0"),
        ({"act": ("leaky_relu", float("nan"))}, ValueError, "act must be"),
        ({"act": None}, ValueError, "act must be .*got None"),
        ({"act": []}, ValueError, "act must be"),
        ({"act": ("leaky_relu", [0.1])}, ValueError, "act must be"),
        ({"kernel_size": (2.0, 2.0)}, ValueError, "kernel_size must be"),
        ({"kernel_size": ([2], 2)}, ValueError, "kernel_size must be"),
        ({"scale": 2.0}, TypeError, "scale must be None or a tensor of a floating dtype, got 2.0"),
        ({"shift": torch.ones(2, dtype=torch.int32)}, TypeError, "shift must be None or a tensor of a floating dtype"),
        ({"scale": torch.ones(3)}, ValueError, r"scale must have one number per channel of x, shape \(2,\), got \(3,\)"),
        ({"shift": torch.ones(2, 1)}, ValueError, "shift must have one number per channel"),
        ({"scale": torch.ones(2, device="meta")}, ValueError, "scale must be on the device of x"),
        ({"kernel_size": 6}, ValueError, "x of height 5 leaves no maximum"),
        ({"kernel_size": 5, "taps": 9, "padding": 1}, ValueError, "x of (height|width) ., whose maxima are ., .*shorter than the 9 taps"),
        ({"stride": 0}, ValueError, "stride must be"),
        ({"pad_mode": "mirror"}, ValueError, "pad_mode must be"),
    ],
)  # fmt: skip
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        max_blur_pool2d(X, **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MaxBlurPool2d(filt_size=0), ValueError, "filt_size must be an int >= 1, got 0"),
        (lambda: MaxBlurPool2d(ceil_mode=1), ValueError, "ceil_mode must be a bool, got 1"),
        (lambda: MaxBlurPool2d(taps=torch.ones(3)), TypeError, "taps of a fused module must be numbers"),
        (lambda: ActBlurPool2d("mish"), ValueError, "act must be one of"),
        (lambda: MaxBlurPool2d.from_maxpool2d(nn.AvgPool2d(2)), TypeError, "pool must be a torch.nn.MaxPool2d, got AvgPool2d"),
        (lambda: MaxBlurPool2d.from_maxpool2d(nn.MaxPool2d(2, dilation=2)), ValueError, "neither dilation nor return_indices"),
        (lambda: MaxBlurPool2d.from_maxpool2d(nn.MaxPool2d(2, return_indices=True)), ValueError, "neither dilation nor"),
    ],
)  # fmt: skip
def test_modules_refuse(make, error, message):
    with pytest.raises(error, match=message):
        make()


REST = ("relu", [], [2, 2], [0, 0, 0, 0], [1.0], [1.0], [2, 2], [0, 0, 0, 0], "reflect")
DY = torch.ones(1, 2, 2, 3)


def varied(**at):
    names = ("act", "act_args", "kernel", "max_padding", "taps_h", "taps_w", "stride", "padding", "pad_mode")
    return tuple(at.get(name, value) for name, value in zip(names, REST, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.max_blur_pool_fwd(X[0], None, *REST), "x must have four dimensions"),
        (lambda: OPS.max_blur_pool_fwd(X.int(), None, *REST), "must be float32, bfloat16"),
        (lambda: OPS.max_blur_pool_fwd(X, torch.ones(2, 2), *REST), r"affine must be a \(3, 2\) tensor of float32"),
        (lambda: OPS.max_blur_pool_fwd(X, torch.ones(3, 2).double(), *REST), r"affine must be .* of float32"),
        (lambda: OPS.max_blur_pool_fwd(X, None, *varied(act="swish")), "act must be one of"),
        (lambda: OPS.max_blur_pool_fwd(X, None, *varied(act_args=[1.0])), "act 'relu' takes 0 numbers in act_args, got 1"),
        (lambda: OPS.max_blur_pool_fwd(X, None, *varied(kernel=[2])), "kernel must be .h, w."),
        (lambda: OPS.max_blur_pool_fwd(X, None, *varied(max_padding=[0, 0])), "max_padding .left, right, top, bottom."),
        (lambda: OPS.max_blur_pool_fwd(X, None, *varied(kernel=[0, 2])), "a maximum over 0 of height 5"),
        (lambda: OPS.max_blur_pool_fwd(X, None, *varied(kernel=[2, 7])), "a maximum over 7 of width 6"),
        (lambda: OPS.max_blur_pool_fwd(X, None, *varied(max_padding=[2, 0, 0, 0])), r"a maximum over 2 .*padding \(2, 0\)"),
        (lambda: OPS.max_blur_pool_fwd(X, None, *varied(max_padding=[0, 0, 0, -1])), r"padding \(0, -1\)"),
        (lambda: OPS.max_blur_pool_bwd(DY[0], X, None, None, *REST), "dy must have four dimensions"),
        (lambda: OPS.max_blur_pool_bwd(DY.double(), X, None, None, *REST), "dy must be like the blurred x"),
        (lambda: OPS.max_blur_pool_bwd(torch.ones(1, 2, 2, 2), X, None, None, *REST), "dy must be like .* 1 x 2 x 2 x 3"),
        (lambda: OPS.max_blur_pool_bwd(DY, X, None, torch.ones(3, 2), *REST), r"correction must be a \(2, 2\) tensor"),
        (lambda: OPS.max_blur_pool_sums(DY, X, torch.ones(3), *REST), r"affine must be a \(3, 2\) tensor"),
    ],
)  # fmt: skip
def test_raw_ops_refuse(call, message):
    """Before any memory is touched: these would read or write beyond it."""
    with pytest.raises(RuntimeError, match=message):
        call()
