"""accelerate: what it exchanges, what it leaves, and that nothing else about a model changes."""

from __future__ import annotations

import copy
import pickle
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import aliasfused
from agreement import assert_agree, bound, pascal
from bench import models

timm = pytest.importorskip("timm", reason="timm is a library whose models are accelerated")
kornia = pytest.importorskip("kornia", reason="kornia is a library whose modules are accelerated")
try:
    import antialiased_cnns
except ImportError:
    antialiased_cnns = None
needs_adobe = pytest.mark.skipif(
    antialiased_cnns is None, reason="antialiased-cnns is not installed: its licence is its own"
)


def float32_rounding(network: nn.Module, x: torch.Tensor) -> float:
    """What float32 does to this network's output: an exchange seen in float64 must stay below it."""
    with torch.no_grad():
        return float((network.float()(x.float()).double() - network.double()(x.double())).abs().max())


def actions(report: aliasfused.surgery.Report) -> list[str]:
    return [row.action for row in report]


# --- whole networks --------------------------------------------------------------------------------------------------

NETWORKS = {
    "timm resnet": (lambda: timm.create_model("resnetblur18", num_classes=5), 4),
    "timm efficientnet": (lambda: timm.create_model("efficientnet_blur_b0", num_classes=5), 4),
    "antialiased resnet": (lambda: antialiased_cnns.resnet18(num_classes=5), 7),
    "antialiased vgg": (lambda: antialiased_cnns.vgg11().features, 5),
    "kornia": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), kornia.filters.BlurPool2D(4), kornia.filters.BlurPool2D(3, (1, 2))),
        2,
    ),
}
ADOBE = [name for name in NETWORKS if name.startswith("antialiased")]
PARAMETERS = [pytest.param(name, marks=needs_adobe if name in ADOBE else ()) for name in NETWORKS]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_network_gives_the_same_numbers(name):
    make, blurs = NETWORKS[name]
    network = make().eval()
    x = torch.randn(1, 3, 65, 64, dtype=torch.float64)
    limit = float32_rounding(network, x)
    with torch.no_grad():
        expected = network(x)
    keys = list(network.state_dict())
    report = aliasfused.accelerate(network)
    assert actions(report) == ["fused"] * blurs
    assert list(network.state_dict()) == keys
    with torch.no_grad():
        assert_agree(network(x), expected, limit)


def test_gradients_of_a_network_stay():
    network = timm.create_model("resnetblur18", num_classes=5).double().eval()
    x = torch.randn(1, 3, 33, 32, dtype=torch.float64)

    def gradients():
        network.zero_grad()
        network(x).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    expected = gradients()
    network.float()
    network.zero_grad()
    network(x.float()).square().sum().backward()
    limit = float((torch.cat([p.grad.flatten() for p in network.parameters()]).double() - expected).abs().max())
    network.double()
    aliasfused.accelerate(network)
    assert_agree(gradients(), expected, limit)


# --- everything about the instance stays -----------------------------------------------------------------------------


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), timm.layers.BlurPool2d(4), nn.ReLU())


def test_the_instance_is_the_same_and_keeps_its_hooks():
    network = block()
    blur, calls = network[1], []
    blur.register_forward_hook(lambda module, args, y: calls.append(tuple(y.shape)))
    blur.note = "kept"
    filt = blur.filt
    aliasfused.accelerate(network)
    assert network[1] is blur and blur.filt is filt and blur.note == "kept" and blur.training
    network(torch.randn(1, 3, 10, 10))
    assert calls == [(1, 4, 4, 4)]
    assert isinstance(blur, aliasfused.compat.timm.BlurPool2d)


def test_the_root_itself():
    blur = kornia.filters.BlurPool2D(3)
    report = aliasfused.accelerate(blur)
    assert isinstance(blur, aliasfused.compat.kornia.BlurPool2D)
    assert report[0][:3] == ("", "kornia.filters.blur_pool.BlurPool2D", "fused")
    assert "(root)" in str(report)


def test_a_shared_module_stays_shared():
    blur = timm.layers.BlurPool2d(4)
    network = nn.ModuleDict({"a": nn.Sequential(blur), "b": blur})
    assert len(aliasfused.accelerate(network)) == 1
    assert network["a"][0] is network["b"] is blur
    assert isinstance(blur, aliasfused.compat.timm.BlurPool2d)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtype_stays(dtype):
    blur = timm.layers.BlurPool2d(2, 3).to(dtype)
    aliasfused.accelerate(blur)
    x = torch.randn(1, 2, 7, 8).to(dtype)
    expected = F.conv2d(F.pad(x, (1,) * 4, "reflect").double(), blur.filt.double(), stride=2, groups=2).to(dtype)
    assert blur.filt.dtype is dtype
    assert_agree(blur(x), expected, bound(x, 9))


def test_copies_and_pickles_of_an_accelerated_network():
    network = block()
    aliasfused.accelerate(network)
    x = torch.randn(1, 3, 10, 11)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert isinstance(twin[1], aliasfused.compat.timm.BlurPool2d) and twin[1] is not network[1]
        assert torch.equal(twin(x), network(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_accelerated_network_compiles_whole(dynamic):
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), timm.layers.BlurPool2d(4), kornia.filters.BlurPool2D(4, 1), timm.layers.BlurPool2d(4, 5, 3)
    )
    x = torch.randn(2, 3, 21, 24, dtype=torch.float64)
    limit = float32_rounding(network, x)
    expected = network(x)
    aliasfused.accelerate(network)
    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_agree(compiled(x), expected, limit)


def test_an_accelerated_network_exports():
    network = block().eval()
    x = torch.randn(1, 3, 10, 11)
    expected = network(x)
    aliasfused.accelerate(network)
    program = torch.export.export(network, (x,))
    assert sum(node.target is torch.ops.aliasfused.blur_pool_fwd.default for node in program.graph.nodes) == 1
    assert_agree(program.module()(x), expected, bound(F.conv2d(x, network[0].weight), 9))


def test_a_second_call_changes_nothing():
    network = block()
    aliasfused.accelerate(network)
    before = dict(vars(network[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = aliasfused.accelerate(network)
    assert [row[2:] for row in report] == [("fused", "already fused", ())]
    assert vars(network[1]) == before


def test_on_the_meta_device():
    with torch.device("meta"):
        network = timm.create_model("resnetblur18", num_classes=5)
    assert actions(aliasfused.accelerate(network)) == ["fused"] * 4
    assert network(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 5)


# --- filters that are not binomials ----------------------------------------------------------------------------------


@needs_adobe
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_changed_filter_is_honoured(dtype):
    blur = antialiased_cnns.BlurPool(2, filt_size=3).to(dtype)
    row = torch.tensor([0.6, -0.3, 0.1])
    blur.filt.copy_(torch.outer(row, row.flip(0)))
    x = torch.randn(1, 2, 9, 9)
    expected = blur.float()(x)
    blur.to(dtype)
    assert actions(aliasfused.accelerate(blur)) == ["fused"]
    split = 9 * 4 * torch.finfo(dtype).eps * float(blur.filt.abs().max()) * float(x.abs().max())
    assert_agree(blur(x), expected, bound(x, 9) + split)


@needs_adobe
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.eye(3).expand(2, 1, 3, 3), "rank"),
        (torch.arange(2.0)[:, None, None, None] * torch.ones(2, 1, 3, 3), "channels differ"),
    ],
)
def test_a_filter_without_rows_is_left(value, reason):
    blur = antialiased_cnns.BlurPool(2, filt_size=3)
    blur.filt.copy_(value)
    (row,) = aliasfused.accelerate(blur)
    assert row.action == "left" and reason in row.reason
    assert type(blur) is antialiased_cnns.BlurPool and "_window" not in vars(blur)


# --- what is left ----------------------------------------------------------------------------------------------------


def vendored(name: str, forward) -> type[nn.Module]:
    """A class with kornia's attributes, of a module that is not kornia."""

    class Blur(nn.Module):
        def __init__(self, kernel_size: int, stride: int = 2) -> None:
            super().__init__()
            self.kernel_size, self.stride = kernel_size, stride
            self.kernel = torch.outer(*[torch.tensor(pascal(kernel_size))] * 2)  # an attribute, as kornia had it

    Blur.forward = forward
    Blur.__module__, Blur.__qualname__ = "vendored", name
    setattr(sys.modules.setdefault("vendored", types.ModuleType("vendored")), name, Blur)
    return Blur


def symmetric(self, x):
    """kornia before 0.9: floor((k-1)/2) on both sides, a pixel short for even k."""
    pad = (self.kernel_size - 1) // 2
    kernel = self.kernel.to(x).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(x, kernel, padding=pad, stride=self.stride, groups=x.shape[1])


def brighter(self, x):
    return symmetric(self, x) * (1 + 1e-6)


def test_an_older_kornia_is_tried_size_by_size():
    cls = vendored("Symmetric", symmetric)
    network = nn.Sequential(*map(cls, (2, 3, 4, 5)))
    report = aliasfused.accelerate(network, also={"vendored.Symmetric": "kornia"})
    assert actions(report) == ["left", "fused", "left", "fused"]
    assert all("the fused form" in row.reason for row in report if row.action == "left")
    assert type(network[0]) is cls
    x = torch.randn(1, 2, 9, 9)
    old = cls(3)
    assert_agree(network[1](x), old(x), bound(x, 9))


def test_a_difference_above_rounding_is_left():
    network = vendored("Brighter", brighter)(3)
    (row,) = aliasfused.accelerate(network, also={"vendored.Brighter": "kornia"})
    assert row.action == "left" and "differs by" in row.reason and "rounding allows" in row.reason


# --- composer and ffcv, which are not installed: classes of their attributes and arithmetic ---------------------------


def smoothed(x, kernel, stride=1):
    return F.conv2d(x, kernel.expand(x.shape[1], -1, -1, -1), stride=stride, padding=1, groups=x.shape[1])


class BlurMaxPool2d(nn.Module):
    def __init__(self, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, kernel_size if stride is None else stride
        self.padding, self.dilation, self.ceil_mode = padding, dilation, ceil_mode
        self.register_buffer("filt2d", torch.outer(*[torch.tensor(pascal(3))] * 2)[None, None])

    def forward(self, x):
        y = F.max_pool2d(x, self.kernel_size, 1, self.padding, self.dilation, self.ceil_mode)
        return smoothed(y, self.filt2d, self.stride)


class BlurPoolConv2d(nn.Module):
    def __init__(self, conv: nn.Conv2d, channels: int) -> None:
        super().__init__()
        self.conv = conv
        self.register_buffer("blur_filter", torch.outer(*[torch.tensor(pascal(3))] * 2).repeat(channels, 1, 1, 1))

    def forward(self, x):
        return self.conv.forward(smoothed(x, self.blur_filter))


class BlurConv2d(BlurPoolConv2d):
    def __init__(self, conv: nn.Conv2d, blur_first: bool) -> None:
        super().__init__(conv, conv.in_channels if blur_first else conv.out_channels)
        self.blur_first, self.blur_stride = blur_first, 1 if blur_first else conv.stride
        if not blur_first:
            conv.stride = (1, 1)

    def forward(self, x):
        if self.blur_first:
            return super().forward(x)
        return smoothed(self.conv.forward(x), self.blur_filter, self.blur_stride)


def composers() -> nn.Sequential:
    return nn.Sequential(
        BlurConv2d(nn.Conv2d(3, 6, 3, 2, 1), blur_first=True),
        BlurConv2d(nn.Conv2d(6, 4, 3, 2, 1, groups=2), blur_first=False),
        BlurMaxPool2d(3, 2, 1),
        BlurMaxPool2d((3, 2), (2, 1), 0, 2),
        BlurPoolConv2d(nn.Conv2d(4, 5, 1, 2, bias=False), 4),
    )


@pytest.mark.parametrize("by", ["name", "also"])
def test_composer_and_ffcv(monkeypatch, by):
    also = dict.fromkeys(
        [f"{__name__}.{cls.__name__}" for cls in (BlurMaxPool2d, BlurConv2d, BlurPoolConv2d)], "composer"
    )
    if by == "name":
        for cls in (BlurMaxPool2d, BlurConv2d):
            monkeypatch.setattr(cls, "__module__", "composer.algorithms.blurpool.blurpool_layers")
            del also[f"{__name__}.{cls.__name__}"]
    network, x = composers(), torch.randn(2, 3, 65, 64, dtype=torch.float64)
    limit, weights = float32_rounding(network, x), [*network.parameters()]
    original, expected, keys = copy.deepcopy(network), network(x), list(network.state_dict())
    report = aliasfused.accelerate(network, also=also)
    assert actions(report) == ["fused"] * 5
    theirs = aliasfused.compat.composer
    assert [*map(type, network)] == [*[theirs.BlurConv2d] * 2, *[theirs.BlurMaxPool2d] * 2, theirs.BlurPoolConv2d]
    assert list(network.state_dict()) == keys and all(
        a is b for a, b in zip(network.parameters(), weights, strict=True)
    )
    assert_agree(network(x), expected, limit)
    doubled = {key: 2 * value for key, value in network.state_dict().items()}
    for each in (original, network):
        each.load_state_dict(doubled)
    limit = float32_rounding(original, x)
    assert_agree(network(x), original(x), limit)


def test_a_convolution_with_another_blur_is_left(monkeypatch):
    monkeypatch.setattr(
        BlurPoolConv2d, "forward", lambda self, x: self.conv(smoothed(x, self.blur_filter) * (1 + 1e-5))
    )
    module = BlurPoolConv2d(nn.Conv2d(3, 4, 3, 2, 1), 3)
    (row,) = aliasfused.accelerate(module, also={f"{__name__}.BlurPoolConv2d": "composer"})
    assert row.action == "left" and "the output of the fused form differs by" in row.reason
    assert type(module) is BlurPoolConv2d


def replaced_forward():
    blur = timm.layers.BlurPool2d(2)
    blur.forward = lambda x: x
    return blur


def inner_hook():
    blur = vendored("Hooked", symmetric)(3)
    blur.inner = nn.Identity()
    blur.inner.register_forward_hook(lambda *_: None)
    return blur


def refused():
    blur = timm.layers.BlurPool2d(2)
    blur.pad_mode = "mirror"
    return blur


class Subclass(timm.layers.BlurPool2d):
    def forward(self, x):
        return -super().forward(x)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (replaced_forward, "forward was replaced"),
        (inner_hook, "has hooks"),
        (refused, "pad_mode must be one of"),
        (lambda: Subclass(2), "a subclass of timm.layers.blur_pool.BlurPool2d"),
        (
            lambda: nn.utils.parametrize.register_parametrization(timm.layers.BlurPool2d(2), "filt", nn.Identity()),
            "a subclass",
        ),
    ],
)
def test_left_with_a_reason(make, reason):
    blur = make()
    cls = type(blur)
    (row,) = aliasfused.accelerate(blur, also={"vendored.Hooked": "kornia"})
    assert row.action == "left" and reason in row.reason
    assert type(blur) is cls
    assert reason in str(aliasfused.accelerate(blur, also={"vendored.Hooked": "kornia"}))


def test_a_maximum_goes_with_its_blur():
    pool, x = kornia.filters.MaxBlurPool2D(3, max_pool_size=3), torch.randn(2, 3, 9, 10)
    expected = pool(x)
    (row,) = aliasfused.accelerate(pool)
    assert (row.action, type(pool)) == ("fused", aliasfused.compat.kornia.MaxBlurPool2D)
    assert_agree(pool(x), expected, bound(x, 9))


def test_other_pools_are_no_blurs():
    network = nn.Sequential(nn.AvgPool2d(2), nn.MaxPool2d(3), kornia.filters.EdgeAwareBlurPool2D(3))
    with pytest.warns(UserWarning, match="found no BlurPool"):
        assert len(aliasfused.accelerate(network)) == 0


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        aliasfused.accelerate([])
    with pytest.raises(
        ValueError,
        match=r"also\['a.B'\] must be one of 'antialiased_cnns', 'timm', 'kornia', 'composer', 'adaptive', got 'torch'",
    ):
        aliasfused.accelerate(nn.Identity(), also={"a.B": "torch"})


def test_accelerating_draws_no_random_number():
    network = block()
    state = torch.get_rng_state()
    aliasfused.accelerate(network)
    assert torch.equal(torch.get_rng_state(), state)


# --- predicted filters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2])
def test_released_layers_with_predicted_filters(group):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), models.Released(4, group=group)).double()
    before, x = copy.deepcopy(model), torch.randn(2, 3, 11, 12, dtype=torch.float64)
    (row,) = aliasfused.accelerate(model, also=models.ALSO)
    assert (row.action, row.reason) == ("fused", "")
    assert type(model[1]) is aliasfused.compat.adaptive.Downsample_PASA_group_softmax
    for training in (True, False):
        for m in (model, before):
            m.train(training)
        torch.testing.assert_close(model(x), before(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dict(model.state_dict()), dict(before.state_dict()), rtol=1e-12, atol=1e-12)
    assert [row.reason for row in aliasfused.accelerate(model)] == ["already fused"]


def test_predicted_filters_otherwise_used_are_left():
    class Other(models.Released):
        def forward(self, x):
            return 2 * super().forward(x)

    model = torch.nn.Sequential(Other(4, group=2))
    name = f"{Other.__module__}.{Other.__qualname__}"
    (row,) = aliasfused.accelerate(model, also={name: "adaptive"})
    assert row.action == "left" and "of the fused form differs" in row.reason and type(model[0]) is Other
