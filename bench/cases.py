"""What is measured, as data. A new op adds a line to ``OPS`` and its contenders to ``bench/peers.py``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

Layout = Literal["NCHW", "NHWC"]
Direction = Literal["forward", "backward", "forward+backward"]
Purpose = Literal["ratio", "share", "call"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
TAPS = (3, 4, 5, 7)
# Below this, an input may sit in a cache and its copy says nothing about memory.
SHARE_BYTES = {"cpu": 64e6, "cuda": 128e6}
RATIO_BATCH = 8


@dataclass(frozen=True)
class Site:
    """Where a real network downsamples."""

    network: str
    channels: int
    size: int


SITES = (
    *(Site("resnet50", c, s) for c, s in ((64, 112), (128, 56), (256, 28), (512, 14))),
    # ResNet-50 as antialiased-cnns builds it: after a MaxPool2d(2, 1), and in the shortcuts too.
    *(Site("antialiased_resnet50", c, s) for c, s in ((64, 111), (256, 56), (512, 28), (1024, 14))),
    *(Site("vgg", c, s) for c, s in ((64, 223), (128, 111), (256, 55), (512, 27), (512, 13))),
)
# A first look: the sites of antialiased-cnns' ResNet differ from these by a pixel or by the number of channels.
QUICK_SITES = tuple(site for site in SITES if site.network != "antialiased_resnet50")
# The quick run compiles at one site only, every dtype and layout: that takes seconds where a measurement takes tenths.
QUICK_COMPILED = ("64@112",)

OPS = (
    "blur_pool",
    "act_blur_pool",
    "max_blur_pool",
    "stem_blur_pool",
    "bn_act_blur_pool",
    "adaptive_g8",
    "adaptive_g2",
)
# Groups of channels with predicted filters of their own.
GROUPS = {"adaptive_g8": 8, "adaptive_g2": 2}
# Where each occurs: a ReLU before every blur of a ResNet; VGG's pools; an antialiased ResNet's stem, ReLU and maximum;
# the batch norm before that ReLU, in training; predicted filters in an antialiased ResNet's stead.
OP_SITES = {
    "blur_pool": SITES,
    "act_blur_pool": tuple(site for site in SITES if site.network == "resnet50"),
    "max_blur_pool": tuple(site for site in SITES if site.network == "vgg" or (site.channels, site.size) == (64, 112)),
    "stem_blur_pool": tuple(site for site in SITES if (site.channels, site.size) == (64, 112)),
    "bn_act_blur_pool": tuple(site for site in SITES if site.network == "resnet50"),
    **dict.fromkeys(
        GROUPS,
        tuple(
            site
            for site in SITES
            if site.network == "antialiased_resnet50" or (56 >= site.size > 13 and site.network == "resnet50")
        ),
    ),
}
# How often the large side and the small one must be moved. A gradient needs x again where what comes before the blur is not
# linear; statistics of a batch must be there before the first pixel is normalised, and their gradients before that of x.
MOVED = {"blur_pool": ((1, 1), (1, 1)), "bn_act_blur_pool": ((2, 1), (3, 2))}
MOVED_BY_STEPS = ((1, 1), (2, 1))


@dataclass(frozen=True)
class Case:
    """One measurement: an op at a site, in one direction.

    ``purpose`` says what the numbers are good for, hence who takes part: "ratio" is against every peer, "share" against
    a copy (of an input too large for a cache), "call" is the time of a tiny call seen from Python.
    """

    op: str
    network: str
    channels: int
    size: int
    batch: int
    layout: Layout
    dtype: str
    k: int
    direction: Direction
    purpose: Purpose = "ratio"
    stride: int = 2

    @property
    def site(self) -> str:
        return f"{self.channels}@{self.size}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.channels, self.size, self.size)

    @property
    def input_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def fewest_bytes(self) -> int:
        """What any implementation must move."""
        pixels = self.batch * self.channels * math.ceil(self.size / self.stride) ** 2
        large, small = MOVED.get(self.op, MOVED_BY_STEPS)[self.direction == "backward"]
        logits = GROUPS.get(self.op, 0) * self.k**2 * pixels // self.channels * (1 + (self.direction == "backward"))
        return large * self.input_bytes + (small * pixels + logits) * DTYPES[self.dtype].itemsize

    @property
    def images_meet(self) -> bool:
        """Whether an image's result depends on the others of its batch."""
        return self.op == "bn_act_blur_pool"

    def input(self, device: str) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(self.shape, generator=generator, device=device)
        return x.to(DTYPES[self.dtype]).contiguous(memory_format=FORMATS[self.layout])

    def __str__(self) -> str:
        return f"{self.op} {self.site} x{self.batch} {self.layout} {self.dtype} k={self.k} {self.direction}"


def _sweep(
    ops: Iterable[str], sites: Iterable[Site], dtypes: Iterable[str], taps: Iterable[int], purpose: Purpose, device: str
) -> Iterator[Case]:
    wanted, lengths = set(sites), set(taps)
    for op in ops:
        some = [site for site in OP_SITES[op] if site in wanted]
        # What comes before a blur takes the same time whatever the filter; predicted filters are odd.
        own = sorted(lengths if op == "blur_pool" else lengths & ({3, 5} if op in GROUPS else {4}))
        for site, layout, dtype, k in itertools.product(some, LAYOUTS, dtypes, own):
            case = Case(op, site.network, site.channels, site.size, 1, layout, dtype, k, "forward", purpose)
            # A GPU is measured at one size only, large enough for both the ratio and the share.
            large = math.ceil(SHARE_BYTES[device] / case.input_bytes)
            case = replace(case, batch=large if purpose == "share" or device == "cuda" else RATIO_BATCH)
            yield case
            yield replace(case, direction="backward")


def _calls() -> Iterator[Case]:
    for op, direction in itertools.product(OPS, ("forward", "forward+backward")):
        k = 3 if op in GROUPS else 4
        yield Case(op, "resnet50", 64, 14, 1, "NCHW", "fp32", k, direction, "call")  # type: ignore[arg-type]


def quick(device: str) -> list[Case]:
    """What ``python -m bench.run`` measures."""
    if device == "cuda":
        sites = [site for site in SITES if site.network == "resnet50" or site.size in (223, 55, 13)]
        plain = [op for op in OPS if op not in GROUPS]
        dtypes = ("fp32", "bf16")
        return [
            *_sweep(plain, sites, dtypes, (4,), "ratio", device),
            *_sweep(("adaptive_g8",), sites, dtypes, (3, 5), "ratio", device),
            *_sweep(("adaptive_g2",), sites, dtypes, (3,), "ratio", device),
            *_calls(),
        ]
    ends = [site for site in SITES if (site.channels, site.size) in ((64, 112), (512, 14), (512, 13))]
    dtypes = ("fp32", "bf16")
    return [
        *_sweep(OPS[:1], QUICK_SITES, dtypes, (4,), "ratio", device),
        *_sweep(OPS[1:], ends, dtypes, (4,), "ratio", device),
        *_sweep(("adaptive_g8",), ends, dtypes, (3,), "ratio", device),
        *_sweep(OPS[:1], ends[:2], dtypes, (4,), "share", device),
        *_calls(),
    ]


def barred(device: str) -> list[Case]:
    """The grid over which the bars are judged."""
    if device == "cuda":
        return [*_sweep(OPS, SITES, ("fp32", "bf16", "fp16"), TAPS, "ratio", device), *_calls()]
    dtypes = ("fp32", "bf16")
    return [
        *_calls(),
        *_sweep(OPS, SITES, dtypes, TAPS, "share", device),
        *_sweep(OPS, SITES, dtypes, TAPS, "ratio", device),
    ]


def compiled_peers(case: Case, device: str, bars: bool) -> bool:
    """Whether the compiled peers take part in a case."""
    first = case.site in QUICK_COMPILED and (case.op == OPS[0] or device == "cuda")
    return case.purpose == "ratio" and (bars or first)


def select(cases: Iterable[Case], **wanted: Iterable[object] | None) -> list[Case]:
    """The cases whose attribute is among the wanted values, for every attribute named with any value."""
    filters = {name: set(values) for name, values in wanted.items() if values}
    return [case for case in cases if all(getattr(case, name) in values for name, values in filters.items())]
