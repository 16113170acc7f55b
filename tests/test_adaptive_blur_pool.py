"""Blurs by predicted filters as users call them: against an unfolded map, closed forms, gradients of every order, refusals."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aliasfused
from agreement import assert_agree, bound, extended
from aliasfused import adaptive_blur_pool2d, blur_pool2d
from cases import BORDERS, random

OPS = torch.ops.aliasfused
FORMATS = [torch.contiguous_format, torch.channels_last]
NORMALIZE = ["group", "joint", "none"]


def unfolded(x, logits, k=3, stride=2, groups=8, normalize="group", pad_mode="reflect"):
    """As it is released: every pixel's window, weighed at every position; what is not kept is thrown away."""
    s_h, s_w = (stride, stride) if isinstance(stride, int) else stride
    r = k // 2
    windows = extended(x, (r, r, r, r), pad_mode).unfold(2, k, 1).unfold(3, k, 1)[:, :, ::s_h, ::s_w]
    weights = logits.unflatten(1, (groups, k * k))
    if normalize == "group":
        weights = weights.softmax(2)
    if normalize == "joint":
        weights = logits.softmax(1).unflatten(1, (groups, k * k))
    weights = weights.movedim(2, -1).repeat_interleave(x.shape[1] // groups, 1)
    return (windows.flatten(4) * weights).sum(-1)


def gradients(f, *tensors):
    tensors = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    y = f(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, random(*y.shape, dtype=y.dtype, seed=9))]


def assert_close(actual, expected, terms=1000):
    for a, b in zip(actual, expected, strict=True):
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        assert_agree(a, b, terms * torch.finfo(torch.float64).eps * scale)


@st.composite
def blurs(draw):
    groups = draw(st.sampled_from((1, 2, 3)))
    return dict(
        size=draw(st.tuples(st.integers(1, 17), st.integers(1, 40))),
        channels=groups * draw(st.sampled_from((1, 2, 8, 17))),
        k=draw(st.sampled_from((1, 3, 5, 7))),
        stride=draw(st.sampled_from((1, 2, 3, (1, 2), (2, 1), (4, 3)))),
        groups=groups,
        normalize=draw(st.sampled_from(NORMALIZE)),
        pad_mode=draw(st.sampled_from(BORDERS)),
        formats=draw(st.tuples(st.sampled_from(FORMATS), st.sampled_from(FORMATS))),
        full=draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(blurs())
def test_values_and_gradients(blur):
    """In float64; logits at the kept positions, or everywhere, their gradients then being zero at the others."""
    size, channels, (first, second), full = (blur.pop(name) for name in ("size", "channels", "formats", "full"))
    k, stride, groups = blur["k"], blur["stride"], blur["groups"]
    strides = (stride, stride) if isinstance(stride, int) else stride
    grid = size if full else tuple(-(-n // s) for n, s in zip(size, strides, strict=True))
    x = random(2, channels, *size).contiguous(memory_format=first)
    logits = random(2, groups * k * k, *grid, seed=1).contiguous(memory_format=second)
    options = {name: blur[name] for name in ("normalize", "pad_mode")}

    def expected(x, logits):
        return unfolded(x, logits[:, :, :: strides[0], :: strides[1]] if full else logits, **blur)

    fused = gradients(lambda x, logits: adaptive_blur_pool2d(x, logits, k, stride, groups, **options), x, logits)
    assert_close(fused, gradients(expected, x, logits))
    assert [t.shape for t in fused[1:]] == [x.shape, logits.shape]


# --- closed forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("pad_mode", BORDERS)
def test_equal_logits_are_a_box(k, pad_mode):
    x, value = random(2, 8, 9, 10), random(1)
    y = adaptive_blur_pool2d(x, value.expand(2, 4 * k * k, 5, 5), k, groups=4, pad_mode=pad_mode)
    assert_close([y], [blur_pool2d(x, aliasfused.filters.rect(k), pad_mode=pad_mode)])
    y = adaptive_blur_pool2d(x, value.expand(2, 4 * k * k, 5, 5), k, groups=4, pad_mode=pad_mode, normalize="joint")
    assert_close([y], [blur_pool2d(x, aliasfused.filters.rect(k), pad_mode=pad_mode) / 4])


def test_one_hot_logits_take_pixels():
    x = random(1, 2, 8, 8)
    for tap in range(9):
        logits = torch.full((1, 9, 4, 4), -torch.inf, dtype=torch.float64)
        logits[:, tap] = 3.0
        shown = extended(x, (1, 1, 1, 1), "circular")[:, :, tap // 3 : tap // 3 + 8, tap % 3 : tap % 3 + 8]
        assert torch.equal(adaptive_blur_pool2d(x, logits, groups=1, pad_mode="circular"), shown[:, :, ::2, ::2])


def test_constants_stay_and_joint_gains_sum_to_one():
    x, logits = torch.full((2, 8, 9, 9), 1.75, dtype=torch.float64), 3 * random(2, 72, 5, 5)
    assert_close([adaptive_blur_pool2d(x, logits)], [torch.full((2, 8, 5, 5), 1.75, dtype=torch.float64)])
    gains = adaptive_blur_pool2d(x, logits, normalize="joint") / 1.75
    assert_close([gains.sum(1)], [torch.ones(2, 5, 5, dtype=torch.float64)])


def test_large_logits_do_not_overflow():
    x, logits = random(1, 8, 6, 6).float(), 1e4 * random(1, 72, 3, 3).float()
    for normalize in ("group", "joint"):
        assert_close([adaptive_blur_pool2d(x, logits, normalize=normalize).double()],
                     [unfolded(x.double(), logits.double(), normalize=normalize)], 1e10)  # fmt: skip


@pytest.mark.parametrize(("size", "limit"), [((28, 28), 1.10), ((56, 56), 1.30)], ids=["kept", "everywhere"])
def test_only_x_and_logits_are_kept(size, limit):
    """As they are: of 256 channels and 8 groups, so much of x with x itself. A view would keep its whole storage."""
    kept = []
    x, logits = (t.requires_grad_() for t in (torch.randn(1, 256, 56, 56), torch.randn(1, 72, *size)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adaptive_blur_pool2d(x, logits)
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), logits.data_ptr()]
    assert sum(t.untyped_storage().nbytes() for t in kept) <= limit * x.nbytes


@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradient_of_all_logits_is_written_once(memory_format):
    """By the op itself, in the format of logits: neither zeros nor slices beside it."""
    x = torch.randn(1, 16, 12, 13)
    logits = torch.randn(1, 72, 12, 13).contiguous(memory_format=memory_format).requires_grad_()
    y = adaptive_blur_pool2d(x, logits)
    with torch.profiler.profile() as profile:
        (gradient,) = torch.autograd.grad(y, logits, torch.ones_like(y))
    assert gradient.stride() == logits.stride()
    names = {event.name for event in profile.events()}
    assert "aliasfused::adaptive_blur_pool_logits_grad" in names
    assert not any(name in " ".join(names) for name in ("slice", "zero", "copy"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x, logits = torch.randn(1, 8, 8, 8), torch.randn(1, 72, 4, 4)
    with torch.autocast("cpu", dtype=dtype):
        y = adaptive_blur_pool2d(x, logits)
    assert torch.equal(y, adaptive_blur_pool2d(x.to(dtype), logits.to(dtype)))


def test_empty():
    for n, c in ((0, 8), (2, 0)):
        x, logits = torch.randn(n, c, 8, 8).requires_grad_(), torch.randn(n, 72, 4, 4).requires_grad_()
        y = adaptive_blur_pool2d(x, logits)
        assert y.shape == (n, c, 4, 4)
        dx, dlogits = torch.autograd.grad(y.sum(), (x, logits))
        assert dx.shape == x.shape and torch.equal(dlogits, torch.zeros_like(logits))


# --- what PyTorch does to it ---------------------------------------------------------------------------------------------


def small(normalize="group", full=False):
    def run(x, logits):
        return adaptive_blur_pool2d(x, logits, 3, 2, 2, normalize=normalize)

    def expected(x, logits):
        return unfolded(x, logits[:, :, ::2, ::2] if full else logits, 3, 2, 2, normalize)

    return run, expected


def values(batch=(), full=False):
    return random(*batch, 1, 4, 4, 5), random(*batch, 1, 18, *((4, 5) if full else (2, 3)), seed=1)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_gradcheck_both_directions_and_twice(normalize, full):
    arguments = [v.requires_grad_() for v in values(full=full)]
    run, _ = small(normalize)
    assert torch.autograd.gradcheck(run, arguments, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, arguments, check_fwd_over_rev=True, fast_mode=True)


def cubed(f):
    return lambda *args: (f(*args) ** 3).sum()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["grad", "vmap", "vmap of grad", "jacrev", "hessian", "jvp"])
def test_transforms(name, full):
    batched = values((3,) if "vmap" in name else (), full)
    transform = {
        "grad": lambda f: torch.func.grad(cubed(f), (0, 1)),
        "vmap": torch.func.vmap,
        "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(cubed(f), (0, 1))),
        "jacrev": lambda f: torch.func.jacrev(f, (0, 1)),
        "hessian": lambda f: torch.func.hessian(cubed(f), (0, 1)),
        "jvp": lambda f: lambda *args: torch.func.jvp(f, args, values(full=full)),
    }[name]
    ours, theirs = (torch.utils._pytree.tree_leaves(transform(f)(*batched)) for f in small(full=full))
    assert_close(ours, theirs, 4000)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["step", "dynamic step", "grad", "vmap of grad"])
def test_compiled_by_value(name, full):
    torch._dynamo.reset()
    run, expected = small(full=full)
    arguments = values((3,) if "vmap" in name else (), full)
    if "step" in name:
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic="dynamic" in name)
        return assert_close(gradients(compiled, *arguments), gradients(expected, *arguments))
    wrap = torch.func.vmap if "vmap" in name else lambda f: f
    ours, theirs = (wrap(torch.func.grad(cubed(f), (0, 1))) for f in (run, expected))
    assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(*arguments), theirs(*arguments), 4000)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(memory_format, full):
    x, logits = (t.float().contiguous(memory_format=memory_format) for t in values(full=full))
    rest = (3, [2, 2], 2, "joint", "reflect")
    dy = torch.randn_like(OPS.adaptive_blur_pool_fwd(x, logits, *rest))
    torch.library.opcheck(OPS.adaptive_blur_pool_fwd.default, (x, logits, *rest))
    torch.library.opcheck(OPS.adaptive_blur_pool_bwd.default, (dy, logits, *rest, 4, 5, memory_format is FORMATS[1]))
    torch.library.opcheck(OPS.adaptive_blur_pool_logits_grad.default, (dy, x, logits, *rest))


class Module(torch.nn.Module):
    def forward(self, x, logits):
        return adaptive_blur_pool2d(x, logits, 3, 2, 2)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.filterwarnings(r"ignore:.*torch\.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_exported_traced_and_lowered(full):
    module, arguments = Module(), tuple(v.float() for v in values(full=full))
    y, limit = module(*arguments), bound(arguments[0], 12)
    assert_agree(torch.jit.trace(module, arguments)(*arguments), y, limit)
    program = torch.export.export(module, arguments)
    assert sum("aliasfused" in str(node.target) for node in program.graph.nodes) == 1
    for border in ("pad", "gather"):
        lowered = program.run_decompositions(aliasfused.decompositions(border))
        assert not any("aliasfused" in str(node.target) for node in lowered.graph.nodes)
        assert_agree(lowered.module()(*arguments), y, limit)
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs what was exported")
    file = io.BytesIO()
    torch.onnx.export(module, arguments, dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    (result,) = session.run(None, {name: t.numpy() for name, t in zip(names, arguments, strict=True)})
    assert_agree(torch.from_numpy(result), y, limit)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("pad_mode", BORDERS)
def test_gradients_lower_to_aten(pad_mode, normalize, full):
    from torch.fx.experimental.proxy_tensor import make_fx

    def gradient(x, logits):
        y = adaptive_blur_pool2d(x, logits, 3, 2, 2, normalize=normalize, pad_mode=pad_mode)
        return torch.autograd.grad(y.square().sum(), (x, logits))

    arguments = [v.requires_grad_() for v in values(full=full)]
    lowered = make_fx(gradient, decomposition_table=aliasfused.decompositions())(*arguments)
    assert not any("aliasfused" in str(node.target) for node in lowered.graph.nodes)
    x, logits = arguments
    y = unfolded(x, logits[:, :, ::2, ::2] if full else logits, 3, 2, 2, normalize, pad_mode)
    assert_close(lowered(*arguments), torch.autograd.grad(y.square().sum(), arguments))


# --- refusals ------------------------------------------------------------------------------------------------------------


def on_meta(x, logits):
    return OPS.adaptive_blur_pool_fwd(x.to("meta"), logits.to("meta"), 3, [2, 2], 8, "group", "zeros")


X, LOGITS = torch.ones(1, 8, 7, 9), torch.ones(1, 72, 4, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: adaptive_blur_pool2d(X, LOGITS, 4), ValueError, "kernel_size must be an odd int"),
        (lambda: adaptive_blur_pool2d(X, LOGITS, 3.0), ValueError, "kernel_size must be an odd int"),
        (lambda: adaptive_blur_pool2d(X, LOGITS, stride=0), ValueError, "stride must be an int >= 1"),
        (lambda: adaptive_blur_pool2d(X, LOGITS, groups=0), ValueError, "groups must be an int >= 1"),
        (lambda: adaptive_blur_pool2d(X, LOGITS, groups=3), ValueError, "groups must divide the 8 channels of x, got 3"),
        (lambda: adaptive_blur_pool2d(X, LOGITS, normalize="sum"), ValueError, "normalize must be one of 'group', 'joint', 'none'"),
        (lambda: adaptive_blur_pool2d(X, LOGITS, pad_mode="wrap"), ValueError, "pad_mode must be one of"),
        (lambda: adaptive_blur_pool2d(X, LOGITS[:, :, :3]), ValueError, r"\(1, 72, 4, 5\), at the kept .* or \(1, 72, 7, 9\), at all, got"),
        (lambda: adaptive_blur_pool2d(X, LOGITS[:, 1:]), ValueError, r"logits must have shape \(1, 72, 4, 5\)"),
        (lambda: adaptive_blur_pool2d(X, LOGITS.double()), TypeError, "logits must have the dtype and device of x"),
        (lambda: adaptive_blur_pool2d(X[0], LOGITS), ValueError, r"x must have shape \(N, C, H, W\)"),
        (lambda: adaptive_blur_pool2d(X.int(), LOGITS), TypeError, "x must be float32"),
        (lambda: adaptive_blur_pool2d(X, None), TypeError, r"logits must be a torch\.Tensor"),
        (lambda: OPS.adaptive_blur_pool_fwd(X, LOGITS, 2, [2, 2], 8, "group", "zeros"), RuntimeError, "kernel_size must be odd"),
        (lambda: OPS.adaptive_blur_pool_fwd(X, LOGITS, 3, [2, 2], 3, "group", "zeros"), RuntimeError, "groups must divide the 8"),
        (lambda: OPS.adaptive_blur_pool_fwd(X, LOGITS, 3, [2, 2], 8, "mean", "zeros"), RuntimeError, "normalize must be"),
        (lambda: OPS.adaptive_blur_pool_fwd(X, LOGITS, 3, [2, 1], 8, "group", "zeros"), RuntimeError, "4 x 9, .* or x 7 x 9, at all"),
        (lambda: OPS.adaptive_blur_pool_fwd(X, LOGITS[:, :, 1:], 3, [2, 2], 8, "group", "zeros"), RuntimeError, "1 x 72 x 4 x 5, at the"),
        (lambda: on_meta(X, LOGITS[:, :, 1:]), ValueError, r"\(1, 72, 4, 5\), at the kept .* or \(1, 72, 7, 9\), at all, got"),
        (lambda: OPS.adaptive_blur_pool_bwd(X, LOGITS, 3, [2, 2], 8, "group", "zeros", 7, 9, False), RuntimeError, "dy must be like"),
        (lambda: OPS.adaptive_blur_pool_logits_grad(X, X, LOGITS, 3, [2, 2], 8, "group", "zeros"), RuntimeError, "dy must be like"),
    ],
)  # fmt: skip
def test_refused(call, error, message):
    """The raw ops too, before any memory is touched."""
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_a_stride_beyond_the_map_keeps_the_first_pixel(layout):
    """And wants no more memory than the map, forward and backward."""
    x = torch.randn(1, 8, 5, 6).contiguous(memory_format=layout).requires_grad_()
    logits = torch.randn(1, 72, 1, 1, requires_grad=True)
    far, near = (
        torch.autograd.grad(aliasfused.adaptive_blur_pool2d(x, logits, 3, stride).sum(), (x, logits))
        for stride in (2**28, 6)
    )
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))
