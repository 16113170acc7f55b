"""The truth tests compare against: every axis as a dense float64 matrix, its borders by padding the indices with numpy.

Nothing here is shared with the library: the border is numpy's, the adjoint is a transpose.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F

NUMPY_MODES = {"reflect": "reflect", "replicate": "edge", "zeros": "constant", "circular": "wrap"}


@functools.lru_cache(maxsize=64)
def sources(n: int, before: int, after: int, k: int, stride: int, pad_mode: str) -> torch.Tensor:
    """(k, outputs): one more than the index of the pixel that this tap of this output reads, 0 where that is a zero."""
    shown = np.pad(np.arange(1, n + 1), (before, after), mode=NUMPY_MODES[pad_mode])
    return torch.from_numpy(np.lib.stride_tricks.sliding_window_view(shown, k)[::stride].T.copy())


def matrix(taps: torch.Tensor, reads: torch.Tensor, n: int) -> torch.Tensor:
    """(outputs, n) from taps (k,), (C, outputs, n) from taps (C, k)."""
    k, outputs = reads.shape
    whole = torch.zeros(*taps.shape[:-1], outputs, n + 1, dtype=torch.float64)
    for p in range(k):
        whole[..., torch.arange(outputs), reads[p]] += taps[..., p, None]
    return whole[..., 1:]


class Blur:
    """One blur of (N, C, H, W) in float64: forward, adjoint, gradient of the taps."""

    def __init__(self, size, taps_h, taps_w, stride, padding, pad_mode: str) -> None:
        left, right, top, bottom = padding
        self.size = tuple(size)
        self.taps = tuple(torch.as_tensor(row).double() for row in (taps_h, taps_w))
        self.reads = tuple(
            sources(n, *sides, row.shape[-1], s, pad_mode)
            for n, sides, row, s in zip(size, ((top, bottom), (left, right)), self.taps, stride, strict=True)
        )

    @functools.cached_property
    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(matrix(*axis) for axis in zip(self.taps, self.reads, self.size, strict=True))

    @property
    def out(self) -> tuple[int, int]:
        return tuple(r.shape[1] for r in self.reads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.matrices
        return a @ x.double() @ b.mT

    def adjoint(self, dy: torch.Tensor) -> torch.Tensor:
        a, b = self.matrices
        return a.mT @ dy.double() @ b

    def taps_gradient(self, dy: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
        """(C, k): what one more unit of each tap along ``axis`` adds to <dy, y>."""
        a, b = self.matrices
        x = x.double() @ b.mT if axis == 0 else a @ x.double()
        dim = axis - 2
        x = torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), x], dim)
        return torch.stack([(dy.double() * x.index_select(dim, r)).sum((0, 2, 3)) for r in self.reads[axis]], -1)

    def absolute(self) -> Blur:
        """The same blur with the taps' absolute values: of |x|, it gives what roundings are proportional to."""
        other = object.__new__(Blur)
        other.size, other.taps, other.reads = self.size, tuple(row.abs() for row in self.taps), self.reads
        return other

    def terms(self, adjoint: bool) -> int:
        """The most products that any result is a sum of, along one axis and then along the other."""
        if adjoint:
            return sum(int(torch.bincount(r.flatten(), minlength=2)[1:].max()) for r in self.reads)
        return sum(r.shape[0] for r in self.reads)


class Step:
    """A downsampling step in float64: affine, activation, maximum, blur; and its gradients, which autograd works out."""

    def __init__(self, act, act_args, affine, kernel, max_padding, blur: Blur) -> None:
        self.act = functools.partial(ACTIVATIONS[act], *act_args) if act_args else ACTIVATIONS[act]
        self.affine = None if affine is None else affine.double()
        self.kernel, self.max_padding, self.blur = kernel, max_padding, blur

    def centred(self, x: torch.Tensor) -> torch.Tensor:
        return x.double() if self.affine is None else x.double() - self.affine[0, :, None, None]

    def argument(self, x: torch.Tensor) -> torch.Tensor:
        """What the activation is of."""
        if self.affine is None:
            return x.double()
        return self.centred(x) * self.affine[1, :, None, None] + self.affine[2, :, None, None]

    def maxima(self, v: torch.Tensor) -> torch.Tensor:
        """max_pool2d with padding of any four sizes: the windows that see beyond v on two sides alone are cut out of more."""
        left, right, top, bottom = self.max_padding
        if tuple(self.kernel) == (1, 1):
            return v
        ph, pw = max(top, bottom), max(left, right)
        # torch pads evenly, and by no more than half a window: rows of -inf make up for what is missing.
        lh, lw = min(ph, self.kernel[0] // 2), min(pw, self.kernel[1] // 2)
        v = F.pad(v, (pw - lw, pw - lw, ph - lh, ph - lh), value=-torch.inf)
        z = F.max_pool2d(v, self.kernel, 1, (lh, lw))
        return z[:, :, ph - top : z.shape[2] - (ph - bottom), pw - left : z.shape[3] - (pw - right)]

    def prepared(self, x: torch.Tensor) -> torch.Tensor:
        return self.maxima(self.act(self.argument(x)))

    def du(self, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        u = self.argument(x).detach().clone().requires_grad_()
        (du,) = torch.autograd.grad(self.maxima(self.act(u)), u, self.blur.adjoint(dy))
        return du

    def spread(self, x: torch.Tensor, dz: torch.Tensor) -> torch.Tensor:
        """What every pixel has won of dz."""
        v = self.act(self.argument(x)).detach().clone().requires_grad_()
        (dv,) = torch.autograd.grad(self.maxima(v), v, dz)
        return dv


ACTIVATIONS = {
    "none": lambda u: u * 1,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "hardswish": F.hardswish,
    "leaky_relu": lambda slope, u: F.leaky_relu(u, slope),
    "softplus": lambda beta, threshold, u: F.softplus(u, beta, threshold),
}


class Adaptive:
    """A blur by predicted filters in float64: forward, adjoint, and the gradient of the logits."""

    def __init__(self, size, logits, kernel_size, stride, groups, normalize: str, pad_mode: str) -> None:
        radius = kernel_size // 2
        rows, cols = (sources(n, radius, radius, kernel_size, s, pad_mode) for n, s in zip(size, stride, strict=True))
        # Of a map with a zero row above and a zero column ahead of it: the element that a tap of an output reads.
        self.reads = (rows[:, None, :, None] * (size[1] + 1) + cols[None, :, None, :]).flatten(0, 1)
        self.size, self.groups, self.normalize = tuple(size), groups, normalize
        # Logits of all positions of x are as many as x has, and those of the outputs are read.
        self.logits_size = tuple(logits.shape[2:])
        self.steps = tuple(stride) if self.logits_size == self.size else (1, 1)
        self.logits = self.kept(logits.detach().cpu().double()).unflatten(1, (groups, kernel_size**2))

    def kept(self, t: torch.Tensor) -> torch.Tensor:
        return t[..., :: self.steps[0], :: self.steps[1]]

    def among_zeros(self, t: torch.Tensor) -> torch.Tensor:
        """The transpose of ``kept``."""
        wide = t.new_zeros(*t.shape[:-2], *self.logits_size)
        self.kept(wide).copy_(t)
        return wide

    @property
    def over(self) -> tuple[int, ...]:
        """The dimensions of (N, G, k^2, H', W') that a softmax is over."""
        return {"group": (2,), "joint": (1, 2), "none": ()}[self.normalize]

    def filters(self, logits: torch.Tensor) -> torch.Tensor:
        if not self.over:
            return logits * 1
        powers = (logits - logits.detach().amax(self.over, keepdim=True)).exp()
        return powers / powers.sum(self.over, keepdim=True)

    @property
    def weights(self) -> torch.Tensor:
        return self.filters(self.logits)

    def grouped(self, t: torch.Tensor) -> torch.Tensor:
        """(N, G, C/G, H, W)"""
        return t.detach().cpu().double().unflatten(1, (self.groups, t.shape[1] // self.groups))

    def shown(self, x: torch.Tensor) -> torch.Tensor:
        """(N, G, C/G, k^2, H', W')"""
        padded = F.pad(self.grouped(x), (1, 0, 1, 0)).flatten(-2)
        return padded[..., self.reads.flatten()].unflatten(-1, self.reads.shape)

    def blurred(self, weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (weights[:, :, None] * self.shown(x)).sum(3).flatten(1, 2)

    def spread(self, weights: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        """The transpose of ``blurred``: what a tap of an output reads is what it gives to."""
        given = (weights[:, :, None] * self.grouped(dy)[:, :, :, None]).flatten(3)
        height, width = self.size
        padded = given.new_zeros(*given.shape[:3], (height + 1) * (width + 1))
        padded.index_add_(-1, self.reads.flatten(), given)
        return padded.unflatten(-1, (height + 1, width + 1))[..., 1:, 1:].flatten(1, 2)

    def correlated(self, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What one more unit of each weight adds to <dy, y>."""
        return (self.grouped(dy)[:, :, :, None] * self.shown(x)).sum(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blurred(self.weights, x)

    def adjoint(self, dy: torch.Tensor) -> torch.Tensor:
        return self.spread(self.weights, dy)

    def logits_gradient(self, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        logits = self.logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.filters(logits), logits, self.correlated(dy, x))
        return self.among_zeros(gradient.flatten(1, 2))
