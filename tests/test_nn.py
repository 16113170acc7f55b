"""The modules of aliasfused.nn: their window, their parameters and what they refuse."""

from __future__ import annotations

import pytest
import torch

from agreement import assert_agree, bound, convolved, pascal, same
from aliasfused import nn

MODES = ["reflect", "replicate", "zeros", "circular"]


@pytest.mark.parametrize("pad_mode", MODES)
@pytest.mark.parametrize(
    ("filt_size", "stride", "shape"),
    [
        (4, 2, (2, 3, 9, 8)),  # the default, odd by even
        (1, 2, (1, 2, 5, 4)),  # plain subsampling
        (5, 3, (2, 2, 7, 11)),  # odd filter, stride above two
        (7, (1, 2), (1, 1, 3, 13)),  # a stride an axis, a pad larger than the map
        (3, 2, (3, 6, 5)),  # no batch
    ],
)
def test_fixed_taps_are_a_convolution(filt_size, stride, shape, pad_mode):
    x = torch.randn(shape)
    y = nn.BlurPool2d(None, filt_size, stride, pad_mode)(x)
    batch = x if x.dim() == 4 else x[None]
    row = pascal(filt_size)
    expected = convolved(batch.double(), row, row, stride, same(filt_size, filt_size), pad_mode).float()
    assert_agree(y, expected if x.dim() == 4 else expected[0], bound(x, filt_size**2))


@pytest.mark.parametrize("pad_mode", MODES)
@pytest.mark.parametrize("shape", [(2, 3, 11), (3, 8), (1, 2, 1)])
def test_one_axis_is_a_convolution(shape, pad_mode):
    x = torch.randn(shape)
    y = nn.BlurPool1d(filt_size=4, pad_mode=pad_mode)(x)
    row = x.reshape(-1, shape[-2], 1, shape[-1]).double()
    expected = convolved(row, [1.0], pascal(4), (1, 2), same(1, 4), pad_mode).float().reshape(y.shape)
    assert_agree(y, expected, bound(x, 4))


@pytest.mark.parametrize(
    ("taps", "h", "w"),
    [
        ([0.25, 0.75], [0.25, 0.75], [0.25, 0.75]),  # one row for both axes
        ((1, 5), pascal(1), pascal(5)),  # 1 x 5 binomial
        (
            (3, [0.5, -0.25, 1.0, 2.0]),
            pascal(3),
            [0.5, -0.25, 1.0, 2.0],
        ),  # a row that neither is symmetric nor sums to one
        (torch.tensor([0.5, 0.25, 0.125]), [0.5, 0.25, 0.125], [0.5, 0.25, 0.125]),  # a tensor becomes numbers
    ],
)
def test_taps_replace_filt_size(taps, h, w):
    x = torch.randn(1, 2, 9, 10)
    module = nn.BlurPool2d(filt_size=7, taps=taps, padding=(1, 0, 2, 1), pad_mode="replicate")
    gain = sum(map(abs, h)) * sum(map(abs, w))
    expected = convolved(x.double(), h, w, 2, (1, 0, 2, 1), "replicate").float()
    assert_agree(module(x), expected, bound(x, len(h) * len(w), gain))
    assert not module.state_dict()


def test_fixed_taps_leave_nothing_in_the_module():
    for module in (nn.BlurPool2d(8), nn.BlurPool1d(8)):
        assert not module.state_dict()
        assert not list(module.parameters())
        assert not list(module.buffers())


@pytest.mark.parametrize("learnable", [True, "normalised"])
@pytest.mark.parametrize("channels", [None, 3])
def test_learned_taps_start_as_the_filter_and_get_its_gradient(learnable, channels):
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    module = nn.BlurPool2d(channels, 4, learnable=learnable, dtype=torch.float64)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == dict.fromkeys(
        ("taps_h", "taps_w"), (4,) if channels is None else (3, 4)
    )
    rows = [p.detach().clone().requires_grad_() for p in module.parameters()]
    used = [row.softmax(-1) if learnable == "normalised" else row for row in rows]
    assert_agree(used[0].detach(), torch.tensor(pascal(4), dtype=torch.float64).expand_as(rows[0]), bound(x, 4))
    expected = convolved(x, *used, 2, same(4, 4), "reflect")
    weight = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * weight).sum(), rows)
    y = module(x)
    assert_agree(y, expected, bound(x, 16))
    (y * weight).sum().backward()
    for p, g in zip(module.parameters(), expected_grads, strict=True):
        # a tap's gradient adds up one product per output pixel and tap of the other axis, twice that for the softmax
        assert_agree(p.grad, g, bound(x, 2 * 4 * weight.numel(), float(weight.abs().sum())))


def test_a_step_leaves_normalised_taps_positive_and_of_gain_one():
    module = nn.BlurPool2d(2, 5, learnable="normalised", dtype=torch.bfloat16)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
    module(torch.randn(1, 2, 9, 9)).square().sum().backward()
    optimiser.step()
    h, w = module.window()[:2]
    assert h.dtype is torch.float32  # short parameters do not shorten the taps
    assert bool((torch.stack([h, w]) > 0).all())
    assert_agree(h.sum(-1), torch.ones(2), bound(torch.ones(1), 5))
    constant = torch.ones(1, 2, 6, 6)
    assert_agree(module(constant), torch.ones(1, 2, 3, 3), bound(constant, 25))


def test_one_axis_learns_one_row():
    module = nn.BlurPool1d(3, learnable=True)
    assert [name for name, _ in module.named_parameters()] == ["taps_w"]
    module(torch.randn(2, 3, 9)).sum().backward()
    assert module.taps_w.grad.shape == (3, 3)


def test_made_on_the_meta_device():
    module = nn.BlurPool2d(2, 3, learnable=True, device="meta")
    assert module(torch.empty(1, 2, 7, 7, device="meta")).shape == (1, 2, 4, 4)
    module.to_empty(device="cpu")
    module.reset_parameters()
    assert module.taps_h.tolist() == [pascal(3)] * 2
    assert nn.BlurPool2d(2, device="meta")(torch.ones(1, 2, 4, 4)).shape == (1, 2, 2, 2)  # numbers are on no device


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels must be None or an int >= 1, got 0"),
        ({"filt_size": 0}, "filt_size must be an int >= 1, got 0"),
        ({"filt_size": [0.5, 0.5]}, "filt_size must be an int >= 1"),
        ({"stride": 0}, "stride must be"),
        ({"pad_mode": "constant"}, "pad_mode must be one of 'reflect'"),
        ({"padding": -1}, "padding must be"),
        ({"learnable": "yes"}, "learnable must be False, True or 'normalised', got 'yes'"),
        ({"taps": [0.5, 0.0], "learnable": "normalised"}, "taps must be positive"),
        ({"taps": torch.ones(2, 3)}, r"one row, of shape \(k,\), got \(2, 3\)"),
    ],
)
@pytest.mark.parametrize("cls", [nn.BlurPool2d, nn.BlurPool1d])
def test_a_wrong_argument_is_named(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


@pytest.mark.parametrize(("module", "shape"), [(nn.BlurPool2d(3), (1, 4, 8, 8)), (nn.BlurPool1d(3), (4, 8))])
def test_channels_are_checked(module, shape):
    with pytest.raises(ValueError, match="3 channels"):
        module(torch.randn(shape))


def test_repr_tells_the_window():
    text = repr(nn.BlurPool2d(3, 4, (1, 2), learnable=True))
    assert "channels=3, taps=4x4, stride=(1, 2), padding=(1, 2, 1, 2), pad_mode='reflect', learnable=True" in text
