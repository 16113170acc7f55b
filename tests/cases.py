"""What the contract is tested with: one row a geometry, each for a reason, and the layouts an input may come in."""

from __future__ import annotations

import dataclasses
import itertools

import torch

BORDERS = ("reflect", "replicate", "zeros", "circular")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True)
class Case:
    reason: str
    size: tuple[int, int]
    taps: tuple[int, int] = (4, 4)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int, int, int] | None = None  # left, right, top, bottom; None: the usual one
    pad_mode: str = "reflect"
    batch: int = 2
    channels: int = 3

    @property
    def sides(self) -> tuple[int, int, int, int]:
        kh, kw = self.taps
        return self.padding or ((kw - 1) // 2, kw // 2, (kh - 1) // 2, kh // 2)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.channels, *self.size)

    @property
    def out(self) -> tuple[int, int]:
        left, right, top, bottom = self.sides
        padded = (self.size[0] + top + bottom, self.size[1] + left + right)
        return tuple((n - k) // s + 1 for n, k, s in zip(padded, self.taps, self.stride, strict=True))

    def __str__(self) -> str:
        text = "{}x{}x{}x{}-k{}x{}-s{}x{}-{}".format(*self.shape, *self.taps, *self.stride, self.pad_mode)
        return text + ("-p{}.{}.{}.{}".format(*self.padding) if self.padding else "")


# Sizes of maps in real networks and their odd neighbours, in low pictures so that all stay small.
_SIZES = ((7, 13), (4, 14), (9, 27), (6, 28), (5, 55), (8, 56), (3, 111), (6, 112), (5, 223))

CASES = (
    *(
        Case(
            f"the usual filter of {k} taps, which has code of its own", _SIZES[i % len(_SIZES)], (k, k), pad_mode=border
        )
        for i, (k, border) in enumerate(itertools.product(range(2, 8), BORDERS))
    ),
    *(
        Case(
            "a real map's height: rows of blocks in full, ends of their own", (27, 28), (k, k), pad_mode=border, batch=1
        )
        for k, border in ((3, "circular"), (4, "zeros"), (5, "replicate"), (7, "reflect"))
    ),
    Case("one tap is plain subsampling", (7, 13), (1, 1)),
    Case("one tap at stride 1 is a copy", (5, 9), (1, 1), (1, 1)),
    Case("one tap and a pad: outputs that show the border alone", (4, 5), (1, 1), (1, 1), (2, 3, 1, 2), "circular"),
    Case("longer than the unrolled filters", (13, 17), (8, 8)),
    Case("longer than the unrolled filters, wrapped", (11, 14), (8, 8), pad_mode="circular"),
    Case("a Kaiser filter's length", (17, 23), (12, 12), pad_mode="replicate"),
    Case("a Kaiser filter's length, no border to hide in", (17, 23), (12, 12), padding=(0, 0, 0, 0)),
    Case("a filter longer than the map, mirrored several times", (5, 4), (12, 12)),
    Case("a filter longer than the map, wrapped several times", (3, 5), (12, 12), pad_mode="circular"),
    Case("a filter longer than the map, mostly over zeros", (5, 4), (12, 12), pad_mode="zeros"),
    Case("one axis only", (7, 19), (1, 5), (1, 2)),
    Case("the other axis only", (19, 7), (5, 1), (2, 1), pad_mode="replicate"),
    Case("rows as signals are blurred", (1, 61), (1, 3), (1, 2)),
    Case("different filters of different parity", (10, 11), (3, 2)),
    Case("a long and a short filter", (9, 21), (2, 7), pad_mode="circular"),
    *(
        Case("stride 1 blurs every pixel", (11, 29), (k, k), (1, 1), pad_mode=border)
        for k, border in zip((2, 3, 5, 7), BORDERS, strict=True)
    ),
    *(
        Case("a stride that no code is unrolled for", (13, 37), (k, k), (s, s), pad_mode=border)
        for (k, s), border in zip(((3, 3), (5, 3), (5, 4), (7, 4)), BORDERS, strict=True)
    ),
    Case("strides that differ", (14, 31), (4, 5), (2, 3)),
    Case("strides that differ, one of them 1", (9, 31), (3, 4), (1, 2), pad_mode="zeros"),
    Case("strides that differ the other way round", (16, 18), (5, 3), (3, 1), pad_mode="circular"),
    Case("a stride beyond the filter: pixels that no output reads", (9, 14), (2, 2), (4, 4)),
    Case("a stride beyond the filter, and the map", (3, 2), (2, 1), (4, 5), pad_mode="replicate"),
    *(
        Case("a map of one pixel", (1, 1), (k, 4), pad_mode=border)
        for k, border in zip((7, 3, 4, 5), BORDERS, strict=True)
    ),
    *(Case("a map of 2 x 2", (2, 2), (7, 5), pad_mode=border) for border in BORDERS),
    *(Case("one row", (1, 23), (4, 4), pad_mode=border) for border in ("reflect", "circular")),
    *(Case("one column", (23, 1), (5, 5), pad_mode=border) for border in ("reflect", "zeros")),
    *(Case("pads larger than the map", (3, 4), (4, 4), padding=(9, 7, 8, 11), pad_mode=border) for border in BORDERS),
    *(
        Case("pads larger than the filter", (12, 40), (3, 3), padding=(5, 4, 4, 6), pad_mode=border)
        for border in BORDERS
    ),
    *(
        Case(
            "short rows, and pads that show a pixel to outputs beyond the usual ones",
            (9, 9),
            (k, k),
            padding=pads,
            pad_mode=border,
        )
        for k, pads, border in (
            (2, (2, 2, 2, 2), "reflect"),
            (2, (0, 1, 5, 0), "reflect"),
            (3, (1, 1, 4, 1), "reflect"),
            (3, (1, 1, 1, 3), "reflect"),
            (4, (1, 2, 4, 5), "replicate"),
            (7, (3, 3, 3, 7), "replicate"),
            (3, (1, 1, 6, 6), "circular"),
        )
    ),
    Case("pads of four different sizes", (10, 27), (5, 4), padding=(0, 3, 2, 1)),
    Case("a pad ahead only", (10, 27), (5, 4), padding=(3, 0, 4, 0), pad_mode="circular"),
    Case("a pad behind only", (10, 27), (5, 4), padding=(0, 3, 0, 4), pad_mode="replicate"),
    Case("no pad, and pixels at the end that no output reads", (10, 28), (3, 3), padding=(0, 0, 0, 0)),
    Case("exactly one output", (5, 7), (5, 7), padding=(0, 0, 0, 0)),
    Case("a row wider than a buffer of sums", (3, 1025), (3, 3)),
    Case(
        "a row wider than a buffer of sums, at stride 1",
        (2, 2053),
        (4, 4),
        (1, 1),
        pad_mode="zeros",
        batch=1,
        channels=1,
    ),
    Case("a row whose ends are far apart, wrapped", (3, 3001), (5, 5), pad_mode="circular", batch=1, channels=1),
    Case(
        "a row whose ends are far apart, stride 3", (2, 3331), (4, 4), (3, 3), pad_mode="circular", batch=1, channels=1
    ),
    Case("a column whose ends are far apart", (1409, 3), (4, 4), pad_mode="circular", batch=1, channels=1),
    Case("one channel, where memory formats are ambiguous", (8, 17), (3, 3), channels=1),
    Case("channels that fill vectors", (6, 7), (4, 4), channels=64, batch=1),
    Case("channels that leave a tail of every length's kind", (5, 6), (3, 3), channels=17, batch=1),
    Case("more channels than one pass over pixels takes", (5, 9), (4, 4), channels=331, batch=1, pad_mode="circular"),
    Case(
        "channels in vectors, a stride and filter without code of their own",
        (7, 9),
        (5, 4),
        (3, 1),
        channels=48,
        batch=1,
    ),
    Case("prime sizes", (31, 37), (6, 6), pad_mode="replicate", batch=3, channels=5),
    Case("enough pixels for more than one thread", (56, 111), (4, 4), batch=3, channels=7),
    Case("an empty batch", (7, 9), batch=0),
    Case("no channels", (7, 9), channels=0),
)


def poisoned(shape, dtype, device, at: tuple[int, ...], larger: tuple[int, ...], channels_last: bool) -> torch.Tensor:
    """A view of this shape, beginning at ``at``, of a NaN-filled tensor that is ``larger`` than that in each dimension."""
    whole = tuple(n + a + b for n, a, b in zip(shape, at, larger, strict=True))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    buffer = torch.empty(whole, dtype=dtype, device=device, memory_format=memory_format).fill_(torch.nan)
    return buffer[tuple(slice(a, a + n) for a, n in zip(at, shape, strict=True))]


def dense(shape, dtype, device, channels_last: bool) -> torch.Tensor:
    """A tensor without gaps in the middle of a NaN-filled buffer."""
    n, c, h, w = shape
    margin = 64
    buffer = torch.full((n * c * h * w + 2 * margin,), torch.nan, dtype=dtype, device=device)
    c1, h1, w1 = max(c, 1), max(h, 1), max(w, 1)
    strides = (h1 * w1 * c1, 1, w1 * c1, c1) if channels_last else (c1 * h1 * w1, h1 * w1, w1, 1)
    return buffer.as_strided(shape, strides, margin)


LAYOUTS = {
    "nchw": lambda shape, *to: dense(shape, *to, False),
    "nhwc": lambda shape, *to: dense(shape, *to, True),
    # Odd beginnings and ends: no row and no pixel is aligned, and the neighbours in memory are poison.
    "slice": lambda shape, *to: poisoned(shape, *to, (1, 1, 2, 3), (0, 1, 1, 2), False),
    "slice of nhwc": lambda shape, *to: poisoned(shape, *to, (1, 3, 1, 1), (0, 2, 2, 1), True),
    "transposed": lambda shape, *to: dense((*shape[:2], shape[3], shape[2]), *to, False).mT,
    "steps": lambda shape, *to: poisoned((*shape[:2], 2 * shape[2], 3 * shape[3]), *to, (0,) * 4, (0,) * 4, False)[
        :, :, ::2, ::3
    ],
    "expanded": lambda shape, *to: dense((1, shape[1], 1, shape[3]), *to, False).expand(shape),
}


def laid_out(values: torch.Tensor, layout: str, device="cpu") -> torch.Tensor:
    """These values in that layout; the dimensions an expanded tensor repeats show their first values."""
    view = LAYOUTS[layout](tuple(values.shape), values.dtype, device)
    if layout == "expanded":
        if view.numel():
            view[:1, :, :1].copy_(values[:1, :, :1])
    else:
        view.copy_(values)
    return view


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def row(k: int, seed: int = 0) -> torch.Tensor:
    """Taps without symmetry and of either sign, so that no mistake in order or sign cancels; of about unit gain."""
    return random(k, seed=100 * seed + k) / k**0.5


@dataclasses.dataclass(frozen=True)
class StepCase(Case):
    """A blur of what an affine, an activation and a maximum have made of x."""

    act: str = "none"
    act_args: tuple[float, ...] = ()
    kernel: tuple[int, int] = (1, 1)
    max_padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    affine: bool = False

    @property
    def prepared(self) -> tuple[int, int]:
        left, right, top, bottom = self.max_padding
        return (self.size[0] + top + bottom + 1 - self.kernel[0], self.size[1] + left + right + 1 - self.kernel[1])

    @property
    def out(self) -> tuple[int, int]:
        return dataclasses.replace(Case(self.reason, self.prepared, self.taps, self.stride, self.padding)).out

    def __str__(self) -> str:
        numbers = "".join(f"_{n:g}" for n in self.act_args)
        pads = ".".join(map(str, self.max_padding))
        return (
            f"{super().__str__()}-{self.act}{numbers}-m{self.kernel[0]}x{self.kernel[1]}p{pads}"
            + "-affine" * self.affine
        )


STEPS = (
    *(
        StepCase(f"the activation {act}", (9, 14), pad_mode=border, act=act, act_args=args, affine=affine)
        for (act, args), border, affine in zip(
            (
                ("relu", ()), ("relu6", ()), ("silu", ()), ("gelu", ()), ("gelu_tanh", ()), ("hardswish", ()),
                ("leaky_relu", (0.1,)), ("leaky_relu", (-0.5,)), ("softplus", (1.0, 20.0)), ("softplus", (2.0, 1.5)),
            ),
            itertools.cycle(BORDERS),
            itertools.cycle((False, True, True)),
            strict=False,
        )
    ),
    StepCase("an affine alone", (7, 13), affine=True),
    StepCase("an affine alone, zeros beyond the border and not shift", (8, 9), (5, 5), pad_mode="zeros", affine=True),
    StepCase("the usual max-blur", (14, 27), kernel=(2, 2)),
    StepCase("the stem of a ResNet", (13, 28), (3, 3), act="relu", kernel=(3, 3), max_padding=(1, 1, 1, 1), affine=True),
    StepCase("the stem of a ResNet, activated by silu", (12, 30), act="silu", kernel=(3, 3), max_padding=(1, 1, 1, 1)),
    StepCase(
        "after a maximum, zeros and not -inf beyond the border",
        (9, 15), (3, 3), pad_mode="zeros", kernel=(3, 3), max_padding=(1, 1, 1, 1),
    ),
    StepCase("a wrapped border: rows of z that lie far apart", (23, 12), (4, 4), pad_mode="circular", kernel=(2, 2)),
    StepCase("a window of unequal sides", (9, 17), (4, 4), pad_mode="replicate", kernel=(2, 3), max_padding=(1, 1, 0, 0)),
    StepCase("a window along one axis", (8, 21), kernel=(1, 2)),
    StepCase("pads of four sizes, as where sizes are rounded up", (8, 13), (3, 3), kernel=(3, 3), max_padding=(1, 2, 0, 1)),
    StepCase("a window without code of its own", (11, 16), kernel=(5, 4), max_padding=(2, 2, 2, 2), act="relu6"),
    StepCase("a window as large as the map", (3, 3), (1, 1), (1, 1), kernel=(3, 3)),
    StepCase("a map smaller than its window", (1, 2), (2, 2), kernel=(3, 3), max_padding=(1, 1, 1, 1), act="relu"),
    StepCase("one tap: a strided maximum", (9, 12), (1, 1), kernel=(2, 2)),
    StepCase("stride 1", (7, 11), (3, 3), (1, 1), kernel=(2, 2), act="leaky_relu", act_args=(0.25,)),
    StepCase("strides that differ, a long filter", (15, 19), (8, 5), (3, 2), kernel=(2, 2), affine=True, act="hardswish"),
    StepCase("enough rows for several strips", (67, 64), kernel=(3, 3), max_padding=(1, 1, 1, 1), batch=1, channels=33, act="relu"),
    StepCase("several strips, of which the last wraps around", (67, 64), pad_mode="circular", kernel=(2, 2), batch=1, channels=33),
    StepCase("planes enough for several pieces, of two images", (112, 111), (4, 4), batch=2, channels=7, act="relu", affine=True),
    StepCase("short rows, of more planes than are taken at once", (13, 13), kernel=(2, 2), channels=37, act="relu"),
    StepCase("short rows, a window of unequal sides", (19, 25), (3, 3), pad_mode="circular", kernel=(3, 2), act="relu6"),
    StepCase("rows longer than what is taken at once", (3, 113), (3, 3), kernel=(2, 2), channels=33, act="relu", batch=1),
    StepCase("channels that fill vectors", (6, 7), kernel=(2, 2), channels=64, batch=1, affine=True, act="relu"),
    *(
        StepCase(
            "rows and channels of whole vectors", (18, 32), (k, k), act=act, act_args=args, kernel=(window, window),
            max_padding=((window - 1) // 2,) * 4, channels=16, affine=affine,
        )
        for window, k, act, args, affine in (
            (1, 4, "relu", (), False), (1, 3, "leaky_relu", (0.1,), True), (2, 4, "relu", (), False),
            (2, 3, "relu6", (), True), (3, 4, "none", (), False), (3, 3, "relu", (), True),
        )
    ),
    StepCase("channels of many tiles, of which the last is not full", (8, 9), kernel=(2, 2), channels=530, batch=1, act="relu"),
    StepCase("one channel, where memory formats are ambiguous", (8, 17), (3, 3), kernel=(2, 2), channels=1),
    StepCase("an empty batch", (7, 9), batch=0, kernel=(2, 2), affine=True),
)  # fmt: skip


def coarse(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Eighths between -4 and 4, which every dtype holds: equals are equal everywhere, what differs differs by more than rounding."""
    return (
        torch.randint(-32, 33, shape, generator=torch.Generator().manual_seed(seed)).to(torch.float64).div(8).to(dtype)
    )


@dataclasses.dataclass(frozen=True)
class AdaptiveCase:
    """A blur by predicted filters."""

    reason: str
    size: tuple[int, int]
    k: int = 3
    stride: tuple[int, int] = (2, 2)
    groups: int = 4
    normalize: str = "group"
    pad_mode: str = "reflect"
    batch: int = 2
    channels: int = 8
    everywhere: bool = False  # logits of all positions of x

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.channels, *self.size)

    @property
    def out(self) -> tuple[int, int]:
        out_h, out_w = (-(-n // s) for n, s in zip(self.size, self.stride, strict=True))
        return out_h, out_w

    @property
    def logits_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.groups * self.k**2, *(self.size if self.everywhere else self.out))

    @property
    def arguments(self) -> tuple:
        """Of the raw ops, those that follow the tensors."""
        return (self.k, self.stride, self.groups, self.normalize, self.pad_mode)

    def __str__(self) -> str:
        text = "{}x{}x{}x{}-k{}-s{}x{}".format(*self.shape, self.k, *self.stride)
        return f"{text}-g{self.groups}-{self.normalize}-{self.pad_mode}{'-everywhere' * self.everywhere}"


ADAPTIVE = (
    *(
        AdaptiveCase("the usual filters, which have code of their own", size, k, normalize=normalize, pad_mode=border)
        for (k, border), normalize, size in zip(
            itertools.product((3, 5), BORDERS), itertools.cycle(("group", "joint", "none")), itertools.cycle(((9, 14), (8, 13)))
        )
    ),
    AdaptiveCase("one tap: a gain, which only a joint softmax has", (7, 6), 1, normalize="joint"),
    AdaptiveCase("one tap and no softmax", (7, 6), 1, normalize="none"),
    AdaptiveCase("a filter without code of its own", (11, 15), 7, pad_mode="circular"),
    AdaptiveCase("stride 1", (6, 19), stride=(1, 1), normalize="joint"),
    AdaptiveCase("strides that differ, one of them without code of its own", (10, 17), 5, (3, 1), pad_mode="replicate"),
    AdaptiveCase("a stride beyond the filter: pixels that no output reads", (11, 14), stride=(4, 5), pad_mode="zeros"),
    AdaptiveCase("one group", (9, 9), groups=1),
    AdaptiveCase("a channel a group", (6, 7), groups=8, normalize="joint"),
    *(AdaptiveCase("a map smaller than the filter", (2, 3), 7, pad_mode=border) for border in BORDERS),
    *(AdaptiveCase("one pixel", (1, 1), 5, pad_mode=border) for border in ("reflect", "zeros")),
    AdaptiveCase("rows that fill vectors and more", (5, 131), batch=1),
    AdaptiveCase("groups that fill vectors", (5, 6), groups=2, channels=64, batch=1),
    AdaptiveCase("groups that fill half a vector, or all of it", (5, 18), groups=6, channels=48, batch=1),
    AdaptiveCase("half vectors, the last one alone", (6, 7), 5, groups=3, channels=24, batch=1, normalize="joint"),
    AdaptiveCase("rows copied, opposite borders at a time", (19, 34), 5, groups=2, channels=34, batch=2, pad_mode="circular"),
    AdaptiveCase("groups that leave a tail", (5, 6), 5, groups=2, channels=38, batch=1, normalize="none"),
    AdaptiveCase("enough rows for several pieces", (67, 40), 5, groups=2, channels=6, batch=1),
    AdaptiveCase("enough rows for several pieces, wrapped", (70, 33), groups=2, channels=6, batch=1, pad_mode="circular"),
    AdaptiveCase("an empty batch", (7, 9), batch=0),
    *(
        AdaptiveCase("logits of all positions", (8, 13), 3, normalize=normalize, pad_mode=border, everywhere=True)
        for normalize, border in (("group", "reflect"), ("joint", "circular"), ("none", "zeros"))
    ),
    AdaptiveCase("logits of all positions, whose rows fill vectors and more", (5, 131), batch=1, groups=2, everywhere=True),
    AdaptiveCase("logits of all positions, a filter with few channels", (9, 34), 5, groups=1, channels=2, everywhere=True),
    AdaptiveCase("logits of all positions, several of each kind between two that are read", (11, 14), 3, (4, 5), everywhere=True),
    AdaptiveCase("logits of all positions, all of a row's read", (10, 17), 3, (3, 1), everywhere=True),
    AdaptiveCase("logits of all positions, all of a column's read", (9, 35), 3, (1, 2), normalize="joint", everywhere=True),
    AdaptiveCase("logits of all positions of one row, which is all that is kept", (1, 9), everywhere=True),
    AdaptiveCase("an empty batch with logits of all positions", (7, 9), batch=0, everywhere=True),
)  # fmt: skip
