"""Autograd without the dispatcher: an eager call skips the cost of a custom operator.

A custom operator costs an eager call about half as much time as its kernel launches. Eager calls on
plain tensors therefore use an autograd function directly. Under torch.compile and for tensor
subclasses the custom operator is used, because the tracer must see one operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Result = Tensor | tuple[Tensor, ...]
Forward = Callable[..., tuple[Result, Sequence[Tensor | None], Any]]
_PLAIN_TYPES = (Tensor, torch.nn.Parameter, type(None))


def needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Return True if the call must go through the dispatcher, as one custom operator.

    This is the case under torch.compile, if any of the tensors is of a subclass, and inside a
    dispatch mode, such as that of selective activation checkpointing.
    """
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or any(type(x) not in _PLAIN_TYPES for x in tensors)
    )


class _EagerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, differentiable, *inputs):
        result, saved_tensors, ctx.context = forward(*inputs)
        ctx.save_for_backward(*saved_tensors)
        ctx.backward_function = backward
        ctx.differentiable = differentiable
        ctx.set_materialize_grads(False)
        if isinstance(result, tuple):
            ctx.mark_non_differentiable(*result[differentiable:])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads_of_results):
        wanted = grads_of_results[: ctx.differentiable]
        if all(grad is None for grad in wanted):
            return (None,) * len(ctx.needs_input_grad)
        needs_grad = ctx.needs_input_grad[3:]  # the first three are arguments of `apply`
        grads = ctx.backward_function(needs_grad, *wanted, ctx.saved_tensors, ctx.context)
        return None, None, None, *grads, *(None,) * (len(needs_grad) - len(grads))


def apply(
    forward: Forward,
    backward: Callable[..., Sequence[Tensor | None]],
    *inputs: Any,
    differentiable: int = 1,
) -> Any:
    """Call `forward` and make its first results differentiable once.

    Args:
        forward: Called as forward(*inputs). Returns (result or tuple of results, tensors to save,
            any other context).
        backward: Called as backward(needs_grad, gradients of the differentiable results, saved
            tensors, context), where needs_grad says for each input whether it needs a gradient. The
            gradient of a result that was not used is None. Returns the gradients of the first
            inputs; the remaining inputs get None.
        inputs: Arguments of `forward`.
        differentiable: Number of leading results that are differentiable.

    Returns:
        The result or results of `forward`.
    """
    return _EagerFunction.apply(forward, backward, differentiable, *inputs)
