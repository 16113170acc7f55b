"""accelerate(fuse="all"): what becomes one step with a blur, what does not and why, and that a model stays what it was."""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import aliasfused
from agreement import assert_agree, bound
from aliasfused.compat.antialiased_cnns import BlurPool
from aliasfused.nn import BlurPool2d
from aliasfused.surgery.fuse import Absorbed, Fused
from bench.models import antialiased_resnet, pools_blurred

timm = pytest.importorskip("timm", reason="timm is a library whose models are accelerated")
torchvision = pytest.importorskip("torchvision", reason="torchvision is what antialiased-cnns' models are made of")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def settled(model: nn.Module) -> nn.Module:
    """In float64, and with batch norms as they are after some training, each of them another."""
    model.double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for name, row in (*module._parameters.items(), *module._buffers.items()):
                if row is not None and row.is_floating_point():
                    least = 0.5 if name in ("weight", "running_var") else -0.5
                    nn.init.uniform_(row, least, least + 1)
    return model


def outcome(model: nn.Module, x: torch.Tensor, training: bool) -> dict[str, torch.Tensor]:
    """Output, gradients and buffers afterwards; the model stays as it was."""
    model = copy.deepcopy(model).train(training)
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = model(x)
    inputs = {"x": x, **dict(model.named_parameters())}
    grads = torch.autograd.grad(y.square().mean(), list(inputs.values()), allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), **{f"gradient of {k}": g for k, g in zip(inputs, grads)}, **dict(model.named_buffers())}


def assert_same(old: nn.Module, new: nn.Module, x: torch.Tensor) -> None:
    """In float64 they are closer than what float32 does to the old one; see trial.py for the steps themselves."""
    for training in (True, False):
        expected, found = outcome(old, x, training), outcome(new, x, training)
        rounded = outcome(copy.deepcopy(old).float(), x.float(), training)
        assert found.keys() == expected.keys()
        for what, value in expected.items():
            assert_agree(found[what], value, float((rounded[what].double() - value).abs().max()))


def absorbed(report) -> dict[str, tuple[str, ...]]:
    return {row.name: row.absorbed for row in report if row.absorbed}


def check(model: nn.Module, x: torch.Tensor, **options) -> aliasfused.surgery.Report:
    """Accelerate a model, and see that nothing about it changes but the classes of what the report names."""
    model = settled(model)
    old = copy.deepcopy(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    attributes = {name: (type(module), module.training) for name, module in modules.items()}
    report = aliasfused.accelerate(model, **options)
    for name, module in model.named_modules():
        assert module is modules[name] and module.training == attributes[name][1]
        assert isinstance(module, attributes[name][0]) or any(row.name == name for row in report)
    assert [*dict(model.named_modules())] == [*modules]
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert [*dict(model.named_parameters())] == [*parameters]
    before, after = old.state_dict(), model.state_dict()
    assert [*before] == [*after] and all(torch.equal(after[key], value) for key, value in before.items())
    named = {path for row in report for path in row.absorbed}
    assert {name for name, m in modules.items() if isinstance(m, Absorbed)} <= named
    assert_same(old, model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = aliasfused.accelerate(model, **options)
    assert absorbed(again) == absorbed(report)
    assert all(row.reason.startswith("already fused") for row in again if row.action == "fused")
    return report


# --- real models -----------------------------------------------------------------------------------------------------

SHORT = {"layers": (1, 1, 1, 1), "num_classes": 5}
BLURRED = {"aa_layer": timm.layers.BlurPool2d, "num_classes": 5}
TIMM = {  # blurs that are steps now, modules in them, and where these are
    "resnetblur18": (SHORT, 4, 3 + 3 * 2),  # stem: bn, act, max; three strided blocks: bn, act
    "resnetblur50": (SHORT, 4, 3 + 3 * 2),
    "resnetaa50d": (SHORT, 4, 2 + 3 * 2),  # averages, one for the stem's maximum; those of shortcuts have ceil_mode
    "seresnextaa101d_32x8d": (SHORT, 4, 2 + 3 * 2),
    "densenetblur121d": ({"block_config": (1, 1, 1, 1), "num_classes": 5}, 1, 2),  # stem: norm with act, max
    "efficientnet_blur_b0": ({"num_classes": 5}, 4, 4),  # strided depthwise convolutions: norm with act
    "mobilenetv4_conv_blur_medium": ({"num_classes": 5}, 4, 4),
    "cspresnet50": (BLURRED, 4, 2 + 3),  # stem: norm with act, max; three stages begin with norm with act
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    options, steps, modules = TIMM[name]
    report = check(timm.create_model(name, **options), torch.randn(2, 3, 65, 64, dtype=torch.float64))
    found = absorbed(report)
    assert (len(found), sum(map(len, found.values()))) == (steps, modules)
    assert [row.reason for row in report] == [""] * steps


def test_blurs_of_timms_densenet_transitions_have_a_convolution_before_them():
    model = timm.create_model("densenet121", block_config=(1, 1), growth_rate=8, aa_stem_only=False, **BLURRED)
    report = check(model, torch.randn(2, 3, 33, 32, dtype=torch.float64))
    assert [(row.name, row.absorbed, row.reason) for row in report] == [
        ("features.pool0.1", ("features.norm0", "features.pool0.0"), ""),
        ("features.transition1.pool", (), ""),
    ]


def test_features_that_a_model_gives_out_stay():
    model = settled(timm.create_model("resnetblur18", features_only=True, layers=(1, 1, 1, 1))).eval()
    x = torch.randn(1, 3, 65, 64, dtype=torch.float64)
    with torch.no_grad():
        expected, rounded = model(x), copy.deepcopy(model).float()(x.float())
    first, *others = aliasfused.accelerate(model)
    assert (first.absorbed, first.reason) == (("maxpool.0",), "act1 has a second consumer")
    assert [len(row.absorbed) for row in others] == [2] * 3
    for y, e, r in zip(model(x), expected, rounded, strict=True):
        assert_agree(y, e, float((r.double() - e).abs().max()))


def zhang_resnet(block: type[nn.Module], pool_only: bool = True) -> nn.Module:
    """antialiased-cnns' topology, with one block a stage."""
    slim = {"width_per_group": 16} if block is torchvision.models.resnet.Bottleneck else {}
    model = torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=5, **slim)
    return antialiased_resnet(model, BlurPool, pool_only)


@pytest.mark.parametrize("pool_only", [True, False])
@pytest.mark.parametrize(("block", "norm"), [("BasicBlock", "bn1"), ("Bottleneck", "bn2")])
def test_zhangs_resnets(block, norm, pool_only):
    """Their blocks use one ReLU for all places, so the class of the strided ones is exchanged too."""
    block = getattr(torchvision.models.resnet, block)
    model = zhang_resnet(block, pool_only)
    report = check(model, torch.randn(2, 3, 33, 32, dtype=torch.float64))
    conv = "conv3" if norm == "bn2" else "conv2"
    stem = {"maxpool.1": ("bn1", "relu", "maxpool.0")}
    if not pool_only:
        stem = {"maxpool.0": ("bn1", "relu"), "maxpool.2": ("maxpool.1",)}
    assert absorbed(report) == {
        **stem,
        **{f"layer{i}.0.{conv}.0": (f"layer{i}.0.{norm}", f"layer{i}.0.relu") for i in (2, 3, 4)},
    }
    # A block's input goes through its first convolution too.
    shortcuts = {row.name: row.reason.removeprefix("already fused; ") for row in report if row.reason}
    assert shortcuts == {f"layer{i}.0.downsample.0": f"layer{i - 1}.0.relu has a second consumer" for i in (2, 3, 4)}
    assert type(model.layer1[0]) is block and type(model.layer2[0]) is not block
    assert isinstance(model.layer2[0], block) and type(model.layer2[0].relu) is nn.ReLU


def blurred3(channels: int) -> nn.Module:
    return BlurPool(channels, filt_size=3)


@pytest.mark.parametrize(("name", "layers", "steps"), [("vgg11", 11, 2), ("vgg11_bn", 15, 3)])
def test_zhangs_vggs(name, layers, steps):
    features = pools_blurred(getattr(torchvision.models, name)().features[:layers], 2, blurred3)
    report = check(features, torch.randn(2, 3, 33, 32, dtype=torch.float64))
    assert [len(row.absorbed) for row in report] == [steps] * 3


def test_zhangs_densenet():
    model = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5)
    stem = [("max0", nn.MaxPool2d(3, 1, 1)), ("pool0", BlurPool(16, filt_size=3))]
    children = list(model.features.named_children())
    model.features = nn.Sequential(OrderedDict([*children[:3], *stem, *children[4:]]))
    model.features.transition1.pool = BlurPool(16)
    report = check(model, torch.randn(2, 3, 33, 32, dtype=torch.float64))
    assert absorbed(report) == {"features.pool0": ("features.norm0", "features.relu0", "features.max0")}
    assert [row.reason for row in report] == ["already fused" if "transition" in row.name else "" for row in report]


def test_zhangs_mobilenet():
    model = torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=5)
    for module in model.features[1:-1]:
        if module.stride == 2:
            depthwise = module.conv[1][0]
            depthwise.stride = (1, 1)
            module.conv.insert(2, BlurPool(depthwise.out_channels))
    report = check(model, torch.randn(2, 3, 65, 64, dtype=torch.float64))
    assert [row.absorbed for row in report] == [
        (f"features.{i}.conv.1.1", f"features.{i}.conv.1.2") for i in (2, 4, 7, 14)
    ]


def test_zhangs_alexnet():
    """The first blur comes after a ReLU, the second after a maximum of the first."""
    first, *rest = torchvision.models.alexnet().features
    first.stride = (2, 2)
    model = pools_blurred([first, rest[0], BlurPool(64), *rest[1:5]], 3, blurred3)
    report = check(model, torch.randn(2, 3, 63, 64, dtype=torch.float64))
    assert [row.absorbed for row in report] == [("1",), ("3",), ("6", "7")]


# --- single chains ---------------------------------------------------------------------------------------------------


def chain(*layers: nn.Module, channels: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, channels, 3, bias=False), *layers)


def image(height: int = 11, width: int = 12) -> torch.Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64)


ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.SiLU(inplace=True),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.Hardswish(),
    nn.LeakyReLU(0.3),
    nn.Softplus(2.0, 5.0),
    timm.layers.activations.Swish(),
    timm.layers.activations.HardSwish(),
    timm.layers.activations.GELU(),
    timm.layers.activations.GELUTanh(),
    timm.layers.activations_me.SwishMe(),
    timm.layers.activations_me.HardSwishMe(),
]


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda act: f"{type(act).__module__}.{act}")
def test_activations(act):
    report = check(chain(nn.BatchNorm2d(4), act, BlurPool2d()), image())
    assert [row.absorbed for row in report] == [("1", "2")]


@pytest.mark.parametrize(
    ("layers", "steps"),
    [
        ([nn.BatchNorm2d(4), BlurPool2d()], ("1",)),
        ([nn.BatchNorm2d(4, affine=False), nn.ReLU(), BlurPool2d(filt_size=3)], ("1", "2")),
        ([nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), BlurPool2d()], ("1", "2")),
        ([nn.BatchNorm2d(4, momentum=None), nn.MaxPool2d(3, 1, 1), BlurPool2d()], ("1", "2")),
        ([nn.BatchNorm2d(4), nn.Identity(), nn.ReLU(), nn.Dropout(0.0), nn.MaxPool2d((2, 3), (1, 1), (1, 0)), BlurPool2d()],
            ("1", "3", "5")),
        ([nn.Sequential(nn.BatchNorm2d(4), nn.Sequential()), nn.Sequential(nn.ReLU()), nn.Sequential(BlurPool2d())], ("1.0", "2.0")),
        ([timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU), nn.MaxPool2d(2, 1), BlurPool2d()], ("1", "2")),
        ([timm.layers.BatchNormAct2d(4, apply_act=False), nn.ReLU(), BlurPool2d()], ("1", "2")),
        ([nn.ReLU(), timm.layers.BatchNormAct2d(4, act_layer=nn.ReLU), nn.ReLU(), BlurPool2d()], ("3",)),  # two activations
        ([nn.ReLU(), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, 1), BlurPool2d()], ("3",)),  # two maxima
        ([nn.MaxPool2d(2, 1), nn.ReLU(), BlurPool2d()], ("2",)),  # another order
        ([nn.ReLU(), nn.MaxPool2d(2), BlurPool2d()], ()),  # a maximum with a stride
        ([nn.ReLU(), nn.MaxPool2d(2, 1, dilation=2), BlurPool2d()], ()),
        ([nn.ReLU(), nn.Conv2d(4, 4, 1), BlurPool2d()], ()),
        ([nn.BatchNorm2d(4), nn.ReLU(), BlurPool2d(learnable=True)], ("1", "2")),
        ([nn.BatchNorm2d(4), nn.ReLU(), BlurPool2d(channels=4, learnable="normalised")], ("1", "2")),
        ([nn.BatchNorm2d(4), nn.ReLU(), BlurPool(4, filt_size=1)], ("1", "2")),
        ([nn.BatchNorm2d(4), nn.ReLU(), aliasfused.compat.kornia.MaxBlurPool2D(3, max_pool_size=3)], ("1", "2")),
        ([nn.ReLU(), nn.MaxPool2d(2, 1), aliasfused.compat.kornia.MaxBlurPool2D(3)], ()),  # two maxima
        ([nn.BatchNorm2d(4), nn.ReLU(), aliasfused.compat.composer.BlurMaxPool2d(3, 2, 1)], ("1", "2")),
        ([nn.ReLU(), aliasfused.compat.composer.BlurMaxPool2d(3, 2, 1, 2)], ()),  # a maximum with gaps
        ([nn.BatchNorm2d(4), nn.ReLU(), aliasfused.compat.composer.BlurConv2d(4, 5, 3, 2, 1)], ("1", "2")),
        ([nn.ReLU(inplace=True), aliasfused.compat.composer.BlurConv2d(4, 6, 5, 2, dilation=2, groups=2)], ("1",)),
        ([nn.BatchNorm2d(4), nn.SiLU(), nn.MaxPool2d(2, 1), aliasfused.compat.composer.BlurConv2d(4, 5, 1, 2)],
            ("1", "2", "3")),  # a convolution of one pixel: the step is at its stride
        ([nn.BatchNorm2d(4), nn.ReLU(), aliasfused.compat.composer.BlurPoolConv2d(nn.Conv2d(4, 5, 3, 2, 1))], ("1", "2")),
        ([nn.ReLU(), aliasfused.compat.composer.BlurConv2d(4, 5, 3, 2, 1, blur_first=False)], ()),
    ],
)  # fmt: skip
def test_chains(layers, steps):
    report = check(chain(*layers), image())
    assert [(row.absorbed, row.reason) for row in report] == [(steps, "" if steps else "already fused")]


@pytest.mark.parametrize(
    ("pool", "fused"),
    [
        (nn.AvgPool2d(2), True),
        (nn.AvgPool2d((2, 3), (2, 3)), True),
        (nn.AvgPool2d(2, 2, count_include_pad=False), True),
        (nn.AvgPool2d(1), False),
        (nn.AvgPool2d(3, 2), False),
        (nn.AvgPool2d(2, 2, 1), False),
        (nn.AvgPool2d(2, ceil_mode=True), False),
        (nn.AvgPool2d(2, divisor_override=3), False),
    ],
)
def test_averages(pool, fused):
    model = chain(nn.BatchNorm2d(4), nn.ReLU(), pool, BlurPool2d())
    report = check(model, image())
    assert absorbed(report) == ({"3": ("1", "2")} if fused else {})
    assert [row.name for row in report] == ["3", "4"][not fused :]
    assert [row.cls for row in report][-2:-1] == ["torch.nn.modules.pooling.AvgPool2d"] * fused


def test_an_average_of_no_activation_is_no_blur():
    report = check(chain(nn.AvgPool2d(2), nn.BatchNorm2d(4), nn.AvgPool2d(2), BlurPool2d()), image(31, 32))
    assert [row.name for row in report] == ["4"]


def test_fuse_blur_leaves_the_rest():
    model = chain(nn.BatchNorm2d(4), nn.ReLU(), timm.layers.BlurPool2d(4), nn.ReLU(), nn.AvgPool2d(2))
    report = check(model, image(), fuse="blur")
    assert [(row.name, row.action, row.absorbed) for row in report] == [("3", "fused", ())]
    assert type(model[3]) is aliasfused.compat.timm.BlurPool2d and type(model[1]) is nn.BatchNorm2d


def test_another_fuse_is_refused():
    with pytest.raises(ValueError, match="fuse must be 'all' or 'blur', got 'max'"):
        aliasfused.accelerate(nn.Identity(), fuse="max")


def test_the_report_names_what_was_absorbed():
    report = aliasfused.accelerate(chain(nn.BatchNorm2d(4), nn.ReLU(), BlurPool2d()))
    head, row = str(report).splitlines()
    assert [cell.strip() for cell in head.split("|")] == ["module", "class", "action", "absorbed", "reason"]
    assert "| fused  | 1, 2" in row


# --- what is left, and why -------------------------------------------------------------------------------------------


class Forked(nn.Module):
    """One of the values is read twice."""

    def __init__(self, at: int, inplace: bool = False) -> None:
        super().__init__()
        self.at = at
        self.conv, self.bn, self.act, self.blur = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace), BlurPool2d()

    def forward(self, x):
        values = [self.conv(x)]
        for module in (self.bn, self.act, self.blur):
            values.append(module(values[-1]))
        return values[-1].mean() + values[self.at].mean()


@pytest.mark.parametrize(
    ("at", "inplace", "steps", "reason"),
    [
        (2, False, (), "act has a second consumer"),
        (1, False, ("act",), "bn has a second consumer"),
        (1, True, (), "act is in place, and what it overwrites may be seen elsewhere"),
        (0, True, ("bn", "act"), ""),
    ],
)
def test_a_second_consumer(at, inplace, steps, reason):
    (row,) = check(Forked(at, inplace), image())
    assert (row.absorbed, row.reason) == (steps, reason or ("" if steps else "already fused")) or (
        row.absorbed == steps and row.reason.endswith(reason)
    )


class Twice(nn.Module):
    """One module for two places."""

    def __init__(self, shared: str) -> None:
        super().__init__()
        self.conv, self.bn, self.act, self.blur = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), BlurPool2d()
        self.shared = shared

    def forward(self, x):
        y = self.blur(self.act(self.bn(self.conv(x))))
        return getattr(self, self.shared)(y)


@pytest.mark.parametrize(
    ("shared", "steps", "reason"),
    [
        ("bn", ("act",), "bn is called 2 times"),
        ("act", (), "already fused; act is called 2 times"),
        ("blur", (), "already fused; blur is called 2 times"),
    ],
)
def test_a_module_that_is_called_twice(shared, steps, reason):
    (row,) = check(Twice(shared), image())
    assert (row.absorbed, row.reason) == (steps, reason)


def test_a_module_of_two_names():
    model = nn.Sequential(chain(nn.BatchNorm2d(4), nn.ReLU(), BlurPool2d()), nn.Identity())
    model[1].alias = model[0][1]
    (row,) = check(model, image())
    assert (row.absorbed, row.reason) == (("0.2",), "0.1 has 2 names")


def hook(kind: str):
    return lambda module: getattr(module, f"register_{kind}")(lambda *_: None)


HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(
    ("path", "steps"),
    [("1.0", ("2.0", "3.0")), ("1", ("2.0", "3.0")), ("2.0", ("3.0",)), ("3.0", ()), ("4", ()), ("4.0", ()), ("0", None), ("", None)],
)  # fmt: skip
def test_hooks_keep_what_they_see(kind, path, steps):
    """Of a module itself, or of one whose border the values cross; None where a hook sees what it saw."""
    model = chain(*map(nn.Sequential, (nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2, 1), timm.layers.BlurPool2d(4))))
    hook(kind)(model.get_submodule(path))
    (row,) = aliasfused.accelerate(model)
    assert row.action == "fused"
    assert row.absorbed == (("1.0", "2.0", "3.0") if steps is None else steps)
    assert row.reason == ("" if steps is None else f"{path} has hooks")


@pytest.mark.parametrize(
    ("path", "steps"), [("relu", ()), ("conv2", ()), ("bn1", ("0.relu",)), ("conv2.1", None), ("", None)]
)
def test_hooks_in_a_block(path, steps):
    model = zhang_resnet(torchvision.models.resnet.BasicBlock).layer2
    model[0].get_submodule(path).register_forward_hook(lambda *_: None)
    row, _ = aliasfused.accelerate(model)
    assert row.absorbed == (("0.bn1", "0.relu") if steps is None else steps)
    assert steps is None or row.reason.endswith(f"0.{path} has hooks")


def replaced(module: nn.Module) -> nn.Module:
    module.forward = module.forward
    return module


class Frozen(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var)


@pytest.mark.parametrize(
    ("layers", "steps", "reason"),
    [
        ([nn.BatchNorm2d(4), nn.Mish(), BlurPool2d()], (), "2, Mish, is not an activation the step has"),
        ([nn.PReLU(), nn.MaxPool2d(2, 1), BlurPool2d()], ("2",), "1, PReLU, is not an activation the step has"),
        ([timm.layers.BatchNormAct2d(4, act_layer=nn.Mish), BlurPool2d()], (), "the activation of 1, Mish, is not one the step has"),
        ([nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(), BlurPool2d()], ("3",), "2 drops"),
        ([nn.BatchNorm2d(4), timm.layers.DropBlock2d(0.1), nn.ReLU(True), BlurPool2d()], ("3",), "2 drops"),
        ([timm.layers.BatchNormAct2d(4, drop_layer=lambda: timm.layers.DropPath(0.5)), BlurPool2d()], (), "1 drops"),
        ([nn.SyncBatchNorm(4), nn.ReLU(), BlurPool2d()], ("2",), "1, SyncBatchNorm, is not a BatchNorm2d"),
        ([nn.GroupNorm(2, 4), nn.ReLU(), BlurPool2d()], ("2",), "1, GroupNorm, is not a BatchNorm2d"),
        ([timm.layers.norm_act.FrozenBatchNormAct2d(4), BlurPool2d()], ("1.act",), None),
        ([Frozen(4), nn.ReLU(), BlurPool2d()], ("2",), None),
        ([replaced(nn.BatchNorm2d(4)), nn.ReLU(), BlurPool2d()], ("2",), "the forward of 1 was replaced on the instance"),
        ([nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(4), "weight", nn.Identity()), nn.ReLU(), BlurPool2d()],
            ("2",), "1, ParametrizedBatchNorm2d, is not a BatchNorm2d"),
    ],
)  # fmt: skip
def test_left_with_a_reason(layers, steps, reason):
    (row,) = check(chain(*layers), image())
    assert row.absorbed == steps
    assert reason is None or row.reason.removeprefix("already fused; ") == reason


class Functional(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.conv, self.bn, self.function = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), function
        self.max, self.blur = nn.MaxPool2d(2, 1), BlurPool2d()

    def forward(self, x):
        return self.blur(self.max(self.function(self.bn(self.conv(x)))))


@pytest.mark.parametrize("function", [F.relu, torch.relu, lambda x: x.relu_(), lambda x: F.silu(x, inplace=True)])
def test_a_functional_activation(function):
    (row,) = check(Functional(function), image())
    assert row.absorbed == ("max",) and row.reason.startswith("functional ")


class Overwritten(nn.Module):
    """What the chain reads late, somebody else writes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.blur = nn.Conv2d(3, 4, 3), nn.ReLU(), BlurPool2d()

    def forward(self, x):
        x = self.conv(x)
        y = self.act(x)
        x += 1
        return self.blur(y).mean() + x.mean()


def test_what_is_overwritten_meanwhile():
    (row,) = check(Overwritten(), image())
    assert row.absorbed == () and row.reason.endswith("add may overwrite conv")


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blur = chain(nn.BatchNorm2d(4), nn.ReLU()), BlurPool2d()

    def forward(self, x):
        with torch.no_grad():
            y = self.stem(x)
        return self.blur(y) + 0 * x.mean()


def test_another_grad_mode():
    (row,) = check(NoGrad(), image())
    assert row.absorbed == () and row.reason.endswith("stem.2 is in another grad mode")


class ByMode(nn.Module):
    """In training its activation is read by somebody else, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.blur, self.calls = nn.Conv2d(3, 4, 3), nn.ReLU(), BlurPool2d(), 0

    def forward(self, x):
        self.calls += 1
        y = self.act(self.conv(x))
        return self.blur(y).mean() + (y.mean() if self.training else 0)


def test_modes_that_differ():
    model = ByMode()
    report = aliasfused.accelerate(model)
    assert [row[2:] for row in report] == [("fused", "already fused; training and evaluation differ", ())]
    assert model.calls == 0 and model.training


class Step(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.steps = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), BlurPool2d())

    def forward(self, x):
        return self.steps(x)


class Untraceable(Step):
    """torch.fx cannot follow it, only what is in it."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__(3)
        self.step, self.inner = Step(), nn.Sequential(*inner)

    def forward(self, x):
        if x.abs().sum() > 1e9:
            return x
        return self.inner(self.step(super().forward(x)))


def test_inside_what_cannot_be_traced():
    """A Sequential might be gone through by a loop that keeps what it wants to see: only what its parts call is clear."""
    inner = nn.Sequential(Step(), nn.BatchNorm2d(4), nn.ReLU(), BlurPool2d())
    report = check(Untraceable(*inner), image(67, 68))
    assert absorbed(report) == {"step.steps.2": ("step.steps.1",), "inner.0.steps.2": ("inner.0.steps.1",)}
    unseen = "already fused; torch.fx does not reach it; accelerate the part of the model that calls it"
    assert [(row.name, row.reason) for row in report if row.reason] == [("steps.2", unseen), ("inner.3", unseen)]


def test_around_what_cannot_be_traced():
    model = nn.Sequential(Untraceable(Step()), nn.BatchNorm2d(4), nn.ReLU(), BlurPool2d(), Untraceable())
    model[4].steps[0] = nn.Conv2d(4, 4, 3, padding=1)
    found = absorbed(check(model, image(131, 132)))
    assert found.pop("3") == ("1", "2")
    assert [*found] == ["0.step.steps.2", "0.inner.0.steps.2", "4.step.steps.2"]


def test_what_cannot_be_copied_is_looked_at_inside():
    model = nn.Sequential(Step(3))
    model.lock = (i for i in ())  # no generator can be copied
    assert absorbed(aliasfused.accelerate(model)) == {"0.steps.2": ("0.steps.1",)}


def test_a_difference_is_left(monkeypatch):
    monkeypatch.setitem(aliasfused.surgery.chains._ACTS, "torch.nn.modules.activation.Mish", lambda m: "silu")
    model = chain(nn.BatchNorm2d(4), nn.Mish(), BlurPool2d())
    (row,) = aliasfused.accelerate(model)
    assert row.absorbed == () and "the output of the fused form differs by" in row.reason
    assert type(model[1]) is nn.BatchNorm2d and "_step" not in vars(model[3])


def test_a_block_of_sync_batch_norms():
    """They stay what they are, but the activation goes with the blur."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(zhang_resnet(torchvision.models.resnet.BasicBlock).layer2)
    (row, _) = check(model, torch.randn(2, 64, 7, 8, dtype=torch.float64))
    assert row.absorbed == ("0.relu",) and row.reason.endswith("0.bn1, SyncBatchNorm, is not a BatchNorm2d")


def test_a_block_whose_batch_norm_has_two_names():
    model = zhang_resnet(torchvision.models.resnet.BasicBlock).layer2
    model = nn.Sequential(model[0], nn.Identity())
    model[1].bn = model[0].bn1
    (row, _) = check(model, torch.randn(2, 64, 7, 8, dtype=torch.float64))
    assert row.absorbed == ("0.relu",) and row.reason == "0.bn1 has 2 names"


def test_a_block_itself():
    model = zhang_resnet(torchvision.models.resnet.Bottleneck).layer2[0]
    report = check(model, torch.randn(2, 256, 7, 8, dtype=torch.float64))
    assert absorbed(report) == {"conv3.0": ("bn2", "relu")}


def composers_resnet() -> nn.Module:
    """A stage as composer's surgery leaves it: a blur in one module with the convolution that has the stride."""
    model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=16).layer2
    conv = aliasfused.compat.composer.BlurConv2d(32, 32, 3, 2, 1, bias=False)
    conv.load_state_dict({"conv.weight": model[0].conv2.weight, "blur_filter": conv.blur_filter})
    model[0].conv2 = conv
    return model


def test_composers_block():
    model = composers_resnet()
    report = check(model, torch.randn(2, 256, 7, 8, dtype=torch.float64))
    assert absorbed(report) == {"0.conv2": ("0.bn1", "0.relu")}
    assert type(model[0].conv2.conv) is nn.Conv2d and type(model[0].relu) is nn.ReLU


def test_a_hook_on_the_convolution_behind_a_blur_keeps_what_it_sees():
    model = chain(nn.ReLU(), aliasfused.compat.composer.BlurConv2d(4, 5, 3, 2, 1))
    hook("forward_hook")(model[2].conv)
    (row,) = aliasfused.accelerate(model)
    assert (row.absorbed, row.reason) == ((), "already fused; a module inside 2 has hooks")


def test_a_block_with_another_forward_is_left(monkeypatch):
    model = zhang_resnet(torchvision.models.resnet.BasicBlock)
    forward = torchvision.models.resnet.BasicBlock.forward
    monkeypatch.setattr(torchvision.models.resnet.BasicBlock, "forward", lambda self, x: 2 * forward(self, x))
    rows = {row.name: row for row in aliasfused.accelerate(model)}
    assert rows["layer2.0.conv2.0"].absorbed == () and "differs by" in rows["layer2.0.conv2.0"].reason
    assert type(model.layer2[0]) is torchvision.models.resnet.BasicBlock and type(model.layer2[0].bn1) is nn.BatchNorm2d


# --- afterwards ------------------------------------------------------------------------------------------------------

AFTER = {
    "timm": lambda: chain(timm.layers.BatchNormAct2d(4), nn.MaxPool2d(3, 1, 1), timm.layers.BlurPool2d(4)),
    "average": lambda: chain(nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)),
    "convolution": lambda: chain(nn.BatchNorm2d(4), nn.ReLU(), aliasfused.compat.composer.BlurConv2d(4, 5, 3, 2, 1)),
    "block": lambda: zhang_resnet(torchvision.models.resnet.Bottleneck).layer2,
}


def accelerated(name: str) -> tuple[nn.Module, torch.Tensor]:
    model, x = settled(AFTER[name]()), image()
    assert absorbed(aliasfused.accelerate(model))
    return model, x if name != "block" else torch.randn(2, 256, 5, 6, dtype=torch.float64)


@pytest.mark.parametrize("name", AFTER)
def test_copies_and_pickles(name):
    model, x = accelerated(name)
    text = pickle.dumps(model)
    for copied in (copy.deepcopy(model), pickle.loads(text)):
        assert_same(model, copied, x)
        blur = next(module for module in copied.modules() if isinstance(module, Fused))
        assert all(part.owner in set(copied.modules()) for part in blur._step.parts)
        assert [*map(type, copied.modules())] == [*map(type, model.modules())]


def test_a_pickle_in_another_process(tmp_path):
    model, x = accelerated("timm")
    torch.save((model, x, model.eval()(x)), tmp_path / "model.pt")
    code = (
        "import torch\n"
        "library = torch.library.Library('torchvision', 'DEF')\n"
        "for name in ('nms', 'qnms'): library.define(name + '(Tensor a, Tensor b, float c) -> Tensor')\n"
        f"model, x, y = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert torch.equal(model(x), y) and 'Absorbed' in str(model)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", AFTER)
def test_it_compiles_whole(name, training):
    model, x = accelerated(name)
    expected = outcome(model, x, training)
    rounded = outcome(copy.deepcopy(model).float(), x.float(), training)
    compiled = copy.deepcopy(model).train(training)
    y = torch.compile(compiled, fullgraph=True, backend="aot_eager")(x)
    y.square().mean().backward()
    grads = {f"gradient of {k}": p.grad for k, p in compiled.named_parameters()}
    found = {"y": y.detach(), **grads, **dict(compiled.named_buffers())}
    for what, value in found.items():
        assert_agree(value, expected[what], float((rounded[what].double() - expected[what]).abs().max()))


def test_it_exports():
    model, x = accelerated("timm")
    expected = model.eval()(x)
    program = torch.export.export(model, (x,))
    assert sum(node.target is torch.ops.aliasfused.max_blur_pool_fwd.default for node in program.graph.nodes) == 1
    assert_agree(program.module()(x), expected, bound(model[0](x).detach().float(), 9))


@pytest.mark.parametrize("name", AFTER)
@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm])
def test_convert_sync_batchnorm(name, convert):
    """Without other processes a SyncBatchNorm is a batch norm; the fused step then leaves it to itself."""
    old, x = settled(AFTER[name]()), accelerated(name)[1]
    new = copy.deepcopy(old)
    aliasfused.accelerate(new)
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in new.modules())
    old, new = convert(old), convert(new)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in new.modules()) == norms
    assert_same(old, new, x)


def test_a_batch_norm_that_is_folded_away():
    model, x = accelerated("average")
    expected = model.eval()(x)
    model[0] = nn.utils.fuse_conv_bn_eval(model[0].eval(), model[1])
    model[1] = nn.Identity()
    assert_agree(model(x), expected, bound(model[0](x).detach().float(), 36))


def test_what_is_replaced_amid_a_chain_is_an_error():
    model, x = accelerated("average")
    model[2] = nn.SiLU()
    with pytest.raises(RuntimeError, match="'2' was replaced after accelerate"):
        model(x)


def test_a_batch_norm_is_frozen_by_its_own_mode():
    model, x = accelerated("average")
    old = settled(AFTER["average"]())
    old.load_state_dict(model.state_dict())
    for network in (old, model):
        network.train()
        network[1].eval()
    assert_agree(model(x), old(x), bound(model[0](x).detach().float(), 36))
    assert all(torch.equal(a, b) for a, b in zip(model[1].buffers(), old[1].buffers()))


def test_an_optimizer_goes_on():
    model, x = settled(AFTER["timm"]()), image()
    old = copy.deepcopy(model)
    losses = []
    for network in (old, model):
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        if network is model:
            aliasfused.accelerate(network)
        for _ in range(3):
            optimizer.zero_grad()
            loss = network(x).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach().float())
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=64 * torch.finfo(torch.float32).eps)


def test_weights_load_both_ways():
    model, x = accelerated("block")
    other = settled(AFTER["block"]())
    model.load_state_dict(other.state_dict())
    assert_same(other, model, x)
    other.load_state_dict(model.state_dict())


def test_data_parallel_is_told():
    model, _ = accelerated("average")
    with pytest.raises(RuntimeError, match="use DistributedDataParallel, or accelerate"):
        model[3]._replicate_for_data_parallel()
    unnormalised = chain(nn.ReLU(), nn.AvgPool2d(2))
    aliasfused.accelerate(unnormalised)
    assert "_is_replica" in vars(unnormalised[2]._replicate_for_data_parallel())


def test_nothing_but_the_model_is_touched():
    model = chain(nn.BatchNorm2d(4), nn.Dropout(0.0), nn.ReLU(), BlurPool2d())
    random, grad = torch.get_rng_state(), torch.is_grad_enabled()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        assert absorbed(aliasfused.accelerate(model))
    assert torch.equal(torch.get_rng_state(), random) and torch.is_grad_enabled() is grad
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_on_the_meta_device():
    with torch.device("meta"):
        model = chain(nn.BatchNorm2d(4), nn.ReLU(), timm.layers.BlurPool2d(4))
        report = aliasfused.accelerate(model)
    assert [row.absorbed for row in report] == [("1", "2")]
    assert model(torch.empty(2, 3, 11, 12, device="meta")).shape == (2, 4, 5, 5)
