"""Where in a model a step can be fused: modules one after the other that end in a blur."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Node
from torch.nn.utils import parametrize

from ..compat import antialiased_cnns, composer, kornia, timm
from ..nn._blur import Blur2d
from ..nn.blur_pool import BlurPool2d
from ..ops._prologue import ACTS, ACTS_WITH_NUMBERS, Act
from .trace import Trace, full_name, hooked, join

_BATCH_NORM_ACT = "timm.layers.norm_act.BatchNormAct2d"  # batch norm, drop and activation
_BLOCKS = {  # have one activation for several places: the convolution that a blur of their own may begin
    f"{library}.resnet.{cls}": conv
    for library in ("torchvision.models", "antialiased_cnns")
    for cls, conv in (("BasicBlock", "conv2"), ("Bottleneck", "conv3"))
}
_ACTS: dict[str, Callable[[Any], Act]] = {
    "torch.nn.modules.linear.Identity": lambda m: "none",
    "torch.nn.modules.activation.ReLU": lambda m: "relu",
    "torch.nn.modules.activation.ReLU6": lambda m: "relu6",
    "torch.nn.modules.activation.SiLU": lambda m: "silu",
    "torch.nn.modules.activation.GELU": lambda m: "gelu" if m.approximate == "none" else "gelu_tanh",
    "torch.nn.modules.activation.Hardswish": lambda m: "hardswish",
    "torch.nn.modules.activation.LeakyReLU": lambda m: ("leaky_relu", m.negative_slope),
    "torch.nn.modules.activation.Softplus": lambda m: ("softplus", m.beta, m.threshold),
    "timm.layers.activations.Swish": lambda m: "silu",
    "timm.layers.activations.HardSwish": lambda m: "hardswish",
    "timm.layers.activations.GELU": lambda m: "gelu",
    "timm.layers.activations.GELUTanh": lambda m: "gelu_tanh",
    "timm.layers.activations_me.SwishMe": lambda m: "silu",
    "timm.layers.activations_me.HardSwishMe": lambda m: "hardswish",
}
_ACT_MODULES = ("torch.nn.modules.activation", "timm.layers.activations", "timm.layers.activations_me")
_BLURS = (
    BlurPool2d,
    antialiased_cnns.BlurPool,
    timm.BlurPool2d,
    kornia.BlurPool2D,
    kornia.MaxBlurPool2D,
    composer.BlurMaxPool2d,
    composer.BlurConv2d,
    composer.BlurPoolConv2d,
)
# From a blur upwards, ranks go down.
_NORM, _ACT, _MAXIMUM, _BLUR = range(4)
_FUNCTIONS = {**dict.fromkeys((*ACTS, *ACTS_WITH_NUMBERS), _ACT), "max_pool2d": _MAXIMUM, "batch_norm": _NORM}


class Chain(NamedTuple):
    """Paths of the modules that one step can do, empty where there is none, and what kept it from being longer."""

    blur: str
    norm: str = ""
    act: str = ""
    maximum: str = ""
    block: str | None = None  # that uses ``act`` elsewhere too: its class is exchanged for one that leaves it out here
    reason: str = ""

    @property
    def absorbed(self) -> tuple[str, ...]:
        return tuple(path for path in (self.norm, self.act, self.maximum) if path)


def act_of(module: Any) -> Act | None:
    """What the step calls an activation; "none" for an Identity, None for what it does not have."""
    known = _ACTS.get(full_name(type(module)))
    return known(module) if known else None


def own_maximum(blur: nn.Module) -> tuple[Any, Any]:
    """Window and padding of the maximum that is a blur's own."""
    if isinstance(blur, kornia.MaxBlurPool2D):
        return blur.max_pool_size, 0
    return (blur.kernel_size, blur.padding) if isinstance(blur, composer.BlurMaxPool2d) else (1, 0)


def find(model: nn.Module) -> list[Chain]:
    """Of every blur, and of every ``AvgPool2d`` with an activation before it, the chain in both training and evaluation."""
    if not any(_is_blur(module) or _is_average(module) for module in model.modules()):
        return []
    # The first of several calls of a blur, which has the chain, if one has.
    modes = [{c.blur: c for c in reversed([*_Finder(Trace(model, mode, _is_step)).chains()])} for mode in (True, False)]
    found = []
    for path, module in model.named_modules():
        training, evaluation = (chains.get(path) for chains in modes)
        if training and evaluation and training[:-1] == evaluation[:-1]:
            found.append(training)
        elif training or evaluation:
            found.append(Chain(path, reason="training and evaluation differ"))
        elif path and _is_blur(module):
            found.append(
                Chain(path, reason="torch.fx does not reach it; accelerate the part of the model that calls it")
            )
    return found


def _is_blur(module: nn.Module) -> bool:
    """Whether a step may end here, in the whole module or in what it begins with."""
    first, dense = getattr(module, "blur_first", True), getattr(module, "dilation", 1) in (1, (1, 1))
    return type(module) in _BLURS and first and dense


def _is_average(module: nn.Module) -> bool:
    """Whether it is an average over patches that neither overlap nor leave the map."""
    if type(module) is not nn.AvgPool2d or module.ceil_mode or module.divisor_override is not None:
        return False
    kernel, stride, padding = (
        (size, size) if isinstance(size, int) else tuple(size)
        for size in (module.kernel_size, module.stride, module.padding)
    )
    return kernel == stride != (1, 1) and padding == (0, 0)


def _is_step(module: nn.Module) -> bool:
    known = isinstance(module, Blur2d) or full_name(type(module)) == _BATCH_NORM_ACT
    return known or parametrize.is_parametrized(module)


def _drops(module: Any) -> bool:
    return type(module) is not nn.Identity and bool(getattr(module, "p", getattr(module, "drop_prob", True)))


class _Role(NamedTuple):
    name: str  # of the field of Chain, or "near" where it is not one; "through" for what changes nothing
    rank: int
    but: str = ""  # what speaks against it, whatever surrounds it


class _Finder:
    """The rules, on a trace."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def chains(self) -> Iterator[Chain]:
        for node in self.trace.paths:
            module = self.trace.module(node)
            if _is_blur(module):
                yield self._chain(node, _BLUR if own_maximum(module) == (1, 0) else _MAXIMUM)[0]
            elif _is_average(module):
                chain, activated = self._chain(node, _MAXIMUM)
                if activated:
                    yield chain

    def _chain(self, blur: Node, below: int) -> tuple[Chain, bool]:
        """Upwards from a blur as long as ranks are below, and whether an activation that the step has was met."""
        path, taken, block = self.trace.paths[blur], dict[str, str](), None
        obstacle, reason = self._obstacle(blur, blur), ""
        head, at, activated = blur, blur, False
        while len(at.args) == 1 and isinstance(at.args[0], Node):
            at = at.args[0]
            role = self._role(at)
            if role is None or role.rank >= below:
                break
            if len(at.users) > 1:
                obstacle = obstacle or f"{self.trace.name(at)} has a second consumer"
            obstacle = obstacle or role.but
            if role.name == "act":
                block = self._block(at, blur)
            alone = role.name != "through" and (role.name != "act" or block is None)
            obstacle = obstacle or self._obstacle(at, blur, alone)
            if role.name == "through":
                continue
            activated = activated or (role.rank == _ACT and role.name != "near")
            if obstacle:
                reason = obstacle
                break
            taken[role.name], head = self.trace.paths[at], at
            below = _NORM if role.name == "norm" else role.rank
        if taken and (overwritten := self._overwritten(head, taken)):
            return Chain(path, reason=overwritten), activated
        block = block if "act" in taken else None
        return Chain(path, **taken, block=block, reason=reason), activated

    def _role(self, node: Node) -> _Role | None:
        """What a node would be in a chain."""
        if node.op != "call_module":
            name = getattr(node.target, "__name__", str(node.target)).rstrip("_")
            return _Role("near", _FUNCTIONS[name], f"functional {name}") if name in _FUNCTIONS else None
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], Node):
            return None
        path, module = self.trace.paths[node], self.trace.module(node)
        cls, name = full_name(type(module)), type(module).__name__
        if type(module) is nn.Identity or (type(module) is nn.Sequential and not len(module)):
            return _Role("through", _NORM - 1)
        if name.startswith(("Drop", "StochasticDepth")) and not module._modules:
            return _Role("through", _NORM - 1, f"{path} drops" if _drops(module) else "")
        if type(module) is nn.MaxPool2d:
            dense = module.stride in (1, (1, 1)) and module.dilation in (1, (1, 1))
            return _Role("maximum", _MAXIMUM) if dense and not (module.return_indices or module.ceil_mode) else None
        if type(module) is nn.BatchNorm2d:
            return _Role("norm", _NORM)
        if cls == _BATCH_NORM_ACT:
            act, its = act_of(module.act), type(module.act).__name__
            if act is None:
                return _Role("near", _ACT, f"the activation of {path}, {its}, is not one the step has")
            return _Role("norm", _NORM if act == "none" else _ACT, f"{path} drops" if _drops(module.drop) else "")
        if act_of(module) is not None:
            return _Role("act", _ACT)
        if type(module).__module__ in _ACT_MODULES:
            return _Role("near", _ACT, f"{path}, {name}, is not an activation the step has")
        return _Role("near", _NORM, f"{path}, {name}, is not a BatchNorm2d") if "Norm" in name else None

    def _obstacle(self, node: Node, blur: Node, alone: bool = True) -> str:
        """Why a module must go on doing what it does: somebody else uses it, or looks at what goes in or comes out."""
        if node not in self.trace.paths:
            return ""
        path, module = self.trace.paths[node], self.trace.module(node)
        calls, names = self.trace.calls[id(module)], self.trace.names[id(module)]
        if alone and calls > 1:
            return f"{path} is called {calls} times"
        if alone and names > 1:
            return f"{path} has {names} names"
        if "forward" in vars(module):
            return f"the forward of {path} was replaced on the instance"
        borders = set(self.trace.stacks[node]) ^ {*self.trace.stacks[blur]} - {self.trace.paths[blur]}
        for name in sorted(borders):
            if hooked(self.trace.modules[name]):
                return f"{name} has hooks"
        if any(map(hooked, module.modules())):
            return f"a module inside {path} has hooks"
        return "" if node.meta["grad"] == blur.meta["grad"] else f"{path} is in another grad mode"

    def _block(self, act: Node, blur: Node) -> str | None:
        """The block that calls this activation here and elsewhere, if there is a form of it that leaves it out here."""
        caller = self.trace.stacks[act][-2]
        block: Any = self.trace.modules[caller]
        conv = _BLOCKS.get(full_name(type(block)))
        if conv is None or self.trace.calls[id(self.trace.module(act))] == 1 or "forward" in vars(block):
            return None
        begins = self.trace.paths[blur] == join(caller, conv, "0") and type(getattr(block, conv)) is nn.Sequential
        # composer's blur and convolution are one module, in the place of the strided convolution.
        strided = conv == "conv3" and self.trace.paths[blur] == join(caller, "conv2")
        return caller if (begins or strided) and self.trace.paths[act] == join(caller, "relu") else None

    def _overwritten(self, head: Node, taken: dict[str, str]) -> str:
        """Why the input must not be left as it is: the chain writes into it where others read, or others where it reads."""
        source: Any = head.args[0]
        in_place = "act" in taken and getattr(self.trace.modules[taken["act"]], "inplace", False)
        if in_place and "norm" not in taken and not self._is_fresh(source):
            return f"{taken['act']} is in place, and what it overwrites may be seen elsewhere"
        for user in source.users:
            if user is not head and self._may_write(user, source):
                return f"{self.trace.name(user)} may overwrite {self.trace.name(source)}"
        return ""

    def _is_fresh(self, node: Node) -> bool:
        """Whether the memory of this value is its own, and nobody else reads it."""
        if len(node.users) > 1:
            return False
        if node.op == "call_module":
            kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
            if isinstance(self.trace.module(node), kinds):
                return True
            role = self._role(node)
            below = role is not None and role.name == "through"
        else:
            below = node.target in (
                operator.add,
                operator.mul,
                torch.add,
            )  # may be in place, which torch.fx does not tell
        return below and isinstance(node.args[0], Node) and self._is_fresh(node.args[0])

    def _may_write(self, user: Node, source: Node) -> bool:
        if user.op == "call_module":
            return bool(getattr(self.trace.module(user), "inplace", False))
        # To torch.fx, a += b is a + b.
        operates = getattr(user.target, "__module__", "") == "_operator" and user.args[0] is source
        return operates or str(user.target).endswith("_") or bool(user.kwargs.get("inplace"))
