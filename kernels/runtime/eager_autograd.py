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

Forward = Callable[..., tuple[Tensor, Sequence[Tensor], Any]]
_PLAIN_TYPES = (Tensor, torch.nn.Parameter, type(None))


def needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Return True if the call must go through the dispatcher, as one custom operator.

    This is the case under torch.compile and if any of the tensors is of a subclass.
    """
    return torch.compiler.is_compiling() or any(type(x) not in _PLAIN_TYPES for x in tensors)


class _EagerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, *inputs):
        result, saved_tensors, ctx.context = forward(*inputs)
        ctx.save_for_backward(*saved_tensors)
        ctx.backward_function = backward
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        needs_grad = ctx.needs_input_grad[2:]  # the first two inputs are the functions themselves
        grads = ctx.backward_function(needs_grad, grad_output, ctx.saved_tensors, ctx.context)
        return None, None, *grads, *(None,) * (len(needs_grad) - len(grads))


def apply(
    forward: Forward, backward: Callable[..., Sequence[Tensor | None]], *inputs: Any
) -> Tensor:
    """Call `forward` and make its result differentiable once.

    Args:
        forward: Called as forward(*inputs). Returns (result, tensors to save, any other context).
        backward: Called as backward(needs_grad, grad of the result, saved tensors, context), where
            needs_grad says for each input whether it needs a gradient. Returns the gradients of the
            first inputs; the remaining inputs get None.
        inputs: Arguments of `forward`.

    Returns:
        The result of `forward`.
    """
    result = _EagerFunction.apply(forward, backward, *inputs)
    assert isinstance(result, Tensor)
    return result
