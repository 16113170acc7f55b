"""Which modules a model calls, and where their values go: torch.fx on a copy, through which no data flows."""

from __future__ import annotations

import copy
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx
from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def hooked(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in HOOKS)


def join(*names: str) -> str:
    return ".".join(name for name in names if name)


def twin(module: nn.Module, tensor: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> Any:
    """A copy of modules without their hooks, its tensors the same ones or what ``tensor`` makes of them."""
    memo: dict[int, Any] = {}
    for inner in module.modules():
        memo.update({id(getattr(inner, hooks)): OrderedDict() for hooks in HOOKS})
        if isinstance(inner, nn.SyncBatchNorm):
            memo[id(inner.process_group)] = inner.process_group
        for t in (*inner._parameters.values(), *inner._buffers.values(), *vars(inner).values()):
            if isinstance(t, torch.Tensor):
                memo[id(t)] = tensor(t)
    return copy.deepcopy(module, memo)


class Trace:
    """The calls of modules in a model, in training or evaluation.

    Where a module cannot be traced, it is seen from outside, and what is inside it is traced apart, as long as it is clear
    how that is called: of a ``Sequential``, which may also be gone through by another's loop, only the parts are traced.
    """

    def __init__(self, model: nn.Module, training: bool, is_step: Callable[[nn.Module], bool]) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names = Counter(map(id, self.modules.values()))
        self.paths: dict[torch.fx.Node, str] = {}
        self.stacks: dict[
            torch.fx.Node, list[str]
        ] = {}  # the modules in whose forward the call is, outermost first, and itself
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            for prefix, graph in _graphs(model, "", training, is_step):
                for node in graph.nodes:
                    if node.op == "call_module":
                        self.paths[node] = join(prefix, str(node.target))
                        stack = node.meta["nn_module_stack"].values()
                        self.stacks[node] = [prefix, *(join(prefix, path) for path, _ in stack)]
        self.calls = Counter(id(self.modules[path]) for path in self.paths.values())

    def module(self, node: torch.fx.Node) -> nn.Module:
        return self.modules[self.paths[node]]

    def name(self, node: torch.fx.Node) -> str:
        return self.paths.get(node, node.name)


class _Tracer(torch.fx.Tracer):
    """Goes into what has children and is no step; notes what cannot be traced."""

    proxy_buffer_attributes = True  # or a write into a buffer would be done

    def __init__(self, opaque: set[str], is_step: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.opaque, self.is_step, self.failed = opaque, is_step, set[str]()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not m._modules or module_qualified_name in self.opaque or self.is_step(m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.is_leaf_module(m, path):
                raise
            self.failed.add(path)
            return self.create_proxy("call_module", path, args, kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["grad"] = torch.is_grad_enabled()
        return node


def _graphs(
    module: nn.Module, prefix: str, training: bool, is_step: Callable[[nn.Module], bool]
) -> Iterator[tuple[str, torch.fx.Graph]]:
    """Of a module, or of what is inside it where it cannot be traced: graphs, and the path that those in them are below."""
    opaque: set[str] = set()
    while "" not in opaque:
        tracer = _Tracer(opaque, is_step)
        try:
            if "forward" in vars(module):
                raise NotImplementedError("torch.fx looks at the class")
            copied = twin(module)
            for inner in copied.modules():
                inner.training = training
            graph = tracer.trace(copied)
        except Exception:
            opaque = {""}
            break
        if not tracer.failed:
            yield prefix, graph
            break
        opaque = opaque | tracer.failed
    apart = [(path, module.get_submodule(path)) for path in sorted(opaque)]
    for path, outer in apart:
        for name, child in outer.named_children():
            below = join(path, name)
            if type(child) is nn.Sequential:
                apart.append((below, child))
            elif child._modules:
                yield from _graphs(child, join(prefix, below), training, is_step)
