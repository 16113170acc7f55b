"""Who takes part: this library's backends, what people run without it, and the yardsticks."""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

import aliasfused
from aliasfused.ops.adaptive_blur_pool import Normalize

from .cases import DTYPES, FORMATS, GROUPS, Case, compiled_peers
from .models import weigh_windows

Op = Callable[[torch.Tensor], torch.Tensor]
Role = Literal["ours", "peer", "yardstick"]


class Absent(Exception):
    """A contender cannot take part here; the message says why."""


@dataclass(frozen=True)
class Contender:
    """One way of doing a case's work.

    ``equal`` gives the arguments with which this library does the very same, beyond taps and stride: it is checked with
    them, and where there are any, the peer is measured at its nearest equal work and its row says so.
    """

    name: str
    role: Role
    build: Callable[[Case, str], Op]
    equal: Callable[[Case], dict[str, Any]] = lambda case: {}
    backend: str = "native"
    compiled: bool = False

    @property
    def waits(self) -> bool:
        """Whether its first call waits for a compiler."""
        return self.compiled or (self.role == "ours" and self.backend == "triton")

    def context(self) -> contextlib.AbstractContextManager[None]:
        """Within it the contender's backend answers. The default one needs nothing, so that nothing is paid for it."""
        if self.role != "ours" or self.backend == "native":
            return contextlib.nullcontext()
        return aliasfused.use_backend(self.backend)


def optional(name: str) -> types.ModuleType:
    """Import a peer's library, or say that it is absent."""
    try:
        _mend_torchvision()
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{name} is not installed ({error})") from error


def _mend_torchvision() -> None:
    """timm imports torchvision, whose PyPI wheel loads beside a CPU-only torch only once its two ops have a schema."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept_alive.append(library)
        importlib.import_module("torchvision")
    except ImportError:
        pass  # whoever needs it will say so


_kept_alive: list[torch.library.Library] = []


def _padding(k: int) -> list[int]:
    return [(k - 1) // 2, k // 2] * 2


def _blur_pool(case: Case, device: str, **equal: Any) -> Op:
    k, stride = case.k, case.stride
    if equal:
        return lambda x: aliasfused.blur_pool2d(x, k, stride, **equal)
    return lambda x: aliasfused.blur_pool2d(x, k, stride)


def _act_blur_pool(case: Case, device: str, **equal: Any) -> Op:
    return lambda x: aliasfused.act_blur_pool2d(x, "relu", case.k, case.stride, **equal)


def _max_blur_pool(case: Case, device: str, **equal: Any) -> Op:
    return lambda x: aliasfused.max_blur_pool2d(x, 2, case.k, case.stride, **equal)


def _stem_blur_pool(case: Case, device: str, **equal: Any) -> Op:
    return lambda x: aliasfused.max_blur_pool2d(x, 3, case.k, case.stride, act="relu", max_padding=1, **equal)


def _bn_act_blur_pool(case: Case, device: str, **equal: Any) -> Op:
    options = dict(device=device, dtype=_of_parameters(case), **equal)
    return aliasfused.nn.BNActBlurPool2d(case.channels, "relu", case.k, case.stride, **options)


def _bn_act(case: Case, device: str) -> Op:
    """In training: by the batch's statistics, which the running ones follow."""
    return nn.Sequential(nn.BatchNorm2d(case.channels, device=device, dtype=_of_parameters(case)), nn.ReLU())


def _of_parameters(case: Case) -> torch.dtype:
    """As under autocast, and for the truth as it is."""
    return torch.float64 if case.dtype == "fp64" else torch.float32


def _always(op: Op) -> Callable[[Case, str], Op]:
    return lambda case, device: op


def _after(prepare: Callable[[Case, str], Op], build: Callable[[Case, str], Op]) -> Callable[[Case, str], Op]:
    """What a peer does after something else."""

    def built(case: Case, device: str) -> Op:
        first, op = prepare(case, device), build(case, device)
        return lambda x: op(first(x))

    return built


def _pad_conv(case: Case, device: str) -> Op:
    """As antialiased-cnns does it: the depthwise weight is made once."""
    row = torch.tensor(aliasfused.filters.binomial(case.k), dtype=torch.float64)
    weight = torch.outer(row, row).to(device, DTYPES[case.dtype]).repeat(case.channels, 1, 1, 1)
    padding, stride = _padding(case.k), case.stride

    def pad_conv(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, padding, mode="reflect"), weight, stride=stride, groups=x.shape[1])

    return pad_conv


def _slices(case: Case, device: str) -> Op:
    """The sum of shifted strided slices, one axis after the other: the form the compiler fuses best."""
    taps, padding, stride = aliasfused.filters.binomial(case.k), _padding(case.k), case.stride

    def slices(x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, padding, mode="reflect")
        for dim in (-2, -1):
            last = x.shape[dim] - len(taps)
            # Strided slices along a negative dimension read the same in both axes through movedim, which is free.
            axis = x.movedim(dim, -1)
            axis = sum(tap * axis[..., p : p + last + 1 : stride] for p, tap in enumerate(taps))  # type: ignore[assignment]
            x = axis.movedim(-1, dim)
        return x

    return slices


def _compiled(build: Callable[[Case, str], Op]) -> Callable[[Case, str], Op]:
    return lambda case, device: torch.compile(build(case, device), dynamic=False, fullgraph=True)


def _timm(case: Case, device: str) -> Op:
    module = optional("timm").layers.BlurPool2d(case.channels, filt_size=case.k, stride=case.stride)
    return module.to(device, DTYPES[case.dtype])


def _timm_equal(case: Case) -> dict[str, Any]:
    both_sides = (case.stride - 1 + case.k - 1) // 2
    return {} if [both_sides] * 4 == _padding(case.k) else {"padding": both_sides}


def _kornia(case: Case, device: str) -> Op:
    return optional("kornia").filters.BlurPool2D(case.k, case.stride).to(device, DTYPES[case.dtype])


def _average(case: Case, device: str) -> Op:
    return lambda x: F.avg_pool2d(x, 2)


def _peers(prepare: Callable[[Case, str], Op]) -> tuple[Contender, ...]:
    """Those who do their work in front of a blur as operations of their own, or leave them to the compiler."""
    pad_conv = _after(prepare, _pad_conv)
    return (
        Contender("pad+conv", "peer", pad_conv),
        Contender("pad+conv compiled", "peer", _compiled(pad_conv), compiled=True),
        Contender("slices compiled", "peer", _compiled(_after(prepare, _slices)), compiled=True),
        Contender("kornia", "peer", _after(prepare, _kornia), lambda case: {"pad_mode": "zeros"}),
    )


def _maximum(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 2, 1)


def _stem(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(F.relu(x), 3, 1, 1)


class Adaptive(nn.Module):
    """A blur by predicted filters, with the logits that it learns.

    They are there at the kept positions, or everywhere, as the released predictor makes them.
    """

    def __init__(self, case: Case, device: str, logits: str = "kept", normalize: Normalize = "group") -> None:
        super().__init__()
        shape = (case.batch, GROUPS[case.op] * case.k**2, case.size, case.size)
        # Eighths, which every dtype holds: all contenders are given the same.
        values = torch.randn(shape, generator=torch.Generator().manual_seed(2)).mul(8).round().div(8)
        values = values if logits == "everywhere" else values[:, :, :: case.stride, :: case.stride]
        values = values.to(device, DTYPES[case.dtype]).contiguous(memory_format=FORMATS[case.layout])
        self.logits = nn.Parameter(values)
        self.k, self.stride, self.groups, self.normalize = case.k, case.stride, GROUPS[case.op], normalize

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, [self.k // 2] * 4, mode="reflect")


class FusedAdaptive(Adaptive):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits, geometry = self.logits[: len(x)], (self.k, self.stride, self.groups)
        return aliasfused.adaptive_blur_pool2d(x, logits, *geometry, normalize=self.normalize)


class ReleasedAdaptive(Adaptive):
    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device, **_released(case))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return weigh_windows(self.padded(x), self.logits[: len(x)], self.k, self.stride, self.groups)


def _released(case: Case) -> dict[str, Any]:
    return {"logits": "everywhere", "normalize": "joint"}


class _SlicedAdaptive(Adaptive):
    """Shifted slices times weights, at the kept positions alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.logits[: len(x)].unflatten(1, (self.groups, self.k**2)).softmax(2)
        padded, s = self.padded(x).unflatten(1, (self.groups, -1)), self.stride
        h, w = (s * (n - 1) + 1 for n in weights.shape[-2:])
        taps = ((t, *divmod(t, self.k)) for t in range(self.k**2))
        return sum(weights[:, :, None, t] * padded[..., p : p + h : s, q : q + w : s] for t, p, q in taps).flatten(1, 2)


RELEASED = Contender("released", "peer", ReleasedAdaptive, _released)
_ADAPTIVE = (
    Contender("slices", "peer", _SlicedAdaptive),
    RELEASED,
    Contender("slices compiled", "peer", _compiled(_SlicedAdaptive), compiled=True),
    Contender("released compiled", "peer", _compiled(ReleasedAdaptive), _released, compiled=True),
)
PEERS: dict[str, tuple[Contender, ...]] = {
    "blur_pool": (
        Contender("pad+conv", "peer", _pad_conv),
        Contender("pad+conv compiled", "peer", _compiled(_pad_conv), compiled=True),
        Contender("slices compiled", "peer", _compiled(_slices), compiled=True),
        Contender("timm", "peer", _timm, _timm_equal),
        Contender("kornia", "peer", _kornia, lambda case: {"pad_mode": "zeros"}),
    ),
    "act_blur_pool": _peers(_always(F.relu)),
    "max_blur_pool": _peers(_always(_maximum)),
    "stem_blur_pool": _peers(_always(_stem)),
    "bn_act_blur_pool": _peers(_bn_act),
    **dict.fromkeys(GROUPS, _ADAPTIVE),
}
OURS: dict[str, Callable[..., Op]] = {
    "blur_pool": _blur_pool,
    "act_blur_pool": _act_blur_pool,
    "max_blur_pool": _max_blur_pool,
    "stem_blur_pool": _stem_blur_pool,
    "bn_act_blur_pool": _bn_act_blur_pool,
    **dict.fromkeys(GROUPS, FusedAdaptive),
}
TRUTH: dict[str, Callable[[Case, str], Op]] = {
    "blur_pool": _pad_conv,
    "act_blur_pool": _after(_always(F.relu), _pad_conv),
    "max_blur_pool": _after(_always(_maximum), _pad_conv),
    "stem_blur_pool": _after(_always(_stem), _pad_conv),
    "bn_act_blur_pool": _after(_bn_act, _pad_conv),
    **dict.fromkeys(GROUPS, _SlicedAdaptive),
}
# The vendor's nearest kernel: two taps, no overlap, no border.
AVERAGE = Contender("avg_pool2d", "yardstick", _average)


def contenders(
    case: Case, device: str, backends: Iterable[str], bars: bool = False, only: Iterable[str] = ()
) -> list[Contender]:
    """Everyone who takes part in a case: this library by each backend named, then the peers."""
    ours = [Contender("aliasfused", "ours", OURS[case.op], backend=name) for name in backends]
    peers = list(PEERS[case.op])
    if case.purpose == "share":
        peers = []
    elif case.purpose == "call":
        peers = peers[:1]
    elif not compiled_peers(case, device, bars):
        peers = [peer for peer in peers if not peer.compiled]
    wanted = set(only)
    peers = [peer for peer in peers if not wanted or peer.name in wanted]
    yardsticks = [AVERAGE] if device == "cuda" and case.purpose == "ratio" else []
    return [*ours, *peers, *yardsticks]


def default_backends(device: str) -> list[str]:
    """The backends worth timing on a device; reference is the truth, not a contender."""
    return ["native"] if device == "cpu" else ["native", "triton"]
