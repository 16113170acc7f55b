"""The adaptive blur as a module: what it predicts and when it may save work, and the released layers that it takes the place of."""

from __future__ import annotations

import copy
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from agreement import assert_agree, bound, convolved, extended, pascal, same
from aliasfused.compat import adaptive
from aliasfused.nn import AdaptiveBlurPool2d
from aliasfused.nn import adaptive_blur_pool as adaptive_module

MODES = ["reflect", "replicate", "zeros", "circular"]
GOLDEN = sorted((Path(__file__).parent / "golden" / "adaptive").glob("*.npz"))


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


def tolerance(value: torch.Tensor) -> float:
    """A chain of sums of at most a few hundred products, through a norm and a softmax: 1000 roundings of the largest number."""
    return 1000 * torch.finfo(value.dtype).eps * max(1.0, float(value.detach().abs().max()))


def agree(actual, expected) -> None:
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert_agree(a, e, tolerance(e))


def written_out(x: torch.Tensor, module, training: bool) -> torch.Tensor:
    """The layer as released, of the module's parameters: everything at every position, unfolded, then sliced.

    What the options change is marked; running statistics are read and never written.
    """
    k, (sh, sw), groups, normalize, pad_mode = module.geometry()
    r = k // 2
    border = extended(x, (r, r, r, r), pad_mode)
    z = F.conv2d(border, module.conv.weight)
    if module.predict == "strided":
        z = z[:, :, ::sh, ::sw]
    norm = module.norm
    if isinstance(norm, nn.BatchNorm2d):
        mean, var = (None, None) if training else (norm.running_mean, norm.running_var)
        z = F.batch_norm(z, mean, var, norm.weight, norm.bias, training or mean is None, 0.0, norm.eps)
    else:
        z = norm(z)
    if module.vary == "image":
        z = z.mean((2, 3), keepdim=True)
    elif module.predict == "dense":
        z = z[:, :, ::sh, ::sw]
    w = z.unflatten(1, (groups, k * k))
    if normalize == "group":
        w = w.softmax(2)
    elif normalize == "joint":
        w = z.softmax(1).view_as(w)
    patches = F.unfold(border, k).view(len(x), groups, -1, k * k, *x.shape[2:])[..., ::sh, ::sw]
    return (patches * w[:, :, None]).sum(3).flatten(1, 2)


def trained(module: nn.Module) -> nn.Module:
    """In float64, with parameters and running statistics that are nobody's defaults."""
    module.double()
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point():
            positive = name.endswith(("norm.weight", "bn.weight", "running_var"))
            value.data.copy_(torch.rand_like(value) + 0.5 if positive else 0.5 * torch.randn_like(value))
    return module


def statistics(module: nn.Module) -> list[torch.Tensor]:
    return [value.double() for value in module.buffers()]


def with_gradients(function, module, x, *rest):
    x = x.clone().requires_grad_()
    y = function(x, *rest)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).cos()
    return y, *torch.autograd.grad((y * weight).sum(), wanted)


# --- against the layer written out -----------------------------------------------------------------------------------

GEOMETRIES = [
    ({}, (2, 8, 9, 8)),  # the default, odd by even
    ({"kernel_size": 5, "stride": (1, 3), "groups": 2}, (1, 4, 6, 7)),  # a stride an axis
    ({"kernel_size": 1, "groups": 4, "normalize": "joint"}, (2, 4, 5, 4)),  # no border; a softmax of groups alone
    ({"kernel_size": 7, "groups": 1, "stride": 3}, (2, 3, 3, 2)),  # spatial only, a border larger than the map
    ({"groups": 2, "normalize": "none"}, (1, 4, 6, 5)),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("vary", ["space", "image"])
@pytest.mark.parametrize("predict", ["dense", "strided"])
@pytest.mark.parametrize(("arguments", "shape"), GEOMETRIES)
def test_it_is_the_layer_written_out(arguments, shape, predict, vary, training):
    for pad_mode in MODES:
        x = torch.randn(shape, dtype=torch.float64)
        module = AdaptiveBlurPool2d(shape[1], **arguments, pad_mode=pad_mode, predict=predict, vary=vary)
        trained(module).train(training)
        expected = with_gradients(written_out, module, x, module, training)
        agree(with_gradients(module, module, x), expected)


@pytest.mark.parametrize("predict", ["dense", "strided"])
def test_running_statistics_are_of_the_positions_the_predictor_sees(predict):
    module = trained(AdaptiveBlurPool2d(4, groups=2, predict=predict))
    before, x = copy.deepcopy(module.norm), torch.randn(2, 4, 7, 6, dtype=torch.float64)
    module(x)
    z = F.conv2d(extended(x, (1, 1, 1, 1), "reflect"), module.conv.weight)
    before(z if predict == "dense" else z[:, :, ::2, ::2])
    agree(statistics(module.norm), statistics(before))


@pytest.mark.parametrize("vary", ["space", "image"])
def test_evaluation_predicts_at_the_stride(vary):
    module, x = AdaptiveBlurPool2d(16, 3, 2, 8, vary=vary), torch.randn(1, 16, 32, 32)
    flops = {}
    for training in (True, False):
        with FlopCounterMode(display=False) as counter:
            module.train(training)(x)
        flops[training] = counter.get_total_flops()
    assert flops[False] * (4 if vary == "space" else 32**2) == flops[True]


NORMS = {
    "group norm": lambda c: nn.GroupNorm(2, c),
    "instance norm": lambda c: nn.InstanceNorm2d(c, affine=True),
    "batch norm of no statistics": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "batch norm without parameters": lambda c: nn.BatchNorm2d(c, affine=False),
    "frozen batch norm": lambda c: adaptive.FrozenBatchNorm2d(c, eps=1e-3),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("predict", ["dense", "strided"])
@pytest.mark.parametrize("norm", NORMS)
def test_other_norms(norm, predict, training):
    module = AdaptiveBlurPool2d(4, groups=2, predict=predict, norm_layer=NORMS[norm])
    trained(module).train(training)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    expected = with_gradients(written_out, module, x, module, training)
    agree(with_gradients(module, module, x), expected)


def test_a_batch_norm_frozen_by_eval_is_folded_in_training():
    module = trained(AdaptiveBlurPool2d(4, groups=2))
    module.train().norm.eval()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    expected = with_gradients(written_out, module, x, module, False)
    before = copy.deepcopy(module.norm.state_dict())
    with FlopCounterMode(display=False) as counter:
        y = module(x)
    assert_agree(y, expected[0], tolerance(y))
    assert counter.get_total_flops() == 2 * 18 * 4 * 9 * 2 * 4 * 4
    assert all(torch.equal(value, before[name]) for name, value in module.norm.state_dict().items())


def test_a_synchronised_batch_norm_evaluates_as_the_one_it_replaces():
    module, x = trained(AdaptiveBlurPool2d(4, groups=2)).eval(), torch.randn(1, 4, 6, 6, dtype=torch.float64)
    y = module(x)
    nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert isinstance(module.norm, nn.SyncBatchNorm) and torch.equal(module(x), y)


@pytest.mark.parametrize("child", ["conv", "norm"])
def test_a_hook_sees_the_whole_map(child):
    module, x, seen = trained(AdaptiveBlurPool2d(4, groups=2)).eval(), torch.randn(1, 4, 6, 6, dtype=torch.float64), []
    y = module(x)
    getattr(module, child).register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert_agree(module(x), y, tolerance(y))
    assert [tuple(z.shape) for z in seen] == [(1, 18, 6, 6)]


# --- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["group", "joint", "none"])
@pytest.mark.parametrize(("init", "row"), [("box", [1 / 3] * 3), ("binomial", pascal(3))])
def test_it_begins_as_a_filter(init, row, normalize):
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    module = trained(AdaptiveBlurPool2d(4, groups=2, normalize=normalize, init=init))
    module.reset_parameters()
    expected = convolved(x, row, row, 2, same(3, 3), "reflect") / (2 if normalize == "joint" else 1)
    assert_agree(module(x), expected, tolerance(expected))
    module(x).square().sum().backward()
    assert module.norm.weight.grad.any()  # from zero it can depart


@pytest.mark.parametrize("pad_mode", MODES)
@pytest.mark.parametrize("tap", range(9))
def test_one_hot_filters_shift_and_subsample(tap, pad_mode):
    x = torch.randn(1, 4, 5, 6)
    module = AdaptiveBlurPool2d(4, stride=(2, 3), groups=2, pad_mode=pad_mode, init="box")
    with torch.no_grad():
        module.norm.bias.view(2, 9)[:, tap] = 1e4
    shown = extended(x, (1, 1, 1, 1), pad_mode)[:, :, tap // 3 :, tap % 3 :]
    assert torch.equal(module(x), shown[:, :, :5:2, :6:3])


@pytest.mark.parametrize("training", [True, False])
def test_constants_stay_and_jointly_the_groups_share_them(training):
    x = torch.full((2, 8, 6, 7), 3.0)
    for normalize in ("group", "joint"):
        module = AdaptiveBlurPool2d(8, groups=4, normalize=normalize, init="binomial").train(training)
        with torch.no_grad():
            module.norm.bias.normal_()
        y = module(x)
        y = y if normalize == "group" else y[:, ::2] + y[:, 1::2]
        total = x[:, :, ::2, ::2] if normalize == "group" else torch.full((2, 3, 4), 6.0)
        assert_agree(y if normalize == "group" else y.sum(1), total, bound(x, 40))


def test_it_learns_to_blur_where_there_is_noise():
    """White noise left of the middle, brighter steps right of it; wanted is the same without the noise."""
    clean = torch.zeros(1, 1, 16, 32)
    clean[..., 16:] = 1 + 2 * (torch.arange(16) // 4 % 2).float()[:, None]
    x, wanted = clean.clone(), clean[..., ::2, ::2]
    module = AdaptiveBlurPool2d(1, groups=1)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(100):
        x[..., :16] = torch.randn(1, 1, 16, 16)
        optimiser.zero_grad()
        F.mse_loss(module(x), wanted).backward()
        optimiser.step()
    with torch.no_grad():
        variance = module.eval().logits(x).softmax(1).var(1)
    assert float(variance[..., 1:7].mean()) < float(variance[..., 9:15].mean()) / 2


# --- what PyTorch does to a module -----------------------------------------------------------------------------------

WAYS = [{}, {"predict": "strided"}, {"vary": "image"}, {"norm_layer": NORMS["group norm"]}]


@pytest.mark.parametrize("arguments", (dict(pad_mode="reflect"), dict(pad_mode="zeros", predict="strided")))
def test_x_with_its_border_is_made_again_for_backward(arguments, monkeypatch):
    """Once training has run forward nobody holds it. What depends on it is as if it had been kept."""
    made = []

    def bordered(*arguments):
        z = original(*arguments)
        made.append(weakref.ref(z))
        return z

    original = adaptive_module.bordered
    layer = AdaptiveBlurPool2d(8, 3, 2, 2, **arguments).double()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64, requires_grad=True)
    wanted = (x, *layer.parameters())
    monkeypatch.setattr(adaptive_module, "_is_plain", lambda conv: False)
    kept = torch.autograd.grad(layer(x).square().sum(), wanted)
    monkeypatch.undo()
    monkeypatch.setattr(adaptive_module, "bordered", bordered)
    y = layer(x)
    assert [z() for z in made] == [None]
    again = torch.autograd.grad(y.square().sum(), wanted, retain_graph=True)
    assert len(made) == 2
    for a, b in zip(again, kept, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        layer.conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.square().sum(), wanted)


@pytest.mark.parametrize("arguments", WAYS)
def test_gradcheck(arguments):
    module = trained(AdaptiveBlurPool2d(4, groups=2, **arguments)).eval()
    x = torch.randn(1, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *module.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *module.parameters()), fast_mode=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", WAYS)
def test_compiled_as_one_graph(arguments, training):
    module = trained(AdaptiveBlurPool2d(4, groups=2, **arguments)).train(training)
    twin, compiled = copy.deepcopy(module), torch.compile(module, fullgraph=True, backend="aot_eager")
    for shape in ((2, 4, 7, 6), (1, 4, 12, 9)):  # the second size makes the graph a dynamic one
        x = torch.randn(shape, dtype=torch.float64)
        agree(with_gradients(compiled, module, x), with_gradients(twin, twin, x))
    agree(statistics(module), statistics(twin))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("arguments", WAYS)
def test_exported_for_evaluation(arguments, dynamic):
    module = trained(AdaptiveBlurPool2d(4, groups=2, **arguments)).eval()
    dims = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},) if dynamic else None
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    program = torch.export.export(module, (x,), dynamic_shapes=dims).module()
    for x in (x, torch.randn(3, 4, 8, 11, dtype=torch.float64)) if dynamic else (x,):  # noqa: B020
        agree([program(x)], [module(x)])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", WAYS)
def test_traced_copied_and_pickled(arguments, training):
    module = AdaptiveBlurPool2d(4, groups=2, **arguments).train(training)
    x = torch.randn(2, 4, 7, 6)
    twins = [torch.fx.symbolic_trace(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    y = module(x)
    for twin in twins:
        assert torch.equal(twin(x), y)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("arguments", WAYS)
def test_traced_by_jit_and_mapped_by_functorch(arguments):
    module = trained(AdaptiveBlurPool2d(4, groups=2, **arguments)).eval()
    traced = torch.jit.trace(module, torch.randn(2, 4, 7, 6, dtype=torch.float64))
    x = torch.randn(3, 2, 4, 8, 11, dtype=torch.float64)
    expected = torch.stack([module(value) for value in x])
    agree([torch.stack([traced(value) for value in x]), torch.func.vmap(module)(x)], [expected] * 2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, NORMS["group norm"]])
def test_autocast_gives_a_convolutions_dtype(norm, training):
    module = AdaptiveBlurPool2d(4, groups=2, norm_layer=norm).train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(torch.randn(2, 4, 6, 6))
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_a_cast_module_works_in_its_dtype(dtype, training):
    module, x = AdaptiveBlurPool2d(4, groups=2).to(dtype).train(training), torch.randn(2, 4, 6, 6).to(dtype)
    assert module(x).dtype is dtype


def test_layout_devices_and_an_empty_batch():
    module = AdaptiveBlurPool2d(8).eval()
    x = torch.randn(2, 8, 6, 7).contiguous(memory_format=torch.channels_last)
    assert module(x).is_contiguous(memory_format=torch.channels_last)
    assert module(x[:0]).shape == (0, 8, 3, 4)
    with torch.device("meta"):
        assert AdaptiveBlurPool2d(8, init="binomial")(torch.empty(2, 8, 6, 7)).shape == (2, 8, 3, 4)


def test_names_and_repr():
    module = AdaptiveBlurPool2d(16, 5)
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {
        "conv.weight": (200, 16, 5, 5),
        **{f"norm.{name}": (200,) for name in ("weight", "bias", "running_mean", "running_var")},
        "norm.num_batches_tracked": (),
    }
    assert "kernel_size=5, stride=(2, 2), groups=8, normalize='group', pad_mode='reflect', predict='dense'" in repr(
        module
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels must be an int >= 1, got 0"),
        ({"kernel_size": 4}, ValueError, "kernel_size must be an odd int from 1 to 63, got 4"),
        ({"stride": 0}, ValueError, "stride must be an int >= 1 or a pair"),
        ({"groups": 3}, ValueError, "groups must divide the 8 channels, got 3"),
        ({"groups": 16}, ValueError, "groups must divide the 8 channels, got 16"),
        ({"normalize": "softmax"}, ValueError, "normalize must be one of 'group', 'joint', 'none', got 'softmax'"),
        ({"pad_mode": "constant"}, ValueError, "pad_mode must be one of 'reflect'"),
        ({"predict": "full"}, ValueError, "predict must be one of 'dense', 'strided', got 'full'"),
        ({"vary": "channel"}, ValueError, "vary must be one of 'space', 'image', got 'channel'"),
        ({"init": "zeros"}, ValueError, "init must be one of 'kaiming', 'box', 'binomial', got 'zeros'"),
        (
            {"init": "box", "norm_layer": nn.InstanceNorm2d},
            ValueError,
            "init must be 'kaiming' where norm_layer has no",
        ),
        ({"norm_layer": None}, TypeError, "norm_layer must be called with 72 and return a torch.nn.Module, got None"),
        ({"norm_layer": nn.BatchNorm2d(72)}, TypeError, "norm_layer must be called with 72"),
        ({"norm_layer": float}, TypeError, "norm_layer must be called with 72"),
    ],
)
def test_a_wrong_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        AdaptiveBlurPool2d(**{"channels": 8, **arguments})


@pytest.mark.parametrize("shape", [(8, 6, 6), (1, 4, 6, 6), (1, 8, 0, 6)])
def test_a_wrong_input_is_named(shape):
    with pytest.raises(ValueError, match=r"x must have shape \(N, 8, H, W\) with pixels in it, got"):
        AdaptiveBlurPool2d(8)(torch.randn(shape))


# --- the released layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_it_is_the_released_layer(path):
    """Against what that returned: results, gradients, and the key of every parameter and buffer."""
    data = {name: torch.from_numpy(value) for name, value in np.load(path).items() if name != "pad"}
    _, channels, _, _, kernel_size, group, stride, training = data["meta"].tolist()
    layer = adaptive.Downsample_PASA_group_softmax(channels, kernel_size, stride, "reflect", group).double()
    layer.load_state_dict({n.removeprefix("state."): v for n, v in data.items() if n.startswith("state.")}, strict=True)
    layer.train(bool(training))
    x = data["x"].requires_grad_()
    y = layer(x)
    grads = torch.autograd.grad(y, (x, layer.conv.weight, layer.bn.weight, layer.bn.bias), data["dy"])
    agree([y, *grads], [data[name] for name in ("y", "dx", "dconv_weight", "dbn_weight", "dbn_bias")])
    assert int(layer.bn.num_batches_tracked) == training


def test_there_is_recorded_data():
    assert len(GOLDEN) == 5


@pytest.mark.parametrize("pad_type", ["refl", "repl", "zero"])
@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("frozen", [False, True])
def test_pasa_written_out(kernel_size, frozen, pad_type):
    layer, r = trained(adaptive.Downsample_PASA(4, kernel_size, 2, pad_type, frozen=frozen)).eval(), kernel_size // 2
    x, bn = torch.randn(2, 4, 7, 6, dtype=torch.float64), layer.bn
    mode = {"refl": "reflect", "repl": "replicate", "zero": "zeros"}[pad_type]
    z = F.conv2d(extended(x, (1, 1, 1, 1), mode), layer.conv.weight)
    w = F.batch_norm(z, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps).clamp(min=1e-4)
    patches = F.unfold(extended(x, (r, r, r, r), mode), kernel_size).view(2, 4, kernel_size**2, 7, 6)
    expected = (patches * (w / w.sum(1, keepdim=True))[:, None]).sum(2)[:, :, ::2, ::2]
    agree([layer(x)], [expected])
    assert {key for key in layer.state_dict() if not key.startswith("bn.")} == {"filt_d", "conv.weight"}
    away = adaptive.Downsample_PASA(4, kernel_size).filt_d
    assert away.shape == (1, kernel_size**2, 1, 1)
    assert_agree(away[0, 0], torch.full((1, 1), 2**0.5 * r), tolerance(away))


def test_a_frozen_batch_norm_is_buffers_and_takes_a_batch_norms_checkpoint():
    plain = trained(adaptive.Downsample_PASA_group_softmax(4, 3, 2)).eval()
    frozen = adaptive.Downsample_PASA_group_softmax(4, 3, 2, frozen=True).double().train()
    assert [name for name, _ in frozen.named_parameters()] == ["conv.weight"]
    assert {key.removeprefix("bn.") for key in frozen.state_dict() if key.startswith("bn.")} == {
        "weight", "bias", "running_mean", "running_var",
    }  # fmt: skip
    frozen.load_state_dict(plain.state_dict(), strict=True)
    plain.bn.eps = 0.0
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    agree([frozen(x)], [plain(x)])
    z = torch.randn(2, 18, 3, 3, dtype=torch.float64)
    agree([frozen.bn(z)], [plain.bn(z)])


def test_changed_geometry_is_seen():
    """Surgery that turns strides into dilation writes to attributes, which the original reads in every call."""
    layer, x = adaptive.Downsample_PASA_group_softmax(4, 3, 2).eval(), torch.randn(1, 4, 6, 6)
    y = layer(x)
    layer.stride = 1
    assert_agree(layer(x)[:, :, ::2, ::2], y, bound(x, 100))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adaptive.Downsample_PASA_group_softmax(4, 4), "kernel_size must be an odd int from 1 to 63, got 4"),
        (lambda: adaptive.Downsample_PASA_group_softmax(4, 3, group=3), "group must divide the 4 in_channels, got 3"),
        (lambda: adaptive.Downsample_PASA_group_softmax(4, 3, group=0), "group must be an int >= 1, got 0"),
        (lambda: adaptive.Downsample_PASA_group_softmax(0, 3), "in_channels must be an int >= 1, got 0"),
        (lambda: adaptive.Downsample_PASA_group_softmax(4, 3, (2, 2)), "stride must be an int >= 1, got"),
        (
            lambda: adaptive.Downsample_PASA_group_softmax(4, 3, 2, "same"),
            "pad_type must be one of 'refl', .*, got 'same'",
        ),
        (lambda: adaptive.Downsample_PASA(4, 2), "kernel_size must be an odd int from 1 to 63, got 2"),
        (lambda: adaptive.FrozenBatchNorm2d(0), "num_features must be an int >= 1, got 0"),
    ],
)
def test_a_wrong_argument_of_a_released_layer_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
