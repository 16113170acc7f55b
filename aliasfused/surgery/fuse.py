"""What stands before a blur is drawn into it: batch norm, activation, maximum and blur become one step, in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.fx
from torch import nn

from .. import filters
from ..compat import composer
from ..nn import _blur
from ..nn.bn_blur_pool import norm_of
from ..ops import bn_blur_pool, max_blur_pool
from ..ops._prologue import Prologue, prologue
from ..ops._window import Window, length, window2d
from ..ops.bn_blur_pool import Norm
from . import trial
from .chains import Chain, act_of, find, own_maximum
from .trace import join, twin


class Part(NamedTuple):
    """A module by its place: what is put there instead is seen."""

    owner: nn.Module
    name: str

    @property
    def module(self) -> Any:
        return self.owner._modules.get(self.name)


class Step(NamedTuple):
    """What a blur does beside blurring."""

    parts: tuple[Part, ...]  # absorbed, in their order
    shared: tuple[Part, ...]  # an activation that serves elsewhere too
    norm: bool  # whether the first part is a batch norm
    before: tuple[Prologue, ...]  # the blur; what is left of it with the first part, the first two, ... at work again
    window: Window | None  # of an average; a blur has its own


_mixed: dict[tuple[type, type], type] = {}


def _become(module: Any, mixin: type) -> None:
    """Exchange a module's class for one of its own kind that acts as the mixin."""
    module.__class__ = _mixture(mixin, type(module))


def _mixture(mixin: type, cls: type) -> type:
    if (mixin, cls) not in _mixed:
        _mixed[mixin, cls] = type(f"{mixin.__name__}{cls.__name__}", (mixin, cls), {"__module__": __name__})
    return _mixed[mixin, cls]


def _blank(mixin: type, cls: type) -> Any:
    return object.__new__(_mixture(mixin, cls))


class _Mixin(nn.Module):
    """Pickled by the names of both classes, as the two together have none."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (_blank, type(self).__bases__, *super().__reduce_ex__(max(2, protocol))[2:])


class Absorbed(_Mixin):
    """What it did is done by the blur that follows. Parameters, buffers and mode are still its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class FusedBlock(_Mixin):
    """A residual block one of whose activations is done by the blur that begins the convolution after it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block: Any = self
        y = block.bn1(block.conv1(x))
        y = block.bn2(block.conv2(y if _activates(block.conv2) else block.relu(y)))
        if hasattr(block, "conv3"):
            y = block.bn3(block.conv3(y if _activates(block.conv3) else block.relu(y)))
        y += x if block.downsample is None else block.downsample(x)
        return block.relu(y)


def _activates(convolution: Any) -> bool:
    """Whether it begins with a blur that does its block's activation."""
    blur = convolution[0] if isinstance(convolution, nn.Sequential) else convolution
    return isinstance(blur, Fused) and bool(blur._step.shared)


@torch.fx.wrap
def step2d(x: torch.Tensor, norm: Norm | None, before: Prologue, window: Window, channels: int | None) -> torch.Tensor:
    """One node of a torch.fx trace: the checks and the op."""
    _blur._check_channels(x, channels, -3)
    return max_blur_pool.apply(x, before, window) if norm is None else bn_blur_pool.apply(x, before, window, norm)


class Fused(_Mixin):
    """A blur, or an average, with what stood before it.

    A part that was replaced after all (as ``convert_sync_batchnorm`` does with batch norms) works for itself, and the step
    does the rest.
    """

    if TYPE_CHECKING:
        _step: Step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._blurred(x, self.window())

    def _blurred(self, x: torch.Tensor, window: Window) -> torch.Tensor:
        step, norm = self._step, None
        absorbed = [isinstance(part.module, Absorbed) for part in step.parts]
        at_work = absorbed.count(False)
        if True in absorbed[:at_work]:
            raise RuntimeError(
                f"aliasfused: {step.parts[absorbed.index(False, 1)].name!r} was replaced after accelerate() had fused it with "
                "what comes before it; replace it first, then accelerate"
            )
        if step.norm and not at_work:
            norm = norm_of(step.parts[0].module, step.parts[0].module.training)
        return step2d(x, norm, step.before[at_work], window, getattr(self, "channels", None))

    def window(self) -> Window:
        return self._step.window or super().window()  # type: ignore[misc]

    def absorbed(self, names: Mapping[nn.Module, str]) -> tuple[str, ...]:
        """Paths of the parts in a model whose modules have these names."""
        norms, others = self._step.parts[: self._step.norm], self._step.parts[self._step.norm :]
        parts = (*norms, *self._step.shared, *others)
        return tuple(join(names[part.owner], part.name) for part in parts if part.owner in names)

    def _replicate_for_data_parallel(self) -> Any:
        if self._step.norm:
            raise RuntimeError(
                "aliasfused: DataParallel copies modules one by one, and the copy of a fused blur would not find that of its "
                "batch norm; use DistributedDataParallel, or accelerate(model, fuse='blur')"
            )
        return super()._replicate_for_data_parallel()

    def extra_repr(self) -> str:
        (act, _, kernel, _), (h, w, stride, padding, pad_mode) = self._step.before[0], self.window()
        text = f"after={[part.name for part in self._step.parts]}, {act=}, maximum={kernel}"
        return f"{text}, taps={length(h)}x{length(w)}, {stride=}, {padding=}, {pad_mode=}"


class FusedThenConv(Fused):
    """A module of a blur and a convolution, whose blur is a step with what stood before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._blur_first(x)  # type: ignore[operator]


def fuse_chains(model: nn.Module) -> Iterator[Chain]:
    """Every chain of a model, after it was fused, or with the reason and without its modules where it was left."""
    for chain in find(model):
        reason = ""
        if chain.absorbed:
            try:
                reason = _difference(model, chain)
                if not reason:
                    _fuse(model, chain)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        yield Chain(chain.blur, reason=reason) if reason else chain


def _part(root: nn.Module, path: str) -> Part:
    owner, _, name = path.rpartition(".")
    return Part(root.get_submodule(owner), name)


def _fuse(root: nn.Module, chain: Chain) -> None:
    """Exchange the classes of a chain's modules."""
    blur: Any = root.get_submodule(chain.blur)
    norm, act, maximum = (_part(root, path) if path else None for path in (chain.norm, chain.act, chain.maximum))
    alone = own_maximum(blur)
    pool = alone if maximum is None else (maximum.module.kernel_size, maximum.module.padding)
    both = norm is not None and type(norm.module) is not nn.BatchNorm2d  # a batch norm with its activation
    acts = act_of(act.module) if act else act_of(norm.module.act) if both and norm else "none"
    before = [prologue(acts or "none", *pool)]
    if norm:
        before.append(prologue("none", *pool) if both and act is None else before[0])
    if act and chain.block is None:
        before.append(prologue("none", *pool))
    if maximum:
        before.append(prologue("none", *alone))
    window = None
    if isinstance(blur, nn.AvgPool2d):
        h, w = (blur.kernel_size,) * 2 if isinstance(blur.kernel_size, int) else blur.kernel_size
        window = window2d((filters.rect(h), filters.rect(w)), (h, w), 0, "zeros")
    shared = (act,) if act and chain.block is not None else ()
    parts = tuple(part for part in (norm, act, maximum) if part and part not in shared)
    for part in parts:
        _become(part.module, Absorbed)
    if chain.block is not None:
        _become(root.get_submodule(chain.block), FusedBlock)
    blur.__dict__["_step"] = Step(parts, shared, norm is not None, tuple(before), window)
    _become(blur, FusedThenConv if isinstance(blur, composer._BlurThenConv) else Fused)


@torch.inference_mode(False)
def _difference(model: nn.Module, chain: Chain) -> str:
    """Run the modules of a chain one after the other against the step, or the whole block old against new."""
    if chain.block is None:
        roles = {role: getattr(chain, role) for role in ("norm", "act", "maximum", "blur") if getattr(chain, role)}
        old: Any = nn.Sequential()
        for role, path in roles.items():
            old.add_module(role, model.get_submodule(path))
        moved = Chain(**{role: role for role in roles})
        given = old.blur.conv.in_channels if hasattr(old.blur, "conv") else getattr(old.blur, "channels", None)
        channels = old.norm.num_features if chain.norm else given
    else:
        old = model.get_submodule(chain.block)
        blur, norm, act, maximum = (path[len(chain.block) :].lstrip(".") for path in chain[:4])
        moved = Chain(blur, norm, act, maximum, "")
        channels = old.conv1.in_channels
    old = twin(old, trial.random_tensors())
    new = twin(old)
    _fuse(new, moved)
    fused = new.get_submodule(moved.blur)
    h, w, _, padding, _ = fused.window()
    n = 2 * max(length(h), length(w), *padding) + max(fused._step.before[0].kernel)
    if isinstance(fused, FusedThenConv):
        n += max(k * d for k, d in zip(fused.conv.kernel_size, fused.conv.dilation, strict=True))  # type: ignore[union-attr,arg-type]
    modes = (False, True) if chain.norm or chain.block is not None else (False,)
    return trial.difference(old, new, channels or 3, n, modes)
