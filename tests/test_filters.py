"""Filters: the closed-form table of their spectra, other people's designs of the same, and the way back from a kernel."""

from __future__ import annotations

import cmath
import math

import pytest
import scipy.integrate
import scipy.signal
import torch

from aliasfused import filters

# Filter: H at pi/4, pi/2, 3pi/4, pi; sigma; sum of squares; alias at stride 2, in two dimensions, at stride 4; passband.
# To the places that are printed; the aliases were summed over a grid of frequencies, which leaves them 1.2e-5 off at most.
TABLE = {
    "binomial 1": (filters.binomial(1), "1 1 1 1", "0", "1", "0.50000 0.75000 0.75000", "1.0000"),
    "binomial 2": (filters.binomial(2), "0.9239 0.7071 0.3827 0", "0.5000", "0.50000", "0.18169 0.33036 0.52491", "0.8183"),
    "binomial 3": (filters.binomial(3), "0.8536 0.5000 0.1464 0", "0.7071", "0.37500", "0.07558 0.14546 0.39684", "0.6933"),
    "binomial 4": (filters.binomial(4), "0.7886 0.3536 0.0560 0", "0.8660", "0.31250", "0.03314 0.06519 0.30938", "0.6043"),
    "binomial 5": (filters.binomial(5), "0.7286 0.2500 0.0214 0", "1.0000", "0.27344", "0.01496 0.02969 0.24539", "0.5387"),
    "binomial 6": (filters.binomial(6), "0.6731 0.1768 0.0082 0", "1.1180", "0.24609", "0.00687 0.01370 0.19685", "0.4888"),
    "binomial 7": (filters.binomial(7), "0.6219 0.1250 0.0031 0", "1.2247", "0.22559", "0.00320 0.00638 0.15918", "0.4497"),
    "gaussian 1/3, 2": (
        filters.gaussian(1 / 3, 2), "0.9239 0.7071 0.3827 0", "0.5000", "0.50000", "0.18169 0.33036 0.52491", "0.8183",
    ),
    "gaussian 1/3, 3": (
        filters.gaussian(1 / 3, 3), "0.9936 0.9783 0.9629 0.9565", "0.1474", "0.95724", "0.48586 0.73566 0.73996", "0.9843",
    ),
    "gaussian 1/2, 3": (
        filters.gaussian(0.5, 3), "0.9376 0.7870 0.6364 0.5740", "0.4615", "0.64203", "0.33377 0.55614 0.62683", "0.8555",
    ),
    "gaussian 1, 5": (
        filters.gaussian(1, 5), "0.7480 0.2936 0.0573 0.0232", "0.9614", "0.28731", "0.02497 0.04932 0.27162", "0.5603",
    ),
    "gaussian 1, 7": (
        filters.gaussian(1, 7), "0.7351 0.2910 0.0630 0.0141", "0.9980", "0.28228", "0.02640 0.05211 0.26678", "0.5496",
    ),
    "kaiser 12, wide": (
        filters.kaiser(12, 0.5, 0.4142), "1.0014 0.4973 -0.0052 0", "0.4021", "0.44113", "0.02844 0.05608 0.43531", "0.8572",
    ),
    "kaiser 12, narrow": (
        filters.kaiser(12, 0.4, 0.2), "1.0615 0.0546 0.0553 0", None, "0.39674", "0.00245 0.00489 0.31151", "0.7915",
    ),
    "PIL bilinear": (
        (0.125, 0.375, 0.375, 0.125), "0.7886 0.3536 0.0560 0", "0.8660", "0.31250", "0.03314 0.06519 0.30938", "0.6043",
    ),
}  # fmt: skip


def agrees(value: float, printed: str, units: float = 0.5) -> bool:
    """Within half of the last place that is printed (and a hair, for a five that was rounded up)."""
    places = len(printed.partition(".")[2]) or 9
    return abs(value - float(printed)) <= 1.0000001 * units * 10.0**-places


@pytest.mark.parametrize("name", TABLE)
def test_table(name):
    taps, response, sigma, squares, aliases, passband = TABLE[name]
    w = torch.tensor([math.pi / 4, math.pi / 2, 3 * math.pi / 4, math.pi])
    h = filters.frequency_response(taps, w.double())
    assert h.dtype is torch.complex128 and float(h.imag.abs().max()) < 1e-6
    assert all(map(agrees, h.real.tolist(), [p if p != "0" else "0.000000" for p in response.split()])), h.real.tolist()
    if sigma is not None:
        centre = (len(taps) - 1) / 2
        variance = sum(t * (p - centre) ** 2 for p, t in enumerate(taps))
        assert agrees(math.sqrt(variance), sigma)
    assert agrees(sum(t * t for t in taps), squares)
    one, two, four = aliases.split()
    assert agrees(filters.alias_fraction(taps, 2), one, 1.2)
    assert agrees(filters.alias_fraction((taps, taps), 2), two, 1.2)
    assert agrees(filters.alias_fraction((taps, taps), (2, 2)), two, 1.2)
    assert agrees(filters.alias_fraction(taps, 4), four, 1.2)
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) * (math.pi / 2 / 4000)
    assert agrees(float(filters.frequency_response(taps, grid).abs().square().mean()), passband)


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("name", TABLE)
def test_alias_fraction_is_the_integral_of_the_spectrum(name, stride):
    """Beyond the places of the table: |H|^2 integrated above the new Nyquist frequency, by quadrature."""
    taps = TABLE[name][0]

    def power(w):
        return abs(sum(t * cmath.exp(-1j * w * p) for p, t in enumerate(taps))) ** 2

    above, whole = (scipy.integrate.quad(power, a, math.pi, epsabs=1e-13)[0] for a in (math.pi / stride, 0))
    assert filters.alias_fraction(taps, stride) == pytest.approx(above / whole, abs=1e-11)


def test_alias_fraction_of_two_axes_each_with_its_stride():
    """What both keep: one axis of plain subsampling at stride 4 keeps a quarter, a stride of 1 keeps all."""
    assert filters.alias_fraction(((1.0,), (0.25, 0.5, 0.25)), (4, 1)) == pytest.approx(0.75, abs=1e-15)
    assert filters.alias_fraction((0.5, 0.5), 1) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("k", range(1, 41))
def test_binomial_is_pascals_row_and_sums_to_one_exactly(k):
    taps, row = filters.binomial(k), [1]
    for _ in range(k - 1):
        row = [a + b for a, b in zip([0, *row], [*row, 0], strict=True)]
    assert taps == tuple(v / 2 ** (k - 1) for v in row)
    assert sum(taps) == 1.0


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_rect(k):
    assert filters.rect(k) == (1 / k,) * k


@pytest.mark.parametrize(
    "arguments",
    [(12, 0.5, 0.4142), (12, 0.4, 0.2), (7, 0.25, 0.1), (31, 0.5, 0.3), (6, 0.9, 1.0), (9, 0.3, 0.6), (1, 0.5, 0.5)],
    ids=str,
)
def test_kaiser_is_scipys(arguments):
    """Of even and odd length, with windows of each of Kaiser's three ranges of attenuation."""
    numtaps, cutoff, width = arguments
    expected = scipy.signal.firwin(numtaps, cutoff, width=width, fs=2)
    torch.testing.assert_close(
        torch.tensor(filters.kaiser(*arguments)), torch.tensor(expected.tolist()), rtol=1e-10, atol=1e-13
    )


def test_kaiser_covers_its_three_ranges():
    """Of the windows above: one with no attenuation to speak of, one between, one above 50 dB."""
    ranges = [scipy.signal.kaiser_atten(n, w) for n, w in ((7, 0.1), (12, 0.4142), (31, 0.3))]
    assert ranges[0] <= 21 < ranges[1] <= 50 < ranges[2]


@pytest.mark.parametrize(("sigma", "k"), [(1 / 3, 2), (0.5, 3), (1.0, 5), (2.5, 8), (1e-3, 5), (1e-200, 4), (1e6, 3)])
def test_gaussian_is_its_definition(sigma, k):
    """Also where the exponential alone would vanish (the nearest taps remain) or overflow."""
    taps = filters.gaussian(sigma, k)
    assert math.fsum(taps) == pytest.approx(1, abs=1e-15)
    assert taps == taps[::-1]
    centre = (k - 1) / 2
    if sigma < 1e-2:
        nearest = [p for p in range(k) if abs(p - centre) < 1]
        assert taps == tuple(1 / len(nearest) if p in nearest else 0.0 for p in range(k))
    else:
        values = [math.exp(-((p - centre) ** 2) / (2 * sigma**2)) for p in range(k)]
        assert taps == pytest.approx([v / sum(values) for v in values], rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("h", "w"),
    [
        (filters.binomial(4), filters.binomial(3)),
        (filters.binomial(7), filters.binomial(7)),
        (filters.gaussian(1, 5), filters.gaussian(0.7, 3)),
        (filters.kaiser(12, 0.5, 0.4142), (1.0,)),
        ((1.0, -2.0, 1.0), (0.5, 0.5)),
        ((-1.0, -2.0), (3.0, 5.0)),
        ((1.0, 0.0, -1.0), (1.0, 0.0, -1.0)),
    ],
    ids=["binomials", "squares", "gaussians", "one row", "one sum is zero", "a negative sum", "both sums are zero"],
)
def test_factor_finds_the_rows_of_an_outer_product(h, w, dtype):
    kernel = torch.outer(torch.tensor(h, dtype=torch.float64), torch.tensor(w, dtype=torch.float64)).to(dtype)
    rows = filters.factor(kernel)
    assert [len(r) for r in rows] == [len(h), len(w)]
    assert all(isinstance(t, float) for r in rows for t in r)
    product = torch.outer(*(torch.tensor(r, dtype=torch.float64) for r in rows))
    assert float((product - kernel.double()).abs().max()) <= 4 * torch.finfo(dtype).eps * float(kernel.abs().max())
    if float(kernel.double().sum()) > 1e-3:  # the gain is shared
        assert math.fsum(rows[0]) == pytest.approx(math.fsum(rows[1]), rel=1e-9)


def test_factor_of_a_nested_sequence_and_of_a_scalar_kernel():
    h, w = filters.factor([[1 / 16, 2 / 16, 1 / 16], [2 / 16, 4 / 16, 2 / 16], [1 / 16, 2 / 16, 1 / 16]])
    assert h == pytest.approx((0.25, 0.5, 0.25), abs=1e-15) and w == pytest.approx((0.25, 0.5, 0.25), abs=1e-15)
    assert filters.factor([[9.0]]) == ((3.0,), (3.0,))


def test_factor_of_nothing_but_zeros():
    h, w = filters.factor(torch.zeros(2, 3))
    assert not torch.outer(torch.tensor(h), torch.tensor(w)).any() and (len(h), len(w)) == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_factor_refuses_what_is_off_by_a_little_more_than_rounding(dtype):
    """One entry moved by 16 eps of the largest is no longer an outer product in that dtype."""
    kernel = torch.outer(torch.tensor(filters.binomial(3)), torch.tensor(filters.binomial(3))).to(dtype)
    kernel[0, 0] += 16 * torch.finfo(dtype).eps * kernel.max()
    with pytest.raises(ValueError, match=r"kernel2d is not separable .*residual .* exceeds"):
        filters.factor(kernel)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: filters.binomial(0), r"k must be an int >= 1, got 0"),
        (lambda: filters.binomial(3.0), r"k must be an int >= 1, got 3\.0"),
        (lambda: filters.binomial(True), r"k must be .*got True"),
        (lambda: filters.rect(-1), r"k must be .*got -1"),
        (lambda: filters.gaussian(0, 3), r"sigma must be a positive finite number, got 0"),
        (lambda: filters.gaussian(math.nan, 3), r"sigma must be .*got nan"),
        (lambda: filters.gaussian(math.inf, 3), r"sigma must be .*got inf"),
        (lambda: filters.gaussian("1", 3), r"sigma must be .*got '1'"),
        (lambda: filters.gaussian(1.0, 0), r"numtaps must be .*got 0"),
        (lambda: filters.kaiser(0, 0.5, 0.5), r"numtaps must be .*got 0"),
        (lambda: filters.kaiser(3, 1.0, 0.5), r"cutoff must be below 1 .*got 1\.0"),
        (lambda: filters.kaiser(3, -0.1, 0.5), r"cutoff must be .*got -0\.1"),
        (lambda: filters.kaiser(3, 0.5, 0.0), r"width must be .*got 0\.0"),
        (lambda: filters.factor(torch.ones(3)), r"kernel2d must be .*\(kh, kw\).*got shape \(3,\)"),
        (lambda: filters.factor(torch.ones(0, 3)), r"kernel2d must be a non-empty .*\(0, 3\)"),
        (lambda: filters.factor(torch.tensor([[1.0, math.nan]])), r"kernel2d must be finite"),
        (lambda: filters.factor([[1.0, math.inf]]), r"kernel2d must be finite"),
        (lambda: filters.factor(torch.eye(2)), r"kernel2d is not separable"),
        (lambda: filters.alias_fraction((0.5, 0.5), 0), r"stride must be an int >= 1, got 0"),
        (lambda: filters.alias_fraction((0.0, 0.0)), r"taps must not all be zero"),
        (lambda: filters.alias_fraction(()), r"taps must be a non-empty sequence of finite numbers, got \(\)"),
        (lambda: filters.alias_fraction((float("nan"), 1.0)), r"taps must be a non-empty sequence of finite numbers"),
        (lambda: filters.alias_fraction(((1.0,), (1.0,)), (2, 2, 2)), r"stride must be an int >= 1 or a pair"),
        (lambda: filters.frequency_response((), 0.0), r"taps must be a non-empty sequence of finite numbers, got \(\)"),
        (lambda: filters.kaiser(2000, 0.5, 1.9), r"width 1.9 with 2000 taps"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_frequency_response_keeps_the_shape_and_the_phase():
    """Of a delay by one pixel from the centre: exp(-i w) for the last of three taps."""
    w = torch.linspace(-3, 3, 6, dtype=torch.float64).view(2, 3)
    h = filters.frequency_response((0.0, 0.0, 1.0), w)
    assert h.shape == (2, 3)
    torch.testing.assert_close(h, torch.exp(-1j * w), rtol=0, atol=1e-15)
    assert filters.frequency_response((0.5, 0.5), 0.0).item() == 1


def test_a_pair_responds_with_the_product_of_its_rows():
    rows, w = ((0.25, 0.5, 0.25), (0.5, 0.5)), torch.tensor([0.0, 0.7, 2.9])
    both = filters.frequency_response(rows, w)
    # The definition, tap by tap: a sum over the outer product with the phase measured from the middle.
    for i, j in ((0, 0), (1, 2), (2, 1)):
        terms = [
            rows[0][p] * rows[1][q] * complex(torch.exp(-1j * (w[i] * (p - 1.0) + w[j] * (q - 0.5))))
            for p in range(3)
            for q in range(2)
        ]
        assert abs(complex(both[i, j]) - sum(terms)) < 1e-6  # w is float32
