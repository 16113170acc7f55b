"""The ops as the rest of PyTorch sees them: schemas, refusals, and what a call runs, keeps and allocates."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import aliasfused
from aliasfused import blur_pool2d
from cases import LAYOUTS, laid_out, random

OPS = torch.ops.aliasfused
NATIVE = next(b for b in aliasfused.backends() if (b.name, b.device) == ("native", "cpu"))

SCHEMAS = {
    "blur_pool_fwd": "(Tensor x, float[] taps_h, float[] taps_w, int[] stride, int[] padding, str pad_mode) -> Tensor",
    "blur_pool_bwd": "(Tensor dy, float[] taps_h, float[] taps_w, int[] stride, int[] padding, str pad_mode, "
    "SymInt H, SymInt W, bool channels_last) -> Tensor",
    "blur_pool_taps_fwd": "(Tensor x, Tensor taps_h, Tensor taps_w, int[] stride, int[] padding, str pad_mode) -> Tensor",
    "blur_pool_taps_bwd": "(Tensor dy, Tensor taps_h, Tensor taps_w, int[] stride, int[] padding, str pad_mode, "
    "SymInt H, SymInt W, bool channels_last) -> Tensor",
    **{
        f"max_blur_pool_{name}": f"({tensors}, str act, float[] act_args, int[] kernel, SymInt[] max_padding, float[] taps_h, "
        "float[] taps_w, int[] stride, int[] padding, str pad_mode) -> Tensor"
        for name, tensors in (
            ("fwd", "Tensor x, Tensor? affine"),
            ("bwd", "Tensor dy, Tensor x, Tensor? affine, Tensor? correction"),
            ("sums", "Tensor dy, Tensor x, Tensor? affine"),
        )
    },
    "blur_pool_taps_grad": "(Tensor dy, Tensor x, Tensor other, int axis, int size, int[] stride, int[] padding, "
    "str pad_mode) -> Tensor",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    """Saved programs name it: a change breaks them, and must be meant."""
    assert str(getattr(OPS, name).default._schema) == f"aliasfused::{name}{SCHEMAS[name]}"


class Recorder(TorchDispatchMode):
    """Every op that reaches a device, by name; views apart, which move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_op_forward_and_one_back(layout, dtype):
    """Whatever the layout; the gradient of a sum, whose dy is one number expanded, included."""
    x = laid_out(random(2, 3, 8, 9, dtype=dtype), layout).requires_grad_()
    with Recorder() as forward:
        y = blur_pool2d(x)
    dy = torch.ones((), dtype=dtype).expand(y.shape)
    with Recorder() as backward:
        torch.autograd.grad(y, x, dy)
    assert forward.names == ["aliasfused::blur_pool_fwd"]
    assert backward.names == ["aliasfused::blur_pool_bwd"]


def test_three_dimensions_and_one_axis_cost_no_copy():
    for call, shape in (
        (blur_pool2d, (3, 8, 9)),
        (aliasfused.blur_pool1d, (2, 3, 9)),
        (aliasfused.blur_pool1d, (3, 9)),
    ):
        x = torch.ones(shape)
        with Recorder() as calls:
            call(x)
        assert calls.names == ["aliasfused::blur_pool_fwd"]


@pytest.mark.parametrize(
    ("wanted", "ops"),
    [
        ((True, False, False), ["blur_pool_taps_bwd"]),
        ((False, True, False), ["blur_pool_taps_grad"]),
        ((False, False, True), ["blur_pool_taps_grad"]),
        ((True, True, True), ["blur_pool_taps_bwd", "blur_pool_taps_grad", "blur_pool_taps_grad"]),
    ],
)
def test_gradients_that_nobody_asked_for_are_not_computed(wanted, ops):
    values = [random(2, 3, 8, 9), random(3, 4), random(3, 3, seed=1)]
    x, h, w = (v.requires_grad_(flag) for v, flag in zip(values, wanted, strict=True))
    y = blur_pool2d(x, (h, w))
    with Recorder() as calls:
        torch.autograd.grad(y, [t for t in (x, h, w) if t.requires_grad], torch.ones_like(y))
    assert sorted(name for name in calls.names if name.startswith("aliasfused")) == sorted(
        f"aliasfused::{op}" for op in ops
    )


def test_without_a_gradient_there_is_no_node():
    x = torch.ones(1, 1, 4, 4)
    assert blur_pool2d(x).grad_fn is None
    x.requires_grad_()
    assert blur_pool2d(x).grad_fn is not None
    with torch.no_grad():
        assert blur_pool2d(x).grad_fn is None
    with torch.inference_mode():
        assert blur_pool2d(x).grad_fn is None


@pytest.mark.parametrize(("taps", "kept"), [(4, 0), ([0.25, 0.5, 0.25], 0), (((0.5, 0.5), 3), 0), (torch.ones(3), 3)])
def test_what_is_kept_for_backward(taps, kept):
    """Nothing for taps that are numbers; x and both rows for tensors."""
    saved = []
    x = torch.ones(2, 3, 8, 9, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        blur_pool2d(x, taps)
    assert len(saved) == kept


@pytest.mark.skipif(not NATIVE.available, reason=f"backend native on cpu: {NATIVE.reason}")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_is_all_that_is_allocated(layout):
    """No hidden copy of any input in any layout, on either way."""
    x = laid_out(random(2, 3, 16, 17, dtype=torch.float32), layout)
    geometry = ([2, 2], [1, 2, 1, 2], "reflect")
    taps = [0.125, 0.375, 0.375, 0.125]
    dy = laid_out(random(2, 3, 8, 9, dtype=torch.float32), layout)
    for call, elements in (
        (lambda: OPS.blur_pool_fwd(x, taps, taps, *geometry), 2 * 3 * 8 * 9),
        (lambda: OPS.blur_pool_bwd(dy, taps, taps, *geometry, 16, 17, layout == "nhwc"), 2 * 3 * 16 * 17),
    ):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            keep = call()
        allocated = sum(e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0)
        assert elements * 4 <= allocated <= elements * 4 + 64, f"{allocated} bytes for a result of {elements * 4}"
        del keep


def test_import_brings_in_nothing_heavy():
    """Neither the Triton kernels nor any library whose modules are served; what torch itself brings in is its own affair."""
    program = (
        "import sys, torch, torch._dynamo; before = set(sys.modules); import aliasfused; new = set(sys.modules) - before; "
        "print(*sorted({n for n in new if n.startswith('aliasfused.kernels.triton.')} | {n.split('.')[0] for n in new} & "
        "{'triton', 'timm', 'kornia', 'antialiased_cnns', 'scipy', 'onnx', 'rich', 'PIL', 'torchvision'}))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


# --- the raw ops are public: they check for themselves ---------------------------------------------------------------

X, DY, H, W = torch.ones(1, 2, 5, 6), torch.ones(1, 2, 3, 3), torch.ones(2, 3), torch.ones(2, 4)
ROW, STRIDE, SIDES = [0.25, 0.5, 0.25], [2, 2], [1, 1, 1, 1]


def fwd(x=X, h=ROW, w=ROW, stride=STRIDE, sides=SIDES, mode="reflect"):
    return OPS.blur_pool_fwd(x, h, w, stride, sides, mode)


def bwd(dy=DY, h=ROW, w=ROW, stride=STRIDE, sides=SIDES, mode="reflect", height=5, width=6):
    return OPS.blur_pool_bwd(dy, h, w, stride, sides, mode, height, width, False)


def taps_fwd(x=X, h=H, w=W, stride=STRIDE, sides=SIDES, mode="reflect"):
    return OPS.blur_pool_taps_fwd(x, h, w, stride, sides, mode)


def taps_bwd(dy=DY, h=H, w=W, height=5, width=6):
    return OPS.blur_pool_taps_bwd(dy, h, w, STRIDE, [1, 2, 1, 1], "reflect", height, width, False)


def taps_grad(dy=DY, x=X, other=W, axis=0, size=3, sides=(1, 2, 1, 1)):
    return OPS.blur_pool_taps_grad(dy, x, other, axis, size, STRIDE, sides, "reflect")


def test_the_calls_that_the_refusals_vary_are_good():
    assert fwd().shape == taps_fwd().shape[:3] + (3,) == (1, 2, 3, 3)
    assert bwd().shape == taps_bwd().shape == X.shape
    assert taps_grad().shape == (2, 3)


@pytest.mark.skipif(not NATIVE.available, reason=f"backend native on cpu: {NATIVE.reason}")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fwd(torch.ones(2, 5, 6)), "x must have four dimensions .*got 3"),
        (lambda: fwd(torch.ones(1, 2, 5, 6, dtype=torch.int32)), "must be float32, bfloat16, float16 or float64"),
        (lambda: fwd(torch.ones(1, 2, 0, 6)), "height of 0 .*is not a blur"),
        (lambda: fwd(torch.ones(1, 2, 5, 0)), "width of 0 .*is not a blur"),
        (lambda: fwd(h=[]), "height .*0 taps .*is not a blur"),
        (lambda: fwd(w=[]), "width .*0 taps .*is not a blur"),
        (lambda: fwd(stride=[2]), "stride must be .h, w."),
        (lambda: fwd(stride=[0, 2]), "height .*stride 0 is not a blur"),
        (lambda: fwd(stride=[2, -1]), "width .*stride -1 is not a blur"),
        (lambda: fwd(sides=[1, 1]), "padding .left, right, top, bottom."),
        (lambda: fwd(sides=[-1, 1, 1, 1]), "width .*padding .-1, 1.*is not a blur"),
        (lambda: fwd(sides=[1, 1, 1, -1]), "height .*padding .1, -1.*is not a blur"),
        (
            lambda: fwd(mode="constant"),
            "pad_mode must be 'reflect', 'replicate', 'zeros' or 'circular', got 'constant'",
        ),
        (lambda: fwd(w=[0.1] * 9), "width of 6 with padding .1, 1. is shorter than the 9 taps"),
        (lambda: bwd(torch.ones(2, 3, 3)), "dy must have four dimensions .*got 3"),
        (lambda: bwd(torch.ones(1, 2, 2, 3)), "dy of 2 x 3 is not the blurred map of 5 x 6, which has 3 x 3"),
        (lambda: bwd(width=8), "dy of 3 x 3 is not the blurred map of 5 x 8, which has 3 x 4"),
        (lambda: bwd(height=0), "height of 0 .*is not a blur"),
        (lambda: taps_fwd(h=torch.ones(3)), r"taps_h must be a \(2, k\) tensor of float32"),
        (lambda: taps_fwd(h=torch.ones(3, 3)), r"taps_h must be a \(2, k\) tensor"),
        (lambda: taps_fwd(w=torch.ones(2, 0)), r"taps_w must be a \(2, k\) tensor"),
        (lambda: taps_fwd(w=torch.ones(2, 3, dtype=torch.float64)), "taps_w must be .* of float32"),
        (lambda: taps_fwd(X.double()), "taps_h must be .* of float64"),
        (lambda: taps_fwd(X.bfloat16(), H.bfloat16()), "taps_h must be .* of float32"),
        (lambda: taps_bwd(h=torch.ones(1, 3)), r"taps_h must be a \(2, k\) tensor"),
        (lambda: taps_bwd(height=9), "dy of 3 x 3 is not the blurred map of 9 x 6"),
        (lambda: taps_grad(axis=2), r"axis must be 0 \(taps_h\) or 1 \(taps_w\), got 2"),
        (lambda: taps_grad(axis=-1), "axis must be .*got -1"),
        (lambda: taps_grad(size=0), "height .*0 taps .*is not a blur"),
        (lambda: taps_grad(other=torch.ones(3, 4)), r"other must be a \(2, k\) tensor"),
        (lambda: taps_grad(dy=torch.ones(1, 2, 3, 4)), "dy must be like the blurred x.* 1 x 2 x 3 x 3"),
        (lambda: taps_grad(dy=torch.ones(2, 2, 3, 3)), "dy must be like the blurred x"),
        (lambda: taps_grad(dy=torch.ones(1, 1, 3, 3)), "dy must be like the blurred x"),
        (lambda: taps_grad(dy=DY.double()), "dy must be like the blurred x: its dtype"),
        (lambda: taps_grad(dy=torch.ones(2, 3, 3)), "dy must have four dimensions"),
        (lambda: taps_grad(x=torch.ones(2, 5, 6)), "x must have four dimensions"),
    ],
)
def test_raw_ops_refuse(call, message):
    """Before any memory is touched: these would read or write beyond it."""
    with pytest.raises(RuntimeError, match=message):
        call()
