"""A real network on real photographs, before and after ``aliasfused.accelerate``."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import aliasfused

from .peers import Absent, optional
from .rows import Machine
from .timing import Call, CallClock, Clock, Turn, WallClock, interleave, peak_bytes

MODEL = "resnetblur50"
KINDS = (("eager", "before"), ("eager", "after"), ("compiled", "before"), ("compiled", "after"))
SIZE = 224
BATCH = {"cpu": 4, "cuda": 64}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
FORMAT = {"cpu": torch.contiguous_format, "cuda": torch.channels_last}


@dataclass(frozen=True)
class NetworkRow:
    """One network, before or after, eager or compiled."""

    model: str
    photographs: int
    dtype: str
    mode: str  # eager, compiled
    variant: str  # before, after
    status: str
    images_per_s: float | None
    step_ms: float | None  # forward, backward and SGD, of one batch
    peak_bytes: int | None  # allocated during one such step, above what was held before
    difference: float | None  # largest, of the outputs from those of `before`, relative to the largest output
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


def build(device: str) -> nn.Module:
    """The network with random weights; residual branches are not silenced, or most blurs would not reach the output."""
    torch.manual_seed(0)
    model: nn.Module = optional("timm").create_model(MODEL, zero_init_last=False)
    return model.to(device, DTYPE[device], memory_format=FORMAT[device])  # type: ignore[call-overload]


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
    """One network, ready to infer and to train."""

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

    def step(self) -> None:
        loss = F.cross_entropy(self.run(self.x).float(), self.target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def inputs(device: str) -> torch.Tensor:
    return photographs(BATCH[device]).to(device, DTYPE[device]).contiguous(memory_format=FORMAT[device])


def variants(device: str, x: torch.Tensor) -> dict[tuple[str, str], Variant]:
    """(mode, variant): before and after, eager and compiled, all from the same weights."""
    original = build(device)
    calibrate(original, x)
    result = {}
    for mode, variant in KINDS:
        model = copy.deepcopy(original)
        if variant == "after":
            report = aliasfused.accelerate(model)
            if any(row.action != "fused" for row in report):
                raise RuntimeError(f"accelerate left blurs as they were:\n{report}")
        result[mode, variant] = Variant(model, x, mode)
    return result


def warm(device: str, threads: int, variant: str, training: bool) -> None:
    """Fill the compiler's cache on disk; called in processes of its own, as compiling takes longer than measuring."""
    torch.set_num_threads(threads)
    # Only the kind asked for is run; that compilation is lazy makes the rest free.
    chosen = variants(device, inputs(device))["compiled", variant]
    (chosen.training() if training else chosen.inference())()


def compilations(device: str, threads: int) -> list[Callable[[], None]]:
    """The compiled networks as jobs for other processes, the longest first."""
    kinds = ((variant, training) for training in (True, False) for variant in ("before", "after"))
    return [functools.partial(warm, device, threads, variant, training) for variant, training in kinds]


def measure(
    device: str, machine: Machine, backend: str, seconds: float, step: Callable[[str], None]
) -> list[NetworkRow]:
    """Time inference and training steps of all kinds in turns; ``step`` is told what begins."""
    name = str(DTYPE[device]).removeprefix("torch.")
    try:
        for b in aliasfused.backends():
            if (b.name, b.device) == (backend, device) and not b.available:
                raise Absent(b.reason)
        with aliasfused.use_backend(backend):
            return _measure(device, machine, seconds, step, name)
    except Absent as error:
        return [NetworkRow(MODEL, 0, name, "", "", f"absent: {error}", None, None, None, None, machine)]


def _measure(device: str, machine: Machine, seconds: float, step: Callable[[str], None], name: str) -> list[NetworkRow]:
    x = inputs(device)
    kinds = variants(device, x)
    clock: Clock = WallClock() if device == "cpu" else CallClock(calls=3)
    step("inference")
    outputs = {kind: variant.outputs() for kind, variant in kinds.items()}
    infer = interleave([Turn(clock.prepare(variant.inference)) for variant in kinds.values()], seconds, rounds=4)
    step("training")
    train = interleave([Turn(clock.prepare(variant.training)) for variant in kinds.values()], seconds, rounds=4)
    step("memory")
    rows = []
    for (mode, variant), inferred, trained in zip(KINDS, infer, train, strict=True):
        truth = outputs[mode, "before"]
        rows.append(
            NetworkRow(
                MODEL,
                len(x),
                name,
                mode,
                variant,
                "ok",
                images_per_s=len(x) / inferred.min_us * 1e6,
                step_ms=trained.min_us * 1e-3,
                peak_bytes=peak_bytes(kinds[mode, variant].training(), device),
                difference=float((outputs[mode, variant] - truth).abs().max() / truth.abs().max()),
                machine=machine,
            )
        )
    return rows
