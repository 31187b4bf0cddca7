"""Operators without the dispatcher, which costs an eager call as much as half its launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Forward = Callable[..., tuple[Tensor, Sequence[Tensor], Any]]
_PLAIN = (Tensor, torch.nn.Parameter, type(None))


def traced(*tensors: Tensor | None) -> bool:
    """Whether somebody looks who must see one operator: a compiler, or a tensor that is not a plain one."""
    return torch.compiler.is_compiling() or any(type(x) not in _PLAIN for x in tensors)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, *inputs):
        result, saved, ctx.rest = forward(*inputs)
        ctx.save_for_backward(*saved)
        ctx.function = backward
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        if do is None:
            return (None,) * len(ctx.needs_input_grad)
        wanted = ctx.needs_input_grad[2:]
        grads = ctx.function(wanted, do, ctx.saved_tensors, ctx.rest)
        return None, None, *grads, *(None,) * (len(wanted) - len(grads))


def call(
    forward: Forward, backward: Callable[..., Sequence[Tensor | None]], *inputs: Any
) -> Tensor:
    """The result of forward(*inputs) = (result, tensors to save, anything else), differentiable once.

    backward(which inputs want a gradient, the result's, the saved tensors, anything else) gives those of the first
    inputs; the others have none.
    """
    result = _Eager.apply(forward, backward, *inputs)
    assert isinstance(result, Tensor)
    return result
