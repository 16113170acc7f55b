"""The doors of other libraries: equal to them as installed, checkpoints and all."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from agreement import assert_agree, bound, convolved, pascal
from aliasfused.compat import antialiased_cnns, kornia, timm

peer_timm = pytest.importorskip("timm", reason="timm is the peer to be equal to")
peer_kornia = pytest.importorskip("kornia", reason="kornia is the peer to be equal to")
try:
    import antialiased_cnns as peer_adobe
except ImportError:
    peer_adobe = None
needs_adobe = pytest.mark.skipif(peer_adobe is None, reason="antialiased-cnns is not installed: its licence is its own")

# Every stride, both parities of both axes, odd and even filters; maps just larger than the pad of the peers.
STRIDES = [1, 2, 3, 4]
SIZES = [(8, 9), (9, 8), (13, 7)]


@pytest.mark.parametrize("pad_mode", ["reflect", "replicate", "constant", "circular"])
@pytest.mark.parametrize("filt_size", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("channels", [None, 3])
def test_timm_equals_timm(filt_size, pad_mode, channels):
    for stride in STRIDES:
        arguments = {"channels": channels, "filt_size": filt_size, "stride": stride, "pad_mode": pad_mode}
        ours, theirs = timm.BlurPool2d(**arguments), peer_timm.layers.BlurPool2d(**arguments)
        assert not ours.state_dict() and not theirs.state_dict()
        assert torch.equal(ours.filt, theirs.filt)
        for size in SIZES:
            x = torch.randn(2, 3, *size)
            assert_agree(ours(x), theirs(x), bound(x, filt_size**2))


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5, 6, 7])
def test_kornia_equals_kornia(kernel_size):
    for stride in [*STRIDES, (1, 2)]:
        ours, theirs = kornia.BlurPool2D(kernel_size, stride), peer_kornia.filters.BlurPool2D(kernel_size, stride)
        assert not ours.state_dict() and not theirs.state_dict()
        assert torch.equal(ours.kernel, theirs.kernel)
        for size in [*SIZES, (1, 2)]:
            x = torch.randn(2, 3, *size)
            expected, limit = theirs(x), bound(x, kernel_size**2)
            assert_agree(ours(x), expected, limit)
            assert_agree(kornia.blur_pool2d(x, kernel_size, stride), expected, limit)


@pytest.mark.parametrize("kernel_size", [1, 3, 4])
@pytest.mark.parametrize("max_pool_size", [1, 2, 3])
def test_kornia_maximum_equals_kornia(kernel_size, max_pool_size):
    for stride in [*STRIDES, (1, 2)]:
        arguments = (kernel_size, stride, max_pool_size)
        ours, theirs = kornia.MaxBlurPool2D(*arguments), peer_kornia.filters.MaxBlurPool2D(*arguments)
        assert not ours.state_dict() and not theirs.state_dict()
        assert torch.equal(ours.kernel, theirs.kernel)
        for size in SIZES:
            if min(size) < max_pool_size:
                continue
            x = torch.randn(2, 3, *size)
            expected, limit = theirs(x), bound(x, kernel_size**2)
            assert_agree(ours(x), expected, limit)
            assert_agree(kornia.max_blur_pool2d(x, *arguments), expected, limit)


def test_kornia_takes_an_oblong_kernel_which_kornia_refuses():
    x = torch.randn(1, 2, 7, 8)
    expected = convolved(x, pascal(2), pascal(3), 2, (1, 1, 0, 1), "zeros")
    assert_agree(kornia.BlurPool2D((2, 3))(x), expected, bound(x, 6))


@needs_adobe
@pytest.mark.parametrize("pad_type", ["refl", "reflect", "repl", "replicate", "zero"])
@pytest.mark.parametrize("filt_size", [1, 2, 3, 4, 5, 6, 7])
def test_antialiased_cnns_equals_antialiased_cnns(filt_size, pad_type):
    for stride in STRIDES:
        for pad_off in (0, 1):
            arguments = {"filt_size": filt_size, "stride": stride, "pad_type": pad_type, "pad_off": pad_off}
            ours, theirs = antialiased_cnns.BlurPool(3, **arguments), peer_adobe.BlurPool(3, **arguments)
            assert ours.load_state_dict(theirs.state_dict()) and theirs.load_state_dict(ours.state_dict())
            for name in ("filt_size", "pad_off", "pad_sizes", "stride", "off", "channels"):
                assert getattr(ours, name) == getattr(theirs, name)
            for size in SIZES:
                x = torch.randn(2, 3, *size)
                assert_agree(ours(x), theirs(x), bound(x, filt_size**2))
            ours, theirs = antialiased_cnns.BlurPool1D(3, **arguments), peer_adobe.BlurPool1D(3, **arguments)
            assert ours.load_state_dict(theirs.state_dict()) and theirs.load_state_dict(ours.state_dict())
            for length in (8, 13):
                x = torch.randn(2, 3, length)
                assert_agree(ours(x), theirs(x), bound(x, filt_size))


@needs_adobe
def test_constructors_agree_on_position_and_default():
    x = torch.randn(1, 2, 9, 9)
    for ours, theirs, value in (
        (antialiased_cnns.BlurPool, peer_adobe.BlurPool, x),
        (antialiased_cnns.BlurPool1D, peer_adobe.BlurPool1D, x[..., 0]),
    ):
        assert_agree(ours(2)(value), theirs(2)(value), bound(x, 16))
        assert_agree(ours(2, "zero", 5, 3, 1)(value), theirs(2, "zero", 5, 3, 1)(value), bound(x, 25))


def test_one_tap_is_a_view_of_every_stride_th_pixel():
    x = torch.randn(2, 3, 7, 8)
    y = antialiased_cnns.BlurPool(3, filt_size=1)(x)
    assert y.data_ptr() == x.data_ptr() and torch.equal(y, x[:, :, ::2, ::2])


# --- the buffer ------------------------------------------------------------------------------------------------------

SEPARABLE = torch.outer(torch.tensor([0.5, 1.0, -0.25]), torch.tensor([0.75, 0.5, 0.125]))


def filters(kernel: torch.Tensor, channels: int = 2) -> torch.Tensor:
    return kernel.expand(channels, 1, *kernel.shape).clone()


def check(module: nn.Module, kernel: torch.Tensor) -> None:
    """The module correlates with this kernel, to the rounding of the kernel's own dtype (as factor() allows it)."""
    x = torch.randn(2, 2, 8, 9)
    padded = nn.functional.pad(x.double(), (1, 1, 1, 1), "reflect")
    expected = nn.functional.conv2d(padded, filters(kernel.double()), stride=2, groups=2).float()
    gain, eps = float(kernel.abs().sum()), torch.finfo(kernel.dtype).eps
    split = kernel.numel() * 4 * eps * float(kernel.abs().max()) * float(x.abs().max())
    assert_agree(module(x), expected, bound(x, kernel.numel(), gain) + split)


def write(module: nn.Module, value: torch.Tensor) -> None:
    with torch.no_grad():
        module.filt.copy_(value)


WAYS = {
    "load": lambda module, value: module.load_state_dict({"filt": value}),
    "load with assign": lambda module, value: module.load_state_dict({"filt": value}, assign=True),
    "assign": lambda module, value: setattr(module, "filt", value),
    "write and refresh": lambda module, value: (write(module, value), module.refresh_taps()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_another_filter_is_honoured(way, dtype):
    if way == "write and refresh" and dtype is not torch.float32:
        module = antialiased_cnns.BlurPool(2, filt_size=3).to(dtype)  # in place the buffer keeps its dtype
    else:
        module = antialiased_cnns.BlurPool(2, filt_size=3)
    WAYS[way](module, filters(SEPARABLE.to(dtype)))
    check(module, SEPARABLE.to(dtype))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.double(), module.half()):
        check(twin, SEPARABLE.to(dtype))  # casting casts the buffer, and keeps the taps as they were read


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (filters(torch.eye(3)), "rank"),
        (torch.cat([filters(SEPARABLE, 1), filters(2 * SEPARABLE, 1)]), "channels differ"),
        (filters(torch.full((3, 3), torch.nan)), "finite"),
    ],
)
def test_a_filter_that_cannot_be_used_is_an_error_naming_its_key(way, value, message):
    module = nn.Sequential(nn.Identity(), antialiased_cnns.BlurPool(2, filt_size=3))
    before = module[1].filt.clone()
    with pytest.raises((ValueError, RuntimeError), match=message) as error:
        if way.startswith("load"):
            module.load_state_dict({"1.filt": value}, assign="assign" in way)
        else:
            WAYS[way](module[1], value)
    assert ("1.filt" if way.startswith("load") else "filt") in str(error.value)
    check(module[1], torch.outer(*[torch.tensor(pascal(3))] * 2))
    if not way.startswith("write"):  # what was written in place stays written
        assert torch.equal(module[1].filt, before)


def test_a_call_never_reads_the_buffer():
    module = antialiased_cnns.BlurPool(2, filt_size=3)
    write(module, torch.full((), torch.nan))
    check(module, torch.outer(*[torch.tensor(pascal(3))] * 2))


def test_a_replica_does_not_read_its_copy():
    """DataParallel makes replicas and assigns their buffers in every call."""
    replica = antialiased_cnns.BlurPool(2, filt_size=3)._replicate_for_data_parallel()
    replica.filt = torch.full((2, 1, 3, 3), torch.nan)
    check(replica, torch.outer(*[torch.tensor(pascal(3))] * 2))


def test_one_axis_honours_any_filter():
    row = torch.tensor([1.0, -2.0, 0.5, 0.25])
    module = antialiased_cnns.BlurPool1D(3, "zero", filt_size=4, stride=3)
    module.load_state_dict({"filt": row.expand(3, 1, 4)})
    x = torch.randn(2, 3, 10)
    expected = nn.functional.conv1d(nn.functional.pad(x, (1, 2)), row.expand(3, 1, 4), stride=3, groups=3)
    assert_agree(module(x), expected, bound(x, 4, float(row.abs().sum())))


def test_a_wrong_shape_is_torchs_own_error():
    module = antialiased_cnns.BlurPool(2, filt_size=3)
    with pytest.raises(RuntimeError, match="size mismatch for filt"):
        module.load_state_dict(antialiased_cnns.BlurPool(2, filt_size=5).state_dict())
    check(module, torch.outer(*[torch.tensor(pascal(3))] * 2))


def test_changed_geometry_is_seen():
    """Surgery that turns strides into dilation writes to attributes; the peers read them in every call."""
    x = torch.randn(1, 2, 8, 9)
    ours, theirs = timm.BlurPool2d(2), peer_timm.layers.BlurPool2d(2)
    for module in (ours, theirs):
        module.stride, module.pad_mode, module.padding = 1, "replicate", [2, 0, 1, 1]
    assert_agree(ours(x), theirs(x), bound(x, 9))


def test_made_on_the_meta_device_and_loaded():
    with torch.device("meta"):
        modules = [antialiased_cnns.BlurPool(2, filt_size=3), timm.BlurPool2d(2), kornia.BlurPool2D(3)]
    for module in modules:
        assert all(buffer.is_meta for buffer in module.buffers())
        assert module(torch.empty(1, 2, 8, 8, device="meta")).shape == (1, 2, 4, 4)
    modules[0].load_state_dict({"filt": filters(SEPARABLE)}, assign=True)
    check(modules[0], SEPARABLE)
    modules[1].to_empty(device="cpu").init_non_persistent_buffers()
    assert torch.equal(modules[1].filt, peer_timm.layers.BlurPool2d(2).filt)
    check(modules[1], torch.outer(*[torch.tensor(pascal(3))] * 2))


def test_a_checkpoint_file_loads_strictly():
    network = nn.Sequential(nn.Conv2d(3, 2, 3), antialiased_cnns.BlurPool(2, filt_size=3))
    network[1].filt = filters(SEPARABLE)
    file = io.BytesIO()
    torch.save({"state_dict": network.state_dict()}, file)
    file.seek(0)
    fresh = nn.Sequential(nn.Conv2d(3, 2, 3), antialiased_cnns.BlurPool(2, filt_size=3))
    fresh.load_state_dict(torch.load(file, weights_only=True)["state_dict"], strict=True)
    check(fresh[1], SEPARABLE)


# --- networks --------------------------------------------------------------------------------------------------------


def float32_rounding(network: nn.Module, x: torch.Tensor) -> float:
    """What float32 does to this network's output: an exchange seen in float64 must stay below it."""
    with torch.no_grad():
        return float((network.float()(x.float()).double() - network.double()(x.double())).abs().max())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet18", {}),  # stem by class, blocks by create_aa
        ("resnet26d", {"replace_stem_pool": True}),  # a deep stem, bottlenecks, blur before normalisation
        (
            "densenet121",
            {"growth_rate": 4, "block_config": (1, 1, 1, 1), "aa_stem_only": False},
        ),  # channels by position
    ],
)
def test_a_class_for_timm_models(name, arguments):
    arguments = {**arguments, "num_classes": 5}
    ours = peer_timm.create_model(name, aa_layer=timm.BlurPool2d, **arguments).eval()
    theirs = peer_timm.create_model(name, aa_layer=peer_timm.layers.BlurPool2d, **arguments).eval()
    assert any(isinstance(module, timm.BlurPool2d) for module in ours.modules())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 3, 65, 64)
    limit = float32_rounding(theirs, x)
    with torch.no_grad():
        assert_agree(ours.double()(x.double()), theirs(x.double()), limit)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: antialiased_cnns.BlurPool(0), "channels must be an int >= 1, got 0"),
        (lambda: antialiased_cnns.BlurPool(2, "same"), "pad_type must be one of 'refl', .*, got 'same'"),
        (lambda: antialiased_cnns.BlurPool(2, filt_size=0), "filt_size must be an int >= 1, got 0"),
        (lambda: antialiased_cnns.BlurPool(2, stride=(2, 2)), "stride must be an int >= 1, got"),
        (lambda: antialiased_cnns.BlurPool1D(2, pad_off=-1), "pad_off must be an int >= 0, got -1"),
        (lambda: timm.BlurPool2d(2, pad_mode="zeros"), "pad_mode must be one of 'reflect', .* got 'zeros'"),
        (lambda: timm.BlurPool2d(2, filt_size=3.0), "filt_size must be an int >= 1, got 3.0"),
        (lambda: kornia.BlurPool2D((3, 3, 3)), "kernel_size must be an int or a pair"),
        (lambda: kornia.blur_pool2d(torch.ones(1, 1, 4, 4), 0), "kernel_size must be an int >= 1, got 0"),
    ],
)
def test_a_wrong_argument_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_channels_are_checked():
    with pytest.raises(ValueError, match="2 channels"):
        antialiased_cnns.BlurPool(2)(torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("kind", "shape"), [(antialiased_cnns.BlurPool, (3, 1, 4, 4)), (antialiased_cnns.BlurPool1D, (3, 1, 3))]
)
def test_a_filter_of_other_channels_is_refused_and_a_registered_one_is_read(kind, shape):
    """What the original's convolution would refuse in its first call; and the other way in which a buffer is replaced."""
    blur, x = kind(3), torch.ones(1, 3, *[8] * (len(shape) - 2))
    before = blur(x)
    with pytest.raises(ValueError, match=r"filt: expected a filter like \(3, .*got shape \(2, "):
        blur.filt = torch.ones(2, *shape[1:])
    assert torch.equal(blur(x), before)
    blur.register_buffer("filt", torch.zeros(shape))
    assert not blur(x).any()
