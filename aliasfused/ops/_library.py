"""What every op room shares: the schema library, fakes, memory formats, and autograd for multilinear ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._prims_common import suggest_memory_format

library = torch.library.Library("aliasfused", "DEF")


def define(schema: str, fake: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Declare ``aliasfused::<schema>`` with the function that computes its output's shape, and return the op."""
    name = schema.partition("(")[0]
    library.define(schema)
    torch.library.register_fake(f"aliasfused::{name}", fake, lib=library)
    return getattr(torch.ops.aliasfused, name).default


def is_channels_last(x: torch.Tensor) -> bool:
    return x.dim() == 4 and suggest_memory_format(x) is torch.channels_last


def empty(x: torch.Tensor, shape: tuple[int, ...], channels_last: bool) -> torch.Tensor:
    """An uninitialised tensor like x of another shape, in the named memory format (4-D only)."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def wants_autograd(*tensors: torch.Tensor) -> bool:
    """Whether a gradient, a forward tangent or a functorch transform may be looking at the result."""
    return transformed() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def multilinear(
    op: Callable[..., torch.Tensor],
    tensors: int,
    vjp: Callable[..., tuple[torch.Tensor | None, ...]],
    vmap: Callable[..., tuple[torch.Tensor, int]],
    keep: Callable[..., tuple[Any, ...]] = lambda *args: (),
) -> Callable[..., torch.Tensor]:
    """Autograd of every order for an op that is linear in each of its first ``tensors`` arguments.

    1. Its reverse rule ``vjp(wanted, cotangent, saved, rest)`` is built from such ops again, so any order follows. ``saved``
       holds the tensor arguments, and is empty for ``tensors == 1``: a linear map needs nothing for its backward.
       ``rest`` is the other arguments followed by ``keep(*args)``, what the rule must know of the tensors' shapes.
    2. Its forward rule is the sum of the op with one tensor argument replaced by that argument's tangent.
    3. ``vmap(call, info, in_dims, *args)`` folds the mapped dimension into batch or channels.

    There are three autograd Functions. One that defines ``jvp`` breaks a full graph of torch.compile, and one that dynamo looks
    into loses its backward under ``torch.func.grad``: while compiling, the Function without jvp is entered as an opaque node.
    Both have a ``setup_context``, as transforms want it, for which torch binds arguments to a signature at each call; eager
    code without transforms has a shorter way.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rest: tuple[Any, ...], *given: torch.Tensor) -> torch.Tensor:
            if tensors > 1:
                ctx.save_for_backward(*given)
            ctx.rest = (*rest, *keep(*given, *rest))
            return op(*given, *rest)

        @staticmethod
        def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            return None, *vjp(ctx.needs_input_grad[1:], cotangent, ctx.saved_tensors, ctx.rest)

    class FunctionInGraph(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> torch.Tensor:
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            if tensors > 1:
                ctx.save_for_backward(*inputs[:tensors])
                ctx.save_for_forward(*inputs[:tensors])
            ctx.rest = (*inputs[tensors:], *keep(*inputs))
            ctx.arity = len(inputs)

        @staticmethod
        def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            grads = vjp(ctx.needs_input_grad, cotangent, ctx.saved_tensors, ctx.rest)
            return (*grads, *(None,) * (ctx.arity - tensors))

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[torch.Tensor, int]:
            return vmap(call, info.batch_size, in_dims, *args)

    class FunctionWithJvp(FunctionInGraph):
        @staticmethod
        def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
            rest = ctx.rest[: ctx.arity - tensors]
            if tensors == 1:
                return call(tangents[0], *rest)
            primals = ctx.saved_tensors
            terms = [
                call(*primals[:i], tangent, *primals[i + 1 :], *rest)
                for i, tangent in enumerate(tangents[:tensors])
                if tangent is not None
            ]
            return sum(terms[1:], start=terms[0])

    for function in (Function, FunctionInGraph, FunctionWithJvp):
        function.__name__ = function.__qualname__ = op._schema.name.replace("::", "_")  # type: ignore[attr-defined]

    @torch.compiler.allow_in_graph
    def in_graph(*args: Any) -> torch.Tensor:
        return FunctionInGraph.apply(*args)

    def call(*args: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return in_graph(*args)
        if transformed():
            return FunctionWithJvp.apply(*args)
        if wants_autograd(*args[:tensors]):
            return Function.apply(args[tensors:], *args[:tensors])
        return op(*args)

    return call


def fused(
    op: Callable[..., torch.Tensor],
    tensors: int,
    vjp: Callable[..., tuple[torch.Tensor | None, ...]],
    in_steps: Callable[..., torch.Tensor],
) -> Callable[..., torch.Tensor]:
    """Autograd of every order for an op that does several steps at once, its first ``tensors`` arguments being tensors or None.

    1. Its reverse rule is ``vjp(wanted, cotangent, saved, rest)``, with kernels of its own.
    2. What differentiates that rule again, forward-mode derivatives and torch.func's transforms run ``in_steps(*args)``
       instead: the same, one after the other, of differentiable operations.

    There are two autograd Functions, for the compiler and for eager code, where no transform arrives.
    """

    def gradients(ctx: Any, wanted: tuple[bool, ...], cotangent: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _again(lambda *some: in_steps(*some, *ctx.rest), wanted, cotangent, ctx.saved_tensors)
        return vjp(wanted, cotangent, ctx.saved_tensors, ctx.rest)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rest: tuple[Any, ...], *given: Any) -> torch.Tensor:
            ctx.save_for_backward(*given)
            ctx.rest = rest
            return op(*given, *rest)

        @staticmethod
        def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            return None, *gradients(ctx, ctx.needs_input_grad[1:], cotangent)

    class FunctionInGraph(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> torch.Tensor:
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            ctx.save_for_backward(*inputs[:tensors])
            ctx.rest = inputs[tensors:]

        @staticmethod
        def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            grads = gradients(ctx, ctx.needs_input_grad[:tensors], cotangent)
            return (*grads, *(None,) * len(ctx.rest))

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[torch.Tensor, int]:
            return torch.vmap(lambda *some: in_steps(*some, *args[tensors:]), in_dims[:tensors])(*args[:tensors]), 0

    for function in (Function, FunctionInGraph):
        function.__name__ = function.__qualname__ = op.__name__

    @torch.compiler.allow_in_graph
    def in_graph(*args: Any) -> torch.Tensor:
        return FunctionInGraph.apply(*args)

    def call(*args: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return in_graph(*args)
        if transformed():
            return in_steps(*args)
        if wants_autograd(*(t for t in args[:tensors] if t is not None)):
            return Function.apply(args[tensors:], *args[:tensors])
        return op(*args)

    return call


def transformed() -> bool:
    """Whether a functorch transform or forward-mode differentiation is at work, and no compiler."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _again(
    steps: Callable[..., torch.Tensor], wanted: tuple[bool, ...], cotangent: torch.Tensor, tensors: tuple[Any, ...]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of ``steps(*tensors)`` as a graph of their own."""
    with torch.enable_grad():
        # Views, for one may be computed from another: what flows on between them is not this node's to follow.
        views = [None if t is None else t.view_as(t) for t in tensors]
        asked = [t for t, want in zip(views, wanted, strict=True) if want and t is not None]
        grads = iter(torch.autograd.grad(steps(*views), asked, cotangent, create_graph=True))
    return tuple(next(grads) if want else None for want in wanted)
