"""Which implementation runs, and why another does not."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch

from . import native, reference, triton

__all__ = ["Backend", "backends", "use_backend"]

OPS = (
    *(f"blur_pool_{name}" for name in ("fwd", "bwd", "taps_fwd", "taps_bwd", "taps_grad")),
    *(f"max_blur_pool_{name}" for name in ("fwd", "bwd", "sums")),
    "channel_moments",
    *(f"batch_norm_{name}" for name in ("table", "follow", "gradient")),
    *(f"adaptive_blur_pool_{name}" for name in ("fwd", "bwd", "logits_grad")),
)
DEFAULT = "native"
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


class Backend(NamedTuple):
    """One implementation on one kind of device."""

    name: str
    device: str
    available: bool
    default: bool
    detail: str  # instruction sets or architectures it was built for
    reason: str  # why it is not available, else empty
    remedy: str  # the command that mends it, else empty


def backends() -> tuple[Backend, ...]:
    """Every implementation of the ops on every kind of device, whether it can run here, and if not what would mend it.

    The default of a device is fixed (native): a missing one raises when it is called, it is never replaced in silence.
    """
    return tuple(
        Backend(name, device, not reason, name == DEFAULT, detail, reason, remedy)
        for name, module in (("native", native), ("triton", triton), ("reference", reference))
        for device in _KEYS
        for detail, reason, remedy in [module.status(device)]
    )


def _find(name: str, device: str) -> Backend:
    return next(b for b in backends() if (b.name, b.device) == (name, device))


def _refusal(backend: Backend):
    message = (
        f"aliasfused: the {backend.name} backend cannot run on {backend.device}: {backend.reason}. {backend.remedy}"
    )

    def refuse(*args, **kwargs):
        raise RuntimeError(message)

    return refuse


class _Registrations:
    """The dispatcher entries this process put above (or, where the shared object is missing, in place of) the native ones."""

    def __init__(self) -> None:
        self.current = DEFAULT
        self.library: torch.library.Library | None = None

    def install(self, name: str) -> None:
        if self.library is not None:
            self.library._destroy()
        self.current, self.library = name, torch.library.Library("aliasfused", "IMPL")
        find = {"native": None, "triton": triton.find, "reference": functools.partial(getattr, reference)}[name]
        with warnings.catch_warnings():
            # Overriding a registration is the purpose here, torch's warning about it is not news.
            warnings.filterwarnings("ignore", message=".*[Oo]verrid.*", category=UserWarning)
            for device, key in _KEYS.items():
                backend = _find(name, device)
                if backend.available and find is None:
                    continue  # the shared object registered itself
                for op in OPS:
                    function = find(op) if find and backend.available else _refusal(backend)
                    self.library.impl(op, function, key, allow_override=True)


_registrations = _Registrations()


def install_default() -> None:
    """Make the default backends answer; called once, when the ops are defined."""
    _registrations.install(DEFAULT)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops by one named implementation inside a ``with`` block, for the whole process.

    It changes what the dispatcher calls, so it reaches eager code, other threads and already compiled graphs alike.

    Args:
        name: "native" (C++ and CUDA), "triton" (CUDA; CPU tensors too under ``TRITON_INTERPRET=1``) or "reference"
            (dense float64 matrices, any device: slow, exact).

    Raises:
        ValueError: another name.
        RuntimeError: the backend can run on no device of this machine, with the reason and the command that mends it.
            Where it runs on some devices only, calling it on another one raises likewise.
    """
    rows = [b for b in backends() if b.name == name]
    if not rows:
        raise ValueError(f"name must be 'native', 'triton' or 'reference', got {name!r}")
    if not any(b.available for b in rows):
        raise RuntimeError(f"aliasfused: the {name} backend cannot run here: {rows[0].reason}. {rows[0].remedy}")
    before = _registrations.current
    _registrations.install(name)
    try:
        yield
    finally:
        _registrations.install(before)
