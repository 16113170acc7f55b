"""composer's and ffcv's modules against what their sources say, of torch's own operations: neither is installed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import aliasfused
from agreement import assert_agree, bound
from aliasfused.compat import composer

pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit:DeprecationWarning")
FILTER = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).div(16).view(1, 1, 3, 3)


def blurred(x, stride=1, kernel=FILTER):
    half = kernel.shape[-2] // 2, kernel.shape[-1] // 2
    return F.conv2d(
        x, kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1), stride=stride, padding=half, groups=x.shape[1]
    )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("stride", [1, 2, 3, (1, 2)])
def test_blur_2d(stride):
    for size in ((7, 8), (1, 5), (6, 6)):
        x = torch.randn(2, 3, *size)
        assert_agree(composer.blur_2d(x, stride=stride), blurred(x, stride), bound(x, 9))
        assert_agree(composer.blur_2d(x, 3, stride, FILTER), blurred(x, stride), bound(x, 9))


def test_blur_2d_by_another_filter():
    kernel = torch.outer(torch.tensor([1.0, 3, 5, 2, 1]), torch.tensor([0.5, 1, -0.25])).view(1, 1, 5, 3)
    x = torch.randn(1, 2, 9, 8)
    assert_agree(composer.blur_2d(x, 2, 2, kernel), blurred(x, 2, kernel), bound(x, 15, float(kernel.abs().sum())))


@pytest.mark.parametrize(
    "arguments",
    [(2,), (3, 2), (3, 2, 1), ((2, 3), (2, 1), (1, 0)), (3, 2, 1, 2), (2, 2, 0, (1, 2)), (3, 2, 1, 1, True)],
)
def test_max_pool(arguments):
    module = composer.BlurMaxPool2d(*arguments)
    kernel, stride, padding, dilation = (*arguments, *(arguments[0], 0, 1)[len(arguments) - 1 :])[:4]
    assert list(module.state_dict()) == ["filt2d"] and torch.equal(module.filt2d, FILTER)
    for size in ((9, 10), (8, 7)):
        x = torch.randn(2, 3, *size)
        expected = blurred(F.max_pool2d(x, kernel, 1, padding, dilation), stride)
        assert_agree(module(x), expected, bound(x, 9))
        with torch.no_grad():
            assert_agree(torch.jit.script(module)(x), expected, bound(x, 9))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups"),
    [(3, 2, 1, 1), (1, 2, 0, 1), (1, (2, 3), 0, 3), (5, 2, 2, 3), (1, 2, 1, 1), (1, 1, 0, 1)],
)
def test_convolutions(kernel, stride, padding, groups):
    x = torch.randn(2, 3, 9, 10)
    for blur_first in (True, False):
        module = composer.BlurConv2d(3, 6, kernel, stride, padding, groups=groups, blur_first=blur_first)
        assert sorted(module.state_dict()) == ["blur_filter", "conv.bias", "conv.weight"]
        assert module.blur_filter.shape == (3 if blur_first else 6, 1, 3, 3)
        weight, bias = module.conv.weight, module.conv.bias
        if blur_first:
            expected = F.conv2d(blurred(x), weight, bias, stride, padding, groups=groups)
        else:
            expected = blurred(F.conv2d(x, weight, bias, 1, padding, groups=groups), stride)
        assert_agree(module(x), expected, bound(x, 9 + 75, 3.0))
        with torch.no_grad():
            assert_agree(torch.jit.script(module)(x), expected, bound(x, 9 + 75, 3.0))
    conv = nn.Conv2d(3, 6, kernel, stride, padding, groups=groups)
    module = composer.BlurPoolConv2d(conv)
    assert module.conv is conv
    assert sorted(module.state_dict()) == ["blur_filter", "conv.bias", "conv.weight"]
    assert_agree(module(x), conv(blurred(x)), bound(x, 9 + 75, 3.0))


def test_a_filter_that_is_loaded_counts():
    rows = torch.tensor([0.5, 0.25, 0.125]), torch.tensor([1.0, -1.0, 0.5])
    kernel = torch.outer(*rows).view(1, 1, 3, 3)
    pool, conv = composer.BlurMaxPool2d(2), composer.BlurConv2d(3, 3, 1, 2)
    pool.load_state_dict({"filt2d": kernel})
    conv.load_state_dict({**conv.state_dict(), "blur_filter": kernel.repeat(3, 1, 1, 1)})
    x = torch.randn(1, 3, 8, 9)
    assert_agree(pool(x), blurred(F.max_pool2d(x, 2, 1), 2, kernel), bound(x, 9, 3.0))
    assert_agree(conv(x), conv.conv(blurred(x, 1, kernel)), bound(x, 12, 6.0))


def test_one_pixel_is_blurred_at_the_stride_unless_somebody_listens():
    conv, x, seen = composer.BlurConv2d(3, 4, 1, 2), torch.randn(1, 3, 8, 8), []
    y = conv(x)
    conv.conv.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    assert_agree(conv(x), y, bound(x, 12, 3.0))
    assert seen == [(1, 3, 8, 8)]


def test_gradients_reach_weights_and_input():
    x = torch.randn(1, 3, 9, 8, requires_grad=True)
    module = composer.BlurConv2d(3, 2, 1, 2, bias=False)
    grads = torch.autograd.grad(module(x).square().sum(), (x, module.conv.weight))
    expected = torch.autograd.grad(module.conv(blurred(x)).square().sum(), (x, module.conv.weight))
    for g, e in zip(grads, expected, strict=True):
        assert_agree(g, e, 1e3 * torch.finfo(torch.float32).eps * float(e.abs().max()))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: composer.blur_2d(torch.ones(1, 2, 4, 4), 3), ValueError, "input must have 3 channels"),
        (
            lambda: composer.blur_2d(torch.ones(1, 2, 4, 4), filter=torch.ones(1, 1, 4, 4)),
            ValueError,
            "odd sides, got .4, 4.",
        ),
        (lambda: composer.BlurMaxPool2d(0), ValueError, "kernel_size must be an int >= 1"),
        (lambda: composer.BlurMaxPool2d(2, padding=2), ValueError, "max_padding must be"),
        (lambda: composer.BlurConv2d(1, 1, 3), ValueError, "stride must be given where the blur comes first"),
        (lambda: composer.BlurPoolConv2d(nn.Linear(2, 2)), TypeError, "conv must be a torch.nn.Conv2d, got Linear"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_module_is_a_door():
    assert aliasfused.compat.composer is composer
