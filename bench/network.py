"""Real networks on real photographs: strided, with blurs as their libraries have them, and after ``aliasfused.accelerate``."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import aliasfused

from .models import ALSO, Released, antialiased_resnet, antialiased_vgg
from .peers import Absent, optional
from .rows import Machine
from .timing import Call, CallClock, Clock, Turn, WallClock, interleave, kept_bytes, peak_bytes

Kind = tuple[str, str]
VARIANTS = ("plain", "unfused", "accelerated")
MODES = ("eager", "compiled")
KINDS = tuple(itertools.product(MODES, VARIANTS))
# A first look compiles no strided net: compiling takes longest of all.
QUICK_KINDS = tuple(kind for kind in KINDS if kind != ("compiled", "plain"))
SIZE = 224
BATCH = {"cpu": 4, "cuda": 64}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
FORMAT = {"cpu": torch.contiguous_format, "cuda": torch.channels_last}


@dataclass(frozen=True)
class Network:
    """A strided network, and what makes an anti-aliased one of its parts."""

    plain: Callable[[], nn.Module]
    blurred: Callable[[nn.Module], nn.Module]


def _timm_resnet(name: str = "resnet50") -> nn.Module:
    # Residual branches are not silenced, or most blurs would not reach the output.
    return optional("timm").create_model(name, zero_init_last=False)


def _timm_blurred(plain: nn.Module) -> nn.Module:
    model = _timm_resnet("resnetblur50")
    model.load_state_dict(plain.state_dict())
    return model


def _torchvision(name: str) -> nn.Module:
    optional("torchvision")
    return getattr(importlib.import_module("torchvision.models"), name)()


NETWORKS = {
    "resnetblur50": Network(_timm_resnet, _timm_blurred),
    "antialiased_resnet50": Network(functools.partial(_torchvision, "resnet50"), antialiased_resnet),
    "antialiased_vgg16_bn": Network(functools.partial(_torchvision, "vgg16_bn"), antialiased_vgg),
    "adaptive_resnet50": Network(
        functools.partial(_torchvision, "resnet50"), functools.partial(antialiased_resnet, blur=Released)
    ),
}
QUICK = ("resnetblur50",)


@dataclass(frozen=True)
class NetworkRow:
    """One network in one variant, eager or compiled."""

    model: str
    photographs: int
    dtype: str
    mode: str  # eager, compiled
    variant: str  # plain, unfused, accelerated
    status: str
    images_per_s: float | None
    step_ms: float | None  # forward, backward and SGD, of one batch
    peak_bytes: int | None  # allocated during one such step, above what was held before
    kept_bytes: int | None  # by its forward for its backward, without parameters and buffers
    difference: (
        float | None
    )  # largest, of the outputs from the unfused eager ones, relative to the largest; not of plain
    machine: Machine


def photographs(count: int) -> torch.Tensor:
    """(count, 3, 224, 224) crops of photographs in scikit-learn and scikit-image, scaled as ImageNet models want."""
    pictures = list(_pictures())
    if not pictures:
        raise Absent("there are no photographs: install scikit-learn or scikit-image")
    crops = [
        picture[top : top + SIZE, left : left + SIZE, :3]
        for picture in pictures
        for top in range(0, picture.shape[0] - SIZE + 1, SIZE)
        for left in range(0, picture.shape[1] - SIZE + 1, SIZE)
    ]
    # Spread over the pictures; a batch larger than there are crops repeats them.
    chosen = [crops[(i * len(crops) // count if count <= len(crops) else i) % len(crops)] for i in range(count)]
    x = torch.stack([torch.from_numpy(crop.copy()) for crop in chosen]).permute(0, 3, 1, 2).float() / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean[:, None, None]) / deviation[:, None, None]


def _pictures() -> Iterator[Any]:
    with contextlib.suppress(ImportError):
        yield from importlib.import_module("sklearn.datasets").load_sample_images().images
    with contextlib.suppress(ImportError):
        data = importlib.import_module("skimage.data")
        io = importlib.import_module("skimage.io")
        for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"):
            # Read from the package itself: the loaders of skimage.data may want to download.
            yield io.imread(Path(str(data.__file__)).parent / name)


def calibrate(model: nn.Module, x: torch.Tensor) -> None:
    """Random weights come with no statistics: batch norms take those of the batch."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum, norm.usual_momentum = 1.0, norm.momentum  # type: ignore[assignment]
    with torch.no_grad():
        model.train()(x)
    for norm in norms:
        norm.momentum = norm.usual_momentum  # type: ignore[assignment]


class Variant:
    """One network, ready to infer and to train. Eager and compiled ones may be of the same model."""

    def __init__(self, model: nn.Module, x: torch.Tensor, mode: str) -> None:
        self.model, self.x = model, x
        self.run: Callable[..., torch.Tensor] = torch.compile(model, dynamic=False) if mode == "compiled" else model
        self.target = torch.arange(len(x), device=x.device)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def inference(self) -> Call:
        self.model.eval()
        return self.infer

    def infer(self) -> torch.Tensor:
        with torch.inference_mode():
            return self.run(self.x)

    def outputs(self) -> torch.Tensor:
        self.inference()
        return self.infer().float()

    def training(self) -> Call:
        self.model.train()
        return self.step

    def loss(self) -> torch.Tensor:
        return F.cross_entropy(self.run(self.x).float(), self.target)

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def kept_bytes(self) -> int:
        self.training()
        return kept_bytes(self.loss, held=(*self.model.parameters(), *self.model.buffers()))


def inputs(device: str) -> torch.Tensor:
    return photographs(BATCH[device]).to(device, DTYPE[device]).contiguous(memory_format=FORMAT[device])


def build(name: str, variant: str, x: torch.Tensor, device: str) -> nn.Module:
    """One variant of a network; the random weights are the same in all of them."""
    torch.manual_seed(0)
    model = NETWORKS[name].plain()
    if variant != "plain":
        model = NETWORKS[name].blurred(model)
    model.to(device, DTYPE[device], memory_format=FORMAT[device])  # type: ignore[call-overload]
    calibrate(model, x)
    if variant == "accelerated":
        report = aliasfused.accelerate(model, also=ALSO)
        if any(row.action != "fused" for row in report):
            raise RuntimeError(f"accelerate left blurs as they were:\n{report}")
    return model


def warm(name: str, device: str, threads: int, variant: str, training: bool) -> None:
    """Fill the compiler's cache on disk; called in processes of its own, as compiling takes longer than measuring."""
    torch.set_num_threads(threads)
    x = inputs(device)
    chosen = Variant(build(name, variant, x, device), x, "compiled")
    (chosen.training() if training else chosen.inference())()


def compilations(
    names: Iterable[str], device: str, threads: int, kinds: Iterable[Kind] = KINDS
) -> list[Callable[[], None]]:
    """The compiled networks as jobs for other processes, the longest first."""
    variants = [variant for mode, variant in kinds if mode == "compiled"]
    jobs = itertools.product((True, False), names, variants)
    return [functools.partial(warm, name, device, threads, variant, training) for training, name, variant in jobs]


def measure(
    names: Iterable[str],
    device: str,
    machine: Machine,
    backend: str,
    seconds: float,
    step: Callable[[str], None],
    kinds: Sequence[Kind] = KINDS,
) -> list[NetworkRow]:
    """Time inference and training steps of all kinds, modes of variants, in turns; ``step`` is told what begins."""
    dtype = str(DTYPE[device]).removeprefix("torch.")
    rows = []
    for name in names:
        try:
            for b in aliasfused.backends():
                if (b.name, b.device) == (backend, device) and not b.available:
                    raise Absent(b.reason)
            with aliasfused.use_backend(backend):
                rows += _measure(name, device, machine, seconds, step, dtype, kinds)
        except Absent as error:
            rows.append(
                NetworkRow(name, 0, dtype, "", "", f"absent: {error}", None, None, None, None, None, machine=machine)
            )
    return rows


def _measure(
    name: str,
    device: str,
    machine: Machine,
    seconds: float,
    step: Callable[[str], None],
    dtype: str,
    kinds: Sequence[Kind],
) -> list[NetworkRow]:
    step(f"{name}: inference")
    torch.compiler.reset()
    x = inputs(device)
    models = {variant: build(name, variant, x, device) for variant in VARIANTS}
    nets = {(mode, variant): Variant(models[variant], x, mode) for mode, variant in kinds}
    clock: Clock = WallClock() if device == "cpu" else CallClock(calls=3)
    outputs = {kind: net.outputs() for kind, net in nets.items()}
    infer = interleave([Turn(clock.prepare(net.inference)) for net in nets.values()], seconds, rounds=4)
    step(f"{name}: training")
    train = interleave([Turn(clock.prepare(net.training)) for net in nets.values()], seconds, rounds=4)
    step(f"{name}: memory")
    truth = outputs["eager", "unfused"]
    differences = {kind: float((y - truth).abs().max() / truth.abs().max()) for kind, y in outputs.items()}
    return [
        NetworkRow(
            name,
            len(x),
            dtype,
            *kind,
            "ok",
            images_per_s=len(x) / inferred.min_us * 1e6,
            step_ms=trained.min_us * 1e-3,
            peak_bytes=peak_bytes(net.training(), device),
            kept_bytes=net.kept_bytes(),
            difference=None if "plain" in kind else differences[kind],
            machine=machine,
        )
        for (kind, net), inferred, trained in zip(nets.items(), infer, train, strict=True)
    ]
