"""Eager calls equal the custom operators without the dispatcher, and tracers see the operators."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import (
    BlockIndex,
    block_mean,
    compressed_attention,
    group_norm,
    neighbor_map,
    pool_children,
    sdf_head,
    sparse_conv,
    spatial_sparse_attention,
    token_order,
    window_attention,
)
from kernels.attention.segment import compressed_segments, window_segments
from kernels.runtime import eager_autograd
from tests.kernel_inputs import DEVICE, random_coords, run

COORDS = random_coords([14, 9], 6)
INDEX = BlockIndex.from_coords(COORDS[token_order(COORDS)].to(DEVICE), 2)
N, P = INDEX.num_tokens, INDEX.num_compressed
NEIGHBORS = neighbor_map(COORDS.to(DEVICE))
CHILDREN = (
    torch.tensor([[0, -1, 3, 5, -1, -1, -1, 22], [1, 2, -1, -1, 4, -1, -1, -1]]).int().to(DEVICE)
)
HEADS = [(N, 2, 16), (N, 1, 16), (N, 1, 16)]
COMPRESSED = [(P, 1, 16), (P, 1, 16)]
SHIFTED = window_segments(INDEX, True)
OPS = torch.ops.sparse3d
CASES = {  # shapes of the inputs, public function, operator
    "ssa": (
        [*HEADS, *COMPRESSED, (N, 3)],
        lambda q, k, v, ck, cv, gates: spatial_sparse_attention(
            q, k, v, ck, cv, gates, INDEX, top_k=1, backend="triton"
        ),
        lambda *x: OPS.ssa(*x, INDEX.tensors(), 1, False, 0.25)[0],
    ),
    "window": (
        HEADS,
        lambda q, k, v: window_attention(q, k, v, INDEX, shifted=True, backend="triton"),
        lambda *x: OPS.segment_attention(*x, SHIFTED.tensors(), True, 0.25)[0],
    ),
    "compressed": (
        [HEADS[0], *COMPRESSED],
        lambda q, k, v: compressed_attention(q, k, v, INDEX, backend="triton"),
        lambda *x: OPS.segment_attention(*x, compressed_segments(INDEX).tensors(), False, 0.25)[0],
    ),
    "mean": (
        [(N, 5)],
        lambda x: block_mean(x, INDEX, plus_one=True, backend="triton"),
        lambda x: OPS.block_mean(x, INDEX.tensors(), True),
    ),
    "convolution": (
        [(N, 3), (27, 3, 4), (4,)],
        lambda x, w, b: sparse_conv(x, w, b, NEIGHBORS, backend="triton"),
        lambda *x: OPS.sparse_conv(*x, NEIGHBORS, 1, False, False),
    ),
    "convolution without bias": (
        [(N, 3), (27, 3, 4)],
        lambda x, w: sparse_conv(x, w, None, NEIGHBORS, size=2, upsample=True, backend="triton"),
        lambda *x: OPS.sparse_conv(*x, None, NEIGHBORS, 2, True, False),
    ),
    "norm": (
        [(N, 4), (4,), (4,)],
        lambda x, w, b: group_norm(x, INDEX.token_starts, 2, w, b, silu=True, backend="triton"),
        lambda x, w, b: OPS.group_norm(x, INDEX.token_starts, 2, w, b, 1e-5, True)[0],
    ),
    "pool": (
        [(N, 3)],
        lambda x: pool_children(x, CHILDREN, backend="triton"),
        lambda x: OPS.pool_children(x, CHILDREN, False),
    ),
    "head": (
        [(N, 6), (6,), (1,)],
        lambda x, w, b: sdf_head(x, w, b, backend="triton"),
        lambda *x: OPS.sdf_head(*x),
    ),
}


def inputs_of(shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes]


class TensorSubclass(torch.Tensor):
    """Not a plain tensor, like the tensors of a tracer."""


@pytest.mark.parametrize(("shapes", "function", "operator"), CASES.values(), ids=CASES)
def test_an_eager_call_equals_the_operator(shapes, function, operator, monkeypatch):
    inputs, calls = inputs_of(shapes), []
    call = eager_autograd.apply
    monkeypatch.setattr(eager_autograd, "apply", lambda *args: calls.append(1) or call(*args))
    expected = run(operator, inputs)
    assert not calls
    assert all(torch.equal(a, b) for a, b in zip(run(function, inputs), expected, strict=True))
    assert len(calls) == 1, "the call must not go through the dispatcher"
    assert torch.equal(
        function(*(x.as_subclass(TensorSubclass) for x in inputs)).as_subclass(torch.Tensor),
        expected[0],
    )
    assert len(calls) == 1
    again = run(lambda *x: checkpoint(function, *x, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    assert len(calls) == (2 if function is CASES["mean"][1] else 3), (
        "a function that saves no tensors is not computed again"
    )


@pytest.mark.parametrize(("shapes", "function", "operator"), CASES.values(), ids=CASES)
def test_torch_compile_uses_the_operator(shapes, function, operator):
    inputs = inputs_of(shapes)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert all(
        torch.equal(a, b) for a, b in zip(run(compiled, inputs), run(operator, inputs), strict=True)
    )


@pytest.mark.parametrize(("shapes", "function", "operator"), CASES.values(), ids=CASES)
def test_each_input_has_its_own_gradient_and_no_second_one(shapes, function, operator):
    for i in {0, len(shapes) - 1}:
        inputs, others = inputs_of(shapes), inputs_of(shapes)
        x, y = inputs[i].requires_grad_(), others[i].requires_grad_()
        (grad,) = torch.autograd.grad(function(*inputs).square().sum(), x, create_graph=True)
        (same,) = torch.autograd.grad(operator(*others).square().sum(), y)
        assert torch.equal(grad, same)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.square().sum().backward()
