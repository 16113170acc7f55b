"""What aliasfused.metrics measures, where it is known in closed form, and what it draws."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

import aliasfused
from agreement import assert_agree, bound, pascal
from aliasfused import metrics
from aliasfused.compat import adaptive
from aliasfused.nn import AdaptiveBlurPool2d

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is what draws the figures"
)


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)


# --- the filters and their variance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_average_has_no_variance_and_one_pixel_has_most(kernel_size, dtype):
    taps = kernel_size**2
    average = torch.full((2, 3, taps, 4, 5), 1 / taps, dtype=dtype)
    identity = torch.zeros_like(average)
    identity[:, :, taps // 2] = 1
    assert_agree(metrics.filter_variance(average), torch.zeros(2, 3, 4, 5, dtype=dtype), bound(average, taps))
    expected = torch.full((2, 3, 4, 5), 1 / taps, dtype=dtype)
    assert_agree(metrics.filter_variance(identity), expected, bound(identity, taps))


@pytest.mark.parametrize(("init", "row"), [("box", [1 / 3] * 3), ("binomial", pascal(3))])
@pytest.mark.parametrize(
    "arguments", [{}, {"vary": "image"}, {"predict": "strided"}, {"stride": (1, 3)}, {"normalize": "none"}]
)
@pytest.mark.parametrize("training", [True, False])
def test_a_module_that_begins_as_a_filter_predicts_it_everywhere(init, row, arguments, training):
    x = torch.randn(2, 4, 7, 6)
    module = AdaptiveBlurPool2d(4, groups=2, init=init, **arguments).train(training)
    w = metrics.predicted_weights(module, x)
    taps = torch.outer(*[torch.tensor(row)] * 2).flatten()
    grid = (7, 2) if "stride" in arguments else (4, 3)
    assert_agree(w, taps[:, None, None].expand(2, 2, 9, *grid).contiguous(), bound(w, 20))
    expected = taps.double().var().float().expand(2, 2, *grid)
    assert_agree(metrics.filter_variance(module, x), expected, bound(w, 20))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "module",
    [
        AdaptiveBlurPool2d(4, groups=2),
        AdaptiveBlurPool2d(4, groups=2, normalize="joint"),
        AdaptiveBlurPool2d(4, groups=2, normalize="none", vary="image"),
        adaptive.Downsample_PASA_group_softmax(4, 3, 2),
        adaptive.Downsample_PASA(4, 3, 2),
    ],
)
def test_the_predicted_weights_are_those_the_module_blurs_by(module, training):
    """They make the result again, tap by tap."""
    x = torch.randn(2, 4, 7, 6)
    module.train(training)
    w = metrics.predicted_weights(module, x)
    patches = torch.nn.functional.unfold(torch.nn.functional.pad(x, (1, 1, 1, 1), "reflect"), 3).unflatten(2, (7, 6))
    expected = patches.view(2, w.shape[1], -1, 9, 7, 6)[..., ::2, ::2] * w[:, :, None]
    assert_agree(module(x), expected.sum(3).flatten(1, 2), bound(x, 40, float(w.detach().abs().sum(2).max())))


def test_weights_and_variance_are_differentiable_and_at_least_float32():
    x = torch.randn(1, 8, 6, 6).bfloat16()
    module = AdaptiveBlurPool2d(8).bfloat16()
    variance = metrics.filter_variance(module, x)
    assert variance.dtype is torch.float32 and variance.shape == (1, 8, 3, 3)
    variance.sum().backward()
    assert module.conv.weight.grad.any()


# --- the similarity of groups ----------------------------------------------------------------------------------------


def test_identical_channels_are_alike_and_others_are_not():
    wave = torch.arange(16.0).view(1, 1, 4, 4) * torch.pi / 8
    features = torch.cat([wave.sin(), 3 * wave.sin(), wave.cos(), -wave.cos()], 1)
    within, between, matrix = metrics.group_similarity(features, 2)
    limit = bound(features, 3 * 16)
    expected = torch.eye(4)
    expected[0, 1] = expected[1, 0] = 1.0
    expected[2, 3] = expected[3, 2] = -1.0
    assert_agree(matrix, expected, limit)
    assert_agree(within, torch.tensor(0.0), limit)  # one pair alike, one opposite
    assert_agree(between, torch.tensor(0.0), limit)
    assert_agree(metrics.group_similarity(wave.sin().expand(3, 4, 4, 4), 2).within, torch.tensor(1.0), limit)
    assert_agree(metrics.group_similarity(wave.sin().expand(3, 4, 4, 4), 4).between, torch.tensor(1.0), limit)


def test_images_are_averaged_and_a_dead_channel_is_like_nothing():
    x = torch.rand(1, 3, 4, 4)
    x[:, 2] = 0
    features = torch.cat([x, torch.stack([x[:, 0], -x[:, 0], x[:, 2]], 1)])
    matrix = metrics.group_similarity(features, 1).matrix
    cosine = torch.nn.functional.cosine_similarity(x[0, 0].flatten(), x[0, 1].flatten(), dim=0)
    assert_agree(matrix[0, 1], (cosine - 1) / 2, bound(x, 3 * 16))
    assert not matrix[2].any()


def test_pairs_that_do_not_exist_have_no_mean():
    features = torch.rand(2, 4, 3, 3)
    assert (
        metrics.group_similarity(features, 4).within.isnan() and metrics.group_similarity(features, 1).between.isnan()
    )


# --- figures ---------------------------------------------------------------------------------------------------------


@needs_matplotlib
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("picture", [None, torch.rand(3, 9, 14), torch.rand(1, 9, 14)])
def test_a_map_for_every_group_beside_the_picture(groups, picture, tmp_path):
    variance = torch.rand(groups, 5, 7) / 9
    figure = metrics.plot_filter_variance(variance.clone().requires_grad_(), picture)
    figure.savefig(tmp_path / "figure.png")
    shown = [axis.images[0] for axis in figure.axes if axis.images]
    assert len(shown) == groups + (picture is not None)
    assert all(image.get_clim() == (0.0, float(variance.max())) for image in shown[picture is not None :])
    assert {tuple(image.get_extent()) for image in shown[picture is not None :]} == {
        (0, 7, 5, 0) if picture is None else (0, 14, 9, 0)
    }


@needs_matplotlib
def test_a_matrix_with_its_means(tmp_path):
    features = torch.rand(2, 6, 4, 4).bfloat16()
    figure = metrics.plot_group_similarity(features, 3)
    figure.savefig(tmp_path / "figure.png")
    within, between, matrix = metrics.group_similarity(features, 3)
    assert figure.axes[0].get_title() == f"within groups {within:.2f}, between {between:.2f}"
    assert torch.equal(torch.as_tensor(figure.axes[0].images[0].get_array()), matrix)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert metrics.group_similarity(torch.rand(1, 2, 3, 3), 1).matrix.shape == (2, 2)
    with pytest.raises(ImportError, match=r"pip install 'aliasfused\[metrics\]'"):
        metrics.plot_filter_variance(torch.rand(1, 2, 2))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: metrics.predicted_weights(torch.nn.Identity(), torch.rand(1, 8, 4, 4)), TypeError, "got Identity"),
        (
            lambda: metrics.predicted_weights(AdaptiveBlurPool2d(8), torch.rand(8, 4, 4)),
            ValueError,
            "x must have shape",
        ),
        (lambda: metrics.filter_variance(AdaptiveBlurPool2d(8)), TypeError, "x must be given with a module"),
        (
            lambda: metrics.filter_variance(torch.rand(1, 1, 9, 2, 2), torch.rand(1, 8, 4, 4)),
            TypeError,
            "x must be given",
        ),
        (
            lambda: metrics.filter_variance(torch.rand(9, 2, 2)),
            ValueError,
            r"shape \(N, G, k\^2, H, W\), got \(9, 2, 2\)",
        ),
        (lambda: metrics.filter_variance(torch.ones(1, 1, 1, 2, 2)), ValueError, "two taps or more"),
        (lambda: metrics.filter_variance(torch.ones(1, 1, 9, 2, 2).int()), TypeError, "got torch.int32"),
        (lambda: metrics.group_similarity([1.0], 1), TypeError, "features must be a floating torch.Tensor, got list"),
        (
            lambda: metrics.group_similarity(torch.rand(4, 2, 2), 2),
            ValueError,
            r"features must have shape \(N, C, H, W\)",
        ),
        (lambda: metrics.group_similarity(torch.rand(1, 4, 2, 2), 3), ValueError, "groups must divide the 4 channels"),
        (lambda: metrics.group_similarity(torch.rand(1, 4, 2, 2), 0), ValueError, "groups must be an int >= 1, got 0"),
        (
            lambda: metrics.plot_filter_variance(torch.rand(1, 1, 2, 2)),
            ValueError,
            r"variance must have shape \(G, H, W\)",
        ),
        (
            lambda: metrics.plot_filter_variance(torch.rand(1, 2, 2), torch.rand(2, 4, 4)),
            ValueError,
            r"picture must have shape \(1 or 3, H, W\), got \(2, 4, 4\)",
        ),
    ],
)
def test_a_wrong_argument_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_it_is_a_part_of_the_package():
    assert aliasfused.metrics is metrics
